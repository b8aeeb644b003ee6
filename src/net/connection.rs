//! One connection: octets and lines in both directions, in clear or under TLS.
//!
//! - No call on a descriptor waits (see [`Descriptor`]). [`Connection::fill`] and [`Connection::flush`] never wait, and one
//!   call does a limited amount of work: no peer can keep a thread busy.
//! - Deadlines are absolute: a peer that sends one octet a minute does not extend them.
//! - [`Connection::send`] only collects octets; [`Connection::flush`] gives them to the system.
//!
//! There are two ways to wait:
//!
//! ```text
//! a thread with one connection             a thread with thousands (`net/poller`)
//!   loop {                                   loop {
//!     while let a line = take_line { … }       Poller::wait
//!     wait_input(deadline, cancel) // flushes  ready: fill() until drained(), then take all lines
//!     fill()                                   ready, or after send(): flush() until all is sent, or congested()
//!   }                                        }
//! ```
//!
//! The poller reports only descriptors that *become* ready. So a thread with thousands must return to a connection that is
//! neither `drained` nor `congested` without a report. When it gets a connection from another thread, it must look at
//! `received` first; and after each `fill` it must ask `ended` whether the peer will send more.
//!
//! TLS begins only if the read buffer is empty, so that no octet sent in clear counts as sent under TLS (RFC 3207
//! section 6). An end of the connection without close_notify is an error (RFC 8314 section 3.4). `shutdown`, and the drop of a
//! connection, send close_notify only if everything before it was sent. After an error of TLS the peer gets an alert with the
//! reason (RFC 8446 section 6.2): `start_tls_…` and `close` wait up to 2 seconds for the peer to read it, the others do not.

use std::io::{self, Write};
use std::mem::{self, MaybeUninit};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType};

use crate::net::cancel::{self, CancelToken};
use crate::net::descriptor::Descriptor;
use crate::net::tls::{CertificateInfo, ClientTls, ServerTls, TlsInfo, TlsSession};
use crate::net::trace::Trace;
use crate::platform;
use crate::sasl::TlsChannel;
use crate::threads::{self, Guarded};

/// Octets read from the system in one `fill`.
const READ_SIZE: usize = 64 * 1024;
/// If the read buffer has this many octets, `fill` reads no more, so that the peer must wait.
const READ_BUFFER_LIMIT: usize = 256 * 1024;
/// Octets given to the system in one `flush`.
const FLUSH_LIMIT: usize = 256 * 1024;
/// Spaces for a read that are not freed while no thread reads.
const SPARE_SPACE_LIMIT: usize = 4;
/// An empty buffer larger than this is freed: otherwise thousands of idle connections would hold the memory of one burst.
const IDLE_CAPACITY: usize = 4 * 1024;

/// How long to wait, after an error of TLS, for the peer to read our alert and to close.
const ALERT_TIMEOUT: Duration = Duration::from_secs(2);

/// One connection.
pub struct Connection {
    /// The log of the dialogue, for the driver; this file does not write to it.
    pub trace: Trace,
    input: Descriptor,
    /// `None`: the same descriptor as `input`.
    output: Option<Descriptor>,
    tls: Option<Box<TlsSession>>,
    /// TLS has ended with an error, and no call has waited for the peer to read our alert.
    tls_failed: bool,
    read: Buffer,
    /// The octets of a line that was too long that were discarded so far; `None`: none is being discarded.
    discarding: Option<usize>,
    /// Octets read during `flush_all` or the handshake; the next `fill` reports them.
    early_octets: usize,
    /// The last read has read all octets that had arrived.
    drained: bool,
    /// No octets will follow those in `read`.
    ended: bool,
    /// The error that has ended the input.
    read_error: Option<io::Error>,
    out: Buffer,
    /// At the last flush the system accepted no more octets.
    congested: bool,
    write_error: Option<io::Error>,
}

/// The result of one `fill`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    /// `received` has this many more octets.
    Bytes(usize),
    /// No octets have arrived, or the read buffer is full.
    Nothing,
    /// The peer will send nothing more; under TLS, it has sent close_notify.
    End,
}

/// The result of `take_line`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// No complete line yet.
    None,
    /// A line without its line end.
    Whole(Vec<u8>),
    /// A line longer than the limit: reported once; the rest of the line is discarded.
    TooLong,
}

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitResult {
    /// `fill` has something to report.
    Ready,
    /// The deadline has passed.
    Deadline,
    /// The token was cancelled.
    Cancelled,
}

