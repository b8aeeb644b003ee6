//! One message of a queue: reading it, and settling it after an attempt.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::fs::OFlags;

use super::envelope::{
    self, ENVELOPE_LIMIT, Mark, ParseOptions, Parsed, ParsedEnvelope, QueuedEnvelope, UnreadRecipient,
};
use super::name::QueueName;
use super::retry;
use crate::clock::Timestamp;
use crate::mail::header::Header;
use crate::maildir::spooled::Content;
use crate::maildir::{
    AttemptRecord, DELAY_REPORTED, EndedSessions, Entry, FileId, IN_DOUBT, Maildir, for_each_block, with_path,
};
use crate::net::trace::quoted;
use crate::smtp::client::OutgoingMessage;
use crate::smtp::command::{Envelope, Recipient};
use crate::smtp::content::WireSize;
use crate::smtp::status::{DecidedBy, DeliveryResult, RecipientStatus};

/// Names tried for a message in `.refused`: an earlier version may have kept copies there for other recipients.
const SET_ASIDE_NAMES: usize = 1000;

/// Octets of a header that are read for what it needs at most: a few threads do it for all turned sessions,
/// and a longer list of addresses would delay the others.
const HEADER_LIMIT: usize = 64 << 10;

/// Octets of a header that are read at a time.
const HEADER_BLOCK: usize = 16 << 10;

/// A message is offered after this many ended sessions in a row as before, but last; then calls skip it.
const SESSIONS_WITHOUT_SKIP: u32 = 2;

/// How many calls skip a message at most, after one more ended session each: 1, 2, 4, 8, 8 and so on.
const SKIPPED_CALLS_LIMIT: u32 = 8;

/// No call skips a message when this time has passed since it ended a session.
const SKIP_LIMIT: Duration = Duration::from_secs(24 * 60 * 60);

/// One message, and the recipients that it is offered for.
pub struct QueuedMessage {
    queue: QueueName,
    maildir: Maildir,
    entry: Entry,
    /// The file was removed, or has gone to `.refused`.
    gone: bool,
    /// Open for reading, and for writing if the system permits that.
    file: File,
    /// The lock on it, in a shared directory.
    lock: Option<MessageLock>,
    /// Where the content begins, in octets.
    content: u64,
    /// The id of the message in the log and in its `Received` field.
    pub id: String,
    /// When it has arrived, or if that time is impossible when it was first seen.
    pub arrived: Timestamp,
    /// Its time of arrival is impossible, and it was not seen before.
    unseen: bool,
    pub envelope: Envelope,
    /// For each recipient, where its mark goes; see [`Mark`].
    marks: Vec<Vec<u64>>,
    /// The marks of recipients that are settled.
    settled: Vec<Mark>,
    /// Recipients that cannot be read, for which the file stays: see [`ParsedEnvelope::unread`].
    unread: Vec<UnreadRecipient>,
    /// As [`QueuedMessage::leave_out`].
    left_out: bool,
    /// Octets of the content on the wire.
    pub size: u64,
    /// The content has octets above 127.
    pub eight_bit: bool,
    /// When the next attempt at deferred recipients is due; only a queue with retries uses it.
    pub next_attempt: Option<SystemTime>,
    /// When a rejection was a deferral first (`soft-bounce`).
    pub first_rejected: Option<Timestamp>,
    /// The sender has received a DSN about the rejected recipients, or wants none; or nothing is to be kept for them.
    pub rejections_reported: bool,
}

/// What is found under a name in a queue.
pub(super) enum Opened {
    Message(Box<QueuedMessage>),
    /// No message that could be sent from this queue, for this reason.
    NotMail(String),
    /// There is no such file.
    Gone,
    /// It is in a shared directory, and another session has it.
    Busy,
}

/// The content, from where the last call ended.
impl Read for QueuedMessage {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read(buffer).map_err(|error| with_path(&self.maildir.file(&self.entry), error))
    }
}

impl Content for QueuedMessage {
    fn rewind(&mut self) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(self.content)).map(drop)
    }
}

