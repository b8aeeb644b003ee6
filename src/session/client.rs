//! The driver of the SMTP client role: one session over one connection, for a thread that may wait for the peer. The
//! customer uses it before the turn and for next hops, the provider for the relay.
//!
//! The driver reads while it writes content, so that two peers that send at the same time do not block each other.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use super::pace::PaceClock;
use super::{ContentOutput, ReplyInput, Timeouts, send_commands};
use crate::mail::address::Domain;
use crate::mail::received::ClientInfo;
use crate::net::cancel::CancelToken;
use crate::net::connection::{self, Connection, Filled, WaitResult};
use crate::net::resolver::system_addresses;
use crate::net::tls::{CertificateInfo, ClientTls, TlsInfo};
use crate::net::trace::Trace;
use crate::queue::{QueueLock, QueuedMessage};
use crate::sasl::TlsChannel;
use crate::smtp::client::{Abort, Client, ClientOptions, ClientStep, OutgoingMessage, Rejection, Stage};
use crate::smtp::command::Recipient;
use crate::smtp::extensions::AccountDomains;
use crate::smtp::limits;
use crate::smtp::reply::Reply;
use crate::smtp::status::{DeliveryResult, RecipientStatus, connection_lost, ends_session, may_be_about_sender};

/// If MAIL is rejected for this many messages in a row, the session sends no more: the peer accepts none.
const MAIL_REJECTION_LIMIT: usize = 3;

/// How long the session waits for the reply to QUIT.
const QUIT_TIMEOUT: Duration = Duration::from_secs(5);

/// The advice about a peer that does not send the greeting of an SMTP server.
const ANOTHER_SERVICE: &str = "another service? check the port";

/// Why a session cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionFailure {
    /// The peer rejects a command, or does not offer an extension that the session needs.
    Aborted(Abort),
    /// The peer violates the protocol, or its certificate is not trusted.
    Broken(String),
    /// The connection was lost or timed out in the TLS handshake.
    NoTls(String),
    /// The host name has no address.
    NoHost(String),
    /// The host does not accept a connection.
    Unreachable(String),
    /// The connection was lost or timed out.
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
            SessionFailure::Aborted(Abort::NoMechanism { certificate: true, .. }) => {
                f.write_str("EXTERNAL was not offered: the peer does not know the certificate")
            }
            SessionFailure::Aborted(Abort::NoMechanism { .. }) => f.write_str(
                "no authentication was offered that can be used: SCRAM-SHA-256, CRAM-MD5, or PLAIN under TLS",
            ),
            SessionFailure::Aborted(Abort::Unproven) => f.write_str("the peer did not prove that it knows the secret"),
            SessionFailure::Aborted(Abort::Unacceptable(text)) => write!(f, "AUTH was cancelled: the peer {text}"),
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

/// The source of a session's messages.
pub trait MessageSource {
    /// The next message. `None`: the session sends no more.
    fn next_message(&mut self) -> Option<QueuedMessage>;

    /// Puts back a message that this session cannot send, for another session.
    fn put_back(&mut self, message: QueuedMessage);
}

impl MessageSource for QueueLock {
    fn next_message(&mut self) -> Option<QueuedMessage> {
        QueueLock::next_message(self)
    }

    fn put_back(&mut self, message: QueuedMessage) {
        QueueLock::put_back(self, message);
    }
}

/// Settles a message with its result. It also gets the source, which the session has borrowed.
pub type Settle<'a, S> = dyn FnMut(QueuedMessage, DeliveryResult, &Client, &mut S) + 'a;

/// A session in which this side is the client.
pub struct ClientSession {
    connection: Connection,
    client: Client,
    replies: ReplyInput,
    timeouts: Timeouts,
    cancel: CancelToken,
    /// The time at which every wait ends.
    limit: Option<Instant>,
    /// The session was cancelled after it had sent the content of a message: it waits for the reply until this time.
    /// The token is never cancelled.
    grace: Option<(Instant, CancelToken)>,
    /// See [`ClientSession::is_used_up`].
    used_up: bool,
}

impl ClientSession {
    /// Sets the time at which every wait ends; `None`: each wait ends by its own timeout only.
    pub fn limit(&mut self, limit: Option<Instant>) {
        self.limit = limit;
    }

