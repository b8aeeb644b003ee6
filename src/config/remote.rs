//! RemoteTable hosts and secrets, which several tables have: a provider, a smarthost, a submission host, a customer's account.

use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::Spanned;

use super::source::{ConfigError, Source, check_private, read};
use super::value::{AccountName, Checked, HostPort, Pin, Secret, check_secret};
use crate::session::{RemoteSettings, TlsMode};

/// What a table says about a host, without the login; `PORT`: the default port.
pub(super) struct RemoteTable<const PORT: u16> {
    /// The key of `tls`.
    pub(super) tls_key: &'static str,
    pub(super) address: HostPort<PORT>,
    pub(super) tls: Option<Spanned<Checked<TlsMode>>>,
    pub(super) ca: Option<Spanned<Checked<PathBuf>>>,
    pub(super) pin: Option<Spanned<Checked<Pin>>>,
}

impl<const PORT: u16> RemoteTable<PORT> {
    /// The host, without credentials.
    pub(super) fn build(self, source: &Source) -> Result<RemoteSettings, ConfigError> {
        let RemoteTable { tls_key, address: HostPort { address, host }, tls, ca, pin } = self;
        let tls = tls.map_or(TlsMode::default(), |tls| tls.into_inner().0);
        if let (Some(ca), Some(_)) = (&ca, &pin) {
            let text = "`ca` and `pin` exclude each other: `pin` trusts one certificate, `ca` those that it signed; take \
                        one of the two out";
            return Err(source.error(ca.span(), text));
        }
        let at = ca.as_ref().map(Spanned::span).or_else(|| pin.as_ref().map(Spanned::span));
        if tls == TlsMode::None && at.is_some() {
            let text = format!(
                "`ca` and `pin` mean nothing with {tls_key} = \"none\": say {tls_key} = \"starttls\", or take them out"
            );
            return Err(source.error(at, text));
        }
        let ca = ca.map(|ca| source.absolute(&ca.into_inner().0));
        let pin = pin.map(|pin| pin.into_inner().0.0);
        Ok(RemoteSettings { address, host, tls, ca, pin, credentials: None })
    }
}

/// What a table says about a host that it need not name, and by which keys.
pub(super) struct OptionalRemoteTable {
    /// The key of `address`.
    pub(super) key: &'static str,
    pub(super) tls_key: &'static str,
    pub(super) address: Option<Checked<HostPort<587>>>,
    pub(super) tls: Option<Spanned<Checked<TlsMode>>>,
    pub(super) ca: Option<Spanned<Checked<PathBuf>>>,
    pub(super) pin: Option<Spanned<Checked<Pin>>>,
    pub(super) name: Option<Spanned<Checked<AccountName>>>,
    pub(super) secret: Option<Spanned<Checked<Secret>>>,
    pub(super) secret_file: Option<Spanned<Checked<PathBuf>>>,
}

impl OptionalRemoteTable {
    /// The host, if one is named; `login`: the credentials for a host without its own.
    pub(super) fn build(
        self, source: &Source, login: Option<(String, Vec<u8>)>,
    ) -> Result<Option<RemoteSettings>, ConfigError> {
        let Some(Checked(address)) = self.address else {
            return match self.first_key() {
                None => Ok(None),
                Some((key, at)) => {
                    let host = self.key;
                    let text = format!("`{key}` is for `{host}`, and there is none: add `{host}`, or take this out");
                    Err(source.error(at, text))
                }
            };
        };
        let remote = RemoteTable { tls_key: self.tls_key, address, tls: self.tls, ca: self.ca, pin: self.pin };
        let remote = remote.build(source)?;
        let credentials = credentials(source, self.name, self.secret, self.secret_file)?.or(login);
        Ok(Some(RemoteSettings { credentials, ..remote }))
    }

    /// The first key that is about the host, and its place.
    fn first_key(&self) -> Option<(&'static str, Range<usize>)> {
        let keys = [
            (self.tls_key, self.tls.as_ref().map(Spanned::span)),
            ("ca", self.ca.as_ref().map(Spanned::span)),
            ("pin", self.pin.as_ref().map(Spanned::span)),
            ("name", self.name.as_ref().map(Spanned::span)),
            ("secret", self.secret.as_ref().map(Spanned::span)),
            ("secret-file", self.secret_file.as_ref().map(Spanned::span)),
        ];
        keys.into_iter().find_map(|(key, at)| Some((key, at?)))
    }
}

/// Name and secret, or neither.
fn credentials(
    source: &Source, name: Option<Spanned<Checked<AccountName>>>, inline: Option<Spanned<Checked<Secret>>>,
    file: Option<Spanned<Checked<PathBuf>>>,
) -> Result<Option<(String, Vec<u8>)>, ConfigError> {
    let alone = inline.as_ref().map(Spanned::span).or_else(|| file.as_ref().map(Spanned::span));
    match (name, alone) {
        (None, None) => Ok(None),
        (None, at) => {
            let text = "there is a secret and no `name` to log in with: add `name`, or take the secret out";
            Err(source.error(at, text))
        }
        (Some(name), _) => {
            let secret = secret(source, inline, file, Some(name.span()))?;
            Ok(Some((name.into_inner().0.0, secret)))
        }
    }
}

/// The secret of an account, from either key; `table`: the place of the error when both are missing.
pub(super) fn secret(
    source: &Source, inline: Option<Spanned<Checked<Secret>>>, file: Option<Spanned<Checked<PathBuf>>>,
    table: Option<Range<usize>>,
) -> Result<Vec<u8>, ConfigError> {
    match (inline, file) {
        (None, None) => {
            let text = "`secret` is missing: say secret = \"…\", or secret-file = \"…\" for a file with nothing \
                        else in it";
            Err(source.error(table, text))
        }
        (Some(_), Some(file)) => {
            let text = "`secret` and `secret-file` exclude each other: take one of the two out";
            Err(source.error(file.span(), text))
        }
        (Some(secret), None) => {
            check_private(&source.metadata, &source.file).map_err(|text| source.error(secret.span(), text))?;
            Ok(secret.into_inner().0.0)
        }
        (None, Some(_)) if !source.reads_secrets => Ok(Vec::new()),
        (None, Some(file)) => {
            let path = source.directory().join(&file.as_ref().0);
            secret_file(&path).map_err(|text| source.error(file.span(), text))
        }
    }
}

fn secret_file(path: &Path) -> Result<Vec<u8>, String> {
    let shown = path.display();
    let (metadata, mut octets) = read(path).map_err(|error| format!("{shown} cannot be read: {error}"))?;
    check_private(&metadata, path)?;
    // The editor appended the line end; it is not part of the secret.
    if octets.pop_if(|last| *last == b'\n').is_some() {
        octets.pop_if(|last| *last == b'\r');
    }
    check_secret(&octets).map_err(|text| format!("{shown} {text}"))?;
    Ok(octets)
}
