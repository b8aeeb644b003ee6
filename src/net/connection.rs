//! One connection: octets and lines in both directions, in clear or under TLS.
//!
//! The contract:
//!
//! - Descriptors are non-blocking. [`Connection::fill`] and [`Connection::flush`] never wait, and one call does a
//!   bounded amount of work: no peer can keep a thread busy.
//! - Deadlines are absolute: a peer that sends one octet a minute does not extend them.
//! - [`Connection::send`] only collects octets; [`Connection::flush`] gives them to the system.
//!
//! There are two ways to wait:
//!
//! ```text
//! a thread with one connection             a thread with thousands
//!   loop {                                   loop {
//!     while let a line = take_line { … }       poll(2): each connection with its interest()
//!     wait_input(deadline, cancel) // flushes  writable: flush()
//!     fill()                                   readable: fill(), then take all lines
//!   }                                          after send(): flush()
//!                                            }
//! ```
//!
//! A thread with thousands asks for `interest` after `flush`. If it is empty, it does not poll the connection:
//! poll(2) would report a hang-up for ever. When it gets a connection from another thread it first looks at
//! `received`; and after `fill` returned `Bytes` it asks `ended` whether the peer will send more.
//!
//! TLS begins only if the read buffer is empty, so no octet sent in clear is taken for one under TLS (RFC 3207
//! section 6). An end of the connection without close_notify is an error (RFC 8314 section 3.4). `shutdown` sends
//! close_notify only if everything before it was sent.

use std::io::{self, IoSlice, Write};
use std::mem::{self, MaybeUninit};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::net::cancel::CancelToken;
use crate::net::tls::{ClientTls, ServerTls, TlsInfo, TlsSession};
use crate::net::trace::Trace;

/// Octets read from the system in one `fill`.
const READ_SIZE: usize = 64 * 1024;
/// If this many octets wait in the read buffer `fill` reads no more, so that the peer must wait for us.
const READ_BUFFER_LIMIT: usize = 256 * 1024;
/// Octets given to the system in one `flush`.
const FLUSH_LIMIT: usize = 256 * 1024;
/// An empty buffer larger than this is freed: thousands of idle connections must not keep what one burst needed.
const IDLE_CAPACITY: usize = 4 * 1024;

/// One connection.
pub struct Connection {
    /// The log of the dialogue. It travels with the connection; nothing here writes to it.
    pub trace: Trace,
    input: OwnedFd,
    /// `None`: the same descriptor as `input`.
    output: Option<OwnedFd>,
    tls: Option<Box<TlsSession>>,
    tls_info: Option<TlsInfo>,

    read: Buffer,
    /// The first octets of `read` that hold no line end of the kind `scanned_for`, so that no octet is searched twice.
    scanned: usize,
    scanned_for: LineEnd,
    /// The rest of a line that was too long is being discarded.
    discarding: bool,
    discarded: usize,
    /// Octets read during `flush_all` or the handshake; the next `fill` reports them.
    early_octets: usize,
    /// The peer will send nothing more.
    ended: bool,
    /// `fill` has returned `End`.
    end_reported: bool,

    /// Octets that wait for those in `sending`. The two buffers change places, so that octets are never moved.
    out: Vec<u8>,
    sending: Buffer,
    write_error: Option<io::Error>,
}

/// What one `fill` found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    /// `received` has this many octets more.
    Bytes(usize),
    /// No octets at the moment, or the read buffer is full.
    Nothing,
    /// The peer will send nothing more; under TLS, it has sent close_notify.
    End,
}

/// What `take_line` found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// No complete line yet.
    None,
    /// A line without its line end.
    Whole(Vec<u8>),
    /// A line longer than the limit. Reported once; the rest of the line is discarded.
    TooLong,
}

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitResult {
    /// `fill` has something to report.
    Ready,
    Deadline,
    Cancelled,
}

impl Connection {
    /// A connection over a connected socket.
    pub fn new(socket: OwnedFd, trace: Trace) -> io::Result<Connection> {
        Connection::over(socket, None, trace)
    }

