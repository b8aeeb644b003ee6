//! The driver of the SMTP server role: one session over one connection, up to its end or to ATRN.
//!
//! The driver reads lines and content for the [`Server`], sends its replies, and starts TLS. The [`SessionHandler`]
//! decides which mail is accepted and where its content is stored. The client gets 250 for content only after
//! [`MessageSink::commit`]: a power cut after the 250 does not lose the message.
//!
//! Replies are queued while complete commands are in the read buffer, and sent before every wait (RFC 2920 section
//! 3.2).

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::pace::PaceClock;
use super::{CONTENT_BLOCK, Limits, Timeouts, without_secrets};
use crate::mail::address::Domain;
use crate::net::cancel::CancelToken;
use crate::net::connection::{Connection, Filled, Line, WaitResult};
use crate::net::limiter::AcceptedConnection;
use crate::net::pin::Pin;
use crate::net::tls::{ServerTls, begins_as_record};
use crate::net::trace::quoted;
use crate::smtp::command::Verb;
use crate::smtp::content::{ContentDecoder, HeaderScanner};
use crate::smtp::limits;
use crate::smtp::reply::Reply;
use crate::smtp::server::{
    MessageSink, Server, ServerRole, ServerStep, SessionHandler, Unaccepted, message_too_large, path_of,
};

/// Octets by which a TLS record is recognised. The shortest content after DATA, a dot and CRLF, is as long.
const RECORD_HEADER: u64 = 3;

/// Octets of content that are decoded and stored at a time.
const RECEIVE_BLOCK: usize = 32 * 1024;

/// How long the last replies may take before the connection is closed.
const LAST_REPLY_TIMEOUT: Duration = Duration::from_secs(5);

/// The time limits of a session, and how it is cancelled.
#[derive(Clone)]
pub struct SessionLimits {
    /// The time for one command, and for 64 KiB of content, without the time that the content earns.
    pub command: Duration,
    /// The time for a TLS handshake.
    pub handshake: Duration,
    /// The time for the whole session, without the time that content earns (see [`PaceClock`]).
    pub session: Duration,
    /// `Received` fields of a message at most: one with more is in a mail loop (RFC 5321 section 6.3).
    pub hops: usize,
    /// Ends the session between two commands.
    pub cancel: CancelToken,
    /// Ends the session even within content.
    pub abort: CancelToken,
    /// The place of the connection at its listener, which may give it to another one; `None`: no listener counts it.
    pub accepted: Option<Arc<AcceptedConnection>>,
}

impl SessionLimits {
    /// The configured limits of a session before a turn.
    pub fn new(timeouts: &Timeouts, limits: &Limits, cancel: &CancelToken, abort: &CancelToken) -> SessionLimits {
        SessionLimits {
            command: timeouts.command,
            handshake: timeouts.handshake,
            session: timeouts.session,
            hops: limits.received_hops,
            cancel: cancel.clone(),
            abort: abort.clone(),
            accepted: None,
        }
    }
}

/// A session in which this side is the server.
pub struct ServerSession {
    pub connection: Connection,
    /// The server role: the state of the session, and the replies to commands.
    pub server: Server,
    /// The client's address as a literal, `[192.0.2.1]`.
    pub peer: String,
    limits: SessionLimits,
    tls: Option<ServerTls>,
    /// When the session ends; content postpones it.
    deadline: Instant,
    /// The time that the content of the current message earns.
    pace: PaceClock,
    /// Octets of content that may still earn time before a message is accepted. Without this limit, a client whose
    /// messages are all rejected or aborted could keep the session for ever.
    pace_left: u64,
    /// A message of which some chunks have arrived (RFC 3030).
    chunks: Option<(ContentDecoder, ContentReceiver)>,
    /// The client has sent a command.
    has_commands: bool,
    /// The client has sent a TLS record instead of a command or a message.
    found_record: bool,
}

