//! The commands of a client: verbs, parameters, and the envelope that MAIL and RCPT build (RFC 5321 section 4.1.1, RFC 2645
//! section 5.2.1).
//!
//! A line is parsed in two steps, because the order of errors matters. [`Verb::of`] finds the verb (500); the server checks
//! that it implements the command (502) and permits it in its state (530, 503); only then [`Command::parse`] checks the
//! argument (501). The error of a parser is the reply to send.

use std::borrow::Cow;

use super::extensions::ServerExtensions;
use super::limits;
use super::reply::Reply;
use crate::mail::address::{Domain, ForwardPath, Mailbox, PathError, ReversePath, forward_path, reverse_path};

/// The first word of a command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verb {
    Ehlo,
    Helo,
    StartTls,
    Auth,
    Atrn,
    Mail,
    Rcpt,
    Data,
    Bdat,
    Rset,
    Noop,
    Vrfy,
    Help,
    Quit,
    /// A command of SMTP that this program never implements: 502 (RFC 5321 section 4.2.4).
    Unimplemented,
    /// A method of HTTP: a browser has connected to this port.
    Http,
    /// Any other word: 500 (RFC 5321 section 4.2.4).
    Unknown,
}

/// The commands that a listener may implement, in the order of the reply to HELP.
pub(super) const VERBS: [(&str, Verb); 14] = [
    ("EHLO", Verb::Ehlo),
    ("HELO", Verb::Helo),
    ("STARTTLS", Verb::StartTls),
    ("AUTH", Verb::Auth),
    ("ATRN", Verb::Atrn),
    ("MAIL", Verb::Mail),
    ("RCPT", Verb::Rcpt),
    ("DATA", Verb::Data),
    ("BDAT", Verb::Bdat),
    ("RSET", Verb::Rset),
    ("NOOP", Verb::Noop),
    ("VRFY", Verb::Vrfy),
    ("HELP", Verb::Help),
    ("QUIT", Verb::Quit),
];

const UNIMPLEMENTED: [&str; 6] = ["ETRN", "EXPN", "TURN", "SEND", "SOML", "SAML"];

/// The methods of HTTP (RFC 9110 section 9, RFC 5789).
const HTTP_METHODS: [&str; 9] = ["GET", "POST", "PUT", "HEAD", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE"];

impl Verb {
    /// The verb of a line without its CRLF, and the rest of the line, which is empty or begins with a space.
    ///
    /// # Errors
    /// The reply to a line without a verb, or with a CR, LF or NUL.
    pub fn of(line: &[u8]) -> Result<(Verb, &[u8]), Reply> {
        // If two servers disagree about what ends a line, a client can smuggle commands past one of them (RFC 5321 section
        // 2.3.8).
        if line.iter().any(|octet| matches!(octet, b'\r' | b'\n' | 0)) {
            return Err(Reply::new(500, "5.5.2", "A command line ends in CRLF and holds no other CR, LF or NUL"));
        }
        let end = line.iter().position(|octet| *octet == b' ').unwrap_or(line.len());
        let (word, rest) = line.split_at(end);
        if word.is_empty() || !word.iter().all(u8::is_ascii_alphabetic) {
            return Err(Reply::new(500, "5.5.2", "This is not an SMTP command"));
        }
        let is_word = |name: &str| word.eq_ignore_ascii_case(name.as_bytes());
        let verb = match VERBS.iter().find(|(name, _)| is_word(name)) {
            Some((_, verb)) => *verb,
            None if UNIMPLEMENTED.into_iter().any(is_word) => Verb::Unimplemented,
            None if HTTP_METHODS.into_iter().any(is_word) => Verb::Http,
            None => Verb::Unknown,
        };
        Ok((verb, rest))
    }
}

/// The parameter `BODY` of MAIL (RFC 6152).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Body {
    /// MAIL had no `BODY`.
    #[default]
    Undeclared,
    SevenBit,
    EightBit,
}

