//! `odmr status` of a customer: its calls, and the mail in its queues. It is read from files, so no daemon has to run.

use std::io;

use super::daemon;
use super::{CallError, store};
use crate::clock::Timestamp;
use crate::config::{CustomerConfig, ProviderAccount};
use crate::ids::Ids;
use crate::queue::{Queue, QueueSummary};
use crate::report::calls::{self, CallRecord};

/// The status of a customer.
pub struct CustomerStatus {
    /// The process id of the daemon; `None`: none runs, or it is just starting.
    pub daemon: Option<i32>,
    /// In the order of the configuration.
    pub providers: Vec<ProviderCalls>,
    /// Outgoing mail; `None`: this customer sends none.
    pub outgoing: Option<QueueSummary>,
    /// Mail for next hops, and for mailboxes that are full.
    pub next_hops: QueueSummary,
    /// When the daemon last read the configuration, with the result.
    pub reload: Option<CallRecord>,
}

/// The calls to one provider account.
pub struct ProviderCalls {
    /// The provider's host and port, as configured.
    pub address: String,
    /// Our login name.
    pub account: String,
    /// The last call; `None`: there was none yet.
    pub last: Option<CallRecord>,
    /// When the daemon calls next; `None`: no daemon runs.
    pub next: Option<Timestamp>,
}

impl CustomerStatus {
    /// Reads the status of the provider accounts for which `wanted` is true.
    ///
    /// # Errors
    /// A directory cannot be read, or the daemon is that of another user.
    pub fn read(
        config: &CustomerConfig, ids: &Ids, wanted: impl Fn(&ProviderAccount) -> bool,
    ) -> io::Result<CustomerStatus> {
        let root = &config.mailboxes.root;
        let queue = Queue::new(&config.hostname, ids.clone(), config.timeouts.takeover);
        let daemon = match daemon::running(config) {
            Err(CallError::Denied(text)) => return Err(io::Error::new(io::ErrorKind::PermissionDenied, text)),
            other => other.unwrap_or(None),
        };
        let mut providers = Vec::new();
        for provider in config.providers.iter().filter(|provider| wanted(provider)) {
            let (account, address) = (provider.remote.login_name(), &provider.remote.address);
            providers.push(ProviderCalls {
                address: address.clone(),
                account: account.to_owned(),
                last: CallRecord::read(&store::call_record(root, account, address)),
                next: daemon.and_then(|_| calls::read_time(&store::next_call(root, account, address))),
            });
        }
        let outgoing = config.outgoing.as_ref();
        Ok(CustomerStatus {
            daemon,
            providers,
            outgoing: outgoing.map(|outgoing| queue.summary(&store::outgoing_queue(&outgoing.queue))).transpose()?,
            next_hops: queue.summary(&store::retry_queue(root))?,
            reload: CallRecord::read(&store::reload_record(root)),
        })
    }
}
