//! The header of a message that is submitted (RFC 5322, RFC 6409 section 8): who shall have it, and what
//! it lacks.
//!
//! Mail in transit is never touched (RFC 5321 section 6.4). A message that enters the mail system here is
//! another matter: `sendmail -t` takes its recipients from the header, `Bcc` must not be seen by anybody,
//! and a `Date` and a `Message-ID` are added where the writer's program left them out.
//!
//! ```text
//! From eva Fri Jan  2 03:04:05 2026       the separator of an mbox: dropped
//! Subject: hello                          a field
//!  again                                  its continuation
//! To: Joe <joe@example.net>, (a comment) friends: eva, "Bob B."@example.org;
//!
//! The body begins behind the blank line, or at the first line that can be no field.
//! ```
//!
//! And a next hop may want to know where mail in transit came from: [`Header::client_info`].
//!
//! What is read is read leniently, what stays is kept octet for octet. Lines end in LF; CRLF is
//! understood and kept.

use std::collections::HashSet;

use super::address::{Domain, Host, Mailbox};
use super::received::ClientInfo;

/// A header of more octets than this is passed on as it is by a [`Completer`].
const HEADER_LIMIT: usize = 256 << 10;
/// Characters of a bad address that an error repeats.
const ERROR_EXCERPT: usize = 100;

/// A header, taken apart into its fields.
#[derive(Debug)]
pub struct Header<'a> {
    fields: Vec<Field<'a>>,
    /// Octets of the content up to the body, the blank line included.
    octets: usize,
    line_end: &'static str,
}

/// One field with its continuation lines and the line end, if it has one.
#[derive(Clone, Copy, Debug)]
struct Field<'a> {
    name: &'a [u8],
    raw: &'a [u8],
}

