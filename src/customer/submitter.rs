//! `odmr send` for a user that may not write into the outgoing queue: it submits by SMTP to the listener of the daemon.
//!
//! The message is the same as it would be in the queue: its header is completed. After its 250 the daemon is
//! responsible for the message. No content is sent before the daemon has accepted all recipients. If they need several
//! transactions (RFC 9422 section 4.2), the recipients of each are sent first and the transaction is reset, so that a
//! recipient that is rejected in the last one does not leave a message that some recipients have.

use std::env;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags};
use rustix::net::Shutdown;

use crate::config::CustomerConfig;
use crate::ids::Ids;
use crate::mail::address::Mailbox;
use crate::maildir::spooled::{Content, SpooledContent};
use crate::net::cancel::{self, CancelToken};
use crate::net::connection::{self, Connection, Filled};
use crate::net::trace::Trace;
use crate::session::client::{ClientSession, Connect, SessionFailure};
use crate::session::{CONTENT_BLOCK, Timeouts};
use crate::smtp::client::{ClientOptions, OutgoingMessage};
use crate::smtp::command::Envelope;
use crate::smtp::reply::Reply;
use crate::smtp::status::RecipientStatus;

/// The route for the mail of this user. It is chosen once, before the message is read, so that no message goes both
/// ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SubmissionRoute {
    /// Into the outgoing queue.
    Queue,
    /// To the listener of the daemon, as this user may not write into the queue.
    Listener(SocketAddr),
}

/// Why the listener has not accepted a message.
#[derive(Debug)]
pub enum SubmitError {
    /// The session has failed, and no content was sent.
    Session(SessionFailure),
    /// The reply to the RCPT of this recipient.
    Recipient(Box<Mailbox>, Reply),
    /// The reply to MAIL, DATA or the content, or our own if the connection was lost within the content.
    Message(Reply),
    /// All content was sent and no reply arrived: the daemon may have the message (RFC 1047).
    InDoubt,
    /// A system call failed, or the content cannot be read.
    System(io::Error),
}

impl From<SessionFailure> for SubmitError {
    fn from(failure: SessionFailure) -> SubmitError {
        SubmitError::Session(failure)
    }
}

/// The directory for the file of a long message: `$TMPDIR`, or `/tmp` if `$TMPDIR` does not name a directory. No mail
/// is lost because of a wrong `$TMPDIR`.
pub fn temporary_directory() -> PathBuf {
    let named = env::temp_dir();
    if named.is_dir() { named } else { PathBuf::from("/tmp") }
}

/// Submits a message to the listener. Returns its last reply to the content.
///
/// # Errors
/// Why the listener has not accepted the message, and the number of recipients for whom it has accepted it before that:
/// more than 0 only if the recipients need several transactions, and the content of one after the first failed.
pub fn submit(
    config: &CustomerConfig, ids: &Ids, listener: SocketAddr, message: &OutgoingMessage, content: &mut dyn Content,
) -> Result<Reply, (usize, SubmitError)> {
    let (timeouts, id) = (&config.timeouts, ids.session_id());
    let cancel = CancelToken::new().map_err(|error| (0, SubmitError::System(error)))?;
    let limit = Some(Instant::now() + timeouts.command);
    let connect = Connect { id: &id, peer: 'S', tls: None, implicit_tls: false, timeouts, cancel: &cancel, limit };
    let options =
        ClientOptions { name: config.hostname.clone(), chunking: true, submits: true, ..ClientOptions::default() };
    let mut session = connect.to(listener, options).map_err(|failure| (0, failure.into()))?;
    let result = send_all(&mut session, timeouts, message, content);
    match &result {
        Err((_, SubmitError::Session(failure))) => session.close_after(failure),
        _ => session.quit(),
    }
    result
}

fn send_all(
    session: &mut ClientSession, timeouts: &Timeouts, message: &OutgoingMessage, content: &mut dyn Content,
) -> Result<Reply, (usize, SubmitError)> {
    let (recipients, end) = (&message.envelope.recipients, Instant::now() + timeouts.session);
    let most = session.client().extensions().limits.recipients.unwrap_or(recipients.len()).max(1);
    let with = |some: &[_]| {
        let envelope = Envelope { recipients: some.to_vec(), ..message.envelope.clone() };
        OutgoingMessage { envelope, ..message.clone() }
    };
    let transactions: Vec<_> = recipients.chunks(most).map(with).collect();
    if transactions.len() > 1 {
        for transaction in &transactions {
            begin(session, timeouts, end, transaction).map_err(|error| (0, error))?;
            session.abort_transaction();
        }
    }
    let (mut sent, mut last) = (0, Err(SubmitError::Message(Reply::new(451, "4.5.0", "No recipient"))));
    for transaction in &transactions {
        last = begin(session, timeouts, end, transaction).and_then(|()| send_content(session, transaction, content));
        if last.is_err() {
            break;
        }
        sent += transaction.envelope.recipients.len();
    }
    last.map_err(|error| (sent, error))
}

/// Begins a transaction. All recipients must be accepted, within the timeout of one `command` together and before
/// `end`, so that a listener that replies slowly does not hold up the user's program.
fn begin(
    session: &mut ClientSession, timeouts: &Timeouts, end: Instant, message: &OutgoingMessage,
) -> Result<(), SubmitError> {
    session.limit(Some(end.min(Instant::now() + timeouts.command)));
    let reply = session.begin_transaction(message)?;
    if !reply.is_positive() {
        return Err(SubmitError::Message(reply));
    }
    for recipient in &message.envelope.recipients {
        let reply = session.add_recipient(recipient)?;
        if !reply.is_positive() {
            return Err(SubmitError::Recipient(Box::new(recipient.mailbox.clone()), reply));
        }
    }
    Ok(())
}

