//! The number of messages that each account with a `rate` submits in an hour, exact across all threads and processes.
//!
//! A message counts from the beginning of its content; if it is not accepted, it stops counting. So a client that
//! repeats MAIL, is rejected or loses its connection uses up nothing, and many connections of one account together get
//! no more than one connection. The count is checked at MAIL too, so that the client need not send content that would
//! be rejected.
//!
//! The file `SPOOL/.odmr/rate-ACCOUNT` is locked while it is read and written:
//!
//! ```text
//! BEGUN MESSAGES .
//!
//! BEGUN      when the hour began, with its first message; seconds since 1970
//! MESSAGES   how many messages were accepted in it or are being received
//! ```
//!
//! The file is not fsynced: a power cut may begin a new hour. If a process is killed, the messages that it was receiving still
//! count. If the file cannot be locked, read or written, this process counts in memory, from the last count that it has read.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::clock::Clock;
use crate::log_limit::{LoggedWarnings, may_log};
use crate::maildir::{wait_for_state_file, with_path};
use crate::net::trace::quoted;
use crate::smtp::reply::Reply;
use crate::threads::Guarded;

/// The prefix of the files in `SPOOL/.odmr`.
pub const RATE_FILE: &str = "rate-";

/// How long a session waits for the lock. Other processes hold it for a moment only, but a stopped process (SIGSTOP)
/// holds it for ever.
const LOCK_TIMEOUT: Duration = Duration::from_millis(250);

/// The maximum size of the file in octets.
const RECORD_LIMIT: usize = 64;

const HOUR_SECONDS: i64 = 3600;

/// Counts the messages that each account submits in an hour.
pub struct SubmissionRates {
    root: PathBuf,
    clock: Clock,
    /// Not locked while a file is used: a disk that hangs must not delay other accounts.
    known: Guarded<HashMap<String, KnownHour>>,
    /// Failures of all files.
    logged: Guarded<LoggedWarnings<()>>,
}

/// The hour of an account as this process has seen it last.
#[derive(Clone, Copy)]
struct KnownHour {
    hour: Hour,
    /// The file could not be written: the count is in memory only.
    is_alone: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Hour {
    begun: i64,
    messages: usize,
}

impl Hour {
    /// Reads a file. `None`: the file is empty.
    fn read(file: &File) -> io::Result<Option<Hour>> {
        let mut record = [0; RECORD_LIMIT];
        let octets = file.read_at(&mut record, 0)?;
        let line = record[..octets].split(|octet| *octet == b'\n').next().and_then(|line| str::from_utf8(line).ok());
        match line.and_then(Hour::parse) {
            None if octets > 0 => Err(io::Error::new(io::ErrorKind::InvalidData, "it is damaged, and made anew")),
            hour => Ok(hour),
        }
    }

    fn parse(line: &str) -> Option<Hour> {
        let mut fields = line.split(' ');
        let hour = Hour { begun: fields.next()?.parse().ok()?, messages: fields.next()?.parse().ok()? };
        (fields.next() == Some(".") && fields.next().is_none()).then_some(hour)
    }

    /// Writes in place, because the file itself is locked. The rest of a longer line may stay after the end of this one.
    fn write(self, file: &File) -> io::Result<()> {
        file.write_all_at(format!("{} {} .\n", self.begun, self.messages).as_bytes(), 0)
    }

    /// The hour at this time. If the clock was set back a little, for instance by NTP, the hour goes on. An hour that
    /// begins more than an hour in the future is over: the clock was wrong then, or is now.
    fn at(self, now: i64) -> Hour {
        let age = now.saturating_sub(self.begun);
        let is_over = !(-HOUR_SECONDS..HOUR_SECONDS).contains(&age);
        if is_over { Hour { begun: now, messages: 0 } } else { self }
    }
}

impl SubmissionRates {
    /// Reads no file yet. `root`: the spool.
    pub fn new(root: &Path, clock: Clock) -> SubmissionRates {
        SubmissionRates { root: root.to_owned(), clock, known: Guarded::default(), logged: Guarded::default() }
    }

