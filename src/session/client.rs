//! The driver of the SMTP client role where waiting is allowed: one session over one connection, for a thread that has
//! nothing else to do. The customer before the turn, submission and the relay use it.
//!
//! Replies are read while content is being written, so two peers that send at once do not block each other.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use super::{ContentOutput, ReplyInput, Timeouts, send_commands};
use crate::mail::address::Domain;
use crate::mail::received::ClientInfo;
use crate::net::cancel::CancelToken;
use crate::net::connection::{self, Connection, Filled, WaitResult};
use crate::net::tls::ClientTls;
use crate::net::trace::Trace;
use crate::queue::{QueueLock, QueuedMessage};
use crate::smtp::client::{Abort, Awaiting, Client, ClientOptions, ClientStep, OutgoingMessage, Rejection};
use crate::smtp::command::Recipient;
use crate::smtp::reply::Reply;
use crate::smtp::status::{DeliveryResult, connection_lost, ends_session};

/// After this many messages in a row whose MAIL was rejected no more are tried.
const MAIL_REJECTION_LIMIT: usize = 3;

/// How long the session waits for the reply to QUIT.
const QUIT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a session cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionFailure {
    /// The peer rejects or lacks something that the session needs.
    Aborted(Abort),
    /// The peer breaks the protocol, or its certificate is not accepted.
    Broken(String),
    /// The connection was lost, or was too slow, in the TLS handshake.
    NoTls(String),
    /// The host name has no address.
    NoHost(String),
    /// No connection to the host.
    Unreachable(String),
    /// The connection was lost, or was too slow.
    Lost(String),
    /// The session was cancelled.
    Cancelled,
}

impl fmt::Display for SessionFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SessionFailure::Aborted(Abort::Rejected(Rejection { stage, reply })) => {
                write!(f, "{stage} was rejected: {reply}")
            }
            SessionFailure::Aborted(Abort::NoAtrn) => f.write_str("ATRN was not offered"),
            SessionFailure::Aborted(Abort::NoStartTls) => f.write_str("STARTTLS is required and was not offered"),
            SessionFailure::Aborted(Abort::NoMechanism) => {
                f.write_str("no authentication was offered that can be used: CRAM-MD5, or PLAIN under TLS")
            }
            SessionFailure::Aborted(Abort::Unproven) => f.write_str("the peer did not prove that it knows the secret"),
            SessionFailure::Broken(text)
            | SessionFailure::NoTls(text)
            | SessionFailure::NoHost(text)
            | SessionFailure::Unreachable(text)
            | SessionFailure::Lost(text) => f.write_str(text),
            SessionFailure::Cancelled => f.write_str("stopped"),
        }
    }
}

fn lost(error: io::Error) -> SessionFailure {
    SessionFailure::Lost(format!("the connection was lost: {error}"))
}

/// Acts on the result of each message.
pub type Settle<'a> = dyn FnMut(QueuedMessage, DeliveryResult, &Client, &mut QueueLock) + 'a;

/// A session.
pub struct ClientSession {
    connection: Connection,
    client: Client,
    replies: ReplyInput,
    timeouts: Timeouts,
    cancel: CancelToken,
    /// Whatever is waited for, not longer than this.
    limit: Option<Instant>,
    /// We were told to stop behind a message's content: so long its reply is waited for.
    grace: Option<(Instant, CancelToken)>,
}

impl ClientSession {
    pub fn new(
        connection: Connection, options: ClientOptions, timeouts: &Timeouts, cancel: &CancelToken,
    ) -> ClientSession {
        ClientSession {
            connection,
            client: Client::new(options),
            replies: ReplyInput::default(),
            timeouts: timeouts.clone(),
            cancel: cancel.clone(),
            limit: None,
            grace: None,
        }
    }

    /// From now on nothing is waited for beyond this moment.
    pub fn limit(&mut self, limit: Option<Instant>) {
        self.limit = limit;
    }

    /// The end of a wait that begins now.
    fn deadline_within(&self, patience: Duration) -> Instant {
        let end = Instant::now() + patience;
        self.limit.map_or(end, |limit| limit.min(end))
    }

