//! The customer after the turn: an SMTP server whose client is the provider. It accepts mail for its own domains only.
//!
//! What happens to a recipient, from RCPT to the 250 after the content:
//!
//! ```text
//! RCPT    rules ─┬─ no destination ──────────────────────────────────────────────▶ 550
//!                ├─ Maildir: has its quota room? ── no ──────────────────────────▶ 452
//!                └─ next hop: RCPT there ── its negative reply, or it is down ───▶ that reply, or 451
//!         all destinations accept ───────────────────────────────────────────────▶ 250
//!
//! content ─▶ a draft in each Maildir, and spooled for next hops
//! end     1. drafts are made durable (prepare), not yet visible ── failure ──────▶ 4yz, nothing is stored
//!         2. each next hop gets the content ─┬─ none accepts, and one defers ────▶ 4yz, nothing is stored
//!                                            ├─ all reject, no other destination ▶ 5yz, nothing is stored
//!                                            └─ otherwise: recipients without it to the retry queue, durably
//!         3. drafts are published (visible) ─┬─ failure, and no next hop has it ─▶ 4yz, no recipient has it
//!                                            └─ failure, and one has it: recipients of drafts to the retry queue
//!         4. ────────────────────────────────────────────────────────────────────▶ 250
//! ```
//!
//! The invariant: when we reply 250, each recipient of the message has it durably, in a Maildir, at its next hop or in
//! the retry queue, which also reports rejections to the sender. When we reply 4yz or 5yz, none of them has it. There
//! are three exceptions, in which a recipient may get the message twice, or the sender a DSN too many, but no recipient
//! loses it:
//!
//! - A next hop has not replied to the content, so it may have the message (RFC 1047).
//! - The retry queue, which is checked before step 1, cannot be written to in step 2 or 3.
//! - Step 3 fails after step 2 has reported rejections.

use std::collections::HashSet;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher, Hash, Hasher};
use std::io;
use std::sync::Arc;

use super::counters::{CallCounters, MessageRecipient};
use super::mailboxes::{Mailboxes, Routing, delivered_here, log_discarded, mailbox_exists, relayed_recipient};
use super::next_hop::{HopDelivery, NextHops};
use super::retry_queue::RetryQueue;
use super::success_dsn::SuccessDsn;
use crate::mail::address::{ForwardPath, Mailbox, forward_path, reverse_path};
use crate::mail::header::Header;
use crate::maildir::spooled::SpooledContent;
use crate::maildir::{MessageWriter, PreparedMessage, continues_field};
use crate::net::trace::quoted;
use crate::queue::QueuedEnvelope;
use crate::recipients::{Delivery, Destination};
use crate::report::Attempt;
use crate::session::storage_failure_reply;
use crate::smtp::client::OutgoingMessage;
use crate::smtp::command::{Envelope, MailFrom, Notify, Recipient};
use crate::smtp::reply::{Reply, Severity};
use crate::smtp::server::{Incoming, MessageSink, SessionHandler, Unaccepted, check_held_domain};
use crate::smtp::status::{RecipientStatus, connection_lost};
use crate::threads::Guarded;

/// The most destinations of one message. One alias may have a hundred.
const MESSAGE_DESTINATIONS: usize = 400;

/// What the customer's SMTP server does with each command of the turned session.
pub struct Receiver {
    context: Arc<CallContext>,
    /// The open transaction, as next hops get it.
    offered: Option<OutgoingMessage>,
    /// The recipients accepted in this transaction, and their destinations.
    accepted: Vec<(Recipient, Vec<Delivery>)>,
    /// The last MAIL was deferred, before any recipient was named.
    deferred_at_mail: bool,
}

/// What the session and its messages share.
struct CallContext {
    retry_queue: Arc<RetryQueue>,
    counters: Arc<CallCounters>,
    hops: Guarded<NextHops>,
    /// The next hop that decided on the negative reply that follows; `None`: the customer itself.
    decided_by: Guarded<Option<String>>,
    incoming: Guarded<IncomingMail>,
    /// Defer what would be rejected.
    soft_bounce: bool,
}

