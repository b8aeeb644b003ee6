//! A limit for the messages of several Maildirs together. It is exact for all threads and processes, even after a
//! crash.
//!
//! The file `ROOT/.odmr/usage-NAME` has an upper bound of what is stored, and is locked for each change:
//!
//! ```text
//! BOOT COUNTED TOOK OCTETS MESSAGES CHANGES .
//!
//! BOOT               the boot id of the system: after a power cut the file may lack the last changes, and is ignored
//! COUNTED            when the files were counted, in milliseconds since the boot
//! TOOK               how long the count took, in microseconds
//! OCTETS, MESSAGES   the bound
//! CHANGES            a hash of the times of the directories at the count; `-` if a message was added since, or if these
//!                    times were so recent that a later change might not be visible in them
//! ```
//!
//! A message is added to the bound before it becomes visible, so a process that is killed may leave a bound that is too
//! high, never one that is too low. Removed messages are not subtracted. So before a message is rejected the files are
//! counted, unless nothing has changed since the last count. If mail comes and goes all the time, a count that took
//! long is valid for ten times as long, so that counting takes at most a tenth of the time.

use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::error::Error;
use std::fmt;
use std::fs::{self, File};
use std::hash::{Hash, Hasher};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::files::with_path;
use super::quota::Usage;
use super::state_file::{open_state_file, wait_for_state_file};
use super::{CLOCK_STEP, Maildir};
use crate::clock::uptime;
use crate::platform::boot_id;
use crate::threads::Guarded;

/// How long a bound is valid. Other agents add files without changing it.
const BOUND_LIFETIME: Duration = Duration::from_secs(10 * 60);

/// How often the directories are read at most, if they change during the reading: a file that is renamed may be missed
/// under both names, but is found the next time.
const COUNT_ATTEMPTS: usize = 3;

/// How long a count is valid at most after the directories have changed.
const COUNT_LIFETIME: Duration = Duration::from_secs(10);

/// How long a session waits for the lock: a stopped process may have it, or a thread whose disk hangs.
const LOCK_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a session waits for a lock while it has the lock of another account, for which other sessions wait.
const SHARED_LOCK_TIMEOUT: Duration = Duration::from_millis(100);

/// How long a start or a reload waits for each lock.
const RECOUNT_TIMEOUT: Duration = Duration::from_secs(1);

/// Octets of the file at most.
const RECORD_LIMIT: usize = 256;

/// The limit for the messages of several Maildirs together.
#[derive(Debug)]
pub struct UsageLimit {
    root: PathBuf,
    name: String,
    maildirs: Vec<Maildir>,
    /// `u64::MAX`: no limit.
    limit: Usage,
    /// The threads of this process wait here for their turn; one of them waits for other processes.
    turn: Guarded<LockTurn>,
    turn_ended: Condvar,
}

/// Whether a thread of this process has the turn to lock the file.
#[derive(Debug, Default)]
struct LockTurn {
    taken: bool,
    /// The last thread did not get the lock in time, so the next ones do not wait: otherwise all threads would wait for
    /// one disk that hangs.
    in_vain: bool,
}

impl PartialEq for UsageLimit {
    fn eq(&self, other: &UsageLimit) -> bool {
        (&self.root, &self.name, &self.maildirs, self.limit) == (&other.root, &other.name, &other.maildirs, other.limit)
    }
}

impl Eq for UsageLimit {}

/// A message would exceed a limit. This is the payload of an [`io::Error`] of the kind `QuotaExceeded`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimitExceeded {
    /// The name of the limit.
    pub name: String,
    /// Which of the two numbers would be exceeded: `octets` or `messages`.
    pub unit: &'static str,
}

impl fmt::Display for LimitExceeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the limit of {} for {} would be exceeded", self.unit, self.name)
    }
}

impl Error for LimitExceeded {}

impl LimitExceeded {
    /// The payload of an error, if it is a `LimitExceeded`.
    pub fn of(error: &io::Error) -> Option<&LimitExceeded> {
        error.get_ref().and_then(|payload| payload.downcast_ref())
    }
}

