//! The customer's own users and programs hand in mail by SMTP: `odmr send -bs`, and the listener of `pull --daemon`.
//!
//! Whoever may speak here may send from any address to any address; there is no AUTH and no TLS, so only this machine
//! and the networks that the configuration names are let in. What comes goes into the [`Outbox`].

use std::io;
use std::sync::Arc;

use super::outbox::{Outbox, Outgoing, Stored};
use crate::config::Customer;
use crate::sasl::{Secrets, Unavailable};
use crate::session::{Bounds, Intake, Party, Session, storage_reply};
use crate::smtp::address::{ForwardPath, Mailbox};
use crate::smtp::command::{MailFrom, Notify};
use crate::smtp::reply::Reply;
use crate::smtp::server::{Host, Profile, Role, Server};
use crate::wire::{Stop, Wire};

/// One session, up to its end; says how it ended. `peer`: who is there, for `Received`.
pub fn serve(config: &Customer, outbox: &Arc<Outbox>, wire: Wire, peer: String, stop: &Stop, halt: &Stop) -> String {
    let profile = Profile {
        role: Role::Local,
        hostname: config.hostname.clone(),
        max_size: outbox.config().max_size,
        max_recipients: config.limits.recipients,
        max_errors: config.limits.errors,
        max_auth_failures: config.limits.auth_failures,
        starttls: false,
        require_tls: false,
        dsn: true,
        mechanisms: Vec::new(),
        stamps: outbox.stamps().clone(),
    };
    let bounds = Bounds::new(&config.timeouts, &config.limits, stop, halt);
    let mut session = Session::new(wire, Server::new(profile, false), peer, None, bounds);
    session.greet();
    let end = session.run(&mut Local { outbox: outbox.clone() });
    session.close();
    end.to_string()
}

struct Local {
    outbox: Arc<Outbox>,
}

impl Secrets for Local {
    /// AUTH is not offered here.
    fn secret(&self, _: &str) -> Result<Option<Vec<u8>>, Unavailable> {
        Ok(None)
    }
}

impl Host for Local {
    fn sender(&mut self, mail: &MailFrom, _: Option<&str>) -> Result<(), Reply> {
        self.outbox.make_room(mail.size.unwrap_or(0))
    }

    fn recipient(&mut self, path: &ForwardPath, _: &Notify, _: Option<&str>) -> Result<Mailbox, Reply> {
        self.outbox.recipient(path)
    }
}

impl Party for Local {
    fn intake(&mut self, server: &Server, peer: &str, secure: Option<&str>) -> Result<Box<dyn Intake>, Reply> {
        let Some(transaction) = server.transaction() else {
            return Err(Reply::new(503, "5.5.1", "Say MAIL first"));
        };
        let stamps = self.outbox.stamps();
        let (id, arrived) = (stamps.id(), stamps.now());
        let received = server.received(peer, secure, &id, arrived);
        let letter = Outgoing {
            mail: &transaction.mail,
            recipients: &transaction.recipients,
            id: &id,
            arrived,
            // A program that speaks SMTP writes its own header (RFC 6409 section 8.1); `Bcc` is its affair too.
            header_from: None,
            drop_bcc: false,
        };
        let stored = self.outbox.store(&letter, &received).map_err(|error| storage_reply(&error))?;
        Ok(Box::new(Letter { stored, outbox: self.outbox.clone(), id }))
    }
}

/// A message on its way into the outbox.
struct Letter {
    stored: Stored,
    outbox: Arc<Outbox>,
    id: String,
}

impl Intake for Letter {
    fn write(&mut self, octets: &[u8]) -> io::Result<()> {
        self.stored.write(octets)
    }

    fn commit(self: Box<Self>) -> io::Result<Reply> {
        if self.stored.commit()? {
            self.outbox.hand_over();
        }
        Ok(Reply::new(250, "2.6.0", format!("OK, id={}", self.id)))
    }
}