    /// The session with this token instead of its own, and without a limit: each wait ends by its own timeout only.
    pub fn established(self, cancel: &CancelToken) -> ClientSession {
        ClientSession { cancel: cancel.clone(), limit: None, ..self }
    }

    /// The end of a wait that begins now and lasts at most `timeout`.
    fn deadline_within(&self, timeout: Duration) -> Instant {
        deadline_within(timeout, self.limit)
    }

    /// The id of the session in the log.
    pub fn id(&self) -> &str {
        &self.connection.trace.id
    }

    /// The client role: what the peer offers, and whether it has ended the session.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The negotiated TLS; `None`: the session is in clear.
    pub fn tls_info(&self) -> Option<TlsInfo> {
        self.connection.tls_info()
    }

    /// Whether the session is under TLS.
    pub fn is_tls(&self) -> bool {
        self.connection.is_tls()
    }

    /// Whether the peer accepts no more commands: it has closed the connection, or has sent 421.
    pub fn is_over(&self) -> bool {
        self.connection.ended() || self.client.closing()
    }

    /// Whether the peer's limits (RFC 9422) have ended the last [`ClientSession::send_queue`]: the messages left in its
    /// source need another session.
    pub fn is_used_up(&self) -> bool {
        self.used_up
    }

    /// Reads the greeting, then sends EHLO, STARTTLS and AUTH. Returns when mail or ATRN may follow.
    fn handshake(&mut self, tls: Option<(&ClientTls, &str)>) -> Result<(), SessionFailure> {
        loop {
            match self.next_step()? {
                ClientStep::Ready => return Ok(()),
                ClientStep::StartTls => {
                    let Some((tls, name)) = tls else {
                        return Err(SessionFailure::Broken("TLS is not configured".to_owned()));
                    };
                    let deadline = self.deadline_within(self.timeouts.handshake);
                    let channel = begin_tls(&mut self.connection, tls, name, deadline, &self.cancel)?;
                    self.send(|client, out| client.tls_started(channel, out));
                }
                _ => {}
            }
        }
    }

    /// Sends all messages that `source` offers. Calls `settle` for each of them, even if the session fails.
    ///
    /// # Errors
    /// The session has ended. The messages that the source has not offered stay there.
    pub fn send_queue<S: MessageSource>(
        &mut self, source: &mut S, settle: &mut Settle<'_, S>,
    ) -> Result<(), SessionFailure> {
        let mut under_way = VecDeque::new();
        let sent = self.send_each(source, &mut under_way, settle);
        if let Err(failure) = &sent {
            let reply = connection_lost(failure.to_string());
            let stopped = *failure == SessionFailure::Cancelled;
            for (message, result) in under_way.into_iter().zip(self.client.abandon(&reply)) {
                let result = if stopped { result.stopped() } else { result };
                settle(message, result, &self.client, source);
            }
        }
        sent
    }

