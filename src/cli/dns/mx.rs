//! Judges the MX records of a domain (RFC 5321 section 5.1).

use std::net::IpAddr;

use super::finding::{DnsFinding, DnsVerdict, listed, mx_line};
use crate::mail::address::Domain;
use crate::net::resolver::address_for_name;

/// Problems of one domain that are reported.
const PROBLEM_LIMIT: usize = 5;

/// The hosts that receive the mail of a domain, by its records.
#[derive(Debug)]
pub(super) enum MxFacts {
    /// The lookup failed, for this reason.
    Failed(String),
    NoDomain,
    /// No MX record; the addresses of the domain itself.
    NoRecords(Vec<IpAddr>),
    Hosts(Vec<MxFact>),
}

/// One MX record, and what is known about its host.
#[derive(Debug)]
pub(super) struct MxFact {
    pub preference: u16,
    /// `None`: the root, `.`.
    pub host: Option<Domain>,
    /// The name that it is an alias of.
    pub alias: Option<Domain>,
    /// `None`: the lookup failed.
    pub addresses: Option<Vec<IpAddr>>,
}

/// The host that should receive the mail.
pub(super) struct ExpectedHost<'a> {
    pub host: &'a Domain,
    pub addresses: &'a [IpAddr],
    /// Whether the MX record must have this name. A customer knows only the name that it calls, and not its provider's MX.
    pub is_certain: bool,
}

impl ExpectedHost<'_> {
    /// The verdict if the mail goes to other hosts: while no address of this host is known, they may be this host.
    fn of_others(&self) -> DnsVerdict {
        if self.addresses.is_empty() { DnsVerdict::Warning } else { DnsVerdict::Error }
    }

    /// These words, and its name.
    fn named(&self, words: &str) -> String {
        let unknown = if self.addresses.is_empty() { ", whose addresses are not known" } else { "" };
        format!("{words}{}{unknown}", self.host)
    }
}

/// Judges the MX records of `domain`.
pub(super) fn judge_mx(domain: &Domain, expected: &ExpectedHost<'_>, facts: &MxFacts) -> DnsFinding {
    let host = expected.host;
    let should = vec![mx_line(domain, 10, Some(host))];
    let found = |verdict, text: &str| DnsFinding::new(verdict, "MX", text);
    let wrong = |text| found(DnsVerdict::Error, text).with(Vec::new(), should.clone());
    match facts {
        MxFacts::Failed(text) => found(DnsVerdict::Warning, text).with(Vec::new(), should),
        MxFacts::NoDomain => wrong("the domain does not exist (NXDOMAIN), so it cannot receive mail"),
        MxFacts::NoRecords(addresses) if addresses.is_empty() => {
            wrong("there is neither an MX record nor an address of the domain: it cannot receive mail")
        }
        MxFacts::NoRecords(addresses) => {
            let (verdict, end) = match addresses.iter().all(|address| expected.addresses.contains(address)) {
                true => (DnsVerdict::Warning, format!("that of {host}: name it in an MX record, as it may move")),
                false => (expected.of_others(), expected.named("and not to ")),
            };
            let to = listed(&mut addresses.iter().map(|address| address as _));
            let text = format!(
                "there is no MX record, so mail goes to the address of the domain (RFC 5321 section 5.1), {to}, {end}"
            );
            found(verdict, &text).with(Vec::new(), should)
        }
        MxFacts::Hosts(records) => {
            let is: Vec<_> =
                records.iter().map(|record| mx_line(domain, record.preference, record.host.as_ref())).collect();
            let problems = problems(expected, records);
            match problems.iter().map(|(verdict, _)| *verdict).max() {
                None => found(DnsVerdict::Good, &listed(&mut is.iter().map(|line| line as _))),
                Some(verdict) => {
                    let texts: Vec<_> = problems.into_iter().map(|(_, text)| text).collect();
                    found(verdict, &texts.join("; ")).with(is, should)
                }
            }
        }
    }
}

