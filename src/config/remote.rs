//! Hosts and secrets, which several tables have: a provider, a smarthost, a submission host, a customer's account.

use std::path::Path;

use super::source::{Source, check_private, read};
use super::table::Table;
use super::value::{ACCOUNT_NAME, HostPort, PATH, PIN, SECRET, TLS_MODE, check_secret, host_port};
use crate::recipients::{ConfigError, SourceLine};
use crate::sasl::Login;
use crate::session::{RemoteSettings, TlsMode};

/// The host at an address, without credentials. Reads `ca`, `pin`, and how to use TLS at the key `tls_key`.
pub(super) fn remote(
    table: &mut Table<'_>, HostPort { address, host }: HostPort, tls_key: &str,
) -> Result<RemoteSettings, ConfigError> {
    let tls = table.or(tls_key, TLS_MODE, TlsMode::default());
    let (ca, pin) = (table.located("ca", PATH), table.located("pin", PIN));
    let (tls, ca, pin) = (tls?, ca?, pin?);
    if let (Some(ca), Some(_)) = (&ca, &pin) {
        let text = "`ca` and `pin` exclude each other: `pin` trusts one certificate, `ca` those that it signed; \
                    remove one of the two";
        return Err(ca.source.error(text));
    }
    let unused = ca.as_ref().map(|ca| &ca.source).or(pin.as_ref().map(|pin| &pin.source));
    if let (TlsMode::None, Some(line)) = (tls, unused) {
        return Err(line.error(format!(
            "`ca` and `pin` have no effect with {tls_key} = \"none\": write {tls_key} = \"starttls\", or remove them"
        )));
    }
    let ca = ca.map(|ca| table.file.absolute(&ca.value));
    Ok(RemoteSettings { address, host, tls, ca, pin: pin.map(|pin| pin.value), login: None })
}

/// The host that a table need not name, port 587 by default; `key` and `tls_key`: the keys of its address and of how to
/// use TLS; `login`: that of a host without its own.
pub(super) fn optional_remote(
    table: &mut Table<'_>, key: &str, tls_key: &str, login: Option<Login>,
) -> Result<Option<RemoteSettings>, ConfigError> {
    let Some(address) = table.get(key, host_port::<587>())? else {
        let keys = [tls_key, "ca", "pin", "name", "secret", "secret-file"];
        return match keys.into_iter().find_map(|unused| Some((unused, table.take(unused)?.line))) {
            None => Ok(None),
            Some((unused, line)) => {
                Err(line.error(format!("`{unused}` is for `{key}`, and there is none: add `{key}`, or remove this")))
            }
        };
    };
    let host = remote(table, address, tls_key)?;
    let login = match table.located("name", ACCOUNT_NAME)? {
        Some(name) => Some(Login::with_secret(name.value, secret(table, &name.source)?)),
        None => match table.take("secret").or_else(|| table.take("secret-file")) {
            None => login,
            Some(secret) => {
                let text = "there is a secret, but no `name` to log in with: add `name`, or remove the secret";
                return Err(secret.line.error(text));
            }
        },
    };
    Ok(Some(RemoteSettings { login, ..host }))
}

/// The secret of an account, from either key; `missing`: the place of the error when both are missing.
pub(super) fn secret(table: &mut Table<'_>, missing: &SourceLine) -> Result<Vec<u8>, ConfigError> {
    let source = table.file;
    match (table.located("secret", SECRET)?, table.located("secret-file", PATH)?) {
        (None, None) => Err(missing.error(
            "`secret` is missing: write secret = \"…\", or secret-file = \"…\" for a file with nothing but the secret",
        )),
        (Some(_), Some(file)) => {
            Err(file.source.error("`secret` and `secret-file` exclude each other: remove one of the two"))
        }
        (Some(secret), None) => {
            check_private(source.mode, &source.file).map_err(|text| secret.source.error(text))?;
            warn_if_short(source, &secret.source, &secret.value);
            Ok(secret.value)
        }
        (None, Some(_)) if !source.reads_secrets => Ok(Vec::new()),
        (None, Some(file)) => {
            let secret = secret_file(&source.relative(&file.value)).map_err(|text| file.source.error(text))?;
            warn_if_short(source, &file.source, &secret);
            Ok(secret)
        }
    }
}

/// A shorter secret can be guessed.
const SHORT_SECRET: usize = 12;

fn warn_if_short(source: &Source, line: &SourceLine, secret: &[u8]) {
    if secret.len() < SHORT_SECRET {
        source.warn(line.error(format!(
            "the secret has {} octets and can be guessed: agree on one of {SHORT_SECRET} or more, such as `openssl rand \
             -base64 18` prints",
            secret.len()
        )));
    }
}

fn secret_file(path: &Path) -> Result<Vec<u8>, String> {
    let shown = path.display();
    let (mode, mut octets) = read(path).map_err(|error| format!("{shown} cannot be read: {error}"))?;
    check_private(mode, path)?;
    // Editors append a line end, which is not part of the secret.
    if octets.pop_if(|last| *last == b'\n').is_some() {
        octets.pop_if(|last| *last == b'\r');
    }
    check_secret(&octets).map_err(|text| format!("{shown} {text}"))?;
    Ok(octets)
}
