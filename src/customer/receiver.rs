//! The customer after the turn: an SMTP server whose client is the provider, for our own mailboxes only.
//!
//! The way of a recipient, from RCPT to the 250 after the content:
//!
//! ```text
//! RCPT    rules ─┬─ no destination ──────────────────────────────────────────────▶ 550
//!                ├─ Maildir: has its quota room? ── no ──────────────────────────▶ 452
//!                └─ next hop: RCPT there ── its negative reply, or it is down ───▶ that reply, or 451
//!         all destinations accept ───────────────────────────────────────────────▶ 250
//!
//! content ─▶ a draft in each Maildir, and spooled for next hops
//! end     1. drafts are made durable (prepare); nothing is seen yet ─ failure ───▶ 4yz, nothing is kept
//!         2. each next hop gets the content ─┬─ none accepts, none has it here ──▶ its reply, nothing is kept
//!                                            └─ some accept: the rest to ROOT/.handover, durably
//!         3. drafts are published ─ failure, a next hop has it: to ROOT/.handover, durably
//!         4. ──────────────────────────────────────────────────────────────────────▶ 250
//! ```
//!
//! The invariant: when we reply 250, each recipient of the message has it durably, in a Maildir, at its next hop or in the
//! retry queue; when we reply 4yz or 5yz, none of them has it.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::counters::CallCounters;
use super::mailboxes::{Mailboxes, Routing, relayed_recipient};
use super::next_hop::{HopDelivery, NextHops};
use super::retry_queue::{HopName, RetryQueue, via};
use super::success_dsn::SuccessDsn;
use crate::mail::address::{ForwardPath, Mailbox};
use crate::mail::header::Header;
use crate::maildir::spooled::SpooledContent;
use crate::maildir::{MessageWriter, PreparedMessage};
use crate::queue::QueuedEnvelope;
use crate::recipients::{Delivery, Destination, NextHop};
use crate::report::{Attempt, Reporter};
use crate::session::storage_failure_reply;
use crate::smtp::client::OutgoingMessage;
use crate::smtp::command::{Envelope, MailFrom, Notify, Recipient};
use crate::smtp::reply::{Reply, Severity};
use crate::smtp::server::{Incoming, MessageSink, SessionHandler};
use crate::smtp::status::{RecipientStatus, connection_lost};

/// Destinations that one message may have; an alias alone may have a hundred.
const MESSAGE_DESTINATIONS: usize = 400;

/// The handler of the turned session.
pub struct Receiver {
    mailboxes: Arc<Mailboxes>,
    retry_queue: Arc<RetryQueue>,
    /// Sends the DSNs of success that senders asked for.
    reporter: Option<Reporter>,
    counters: Arc<CallCounters>,
    hops: Arc<Mutex<NextHops>>,
    /// The transaction so far, as next hops get it.
    message: Option<OutgoingMessage>,
    /// The recipients accepted in this transaction, and their destinations.
    accepted: Vec<(Mailbox, Vec<Delivery>)>,
}

/// A recipient that was rejected or deferred, and who decided that.
struct NotAccepted {
    by: String,
    reply: Reply,
}

impl Receiver {
    pub fn new(
        mailboxes: Arc<Mailboxes>, retry_queue: Arc<RetryQueue>, reporter: Option<Reporter>,
        counters: Arc<CallCounters>, hops: NextHops,
    ) -> Receiver {
        let hops = Arc::new(Mutex::new(hops));
        Receiver { mailboxes, retry_queue, reporter, counters, hops, message: None, accepted: Vec::new() }
    }

    fn hops(&self) -> MutexGuard<'_, NextHops> {
        self.hops.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All destinations of a recipient must accept, or the recipient is rejected.
    fn check_destinations(
        &self, recipient: &Recipient, mut deliveries: Vec<Delivery>,
    ) -> Result<Vec<Delivery>, NotAccepted> {
        let Some(message) = &self.message else { return Ok(deliveries) };
        for delivery in &deliveries {
            // Only this recipient waits for room. (If the content is larger than MAIL has announced, all wait.)
            if let Err(error) = self.mailboxes.admits(&delivery.destination, message.size)
                && error.kind() == io::ErrorKind::QuotaExceeded
            {
                return Err(NotAccepted { by: "its quota".to_owned(), reply: storage_failure_reply(&error) });
            }
        }
        let count = deliveries.len();
        let must_accept = self.mailboxes.must_accept(&recipient.mailbox);
        let mut hops = self.hops();
        hops.set_rcpt_deadline();
        let mut rejected = None;
        for delivery in &mut deliveries {
            let Destination::NextHop(hop) = &delivery.destination else { continue };
            let relayed = relayed_recipient(recipient, &delivery.mailbox, count);
            let Err(reply) = hops.check_recipient(hop, message, &relayed) else { continue };
            let not_accepted = NotAccepted { by: hop.to_string(), reply };
            match not_accepted.reply.severity() {
                // RFC 5321 section 4.5.1: postmaster is there, if at no next hop then with us.
                Severity::Permanent if must_accept || delivery.fallback => {
                    let path = self.mailboxes.fallback(&delivery.mailbox);
                    delivery.destination = Destination::Maildir { path, folders: Vec::new() };
                }
                // A deferral by one destination counts for more than a rejection by another.
                Severity::Permanent => drop(rejected.get_or_insert(not_accepted)),
                _ => return Err(not_accepted),
            }
        }
        rejected.map_or(Ok(deliveries), Err)
    }

