//! The provider's spool: where its queues are, and which one a recipient's mail goes to.
//!
//! ```text
//! SPOOL/domains/<domain>/     mail of a customer's domain, until the customer calls
//! SPOOL/outgoing/<domain>/    mail of customers for a domain elsewhere, until the relay has sent it
//! SPOOL/postmaster/           mail for the provider's own postmaster (RFC 5321 section 4.5.1)
//! ```

use std::fs;
use std::io;
use std::path::PathBuf;

use crate::config::{Accounts, ProviderConfig};
use crate::ids::Ids;
use crate::mail::address::{Domain, Mailbox};
use crate::maildir::{self, MessageWriter, with_path};
use crate::queue::{Queue, QueueName, QueuedEnvelope};

/// The queues of the spool.
#[derive(Clone)]
pub struct Spool {
    root: PathBuf,
    queue: Queue,
}

/// A queue of the spool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SpoolQueue {
    /// The mail of a customer's domain.
    Held(Domain),
    /// The provider's own postmaster.
    Postmaster,
    /// Mail of customers for a domain elsewhere.
    Outgoing(Domain),
}

impl Spool {
    pub fn new(config: &ProviderConfig, ids: &Ids) -> Spool {
        let queue = Queue::new(&config.hostname, ids.clone(), config.timeouts.takeover);
        Spool { root: config.spool.clone(), queue }
    }

    /// Reads and writes the queues.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Where a queue is.
    pub fn name(&self, queue: &SpoolQueue) -> QueueName {
        let below = |directory: &str, domain: &Domain| self.root.join(directory).join(domain.as_str());
        match queue {
            SpoolQueue::Held(domain) => {
                QueueName { path: below("domains", domain), domain: Some(domain.clone()), retries: false }
            }
            SpoolQueue::Postmaster => QueueName { path: self.root.join("postmaster"), domain: None, retries: false },
            SpoolQueue::Outgoing(domain) => {
                QueueName { path: below("outgoing", domain), domain: Some(domain.clone()), retries: true }
            }
        }
    }

    /// The domains elsewhere that have a queue.
    pub fn destinations(&self) -> io::Result<Vec<Domain>> {
        let directory = self.root.join("outgoing");
        let files = match fs::read_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(|error| with_path(&directory, error))?,
        };
        let names = files.filter_map(|file| file.ok()?.file_name().into_string().ok());
        Ok(names.filter_map(|name| Domain::parse(&name)).collect())
    }

    /// Whether the disk has room for this many octets more.
    pub fn has_room(&self, octets: u64) -> bool {
        maildir::has_room(&self.root, octets)
    }

    /// Begins a message, a copy for each queue.
    pub fn begin_message(&self, copies: &[(SpoolQueue, QueuedEnvelope)], head: &str) -> io::Result<MessageWriter> {
        let copies: Vec<_> = copies.iter().map(|(queue, envelope)| (self.name(queue), envelope.clone())).collect();
        self.queue.begin_message(&copies, head)
    }
}

/// Which queue the mail for a mailbox goes to.
#[derive(Clone)]
pub struct RecipientRouter {
    accounts: Accounts,
    own: Option<Domain>,
}

impl RecipientRouter {
    pub fn new(config: &ProviderConfig) -> RecipientRouter {
        RecipientRouter { accounts: config.accounts.clone(), own: Domain::parse(&config.hostname) }
    }

    /// The queue of a domain that we hold mail for, or our postmaster's. `None`: only a relay would accept it.
    pub fn held_queue(&self, mailbox: &Mailbox) -> Option<SpoolQueue> {
        let domain = mailbox.domain()?;
        if self.accounts.owner(domain).is_some() {
            return Some(SpoolQueue::Held(domain.clone()));
        }
        // RFC 5321 section 4.5.1: every server has a postmaster.
        let own = self.own.as_ref() == Some(domain);
        (own && mailbox.local().eq_ignore_ascii_case("postmaster")).then_some(SpoolQueue::Postmaster)
    }

    /// The same, or else the queue of a domain elsewhere. Only an address literal has no queue at all.
    pub fn queue_for(&self, mailbox: &Mailbox) -> Option<SpoolQueue> {
        self.held_queue(mailbox).or_else(|| mailbox.domain().map(|domain| SpoolQueue::Outgoing(domain.clone())))
    }
}
