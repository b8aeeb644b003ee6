//! Domains, mailboxes and paths of SMTP (RFC 5321 section 4.1.2, RFC 6531 section 3.3).
//!
//! Each value of these types is valid, because only the parsers here make one.
//!
//! ```text
//! MAIL FROM:<@one.example,@two.example:"Joe Doe"@example.org> SIZE=1000
//!            `-- source route: parsed, -'`-local-' `- host -'
//!                then dropped           `------ mailbox ----'
//!           `------------------- path ----------------------'
//! ```
//!
//! There are two kinds of parsers. The strict ones (`parse`) accept the grammar of the RFC: they are for the configuration, and
//! for domains of this host, whose names become names of directories. The others (`parse_any`, and those of paths) are for
//! addresses of other hosts, which are relayed unchanged: with `_` in a domain, or dots at any place in a local part. They
//! permit no control character, and no space or bracket outside of quotes, so that an address cannot end a path, a line or a
//! field early.
//!
//! Two spellings of one address are equal: domains and address literals are compared in their canonical form, local parts
//! without quotes. `Display` writes the address as it was received.

use core::net::IpAddr;
use std::borrow::Cow;
use std::cmp::Ordering;
use std::fmt::{self, Write};
use std::hash::{Hash, Hasher};

use idna::uts46::{AsciiDenyList, DnsLength, Hyphens, Uts46};

/// Octets of a label (RFC 1035 section 2.3.4).
const LABEL_LIMIT: usize = 63;
/// Octets of a domain (RFC 5321 section 4.5.3.1.2).
pub const DOMAIN_LIMIT: usize = 255;
/// Octets of a local part without quotes. RFC 5321 section 4.5.3.1.1 requires 64; longer ones exist.
const LOCAL_LIMIT: usize = 255;
/// Octets of a path with its angle brackets. RFC 5321 section 4.5.3.1.3 requires 256; source routes and UTF-8 need more.
const PATH_LIMIT: usize = 1000;
/// Octets of the name of a file or directory (NAME_MAX).
const FILE_NAME_LIMIT: usize = 255;

/// A domain name in its canonical form, in which names are compared: in lower case, with A-labels for U-labels, without the
/// dot of the root at its end. Always printable ASCII without spaces.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Domain(String);

impl Domain {
    /// Parses the `Domain` of RFC 5321 section 4.1.2, with the U-labels of RFC 6531; `None`: the text is not valid.
    ///
    /// A domain has letters, digits and hyphens in labels of 1 to 63 octets, at most 255 octets in all, and no dot at either
    /// end.
    ///
    /// If the text is ASCII, the parser only changes it to lower case: an A-label stays as it is, even if it cannot be
    /// decoded. If the text has other characters, UTS #46 maps it, so that all spellings of a name give the same domain; a
    /// name that UTS #46 does not permit is not valid.
    pub fn parse(text: &str) -> Option<Domain> {
        let ascii = || text.to_ascii_lowercase();
        let name = if text.is_ascii() { ascii() } else { a_labels(text, AsciiDenyList::STD3)? };
        // RFC 5321 section 4.5.3.1.2: the limit is for the name that SMTP and DNS carry.
        let domain = Domain(name);
        (domain.0.len() <= DOMAIN_LIMIT && domain.is_strict()).then_some(domain)
    }

