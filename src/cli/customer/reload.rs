//! After a command has changed the configuration, the running `odmr serve` reads it, and the command reports the result.

use std::fmt;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use crate::config::ProviderConfig;
use crate::ids::Ids;
use crate::net::tls;
use crate::net::wake::WakeReason;
use crate::provider::spool::Spool;
use crate::report::calls::{CallRecord, CallResult};

/// How long to wait for the result of a reload.
const RELOAD_WAIT: Duration = Duration::from_secs(10);
const RELOAD_PAUSE: Duration = Duration::from_millis(20);

/// The result of a request to reload.
pub(super) enum ReloadResult {
    Done,
    /// `serve` keeps its old configuration, for this reason.
    Failed(String),
    NotRunning,
    /// There was no result within [`RELOAD_WAIT`].
    Silent,
    /// `serve` cannot be reached.
    Unreachable(io::Error),
}

/// Asks the running `odmr serve` to read its configuration, and waits for the result.
pub(super) fn request(config: &ProviderConfig) -> ReloadResult {
    let spool = Spool::new(config, &Ids::system(tls::random));
    let record = spool.reload_record();
    let readings = || CallRecord::read(&record).map_or(0, |record| record.calls);
    let late = Instant::now() + RELOAD_WAIT;
    // A reload under way may have begun before the change: its result is not that of this request.
    while spool.is_reloading() && Instant::now() < late {
        thread::sleep(RELOAD_PAUSE);
    }
    let before = loop {
        // Read it anew: a process that starts writes the record before it makes the socket.
        let before = readings();
        let Err(error) = WakeReason::Reload.send_surely(&config.spool) else { break before };
        match [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused].contains(&error.kind()) {
            true if !matches!(spool.is_locked(), Ok(true)) => return ReloadResult::NotRunning,
            // `serve` is starting, or could not make the socket.
            true if Instant::now() < late => thread::sleep(RELOAD_PAUSE),
            _ => return ReloadResult::Unreachable(error),
        }
    };
    while Instant::now() < late {
        if let Some(record) = CallRecord::read(&record).filter(|record| record.calls > before) {
            return match record.result {
                CallResult::Failed => ReloadResult::Failed(record.reason),
                _ => ReloadResult::Done,
            };
        }
        thread::sleep(RELOAD_PAUSE);
    }
    ReloadResult::Silent
}

/// The end of a sentence.
impl fmt::Display for ReloadResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ReloadResult::Done => f.write_str("the running `odmr serve` has read it"),
            ReloadResult::Failed(reason) => write!(
                f,
                "the running `odmr serve` keeps its old configuration, because of another mistake: {reason}; \
                 correct it, and send SIGHUP"
            ),
            ReloadResult::NotRunning => f.write_str("no `odmr serve` runs here now: the next one reads it"),
            ReloadResult::Silent => f.write_str(
                "the running `odmr serve` has not reported within 10 s that it has read it: send SIGHUP, and look into its log",
            ),
            ReloadResult::Unreachable(error) => {
                write!(f, "it is not known whether an `odmr serve` runs ({error}): if one does, send it SIGHUP as its user")
            }
        }
    }
}
