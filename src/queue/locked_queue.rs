//! One locked queue: which of its messages are offered, and how they are opened.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use super::due;
use super::envelope::ParsedEnvelope;
use super::listed::{Listed, Pass, QueueOrder, RankedEntry, TIME_WORK};
use super::lock_file::{LockError, LockFile, QUEUE_LOCK_FILE};
use super::message::{self, MessageLock, Opened, QueuedMessage};
use super::name::QueueName;
use super::refused::RefusedLimits;
use super::retry;
use super::shared::{self, SharedIndex};
use crate::ids::Ids;
use crate::maildir::{Entry, FileId, Maildir, log_sweep_failed};
use crate::net::trace::quoted;

/// How often a message is looked for that a mail reader moves again and again.
pub(super) const OPEN_ATTEMPTS: usize = 5;

/// How often a queue is made again that other processes remove while it is locked.
const LOCK_ATTEMPTS: usize = 100;

pub(super) struct LockedQueue {
    pub(super) name: QueueName,
    pub(super) maildir: Maildir,
    /// The lock on the directory; `None`: there was no mail in it yet, or it is shared, and each message is locked for itself.
    pub(super) lock: Option<LockFile>,
    pub(super) ids: Ids,
    pub(super) notes: Arc<Notes>,
    pub(super) refused: Arc<RefusedLimits>,
    /// The index of the shared directory.
    pub(super) index: Option<Arc<SharedIndex>>,
    /// Messages of it that are locked already, by their unique names.
    pub(super) locked: HashMap<OsString, MessageLock>,
    pub(super) listed: Listed,
    /// Messages that were offered and are neither settled nor put back.
    pub(super) under_way: usize,
}

/// There are no descriptors, or there is no memory: that says nothing about the message.
pub(super) struct Shortage;

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

impl Drop for LockedQueue {
    fn drop(&mut self) {
        self.release();
    }
}

impl LockedQueue {
    /// Releases the lock on the directory. A directory of an account without mail has no lock.
    fn release(&mut self) {
        if let Some(lock) = self.lock.take()
            && self.name.account_lock.is_some()
            && self.maildir.is_empty().unwrap_or(false)
        {
            lock.remove();
        }
    }

    /// Releases the lock on a directory of an account until there is a pass over it again, if no message of it waits or is under
    /// way: an account may have more domains with mail than this process may have descriptors.
    pub(super) fn release_if_idle(&mut self) {
        let is_idle = self.under_way == 0 && self.listed.is_empty() && !self.listed.is_passing();
        if self.name.account_lock.is_some() && is_idle {
            self.release();
        }
    }

    /// Makes and locks the directory.
    ///
    /// # Errors
    /// See [`LockError`].
    pub(super) fn lock_directory(&mut self, takeover: Option<Duration>) -> Result<(), LockError> {
        for attempt in 0.. {
            self.maildir.create().map_err(LockError::Failed)?;
            match LockFile::lock(&self.name.path.join(QUEUE_LOCK_FILE), takeover, &self.name) {
                // It was removed just now.
                Err(LockError::Failed(error)) if error.kind() == io::ErrorKind::NotFound && attempt < LOCK_ATTEMPTS => {
                }
                locked => {
                    self.lock = Some(locked?);
                    break;
                }
            }
        }
        self.sweep();
        Ok(())
    }

    /// Removes files of writers that died. A failure is logged.
    pub(super) fn sweep(&self) {
        message::sweep(&self.maildir).unwrap_or_else(|error| log_sweep_failed(&self.name, &error));
    }

    /// Locks the directory, unless it is locked, shared, or has no mail. Another session may have it: one of another account, which has
    /// begun before the domain became this account's, or one of an earlier version.
    ///
    /// # Errors
    /// See [`LockError`].
    pub(super) fn lock_if_mail(&mut self, takeover: Option<Duration>) -> Result<(), LockError> {
        match self.has_lock() || self.maildir.is_empty().map_err(LockError::Failed)? {
            true => Ok(()),
            false => self.lock_directory(takeover),
        }
    }

