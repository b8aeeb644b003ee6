//! How much time has passed, although the clock may have been set: by this the age of all mail is measured.
//!
//! The history has the time that was seen last, and the jumps of the clock. Any time up to 100 days counts as passed between
//! two looks: the machine was off, or cron looks once a week only. Two kinds of steps forward do not count, for messages whose
//! time of arrival is from the clock before the step:
//!
//! ```text
//! more than 100 days                                          the clock was set forward, or was behind
//! from before a time that it was set back from to after it    the clock was behind, and is right again
//! ```
//!
//! So a clock that is set by years makes no message older. If it is set back, that much of the last jumps is undone, and no more:
//! the clock may still be ahead. A message that arrives in the future has the age zero, and the queue records when it was first
//! seen ([`queue`](crate::queue)), from which its age counts. `expire-after` is 90 days at most, so that no downtime that is
//! shorter than that is taken for a clock that was set. A longer one makes mail expire later, never sooner.

use std::fmt::Write as _;
use std::time::Duration;

use crate::clock::Timestamp;

const DAY: i64 = 24 * 60 * 60;

/// Seconds between two looks that count as passed.
const LONGEST_STEP: i64 = 100 * DAY;

/// Seconds by which the clock may be adjusted, or may have gone on unseen, without being taken for set.
const TOLERANCE: i64 = 2 * 60 * 60;

/// Jumps that are remembered: each is one of more than two hours, nearly always of years. Then the smallest is forgotten.
const JUMPS_LIMIT: usize = 16;

/// Times that the clock was set back from and that are remembered; then the latest is forgotten.
const LEFT_LIMIT: usize = 16;

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
    /// What the clocks would be now that it was set back from, if that is in the future. In order.
    left: Vec<Timestamp>,
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
        ClockHistory { seen, left: Vec::new(), jumps: Vec::new() }
    }

    /// Looks at the clock.
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
        self.left.sort_unstable();
        self.left.truncate(LEFT_LIMIT);
        if is_jump || step < -TOLERANCE { ClockStep::SetFrom(before) } else { ClockStep::Passed }
    }

    /// Adds the jumps to `now`: to each of the clocks that were left, as messages may be from each of them, and from the last
    /// one, if that is more than may have passed.
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

    /// The clock was set back, from `clock`, by so many seconds: of the last jumps so much is undone. Nothing has a time of
    /// arrival from there, or it is in the future.
    fn set_back(&mut self, mut clock: Timestamp, mut seconds: i64) {
        self.left.push(clock);
        while let Some(last) = self.jumps.last_mut().filter(|_| seconds > 0) {
            let size = last.seconds();
            if size - seconds > TOLERANCE {
                last.after = Timestamp::from_seconds(last.after.seconds() - seconds);
                return;
            }
            // The clock before the jump may be ahead of this one too.
            clock = Timestamp::from_seconds(clock.seconds() - size);
            self.left.push(clock);
            seconds -= size;
            self.jumps.pop();
        }
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
        let mut text = format!("seen={}\n", self.seen.rfc3339());
        for left in &self.left {
            let _ = writeln!(text, "left={}", left.rfc3339());
        }
        for ClockJump { before, after } in &self.jumps {
            let _ = writeln!(text, "jump={} {}", before.rfc3339(), after.rfc3339());
        }
        text
    }

    /// Reads such a file. `None`: it is damaged. Jumps that cannot be are left out.
    pub fn parse(text: &str) -> Option<ClockHistory> {
        let values = |key: &'static str| text.lines().filter_map(move |line| line.strip_prefix(key)?.strip_prefix('='));
        let seen = values("seen").next().and_then(Timestamp::parse_rfc3339)?;
        let jump = |value: &str| {
            let (before, after) = value.split_once(' ')?;
            Some(ClockJump { before: Timestamp::parse_rfc3339(before)?, after: Timestamp::parse_rfc3339(after)? })
        };
        // The clock may have been adjusted since.
        let can_be = |jump: &ClockJump| jump.before < jump.after && jump.after.seconds() <= seen.seconds() + TOLERANCE;
        Some(ClockHistory {
            seen,
            left: values("left").filter_map(Timestamp::parse_rfc3339).take(LEFT_LIMIT).collect(),
            jumps: values("jump").filter_map(jump).filter(can_be).take(JUMPS_LIMIT).collect(),
        })
    }
}

#[cfg(test)]
mod tests;