    fn send_each<S: MessageSource>(
        &mut self, source: &mut S, under_way: &mut VecDeque<QueuedMessage>, settle: &mut Settle<'_, S>,
    ) -> Result<(), SessionFailure> {
        let (mut more, mut found_empty, mut rejections) = (true, false, 0);
        loop {
            while more && !found_empty && self.client.is_ready_for_message() && !self.cancel.is_cancelled() {
                let Some(message) = source.next_message() else {
                    found_empty = true;
                    break;
                };
                if !self.client.permits(&message.envelope.recipients) {
                    source.put_back(message);
                    (self.used_up, more) = (true, false);
                    break;
                }
                if let Err(failure) = self.reject_unsolicited() {
                    let result = DeliveryResult::lost(failure.to_string(), message.envelope.recipients.len());
                    settle(message, result, &self.client, source);
                    return Err(failure);
                }
                match self.send(|client, out| client.send_message(&message.outgoing_message(), out)) {
                    Ok(()) => under_way.push_back(message),
                    Err(result) => settle(message, result, &self.client, source),
                }
            }
            if self.client.in_flight() == 0 {
                self.used_up |= more && !found_empty && self.client.is_used_up();
                return match self.client.closing() {
                    true => Err(SessionFailure::Lost("the peer is shutting down".to_owned())),
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
                        // If the peer accepts no mail at all, send no more: every message would be rejected. But 550
                        // may be about this sender only.
                        rejections = match result.no_mail_accepted() {
                            Some(reply) if may_be_about_sender(reply) => rejections + 1,
                            Some(_) => MAIL_REJECTION_LIMIT,
                            None => 0,
                        };
                        more &= rejections < MAIL_REJECTION_LIMIT;
                        // After "too many recipients" the source offers the message again (RFC 5321 section
                        // 4.5.3.1.10).
                        found_empty &= !result.recipients.iter().any(RecipientStatus::is_one_too_many);
                        settle(message, result, &self.client, source);
                    }
                }
                _ => {}
            }
        }
    }

    /// Begins a transaction to which recipients are added one by one. Returns the peer's reply to MAIL, or the client's
    /// own reply if the message cannot be sent to this peer.
    ///
    /// # Errors
    /// The session is over.
    pub fn begin_transaction(&mut self, message: &OutgoingMessage) -> Result<Reply, SessionFailure> {
        self.reply_to(|client, out| client.begin_transaction(message, out))
    }

    /// Adds a recipient to that transaction. Returns the peer's reply to RCPT, or the client's own reply.
    ///
    /// # Errors
    /// The session is over.
    pub fn add_recipient(&mut self, recipient: &Recipient) -> Result<Reply, SessionFailure> {
        self.reply_to(|client, out| client.add_recipient(recipient, out))
    }

    fn reply_to(
        &mut self, command: impl FnOnce(&mut Client, &mut Vec<u8>) -> Result<(), Reply>,
    ) -> Result<Reply, SessionFailure> {
        self.reject_unsolicited()?;
        if let Err(reply) = self.send(command) {
            return Ok(reply);
        }
        loop {
            if let ClientStep::Replied(reply) = self.next_step()? {
                return Ok(reply);
            }
        }
    }

    /// Aborts the transaction that [`ClientSession::begin_transaction`] has begun.
    pub fn abort_transaction(&mut self) {
        self.send(Client::abort_transaction);
    }

    /// Informs the peer of the client from which the next message came, if the peer offers XCLIENT or XFORWARD.
    ///
    /// # Errors
    /// The session is over.
    pub fn send_client_info(&mut self, info: &ClientInfo) -> Result<(), SessionFailure> {
        self.reject_unsolicited()?;
        let awaited = self.send(|client, out| client.send_client_info(info, out));
        while awaited && !matches!(self.next_step()?, ClientStep::Ready) {}
        Ok(())
    }

    /// Sends the content of that transaction, `size` octets on the wire. Returns a status for each recipient that was
    /// accepted. After a failure the session is over, and undecided recipients are deferred or in doubt.
    pub fn send_data(&mut self, content: &mut dyn Read, size: u64) -> DeliveryResult {
        if let Err(failure) = self.reject_unsolicited() {
            return self.abandon(&failure);
        }
        let step = self.send(|client, out| client.send_data(size, out));
        self.finish_transaction(step, content, size)
    }

    /// Sends one message, from MAIL to the reply to its content. Returns a status for each recipient. After a failure
    /// the session is over, and undecided recipients are deferred or in doubt.
    pub fn send_message(&mut self, message: &OutgoingMessage, content: &mut dyn Read) -> DeliveryResult {
        let (mut commands, size) = (Vec::new(), message.size);
        let unsolicited = self.reject_unsolicited();
        if let Err(result) = self.client.send_message(message, &mut commands) {
            return result;
        }
        if let Err(failure) = unsolicited {
            return self.abandon(&failure);
        }
        send_commands(&mut self.connection, &self.client, &commands);
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
        let mut pace = PaceClock::new(limits::KNOWN_PEER_PACE, size, Instant::now());
        let failed = |error: io::Error| SessionFailure::Lost(error.to_string());
        while !output.send_block(content, &mut self.connection).map_err(failed)? {
            self.flush_content(&mut pace).map_err(|error| match error.kind() {
                io::ErrorKind::Interrupted => SessionFailure::Cancelled,
                _ => lost(error),
            })?;
        }
        // The end of the content is not sent yet (RFC 5321 section 4.1.1.4). If a 2yz has arrived already, the peer is
        // one reply ahead: as the reply to the content it would count as an acceptance, and the message could be lost.
        let early = !chunk && self.fill().is_ok() && self.connection.received().starts_with(b"2");
        self.send(Client::content_sent);
        match early {
            true => Err(SessionFailure::Broken("the peer accepted the content before its end".to_owned())),
            false => Ok(()),
        }
    }

    /// Waits until the system has accepted a block of content. The time of the block does not run while the peer reads
    /// at the required pace, but the limit of the session does: the caller must reply to its own client in time.
    fn flush_content(&mut self, pace: &mut PaceClock) -> io::Result<()> {
        let mut deadline = Instant::now() + self.timeouts.block;
        loop {
            let before = self.connection.unsent();
            let until = self.limit.map_or(deadline, |limit| limit.min(deadline));
            if self.connection.flush_or_wait(until, Some(&self.cancel))? {
                return Ok(());
            }
            deadline += pace.earn(before.saturating_sub(self.connection.unsent()), Instant::now());
        }
    }

    /// The certificate that the peer has shown; `None`: it has shown none.
    pub fn peer_certificate(&self) -> Option<CertificateInfo> {
        self.connection.peer_certificate()
    }

    /// Sends EHLO again. Returns the domains of the account, if the peer lists them after AUTH.
    ///
    /// # Errors
    /// The session is over.
    pub fn ask_domains(&mut self) -> Result<Option<AccountDomains>, SessionFailure> {
        self.reject_unsolicited()?;
        self.send(Client::ehlo_again);
        while !matches!(self.next_step()?, ClientStep::Ready) {}
        Ok(self.client.extensions().domains.clone())
    }

    /// Sends ATRN; without `domains`, for all mail of the account. Returns the connection and the client for the turn
    /// after 250 (RFC 2645 section 5.2.1).
    ///
    /// # Errors
    /// The peer has rejected ATRN, or the session has failed. The connection is closed.
    pub fn atrn(mut self, domains: &[Domain]) -> Result<(Connection, Client), SessionFailure> {
        self.send(|client, out| client.atrn(domains, out));
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

    /// Closes the connection after a failure. If the peer has only rejected a command or lacks an extension, sends QUIT
    /// first.
    pub fn close_after(self, failure: &SessionFailure) {
        match failure {
            SessionFailure::Aborted(_) => self.quit(),
            _ => self.connection.close(),
        }
    }

    /// Sends QUIT, waits at most 5 seconds for its reply, and closes the connection.
    pub fn quit(mut self) {
        self.send(Client::quit);
        self.limit(Some(Instant::now() + QUIT_TIMEOUT));
        // The replies to earlier commands come first.
        while self.client.awaiting().is_some() && self.next_step().is_ok() {}
        self.connection.close();
    }

    /// Checks that nothing has arrived while no reply is pending. An unsolicited reply would be read as the reply to
    /// the next command, and a rejected message could count as sent.
    fn reject_unsolicited(&mut self) -> Result<(), SessionFailure> {
        if self.client.awaiting().is_some() {
            return Ok(());
        }
        self.fill()?;
        match self.connection.received() {
            [] => Ok(()),
            // RFC 5321 section 3.8: 421 may come at any time.
            octets if octets.starts_with(b"421") => Err(SessionFailure::Lost("the peer is shutting down".to_owned())),
            _ => Err(SessionFailure::Broken("the peer sent a reply without a command".to_owned())),
        }
    }

    /// Waits for the next reply, and sends the commands that follow from it.
    fn next_step(&mut self) -> Result<ClientStep, SessionFailure> {
        let reply = self.read_reply(self.deadline_within(self.timeouts.reply_timeout(self.client.awaiting())))?;
        let last = ends_session(&reply);
        let step = self.send(|client, out| client.reply(reply.clone(), out));
        let step = step.map_err(|violation| SessionFailure::Broken(violation.0.to_owned()))?;
        match step {
            ClientStep::Abort(abort) => Err(SessionFailure::Aborted(abort)),
            ClientStep::Closed => Err(SessionFailure::Lost("the peer closed the session".to_owned())),
            // A 421 to the content is still the result of its message.
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
            let waited = match self.connection.wait_input(deadline, cancel) {
                Ok(waited) => waited,
                // The peer may have sent a reply before it closed the connection.
                Err(error) => {
                    let _ = self.connection.fill();
                    return self.replies.next_at_end(&mut self.connection).ok_or_else(|| lost(error));
                }
            };
            match waited {
                WaitResult::Ready => {}
                WaitResult::Deadline => return Err(SessionFailure::Lost("the peer does not reply".to_owned())),
                // The peer may be accepting the message now: without its reply the message would be in doubt, and sent
                // twice.
                WaitResult::Cancelled if self.client.awaiting() == Some(Stage::Content) => {
                    let never = CancelToken::new().map_err(lost)?;
                    self.grace = Some((Instant::now() + self.timeouts.shutdown, never));
                    continue;
                }
                WaitResult::Cancelled => return Err(SessionFailure::Cancelled),
            }
            if let Err(failure) = self.fill() {
                return self.replies.next_at_end(&mut self.connection).ok_or(failure);
            }
        }
    }

    fn fill(&mut self) -> Result<(), SessionFailure> {
        match self.connection.fill().map_err(lost)? {
            Filled::End => Err(SessionFailure::Lost("the peer closed the connection".to_owned())),
            Filled::Bytes(_) | Filled::Nothing => Ok(()),
        }
    }

    /// Queues the commands that `write` adds; returns its result.
    fn send<T>(&mut self, write: impl FnOnce(&mut Client, &mut Vec<u8>) -> T) -> T {
        let mut commands = Vec::new();
        let result = write(&mut self.client, &mut commands);
        send_commands(&mut self.connection, &self.client, &commands);
        result
    }
}