/// Why [`ServerSession::run`] has returned.
#[derive(Debug)]
pub enum SessionEnd {
    /// The client has sent ATRN with these domains; none: all. If the reply is not 250, call `run` again.
    Atrn(Vec<Domain>),
    /// The client has sent QUIT, and its reply is queued.
    Quit,
    /// The client has sent a TLS record instead of a command or a message. It gets no reply: a client that read a
    /// rejection would return the message to its sender.
    TlsRecord,
    /// The session has ended before the client sent any octet.
    NoCommand(io::Error),
    /// The session has ended for this reason.
    Closed(String),
}

/// For the log.
impl fmt::Display for SessionEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SessionEnd::Atrn(_) => f.write_str("ATRN"),
            SessionEnd::Quit => f.write_str("quit"),
            SessionEnd::TlsRecord => f.write_str("a TLS record instead of a command or a message"),
            SessionEnd::NoCommand(error) => error.fmt(f),
            SessionEnd::Closed(reason) => f.write_str(reason),
        }
    }
}

impl ServerSession {
    /// A session that begins now. `peer`: the client's address as a literal. `tls`: for STARTTLS, if the server offers
    /// it. The session is boxed: on the stack of its thread, each function that moves it would need room for a copy.
    pub fn new(
        connection: Connection, server: Server, peer: String, tls: Option<ServerTls>, limits: SessionLimits,
    ) -> Box<ServerSession> {
        let now = Instant::now();
        let (deadline, pace) = (now + limits.session, PaceClock::new(limits::UNKNOWN_CLIENT_PACE, 0, now));
        let pace_left = server.max_size();
        let (has_commands, found_record) = (false, false);
        Box::new(ServerSession {
            connection,
            server,
            peer,
            limits,
            tls,
            deadline,
            pace,
            pace_left,
            chunks: None,
            has_commands,
            found_record,
        })
    }

    /// Queues the greeting.
    pub fn greet(&mut self) {
        let greeting = self.server.greeting();
        self.reply(&greeting);
    }

    /// Queues a reply, which is sent before the next wait.
    pub fn reply(&mut self, reply: &Reply) {
        let mut octets = Vec::new();
        reply.write_to(&mut octets);
        for line in octets.split_inclusive(|octet| *octet == b'\n') {
            self.connection.trace.sent(line.trim_ascii_end());
        }
        self.connection.send(&octets);
    }

    /// Logs and queues a negative reply that is not from the [`Server`].
    pub fn reject(&mut self, reply: &Reply) {
        self.log_command_rejected(reply, None);
        self.reply(reply);
    }

    /// Serves the client until the session ends, or until ATRN.
    pub fn run(&mut self, handler: &mut dyn SessionHandler) -> SessionEnd {
        if !self.has_commands {
            self.log_unknown_certificate(handler);
        }
        self.serve(handler).unwrap_or_else(|error| match self.found_record {
            true => SessionEnd::TlsRecord,
            false if self.has_commands || !self.connection.received().is_empty() => {
                SessionEnd::Closed(error.to_string())
            }
            false => SessionEnd::NoCommand(error),
        })
    }

    /// Sends the queued replies, within 5 seconds, and closes the connection.
    pub fn close(mut self: Box<Self>) {
        let _ = self.connection.flush_all(Instant::now() + LAST_REPLY_TIMEOUT, None);
        self.connection.close();
    }

    fn serve(&mut self, handler: &mut dyn SessionHandler) -> io::Result<SessionEnd> {
        loop {
            let line = self.read_line()?;
            self.has_commands = true;
            let step = match &line {
                Some(line) => {
                    self.trace_command(line);
                    self.flush_before(Some(line), handler);
                    let step = self.server.line(line, handler);
                    self.note_command();
                    step
                }
                None => self.server.line_too_long(handler),
            };
            if self.server.transaction().is_none() {
                self.chunks = None;
            }
            match step {
                ServerStep::Reply(reply) => {
                    let reply = self.soften(reply, line.as_deref());
                    self.log_reply(&reply, line.as_deref());
                    self.observe(&reply, line.as_deref(), handler);
                    self.reply(&reply);
                }
                ServerStep::Close(reply) => {
                    let reply = self.soften(reply, line.as_deref());
                    self.observe(&reply, line.as_deref(), handler);
                    self.reply(&reply);
                    return Ok(match reply.is_positive() {
                        true => SessionEnd::Quit,
                        false => SessionEnd::Closed(reply.to_string()),
                    });
                }
                ServerStep::StartTls(reply) => {
                    self.start_tls(&reply)?;
                    self.log_unknown_certificate(handler);
                }
                ServerStep::Data(go_ahead) => self.data(&go_ahead, handler)?,
                ServerStep::Chunk { size, last: _, rejected: Some(reply) } => {
                    self.begin_pace(size.min(self.server.max_size()));
                    self.reject_record_in_content(size)?;
                    self.read_exact(size, |_| {})?;
                    let reply = self.soften(reply, line.as_deref());
                    self.log_command_rejected(&reply, None);
                    self.observe(&reply, line.as_deref(), handler);
                    self.reply(&reply);
                }
                ServerStep::Chunk { size, last, rejected: None } => self.chunk(size, last, handler)?,
                ServerStep::Atrn(domains) => return Ok(SessionEnd::Atrn(domains)),
            }
        }
    }

