//! How much several Maildirs hold together, and its limit: exact for all threads and processes, also after a crash.
//!
//! The file `ROOT/.odmr/usage-NAME` has an upper bound of what is held, and is locked for each change:
//!
//! ```text
//! BOOT COUNTED TOOK OCTETS MESSAGES CHANGES .
//!
//! BOOT               the start of the system during which it was written: a power cut may lose what was written last
//! COUNTED, TOOK      when the files were counted, since that start, and how long it took; in milliseconds, microseconds
//! OCTETS, MESSAGES   the bound
//! CHANGES            what the directories told of their last changes when they were counted, if nothing was added since
//!                    and a later change would be seen by that; otherwise `-`
//! ```
//!
//! A message is added to the bound before it becomes visible, so a process that is killed leaves a bound that is too high.
//! What is removed is not subtracted. So before a message is rejected the files are counted, unless nothing has changed since
//! they were counted last. A count that took long is believed for ten times as long, so that counting takes a tenth of the
//! time at most while mail comes and goes.

use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::error::Error;
use std::fmt;
use std::fs::{self, File};
use std::hash::{Hash, Hasher};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::files::with_path;
use super::quota::Usage;
use super::state_file::{open_state_file, wait_for_state_file};
use super::{CLOCK_STEP, Maildir};
use crate::clock::uptime;
use crate::platform::boot_id;

/// How long a bound is believed: other agents add files too.
const BOUND_LIFETIME: Duration = Duration::from_secs(10 * 60);

/// How often the directories are read if they change meanwhile. A file that is renamed may be seen under neither name; it is
/// not renamed again at once.
const COUNT_ATTEMPTS: usize = 3;

/// The longest time that a count is believed although the directories have changed.
const LONGEST_BELIEF: Duration = Duration::from_secs(10);

/// How long a session waits for the lock: a process that was stopped may have it, or a thread whose disk hangs.
const LOCK_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a session waits for it that has the lock of another account, whose sessions wait meanwhile.
const SHARED_LOCK_TIMEOUT: Duration = Duration::from_millis(100);

/// How long a start or a reload waits for each lock.
const RECOUNT_TIMEOUT: Duration = Duration::from_secs(1);

/// Octets of the file at most.
const RECORD_LIMIT: usize = 256;

/// What may be in several Maildirs together.
#[derive(Debug)]
pub struct UsageLimit {
    root: PathBuf,
    name: String,
    maildirs: Vec<Maildir>,
    /// `u64::MAX`: no limit.
    limit: Usage,
    /// The threads of this process wait for each other here, and one of them for other processes.
    turn: Mutex<LockTurn>,
    turn_ended: Condvar,
}

/// Which thread of this process may have the lock.
#[derive(Debug, Default)]
struct LockTurn {
    taken: bool,
    /// The last one has waited for long, and in vain: then the next one does not wait.
    in_vain: bool,
}

impl PartialEq for UsageLimit {
    fn eq(&self, other: &UsageLimit) -> bool {
        (&self.root, &self.name, &self.maildirs, self.limit) == (&other.root, &other.name, &other.maildirs, other.limit)
    }
}

impl Eq for UsageLimit {}

/// A message is too much. The payload of an [`io::Error`] of the kind `QuotaExceeded`.
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
    /// The payload of an error, if it has this one.
    pub fn of(error: &io::Error) -> Option<&LimitExceeded> {
        error.get_ref().and_then(|payload| payload.downcast_ref())
    }
}

impl UsageLimit {
    /// The limit of the messages in all these Maildirs. `name`: that of an account, a part of the name of the file in
    /// `ROOT/.odmr`.
    pub fn new(root: impl Into<PathBuf>, name: &str, maildirs: Vec<Maildir>, limit: Usage) -> UsageLimit {
        UsageLimit {
            root: root.into(),
            name: name.to_owned(),
            maildirs,
            limit,
            turn: Mutex::default(),
            turn_ended: Condvar::new(),
        }
    }

    /// Checks that there is room for so much more.
    ///
    /// # Errors
    ///
    /// [`LimitExceeded`]; the system's.
    pub fn check(&self, more: Usage) -> io::Result<()> {
        // What is far from the limit needs no lock: it is checked once more when it is added.
        if self.is_far(more) { Ok(()) } else { self.lock(LOCK_TIMEOUT)?.check(more) }
    }

    /// Whether there is room for so much more by the bound, without counting.
    pub fn is_far(&self, more: Usage) -> bool {
        let bound = open_state_file(&self.root, &self.file_name()).ok().and_then(|file| Bound::read(&file));
        bound.is_some_and(|bound| self.exceeded(bound.used.plus(more)).is_none())
    }

