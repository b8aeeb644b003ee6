//! Files beside the queues and mailboxes that are not mail: the locks and the state of this program, in `ROOT/.odmr/`.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::files::{with_path, write_remedy};
use super::sweep::sweep;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Opens the file `ROOT/.odmr/NAME` for reading and writing, and creates it if it does not exist. A symbolic link is not
/// followed: root may work in another user's directory.
///
/// # Errors
///
/// The directory or the file cannot be created or opened; the text has its path.
pub fn open_state_file(root: &Path, name: &str) -> io::Result<File> {
    let directory = root.join(".odmr");
    DirBuilder::new().recursive(true).mode(0o700).create(&directory).map_err(|error| {
        let remedy = write_remedy(&error, root);
        io::Error::new(error.kind(), format!("{}: {error}{remedy}", directory.display()))
    })?;
    let path = directory.join(name);
    options().create(true).truncate(false).mode(0o600).open(&path).map_err(|error| with_path(&path, error))
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed());
    options
}

/// Opens that file if another process has its lock; `None`: no process has, or there is no such file.
///
/// # Errors
///
/// The file cannot be opened; the text has its path. The system's.
pub fn locked_state_file(root: &Path, name: &str) -> io::Result<Option<File>> {
    let path = root.join(".odmr").join(name);
    let file = match options().open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(|error| with_path(&path, error))?,
    };
    match file.try_lock() {
        Ok(()) => Ok(None),
        Err(TryLockError::WouldBlock) => Ok(Some(file)),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Opens and locks that file; the lock lasts as long as the file is open. `None`: another process has the lock.
///
/// # Errors
///
/// Those of [`open_state_file`], and the system's.
pub fn lock_state_file(root: &Path, name: &str) -> io::Result<Option<File>> {
    let file = open_state_file(root, name)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Begins what is done once a day by whichever process comes first: locks the file `ROOT/.odmr/NAME`, whose time says when
/// it was done. `None`: it was done, or another process does it.
///
/// # Errors
///
/// Those of [`lock_state_file`], and the system's.
pub fn begin_daily(root: &Path, name: &str) -> io::Result<Option<File>> {
    let Some(mut file) = lock_state_file(root, name)? else { return Ok(None) };
    let (metadata, now) = (file.metadata()?, SystemTime::now());
    // A time in the future is from before the clock was set.
    if metadata.len() > 0 && now.duration_since(metadata.modified()?).is_ok_and(|age| age < DAY) {
        return Ok(None);
    }
    file.write_all(b"\n")?;
    Ok(Some(file))
}

/// Removes the files in `ROOT/.odmr/` that were not used for 36 hours and of which `is_left` is true, and those that a
/// process has left that was killed while it replaced one.
///
/// # Errors
///
/// The system's.
pub fn sweep_state_files(root: &Path, is_left: &dyn Fn(&str) -> bool) -> io::Result<()> {
    sweep(&root.join(".odmr"), &|name| name.starts_with('.') || is_left(name))
}