impl QueuedMessage {
    /// Opens a message. `locked`: its file, if it is in a shared directory and was locked before. `now`: the time, by which its
    /// time of arrival may be impossible. It has no recipients if all of them are settled, or if those that are open cannot be
    /// read.
    ///
    /// # Errors
    /// The file cannot be read; the error names it.
    pub(super) fn open(
        name: &QueueName, entry: Entry, locked: Option<MessageLock>, now: Timestamp,
    ) -> io::Result<Opened> {
        let maildir = name.maildir();
        let path = maildir.file(&entry);
        let failed = |error| with_path(&path, error);
        let file = match &locked {
            Some(MessageLock(file)) => file.try_clone()?,
            None => match open_file(&path) {
                Ok(Ok(file)) => file,
                Ok(Err(kind)) => return Ok(Opened::NotMail(kind.to_owned())),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Opened::Gone),
                Err(error) => return Err(failed(error)),
            },
        };
        let lock = match locked {
            None if name.shared => match lock_opened(&file, &path) {
                Ok(Some(lock)) => Some(lock),
                Ok(None) => return Ok(Opened::Gone),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Opened::Busy),
                Err(error) => return Err(error),
            },
            locked => locked,
        };
        let parsed = match read_envelope(&file, &entry, name).map_err(failed)? {
            Ok(parsed) => parsed,
            Err(reason) => return Ok(Opened::NotMail(reason)),
        };
        let QueuedEnvelope { id, arrived: stated, envelope } = parsed.envelope;
        let AttemptRecord { first_seen, first_rejected, .. } = entry.record();
        let unseen = retry::arrival(stated, first_seen, now).is_none() && now.is_possible(now);
        let arrived = retry::arrival_or_now(stated, first_seen, now);
        let (content, wire_size) = (parsed.octets as u64, entry.wire_size().filter(|_| parsed.ours));
        // An address in UTF-8 is no reason to require 8BITMIME for content that is not.
        let wire_size = wire_size.filter(|_| !(entry.eight_bit() && parsed.eight_bit));
        let mut message = QueuedMessage {
            queue: name.clone(),
            maildir: maildir.clone(),
            gone: false,
            eight_bit: entry.eight_bit(),
            entry,
            file,
            lock,
            content,
            id,
            arrived,
            unseen,
            envelope,
            marks: parsed.marks,
            settled: parsed.settled,
            unread: parsed.unread,
            left_out: false,
            size: 0,
            next_attempt: None,
            first_rejected,
            rejections_reported: false,
        };
        message.rewind().map_err(failed)?;
        match wire_size {
            // The name tells the size of the whole file, with a CR for each of its lines.
            Some(size) => {
                let size = size.saturating_sub(content + parsed.lines as u64);
                message.size = if message.lacks_line_end().map_err(failed)? { size + 2 } else { size };
            }
            // Other agents write other sizes into their names, or none.
            None => message.measure()?,
        }
        Ok(Opened::Message(Box::new(message)))
    }

    /// Why the file has recipients that cannot be read; empty: it has none.
    pub(super) fn unread(&self) -> String {
        let reasons: Vec<_> = self.unread.iter().map(|unread| unread.reason.as_str()).collect();
        reasons.join("; ")
    }

    /// Makes sure that a message with several recipients can be marked. If another agent has written a file that this user
    /// may not write, a copy takes its place. `unique`: a name for it.
    ///
    /// # Errors
    /// The copy cannot be made.
    pub(super) fn ensure_markable(&mut self, unique: &str) -> io::Result<()> {
        let writable = || rustix::fs::fcntl_getfl(&self.file).is_ok_and(|flags| flags.contains(OFlags::RDWR));
        if self.envelope.recipients.len() + self.unread.len() > 1 && !writable() {
            let copy = self.maildir.replace_by_copy(&self.entry, &self.file, unique)?;
            self.remove_other_names()?;
            if self.queue.shared {
                // Whoever has opened the copy since it had its name gets the message.
                let path = self.maildir.file(&self.entry);
                let gone = || with_path(&path, io::Error::new(io::ErrorKind::NotFound, "a session has settled it"));
                self.lock = Some(lock_opened(&copy, &path)?.ok_or_else(gone)?);
            }
            self.file = copy;
            self.rewind()?;
        }
        Ok(())
    }

    /// Whether the last line of the content has no line end. It gets one on the wire.
    fn lacks_line_end(&self) -> io::Result<bool> {
        let length = self.file.metadata()?.len();
        let mut last = [b'\n'];
        if length > self.content {
            self.file.read_exact_at(&mut last, length - 1)?;
        }
        Ok(last != [b'\n'])
    }

    /// Reads all content to find its size on the wire, and whether it has octets above 127.
    fn measure(&mut self) -> io::Result<()> {
        let (mut size, mut eight_bit) = (WireSize::default(), false);
        for_each_block(self, |block| {
            size.feed(block);
            eight_bit |= !block.is_ascii();
            Ok(())
        })?;
        (self.size, self.eight_bit) = (size.finish(), eight_bit);
        self.rewind()
    }

    /// Reads and writes the message by another descriptor of its file.
    #[cfg(test)]
    pub(super) fn use_file(&mut self, file: File) {
        self.file = file;
    }

    /// The name that stays the same when the file is moved or flagged.
    pub fn unique(&self) -> &OsStr {
        self.entry.unique()
    }

    /// The file's name now.
    pub fn entry(&self) -> &Entry {
        &self.entry
    }

    /// The queue that it was opened in.
    pub fn queue(&self) -> &QueueName {
        &self.queue
    }

    /// The octets of its file, if it was moved to `.refused`.
    pub(super) fn octets_set_aside(&self) -> Option<u64> {
        let is_set_aside = self.gone && self.settled.contains(&Mark::Rejected);
        is_set_aside.then(|| self.file.metadata().map_or(0, |metadata| metadata.len()))
    }

    /// Whether it is still in its queue.
    pub(super) fn is_there(&self) -> bool {
        !self.gone
    }

    pub(super) fn into_entry(self) -> Entry {
        self.entry
    }

    /// The envelope of the message for these recipients.
    pub fn with_recipients(&self, recipients: Vec<Recipient>) -> QueuedEnvelope {
        let envelope = self.envelope.with_recipients(recipients);
        QueuedEnvelope { id: self.id.clone(), arrived: self.arrived, envelope }
    }

    /// Leaves out recipients that this session must not send to. They stay in the file.
    pub fn leave_out(&mut self, is_left_out: impl Fn(&Recipient) -> bool) {
        let keep: Vec<_> = self.envelope.recipients.iter().map(|recipient| !is_left_out(recipient)).collect();
        self.left_out |= keep.contains(&false);
        let (mut recipients, mut marks) = (keep.iter(), keep.iter());
        self.envelope.recipients.retain(|_| recipients.next() == Some(&true));
        self.marks.retain(|_| marks.next() == Some(&true));
    }

    /// The message as an SMTP client sends it.
    pub fn outgoing_message(&self) -> OutgoingMessage {
        let mut envelope = self.envelope.clone();
        // If the header cannot be read, the sender's declaration holds.
        let utf8_header = self.eight_bit && self.header_needs_utf8().unwrap_or(envelope.utf8);
        envelope.drop_needless_utf8(utf8_header);
        let attempts = usize::try_from(self.entry.record().attempts).unwrap_or(0);
        OutgoingMessage { envelope, size: self.size, eight_bit: self.eight_bit, utf8_header, attempts }
    }

    /// Whether an address in the header needs SMTPUTF8. If the header is longer than [`HEADER_LIMIT`], the sender's
    /// declaration holds too.
    fn header_needs_utf8(&self) -> io::Result<bool> {
        let mut octets = Vec::new();
        loop {
            let before = octets.len();
            octets.resize(before + HEADER_BLOCK, 0);
            let read = self.file.read_at(&mut octets[before..], self.content + before as u64)?;
            octets.truncate(before + read);
            // Half a line could be taken for the begin of the body.
            let lines = octets.iter().rposition(|octet| *octet == b'\n').map_or(0, |at| at + 1);
            let lines = if read == 0 { octets.len() } else { lines };
            let header = Header::parse(&octets[..lines]);
            if read == 0 || header.octets() < lines {
                return Ok(header.needs_utf8());
            }
            if octets.len() >= HEADER_LIMIT {
                return Ok(self.envelope.utf8 || header.needs_utf8());
            }
        }
    }

    /// If the time of arrival is impossible, records in the file's name when the message was first seen. A failure is
    /// logged: the message is offered all the same, and the next session tries again.
    pub(super) fn ensure_arrival(&mut self) {
        if !self.unseen {
            return;
        }
        let first_seen = self.arrived;
        match self.rename(None, |record| record.first_seen = Some(first_seen)) {
            Ok(()) => self.unseen = false,
            Err(error) => log::warn!("event=arrival-not-recorded id={} error={}", self.id, quoted(error)),
        }
    }

    /// When the message was first offered, and stayed. `None`: it has not been offered yet, or the clock was wrong then.
    pub fn first_offered(&self, now: Timestamp) -> Option<Timestamp> {
        self.entry.record().first_offered.filter(|time| time.is_possible(now))
    }

    /// The last reply to one of its recipients that stayed.
    pub fn last_reply(&self) -> Option<String> {
        self.entry.record().last_reply.as_deref().map(readable_reply)
    }

    /// Records what became of each recipient, in the order that the module doc of [`queue`](super) describes. This is the
    /// only function that removes mail. `result` has a status for each recipient in order; recipients without one were not
    /// tried. Returns whether this session may offer a message of this name again.
    ///
    /// # Errors
    /// The disk fails. No recipient is lost, but some may receive the message twice.
    pub(super) fn settle(&mut self, result: &DeliveryResult, now: Timestamp) -> io::Result<bool> {
        let (mut marks, mut open) = (Vec::new(), Vec::new());
        for (number, places) in self.marks.iter().enumerate() {
            let mark = match result.recipients.get(number) {
                Some(RecipientStatus::Sent(_)) => Mark::Done,
                Some(RecipientStatus::Rejected(_)) if self.rejections_reported => Mark::Done,
                Some(RecipientStatus::Rejected(_)) => Mark::Rejected,
                status => {
                    open.push(status);
                    continue;
                }
            };
            marks.extend(places.iter().map(|place| (*place, mark)));
        }
        let offer_again = open.iter().any(|status| status.is_none_or(RecipientStatus::is_one_too_many));
        // If every recipient failed, 452 did not mean "too many recipients".
        let offer_again = offer_again && !marks.is_empty();
        let in_doubt = open.contains(&Some(&RecipientStatus::InDoubt));
        self.settled.extend(marks.iter().map(|(_, mark)| *mark));
        let all_settled = open.is_empty() && self.unread.is_empty() && !self.left_out;
        if all_settled && !self.settled.contains(&Mark::Rejected) {
            let finished = self.finish();
            // If it cannot be removed, or has another name, the marks keep the next session from sending it again. No fsync:
            // the removal of a message has none either.
            let named = finished.is_err() || self.file.metadata().is_ok_and(|file| file.nlink() > 0);
            if named && self.write_marks(&marks).is_err() && finished.is_ok() {
                self.remove_other_names()?;
            }
            return finished.map(|()| true);
        }
        if !marks.is_empty() && (self.marks.len() > 1 || !all_settled) {
            self.write_marks(&marks)?;
            self.file.sync_data().map_err(|error| with_path(&self.maildir.file(&self.entry), error))?;
        }
        if all_settled {
            self.record_reply(result, now)?;
            self.finish()?;
            return Ok(true);
        }
        if let Some(next_attempt) = self.next_attempt {
            self.file.set_modified(if offer_again { SystemTime::now() } else { next_attempt })?;
        }
        match result.decided_by {
            // The connection was lost with the message before it, or by this side: that says nothing about this one.
            DecidedBy::UnrelatedConnectionLoss if in_doubt => self.rename(Some(IN_DOUBT), |_| {})?,
            DecidedBy::UnrelatedConnectionLoss => {}
            _ => self.record_attempt(result, in_doubt, now)?,
        }
        Ok(offer_again)
    }

    /// Marks recipients as settled. The file keeps its time of modification: it is the time of arrival, or that of the next
    /// attempt.
    fn write_marks(&self, marks: &[(u64, Mark)]) -> io::Result<()> {
        let write = || {
            let modified = self.file.metadata()?.modified()?;
            marks.iter().try_for_each(|(place, mark)| self.file.write_all_at(&[mark.octet()], *place))?;
            // The system may permit only the owner to do that.
            let _ = self.file.set_modified(modified);
            Ok(())
        };
        write().map_err(|error| with_path(&self.maildir.file(&self.entry), error))
    }

    /// Removes the file, whose recipients are all settled. If one was rejected and its sender cannot be told, the file goes to
    /// `.refused`.
    ///
    /// # Errors
    /// The disk fails.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        if self.settled.contains(&Mark::Rejected) {
            self.move_aside()?;
            self.gone = true;
            return Ok(());
        }
        match self.with_entry(|message| message.maildir.remove(&message.entry)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => self.gone = true,
        }
        Ok(())
    }

    /// Removes the other names that the file has in this queue. One file with two names is one message: a mail reader that
    /// moves it by link and unlink may have been killed between.
    fn remove_other_names(&self) -> io::Result<()> {
        let id = FileId::of_file(&self.file)?;
        for _ in 0..FIND_ATTEMPTS {
            if self.file.metadata()?.nlink() == 0 {
                break;
            }
            let Some(other) = self.maildir.find(&self.entry, Some(id))? else { break };
            match self.maildir.remove(&other) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Moves the message to `.refused`.
    fn move_aside(&mut self) -> io::Result<()> {
        let maildir = set_aside_maildir(&self.maildir);
        for number in 0..SET_ASIDE_NAMES {
            let moved = self.with_entry(|message| {
                let mut name = message.entry.name.clone();
                if number > 0 {
                    name.push(format!(".r{number}"));
                }
                message.maildir.move_to(&message.entry, &maildir, name)
            });
            match moved {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                other => return other,
            }
        }
        Err(io::Error::other(format!("{}: too many messages of one name", maildir.path().display())))
    }

    /// Records an attempt after which recipients stay open.
    fn record_attempt(&mut self, result: &DeliveryResult, in_doubt: bool, now: Timestamp) -> io::Result<()> {
        let last_reply = result.recipients.iter().rev().find(|status| status.is_open()).map(ToString::to_string);
        let (waits, first_rejected) = (self.waits(), self.first_rejected);
        self.rename(in_doubt.then_some(IN_DOUBT), |record| {
            count_attempt(record, now);
            record.first_rejected = first_rejected;
            record.last_reply = last_reply.or(record.last_reply.take());
            record.ended = result.ended_session().then(|| ended_once_more(record.ended, waits, now));
        })
    }

    /// Records the reply of a message that goes to `.refused`.
    fn record_reply(&mut self, result: &DeliveryResult, now: Timestamp) -> io::Result<()> {
        let reply = result.recipients.iter().find(|status| status.is_rejected()).map(ToString::to_string);
        self.rename(None, |record| {
            count_attempt(record, now);
            record.last_reply = reply.or(record.last_reply.take());
        })
    }

    /// Records that what became of the message cannot be recorded, as if it had ended the session. A failure is not reported:
    /// the reason for this is.
    pub(super) fn record_failure(&mut self, now: Timestamp) {
        let waits = self.waits();
        let _ = self.rename(None, |record| record.ended = Some(ended_once_more(record.ended, waits, now)));
    }

    /// Whether it waits for its next attempt, so that no call need skip it besides.
    fn waits(&self) -> bool {
        self.next_attempt.is_some_and(|next| next > SystemTime::now() + Duration::from_secs(1))
    }

    /// Gives the file a flag, if there is one, and a record that `change` has changed.
    fn rename(&mut self, flag: Option<char>, change: impl FnOnce(&mut AttemptRecord)) -> io::Result<()> {
        let mut record = self.entry.record();
        change(&mut record);
        self.entry = self.with_entry(|message| message.maildir.rename(&message.entry, flag, &record))?;
        Ok(())
    }

    /// Does something with the file by its name, and does it again by the new one if a mail reader has moved or flagged the
    /// file meanwhile. A message that is gone is an error.
    fn with_entry<T>(&mut self, act: impl Fn(&QueuedMessage) -> io::Result<T>) -> io::Result<T> {
        for _ in 0..FIND_ATTEMPTS {
            match act(self) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    match self.maildir.find(&self.entry, Some(FileId::of_file(&self.file)?))? {
                        Some(entry) => self.entry = entry,
                        None => return Err(error),
                    }
                }
                other => return other,
            }
        }
        act(self)
    }

    /// Records `next_attempt` in the file.
    ///
    /// # Errors
    /// The disk fails.
    pub fn record_next_attempt(&self) -> io::Result<()> {
        self.next_attempt.map_or(Ok(()), |next_attempt| self.file.set_modified(next_attempt))
    }

    /// Whether the sender has received a DSN about the delay.
    pub fn is_delay_reported(&self) -> bool {
        self.entry.has(DELAY_REPORTED)
    }

    /// Records that the sender has received a DSN about the delay.
    ///
    /// # Errors
    /// The file is gone, or the disk fails.
    pub fn mark_delay_reported(&mut self) -> io::Result<()> {
        self.rename(Some(DELAY_REPORTED), |_| {})
    }
}

