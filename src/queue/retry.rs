//! When a message that could not be sent is tried again, and for how long (RFC 5321 section 4.5.4.1).

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::clock::Timestamp;

/// The times between the attempts to send a message.
/// RFC 5321 section 4.5.4.1 wants half an hour between attempts after the first two, and at least four to five days.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Retry {
    /// From the first failure to the next attempt; the pause grows with each failure. Default 5 min.
    pub first: Duration,
    /// The longest pause. Default 4 h, or half of `give_up` if that is not more than 4 h. At least `first`, at most
    /// [`LONGEST_PAUSE`].
    pub max: Duration,
    /// A message of this age expires and returns to its sender. Default 5 days. More than `max`.
    pub give_up: Duration,
    /// The sender of a message of this age gets a DSN, once, that it is delayed; `None`: never. Default 4 h.
    pub delay_notice: Option<Duration>,
}

/// A message that is due later than this was deferred by a clock that was wrong, and is due now.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(30 * 24 * 60 * 60);

impl Default for Retry {
    fn default() -> Retry {
        let hours = |hours: u64| Duration::from_secs(hours * 60 * 60);
        Retry {
            first: Duration::from_secs(5 * 60),
            max: hours(4),
            give_up: hours(5 * 24),
            delay_notice: Some(hours(4)),
        }
    }
}

impl Retry {
    /// The pause before the next attempt: half the message's age, within bounds, a fifth more or less by `chance`, so
    /// that messages which failed together are not tried together. The age is in the file, so no count is kept.
    pub fn pause(&self, age: Duration, chance: u64) -> Duration {
        let pause = (age / 2).clamp(self.first, self.max);
        let permille = 800 + u32::try_from(chance % 401).unwrap_or(0);
        (pause * permille / 1000).max(Duration::from_millis(1))
    }
}

/// When the next attempt at a message is due. No pause is as long as [`LONGEST_PAUSE`]: a later time comes from a clock that was
/// wrong, and the attempt is due now.
pub(super) fn due(path: &Path) -> Option<SystemTime> {
    let (due, now) = (fs::metadata(path).and_then(|metadata| metadata.modified()).ok()?, SystemTime::now());
    Some(if due > now + LONGEST_PAUSE { SystemTime::UNIX_EPOCH } else { due })
}

/// Seconds of the greatest age that a message can have: an older one arrived before the clock was set.
const PLAUSIBLE_AGE: i64 = 10 * 365 * 24 * 60 * 60;

/// The age of a message; zero if its time of arrival is impossible.
pub fn age(arrived: Timestamp, now: Timestamp) -> Duration {
    let seconds = now.seconds().saturating_sub(arrived.seconds());
    let seconds = if seconds > PLAUSIBLE_AGE { 0 } else { seconds };
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rules: SMTP-65.
    #[test]
    fn pauses_grow_with_age_and_have_bounds() {
        let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
        let retry = Retry { first: minutes(5), max: minutes(240), give_up: minutes(7200), delay_notice: None };
        for (age, least, most) in [(0, 4, 6), (10, 4, 6), (60, 24, 36), (480, 192, 288), (7000, 192, 288)] {
            for chance in [0, 200, 400, u64::MAX] {
                let pause = retry.pause(minutes(age), chance);
                assert!((minutes(least)..=minutes(most)).contains(&pause), "{age}: {pause:?}");
            }
        }
    }
}
