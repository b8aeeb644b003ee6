//! The lock on some queues, and the messages that it offers.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use super::listed::{OPEN_WORK, Phase, QUEUE_WORK, STEP_WORK};
use super::lock_file::{LockError, LockFile};
use super::locked_queue::{LockedQueue, OPEN_ATTEMPTS, Shortage};
use super::message::{self, QueuedMessage};
use super::name::QueueName;
use super::shared::SharedIndex;
use crate::mail::address::Domain;
use crate::maildir::{AttemptRecord, Entry, Maildir, with_path};
use crate::smtp::status::DeliveryResult;

/// Directories that a session keeps locked when their messages are offered.
const MOST_LOCKED: usize = 64;

/// Messages of one queue that are offered before the next queue has its turn, if the messages of both are known.
const TURN_MESSAGES: usize = 8;

/// The lock on some queues, for one session.
pub struct QueueLock {
    pub(super) queues: Vec<LockedQueue>,
    /// The queue whose messages are offered.
    current: usize,
    phase: Phase,
    /// Messages of it that were offered in this turn of it.
    offered: usize,
    /// Queues that were looked at since the last message was found.
    looked: usize,
    /// As [`QueueLock::is_short`].
    short: bool,
    /// As [`QueueLock::is_unreadable`].
    unreadable: bool,
    /// The locks of the accounts. They are released last.
    accounts: Vec<LockFile>,
}

/// What [`QueueLock::next_step`] has found.
pub enum NextStep {
    Message(Box<QueuedMessage>),
    /// Nothing yet.
    Listing,
    /// Every message has been offered, or [`QueueLock::is_short`].
    End,
}

impl QueueLock {
    pub(super) fn new(queues: Vec<LockedQueue>, accounts: Vec<LockFile>) -> QueueLock {
        // The queue after the last is the first one that was asked for.
        let current = queues.len().saturating_sub(1);
        QueueLock {
            queues,
            current,
            phase: Phase::FIRST,
            offered: 0,
            looked: 0,
            short: false,
            unreadable: false,
            accounts,
        }
    }

    /// The session ends, and was a call of the customer: it counts for the messages that it has skipped. A session that only
    /// a limit has ended does not count, as the customer calls again at once.
    pub fn count_call(&mut self) {
        self.queues.iter_mut().for_each(LockedQueue::count_call);
    }

    /// How many messages this session skips because they have ended sessions.
    pub fn skipped(&self) -> usize {
        self.queues.iter().map(|queue| queue.listed.skipped).sum()
    }

    /// How many files this session has found that are no mail, or of which no recipient can be read.
    pub fn not_mail(&self) -> usize {
        self.queues.iter().map(|queue| queue.listed.not_mail).sum()
    }

    /// The domains whose queues are locked.
    pub fn domains(&self) -> impl Iterator<Item = &Domain> {
        self.queues.iter().filter_map(|queue| queue.name.domain.as_ref())
    }

    /// Whether there is no file at all in the queues, but for those that are known to be no mail.
    ///
    /// # Errors
    /// A directory cannot be read.
    pub fn is_empty(&self) -> io::Result<bool> {
        Ok(self.count_if(1, |_| true)? == 0)
    }

    /// How many files there are in the queues, up to `limit`, without those that are known to be no mail or are skipped by
    /// this session.
    ///
    /// # Errors
    /// A directory cannot be read.
    pub fn count(&self, limit: usize) -> io::Result<usize> {
        let now = self.queues.first().map(|queue| queue.ids.clock().now());
        self.count_if(limit, |entry| now.is_none_or(|now| !message::is_skipped(entry, now)))
    }

    fn count_if(&self, limit: usize, counts: impl Fn(&Entry) -> bool) -> io::Result<usize> {
        let mut count = 0;
        for LockedQueue { maildir, notes, .. } in &self.queues {
            count += maildir.count_if(limit - count, |entry| notes.is_mail(maildir, entry) && counts(entry))?;
        }
        Ok(count)
    }

