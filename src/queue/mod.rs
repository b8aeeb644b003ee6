//! Queues of mail. A queue is one directory, a Maildir, with an envelope in front of each message.
//!
//! One session at a time has the [`QueueLock`] of a queue, across processes. If an account has several queues, one
//! session has all of them that have mail. The session gets the messages one by one, tries to send each, and settles
//! it: recipients to whom it was sent, or who were rejected, are settled; the others stay open. The table shows where a
//! message is after a power cut, by the last step that was completed:
//!
//! ```text
//! last completed step                          the message is         afterwards
//! begin_message, write                         nowhere, or in tmp     no 250 was sent: the client sends it again
//! commit: file fsynced, moved to new           in tmp or new          no 250 was sent: the client sends it again, and if
//!                                                                     it is in new, it is sent twice
//! commit: new fsynced   THE COMMIT POINT       in new                 the client gets 250; the message waits
//! next_message, attempt                        in the queue           the next session sends it, perhaps twice
//! settle, all open: attempt recorded           the same, or renamed   the next session sends it
//! settle, some open: the others marked,
//!   file fsynced        THE SETTLEMENT         the same, with marks   the next session sends it to those without a mark
//! settle, none open: removed, or moved to
//!   .refused            THE DELETION POINT     removed, or back in    nothing; if it is back, it is sent twice or, if
//!                                              the queue              every recipient has a mark, removed or moved
//! ```
//!
//! So a message may be sent twice, but after the commit point it is never lost. The DSN about a recipient is committed
//! before `settle` begins (see `report`). The removal of a message is not fsynced: that would cost as much as a
//! message, and the message could still be sent twice.
//!
//! **Full disk.** No record needs disk space: a mark overwrites one octet of the file ([`envelope::Mark`]), attempts
//! are counted in the file's name ([`AttemptRecord`](crate::maildir::AttemptRecord)), and the time of the next attempt
//! is its time of modification. Rejected mail that no DSN can report is moved to `.refused`, not copied. If the disk
//! fails nevertheless, the message stays as it was, and the session goes on with the next one.
//!
//! **Mail readers.** A mail reader may move or flag a file at any time, so a session knows it by the unique part of its
//! name and by its inode. A reader that moves a file by link and unlink may be killed in between: then the file has two
//! names. If the session removes one, the recipients still have their marks under the other. Only a name that would be
//! too long with the record gets another unique part.
//!
//! **Order.** Held mail is offered in three phases; in each, the domains of the account take turns:
//!
//! ```text
//! in doubt       the customer may already have these, and recognizes a duplicate best while it is new
//! the others     by the hour of arrival; within an hour the smaller first, then the oldest
//! ended sessions they may end this one too; those that have ended the fewest first; those in doubt only after
//!                they have ended two
//! ```
//!
//! In a queue with retries the oldest message comes first; those in doubt and those that have ended sessions come last.
//!
//! A message ends its session if the connection is lost while it is under way, or if it gets the reply 421. One such
//! message must not block the queue:
//!
//! - The next sessions offer it last; if it is in doubt, first once more.
//! - After three such sessions in a row the next call skips it, after four the next 2 calls, then 4, then 8, but for no
//!   more than a day. If a limit of messages ends a session, the customer calls again at once: only the last of these
//!   sessions counts as a call.
//! - It comes last for a week after it has ended a session. Then it is ordered as if it had arrived at the end of that
//!   week: new mail must not delay it for ever.
//!
//! **Other agents' files.** A recipient that cannot be read is always open: the file stays for it. A file without a
//! readable recipient, and an entry that is not a plain file, is logged once as `not-mail`, and does not count as
//! waiting.
//!
//! **Age.** The age of a message counts from the time of arrival in its envelope. The age of another agent's file
//! counts from its time of modification; in a queue with retries, from the time in its name (maildir(5)). If that time
//! is impossible, because a clock was wrong, the first session that opens the message adds the present time to the
//! file's name, and the age counts from then.
//!
//! An administrator may remove a message ([`QueueLock::remove`]), and make it due at once; both need the lock. A file
//! that a dead writer has left in `tmp` is removed by the first session after 36 hours. `provider/spool` and
//! `customer/store` decide which directories there are. The queue knows nothing of connections.

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

