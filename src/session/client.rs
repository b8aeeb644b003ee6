//! One SMTP client session over one wire, for a thread that has nothing else to do.
//!
//! The driver of [`Client`] where waiting is allowed: the customer before the turn, submission, the relay.
//! (After the turn the provider's client is driven by `provider/delivery`, which never waits for one peer.)
//! Replies are read while content is being written, so two peers that talk at once do not block each other.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Read};
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::config::{self, Timeouts, TlsMode};
use crate::mail::address::Domain;
use crate::net::connection::{self, CancelToken, Connection, Filled, Line, Trace, WaitResult};
use crate::net::tls::{self, ClientTls, Trust};
use crate::queue::{QueueLock, QueuedMessage};
use crate::smtp::client::{
    Abort, Awaiting, Client, ClientInfo, ClientOptions, ClientStep, DecidedBy, DeliveryResult, OutgoingMessage,
    RecipientStatus, StartTls,
};
use crate::smtp::command::Recipient;
use crate::smtp::content::{CrlfEncoder, Stuffer};
use crate::smtp::reply::{Reply, ReplyReader};

/// A reply line may be longer than RFC 5321 section 4.5.3.1.5 says, but not endless.
pub const REPLY_LINE_LIMIT: usize = 8 * 1024;

/// Content is read and sent in pieces of so many octets.
const CONTENT_BLOCK: usize = 32 * 1024;

/// So many messages refused at MAIL one after the other, and no more are tried.
const MAIL_REJECTION_LIMIT: usize = 3;

/// How long the reply to QUIT is waited for.
const QUIT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a session cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionFailure {
    /// The peer refuses what we cannot do without.
    Aborted(Abort),
    /// The peer, or its TLS, is not what it should be.
    Broken(String),
    /// The connection was lost, or too slow, in the handshake of TLS.
    NoTls(String),
    /// The connection is gone, or too slow.
    Lost(String),
    /// We were told to stop.
    Cancelled,
}

impl fmt::Display for SessionFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SessionFailure::Aborted(Abort::Rejected { what, reply }) => write!(f, "{what} was refused: {reply}"),
            SessionFailure::Aborted(Abort::NoAtrn) => f.write_str("ATRN was not offered"),
            SessionFailure::Aborted(Abort::NoStartTls) => f.write_str("STARTTLS is required and was not offered"),
            SessionFailure::Aborted(Abort::NoMechanism) => {
                f.write_str("no authentication was offered that can be used: CRAM-MD5, or PLAIN under TLS")
            }
            SessionFailure::Aborted(Abort::Unproven) => f.write_str("the peer did not prove that it knows the secret"),
            SessionFailure::Broken(text) | SessionFailure::NoTls(text) | SessionFailure::Lost(text) => {
                f.write_str(text)
            }
            SessionFailure::Cancelled => f.write_str("stopped"),
        }
    }
}

fn lost(error: io::Error) -> SessionFailure {
    SessionFailure::Lost(format!("the connection was lost: {error}"))
}

/// What becomes of a message is decided outside.
pub type Settle<'a> = dyn FnMut(QueuedMessage, DeliveryResult, &Client, &mut QueueLock) + 'a;

/// A session.
pub struct ClientSession {
    connection: Connection,
    client: Client,
    replies: ReplyReader,
    timeouts: Timeouts,
    cancel: CancelToken,
    /// Whatever is waited for, not longer than this.
    limit: Option<Instant>,
    /// We were told to stop behind a message's content: so long its reply is waited for.
    grace: Option<(Instant, CancelToken)>,
}

