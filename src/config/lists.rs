//! Lists whose entries must differ, and the addresses to listen on.

use std::collections::HashSet;
use std::fmt;
use std::hash::Hash;
use std::net::{Ipv6Addr, SocketAddr};

use toml::Spanned;

use super::source::{ConfigError, Source};
use super::value::Checked;
use crate::mail::address::Domain;

/// The addresses of a list; without a list: the default port on all addresses.
pub(super) fn addresses(list: Option<Vec<Spanned<Checked<SocketAddr>>>>, port: u16) -> Vec<SocketAddr> {
    match list {
        Some(list) => list.into_iter().map(|entry| entry.into_inner().0).collect(),
        None => vec![SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))],
    }
}

/// Rejects an address that comes twice: only one listener can have it. Port 0 is a different port each time.
pub(super) fn check_listeners<'a>(
    source: &Source, lists: impl IntoIterator<Item = Option<&'a [Spanned<Checked<SocketAddr>>]>>,
) -> Result<(), ConfigError> {
    let entries = lists.into_iter().flatten().flatten();
    check_unique(source, entries.filter(|entry| entry.get_ref().0.port() != 0))
}

/// The domains of a list, if none comes twice.
pub(super) fn unique_domains(
    source: &Source, domains: Vec<Spanned<Checked<Domain>>>,
) -> Result<Vec<Domain>, ConfigError> {
    check_unique(source, &domains)?;
    Ok(domains.into_iter().map(|entry| entry.into_inner().0).collect())
}

fn check_unique<'a, T: Eq + Hash + fmt::Display + 'a>(
    source: &Source, entries: impl IntoIterator<Item = &'a Spanned<Checked<T>>>,
) -> Result<(), ConfigError> {
    let mut seen = HashSet::new();
    let again = entries.into_iter().find(|entry| !seen.insert(&entry.get_ref().0));
    again.map_or(Ok(()), |entry| Err(source.error(entry.span(), duplicate(&entry.get_ref().0))))
}

/// The error text about a value that comes twice.
pub(super) fn duplicate(what: &impl fmt::Display) -> String {
    format!("{what} stands here a second time: take one of the two out")
}
