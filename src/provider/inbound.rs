//! Port 25: the world brings mail for the customers' domains (RFC 5321).
//!
//! Only held domains are served; everything else is a relay, and refused (550 5.7.1). A message for
//! several customers becomes a file for each domain, all of them durable before the one 250.

use std::io;
use std::sync::Arc;

use super::Shared;
use crate::maildir::Copies;
use crate::queue::{Envelope, Place};
use crate::sasl::{Secrets, Unavailable};
use crate::session::{End, Intake, Party, Session, storage_reply};
use crate::smtp::address::{Domain, ForwardPath, Mailbox};
use crate::smtp::command::MailFrom;
use crate::smtp::reply::Reply;
use crate::smtp::server::{Host, Server};

/// One inbound session, up to its end.
pub fn serve(shared: &Arc<Shared>, mut session: Session) -> String {
    session.greet();
    let mut party = Inbound { shared: shared.clone() };
    let end = session.run(&mut party);
    session.close();
    match end {
        End::Quit => "quit".to_owned(),
        End::Closed(why) => why,
        End::Atrn(_) => "ATRN has no place here".to_owned(),
    }
}

struct Inbound {
    shared: Arc<Shared>,
}

impl Inbound {
    /// Where mail for a mailbox is put.
    fn place(&self, mailbox: &Mailbox) -> Option<Place> {
        let domain = mailbox.domain()?;
        if self.shared.config.accounts.owner(domain).is_some() {
            return Some(Place::Domain(domain.clone()));
        }
        // RFC 5321 section 4.5.1: there is a postmaster wherever there is a server.
        let own = Domain::parse(&self.shared.config.hostname).as_ref() == Some(domain);
        (own && mailbox.local().eq_ignore_ascii_case("postmaster")).then_some(Place::Postmaster)
    }
}

impl Secrets for Inbound {
    /// AUTH is not offered here.
    fn secret(&self, _: &str) -> Result<Option<Vec<u8>>, Unavailable> {
        Ok(None)
    }
}

impl Host for Inbound {
    fn sender(&mut self, mail: &MailFrom) -> Result<(), Reply> {
        if self.shared.queue.has_room(mail.size.unwrap_or(0)) {
            return Ok(());
        }
        Err(Reply::new(452, "4.3.1", "The disk is full, try again later"))
    }

    fn recipient(&mut self, path: &ForwardPath) -> Result<Mailbox, Reply> {
        let mailbox = match path {
            ForwardPath::Mailbox(mailbox) => mailbox.clone(),
            ForwardPath::Postmaster => Mailbox::parse(&format!("postmaster@{}", self.shared.config.hostname))
                .ok_or_else(|| Reply::new(550, "5.1.1", "There is no postmaster here"))?,
        };
        match self.place(&mailbox) {
            Some(_) => Ok(mailbox),
            None => Err(Reply::new(550, "5.7.1", "Relaying denied: no mail is held here for that domain")),
        }
    }
}

impl Party for Inbound {
    fn intake(&mut self, server: &Server, peer: &str, secure: Option<&str>) -> Result<Box<dyn Intake>, Reply> {
        let Some(transaction) = server.transaction() else {
            return Err(Reply::new(503, "5.5.1", "Say MAIL first"));
        };
        let shared = &self.shared;
        let (id, arrived) = (shared.stamps.id(), shared.stamps.now());
        let mut copies: Vec<(Place, Envelope)> = Vec::new();
        for recipient in &transaction.recipients {
            let Some(place) = self.place(recipient) else { continue };
            if let Some((_, envelope)) = copies.iter_mut().find(|(other, _)| *other == place) {
                envelope.recipients.push(recipient.clone());
                continue;
            }
            let envelope = Envelope {
                from: transaction.mail.path.clone(),
                recipients: vec![recipient.clone()],
                id: id.clone(),
                arrived,
                body: transaction.mail.body,
                utf8: transaction.mail.utf8,
            };
            copies.push((place, envelope));
        }
        let received = server.received(peer, secure, &id, arrived);
        let copies = shared.queue.put(&copies, &received).map_err(|error| storage_reply(&error))?;
        Ok(Box::new(Stored { copies, id }))
    }
}

/// A message on its way into the queue.
struct Stored {
    copies: Copies,
    id: String,
}

impl Intake for Stored {
    fn write(&mut self, octets: &[u8]) -> io::Result<()> {
        self.copies.write(octets)
    }

    fn commit(self: Box<Self>) -> io::Result<Reply> {
        self.copies.commit()?;
        Ok(Reply::new(250, "2.6.0", format!("OK, id={}", self.id)))
    }
}
