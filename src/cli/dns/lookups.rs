//! The questions to the name servers: each is asked once, within a time limit, and none after several without a reply.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::mx::{ExpectedHost, MxFact, MxFacts};
use crate::ids::Ids;
use crate::mail::address::Domain;
use crate::net::resolver::{Answer, Record, ResolveError, Resolver, Rtype, address_for_name};
use crate::net::tls;
use crate::threads::Guarded;

/// Hosts of one domain that are looked up.
const HOST_LIMIT: usize = 10;
/// Questions whose answers are stored.
const KNOWN_LIMIT: usize = 256;

/// Asks name servers about mail, from several threads too.
pub struct DnsLookups {
    resolver: Result<Resolver, ResolveError>,
    deadline: Instant,
    /// After this many questions in a row without a reply, no more are asked.
    most_unanswered: usize,
    /// The place where the name servers are configured, for errors.
    configured: &'static str,
    asked: Guarded<AskedQuestions>,
}

#[derive(Default)]
struct AskedQuestions {
    /// The last ones, so that a host of many domains is looked up once.
    known: Vec<DnsQuestion>,
    /// How many in a row had no reply.
    unanswered: usize,
}

struct DnsQuestion {
    name: Domain,
    kind: Rtype,
    answer: Result<Answer, ResolveError>,
}

impl DnsLookups {
    /// Returns one that asks for 3 s from now on at most in all, and no more after the first question without a reply.
    /// `resolver`: that of `[relay]`; `None`: those of /etc/resolv.conf.
    pub fn brief(resolver: Option<SocketAddr>) -> DnsLookups {
        DnsLookups::new(resolver, Duration::from_secs(1), Duration::from_secs(3), 1)
    }

    /// Returns one for many domains: it asks for 2 min from now on at most, and no more after three questions in a row
    /// without a reply.
    pub fn thorough(resolver: Option<SocketAddr>) -> DnsLookups {
        DnsLookups::new(resolver, Duration::from_secs(2), Duration::from_secs(120), 3)
    }

    fn new(resolver: Option<SocketAddr>, timeout: Duration, limit: Duration, most_unanswered: usize) -> DnsLookups {
        let configured = if resolver.is_some() { "`resolver` in [relay]" } else { "/etc/resolv.conf" };
        let (ids, deadline) = (Ids::system(tls::random), Instant::now() + limit);
        let resolver = resolver.map_or_else(|| Resolver::system(&ids), |server| Ok(Resolver::at(server, &ids)));
        let resolver = resolver.map(|resolver| resolver.hurried(timeout, deadline));
        let resolver = resolver.map_err(|error| ResolveError { text: error.to_string(), no_reply: true });
        DnsLookups { resolver, deadline, most_unanswered, configured, asked: Guarded::default() }
    }

    /// Whether nothing more is asked.
    pub fn is_over(&self) -> bool {
        self.is_dead() || Instant::now() >= self.deadline
    }

    fn is_dead(&self) -> bool {
        self.asked.lock().unanswered >= self.most_unanswered
    }

    /// Why nothing more is asked, and what to do.
    pub fn why_over(&self) -> String {
        let why = if self.is_dead() { "no name server replies" } else { "the name servers are too slow" };
        format!("{why}: check {}", self.configured)
    }

    /// Finds the records of one type.
    ///
    /// # Errors
    ///
    /// No server gave a usable reply, now or before.
    pub fn ask(&self, name: &Domain, kind: Rtype) -> Result<Answer, ResolveError> {
        if let Some(known) = self.asked.lock().known.iter().find(|known| known.kind == kind && known.name == *name) {
            return known.answer.clone();
        }
        if self.is_over() {
            return Err(ResolveError { text: format!("not asked, as {}", self.why_over()), no_reply: true });
        }
        let answer = self.query(name, kind);
        let mut asked = self.asked.lock();
        asked.unanswered = if replies(&answer) { 0 } else { asked.unanswered + 1 };
        // Ask again a question that had a reply before: only the server of this domain may be down, and not the resolver.
        let known = asked.known.iter().find(|known| replies(&known.answer));
        if let Some((name, kind)) = known.map(|known| (known.name.clone(), known.kind))
            && asked.unanswered >= self.most_unanswered
        {
            drop(asked);
            let again = self.query(&name, kind);
            asked = self.asked.lock();
            if replies(&again) {
                asked.unanswered = 0;
            }
        }
        if asked.known.len() == KNOWN_LIMIT {
            asked.known.remove(0);
        }
        asked.known.push(DnsQuestion { name: name.clone(), kind, answer: answer.clone() });
        answer
    }

    fn query(&self, name: &Domain, kind: Rtype) -> Result<Answer, ResolveError> {
        match &self.resolver {
            Ok(resolver) => resolver.records(name, kind),
            Err(error) => Err(error.clone()),
        }
    }

