//! The paths of a customer's files.
//!
//! ```text
//! ROOT/<domain>/<local part>/    Maildirs of the mailboxes (see the rules in `recipients`)
//! ROOT/.handover/                the retry queue: mail for next hops and full mailboxes that no other host stores
//! ROOT/.odmr/                    the locks of the daemon and of each provider account, and
//!      last-NAME                 the last call of an account, for `odmr status`
//!      next-NAME                 when the daemon calls next, for `odmr status`
//!      reload                    when the daemon last read the configuration, for `odmr status`
//!      clock                     the history of the clock, by which mail expires
//!      tidy                      its time of modification is when files that are left over were last removed
//! QUEUE/                         the outgoing queue
//! ```
//!
//! No domain begins with a dot, so no mailbox has the name of another directory.

use std::path::{Path, PathBuf};

use crate::config::CustomerConfig;
pub use crate::maildir::{
    lock_for_daemon, lock_state_file, locked_state_file, open_state_file, sweep_state_files, tidy_daily,
};
use crate::queue::QueueName;
use crate::recipients;
use crate::sandbox::MailDirectory;

/// The retry queue, below the root of the mailboxes.
pub fn retry_queue(root: &Path) -> QueueName {
    QueueName { path: root.join(".handover"), retries: true, ..QueueName::default() }
}

/// The queue of outgoing mail.
pub fn outgoing_queue(path: &Path) -> QueueName {
    QueueName { path: path.to_owned(), retries: true, ..QueueName::default() }
}

/// The levels below ROOT on which a directory may be a symbolic link: `<domain>/<local part>/.folder`.
const MAILBOXES_DEPTH: usize = 3;

/// The levels below QUEUE on which a directory may be a symbolic link: `new`.
const QUEUE_DEPTH: usize = 1;

/// The directories that a customer writes mail into, with the mode of each if it has to be created.
pub fn mail_directories(config: &CustomerConfig) -> Vec<(MailDirectory, u32)> {
    let (root, mask) = (&config.mailboxes.root, config.mailboxes.umask);
    let mailboxes = config.mailboxes.rules.maildir_roots().map(|path| {
        // The root also has the lock files, so it is created with their mode.
        let mode = if path == root { 0o700 } else { 0o777 & !mask };
        (MailDirectory { path: path.clone(), depth: MAILBOXES_DEPTH }, mode)
    });
    let queue = config.outgoing.iter().map(|outgoing| outgoing.queue.clone());
    mailboxes.chain(queue.map(|path| (MailDirectory { path, depth: QUEUE_DEPTH }, 0o700))).collect()
}

/// The part of a file's name that names a provider account.
pub fn account_file(name: &str, address: &str) -> String {
    recipients::directory_name(&format!("{name}@{address}"))
}

/// The file with the record of the last call of an account ([`CallRecord`](crate::report::calls::CallRecord)).
pub fn call_record(root: &Path, name: &str, address: &str) -> PathBuf {
    root.join(".odmr").join(format!("last-{}", account_file(name, address)))
}

/// The file with the time of the daemon's next call of an account.
pub fn next_call(root: &Path, name: &str, address: &str) -> PathBuf {
    root.join(".odmr").join(format!("next-{}", account_file(name, address)))
}

/// The file with the record of the daemon's last reload, in the same form as that of a call.
pub fn reload_record(root: &Path) -> PathBuf {
    root.join(".odmr/reload")
}
