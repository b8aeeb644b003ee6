//! The paths of a customer's files.
//!
//! ```text
//! ROOT/<domain>/<local part>/    Maildirs of the mailboxes (the rules in `recipients` say which)
//! ROOT/.handover/                the retry queue: mail for next hops that no other host keeps
//! ROOT/.odmr/                    the locks of the daemon and of each provider account
//! QUEUE/                         the outgoing queue
//! ```
//!
//! No domain begins with a dot, so no mailbox has the name of another directory.

use std::path::Path;

pub use crate::maildir::{lock_state_file, locked_state_file, open_state_file};
use crate::queue::QueueName;

/// The retry queue, below the root of the mailboxes.
pub fn retry_queue(root: &Path) -> QueueName {
    QueueName { path: root.join(".handover"), domain: None, prefix: None, retries: true }
}

/// The queue of outgoing mail.
pub fn outgoing_queue(path: &Path) -> QueueName {
    QueueName { path: path.to_owned(), domain: None, prefix: None, retries: true }
}
