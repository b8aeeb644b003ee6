//! What DNS says of a provider and of its customers' domains, and what it should say, as lines to paste into a zone file.

use std::net::SocketAddr;

use crate::mail::address::Domain;
use crate::net::tls::CertificateInfo;

/// Asks name servers about mail, within a time.
pub(super) struct DnsLookups {}

impl DnsLookups {
    /// Returns one that asks for 3 s at most in all, and no more after the first question without an answer. `resolver`:
    /// that of [relay], or else those of /etc/resolv.conf.
    pub fn brief(_resolver: Option<SocketAddr>) -> DnsLookups {
        DnsLookups {}
    }
}

/// The records that a provider needs, in the form of a zone file: A and AAAA of the addresses of this machine that the world
/// may reach, or a comment in their place, SPF, PTR, and TLSA for `certificate`, that of [tls].
pub(super) fn provider_records(hostname: &str, certificate: Option<&CertificateInfo>) -> Vec<String> {
    let _ = (hostname, certificate);
    Vec::new()
}

/// The MX records of a customer's domain as they are, and as they should be with the provider `host`; with `relays`, which
/// says that the provider sends mail of the domain, its SPF record, too. Lines for a person, which begin without
/// indentation. A name server that does not answer has a line that says so.
pub(super) fn domain_records(domain: &Domain, host: &str, relays: bool, lookups: &DnsLookups) -> Vec<String> {
    let _ = (domain, host, relays, lookups);
    Vec::new()
}
