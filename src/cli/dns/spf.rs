//! SPF (RFC 7208): whether a domain lets an address send its mail. Everything is evaluated but `ptr` and macros.

use std::net::IpAddr;

use crate::mail::address::Domain;
use crate::net::resolver::{Answer, Record, ResolveError, Rtype};

/// Asks a name server for the records of one type.
pub(super) type AskDns<'a> = dyn Fn(&Domain, Rtype) -> Result<Answer, ResolveError> + 'a;

/// RFC 7208 section 4.6.4: terms that cause lookups, those of them that find nothing, and hosts of one `mx`.
const LOOKUP_LIMIT: usize = 10;
const VOID_LIMIT: usize = 2;
const MX_LIMIT: usize = 10;

/// The result for a receiver (RFC 7208 section 2.6).
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum SpfResult {
    /// The domain has no SPF record.
    None,
    Neutral,
    Pass,
    SoftFail,
    Fail,
    TempError(String),
    PermError(String),
    /// It depends on a part of the record that this module does not evaluate.
    NotEvaluated(String),
}

/// The SPF records among the texts of a name, as they are (RFC 7208 section 4.5).
pub(super) fn spf_texts(records: &[Record]) -> Vec<&[u8]> {
    let version = |text: &[u8]| text.get(..6).is_some_and(|start| start.eq_ignore_ascii_case(b"v=spf1"));
    let is_spf = |text: &&[u8]| version(text) && matches!(text.get(6), None | Some(b' '));
    let texts = records.iter().filter_map(|record| match record {
        Record::Text(text) => Some(&**text),
        _ => None,
    });
    texts.filter(is_spf).collect()
}

/// Evaluates check_host() of RFC 7208 section 4 for mail of `domain` from `address`.
pub(super) fn check_spf(domain: &Domain, address: IpAddr, ask: &AskDns) -> SpfResult {
    let mut check = SpfCheck { address: address.to_canonical(), ask, lookups: 0, void: 0 };
    check.check_host(domain).unwrap_or_else(|stopped| stopped)
}

struct SpfCheck<'a> {
    address: IpAddr,
    ask: &'a AskDns<'a>,
    lookups: usize,
    void: usize,
}

/// `Err`: the whole evaluation ends with this result, also in records that include this one.
type Step<T> = Result<T, SpfResult>;