impl UsageLimit {
    /// The limit of the messages in all these Maildirs. `name`: the account's name, which is a part of the file's name.
    pub fn new(root: impl Into<PathBuf>, name: &str, maildirs: Vec<Maildir>, limit: Usage) -> UsageLimit {
        UsageLimit {
            root: root.into(),
            name: name.to_owned(),
            maildirs,
            limit,
            turn: Guarded::default(),
            turn_ended: Condvar::new(),
        }
    }

    /// Checks that there is room for this much more.
    ///
    /// # Errors
    /// `QuotaExceeded` with [`LimitExceeded`] if there is not; `TimedOut` if the file stays locked; otherwise the
    /// system's.
    pub fn check(&self, more: Usage) -> io::Result<()> {
        // Far from the limit no lock is needed: the message is checked again when it is added.
        if self.is_far(more) { Ok(()) } else { self.lock(LOCK_TIMEOUT)?.check(more) }
    }

    /// Whether the bound shows that there is room for this much more. Nothing is counted or locked.
    pub fn is_far(&self, more: Usage) -> bool {
        let bound = open_state_file(&self.root, &self.file_name()).ok().and_then(|file| Bound::read(&file));
        bound.is_some_and(|bound| self.exceeded(bound.used.plus(more)).is_none())
    }

    /// The unit of the number that is too large: `octets` or `messages`.
    fn exceeded(&self, used: Usage) -> Option<&'static str> {
        let Usage { octets, messages } = self.limit;
        let both = [("octets", used.octets, octets), ("messages", used.messages, messages)];
        both.into_iter().find(|(_, used, limit)| used > limit).map(|(unit, ..)| unit)
    }

    /// Invalidates the bound, so that the files are counted before the next message is added.
    ///
    /// # Errors
    /// `TimedOut` if the file stays locked; otherwise the system's.
    pub fn recount_next(&self) -> io::Result<()> {
        self.lock(RECOUNT_TIMEOUT)?.file.set_len(0)
    }

    /// The name of the account.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn file_name(&self) -> String {
        format!("{USAGE_FILE}{}", self.name)
    }

    /// Locks the file. The error is `TimedOut` if another thread or process has the lock for longer than `patience`.
    fn lock(&self, patience: Duration) -> io::Result<LockedUsage<'_>> {
        let name = self.file_name();
        let patience = if self.turn.lock().in_vain { Duration::ZERO } else { patience };
        let late = Instant::now() + patience;
        let waited = self.turn_ended.wait_timeout_while(self.turn.lock(), patience, |turn| turn.taken);
        let (mut turn, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if turn.taken {
            turn.in_vain |= patience > RECOUNT_TIMEOUT;
            return Err(with_path(&self.root.join(".odmr").join(&name), io::ErrorKind::TimedOut.into()));
        }
        turn.taken = true;
        drop(turn);
        let taken = TakenTurn(self);
        let file = wait_for_state_file(&self.root, &name, late);
        match &file {
            Ok(_) => self.turn.lock().in_vain = false,
            Err(error) if error.kind() != io::ErrorKind::TimedOut => {}
            Err(_) => self.turn.lock().in_vain |= patience > RECOUNT_TIMEOUT,
        }
        let file = file?;
        Ok(LockedUsage { limit: self, bound: Bound::read(&file), file, _turn: taken })
    }

    /// A hash of the times of the directories. The second one is `None` if a change from now on might not be visible in
    /// them, because the clock of a file system is inexact.
    fn changes(&self) -> (u64, Option<u64>) {
        let (now, mut hasher, mut settled) = (SystemTime::now(), DefaultHasher::new(), true);
        for directory in self.maildirs.iter().flat_map(|maildir| ["new", "cur"].map(|name| maildir.path.join(name))) {
            let modified = fs::metadata(directory).and_then(|found| found.modified()).ok();
            modified.hash(&mut hasher);
            settled &= modified.is_none_or(|modified| modified + CLOCK_STEP < now);
        }
        let hash = hasher.finish();
        (hash, settled.then_some(hash))
    }

    /// Counts the files as `odmr status` does. A file that is removed during the count may count.
    fn count(&self) -> io::Result<(Usage, Option<u64>)> {
        let mut files: HashMap<u64, u64> = HashMap::new();
        let mut changes = None;
        for _ in 0..COUNT_ATTEMPTS {
            let before = self.changes();
            for (index, maildir) in self.maildirs.iter().enumerate() {
                maildir.each_file(&mut |entry, file| {
                    let octets = entry.file_size().or_else(|| file.metadata().ok().map(|metadata| metadata.len()));
                    if let Some(octets) = octets {
                        let mut hasher = DefaultHasher::new();
                        (index, entry.unique()).hash(&mut hasher);
                        files.insert(hasher.finish(), octets);
                    }
                    Ok(())
                })?;
            }
            if self.changes().0 == before.0 {
                changes = before.1;
                break;
            }
        }
        let octets = files.values().fold(0, |sum: u64, octets| sum.saturating_add(*octets));
        Ok((Usage { octets, messages: files.len() as u64 }, changes))
    }
}

