//! Command lines, parsed (RFC 5321 section 4.1, RFC 2645 section 5.2.1).
//!
//! In two steps, because the order of errors matters: first [`Verb::of`] says which command it is, the
//! server checks whether it may be said now (530, 503), and only then [`Command::parse`] looks at the
//! argument (501). An error *is* the reply to send.

use std::borrow::Cow;

use super::extensions::ServerExtensions;
use super::limits;
use super::reply::Reply;
use crate::mail::address::{Domain, ForwardPath, Mailbox, PathError, ReversePath, forward_path, reverse_path};

/// The commands this program knows by name, also those that no listener of it implements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verb {
    Atrn,
    Auth,
    Bdat,
    Data,
    Ehlo,
    Etrn,
    Expn,
    Helo,
    Help,
    Mail,
    Noop,
    Quit,
    Rcpt,
    Rset,
    StartTls,
    Turn,
    Vrfy,
    /// A word of letters that is no command of SMTP.
    Unknown,
    /// The first word of an HTTP request: a browser was sent here.
    Http,
}

const VERBS: [(&str, Verb); 29] = [
    ("ATRN", Verb::Atrn),
    ("AUTH", Verb::Auth),
    ("BDAT", Verb::Bdat),
    ("DATA", Verb::Data),
    ("EHLO", Verb::Ehlo),
    ("ETRN", Verb::Etrn),
    ("EXPN", Verb::Expn),
    ("HELO", Verb::Helo),
    ("HELP", Verb::Help),
    ("MAIL", Verb::Mail),
    ("NOOP", Verb::Noop),
    ("QUIT", Verb::Quit),
    ("RCPT", Verb::Rcpt),
    ("RSET", Verb::Rset),
    ("STARTTLS", Verb::StartTls),
    ("TURN", Verb::Turn),
    ("VRFY", Verb::Vrfy),
    ("SEND", Verb::Turn),
    ("SOML", Verb::Turn),
    ("SAML", Verb::Turn),
    ("GET", Verb::Http),
    ("POST", Verb::Http),
    ("PUT", Verb::Http),
    ("HEAD", Verb::Http),
    ("DELETE", Verb::Http),
    ("OPTIONS", Verb::Http),
    ("PATCH", Verb::Http),
    ("CONNECT", Verb::Http),
    ("TRACE", Verb::Http),
];

impl Verb {
    /// The verb of a line and what follows it, beginning with its space.
    pub fn of(line: &[u8]) -> Result<(Verb, &[u8]), Reply> {
        // A bare CR or LF, or a NUL, in a command is an attack or a defect: nothing of it is executed
        // (RFC 5321 section 2.3.8).
        if line.iter().any(|octet| matches!(octet, b'\r' | b'\n' | 0)) {
            return Err(Reply::new(500, "5.5.2", "A command line ends in CRLF and holds no other CR, LF or NUL"));
        }
        let end = line.iter().position(|octet| *octet == b' ').unwrap_or(line.len());
        let (word, rest) = line.split_at(end);
        if word.is_empty() || !word.iter().all(u8::is_ascii_alphabetic) {
            return Err(Reply::new(500, "5.5.2", "This is no SMTP command"));
        }
        let verb = VERBS.iter().find(|(name, _)| word.eq_ignore_ascii_case(name.as_bytes()));
        Ok((verb.map_or(Verb::Unknown, |(_, verb)| *verb), rest))
    }
}

/// `BODY=` (RFC 6152).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Body {
    /// Nothing was said of it.
    #[default]
    Unsaid,
    SevenBit,
    EightBit,
}

/// The envelope of a message (RFC 5321 section 2.3.1): sender, recipients, and what the sender said with MAIL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope {
    pub from: ReversePath,
    pub recipients: Vec<Recipient>,
    pub body: Body,
    /// `SMTPUTF8` (RFC 6531).
    pub utf8: bool,
    /// `RET=` (RFC 3461 section 4.3).
    pub ret: Option<Return>,
    /// `ENVID=`, as it was given: xtext (RFC 3461 section 4.4).
    pub envelope_id: Option<String>,
}

impl Envelope {
    /// An envelope without recipients and parameters.
    pub fn new(from: ReversePath) -> Envelope {
        Envelope { from, recipients: Vec::new(), body: Body::Unsaid, utf8: false, ret: None, envelope_id: None }
    }