impl SpfCheck<'_> {
    /// The result for a domain. [`LOOKUP_LIMIT`] ends the recursion of records that include themselves.
    fn check_host(&mut self, domain: &Domain) -> Step<SpfResult> {
        let records = self.records(domain, Rtype::TXT)?;
        let text = match spf_texts(&records)[..] {
            [] => return Ok(SpfResult::None),
            [text] => text,
            ref texts => {
                let text = format!("{domain} has {} SPF records (RFC 7208 section 3.2)", texts.len());
                return Err(SpfResult::PermError(text));
            }
        };
        let record = SpfRecord::parse(text);
        let record = record.map_err(|term| SpfResult::PermError(format!("{domain}: {term:?} is not valid in SPF")))?;
        for (result, term) in record.directives {
            if self.matches(domain, &term)? {
                return Ok(result);
            }
        }
        let Some(target) = record.redirect else { return Ok(SpfResult::Neutral) };
        self.count_lookup()?;
        let target = plain_name(&target)?;
        match self.check_host(&target)? {
            // RFC 7208 section 6.1.
            SpfResult::None => Err(SpfResult::PermError(format!("{domain}: {target} has no SPF record"))),
            result => Ok(result),
        }
    }

    /// Whether a mechanism matches (RFC 7208 section 5).
    fn matches(&mut self, domain: &Domain, term: &SpfTerm) -> Step<bool> {
        match term {
            SpfTerm::All => return Ok(true),
            SpfTerm::Network(network, length) => return Ok(is_within(self.address, *network, *length)),
            _ => self.count_lookup()?,
        }
        let target = |name: &Option<String>| name.as_ref().map_or_else(|| Ok(domain.clone()), |name| plain_name(name));
        match term {
            SpfTerm::Include(name) => {
                let included = plain_name(name)?;
                match self.check_host(&included)? {
                    // RFC 7208 section 5.2.
                    SpfResult::None => Err(SpfResult::PermError(format!("{domain}: {included} has no SPF record"))),
                    result => Ok(result == SpfResult::Pass),
                }
            }
            SpfTerm::A(name, lengths) => self.has_address(&target(name)?, *lengths, true),
            SpfTerm::Mx(name, lengths) => {
                let target = target(name)?;
                let hosts = self.records(&target, Rtype::MX)?;
                self.count_void(hosts.is_empty())?;
                if hosts.len() > MX_LIMIT {
                    return Err(SpfResult::PermError(format!("{target} has more than {MX_LIMIT} MX records")));
                }
                for host in &hosts {
                    if let Record::Exchange(_, host) = host
                        && let Some(host) = Domain::of_dns(&host.to_string())
                        && self.has_address(&host, *lengths, false)?
                    {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
            SpfTerm::Exists(name) => {
                let found = self.records(&plain_name(name)?, Rtype::A)?;
                self.count_void(found.is_empty())?;
                Ok(!found.is_empty())
            }
            // RFC 7208 section 5.5 advises against it.
            SpfTerm::Ptr => Err(SpfResult::NotEvaluated("`ptr`".to_owned())),
            SpfTerm::All | SpfTerm::Network(..) => Ok(false),
        }
    }

    /// Whether the address is one of a host, or in a network with one. `counts`: an answer without addresses counts.
    fn has_address(&mut self, host: &Domain, (v4, v6): (u8, u8), counts: bool) -> Step<bool> {
        let (kind, length) = if self.address.is_ipv4() { (Rtype::A, v4) } else { (Rtype::AAAA, v6) };
        let found = self.records(host, kind)?;
        self.count_void(counts && found.is_empty())?;
        let is_near = |record: &Record| match record {
            Record::Address(found) => is_within(self.address, *found, length),
            _ => false,
        };
        Ok(found.iter().any(is_near))
    }

    fn records(&self, name: &Domain, kind: Rtype) -> Step<Vec<Record>> {
        match (self.ask)(name, kind) {
            Ok(Answer::Records(records)) => Ok(records),
            Ok(Answer::NoRecords | Answer::NoName) => Ok(Vec::new()),
            Err(error) => Err(SpfResult::TempError(error.text)),
        }
    }

    fn count_lookup(&mut self) -> Step<()> {
        self.lookups += 1;
        match self.lookups {
            ..=LOOKUP_LIMIT => Ok(()),
            _ => Err(SpfResult::PermError(format!(
                "the record causes more than {LOOKUP_LIMIT} lookups (RFC 7208 section 4.6.4)"
            ))),
        }
    }

    fn count_void(&mut self, void: bool) -> Step<()> {
        self.void += usize::from(void);
        match self.void {
            ..=VOID_LIMIT => Ok(()),
            _ => Err(SpfResult::PermError(format!(
                "more than {VOID_LIMIT} lookups of the record find nothing (RFC 7208 section 4.6.4)"
            ))),
        }
    }
}

/// A name without macros.
fn plain_name(name: &str) -> Step<Domain> {
    match Domain::of_dns(name.strip_suffix('.').unwrap_or(name)).filter(|_| !name.contains('%')) {
        Some(domain) => Ok(domain),
        None => Err(SpfResult::NotEvaluated(format!("the macro in {name:?}"))),
    }
}

/// Whether two addresses have the same first `length` bits.
fn is_within(address: IpAddr, network: IpAddr, length: u8) -> bool {
    let length = u32::from(length);
    match (address, network) {
        (IpAddr::V4(one), IpAddr::V4(other)) => {
            (one.to_bits() ^ other.to_bits()).checked_shr(32_u32.saturating_sub(length)).unwrap_or(0) == 0
        }
        (IpAddr::V6(one), IpAddr::V6(other)) => {
            (one.to_bits() ^ other.to_bits()).checked_shr(128_u32.saturating_sub(length)).unwrap_or(0) == 0
        }
        _ => false,
    }
}

/// A record, in its parts (RFC 7208 section 4.6.1).
struct SpfRecord {
    /// The mechanisms, each with the result if it matches.
    directives: Vec<(SpfResult, SpfTerm)>,
    redirect: Option<String>,
}

/// A mechanism. The lengths are those of the networks of IPv4 and IPv6.
enum SpfTerm {
    All,
    Include(String),
    A(Option<String>, (u8, u8)),
    Mx(Option<String>, (u8, u8)),
    Ptr,
    Network(IpAddr, u8),
    Exists(String),
}

impl SpfRecord {
    /// Parses all of a record: one mistake anywhere makes it useless (RFC 7208 section 4.6).
    ///
    /// # Errors
    ///
    /// The term with the mistake.
    fn parse(text: &[u8]) -> Result<SpfRecord, String> {
        let is_plain = text.iter().all(|octet| (b' '..=b'~').contains(octet));
        let text = str::from_utf8(text).ok().filter(|_| is_plain);
        let text = text.ok_or_else(|| String::from("a character that is not printable ASCII"))?;
        let mut record = SpfRecord { directives: Vec::new(), redirect: None };
        let mut explained = false;
        for term in text.split(' ').skip(1).filter(|term| !term.is_empty()) {
            let wrong = || term.to_owned();
            match term.find(['=', ':', '/']) {
                Some(at) if term[at..].starts_with('=') => {
                    let (name, value) = (term[..at].to_ascii_lowercase(), &term[at + 1..]);
                    let in_name = |octet: u8| octet.is_ascii_alphanumeric() || b"-_.".contains(&octet);
                    let is_wrong = match name.as_str() {
                        "redirect" => record.redirect.replace(name_of(value).ok_or_else(wrong)?).is_some(),
                        "exp" => std::mem::replace(&mut explained, true) || name_of(value).is_none(),
                        _ => !name.starts_with(|first: char| first.is_ascii_alphabetic()) || !name.bytes().all(in_name),
                    };
                    if is_wrong {
                        return Err(wrong());
                    }
                }
                _ => record.directives.push(directive(term).ok_or_else(wrong)?),
            }
        }
        Ok(record)
    }
}

fn directive(term: &str) -> Option<(SpfResult, SpfTerm)> {
    let (result, term) = match term.as_bytes().first()? {
        b'+' => (SpfResult::Pass, &term[1..]),
        b'-' => (SpfResult::Fail, &term[1..]),
        b'~' => (SpfResult::SoftFail, &term[1..]),
        b'?' => (SpfResult::Neutral, &term[1..]),
        _ => (SpfResult::Pass, term),
    };
    let (name, rest) = term.split_at(term.find([':', '/']).unwrap_or(term.len()));
    let value = rest.strip_prefix(':');
    let term = match (name.to_ascii_lowercase().as_str(), value) {
        ("all", None) if rest.is_empty() => SpfTerm::All,
        ("include", Some(value)) => SpfTerm::Include(name_of(value)?),
        ("exists", Some(value)) => SpfTerm::Exists(name_of(value)?),
        ("ptr", None) if rest.is_empty() => SpfTerm::Ptr,
        ("ptr", Some(value)) => name_of(value).map(|_| SpfTerm::Ptr)?,
        ("a", _) => host_and_lengths(rest).map(|(host, lengths)| SpfTerm::A(host, lengths))?,
        ("mx", _) => host_and_lengths(rest).map(|(host, lengths)| SpfTerm::Mx(host, lengths))?,
        (family @ ("ip4" | "ip6"), Some(value)) => {
            let (address, length) = value.split_once('/').map_or((value, None), |(at, length)| (at, Some(length)));
            let address: IpAddr = address.parse().ok().filter(|at: &IpAddr| at.is_ipv4() == (family == "ip4"))?;
            let most = if address.is_ipv4() { 32 } else { 128 };
            SpfTerm::Network(address, length.map_or(Some(most), |length| prefix_length(length, most))?)
        }
        _ => return None,
    };
    Some((result, term))
}

/// `[:name][/length][//length]` (RFC 7208 section 5.6).
fn host_and_lengths(rest: &str) -> Option<(Option<String>, (u8, u8))> {
    // A macro may have a slash between its braces.
    let braces = rest.rfind('}').unwrap_or(0);
    let (host, lengths) = rest.split_at(rest[braces..].find('/').map_or(rest.len(), |at| braces + at));
    let (v4, v6) = lengths.split_once("//").map_or((lengths, None), |(v4, v6)| (v4, Some(v6)));
    let v4 = if v4.is_empty() { Some(32) } else { prefix_length(v4.strip_prefix('/')?, 32) };
    let v6 = v6.map_or(Some(128), |v6| prefix_length(v6, 128));
    let host = if host.is_empty() { None } else { Some(name_of(host.strip_prefix(':')?)?) };
    Some((host, (v4?, v6?)))
}

/// Without a sign and without zeros before it (RFC 7208 section 5.6).
fn prefix_length(text: &str, most: u8) -> Option<u8> {
    text.parse().ok().filter(|length: &u8| *length <= most && length.to_string() == text)
}

/// The `domain-spec` of RFC 7208 section 7.1: macros, or a name with a dot whose last label, `toplabel`, is one of a host and
/// not a number.
fn name_of(text: &str) -> Option<String> {
    let last = text.strip_suffix('.').unwrap_or(text).rsplit_once('.').map_or("", |(_, last)| last).as_bytes();
    let is_name = last.iter().all(|octet| octet.is_ascii_alphanumeric() || *octet == b'-')
        && !last.iter().all(u8::is_ascii_digit)
        && !(last.starts_with(b"-") || last.ends_with(b"-"));
    (text.contains('%') || is_name).then(|| text.to_owned())
}

#[cfg(test)]
mod tests;
