//! A customer's file (RFC 2645 section 5.2): where it calls, for whom it takes mail, and how its own mail goes out.

use std::collections::HashSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use toml::Spanned;

use super::relay::{Retry, Smarthost, Target};
use super::value::{Address, Entry, Hostname, MAX_SIZE, Name, Network, Notice, Pin, Secret, Size, duration};
use super::{
    ConfigError, Kind, Limits, Source, Timeouts, TlsMode, addresses, each_once, hostname, listeners, secret, trust,
    twice,
};
use crate::smtp::address::{Domain, Mailbox};

/// The side that fetches its mail.
#[derive(Clone, Debug)]
pub struct Customer {
    /// The name it greets with. ASCII; the case is as written.
    pub hostname: String,
    pub provider: Upstream,
    pub mailboxes: Mailboxes,
    /// None: this customer sends no mail.
    pub outgoing: Option<Outgoing>,
    pub schedule: Schedule,
    pub limits: Limits,
    pub timeouts: Timeouts,
}

impl Customer {
    pub fn load(path: &Path) -> Result<Customer, ConfigError> {
        Customer::of(&Source::read(path)?)
    }

    fn of(source: &Source) -> Result<Customer, ConfigError> {
        match source.kind()? {
            Some(Kind::Customer) | None => Customer::build(source),
            Some(Kind::Provider) => Err(source.error(
                None,
                "is a provider's file (it has `spool` or `customers`), for `odmr serve`; a customer's has [provider]",
            )),
        }
    }

    /// Reads a customer's file for a user who hands in mail: without the files that hold secrets, which that user
    /// may not be able to read.
    pub fn load_to_send(path: &Path) -> Result<Customer, ConfigError> {
        Customer::of(&Source { secrets: false, ..Source::read(path)? })
    }

    pub(super) fn build(source: &Source) -> Result<Customer, ConfigError> {
        let raw: RawCustomer = source.parse()?;
        let hostname = hostname(source, raw.hostname)?;
        let provider = raw.provider.ok_or_else(|| {
            let text = "[provider] is missing: the table with `address`, `name` and `secret`";
            source.error(None, text)
        })?;
        let provider = Upstream::build(source, provider)?;
        let mailboxes = raw.mailboxes.ok_or_else(|| {
            let text = "[mailboxes] is missing: the table with `root` and `accept`, where mail goes and for whom \
                        it is taken";
            source.error(None, text)
        })?;
        let mailboxes = Mailboxes::build(source, mailboxes, &provider.domains)?;
        let outgoing = raw.outgoing.map(|raw| Outgoing::build(source, raw, &provider, &mailboxes)).transpose()?;
        Ok(Customer {
            hostname,
            provider,
            mailboxes,
            outgoing,
            schedule: raw.schedule,
            limits: raw.limits,
            timeouts: raw.timeouts,
        })
    }
}

/// `[provider]`: where a customer calls, and as whom.
#[derive(Clone)]
pub struct Upstream {
    /// What to connect to: `host:port`, `192.0.2.1:port` or `[2001:db8::1]:port`.
    pub address: String,
    /// The host of it, without brackets: the name or address the certificate must carry.
    pub host: String,
    /// Default: STARTTLS.
    pub tls: TlsMode,
    /// A file with certificates, in PEM, that are believed instead of the system's. Absolute. Not with `pin`.
    pub ca: Option<PathBuf>,
    /// The SHA-256 of the one certificate that is believed. Not with `ca`.
    pub pin: Option<[u8; 32]>,
    /// The login name.
    pub name: String,
    /// Never empty.
    pub secret: Vec<u8>,
    /// The domains to ask for; none: all that the account has (RFC 2645 section 5.2.1).
    pub domains: Vec<Domain>,
}

impl Upstream {
    fn build(source: &Source, raw: Spanned<RawUpstream>) -> Result<Upstream, ConfigError> {
        let table = raw.span();
        let missing = |text: &str| source.error(table.clone(), format!("[provider] needs {text}"));
        let raw = raw.into_inner();
        let address = raw.address.ok_or_else(|| {
            missing("`address`, the provider's host and port, such as address = \"relay.example.net:366\"")
        })?;
        let name = raw.name.ok_or_else(|| missing("`name`, the login name the provider gave you"))?;
        let tls = raw.tls.map_or(TlsMode::default(), |tls| tls.0);
        let (ca, pin) = trust(source, "tls", tls, raw.ca, raw.pin)?;
        let Address { address, host } = address.0;
        Ok(Upstream {
            address,
            host,
            tls,
            ca,
            pin,
            name: name.0.0,
            secret: secret(source, raw.secret, raw.secret_file, Some(table))?,
            domains: each_once(source, raw.domains)?,
        })
    }
}

