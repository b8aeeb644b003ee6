//! Mail on its way into the provider's queue, whichever door it came through.
//!
//! A message becomes a file for each held domain and each destination among its recipients, all of them
//! durable before the one 250.

use std::io;
use std::sync::Arc;

use super::Shared;
use crate::ids::Ids;
use crate::mail::address::{Domain, Mailbox};
use crate::mail::header::{HeaderAdditions, HeaderCompleter};
use crate::maildir::MessageWriter;
use crate::queue::{Envelope, QueueName};
use crate::report::{DsnMessage, DsnSink};
use crate::session::server::{MessageSink, storage_failure_reply};
use crate::smtp::reply::Reply;
use crate::smtp::server::Server;

/// Where mail for a mailbox is put.
#[derive(Clone)]
pub struct RecipientRouter {
    accounts: crate::config::Accounts,
    own: Option<Domain>,
}

impl RecipientRouter {
    pub fn new(config: &crate::config::ProviderConfig) -> RecipientRouter {
        RecipientRouter { accounts: config.accounts.clone(), own: Domain::parse(&config.hostname) }
    }

    /// `None`: only a relay would take it.
    pub fn held_queue(&self, mailbox: &Mailbox) -> Option<QueueName> {
        let domain = mailbox.domain()?;
        if self.accounts.owner(domain).is_some() {
            return Some(QueueName::Domain(domain.clone()));
        }
        // RFC 5321 section 4.5.1: there is a postmaster wherever there is a server.
        let own = self.own.as_ref() == Some(domain);
        (own && mailbox.local().eq_ignore_ascii_case("postmaster")).then_some(QueueName::Postmaster)
    }

    /// The same with the world as the last resort; only an address literal has no place at all.
    pub fn queue_for(&self, mailbox: &Mailbox) -> Option<QueueName> {
        self.held_queue(mailbox).or_else(|| mailbox.domain().map(|domain| QueueName::Destination(domain.clone())))
    }
}

/// Begins to store the server's transaction. `complete`: it is a submission, and what its header lacks is
/// added (RFC 6409 section 8).
pub fn store(
    shared: &Arc<Shared>,
    server: &Server,
    peer: &str,
    secure: Option<&str>,
    complete: bool,
) -> Result<Box<dyn MessageSink>, Reply> {
    let Some(transaction) = server.transaction() else {
        return Err(Reply::new(503, "5.5.1", "Say MAIL first"));
    };
    let (id, arrived) = (shared.ids.queue_id(), shared.ids.clock().now());
    let mut copies: Vec<(QueueName, Envelope)> = Vec::new();
    for recipient in &transaction.recipients {
        let Some(place) = shared.router.queue_for(&recipient.mailbox) else { continue };
        if let Some((_, envelope)) = copies.iter_mut().find(|(other, _)| *other == place) {
            envelope.recipients.push(recipient.clone());
            continue;
        }
        let mail = &transaction.mail;
        let envelope = Envelope::new(mail, vec![recipient.clone()], &id, arrived);
        copies.push((place, envelope));
    }
    let received = server.received(peer, secure, &id, arrived);
    let drafts = shared.queue.begin_message(&copies, &received).map_err(|error| storage_failure_reply(&error))?;
    let additions = HeaderAdditions {
        date: arrived.rfc5322(),
        message_id: format!("<{id}@{}>", shared.config.hostname),
        from: None,
        drop_bcc: false,
    };
    Ok(Box::new(QueueWriter {
        shared: shared.clone(),
        drafts,
        places: copies.into_iter().map(|(place, _)| place).collect(),
        id,
        completer: complete.then(|| HeaderCompleter::new(additions)),
        buffer: Vec::new(),
    }))
}

/// A message on its way into the queue.
struct QueueWriter {
    shared: Arc<Shared>,
    drafts: MessageWriter,
    places: Vec<QueueName>,
    id: String,
    completer: Option<HeaderCompleter>,
    buffer: Vec<u8>,
}

impl MessageSink for QueueWriter {
    fn write(&mut self, octets: &[u8]) -> io::Result<()> {
        let Some(completer) = &mut self.completer else {
            return self.drafts.write(octets);
        };
        self.buffer.clear();
        completer.feed(octets, &mut self.buffer);
        self.drafts.write(&self.buffer)
    }

    fn commit(mut self: Box<Self>) -> io::Result<Reply> {
        if let Some(completer) = &mut self.completer {
            self.buffer.clear();
            completer.finish(&mut self.buffer);
            self.drafts.write(&self.buffer)?;
        }
        self.drafts.commit()?;
        self.shared.relay.arrived(&self.places);
        Ok(Reply::new(250, "2.6.0", format!("OK, id={}", self.id)))
    }
}

/// The provider's notices: into a held domain's Maildir, or out through the relay.
pub struct SpoolDsnSink {
    pub queue: crate::queue::Queue,
    pub router: RecipientRouter,
    pub relay: super::relay::RelayHandle,
    pub ids: Ids,
}

impl DsnSink for SpoolDsnSink {
    fn store(&self, letter: &DsnMessage) -> io::Result<()> {
        let Some(place) = self.router.queue_for(&letter.to) else {
            log::warn!("event=notice-undeliverable to=<{}>", letter.to);
            return Ok(());
        };
        let envelope = letter.envelope(&self.ids);
        let mut copies = self.queue.begin_message(&[(place.clone(), envelope)], "")?;
        copies.write(&letter.text)?;
        copies.commit()?;
        self.relay.arrived(&[place]);
        Ok(())
    }
}
