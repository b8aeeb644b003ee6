//! `odmr send`: the customer's sendmail(8). It writes a message from stdin into the outgoing queue, or submits it to
//! the daemon if this user may not write into the queue ([`route`]).
//!
//! The message is read into memory and a file without a name. It is queued or submitted only if its size, its header
//! and all recipients are accepted, and it is durable before [`send`] returns. An error is one line of text and a
//! [`Sysexit`].
//!
//! - Lines end in LF or CRLF. Several CRs before an LF are part of one line end: one program wrote CRLF, and another
//!   replaced its LF by CRLF. A bare CR ends a line too: many programs write one, no message may contain one (RFC 5321
//!   section 2.3.8), and the rejection of the message would lose it.
//! - Without `-i` a line with a single dot ends the message. Other lines that begin with a dot are content.
//! - `From ` and `>From ` lines before the header are removed, and `Bcc` fields; `Date`, `Message-ID` and `From` are
//!   added if they are missing; [`Header::complete`] does the rest.
//! - With `-t` the recipients of the header are added to those of the command line.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use super::mailboxes::Mailboxes;
use super::outbox::{Outbox, Submission};
use super::submitter::{CompletedContent, SubmissionRoute, SubmitError, pass_session, submit, temporary_directory};
use super::{store, submission};
use crate::clock::Timestamp;
use crate::config::CustomerConfig;
use crate::ids::Ids;
use crate::mail::address::{Domain, ForwardPath, Mailbox, ReversePath};
use crate::mail::address_list::parse_addresses;
use crate::mail::encoded_word;
use crate::mail::header::{Header, HeaderAdditions};
use crate::maildir::spooled::{self, Content, SpooledContent};
use crate::maildir::{for_each_block, unnamed_file_in, write_denial};
use crate::net::cancel::CancelToken;
use crate::net::connection::Connection;
use crate::net::trace::{Trace, quoted};
use crate::plural::counted;
use crate::privileges::LoginUser;
use crate::queue::ListedMessage;
use crate::recipients::Destination;
use crate::session::client::SessionFailure;
use crate::smtp::client::{Abort, OutgoingMessage, Rejection};
use crate::smtp::command::{Body, Envelope, Notify, Recipient, Return, is_xtext};
use crate::smtp::content::HeaderScanner;
use crate::smtp::limits::ENVELOPE_ID;
use crate::smtp::reply::{Reply, Severity};
use crate::sysexit::Sysexit;
use crate::text_file::without_first_mark;

/// Octets of the input that are read at once.
const INPUT_BLOCK: usize = 32 * 1024;

/// The longest header that is accepted, in octets: it is parsed and completed in memory.
const HEADER_LIMIT: usize = spooled::MEMORY_LIMIT;

/// The most characters of a reply that an error shows.
const REPLY_LIMIT: usize = 500;

/// The options of the command line.
#[derive(Clone, Debug, Default)]
pub struct SendmailOptions {
    /// `-t`: add the recipients of the header.
    pub recipients_from_header: bool,
    /// `-i`: a line with a single dot is content.
    pub ignore_dots: bool,
    /// `-f`, `-r`; empty or `<>` is the null sender. Default: the user's mailbox.
    pub sender: Option<String>,
    /// `-F`. Default: the user's full name.
    pub full_name: Option<String>,
    /// `-N` (RFC 3461 section 4.1).
    pub notify: Option<String>,
    /// `-V` (RFC 3461 section 4.4).
    pub envelope_id: Option<String>,
    /// `-R` (RFC 3461 section 4.3).
    pub ret: Option<String>,
    /// Each argument may hold several addresses.
    pub recipients: Vec<String>,
    /// The user of this process.
    pub user: LoginUser,
}

/// Why a message was not queued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SendmailError {
    pub code: Sysexit,
    /// One line for the user.
    pub text: String,
}

impl SendmailError {
    fn new(code: Sysexit, text: impl Into<String>) -> SendmailError {
        SendmailError { code, text: text.into() }
    }

    fn usage(text: impl Into<String>) -> SendmailError {
        SendmailError::new(Sysexit::Usage, text)
    }

