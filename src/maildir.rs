//! Files safely into and out of Maildirs (maildir(5)).
//!
//! A message becomes visible in one step: written in `tmp`, the file fsynced, moved to `new` without ever
//! overwriting, `new` fsynced. Only then has it been delivered; [`Copies::commit`] is the one place that
//! decides when to fsync. Whatever goes wrong before, nothing of it is seen, and `tmp` is cleaned up.
//!
//! Readers skip names that begin with a dot, look into `new` and `cur`, and find it normal that a file is
//! gone the moment after it was listed.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Litter in `tmp` is removed after 36 hours (maildir(5)).
const LITTER: Duration = Duration::from_secs(36 * 60 * 60);

/// The info of a message of which nobody knows whether it was delivered: flagged, as mail readers show it.
const IN_DOUBT: &str = ":2,F";

const WRITE_BUFFER: usize = 32 * 1024;

/// One Maildir: a folder with `tmp`, `new` and `cur`.
#[derive(Clone, Debug)]
pub struct Maildir {
    path: PathBuf,
}

/// A message found in a Maildir.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// `1767323045.M1P2Q3.host,S=120,W=128`, in `cur` with its info.
    pub name: String,
    pub seen: bool,
}

impl Entry {
    /// What names the message whatever happens to the file: the part before size and info.
    pub fn unique(&self) -> &str {
        self.name.split([',', ':']).next().unwrap_or(&self.name)
    }

    /// The size on the wire of the whole file, where the name tells it (Maildir++ `W=`).
    pub fn wire_size(&self) -> Option<u64> {
        let base = self.name.split(':').next()?;
        base.split(',').find_map(|field| field.strip_prefix("W="))?.parse().ok()
    }
}

