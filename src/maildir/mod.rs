//! Maildirs (maildir(5)): messages are written, listed, flagged and removed.
//!
//! A message becomes visible in one step, and survives a power cut from then on ([`MessageWriter::commit`]): the writer
//! writes it in `tmp`, fsyncs the file, moves it to `new` without ever overwriting another, and fsyncs `new` and the
//! directories above it that this process has not fsynced yet. If a step before the move fails, no reader sees the
//! message, and its file in `tmp` is removed.
//!
//! Functions that list messages read `new` and `cur`, and skip names that begin with a dot. After that a mail reader
//! may move or remove a file; [`Maildir::find`] finds its new name.
//!
//! A Maildir is either a queue or a mailbox. Only a mailbox has sub-folders (`.name` within it) and a quota
//! (`maildirsize`), as Maildir++ defines them.
//!
//! Errors of the system have the path in their text.

mod entry;
mod files;
mod quota;
pub mod spooled;
mod state_file;
mod sweep;
mod usage;
mod writer;

use std::ffi::OsString;
use std::fs::{self, DirEntry, File, OpenOptions};
use std::io::{self, Read, Seek};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::io::Errno;

use crate::sorting::sort_by;
pub use entry::{AttemptRecord, EndedSessions, Entry};
pub use files::{
    FileId, create_file_durably, make_tree, prepare_directory, remove_file_durably, remove_if_there, replace_file,
    replace_file_durably, shell_word, unnamed_file_in, with_path, with_remedy, write_denial, write_error, write_remedy,
};
use files::{list, make_directories, make_directory, move_file, sync_directory, sync_names};
use quota::QuotaCheck;
pub use quota::Usage;
pub use state_file::{
    lock_for_daemon, lock_state_file, locked_state_file, make_state_directory, open_state_file, read_state_file,
    state_key, sweep_state_files, tidy_daily, wait_for_state_file,
};
pub use sweep::log_sweep_failed;
pub use usage::{LimitExceeded, USAGE_FILE, UsageLimit};
pub use writer::{MessageWriter, PreparedMessage};

/// The flag of a message that may or may not have been sent; mail readers show it as "flagged".
pub const IN_DOUBT: char = 'F';
/// The flag of a message for which a delay DSN was sent.
pub const DELAY_REPORTED: char = 'R';

/// The most by which the times that a file system records are wrong.
const CLOCK_STEP: Duration = Duration::from_secs(1);

/// How often the directories are read for a message that a mail reader has moved.
const FIND_ATTEMPTS: usize = 3;

/// How often a directory is made again that other processes remove: a queue without mail may be removed at any time.
const MAKE_ATTEMPTS: usize = 100;

/// Octets of content that are read or written at a time.
const BLOCK_SIZE: usize = 32 * 1024;

/// One Maildir: a directory with `tmp`, `new` and `cur`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Maildir {
    path: PathBuf,
    /// The permission bits that new files and directories do not get.
    mask: u32,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Queue,
    Mailbox,
    /// A sub-folder of a mailbox. If it is missing, its owner has removed it, and it is not made again.
    Folder,
}

impl Maildir {
    /// Returns a queue: files are 0600 and directories 0700; it has no quota.
    pub fn new(path: impl Into<PathBuf>) -> Maildir {
        Maildir { path: path.into(), mask: 0o077, kind: Kind::Queue }
    }

    /// Returns a mailbox, which other programs read. It has a quota if it has a file `maildirsize`. Files and
    /// directories get the permissions 0666 and 0777 without the bits in `mask` and in the umask of this process.
    pub fn mailbox(path: impl Into<PathBuf>, mask: u32) -> Maildir {
        Maildir { path: path.into(), mask, kind: Kind::Mailbox }
    }

    /// Returns the sub-folder `.name` of a mailbox (Maildir++). This program never makes one: ask [`Maildir::exists`].
    /// A name that would lead out of the mailbox (`../x`) becomes the name of a sub-folder that does not exist.
    pub fn folder(&self, name: &str) -> Maildir {
        let inside = name.replace('/', "%2F");
        let escape = if inside.is_empty() || inside.starts_with('.') { "%" } else { "" };
        Maildir { path: self.path.join(format!(".{escape}{inside}")), mask: self.mask, kind: Kind::Folder }
    }

    /// Returns whether the Maildir exists: a directory with `cur` and `new`.
    pub fn exists(&self) -> bool {
        ["cur", "new"].iter().all(|name| self.path.join(name).is_dir())
    }

