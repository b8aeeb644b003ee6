//! The lock on the queues of one session, and the order in which their messages are offered.

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

/// How many directories a session keeps locked after their messages were offered. Each lock is a descriptor.
const MOST_LOCKED: usize = 64;

/// How many messages of one queue are offered before the next queue has its turn, if both are listed.
const TURN_MESSAGES: usize = 8;

/// The lock on the queues of one session. It is released when it is dropped.
pub struct QueueLock {
    pub(super) queues: Vec<LockedQueue>,
    /// The number of the queue whose messages are offered.
    current: usize,
    phase: Phase,
    /// The number of messages that were offered in this turn of the current queue.
    offered: usize,
    /// The number of queues that were looked at since the last message was found.
    looked: usize,
    /// See [`QueueLock::is_short`].
    short: bool,
    /// See [`QueueLock::is_unreadable`].
    unreadable: bool,
    /// The locks of the accounts. They are released last.
    accounts: Vec<LockFile>,
}

/// What [`QueueLock::next_step`] has found.
pub enum NextStep {
    Message(Box<QueuedMessage>),
    /// No message yet: the listing goes on with the next call.
    Listing,
    /// Every message has been offered, or [`QueueLock::is_short`].
    End,
}

impl QueueLock {
    pub(super) fn new(queues: Vec<LockedQueue>, accounts: Vec<LockFile>) -> QueueLock {
        // The first step goes on to the queue after the current one: the first one of `queues`.
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

    /// Counts this session as a call for the messages that it has skipped. A session that a limit has ended is not
    /// counted: the customer calls again at once, and the messages would be offered too soon.
    pub fn count_call(&mut self) {
        self.queues.iter_mut().for_each(LockedQueue::count_call);
    }

    /// The number of messages that this session skips because they have ended sessions.
    pub fn skipped(&self) -> usize {
        self.queues.iter().map(|queue| queue.listed.skipped).sum()
    }

    /// The number of files found so far that are not messages, or of which no recipient can be read.
    pub fn not_mail(&self) -> usize {
        self.queues.iter().map(|queue| queue.listed.not_mail).sum()
    }

    /// The domains whose queues are locked.
    pub fn domains(&self) -> impl Iterator<Item = &Domain> {
        self.queues.iter().filter_map(|queue| queue.name.domain.as_ref())
    }

    /// Whether the queues have no files, except those that are known not to be messages.
    ///
    /// # Errors
    /// A directory cannot be read.
    pub fn is_empty(&self) -> io::Result<bool> {
        Ok(self.count_if(1, |_| true)? == 0)
    }

    /// The number of files in the queues, except those that are known not to be messages and those that this session
    /// skips. Counting stops at `limit`.
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

    /// The next message, in the order that the module doc of [`queue`](super) describes. Messages that arrive after the
    /// lock are offered too. A file that cannot be read, or that another process has locked, is logged and left out.
    /// `None`: every message has been offered, or [`QueueLock::is_short`].
    pub fn next_message(&mut self) -> Option<QueuedMessage> {
        loop {
            match self.next_step() {
                NextStep::Message(message) => return Some(*message),
                NextStep::Listing => {}
                NextStep::End => return None,
            }
        }
    }

    /// Like [`QueueLock::next_message`], in short steps: a large directory, or many files that are not messages, take
    /// several, so that one queue does not keep the thread from the others.
    pub fn next_step(&mut self) -> NextStep {
        let step = self.try_next_step();
        self.short = step.is_err();
        if self.short {
            // Look again at all queues, so that the one that could not be listed is listed too.
            self.looked = 0;
        }
        step.unwrap_or(NextStep::End)
    }

    /// Whether the last step failed because this process has no descriptors or no memory left. When some are free
    /// again, the next call offers the message.
    pub fn is_short(&self) -> bool {
        self.short
    }

    /// Whether a directory could not be locked or listed, so that it may have mail that was not offered.
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
                    // The next pass finds its messages again, after the other queues were looked at.
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
                // The next phase begins with the next queue, so that no domain is always first.
                (self.phase, self.looked, self.offered) = (next, 0, 0);
                self.current = (self.current + 1) % queues;
            } else {
                // The next call looks for messages that have arrived meanwhile.
                (self.phase, self.looked) = (Phase::FIRST, 0);
                return Ok(NextStep::End);
            }
        }
        Ok(NextStep::Listing)
    }

    /// If the current queue has had its turn, goes on to the next one that has listed messages of this phase, so that a
    /// domain with much mail does not delay the others of the account. A queue that is not listed has its turn when the
    /// current one has none left. Queues with retries do not take turns.
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

    /// Whether more than [`MOST_LOCKED`] directories are locked.
    fn locks_many(&self) -> bool {
        let locked = self.queues.iter().filter(|queue| queue.lock.is_some());
        self.queues.len() > MOST_LOCKED && locked.take(MOST_LOCKED + 1).count() > MOST_LOCKED
    }

    /// Releases the lock on an idle directory if [`QueueLock::locks_many`].
    fn release_if_many(&mut self, at: usize) {
        if self.locks_many() {
            self.queues[at].release_if_idle();
        }
    }

    /// The number of messages that wait at least: those listed, and one for each queue that was not listed yet.
    pub fn waiting(&self) -> usize {
        self.queues.iter().map(|queue| queue.listed.waiting()).sum()
    }

    /// Lists shared queues by this index from now on, and records in it what is settled.
    pub(super) fn set_index(&mut self, index: &Arc<SharedIndex>) {
        self.queues.iter_mut().for_each(|queue| queue.index = queue.name.shared.then(|| index.clone()));
    }

    /// Locks one message of a shared directory, so that a following call can open, remove or change it. In other queues
    /// the session has the lock already. Returns whether the message is still there.
    ///
    /// # Errors
    /// `WouldBlock`: another session has the message; otherwise the system's.
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

    /// Closes a message that was offered, to save descriptors. This session does not offer it again, but
    /// [`QueueLock::open_message`] opens it.
    pub fn leave(&mut self, message: QueuedMessage) {
        if let Some(at) = self.queues.iter().position(|queue| queue.name == *message.queue()) {
            drop(message);
            self.queues[at].under_way = self.queues[at].under_way.saturating_sub(1);
            self.release_if_many(at);
        }
    }

    /// Opens one message of a queue; the session then does not offer it again. `None`: the message is gone, or the
    /// queue is not locked, or another session has locked it by now.
    ///
    /// # Errors
    /// The file cannot be read; `WouldBlock`: it is in a shared directory, and another session has it.
    pub fn open_message(&mut self, name: &QueueName, entry: Entry) -> io::Result<Option<QueuedMessage>> {
        let Some(queue) = self.queues.iter_mut().find(|queue| queue.name == *name) else { return Ok(None) };
        queue.listed.offered.insert(entry.unique());
        // `release_if_many` may have released the directory.
        match queue.lock_if_mail(None) {
            Ok(()) => {}
            Err(LockError::Busy(_)) => return Ok(None),
            Err(LockError::Failed(error)) => return Err(error),
        }
        queue.open(entry).inspect(|opened| queue.under_way += usize::from(opened.is_some()))
    }

    /// Removes a message with all its recipients, for an administrator. Returns whether it was still there.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub fn remove(&mut self, name: &QueueName, entry: Entry) -> io::Result<bool> {
        self.with_entry(name, entry, |maildir, entry| maildir.remove(entry))
    }

    /// Makes a message due at once; the next call does not skip it. Returns whether it is still there.
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

    /// Calls `act` with a file by its name; if a mail reader has moved it meanwhile, calls `act` again with the new
    /// name. Returns whether the file is still there.
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

    /// Whether [`QueueLock::next_message`] will offer a message. If there is one, a large directory is not read to its
    /// end.
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

    /// Puts a message back that was offered: it is the next one to be offered.
    pub fn put_back(&mut self, message: QueuedMessage) {
        if let Some(queue) = self.queues.iter_mut().find(|queue| queue.name == *message.queue()) {
            queue.under_way = queue.under_way.saturating_sub(1);
            queue.listed.put_back(message.into_entry());
        }
    }

    /// Records the result of an attempt, and removes the message if no recipient is open.
    ///
    /// # Errors
    /// The disk fails. No recipient is lost, but some may receive the message twice. This session does not offer it
    /// again.
    pub fn settle(&mut self, mut message: QueuedMessage, result: &DeliveryResult) -> io::Result<()> {
        let Some(at) = self.queues.iter().position(|queue| queue.name == *message.queue()) else { return Ok(()) };
        let queue = &mut self.queues[at];
        queue.under_way = queue.under_way.saturating_sub(1);
        let now = queue.ids.clock().now();
        let settled = message.settle(result, now).inspect_err(|_| message.record_failure(now));
        queue.record(&message);
        match settled {
            Ok(true) => queue.listed.offered.remove(message.unique()),
            // If the name would have been too long, the file has another unique part now.
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

    /// Shows to sessions that wait for these locks that this one makes progress, so that they do not ask for a
    /// takeover.
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
