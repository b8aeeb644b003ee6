//! `odmr check --dns`: the DNS records of a provider's host and of the domains of customers, as they are and as they should
//! be; for `odmr setup` and `odmr customer` the same records, in the form to paste into a zone file.
//!
//! ```text
//! lookups ─ answers ─▶ spf ─ results ─▶ host, mx, texts: each set of records is judged ─ findings ─▶ lines
//! ```

mod finding;
mod host;
mod lookups;
mod mx;
mod spf;
mod texts;
#[cfg(test)]
mod zone;

use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use self::finding::{DnsFinding, DnsVerdict, address_line, mx_line, reverse_name, txt_line, zone_line};
use self::host::{
    AddressFact, judge_address, judge_no_address, judge_pointer, judge_source, judge_tlsa, tlsa_line, tlsa_name,
    world_addresses,
};
pub(super) use self::lookups::DnsLookups;
use self::mx::{ExpectedHost, MxFacts, judge_mx};
use self::spf::check_spf;
use self::texts::{SendingHost, judge_dmarc, judge_spf};
use super::check_report::CheckReport;
use super::exit::ExitError;
use super::process::print;
use super::terminal::{has_colours, highlighted};
use crate::config::{Config, CustomerConfig, ProviderConfig, TlsFiles};
use crate::mail::address::Domain;
use crate::net::reserved::{is_own, not_public};
use crate::net::resolver::{Rtype, address_for_name};
use crate::net::tls::CertificateInfo;
use crate::threads::{self, Guarded};

/// Domains that are looked up at the same time, and those whose lines are printed together.
const PARALLEL_LOOKUPS: usize = 8;
const DOMAIN_BLOCK: usize = 64;

/// A host that receives or sends the mail of domains.
struct KnownHost {
    host: Domain,
    addresses: Vec<IpAddr>,
}

impl KnownHost {
    fn look_up(host: &Domain, lookups: &DnsLookups) -> KnownHost {
        KnownHost { host: host.clone(), addresses: lookups.host_addresses(host).unwrap_or_default() }
    }
}

/// Which host sends the mail of a domain.
enum SentBy<'a> {
    /// No mail of the domain is sent through this program.
    NotHere,
    Host(&'a KnownHost),
    /// Another host, whose addresses are not known here, for this reason.
    Elsewhere(&'a str),
}

/// A domain, and what its records should have.
struct DomainPlan<'a> {
    domain: &'a Domain,
    /// The host that should receive its mail.
    received_by: &'a KnownHost,
    /// Whether that host has this name, and sends too, as its own provider knows.
    is_certain: bool,
    sent_by: SentBy<'a>,
}

/// The certificates in `[tls]` of a provider, its own first; none: it has no TLS, or the file cannot be read, which
/// `odmr check` reports. Root reads them before it becomes the owner of the mail.
pub(super) fn certificates(config: &Config) -> Vec<CertificateInfo> {
    let Config::Provider(config) = config else { return Vec::new() };
    let load = |files: &TlsFiles| CertificateInfo::load_chain(&files.certificate).ok();
    config.tls.as_ref().and_then(load).unwrap_or_default()
}

/// Prints the records as they are and as they should be; `chain`: see [`certificates`].
///
/// # Errors
///
/// Standard output cannot be written. What is wrong in DNS goes into the report.
pub(super) fn run(
    config: &Config, path: &Path, chain: &[CertificateInfo], report: &mut CheckReport,
) -> Result<(), ExitError> {
    let mut tally = DnsTally::default();
    match config {
        Config::Provider(config) => check_provider(config, chain, &mut tally)?,
        Config::Customer(config) => check_customer(config, &mut tally)?,
    }
    if let errors @ 1.. = tally.errors {
        report.error(format!(
            "{}: wrong records in DNS: {errors}, those with \"error\" above: correct them in the zone",
            path.display()
        ));
    }
    Ok(())
}

/// How many findings were errors.
#[derive(Default)]
struct DnsTally {
    errors: usize,
}

impl DnsTally {
    fn print(&mut self, name: &Domain, findings: &[DnsFinding]) -> Result<(), ExitError> {
        self.errors += findings.iter().filter(|finding| finding.verdict == DnsVerdict::Error).count();
        print(&lines(name, findings, has_colours(io::stdout())))
    }
}

/// The findings about a name.
fn lines(name: &Domain, findings: &[DnsFinding], colours: bool) -> String {
    let mut out = format!("{name}\n");
    findings.iter().for_each(|finding| finding.write(&mut out, colours));
    out
}

