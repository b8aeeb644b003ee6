//! Mail that waits. A queue is one directory, a Maildir, with an envelope in front of each message.
//!
//! One session at a time has the [`QueueLock`] of a queue, across processes; if an account has several queues, one session
//! has all of them, and the directories of those that have mail. It gets the messages one by one, tries to send each, and
//! settles it: recipients that are sent or rejected are settled, the others are open. Where a message is after a power cut,
//! by the last step that was completed:
//!
//! ```text
//! last completed step                          the message is         afterwards
//! begin_message, write                         nowhere, or in tmp     no 250 was sent: the client sends it again
//! commit: file fsynced, moved to new           in tmp or new          the same; if in new, it is sent twice
//! commit: new fsynced   THE COMMIT POINT       in new                 the client gets 250; the message waits
//! next_message, attempt                        there as before        the next session sends it, perhaps twice
//! settle, all open: attempt recorded           there, or renamed      the next session sends it
//! settle, some open: the others marked,
//!   file fsynced        THE SETTLEMENT         there, with marks      the next session sends it to those without a mark
//! settle, none open: removed, or moved to
//!   .refused            THE DELETION POINT     gone, or there again   nothing; if there again, it is sent twice or, if
//!                                                                     every recipient has a mark, removed or moved
//! ```
//!
//! Nothing that is recorded needs disk space: a mark overwrites one octet of the file ([`envelope::Mark`]), attempts are in
//! its name ([`AttemptRecord`](crate::maildir::AttemptRecord)), the next one is its time of modification, and `.refused`,
//! for rejections of which no sender can be told, gets the file itself. If the disk fails all the same, the message stays as
//! it was, and the session goes on with the next one.
//!
//! A file is known by the unique part of its name and by its inode: mail readers may move and flag it at any time. If a file
//! that is removed has another name, because a mail reader was moving it by link and unlink, or in another directory, the
//! marks of its recipients tell under that name too that they are settled. Only a name that would be too long for the record
//! gets another unique part.
//!
//! Held mail is offered in this order; within each step the domains of the account take turns:
//!
//! ```text
//! in doubt       the customer most likely has them, and can best tell while they are new
//! the others     by the hour of arrival, within an hour the smaller first; then the oldest first
//! ended sessions those that may end this one too, by how many they have ended; in doubt: from two sessions on
//! ```
//!
//! A message that has ended a session comes last for a week; then it is one of the others, as if it had arrived at the end of
//! that week. So what strangers send does not keep a message back for ever, also on a line that never carries all of it.
//!
//! In a queue with retries the oldest comes first, then those in doubt and those that have ended sessions.
//!
//! A message that ends its session (the connection is lost while it is under way, or 421 is the reply to it) is offered last
//! in the next ones; if it is in doubt, once more first. After three such sessions in a row the next call skips it, after four the next 2, then 4, then 8 calls,
//! but no call for more than a day. If a limit of messages ends a session, the customer calls again at once: only the last of
//! these sessions counts as a call.
//!
//! A recipient that cannot be read, in a file of another delivery agent, is always open: the file stays for it. A file
//! without any other recipient, and what is no plain file, is named in the log once, and does not count as waiting.
//!
//! An administrator may remove a message ([`QueueLock::remove`]), and have it tried at once; both need the lock.
//!
//! So a message may be sent twice, but after the commit point it is never lost. A file that is left in `tmp` is removed by
//! the first session after 36 hours. The removal of a message is not fsynced: that would cost as much as a message, and it
//! could still be sent twice. The DSN about a recipient is committed before `settle` begins (see `report`).
//!
//! The age of a message counts from the time of arrival in its envelope; of a file of another agent, from its time of
//! modification or, in a queue with retries, from the time in its name (maildir(5)). If a clock was wrong then, so that the
//! time is impossible, the first session that opens the message adds the time to the file's name, and the age counts from it.
//!
//! In a queue with retries each message waits for its next attempt; that time is the file's time of modification. Which
//! directories there are is decided by `provider/spool` and `customer/store`. The queue does not know connections.

pub mod retry;
mod name;
mod due;
mod aged;
pub mod envelope;
mod message;
mod listed;
mod lock_file;
mod locked_queue;
mod passes;
mod lock;
mod summary;
mod listing;
mod shared;
mod set_aside;
pub mod batch;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