impl fmt::Debug for Upstream {
    /// Without the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upstream")
            .field("address", &self.address)
            .field("tls", &self.tls)
            .field("ca", &self.ca)
            .field("pin", &self.pin)
            .field("name", &self.name)
            .field("domains", &self.domains)
            .finish_non_exhaustive()
    }
}

/// `[mailboxes]`: for whom a customer takes mail, and where it goes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mailboxes {
    /// Under it stand the Maildirs, `root/<domain>/<local part>/`. Absolute.
    pub root: PathBuf,
    /// At least one, none twice.
    pub accept: Vec<Accept>,
    /// The largest letter taken, in octets as they are on the wire; default 50 MiB.
    pub max_size: u64,
}

/// Recipients that exist.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Accept {
    /// `alice@example.org`; its host is a domain.
    Address(Mailbox),
    /// `@example.org`: whoever it is in this domain.
    Domain(Domain),
}

impl Mailboxes {
    fn build(source: &Source, raw: Spanned<RawMailboxes>, domains: &[Domain]) -> Result<Mailboxes, ConfigError> {
        let table = raw.span();
        let missing = |text: &str| source.error(table.clone(), format!("[mailboxes] needs {text}"));
        let raw = raw.into_inner();
        let root = raw
            .root
            .ok_or_else(|| missing("`root`, the directory of the Maildirs, such as root = \"/var/mail/odmr\""))?;
        let mut accept = Vec::with_capacity(raw.accept.len());
        let mut seen = HashSet::new();
        for entry in raw.accept {
            let span = entry.span();
            let entry = entry.into_inner().0;
            let written = entry.to_string();
            // Two that differ in case alone would be two mailboxes nobody can tell apart.
            if !seen.insert(written.to_lowercase()) {
                return Err(source.error(span, twice(&written)));
            }
            if !domains.is_empty() && entry.domain().is_none_or(|domain| !domains.contains(domain)) {
                let text = format!(
                    "{written} can get no mail, as its domain is not in the `domains` of [provider]: add it \
                     there, or leave `domains` empty to ask for all"
                );
                return Err(source.error(span, text));
            }
            accept.push(entry);
        }
        if accept.is_empty() {
            return Err(missing(
                "`accept`, the addresses that exist, such as accept = [\"alice@example.org\"], or \
                 [\"@example.org\"] for a whole domain",
            ));
        }
        Ok(Mailboxes { root: source.beside(&root.0), accept, max_size: raw.max_size.map_or(MAX_SIZE, |size| size.0.0) })
    }
}

impl Accept {
    fn domain(&self) -> Option<&Domain> {
        match self {
            Accept::Address(mailbox) => mailbox.domain(),
            Accept::Domain(domain) => Some(domain),
        }
    }
}

impl fmt::Display for Accept {
    /// As it is written in the file.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Accept::Address(mailbox) => mailbox.fmt(f),
            Accept::Domain(domain) => write!(f, "@{domain}"),
        }
    }
}

/// `[outgoing]`: how a customer takes mail from its own machines, and sends it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Outgoing {
    /// Under it stands the mail that waits. Absolute.
    pub queue: PathBuf,
    /// Where `pull --daemon` takes mail. Default: nowhere.
    pub listen: Vec<SocketAddr>,
    /// Who may hand in mail there, besides this machine. Default: nobody.
    pub networks: Vec<Network>,
    /// Makes bare names into addresses, and stands in a `From:` that is missing. Default: the first domain of
    /// `accept`.
    pub domain: Domain,
    /// Takes the mail where the provider's port for ATRN does not. It is called with the provider's name and secret
    /// where it has none of its own. Default: none.
    pub submission: Option<Smarthost>,
    /// `give-up` and `delay-notice`; the others as they are by default.
    pub retry: Retry,
    /// The largest letter taken, in octets as they are on the wire; default 50 MiB.
    pub max_size: u64,
}

impl Outgoing {
    /// Whether this machine may hand in mail: this very machine, or one of `networks`.
    pub fn admits(&self, address: IpAddr) -> bool {
        address.to_canonical().is_loopback() || self.networks.iter().any(|network| network.contains(address))
    }

