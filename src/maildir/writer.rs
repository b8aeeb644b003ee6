//! One message into several Maildirs: all of them get it, or none.
//!
//! Its content is written once while it arrives, into the file of the first copy. The others are made of that at the end, each
//! fsynced and closed before the next. So a message has two open files at most, however many Maildirs it is for, and takes no
//! more than its size on the disk until it is complete. If other users may write into the first copy, a file without a name
//! has the content instead: they must not change what others receive.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::SystemTime;

use super::files::{move_file, sync_directory, sync_names, with_path};
use super::quota::QuotaCheck;
use super::{Entry, Kind, Maildir, continues_field, for_each_block, has_room};

/// Octets of content after which the free space is checked again: its size may not have been announced.
const ROOM_CHECK_INTERVAL: u64 = 1 << 20;

/// Octets of content that are collected for one write. Each connection has so many while its client is sending.
const WRITE_BUFFER: usize = 16 * 1024;

/// What the name of a file tells of what is in it.
#[derive(Clone, Copy, Debug, Default)]
struct ContentInfo {
    octets: u64,
    lines: u64,
    eight_bit: bool,
}

impl ContentInfo {
    fn add(&mut self, octets: &[u8]) {
        self.octets += octets.len() as u64;
        self.lines += octets.iter().filter(|octet| **octet == b'\n').count() as u64;
        self.eight_bit |= !octets.is_ascii();
    }

    /// The same with more octets.
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
    /// The lines that only this copy has, before the content.
    head: Vec<u8>,
    temporary: PathBuf,
    /// `temporary` is a file of this copy.
    exists: bool,
    /// The message, once its file was moved out of `tmp`.
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

    /// Whether other users may write into the file, as far as its mode tells.
    fn is_open_to_others(&self) -> bool {
        self.maildir.mask & 0o022 != 0o022
    }

    /// Creates the file with the content that begins `at` this octet of another one, durably.
    fn make_of(&mut self, content: &mut File, at: u64, modified: Option<SystemTime>) -> io::Result<()> {
        let mut file = self.create()?;
        let written = file.write_all(&self.head).and_then(|()| {
            content.seek(SeekFrom::Start(at))?;
            for_each_block(content, |block| file.write_all(block))
        });
        written.map_err(|error| with_path(&self.temporary, error))?;
        self.sync(&file, modified)
    }

    fn sync(&self, file: &File, modified: Option<SystemTime>) -> io::Result<()> {
        let timed = modified.map_or(Ok(()), |time| file.set_modified(time));
        timed.and_then(|()| file.sync_all()).map_err(|error| with_path(&self.temporary, error))
    }

