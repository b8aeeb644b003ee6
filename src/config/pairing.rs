//! Checks the files that set-up writes: a provider's, that of a customer at its provider, and the customer's own. The
//! customer's own file is made from the block that `odmr customer add` has printed at the provider.
//!
//! The operator of the provider writes a block, and root installs it at the customer. So a block may have the keys that a
//! provider prints, and no key that names a file to read: the content of that file could go to the provider as a secret.

use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::de::{DeString, DeTable, DeValue};

use super::accounts::Account;
use super::edit::edited;
use super::print::quote;
use super::source::{FileKind, Source};
use super::table::Table;
use super::{Config, CustomerConfig, MailOwner};
use crate::recipients::ConfigError;

/// Checks the text of a new configuration, and the files that it names.
///
/// # Errors
///
/// The first mistake.
pub fn check_text(path: &Path, text: &str) -> Result<Config, ConfigError> {
    Source::new(&path.into(), text, 0o600).finish(Config::build).0
}

/// Checks the text of a new customer's file at its provider. `tls`: whether the provider has a certificate.
///
/// # Errors
///
/// The first mistake.
pub fn check_new_account(file: &Path, text: &str, tls: bool) -> Result<(), ConfigError> {
    let (account, _) = Source::new(&file.into(), text, 0o640).finish(|source| Account::read(source, tls));
    account.map(drop)
}

/// The directories and the user of a provider whose files are not complete yet.
pub struct ProviderPlaces {
    /// The directory with the customers' files, whether it exists or not.
    pub customers: PathBuf,
    pub spool: PathBuf,
    pub owner: Option<MailOwner>,
}

impl ProviderPlaces {
    /// Reads them from a provider's file; `None`: it has a mistake, which
    /// [`ProviderConfig::load`](super::ProviderConfig::load) reports.
    pub fn read(path: &Path) -> Option<ProviderPlaces> {
        let source = Source::read(path).ok()?;
        let owner = MailOwner::build(&mut Table::root(&source, &[]).ok()?).ok()?;
        let table = source.parse().ok()?;
        let place = |key: &str| Some(source.relative(Path::new(table.get(key)?.get_ref().as_str()?)));
        Some(ProviderPlaces { customers: place("customers")?, spool: place("spool")?, owner })
    }
}

/// A customer's whole file, as the provider has printed it.
pub struct CustomerBlock {
    source: Source,
    pub config: CustomerConfig,
    /// The secret of the account; `None`: only a certificate opens it.
    pub secret: Option<String>,
}

