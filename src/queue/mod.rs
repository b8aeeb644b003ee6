//! Mail that waits: one Maildir a domain, an envelope in front of each message.
//!
//! ```text
//! put ──▶ SPOOL/domains/<domain>/new ──▶ hold ─▶ offer ──▶ settle ─┬─ delivered: removed
//!      or SPOOL/outgoing/<domain>/new   (lock)                     ├─ deferred:  stays
//!                                                                  ├─ in doubt:  stays, in cur, flagged
//!                                                                  └─ refused:   removed once the sender is
//!                                                                                told; else to .refused
//! ```
//!
//! Outgoing mail waits for its next attempt: the time of it is the file's time of modification, so it outlives
//! every restart and needs no other record.
//!
//! Nothing that was put is lost: only [`Batch::settle`] removes mail, and only what the next holder has
//! taken. One [`Hold`] at a time has a domain, across processes too; `Drop` lets it go. The queue knows
//! nothing of connections.

pub mod envelope;

use std::collections::{HashSet, VecDeque};
use std::fmt;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

pub use envelope::Envelope;
use envelope::{Parsed, ParsedEnvelope};

use crate::clock::Timestamp;
use crate::ids::Ids;
use crate::mail::address::Domain;
use crate::maildir::{self, DELAY_REPORTED, Entry, IN_DOUBT, Maildir, MessageWriter, for_each_block, with_path};
use crate::smtp::client::{DeliveryResult, OutgoingMessage, RecipientStatus};
use crate::smtp::command::Recipient;
use crate::smtp::content::WireSize;

/// How long one who wants a domain waits for a holder that was asked to give way.
const TAKEOVER_WAIT: Duration = Duration::from_secs(5);

/// No pause between two attempts is longer: the configuration sees to it.
const LONGEST: Duration = crate::config::LONGEST_PAUSE;

/// One message is set aside in so many steps at most: as many as it may have recipients, and then some.
const SET_ASIDE_NAMES: usize = 1000;

/// Where a message goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QueueName {
    /// The mail of a customer's domain.
    Domain(Domain),
    /// The provider's own postmaster (RFC 5321 section 4.5.1).
    Postmaster,
    /// Mail of customers for a domain elsewhere.
    Destination(Domain),
    /// A customer's outgoing mail, for its provider.
    Outgoing,
    /// A customer's mail for a next hop.
    Retry,
}

impl QueueName {
    /// The one domain whose recipients are meant.
    fn domain(&self) -> Option<&Domain> {
        match self {
            QueueName::Domain(domain) | QueueName::Destination(domain) => Some(domain),
            QueueName::Postmaster | QueueName::Outgoing | QueueName::Retry => None,
        }
    }

    /// Whether mail here is sent by us, in our own time.
    fn is_outgoing(&self) -> bool {
        matches!(self, QueueName::Destination(_) | QueueName::Outgoing | QueueName::Retry)
    }
}

impl fmt::Display for QueueName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.domain().map_or("-", Domain::as_str))
    }
}

/// The spool.
#[derive(Clone)]
pub struct Queue {
    spool: PathBuf,
    hostname: String,
    ids: Ids,
    /// A holder that has made no progress for so long gives way to one who asks.
    takeover: Duration,
}

/// Why a domain's mail cannot be had.
#[derive(Debug)]
pub enum LockError {
    /// Another session has it.
    Busy(QueueName),
    Failed(io::Error),
}

impl Queue {
    pub fn new(spool: impl Into<PathBuf>, hostname: &str, ids: Ids, takeover: Duration) -> Queue {
        Queue { spool: spool.into(), hostname: hostname.to_owned(), ids, takeover }
    }

    /// The Maildir of a place.
    pub fn maildir(&self, place: &QueueName) -> Maildir {
        Maildir::new(match place {
            QueueName::Domain(domain) => self.spool.join("domains").join(domain.as_str()),
            QueueName::Postmaster => self.spool.join("postmaster"),
            QueueName::Destination(domain) => self.spool.join("outgoing").join(domain.as_str()),
            QueueName::Outgoing => self.spool.clone(),
            // No domain begins with a dot, and so no folder of mailboxes.
            QueueName::Retry => self.spool.join(".handover"),
        })
    }

