//! The lock on some queues, and the messages that it offers.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use super::due;
use super::envelope::ParsedEnvelope;
use super::message::{self, Opened, QueuedMessage};
use super::name::QueueName;
use super::refused::RefusedLimits;
use super::retry;
use super::shared::{self, SharedIndex};
use crate::ids::Ids;
use crate::mail::address::Domain;
use crate::maildir::{AttemptRecord, Entry, FileId, IN_DOUBT, Maildir, log_sweep_failed, with_path};
use crate::net::trace::quoted;
use crate::smtp::status::DeliveryResult;

/// The file of a queue that its session locks.
pub(super) const QUEUE_LOCK_FILE: &str = "odmr.lock";

/// The file beside the lock that asks its holder to release it.
pub(super) const TAKEOVER_FILE: &str = "odmr.wanted";

/// How often a message is looked for that a mail reader moves again and again.
const OPEN_ATTEMPTS: usize = 5;

/// The lock on some queues, for one session.
pub struct QueueLock {
    pub(super) queues: Vec<LockedQueue>,
    current: usize,
}

pub(super) struct LockedQueue {
    pub(super) name: QueueName,
    pub(super) maildir: Maildir,
    /// `None`: its messages are in a shared directory, and each is locked for itself.
    pub(super) lock: Option<File>,
    pub(super) ids: Ids,
    pub(super) notes: Arc<Notes>,
    pub(super) refused: Arc<RefusedLimits>,
    /// The index of the shared directory.
    pub(super) index: Option<Arc<SharedIndex>>,
    /// Messages of it that are locked already, by their unique names.
    pub(super) locked: HashMap<OsString, File>,
    pub(super) listed: Listed,
}

/// What a session has listed of a queue.
#[derive(Default)]
pub(super) struct Listed {
    waiting: VecDeque<Entry>,
    /// With retries, messages without a sender: mail of customers does not wait for the DSNs that strangers cause.
    dsns: VecDeque<Entry>,
    /// Messages that may end this session too: they are offered last, so that the others need not wait for them.
    last: VecDeque<Entry>,
    /// The unique names of messages that this session has offered and that are still there: each is offered once. The
    /// set is for one queue, because other agents may give files in two Maildirs the same name.
    offered: HashSet<OsString>,
    /// The message that was last not found where it was listed.
    missed: Option<OsString>,
    /// The queue was listed once.
    once: bool,
    /// How many messages this session skips.
    skipped: usize,
    /// Those for which it was not counted yet.
    uncounted: Vec<Entry>,
    /// How many files have no recipient that can be sent to.
    not_mail: usize,
}

/// Files that were named in the log: each is named once by a process, and counted apart if it is no mail.
#[derive(Default)]
pub(super) struct Notes(Mutex<HashMap<PathBuf, Note>>);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Note {
    /// No recipient can be sent to.
    NotMail,
    /// Some recipients cannot be read.
    RecipientsLeft,
}

/// Files that are remembered; then all are forgotten, and named once more.
const NOTES_LIMIT: usize = 10_000;

impl Notes {
    fn lock(&self) -> MutexGuard<'_, HashMap<PathBuf, Note>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns whether that is new.
    fn add(&self, maildir: &Maildir, entry: &Entry, note: Note) -> bool {
        let mut notes = self.lock();
        if notes.len() >= NOTES_LIMIT {
            notes.clear();
        }
        notes.insert(maildir.path().join(entry.unique()), note) != Some(note)
    }

    /// The file is a message by now.
    fn remove(&self, maildir: &Maildir, entry: &Entry) {
        let mut notes = self.lock();
        if !notes.is_empty() {
            notes.remove(&maildir.path().join(entry.unique()));
        }
    }

    pub(super) fn is_mail(&self, maildir: &Maildir, entry: &Entry) -> bool {
        let notes = self.lock();
        notes.is_empty() || notes.get(&maildir.path().join(entry.unique())) != Some(&Note::NotMail)
    }
}