/// The end of a wait that begins now and lasts at most `timeout`, but not after `limit`.
fn deadline_within(timeout: Duration, limit: Option<Instant>) -> Instant {
    let end = Instant::now() + timeout;
    limit.map_or(end, |limit| limit.min(end))
}

/// Negotiates TLS; `name`: the host that the peer's certificate must be for.
fn begin_tls(
    connection: &mut Connection, tls: &ClientTls, name: &str, deadline: Instant, cancel: &CancelToken,
) -> Result<TlsChannel, SessionFailure> {
    connection.start_tls_client(tls, name, deadline, Some(cancel)).map_err(|error| match error.kind() {
        io::ErrorKind::Interrupted => SessionFailure::Cancelled,
        io::ErrorKind::InvalidData => SessionFailure::Broken(error.to_string()),
        _ => SessionFailure::NoTls(format!("no TLS: {error}")),
    })?;
    connection.trace.event("tls");
    Ok(connection.tls_channel().unwrap_or_default())
}

/// How a session is connected.
#[derive(Clone, Copy)]
pub struct Connect<'a> {
    /// The id of the session in the log.
    pub id: &'a str,
    /// The peer in the trace: `P` is the provider, `S` any other server.
    pub peer: char,
    /// If TLS is used: the trusted certificates, and the host that the peer's certificate must be for.
    pub tls: Option<(&'a ClientTls, &'a str)>,
    /// TLS begins with the first octet, not by STARTTLS.
    pub implicit_tls: bool,
    pub timeouts: &'a Timeouts,
    /// Ends the session at once; while it waits for the reply to content, after `timeouts.shutdown`.
    pub cancel: &'a CancelToken,
    /// The time at which every wait ends.
    pub limit: Option<Instant>,
}

