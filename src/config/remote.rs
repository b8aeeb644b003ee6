//! Hosts and logins, which several tables have: for a provider, a smarthost, a submission host, a customer's account.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::source::{Source, check_private, read, read_remedy};
use super::table::{Table, check_unique, values};
use super::value::{ACCOUNT_NAME, HostPort, MECHANISM, PATH, PIN, SECRET, TLS_MODE, check_secret, host_port};
use crate::net::pin::Pin;
use crate::plural::counted;
use crate::recipients::{ConfigError, SourceLine};
use crate::sasl::{Login, Mechanism, is_usable};
use crate::session::{ClientIdentity, RemoteSettings, TlsMode};

/// The most pins of a host: a change of keys does not need more.
const MOST_PINS: usize = 8;

/// Reads the settings of the host at an address, without its login: `ca`, `pin`, `certificate`, `key`, and the TLS mode at
/// the key `tls_key`.
pub(super) fn remote(
    table: &mut Table<'_>, HostPort { address, host }: HostPort, tls_key: &str,
) -> Result<RemoteSettings, ConfigError> {
    let tls = table.get(tls_key, TLS_MODE);
    let pin_line = table.line_of("pin");
    let (ca, pins) = (table.located("ca", PATH), pins(table));
    let (tls, ca, pins) = (tls?.unwrap_or_default(), ca?, pins?);
    if let (Some(ca), false) = (&ca, pins.is_empty()) {
        let text = "`ca` and `pin` exclude each other: `pin` trusts one certificate, `ca` those that it signed; \
                    remove one of the two";
        return Err(ca.source.error(text));
    }
    let certificate_line = table.line_of("certificate");
    let identity = identity(table)?;
    let unused = ca.as_ref().map(|ca| &ca.source).or((!pins.is_empty()).then_some(&pin_line));
    if let (TlsMode::None, Some(line)) = (tls, unused.or(identity.as_ref().map(|_| &certificate_line))) {
        return Err(line.error(format!(
            "`ca`, `pin` and `certificate` have no effect with {tls_key} = \"none\": write {tls_key} = \"starttls\", or \
             remove them"
        )));
    }
    let ca = ca.map(|ca| table.file.absolute(&ca.value));
    Ok(RemoteSettings { address, host, tls, ca, pins, identity, login: None })
}

/// Reads `pin`: one, or a list of up to [`MOST_PINS`], so that no call fails while the host changes its key (as with the
/// backup pin of RFC 7469 section 2.5). Empty: the table has no such key.
fn pins(table: &mut Table<'_>) -> Result<Vec<Pin>, ConfigError> {
    let line = table.line_of("pin");
    let Some(value) = table.take("pin") else { return Ok(Vec::new()) };
    // Read all pins before the first error is returned, so that each mistake is noted.
    let read: Vec<_> = value.one_or_many().into_iter().map(|value| value.read(&PIN)).collect();
    let pins: Vec<_> = read.into_iter().collect::<Result<_, _>>()?;
    check_unique(&pins)?;
    match pins.len() {
        0 => Err(line.error("`pin` is empty, so no certificate would be trusted: write a pin, or remove it")),
        1..=MOST_PINS => Ok(values(pins)),
        many => Err(line.error(format!("`pin` has {many} pins: write {MOST_PINS} or less"))),
    }
}

/// Reads `certificate` and `key`, which this side shows if the host asks for a certificate.
fn identity(table: &mut Table<'_>) -> Result<Option<ClientIdentity>, ConfigError> {
    let (certificate, key) = (table.located("certificate", PATH), table.located("key", PATH));
    match (certificate?, key?) {
        (None, None) => Ok(None),
        (Some(certificate), None) => Err(certificate.source.error(
            "`certificate` has no effect without `key`: write key = \"…\" too, the PEM file with its private key",
        )),
        (None, Some(key)) => Err(key.source.error(
            "`key` has no effect without `certificate`: write certificate = \"…\" too, the PEM file with the certificate",
        )),
        (Some(certificate), Some(key)) => {
            let [certificate, path] = [&certificate, &key].map(|file| table.file.absolute(&file.value));
            // If the key cannot be read at all, the TLS module reports it.
            if let Ok(metadata) = std::fs::metadata(&path) {
                check_private(metadata.permissions().mode(), &path).map_err(|text| key.source.error(text))?;
            }
            Ok(Some(ClientIdentity { certificate, key: path }))
        }
    }
}

/// Reads the settings of a host that is optional in a table, with port 587 by default. `key`, `tls_key`: the keys of its
/// address and of its TLS mode; `login`: the login if the table has none.
pub(super) fn optional_remote(
    table: &mut Table<'_>, key: &str, tls_key: &str, login: Option<Login>,
) -> Result<Option<RemoteSettings>, ConfigError> {
    let Some(address) = table.get(key, host_port::<587>())? else {
        let keys = [tls_key, "ca", "pin", "certificate", "key", "name", "secret", "secret-file", "mechanisms"];
        return match keys.into_iter().find_map(|unused| Some((unused, table.take(unused)?.line))) {
            None => Ok(None),
            Some((unused, line)) => {
                Err(line.error(format!("`{unused}` is for `{key}`, and there is none: add `{key}`, or remove this")))
            }
        };
    };
    let host = remote(table, address, tls_key)?;
    let certificate = host.identity.is_some();
    let login = match table.located("name", ACCOUNT_NAME)? {
        Some(name) => {
            let secret = login_secret(table, &name.source, certificate)?;
            Some(Login { certificate, secret, ..Login::with_secret(name.value, Vec::new()) })
        }
        None => match table.take("secret").or_else(|| table.take("secret-file")) {
            None => login.map(|login| Login { certificate, ..login }),
            Some(secret) => {
                let text = "there is a secret, but no `name` to log in with: add `name`, or remove the secret";
                return Err(secret.line.error(text));
            }
        },
    };
    let login = match (login, table.contains("mechanisms")) {
        (Some(login), true) => {
            let mechanisms = mechanisms(table, |mechanism| lacks(&login, mechanism))?;
            Some(Login { mechanisms, ..login })
        }
        (None, true) => {
            let text = "`mechanisms` has no effect without a login: add `name` and `secret`, or remove it";
            return Err(table.line_of("mechanisms").error(text));
        }
        (login, false) => login,
    };
    Ok(Some(RemoteSettings { login, ..host }))
}

