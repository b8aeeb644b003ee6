//! The customer after the turn: an SMTP server whose client is the provider, for our own mailboxes only.
//!
//! Each recipient goes where the rules lead: into Maildirs here, or to a next hop, which is asked before we answer.
//! Content is answered 250 when it is durable in the Maildirs and every next hop has taken it.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use super::handover::{By, Delivered, Handover, NextHops, Scratch};
use super::mailboxes::{Begun, Mailboxes, passed_on};
use super::tally::Tally;
use crate::dsn::Action;
use crate::maildir::Copies;
use crate::outgoing::Desk;
use crate::queue::{Envelope, Place as Shelf};
use crate::rules::{Delivery, NextHop, Place};
use crate::sasl::{Secrets, Unavailable};
use crate::session::{Intake, Party, storage_reply};
use crate::smtp::address::{ForwardPath, Mailbox};
use crate::smtp::client::{Fate, Message};
use crate::smtp::command::{MailFrom, Notify, Recipient};
use crate::smtp::header::Header;
use crate::smtp::reply::{Reply, Severity};
use crate::smtp::server::{Host, Server};

/// A message goes to so many places at once; an alias alone may have a hundred.
const PLACES: usize = 400;

/// Of a longer header no more comes back with a notice.
const HEADER_LIMIT: usize = 64 * 1024;

/// The party behind the turned session.
pub struct Receiver {
    mailboxes: Arc<Mailboxes>,
    handover: Arc<Handover>,
    /// Makes the notices of delivery that a sender asked for.
    desk: Option<Desk>,
    tally: Arc<Tally>,
    hops: Arc<Mutex<NextHops>>,
    mail: Option<Message>,
    /// The recipients of this transaction, and where each goes.
    taken: Vec<(Mailbox, Vec<Delivery>)>,
}

impl Receiver {
    pub fn new(
        mailboxes: Arc<Mailboxes>,
        handover: Arc<Handover>,
        desk: Option<Desk>,
        tally: Arc<Tally>,
        hops: NextHops,
    ) -> Receiver {
        let hops = Arc::new(Mutex::new(hops));
        Receiver { mailboxes, handover, desk, tally, hops, mail: None, taken: Vec::new() }
    }

    /// Every place of a recipient must take him, or nothing of his goes anywhere.
    fn ask(&self, meant: &Recipient, mut deliveries: Vec<Delivery>) -> Result<Vec<Delivery>, (String, Reply)> {
        let Some(message) = &self.mail else { return Ok(deliveries) };
        for delivery in &deliveries {
            let Place::Maildir { path, folders } = &delivery.place else { continue };
            // The others need not wait for one who has no room. (The content may be larger than MAIL said: then they do.)
            let room = self.mailboxes.admits((path, folders), message.size);
            if let Err(error) = room
                && error.kind() == io::ErrorKind::QuotaExceeded
            {
                return Err(("its quota".to_owned(), storage_reply(&error)));
            }
        }
        let many = deliveries.len();
        let mut hops = self.hops.lock().unwrap_or_else(PoisonError::into_inner);
        hops.for_a_recipient();
        let mut refused = None;
        let must_take = self.mailboxes.must_take(&meant.mailbox);
        for delivery in &mut deliveries {
            let Place::NextHop(hop) = &delivery.place else { continue };
            let Err(reply) = hops.ask(hop, message, &passed_on(meant, &delivery.mailbox, many)) else { continue };
            match reply.severity() {
                // RFC 5321 section 4.5.1: postmaster is there, if nowhere else then with us.
                Severity::Permanent if must_take || delivery.fallback => {
                    let path = self.mailboxes.fallback(&delivery.mailbox);
                    delivery.place = Place::Maildir { path, folders: Vec::new() };
                }
                // That one may be taken later counts for more than that another will not.
                Severity::Permanent => drop(refused.get_or_insert((hop.to_string(), reply))),
                _ => return Err((hop.to_string(), reply)),
            }
        }
        refused.map_or(Ok(deliveries), Err)
    }
}

impl Secrets for Receiver {
    /// Nobody authenticates to a customer.
    fn secret(&self, _: &str) -> Result<Option<Vec<u8>>, Unavailable> {
        Ok(None)
    }
}

