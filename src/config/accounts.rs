//! The files of a provider's customers, one for each (RFC 2645 section 5.1): secret, domains and rights of that customer.
//! The name of the file is the login name. A domain belongs to one customer.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use super::held::{HELD_KEYS, HeldConfig};
use super::remote::{ASCII_SECRET, SECRET_IN_CLEAR, mechanisms, secret};
use super::source::{Findings, Source, check_private};
use super::table::{Table, values};
use super::value::{ACCOUNT_NAME, DOMAIN, Flag, PIN, SIZE, Text, VERIFIER};
use crate::mail::address::Domain;
use crate::net::pin::Pin;
use crate::recipients::{ConfigError, Located, SourceLine};
use crate::sandbox;
use crate::sasl::{AccountCredentials, CertificateDigests, Mechanism, ScramVerifier, Unavailable, is_usable};
use crate::sorting::sort_by;

/// The provider's customers: the files `NAME.toml` of one directory.
#[derive(Clone, Debug, Default)]
pub struct Accounts {
    directory: PathBuf,
    accounts: Vec<Account>,
    by_name: HashMap<String, usize>,
    by_domain: HashMap<Domain, usize>,
    skipped: Vec<SkippedFile>,
}

/// A customer's file with a mistake. The files of the other customers are read.
#[derive(Clone, Debug)]
pub struct SkippedFile {
    /// The login name, from the name of the file.
    pub name: String,
    pub error: ConfigError,
}

impl Accounts {
    /// The files with mistakes. Their customers have no account, or the account that was last read without a mistake.
    pub fn skipped(&self) -> &[SkippedFile] {
        &self.skipped
    }

    /// Whether the file of this customer is skipped. Its account, if there is one, is that of an earlier reading.
    pub fn is_skipped(&self, name: &str) -> bool {
        self.skipped.iter().any(|skipped| skipped.name == name)
    }

    /// Whether this domain may belong to a customer whose file is skipped, as no account has the domain.
    pub fn may_be_skipped(&self, domain: &Domain) -> bool {
        !self.skipped.is_empty() && self.owner(domain).is_none()
    }

    /// Adds the accounts of an earlier reading whose files are skipped now, without domains that another customer has now.
    pub(super) fn keep_skipped(&mut self, earlier: &Accounts) {
        let names: Vec<_> = self.skipped.iter().map(|skipped| skipped.name.clone()).collect();
        for account in names.iter().filter_map(|name| earlier.account(name)) {
            let mut account = account.clone();
            account.domains.retain(|domain| !self.by_domain.contains_key(domain));
            self.insert(account);
        }
    }

    fn insert(&mut self, account: Account) {
        let index = self.accounts.len();
        self.by_domain.extend(account.domains.iter().map(|domain| (domain.clone(), index)));
        self.by_name.insert(account.name.clone(), index);
        self.accounts.push(account);
    }

    /// The customer with this login name, which is case-sensitive.
    pub fn account(&self, name: &str) -> Option<&Account> {
        self.by_name.get(name).map(|&index| &self.accounts[index])
    }

    /// The customer that a domain belongs to; a subdomain is another domain.
    pub fn owner(&self, domain: &Domain) -> Option<&Account> {
        self.by_domain.get(domain).map(|&index| &self.accounts[index])
    }

    /// The mechanisms to offer: those that may open an account. If accounts have certificates only, those with a secret are
    /// offered too, as the reply to EHLO must list a mechanism (RFC 2645 section 5.1.1). If a file is skipped, all are
    /// offered, as its account may use any.
    ///
    /// CRAM-MD5 is the first one after EXTERNAL: a client that uses the first mechanism that it sees must know it, and RFC
    /// 2645 section 5.1.2 requires this one.
    pub fn mechanisms(&self) -> Vec<Mechanism> {
        let any = self.accounts.is_empty() || !self.skipped.is_empty();
        let offered = |mechanism: &Mechanism| self.accounts.iter().any(|account| account.wants_offered(*mechanism));
        let first = [Mechanism::External, Mechanism::CramMd5];
        let others = Mechanism::ALL.into_iter().filter(|mechanism| !first.contains(mechanism));
        first.into_iter().chain(others).filter(|mechanism| any || offered(mechanism)).collect()
    }

