//! A customer's file (RFC 2645 section 5.2): its top level, the providers that it calls, and `[outgoing]`, by which its
//! users submit mail.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use super::limits::{limits, timeouts};
use super::mailboxes::{MAILBOXES_KEYS, MailboxesConfig};
use super::owner::MailOwner;
use super::provider::check_listeners;
use super::relay::retry_times;
use super::remote::{file_error, lacks, login_secret, mechanisms, optional_remote, remote};
use super::schedule::{self, SCHEDULE_KEYS};
use super::source::{FileKind, Source};
use super::table::{Table, Value, check_unique, values};
use super::value::{
    ACCOUNT_NAME, DOMAIN, Flag, HOSTNAME, HOSTNAME_MISSING, LISTENER, MAX_SIZE, NETWORK, Network, PATH, SIZE,
    WITHOUT_8BITMIME, host_port,
};
use crate::mail::address::Domain;
use crate::queue::retry::Retry;
use crate::recipients::{ConfigError, SourceLine};
use crate::sasl::Login;
use crate::schedule::Schedule;
use crate::session::{Limits, RemoteError, RemoteSettings, Timeouts};
use crate::smtp::client::Without8BitMime;

/// The configuration of a customer.
#[derive(Clone, Debug)]
pub struct CustomerConfig {
    /// The name in greetings and EHLO. ASCII, spelled as in the file.
    pub hostname: String,
    /// The user that a process becomes before it touches mail, if root has started it; `None`: it stays root.
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
    /// Reads a customer's file.
    ///
    /// # Errors
    ///
    /// The first mistake, or that a file cannot be read or is a provider's.
    pub fn load(path: &Path) -> Result<CustomerConfig, ConfigError> {
        Source::examine(path, CustomerConfig::of).0
    }

    /// Reads a customer's file for a user that submits mail, without the files of `secret-file`, which that user often
    /// may not read. Their secrets are empty.
    ///
    /// # Errors
    ///
    /// Those of [`CustomerConfig::load`].
    pub fn load_to_send(path: &Path) -> Result<CustomerConfig, ConfigError> {
        Source::read(path)?.without_secrets().finish(CustomerConfig::of).0
    }

    fn of(source: &Source) -> Result<CustomerConfig, ConfigError> {
        match source.kind()? {
            Some(FileKind::Customer) | None => CustomerConfig::build(source),
            Some(FileKind::Provider) => Err(source.whole().error(
                "is a provider's file (it has `spool` or `customers`), for `odmr serve`; a customer's has [provider]",
            )),
        }
    }

    pub(super) fn build(source: &Source) -> Result<CustomerConfig, ConfigError> {
        let mut file = Table::root(source, &CUSTOMER_FILE_KEYS)?;
        let hostname = file.required("hostname", HOSTNAME, HOSTNAME_MISSING);
        let missing = "[provider] is missing: the table with `address`, `name` and `secret`";
        let tables = file.take("provider").ok_or_else(|| file.line.error(missing))?;
        let schedule = source.note(schedule::read(file.table_or_empty("schedule", &SCHEDULE_KEYS)));
        let providers = ProviderAccount::build_all(tables, &schedule.as_ref().cloned().unwrap_or_default());
        let providers = source.note(providers);
        let known = providers.as_deref().unwrap_or_default();
        // A provider that is asked for all domains may have mail for any domain.
        let all = known.iter().any(|provider| provider.domains.is_empty());
        let domains: Vec<_> = known.iter().filter(|_| !all).flat_map(|provider| provider.domains.clone()).collect();
        let mailboxes = file.table("mailboxes", &MAILBOXES_KEYS).and_then(|mailboxes| {
            let text = "[mailboxes] is missing: the table with `root` and `accept`, where mail goes and for whom it is \
                        accepted";
            mailboxes.ok_or_else(|| file.line.error(text))
        });
        let mailboxes = source.note(mailboxes.and_then(|mailboxes| MailboxesConfig::build(mailboxes, &domains)));
        let (outgoing, owner) = (file.table("outgoing", &OUTGOING_KEYS), source.note(MailOwner::build(&mut file)));
        let (limits, timeouts) = (limits(&mut file), source.note(timeouts(&mut file)));
        // `[outgoing]` depends on the values before it.
        let (hostname, providers, mailboxes) = (hostname?, providers?, mailboxes?);
        let sends_to = providers.iter().find(|provider| provider.outgoing);
        let outgoing = match (outgoing?, sends_to) {
            (Some(table), Some(provider)) => Some(OutgoingConfig::build(table, provider, &mailboxes, &hostname)?),
            (Some(table), None) => {
                let text = "[outgoing] has no provider to send its mail to, as every provider has `outgoing = false`: \
                            remove that from one, or this table";
                return Err(table.line.error(text));
            }
            (None, _) => None,
        };
        let (owner, timeouts) = (owner?, timeouts?);
        Ok(CustomerConfig { hostname, owner, providers, mailboxes, outgoing, limits, timeouts })
    }
}