/// The mail that the provider offers in one session.
#[derive(Default)]
pub struct IncomingMail {
    /// How many messages it has offered, accepted or not.
    pub messages: u64,
    /// The fingerprints of what was accepted or rejected, so that the provider removes it: sender, size and
    /// content of an accepted message; sender, size and address of a rejected recipient.
    pub settled: HashSet<u64>,
}

impl CallContext {
    fn mailboxes(&self) -> &Mailboxes {
        &self.retry_queue.mailboxes
    }
}

impl Receiver {
    /// Delivers into the mailboxes of `retry_queue`, and by `hops`. `soft_bounce`: defer what a next hop rejects.
    pub fn new(
        retry_queue: Arc<RetryQueue>, counters: Arc<CallCounters>, hops: NextHops, soft_bounce: bool,
    ) -> Receiver {
        let (hops, decided_by, incoming) = (Guarded::new(hops), Guarded::default(), Guarded::default());
        let context = Arc::new(CallContext { retry_queue, counters, hops, decided_by, incoming, soft_bounce });
        Receiver { context, offered: None, accepted: Vec::new(), deferred_at_mail: false }
    }

    /// What the provider has offered.
    pub fn into_incoming(self) -> IncomingMail {
        std::mem::take(&mut self.context.incoming.lock())
    }

    /// Checks that all destinations of a recipient accept it. The error is the reply to RCPT.
    fn check_destinations(&self, recipient: &Recipient, mut deliveries: Vec<Delivery>) -> Result<Vec<Delivery>, Reply> {
        let Some(message) = &self.offered else { return Ok(deliveries) };
        let mailboxes = self.context.mailboxes();
        for delivery in &deliveries {
            // Defer the recipient whose mailbox is full at RCPT: a deferral at the end of the content would be for all.
            if let Err(error) = mailboxes.check_quota(&delivery.destination, message.size) {
                return Err(storage_failure_reply(&error));
            }
        }
        let count = deliveries.len();
        let must_accept = mailboxes.rules().is_fallback(&recipient.mailbox);
        let mut hops = self.context.hops.lock();
        hops.set_rcpt_deadline();
        let mut rejection = None;
        for delivery in &mut deliveries {
            let Destination::NextHop(hop) = &delivery.destination else { continue };
            let relayed = relayed_recipient(recipient, &delivery.mailbox, count);
            let Err(reply) = hops.check_recipient(hop, message, &relayed, self.accepted.is_empty()) else { continue };
            match reply.severity() {
                // If the next hop rejects postmaster, the mail is for a Maildir here (RFC 5321 section 4.5.1).
                Severity::Permanent if must_accept || delivery.fallback => {
                    let path = mailboxes.rules().maildir_of(&delivery.mailbox);
                    delivery.destination = Destination::Maildir { path, folders: Vec::new() };
                }
                // If one destination defers and another one rejects, the recipient is deferred.
                Severity::Permanent => rejection = rejection.or(Some((hop.to_string(), reply))),
                _ => return Err(self.of_hop(hop.to_string(), reply)),
            }
        }
        rejection.map_or(Ok(deliveries), |(hop, reply)| Err(self.of_hop(hop, reply)))
    }

    /// Records for the summary that a next hop has decided, and returns its reply.
    fn of_hop(&self, hop: String, reply: Reply) -> Reply {
        *self.context.decided_by.lock() = Some(hop);
        reply
    }

    /// The message of the open transaction; `None`: no MAIL has arrived yet.
    fn identity(&self) -> Option<MessageIdentity> {
        self.offered.as_ref().map(|message| MessageIdentity::new(&message.envelope, message.size))
    }

    /// The recipient of a RCPT in the form of an accepted recipient; if its path is not valid, the quoted path.
    fn name_of_recipient(&self, path: &[u8]) -> String {
        let parsed =
            forward_path(path).ok().map(|(path, _)| match self.context.mailboxes().canonical_recipient(&path) {
                Ok(mailbox) => mailbox.to_string(),
                Err(_) => path.to_string(),
            });
        parsed.unwrap_or_else(|| quoted(String::from_utf8_lossy(path)))
    }
}

