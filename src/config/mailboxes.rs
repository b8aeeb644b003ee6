//! `[mailboxes]`: for whom a customer takes mail, and where it goes.

use std::collections::HashSet;
use std::fmt;
use std::path::PathBuf;

use serde::Deserialize;
use toml::Spanned;

use super::value::{Entry, MAX_SIZE, Size};
use super::{ConfigError, Source, twice};
use crate::smtp::address::{Domain, Mailbox};

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
    /// `domains`: those that are asked for; none: all there are.
    pub(super) fn build(
        source: &Source,
        raw: Spanned<RawMailboxes>,
        domains: &[Domain],
    ) -> Result<Mailboxes, ConfigError> {
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
    pub(super) fn domain(&self) -> Option<&Domain> {
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

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table", rename_all = "kebab-case")]
pub(super) struct RawMailboxes {
    root: Option<Entry<PathBuf>>,
    #[serde(default)]
    accept: Vec<Spanned<Entry<Accept>>>,
    max_size: Option<Entry<Size>>,
}
