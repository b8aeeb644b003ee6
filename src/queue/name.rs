//! The name of a queue: its directory, the domain of its recipients, and how it is locked.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use crate::mail::address::Domain;
use crate::maildir::{Maildir, UsageLimit};

/// The name and the properties of one queue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueueName {
    /// The Maildir.
    pub path: PathBuf,
    /// Only recipients of this domain are sent to; `None`: all recipients of a message.
    pub domain: Option<Domain>,
    /// A prefix that another agent adds to the local part in `Delivered-To`: qmail writes `acme-eva@example.org` for a
    /// domain that its virtualdomains assigns to `acme`.
    pub prefix: Option<String>,
    /// Each message waits for its own next attempt; otherwise all wait for a call.
    pub retries: bool,
    /// The lock file of the account, which may have several queues. The directory is locked too, but it is neither made
    /// nor locked while it has no mail.
    pub account_lock: Option<PathBuf>,
    /// The directory has mail for other domains too, and each message its own lock: see `shared`.
    pub shared: bool,
    /// The limit in which the queue's messages count, together with those of other queues.
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
