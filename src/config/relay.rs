//! Mail that goes out: `[relay]` of a provider, and what a customer's `[outgoing]` shares with it, the host that
//! takes all mail and the times of trying again (RFC 5321 section 4.5.4.1).

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use toml::Spanned;

use super::value::{AccountName, Checked, DelayWarning, HostPort, Pin, Port, ResolverAddress, Secret, WholeNumber};
use super::{ConfigError, Source, TlsMode, secret, trust, twice};
use crate::mail::address::Domain;

/// `[relay]`: how a provider sends the mail on that its customers hand in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RelayConfig {
    /// The one host that takes all mail; none, the default: the MX hosts of each domain (RFC 5321 section 5.1).
    pub smarthost: Option<Smarthost>,
    /// TLS to MX hosts; a smarthost has its own. Default: when it is offered.
    pub tls: TlsPolicy,
    /// The same for some domains of recipients; a subdomain is another domain.
    pub tls_for: HashMap<Domain, TlsPolicy>,
    /// The DNS server to ask; none, the default: those of `/etc/resolv.conf`.
    pub resolver: Option<SocketAddr>,
    /// The port of MX hosts. Default 25; another is for tests.
    pub port: u16,
    /// Connections at once, to all hosts, each with a thread. Default 20; 1 to 1000.
    pub connections: usize,
    /// Connections at once to one host. Default 5; at least 1.
    pub connections_per_host: usize,
    pub retry: Retry,
}

impl RelayConfig {
    /// What mail for this domain asks of an MX host.
    pub fn policy(&self, domain: &Domain) -> TlsPolicy {
        self.tls_for.get(domain).copied().unwrap_or(self.tls)
    }

    pub(super) fn build(source: &Source, raw: RawRelay) -> Result<RelayConfig, ConfigError> {
        let smarthost = SmarthostAddress {
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
        let default = RelayConfig::default();
        Ok(RelayConfig {
            smarthost: smarthost.build(source, None)?,
            tls: raw.tls.map_or(default.tls, |tls| tls.0),
            tls_for: policies(source, raw.tls_for)?,
            resolver: raw.resolver.map(|resolver| resolver.0.0),
            port: raw.port.map_or(default.port, |port| port.0.0),
            connections: raw.connections.map_or(default.connections, |connections| connections.0),
            connections_per_host: raw.connections_per_host.map_or(default.connections_per_host, |most| most.0),
            retry: Retry::build(source, raw.retry_first, raw.retry_max, raw.give_up, raw.delay_notice)?,
        })
    }
}

impl Default for RelayConfig {
    fn default() -> RelayConfig {
        RelayConfig {
            smarthost: None,
            tls: TlsPolicy::default(),
            tls_for: HashMap::new(),
            resolver: None,
            port: 25,
            connections: 20,
            connections_per_host: 5,
            retry: Retry::default(),
        }
    }
}

/// How much TLS mail for a domain asks of the MX host that takes it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum TlsPolicy {
    /// STARTTLS when it is offered, with any certificate; else without (RFC 7435).
    #[default]
    May,
    /// STARTTLS, with any certificate; without it the mail waits.
    Must,
    /// STARTTLS, with a certificate for the host's name that the system's authorities signed; else the mail waits.
    Verify,
}

/// A host that takes all mail that goes out, and as whom to call it.
#[derive(Clone, PartialEq, Eq)]
pub struct Smarthost {
    /// What to connect to: `host:port`, `192.0.2.1:port` or `[2001:db8::1]:port`. The default port is 587.
    pub address: String,
    /// The host of it, without brackets: the name or address the certificate must carry.
    pub host: String,
    /// Default: STARTTLS.
    pub tls: TlsMode,
    /// A file with certificates, in PEM, that are believed instead of the system's. Absolute. Not with `pin`.
    pub ca: Option<PathBuf>,
    /// The SHA-256 of the one certificate that is believed. Not with `ca`.
    pub pin: Option<[u8; 32]>,
    /// The login name and the secret, both never empty; none: without AUTH.
    pub credentials: Option<(String, Vec<u8>)>,
}

impl fmt::Debug for Smarthost {
    /// Without the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Smarthost")
            .field("address", &self.address)
            .field("tls", &self.tls)
            .field("ca", &self.ca)
            .field("pin", &self.pin)
            .field("name", &self.credentials.as_ref().map(|(name, _)| name))
            .finish_non_exhaustive()
    }
}

/// When a letter that could not be sent is tried again, and for how long.
/// RFC 5321 section 4.5.4.1 wants half an hour between tries after the first two, and at least four to five days.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Retry {
    /// From the first failure to the next try; from then on it grows. Default 5 min.
    pub first: Duration,
    /// It grows to this. Default 4 h, or half of `give_up` where that is not more than 4 h. At least `first`.
    pub max: Duration,
    /// So old a letter goes back to its sender. Default 5 days. More than `max`.
    pub give_up: Duration,
    /// So old a letter makes its sender hear that it is still waiting, once; none: never. Default 4 h.
    pub delay_notice: Option<Duration>,
}

/// What is due later than this is taken for put off by a clock that went wrong.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(30 * 24 * 60 * 60);