    /// The id of the session in the log.
    pub fn id(&self) -> &str {
        &self.connection.trace.id
    }

    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Begins TLS; `name`: what the peer's certificate must be for.
    pub fn begin_tls(&mut self, tls: &ClientTls, name: &str) -> Result<(), SessionFailure> {
        let deadline = self.deadline_within(self.timeouts.handshake);
        self.connection.start_tls_client(tls, name, deadline).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => SessionFailure::Broken(error.to_string()),
            _ => SessionFailure::NoTls(format!("TLS did not come about: {error}")),
        })?;
        self.connection.trace.event("tls");
        Ok(())
    }

    /// Greeting, EHLO, TLS and AUTH: up to where mail or ATRN may follow.
    pub fn handshake(&mut self, tls: Option<(&ClientTls, &str)>) -> Result<(), SessionFailure> {
        loop {
            match self.next_step()? {
                ClientStep::Ready => return Ok(()),
                ClientStep::StartTls => {
                    let Some((tls, name)) = tls else {
                        return Err(SessionFailure::Broken("TLS is not configured".to_owned()));
                    };
                    self.begin_tls(tls, name)?;
                    let mut commands = Vec::new();
                    self.client.tls_started(&mut commands);
                    self.send(&commands);
                }
                _ => {}
            }
        }
    }

    /// Sends all messages that the lock offers. Each of them is given to `settle`, whatever happens.
    pub fn send_queue(&mut self, lock: &mut QueueLock, settle: &mut Settle<'_>) -> Result<(), SessionFailure> {
        let mut under_way = VecDeque::new();
        let delivered = self.send_each(lock, &mut under_way, settle);
        if let Err(failure) = &delivered {
            let reply = connection_lost(failure.to_string());
            for (message, result) in under_way.into_iter().zip(self.client.abandon(&reply)) {
                settle(message, result, &self.client, lock);
            }
        }
        delivered
    }

    fn send_each(
        &mut self, lock: &mut QueueLock, under_way: &mut VecDeque<QueuedMessage>, settle: &mut Settle<'_>,
    ) -> Result<(), SessionFailure> {
        let (mut more, mut rejections) = (true, 0);
        loop {
            while more && self.client.is_ready_for_message() && !self.cancel.is_cancelled() {
                let Some(message) = lock.next_message() else {
                    more = false;
                    break;
                };
                if let Err(failure) = self.reject_unsolicited() {
                    let result = DeliveryResult::lost(failure.to_string(), message.envelope.recipients.len());
                    settle(message, result, &self.client, lock);
                    return Err(failure);
                }
                let mut commands = Vec::new();
                match self.client.send_message(message.outgoing_message(), &mut commands) {
                    Ok(()) => under_way.push_back(message),
                    Err(result) => settle(message, result, &self.client, lock),
                }
                self.send(&commands);
            }
            if self.client.in_flight() == 0 {
                // After a 421 nothing more is sent.
                return match self.client.closing() {
                    true => Err(SessionFailure::Lost("the peer shuts down".to_owned())),
                    false if self.cancel.is_cancelled() => Err(SessionFailure::Cancelled),
                    false => Ok(()),
                };
            }
            match self.next_step()? {
                ClientStep::Content { chunk } => {
                    if let Some(message) = under_way.front_mut() {
                        let size = message.size;
                        self.send_content(message, size, chunk)?;
                    }
                }
                ClientStep::MessageDone(result) => {
                    if let Some(message) = under_way.pop_front() {
                        // If the peer accepts no mail at all, the rest need not be tried; but a rejected sender says
                        // nothing about the others.
                        rejections = match result.no_mail_accepted().map(Reply::code) {
                            Some(550) => rejections + 1,
                            Some(_) => MAIL_REJECTION_LIMIT,
                            None => 0,
                        };
                        more &= rejections < MAIL_REJECTION_LIMIT;
                        settle(message, result, &self.client, lock);
                    }
                }
                _ => {}
            }
        }
    }

    /// Opens a transaction whose recipients follow one by one; returns the peer's reply to MAIL.
    pub fn begin_transaction(&mut self, message: &OutgoingMessage) -> Result<Reply, SessionFailure> {
        self.reject_unsolicited()?;
        let mut commands = Vec::new();
        let asked = self.client.begin_transaction(message, &mut commands);
        self.await_reply(asked, &commands)
    }

    /// Adds a recipient to that transaction; returns the peer's reply.
    pub fn add_recipient(&mut self, recipient: &Recipient) -> Result<Reply, SessionFailure> {
        self.reject_unsolicited()?;
        let mut commands = Vec::new();
        let asked = self.client.add_recipient(recipient, &mut commands);
        self.await_reply(asked, &commands)
    }

    fn await_reply(&mut self, asked: Result<(), Reply>, commands: &[u8]) -> Result<Reply, SessionFailure> {
        if let Err(reply) = asked {
            return Ok(reply);
        }
        self.send(commands);
        loop {
            if let ClientStep::Replied(reply) = self.next_step()? {
                return Ok(reply);
            }
        }
    }

    /// Aborts the transaction that [`ClientSession::begin_transaction`] has opened.
    pub fn abort_transaction(&mut self) {
        let mut commands = Vec::new();
        self.client.abort_transaction(&mut commands);
        self.send(&commands);
    }

    /// Tells the peer which client gave the next message to the host that gave it to us, if the peer wants to know.
    pub fn send_client_info(&mut self, info: &ClientInfo) -> Result<(), SessionFailure> {
        self.reject_unsolicited()?;
        let mut commands = Vec::new();
        let awaited = self.client.send_client_info(info, &mut commands);
        self.send(&commands);
        while awaited && !matches!(self.next_step()?, ClientStep::Ready) {}
        Ok(())
    }

    /// Sends the content of that transaction, `size` octets on the wire. Returns a status for each recipient that was
    /// accepted. After a failure the session is over.
    pub fn send_data(&mut self, content: &mut dyn Read, size: u64) -> DeliveryResult {
        if let Err(failure) = self.reject_unsolicited() {
            return self.abandon(&failure);
        }
        let mut commands = Vec::new();
        let step = self.client.send_data(size, &mut commands);
        self.send(&commands);
        self.finish_transaction(step, content, size)
    }

    /// Sends one message from its MAIL on. Returns a status for each recipient. After a failure the session is over.
    pub fn send_message(&mut self, message: OutgoingMessage, content: &mut dyn Read) -> DeliveryResult {
        let (mut commands, size) = (Vec::new(), message.size);
        let silent = self.reject_unsolicited();
        if let Err(result) = self.client.send_message(message, &mut commands) {
            return result;
        }
        if let Err(failure) = silent {
            return self.abandon(&failure);
        }
        self.send(&commands);
        self.finish_transaction(ClientStep::Wait, content, size)
    }

    fn finish_transaction(&mut self, mut step: ClientStep, content: &mut dyn Read, size: u64) -> DeliveryResult {
        loop {
            let sent = match step {
                ClientStep::MessageDone(result) => return result,
                ClientStep::Content { chunk } => self.send_content(content, size, chunk),
                _ => Ok(()),
            };
            step = match sent.and_then(|()| self.next_step()) {
                Ok(step) => step,
                Err(failure) => return self.abandon(&failure),
            };
        }
    }

    fn abandon(&mut self, failure: &SessionFailure) -> DeliveryResult {
        let reply = connection_lost(failure.to_string());
        self.client.abandon(&reply).pop().unwrap_or_else(|| DeliveryResult::lost("", 0))
    }

    /// Sends the content of one message, `size` octets on the wire.
    fn send_content(&mut self, content: &mut dyn Read, size: u64, chunk: bool) -> Result<(), SessionFailure> {
        let mut output = ContentOutput::new(chunk, size);
        let failed = |error: io::Error| SessionFailure::Lost(error.to_string());
        while !output.send_block(content, &mut self.connection).map_err(failed)? {
            let deadline = self.deadline_within(self.timeouts.block);
            self.connection.flush_all_or_cancel(deadline, &self.cancel).map_err(|error| match error.kind() {
                io::ErrorKind::Interrupted => SessionFailure::Cancelled,
                _ => lost(error),
            })?;
        }
        let mut commands = Vec::new();
        self.client.content_sent(&mut commands);
        self.send(&commands);
        Ok(())
    }

    /// Sends ATRN. `Ok`: the connection turns (RFC 2645 section 5.2.1).
    pub fn atrn(mut self, domains: &[Domain]) -> Result<(Connection, Client), SessionFailure> {
        let mut commands = Vec::new();
        self.client.atrn(domains, &mut commands);
        self.send(&commands);
        loop {
            match self.next_step() {
                Ok(ClientStep::Turned) => return Ok((self.connection, self.client)),
                Ok(_) => {}
                Err(failure) => {
                    self.close_after(&failure);
                    return Err(failure);
                }
            }
        }
    }

    /// Closes after a failure: with QUIT if the peer has only rejected something, otherwise without another command.
    pub fn close_after(self, failure: &SessionFailure) {
        match failure {
            SessionFailure::Aborted(_) => self.quit(),
            _ => self.connection.shutdown(),
        }
    }

    /// Sends QUIT and waits a little for its reply.
    pub fn quit(mut self) {
        let mut commands = Vec::new();
        self.client.quit(&mut commands);
        self.send(&commands);
        self.limit(Some(Instant::now() + QUIT_TIMEOUT));
        // The replies to earlier commands come first.
        while self.client.awaiting().is_some() && self.next_step().is_ok() {}
        self.connection.shutdown();
    }

    /// Checks that nothing has arrived while no reply is pending: an unsolicited reply would be read as the answer to the
    /// next command, and a rejected message would count as sent.
    fn reject_unsolicited(&mut self) -> Result<(), SessionFailure> {
        if self.client.awaiting().is_some() {
            return Ok(());
        }
        if self.connection.fill().map_err(lost)? == Filled::End {
            return Err(SessionFailure::Lost("the peer closed the connection".to_owned()));
        }
        match self.connection.received() {
            [] => Ok(()),
            // RFC 5321 section 3.8: 421 may come at any time.
            octets if octets.starts_with(b"421") => Err(SessionFailure::Lost("the peer shuts down".to_owned())),
            _ => Err(SessionFailure::Broken("a reply came that nobody asked for".to_owned())),
        }
    }

    /// What the next reply leads to.
    fn next_step(&mut self) -> Result<ClientStep, SessionFailure> {
        let reply = self.read_reply(self.deadline_within(self.timeouts.reply_timeout(self.client.awaiting())))?;
        let last = ends_session(&reply);
        let mut commands = Vec::new();
        let step = self
            .client
            .reply(reply.clone(), &mut commands)
            .map_err(|broken| SessionFailure::Broken(broken.0.to_owned()))?;
        self.send(&commands);
        match step {
            ClientStep::Abort(abort) => Err(SessionFailure::Aborted(abort)),
            ClientStep::Closed => Err(SessionFailure::Lost("the peer closed the session".to_owned())),
            // This reply still decides on its message; no other will follow.
            ClientStep::MessageDone(_) => Ok(step),
            _ if last => Err(SessionFailure::Lost(format!("the peer ended the session: {reply}"))),
            step => Ok(step),
        }
    }

    fn read_reply(&mut self, deadline: Instant) -> Result<Reply, SessionFailure> {
        loop {
            if let Some(reply) = self.replies.next(&mut self.connection).map_err(SessionFailure::Broken)? {
                return Ok(reply);
            }
            let (deadline, cancel) = match &self.grace {
                Some((end, never)) => (deadline.min(*end), never),
                None => (deadline, &self.cancel),
            };
            match self.connection.wait_input(deadline, cancel).map_err(lost)? {
                WaitResult::Ready => {}
                WaitResult::Deadline => return Err(SessionFailure::Lost("the peer does not answer".to_owned())),
                // The peer may be accepting the message right now: without its reply the message would be sent twice.
                WaitResult::Cancelled if self.client.awaiting() == Some(Awaiting::End) => {
                    let never = CancelToken::new().map_err(lost)?;
                    self.grace = Some((Instant::now() + self.timeouts.shutdown, never));
                    continue;
                }
                WaitResult::Cancelled => return Err(SessionFailure::Cancelled),
            }
            if self.connection.fill().map_err(lost)? == Filled::End {
                return Err(SessionFailure::Lost("the peer closed the connection".to_owned()));
            }
        }
    }

    /// Queues what the client has to send.
    fn send(&mut self, octets: &[u8]) {
        send_commands(&mut self.connection, &self.client, octets);
    }
}

