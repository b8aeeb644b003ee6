//! Files and directories whose names survive a power cut, and errors that name the path and the remedy.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, DirEntry, File, Metadata, OpenOptions, Permissions};
use std::io;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use rustix::fs::{Access, AtFlags, CWD, OFlags};
use rustix::io::Errno;

use crate::sandbox;
use crate::threads::Guarded;

/// Puts the path before the text of an error. If this process or the system has no descriptors left, the kind becomes
/// `OutOfMemory`, because there is no kind for that.
pub fn with_path(path: &Path, error: io::Error) -> io::Error {
    with_problem(path, "", error)
}

fn with_problem(path: &Path, problem: &str, error: io::Error) -> io::Error {
    let short = matches!(Errno::from_io_error(&error), Some(Errno::MFILE | Errno::NFILE));
    let error = sandbox::explain_mail(path, error);
    let kind = if short { io::ErrorKind::OutOfMemory } else { error.kind() };
    io::Error::new(kind, format!("{}{problem}: {error}", path.display()))
}

/// The error that a file cannot be written to, with the path, the reason and the remedy.
pub fn write_error(path: &Path, error: io::Error) -> io::Error {
    with_remedy(path.parent().unwrap_or(path), with_problem(path, " cannot be written to", error))
}

/// Puts the remedy after the text of an error of writing into a directory.
pub fn with_remedy(directory: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{error}{}", write_remedy(&error, directory)))
}

/// A path quoted for a command that an administrator copies into a shell: without quotes, `chown -R odmr /srv/my mail`
/// would change `/srv/my`.
pub fn shell_word(path: &Path) -> String {
    let path = path.display().to_string();
    match path.chars().all(|character| character.is_alphanumeric() || "/._-+:@%,=".contains(character)) {
        true => path,
        false => format!("'{}'", path.replace('\'', "'\\''")),
    }
}

/// The remedy for an error of writing into a directory, to be put after the error's text.
pub fn write_remedy(error: &io::Error, directory: &Path) -> String {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            format!("; let the user that odmr runs as write there: chown or chmod {}", directory.display())
        }
        io::ErrorKind::ReadOnlyFilesystem => {
            "; mount that file system read-write, or name a directory on another".to_owned()
        }
        io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists => {
            "; a file is where a directory must be: move it away, or name another directory".to_owned()
        }
        io::ErrorKind::IsADirectory => "; a directory is where a file must be: move it away".to_owned(),
        _ => String::new(),
    }
}

/// The identity of a file under any name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    /// Returns the id of an open file.
    ///
    /// # Errors
    /// The system's, without the path.
    pub fn of_file(file: &File) -> io::Result<FileId> {
        file.metadata().map(|metadata| FileId::of(&metadata))
    }

    /// Returns the id of the file, link or directory of this name.
    ///
    /// # Errors
    /// `NotFound` if there is none; otherwise the system's. Without the path.
    pub fn of_path(path: &Path) -> io::Result<FileId> {
        fs::symlink_metadata(path).map(|metadata| FileId::of(&metadata))
    }

    fn of(metadata: &Metadata) -> FileId {
        FileId { device: metadata.dev(), inode: metadata.ino() }
    }
}

/// Makes a directory and those above it that are missing.
pub(super) fn make_directories(path: &Path, mode: u32) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = parent(path) {
        make_directories(parent, mode)?;
    }
    make_directory(path, mode)
}

/// Prepares a directory of mail before this process gives up its rights to the directories above: fsyncs its name, and
/// with a `mode` makes it first. A failure is ignored: storing the first message reports it.
pub fn prepare_directory(path: &Path, mode: Option<u32>) {
    let _ = mode.map_or(Ok(()), |mode| make_directories(path, mode)).and_then(|()| sync_names(path));
}