    /// Checks that the account may submit a message now. `limit`: messages in an hour, 0: no limit.
    ///
    /// # Errors
    /// The reply to MAIL, 452.
    pub fn check(&self, account: &str, limit: usize) -> Result<(), Reply> {
        if limit == 0 {
            return Ok(());
        }
        if self.change(account, &mut |_| {}).messages < limit { Ok(()) } else { Err(rejection(limit)) }
    }

    /// Counts a message whose content begins. `limit`: as for [`SubmissionRates::check`]. `None`: the account has no limit.
    ///
    /// # Errors
    /// The reply to DATA or BDAT, 452.
    pub fn admit(self: &Arc<Self>, account: &str, limit: usize) -> Result<Option<SubmissionPermit>, Reply> {
        if limit == 0 {
            return Ok(None);
        }
        let mut is_admitted = false;
        let hour = self.change(account, &mut |hour| {
            is_admitted = hour.messages < limit;
            hour.messages += usize::from(is_admitted);
        });
        if !is_admitted {
            return Err(rejection(limit));
        }
        let (rates, account) = (self.clone(), account.to_owned());
        Ok(Some(SubmissionPermit { rates, account, begun: hour.begun, is_used: false }))
    }

    /// Changes the hour of an account, and returns the changed hour.
    fn change(&self, account: &str, change: &mut dyn FnMut(&mut Hour)) -> Hour {
        let name = format!("{RATE_FILE}{account}");
        let path = self.root.join(".odmr").join(&name);
        // If the last call did not get the lock, do not wait again.
        let patience =
            if self.known_hour(account, &mut |known| known.is_alone) { Duration::ZERO } else { LOCK_TIMEOUT };
        let file = wait_for_state_file(&self.root, &name, Instant::now() + patience);
        let file = file.inspect_err(|error| self.log(account, error)).ok();
        let read = file.as_ref().and_then(|file| {
            let failed = |error| self.log(account, &with_path(&path, error));
            Hour::read(file).map_err(failed).ok().flatten()
        });
        // Read the clock under the lock, so that the times of all processes are in the order of their changes.
        let now = self.clock.now().seconds();
        let mut hour = Hour { begun: now, messages: 0 };
        self.known_hour(account, &mut |known| {
            let last = known.hour.at(now);
            hour = match read.map(|read| read.at(now)) {
                Some(read) if !known.is_alone || read.messages > last.messages => read,
                _ => last,
            };
            change(&mut hour);
            *known = KnownHour { hour, is_alone: file.is_none() };
            false
        });
        if let Some(file) = file.filter(|_| read != Some(hour))
            && let Err(error) = hour.write(&file)
        {
            self.known_hour(account, &mut |known| std::mem::replace(&mut known.is_alone, true));
            self.log(account, &with_path(&path, error));
        }
        hour
    }

    /// Calls `call` with the last known hour of an account; at first, an hour that is over.
    fn known_hour(&self, account: &str, call: &mut dyn FnMut(&mut KnownHour) -> bool) -> bool {
        let mut known = self.known.lock();
        let nothing = KnownHour { hour: Hour { begun: i64::MIN, messages: 0 }, is_alone: false };
        call(known.entry(account.to_owned()).or_insert(nothing))
    }

