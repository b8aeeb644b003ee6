//! Counts in texts for people: `1 message waits`, `2 messages wait`.

/// The count, and `one` if it is 1, otherwise `several`.
pub fn counted<N: TryInto<u64>>(count: N, one: &str, several: &str) -> String {
    let count = count.try_into().unwrap_or(u64::MAX);
    format!("{count} {}", if count == 1 { one } else { several })
}
