//! The locks and the state of this program, in `ROOT/.odmr/`. ROOT is the spool, or the directory of the mailboxes.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use data_encoding::HEXLOWER;
use rustix::fs::OFlags;

use super::files::{FileId, replace_file_durably, with_path, with_remedy, write_error};
use super::sweep::{log_sweep_failed, sweep};

/// How long a daemon waits for a lock that [`locked_state_file`] has for a moment.
const LOOK_TIME: Duration = Duration::from_millis(100);

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Opens the file `ROOT/.odmr/NAME` for reading and writing, and creates it if it does not exist. A symbolic link is
/// not followed: if this process is root, the user that owns the directory could make it write into any file.
///
/// # Errors
/// The directory or the file cannot be created or opened; the text has its path, and what to do.
pub fn open_state_file(root: &Path, name: &str) -> io::Result<File> {
    let directory = root.join(".odmr");
    let path = directory.join(name);
    let open = || options().create(true).truncate(false).mode(0o600).open(&path);
    let file = match open() {
        // Mostly the directory is missing. If it is not a directory, the attempt to make it has the better error.
        Err(_) => {
            make_state_directory(&directory)?;
            open()
        }
        opened => opened,
    };
    file.map_err(|error| write_error(&path, error))
}

/// Makes the directory `ROOT/.odmr`, if it is missing.
///
/// # Errors
/// The directory cannot be made; the text has its path.
pub fn make_state_directory(directory: &Path) -> io::Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
    made.map_err(|error| with_remedy(directory.parent().unwrap_or(directory), with_path(directory, error)))
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    // A pipe does not block.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    options.read(true).write(true).custom_flags(flags.bits().cast_signed());
    options
}

/// Reads a state file, `limit` octets at most. Root may read it in another user's directory: a symbolic link is not
/// followed, and a pipe does not block.
///
/// # Errors
/// The file cannot be opened or read, or is not UTF-8. The text has no path.
pub fn read_state_file(path: &Path, limit: u64) -> io::Result<String> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let mut text = String::new();
    file.take(limit).read_to_string(&mut text)?;
    Ok(text)
}

/// Opens the file `ROOT/.odmr/NAME` if another process has locked it; `None`: it is not locked, or does not exist.
///
/// # Errors
/// The file cannot be opened or locked; the text has its path.
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