fn fingerprint(value: &impl Hash) -> u64 {
    BuildHasherDefault::<DefaultHasher>::default().hash_one(value)
}

/// A message as the counters know it (see [`MessageRecipient`]).
#[derive(Clone, Default)]
struct MessageIdentity {
    from: String,
    size: u64,
    envelope_id: Option<String>,
}

impl MessageIdentity {
    fn new(envelope: &Envelope, size: u64) -> MessageIdentity {
        MessageIdentity { from: envelope.from.to_string(), size, envelope_id: envelope.envelope_id.clone() }
    }

    fn to<'a>(&'a self, to: &'a str) -> MessageRecipient<'a> {
        MessageRecipient { from: &self.from, to, size: self.size, envelope_id: self.envelope_id.as_deref() }
    }
}

impl SessionHandler for Receiver {
    fn sender(&mut self, mail: &MailFrom, _: Option<&str>) -> Result<(), Reply> {
        self.context.hops.lock().begin();
        self.accepted.clear();
        self.deferred_at_mail = false;
        let size = mail.size.unwrap_or(0);
        let envelope = mail.envelope.clone();
        self.offered = Some(OutgoingMessage { envelope, size, eight_bit: false, utf8_header: false, attempts: 0 });
        self.context.mailboxes().check_room(size)?;
        // If this message was deferred at MAIL in an earlier transaction, count its recipients instead from now on.
        self.context.counters.accepted(&MessageIdentity::new(&mail.envelope, size).to(""));
        self.context.incoming.lock().messages += 1;
        Ok(())
    }

    fn recipient(&mut self, path: &ForwardPath, notify: &Notify, original: Option<&str>) -> Result<Mailbox, Reply> {
        let mailboxes = self.context.mailboxes();
        let mailbox = mailboxes.canonical_recipient(path)?;
        let deliveries = mailboxes.rules().resolve_from_provider(path, &mailbox_exists).map_err(|reply| {
            // If no mail can be held for the domain because of its grammar, that reply is the more specific one.
            check_held_domain(&mailbox).err().unwrap_or(reply)
        })?;
        // A limit, because each destination costs a copy on the disk or a line in an envelope.
        let before: usize = self.accepted.iter().map(|(_, deliveries)| deliveries.len()).sum();
        if before > 0 && before + deliveries.len() > MESSAGE_DESTINATIONS {
            return Err(Reply::new(452, "4.5.3", "Too many mailboxes: send the rest in another transaction"));
        }
        let original = original.map(str::to_owned);
        let recipient = Recipient { mailbox: mailbox.clone(), notify: notify.clone(), original };
        let deliveries = self.check_destinations(&recipient, deliveries)?;
        // A recipient that is named twice gets the message once.
        if !self.accepted.iter().any(|(known, _)| known.mailbox == mailbox) {
            self.accepted.push((recipient, deliveries));
        }
        Ok(mailbox)
    }

    fn recipient_without_mail(&mut self, path: &[u8]) {
        if self.deferred_at_mail
            && let Some(identity) = self.identity()
        {
            self.context.counters.name_recipient(&identity.to(""), &self.name_of_recipient(path));
        }
    }

    fn may_wait(&self) -> bool {
        self.context.mailboxes().rules().has_next_hops()
    }

