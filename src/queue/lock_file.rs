//! A file that a session locks, across processes, and how another session takes the lock over.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use super::name::QueueName;
use crate::maildir::with_path;

/// The file of a queue that its session locks.
pub(super) const QUEUE_LOCK_FILE: &str = "odmr.lock";

/// The file beside the lock that asks its holder to release it.
pub(super) const TAKEOVER_FILE: &str = "odmr.wanted";

/// How long a session waits for the holder of a lock that was asked to release it.
pub(super) const TAKEOVER_WAIT: Duration = Duration::from_secs(5);

/// A lock file that no session has used for this long is removed.
const UNUSED_AGE: Duration = Duration::from_secs(36 * 60 * 60);

/// Why a queue cannot be locked.
#[derive(Debug)]
pub enum LockError {
    /// Another session has this queue.
    Busy(QueueName),
    /// The directory or its lock file cannot be made or locked.
    Failed(io::Error),
}

/// A file that this session has locked. It releases the lock when it is dropped.
pub(super) struct LockFile {
    path: PathBuf,
    pub(super) file: File,
}

impl Drop for LockFile {
    fn drop(&mut self) {
        // A child process has a copy of the descriptor between fork and exec: the next session must not find the queue locked.
        let _ = self.file.unlock();
    }
}

/// The file beside a lock that asks its holder to release it.
fn takeover_file(lock: &Path) -> PathBuf {
    lock.with_extension("wanted")
}

