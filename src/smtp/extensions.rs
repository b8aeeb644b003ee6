//! Service extensions: what a server offers with EHLO, and what a client reads of it (RFC 5321 section 4.1.1.1).

use super::reply::Reply;
use crate::sasl::Mechanism;

/// The extensions that decide which parameters our server accepts with MAIL and RCPT.
#[derive(Clone, Copy, Debug, Default)]
pub struct ServerExtensions {
    pub size: bool,
    pub eight_bit: bool,
    pub utf8: bool,
    pub auth: bool,
    pub dsn: bool,
}

/// What the peer offered with its last EHLO. Neither TLS nor the turn keeps any of it.
#[derive(Clone, Debug, Default)]
pub struct PeerExtensions {
    pub pipelining: bool,
    /// `Some(0)`: offered without a limit (RFC 1870 section 4).
    pub size: Option<u64>,
    pub eight_bit: bool,
    pub utf8: bool,
    pub chunking: bool,
    pub dsn: bool,
    pub starttls: bool,
    pub atrn: bool,
    pub auth: bool,
    pub mechanisms: Vec<Mechanism>,
    /// The attributes that XCLIENT or XFORWARD may carry, as Postfix documents them.
    pub xclient: Vec<String>,
    pub xforward: Vec<String>,
}

impl PeerExtensions {
    /// Reads the lines of an EHLO reply; unknown keywords are ignored.
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