    /// Parses a domain of another host. DNS has names that RFC 5321 does not permit (RFC 2181 section 11), so the domain may
    /// have any printable ASCII but spaces and the characters with a meaning in addresses (RFC 5322 section 3.2.3,
    /// `specials`).
    ///
    /// # Errors
    /// Why the text is not a domain.
    pub fn parse_any(text: &str) -> Result<Domain, PathError> {
        let name = match text.is_ascii() {
            true => text.to_ascii_lowercase(),
            false => a_labels(text, AsciiDenyList::EMPTY).ok_or(PathError::NotIdna)?,
        };
        // RFC 5890 section 2.3.1: an A-label is an LDH label, even if the other labels are not. A mapping must not produce
        // other ASCII characters, such as the "/" of U+2100.
        let is_ldh = |octet: u8| octet.is_ascii_alphanumeric() || b"-.".contains(&octet);
        let mapped = |octet: u8| !is_ldh(octet) && !text.as_bytes().contains(&octet);
        let bad_label = |label: &str| label.starts_with("xn--") && !is_label(label);
        if !text.is_ascii() && (name.bytes().any(mapped) || name.split('.').any(bad_label)) {
            return Err(PathError::NotIdna);
        }
        // A dot at the end is the root: DNS has the same name without it (RFC 1034 section 3.1).
        let name = name.strip_suffix('.').filter(|rest| !rest.ends_with('.')).unwrap_or(&name);
        let allowed = |octet: u8| octet.is_ascii_graphic() && !b"()<>[]:;@\\,\"".contains(&octet);
        if name.trim_matches('.').is_empty() || !name.bytes().all(allowed) {
            return Err(PathError::BadDomain);
        }
        let domain = Domain(name.to_owned());
        // RFC 5321 section 4.5.3.1.2. A queue has a directory for the domain, whose name must not be too long either.
        let fits = domain.0.len() <= DOMAIN_LIMIT && domain.file_name().len() <= FILE_NAME_LIMIT;
        if fits { Ok(domain) } else { Err(PathError::TooLong) }
    }

    /// Parses the stricter `domain` of RFC 2645 section 5.2.1, in ASCII and with at least one dot; `None`: it is not valid.
    pub fn parse_odmr(input: &[u8]) -> Option<Domain> {
        let text = str::from_utf8(input).ok()?;
        let strict = text.is_ascii() && text.contains('.');
        strict.then_some(text).and_then(Domain::parse)
    }

    /// The host of an MX record, in the presentation format of RFC 1035 section 5.1: any name, or an address in place of a
    /// name. `None`: the root, or not valid.
    pub fn of_dns(text: &str) -> Option<Domain> {
        // A space is written "\\ ", but a name in the log must not have one: "\\032" is the same.
        let name = text.replace(' ', "032").to_ascii_lowercase();
        (!matches!(&*name, "" | ".") && name.bytes().all(|octet| octet.is_ascii_graphic())).then_some(Domain(name))
    }

    /// The name, always ASCII.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether [`Domain::parse`] accepts the name. No other domain can be one of this host.
    pub fn is_strict(&self) -> bool {
        self.0.split('.').all(is_label)
    }

