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

/// Names tried for a message in `.refused`: an earlier version may have put copies for other recipients there.
const SET_ASIDE_NAMES: usize = 1000;

/// Octets of a header that are read at most to find whether it needs SMTPUTF8. A few threads do this for all turned
/// sessions: without the limit, a header with a long list of addresses would delay the others.
const HEADER_LIMIT: usize = 64 << 10;

/// Octets of a header that are read at a time.
const HEADER_BLOCK: usize = 16 << 10;

/// After this many ended sessions in a row a message is still offered in each call, but last; after more, calls skip
/// it.
const SESSIONS_WITHOUT_SKIP: u32 = 2;

/// How many calls in a row skip a message at most: 1, 2, 4, 8, 8 and so on, after one more ended session each.
const SKIPPED_CALLS_LIMIT: u32 = 8;

/// No call skips a message if it ended its last session longer ago than this: a customer may call once a day.
const SKIP_LIMIT: Duration = Duration::from_secs(24 * 60 * 60);

/// One message of a locked queue, with its open recipients.
pub struct QueuedMessage {
    queue: QueueName,
    maildir: Maildir,
    entry: Entry,
    /// The file was removed, or moved to `.refused`.
    left_queue: bool,
    /// Open for reading, and for writing if the system permits that.
    file: File,
    /// The lock on the file, if it is in a shared directory.
    lock: Option<MessageLock>,
    /// Where the content begins in the file, in octets.
    content: u64,
    /// The id of the message in the log and in its `Received` field.
    pub id: String,
    /// When the message arrived; if that time is impossible, when it was first seen.
    pub arrived: Timestamp,
    /// The time of arrival is impossible, and no earlier session has seen the message.
    unseen: bool,
    /// The sender and the open recipients.
    pub envelope: Envelope,
    /// For each open recipient, the octets in the file that its [`Mark`] overwrites.
    marks: Vec<Vec<u64>>,
    /// The marks of the settled recipients.
    settled: Vec<Mark>,
    /// Recipients that cannot be read, for which the file stays: see [`ParsedEnvelope::unread`].
    unread: Vec<UnreadRecipient>,
    /// [`QueuedMessage::leave_out`] has left out a recipient, for whom the file stays.
    left_out: bool,
    /// Octets of the content on the wire, with CRLF line ends and without added dots.
    pub size: u64,
    /// The content has octets above 127.
    pub eight_bit: bool,
    /// When the next attempt at deferred recipients is due; only a queue with retries uses it.
    pub next_attempt: Option<SystemTime>,
    /// When a rejection was first turned into a deferral (`soft-bounce`).
    pub first_rejected: Option<Timestamp>,
    /// Nothing has to be set aside for the rejected recipients: the sender has a DSN about them, or wants none.
    pub rejections_reported: bool,
}

/// What [`QueuedMessage::open`] has found under a name.
pub(super) enum Opened {
    Message(Box<QueuedMessage>),
    /// The entry is not a message that this queue could send, for this reason.
    NotMail(String),
    /// There is no such file.
    Missing,
    /// The message is in a shared directory, and another session has locked it.
    Busy,
}

