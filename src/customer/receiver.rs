//! The customer after the turn: an SMTP server whose client is the provider, for our own mailboxes only.
//!
//! Each recipient goes where the rules lead: into Maildirs here, or to a next hop, which is asked before we answer.
//! Content is answered 250 when it is durable in the Maildirs and every next hop has taken it.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use super::counters::CallCounters;
use super::mailboxes::{Mailboxes, Routing, relayed_recipient};
use super::next_hop::{HopDelivery, HopName, NextHops, RetryQueue, SpooledContent};
use crate::mail::address::{ForwardPath, Mailbox};
use crate::mail::header::Header;
use crate::maildir::MessageWriter;
use crate::queue::{Envelope, QueueName as Shelf};
use crate::recipients::{Delivery, Destination, NextHop};
use crate::report::Reporter;
use crate::report::dsn::Action;
use crate::sasl::{CredentialStore, Unavailable};
use crate::session::server::{MessageSink, SessionHandler, storage_failure_reply};
use crate::smtp::client::{OutgoingMessage, RecipientStatus};
use crate::smtp::command::{MailFrom, Notify, Recipient};
use crate::smtp::reply::{Reply, Severity};
use crate::smtp::server::{Server, ServerHandler};

/// A message goes to so many places at once; an alias alone may have a hundred.
const DESTINATION_LIMIT_: usize = 400;

/// Of a longer header no more comes back with a notice.
const HEADER_LIMIT: usize = 64 * 1024;

/// The party behind the turned session.
pub struct Receiver {
    mailboxes: Arc<Mailboxes>,
    retry_queue: Arc<RetryQueue>,
    /// Makes the notices of delivery that a sender asked for.
    reporter: Option<Reporter>,
    counters: Arc<CallCounters>,
    hops: Arc<Mutex<NextHops>>,
    mail: Option<OutgoingMessage>,
    /// The recipients of this transaction, and where each goes.
    accepted: Vec<(Mailbox, Vec<Delivery>)>,
}

impl Receiver {
    pub fn new(
        mailboxes: Arc<Mailboxes>,
        retry_queue: Arc<RetryQueue>,
        reporter: Option<Reporter>,
        counters: Arc<CallCounters>,
        hops: NextHops,
    ) -> Receiver {
        let hops = Arc::new(Mutex::new(hops));
        Receiver { mailboxes, retry_queue, reporter, counters, hops, mail: None, accepted: Vec::new() }
    }

    /// Every place of a recipient must take him, or nothing of his goes anywhere.
    fn check_next_hops(
        &self,
        meant: &Recipient,
        mut deliveries: Vec<Delivery>,
    ) -> Result<Vec<Delivery>, (String, Reply)> {
        let Some(message) = &self.mail else { return Ok(deliveries) };
        for delivery in &deliveries {
            let Destination::Maildir { path, folders } = &delivery.destination else { continue };
            // The others need not wait for one who has no room. (The content may be larger than MAIL said: then they do.)
            let room = self.mailboxes.admits((path, folders), message.size);
            if let Err(error) = room
                && error.kind() == io::ErrorKind::QuotaExceeded
            {
                return Err(("its quota".to_owned(), storage_failure_reply(&error)));
            }
        }
        let many = deliveries.len();
        let mut hops = self.hops.lock().unwrap_or_else(PoisonError::into_inner);
        hops.set_rcpt_deadline();
        let mut refused = None;
        let must_take = self.mailboxes.must_accept(&meant.mailbox);
        for delivery in &mut deliveries {
            let Destination::NextHop(hop) = &delivery.destination else { continue };
            let Err(reply) = hops.check_recipient(hop, message, &relayed_recipient(meant, &delivery.mailbox, many))
            else {
                continue;
            };
            match reply.severity() {
                // RFC 5321 section 4.5.1: postmaster is there, if nowhere else then with us.
                Severity::Permanent if must_take || delivery.fallback => {
                    let path = self.mailboxes.fallback(&delivery.mailbox);
                    delivery.destination = Destination::Maildir { path, folders: Vec::new() };
                }
                // That one may be taken later counts for more than that another will not.
                Severity::Permanent => drop(refused.get_or_insert((hop.to_string(), reply))),
                _ => return Err((hop.to_string(), reply)),
            }
        }
        refused.map_or(Ok(deliveries), Err)
    }
}

impl CredentialStore for Receiver {
    /// Nobody authenticates to a customer.
    fn secret(&self, _: &str) -> Result<Option<Vec<u8>>, Unavailable> {
        Ok(None)
    }
}