/// How often a name is looked for that a mail reader changes again and again.
const FIND_ATTEMPTS: usize = 5;

/// Counts an attempt. A first one at an impossible time is forgotten: the clock was wrong then.
fn count_attempt(record: &mut AttemptRecord, now: Timestamp) {
    record.first_offered = record.first_offered.filter(|time| time.is_possible(now)).or(Some(now));
    record.attempts = record.attempts.saturating_add(1);
}

/// One session more that a message has ended. `waits`: see [`QueuedMessage::waits`].
fn ended_once_more(before: Option<EndedSessions>, waits: bool, now: Timestamp) -> EndedSessions {
    let sessions = before.map_or(0, |before| before.sessions).saturating_add(1);
    let skip = match sessions.checked_sub(SESSIONS_WITHOUT_SKIP + 1) {
        Some(more) if !waits => 2u32.saturating_pow(more).min(SKIPPED_CALLS_LIMIT),
        _ => 0,
    };
    EndedSessions { sessions, skip, at: now }
}

/// Whether this call skips a message, because it has ended sessions.
pub(super) fn is_skipped(entry: &Entry, now: Timestamp) -> bool {
    entry.ended().is_some_and(|ended| ended.skip > 0 && retry::age(ended.at, now) < SKIP_LIMIT && ended.at <= now)
}