fn check_provider(config: &ProviderConfig, chain: &[CertificateInfo], tally: &mut DnsTally) -> Result<(), ExitError> {
    let lookups = DnsLookups::thorough(config.relay.resolver);
    let Some(host) = Domain::parse(&config.hostname) else { return Ok(()) };
    let known = KnownHost::look_up(&host, &lookups);
    tally.print(&host, &judge_host(config, &known, chain, &lookups))?;
    let smarthost = config.relay.smarthost.as_ref();
    let smarthost = smarthost.map(|remote| format!("mail is sent by {}, which is not evaluated here", remote.host));
    let sent_by = |relay: bool| match &smarthost {
        _ if !relay => SentBy::NotHere,
        Some(text) => SentBy::Elsewhere(text),
        None => SentBy::Host(&known),
    };
    let plan = |domain, relay| DomainPlan { domain, received_by: &known, is_certain: true, sent_by: sent_by(relay) };
    let domains =
        config.accounts.iter().flat_map(|account| account.domains.iter().map(move |domain| (domain, account.relay)));
    let plans: Vec<_> = domains.map(|(domain, relay)| plan(domain, relay)).collect();
    check_domains(&plans, &lookups, tally)
}

/// Judges the records of a provider's host.
fn judge_host(
    config: &ProviderConfig, known: &KnownHost, chain: &[CertificateInfo], lookups: &DnsLookups,
) -> Vec<DnsFinding> {
    let (host, own) = (&known.host, world_addresses());
    let (listen, allow_private) = (&config.inbound.listen, config.relay.allow_private);
    let mut findings: Vec<_> = judge_no_address(host, &lookups.address_answers(host), &own).into_iter().collect();
    if lookups.is_over() {
        return findings;
    }
    for &address in &known.addresses {
        findings.push(judge_address(host, &AddressFact::new(address, is_own(address), listen), allow_private));
    }
    // A smarthost sends from its own addresses.
    let sends = config.relay.smarthost.is_none();
    findings.extend(own.iter().filter(|_| sends).filter_map(|source| judge_source(host, *source, &known.addresses)));
    let has_name = |address: &&IpAddr| sends && (allow_private || not_public(**address).is_none());
    for &address in known.addresses.iter().filter(has_name) {
        findings.push(judge_pointer(host, address, &lookups.ask(&reverse_name(address), Rtype::PTR)));
    }
    findings.push(judge_spf(host, true, &lookups.ask(host, Rtype::TXT), &sending_host(known, host, true, lookups)));
    // Without a listener, port 25 and its certificate are another program's.
    if let Some(at) = tlsa_name(host).filter(|_| !listen.is_empty()) {
        findings.push(judge_tlsa(&at, chain, &lookups.ask(&at, Rtype::TLSA)));
    }
    findings
}

/// The SPF results of `domain` for each address of a host.
fn sending_host<'a>(known: &'a KnownHost, domain: &Domain, is_certain: bool, lookups: &DnsLookups) -> SendingHost<'a> {
    let ask = |name: &Domain, kind| lookups.ask(name, kind);
    let result = |address: &IpAddr| (*address, check_spf(domain, *address, &ask));
    SendingHost::Host(&known.host, known.addresses.iter().map(result).collect(), is_certain)
}

fn check_customer(config: &CustomerConfig, tally: &mut DnsTally) -> Result<(), ExitError> {
    let lookups = DnsLookups::thorough(None);
    let hosts: Vec<_> = config.providers.iter().filter_map(|provider| Domain::of_dns(&provider.remote.host)).collect();
    let known: Vec<_> = hosts.iter().map(|host| KnownHost::look_up(host, &lookups)).collect();
    let submission = config.outgoing.as_ref().and_then(|outgoing| outgoing.submission.as_ref());
    let submission =
        submission.map(|remote| format!("mail may be sent by {} too, which is not evaluated here", remote.host));
    let sender = config.providers.iter().position(|provider| provider.outgoing).and_then(|at| known.get(at));
    let plan = |domain| {
        let asked = |domains: &[Domain]| domains.is_empty() || domains.contains(domain);
        let provider = config.providers.iter().position(|provider| asked(&provider.domains)).unwrap_or(0);
        let sent_by = match (&submission, sender) {
            _ if config.outgoing.is_none() => SentBy::NotHere,
            (Some(text), _) => SentBy::Elsewhere(text),
            (None, Some(host)) if address_for_name(&host.host).is_none() => SentBy::Host(host),
            (None, _) => SentBy::Elsewhere("the name of the host that sends is not known here"),
        };
        Some(DomainPlan { domain, received_by: known.get(provider)?, is_certain: false, sent_by })
    };
    let plans: Vec<_> = config.mailboxes.rules.domains().iter().filter_map(plan).collect();
    check_domains(&plans, &lookups, tally)
}

