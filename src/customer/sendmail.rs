//! `odmr send`: what users and programs know as sendmail(8): a message on stdin, into the outgoing queue.
//!
//! The message is taken whole or not at all: it is read and looked at first, into a file that has no name; it is
//! queued only if its size, its header and every one of its recipients are good, and durable before the exit code says
//! so. What is wrong is one line and an exit code of sysexits.h ([`Exit`]).
//!
//! - Lines end in LF or CRLF. A bare CR ends a line too: output of programs is full of them, no mail may carry one
//!   (RFC 5321 section 2.3.8), and to lose the message for it would help nobody.
//! - Without `-i` a line of one dot ends the message. Dots in front of more are left alone.
//! - `Bcc` is removed whoever the recipients are; `Date`, `Message-ID` and `From` are added where they are missing.
//! - With `-t` the recipients of the header are added to those on the command line.

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::SystemTime;

use super::mailboxes::Mailboxes;
use super::outbox::{Outbox, Submission};
use super::submission;
use crate::clock::Timestamp;
use crate::config::CustomerConfig;
use crate::ids::Ids;
use crate::mail::address::{Domain, ForwardPath, Mailbox, ReversePath};
use crate::mail::header::{Header, parse_addresses};
use crate::maildir::for_each_block;
use crate::net::connection::{CancelToken, Connection, Trace};
use crate::smtp::command::{Body, MailFrom, Notify, Recipient, Return, is_xtext};
use crate::smtp::content::{ReceivedCounter, WireSize};
use crate::smtp::reply::Reply;

/// Content is read and written in pieces of so many octets.
const CONTENT_BLOCK: usize = 32 * 1024;

/// A longer header is not read for recipients, nor completed.
const HEADER_LIMIT: usize = 256 * 1024;

/// The users of this machine.
const PASSWD: &str = "/etc/passwd";

/// What one command line asks for.
#[derive(Clone, Debug, Default)]
pub struct SendmailOptions {
    /// `-t`: recipients are in the header.
    pub from_header: bool,
    /// `-i`: a lone dot is content.
    pub ignore_dots: bool,
    /// `-f`, `-r`: nothing between the angle brackets is the null sender.
    pub sender: Option<String>,
    /// `-F`.
    pub full_name: Option<String>,
    /// `-N`, `-V`, `-R` (RFC 3461).
    pub notify: Option<String>,
    pub envelope_id: Option<String>,
    pub ret: Option<String>,
    pub recipients: Vec<String>,
    /// Who asks for it.
    pub user: LoginUser,
}

/// The exit codes, by their names in sysexits.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendmailExit {
    /// The command line is wrong.
    Usage = 64,
    /// An address or the header cannot be read.
    DataError = 65,
    /// No such mailbox of ours.
    NoUser = 67,
    /// Too large, or in a circle.
    Unavailable = 69,
    /// The queue's folder cannot be made or written to.
    CannotCreate = 73,
    /// Reading or writing failed on the way.
    InputOutput = 74,
    /// Not now: no room.
    Temporary = 75,
    NoPermission = 77,
    /// Wrong configuration, or one that sends no mail.
    Config = 78,
}

/// Why nothing was queued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SendmailError {
    pub exit: SendmailExit,
    pub text: String,
}

fn sendmail_error(exit: SendmailExit, text: impl Into<String>) -> SendmailError {
    SendmailError { exit, text: text.into() }
}

/// What a failure of the system means; `otherwise` for those that have no code of their own.
fn failed(otherwise: SendmailExit) -> impl Fn(io::Error) -> SendmailError {
    move |error| match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            sendmail_error(SendmailExit::Temporary, format!("no room, try again later: {error}"))
        }
        io::ErrorKind::PermissionDenied => sendmail_error(SendmailExit::NoPermission, error.to_string()),
        io::ErrorKind::InvalidInput => sendmail_error(SendmailExit::DataError, error.to_string()),
        _ => sendmail_error(otherwise, error.to_string()),
    }
}