    /// The next message, in the order of [`queue`](super); the queues take turns within each [`Phase`]. Messages that
    /// arrive after the lock are offered too. A file that cannot be read is logged and left out; so is one that another process
    /// has locked. `None`: every message has been offered, or [`QueueLock::is_short`].
    pub fn next_message(&mut self) -> Option<QueuedMessage> {
        loop {
            match self.next_step() {
                NextStep::Message(message) => return Some(*message),
                NextStep::Listing => {}
                NextStep::End => return None,
            }
        }
    }

    /// The same in steps: a large directory, or many files that are no mail, take several.
    pub fn next_step(&mut self) -> NextStep {
        let step = self.try_next_step();
        self.short = step.is_err();
        if self.short {
            // The queue that could not be listed is looked at again, after the others.
            self.looked = 0;
        }
        step.unwrap_or(NextStep::End)
    }

    /// Whether the last message that was asked for cannot be opened because this process has no descriptors left: it can when
    /// some are closed.
    pub fn is_short(&self) -> bool {
        self.short
    }

    /// Whether a directory could not be locked or listed: nobody knows what mail is in it.
    pub fn is_unreadable(&self) -> bool {
        self.unreadable
    }

    fn try_next_step(&mut self) -> Result<NextStep, Shortage> {
        let mut work = STEP_WORK;
        while work > 0 {
            self.take_turns();
            let queues = self.queues.len();
            let Some(queue) = self.queues.get_mut(self.current) else { return Ok(NextStep::End) };
            if let Some(entry) = queue.listed.pop(self.phase) {
                (self.looked, self.offered) = (0, self.offered + 1);
                work = work.saturating_sub(OPEN_WORK);
                match queue.open_listed(&entry) {
                    Ok(Some(message)) => {
                        queue.under_way += 1;
                        return Ok(NextStep::Message(Box::new(message)));
                    }
                    Ok(None) => {}
                    Err(error) => {
                        if let Err(shortage) = queue.report(&error) {
                            queue.listed.put_back(entry);
                            return Err(shortage);
                        }
                    }
                }
            } else if queue.listed.is_passing() {
                let listed = queue.go_on_listing(&mut work);
                self.unreadable |= listed.is_err();
                listed.or_else(|error| queue.report(&error))?;
            } else if self.looked < queues {
                queue.listed.trim(queues);
                if self.locks_many() {
                    // What waits in it is found again when the other queues have been looked at.
                    self.queues[self.current].listed.forget();
                    self.queues[self.current].release_if_idle();
                }
                (self.looked, self.offered) = (self.looked + 1, 0);
                self.current = (self.current + 1) % queues;
                let queue = &mut self.queues[self.current];
                let begun = queue.begin_pass_if_empty();
                self.unreadable |= begun.is_err();
                begun.or_else(|error| queue.report(&error))?;
                work = work.saturating_sub(QUEUE_WORK);
            } else if let Some(next) = self.queues.iter().filter_map(|queue| queue.listed.phase()).min() {
                // The last queue that had a message of this phase is not the first of the next one.
                (self.phase, self.looked, self.offered) = (next, 0, 0);
                self.current = (self.current + 1) % queues;
            } else {
                // The next call looks for what has arrived meanwhile.
                (self.phase, self.looked) = (Phase::FIRST, 0);
                return Ok(NextStep::End);
            }
        }
        Ok(NextStep::Listing)
    }

    /// Goes on to the next queue with a message of this phase, if this one has had its turn. So a domain with much mail does
    /// not delay the others of the account. Those that must be listed first have their turn when the messages of one are used
    /// up. In queues with retries, the order is that of one after the other.
    fn take_turns(&mut self) {
        let had_turn = |queue: &LockedQueue| self.offered >= TURN_MESSAGES && !queue.name.retries;
        let Some(queue) = self.queues.get(self.current).filter(|queue| had_turn(queue)) else { return };
        if queue.listed.is_passing() {
            return;
        }
        let queues = self.queues.len();
        let mut others = (1..queues).map(|step| (self.current + step) % queues);
        if let Some(next) = others.find(|at| self.queues[*at].listed.has(self.phase)) {
            self.queues[self.current].listed.trim(queues);
            self.current = next;
        }
        self.offered = 0;
    }