/// An error about the file that the key `what` names, `certificate` or `key`, on the line of that key.
pub(super) fn file_error(line: &SourceLine, what: &str, path: &Path, text: &str) -> ConfigError {
    let remedy = match text.starts_with(&format!("{}: ", path.display())) {
        true => format!("; put the {what} there, or name another file in `{what}`"),
        false => String::new(),
    };
    line.error(format!("{text}{remedy}"))
}

/// Reads the secret to log in with at a host. `missing`: the line of the error if there is neither a secret nor a
/// `certificate`.
pub(super) fn login_secret(
    table: &mut Table<'_>, missing: &SourceLine, certificate: bool,
) -> Result<Option<Vec<u8>>, ConfigError> {
    match secret(table)? {
        None if !certificate => Err(missing.error(
            "`secret` is missing: write secret = \"…\", or secret-file = \"…\" for a file with nothing but the secret; or \
             log in by a certificate, with `certificate` and `key`",
        )),
        secret => Ok(secret),
    }
}

/// Reads the secret of an account from `secret` or `secret-file`; `None`: the table has neither.
pub(super) fn secret(table: &mut Table<'_>) -> Result<Option<Vec<u8>>, ConfigError> {
    let source = table.file;
    match (table.located("secret", SECRET)?, table.located("secret-file", PATH)?) {
        (None, None) => Ok(None),
        (Some(_), Some(file)) => {
            Err(file.source.error("`secret` and `secret-file` exclude each other: remove one of the two"))
        }
        (Some(secret), None) => {
            check_private(source.mode, &source.file).map_err(|text| secret.source.error(text))?;
            warn_if_short(source, &secret.source, &secret.value);
            Ok(Some(secret.value))
        }
        (None, Some(_)) if !source.reads_secrets => Ok(Some(Vec::new())),
        (None, Some(file)) => {
            let secret = secret_file(&source.relative(&file.value)).map_err(|text| file.source.error(text))?;
            warn_if_short(source, &file.source, &secret);
            Ok(Some(secret))
        }
    }
}

/// Reads `mechanisms`, all by default. `lacks` returns the credential that a mechanism needs and the account lacks.
pub(super) fn mechanisms(
    table: &mut Table<'_>, lacks: impl Fn(Mechanism) -> Option<&'static str>,
) -> Result<Vec<Mechanism>, ConfigError> {
    let line = table.line_of("mechanisms");
    let Some(list) = table.list("mechanisms", MECHANISM)? else { return Ok(Mechanism::ALL.to_vec()) };
    check_unique(&list)?;
    let mechanisms = values(list);
    let missing: Vec<_> = mechanisms.iter().map_while(|mechanism| Some((mechanism, lacks(*mechanism)?))).collect();
    match missing.first() {
        None if mechanisms.is_empty() => {
            Err(line.error("`mechanisms` is empty, so no login is possible: name some, or remove the line for all"))
        }
        Some((mechanism, lacking)) if missing.len() == mechanisms.len() => {
            Err(line.error(format!("no login is possible, as {mechanism} needs {lacking}: add that, or a mechanism")))
        }
        _ => Ok(mechanisms),
    }
}

/// The credential that a mechanism needs and the login lacks; `None`: it lacks none.
pub(super) fn lacks(login: &Login, mechanism: Mechanism) -> Option<&'static str> {
    match (mechanism, &login.secret) {
        (Mechanism::External, _) => (!login.certificate).then_some("`certificate` and `key`"),
        (_, None) => Some("a `secret`"),
        (mechanism, Some(secret)) => {
            let is_ascii = is_usable(login.name.as_bytes()) && is_usable(secret);
            // The secret is empty for a user that only submits mail and may not read it.
            (mechanism.is_scram() && !is_ascii && !secret.is_empty()).then_some(ASCII_SECRET)
        }
    }
}

/// The need of CRAM-MD5, for errors.
pub(super) const SECRET_IN_CLEAR: &str = "a `secret` in clear";
/// The need of SCRAM, for errors.
pub(super) const ASCII_SECRET: &str = "a name and a secret in printable ASCII";

/// Octets of a secret; a shorter one can be guessed.
const SHORT_SECRET: usize = 12;

fn warn_if_short(source: &Source, line: &SourceLine, secret: &[u8]) {
    if secret.len() < SHORT_SECRET {
        source.warn(line.error(format!(
            "the secret has {} and can be guessed: agree on one of {SHORT_SECRET} or more, such as `odmr secret` makes",
            counted(secret.len(), "octet", "octets")
        )));
    }
}

fn secret_file(path: &Path) -> Result<Vec<u8>, String> {
    let shown = path.display();
    let (mode, mut octets) =
        read(path).map_err(|error| format!("{shown} cannot be read: {error}{}", read_remedy(&error)))?;
    check_private(mode, path)?;
    // Editors append a line end, which is not part of the secret.
    if octets.pop_if(|last| *last == b'\n').is_some() {
        octets.pop_if(|last| *last == b'\r');
    }
    check_secret(&octets).map_err(|text| format!("{shown} {text}"))?;
    Ok(octets)
}