fn open(config: &CustomerConfig, ids: &Ids) -> Result<Arc<Outbox>, SendmailError> {
    let mailboxes = Arc::new(Mailboxes::new(config, ids));
    let outbox = Outbox::new(config, &mailboxes, ids);
    let outbox = outbox.ok_or_else(|| {
        sendmail_error(
            SendmailExit::Config,
            "this customer sends no mail: the configuration has no table [outgoing] with `queue`",
        )
    })?;
    Ok(Arc::new(outbox))
}

/// Queues the message that stands in `input`.
pub fn send(
    config: &CustomerConfig,
    ids: &Ids,
    order: &SendmailOptions,
    input: &mut impl Read,
) -> Result<(), SendmailError> {
    let outbox = open(config, ids)?;
    let home = &outbox.config().domain;
    let user = &order.user;
    let wishes = DsnOptions::of(order)?;
    let named = named_recipients(order, home)?;
    if named.is_empty() && !order.from_header {
        return Err(sendmail_error(
            SendmailExit::Usage,
            "no recipient: name one, or say -t to take them from the header",
        ));
    }
    let sender = sender(order, user, home)?;
    // A full disk is found out before anything is read, and a large message while it is.
    accepted(outbox.check_room(0))?;
    let mut message = InputMessage::read(input, &outbox, !order.ignore_dots)?;
    if message.hops > config.limits.received_hops {
        return Err(sendmail_error(SendmailExit::Unavailable, "too many hops: this message goes in circles"));
    }
    let header = Header::parse(&message.front);
    let mut recipients = named;
    // Neither its recipients nor a Bcc in it could be relied on.
    if message.header_is_long() {
        return Err(sendmail_error(
            SendmailExit::DataError,
            format!("the header is longer than {HEADER_LIMIT} octets"),
        ));
    }
    if order.from_header {
        recipients.extend(header.recipients(home).map_err(|text| sendmail_error(SendmailExit::DataError, text))?);
    }
    let recipients = known_recipients(&outbox, recipients, &wishes.notify)?;
    if recipients.is_empty() {
        return Err(sendmail_error(SendmailExit::DataError, "the header names no recipient"));
    }
    accepted(outbox.check_room(message.size))?;
    let header_octets = &message.front[..header.octets().min(message.front.len())];
    // What is neither ASCII nor UTF-8 is some older 8-bit text, and no matter of RFC 6532.
    let wide = !header_octets.is_ascii() && std::str::from_utf8(header_octets).is_ok();
    let utf8 = wide || !sender.is_ascii() || recipients.iter().any(|recipient| !recipient.mailbox.is_ascii());
    let mail = MailFrom {
        path: sender.clone(),
        size: Some(message.size),
        body: if message.eight_bit { Body::EightBit } else { Body::SevenBit },
        utf8,
        ret: wishes.ret,
        envelope_id: wishes.envelope_id,
    };
    let (id, arrived) = (ids.queue_id(), ids.clock().now());
    let letter = Submission {
        mail: &mail,
        recipients: &recipients,
        id: &id,
        arrived,
        header_from: Some(header_from(order, user, &sender, home)),
        drop_bcc: true,
    };
    let uid = user.uid;
    let host = outbox.hostname();
    let received = format!("Received: by {host} (odmr, from uid {uid})\n\tid {id};\n\t{}\n", arrived.rfc5322());
    let mut stored = outbox.store(&letter, &received).map_err(failed(SendmailExit::CannotCreate))?;
    for_each_block(&mut message.content, |piece| stored.write(piece)).map_err(failed(SendmailExit::InputOutput))?;
    stored.commit().map_err(failed(SendmailExit::InputOutput))?;
    log::info!("event=queued id={id} from=<{sender}> recipients={}", recipients.len());
    Ok(())
}

