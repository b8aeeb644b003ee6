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
//! Delivery agents write such lines, so any of them may fill the queue: folded (RFC 5322 section 2.2.3), with several
//! recipients in one field, after the `From ` line of an mbox. The envelope ends at the first other line. A `Return-Path`
//! that a sender has forged comes after our `Received`, so it is never read as part of the envelope; if the agent writes no
//! `Received`, it is the second one, which ends the envelope too.
//!
//! A recipient that cannot be read must not be lost, so it keeps the file (see [`ParsedEnvelope::unread`]). If the
//! `Return-Path` cannot be read, nothing is sent: with `<>` instead, the sender would get no DSN.

use std::borrow::Cow;

use crate::clock::Timestamp;
use crate::mail::address::{Domain, Mailbox, ReversePath, reverse_path};
use crate::mail::address_list::{ListedAddress, divide};
use crate::smtp::command::{Body, Envelope, Notify, Recipient, Return, original_recipient};

/// Octets of an envelope at most.
pub const ENVELOPE_LIMIT: usize = 1 << 20;

/// An envelope, and what the queue knows of the message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueuedEnvelope {
    /// The id of the message in the log and in its `Received` field.
    pub id: String,
    /// When we accepted the message; if another agent wrote the file, when it did.
    pub arrived: Timestamp,
    pub envelope: Envelope,
}

impl QueuedEnvelope {
    /// The same message for other recipients.
    pub fn with_recipients(&self, recipients: Vec<Recipient>) -> QueuedEnvelope {
        let envelope = self.envelope.with_recipients(recipients);
        QueuedEnvelope { id: self.id.clone(), arrived: self.arrived, envelope }
    }

    /// The header lines in front of the content, each with its LF; `extra` lines come last.
    pub fn to_header(&self, extra: &str) -> String {
        let mut text = format!("Return-Path: <{}>\n", self.envelope.from);
        for recipient in &self.envelope.recipients {
            text += &format!("Delivered-To: {}\n", recipient.mailbox);
            let notify = recipient.notify.as_given().map(|notify| format!(" NOTIFY={notify}")).unwrap_or_default();
            let original = recipient.original.as_ref().map(|original| format!(" ORCPT={original}")).unwrap_or_default();
            if !notify.is_empty() || !original.is_empty() {
                text += &format!("X-ODMR-Recipient:{notify}{original}\n");
            }
        }
        text += &format!("X-ODMR-Envelope: id={}; arrived={}", self.id, self.arrived.rfc3339());
        text += match self.envelope.body {
            Body::Unsaid => "",
            Body::SevenBit => "; body=7BIT",
            Body::EightBit => "; body=8BITMIME",
        };
        text += if self.envelope.utf8 { "; smtputf8" } else { "" };
        text += match self.envelope.ret {
            None => "",
            Some(Return::Full) => "; ret=FULL",
            Some(Return::Header) => "; ret=HDRS",
        };
        // The last: xtext may hold a semicolon, but no space.
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
    /// We have written the file, so the sizes in its name are right.
    pub ours: bool,
    /// The recipients that cannot be sent to from this queue.
    pub unread: Vec<UnreadRecipient>,
}

impl ParsedEnvelope {
    /// The recipients in the queue's domain; none if all of them are `unread`.
    pub fn recipients(&self) -> &[Recipient] {
        &self.envelope.envelope.recipients
    }
}

/// A recipient that cannot be read, or is not in the queue's domain. It stays in the file when the others are settled.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UnreadRecipient {
    /// As the file has it, on one line.
    pub text: Vec<u8>,
    /// A sentence with the address.
    pub reason: String,
}

impl UnreadRecipient {
    /// The field for it in a file that is written again.
    pub fn to_field(&self) -> Vec<u8> {
        [b"Delivered-To: ", self.text.as_slice(), b"\n"].concat()
    }
}

/// The result of [`parse`].
#[derive(Debug)]
pub enum Parsed {
    Envelope(ParsedEnvelope),
    /// The envelope does not end within these octets.
    More,
    /// The file has no recipient in the domain.
    NoRecipients,
    /// The `Return-Path` cannot be read, for this reason.
    NoReversePath(String),
}