impl Host for Receiver {
    fn sender(&mut self, mail: &MailFrom, _: Option<&str>) -> Result<(), Reply> {
        self.hops.lock().unwrap_or_else(PoisonError::into_inner).begin();
        self.taken.clear();
        self.mail = Some(Message {
            from: mail.path.clone(),
            recipients: Vec::new(),
            size: mail.size.unwrap_or(0),
            body: mail.body,
            eight_bit: false,
            utf8: mail.utf8,
            ret: mail.ret,
            envelope_id: mail.envelope_id.clone(),
        });
        self.mailboxes.make_room(mail.size.unwrap_or(0))
    }

    fn recipient(&mut self, path: &ForwardPath, notify: &Notify, original: Option<&str>) -> Result<Mailbox, Reply> {
        let refuse = |by: &str, reply: Reply| {
            self.tally.refused(path, by, &reply);
            reply
        };
        let deliveries = self.mailboxes.resolve(path).map_err(|reply| refuse("us", reply))?;
        let mailbox = self.mailboxes.named(path)?;
        let meant =
            Recipient { mailbox: mailbox.clone(), notify: notify.clone(), original: original.map(str::to_owned) };
        // Each place is a file that is open, or a line of an envelope.
        let places: usize = self.taken.iter().map(|(_, deliveries)| deliveries.len()).sum();
        if places > 0 && places + deliveries.len() > PLACES {
            return Err(Reply::new(452, "4.5.3", "Too many mailboxes: send the rest in another transaction"));
        }
        let deliveries = self.ask(&meant, deliveries).map_err(|(hop, reply)| refuse(&hop, reply))?;
        self.taken.push((mailbox.clone(), deliveries));
        Ok(mailbox)
    }
}

impl Party for Receiver {
    fn waits(&self) -> bool {
        self.mailboxes.hands_over()
    }

    fn intake(&mut self, server: &Server, peer: &str, secure: Option<&str>) -> Result<Box<dyn Intake>, Reply> {
        let (Some(transaction), Some(message)) = (server.transaction(), &self.mail) else {
            return Err(Reply::new(503, "5.5.1", "Say MAIL first"));
        };
        let (mail, stamps) = (&transaction.mail, self.mailboxes.stamps());
        let (id, arrived) = (stamps.id(), stamps.now());
        let received = server.received(peer, secure, &id, arrived);
        let known: Vec<_> = transaction
            .recipients
            .iter()
            .filter_map(|recipient| {
                let (_, deliveries) = self.taken.iter().find(|(mailbox, _)| *mailbox == recipient.mailbox)?;
                Some((recipient.clone(), deliveries.clone()))
            })
            .collect();
        let mut copies = Copies::default();
        let begun = self.mailboxes.begin_known(&mut copies, &mail.path, &known, &received);
        let begun = begun.map_err(|error| storage_reply(&error))?;
        let envelope = Envelope::new(mail, transaction.recipients.clone(), &id, arrived);
        let mut elsewhere = begun.parts.iter().flat_map(|(_, recipients)| recipients);
        let asked = elsewhere.any(|recipient| recipient.notify.success());
        let told = self.desk.as_ref().and_then(|desk| Told::new(desk, &envelope, &begun, asked));
        self.tally.begin(mail.size.unwrap_or(0));
        let mut delivery = Arrival {
            copies,
            boxes: begun.boxes,
            parts: begun.parts,
            scratch: Scratch::default(),
            hops: self.hops.clone(),
            mailboxes: self.mailboxes.clone(),
            handover: self.handover.clone(),
            message: message.clone(),
            envelope,
            provider: server.client_name().unwrap_or_default().to_owned(),
            head: received.len(),
            told,
            tally: self.tally.clone(),
        };
        delivery.keep(received.as_bytes()).map_err(|error| storage_reply(&error))?;
        Ok(Box::new(delivery))
    }
}

/// A message on its way to where its recipients are.
struct Arrival {
    copies: Copies,
    /// Those whom the copies are for.
    boxes: Vec<Recipient>,
    /// What each next hop shall have.
    parts: Vec<(NextHop, Vec<Recipient>)>,
    scratch: Scratch,
    hops: Arc<Mutex<NextHops>>,
    mailboxes: Arc<Mailboxes>,
    handover: Arc<Handover>,
    message: Message,
    envelope: Envelope,
    /// The name of the client.
    provider: String,
    /// Octets of our own `Received`.
    head: usize,
    told: Option<Told>,
    tally: Arc<Tally>,
}