impl ClientSession {
    pub fn new(
        connection: Connection,
        options: ClientOptions,
        timeouts: &Timeouts,
        cancel: &CancelToken,
    ) -> ClientSession {
        ClientSession {
            connection,
            client: Client::new(options),
            replies: ReplyReader::default(),
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

    /// Greeting, EHLO, TLS and AUTH: up to where mail or ATRN may be said.
    pub fn handshake(&mut self, tls: Option<(&ClientTls, &str)>) -> Result<(), SessionFailure> {
        loop {
            match self.next_step()? {
                ClientStep::Ready => return Ok(()),
                ClientStep::StartTls => {
                    let Some((tls, name)) = tls else {
                        return Err(SessionFailure::Broken("TLS is not configured".to_owned()));
                    };
                    self.begin_tls(tls, name)?;
                    let mut said = Vec::new();
                    self.client.tls_started(&mut said);
                    self.send(&said);
                }
                _ => {}
            }
        }
    }

    /// Sends all that the hold offers; every message is given to `settle`, whatever happens.
    pub fn send_queue(&mut self, lock: &mut QueueLock, settle: &mut Settle<'_>) -> Result<(), SessionFailure> {
        let mut under_way = VecDeque::new();
        let delivered = self.send_each(lock, &mut under_way, settle);
        if let Err(failure) = &delivered {
            let why = Reply::new(451, "4.4.2", failure.to_string());
            for (message, result) in under_way.into_iter().zip(self.client.abandon(&why)) {
                settle(message, result, &self.client, lock);
            }
        }
        delivered
    }

    fn send_each(
        &mut self,
        lock: &mut QueueLock,
        under_way: &mut VecDeque<QueuedMessage>,
        settle: &mut Settle<'_>,
    ) -> Result<(), SessionFailure> {
        let (mut more, mut refusals) = (true, 0);
        loop {
            while more && self.client.is_ready_for_message() && !self.cancel.is_cancelled() {
                let Some(message) = lock.next_message() else {
                    more = false;
                    break;
                };
                if let Err(failure) = self.reject_unsolicited() {
                    let statuses = vec![
                        RecipientStatus::Deferred(Reply::new(451, "4.4.2", failure.to_string()));
                        message.envelope.recipients.len()
                    ];
                    settle(
                        message,
                        DeliveryResult { recipients: statuses, decided_by: DecidedBy::ConnectionLoss },
                        &self.client,
                        lock,
                    );
                    return Err(failure);
                }
                let mut said = Vec::new();
                match self.client.send_message(message.outgoing_message(), &mut said) {
                    Ok(()) => under_way.push_back(message),
                    Err(result) => settle(message, result, &self.client, lock),
                }
                self.send(&said);
            }
            if self.client.in_flight() == 0 {
                // Behind a 421 nothing more is said.
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
                        // Where MAIL is not taken at all, the rest need not be tried; but one sender that is not liked
                        // says nothing of the others.
                        refusals = match mail_not_accepted_here(&result) {
                            Some(550) => refusals + 1,
                            Some(_) => MAIL_REJECTION_LIMIT,
                            None => 0,
                        };
                        more &= refusals < MAIL_REJECTION_LIMIT;
                        settle(message, result, &self.client, lock);
                    }
                }
                _ => {}
            }
        }
    }

    /// Opens a transaction by asking; the peer's reply to MAIL.
    pub fn begin_transaction(&mut self, message: &OutgoingMessage) -> Result<Reply, SessionFailure> {
        self.reject_unsolicited()?;
        let mut said = Vec::new();
        let asked = self.client.begin_transaction(message, &mut said);
        self.await_reply(asked, &said)
    }

    /// The peer's reply to one recipient more.
    pub fn add_recipient(&mut self, recipient: &Recipient) -> Result<Reply, SessionFailure> {
        self.reject_unsolicited()?;
        let mut said = Vec::new();
        let asked = self.client.add_recipient(recipient, &mut said);
        self.await_reply(asked, &said)
    }

    fn await_reply(&mut self, asked: Result<(), Reply>, said: &[u8]) -> Result<Reply, SessionFailure> {
        if let Err(reply) = asked {
            return Ok(reply);
        }
        self.send(said);
        loop {
            if let ClientStep::Replied(reply) = self.next_step()? {
                return Ok(reply);
            }
        }
    }

    /// Lets go of a transaction that was opened by asking.
    pub fn abort_transaction(&mut self) {
        let mut said = Vec::new();
        self.client.abort_transaction(&mut said);
        self.send(&said);
    }

    /// Tells the peer who gave the next message to the host that gave it to us, if it wants to know.
    pub fn send_client_info(&mut self, origin: &ClientInfo) -> Result<(), SessionFailure> {
        self.reject_unsolicited()?;
        let mut said = Vec::new();
        let awaited = self.client.send_client_info(origin, &mut said);
        self.send(&said);
        while awaited && !matches!(self.next_step()?, ClientStep::Ready) {}
        Ok(())
    }