    /// The name of the directory for this domain: one component of a path, never hidden, different for different domains.
    ///
    /// For a domain that [`Domain::parse`] accepts, it is the domain. In others each octet but letters, digits, `.`, `_` and
    /// `-`, and a dot at the beginning, is `%HH`.
    pub fn file_name(&self) -> Cow<'_, str> {
        if self.is_strict() {
            return Cow::Borrowed(&self.0);
        }
        let mut name = String::with_capacity(self.0.len() + 8);
        for octet in self.0.bytes() {
            match octet {
                b'.' if name.is_empty() => name.push_str("%2E"),
                b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-' => name.push(char::from(octet)),
                _ => {
                    let _ = write!(name, "%{octet:02X}");
                }
            }
        }
        Cow::Owned(name)
    }

    /// The domain whose [`Domain::file_name`] this is; `None`: no domain has it.
    pub fn of_file_name(name: &str) -> Option<Domain> {
        let mut parts = name.split('%');
        let mut text = parts.next()?.to_owned();
        for part in parts {
            let (code, rest) = part.split_at_checked(2)?;
            text.push(char::from(u8::from_str_radix(code, 16).ok()?));
            text.push_str(rest);
        }
        Domain::parse_any(&text).ok().filter(|domain| domain.file_name() == name)
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The part of a mailbox after the `@`, or the argument of EHLO.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Host {
    Name(Domain),
    /// An address literal, written `[192.0.2.1]` or `[IPv6:2001:db8::1]`.
    Literal(IpAddr),
    /// Another text in square brackets, in lower case: no mail can be sent to it.
    OtherLiteral(String),
}

impl Host {
    /// Parses a domain or an address literal (RFC 5321 section 4.1.3); `None`: the text is not valid.
    pub fn parse(text: &str) -> Option<Host> {
        match text.strip_prefix('[') {
            Some(rest) => rest.strip_suffix(']').and_then(parse_literal).map(Host::Literal),
            None => Domain::parse(text).map(Host::Name),
        }
    }

    /// Parses the host of an address elsewhere: see [`Domain::parse_any`].
    ///
    /// # Errors
    /// Why the text is not a host.
    pub fn parse_any(text: &str) -> Result<Host, PathError> {
        let Some(rest) = text.strip_prefix('[') else { return Domain::parse_any(text).map(Host::Name) };
        let inside = rest.strip_suffix(']').ok_or(PathError::BadDomain)?;
        // RFC 5321 section 4.1.3: `dcontent`, without the characters that end a path or an address.
        let allowed = |octet: u8| octet.is_ascii_graphic() && !b"[]\\\"<>(),;@".contains(&octet);
        match parse_literal(inside) {
            Some(address) => Ok(Host::Literal(address)),
            None if inside.is_empty() || !inside.bytes().all(allowed) => Err(PathError::BadDomain),
            None if inside.len() > DOMAIN_LIMIT => Err(PathError::TooLong),
            None => Ok(Host::OtherLiteral(inside.to_ascii_lowercase())),
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Host::Name(domain) => domain.fmt(f),
            Host::Literal(IpAddr::V4(address)) => write!(f, "[{address}]"),
            Host::Literal(IpAddr::V6(address)) => write!(f, "[IPv6:{address}]"),
            Host::OtherLiteral(text) => write!(f, "[{text}]"),
        }
    }
}

/// `local@host`. `"joe"@a.example` and `joe@A.example` are equal (RFC 5321 section 4.1.2), and each is written as it was
/// received.
#[derive(Clone, Debug)]
pub struct Mailbox {
    /// The address as it was received.
    text: String,
    /// The index of the `@` before the host in the text.
    at: usize,
    local: String,
    host: Host,
}

impl Mailbox {
    /// Parses a mailbox without angle brackets, by the grammar of RFC 5321 section 4.1.2; `None`: the text is not valid.
    pub fn parse(text: &str) -> Option<Mailbox> {
        let mailbox = Mailbox::parse_any(text).ok()?;
        let local = mailbox.spelled_local();
        let strict = is_dot_string(local) || is_quoted_string(local);
        (strict && Host::parse(&text[mailbox.at + 1..]).is_some()).then_some(mailbox)
    }

    /// Parses a mailbox of another host, without angle brackets.
    ///
    /// # Errors
    /// Why the text is not a mailbox.
    pub fn parse_any(text: &str) -> Result<Mailbox, PathError> {
        if text.contains(char::is_control) {
            return Err(PathError::Syntax);
        }
        let at = local_end(text).ok_or(PathError::Syntax)?;
        let local = unquoted(&text[..at]).ok_or(PathError::Syntax)?;
        if local.len() > LOCAL_LIMIT {
            return Err(PathError::TooLong);
        }
        let host = Host::parse_any(&text[at + 1..])?;
        Ok(Mailbox { text: text.to_owned(), at, local, host })
    }

    /// The local part without its quotes, in its own case: at most 255 octets, no control characters.
    ///
    /// It may be empty or `..`, or contain spaces, `/` and `@`: do not use it as the name of a file.
    pub fn local(&self) -> &str {
        &self.local
    }

    /// The domain or the address literal.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The domain, unless the host is an address literal.
    pub fn domain(&self) -> Option<&Domain> {
        match &self.host {
            Host::Name(domain) => Some(domain),
            Host::Literal(_) | Host::OtherLiteral(_) => None,
        }
    }

    /// Whether the mailbox can be sent to a server without SMTPUTF8 (RFC 6531 section 3.2). Only the local part matters,
    /// because [`Mailbox::with_a_labels`] writes the domain in ASCII. (A parser checks the octets of the peer instead.)
    pub fn is_ascii(&self) -> bool {
        self.local.is_ascii()
    }

    /// The address as it was received, but with A-labels for U-labels, for a server without SMTPUTF8 (RFC 6531 section 3.2).
    pub fn with_a_labels(&self) -> Cow<'_, str> {
        match self.text[self.at..].is_ascii() {
            true => Cow::Borrowed(&self.text),
            false => Cow::Owned(format!("{}@{}", self.spelled_local(), self.host)),
        }
    }

    /// The same mailbox in another domain.
    pub fn with_domain(&self, domain: &Domain) -> Mailbox {
        let host = Host::Name(domain.clone());
        Mailbox { text: format!("{}@{domain}", self.spelled_local()), host, ..self.clone() }
    }

    /// The canonical form of a mailbox of this host: the domain in its canonical form, and quotes only where they are needed
    /// (RFC 5321 section 4.1.2). Dots without quotes stay.
    pub fn canonical(&self) -> Mailbox {
        let local = match self.spelled_local() {
            spelled if !spelled.contains('"') => Cow::Borrowed(spelled),
            _ => shortest(&self.local),
        };
        Mailbox { text: format!("{local}@{}", self.host), at: local.len(), ..self.clone() }
    }

    /// The address for a header field (RFC 5322 section 3.4.1): with quotes if they are needed, and A-labels for U-labels.
    pub fn header_form(&self) -> Cow<'_, str> {
        let spelled = self.spelled_local();
        match is_dot_string(spelled) || is_quoted_string(spelled) {
            true => self.with_a_labels(),
            false if self.text[self.at..].is_ascii() => {
                Cow::Owned(format!("{}{}", shortest(&self.local), &self.text[self.at..]))
            }
            false => Cow::Owned(format!("{}@{}", shortest(&self.local), self.host)),
        }
    }

    fn spelled_local(&self) -> &str {
        &self.text[..self.at]
    }

    /// The parts that are compared.
    fn key(&self) -> (&str, &Host) {
        #[cfg(test)]
        COMPARED.with(|compared| compared.set(compared.get() + 1));
        (&self.local, &self.host)
    }
}

