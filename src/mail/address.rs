//! Domains, mailboxes and paths as SMTP writes them (RFC 5321 section 4.1.2, RFC 6531 section 3.3).
//!
//! A value of one of these types is valid, because only the parsers here make it.
//!
//! ```text
//! MAIL FROM:<@one.example,@two.example:"Joe Doe"@example.org> SIZE=1000
//!            `-- source route: parsed, -'`-local-' `- host -'
//!                then dropped           `------ mailbox ----'
//!           `------------------- path ----------------------'
//! ```
//!
//! Two ways to write one address compare as equal: domains and address literals are kept in their canonical form, local
//! parts without quotes. `Display` writes the shortest form.

use core::net::IpAddr;
use std::borrow::Cow;
use std::fmt;

use idna::uts46::{AsciiDenyList, DnsLength, Hyphens, Uts46};

/// Octets of a label (RFC 1035 section 2.3.4).
const LABEL_LIMIT: usize = 63;
/// Octets of a domain (RFC 5321 section 4.5.3.1.2).
pub const DOMAIN_LIMIT: usize = 255;
/// Octets of a local part. RFC 5321 section 4.5.3.1.1 requires 64, and asks to accept more.
const LOCAL_LIMIT: usize = 255;
/// Octets of a path with its angle brackets. RFC 5321 section 4.5.3.1.3 requires 256; source routes and UTF-8 need more.
const PATH_LIMIT: usize = 1000;

/// A domain name in lower case with A-labels for U-labels: always ASCII.
///
/// It has letters, digits and hyphens in labels of 1 to 63 octets, at most 255 octets in all, and no dot at either end. So
/// it is safe as the name of a file.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Domain(String);

impl Domain {
    /// Parses the `Domain` of RFC 5321 section 4.1.2, with the U-labels of RFC 6531; `None`: it is not valid.
    ///
    /// If the text is ASCII, the parser only changes it to lower case: an A-label stays as it is, even if it does not
    /// decode. If the text has other characters, UTS #46 maps it, so that every way to write a name gives the same domain,
    /// and a name that UTS #46 does not allow is not valid.
    pub fn parse(text: &str) -> Option<Domain> {
        let name = if text.is_ascii() { text.to_ascii_lowercase() } else { a_labels(text)? };
        // RFC 5321 section 4.5.3.1.2: the limit is for the name that SMTP and DNS carry.
        (name.len() <= DOMAIN_LIMIT && name.split('.').all(is_label)).then_some(Domain(name))
    }

    /// Parses the stricter `domain` of RFC 2645 section 5.2.1: ASCII, with at least one dot.
    pub fn parse_odmr(input: &[u8]) -> Option<Domain> {
        let text = str::from_utf8(input).ok()?;
        let strict = text.is_ascii() && text.contains('.');
        strict.then_some(text).and_then(Domain::parse)
    }

    /// The name, always ASCII.
    pub fn as_str(&self) -> &str {
        &self.0
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
}

impl Host {
    /// Parses a domain or an address literal (RFC 5321 section 4.1.3).
    pub fn parse(text: &str) -> Option<Host> {
        match text.strip_prefix('[') {
            Some(rest) => rest.strip_suffix(']').and_then(parse_literal).map(Host::Literal),
            None => Domain::parse(text).map(Host::Name),
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Host::Name(domain) => domain.fmt(f),
            Host::Literal(IpAddr::V4(address)) => write!(f, "[{address}]"),
            Host::Literal(IpAddr::V6(address)) => write!(f, "[IPv6:{address}]"),
        }
    }
}

/// `local@host`. `"joe"@a.example` and `joe@a.example` are the same (RFC 5321 section 4.1.2).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Mailbox {
    local: String,
    host: Host,
}

impl Mailbox {
    /// Parses a mailbox without angle brackets.
    pub fn parse(text: &str) -> Option<Mailbox> {
        mailbox(text).ok()
    }

    /// The local part without its quotes, in its own case: at most 255 octets, no control characters.
    ///
    /// It may be empty or `..`, or contain spaces, `/` and `@`: it is not safe as the name of a file.
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
            Host::Literal(_) => None,
        }
    }

    /// Whether the mailbox can be sent to a server without SMTPUTF8 (RFC 6531 section 3.2). Only the local part matters,
    /// because domains are kept as A-labels. A parser must look at the octets that the peer has sent instead.
    pub fn is_ascii(&self) -> bool {
        self.local.is_ascii()
    }
}

/// Writes the shortest form: quotes only where they are needed (RFC 5321 section 4.1.2).
impl fmt::Display for Mailbox {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        if is_dot_string(&self.local) {
            write!(f, "{}@{}", self.local, self.host)
        } else {
            let escaped = self.local.replace('\\', r"\\").replace('"', "\\\"");
            write!(f, "\"{escaped}\"@{}", self.host)
        }
    }
}