/// Reads the content, from where the last call ended.
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
    /// Opens a message. `locked`: its file, if it is in a shared directory and was locked before. `now` decides whether
    /// the time of arrival is possible. The message has no recipients if all are settled, or if the open ones cannot be
    /// read.
    ///
    /// # Errors
    /// The file cannot be read; the error names its path.
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
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Opened::Missing),
                Err(error) => return Err(failed(error)),
            },
        };
        let lock = match locked {
            None if name.shared => match lock_opened(&file, &path) {
                Ok(Some(lock)) => Some(lock),
                Ok(None) => return Ok(Opened::Missing),
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
        // An address in UTF-8 must not require 8BITMIME for content without octets above 127.
        let wire_size = wire_size.filter(|_| !(entry.eight_bit() && parsed.eight_bit));
        let mut message = QueuedMessage {
            queue: name.clone(),
            maildir: maildir.clone(),
            left_queue: false,
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
            // Our names have the size of the whole file, with a CR for each of its lines.
            Some(size) => {
                let size = size.saturating_sub(content + parsed.lines as u64);
                message.size = if message.lacks_line_end().map_err(failed)? { size + 2 } else { size };
            }
            // Other agents write other sizes into their names, or none.
            None => message.measure()?,
        }
        Ok(Opened::Message(Box::new(message)))
    }

    /// Why some recipients cannot be read; empty: all can.
    pub(super) fn unread(&self) -> String {
        let reasons: Vec<_> = self.unread.iter().map(|unread| unread.reason.as_str()).collect();
        reasons.join("; ")
    }

    /// Makes sure that several recipients of a message can be marked: otherwise those that are settled would get it
    /// again. If this user may not write the file of another agent, a copy with the name `unique` replaces it.
    ///
    /// # Errors
    /// The copy cannot be made.
    pub(super) fn ensure_markable(&mut self, unique: &str) -> io::Result<()> {
        let writable = || rustix::fs::fcntl_getfl(&self.file).is_ok_and(|flags| flags.contains(OFlags::RDWR));
        if self.envelope.recipients.len() + self.unread.len() > 1 && !writable() {
            let copy = self.maildir.replace_by_copy(&self.entry, &self.file, unique)?;
            self.remove_other_names()?;
            if self.queue.shared {
                // If another session has locked the copy since it got its name, that session gets the message.
                let path = self.maildir.file(&self.entry);
                let settled = || with_path(&path, io::Error::new(io::ErrorKind::NotFound, "a session has settled it"));
                self.lock = Some(lock_opened(&copy, &path)?.ok_or_else(settled)?);
            }
            self.file = copy;
            self.rewind()?;
        }
        Ok(())
    }

    /// Whether the last line of the content lacks its line end. On the wire it gets one: two octets more.
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

    /// Replaces the descriptor of the file.
    #[cfg(test)]
    pub(super) fn use_file(&mut self, file: File) {
        self.file = file;
    }

    /// The part of the file's name that stays when the file is moved or flagged.
    pub fn unique(&self) -> &OsStr {
        self.entry.unique()
    }

    /// The present name of the file.
    pub fn entry(&self) -> &Entry {
        &self.entry
    }

    /// The queue in which the message was opened.
    pub fn queue(&self) -> &QueueName {
        &self.queue
    }

    /// The octets of the file, if it was moved to `.refused`.
    pub(super) fn octets_set_aside(&self) -> Option<u64> {
        let is_set_aside = self.left_queue && self.settled.contains(&Mark::Rejected);
        is_set_aside.then(|| self.file.metadata().map_or(0, |metadata| metadata.len()))
    }

    /// Whether the file is still in its queue.
    pub(super) fn is_in_queue(&self) -> bool {
        !self.left_queue
    }

    pub(super) fn into_entry(self) -> Entry {
        self.entry
    }

    /// The envelope of the message, with these recipients instead of its own.
    pub fn with_recipients(&self, recipients: Vec<Recipient>) -> QueuedEnvelope {
        let envelope = self.envelope.with_recipients(recipients);
        QueuedEnvelope { id: self.id.clone(), arrived: self.arrived, envelope }
    }

    /// Leaves out recipients to whom this session must not send. They stay open in the file.
    pub fn leave_out(&mut self, is_left_out: impl Fn(&Recipient) -> bool) {
        let keep: Vec<_> = self.envelope.recipients.iter().map(|recipient| !is_left_out(recipient)).collect();
        self.left_out |= keep.contains(&false);
        let (mut recipients, mut marks) = (keep.iter(), keep.iter());
        self.envelope.recipients.retain(|_| recipients.next() == Some(&true));
        self.marks.retain(|_| marks.next() == Some(&true));
    }

    /// What an SMTP client needs to know to send the message.
    pub fn outgoing_message(&self) -> OutgoingMessage {
        let mut envelope = self.envelope.clone();
        // If the header cannot be read, the sender's SMTPUTF8 counts: without it, UTF-8 would be sent undeclared (RFC
        // 6531).
        let utf8_header = self.eight_bit && self.header_needs_utf8().unwrap_or(envelope.utf8);
        envelope.drop_needless_utf8(utf8_header);
        let attempts = usize::try_from(self.entry.record().attempts).unwrap_or(0);
        OutgoingMessage { envelope, size: self.size, eight_bit: self.eight_bit, utf8_header, attempts }
    }

    /// Whether an address in the header needs SMTPUTF8. In a header longer than [`HEADER_LIMIT`] the sender's SMTPUTF8
    /// is a sufficient reason.
    fn header_needs_utf8(&self) -> io::Result<bool> {
        let mut octets = Vec::new();
        loop {
            let before = octets.len();
            octets.resize(before + HEADER_BLOCK, 0);
            let read = self.file.read_at(&mut octets[before..], self.content + before as u64)?;
            octets.truncate(before + read);
            // Parse whole lines only: half a line could look like the begin of the body.
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

    /// If the time of arrival is impossible, records in the file's name when the message was first seen; otherwise the
    /// message would never expire. A failure is logged: the message is offered nevertheless, and the next session tries
    /// again.
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

    /// When the first attempt was made after which the message stayed. `None`: there was none, or the clock was wrong
    /// then.
    pub fn first_offered(&self, now: Timestamp) -> Option<Timestamp> {
        self.entry.record().first_offered.filter(|time| time.is_possible(now))
    }

    /// The last reply to a recipient that stayed open.
    pub fn last_reply(&self) -> Option<String> {
        self.entry.record().last_reply.as_deref().map(readable_reply)
    }

    /// Records the result of an attempt, in the order that the module doc of [`queue`](super) describes. Sessions
    /// remove mail by this function only. `result` has the recipients' statuses in order; recipients without one were
    /// not tried. Returns whether this session may offer a message of this name again.
    ///
    /// # Errors
    /// The system's: the disk fails. No recipient is lost, but some may receive the message twice.
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
            // If the file cannot be removed, or a mail reader has given it another name, marks keep the next session
            // from sending it again. They are not fsynced, as the removal is not.
            let named = finished.is_err() || self.file.metadata().is_ok_and(|file| file.nlink() > 0);
            if named && self.write_marks(&marks).is_err() && finished.is_ok() {
                self.remove_other_names()?;
            }
            return finished.map(|()| true);
        }
        // The settlement: after the fsync a power cut does not send the message to these recipients again. A single
        // recipient needs no mark, because the file is moved.
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
            // The connection was lost during the message before, or by this side: this message is not the reason.
            DecidedBy::UnrelatedConnectionLoss if in_doubt => self.rename(Some(IN_DOUBT), |_| {})?,
            DecidedBy::UnrelatedConnectionLoss => {}
            _ => self.record_attempt(result, in_doubt, now)?,
        }
        Ok(offer_again)
    }

    /// Marks recipients as settled. The file's time of modification is restored: it is the time of arrival of other
    /// agents' files, or that of the next attempt.
    fn write_marks(&self, marks: &[(u64, Mark)]) -> io::Result<()> {
        let write = || {
            let modified = self.file.metadata()?.modified()?;
            marks.iter().try_for_each(|(place, mark)| self.file.write_all_at(&[mark.octet()], *place))?;
            // The marks are written even if this fails: the system may permit only the owner to set times.
            let _ = self.file.set_modified(modified);
            Ok(())
        };
        write().map_err(|error| with_path(&self.maildir.file(&self.entry), error))
    }

    /// Removes the file, whose recipients are all settled. If no DSN could report the rejection of one, moves it to
    /// `.refused` instead.
    ///
    /// # Errors
    /// The system's: the file cannot be removed or moved.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        if self.settled.contains(&Mark::Rejected) {
            self.move_aside()?;
            self.left_queue = true;
            return Ok(());
        }
        match self.with_entry(|message| message.maildir.remove(&message.entry)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => self.left_queue = true,
        }
        Ok(())
    }

    /// Removes the other names of the file in this queue, so that the message is not sent again under one of them. A
    /// mail reader that moves a file by link and unlink may be killed in between.
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

    /// Moves the file to `.refused`.
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

    /// Records the reply in the name of a file that will be moved to `.refused`.
    fn record_reply(&mut self, result: &DeliveryResult, now: Timestamp) -> io::Result<()> {
        let reply = result.recipients.iter().find(|status| status.is_rejected()).map(ToString::to_string);
        self.rename(None, |record| {
            count_attempt(record, now);
            record.last_reply = reply.or(record.last_reply.take());
        })
    }

    /// Makes a message that could not be settled come last, as if it had ended the session: it must not block the
    /// queue. An error here is ignored, because that of `settle` is reported.
    pub(super) fn record_failure(&mut self, now: Timestamp) {
        let waits = self.waits();
        let _ = self.rename(None, |record| record.ended = Some(ended_once_more(record.ended, waits, now)));
    }

    /// Whether the message waits for its next attempt, so that no call needs to skip it.
    fn waits(&self) -> bool {
        self.next_attempt.is_some_and(|next| next > SystemTime::now() + Duration::from_secs(1))
    }

    /// Renames the file: adds the flag, and applies `change` to the record of attempts.
    fn rename(&mut self, flag: Option<char>, change: impl FnOnce(&mut AttemptRecord)) -> io::Result<()> {
        let mut record = self.entry.record();
        change(&mut record);
        self.entry = self.with_entry(|message| message.maildir.rename(&message.entry, flag, &record))?;
        Ok(())
    }

    /// Calls `act`, which uses the file by its name. If a mail reader has moved or flagged the file, finds its new name
    /// and calls `act` again. If the file does not exist any more, returns the error.
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

    /// Records `next_attempt` as the file's time of modification.
    ///
    /// # Errors
    /// The system's: the time cannot be set.
    pub fn record_next_attempt(&self) -> io::Result<()> {
        self.next_attempt.map_or(Ok(()), |next_attempt| self.file.set_modified(next_attempt))
    }

    /// Whether the sender has received a DSN about the delay.
    pub fn is_delay_reported(&self) -> bool {
        self.entry.has(DELAY_REPORTED)
    }

    /// Records that the sender has received a DSN about the delay, so that there is no second one.
    ///
    /// # Errors
    /// The file does not exist any more, or cannot be renamed.
    pub fn mark_delay_reported(&mut self) -> io::Result<()> {
        self.rename(Some(DELAY_REPORTED), |_| {})
    }
}