/// Reads the envelope from the octets at the front of a file. `end`: these octets are the whole file. `domain`: recipients
/// in other domains are ignored. `id` and `arrived` are used for files that have none.
pub fn parse(front: &[u8], end: bool, domain: Option<&Domain>, id: &str, arrived: Timestamp) -> Parsed {
    let mut fields = Fields::default();
    let (mut octets, mut lines) = (0, 0);
    loop {
        let rest = &front[octets..];
        let Some(line) = line_length(rest, end) else { return Parsed::More };
        let name = field_name(&rest[..line]);
        // RFC 4155: the line that begins a message in an mbox. Agents that write for an mbox too put it here.
        let separator = octets == 0 && (rest.starts_with(b"From ") || rest.starts_with(b">From "));
        if !separator && !fields.includes(&name) {
            break;
        }
        let Some(length) = field_length(rest, end) else { return Parsed::More };
        fields.add(&name, &rest[..length]);
        octets += length;
        lines += rest[..length].split_inclusive(|octet| *octet == b'\n').count();
    }
    let (recipients, unread) = fields.recipients(domain);
    if recipients.is_empty() && unread.is_empty() {
        return Parsed::NoRecipients;
    }
    match fields.reverse_path() {
        Err(reason) => Parsed::NoReversePath(reason),
        Ok(from) => {
            let envelope = fields.envelope(from, recipients, id, arrived);
            Parsed::Envelope(ParsedEnvelope { envelope, octets, lines, ours: fields.ours.is_some(), unread })
        }
    }
}

/// The octets of the line that begins the text, with its LF; the last line of a file may lack it. `None`: it does not end
/// here.
fn line_length(text: &[u8], end: bool) -> Option<usize> {
    text.iter().position(|octet| *octet == b'\n').map(|at| at + 1).or(end.then_some(text.len()))
}

/// The octets of the field that begins the text, with its continuation lines (RFC 5322 section 2.2.3); `None`: it does not
/// end here.
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

/// The name of the field that the line begins, in lower case; empty: it begins none.
fn field_name(line: &[u8]) -> Vec<u8> {
    let colon = line.iter().position(|octet| *octet == b':').unwrap_or(0);
    line[..colon].trim_ascii_end().to_ascii_lowercase()
}

/// The value of a field, without the line ends of a folded one (RFC 5322 section 2.2.3).
fn unfolded(field: &[u8]) -> Cow<'_, [u8]> {
    let colon = field.iter().position(|octet| *octet == b':').map_or(0, |at| at + 1);
    let value = field[colon..].trim_ascii();
    if !value.contains(&b'\n') {
        return Cow::Borrowed(value);
    }
    let lines = value.split(|octet| *octet == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    Cow::Owned(lines.collect::<Vec<_>>().concat())
}

/// A field that names recipients.
struct RecipientField<'a> {
    value: Cow<'a, [u8]>,
    /// The value of `X-ODMR-Recipient`; empty: none.
    parameters: Cow<'a, [u8]>,
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
            // Other lines of delivery agents, and of our copies in `.refused`.
            b"delivery-date" | b"x-envelope-from" | b"x-odmr-refused" => true,
            _ => false,
        }
    }

    /// Adds a field with its continuation lines.
    fn add(&mut self, name: &[u8], field: &'a [u8]) {
        let value = unfolded(field);
        match name {
            b"return-path" => self.return_path = Some(value),
            b"delivered-to" => self.delivered_to.push(RecipientField { value, parameters: Cow::default() }),
            b"x-original-to" | b"envelope-to" => {
                self.original_to.push(RecipientField { value, parameters: Cow::default() });
            }
            b"x-odmr-envelope" => self.ours = String::from_utf8(value.into_owned()).ok(),
            b"x-odmr-recipient" => {
                if let Some(recipient) = self.delivered_to.last_mut() {
                    recipient.parameters = value;
                }
            }
            _ => {}
        }
    }

    /// The recipients in `domain`, each once, and those that cannot be read or are in another domain: those of
    /// `Delivered-To`, or if none of them is in `domain`, the original ones. If there is none at all in `domain`, the
    /// second list is that of both.
    fn recipients(&self, domain: Option<&Domain>) -> (Vec<Recipient>, Vec<UnreadRecipient>) {
        let mut all_unread = Vec::new();
        for fields in [&self.delivered_to, &self.original_to] {
            let (mut recipients, mut unread) = (Vec::<Recipient>::new(), Vec::new());
            for field in fields {
                for (text, mailbox) in addresses(&field.value) {
                    match mailbox.and_then(|mailbox| in_domain(mailbox, domain)) {
                        Ok(mailbox) if recipients.iter().any(|other| other.mailbox == mailbox) => {}
                        Ok(mailbox) => recipients.push(with_parameters(mailbox, &field.parameters)),
                        Err(reason) => unread.push(UnreadRecipient { text, reason }),
                    }
                }
            }
            if !recipients.is_empty() {
                return (recipients, unread);
            }
            all_unread.append(&mut unread);
        }
        (Vec::new(), all_unread)
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
        // Postfix writes <MAILER-DAEMON> for <>: `null_sender` in pipe(8).
        if ["", "<>", "<MAILER-DAEMON>"].iter().any(|null| compact.eq_ignore_ascii_case(null)) {
            return Ok(ReversePath::Null);
        }
        let mut addresses = divide(text, None).into_iter();
        match (addresses.next(), addresses.next()) {
            (Some(ListedAddress { mailbox, .. }), None) => mailbox.map(ReversePath::Mailbox).map_err(failed),
            _ => Err(failed(format!("cannot read {text}: it is not one address"))),
        }
    }

    fn envelope(&self, from: ReversePath, recipients: Vec<Recipient>, id: &str, arrived: Timestamp) -> QueuedEnvelope {
        let envelope = Envelope { recipients, ..Envelope::new(from) };
        let mut queued = QueuedEnvelope { id: id.to_owned(), arrived, envelope };
        let envelope = &mut queued.envelope;
        for word in self.ours.as_deref().unwrap_or_default().split("; ").map(str::trim) {
            match word.split_once('=').unwrap_or((word, "")) {
                ("id", id) => queued.id = id.to_owned(),
                ("arrived", date) => queued.arrived = Timestamp::parse_rfc3339(date).unwrap_or(arrived),
                ("body", "8BITMIME") => envelope.body = Body::EightBit,
                ("body", "7BIT") => envelope.body = Body::SevenBit,
                ("smtputf8", _) => envelope.utf8 = true,
                ("ret", "FULL") => envelope.ret = Some(Return::Full),
                ("ret", "HDRS") => envelope.ret = Some(Return::Header),
                ("envid", id) => envelope.envelope_id = Some(id.to_owned()),
                _ => {}
            }
        }
        queued
    }
}