    fn not_accepted(&mut self, what: Unaccepted<'_>, reply: &Reply) {
        let (by, identity) = (self.context.decided_by.lock().take(), self.identity().unwrap_or_default());
        let by = by.as_deref().unwrap_or("us");
        let count = |identity: &MessageIdentity, to: &str| {
            self.context.counters.not_accepted(&identity.to(to), by, reply);
            if reply.severity() == Severity::Permanent {
                self.context.incoming.lock().settled.insert(fingerprint(&(&identity.from, identity.size, to)));
            }
        };
        self.context.incoming.lock().messages += u64::from(matches!(what, Unaccepted::Sender(_)));
        match what {
            // `sender` sets `offered` before it defers a MAIL. If MAIL was rejected earlier, or a soft bounce has
            // turned that into a deferral, only its path is known.
            Unaccepted::Sender(_) if reply.severity() == Severity::Transient && !reply.is_softened() => {
                count(&identity, "");
                self.deferred_at_mail = true;
            }
            Unaccepted::Sender(path) => {
                let parsed = reverse_path(path).ok().map(|(path, _)| path.to_string());
                let from = parsed.unwrap_or_else(|| quoted(String::from_utf8_lossy(path)));
                count(&MessageIdentity { from, ..MessageIdentity::default() }, "");
            }
            Unaccepted::Recipient(path) => count(&identity, &self.name_of_recipient(path)),
            Unaccepted::Content => {
                let recipients = self.accepted.iter().map(|(recipient, _)| recipient.mailbox.to_string());
                recipients.for_each(|to| count(&identity, &to));
            }
            Unaccepted::Line => count(&identity, ""),
        }
    }

    fn receive(&mut self, envelope: &Envelope, incoming: &Incoming<'_>) -> Result<Box<dyn MessageSink>, Reply> {
        let context = &self.context;
        let ids = &context.mailboxes().ids;
        let message = QueuedEnvelope { id: ids.queue_id(), arrived: ids.clock().now(), envelope: envelope.clone() };
        let received = incoming.received.field(&message.id, &message.arrived.rfc5322());
        let mut writer = MessageWriter::default();
        let routing = context.mailboxes().begin_known(&mut writer, &envelope.from, &self.accepted, &received);
        // MAIL has checked the room for one copy only: the recipients were not known.
        let (reserve, size) = (context.mailboxes().config.limits.min_free, incoming.size.unwrap_or(0));
        let routing = routing.and_then(|routing| writer.keep_free(reserve, size).map(|()| routing));
        let routing = routing.map_err(|error| storage_failure_reply(&error))?;
        context.counters.begin_message(incoming.size.unwrap_or(0));
        let mut arriving = IncomingMessage {
            context: context.clone(),
            writer,
            spooled: SpooledContent::default(),
            begun: false,
            session: incoming.session.to_owned(),
            identity: self.identity().unwrap_or_default(),
            size: 0,
            hasher: DefaultHasher::new(),
            provider: incoming.received.helo.unwrap_or_default().to_owned(),
            received_octets: received.len(),
            success_dsn: SuccessDsn::new(&context.retry_queue.reporter, &message, &routing),
            message,
            routing,
        };
        arriving.spool(received.as_bytes()).map_err(|error| storage_failure_reply(&error))?;
        Ok(Box::new(arriving))
    }
}

/// A message whose content is arriving.
struct IncomingMessage {
    context: Arc<CallContext>,
    message: QueuedEnvelope,
    routing: Routing,
    writer: MessageWriter,
    spooled: SpooledContent,
    /// Some of the content has arrived.
    begun: bool,
    /// The id of our session in the log.
    session: String,
    identity: MessageIdentity,
    /// Octets of the content that have arrived, and their hash.
    size: usize,
    hasher: DefaultHasher,
    /// The name that the provider has sent in EHLO.
    provider: String,
    /// Octets of our own `Received` field.
    received_octets: usize,
    success_dsn: SuccessDsn,
}

impl IncomingMessage {
    /// Spools octets for next hops, if there are any.
    fn spool(&mut self, octets: &[u8]) -> io::Result<()> {
        if self.routing.hop_recipients.is_empty() {
            return Ok(());
        }
        let mailboxes = self.context.mailboxes();
        self.spooled.write(octets, || mailboxes.queue.unnamed_file(&mailboxes.retry_queue()))
    }