    /// Returns the directory that holds `tmp`, `new` and `cur`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the directories that are missing. Their names survive a power cut from the first message on
    /// ([`MessageWriter::commit`]).
    ///
    /// # Errors
    /// A directory cannot be made.
    pub fn create(&self) -> io::Result<()> {
        self.remade(|| self.make_missing())
    }

    fn make_missing(&self) -> io::Result<()> {
        let mode = 0o777 & !self.mask;
        make_directories(&self.path, mode)?;
        // `tmp` comes last: if it exists, the others do, even if the process is killed here. So a writer need not
        // check.
        for name in ["new", "cur", "tmp"] {
            make_directories(&self.path.join(name), mode)?;
        }
        Ok(())
    }

    /// Calls `operation`, which uses the directories. If one of them is missing, or another process removes it during
    /// the call, makes it and calls `operation` again.
    fn remade<T>(&self, operation: impl Fn() -> io::Result<T>) -> io::Result<T> {
        for _ in 0..MAKE_ATTEMPTS {
            match operation() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                done => return done,
            }
            match self.make_missing() {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        operation()
    }

    /// Checks that the quota, if there is one, has room for one more message of this many octets. `unique` returns a
    /// new file name, which is used if the mailbox must be counted again.
    ///
    /// # Errors
    /// `QuotaExceeded` if there is no room; the system's, if the quota cannot be read.
    pub fn check_quota(&self, unique: impl FnOnce() -> String, octets: u64) -> io::Result<()> {
        if self.has_quota() { QuotaCheck::default().admit(&self.path, unique, octets) } else { Ok(()) }
    }

    /// Returns whether the Maildir may have a quota.
    fn has_quota(&self) -> bool {
        self.kind != Kind::Queue
    }

    /// Returns the path of a file in `tmp`.
    fn temporary(&self, unique: &str) -> PathBuf {
        self.path.join("tmp").join(unique)
    }

    /// Creates a file in `tmp`, which is made if it is missing.
    fn create_temporary(&self, unique: &str, options: &mut OpenOptions) -> io::Result<File> {
        let path = self.temporary(unique);
        let options = options.write(true).create_new(true);
        let open = || options.open(&path);
        let file = match self.kind {
            Kind::Queue | Kind::Mailbox => self.remade(open),
            Kind::Folder => match open() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.make_tmp()?;
                    open()
                }
                other => other,
            },
        };
        file.map_err(|error| with_path(&path, error))
    }

    /// Makes `tmp` and the other directories that are missing; in a sub-folder only `tmp`.
    fn make_tmp(&self) -> io::Result<()> {
        match self.kind {
            Kind::Folder => make_directory(&self.path.join("tmp"), 0o777 & !self.mask),
            Kind::Queue | Kind::Mailbox => self.create(),
        }
    }

    /// Checks the rights to create files in `tmp`, without creating one. Makes `tmp` if it is missing.
    fn check_writable(&self) -> io::Result<()> {
        use rustix::fs::{Access, AtFlags, CWD, accessat};
        // With the dot, an entry that is not a directory is an error.
        let tmp = self.temporary(".");
        let check = || accessat(CWD, &tmp, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS);
        let checked = match check() {
            Err(Errno::NOENT) => {
                self.make_tmp()?;
                check()
            }
            other => other,
        };
        checked.map_err(|error| with_path(&tmp, error.into()))
    }

    /// Opens a new file on the disk of this Maildir, for reading and writing. It has no name, so the system removes it
    /// when its last descriptor is closed, even if the process is killed. `unique` is its name for a moment.
    ///
    /// # Errors
    /// The file cannot be created.
    pub fn unnamed_file(&self, unique: &str) -> io::Result<File> {
        let file = self.create_temporary(unique, OpenOptions::new().read(true).mode(0o600))?;
        let path = self.temporary(unique);
        let removed = fs::remove_file(&path).inspect_err(|_| drop(fs::remove_file(&path)));
        removed.map(|()| file).map_err(|error| with_path(&path, error))
    }

    /// Returns all messages, sorted by the unique part of their names: the oldest first. A large queue needs much
    /// memory: use [`Maildir::list`] for queues that may have a million messages.
    ///
    /// # Errors
    /// A directory cannot be read.
    pub fn entries(&self) -> io::Result<Vec<Entry>> {
        let mut entries = self.list().collect::<io::Result<Vec<Entry>>>()?;
        sort_by(&mut entries, Entry::by_age);
        Ok(entries)
    }

    /// Finds a message that a mail reader has moved or flagged: a name with the same unique part, which belongs to
    /// `file` if that is known. `None`: the message was removed.
    ///
    /// # Errors
    /// A directory cannot be read.
    pub fn find(&self, entry: &Entry, file: Option<FileId>) -> io::Result<Option<Entry>> {
        let is_it = |other: &Entry| {
            let id = || FileId::of_path(&self.file(other));
            other.unique() == entry.unique() && file.is_none_or(|file| id().is_ok_and(|id| id == file))
        };
        // A file that is moved while the directories are read may be missed in both.
        for _ in 0..FIND_ATTEMPTS {
            for other in self.list() {
                let other = other?;
                if is_it(&other) {
                    return Ok(Some(other));
                }
            }
        }
        Ok(None)
    }

    /// Returns whether certainly no message was added, renamed or removed since `time`: the directories were last
    /// changed earlier, by more than the error of a file system's clock.
    pub fn is_unchanged_since(&self, time: SystemTime) -> bool {
        ["new", "cur"].iter().all(|name| match fs::metadata(self.path.join(name)).and_then(|found| found.modified()) {
            Ok(modified) => modified + CLOCK_STEP < time,
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        })
    }

    /// Returns whether there is no message. Reads the directories only up to the first one.
    ///
    /// # Errors
    /// A directory cannot be read.
    pub fn is_empty(&self) -> io::Result<bool> {
        Ok(self.count(1)? == 0)
    }

    /// Counts the messages, and stops at `limit`.
    ///
    /// # Errors
    /// A directory cannot be read.
    pub fn count(&self, limit: usize) -> io::Result<usize> {
        self.count_if(limit, |_| true)
    }

    /// Counts the messages for which `counts` is true, and stops at `limit`.
    ///
    /// # Errors
    /// A directory cannot be read.
    pub fn count_if(&self, limit: usize, counts: impl Fn(&Entry) -> bool) -> io::Result<usize> {
        let counted = self.list().filter(|entry| entry.as_ref().map_or(true, &counts));
        counted.take(limit).try_fold(0, |count, entry| entry.map(|_| count + 1))
    }

    /// Lists the messages one by one, in no order; an error ends the listing of its directory.
    pub fn list(&self) -> impl Iterator<Item = io::Result<Entry>> + Send + use<> {
        let path = self.path.clone();
        [("new", false), ("cur", true)].into_iter().flat_map(move |(directory, seen)| {
            list(&path.join(directory)).filter_map(move |file| match file.map(|file| file.file_name()) {
                Ok(name) => (!name.as_encoded_bytes().starts_with(b".")).then_some(Ok(Entry { name, seen })),
                Err(error) => Some(Err(error)),
            })
        })
    }

    /// Calls `show` for each plain file that may be a message, in no order. No file is opened.
    ///
    /// # Errors
    /// A directory cannot be read, or `show` fails.
    pub fn each_file(&self, show: &mut dyn FnMut(Entry, &DirEntry) -> io::Result<()>) -> io::Result<()> {
        for (directory, seen) in [("new", false), ("cur", true)] {
            for file in list(&self.path.join(directory)) {
                let file = file?;
                let name = file.file_name();
                let plain =
                    !name.as_encoded_bytes().starts_with(b".") && file.file_type().is_ok_and(|kind| kind.is_file());
                if plain {
                    show(Entry { name, seen }, &file)?;
                }
            }
        }
        Ok(())
    }

    /// Returns the path of a message.
    pub fn file(&self, entry: &Entry) -> PathBuf {
        self.path.join(if entry.seen { "cur" } else { "new" }).join(&entry.name)
    }

    /// Removes a message. The directory is not fsynced: after a power cut the message may be there again, and be sent
    /// twice, but it is not lost.
    ///
    /// # Errors
    /// `NotFound` if there is no file of that name.
    pub fn remove(&self, entry: &Entry) -> io::Result<()> {
        let path = self.file(entry);
        fs::remove_file(&path).map_err(|error| with_path(&path, error))
    }

    /// Renames a message: adds the flag, if there is one, and replaces the record of attempts. Returns the new entry.
    ///
    /// # Errors
    /// `AlreadyExists` if another file has that name; `NotFound` if there is no file of the old name.
    pub fn rename(&self, entry: &Entry, flag: Option<char>, record: &AttemptRecord) -> io::Result<Entry> {
        let recorded = entry.with_record(record);
        let renamed = flag.map_or(recorded.clone(), |flag| recorded.flagged(flag));
        if renamed != *entry {
            move_file(&self.file(entry), &self.file(&renamed))?;
        }
        Ok(renamed)
    }

    /// Moves a message to `new` of another Maildir on the same disk, which is made if it is missing, under this name.
    ///
    /// # Errors
    /// `AlreadyExists` if another file has that name; `NotFound` if there is no file of the old name.
    pub fn move_to(&self, entry: &Entry, other: &Maildir, name: OsString) -> io::Result<()> {
        other.create()?;
        let moved = Entry { name, seen: false };
        sync_names(&other.path.join("new"))?;
        move_file(&self.file(entry), &other.file(&moved))
    }

    /// Replaces the file of a message by a copy that belongs to this user. The copy is fsynced before it gets the name,
    /// so that a power cut leaves one of the two. Returns the copy.
    ///
    /// # Errors
    /// `NotFound` if a mail reader has moved the original; the system's, if the copy cannot be made.
    pub fn replace_by_copy(&self, entry: &Entry, original: &File, unique: &str) -> io::Result<File> {
        let (path, temporary) = (self.file(entry), self.temporary(unique));
        let copy = || {
            let mut copy = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&temporary)?;
            let mut original = original;
            original.rewind()?;
            io::copy(&mut original, &mut copy)?;
            copy.set_modified(original.metadata()?.modified()?)?;
            copy.sync_all()?;
            if FileId::of_path(&path)? != FileId::of_file(original)? {
                return Err(io::ErrorKind::NotFound.into());
            }
            fs::rename(&temporary, &path)?;
            sync_directory(path.parent().unwrap_or(&self.path))?;
            Ok(copy)
        };
        let copied = copy().map_err(|error: io::Error| with_path(&path, error));
        copied.inspect_err(|_| drop(fs::remove_file(&temporary)))
    }

    /// Removes the files that dead writers have left in `tmp`: those not used for 36 hours.
    ///
    /// # Errors
    /// The directory cannot be read, or a file cannot be removed.
    pub fn sweep(&self) -> io::Result<()> {
        sweep::sweep(&self.path.join("tmp"), &|_| true)
    }

    /// Removes the Maildir if it has no messages and, if `stale`, was not used for 36 hours. `others`: the names of
    /// other files, and of a Maildir within it, that are removed with it; anything else keeps it. The caller has its
    /// lock. A writer that still needs the Maildir makes it again. Returns whether it was removed.
    ///
    /// # Errors
    /// A directory cannot be read, or a file cannot be removed.
    pub fn remove_unused(&self, others: &[&str], stale: bool) -> io::Result<bool> {
        sweep::remove_unused(&self.path, others, stale)
    }
}

