//! Watches the clock for all decisions on expiry, in all processes with the same spool, or the same mailboxes.
//!
//! The history ([`ClockHistory`]) is in `ROOT/.odmr/clock`. It is written once an hour, and when the clock was set. If
//! the file is missing or damaged, the history begins when another state file was last changed: if the clock is fast by
//! years at the start, mail does not expire at once.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::clock_history::{ClockHistory, ClockStep};
use crate::clock::{Clock, Timestamp};
use crate::maildir::{read_state_file, replace_file_durably, with_path};
use crate::net::trace::quoted;
use crate::threads::Guarded;

/// Octets of the file that are read at most. It has about 1000 at most.
const FILE_LIMIT: u64 = 4096;

/// Seconds after which the file is written again.
const WRITE_INTERVAL: i64 = 60 * 60;

/// The clock of one spool or customer, with its history.
pub struct ClockWatch {
    path: PathBuf,
    clock: Clock,
    watched: Guarded<Watched>,
}

#[derive(Clone)]
struct Watched {
    history: ClockHistory,
    /// When the file was last written; `None`: it was missing or damaged.
    written: Option<Timestamp>,
}

impl ClockWatch {
    /// Reads the history in `root/.odmr`. A file that cannot be read is logged. Nothing is written yet.
    pub fn new(root: &Path, clock: Clock) -> ClockWatch {
        let (path, now) = (root.join(".odmr/clock"), clock.now());
        let (history, written) = match read(&path) {
            Ok(history) => (history.clone(), Some(history.seen)),
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    log::warn!("event=clock-record-failed error={}", quoted(with_path(&path, error)));
                }
                (ClockHistory::new(last_change(root).filter(|time| *time <= now).unwrap_or(now)), None)
            }
        };
        ClockWatch { path, clock, watched: Guarded::new(Watched { history, written }) }
    }

    /// Looks at the clock, and writes the history if that is due. A failure is logged; this process goes on with its
    /// history.
    pub fn look(&self) {
        let now = self.clock.now();
        let text = {
            let mut watched = self.watched.lock();
            let step = watched.history.look(now);
            if let ClockStep::SetFrom(before) = step {
                log::warn!("event=clock-set before={} after={}", before.rfc3339(), now.rfc3339());
            }
            let is_due =
                watched.written.is_none_or(|written| (now.seconds() - written.seconds()).abs() >= WRITE_INTERVAL);
            if step == ClockStep::Passed && !is_due {
                return;
            }
            watched.written = Some(now);
            watched.history.text()
        };
        // The lock is released: if the disk hangs, other threads go on.
        if let Err(error) = replace_file_durably(&self.path, &text) {
            log::warn!("event=clock-record-failed error={}", quoted(&error));
        }
    }

    /// The age of a message with this time of arrival: see [`ClockHistory::age`].
    pub fn age(&self, arrived: Timestamp) -> Duration {
        self.look();
        self.watched.lock().history.age(arrived)
    }

    /// The history with a look at the present time. Nothing is written.
    pub fn history(&self) -> ClockHistory {
        let (now, mut history) = (self.clock.now(), self.watched.lock().history.clone());
        history.look(now);
        history
    }
}

fn read(path: &Path) -> io::Result<ClockHistory> {
    let text = read_state_file(path, FILE_LIMIT)?;
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, "it is damaged");
    ClockHistory::parse(&text).ok_or_else(damaged)
}

/// When a state file was last changed.
fn last_change(root: &Path) -> Option<Timestamp> {
    let files = fs::read_dir(root.join(".odmr")).ok()?.filter_map(Result::ok);
    files.filter_map(|file| file.metadata().ok()?.modified().ok()).max().map(Timestamp::from)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    const DAY: u64 = 24 * 60 * 60;

    #[test]
    fn a_history_is_recorded_and_read_again() {
        let root = tempfile::tempdir().unwrap();
        let now = Clock::Fixed.now();
        let before = |days: u64| Timestamp::from_seconds(now.seconds().saturating_sub_unsigned(days * DAY));
        let days = |watch: &ClockWatch, arrived: u64| watch.age(before(arrived)).as_secs() / DAY;
        let watch = ClockWatch::new(root.path(), Clock::Fixed);
        assert_eq!(days(&watch, 15), 15);
        let path = root.path().join(".odmr/clock");
        assert!(fs::read_to_string(&path).unwrap().starts_with(&ClockHistory::new(now).text()));
        // The clock was set forward by a year between two looks.
        fs::write(&path, ClockHistory::new(before(365)).text()).unwrap();
        for _ in 0..2 {
            let watch = ClockWatch::new(root.path(), Clock::Fixed);
            assert_eq!((days(&watch, 366), days(&watch, 1)), (1, 1));
            assert_eq!(watch.history().when(before(366), Duration::from_secs(DAY)), now);
            assert_eq!(watch.history().when(before(1), Duration::from_secs(2 * DAY)).seconds() - now.seconds(), 86_400);
        }
        // The file is damaged: the history begins with the time of another state file.
        fs::write(&path, "").unwrap();
        fs::write(root.path().join(".odmr/serve"), "").unwrap();
        for name in ["clock", "serve"] {
            let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(before(365).seconds().unsigned_abs());
            fs::File::options()
                .write(true)
                .open(root.path().join(".odmr").join(name))
                .unwrap()
                .set_modified(long_ago)
                .unwrap();
        }
        let watch = ClockWatch::new(root.path(), Clock::Fixed);
        assert_eq!((days(&watch, 366), days(&watch, 1)), (1, 1));
    }
}