/// How often to look again for a file that a mail reader keeps renaming.
const FIND_ATTEMPTS: usize = 5;

/// Counts an attempt. If the recorded time of the first attempt is impossible, because the clock was wrong then,
/// replaces it.
fn count_attempt(record: &mut AttemptRecord, now: Timestamp) {
    record.first_offered = record.first_offered.filter(|time| time.is_possible(now)).or(Some(now));
    record.attempts = record.attempts.saturating_add(1);
}

/// The record of a message after it has ended one more session. `waits`: see [`QueuedMessage::waits`].
fn ended_once_more(before: Option<EndedSessions>, waits: bool, now: Timestamp) -> EndedSessions {
    let sessions = before.map_or(0, |before| before.sessions).saturating_add(1);
    let skip = match sessions.checked_sub(SESSIONS_WITHOUT_SKIP + 1) {
        Some(more) if !waits => 2u32.saturating_pow(more).min(SKIPPED_CALLS_LIMIT),
        _ => 0,
    };
    EndedSessions { sessions, skip, at: now }
}

/// Whether the calls of this time skip a message, because it has ended sessions.
pub(super) fn is_skipped(entry: &Entry, now: Timestamp) -> bool {
    entry.ended().is_some_and(|ended| ended.skip > 0 && retry::age(ended.at, now) < SKIP_LIMIT && ended.at <= now)
}