    fn bad_data(text: impl Into<String>) -> SendmailError {
        SendmailError::new(Sysexit::DataError, text)
    }

    /// The error of a failed system call. `otherwise`: its code, unless the call gives a more specific one.
    fn system(otherwise: Sysexit, error: &io::Error) -> SendmailError {
        let code = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                let text = format!("no room, try again later: {error}");
                return SendmailError::new(Sysexit::Temporary, text);
            }
            io::ErrorKind::PermissionDenied => Sysexit::NoPermission,
            io::ErrorKind::InvalidInput => Sysexit::DataError,
            _ => otherwise,
        };
        SendmailError::new(code, error.to_string())
    }
}

impl From<io::Error> for SendmailError {
    fn from(error: io::Error) -> SendmailError {
        SendmailError::system(Sysexit::InputOutput, &error)
    }
}

/// The error for a negative SMTP reply: 4yz is `Temporary`, 5yz is `Unavailable`.
impl From<Reply> for SendmailError {
    fn from(reply: Reply) -> SendmailError {
        let code = if reply.code() < 500 { Sysexit::Temporary } else { Sysexit::Unavailable };
        SendmailError::new(code, reply_text(&reply))
    }
}

/// The text of a reply on one line, without control characters: it goes to a terminal, and another service than the
/// daemon may have sent it.
fn reply_text(reply: &Reply) -> String {
    let text = reply.lines().collect::<Vec<_>>().join(" ");
    text.chars().map(|character| if character.is_control() { '?' } else { character }).take(REPLY_LIMIT).collect()
}

fn no_outgoing() -> SendmailError {
    let text = "this customer sends no mail: the configuration has no table [outgoing] with `queue`";
    SendmailError::new(Sysexit::Config, text)
}

fn open_outbox(config: &CustomerConfig, ids: &Ids) -> Result<Arc<Outbox>, SendmailError> {
    Outbox::new(&Arc::new(Mailboxes::new(config, ids))).map(Arc::new).ok_or_else(no_outgoing)
}

/// The route for the mail of this user: into the queue, or to the daemon if this user may not write into the queue. If
/// the queue fails for another reason, for instance because the disk is full, mail does not go to the daemon. `owner`:
/// the owner of the mail, if that is another user, which could not read the files of this user.
///
/// # Errors
/// This user may not write into a queue, and there is no listener on loopback.
pub fn route(config: &CustomerConfig, owner: Option<&str>) -> Result<SubmissionRoute, SendmailError> {
    let outgoing = config.outgoing.as_ref().ok_or_else(no_outgoing)?;
    let denial = || ["tmp", "new"].iter().find_map(|name| write_denial(&outgoing.queue.join(name)));
    let reason = match (owner, owner.map_or_else(denial, |_| None)) {
        (Some(owner), _) => format!("only {owner} and root may write into {}", outgoing.queue.display()),
        (None, Some(error)) => error.to_string(),
        (None, None) => return Ok(SubmissionRoute::Queue),
    };
    outgoing.loopback_listener().map(SubmissionRoute::Listener).ok_or_else(|| {
        let text = format!(
            "{reason}; for other users [outgoing] needs a listener with a port on loopback: add listen = [\"127.0.0.1:25\"] \
             there, and start `odmr pull -c FILE --daemon`"
        );
        SendmailError::new(Sysexit::NoPermission, text)
    })
}

