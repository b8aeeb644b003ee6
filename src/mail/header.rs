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
//! And a next hop may want to know where mail in transit came from: [`Header::origin`].
//!
//! What is read is read leniently, what stays is kept octet for octet. Lines end in LF; CRLF is
//! understood and kept.

use core::net::IpAddr;
use std::collections::HashSet;

use super::address::{Domain, Host, Mailbox};
use crate::smtp::client::ClientInfo;

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

    /// Who gave the message to `by`, the host it came to us from, by the topmost `Received` (RFC 5321 section 4.4):
    /// `from <EHLO name> (<name> [<address>]) by <by> with ESMTP`. Others below it may have written anything.
    pub fn origin(&self, by: &str) -> Option<ClientInfo> {
        let field = self.fields.iter().find(|field| field.name.eq_ignore_ascii_case(b"received"))?;
        let text = String::from_utf8_lossy(field.raw.splitn(2, |octet| *octet == b':').nth(1)?);
        let words: Vec<_> = text.split_ascii_whitespace().collect();
        let at = words.windows(2).position(|pair| pair[0] == "by" && pair[1].eq_ignore_ascii_case(by))?;
        let (from, rest) = (words.get(..at)?, &words[at..]);
        let name = *from.get(1).filter(|_| from[0] == "from")?;
        // The client may call itself like an address, so the address is the one in the comment behind that name. Exim
        // writes the name into the comment, where it differs: `from host ([192.0.2.1] helo=name)`, and the address in its
        // place, where it has no other: `from [192.0.2.1] (helo=name)`.
        let end = from.iter().skip(2).position(|word| word.ends_with(')'))?;
        let comment = from.get(2..3 + end)?;
        let named = |word: &&str| word.trim_start_matches('(').strip_prefix("helo=").map(str::to_owned);
        let helo = comment.iter().find_map(named);
        let literal = |word: &&str| Some(word.trim_end_matches(')').split_once('[')?.1.to_owned());
        let written = comment.iter().filter(|word| named(word).is_none()).find_map(literal);
        let literal = written.or_else(|| helo.is_some().then(|| literal(&name)).flatten())?;
        let literal = literal.strip_suffix(']')?;
        let address: IpAddr = literal.strip_prefix("IPv6:").unwrap_or(literal).parse().ok()?;
        let name = helo.as_deref().map_or(name, |helo| helo.trim_end_matches(')'));
        let protocol = rest.windows(2).find(|pair| pair[0] == "with").map_or("", |pair| pair[1]);
        Some(ClientInfo {
            address: match address.to_canonical() {
                IpAddr::V4(address) => address.to_string(),
                IpAddr::V6(address) => format!("IPV6:{address}"),
            },
            helo: (name != "unknown").then(|| name.to_owned()),
            extended: protocol.trim_end_matches(';') != "SMTP",
        })
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
            (Stage::Before | Stage::After, What::Special(divider @ (',' | ';'))) => {
                found.extend(element.mailbox(text, home)?);
                element = Element::default();
                // Outside of a group a semicolon is what some programs write for a comma.
                grouped &= divider == ',';
                continue;
            }
            (Stage::Before, What::Special(':')) => {
                if grouped || !element.is_phrase() {
                    return Err(unreadable(&text[..place.end], element.begin, "this cannot be the name of a group"));
                }
                element = Element::default();
                grouped = true;
                continue;
            }
            (Stage::Before, What::Special('<')) => element.stage = Stage::Inside,
            (Stage::Inside, What::Special('>')) => element.stage = Stage::After,
            (Stage::Before, what) => element.before.push(what),
            (Stage::Inside, what) => element.inside.push(what),
            (Stage::After, _) => {
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
    stage: Stage,
    /// A display name, or the address itself if no angle brackets follow.
    before: Vec<What<'a>>,
    inside: Vec<What<'a>>,
    begin: Option<usize>,
    end: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Stage {
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
            Stage::Before if self.before.is_empty() => return Ok(None),
            Stage::Before => address(&self.before, home),
            Stage::Inside => Err("a > is missing"),
            Stage::After => without_route(&self.inside).and_then(|inside| address(inside, home)),
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
mod tests {
    use super::*;

    #[test]
    fn the_origin_stands_in_the_topmost_received() {
        let check = |header: &str, wanted: Option<(&str, Option<&str>, bool)>| {
            let header = header.replace(" | ", "\r\n\t");
            let origin = Header::parse(header.as_bytes()).origin("Relay.example.net");
            let found = origin.as_ref().map(|found| (found.address.as_str(), found.helo.as_deref(), found.extended));
            assert_eq!(found, wanted, "{header}");
        };
        let ours = "Received: from mx.example ([192.0.2.1]) | by relay.example.net with ESMTPS (x) | id 1; | date\n";
        check(ours, Some(("192.0.2.1", Some("mx.example"), true)));
        check(&format!("Return-Path: <a@b.example>\n{ours}"), Some(("192.0.2.1", Some("mx.example"), true)));
        let other = "Received: from helo (name.example [IPv6:2001:db8::1]) by relay.example.net with SMTP; date\n";
        check(other, Some(("IPV6:2001:db8::1", Some("helo"), false)));
        check(
            "Received: from unknown ([192.0.2.1]) by relay.example.net with SMTP; date\n",
            Some(("192.0.2.1", None, false)),
        );
        // Names that would like to be an address: of the client, for Exim, and in its certificate.
        for field in [
            "from [203.0.113.9] (x [192.0.2.1])",
            "from [192.0.2.1] (helo=[203.0.113.9])",
            "from x ([192.0.2.1] helo=[203.0.113.9])",
            "from [203.0.113.9] (x [192.0.2.1]) (Client CN \"helo=z\")",
            "from [203.0.113.9] (x [192.0.2.1]) (using TLSv1.3) (Client CN \"y [198.51.100.1] z\", Issuer \"i\")",
        ] {
            let field = format!("Received: {field} by relay.example.net with ESMTP; date\n");
            check(&field, Some(("192.0.2.1", Some("[203.0.113.9]"), true)));
        }
        for none in [
            "",
            "Subject: x\n",
            "Received:\n",
            "Received: by relay.example.net; date\n",
            "Received: from mx.example by relay.example.net; date\n",
            "Received: from mx.example ([a.b]) by relay.example.net; date\n",
            "Received: from mx.example ([192.0.2.1) by relay.example.net; date\n",
            "Received: from mx.example ([192.0.2.1]) by elsewhere.example; date\n",
            "Received: from a ([192.0.2.1]) by elsewhere; date\nReceived: from a ([192.0.2.1]) by relay.example.net; date\n",
        ] {
            check(none, None);
        }
    }

    use proptest::prelude::*;

    fn home() -> Domain {
        Domain::parse("home.example").unwrap()
    }

    fn written(mailboxes: &[Mailbox]) -> String {
        mailboxes.iter().map(Mailbox::to_string).collect::<Vec<_>>().join(" ")
    }

    fn additions() -> HeaderAdditions {
        HeaderAdditions { date: "DATE".to_owned(), message_id: "<ID>".to_owned(), from: None, drop_bcc: true }
    }

    #[test]
    fn addresses_are_read_as_people_write_them() {
        fn check(input: &str, expected: &str) {
            let seen = parse_addresses(input, &home()).map(|found| written(&found));
            assert_eq!(seen.as_deref(), Ok(expected), "{input:?}");
        }
        // Addresses alone.
        check("", "");
        check(" \r\n\t", "");
        check("joe@x.example", "joe@x.example");
        check("Joe@X.EXAMPLE", "Joe@x.example");
        check("joe@[192.0.2.1]", "joe@[192.0.2.1]");
        check("joe@[ IPv6:2001:db8::1 ]", "joe@[IPv6:2001:db8::1]");
        check("joe@bücher.example", "joe@xn--bcher-kva.example");
        check("jürgen@x", "jürgen@x");
        check("o'neill+tag=1@x", "o'neill+tag=1@x");
        check("a!#$%&'*+-/=?^_`{|}~@x", "a!#$%&'*+-/=?^_`{|}~@x");
        check("joe.doe@x.y", "joe.doe@x.y");
        check("\"joe\"@x", "joe@x");
        check("\"joe doe\"@x", "\"joe doe\"@x");
        check("\"a@b,c\"@x", "\"a@b,c\"@x");
        check(r#""a\"b\\c"@x"#, r#""a\"b\\c"@x"#);
        check("<joe@x>", "joe@x");
        check("< joe @ x >", "joe@x");
        // Names without a host.
        check("joe", "joe@home.example");
        check("joe.doe", "joe.doe@home.example");
        check("<joe>", "joe@home.example");
        check("Joe <joe>", "joe@home.example");
        check("\"joe doe\"", "\"joe doe\"@home.example");
        check("Postmaster", "Postmaster@home.example");
        // Display names.
        check("Joe <joe@x>", "joe@x");
        check("Joe Q. Public <joe@x>", "joe@x");
        check("\"Public, Joe Q.\" <joe@x>", "joe@x");
        check("\"Joe \\\"the boss\\\" <b@y>\" <joe@x>", "joe@x");
        check("\"\" <joe@x>", "joe@x");
        check("joe@x <joe@x>", "joe@x");
        check("J\u{fffd}rgen <joe@x>", "joe@x");
        check("Jürgen Öztürk<joe@x>", "joe@x");
        check("[List] Joe <joe@x>", "joe@x");
        check("O'Neill <joe@x>", "joe@x");
        check("=?utf-8?Q?J=C3=BCrgen?= <joe@x>", "joe@x");
        check("=?utf-8?Q?Doe,_J?= =?utf-8?B?w7w=?=\r\n =?us-ascii?q?.?= <joe@x>, eva", "joe@x eva@home.example");
        check("=?utf-8?Q?a=40b?=<joe@x>", "joe@x");
        check("=?= <joe@x>", "joe@x");
        // Lists.
        check("a@x,b@y", "a@x b@y");
        check("a@x, b@y ,c", "a@x b@y c@home.example");
        check(",, a@x,, b@y,", "a@x b@y");
        check("a@x; b@y;", "a@x b@y");
        check("Doe, Joe <joe@x>", "Doe@home.example joe@x");
        check("a@x, a@x", "a@x a@x");
        // Comments and folds.
        check("joe@x (Joe)", "joe@x");
        check("(Joe) joe@x", "joe@x");
        check("joe(a)@(b)x(c).(d)y", "joe@x.y");
        check("(a (b (c) \\) \\( ) d) joe@x", "joe@x");
        check("(a, b <c@d>) Joe (;:) <(e)joe(f)@x(g)> (h)", "joe@x");
        check("\"(not a comment)\" <joe@x>", "joe@x");
        check("Joe\r\n <joe@x>,\r\n\tEva\n <eva@y>", "joe@x eva@y");
        check("\"Joe\r\n Doe\" <joe@x>", "joe@x");
        check("joe . doe @ x . y", "joe.doe@x.y");
        // Groups.
        check("undisclosed-recipients:;", "");
        check("undisclosed recipients: ;", "");
        check("undisclosed-recipients:", "");
        check("friends: joe@x, Eva <eva@y>;", "joe@x eva@y");
        check("friends: joe@x;, foes: eva@y; , bob@z", "joe@x eva@y bob@z");
        check("friends: joe@x; bob@z", "joe@x bob@z");
        check("\"my: friends\" (and): joe, ;", "joe@home.example");
        check("friends:,,;", "");
        // Obsolete forms.
        check("<@a.example,@b.example:joe@x>", "joe@x");
        check("Joe < @a , , @b : joe@x >", "joe@x");
        check("\"joe\".doe@x", "joe.doe@x");
        check("joe.\"d o\"@x", "\"joe.d o\"@x");
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        fn check(input: &str, expected: &str) {
            let seen = parse_addresses(input, &home()).map(|found| written(&found));
            assert_eq!(seen, Err(format!("cannot read {expected}")), "{input:?}");
        }
        let local = "this is no name of a mailbox; a display name wants an <address> behind it";
        let bracket = "something follows the >; is a comma missing?";
        let host = "the host is no domain";
        let group = "this cannot be the name of a group";
        for (input, shown) in [
            ("Joe Doe", "Joe Doe"),
            ("a@x,  Joe\r\n Doe , b@y", "Joe Doe"),
            ("Joe joe@x", "Joe joe@x"),
            ("<>", "<>"),
            ("Joe <>", "Joe <>"),
            ("@x", "@x"),
            ("j..oe@x", "j..oe@x"),
            (".joe@x", ".joe@x"),
            ("joe.@x", "joe.@x"),
            ("j\\oe@x", "j\\oe@x"),
            ("\"\"", "\"\""),
            ("\"joe\"doe@x", "\"joe\"doe@x"),
            ("=?utf-8?q?joe?=", "=?utf-8?q?joe?="),
            ("joe)@x", "joe)@x"),
            (">", ">"),
            ("joe>", "joe>"),
        ] {
            check(input, &format!("{shown}: {local}"));
        }
        check("joe@", &format!("joe@: {host}"));
        check("joe@a b", &format!("joe@a b: {host}"));
        check("joe@x@y", &format!("joe@x@y: {host}"));
        check("joe@a_b", &format!("joe@a_b: {host}"));
        check("joe@x.", &format!("joe@x.: {host}"));
        check("joe@\"x\"", &format!("joe@\"x\": {host}"));
        check("joe@[x]", &format!("joe@[x]: {host}"));
        check("joe@[192.0.2.1].x", &format!("joe@[192.0.2.1].x: {host}"));
        check("joe <a@x> eva <b@x>", &format!("joe <a@x> eva: {bracket}"));
        check("<a@x> b@x", &format!("<a@x> b: {bracket}"));
        check("<<a@x>>", &format!("<<a@x>>: {bracket}"));
        check("<a@x>:", &format!("<a@x>:: {bracket}"));
        check("eva, Joe <joe@x, bob", "Joe <joe@x, bob: a > is missing");
        check("<@a joe@x>", "<@a joe@x>: a source route ends in a colon");
        check("Joe (the boss", "(the boss: a ) is missing");
        check("Joe (a (b)", "(a (b): a ) is missing");
        check("eva, \"Joe <joe@x>", "\"Joe <joe@x>: a \" is missing");
        check("joe@[192.0.2.1", "[192.0.2.1: a ] is missing");
        check("a: b: c@x;;", &format!("b:: {group}"));
        check("joe@x: eva@y;", &format!("joe@x:: {group}"));
        check(": joe@x;", &format!(":: {group}"));
        check("j\u{fffd}@x", "j\u{fffd}@x: it is not in UTF-8");
        check("j\u{1b}[2J\0@x", "[2J?@x: a ] is missing");
        check("j\u{1b}@x", "j?@x: the name is too long, or holds control characters");
        let long = "j".repeat(256);
        check(&format!("{long}@x"), &format!("{}…: the name is too long, or holds control characters", &long[..100]));
    }

    #[test]
    fn recipients_are_those_of_to_cc_and_bcc_or_of_the_last_resending() {
        fn check(header: &str, expected: Result<&str, &str>) {
            let seen = Header::parse(header.as_bytes()).recipients(&home()).map(|found| written(&found));
            assert_eq!(seen, expected.map(str::to_owned).map_err(str::to_owned), "{header}");
        }
        check("", Ok(""));
        check("Subject: x\n\nTo: a@x\n", Ok(""));
        check("To: a@x\nSubject: x\nCC: b@x\nbcc : c@x\nTo: d@x\n", Ok("a@x b@x c@x d@x"));
        check("To: a@x,\n b@x,\r\n\tc@x\r\n\r\n", Ok("a@x b@x c@x"));
        check("To:a@x\n \n\tb@x", Err("To: cannot read a@x b@x: the host is no domain"));
        check("To: a@x, A@x, a@X\nCc: a@x\n", Ok("a@x A@x"));
        check("Tom: a@x\nReply-To: b@x\nTo:c@x", Ok("c@x"));
        check("From eva Fri Jan  2 03:04:05 2026\nTo: a@x\n\n", Ok("a@x"));
        check("To: undisclosed-recipients:;\nBcc: a@x\n", Ok("a@x"));
        check(
            "Bcc: Joe Doe\n",
            Err("Bcc: cannot read Joe Doe: this is no name of a mailbox; \
                                      a display name wants an <address> behind it"),
        );
        check("no header: here\nTo: a@x\n", Ok(""));
        // The newest block stands first; a name that comes again begins an older one.
        check("Resent-To: a@x\nResent-Cc: b@x\nTo: c@x\nBcc: d@x\n", Ok("a@x b@x"));
        check("Received: x\nResent-From: e\nRESENT-BCC: a@x\nReceived: y\nResent-To: b@x\nTo: c@x\n", Ok("a@x"));
        check("Resent-From: e\nResent-To: a@x\nResent-From: f\nResent-To: b@x\nTo: c@x\n", Ok("a@x"));
        check("Resent-To: a@x\nResent-To: b@x\n", Ok("a@x"));
        check("Resent-From: e\nTo: c@x\n", Ok(""));
    }

    #[test]
    fn a_name_in_a_foreign_character_set_does_no_harm() {
        let header = Header::parse(b"To: J\xfcrgen <a@x>\nCc: \"\xff\xfe\" <b@x>\n\n");
        assert_eq!(header.recipients(&home()).map(|found| written(&found)).as_deref(), Ok("a@x b@x"));
        let error = Header::parse(b"To: j\xfcrgen@x\n").recipients(&home());
        assert_eq!(error, Err("To: cannot read j\u{fffd}rgen@x: it is not in UTF-8".to_owned()));
    }

    #[test]
    fn a_header_is_completed_and_otherwise_kept() {
        fn check(content: &[u8], additions: &HeaderAdditions, expected: &[u8], body: &[u8]) {
            let header = Header::parse(content);
            let seen = header.complete(additions);
            assert_eq!(seen.escape_ascii().to_string(), expected.escape_ascii().to_string());
            assert_eq!(content[header.octets()..].escape_ascii().to_string(), body.escape_ascii().to_string());
        }
        let add = additions();
        check(b"", &add, b"Date: DATE\nMessage-ID: <ID>\n\n", b"");
        check(b"\nbody\n", &add, b"Date: DATE\nMessage-ID: <ID>\n\n", b"body\n");
        check(b"hello\nTo: a@x\n", &add, b"Date: DATE\nMessage-ID: <ID>\n\n", b"hello\nTo: a@x\n");
        check(b" hello\n", &add, b"Date: DATE\nMessage-ID: <ID>\n\n", b" hello\n");
        check(b"To: a@x", &add, b"To: a@x\nDate: DATE\nMessage-ID: <ID>\n\n", b"");
        check(b"dAtE : never\nMESSAGE-ID:\n \n x\n\n", &add, b"dAtE : never\nMESSAGE-ID:\n \n x\n\n", b"");
        check(b"Date: 1\nMessage-ID: 2\nX-\xff: y\n", &add, b"Date: 1\nMessage-ID: 2\n\n", b"X-\xff: y\n");
        check(b"Date: 1\nMessage-Id: 2\nX:\t\xff\0\r \n\nb", &add, b"Date: 1\nMessage-Id: 2\nX:\t\xff\0\r \n\n", b"b");
        check(
            b"Date: 1\nMessage-ID: 2\nBCC: a,\n b\nX: y\nresent-bcc: c\n\n",
            &add,
            b"Date: 1\nMessage-ID: 2\nX: y\n\n",
            b"",
        );
        check(b"From e  Fri\nDate: 1\nMessage-ID: 2\n\nb", &add, b"Date: 1\nMessage-ID: 2\n\n", b"b");
        check(b"From e  Fri\n folded\n", &add, b"Date: DATE\nMessage-ID: <ID>\n\n", b" folded\n");
        check(b"Date: 1\nFrom e  Fri\n", &add, b"Date: 1\nMessage-ID: <ID>\n\n", b"From e  Fri\n");
        check(
            b"From : e\r\nX: y\r\n\r\nb\r\n",
            &add,
            b"From : e\r\nX: y\r\nDate: DATE\r\nMessage-ID: <ID>\r\n\r\n",
            b"b\r\n",
        );
        let add = HeaderAdditions { from: Some("E\n<e@x>".to_owned()), drop_bcc: false, ..additions() };
        check(b"Bcc: a\n\n", &add, b"Bcc: a\nFrom: E <e@x>\nDate: DATE\nMessage-ID: <ID>\n\n", b"");
        check(b"Date: 1\nFROM: f\nMessage-ID: 2\n\n", &add, b"Date: 1\nFROM: f\nMessage-ID: 2\n\n", b"");
    }

    /// Feeds a completer with pieces of so many octets, in turn.
    fn completed(content: &[u8], cuts: &[usize]) -> Vec<u8> {
        let (mut completer, mut out, mut rest) = (HeaderCompleter::new(additions()), Vec::new(), content);
        for cut in cuts.iter().cycle() {
            let (piece, after) = rest.split_at(rest.len().min(*cut));
            completer.feed(piece, &mut out);
            rest = after;
            if rest.is_empty() {
                break;
            }
        }
        completer.finish(&mut out);
        out
    }

    #[test]
    fn a_header_beyond_the_limit_passes_as_it_is() {
        for (length, touched) in [(HEADER_LIMIT, true), (HEADER_LIMIT + 1, false)] {
            let mut content = b"Bcc: a\nX: ".to_vec();
            content.resize(length - 2, b'y');
            content.extend_from_slice(b"\n\n");
            for body in [&b""[..], b"the body\n"] {
                let content = [&content[..], body].concat();
                for cuts in [&[content.len()][..], &[1 << 16], &[HEADER_LIMIT, 1], &[HEADER_LIMIT - 1, 1, 1]] {
                    let seen = completed(&content, cuts);
                    assert_eq!(seen == content, !touched, "{length} {cuts:?}");
                    assert!(!touched || (seen.starts_with(b"X: y") && seen.ends_with(body)), "{length} {cuts:?}");
                }
            }
        }
    }

    proptest! {
        #[test]
        fn no_octets_make_it_panic(content: Vec<u8>, text: String) {
            let header = Header::parse(&content);
            let _ = (header.recipients(&home()), header.complete(&additions()));
            prop_assert!(header.octets() <= content.len());
            let _ = parse_addresses(&text, &home());
        }

        #[test]
        fn no_punctuation_makes_it_panic(text in "[a@.,:;<>()\"\\\\\\[\\] =?\\r\\nü]{0,40}") {
            for mailbox in parse_addresses(&text, &home()).unwrap_or_default() {
                prop_assert_eq!(Mailbox::parse(&mailbox.to_string()), Some(mailbox));
            }
        }

        #[test]
        fn a_completer_gives_the_same_however_it_is_cut(
            content in "(From a\r?\n)?((To|Bcc|Date|X y|): ?[a\0]{0,3}\r?\n|[ \t][a ]?\r?\n|\r?\n){0,6}[a\n:]{0,5}",
            cuts in proptest::collection::vec(1_usize..20, 1..5),
        ) {
            let content = content.as_bytes();
            let header = Header::parse(content);
            let expected = [&header.complete(&additions())[..], &content[header.octets()..]].concat();
            prop_assert_eq!(completed(content, &cuts), expected);
        }

        #[test]
        fn a_complete_header_is_left_alone(
            content in "((To|Date|Message-ID|X): ?[a ]{0,3}\n([ \t]a\n){0,2}){0,6}\n[a\n]{0,5}",
        ) {
            let once = completed(content.as_bytes(), &[content.len().max(1)]);
            prop_assert_eq!(completed(&once, &[once.len()]), once);
        }
    }
}
