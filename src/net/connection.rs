//! One connection: octets and lines, plain or TLS, in both directions.
//!
//! Contract: descriptors are non-blocking; [`Wire::fill`] and [`Wire::flush`] never wait and do a bounded amount of
//! work; deadlines are absolute, so a peer that sends an octet a minute gains nothing. What is said is gathered in
//! [`Wire::out`] and handed over by `flush`. There are two ways to wait:
//!
//! ```text
//! a thread with one wire                   a thread with thousands
//!   loop {                                   loop {
//!     while let a line = take_line { … }       poll(2): each wire with its interest()
//!     wait_input(deadline, stop)  // flushes   writable: flush()
//!     fill()                                   readable: fill(), then all lines
//!   }                                          anything said: flush()
//!                                            }
//! ```
//!
//! For the second way: `interest` is asked after `flush`; an empty one means "do not poll this wire" (poll(2) would
//! report a hang-up for ever); on taking over a wire, look at `received` first; after `fill` said `Bytes`, `ended`
//! tells whether the peer has said that nothing more will come.
//!
//! TLS begins on an empty read buffer only, so no octet crosses STARTTLS (RFC 3207 section 6). An end of the
//! connection without close_notify is an error (RFC 8314 section 3.4), and `shutdown` says ours only when
//! everything before it was handed over.

use std::io::{self, IoSlice, Write};
use std::mem::{self, MaybeUninit};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

pub use crate::net::tls::TlsInfo;
use crate::net::tls::{ClientTls, ServerTls, TlsSession};

/// Octets read from the system in one `fill`.
const READ_SIZE: usize = 64 * 1024;
/// Octets that wait in the read buffer before `fill` reads no more: the peer must wait for us.
const READ_BUFFER_LIMIT: usize = 256 * 1024;
/// Octets handed to the system in one `flush`.
const FLUSH_LIMIT: usize = 256 * 1024;
/// Memory an empty buffer keeps.
const IDLE_CAPACITY: usize = 4 * 1024;

/// One connection.
pub struct Connection {
    /// Who speaks, for the log of the dialogue. The wire itself never uses it.
    pub trace: Trace,
    input: OwnedFd,
    /// Only when another descriptor than `input`.
    output: Option<OwnedFd>,
    tls: Option<Box<TlsSession>>,
    tls_info: Option<TlsInfo>,

    read: Buffer,
    /// So many octets of `read` hold no line end …
    scanned: usize,
    /// … where this tells what was looked for.
    scanned_for: LineEnd,
    discarding: bool,
    discarded: usize,
    /// Octets that came while we were flushing; the next `fill` reports them.
    early_octets: usize,
    /// Nothing more will come.
    ended: bool,
    /// `fill` has said so.
    end_reported: bool,

    /// What was said last …
    out: Vec<u8>,
    /// … behind what is on its way. Two buffers that change places, so that nothing is ever moved up.
    sending: Buffer,
    write_error: Option<io::Error>,
}

/// What one `fill` brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    /// So many octets more in `received`.
    Bytes(usize),
    /// Nothing for now, or the read buffer is full.
    Nothing,
    /// Nothing more will come; for TLS, the peer has said so.
    End,
}

/// The answer to "is there a line?".
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// Not yet.
    None,
    /// A line without its line end.
    Whole(Vec<u8>),
    /// A line longer than the limit. Said once; the rest of it is swallowed.
    TooLong,
}

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitResult {
    /// `fill` has something to say.
    Ready,
    Deadline,
    Cancelled,
}

impl Connection {
    /// A wire over a connected socket.
    pub fn new(socket: OwnedFd, trace: Trace) -> io::Result<Connection> {
        Connection::over(socket, None, trace)
    }

    /// A wire over two descriptors, as UCSPI and inetd-style supervisors pass them.
    pub fn pair(input: OwnedFd, output: OwnedFd, trace: Trace) -> io::Result<Connection> {
        Connection::over(input, Some(output), trace)
    }

    fn over(input: OwnedFd, output: Option<OwnedFd>, trace: Trace) -> io::Result<Connection> {
        for descriptor in [Some(&input), output.as_ref()].into_iter().flatten() {
            let flags = rustix::fs::fcntl_getfl(descriptor)?;
            rustix::fs::fcntl_setfl(descriptor, flags | OFlags::NONBLOCK)?;
            // Writes are gathered here; holding them back again would cost 40 ms each. Pipes have no such thing.
            let _ = rustix::net::sockopt::set_tcp_nodelay(descriptor, true);
        }
        Ok(Connection {
            trace,
            input,
            output,
            tls: None,
            tls_info: None,
            read: Buffer::default(),
            scanned: 0,
            scanned_for: LineEnd::CrLf,
            discarding: false,
            discarded: 0,
            early_octets: 0,
            ended: false,
            end_reported: false,
            out: Vec::new(),
            sending: Buffer::default(),
            write_error: None,
        })
    }

    /// Reads what there is, once, at most 64 KiB, through TLS. Reads nothing while 256 KiB wait in the buffer.
    ///
    /// Errors: the system's; for TLS `InvalidData`, and `UnexpectedEof` for an end without close_notify.
    pub fn fill(&mut self) -> io::Result<Filled> {
        if self.early_octets > 0 {
            return Ok(Filled::Bytes(mem::take(&mut self.early_octets)));
        }
        let filled = self.read_available()?;
        self.end_reported = filled == Filled::End;
        Ok(filled)
    }

    /// Acknowledges at once what has come. A peer that writes its replies one by one with Nagle's algorithm on
    /// (fetchmail) would wait 40 ms for us in each group. Only a hint; elsewhere than on Linux nothing.
    pub fn acknowledge(&self) {
        #[cfg(target_os = "linux")]
        let _ = rustix::net::sockopt::set_tcp_quickack(&self.input, true);
    }

    /// What came and was not yet consumed.
    pub fn received(&self) -> &[u8] {
        self.read.rest()
    }

    /// The first `count` octets of `received` are done with.
    pub fn consume(&mut self, count: usize) {
        self.read.consume(count);
        self.scanned = self.scanned.saturating_sub(count);
    }