/// Writes the address as it was received.
impl fmt::Display for Mailbox {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl PartialEq for Mailbox {
    fn eq(&self, other: &Mailbox) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Mailbox {}

impl Hash for Mailbox {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}

impl PartialOrd for Mailbox {
    fn partial_cmp(&self, other: &Mailbox) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Mailbox {
    fn cmp(&self, other: &Mailbox) -> Ordering {
        self.key().cmp(&other.key())
    }
}

/// The address to which DSNs about a message are sent. `Display` omits the angle brackets, so the null path is empty.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum ReversePath {
    Null,
    Mailbox(Mailbox),
}

impl ReversePath {
    /// Whether the path can be sent to a server without SMTPUTF8: see [`Mailbox::is_ascii`].
    pub fn is_ascii(&self) -> bool {
        !matches!(self, ReversePath::Mailbox(mailbox) if !mailbox.is_ascii())
    }
}

impl fmt::Display for ReversePath {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            ReversePath::Null => Ok(()),
            ReversePath::Mailbox(mailbox) => mailbox.fmt(f),
        }
    }
}

/// The address of a recipient. `Display` omits the angle brackets.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum ForwardPath {
    /// `<Postmaster>` without a domain, which every server must accept (RFC 5321 section 4.5.1).
    Postmaster,
    Mailbox(Mailbox),
}

impl fmt::Display for ForwardPath {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            ForwardPath::Postmaster => f.write_str("Postmaster"),
            ForwardPath::Mailbox(mailbox) => mailbox.fmt(f),
        }
    }
}

