//! A customer's file (RFC 2645 section 5.2): which providers it calls, and how its users submit mail.

use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use toml::Spanned;

use super::limits::{RawLimits, RawTimeouts};
use super::lists::{addresses, check_listeners, unique_domains};
use super::mailboxes::{MailboxesConfig, RawMailboxes};
use super::relay::RetryTimes;
use super::remote::{OptionalRemoteTable, RemoteTable, secret};
use super::schedule::ScheduleTable;
use super::shape::{Many, OneOrMany, Shape, each};
use super::source::{ConfigError, FileKind, Source};
use super::value::{
    AccountName, Checked, DelayWarning, HostPort, Hostname, MAX_SIZE, Network, OctetCount, Pin, Secret, SystemName,
    hostname,
};
use crate::mail::address::Domain;
use crate::queue::retry::Retry;
use crate::schedule::Schedule;
use crate::session::{Limits, RemoteSettings, Timeouts, TlsMode};

/// The configuration of the side that fetches its mail.
#[derive(Clone, Debug)]
pub struct CustomerConfig {
    /// The name in its greeting and EHLO. ASCII, in the case of the file.
    pub hostname: String,
    /// The user that a process becomes before it touches mail, if it was started as root; `None`: it stays root.
    pub owner: Option<MailOwner>,
    /// At least one, in the order of the file; no two have the same address and name.
    pub providers: Vec<ProviderAccount>,
    pub mailboxes: MailboxesConfig,
    /// `None`: this customer sends no mail.
    pub outgoing: Option<OutgoingConfig>,
    pub limits: Limits,
    pub timeouts: Timeouts,
}

impl CustomerConfig {
    pub fn load(path: &Path) -> Result<CustomerConfig, ConfigError> {
        CustomerConfig::of(&Source::read(path)?)
    }

    fn of(source: &Source) -> Result<CustomerConfig, ConfigError> {
        match source.kind()? {
            Some(FileKind::Customer) | None => CustomerConfig::build(source),
            Some(FileKind::Provider) => Err(source.error(
                None,
                "is a provider's file (it has `spool` or `customers`), for `odmr serve`; a customer's has [provider]",
            )),
        }
    }

    /// Reads a customer's file for a user who submits mail, but not the files with secrets, which that user may not be
    /// able to read: those secrets are empty.
    pub fn load_to_send(path: &Path) -> Result<CustomerConfig, ConfigError> {
        let mut source = Source::read(path)?;
        source.reads_secrets = false;
        CustomerConfig::of(&source)
    }

    pub(super) fn build(source: &Source) -> Result<CustomerConfig, ConfigError> {
        let raw: RawCustomer = source.parse()?;
        let hostname = hostname(source, raw.hostname)?;
        let provider = raw.provider.ok_or_else(|| {
            let text = "[provider] is missing: the table with `address`, `name` and `secret`";
            source.error(None, text)
        })?;
        let providers = ProviderAccount::build_all(source, each(provider), &raw.schedule.0)?;
        // A provider that is asked for all domains may have mail for any domain.
        let all = providers.iter().any(|provider| provider.domains.is_empty());
        let domains: Vec<_> = providers.iter().filter(|_| !all).flat_map(|provider| provider.domains.clone()).collect();
        let mailboxes = raw.mailboxes.ok_or_else(|| {
            let text = "[mailboxes] is missing: the table with `root` and `accept`, where mail goes and for whom \
                        it is taken";
            source.error(None, text)
        })?;
        let mailboxes = MailboxesConfig::build(source, mailboxes, &domains)?;
        let sends_to = providers.iter().find(|provider| provider.outgoing);
        let outgoing = match (raw.outgoing, sends_to) {
            (Some(raw), Some(provider)) => Some(OutgoingConfig::build(source, raw, provider, &mailboxes, &hostname)?),
            (Some(raw), None) => {
                let text = "[outgoing] has nobody to take its mail, as every provider says `outgoing = false`: take that \
                            out of one, or this table";
                return Err(source.error(raw.span(), text));
            }
            (None, _) => None,
        };
        let owner = match (raw.user, raw.group) {
            (None, None) => None,
            (None, Some(group)) => {
                let text = "`group` means nothing without `user`: say user = \"…\" too, or take it out";
                return Err(source.error(group.span(), text));
            }
            (Some(user), group) => {
                let place = source.error(user.span(), "");
                let group = group.map(|group| group.into_inner().0.0);
                Some(MailOwner { user: user.into_inner().0.0, group, place })
            }
        };
        Ok(CustomerConfig {
            hostname,
            owner,
            providers,
            mailboxes,
            outgoing,
            limits: raw.limits,
            timeouts: raw.timeouts,
        })
    }
}

/// `user` and `group`: who owns the mail.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MailOwner {
    pub user: String,
    /// The group of the files. Default: the primary group of the user.
    pub group: Option<String>,
    /// The error if there is no such user, without its text.
    place: ConfigError,
}