    /// The peer will send nothing more than what is in `received`.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// The next line that ends in CRLF; `limit` counts its octets with the CRLF (RFC 5321 section 4.5.3.1) and
    /// is at most 256 KiB. A bare CR or LF stays in the line, for the parser to refuse (RFC 5321 section 2.3.8).
    pub fn take_line(&mut self, limit: usize) -> Line {
        self.take(limit, LineEnd::CrLf)
    }

    /// The next line that ends in CRLF or in a bare LF. For replies only.
    pub fn take_reply_line(&mut self, limit: usize) -> Line {
        self.take(limit, LineEnd::Lf)
    }

    /// Octets of the last line that was too long, so far.
    pub fn swallowed(&self) -> usize {
        self.discarded
    }

    /// What is to be said: append here, then `flush`.
    pub fn out(&mut self) -> &mut Vec<u8> {
        &mut self.out
    }

    /// Appends to `out`, as it is.
    pub fn send(&mut self, octets: &[u8]) {
        self.out.extend_from_slice(octets);
    }

    /// Hands what was said to the system, as much as it takes now and at most some 256 KiB. True: all of it.
    ///
    /// After an error every further call fails with it. What the peer said before may still be read.
    pub fn flush(&mut self) -> io::Result<bool> {
        if let Some(error) = &self.write_error {
            return Err(copy_of(error));
        }
        let result = self.write_pending();
        if let Err(error) = &result {
            self.write_error = Some(copy_of(error));
        }
        result
    }

    /// Octets said but not yet handed to the system; in TLS, some of them counted as sealed.
    pub fn unsent(&self) -> usize {
        let sealed = self.tls.as_ref().map_or(0, |session| session.queued());
        self.out.len() + self.sending.rest().len() + sealed
    }

    /// What poll(2) must wait for: `IN` on `input_fd`, `OUT` on `output_fd`.
    pub fn interest(&self) -> PollFlags {
        let mut wanted = PollFlags::empty();
        if !self.end_reported && self.received().len() < READ_BUFFER_LIMIT {
            wanted |= PollFlags::IN;
        }
        if self.write_error.is_none() && self.unsent() > 0 {
            wanted |= PollFlags::OUT;
        }
        wanted
    }

    pub fn input_fd(&self) -> BorrowedFd<'_> {
        self.input.as_fd()
    }

    /// The same as `input_fd`, but for a `pair`.
    pub fn output_fd(&self) -> BorrowedFd<'_> {
        self.output.as_ref().unwrap_or(&self.input).as_fd()
    }

    /// Waits until `fill` has something to say; meanwhile flushes. Take all lines before.
    ///
    /// A deadline that has passed counts more than octets that have come: a trickle cannot outrun it.
    pub fn wait_input(&mut self, deadline: Instant, cancel: &CancelToken) -> io::Result<WaitResult> {
        loop {
            let broken = self.flush().err();
            if cancel.is_cancelled() {
                return Ok(WaitResult::Cancelled);
            }
            if self.has_input() {
                return Ok(WaitResult::Ready);
            }
            let now = Instant::now();
            if now >= deadline {
                return Ok(WaitResult::Deadline);
            }
            // A peer that no longer listens may have said why (a 421): that comes before our own error.
            let until = if broken.is_some() { now } else { deadline };
            let wanted = self.interest() | PollFlags::IN;
            let ready = self.poll(wanted, Some(cancel), until)?;
            match (ready.cancel, ready.input, broken) {
                (true, _, _) => return Ok(WaitResult::Cancelled),
                (_, true, _) => return Ok(WaitResult::Ready),
                (_, _, Some(error)) => return Err(error),
                _ => {}
            }
        }
    }

    /// Waits until everything was handed to the system. `TimedOut` after `deadline`.
    ///
    /// Reads meanwhile, so that two peers that talk at once do not wait for each other.
    pub fn flush_all(&mut self, deadline: Instant) -> io::Result<()> {
        self.flush_until(deadline, None)
    }

    /// The same; `Interrupted` when told to stop.
    pub fn flush_or_stop(&mut self, deadline: Instant, cancel: &CancelToken) -> io::Result<()> {
        self.flush_until(deadline, Some(cancel))
    }

    fn flush_until(&mut self, deadline: Instant, cancel: Option<&CancelToken>) -> io::Result<()> {
        while !self.flush()? {
            if cancel.is_some_and(CancelToken::is_cancelled) {
                return Err(io::Error::new(io::ErrorKind::Interrupted, "told to stop"));
            }
            let mut wanted = PollFlags::OUT;
            if !self.ended && self.received().len() < READ_BUFFER_LIMIT {
                wanted |= PollFlags::IN;
            }
            let ready = self.poll_or_time_out(wanted, cancel, deadline, "the peer takes no more")?;
            if ready.input
                && let Filled::Bytes(count) = self.read_available()?
            {
                self.early_octets += count;
            }
        }
        Ok(())
    }

    /// Says what is still in `out`, then begins TLS as the side that accepted the connection.
    ///
    /// Errors: `InvalidData` when octets came behind STARTTLS (close then: RFC 3207 section 6) or the handshake
    /// fails, `TimedOut`, the system's. After an error the wire is good for `shutdown` only.
    pub fn start_tls_server(&mut self, tls: &ServerTls, deadline: Instant) -> io::Result<()> {
        self.start_tls(deadline, "TLS", || TlsSession::server(tls))
    }

    /// The same as the side that made the connection. `name`: what the peer's certificate must be for.
    pub fn start_tls_client(&mut self, tls: &ClientTls, name: &str, deadline: Instant) -> io::Result<()> {
        let with = format!("TLS with {name}");
        self.start_tls(deadline, &with, || TlsSession::client(tls, name))
    }

    /// What TLS agreed on, or that there is none.
    pub fn secure(&self) -> Option<&TlsInfo> {
        self.tls_info.as_ref()
    }

    /// Ends the connection in good order, as far as that goes without waiting.
    pub fn shutdown(mut self) {
        // Half of what we said, properly closed, would look like all of it.
        if matches!(self.flush(), Ok(true))
            && let Some(session) = &mut self.tls
        {
            session.close();
            let _ = self.flush();
        }
        let _ = rustix::net::shutdown(self.output_fd(), rustix::net::Shutdown::Write);
        // Closing with octets unread resets the connection, and the peer loses our last words.
        let mut space = [MaybeUninit::uninit(); READ_SIZE];
        for _ in 0..READ_BUFFER_LIMIT / READ_SIZE {
            match rustix::io::read(&self.input, &mut space[..]) {
                Ok((octets, _)) if !octets.is_empty() => {}
                _ => break,
            }
        }
    }
}

