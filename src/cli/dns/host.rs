//! Judges the records of a provider's own host: its addresses, their names, and TLSA (RFC 7672).

use std::net::{IpAddr, SocketAddr, UdpSocket};

use data_encoding::HEXLOWER;

use super::finding::{DnsFinding, DnsVerdict, address_kind, address_line, listed, reverse_name, zone_line};
use crate::mail::address::Domain;
use crate::net::reserved::not_public;
use crate::net::resolver::{Answer, Record, ResolveError};
use crate::net::tls::CertificateInfo;

/// One address of the host.
pub(super) struct AddressFact {
    pub address: IpAddr,
    /// Whether an interface of this machine has it.
    pub is_own: bool,
    /// Whether the listener for the Internet is at it.
    pub is_served: bool,
}

impl AddressFact {
    /// `listen`: the addresses of the listener; empty: another program listens.
    pub fn new(address: IpAddr, is_own: bool, listen: &[SocketAddr]) -> AddressFact {
        // `[::]` accepts IPv4 too (see net/listener).
        let serves = |at: IpAddr| match at {
            IpAddr::V6(at) if at.is_unspecified() => true,
            at => at == address || at.is_unspecified() && address.is_ipv4(),
        };
        // An address that this machine does not have is that of a router (NAT): no listener here can be at it.
        let is_served = !is_own || listen.is_empty() || listen.iter().any(|at| serves(at.ip().to_canonical()));
        AddressFact { address, is_own, is_served }
    }
}

/// Judges one A or AAAA record of `host`. `allow_private`: whether mail hosts may have private addresses.
pub(super) fn judge_address(host: &Domain, fact: &AddressFact, allow_private: bool) -> DnsFinding {
    let (address, line) = (fact.address, address_line(host, fact.address));
    let warning = match not_public(address).filter(|_| !allow_private) {
        Some(what) => format!("this is {what}, which no host in the world can reach"),
        None if !fact.is_own => {
            "this machine does not have the address: it is right only if a router forwards port 25 to here (NAT)"
                .to_owned()
        }
        None if !fact.is_served => "[inbound] does not listen at it: correct `listen`, or remove the record".to_owned(),
        None => return DnsFinding::new(DnsVerdict::Good, address_kind(address), &line),
    };
    DnsFinding::new(DnsVerdict::Warning, address_kind(address), &warning).with(vec![line], Vec::new())
}

/// Judges that no address of `host` was found; `own`: those of this machine.
pub(super) fn judge_no_address(
    host: &Domain, found: &[Result<Answer, ResolveError>; 2], own: &[IpAddr],
) -> Option<DnsFinding> {
    let should = || match own.is_empty() {
        true => Vec::new(),
        false => own.iter().map(|address| address_line(host, *address)).collect(),
    };
    let finding = |verdict, text: &str| DnsFinding::new(verdict, "A", text).with(Vec::new(), should());
    if found.iter().any(|answer| matches!(answer, Ok(Answer::Records(_)))) {
        return None;
    }
    let failed = found.iter().find_map(|answer| answer.as_ref().err());
    Some(match (failed, found.iter().all(|answer| *answer == Ok(Answer::NoName))) {
        (Some(error), _) => finding(DnsVerdict::Warning, &error.text),
        (None, true) => finding(DnsVerdict::Error, "the name does not exist (NXDOMAIN), so no mail can arrive here"),
        (None, false) => finding(DnsVerdict::Error, "the name has no address, so no mail can arrive here"),
    })
}

/// Judges an address of this machine that mail is sent from; `None`: it is one of the host.
pub(super) fn judge_source(host: &Domain, source: IpAddr, addresses: &[IpAddr]) -> Option<DnsFinding> {
    let text = "this machine sends from another address, which is not one of the name: receivers may reject its mail";
    (!addresses.is_empty() && !addresses.contains(&source)).then(|| {
        DnsFinding::new(DnsVerdict::Warning, address_kind(source), text)
            .with(Vec::new(), vec![address_line(host, source)])
    })
}