/// Opens a plain file, also for writing if the system permits that. The inner error names what else the entry is: a
/// symbolic link could lead to any file of the system, and a pipe would block the session for ever.
///
/// # Errors
/// The system's.
pub(super) fn open_file(path: &Path) -> io::Result<Result<File, &'static str>> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let open = |write| OpenOptions::new().read(true).write(write).custom_flags(flags.bits().cast_signed()).open(path);
    let opened = open(true).or_else(|error| match error.kind() {
        io::ErrorKind::NotFound => Err(error),
        // This user may not write the file, or the disk is read-only: the message can be sent nevertheless.
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
        _ => Ok(Err("it is not a plain file")),
    }
}

/// The lock on a message of a shared directory, until it is dropped.
pub(super) struct MessageLock(File);

impl Drop for MessageLock {
    fn drop(&mut self) {
        // Closing is not enough: between fork and exec a child process has a copy of the descriptor, which keeps the
        // lock.
        let _ = self.0.unlock();
    }
}

/// Locks a file of a shared directory that was opened by this name. `None`: the file no longer has the name.
///
/// # Errors
/// `WouldBlock`: another session has the message; otherwise the system's.
pub(super) fn lock_opened(file: &File, path: &Path) -> io::Result<Option<MessageLock>> {
    let copy = file.try_clone().map_err(|error| with_path(path, error))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(is_busy(path)),
        Err(TryLockError::Error(error)) => return Err(with_path(path, error)),
    }
    let lock = MessageLock(copy);
    // Another session may have settled the message between open and lock: it must not be sent again.
    let named = FileId::of_path(path).ok();
    let has_name = named.is_some_and(|named| FileId::of_file(file).is_ok_and(|opened| opened == named));
    Ok(has_name.then_some(lock))
}