/// A word to all who wait: stop. Clones are the same token.
#[derive(Clone, Debug)]
pub struct CancelToken(Arc<Token>);

#[derive(Debug)]
struct Token {
    cancelled: AtomicBool,
    reader: OwnedFd,
    writer: OwnedFd,
}

impl CancelToken {
    pub fn new() -> io::Result<CancelToken> {
        let (reader, writer) = rustix::pipe::pipe()?;
        for end in [&reader, &writer] {
            rustix::io::fcntl_setfd(end, rustix::io::FdFlags::CLOEXEC)?;
        }
        Ok(CancelToken(Arc::new(Token { cancelled: AtomicBool::new(false), reader, writer })))
    }

    pub fn cancel(&self) {
        if !self.0.cancelled.swap(true, Ordering::SeqCst) {
            // One octet that nobody reads: the pipe is readable from now on. It is empty, so this cannot fail.
            let _ = rustix::io::retry_on_intr(|| rustix::io::write(&self.0.writer, &[0]));
        }
    }

    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::SeqCst)
    }

    /// Waits for the word to stop, or until then; says whether it was said.
    pub fn wait_until(&self, deadline: Option<Instant>) -> bool {
        while !self.is_cancelled() {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                break;
            }
            // Rounded up, so that the time has come when it wakes us.
            let timeout = left.map(|left| {
                let millis = i64::try_from(left.as_millis()).unwrap_or(i64::MAX - 1) + 1;
                Timespec { tv_sec: millis / 1000, tv_nsec: millis % 1000 * 1_000_000 }
            });
            let mut polls = [PollFd::from_borrowed_fd(self.fd(), PollFlags::IN)];
            let _ = rustix::event::poll(&mut polls, timeout.as_ref());
        }
        self.is_cancelled()
    }

    /// Readable (`IN`) from `stop` on, for ever. Never read from it.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.reader.as_fd()
    }
}

/// Connects by TCP. `TimedOut` after the deadline, `Interrupted` when told to stop.
pub fn connect(address: SocketAddr, deadline: Instant, cancel: &CancelToken) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &address) {
        // A signal does not end it either; it goes on by itself.
        Err(Errno::INPROGRESS | Errno::INTR) => {}
        other => return other.map(|()| socket).map_err(io::Error::from),
    }
    loop {
        if cancel.is_cancelled() {
            return Err(io::Error::new(io::ErrorKind::Interrupted, "told to stop"));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "no answer"));
        }
        let mut descriptors = [
            PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::OUT),
            PollFd::from_borrowed_fd(cancel.fd(), PollFlags::IN),
        ];
        match rustix::event::poll(&mut descriptors, Timespec::try_from(left).ok().as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if !descriptors[0].revents().is_empty() {
            rustix::net::sockopt::socket_error(&socket)??;
            return Ok(socket);
        }
    }
}

/// Writes the dialogue into the log at debug level: `[id] C: line`. Callers blank secrets before.
#[derive(Clone, Debug)]
pub struct Trace {
    /// Which connection.
    pub id: String,
    /// The letter of this side …
    pub us: char,
    /// … and of the peer: `C` opened the connection, `P` is the provider, `S` any other server.
    pub them: char,
}

impl Trace {
    /// Whether anybody reads it: who has to prepare a line need not, otherwise.
    pub fn enabled(&self) -> bool {
        log::log_enabled!(target: "dialogue", log::Level::Debug)
    }

    /// One line that this side says, with or without its line end.
    pub fn sent(&self, line: &[u8]) {
        self.write(self.us, line);
    }

    /// One line that the peer says.
    pub fn received(&self, line: &[u8]) {
        self.write(self.them, line);
    }

    /// Something that is no line: TLS, the turn.
    pub fn event(&self, event: &str) {
        log::debug!(target: "dialogue", "[{}] == {event} ==", self.id);
    }

    fn write(&self, who: char, line: &[u8]) {
        log::debug!(target: "dialogue", "[{}] {who}: {}", self.id, Printable(line));
    }
}

/// A line for the log: no control character of the peer's reaches a terminal.
struct Printable<'a>(&'a [u8]);

impl std::fmt::Display for Printable<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        use std::fmt::Write;
        let line = self.0.strip_suffix(b"\n").unwrap_or(self.0);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        for chunk in line.utf8_chunks() {
            for character in chunk.valid().chars() {
                match character.is_control() {
                    true => write!(formatter, "{}", character.escape_default())?,
                    false => formatter.write_char(character)?,
                }
            }
            for octet in chunk.invalid() {
                write!(formatter, "\\x{octet:02x}")?;
            }
        }
        Ok(())
    }
}

/// What ends a line.
#[derive(Clone, Copy, PartialEq, Eq)]
enum LineEnd {
    CrLf,
    /// LF, with or without a CR.
    Lf,
}

/// Octets that are used up from the front.
#[derive(Default)]
struct Buffer {
    octets: Vec<u8>,
    start: usize,
}

impl Buffer {
    fn rest(&self) -> &[u8] {
        &self.octets[self.start..]
    }

    fn is_empty(&self) -> bool {
        self.start == self.octets.len()
    }

    fn consume(&mut self, count: usize) {
        self.start = self.octets.len().min(self.start.saturating_add(count));
        if self.is_empty() {
            self.start = 0;
            self.octets.clear();
            if self.octets.capacity() > IDLE_CAPACITY {
                self.octets = Vec::new();
            }
        }
    }

