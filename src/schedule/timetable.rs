//! The settings of a schedule: when a customer calls its provider.

use std::time::Duration;

use crate::clock::Zone;

/// `[schedule]`: when `pull --daemon` calls a provider.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Schedule {
    /// Default: every 15 min.
    pub when: When,
    /// Each call is late by a random time up to this. Shorter than `every`, and than each step of `at`. Default: 30 s,
    /// or a tenth of `every` if that is less.
    pub jitter: Duration,
    /// The pause from the end of a failed call to the next call. It is doubled after each further failure. Default: 1 min,
    /// or `every` or `retry_max` if that is less.
    pub retry_first: Duration,
    /// The longest pause; at least `retry_first`. Default: 1 h, or `retry_first` if that is more.
    pub retry_max: Duration,
}

/// `every` or `at`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum When {
    /// The time from the start of one call to the start of the next.
    Every(Duration),
    At(Timetable),
}

/// The value of `at`, and the time zone of its times.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Timetable {
    /// Never empty. If two entries have the same minute, that is one call.
    pub entries: Vec<TimetableEntry>,
    /// Default: that of this machine when the file was read.
    pub zone: Zone,
}

/// One entry of `at`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TimetableEntry {
    /// For each day of the week from Monday on, whether the entry has calls. At least one is true.
    pub days: [bool; 7],
    pub times: Times,
}

/// Minutes of a day, counted from midnight as the clock shows them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Times {
    /// Each once a day. 0 to 1439; never empty, no duplicates.
    At(Vec<u16>),
    /// `from`, `from + step`, … before `to`, whenever the clock shows one of them. `step` is at least 1, and less than `to`
    /// minus `from`; `to` is at most 1440.
    Every { from: u16, to: u16, step: u16 },
}

const JITTER: Duration = Duration::from_secs(30);

impl Default for Schedule {
    fn default() -> Schedule {
        let minutes = |minutes: u64| Duration::from_secs(minutes * 60);
        Schedule { when: When::Every(minutes(15)), jitter: JITTER, retry_first: minutes(1), retry_max: minutes(60) }
    }
}

impl When {
    /// The shortest time between two calls of one entry; `None`: all entries are lists of times.
    pub fn shortest_step(&self) -> Option<Duration> {
        match self {
            When::Every(every) => Some(*every),
            When::At(timetable) => {
                let steps = timetable.entries.iter().filter_map(|entry| match entry.times {
                    Times::Every { step, .. } => Some(Duration::from_secs(60 * u64::from(step))),
                    Times::At(_) => None,
                });
                steps.min()
            }
        }
    }

    /// The jitter of a schedule without the key `jitter`.
    pub fn default_jitter(&self) -> Duration {
        match self {
            When::Every(every) => JITTER.min(*every / 10),
            When::At(_) => JITTER,
        }
    }
}