/// Opens a plain file, also for writing if the system permits that. The inner error is what it is instead: a link, which may
/// lead anywhere, or a pipe, which would block for ever.
///
/// # Errors
/// The system's.
pub(super) fn open_file(path: &Path) -> io::Result<Result<File, &'static str>> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let open = |write| OpenOptions::new().read(true).write(write).custom_flags(flags.bits().cast_signed()).open(path);
    let opened = open(true).or_else(|error| match error.kind() {
        io::ErrorKind::NotFound => Err(error),
        // The user may not write it, or the disk takes nothing now: it can be sent all the same.
        _ => open(false),
    });
    let file_type = match &opened {
        Ok(file) => file.metadata()?.file_type(),
        Err(_) => fs::symlink_metadata(path)?.file_type(),
    };
    match opened {
        Ok(file) if file_type.is_file() => Ok(Ok(file)),
        Err(error) if file_type.is_file() => Err(error),
        _ if file_type.is_symlink() => Ok(Err("it is a symbolic link")),
        _ if file_type.is_dir() => Ok(Err("it is a directory")),
        _ => Ok(Err("it is no plain file")),
    }
}

/// The lock on a message of a shared directory, until it is dropped.
pub(super) struct MessageLock(File);

impl Drop for MessageLock {
    fn drop(&mut self) {
        // A child process has a copy of the descriptor between fork and exec.
        let _ = self.0.unlock();
    }
}

