//! The lock on some queues, and the messages that it offers.

use std::collections::{HashSet, VecDeque};
use std::fs::File;
use std::io;
use std::time::SystemTime;

use super::envelope::ParsedEnvelope;
use super::message::{self, QueuedMessage};
use super::name::QueueName;
use super::retry;
use crate::clock::Clock;
use crate::mail::address::Domain;
use crate::maildir::{Entry, IN_DOUBT, Maildir};
use crate::net::trace::quoted;
use crate::smtp::status::DeliveryResult;

/// The file beside the lock that asks its holder to release it.
pub(super) const TAKEOVER_FILE: &str = "odmr.wanted";

/// The lock on some queues, for one session.
pub struct QueueLock {
    queues: Vec<LockedQueue>,
    current: usize,
    clock: Clock,
}

pub(super) struct LockedQueue {
    name: QueueName,
    maildir: Maildir,
    lock: File,
    waiting: VecDeque<Entry>,
    /// The unique names of messages that this session has offered and that are still there: each is offered once. The
    /// set is for one queue, because other agents may give files in two Maildirs the same name.
    offered: HashSet<String>,
}

impl QueueLock {
    pub(super) fn new(queues: Vec<LockedQueue>, clock: Clock) -> QueueLock {
        // The queue after the last is the first one that was asked for.
        let current = queues.len().saturating_sub(1);
        QueueLock { queues, current, clock }
    }

    /// The domains whose queues are locked.
    pub fn domains(&self) -> impl Iterator<Item = &Domain> {
        self.queues.iter().filter_map(|queue| queue.name.domain.as_ref())
    }

    /// Whether there is no file at all in the queues.
    ///
    /// # Errors
    /// A directory cannot be read.
    pub fn is_empty(&self) -> io::Result<bool> {
        for queue in &self.queues {
            if !queue.maildir.is_empty()? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// How many files there are in the queues, up to `limit`.
    ///
    /// # Errors
    /// A directory cannot be read.
    pub fn count(&self, limit: usize) -> io::Result<usize> {
        let mut count = 0;
        for queue in &self.queues {
            count += queue.maildir.count(limit - count)?;
        }
        Ok(count)
    }

    /// The next message: the queues take turns, the oldest message of a queue comes first. Messages that arrive after the
    /// lock are offered too. A file that cannot be read is logged and skipped. `None`: every message has been offered.
    pub fn next_message(&mut self) -> Option<QueuedMessage> {
        let mut refilled = 0;
        while refilled <= self.queues.len() {
            let queue = self.queues.get_mut(self.current)?;
            while let Some(entry) = queue.waiting.pop_front() {
                queue.offered.insert(entry.unique().to_owned());
                match queue.open(entry, self.clock) {
                    Ok(Some(message)) => return Some(message),
                    Ok(None) => {}
                    Err(error) => log_unreadable(&queue.name, &error),
                }
            }
            self.current = (self.current + 1) % self.queues.len();
            let queue = &mut self.queues[self.current];
            if let Err(error) = queue.refill() {
                log_unreadable(&queue.name, &error);
            }
            refilled += 1;
        }
        None
    }

    /// Opens one message of a queue, which is then not offered again. `None`: it is gone, or the queue is not locked.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn open_message(&mut self, name: &QueueName, entry: Entry) -> io::Result<Option<QueuedMessage>> {
        let Some(queue) = self.queues.iter_mut().find(|queue| queue.name == *name) else { return Ok(None) };
        queue.offered.insert(entry.unique().to_owned());
        queue.open(entry, self.clock)
    }

    /// Whether [`QueueLock::next_message`] will offer a message.
    pub fn has_next(&mut self) -> bool {
        let Some(message) = self.next_message() else { return false };
        if let Some(queue) = self.queue_of(message.maildir()) {
            queue.offered.remove(message.unique());
            queue.waiting.push_front(message.into_entry());
        }
        true
    }

    /// Records what became of the recipients of a message, and removes the message if no recipient is left.
    ///
    /// # Errors
    /// The disk fails. No recipient is lost, but some may receive the message twice.
    pub fn settle(&mut self, message: QueuedMessage, result: &DeliveryResult) -> io::Result<()> {
        let (queue, unique) = (self.queue_of(message.maildir()), message.unique().to_owned());
        if message.settle(result)?
            && let Some(queue) = queue
        {
            queue.offered.remove(&unique);
        }
        Ok(())
    }

    fn queue_of(&mut self, maildir: &Maildir) -> Option<&mut LockedQueue> {
        self.queues.iter_mut().find(|queue| queue.maildir.path() == maildir.path())
    }

    /// Shows sessions that wait for these locks that this session makes progress.
    pub fn heartbeat(&self) {
        for queue in &self.queues {
            let _ = queue.lock.set_modified(SystemTime::now());
        }
    }

    /// Whether another session waits for one of these queues.
    pub fn takeover_requested(&self) -> bool {
        self.queues.iter().any(|queue| queue.name.path.join(TAKEOVER_FILE).exists())
    }
}

impl LockedQueue {
    pub(super) fn new(name: &QueueName, maildir: Maildir, lock: File) -> LockedQueue {
        LockedQueue { name: name.clone(), maildir, lock, waiting: VecDeque::new(), offered: HashSet::new() }
    }

