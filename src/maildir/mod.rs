//! Files safely into and out of Maildirs (maildir(5)).
//!
//! [`MessageWriter::commit`] makes a message visible in one step: the message is written in `tmp`, its file is
//! fsynced, the file is moved to `new` without ever overwriting another, and `new` is fsynced. Only then is the
//! message stored. If a step fails before the move, no reader sees the message, and its file in `tmp` is removed.
//!
//! Functions that list messages skip names that begin with a dot, read `new` and `cur`, and accept that a file may
//! be removed, or moved by a mail reader, after it was listed.
//!
//! A Maildir is either a queue or a mailbox. Only a mailbox has sub-folders (`.name` within it) and a quota
//! (`maildirsize`), as Maildir++ defines them; for a queue neither is looked for.

mod files;
mod quota;
pub mod spooled;

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

pub use files::with_path;
use files::{list, make_directories, make_directory, move_file, remove_if_there, sync_directory};
use quota::QuotaCheck;

/// Files in `tmp` that were not used for 36 hours are removed (maildir(5)).
const STALE_AGE: Duration = Duration::from_secs(36 * 60 * 60);

/// The flag of a message that may or may not have been delivered; mail readers show it as "flagged".
pub const IN_DOUBT: char = 'F';
/// The flag of a message for which a delay DSN was sent.
pub const DELAY_REPORTED: char = 'R';

/// Octets kept free on the disk: it is better to reject a message at MAIL (RFC 1870 section 6.1) than to fail in
/// the middle of its content.
const RESERVED_SPACE: u64 = 4 << 20;

const WRITE_BUFFER: usize = 32 * 1024;

/// The mask of a queue: only its owner reads it.
const QUEUE_MASK: u32 = 0o077;

/// One Maildir: a directory with `tmp`, `new` and `cur`.
#[derive(Clone, Debug)]
pub struct Maildir {
    path: PathBuf,
    /// The permission bits that files and directories made here do not get.
    mask: u32,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Queue,
    Mailbox,
    /// A sub-folder of a mailbox: if it is missing, its owner has removed it, and it is not made again.
    Folder,
}

/// A message found in a Maildir.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// `1767323045.M1P2Q3.host,S=120,W=128`; in `cur` with its info, `:2,` and flags.
    pub name: String,
    /// Whether it is in `cur`.
    pub seen: bool,
}

impl Entry {
    /// The part of the name before size and info. It stays the same when a mail reader moves or flags the file.
    pub fn unique(&self) -> &str {
        self.name.split([',', ':']).next().unwrap_or(&self.name)
    }

    /// Whether the message has this flag.
    pub fn has(&self, flag: char) -> bool {
        self.seen && self.name.split_once(":2,").is_some_and(|(_, info)| info.contains(flag))
    }

    /// Whether the name tells that the file has octets above 127 (`E=8`, which only [`MessageWriter`] writes).
    pub fn eight_bit(&self) -> bool {
        self.name.split([',', ':']).any(|field| field == "E=8")
    }

    /// The size of the whole file in octets with CRLF line ends (Maildir++ `W=`). `None`: the name does not tell.
    pub fn wire_size(&self) -> Option<u64> {
        let base = self.name.split(':').next()?;
        base.split(',').find_map(|field| field.strip_prefix("W="))?.parse().ok()
    }
}

impl Maildir {
    /// A queue: files are 0600 and directories 0700; it has no quota.
    pub fn new(path: impl Into<PathBuf>) -> Maildir {
        Maildir { path: path.into(), mask: QUEUE_MASK, kind: Kind::Queue }
    }

    /// A mailbox, which other programs read: it has a quota if it has a file `maildirsize`. Files and directories
    /// get the permissions 0666 and 0777 without the bits in `mask` and in the umask of this process.
    pub fn mailbox(path: impl Into<PathBuf>, mask: u32) -> Maildir {
        Maildir { path: path.into(), mask, kind: Kind::Mailbox }
    }