impl Connection {
    /// Returns a connection over a connected socket that only this process has.
    ///
    /// # Errors
    ///
    /// The system's errors from making the descriptor non-blocking.
    pub fn new(socket: OwnedFd, trace: Trace) -> io::Result<Connection> {
        Connection::accepted(Arc::new(socket), trace)
    }

    /// [`Connection::new`] over a socket that the limiter shares, so that it can shut it down.
    ///
    /// # Errors
    ///
    /// Those of [`Connection::new`].
    pub fn accepted(socket: Arc<OwnedFd>, trace: Trace) -> io::Result<Connection> {
        Ok(Connection::with(Descriptor::own(socket)?, None, trace))
    }

    /// Returns a connection over two descriptors that another process has opened, as UCSPI and inetd pass them; over one if
    /// `output` is `None`. Their flags stay unchanged.
    pub fn over(input: OwnedFd, output: Option<OwnedFd>, trace: Trace) -> Connection {
        Connection::with(Descriptor::shared(input), output.map(Descriptor::shared), trace)
    }

    fn with(input: Descriptor, output: Option<Descriptor>, trace: Trace) -> Connection {
        for descriptor in [Some(&input), output.as_ref()].into_iter().flatten() {
            // Writes are collected here already, and Nagle's algorithm would delay each by 40 ms. A pipe has no such option.
            let _ = rustix::net::sockopt::set_tcp_nodelay(descriptor, true);
        }
        Connection {
            trace,
            input,
            output,
            tls: None,
            tls_failed: false,
            read: Buffer::default(),
            discarding: None,
            early_octets: 0,
            drained: false,
            ended: false,
            read_error: None,
            out: Buffer::default(),
            congested: false,
            write_error: None,
        }
    }

    /// Returns the TLS version and cipher; `None`: the connection is in clear.
    pub fn tls_info(&self) -> Option<TlsInfo> {
        self.tls.as_ref()?.info()
    }

    /// Returns the certificate that the peer has sent; `None`: it has sent none.
    pub fn peer_certificate(&self) -> Option<CertificateInfo> {
        self.tls.as_ref()?.peer_certificate()
    }

    /// Returns the properties of TLS that an authentication may use; `None`: the connection is in clear.
    pub fn tls_channel(&self) -> Option<TlsChannel> {
        Some(self.tls.as_ref()?.channel())
    }

