//! One SMTP server session over one wire, up to its end or to ATRN.
//!
//! The driver of [`Server`]: it reads lines and content, says the replies, begins TLS. What to accept and
//! where content goes is the party's affair: see [`Party`] and [`Intake`]. Content is answered 250 only
//! after [`Intake::commit`], so nothing that was answered 250 can be lost.
//!
//! Replies are gathered as long as whole commands wait in the read buffer, and flushed before every wait
//! (RFC 2920 section 3.2).

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::config::{Limits, Timeouts};
use crate::mail::address::Domain;
use crate::net::connection::{CancelToken, Connection, Filled, Line, WaitResult};
use crate::net::tls::ServerTls;
use crate::smtp::command::Verb;
use crate::smtp::content::{BdatDecoder, ReceivedCounter, Unstuffer};
use crate::smtp::reply::Reply;
use crate::smtp::server::{Server, ServerHandler, ServerStep_, message_too_large};

/// RFC 4954 section 4 asks for 12288 octets in an AUTH exchange, more than any other command needs.
const COMMAND_LINE_LIMIT: usize = 12 * 1024 + 512;

/// Octets without a line end before the connection is closed.
const UNTERMINATED_LINE_LIMIT: usize = 1 << 20;

/// Content must come at least this fast: so many octets within the time for one command.
const CONTENT_BLOCK: usize = 64 * 1024;

/// How long the last words may take.
const LAST_REPLY_TIMEOUT: Duration = Duration::from_secs(5);

/// What only the party behind the listener can do.
pub trait SessionHandler: ServerHandler {
    /// Whether it may have to wait for others before it answers: then what was said before goes out first, as somebody
    /// waits for that.
    fn may_wait(&self) -> bool {
        false
    }

    /// Begins to take the content of the server's transaction; `peer` and `secure` are for `Received`.
    fn receive_message(
        &mut self,
        server: &Server,
        peer: &str,
        secure: Option<&str>,
    ) -> Result<Box<dyn MessageSink>, Reply>;
}

/// Where one message's content goes. Dropped before its commit it leaves nothing.
pub trait MessageSink: Send {
    fn write(&mut self, octets: &[u8]) -> io::Result<()>;
    /// Makes the message durable; the reply says by which id it is known.
    fn commit(self: Box<Self>) -> io::Result<Reply>;
}

/// How long a session may take, how far it may go, and how it is stopped.
#[derive(Clone)]
pub struct SessionLimits {
    /// For one command, and for 64 KiB of content.
    pub command: Duration,
    pub handshake: Duration,
    /// For the whole session.
    pub session: Duration,
    /// `Received` fields before a message is taken for a loop (RFC 5321 section 6.3).
    pub hops: usize,
    /// Ends the session between two commands.
    pub cancel: CancelToken,
    /// Ends it at once.
    pub abort: CancelToken,
}

impl SessionLimits {
    /// As the configuration says, for a session before any turn.
    pub fn new(timeouts: &Timeouts, limits: &Limits, cancel: &CancelToken, abort: &CancelToken) -> SessionLimits {
        SessionLimits {
            command: timeouts.command,
            handshake: timeouts.handshake,
            session: timeouts.session,
            hops: limits.received_hops,
            cancel: cancel.clone(),
            abort: abort.clone(),
        }
    }
}

/// A session.
pub struct ServerSession {
    pub connection: Connection,
    pub server: Server,
    /// The client's address as a literal, `[192.0.2.1]`.
    pub peer: String,
    limits: SessionLimits,
    tls: Option<ServerTls>,
    deadline: Instant,
    /// A message that comes in chunks (RFC 3030).
    chunks: Option<(BdatDecoder, ContentReceiver)>,
}

/// Why [`Session::run`] has returned.
#[derive(Debug)]
pub enum SessionEnd {
    /// ATRN with these domains; none: all. Go on with `run` after any reply but 250.
    Atrn(Vec<Domain>),
    /// The client said QUIT and was answered.
    Quit,
    /// It is over, for this reason.
    Closed(String),
}

