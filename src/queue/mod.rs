//! Mail that waits: a queue is one directory, a Maildir, with an envelope in front of each message.
//!
//! ```text
//! begin_message ─▶ DIRECTORY/new ─▶ lock ─▶ next_message ─▶ settle ─┬─ sent:      removed
//!                                                                   ├─ deferred:  stays
//!                                                                   ├─ in doubt:  stays, in cur, flagged
//!                                                                   └─ rejected:  removed once its sender knows;
//!                                                                                 otherwise to .refused
//! ```
//!
//! Where the directories are is the parties' affair (`provider/spool`, `customer/store`). In a queue with retries each
//! message waits for its next attempt; that time is the file's time of modification, so it outlives every restart and
//! needs no other record.
//!
//! Nothing that was committed is lost: only [`QueuedMessage::settle`] removes mail, and only what the next holder has
//! accepted. One [`QueueLock`] at a time has a queue, across processes; `Drop` releases it. The queue knows nothing of
//! connections.

pub mod retry;
mod name;
pub mod envelope;
mod message;
mod lock;

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

pub use envelope::QueuedEnvelope;
pub use lock::QueueLock;
pub use message::QueuedMessage;
pub use name::QueueName;

use crate::ids::Ids;
use crate::maildir::{Maildir, MessageWriter, with_path};
use lock::{LockedQueue, log_unreadable};

/// How long a session waits for the holder of a lock that was asked to release it.
const TAKEOVER_WAIT: Duration = Duration::from_secs(5);

/// Reads and writes queues.
#[derive(Clone)]
pub struct Queue {
    hostname: String,
    ids: Ids,
    /// A holder without progress for this time releases its lock to a session that asks.
    takeover: Duration,
}

impl Queue {
    /// `hostname` is part of the names of new files.
    pub fn new(hostname: &str, ids: Ids, takeover: Duration) -> Queue {
        Queue { hostname: hostname.to_owned(), ids, takeover }
    }

    /// Begins a message, a copy for each queue; [`MessageWriter::commit`] makes it durable. `head` is the beginning of
    /// the content: our `Received`.
    pub fn begin_message(&self, copies: &[(QueueName, QueuedEnvelope)], head: &str) -> io::Result<MessageWriter> {
        let mut writer = MessageWriter::default();
        copies.iter().try_for_each(|(name, envelope)| self.add_copy(&mut writer, name, envelope, head))?;
        Ok(writer)
    }

    /// A name for a new file that no other file has.
    pub fn unique(&self) -> String {
        self.ids.file_name(&self.hostname)
    }

    /// Adds a copy of a message.
    ///
    /// # Errors
    /// `InvalidInput` if the envelope is too long to be read again.
    pub fn add_copy(
        &self, writer: &mut MessageWriter, name: &QueueName, envelope: &QueuedEnvelope, head: &str,
    ) -> io::Result<()> {
        let lines = envelope.to_header(head);
        if lines.len() >= envelope::ENVELOPE_LIMIT {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many recipients for one message"));
        }
        writer.begin(&name.maildir(), &self.unique(), lines.as_bytes())
    }

    /// A file in the queue's `tmp` that is gone with its last descriptor.
    pub fn unnamed_file(&self, name: &QueueName) -> io::Result<File> {
        name.maildir().unnamed_file(&self.unique())
    }

    /// How many messages a queue has, up to `limit`.
    pub fn count(&self, name: &QueueName, limit: usize) -> io::Result<usize> {
        name.maildir().count(limit)
    }

    /// When the next attempt at a message of the queue is due; `None`: the queue is empty.
    pub fn next_due(&self, name: &QueueName) -> io::Result<Option<SystemTime>> {
        let maildir = name.maildir();
        let entries = maildir.entries()?;
        Ok(entries.iter().filter_map(|entry| retry::due(&maildir.file(entry))).min())
    }