    /// Steps 1 to 4 of the diagram above. `Ok(Err(reply))`: the negative reply of the next hops, after step 2. `Err`: a
    /// failure of the disk. In both cases no recipient has the message, with the three exceptions above.
    fn deliver(&mut self) -> io::Result<Result<(), Reply>> {
        // Destinations here accept the message: a rejection would be false for them.
        let has_others = !self.writer.is_empty() || !self.routing.discarded.is_empty();
        // If some destinations may accept and others not, the message is stored for the others: check that it can be.
        let at_hops: usize = self.routing.hop_recipients.iter().map(|(_, recipients)| recipients.len()).sum();
        if at_hops > 1 || has_others && at_hops > 0 {
            self.context.retry_queue.check_writable()?;
        }
        // Once a next hop has accepted the message, a failure here could not be a negative reply any more.
        let prepared = std::mem::take(&mut self.writer).prepare()?;
        let deliveries = if at_hops == 0 { Vec::new() } else { self.deliver_to_hops() };
        let statuses = || deliveries.iter().flat_map(|delivery| &delivery.recipients).map(|(_, status)| status);
        let sent = statuses().any(RecipientStatus::is_sent);
        let deferred = statuses().any(RecipientStatus::is_open);
        let rejected = statuses().any(RecipientStatus::is_rejected);
        // As long as no recipient has the message, it can stay with the provider, which retries it or reports the
        // rejection.
        let negative = !sent && (deferred || rejected && !has_others);
        let result = if negative { Err(self.negative_reply(&deliveries)) } else { Ok(()) };
        let now = self.context.mailboxes().ids.clock().now();
        let mut rejections = Vec::new();
        for delivery in &deliveries {
            for (recipient, status) in &delivery.recipients {
                // If only some recipients are rejected, count them here. The session counts rejections of the message.
                let reply = status.reply().filter(|reply| status.is_rejected() || reply.is_softened());
                if let (Ok(()), Some(reply)) = (&result, reply) {
                    rejections.push((recipient.mailbox.to_string(), delivery.relay.clone(), reply.clone()));
                }
                // The retry queue logs the others.
                if result.is_err() || status.is_sent() {
                    delivery.attempt().log(&self.message, &recipient.mailbox, status, now);
                }
            }
        }
        if result.is_err() {
            return Ok(result);
        }
        deliveries.into_iter().try_for_each(|delivery| self.store_rest(delivery))?;
        self.publish(prepared, sent)?;
        log_discarded(&self.session, &self.message, &self.routing.discarded, now);
        self.note_accepted();
        let counters = &self.context.counters;
        counters.message_done();
        for recipient in &self.message.envelope.recipients {
            counters.accepted(&self.identity.to(&recipient.mailbox.to_string()));
        }
        for (recipient, hop, reply) in &rejections {
            counters.not_accepted(&self.identity.to(recipient), hop, reply);
        }
        self.success_dsn.send();
        Ok(result)
    }

    /// Records the fingerprint of the message. If it is known, the provider has sent the same message again, for more of
    /// its recipients: count it once.
    fn note_accepted(&self) {
        let fingerprint = fingerprint(&(&self.identity.from, self.size, self.hasher.finish()));
        let mut incoming = self.context.incoming.lock();
        if !incoming.settled.insert(fingerprint) {
            incoming.messages = incoming.messages.saturating_sub(1);
        }
    }

    /// The reply to content that no recipient has: a deferral if any next hop defers. Records which next hop decided.
    fn negative_reply(&self, deliveries: &[HopDelivery]) -> Reply {
        let of_one = |delivery: &HopDelivery| {
            delivery.recipients.iter().map(|(_, status)| (delivery.relay.clone(), status.clone())).collect::<Vec<_>>()
        };
        let statuses: Vec<_> = deliveries.iter().flat_map(of_one).collect();
        let open = statuses.iter().find(|(_, status)| status.is_open());
        let Some((hop, status)) = open.or_else(|| statuses.iter().find(|(_, status)| status.is_rejected())) else {
            return Reply::new(451, "4.3.0", "No destination has accepted the message");
        };
        *self.context.decided_by.lock() = Some(hop.clone());
        let in_doubt = || connection_lost("The next mail server has not replied");
        status.reply().cloned().unwrap_or_else(in_doubt)
    }

