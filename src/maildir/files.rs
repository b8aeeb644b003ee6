//! Files and directories whose names survive a power cut, and errors that name the path.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, DirEntry, File, Metadata, OpenOptions, Permissions};
use std::io;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use rustix::fs::{Access, AtFlags, CWD, OFlags};
use rustix::io::Errno;

use crate::sandbox;

/// Puts the path before the text of an error. That this process or the system has no descriptor left, for which there is no
/// kind, becomes `OutOfMemory`.
pub fn with_path(path: &Path, error: io::Error) -> io::Error {
    with_problem(path, "", error)
}

fn with_problem(path: &Path, problem: &str, error: io::Error) -> io::Error {
    let short = matches!(Errno::from_io_error(&error), Some(Errno::MFILE | Errno::NFILE));
    let error = sandbox::explain_mail(path, error);
    let kind = if short { io::ErrorKind::OutOfMemory } else { error.kind() };
    io::Error::new(kind, format!("{}{problem}: {error}", path.display()))
}

/// Says that a file cannot be written to, why, and what to do.
pub fn write_error(path: &Path, error: io::Error) -> io::Error {
    with_remedy(path.parent().unwrap_or(path), with_problem(path, " cannot be written to", error))
}

/// Puts what to do after the text of an error of writing into a directory.
pub fn with_remedy(directory: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{error}{}", write_remedy(&error, directory)))
}

/// A path as a word of a command that somebody copies into a shell, perhaps root: `chown -R odmr /srv/my mail` is about `/srv/my`.
pub fn shell_word(path: &Path) -> String {
    let path = path.display().to_string();
    match path.chars().all(|character| character.is_alphanumeric() || "/._-+:@%,=".contains(character)) {
        true => path,
        false => format!("'{}'", path.replace('\'', "'\\''")),
    }
}

/// What to do about an error of writing into a directory, as the end of the error's text.
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

/// Which file it is, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    /// Returns the id of an open file.
    pub fn of_file(file: &File) -> io::Result<FileId> {
        file.metadata().map(|metadata| FileId::of(&metadata))
    }

    /// Returns the id of the file, link or directory that has this name.
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

/// Prepares a directory of mail before this process may no longer use those above it: makes its name durable, and before
/// the directory itself, if there is a mode for it. If that fails, the first message that is stored there finds out why.
pub fn prepare_directory(path: &Path, mode: Option<u32>) {
    let _ = mode.map_or(Ok(()), |mode| make_directories(path, mode)).and_then(|()| sync_names(path));
}

/// Makes one directory, unless another thread has just made it.
///
/// # Errors
/// `NotFound` also if another process has just removed it.
pub(super) fn make_directory(path: &Path, mode: u32) -> io::Result<()> {
    match DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => match fs::symlink_metadata(path) {
            Ok(found) if found.is_dir() || found.is_symlink() && path.is_dir() => return Ok(()),
            Ok(_) => return Err(with_path(path, error)),
            Err(error) => return Err(with_path(path, error)),
        },
        other => other.map_err(|error| with_path(path, error))?,
    }
    // The system may give it the number of one that was removed.
    if let Ok(id) = DirectoryId::of_path(path) {
        DURABLE.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default().remove(&id);
    }
    Ok(())
}

/// Which directory it is. The system may give the number of one that was removed to the next, which another process makes: it
/// is known by its time of birth, if the file system has that.
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

/// The directories whose names this process has made durable.
static DURABLE: Mutex<Option<HashSet<DirectoryId>>> = Mutex::new(None);

/// The errors of fsync(2) that say nothing about the disk.
const NOT_SYNCED: [io::ErrorKind; 4] = [
    io::ErrorKind::PermissionDenied,
    io::ErrorKind::InvalidInput,
    io::ErrorKind::ReadOnlyFilesystem,
    io::ErrorKind::Unsupported,
];

/// Ids that are remembered; then all are forgotten, and the directories fsynced once more.
const DURABLE_LIMIT: usize = 100_000;

/// Makes the name of a directory and of all above it durable. Another thread may have made them just now, or a process that
/// was killed before it could make them durable: then a power cut would take what was answered 250 in them. Each is fsynced
/// once by this process. A directory that this user may not read is not ours to fsync, and some cannot be fsynced at all, such
/// as those of autofs and of file systems that cannot be written.
pub(super) fn sync_names(path: &Path) -> io::Result<()> {
    let known = |id: DirectoryId, add: bool| {
        let mut durable = DURABLE.lock().unwrap_or_else(PoisonError::into_inner);
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

/// Makes the names in a directory durable: a power cut may otherwise lose the name of a file whose content is on disk.
pub(super) fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path).and_then(|directory| directory.sync_all()).map_err(|error| with_path(path, error))
}

