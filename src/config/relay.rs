//! Outgoing mail: `[relay]` of a provider, and the times between attempts, which a customer's `[outgoing]` has too (RFC
//! 5321 section 4.5.4.1).

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use toml::Spanned;

use super::lists::duplicate;
use super::remote::OptionalRemoteTable;
use super::source::{ConfigError, Source};
use super::value::{
    AccountName, Checked, DelayWarning, HostPort, Parse, Pin, Port, ResolverAddress, Secret, WholeNumber,
};
use crate::mail::address::Domain;
use crate::queue::retry::{LONGEST_PAUSE, Retry};
use crate::session::{RemoteSettings, TlsMode};

/// `[relay]`: how a provider sends the mail that its customers submit.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RelayConfig {
    /// The host that all mail is sent to, port 587 by default; `None`, the default: the MX hosts of each domain (RFC 5321
    /// section 5.1).
    pub smarthost: Option<RemoteSettings>,
    /// TLS to MX hosts; a smarthost has a setting of its own. Default: if they offer it.
    pub tls: TlsPolicy,
    /// TLS to the MX hosts of single domains; a subdomain is another domain.
    pub tls_for: HashMap<Domain, TlsPolicy>,
    /// The DNS server to query; `None`, the default: those of `/etc/resolv.conf`.
    pub resolver: Option<SocketAddr>,
    /// The port of MX hosts. Default 25; others are for tests.
    pub port: u16,
    /// Concurrent connections to all hosts, each with a thread. Default 20; 1 to 1000.
    pub connections: usize,
    /// Concurrent connections to one host. Default 5, at least 1.
    pub connections_per_host: usize,
    pub retry: Retry,
}

impl RelayConfig {
    /// The policy for the MX hosts of a domain.
    pub fn policy(&self, domain: &Domain) -> TlsPolicy {
        self.tls_for.get(domain).copied().unwrap_or(self.tls)
    }

    pub(super) fn build(source: &Source, raw: RawRelay) -> Result<RelayConfig, ConfigError> {
        let smarthost = OptionalRemoteTable {
            key: "smarthost",
            tls_key: "smarthost-tls",
            address: raw.smarthost,
            tls: raw.smarthost_tls,
            ca: raw.ca,
            pin: raw.pin,
            name: raw.name,
            secret: raw.secret,
            secret_file: raw.secret_file,
        };
        let retry = RetryTimes {
            first: raw.retry_first,
            max: raw.retry_max,
            give_up: raw.give_up,
            delay_notice: raw.delay_notice,
        };
        Ok(RelayConfig {
            smarthost: smarthost.build(source, None)?,
            tls: raw.tls.map_or(TlsPolicy::default(), |tls| tls.0),
            tls_for: policies(source, raw.tls_for)?,
            resolver: raw.resolver.map(|resolver| resolver.0.0),
            port: raw.port.map_or(25, |port| port.0.0),
            connections: raw.connections.map_or(20, |connections| connections.0),
            connections_per_host: raw.connections_per_host.map_or(5, |connections| connections.0),
            retry: retry.build(source)?,
        })
    }
}

/// Whether mail may be sent to an MX host without TLS, or without a valid certificate.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum TlsPolicy {
    /// STARTTLS if the host offers it, with any certificate; else without TLS (RFC 7435).
    #[default]
    May,
    /// STARTTLS, with any certificate; else the mail is deferred.
    Must,
    /// STARTTLS, with a certificate for the host's name that an authority of the system signed; else the mail is
    /// deferred.
    Verify,
}

impl Parse for TlsPolicy {
    const EXPECTED: &'static str = "\"may\", \"must\" or \"verify\"";

    fn parse(text: &str) -> Result<TlsPolicy, String> {
        match text {
            "may" => Ok(TlsPolicy::May),
            "must" => Ok(TlsPolicy::Must),
            "verify" => Ok(TlsPolicy::Verify),
            _ => Err(format!("{text:?} says nothing about TLS: write {}", TlsPolicy::EXPECTED)),
        }
    }
}

/// The times of a table. The default of one that is not written adapts to those that are.
#[derive(Default)]
pub(super) struct RetryTimes {
    pub(super) first: Option<Spanned<Checked<Duration>>>,
    pub(super) max: Option<Spanned<Checked<Duration>>>,
    pub(super) give_up: Option<Checked<Duration>>,
    pub(super) delay_notice: Option<Checked<DelayWarning>>,
}

impl RetryTimes {
    pub(super) fn build(self, source: &Source) -> Result<Retry, ConfigError> {
        let default = Retry::default();
        let first_at = self.first.as_ref().map(Spanned::span);
        let max_at = self.max.as_ref().map(Spanned::span);
        let give_up = self.give_up.map_or(default.give_up, |time| time.0);
        let default_max = if default.max < give_up { default.max } else { give_up / 2 };
        let max = self.max.map_or(default_max, |time| time.into_inner().0);
        let first = self.first.map_or_else(|| default.first.min(max), |time| time.into_inner().0);
        if max > LONGEST_PAUSE {
            let text = "`retry-max` must not be longer than \"30d\": write less";
            return Err(source.error(max_at, text));
        }
        if max >= give_up {
            let text = "`retry-max` must be shorter than `give-up`, which is \"5d\" by default: write less here, or \
                        more there";
            return Err(source.error(max_at, text));
        }
        if first > max {
            let text = "`retry-first` must not be longer than `retry-max`, which is \"4h\" by default and less when \
                        `give-up` is: write less here, or more there";
            return Err(source.error(first_at, text));
        }
        let delay_notice = self.delay_notice.map_or(default.delay_notice, |notice| notice.0.0);
        Ok(Retry { first, max, give_up, delay_notice })
    }
}

// The table as it is written.

#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields, expecting = "a table", rename_all = "kebab-case")]
pub(super) struct RawRelay {
    smarthost: Option<Checked<HostPort<587>>>,
    smarthost_tls: Option<Spanned<Checked<TlsMode>>>,
    ca: Option<Spanned<Checked<PathBuf>>>,
    pin: Option<Spanned<Checked<Pin>>>,
    name: Option<Spanned<Checked<AccountName>>>,
    secret: Option<Spanned<Checked<Secret>>>,
    secret_file: Option<Spanned<Checked<PathBuf>>>,
    tls: Option<Checked<TlsPolicy>>,
    tls_for: BTreeMap<Spanned<String>, Checked<TlsPolicy>>,
    resolver: Option<Checked<ResolverAddress>>,
    port: Option<Checked<Port>>,
    connections: Option<WholeNumber<1, 1000>>,
    connections_per_host: Option<WholeNumber<1, { u32::MAX }>>,
    retry_first: Option<Spanned<Checked<Duration>>>,
    retry_max: Option<Spanned<Checked<Duration>>>,
    give_up: Option<Checked<Duration>>,
    delay_notice: Option<Checked<DelayWarning>>,
}

fn policies(
    source: &Source, written: BTreeMap<Spanned<String>, Checked<TlsPolicy>>,
) -> Result<HashMap<Domain, TlsPolicy>, ConfigError> {
    let mut policies = HashMap::with_capacity(written.len());
    for (key, policy) in written {
        // Unlike a domain of ATRN, one that mail is sent to may have no dot.
        let domain = Domain::parse(key.as_ref()).ok_or_else(|| {
            let text = format!("{:?} is no domain: write one such as \"example.org\"", key.as_ref());
            source.error(key.span(), text)
        })?;
        if policies.contains_key(&domain) {
            return Err(source.error(key.span(), duplicate(&domain)));
        }
        policies.insert(domain, policy.0);
    }
    Ok(policies)
}