impl ServerHandler for Receiver {
    fn sender(&mut self, mail: &MailFrom, _: Option<&str>) -> Result<(), Reply> {
        self.hops.lock().unwrap_or_else(PoisonError::into_inner).begin();
        self.accepted.clear();
        self.mail = Some(OutgoingMessage {
            from: mail.path.clone(),
            recipients: Vec::new(),
            size: mail.size.unwrap_or(0),
            body: mail.body,
            eight_bit: false,
            utf8: mail.utf8,
            ret: mail.ret,
            envelope_id: mail.envelope_id.clone(),
        });
        self.mailboxes.check_room(mail.size.unwrap_or(0))
    }

    fn recipient(&mut self, path: &ForwardPath, notify: &Notify, original: Option<&str>) -> Result<Mailbox, Reply> {
        let refuse = |by: &str, reply: Reply| {
            self.counters.refused(path, by, &reply);
            reply
        };
        let deliveries = self.mailboxes.resolve(path).map_err(|reply| refuse("us", reply))?;
        let mailbox = self.mailboxes.canonical_recipient(path)?;
        let meant =
            Recipient { mailbox: mailbox.clone(), notify: notify.clone(), original: original.map(str::to_owned) };
        // Each place is a file that is open, or a line of an envelope.
        let places: usize = self.accepted.iter().map(|(_, deliveries)| deliveries.len()).sum();
        if places > 0 && places + deliveries.len() > DESTINATION_LIMIT_ {
            return Err(Reply::new(452, "4.5.3", "Too many mailboxes: send the rest in another transaction"));
        }
        let deliveries = self.check_next_hops(&meant, deliveries).map_err(|(hop, reply)| refuse(&hop, reply))?;
        self.accepted.push((mailbox.clone(), deliveries));
        Ok(mailbox)
    }
}

impl SessionHandler for Receiver {
    fn may_wait(&self) -> bool {
        self.mailboxes.has_next_hops()
    }

    fn receive_message(
        &mut self,
        server: &Server,
        peer: &str,
        secure: Option<&str>,
    ) -> Result<Box<dyn MessageSink>, Reply> {
        let (Some(transaction), Some(message)) = (server.transaction(), &self.mail) else {
            return Err(Reply::new(503, "5.5.1", "Say MAIL first"));
        };
        let (mail, ids) = (&transaction.mail, self.mailboxes.ids());
        let (id, arrived) = (ids.queue_id(), ids.clock().now());
        let received = server.received(peer, secure, &id, arrived);
        let known: Vec<_> = transaction
            .recipients
            .iter()
            .filter_map(|recipient| {
                let (_, deliveries) = self.accepted.iter().find(|(mailbox, _)| *mailbox == recipient.mailbox)?;
                Some((recipient.clone(), deliveries.clone()))
            })
            .collect();
        let mut copies = MessageWriter::default();
        let begun = self.mailboxes.begin_known(&mut copies, &mail.path, &known, &received);
        let begun = begun.map_err(|error| storage_failure_reply(&error))?;
        let envelope = Envelope::new(mail, transaction.recipients.clone(), &id, arrived);
        let mut elsewhere = begun.hop_recipients.iter().flat_map(|(_, recipients)| recipients);
        let asked = elsewhere.any(|recipient| recipient.notify.success());
        let told = self.reporter.as_ref().and_then(|reporter| SuccessDsn::new(reporter, &envelope, &begun, asked));
        self.counters.begin_message(mail.size.unwrap_or(0));
        let mut delivery = IncomingMessage {
            copies,
            maildir_recipients: begun.maildir_recipients,
            hop_recipients: begun.hop_recipients,
            spooled: SpooledContent::default(),
            hops: self.hops.clone(),
            mailboxes: self.mailboxes.clone(),
            retry_queue: self.retry_queue.clone(),
            message: message.clone(),
            envelope,
            provider: server.client_name().unwrap_or_default().to_owned(),
            received_octets: received.len(),
            success_dsn: told,
            counters: self.counters.clone(),
        };
        delivery.spool(received.as_bytes()).map_err(|error| storage_failure_reply(&error))?;
        Ok(Box::new(delivery))
    }
}

/// A message on its way to where its recipients are.
struct IncomingMessage {
    copies: MessageWriter,
    /// Those whom the copies are for.
    maildir_recipients: Vec<Recipient>,
    /// What each next hop shall have.
    hop_recipients: Vec<(NextHop, Vec<Recipient>)>,
    spooled: SpooledContent,
    hops: Arc<Mutex<NextHops>>,
    mailboxes: Arc<Mailboxes>,
    retry_queue: Arc<RetryQueue>,
    message: OutgoingMessage,
    envelope: Envelope,
    /// The name of the client.
    provider: String,
    /// Octets of our own `Received`.
    received_octets: usize,
    success_dsn: Option<SuccessDsn>,
    counters: Arc<CallCounters>,
}

