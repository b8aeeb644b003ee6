//! One message of a queue: reading it, and acting on what became of it.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::SystemTime;

use super::envelope::{self, ENVELOPE_LIMIT, Parsed, ParsedEnvelope, QueuedEnvelope};
use super::name::QueueName;
use super::retry;
use crate::clock::Timestamp;
use crate::mail::address::Domain;
use crate::maildir::spooled::Content;
use crate::maildir::{DELAY_REPORTED, Entry, IN_DOUBT, Maildir, MessageWriter, for_each_block, with_path};
use crate::smtp::client::OutgoingMessage;
use crate::smtp::command::{Envelope, Recipient};
use crate::smtp::content::WireSize;
use crate::smtp::status::{DeliveryResult, RecipientStatus};

/// Names tried for a copy of the same message for rejected recipients: one for each recipient that it may have.
const SET_ASIDE_NAMES: usize = 1000;

/// One message, and the recipients that it is offered for.
pub struct QueuedMessage {
    maildir: Maildir,
    entry: Entry,
    file: File,
    /// Where the content begins, in octets.
    content: u64,
    pub id: String,
    pub arrived: Timestamp,
    pub envelope: Envelope,
    /// Octets of the content on the wire.
    pub size: u64,
    /// The content has octets above 127.
    pub eight_bit: bool,
    /// When the next attempt at deferred recipients is due; only a queue with retries uses it.
    pub next_attempt: Option<SystemTime>,
    /// The sender knows of the rejected recipients, or wants no DSN.
    pub rejections_reported: bool,
}

/// What a settlement means for the session.
pub(super) struct Settled {
    /// A message of this name may be offered again: it is there for other recipients, or it is a new one.
    pub(super) offer_again: bool,
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
    /// `None`: the file is gone, or it is not a message for a recipient of this queue, which is logged.
    pub(super) fn open(maildir: &Maildir, name: &QueueName, entry: Entry) -> io::Result<Option<QueuedMessage>> {
        let path = maildir.file(&entry);
        let failed = |error| with_path(&path, error);
        let file = match open_file(&path) {
            Ok(Some(file)) => file,
            Ok(None) => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let Some(parsed) = read_envelope(&file, &entry, name.domain.as_ref()).map_err(failed)? else {
            log::warn!("event=no-recipients queue={name} file={}", path.display());
            return Ok(None);
        };
        let content = parsed.octets as u64;
        // Only the sizes in names that we gave are right.
        let (size, eight_bit) = match entry.wire_size().filter(|_| parsed.ours) {
            Some(size) => {
                // A last line without its end gets one on the wire.
                let open = !ends_with_line(&file, content).map_err(failed)?;
                let size = size.saturating_sub(content + parsed.lines as u64);
                (if open { size + 2 } else { size }, entry.eight_bit())
            }
            None => measure(&file, content).map_err(failed)?,
        };
        let QueuedEnvelope { id, arrived, envelope } = parsed.envelope;
        let mut message = QueuedMessage {
            maildir: maildir.clone(),
            entry,
            file,
            content,
            id,
            arrived,
            envelope,
            size,
            eight_bit,
            next_attempt: None,
            rejections_reported: false,
        };
        message.rewind().map_err(failed)?;
        Ok(Some(message))
    }

    /// The name that stays the same whatever happens to the file.
    pub fn unique(&self) -> &str {
        self.entry.unique()
    }

    pub(super) fn maildir(&self) -> &Maildir {
        &self.maildir
    }

    pub(super) fn into_entry(self) -> Entry {
        self.entry
    }

    /// The message as an SMTP client sends it.
    pub fn outgoing_message(&self) -> OutgoingMessage {
        OutgoingMessage { envelope: self.envelope.clone(), size: self.size, eight_bit: self.eight_bit }
    }

    /// Offers the message last from now on, as it cannot be read: those after it must not wait for it.
    pub fn move_to_end(&self) {
        if let Err(error) = self.maildir.flag(&self.entry, IN_DOUBT) {
            log::error!("event=unreadable error={:?}", error.to_string());
        }
    }

    /// Acts on what became of the message: the one place where mail is removed. `result` has a status for each recipient
    /// in order; recipients without one were not tried.
    pub(super) fn settle(mut self, result: &DeliveryResult) -> io::Result<Settled> {
        let recipients = std::mem::take(&mut self.envelope.recipients);
        let (mut left, mut rejected, mut marks) = (Vec::new(), Vec::new(), String::new());
        let (mut in_doubt, mut at_once) = (false, false);
        let all = recipients.len();
        for (number, recipient) in recipients.into_iter().enumerate() {
            match result.recipients.get(number) {
                Some(RecipientStatus::Sent(_)) => {}
                Some(RecipientStatus::Rejected(reply)) => {
                    marks.push_str(&format!("X-ODMR-Refused: <{}> {reply}\n", recipient.mailbox));
                    rejected.push(recipient);
                }
                status => {
                    in_doubt |= matches!(status, Some(RecipientStatus::InDoubt));
                    at_once |= status.is_none_or(RecipientStatus::is_one_too_many);
                    left.push(recipient);
                }
            }
        }
        if left.len() == all {
            // If every recipient failed, 452 did not mean "too many recipients".
            self.record(&self.entry, in_doubt, false)?;
            return Ok(Settled { offer_again: false });
        }
        if !rejected.is_empty() && !self.rejections_reported {
            self.set_aside(&rejected, &marks)?;
        }
        let nobody_left = left.is_empty();
        if !nobody_left {
            let maildir = self.maildir.clone();
            let unique = self.entry.unique().to_owned();
            for mut entry in self.rewrite(&maildir, &unique, left, "")? {
                if self.entry.has(DELAY_REPORTED) {
                    entry = maildir.flag(&entry, DELAY_REPORTED)?;
                }
                self.record(&entry, in_doubt, at_once)?;
            }
        }
        self.maildir.remove(&self.entry)?;
        Ok(Settled { offer_again: at_once || nobody_left })
    }

    /// Records the next attempt and the doubt about a message that stays.
    fn record(&self, entry: &Entry, in_doubt: bool, at_once: bool) -> io::Result<()> {
        if let Some(next_attempt) = self.next_attempt.filter(|_| !at_once) {
            let path = self.maildir.file(entry);
            let file = File::open(&path).and_then(|file| file.set_modified(next_attempt));
            file.map_err(|error| with_path(&path, error))?;
        }
        if in_doubt { self.maildir.flag(entry, IN_DOUBT).map(drop) } else { Ok(()) }
    }

    /// Makes the next attempt at the file as it is due at `next_attempt`.
    pub fn record_next_attempt(&self) -> io::Result<()> {
        self.record(&self.entry, false, false)
    }

    /// When the next attempt is due; only in a queue with retries.
    pub fn due(&self) -> Option<SystemTime> {
        retry::due(&self.maildir.file(&self.entry))
    }

    /// Whether the sender has received a DSN about the delay.
    pub fn is_delay_reported(&self) -> bool {
        self.entry.has(DELAY_REPORTED)
    }

    /// Records that the sender has received a DSN about the delay.
    pub fn mark_delay_reported(&mut self) -> io::Result<()> {
        self.entry = self.maildir.flag(&self.entry, DELAY_REPORTED)?;
        Ok(())
    }

    /// Keeps a copy for rejected recipients whose sender cannot be told. An earlier session may have kept one for others
    /// under the same name; then the next name is taken. A crash may leave a copy twice, which is better than none.
    fn set_aside(&mut self, rejected: &[Recipient], marks: &str) -> io::Result<()> {
        let maildir = rejected_maildir(&self.maildir);
        let mut unique = self.entry.unique().to_owned();
        for number in 1..=SET_ASIDE_NAMES {
            match self.rewrite(&maildir, &unique, rejected.to_vec(), marks) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && number < SET_ASIDE_NAMES => {}
                other => return other.map(drop),
            }
            unique = format!("{}.r{number}", self.entry.unique());
        }
        Ok(())
    }