    /// Whether an account has a secret in clear text.
    pub fn have_secrets(&self) -> bool {
        self.accounts.iter().any(|account| account.secret.is_some())
    }

    /// The file of the customer with this login name, whether it exists or not.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.toml"))
    }

    /// All customers, ordered by name.
    pub fn iter(&self) -> impl Iterator<Item = &Account> {
        self.accounts.iter()
    }

    /// Whether a customer may log in by a certificate.
    pub fn has_certificates(&self) -> bool {
        self.accounts.iter().any(|account| !account.certificates.is_empty())
    }

    /// Reads all files of the directory. `tls`: whether the provider has a certificate; `earlier`: the accounts of the last
    /// reading.
    pub(super) fn build(
        source: &Source, directory: &Located<PathBuf>, tls: bool, earlier: &Accounts,
    ) -> Result<Accounts, ConfigError> {
        let path = source.relative(&directory.value);
        let files = customer_files(&path).map_err(|error| {
            let path = path.display();
            let text = format!(
                "the directory {path} cannot be read: {error}; name that with one file for each customer, or an empty one"
            );
            directory.source.error(text)
        })?;
        for other in files.iter().filter(|file| !is_customer_file(file)) {
            let whole = SourceLine { file: other.as_path().into(), line: None };
            let name = other.file_stem().unwrap_or_default().to_string_lossy();
            let text = format!(
                "is not read as a customer's file, as its name does not end in .toml: if it is one, rename it {name}.toml, \
                 or else move it away"
            );
            source.warn(whole.error(text));
        }
        let (mut accounts, mut read) = (Accounts { directory: path, ..Accounts::default() }, Vec::new());
        for file in files.into_iter().filter(|file| is_customer_file(file)) {
            let (account, found) = Source::examine(&file, |source| Account::read(source, tls));
            source.note_customer(found);
            match account {
                Ok((mut account, lines)) => {
                    // Use the list of recipients that was read before: its file may have a mistake now.
                    let before = earlier.account(&account.name).map(|account| &account.held.recipients);
                    if let Some(before) = before.filter(|before| **before == account.held.recipients) {
                        account.held.recipients = before.clone();
                    }
                    read.push((account, lines));
                }
                Err(error) => {
                    let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                    accounts.skipped.push(SkippedFile { name, error });
                }
            }
        }
        accounts.add_all(read, earlier, |error| source.note_customer(Findings::error(error)));
        accounts.keep_skipped(earlier);
        Ok(accounts)
    }

    /// Adds the accounts whose files could be read. `read` has the lines of their domains too. If several files name a
    /// domain, it stays with the customer that had it before, even if that customer's file has a mistake; otherwise the
    /// first customer by name gets it. The other files have a mistake, which is passed to `note`.
    fn add_all(&mut self, read: Vec<(Account, Vec<Located<Domain>>)>, earlier: &Accounts, note: impl Fn(ConfigError)) {
        let mut holders: HashMap<Domain, String> = HashMap::new();
        let skipped = self.skipped.iter().filter_map(|skipped| earlier.account(&skipped.name));
        for account in skipped.chain(read.iter().map(|(account, _)| account)) {
            let before = |domain: &&Domain| earlier.owner(domain).is_some_and(|owner| owner.name == account.name);
            holders.extend(account.domains.iter().filter(before).map(|domain| (domain.clone(), account.name.clone())));
        }
        for (account, lines) in read {
            let other = |domain: &Domain| {
                let holder = holders.get(domain).map(String::as_str).or(self.owner(domain).map(|owner| &*owner.name));
                holder.filter(|holder| *holder != account.name).map(str::to_owned)
            };
            let owned = lines.iter().find_map(|line| Some((line, other(&line.value)?)));
            match owned {
                None => self.insert(account),
                Some((Located { value: domain, source: line }, other)) => {
                    let other = line.file.with_file_name(format!("{other}.toml"));
                    let other = other.display();
                    let text =
                        format!("{domain} is in {other} too: a domain has one owner, remove it from one of them");
                    let error = line.error(text);
                    note(error.clone());
                    self.skipped.push(SkippedFile { name: account.name, error });
                }
            }
        }
    }

    /// The credentials of the customer with this login name; `None`: there is no such customer.
    ///
    /// # Errors
    ///
    /// The customer's file has a mistake, and no earlier reading had an account of this name.
    pub fn credentials(&self, name: &str) -> Result<Option<AccountCredentials>, Unavailable> {
        match self.account(name) {
            None if self.skipped.iter().any(|skipped| skipped.name == name) => Err(Unavailable),
            account => Ok(account.map(|account| AccountCredentials {
                secret: account.secret.clone(),
                verifier: account.verifier.clone(),
            })),
        }
    }
}