/// How a session is connected.
#[derive(Clone, Copy)]
pub struct Connect<'a> {
    /// The id of the session in the log.
    pub id: &'a str,
    /// The letter of the peer in the dialogue: `P` is the provider, `S` any other server.
    pub peer: char,
    /// For TLS, if it is used: what to trust, and the name that the certificate must be for.
    pub tls: Option<(&'a ClientTls, &'a str)>,
    pub timeouts: &'a Timeouts,
    pub cancel: &'a CancelToken,
    /// No wait lasts longer.
    pub limit: Option<Instant>,
}

impl Connect<'_> {
    /// Connects by TCP, and goes as far as [`ClientSession::handshake`].
    pub fn to(&self, address: SocketAddr, options: ClientOptions) -> Result<ClientSession, SessionFailure> {
        let deadline = Instant::now() + self.timeouts.connect;
        let deadline = self.limit.map_or(deadline, |limit| limit.min(deadline));
        let socket = connection::connect(address, deadline, self.cancel).map_err(|error| match error.kind() {
            io::ErrorKind::Interrupted => SessionFailure::Cancelled,
            _ => SessionFailure::Unreachable(format!("{address}: {error}")),
        })?;
        self.over(socket, options)
    }

    /// The same over a socket that is connected.
    pub fn over(&self, socket: OwnedFd, options: ClientOptions) -> Result<ClientSession, SessionFailure> {
        let trace = Trace { id: self.id.to_owned(), us: 'C', them: self.peer };
        let connection = Connection::new(socket, trace).map_err(lost)?;
        let implicit = options.tls;
        let mut session = ClientSession::new(connection, options, self.timeouts, self.cancel);
        session.limit(self.limit);
        let begun = match self.tls {
            Some((tls, name)) if implicit => session.begin_tls(tls, name),
            _ => Ok(()),
        };
        match begun.and_then(|()| session.handshake(self.tls)) {
            Ok(()) => Ok(session),
            Err(failure) => {
                session.close_after(&failure);
                Err(failure)
            }
        }
    }
}