    /// Returns whether TLS has begun.
    pub fn is_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// Returns the descriptor to poll for `IN`.
    pub fn input_fd(&self) -> BorrowedFd<'_> {
        self.input.as_fd()
    }

    /// Returns the same descriptor for a wait in which the connection cannot be borrowed.
    pub fn share_input(&self) -> Arc<OwnedFd> {
        self.input.share()
    }

    /// Returns the descriptor to poll for `OUT`: the same as `input_fd`, unless there are two.
    pub fn output_fd(&self) -> BorrowedFd<'_> {
        self.output.as_ref().unwrap_or(&self.input).as_fd()
    }

    /// Returns the one or two descriptors that a poller watches.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        [Some(&self.input), self.output.as_ref()].into_iter().flatten().map(AsFd::as_fd)
    }

    /// Closes the connection. After an error of TLS it waits for the peer to read our alert, for 2 seconds at most;
    /// otherwise it does not wait.
    pub fn close(mut self) {
        self.deliver_alert(Instant::now() + ALERT_TIMEOUT);
        self.shutdown();
    }

    /// Closes the connection like [`Connection::close`], but never waits: after an error of TLS another thread does.
    pub fn close_without_waiting(mut self) {
        if !self.tls_failed {
            return self.shutdown();
        }
        // If no thread can be started, the alert is at least sent.
        let _ = self.flush();
        let _ = threads::spawn("close", move || self.close());
    }

    /// After an error of TLS: sends our alert and nothing else, and reads until the peer closes the connection or the deadline
    /// has passed. If a socket is closed with octets unread, or more arrive, the system resets the connection, and the peer
    /// may lose the alert.
    fn deliver_alert(&mut self, deadline: Instant) {
        if !mem::take(&mut self.tls_failed) {
            return;
        }
        while let Ok(false) = self.flush() {
            if self.poll_or_time_out(PollFlags::OUT, None, deadline, "").is_err() {
                return;
            }
        }
        let _ = rustix::net::shutdown(self.output_fd(), rustix::net::Shutdown::Write);
        while self.poll_or_time_out(PollFlags::IN, None, deadline, "").is_ok() {
            match rustix::io::read(&self.input, &mut ReadSpace::take().0[..]) {
                Ok(([], _)) => return,
                Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }

    /// Sends what the system accepts and closes the connection, without waiting.
    pub fn shutdown(mut self) {
        let _ = self.flush();
        self.end();
    }

    /// Ends TLS and the connection, without waiting. Octets that were not sent are discarded.
    fn end(&mut self) {
        // If not all octets were sent, a close_notify would make the peer believe that it has all of them.
        if let (0, Some(session)) = (self.unsent(), &mut self.tls) {
            session.close();
            let _ = self.flush();
        }
        let _ = rustix::net::shutdown(self.output_fd(), rustix::net::Shutdown::Write);
        // If a socket is closed with octets unread, the system resets the connection, and the peer may lose our last reply.
        let mut space = ReadSpace::take();
        let mut left = READ_BUFFER_LIMIT;
        while left > 0
            && let Ok(octets) = self.input.read(&mut space.0)
            && !octets.is_empty()
        {
            left = left.saturating_sub(octets.len());
        }
    }
}

/// A session that has failed, by a 421 of the peer for example, drops its connection. The peer still gets close_notify (RFC
/// 8446 section 6.1), but no octets that are queued: they may be the end of a message that counts as deferred.
impl Drop for Connection {
    fn drop(&mut self) {
        if self.tls.is_some() {
            self.end();
        }
    }
}

/// Input: octets.
impl Connection {
    /// Reads octets that have arrived, once, 64 KiB at most, and decrypts them under TLS. Reads nothing while the buffer has
    /// 256 KiB.
    ///
    /// # Errors
    ///
    /// The errors of the system; under TLS `InvalidData`, and `UnexpectedEof` for an end without close_notify. Octets before
    /// the error are reported first.
    pub fn fill(&mut self) -> io::Result<Filled> {
        match mem::take(&mut self.early_octets) {
            0 => self.read_available(),
            count => Ok(Filled::Bytes(count)),
        }
    }

    /// `fill` without the octets that were read early.
    fn read_available(&mut self) -> io::Result<Filled> {
        if self.at_end()? {
            return Ok(Filled::End);
        }
        if self.received().len() >= READ_BUFFER_LIMIT {
            return Ok(Filled::Nothing);
        }
        let mut space = ReadSpace::take();
        let octets = match self.input.read(&mut space.0) {
            Ok(octets) => octets,
            // After an interrupted read the octets are not read yet.
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                self.drained = error.kind() == io::ErrorKind::WouldBlock;
                return Ok(Filled::Nothing);
            }
            Err(error) => return Err(error),
        };
        self.drained = octets.len() < READ_SIZE;
        let read = self.read.end();
        let before = read.len();
        let decrypted = match &mut self.tls {
            None => {
                self.ended = octets.is_empty();
                read.extend_from_slice(octets);
                Ok(())
            }
            Some(session) if octets.is_empty() => session.end_of_input(),
            Some(session) => {
                let fed = session.feed(octets, read);
                // rustls has no alert to send if the peer has sent one.
                self.tls_failed |= fed.is_err() && session.wants_write();
                fed
            }
        };
        if let Err(error) = decrypted {
            // Nothing can be decrypted after that.
            (self.ended, self.read_error) = (true, Some(copy(&error)));
            if self.read.octets.len() == before {
                return Err(error);
            }
        }
        match self.read.octets.len() - before {
            0 if self.at_end()? => Ok(Filled::End),
            0 => Ok(Filled::Nothing),
            count => {
                // A close_notify may have arrived with these octets: the poller will not report it again.
                let _ = self.at_end();
                Ok(Filled::Bytes(count))
            }
        }
    }

    fn at_end(&mut self) -> io::Result<bool> {
        if let Some(error) = &self.read_error {
            return Err(copy(error));
        }
        if let Some(session) = &mut self.tls {
            self.ended |= session.ended()?;
        }
        Ok(self.ended)
    }

    /// Makes the system acknowledge at once what has arrived. A peer that writes its replies one by one and uses Nagle's
    /// algorithm (fetchmail) would otherwise wait 40 ms in each group. On other systems than Linux it does nothing.
    pub fn acknowledge(&self) {
        #[cfg(target_os = "linux")]
        let _ = rustix::net::sockopt::set_tcp_quickack(&self.input, true);
    }

    /// Returns the octets that were read and not yet consumed.
    pub fn received(&self) -> &[u8] {
        self.read.rest()
    }

    /// Removes the first `count` octets of `received`; if there are fewer, all.
    pub fn consume(&mut self, count: usize) {
        self.read.consume(count);
    }

    /// Returns whether the last `fill` has read all octets that had arrived. The end of the connection may have arrived, too.
    pub fn drained(&self) -> bool {
        self.drained
    }

    /// Returns whether no octets will follow those in `received`.
    pub fn ended(&self) -> bool {
        self.ended
    }
}