/// Whether content would continue a header field before it (RFC 5322 section 2.2.3).
pub fn continues_field(content: &[u8]) -> bool {
    content.starts_with(b" ") || content.starts_with(b"\t")
}

/// Reads a content to its end and calls `each` with every block, which has at most 32 KiB and may end anywhere in a
/// line.
///
/// # Errors
/// Those of `content` and of `each`.
pub fn for_each_block(content: &mut dyn Read, mut each: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
    let mut block = vec![0; BLOCK_SIZE];
    loop {
        match content.read(&mut block)? {
            0 => return Ok(()),
            octets => each(&block[..octets])?,
        }
    }
}

/// Returns whether the disk of a directory has room for this many octets and a reserve, so that a message is deferred
/// at MAIL (RFC 1870 section 6.1) and does not fail in the middle of its content. Returns true if the system does not
/// report the free space: the directory may be missing until the first message, and otherwise the write reports the
/// error.
pub fn has_room(directory: &Path, octets: u64, reserve: u64) -> bool {
    free_octets(directory).is_none_or(|free| free >= octets.saturating_add(reserve))
}

/// The octets that are free on the disk of a directory; `None`: the system does not report them.
pub fn free_octets(directory: &Path) -> Option<u64> {
    rustix::fs::statvfs(directory).ok().map(|disk| disk.f_bavail.saturating_mul(disk.f_frsize))
}

#[cfg(test)]
mod tests;