/// Makes one directory, unless another thread has just made it.
///
/// # Errors
/// `NotFound` if the directory above is missing, or another process has just removed this one.
pub(super) fn make_directory(path: &Path, mode: u32) -> io::Result<()> {
    match DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => match fs::symlink_metadata(path) {
            Ok(found) if found.is_dir() || found.is_symlink() && path.is_dir() => return Ok(()),
            Ok(_) => return Err(with_path(path, error)),
            Err(error) => return Err(with_path(path, error)),
        },
        other => other.map_err(|error| with_path(path, error))?,
    }
    // The system may give it the inode number of a removed one, whose name was fsynced.
    if let Ok(id) = DirectoryId::of_path(path) {
        DURABLE.lock().get_or_insert_default().remove(&id);
    }
    Ok(())
}

/// The identity of a directory. The system may give the inode number of a removed directory to a new one, which another
/// process makes. Its time of birth distinguishes it, if the file system has that.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct DirectoryId {
    file: FileId,
    born: Option<SystemTime>,
}

impl DirectoryId {
    fn of_path(path: &Path) -> io::Result<DirectoryId> {
        let metadata = fs::symlink_metadata(path)?;
        Ok(DirectoryId { file: FileId::of(&metadata), born: metadata.created().ok() })
    }
}

/// The directories whose names this process has fsynced.
static DURABLE: Guarded<Option<HashSet<DirectoryId>>> = Guarded::new(None);

/// The errors of fsync(2) that do not mean a failure of the disk.
const NOT_SYNCED: [io::ErrorKind; 4] = [
    io::ErrorKind::PermissionDenied,
    io::ErrorKind::InvalidInput,
    io::ErrorKind::ReadOnlyFilesystem,
    io::ErrorKind::Unsupported,
];

/// When there are this many ids, all are removed, to bound the memory; the directories are then fsynced once more.
const DURABLE_LIMIT: usize = 100_000;

/// Fsyncs the names of a directory and of all above it, each once in this process. Another thread may have made one of
/// them just now, or a process that was then killed: without the fsync, a power cut could remove the directory with
/// mail that was answered with 250. Directories that this user may not read are left out, and those that cannot be
/// fsynced, such as those of autofs and of read-only file systems.
pub(super) fn sync_names(path: &Path) -> io::Result<()> {
    let known = |id: DirectoryId, add: bool| {
        let mut durable = DURABLE.lock();
        let durable = durable.get_or_insert_default();
        if add && durable.len() >= DURABLE_LIMIT {
            durable.clear();
        }
        if add { !durable.insert(id) } else { durable.contains(&id) }
    };
    let mut names = Vec::new();
    let mut at = path;
    while let Some(above) = parent(at) {
        let id = DirectoryId::of_path(at).map_err(|error| with_path(at, error))?;
        if known(id, false) {
            break;
        }
        names.push((id, above));
        at = above;
    }
    for (id, above) in names {
        match sync_directory(above) {
            Err(error) if NOT_SYNCED.contains(&error.kind()) => {}
            other => other?,
        }
        known(id, true);
    }
    Ok(())
}

fn parent(path: &Path) -> Option<&Path> {
    path.parent()
        .map(|parent| if parent.as_os_str().is_empty() { Path::new(".") } else { parent })
        .filter(|parent| *parent != path)
}

/// Fsyncs a directory: otherwise a power cut may lose the name of a file whose content is on disk.
pub(super) fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path).and_then(|directory| directory.sync_all()).map_err(|error| with_path(path, error))
}

/// Moves a file without ever overwriting another. rename(2) would overwrite it silently.
pub(super) fn move_file(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            // This file system does not have the flag: use link(2) and unlink(2).
            Err(Errno::INVAL | Errno::NOSYS) => {}
            other => return other.map_err(|error| with_path(to, error.into())),
        }
    }
    match fs::hard_link(from, to) {
        // A network file system repeats a request whose reply was lost: the link was made the first time.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && same_file(from, to) => {}
        other => other.map_err(|error| with_path(to, error))?,
    }
    // The file has its new name, so a failure is ignored: with two names it is still one message, known by its inode.
    let _ = fs::remove_file(from);
    Ok(())
}

fn same_file(one: &Path, other: &Path) -> bool {
    matches!((FileId::of_path(one), FileId::of_path(other)), (Ok(one), Ok(other)) if one == other)
}