/// Queues the message from `input`, or submits it to the daemon.
///
/// # Errors
/// An option, an address, the header or the size is wrong, the message could not be stored, or the daemon has not
/// accepted it. No recipient gets the message, unless the text of the error names some that do.
pub fn send(
    config: &CustomerConfig, ids: &Ids, options: &SendmailOptions, route: SubmissionRoute, input: &mut impl Read,
) -> Result<(), SendmailError> {
    let outbox = open_outbox(config, ids)?;
    let home = &outbox.config.domain;
    let dsn = DsnOptions::parse(options)?;
    let mut recipients = named_recipients(options, home)?;
    if recipients.is_empty() && !options.recipients_from_header {
        return Err(SendmailError::usage("no recipient: name one, or use -t for those of the header"));
    }
    let sender = sender(options, home)?;
    let queues = route == SubmissionRoute::Queue;
    // Report a full disk before the message is read, and one that is too large while it is read.
    if queues {
        outbox.check_room(0)?;
    }
    let create =
        || if queues { outbox.unnamed_file() } else { unnamed_file_in(&temporary_directory(), &ids.queue_id()) };
    let message = InputMessage::read(input, &outbox, &create, !options.ignore_dots)?;
    if message.header.received() > config.limits.received_hops {
        return Err(SendmailError::new(Sysexit::Unavailable, "too many hops: this message is in a mail loop"));
    }
    // Recipients after the limit would not get the message, and Bcc fields there would not be removed.
    if message.header_is_long() {
        return Err(SendmailError::bad_data(format!("the header is longer than {HEADER_LIMIT} octets")));
    }
    if options.recipients_from_header {
        let header = Header::parse(message.content.first_octets());
        recipients.extend(header.recipients(home).map_err(SendmailError::bad_data)?);
    }
    // This user may not be able to look at the mailboxes, so the daemon checks the recipients.
    let resolve = |named: &Mailbox| match queues {
        true => outbox.recipient(&ForwardPath::Mailbox(named.clone())),
        false => Ok(named.clone()),
    };
    let recipients = known_recipients(&resolve, recipients, &dsn.notify)?;
    if recipients.is_empty() {
        return Err(SendmailError::bad_data("the header names no recipient"));
    }
    let size = message.content.wire_size();
    if queues {
        outbox.check_room(size)?;
    }
    let envelope = message.envelope(sender, recipients, dsn, home);
    store_or_submit(&outbox, route, message, &envelope, options)
}

fn store_or_submit(
    outbox: &Outbox, route: SubmissionRoute, message: InputMessage, envelope: &Envelope, options: &SendmailOptions,
) -> Result<(), SendmailError> {
    let (ids, host, uid) = (&outbox.mailboxes.ids, &outbox.mailboxes.config.hostname, options.user.uid);
    let (id, arrived, size) = (ids.queue_id(), ids.clock().now(), message.content.wire_size());
    let header_from = Some(header_from(options, &envelope.from, &outbox.config.domain));
    let submission = Submission { envelope, size: Some(size), id: id.clone(), arrived, header_from, drop_bcc: true };
    let received = format!("Received: by {host} (odmr, from uid {uid})\n\tid {id};\n\t{}\n", arrived.rfc5322());
    let message_id = message.header.message_id().map_or_else(|| format!("<{id}@{host}>"), str::to_owned);
    let (from, nrcpt, message_id) = (&envelope.from, envelope.recipients.len(), quoted(message_id));
    match route {
        SubmissionRoute::Queue => {
            store(outbox, message, submission, &received)?;
            log::info!(
                "event=accepted id={id} from=<{from}> nrcpt={nrcpt} size={size} message-id={message_id} uid={uid}"
            );
        }
        SubmissionRoute::Listener(listener) => {
            let reply = quoted(submit_to(listener, outbox, message, &submission, received)?);
            log::info!(
                "event=submitted id={id} from=<{from}> nrcpt={nrcpt} size={size} message-id={message_id} uid={uid} \
                 relay={listener} reply={reply}"
            );
        }
    }
    Ok(())
}

/// Writes the message into the queue.
fn store(
    outbox: &Outbox, mut message: InputMessage, submission: Submission<'_>, received: &str,
) -> Result<(), SendmailError> {
    let cannot_create = |error| SendmailError::system(Sysexit::CannotCreate, &error);
    let mut writer = outbox.store(submission, received).map_err(cannot_create)?;
    message.content.rewind()?;
    for_each_block(&mut message.content, |block| writer.write(block))?;
    writer.commit()?;
    Ok(())
}