    /// A connection over two descriptors, as UCSPI and inetd-style supervisors pass them.
    pub fn pair(input: OwnedFd, output: OwnedFd, trace: Trace) -> io::Result<Connection> {
        Connection::over(input, Some(output), trace)
    }

    fn over(input: OwnedFd, output: Option<OwnedFd>, trace: Trace) -> io::Result<Connection> {
        for descriptor in [Some(&input), output.as_ref()].into_iter().flatten() {
            let flags = rustix::fs::fcntl_getfl(descriptor)?;
            rustix::fs::fcntl_setfl(descriptor, flags | OFlags::NONBLOCK)?;
            // Writes are already collected here; Nagle's algorithm would delay each by 40 ms. A pipe has no such option.
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

    /// What TLS has negotiated; `None`: the connection is in clear.
    pub fn tls_info(&self) -> Option<&TlsInfo> {
        self.tls_info.as_ref()
    }

    /// The descriptor to poll for `IN`.
    pub fn input_fd(&self) -> BorrowedFd<'_> {
        self.input.as_fd()
    }

    /// The descriptor to poll for `OUT`: the same as `input_fd`, except in a `pair`.
    pub fn output_fd(&self) -> BorrowedFd<'_> {
        self.output.as_ref().unwrap_or(&self.input).as_fd()
    }

    /// Closes the connection in good order, as far as that is possible without waiting.
    pub fn shutdown(mut self) {
        // A close_notify after half of our octets would make the peer believe that it has all of them.
        if matches!(self.flush(), Ok(true))
            && let Some(session) = &mut self.tls
        {
            session.close();
            let _ = self.flush();
        }
        let _ = rustix::net::shutdown(self.output_fd(), rustix::net::Shutdown::Write);
        // If a socket is closed with octets unread, the system resets the connection, and the peer may lose our last
        // reply.
        let mut space = [MaybeUninit::uninit(); READ_SIZE];
        for _ in 0..READ_BUFFER_LIMIT / READ_SIZE {
            match rustix::io::read(&self.input, &mut space[..]) {
                Ok((octets, _)) if !octets.is_empty() => {}
                _ => break,
            }
        }
    }
}

/// Input: octets.
impl Connection {
    /// Reads what has come: once, 64 KiB at most, through TLS. Reads nothing while 256 KiB wait in the buffer.
    ///
    /// # Errors
    ///
    /// The system's; under TLS `InvalidData`, and `UnexpectedEof` for an end without close_notify.
    pub fn fill(&mut self) -> io::Result<Filled> {
        if self.early_octets > 0 {
            return Ok(Filled::Bytes(mem::take(&mut self.early_octets)));
        }
        let filled = self.read_available()?;
        self.end_reported = filled == Filled::End;
        Ok(filled)
    }

    /// `fill`, but for the octets that were read early.
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
            // After an interrupted read poll(2) reports the octets again.
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
                // Note a close_notify that came with these octets now: poll(2) will not report it.
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

    /// Acknowledges at once what has come. A peer that writes its replies one by one and leaves Nagle's algorithm on
    /// (fetchmail) would otherwise wait 40 ms in each group. A hint only; on other systems than Linux it does nothing.
    pub fn acknowledge(&self) {
        #[cfg(target_os = "linux")]
        let _ = rustix::net::sockopt::set_tcp_quickack(&self.input, true);
    }

    /// The octets that have come and are not yet consumed.
    pub fn received(&self) -> &[u8] {
        self.read.rest()
    }

    /// Removes the first `count` octets of `received`; all, if there are fewer.
    pub fn consume(&mut self, count: usize) {
        self.read.consume(count);
        self.scanned = self.scanned.saturating_sub(count);
    }

    /// Whether the peer will send nothing more than what is in `received`.
    pub fn ended(&self) -> bool {
        self.ended
    }
}