/// The envelope of a message (RFC 5321 section 2.3.1): its sender, its recipients, and the parameters of MAIL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope {
    pub from: ReversePath,
    pub recipients: Vec<Recipient>,
    pub body: Body,
    /// `SMTPUTF8` (RFC 6531).
    pub utf8: bool,
    /// `RET` (RFC 3461 section 4.3).
    pub ret: Option<Return>,
    /// `ENVID`, as the client sent it, in xtext (RFC 3461 section 4.4): at most 100 octets.
    pub envelope_id: Option<String>,
}

impl Envelope {
    /// An envelope without recipients and parameters.
    pub fn new(from: ReversePath) -> Envelope {
        Envelope { from, recipients: Vec::new(), body: Body::Undeclared, utf8: false, ret: None, envelope_id: None }
    }

    /// The same envelope with other recipients.
    pub fn with_recipients(&self, recipients: Vec<Recipient>) -> Envelope {
        let Envelope { from, body, utf8, ret, envelope_id, .. } = self;
        let (from, envelope_id) = (from.clone(), envelope_id.clone());
        Envelope { from, recipients, body: *body, utf8: *utf8, ret: *ret, envelope_id }
    }

    /// Drops the SMTPUTF8 that the client has declared, if the header does not need it. Many clients declare it whenever the
    /// server offers it; with it, the message would be rejected for a next hop without SMTPUTF8 that can accept it (RFC 6531
    /// section 3.2).
    pub fn drop_needless_utf8(&mut self, header_needs_it: bool) {
        if self.utf8 && !header_needs_it {
            self.utf8 = false;
            // The header may still have octets above 127. Without SMTPUTF8 these are 8-bit content (RFC 6152 section
            // 2).
            if self.body == Body::SevenBit {
                self.body = Body::Undeclared;
            }
        }
    }

    /// Whether only a server with SMTPUTF8 can accept the message (RFC 6531 section 3.2).
    pub fn needs_utf8(&self) -> bool {
        self.utf8 || !self.from.is_ascii() || self.recipients.iter().any(|recipient| !recipient.mailbox.is_ascii())
    }
}

/// A MAIL command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MailFrom {
    /// The sender and the parameters; there are no recipients yet.
    pub envelope: Envelope,
    /// `SIZE` in octets (RFC 1870); a number that does not fit is `u64::MAX`.
    pub size: Option<u64>,
}

/// A RCPT command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RcptTo {
    pub path: ForwardPath,
    /// The path is not ASCII.
    pub utf8: bool,
    pub notify: Notify,
    /// `ORCPT`, as in [`Recipient::original`].
    pub original: Option<String>,
}

impl RcptTo {
    /// The recipient for an envelope; `None`: the path is `postmaster` without a domain (RFC 5321 section 4.5.1).
    pub fn recipient(self) -> Option<Recipient> {
        match self.path {
            ForwardPath::Mailbox(mailbox) => Some(Recipient { mailbox, notify: self.notify, original: self.original }),
            ForwardPath::Postmaster => None,
        }
    }
}

/// The parameter `RET` of MAIL: how much of the message a DSN about its failure returns (RFC 3461 section 4.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Return {
    Full,
    Header,
}

/// The parameter `NOTIFY` of RCPT: when the sender wants a DSN (RFC 3461 section 4.1). Its text is stored and relayed
/// unchanged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notify(Option<String>);

impl Notify {
    /// Parses `NEVER`, or a list of `SUCCESS`, `FAILURE` and `DELAY`, each at most once; `None`: the value is not valid.
    pub fn parse(value: &[u8]) -> Option<Notify> {
        let text = std::str::from_utf8(value).ok()?;
        let words: Vec<_> = text.split(',').map(str::to_ascii_uppercase).collect();
        let times = |known: &str| words.iter().filter(|word| *word == known).count();
        let once = ["SUCCESS", "FAILURE", "DELAY"].into_iter().filter(|known| times(known) == 1).count();
        (words == ["NEVER"] || once == words.len()).then(|| Notify(Some(text.to_owned())))
    }

    /// The text of the parameter; `None`: RCPT did not have it.
    pub fn as_given(&self) -> Option<&str> {
        self.0.as_deref()
    }

    /// Whether the sender wants a DSN after a delivery.
    pub fn success(&self) -> bool {
        self.has("SUCCESS")
    }