/// Input: lines.
impl Connection {
    /// Removes and returns the next line that ends in CRLF. `limit`: its octets with the CRLF (RFC 5321 section 4.5.3.1), at
    /// most 256 KiB. A bare CR or LF stays in the line, so that the parser rejects it (RFC 5321 section 2.3.8).
    pub fn take_line(&mut self, limit: usize) -> Line {
        self.take(limit, LineEnd::CrLf)
    }

    /// Like [`Connection::take_line`], but a bare LF ends a line, too: for replies only, because some servers send it.
    pub fn take_reply_line(&mut self, limit: usize) -> Line {
        self.take(limit, LineEnd::Lf)
    }

    /// Returns how many octets of a line that is too long were discarded; 0 after its end was found.
    pub fn discarded(&self) -> usize {
        self.discarding.unwrap_or(0)
    }

    /// An incomplete line is searched again from its beginning when more of it has arrived; `limit` limits that work.
    fn take(&mut self, limit: usize, ends: LineEnd) -> Line {
        if self.discarding.is_some() && !self.discard(ends) {
            return Line::None;
        }
        let limit = limit.min(READ_BUFFER_LIMIT);
        let rest = self.received();
        let window = &rest[..rest.len().min(limit)];
        if let Some(end) = line_end(window, ends) {
            let line = &window[..end - 1];
            let line = line.strip_suffix(b"\r").unwrap_or(line).to_vec();
            self.consume(end);
            return Line::Whole(line);
        }
        if rest.len() < limit {
            return Line::None;
        }
        self.discard(ends);
        Line::TooLong
    }

    /// Discards the rest of a line that was too long. Returns whether its end was found.
    fn discard(&mut self, ends: LineEnd) -> bool {
        let rest = self.received();
        let end = line_end(rest, ends);
        // A CR at the very end may be the first half of a CRLF.
        let left = usize::from(rest.ends_with(b"\r"));
        let count = end.unwrap_or(rest.len() - left);
        self.consume(count);
        self.discarding = if end.is_some() { None } else { Some(self.discarded() + count) };
        end.is_some()
    }
}

/// Output.
impl Connection {
    /// Returns the buffer of octets to send, to append more. Its first octets may have been sent already.
    pub fn out(&mut self) -> &mut Vec<u8> {
        self.out.end()
    }

    /// Appends to the octets to send.
    pub fn send(&mut self, octets: &[u8]) {
        self.out().extend_from_slice(octets);
    }

    /// Gives octets to the system: as many as it accepts without waiting, and about 256 KiB at most. Returns whether
    /// none are left.
    ///
    /// # Errors
    ///
    /// The errors of the system and of rustls. After an error each call returns the same error; the octets of the peer can
    /// still be read.
    pub fn flush(&mut self) -> io::Result<bool> {
        let result = self.write_error.take().map_or_else(|| self.write_pending(), Err);
        result.inspect_err(|error| self.write_error = Some(copy(error)))
    }

    /// Returns the number of octets that were not yet given to the system; under TLS some are counted in encrypted form.
    pub fn unsent(&self) -> usize {
        self.out.rest().len() + self.tls.as_ref().map_or(0, |session| session.unsent())
    }

    /// Returns whether the last `flush` ended because the system accepted no more octets: wait until it does.
    pub fn congested(&self) -> bool {
        self.congested
    }