/// Why an argument is not a valid path.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PathError {
    /// No angle brackets, no `@`, a control character, or a space or a bracket outside of quotes.
    Syntax,
    /// A path of more than 1000 octets, or a local part of more than 255.
    TooLong,
    /// The host, or a host of the source route, is neither a domain nor an address literal.
    BadDomain,
    /// IDNA does not permit the domain (RFC 5891, UTS #46).
    NotIdna,
    NotUtf8,
}

/// Parses a reverse path at the beginning of `input`. Returns the path, and the number of its octets with both brackets.
///
/// # Errors
/// Why there is no valid path.
pub fn reverse_path(input: &[u8]) -> Result<(ReversePath, usize), PathError> {
    let (path, used) = enclosed(input)?;
    Ok((if path.is_empty() { ReversePath::Null } else { ReversePath::Mailbox(path_mailbox(path)?) }, used))
}

/// Parses a forward path at the beginning of `input`. Returns the path, and the number of its octets with both brackets.
///
/// # Errors
/// Why there is no valid path.
pub fn forward_path(input: &[u8]) -> Result<(ForwardPath, usize), PathError> {
    let (path, used) = enclosed(input)?;
    let postmaster = path.eq_ignore_ascii_case("postmaster");
    Ok((if postmaster { ForwardPath::Postmaster } else { ForwardPath::Mailbox(path_mailbox(path)?) }, used))
}

/// Returns the text between `<` and `>`, and the number of its octets with both brackets.
fn enclosed(input: &[u8]) -> Result<(&str, usize), PathError> {
    let inside = input.strip_prefix(b"<").ok_or(PathError::Syntax)?;
    let (mut quoted, mut escaped) = (false, false);
    let end = inside.iter().position(|&octet| {
        match octet {
            b'>' if !quoted => return true,
            _ if escaped => escaped = false,
            b'\\' => escaped = quoted,
            b'"' => quoted = !quoted,
            _ => {}
        }
        false
    });
    let end = end.ok_or(PathError::Syntax)?;
    if end + 2 > PATH_LIMIT {
        return Err(PathError::TooLong);
    }
    let path = str::from_utf8(&inside[..end]).map_err(|_| PathError::NotUtf8)?;
    Ok((path, end + 2))
}

/// The mailbox of a path. A source route before it must be valid, and is dropped (RFC 5321 section 4.1.1.3, appendix C).
fn path_mailbox(path: &str) -> Result<Mailbox, PathError> {
    if !path.starts_with('@') {
        return Mailbox::parse_any(path);
    }
    let (route, rest) = path.split_once(':').ok_or(PathError::Syntax)?;
    for hop in route.split(',') {
        let domain = hop.strip_prefix('@').ok_or(PathError::Syntax)?;
        Domain::parse_any(domain)?;
    }
    Mailbox::parse_any(rest)
}

/// The index of the end of the local part: that of the last `@` outside of quotes.
fn local_end(text: &str) -> Option<usize> {
    let (mut quoted, mut escaped, mut end) = (false, false, None);
    for (at, octet) in text.bytes().enumerate() {
        match octet {
            _ if escaped => escaped = false,
            b'\\' => escaped = quoted,
            b'"' => quoted = !quoted,
            b'@' if !quoted => end = Some(at),
            _ => {}
        }
    }
    end
}

/// A local part without its quotes; `None`: the local part is not valid, or cannot be relayed safely.
fn unquoted(spelled: &str) -> Option<String> {
    // With an `@` at its beginning, the path would be a source route.
    if spelled.is_empty() || spelled.starts_with('@') {
        return None;
    }
    let mut content = String::with_capacity(spelled.len());
    let (mut quoted, mut characters) = (false, spelled.chars());
    while let Some(character) = characters.next() {
        match character {
            '"' => quoted = !quoted,
            // RFC 6531 section 3.3: `quoted-pairSMTP` is ASCII.
            '\\' if quoted => content.push(characters.next().filter(char::is_ascii)?),
            // A server for which a backslash escapes outside of quotes, too, would find other quotes, and another end of
            // the path.
            '\\' if spelled.contains('"') => return None,
            ' ' | '<' | '>' | '(' | ')' | '[' | ']' if !quoted => return None,
            _ => content.push(character),
        }
    }
    (!quoted).then_some(content)
}

