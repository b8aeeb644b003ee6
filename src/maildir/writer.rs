//! Writes one message into several Maildirs: all of them get it, or none.
//!
//! While the content arrives, it is written once, into the file of the first copy. At the end the other copies are made
//! of that file, each fsynced and closed before the next. So for any number of Maildirs a message has at most two open
//! files, and needs its size on the disk only once until it is complete. If other users may write into the first copy,
//! the content is written into a file without a name instead, so that they cannot change what others receive.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use super::files::{move_file, sync_directory, sync_names, with_path};
use super::quota::{QuotaCheck, Usage};
use super::usage::{UsageLimit, lock_and_add};
use super::{Entry, Kind, Maildir, continues_field, for_each_block, has_room};

/// Octets of content after which the free space is checked again: the client may not have announced the size.
const ROOM_CHECK_INTERVAL: u64 = 1 << 20;

/// Octets of content that are collected for one write. Each connection has such a buffer while its client sends
/// content.
const WRITE_BUFFER: usize = 16 * 1024;

/// The facts about the content that the name of a file has.
#[derive(Clone, Copy, Debug, Default)]
struct ContentInfo {
    octets: u64,
    /// The number of LFs that get a CR on the wire.
    lines: u64,
    eight_bit: bool,
    ends_in_cr: bool,
}

impl ContentInfo {
    fn add(&mut self, octets: &[u8]) {
        self.octets += octets.len() as u64;
        for part in octets.split_inclusive(|octet| *octet == b'\n') {
            let has_cr = part.ends_with(b"\r\n") || part == b"\n" && self.ends_in_cr;
            self.lines += u64::from(part.ends_with(b"\n") && !has_cr);
            self.ends_in_cr = part.ends_with(b"\r");
        }
        self.eight_bit |= !octets.is_ascii();
    }

    /// The facts with more octets.
    fn with(mut self, octets: &[u8]) -> ContentInfo {
        self.add(octets);
        self
    }
}

/// One copy of a message, for one Maildir. Its file is removed if it is dropped before it is published.
#[derive(Debug)]
struct MessageCopy {
    maildir: Maildir,
    unique: String,
    /// The lines before the content that only this copy has.
    head: Vec<u8>,
    /// The path of the file in `tmp`.
    temporary: PathBuf,
    /// This copy has created `temporary`.
    exists: bool,
    /// The message, after its file was moved to `new`.
    moved: Option<Entry>,
}

impl MessageCopy {
    fn new(maildir: &Maildir, unique: &str, head: &[u8]) -> MessageCopy {
        let temporary = maildir.temporary(unique);
        let (maildir, unique, head) = (maildir.clone(), unique.to_owned(), head.to_owned());
        MessageCopy { maildir, unique, head, temporary, exists: false, moved: None }
    }

    /// Creates the file.
    fn create(&mut self) -> io::Result<File> {
        let mode = 0o666 & !self.maildir.mask;
        let file = self.maildir.create_temporary(&self.unique, OpenOptions::new().read(true).mode(mode))?;
        self.exists = true;
        Ok(file)
    }

    /// Removes the file, if there is one.
    fn remove(&mut self) -> io::Result<()> {
        if self.exists {
            fs::remove_file(&self.temporary).map_err(|error| with_path(&self.temporary, error))?;
            self.exists = false;
        }
        Ok(())
    }

    /// Whether other users may write into the file, according to its mode.
    fn is_open_to_others(&self) -> bool {
        self.maildir.mask & 0o022 != 0o022
    }

