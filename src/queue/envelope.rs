//! The envelope of a message in a queue: header lines in front of the content.
//!
//! ```text
//! Return-Path: <sender@example.net>       the reverse path; <> for a DSN
//! Delivered-To: alice@example.org         one line for each recipient
//! X-ODMR-Recipient: NOTIFY=… ORCPT=…      the DSN parameters of the recipient before it (RFC 3461)
//! X-ODMR-Envelope: id=…; arrived=…        ours; files of other delivery agents do not have it
//! Received: from …                        here the content begins
//! ```
//!
//! An address of ours that would be read as a list is in angle brackets: `<joe,doe@example.org>`.
//!
//! Delivery agents write such lines, so any of them may fill the queue. Their lines may be folded (RFC 5322 section
//! 2.2.3), have several recipients in one field, and come after the `From ` line of an mbox. The envelope ends at the
//! first other line. A `Return-Path` that a sender has forged is never part of the envelope: our `Received` comes
//! before it and ends the envelope. If an agent writes no `Received`, the forged `Return-Path` is the second one, which
//! ends the envelope too.
//!
//! A recipient that cannot be read must not be lost: the file stays for it (see [`ParsedEnvelope::unread`]). If the
//! `Return-Path` cannot be read, nothing is sent: with `<>` instead, the sender would get no DSN.
//!
//! A recipient that is settled while others are open is marked: a [`Mark`] overwrites one octet of its address, the
//! `@`. That needs no disk space, and a crash cannot leave half of it. No address has such an octet in this place.

use std::borrow::Cow;
use std::collections::HashMap;

use crate::clock::Timestamp;
use crate::mail::address::{Domain, Mailbox, ReversePath, reverse_path};
use crate::mail::address_list::{AddressList, ListedAddress, divide};
use crate::smtp::command::{Body, Envelope, Notify, Recipient, Return, is_xtext, original_recipient};

/// Octets of an envelope at most. A longer one is neither written nor read.
pub const ENVELOPE_LIMIT: usize = 1 << 20;

/// How many places of an address are tried for a mark: a quoted string may have `@` too.
const MARK_PLACES: usize = 16;

/// An envelope, with the id and the time of arrival of its message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueuedEnvelope {
    /// The id of the message in the log and in its `Received` field.
    pub id: String,
    /// When this program accepted the message; of another agent's file, when that agent wrote it.
    pub arrived: Timestamp,
    /// The sender, the open recipients and the parameters of MAIL and RCPT.
    pub envelope: Envelope,
}

impl QueuedEnvelope {
    /// The envelope of the same message for other recipients.
    pub fn with_recipients(&self, recipients: Vec<Recipient>) -> QueuedEnvelope {
        let envelope = self.envelope.with_recipients(recipients);
        QueuedEnvelope { id: self.id.clone(), arrived: self.arrived, envelope }
    }

    /// The header lines in front of the content, each with its LF; `extra` lines come last.
    pub fn to_header(&self, extra: &str) -> String {
        let mut text = format!("Return-Path: <{}>\n", self.envelope.from);
        for recipient in &self.envelope.recipients {
            text += &format!("Delivered-To: {}\n", field_value(&recipient.mailbox));
            let notify = recipient.notify.as_given().map(|notify| format!(" NOTIFY={notify}")).unwrap_or_default();
            let original = recipient.original.as_ref().map(|original| format!(" ORCPT={original}")).unwrap_or_default();
            if !notify.is_empty() || !original.is_empty() {
                text += &format!("X-ODMR-Recipient:{notify}{original}\n");
            }
        }
        text += &format!("X-ODMR-Envelope: id={}; arrived={}", self.id, self.arrived.rfc3339());
        text += match self.envelope.body {
            Body::Undeclared => "",
            Body::SevenBit => "; body=7BIT",
            Body::EightBit => "; body=8BITMIME",
        };
        text += if self.envelope.utf8 { "; smtputf8" } else { "" };
        text += match self.envelope.ret {
            None => "",
            Some(Return::Full) => "; ret=FULL",
            Some(Return::Header) => "; ret=HDRS",
        };
        // ENVID comes last: its xtext (RFC 3461) may have a semicolon, but no space.
        if let Some(id) = &self.envelope.envelope_id {
            text += &format!("; envid={id}");
        }
        text + "\n" + extra
    }
}