const CUSTOMER_FILE_KEYS: [&str; 9] =
    ["hostname", "user", "group", "provider", "mailboxes", "outgoing", "schedule", "limits", "timeouts"];

/// `[provider]`, or one of `[[provider]]`: a provider that the customer calls, the account there, and the times to call.
#[derive(Clone, Debug)]
pub struct ProviderAccount {
    /// It always has a login. The default port is 366 (RFC 2645 section 4).
    pub remote: RemoteSettings,
    /// The domains that ATRN names; empty: all of the account (RFC 2645 section 5.2.1).
    pub domains: Vec<Domain>,
    /// Whether outgoing mail is sent to this provider: true for one provider at most, by default the first.
    pub outgoing: bool,
    /// Its own schedule, or that of `[schedule]`.
    pub schedule: Schedule,
    /// The lines of `ca`, `certificate` and `key`; of a missing key, the line of the table.
    ca_line: SourceLine,
    pub certificate_line: SourceLine,
    pub key_line: SourceLine,
    /// The line of `domains`, or of the table if it has no `domains`.
    pub domains_line: SourceLine,
    pub address_line: SourceLine,
}

impl ProviderAccount {
    /// The error about the trusted certificates, or about this side's own certificate, on the line that names the file.
    pub fn error(&self, error: &RemoteError) -> ConfigError {
        match (error.key, &self.remote.ca, &self.remote.identity) {
            ("certificate", _, Some(own)) => {
                file_error(&self.certificate_line, error.key, &own.certificate, &error.text)
            }
            ("key", _, Some(own)) => file_error(&self.key_line, error.key, &own.key, &error.text),
            // As in `file_error`: an error of another form has its own remedy.
            (_, Some(ca), _) if error.text.starts_with(&format!("{}: ", ca.display())) => {
                self.ca_line.error(format!("{error}: put the certificates there, or name others in `ca`"))
            }
            (_, Some(_), _) => self.ca_line.error(&error.text),
            _ => self.ca_line.error(format!("{error}: name the certificates to trust in `ca`, or the one in `pin`")),
        }
    }