    /// Creates the file and fsyncs it. The content begins `at` this octet of another file, and must have this many
    /// `octets`.
    ///
    /// # Errors
    /// `UnexpectedEof` if there are fewer: the disk has failed, or another process has truncated the file. Without this
    /// check, half a message would be stored.
    fn make_of(&mut self, content: &mut File, at: u64, octets: u64, modified: Option<SystemTime>) -> io::Result<()> {
        let mut file = self.create()?;
        let written = file.write_all(&self.head).and_then(|()| {
            content.seek(SeekFrom::Start(at))?;
            let mut copied = 0;
            for_each_block(content, |block| {
                copied += block.len() as u64;
                file.write_all(block)
            })?;
            if copied == octets { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
        });
        written.map_err(|error| with_path(&self.temporary, error))?;
        self.sync(&file, modified)
    }

    fn sync(&self, file: &File, modified: Option<SystemTime>) -> io::Result<()> {
        let timed = modified.map_or(Ok(()), |time| file.set_modified(time));
        timed.and_then(|()| file.sync_all()).map_err(|error| with_path(&self.temporary, error))
    }

    /// Moves the file to `new`, under a name with its size on disk and on the wire (`S=` and `W=` of Maildir++) and, if
    /// it has octets above 127, `E=8`.
    fn publish(&mut self, content: ContentInfo) -> io::Result<()> {
        let ContentInfo { octets, lines, eight_bit, .. } = content.with(&self.head);
        let bits = if eight_bit { ",E=8" } else { "" };
        let name = format!("{},S={octets},W={}{bits}", self.unique, octets + lines);
        let entry = Entry { name: name.into(), seen: false };
        let to = self.maildir.file(&entry);
        let publish = || move_file(&self.temporary, &to);
        // Another process may be removing the queue: `tmp` stays because a file is in it, but `new` may not exist.
        if self.maildir.kind == Kind::Queue {
            self.maildir.remade(publish)?
        } else {
            publish()?
        };
        self.moved = Some(entry);
        Ok(())
    }
}

impl Drop for MessageCopy {
    fn drop(&mut self) {
        if self.moved.is_none() {
            let _ = self.remove();
        }
    }
}

/// Writes one message into several Maildirs. Each copy begins with its own lines, then all have the same content. If
/// the writer is dropped before `commit` or `prepare`, no file is left.
#[derive(Debug, Default)]
pub struct MessageWriter {
    copies: Vec<MessageCopy>,
    /// The file of which the other copies are made at the end: that of the first copy, or one without a name.
    file: Option<BufWriter<File>>,
    content: ContentInfo,
    /// Octets of content since the free space was checked.
    unchecked: u64,
    /// Octets that must stay free on the disk of each copy.
    reserve: u64,
    /// The time of modification of the copies; `None`: that of the last write.
    modified: Option<SystemTime>,
    limits: CountedCopies,
}

/// The limits in which the copies of a message count.
#[derive(Debug, Default)]
struct CountedCopies {
    /// Each limit with the index of a copy that counts in it.
    of_copies: Vec<(usize, Arc<UsageLimit>)>,
    /// A message that exceeds a limit is not stored.
    enforced: bool,
}

impl MessageWriter {
    /// Returns whether no copy was begun.
    pub fn is_empty(&self) -> bool {
        self.copies.is_empty()
    }

    /// Begins one more copy with `head`. Begin all copies before content is written: a copy that is begun after that
    /// would lack it.
    ///
    /// # Errors
    /// The file of the first copy cannot be created, or `tmp` of a further copy cannot be written to.
    pub fn begin(&mut self, maildir: &Maildir, unique: &str, head: &[u8]) -> io::Result<()> {
        let mut copy = MessageCopy::new(maildir, unique, head);
        match &mut self.copies[..] {
            [] => {
                let mut file = BufWriter::with_capacity(WRITE_BUFFER, copy.create()?);
                file.write_all(head).map_err(|error| with_path(&copy.temporary, error))?;
                self.file = Some(file);
            }
            [first, others @ ..] => {
                // The copy is made at the end. If it cannot be, reply so before the client sends the content.
                maildir.check_writable()?;
                if others.is_empty() && first.is_open_to_others() {
                    // Drop the buffer without writing it.
                    self.file.take().map(BufWriter::into_parts);
                    first.remove()?;
                    let file = first.maildir.unnamed_file(unique)?;
                    self.file = Some(BufWriter::with_capacity(WRITE_BUFFER, file));
                }
            }
        }
        self.copies.push(copy);
        Ok(())
    }

    /// Gives all copies this time of modification.
    pub fn set_modified(&mut self, time: SystemTime) {
        self.modified = Some(time);
    }

    /// Counts the copy that was begun last in a limit.
    pub fn count_in(&mut self, limit: &Arc<UsageLimit>) {
        self.limits.of_copies.push((self.copies.len() - 1, limit.clone()));
    }

    /// Makes [`PreparedMessage::publish`] fail if the message exceeds a limit in which a copy counts. Otherwise it only
    /// counts.
    pub fn enforce_limits(&mut self) {
        self.limits.enforced = true;
    }

    /// Checks that the disks of all copies have room for this many more octets of content in each copy, and for the
    /// reserve. The reserve is checked again while content is written, because a client may send more than it has
    /// announced.
    ///
    /// # Errors
    /// `StorageFull` if a disk does not have the room.
    pub fn keep_free(&mut self, reserve: u64, octets: u64) -> io::Result<()> {
        self.reserve = reserve;
        self.check_room(octets)
    }

    fn check_room(&self, octets: u64) -> io::Result<()> {
        let to_make = self.copies.iter().filter(|copy| !copy.exists).count() as u64;
        let needed = self.content.octets.saturating_add(octets).saturating_mul(to_make).saturating_add(octets);
        match self.copies.iter().find(|copy| !has_room(&copy.maildir.path, needed, self.reserve)) {
            Some(copy) => Err(with_path(&copy.maildir.path, io::ErrorKind::StorageFull.into())),
            None => Ok(()),
        }
    }

    /// Appends content, with LF line ends, to all copies.
    ///
    /// Content that begins with white space gets a blank line before it: otherwise it would continue the last field of
    /// the head (RFC 5322 section 2.2.3).
    ///
    /// # Errors
    /// `StorageFull` if a disk has no room left; otherwise the file cannot be written.
    pub fn write(&mut self, octets: &[u8]) -> io::Result<()> {
        if self.content.octets == 0 && continues_field(octets) {
            self.append(b"\n")?;
        }
        self.unchecked += octets.len() as u64;
        if self.unchecked >= ROOM_CHECK_INTERVAL {
            self.unchecked = 0;
            self.check_room(ROOM_CHECK_INTERVAL)?;
        }
        self.append(octets)
    }

