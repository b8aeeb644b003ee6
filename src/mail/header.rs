//! The header of a message: reading recipients and the client from it, and completing the header of a submitted message (RFC
//! 5322, RFC 6409 section 8).
//!
//! The header of mail in transit must not be changed (RFC 5321 section 6.4). Only `Return-Path` and fields in the form of our
//! own records (`X-ODMR-`) are removed. In a submitted message, `sendmail -t` reads the recipients from the header, `Bcc` is
//! removed, `Date` and `Message-ID` are added if they are missing, and [`submitted_field`] completes each field. The fields of
//! a signed message stay unchanged.
//!
//! ```text
//! From eva Fri Jan  2 03:04:05 2026       separator of an mbox: removed from a submitted message
//! Subject: hello                          a field
//!  again                                  its continuation
//! To: Joe <joe@example.net>, eva
//!
//! The body begins after the blank line, or with the first line that cannot belong to a field.
//! ```
//!
//! Fields are read leniently and stay unchanged octet for octet. Lines end in LF; CRLF is read too, and stays.

use std::borrow::Cow;
use std::collections::HashSet;

use super::address::{Domain, Mailbox};
use super::address_list::parse_addresses;
use super::received::ClientInfo;
use super::submitted_field;

/// Octets of the longest header that a [`HeaderCompleter`] changes, because it holds the header in memory.
const HEADER_LIMIT: usize = 256 << 10;

/// A header and its fields.
#[derive(Debug)]
pub struct Header<'a> {
    /// The separators of an mbox.
    separators: &'a [u8],
    fields: Vec<Field<'a>>,
    /// The blank line; empty if there is none.
    blank: &'a [u8],
    /// See [`Header::octets`].
    octets: usize,
    line_end: &'static str,
}

/// The most ids of earlier messages in a [`Thread`]: the last ones.
const REFERENCES_LIMIT: usize = 20;

/// Octets of a Message-ID; a longer one is ignored.
const MESSAGE_ID_LIMIT: usize = 250;

/// The ids of a message and of the earlier messages in its thread.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Thread {
    /// The Message-ID with its angle brackets.
    pub message_id: Option<String>,
    /// The earlier messages, the oldest first, 20 at most.
    pub references: Vec<String>,
}

/// The ids in the value of a field: each from `<` to `>`, in printable ASCII.
fn message_ids(value: &[u8]) -> Vec<String> {
    let mut ids = Vec::new();
    for part in value.split(|octet| *octet == b'<').skip(1) {
        let Some(end) = part.iter().position(|octet| *octet == b'>') else { continue };
        let id = &part[..end];
        if (1..=MESSAGE_ID_LIMIT).contains(&id.len()) && id.iter().all(u8::is_ascii_graphic) {
            ids.push(format!("<{}>", String::from_utf8_lossy(id)));
        }
    }
    ids
}

/// A field. `raw` has its name, its continuation lines, and its line end unless the content ends with it.
#[derive(Clone, Copy, Debug)]
struct Field<'a> {
    name: &'a [u8],
    raw: &'a [u8],
}

