//! Stores messages and DSNs in the spool.
//!
//! A message becomes one file in each queue that its recipients belong to. The server replies 250 only after all these
//! files are durable (RFC 5321 section 6.1).

use std::io;
use std::sync::Arc;

use super::rates::SubmissionPermit;
use super::relay::RelayHandle;
use super::shared::Shared;
use super::spool::{Spool, SpoolQueue};
use crate::ids::Ids;
use crate::mail::address::{Mailbox, ReversePath};
use crate::mail::header::HeaderCompleter;
use crate::maildir::MessageWriter;
use crate::queue::QueuedEnvelope;
use crate::report::{DsnMessage, DsnSink};
use crate::session::storage_failure_reply;
use crate::smtp::command::{Envelope, MailFrom, Recipient};
use crate::smtp::reply::Reply;
use crate::smtp::server::{Incoming, MessageSink};

/// The maximum of queues of held mail for one message.
const HELD_QUEUES: usize = 10;

/// The queues of held mail that the recipients of one message belong to.
#[derive(Default)]
pub struct HeldQueues {
    queues: Vec<SpoolQueue>,
    /// The size in octets that MAIL declares; `None`: it declares none.
    size: Option<u64>,
}

impl HeldQueues {
    /// The queues of a message that has no recipients yet.
    pub fn begin(mail: &MailFrom) -> HeldQueues {
        HeldQueues { queues: Vec::new(), size: mail.size }
    }

    /// Adds the queue of one more recipient. Returns the recipient's address as it is stored.
    ///
    /// # Errors
    /// The reply to RCPT: that of [`Shared::check_learned`] or [`Spool::check_recipient`]; or 452, so that the client
    /// sends the message to the other recipients in another transaction (RFC 5321 section 4.5.3.1.10). It gets 452 if
    /// there are 10 queues already, because each takes the message's size on the disk; or if the message may exceed the
    /// quota of one of several accounts.
    pub fn add(&mut self, shared: &Shared, mailbox: &Mailbox, queue: SpoolQueue) -> Result<Mailbox, Reply> {
        shared.check_learned(mailbox)?;
        shared.spool.check_recipient(mailbox, &self.queues, self.size.unwrap_or(0))?;
        if !self.queues.contains(&queue) {
            if self.queues.len() >= HELD_QUEUES {
                return Err(Reply::new(452, "4.5.3", "Too many domains: send the rest in another transaction"));
            }
            self.queues.push(queue);
            if !shared.spool.may_go_together(&self.queues, self.size) {
                self.queues.pop();
                return Err(Reply::new(452, "4.5.3", "Too little room with others: send it in another transaction"));
            }
        }
        Ok(mailbox.canonical())
    }
}

/// What the provider changes in the header of a message, in addition to `Received`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HeaderPolicy {
    /// Nothing: the message comes from another host.
    Keep,
    /// The customer's mail server relays through the provider. The provider removes the fields that only the final delivery
    /// writes, and those of its own records (RFC 5321 sections 4.4 and 6.4).
    Relay,
}

/// Begins to store a message. The returned sink receives its content. `permit`: counts the message for its account's rate.
///
/// # Errors
/// The reply to DATA or BDAT: the spool cannot be written to.
pub fn store(
    shared: &Arc<Shared>, envelope: &Envelope, incoming: &Incoming<'_>, policy: HeaderPolicy,
    permit: Option<SubmissionPermit>,
) -> Result<Box<dyn MessageSink>, Reply> {
    let (id, arrived) = (shared.lasting.ids.queue_id(), shared.lasting.ids.clock().now());
    let mut copies: Vec<(SpoolQueue, QueuedEnvelope)> = Vec::new();
    for recipient in &envelope.recipients {
        let Some(queue) = shared.spool.queue_for(&recipient.mailbox) else { continue };
        match copies.iter_mut().find(|(other, _)| *other == queue) {
            Some((_, copy)) => copy.envelope.recipients.push(recipient.clone()),
            None => {
                let envelope = envelope.with_recipients(vec![recipient.clone()]);
                copies.push((queue, QueuedEnvelope { id: id.clone(), arrived, envelope }));
            }
        }
    }
    let received = incoming.received.field(&id, &arrived.rfc5322());
    // Check the room again: at MAIL the number of copies was not known.
    let writer = shared.spool.begin_incoming(&copies, &received, incoming.size.unwrap_or(0));
    let writer = writer.map_err(|error| storage_failure_reply(&error))?;
    Ok(Box::new(QueueWriter {
        shared: shared.clone(),
        writer,
        copies,
        id,
        completer: (policy == HeaderPolicy::Relay).then(HeaderCompleter::relay),
        completed: Vec::new(),
        permit,
    }))
}