    /// Whether more directories are locked than a session of many queues keeps.
    fn locks_many(&self) -> bool {
        let locked = self.queues.iter().filter(|queue| queue.lock.is_some());
        self.queues.len() > MOST_LOCKED && locked.take(MOST_LOCKED + 1).count() > MOST_LOCKED
    }

    /// Releases the lock on a directory, if nothing of it waits or is under way and there are many others.
    fn release_if_many(&mut self, at: usize) {
        if self.locks_many() {
            self.queues[at].release_if_idle();
        }
    }

    /// How many messages wait at least, as far as is known: of a queue that was not listed yet, one.
    pub fn waiting(&self) -> usize {
        self.queues.iter().map(|queue| queue.listed.waiting()).sum()
    }

    /// What is settled from now on is recorded in the index of the shared directory, and messages are listed by it.
    pub(super) fn set_index(&mut self, index: &Arc<SharedIndex>) {
        self.queues.iter_mut().for_each(|queue| queue.index = queue.name.shared.then(|| index.clone()));
    }

    /// Locks one message of a shared directory, for one call about it that follows. Returns whether it is still there.
    ///
    /// # Errors
    /// `WouldBlock`: another session has it; the system's.
    pub fn lock_message(&mut self, name: &QueueName, entry: &Entry) -> io::Result<bool> {
        let Some(queue) = self.queues.iter_mut().find(|queue| queue.name == *name && name.shared) else {
            return Ok(true);
        };
        let mut entry = entry.clone();
        for _ in 0..OPEN_ATTEMPTS {
            match message::lock_file(&queue.maildir.file(&entry))? {
                Some(file) => {
                    queue.locked.insert(entry.unique().to_owned(), file);
                    return Ok(true);
                }
                None => match queue.maildir.find(&entry, None)? {
                    Some(moved) => entry = moved,
                    None => return Ok(false),
                },
            }
        }
        Ok(false)
    }

    /// Closes a message that was offered, and does not offer it again. [`QueueLock::open_message`] opens it once more.
    pub fn leave(&mut self, message: QueuedMessage) {
        if let Some(at) = self.queues.iter().position(|queue| queue.name == *message.queue()) {
            drop(message);
            self.queues[at].under_way = self.queues[at].under_way.saturating_sub(1);
            self.release_if_many(at);
        }
    }

    /// Opens one message of a queue, which is then not offered again. `None`: it is gone, or the queue is not locked, or another
    /// session has it by now.
    ///
    /// # Errors
    /// The file cannot be read; `WouldBlock`: it is in a shared directory, and another session has it.
    pub fn open_message(&mut self, name: &QueueName, entry: Entry) -> io::Result<Option<QueuedMessage>> {
        let Some(queue) = self.queues.iter_mut().find(|queue| queue.name == *name) else { return Ok(None) };
        queue.listed.offered.insert(entry.unique());
        // Its directory may have been released meanwhile.
        match queue.lock_if_mail(None) {
            Ok(()) => {}
            Err(LockError::Busy(_)) => return Ok(None),
            Err(LockError::Failed(error)) => return Err(error),
        }
        queue.open(entry).inspect(|opened| queue.under_way += usize::from(opened.is_some()))
    }

