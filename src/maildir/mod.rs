//! Files safely into and out of Maildirs (maildir(5)).
//!
//! A message becomes visible in one step: written in `tmp`, the file fsynced, moved to `new` without ever
//! overwriting, `new` fsynced. Only then has it been delivered; [`Copies::commit`] is the one place that
//! decides when to fsync. Whatever goes wrong before, nothing of it is seen, and `tmp` is cleaned up.
//!
//! Readers skip names that begin with a dot, look into `new` and `cur`, and find it normal that a file is
//! gone the moment after it was listed.
//!
//! A mailbox may have sub-folders, `.name` within it, and a quota, `maildirsize` (Maildir++).

mod quota;

use quota::QuotaCheck;
use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Litter in `tmp` is removed after 36 hours (maildir(5)).
const STALE_AGE: Duration = Duration::from_secs(36 * 60 * 60);

/// The flag of a message of which nobody knows whether it was delivered; mail readers show it.
pub const IN_DOUBT: char = 'F';
/// The flag of a message whose sender was told that it is late.
pub const DELAY_REPORTED: char = 'R';

/// Room kept free on the disk (RFC 1870 section 6.1: better refused than begun).
const RESERVED_SPACE: u64 = 4 << 20;

const WRITE_BUFFER: usize = 32 * 1024;

/// What nobody else may read: the mask of a queue.
const PRIVATE: u32 = 0o077;

/// One Maildir: a folder with `tmp`, `new` and `cur`.
#[derive(Clone, Debug)]
pub struct Maildir {
    path: PathBuf,
    /// What is taken from 0666 and 0777 for the files and folders made here.
    mask: u32,
    /// A sub-folder of somebody's mailbox: where it is gone, its owner wanted it gone.
    sub_folder: bool,
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

    /// Whether a flag is set.
    pub fn has(&self, letter: char) -> bool {
        self.seen && self.name.split_once(":2,").is_some_and(|(_, info)| info.contains(letter))
    }

    /// Whether octets above 127 were written (`E=8`), where the name is one of ours.
    pub fn eight_bit(&self) -> bool {
        self.name.split([',', ':']).any(|field| field == "E=8")
    }

    /// The size on the wire of the whole file, where the name tells it (Maildir++ `W=`).
    pub fn wire_size(&self) -> Option<u64> {
        let base = self.name.split(':').next()?;
        base.split(',').find_map(|field| field.strip_prefix("W="))?.parse().ok()
    }
}

impl Maildir {
    /// A Maildir whose files are 0600 and whose folders are 0700.
    pub fn new(path: impl Into<PathBuf>) -> Maildir {
        Maildir::masked(path, PRIVATE)
    }

    /// A Maildir that other programs read: what is made has the permissions that `mask` leaves of 0666 and
    /// 0777, and of those what the umask of the process leaves.
    pub fn masked(path: impl Into<PathBuf>, mask: u32) -> Maildir {
        Maildir { path: path.into(), mask, sub_folder: false }
    }

    /// The sub-folder `.name` of a mailbox (Maildir++). It is never made here: ask [`Maildir::exists`]. A name
    /// that would lead out of the mailbox (`../x`) is that of a folder nobody has.
    pub fn folder(&self, name: &str) -> Maildir {
        let inside = name.replace('/', "%2F");
        let escape = if inside.is_empty() || inside.starts_with('.') { "%" } else { "" };
        Maildir { path: self.path.join(format!(".{escape}{inside}")), mask: self.mask, sub_folder: true }
    }

