//! Submission by the customer's own users and programs over SMTP: `odmr send -bs`, and the listener of `pull --daemon`.
//!
//! A client here may send from any address to any address. There is no AUTH and no TLS, so only this machine and the
//! networks that the configuration names are accepted. Messages go into the [`Outbox`].

use std::io;
use std::sync::Arc;

use super::outbox::{Outbox, Submission, SubmissionWriter};
use crate::config::CustomerConfig;
use crate::mail::address::{ForwardPath, Mailbox};
use crate::net::cancel::CancelToken;
use crate::net::connection::Connection;
use crate::session::server::{ServerSession, SessionLimits};
use crate::session::storage_failure_reply;
use crate::smtp::command::{Envelope, MailFrom, Notify};
use crate::smtp::reply::Reply;
use crate::smtp::server::{Incoming, MessageSink, Server, ServerRole, SessionHandler};

/// One session, up to its end; returns how it ended. `peer`: the client, for `Received`.
pub fn serve(
    config: &CustomerConfig, outbox: &Arc<Outbox>, connection: Connection, peer: String, cancel: &CancelToken,
    abort: &CancelToken,
) -> String {
    let options = config.limits.server_options(ServerRole::Submission, &config.hostname, outbox.config().max_size);
    let limits = SessionLimits::new(&config.timeouts, &config.limits, cancel, abort);
    let mut session = ServerSession::new(connection, Server::new(options, false), peer, None, limits);
    session.greet();
    let end = session.run(&mut SubmissionHandler { outbox: outbox.clone() });
    session.close();
    end.to_string()
}

struct SubmissionHandler {
    outbox: Arc<Outbox>,
}

impl SessionHandler for SubmissionHandler {
    fn sender(&mut self, mail: &MailFrom, _: Option<&str>) -> Result<(), Reply> {
        self.outbox.check_room(mail.size.unwrap_or(0))
    }

    fn recipient(&mut self, path: &ForwardPath, _: &Notify, _: Option<&str>) -> Result<Mailbox, Reply> {
        self.outbox.recipient(path)
    }

    fn receive(&mut self, envelope: &Envelope, incoming: &Incoming<'_>) -> Result<Box<dyn MessageSink>, Reply> {
        let ids = self.outbox.ids();
        let (id, arrived) = (ids.queue_id(), ids.clock().now());
        let received = incoming.received.field(&id, &arrived.rfc5322());
        let submission = Submission {
            envelope,
            size: incoming.size,
            id: &id,
            arrived,
            // A program that speaks SMTP writes its own header, `Bcc` included (RFC 6409 section 8.1).
            header_from: None,
            drop_bcc: false,
        };
        let writer = self.outbox.store(&submission, &received).map_err(|error| storage_failure_reply(&error))?;
        Ok(Box::new(SubmittedMessage { writer, outbox: self.outbox.clone(), id }))
    }
}

/// A message on its way into the outbox.
struct SubmittedMessage {
    writer: SubmissionWriter,
    outbox: Arc<Outbox>,
    id: String,
}

impl SubmittedMessage {
    fn finish(self) -> io::Result<String> {
        if self.writer.commit()? {
            self.outbox.wake_retries();
        }
        Ok(self.id)
    }
}

impl MessageSink for SubmittedMessage {
    fn write(&mut self, octets: &[u8]) -> Result<(), Reply> {
        self.writer.write(octets).map_err(|error| storage_failure_reply(&error))
    }

    fn commit(self: Box<Self>) -> Result<String, Reply> {
        self.finish().map_err(|error| storage_failure_reply(&error))
    }
}