/// For the log.
impl fmt::Display for SessionEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SessionEnd::Atrn(_) => f.write_str("ATRN"),
            SessionEnd::Quit => f.write_str("quit"),
            SessionEnd::Closed(why) => f.write_str(why),
        }
    }
}

/// The session cannot go on.
struct ConnectionClosed(String);

impl From<io::Error> for ConnectionClosed {
    fn from(error: io::Error) -> ConnectionClosed {
        ConnectionClosed(error.to_string())
    }
}

impl ServerSession {
    /// `tls`: for STARTTLS, where the server offers it.
    pub fn new(
        connection: Connection,
        server: Server,
        peer: String,
        tls: Option<ServerTls>,
        limits: SessionLimits,
    ) -> ServerSession {
        let deadline = Instant::now() + limits.session;
        ServerSession { connection, server, peer, limits, tls, deadline, chunks: None }
    }

    /// Says the greeting.
    pub fn greet(&mut self) {
        let greeting = self.server.greeting();
        self.reply(&greeting);
    }

    /// Lines up a reply.
    pub fn reply(&mut self, reply: &Reply) {
        let mut octets = Vec::new();
        reply.write_to(&mut octets);
        for line in octets.split_inclusive(|octet| *octet == b'\n') {
            self.connection.trace.sent(line.trim_ascii_end());
        }
        self.connection.send(&octets);
    }

    /// Serves until the end, or ATRN.
    pub fn run(&mut self, party: &mut dyn SessionHandler) -> SessionEnd {
        match self.serve(party) {
            Ok(end) => end,
            Err(ConnectionClosed(why)) => SessionEnd::Closed(why),
        }
    }

    /// Sends what is left to say, and closes.
    pub fn close(mut self) {
        let _ = self.connection.flush_all(Instant::now() + LAST_REPLY_TIMEOUT);
        self.connection.shutdown();
    }

    fn serve(&mut self, party: &mut dyn SessionHandler) -> Result<SessionEnd, ConnectionClosed> {
        loop {
            let step = match self.read_line()? {
                Some(line) => {
                    self.trace_command(&line);
                    self.flush_before(party);
                    self.server.line(&line, party)
                }
                None => self.server.line_too_long(),
            };
            if self.server.transaction().is_none() {
                self.chunks = None;
            }
            match step {
                ServerStep_::Reply(reply) => {
                    self.log_reply(&reply);
                    self.reply(&reply);
                }
                ServerStep_::Close(reply) => {
                    self.reply(&reply);
                    return Ok(if reply.is_positive() {
                        SessionEnd::Quit
                    } else {
                        SessionEnd::Closed(reply.to_string())
                    });
                }
                ServerStep_::StartTls(reply) => self.start_tls(&reply)?,
                ServerStep_::Data(go_ahead) => self.data(&go_ahead, party)?,
                ServerStep_::Chunk { size, last: _, refused: Some(reply) } => {
                    self.skip(size)?;
                    self.reply(&reply);
                }
                ServerStep_::Chunk { size, last, refused: None } => self.chunk(size, last, party)?,
                ServerStep_::Atrn(domains) => return Ok(SessionEnd::Atrn(domains)),
            }
        }
    }

    fn flush_before(&mut self, party: &dyn SessionHandler) {
        if party.may_wait() {
            // What is wrong with the connection is found out when it is waited for.
            let _ = self.connection.flush();
        }
    }