/// An envelope read from the front of a file.
#[derive(Debug)]
pub struct ParsedEnvelope {
    pub envelope: QueuedEnvelope,
    /// Octets of the envelope: the content begins after them.
    pub octets: usize,
    /// Lines of the envelope.
    pub lines: usize,
    /// This program has written the file, so the sizes in its name are right.
    pub ours: bool,
    /// The envelope has octets above 127: the flag in the file's name does not prove that the content has some.
    pub eight_bit: bool,
    /// For each open recipient, the octets in the file that its [`Mark`] overwrites.
    pub marks: Vec<Vec<u64>>,
    /// The marks of the settled recipients.
    pub settled: Vec<Mark>,
    /// The addresses of the settled recipients, as they were before the marks.
    pub settled_addresses: Vec<String>,
    /// The recipients that cannot be read, or are not in the queue's domain.
    pub unread: Vec<UnreadRecipient>,
}

impl ParsedEnvelope {
    /// The open recipients in the queue's domain.
    pub fn recipients(&self) -> &[Recipient] {
        &self.envelope.envelope.recipients
    }
}

/// The octet that overwrites the `@` in the address of a settled recipient.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mark {
    /// ACK: sent, or rejected and reported to the sender.
    Done,
    /// NAK: rejected, and no DSN can report it. When all recipients are settled, the file is moved to `.refused`.
    Rejected,
}

impl Mark {
    /// The control character of ASCII.
    pub fn octet(self) -> u8 {
        match self {
            Mark::Done => 0x06,
            Mark::Rejected => 0x15,
        }
    }
}

/// A recipient that cannot be read, or is not in the queue's domain. The file stays for it when the others are settled.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UnreadRecipient {
    /// The address as the file has it, unfolded.
    pub text: Vec<u8>,
    /// Why it cannot be read: a sentence with the address.
    pub reason: String,
}

/// The result of [`parse`].
#[derive(Debug)]
pub enum Parsed {
    Envelope(Box<ParsedEnvelope>),
    /// The envelope does not end within these octets: read more of the file.
    More,
    /// The file names no recipient.
    NoRecipients,
    /// The `Return-Path` cannot be read, for this reason.
    NoReversePath(String),
}

/// What [`parse`] needs to know besides the file.
#[derive(Clone, Copy)]
pub struct ParseOptions<'a> {
    /// Recipients in other domains are `unread`; `None`: all domains are read.
    pub domain: Option<&'a Domain>,
    /// See [`QueueName::prefix`](super::QueueName::prefix).
    pub prefix: Option<&'a str>,
    /// The id, if the file has none.
    pub id: &'a str,
    /// The time of arrival, if the file has none.
    pub arrived: Timestamp,
}

/// Reads the envelope from the octets at the front of a file. `end`: these octets are the whole file.
pub fn parse(front: &[u8], end: bool, options: ParseOptions<'_>) -> Parsed {
    let mut fields = Fields::default();
    let (mut octets, mut lines) = (0, 0);
    loop {
        let rest = &front[octets..];
        let Some(line) = line_length(rest, end) else { return Parsed::More };
        let name = field_name(&rest[..line]);
        // RFC 4155: the line that begins a message in an mbox. Agents that can also write an mbox put it here.
        let separator = octets == 0 && (rest.starts_with(b"From ") || rest.starts_with(b">From "));
        if !separator && !fields.includes(&name) {
            break;
        }
        let Some(length) = field_length(rest, end) else { return Parsed::More };
        fields.add(&name, &rest[..length], octets);
        octets += length;
        lines += rest[..length].split_inclusive(|octet| *octet == b'\n').count();
    }
    let Recipients { open, marks, settled, settled_addresses, unread, .. } = fields.recipients(options);
    if open.is_empty() && settled.is_empty() && unread.is_empty() {
        return Parsed::NoRecipients;
    }
    match fields.reverse_path() {
        Err(reason) => Parsed::NoReversePath(reason),
        Ok(from) => {
            let envelope = fields.envelope(from, open, options);
            let (ours, eight_bit) = (fields.ours.is_some(), !front[..octets].is_ascii());
            Parsed::Envelope(Box::new(ParsedEnvelope {
                envelope,
                octets,
                lines,
                ours,
                eight_bit,
                marks,
                settled,
                settled_addresses,
                unread,
            }))
        }
    }
}

