//! The header of a message: what it says about recipients and the client, and how a submitted one is completed (RFC 5322,
//! RFC 6409 section 8).
//!
//! The header of mail in transit is never changed (RFC 5321 section 6.4). A message that enters the mail system here is
//! another matter: `sendmail -t` reads the recipients from the header, `Bcc` is removed, and `Date` and `Message-ID` are
//! added if they are missing.
//!
//! ```text
//! From eva Fri Jan  2 03:04:05 2026       the separator of an mbox: dropped
//! Subject: hello                          a field
//!  again                                  its continuation
//! To: Joe <joe@example.net>, eva
//!
//! The body begins after the blank line, or with the first line that cannot belong to a field.
//! ```
//!
//! Fields are read leniently and kept octet for octet. Lines end in LF; CRLF is understood and kept.

use std::collections::HashSet;

use super::address::{Domain, Mailbox};
use super::address_list::parse_addresses;
use super::received::ClientInfo;

/// Octets of the longest header that a [`HeaderCompleter`] changes: it holds the header in memory.
const HEADER_LIMIT: usize = 256 << 10;

/// A header and its fields.
#[derive(Debug)]
pub struct Header<'a> {
    fields: Vec<Field<'a>>,
    /// As [`Header::octets`].
    octets: usize,
    line_end: &'static str,
}

/// Ids of earlier messages that are kept: the last ones.
const REFERENCES_LIMIT: usize = 20;

/// Octets of a Message-ID at most; a longer one is left out.
const MESSAGE_ID_LIMIT: usize = 250;

/// Where a message stands in its thread.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Thread {
    /// With its angle brackets.
    pub message_id: Option<String>,
    /// The oldest first.
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
        let mut header = Header { fields: Vec::new(), octets: 0, line_end };
        for line in content.split_inclusive(|octet| *octet == b'\n') {
            let end = header.octets + line.len();
            match HeaderLine::of(line, HeaderState::after(header.octets, !header.fields.is_empty())) {
                HeaderLine::Separator => {}
                HeaderLine::Field(name) => header.fields.push(Field { name, raw: line }),
                HeaderLine::Continuation => {
                    if let Some(field) = header.fields.last_mut() {
                        field.raw = &content[header.octets - field.raw.len()..end];
                    }
                }
                HeaderLine::Blank => {
                    header.octets = end;
                    break;
                }
                HeaderLine::Body => break,
            }
            header.octets = end;
        }
        header
    }

    /// The client that sent the message to the host `by`, if `by` has written the topmost `Received` field: see
    /// [`ClientInfo::parse`].
    pub fn client_info(&self, by: &str) -> Option<ClientInfo> {
        let field = self.fields.iter().find(|field| field.is("Received"))?;
        ClientInfo::parse(&String::from_utf8_lossy(field.value()), by)
    }

    /// The Message-ID, and those of the messages before it (RFC 5322 section 3.6.4).
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

    /// Octets of the header, its blank line included: the body begins there.
    pub fn octets(&self) -> usize {
        self.octets
    }

    /// The recipients that the header names in `To`, `Cc` and `Bcc`, each once; perhaps none. A local part without a host
    /// gets the host `home`.
    ///
    /// If the message was resent, it has blocks of `Resent-` fields, the newest first, and the fields of the newest block
    /// count instead (RFC 5322 section 3.6.6). A block has each field once, so a field that occurs again begins an older
    /// block, and any other field ends the block.
    ///
    /// # Errors
    /// A sentence that names the field and shows the address that cannot be read.
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

    /// The completed header with its blank line: missing fields are added at its end, `Bcc` and the separator of an mbox
    /// are removed, and nothing else is changed (RFC 6409 section 8).
    pub fn complete(&self, additions: &HeaderAdditions) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.octets + 256);
        for field in &self.fields {
            if additions.drop_bcc && (field.is("Bcc") || field.is("Resent-Bcc")) {
                continue;
            }
            out.extend_from_slice(field.raw);
            // The last line of the content may have no line end.
            if !field.raw.ends_with(b"\n") {
                out.extend_from_slice(self.line_end.as_bytes());
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
        let prefix = self.name.get(..b"Resent-".len());
        prefix.is_some_and(|prefix| prefix.eq_ignore_ascii_case(b"Resent-"))
    }

    /// The text after the colon, with the line ends of folded lines.
    fn value(&self) -> &[u8] {
        let colon = self.raw.iter().position(|octet| *octet == b':');
        colon.map_or(&[], |at| &self.raw[at + 1..])
    }
}