/// Locks a file of a shared directory that was opened by this name. `None`: it does not have the name any more.
///
/// # Errors
/// `WouldBlock`: another session has it; the system's.
pub(super) fn lock_opened(file: &File, path: &Path) -> io::Result<Option<MessageLock>> {
    let copy = file.try_clone().map_err(|error| with_path(path, error))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(is_busy(path)),
        Err(TryLockError::Error(error)) => return Err(with_path(path, error)),
    }
    let lock = MessageLock(copy);
    // Another session may have settled it between.
    let named = FileId::of_path(path).ok();
    let has_name = named.is_some_and(|named| FileId::of_file(file).is_ok_and(|opened| opened == named));
    Ok(has_name.then_some(lock))
}

/// Another session has the message in this file.
pub(super) fn is_busy(path: &Path) -> io::Error {
    with_path(path, io::Error::new(io::ErrorKind::WouldBlock, "a session has this message"))
}

/// Opens and locks the file of a message in a shared directory. `None`: there is no such file, or it is no plain file, which no
/// session has.
///
/// # Errors
/// `WouldBlock`: another session has it; the system's.
pub(super) fn lock_file(path: &Path) -> io::Result<Option<MessageLock>> {
    match open_file(path) {
        Ok(Ok(file)) => lock_opened(&file, path),
        Ok(Err(_)) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(with_path(path, error)),
    }
}