impl Connect<'_> {
    /// The addresses of a host that the configuration names (`host:port`), by the system's resolver.
    ///
    /// # Errors
    /// The host has none, or the resolver does not reply in time. `Interrupted`: the token was cancelled.
    pub fn addresses(&self, address: &str) -> io::Result<Vec<SocketAddr>> {
        system_addresses(address, deadline_within(self.timeouts.connect, self.limit), self.cancel)
    }

    /// Connects by TCP, then sends EHLO, STARTTLS and AUTH according to `options`. Returns a session in which mail or
    /// ATRN may follow.
    ///
    /// # Errors
    /// See [`SessionFailure`]. The connection is closed.
    pub fn to(&self, address: SocketAddr, options: ClientOptions) -> Result<ClientSession, SessionFailure> {
        let deadline = deadline_within(self.timeouts.connect, self.limit);
        let socket = connection::connect(address, deadline, Some(self.cancel)).map_err(|error| match error.kind() {
            io::ErrorKind::Interrupted => SessionFailure::Cancelled,
            _ => SessionFailure::Unreachable(format!("{address}: {error}")),
        })?;
        self.over(socket, options)
    }

    /// Like [`Connect::to`], over a connected socket.
    ///
    /// # Errors
    /// See [`SessionFailure`]. The connection is closed.
    pub fn over(&self, socket: OwnedFd, options: ClientOptions) -> Result<ClientSession, SessionFailure> {
        let trace = Trace { id: self.id.to_owned(), us: 'C', them: self.peer };
        let mut connection = Connection::new(socket, trace).map_err(lost)?;
        let tls = match self.tls {
            Some((tls, name)) if self.implicit_tls => {
                let deadline = deadline_within(self.timeouts.handshake, self.limit);
                match begin_tls(&mut connection, tls, name, deadline, self.cancel) {
                    Ok(channel) => Some(channel),
                    Err(failure) => {
                        connection.close();
                        return Err(failure);
                    }
                }
            }
            _ => None,
        };
        let mut session = ClientSession {
            connection,
            client: Client::new(ClientOptions { tls, ..options }),
            replies: ReplyInput::default(),
            timeouts: self.timeouts.clone(),
            cancel: self.cancel.clone(),
            limit: self.limit,
            grace: None,
            used_up: false,
        };
        match session.handshake(self.tls) {
            Ok(()) => Ok(session),
            Err(failure) => {
                let no_greeting = session.client.awaiting() == Some(Stage::Greeting);
                session.close_after(&failure);
                Err(match failure {
                    SessionFailure::Lost(text) if no_greeting => {
                        SessionFailure::Lost(format!("{text} before its greeting: {ANOTHER_SERVICE}"))
                    }
                    SessionFailure::Broken(text) if no_greeting => {
                        SessionFailure::Broken(format!("{text}: {ANOTHER_SERVICE}"))
                    }
                    failure => failure,
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::*;
    use crate::mail::address::{Mailbox, ReversePath};
    use crate::smtp::command::Envelope;

    /// Replies to a session up to the content, of which it reads 4 KiB every 80 ms. Returns the octets of content.
    fn slow_server(socket: UnixStream) -> usize {
        let mut writer = socket.try_clone().unwrap();
        let mut lines = BufReader::with_capacity(4096, socket);
        for reply in ["220 hello", "250 hello", "250 sender", "250 recipient"] {
            writer.write_all(format!("{reply}\r\n").as_bytes()).unwrap();
            lines.read_line(&mut String::new()).unwrap();
        }
        writer.write_all(b"354 go ahead\r\n").unwrap();
        let mut content = Vec::new();
        while !content.ends_with(b"\r\n.\r\n") {
            thread::sleep(Duration::from_millis(80));
            let block = lines.fill_buf().unwrap();
            assert!(!block.is_empty(), "the client closed after {} octets", content.len());
            content.extend_from_slice(block);
            let count = block.len();
            lines.consume(count);
        }
        writer.write_all(b"250 stored\r\n").unwrap();
        content.len()
    }

    /// Rules: SMTP-60.
    #[test]
    fn a_peer_that_reads_slowly_but_steadily_gets_the_whole_message() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        // The buffer is small, so that the client must wait for the server.
        rustix::net::sockopt::set_socket_send_buffer_size(&ours, 4096).unwrap();
        let server = thread::spawn(move || slow_server(theirs));
        let timeouts = Timeouts { block: Duration::from_millis(200), ..Timeouts::default() };
        let cancel = CancelToken::new().unwrap();
        let connect = Connect {
            id: "1",
            peer: 'S',
            tls: None,
            implicit_tls: false,
            timeouts: &timeouts,
            cancel: &cancel,
            limit: None,
        };
        let mut session = connect.over(ours.into(), ClientOptions::default()).unwrap();
        let content = b"0123456789abcde\n".repeat(4096);
        let recipients = vec![Recipient::plain(Mailbox::parse("a@example.org").unwrap())];
        let envelope = Envelope { recipients, ..Envelope::new(ReversePath::Null) };
        let message = OutgoingMessage { envelope, size: 17 * 4096, eight_bit: false, utf8_header: false, attempts: 0 };
        let result = session.send_message(&message, &mut &content[..]);
        assert!(result.recipients[0].is_sent(), "{result:?}");
        drop(session);
        assert_eq!(server.join().unwrap(), 17 * 4096 + 3);
    }
}
