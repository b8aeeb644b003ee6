//! When a deferred message is tried again, and for how long (RFC 5321 section 4.5.4.1); and the age of a message.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::clock::Timestamp;

/// The times between the attempts to send a message. RFC 5321 section 4.5.4.1 asks for at least half an hour between
/// attempts, but for two in the first hour, and for four to five days at least before a message expires. By default the
/// pauses are about 5, 5, 5, 7, 11, 17 and 25 min, and so on up to 4 h: more attempts while the failure is young.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Retry {
    /// The pause after the first attempt; pauses grow with the message's age. Default 5 min.
    pub first: Duration,
    /// The longest pause. Default 4 h, or half of `give_up` if that is not more than 4 h. At least `first`, at most
    /// [`LONGEST_PAUSE`].
    pub max: Duration,
    /// A message of this age expires and returns to its sender. Default 5 days. More than `max`.
    pub give_up: Duration,
    /// The sender of a message of this age gets a DSN, once, that it is delayed; `None`: never. Default 4 h.
    pub delay_warning: Option<Duration>,
}

/// The longest pause between attempts. If a message is due later than that, the clock was wrong when it was deferred.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(30 * 24 * 60 * 60);

impl Default for Retry {
    fn default() -> Retry {
        let hours = |hours: u64| Duration::from_secs(hours * 60 * 60);
        let first = Duration::from_secs(5 * 60);
        Retry { first, max: hours(4), give_up: hours(5 * 24), delay_warning: Some(hours(4)) }
    }
}

impl Retry {
    /// The pause before the next attempt, 1 ms at least: half the message's `age`, between `first` and `max`, then a
    /// fifth more or less by the random number `chance`, so that messages which failed together are not tried together.
    pub fn pause(&self, age: Duration, chance: u64) -> Duration {
        let pause = (age / 2).clamp(self.first, self.max);
        let permille = 800 + u32::try_from(chance % 401).unwrap_or(0);
        (pause * permille / 1000).max(Duration::from_millis(1))
    }
}

/// When the next attempt at the message in this file is due. `None`: the file is gone.
pub(super) fn due(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|metadata| metadata.modified()).ok().map(due_at)
}

/// When a message is due whose file has this time of modification. A time later than [`LONGEST_PAUSE`] from now is from
/// a wrong clock: the message is due at once, instead of waiting for years.
pub(super) fn due_at(modified: SystemTime) -> SystemTime {
    if modified > SystemTime::now() + LONGEST_PAUSE { SystemTime::UNIX_EPOCH } else { modified }
}

/// The age of a message; zero if its time of arrival is in the future.
pub fn age(arrived: Timestamp, now: Timestamp) -> Duration {
    let seconds = now.seconds().saturating_sub(arrived.seconds());
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

/// When a message arrived: at `stated` or, if that is impossible, when it was first seen. If both are possible, the
/// later one counts: a slow clock must not make the message older than it is, or it would expire too soon. `None`:
/// neither is possible.
pub(super) fn arrival(stated: Timestamp, first_seen: Option<Timestamp>, now: Timestamp) -> Option<Timestamp> {
    [Some(stated), first_seen].into_iter().flatten().filter(|time| time.is_possible(now)).max()
}

/// Like [`arrival`]; if neither time is possible, `now`. While `now` itself is impossible, `stated`.
pub(super) fn arrival_or_now(stated: Timestamp, first_seen: Option<Timestamp>, now: Timestamp) -> Timestamp {
    let unseen = if now.is_possible(now) { now } else { stated };
    arrival(stated, first_seen, now).unwrap_or(unseen)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rules: SMTP-65.
    #[test]
    fn pauses_grow_with_age_and_have_bounds() {
        let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
        let retry = Retry { first: minutes(5), max: minutes(240), give_up: minutes(7200), delay_warning: None };
        for (age, least, most) in [(0, 4, 6), (10, 4, 6), (60, 24, 36), (480, 192, 288), (7000, 192, 288)] {
            for chance in [0, 200, 400, u64::MAX] {
                let pause = retry.pause(minutes(age), chance);
                assert!((minutes(least)..=minutes(most)).contains(&pause), "{age}: {pause:?}");
            }
        }
    }
}