    /// The sub-folder `.name` of a mailbox (Maildir++). It is never made here: ask [`Maildir::exists`]. A name that
    /// would lead out of the mailbox (`../x`) becomes the name of a folder that does not exist.
    pub fn folder(&self, name: &str) -> Maildir {
        let inside = name.replace('/', "%2F");
        let escape = if inside.is_empty() || inside.starts_with('.') { "%" } else { "" };
        Maildir { path: self.path.join(format!(".{escape}{inside}")), mask: self.mask, kind: Kind::Folder }
    }

    /// Whether it is a directory with `cur` and `new`.
    pub fn exists(&self) -> bool {
        ["cur", "new"].iter().all(|name| self.path.join(name).is_dir())
    }

    /// The directory that holds `tmp`, `new` and `cur`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the directories that are missing, and their names durable.
    pub fn create(&self) -> io::Result<()> {
        let mode = 0o777 & !self.mask;
        make_directories(&self.path, mode)?;
        // `tmp` last: if it exists, the others do, even if the process is killed here, and a draft needs no check.
        for name in ["new", "cur", "tmp"] {
            make_directories(&self.path.join(name), mode)?;
        }
        Ok(())
    }

    /// Makes the directories that a draft found missing; of a sub-folder only `tmp`.
    fn repair(&self) -> io::Result<()> {
        match self.kind {
            Kind::Folder => make_directory(&self.path.join("tmp"), 0o777 & !self.mask),
            Kind::Queue | Kind::Mailbox => self.create(),
        }
    }

    /// Checks that the quota, if there is one, has room for one more message of this many octets. `unique` makes a
    /// file name, which is needed if the mailbox must be counted again.
    ///
    /// # Errors
    ///
    /// `QuotaExceeded` if there is no room; the system's errors from reading the quota.
    pub fn check_quota(&self, unique: impl FnOnce() -> String, octets: u64) -> io::Result<()> {
        if self.has_quota() { QuotaCheck::default().admit(&self.path, unique, octets) } else { Ok(()) }
    }

    /// Whether the file of a quota is looked for.
    fn has_quota(&self) -> bool {
        self.kind != Kind::Queue
    }