/// Submits the message to the listener of the daemon, with the header that it would have in the queue.
fn submit_to(
    listener: SocketAddr, outbox: &Outbox, message: InputMessage, submission: &Submission<'_>, received: String,
) -> Result<Reply, SendmailError> {
    let header = Header::parse(message.content.first_octets());
    let (mut head, replaced) = (received.into_bytes(), header.octets());
    head.extend_from_slice(&header.complete(&outbox.additions(submission)));
    let mut content = CompletedContent::new(head, message.content, replaced);
    let envelope = submission.envelope.clone();
    let outgoing = OutgoingMessage {
        eight_bit: envelope.body == Body::EightBit,
        size: content.wire_size(),
        utf8_header: envelope.utf8,
        attempts: 0,
        envelope,
    };
    let (config, ids) = (&outbox.mailboxes.config, &outbox.mailboxes.ids);
    submit(config, ids, listener, &outgoing, &mut content).map_err(|(sent, error)| {
        let error = submit_error(listener, error);
        match (sent, submission.envelope.recipients.len()) {
            (0, _) => error,
            (_, count) => {
                let text = format!("accepted for the first {sent} of {count} recipients only: {}", error.text);
                SendmailError { text, ..error }
            }
        }
    })
}

fn submit_error(listener: SocketAddr, error: SubmitError) -> SendmailError {
    match error {
        SubmitError::Recipient(mailbox, reply) => recipient_error(&mailbox, &reply),
        SubmitError::Message(reply) => reply.into(),
        SubmitError::InDoubt => SendmailError::new(
            Sysexit::Temporary,
            format!("{listener} has not replied to the message: it may have it, and another attempt may send it twice"),
        ),
        SubmitError::System(error) => error.into(),
        SubmitError::Session(SessionFailure::Aborted(Abort::Rejected(Rejection { stage, reply }))) => {
            let error = SendmailError::from(reply);
            SendmailError { text: format!("{listener}: {stage} was rejected: {}", error.text), ..error }
        }
        SubmitError::Session(failure @ SessionFailure::Unreachable(_)) => unreachable_listener(failure),
        SubmitError::Session(failure) => {
            let text = format!("{listener}, the `listen` of [outgoing]: {failure}");
            SendmailError::new(Sysexit::Temporary, text)
        }
    }
}

/// The error if the daemon cannot be connected to. `error` names the address.
fn unreachable_listener(error: impl std::fmt::Display) -> SendmailError {
    let text = format!("{error}; this user's mail goes there: is `odmr pull --daemon` running?");
    SendmailError::new(Sysexit::Temporary, text)
}

/// `-bs`: serves one SMTP session over two descriptors, or lets the daemon serve it, until it ends.
///
/// # Errors
/// There is no outgoing queue, the daemon cannot be connected to, or the connection to it was lost.
pub fn serve(
    config: &CustomerConfig, ids: &Ids, route: SubmissionRoute, (input, output): (OwnedFd, OwnedFd),
    cancel: &CancelToken,
) -> Result<(), SendmailError> {
    if let SubmissionRoute::Listener(listener) = route {
        return pass_session(&config.timeouts, listener, (input, output), cancel)
            .map_err(|error| unreachable_listener(format!("{listener}: {error}")));
    }
    let outbox = open_outbox(config, ids)?;
    let (begun, id) = (Instant::now(), ids.session_id());
    let connection = Connection::over(input, Some(output), Trace { id: id.clone(), us: 'S', them: 'C' });
    let peer = format!("uid {}", rustix::process::getuid().as_raw());
    let reason = submission::serve(&outbox, connection, peer, cancel, cancel, None);
    let duration = begun.elapsed().as_secs_f64();
    log::info!("event=closed session={id} listener=sendmail duration={duration:.3} reason={}", quoted(reason));
    Ok(())
}