/// Writes one message into its queues.
struct QueueWriter {
    shared: Arc<Shared>,
    writer: MessageWriter,
    copies: Vec<(SpoolQueue, QueuedEnvelope)>,
    id: String,
    completer: Option<HeaderCompleter>,
    /// Content from the completer that is not written yet.
    completed: Vec<u8>,
    permit: Option<SubmissionPermit>,
}

impl QueueWriter {
    fn finish(mut self) -> Result<String, Reply> {
        let mut written = Ok(());
        if let Some(completer) = &mut self.completer {
            self.completed.clear();
            completer.finish(&mut self.completed);
            written = self.writer.write(&self.completed);
        }
        let (queues, spool) = (self.copies.iter().map(|(queue, _)| queue), &self.shared.spool);
        let entries = written.and_then(|()| self.writer.commit());
        let entries = entries.map_err(|error| spool.failure_reply(&error, queues))?;
        self.permit.into_iter().for_each(SubmissionPermit::keep);
        for ((queue, copy), entry) in self.copies.iter().zip(entries) {
            for Recipient { mailbox, .. } in &copy.envelope.recipients {
                let owner = mailbox.domain().and_then(|domain| self.shared.config.accounts.owner(domain));
                let account = owner.map_or("-", |account| account.name.as_str());
                log::info!("event=queued id={} to=<{mailbox}> account={account}", self.id);
            }
            self.shared.lasting.relay.arrived(queue, entry, copy.envelope.from == ReversePath::Null, None);
        }
        Ok(self.id)
    }
}

impl MessageSink for QueueWriter {
    fn write(&mut self, octets: &[u8]) -> Result<(), Reply> {
        let octets = match &mut self.completer {
            None => octets,
            Some(completer) => {
                self.completed.clear();
                completer.feed(octets, &mut self.completed);
                &self.completed
            }
        };
        self.writer.write(octets).map_err(|error| storage_failure_reply(&error))
    }

    fn commit(self: Box<Self>) -> Result<String, Reply> {
        self.finish()
    }
}

/// While the provider's postmaster has this many messages, DSNs without another queue are dropped: each message with a
/// forged sender may cause one.
const POSTMASTER_LIMIT: usize = 1000;

/// Stores each DSN of the provider in the queue of its recipient, held or outgoing; if there is none, in that of the
/// provider's postmaster.
pub struct SpoolDsnSink {
    pub spool: Arc<Spool>,
    pub relay: RelayHandle,
    pub ids: Ids,
}

impl DsnSink for SpoolDsnSink {
    fn store(&self, dsn: &DsnMessage) -> io::Result<()> {
        let mut envelope = dsn.envelope(&self.ids);
        let queue = self.spool.queue_for(&dsn.to);
        if queue.is_none() {
            // The relay does not send to address literals.
            let waiting = self.spool.queue().count(&self.spool.name(&SpoolQueue::Postmaster), POSTMASTER_LIMIT)?;
            let is_full = waiting >= POSTMASTER_LIMIT;
            let consequence = if is_full { "dropped: postmaster has too many" } else { "postmaster gets it" };
            log::warn!("event=dsn-undeliverable to=<{}> consequence={consequence:?}", dsn.to);
            if is_full {
                return Ok(());
            }
            if let Some(postmaster) = self.spool.postmaster() {
                envelope.envelope.recipients = vec![Recipient::plain(postmaster)];
            }
        }
        let queue = queue.unwrap_or(SpoolQueue::Postmaster);
        if matches!(queue, SpoolQueue::Held(_)) {
            // Held mail has canonical addresses: the customer may not know `Alice@EXAMPLE.org.`.
            envelope.envelope.recipients = vec![Recipient::plain(dsn.to.canonical())];
        }
        let mut writer = self.spool.begin_message(&[(queue.clone(), envelope)], "")?;
        writer.write(&dsn.text)?;
        // Only in outgoing queues is the time of modification that of the next attempt.
        let not_before = dsn.not_before.filter(|_| matches!(queue, SpoolQueue::Outgoing(_)));
        not_before.into_iter().for_each(|time| writer.set_modified(time));
        writer.commit()?.into_iter().for_each(|entry| self.relay.arrived(&queue, entry, true, not_before));
        Ok(())
    }

    fn is_ours(&self, to: &Mailbox) -> bool {
        self.spool.held_queue(to).is_some()
    }
}
