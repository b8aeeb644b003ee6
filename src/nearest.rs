//! Suggestions for mistyped words.

/// Returns the known word that differs least from `word`: in two octets at most, or one if `word` has fewer than four. `None`:
/// there is none.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let most = if word.len() < 4 { 1 } else { 2 };
    let near = known.into_iter().map(|known| (distance(word, known), known));
    near.filter(|(distance, _)| *distance <= most).min().map(|(_, near)| near)
}

/// The number of octets that must be added, removed or replaced to make one word of the other (Levenshtein distance).
fn distance(one: &str, other: &str) -> usize {
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (number, octet) in one.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], number + 1);
        for (at, other) in other.bytes().enumerate() {
            let replaced = diagonal + usize::from(octet != other);
            diagonal = row[at + 1];
            row[at + 1] = replaced.min(diagonal + 1).min(row[at] + 1);
        }
    }
    row[other.len()]
}