/// Input: lines.
impl Connection {
    /// The next line that ends in CRLF. `limit` counts its octets with the CRLF (RFC 5321 section 4.5.3.1) and is
    /// 256 KiB at most. A bare CR or LF stays in the line, so that the parser rejects it (RFC 5321 section 2.3.8).
    pub fn take_line(&mut self, limit: usize) -> Line {
        self.take(limit, LineEnd::CrLf)
    }

    /// The next line that ends in CRLF or in a bare LF: for replies only, which some servers end so.
    pub fn take_reply_line(&mut self, limit: usize) -> Line {
        self.take(limit, LineEnd::Lf)
    }

    /// The number of octets discarded so far of the last line that was too long; 0 after a line that was not.
    pub fn discarded(&self) -> usize {
        self.discarded
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

    /// Discards the rest of a line that was too long. True: its end was found.
    fn discard(&mut self, ends: LineEnd) -> bool {
        let rest = self.read.rest();
        let end = line_end(rest, 0, ends);
        // A CR at the very end may be the first half of a CRLF.
        let kept = usize::from(rest.last() == Some(&b'\r'));
        let discarded = end.unwrap_or(rest.len() - kept);
        self.consume(discarded);
        self.scanned = 0;
        self.discarded += discarded;
        self.discarding = end.is_none();
        end.is_some()
    }
}

/// Output.
impl Connection {
    /// The octets to send: append here, then `flush`.
    pub fn out(&mut self) -> &mut Vec<u8> {
        &mut self.out
    }

    /// Appends to `out`.
    pub fn send(&mut self, octets: &[u8]) {
        self.out.extend_from_slice(octets);
    }

    /// Gives octets to the system: as many as it accepts without waiting, and about 256 KiB at most. Returns whether
    /// that was all.
    ///
    /// # Errors
    ///
    /// The system's or rustls'. After an error every further call returns the same error; what the peer has sent can
    /// still be read.
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

    /// Octets not yet given to the system. Under TLS some of them are counted in their encrypted form.
    pub fn unsent(&self) -> usize {
        let sealed = self.tls.as_ref().map_or(0, |session| session.unsent());
        self.out.len() + self.sending.rest().len() + sealed
    }

    /// `flush`, but for the stored error.
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

    /// One system call. Returns the octets that the system accepted; `None`: there is nothing to send.
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
        // Seal only when everything sealed was sent: topping up after each partial write would make a TLS record of
        // every few octets.
        if !session.wants_write() && !session.handshaking() && !self.sending.is_empty() {
            // The last line gets a record of its own: fetchmail waits for its socket while lines that it has not read
            // are in the record it has, and would wait for ever.
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
}

/// Waiting.
impl Connection {
    /// What to poll for: `IN` on `input_fd`, `OUT` on `output_fd`, both or neither.
    pub fn interest(&self) -> PollFlags {
        let mut interest = PollFlags::empty();
        if !self.end_reported && self.received().len() < READ_BUFFER_LIMIT {
            interest |= PollFlags::IN;
        }
        if self.write_error.is_none() && self.unsent() > 0 {
            interest |= PollFlags::OUT;
        }
        interest
    }

    /// Waits until `fill` has something to report, and flushes meanwhile. Take all lines before: this does not look at
    /// octets that were already reported.
    ///
    /// If the deadline has passed the result is `Deadline`, also if octets have come: a peer that sends them slowly
    /// cannot extend it.
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
            // A peer that closed may have sent the reason (a 421): read that before our own error is returned.
            let until = if broken.is_some() { now } else { deadline };
            let ready = self.poll(self.interest() | PollFlags::IN, Some(cancel), until)?;
            match (ready.cancel, ready.input, broken) {
                (true, _, _) => return Ok(WaitResult::Cancelled),
                (_, true, _) => return Ok(WaitResult::Ready),
                (_, _, Some(error)) => return Err(error),
                _ => {}
            }
        }
    }

    /// Whether `fill` has something to report without the system.
    fn has_input(&self) -> bool {
        self.early_octets > 0 || self.ended || self.received().len() >= READ_BUFFER_LIMIT
    }