    /// Reports to the listener that the client has sent a command, and whether it is trusted: a silent client that is
    /// not may lose its place to another connection.
    fn note_command(&self) {
        let Some(accepted) = &self.limits.accepted else { return };
        accepted.note_command(Instant::now());
        if self.is_trusted() {
            accepted.trust();
        }
    }

    /// Reports to the listener, before a wait for a command, that no transaction is open any more.
    fn note_end_of_transaction(&mut self) {
        // Only after its replies were sent: a client that is cut before it gets the 250 sends its message again.
        if self.limits.accepted.is_some() && !self.is_trusted() && matches!(self.connection.flush(), Ok(true)) {
            self.limits.accepted.iter().for_each(|accepted| accepted.distrust(Instant::now()));
        }
    }

    /// Whether the client has authenticated, or has an open transaction with an accepted recipient.
    fn is_trusted(&self) -> bool {
        let transaction = self.server.transaction();
        self.server.account().is_some() || transaction.is_some_and(|open| !open.envelope.recipients.is_empty())
    }

    /// Ends the session with 421 if another connection has got its place (RFC 5321 section 3.8).
    fn check_place(&mut self) -> io::Result<()> {
        match self.limits.accepted.as_ref().is_some_and(|accepted| accepted.is_displaced()) {
            true => Err(self.end("4.3.2", "Too many connections, try again later", AcceptedConnection::DISPLACED)),
            false => Ok(()),
        }
    }

    /// Reports a negative reply to a command about mail to the handler.
    fn observe(&self, reply: &Reply, line: Option<&[u8]>, handler: &mut dyn SessionHandler) {
        // 421 is about the session, which ends.
        if reply.code() >= 400
            && reply.code() != 421
            && let Some(what) = Unaccepted::at_command(line, reply)
        {
            handler.not_accepted(what, reply);
        }
        if reply.code() == 503
            && let Some(line) = line
            && matches!(Verb::of(line), Ok((Verb::Rcpt, _)))
        {
            handler.recipient_without_mail(path_of(line));
        }
    }

    /// With [`Server::soft_bounce`], turns a rejection of mail into a deferral.
    fn soften(&self, reply: Reply, line: Option<&[u8]>) -> Reply {
        match self.server.soft_bounce() && Unaccepted::at_command(line, &reply).is_some() {
            true => reply.softened(),
            false => reply,
        }
    }

    /// Rejects or defers the content for all recipients.
    fn reject_content(&mut self, reply: &Reply, handler: &mut dyn SessionHandler) {
        let softened = self.server.soft_bounce().then(|| reply.clone().softened());
        let reply = softened.as_ref().unwrap_or(reply);
        handler.not_accepted(Unaccepted::Content, reply);
        self.reject(reply);
    }

    /// Sends the queued replies before work that may take long, so that the client does not time out. `line`: the next
    /// command; AUTH may take long too.
    fn flush_before(&mut self, line: Option<&[u8]>, handler: &dyn SessionHandler) {
        let is_auth = |line| matches!(Verb::of(line), Ok((Verb::Auth, _)));
        if handler.may_wait() || self.server.in_auth() || line.is_some_and(is_auth) {
            // The next wait reports an error of the connection.
            let _ = self.connection.flush();
        }
    }

