//! Port 25: the world brings mail for the customers' domains (RFC 5321).
//!
//! Only held domains are served, and the provider's own postmaster; everything else is a relay, and refused
//! (550 5.7.1).

use std::sync::Arc;

use super::{Shared, spool};
use crate::mail::address::{ForwardPath, Mailbox};
use crate::sasl::{CredentialStore, Unavailable};
use crate::session::server::{MessageSink, ServerSession, SessionHandler};
use crate::smtp::command::{MailFrom, Notify};
use crate::smtp::reply::Reply;
use crate::smtp::server::{Server, ServerHandler};

/// One inbound session, up to its end.
pub fn serve(shared: &Arc<Shared>, mut session: ServerSession) -> String {
    session.greet();
    let mut party = InboundHandler { shared: shared.clone() };
    let end = session.run(&mut party);
    session.close();
    end.to_string()
}

struct InboundHandler {
    shared: Arc<Shared>,
}

impl CredentialStore for InboundHandler {
    /// AUTH is not offered here.
    fn secret(&self, _: &str) -> Result<Option<Vec<u8>>, Unavailable> {
        Ok(None)
    }
}

impl ServerHandler for InboundHandler {
    fn sender(&mut self, mail: &MailFrom, _: Option<&str>) -> Result<(), Reply> {
        self.shared.check_room(mail)
    }

    fn recipient(&mut self, path: &ForwardPath, _: &Notify, _: Option<&str>) -> Result<Mailbox, Reply> {
        let mailbox = self.shared.mailbox(path)?;
        match self.shared.router.held_queue(&mailbox) {
            Some(_) => Ok(mailbox),
            None => Err(Reply::new(550, "5.7.1", "Relaying denied: no mail is held here for that domain")),
        }
    }
}

impl SessionHandler for InboundHandler {
    fn receive_message(
        &mut self,
        server: &Server,
        peer: &str,
        secure: Option<&str>,
    ) -> Result<Box<dyn MessageSink>, Reply> {
        spool::store(&self.shared, server, peer, secure, false)
    }
}