    /// `flush` without the stored error.
    fn write_pending(&mut self) -> io::Result<bool> {
        let mut budget = FLUSH_LIMIT;
        self.congested = false;
        while budget > 0 {
            match self.write_once() {
                Ok(None) => return Ok(true),
                Ok(Some(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(Some(written)) => budget = budget.saturating_sub(written),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.congested = true;
                    return Ok(false);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(self.unsent() == 0)
    }

    /// Writes by one system call. Returns how many octets the system accepted; `None`: there is nothing to send.
    fn write_once(&mut self) -> io::Result<Option<usize>> {
        let mut output = self.output.as_ref().unwrap_or(&self.input);
        let plain = self.out.rest();
        let Some(session) = &mut self.tls else {
            if plain.is_empty() {
                return Ok(None);
            }
            let written = output.write(plain)?;
            self.out.consume(written);
            return Ok(Some(written));
        };
        // Seal only after all sealed octets were sent: to seal more after each partial write would make very small records.
        if !session.wants_write() && !session.handshaking() && !plain.is_empty() {
            // The last line gets a record of its own. fetchmail waits for its socket even if its TLS library has decrypted
            // lines that it has not read, and would wait for ever.
            let last = plain[..plain.len() - 1].iter().rposition(|octet| *octet == b'\n').map_or(0, |at| at + 1);
            let mut sealed = if last > 0 { session.seal(&plain[..last])? } else { 0 };
            if sealed == last {
                sealed += session.seal(&plain[last..])?;
            }
            self.out.consume(sealed);
        }
        session.wants_write().then(|| session.write_to(&mut output)).transpose()
    }
}

/// Waiting.
impl Connection {
    /// Returns the flags to poll for: `IN` on `input_fd`, `OUT` on `output_fd`, both or neither.
    pub fn interest(&self) -> PollFlags {
        let mut interest = PollFlags::empty();
        interest.set(PollFlags::IN, !self.ended && self.received().len() < READ_BUFFER_LIMIT);
        interest.set(PollFlags::OUT, self.write_error.is_none() && self.unsent() > 0);
        interest
    }

    /// Waits until `fill` has something to report, and flushes during the wait. Take all lines first: this function
    /// does not look at octets that `fill` has already reported.
    ///
    /// If the deadline has passed, the result is `Deadline`, even if octets have arrived: a peer that sends slowly cannot
    /// extend it.
    ///
    /// # Errors
    ///
    /// The errors of `flush`, but only if there is nothing to read; the errors of the system.
    pub fn wait_input(&mut self, deadline: Instant, cancel: &CancelToken) -> io::Result<WaitResult> {
        loop {
            let broken = self.flush().err();
            if cancel.is_cancelled() {
                return Ok(WaitResult::Cancelled);
            }
            if self.early_octets > 0 || self.ended || self.received().len() >= READ_BUFFER_LIMIT {
                return Ok(WaitResult::Ready);
            }
            let now = Instant::now();
            if now >= deadline {
                return Ok(WaitResult::Deadline);
            }
            // A peer that has closed may have sent 421 before: that must be read before our own error is returned.
            let until = if broken.is_some() { now } else { deadline };
            let ready = self.poll(self.interest() | PollFlags::IN, Some(cancel), until)?;
            match broken {
                _ if cancel.is_cancelled() => return Ok(WaitResult::Cancelled),
                _ if ready => return Ok(WaitResult::Ready),
                Some(error) => return Err(error),
                None => {}
            }
        }
    }

    /// Waits until all octets were given to the system. Reads during the wait, so that two peers that both send do not
    /// wait for each other (RFC 2920 section 3.1).
    ///
    /// # Errors
    ///
    /// `TimedOut` after the deadline; `Interrupted` if `cancel` is cancelled; the errors of `flush` and `fill`.
    pub fn flush_all(&mut self, deadline: Instant, cancel: Option<&CancelToken>) -> io::Result<()> {
        while !self.flush_or_wait(deadline, cancel)? {}
        Ok(())
    }

    /// One step of [`Connection::flush_all`]: flushes, and waits once if octets are left. Returns whether all were given to
    /// the system.
    ///
    /// # Errors
    ///
    /// Those of [`Connection::flush_all`].
    pub fn flush_or_wait(&mut self, deadline: Instant, cancel: Option<&CancelToken>) -> io::Result<bool> {
        if self.flush()? {
            return Ok(true);
        }
        cancel.map_or(Ok(()), CancelToken::check)?;
        if self.poll_or_time_out(self.interest(), cancel, deadline, "the peer does not read")? {
            self.read_early()?;
        }
        Ok(false)
    }

    /// Reads octets that the next `fill` reports.
    fn read_early(&mut self) -> io::Result<Filled> {
        let filled = self.read_available()?;
        if let Filled::Bytes(count) = filled {
            self.early_octets += count;
        }
        Ok(filled)
    }

    fn poll_or_time_out(
        &self, interest: PollFlags, cancel: Option<&CancelToken>, deadline: Instant, late: &str,
    ) -> io::Result<bool> {
        if Instant::now() >= deadline {
            return Err(io::Error::new(io::ErrorKind::TimedOut, late));
        }
        self.poll(interest, cancel, deadline)
    }

    /// Calls poll(2) once, until `until` at most. Returns whether there is something to read.
    fn poll(&self, interest: PollFlags, cancel: Option<&CancelToken>, until: Instant) -> io::Result<bool> {
        let mut descriptors = Vec::with_capacity(3);
        for (fd, flag) in [(self.input_fd(), PollFlags::IN), (self.output_fd(), PollFlags::OUT)] {
            if interest.contains(flag) {
                descriptors.push(PollFd::from_borrowed_fd(fd, flag));
            }
        }
        descriptors.extend(cancel.map(|cancel| PollFd::from_borrowed_fd(cancel.fd(), PollFlags::IN)));
        cancel::poll(&mut descriptors, Some(until))?;
        Ok(interest.contains(PollFlags::IN) && !descriptors[0].revents().is_empty())
    }
}

/// TLS.
impl Connection {
    /// Sends the octets that wait, then begins TLS as the side that has accepted the connection.
    ///
    /// # Errors
    ///
    /// `InvalidData` if octets have arrived after STARTTLS (RFC 3207 section 6) or the handshake fails, `TimedOut` after the
    /// deadline, the errors of the system. After an error only `close` and `shutdown` may be called.
    pub fn start_tls_server(&mut self, tls: &ServerTls, deadline: Instant) -> io::Result<()> {
        self.start_tls(TlsSession::server(tls), deadline, None, "TLS")
    }

    /// Begins TLS like [`Connection::start_tls_server`], as the side that has made the connection. `name`: the domain name or
    /// IP address that the peer's certificate must have.
    ///
    /// # Errors
    ///
    /// Those of [`Connection::start_tls_server`]; `Interrupted` if `cancel` is cancelled.
    pub fn start_tls_client(
        &mut self, tls: &ClientTls, name: &str, deadline: Instant, cancel: Option<&CancelToken>,
    ) -> io::Result<()> {
        self.start_tls(TlsSession::client(tls, name), deadline, cancel, &format!("TLS with {name}"))
    }

    /// `what`: the beginning of the text of an error of the handshake.
    fn start_tls(
        &mut self, session: io::Result<Box<TlsSession>>, deadline: Instant, cancel: Option<&CancelToken>, what: &str,
    ) -> io::Result<()> {
        let invalid = |text| Err(io::Error::new(io::ErrorKind::InvalidData, text));
        if self.tls.is_some() {
            return invalid("TLS has already begun");
        }
        // RFC 3207 section 6: octets sent in clear must not count as sent under TLS.
        if !self.received().is_empty() || self.discarding.is_some() {
            return invalid("octets in clear arrived after STARTTLS");
        }
        // Nothing may be read here: the next octets of the peer are TLS.
        while !self.flush()? {
            cancel.map_or(Ok(()), CancelToken::check)?;
            self.poll_or_time_out(PollFlags::OUT, cancel, deadline, "the peer does not read")?;
        }
        self.tls = Some(session?);
        self.handshake(deadline, cancel).map_err(|error| io::Error::new(error.kind(), format!("{what}: {error}")))
    }

    fn handshake(&mut self, deadline: Instant, cancel: Option<&CancelToken>) -> io::Result<()> {
        loop {
            cancel.map_or(Ok(()), CancelToken::check)?;
            // A peer that has closed may have sent an alert with the reason before.
            let flushed = self.flush().map_err(|error| self.read_available().err().unwrap_or(error))?;
            let mut interest = PollFlags::empty();
            interest.set(PollFlags::IN, self.tls.as_ref().is_some_and(|session| session.handshaking()));
            interest.set(PollFlags::OUT, !flushed);
            if interest.is_empty() {
                return Ok(());
            }
            if !self.poll_or_time_out(interest, cancel, deadline, "the handshake took too long")? {
                continue;
            }
            match self.read_early() {
                Ok(Filled::Bytes(_) | Filled::Nothing) => {}
                Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => {
                    // Our alert tells the peer why the handshake failed.
                    self.deliver_alert(deadline.min(Instant::now() + ALERT_TIMEOUT));
                    return Err(error);
                }
                Ok(Filled::End) | Err(_) => {
                    let text =
                        "the peer closed the connection in the handshake: does it offer TLS here, and trust this side?";
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
                }
            }
        }
    }
}

/// Connects by TCP. Returns the socket, which is non-blocking.
///
/// # Errors
///
/// `TimedOut` after the deadline, `Interrupted` if `cancel` is cancelled, the errors of the system.
pub fn connect(address: SocketAddr, deadline: Instant, cancel: Option<&CancelToken>) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = platform::socket(family, SocketType::STREAM)?;
    match rustix::net::connect(&socket, &address) {
        // After a signal the system continues to connect.
        Err(Errno::INPROGRESS | Errno::INTR) => {}
        other => return other.map(|()| socket).map_err(io::Error::from),
    }
    loop {
        cancel.map_or(Ok(()), CancelToken::check)?;
        if Instant::now() >= deadline {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "no answer"));
        }
        let mut descriptors = vec![PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::OUT)];
        descriptors.extend(cancel.map(|cancel| PollFd::from_borrowed_fd(cancel.fd(), PollFlags::IN)));
        cancel::poll(&mut descriptors, Some(deadline))?;
        if !descriptors[0].revents().is_empty() {
            rustix::net::sockopt::socket_error(&socket)??;
            return Ok(socket);
        }
    }
}

