//! The settings of a schedule: at which times a customer calls its provider.

use std::time::Duration;

use crate::clock::Zone;

/// `[schedule]`: when `pull --daemon` calls a provider.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Schedule {
    /// Default: every 15 min.
    pub when: When,
    /// Each call is late by a random time up to this. Shorter than `every`, and than each step of `at`. Default 30 s,
    /// but with `every` a tenth of it where that is less.
    pub jitter: Duration,
    /// From the end of a call that failed to the next call; doubled with each further failure. Default 1 min, or
    /// `every` or `retry_max` where that is less.
    pub retry_first: Duration,
    /// The pause is doubled up to this. Default 1 h, or `retry_first` where that is more. At least `retry_first`.
    pub retry_max: Duration,
}

/// `every` or `at`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum When {
    /// From the start of one call to the start of the next.
    Every(Duration),
    At(Timetable),
}

/// `at`, and the time zone of its times.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Timetable {
    /// Never empty. They add up: a minute that two entries name is one call.
    pub entries: Vec<TimetableEntry>,
    /// Default: that of this machine when the file was read.
    pub zone: Zone,
}

/// One entry of `at`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TimetableEntry {
    /// Whether it is for this day of the week, from Monday on. At least one day is true.
    pub days: [bool; 7],
    pub times: Times,
}

/// Minutes of a day, counted from midnight by what the clock shows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Times {
    /// Once a day each. Up to 1439; never empty, none twice.
    At(Vec<u16>),
    /// `from`, `from + step`, … before `to`, whenever the clock shows it. `step` is 1 or more, and less than `to` minus
    /// `from`; `to` is up to 1440.
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
    /// The shortest time between two calls of one entry; `None`: every entry is a list of times.
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

    /// The jitter of a schedule that names none.
    pub fn default_jitter(&self) -> Duration {
        match self {
            When::Every(every) => JITTER.min(*every / 10),
            When::At(_) => JITTER,
        }
    }
}
