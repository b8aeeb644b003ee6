//! Port 25: mail from the Internet for the customers' domains (RFC 5321).
//!
//! The provider accepts mail for held domains and for its own postmaster. Any other recipient gets 550 5.7.1: an open relay
//! would be abused for spam.

use std::sync::Arc;

use super::accept::{self, HeaderPolicy, HeldQueues};
use super::reload::Reloader;
use super::shared::Shared;
use crate::mail::address::{ForwardPath, Mailbox};
use crate::session::server::ServerSession;
use crate::smtp::command::{Envelope, MailFrom, Notify};
use crate::smtp::reply::Reply;
use crate::smtp::server::{Incoming, MessageSink, SessionHandler, check_held_domain};

/// Serves one session until it ends. Returns the reason of its end, for the log.
pub fn serve(reloader: &Reloader, mut session: Box<ServerSession>) -> String {
    session.greet();
    let end = session.run(&mut InboundHandler { reloader, shared: reloader.current(), held: HeldQueues::default() });
    session.close();
    end.to_string()
}

/// Decides which mail from the Internet is accepted.
struct InboundHandler<'a> {
    reloader: &'a Reloader,
    /// The state that the current transaction began with.
    shared: Arc<Shared>,
    held: HeldQueues,
}

impl SessionHandler for InboundHandler<'_> {
    fn sender(&mut self, mail: &MailFrom, _: Option<&str>) -> Result<(), Reply> {
        (self.shared, self.held) = (self.reloader.current(), HeldQueues::begin(mail));
        self.shared.check_room(mail)
    }

    fn recipient(&mut self, path: &ForwardPath, _: &Notify, _: Option<&str>) -> Result<Mailbox, Reply> {
        let mailbox = self.shared.mailbox(path)?;
        if let Some(queue) = self.shared.spool.held_queue(&mailbox) {
            return self.held.add(&self.shared, &mailbox, queue);
        }
        mailbox.domain().map_or(Ok(()), |domain| self.shared.spool.check_not_skipped(domain))?;
        check_held_domain(&mailbox)?;
        Err(Reply::new(550, "5.7.1", "Relaying denied: no mail is held here for that domain"))
    }

    fn receive(&mut self, envelope: &Envelope, incoming: &Incoming<'_>) -> Result<Box<dyn MessageSink>, Reply> {
        accept::store(&self.shared, envelope, incoming, HeaderPolicy::Keep, None)
    }
}