impl Retry {
    /// Times that are not written give way to those that are.
    pub(super) fn build(
        source: &Source,
        first: Option<Spanned<Checked<Duration>>>,
        max: Option<Spanned<Checked<Duration>>>,
        give_up: Option<Checked<Duration>>,
        delay_notice: Option<Checked<DelayWarning>>,
    ) -> Result<Retry, ConfigError> {
        let default = Retry::default();
        let first_at = first.as_ref().map(Spanned::span);
        let max_at = max.as_ref().map(Spanned::span);
        let give_up = give_up.map_or(default.give_up, |time| time.0);
        let max = max
            .map_or_else(|| if default.max < give_up { default.max } else { give_up / 2 }, |time| time.into_inner().0);
        let first = first.map_or_else(|| default.first.min(max), |time| time.into_inner().0);
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
        Ok(Retry { first, max, give_up, delay_notice: delay_notice.map_or(default.delay_notice, |notice| notice.0.0) })
    }
}

impl Default for Retry {
    fn default() -> Retry {
        let hours = |hours: u64| Duration::from_secs(hours * 60 * 60);
        Retry {
            first: Duration::from_secs(5 * 60),
            max: hours(4),
            give_up: hours(5 * 24),
            delay_notice: Some(hours(4)),
        }
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

/// What a table says about a smarthost, and by which keys.
pub(super) struct SmarthostAddress {
    pub(super) key: &'static str,
    pub(super) tls_key: &'static str,
    pub(super) address: Option<Checked<HostPort<587>>>,
    pub(super) tls: Option<Spanned<Checked<TlsMode>>>,
    pub(super) ca: Option<Spanned<Checked<PathBuf>>>,
    pub(super) pin: Option<Spanned<Checked<Pin>>>,
    pub(super) name: Option<Spanned<Checked<AccountName>>>,
    pub(super) secret: Option<Spanned<Checked<Secret>>>,
    pub(super) secret_file: Option<Spanned<Checked<PathBuf>>>,
}

impl SmarthostAddress {
    /// The host, if there is one; `login` is for one that names none of its own.
    pub(super) fn build(
        self,
        source: &Source,
        login: Option<(String, Vec<u8>)>,
    ) -> Result<Option<Smarthost>, ConfigError> {
        let Some(Checked(HostPort { address, host })) = self.address else {
            return match self.first_key() {
                None => Ok(None),
                Some((key, at)) => {
                    let host = self.key;
                    let text = format!("`{key}` is for `{host}`, and there is none: add `{host}`, or take this out");
                    Err(source.error(at, text))
                }
            };
        };
        let tls = self.tls.map_or(TlsMode::default(), |tls| tls.into_inner().0);
        let (ca, pin) = trust(source, self.tls_key, tls, self.ca, self.pin)?;
        let credentials = credentials(source, self.name, self.secret, self.secret_file)?.or(login);
        Ok(Some(Smarthost { address, host, tls, ca, pin, credentials }))
    }

    /// A key that says something about the host, and where.
    fn first_key(&self) -> Option<(&'static str, Range<usize>)> {
        let keys = [
            (self.tls_key, self.tls.as_ref().map(Spanned::span)),
            ("ca", self.ca.as_ref().map(Spanned::span)),
            ("pin", self.pin.as_ref().map(Spanned::span)),
            ("name", self.name.as_ref().map(Spanned::span)),
            ("secret", self.secret.as_ref().map(Spanned::span)),
            ("secret-file", self.secret_file.as_ref().map(Spanned::span)),
        ];
        keys.into_iter().find_map(|(key, at)| Some((key, at?)))
    }
}

/// Name and secret, or neither of them.
fn credentials(
    source: &Source,
    name: Option<Spanned<Checked<AccountName>>>,
    inline: Option<Spanned<Checked<Secret>>>,
    file: Option<Spanned<Checked<PathBuf>>>,
) -> Result<Option<(String, Vec<u8>)>, ConfigError> {
    let alone = inline.as_ref().map(Spanned::span).or_else(|| file.as_ref().map(Spanned::span));
    match (name, alone) {
        (None, None) => Ok(None),
        (None, at) => {
            let text = "there is a secret and no `name` to log in with: add `name`, or take the secret out";
            Err(source.error(at, text))
        }
        (Some(name), _) => {
            let secret = secret(source, inline, file, Some(name.span()))?;
            Ok(Some((name.into_inner().0.0, secret)))
        }
    }
}

fn policies(
    source: &Source,
    written: BTreeMap<Spanned<String>, Checked<TlsPolicy>>,
) -> Result<HashMap<Domain, TlsPolicy>, ConfigError> {
    let mut policies = HashMap::with_capacity(written.len());
    for (key, policy) in written {
        // Any domain will do here, also one without a dot: it is where the mail goes, and nobody's ATRN.
        let domain = Domain::parse(key.as_ref()).ok_or_else(|| {
            let text = format!("{:?} is no domain: write one such as \"example.org\"", key.as_ref());
            source.error(key.span(), text)
        })?;
        if policies.contains_key(&domain) {
            return Err(source.error(key.span(), twice(&domain)));
        }
        policies.insert(domain, policy.0);
    }
    Ok(policies)
}