    /// The next line; `None`: it was too long.
    fn read_line(&mut self) -> Result<Option<Vec<u8>>, ConnectionClosed> {
        let deadline = self.deadline.min(Instant::now() + self.limits.command);
        loop {
            // Before any line is looked for: a hello may have line ends in it.
            if self.connection.secure().is_none() && self.connection.received().starts_with(&[0x16, 0x03]) {
                self.reply(&Reply::new(421, "4.7.0", "TLS begins with STARTTLS on this port"));
                return Err(ConnectionClosed("a TLS hello on a clear port".to_owned()));
            }
            match self.connection.take_line(COMMAND_LINE_LIMIT) {
                Line::Whole(line) => return Ok(Some(line)),
                Line::TooLong => return Ok(None),
                Line::None => {}
            }
            if self.connection.swallowed() > UNTERMINATED_LINE_LIMIT {
                self.reply(&Reply::new(421, "4.7.0", "Too much without a line end"));
                return Err(ConnectionClosed("too much without a line end".to_owned()));
            }
            let cancel = self.limits.cancel.clone();
            self.wait_for_input(deadline, &cancel)?;
        }
    }

    /// Waits for octets, and says why no more will come.
    fn wait_for_input(&mut self, deadline: Instant, cancel: &CancelToken) -> Result<(), ConnectionClosed> {
        // Who does not read his replies is not read either.
        if self.connection.unsent() > CONTENT_BLOCK {
            self.connection.flush_all(deadline)?;
        }
        match self.connection.wait_input(deadline, cancel)? {
            WaitResult::Ready => {}
            WaitResult::Deadline => {
                // RFC 5321 section 3.8.
                self.reply(&Reply::new(421, "4.4.2", "Timeout, closing connection"));
                return Err(ConnectionClosed("timeout".to_owned()));
            }
            WaitResult::Cancelled => {
                self.reply(&Reply::new(421, "4.3.2", "Service shutting down, try again later"));
                return Err(ConnectionClosed("shutting down".to_owned()));
            }
        }
        match self.connection.fill()? {
            Filled::Bytes(_) | Filled::Nothing => Ok(()),
            Filled::End => Err(ConnectionClosed("the client closed the connection".to_owned())),
        }
    }

    /// Logs a command; secrets are blanked.
    fn trace_command(&self, line: &[u8]) {
        if !self.connection.trace.enabled() {
            return;
        }
        // On port 366 a line that is no command may be a secret that came at the wrong time.
        let odmr = self.server.offers_auth();
        let mut words = line.split(|octet| octet.is_ascii_whitespace()).filter(|word| !word.is_empty());
        let (verb, next) = (words.next().unwrap_or_default(), words.next());
        let known = matches!(Verb::of(line), Ok((verb, _)) if verb != Verb::Unknown);
        let blanked;
        let shown: &[u8] = match (self.server.in_auth(), verb.eq_ignore_ascii_case(b"AUTH"), words.next()) {
            (true, _, _) => b"***",
            (false, true, Some(_)) => {
                blanked = [b"AUTH ", next.unwrap_or_default(), b" ***"].concat();
                &blanked
            }
            (false, false, _) if odmr && !known => b"***",
            _ => line,
        };
        self.connection.trace.received(shown);
    }

    /// What an administrator wants to see of the replies.
    fn log_reply(&self, reply: &Reply) {
        let (session, peer) = (&self.connection.trace.id, &self.peer);
        match reply.code() {
            235 => log::info!(
                "event=authenticated session={session} peer={peer} account={}",
                self.server.account().unwrap_or_default()
            ),
            421 | 450..=599 => log::info!("event=refused session={session} peer={peer} reply={:?}", reply.to_string()),
            _ => {}
        }
    }

    /// RFC 3207.
    fn start_tls(&mut self, go_ahead: &Reply) -> Result<(), ConnectionClosed> {
        let Some(tls) = self.tls.clone() else {
            self.reply(&Reply::new(454, "4.7.0", "TLS is not available now"));
            return Ok(());
        };
        // What came behind the command came in clear, and whoever put it there was not the client we
        // shall know by TLS (RFC 3207 section 6, CVE-2011-0411).
        if !self.connection.received().is_empty() {
            return Err(ConnectionClosed("octets behind STARTTLS".to_owned()));
        }
        self.reply(go_ahead);
        self.connection.start_tls_server(&tls, Instant::now() + self.limits.handshake)?;
        self.connection.trace.event("tls");
        self.server.tls_started();
        Ok(())
    }