/// Judges the names of an address: one must be `host`, whose address it is.
pub(super) fn judge_pointer(host: &Domain, address: IpAddr, found: &Result<Answer, ResolveError>) -> DnsFinding {
    let ptr = |verdict, text: &str| DnsFinding::new(verdict, "PTR", text);
    let at = reverse_name(address);
    let line = |name: &Domain| zone_line(&at, "PTR", &format!("{name}."));
    let records = match found {
        Ok(Answer::Records(records)) => &records[..],
        Ok(_) => &[],
        Err(error) => return ptr(DnsVerdict::Warning, &error.text),
    };
    let names = records.iter().filter_map(|record| match record {
        Record::Target(name) => Domain::of_dns(&name.to_string()),
        _ => None,
    });
    let names: Vec<Domain> = names.collect();
    let is = names.iter().map(line).collect();
    let advice = "many receivers reject mail from it; ask your Internet provider to set the record";
    match &names[..] {
        names if names.contains(host) => ptr(DnsVerdict::Good, &line(host)),
        [] => ptr(DnsVerdict::Warning, &format!("{address} has no name: {advice}")).with(is, vec![line(host)]),
        names => {
            let text = format!(
                "{address} leads to {} and not to {host}: {advice}",
                listed(&mut names.iter().map(|name| name as _))
            );
            ptr(DnsVerdict::Warning, &text).with(is, vec![line(host)])
        }
    }
}

/// The name of the TLSA records of a mail host (RFC 7672 section 2.2.3).
pub(super) fn tlsa_name(host: &Domain) -> Option<Domain> {
    Domain::of_dns(&format!("_25._tcp.{host}"))
}

/// The TLSA record to have: it stays right as long as the key stays (RFC 7672 section 3.1.1).
pub(super) fn tlsa_line(at: &Domain, certificate: &CertificateInfo) -> Option<String> {
    Some(zone_line(at, "TLSA", &format!("3 1 1 {}", HEXLOWER.encode(&certificate.association(1, 1)?))))
}