impl<'a> Header<'a> {
    /// Reads the header of `content`, up to its blank line or to the first line that cannot belong to a field.
    pub fn parse(content: &'a [u8]) -> Header<'a> {
        let first = content.split_inclusive(|octet| *octet == b'\n').next().unwrap_or_default();
        let line_end = if first.ends_with(b"\r\n") { "\r\n" } else { "\n" };
        let mut header = Header { separators: &[], fields: Vec::new(), blank: &[], octets: 0, line_end };
        for line in content.split_inclusive(|octet| *octet == b'\n') {
            let end = header.octets + line.len();
            match HeaderLine::of(line, HeaderState::after(header.octets, !header.fields.is_empty())) {
                HeaderLine::Separator => header.separators = &content[..end],
                HeaderLine::Field(name) => header.fields.push(Field { name, raw: line }),
                HeaderLine::Continuation => {
                    if let Some(field) = header.fields.last_mut() {
                        field.raw = &content[header.octets - field.raw.len()..end];
                    }
                }
                HeaderLine::Blank => {
                    header.blank = line;
                    header.octets = end;
                    break;
                }
                HeaderLine::Body => break,
            }
            header.octets = end;
        }
        header
    }

    /// The client that has sent the message to the host `by`, if `by` has written the topmost `Received` field: see
    /// [`ClientInfo::parse`].
    pub fn client_info(&self, by: &str) -> Option<ClientInfo> {
        let field = self.fields.iter().find(|field| field.is("Received"))?;
        ClientInfo::parse(&String::from_utf8_lossy(field.value()), by)
    }

    /// The Message-ID, and those of earlier messages (RFC 5322 section 3.6.4).
    pub fn thread(&self) -> Thread {
        let field = |name: &str| self.fields.iter().find(|field| field.is(name));
        let ids = |name: &str| field(name).map(|field| message_ids(field.value())).unwrap_or_default();
        let (replied_to, mut references) = (ids("In-Reply-To"), ids("References"));
        if references.is_empty() && replied_to.len() == 1 {
            references = replied_to;
        }
        references.drain(..references.len().saturating_sub(REFERENCES_LIMIT));
        Thread { message_id: ids("Message-ID").into_iter().next(), references }
    }

    /// Octets of the header with its blank line: the body begins there.
    pub fn octets(&self) -> usize {
        self.octets
    }

    /// The recipients in `To`, `Cc` and `Bcc`, each once; there may be none. A local part without a host gets the host `home`.
    ///
    /// If the message was resent, it has blocks of `Resent-` fields, the newest first, and only the fields of the newest block
    /// count (RFC 5322 section 3.6.6). A block has each field once, so a field that occurs again begins an older block, and
    /// any other field ends the block.
    ///
    /// # Errors
    /// An address cannot be read: a sentence with the field and the address.
    pub fn recipients(&self, home: &Domain) -> Result<Vec<Mailbox>, String> {
        let resent = self.resent();
        let (fields, names) = match resent.is_empty() {
            true => (&self.fields[..], ["To", "Cc", "Bcc"]),
            false => (resent, ["Resent-To", "Resent-Cc", "Resent-Bcc"]),
        };
        let mut found = Vec::new();
        for field in fields {
            if let Some(name) = names.iter().find(|name| field.is(name)) {
                // A display name may be in any character set; parse_addresses rejects an address that is not UTF-8.
                let text = String::from_utf8_lossy(field.value());
                found.extend(parse_addresses(&text, home).map_err(|error| format!("{name}: {error}"))?);
            }
        }
        let mut seen = HashSet::new();
        found.retain(|mailbox| seen.insert(mailbox.clone()));
        Ok(found)
    }

    /// Whether an address in the header needs SMTPUTF8 (RFC 6531 section 3.2). Other text that is not ASCII does not.
    pub fn needs_utf8(&self) -> bool {
        self.fields.iter().any(|field| submitted_field::needs_utf8(field.name, field.raw))
    }

    /// Whether a change to a field could break a signature: of the header (RFC 6376), or of the content (RFC 1847), in which
    /// the program may have signed a copy of the header.
    fn is_signed(&self) -> bool {
        const SIGNATURES: [&str; 3] = ["DKIM-Signature", "DomainKey-Signature", "ARC-Message-Signature"];
        self.fields.iter().any(|field| {
            let begin = field.value().trim_ascii_start();
            let begin = begin.get(..b"multipart/signed".len()).unwrap_or_default();
            SIGNATURES.into_iter().any(|name| field.is(name))
                || field.is("Content-Type") && begin.eq_ignore_ascii_case(b"multipart/signed")
        })
    }

    /// The header of a message in transit with its blank line, octet for octet as it was received (RFC 5321 section 6.4), but
    /// without `Return-Path`, which only the final delivery writes (section 4.4), and without fields in the form of our own
    /// records.
    pub fn relayed(&self) -> Vec<u8> {
        let fields = self.fields.iter().filter(|field| !field.is_record()).map(|field| field.raw);
        [&[self.separators], &fields.collect::<Vec<_>>()[..], &[self.blank]].concat().concat()
    }

    /// The completed header of a submitted message with its blank line (RFC 6409 section 8): missing fields are added at
    /// its end, records of a delivery and the separators of an mbox are removed, and [`submitted_field::complete`] is
    /// applied to each field.
    ///
    /// In a signed message no field is changed. Only `Return-Path` and fields in the form of our own records are removed, and
    /// with `drop_bcc` the `Bcc`: to disclose blind recipients would be worse than to break the signature, and RFC 6376 section
    /// 5.4.1 advises against signing that field.
    pub fn complete(&self, additions: &HeaderAdditions) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.octets + 256);
        let signed = self.is_signed();
        for field in &self.fields {
            let is_bcc = additions.drop_bcc && (field.is("Bcc") || field.is("Resent-Bcc"));
            // Content-Length counts the octets of a body in an mbox, and is wrong elsewhere.
            if is_bcc || field.is_record() || field.is("Content-Length") && !signed {
                continue;
            }
            let mut raw = Cow::Borrowed(field.raw);
            // The last line of the content may have no line end.
            if !raw.ends_with(b"\n") {
                raw.to_mut().extend_from_slice(self.line_end.as_bytes());
            }
            match signed {
                true => out.extend_from_slice(&raw),
                false => {
                    let home = &additions.home;
                    out.extend_from_slice(&submitted_field::complete(field.name, &raw, home, self.line_end));
                }
            }
        }
        let from = additions.from.as_deref();
        let added = [("From", from), ("Date", Some(&*additions.date)), ("Message-ID", Some(&*additions.message_id))];
        for (name, value) in added {
            if let Some(value) = value.filter(|_| !self.fields.iter().any(|field| field.is(name))) {
                // A user's full name may be part of the value: a line end in it must not begin another field.
                let value = value.replace(char::is_control, " ");
                out.extend_from_slice(format!("{name}: {value}{}", self.line_end).as_bytes());
            }
        }
        out.extend_from_slice(self.line_end.as_bytes());
        out
    }

    /// The newest block of `Resent-` fields.
    fn resent(&self) -> &[Field<'a>] {
        let Some(begin) = self.fields.iter().position(Field::is_resent) else {
            return &[];
        };
        let rest = &self.fields[begin..];
        let again = |at: usize| rest[..at].iter().any(|field| field.name.eq_ignore_ascii_case(rest[at].name));
        let length = (1..rest.len()).find(|at| !rest[*at].is_resent() || again(*at));
        &rest[..length.unwrap_or(rest.len())]
    }
}