impl MailOwner {
    /// The error about the user or the group.
    pub fn error(&self, text: String) -> ConfigError {
        ConfigError { text, ..self.place.clone() }
    }
}

/// `[provider]`, or each `[[provider]]`: which provider a customer calls, with which account, and when.
#[derive(Clone, Debug)]
pub struct ProviderAccount {
    /// It always has credentials. The default port is 366 (RFC 2645 section 4).
    pub remote: RemoteSettings,
    /// The domains to ask for; empty: all of the account (RFC 2645 section 5.2.1).
    pub domains: Vec<Domain>,
    /// Whether outgoing mail is sent to it: true for one provider at most, by default the first.
    pub outgoing: bool,
    /// Its own schedule, or that of `[schedule]`.
    pub schedule: Schedule,
    /// The error if its certificates cannot be used, without its text.
    place: ConfigError,
}

impl ProviderAccount {
    /// The error about the certificates that are trusted.
    pub fn error(&self, text: &str) -> ConfigError {
        let way_out = match &self.remote.ca {
            Some(_) => "put the certificates there, or name others in `ca`",
            None => "name the certificates to believe in `ca`, or the one in `pin`",
        };
        ConfigError { text: format!("{text}: {way_out}"), ..self.place.clone() }
    }

    /// All providers of a file; `schedule`: the schedule of those without their own.
    fn build_all(
        source: &Source, tables: Vec<Spanned<RawProviderAccount>>, schedule: &Schedule,
    ) -> Result<Vec<ProviderAccount>, ConfigError> {
        let mut providers: Vec<ProviderAccount> = Vec::with_capacity(tables.len());
        let mut outgoing = None;
        for raw in tables {
            let (table, raw) = (raw.span(), raw.into_inner());
            let flag = raw.outgoing.as_ref().map(|flag| (*flag.get_ref(), flag.span()));
            let provider = ProviderAccount::build(source, table.clone(), raw, schedule)?;
            let remote = &provider.remote;
            let same =
                |other: &RemoteSettings| (&other.address, other.login_name()) == (&remote.address, remote.login_name());
            if providers.iter().any(|other| same(&other.remote)) {
                let text = format!(
                    "{} stands here a second time as {}: one table a provider and account, with all `domains`",
                    remote.address,
                    remote.login_name()
                );
                return Err(source.error(table, text));
            }
            if let Some((true, span)) = flag
                && outgoing.replace(providers.len()).is_some()
            {
                let text = "another provider takes the outgoing mail already: say `outgoing = true` in one table only";
                return Err(source.error(span, text));
            }
            providers.push(provider);
        }
        let first = providers.iter().position(|provider| provider.outgoing);
        for (number, provider) in providers.iter_mut().enumerate() {
            provider.outgoing = outgoing.or(first) == Some(number);
        }
        Ok(providers)
    }

    fn build(
        source: &Source, table: Range<usize>, raw: RawProviderAccount, schedule: &Schedule,
    ) -> Result<ProviderAccount, ConfigError> {
        let missing = |text: &str| source.error(table.clone(), format!("[provider] needs {text}"));
        let address = raw.address.ok_or_else(|| {
            missing("`address`, the provider's host and port, such as address = \"relay.example.net:366\"")
        })?;
        let name = raw.name.ok_or_else(|| missing("`name`, the login name the provider gave you"))?;
        let place = source.error(raw.ca.as_ref().map_or_else(|| table.clone(), Spanned::span), "");
        let remote = RemoteTable { tls_key: "tls", address: address.0, tls: raw.tls, ca: raw.ca, pin: raw.pin };
        let remote = remote.build(source)?;
        let secret = secret(source, raw.secret, raw.secret_file, Some(table))?;
        Ok(ProviderAccount {
            remote: RemoteSettings { credentials: Some((name.0.0, secret)), ..remote },
            place,
            domains: unique_domains(source, raw.domains)?,
            outgoing: raw.outgoing.is_none_or(Spanned::into_inner),
            schedule: raw.schedule.map_or_else(|| schedule.clone(), |table| table.0),
        })
    }
}

/// `[outgoing]`: how a customer accepts mail from its own users and machines, and sends it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OutgoingConfig {
    /// The directory of the queue. Absolute.
    pub queue: PathBuf,
    /// The addresses that `pull --daemon` accepts mail at. Default: none.
    pub listen: Vec<SocketAddr>,
    /// The networks whose machines may submit mail there, like this machine. Default: none.
    pub networks: Vec<Network>,
    /// The domain of names without one, and of a `From:` that has to be added. Default: the first domain of `accept`.
    pub domain: Domain,
    /// The host that mail is sent to if the provider does not accept it before ATRN, port 587 by default. Its default
    /// credentials are those of the provider. Default: none.
    pub submission: Option<RemoteSettings>,
    /// `give-up` and `delay-notice`; the other times have their defaults.
    pub retry: Retry,
    /// The maximal size of a message, in octets on the wire. Default 50 MiB.
    pub max_size: u64,
}