/// Removes a file. It is not an error if there is none.
///
/// # Errors
/// The file cannot be removed.
pub fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(with_path(path, error)),
        _ => Ok(()),
    }
}

/// Sets the times of access and modification of a file of any type. It is not an error if there is none.
pub(super) fn set_times(path: &Path, time: SystemTime) -> io::Result<()> {
    use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let time = Timespec { tv_sec: since.as_secs().cast_signed(), tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    match utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
        Err(error) => Err(with_path(path, error.into())),
    }
}

/// Opens a new file in a directory that several users share, such as `/tmp`, for reading and writing, as
/// [`Maildir::unnamed_file`](super::Maildir::unnamed_file) does.
///
/// # Errors
/// The file cannot be created.
pub fn unnamed_file_in(directory: &Path, unique: &str) -> io::Result<File> {
    let path = directory.join(format!("odmr-{unique}"));
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
    file.and_then(|file| fs::remove_file(&path).map(|()| file)).map_err(|error| with_path(&path, error))
}

/// Returns why this user may not write into a directory, or may not make it: its rights, or a read-only file system.
/// `None`: the user may, or writing would fail for another reason.
pub fn write_denial(directory: &Path) -> Option<io::Error> {
    // EACCESS checks the effective ids: a setgid program has the rights of its group.
    let access = |path| rustix::fs::accessat(CWD, path, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS);
    let mut above = directory.ancestors().map(|path| (path, access(path)));
    match above.find(|(_, found)| *found != Err(Errno::NOENT)) {
        Some((path, Err(error @ (Errno::ACCESS | Errno::PERM | Errno::ROFS)))) => Some(with_path(path, error.into())),
        _ => None,
    }
}

/// Writes a small file, 0600, in one step: a reader sees the old text or the new one. Its directory is made if it is
/// missing. Nothing is fsynced: a power cut may lose both texts.
///
/// # Errors
/// The file cannot be written; the old one stays.
pub fn replace_file(path: &Path, text: &str) -> io::Result<()> {
    replace(path, text, &|_| Ok(()))
}

