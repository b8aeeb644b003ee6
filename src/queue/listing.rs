//! The messages of a queue as `odmr queue` shows them. They are read without the lock, and nothing is changed.

use std::fs::{File, Metadata};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::OFlags;

use super::envelope::{Mark, ParsedEnvelope, QueuedEnvelope};
use super::message::{open_file, read_envelope_of, readable_reply};
use super::name::QueueName;
use super::retry;
use super::summary::arrival;
use crate::clock::Timestamp;
use crate::maildir::{AttemptRecord, Entry, IN_DOUBT};

/// A file of a queue: a message, or what other agents have left there.
pub struct ListedMessage {
    /// The name of the file.
    pub entry: Entry,
    /// The id in the log; if the file is not a message, its unique name.
    pub id: String,
    /// When the message arrived; if that time is impossible, when it was first seen.
    pub arrived: Timestamp,
    /// Octets of the file.
    pub bytes: u64,
    /// What the name of the file records of attempts.
    pub record: AttemptRecord,
    /// Some recipients may already have the message.
    pub in_doubt: bool,
    /// When the next attempt is due; only in a queue with retries.
    pub next_attempt: Option<Timestamp>,
    /// The envelope with the open recipients, or why the file is not a message.
    pub envelope: Result<QueuedEnvelope, String>,
    /// The addresses of the settled recipients, each with `done` or `rejected`.
    pub settled: Vec<(String, &'static str)>,
    /// The recipients that cannot be read, as the file has them.
    pub unread: Vec<String>,
    /// Where the content begins in the file, in octets.
    content: u64,
}

impl ListedMessage {
    /// Reads a file; `None`: it is gone.
    ///
    /// # Errors
    /// The file cannot be read.
    pub(super) fn read(name: &QueueName, entry: Entry, now: Timestamp) -> io::Result<Option<ListedMessage>> {
        let path = name.maildir().file(&entry);
        ListedMessage::read_file(name, entry.clone(), now).or_else(|error| match open_file(&path) {
            // A directory, a link or a pipe.
            Ok(Err(kind)) => Ok(Some(ListedMessage::unread(entry, kind.to_owned()))),
            _ => Err(error),
        })
    }

    /// A file that is not a message, for this reason.
    fn unread(entry: Entry, reason: String) -> ListedMessage {
        ListedMessage {
            id: entry.shown_unique(),
            arrived: entry.named().unwrap_or(Timestamp::from_seconds(0)),
            bytes: entry.file_size().unwrap_or(0),
            in_doubt: entry.has(IN_DOUBT),
            next_attempt: None,
            record: entry.record(),
            entry,
            envelope: Err(reason),
            settled: Vec::new(),
            unread: Vec::new(),
            content: 0,
        }
    }

    fn read_file(name: &QueueName, entry: Entry, now: Timestamp) -> io::Result<Option<ListedMessage>> {
        let Some(file) = open(name, &entry)? else { return Ok(None) };
        // A hundred thousand messages should be listed in less than a second: save the system calls that are not
        // needed.
        let known = !name.retries && entry.file_size().is_some() && arrival(&entry, now).is_some();
        let mut metadata = if known { None } else { Some(file.metadata()?) };
        let mut parsed = parse(&file, &entry, name, metadata.as_ref())?;
        if known && !matches!(&parsed, Ok(parsed) if parsed.ours) {
            (&file).rewind()?;
            metadata = Some(file.metadata()?);
            parsed = parse(&file, &entry, name, metadata.as_ref())?;
        }
        let modified = || metadata.as_ref().and_then(|metadata| metadata.modified().ok());
        let mut message = ListedMessage::unread(entry, String::new());
        message.arrived =
            arrival(&message.entry, now).or_else(|| modified().map(Timestamp::from)).unwrap_or(message.arrived);
        message.bytes = metadata.as_ref().map_or(message.bytes, Metadata::len);
        message.next_attempt = modified().filter(|_| name.retries).map(|time| retry::due_at(time).into());
        match parsed {
            Err(reason) => message.envelope = Err(reason),
            Ok(parsed) => {
                let (stated, first_seen) = (parsed.envelope.arrived, message.record.first_seen);
                message.id = parsed.envelope.id.clone();
                message.arrived = retry::arrival_or_now(stated, first_seen, now);
                let word = |mark: &Mark| if *mark == Mark::Rejected { "rejected" } else { "done" };
                message.settled = parsed.settled_addresses.into_iter().zip(parsed.settled.iter().map(word)).collect();
                message.unread =
                    parsed.unread.iter().map(|unread| String::from_utf8_lossy(&unread.text).into_owned()).collect();
                message.content = parsed.octets as u64;
                message.envelope = Ok(QueuedEnvelope { arrived: message.arrived, ..parsed.envelope });
            }
        }
        Ok(Some(message))
    }

    /// The last reply to a recipient that stayed open.
    pub fn last_reply(&self) -> Option<String> {
        self.record.last_reply.as_deref().map(readable_reply)
    }

    /// Whether this is its id in the log, or its unique name.
    pub fn is(&self, id: &str) -> bool {
        self.id == id || self.entry.unique().to_str() == Some(id)
    }

    /// Opens the content, at the first octet after the envelope; `None`: the file is gone, or not a plain file.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn open_content(&self, name: &QueueName) -> io::Result<Option<File>> {
        let mut file = open(name, &self.entry)?;
        if file.is_none()
            && let Some(moved) = name.maildir().find(&self.entry, None)?
        {
            file = open(name, &moved)?;
        }
        let Some(mut file) = file.filter(|file| file.metadata().is_ok_and(|found| found.is_file())) else {
            return Ok(None);
        };
        file.seek(SeekFrom::Start(self.content))?;
        Ok(Some(file))
    }
}

/// Reads the envelope; without `metadata`, the time of arrival counts only if the envelope has it.
fn parse(
    file: &File, entry: &Entry, name: &QueueName, metadata: Option<&Metadata>,
) -> io::Result<Result<ParsedEnvelope, String>> {
    let modified = metadata.filter(|_| !name.retries).and_then(|metadata| metadata.modified().ok());
    let arrived = modified.map(Timestamp::from).or_else(|| entry.named()).unwrap_or(Timestamp::from_seconds(0));
    read_envelope_of(file, entry, name, arrived)
}

/// Opens the file of a message for reading; `None`: it is gone.
fn open(name: &QueueName, entry: &Entry) -> io::Result<Option<File>> {
    let path = name.maildir().file(entry);
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    match File::options().read(true).custom_flags(flags).open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        opened => opened.map(Some).map_err(|error| crate::maildir::with_path(&path, error)),
    }
}