impl Accounts {
    /// As [`CredentialStore::account_of`](crate::sasl::CredentialStore::account_of). The same key may open several accounts,
    /// so the client may have to name one.
    ///
    /// # Errors
    ///
    /// The certificate opens no account, but may open one whose file has a mistake.
    pub fn account_of(
        &self, certificate: &CertificateDigests, wanted: Option<&str>,
    ) -> Result<Option<String>, Unavailable> {
        let mut found =
            self.opened_by(certificate).filter(|account| wanted.is_none_or(|wanted| wanted == account.name));
        match (found.next(), found.next()) {
            (Some(account), None) => Ok(Some(account.name.clone())),
            (None, _) if self.may_be_of_skipped(certificate, wanted) => Err(Unavailable),
            _ => Ok(None),
        }
    }

    /// As [`CredentialStore::knows`](crate::sasl::CredentialStore::knows).
    pub fn knows(&self, certificate: &CertificateDigests) -> bool {
        self.opened_by(certificate).next().is_some() || self.may_be_of_skipped(certificate, None)
    }

    fn opened_by(&self, certificate: &CertificateDigests) -> impl Iterator<Item = &Account> {
        self.accounts.iter().filter(|account| account.certificates.iter().any(|pin| pin.is_of(certificate)))
    }

    /// Whether a certificate may open an account whose file is skipped, and of which there is no earlier reading.
    fn may_be_of_skipped(&self, certificate: &CertificateDigests, wanted: Option<&str>) -> bool {
        let mut skipped = self.skipped.iter().filter(|skipped| self.account(&skipped.name).is_none());
        match wanted {
            Some(wanted) => skipped.any(|skipped| skipped.name == wanted),
            None => skipped.next().is_some() && self.opened_by(certificate).next().is_none(),
        }
    }
}

/// The credentials of an account: a secret, or its verifier, and certificates.
type AccountKeys = (Option<Vec<u8>>, Option<ScramVerifier>, Vec<Pin>);

/// Reads `secret` and `certificate` of a customer's file, which must have one of them.
fn credentials(table: &mut Table<'_>, tls: bool) -> Result<AccountKeys, ConfigError> {
    let (source, line) = (table.file, table.line_of("certificate"));
    let (secret, certificates) = (source.note(secret_or_verifier(table)), table.list("certificate", PIN));
    let ((secret, verifier), certificates) = (secret?, certificates?.map(values));
    match &certificates {
        Some(pins) if pins.is_empty() => {
            let text = "`certificate` is empty: write the pin of the customer's certificate, which its `odmr check` shows, \
                        or remove it";
            Err(line.error(text))
        }
        Some(_) if !tls => {
            let text = "`certificate` has no effect without TLS: add [tls] with `certificate` and `key` to the provider's \
                        file, or remove it";
            Err(line.error(text))
        }
        None if secret.is_none() && verifier.is_none() => Err(source.whole().error(
            "`secret` is missing: write secret = \"…\", or secret-file = \"…\" for a file with nothing but the secret; or \
             scram = \"…\", as `odmr secret` prints it; or certificate = [\"spki-sha256:…\"], with the pin that the customer's `odmr check` shows",
        )),
        _ => Ok((secret, verifier, certificates.unwrap_or_default())),
    }
}