    /// Counts a recipient that is not accepted, and returns the reply.
    fn count(&self, path: &ForwardPath, by: &str, reply: Reply) -> Reply {
        self.counters.not_accepted(path, by, &reply);
        reply
    }
}

impl SessionHandler for Receiver {
    fn sender(&mut self, mail: &MailFrom, _: Option<&str>) -> Result<(), Reply> {
        self.hops().begin();
        self.accepted.clear();
        let size = mail.size.unwrap_or(0);
        self.message = Some(OutgoingMessage { envelope: mail.envelope.clone(), size, eight_bit: false });
        self.mailboxes.check_room(size)
    }

    fn recipient(&mut self, path: &ForwardPath, notify: &Notify, original: Option<&str>) -> Result<Mailbox, Reply> {
        let deliveries = self.mailboxes.resolve(path).map_err(|reply| self.count(path, "us", reply))?;
        let mailbox = self.mailboxes.canonical_recipient(path)?;
        // Each destination is an open file, or a line of an envelope.
        let before: usize = self.accepted.iter().map(|(_, deliveries)| deliveries.len()).sum();
        if before > 0 && before + deliveries.len() > MESSAGE_DESTINATIONS {
            return Err(Reply::new(452, "4.5.3", "Too many mailboxes: send the rest in another transaction"));
        }
        let original = original.map(str::to_owned);
        let recipient = Recipient { mailbox: mailbox.clone(), notify: notify.clone(), original };
        let checked = self.check_destinations(&recipient, deliveries);
        let deliveries = checked.map_err(|NotAccepted { by, reply }| self.count(path, &by, reply))?;
        self.accepted.push((mailbox.clone(), deliveries));
        Ok(mailbox)
    }

    fn may_wait(&self) -> bool {
        self.mailboxes.has_next_hops()
    }

    fn receive(&mut self, envelope: &Envelope, incoming: &Incoming<'_>) -> Result<Box<dyn MessageSink>, Reply> {
        let ids = self.mailboxes.ids();
        let message = QueuedEnvelope { id: ids.queue_id(), arrived: ids.clock().now(), envelope: envelope.clone() };
        let received = incoming.received.field(&message.id, &message.arrived.rfc5322());
        let known: Vec<_> = envelope
            .recipients
            .iter()
            .filter_map(|recipient| {
                let (_, deliveries) = self.accepted.iter().find(|(mailbox, _)| *mailbox == recipient.mailbox)?;
                Some((recipient.clone(), deliveries.clone()))
            })
            .collect();
        let mut writer = MessageWriter::default();
        let routing = self.mailboxes.begin_known(&mut writer, &envelope.from, &known, &received);
        let routing = routing.map_err(|error| storage_failure_reply(&error))?;
        let mut to_hops = routing.hop_recipients.iter().flat_map(|(_, recipients)| recipients);
        let asked = to_hops.any(|recipient| recipient.notify.success());
        let reporter = self.reporter.as_ref();
        let success_dsn = reporter.and_then(|reporter| SuccessDsn::new(reporter, &message, &routing, asked));
        self.counters.begin_message(incoming.size.unwrap_or(0));
        let mut arriving = IncomingMessage {
            writer,
            routing,
            spooled: SpooledContent::default(),
            hops: self.hops.clone(),
            mailboxes: self.mailboxes.clone(),
            retry_queue: self.retry_queue.clone(),
            message,
            session: incoming.session.to_owned(),
            provider: incoming.received.helo.unwrap_or_default().to_owned(),
            received_octets: received.len(),
            success_dsn,
            counters: self.counters.clone(),
        };
        arriving.spool(received.as_bytes()).map_err(|error| storage_failure_reply(&error))?;
        Ok(Box::new(arriving))
    }
}