/// The addresses of a list, each as the list has it, and as a mailbox or the reason why it cannot be read.
fn addresses(value: &[u8]) -> Vec<(Vec<u8>, Result<Mailbox, String>)> {
    let Ok(text) = std::str::from_utf8(value) else { return addresses_in_octets(value) };
    if let Some(mailbox) = address(text) {
        return vec![(value.to_owned(), Ok(mailbox))];
    }
    let read = |listed: ListedAddress<'_>| {
        let mailbox = address(listed.text).map_or(listed.mailbox, Ok);
        (listed.text.as_bytes().to_owned(), mailbox)
    };
    divide(text, None).into_iter().map(read).collect()
}

/// The addresses of a list that is not in UTF-8; those of them that are can be read. Each octet above 127 stands in for a
/// character without a meaning, so that the list can be divided.
fn addresses_in_octets(value: &[u8]) -> Vec<(Vec<u8>, Result<Mailbox, String>)> {
    const PRIVATE_USE: u32 = 0xE000;
    let character = |octet: &u8| match octet {
        0..=127 => Some(char::from(*octet)),
        128.. => char::from_u32(PRIVATE_USE + u32::from(*octet)),
    };
    let text: String = value.iter().filter_map(character).collect();
    let mut found = Vec::new();
    for listed in divide(&text, None) {
        let octet = |character| u8::try_from(u32::from(character) & 0xFF).unwrap_or_default();
        let part: Vec<u8> = listed.text.chars().map(octet).collect();
        match std::str::from_utf8(&part) {
            Ok(_) => found.append(&mut addresses(&part)),
            Err(_) => {
                let reason = format!("cannot read {}: it is not in UTF-8", String::from_utf8_lossy(&part));
                found.push((part, Err(reason)));
            }
        }
    }
    found
}

/// The mailbox of an address as SMTP writes it, with angle brackets or without.
fn address(text: &str) -> Option<Mailbox> {
    // Not `trim`: a local part may begin or end with white space of Unicode.
    let text = text.trim_matches([' ', '\t']);
    Mailbox::parse(text.strip_prefix('<').and_then(|text| text.strip_suffix('>')).unwrap_or(text))
}

fn in_domain(mailbox: Mailbox, domain: Option<&Domain>) -> Result<Mailbox, String> {
    match domain {
        Some(domain) if mailbox.domain() != Some(domain) => Err(format!("{mailbox} is not in {domain}")),
        _ => Ok(mailbox),
    }
}

/// The recipient with the parameters of its `X-ODMR-Recipient`.
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