/// A local part with quotes only where they are needed (RFC 5321 section 4.1.2).
fn shortest(local: &str) -> Cow<'_, str> {
    match is_dot_string(local) {
        true => Cow::Borrowed(local),
        false => Cow::Owned(format!("\"{}\"", local.replace('\\', r"\\").replace('"', "\\\""))),
    }
}

/// Whether a local part is one quoted string: its first quote ends with its last character.
fn is_quoted_string(spelled: &str) -> bool {
    let Some(inside) = spelled.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) else { return false };
    let mut escaped = false;
    for octet in inside.bytes() {
        match octet {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return false,
            _ => {}
        }
    }
    !escaped
}

/// Whether a local part needs no quotes: atoms with single dots between them.
fn is_dot_string(local: &str) -> bool {
    let is_atext = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-/=?^_`{|}~".contains(c) || !c.is_ascii();
    local.split('.').all(|atom| !atom.is_empty() && atom.chars().all(is_atext))
}

/// An address as an address literal (RFC 5321 section 4.1.3): `[192.0.2.1]`, `[IPv6:2001:db8::1]`.
pub fn literal(address: IpAddr) -> String {
    Host::Literal(address.to_canonical()).to_string()
}

/// The address in the text between the brackets of an address literal. RFC 5321 section 4.1.3 permits other tags than
/// `IPv6`, but none is registered.
pub fn parse_literal(text: &str) -> Option<IpAddr> {
    match text.split_at_checked("IPv6:".len()) {
        Some((tag, address)) if tag.eq_ignore_ascii_case("IPv6:") => address.parse().ok().map(IpAddr::V6),
        _ => text.parse().ok().map(IpAddr::V4),
    }
}

/// Whether the text is a `sub-domain` of RFC 5321 section 4.1.2 of at most 63 octets.
fn is_label(text: &str) -> bool {
    let allowed = |octet: u8| octet.is_ascii_alphanumeric() || octet == b'-';
    let hyphen_at_an_end = text.starts_with('-') || text.ends_with('-');
    (1..=LABEL_LIMIT).contains(&text.len()) && !hyphen_at_an_end && text.bytes().all(allowed)
}

/// The domain in lower case with A-labels for U-labels (UTS #46, non-transitional processing).
///
/// RFC 5891 section 5.2 permits the mapping and requires NFC. Without it, a domain with a "ü" that a client writes as "u" and
/// U+0308 would not be the customer's, and the server would reject the mail. The mapping needs the whole domain: U+3002
/// separates labels, too, and if one label is written from right to left, RFC 5893 section 2 has rules for all.
fn a_labels(text: &str, deny: AsciiDenyList) -> Option<String> {
    // Punycode needs quadratic time, so a long label would delay the session. No path can have a longer domain.
    if text.len() > PATH_LIMIT {
        return None;
    }
    // RFC 5891 section 4.2.3.1: a U-label has no hyphen at either end. `Hyphens::Check` would also reject
    // "r3---sn.bücher.example" for its ASCII label. The caller checks the lengths.
    let hyphens = Hyphens::CheckFirstLast;
    let name = Uts46::new().to_ascii(text.as_bytes(), deny, hyphens, DnsLength::Ignore);
    name.ok().map(Cow::into_owned)
}

#[cfg(test)]
thread_local! {
    /// How often a mailbox was compared or hashed in this thread: a test checks that it does not grow with the square
    /// of the recipients.
    pub static COMPARED: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

#[cfg(test)]
mod tests;