/// A message on its way to its destinations.
struct IncomingMessage {
    writer: MessageWriter,
    routing: Routing,
    spooled: SpooledContent,
    hops: Arc<Mutex<NextHops>>,
    mailboxes: Arc<Mailboxes>,
    retry_queue: Arc<RetryQueue>,
    message: QueuedEnvelope,
    /// The id of our session in the log.
    session: String,
    /// The name of the client.
    provider: String,
    /// Octets of our own `Received`.
    received_octets: usize,
    success_dsn: Option<SuccessDsn>,
    counters: Arc<CallCounters>,
}

/// What became of the recipients of one next hop.
struct HopResult {
    hop: NextHop,
    session: String,
    recipients: Vec<Recipient>,
    statuses: Vec<RecipientStatus>,
    dsn: bool,
}

/// How many recipients at next hops have which status.
#[derive(Default)]
struct HopCounts {
    sent: usize,
    open: usize,
    rejected: usize,
}

impl HopCounts {
    fn of(results: &[HopResult]) -> HopCounts {
        let mut counts = HopCounts::default();
        for status in results.iter().flat_map(|result| &result.statuses) {
            *match status {
                RecipientStatus::Sent(_) => &mut counts.sent,
                RecipientStatus::Rejected(_) => &mut counts.rejected,
                RecipientStatus::Deferred(_) | RecipientStatus::InDoubt => &mut counts.open,
            } += 1;
        }
        counts
    }
}

impl IncomingMessage {
    /// Keeps content for next hops.
    fn spool(&mut self, octets: &[u8]) -> io::Result<()> {
        if self.routing.hop_recipients.is_empty() {
            return Ok(());
        }
        let mailboxes = &self.mailboxes;
        self.spooled.write(octets, || mailboxes.queue().unnamed_file(&mailboxes.retry_queue()))
    }

    fn write_block(&mut self, octets: &[u8]) -> io::Result<()> {
        self.counters.add_octets(octets.len());
        if let Some(dsn) = &mut self.success_dsn {
            dsn.observe(octets);
        }
        self.spool(octets)?;
        self.writer.write(octets)
    }

    /// Steps 1 to 4 of the diagram above. `Ok(Err(reply))`: no recipient has the message.
    fn deliver(&mut self) -> io::Result<Result<(), Reply>> {
        let here = !self.writer.is_empty();
        // If some destinations may accept and others not, the rest needs a place.
        let at_hops: usize = self.routing.hop_recipients.iter().map(|(_, recipients)| recipients.len()).sum();
        if at_hops > 1 || here && at_hops > 0 {
            self.retry_queue.check_writable()?;
        }
        // Before any next hop accepts, so that nothing is rejected here after that.
        let prepared = std::mem::take(&mut self.writer).prepare()?;
        let results = if at_hops == 0 { Vec::new() } else { self.deliver_to_hops()? };
        let counts = HopCounts::of(&results);
        // As long as no recipient has it, it can stay with the provider, which also reports a rejection.
        if counts.sent == 0 && (counts.open > 0 || counts.rejected > 0 && !here) {
            let reply = negative_reply(&results);
            for HopResult { hop, recipients, .. } in &results {
                recipients.iter().for_each(|recipient| self.counters.not_accepted(&recipient.mailbox, hop, &reply));
            }
            return Ok(Err(reply));
        }
        self.store_rest(results)?;
        self.publish(prepared, counts.sent > 0)?;
        self.counters.message_done();
        if let Some(dsn) = &self.success_dsn {
            dsn.send();
        }
        Ok(Ok(()))
    }

    /// Gives the content to each next hop.
    fn deliver_to_hops(&mut self) -> io::Result<Vec<HopResult>> {
        let front = self.spooled.first_octets().get(self.received_octets..).unwrap_or_default();
        let info = Header::parse(front).client_info(&self.provider);
        let (size, eight_bit) = (self.spooled.wire_size(), self.spooled.eight_bit());
        let mut hops = self.hops.lock().unwrap_or_else(PoisonError::into_inner);
        hops.set_content_deadline();
        let mut results = Vec::new();
        for (hop, recipients) in std::mem::take(&mut self.routing.hop_recipients) {
            let envelope = self.message.envelope.with_recipients(recipients);
            let outgoing = OutgoingMessage { envelope, size, eight_bit };
            let delivery = hops.deliver(&hop, &outgoing, &mut self.spooled, info.as_ref())?;
            let HopDelivery { session, recipients: mut statuses, dsn } = delivery;
            let Envelope { from, recipients, .. } = outgoing.envelope;
            for (recipient, status) in recipients.iter().zip(&mut statuses) {
                if status.is_rejected() && self.mailboxes.must_accept(&recipient.mailbox) {
                    *status = self.mailboxes.deliver_fallback(&from, &recipient.mailbox, &mut self.spooled);
                }
            }
            if let Some(success_dsn) = self.success_dsn.as_mut().filter(|_| !dsn) {
                let sent = recipients.iter().zip(&statuses).filter(|(_, status)| status.is_sent());
                success_dsn.add_relayed(sent.map(|(recipient, _)| recipient.clone()));
            }
            results.push(HopResult { hop, session, recipients, statuses, dsn });
        }
        drop(hops);
        results.iter().for_each(|result| self.log_hop(result));
        Ok(results)
    }