    /// Reads the next line; `None`: it was too long.
    fn read_line(&mut self) -> io::Result<Option<Vec<u8>>> {
        let deadline = self.deadline.min(Instant::now() + self.limits.command);
        loop {
            self.check_place()?;
            // Check this before the line end: the random octets of a TLS hello may contain one.
            if !self.connection.is_tls() && self.connection.received().starts_with(&[0x16, 0x03]) {
                return Err(self.end("4.7.0", "TLS begins with STARTTLS on this port", "a TLS hello on a clear port"));
            }
            self.reject_record()?;
            match self.connection.take_line(limits::COMMAND_LINE) {
                Line::Whole(line) => return Ok(Some(line)),
                Line::TooLong => return Ok(None),
                Line::None => {}
            }
            if self.connection.discarded() > limits::UNTERMINATED_LINE {
                return Err(self.end("4.7.0", "Too much without a line end", "too much without a line end"));
            }
            self.note_end_of_transaction();
            self.wait_for_input(deadline, false)?;
        }
    }

    /// Ends the session if the next octets are a TLS record.
    fn reject_record(&mut self) -> io::Result<()> {
        self.found_record = begins_as_record(self.connection.received());
        if self.found_record { Err(io::Error::other("a TLS record")) } else { Ok(()) }
    }

    /// Waits for the first octets of a message of which `size` octets arrive, and ends the session if they are a TLS
    /// record.
    fn reject_record_in_content(&mut self, size: u64) -> io::Result<()> {
        let deadline = BlockDeadline::new(&self.limits).deadline.min(self.deadline);
        while (self.connection.received().len() as u64) < size.min(RECORD_HEADER) {
            self.wait_for_input(deadline, true)?;
        }
        self.reject_record()
    }

    /// Waits for octets. `in_content`: only an abort ends the wait, not a cancellation.
    fn wait_for_input(&mut self, deadline: Instant, in_content: bool) -> io::Result<()> {
        // A client that does not read its replies must not fill the memory with them.
        if self.connection.unsent() > CONTENT_BLOCK {
            while !self.connection.flush_or_wait(deadline, None)? {
                self.check_place()?;
            }
        }
        let cancel = if in_content { &self.limits.abort } else { &self.limits.cancel };
        match self.connection.wait_input(deadline, cancel)? {
            WaitResult::Ready => {}
            // RFC 5321 section 3.8.
            WaitResult::Deadline => return Err(self.end("4.4.2", "Timeout, closing connection", "timeout")),
            WaitResult::Cancelled => {
                return Err(self.end("4.3.2", "Service shutting down, try again later", "shutting down"));
            }
        }
        // If the listener has shut the socket down for reading, the end of the input is not the client's.
        self.check_place()?;
        match self.connection.fill()? {
            Filled::Bytes(_) | Filled::Nothing => Ok(()),
            Filled::End => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the client closed the connection")),
        }
    }

    /// Queues 421, and returns the reason as an error.
    fn end(&mut self, enhanced: &'static str, text: &'static str, reason: &str) -> io::Error {
        self.reply(&Reply::new(421, enhanced, text));
        io::Error::other(reason)
    }

    /// Traces a line from the client without secrets.
    fn trace_command(&self, line: &[u8]) {
        if !self.connection.trace.enabled() {
            return;
        }
        // If AUTH is offered, a line that is not a command may be a secret that was sent at the wrong time.
        let known = matches!(Verb::of(line), Ok((verb, _)) if verb != Verb::Unknown);
        let secret = self.server.in_auth() || self.server.offers_auth() && !known;
        self.connection.trace.received(&without_secrets(line, secret));
    }