    fn append(&mut self, octets: &[u8]) -> io::Result<()> {
        self.content.add(octets);
        let (Some(file), [first, ..]) = (&mut self.file, &self.copies[..]) else { return Ok(()) };
        file.write_all(octets).map_err(|error| with_path(&first.temporary, error))
    }

    /// Commits all copies, or none: [`MessageWriter::prepare`], then [`PreparedMessage::publish`]. Returns an entry for
    /// each copy, in the order in which they were begun.
    ///
    /// # Errors
    /// Those of these two functions.
    pub fn commit(self) -> io::Result<Vec<Entry>> {
        self.prepare()?.publish()
    }

    /// The first half of `commit`: checks the quotas, makes the copies and fsyncs every file. Readers see nothing yet.
    ///
    /// # Errors
    /// `QuotaExceeded` if a mailbox has no room, `StorageFull` if a disk has none, otherwise the system's. After an
    /// error no copy is left.
    pub fn prepare(mut self) -> io::Result<PreparedMessage> {
        let mut quotas = QuotaCheck::default();
        // Check the quotas first, so that nothing is written for a message that is rejected.
        for copy in self.copies.iter().filter(|copy| copy.maildir.has_quota()) {
            let octets = self.content.octets + copy.head.len() as u64;
            quotas.admit(&copy.maildir.path, || copy.unique.clone(), octets)?;
        }
        // Other messages may have filled the disk.
        self.check_room(0)?;
        if let (Some(file), [first, others @ ..]) = (self.file.take(), &mut self.copies[..]) {
            let flushed = file.into_inner().map_err(|error| with_path(&first.temporary, error.into_error()));
            let mut file = flushed?;
            let (at, modified) = (if first.exists { first.head.len() as u64 } else { 0 }, self.modified);
            let octets = self.content.octets;
            others.iter_mut().try_for_each(|copy| copy.make_of(&mut file, at, octets, modified))?;
            if !first.exists {
                first.make_of(&mut file, at, octets, modified)?;
            }
            // Sync this file last: only fsync reports that the system could not write the content of which the copies
            // were made.
            first.sync(&file, modified)?;
        }
        Ok(PreparedMessage { copies: self.copies, content: self.content, quotas, limits: self.limits })
    }
}

/// Copies of a message that are fsynced in `tmp` and not yet visible. If this is dropped before `publish`, no file is
/// left.
pub struct PreparedMessage {
    copies: Vec<MessageCopy>,
    content: ContentInfo,
    quotas: QuotaCheck,
    limits: CountedCopies,
}

impl PreparedMessage {
    /// The second half of `commit`: makes all copies visible, and fsyncs their directories. It needs no disk space for
    /// content. Returns an entry for each copy, in the order in which they were begun.
    ///
    /// # Errors
    /// `QuotaExceeded` with [`LimitExceeded`](super::LimitExceeded); the system's, if a copy cannot be moved or a
    /// directory fsynced. After an error no copy is left.
    pub fn publish(mut self) -> io::Result<Vec<Entry>> {
        let amounts = self.amounts();
        let locks = lock_and_add(&amounts, self.limits.enforced)?;
        let published = self.copies.iter_mut().try_for_each(|copy| copy.publish(self.content));
        // Release the limits: other messages that count in them need not wait for the disk.
        drop(locks);
        // The commit point: after the fsync a power cut does not lose the message.
        let sync = |path: &PathBuf| sync_directory(path).and_then(|()| sync_names(path));
        let durable = published.and_then(|()| self.directories().iter().try_for_each(sync));
        if let Err(error) = durable {
            for copy in &self.copies {
                if let Some(entry) = &copy.moved {
                    let _ = copy.maildir.remove(entry);
                }
            }
            return Err(error);
        }
        self.quotas.record();
        Ok(self.copies.iter().filter_map(|copy| copy.moved.clone()).collect())
    }

    /// The usage that the message adds to each limit, in the order of their names.
    fn amounts(&self) -> Vec<(Arc<UsageLimit>, Usage)> {
        let mut amounts: BTreeMap<&str, (Arc<UsageLimit>, Usage)> = BTreeMap::new();
        for (copy, limit) in &self.limits.of_copies {
            let octets = self.content.octets + self.copies[*copy].head.len() as u64;
            let amount = amounts.entry(limit.name()).or_insert_with(|| (limit.clone(), Usage::default()));
            amount.1 = amount.1.plus(Usage { octets, messages: 1 });
        }
        amounts.into_values().collect()
    }

    /// The directories of the copies, each once, because each fsync costs as much as a message.
    fn directories(&self) -> BTreeSet<PathBuf> {
        self.copies.iter().map(|copy| copy.maildir.path.join("new")).collect()
    }
}

#[cfg(test)]
mod tests;