    /// Whether it is there: a folder with `cur` and `new`.
    pub fn exists(&self) -> bool {
        ["cur", "new"].iter().all(|name| self.path.join(name).is_dir())
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the folders that are missing, and their names durable.
    pub fn create(&self) -> io::Result<()> {
        let mode = 0o777 & !self.mask;
        make_directories(&self.path, mode)?;
        // `tmp` last: where it is, drafts find the others, too, even if we are killed here.
        for name in ["new", "cur", "tmp"] {
            make_directories(&self.path.join(name), mode)?;
        }
        Ok(())
    }

    /// Makes what a draft found missing.
    fn repair(&self) -> io::Result<()> {
        if self.sub_folder { make_directory(&self.path.join("tmp"), 0o777 & !self.mask) } else { self.create() }
    }

    /// Whether the quota, where there is one, has room for so many octets more. `unique`: makes a name for a new count.
    pub fn admits(&self, unique: impl FnOnce() -> String, octets: u64) -> io::Result<()> {
        QuotaCheck::default().admit(&self.path, unique, octets)
    }

    /// Begins a message under a unique name; the Maildir is made when it is missing, a sub-folder is not.
    pub fn draft(&self, unique: &str) -> io::Result<Draft> {
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

    /// A file in `tmp` that is gone with its last descriptor: for content that is looked at before it is a message.
    pub fn unnamed_file(&self, unique: &str) -> io::Result<File> {
        self.create()?;
        let path = self.path.join("tmp").join(unique);
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
        let file = file.map_err(|error| with_path(&path, error))?;
        fs::remove_file(&path).map_err(|error| with_path(&path, error))?;
        Ok(file)
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
        Ok(self.count(1)? == 0)
    }

    /// How many messages there are, up to this number.
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

    /// Removes a message; that it is gone already is no error. Not fsynced: a crash brings it back, and
    /// back is better than lost.
    pub fn remove(&self, entry: &Entry) -> io::Result<()> {
        let path = self.file(entry);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(with_path(&path, error)),
            _ => Ok(()),
        }
    }

    /// Removes what is left of a draft whose writer died. Only for one who knows that nobody else uses the name.
    pub fn discard(&self, unique: &str) -> io::Result<()> {
        let temporary = self.path.join("tmp").join(unique);
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(with_path(&temporary, error)),
            _ => Ok(()),
        }
    }

    /// Flags a message: it moves to `cur`, with the letter in its info, in order (maildir(5)).
    pub fn flag(&self, entry: &Entry, letter: char) -> io::Result<Entry> {
        let (base, info) = entry.name.split_once(":2,").unwrap_or((&entry.name, ""));
        let mut letters: Vec<char> = info.chars().chain([letter]).collect();
        letters.sort_unstable();
        letters.dedup();
        let flagged = Entry { name: format!("{base}:2,{}", String::from_iter(letters)), seen: true };
        if *entry != flagged {
            move_file(&self.file(entry), &self.file(&flagged))?;
        }
        Ok(flagged)
    }

