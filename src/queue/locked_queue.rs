//! One locked queue: its lock, and how its messages are opened.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::listed::Listed;
use super::lock_file::{LockError, LockFile, QUEUE_LOCK_FILE};
use super::message::{self, MessageLock, Opened, QueuedMessage};
use super::name::QueueName;
use super::set_aside::SetAsideLimits;
use super::shared::{self, SharedIndex};
use crate::file_stamp::FileStamp;
use crate::ids::Ids;
use crate::maildir::{Entry, Maildir, log_sweep_failed, with_remedy};
use crate::net::trace::quoted;
use crate::threads::Guarded;

/// How often to look again for a message that a mail reader keeps renaming.
pub(super) const OPEN_ATTEMPTS: usize = 5;

/// How often to make a directory again that other processes remove before it is locked.
const LOCK_ATTEMPTS: usize = 100;

/// A queue that a session has locked, or will lock when there is mail in it.
pub(super) struct LockedQueue {
    pub(super) name: QueueName,
    pub(super) maildir: Maildir,
    /// The lock on the directory; `None`: it had no mail yet, or it is shared, and each message has its own lock.
    pub(super) lock: Option<LockFile>,
    pub(super) ids: Ids,
    pub(super) notes: Arc<Notes>,
    pub(super) set_aside: Arc<SetAsideLimits>,
    /// The index of the shared directory; `None`: it is not shared, or has no index in this process.
    pub(super) index: Option<Arc<SharedIndex>>,
    /// Messages of the shared directory that are locked already, by their unique names.
    pub(super) locked: HashMap<OsString, MessageLock>,
    pub(super) listed: Listed,
    /// The number of messages that were offered and are neither settled nor put back.
    pub(super) under_way: usize,
}

/// This process has no descriptors or no memory left. The message is not the reason: it is offered again later.
pub(super) struct Shortage;

/// The files that this process has logged as `not-mail` or `recipients-left`, so that each is logged once, and files
/// that are not messages do not count as waiting.
#[derive(Default)]
pub(super) struct Notes(Guarded<HashMap<PathBuf, (Note, Option<FileStamp>)>>);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Note {
    /// The file has no recipient that this queue could send to.
    NotMail,
    /// Some recipients cannot be read.
    RecipientsLeft,
}

/// The number of files at which all are forgotten, to bound the memory; they are logged once more.
const NOTES_LIMIT: usize = 10_000;

impl Notes {
    /// Notes a file, with its stamp from before it was read. Returns whether the note is new.
    fn add(&self, maildir: &Maildir, entry: &Entry, note: Note, stamp: Option<FileStamp>) -> bool {
        let mut notes = self.0.lock();
        if notes.len() >= NOTES_LIMIT {
            notes.clear();
        }
        notes.insert(maildir.path().join(entry.unique()), (note, stamp)).is_none_or(|(before, _)| before != note)
    }

    /// Forgets a file, which is a message now.
    fn remove(&self, maildir: &Maildir, entry: &Entry) {
        let mut notes = self.0.lock();
        if !notes.is_empty() {
            notes.remove(&maildir.path().join(entry.unique()));
        }
    }

    /// Whether a file may be a message: it is not noted as `not-mail`, or it has changed since.
    pub(super) fn is_mail(&self, maildir: &Maildir, entry: &Entry) -> bool {
        let notes = self.0.lock();
        if notes.is_empty() {
            return true;
        }
        let note = notes.get(&maildir.path().join(entry.unique())).copied();
        drop(notes);
        !matches!(note, Some((Note::NotMail, seen @ Some(_))) if seen == stamp(maildir, entry))
    }
}

fn stamp(maildir: &Maildir, entry: &Entry) -> Option<FileStamp> {
    fs::symlink_metadata(maildir.file(entry)).ok().map(|found| FileStamp::of(&found))
}

impl Drop for LockedQueue {
    fn drop(&mut self) {
        self.release();
    }
}

impl LockedQueue {
    /// Releases the lock on the directory. Removes the lock file of an account's directory without mail, so that the
    /// directory can be removed.
    fn release(&mut self) {
        if let Some(lock) = self.lock.take()
            && self.name.account_lock.is_some()
            && self.maildir.is_empty().unwrap_or(false)
        {
            lock.remove();
        }
    }

    /// If no message of a directory of an account waits or is under way, releases the lock until the next pass over it.
    /// An account may have more domains with mail than this process may have descriptors.
    pub(super) fn release_if_idle(&mut self) {
        let is_idle = self.under_way == 0 && self.listed.is_empty() && !self.listed.is_passing();
        if self.name.account_lock.is_some() && is_idle {
            self.release();
        }
    }