/// The error that another session has the message of this file.
pub(super) fn is_busy(path: &Path) -> io::Error {
    with_path(path, io::Error::new(io::ErrorKind::WouldBlock, "a session has this message"))
}

/// Opens and locks the file of a message in a shared directory. `None`: there is no such file, or it is not a plain
/// file.
///
/// # Errors
/// `WouldBlock`: another session has the message; otherwise the system's.
pub(super) fn lock_file(path: &Path) -> io::Result<Option<MessageLock>> {
    match open_file(path) {
        Ok(Ok(file)) => lock_opened(&file, path),
        Ok(Err(_)) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(with_path(path, error)),
    }
}

/// Reads the envelope at the front of a file, from its present position. The inner error is why the file is not a
/// message.
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

/// Like [`read_envelope`]; `arrived` is the time of arrival if the envelope has none.
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

/// A reply as recorded in the name of a file, with its spaces restored.
pub(super) fn readable_reply(recorded: &str) -> String {
    recorded.replace('_', " ").trim().to_owned()
}

/// The directory of a queue for rejected mail that no DSN can report. The postmaster may look at it.
pub(super) const SET_ASIDE_DIRECTORY: &str = ".refused";

/// Removes files of dead writers in a queue and in its `.refused`.
///
/// # Errors
/// A directory cannot be read, or a file cannot be removed.
pub(super) fn sweep(maildir: &Maildir) -> io::Result<()> {
    maildir.sweep()?;
    set_aside_maildir(maildir).sweep()
}

/// The Maildir `.refused` of a queue.
pub(super) fn set_aside_maildir(maildir: &Maildir) -> Maildir {
    Maildir::new(maildir.path().join(SET_ASIDE_DIRECTORY))
}