/// The names that are written into an installed block.
pub struct NamesOnDisk<'a> {
    /// `None`: without `user`.
    pub user: Option<&'a str>,
    pub secret_file: &'a str,
    /// The certificate and its key; `None`: those of the block, if it has any.
    pub certificate: Option<[&'a str; 2]>,
    /// `root`, `queue` and `listen`; `None`: those of the block.
    pub places: Option<[&'a str; 3]>,
}

/// The keys that a block may have, by table.
const BLOCK_KEYS: [(&str, &[&str]); 5] = [
    ("", &["hostname", "provider", "mailboxes", "outgoing", "schedule"]),
    ("provider", &["address", "tls", "pin", "name", "secret", "certificate", "key", "mechanisms", "domains"]),
    ("mailboxes", &["root", "accept", "except", "catch-all"]),
    ("outgoing", &["queue", "listen", "domain"]),
    ("schedule", &["every", "at", "zone", "jitter", "retry-first", "retry-max"]),
];

impl CustomerBlock {
    /// Reads a block; `name`: the file for errors.
    ///
    /// # Errors
    ///
    /// The first mistake, or a key that a block may not have.
    pub fn read(name: &Path, text: &str) -> Result<CustomerBlock, ConfigError> {
        let source = Source::new(&name.into(), text, 0o600);
        if let Some(FileKind::Provider) | None = source.kind()? {
            let text = "has no table [provider]: name the file that `odmr customer add` has printed at the provider";
            return Err(source.whole().error(text));
        }
        check_keys(&source, &source.parse()?)?;
        let config = source.finish(CustomerConfig::build).0?;
        let login = config.providers.iter().find_map(|provider| provider.remote.login.as_ref());
        let secret = login.and_then(|login| login.secret.as_deref());
        let secret = secret.map(|secret| String::from_utf8_lossy(secret).into_owned());
        Ok(CustomerBlock { source, config, secret })
    }

    /// Returns the text with these names. Comments and all other values stay.
    ///
    /// # Errors
    ///
    /// The text is not valid TOML.
    pub fn installed(&self, names: &NamesOnDisk<'_>) -> Result<String, ConfigError> {
        let text = self.source.text();
        let line_begin = |at: usize| text[..at].rfind('\n').map_or(0, |end| end + 1);
        let mut edits: Vec<(Range<usize>, String)> = Vec::new();
        let table = self.source.parse()?;
        let root_key = |name: &str| find(&table, name).map(|(key, _)| key);
        if let (Some(user), Some(key)) = (names.user, root_key("hostname")) {
            let at = line_begin(key.start);
            edits.push((at..at, format!("user = {}\n", quote(user))));
        }
        let mut set = |in_table: &str, key: &str, new_key: &str, value: String| {
            let found = sub_table(&table, in_table).and_then(|table| find(table, key));
            found
                .map(|(key, value_span)| edits.push((key.start..value_span.end, format!("{new_key} = {value}"))))
                .is_some()
        };
        set("provider", "secret", "secret-file", quote(names.secret_file));
        if let Some([certificate, key]) = names.certificate
            && !(set("provider", "certificate", "certificate", quote(certificate))
                && set("provider", "key", "key", quote(key)))
        {
            let at = sub_table(&table, "provider").and_then(|table| find(table, "name"));
            let at = line_begin(at.map_or(0, |(key, _)| key.start));
            edits.push((at..at, format!("certificate = {}\nkey = {}\n", quote(certificate), quote(key))));
        }
        if let Some([root, queue, listen]) = names.places {
            let mut set = |in_table: &str, key: &str, value: String| {
                let found = sub_table(&table, in_table).and_then(|table| find(table, key));
                edits.extend(found.map(|(_, span)| (span, value)));
            };
            set("mailboxes", "root", quote(root));
            set("outgoing", "queue", quote(queue));
            set("outgoing", "listen", format!("[{}]", quote(listen)));
        }
        Ok(edited(text, edits))
    }

    /// The error that the names cannot be written into the text.
    pub fn other_form(&self, error: &ConfigError) -> ConfigError {
        let text = "cannot be changed as it is: write it in the form in which `odmr customer add` prints it";
        self.source.whole().error(format!("{text} ({error})"))
    }
}

/// The ranges of a key and of its value.
fn find(table: &DeTable<'_>, name: &str) -> Option<(Range<usize>, Range<usize>)> {
    let (key, value) = table.iter().find(|(key, _)| key.get_ref() == name)?;
    Some((key.span(), value.span()))
}

fn sub_table<'t, 's>(table: &'t DeTable<'s>, name: &str) -> Option<&'t DeTable<'s>> {
    match table.get(name)?.get_ref() {
        DeValue::Table(table) => Some(table),
        _ => None,
    }
}

/// Rejects keys that a block may not have.
fn check_keys(source: &Source, root: &DeTable<'_>) -> Result<(), ConfigError> {
    for (name, keys) in BLOCK_KEYS {
        let table = if name.is_empty() { Some(root) } else { sub_table(root, name) };
        let is_other = |key: &DeString<'_>| !keys.contains(&key.as_ref());
        if let Some((key, _)) = table.into_iter().flatten().find(|(key, _)| is_other(key.get_ref())) {
            let (line, key) = (source.line(key.span()), key.get_ref());
            return Err(line.error(format!(
                "`{key}` is not in what `odmr customer add` prints: remove it here, and add it to the customer.toml that \
                 is made"
            )));
        }
        if let (Some(value), None) = (root.get(name), table) {
            return Err(source.line(value.span()).error(format!("write one table [{name}]")));
        }
    }
    Ok(())
}