    /// Begins a message in `tmp` under a unique name. If directories are missing they are made, but for a
    /// sub-folder that does not exist.
    fn draft(&self, unique: &str) -> io::Result<Draft> {
        let temporary = self.path.join("tmp").join(unique);
        let open = || OpenOptions::new().write(true).create_new(true).mode(0o666 & !self.mask).open(&temporary);
        let file = match open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.repair()?;
                open()
            }
            other => other,
        };
        let file = file.map_err(|error| with_path(&temporary, error))?;
        Ok(Draft {
            maildir: self.clone(),
            unique: unique.to_owned(),
            temporary,
            file: BufWriter::with_capacity(WRITE_BUFFER, file),
            octets: 0,
            lines: 0,
            eight_bit: false,
            moved: None,
        })
    }

    /// Opens a new file on the disk of this Maildir, for reading and writing. It has no name, so it is gone when
    /// its last descriptor is closed, even if the process is killed. `unique` is its name for a moment.
    pub fn unnamed_file(&self, unique: &str) -> io::Result<File> {
        self.create()?;
        let path = self.path.join("tmp").join(unique);
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
        let file = file.map_err(|error| with_path(&path, error))?;
        fs::remove_file(&path).map_err(|error| with_path(&path, error))?;
        Ok(file)
    }

    /// All messages, sorted by name: the oldest first.
    pub fn entries(&self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        self.each(|entry| {
            entries.push(entry);
            true
        })?;
        entries.sort_unstable();
        Ok(entries)
    }

    /// Whether there is no message. Reads the directories only up to the first one.
    pub fn is_empty(&self) -> io::Result<bool> {
        Ok(self.count(1)? == 0)
    }

    /// The number of messages, `limit` at most. Reads no further than it counts.
    pub fn count(&self, limit: usize) -> io::Result<usize> {
        let mut count = 0;
        if limit > 0 {
            self.each(|_| {
                count += 1;
                count < limit
            })?;
        }
        Ok(count)
    }

    /// The path of a message.
    pub fn file(&self, entry: &Entry) -> PathBuf {
        self.path.join(if entry.seen { "cur" } else { "new" }).join(&entry.name)
    }

    /// Removes a message. A message that is already gone is not an error. The directory is not fsynced: a crash may
    /// bring the message back, which duplicates it but does not lose it.
    pub fn remove(&self, entry: &Entry) -> io::Result<()> {
        remove_if_there(&self.file(entry))
    }

    /// Removes from `tmp` what a writer that died has left under this name. Only for a caller that knows that no
    /// other process uses the name.
    pub fn discard(&self, unique: &str) -> io::Result<()> {
        remove_if_there(&self.path.join("tmp").join(unique))
    }

    /// Sets a flag: moves the message to `cur`, with the flags in alphabetical order (maildir(5)). Returns the new
    /// entry.
    ///
    /// # Errors
    ///
    /// `AlreadyExists` if another file has that name; `NotFound` if the message is gone.
    pub fn flag(&self, entry: &Entry, flag: char) -> io::Result<Entry> {
        let (base, info) = entry.name.split_once(":2,").unwrap_or((&entry.name, ""));
        let mut flags: Vec<char> = info.chars().chain([flag]).collect();
        flags.sort_unstable();
        flags.dedup();
        let flagged = Entry { name: format!("{base}:2,{}", String::from_iter(flags)), seen: true };
        if *entry != flagged {
            move_file(&self.file(entry), &self.file(&flagged))?;
        }
        Ok(flagged)
    }

    /// Removes the files that writers that died have left in `tmp`.
    pub fn sweep(&self) -> io::Result<()> {
        let now = SystemTime::now();
        for found in list(&self.path.join("tmp"))? {
            let found = found?;
            let Ok(metadata) = found.metadata() else { continue };
            if metadata.is_dir() {
                continue;
            }
            // On a file system mounted noatime only the time of the last write tells (maildir(5)).
            let used = metadata.accessed().ok().max(metadata.modified().ok());
            if used.and_then(|used| now.duration_since(used).ok()).is_some_and(|age| age > STALE_AGE) {
                remove_if_there(&found.path())?;
                log::info!("event=swept file={}", found.path().display());
            }
        }
        Ok(())
    }

    /// Calls `found` for each message, in no order, until it returns `false`.
    fn each(&self, mut found: impl FnMut(Entry) -> bool) -> io::Result<()> {
        for (directory, seen) in [("new", false), ("cur", true)] {
            for file in list(&self.path.join(directory))? {
                let file = file.map_err(|error| with_path(&self.path, error))?;
                let Ok(name) = file.file_name().into_string() else { continue };
                if !name.starts_with('.') && !found(Entry { name, seen }) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

/// A message being written into one Maildir. If it is dropped before it is published, its file is removed.
#[derive(Debug)]
struct Draft {
    maildir: Maildir,
    unique: String,
    temporary: PathBuf,
    file: BufWriter<File>,
    octets: u64,
    lines: u64,
    eight_bit: bool,
    /// Where it is since it was moved out of `tmp`.
    moved: Option<Entry>,
}

impl Draft {
    fn write(&mut self, octets: &[u8]) -> io::Result<()> {
        self.octets += octets.len() as u64;
        self.lines += octets.iter().filter(|octet| **octet == b'\n').count() as u64;
        self.eight_bit |= !octets.is_ascii();
        self.file.write_all(octets).map_err(|error| with_path(&self.temporary, error))
    }

    fn sync(&mut self) -> io::Result<()> {
        let synced = self.file.flush().and_then(|()| self.file.get_ref().sync_all());
        synced.map_err(|error| with_path(&self.temporary, error))
    }

    /// Moves the file to `new`, under a name that tells its size on disk and on the wire (Maildir++ `S=` and `W=`)
    /// and whether it has octets above 127 (`E=8`).
    fn publish(&mut self) -> io::Result<()> {
        let bits = if self.eight_bit { ",E=8" } else { "" };
        let name = format!("{},S={},W={}{bits}", self.unique, self.octets, self.octets + self.lines);
        let entry = Entry { name, seen: false };
        move_file(&self.temporary, &self.maildir.file(&entry))?;
        self.moved = Some(entry);
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.moved.is_none() {
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// Writes one message into several Maildirs at once: each copy begins with lines of its own, and then all get the
/// same content. Dropped before `commit` or `prepare`, it leaves nothing.
#[derive(Debug, Default)]
pub struct MessageWriter {
    drafts: Vec<Draft>,
}

impl MessageWriter {
    /// Whether no copy was begun.
    pub fn is_empty(&self) -> bool {
        self.drafts.is_empty()
    }

    /// Begins one more copy with `head`. Begin all copies before content is written: a later one would lack it.
    pub fn begin(&mut self, maildir: &Maildir, unique: &str, head: &[u8]) -> io::Result<()> {
        let mut draft = maildir.draft(unique)?;
        draft.write(head)?;
        self.drafts.push(draft);
        Ok(())
    }

    /// Appends content, with LF line ends, to all copies.
    pub fn write(&mut self, octets: &[u8]) -> io::Result<()> {
        self.drafts.iter_mut().try_for_each(|draft| draft.write(octets))
    }

    /// Stores all copies durably, or none: [`MessageWriter::prepare`], then [`PreparedMessage::publish`]. Returns an
    /// entry for each copy, in the order in which they were begun.
    pub fn commit(self) -> io::Result<Vec<Entry>> {
        self.prepare()?.publish()
    }

    /// The first half of `commit`, without anything that readers see: checks the quotas and fsyncs every file.
    ///
    /// # Errors
    ///
    /// `QuotaExceeded` if a mailbox has no room, else the system's; nothing is left then.
    pub fn prepare(mut self) -> io::Result<PreparedMessage> {
        let mut quotas = QuotaCheck::default();
        // Quotas first, so that the disk does not work for a message that is rejected.
        for draft in self.drafts.iter().filter(|draft| draft.maildir.has_quota()) {
            quotas.admit(&draft.maildir.path, || draft.unique.clone(), draft.octets)?;
        }
        self.drafts.iter_mut().try_for_each(Draft::sync)?;
        Ok(PreparedMessage { drafts: self.drafts, quotas })
    }
}

/// Copies of a message that are durable in `tmp` and not yet visible. Dropped before `publish`, it leaves nothing.
pub struct PreparedMessage {
    drafts: Vec<Draft>,
    quotas: QuotaCheck,
}

impl PreparedMessage {
    /// The second half of `commit`: makes all copies visible. It can hardly fail, as it needs no space for content.
    /// If one copy cannot be moved, those that were moved are removed again.
    pub fn publish(mut self) -> io::Result<Vec<Entry>> {
        let published = self.drafts.iter_mut().try_for_each(Draft::publish);
        let durable = published.and_then(|()| self.directories().iter().try_for_each(|path| sync_directory(path)));
        let moved = || self.drafts.iter().filter_map(|draft| draft.moved.clone().map(|entry| (draft, entry)));
        if let Err(error) = durable {
            for (draft, entry) in moved() {
                let _ = draft.maildir.remove(&entry);
            }
            return Err(error);
        }
        self.quotas.record();
        Ok(moved().map(|(_, entry)| entry).collect())
    }

    /// The directories in which the copies appear, each once: each fsync costs as much as a message.
    fn directories(&self) -> BTreeSet<PathBuf> {
        self.drafts.iter().map(|draft| draft.maildir.path.join("new")).collect()
    }
}

/// Calls `each` with what is left of a content, block by block. A block has 32 KiB at most and may end anywhere in
/// a line.
pub fn for_each_block(content: &mut dyn Read, mut each: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
    let mut block = vec![0; 32 * 1024];
    loop {
        match content.read(&mut block)? {
            0 => return Ok(()),
            octets => each(&block[..octets])?,
        }
    }
}

/// Whether the disk of a directory has room for this many octets and a reserve of 4 MiB. True if the system does not
/// tell: the first message makes a directory that is missing, and then the write reports the error.
pub fn has_room(directory: &Path, octets: u64) -> bool {
    rustix::fs::statvfs(directory)
        .map_or(true, |disk| disk.f_bavail.saturating_mul(disk.f_frsize) >= octets.saturating_add(RESERVED_SPACE))
}

#[cfg(test)]
mod tests;