    /// The messages of the queue, in no order.
    fn files(&self) -> Box<dyn Iterator<Item = io::Result<Entry>> + Send> {
        match (&self.index, &self.name.domain) {
            (Some(index), Some(domain)) => Box::new(index.entries(domain).into_iter().map(Ok)),
            (None, Some(domain)) if self.name.shared => {
                let (name, domain) = (self.name.clone(), domain.clone());
                let is_ours = move |entry: &Entry| {
                    shared::domain_of(&name, entry).is_ok_and(|found| found.as_ref() == Some(&domain))
                };
                Box::new(self.maildir.list().filter(move |entry| entry.as_ref().map_or(true, &is_ours)))
            }
            _ => Box::new(self.maildir.list()),
        }
    }

    /// Records in the index where a message is now. If that is `.refused`, keeps that within its limits.
    pub(super) fn record(&self, message: &QueuedMessage) {
        if let Some(octets) = message.set_aside()
            && let Err(error) = self.refused.added(&self.name, octets)
        {
            log_sweep_failed(&self.name, &error);
        }
        if let (Some(index), Some(domain)) = (&self.index, &self.name.domain) {
            index.replace(domain, message.unique(), message.is_there().then(|| message.entry()));
        }
    }

    /// Opens a message that was listed just now.
    pub(super) fn open(&mut self, mut entry: Entry) -> io::Result<Option<QueuedMessage>> {
        for _ in 0..OPEN_ATTEMPTS {
            let locked = self.locked.remove(entry.unique());
            match self.open_file(&entry, locked)? {
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

    /// Opens the next message of the list. If a mail reader has moved it, the next pass finds it again; a message that is
    /// moved once more meanwhile is looked for alone.
    pub(super) fn open_listed(&mut self, entry: &Entry) -> io::Result<Option<QueuedMessage>> {
        self.listed.offered.insert(entry.unique());
        match self.open_file(entry, None)? {
            Opened::Gone if self.listed.missed.insert(entry.unique()) => {
                self.listed.offered.remove(entry.unique());
                if let Some(index) = &self.index {
                    // Another process has renamed it, and may have renamed all of them.
                    index.read(&self.name)?;
                    self.listed.forget();
                }
                Ok(None)
            }
            Opened::Gone => match self.open(entry.clone()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                opened => opened,
            },
            opened => self.use_opened(entry, opened),
        }
    }

    /// `locked`: the file, if it is in a shared directory and was locked before.
    fn open_file(&self, entry: &Entry, locked: Option<MessageLock>) -> io::Result<Opened> {
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
        self.listed.offered.insert(message.unique());
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
}

impl LockedQueue {
    /// Logs an error of a file or a directory.
    ///
    /// # Errors
    /// It is a shortage.
    pub(super) fn report(&self, error: &io::Error) -> Result<(), Shortage> {
        log_unreadable(&self.name, error);
        if error.kind() == io::ErrorKind::OutOfMemory { Err(Shortage) } else { Ok(()) }
    }

    /// Begins a pass, if all messages that the last one has found are offered.
    ///
    /// # Errors
    /// The directory cannot be locked.
    pub(super) fn begin_pass_if_empty(&mut self) -> io::Result<()> {
        if !self.listed.is_empty() {
            return Ok(());
        }
        self.listed.forgotten = None;
        match self.lock_if_mail(None) {
            Ok(()) => {}
            // Another session offers it.
            Err(LockError::Busy(_)) => return Ok(()),
            Err(LockError::Failed(error)) => return Err(error),
        }
        if self.has_lock() {
            let order = match self.name.retries {
                true => QueueOrder::Retries,
                false => QueueOrder::Held { now: self.ids.clock().now() },
            };
            self.listed.pass = Some(Pass::new(self.files(), order));
        }
        Ok(())
    }

    /// Whether its messages may be offered.
    fn has_lock(&self) -> bool {
        self.lock.is_some() || self.name.shared
    }

    /// Whether a message is due at this time.
    fn is_due(&self, entry: &Entry, time: SystemTime) -> bool {
        !self.name.retries || retry::due(&self.maildir.file(entry)).is_none_or(|due| due <= time)
    }

    /// Whether one of the files, whichever comes first, is a message that this session may offer.
    pub(super) fn has_any(&self) -> bool {
        if !self.has_lock() {
            return false;
        }
        let (now, time) = (self.ids.clock().now(), SystemTime::now());
        let may_be_offered = |entry: &Entry| {
            !self.listed.offered.contains(entry.unique())
                && !message::is_skipped(entry, now)
                && self.notes.is_mail(&self.maildir, entry)
                && self.is_due(entry, time)
        };
        let is_message = |entry: &Entry| match self.open_file(entry, None) {
            Ok(Opened::Message(message)) => !message.envelope.recipients.is_empty(),
            _ => false,
        };
        self.files().filter_map(Result::ok).any(|entry| may_be_offered(&entry) && is_message(&entry))
    }

    /// Goes on with the pass. `work`: how many files may be read; reduced by those that were.
    ///
    /// # Errors
    /// A directory cannot be read; the pass has ended without a message.
    pub(super) fn go_on_listing(&mut self, work: &mut usize) -> io::Result<()> {
        let Some(mut pass) = self.listed.pass.take() else { return Ok(()) };
        let (now, time) = (self.ids.clock().now(), SystemTime::now());
        while *work > 0 {
            *work -= 1;
            let Some(entry) = pass.files.next() else {
                self.finish_pass(pass);
                return Ok(());
            };
            let entry = entry?;
            if self.listed.offered.contains(entry.unique()) {
                continue;
            }
            *work = work.saturating_sub(if self.name.retries { TIME_WORK } else { 0 });
            if !self.is_due(&entry, time) {
                continue;
            }
            match message::is_skipped(&entry, now) {
                true => self.skip(entry),
                false => {
                    let is_dsn = self.name.retries && due::has_null_sender(&self.maildir, &entry);
                    pass.add(entry, is_dsn);
                }
            }
        }
        self.listed.pass = Some(pass);
        Ok(())
    }

    fn finish_pass(&mut self, pass: Pass) {
        let (found, offered) = pass.finish();
        let left_out = self.left_out(&found);
        let offered = found.into_iter().take(offered);
        self.listed.add(offered.filter(|found| !left_out.contains(&found.entry)));
    }

    /// Leaves a message out of this session because it has ended others.
    fn skip(&mut self, entry: Entry) {
        self.listed.offered.insert(entry.unique());
        self.listed.skipped += 1;
        if let Some(ended) = entry.record().ended {
            let (queue, file, sessions) = (&self.name, quoted(entry.name.display()), ended.sessions);
            log::info!("event=skipped queue={queue} file={file} sessions={sessions} skip={}", ended.skip - 1);
            self.listed.uncounted.push(entry);
        }
    }

    pub(super) fn count_call(&mut self) {
        for entry in std::mem::take(&mut self.listed.uncounted) {
            let mut record = entry.record();
            if let Some(ended) = &mut record.ended {
                ended.skip = ended.skip.saturating_sub(1);
            }
            match self.maildir.rename(&entry, None, &record) {
                Ok(renamed) => drop(self.listed.offered.insert(renamed.unique())),
                // The time since it ended the last session bounds the calls too.
                Err(error) => log::warn!("event=skip-not-recorded queue={} error={}", self.name, quoted(error)),
            }
        }
    }

    /// The entries among these that are not offered, because another entry is the same message.
    fn left_out(&self, found: &[RankedEntry]) -> HashSet<Entry> {
        let mut left_out = HashSet::new();
        let mut entries: Vec<_> = found.iter().map(|found| &found.entry).collect();
        entries.sort_unstable_by(|one, other| one.unique().cmp(other.unique()).then_with(|| one.cmp(other)));
        for pair in entries.windows(2).filter(|pair| pair[0].unique() == pair[1].unique()) {
            let id = |entry: &Entry| FileId::of_path(&self.maildir.file(entry)).ok();
            match (id(pair[0]), id(pair[1])) {
                // A mail reader has moved it while the directories were read.
                (None, _) => drop(left_out.insert(pair[0].clone())),
                (_, None) => drop(left_out.insert(pair[1].clone())),
                // It is moving it, or was killed between link and unlink.
                (Some(one), Some(other)) if one == other => drop(left_out.insert(pair[0].clone())),
                _ => match self.remove_superseded(pair[0], pair[1]) {
                    Ok(removed) => left_out.extend(removed.cloned()),
                    // If these may be the two files of one message, either would be sent to recipients that have it already.
                    Err(error) => {
                        log_unreadable(&self.name, &error);
                        left_out.extend(pair.iter().copied().cloned());
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
            let all_by_mailbox: HashMap<_, _> = all.iter().map(|recipient| (&recipient.mailbox, recipient)).collect();
            few.ours
                && few.unread == many.unread
                && some.len() < all.len()
                && some.iter().all(|recipient| all_by_mailbox.get(&recipient.mailbox) == Some(&recipient))
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