/// `-bp`: lists the messages that wait, as mailq(1) does: those of the outgoing queue, and those for next hops and full
/// mailboxes here. If this user may not read some messages of other users, or the mail for next hops, the list
/// ends with a line about them.
///
/// # Errors
/// Reading a queue failed, or this user may not read the outgoing queue.
pub fn list(config: &CustomerConfig, ids: &Ids) -> Result<String, SendmailError> {
    let mailboxes = Mailboxes::new(config, ids);
    let (mut entries, mut messages, mut octets) = (String::new(), 0, 0);
    let mut show = |message: &ListedMessage, route: &dyn Fn(&Mailbox) -> String| {
        // A message without open recipients does not wait for anything.
        let Ok(queued) = &message.envelope else { return Ok(()) };
        let Envelope { from, recipients, .. } = &queued.envelope;
        if !recipients.is_empty() {
            let (id, octets_here, arrived) = (&message.id, message.bytes, message.arrived.rfc3339());
            entries.push_str(&format!("{id:<24} {octets_here:>10} {arrived} <{from}>\n"));
            let next_try = message.next_attempt.map_or_else(String::new, |due| next_try(due, ids.clock().now()));
            for recipient in recipients {
                entries.push_str(&format!("{next_try:>56} {}{}\n", recipient.mailbox, route(&recipient.mailbox)));
            }
            messages += 1;
            octets += octets_here;
        }
        Ok(())
    };
    let mut hidden = String::new();
    if let Some(outgoing) = &config.outgoing {
        let (queue, mut read) = (store::outgoing_queue(&outgoing.queue), 0);
        let listed = mailboxes.queue.list(&queue, &mut |message| {
            read += 1;
            show(&message, &|_| String::new())
        });
        listed.map_err(|error| match error.kind() {
            io::ErrorKind::PermissionDenied => {
                SendmailError::new(Sysexit::NoPermission, format!("{error}; be its owner, or root"))
            }
            _ => error.into(),
        })?;
        if let unread @ 1.. = mailboxes.queue.count(&queue, usize::MAX)?.saturating_sub(read) {
            hidden = format!("not listed, as they cannot be read: {unread}; be the owner of these messages, or root\n");
        }
    }
    let route = |mailbox: &Mailbox| match mailboxes.destination_of(mailbox) {
        Some(Destination::NextHop(hop)) => format!(" (next hop {hop})"),
        _ => " (a mailbox here)".to_owned(),
    };
    match mailboxes.queue.list(&mailboxes.retry_queue(), &mut |message| show(&message, &route)) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let text = format!("mail for next hops is not listed: {error}; be the owner of the mailboxes, or root\n");
            hidden.push_str(&text);
        }
        shown => shown?,
    }
    Ok(match messages {
        0 if hidden.is_empty() => "Mail queue is empty\n".to_owned(),
        _ => format!(
            "{:<24} {:>10} {:<20} {}\n{entries}{hidden}{}, {}\n",
            "id",
            "size",
            "arrived",
            "sender, next try, recipients",
            counted(messages, "message", "messages"),
            counted(octets, "octet", "octets")
        ),
    })
}

/// The time of the next attempt in the list, for a message that is due at `due`.
fn next_try(due: Timestamp, now: Timestamp) -> String {
    if due > now { format!("next try {}", due.rfc3339()) } else { "with the next call".to_owned() }
}

/// The DSN parameters of the command line (RFC 3461 section 4).
struct DsnOptions {
    notify: Notify,
    ret: Option<Return>,
    envelope_id: Option<String>,
}

impl DsnOptions {
    fn parse(options: &SendmailOptions) -> Result<DsnOptions, SendmailError> {
        let notify = match &options.notify {
            None => Notify::default(),
            Some(text) => Notify::parse(text.as_bytes()).ok_or_else(|| {
                SendmailError::usage(format!("-N is never, or a list of success, failure and delay, not {text}"))
            })?,
        };
        let ret = match options.ret.as_deref() {
            None => None,
            Some(text) if text.eq_ignore_ascii_case("full") => Some(Return::Full),
            Some(text) if text.eq_ignore_ascii_case("hdrs") => Some(Return::Header),
            Some(text) => return Err(SendmailError::usage(format!("-R is full or hdrs, not {text}"))),
        };
        let envelope_id = options.envelope_id.clone();
        if let Some(text) = &envelope_id
            && (text.len() > ENVELOPE_ID || !is_xtext(text.as_bytes()))
        {
            let text = format!("-V is xtext of at most {ENVELOPE_ID} octets (RFC 3461), not {text}");
            return Err(SendmailError::usage(text));
        }
        Ok(DsnOptions { notify, ret, envelope_id })
    }
}