    /// The content of the transaction that was opened by asking, of `size` octets on the wire; a fate for each
    /// recipient that was accepted. After a failure the session is over.
    pub fn send_data(&mut self, content: &mut dyn Read, size: u64) -> DeliveryResult {
        if let Err(failure) = self.reject_unsolicited() {
            return self.abandon(&failure);
        }
        let mut said = Vec::new();
        let step = self.client.send_data(size, &mut said);
        self.send(&said);
        self.finish_transaction(step, content, size)
    }

    /// One message from its MAIL on; a fate for each recipient. After a failure the session is over.
    pub fn send_message(&mut self, message: OutgoingMessage, content: &mut dyn Read) -> DeliveryResult {
        let (mut said, size) = (Vec::new(), message.size);
        let silence = self.reject_unsolicited();
        if let Err(result) = self.client.send_message(message, &mut said) {
            return result;
        }
        if let Err(failure) = silence {
            return self.abandon(&failure);
        }
        self.send(&said);
        self.finish_transaction(ClientStep::Wait, content, size)
    }

    fn finish_transaction(&mut self, mut step: ClientStep, content: &mut dyn Read, size: u64) -> DeliveryResult {
        loop {
            let gone_on = match step {
                ClientStep::MessageDone(result) => return result,
                ClientStep::Content { chunk } => self.send_content(content, size, chunk),
                _ => Ok(()),
            };
            step = match gone_on.and_then(|()| self.next_step()) {
                Ok(step) => step,
                Err(failure) => return self.abandon(&failure),
            };
        }
    }

    fn abandon(&mut self, failure: &SessionFailure) -> DeliveryResult {
        let why = Reply::new(451, "4.4.2", failure.to_string());
        self.client
            .abandon(&why)
            .pop()
            .unwrap_or(DeliveryResult { recipients: Vec::new(), decided_by: DecidedBy::ConnectionLoss })
    }

    /// The content of one message, `size` octets on the wire: by DATA with its dots and its end, or as one chunk.
    fn send_content(&mut self, content: &mut dyn Read, size: u64, chunk: bool) -> Result<(), SessionFailure> {
        let (mut stuffer, mut liner) = (Stuffer::new(), CrlfEncoder::new());
        let mut piece = vec![0; CONTENT_BLOCK];
        let mut sent = 0;
        loop {
            let octets = content.read(&mut piece).map_err(|error| SessionFailure::Lost(error.to_string()))?;
            let out = self.connection.out();
            let before = out.len();
            match (chunk, octets) {
                (true, 0) => liner.finish(out),
                (true, _) => liner.feed(&piece[..octets], out),
                (false, 0) => stuffer.finish(out),
                (false, _) => stuffer.feed(&piece[..octets], out),
            }
            sent += (out.len() - before) as u64;
            if chunk && sent > size {
                // What is beyond the octets that BDAT has announced would be taken for commands.
                out.truncate(before);
                return Err(SessionFailure::Lost("the message is longer than it was".to_owned()));
            }
            if octets == 0 {
                break;
            }
            let deadline = self.deadline_within(self.timeouts.block);
            self.connection.flush_or_stop(deadline, &self.cancel).map_err(|error| match error.kind() {
                io::ErrorKind::Interrupted => SessionFailure::Cancelled,
                _ => lost(error),
            })?;
        }
        // BDAT has announced the octets: with one more or less the peer would take content for commands.
        if chunk && sent != size {
            return Err(SessionFailure::Lost("the message is not as long as it was".to_owned()));
        }
        let mut said = Vec::new();
        self.client.content_sent(&mut said);
        self.send(&said);
        Ok(())
    }

