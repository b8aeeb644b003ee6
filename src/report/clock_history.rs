//! The age of mail, even if the clock was set. If a clock that was set forward by years made all mail older, the whole
//! queue would expire at once.
//!
//! The history has the time at the last look, and the jumps of the clock. Between two looks, a step of up to 100 days
//! counts as passed: the machine was off, or only a weekly cron job looks. Two kinds of steps forward do not count for
//! messages whose time of arrival is from the clock before the step:
//!
//! ```text
//! more than 100 days                              the clock was set forward, or was slow until now
//! past a time from which the clock was set back   the clock was slow since then, and is right again
//! ```
//!
//! So a clock that is set by years makes no message older. If the clock is set back, jumps of the same length are
//! undone, and no more, because the clock may still be fast. A message that arrives in the future has the age zero; the
//! queue records when it was first seen ([`queue`](crate::queue)), and its age counts from then. `expire-after` is 90
//! days at most, so that a shorter downtime does not look like a clock that was set. A longer downtime delays expiry,
//! and never advances it.

use std::fmt::Write as _;
use std::time::Duration;

use crate::clock::Timestamp;
use crate::sorting::sort_by;

const DAY: i64 = 24 * 60 * 60;

/// Seconds of a step forward that count as passed, at most.
const LONGEST_STEP: i64 = 100 * DAY;

/// Seconds of a step that are not a jump: the clock was adjusted, or not looked at for some time.
const TOLERANCE: i64 = 2 * 60 * 60;

/// The most jumps in a history; then the smallest is removed. Each is longer than two hours, most are years.
const JUMPS_LIMIT: usize = 16;

/// The most fast clocks in a history; then the fastest is removed.
const LEFT_LIMIT: usize = 16;

/// The clock was set forward, between the looks at these times.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClockJump {
    /// The last look before the jump, by the old clock.
    pub before: Timestamp,
    /// The first look after the jump, by the new clock.
    pub after: Timestamp,
}

impl ClockJump {
    fn seconds(self) -> i64 {
        self.after.seconds() - self.before.seconds()
    }

    /// Whether this time is from the clock before the jump.
    fn is_after(self, time: Timestamp) -> bool {
        // The look may have come an hour after the jump, so a message of the new clock may be from before `after`.
        time.seconds() - self.before.seconds() < self.after.seconds() - time.seconds()
    }
}

/// The history of the clock.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClockHistory {
    /// The time at the last look.
    pub seen: Timestamp,
    /// The fast clocks that were set back: the times that they would show now, in order.
    left: Vec<Timestamp>,
    /// The jumps, in order.
    jumps: Vec<ClockJump>,
}

/// The result of a look at the clock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ClockStep {
    /// The time since the last look counts as passed.
    Passed,
    /// The clock was set forward or back, from this time.
    SetFrom(Timestamp),
}

impl ClockHistory {
    /// Begins a history at this time.
    pub fn new(seen: Timestamp) -> ClockHistory {
        ClockHistory { seen, left: Vec::new(), jumps: Vec::new() }
    }

    /// Records the present time.
    pub fn look(&mut self, now: Timestamp) -> ClockStep {
        let (before, step) = (self.seen, now.seconds() - self.seen.seconds());
        let was_back = |left: &Timestamp| left.seconds() - before.seconds() > TOLERANCE && now >= *left;
        let is_jump = step > LONGEST_STEP || step > TOLERANCE && self.left.iter().any(was_back);
        let passed = if is_jump { 0 } else { step.max(0) };
        self.seen = now;
        self.left.iter_mut().for_each(|left| *left = Timestamp::from_seconds(left.seconds().saturating_add(passed)));
        if is_jump {
            self.set_forward(before, now);
        } else if step < -TOLERANCE {
            self.set_back(before, -step);
        }
        self.left.retain(|left| *left > now);
        sort_by(&mut self.left, Timestamp::cmp);
        self.left.truncate(LEFT_LIMIT);
        if is_jump || step < -TOLERANCE { ClockStep::SetFrom(before) } else { ClockStep::Passed }
    }