/// `-bs`: SMTP over two descriptors.
pub fn serve(
    config: &CustomerConfig,
    ids: &Ids,
    (input, output): (OwnedFd, OwnedFd),
    cancel: &CancelToken,
) -> Result<(), SendmailError> {
    let outbox = open(config, ids)?;
    let trace = Trace { id: "send".to_owned(), us: 'S', them: 'C' };
    let connection = Connection::pair(input, output, trace).map_err(failed(SendmailExit::InputOutput))?;
    let peer = format!("uid {}", rustix::process::getuid().as_raw());
    let why = submission::serve(config, &outbox, connection, peer, cancel, cancel);
    log::info!("event=closed listener=send reason={why:?}");
    Ok(())
}

/// `-bp`: what waits, as mailq(1) shows it.
pub fn list(config: &CustomerConfig, ids: &Ids, out: &mut impl Write) -> Result<(), SendmailError> {
    let outbox = open(config, ids)?;
    let (mut text, mut messages, mut octets) = (String::new(), 0, 0);
    outbox
        .each_waiting(|message| {
            let envelope = &message.envelope;
            let arrived = envelope.arrived.rfc3339();
            text.push_str(&format!("{:<24} {:>10} {arrived} <{}>\n", envelope.id, message.size, envelope.from));
            let due = message.due().map_or_else(String::new, next_try);
            for recipient in &envelope.recipients {
                text.push_str(&format!("{due:>56} {}\n", recipient.mailbox));
            }
            messages += 1;
            octets += message.size;
        })
        .map_err(failed(SendmailExit::InputOutput))?;
    let listing = match messages {
        0 => "Mail queue is empty\n".to_owned(),
        _ => format!(
            "{:<24} {:>10} {:<20} {}\n{text}{messages} messages, {octets} octets\n",
            "id", "size", "arrived", "sender, next try, recipients"
        ),
    };
    out.write_all(listing.as_bytes()).map_err(failed(SendmailExit::InputOutput))
}

fn next_try(due: SystemTime) -> String {
    let now = SystemTime::now();
    match due.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) if due > now => {
            let date = Timestamp::from_seconds(i64::try_from(since.as_secs()).unwrap_or(i64::MAX));
            format!("next try {}", date.rfc3339())
        }
        _ => "with the next call".to_owned(),
    }
}

/// A refusal in SMTP's words.
fn accepted(answer: Result<(), Reply>) -> Result<(), SendmailError> {
    answer.map_err(|reply| {
        let exit = if reply.code() < 500 { SendmailExit::Temporary } else { SendmailExit::Unavailable };
        sendmail_error(exit, words(&reply))
    })
}

fn words(reply: &Reply) -> String {
    reply.lines().collect::<Vec<_>>().join(" ")
}

/// The DSN parameters (RFC 3461 section 4).
struct DsnOptions {
    notify: Notify,
    ret: Option<Return>,
    envelope_id: Option<String>,
}

impl DsnOptions {
    fn of(order: &SendmailOptions) -> Result<DsnOptions, SendmailError> {
        let notify = match &order.notify {
            None => Notify::default(),
            Some(text) => Notify::parse(text.as_bytes()).ok_or_else(|| {
                sendmail_error(
                    SendmailExit::Usage,
                    format!("-N is never, or a list of success, failure and delay, not {text}"),
                )
            })?,
        };
        let ret = match order.ret.as_deref() {
            None => None,
            Some(text) if text.eq_ignore_ascii_case("full") => Some(Return::Full),
            Some(text) if text.eq_ignore_ascii_case("hdrs") => Some(Return::Header),
            Some(text) => return Err(sendmail_error(SendmailExit::Usage, format!("-R is full or hdrs, not {text}"))),
        };
        let good = |text: &&String| text.len() <= 100 && is_xtext(text.as_bytes());
        if let Some(text) = order.envelope_id.as_ref().filter(|text| !good(text)) {
            return Err(sendmail_error(
                SendmailExit::Usage,
                format!("-V takes xtext of 100 octets at most (RFC 3461), not {text}"),
            ));
        }
        Ok(DsnOptions { notify, ret, envelope_id: order.envelope_id.clone() })
    }
}

