//! The `Received` field, written and read (RFC 5321 section 4.4, RFC 3848).
//!
//! ```text
//! Received: from mx.example.net ([192.0.2.1])
//!  by relay.example.net with ESMTPS (TLSv1.3 TLS_AES_256_GCM_SHA384)
//!  id 1j14… for <alice@example.org>;
//!  Fri, 02 Jan 2026 03:04:05 +0000
//! ```

use core::net::IpAddr;

use super::address::{Host, Mailbox, parse_literal};

/// The parts of a `Received` field, from the session in which a message arrives.
#[derive(Clone, Debug)]
pub struct Received<'a> {
    /// The name of the client in EHLO or HELO; `None`: it has sent neither.
    pub helo: Option<&'a str>,
    /// The client used EHLO.
    pub extended: bool,
    /// The client's address as a literal, or the user on this machine that submits the message.
    pub peer: &'a str,
    /// The name of this host.
    pub by: &'a str,
    /// The client used SMTPUTF8 (RFC 6531).
    pub utf8: bool,
    /// TLS version and cipher; `None`: the connection is in clear.
    pub tls: Option<&'a str>,
    /// The client has authenticated.
    pub authenticated: bool,
    /// The only recipient; `None` if there are several, because the field would disclose them to each other (RFC 5321 section
    /// 7.2).
    pub recipient: Option<&'a Mailbox>,
}

impl Received<'_> {
    /// The field with LF line ends. `id`: the id of the message here; `date`: in the form of RFC 5322 section 3.3.
    pub fn field(&self, id: &str, date: &str) -> String {
        // A name that is neither a domain nor an address literal would break the field's grammar.
        let name = self.helo.filter(|name| Host::parse(name).is_some()).unwrap_or("unknown");
        // S for TLS and A for AUTH are defined for ESMTP only. After a turn there is no A: the provider, which is the SMTP
        // client then, has not authenticated (RFC 3848, RFC 4954 section 7, RFC 6531 section 4.3).
        let (protocol, s, a) = match (self.utf8, self.extended) {
            (false, false) => ("SMTP", false, false),
            (utf8, _) => (if utf8 { "UTF8SMTP" } else { "ESMTP" }, self.tls.is_some(), self.authenticated),
        };
        let (s, a) = (if s { "S" } else { "" }, if a { "A" } else { "" });
        let tls = self.tls.map_or(String::new(), |tls| format!(" ({tls})"));
        let recipient = match self.recipient {
            Some(mailbox) if self.utf8 || mailbox.is_ascii() => format!(" for <{}>", mailbox.header_form()),
            _ => String::new(),
        };
        let (peer, by) = (self.peer, self.by);
        format!(
            "Received: from {name} ({peer})\n\tby {by} with {protocol}{s}{a}{tls}\n\tid {id}{recipient};\n\t{date}\n"
        )
    }
}

/// The client that has sent a message to the host before us, for the filters of a next hop (XCLIENT and XFORWARD, as Postfix
/// documents them).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientInfo {
    pub address: IpAddr,
    /// Its name in EHLO or HELO.
    pub helo: Option<String>,
    /// It used EHLO.
    pub extended: bool,
}

impl ClientInfo {
    /// Reads the topmost `Received` field: `from <EHLO name> (<name> [<address>]) by <by> with ESMTP`. `value`: the field's
    /// text after the colon; `by`: the host before us.
    ///
    /// Returns `None` if `by` has not written the field, because a sender can forge the fields of other hosts.
    pub fn parse(value: &str, by: &str) -> Option<ClientInfo> {
        let words: Vec<_> = value.split_ascii_whitespace().collect();
        let at = words.windows(2).position(|pair| pair[0] == "by" && pair[1].eq_ignore_ascii_case(by))?;
        let (from, rest) = (words.get(..at)?, &words[at..]);
        let name = *from.get(1).filter(|_| from[0] == "from")?;
        // A client may send an address as its name, so only the address in the comment after the name counts. Exim writes
        // the name into the comment if it is not the host name: `from host ([192.0.2.1] helo=name)`, or, if there is no
        // host name, `from [192.0.2.1] (helo=name)`.
        let end = from.iter().skip(2).position(|word| word.ends_with(')'))?;
        let comment = from.get(2..3 + end)?;
        let named = |word: &&str| word.trim_start_matches('(').strip_prefix("helo=").map(str::to_owned);
        let helo = comment.iter().find_map(named);
        let literal = |word: &&str| Some(word.trim_end_matches(')').split_once('[')?.1.to_owned());
        let written = comment.iter().filter(|word| named(word).is_none()).find_map(literal);
        let literal = written.or_else(|| helo.is_some().then(|| literal(&name)).flatten())?;
        let literal = literal.strip_suffix(']')?;
        let address = parse_literal(literal).or_else(|| literal.parse().ok())?;
        let name = helo.as_deref().map_or(name, |helo| helo.trim_end_matches(')'));
        let protocol = rest.windows(2).find(|pair| pair[0] == "with").map_or("", |pair| pair[1]);
        Some(ClientInfo {
            address: address.to_canonical(),
            helo: (name != "unknown").then(|| name.to_owned()),
            extended: protocol.trim_end_matches(';') != "SMTP",
        })
    }
}
