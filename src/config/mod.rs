//! The configuration: reads TOML files into checked values.
//!
//! A file is a provider's (`spool`, `customers`) or a customer's (`[provider]`). All returned values are valid: domains have
//! the syntax of domains, paths are absolute, numbers are within their bounds. A relative path is relative to the
//! directory of the file that names it. `doc/configuration.md` describes each key.
//!
//! A mistake is one [`ConfigError`], which is one line of text: file, line number, what is wrong, what to write. After a
//! mistake the rest of the file is read too; `load` returns the first mistake, [`Config::examine`] all of them.
//!
//! `source` reads the files, `table` returns their values by key, and `value` has the kinds of values. One file of this
//! directory reads one table. The types of settings are in the modules that use them, such as
//! [`crate::session::settings`]. This module does not open certificates and mail directories: the modules that use them
//! report their errors.

mod accounts;
mod aliases;
mod customer;
mod edit;
mod known;
mod held;
mod limits;
mod mailboxes;
mod owner;
mod pairing;
mod print;
mod provider;
mod relay;
mod remote;
mod schedule;
mod source;
mod table;
mod value;

use std::path::Path;

pub use self::accounts::{Account, Accounts};
pub use self::customer::{CustomerConfig, OutgoingConfig, ProviderAccount};
pub use self::edit::{ChangedFile, with_verifier};
pub use self::held::{HeldConfig, OverQuota};
pub use self::known::{Knowledge, KnownRecipients};
pub use self::mailboxes::MailboxesConfig;
pub use self::owner::MailOwner;
pub use self::pairing::{CustomerBlock, NamesOnDisk, ProviderPlaces, check_new_account, check_text};
pub use self::print::{effective, effective_account, quote};
pub use self::provider::{InboundConfig, OdmrConfig, ProviderConfig, TlsFiles};
pub use self::relay::{RelayConfig, TlsPolicy};
#[cfg(test)]
pub(crate) use self::schedule::parse as parse_schedule;
pub use self::source::Findings;
pub use self::value::{Network, duration};
pub use crate::recipients::{ConfigError, SourceLine};

use self::source::{FileKind, Source};

/// The configuration of a provider or a customer.
#[derive(Clone, Debug)]
pub enum Config {
    Provider(Box<ProviderConfig>),
    Customer(Box<CustomerConfig>),
}

impl Config {
    /// `user` and `group` of the file; `None`: it has no `user`.
    pub fn owner(&self) -> Option<&MailOwner> {
        match self {
            Config::Provider(config) => config.owner.as_ref(),
            Config::Customer(config) => config.owner.as_ref(),
        }
    }

    /// Reads the file of a provider or of a customer.
    ///
    /// # Errors
    ///
    /// The first mistake, or that a file cannot be read.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        Source::examine(path, Config::build).0
    }

    /// Reads the same file. Returns all mistakes and warnings, also those in the files that it names; and the configuration,
    /// unless a mistake leaves a value missing. An unknown key does not.
    pub fn examine(path: &Path) -> (Option<Config>, Findings) {
        Source::examine_all(path, Config::build)
    }

    fn build(source: &Source) -> Result<Config, ConfigError> {
        match source.kind()? {
            Some(FileKind::Provider) => {
                Ok(Config::Provider(Box::new(ProviderConfig::build(source, &Accounts::default())?)))
            }
            Some(FileKind::Customer) => Ok(Config::Customer(Box::new(CustomerConfig::build(source)?))),
            None => Err(source.whole().error(
                "has neither what a provider needs (`spool` and `customers`) nor what a customer needs (a table \
                 [provider]): add one of the two",
            )),
        }
    }
}

/// Returns the line of a key in a file. `keys`: the names of its tables, then the key. If the file does not have the key, it
/// is the line of the innermost of these tables that the file has, or the file as a whole.
pub fn line_of_key(path: &Path, keys: &[&str]) -> SourceLine {
    match Source::read(path) {
        Ok(source) => source.line_of_key(keys),
        Err(error) => error.source,
    }
}

#[cfg(test)]
mod tests;