/// The recipients of the command line. One argument may have several.
fn named_recipients(options: &SendmailOptions, home: &Domain) -> Result<Vec<Mailbox>, SendmailError> {
    let mut named = Vec::new();
    for text in &options.recipients {
        let mailboxes = parse_addresses(text, home).map_err(SendmailError::bad_data)?;
        if mailboxes.is_empty() {
            return Err(SendmailError::bad_data(format!("{text:?} is not an address")));
        }
        named.extend(mailboxes);
    }
    Ok(named)
}

/// The recipients without duplicates.
///
/// # Errors
/// The negative reply of `resolve` to one of them.
fn known_recipients(
    resolve: &dyn Fn(&Mailbox) -> Result<Mailbox, Reply>, mailboxes: Vec<Mailbox>, notify: &Notify,
) -> Result<Vec<Recipient>, SendmailError> {
    let (mut recipients, mut known) = (Vec::new(), HashSet::new());
    for named in mailboxes {
        let mailbox = resolve(&named).map_err(|reply| recipient_error(&named, &reply))?;
        if known.insert(mailbox.clone()) {
            recipients.push(Recipient { mailbox, notify: notify.clone(), original: None });
        }
    }
    Ok(recipients)
}

/// The error for a negative reply to RCPT.
fn recipient_error(recipient: &Mailbox, reply: &Reply) -> SendmailError {
    let code = match reply.enhanced() {
        Some("5.1.1") => Sysexit::NoUser,
        _ if reply.severity() == Severity::Permanent => Sysexit::DataError,
        _ => Sysexit::Temporary,
    };
    SendmailError::new(code, format!("<{recipient}>: {}", reply_text(reply)))
}

/// The sender that `-f` names, or the user's mailbox.
fn sender(options: &SendmailOptions, home: &Domain) -> Result<ReversePath, SendmailError> {
    let Some(text) = &options.sender else {
        return user_mailbox(&options.user.name, home).map(ReversePath::Mailbox).ok_or_else(|| {
            let name = &options.user.name;
            SendmailError::bad_data(format!("the login name {name:?} does not make an address: name the sender in -f"))
        });
    };
    if matches!(text.trim(), "" | "<>") {
        return Ok(ReversePath::Null);
    }
    let mailboxes = parse_addresses(text, home).map_err(SendmailError::bad_data)?;
    match <[Mailbox; 1]>::try_from(mailboxes) {
        Ok([mailbox]) => Ok(ReversePath::Mailbox(mailbox)),
        Err(_) => Err(SendmailError::bad_data(format!("the sender is one address, not {text:?}"))),
    }
}

/// The address of a user's mail: the login name at `home`; `None` if that is not a valid address.
pub fn user_mailbox(name: &str, home: &Domain) -> Option<Mailbox> {
    Mailbox::parse_any(&format!("{name}@{home}")).ok()
}

/// The `From` for a header that has none: the sender, with the full name from `-F` or that of the user.
fn header_from(options: &SendmailOptions, sender: &ReversePath, home: &Domain) -> String {
    let user = &options.user;
    let address = match sender {
        ReversePath::Mailbox(mailbox) => mailbox.header_form().into_owned(),
        ReversePath::Null => match user_mailbox(&user.name, home) {
            Some(mailbox) => mailbox.header_form().into_owned(),
            None => format!("postmaster@{home}"),
        },
    };
    match options.full_name.as_deref().unwrap_or(&user.full_name).trim() {
        "" => address,
        name => format!("{} <{address}>", phrase(name)),
    }
}

/// A display name for a header: unchanged, quoted (RFC 5322 section 3.2.4), or in encoded words (RFC 2047).
fn phrase(name: &str) -> String {
    let is_atom = |character: char| character.is_ascii_alphanumeric() || "!#$%&'*+-/=?^_`{|}~ ".contains(character);
    if name.chars().all(is_atom) {
        return name.to_owned();
    }
    if name.chars().all(|character| (' '..='~').contains(&character)) {
        return format!("\"{}\"", name.replace('\\', "\\\\").replace('"', "\\\""));
    }
    encoded_word::encode(name.as_bytes(), encoded_word::UTF_8)
}

/// A message that was read from the input.
struct InputMessage {
    content: SpooledContent,
    header: HeaderScanner,
    /// How many octets of the content are above 127.
    beyond_ascii: usize,
}