/// Reads the envelope at the front of a file that was opened just now. The inner error is why it is no message.
///
/// # Errors
/// The file cannot be read.
pub(super) fn read_envelope(
    file: &File, entry: &Entry, name: &QueueName,
) -> io::Result<Result<ParsedEnvelope, String>> {
    // In a queue with retries the time of modification is that of the next attempt.
    let arrived = match name.retries {
        true => entry.named().unwrap_or(Timestamp::from_seconds(0)),
        false => file.metadata()?.modified()?.into(),
    };
    read_envelope_of(file, entry, name, arrived)
}

/// The same; `arrived`: the time of arrival, if the envelope has none.
pub(super) fn read_envelope_of(
    mut file: &File, entry: &Entry, name: &QueueName, arrived: Timestamp,
) -> io::Result<Result<ParsedEnvelope, String>> {
    let id = entry.shown_unique();
    let mut front = Vec::new();
    loop {
        let before = front.len();
        front.resize(before + before.max(4096), 0);
        let octets = file.read(&mut front[before..])?;
        front.truncate(before + octets);
        let options = ParseOptions { domain: name.domain.as_ref(), prefix: name.prefix.as_deref(), id: &id, arrived };
        match envelope::parse(&front, octets == 0, options) {
            Parsed::Envelope(parsed) => return Ok(Ok(*parsed)),
            Parsed::More if front.len() < ENVELOPE_LIMIT => {}
            Parsed::More => return Ok(Err("its envelope is too long".to_owned())),
            Parsed::NoReversePath(reason) => return Ok(Err(reason)),
            Parsed::NoRecipients => return Ok(Err("it names no recipient".to_owned())),
        }
    }
}

/// A reply as the name of a file has it, with spaces again.
pub(super) fn readable_reply(recorded: &str) -> String {
    recorded.replace('_', " ").trim().to_owned()
}

/// Where messages whose rejection nobody can be told wait for the postmaster, within the queue.
pub(super) const SET_ASIDE_DIRECTORY: &str = ".refused";

/// Removes files of writers that died, also in `.refused`.
///
/// # Errors
/// A directory cannot be read, or a file cannot be removed.
pub(super) fn sweep(maildir: &Maildir) -> io::Result<()> {
    maildir.sweep()?;
    set_aside_maildir(maildir).sweep()
}

/// The Maildir of these messages.
pub(super) fn set_aside_maildir(maildir: &Maildir) -> Maildir {
    Maildir::new(maildir.path().join(SET_ASIDE_DIRECTORY))
}