    /// Logs authentications and negative replies. `line`: the command; `None`: it was too long.
    fn log_reply(&self, reply: &Reply, line: Option<&[u8]>) {
        let (session, peer) = (&self.connection.trace.id, &self.peer);
        let attempt = self.server.auth_attempt();
        let mechanism = attempt.map_or("-", |attempt| attempt.mechanism.name());
        match reply.code() {
            235 => {
                let account = self.server.account().unwrap_or_default();
                let tls = self.connection.tls_info().map_or("none", |tls| tls.version);
                log::info!(
                    "event=authenticated session={session} peer={peer} account={account} mechanism={mechanism} \
                     tls={tls} pin={}",
                    self.shown_pin()
                );
            }
            535 => {
                let account = attempt.and_then(|attempt| attempt.account.as_deref()).unwrap_or_default();
                log::warn!(
                    "event=auth-failed session={session} peer={peer} account={} mechanism={mechanism} pin={}",
                    quoted(account),
                    self.shown_pin()
                );
            }
            421 | 450..=599 => self.log_command_rejected(reply, line),
            _ => {}
        }
    }

    /// The pin of the key in the client's certificate, for the log; `-`: the client has shown none.
    fn shown_pin(&self) -> String {
        let certificate = self.server.client_certificate();
        certificate.map_or_else(|| "-".to_owned(), |certificate| Pin::Key(certificate.key).to_string())
    }

    /// Logs a client certificate that opens no account, with its pin, which the administrator can add to one.
    fn log_unknown_certificate(&self, handler: &dyn SessionHandler) {
        let is_unknown = |certificate| !handler.credentials().knows(&certificate);
        if self.server.offers_auth() && self.server.client_certificate().is_some_and(is_unknown) {
            let (session, peer) = (&self.connection.trace.id, &self.peer);
            log::info!("event=unknown-certificate session={session} peer={peer} pin={}", self.shown_pin());
        }
    }

    fn log_command_rejected(&self, reply: &Reply, line: Option<&[u8]>) {
        let (session, peer) = (&self.connection.trace.id, &self.peer);
        let verb = line.and_then(|line| Verb::of(line).ok()).map(|(verb, _)| verb);
        // The path of a rejected MAIL or RCPT is not in the transaction. It may be any octets.
        let path = line.map(String::from_utf8_lossy).unwrap_or_default();
        let path = path.split_once('<').map_or("", |(_, rest)| rest.split('>').next().unwrap_or_default());
        let from = match (self.server.transaction(), verb) {
            (Some(transaction), _) => transaction.envelope.from.to_string(),
            (None, Some(Verb::Mail)) => path.to_owned(),
            (None, _) => String::new(),
        };
        let to = if verb == Some(Verb::Rcpt) { path } else { "" };
        let account = self.server.account().unwrap_or("-");
        log::info!(
            "event=command-rejected session={session} peer={peer} account={account} from={} to={} reply={}",
            quoted(from),
            quoted(to),
            quoted(reply)
        );
    }

    /// Replies to STARTTLS, and negotiates TLS (RFC 3207).
    fn start_tls(&mut self, go_ahead: &Reply) -> io::Result<()> {
        let Some(tls) = self.tls.clone() else {
            self.reply(&Reply::new(454, "4.7.0", "TLS is not available now"));
            return Ok(());
        };
        // An attacker may have added commands in clear after STARTTLS. Do not execute them as if the client had sent
        // them under TLS (RFC 3207 section 6, CVE-2011-0411).
        if !self.connection.received().is_empty() {
            return Err(io::Error::other("octets after STARTTLS"));
        }
        self.reply(go_ahead);
        self.connection.start_tls_server(&tls, Instant::now() + self.limits.handshake)?;
        self.note_command();
        self.connection.trace.event("tls");
        self.server.tls_started(self.connection.tls_channel().unwrap_or_default());
        Ok(())
    }