    /// Removes what writers that died have left in `tmp`.
    pub fn sweep(&self) -> io::Result<()> {
        let now = SystemTime::now();
        for found in list(&self.path.join("tmp"))? {
            let found = found?;
            let Ok(metadata) = found.metadata() else { continue };
            if metadata.is_dir() {
                continue;
            }
            // Where access times are not kept the time of writing tells (maildir(5)).
            let used = metadata.accessed().ok().max(metadata.modified().ok());
            if used.and_then(|used| now.duration_since(used).ok()).is_some_and(|age| age > STALE_AGE) {
                match fs::remove_file(found.path()) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(with_path(&found.path(), error));
                    }
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

/// A message being written into one Maildir. Dropped before its commit it leaves nothing.
#[derive(Debug)]
pub struct Draft {
    maildir: Maildir,
    unique: String,
    temporary: PathBuf,
    file: BufWriter<File>,
    octets: u64,
    lines: u64,
    eight_bit: bool,
    moved: Option<Entry>,
}

impl Draft {
    pub fn write(&mut self, octets: &[u8]) -> io::Result<()> {
        self.octets += octets.len() as u64;
        self.lines += octets.iter().filter(|octet| **octet == b'\n').count() as u64;
        self.eight_bit |= !octets.is_ascii();
        self.file.write_all(octets).map_err(|error| with_path(&self.temporary, error))
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file
            .flush()
            .and_then(|()| self.file.get_ref().sync_all())
            .map_err(|error| with_path(&self.temporary, error))
    }

    /// Into `new`, under a name that tells the size on disk and on the wire (Maildir++), and whether it takes
    /// eight bits.
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

/// One message being written into several Maildirs at once, each with a head of its own.
#[derive(Debug, Default)]
pub struct MessageWriter {
    drafts: Vec<Draft>,
}

impl MessageWriter {
    /// Whether no copy was begun.
    pub fn is_empty(&self) -> bool {
        self.drafts.is_empty()
    }

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

    /// All or none.
    pub fn commit(self) -> io::Result<Vec<Entry>> {
        self.prepare()?.publish()
    }

    /// The first half: every quota has room, and every file is safe on disk. Nothing is seen yet.
    pub fn prepare(mut self) -> io::Result<PreparedMessage> {
        let mut ledger = QuotaCheck::default();
        // First, so that the disk does not work for what is refused.
        self.drafts
            .iter()
            .try_for_each(|draft| ledger.admit(&draft.maildir.path, || draft.unique.clone(), draft.octets))?;
        self.drafts.iter_mut().try_for_each(Draft::sync)?;
        Ok(PreparedMessage { drafts: self.drafts, ledger })
    }
}

/// Copies of a message that wait to be seen. Dropped before that they leave nothing.
pub struct PreparedMessage {
    drafts: Vec<Draft>,
    ledger: QuotaCheck,
}

impl PreparedMessage {
    /// The second half: what can hardly fail any more. When one cannot be moved those that were are taken back.
    pub fn publish(mut self) -> io::Result<Vec<Entry>> {
        let published = self.drafts.iter_mut().try_for_each(Draft::publish);
        let durable = published.and_then(|()| self.folders().iter().try_for_each(|folder| sync_directory(folder)));
        let moved = || self.drafts.iter().filter_map(|draft| draft.moved.clone().map(|entry| (draft, entry)));
        if let Err(error) = durable {
            for (draft, entry) in moved() {
                let _ = draft.maildir.remove(&entry);
            }
            return Err(error);
        }
        self.ledger.record();
        Ok(moved().map(|(_, entry)| entry).collect())
    }

    /// The folders in which the messages appear, each once.
    fn folders(&self) -> BTreeSet<PathBuf> {
        self.drafts.iter().map(|draft| draft.maildir.path.join("new")).collect()
    }
}

/// What is left of a content, piece by piece.
pub fn for_each_block(content: &mut dyn Read, mut each: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
    let mut piece = vec![0; 32 * 1024];
    loop {
        match content.read(&mut piece)? {
            0 => return Ok(()),
            octets => each(&piece[..octets])?,
        }
    }
}

/// Whether the disk below a folder holds so many octets more, and a reserve.
pub fn has_room(folder: &Path, octets: u64) -> bool {
    // A folder that is not there yet is made by the first message; that it fails is found out then.
    rustix::fs::statvfs(folder)
        .map_or(true, |disk| disk.f_bavail.saturating_mul(disk.f_frsize) >= octets.saturating_add(RESERVED_SPACE))
}

/// An error that says where.
pub fn with_path(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Makes a folder and those above it; each new name is made durable.
fn make_directories(path: &Path, mode: u32) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = parent(path) {
        make_directories(parent, mode)?;
    }
    make_directory(path, mode)
}

/// Makes one folder, and its name durable.
fn make_directory(path: &Path, mode: u32) -> io::Result<()> {
    match DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
        other => other.map_err(|error| with_path(path, error))?,
    }
    sync_directory(parent(path).unwrap_or(Path::new(".")))
}

fn parent(path: &Path) -> Option<&Path> {
    path.parent().filter(|parent| !parent.as_os_str().is_empty())
}

/// Without this a file's name may be gone after a power cut though its content is on disk.
fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(|error| with_path(path, error))
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
            other => return other.map_err(|error| with_path(to, error.into())),
        }
    }
    fs::hard_link(from, to).map_err(|error| with_path(to, error))?;
    fs::remove_file(from).map_err(|error| with_path(from, error))
}

