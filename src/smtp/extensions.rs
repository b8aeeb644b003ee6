//! Service extensions: those that our server offers in its reply to EHLO, and those that a peer offers (RFC 5321 section
//! 4.1.1.1).

use super::reply::Reply;
use crate::sasl::Mechanism;

/// The extensions whose parameters our server accepts with MAIL and RCPT.
#[derive(Clone, Copy, Debug, Default)]
pub struct ServerExtensions {
    pub size: bool,
    pub eight_bit: bool,
    pub utf8: bool,
    pub auth: bool,
    pub dsn: bool,
}

/// The extensions in the peer's reply to the last EHLO. They do not outlive STARTTLS or the turn.
#[derive(Clone, Debug, Default)]
pub struct PeerExtensions {
    pub pipelining: bool,
    /// The octets of the largest message; `Some(0)`: SIZE is offered without a limit (RFC 1870 section 3).
    pub size: Option<u64>,
    pub eight_bit: bool,
    pub utf8: bool,
    pub chunking: bool,
    pub dsn: bool,
    pub starttls: bool,
    pub atrn: bool,
    pub auth: bool,
    /// The mechanisms that this program knows.
    pub mechanisms: Vec<Mechanism>,
    /// The attributes of XCLIENT and of XFORWARD, as Postfix documents them; empty: the command is not offered.
    pub xclient: Vec<String>,
    pub xforward: Vec<String>,
    pub limits: PeerLimits,
}

/// What the peer permits at most (RFC 9422 section 4); `None`: it does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerLimits {
    /// MAILMAX: MAIL commands in a session.
    pub mails: Option<usize>,
    /// RCPTMAX: RCPT commands in a transaction.
    pub recipients: Option<usize>,
    /// RCPTDOMAINMAX: different domains of recipients in a session.
    pub domains: Option<usize>,
}

impl PeerLimits {
    fn parse<'a>(words: impl Iterator<Item = &'a str>) -> PeerLimits {
        let mut limits = PeerLimits::default();
        for (name, value) in words.filter_map(|word| word.split_once('=')) {
            let limit = match name.to_ascii_uppercase().as_str() {
                "MAILMAX" => &mut limits.mails,
                "RCPTMAX" => &mut limits.recipients,
                "RCPTDOMAINMAX" => &mut limits.domains,
                _ => continue,
            };
            // RFC 9422 section 3: one to six digits, the first of them not 0; other values are ignored.
            let digits = value.bytes().all(|octet| octet.is_ascii_digit()) && !value.starts_with('0');
            *limit = value.parse().ok().filter(|_| digits && value.len() <= 6);
        }
        limits
    }
}

impl PeerExtensions {
    /// Parses the reply to EHLO; unknown keywords are ignored.
    pub fn parse(reply: &Reply) -> PeerExtensions {
        let mut offered = PeerExtensions::default();
        for line in reply.lines().skip(1) {
            let mut words = line.split_ascii_whitespace();
            match words.next().map(str::to_ascii_uppercase).as_deref() {
                Some("PIPELINING") => offered.pipelining = true,
                Some("SIZE") => {
                    offered.size = Some(words.next().and_then(|number| number.parse().ok()).unwrap_or(0));
                }
                Some("8BITMIME") => offered.eight_bit = true,
                Some("SMTPUTF8") => offered.utf8 = true,
                Some("CHUNKING") => offered.chunking = true,
                Some("DSN") => offered.dsn = true,
                Some("STARTTLS") => offered.starttls = true,
                Some("ATRN") => offered.atrn = true,
                Some("LIMITS") => offered.limits = PeerLimits::parse(words),
                Some("XCLIENT") => offered.xclient = words.map(str::to_ascii_uppercase).collect(),
                Some("XFORWARD") => offered.xforward = words.map(str::to_ascii_uppercase).collect(),
                Some("AUTH") => {
                    offered.auth = true;
                    offered.mechanisms.extend(words.filter_map(|word| Mechanism::parse(word.as_bytes())));
                }
                _ => {}
            }
        }
        offered
    }
}