impl Maildir {
    pub fn new(path: impl Into<PathBuf>) -> Maildir {
        Maildir { path: path.into() }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the folders that are missing, and their names durable.
    pub fn create(&self) -> io::Result<()> {
        make_folder(&self.path)?;
        for name in ["tmp", "new", "cur"] {
            make_folder(&self.path.join(name))?;
        }
        Ok(())
    }

    /// Begins a message under a unique name; the Maildir is made when it is missing.
    pub fn draft(&self, unique: &str) -> io::Result<Draft> {
        let temporary = self.path.join("tmp").join(unique);
        let open = || OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary);
        let file = match open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.create()?;
                open()
            }
            other => other,
        };
        let file = file.map_err(|error| at(&temporary, error))?;
        Ok(Draft {
            maildir: self.clone(),
            unique: unique.to_owned(),
            temporary,
            file: BufWriter::with_capacity(WRITE_BUFFER, file),
            octets: 0,
            lines: 0,
            moved: None,
        })
    }

    /// All messages, the oldest name first.
    pub fn entries(&self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        self.each(|entry| {
            entries.push(entry);
            true
        })?;
        entries.sort_unstable();
        Ok(entries)
    }

    /// Whether there is any message, without reading more of the folder than it takes.
    pub fn is_empty(&self) -> io::Result<bool> {
        let mut empty = true;
        self.each(|_| {
            empty = false;
            false
        })?;
        Ok(empty)
    }

    /// The path of a message.
    pub fn file(&self, entry: &Entry) -> PathBuf {
        self.path.join(if entry.seen { "cur" } else { "new" }).join(&entry.name)
    }

    /// Removes a message; that it is gone already is no error. Not fsynced: a crash brings it back, and
    /// back is better than lost.
    pub fn remove(&self, entry: &Entry) -> io::Result<()> {
        let path = self.file(entry);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(&path, error)),
            _ => Ok(()),
        }
    }

    /// Marks a message as in doubt, in a way every mail reader shows.
    pub fn mark_in_doubt(&self, entry: &Entry) -> io::Result<()> {
        let base = entry.name.split(':').next().unwrap_or(&entry.name);
        let marked = Entry { name: format!("{base}{IN_DOUBT}"), seen: true };
        if *entry == marked {
            return Ok(());
        }
        move_file(&self.file(entry), &self.file(&marked))
    }

    /// Removes what writers that died have left in `tmp`.
    pub fn sweep(&self) -> io::Result<()> {
        let now = SystemTime::now();
        for found in list(&self.path.join("tmp"))? {
            let found = found?;
            let Ok(metadata) = found.metadata() else { continue };
            // Where access times are not kept the time of writing tells (maildir(5)).
            let used = metadata.accessed().ok().max(metadata.modified().ok());
            if used.and_then(|used| now.duration_since(used).ok()).is_some_and(|age| age > LITTER) {
                match fs::remove_file(found.path()) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(&found.path(), error)),
                    _ => log::info!("event=swept file={}", found.path().display()),
                }
            }
        }
        Ok(())
    }

    /// Calls `found` for each message until it says `false`.
    fn each(&self, mut found: impl FnMut(Entry) -> bool) -> io::Result<()> {
        for (folder, seen) in [("new", false), ("cur", true)] {
            for file in list(&self.path.join(folder))? {
                let file = file.map_err(|error| at(&self.path, error))?;
                let Ok(name) = file.file_name().into_string() else { continue };
                if !name.starts_with('.') && !found(Entry { name, seen }) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

/// A message being written into one Maildir. Dropped before its commit it leaves nothing.
#[derive(Debug)]
pub struct Draft {
    maildir: Maildir,
    unique: String,
    temporary: PathBuf,
    file: BufWriter<File>,
    octets: u64,
    lines: u64,
    moved: Option<Entry>,
}

impl Draft {
    pub fn write(&mut self, octets: &[u8]) -> io::Result<()> {
        self.octets += octets.len() as u64;
        self.lines += octets.iter().filter(|octet| **octet == b'\n').count() as u64;
        self.file.write_all(octets).map_err(|error| at(&self.temporary, error))
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.flush().and_then(|()| self.file.get_ref().sync_all()).map_err(|error| at(&self.temporary, error))
    }

    /// Into `new`, under a name that tells the size on disk and on the wire (Maildir++).
    fn publish(&mut self) -> io::Result<()> {
        let name = format!("{},S={},W={}", self.unique, self.octets, self.octets + self.lines);
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

/// One message being written into several Maildirs at once, each with a head of its own.
#[derive(Debug, Default)]
pub struct Copies {
    drafts: Vec<Draft>,
}

impl Copies {
    /// One copy more, beginning with `head`. All are begun before content is written.
    pub fn begin(&mut self, maildir: &Maildir, unique: &str, head: &[u8]) -> io::Result<()> {
        let mut draft = maildir.draft(unique)?;
        draft.write(head)?;
        self.drafts.push(draft);
        Ok(())
    }

    /// Content, for all of them.
    pub fn write(&mut self, octets: &[u8]) -> io::Result<()> {
        self.drafts.iter_mut().try_for_each(|draft| draft.write(octets))
    }

    /// All or none: every file is safe on disk before the first is seen, and when one cannot be moved
    /// those that were are taken back.
    pub fn commit(mut self) -> io::Result<Vec<Entry>> {
        self.drafts.iter_mut().try_for_each(Draft::sync)?;
        let published = self.drafts.iter_mut().try_for_each(Draft::publish);
        let durable = published
            .and_then(|()| self.drafts.iter().try_for_each(|draft| sync_folder(&draft.maildir.path.join("new"))));
        let moved = || self.drafts.iter().filter_map(|draft| draft.moved.clone().map(|entry| (draft, entry)));
        if let Err(error) = durable {
            for (draft, entry) in moved() {
                let _ = draft.maildir.remove(&entry);
            }
            return Err(error);
        }
        Ok(moved().map(|(_, entry)| entry).collect())
    }
}

/// An error that says where.
pub fn at(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Makes a folder and those above it; each new name is made durable.
pub fn make_folder(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    if let Some(parent) = parent {
        make_folder(parent)?;
    }
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
        other => other.map_err(|error| at(path, error))?,
    }
    sync_folder(parent.unwrap_or(Path::new(".")))
}

/// Without this a file's name may be gone after a power cut though its content is on disk.
fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(|error| at(path, error))
}

/// Moves without ever overwriting: rename(2) would, silently.
fn move_file(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        use rustix::io::Errno;
        match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            // Not every file system can; then the old way.
            Err(Errno::INVAL | Errno::NOSYS) => {}
            other => return other.map_err(|error| at(to, error.into())),
        }
    }
    fs::hard_link(from, to).map_err(|error| at(to, error))?;
    fs::remove_file(from).map_err(|error| at(from, error))
}

/// The files of a folder, read as they are asked for; a folder that is not there has none.
fn list(path: &Path) -> io::Result<impl Iterator<Item = io::Result<fs::DirEntry>>> {
    match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None.into_iter().flatten()),
        Err(error) => Err(at(path, error)),
        Ok(files) => Ok(Some(files).into_iter().flatten()),
    }
}