    /// Where to append. Moves the rest up only when it is the smaller part, so each octet moves once at most on
    /// average.
    fn end(&mut self) -> &mut Vec<u8> {
        if self.start > self.rest().len() {
            self.octets.drain(..self.start);
            self.start = 0;
        }
        &mut self.octets
    }
}

/// The output descriptor as rustls wants it: all records of a burst in one system call.
struct Descriptor<'a>(BorrowedFd<'a>);

impl Write for Descriptor<'_> {
    fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(self.0, octets)?)
    }

    fn write_vectored(&mut self, octets: &[IoSlice<'_>]) -> io::Result<usize> {
        Ok(rustix::io::writev(self.0, octets)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What poll(2) found.
struct PollResult {
    input: bool,
    cancel: bool,
}

impl Connection {
    /// `fill` without the octets that came early.
    fn read_available(&mut self) -> io::Result<Filled> {
        if self.at_end()? {
            return Ok(Filled::End);
        }
        if self.received().len() >= READ_BUFFER_LIMIT {
            return Ok(Filled::Nothing);
        }
        let mut space = [MaybeUninit::uninit(); READ_SIZE];
        let octets: &[u8] = match rustix::io::read(&self.input, &mut space[..]) {
            Ok((octets, _)) => octets,
            // An interrupted read is announced again.
            Err(Errno::AGAIN | Errno::INTR) => return Ok(Filled::Nothing),
            Err(error) => return Err(error.into()),
        };
        let read = self.read.end();
        let before = read.len();
        match &mut self.tls {
            None if octets.is_empty() => self.ended = true,
            None => read.extend_from_slice(octets),
            Some(session) if octets.is_empty() => session.end_of_input()?,
            Some(session) => session.feed(octets, read)?,
        }
        match self.read.octets.len() - before {
            0 if self.at_end()? => Ok(Filled::End),
            0 => Ok(Filled::Nothing),
            count => {
                // A close_notify behind these octets is noted now, because poll(2) will not tell of it.
                let _ = self.at_end();
                Ok(Filled::Bytes(count))
            }
        }
    }

    fn at_end(&mut self) -> io::Result<bool> {
        if let Some(session) = &mut self.tls
            && session.ended()?
        {
            self.ended = true;
        }
        Ok(self.ended)
    }

    /// `fill` need not wait for the system.
    fn has_input(&self) -> bool {
        self.early_octets > 0 || self.ended || self.received().len() >= READ_BUFFER_LIMIT
    }

    /// `flush` without the memory of errors.
    fn write_pending(&mut self) -> io::Result<bool> {
        let mut budget = FLUSH_LIMIT;
        loop {
            if self.sending.is_empty() && !self.out.is_empty() {
                mem::swap(&mut self.sending.octets, &mut self.out);
            }
            let written = match self.write_once() {
                Ok(None) => return Ok(true),
                Ok(Some(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(Some(written)) => written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            budget = budget.saturating_sub(written);
            if budget == 0 {
                return Ok(self.unsent() == 0);
            }
        }
    }

    /// One system call. `None`: there is nothing to send.
    fn write_once(&mut self) -> io::Result<Option<usize>> {
        let output = self.output.as_ref().unwrap_or(&self.input);
        let Some(session) = &mut self.tls else {
            if self.sending.is_empty() {
                return Ok(None);
            }
            let written = rustix::io::write(output, self.sending.rest())?;
            self.sending.consume(written);
            return Ok(Some(written));
        };
        // Sealed in full bursts only: topping up after each partial write would make a record of every scrap.
        if !session.wants_write() && !session.handshaking() && !self.sending.is_empty() {
            // The last line is a record of its own: fetchmail waits for the socket while lines it has not read
            // yet stand in the record it has, and would wait for ever.
            let plain = self.sending.rest();
            let last = plain[..plain.len() - 1].iter().rposition(|octet| *octet == b'\n').map_or(0, |at| at + 1);
            let mut sealed = if last > 0 { session.seal(&plain[..last])? } else { 0 };
            if sealed == last {
                sealed += session.seal(&plain[last..])?;
            }
            self.sending.consume(sealed);
        }
        match session.wants_write() {
            true => session.write_to(&mut Descriptor(output.as_fd())).map(Some),
            false => Ok(None),
        }
    }

    fn poll(&self, wanted: PollFlags, cancel: Option<&CancelToken>, until: Instant) -> io::Result<PollResult> {
        let (input, output) = (wanted.contains(PollFlags::IN), wanted.contains(PollFlags::OUT));
        let mut descriptors = Vec::with_capacity(3);
        if input {
            descriptors.push(PollFd::from_borrowed_fd(self.input_fd(), PollFlags::IN));
        }
        if output {
            descriptors.push(PollFd::from_borrowed_fd(self.output_fd(), PollFlags::OUT));
        }
        if let Some(cancel) = cancel {
            descriptors.push(PollFd::from_borrowed_fd(cancel.fd(), PollFlags::IN));
        }
        let left = until.saturating_duration_since(Instant::now());
        // A time too long for the system is no limit.
        let left = Timespec::try_from(left).ok();
        match rustix::event::poll(&mut descriptors, left.as_ref()) {
            Ok(_) => {}
            // As if nothing had happened: the caller looks at its deadline and comes back.
            Err(Errno::INTR) => {
                return Ok(PollResult { input: false, cancel: false });
            }
            Err(error) => return Err(error.into()),
        }
        let happened = |found: &PollFd<'_>| !found.revents().is_empty();
        Ok(PollResult {
            input: input && descriptors.first().is_some_and(happened),
            cancel: cancel.is_some() && descriptors.last().is_some_and(happened),
        })
    }

    fn poll_or_time_out(
        &self,
        wanted: PollFlags,
        cancel: Option<&CancelToken>,
        deadline: Instant,
        what: &str,
    ) -> io::Result<PollResult> {
        if Instant::now() >= deadline {
            return Err(io::Error::new(io::ErrorKind::TimedOut, what));
        }
        self.poll(wanted, cancel, deadline)
    }

    fn start_tls(
        &mut self,
        deadline: Instant,
        what: &str,
        session: impl FnOnce() -> io::Result<TlsSession>,
    ) -> io::Result<()> {
        let refused = |text| Err(io::Error::new(io::ErrorKind::InvalidData, text));
        if self.tls.is_some() {
            return refused("TLS is already on");
        }
        // RFC 3207 section 6: what came in the clear must not be taken for what TLS protects.
        if !self.received().is_empty() || self.discarding {
            return refused("octets in the clear came behind STARTTLS");
        }
        // Nothing is read here: the peer's next octets are TLS.
        while !self.flush()? {
            self.poll_or_time_out(PollFlags::OUT, None, deadline, "the peer takes no more")?;
        }
        self.tls = Some(Box::new(session()?));
        self.handshake(deadline).map_err(|error| io::Error::new(error.kind(), format!("{what}: {error}")))?;
        self.tls_info = self.tls.as_ref().and_then(|session| session.secure());
        Ok(())
    }

    fn handshake(&mut self, deadline: Instant) -> io::Result<()> {
        loop {
            let flushed = match self.flush() {
                Ok(flushed) => flushed,
                // The peer may have said by an alert why it no longer listens.
                Err(error) => return Err(self.read_available().err().unwrap_or(error)),
            };
            let shaking = self.tls.as_ref().is_some_and(|session| session.handshaking());
            let mut wanted = PollFlags::empty();
            wanted.set(PollFlags::IN, shaking);
            wanted.set(PollFlags::OUT, !flushed);
            if wanted.is_empty() {
                return Ok(());
            }
            let late = "the handshake took too long";
            if self.poll_or_time_out(wanted, None, deadline, late)?.input {
                self.read_handshake()?;
            }
        }
    }

    /// One reading of the handshake, with our alert sent if that fails.
    fn read_handshake(&mut self) -> io::Result<()> {
        match self.read_available() {
            Ok(Filled::Bytes(count)) => self.early_octets += count,
            Ok(Filled::Nothing) => {}
            Ok(Filled::End) => return Err(hung_up()),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(hung_up()),
            Err(error) => {
                let _ = self.flush();
                return Err(error);
            }
        }
        Ok(())
    }

    fn take(&mut self, limit: usize, ends: LineEnd) -> Line {
        if self.discarding && !self.discard(ends) {
            return Line::None;
        }
        if self.scanned_for != ends {
            self.scanned = 0;
            self.scanned_for = ends;
        }
        let limit = limit.min(READ_BUFFER_LIMIT);
        let rest = self.read.rest();
        let window = &rest[..rest.len().min(limit)];
        if let Some(end) = line_end(window, self.scanned, ends) {
            let line = &window[..end - 1];
            let line = line.strip_suffix(b"\r").unwrap_or(line).to_vec();
            self.consume(end);
            self.scanned = 0;
            self.discarded = 0;
            return Line::Whole(line);
        }
        self.scanned = window.len();
        if rest.len() < limit {
            return Line::None;
        }
        self.discarding = true;
        self.discarded = 0;
        self.discard(ends);
        Line::TooLong
    }

    /// Drops the rest of a line that was too long; true when its end was found.
    fn discard(&mut self, ends: LineEnd) -> bool {
        let rest = self.read.rest();
        let end = line_end(rest, 0, ends);
        // A CR at the very end may be half of the line end.
        let kept = usize::from(rest.last() == Some(&b'\r'));
        let dropped = end.unwrap_or(rest.len() - kept);
        self.consume(dropped);
        self.scanned = 0;
        self.discarded += dropped;
        self.discarding = end.is_none();
        end.is_some()
    }
}

/// Where the first line of `octets` ends: the index behind its LF. The first `scanned` octets hold no end.
fn line_end(octets: &[u8], scanned: usize, ends: LineEnd) -> Option<usize> {
    let mut at = scanned.min(octets.len());
    while let Some(found) = octets[at..].iter().position(|&octet| octet == b'\n') {
        at += found + 1;
        if ends == LineEnd::Lf || (at >= 2 && octets[at - 2] == b'\r') {
            return Some(at);
        }
    }
    None
}

fn copy_of(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(code) => io::Error::from_raw_os_error(code),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}

fn hung_up() -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "the peer closed the connection in the handshake: does it speak TLS here, and trust this side?",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::tls::{self, Trust};
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;
    use std::thread;
    use std::time::Duration;

    const NAME: &str = "relay.example.net";

    fn trace() -> Trace {
        let id = "1".to_string();
        Trace { id, us: 'P', them: 'C' }
    }

    fn connection(socket: impl Into<OwnedFd>) -> Connection {
        Connection::new(socket.into(), trace()).unwrap()
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    fn in_millis(count: u64) -> Instant {
        Instant::now() + Duration::from_millis(count)
    }

    fn unix() -> (UnixStream, UnixStream) {
        UnixStream::pair().unwrap()
    }

    fn tcp() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (one, listener.accept().unwrap().0)
    }

    fn sides() -> (ServerTls, ClientTls) {
        let (certificate, key) = tls::self_signed(&[NAME]).unwrap();
        let pin = tls::fingerprint(&certificate).unwrap();
        (tls::server_from_pem(&certificate, &key).unwrap(), tls::client_config(&Trust::Pin(pin)).unwrap())
    }

    /// Both wires with TLS on: server, client.
    fn secured(server: impl Into<OwnedFd>, client: impl Into<OwnedFd>) -> (Connection, Connection) {
        let (accepting, connecting) = sides();
        let (mut server, mut client) = (connection(server), connection(client));
        thread::scope(|scope| {
            scope.spawn(|| server.start_tls_server(&accepting, soon()).unwrap());
            client.start_tls_client(&connecting, NAME, soon()).unwrap();
        });
        (server, client)
    }

    /// A wire pair of each kind.
    fn each_kind() -> Vec<(Connection, Connection)> {
        let ((a, b), (c, d), (e, f)) = (unix(), tcp(), unix());
        vec![(connection(a), connection(b)), secured(c, d), secured(e, f)]
    }

    fn next_line(connection: &mut Connection) -> Line {
        let cancel = CancelToken::new().unwrap();
        loop {
            match connection.take_line(1000) {
                Line::None => {}
                line => return line,
            }
            assert_eq!(connection.wait_input(soon(), &cancel).unwrap(), WaitResult::Ready);
            assert_ne!(connection.fill().unwrap(), Filled::End);
        }
    }

    /// Reads until `count` octets came, as a polling thread would.
    fn gather(connection: &mut Connection, count: usize) -> Vec<u8> {
        let (mut heard, cancel) = (Vec::new(), CancelToken::new().unwrap());
        while heard.len() < count {
            assert_eq!(connection.wait_input(soon(), &cancel).unwrap(), WaitResult::Ready);
            connection.fill().unwrap();
            heard.extend_from_slice(connection.received());
            connection.consume(usize::MAX);
        }
        heard
    }

    fn text(count: usize) -> Vec<u8> {
        (0..count).map(|index| (index % 251) as u8).collect()
    }

    fn whole(line: &[u8]) -> Line {
        Line::Whole(line.to_vec())
    }

    /// Feeds `input` cut at every place; the lines must be the same.
    fn check_lines(input: &[u8], limit: usize, ends: LineEnd, expected: &[Line]) {
        for cut in 0..=input.len() {
            let (peer, ours) = unix();
            let (mut peer, mut ours) = (connection(peer), connection(ours));
            let mut lines = Vec::new();
            for part in [&input[..cut], &input[cut..]] {
                peer.send(part);
                assert!(peer.flush().unwrap());
                ours.fill().unwrap();
                loop {
                    match ours.take(limit, ends) {
                        Line::None => break,
                        line => lines.push(line),
                    }
                }
            }
            assert_eq!(lines, expected, "cut at {cut}");
        }
    }

    #[test]
    fn only_crlf_ends_a_line() {
        let lines = [whole(b"NOOP"), whole(b""), whole(b"a\nb\rc"), whole(b"d\r")];
        check_lines(b"NOOP\r\n\r\na\nb\rc\r\nd\r\r\nrest", 20, LineEnd::CrLf, &lines);
    }

    #[test]
    fn a_bare_lf_ends_a_reply() {
        let lines = [whole(b"250-a"), whole(b"250 b"), whole(b"")];
        check_lines(b"250-a\n250 b\r\n\nrest", 20, LineEnd::Lf, &lines);
    }

    #[test]
    fn a_line_that_is_too_long_is_said_once_and_swallowed() {
        let lines = [whole(b"12345678"), Line::TooLong, whole(b"NOOP"), Line::TooLong, whole(b"x")];
        check_lines(
            b"12345678\r\n123456789\r\nNOOP\r\n12345678901234\n5678901\r234567890\r\nx\r\n",
            10,
            LineEnd::CrLf,
            &lines,
        );
    }

    #[test]
    fn a_line_without_end_is_counted_and_not_kept() {
        let (peer, ours) = unix();
        let (mut peer, mut ours) = (connection(peer), connection(ours));
        for round in 0..40 {
            peer.send(&[b'x'; 50_000]);
            peer.flush().unwrap();
            while let Filled::Bytes(_) = ours.fill().unwrap() {}
            let expected = if round == 0 { Line::TooLong } else { Line::None };
            assert_eq!(ours.take_line(1000), expected);
            assert!(ours.received().is_empty());
        }
        assert_eq!(ours.swallowed(), 2_000_000);
        peer.send(b"\r\nQUIT\r\n");
        peer.flush().unwrap();
        ours.fill().unwrap();
        assert_eq!(ours.take_line(1000), whole(b"QUIT"));
        assert_eq!(ours.swallowed(), 0);
    }

    #[test]
    fn lines_pass_both_ways_in_every_kind() {
        for (mut one, mut other) in each_kind() {
            for _ in 0..3 {
                one.send(b"250-a\r\n250 b\r\n");
                assert!(one.flush().unwrap());
                assert_eq!(next_line(&mut other), whole(b"250-a"));
                assert_eq!(next_line(&mut other), whole(b"250 b"));
                other.send(b"RSET\r\n");
                assert!(other.flush().unwrap());
                assert_eq!(next_line(&mut one), whole(b"RSET"));
                assert_eq!(one.fill().unwrap(), Filled::Nothing);
            }
        }
    }

    #[test]
    fn waiting_flushes_first() {
        for (mut one, mut other) in each_kind() {
            thread::scope(|scope| {
                scope.spawn(|| {
                    one.send(b"250 go on\r\n");
                    assert_eq!(next_line(&mut one), whole(b"NOOP"));
                });
                assert_eq!(next_line(&mut other), whole(b"250 go on"));
                other.send(b"NOOP\r\n");
                other.flush_all(soon()).unwrap();
            });
        }
    }

    #[test]
    fn a_peer_that_does_not_read_does_not_hold_us() {
        let sent = text(8_000_000);
        for (mut one, mut other) in each_kind() {
            one.send(&sent);
            let mut rounds = 0;
            let mut before = usize::MAX;
            while one.unsent() < before {
                before = one.unsent();
                assert!(!one.flush().unwrap());
                rounds += 1;
            }
            assert!(rounds < 100 && one.unsent() > 1_000_000);
            assert!(one.interest().contains(PollFlags::OUT));
            let late = one.flush_all(in_millis(50)).unwrap_err();
            assert_eq!(late.kind(), io::ErrorKind::TimedOut);
            let heard = thread::scope(|scope| {
                scope.spawn(|| one.flush_all(soon()).unwrap());
                gather(&mut other, sent.len())
            });
            assert!(heard == sent);
            assert_eq!(one.unsent(), 0);
            assert_eq!(one.interest(), PollFlags::IN);
        }
    }

    #[test]
    fn two_that_talk_at_once_do_not_wait_for_each_other() {
        // More than the sockets' own buffers take, and less than makes a reader pause.
        for (mut one, mut other) in each_kind() {
            let sent = text(READ_BUFFER_LIMIT);
            let talk = |connection: &mut Connection| {
                connection.send(&sent);
                connection.flush_all(soon()).unwrap();
                assert!(gather(connection, sent.len()) == sent);
            };
            thread::scope(|scope| {
                scope.spawn(|| talk(&mut one));
                talk(&mut other);
            });
        }
    }

    #[test]
    fn a_full_read_buffer_makes_the_peer_wait() {
        for (mut one, mut other) in each_kind() {
            one.send(&text(4_000_000));
            for _ in 0..100 {
                one.flush().unwrap();
                other.fill().unwrap();
            }
            let kept = other.received().len();
            assert!((READ_BUFFER_LIMIT..READ_BUFFER_LIMIT + READ_SIZE).contains(&kept), "{kept}");
            assert_eq!(other.fill().unwrap(), Filled::Nothing);
            assert!(!other.interest().contains(PollFlags::IN));
            other.consume(kept);
            assert!(other.interest().contains(PollFlags::IN));
            assert!(matches!(other.fill().unwrap(), Filled::Bytes(_)));
        }
    }

    #[test]
    fn an_idle_wire_keeps_little_memory() {
        for (mut one, mut other) in each_kind() {
            let sent = text(300_000);
            one.send(&sent);
            thread::scope(|scope| {
                scope.spawn(|| one.flush_all(soon()).unwrap());
                gather(&mut other, sent.len());
            });
            let kept = other.read.octets.capacity() + one.out.capacity();
            assert!(kept + one.sending.octets.capacity() <= 3 * IDLE_CAPACITY);
        }
    }

    #[test]
    fn a_trickle_does_not_outrun_the_deadline() {
        let (peer, ours) = unix();
        let cancel = CancelToken::new().unwrap();
        let trickle = thread::spawn(move || {
            for _ in 0..500 {
                if (&peer).write_all(b"x").is_err() {
                    return;
                }
                thread::sleep(Duration::from_millis(10));
            }
        });
        let mut ours = connection(ours);
        let (start, deadline) = (Instant::now(), in_millis(100));
        while ours.wait_input(deadline, &cancel).unwrap() == WaitResult::Ready {
            assert_ne!(ours.fill().unwrap(), Filled::End);
            assert_eq!(ours.take_line(1000), Line::None);
        }
        assert!(start.elapsed() >= Duration::from_millis(100));
        drop(ours);
        trickle.join().unwrap();
    }

    #[test]
    fn stop_wakes_all_who_wait() {
        let cancel = CancelToken::new().unwrap();
        let pairs = [unix(), unix()];
        thread::scope(|scope| {
            for (_, ours) in &pairs {
                let cancel = cancel.clone();
                scope.spawn(move || {
                    let mut ours = connection(ours.try_clone().unwrap());
                    assert_eq!(ours.wait_input(soon(), &cancel).unwrap(), WaitResult::Cancelled);
                });
            }
            thread::sleep(Duration::from_millis(20));
            assert!(!cancel.is_cancelled());
            cancel.cancel();
            cancel.cancel();
        });
        let mut found = [PollFd::from_borrowed_fd(cancel.fd(), PollFlags::IN)];
        assert_eq!(rustix::event::poll(&mut found, None).unwrap(), 1);
        assert!(found[0].revents().contains(PollFlags::IN));
    }

    #[test]
    fn a_shutdown_is_an_end_in_every_kind() {
        for (mut one, mut other) in each_kind() {
            one.send(b"221 bye\r\n");
            one.shutdown();
            assert_eq!(next_line(&mut other), whole(b"221 bye"));
            let cancel = CancelToken::new().unwrap();
            assert_eq!(other.wait_input(soon(), &cancel).unwrap(), WaitResult::Ready);
            for _ in 0..2 {
                assert_eq!(other.fill().unwrap(), Filled::End);
            }
            assert!(other.ended());
            assert_eq!(other.interest(), PollFlags::empty());
        }
    }

    #[test]
    fn a_tls_connection_cut_short_is_an_error() {
        let (a, b) = unix();
        let (mut one, mut other) = secured(a, b);
        one.send(b"250 ok\r\n");
        one.flush().unwrap();
        drop(one);
        assert_eq!(next_line(&mut other), whole(b"250 ok"));
        for _ in 0..2 {
            let error = other.fill().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        }
    }

    #[test]
    fn half_of_what_was_said_is_not_closed_properly() {
        let (a, b) = unix();
        let (mut one, mut other) = secured(a, b);
        one.send(&text(4_000_000));
        one.shutdown();
        let error = loop {
            match other.fill() {
                Ok(Filled::Bytes(count)) => other.consume(count),
                Ok(found) => assert_eq!(found, Filled::Nothing),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn last_words_survive_what_we_did_not_read() {
        let (a, b) = tcp();
        let (mut one, mut other) = (connection(a), connection(b));
        other.send(&text(100_000));
        other.flush().unwrap();
        thread::sleep(Duration::from_millis(20));
        one.send(b"421 closing\r\n");
        one.shutdown();
        assert_eq!(next_line(&mut other), whole(b"421 closing"));
    }

    #[test]
    fn a_farewell_comes_before_our_own_broken_pipe() {
        let (peer, ours) = unix();
        (&peer).write_all(b"421 closing\r\n").unwrap();
        drop(peer);
        let mut ours = connection(ours);
        ours.send(b"NOOP\r\n");
        assert_eq!(next_line(&mut ours), whole(b"421 closing"));
        assert!(ours.flush().is_err());
        assert_eq!(ours.interest(), PollFlags::IN);
    }

    #[test]
    fn two_pipes_make_a_wire() {
        let (theirs, output) = rustix::pipe::pipe().unwrap();
        let (input, peer) = rustix::pipe::pipe().unwrap();
        let mut ours = Connection::pair(input, output, trace()).unwrap();
        rustix::io::write(&peer, b"NOOP\r\n").unwrap();
        ours.send(b"250 ok\r\n");
        assert_eq!(next_line(&mut ours), whole(b"NOOP"));
        let mut heard = [0; 8];
        rustix::io::read(&theirs, &mut heard).unwrap();
        assert_eq!(&heard, b"250 ok\r\n");
        drop(peer);
        assert_eq!(ours.fill().unwrap(), Filled::End);
        ours.send(&[b'x'; 1_000_000]);
        assert!(!ours.flush().unwrap());
        drop(theirs);
        assert_eq!(ours.flush().unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn octets_behind_starttls_are_refused_on_both_sides() {
        let (accepting, connecting) = sides();
        for said in [&b"STARTTLS\r\nEHLO evil\r\n"[..], b"STARTTLS\r\n\r\n"] {
            let (peer, ours) = unix();
            let mut ours = connection(ours);
            (&peer).write_all(said).unwrap();
            ours.fill().unwrap();
            assert_eq!(ours.take_line(1000), whole(b"STARTTLS"));
            let error = ours.start_tls_server(&accepting, soon()).unwrap_err();
            assert!(error.to_string().contains("behind STARTTLS"), "{error}");
            let error = ours.start_tls_client(&connecting, NAME, soon()).unwrap_err();
            assert!(error.to_string().contains("behind STARTTLS"), "{error}");
            assert!(ours.secure().is_none());
        }
    }

    #[test]
    fn octets_in_the_clear_that_come_later_spoil_the_handshake() {
        let (accepting, _) = sides();
        let (peer, ours) = unix();
        let mut ours = connection(ours);
        ours.send(b"220 go\r\n");
        (&peer).write_all(b"EHLO evil\r\n").unwrap();
        let error = ours.start_tls_server(&accepting, soon()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        let mut heard = [0; 8];
        (&peer).read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"220 go\r\n");
    }

    #[test]
    fn what_comes_right_behind_the_handshake_is_not_lost() {
        let (accepting, connecting) = sides();
        let (a, b) = unix();
        let (mut server, mut client) = (connection(a), connection(b));
        thread::scope(|scope| {
            scope.spawn(|| {
                client.start_tls_client(&connecting, NAME, soon()).unwrap();
                client.send(b"EHLO example.org\r\n");
                client.flush().unwrap();
            });
            server.start_tls_server(&accepting, soon()).unwrap();
            assert_eq!(next_line(&mut server), whole(b"EHLO example.org"));
        });
        assert!(server.start_tls_server(&accepting, soon()).is_err());
    }

    #[test]
    fn the_handshake_has_a_deadline_and_says_what_is_wrong() {
        let (accepting, connecting) = sides();
        let (_peer, ours) = unix();
        let error = connection(ours).start_tls_server(&accepting, in_millis(50)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let (peer, ours) = unix();
        drop(peer);
        let error = connection(ours).start_tls_client(&connecting, NAME, soon()).unwrap_err();
        assert!(error.to_string().starts_with("TLS with relay.example.net: "), "{error}");
        let (peer, ours) = tcp();
        (&peer).write_all(b"220 plain\r\n").unwrap();
        let error = connection(ours).start_tls_client(&connecting, NAME, soon()).unwrap_err();
        assert!(error.to_string().contains("not TLS"), "{error}");
    }

    #[test]
    fn a_refused_certificate_is_told_on_both_sides() {
        let (accepting, _) = sides();
        let (_, stranger) = sides();
        let (a, b) = tcp();
        let (mut server, mut client) = (connection(a), connection(b));
        thread::scope(|scope| {
            scope.spawn(|| {
                let error = client.start_tls_client(&stranger, NAME, soon()).unwrap_err();
                assert!(error.to_string().contains("`pin`"), "{error}");
                client.shutdown();
            });
            let error = server.start_tls_server(&accepting, soon()).unwrap_err();
            assert!(error.to_string().contains("refused this side's certificate"), "{error}");
        });
    }

    #[test]
    fn tls_1_2_works_over_a_wire() {
        let (certificate, key) = tls::self_signed(&[NAME]).unwrap();
        let pin = Trust::Pin(tls::fingerprint(&certificate).unwrap());
        let accepting = tls::server_from_pem(&certificate, &key).unwrap();
        let connecting = tls::client_tls12(&pin).unwrap();
        let (a, b) = tcp();
        let (mut server, mut client) = (connection(a), connection(b));
        thread::scope(|scope| {
            scope.spawn(|| server.start_tls_server(&accepting, soon()).unwrap());
            client.start_tls_client(&connecting, NAME, soon()).unwrap();
        });
        assert_eq!(server.secure().unwrap().version, "TLSv1.2");
        assert_eq!(server.secure(), client.secure());
        server.send(b"220 hello\r\n");
        server.shutdown();
        assert_eq!(next_line(&mut client), whole(b"220 hello"));
        assert_eq!(client.fill().unwrap(), Filled::End);
    }

    /// Carries octets one at a time.
    fn trickle(mut from: UnixStream, mut to: UnixStream) {
        let mut octet = [0];
        while let Ok(1) = from.read(&mut octet) {
            if to.write_all(&octet).is_err() {
                return;
            }
        }
        let _ = to.shutdown(std::net::Shutdown::Write);
    }

    #[test]
    fn tls_octet_by_octet() {
        let ((a, b), (c, d)) = (unix(), unix());
        let (b2, c2) = (b.try_clone().unwrap(), c.try_clone().unwrap());
        thread::scope(|scope| {
            scope.spawn(|| trickle(b, c));
            scope.spawn(|| trickle(c2, b2));
            let (mut server, mut client) = secured(a, d);
            server.send(b"220 hello\r\n");
            server.flush().unwrap();
            assert_eq!(next_line(&mut client), whole(b"220 hello"));
            client.send(b"QUIT\r\n");
            client.shutdown();
            assert_eq!(next_line(&mut server), whole(b"QUIT"));
            let cancel = CancelToken::new().unwrap();
            while server.fill().unwrap() != Filled::End {
                assert_eq!(server.wait_input(soon(), &cancel).unwrap(), WaitResult::Ready);
            }
        });
    }

    #[test]
    fn the_log_shows_no_control_characters() {
        let shown = Printable(b"MAIL FROM:<\xc3\xa9@a>\x1b[2J\xff\r\n").to_string();
        assert_eq!(shown, "MAIL FROM:<é@a>\\u{1b}[2J\\xff");
    }
}
