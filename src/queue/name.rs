//! Which queue: its directory, and the domain of its recipients.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use crate::mail::address::Domain;
use crate::maildir::{Maildir, UsageLimit};

/// The name of one queue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueueName {
    /// The Maildir.
    pub path: PathBuf,
    /// Only recipients of this domain are sent to; `None`: all recipients of a message.
    pub domain: Option<Domain>,
    /// What another agent puts in front of the local part in `Delivered-To`: qmail writes `acme-eva@example.org` for a
    /// domain that its virtualdomains gives to `acme`.
    pub prefix: Option<String>,
    /// Each message waits for its next attempt; otherwise all of them wait for a call.
    pub retries: bool,
    /// The file that a session of the account locks, which has several queues. Then the directory is locked too, but neither
    /// made nor locked before there is mail in it.
    pub account_lock: Option<PathBuf>,
    /// The directory has mail for other domains too, without a lock for all of it: see [`shared`](super::shared).
    pub shared: bool,
    /// What its messages count in, with those of other queues.
    pub limit: Option<Arc<UsageLimit>>,
}

impl QueueName {
    pub(super) fn maildir(&self) -> Maildir {
        Maildir::new(&self.path)
    }
}

/// The domain, for replies and logs.
impl fmt::Display for QueueName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.domain.as_ref().map_or("-", Domain::as_str))
    }
}