    /// The same envelope for other recipients.
    pub fn with_recipients(&self, recipients: Vec<Recipient>) -> Envelope {
        let Envelope { from, body, utf8, ret, envelope_id, .. } = self;
        let (from, envelope_id) = (from.clone(), envelope_id.clone());
        Envelope { from, recipients, body: *body, utf8: *utf8, ret: *ret, envelope_id }
    }

    /// Whether a server without SMTPUTF8 cannot accept it (RFC 6531 section 3.2).
    pub fn needs_utf8(&self) -> bool {
        self.utf8 || !self.from.is_ascii() || self.recipients.iter().any(|recipient| !recipient.mailbox.is_ascii())
    }
}

/// A `MAIL FROM` with its parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MailFrom {
    /// Without recipients as yet.
    pub envelope: Envelope,
    /// `SIZE=` (RFC 1870), saturated.
    pub size: Option<u64>,
}

/// How much of a message comes back with a notice of failure (RFC 3461 section 4.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Return {
    Full,
    Header,
}

/// `NOTIFY=`: what the sender wants to be told (RFC 3461 section 4.1). Kept as it was given, to be passed on
/// octet by octet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notify(Option<String>);

impl Notify {
    /// `NEVER` alone, or a list of `SUCCESS`, `FAILURE` and `DELAY`, each at most once.
    pub fn parse(value: &[u8]) -> Option<Notify> {
        let text = std::str::from_utf8(value).ok()?;
        let mut words: Vec<String> = text.split(',').map(str::to_ascii_uppercase).collect();
        let known = words.iter().all(|word| matches!(word.as_str(), "SUCCESS" | "FAILURE" | "DELAY"));
        let never = words == ["NEVER"];
        let count = words.len();
        words.sort_unstable();
        words.dedup();
        (never || known && words.len() == count).then(|| Notify(Some(text.to_owned())))
    }

    /// As it was given, if it was.
    pub fn as_given(&self) -> Option<&str> {
        self.0.as_deref()
    }

    pub fn success(&self) -> bool {
        self.has("SUCCESS")
    }

    /// Unasked too (RFC 3461 section 5.2.6).
    pub fn failure(&self) -> bool {
        self.0.is_none() || self.has("FAILURE")
    }

    /// Unasked too (RFC 3461 section 5.2.5).
    pub fn delay(&self) -> bool {
        self.0.is_none() || self.has("DELAY")
    }

    /// The same without the wish to hear of success.
    pub fn without_success(&self) -> Notify {
        let Some(said) = &self.0 else { return Notify(None) };
        let words: Vec<_> = said.split(',').filter(|word| !word.eq_ignore_ascii_case("SUCCESS")).collect();
        Notify(Some(if words.is_empty() { "NEVER".to_owned() } else { words.join(",") }))
    }

    fn has(&self, wanted: &str) -> bool {
        self.0.as_ref().is_some_and(|said| said.split(',').any(|word| word.eq_ignore_ascii_case(wanted)))
    }
}

/// One recipient and what the sender wants to know of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipient {
    pub mailbox: Mailbox,
    pub notify: Notify,
    /// `ORCPT=`, as it was given: `type;xtext` (RFC 3461 section 4.2).
    pub original: Option<String>,
}

impl Recipient {
    /// A recipient of whom nothing special is to be told.
    pub fn plain(mailbox: Mailbox) -> Recipient {
        Recipient { mailbox, notify: Notify::default(), original: None }
    }
}

/// `ORCPT=`: a type of address, and xtext, 500 octets at most (RFC 3461 section 4.2).
pub fn original_recipient(value: &[u8]) -> Option<String> {
    let at = value.iter().position(|octet| *octet == b';')?;
    let (kind, text) = (&value[..at], &value[at + 1..]);
    let atom = |octet: &u8| octet.is_ascii_alphanumeric() || b"!#$%&'*+-/=?^_`{|}~.".contains(octet);
    let good = value.len() <= limits::ORIGINAL_RECIPIENT && !kind.is_empty() && kind.iter().all(atom) && is_xtext(text);
    good.then(|| String::from_utf8_lossy(value).into_owned())
}