    /// Waits until everything was given to the system. Reads meanwhile, so that two peers that both send do not wait
    /// for each other.
    ///
    /// # Errors
    ///
    /// `TimedOut` after the deadline; the errors of `flush` and `fill`.
    pub fn flush_all(&mut self, deadline: Instant) -> io::Result<()> {
        self.flush_until(deadline, None)
    }

    /// [`Connection::flush_all`]; the error is `Interrupted` if `cancel` is cancelled.
    pub fn flush_all_or_cancel(&mut self, deadline: Instant, cancel: &CancelToken) -> io::Result<()> {
        self.flush_until(deadline, Some(cancel))
    }

    fn flush_until(&mut self, deadline: Instant, cancel: Option<&CancelToken>) -> io::Result<()> {
        while !self.flush()? {
            if cancel.is_some_and(CancelToken::is_cancelled) {
                return Err(cancelled());
            }
            let mut interest = PollFlags::OUT;
            if !self.ended && self.received().len() < READ_BUFFER_LIMIT {
                interest |= PollFlags::IN;
            }
            let ready = self.poll_or_time_out(interest, cancel, deadline, "the peer does not read")?;
            if ready.input
                && let Filled::Bytes(count) = self.read_available()?
            {
                self.early_octets += count;
            }
        }
        Ok(())
    }

    fn poll_or_time_out(
        &self, interest: PollFlags, cancel: Option<&CancelToken>, deadline: Instant, late: &str,
    ) -> io::Result<PollResult> {
        if Instant::now() >= deadline {
            return Err(io::Error::new(io::ErrorKind::TimedOut, late));
        }
        self.poll(interest, cancel, deadline)
    }

    /// One poll(2), until `until` at most. If a signal interrupts it nothing is ready: the caller checks its deadline
    /// and comes back.
    fn poll(&self, interest: PollFlags, cancel: Option<&CancelToken>, until: Instant) -> io::Result<PollResult> {
        let input = interest.contains(PollFlags::IN);
        let mut descriptors = Vec::with_capacity(3);
        if input {
            descriptors.push(PollFd::from_borrowed_fd(self.input_fd(), PollFlags::IN));
        }
        if interest.contains(PollFlags::OUT) {
            descriptors.push(PollFd::from_borrowed_fd(self.output_fd(), PollFlags::OUT));
        }
        if let Some(cancel) = cancel {
            descriptors.push(PollFd::from_borrowed_fd(cancel.fd(), PollFlags::IN));
        }
        // A time too long for the system becomes no limit.
        let left = Timespec::try_from(until.saturating_duration_since(Instant::now())).ok();
        match rustix::event::poll(&mut descriptors, left.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(PollResult { input: false, cancel: false }),
            Err(error) => return Err(error.into()),
        }
        let ready = |descriptor: &PollFd<'_>| !descriptor.revents().is_empty();
        Ok(PollResult {
            input: input && descriptors.first().is_some_and(ready),
            cancel: cancel.is_some() && descriptors.last().is_some_and(ready),
        })
    }
}

/// TLS.
impl Connection {
    /// Sends what is in `out`, then begins TLS as the side that accepted the connection.
    ///
    /// # Errors
    ///
    /// `InvalidData` if octets came after STARTTLS (RFC 3207 section 6) or the handshake fails, `TimedOut` after the
    /// deadline, the system's. After an error the connection is good for `shutdown` only.
    pub fn start_tls_server(&mut self, tls: &ServerTls, deadline: Instant) -> io::Result<()> {
        self.start_tls(deadline, "TLS", || TlsSession::server(tls))
    }

    /// [`Connection::start_tls_server`] as the side that made the connection. `name`: the domain name or IP address
    /// that the peer's certificate must be for.
    pub fn start_tls_client(&mut self, tls: &ClientTls, name: &str, deadline: Instant) -> io::Result<()> {
        let what = format!("TLS with {name}");
        self.start_tls(deadline, &what, || TlsSession::client(tls, name))
    }