impl Field<'_> {
    fn is(&self, name: &str) -> bool {
        self.name.eq_ignore_ascii_case(name.as_bytes())
    }

    fn is_resent(&self) -> bool {
        self.begins("Resent-")
    }

    /// Whether the field is a record of an earlier delivery, or is in the form of our own records.
    fn is_record(&self) -> bool {
        self.is("Return-Path") || self.begins("X-ODMR-")
    }

    fn begins(&self, prefix: &str) -> bool {
        let begin = self.name.get(..prefix.len());
        begin.is_some_and(|begin| begin.eq_ignore_ascii_case(prefix.as_bytes()))
    }

    /// The text after the colon, with the line ends of folded lines.
    fn value(&self) -> &[u8] {
        let colon = self.raw.iter().position(|octet| *octet == b':');
        colon.map_or(&[], |at| &self.raw[at + 1..])
    }
}

/// The fields to add to a submitted header that lacks them.
#[derive(Clone, Debug)]
pub struct HeaderAdditions {
    /// The domain for addresses without one.
    pub home: Domain,
    /// The value of a `Date` field.
    pub date: String,
    /// The value of a `Message-ID` field, with its angle brackets.
    pub message_id: String,
    /// The value of a `From` field; `None`: none is added.
    pub from: Option<String>,
    /// `Bcc` and `Resent-Bcc` are removed (RFC 5322 section 3.6.3).
    pub drop_bcc: bool,
}

/// The kind of a line in a header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum HeaderLine<'a> {
    /// A `From ` line, which begins a message in an mbox, perhaps quoted with `>`.
    Separator,
    /// The first line of a field with this name.
    Field(&'a [u8]),
    /// A continuation of the field before it.
    Continuation,
    /// The blank line that ends the header.
    Blank,
    /// A line of the body: the header has ended before it.
    Body,
}

/// The state that the lines so far have led to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum HeaderState {
    /// There is no line yet.
    Beginning,
    /// Separators only: there is no field to continue.
    Separator,
    /// There is a field.
    Field,
}

impl HeaderState {
    /// The state after this many octets of a header. `field`: one of the lines was a field.
    fn after(octets: usize, field: bool) -> HeaderState {
        match (octets, field) {
            (0, _) => HeaderState::Beginning,
            (_, false) => HeaderState::Separator,
            (_, true) => HeaderState::Field,
        }
    }
}