    /// Reads all providers of a file; `schedule`: the schedule of those without their own.
    fn build_all(tables: Value<'_>, schedule: &Schedule) -> Result<Vec<ProviderAccount>, ConfigError> {
        let mut providers: Vec<ProviderAccount> = Vec::new();
        let mut outgoing = None;
        let mut result = Ok(());
        for table in tables.one_or_many() {
            let mut table = table.table(&PROVIDER_KEYS, "a table [provider], or several [[provider]]")?;
            let flag = table.located("outgoing", Flag)?;
            let (source, line) = (table.file, table.line.clone());
            let provider = ProviderAccount::build(table, flag.as_ref().is_none_or(|flag| flag.value), schedule);
            let provider = match source.note(provider) {
                Ok(provider) => provider,
                Err(error) => {
                    result = result.and(Err(error));
                    continue;
                }
            };
            let remote = &provider.remote;
            let login = remote.login_name();
            let same = |other: &RemoteSettings| (&other.address, other.login_name()) == (&remote.address, login);
            if providers.iter().any(|other| same(&other.remote)) {
                return Err(line.error(format!(
                    "{} occurs twice as {login}: write one table for each provider and account, with all `domains`",
                    remote.address
                )));
            }
            if let Some(flag) = flag.filter(|flag| flag.value)
                && outgoing.replace(providers.len()).is_some()
            {
                let text = "another provider gets the outgoing mail already: write `outgoing = true` in one table only";
                return Err(flag.source.error(text));
            }
            providers.push(provider);
        }
        result?;
        let first = providers.iter().position(|provider| provider.outgoing);
        for (number, provider) in providers.iter_mut().enumerate() {
            provider.outgoing = outgoing.or(first) == Some(number);
        }
        Ok(providers)
    }

    fn build(mut table: Table<'_>, outgoing: bool, schedule: &Schedule) -> Result<ProviderAccount, ConfigError> {
        let missing = "[provider] needs `address`, the provider's host and port, such as \
                       address = \"relay.example.net:366\"";
        let [address_line, domains_line, ca_line, certificate_line, key_line] =
            ["address", "domains", "ca", "certificate", "key"].map(|key| table.line_of(key));
        let address = table.required("address", host_port::<366>(), missing);
        let missing = "[provider] needs `name`, the login name that the provider gave you";
        let name = table.required("name", ACCOUNT_NAME, missing);
        let (source, table_line) = (table.file, table.line.clone());
        let certificate = table.contains("certificate");
        let remote = source.note(address.and_then(|address| remote(&mut table, address, "tls")));
        let secret = source.note(login_secret(&mut table, &table_line, certificate));
        // If the secret has a mistake, do not report the mechanisms that need it too.
        let given = name.as_ref().ok().zip(secret.as_ref().ok());
        let login = given.map(|(name, secret)| Login {
            secret: secret.clone(),
            certificate,
            ..Login::with_secret(name.clone(), Vec::new())
        });
        let lacks = |mechanism| login.as_ref().and_then(|login| lacks(login, mechanism));
        let mechanisms = source.note(mechanisms(&mut table, lacks));
        let domains = table.list("domains", DOMAIN);
        let own = table.table("schedule", &SCHEDULE_KEYS);
        let schedule = source.note(own.and_then(|own| own.map_or_else(|| Ok(schedule.clone()), schedule::read)));
        let domains = domains?.unwrap_or_default();
        check_unique(&domains)?;
        let (_, remote, _, schedule) = (name?, remote?, secret?, schedule?);
        let mechanisms = mechanisms?;
        let login = login.map(|login| Login { mechanisms, ..login });
        let remote = RemoteSettings { login, ..remote };
        let domains = values(domains);
        Ok(ProviderAccount {
            remote,
            domains,
            outgoing,
            schedule,
            ca_line,
            certificate_line,
            key_line,
            domains_line,
            address_line,
        })
    }
}

#[rustfmt::skip]
const PROVIDER_KEYS: [&str; 13] = [
    "address", "tls", "ca", "pin", "certificate", "key", "name", "secret", "secret-file", "mechanisms", "domains", "outgoing",
    "schedule",
];

