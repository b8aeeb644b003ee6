//! A provider's file, and the directory with a file for each customer (RFC 2645 section 5.1): the domains and the rights
//! of the customer. A domain has one owner. Looking up a customer by name or by domain takes the same time for any number
//! of customers.

use std::collections::{HashMap, hash_map};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;

use super::limits::{RawLimits, RawTimeouts};
use super::lists::{addresses, check_listeners, duplicate};
use super::relay::{RawRelay, RelayConfig};
use super::remote::secret;
use super::source::{ConfigError, FileKind, Source, check_private};
use super::value::{AccountName, Checked, Hostname, MAX_SIZE, OctetCount, Parse, Secret, at_least, hostname};
use crate::mail::address::Domain;
use crate::sasl::Unavailable;
use crate::session::{Limits, Timeouts};

/// The configuration of the side that holds the mail.
#[derive(Clone, Debug)]
pub struct ProviderConfig {
    /// The name in its greeting. ASCII, in the case of the file.
    pub hostname: String,
    /// The directory of the queues. Absolute.
    pub spool: PathBuf,
    pub accounts: Accounts,
    pub tls: Option<TlsFiles>,
    pub inbound: InboundConfig,
    pub odmr: OdmrConfig,
    pub relay: RelayConfig,
    pub limits: Limits,
    pub timeouts: Timeouts,
}

impl ProviderConfig {
    pub fn load(path: &Path) -> Result<ProviderConfig, ConfigError> {
        let source = Source::read(path)?;
        match source.kind()? {
            Some(FileKind::Provider) | None => ProviderConfig::build(&source),
            Some(FileKind::Customer) => Err(source.error(
                None,
                "is a customer's file (it has [provider]), for `odmr pull`; a provider's has `spool` and \
                 `customers`",
            )),
        }
    }

    pub(super) fn build(source: &Source) -> Result<ProviderConfig, ConfigError> {
        let raw: RawProvider = source.parse()?;
        let hostname = hostname(source, raw.hostname)?;
        let spool = raw.spool.ok_or_else(|| {
            source.error(
                None,
                "`spool` is missing: the directory for the mail that waits, such as spool = \"/var/spool/odmr\"",
            )
        })?;
        let customers = raw.customers.ok_or_else(|| {
            source.error(
                None,
                "`customers` is missing: the folder with one file a customer, such as \
                 customers = \"customers.d\"",
            )
        })?;
        let tls = raw.tls.map(|tls| TlsFiles::build(source, tls)).transpose()?;
        let odmr = raw.odmr.as_ref().map(Spanned::as_ref);
        let lists = [
            raw.inbound.listen.as_deref(),
            odmr.and_then(|odmr| odmr.listen.as_deref()),
            odmr.map(|odmr| odmr.listen_tls.as_slice()),
        ];
        check_listeners(source, lists)?;
        let odmr = OdmrConfig::build(source, raw.odmr, tls.is_some())?;
        Ok(ProviderConfig {
            hostname,
            spool: source.absolute(&spool.0),
            accounts: Accounts::build(source, &customers)?,
            tls,
            inbound: InboundConfig {
                listen: addresses(raw.inbound.listen, 25),
                max_size: raw.inbound.max_size.map_or(MAX_SIZE, |size| size.0.0),
            },
            odmr,
            relay: RelayConfig::build(source, raw.relay)?,
            limits: raw.limits,
            timeouts: raw.timeouts,
        })
    }
}

/// `[tls]`: the certificate of a server, and its key. Both in PEM; absolute paths.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TlsFiles {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl TlsFiles {
    fn build(source: &Source, raw: Spanned<RawTls>) -> Result<TlsFiles, ConfigError> {
        let table = raw.span();
        let missing = |key: &str| {
            let text = format!("[tls] needs `certificate` and `key`, two files in PEM: `{key}` is missing");
            source.error(table.clone(), text)
        };
        let raw = raw.into_inner();
        let certificate = raw.certificate.ok_or_else(|| missing("certificate"))?;
        let key = raw.key.ok_or_else(|| missing("key"))?;
        let path = source.absolute(&key.as_ref().0);
        // If the key cannot be read at all, the TLS module reports it.
        if let Ok(metadata) = std::fs::metadata(&path) {
            check_private(&metadata, &path).map_err(|text| source.error(key.span(), text))?;
        }
        Ok(TlsFiles { certificate: source.absolute(&certificate.0), key: path })
    }
}