impl QueueLock {
    pub(super) fn new(queues: Vec<LockedQueue>) -> QueueLock {
        // The queue after the last is the first one that was asked for.
        let current = queues.len().saturating_sub(1);
        QueueLock { queues, current }
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
        self.count_if(limit, |entry| now.is_none_or(|now| !message::is_skipped(&entry.record(), now)))
    }

    fn count_if(&self, limit: usize, counts: impl Fn(&Entry) -> bool) -> io::Result<usize> {
        let mut count = 0;
        for LockedQueue { maildir, notes, .. } in &self.queues {
            count += maildir.count_if(limit - count, |entry| notes.is_mail(maildir, entry) && counts(entry))?;
        }
        Ok(count)
    }

    /// The next message: the queues take turns, the oldest message of a queue comes first. Those that have ended sessions or
    /// are in doubt come last; with retries, those without a sender (DSNs) come after the others of all queues. Messages that
    /// arrive after the lock are offered too. A file that cannot be read is logged and left out; so is one that another process
    /// has locked. `None`: every message has been offered.
    pub fn next_message(&mut self) -> Option<QueuedMessage> {
        self.next_listed(false).or_else(|| self.next_listed(true))
    }

    /// The next message that is listed. `anew`: queues of which all messages were offered are listed once more.
    fn next_listed(&mut self, anew: bool) -> Option<QueuedMessage> {
        let found = self.next_of(|listed| &mut listed.waiting, anew);
        let found = found.or_else(|| self.next_of(|listed| &mut listed.dsns, false));
        found.or_else(|| self.next_of(|listed| &mut listed.last, false))
    }

    /// The next message of these lists.
    fn next_of(&mut self, list: impl Fn(&mut Listed) -> &mut VecDeque<Entry>, anew: bool) -> Option<QueuedMessage> {
        let mut refilled = 0;
        while refilled <= self.queues.len() {
            let queue = self.queues.get_mut(self.current)?;
            while let Some(entry) = list(&mut queue.listed).pop_front() {
                queue.listed.offered.insert(entry.unique().to_owned());
                match queue.open_listed(entry) {
                    Ok(Some(message)) => return Some(message),
                    Ok(None) => {}
                    Err(error) => log_unreadable(&queue.name, &error),
                }
            }
            self.current = (self.current + 1) % self.queues.len();
            let queue = &mut self.queues[self.current];
            if (anew || !queue.listed.once)
                && let Err(error) = queue.refill()
            {
                log_unreadable(&queue.name, &error);
            }
            refilled += 1;
        }
        None
    }