use crate::clock::{Timestamp, cautious_now};
use crate::ids::Ids;
use crate::mail::address::Domain;
use crate::maildir::{Entry, MessageWriter, log_sweep_failed, make_state_directory};
use listed::Listed;
use lock_file::{LockFile, QUEUE_LOCK_FILE, TAKEOVER_FILE};
use locked_queue::{LockedQueue, Notes, log_unreadable};
use message::SET_ASIDE_DIRECTORY;
use set_aside::SetAsideLimits;

/// How often at most [`Queue::list`] reads the directories, if sessions rename files.
const LIST_ATTEMPTS: usize = 5;

/// Stores messages in queues, and locks queues.
#[derive(Clone)]
pub struct Queue {
    hostname: String,
    ids: Ids,
    /// A session without progress for this time must release its lock if another session requests it.
    takeover: Duration,
    notes: Arc<Notes>,
    set_aside: Arc<SetAsideLimits>,
}

impl Queue {
    /// `hostname` becomes part of the names of new files. `takeover`: a session without progress for this time must
    /// release its lock if another session requests it.
    pub fn new(hostname: &str, ids: Ids, takeover: Duration) -> Queue {
        Queue { hostname: hostname.to_owned(), ids, takeover, notes: Arc::default(), set_aside: Arc::default() }
    }

    /// Begins a message, with a copy in each queue; [`MessageWriter::commit`] makes it durable. `head` is the beginning
    /// of the content: our `Received` field, with LF line ends.
    ///
    /// # Errors
    /// `InvalidInput` if an envelope would be longer than [`envelope::ENVELOPE_LIMIT`], so that it could not be read
    /// again; the system's, if a file cannot be written.
    pub fn begin_message(&self, copies: &[(QueueName, QueuedEnvelope)], head: &str) -> io::Result<MessageWriter> {
        let mut writer = MessageWriter::default();
        copies.iter().try_for_each(|(name, envelope)| self.add_copy(&mut writer, name, envelope, head))?;
        Ok(writer)
    }

    /// A new unique name for a file (maildir(5)).
    pub fn unique(&self) -> String {
        self.ids.file_name(&self.hostname)
    }

    /// Adds a copy in another queue to a message, before its content is written.
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

    /// Makes a file without a name on the disk of the queue. It vanishes when it is closed, even by a crash.
    ///
    /// # Errors
    /// The system's: the file cannot be made.
    pub fn unnamed_file(&self, name: &QueueName) -> io::Result<File> {
        name.maildir().unnamed_file(&self.unique())
    }