/// `[outgoing]`: how a customer accepts mail from its own users and machines, and sends it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OutgoingConfig {
    /// The directory of the queue. Absolute.
    pub queue: PathBuf,
    /// The addresses that `pull --daemon` accepts mail at. Default: none.
    pub listen: Vec<SocketAddr>,
    /// The networks whose machines may submit mail there, like this machine. Default: none.
    pub networks: Vec<Network>,
    /// The domain of addresses without one, and of a `From` field that is added. Default: the first domain of `accept`.
    pub domain: Domain,
    /// The host that mail is sent to if the provider does not accept it before ATRN, port 587 by default. By default it has
    /// the login of the provider, if that has a secret. `None`, the default: no host.
    pub submission: Option<RemoteSettings>,
    /// `give-up` and `delay-warning`; the other times have their defaults.
    pub retry: Retry,
    /// The largest message that may be submitted, in octets on the wire. Default 50 MiB.
    pub max_size: u64,
    /// Whether 8-bit content is sent if the provider or the submission host does not offer 8BITMIME. Default: it is.
    pub without_8bitmime: Without8BitMime,
}

impl OutgoingConfig {
    /// The first listener that a program on this machine reaches over loopback. Port 0 does not count: it is another port at
    /// each start.
    pub fn loopback_listener(&self) -> Option<SocketAddr> {
        self.listen.iter().find_map(|listener| {
            let address = match listener.ip() {
                IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::LOCALHOST.into(),
                IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv6Addr::LOCALHOST.into(),
                address => address,
            };
            let reached = address.to_canonical().is_loopback() && listener.port() != 0;
            reached.then(|| SocketAddr::new(address, listener.port()))
        })
    }

    /// Whether a client at this address may submit mail: it is this machine, or in one of `networks`.
    pub fn admits(&self, address: IpAddr) -> bool {
        address.to_canonical().is_loopback() || self.networks.iter().any(|network| network.contains(address))
    }

    fn build(
        mut table: Table<'_>, provider: &ProviderAccount, mailboxes: &MailboxesConfig, hostname: &str,
    ) -> Result<OutgoingConfig, ConfigError> {
        let missing = "[outgoing] needs `queue`, the directory for the mail that waits, such as \
                       queue = \"/var/spool/odmr-out\"";
        let (source, queue) = (table.file, table.required("queue", PATH, missing));
        let (listen, networks) = (table.list("listen", LISTENER), table.list("networks", NETWORK));
        let domain = table.get("domain", DOMAIN);
        let login = provider.remote.login.clone().filter(|login| login.secret.is_some());
        let submission_line = table.line_of("submission");
        let submission = source.note(optional_remote(&mut table, "submission", "submission-tls", login));
        if let Ok(Some(RemoteSettings { login: None, identity: None, .. })) = &submission {
            let text = "the submission host has nothing to log in with, as [provider] has no `secret`: add `name` and \
                        `secret` for it, or `certificate` and `key`";
            return Err(submission_line.error(text));
        }
        let (retry, max_size) = (source.note(retry_times(&mut table)), table.or("max-size", SIZE, MAX_SIZE));
        let without_8bitmime = table.or("without-8bitmime", WITHOUT_8BITMIME, Without8BitMime::default());
        let listen = listen?.unwrap_or_default();
        check_listeners(&listen)?;
        for listener in &listen {
            if let Some(hop) = mailboxes.rules.next_hops().find(|hop| hop.is_at(&listener.value, hostname)) {
                return Err(listener.source.error(format!(
                    "`deliver` sends mail to {hop}, so mail would go in circles: listen at another address"
                )));
            }
        }
        Ok(OutgoingConfig {
            queue: source.absolute(&queue?),
            listen: values(listen),
            networks: values(networks?.unwrap_or_default()),
            domain: domain?.unwrap_or_else(|| mailboxes.rules.home().clone()),
            submission: submission?,
            retry: retry?,
            max_size,
            without_8bitmime,
        })
    }
}

#[rustfmt::skip]
const OUTGOING_KEYS: [&str; 18] = [
    "queue", "listen", "networks", "domain", "submission", "submission-tls", "ca", "pin", "certificate", "key",
    "name", "secret", "secret-file", "mechanisms", "give-up", "delay-warning", "max-size", "without-8bitmime",
];