    /// How many messages wait, as far as is known: of a queue that was not listed yet, one.
    pub fn waiting(&self) -> usize {
        let waiting = |listed: &Listed| if listed.once { listed.remaining() } else { 1 };
        self.queues.iter().map(|queue| waiting(&queue.listed)).sum()
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

    /// Opens one message of a queue, which is then not offered again. `None`: it is gone, or the queue is not locked.
    ///
    /// # Errors
    /// The file cannot be read; `WouldBlock`: it is in a shared directory, and another session has it.
    pub fn open_message(&mut self, name: &QueueName, entry: Entry) -> io::Result<Option<QueuedMessage>> {
        let Some(queue) = self.queues.iter_mut().find(|queue| queue.name == *name) else { return Ok(None) };
        queue.listed.offered.insert(entry.unique().to_owned());
        queue.open(entry)
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

    /// Whether [`QueueLock::next_message`] will offer a message.
    pub fn has_next(&mut self) -> bool {
        let Some(message) = self.next_message() else { return false };
        self.put_back(message);
        true
    }

    /// Takes back a message that was offered, to be offered next.
    pub fn put_back(&mut self, message: QueuedMessage) {
        if let Some(queue) = self.queue_of(message.queue()) {
            queue.listed.offered.remove(message.unique());
            queue.listed.waiting.push_front(message.into_entry());
        }
    }

    /// Records what became of the recipients of a message, and removes the message if no recipient is left.
    ///
    /// # Errors
    /// The disk fails. No recipient is lost, but some may receive the message twice. This session does not offer it again.
    pub fn settle(&mut self, mut message: QueuedMessage, result: &DeliveryResult) -> io::Result<()> {
        let Some(queue) = self.queue_of(message.queue()) else { return Ok(()) };
        let now = queue.ids.clock().now();
        let settled = message.settle(result, now).inspect_err(|_| message.record_failure(now));
        queue.record(&message);
        match settled {
            Ok(true) => drop(queue.listed.offered.remove(message.unique())),
            _ => queue.listed.add_offered(message.unique()),
        }
        settled?;
        if let Some(ended) = message.entry().record().ended.filter(|_| result.ended_session()) {
            let (id, sessions, skip) = (&message.id, ended.sessions, ended.skip);
            log::warn!("event=session-ended-by-message queue={} id={id} sessions={sessions} skip={skip}", queue.name);
        }
        Ok(())
    }

    fn queue_of(&mut self, name: &QueueName) -> Option<&mut LockedQueue> {
        self.queues.iter_mut().find(|queue| queue.name == *name)
    }

    /// Shows sessions that wait for these locks that this session makes progress.
    pub fn heartbeat(&self) {
        for lock in self.queues.iter().filter_map(|queue| queue.lock.as_ref()) {
            let _ = lock.set_modified(SystemTime::now());
        }
    }

    /// Whether another session waits for one of these queues.
    pub fn takeover_requested(&self) -> bool {
        let locked = self.queues.iter().filter(|queue| queue.lock.is_some());
        locked.into_iter().any(|queue| queue.name.path.join(TAKEOVER_FILE).exists())
    }
}

impl Listed {
    /// Records that this session has offered the message: a name that was too long may have changed.
    fn add_offered(&mut self, unique: &OsStr) {
        if !self.offered.contains(unique) {
            self.offered.insert(unique.to_owned());
        }
    }

    /// How many messages are listed and not offered yet.
    fn remaining(&self) -> usize {
        self.waiting.len() + self.dsns.len() + self.last.len()
    }
}

impl Drop for LockedQueue {
    fn drop(&mut self) {
        // A child process has a copy of the descriptor between fork and exec: the next session must not find the queue locked.
        let _ = self.lock.as_ref().map(File::unlock);
    }
}

impl LockedQueue {
    /// The messages of the queue.
    fn entries(&self) -> io::Result<Vec<Entry>> {
        match (&self.index, &self.name.domain) {
            (Some(index), Some(domain)) => Ok(index.entries(domain)),
            (None, Some(domain)) if self.name.shared => {
                let mut entries = self.maildir.entries()?;
                entries
                    .retain(|entry| shared::domain_of(&self.name, entry).is_ok_and(|of| of.as_ref() == Some(domain)));
                Ok(entries)
            }
            _ => self.maildir.entries(),
        }
    }

    /// Records in the index where a message is now. If that is `.refused`, keeps that within its limits.
    fn record(&self, message: &QueuedMessage) {
        if let Some(octets) = message.set_aside()
            && let Err(error) = self.refused.added(&self.name, octets)
        {
            log_sweep_failed(&self.name, &error);
        }
        if let (Some(index), Some(domain)) = (&self.index, &self.name.domain) {
            index.replace(domain, message.unique(), message.is_there().then(|| message.entry()));
        }
    }

    /// Lists the directories anew: another process has changed them.
    fn relist(&mut self) -> io::Result<()> {
        (self.listed.waiting, self.listed.dsns, self.listed.last) = Default::default();
        self.index.as_ref().map_or(Ok(()), |index| index.read(&self.name))?;
        self.refill()
    }

    /// Opens a message that was listed just now.
    fn open(&mut self, mut entry: Entry) -> io::Result<Option<QueuedMessage>> {
        for _ in 0..OPEN_ATTEMPTS {
            match self.open_file(&entry)? {
                Opened::Gone => match self.maildir.find(&entry, None)? {
                    Some(moved) => entry = moved,
                    None => return Ok(None),
                },
                Opened::Busy => return Err(message::is_busy(&self.maildir.file(&entry))),
                opened => return self.use_opened(&entry, opened),
            }
        }
        Ok(None)
    }

    /// Opens the next message of the list. If a mail reader has moved it, it may have moved all of them: the directories are
    /// listed once more. A message that is moved again meanwhile is looked for alone.
    fn open_listed(&mut self, entry: Entry) -> io::Result<Option<QueuedMessage>> {
        let opened = self.open_file(&entry)?;
        if !matches!(opened, Opened::Gone) {
            return self.use_opened(&entry, opened);
        }
        if self.listed.missed.as_deref() == Some(entry.unique()) {
            return match self.open(entry) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                opened => opened,
            };
        }
        self.listed.offered.remove(entry.unique());
        self.listed.missed = Some(entry.unique().to_owned());
        self.relist()?;
        Ok(None)
    }

    fn open_file(&mut self, entry: &Entry) -> io::Result<Opened> {
        let locked = self.locked.remove(entry.unique());
        QueuedMessage::open(&self.name, entry.clone(), locked, self.ids.clock().now())
    }

    fn use_opened(&mut self, entry: &Entry, opened: Opened) -> io::Result<Option<QueuedMessage>> {
        match opened {
            Opened::Gone | Opened::Busy => Ok(None),
            Opened::NotMail(reason) => {
                self.note(entry, Note::NotMail, &reason);
                Ok(None)
            }
            Opened::Message(message) => self.check(*message),
        }
    }

    /// If the message's time of arrival is impossible, records that it was first seen now. If a crash came between the
    /// settlement of its last recipient and its removal, removes it.
    fn check(&mut self, mut message: QueuedMessage) -> io::Result<Option<QueuedMessage>> {
        let (no_recipients, unread) = (message.envelope.recipients.is_empty(), message.unread());
        if !unread.is_empty() {
            let note = if no_recipients { Note::NotMail } else { Note::RecipientsLeft };
            self.note(message.entry(), note, &unread);
        } else {
            self.notes.remove(&self.maildir, message.entry());
        }
        if no_recipients {
            if unread.is_empty() {
                log::warn!("event=half-settled file={}", quoted(message.entry().name.display()));
                message.finish()?;
                self.record(&message);
            }
            return Ok(None);
        }
        message.ensure_markable(&self.ids.file_name("copy"))?;
        message.ensure_arrival();
        self.listed.add_offered(message.unique());
        Ok(Some(message))
    }

    /// Names a file in the log, once, and counts it if it is no mail.
    fn note(&mut self, entry: &Entry, note: Note, reason: &str) {
        self.listed.not_mail += usize::from(note == Note::NotMail);
        if self.notes.add(&self.maildir, entry, note) {
            let (queue, file) = (&self.name, self.maildir.file(entry));
            let (file, reason) = (quoted(file.display()), quoted(reason));
            match note {
                Note::NotMail => log::warn!("event=not-mail queue={queue} file={file} reason={reason}"),
                Note::RecipientsLeft => log::warn!("event=recipients-left queue={queue} file={file} error={reason}"),
            }
        }
    }

    /// Lists the messages that are due and that this session has not offered yet, if all that were listed are offered.
    fn refill(&mut self) -> io::Result<()> {
        if self.listed.remaining() > 0 {
            return Ok(());
        }
        let mut entries = self.entries()?;
        self.listed.once = true;
        let left_out = self.left_out(&entries);
        entries.retain(|entry| !left_out.contains(entry));
        let (now, time) = (self.ids.clock().now(), SystemTime::now());
        let mut last = Vec::new();
        for entry in entries {
            let is_due = || !self.name.retries || retry::due(&self.maildir.file(&entry)).is_none_or(|due| due <= time);
            if self.listed.offered.contains(entry.unique()) || !is_due() {
                continue;
            }
            let record = entry.record();
            if message::is_skipped(&record, now) {
                self.skip(entry);
            } else if record.ended.is_some() || entry.has(IN_DOUBT) {
                last.push((record.ended.map_or(0, |ended| ended.sessions), entry));
            } else if self.name.retries && due::has_null_sender(&self.maildir, &entry) {
                self.listed.dsns.push_back(entry);
            } else {
                self.listed.waiting.push_back(entry);
            }
        }
        last.sort_by_key(|(sessions, _)| *sessions);
        self.listed.last.extend(last.into_iter().map(|(_, entry)| entry));
        Ok(())
    }

    /// Leaves a message out of this session because it has ended others.
    fn skip(&mut self, entry: Entry) {
        self.listed.offered.insert(entry.unique().to_owned());
        self.listed.skipped += 1;
        if let Some(ended) = entry.record().ended {
            let (queue, file, sessions) = (&self.name, quoted(entry.name.display()), ended.sessions);
            log::info!("event=skipped queue={queue} file={file} sessions={sessions} skip={}", ended.skip - 1);
            self.listed.uncounted.push(entry);
        }
    }

    fn count_call(&mut self) {
        for entry in std::mem::take(&mut self.listed.uncounted) {
            let mut record = entry.record();
            if let Some(ended) = &mut record.ended {
                ended.skip = ended.skip.saturating_sub(1);
            }
            match self.maildir.rename(&entry, None, &record) {
                Ok(renamed) => self.listed.add_offered(renamed.unique()),
                // The time since it ended the last session bounds the calls too.
                Err(error) => log::warn!("event=skip-not-recorded queue={} error={}", self.name, quoted(error)),
            }
        }
    }

    /// The entries among these that are not offered, because another entry is the same message.
    fn left_out(&self, entries: &[Entry]) -> HashSet<Entry> {
        let mut left_out = HashSet::new();
        for pair in entries.windows(2).filter(|pair| pair[0].unique() == pair[1].unique()) {
            let id = |entry: &Entry| FileId::of_path(&self.maildir.file(entry)).ok();
            match (id(&pair[0]), id(&pair[1])) {
                // A mail reader has moved it while the directories were read.
                (None, _) => drop(left_out.insert(pair[0].clone())),
                (_, None) => drop(left_out.insert(pair[1].clone())),
                // It is moving it, or was killed between link and unlink.
                (Some(one), Some(other)) if one == other => drop(left_out.insert(pair[0].clone())),
                _ => match self.remove_superseded(&pair[0], &pair[1]) {
                    Ok(removed) => left_out.extend(removed.cloned()),
                    // If these may be the two files of one message, either would be sent to recipients that have it already.
                    Err(error) => {
                        log_unreadable(&self.name, &error);
                        left_out.extend(pair.iter().cloned());
                    }
                },
            }
        }
        left_out
    }

    /// A crash of an earlier version in `settle` has left a message twice, as it was before and after. Removes and returns the
    /// file from before, which has recipients that are settled; `None`: neither file is the rest of the other.
    ///
    /// # Errors
    /// A file cannot be read or removed.
    fn remove_superseded<'a>(&self, one: &'a Entry, other: &'a Entry) -> io::Result<Option<&'a Entry>> {
        let (Some(first), Some(second)) = (self.parse(one)?, self.parse(other)?) else { return Ok(None) };
        // Only a file that we have written can be the rest of another.
        let is_rest = |few: &ParsedEnvelope, many: &ParsedEnvelope| {
            let (some, all) = (few.recipients(), many.recipients());
            few.ours
                && few.unread == many.unread
                && some.len() < all.len()
                && some.iter().all(|recipient| all.contains(recipient))
        };
        let before = if is_rest(&first, &second) { Some(other) } else { is_rest(&second, &first).then_some(one) };
        if let Some(before) = before {
            log::warn!("event=half-settled file={}", quoted(before.name.display()));
            self.maildir.remove(before)?;
        }
        Ok(before)
    }

    /// The envelope of a file; `None`: it is not a message for a recipient of this queue, or it cannot be opened.
    fn parse(&self, entry: &Entry) -> io::Result<Option<ParsedEnvelope>> {
        let Ok(Ok(file)) = message::open_file(&self.maildir.file(entry)) else { return Ok(None) };
        message::read_envelope(&file, entry, &self.name).map(Result::ok)
    }
}

pub(super) fn log_unreadable(name: &QueueName, error: &io::Error) {
    log::error!("event=unreadable queue={name} error={}", quoted(error));
}
