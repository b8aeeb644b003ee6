//! Limits how often a warning is logged: otherwise clients that cause it could fill the disk.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use crate::threads::Guarded;

/// How long a warning about the same subject is not logged again.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// For each subject of warnings, when one was logged last, and how many were not logged since.
pub type LoggedWarnings<K> = HashMap<K, (Instant, usize)>;

/// Whether to log a warning about these subjects, because none of them was logged within the last minute. Returns the
/// number of warnings about them that were not logged since; `None`: do not log this one. If `limit` subjects were logged
/// within a minute, no others are.
pub fn may_log<K: Clone + Eq + Hash>(
    logged: &mut LoggedWarnings<K>, subjects: &[K], limit: usize, now: Instant,
) -> Option<usize> {
    let is_recent = |last: Instant| now.duration_since(last) < LOG_INTERVAL;
    if logged.len() >= limit {
        logged.retain(|_, (last, _)| is_recent(*last));
    }
    let is_logged = |subject| logged.get(subject).is_some_and(|(last, _)| is_recent(*last));
    if logged.len() >= limit || subjects.iter().any(is_logged) {
        for subject in subjects {
            logged.entry(subject.clone()).and_modify(|(_, others)| *others += 1);
        }
        return None;
    }
    let others = subjects.iter().filter_map(|subject| Some(logged.get(subject)?.1)).max().unwrap_or(0);
    logged.extend(subjects.iter().map(|subject| (subject.clone(), (now, 0))));
    Some(others)
}

/// Whether to log an event of the whole process, such as that the system gives it no thread, and how many were not logged
/// since its last line: see [`may_log`].
pub fn may_log_event(event: &'static str) -> Option<usize> {
    static LOGGED: LazyLock<Guarded<LoggedWarnings<&'static str>>> = LazyLock::new(Guarded::default);
    let mut logged = LOGGED.lock();
    may_log(&mut logged, &[event], usize::MAX, Instant::now())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_is_logged_once_a_minute_with_the_number_of_those_between() {
        let (mut logged, begun) = (LoggedWarnings::default(), Instant::now());
        let mut at = |second, subjects: &[char]| may_log(&mut logged, subjects, 3, begun + Duration::from_secs(second));
        let seconds = [0, 0, 59, 60, 61, 119, 120, 300, 301];
        let admitted = seconds.map(|second| at(second, &['a']));
        assert_eq!(admitted, [Some(0), None, None, Some(2), None, None, Some(2), Some(0), None]);
        // If one of the subjects was logged, the warning is not. The other subject does not count as logged.
        assert_eq!((at(302, &['a', 'b']), at(303, &['b', 'c'])), (None, Some(0)));
        assert_eq!(at(304, &['d']), None, "three subjects were logged within a minute");
        assert_eq!((at(360, &['d']), at(360, &['a'])), (Some(0), None));
        // When there are too many, those of the last minute stay.
        assert_eq!((at(364, &['e']), at(365, &['a', 'd'])), (Some(0), None));
        assert_eq!(at(425, &['a', 'd']), Some(1));
        assert_eq!(["one", "one", "other"].map(may_log_event), [Some(0), None, Some(0)]);
    }
}