/// Moves a file without ever overwriting another: rename(2) overwrites silently.
pub(super) fn move_file(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            // This file system cannot do it: link(2) and unlink(2) can, in two steps.
            Err(Errno::INVAL | Errno::NOSYS) => {}
            other => return other.map_err(|error| with_path(to, error.into())),
        }
    }
    match fs::hard_link(from, to) {
        // The link was made, and the reply to an earlier attempt was lost: a network file system repeats it.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && same_file(from, to) => {}
        other => other.map_err(|error| with_path(to, error))?,
    }
    // It has its new name. With the old one too it is still one message, which its readers know by the file.
    let _ = fs::remove_file(from);
    Ok(())
}

fn same_file(one: &Path, other: &Path) -> bool {
    matches!((FileId::of_path(one), FileId::of_path(other)), (Ok(one), Ok(other)) if one == other)
}

/// Removes a file; a file that is already gone is not an error.
pub fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(with_path(path, error)),
        _ => Ok(()),
    }
}

/// Sets the times of last use of a file, whatever its type; a file that is already gone is not an error.
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

/// Opens a new file in a directory of several users, such as `/tmp`, for reading and writing, as
/// [`Maildir::unnamed_file`](super::Maildir::unnamed_file) does.
pub fn unnamed_file_in(directory: &Path, unique: &str) -> io::Result<File> {
    let path = directory.join(format!("odmr-{unique}"));
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
    file.and_then(|file| fs::remove_file(&path).map(|()| file)).map_err(|error| with_path(&path, error))
}

/// Returns why this user may not write into a directory, or may not make it: the rights, or a file system that is read-only.
/// `None`: they may, or something else prevents it.
pub fn write_denial(directory: &Path) -> Option<io::Error> {
    // A program with a group of its own (setgid) has the rights of that group.
    let access = |path| rustix::fs::accessat(CWD, path, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS);
    let mut above = directory.ancestors().map(|path| (path, access(path)));
    match above.find(|(_, found)| *found != Err(Errno::NOENT)) {
        Some((path, Err(error @ (Errno::ACCESS | Errno::PERM | Errno::ROFS)))) => Some(with_path(path, error.into())),
        _ => None,
    }
}

/// Writes a small file, 0600, in one step: a reader sees the old text or the new one. Its directory is made if it is missing.
/// Nothing is fsynced: a power cut may lose the text.
pub fn replace_file(path: &Path, text: &str) -> io::Result<()> {
    replace(path, text, &|_| Ok(()))
}

/// Writes a small file in the same way, and fsyncs it. If the file exists, its mode and its owner stay.
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

/// Writes a new file with this mode, durably and in one step; `group`: other than that of this process. Nobody else can read
/// it before it has its mode.
///
/// # Errors
///
/// `AlreadyExists`: there is a file of that name, which stays. The system's, with the path.
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

/// Makes a directory with those below it, all with this mode and this owner, in one step: a crash leaves nothing of that name
/// or all of it. `below` has each directory after the one that it is in. Those above it are made if they are missing.
/// Returns whether it was made: one that exists stays as it is.
///
/// # Errors
///
/// The system's, with the path.
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
        // One of that name is left of a process that was killed.
        let _ = fs::remove_dir_all(&temporary);
        // Another user may have put a link in the place of one that was just made.
        let flags = (OFlags::NOFOLLOW | OFlags::DIRECTORY).bits().cast_signed();
        let mut made = Vec::new();
        for path in std::iter::once(temporary.clone()).chain(below.iter().map(|below| temporary.join(below))) {
            DirBuilder::new().mode(0o700).create(&path)?;
            let directory = OpenOptions::new().read(true).custom_flags(flags).open(&path)?;
            directory.set_permissions(Permissions::from_mode(mode))?;
            made.push(directory);
        }
        // A directory gets its owner after those in it, so that nobody can put a link there before.
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
        // Another process has made it meanwhile.
        return if path.is_dir() { Ok(false) } else { Err(with_path(path, error)) };
    }
    sync_names(path).map(|()| true)
}

/// Removes a file, and makes that durable.
///
/// # Errors
///
/// The system's, with the path.
pub fn remove_file_durably(path: &Path) -> io::Result<()> {
    fs::remove_file(path).map_err(|error| with_path(path, error))?;
    parent(path).map_or(Ok(()), sync_directory)
}

fn replace(path: &Path, text: &str, complete: &dyn Fn(&File) -> io::Result<()>) -> io::Result<()> {
    write_beside(path, text, complete, &|from, to| fs::rename(from, to))
}

/// `complete`: what is done with the new file before `name` gives it its name.
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
        // One of that name is left of a process that was killed.
        remove_if_there(&temporary)?;
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(text.as_bytes())?;
        complete(&file)?;
        name(&temporary, path)
    };
    write().map_err(|error| with_path(path, error)).inspect_err(|_| drop(fs::remove_file(&temporary)))
}

/// Lists a directory file by file; a directory that is missing has none.
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

    /// Another process removes a directory and makes it again: a name that was made durable is that of the first one.
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