    fn data(&mut self, go_ahead: &Reply, party: &mut dyn SessionHandler) -> Result<(), ConnectionClosed> {
        let mut receiver = match self.open_sink(party) {
            Ok(receiver) => receiver,
            Err(reply) => {
                self.server.end_transaction();
                self.log_reply(&reply);
                self.reply(&reply);
                return Ok(());
            }
        };
        self.reply(go_ahead);
        let mut content = Unstuffer::new();
        let mut octets = Vec::with_capacity(CONTENT_BLOCK);
        let mut pace = TransferDeadline::new(&self.limits, self.deadline);
        loop {
            octets.clear();
            let fed = content.feed(self.connection.received(), &mut octets);
            self.connection.consume(fed.used);
            receiver.write(&octets, content.size());
            if fed.end {
                break;
            }
            if content.size() > self.server.max_size().saturating_mul(2).max(1 << 26) {
                self.reply(&message_too_large(self.server.max_size()));
                return Err(ConnectionClosed("far more content than permitted".to_owned()));
            }
            let abort = self.limits.abort.clone();
            self.wait_for_input(pace.after(fed.used), &abort)?;
        }
        self.flush_before(party);
        self.finish_message(receiver, content.bare());
        Ok(())
    }

    /// One chunk (RFC 3030 section 2): exactly `size` octets.
    fn chunk(&mut self, size: u64, last: bool, party: &mut dyn SessionHandler) -> Result<(), ConnectionClosed> {
        let (mut content, mut receiver) = match self.chunks.take() {
            Some(begun) => begun,
            None => match self.open_sink(party) {
                Ok(receiver) => (BdatDecoder::new(), receiver),
                Err(reply) => {
                    self.server.chunk_rejected(last);
                    self.log_reply(&reply);
                    self.skip(size)?;
                    self.reply(&reply);
                    return Ok(());
                }
            },
        };
        let mut octets = Vec::with_capacity(CONTENT_BLOCK);
        self.read_exact(size, |piece| {
            octets.clear();
            content.feed(piece, &mut octets);
            receiver.write(&octets, content.size());
        })?;
        if last {
            octets.clear();
            content.finish(&mut octets);
            receiver.write(&octets, content.size());
            self.flush_before(party);
            self.finish_message(receiver, content.bare());
        } else if let Err(reply) = receiver.sink {
            self.server.chunk_rejected(last);
            self.log_reply(&reply);
            self.reply(&reply);
        } else {
            self.reply(&Reply::new(250, "2.0.0", format!("{size} octets received")));
            self.chunks = Some((content, receiver));
        }
        Ok(())
    }

    fn skip(&mut self, size: u64) -> Result<(), ConnectionClosed> {
        self.read_exact(size, |_| {})
    }

    /// Reads exactly so many octets, piece by piece.
    fn read_exact(&mut self, size: u64, mut each: impl FnMut(&[u8])) -> Result<(), ConnectionClosed> {
        let mut left = size;
        let mut pace = TransferDeadline::new(&self.limits, self.deadline);
        while left > 0 {
            let received = self.connection.received();
            let piece = received.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            each(&received[..piece]);
            self.connection.consume(piece);
            left -= piece as u64;
            if left > 0 {
                let abort = self.limits.abort.clone();
                self.wait_for_input(pace.after(piece), &abort)?;
            }
        }
        Ok(())
    }

    fn open_sink(&mut self, party: &mut dyn SessionHandler) -> Result<ContentReceiver, Reply> {
        let secure = self.connection.secure().map(|secure| format!("{} {}", secure.version, secure.cipher));
        let intake = party.receive_message(&self.server, &self.peer, secure.as_deref())?;
        let limit = self.server.max_size();
        Ok(ContentReceiver { sink: Ok(intake), headers: ReceivedCounter::new(), limit })
    }