/// The length of the first line of the text in octets, with its LF, which the last line of a file may lack. `None`: the
/// line does not end within the text.
fn line_length(text: &[u8], end: bool) -> Option<usize> {
    text.iter().position(|octet| *octet == b'\n').map(|at| at + 1).or(end.then_some(text.len()))
}

/// The length of the first field of the text in octets, with its continuation lines (RFC 5322 section 2.2.3). `None`:
/// the field does not end within the text.
fn field_length(text: &[u8], end: bool) -> Option<usize> {
    let mut length = line_length(text, end)?;
    loop {
        match text.get(length) {
            Some(b' ' | b'\t') => length += line_length(&text[length..], end)?,
            None if !end => return None,
            _ => return Some(length),
        }
    }
}

/// The name of the field that begins with this line, in lower case; empty: none does.
fn field_name(line: &[u8]) -> Vec<u8> {
    let colon = line.iter().position(|octet| *octet == b':').unwrap_or(0);
    line[..colon].trim_ascii_end().to_ascii_lowercase()
}

/// Whether [`parse`] would read this first line of a content as a part of the envelope before it.
pub fn continues_envelope(line: &[u8]) -> bool {
    let after = Fields { return_path: Some(Cow::default()), ..Fields::default() };
    after.includes(&field_name(line))
}

/// The value of a field, without the line ends of a folded one (RFC 5322 section 2.2.3).
struct FieldValue<'a> {
    octets: Cow<'a, [u8]>,
    /// Where the first of the octets is in the file.
    start: usize,
    /// For each octet, its distance from `start` in the file; empty: the octets are next to each other.
    places: Vec<usize>,
}

impl FieldValue<'_> {
    /// Unfolds a field that begins at `start` in the file.
    fn unfolded(field: &[u8], start: usize) -> FieldValue<'_> {
        let colon = field.iter().position(|octet| *octet == b':').map_or(0, |at| at + 1);
        let value = field[colon..].trim_ascii_start();
        let start = start + field.len() - value.len();
        let value = value.trim_ascii_end();
        if !value.contains(&b'\n') {
            return FieldValue { octets: Cow::Borrowed(value), start, places: Vec::new() };
        }
        let is_line_end = |at: usize| value[at] == b'\n' || value[at] == b'\r' && value.get(at + 1) == Some(&b'\n');
        let places: Vec<usize> = (0..value.len()).filter(|at| !is_line_end(*at)).collect();
        let octets = Cow::Owned(places.iter().map(|at| value[*at]).collect());
        FieldValue { octets, start, places }
    }

    /// Where an octet of the value is in the file.
    fn place(&self, at: usize) -> u64 {
        (self.start + self.places.get(at).copied().unwrap_or(at)) as u64
    }
}

/// A field that names recipients.
struct RecipientField<'a> {
    value: FieldValue<'a>,
    /// The value of `X-ODMR-Recipient`; empty: none.
    parameters: Cow<'a, [u8]>,
}

/// The recipients of a file, each once.
#[derive(Default)]
struct Recipients {
    open: Vec<Recipient>,
    /// The index of each in `open`.
    numbers: HashMap<Mailbox, usize>,
    /// For each open recipient, the octets that its mark overwrites.
    marks: Vec<Vec<u64>>,
    settled: Vec<Mark>,
    settled_addresses: Vec<String>,
    /// Recipients that cannot be read, or are in another domain.
    unread: Vec<UnreadRecipient>,
}

impl Recipients {
    /// Adds the recipients of a field. `prefix`: see [`ParseOptions`]; `ours`: this program has written the file.
    fn add(&mut self, field: &RecipientField<'_>, domain: Option<&Domain>, prefix: Option<&str>, ours: bool) {
        for (at, text, address) in addresses(&field.value.octets) {
            let mailbox = match address {
                Ok(Address::Settled(mark)) => {
                    self.settled.push(mark);
                    let text = String::from_utf8_lossy(&text).replace(char::from(mark.octet()), "@");
                    self.settled_addresses.push(text.trim_matches(['<', '>']).to_owned());
                    continue;
                }
                Ok(Address::Open(mailbox)) if ours => in_domain(mailbox, domain),
                // Another agent delivers only to domains held here, so the mailbox gets the spelling that it has here.
                Ok(Address::Open(mailbox)) => in_domain(without_prefix(mailbox.canonical(), prefix), domain),
                Err(reason) => Err(reason),
            };
            match mailbox {
                Ok(mailbox) => {
                    let place = field.value.place(at + mark_place(&text));
                    match self.numbers.get(&mailbox) {
                        Some(number) => self.marks[*number].push(place),
                        None => {
                            self.numbers.insert(mailbox.clone(), self.open.len());
                            self.open.push(with_parameters(mailbox, &field.parameters));
                            self.marks.push(vec![place]);
                        }
                    }
                }
                Err(reason) => self.unread.push(UnreadRecipient { text, reason }),
            }
        }
    }
}