/// The recipients on the command line; one argument may hold several.
fn named_recipients(order: &SendmailOptions, home: &Domain) -> Result<Vec<Mailbox>, SendmailError> {
    let mut named = Vec::new();
    for text in &order.recipients {
        let found = parse_addresses(text, home).map_err(|text| sendmail_error(SendmailExit::DataError, text))?;
        if found.is_empty() {
            return Err(sendmail_error(SendmailExit::DataError, format!("{text:?} is no address")));
        }
        named.extend(found);
    }
    Ok(named)
}

/// Each recipient once, if all of them can have mail.
fn known_recipients(outbox: &Outbox, wanted: Vec<Mailbox>, notify: &Notify) -> Result<Vec<Recipient>, SendmailError> {
    let mut recipients: Vec<Recipient> = Vec::new();
    for mailbox in wanted {
        let found = outbox.recipient(&ForwardPath::Mailbox(mailbox.clone())).map_err(|reply| {
            let nobody = reply.enhanced() == Some("5.1.1");
            let exit = if nobody { SendmailExit::NoUser } else { SendmailExit::DataError };
            sendmail_error(exit, format!("<{mailbox}>: {}", words(&reply)))
        })?;
        if !recipients.iter().any(|other| other.mailbox == found) {
            recipients.push(Recipient { mailbox: found, notify: notify.clone(), original: None });
        }
    }
    Ok(recipients)
}

fn sender(order: &SendmailOptions, user: &LoginUser, home: &Domain) -> Result<ReversePath, SendmailError> {
    let Some(text) = &order.sender else {
        return user.mailbox(home).map(ReversePath::Mailbox).ok_or_else(|| {
            sendmail_error(
                SendmailExit::DataError,
                format!("no address can be made of the login name {:?}: say -f", user.name),
            )
        });
    };
    if matches!(text.trim(), "" | "<>") {
        return Ok(ReversePath::Null);
    }
    let found = parse_addresses(text, home).map_err(|text| sendmail_error(SendmailExit::DataError, text))?;
    match <[Mailbox; 1]>::try_from(found) {
        Ok([mailbox]) => Ok(ReversePath::Mailbox(mailbox)),
        Err(_) => Err(sendmail_error(SendmailExit::DataError, format!("the sender is one address, not {text:?}"))),
    }
}

/// What a header without `From` gets: the sender, with the full name of `-F` or of the user.
fn header_from(order: &SendmailOptions, user: &LoginUser, sender: &ReversePath, home: &Domain) -> String {
    let address = match sender {
        ReversePath::Mailbox(mailbox) => mailbox.to_string(),
        ReversePath::Null => user.mailbox(home).map_or_else(|| format!("postmaster@{home}"), |own| own.to_string()),
    };
    match order.full_name.as_deref().unwrap_or(&user.full_name).trim() {
        "" => address,
        name => format!("{} <{address}>", phrase(name)),
    }
}

/// A name as a header writes it: as it is, quoted (RFC 5322 section 3.2.5), or encoded (RFC 2047).
fn phrase(name: &str) -> String {
    let plain = |character: char| character.is_ascii_alphanumeric() || "!#$%&'*+-/=?^_`{|}~ ".contains(character);
    if name.chars().all(plain) {
        return name.to_owned();
    }
    if name.chars().all(|character| (' '..='~').contains(&character)) {
        return format!("\"{}\"", name.replace('\\', "\\\\").replace('"', "\\\""));
    }
    // An encoded word has 75 characters at most, and whole characters.
    let mut words = vec![String::new()];
    for character in name.chars() {
        if words.last().is_some_and(|word| word.len() + character.len_utf8() > 45) {
            words.push(String::new());
        }
        words.iter_mut().rev().take(1).for_each(|word| word.push(character));
    }
    let encoded = words.iter().map(|word| format!("=?UTF-8?B?{}?=", data_encoding::BASE64.encode(word.as_bytes())));
    encoded.collect::<Vec<_>>().join(" ")
}

/// A user of this machine.
#[derive(Clone, Debug, Default)]
pub struct LoginUser {
    uid: u32,
    name: String,
    full_name: String,
}