    /// Whether the sender wants a DSN after a failure; true without the parameter (RFC 3461 section 5.2.6).
    pub fn failure(&self) -> bool {
        self.0.is_none() || self.has("FAILURE")
    }

    /// Whether the sender wants a DSN about a delay; true without the parameter (RFC 3461 section 5.2.5).
    pub fn delay(&self) -> bool {
        self.0.is_none() || self.has("DELAY")
    }

    /// The same without `SUCCESS`; `NEVER` if it was the only word.
    pub fn without_success(&self) -> Notify {
        let Some(text) = &self.0 else { return Notify(None) };
        let words: Vec<_> = text.split(',').filter(|word| !word.eq_ignore_ascii_case("SUCCESS")).collect();
        Notify(Some(if words.is_empty() { "NEVER".to_owned() } else { words.join(",") }))
    }

    fn has(&self, wanted: &str) -> bool {
        self.0.as_ref().is_some_and(|text| text.split(',').any(|word| word.eq_ignore_ascii_case(wanted)))
    }
}

/// A recipient in an envelope, with the parameters of its RCPT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipient {
    pub mailbox: Mailbox,
    pub notify: Notify,
    /// `ORCPT`, as the client sent it, `type;xtext` (RFC 3461 section 4.2): at most 500 octets.
    pub original: Option<String>,
}

impl Recipient {
    /// A recipient without parameters.
    pub fn plain(mailbox: Mailbox) -> Recipient {
        Recipient { mailbox, notify: Notify::default(), original: None }
    }
}

/// Parses the value of `ORCPT`: a type of address, `;`, and xtext, at most 500 octets (RFC 3461 section 4.2); `None`: the
/// value is not valid.
pub fn original_recipient(value: &[u8]) -> Option<String> {
    let at = value.iter().position(|octet| *octet == b';')?;
    let (kind, text) = (&value[..at], &value[at + 1..]);
    let atom = |octet: &u8| octet.is_ascii_alphanumeric() || b"!#$%&'*+-/=?^_`{|}~.".contains(octet);
    let good = value.len() <= limits::ORIGINAL_RECIPIENT && !kind.is_empty() && kind.iter().all(atom) && is_xtext(text);
    good.then(|| String::from_utf8_lossy(value).into_owned())
}

/// A command with a valid argument.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// The domains that the customer wants mail for; none: all domains of its account (RFC 2645 section 5.2.1).
    Atrn(Vec<Domain>),
    Auth {
        mechanism: Vec<u8>,
        /// The initial response, in base64 (RFC 4954 section 4).
        initial: Option<Vec<u8>>,
    },
    /// `size` octets of content follow the line, even if `rest` is an error (RFC 3030 section 2).
    Bdat {
        size: u64,
        /// Whether LAST follows the size. If anything else does, the reply.
        rest: Result<bool, Reply>,
    },
    Data,
    Ehlo(String),
    Helo(String),
    Help,
    Mail(MailFrom),
    Noop,
    Quit,
    Rcpt(RcptTo),
    Rset,
    StartTls,
    Vrfy,
}

impl Command {
    /// Parses `rest`, the line after its verb. `offers`: the extensions whose parameters the server accepts.
    ///
    /// # Errors
    /// The reply to a command whose argument is not valid.
    pub fn parse(verb: Verb, rest: &[u8], offers: ServerExtensions) -> Result<Command, Reply> {
        // RFC 5321 section 4.1.1: the server should tolerate white space before the CRLF. The grammar of ATRN has none (RFC
        // 2645 section 5.2.1).
        let argument = rest.strip_prefix(b" ").unwrap_or(rest).trim_ascii_end();
        match verb {
            Verb::Atrn => atrn(rest),
            Verb::Auth => auth(argument),
            Verb::Bdat => bdat(argument),
            Verb::Ehlo => hello(argument).map(Command::Ehlo),
            Verb::Helo => hello(argument).map(Command::Helo),
            Verb::Mail => mail(argument, offers).map(Command::Mail),
            Verb::Rcpt => rcpt(argument, offers).map(Command::Rcpt),
            Verb::Data => alone(argument, Command::Data),
            Verb::Quit => alone(argument, Command::Quit),
            Verb::Rset => alone(argument, Command::Rset),
            Verb::StartTls => alone(argument, Command::StartTls),
            Verb::Vrfy if argument.is_empty() => Err(argument_error("VRFY needs an address")),
            Verb::Vrfy => Ok(Command::Vrfy),
            Verb::Help => Ok(Command::Help),
            Verb::Noop => Ok(Command::Noop),
            Verb::Unimplemented | Verb::Unknown | Verb::Http => Err(not_implemented()),
        }
    }
}