/// The fields of an envelope.
#[derive(Default)]
struct Fields<'a> {
    return_path: Option<Cow<'a, [u8]>>,
    delivered_to: Vec<RecipientField<'a>>,
    original_to: Vec<RecipientField<'a>>,
    ours: Option<String>,
}

impl<'a> Fields<'a> {
    /// Whether a field of this name belongs to the envelope after the fields so far.
    fn includes(&self, name: &[u8]) -> bool {
        match name {
            b"return-path" => self.return_path.is_none(),
            b"delivered-to" | b"x-original-to" | b"envelope-to" | b"x-odmr-envelope" | b"x-odmr-recipient" => true,
            // These lines are ignored: other agents write them, and an earlier version did in copies in `.refused`.
            b"delivery-date" | b"x-envelope-from" | b"x-odmr-refused" => true,
            _ => false,
        }
    }

    /// Adds a field with its continuation lines, which begins at `start` in the file.
    fn add(&mut self, name: &[u8], field: &'a [u8], start: usize) {
        let value = FieldValue::unfolded(field, start);
        match name {
            b"return-path" => self.return_path = Some(value.octets),
            b"delivered-to" => self.delivered_to.push(RecipientField { value, parameters: Cow::default() }),
            b"x-original-to" | b"envelope-to" => {
                self.original_to.push(RecipientField { value, parameters: Cow::default() });
            }
            b"x-odmr-envelope" => self.ours = String::from_utf8(value.octets.into_owned()).ok(),
            b"x-odmr-recipient" => {
                if let Some(recipient) = self.delivered_to.last_mut() {
                    recipient.parameters = value.octets;
                }
            }
            _ => {}
        }
    }

    /// The recipients in `Delivered-To`; if none of them is in the domain, those in `X-Original-To` and `Envelope-To`.
    /// If no recipient is in the domain, `unread` has those of all three.
    fn recipients(&self, options: ParseOptions<'_>) -> Recipients {
        let ours = self.ours.is_some();
        let mut all_unread = Vec::new();
        for (fields, prefix) in [(&self.delivered_to, options.prefix), (&self.original_to, None)] {
            let mut recipients = Recipients::default();
            fields.iter().for_each(|field| recipients.add(field, options.domain, prefix, ours));
            if !recipients.open.is_empty() || !recipients.settled.is_empty() {
                return recipients;
            }
            all_unread.append(&mut recipients.unread);
        }
        Recipients { unread: all_unread, ..Recipients::default() }
    }

    /// The reverse path; `<>` if the agent wrote none.
    fn reverse_path(&self) -> Result<ReversePath, String> {
        let Some(value) = &self.return_path else { return Ok(ReversePath::Null) };
        if let Ok((path, _)) = reverse_path(value) {
            return Ok(path);
        }
        let failed = |reason| format!("Return-Path: {reason}");
        let text = std::str::from_utf8(value).map_err(|_| failed("it is not in UTF-8".to_owned()))?;
        let compact: String = text.split([' ', '\t']).collect();
        // Postfix writes <MAILER-DAEMON> instead of <>: `null_sender` in pipe(8).
        if ["", "<>", "<MAILER-DAEMON>"].iter().any(|null| compact.eq_ignore_ascii_case(null)) {
            return Ok(ReversePath::Null);
        }
        let mut addresses = divide(text, None).into_iter();
        match (addresses.next(), addresses.next()) {
            (Some(ListedAddress { mailbox, .. }), None) => mailbox.map(ReversePath::Mailbox).map_err(failed),
            _ => Err(failed(format!("cannot read {text}: it is not one address"))),
        }
    }