    /// Begins a message, a copy for each place; [`Copies::commit`] makes it durable. `head` is what the
    /// content begins with: our `Received`.
    pub fn begin_message(&self, copies: &[(QueueName, Envelope)], head: &str) -> io::Result<MessageWriter> {
        let mut drafts = MessageWriter::default();
        copies.iter().try_for_each(|(place, envelope)| self.add_copy(&mut drafts, place, envelope, head))?;
        Ok(drafts)
    }

    /// A name for a file that nobody else has.
    pub fn unique(&self) -> String {
        self.ids.file_name(&self.hostname)
    }

    /// One copy more of a message.
    pub fn add_copy(
        &self,
        copies: &mut MessageWriter,
        place: &QueueName,
        envelope: &Envelope,
        head: &str,
    ) -> io::Result<()> {
        let lines = envelope.to_header(head);
        // What could never be read again is not taken.
        if lines.len() >= envelope::ENVELOPE_LIMIT {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many recipients for one message"));
        }
        copies.begin(&self.maildir(place), &self.unique(), lines.as_bytes())
    }

    /// Whether so many octets more may come.
    pub fn has_room(&self, octets: u64) -> bool {
        maildir::has_room(&self.spool, octets)
    }

    /// The domains elsewhere that mail was put for.
    pub fn destinations(&self) -> io::Result<Vec<Domain>> {
        let folder = self.spool.join("outgoing");
        let files = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(|error| with_path(&folder, error))?,
        };
        let names = files.filter_map(|file| file.ok()?.file_name().into_string().ok());
        Ok(names.filter_map(|name| Domain::parse(&name)).collect())
    }

    /// When the next attempt for a place is due; `None`: nothing waits there.
    pub fn next_due(&self, place: &QueueName) -> io::Result<Option<SystemTime>> {
        let maildir = self.maildir(place);
        let entries = maildir.entries()?;
        Ok(entries.iter().filter_map(|entry| due(&maildir.file(entry))).min())
    }

    /// Shows each message of a place, without a lock and without touching it; a message that goes meanwhile is
    /// passed over.
    pub fn each(&self, place: &QueueName, mut show: impl FnMut(&QueuedMessage)) -> io::Result<()> {
        let maildir = self.maildir(place);
        for entry in maildir.entries()? {
            match QueuedMessage::open(&maildir, place, entry) {
                Ok(Some(message)) => show(&message),
                Ok(None) => {}
                Err(error) => log::warn!("event=unreadable error={:?}", error.to_string()),
            }
        }
        Ok(())
    }

    /// Locks the mail of all these places, or of none.
    pub fn lock(&self, places: &[QueueName]) -> Result<QueueLock, LockError> {
        self.lock_each(places, |maildir, place| self.lock_one(maildir, place))
    }

    /// Locks the mail of a place whose holders never give way, without waiting.
    pub fn try_lock(&self, place: &QueueName) -> Result<QueueLock, LockError> {
        self.lock_each(std::slice::from_ref(place), lock_now)
    }

    fn lock_each(
        &self,
        places: &[QueueName],
        lock: impl Fn(&Maildir, &QueueName) -> Result<File, LockError>,
    ) -> Result<QueueLock, LockError> {
        let mut held = Vec::with_capacity(places.len());
        for place in places {
            let maildir = self.maildir(place);
            maildir.create().map_err(LockError::Failed)?;
            let lock = lock(&maildir, place)?;
            if let Err(error) = maildir.sweep().and_then(|()| rejected_maildir(&maildir).sweep()) {
                log::warn!("event=sweep-failed place={place} error={:?}", error.to_string());
            }
            let (waiting, touched) = (VecDeque::new(), HashSet::new());
            held.push(LockedQueue { name: place.clone(), maildir, lock, waiting, offered: touched });
        }
        // The next place after the last is the first one asked for.
        let current = held.len().saturating_sub(1);
        Ok(QueueLock { queues: held, current })
    }

    /// A lock whose holder may be asked to go.
    fn lock_one(&self, maildir: &Maildir, place: &QueueName) -> Result<File, LockError> {
        let (lock, failed) = (open_lock(maildir)?, |error| lock_failed(maildir, error));
        let wanted = maildir.path().join("odmr.wanted");
        let mut give_up: Option<Instant> = None;
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                Err(TryLockError::Error(error)) => return Err(failed(error)),
                Err(TryLockError::WouldBlock) => {}
            }
            match give_up {
                // A holder at work is left alone; one that made no progress for long is asked to go.
                None if self.is_alive(&lock) => return Err(LockError::Busy(place.clone())),
                None => {
                    log::info!("event=takeover place={place}");
                    File::create(&wanted).map_err(|error| LockError::Failed(with_path(&wanted, error)))?;
                    give_up = Some(Instant::now() + TAKEOVER_WAIT);
                }
                Some(late) if Instant::now() >= late => {
                    let _ = fs::remove_file(&wanted);
                    return Err(LockError::Busy(place.clone()));
                }
                // The kernel tells nobody when a lock is let go, but by a wait without end.
                Some(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
        let _ = fs::remove_file(&wanted);
        let _ = lock.set_modified(SystemTime::now());
        Ok(lock)
    }

    /// Whether the holder of a lock has made progress lately.
    fn is_alive(&self, lock: &File) -> bool {
        let progress = lock.metadata().and_then(|metadata| metadata.modified());
        progress.is_ok_and(|progress| progress.elapsed().is_ok_and(|age| age < self.takeover))
    }
}