/// The problems of the records, the worst first.
fn problems(expected: &ExpectedHost<'_>, records: &[MxFact]) -> Vec<(DnsVerdict, String)> {
    use DnsVerdict::{Error, Warning};
    let host = expected.host;
    if records.iter().all(|record| record.host.is_none()) {
        return vec![(Error, "this is a null MX: the domain accepts no mail at all (RFC 7505)".to_owned())];
    }
    let (mut problems, mut warnings) = (Vec::new(), Vec::new());
    let best = records.iter().filter(|record| leads_to(record, expected)).map(|record| record.preference).min();
    for record in records {
        let Some(name) = &record.host else {
            problems
                .push((Error, "\".\" and other records exclude each other: remove it (RFC 7505 section 3)".to_owned()));
            continue;
        };
        if address_for_name(name).is_some() {
            let text =
                "is an address, and an MX record names a host: many senders cannot use it (RFC 5321 section 5.1)";
            problems.push((Error, format!("{name} {text}")));
        } else if let Some(target) = &record.alias {
            let text = "which an MX record must not name (RFC 5321 section 5.1, RFC 2181 section 10.3)";
            problems.push((Error, format!("{name} is an alias (CNAME) of {target}, {text}")));
        } else if record.addresses.as_ref().is_some_and(Vec::is_empty) && name != host {
            warnings.push((Warning, format!("{name} has no address: remove it")));
        } else if leads_to(record, expected) {
            if name != host && expected.is_certain {
                warnings.push((Warning, format!("{name} is {host} by its address: name {host}, as it may move")));
            }
        } else if let Some(best) = best {
            let text = match record.preference.cmp(&best) {
                std::cmp::Ordering::Less => format!("{name} gets the mail first, {host} only while {name} is down"),
                std::cmp::Ordering::Equal => {
                    format!("{name} gets about half of the mail, and must send it on to {host}")
                }
                std::cmp::Ordering::Greater => {
                    format!("{name} gets the mail while {host} is down, and must send it on to {host}")
                }
            };
            warnings.push((Warning, text));
        }
    }
    if best.is_none() {
        let others = listed(&mut records.iter().filter_map(|record| record.host.as_ref()).map(|name| name as _));
        if expected.is_certain {
            let text = format!("the mail goes to {others}{}", expected.named(", and none to "));
            problems.push((expected.of_others(), text));
        } else {
            let text =
                format!("{others} must be the mail host of your provider, which you call at {host}: ask its operator");
            warnings.push((Warning, text));
        }
    }
    problems.append(&mut warnings);
    // The domain may belong to an attacker, and have thousands of records.
    problems.truncate(PROBLEM_LIMIT);
    problems
}