/// The reply to a command that the listener does not implement (RFC 5321 section 4.2.4).
pub(super) fn not_implemented() -> Reply {
    Reply::new(502, "5.5.1", "Command not implemented here")
}

fn argument_error(text: impl Into<Cow<'static, str>>) -> Reply {
    Reply::new(501, "5.5.4", text)
}

/// A command without parameters. RFC 5321 section 4.3.2: with an argument it gets 501.
fn alone(argument: &[u8], command: Command) -> Result<Command, Reply> {
    match argument {
        [] => Ok(command),
        _ => Err(argument_error("This command takes no argument")),
    }
}

/// `"ATRN" [SP domain *("," domain)]` (RFC 2645 section 5.2.1). A domain that occurs twice counts once.
fn atrn(rest: &[u8]) -> Result<Command, Reply> {
    let Some(list) = rest.strip_prefix(b" ") else {
        return Ok(Command::Atrn(Vec::new()));
    };
    let mut domains = Vec::new();
    for name in list.split(|octet| *octet == b',') {
        let domain = Domain::parse_odmr(name)
            .ok_or_else(|| argument_error("Syntax: ATRN [domain *(\",\" domain)], without spaces"))?;
        if !domains.contains(&domain) {
            domains.push(domain);
        }
    }
    Ok(Command::Atrn(domains))
}

/// `AUTH SP mechanism [SP initial-response]` (RFC 4954 section 4).
fn auth(argument: &[u8]) -> Result<Command, Reply> {
    let mut words = argument.split(|octet| *octet == b' ').map(<[u8]>::to_vec);
    let mechanism = words.next().filter(|word| !word.is_empty());
    match (mechanism, words.next(), words.next()) {
        (Some(mechanism), initial, None) => Ok(Command::Auth { mechanism, initial }),
        _ => Err(argument_error("Syntax: AUTH mechanism [initial-response]")),
    }
}

/// `BDAT SP chunk-size [SP LAST]` (RFC 3030 section 2). If the size is valid, its octets must be skipped even if the rest of
/// the line is not: they would be read as commands.
fn bdat(argument: &[u8]) -> Result<Command, Reply> {
    let error = || argument_error("Syntax: BDAT chunk-size [LAST]");
    let mut words = argument.trim_ascii_start().split(|octet| *octet == b' ');
    let size = words.next().and_then(number).ok_or_else(error)?;
    let rest = match (words.next(), words.next()) {
        _ if argument.trim_ascii_start() != argument => Err(error()),
        (None, None) => Ok(false),
        (Some(word), None) if word.eq_ignore_ascii_case(b"LAST") => Ok(true),
        _ => Err(error()),
    };
    Ok(Command::Bdat { size, rest })
}

/// The name in EHLO or HELO. Any printable word is accepted: the server must not reject mail because the name is not
/// that of the client (RFC 5321 section 4.1.4). A U-label is not valid (RFC 6531 section 3.7.1).
fn hello(argument: &[u8]) -> Result<String, Reply> {
    let printable = argument.iter().all(|octet| (b'!'..=b'~').contains(octet));
    match std::str::from_utf8(argument) {
        Ok(name) if printable && (1..=limits::HELLO_NAME).contains(&name.len()) => Ok(name.to_owned()),
        _ => Err(argument_error("Send your host name, or your address in square brackets")),
    }
}

/// The argument without `keyword` (`FROM:`, `TO:`) and the spaces after it. RFC 5321 section 3.3 forbids these spaces, but
/// the example in RFC 2645 section 6 has one.
fn after_keyword<'a>(argument: &'a [u8], keyword: &'static str) -> Result<&'a [u8], Reply> {
    let path = argument.split_at_checked(keyword.len()).map(|(word, rest)| (word, rest.trim_ascii_start()));
    match path {
        Some((word, path)) if word.eq_ignore_ascii_case(keyword.as_bytes()) && path.starts_with(b"<") => Ok(path),
        _ => Err(argument_error(format!("Syntax: {keyword}<address> [parameters]"))),
    }
}