/// What a submitted header is completed with. A field that the header has is not added.
#[derive(Clone, Debug, Default)]
pub struct HeaderAdditions {
    /// The value of a `Date` field.
    pub date: String,
    /// The value of a `Message-ID` field, with its angle brackets.
    pub message_id: String,
    /// The value of a `From` field; `None`: none is added.
    pub from: Option<String>,
    /// `Bcc` and `Resent-Bcc` are removed (RFC 5322 section 3.6.3).
    pub drop_bcc: bool,
}

/// What a line of a header is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum HeaderLine<'a> {
    /// The `From ` line that begins a message in an mbox.
    Separator,
    /// A field with this name begins.
    Field(&'a [u8]),
    /// It continues the field before it.
    Continuation,
    /// The blank line that ends the header.
    Blank,
    /// It is not part of the header, which has ended before it.
    Body,
}

/// What the lines before mean for the next one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum HeaderState {
    /// There is no line yet.
    Beginning,
    /// The separator only: there is no field to continue.
    Separator,
    /// There is a field.
    Field,
}

impl HeaderState {
    /// The state after this many octets of a header, which had a field or not.
    fn after(octets: usize, field: bool) -> HeaderState {
        match (octets, field) {
            (0, _) => HeaderState::Beginning,
            (_, false) => HeaderState::Separator,
            (_, true) => HeaderState::Field,
        }
    }
}

impl HeaderLine<'_> {
    /// What `line` is, with or without its line end, if the lines before it led to `state`.
    pub(crate) fn of(line: &[u8], state: HeaderState) -> HeaderLine<'_> {
        if matches!(line, b"\n" | b"\r\n" | b"") {
            return HeaderLine::Blank;
        }
        if matches!(line[0], b' ' | b'\t') {
            return if state == HeaderState::Field { HeaderLine::Continuation } else { HeaderLine::Body };
        }
        // RFC 5322 section 2.2: printable ASCII without the colon; section 4.5 allows white space before it.
        let length = line.iter().position(|octet| !matches!(octet, 33..=57 | 59..=126)).unwrap_or(line.len());
        let (name, rest) = line.split_at(length);
        if !name.is_empty() && rest.trim_ascii_start().starts_with(b":") {
            HeaderLine::Field(name)
        } else if state == HeaderState::Beginning && line.starts_with(b"From ") {
            HeaderLine::Separator
        } else {
            HeaderLine::Body
        }
    }
}

/// Completes the header of a message that arrives in pieces; the body passes through.
///
/// The header is held until its end has arrived. If it has more than 256 KiB, the message passes unchanged. The result
/// does not depend on how the content was cut into pieces.
#[derive(Debug)]
pub struct HeaderCompleter {
    /// `None`: the header is finished.
    additions: Option<HeaderAdditions>,
    held: Vec<u8>,
    /// Octets of `held` in lines that were examined.
    examined: usize,
    /// One of these lines was a field.
    field: bool,
}

impl HeaderCompleter {
    /// A completer for one message.
    pub fn new(additions: HeaderAdditions) -> HeaderCompleter {
        HeaderCompleter { additions: Some(additions), held: Vec::new(), examined: 0, field: false }
    }

    /// Receives a piece of the content, and appends to `out` what is complete.
    pub fn feed(&mut self, input: &[u8], out: &mut Vec<u8>) {
        let mut rest = input;
        if self.additions.is_some() {
            let (taken, left) = rest.split_at(rest.len().min(HEADER_LIMIT - self.held.len()));
            self.held.extend_from_slice(taken);
            rest = left;
            if self.header_ended() {
                self.finish(out);
            } else if !rest.is_empty() {
                self.additions = None;
                out.append(&mut self.held);
            }
        }
        out.extend_from_slice(rest);
    }

    /// Ends the content: octets that are still held are a header, perhaps without its blank line.
    pub fn finish(&mut self, out: &mut Vec<u8>) {
        if let Some(additions) = self.additions.take() {
            let held = std::mem::take(&mut self.held);
            let header = Header::parse(&held);
            out.extend_from_slice(&header.complete(&additions));
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