    fn build(
        source: &Source,
        raw: Spanned<RawOutgoing>,
        provider: &Upstream,
        mailboxes: &Mailboxes,
    ) -> Result<Outgoing, ConfigError> {
        let table = raw.span();
        let missing = |text: &str| source.error(table.clone(), format!("[outgoing] needs {text}"));
        let raw = raw.into_inner();
        let queue = raw.queue.ok_or_else(|| {
            missing("`queue`, the directory for the mail that waits, such as queue = \"/var/spool/odmr-out\"")
        })?;
        listeners(source, [Some(raw.listen.as_slice())])?;
        let domain = raw.domain.map(|domain| domain.0);
        let domain = domain.or_else(|| mailboxes.accept.iter().find_map(Accept::domain).cloned());
        let domain = domain.ok_or_else(|| missing("`domain`, for bare names, such as domain = \"example.org\""))?;
        let submission = Target {
            key: "submission",
            tls_key: "submission-tls",
            address: raw.submission,
            tls: raw.submission_tls,
            ca: raw.ca,
            pin: raw.pin,
            name: raw.name,
            secret: raw.secret,
            secret_file: raw.secret_file,
        };
        Ok(Outgoing {
            queue: source.beside(&queue.0),
            listen: addresses(Some(raw.listen), 0),
            networks: raw.networks.into_iter().map(|network| network.0).collect(),
            domain,
            submission: submission.build(source, Some((provider.name.clone(), provider.secret.clone())))?,
            retry: Retry::build(source, None, None, raw.give_up, raw.delay_notice)?,
            max_size: raw.max_size.map_or(MAX_SIZE, |size| size.0.0),
        })
    }
}

/// `[schedule]`: when `pull --daemon` calls.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table", rename_all = "kebab-case")]
pub struct Schedule {
    /// From one call to the next. Default 15 min.
    #[serde(deserialize_with = "duration")]
    pub every: Duration,
}

impl Default for Schedule {
    fn default() -> Schedule {
        Schedule { every: Duration::from_secs(15 * 60) }
    }
}

// The file as it is written. Whatever must be there is optional here, so that the error can say what it is for.

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table", rename_all = "kebab-case")]
struct RawCustomer {
    hostname: Option<Entry<Hostname>>,
    provider: Option<Spanned<RawUpstream>>,
    mailboxes: Option<Spanned<RawMailboxes>>,
    outgoing: Option<Spanned<RawOutgoing>>,
    #[serde(default)]
    schedule: Schedule,
    #[serde(default)]
    limits: Limits,
    #[serde(default)]
    timeouts: Timeouts,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table", rename_all = "kebab-case")]
struct RawUpstream {
    // RFC 2645 section 4.
    address: Option<Entry<Address<366>>>,
    tls: Option<Entry<TlsMode>>,
    ca: Option<Spanned<Entry<PathBuf>>>,
    pin: Option<Spanned<Entry<Pin>>>,
    name: Option<Entry<Name>>,
    secret: Option<Spanned<Entry<Secret>>>,
    secret_file: Option<Spanned<Entry<PathBuf>>>,
    #[serde(default)]
    domains: Vec<Spanned<Entry<Domain>>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table", rename_all = "kebab-case")]
struct RawMailboxes {
    root: Option<Entry<PathBuf>>,
    #[serde(default)]
    accept: Vec<Spanned<Entry<Accept>>>,
    max_size: Option<Entry<Size>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table", rename_all = "kebab-case")]
struct RawOutgoing {
    queue: Option<Entry<PathBuf>>,
    #[serde(default)]
    listen: Vec<Spanned<Entry<SocketAddr>>>,
    #[serde(default)]
    networks: Vec<Entry<Network>>,
    domain: Option<Entry<Domain>>,
    submission: Option<Entry<Address<587>>>,
    submission_tls: Option<Spanned<Entry<TlsMode>>>,
    ca: Option<Spanned<Entry<PathBuf>>>,
    pin: Option<Spanned<Entry<Pin>>>,
    name: Option<Spanned<Entry<Name>>>,
    secret: Option<Spanned<Entry<Secret>>>,
    secret_file: Option<Spanned<Entry<PathBuf>>>,
    give_up: Option<Entry<Duration>>,
    delay_notice: Option<Entry<Notice>>,
    max_size: Option<Entry<Size>>,
}
