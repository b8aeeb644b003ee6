//! Files and directories whose names survive a power cut, and errors that name the path.

use std::fs::{self, DirBuilder, DirEntry, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::time::SystemTime;

/// Puts the path before the text of an error.
pub fn with_path(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Makes a directory and those above it that are missing, each name durable.
pub(super) fn make_directories(path: &Path, mode: u32) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = parent(path) {
        make_directories(parent, mode)?;
    }
    make_directory(path, mode)
}

/// Makes one directory, its name durable also if another thread or an earlier crash has made it.
pub(super) fn make_directory(path: &Path, mode: u32) -> io::Result<()> {
    match DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
        other => other.map_err(|error| with_path(path, error))?,
    }
    sync_directory(parent(path).unwrap_or(Path::new(".")))
}

fn parent(path: &Path) -> Option<&Path> {
    path.parent().filter(|parent| !parent.as_os_str().is_empty())
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
        use rustix::io::Errno;
        match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            // This file system cannot do it: link(2) and unlink(2) can, in two steps.
            Err(Errno::INVAL | Errno::NOSYS) => {}
            other => return other.map_err(|error| with_path(to, error.into())),
        }
    }
    fs::hard_link(from, to).map_err(|error| with_path(to, error))?;
    fs::remove_file(from).map_err(|error| with_path(from, error))
}

/// Removes a file; a file that is already gone is not an error.
pub(super) fn remove_if_there(path: &Path) -> io::Result<()> {
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
