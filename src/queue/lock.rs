//! The lock on some queues, and the messages that it offers.

use std::collections::{HashSet, VecDeque};
use std::fs::File;
use std::io;
use std::time::SystemTime;

use super::envelope::ParsedEnvelope;
use super::message::{self, QueuedMessage};
use super::name::QueueName;
use super::retry;
use crate::mail::address::Domain;
use crate::maildir::{Entry, IN_DOUBT, Maildir};
use crate::smtp::status::DeliveryResult;

/// The lock on some queues, for one session.
pub struct QueueLock {
    queues: Vec<LockedQueue>,
    current: usize,
}

pub(super) struct LockedQueue {
    name: QueueName,
    maildir: Maildir,
    lock: File,
    waiting: VecDeque<Entry>,
    /// Messages that this session has offered and that are still there: each is offered once. By queue, as an agent may
    /// give two files in two Maildirs the same name.
    offered: HashSet<String>,
}

impl QueueLock {
    pub(super) fn new(queues: Vec<LockedQueue>) -> QueueLock {
        // The queue after the last is the first one that was asked for.
        let current = queues.len().saturating_sub(1);
        QueueLock { queues, current }
    }

    /// The domains whose queues are locked.
    pub fn domains(&self) -> impl Iterator<Item = &Domain> {
        self.queues.iter().filter_map(|queue| queue.name.domain.as_ref())
    }

    /// Whether there is no file at all in the queues.
    pub fn is_empty(&self) -> io::Result<bool> {
        for queue in &self.queues {
            if !queue.maildir.is_empty()? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// How many files there are in the queues, up to `limit`.
    pub fn count(&self, limit: usize) -> io::Result<usize> {
        let mut count = 0;
        for queue in &self.queues {
            count += queue.maildir.count(limit - count)?;
        }
        Ok(count)
    }

    /// The next message, the oldest of a queue first, also one that has arrived since the lock. `None`: this session has
    /// been offered every message that is there.
    pub fn next_message(&mut self) -> Option<QueuedMessage> {
        let mut refilled = 0;
        while refilled <= self.queues.len() {
            let queue = self.queues.get_mut(self.current)?;
            while let Some(entry) = queue.waiting.pop_front() {
                queue.offered.insert(entry.unique().to_owned());
                match QueuedMessage::open(&queue.maildir, &queue.name, entry) {
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

    /// One message of a queue, which is not offered again.
    pub fn open_message(&mut self, name: &QueueName, entry: Entry) -> io::Result<Option<QueuedMessage>> {
        let Some(queue) = self.queues.iter_mut().find(|queue| queue.name == *name) else { return Ok(None) };
        queue.offered.insert(entry.unique().to_owned());
        QueuedMessage::open(&queue.maildir, name, entry)
    }

    /// Offers a message again that [`QueueLock::next_message`] has offered, before all others.
    pub fn put_back(&mut self, message: QueuedMessage) {
        if let Some(queue) = self.queue_of(message.maildir()) {
            queue.offered.remove(message.unique());
            queue.waiting.push_front(message.into_entry());
        }
    }

    /// Acts on what became of a message; see [`QueuedMessage::settle`].
    pub fn settle(&mut self, message: QueuedMessage, result: &DeliveryResult) -> io::Result<()> {
        let (maildir, unique) = (message.maildir().clone(), message.unique().to_owned());
        if message.settle(result)?.offer_again
            && let Some(queue) = self.queue_of(&maildir)
        {
            queue.offered.remove(&unique);
        }
        Ok(())
    }

    fn queue_of(&mut self, maildir: &Maildir) -> Option<&mut LockedQueue> {
        self.queues.iter_mut().find(|queue| queue.maildir.path() == maildir.path())
    }

    /// Shows sessions that wait for these locks that this one makes progress.
    pub fn heartbeat(&self) {
        for queue in &self.queues {
            let _ = queue.lock.set_modified(SystemTime::now());
        }
    }

    /// Whether another session waits for one of these queues.
    pub fn takeover_requested(&self) -> bool {
        self.queues.iter().any(|queue| queue.maildir.path().join("odmr.wanted").exists())
    }
}

impl LockedQueue {
    pub(super) fn new(name: &QueueName, maildir: Maildir, lock: File) -> LockedQueue {
        LockedQueue { name: name.clone(), maildir, lock, waiting: VecDeque::new(), offered: HashSet::new() }
    }

    /// Lists what is due and was not offered yet.
    fn refill(&mut self) -> io::Result<()> {
        let mut entries = self.maildir.entries()?;
        let mut superseded = Vec::new();
        for pair in entries.windows(2).filter(|pair| pair[0].unique() == pair[1].unique()) {
            superseded.extend(self.superseded(&pair[0], &pair[1])?);
        }
        for entry in superseded {
            log::warn!("event=half-settled file={}", entry.name);
            self.maildir.remove(&entry)?;
            entries.retain(|other| *other != entry);
        }
        // A message that ended a session is offered last: it may end this one too, and the others must not wait for it.
        entries.sort_by_key(|entry| entry.has(IN_DOUBT));
        let now = SystemTime::now();
        let is_due =
            |entry: &Entry| !self.name.retries || retry::due(&self.maildir.file(entry)).is_none_or(|due| due <= now);
        let offered = &self.offered;
        let fresh = entries.into_iter().filter(|entry| !offered.contains(entry.unique()) && is_due(entry));
        self.waiting = fresh.collect();
        Ok(())
    }

    /// A crash in `settle` leaves a message twice, before and after: the file without the recipients that are settled
    /// is right, and the other one is returned. `None`: neither is that of the other.
    fn superseded(&self, one: &Entry, other: &Entry) -> io::Result<Option<Entry>> {
        let (Some(some), Some(others)) = (self.parse(one)?, self.parse(other)?) else {
            return Ok(None);
        };
        // Only a file that we have written can be the rest of another.
        let within = |few: &ParsedEnvelope, many: &ParsedEnvelope| {
            let (some, all) = (few.recipients(), many.recipients());
            few.ours && some.len() < all.len() && some.iter().all(|recipient| all.contains(recipient))
        };
        Ok(match (within(&some, &others), within(&others, &some)) {
            (true, _) => Some(other.clone()),
            (_, true) => Some(one.clone()),
            _ => None,
        })
    }

    /// `None`: the file is not a message for a recipient of this queue.
    fn parse(&self, entry: &Entry) -> io::Result<Option<ParsedEnvelope>> {
        let Ok(Some(file)) = message::open_file(&self.maildir.file(entry)) else {
            return Ok(None);
        };
        message::read_envelope(&file, entry, self.name.domain.as_ref())
    }
}

pub(super) fn log_unreadable(name: &QueueName, error: &io::Error) {
    log::error!("event=unreadable queue={name} error={:?}", error.to_string());
}