impl Arrival {
    /// Keeps content for next hops.
    fn keep(&mut self, octets: &[u8]) -> io::Result<()> {
        if self.parts.is_empty() {
            return Ok(());
        }
        let mailboxes = &self.mailboxes;
        self.scratch.write(octets, || {
            let queue = mailboxes.queue();
            queue.maildir(&Shelf::Handover).scratch(&queue.unique())
        })
    }

    /// To all next hops: what each has made of it.
    fn hand_over(&mut self) -> io::Result<Vec<Handed>> {
        let front = self.scratch.beginning().get(self.head..).unwrap_or_default();
        let origin = Header::parse(front).origin(&self.provider);
        let (size, eight_bit) = (self.scratch.size(), self.scratch.eight_bit());
        let mut hops = self.hops.lock().unwrap_or_else(PoisonError::into_inner);
        hops.for_a_message();
        let mut handed = Vec::new();
        for (hop, recipients) in std::mem::take(&mut self.parts) {
            let message = Message { recipients, size, eight_bit, ..self.message.clone() };
            let Delivered { mut fates, dsn } = hops.deliver(&hop, &message, &mut self.scratch, origin.as_ref())?;
            for (recipient, fate) in message.recipients.iter().zip(&mut fates) {
                if matches!(fate, Fate::Refused(_)) && self.mailboxes.must_take(&recipient.mailbox) {
                    *fate = self.mailboxes.take_in(&message.from, &recipient.mailbox, &mut self.scratch);
                }
            }
            if let Some(told) = self.told.as_mut().filter(|_| !dsn) {
                let taken = message.recipients.iter().zip(&fates);
                let taken = taken.filter(|(_, fate)| matches!(fate, Fate::Delivered(_)));
                told.others.extend(taken.map(|(recipient, _)| (recipient.clone(), Action::Relayed)));
            }
            for (recipient, fate) in message.recipients.iter().zip(&fates) {
                log::info!(
                    "event=handed-over id={} to=<{}> next-hop={:?} fate={:?}",
                    self.envelope.id,
                    recipient.mailbox,
                    hop.to_string(),
                    word(fate)
                );
            }
            handed.push(Handed { hop, recipients: message.recipients, fates, dsn });
        }
        Ok(handed)
    }

    /// What others have taken is done; the rest becomes ours.
    fn keep_rest(&mut self, handed: Vec<Handed>) -> io::Result<()> {
        for Handed { hop, recipients, fates, dsn } in handed {
            let rest = recipients.into_iter().zip(fates).filter(|(_, fate)| !matches!(fate, Fate::Delivered(_)));
            let (recipients, fates): (Vec<_>, Vec<_>) = rest.unzip();
            if recipients.is_empty() {
                continue;
            }
            for (recipient, fate) in recipients.iter().zip(&fates) {
                if let Fate::Refused(reply) = fate {
                    self.tally.refused(&recipient.mailbox, &hop, reply);
                }
            }
            let envelope = Envelope { recipients, ..self.envelope.clone() };
            self.handover.keep(envelope, fates, &mut self.scratch, By { name: &hop.to_string(), dsn })?;
        }
        Ok(())
    }

    /// Next hops have it and our Maildirs could not: it is tried again here.
    fn keep_boxes(&mut self, error: &io::Error) -> io::Result<()> {
        let recipients = std::mem::take(&mut self.boxes);
        let fates = vec![Fate::Deferred(storage_reply(error)); recipients.len()];
        let envelope = Envelope { recipients, ..self.envelope.clone() };
        self.handover.keep(envelope, fates, &mut self.scratch, By { name: "maildir", dsn: false })
    }
}

/// What became of the recipients of one next hop.
struct Handed {
    hop: NextHop,
    recipients: Vec<Recipient>,
    fates: Vec<Fate>,
    dsn: bool,
}

fn word(fate: &Fate) -> String {
    match fate {
        Fate::Delivered(reply) | Fate::Deferred(reply) | Fate::Refused(reply) => reply.to_string(),
        Fate::InDoubt => "no reply".to_owned(),
    }
}