    /// Shows each message of a queue, without its lock and without changing it. A message that goes meanwhile is
    /// left out.
    pub fn each(&self, name: &QueueName, mut show: impl FnMut(&QueuedMessage)) -> io::Result<()> {
        let maildir = name.maildir();
        for entry in maildir.entries()? {
            match QueuedMessage::open(&maildir, name, entry) {
                Ok(Some(message)) => show(&message),
                Ok(None) => {}
                Err(error) => log_unreadable(name, &error),
            }
        }
        Ok(())
    }

    /// Locks all these queues, or none of them.
    pub fn lock(&self, names: &[QueueName]) -> Result<QueueLock, LockError> {
        self.lock_each(names, |maildir, name| self.lock_or_take_over(maildir, name))
    }

    /// Locks a queue whose holders never give way, without waiting.
    pub fn try_lock(&self, name: &QueueName) -> Result<QueueLock, LockError> {
        self.lock_each(std::slice::from_ref(name), lock_now)
    }

    fn lock_each(
        &self, names: &[QueueName], lock: impl Fn(&Maildir, &QueueName) -> Result<File, LockError>,
    ) -> Result<QueueLock, LockError> {
        let mut queues = Vec::with_capacity(names.len());
        for name in names {
            let maildir = name.maildir();
            maildir.create().map_err(LockError::Failed)?;
            let lock = lock(&maildir, name)?;
            if let Err(error) = maildir.sweep().and_then(|()| message::rejected_maildir(&maildir).sweep()) {
                log::warn!("event=sweep-failed queue={name} error={:?}", error.to_string());
            }
            queues.push(LockedQueue::new(name, maildir, lock));
        }
        Ok(QueueLock::new(queues))
    }

    /// Locks a queue whose holder may be asked to release it.
    fn lock_or_take_over(&self, maildir: &Maildir, name: &QueueName) -> Result<File, LockError> {
        let lock = open_lock(maildir)?;
        let wanted = maildir.path().join("odmr.wanted");
        let mut give_up: Option<Instant> = None;
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                Err(TryLockError::Error(error)) => return Err(lock_failed(maildir, error)),
                Err(TryLockError::WouldBlock) => {}
            }
            match give_up {
                // A holder that makes progress keeps its lock; one that has made none for long is asked to release it.
                None if self.is_alive(&lock) => return Err(LockError::Busy(name.clone())),
                None => {
                    log::info!("event=takeover queue={name}");
                    File::create(&wanted).map_err(|error| LockError::Failed(with_path(&wanted, error)))?;
                    give_up = Some(Instant::now() + TAKEOVER_WAIT);
                }
                Some(late) if Instant::now() >= late => {
                    let _ = fs::remove_file(&wanted);
                    return Err(LockError::Busy(name.clone()));
                }
                // The kernel reports the release of a lock only to a wait that has no deadline.
                Some(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
        let _ = fs::remove_file(&wanted);
        let _ = lock.set_modified(SystemTime::now());
        Ok(lock)
    }

    /// Whether the holder of a lock has made progress lately.
    fn is_alive(&self, lock: &File) -> bool {
        let heartbeat = lock.metadata().and_then(|metadata| metadata.modified());
        heartbeat.is_ok_and(|heartbeat| heartbeat.elapsed().is_ok_and(|age| age < self.takeover))
    }
}

/// Why a queue cannot be locked.
#[derive(Debug)]
pub enum LockError {
    /// Another session has this queue.
    Busy(QueueName),
    Failed(io::Error),
}

fn lock_now(maildir: &Maildir, name: &QueueName) -> Result<File, LockError> {
    let lock = open_lock(maildir)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(LockError::Busy(name.clone())),
        Err(TryLockError::Error(error)) => Err(lock_failed(maildir, error)),
    }
}

fn open_lock(maildir: &Maildir) -> Result<File, LockError> {
    let mut options = OpenOptions::new();
    let opened = options.create(true).truncate(false).write(true).mode(0o600).open(lock_path(maildir));
    opened.map_err(|error| lock_failed(maildir, error))
}

fn lock_failed(maildir: &Maildir, error: io::Error) -> LockError {
    LockError::Failed(with_path(&lock_path(maildir), error))
}

fn lock_path(maildir: &Maildir) -> PathBuf {
    maildir.path().join("odmr.lock")
}

#[cfg(test)]
mod tests;