/// Like [`replace_file`], but fsyncs the file and its name. If the file exists, its mode and its owner stay.
///
/// # Errors
/// The file cannot be written; the old one stays.
pub fn replace_file_durably(path: &Path, text: &str) -> io::Result<()> {
    replace(path, text, &|file| {
        match fs::metadata(path) {
            Ok(old) => {
                let new = file.metadata()?;
                if (old.uid(), old.gid()) != (new.uid(), new.gid()) {
                    fchown(file, Some(old.uid()), Some(old.gid()))?;
                }
                file.set_permissions(old.permissions())?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        file.sync_all()
    })?;
    parent(path).map_or(Ok(()), sync_directory)
}

/// Writes a new file with this mode in one step, and fsyncs it and its name. `group`: its group, if that is not the one
/// of this process. Other users cannot read it before it has its mode.
///
/// # Errors
/// `AlreadyExists` if there is a file of that name, which stays; otherwise the file cannot be written.
pub fn create_file_durably(path: &Path, text: &str, mode: u32, group: Option<u32>) -> io::Result<()> {
    let complete = |file: &File| {
        if group.is_some() {
            fchown(file, None, group)?;
        }
        file.set_permissions(Permissions::from_mode(mode))?;
        file.sync_all()
    };
    write_beside(path, text, &complete, &|from, to| move_file(from, to))?;
    parent(path).map_or(Ok(()), sync_directory)
}

/// Makes a directory with those below it, all with this mode and owner, in one step: after a crash there is nothing of
/// that name, or the whole tree. `below` has each directory after the one that contains it. The directories above are
/// made if they are missing. Returns whether it was made: a directory that exists stays as it is.
///
/// # Errors
/// `NotADirectory` if there is a file of that name; otherwise a directory cannot be made.
pub fn make_tree(path: &Path, below: &[PathBuf], mode: u32, owner: Option<(u32, u32)>) -> io::Result<bool> {
    match fs::metadata(path) {
        Ok(found) if found.is_dir() => return Ok(false),
        Ok(_) => return Err(with_path(path, io::ErrorKind::NotADirectory.into())),
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(with_path(path, error)),
        Err(_) => {}
    }
    let (Some(directory), Some(name)) = (parent(path), path.file_name()) else {
        return Err(with_path(path, io::ErrorKind::InvalidInput.into()));
    };
    make_directories(directory, 0o755)?;
    let temporary = directory.join(format!(".{}.{}", name.display(), std::process::id()));
    let make = || {
        // A process that was killed may have left a directory of that name.
        let _ = fs::remove_dir_all(&temporary);
        // Another user may replace a directory that was just made by a link: do not give away what the link points to.
        let flags = (OFlags::NOFOLLOW | OFlags::DIRECTORY).bits().cast_signed();
        let mut made = Vec::new();
        for path in std::iter::once(temporary.clone()).chain(below.iter().map(|below| temporary.join(below))) {
            DirBuilder::new().mode(0o700).create(&path)?;
            let directory = OpenOptions::new().read(true).custom_flags(flags).open(&path)?;
            directory.set_permissions(Permissions::from_mode(mode))?;
            made.push(directory);
        }
        // A directory gets its owner after those in it, so that the owner cannot put a link there before.
        for directory in made.iter().rev() {
            if let Some((user, group)) = owner {
                fchown(directory, Some(user), Some(group))?;
            }
            directory.sync_all()?;
        }
        fs::rename(&temporary, path)
    };
    if let Err(error) = make() {
        let _ = fs::remove_dir_all(&temporary);
        // Another process has just made it.
        return if path.is_dir() { Ok(false) } else { Err(with_path(path, error)) };
    }
    sync_names(path).map(|()| true)
}

/// Removes a file, and fsyncs its directory: it stays removed after a power cut.
///
/// # Errors
/// The file cannot be removed.
pub fn remove_file_durably(path: &Path) -> io::Result<()> {
    fs::remove_file(path).map_err(|error| with_path(path, error))?;
    parent(path).map_or(Ok(()), sync_directory)
}

fn replace(path: &Path, text: &str, complete: &dyn Fn(&File) -> io::Result<()>) -> io::Result<()> {
    write_beside(path, text, complete, &|from, to| fs::rename(from, to))
}

/// Writes a file in the directory of `path`; then `complete` does its work on it, and `name` moves it to `path`.
fn write_beside(
    path: &Path, text: &str, complete: &dyn Fn(&File) -> io::Result<()>, name: &dyn Fn(&Path, &Path) -> io::Result<()>,
) -> io::Result<()> {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let (Some(directory), Some(file_name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    make_directories(directory, 0o700)?;
    let (process, number) = (std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
    let temporary = directory.join(format!(".{}.{process}.{number}", file_name.display()));
    let write = || {
        // A process that was killed may have left a file of that name.
        remove_if_there(&temporary)?;
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(text.as_bytes())?;
        complete(&file)?;
        name(&temporary, path)
    };
    write().map_err(|error| with_path(path, error)).inspect_err(|_| drop(fs::remove_file(&temporary)))
}

/// Lists a directory file by file; a missing directory is empty.
pub(super) fn list(path: &Path) -> impl Iterator<Item = io::Result<DirEntry>> + use<> {
    let (files, failure) = match fs::read_dir(path) {
        Ok(files) => (Some(files), None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => (None, None),
        Err(error) => (None, Some(Err(error))),
    };
    let path = path.to_owned();
    files.into_iter().flatten().chain(failure).map(move |file| file.map_err(|error| with_path(&path, error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Another process removes a directory and makes it again: the name of the second one was not fsynced.
    #[test]
    fn a_directory_that_was_made_again_is_another_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new");
        let made = || {
            fs::create_dir(&path).unwrap();
            let id = DirectoryId::of_path(&path).unwrap();
            fs::remove_dir(&path).unwrap();
            id
        };
        let ids: HashSet<_> = (0..20).map(|_| made()).collect();
        let has_birth = ids.iter().all(|id| id.born.is_some());
        assert!(!has_birth || ids.len() == 20, "{}", ids.len());
    }
}
