//! When the next call to a provider begins: a pure function of the earlier calls, of two clocks that the caller reads, and
//! of random numbers that the caller draws.
//!
//! ```text
//! CallTimer::new ──▶ time_left(now) ──▶ wait for at most a minute, and ask again until it is zero ────▶ the call
//!                        ▲                                                                               │
//!                        └───────────── call_ended(begun, ended, outcome, chance) ◀──────────────────────┘
//! ```
//!
//! After a failed call there is a pause, regardless of the schedule. After a call in which the customer deferred mail,
//! for instance because a disk is full, the next call is due after such a pause, or by the schedule if that is earlier:
//! one full mailbox must not delay the mail of the others. The pauses grow, so that a customer that fails does not call
//! all the time. Otherwise:
//!
//! - `every`: the first call is due at once. Each other call is due this time after the last one began, or at once if that
//!   one took longer.
//! - `at`: the call is due at the first moment of the timetable after the end of the last call. Moments that passed
//!   during a call, while the machine slept or when the clock was set forward are skipped.
//!
//! On the days when the clock changes, a window (`every` within `at`) has all moments at which the clock shows a time of
//! the window: those in the repeated hour come twice, those in the skipped hour do not come. A single time comes exactly
//! once on each of its days: at its first occurrence in the repeated hour, or at the end of the skipped hour.

mod timetable;

use std::iter::successors;
use std::time::Duration;

use crate::clock::{Day, Occurrence, Timestamp};

pub use self::timetable::{Schedule, Times, Timetable, TimetableEntry, When};

/// One moment on both clocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Clocks {
    /// The time of day, which may be set back and forth.
    pub date: Timestamp,
    /// A monotonic clock. If it counts while the machine sleeps, a call that was due then is made when the machine
    /// wakes; if it stops, that call is skipped.
    pub ticks: Duration,
}

/// The outcome of a call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CallOutcome {
    /// A call without mail (453, RFC 2645 section 5.2.1) is a success too.
    Success,
    /// The call succeeded, but the customer deferred some mail, which the provider still holds.
    Deferred,
    Failure,
}

/// Computes when the next call to one provider is due, from how the last ones ended.
pub struct CallTimer {
    schedule: Schedule,
    /// The end of the pause after a failure, in ticks; now, for a call at once. It overrides the schedule.
    until: Option<Duration>,
    /// The end of the pause after a call in which mail was deferred, in ticks. It adds a call to the schedule.
    extra: Option<Duration>,
    /// The moment from which the schedule counts: with `every` the begin of the last call, with `at` its end.
    since: Clocks,
    /// The delay of the next call after its due time.
    jitter: Duration,
    /// The number of consecutive calls that failed or in which mail was deferred.
    failures: u32,
}

/// A caller that asks at least this often misses no call. Callers ask each minute, but may be late on a busy machine.
const LATENESS_LIMIT: Duration = Duration::from_secs(120);

/// While the two clocks agree within this many seconds, the time of day was not set.
const CLOCK_TOLERANCE: u64 = 60;

/// How many days are searched for a call: yesterday, whose last hour may repeat, today, and two weeks, because a skipped hour
/// may have all of a weekly window.
const SEARCH_DAYS: usize = 16;

impl CallTimer {
    /// A timer before the first call. `chance`: a random number.
    pub fn new(schedule: &Schedule, now: Clocks, chance: u64) -> CallTimer {
        CallTimer {
            schedule: schedule.clone(),
            until: matches!(schedule.when, When::Every(_)).then_some(now.ticks),
            extra: None,
            since: now,
            jitter: up_to(schedule.jitter, chance),
            failures: 0,
        }
    }

    /// The time until the next call; zero: it is due. The caller must ask again at least once a minute, because the clock may
    /// be set.
    pub fn time_left(&self, now: Clocks) -> Duration {
        if let Some(until) = self.until {
            return until.saturating_sub(now.ticks);
        }
        let scheduled = self.scheduled(now);
        self.extra.map_or(scheduled, |extra| scheduled.min(extra.saturating_sub(now.ticks)))
    }

    /// The time until the next call by the schedule alone.
    fn scheduled(&self, now: Clocks) -> Duration {
        match &self.schedule.when {
            When::Every(every) => (self.since.ticks + *every + self.jitter).saturating_sub(now.ticks),
            When::At(timetable) => {
                let ahead = first_after(timetable, self.after(now)).seconds() - now.date.seconds();
                let distance = Duration::from_secs(ahead.unsigned_abs());
                if ahead > 0 { distance + self.jitter } else { self.jitter.saturating_sub(distance) }
            }
        }
    }