impl<'a> Header<'a> {
    /// Reads up to the blank line, or to the first line that is no field: there the body begins as well.
    pub fn parse(content: &'a [u8]) -> Header<'a> {
        let first = content.split_inclusive(|octet| *octet == b'\n').next().unwrap_or_default();
        let line_end = if first.ends_with(b"\r\n") { "\r\n" } else { "\n" };
        let mut header = Header { fields: Vec::new(), octets: 0, line_end };
        let mut begin = 0;
        for line in content.split_inclusive(|octet| *octet == b'\n') {
            let end = header.octets + line.len();
            match HeaderLine::of(line, HeaderState::after(header.octets, !header.fields.is_empty())) {
                HeaderLine::Separator => {}
                HeaderLine::Field(name) => {
                    begin = header.octets;
                    header.fields.push(Field { name, raw: line });
                }
                HeaderLine::Continuation => {
                    if let Some(field) = header.fields.last_mut() {
                        field.raw = &content[begin..end];
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

    /// The client that gave the message to `by`, the host that it came to us from, by the topmost `Received` field.
    pub fn client_info(&self, by: &str) -> Option<ClientInfo> {
        let field = self.fields.iter().find(|field| field.is("Received"))?;
        ClientInfo::parse(&String::from_utf8_lossy(field.value()), by)
    }

    /// How many octets of the content were the header, its blank line included: the body is what follows.
    pub fn octets(&self) -> usize {
        self.octets
    }

    /// The recipients that the header names, each once: those of `To`, `Cc` and `Bcc`.
    ///
    /// A message that was sent on has `Resent-` fields, and those of the first block count instead: each
    /// resending puts its own in front of the older ones (RFC 5322 section 3.6.6). A block has a field
    /// once, so one that comes again, or any other field, is its end. Names without a host are at `home`.
    /// An error says in which field what cannot be read; there may be no recipients at all.
    pub fn recipients(&self, home: &Domain) -> Result<Vec<Mailbox>, String> {
        let resent = self.resent();
        let (fields, names) = match resent.is_empty() {
            true => (&self.fields[..], ["To", "Cc", "Bcc"]),
            false => (resent, ["Resent-To", "Resent-Cc", "Resent-Bcc"]),
        };
        let mut found = Vec::new();
        for field in fields {
            if let Some(name) = names.iter().find(|name| field.is(name)) {
                // A display name may be in any character set; an address in a wrong one is found out below.
                let text = String::from_utf8_lossy(field.value());
                found.extend(parse_addresses(&text, home).map_err(|error| format!("{name}: {error}"))?);
            }
        }
        let mut seen = HashSet::new();
        found.retain(|mailbox| seen.insert(mailbox.clone()));
        Ok(found)
    }

    /// The header again, with what it lacked at its end, and the blank line behind it.
    ///
    /// Only fields that are missing are added, and only `Bcc` fields and an mbox's separator taken away:
    /// whatever else stands there is the writer's (RFC 6409 section 8).
    pub fn complete(&self, additions: &HeaderAdditions) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.octets + 256);
        for field in &self.fields {
            if additions.drop_bcc && (field.is("Bcc") || field.is("Resent-Bcc")) {
                continue;
            }
            out.extend_from_slice(field.raw);
            // Only at the very end of the content a line may lack its end.
            if !field.raw.ends_with(b"\n") {
                out.extend_from_slice(self.line_end.as_bytes());
            }
        }
        let from = additions.from.as_deref();
        let added = [("From", from), ("Date", Some(&*additions.date)), ("Message-ID", Some(&*additions.message_id))];
        for (name, value) in added {
            if let Some(value) = value.filter(|_| !self.fields.iter().any(|field| field.is(name))) {
                // A user's full name may be part of it: never a field of its own.
                let value = value.replace(char::is_control, " ");
                out.extend_from_slice(format!("{name}: {value}{}", self.line_end).as_bytes());
            }
        }
        out.extend_from_slice(self.line_end.as_bytes());
        out
    }

    /// The first block of `Resent-` fields.
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

    /// What stands behind the colon, folds included.
    fn value(&self) -> &[u8] {
        let colon = self.raw.iter().position(|octet| *octet == b':');
        colon.map_or(&[], |at| &self.raw[at + 1..])
    }
}

/// What a submitted header is completed with.
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

/// What a line at some place of a header is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum HeaderLine<'a> {
    /// The `From ` line that begins a message in an mbox.
    Separator,
    /// A field begins; its name.
    Field(&'a [u8]),
    /// The field before it goes on.
    Continuation,
    /// The header ends here.
    Blank,
    /// The header ended before.
    Body,
}

/// What the lines so far mean for the next one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum HeaderState {
    Beginning,
    /// No field as yet: there is nothing to continue.
    Separator,
    Field,
}

impl HeaderState {
    /// Behind so many octets and, perhaps, a field.
    fn after(octets: usize, field: bool) -> HeaderState {
        match (octets, field) {
            (0, _) => HeaderState::Beginning,
            (_, false) => HeaderState::Separator,
            (_, true) => HeaderState::Field,
        }
    }
}

impl HeaderLine<'_> {
    /// Looks at one line, with or without its end.
    pub(crate) fn of(line: &[u8], place: HeaderState) -> HeaderLine<'_> {
        if matches!(line, b"\n" | b"\r\n" | b"") {
            return HeaderLine::Blank;
        }
        if matches!(line[0], b' ' | b'\t') {
            return if place == HeaderState::Field { HeaderLine::Continuation } else { HeaderLine::Body };
        }
        // RFC 5322 section 2.2: printable ASCII without the colon; section 4.5 allows white space before it.
        let length = line.iter().position(|octet| !matches!(octet, 33..=57 | 59..=126)).unwrap_or(line.len());
        let (name, rest) = line.split_at(length);
        if !name.is_empty() && rest.trim_ascii_start().starts_with(b":") {
            HeaderLine::Field(name)
        } else if place == HeaderState::Beginning && line.starts_with(b"From ") {
            HeaderLine::Separator
        } else {
            HeaderLine::Body
        }
    }
}

/// Completes the header of a message that goes by in pieces; the body passes through.
///
/// The header is held back until its end is seen. If that does not come within 256 KiB, the message
/// passes as it is. The result does not depend on how the content was cut.
#[derive(Debug)]
pub struct HeaderCompleter {
    /// None once the header is through.
    additions: Option<HeaderAdditions>,
    held: Vec<u8>,
    /// Where in `held` the first line begins that was not looked at.
    looked: usize,
    /// There is a field before it.
    field: bool,
}

impl HeaderCompleter {
    pub fn new(additions: HeaderAdditions) -> HeaderCompleter {
        HeaderCompleter { additions: Some(additions), held: Vec::new(), looked: 0, field: false }
    }

    /// Takes a piece of the content; appends to `out` what can go on.
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

    /// The content is over: what is still held is a header, perhaps without its blank line.
    pub fn finish(&mut self, out: &mut Vec<u8>) {
        if let Some(additions) = self.additions.take() {
            let held = std::mem::take(&mut self.held);
            let header = Header::parse(&held);
            out.extend_from_slice(&header.complete(&additions));
            out.extend_from_slice(&held[header.octets()..]);
        }
    }