    fn log_hop(&self, result: &HopResult) {
        let relay = result.hop.to_string();
        let via = via(&result.hop);
        let attempt = Attempt {
            session: &result.session,
            via,
            relay: &relay,
            peer: None,
            peer_sends_dsn: result.dsn,
            retry: None,
        };
        let now = self.mailboxes.ids().clock().now();
        for (recipient, status) in result.recipients.iter().zip(&result.statuses) {
            attempt.log(&self.message, &recipient.mailbox, status, now);
        }
    }

    /// Stores the message for the recipients at next hops that have not accepted it.
    fn store_rest(&mut self, results: Vec<HopResult>) -> io::Result<()> {
        for HopResult { hop, session, recipients, statuses, dsn } in results {
            let rest = recipients.into_iter().zip(statuses).filter(|(_, status)| !status.is_sent());
            let (recipients, statuses): (Vec<_>, Vec<_>) = rest.unzip();
            if recipients.is_empty() {
                continue;
            }
            for (recipient, status) in recipients.iter().zip(&statuses) {
                if let RecipientStatus::Rejected(reply) = status {
                    self.counters.not_accepted(&recipient.mailbox, &hop, reply);
                }
            }
            let by = HopName { session: &session, via: via(&hop), name: &hop.to_string(), dsn };
            self.retry_queue.store(&self.message.with_recipients(recipients), statuses, &mut self.spooled, by)?;
        }
        Ok(())
    }

    /// Makes the copies in Maildirs visible. If that fails after a next hop has accepted, they go to the retry queue.
    fn publish(&mut self, prepared: PreparedMessage, at_hops: bool) -> io::Result<()> {
        match prepared.publish() {
            Err(error) if at_hops => {
                let recipients = std::mem::take(&mut self.routing.maildir_recipients);
                let statuses = vec![RecipientStatus::Deferred(storage_failure_reply(&error)); recipients.len()];
                let message = self.message.with_recipients(recipients);
                self.retry_queue.store(&message, statuses, &mut self.spooled, HopName::MAILDIR)
            }
            Err(error) => Err(error),
            Ok(entries) => {
                let now = self.mailboxes.ids().clock().now();
                let stored = RecipientStatus::Sent(Reply::new(250, "2.0.0", "Delivered here"));
                for (recipient, entry) in self.routing.maildir_recipients.iter().zip(&entries) {
                    let attempt = Attempt::in_maildir(&self.session, entry.unique());
                    attempt.log(&self.message, &recipient.mailbox, &stored, now);
                }
                Ok(())
            }
        }
    }
}

/// The reply to content that no recipient has: later, if any destination said later.
fn negative_reply(results: &[HopResult]) -> Reply {
    let statuses = || results.iter().flat_map(|result| &result.statuses);
    let later = statuses().find_map(|status| match status {
        RecipientStatus::Deferred(reply) => Some(reply.clone()),
        RecipientStatus::InDoubt => Some(connection_lost("The mail server behind this one has not answered")),
        RecipientStatus::Sent(_) | RecipientStatus::Rejected(_) => None,
    });
    let never = || statuses().find(|status| status.is_rejected()).and_then(RecipientStatus::reply).cloned();
    later.or_else(never).unwrap_or_else(|| Reply::new(451, "4.3.0", "Nobody has taken the message"))
}

impl MessageSink for IncomingMessage {
    fn write(&mut self, octets: &[u8]) -> Result<(), Reply> {
        self.write_block(octets).map_err(|error| storage_failure_reply(&error))
    }

    fn commit(mut self: Box<Self>) -> Result<String, Reply> {
        match self.deliver() {
            Ok(Ok(())) => Ok(self.message.id),
            Ok(Err(reply)) => Err(reply),
            Err(error) => Err(storage_failure_reply(&error)),
        }
    }
}
