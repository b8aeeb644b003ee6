//! Mail on its way into the spool, whichever listener it arrived at.
//!
//! A message becomes a file in each queue that its recipients belong to. All of them are durable before the one 250.

use std::io;
use std::sync::Arc;

use super::relay::RelayHandle;
use super::shared::Shared;
use super::spool::{RecipientRouter, Spool, SpoolQueue};
use crate::ids::Ids;
use crate::mail::address::Mailbox;
use crate::mail::header::{HeaderAdditions, HeaderCompleter};
use crate::maildir::MessageWriter;
use crate::queue::QueuedEnvelope;
use crate::report::{DsnMessage, DsnSink};
use crate::session::storage_failure_reply;
use crate::smtp::command::Envelope;
use crate::smtp::reply::Reply;
use crate::smtp::server::{Incoming, MessageSink};

/// What is done to the header of a message that is accepted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HeaderPolicy {
    /// Mail in transit stays as it is (RFC 5321 section 6.4).
    Keep,
    /// The message is submitted: missing fields are added (RFC 6409 section 8).
    Complete,
}

/// Begins to store a message.
///
/// # Errors
/// The reply to DATA or BDAT, if the spool cannot be written to.
pub fn store(
    shared: &Arc<Shared>, envelope: &Envelope, incoming: &Incoming<'_>, policy: HeaderPolicy,
) -> Result<Box<dyn MessageSink>, Reply> {
    let (id, arrived) = (shared.ids.queue_id(), shared.ids.clock().now());
    let mut copies: Vec<(SpoolQueue, QueuedEnvelope)> = Vec::new();
    for recipient in &envelope.recipients {
        let Some(queue) = shared.router.queue_for(&recipient.mailbox) else { continue };
        match copies.iter_mut().find(|(other, _)| *other == queue) {
            Some((_, copy)) => copy.envelope.recipients.push(recipient.clone()),
            None => {
                let envelope = envelope.with_recipients(vec![recipient.clone()]);
                copies.push((queue, QueuedEnvelope { id: id.clone(), arrived, envelope }));
            }
        }
    }
    let received = incoming.received.field(&id, &arrived.rfc5322());
    let writer = shared.spool.begin_message(&copies, &received).map_err(|error| storage_failure_reply(&error))?;
    let additions = HeaderAdditions {
        date: arrived.rfc5322(),
        message_id: format!("<{id}@{}>", shared.config.hostname),
        from: None,
        drop_bcc: false,
    };
    Ok(Box::new(QueueWriter {
        shared: shared.clone(),
        writer,
        queues: copies.into_iter().map(|(queue, _)| queue).collect(),
        recipients: envelope.recipients.iter().map(|recipient| recipient.mailbox.clone()).collect(),
        id,
        completer: (policy == HeaderPolicy::Complete).then(|| HeaderCompleter::new(additions)),
        buffer: Vec::new(),
    }))
}

/// A message on its way into the queues.
struct QueueWriter {
    shared: Arc<Shared>,
    writer: MessageWriter,
    queues: Vec<SpoolQueue>,
    recipients: Vec<Mailbox>,
    id: String,
    completer: Option<HeaderCompleter>,
    buffer: Vec<u8>,
}

impl QueueWriter {
    fn complete(&mut self, octets: &[u8]) -> io::Result<()> {
        let Some(completer) = &mut self.completer else {
            return self.writer.write(octets);
        };
        self.buffer.clear();
        completer.feed(octets, &mut self.buffer);
        self.writer.write(&self.buffer)
    }

    fn finish(mut self) -> io::Result<String> {
        if let Some(completer) = &mut self.completer {
            self.buffer.clear();
            completer.finish(&mut self.buffer);
            self.writer.write(&self.buffer)?;
        }
        let QueueWriter { shared, writer, queues, recipients, id, .. } = self;
        writer.commit()?;
        for mailbox in &recipients {
            let owner = mailbox.domain().and_then(|domain| shared.config.accounts.owner(domain));
            let account = owner.map_or("-", |account| account.name.as_str());
            log::info!("event=queued id={id} to=<{mailbox}> account={account}");
        }
        shared.relay.arrived(&queues);
        Ok(id)
    }
}

impl MessageSink for QueueWriter {
    fn write(&mut self, octets: &[u8]) -> Result<(), Reply> {
        self.complete(octets).map_err(|error| storage_failure_reply(&error))
    }

    fn commit(self: Box<Self>) -> Result<String, Reply> {
        self.finish().map_err(|error| storage_failure_reply(&error))
    }
}

/// Stores the provider's DSNs: for a held domain in its queue, for any other in the relay's.
pub struct SpoolDsnSink {
    pub spool: Spool,
    pub router: RecipientRouter,
    pub relay: RelayHandle,
    pub ids: Ids,
}

impl DsnSink for SpoolDsnSink {
    fn store(&self, dsn: &DsnMessage) -> io::Result<()> {
        let Some(queue) = self.router.queue_for(&dsn.to) else {
            log::warn!("event=dsn-undeliverable to=<{}>", dsn.to);
            return Ok(());
        };
        let mut writer = self.spool.begin_message(&[(queue.clone(), dsn.envelope(&self.ids))], "")?;
        writer.write(&dsn.text)?;
        writer.commit()?;
        self.relay.arrived(&[queue]);
        Ok(())
    }
}