/// One customer, in the configuration of its provider.
#[derive(Clone)]
pub struct Account {
    /// The login name: the name of the file without `.toml`. It is case-sensitive.
    pub name: String,
    /// At least one, each once and with a dot.
    pub domains: Vec<Domain>,
    /// Never empty; `None`: the provider stores the verifier instead, or only a certificate opens the account.
    pub secret: Option<Vec<u8>>,
    /// The verifier of SCRAM, stored in place of the secret.
    pub verifier: Option<ScramVerifier>,
    /// The certificates and keys that open the account, whatever their dates.
    pub certificates: Vec<Pin>,
    /// The mechanisms that may open it. Default: all.
    pub mechanisms: Vec<Mechanism>,
    /// Whether the customer may submit mail for any domain. Default: true.
    pub relay: bool,
    /// Whether the senders of submitted mail may be in other domains than those of the customer. Default: false.
    pub any_sender: bool,
    /// The maximal size of a submitted message, in octets on the wire; `None`, the default: that of `[inbound]`.
    pub max_size: Option<u64>,
    /// Messages that the customer may submit in an hour; 0, the default: no limit.
    pub rate: usize,
    /// The text that another delivery agent writes before the local part in `Delivered-To`: `acme-` with qmail, if its
    /// virtualdomains assigns the domains to `acme`. `None`, the default: none.
    pub delivered_to_prefix: Option<String>,
    pub held: HeldConfig,
}

impl Account {
    /// Reads the file of one customer. Returns the domains with their lines, too.
    pub(super) fn read(source: &Source, tls: bool) -> Result<(Account, Vec<Located<Domain>>), ConfigError> {
        let mut table = Table::root(source, &[&CUSTOMER_KEYS[..], &HELD_KEYS].concat())?;
        let name = source.file.file_stem().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| "the login name is not UTF-8: rename the file".to_owned());
        let name = name
            .and_then(|name| ACCOUNT_NAME.parse(name))
            .map_err(|text| source.whole().error(format!("{text}; here it is the file's name without .toml")))?;
        let list = table.line_of("domains");
        let (mut domains, mut lines) = (Vec::new(), Vec::new());
        let credentials = source.note(credentials(&mut table, tls));
        let (relay, any_sender) = (table.or("relay", Flag, true), table.or("any-sender", Flag, false));
        let (max_size, rate) = (table.get("max-size", SIZE), table.or("rate", 0..=u32::MAX, 0));
        let delivered_to_prefix = table.get("delivered-to-prefix", PREFIX);
        for Located { value: domain, source: line } in table.list("domains", DOMAIN)?.unwrap_or_default() {
            if domains.contains(&domain) {
                return Err(line.duplicate(domain));
            }
            domains.push(domain.clone());
            lines.push(Located { value: domain, source: line });
        }
        if domains.is_empty() {
            return Err(list.error(
                "`domains` is missing or empty: name the customer's domains, such as domains = [\"example.org\"]",
            ));
        }
        let held = source.note(HeldConfig::build(&mut table, &domains));
        let (secret, verifier, certificates) = credentials?;
        let mut account = Account {
            name,
            domains,
            secret,
            verifier,
            certificates,
            mechanisms: Vec::new(),
            relay,
            any_sender,
            max_size: max_size?,
            rate,
            delivered_to_prefix: delivered_to_prefix?,
            held: held?,
        };
        account.mechanisms = source.note(mechanisms(&mut table, |mechanism| account.lacks(mechanism)))?;
        Ok((account, lines))
    }
}