    /// Removes a message with all its recipients, by order of an administrator. Returns whether it was still there.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub fn remove(&mut self, name: &QueueName, entry: Entry) -> io::Result<bool> {
        self.with_entry(name, entry, |maildir, entry| maildir.remove(entry))
    }

    /// Makes a message due at once, and lets the next call not skip it. Returns whether it is still there.
    ///
    /// # Errors
    /// The file cannot be changed.
    pub fn make_due(&mut self, name: &QueueName, entry: Entry) -> io::Result<bool> {
        self.with_entry(name, entry, |maildir, entry| {
            let renamed = maildir.rename(entry, None, &AttemptRecord { ended: None, ..entry.record() })?;
            if name.retries {
                let path = maildir.file(&renamed);
                File::open(&path)
                    .and_then(|file| file.set_modified(SystemTime::now()))
                    .map_err(|e| with_path(&path, e))?;
            }
            Ok(())
        })
    }

    /// Does something with a file by its name, and does it again by the new one if a mail reader has moved the file
    /// meanwhile. Returns whether it is still there.
    fn with_entry(
        &self, name: &QueueName, mut entry: Entry, act: impl Fn(&Maildir, &Entry) -> io::Result<()>,
    ) -> io::Result<bool> {
        let Some(queue) = self.queues.iter().find(|queue| queue.name == *name) else { return Ok(false) };
        let is_locked = !name.shared || queue.locked.contains_key(entry.unique());
        for _ in 0..OPEN_ATTEMPTS {
            let lock = || if is_locked { Ok(None) } else { message::lock_file(&queue.maildir.file(&entry)) };
            match lock().and_then(|_lock| act(&queue.maildir, &entry)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => match queue.maildir.find(&entry, None)? {
                    Some(moved) => entry = moved,
                    None => return Ok(false),
                },
                done => return done.map(|()| true),
            }
        }
        Ok(false)
    }

    /// Whether [`QueueLock::next_message`] will offer a message. If there is one, a large directory is not read to its end.
    pub fn has_next(&mut self) -> bool {
        let mut looked = false;
        loop {
            match self.next_step() {
                NextStep::Message(message) => {
                    self.put_back(*message);
                    return true;
                }
                NextStep::End => return false,
                NextStep::Listing => {
                    if !std::mem::replace(&mut looked, true) && self.queues.iter().any(LockedQueue::has_any) {
                        return true;
                    }
                }
            }
        }
    }

    /// Takes back a message that was offered, to be offered next.
    pub fn put_back(&mut self, message: QueuedMessage) {
        if let Some(queue) = self.queue_of(message.queue()) {
            queue.under_way = queue.under_way.saturating_sub(1);
            queue.listed.put_back(message.into_entry());
        }
    }

    /// Records what became of the recipients of a message, and removes the message if no recipient is left.
    ///
    /// # Errors
    /// The disk fails. No recipient is lost, but some may receive the message twice. This session does not offer it again.
    pub fn settle(&mut self, mut message: QueuedMessage, result: &DeliveryResult) -> io::Result<()> {
        let Some(at) = self.queues.iter().position(|queue| queue.name == *message.queue()) else { return Ok(()) };
        let queue = &mut self.queues[at];
        queue.under_way = queue.under_way.saturating_sub(1);
        let now = queue.ids.clock().now();
        let settled = message.settle(result, now).inspect_err(|_| message.record_failure(now));
        queue.record(&message);
        match settled {
            Ok(true) => queue.listed.offered.remove(message.unique()),
            // A name that was too long may have changed.
            _ => drop(queue.listed.offered.insert(message.unique())),
        }
        self.release_if_many(at);
        settled?;
        if let Some(ended) = message.entry().record().ended.filter(|_| result.ended_session()) {
            let (id, sessions, skip) = (&message.id, ended.sessions, ended.skip);
            let name = message.queue();
            log::warn!("event=session-ended-by-message queue={name} id={id} sessions={sessions} skip={skip}");
        }
        Ok(())
    }

    fn queue_of(&mut self, name: &QueueName) -> Option<&mut LockedQueue> {
        self.queues.iter_mut().find(|queue| queue.name == *name)
    }

    /// Shows sessions that wait for these locks that this session makes progress.
    pub fn heartbeat(&self) {
        self.lock_files().for_each(LockFile::heartbeat);
    }

    /// Whether another session waits for one of these queues.
    pub fn takeover_requested(&self) -> bool {
        self.lock_files().any(LockFile::takeover_requested)
    }

    fn lock_files(&self) -> impl Iterator<Item = &LockFile> {
        self.accounts.iter().chain(self.queues.iter().filter_map(|queue| queue.lock.as_ref()))
    }
}