    /// Makes and locks the directory, and removes files of dead writers.
    ///
    /// # Errors
    /// See [`LockError`].
    pub(super) fn lock_directory(&mut self, takeover: Option<Duration>) -> Result<(), LockError> {
        for attempt in 0.. {
            self.maildir.create().map_err(|error| LockError::Failed(with_remedy(&self.name.path, error)))?;
            match LockFile::lock(&self.name.path.join(QUEUE_LOCK_FILE), takeover, &self.name) {
                // Another process has removed the directory between `create` and `lock`.
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

    /// Removes files of dead writers. A failure is logged.
    pub(super) fn sweep(&self) {
        message::sweep(&self.maildir).unwrap_or_else(|error| log_sweep_failed(&self.name, &error));
    }

    /// Locks the directory, unless it is locked, shared, or has no mail. It may be busy although the account is locked:
    /// the domain belonged to another account when that account's session began, or an earlier version runs.
    ///
    /// # Errors
    /// See [`LockError`].
    pub(super) fn lock_if_mail(&mut self, takeover: Option<Duration>) -> Result<(), LockError> {
        match self.has_lock() || self.maildir.is_empty().map_err(LockError::Failed)? {
            true => Ok(()),
            false => self.lock_directory(takeover),
        }
    }

    /// The files of the queue, in no order.
    pub(super) fn files(&self) -> Box<dyn Iterator<Item = io::Result<Entry>> + Send> {
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

    /// Records in the index where a message is now. If it was moved to `.refused`, applies the limits of that
    /// directory.
    pub(super) fn record(&self, message: &QueuedMessage) {
        if let Some(octets) = message.octets_set_aside()
            && let Err(error) = self.set_aside.added(&self.name, octets)
        {
            log_sweep_failed(&self.name, &error);
        }
        if let (Some(index), Some(domain)) = (&self.index, &self.name.domain) {
            index.replace(domain, message.unique(), message.is_in_queue().then(|| message.entry()));
        }
    }

    /// Opens a message. If a mail reader has moved it since it was listed, looks for its new name. `None`: it does not
    /// exist any more, or is not a message with an open recipient.
    ///
    /// # Errors
    /// The file cannot be read; `WouldBlock`: it is in a shared directory, and another session has it.
    pub(super) fn open(&mut self, mut entry: Entry) -> io::Result<Option<QueuedMessage>> {
        for _ in 0..OPEN_ATTEMPTS {
            let locked = self.locked.remove(entry.unique());
            match self.open_file(&entry, locked)? {
                Opened::Missing => match self.maildir.find(&entry, None)? {
                    Some(moved) => entry = moved,
                    None => return Ok(None),
                },
                Opened::Busy => return Err(message::is_busy(&self.maildir.file(&entry))),
                opened => return self.use_opened(&entry, opened),
            }
        }
        Ok(None)
    }

    /// Opens the next message of the list. If a mail reader has moved it, leaves it to the next pass: to look for each
    /// one alone would take long if a reader moves a whole directory. If it is moved again, looks for it alone. `None`:
    /// as [`Self::open`].
    ///
    /// # Errors
    /// The file or directory cannot be read.
    pub(super) fn open_listed(&mut self, entry: &Entry) -> io::Result<Option<QueuedMessage>> {
        self.listed.offered.insert(entry.unique());
        match self.open_file(entry, None)? {
            Opened::Missing if self.listed.missed.insert(entry.unique()) => {
                self.listed.offered.remove(entry.unique());
                if let Some(index) = &self.index {
                    // Another process has renamed the message, and may have renamed all.
                    index.read(&self.name)?;
                    self.listed.forget();
                }
                Ok(None)
            }
            Opened::Missing => match self.open(entry.clone()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                opened => opened,
            },
            opened => self.use_opened(entry, opened),
        }
    }

    /// See [`QueuedMessage::open`].
    pub(super) fn open_file(&self, entry: &Entry, locked: Option<MessageLock>) -> io::Result<Opened> {
        QueuedMessage::open(&self.name, entry.clone(), locked, self.ids.clock().now())
    }

    fn use_opened(&mut self, entry: &Entry, opened: Opened) -> io::Result<Option<QueuedMessage>> {
        match opened {
            Opened::Missing | Opened::Busy => Ok(None),
            Opened::NotMail(_) => {
                // Another agent may be writing the file. Read it again after its stamp: what is written later changes
                // the stamp, and the file counts as mail again.
                let stamp = stamp(&self.maildir, entry);
                match self.open_file(entry, None)? {
                    Opened::NotMail(reason) => self.note(entry, Note::NotMail, &reason, stamp),
                    Opened::Message(message) => return self.check(*message),
                    Opened::Missing | Opened::Busy => {}
                }
                Ok(None)
            }
            Opened::Message(message) => self.check(*message),
        }
    }

    /// Completes what other sessions and agents have left undone. If a crash came between the settlement of the last
    /// recipient and the removal, removes the message. If its time of arrival is impossible, records when it was first
    /// seen.
    fn check(&mut self, mut message: QueuedMessage) -> io::Result<Option<QueuedMessage>> {
        let (no_recipients, unread) = (message.envelope.recipients.is_empty(), message.unread());
        if !unread.is_empty() {
            let note = if no_recipients { Note::NotMail } else { Note::RecipientsLeft };
            self.note(message.entry(), note, &unread, stamp(&self.maildir, message.entry()));
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

    /// Logs a file once, and counts it if it is not a message.
    fn note(&mut self, entry: &Entry, note: Note, reason: &str, stamp: Option<FileStamp>) {
        self.listed.not_mail += usize::from(note == Note::NotMail);
        if self.notes.add(&self.maildir, entry, note, stamp) {
            let (queue, file) = (&self.name, self.maildir.file(entry));
            let (file, reason) = (quoted(file.display()), quoted(reason));
            match note {
                Note::NotMail => log::warn!("event=not-mail queue={queue} file={file} reason={reason}"),
                Note::RecipientsLeft => log::warn!("event=recipients-left queue={queue} file={file} error={reason}"),
            }
        }
    }

    /// Whether the queue's messages may be offered: the directory is locked, or each message has its own lock.
    pub(super) fn has_lock(&self) -> bool {
        self.lock.is_some() || self.name.shared
    }

    /// Logs an error of a file or a directory.
    ///
    /// # Errors
    /// [`Shortage`], if the error is one.
    pub(super) fn report(&self, error: &io::Error) -> Result<(), Shortage> {
        log_unreadable(&self.name, error);
        if error.kind() == io::ErrorKind::OutOfMemory { Err(Shortage) } else { Ok(()) }
    }
}

pub(super) fn log_unreadable(name: &QueueName, error: &io::Error) {
    log::error!("event=unreadable queue={name} error={}", quoted(error));
}