impl LoginUser {
    /// Who runs this process, by the user id; where nobody has it, by the environment.
    pub fn login() -> LoginUser {
        let uid = rustix::process::getuid().as_raw();
        let passwd = std::fs::read(PASSWD).unwrap_or_default();
        LoginUser::of(&String::from_utf8_lossy(&passwd), uid).unwrap_or_else(|| {
            let name = ["LOGNAME", "USER"].iter().find_map(|name| std::env::var(name).ok());
            LoginUser { uid, name: name.unwrap_or_default(), full_name: String::new() }
        })
    }

    /// From lines `name:password:uid:gid:gecos:home:shell`.
    fn of(passwd: &str, uid: u32) -> Option<LoginUser> {
        passwd.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            let [name, _, number, _, gecos, ..] = fields.as_slice() else { return None };
            if name.is_empty() || number.parse() != Ok(uid) {
                return None;
            }
            // The full name is what stands before the first comma; & is the login name with a capital.
            let full_name = gecos.split(',').next().unwrap_or_default();
            let mut capital = (*name).to_owned();
            capital.get_mut(..1).map(str::make_ascii_uppercase);
            Some(LoginUser { uid, name: (*name).to_owned(), full_name: full_name.replace('&', &capital) })
        })
    }

    fn mailbox(&self, home: &Domain) -> Option<Mailbox> {
        Mailbox::parse(&format!("{}@{home}", self.name))
    }
}

/// A message that was read and is not yet queued.
struct InputMessage {
    content: File,
    /// What it begins with, up to the limit of a header.
    front: Vec<u8>,
    /// Octets on the wire.
    size: u64,
    eight_bit: bool,
    hops: usize,
}

impl InputMessage {
    fn read(input: &mut impl Read, outbox: &Outbox, dot_ends: bool) -> Result<InputMessage, SendmailError> {
        let mut content = BufWriter::new(outbox.scratch().map_err(failed(SendmailExit::CannotCreate))?);
        let (mut lines, mut sizer, mut headers) = (LineDecoder::new(dot_ends), WireSize::new(), ReceivedCounter::new());
        let (mut front, mut eight_bit) = (Vec::new(), false);
        let (mut piece, mut octets) = (vec![0; CONTENT_BLOCK], Vec::new());
        loop {
            let read = match input.read(&mut piece) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other.map_err(failed(SendmailExit::InputOutput))?,
            };
            octets.clear();
            let ended = read == 0 || lines.feed(&piece[..read], &mut octets);
            if ended {
                lines.finish(&mut octets);
            }
            sizer.feed(&octets);
            headers.feed(&octets);
            eight_bit |= !octets.is_ascii();
            let room = HEADER_LIMIT - front.len();
            front.extend_from_slice(&octets[..octets.len().min(room)]);
            accepted(outbox.check_size(sizer.finish()))?;
            content.write_all(&octets).map_err(failed(SendmailExit::InputOutput))?;
            if ended {
                break;
            }
        }
        let mut content =
            content.into_inner().map_err(|error| failed(SendmailExit::InputOutput)(error.into_error()))?;
        content.rewind().map_err(failed(SendmailExit::InputOutput))?;
        Ok(InputMessage { content, front, size: sizer.finish(), eight_bit, hops: headers.received() })
    }

    /// Its end was not seen.
    fn header_is_long(&self) -> bool {
        // The last line may be cut, so it tells nothing.
        let whole = self.front.iter().rposition(|octet| *octet == b'\n').map_or(0, |at| at + 1);
        self.front.len() == HEADER_LIMIT && Header::parse(&self.front[..whole]).octets() == whole
    }
}

/// Lines as programs write them become lines that end in LF; the result does not depend on how they were cut.
struct LineDecoder {
    dot_ends: bool,
    place: LineState,
    /// The last octet was a CR, and has ended its line.
    carriage_return: bool,
    ended: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum LineState {
    Begin,
    /// Behind a dot that may be the end, and is held back.
    Dot,
    Within,
}

impl LineDecoder {
    fn new(dot_ends: bool) -> LineDecoder {
        LineDecoder { dot_ends, place: LineState::Begin, carriage_return: false, ended: false }
    }

