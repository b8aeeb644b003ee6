//! A file that a session locks, across processes (flock(2)), and the takeover of its lock by another session: a stalled
//! session must not keep a customer from its mail.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::OFlags;

use super::name::QueueName;
use crate::maildir::{with_path, write_error};

/// The file of a queue that its session locks.
pub(super) const QUEUE_LOCK_FILE: &str = "odmr.lock";

/// The file beside the lock that asks its holder to release it.
pub(super) const TAKEOVER_FILE: &str = "odmr.wanted";

/// How long a session waits for the holder of a lock that was asked to release it.
pub(super) const TAKEOVER_WAIT: Duration = Duration::from_secs(5);

/// How often a session that waits for a lock tries to get it.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// How often a session looks again before it finds a queue busy: a holder that yields may have set its heartbeat just
/// now.
const LOOKS_AT_HOLDER: u32 = 5;

/// A lock file that no session has used for this long is removed.
const UNUSED_AGE: Duration = Duration::from_secs(36 * 60 * 60);

/// Why a queue cannot be locked.
#[derive(Debug)]
pub enum LockError {
    /// Another session has locked this queue.
    Busy(QueueName),
    /// The directory or its lock file cannot be made or locked.
    Failed(io::Error),
}

/// A file that this session has locked. The lock is released when this is dropped.
pub(super) struct LockFile {
    path: PathBuf,
    pub(super) file: File,
}

impl Drop for LockFile {
    fn drop(&mut self) {
        // Closing is not enough: between fork and exec a child process has a copy of the descriptor, which keeps the
        // lock.
        let _ = self.file.unlock();
    }
}

/// The file beside a lock that asks its holder to release it.
fn takeover_file(lock: &Path) -> PathBuf {
    lock.with_extension("wanted")
}

impl LockFile {
    /// Locks the file of this queue; creates it if it does not exist. A session that has the lock and has made no
    /// progress for `takeover` is asked to release it, and gets 5 seconds for that; `None`: it is not asked.
    ///
    /// # Errors
    /// See [`LockError`]; `NotFound` if the directory is missing.
    pub(super) fn lock(path: &Path, takeover: Option<Duration>, name: &QueueName) -> Result<LockFile, LockError> {
        loop {
            let file = open(path).map_err(|error| LockError::Failed(write_error(path, error)))?;
            let lock = LockFile { path: path.to_owned(), file };
            lock.wait(takeover, name)?;
            // A file that was removed meanwhile may have a successor, which another session locks: try again.
            if lock.file.metadata().map_err(LockError::Failed)?.nlink() > 0 {
                let _ = fs::remove_file(takeover_file(path));
                lock.heartbeat();
                return Ok(lock);
            }
        }
    }

    fn wait(&self, takeover: Option<Duration>, name: &QueueName) -> Result<(), LockError> {
        let failed = |path: &Path, error| LockError::Failed(with_path(path, error));
        let wanted = takeover_file(&self.path);
        let (mut give_up, mut looks): (Option<Instant>, u32) = (None, 0);
        loop {
            match self.file.try_lock() {
                Ok(()) => return Ok(()),
                Err(TryLockError::Error(error)) => return Err(failed(&self.path, error)),
                Err(TryLockError::WouldBlock) => {}
            }
            match give_up {
                None if takeover.is_none() => return Err(LockError::Busy(name.clone())),
                None if takeover.is_some_and(|takeover| self.is_alive(takeover)) => {
                    // A holder that yields resets its heartbeat just after it has locked the file.
                    if looks >= LOOKS_AT_HOLDER {
                        return Err(LockError::Busy(name.clone()));
                    }
                    looks += 1;
                    std::thread::sleep(POLL_INTERVAL);
                }
                None => {
                    log::info!("event=takeover queue={name}");
                    File::create(&wanted).map_err(|error| LockError::Failed(write_error(&wanted, error)))?;
                    give_up = Some(Instant::now() + TAKEOVER_WAIT);
                }
                Some(late) if Instant::now() >= late => {
                    let _ = fs::remove_file(&wanted);
                    return Err(LockError::Busy(name.clone()));
                }
                // flock(2) can wait for a lock, but not with a deadline.
                Some(_) => std::thread::sleep(POLL_INTERVAL),
            }
        }
    }

    /// Whether the holder of the lock has made progress within `takeover`.
    fn is_alive(&self, takeover: Duration) -> bool {
        let heartbeat = self.file.metadata().and_then(|metadata| metadata.modified());
        heartbeat.is_ok_and(|heartbeat| heartbeat.elapsed().is_ok_and(|age| age < takeover))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Shows to sessions that wait for this lock that its holder makes progress.
    pub(super) fn heartbeat(&self) {
        let _ = self.file.set_modified(SystemTime::now());
    }

    /// Lets a session that needs this lock ask for it at once, as if its holder made no progress.
    pub(super) fn yield_to_sessions(&self) {
        let _ = self.file.set_modified(SystemTime::UNIX_EPOCH);
    }

    /// Whether another session waits for this lock.
    pub(super) fn takeover_requested(&self) -> bool {
        takeover_file(&self.path).exists()
    }

    /// Removes the file, and releases its lock.
    pub(super) fn remove(self) {
        let _ = fs::remove_file(&self.path);
        let _ = fs::remove_file(takeover_file(&self.path));
    }
}

fn open(path: &Path) -> io::Result<File> {
    // A pipe does not block.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).write(true).mode(0o600).custom_flags(flags).open(path)
}

/// Removes a lock file that no session has used for 36 hours, with the file that asks for a takeover.
///
/// # Errors
/// The system's, with the path.
pub fn remove_unused_lock(path: &Path) -> io::Result<()> {
    let remove = || {
        let used = match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            found => found?.modified()?,
        };
        if used.elapsed().is_ok_and(|age| age <= UNUSED_AGE) {
            return Ok(());
        }
        remove_unlocked(path, open(path)?)
    };
    remove().map_err(|error: io::Error| with_path(path, error))
}

/// Removes an open lock file, unless a session has locked it.
fn remove_unlocked(path: &Path, file: File) -> io::Result<()> {
    match file.try_lock() {
        Ok(()) => {
            let lock = LockFile { path: path.to_owned(), file };
            // If a session has removed the file meanwhile, another file may have its name, which another session has
            // locked.
            if lock.file.metadata()?.nlink() > 0 {
                lock.remove();
            }
            Ok(())
        }
        Err(TryLockError::WouldBlock) => Ok(()),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

#[cfg(test)]
mod tests;