/// Whether mail for the host of a record arrives at the expected one.
fn leads_to(record: &MxFact, expected: &ExpectedHost<'_>) -> bool {
    let by_address = record.addresses.as_ref().is_some_and(|addresses| {
        !addresses.is_empty() && addresses.iter().all(|address| expected.addresses.contains(address))
    });
    by_address || [&record.host, &record.alias].into_iter().any(|name| name.as_ref() == Some(expected.host))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// "preference host addresses": `=` are those of the expected host, `-` none, `?` unknown; `host>target` is an alias.
    fn fact(text: &str) -> MxFact {
        let words: Vec<&str> = text.split(' ').collect();
        let (host, alias) = words[1].split_once('>').map_or((words[1], None), |(host, target)| (host, Some(target)));
        let addresses = match words[2] {
            "=" => Some(vec!["192.0.2.1".parse().unwrap()]),
            "-" => Some(Vec::new()),
            "?" => None,
            address => Some(vec![address.parse().unwrap()]),
        };
        let (host, alias) = (Domain::of_dns(host), alias.and_then(Domain::of_dns));
        MxFact { preference: words[0].parse().unwrap(), host, alias, addresses }
    }

    #[test]
    fn each_way_to_write_mx_is_judged() {
        use DnsVerdict::{Error, Good, Warning};
        let domain = Domain::of_dns("example.org").unwrap();
        let hosts = |facts: &[&str]| MxFacts::Hosts(facts.iter().map(|text| fact(text)).collect());
        let (own, other) = (vec!["192.0.2.1".parse().unwrap()], vec!["203.0.113.1".parse().unwrap()]);
        // The facts; the verdict and a part of the text for the provider; for the customer, if they differ.
        let table = [
            (hosts(&["10 relay.example.net ="]), (Good, "example.org. IN MX 10 relay.example.net."), None),
            (hosts(&["10 relay.example.net ?"]), (Good, "example.org. IN MX 10 relay.example.net."), None),
            (MxFacts::Failed("SERVFAIL".to_owned()), (Warning, "SERVFAIL"), None),
            (MxFacts::NoDomain, (Error, "does not exist (NXDOMAIN)"), None),
            (MxFacts::NoRecords(vec![]), (Error, "it cannot receive mail"), None),
            (MxFacts::NoRecords(own), (Warning, "section 5.1), 192.0.2.1, that of relay.example.net: name it"), None),
            (MxFacts::NoRecords(other), (Error, "section 5.1), 203.0.113.1, and not to relay.example.net"), None),
            (hosts(&["0 . -"]), (Error, "null MX: the domain accepts no mail at all (RFC 7505)"), None),
            (hosts(&["0 . -", "10 relay.example.net ="]), (Error, "\".\" and other records"), None),
            (hosts(&["10 192.0.2.1 ="]), (Error, "192.0.2.1 is an address"), None),
            (
                hosts(&["10 mx.example.org>relay.example.net ="]),
                (Error, "is an alias (CNAME) of relay.example.net"),
                None,
            ),
            (
                hosts(&["10 mx.example.org ="]),
                (Warning, "mx.example.org is relay.example.net by its address"),
                Some((Good, "example.org. IN MX 10 mx.example.org.")),
            ),
            (
                hosts(&["10 mx.example.com 203.0.113.1"]),
                (Error, "goes to mx.example.com, and none to relay.example.net"),
                Some((Warning, "mx.example.com must be the mail host of your provider")),
            ),
            (
                hosts(&["5 a.example 203.0.113.1", "10 relay.example.net ="]),
                (Warning, "a.example gets the mail first"),
                None,
            ),
            (hosts(&["10 relay.example.net =", "10 a.example ?"]), (Warning, "a.example gets about half"), None),
            (
                hosts(&["20 a.example ?", "10 relay.example.net ="]),
                (Warning, "a.example gets the mail while relay.example.net is down, and must send it on"),
                None,
            ),
            (
                hosts(&["10 relay.example.net =", "20 a.example -"]),
                (Warning, "a.example has no address: remove it"),
                None,
            ),
        ];
        let (host, addresses) = (Domain::of_dns("relay.example.net").unwrap(), ["192.0.2.1".parse().unwrap()]);
        // While the addresses of the host are not known, those of other names may be the same.
        let expected = ExpectedHost { host: &host, addresses: &[], is_certain: true };
        for facts in [hosts(&["10 mx.example.com 203.0.113.1"]), MxFacts::NoRecords(addresses.to_vec())] {
            let found = judge_mx(&domain, &expected, &facts);
            assert!(found.verdict == Warning && found.text.contains("whose addresses are not known"), "{found:?}");
        }
        for (facts, for_provider, for_customer) in table {
            for (is_certain, (verdict, text)) in [(true, for_provider), (false, for_customer.unwrap_or(for_provider))] {
                let expected = ExpectedHost { host: &host, addresses: &addresses, is_certain };
                let found = judge_mx(&domain, &expected, &facts);
                assert!(found.verdict == verdict && found.text.contains(text), "{facts:?} {is_certain}: {found:?}");
                let should = if verdict == Good { vec![] } else { vec!["example.org. IN MX 10 relay.example.net."] };
                assert_eq!(found.should, should, "{facts:?}");
            }
        }
    }
}