    /// The number of files in a queue; counting stops at `limit`.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn count(&self, name: &QueueName, limit: usize) -> io::Result<usize> {
        name.maildir().count(limit)
    }

    /// When the next attempt in a queue with retries is due; `None`: the queue is empty.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn next_due(&self, name: &QueueName) -> io::Result<Option<SystemTime>> {
        let maildir = name.maildir();
        let dues = maildir.list().map(|entry| entry.map(|entry| retry::due(&maildir.file(&entry))));
        dues.filter_map(Result::transpose).try_fold(None, |first, due| Ok(first.into_iter().chain([due?]).min()))
    }

    /// When the next attempts are due at a message with a sender, and at one without (a DSN). If the first 100 due have
    /// no sender, `mail` is `None` until some of them are sent. The messages of a shared directory come from `index`.
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

    /// Counts what waits in a queue, by the names of its files.
    ///
    /// # Errors
    /// A directory cannot be read.
    pub fn summary(&self, name: &QueueName) -> io::Result<QueueSummary> {
        summary::summarize(name, self.ids.clock().now())
    }

    /// Counts what waits in a shared directory, by domain.
    ///
    /// # Errors
    /// A directory cannot be read.
    pub fn summaries(&self, name: &QueueName) -> io::Result<BTreeMap<Domain, QueueSummary>> {
        summary::summarize_shared(name, self.ids.clock().now())
    }

    /// The messages of a queue for which something is due by their age. Only file names are read, and no lock is
    /// needed. `limit`: how many messages at most, and after which one. `due`: when something is due for a message that
    /// arrived at the given time; `None`: never.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn aged(
        &self, name: &QueueName, limit: (usize, Option<&Entry>), due: &dyn Fn(&Entry, Timestamp) -> Option<Timestamp>,
    ) -> io::Result<AgedMessages> {
        aged::list(name, self.ids.clock().now(), limit, &|entry| self.notes.is_mail(&name.maildir(), entry), due)
    }

    /// Calls `show` for each message of a queue, and for each file that is not a message, the oldest first. No lock is
    /// needed: a message that is removed during the listing is left out, and a file that cannot be read is logged.
    ///
    /// # Errors
    /// The directory cannot be read, or `show` fails.
    pub fn list(&self, name: &QueueName, show: &mut dyn FnMut(ListedMessage) -> io::Result<()>) -> io::Result<()> {
        let (mut shown, now) = (HashSet::new(), self.ids.clock().now());
        // A file that a session renames during the listing may be listed under neither name.
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

    /// Locks all these queues (of an account's, those that have mail), or none of them. If a session without progress
    /// has a lock, requests it, and waits 5 seconds for it.
    ///
    /// # Errors
    /// See [`LockError`].
    pub fn lock(&self, names: &[QueueName]) -> Result<QueueLock, LockError> {
        self.lock_all(names, Some(self.takeover))
    }

    /// Locks an account, and the first of its queues that has mail and is not locked. The session locks each other
    /// queue when its turn comes, and leaves out a queue that another session has locked.
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

    /// Like [`Queue::lock`], for queues of which some are in a shared directory with this index.
    ///
    /// # Errors
    /// See [`LockError`].
    pub fn lock_indexed(&self, names: &[QueueName], index: &Arc<SharedIndex>) -> Result<QueueLock, LockError> {
        let mut lock = self.lock_all(names, Some(self.takeover))?;
        lock.set_index(index);
        Ok(lock)
    }

    /// Locks one queue without waiting: a lock that another session has is `LockError::Busy`.
    ///
    /// # Errors
    /// See [`LockError`].
    pub fn try_lock(&self, name: &QueueName) -> Result<QueueLock, LockError> {
        self.lock_all(std::slice::from_ref(name), None)
    }

    /// Locks a queue of an account without waiting, for work in the background. A session that needs the lock requests
    /// it at once ([`QueueLock::takeover_requested`]), as if this one made no progress.
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

    /// Removes the directory of a queue if it has no mail and is not locked. A writer that needs it makes it again.
    /// Returns whether it was removed.
    ///
    /// # Errors
    /// The system's: a directory or file cannot be read or removed.
    pub fn remove_empty(&self, name: &QueueName) -> io::Result<bool> {
        self.remove_unused(name, false)
    }

    /// `stale`: only if no session has used the queue for 36 hours.
    fn remove_unused(&self, name: &QueueName, stale: bool) -> io::Result<bool> {
        let maildir = name.maildir();
        if !maildir.path().exists() || !maildir.is_empty()? {
            return Ok(false);
        }
        // `LockedQueue::lock_directory` would make the directory again that another process is removing.
        match LockFile::lock(&name.path.join(QUEUE_LOCK_FILE), None, name) {
            Ok(_lock) => maildir.remove_unused(&[QUEUE_LOCK_FILE, TAKEOVER_FILE, SET_ASIDE_DIRECTORY], stale),
            Err(LockError::Busy(_)) => Ok(false),
            Err(LockError::Failed(error)) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(LockError::Failed(error)) => Err(error),
        }
    }

    /// Removes what is left over: files of dead writers after 36 hours; what `.refused` has beyond its limits; if the
    /// queue is `unwanted`, its directory once it has no mail and was not used for 36 hours. A failure is logged.
    pub fn tidy(&self, name: &QueueName, unwanted: bool) {
        let maildir = name.maildir();
        let tidy = || -> io::Result<()> {
            message::sweep(&maildir)?;
            set_aside::apply_limits(name, cautious_now())?;
            if name.account_lock.is_some() && maildir.is_empty()? {
                // A session that was killed has left its lock file, or an earlier version has.
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
        // All shared queues of a session are in the same directory: one sweep is enough.
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