/// Judges the TLSA records at `at`; `chain`: the certificates of `[tls]`, its own first; empty: there is no TLS.
pub(super) fn judge_tlsa(at: &Domain, chain: &[CertificateInfo], found: &Result<Answer, ResolveError>) -> DnsFinding {
    use DnsVerdict::{Error, Good, Note, Warning};
    let tlsa = |verdict, text: &str| DnsFinding::new(verdict, "TLSA", text);
    let records = match found {
        Ok(Answer::Records(records)) => &records[..],
        Ok(_) => &[],
        Err(error) => return tlsa(Warning, &error.text),
    };
    let records = records.iter().filter_map(|record| match record {
        Record::Tlsa(numbers, data) => Some((numbers, data)),
        _ => None,
    });
    let records: Vec<_> = records.collect();
    let line = |([usage, selector, matching], data): &(&[u8; 3], &Vec<u8>)| {
        zone_line(at, "TLSA", &format!("{usage} {selector} {matching} {}", HEXLOWER.encode(data)))
    };
    let is: Vec<String> = records.iter().map(line).collect();
    let should: Vec<String> = chain.first().and_then(|certificate| tlsa_line(at, certificate)).into_iter().collect();
    let matches: Vec<TlsaMatch> = records.iter().map(|(numbers, data)| match_tlsa(numbers, data, chain)).collect();
    let has = |wanted: TlsaMatch| matches.contains(&wanted);
    match () {
        () if records.is_empty() => {
            tlsa(Note, "there is no record; it is worth having only in a zone that is signed (DNSSEC)").with(is, should)
        }
        () if has(TlsaMatch::Fits) => {
            let fitting = records.iter().zip(&matches).find(|(_, found)| **found == TlsaMatch::Fits);
            let numbers = fitting.map(|(([usage, selector, matching], _), _)| format!("{usage} {selector} {matching}"));
            tlsa(Good, &format!("{at}. IN TLSA {} fits the certificate", numbers.unwrap_or_default()))
        }
        () if has(TlsaMatch::Unknown) => tlsa(Note, "no record is of a kind that is compared here").with(is, should),
        () if has(TlsaMatch::Differs) => {
            let text = "no record fits the certificate in [tls]: senders that use DANE defer their mail (RFC 7672 section 2.2)";
            tlsa(Error, text).with(is, should)
        }
        () => tlsa(Warning, "senders of mail use the kinds 2 and 3 only (RFC 7672 section 3.1.3)").with(is, should),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum TlsaMatch {
    Fits,
    Differs,
    /// Its matching type, such as SHA-512, is not computed here.
    Unknown,
    /// Its kind is not for mail.
    Unusable,
}

fn match_tlsa([usage, selector, matching]: &[u8; 3], data: &[u8], chain: &[CertificateInfo]) -> TlsaMatch {
    let candidates = match usage {
        // DANE-TA: an issuer of the certificate; OpenSSL does not accept the certificate itself. DANE-EE: the certificate.
        2 => chain.get(1..).unwrap_or_default(),
        3 => &chain[..chain.len().min(1)],
        _ => return TlsaMatch::Unusable,
    };
    if !matches!((selector, matching), (0..=1, 0..=1)) {
        return TlsaMatch::Unknown;
    }
    let fits =
        |certificate: &CertificateInfo| certificate.association(*selector, *matching).is_some_and(|own| own == data);
    if candidates.iter().any(fits) { TlsaMatch::Fits } else { TlsaMatch::Differs }
}

/// The addresses from which this machine reaches the world, without private ones. Nothing is sent: the system only chooses
/// the source address of a datagram.
pub(super) fn world_addresses() -> Vec<IpAddr> {
    // Root servers of the DNS, by the addresses that every resolver knows.
    let probes = [("0.0.0.0:0", "198.41.0.4:53"), ("[::]:0", "[2001:503:ba3e::2:30]:53")];
    let source = |(any, target): (&str, &str)| {
        let socket = UdpSocket::bind(any).ok()?;
        socket.connect(target).ok()?;
        Some(socket.local_addr().ok()?.ip())
    };
    probes.into_iter().filter_map(source).filter(|address| not_public(*address).is_none()).collect()
}

#[cfg(test)]
mod tests {
    use domain::base::Name;

    use super::*;
    use crate::net::tls::self_signed;
    use DnsVerdict::{Error, Good, Note, Warning};

    fn domain(text: &str) -> Domain {
        Domain::of_dns(text).unwrap()
    }

    fn failed() -> Result<Answer, ResolveError> {
        Err(ResolveError { text: "SERVFAIL".to_owned(), no_reply: false })
    }

    #[test]
    fn addresses_are_judged() {
        let host = domain("relay.example.net");
        // The address, whether it is this machine's, the listener; the verdict and a part of the text.
        let table = [
            ("8.8.8.8", true, &["[::]:25"][..], Good, "relay.example.net. IN A 8.8.8.8"),
            ("8.8.8.8", true, &["0.0.0.0:25"], Good, ""),
            ("8.8.8.8", true, &["127.0.0.1:25", "8.8.8.8:25"], Good, ""),
            ("8.8.8.8", true, &[], Good, ""),
            ("8.8.8.8", true, &["127.0.0.1:25"], Warning, "[inbound] does not listen at it"),
            ("2a00::1", true, &["0.0.0.0:25"], Warning, "[inbound] does not listen at it"),
            ("2a00::1", true, &["[::]:25"], Good, "relay.example.net. IN AAAA 2a00::1"),
            ("8.8.8.8", false, &["192.168.1.2:25"], Warning, "this machine does not have the address"),
            ("192.168.1.2", true, &["[::]:25"], Warning, "this is a private address"),
        ];
        for (address, is_own, listen, verdict, text) in table {
            let listen: Vec<SocketAddr> = listen.iter().map(|at| at.parse().unwrap()).collect();
            let fact = AddressFact::new(address.parse().unwrap(), is_own, &listen);
            let found = judge_address(&host, &fact, false);
            assert!(found.verdict == verdict && found.text.contains(text), "{address} {listen:?}: {found:?}");
        }
        let fact = AddressFact::new("127.0.0.1".parse().unwrap(), true, &[]);
        assert_eq!(judge_address(&host, &fact, true).verdict, Good);
        let own = ["8.8.8.8".parse().unwrap()];
        let none = |one, other| judge_no_address(&host, &[one, other], &own);
        let found = none(Ok(Answer::NoName), Ok(Answer::NoName)).unwrap();
        assert!(found.verdict == Error && found.text.contains("NXDOMAIN"), "{found:?}");
        assert_eq!(found.should, ["relay.example.net. IN A 8.8.8.8"]);
        assert_eq!(none(Ok(Answer::NoRecords), Ok(Answer::NoName)).unwrap().verdict, Error);
        assert_eq!(none(Ok(Answer::NoRecords), failed()).unwrap().verdict, Warning);
        assert_eq!(none(Ok(Answer::Records(vec![Record::Address(own[0])])), failed()), None);
        assert_eq!(judge_source(&host, own[0], &own), None);
        assert_eq!(judge_source(&host, "2a00::1".parse().unwrap(), &own).unwrap().verdict, Warning);
    }

    #[test]
    fn names_of_addresses_are_judged() {
        let names = |names: &[&str]| {
            Ok(Answer::Records(names.iter().map(|name| Record::Target(Name::vec_from_str(name).unwrap())).collect()))
        };
        let table = [
            (names(&["Relay.example.net"]), Good, "1.2.0.192.in-addr.arpa. IN PTR relay.example.net."),
            (names(&["a.example", "relay.example.net"]), Good, ""),
            (names(&["a.example"]), Warning, "192.0.2.1 leads to a.example and not to relay.example.net"),
            (Ok(Answer::NoName), Warning, "192.0.2.1 has no name: many receivers reject mail from it"),
            (failed(), Warning, "SERVFAIL"),
        ];
        for (found, verdict, text) in table {
            let judged = judge_pointer(&domain("relay.example.net"), "192.0.2.1".parse().unwrap(), &found);
            assert!(judged.verdict == verdict && judged.text.contains(text), "{found:?}: {judged:?}");
        }
    }

    #[test]
    fn tlsa_records_are_compared_with_the_certificate() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("chain.pem");
        let certificates = ["relay.example.net", "issuer.example"].map(|name| self_signed(&[name]).unwrap().0);
        std::fs::write(&file, certificates.concat()).unwrap();
        let chain = CertificateInfo::load_chain(&file).unwrap();
        let of = |which: usize, selector, matching| chain[which].association(selector, matching).unwrap();
        assert_eq!(format!("spki-sha256:{}", HEXLOWER.encode(&of(0, 1, 1))), chain[0].pins[1]);
        let other = vec![0; 32];
        let table = [
            (vec![([3, 1, 1], of(0, 1, 1))], Good, "3 1 1 fits"),
            (vec![([3, 0, 1], of(0, 0, 1))], Good, "3 0 1 fits"),
            (vec![([3, 1, 0], of(0, 1, 0))], Good, "3 1 0 fits"),
            (vec![([3, 0, 0], of(0, 0, 0))], Good, "3 0 0 fits"),
            (vec![([2, 1, 1], of(1, 1, 1))], Good, "2 1 1 fits"),
            (vec![([2, 1, 1], of(0, 1, 1))], Error, "no record fits"),
            // While the key changes, there is a record for each.
            (vec![([3, 1, 1], other.clone()), ([3, 1, 1], of(0, 1, 1))], Good, "3 1 1 fits"),
            (vec![([3, 1, 1], other.clone())], Error, "senders that use DANE defer their mail"),
            (vec![([3, 1, 1], of(1, 1, 1))], Error, "no record fits"),
            (vec![([3, 0, 1], of(0, 1, 1))], Error, "no record fits"),
            (vec![([1, 1, 1], of(0, 1, 1)), ([3, 1, 1], other.clone())], Error, "no record fits"),
            (vec![([3, 1, 2], vec![0; 64])], Note, "of a kind that is compared here"),
            (vec![([3, 1, 1], Vec::new()), ([3, 1, 2], vec![0; 64])], Note, "of a kind that is compared here"),
            (vec![([0, 0, 1], other.clone()), ([1, 1, 1], other)], Warning, "kinds 2 and 3 only"),
            (vec![], Note, "only in a zone that is signed (DNSSEC)"),
        ];
        let at = tlsa_name(&domain("relay.example.net")).unwrap();
        let line = tlsa_line(&at, &chain[0]).unwrap();
        assert!(line.starts_with("_25._tcp.relay.example.net. IN TLSA 3 1 1 "), "{line}");
        for (records, verdict, text) in table {
            let answer = match records.is_empty() {
                true => Ok(Answer::NoName),
                false => {
                    Ok(Answer::Records(records.iter().map(|(kind, data)| Record::Tlsa(*kind, data.clone())).collect()))
                }
            };
            let found = judge_tlsa(&at, &chain, &answer);
            assert!(found.verdict == verdict && found.text.contains(text), "{records:?}: {found:?}");
            assert_eq!(found.should.is_empty(), verdict == Good, "{records:?}");
        }
        // Senders that use DANE want TLS.
        let answer = Ok(Answer::Records(vec![Record::Tlsa([3, 1, 1], vec![0; 32])]));
        assert_eq!(judge_tlsa(&at, &[], &answer).verdict, Error);
        assert_eq!(judge_tlsa(&at, &[], &failed()).verdict, Warning);
    }
}