/// Returns a copy of an error.
fn copy(error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), error.to_string())
}

/// The end of a line.
#[derive(Clone, Copy, PartialEq, Eq)]
enum LineEnd {
    CrLf,
    /// LF, with or without a CR.
    Lf,
}

/// Returns the index after the LF of the first line.
fn line_end(octets: &[u8], ends: LineEnd) -> Option<usize> {
    let is_end = |(at, octet): (usize, &u8)| *octet == b'\n' && (ends == LineEnd::Lf || octets[..at].ends_with(b"\r"));
    octets.iter().enumerate().position(is_end).map(|at| at + 1)
}

/// The space of one read. All connections share a few, because none is used while a thread waits. On the stack of each
/// thread, or in each connection, it would stay in memory as long as the connection.
struct ReadSpace(Box<[MaybeUninit<u8>]>);

static SPARE_SPACES: Guarded<Vec<Box<[MaybeUninit<u8>]>>> = Guarded::new(Vec::new());

impl ReadSpace {
    fn take() -> ReadSpace {
        let spare = SPARE_SPACES.lock().pop();
        ReadSpace(spare.unwrap_or_else(|| Box::new_uninit_slice(READ_SIZE)))
    }
}

impl Drop for ReadSpace {
    fn drop(&mut self) {
        let mut spares = SPARE_SPACES.lock();
        if spares.len() < SPARE_SPACE_LIMIT {
            spares.push(mem::take(&mut self.0));
        }
    }
}

/// A buffer whose octets are appended at its end and consumed from its beginning.
#[derive(Default)]
struct Buffer {
    octets: Vec<u8>,
    start: usize,
}

impl Buffer {
    fn rest(&self) -> &[u8] {
        &self.octets[self.start..]
    }

    fn consume(&mut self, count: usize) {
        self.start = self.octets.len().min(self.start.saturating_add(count));
        if self.rest().is_empty() {
            self.start = 0;
            self.octets.clear();
            if self.octets.capacity() > IDLE_CAPACITY {
                self.octets = Vec::new();
            }
        }
    }

    /// Returns the vector to append to. Moves the rest to the beginning only if it is the smaller part, so that each octet is
    /// moved at most once on average.
    fn end(&mut self) -> &mut Vec<u8> {
        if self.start > self.rest().len() {
            self.octets.drain(..self.start);
            self.start = 0;
        }
        &mut self.octets
    }
}

#[cfg(test)]
mod tests;