/// `FROM:<reverse-path> [parameters]` (RFC 5321 section 4.1.1.2).
fn mail(argument: &[u8], offers: ServerExtensions) -> Result<MailFrom, Reply> {
    let input = after_keyword(argument, "FROM:")?;
    let (path, used) = reverse_path(input).map_err(|error| path_error(error, "5.1.7"))?;
    let (mut envelope, mut size) = (Envelope::new(path), None);
    each_parameter(&input[used..], |name, value| {
        match name {
            b"SIZE" if offers.size => {
                size = Some(value.and_then(number).ok_or_else(|| argument_error("Syntax: SIZE=octets"))?);
            }
            b"BODY" if offers.eight_bit => {
                envelope.body = match value.map(<[u8]>::to_ascii_uppercase).as_deref() {
                    Some(b"7BIT") => Body::SevenBit,
                    Some(b"8BITMIME") => Body::EightBit,
                    _ => return Err(argument_error("BODY is 7BIT or 8BITMIME")),
                };
            }
            b"SMTPUTF8" if offers.utf8 && value.is_some() => return Err(argument_error("SMTPUTF8 takes no value")),
            b"SMTPUTF8" if offers.utf8 => envelope.utf8 = true,
            b"RET" if offers.dsn => {
                envelope.ret = match value.map(<[u8]>::to_ascii_uppercase).as_deref() {
                    Some(b"FULL") => Some(Return::Full),
                    Some(b"HDRS") => Some(Return::Header),
                    _ => return Err(argument_error("RET is FULL or HDRS")),
                };
            }
            b"ENVID" if offers.dsn => {
                let text = value.filter(|value| value.len() <= limits::ENVELOPE_ID && is_xtext(value));
                let text = text.ok_or_else(|| argument_error("ENVID is xtext of 100 octets at most"))?;
                envelope.envelope_id = Some(String::from_utf8_lossy(text).into_owned());
            }
            // RFC 4954 section 5: a server that offers AUTH must accept AUTH=, and treats the value as <> if it does not
            // trust the client. This server trusts no client, so it drops the value.
            b"AUTH" if offers.auth => {
                if !value.is_some_and(|value| value == b"<>" || is_xtext(value)) {
                    return Err(argument_error("Syntax: AUTH=<> or AUTH=xtext"));
                }
            }
            // RFC 5321 section 4.1.1.11.
            _ => return Err(Reply::new(555, "5.5.4", "MAIL parameter not recognised")),
        }
        Ok(())
    })?;
    // RFC 6531 section 3.5.
    if !envelope.utf8 && !input[..used].is_ascii() {
        return Err(Reply::new(550, "5.6.7", "A UTF-8 address needs the SMTPUTF8 parameter"));
    }
    Ok(MailFrom { envelope, size })
}

/// `TO:<forward-path> [parameters]` (RFC 5321 section 4.1.1.3).
fn rcpt(argument: &[u8], offers: ServerExtensions) -> Result<RcptTo, Reply> {
    let input = after_keyword(argument, "TO:")?;
    let (path, used) = forward_path(input).map_err(|error| path_error(error, "5.1.3"))?;
    let (mut notify, mut original) = (Notify::default(), None);
    each_parameter(&input[used..], |name, value| {
        match name {
            b"NOTIFY" if offers.dsn => {
                let error = || argument_error("NOTIFY is NEVER, or a list of SUCCESS, FAILURE and DELAY");
                notify = value.and_then(Notify::parse).ok_or_else(error)?;
            }
            b"ORCPT" if offers.dsn => {
                let error = || argument_error("Syntax: ORCPT=type;xtext");
                original = Some(value.and_then(original_recipient).ok_or_else(error)?);
            }
            _ => return Err(Reply::new(555, "5.5.4", "RCPT parameter not recognised")),
        }
        Ok(())
    })?;
    Ok(RcptTo { path, utf8: !input[..used].is_ascii(), notify, original })
}