impl InputMessage {
    /// Reads up to the end of the input, or, with `dot_ends`, up to a line with a single dot. `create` makes the file
    /// without a name.
    fn read(
        input: &mut impl Read, outbox: &Outbox, create: &dyn Fn() -> io::Result<File>, dot_ends: bool,
    ) -> Result<InputMessage, SendmailError> {
        let mut message =
            InputMessage { content: SpooledContent::default(), header: HeaderScanner::default(), beyond_ascii: 0 };
        let (mut decoder, mut ended) = (LineDecoder::new(dot_ends), false);
        let (mut block, mut decoded) = (vec![0; INPUT_BLOCK], Vec::new());
        // Some editors put a byte order mark before a text. With it the first line would not be a field.
        let mut input = without_first_mark(input)?;
        while !ended {
            let octets = match input.read(&mut block) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result?,
            };
            decoded.clear();
            ended = octets == 0 || decoder.feed(&block[..octets], &mut decoded);
            if ended {
                decoder.finish(&mut decoded);
            }
            message.header.feed(&decoded);
            message.beyond_ascii += beyond_ascii(&decoded);
            let mut code = Sysexit::InputOutput;
            let create = || create().inspect_err(|_| code = Sysexit::CannotCreate);
            let written = message.content.write(&decoded, create);
            written.map_err(|error| SendmailError::system(code, &error))?;
            outbox.check_size(message.content.wire_size())?;
        }
        Ok(message)
    }

    /// Whether the header goes on after `HEADER_LIMIT` octets.
    fn header_is_long(&self) -> bool {
        let first = self.content.first_octets();
        // The last line may be incomplete, so only complete lines are parsed.
        let complete = first.iter().rposition(|octet| *octet == b'\n').map_or(0, |at| at + 1);
        first.len() == HEADER_LIMIT && Header::parse(&first[..complete]).octets() == complete
    }

    fn envelope(&self, from: ReversePath, recipients: Vec<Recipient>, dsn: DsnOptions, home: &Domain) -> Envelope {
        let first = self.content.first_octets();
        let header = Header::parse(first);
        // The header is completed only to see whether it is ASCII: the values of the fields that are added do not
        // matter.
        let additions = HeaderAdditions {
            home: home.clone(),
            date: String::new(),
            message_id: String::new(),
            from: None,
            drop_bcc: true,
        };
        let completed = header.complete(&additions);
        let utf8_header = Header::parse(&completed).needs_utf8();
        let body_is_ascii = self.beyond_ascii == beyond_ascii(&first[..header.octets()]);
        let body = if body_is_ascii && completed.is_ascii() { Body::SevenBit } else { Body::EightBit };
        let DsnOptions { ret, envelope_id, .. } = dsn;
        let mut envelope = Envelope { from, recipients, body, utf8: false, ret, envelope_id };
        envelope.utf8 = utf8_header || envelope.needs_utf8();
        envelope
    }
}

fn beyond_ascii(octets: &[u8]) -> usize {
    octets.iter().filter(|octet| !octet.is_ascii()).count()
}

/// Replaces the line ends that programs write (LF, CRLF, CR CR LF, CR) by LF. A block of input may end within a line
/// end.
struct LineDecoder {
    dot_ends: bool,
    state: LineState,
    /// The number of CRs at the end of the input so far. Together with a following LF they are one line end; otherwise
    /// each of them ends a line.
    crs: usize,
    ended: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum LineState {
    Begin,
    /// After a dot at the begin of a line. The dot is not yet in the output, because it may end the message.
    Dot,
    Within,
}

impl LineDecoder {
    fn new(dot_ends: bool) -> LineDecoder {
        LineDecoder { dot_ends, state: LineState::Begin, crs: 0, ended: false }
    }

    /// Appends the decoded lines to `out`. Returns whether a line with a single dot has ended the message. Input after
    /// that line is ignored.
    fn feed(&mut self, input: &[u8], out: &mut Vec<u8>) -> bool {
        for octet in input {
            match octet {
                b'\r' => self.crs += 1,
                b'\n' => {
                    self.crs = 0;
                    self.end_line(out);
                }
                octet => {
                    self.end_bare_lines(out);
                    self.push(*octet, out);
                }
            }
            if self.ended {
                break;
            }
        }
        self.ended
    }