impl OutgoingConfig {
    /// Whether a client at this address may submit mail: it is this machine, or in one of `networks`.
    pub fn admits(&self, address: IpAddr) -> bool {
        address.to_canonical().is_loopback() || self.networks.iter().any(|network| network.contains(address))
    }

    fn build(
        source: &Source, raw: Spanned<RawOutgoing>, provider: &ProviderAccount, mailboxes: &MailboxesConfig,
        hostname: &str,
    ) -> Result<OutgoingConfig, ConfigError> {
        let table = raw.span();
        let missing = |text: &str| source.error(table.clone(), format!("[outgoing] needs {text}"));
        let raw = raw.into_inner();
        let queue = raw.queue.ok_or_else(|| {
            missing("`queue`, the directory for the mail that waits, such as queue = \"/var/spool/odmr-out\"")
        })?;
        check_listeners(source, [Some(raw.listen.as_slice())])?;
        for listen in &raw.listen {
            if let Some(hop) = mailboxes.rules.next_hops().find(|hop| hop.is_at(&listen.get_ref().0, hostname)) {
                let text =
                    format!("{hop} is where `deliver` hands mail over, so it would go in circles: choose another");
                return Err(source.error(listen.span(), text));
            }
        }
        let domain = raw.domain.map(|domain| domain.0);
        let domain = domain.or_else(|| mailboxes.rules.domains().first().cloned());
        let domain = domain.ok_or_else(|| missing("`domain`, for bare names, such as domain = \"example.org\""))?;
        let submission = OptionalRemoteTable {
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
        let retry = RetryTimes { give_up: raw.give_up, delay_notice: raw.delay_notice, ..RetryTimes::default() };
        Ok(OutgoingConfig {
            queue: source.absolute(&queue.0),
            listen: addresses(Some(raw.listen), 0),
            networks: raw.networks.into_iter().map(|network| network.0).collect(),
            domain,
            submission: submission.build(source, provider.remote.credentials.clone())?,
            retry: retry.build(source)?,
            max_size: raw.max_size.map_or(MAX_SIZE, |size| size.0.0),
        })
    }
}

// The file as it is written. Mandatory keys are optional here, so that the error can say what they are for.

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table", rename_all = "kebab-case")]
struct RawCustomer {
    hostname: Option<Checked<Hostname>>,
    user: Option<Spanned<Checked<SystemName>>>,
    group: Option<Spanned<Checked<SystemName>>>,
    provider: Option<Spanned<OneOrMany<Vec<Spanned<RawProviderAccount>>>>>,
    mailboxes: Option<Spanned<RawMailboxes>>,
    outgoing: Option<Spanned<RawOutgoing>>,
    #[serde(default)]
    schedule: ScheduleTable,
    #[serde(default, with = "RawLimits")]
    limits: Limits,
    #[serde(default, with = "RawTimeouts")]
    timeouts: Timeouts,
}

impl Many for Vec<Spanned<RawProviderAccount>> {
    type One = RawProviderAccount;
    const EXPECTED: &'static str = "a table [provider], or several [[provider]]";
    const ONE: Shape = Shape::Table;
    const MANY: Shape = Shape::List;
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table", rename_all = "kebab-case")]
struct RawProviderAccount {
    address: Option<Checked<HostPort<366>>>,
    tls: Option<Spanned<Checked<TlsMode>>>,
    ca: Option<Spanned<Checked<PathBuf>>>,
    pin: Option<Spanned<Checked<Pin>>>,
    name: Option<Checked<AccountName>>,
    secret: Option<Spanned<Checked<Secret>>>,
    secret_file: Option<Spanned<Checked<PathBuf>>>,
    #[serde(default)]
    domains: Vec<Spanned<Checked<Domain>>>,
    outgoing: Option<Spanned<bool>>,
    schedule: Option<ScheduleTable>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table", rename_all = "kebab-case")]
struct RawOutgoing {
    queue: Option<Checked<PathBuf>>,
    #[serde(default)]
    listen: Vec<Spanned<Checked<SocketAddr>>>,
    #[serde(default)]
    networks: Vec<Checked<Network>>,
    domain: Option<Checked<Domain>>,
    submission: Option<Checked<HostPort<587>>>,
    submission_tls: Option<Spanned<Checked<TlsMode>>>,
    ca: Option<Spanned<Checked<PathBuf>>>,
    pin: Option<Spanned<Checked<Pin>>>,
    name: Option<Spanned<Checked<AccountName>>>,
    secret: Option<Spanned<Checked<Secret>>>,
    secret_file: Option<Spanned<Checked<PathBuf>>>,
    give_up: Option<Checked<Duration>>,
    delay_notice: Option<Checked<DelayWarning>>,
    max_size: Option<Checked<OctetCount>>,
}
