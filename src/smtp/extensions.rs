//! Service extensions: those of our server, and those that a peer offers in its reply to EHLO (RFC 5321 section 4.1.1.1).

use super::limits;
use super::reply::Reply;
use crate::mail::address::Domain;
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

/// The extensions in the peer's reply to the last EHLO. STARTTLS (RFC 3207 section 4.2) and the turn discard them.
#[derive(Clone, Debug, Default)]
pub struct PeerExtensions {
    pub pipelining: bool,
    /// The largest message, in octets on the wire; `Some(0)`: the peer offers SIZE without a limit (RFC 1870 section
    /// 4).
    pub size: Option<u64>,
    pub eight_bit: bool,
    pub utf8: bool,
    pub chunking: bool,
    pub dsn: bool,
    pub starttls: bool,
    pub atrn: bool,
    pub auth: bool,
    /// The mechanisms in AUTH that this program knows.
    pub mechanisms: Vec<Mechanism>,
    /// The attributes of XCLIENT and of XFORWARD, as Postfix documents them; empty: the peer does not offer the command.
    pub xclient: Vec<String>,
    pub xforward: Vec<String>,
    pub limits: PeerLimits,
    /// The domains of our account, if the peer is a provider that lists them (XDOMAINS).
    pub domains: Option<AccountDomains>,
}

/// The domains of an account, in the lines `XDOMAINS example.org example.com` of a provider that runs this program.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AccountDomains {
    pub names: Vec<String>,
    /// The account has more domains than the lines.
    pub has_more: bool,
}

/// The keyword of the lines with the domains of an account. It begins with X because no RFC defines it (RFC 5321 section
/// 4.1.1.1).
const DOMAINS_KEYWORD: &str = "XDOMAINS";

/// The last word of these lines if the account has more domains.
const MORE_DOMAINS: &str = "...";

/// The most of these lines: the client stores [`limits::STORED_REPLY_LINES`] lines of a reply, and needs those of the
/// extensions too.
const MOST_DOMAIN_LINES: usize = limits::STORED_REPLY_LINES / 2;

/// The lines that list the domains of an account in the reply to EHLO.
pub fn domain_lines(domains: &[Domain]) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for domain in domains {
        let more = domain.as_str().len() + " ".len() + MORE_DOMAINS.len() + " ".len();
        let is_last = lines.len() == MOST_DOMAIN_LINES;
        match lines.last_mut() {
            Some(line) if line.len() + more <= limits::REPLY_TEXT => *line += &format!(" {domain}"),
            Some(line) if is_last => {
                *line += &format!(" {MORE_DOMAINS}");
                break;
            }
            _ => lines.push(format!("{DOMAINS_KEYWORD} {domain}")),
        }
    }
    lines
}

/// The limits that the peer announces (RFC 9422 section 4); `None`: it announces none.
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
            // RFC 9422 section 4: one to six digits, the first of them not 0; other values are ignored.
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
                Some(DOMAINS_KEYWORD) => {
                    let domains = offered.domains.get_or_insert_default();
                    for word in words {
                        match word {
                            MORE_DOMAINS => domains.has_more = true,
                            name => domains.names.push(name.to_ascii_lowercase()),
                        }
                    }
                }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The customer reads the domains that the provider lists, also if there are too many for the reply.
    #[test]
    fn the_domains_of_an_account_are_listed_and_read() {
        let listed = |count: usize| {
            let name = |number| Domain::parse(&format!("customer-{number}.example.org")).unwrap();
            let domains: Vec<_> = (0..count).map(name).collect();
            let lines = domain_lines(&domains);
            assert!(lines.iter().all(|line| line.len() <= limits::REPLY_TEXT));
            let reply = lines.into_iter().fold(Reply::bare(250, "relay.example.net"), Reply::with_line);
            let read = PeerExtensions::parse(&reply).domains;
            (domains.iter().map(|domain| domain.as_str().to_owned()).collect::<Vec<_>>(), read)
        };
        assert_eq!(listed(0).1, None);
        for count in [1, 2, 100, 500] {
            let (names, read) = listed(count);
            assert_eq!(read, Some(AccountDomains { names, has_more: false }), "{count}");
        }
        let (names, read) = listed(10_000);
        let read = read.unwrap();
        assert!(read.has_more && names.starts_with(&read.names) && read.names.len() > 500, "{}", read.names.len());
    }
}