    /// Receives the content after DATA (RFC 5321 section 4.1.1.4).
    fn data(&mut self, go_ahead: &Reply, handler: &mut dyn SessionHandler) -> io::Result<()> {
        let mut receiver = match self.open_sink(handler) {
            Ok(receiver) => receiver,
            Err(reply) => {
                self.reject_content(&reply, handler);
                self.server.end_transaction();
                return Ok(());
            }
        };
        self.reply(go_ahead);
        self.reject_record_in_content(RECORD_HEADER)?;
        let mut content = ContentDecoder::data();
        let mut block_deadline = BlockDeadline::new(&self.limits);
        loop {
            let block = first_block(self.connection.received());
            let mut octets = Vec::with_capacity(block.len());
            let fed = content.feed(block, &mut octets);
            self.connection.consume(fed.used);
            receiver.write(&octets, content.size());
            // Free the buffer before a wait: thousands of sessions may wait at the same time.
            drop(octets);
            if fed.end {
                break;
            }
            // Do not discard more than twice the message limit; close the connection instead.
            if content.size() > limits::discarded_content(self.server.max_size()) {
                self.reject_content(&message_too_large(self.server.max_size()), handler);
                return Err(io::Error::other("far more content than permitted"));
            }
            let deadline = self.count_content(&mut block_deadline, fed.used);
            if self.connection.received().is_empty() {
                self.wait_for_input(deadline, true)?;
            }
        }
        self.flush_before(None, handler);
        self.finish_message(receiver, content.bare(), handler);
        Ok(())
    }

    /// Receives one chunk (RFC 3030 section 2): exactly `size` octets.
    fn chunk(&mut self, size: u64, last: bool, handler: &mut dyn SessionHandler) -> io::Result<()> {
        let (mut content, mut receiver) = match self.chunks.take() {
            Some(begun) => begun,
            None => match self.open_sink(handler) {
                Ok(receiver) => {
                    self.reject_record_in_content(size)?;
                    (ContentDecoder::bdat(), receiver)
                }
                Err(reply) => {
                    self.begin_pace(size.min(self.server.max_size()));
                    self.reject_record_in_content(size)?;
                    self.read_exact(size, |_| {})?;
                    self.reject_content(&reply, handler);
                    self.server.chunk_rejected(last);
                    return Ok(());
                }
            },
        };
        self.read_exact(size, |block| {
            let mut octets = Vec::with_capacity(block.len());
            content.feed(block, &mut octets);
            receiver.write(&octets, content.size());
        })?;
        if last {
            let mut octets = Vec::new();
            content.finish(&mut octets);
            receiver.write(&octets, content.size());
            self.flush_before(None, handler);
            self.finish_message(receiver, content.bare(), handler);
        } else if let Err(reply) = receiver.sink {
            self.reject_content(&reply, handler);
            self.server.chunk_rejected(last);
        } else {
            self.reply(&Reply::new(250, "2.0.0", format!("{size} octets received")));
            self.chunks = Some((content, receiver));
        }
        Ok(())
    }

    /// Reads exactly `size` octets, block by block.
    fn read_exact(&mut self, size: u64, mut each: impl FnMut(&[u8])) -> io::Result<()> {
        let mut left = size;
        let mut block_deadline = BlockDeadline::new(&self.limits);
        while left > 0 {
            let received = first_block(self.connection.received());
            let block = received.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            each(&received[..block]);
            self.connection.consume(block);
            left -= block as u64;
            let deadline = self.count_content(&mut block_deadline, block);
            if left > 0 && self.connection.received().is_empty() {
                self.wait_for_input(deadline, true)?;
            }
        }
        Ok(())
    }

    /// Begins a message of at most this size: its content earns time.
    fn begin_pace(&mut self, size: u64) {
        let pace = match self.server.role() {
            ServerRole::Inbound => limits::UNKNOWN_CLIENT_PACE,
            // These accept mail only from authenticated accounts, from local networks, and from the provider.
            ServerRole::Odmr | ServerRole::Submission | ServerRole::Customer => limits::KNOWN_PEER_PACE,
        };
        self.stop_pace();
        self.pace = PaceClock::new(pace, size.min(self.pace_left), Instant::now());
    }

    /// Ends the message: its content earns no more time. Not between two chunks: the next one may be on its way.
    fn stop_pace(&mut self) {
        self.deadline -= self.pace.stop(Instant::now());
    }

    /// Counts octets of content that have arrived. Returns the deadline for the next ones.
    fn count_content(&mut self, block: &mut BlockDeadline, octets: usize) -> Instant {
        let now = Instant::now();
        let earned = self.pace.earn(octets, now);
        self.pace_left = self.pace_left.saturating_sub(octets as u64);
        self.deadline += earned;
        block.after(octets, earned, now).min(self.deadline)
    }