/// The mail of some domains, for one session.
pub struct QueueLock {
    queues: Vec<LockedQueue>,
    current: usize,
}

struct LockedQueue {
    name: QueueName,
    maildir: Maildir,
    lock: File,
    waiting: VecDeque<Entry>,
    /// Messages offered in this session and still there: each is offered once. By domain, because nothing
    /// keeps an agent from giving two files in two Maildirs one name.
    offered: HashSet<String>,
}

impl QueueLock {
    pub fn domains(&self) -> impl Iterator<Item = &Domain> {
        self.queues.iter().filter_map(|held| held.name.domain())
    }

    /// Whether there is no mail at all.
    pub fn is_empty(&self) -> io::Result<bool> {
        for held in &self.queues {
            if !held.maildir.is_empty()? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// How many files there are, up to this number.
    pub fn count(&self, limit: usize) -> io::Result<usize> {
        let mut count = 0;
        for held in &self.queues {
            count += held.maildir.count(limit - count)?;
        }
        Ok(count)
    }

    /// The next message, the oldest of a domain first. What arrives meanwhile comes too; `None`: there is
    /// nothing now that was not offered in this session.
    pub fn next_message(&mut self) -> Option<QueuedMessage> {
        let mut refilled = 0;
        while refilled <= self.queues.len() {
            let held = self.queues.get_mut(self.current)?;
            while let Some(entry) = held.waiting.pop_front() {
                held.offered.insert(entry.unique().to_owned());
                match QueuedMessage::open(&held.maildir, &held.name, entry) {
                    Ok(Some(message)) => return Some(message),
                    Ok(None) => {}
                    Err(error) => log::error!("event=unreadable place={} error={:?}", held.name, error.to_string()),
                }
            }
            self.current = (self.current + 1) % self.queues.len();
            let held = &mut self.queues[self.current];
            if let Err(error) = held.refill() {
                log::error!("event=unreadable place={} error={:?}", held.name, error.to_string());
            }
            refilled += 1;
        }
        None
    }

    /// One message of a place, which is not offered again.
    pub fn open_message(&mut self, place: &QueueName, entry: Entry) -> io::Result<Option<QueuedMessage>> {
        let Some(held) = self.queues.iter_mut().find(|held| held.name == *place) else { return Ok(None) };
        held.offered.insert(entry.unique().to_owned());
        QueuedMessage::open(&held.maildir, place, entry)
    }

    /// Whether [`Hold::offer`] has something now.
    pub fn has_message(&mut self) -> bool {
        let Some(message) = self.next_message() else { return false };
        let path = message.maildir.path();
        if let Some(held) = self.queues.iter_mut().find(|held| held.maildir.path() == path) {
            held.offered.remove(message.entry.unique());
            held.waiting.push_front(message.entry);
        }
        true
    }

    /// Tells those who wait that this session is alive.
    pub fn heartbeat(&self) {
        for held in &self.queues {
            let _ = held.lock.set_modified(SystemTime::now());
        }
    }

    /// Whether somebody waits for a domain of this session.
    pub fn takeover_requested(&self) -> bool {
        self.queues.iter().any(|held| held.maildir.path().join("odmr.wanted").exists())
    }
}

impl LockedQueue {
    /// Lists what waits and was not offered yet.
    fn refill(&mut self) -> io::Result<()> {
        let mut entries = self.maildir.entries()?;
        let mut superseded = Vec::new();
        for pair in entries.windows(2).filter(|pair| pair[0].unique() == pair[1].unique()) {
            superseded.extend(self.superseded(&pair[0], &pair[1])?);
        }
        for entry in superseded {
            log::warn!("event=half-settled file={}", entry.name);
            self.maildir.remove(&entry)?;
            entries.retain(|other| *other != entry);
        }
        // What has failed at its very end is tried last: the same letter may fail again, and those behind it
        // should not wait for it.
        entries.sort_by_key(|entry| entry.has(IN_DOUBT));
        let now = SystemTime::now();
        let is_due =
            |entry: &Entry| !self.name.is_outgoing() || due(&self.maildir.file(entry)).is_none_or(|due| due <= now);
        let touched = &self.offered;
        let fresh = entries.into_iter().filter(|entry| !touched.contains(entry.unique()) && is_due(entry));
        self.waiting = fresh.collect();
        Ok(())
    }

    /// After a crash in `settle` a message may stand there twice, before and after: the one without the
    /// recipients that have it already is the truth. `None`: neither is that of the other.
    fn superseded(&self, one: &Entry, other: &Entry) -> io::Result<Option<Entry>> {
        let (Some(some), Some(others)) = (self.head(one)?, self.head(other)?) else {
            return Ok(None);
        };
        // Only a file that we have written can be what is left of another.
        let within = |few: &ParsedEnvelope, many: &ParsedEnvelope| {
            let (some, all) = (&few.envelope.recipients, &many.envelope.recipients);
            few.ours && some.len() < all.len() && some.iter().all(|recipient| all.contains(recipient))
        };
        Ok(match (within(&some, &others), within(&others, &some)) {
            (true, _) => Some(other.clone()),
            (_, true) => Some(one.clone()),
            _ => None,
        })
    }

    /// `None`: this is no message for anybody here.
    fn head(&self, entry: &Entry) -> io::Result<Option<ParsedEnvelope>> {
        let Ok(Some(file)) = open_file(&self.maildir.file(entry)) else {
            return Ok(None);
        };
        read_head(&file, entry, self.name.domain())
    }
}

/// One message offered, and the recipients it is offered for.
pub struct QueuedMessage {
    maildir: Maildir,
    entry: Entry,
    file: File,
    content: u64,
    pub envelope: Envelope,
    /// Octets of the content on the wire.
    pub size: u64,
    /// Octets above 127 are among them.
    pub eight_bit: bool,
    /// When those that are deferred are tried again; only outgoing mail looks at it.
    pub next_attempt: Option<SystemTime>,
    /// The senders of those that are refused have been told, or want to hear nothing.
    pub rejections_reported: bool,
}

/// The content, from where the last call ended.
impl Read for QueuedMessage {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read(buffer).map_err(|error| with_path(&self.maildir.file(&self.entry), error))
    }
}

impl QueuedMessage {
    /// `None`: the file is gone, or is no message for anybody here; that is logged.
    fn open(maildir: &Maildir, place: &QueueName, entry: Entry) -> io::Result<Option<QueuedMessage>> {
        let path = maildir.file(&entry);
        let file = match open_file(&path) {
            Ok(Some(file)) => file,
            Ok(None) => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(with_path(&path, error)),
        };
        let Some(head) = read_head(&file, &entry, place.domain()).map_err(|error| with_path(&path, error))? else {
            log::warn!("event=no-recipients place={place} file={}", path.display());
            return Ok(None);
        };
        let content = head.octets as u64;
        // Only names that we gave can be believed.
        let (size, eight_bit) = match entry.wire_size().filter(|_| head.ours) {
            Some(size) => {
                // A last line without its end gets one on the wire.
                let open = !ends_with_line(&file, content).map_err(|error| with_path(&path, error))?;
                let size = size.saturating_sub(content + head.lines as u64);
                (if open { size + 2 } else { size }, entry.eight_bit())
            }
            None => measure(&file, content).map_err(|error| with_path(&path, error))?,
        };
        let mut message = QueuedMessage {
            maildir: maildir.clone(),
            entry,
            file,
            content,
            envelope: head.envelope,
            size,
            eight_bit,
            next_attempt: None,
            rejections_reported: false,
        };
        message.rewind().map_err(|error| with_path(&path, error))?;
        Ok(Some(message))
    }