    /// Logs that the file of an account cannot be used, at most once a minute.
    fn log(&self, account: &str, error: &io::Error) {
        let mut logged = self.logged.lock();
        if may_log(&mut logged, &[()], usize::MAX, Instant::now()).is_some() {
            let consequence = "messages of other processes do not count";
            log::error!(
                "event=rate-not-recorded account={account} error={} consequence={consequence:?}",
                quoted(error)
            );
        }
    }
}

fn rejection(limit: usize) -> Reply {
    Reply::new(452, "4.3.2", format!("No more than {limit} messages an hour"))
}

/// A message that is being received, and counts. If the permit is dropped without [`SubmissionPermit::keep`], the message
/// counts no longer.
pub struct SubmissionPermit {
    rates: Arc<SubmissionRates>,
    account: String,
    /// The hour that it counts in.
    begun: i64,
    is_used: bool,
}

impl SubmissionPermit {
    /// The message was accepted, and counts for the rest of the hour.
    pub fn keep(mut self) {
        self.is_used = true;
    }
}

impl Drop for SubmissionPermit {
    fn drop(&mut self) {
        if !self.is_used {
            let begun = self.begun;
            self.rates.change(&self.account, &mut |hour| {
                if hour.begun == begun {
                    hour.messages = hour.messages.saturating_sub(1);
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn place() -> (tempfile::TempDir, PathBuf, Arc<SubmissionRates>) {
        let root = tempfile::tempdir().unwrap();
        let (file, rates) = (root.path().join(".odmr/rate-acme"), SubmissionRates::new(root.path(), Clock::Fixed));
        (root, file, Arc::new(rates))
    }

    /// Accepts messages until there is one too many.
    fn fill(rates: &Arc<SubmissionRates>, limit: usize) -> usize {
        std::iter::from_fn(|| rates.admit("acme", limit).ok().flatten()).map(SubmissionPermit::keep).count()
    }

    #[test]
    fn all_processes_together_get_no_more_than_the_rate() {
        let (root, _, _) = place();
        let process = || fill(&Arc::new(SubmissionRates::new(root.path(), Clock::Fixed)), 100);
        let accepted: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(process)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(accepted, 100);
        // Another rate after a reload.
        assert_eq!((fill(&place().2, 0), process()), (0, 0));
        let rates = Arc::new(SubmissionRates::new(root.path(), Clock::Fixed));
        assert!(
            rates.check("acme", 100).is_err() && rates.check("acme", 101).is_ok() && rates.check("acme", 0).is_ok()
        );
        assert_eq!((fill(&rates, 50), fill(&rates, 103)), (0, 3));
    }

    #[test]
    fn a_message_that_is_not_accepted_does_not_count() {
        let (_root, file, rates) = place();
        for _ in 0..10 {
            rates.check("acme", 2).unwrap();
            let permits = [(); 2].map(|()| rates.admit("acme", 2).unwrap());
            assert!(rates.check("acme", 2).is_err() && rates.admit("acme", 2).is_err());
            drop(permits);
        }
        let late = rates.admit("acme", 2).unwrap();
        // Another hour has begun since.
        fs::write(&file, "1767323040 2 .\n").unwrap();
        drop(late);
        assert_eq!(fs::read_to_string(&file).unwrap(), "1767323040 2 .\n");
    }

    #[test]
    fn an_hour_ends_even_if_the_clock_is_set() {
        let now = Clock::Fixed.now().seconds();
        let cases =
            [(0, 0), (3599, 0), (3600, 2), (86_400 * 366, 2), (-1, 0), (-3600, 0), (-3601, 2), (-86_400 * 366, 2)];
        for (begun, left) in cases {
            let (_root, file, rates) = place();
            fill(&rates, 0);
            fill(&rates, 1);
            let again = Arc::new(SubmissionRates::new(&rates.root, Clock::Fixed));
            fs::write(&file, format!("{} 2 .\n", now - begun)).unwrap();
            assert_eq!(fill(&again, 2), left, "{begun} s ago");
        }
        assert_eq!(Hour { begun: i64::MIN, messages: 1 }.at(i64::MAX).messages, 0);
    }

    #[test]
    fn with_a_damaged_or_unusable_file_the_process_counts_in_memory() {
        for content in
            ["", "\0\0\0\0", "1767323045 2", "x 2 .\n", "1767323045 -2 .\n", "1767323045 99999999999999999999 .\n"]
        {
            let (_root, file, rates) = place();
            fill(&rates, 1);
            fs::write(&file, content).unwrap();
            // This process has counted one message already.
            assert_eq!(fill(&rates, 3), 2, "{content:?}");
            assert_eq!(fs::read_to_string(&file).unwrap().lines().next(), Some("1767323045 3 ."));
        }
        let (_root, file, rates) = place();
        fill(&rates, 1);
        let lock = File::open(&file).unwrap();
        lock.lock().unwrap();
        let begun = Instant::now();
        assert_eq!(fill(&rates, 3), 2);
        assert!(begun.elapsed() >= LOCK_TIMEOUT && begun.elapsed() < LOCK_TIMEOUT * 8, "{:?}", begun.elapsed());
        drop(lock);
        // The count in memory is written when the lock is free again.
        assert_eq!((fill(&rates, 3), fill(&rates, 4)), (0, 1));
        fs::remove_file(&file).unwrap();
        fs::create_dir(&file).unwrap();
        assert_eq!((fill(&rates, 4), fill(&rates, 6)), (0, 2));
    }
}