/// The files of a folder, read as they are asked for; a folder that is not there has none.
fn list(path: &Path) -> io::Result<impl Iterator<Item = io::Result<fs::DirEntry>>> {
    match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None.into_iter().flatten()),
        Err(error) => Err(with_path(path, error)),
        Ok(files) => Ok(Some(files).into_iter().flatten()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Ids;
    use std::collections::HashSet;
    use std::path::Path;

    const EMPTY: [Vec<String>; 3] = [Vec::new(), Vec::new(), Vec::new()];

    fn maildir() -> (tempfile::TempDir, Maildir) {
        let folder = tempfile::tempdir().unwrap();
        let maildir = Maildir::new(folder.path().join("deep/down/box"));
        (folder, maildir)
    }

    fn names(path: impl AsRef<Path>) -> Vec<String> {
        let Ok(files) = fs::read_dir(path) else { return Vec::new() };
        let mut names: Vec<_> = files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// What stands in `tmp`, `new` and `cur`.
    fn inside(maildir: &Maildir) -> [Vec<String>; 3] {
        ["tmp", "new", "cur"].map(|name| names(maildir.path().join(name)))
    }

    fn words(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn deliver(maildir: &Maildir, unique: &str, content: &[u8]) -> io::Result<Vec<Entry>> {
        let mut copies = MessageWriter::default();
        copies.begin(maildir, unique, b"head\n")?;
        copies.write(content)?;
        copies.commit()
    }

    fn entry(name: &str, seen: bool) -> Entry {
        Entry { name: name.to_owned(), seen }
    }

    #[test]
    fn nothing_is_seen_before_the_commit_and_all_after_it() {
        let (_folder, maildir) = maildir();
        assert!(maildir.entries().unwrap().is_empty() && maildir.is_empty().unwrap());
        let mut copies = MessageWriter::default();
        copies.begin(&maildir, "1.M2.host", b"head\n").unwrap();
        copies.write(&[b'x'; 100_000]).unwrap();
        copies.write(b"\nend\n").unwrap();
        assert_eq!(inside(&maildir), [words(&["1.M2.host"]), vec![], vec![]]);
        assert!(maildir.is_empty().unwrap());
        let entries = copies.commit().unwrap();
        let name = "1.M2.host,S=100010,W=100013";
        assert_eq!(entries, [entry(name, false)]);
        assert_eq!(inside(&maildir), [vec![], words(&[name]), vec![]]);
        assert_eq!((entries[0].unique(), entries[0].wire_size()), ("1.M2.host", Some(100_013)));
        let content = fs::read(maildir.file(&entries[0])).unwrap();
        assert!(content.starts_with(b"head\nxxx") && content.ends_with(b"xxx\nend\n"));
        assert_eq!(content.len(), 100_010);
        assert_eq!(maildir.entries().unwrap(), entries);
    }

    #[test]
    fn others_cannot_read_the_mail() {
        use std::os::unix::fs::PermissionsExt;
        let (_folder, maildir) = maildir();
        let entries = deliver(&maildir, "1", b"").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o077;
        assert_eq!((mode(&maildir.file(&entries[0])), mode(maildir.path())), (0, 0));
    }

    #[test]
    fn others_read_what_the_mask_leaves() {
        use std::os::unix::fs::PermissionsExt;
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        for mask in [0o077, 0o027, 0o007, 0o022, 0] {
            let folder = tempfile::tempdir().unwrap();
            // The umask of the test's own process applies, too.
            let probe = folder.path().join("probe");
            DirBuilder::new().mode(0o777).create(&probe).unwrap();
            let umask = 0o777 & !mode(&probe);
            let (file, dir) = (0o666 & !mask & !umask, 0o777 & !mask & !umask);
            let maildir = Maildir::masked(folder.path().join("example.org/eva"), mask);
            let entries = deliver(&maildir, "1", b"").unwrap();
            assert_eq!(mode(&maildir.file(&entries[0])), file, "{mask:o}");
            for path in ["example.org", "example.org/eva", "example.org/eva/new", "example.org/eva/tmp"] {
                assert_eq!(mode(&folder.path().join(path)), dir, "{mask:o} {path}");
            }
            let lists = maildir.folder("lists");
            ["", "cur", "new"].iter().for_each(|name| fs::create_dir(lists.path().join(name)).unwrap());
            let entries = deliver(&lists, "2", b"").unwrap();
            assert_eq!(mode(&lists.file(&entries[0])), file, "{mask:o}");
        }
    }

    #[test]
    fn a_sub_folder_takes_mail_where_it_is_there_and_is_never_made() {
        let (_folder, maildir) = maildir();
        assert!(!maildir.exists());
        maildir.create().unwrap();
        assert!(maildir.exists());
        let lists = maildir.folder("lists");
        assert_eq!(lists.path(), maildir.path().join(".lists"));
        assert!(!lists.exists());
        assert_eq!(deliver(&lists, "1", b"").unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(!lists.path().exists());
        // `tmp` alone is made good.
        for name in ["", "cur", "new"] {
            assert!(!lists.exists());
            fs::create_dir(lists.path().join(name)).unwrap();
        }
        assert!(lists.exists());
        assert_eq!(deliver(&lists, "1", b"").unwrap(), [entry("1,S=5,W=6", false)]);
        assert_eq!(inside(&lists), [vec![], words(&["1,S=5,W=6"]), vec![]]);
        assert_eq!(inside(&maildir), EMPTY);
    }

    #[test]
    fn a_sub_folder_that_vanishes_loses_nothing() {
        let (_folder, maildir) = maildir();
        let lists = maildir.folder("lists");
        Maildir::new(lists.path()).create().unwrap();
        let mut copies = MessageWriter::default();
        copies.begin(&maildir, "1", b"").unwrap();
        copies.begin(&lists, "2", b"").unwrap();
        fs::remove_dir_all(lists.path()).unwrap();
        assert_eq!(copies.commit().unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(!lists.path().exists());
        assert_eq!(inside(&maildir), EMPTY);
    }

    #[test]
    fn the_name_of_a_sub_folder_never_leads_out_of_the_mailbox() {
        let maildir = Maildir::new("box");
        for (name, path) in [
            ("lists", "box/.lists"),
            ("lists.rust", "box/.lists.rust"),
            ("", "box/.%"),
            (".", "box/.%."),
            ("./x", "box/.%.%2Fx"),
            ("../../x", "box/.%..%2F..%2Fx"),
            ("x/../../y", "box/.x%2F..%2F..%2Fy"),
        ] {
            assert_eq!(maildir.folder(name).path(), Path::new(path), "{name}");
        }
        assert!(!maildir.folder("\0").exists() && !maildir.folder(&"x".repeat(1000)).exists());
    }

    #[test]
    fn a_folder_that_gets_several_is_fsynced_once() {
        let (folder, maildir) = maildir();
        let other = Maildir::new(folder.path().join("other"));
        let mut copies = MessageWriter::default();
        for (number, maildir) in [&maildir, &other, &maildir, &maildir].into_iter().enumerate() {
            copies.begin(maildir, &number.to_string(), b"").unwrap();
        }
        let prepared = copies.prepare().unwrap();
        assert_eq!(
            prepared.folders().into_iter().collect::<Vec<_>>(),
            [maildir.path().join("new"), other.path().join("new")]
        );
        assert_eq!(prepared.publish().unwrap().len(), 4);
        assert_eq!(inside(&maildir).map(|names| names.len()), [0, 3, 0]);
    }

    #[test]
    fn what_is_prepared_is_not_seen_yet() {
        let (_folder, maildir) = maildir();
        let prepared = |unique| {
            let mut copies = MessageWriter::default();
            copies.begin(&maildir, unique, b"head\n").unwrap();
            copies.prepare().unwrap()
        };
        let ready = prepared("1");
        assert_eq!(inside(&maildir).map(|names| names.len()), [1, 0, 0]);
        ready.publish().unwrap();
        drop(prepared("2"));
        assert_eq!(inside(&maildir).map(|names| names.len()), [0, 1, 0]);
    }

    #[test]
    fn a_dropped_draft_leaves_nothing() {
        let (_folder, maildir) = maildir();
        let mut copies = MessageWriter::default();
        copies.begin(&maildir, "1", b"head").unwrap();
        drop(copies);
        assert_eq!(inside(&maildir), EMPTY);
    }

    #[test]
    fn nothing_is_ever_overwritten() {
        let (_folder, maildir) = maildir();
        let entries = deliver(&maildir, "1", b"first").unwrap();
        // The same name again, of the same size: rename(2) would have replaced it.
        let error = deliver(&maildir, "1", b"other").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(maildir.file(&entries[0])).unwrap(), b"head\nfirst");
        assert_eq!(inside(&maildir), [vec![], words(&["1,S=10,W=11"]), vec![]]);
        // Nor is another writer's draft.
        fs::write(maildir.path().join("tmp/2"), "theirs").unwrap();
        assert_eq!(deliver(&maildir, "2", b"").unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(maildir.path().join("tmp/2")).unwrap(), b"theirs");
        maildir.discard("2").unwrap();
        maildir.discard("2").unwrap();
        assert_eq!(deliver(&maildir, "2", b"").unwrap().len(), 1);
    }

    #[test]
    fn several_maildirs_get_a_message_all_or_none() {
        for broken in 0..3 {
            let folder = tempfile::tempdir().unwrap();
            let maildirs: Vec<_> = (0..3).map(|number| Maildir::new(folder.path().join(number.to_string()))).collect();
            let deliver = || {
                let mut copies = MessageWriter::default();
                for (number, maildir) in maildirs.iter().enumerate() {
                    copies.begin(maildir, "1", format!("{number}\n").as_bytes()).unwrap();
                }
                copies.write(b"content\n").unwrap();
                copies.commit()
            };
            let new = maildirs[broken].path().join("new");
            maildirs[broken].create().unwrap();
            fs::remove_dir(&new).unwrap();
            fs::write(&new, "no folder").unwrap();
            let error = deliver().unwrap_err();
            assert!(error.to_string().contains(&format!("/{broken}/")), "{error}");
            for maildir in &maildirs {
                assert_eq!(inside(maildir), EMPTY, "{broken}");
            }
            fs::remove_file(&new).unwrap();
            fs::create_dir(&new).unwrap();
            assert_eq!(deliver().unwrap().len(), 3);
            for (number, maildir) in maildirs.iter().enumerate() {
                let content = fs::read(maildir.path().join("new/1,S=10,W=12")).unwrap();
                assert_eq!(content, format!("{number}\ncontent\n").as_bytes());
            }
        }
    }

    #[test]
    fn a_file_where_a_folder_should_be_is_an_error_that_says_where() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("file"), "").unwrap();
        let maildir = Maildir::new(folder.path().join("file/box"));
        let error = maildir.create().unwrap_err();
        assert!(error.to_string().contains("/file"), "{error}");
        assert!(deliver(&maildir, "1", b"").is_err());
    }

    #[test]
    fn entries_come_by_name_and_hidden_ones_not_at_all() {
        let (_folder, maildir) = maildir();
        maildir.create().unwrap();
        for name in ["new/3", "new/1,S=1,W=2", "cur/2:2,S", "new/.hidden", "cur/.4", "tmp/5"] {
            fs::write(maildir.path().join(name), "").unwrap();
        }
        let expected = [entry("1,S=1,W=2", false), entry("2:2,S", true), entry("3", false)];
        assert_eq!(maildir.entries().unwrap(), expected);
        for entry in &expected {
            assert!(!maildir.is_empty().unwrap());
            maildir.remove(entry).unwrap();
            // Gone already is as good as gone.
            maildir.remove(entry).unwrap();
        }
        assert!(maildir.is_empty().unwrap());
    }

    #[test]
    fn names_tell_what_they_tell() {
        let check = |name: &str, unique: &str, wire_size| {
            let entry = entry(name, false);
            assert_eq!((entry.unique(), entry.wire_size()), (unique, wire_size), "{name}");
        };
        check("1.M2P3.host,S=10,W=12", "1.M2P3.host", Some(12));
        check("1.M2P3.host,W=12,S=10:2,FS", "1.M2P3.host", Some(12));
        check("1.M2P3.host:2,W=7", "1.M2P3.host", None);
        check("1.M2P3.host,W=x", "1.M2P3.host", None);
        check("1.M2P3.host", "1.M2P3.host", None);
        check("", "", None);
    }

    #[test]
    fn in_doubt_is_a_flag_that_readers_show() {
        let (_folder, maildir) = maildir();
        let entries = deliver(&maildir, "1", b"").unwrap();
        maildir.flag(&entries[0], IN_DOUBT).unwrap();
        assert_eq!(inside(&maildir), [vec![], vec![], words(&["1,S=5,W=6:2,F"])]);
        let marked = maildir.entries().unwrap();
        assert_eq!((marked[0].seen, marked[0].unique()), (true, "1"));
        maildir.flag(&marked[0], IN_DOUBT).unwrap();
        assert_eq!(maildir.entries().unwrap(), marked);
        // Nothing is overwritten here either.
        deliver(&maildir, "1", b"").unwrap();
        assert!(maildir.flag(&entries[0], IN_DOUBT).is_err());
        assert_eq!(maildir.entries().unwrap().len(), 2);
    }

    #[test]
    fn litter_goes_after_36_hours() {
        let (_folder, maildir) = maildir();
        maildir.sweep().unwrap();
        maildir.create().unwrap();
        let hours = |hours: u64| SystemTime::now() - Duration::from_secs(hours * 60 * 60);
        for (name, read, written) in
            [("young", 35, 35), ("old", 37, 37), ("written", 37, 1), ("read", 1, 37), (".old", 37, 40)]
        {
            let file = File::create(maildir.path().join("tmp").join(name)).unwrap();
            let times = fs::FileTimes::new().set_accessed(hours(read)).set_modified(hours(written));
            file.set_times(times).unwrap();
        }
        let folder = maildir.path().join("tmp/a-folder");
        fs::create_dir(&folder).unwrap();
        let times = fs::FileTimes::new().set_accessed(hours(40)).set_modified(hours(40));
        File::open(&folder).unwrap().set_times(times).unwrap();
        maildir.sweep().unwrap();
        assert_eq!(names(maildir.path().join("tmp")), ["a-folder", "read", "written", "young"]);
    }

    #[test]
    fn ten_thousand_drafts_at_once_get_ten_thousand_names() {
        let (_folder, maildir) = maildir();
        maildir.create().unwrap();
        let ids = Ids::system(|octets| octets.fill(7));
        let unique: Vec<HashSet<String>> = std::thread::scope(|scope| {
            let deliver = || {
                let deliver = |_| {
                    let mut draft = maildir.draft(&ids.file_name("host")).unwrap();
                    draft.publish().unwrap();
                    draft.unique.clone()
                };
                (0..1250).map(deliver).collect()
            };
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(deliver)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(unique.iter().flatten().collect::<HashSet<_>>().len(), 10_000);
        assert_eq!(inside(&maildir).map(|names| names.len()), [0, 10_000, 0]);
    }
}