impl LockFile {
    /// Locks the file of this queue, which is created if it does not exist. A holder that has made no progress for `takeover`
    /// is asked to release it, and gets 5 seconds for that; `None`: it is not asked.
    ///
    /// # Errors
    /// See [`LockError`]; `NotFound` if the directory is missing.
    pub(super) fn lock(path: &Path, takeover: Option<Duration>, name: &QueueName) -> Result<LockFile, LockError> {
        loop {
            let file = open(path).map_err(|error| LockError::Failed(with_path(path, error)))?;
            let lock = LockFile { path: path.to_owned(), file };
            lock.wait(takeover, name)?;
            // The lock of a file that was removed meanwhile excludes nobody.
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
        let mut give_up: Option<Instant> = None;
        loop {
            match self.file.try_lock() {
                Ok(()) => return Ok(()),
                Err(TryLockError::Error(error)) => return Err(failed(&self.path, error)),
                Err(TryLockError::WouldBlock) => {}
            }
            match give_up {
                // A holder that makes progress keeps its lock; one that has made none for long is asked to release it.
                None if takeover.is_none_or(|takeover| self.is_alive(takeover)) => {
                    return Err(LockError::Busy(name.clone()));
                }
                None => {
                    log::info!("event=takeover queue={name}");
                    File::create(&wanted).map_err(|error| failed(&wanted, error))?;
                    give_up = Some(Instant::now() + TAKEOVER_WAIT);
                }
                Some(late) if Instant::now() >= late => {
                    let _ = fs::remove_file(&wanted);
                    return Err(LockError::Busy(name.clone()));
                }
                // The kernel reports the release of a lock only to a wait that has no deadline.
                Some(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// Whether the holder of the lock has made progress lately.
    fn is_alive(&self, takeover: Duration) -> bool {
        let heartbeat = self.file.metadata().and_then(|metadata| metadata.modified());
        heartbeat.is_ok_and(|heartbeat| heartbeat.elapsed().is_ok_and(|age| age < takeover))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Shows sessions that wait for this lock that its holder makes progress.
    pub(super) fn heartbeat(&self) {
        let _ = self.file.set_modified(SystemTime::now());
    }

    /// Whether another session waits for this lock.
    pub(super) fn takeover_requested(&self) -> bool {
        takeover_file(&self.path).exists()
    }

    /// Removes the file. Its lock is released.
    pub(super) fn remove(self) {
        let _ = fs::remove_file(&self.path);
        let _ = fs::remove_file(takeover_file(&self.path));
    }
}

fn open(path: &Path) -> io::Result<File> {
    let no_follow = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).write(true).mode(0o600).custom_flags(no_follow).open(path)
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
        let file = open(path)?;
        match file.try_lock() {
            Ok(()) => LockFile { path: path.to_owned(), file }.remove(),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(error),
        }
        Ok(())
    };
    remove().map_err(|error: io::Error| with_path(path, error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::QueueLock;
    use crate::queue::tests::{Spool, local_parts, result};

    /// The queue of a domain of an account.
    fn of_account(spool: &Spool, account: &str, domain: &str) -> QueueName {
        let lock = domains(spool).with_file_name(".odmr").join(format!("account-{account}.lock"));
        QueueName { account_lock: Some(lock), ..spool.name(domain) }
    }

    fn domains(spool: &Spool) -> PathBuf {
        spool.name("x.example").path.parent().unwrap().to_owned()
    }

    fn is_busy(spool: &Spool, names: &[QueueName]) -> bool {
        matches!(spool.queue.lock(names), Err(LockError::Busy(_)))
    }

    fn next(lock: &mut QueueLock) -> Option<String> {
        let message = lock.next_message()?;
        let name = local_parts(&message).remove(0);
        lock.settle(message, &result("=")).unwrap();
        Some(name)
    }

    fn put(spool: &Spool, domain: &str, to: &str) {
        let directory = spool.name(domain).path.join("new");
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join(format!("100.{to}")), format!("Delivered-To: {to}@{domain}\n\nx\n")).unwrap();
    }

    #[test]
    fn an_account_has_one_lock_and_nothing_where_it_has_no_mail() {
        let spool = Spool::new();
        fs::create_dir_all(domains(&spool)).unwrap();
        let names: Vec<_> = (0..100).map(|number| of_account(&spool, "acme", &format!("d{number}.example"))).collect();
        let mut lock = spool.queue.lock(&names).unwrap();
        assert!(lock.is_empty().unwrap() && next(&mut lock).is_none());
        let files = |path: PathBuf| fs::read_dir(path).unwrap().count();
        assert_eq!((files(domains(&spool)), files(domains(&spool).with_file_name(".odmr"))), (0, 1));
        // For any of its domains, another session gets nothing.
        assert!(is_busy(&spool, &names[7..8]) && is_busy(&spool, &names));
        assert!(!is_busy(&spool, &[of_account(&spool, "other", "other.example")]));
        put(&spool, "d7.example", "eva");
        assert!(lock.has_next());
        assert_eq!((next(&mut lock).as_deref(), next(&mut lock)), (Some("eva"), None));
        assert!(names[7].path.join(QUEUE_LOCK_FILE).exists());
        drop(lock);
        assert!(!names[7].path.join(QUEUE_LOCK_FILE).exists() && names[7].path.join("new").exists());
        assert!(!is_busy(&spool, &names));
    }

    /// An administrator has given a domain to another account while a session is under way, or has replaced the program.
    #[test]
    fn two_sessions_never_have_one_directory() {
        let spool = Spool::new();
        put(&spool, "x.example", "eva");
        let (before, after) = (of_account(&spool, "one", "x.example"), of_account(&spool, "two", "x.example"));
        let lock = spool.queue.lock(std::slice::from_ref(&before)).unwrap();
        assert!(is_busy(&spool, std::slice::from_ref(&after)) && is_busy(&spool, &[spool.name("x.example")]));
        drop(lock);
        let lock = spool.queue.lock(&[spool.name("x.example")]).unwrap();
        assert!(is_busy(&spool, std::slice::from_ref(&after)));
        drop(lock);
        fs::remove_file(before.path.join("new/100.eva")).unwrap();
        // There was no mail when the first session began.
        let mut first = spool.queue.lock(&[before]).unwrap();
        assert!(first.next_message().is_none());
        put(&spool, "x.example", "bob");
        let mut second = spool.queue.lock(&[after]).unwrap();
        assert!(!first.has_next());
        assert_eq!(next(&mut second).as_deref(), Some("bob"));
    }

    #[test]
    fn a_directory_that_another_session_has_is_left_out_if_there_is_other_mail() {
        let spool = Spool::new();
        let names = ["x.example", "y.example", "z.example"].map(|domain| of_account(&spool, "acme", domain));
        ["x.example", "z.example"].into_iter().for_each(|domain| put(&spool, domain, &domain[..1]));
        let other = spool.queue.lock(&[spool.name("x.example")]).unwrap();
        assert!(matches!(spool.queue.lock_account(&names[..2]), Err(LockError::Busy(_))));
        assert!(is_busy(&spool, &names));
        let mut lock = spool.queue.lock_account(&names).unwrap();
        assert!(lock.has_next() && is_busy(&spool, &names[1..2]));
        assert_eq!((next(&mut lock).as_deref(), next(&mut lock)), (Some("z"), None));
        drop(other);
        assert_eq!((next(&mut lock).as_deref(), next(&mut lock)), (Some("x"), None));
    }

    #[test]
    fn the_lock_of_an_account_is_taken_over_as_one_of_a_queue() {
        let spool = Spool::new();
        put(&spool, "x.example", "eva");
        let name = of_account(&spool, "acme", "x.example");
        let lock = spool.queue.lock(std::slice::from_ref(&name)).unwrap();
        let path = name.account_lock.clone().unwrap();
        let since = |ago| {
            let file = File::options().write(true).open(&path).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(ago)).unwrap();
        };
        since(301);
        lock.heartbeat();
        assert!(is_busy(&spool, std::slice::from_ref(&name)));
        since(301);
        std::thread::scope(|scope| {
            let taker = scope.spawn(|| spool.queue.lock(std::slice::from_ref(&name)));
            while !lock.takeover_requested() {
                std::thread::sleep(Duration::from_millis(5));
            }
            drop(lock);
            assert_eq!(next(&mut taker.join().unwrap().expect("the lock")).as_deref(), Some("eva"));
        });
        // What nobody has used for long, and nobody has, is removed.
        let remove = || remove_unused_lock(&path).map(|()| path.exists()).unwrap();
        assert!(remove());
        since(37 * 60 * 60);
        let lock = File::open(&path).unwrap();
        lock.lock().unwrap();
        assert!(remove());
        drop(lock);
        assert!(!remove() && remove_unused_lock(&path).is_ok());
    }
}