/// One command, with an argument that is known to be good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// The domains, none for "all I may have" (RFC 2645 section 5.2.1).
    Atrn(Vec<Domain>),
    Auth {
        mechanism: Vec<u8>,
        initial: Option<Vec<u8>>,
    },
    Bdat {
        size: u64,
        last: bool,
    },
    Data,
    Ehlo(String),
    Helo(String),
    Help,
    Mail(MailFrom),
    Noop,
    Quit,
    /// `utf8`: written with octets above 127.
    Rcpt {
        path: ForwardPath,
        utf8: bool,
        notify: Notify,
        original: Option<String>,
    },
    Rset,
    StartTls,
    Vrfy,
    /// Known by name, spoken by nobody here.
    Other,
}

impl Command {
    /// Parses what follows the verb.
    pub fn parse(verb: Verb, rest: &[u8], offers: ServerExtensions) -> Result<Command, Reply> {
        // RFC 5321 section 4.1.1: white space before the CRLF is tolerated. Not so behind ATRN, whose
        // grammar is RFC 2645's own.
        let argument = rest.strip_prefix(b" ").unwrap_or(rest);
        let trimmed = argument.trim_ascii_end();
        match verb {
            Verb::Atrn => atrn(rest),
            Verb::Auth => auth(trimmed),
            Verb::Bdat => bdat(trimmed),
            Verb::Ehlo => hello(trimmed).map(Command::Ehlo),
            Verb::Helo => hello(trimmed).map(Command::Helo),
            Verb::Mail => mail(trimmed, offers).map(Command::Mail),
            Verb::Rcpt => rcpt(trimmed, offers),
            Verb::Data => alone(trimmed, Command::Data),
            Verb::Quit => alone(trimmed, Command::Quit),
            Verb::Rset => alone(trimmed, Command::Rset),
            Verb::StartTls => alone(trimmed, Command::StartTls),
            Verb::Vrfy if trimmed.is_empty() => Err(argument_error("VRFY needs an address")),
            Verb::Vrfy => Ok(Command::Vrfy),
            Verb::Help => Ok(Command::Help),
            Verb::Noop => Ok(Command::Noop),
            Verb::Etrn | Verb::Expn | Verb::Turn | Verb::Unknown | Verb::Http => Ok(Command::Other),
        }
    }
}

fn argument_error(text: impl Into<Cow<'static, str>>) -> Reply {
    Reply::new(501, "5.5.4", text)
}

/// RFC 5321 section 4.3.2: a command that takes no argument and has one is answered 501.
fn alone(argument: &[u8], command: Command) -> Result<Command, Reply> {
    match argument {
        [] => Ok(command),
        _ => Err(argument_error("This command takes no argument")),
    }
}

/// `"ATRN" [SP domain *("," domain)]`, to the letter (RFC 2645 section 5.2.1).
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
    let mut words = argument.split(|octet| *octet == b' ');
    let mechanism = words.next().filter(|word| !word.is_empty());
    let initial = words.next();
    match (mechanism, words.next()) {
        (Some(mechanism), None) => {
            Ok(Command::Auth { mechanism: mechanism.to_vec(), initial: initial.map(<[u8]>::to_vec) })
        }
        _ => Err(argument_error("Syntax: AUTH mechanism [initial-response]")),
    }
}

/// `BDAT SP chunk-size [SP LAST]` (RFC 3030 section 2).
fn bdat(argument: &[u8]) -> Result<Command, Reply> {
    let mut words = argument.split(|octet| *octet == b' ');
    let size = words.next().and_then(number);
    let last = match (words.next(), words.next()) {
        (None, None) => Some(false),
        (Some(word), None) if word.eq_ignore_ascii_case(b"LAST") => Some(true),
        _ => None,
    };
    match (size, last) {
        (Some(size), Some(last)) => Ok(Command::Bdat { size, last }),
        _ => Err(argument_error("Syntax: BDAT chunk-size [LAST]")),
    }
}

/// The octets a BDAT line announces even where the rest of it is wrong: they follow in any case and
/// must be read away (RFC 3030 section 2). `None`: nobody knows where the next command begins.
pub fn announced_chunk_size(rest: &[u8]) -> Option<u64> {
    rest.trim_ascii().split(|octet| *octet == b' ').next().and_then(number)
}