/// Looks up the domains, several at the same time, and prints what was found in their order.
fn check_domains(plans: &[DomainPlan<'_>], lookups: &DnsLookups, tally: &mut DnsTally) -> Result<(), ExitError> {
    let mut left = plans.len();
    for block in plans.chunks(DOMAIN_BLOCK) {
        let findings: Guarded<Vec<Vec<DnsFinding>>> = Guarded::new(vec![Vec::new(); block.len()]);
        let next = AtomicUsize::new(0);
        let work = || {
            while let (number, false) = (next.fetch_add(1, Ordering::Relaxed), lookups.is_over())
                && let Some(plan) = block.get(number)
            {
                let found = judge_domain(plan, lookups);
                findings.lock()[number] = found;
            }
        };
        thread::scope(|scope| {
            for _ in 1..PARALLEL_LOOKUPS.min(block.len()) {
                // Without more threads, this one does all the work.
                let _ = threads::spawn_scoped(scope, "dns", work);
            }
            work();
        });
        let findings = findings.into_inner();
        for (plan, found) in block.iter().zip(&findings).filter(|(_, found)| !found.is_empty()) {
            tally.print(plan.domain, found)?;
            left -= 1;
        }
    }
    if left > 0 {
        let word = highlighted("warning:", false, has_colours(io::stdout()));
        print(&format!("{word} domains that were not looked up: {left}, as {}\n", lookups.why_over()))?;
    }
    Ok(())
}

/// Judges the records of one domain.
fn judge_domain(plan: &DomainPlan<'_>, lookups: &DnsLookups) -> Vec<DnsFinding> {
    let DomainPlan { domain, received_by, is_certain, sent_by } = plan;
    let expected = ExpectedHost { host: &received_by.host, addresses: &received_by.addresses, is_certain: *is_certain };
    let facts = lookups.mx_facts(domain, &expected);
    let exists = !matches!(facts, MxFacts::NoDomain | MxFacts::Failed(_));
    let mut findings = vec![match (address_for_name(&received_by.host), facts) {
        (Some(_), MxFacts::Hosts(hosts)) => {
            let is = hosts.iter().map(|fact| mx_line(domain, fact.preference, fact.host.as_ref())).collect();
            let text =
                "`address` of [provider] is not a name, so it is not known here what it should be: ask its operator";
            DnsFinding::new(DnsVerdict::Note, "MX", text).with(is, Vec::new())
        }
        (Some(_), facts) => DnsFinding { should: Vec::new(), ..judge_mx(domain, &expected, &facts) },
        (None, facts) => judge_mx(domain, &expected, &facts),
    }];
    let sender = match sent_by {
        _ if !exists => return findings,
        SentBy::NotHere => return findings,
        SentBy::Host(host) => sending_host(host, domain, *is_certain, lookups),
        SentBy::Elsewhere(text) => SendingHost::Elsewhere(text),
    };
    findings.push(judge_spf(domain, false, &lookups.ask(domain, Rtype::TXT), &sender));
    if let Some(at) = Domain::of_dns(&format!("_dmarc.{domain}")) {
        findings.push(judge_dmarc(&at, sender.passes(), &lookups.ask(&at, Rtype::TXT)));
    }
    findings
}

/// The records that a provider needs, in the form of a zone file: A and AAAA of the addresses of this machine that the world
/// may reach, or a comment in their place, SPF, PTR, and TLSA for `certificate`, that of `[tls]`.
pub(super) fn provider_records(hostname: &str, certificate: Option<&CertificateInfo>) -> Vec<String> {
    let Some(host) = Domain::parse(hostname) else { return Vec::new() };
    let own = world_addresses();
    let mut records: Vec<String> = own.iter().map(|address| address_line(&host, *address)).collect();
    if own.is_empty() {
        records.push(format!(
            "; {}   (the address at which the world reaches this machine)",
            zone_line(&host, "A", "...")
        ));
    }
    records.push(txt_line(&host, b"v=spf1 a -all"));
    if !own.is_empty() {
        records.push("; your Internet provider sets this:".to_owned());
        let pointer = |address: &IpAddr| zone_line(&reverse_name(*address), "PTR", &format!("{host}."));
        records.extend(own.iter().map(pointer));
    }
    let tlsa = tlsa_name(&host).and_then(|at| tlsa_line(&at, certificate?));
    records.extend(tlsa.into_iter().flat_map(|line| ["; only in a zone that is signed (DNSSEC):".to_owned(), line]));
    records
}

/// The MX records of a customer's domain as they are, and as they should be with the provider `host`; with `relays`, if
/// the provider sends mail of the domain, SPF and DMARC too. Lines for a person, the first with the name of the domain. If a
/// name server does not answer, a line reports it.
pub(super) fn domain_records(domain: &Domain, host: &str, relays: bool, lookups: &DnsLookups) -> Vec<String> {
    let Some(host) = Domain::parse(host) else { return Vec::new() };
    let known = KnownHost::look_up(&host, lookups);
    let sent_by = if relays { SentBy::Host(&known) } else { SentBy::NotHere };
    let plan = DomainPlan { domain, received_by: &known, is_certain: true, sent_by };
    lines(domain, &judge_domain(&plan, lookups), false).lines().map(str::to_owned).collect()
}