    /// Writes the message again, durably, for these recipients only.
    fn rewrite(
        &mut self, maildir: &Maildir, unique: &str, recipients: Vec<Recipient>, marks: &str,
    ) -> io::Result<Vec<Entry>> {
        let envelope = QueuedEnvelope {
            id: self.id.clone(),
            arrived: self.arrived,
            envelope: self.envelope.with_recipients(recipients),
        };
        // This session has the lock, so a file of that name was left by one that was killed here.
        maildir.discard(unique)?;
        let mut copy = MessageWriter::default();
        copy.begin(maildir, unique, envelope.to_header(marks).as_bytes())?;
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

/// Reads the envelope at the front of a file. `None`: it has no recipient in `domain`.
pub(super) fn read_envelope(file: &File, entry: &Entry, domain: Option<&Domain>) -> io::Result<Option<ParsedEnvelope>> {
    let arrived = file.metadata()?.modified()?.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let arrived = Timestamp::from_seconds(i64::try_from(arrived.as_secs()).unwrap_or(0));
    let mut front = vec![0; 4096];
    let mut filled = 0;
    loop {
        let octets = file.read_at(&mut front[filled..], filled as u64)?;
        filled += octets;
        match envelope::parse(&front[..filled], octets == 0, domain, entry.unique(), arrived) {
            Parsed::Envelope(parsed) => return Ok(Some(parsed)),
            Parsed::NoRecipients => return Ok(None),
            Parsed::More if filled >= ENVELOPE_LIMIT => return Ok(None),
            Parsed::More if filled == front.len() => front.resize(filled * 2, 0),
            Parsed::More => {}
        }
    }
}

/// Whether the content that begins at `from` is empty or ends with a line end.
fn ends_with_line(file: &File, from: u64) -> io::Result<bool> {
    let length = file.metadata()?.len();
    let mut last = [b'\n'];
    if length > from {
        file.read_exact_at(&mut last, length - 1)?;
    }
    Ok(last == [b'\n'])
}

/// The size on the wire of the content that begins at `from`, and whether it has octets above 127.
fn measure(file: &File, from: u64) -> io::Result<(u64, bool)> {
    let mut size = WireSize::new();
    let mut eight_bit = false;
    let mut buffer = vec![0; 32 * 1024];
    let mut offset = from;
    loop {
        match file.read_at(&mut buffer, offset)? {
            0 => return Ok((size.finish(), eight_bit)),
            octets => {
                size.feed(&buffer[..octets]);
                eight_bit |= !buffer[..octets].is_ascii();
                offset += octets as u64;
            }
        }
    }
}

/// Where copies for rejected recipients wait for somebody to look at them.
pub(super) fn rejected_maildir(maildir: &Maildir) -> Maildir {
    Maildir::new(maildir.path().join(".refused"))
}
