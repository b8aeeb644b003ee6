//! `[relay]` of a provider: how it sends its customers' mail. The times between attempts (RFC 5321 section 4.5.4.1), of
//! which a customer's `[outgoing]` has some too.

use std::collections::HashMap;
use std::net::SocketAddr;

use super::remote::optional_remote;
use super::table::Table;
use super::value::{DURATION, Flag, NEVER_OR_LATER, PORT_NUMBER, RESOLVER, Text, WITHOUT_8BITMIME, domain_elsewhere};
use crate::mail::address::Domain;
use crate::queue::retry::{LONGEST_PAUSE, Retry};
use crate::recipients::ConfigError;
use crate::session::RemoteSettings;
use crate::smtp::client::Without8BitMime;

/// `[relay]`: how a provider sends the mail that its customers submit.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RelayConfig {
    /// The host that all mail is sent to, port 587 by default; `None`, the default: the MX hosts of each domain (RFC 5321
    /// section 5.1).
    pub smarthost: Option<RemoteSettings>,
    /// TLS to MX hosts; a smarthost has its own setting. Default: if the host offers it.
    pub tls: TlsPolicy,
    /// TLS to the MX hosts of single domains; a subdomain is another domain.
    pub tls_for: HashMap<Domain, TlsPolicy>,
    /// The DNS server to query; `None`, the default: those of `/etc/resolv.conf`.
    pub resolver: Option<SocketAddr>,
    /// The port of MX hosts, from 1 on. Default 25; other ports are for tests.
    pub port: u16,
    /// Whether MX hosts may have private addresses, or addresses of this machine. Default: false, the relay skips such
    /// addresses.
    pub allow_private: bool,
    /// Concurrent connections to all hosts, each with a thread. Default 20; 1 to 1000.
    pub connections: usize,
    /// Concurrent connections to one host. Default 5, at least 1.
    pub connections_per_host: usize,
    /// Whether 8-bit content is sent to a host that does not offer 8BITMIME. Default: it is.
    pub without_8bitmime: Without8BitMime,
    pub retry: Retry,
}

impl RelayConfig {
    /// The policy for the MX hosts of a domain.
    pub fn policy(&self, domain: &Domain) -> TlsPolicy {
        self.tls_for.get(domain).copied().unwrap_or(self.tls)
    }

    /// The table `[relay]` of a file.
    pub(super) fn build(file: &mut Table<'_>) -> Result<RelayConfig, ConfigError> {
        let mut table = file.table_or_empty("relay", &RELAY_KEYS);
        let smarthost = optional_remote(&mut table, "smarthost", "smarthost-tls", None);
        let smarthost = table.file.note(smarthost);
        let tls = table.or("tls", TLS_POLICY, TlsPolicy::default());
        let tls_for = policies(&mut table);
        let tls_for = table.file.note(tls_for);
        Ok(RelayConfig {
            tls,
            resolver: table.optional("resolver", RESOLVER),
            port: table.or("port", PORT_NUMBER, 25),
            allow_private: table.or("allow-private", Flag, false),
            connections: table.or("connections", 1..=1000, 20),
            connections_per_host: table.or("connections-per-host", 1..=u32::MAX, 5),
            without_8bitmime: table.or("without-8bitmime", WITHOUT_8BITMIME, Without8BitMime::default()),
            retry: retry_times(&mut table)?,
            smarthost: smarthost?,
            tls_for: tls_for?,
        })
    }
}

#[rustfmt::skip]
const RELAY_KEYS: [&str; 22] = [
    "smarthost", "smarthost-tls", "ca", "pin", "certificate", "key", "name", "secret", "secret-file", "mechanisms", "tls", "tls-for",
    "resolver", "port", "allow-private", "connections", "connections-per-host", "without-8bitmime", "retry-first", "retry-max", "give-up",
    "delay-warning",
];

/// Whether the relay sends mail to an MX host without TLS, or to one without a valid certificate.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum TlsPolicy {
    /// STARTTLS with any certificate if the host offers it; otherwise without TLS (RFC 7435).
    #[default]
    May,
    /// STARTTLS with any certificate; otherwise the mail is deferred.
    Must,
    /// STARTTLS with a certificate for the host's name, signed by an authority of the system; otherwise the mail is
    /// deferred.
    Verify,
}

const TLS_POLICIES: &str = "\"may\", \"must\" or \"verify\"";

const TLS_POLICY: Text<TlsPolicy> = Text::new(TLS_POLICIES, |text| match text {
    "may" => Ok(TlsPolicy::May),
    "must" => Ok(TlsPolicy::Must),
    "verify" => Ok(TlsPolicy::Verify),
    _ => Err(format!("{text:?} is not a valid TLS policy: write {TLS_POLICIES}")),
});

/// Reads the times between attempts from a table that may have some of the keys. If one is not written, its default fits
/// those that are.
pub(super) fn retry_times(table: &mut Table<'_>) -> Result<Retry, ConfigError> {
    let default = Retry::default();
    let (first_line, max_line) = (table.line_of("retry-first"), table.line_of("retry-max"));
    let delay_warning = table.or("delay-warning", NEVER_OR_LATER, default.delay_warning);
    let give_up = table.get("give-up", DURATION);
    let (max, first) = (table.get("retry-max", DURATION), table.get("retry-first", DURATION));
    let give_up = give_up?.unwrap_or(default.give_up);
    let max = max?.unwrap_or(if default.max < give_up { default.max } else { give_up / 2 });
    let first = first?.unwrap_or(default.first.min(max));
    if max > LONGEST_PAUSE {
        return Err(max_line.error("`retry-max` must not be longer than \"30d\": write less"));
    }
    if max >= give_up {
        let text = "`retry-max` must be shorter than `give-up`, which is \"5d\" by default: write less here, or more \
                    there";
        return Err(max_line.error(text));
    }
    if first > max {
        let text = "`retry-first` must not be longer than `retry-max`, which is \"4h\" by default and less when \
                    `give-up` is: write less here, or more there";
        return Err(first_line.error(text));
    }
    Ok(Retry { first, max, give_up, delay_warning })
}

/// The table `tls-for`.
fn policies(table: &mut Table<'_>) -> Result<HashMap<Domain, TlsPolicy>, ConfigError> {
    let mut policies = HashMap::new();
    for (key, policy) in table.entries("tls-for")? {
        // Unlike a domain of ATRN, a domain that mail is sent to may lack a dot.
        let domain = domain_elsewhere(&key.value).ok_or_else(|| {
            key.source.error(format!("{:?} is not a valid domain: write one such as \"example.org\"", key.value))
        })?;
        if policies.insert(domain.clone(), policy.read(&TLS_POLICY)?.value).is_some() {
            return Err(key.source.duplicate(domain));
        }
    }
    Ok(policies)
}