    /// Looks at the whole lines that came since the last time.
    fn header_ended(&mut self) -> bool {
        while let Some(length) = self.held[self.looked..].iter().position(|octet| *octet == b'\n') {
            let line = &self.held[self.looked..=self.looked + length];
            match HeaderLine::of(line, HeaderState::after(self.looked, self.field)) {
                HeaderLine::Blank | HeaderLine::Body => return true,
                HeaderLine::Field(_) => self.field = true,
                HeaderLine::Separator | HeaderLine::Continuation => {}
            }
            self.looked += length + 1;
        }
        false
    }
}

/// Reads a list of addresses, as a header has them and a command line may (RFC 5322 sections 3.4 and 4.4).
///
/// Display names, quoted strings, nested comments, groups, source routes and folds are understood, and
/// what people write: commas too many, `;` for `,`, a group without its end, an address as its own display
/// name. A name without a host is at `home`. An empty list is no error. An error says what cannot be read.
pub fn parse_addresses(text: &str, home: &Domain) -> Result<Vec<Mailbox>, String> {
    let mut found = Vec::new();
    let mut grouped = false;
    let mut element = Element::default();
    for Token { what, place } in tokens(text)? {
        match (element.stage, what) {
            // Between angle brackets commas and a colon belong to a source route.
            (ElementStage::Before | ElementStage::After, What::Special(divider @ (',' | ';'))) => {
                found.extend(element.mailbox(text, home)?);
                element = Element::default();
                // Outside of a group a semicolon is what some programs write for a comma.
                grouped &= divider == ',';
                continue;
            }
            (ElementStage::Before, What::Special(':')) => {
                if grouped || !element.is_phrase() {
                    return Err(unreadable(&text[..place.end], element.begin, "this cannot be the name of a group"));
                }
                element = Element::default();
                grouped = true;
                continue;
            }
            (ElementStage::Before, What::Special('<')) => element.stage = ElementStage::Inside,
            (ElementStage::Inside, What::Special('>')) => element.stage = ElementStage::After,
            (ElementStage::Before, what) => element.before.push(what),
            (ElementStage::Inside, what) => element.inside.push(what),
            (ElementStage::After, _) => {
                let begin = element.begin.or(Some(place.start));
                return Err(unreadable(&text[..place.end], begin, "something follows the >; is a comma missing?"));
            }
        }
        element.begin = element.begin.or(Some(place.start));
        element.end = place.end;
    }
    found.extend(element.mailbox(text, home)?);
    Ok(found)
}

/// What stands between two commas.
#[derive(Debug, Default)]
struct Element<'a> {
    stage: ElementStage,
    /// A display name, or the address itself if no angle brackets follow.
    before: Vec<What<'a>>,
    inside: Vec<What<'a>>,
    begin: Option<usize>,
    end: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum ElementStage {
    #[default]
    Before,
    Inside,
    After,
}

impl Element<'_> {
    fn is_phrase(&self) -> bool {
        !self.before.is_empty() && self.before.iter().all(|what| !what.is('@') && !what.is('>'))
    }

    /// None: there is nothing between the commas (RFC 5322 section 4.4).
    fn mailbox(&self, text: &str, home: &Domain) -> Result<Option<Mailbox>, String> {
        let address = match self.stage {
            ElementStage::Before if self.before.is_empty() => return Ok(None),
            ElementStage::Before => address(&self.before, home),
            ElementStage::Inside => Err("a > is missing"),
            ElementStage::After => without_route(&self.inside).and_then(|inside| address(inside, home)),
        };
        address.map(Some).map_err(|reason| unreadable(&text[..self.end], self.begin, reason))
    }
}

/// `@one.example,@two.example:` in front of an address is read and forgotten (RFC 5322 section 4.4).
fn without_route<'a, 'b>(inside: &'a [What<'b>]) -> Result<&'a [What<'b>], &'static str> {
    match inside.first() {
        Some(first) if first.is('@') => {
            let colon = inside.iter().position(|what| what.is(':')).ok_or("a source route ends in a colon")?;
            Ok(&inside[colon + 1..])
        }
        _ => Ok(inside),
    }
}

fn address(tokens: &[What], home: &Domain) -> Result<Mailbox, &'static str> {
    const LOCAL: &str = "this is no name of a mailbox; a display name wants an <address> behind it";
    let (local, host) = match tokens.iter().position(|what| what.is('@')) {
        Some(at) => (&tokens[..at], host(&tokens[at + 1..]).ok_or("the host is no domain")?),
        None if matches!(tokens, [What::Quoted(content)] if content.is_empty()) => return Err(LOCAL),
        None => (tokens, Host::Name(home.clone())),
    };
    let local = dotted(local).ok_or(LOCAL)?;
    if local.contains(char::REPLACEMENT_CHARACTER) {
        return Err("it is not in UTF-8");
    }
    let escaped = local.replace('\\', r"\\").replace('"', "\\\"");
    Mailbox::parse(&format!("\"{escaped}\"@{host}")).ok_or("the name is too long, or holds control characters")
}

fn host(tokens: &[What]) -> Option<Host> {
    match tokens {
        [What::Literal(literal)] => Host::parse(&format!("[{literal}]")),
        _ if tokens.iter().any(|what| matches!(what, What::Quoted(_))) => None,
        _ => Host::parse(&dotted(tokens)?),
    }
}