    /// The time of day of the next call, unless the clock is set before; for the log.
    pub fn next_call(&self, now: Clocks) -> Timestamp {
        later(now.date, self.time_left(now))
    }

    /// Records the end of a call. `chance`: a random number.
    pub fn call_ended(&mut self, begun: Clocks, ended: Clocks, outcome: CallOutcome, chance: u64) {
        let doubled = self.schedule.retry_first.saturating_mul(2_u32.saturating_pow(self.failures));
        let pause = doubled.min(self.schedule.retry_max);
        let pause_end = ended.ticks + pause + up_to(pause / 10, chance);
        self.failures = if outcome == CallOutcome::Success { 0 } else { self.failures.saturating_add(1) };
        self.until = (outcome == CallOutcome::Failure).then_some(pause_end);
        self.extra = (outcome == CallOutcome::Deferred).then_some(pause_end);
        if outcome == CallOutcome::Failure {
            return;
        }
        self.jitter = up_to(self.schedule.jitter, chance);
        self.since = match self.schedule.when {
            When::Every(_) => begun,
            // If the clock was set back a little during the call, the moment of this call must not come a second time.
            When::At(_) => Clocks { date: begun.date.max(ended.date), ..ended },
        };
    }

    /// Ends a pause after failures, if there is one. If the next call fails too, its pause is longer all the same: only a
    /// success resets the pauses.
    pub fn network_is_back(&mut self, now: Clocks) {
        if self.until.is_some() {
            self.until = Some(now.ticks);
        }
    }

    /// The moment after which the next call of the timetable counts.
    fn after(&self, now: Clocks) -> Timestamp {
        let waited = now.ticks.saturating_sub(self.since.ticks);
        if now.date.seconds().abs_diff(later(self.since.date, waited).seconds()) <= CLOCK_TOLERANCE {
            // The call is due even if the caller asks late, because it was busy.
            return self.since.date;
        }
        // The clock was set, or the ticks stopped while the machine slept. Only a call just before the current time of day is
        // due; earlier ones are skipped.
        let back = waited.min(self.jitter + LATENESS_LIMIT);
        Timestamp::from_seconds(now.date.seconds().saturating_sub(seconds(back)))
    }
}

/// A random time from zero to `most`, in whole milliseconds.
fn up_to(most: Duration, chance: u64) -> Duration {
    let most = u64::try_from(most.as_millis()).unwrap_or(u64::MAX);
    Duration::from_millis(chance % most.saturating_add(1))
}

/// The first moment of the timetable after `after`, or the end of the calendar.
pub fn first_after(timetable: &Timetable, after: Timestamp) -> Timestamp {
    let today = timetable.zone.day(after);
    let days = successors(Some(today.previous().unwrap_or(today)), |day| day.next()).take(SEARCH_DAYS);
    let firsts = days.map(|day| calls(timetable, day).into_iter().filter(|call| *call > after).min());
    // If the clock is set back over midnight, the earlier call may belong to the later day.
    firsts.skip_while(Option::is_none).take(2).flatten().min().unwrap_or(Timestamp::from_seconds(i64::MAX))
}

/// All calls of a day in the zone, unsorted and possibly with duplicates.
fn calls(timetable: &Timetable, day: Day) -> Vec<Timestamp> {
    let mut calls = Vec::new();
    let showing = |minute: u16| timetable.zone.occurrence(day, minute);
    for entry in timetable.entries.iter().filter(|entry| entry.days[day.weekday()]) {
        match &entry.times {
            Times::At(minutes) => calls.extend(minutes.iter().filter_map(|minute| showing(*minute)).map(once)),
            Times::Every { from, to, step } => {
                let minutes = (*from..*to).step_by(usize::from(*step));
                minutes.filter_map(showing).for_each(|showing| match showing {
                    Occurrence::Once(moment) => calls.push(moment),
                    Occurrence::Twice(first, second) => calls.extend([first, second]),
                    Occurrence::Never(_) => {}
                });
            }
        }
    }
    calls
}

/// A time of day after `date`, in whole seconds, rounded up.
fn later(date: Timestamp, time: Duration) -> Timestamp {
    Timestamp::from_seconds(date.seconds().saturating_add(seconds(time)))
}

/// Whole seconds, rounded up.
fn seconds(time: Duration) -> i64 {
    i64::try_from(time.as_millis().div_ceil(1000)).unwrap_or(i64::MAX)
}

/// The moment of a call at a single time of a day.
fn once(showing: Occurrence) -> Timestamp {
    match showing {
        Occurrence::Once(moment) | Occurrence::Twice(moment, _) | Occurrence::Never(moment) => moment,
    }
}

#[cfg(test)]
mod tests;