    fn envelope(&self, from: ReversePath, recipients: Vec<Recipient>, options: ParseOptions<'_>) -> QueuedEnvelope {
        let (id, arrived) = (options.id.to_owned(), options.arrived);
        let mut queued = QueuedEnvelope { id, arrived, envelope: Envelope { recipients, ..Envelope::new(from) } };
        let envelope = &mut queued.envelope;
        for word in self.ours.as_deref().unwrap_or_default().split("; ").map(str::trim) {
            match word.split_once('=').unwrap_or((word, "")) {
                ("id", id) if is_plain_id(id) => queued.id = id.to_owned(),
                ("arrived", date) => queued.arrived = Timestamp::parse_rfc3339(date).unwrap_or(arrived),
                ("body", "8BITMIME") => envelope.body = Body::EightBit,
                ("body", "7BIT") => envelope.body = Body::SevenBit,
                ("smtputf8", _) => envelope.utf8 = true,
                ("ret", "FULL") => envelope.ret = Some(Return::Full),
                ("ret", "HDRS") => envelope.ret = Some(Return::Header),
                ("envid", id) if is_xtext(id.as_bytes()) => envelope.envelope_id = Some(id.to_owned()),
                _ => {}
            }
        }
        queued
    }
}

/// Whether this may be the id of a message. It is written into a file, the log and a batch without quoting.
pub(super) fn is_plain_id(id: &str) -> bool {
    !id.is_empty() && id.len() <= 255 && id.bytes().all(|octet| octet.is_ascii_graphic() && octet != b';')
}

/// An address of a list.
enum Address {
    Open(Mailbox),
    Settled(Mark),
}

/// Divides a list of addresses. Of each it returns the octet where it begins, its text, and the address, or the reason
/// why it cannot be read.
fn addresses(value: &[u8]) -> Vec<(usize, Vec<u8>, Result<Address, String>)> {
    let Ok(text) = std::str::from_utf8(value) else { return addresses_in_octets(value) };
    if let Some(mailbox) = address(text) {
        return vec![(0, value.to_owned(), Ok(Address::Open(mailbox)))];
    }
    let read = |listed: ListedAddress<'_>| {
        let mailbox = address(listed.text).map_or(listed.mailbox, Ok);
        let address =
            mailbox.map(Address::Open).or_else(|reason| settled(listed.text).map(Address::Settled).ok_or(reason));
        (listed.at, listed.text.as_bytes().to_owned(), address)
    };
    divide(text, None).into_iter().map(read).collect()
}

/// Like [`addresses`], for a list that is not in UTF-8. Its addresses that are in UTF-8 can be read. To divide the
/// list, each octet above 127 is replaced by a private character, which has no meaning in the grammar.
fn addresses_in_octets(value: &[u8]) -> Vec<(usize, Vec<u8>, Result<Address, String>)> {
    const PRIVATE_USE: u32 = 0xE000;
    let character = |octet: &u8| match octet {
        0..=127 => Some(char::from(*octet)),
        128.. => char::from_u32(PRIVATE_USE + u32::from(*octet)),
    };
    let text: String = value.iter().filter_map(character).collect();
    let (mut found, mut start, mut counted) = (Vec::new(), 0, 0);
    for listed in divide(&text, None) {
        let octet = |character| u8::try_from(u32::from(character) & 0xFF).unwrap_or_default();
        let part: Vec<u8> = listed.text.chars().map(octet).collect();
        start += text[counted..listed.at].chars().count();
        counted = listed.at;
        match std::str::from_utf8(&part) {
            Ok(_) => found.extend(addresses(&part).into_iter().map(|(at, text, address)| (start + at, text, address))),
            Err(_) => {
                let reason = format!("cannot read {}: it is not in UTF-8", String::from_utf8_lossy(&part));
                found.push((start, part, Err(reason)));
            }
        }
    }
    found
}

/// The octet of an address that its mark overwrites: the last `@` outside comments without which the address cannot be
/// read.
fn mark_place(address: &[u8]) -> usize {
    let places = mark_places(address, b'@');
    let is_place = |at: &usize| {
        let mut marked = address.to_vec();
        marked[*at] = Mark::Done.octet();
        !address.contains(&b'(') || std::str::from_utf8(&marked).is_ok_and(|text| one_address(text).is_none())
    };
    places.into_iter().find(is_place).unwrap_or(0)
}

