//! Files and directories whose names survive a power cut, and errors that name the path.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

/// The same error, its text beginning with the path.
pub fn with_path(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Makes a directory and those above it, each name durable.
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

/// Makes the names in a directory durable: without it a power cut may lose the name of a file whose content is on
/// disk.
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

/// The files of a directory, read one by one; none if the directory is missing.
pub(super) fn list(path: &Path) -> io::Result<impl Iterator<Item = io::Result<fs::DirEntry>>> {
    match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None.into_iter().flatten()),
        Err(error) => Err(with_path(path, error)),
        Ok(files) => Ok(Some(files).into_iter().flatten()),
    }
}