    /// ATRN; `Ok`: the connection turns (RFC 2645 section 5.2.1).
    pub fn atrn(mut self, domains: &[Domain]) -> Result<(Connection, Client), SessionFailure> {
        let mut said = Vec::new();
        self.client.atrn(domains, &mut said);
        self.send(&said);
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

    /// Goes away after a failure: politely where the peer has only refused something, else without a word more.
    pub fn close_after(self, failure: &SessionFailure) {
        match failure {
            SessionFailure::Aborted(_) => self.quit(),
            SessionFailure::Broken(_)
            | SessionFailure::NoTls(_)
            | SessionFailure::Lost(_)
            | SessionFailure::Cancelled => self.connection.shutdown(),
        }
    }

    /// QUIT, and its reply if the peer is so kind.
    pub fn quit(mut self) {
        let mut said = Vec::new();
        self.client.quit(&mut said);
        self.send(&said);
        self.limit(Some(Instant::now() + QUIT_TIMEOUT));
        // What was said before is answered first.
        while self.client.awaiting().is_some() && self.next_step().is_ok() {}
        self.connection.shutdown();
    }

    /// With nothing outstanding nothing may have come: a reply that nobody has asked for would be taken for the answer
    /// to what is said next, and a message for delivered that was refused.
    fn reject_unsolicited(&mut self) -> Result<(), SessionFailure> {
        if self.client.awaiting().is_some() {
            return Ok(());
        }
        if self.connection.fill().map_err(lost)? == Filled::End {
            return Err(SessionFailure::Lost("the peer closed the connection".to_owned()));
        }
        match self.connection.received() {
            [] => Ok(()),
            // RFC 5321 section 3.8: that one may come at any time.
            said if said.starts_with(b"421") => Err(SessionFailure::Lost("the peer shuts down".to_owned())),
            _ => Err(SessionFailure::Broken("a reply came that nobody asked for".to_owned())),
        }
    }

    /// What the next reply leads to.
    fn next_step(&mut self) -> Result<ClientStep, SessionFailure> {
        let reply = self.read_reply(self.deadline_within(self.timeouts.reply_timeout(self.client.awaiting())))?;
        let farewell = reply.code() == 421;
        let mut said = Vec::new();
        let step = self
            .client
            .reply(reply.clone(), &mut said)
            .map_err(|broken| SessionFailure::Broken(broken.0.to_owned()))?;
        self.send(&said);
        match step {
            ClientStep::Abort(abort) => Err(SessionFailure::Aborted(abort)),
            ClientStep::Closed => Err(SessionFailure::Lost("the peer closed the session".to_owned())),
            // What was settled by this reply is settled; nothing more will come.
            ClientStep::MessageDone(_) => Ok(step),
            _ if farewell => Err(SessionFailure::Lost(format!("the peer said {reply}"))),
            step => Ok(step),
        }
    }

    fn read_reply(&mut self, deadline: Instant) -> Result<Reply, SessionFailure> {
        loop {
            match self.connection.take_reply_line(REPLY_LINE_LIMIT) {
                Line::Whole(line) => {
                    self.connection.trace.received(&line);
                    let reply = self.replies.line(&line);
                    let reply = reply.map_err(|error| {
                        SessionFailure::Broken(format!("that is no SMTP server: it said {:?}", error.0))
                    })?;
                    match reply {
                        Some(reply) => return Ok(reply),
                        None => continue,
                    }
                }
                Line::TooLong => return Err(SessionFailure::Broken("a reply line without end".to_owned())),
                Line::None => {}
            }
            let (deadline, cancel) = match &self.grace {
                Some((end, never)) => (deadline.min(*end), never),
                None => (deadline, &self.cancel),
            };
            match self.connection.wait_input(deadline, cancel).map_err(lost)? {
                WaitResult::Ready => {}
                WaitResult::Deadline => return Err(SessionFailure::Lost("the peer does not answer".to_owned())),
                // The peer may have taken the message this very moment: to go now would bring it twice.
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

    /// Logs and lines up what the client says; secrets are blanked.
    fn send(&mut self, octets: &[u8]) {
        let lines = octets.split_inclusive(|octet| *octet == b'\n').filter(|_| self.connection.trace.enabled());
        for line in lines {
            let line = line.trim_ascii_end();
            let end = if !self.client.in_auth() {
                line.len()
            } else if line.starts_with(b"AUTH ") {
                line.iter().enumerate().filter(|(_, octet)| **octet == b' ').nth(1).map_or(line.len(), |(at, _)| at)
            } else {
                0
            };
            let blanked: &[u8] = if end < line.len() { b" ***" } else { b"" };
            self.connection.trace.sent(&[&line[..end], blanked].concat());
        }
        self.connection.send(octets);
    }
}

/// The reply to MAIL, if it may say that this server takes no mail from us (RFC 2645 section 5.4).
pub fn mail_not_accepted_here(result: &DeliveryResult) -> Option<u16> {
    result.recipients.iter().filter(|_| result.decided_by == DecidedBy::PeerAtMail).find_map(|status| match status {
        RecipientStatus::Rejected(reply) => Some(reply.code()).filter(|code| matches!(code, 502 | 503 | 530 | 550)),
        _ => None,
    })
}

/// A host that takes all mail, and how to talk to it: the relay's smarthost, a customer's submission host.
pub struct Remote {
    config: config::Smarthost,
    tls: Option<ClientTls>,
}

impl Remote {
    pub fn new(config: &config::Smarthost) -> Result<Remote, String> {
        let tls = client_tls(config.tls, config.pin, config.ca.as_deref())?;
        Ok(Remote { config: config.clone(), tls })
    }

    pub fn address(&self) -> &str {
        &self.config.address
    }

    /// A session in which mail may be sent.
    pub fn connect(
        &self,
        hostname: &str,
        timeouts: &Timeouts,
        cancel: &CancelToken,
    ) -> Result<ClientSession, SessionFailure> {
        let config = &self.config;
        let addresses = config
            .address
            .to_socket_addrs()
            .map_err(|error| SessionFailure::Lost(format!("{} has no address: {error}", config.address)))?;
        let mut last = SessionFailure::Lost(format!("{} has no address", config.address));
        for address in addresses {
            let options = ClientOptions {
                name: hostname.to_owned(),
                starttls: if config.tls == TlsMode::StartTls { StartTls::Required } else { StartTls::Never },
                tls: config.tls == TlsMode::Implicit,
                credentials: config.credentials.clone(),
                chunking: true,
                ..ClientOptions::default()
            };
            let tls = self.tls.as_ref().map(|tls| (tls, config.host.as_str()));
            match connect(address, options, tls, timeouts, cancel, None) {
                Ok(session) => return Ok(session),
                Err(SessionFailure::Cancelled) => return Err(SessionFailure::Cancelled),
                Err(failure) => last = failure,
            }
        }
        Err(last)
    }
}

/// Connects by TCP and introduces itself, until `limit` at the latest.
pub fn connect(
    address: SocketAddr,
    options: ClientOptions,
    tls: Option<(&ClientTls, &str)>,
    timeouts: &Timeouts,
    cancel: &CancelToken,
    limit: Option<Instant>,
) -> Result<ClientSession, SessionFailure> {
    let deadline = Instant::now() + timeouts.connect;
    let deadline = limit.map_or(deadline, |limit| limit.min(deadline));
    let socket = connection::connect(address, deadline, cancel).map_err(|error| match error.kind() {
        io::ErrorKind::Interrupted => SessionFailure::Cancelled,
        _ => SessionFailure::Lost(format!("{address}: {error}")),
    })?;
    connect_over(socket, &format!("relay-{address}"), options, tls, timeouts, cancel, limit)
}

/// Introduces itself over a connection; `name`: what it is called in the log.
pub fn connect_over(
    socket: OwnedFd,
    name: &str,
    options: ClientOptions,
    tls: Option<(&ClientTls, &str)>,
    timeouts: &Timeouts,
    cancel: &CancelToken,
    limit: Option<Instant>,
) -> Result<ClientSession, SessionFailure> {
    let trace = Trace { id: name.to_owned(), us: 'C', them: 'S' };
    let implicit = options.tls;
    let connection =
        Connection::new(socket, trace).map_err(|error| SessionFailure::Lost(format!("{name}: {error}")))?;
    let mut session = ClientSession::new(connection, options, timeouts, cancel);
    session.limit(limit);
    let begun = match tls {
        Some((tls, name)) if implicit => session.begin_tls(tls, name),
        _ => Ok(()),
    };
    match begun.and_then(|()| session.handshake(tls)) {
        Ok(()) => Ok(session),
        Err(failure) => {
            session.close_after(&failure);
            Err(failure)
        }
    }
}

/// What a peer's certificate is checked against; `None`: no TLS.
pub fn client_tls(tls: TlsMode, pin: Option<[u8; 32]>, ca: Option<&Path>) -> Result<Option<ClientTls>, String> {
    let trust = match (tls, pin, ca) {
        (TlsMode::None, _, _) => return Ok(None),
        (_, Some(pin), _) => Trust::Pin(pin),
        (_, None, Some(file)) => Trust::Authorities(file.to_owned()),
        (_, None, None) => Trust::System,
    };
    tls::client_config(&trust).map(Some)
}
