//! How much time has passed, although the clock may have been set: by this the age of all mail is measured.
//!
//! The history has the time that was seen last, and the jumps of the clock. Between two looks any time up to 100 days counts
//! as passed: the machine was off, or cron looks once a week only. Two kinds of steps forward do not count, for messages
//! whose time of arrival is from the clock before the step:
//!
//! ```text
//! more than 100 days                                     the clock was set forward, or was behind
//! from before the latest time ever seen to after it      the clock was set back earlier, and is right again
//! ```
//!
//! So a clock that is set by years makes no message older. If it is set back, the jumps to later times are forgotten;
//! a message that arrives in the future has the age zero, and the queue records when it was first seen
//! ([`queue`](crate::queue)), from which its age counts. `expire-after` is 90 days at most, so that no downtime that is
//! shorter than that is taken for a clock that was set. Such a downtime makes mail expire later, never sooner.

use std::fmt::Write as _;
use std::time::Duration;

use crate::clock::Timestamp;

const DAY: i64 = 24 * 60 * 60;

/// Seconds between two looks that count as passed.
const LONGEST_STEP: i64 = 100 * DAY;

/// Seconds by which the clock may be adjusted, or may have gone on unseen, without being taken for set.
const TOLERANCE: i64 = 2 * 60 * 60;

/// Jumps that are remembered: each is one of more than two hours, nearly always of years. Then the oldest is forgotten.
const JUMPS_LIMIT: usize = 16;

/// The clock was set forward, between the looks at these two times.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClockJump {
    pub before: Timestamp,
    pub after: Timestamp,
}

impl ClockJump {
    fn seconds(self) -> i64 {
        self.after.seconds() - self.before.seconds()
    }

    /// Whether this time is from the clock before the jump.
    fn is_after(self, time: Timestamp) -> bool {
        // The jump may have been seen an hour late, so a message of the new clock may be from before `after`.
        time.seconds() - self.before.seconds() < self.after.seconds() - time.seconds()
    }
}

/// What is known of the clock.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClockHistory {
    /// The time that was seen last.
    pub seen: Timestamp,
    /// The latest time that was ever seen.
    latest: Timestamp,
    /// In order.
    jumps: Vec<ClockJump>,
}

/// What a look at the clock has found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ClockStep {
    /// The time between counts as passed.
    Passed,
    /// The clock was set forward or back, from this time.
    SetFrom(Timestamp),
}

impl ClockHistory {
    /// A history that begins at this time.
    pub fn new(seen: Timestamp) -> ClockHistory {
        ClockHistory { seen, latest: seen, jumps: Vec::new() }
    }

    /// Looks at the clock.
    pub fn look(&mut self, now: Timestamp) -> ClockStep {
        let (before, step) = (self.seen, now.seconds() - self.seen.seconds());
        let was_back = self.latest.seconds() - before.seconds() > TOLERANCE && now >= self.latest;
        self.seen = now;
        self.latest = self.latest.max(now);
        if step < 0 {
            // Nothing has a time of arrival from there, or it is in the future.
            self.jumps.retain(|jump| jump.after <= now);
        }
        if step > LONGEST_STEP || step > TOLERANCE && was_back {
            self.jumps.push(ClockJump { before, after: now });
            let more = self.jumps.len().saturating_sub(JUMPS_LIMIT);
            self.jumps.drain(..more);
            return ClockStep::SetFrom(before);
        }
        if step < -TOLERANCE { ClockStep::SetFrom(before) } else { ClockStep::Passed }
    }

    /// The age of a message at the last look, by its time of arrival; zero if that is in the future.
    pub fn age(&self, arrived: Timestamp) -> Duration {
        let jumps = self.jumps.iter().filter(|jump| jump.is_after(arrived));
        let not_passed: i64 = jumps.map(|jump| jump.seconds()).sum();
        let seconds = self.seen.seconds().saturating_sub(arrived.seconds()).saturating_sub(not_passed);
        Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
    }

    /// When a message that has arrived then has this age: at the last look, if it has it already.
    pub fn when(&self, arrived: Timestamp, age: Duration) -> Timestamp {
        let left = age.saturating_sub(self.age(arrived)).as_secs();
        Timestamp::from_seconds(self.seen.seconds().saturating_add_unsigned(left))
    }

    /// The history as its file has it.
    pub fn text(&self) -> String {
        let mut text = format!("seen={}\nlatest={}\n", self.seen.rfc3339(), self.latest.rfc3339());
        for ClockJump { before, after } in &self.jumps {
            let _ = writeln!(text, "jump={} {}", before.rfc3339(), after.rfc3339());
        }
        text
    }