    /// Step 2: sends the content to each next hop.
    fn deliver_to_hops(&mut self) -> Vec<HopDelivery> {
        let context = &self.context;
        let first_octets = self.spooled.first_octets().get(self.received_octets..).unwrap_or_default();
        let header = Header::parse(first_octets);
        let info = header.client_info(&self.provider);
        let (size, eight_bit) = (self.spooled.wire_size(), self.spooled.eight_bit());
        let utf8_header = eight_bit && header.needs_utf8();
        let mut hops = context.hops.lock();
        hops.set_content_deadline();
        let mut deliveries = Vec::new();
        for (hop, recipients) in std::mem::take(&mut self.routing.hop_recipients) {
            let mut envelope = self.message.envelope.with_recipients(recipients);
            envelope.drop_needless_utf8(utf8_header);
            let outgoing = OutgoingMessage { envelope, size, eight_bit, utf8_header, attempts: 0 };
            let mut delivery = hops.deliver(&hop, &outgoing, &mut self.spooled, info.as_ref());
            let (from, recipients) = (&outgoing.envelope.from, &mut delivery.recipients);
            context.mailboxes().deliver_fallbacks(from, recipients, &self.routing.fallbacks, &mut self.spooled);
            if context.soft_bounce {
                // The rejection of some recipients would send a DSN.
                for (_, status) in recipients.iter_mut() {
                    if let RecipientStatus::Rejected(reply) = status {
                        *status = RecipientStatus::Deferred(reply.clone().softened());
                    }
                }
            }
            for (recipient, _) in recipients.iter().filter(|(_, status)| status.is_sent() && !delivery.sends_dsn) {
                self.success_dsn.add_relayed(recipient);
            }
            deliveries.push(delivery);
        }
        deliveries
    }

    /// Stores the message in the retry queue for the recipients for whom a next hop has not accepted it.
    fn store_rest(&mut self, mut delivery: HopDelivery) -> io::Result<()> {
        delivery.recipients.retain(|(_, status)| !status.is_sent());
        let (recipients, statuses): (Vec<_>, Vec<_>) = std::mem::take(&mut delivery.recipients).into_iter().unzip();
        if recipients.is_empty() {
            return Ok(());
        }
        let message = self.message.with_recipients(recipients);
        self.context.retry_queue.store(&message, statuses, &mut self.spooled, &delivery.attempt())
    }

    /// Step 3: makes the copies in Maildirs visible. `sent`: a next hop has the message.
    fn publish(&mut self, prepared: PreparedMessage, sent: bool) -> io::Result<()> {
        match prepared.publish() {
            Err(error) if sent => {
                let recipients = std::mem::take(&mut self.routing.maildir_recipients);
                let statuses = vec![RecipientStatus::Deferred(storage_failure_reply(&error)); recipients.len()];
                let message = self.message.with_recipients(recipients);
                let attempt = Attempt::in_maildir("-", "maildir");
                self.context.retry_queue.store(&message, statuses, &mut self.spooled, &attempt)
            }
            Err(error) => Err(error),
            Ok(entries) => {
                let now = self.context.mailboxes().ids.clock().now();
                for (recipient, entry) in self.routing.maildir_recipients.iter().zip(&entries) {
                    let file = entry.unique().to_string_lossy();
                    let attempt = Attempt::in_maildir(&self.session, &file);
                    attempt.log(&self.message, &recipient.mailbox, &delivered_here(), now);
                }
                Ok(())
            }
        }
    }
}

impl MessageSink for IncomingMessage {
    fn write(&mut self, octets: &[u8]) -> Result<(), Reply> {
        self.context.counters.add_octets(octets.len());
        self.size += octets.len();
        self.hasher.write(octets);
        self.success_dsn.observe(octets);
        // Our `Received` field comes first. Content that begins with a space or a tab would continue that field, so an
        // empty line goes between them; `MessageWriter` does the same for the copies in Maildirs.
        let separated = !octets.is_empty() && !std::mem::replace(&mut self.begun, true) && continues_field(octets);
        let spooled = if separated { self.spool(b"\n") } else { Ok(()) };
        let written = spooled.and_then(|()| self.spool(octets)).and_then(|()| self.writer.write(octets));
        written.map_err(|error| storage_failure_reply(&error))
    }

    fn commit(mut self: Box<Self>) -> Result<String, Reply> {
        self.deliver().map_err(|error| storage_failure_reply(&error))??;
        Ok(self.message.id)
    }
}