/// The value of `delivered-to-prefix`.
const PREFIX: Text<String> = Text::new("a prefix such as \"acme-\"", |text| {
    let plain =
        !text.is_empty() && text.bytes().all(|octet| octet.is_ascii_graphic() && !b"@<>\"(),:;\\[]".contains(&octet));
    plain
        .then(|| text.to_owned())
        .ok_or_else(|| "write what is before the local part in Delivered-To, such as \"acme-\"".to_owned())
});

impl Account {
    /// Whether this mechanism may open the account.
    pub fn permits(&self, mechanism: Mechanism) -> bool {
        self.mechanisms.contains(&mechanism) && self.lacks(mechanism).is_none()
    }

    /// Whether the provider offers the mechanism because of this account.
    fn wants_offered(&self, mechanism: Mechanism) -> bool {
        let certificate_only = self.secret.is_none() && self.verifier.is_none();
        self.permits(mechanism)
            || self.mechanisms.contains(&mechanism) && certificate_only && mechanism != Mechanism::CramMd5
    }

    /// The credential that the mechanism needs and the account lacks; `None`: it lacks none.
    fn lacks(&self, mechanism: Mechanism) -> Option<&'static str> {
        let is_ascii = is_usable(self.name.as_bytes()) && self.secret.as_ref().is_none_or(|secret| is_usable(secret));
        match mechanism {
            Mechanism::External => self.certificates.is_empty().then_some("a `certificate`"),
            Mechanism::CramMd5 if self.secret.is_none() => Some(SECRET_IN_CLEAR),
            _ if self.secret.is_none() && self.verifier.is_none() => Some("a `secret` or `scram`"),
            mechanism if mechanism.is_scram() && !is_ascii => Some(ASCII_SECRET),
            _ => None,
        }
    }
}

/// Reads `secret` or `secret-file`, or `scram` in their place. All may be missing.
fn secret_or_verifier(table: &mut Table<'_>) -> Result<(Option<Vec<u8>>, Option<ScramVerifier>), ConfigError> {
    let source = table.file;
    let Some(scram) = table.located("scram", VERIFIER)? else { return Ok((secret(table)?, None)) };
    for key in ["secret", "secret-file"] {
        if let Some(other) = table.take(key) {
            let text = format!("`{key}` and `scram` exclude each other: remove `{key}`, which `scram` replaces");
            return Err(other.line.error(text));
        }
    }
    // With the verifier an attacker can pose as the provider, and can try secrets.
    check_private(source.mode, &source.file).map_err(|text| scram.source.error(text))?;
    Ok((None, Some(scram.value)))
}

#[rustfmt::skip]
const CUSTOMER_KEYS: [&str; 11] = [
    "domains", "certificate", "secret", "secret-file", "scram", "mechanisms", "relay", "any-sender", "max-size", "rate",
    "delivered-to-prefix",
];

impl fmt::Debug for Account {
    /// Without the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Account").field("name", &self.name).finish_non_exhaustive()
    }
}

/// The files of a directory, sorted, so that the same mistakes give the same first error each time. It skips names that
/// begin with a dot, which are temporary files of editors.
fn customer_files(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    sandbox::note_directory(directory);
    for entry in std::fs::read_dir(directory).map_err(|error| sandbox::explain(directory, error))? {
        let path = entry?.path();
        if !path.file_name().unwrap_or_default().as_encoded_bytes().starts_with(b".") {
            files.push(path);
        }
    }
    sort_by(&mut files, PathBuf::cmp);
    Ok(files)
}

/// Whether the name of a file ends in `.toml`.
fn is_customer_file(path: &Path) -> bool {
    path.as_os_str().as_encoded_bytes().ends_with(b".toml")
}