/// RFC 5321 section 4.1.4: mail is not refused for the name in EHLO, so any printable word will do;
/// U-labels may not stand there (RFC 6531 section 3.3).
fn hello(argument: &[u8]) -> Result<String, Reply> {
    let printable = argument.iter().all(|octet| (b'!'..=b'~').contains(octet));
    match std::str::from_utf8(argument) {
        Ok(name) if printable && (1..=limits::HELLO_NAME).contains(&name.len()) => Ok(name.to_owned()),
        _ => Err(argument_error("Say your host name, or your address in square brackets")),
    }
}

/// Takes the word before a path (`FROM:`, `TO:`) off, with the space that RFC 2645's own example has
/// behind the colon (and that we never send: RFC 5321 section 3.3).
fn after_keyword<'a>(argument: &'a [u8], keyword: &'static str) -> Result<&'a [u8], Reply> {
    let syntax = || argument_error(format!("Syntax: {keyword}<address> [parameters]"));
    let (word, rest) = argument.split_at_checked(keyword.len()).ok_or_else(syntax)?;
    if !word.eq_ignore_ascii_case(keyword.as_bytes()) {
        return Err(syntax());
    }
    let path = rest.trim_ascii_start();
    if path.first() != Some(&b'<') {
        return Err(syntax());
    }
    Ok(path)
}

fn mail(argument: &[u8], offers: ServerExtensions) -> Result<MailFrom, Reply> {
    let input = after_keyword(argument, "FROM:")?;
    let (path, used) = reverse_path(input).map_err(|error| path_error(error, "5.1.7"))?;
    let (mut envelope, mut size) = (Envelope::new(path), None);
    let mut auth = false;
    for parameter in parameters(&input[used..])? {
        let (name, value) = name_and_value(parameter);
        match name.to_ascii_uppercase().as_slice() {
            b"SIZE" if offers.size => {
                once(size.is_none())?;
                size = Some(value.and_then(number).ok_or_else(|| argument_error("Syntax: SIZE=octets"))?);
            }
            b"BODY" if offers.eight_bit => {
                once(envelope.body == Body::Unsaid)?;
                envelope.body = match value.map(<[u8]>::to_ascii_uppercase).as_deref() {
                    Some(b"7BIT") => Body::SevenBit,
                    Some(b"8BITMIME") => Body::EightBit,
                    _ => return Err(argument_error("BODY is 7BIT or 8BITMIME")),
                };
            }
            b"SMTPUTF8" if offers.utf8 => {
                once(!envelope.utf8)?;
                if value.is_some() {
                    return Err(argument_error("SMTPUTF8 takes no value"));
                }
                envelope.utf8 = true;
            }
            b"RET" if offers.dsn => {
                once(envelope.ret.is_none())?;
                envelope.ret = match value.map(<[u8]>::to_ascii_uppercase).as_deref() {
                    Some(b"FULL") => Some(Return::Full),
                    Some(b"HDRS") => Some(Return::Header),
                    _ => return Err(argument_error("RET is FULL or HDRS")),
                };
            }
            b"ENVID" if offers.dsn => {
                once(envelope.envelope_id.is_none())?;
                let text = value.filter(|value| value.len() <= limits::ENVELOPE_ID && is_xtext(value));
                let text = text.ok_or_else(|| argument_error("ENVID is xtext of 100 octets at most"))?;
                envelope.envelope_id = Some(String::from_utf8_lossy(text).into_owned());
            }
            // RFC 4954 section 5: whoever offers AUTH takes AUTH=, and treats it as <> from a peer it
            // does not trust.
            b"AUTH" if offers.auth => {
                once(!auth)?;
                auth = true;
                if !value.is_some_and(|value| value == b"<>" || is_xtext(value)) {
                    return Err(argument_error("Syntax: AUTH=<> or AUTH=xtext"));
                }
            }
            _ => return Err(Reply::new(555, "5.5.4", "MAIL parameter not recognised")),
        }
    }
    // RFC 6531 section 3.5: a UTF-8 address needs the parameter.
    if !envelope.utf8 && !input[..used].is_ascii() {
        return Err(Reply::new(550, "5.6.7", "A UTF-8 address needs the SMTPUTF8 parameter"));
    }
    Ok(MailFrom { envelope, size })
}