impl IncomingMessage {
    /// Keeps content for next hops.
    fn spool(&mut self, octets: &[u8]) -> io::Result<()> {
        if self.hop_recipients.is_empty() {
            return Ok(());
        }
        let mailboxes = &self.mailboxes;
        self.spooled.write(octets, || {
            let queue = mailboxes.queue();
            queue.maildir(&Shelf::Retry).unnamed_file(&queue.unique())
        })
    }

    /// To all next hops: what each has made of it.
    fn deliver_to_hops(&mut self) -> io::Result<Vec<HopResult>> {
        let front = self.spooled.first_octets().get(self.received_octets..).unwrap_or_default();
        let origin = Header::parse(front).origin(&self.provider);
        let (size, eight_bit) = (self.spooled.size(), self.spooled.eight_bit());
        let mut hops = self.hops.lock().unwrap_or_else(PoisonError::into_inner);
        hops.set_content_deadline();
        let mut handed = Vec::new();
        for (hop, recipients) in std::mem::take(&mut self.hop_recipients) {
            let message = OutgoingMessage { recipients, size, eight_bit, ..self.message.clone() };
            let HopDelivery { recipients: mut statuses, dsn } =
                hops.deliver(&hop, &message, &mut self.spooled, origin.as_ref())?;
            for (recipient, status) in message.recipients.iter().zip(&mut statuses) {
                if matches!(status, RecipientStatus::Rejected(_)) && self.mailboxes.must_accept(&recipient.mailbox) {
                    *status = self.mailboxes.deliver_fallback(&message.from, &recipient.mailbox, &mut self.spooled);
                }
            }
            if let Some(told) = self.success_dsn.as_mut().filter(|_| !dsn) {
                let taken = message.recipients.iter().zip(&statuses);
                let taken = taken.filter(|(_, status)| matches!(status, RecipientStatus::Sent(_)));
                told.others.extend(taken.map(|(recipient, _)| (recipient.clone(), Action::Relayed)));
            }
            for (recipient, status) in message.recipients.iter().zip(&statuses) {
                log::info!(
                    "event=handed-over id={} to=<{}> next-hop={:?} fate={:?}",
                    self.envelope.id,
                    recipient.mailbox,
                    hop.to_string(),
                    reply_text(status)
                );
            }
            handed.push(HopResult { hop, recipients: message.recipients, statuses, dsn });
        }
        Ok(handed)
    }

    /// What others have taken is done; the rest becomes ours.
    fn store_rest(&mut self, handed: Vec<HopResult>) -> io::Result<()> {
        for HopResult { hop, recipients, statuses, dsn } in handed {
            let rest =
                recipients.into_iter().zip(statuses).filter(|(_, status)| !matches!(status, RecipientStatus::Sent(_)));
            let (recipients, statuses): (Vec<_>, Vec<_>) = rest.unzip();
            if recipients.is_empty() {
                continue;
            }
            for (recipient, status) in recipients.iter().zip(&statuses) {
                if let RecipientStatus::Rejected(reply) = status {
                    self.counters.refused(&recipient.mailbox, &hop, reply);
                }
            }
            let envelope = Envelope { recipients, ..self.envelope.clone() };
            self.retry_queue.store(envelope, statuses, &mut self.spooled, HopName { name: &hop.to_string(), dsn })?;
        }
        Ok(())
    }

    /// Next hops have it and our Maildirs could not: it is tried again here.
    fn store_maildir_recipients(&mut self, error: &io::Error) -> io::Result<()> {
        let recipients = std::mem::take(&mut self.maildir_recipients);
        let statuses = vec![RecipientStatus::Deferred(storage_failure_reply(error)); recipients.len()];
        let envelope = Envelope { recipients, ..self.envelope.clone() };
        self.retry_queue.store(envelope, statuses, &mut self.spooled, HopName { name: "maildir", dsn: false })
    }
}

/// What became of the recipients of one next hop.
struct HopResult {
    hop: NextHop,
    recipients: Vec<Recipient>,
    statuses: Vec<RecipientStatus>,
    dsn: bool,
}

fn reply_text(status: &RecipientStatus) -> String {
    match status {
        RecipientStatus::Sent(reply) | RecipientStatus::Deferred(reply) | RecipientStatus::Rejected(reply) => {
            reply.to_string()
        }
        RecipientStatus::InDoubt => "no reply".to_owned(),
    }
}