    fn push(&mut self, octet: u8, out: &mut Vec<u8>) {
        if self.ended {
            return;
        }
        if octet == b'.' && self.dot_ends && self.state == LineState::Begin {
            self.state = LineState::Dot;
            return;
        }
        if self.state == LineState::Dot {
            out.push(b'.');
        }
        out.push(octet);
        self.state = LineState::Within;
    }

    fn end_line(&mut self, out: &mut Vec<u8>) {
        match self.state {
            LineState::Dot => self.ended = true,
            _ if !self.ended => out.push(b'\n'),
            _ => {}
        }
        self.state = LineState::Begin;
    }

    /// Ends a line for each CR that has no LF after it.
    fn end_bare_lines(&mut self, out: &mut Vec<u8>) {
        for _ in 0..std::mem::take(&mut self.crs) {
            self.end_line(out);
        }
    }

    /// Ends the last line, if the input has not ended it.
    fn finish(&mut self, out: &mut Vec<u8>) {
        self.end_bare_lines(out);
        if self.state == LineState::Within {
            out.push(b'\n');
            self.state = LineState::Begin;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(input: &[u8], cut: usize, dot_ends: bool) -> String {
        let (mut decoder, mut out) = (LineDecoder::new(dot_ends), Vec::new());
        for block in input.chunks(cut) {
            if decoder.feed(block, &mut out) {
                break;
            }
        }
        decoder.finish(&mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn lines_of_all_kinds_end_in_lf() {
        let check = |input: &str, expected: &str| {
            for cut in 1..=input.len().max(1) {
                assert_eq!(lines(input.as_bytes(), cut, true), expected, "{input:?} cut every {cut}");
            }
        };
        check("", "");
        check("a\nb", "a\nb\n");
        check("a\r\nb\r\n", "a\nb\n");
        check("10%\r50%\r100%\n", "10%\n50%\n100%\n");
        check("a\r\r\nb\n", "a\nb\n");
        check("a\r\r\r\n\r\r\nb\r\r\n", "a\n\nb\n");
        check("a\r\rb\r\r", "a\n\nb\n\n");
        check("a\r\r\n.\r\r\nb\n", "a\n");
        check("a\n.\nb\n", "a\n");
        check("a\r\n.\r\nb\r\n", "a\n");
        check("a\n..\n.b\n. \nc.", "a\n..\n.b\n. \nc.\n");
        check("a\n.", "a\n");
        check(".\n", "");
        assert_eq!(lines(b"a\n.\nb\n.", 3, false), "a\n.\nb\n.\n");
    }

    #[test]
    fn full_names_become_phrases() {
        let check = |name: &str, expected: &str| assert_eq!(phrase(name), expected);
        check("Eva Example", "Eva Example");
        check("Eva E. \"X\"", "\"Eva E. \\\"X\\\"\"");
        check("Jürgen", "=?UTF-8?B?SsO8cmdlbg==?=");
        let long = phrase(&"ü".repeat(60));
        assert!(long.split(' ').all(|word| word.len() <= 75) && long.split(' ').count() == 4, "{long}");
    }

    #[test]
    fn dsn_options_are_those_of_rfc_3461() {
        let parse = |notify: &str, ret: &str, id: &str| {
            let options = SendmailOptions {
                notify: Some(notify.to_owned()),
                ret: Some(ret.to_owned()),
                envelope_id: Some(id.to_owned()),
                ..SendmailOptions::default()
            };
            DsnOptions::parse(&options).map_err(|error| error.code)
        };
        assert!(parse("never", "hdrs", "QQ314159").is_ok());
        assert!(parse("success,delay", "FULL", "a+2Bb").is_ok());
        for (notify, ret, id) in [("never,delay", "full", "x"), ("failure", "all", "x"), ("failure", "full", "a b")] {
            assert_eq!(parse(notify, ret, id).err(), Some(Sysexit::Usage), "{notify} {ret} {id}");
        }
    }
}
