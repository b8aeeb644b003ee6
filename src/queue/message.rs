//! One message of a queue: reading it, and settling it after an attempt.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::SystemTime;

use super::envelope::{self, ENVELOPE_LIMIT, Parsed, ParsedEnvelope, QueuedEnvelope, UnreadRecipient};
use super::name::QueueName;
use super::retry;
use crate::clock::Timestamp;
use crate::maildir::spooled::Content;
use crate::maildir::{DELAY_REPORTED, Entry, IN_DOUBT, Maildir, MessageWriter, for_each_block, with_path};
use crate::net::trace::quoted;
use crate::smtp::client::OutgoingMessage;
use crate::smtp::command::{Envelope, Recipient};
use crate::smtp::content::WireSize;
use crate::smtp::status::{DeliveryResult, RecipientStatus};

/// Names tried for the copy of a message for rejected recipients: one for each recipient that it may have.
const REJECTED_NAMES: usize = 1000;

/// One message, and the recipients that it is offered for.
pub struct QueuedMessage {
    maildir: Maildir,
    entry: Entry,
    file: File,
    /// Where the content begins, in octets.
    content: u64,
    /// The id of the message in the log and in its `Received` field.
    pub id: String,
    /// When it has arrived, or if that time is impossible when it was first seen.
    pub arrived: Timestamp,
    /// Its time of arrival is impossible, and it was not seen before.
    unseen: bool,
    pub envelope: Envelope,
    /// The fields of the recipients for which the file stays; see [`ParsedEnvelope::unread`].
    unread: Vec<u8>,
    /// Octets of the content on the wire.
    pub size: u64,
    /// The content has octets above 127.
    pub eight_bit: bool,
    /// When the next attempt at deferred recipients is due; only a queue with retries uses it.
    pub next_attempt: Option<SystemTime>,
    /// The sender has received a DSN about the rejected recipients, or wants none.
    pub rejections_reported: bool,
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
    /// Opens a message. `now`: the time, by which its time of arrival may be impossible. `None`: the file is gone, or it is
    /// not a message for a recipient of this queue, which is logged.
    ///
    /// # Errors
    /// The file cannot be read; the error names it.
    pub(super) fn open(
        maildir: &Maildir, name: &QueueName, entry: Entry, now: Timestamp,
    ) -> io::Result<Option<QueuedMessage>> {
        let path = maildir.file(&entry);
        let failed = |error| with_path(&path, error);
        let file = match open_file(&path) {
            Ok(Some(file)) => file,
            Ok(None) => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let parsed = read_envelope(&file, &entry, name).map_err(failed)?;
        log_unread(name, &path, parsed.as_ref());
        let Some(parsed) = parsed.filter(|parsed| !parsed.recipients().is_empty()) else { return Ok(None) };
        let QueuedEnvelope { id, arrived: stated, envelope } = parsed.envelope;
        let arrived = retry::arrival(stated, entry.first_seen(), now);
        // While the clock itself is wrong, what the file states must not be lost.
        let unseen = arrived.is_none() && now.is_possible(now);
        let arrived = arrived.unwrap_or(if unseen { now } else { stated });
        let (content, wire_size) = (parsed.octets as u64, entry.wire_size().filter(|_| parsed.ours));
        let mut message = QueuedMessage {
            maildir: maildir.clone(),
            eight_bit: entry.eight_bit(),
            entry,
            file,
            content,
            id,
            arrived,
            unseen,
            envelope,
            unread: parsed.unread.iter().flat_map(UnreadRecipient::to_field).collect(),
            size: 0,
            next_attempt: None,
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
        Ok(Some(message))
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

    /// The name that stays the same when the file is moved or flagged.
    pub fn unique(&self) -> &str {
        self.entry.unique()
    }

    pub(super) fn maildir(&self) -> &Maildir {
        &self.maildir
    }

    pub(super) fn into_entry(self) -> Entry {
        self.entry
    }

    /// The envelope of the message for these recipients.
    pub fn with_recipients(&self, recipients: Vec<Recipient>) -> QueuedEnvelope {
        let envelope = self.envelope.with_recipients(recipients);
        QueuedEnvelope { id: self.id.clone(), arrived: self.arrived, envelope }
    }

    /// The message as an SMTP client sends it.
    pub fn outgoing_message(&self) -> OutgoingMessage {
        OutgoingMessage { envelope: self.envelope.clone(), size: self.size, eight_bit: self.eight_bit }
    }

    /// If the time of arrival is impossible, records in the file's name when the message was first seen. A failure is
    /// logged: the message is offered all the same, and the next session tries again.
    pub(super) fn ensure_arrival(&mut self) {
        if !self.unseen {
            return;
        }
        match self.maildir.record_first_seen(&self.entry, self.arrived) {
            Ok(entry) => (self.entry, self.unseen) = (entry, false),
            Err(error) => log::warn!("event=arrival-not-recorded id={} error={}", self.id, quoted(error)),
        }
    }

    /// Makes the message the last of its queue, because its content cannot be read: the others must not wait for it.
    pub fn move_to_end(&self) {
        if let Err(error) = self.maildir.flag(&self.entry, IN_DOUBT) {
            log::error!("event=unreadable file={} error={}", quoted(&self.entry.name), quoted(error));
        }
    }

    /// Records what became of each recipient, in the order that the module doc of [`queue`](super) describes. This is
    /// the only function that removes mail, but for the second file of a message that a crash here has left twice.
    /// `result` has a status for each recipient in order; recipients without one were not tried. Returns whether this session may offer a message of this name again.
    ///
    /// # Errors
    /// The disk fails. No recipient is lost, but some may receive the message twice.
    pub(super) fn settle(mut self, result: &DeliveryResult) -> io::Result<bool> {
        let recipients = std::mem::take(&mut self.envelope.recipients);
        let (mut open, mut rejected, mut marks) = (Vec::new(), Vec::new(), String::new());
        let (mut in_doubt, mut offer_again) = (false, false);
        let all = recipients.len();
        for (number, recipient) in recipients.into_iter().enumerate() {
            match result.recipients.get(number) {
                Some(RecipientStatus::Sent(_)) => {}
                Some(RecipientStatus::Rejected(reply)) => {
                    marks += &format!("X-ODMR-Refused: <{}> {reply}\n", recipient.mailbox);
                    rejected.push(recipient);
                }
                status => {
                    in_doubt |= matches!(status, Some(RecipientStatus::InDoubt));
                    offer_again |= status.is_none_or(RecipientStatus::is_one_too_many);
                    open.push(recipient);
                }
            }
        }
        if open.len() == all {
            // If every recipient failed, 452 did not mean "too many recipients".
            self.record(&self.entry, in_doubt, false)?;
            return Ok(false);
        }
        if !rejected.is_empty() && !self.rejections_reported {
            self.keep_rejected(&rejected, &marks)?;
        }
        let all_settled = open.is_empty() && self.unread.is_empty();
        if !all_settled {
            let (maildir, unique) = (self.maildir.clone(), self.unique().to_owned());
            let unread = std::mem::take(&mut self.unread);
            for mut entry in self.rewrite(&maildir, &unique, open, &unread)? {
                if self.is_delay_reported() {
                    entry = maildir.flag(&entry, DELAY_REPORTED)?;
                }
                self.record(&entry, in_doubt, offer_again)?;
            }
        }
        self.maildir.remove(&self.entry)?;
        Ok(offer_again || all_settled)
    }

    /// Records the next attempt and the doubt about a message that stays.
    fn record(&self, entry: &Entry, in_doubt: bool, offer_again: bool) -> io::Result<()> {
        if let Some(next_attempt) = self.next_attempt.filter(|_| !offer_again) {
            let path = self.maildir.file(entry);
            let file = File::open(&path).and_then(|file| file.set_modified(next_attempt));
            file.map_err(|error| with_path(&path, error))?;
        }
        if in_doubt { self.maildir.flag(entry, IN_DOUBT).map(drop) } else { Ok(()) }
    }

    /// Records `next_attempt` in the file.
    ///
    /// # Errors
    /// The file is gone, or the disk fails.
    pub fn record_next_attempt(&self) -> io::Result<()> {
        self.record(&self.entry, false, false)
    }

    /// When the next attempt is due; only in a queue with retries. `None`: the file is gone.
    pub fn due(&self) -> Option<SystemTime> {
        retry::due(&self.maildir.file(&self.entry))
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
        self.entry = self.maildir.flag(&self.entry, DELAY_REPORTED)?;
        Ok(())
    }

    /// Keeps a copy in `.refused` for rejected recipients whose sender can receive no DSN. An earlier session may have
    /// kept a copy for other recipients under the same name; then the next name is used.
    fn keep_rejected(&mut self, rejected: &[Recipient], marks: &str) -> io::Result<()> {
        let maildir = rejected_maildir(&self.maildir);
        let mut unique = self.unique().to_owned();
        for number in 1..=REJECTED_NAMES {
            match self.rewrite(&maildir, &unique, rejected.to_vec(), marks.as_bytes()) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && number < REJECTED_NAMES => {}
                other => return other.map(drop),
            }
            unique = format!("{}.r{number}", self.unique());
        }
        Ok(())
    }

    /// Writes the message again, durably, for these recipients only; the envelope ends with the lines `extra`.
    fn rewrite(
        &mut self, maildir: &Maildir, unique: &str, recipients: Vec<Recipient>, extra: &[u8],
    ) -> io::Result<Vec<Entry>> {
        // This session has the lock, so a file of that name was left by one that was killed here.
        maildir.discard(unique)?;
        let mut copy = MessageWriter::default();
        let header = [self.with_recipients(recipients).to_header("").as_bytes(), extra].concat();
        copy.begin(maildir, unique, &header)?;
        self.rewind()?;
        for_each_block(self, |block| copy.write(block))?;
        copy.commit()
    }
}

/// Opens a plain file; `None` for anything else. A pipe in a Maildir would block for ever.
pub(super) fn open_file(path: &Path) -> io::Result<Option<File>> {
    if !fs::symlink_metadata(path)?.is_file() {
        return Ok(None);
    }
    File::open(path).map(Some)
}

/// Reads the envelope at the front of a file that was opened just now. `None`: it has no recipient in the queue's domain.
///
/// # Errors
/// The file cannot be read; `InvalidData` if its `Return-Path` cannot, or its envelope is too long.
pub(super) fn read_envelope(file: &File, entry: &Entry, name: &QueueName) -> io::Result<Option<ParsedEnvelope>> {
    // In a queue with retries the time of modification is that of the next attempt.
    let arrived = match name.retries {
        true => entry.named().unwrap_or(Timestamp::from_seconds(0)),
        false => file.metadata()?.modified()?.into(),
    };
    let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
    let mut front = Vec::with_capacity(4096);
    loop {
        let octets = file.take(front.len().max(4096) as u64).read_to_end(&mut front)?;
        match envelope::parse(&front, octets == 0, name.domain.as_ref(), entry.unique(), arrived) {
            Parsed::Envelope(parsed) => return Ok(Some(parsed)),
            Parsed::More if front.len() < ENVELOPE_LIMIT => {}
            Parsed::More => return Err(invalid("the envelope is too long".to_owned())),
            Parsed::NoReversePath(reason) => return Err(invalid(reason)),
            Parsed::NoRecipients => return Ok(None),
        }
    }
}

/// Logs that a file has recipients for which it stays, or none at all.
fn log_unread(name: &QueueName, path: &Path, parsed: Option<&ParsedEnvelope>) {
    let reasons: Vec<&str> =
        parsed.iter().flat_map(|parsed| &parsed.unread).map(|unread| unread.reason.as_str()).collect();
    let (file, error) = (quoted(path.display()), quoted(reasons.join("; ")));
    if parsed.is_none_or(|parsed| parsed.recipients().is_empty()) {
        log::warn!("event=no-recipients queue={name} file={file} error={error}");
    } else if !reasons.is_empty() {
        log::warn!("event=recipients-left queue={name} file={file} error={error}");
    }
}

/// Where copies for rejected recipients wait for the postmaster.
pub(super) fn rejected_maildir(maildir: &Maildir) -> Maildir {
    Maildir::new(maildir.path().join(".refused"))
}
