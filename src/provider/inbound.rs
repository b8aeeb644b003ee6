//! Port 25: the world sends mail for the customers' domains (RFC 5321).
//!
//! Only held domains and the provider's own postmaster are served. Anything else would be relaying, and is rejected
//! (550 5.7.1).

use std::sync::Arc;

use super::accept::{self, HeaderPolicy};
use super::shared::Shared;
use crate::mail::address::{ForwardPath, Mailbox};
use crate::session::server::ServerSession;
use crate::smtp::command::{Envelope, MailFrom, Notify};
use crate::smtp::reply::Reply;
use crate::smtp::server::{Incoming, MessageSink, SessionHandler};

/// One session, up to its end; returns how it ended.
pub fn serve(shared: &Arc<Shared>, mut session: ServerSession) -> String {
    session.greet();
    let mut handler = InboundHandler { shared: shared.clone() };
    let end = session.run(&mut handler);
    session.close();
    end.to_string()
}

struct InboundHandler {
    shared: Arc<Shared>,
}

impl SessionHandler for InboundHandler {
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

    fn receive(&mut self, envelope: &Envelope, incoming: &Incoming<'_>) -> Result<Box<dyn MessageSink>, Reply> {
        accept::store(&self.shared, envelope, incoming, HeaderPolicy::Keep)
    }
}