    /// Opens a message. If its time of arrival is impossible, records that it was first seen now.
    fn open(&self, entry: Entry, clock: Clock) -> io::Result<Option<QueuedMessage>> {
        let mut message = QueuedMessage::open(&self.maildir, &self.name, entry, clock.now())?;
        message.iter_mut().for_each(QueuedMessage::ensure_arrival);
        Ok(message)
    }

    /// Lists the messages that are due and that this session has not offered yet.
    fn refill(&mut self) -> io::Result<()> {
        let mut entries = self.maildir.entries()?;
        let mut left_out = Vec::new();
        for pair in entries.windows(2).filter(|pair| pair[0].unique() == pair[1].unique()) {
            match self.superseded(&pair[0], &pair[1]) {
                Ok(None) => {}
                Ok(Some(entry)) => {
                    log::warn!("event=half-settled file={}", quoted(&entry.name));
                    self.maildir.remove(entry)?;
                    left_out.push(entry.clone());
                }
                // If these may be the two files of one message, either would be sent to recipients that have it already.
                Err(error) => {
                    log_unreadable(&self.name, &error);
                    left_out.extend_from_slice(pair);
                }
            }
        }
        entries.retain(|entry| !left_out.contains(entry));
        // A message that ended a session is offered last: it may end this one too, and the others must not wait for it.
        entries.sort_by_key(|entry| entry.has(IN_DOUBT));
        let now = SystemTime::now();
        let is_due =
            |entry: &Entry| !self.name.retries || retry::due(&self.maildir.file(entry)).is_none_or(|due| due <= now);
        entries.retain(|entry| !self.offered.contains(entry.unique()) && is_due(entry));
        self.waiting = entries.into();
        Ok(())
    }

    /// A crash in `settle` leaves a message twice, as it was before and after. Returns the file from before, which has
    /// recipients that are settled; `None`: neither file is the rest of the other.
    ///
    /// # Errors
    /// A file cannot be read.
    fn superseded<'a>(&self, one: &'a Entry, other: &'a Entry) -> io::Result<Option<&'a Entry>> {
        let (Some(first), Some(second)) = (self.parse(one)?, self.parse(other)?) else { return Ok(None) };
        // Only a file that we have written can be the rest of another.
        let is_rest = |few: &ParsedEnvelope, many: &ParsedEnvelope| {
            let (some, all) = (few.recipients(), many.recipients());
            few.ours
                && few.unread == many.unread
                && some.len() < all.len()
                && some.iter().all(|recipient| all.contains(recipient))
        };
        Ok(if is_rest(&first, &second) { Some(other) } else { is_rest(&second, &first).then_some(one) })
    }

    /// The envelope of a file; `None`: it is not a message for a recipient of this queue, or it cannot be opened.
    fn parse(&self, entry: &Entry) -> io::Result<Option<ParsedEnvelope>> {
        let Ok(Some(file)) = message::open_file(&self.maildir.file(entry)) else { return Ok(None) };
        message::read_envelope(&file, entry, &self.name)
    }
}

pub(super) fn log_unreadable(name: &QueueName, error: &io::Error) {
    log::error!("event=unreadable queue={name} error={}", quoted(error));
}
