//! Sorting with one compiled function for all types. The standard library's is compiled for each type: 4 KB each time.

use std::cmp::Ordering;

/// Sorts the items. Equal ones stay in their order.
pub fn sort_by<T>(items: &mut [T], compare: impl Fn(&T, &T) -> Ordering) {
    let order = sorted_places(items.len(), &|one, other| compare(&items[one], &items[other]));
    arrange(items, order);
}

/// Sorts the items by their keys, each of which is computed once. Items with equal keys stay in their order.
pub fn sort_by_cached_key<T, K: Ord>(items: &mut [T], key: impl Fn(&T) -> K) {
    let keys: Vec<K> = items.iter().map(key).collect();
    arrange(items, sorted_places(keys.len(), &|one, other| keys[one].cmp(&keys[other])));
}

/// Moves each item to its place.
fn arrange<T>(items: &mut [T], mut order: Vec<usize>) {
    for first in 0..items.len() {
        let mut place = first;
        // `order[place]` is the place of the item that belongs there. Follow these places until one needs the first item.
        while order[place] != first {
            let from = std::mem::replace(&mut order[place], place);
            items.swap(place, from);
            place = from;
        }
        order[place] = place;
    }
}

/// The places of the items, from the first of the sorted items to the last.
fn sorted_places(count: usize, compare: &dyn Fn(usize, usize) -> Ordering) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_unstable_by(|one, other| compare(*one, *other).then(one.cmp(other)));
    order
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_sorts_as_the_standard_library_does(mut items: Vec<(u8, u16)>) {
            let mut expected = items.clone();
            expected.sort_by_key(|(key, _)| *key);
            let mut by_key = items.clone();
            sort_by(&mut items, |(one, _), (other, _)| one.cmp(other));
            sort_by_cached_key(&mut by_key, |(key, _)| *key);
            prop_assert_eq!(&items, &expected);
            prop_assert_eq!(by_key, expected);
        }
    }
}