    fn start_tls(
        &mut self, deadline: Instant, what: &str, session: impl FnOnce() -> io::Result<TlsSession>,
    ) -> io::Result<()> {
        let invalid = |text| Err(io::Error::new(io::ErrorKind::InvalidData, text));
        if self.tls.is_some() {
            return invalid("TLS has already begun");
        }
        // RFC 3207 section 6: octets sent in clear must not be taken for octets under TLS.
        if !self.received().is_empty() || self.discarding {
            return invalid("octets in clear came after STARTTLS");
        }
        // Read nothing here: the next octets of the peer are TLS.
        while !self.flush()? {
            self.poll_or_time_out(PollFlags::OUT, None, deadline, "the peer does not read")?;
        }
        self.tls = Some(Box::new(session()?));
        self.handshake(deadline).map_err(|error| io::Error::new(error.kind(), format!("{what}: {error}")))?;
        self.tls_info = self.tls.as_ref().and_then(|session| session.info());
        Ok(())
    }

    fn handshake(&mut self, deadline: Instant) -> io::Result<()> {
        loop {
            let flushed = match self.flush() {
                Ok(flushed) => flushed,
                // A peer that closed may have sent an alert with the reason.
                Err(error) => return Err(self.read_available().err().unwrap_or(error)),
            };
            let mut interest = PollFlags::empty();
            interest.set(PollFlags::IN, self.tls.as_ref().is_some_and(|session| session.handshaking()));
            interest.set(PollFlags::OUT, !flushed);
            if interest.is_empty() {
                return Ok(());
            }
            if self.poll_or_time_out(interest, None, deadline, "the handshake took too long")?.input {
                self.read_handshake()?;
            }
        }
    }

    /// Reads once in the handshake. If that fails our alert is sent, which tells the peer why.
    fn read_handshake(&mut self) -> io::Result<()> {
        match self.read_available() {
            Ok(Filled::Bytes(count)) => self.early_octets += count,
            Ok(Filled::Nothing) => {}
            Ok(Filled::End) => return Err(closed_in_handshake()),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(closed_in_handshake()),
            Err(error) => {
                let _ = self.flush();
                return Err(error);
            }
        }
        Ok(())
    }
}

/// Connects by TCP.
///
/// # Errors
///
/// `TimedOut` after the deadline, `Interrupted` if `cancel` is cancelled, the system's.
pub fn connect(address: SocketAddr, deadline: Instant, cancel: &CancelToken) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &address) {
        // A signal does not stop it: the system goes on connecting.
        Err(Errno::INPROGRESS | Errno::INTR) => {}
        other => return other.map(|()| socket).map_err(io::Error::from),
    }
    loop {
        if cancel.is_cancelled() {
            return Err(cancelled());
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

/// What poll(2) found.
struct PollResult {
    input: bool,
    cancel: bool,
}

/// What ends a line.
#[derive(Clone, Copy, PartialEq, Eq)]
enum LineEnd {
    CrLf,
    /// LF, with or without a CR.
    Lf,
}

/// Where the first line of `octets` ends: the index after its LF. The first `scanned` octets hold no line end.
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

/// Octets that are consumed from the front.
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

    /// Where to append. Moves the rest to the front only if it is the smaller part, so that each octet is moved once at
    /// most on average.
    fn end(&mut self) -> &mut Vec<u8> {
        if self.start > self.rest().len() {
            self.octets.drain(..self.start);
            self.start = 0;
        }
        &mut self.octets
    }
}

/// The output descriptor as rustls needs it, so that all records of a burst are written in one system call.
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

fn copy_of(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(code) => io::Error::from_raw_os_error(code),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}

fn cancelled() -> io::Error {
    io::Error::new(io::ErrorKind::Interrupted, "cancelled")
}

fn closed_in_handshake() -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "the peer closed the connection in the handshake: does it offer TLS here, and trust this side?",
    )
}

#[cfg(test)]
mod tests;