pub use aged::AgedMessages;
pub use due::QueueDue;
pub use envelope::QueuedEnvelope;
pub use listing::ListedMessage;
pub use lock::{NextStep, QueueLock};
pub use lock_file::{LockError, remove_unused_lock};
pub use message::QueuedMessage;
pub use name::QueueName;
pub use shared::SharedIndex;
pub use summary::QueueSummary;

use crate::clock::Timestamp;
use crate::ids::Ids;
use crate::mail::address::Domain;
use crate::maildir::{Entry, MessageWriter, log_sweep_failed, make_state_directory};
use listed::Listed;
use lock_file::{LockFile, QUEUE_LOCK_FILE, TAKEOVER_FILE};
use locked_queue::{LockedQueue, Notes, log_unreadable};
use message::SET_ASIDE_DIRECTORY;
use set_aside::SetAsideLimits;

/// How often a list looks for messages that it lacks.
const LIST_ATTEMPTS: usize = 5;

/// Stores messages in queues, and locks queues.
#[derive(Clone)]
pub struct Queue {
    hostname: String,
    ids: Ids,
    /// A holder without progress for this time releases its lock to a session that asks.
    takeover: Duration,
    notes: Arc<Notes>,
    set_aside: Arc<SetAsideLimits>,
}

impl Queue {
    /// `hostname` is part of the names of new files.
    pub fn new(hostname: &str, ids: Ids, takeover: Duration) -> Queue {
        Queue { hostname: hostname.to_owned(), ids, takeover, notes: Arc::default(), set_aside: Arc::default() }
    }

    /// Begins a message, a copy for each queue; [`MessageWriter::commit`] makes it durable. `head` is the beginning of
    /// the content: our `Received` field, with LF line ends.
    ///
    /// # Errors
    /// `InvalidInput` if an envelope is too long to be read again; otherwise the disk fails.
    pub fn begin_message(&self, copies: &[(QueueName, QueuedEnvelope)], head: &str) -> io::Result<MessageWriter> {
        let mut writer = MessageWriter::default();
        copies.iter().try_for_each(|(name, envelope)| self.add_copy(&mut writer, name, envelope, head))?;
        Ok(writer)
    }

    /// A name for a new file that no other file has.
    pub fn unique(&self) -> String {
        self.ids.file_name(&self.hostname)
    }

    /// Adds a copy to a message of which no content was written yet.
    ///
    /// # Errors
    /// Those of [`Queue::begin_message`].
    pub fn add_copy(
        &self, writer: &mut MessageWriter, name: &QueueName, envelope: &QueuedEnvelope, head: &str,
    ) -> io::Result<()> {
        let lines = envelope.to_header(head);
        if lines.len() >= envelope::ENVELOPE_LIMIT {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many recipients for one message"));
        }
        let unique = match &name.domain {
            Some(domain) if name.shared => shared::file_name(self.unique(), domain, &envelope.envelope),
            _ => self.unique(),
        };
        writer.begin(&name.maildir(), &unique, lines.as_bytes())?;
        name.limit.iter().for_each(|limit| writer.count_in(limit));
        Ok(())
    }

    /// A file in the queue's `tmp` without a name: it is gone when it is closed.
    ///
    /// # Errors
    /// The disk fails.
    pub fn unnamed_file(&self, name: &QueueName) -> io::Result<File> {
        name.maildir().unnamed_file(&self.unique())
    }