    /// Moves the file to `new`, under a name with its size on disk and on the wire (Maildir++ `S=` and `W=`)
    /// and, if it has octets above 127, `E=8`.
    fn publish(&mut self, content: ContentInfo) -> io::Result<()> {
        let ContentInfo { octets, lines, eight_bit } = content.with(&self.head);
        let bits = if eight_bit { ",E=8" } else { "" };
        let name = format!("{},S={octets},W={}{bits}", self.unique, octets + lines);
        let entry = Entry { name: name.into(), seen: false };
        let to = self.maildir.file(&entry);
        let publish = || move_file(&self.temporary, &to);
        // A queue may just have been removed: `tmp` stays if a file is in it, but not `new`.
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

/// Writes one message into several Maildirs: each copy begins with lines of its own, and then all have the same content.
/// Dropped before `commit` or `prepare`, it leaves nothing.
#[derive(Debug, Default)]
pub struct MessageWriter {
    copies: Vec<MessageCopy>,
    /// The file of the first copy, or one without a name: that of which the other copies are made at the end.
    file: Option<BufWriter<File>>,
    content: ContentInfo,
    /// Octets of content since the free space was checked.
    unchecked: u64,
    /// The time of modification of the copies, if it is not that of the last write.
    modified: Option<SystemTime>,
}

impl MessageWriter {
    /// Returns whether no copy was begun.
    pub fn is_empty(&self) -> bool {
        self.copies.is_empty()
    }

    /// Begins one more copy with `head`. Begin all copies before content is written: a later one would lack it.
    pub fn begin(&mut self, maildir: &Maildir, unique: &str, head: &[u8]) -> io::Result<()> {
        let mut copy = MessageCopy::new(maildir, unique, head);
        match &mut self.copies[..] {
            [] => {
                let mut file = BufWriter::with_capacity(WRITE_BUFFER, copy.create()?);
                file.write_all(head).map_err(|error| with_path(&copy.temporary, error))?;
                self.file = Some(file);
            }
            [first, others @ ..] => {
                // It is made at the end; if it cannot be, the client must hear that before it sends the content.
                maildir.check_writable()?;
                if others.is_empty() && first.is_open_to_others() {
                    // Without writing what it has collected.
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

    /// Checks that the disks of all copies have room for this many octets of content more, in each copy, and the reserve (see
    /// [`has_room`]).
    ///
    /// # Errors
    ///
    /// `StorageFull` if one of them has not.
    pub fn check_room(&self, octets: u64) -> io::Result<()> {
        let to_make = self.copies.iter().filter(|copy| !copy.exists).count() as u64;
        let needed = self.content.octets.saturating_add(octets).saturating_mul(to_make).saturating_add(octets);
        match self.copies.iter().find(|copy| !has_room(&copy.maildir.path, needed)) {
            Some(copy) => Err(with_path(&copy.maildir.path, io::ErrorKind::StorageFull.into())),
            None => Ok(()),
        }
    }

    /// Appends content, with LF line ends, to all copies. It leaves the reserve free, whatever size was announced.
    ///
    /// Content that begins with white space is no header: a blank line comes before it, so that it does not continue the last
    /// field of the head (RFC 5322 section 2.2.3).
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

    /// Stores all copies durably, or none: [`MessageWriter::prepare`], then [`PreparedMessage::publish`]. Returns an
    /// entry for each copy, in the order in which they were begun.
    pub fn commit(self) -> io::Result<Vec<Entry>> {
        self.prepare()?.publish()
    }

    /// The first half of `commit`: checks the quotas, makes the copies and fsyncs every file. Readers see nothing yet.
    ///
    /// # Errors
    ///
    /// `QuotaExceeded` if a mailbox has no room, `StorageFull` if a disk has none, else the system's. All copies are removed
    /// then.
    pub fn prepare(mut self) -> io::Result<PreparedMessage> {
        let mut quotas = QuotaCheck::default();
        // Quotas first, so that the disk does not work for a message that is rejected.
        for copy in self.copies.iter().filter(|copy| copy.maildir.has_quota()) {
            let octets = self.content.octets + copy.head.len() as u64;
            quotas.admit(&copy.maildir.path, || copy.unique.clone(), octets)?;
        }
        if self.copies.len() > 1 {
            self.check_room(0)?;
        }
        if let (Some(file), [first, others @ ..]) = (self.file.take(), &mut self.copies[..]) {
            let flushed = file.into_inner().map_err(|error| with_path(&first.temporary, error.into_error()));
            let mut file = flushed?;
            let (at, modified) = (if first.exists { first.head.len() as u64 } else { 0 }, self.modified);
            others.iter_mut().try_for_each(|copy| copy.make_of(&mut file, at, modified))?;
            if first.exists { first.sync(&file, modified)? } else { first.make_of(&mut file, at, modified)? }
        }
        Ok(PreparedMessage { copies: self.copies, content: self.content, quotas })
    }
}

/// Copies of a message that are durable in `tmp` and not yet visible. Dropped before `publish`, it leaves nothing.
pub struct PreparedMessage {
    copies: Vec<MessageCopy>,
    content: ContentInfo,
    quotas: QuotaCheck,
}

impl PreparedMessage {
    /// The second half of `commit`: makes all copies visible. It needs no disk space for content. Returns an entry for
    /// each copy, in the order in which they were begun.
    ///
    /// # Errors
    ///
    /// The system's. If one copy cannot be moved, those that were moved are removed again.
    pub fn publish(mut self) -> io::Result<Vec<Entry>> {
        let published = self.copies.iter_mut().try_for_each(|copy| copy.publish(self.content));
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

    /// The directories in which the copies appear, each once: each fsync costs as much as a message.
    fn directories(&self) -> BTreeSet<PathBuf> {
        self.copies.iter().map(|copy| copy.maildir.path.join("new")).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::ids::Ids;

    fn masked<const N: usize>(names: [&str; N], mask: u32) -> (tempfile::TempDir, [Maildir; N]) {
        let directory = tempfile::tempdir().unwrap();
        let maildirs = names.map(|name| Maildir::mailbox(directory.path().join("box").join(name), mask));
        (directory, maildirs)
    }

    fn maildirs<const N: usize>(names: [&str; N]) -> (tempfile::TempDir, [Maildir; N]) {
        masked(names, 0o077)
    }

    /// How many files are in `tmp`, `new` and `cur`.
    fn files(maildir: &Maildir) -> [usize; 3] {
        ["tmp", "new", "cur"].map(|name| fs::read_dir(maildir.path.join(name)).unwrap().count())
    }

    fn begin(maildirs: &[Maildir]) -> MessageWriter {
        let mut writer = MessageWriter::default();
        for (number, maildir) in maildirs.iter().enumerate() {
            writer.begin(maildir, "1", "head\n".repeat(number + 1).as_bytes()).unwrap();
        }
        writer
    }

    #[test]
    fn content_is_written_once_while_it_arrives_and_the_copies_are_made_at_the_end() {
        let line = [&b"x".repeat(998)[..], b"\n"].concat();
        for (content, bits) in [(vec![], ""), (b"Subject: \xff\n\n".to_vec(), ",E=8"), (line.repeat(1500), "")] {
            for (copies, mask) in [(1, 0o077), (1, 0o007), (2, 0o077), (3, 0o077), (3, 0o022), (2, 0o007), (3, 0o002)] {
                let (_directory, maildirs) = masked(["a", "b", "c"], mask);
                let mut writer = begin(&maildirs[..copies]);
                content.chunks(50_000).for_each(|block| writer.write(block).unwrap());
                let in_first = usize::from(copies == 1 || mask & 0o022 == 0o022);
                let arriving = maildirs[..copies].iter().map(|maildir| files(maildir)[0]);
                assert_eq!(arriving.collect::<Vec<_>>(), [in_first, 0, 0][..copies]);
                let prepared = writer.prepare().unwrap();
                maildirs[..copies].iter().for_each(|maildir| assert_eq!(files(maildir), [1, 0, 0]));
                let entries = prepared.publish().unwrap();
                assert_eq!(entries.len(), copies);
                for (number, (maildir, entry)) in maildirs.iter().zip(&entries).enumerate() {
                    assert_eq!(files(maildir), [0, 1, 0]);
                    let expected = ["head\n".repeat(number + 1).as_bytes(), &content].concat();
                    assert!(fs::read(maildir.file(entry)).unwrap() == expected);
                    let lines = expected.iter().filter(|octet| **octet == b'\n').count();
                    let name = format!("1,S={},W={}{bits}", expected.len(), expected.len() + lines);
                    assert_eq!(entry.name.to_str(), Some(name.as_str()));
                }
            }
        }
    }

    #[test]
    fn a_copy_that_cannot_be_created_is_known_before_there_is_content() {
        let (_directory, maildirs) = maildirs(["a", "b", "c"]);
        for broken in 0..3 {
            let mut writer = begin(&maildirs[..broken]);
            maildirs[broken].create().unwrap();
            let tmp = maildirs[broken].path.join("tmp");
            fs::remove_dir(&tmp).unwrap();
            fs::write(&tmp, "not a directory").unwrap();
            writer.begin(&maildirs[broken], "1", b"").unwrap_err();
            drop(writer);
            fs::remove_file(&tmp).unwrap();
            fs::create_dir(&tmp).unwrap();
            maildirs[..=broken].iter().for_each(|maildir| assert_eq!(files(maildir), [0; 3]));
        }
    }

    #[test]
    fn no_copy_is_left_if_one_cannot_be_made() {
        for (broken, mask) in [(0, 0o007), (1, 0o007), (1, 0o077), (2, 0o077)] {
            let (_directory, maildirs) = masked(["a", "b", "c"], mask);
            let mut writer = begin(&maildirs);
            writer.write(b"content").unwrap();
            let theirs = maildirs[broken].temporary("1");
            fs::write(&theirs, "theirs").unwrap();
            assert_eq!(writer.prepare().err().unwrap().kind(), io::ErrorKind::AlreadyExists);
            assert_eq!(fs::read(&theirs).unwrap(), b"theirs");
            fs::remove_file(&theirs).unwrap();
            maildirs.iter().for_each(|maildir| assert_eq!(files(maildir), [0; 3]));
        }
    }

    #[test]
    fn each_copy_needs_room() {
        let (directory, maildirs) = maildirs(["a", "b", "c"]);
        let disk = rustix::fs::statvfs(directory.path()).unwrap();
        let half = disk.f_bavail * disk.f_frsize / 2;
        begin(&maildirs[..1]).check_room(half).unwrap();
        let mut writer = begin(&maildirs);
        writer.write(b"content").unwrap();
        writer.check_room(half / 4).unwrap();
        for octets in [half, u64::MAX] {
            assert_eq!(writer.check_room(octets).unwrap_err().kind(), io::ErrorKind::StorageFull);
        }
    }

    /// Rules: MD-14.
    #[test]
    fn a_directory_that_gets_several_messages_is_fsynced_once() {
        let (_directory, [maildir, other]) = maildirs(["", "other"]);
        let mut writer = MessageWriter::default();
        for (number, maildir) in [&maildir, &other, &maildir, &maildir].into_iter().enumerate() {
            writer.begin(maildir, &number.to_string(), b"").unwrap();
        }
        let prepared = writer.prepare().unwrap();
        assert_eq!(
            prepared.directories().into_iter().collect::<Vec<_>>(),
            [maildir.path().join("new"), other.path().join("new")]
        );
        assert_eq!(prepared.publish().unwrap().len(), 4);
        assert_eq!(files(&maildir), [0, 3, 0]);
    }

    /// Rules: MD-03.
    #[test]
    fn ten_thousand_messages_written_at_once_get_different_names() {
        let (_directory, [maildir]) = maildirs([""]);
        maildir.create().unwrap();
        let ids = Ids::system(|octets| octets.fill(7));
        let unique: Vec<HashSet<String>> = std::thread::scope(|scope| {
            let deliver = || {
                let deliver = |_| {
                    let mut copy = MessageCopy::new(&maildir, &ids.file_name("host"), b"");
                    copy.create().unwrap();
                    copy.publish(ContentInfo::default()).unwrap();
                    copy.unique.clone()
                };
                (0..1250).map(deliver).collect()
            };
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(deliver)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(unique.iter().flatten().collect::<HashSet<_>>().len(), 10_000);
        assert_eq!(files(&maildir), [0, 10_000, 0]);
    }
}