/// `[inbound]`: the listener for mail from the Internet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct InboundConfig {
    /// Default: port 25 on all addresses. Empty: no listener, as when another mail server fills the Maildirs.
    pub listen: Vec<SocketAddr>,
    /// The maximal size of a message, in octets on the wire, from the Internet and from customers. Default 50 MiB.
    /// RFC 5321 section 4.5.3.1.7 wants at least 64 KiB; less is for tests.
    pub max_size: u64,
}

/// `[odmr]`: the listeners for customers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OdmrConfig {
    /// Default: port 366 on all addresses.
    pub listen: Vec<SocketAddr>,
    /// Listeners with TLS from the first octet on, for customers without STARTTLS. Default: none.
    pub listen_tls: Vec<SocketAddr>,
    /// Whether AUTH needs TLS. Default: true.
    pub require_tls: bool,
    /// Whether to offer CRAM-MD5. Default: true. RFC 2645 section 5.1.2 lets a site replace it by a better mechanism.
    pub cram_md5: bool,
}

impl OdmrConfig {
    fn build(source: &Source, raw: Option<Spanned<RawOdmr>>, tls: bool) -> Result<OdmrConfig, ConfigError> {
        let table = raw.as_ref().map(Spanned::span);
        let raw = raw.map(Spanned::into_inner).unwrap_or_default();
        let add = "add [tls] with `certificate` and `key`";
        if let Some(first) = raw.listen_tls.first().filter(|_| !tls) {
            let text = format!("`listen-tls` needs a certificate: {add}, or leave `listen-tls` empty");
            return Err(source.error(first.span(), text));
        }
        let place = raw.require_tls.as_ref().map(Spanned::span).or(table);
        let require_tls = raw.require_tls.is_none_or(Spanned::into_inner);
        if require_tls && !tls {
            let text = format!(
                "`require-tls` is true, which it is by default, and there is no [tls]: {add}, or say \
                 require-tls = false"
            );
            return Err(source.error(place, text));
        }
        let place = raw.cram_md5.as_ref().map(Spanned::span);
        let cram_md5 = raw.cram_md5.is_none_or(Spanned::into_inner);
        if !cram_md5 && !tls {
            // RFC 2645 section 5.1.1: the reply to EHLO must offer AUTH, so there must be a mechanism.
            let text = format!(
                "without CRAM-MD5 customers authenticate with PLAIN, and that under TLS only: {add}, or say \
                 cram-md5 = true"
            );
            return Err(source.error(place, text));
        }
        Ok(OdmrConfig {
            listen: addresses(raw.listen, 366),
            listen_tls: addresses(Some(raw.listen_tls), 366),
            require_tls,
            cram_md5,
        })
    }
}

/// The provider's customers: the files `NAME.toml` of one directory.
#[derive(Clone, Debug, Default)]
pub struct Accounts {
    accounts: Vec<Account>,
    by_name: HashMap<String, usize>,
    by_domain: HashMap<Domain, usize>,
}

impl Accounts {
    /// The customer with this login name. Case counts.
    pub fn account(&self, name: &str) -> Option<&Account> {
        self.by_name.get(name).map(|&index| &self.accounts[index])
    }

    /// The customer that a domain belongs to; a subdomain is another domain.
    pub fn owner(&self, domain: &Domain) -> Option<&Account> {
        self.by_domain.get(domain).map(|&index| &self.accounts[index])
    }

    /// All customers, ordered by name.
    pub fn iter(&self) -> impl Iterator<Item = &Account> {
        self.accounts.iter()
    }

    fn build(source: &Source, directory: &Spanned<Checked<PathBuf>>) -> Result<Accounts, ConfigError> {
        let path = source.directory().join(&directory.as_ref().0);
        let files = customer_files(&path).map_err(|error| {
            let text = format!(
                "the folder {} cannot be read: {error}; it holds one file a customer, and may be empty",
                path.display()
            );
            source.error(directory.span(), text)
        })?;
        let mut accounts = Accounts::default();
        for file in files {
            accounts.add(&Source::read(&file)?)?;
        }
        Ok(accounts)
    }