    /// How many messages a queue has, up to `limit`.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn count(&self, name: &QueueName, limit: usize) -> io::Result<usize> {
        name.maildir().count(limit)
    }

    /// When the next attempt at a message of the queue is due; `None`: the queue is empty.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn next_due(&self, name: &QueueName) -> io::Result<Option<SystemTime>> {
        let maildir = name.maildir();
        let dues = maildir.list().map(|entry| entry.map(|entry| retry::due(&maildir.file(&entry))));
        dues.filter_map(Result::transpose).try_fold(None, |first, due| Ok(first.into_iter().chain([due?]).min()))
    }

    /// The same for messages with a sender, and for those without. If many without one are due first, those with one after
    /// them are not found before. Of a shared directory `index` tells the messages.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn next_due_by_sender(&self, name: &QueueName, index: &SharedIndex) -> io::Result<QueueDue> {
        let maildir = name.maildir();
        let entries = match &name.domain {
            Some(domain) if name.shared => index.entries(domain),
            _ => maildir.entries()?,
        };
        Ok(due::next(&maildir, entries))
    }

    /// How much waits in a queue, from the names of its files.
    ///
    /// # Errors
    /// A directory cannot be read.
    pub fn summary(&self, name: &QueueName) -> io::Result<QueueSummary> {
        summary::summarize(name, self.ids.clock().now())
    }

    /// The same for a shared directory, by domain.
    ///
    /// # Errors
    /// A directory cannot be read.
    pub fn summaries(&self, name: &QueueName) -> io::Result<BTreeMap<Domain, QueueSummary>> {
        summary::summarize_shared(name, self.ids.clock().now())
    }

    /// The messages of a queue for which something is due by their age, by their names, without its lock: see [`AgedMessages`].
    /// `limit`: how many of them at most, and after which.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn aged(
        &self, name: &QueueName, limit: (usize, Option<&Entry>), due: &dyn Fn(&Entry, Timestamp) -> Option<Timestamp>,
    ) -> io::Result<AgedMessages> {
        aged::list(name, self.ids.clock().now(), limit, &|entry| self.notes.is_mail(&name.maildir(), entry), due)
    }

    /// Shows each message of a queue, and each file that is no mail, the oldest first, without its lock. A message that is
    /// removed meanwhile is left out; a file that cannot be read is logged.
    ///
    /// # Errors
    /// The directory cannot be read; those of `show`.
    pub fn list(&self, name: &QueueName, show: &mut dyn FnMut(ListedMessage) -> io::Result<()>) -> io::Result<()> {
        let (mut shown, now) = (HashSet::new(), self.ids.clock().now());
        // A file that is renamed meanwhile, by a session say, may not be where it was, or be listed under neither name.
        for _ in 0..LIST_ATTEMPTS {
            let begun = SystemTime::now();
            let mut entries = name.maildir().entries()?;
            entries.retain(|entry| !shown.contains(entry.unique()));
            if entries.is_empty() {
                break;
            }
            for entry in entries {
                let unique = entry.unique().to_owned();
                match ListedMessage::read(name, entry, now) {
                    Ok(Some(message)) => show(message)?,
                    Ok(None) => continue,
                    Err(error) => log_unreadable(name, &error),
                }
                shown.insert(unique);
            }
            if name.maildir().is_unchanged_since(begun) {
                break;
            }
        }
        Ok(())
    }

    /// Locks all these queues, or none of them; of an account, those that have mail. A holder that makes no progress is asked
    /// to release its lock, and gets 5 seconds for that.
    ///
    /// # Errors
    /// See [`LockError`].
    pub fn lock(&self, names: &[QueueName]) -> Result<QueueLock, LockError> {
        self.lock_all(names, Some(self.takeover))
    }

    /// Locks an account, and the first of its queues with mail that no other session has. The others are locked when the
    /// session comes to them; one that another session has then is left out.
    ///
    /// # Errors
    /// See [`LockError`].
    pub fn lock_account(&self, names: &[QueueName]) -> Result<QueueLock, LockError> {
        let takeover = Some(self.takeover);
        let accounts = self.lock_accounts(names, takeover)?;
        let mut queues: Vec<_> = names.iter().map(|name| self.unlocked(name)).collect();
        let mut busy = Ok(());
        for queue in &mut queues {
            match queue.lock_if_mail(takeover) {
                Ok(()) if queue.lock.is_some() => return Ok(QueueLock::new(queues, accounts)),
                Err(LockError::Busy(name)) => busy = Err(LockError::Busy(name)),
                other => other?,
            }
        }
        busy.map(|()| QueueLock::new(queues, accounts))
    }

    /// Does the same as [`Queue::lock`] for queues of which some are in a shared directory with this index.
    ///
    /// # Errors
    /// See [`LockError`].
    pub fn lock_indexed(&self, names: &[QueueName], index: &Arc<SharedIndex>) -> Result<QueueLock, LockError> {
        let mut lock = self.lock_all(names, Some(self.takeover))?;
        lock.set_index(index);
        Ok(lock)
    }

    /// Locks one queue without waiting.
    ///
    /// # Errors
    /// See [`LockError`].
    pub fn try_lock(&self, name: &QueueName) -> Result<QueueLock, LockError> {
        self.lock_all(std::slice::from_ref(name), None)
    }

    /// Locks a queue of an account without waiting, for work that yields: a session that comes asks for the lock at once
    /// ([`QueueLock::takeover_requested`]), and does not find the account busy.
    ///
    /// # Errors
    /// See [`LockError`].
    pub fn lock_yielding(&self, name: &QueueName) -> Result<QueueLock, LockError> {
        let accounts = self.lock_accounts(std::slice::from_ref(name), None)?;
        accounts.iter().for_each(LockFile::yield_to_sessions);
        let mut queue = self.unlocked(name);
        queue.lock_if_mail(None)?;
        queue.lock.iter().for_each(LockFile::yield_to_sessions);
        Ok(QueueLock::new(vec![queue], accounts))
    }

    /// Removes the directory of a queue if it has no mail, and nobody has its lock. A writer who needs it meanwhile makes it
    /// again. Returns whether it was removed.
    ///
    /// # Errors
    /// The disk fails.
    pub fn remove_empty(&self, name: &QueueName) -> io::Result<bool> {
        self.remove_unused(name, false)
    }

    /// `stale`: only if it was not used for 36 hours.
    fn remove_unused(&self, name: &QueueName, stale: bool) -> io::Result<bool> {
        let maildir = name.maildir();
        if !maildir.path().exists() || !maildir.is_empty()? {
            return Ok(false);
        }
        // Not as a session, which makes what is missing: another process may be removing it too.
        match LockFile::lock(&name.path.join(QUEUE_LOCK_FILE), None, name) {
            Ok(_lock) => maildir.remove_unused(&[QUEUE_LOCK_FILE, TAKEOVER_FILE, SET_ASIDE_DIRECTORY], stale),
            Err(LockError::Busy(_)) => Ok(false),
            Err(LockError::Failed(error)) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(LockError::Failed(error)) => Err(error),
        }
    }

    /// Removes what is left over after 36 hours: files of writers that died, and, if the queue is `unwanted`, its directory
    /// once it holds no mail; and what is in `.refused` for too long or is too much. A failure is logged.
    pub fn tidy(&self, name: &QueueName, unwanted: bool) {
        let maildir = name.maildir();
        let tidy = || -> io::Result<()> {
            message::sweep(&maildir)?;
            set_aside::apply_limits(name, SystemTime::now())?;
            if name.account_lock.is_some() && maildir.is_empty()? {
                // Of a session that was killed, or of an earlier version.
                remove_unused_lock(&name.path.join(QUEUE_LOCK_FILE))?;
            }
            if unwanted { self.remove_unused(name, true).map(drop) } else { Ok(()) }
        };
        tidy().unwrap_or_else(|error| log_sweep_failed(name, &error));
    }

    fn lock_all(&self, names: &[QueueName], takeover: Option<Duration>) -> Result<QueueLock, LockError> {
        let accounts = self.lock_accounts(names, takeover)?;
        let mut queues: Vec<_> = names.iter().map(|name| self.unlocked(name)).collect();
        for queue in &mut queues {
            match queue.name.account_lock.is_some() || queue.name.shared {
                true => queue.lock_if_mail(takeover)?,
                false => queue.lock_directory(takeover)?,
            }
        }
        // All of a session are in the same directory.
        if let Some(queue) = queues.iter().find(|queue| queue.name.shared) {
            queue.sweep();
        }
        Ok(QueueLock::new(queues, accounts))
    }

    fn lock_accounts(&self, names: &[QueueName], takeover: Option<Duration>) -> Result<Vec<LockFile>, LockError> {
        let mut accounts: Vec<LockFile> = Vec::new();
        for name in names {
            if let Some(path) = &name.account_lock
                && !accounts.iter().any(|lock| lock.path() == path)
            {
                path.parent().map_or(Ok(()), make_state_directory).map_err(LockError::Failed)?;
                accounts.push(LockFile::lock(path, takeover, name)?);
            }
        }
        Ok(accounts)
    }

    fn unlocked(&self, name: &QueueName) -> LockedQueue {
        LockedQueue {
            name: name.clone(),
            maildir: name.maildir(),
            lock: None,
            ids: self.ids.clone(),
            notes: self.notes.clone(),
            set_aside: self.set_aside.clone(),
            index: None,
            locked: HashMap::new(),
            listed: Listed::default(),
            under_way: 0,
        }
    }
}

#[cfg(test)]
mod tests;
