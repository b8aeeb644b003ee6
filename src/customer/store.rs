//! The paths of a customer's files.
//!
//! ```text
//! ROOT/<domain>/<local part>/    Maildirs of the mailboxes (the rules in `recipients` say which)
//! ROOT/.handover/                the retry queue: mail for next hops that no other host keeps
//! ROOT/.odmr/                    the locks of the daemon and of each provider account; for `odmr status`: `last-NAME`, the
//!                                last call of an account, `next-NAME`, when the daemon calls next, and `reload`, the last
//!                                reading of the configuration by the daemon; `tidy`, whose time says when what was left
//!                                over was removed last
//! QUEUE/                         the outgoing queue
//! ```
//!
//! No domain begins with a dot, so no mailbox has the name of another directory.

use std::path::{Path, PathBuf};

pub use crate::maildir::{begin_daily, lock_state_file, locked_state_file, open_state_file, sweep_state_files};
use crate::queue::QueueName;
use crate::recipients;

/// The retry queue, below the root of the mailboxes.
pub fn retry_queue(root: &Path) -> QueueName {
    QueueName { path: root.join(".handover"), domain: None, prefix: None, retries: true }
}

/// The queue of outgoing mail.
pub fn outgoing_queue(path: &Path) -> QueueName {
    QueueName { path: path.to_owned(), domain: None, prefix: None, retries: true }
}

/// The name of a provider account in the names of files.
pub fn account_file(name: &str, address: &str) -> String {
    recipients::directory_name(&format!("{name}@{address}"))
}

/// The file with the last call of an account ([`CallRecord`](crate::report::calls::CallRecord)).
pub fn call_record(root: &Path, name: &str, address: &str) -> PathBuf {
    root.join(".odmr").join(format!("last-{}", account_file(name, address)))
}

/// The file with the time of the daemon's next call of an account.
pub fn next_call(root: &Path, name: &str, address: &str) -> PathBuf {
    root.join(".odmr").join(format!("next-{}", account_file(name, address)))
}

/// The file with the last reading of the configuration by the daemon, in the form of a call.
pub fn reload_record(root: &Path) -> PathBuf {
    root.join(".odmr/reload")
}