    /// The name that stays the same whatever happens to the file.
    pub fn unique(&self) -> &str {
        self.entry.unique()
    }

    /// The envelope as an SMTP client sends it.
    pub fn outgoing_message(&self) -> OutgoingMessage {
        let envelope = &self.envelope;
        OutgoingMessage {
            from: envelope.from.clone(),
            recipients: envelope.recipients.clone(),
            size: self.size,
            body: envelope.body,
            eight_bit: self.eight_bit,
            utf8: envelope.utf8,
            ret: envelope.ret,
            envelope_id: envelope.envelope_id.clone(),
        }
    }

    /// Back to where the content begins.
    pub fn rewind(&mut self) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(self.content)).map(drop)
    }

    /// It cannot be read: it goes to the end of the line, so that others behind it are sent.
    pub fn move_to_end(&self) {
        if let Err(error) = self.maildir.flag(&self.entry, IN_DOUBT) {
            log::error!("event=unreadable error={:?}", error.to_string());
        }
    }

    /// Acts on what became of the message: the one place where mail is removed. `outcome` has a fate for
    /// each recipient in order; those it does not reach are untried.
    pub fn settle(mut self, result: &DeliveryResult, lock: &mut QueueLock) -> io::Result<()> {
        let recipients = std::mem::take(&mut self.envelope.recipients);
        let (mut left, mut refused, mut marks) = (Vec::new(), Vec::new(), String::new());
        let (mut in_doubt, mut again) = (false, false);
        let all = recipients.len();
        for (number, recipient) in recipients.into_iter().enumerate() {
            match result.recipients.get(number) {
                Some(RecipientStatus::Sent(_)) => {}
                Some(RecipientStatus::Rejected(reply)) => {
                    marks.push_str(&format!("X-ODMR-Refused: <{}> {reply}\n", recipient.mailbox));
                    refused.push(recipient);
                }
                status => {
                    in_doubt |= matches!(status, Some(RecipientStatus::InDoubt));
                    // RFC 5321 section 4.5.3.1.10: what was one recipient too many goes in another
                    // transaction, at once.
                    again |= match status {
                        Some(RecipientStatus::Deferred(reply)) => matches!(reply.code(), 452 | 552),
                        _ => status.is_none(),
                    };
                    left.push(recipient);
                }
            }
        }
        if left.len() == all {
            // Where nobody was taken it was not that they are too many.
            return self.keep(&self.entry, in_doubt, false);
        }
        if !refused.is_empty() && !self.rejections_reported {
            self.set_aside(&refused, &marks)?;
        }
        let nobody_left = left.is_empty();
        if !nobody_left {
            let maildir = self.maildir.clone();
            let unique = self.entry.unique().to_owned();
            for mut entry in self.rewrite(&maildir, &unique, left, "")? {
                if self.entry.has(DELAY_REPORTED) {
                    entry = maildir.flag(&entry, DELAY_REPORTED)?;
                }
                self.keep(&entry, in_doubt, again)?;
            }
        }
        self.maildir.remove(&self.entry)?;
        if again || nobody_left {
            let path = self.maildir.path();
            if let Some(held) = lock.queues.iter_mut().find(|held| held.maildir.path() == path) {
                held.offered.remove(self.entry.unique());
            }
        }
        Ok(())
    }

    /// What stays: its next attempt, its flag.
    fn keep(&self, entry: &Entry, in_doubt: bool, again: bool) -> io::Result<()> {
        if let Some(next_try) = self.next_attempt.filter(|_| !again) {
            let path = self.maildir.file(entry);
            let file = File::open(&path).and_then(|file| file.set_modified(next_try));
            file.map_err(|error| with_path(&path, error))?;
        }
        if in_doubt { self.maildir.flag(entry, IN_DOUBT).map(drop) } else { Ok(()) }
    }

    /// Makes the next attempt at the file as it stands due at `next_try`.
    pub fn record_next_attempt(&self) -> io::Result<()> {
        self.keep(&self.entry, false, false)
    }

    /// When the next attempt is due; only outgoing mail has one.
    pub fn due(&self) -> Option<SystemTime> {
        due(&self.maildir.file(&self.entry))
    }

    /// Whether the sender was told that the message is late.
    pub fn is_delay_reported(&self) -> bool {
        self.entry.has(DELAY_REPORTED)
    }

    /// Notes that the sender was told that the message is late.
    pub fn mark_delay_reported(&mut self) -> io::Result<()> {
        self.entry = self.maildir.flag(&self.entry, DELAY_REPORTED)?;
        Ok(())
    }

    /// A copy for those who were refused. Others may have been refused in an earlier session, and their copy
    /// has a name of the same length: the next name is as good. After a crash one may stand there twice, and
    /// that is better than never.
    fn set_aside(&mut self, refused: &[Recipient], marks: &str) -> io::Result<()> {
        let folder = rejected_maildir(&self.maildir);
        let mut unique = self.entry.unique().to_owned();
        for number in 1..=SET_ASIDE_NAMES {
            match self.rewrite(&folder, &unique, refused.to_vec(), marks) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && number < SET_ASIDE_NAMES => {}
                other => return other.map(drop),
            }
            unique = format!("{}.r{number}", self.entry.unique());
        }
        Ok(())
    }

    /// The message again, durable, for these recipients only.
    fn rewrite(
        &mut self,
        maildir: &Maildir,
        unique: &str,
        recipients: Vec<Recipient>,
        marks: &str,
    ) -> io::Result<Vec<Entry>> {
        self.envelope.recipients = recipients;
        // The lock on the domain is ours, so what stands there was left by one who was killed here.
        maildir.discard(unique)?;
        let mut copy = MessageWriter::default();
        copy.begin(maildir, unique, self.envelope.to_header(marks).as_bytes())?;
        self.rewind()?;
        for_each_block(self, |piece| copy.write(piece))?;
        copy.commit()
    }
}