/// The beginning of the names of these files in `ROOT/.odmr`.
pub const USAGE_FILE: &str = "usage-";

/// The locked file with the bound.
pub(super) struct LockedUsage<'a> {
    limit: &'a UsageLimit,
    /// `None`: the files must be counted.
    bound: Option<Bound>,
    /// It comes before `_turn`: it is closed, and so unlocked, before the next thread has its turn.
    file: File,
    _turn: TakenTurn<'a>,
}

/// Ends the turn of a thread when it is dropped.
struct TakenTurn<'a>(&'a UsageLimit);

impl Drop for TakenTurn<'_> {
    fn drop(&mut self) {
        self.0.turn.lock().taken = false;
        self.0.turn_ended.notify_one();
    }
}

impl LockedUsage<'_> {
    /// Checks that there is room for this much more. Counts the files before it fails.
    pub(super) fn check(&mut self, more: Usage) -> io::Result<()> {
        let bound = self.bound()?;
        if self.limit.exceeded(bound.used.plus(more)).is_none() {
            return Ok(());
        }
        let bound = if self.is_valid(&bound) { bound } else { self.count()? };
        match self.limit.exceeded(bound.used.plus(more)) {
            None => Ok(()),
            Some(unit) => {
                let exceeded = LimitExceeded { name: self.limit.name.clone(), unit };
                Err(io::Error::new(io::ErrorKind::QuotaExceeded, exceeded))
            }
        }
    }

    /// Adds this much to the bound, if there is one. If the bound cannot be written, for instance on a full disk,
    /// invalidates it: the files are counted next time.
    pub(super) fn add(&mut self, more: Usage) -> io::Result<()> {
        let Some(bound) = self.bound else { return Ok(()) };
        let recorded = self.record(Bound { used: bound.used.plus(more), changes: None, ..bound });
        recorded.map(drop).or_else(|error| self.file.set_len(0).map_err(|_| error))
    }

    fn bound(&mut self) -> io::Result<Bound> {
        match self.bound {
            Some(bound) => Ok(bound),
            None => self.count(),
        }
    }

    /// Whether a message may be rejected by this bound without a new count.
    fn is_valid(&self, bound: &Bound) -> bool {
        let since = uptime().saturating_sub(bound.counted);
        since < (bound.took * 10).min(COUNT_LIFETIME)
            || bound.changes.is_some_and(|changes| changes == self.limit.changes().0)
    }

    fn count(&mut self) -> io::Result<Bound> {
        let begun = uptime();
        let (used, changes) = self.limit.count()?;
        let counted = uptime();
        self.record(Bound { counted, took: counted.saturating_sub(begun), used, changes })
    }

    fn record(&mut self, bound: Bound) -> io::Result<Bound> {
        // The file has the lock, so it is overwritten, not replaced. The rest of a longer line stays after this one's
        // end, and is ignored.
        self.file
            .write_all_at(bound.to_text().as_bytes(), 0)
            .map_err(|error| with_path(&self.limit.root.join(".odmr").join(self.limit.file_name()), error))?;
        self.bound = Some(bound);
        Ok(bound)
    }
}