    fn add(&mut self, source: &Source) -> Result<(), ConfigError> {
        let raw: RawAccount = source.parse()?;
        let name = source.file.file_stem().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| "the login name is not UTF-8: rename the file".to_owned());
        let name = name.and_then(AccountName::parse).map_err(|text| {
            let text = format!("{text}; here it is the file's name without .toml");
            source.error(None, text)
        })?;
        let index = self.accounts.len();
        let place = raw.domains.as_ref().map(Spanned::span);
        let mut domains = Vec::new();
        for entry in raw.domains.map(Spanned::into_inner).unwrap_or_default() {
            let span = entry.span();
            let domain = entry.into_inner().0;
            match self.by_domain.entry(domain.clone()) {
                hash_map::Entry::Vacant(place) => place.insert(index),
                hash_map::Entry::Occupied(place) => {
                    let text = match self.accounts.get(*place.get()) {
                        Some(other) => {
                            let other = source.file.with_file_name(format!("{}.toml", other.name));
                            let other = other.display();
                            format!("{domain} stands in {other} too: a domain has one owner, take one of them out")
                        }
                        None => duplicate(&domain),
                    };
                    return Err(source.error(span, text));
                }
            };
            domains.push(domain);
        }
        if domains.is_empty() {
            let text = "`domains` is missing or empty: name the customer's domains, such as \
                        domains = [\"example.org\"]";
            return Err(source.error(place, text));
        }
        let secret = secret(source, raw.secret, raw.secret_file, None)?;
        self.by_name.insert(name.0.clone(), index);
        self.accounts.push(Account {
            name: name.0,
            domains,
            secret,
            relay: raw.relay,
            any_sender: raw.any_sender,
            max_size: raw.max_size.map(|size| size.0.0),
            rate: raw.rate,
        });
        Ok(())
    }
}

impl Accounts {
    /// The secret of the account with this name.
    pub fn secret(&self, name: &str) -> Result<Option<Vec<u8>>, Unavailable> {
        Ok(self.account(name).map(|account| account.secret.clone()))
    }
}

/// One customer, as its provider sees it.
#[derive(Clone)]
pub struct Account {
    /// The login name: the name of the file without `.toml`. Case counts.
    pub name: String,
    /// At least one, none twice, each with a dot.
    pub domains: Vec<Domain>,
    /// Never empty.
    pub secret: Vec<u8>,
    /// Whether it may submit mail, for any domain. Default: true.
    pub relay: bool,
    /// Whether the senders of submitted mail may be in domains of others. Default: false.
    pub any_sender: bool,
    /// The maximal size of a submitted message, in octets on the wire; `None`, the default: that of `[inbound]`.
    pub max_size: Option<u64>,
    /// Messages that it may submit in an hour; 0, the default: no limit.
    pub rate: usize,
}

impl fmt::Debug for Account {
    /// Without the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Account").field("name", &self.name).finish_non_exhaustive()
    }
}

// The file as it is written. Mandatory keys are optional here, so that the error can say what they are for.

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table", rename_all = "kebab-case")]
struct RawProvider {
    hostname: Option<Checked<Hostname>>,
    spool: Option<Checked<PathBuf>>,
    customers: Option<Spanned<Checked<PathBuf>>>,
    tls: Option<Spanned<RawTls>>,
    #[serde(default)]
    inbound: RawInbound,
    odmr: Option<Spanned<RawOdmr>>,
    #[serde(default)]
    relay: RawRelay,
    #[serde(default, with = "RawLimits")]
    limits: Limits,
    #[serde(default, with = "RawTimeouts")]
    timeouts: Timeouts,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table", rename_all = "kebab-case")]
struct RawTls {
    certificate: Option<Checked<PathBuf>>,
    key: Option<Spanned<Checked<PathBuf>>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, expecting = "a table", rename_all = "kebab-case")]
struct RawInbound {
    listen: Option<Vec<Spanned<Checked<SocketAddr>>>>,
    max_size: Option<Checked<OctetCount>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, expecting = "a table", rename_all = "kebab-case")]
struct RawOdmr {
    listen: Option<Vec<Spanned<Checked<SocketAddr>>>>,
    #[serde(default)]
    listen_tls: Vec<Spanned<Checked<SocketAddr>>>,
    require_tls: Option<Spanned<bool>>,
    cram_md5: Option<Spanned<bool>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table", rename_all = "kebab-case")]
struct RawAccount {
    domains: Option<Spanned<Vec<Spanned<Checked<Domain>>>>>,
    secret: Option<Spanned<Checked<Secret>>>,
    secret_file: Option<Spanned<Checked<PathBuf>>>,
    #[serde(default = "yes")]
    relay: bool,
    #[serde(default)]
    any_sender: bool,
    max_size: Option<Checked<OctetCount>>,
    #[serde(default, deserialize_with = "at_least::<0, _>")]
    rate: usize,
}

fn yes() -> bool {
    true
}

/// The files `*.toml` of a directory, sorted, so that the same mistake gives the same error every time. Names that begin
/// with a dot are temporary files of editors.
fn customer_files(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        if name.ends_with(b".toml") && !name.starts_with(b".") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