/// When the next attempt at a message is due. No pause is as long as `LONGEST`: what is due later was put off by a
/// clock that went wrong, and is due now.
fn due(path: &Path) -> Option<SystemTime> {
    let (due, now) = (fs::metadata(path).and_then(|metadata| metadata.modified()).ok()?, SystemTime::now());
    Some(if due > now + LONGEST { SystemTime::UNIX_EPOCH } else { due })
}

fn lock_now(maildir: &Maildir, place: &QueueName) -> Result<File, LockError> {
    let lock = open_lock(maildir)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(LockError::Busy(place.clone())),
        Err(TryLockError::Error(error)) => Err(lock_failed(maildir, error)),
    }
}

fn open_lock(maildir: &Maildir) -> Result<File, LockError> {
    let mut options = OpenOptions::new();
    let opened = options.create(true).truncate(false).write(true).mode(0o600).open(lock_of(maildir));
    opened.map_err(|error| lock_failed(maildir, error))
}

fn lock_failed(maildir: &Maildir, error: io::Error) -> LockError {
    LockError::Failed(with_path(&lock_of(maildir), error))
}

fn lock_of(maildir: &Maildir) -> PathBuf {
    maildir.path().join("odmr.lock")
}

/// Where copies for refused recipients wait for somebody to look at them.
fn rejected_maildir(maildir: &Maildir) -> Maildir {
    Maildir::new(maildir.path().join(".refused"))
}