/// The address that DSNs about a message go to. `Display` omits the angle brackets, so the null path is empty.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum ReversePath {
    Null,
    Mailbox(Mailbox),
}

impl ReversePath {
    /// As [`Mailbox::is_ascii`].
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
    /// No angle brackets, no `@`, a control character, or a local part that lacks its quotes.
    Syntax,
    /// A path of more than 1000 octets, or a local part of more than 255.
    TooLong,
    /// The host, or a host of the source route, is neither a domain nor an address literal.
    BadDomain,
    NotUtf8,
}

/// Parses a reverse path at the beginning of `input`. Returns the path and its octets with both angle brackets.
///
/// # Errors
/// Why there is no valid path.
pub fn reverse_path(input: &[u8]) -> Result<(ReversePath, usize), PathError> {
    let (path, used) = enclosed(input)?;
    Ok((if path.is_empty() { ReversePath::Null } else { ReversePath::Mailbox(path_mailbox(path)?) }, used))
}

/// Parses a forward path at the beginning of `input`. Returns the path and its octets with both angle brackets.
///
/// # Errors
/// Why there is no valid path.
pub fn forward_path(input: &[u8]) -> Result<(ForwardPath, usize), PathError> {
    let (path, used) = enclosed(input)?;
    let postmaster = path.eq_ignore_ascii_case("postmaster");
    Ok((if postmaster { ForwardPath::Postmaster } else { ForwardPath::Mailbox(path_mailbox(path)?) }, used))
}

/// The text between `<` and `>`, and its octets with both brackets.
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

/// The mailbox of a path. A source route before it must be valid and is ignored (RFC 5321 section 4.1.1.3, appendix C).
fn path_mailbox(path: &str) -> Result<Mailbox, PathError> {
    if !path.starts_with('@') {
        return mailbox(path);
    }
    let (route, rest) = path.split_once(':').ok_or(PathError::Syntax)?;
    for hop in route.split(',') {
        let domain = hop.strip_prefix('@').ok_or(PathError::Syntax)?;
        Domain::parse(domain).ok_or(PathError::BadDomain)?;
    }
    mailbox(rest)
}

fn mailbox(text: &str) -> Result<Mailbox, PathError> {
    let (local, host) = match text.strip_prefix('"') {
        Some(quoted) => unquoted(quoted).ok_or(PathError::Syntax)?,
        None => match text.split_once('@') {
            Some((local, host)) if is_dot_string(local) => (local.to_owned(), host),
            _ => return Err(PathError::Syntax),
        },
    };
    if local.contains(char::is_control) {
        return Err(PathError::Syntax);
    }
    if local.len() > LOCAL_LIMIT {
        return Err(PathError::TooLong);
    }
    let host = Host::parse(host).ok_or(PathError::BadDomain)?;
    Ok(Mailbox { local, host })
}

/// The content of a quoted local part whose first quote is already removed, and the text after the `@`.
fn unquoted(text: &str) -> Option<(String, &str)> {
    let mut content = String::new();
    let mut characters = text.chars();
    loop {
        match characters.next()? {
            '"' => break,
            '\\' => content.push(characters.next().filter(char::is_ascii)?),
            character => content.push(character),
        }
    }
    let host = characters.as_str().strip_prefix('@')?;
    Some((content, host))
}

/// Whether a local part needs no quotes: atoms with single dots between them.
fn is_dot_string(local: &str) -> bool {
    let is_atext = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-/=?^_`{|}~".contains(c) || !c.is_ascii();
    local.split('.').all(|atom| !atom.is_empty() && atom.chars().all(is_atext))
}

/// An address as SMTP writes it (RFC 5321 section 4.1.3): `[192.0.2.1]`, `[IPv6:2001:db8::1]`.
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
/// RFC 5891 section 5.2 permits the mapping and requires NFC. Without it, a "ü" that a client writes as "u" and U+0308
/// would be another domain than the customer's, and the server would reject the mail. The mapping needs the whole domain:
/// U+3002 separates labels too, and if one label is written from right to left, RFC 5893 section 2 has rules for all.
fn a_labels(text: &str) -> Option<String> {
    // Punycode takes quadratic time, so a long label would delay the session. No path has a longer domain.
    if text.len() > PATH_LIMIT {
        return None;
    }
    // RFC 5891 section 4.2.3.1: a U-label has no hyphen at either end. `Hyphens::Check` would also reject
    // "r3---sn.bücher.example" for its ASCII label. The caller checks the lengths.
    let hyphens = Hyphens::CheckFirstLast;
    let name = Uts46::new().to_ascii(text.as_bytes(), AsciiDenyList::STD3, hyphens, DnsLength::Ignore);
    name.ok().map(Cow::into_owned)
}

#[cfg(test)]
mod tests;