/// The reply to content that nobody has taken: later, if anybody said later.
fn nobody(handed: &[Handed]) -> Reply {
    let fates = || handed.iter().flat_map(|handed| &handed.fates);
    let later = fates().find_map(|fate| match fate {
        Fate::Deferred(reply) => Some(reply.clone()),
        Fate::InDoubt => Some(Reply::new(451, "4.4.2", "The mail server behind this one has not answered")),
        Fate::Delivered(_) | Fate::Refused(_) => None,
    });
    let never = || fates().find_map(|fate| if let Fate::Refused(reply) = fate { Some(reply.clone()) } else { None });
    later.or_else(never).unwrap_or_else(|| Reply::new(451, "4.3.0", "Nobody has taken the message"))
}

impl Intake for Arrival {
    fn write(&mut self, octets: &[u8]) -> io::Result<()> {
        self.tally.come(octets.len());
        if let Some(told) = &mut self.told {
            told.see(octets);
        }
        self.keep(octets)?;
        self.copies.write(octets)
    }

    fn commit(mut self: Box<Self>) -> io::Result<Reply> {
        let can_be_here = !self.copies.is_empty();
        // Where some may take it and others not, the rest must find a place.
        let several = self.parts.iter().map(|(_, recipients)| recipients.len()).sum::<usize>() > 1;
        if several || can_be_here && !self.parts.is_empty() {
            self.handover.is_ready()?;
        }
        // As good as delivered, so that no next hop takes what is then refused here.
        let copies = std::mem::take(&mut self.copies).prepare()?;
        let handed = if self.parts.is_empty() { Vec::new() } else { self.hand_over()? };
        let count = |wanted: fn(&Fate) -> bool| {
            handed.iter().flat_map(|handed| &handed.fates).filter(|fate| wanted(fate)).count()
        };
        let taken = count(|fate| matches!(fate, Fate::Delivered(_)));
        let open = count(|fate| matches!(fate, Fate::Deferred(_) | Fate::InDoubt));
        let refused = count(|fate| matches!(fate, Fate::Refused(_)));
        // As long as nobody has it, it can stay with the provider; that one also tells its sender of a refusal.
        let can_go_back = taken == 0 && (open > 0 || refused > 0 && !can_be_here);
        if can_go_back {
            let reply = nobody(&handed);
            for Handed { hop, recipients, .. } in &handed {
                recipients.iter().for_each(|recipient| self.tally.refused(&recipient.mailbox, hop, &reply));
            }
            return Ok(reply);
        }
        self.keep_rest(handed)?;
        match copies.publish() {
            Err(error) if taken > 0 => self.keep_boxes(&error)?,
            other => drop(other?),
        }
        self.tally.taken();
        if let Some(told) = &self.told {
            told.tell();
        }
        Ok(Reply::new(250, "2.6.0", format!("OK, id={}", self.envelope.id)))
    }
}

/// What it takes to tell the sender of a delivery.
pub struct Told {
    desk: Desk,
    envelope: Envelope,
    /// Recipients that others have, who tell nobody.
    others: Vec<(Recipient, Action)>,
    header: Vec<u8>,
}

impl Told {
    /// `None`: none of these recipients is to be told of; `elsewhere`: a next hop gets one.
    pub fn new(desk: &Desk, envelope: &Envelope, begun: &Begun, elsewhere: bool) -> Option<Told> {
        let asked = elsewhere || begun.here.iter().chain(&begun.expanded).any(|recipient| recipient.notify.success());
        asked.then(|| Told {
            desk: desk.clone(),
            envelope: Envelope { recipients: begun.here.clone(), ..envelope.clone() },
            others: begun.expanded.iter().map(|recipient| (recipient.clone(), Action::Expanded)).collect(),
            header: Vec::new(),
        })
    }

    /// Content goes by; its header is kept.
    pub fn see(&mut self, octets: &[u8]) {
        let room = HEADER_LIMIT.saturating_sub(self.header.len());
        self.header.extend_from_slice(&octets[..octets.len().min(room)]);
    }

    /// The mail is there; that its sender does not hear of it would be no reason to refuse it.
    pub fn tell(&self) {
        if let Err(error) = self.desk.delivered(&self.envelope, &self.others, &self.header) {
            log::error!("event=notice-failed id={} error={:?}", self.envelope.id, error.to_string());
        }
    }
}
