//! The configuration: reads TOML files into checked values.
//!
//! A file is a provider's (`spool`, `customers`) or a customer's (`[provider]`). Each value that is returned is valid:
//! domains are domains, paths are absolute, numbers are within their bounds. A mistake is one
//! [`ConfigError`]: one line of text with the file, the line number, what is allowed, and what to change. Reading goes on
//! after it; `load` returns the first one, and [`Config::examine`] all of them. A relative
//! path is relative to the directory of the file that names it.
//!
//! `source` reads the files, `table` gives out their values by key, and `value` has the kinds of values. Each table is
//! read in a file of its own. Settings of other modules are defined there, such as [`crate::session::settings`].
//! Certificates, keys and directories are only named here: the modules that use them report what is wrong with them.

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
    /// `user` and `group` of the file.
    pub fn owner(&self) -> Option<&MailOwner> {
        match self {
            Config::Provider(config) => config.owner.as_ref(),
            Config::Customer(config) => config.owner.as_ref(),
        }
    }

    /// Reads the file of a provider or a customer, whichever it is.
    ///
    /// # Errors
    ///
    /// The first mistake, or that a file cannot be read.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        Source::examine(path, Config::build).0
    }

    /// Reads the same, and returns all that is found in it and in the files that it names. The configuration is there also
    /// with mistakes that prevent none of its values, such as an unknown key.
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

/// The line of a key in a file; `keys`: the tables that it is in, and the key. If it is not written, the line of the last of
/// them that is, or the file as a whole.
pub fn line_of_key(path: &Path, keys: &[&str]) -> SourceLine {
    match Source::read(path) {
        Ok(source) => source.line_of_key(keys),
        Err(error) => error.source,
    }
}

#[cfg(test)]
mod tests;