    /// Asks for the addresses of a host, of IPv4 and of IPv6.
    pub fn address_answers(&self, host: &Domain) -> [Result<Answer, ResolveError>; 2] {
        [Rtype::A, Rtype::AAAA].map(|kind| self.ask(host, kind))
    }

    /// The addresses of a host; `None`: a question failed, and there may be some.
    pub fn host_addresses(&self, host: &Domain) -> Option<Vec<IpAddr>> {
        if let Some(address) = address_for_name(host) {
            return Some(vec![address]);
        }
        let answers = self.address_answers(host);
        let found = addresses_of(&answers);
        (!found.is_empty() || answers.iter().all(Result::is_ok)).then_some(found)
    }

    /// Looks up the hosts that receive the mail of a domain.
    pub(super) fn mx_facts(&self, domain: &Domain, expected: &ExpectedHost<'_>) -> MxFacts {
        let records = match self.ask(domain, Rtype::MX) {
            Err(error) => return MxFacts::Failed(error.text),
            Ok(Answer::NoName) => return MxFacts::NoDomain,
            Ok(Answer::NoRecords) => {
                let answers = self.address_answers(domain);
                let failed = answers.iter().find_map(|answer| answer.as_ref().err());
                return match (addresses_of(&answers), failed) {
                    (addresses, Some(error)) if addresses.is_empty() => MxFacts::Failed(error.text.clone()),
                    (addresses, _) => MxFacts::NoRecords(addresses),
                };
            }
            Ok(Answer::Records(records)) => records,
        };
        let mut hosts: Vec<(u16, Option<Domain>)> = Vec::new();
        for record in records {
            if let Record::Exchange(preference, host) = record {
                // Sorted by preference.
                let at = hosts.iter().position(|(other, _)| *other > preference).unwrap_or(hosts.len());
                hosts.insert(at, (preference, Domain::of_dns(&host.to_string())));
            }
        }
        let fact = |(number, (preference, host)): (usize, (u16, Option<Domain>))| {
            let looked_up = host.as_ref().filter(|_| number < HOST_LIMIT);
            let alias = looked_up.filter(|host| address_for_name(host).is_none()).and_then(|host| self.alias(host));
            let addresses = looked_up.and_then(|host| match host == expected.host {
                true => Some(expected.addresses.to_vec()),
                false => self.host_addresses(host),
            });
            MxFact { preference, host, alias, addresses }
        };
        MxFacts::Hosts(hosts.into_iter().enumerate().map(fact).collect())
    }

    /// The name that a host is an alias of.
    fn alias(&self, host: &Domain) -> Option<Domain> {
        match self.ask(host, Rtype::CNAME) {
            Ok(Answer::Records(records)) => records.iter().find_map(|record| match record {
                Record::Target(name) => Domain::of_dns(&name.to_string()),
                _ => None,
            }),
            _ => None,
        }
    }
}

/// Whether a name server has replied, even if with an error.
fn replies(answer: &Result<Answer, ResolveError>) -> bool {
    answer.as_ref().err().is_none_or(|error| !error.no_reply)
}

/// The addresses among answers.
pub(super) fn addresses_of(answers: &[Result<Answer, ResolveError>]) -> Vec<IpAddr> {
    let records = answers.iter().filter_map(|answer| match answer {
        Ok(Answer::Records(records)) => Some(records),
        _ => None,
    });
    let addresses = records.flatten().filter_map(|record| match record {
        Record::Address(address) => Some(*address),
        _ => None,
    });
    addresses.collect()
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    /// Ten thousand domains must not wait for a server that is down.
    #[test]
    fn nothing_more_is_asked_of_a_dead_name_server() {
        let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
        let server = silent.local_addr().unwrap();
        let ask =
            |lookups: &DnsLookups, name: &str| lookups.ask(&Domain::of_dns(name).unwrap(), Rtype::MX).unwrap_err();
        let lookups = DnsLookups::new(Some(server), Duration::from_millis(10), Duration::from_secs(60), 2);
        // The same question again does not count.
        assert!([0, 1].map(|_| ask(&lookups, "a.example").text).iter().all(|text| text.ends_with("no answer in time")));
        assert!(!lookups.is_over());
        assert!(ask(&lookups, "b.example").text.ends_with("no answer in time") && lookups.is_over());
        let error = ask(&lookups, "c.example").text;
        assert_eq!(error, "not asked, as no name server replies: check `resolver` in [relay]");
        let lookups = DnsLookups::new(Some(server), Duration::from_secs(1), Duration::ZERO, 2);
        assert_eq!(
            ask(&lookups, "a.example").text,
            "not asked, as the name servers are too slow: check `resolver` in [relay]"
        );
    }
}