    /// All content is there: take it or refuse it, in either case for good.
    fn finish_message(&mut self, receiver: ContentReceiver, bare: bool) {
        let reply = receiver.finish(bare, self.limits.hops);
        if reply.is_positive() {
            let (session, peer) = (&self.connection.trace.id, &self.peer);
            log::info!("event=accepted session={session} peer={peer} reply={:?}", reply.to_string());
        } else {
            self.log_reply(&reply);
        }
        self.reply(&reply);
        self.server.end_transaction();
    }
}

/// Content on its way to the party; a refusal is kept until the client has said everything.
struct ContentReceiver {
    sink: Result<Box<dyn MessageSink>, Reply>,
    headers: ReceivedCounter,
    limit: u64,
}

impl ContentReceiver {
    /// `size`: octets on the wire so far.
    fn write(&mut self, octets: &[u8], size: u64) {
        let Ok(intake) = &mut self.sink else { return };
        self.headers.feed(octets);
        if size > self.limit {
            self.sink = Err(message_too_large(self.limit));
        } else if let Err(error) = intake.write(octets) {
            self.sink = Err(storage_failure_reply(&error));
        }
    }

    fn finish(self, bare: bool, hops: usize) -> Reply {
        let intake = match self.sink {
            Ok(intake) => intake,
            Err(reply) => return reply,
        };
        if bare {
            // RFC 5321 section 2.3.8. What one server takes for a line end and another does not is how
            // messages are smuggled.
            return Reply::new(554, "5.6.0", "A CR without LF or an LF without CR stands in the message");
        }
        if self.headers.received() > hops {
            return Reply::new(554, "5.4.6", "Too many hops: this message goes in circles");
        }
        intake.commit().unwrap_or_else(|error| storage_failure_reply(&error))
    }
}

/// RFC 1870 section 6.1: refused before it is sent, where that can be foreseen.
pub fn disk_full_reply() -> Reply {
    Reply::new(452, "4.3.1", "The disk is full, try again later")
}

/// What a failure of the disk means for the client (RFC 1870 section 6.1, RFC 3463 section 3.4).
pub fn storage_failure_reply(error: &io::Error) -> Reply {
    log::error!("event=storage-failed error={:?}", error.to_string());
    match error.kind() {
        io::ErrorKind::StorageFull => disk_full_reply(),
        io::ErrorKind::QuotaExceeded => Reply::new(452, "4.2.2", "The quota is used up, try again later"),
        io::ErrorKind::InvalidInput => Reply::new(452, "4.5.3", "Too many recipients: send it in several transactions"),
        _ => Reply::new(451, "4.3.0", "The message could not be stored, try again later"),
    }
}

/// An address as SMTP writes it (RFC 5321 section 4.1.3).
pub fn address_literal(address: IpAddr) -> String {
    match address.to_canonical() {
        IpAddr::V4(address) => format!("[{address}]"),
        IpAddr::V6(address) => format!("[IPv6:{address}]"),
    }
}

/// How fast content must come: a deadline for each block of it, so that a trickle does not last for ever.
struct TransferDeadline {
    block: Duration,
    session: Instant,
    deadline: Instant,
    octets: usize,
}

impl TransferDeadline {
    fn new(limits: &SessionLimits, session: Instant) -> TransferDeadline {
        TransferDeadline { block: limits.command, session, deadline: Instant::now() + limits.command, octets: 0 }
    }

    /// The deadline after so many octets more.
    fn after(&mut self, octets: usize) -> Instant {
        self.octets += octets;
        if self.octets >= CONTENT_BLOCK {
            self.octets = 0;
            self.deadline = Instant::now() + self.block;
        }
        self.deadline.min(self.session)
    }
}