/// Opens a plain file; anything else in a Maildir is nobody's mail, and a pipe there would wait for ever.
fn open_file(path: &Path) -> io::Result<Option<File>> {
    if !fs::symlink_metadata(path)?.is_file() {
        return Ok(None);
    }
    File::open(path).map(Some)
}

/// The envelope at the front of a file.
fn read_head(file: &File, entry: &Entry, domain: Option<&Domain>) -> io::Result<Option<ParsedEnvelope>> {
    let arrived = file.metadata()?.modified()?.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let arrived = Timestamp::from_seconds(i64::try_from(arrived.as_secs()).unwrap_or(0));
    let mut front = vec![0; 4096];
    let mut filled = 0;
    loop {
        let octets = file.read_at(&mut front[filled..], filled as u64)?;
        filled += octets;
        match envelope::parse(&front[..filled], octets == 0, domain, entry.unique(), arrived) {
            Parsed::Head(head) => return Ok(Some(head)),
            Parsed::NoRecipients => return Ok(None),
            Parsed::More if filled >= envelope::ENVELOPE_LIMIT => return Ok(None),
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

/// The size on the wire of what stands behind the envelope, and whether it takes eight bits.
fn measure(file: &File, from: u64) -> io::Result<(u64, bool)> {
    let mut sizer = WireSize::new();
    let mut eight_bit = false;
    let mut buffer = vec![0; 32 * 1024];
    let mut offset = from;
    loop {
        match file.read_at(&mut buffer, offset)? {
            0 => return Ok((sizer.finish(), eight_bit)),
            octets => {
                sizer.feed(&buffer[..octets]);
                eight_bit |= !buffer[..octets].is_ascii();
                offset += octets as u64;
            }
        }
    }
}

#[cfg(test)]
mod tests;