/// The reply to content that nobody has taken: later, if anybody said later.
fn negative_reply(handed: &[HopResult]) -> Reply {
    let statuses = || handed.iter().flat_map(|handed| &handed.statuses);
    let later = statuses().find_map(|status| match status {
        RecipientStatus::Deferred(reply) => Some(reply.clone()),
        RecipientStatus::InDoubt => Some(Reply::new(451, "4.4.2", "The mail server behind this one has not answered")),
        RecipientStatus::Sent(_) | RecipientStatus::Rejected(_) => None,
    });
    let never = || {
        statuses()
            .find_map(|status| if let RecipientStatus::Rejected(reply) = status { Some(reply.clone()) } else { None })
    };
    later.or_else(never).unwrap_or_else(|| Reply::new(451, "4.3.0", "Nobody has taken the message"))
}

impl MessageSink for IncomingMessage {
    fn write(&mut self, octets: &[u8]) -> io::Result<()> {
        self.counters.add_octets(octets.len());
        if let Some(told) = &mut self.success_dsn {
            told.observe(octets);
        }
        self.spool(octets)?;
        self.copies.write(octets)
    }

    fn commit(mut self: Box<Self>) -> io::Result<Reply> {
        let can_be_here = !self.copies.is_empty();
        // Where some may take it and others not, the rest must find a place.
        let several = self.hop_recipients.iter().map(|(_, recipients)| recipients.len()).sum::<usize>() > 1;
        if several || can_be_here && !self.hop_recipients.is_empty() {
            self.retry_queue.is_ready()?;
        }
        // As good as delivered, so that no next hop takes what is then refused here.
        let copies = std::mem::take(&mut self.copies).prepare()?;
        let handed = if self.hop_recipients.is_empty() { Vec::new() } else { self.deliver_to_hops()? };
        let count = |wanted: fn(&RecipientStatus) -> bool| {
            handed.iter().flat_map(|handed| &handed.statuses).filter(|status| wanted(status)).count()
        };
        let taken = count(|status| matches!(status, RecipientStatus::Sent(_)));
        let open = count(|status| matches!(status, RecipientStatus::Deferred(_) | RecipientStatus::InDoubt));
        let refused = count(|status| matches!(status, RecipientStatus::Rejected(_)));
        // As long as nobody has it, it can stay with the provider; that one also tells its sender of a refusal.
        let can_go_back = taken == 0 && (open > 0 || refused > 0 && !can_be_here);
        if can_go_back {
            let reply = negative_reply(&handed);
            for HopResult { hop, recipients, .. } in &handed {
                recipients.iter().for_each(|recipient| self.counters.refused(&recipient.mailbox, hop, &reply));
            }
            return Ok(reply);
        }
        self.store_rest(handed)?;
        match copies.publish() {
            Err(error) if taken > 0 => self.store_maildir_recipients(&error)?,
            other => drop(other?),
        }
        self.counters.message_done();
        if let Some(told) = &self.success_dsn {
            told.send();
        }
        Ok(Reply::new(250, "2.6.0", format!("OK, id={}", self.envelope.id)))
    }
}

/// What it takes to tell the sender of a delivery.
pub struct SuccessDsn {
    reporter: Reporter,
    envelope: Envelope,
    /// Recipients that others have, who tell nobody.
    others: Vec<(Recipient, Action)>,
    header: Vec<u8>,
}

impl SuccessDsn {
    /// `None`: none of these recipients is to be told of; `elsewhere`: a next hop gets one.
    pub fn new(reporter: &Reporter, envelope: &Envelope, begun: &Routing, elsewhere: bool) -> Option<SuccessDsn> {
        let asked =
            elsewhere || begun.delivered_here.iter().chain(&begun.expanded).any(|recipient| recipient.notify.success());
        asked.then(|| SuccessDsn {
            reporter: reporter.clone(),
            envelope: Envelope { recipients: begun.delivered_here.clone(), ..envelope.clone() },
            others: begun.expanded.iter().map(|recipient| (recipient.clone(), Action::Expanded)).collect(),
            header: Vec::new(),
        })
    }

    /// Content goes by; its header is kept.
    pub fn observe(&mut self, octets: &[u8]) {
        let room = HEADER_LIMIT.saturating_sub(self.header.len());
        self.header.extend_from_slice(&octets[..octets.len().min(room)]);
    }

    /// The mail is there; that its sender does not hear of it would be no reason to refuse it.
    pub fn send(&self) {
        if let Err(error) = self.reporter.report_delivered(&self.envelope, &self.others, &self.header) {
            log::error!("event=notice-failed id={} error={:?}", self.envelope.id, error.to_string());
        }
    }
}