impl HeaderLine<'_> {
    /// The kind of `line`, with or without its line end, in `state`.
    pub(crate) fn of(line: &[u8], state: HeaderState) -> HeaderLine<'_> {
        if matches!(line, b"\n" | b"\r\n" | b"") {
            return HeaderLine::Blank;
        }
        if matches!(line[0], b' ' | b'\t') {
            return if state == HeaderState::Field { HeaderLine::Continuation } else { HeaderLine::Body };
        }
        // RFC 5322 section 2.2: printable ASCII without the colon; section 4.5 permits white space before the colon.
        let length = line.iter().position(|octet| !matches!(octet, 33..=57 | 59..=126)).unwrap_or(line.len());
        let (name, rest) = line.split_at(length);
        if !name.is_empty() && rest.trim_ascii_start().starts_with(b":") {
            HeaderLine::Field(name)
        } else if state != HeaderState::Field && is_separator(line) {
            HeaderLine::Separator
        } else {
            HeaderLine::Body
        }
    }
}

/// Whether a line before the header separates messages in an mbox: `From `, or `>From ` after programs that quote it.
fn is_separator(line: &[u8]) -> bool {
    let quotes = line.iter().take_while(|octet| **octet == b'>').count();
    line[quotes..].starts_with(b"From ")
}

/// Changes the header of a message that arrives in pieces; the body passes unchanged.
///
/// The header is held until its end has arrived. If it has more than 256 KiB, the whole message passes unchanged. The result
/// does not depend on how the content was cut into pieces.
#[derive(Debug)]
pub struct HeaderCompleter {
    /// `None`: the header was written.
    change: Option<HeaderChange>,
    held: Vec<u8>,
    /// Octets of `held` in lines that were examined.
    examined: usize,
    /// One of these lines was a field.
    field: bool,
}

#[derive(Debug)]
enum HeaderChange {
    Relay,
    Complete(HeaderAdditions),
}

impl HeaderCompleter {
    /// A completer for one message that is submitted: see [`Header::complete`].
    pub fn new(additions: HeaderAdditions) -> HeaderCompleter {
        HeaderCompleter::of(HeaderChange::Complete(additions))
    }

    /// A completer for one message in transit: see [`Header::relayed`].
    pub fn relay() -> HeaderCompleter {
        HeaderCompleter::of(HeaderChange::Relay)
    }

    fn of(change: HeaderChange) -> HeaderCompleter {
        HeaderCompleter { change: Some(change), held: Vec::new(), examined: 0, field: false }
    }

    /// Receives a piece of the content, and appends to `out` the part of the result that is known.
    pub fn feed(&mut self, input: &[u8], out: &mut Vec<u8>) {
        let mut rest = input;
        if self.change.is_some() {
            let (taken, left) = rest.split_at(rest.len().min(HEADER_LIMIT - self.held.len()));
            self.held.extend_from_slice(taken);
            rest = left;
            if self.header_ended() {
                self.finish(out);
            } else if !rest.is_empty() {
                self.change = None;
                out.append(&mut self.held);
            }
        }
        out.extend_from_slice(rest);
    }

    /// Ends the content: the octets that are still held are a header, which may lack its blank line.
    pub fn finish(&mut self, out: &mut Vec<u8>) {
        if let Some(change) = self.change.take() {
            let held = std::mem::take(&mut self.held);
            let header = Header::parse(&held);
            out.extend_from_slice(&match change {
                HeaderChange::Relay => header.relayed(),
                HeaderChange::Complete(additions) => header.complete(&additions),
            });
            out.extend_from_slice(&held[header.octets()..]);
        }
    }

    /// Examines the whole lines that have arrived since the last call. Returns whether the header has ended.
    fn header_ended(&mut self) -> bool {
        while let Some(length) = self.held[self.examined..].iter().position(|octet| *octet == b'\n') {
            let line = &self.held[self.examined..=self.examined + length];
            match HeaderLine::of(line, HeaderState::after(self.examined, self.field)) {
                HeaderLine::Blank | HeaderLine::Body => return true,
                HeaderLine::Field(_) => self.field = true,
                HeaderLine::Separator | HeaderLine::Continuation => {}
            }
            self.examined += length + 1;
        }
        false
    }
}

#[cfg(test)]
mod tests;