    /// Asks the handler to accept the content of the open transaction. The error is the reply to the content.
    fn open_sink(&mut self, handler: &mut dyn SessionHandler) -> Result<ContentReceiver, Reply> {
        let tls = self.connection.tls_info().map(|tls| tls.to_string());
        let Some((envelope, incoming)) = self.server.incoming(&self.connection.trace.id, &self.peer, tls.as_deref())
        else {
            return Err(Reply::new(503, "5.5.1", "Send MAIL first"));
        };
        let size = incoming.size.unwrap_or(u64::MAX).min(self.server.max_size());
        let sink = handler.receive(envelope, &incoming)?;
        self.begin_pace(size);
        Ok(ContentReceiver { sink: Ok(sink), header: HeaderScanner::default(), limit: self.server.max_size(), size: 0 })
    }

    /// Commits or rejects a message whose content has arrived, queues the reply, and ends the transaction.
    fn finish_message(&mut self, receiver: ContentReceiver, bare: bool, handler: &mut dyn SessionHandler) {
        self.stop_pace();
        let size = receiver.size;
        let message_id = receiver.header.message_id().unwrap_or_default().to_owned();
        let received_id = receiver.header.received_id().unwrap_or_default().to_owned();
        match receiver.commit(bare, self.limits.hops) {
            Ok(id) => {
                self.pace_left = self.server.max_size();
                self.log_accepted(&id, size, &message_id, &received_id);
                self.reply(&Reply::new(250, "2.6.0", format!("OK, id={id}")));
            }
            Err(reply) => self.reject_content(&reply, handler),
        }
        self.server.end_transaction();
    }

    /// `received_id`: the id in the topmost `Received` field, which is the provider's after a turn.
    fn log_accepted(&self, id: &str, size: u64, message_id: &str, received_id: &str) {
        let Some(transaction) = self.server.transaction() else { return };
        let provider_id = match self.server.role() {
            ServerRole::Customer => format!(" provider-id={}", quoted(received_id)),
            _ => String::new(),
        };
        log::info!(
            "event=accepted session={} id={id} from=<{}> nrcpt={} size={size} message-id={} helo={} peer={} tls={}{}",
            self.connection.trace.id,
            transaction.envelope.from,
            transaction.envelope.recipients.len(),
            quoted(message_id),
            quoted(self.server.client_name().unwrap_or_default()),
            self.peer,
            self.connection.tls_info().map_or("none", |tls| tls.version),
            provider_id,
        );
    }
}

/// The octets that are decoded and stored at a time.
fn first_block(received: &[u8]) -> &[u8] {
    &received[..received.len().min(RECEIVE_BLOCK)]
}

/// Writes content to its sink. After a failure the rest is discarded, and the client gets the reply after the content.
struct ContentReceiver {
    sink: Result<Box<dyn MessageSink>, Reply>,
    header: HeaderScanner,
    limit: u64,
    /// Octets on the wire so far.
    size: u64,
}

impl ContentReceiver {
    /// Writes decoded octets; `size`: octets on the wire so far.
    fn write(&mut self, octets: &[u8], size: u64) {
        self.size = size;
        let Ok(sink) = &mut self.sink else { return };
        self.header.feed(octets);
        if size > self.limit {
            self.sink = Err(message_too_large(self.limit));
        } else if let Err(reply) = sink.write(octets) {
            self.sink = Err(reply);
        }
    }

    /// Commits the message; returns its id. `bare`: the content has a CR without LF or an LF without CR.
    fn commit(self, bare: bool, hops: usize) -> Result<String, Reply> {
        let sink = self.sink?;
        if bare {
            // If the next server took such an octet for a line end, a client could smuggle a message (RFC 5321 section
            // 2.3.8).
            return Err(Reply::new(554, "5.6.0", "A CR without LF or an LF without CR is in the message"));
        }
        if self.header.received() > hops {
            return Err(Reply::new(554, "5.4.6", "Too many hops: this message goes in circles"));
        }
        sink.commit()
    }
}

/// The deadline of a block of content, which has the time of one command: see [`CONTENT_BLOCK`].
struct BlockDeadline {
    block: Duration,
    deadline: Instant,
    octets: usize,
}

