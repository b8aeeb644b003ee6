//! Where a customer's files are.
//!
//! ```text
//! ROOT/<domain>/<local part>/    Maildirs of the mailboxes (the rules in `recipients` say which)
//! ROOT/.handover/                mail that a next hop is to get and nobody else keeps: the retry queue
//! ROOT/.odmr/                    locks: one daemon, one call to a provider's account
//! QUEUE/                         outgoing mail, until a call has sent it
//! ```
//!
//! No domain begins with a dot, so no mailbox has the name of another directory.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use crate::maildir::with_path;
use crate::queue::QueueName;

/// The queue of mail for next hops, below the root of the mailboxes.
pub fn retry_queue(root: &Path) -> QueueName {
    QueueName { path: root.join(".handover"), domain: None, retries: true }
}

/// The queue of outgoing mail.
pub fn outgoing_queue(path: &Path) -> QueueName {
    QueueName { path: path.to_owned(), domain: None, retries: true }
}

/// Opens a lock file. Symbolic links are not followed: root may look at another user's directory.
pub fn state_file(root: &Path, name: &str) -> io::Result<File> {
    let directory = root.join(".odmr");
    DirBuilder::new().recursive(true).mode(0o700).create(&directory).map_err(|error| {
        io::Error::new(error.kind(), format!("{}: {error}; give its user the right to", directory.display()))
    })?;
    let path = directory.join(name);
    let flags = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).read(true).write(true).mode(0o600).custom_flags(flags);
    options.open(&path).map_err(|error| with_path(&path, error))
}
