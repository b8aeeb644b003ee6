//! A customer's file (RFC 2645 section 5.2): where it calls, for whom it takes mail, and how its own mail goes out.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use toml::Spanned;

use super::mailboxes::{MailboxesConfig, RawMailboxes};
use super::relay::{Retry, Smarthost, SmarthostAddress};
use super::schedule::Schedule;
use super::value::{
    AccountName, Checked, DelayWarning, HostPort, Hostname, MAX_SIZE, Network, OctetCount, Pin, Secret, SystemName,
};
use super::{
    ConfigError, FileKind, Limits, Source, Timeouts, TlsMode, addresses, each_once, hostname, listeners, secret, trust,
};
use crate::mail::address::Domain;

/// The side that fetches its mail.
#[derive(Clone, Debug)]
pub struct CustomerConfig {
    /// The name it greets with. ASCII; the case is as written.
    pub hostname: String,
    /// Whom a process becomes that was started as root, before it touches mail; none: nobody.
    pub owner: Option<MailOwner>,
    /// At least one, in the order of the file; no two have the same address and name.
    pub providers: Vec<ProviderAccount>,
    pub mailboxes: MailboxesConfig,
    /// None: this customer sends no mail.
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

    /// Reads a customer's file for a user who hands in mail: without the files that hold secrets, which that user
    /// may not be able to read.
    pub fn load_to_send(path: &Path) -> Result<CustomerConfig, ConfigError> {
        CustomerConfig::of(&Source { secrets: false, ..Source::read(path)? })
    }