impl BlockDeadline {
    fn new(limits: &SessionLimits) -> BlockDeadline {
        BlockDeadline { block: limits.command, deadline: Instant::now() + limits.command, octets: 0 }
    }

    /// The deadline after `octets` more have arrived and have `earned` this time.
    fn after(&mut self, octets: usize, earned: Duration, now: Instant) -> Instant {
        self.octets += octets;
        self.deadline += earned;
        if self.octets >= CONTENT_BLOCK {
            self.octets = 0;
            self.deadline = now + self.block;
        }
        self.deadline
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::*;
    use crate::mail::address::{ForwardPath, Mailbox};
    use crate::net::trace::Trace;
    use crate::smtp::command::{Envelope, MailFrom, Notify};
    use crate::smtp::server::Incoming;

    /// Accepts all mail, and discards it.
    struct Sink;

    impl SessionHandler for Sink {
        fn sender(&mut self, _: &MailFrom, _: Option<&str>) -> Result<(), Reply> {
            Ok(())
        }

        fn recipient(&mut self, path: &ForwardPath, _: &Notify, _: Option<&str>) -> Result<Mailbox, Reply> {
            match path {
                ForwardPath::Mailbox(mailbox) => Ok(mailbox.clone()),
                ForwardPath::Postmaster => Err(Reply::new(550, "5.1.1", "No")),
            }
        }

        fn receive(&mut self, _: &Envelope, _: &Incoming<'_>) -> Result<Box<dyn MessageSink>, Reply> {
            Ok(Box::new(Sink))
        }
    }

    impl MessageSink for Sink {
        fn write(&mut self, _: &[u8]) -> Result<(), Reply> {
            Ok(())
        }

        fn commit(self: Box<Self>) -> Result<String, Reply> {
            Ok("1".to_owned())
        }
    }

    const SESSION: Duration = Duration::from_millis(300);

    /// Sends messages in chunks of 100 octets at twice the required pace for 2 s. `end`: the command after the chunks
    /// of each message. Returns the duration of the session.
    fn session_time(end: &str) -> Duration {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let cancel = CancelToken::new().unwrap();
        let limits = SessionLimits {
            session: SESSION,
            ..SessionLimits::new(&Timeouts::default(), &Limits::default(), &cancel, &cancel)
        };
        let server = Server::new(Limits::default().server_options(ServerRole::Inbound, "relay.example.net", 300), None);
        let connection = Connection::new(ours.into(), Trace { id: "1".to_owned(), us: 'P', them: 'C' }).unwrap();
        let begun = Instant::now();
        let thread = thread::spawn(move || {
            let mut session = ServerSession::new(connection, server, "[192.0.2.1]".to_owned(), None, limits);
            session.greet();
            session.run(&mut Sink);
            session.close();
            begun.elapsed()
        });
        let mut replies = BufReader::new(theirs.try_clone().unwrap()).lines();
        let mut writer = theirs;
        let mut send = move |text: &str| {
            let replied = writer.write_all(format!("{text}\r\n").as_bytes()).is_ok();
            replied && replies.next().is_some_and(|reply| reply.is_ok_and(|reply| !reply.starts_with("421")))
        };
        let chunk = format!("BDAT 100\r\n{}", "x".repeat(98));
        // The greeting is the reply to the first line, and each reply is read one line later.
        assert!(send("HELO a.example"));
        let mut message = || {
            send("MAIL FROM:<>")
                && send("RCPT TO:<a@example.org>")
                && (0..2).all(|_| {
                    let sent = send(&chunk);
                    thread::sleep(Duration::from_millis(50));
                    sent
                })
                && send(end)
        };
        while begun.elapsed() < Duration::from_secs(2) && message() {}
        drop(send);
        thread.join().unwrap()
    }

    /// All aborted and rejected content together earns the time for one message.
    #[test]
    fn only_a_client_whose_mail_is_accepted_keeps_its_session() {
        assert!(session_time("BDAT 0 LAST") >= Duration::from_secs(2));
        assert!(session_time("RSET") < Duration::from_secs(1));
    }
}