fn rcpt(argument: &[u8], offers: ServerExtensions) -> Result<Command, Reply> {
    let input = after_keyword(argument, "TO:")?;
    let (path, used) = forward_path(input).map_err(|error| path_error(error, "5.1.3"))?;
    let mut notify: Option<Notify> = None;
    let mut original = None;
    for parameter in parameters(&input[used..])? {
        let (name, value) = name_and_value(parameter);
        match name.to_ascii_uppercase().as_slice() {
            b"NOTIFY" if offers.dsn => {
                once(notify.is_none())?;
                let said = value.and_then(Notify::parse);
                notify = Some(
                    said.ok_or_else(|| argument_error("NOTIFY is NEVER, or a list of SUCCESS, FAILURE and DELAY"))?,
                );
            }
            b"ORCPT" if offers.dsn => {
                once(original.is_none())?;
                let said = value.and_then(original_recipient);
                original = Some(said.ok_or_else(|| argument_error("Syntax: ORCPT=type;xtext"))?);
            }
            _ => return Err(Reply::new(555, "5.5.4", "RCPT parameter not recognised")),
        }
    }
    let utf8 = !input[..used].is_ascii();
    Ok(Command::Rcpt { path, utf8, notify: notify.unwrap_or_default(), original })
}

fn name_and_value(parameter: &[u8]) -> (&[u8], Option<&[u8]>) {
    match parameter.iter().position(|octet| *octet == b'=') {
        Some(at) => (&parameter[..at], Some(&parameter[at + 1..])),
        None => (parameter, None),
    }
}

fn once(free: bool) -> Result<(), Reply> {
    if free { Ok(()) } else { Err(argument_error("A parameter stands there twice")) }
}

/// The words behind a path; at least one space must stand before each.
fn parameters(rest: &[u8]) -> Result<impl Iterator<Item = &[u8]>, Reply> {
    if !rest.is_empty() && rest[0] != b' ' {
        return Err(argument_error("A space must follow the address"));
    }
    Ok(rest.split(|octet| *octet == b' ').filter(|word| !word.is_empty()))
}

fn path_error(error: PathError, enhanced: &'static str) -> Reply {
    match error {
        PathError::Syntax => Reply::new(501, enhanced, "The address is not written as RFC 5321 section 4.1.2 says"),
        PathError::TooLong => Reply::new(501, enhanced, "The address is too long"),
        PathError::BadDomain => Reply::new(501, enhanced, "The domain is made of letters, digits and hyphens only"),
        PathError::NotUtf8 => Reply::new(501, enhanced, "The address is neither ASCII nor UTF-8"),
    }
}

/// 1 to 20 digits; more than fits is as much as fits (RFC 1870 section 6).
fn number(digits: &[u8]) -> Option<u64> {
    if !(1..=20).contains(&digits.len()) || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    Some(digits.iter().fold(0u64, |sum, digit| sum.saturating_mul(10).saturating_add(u64::from(digit - b'0'))))
}

/// RFC 3461 section 4: printable ASCII without `+` and `=`, or `+HH` in upper case; or `<>`.
pub fn is_xtext(value: &[u8]) -> bool {
    let mut octets = value.iter();
    while let Some(octet) = octets.next() {
        let hex = |octet: Option<&u8>| octet.is_some_and(|octet| matches!(octet, b'0'..=b'9' | b'A'..=b'F'));
        let good = match octet {
            b'+' => hex(octets.next()) && hex(octets.next()),
            b'=' => false,
            other => (b'!'..=b'~').contains(other),
        };
        if !good {
            return false;
        }
    }
    !value.is_empty()
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
        parse(line).err().map_or(0, |reply| reply.code())
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
    fn the_other_commands() {
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
            ("RCPT TO:<a@b_c.example>", 501),
            ("RCPT TO:<@x.example,@y.example:a@b.example>", 0),
        ] {
            assert_eq!(code(line), wanted, "{line:?}");
        }
        assert!(Verb::of(b"RCPT TO:<a@b.c>\nDATA").is_err());
        assert_eq!(Verb::of(b"sAmL x").map(|found| found.0), Ok(Verb::Turn));
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