/// Opens and locks the file `ROOT/.odmr/NAME`; the lock lasts as long as the file is open. `None`: another process has
/// the lock.
///
/// # Errors
/// Those of [`open_state_file`], or the file cannot be locked.
pub fn lock_state_file(root: &Path, name: &str) -> io::Result<Option<File>> {
    let file = open_state_file(root, name)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Like [`lock_state_file`], but waits for the lock until `late`. Other processes may remove the file at any time.
/// Another thread of this process is locked out like another process.
///
/// # Errors
/// `TimedOut` if the lock was not released until `late`; those of [`lock_state_file`].
pub fn wait_for_state_file(root: &Path, name: &str, late: Instant) -> io::Result<File> {
    let (path, mut pause) = (root.join(".odmr").join(name), Duration::from_micros(100));
    loop {
        let file = open_state_file(root, name)?;
        match file.try_lock() {
            // If the file was removed, it may have a successor, which other processes lock: try again.
            Ok(()) if FileId::of_path(&path).ok() == FileId::of_file(&file).ok() => return Ok(file),
            Ok(()) | Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(with_path(&path, error)),
        }
        if Instant::now() >= late {
            return Err(with_path(&path, io::ErrorKind::TimedOut.into()));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(5));
    }
}

/// Like [`lock_state_file`], for the one daemon of ROOT; `None`: another daemon has the lock. Processes that look
/// whether a daemon runs ([`locked_state_file`]) have the lock for a moment: this function waits for them.
///
/// # Errors
/// Those of [`lock_state_file`].
pub fn lock_for_daemon(root: &Path, name: &str) -> io::Result<Option<File>> {
    match wait_for_state_file(root, name, Instant::now() + LOOK_TIME) {
        Err(error) if error.kind() == io::ErrorKind::TimedOut => Ok(None),
        locked => locked.map(Some),
    }
}

/// Returns the secret key in the file `ROOT/.odmr/NAME`, which all processes share. The first process writes `new` into
/// it.
///
/// # Errors
/// Those of [`open_state_file`], or the file cannot be locked or written.
pub fn state_key(root: &Path, name: &str, new: [u8; 32]) -> io::Result<[u8; 32]> {
    let path = root.join(".odmr").join(name);
    let read = || {
        let octets = HEXLOWER.decode(read_state_file(&path, 100).ok()?.trim().as_bytes()).ok()?;
        <[u8; 32]>::try_from(octets).ok()
    };
    if let Some(key) = read() {
        return Ok(key);
    }
    // Another process may have written the key before this one got the lock: read again.
    let lock = open_state_file(root, name)?;
    lock.lock()?;
    if let Some(key) = read() {
        return Ok(key);
    }
    replace_file_durably(&path, &format!("{}\n", HEXLOWER.encode(&new)))?;
    Ok(new)
}

/// Calls `work`, which removes left-over files in ROOT, once a day in one of all processes. A failure is logged.
pub fn tidy_daily(root: &Path, work: impl FnOnce() -> io::Result<()>) {
    let tidied = begin_daily(root).and_then(|lock| if lock.is_some() { work() } else { Ok(()) });
    tidied.unwrap_or_else(|error| log_sweep_failed("-", &error));
}

/// Locks the file `ROOT/.odmr/tidy`, whose time of modification is that of the last work. `None`: it was less than a
/// day ago, or another process is doing it.
fn begin_daily(root: &Path) -> io::Result<Option<File>> {
    let Some(mut file) = lock_state_file(root, "tidy")? else { return Ok(None) };
    let (metadata, now) = (file.metadata()?, SystemTime::now());
    // A time in the future is from before the clock was set.
    if metadata.len() > 0 && now.duration_since(metadata.modified()?).is_ok_and(|age| age < DAY) {
        return Ok(None);
    }
    file.write_all(b"\n")?;
    Ok(Some(file))
}

/// Removes files in `ROOT/.odmr/` that were not used for 36 hours: those for whose names `is_left` is true, and
/// temporary files of processes that were killed while they replaced a file.
///
/// # Errors
/// The directory cannot be read, or a file cannot be removed.
pub fn sweep_state_files(root: &Path, is_left: &dyn Fn(&str) -> bool) -> io::Result<()> {
    sweep(&root.join(".odmr"), &|name| name.starts_with('.') || is_left(name))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use std::fs;

    use super::*;

    #[test]
    fn the_error_about_a_file_that_cannot_be_opened_has_the_remedy() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join(".odmr/serve");
        fs::create_dir_all(&path).unwrap();
        let error = lock_state_file(root.path(), "serve").unwrap_err();
        let remedy =
            "cannot be written to: Is a directory (os error 21); a directory is where a file must be: move it away";
        assert_eq!(
            (error.kind(), error.to_string()),
            (io::ErrorKind::IsADirectory, format!("{} {remedy}", path.display()))
        );
    }

    #[test]
    fn a_pipe_in_place_of_a_file_does_not_block() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join(".odmr")).unwrap();
        let mode = rustix::fs::Mode::RWXU;
        rustix::fs::mkfifoat(rustix::fs::CWD, root.path().join(".odmr/pipe"), mode).unwrap();
        let mut pipe = open_state_file(root.path(), "pipe").unwrap();
        assert_eq!(pipe.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn all_processes_share_one_key() {
        let root = tempfile::tempdir().unwrap();
        let ask = |octet: u8| state_key(root.path(), "a-key", [octet; 32]).unwrap();
        let keys: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|octet| scope.spawn(move || ask(octet))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(keys.iter().all(|key| *key == keys[0]), "{keys:?}");
        assert_eq!(ask(99), keys[0]);
        let file = root.path().join(".odmr/a-key");
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        // A power cut has left a part of the file.
        fs::write(&file, "0102").unwrap();
        assert_eq!(ask(99), [99; 32]);
        assert_eq!(ask(98), [99; 32]);
    }
}