/// Calls `accept` with the keyword, in upper case, and the value of each parameter after a path, up to the first error.
/// A space must precede each parameter (RFC 5321 section 4.1.2).
fn each_parameter(rest: &[u8], mut accept: impl FnMut(&[u8], Option<&[u8]>) -> Result<(), Reply>) -> Result<(), Reply> {
    if !rest.is_empty() && rest[0] != b' ' {
        return Err(argument_error("A space must follow the address"));
    }
    let mut names = Vec::new();
    for parameter in rest.split(|octet| *octet == b' ').filter(|word| !word.is_empty()) {
        let mut parts = parameter.splitn(2, |octet| *octet == b'=');
        let name = parts.next().unwrap_or_default().to_ascii_uppercase();
        if names.contains(&name) {
            return Err(argument_error("A parameter occurs twice"));
        }
        accept(&name, parts.next())?;
        names.push(name);
    }
    Ok(())
}

fn path_error(error: PathError, enhanced: &'static str) -> Reply {
    let text = match error {
        PathError::Syntax => "The address does not follow RFC 5321 section 4.1.2",
        PathError::TooLong => "The address is too long",
        PathError::BadDomain => "The domain is empty, or has a character that no domain has",
        PathError::NotIdna => "The domain has a label that IDNA does not allow (RFC 5891)",
        PathError::NotUtf8 => "The address is neither ASCII nor UTF-8",
    };
    Reply::new(501, enhanced, text)
}

/// The value of 1 to 20 digits (RFC 1870 section 3); a number that does not fit is `u64::MAX`.
fn number(digits: &[u8]) -> Option<u64> {
    if !(1..=20).contains(&digits.len()) || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    Some(digits.iter().fold(0u64, |sum, digit| sum.saturating_mul(10).saturating_add(u64::from(digit - b'0'))))
}