/// Words with single dots between them, as the text they mean (RFC 5322 section 4.4, `obs-local-part`).
fn dotted(tokens: &[What]) -> Option<String> {
    let mut content = String::new();
    for (number, what) in tokens.iter().enumerate() {
        match what {
            What::Special('.') if number % 2 == 1 => content.push('.'),
            What::Quoted(text) if number % 2 == 0 => content.push_str(text),
            What::Atom(text) if number % 2 == 0 && !text.contains(['(', ')', '[', ']', '\\']) => content.push_str(text),
            _ => return None,
        }
    }
    (tokens.len() % 2 == 1).then_some(content)
}

/// A token of a structured field; white space and comments are none.
struct Token<'a> {
    what: What<'a>,
    place: std::ops::Range<usize>,
}

#[derive(PartialEq, Eq, Debug)]
enum What<'a> {
    /// Also with octets that an atom may not have: in a display name they do no harm.
    Atom(&'a str),
    /// `=?charset?q?text?=` (RFC 2047): part of a display name, never of an address. A comma in it, which
    /// is wrong and not rare, does not divide.
    Encoded,
    /// What was between the quotes.
    Quoted(String),
    /// What was between the square brackets.
    Literal(String),
    Special(char),
}

impl What<'_> {
    fn is(&self, special: char) -> bool {
        *self == What::Special(special)
    }
}

fn tokens(text: &str) -> Result<Vec<Token<'_>>, String> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(first) = text[at..].chars().next() {
        let rest = &text[at..];
        let missing = |reason| unreadable(rest, Some(0), reason);
        let (what, length) = match first {
            first if first.is_whitespace() => (None, first.len_utf8()),
            '(' => (None, comment(rest).ok_or_else(|| missing("a ) is missing"))?),
            '"' => {
                let (content, length) = enclosed(rest, '"').ok_or_else(|| missing("a \" is missing"))?;
                (Some(What::Quoted(content)), length)
            }
            '[' => {
                let (content, length) = enclosed(rest, ']').ok_or_else(|| missing("a ] is missing"))?;
                (Some(What::Literal(content.replace(char::is_whitespace, ""))), length)
            }
            '<' | '>' | '@' | ',' | ';' | ':' | '.' => (Some(What::Special(first)), 1),
            _ => match encoded_word(rest) {
                Some(length) => (Some(What::Encoded), length),
                None => {
                    let ends = |c: char| c.is_whitespace() || "<>@,;:.\"([".contains(c);
                    let length = rest.find(ends).unwrap_or(rest.len());
                    (Some(What::Atom(&rest[..length])), length)
                }
            },
        };
        found.extend(what.map(|what| Token { what, place: at..at + length }));
        at += length;
    }
    Ok(found)
}

/// The octets of the comment that begins here, with those that nest in it.
fn comment(text: &str) -> Option<usize> {
    let (mut depth, mut escaped) = (0_usize, false);
    for (at, octet) in text.bytes().enumerate() {
        match octet {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'(' => depth += 1,
            b')' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(at + 1);
        }
    }
    None
}

/// The content of a quoted string or a domain literal that begins here, and the octets of the whole.
///
/// Line ends are those of folds and mean nothing (RFC 5322 section 2.2.3).
fn enclosed(text: &str, end: char) -> Option<(String, usize)> {
    let (mut content, mut escaped) = (String::new(), false);
    for (at, character) in text.char_indices().skip(1) {
        match character {
            '\r' | '\n' => {}
            _ if std::mem::take(&mut escaped) => content.push(character),
            '\\' => escaped = true,
            _ if character == end => return Some((content, at + 1)),
            _ => content.push(character),
        }
    }
    None
}

/// The octets of the encoded word that begins here (RFC 2047 section 2, of any length that occurs).
fn encoded_word(text: &str) -> Option<usize> {
    const LIMIT: usize = 998;
    let length = text.bytes().take(LIMIT).take_while(u8::is_ascii_graphic).count();
    let mut parts = text[..length].strip_prefix("=?")?.splitn(3, '?');
    let (charset, encoding, rest) = (parts.next()?, parts.next()?, parts.next()?);
    let (content, after) = rest.split_once('?')?;
    let ends = encoding.len() == 1 && after.starts_with('=');
    ends.then_some("=?".len() + charset.len() + "?q?".len() + content.len() + "?=".len())
}

/// The error about what begins at `begin` and goes on to the end of the text.
fn unreadable(text: &str, begin: Option<usize>, reason: &str) -> String {
    let words: Vec<&str> = text[begin.unwrap_or(0)..].split_whitespace().collect();
    let mut shown: String = words.join(" ").replace(char::is_control, "?");
    if let Some((cut, _)) = shown.char_indices().nth(ERROR_EXCERPT) {
        shown.truncate(cut);
        shown.push('…');
    }
    format!("cannot read {shown}: {reason}")
}

#[cfg(test)]
mod tests;