    /// Which of the two numbers is too large.
    fn exceeded(&self, used: Usage) -> Option<&'static str> {
        let Usage { octets, messages } = self.limit;
        let both = [("octets", used.octets, octets), ("messages", used.messages, messages)];
        both.into_iter().find(|(_, used, limit)| used > limit).map(|(unit, ..)| unit)
    }

    /// Has the files counted before the next message is added.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn recount_next(&self) -> io::Result<()> {
        self.lock(RECOUNT_TIMEOUT)?.file.set_len(0)
    }

    /// Whose limit it is.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn file_name(&self) -> String {
        format!("{USAGE_FILE}{}", self.name)
    }

    fn turn(&self) -> MutexGuard<'_, LockTurn> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks the file; `TimedOut` if another thread or process has its lock for longer than this.
    fn lock(&self, patience: Duration) -> io::Result<LockedUsage<'_>> {
        let name = self.file_name();
        let patience = if self.turn().in_vain { Duration::ZERO } else { patience };
        let late = Instant::now() + patience;
        let waited = self.turn_ended.wait_timeout_while(self.turn(), patience, |turn| turn.taken);
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
            Ok(_) => self.turn().in_vain = false,
            Err(error) if error.kind() != io::ErrorKind::TimedOut => {}
            Err(_) => self.turn().in_vain |= patience > RECOUNT_TIMEOUT,
        }
        let file = file?;
        Ok(LockedUsage { limit: self, bound: Bound::read(&file), file, _turn: taken })
    }

    /// What the directories tell of their last changes. `None`: a change from now on might not be seen by that, as the clock
    /// of a file system is inexact.
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

    /// Counts the files as the status does. A file that is removed meanwhile may count.
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

/// How the names of the files in `ROOT/.odmr` begin.
pub const USAGE_FILE: &str = "usage-";

/// The file with the bound, while it is locked.
pub(super) struct LockedUsage<'a> {
    limit: &'a UsageLimit,
    /// `None`: the files must be counted.
    bound: Option<Bound>,
    /// Closed, and so unlocked, before the next thread has its turn.
    file: File,
    _turn: TakenTurn<'a>,
}

/// Ends the turn of a thread when it is dropped.
struct TakenTurn<'a>(&'a UsageLimit);

impl Drop for TakenTurn<'_> {
    fn drop(&mut self) {
        self.0.turn().taken = false;
        self.0.turn_ended.notify_one();
    }
}

impl LockedUsage<'_> {
    /// Checks that there is room for so much more.
    pub(super) fn check(&mut self, more: Usage) -> io::Result<()> {
        let bound = self.bound()?;
        if self.limit.exceeded(bound.used.plus(more)).is_none() {
            return Ok(());
        }
        let bound = if self.is_believed(&bound) { bound } else { self.count()? };
        match self.limit.exceeded(bound.used.plus(more)) {
            None => Ok(()),
            Some(unit) => {
                let exceeded = LimitExceeded { name: self.limit.name.clone(), unit };
                Err(io::Error::new(io::ErrorKind::QuotaExceeded, exceeded))
            }
        }
    }

    /// Adds so much to the bound, if there is one. If that cannot be recorded, as on a full disk, the files must be counted.
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

    /// Whether it need not be counted again although it is too much.
    fn is_believed(&self, bound: &Bound) -> bool {
        let since = uptime().saturating_sub(bound.counted);
        since < (bound.took * 10).min(LONGEST_BELIEF)
            || bound.changes.is_some_and(|changes| changes == self.limit.changes().0)
    }

    fn count(&mut self) -> io::Result<Bound> {
        let begun = uptime();
        let (used, changes) = self.limit.count()?;
        let counted = uptime();
        self.record(Bound { counted, took: counted.saturating_sub(begun), used, changes })
    }

    fn record(&mut self, bound: Bound) -> io::Result<Bound> {
        // In place, as the file has the lock. What is left of a longer line comes after the end of this one.
        self.file
            .write_all_at(bound.to_text().as_bytes(), 0)
            .map_err(|error| with_path(&self.limit.root.join(".odmr").join(self.limit.file_name()), error))?;
        self.bound = Some(bound);
        Ok(bound)
    }
}

/// The content of the file, of this start of the system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bound {
    counted: Duration,
    took: Duration,
    used: Usage,
    changes: Option<u64>,
}

impl Bound {
    /// `None`: it is missing, damaged, old, or of an earlier start of the system.
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

/// Adds to several limits what a message takes of each, or to none: checks all that are `enforced` before. The locks last as
/// long as the result.
pub(super) fn lock_and_add(amounts: &[(Arc<UsageLimit>, Usage)], enforced: bool) -> io::Result<Vec<LockedUsage<'_>>> {
    let mut locked = lock_all(amounts)?;
    if enforced {
        locked.iter_mut().try_for_each(|(usage, more)| usage.check(*more))?;
    }
    locked.iter_mut().try_for_each(|(usage, more)| usage.add(*more))?;
    Ok(locked.into_iter().map(|(usage, _)| usage).collect())
}

/// Locks several limits in their order, so that two messages seldom wait for each other. A session that has a lock waits for
/// the next one for a short time only, and then for that one alone: an account whose lock is stuck holds up no other.
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