/// Whether `value` is xtext of at least one octet (RFC 3461 section 4): printable ASCII without `+` and `=`, which are
/// written `+HH` in upper case.
pub fn is_xtext(value: &[u8]) -> bool {
    let plain = |text: &[u8]| text.iter().all(|octet| (b'!'..=b'~').contains(octet) && *octet != b'=');
    let hex = |octet: &u8| matches!(octet, b'0'..=b'9' | b'A'..=b'F');
    let escaped = |part: &[u8]| matches!(part, [high, low, text @ ..] if hex(high) && hex(low) && plain(text));
    let mut parts = value.split(|octet| *octet == b'+');
    !value.is_empty() && parts.next().is_some_and(plain) && parts.all(escaped)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: ServerExtensions = ServerExtensions { size: true, eight_bit: true, utf8: true, auth: true, dsn: true };

    fn parse(line: &str) -> Result<Command, Reply> {
        let (verb, rest) = Verb::of(line.as_bytes())?;
        Command::parse(verb, rest, ALL)
    }

    fn code(line: &str) -> u16 {
        let command = match parse(line) {
            Ok(Command::Bdat { rest: Err(reply), .. }) => Err(reply),
            other => other,
        };
        command.err().map_or(0, |reply| reply.code())
    }

    /// Rules: ODMR-28, AMB-14.
    #[test]
    fn atrn_follows_the_grammar_of_rfc_2645() {
        let domains = |line: &str| match parse(line) {
            Ok(Command::Atrn(domains)) => domains.iter().map(|domain| domain.as_str().to_owned()).collect::<Vec<_>>(),
            other => panic!("{line}: {other:?}"),
        };
        assert_eq!(domains("ATRN"), Vec::<String>::new());
        assert_eq!(domains("atrn Example.ORG"), ["example.org"]);
        assert_eq!(domains("ATRN a.example,b.example,A.EXAMPLE"), ["a.example", "b.example"]);
        for bad in [
            "ATRN ",
            "ATRN  a.b",
            "ATRN a.b ",
            "ATRN a.b, c.d",
            "ATRN a.b,",
            "ATRN ,a.b",
            "ATRN a.b,,c.d",
            "ATRN localhost",
            "ATRN a.b.",
            "ATRN -a.b",
            "ATRN a-.b",
            "ATRN a_b.c",
            "ATRN [192.0.2.1]",
            "ATRN é.example",
        ] {
            assert_eq!(code(bad), 501, "{bad}");
        }
    }

    /// Rules: SMTP-45.
    #[test]
    fn mail_and_its_parameters() {
        let mail = |line: &str| match parse(line) {
            Ok(Command::Mail(mail)) => mail,
            other => panic!("{line}: {other:?}"),
        };
        assert_eq!(mail("MAIL FROM:<>").envelope.from, ReversePath::Null);
        assert_eq!(mail("mail from: <a@b.example>").envelope.from.to_string(), "a@b.example");
        let full = mail("MAIL FROM:<a@b.example> SIZE=99999999999999999999 BODY=8BitMIME SMTPUTF8 AUTH=e+3Dmc2@x");
        assert_eq!((full.size, full.envelope.body, full.envelope.utf8), (Some(u64::MAX), Body::EightBit, true));
        for (bad, wanted) in [
            ("MAIL", 501),
            ("MAIL FROM", 501),
            ("MAIL FROM:a@b.example", 501),
            ("MAIL FROM:<a@b.example>SIZE=1", 501),
            ("MAIL FROM:<> SIZE=", 501),
            ("MAIL FROM:<> SIZE=1 SIZE=1", 501),
            ("MAIL FROM:<> SIZE=-1", 501),
            ("MAIL FROM:<> BODY=BINARYMIME", 501),
            ("MAIL FROM:<> SMTPUTF8=1", 501),
            ("MAIL FROM:<> FOO=1", 555),
            ("MAIL FROM:<> AUTH=+3d", 501),
            ("MAIL FROM:<é@b.example>", 550),
            ("MAIL TO:<a@b.example>", 501),
        ] {
            assert_eq!(code(bad), wanted, "{bad}");
        }
    }

    /// Rules: SMTP-19, SMTP-21, SMTP-23, SMTP-34, U8-05.
    #[test]
    fn other_commands_and_their_arguments() {
        for (line, wanted) in [
            ("DATA", 0),
            ("DATA ", 0),
            ("DATA x", 501),
            ("RSET x", 501),
            ("QUIT x", 501),
            ("STARTTLS x", 501),
            ("NOOP whatever", 0),
            ("VRFY", 501),
            ("VRFY a", 0),
            ("HELP me", 0),
            ("EHLO", 501),
            ("EHLO a b", 501),
            ("EHLO [192.0.2.7]", 0),
            ("HELO vm", 0),
            ("EHLO é", 501),
            ("BDAT 5", 0),
            ("BDAT 5 last", 0),
            ("BDAT", 501),
            ("BDAT x", 501),
            ("BDAT 5 LAST x", 501),
            ("BDAT 5 FIRST", 501),
            ("BDAT  5", 501),
            ("AUTH", 501),
            ("AUTH PLAIN", 0),
            ("AUTH PLAIN =", 0),
            ("AUTH PLAIN a b", 501),
            ("RCPT TO:<a@b.example>", 0),
            ("RCPT TO:<Postmaster>", 0),
            ("RCPT TO:<a@b.example> X=1", 555),
            ("RCPT TO:<>", 501),
            ("", 500),
            (" QUIT", 500),
            ("QU1T", 500),
            ("RCPT TO:<a@b_c.example>", 0),
            ("RCPT TO:<a@b[c>", 501),
            ("RCPT TO:<a b@c.example>", 501),
            ("RCPT TO:<@x.example,@y.example:a@b.example>", 0),
        ] {
            assert_eq!(code(line), wanted, "{line:?}");
        }
        assert!(Verb::of(b"RCPT TO:<a@b.c>\nDATA").is_err());
        assert_eq!(Verb::of(b"sAmL x").map(|found| found.0), Ok(Verb::Unimplemented));
    }

    proptest::proptest! {
        #[test]
        fn no_line_makes_it_panic(verb in 0..VERBS.len(), argument: Vec<u8>) {
            let line = [VERBS[verb].0.as_bytes(), &argument].concat();
            if let Ok((verb, rest)) = Verb::of(&line) {
                let _ = Command::parse(verb, rest, ALL);
            }
        }
    }
}