/// The content of the file, since this boot of the system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bound {
    counted: Duration,
    took: Duration,
    used: Usage,
    changes: Option<u64>,
}

impl Bound {
    /// Reads the bound. `None`: it is missing, damaged, too old, or from before the boot of the system.
    fn read(file: &File) -> Option<Bound> {
        let mut record = [0; RECORD_LIMIT];
        let octets = file.read_at(&mut record, 0).ok()?;
        let line = record[..octets].split(|octet| *octet == b'\n').next()?;
        let bound = Bound::parse(std::str::from_utf8(line).ok()?)?;
        let age = uptime().checked_sub(bound.counted)?;
        (age < BOUND_LIFETIME).then_some(bound)
    }

    fn parse(line: &str) -> Option<Bound> {
        let mut fields = line.split(' ');
        if fields.next()? != boot_id() {
            return None;
        }
        let mut number = || fields.next()?.parse::<u64>().ok();
        let (counted, took) = (Duration::from_millis(number()?), Duration::from_micros(number()?));
        let used = Usage { octets: number()?, messages: number()? };
        let changes = match fields.next()? {
            "-" => None,
            changes => Some(changes.parse().ok()?),
        };
        (fields.next() == Some(".") && fields.next().is_none()).then_some(Bound { counted, took, used, changes })
    }

    fn to_text(self) -> String {
        let Bound { counted, took, used: Usage { octets, messages }, changes } = self;
        let changes = changes.map_or_else(|| "-".to_owned(), |changes| changes.to_string());
        let (counted, took) = (counted.as_millis(), took.as_micros());
        format!("{} {counted} {took} {octets} {messages} {changes} .\n", boot_id())
    }
}

/// Adds to all limits what a message needs of each, or to none. If `enforced`, checks all limits before. The limits are
/// locked until the result is dropped.
pub(super) fn lock_and_add(amounts: &[(Arc<UsageLimit>, Usage)], enforced: bool) -> io::Result<Vec<LockedUsage<'_>>> {
    let mut locked = lock_all(amounts)?;
    if enforced {
        locked.iter_mut().try_for_each(|(usage, more)| usage.check(*more))?;
    }
    locked.iter_mut().try_for_each(|(usage, more)| usage.add(*more))?;
    Ok(locked.into_iter().map(|(usage, _)| usage).collect())
}

/// Locks several limits in their order, so that two messages seldom wait for each other. While a session has a lock, it
/// waits for the next one for a short time only; then it releases all locks and begins with that one. So an account
/// whose lock is stuck does not block others.
fn lock_all(amounts: &[(Arc<UsageLimit>, Usage)]) -> io::Result<Vec<(LockedUsage<'_>, Usage)>> {
    let late = Instant::now() + LOCK_TIMEOUT;
    let mut first = 0;
    loop {
        let mut locked = Vec::new();
        let others = (0..amounts.len()).filter(|index| *index != first);
        let busy = amounts.first().into_iter().map(|_| first).chain(others).find_map(|index| {
            let (limit, more) = &amounts[index];
            let left = late.saturating_duration_since(Instant::now());
            let patience = if locked.is_empty() { left } else { left.min(SHARED_LOCK_TIMEOUT) };
            limit.lock(patience).map(|usage| locked.push((usage, *more))).err().map(|error| (index, error))
        });
        match busy {
            None => return Ok(locked),
            Some((index, error)) if error.kind() == io::ErrorKind::TimedOut && !locked.is_empty() => first = index,
            Some((_, error)) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests;