    pub(super) fn build(source: &Source) -> Result<CustomerConfig, ConfigError> {
        let raw: RawCustomer = source.parse()?;
        let hostname = hostname(source, raw.hostname)?;
        let provider = raw.provider.ok_or_else(|| {
            let text = "[provider] is missing: the table with `address`, `name` and `secret`";
            source.error(None, text)
        })?;
        let providers = ProviderAccount::build_all(source, provider, &raw.schedule)?;
        // Who asks one provider for all that there is may get mail for any domain.
        let all = providers.iter().any(|provider| provider.domains.is_empty());
        let domains: Vec<_> = providers.iter().filter(|_| !all).flat_map(|provider| provider.domains.clone()).collect();
        let mailboxes = raw.mailboxes.ok_or_else(|| {
            let text = "[mailboxes] is missing: the table with `root` and `accept`, where mail goes and for whom \
                        it is taken";
            source.error(None, text)
        })?;
        let mailboxes = MailboxesConfig::build(source, mailboxes, &domains)?;
        let takes_mail = providers.iter().find(|provider| provider.outgoing);
        let outgoing = match (raw.outgoing, takes_mail) {
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
                // Whoever looks them up says where they stand.
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

/// Who owns the mail.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MailOwner {
    pub user: String,
    /// The group of what is made for him. Default: his own.
    pub group: Option<String>,
    /// The error to come back with, its text still to be filled in, when there is no such user.
    place: ConfigError,
}

impl MailOwner {
    /// What is wrong with the user or the group.
    pub fn error(&self, text: String) -> ConfigError {
        ConfigError { text, ..self.place.clone() }
    }
}

/// `[provider]`, or each `[[provider]]`: where a customer calls, as whom, and when.
#[derive(Clone)]
pub struct ProviderAccount {
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
    /// It is handed the outgoing mail; so is one provider, by default the first.
    pub outgoing: bool,
    /// Its own, or that of all.
    pub schedule: Schedule,
    /// The error to come back with, its text still to be filled in, when its certificates cannot be used.
    place: ConfigError,
}

impl ProviderAccount {
    /// What is wrong with the certificates that are believed.
    pub fn error(&self, text: &str) -> ConfigError {
        let way_out = match &self.ca {
            Some(_) => "put the certificates there, or name others in `ca`",
            None => "name the certificates to believe in `ca`, or the one in `pin`",
        };
        ConfigError { text: format!("{text}: {way_out}"), ..self.place.clone() }
    }

    /// All providers of a file; `schedule`: for those that have none of their own.
    fn build_all(
        source: &Source,
        raw: Spanned<OneOrMany>,
        schedule: &Schedule,
    ) -> Result<Vec<ProviderAccount>, ConfigError> {
        let table = raw.span();
        let tables = match raw.into_inner() {
            OneOrMany::One(one) => vec![(table, *one)],
            OneOrMany::Many(many) => many.into_iter().map(|one| (one.span(), one.into_inner())).collect(),
        };
        let mut providers: Vec<ProviderAccount> = Vec::with_capacity(tables.len());
        let mut outgoing = None;
        for (table, raw) in tables {
            let takes_mail = raw.outgoing.as_ref().map(|flag| (*flag.get_ref(), flag.span()));
            let provider = ProviderAccount::build(source, table.clone(), raw, schedule)?;
            let same = |other: &&ProviderAccount| (&other.address, &other.name) == (&provider.address, &provider.name);
            if providers.iter().find(same).is_some() {
                let text = format!(
                    "{} stands here a second time as {}: one table a provider and account, with all `domains`",
                    provider.address, provider.name
                );
                return Err(source.error(table, text));
            }
            if let Some((true, span)) = takes_mail
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
        source: &Source,
        table: Range<usize>,
        raw: RawUpstream,
        schedule: &Schedule,
    ) -> Result<ProviderAccount, ConfigError> {
        let missing = |text: &str| source.error(table.clone(), format!("[provider] needs {text}"));
        let address = raw.address.ok_or_else(|| {
            missing("`address`, the provider's host and port, such as address = \"relay.example.net:366\"")
        })?;
        let name = raw.name.ok_or_else(|| missing("`name`, the login name the provider gave you"))?;
        let tls = raw.tls.map_or(TlsMode::default(), |tls| tls.0);
        let place = source.error(raw.ca.as_ref().map_or_else(|| table.clone(), Spanned::span), "");
        let (ca, pin) = trust(source, "tls", tls, raw.ca, raw.pin)?;
        let HostPort { address, host } = address.0;
        Ok(ProviderAccount {
            address,
            host,
            tls,
            ca,
            pin,
            place,
            name: name.0.0,
            secret: secret(source, raw.secret, raw.secret_file, Some(table))?,
            domains: each_once(source, raw.domains)?,
            outgoing: raw.outgoing.is_none_or(Spanned::into_inner),
            schedule: raw.schedule.unwrap_or_else(|| schedule.clone()),
        })
    }
}

impl fmt::Debug for ProviderAccount {
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

/// `[outgoing]`: how a customer takes mail from its own machines, and sends it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OutgoingConfig {
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

impl OutgoingConfig {
    /// Whether this machine may hand in mail: this very machine, or one of `networks`.
    pub fn admits(&self, address: IpAddr) -> bool {
        address.to_canonical().is_loopback() || self.networks.iter().any(|network| network.contains(address))
    }

    fn build(
        source: &Source,
        raw: Spanned<RawOutgoing>,
        provider: &ProviderAccount,
        mailboxes: &MailboxesConfig,
        hostname: &str,
    ) -> Result<OutgoingConfig, ConfigError> {
        let table = raw.span();
        let missing = |text: &str| source.error(table.clone(), format!("[outgoing] needs {text}"));
        let raw = raw.into_inner();
        let queue = raw.queue.ok_or_else(|| {
            missing("`queue`, the directory for the mail that waits, such as queue = \"/var/spool/odmr-out\"")
        })?;
        listeners(source, [Some(raw.listen.as_slice())])?;
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
        let submission = SmarthostAddress {
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
        Ok(OutgoingConfig {
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

// The file as it is written. Whatever must be there is optional here, so that the error can say what it is for.

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table", rename_all = "kebab-case")]
struct RawCustomer {
    hostname: Option<Checked<Hostname>>,
    user: Option<Spanned<Checked<SystemName>>>,
    group: Option<Spanned<Checked<SystemName>>>,
    provider: Option<Spanned<OneOrMany>>,
    mailboxes: Option<Spanned<RawMailboxes>>,
    outgoing: Option<Spanned<RawOutgoing>>,
    #[serde(default)]
    schedule: Schedule,
    #[serde(default)]
    limits: Limits,
    #[serde(default)]
    timeouts: Timeouts,
}

/// `[provider]`, or `[[provider]]` as often as there are providers.
enum OneOrMany {
    One(Box<RawUpstream>),
    Many(Vec<Spanned<RawUpstream>>),
}

impl<'de> Deserialize<'de> for OneOrMany {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<OneOrMany, D::Error> {
        struct Tables;

        impl<'de> Visitor<'de> for Tables {
            type Value = OneOrMany;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a table [provider], or several [[provider]]")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<OneOrMany, A::Error> {
                RawUpstream::deserialize(MapAccessDeserializer::new(map)).map(|one| OneOrMany::One(Box::new(one)))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<OneOrMany, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(seq)).map(OneOrMany::Many)
            }
        }

        deserializer.deserialize_any(Tables)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table", rename_all = "kebab-case")]
struct RawUpstream {
    // RFC 2645 section 4.
    address: Option<Checked<HostPort<366>>>,
    tls: Option<Checked<TlsMode>>,
    ca: Option<Spanned<Checked<PathBuf>>>,
    pin: Option<Spanned<Checked<Pin>>>,
    name: Option<Checked<AccountName>>,
    secret: Option<Spanned<Checked<Secret>>>,
    secret_file: Option<Spanned<Checked<PathBuf>>>,
    #[serde(default)]
    domains: Vec<Spanned<Checked<Domain>>>,
    outgoing: Option<Spanned<bool>>,
    schedule: Option<Schedule>,
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