/// The places of this octet in an address outside comments, the last ones first.
fn mark_places(address: &[u8], octet: u8) -> Vec<usize> {
    let comments = match std::str::from_utf8(address) {
        Ok(text) if address.contains(&b'(') => AddressList::parse(text, None).comments,
        _ => Vec::new(),
    };
    let mut comments = comments.into_iter().rev().peekable();
    let mut in_comment = |at: &usize| {
        while comments.next_if(|comment| comment.start > *at).is_some() {}
        comments.peek().is_some_and(|comment| comment.contains(at))
    };
    let found = (0..address.len()).rev().filter(|at| address[*at] == octet);
    found.filter(|at| !in_comment(at)).take(MARK_PLACES).collect()
}

/// The mark in an address: the address can be read if an `@` replaces it.
fn settled(text: &str) -> Option<Mark> {
    [Mark::Done, Mark::Rejected].into_iter().find(|mark| {
        let without = |at: usize| one_address(&[&text[..at], "@", &text[at + 1..]].concat()).is_some();
        mark_places(text.as_bytes(), mark.octet()).into_iter().any(without)
    })
}

/// The mailbox of a list that has exactly one address.
fn one_address(text: &str) -> Option<Mailbox> {
    let mut listed = divide(text, None).into_iter();
    let first = listed.next().filter(|_| listed.next().is_none())?;
    address(text).or_else(|| first.mailbox.ok())
}

/// The mailbox of an address with angle brackets or without. Without them only the grammar of RFC 5321 is read: a comma
/// may divide a list.
fn address(text: &str) -> Option<Mailbox> {
    // Not `trim`: a local part may begin or end with white space of Unicode.
    let text = text.trim_matches([' ', '\t']);
    match text.strip_prefix('<').and_then(|text| text.strip_suffix('>')) {
        Some(inside) => Mailbox::parse_any(inside).ok(),
        None => Mailbox::parse(text),
    }
}

/// A recipient as written in `Delivered-To`: in angle brackets, if [`addresses`] could not read it without them.
fn field_value(mailbox: &Mailbox) -> String {
    let text = mailbox.to_string();
    let plain = |octet: u8| octet.is_ascii_alphanumeric() || b"!#$%&'*+-/=?^_`{|}~.@".contains(&octet);
    let is_plain = text.bytes().all(plain) && text.matches('@').count() == 1 && !text.contains("=?");
    let is_plain = is_plain && !text.trim_start_matches('.').starts_with('@');
    // With its mark the address is read as a list, and white space of Unicode at an end would be lost.
    let has_space = text.contains(|character: char| character.is_whitespace() && !character.is_ascii());
    if is_plain || !has_space && Mailbox::parse(&text).is_some() { text } else { format!("<{text}>") }
}

fn in_domain(mailbox: Mailbox, domain: Option<&Domain>) -> Result<Mailbox, String> {
    match domain {
        Some(domain) if mailbox.domain() != Some(domain) => Err(format!("{mailbox} is not in {domain}")),
        _ => Ok(mailbox),
    }
}

/// The mailbox without the prefix that another agent has added to its local part.
fn without_prefix(mailbox: Mailbox, prefix: Option<&str>) -> Mailbox {
    let rest = prefix.and_then(|prefix| mailbox.local().strip_prefix(prefix)).filter(|rest| !rest.is_empty());
    let original =
        rest.zip(mailbox.domain()).and_then(|(rest, domain)| Mailbox::parse_any(&format!("{rest}@{domain}")).ok());
    original.unwrap_or(mailbox)
}

/// The recipient with the parameters of its `X-ODMR-Recipient` field.
fn with_parameters(mailbox: Mailbox, parameters: &[u8]) -> Recipient {
    let mut recipient = Recipient::plain(mailbox);
    for parameter in parameters.split(|octet| *octet == b' ') {
        if let Some(value) = parameter.strip_prefix(b"NOTIFY=") {
            recipient.notify = Notify::parse(value).unwrap_or_default();
        } else if let Some(value) = parameter.strip_prefix(b"ORCPT=") {
            recipient.original = original_recipient(value);
        }
    }
    recipient
}

#[cfg(test)]
mod tests;