    /// Reads such a file. `None`: it is damaged. Jumps that cannot be are left out.
    pub fn parse(text: &str) -> Option<ClockHistory> {
        let values = |key: &'static str| text.lines().filter_map(move |line| line.strip_prefix(key)?.strip_prefix('='));
        let time = |key| values(key).next().and_then(Timestamp::parse_rfc3339);
        let seen = time("seen")?;
        let jump = |value: &str| {
            let (before, after) = value.split_once(' ')?;
            Some(ClockJump { before: Timestamp::parse_rfc3339(before)?, after: Timestamp::parse_rfc3339(after)? })
        };
        let jumps = values("jump").filter_map(jump).filter(|jump| jump.before < jump.after && jump.after <= seen);
        let jumps = jumps.take(JUMPS_LIMIT).collect();
        Some(ClockHistory { seen, latest: time("latest").unwrap_or(seen).max(seen), jumps })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Day `day` of a calendar that begins on 2026-01-01.
    fn day(day: i64) -> Timestamp {
        Timestamp::from_seconds(1_767_225_600 + day * DAY)
    }

    const YEARS: i64 = 5 * 365;

    /// Looks at these days. Returns the history, which goes through its file after each.
    fn looks(days: &[i64]) -> ClockHistory {
        let mut history = ClockHistory::new(day(days[0]));
        for now in &days[1..] {
            history.look(day(*now));
            let read = ClockHistory::parse(&history.text());
            assert_eq!(read.as_ref(), Some(&history));
        }
        history
    }

    /// The days of the looks; the days of arrival, each with the age in days at the last look.
    #[test]
    fn a_clock_that_is_set_makes_no_message_older() {
        type Row = (&'static str, &'static [i64], &'static [(i64, u64)]);
        let rows: [Row; 12] = [
            ("the clock goes", &[0, 1, 2, 14], &[(0, 14), (13, 1), (14, 0)]),
            ("the machine was off, or cron looks seldom", &[0, 99], &[(0, 99), (-10, 109)]),
            ("set forward", &[10, 10 + YEARS], &[(0, 10), (9, 1), (10, 0), (10 + YEARS, 0)]),
            ("set forward, and two weeks later", &[10, 10 + YEARS, 24 + YEARS], &[(0, 24), (10 + YEARS, 14)]),
            ("set forward and back", &[10, 10 + YEARS, 11], &[(0, 11), (10, 1), (10 + YEARS, 0)]),
            ("back, which is passed again", &[10, 10 + YEARS, 11, 25], &[(0, 25), (11, 14), (10 + YEARS, 0)]),
            ("set back", &[10, 10 - YEARS], &[(0, 0), (9, 0), (10 - YEARS, 0)]),
            ("set back and forward", &[10, 10 - YEARS, 11], &[(0, 11), (10, 1), (10 - YEARS, 0)]),
            ("both, and two weeks later", &[10, 10 - YEARS, 11, 25], &[(0, 25), (10, 15), (10 - YEARS, 14)]),
            ("set back by a month and forward", &[40, 10, 41], &[(39, 2), (10, 0), (41, 0)]),
            ("set forward twice", &[0, YEARS, 1 + YEARS, 1 + 2 * YEARS], &[(0, 1), (YEARS, 1), (1 + 2 * YEARS, 0)]),
            ("set forward while it was off, and back", &[0, YEARS, 3, 4], &[(0, 4), (3, 1), (YEARS, 0)]),
        ];
        for (what, days, messages) in rows {
            let history = looks(days);
            for (arrived, age) in messages {
                assert_eq!(history.age(day(*arrived)).as_secs() / 86_400, *age, "{what}: {arrived}");
            }
        }
    }

    #[test]
    fn a_clock_without_a_battery_fills_no_file() {
        let days: Vec<_> = (0..100).flat_map(|boot| [-20_000, boot]).collect();
        let history = looks(&days);
        assert!(history.text().lines().count() <= 3, "{}", history.text());
        assert_eq!(history.age(day(90)).as_secs() / 86_400, 9);
        let days: Vec<_> = (0..100).map(|jump| jump * 101).collect();
        assert_eq!(looks(&days).jumps.len(), JUMPS_LIMIT);
    }

    #[test]
    fn a_step_is_reported_if_the_clock_was_set() {
        let mut history = ClockHistory::new(day(0));
        let hour = |hours: i64| Timestamp::from_seconds(day(0).seconds() + hours * 3600);
        for (now, step) in [
            (hour(1), ClockStep::Passed),
            (hour(0), ClockStep::Passed),
            (day(100), ClockStep::Passed),
            (day(201), ClockStep::SetFrom(day(100))),
            (day(190), ClockStep::SetFrom(day(201))),
            (day(191), ClockStep::Passed),
            (day(202), ClockStep::SetFrom(day(191))),
        ] {
            assert_eq!(history.look(now), step, "{now:?}");
        }
    }

    #[test]
    fn a_damaged_file_is_as_none() {
        for text in ["", "seen=", "seen=yesterday\n", "latest=2026-01-01T00:00:00Z\n", "\0\0\0"] {
            assert_eq!(ClockHistory::parse(text), None, "{text}");
        }
        let text = "seen=2026-01-02T00:00:00Z\njump=2026-01-01T00:00:00Z\njump=2031-01-01T00:00:00Z 2026-01-01T00:00:00Z\n\
                    jump=2026-01-01T00:00:00Z 2031-01-01T00:00:00Z\n";
        assert_eq!(ClockHistory::parse(text), Some(ClockHistory::new(day(1))));
    }
}