    /// Appends to `out`. True: the lone dot came, and nothing after it counts.
    fn feed(&mut self, input: &[u8], out: &mut Vec<u8>) -> bool {
        for octet in input {
            if self.ended {
                break;
            }
            let behind_cr = std::mem::replace(&mut self.carriage_return, *octet == b'\r');
            match octet {
                b'\n' if behind_cr => {}
                b'\n' | b'\r' if self.place == LineState::Dot => self.ended = true,
                b'\n' | b'\r' => {
                    out.push(b'\n');
                    self.place = LineState::Begin;
                }
                b'.' if self.dot_ends && self.place == LineState::Begin => self.place = LineState::Dot,
                other => {
                    if self.place == LineState::Dot {
                        out.push(b'.');
                    }
                    out.push(*other);
                    self.place = LineState::Within;
                }
            }
        }
        self.ended
    }

    /// The input is over: a last line without an end gets one.
    fn finish(&mut self, out: &mut Vec<u8>) {
        if self.place == LineState::Within {
            out.push(b'\n');
            self.place = LineState::Begin;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(input: &[u8], cut: usize, dot_ends: bool) -> String {
        let (mut lines, mut out) = (LineDecoder::new(dot_ends), Vec::new());
        for piece in input.chunks(cut) {
            if lines.feed(piece, &mut out) {
                break;
            }
        }
        lines.finish(&mut out);
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
        check("a\r\r\nb\n", "a\n\nb\n");
        check("a\n.\nb\n", "a\n");
        check("a\r\n.\r\nb\r\n", "a\n");
        check("a\n..\n.b\n. \nc.", "a\n..\n.b\n. \nc.\n");
        check("a\n.", "a\n");
        check(".\n", "");
        assert_eq!(lines(b"a\n.\nb\n.", 3, false), "a\n.\nb\n.\n");
    }

    #[test]
    fn users_are_found_by_their_number() {
        let passwd =
            "root:x:0:0:root:/root:/bin/sh\n# nonsense\neva:x:1000:1000:& Example,room 1,,:/home/eva:/bin/sh\n";
        let user = LoginUser::of(passwd, 1000).unwrap();
        assert_eq!((user.name.as_str(), user.full_name.as_str()), ("eva", "Eva Example"));
        assert!(LoginUser::of(passwd, 1).is_none() && LoginUser::of("", 0).is_none());
    }

    #[test]
    fn full_names_become_phrases() {
        let check = |name: &str, expected: &str| assert_eq!(phrase(name), expected);
        check("Eva Example", "Eva Example");
        check("Eva E. \"X\"", "\"Eva E. \\\"X\\\"\"");
        check("Jürgen", "=?UTF-8?B?SsO8cmdlbg==?=");
        let long = phrase(&"ü".repeat(60));
        assert!(long.split(' ').all(|word| word.len() <= 75) && long.split(' ').count() == 3, "{long}");
    }

    #[test]
    fn wishes_are_those_of_rfc_3461() {
        let wishes = |notify: &str, ret: &str, id: &str| {
            let order = SendmailOptions {
                notify: Some(notify.to_owned()),
                ret: Some(ret.to_owned()),
                envelope_id: Some(id.to_owned()),
                ..SendmailOptions::default()
            };
            DsnOptions::of(&order).map_err(|refused| refused.exit)
        };
        assert!(wishes("never", "hdrs", "QQ314159").is_ok());
        assert!(wishes("success,delay", "FULL", "a+2Bb").is_ok());
        for (notify, ret, id) in [("never,delay", "full", "x"), ("failure", "all", "x"), ("failure", "full", "a b")] {
            assert_eq!(wishes(notify, ret, id).err(), Some(SendmailExit::Usage), "{notify} {ret} {id}");
        }
    }
}
