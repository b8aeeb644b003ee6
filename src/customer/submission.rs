//! The customer's own users and programs hand in mail by SMTP: `odmr send -bs`, and the listener of `pull --daemon`.
//!
//! Whoever may speak here may send from any address to any address; there is no AUTH and no TLS, so only this machine
//! and the networks that the configuration names are let in. What comes goes into the [`Outbox`].

use std::io;
use std::sync::Arc;

use super::outbox::{Outbox, Submission, SubmissionWriter};
use crate::config::CustomerConfig;
use crate::mail::address::{ForwardPath, Mailbox};
use crate::net::connection::{CancelToken, Connection};
use crate::sasl::{CredentialStore, Unavailable};
use crate::session::server::{MessageSink, ServerSession, SessionHandler, SessionLimits, storage_failure_reply};
use crate::smtp::command::{MailFrom, Notify};
use crate::smtp::reply::Reply;
use crate::smtp::server::{Server, ServerHandler, ServerOptions, ServerRole};

/// One session, up to its end; says how it ended. `peer`: who is there, for `Received`.
pub fn serve(
    config: &CustomerConfig,
    outbox: &Arc<Outbox>,
    connection: Connection,
    peer: String,
    cancel: &CancelToken,
    abort: &CancelToken,
) -> String {
    let profile = ServerOptions {
        role: ServerRole::Submission,
        hostname: config.hostname.clone(),
        max_size: outbox.config().max_size,
        max_recipients: config.limits.recipients,
        max_errors: config.limits.errors,
        max_auth_failures: config.limits.auth_failures,
        starttls: false,
        require_tls: false,
        dsn: true,
        mechanisms: Vec::new(),
        ids: outbox.ids().clone(),
    };
    let limits = SessionLimits::new(&config.timeouts, &config.limits, cancel, abort);
    let mut session = ServerSession::new(connection, Server::new(profile, false), peer, None, limits);
    session.greet();
    let end = session.run(&mut SubmissionHandler { outbox: outbox.clone() });
    session.close();
    end.to_string()
}

struct SubmissionHandler {
    outbox: Arc<Outbox>,
}

impl CredentialStore for SubmissionHandler {
    /// AUTH is not offered here.
    fn secret(&self, _: &str) -> Result<Option<Vec<u8>>, Unavailable> {
        Ok(None)
    }
}

impl ServerHandler for SubmissionHandler {
    fn sender(&mut self, mail: &MailFrom, _: Option<&str>) -> Result<(), Reply> {
        self.outbox.check_room(mail.size.unwrap_or(0))
    }

    fn recipient(&mut self, path: &ForwardPath, _: &Notify, _: Option<&str>) -> Result<Mailbox, Reply> {
        self.outbox.recipient(path)
    }
}

impl SessionHandler for SubmissionHandler {
    fn receive_message(
        &mut self,
        server: &Server,
        peer: &str,
        secure: Option<&str>,
    ) -> Result<Box<dyn MessageSink>, Reply> {
        let Some(transaction) = server.transaction() else {
            return Err(Reply::new(503, "5.5.1", "Say MAIL first"));
        };
        let ids = self.outbox.ids();
        let (id, arrived) = (ids.queue_id(), ids.clock().now());
        let received = server.received(peer, secure, &id, arrived);
        let letter = Submission {
            mail: &transaction.mail,
            recipients: &transaction.recipients,
            id: &id,
            arrived,
            // A program that speaks SMTP writes its own header (RFC 6409 section 8.1); `Bcc` is its affair too.
            header_from: None,
            drop_bcc: false,
        };
        let stored = self.outbox.store(&letter, &received).map_err(|error| storage_failure_reply(&error))?;
        Ok(Box::new(SubmittedMessage { stored, outbox: self.outbox.clone(), id }))
    }
}

/// A message on its way into the outbox.
struct SubmittedMessage {
    stored: SubmissionWriter,
    outbox: Arc<Outbox>,
    id: String,
}

impl MessageSink for SubmittedMessage {
    fn write(&mut self, octets: &[u8]) -> io::Result<()> {
        self.stored.write(octets)
    }

    fn commit(self: Box<Self>) -> io::Result<Reply> {
        if self.stored.commit()? {
            self.outbox.wake_retries();
        }
        Ok(Reply::new(250, "2.6.0", format!("OK, id={}", self.id)))
    }
}