fn send_content(
    session: &mut ClientSession, message: &OutgoingMessage, content: &mut dyn Content,
) -> Result<Reply, SubmitError> {
    content.rewind().map_err(SubmitError::System)?;
    // The time for content depends on its size, and its reply has its own timeout.
    session.limit(None);
    let result = session.send_data(content, message.size);
    match result.recipients.into_iter().next() {
        Some(RecipientStatus::Sent(reply)) => Ok(reply),
        Some(RecipientStatus::Deferred(reply) | RecipientStatus::Rejected(reply)) => Err(SubmitError::Message(reply)),
        Some(RecipientStatus::InDoubt) | None => Err(SubmitError::InDoubt),
    }
}

/// A message of the user with its completed header.
pub struct CompletedContent {
    /// The fields that come first, and the completed header.
    head: Vec<u8>,
    /// The message as the user wrote it.
    content: SpooledContent,
    /// How many octets of it `head` replaces.
    replaced: usize,
    /// How many octets of `head` were read since the last rewind.
    read: usize,
}

impl CompletedContent {
    /// A message that begins with `head` instead of the first `replaced` octets of `content`, its old header. These
    /// must be in memory.
    pub fn new(head: Vec<u8>, content: SpooledContent, replaced: usize) -> CompletedContent {
        CompletedContent { head, content, replaced, read: 0 }
    }

    /// The number of octets on the wire, where each LF becomes CRLF.
    pub fn wire_size(&self) -> u64 {
        let wire = |octets: &[u8]| octets.iter().map(|octet| 1 + u64::from(*octet == b'\n')).sum::<u64>();
        self.content.wire_size() - wire(&self.content.first_octets()[..self.replaced]) + wire(&self.head)
    }
}

impl Read for CompletedContent {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match (&self.head[self.read..]).read(buffer)? {
            0 => self.content.read(buffer),
            octets => {
                self.read += octets;
                Ok(octets)
            }
        }
    }
}

impl Content for CompletedContent {
    fn rewind(&mut self) -> io::Result<()> {
        self.read = 0;
        self.content.rewind()?;
        io::copy(&mut (&mut self.content).take(self.replaced as u64), &mut io::sink()).map(drop)
    }
}

/// `-bs`: passes the octets of one SMTP session between two descriptors of a program and the listener, until the
/// listener ends it. The listener enforces the limits. `cancel` ends the input: the listener accepts a message that it
/// has completely, and drops another.
///
/// # Errors
/// `ConnectionRefused` and others if there is no connection; `TimedOut` if neither side has sent anything for the
/// longest timeout of SMTP, or if the listener goes on for that long after the end of the input; the connection was
/// lost.
pub fn pass_session(
    timeouts: &Timeouts, listener: SocketAddr, (input, output): (OwnedFd, OwnedFd), cancel: &CancelToken,
) -> io::Result<()> {
    let trace = |us, them| Trace { id: String::new(), us, them };
    let socket = connection::connect(listener, Instant::now() + timeouts.connect, Some(cancel))?;
    let mut listener = Connection::new(socket, trace('C', 'S'))?;
    let mut program = Connection::over(input, Some(output), trace('S', 'C'));
    let longest = timeouts.end.max(timeouts.command);
    let (mut deadline, mut greeted, mut input_ended, mut cancelled) = (Instant::now() + longest, false, false, false);
    loop {
        let mut moved = pass(&mut listener, &mut program)?;
        greeted |= moved;
        if listener.ended() && program.unsent() == 0 {
            let early =
                || io::Error::new(io::ErrorKind::UnexpectedEof, "the connection was closed before its greeting");
            return if greeted { Ok(()) } else { Err(early()) };
        }
        if !input_ended {
            moved |= pass(&mut program, &mut listener)?;
        }
        if moved && !input_ended {
            deadline = Instant::now() + longest;
        }
        if cancel.is_cancelled() && !cancelled {
            (deadline, cancelled) = (Instant::now() + timeouts.shutdown, true);
        }
        if (program.ended() || cancelled) && listener.unsent() == 0 && !input_ended {
            // The listener replies to the commands that it has, and then closes the connection.
            rustix::net::shutdown(listener.output_fd(), Shutdown::Write)?;
            input_ended = true;
        }
        if Instant::now() >= deadline {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "no reply"));
        }
        let mut descriptors = Vec::with_capacity(5);
        for (from, to, ended) in [(&program, &listener, input_ended), (&listener, &program, false)] {
            if !from.ended() && !ended && to.unsent() < CONTENT_BLOCK {
                descriptors.push(PollFd::from_borrowed_fd(from.input_fd(), PollFlags::IN));
            }
            if to.unsent() > 0 {
                descriptors.push(PollFd::from_borrowed_fd(to.output_fd(), PollFlags::OUT));
            }
        }
        if !cancelled {
            descriptors.push(PollFd::from_borrowed_fd(cancel.fd(), PollFlags::IN));
        }
        cancel::poll(&mut descriptors, Some(deadline))?;
    }
}

/// Passes on the octets that have arrived, unless [`CONTENT_BLOCK`] octets wait already. Returns whether any were
/// moved.
fn pass(from: &mut Connection, to: &mut Connection) -> io::Result<bool> {
    let before = to.unsent();
    let filled = if before < CONTENT_BLOCK { from.fill()? } else { Filled::Nothing };
    to.send(from.received());
    from.consume(from.received().len());
    to.flush()?;
    Ok(matches!(filled, Filled::Bytes(_)) || to.unsent() < before)
}