    /// Adds the jumps up to `now`: one to each fast clock that is passed, because messages may be from each of them,
    /// and one for the rest, if that is more than [`LONGEST_STEP`].
    fn set_forward(&mut self, mut before: Timestamp, now: Timestamp) {
        let first = self.jumps.len();
        for left in self.left.iter().filter(|left| **left <= now) {
            let jump = ClockJump { before, after: *left };
            if jump.seconds() > TOLERANCE {
                self.jumps.push(jump);
                before = *left;
            }
        }
        let rest = ClockJump { before, after: now };
        match self.jumps[first..].last_mut() {
            Some(last) if rest.seconds() <= LONGEST_STEP => last.after = now,
            _ => self.jumps.push(rest),
        }
        while self.jumps.len() > JUMPS_LIMIT {
            let smallest = (0..self.jumps.len()).min_by_key(|at| self.jumps[*at].seconds());
            smallest.map(|at| self.jumps.remove(at));
        }
    }

    /// Records that the clock was set back from `clock` by this many seconds, and undoes as much of the last jumps.
    /// Messages that arrived in that time are in the future now, and have the age zero.
    fn set_back(&mut self, mut clock: Timestamp, mut seconds: i64) {
        self.left.push(clock);
        while let Some(last) = self.jumps.last_mut().filter(|_| seconds > 0) {
            let size = last.seconds();
            if size - seconds > TOLERANCE {
                last.after = Timestamp::from_seconds(last.after.seconds() - seconds);
                return;
            }
            // The clock before the jump may be faster than this one too.
            clock = Timestamp::from_seconds(clock.seconds() - size);
            self.left.push(clock);
            seconds -= size;
            self.jumps.pop();
        }
    }

    /// The age at the last look of a message with this time of arrival; zero if that is in the future.
    pub fn age(&self, arrived: Timestamp) -> Duration {
        let jumps = self.jumps.iter().filter(|jump| jump.is_after(arrived));
        let not_passed: i64 = jumps.map(|jump| jump.seconds()).sum();
        let seconds = self.seen.seconds().saturating_sub(arrived.seconds()).saturating_sub(not_passed);
        Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
    }

    /// When a message with this time of arrival reaches this age; if it has already, the time of the last look.
    pub fn when(&self, arrived: Timestamp, age: Duration) -> Timestamp {
        let left = age.saturating_sub(self.age(arrived)).as_secs();
        Timestamp::from_seconds(self.seen.seconds().saturating_add_unsigned(left))
    }

    /// The text of the history's file.
    pub fn text(&self) -> String {
        let mut text = format!("seen={}\n", self.seen.rfc3339());
        for left in &self.left {
            let _ = writeln!(text, "left={}", left.rfc3339());
        }
        for ClockJump { before, after } in &self.jumps {
            let _ = writeln!(text, "jump={} {}", before.rfc3339(), after.rfc3339());
        }
        text
    }

    /// Reads such a text. `None`: it is damaged. Impossible jumps are left out.
    pub fn parse(text: &str) -> Option<ClockHistory> {
        let values = |key: &'static str| text.lines().filter_map(move |line| line.strip_prefix(key)?.strip_prefix('='));
        let seen = values("seen").next().and_then(Timestamp::parse_rfc3339)?;
        let jump = |value: &str| {
            let (before, after) = value.split_once(' ')?;
            Some(ClockJump { before: Timestamp::parse_rfc3339(before)?, after: Timestamp::parse_rfc3339(after)? })
        };
        // The clock may have been adjusted since the jump.
        let is_possible =
            |jump: &ClockJump| jump.before < jump.after && jump.after.seconds() <= seen.seconds() + TOLERANCE;
        Some(ClockHistory {
            seen,
            left: values("left").filter_map(Timestamp::parse_rfc3339).take(LEFT_LIMIT).collect(),
            jumps: values("jump").filter_map(jump).filter(is_possible).take(JUMPS_LIMIT).collect(),
        })
    }
}

#[cfg(test)]
mod tests;
