//! A host that the configuration names, with its TLS and credentials: the customer's provider, a smarthost, a submission
//! host.

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;

use super::client::{ClientSession, Connect, SessionFailure};
use crate::mail::address::literal;
use crate::net::tls::{ClientTls, Trust};
use crate::net::trace::quoted;
use crate::smtp::client::{ClientOptions, StartTls};

/// How TLS begins on a connection to a configured host.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum TlsMode {
    /// After EHLO (RFC 3207). If the host does not offer STARTTLS, the client sends neither credentials nor mail.
    #[default]
    StartTls,
    /// From the first octet on.
    Implicit,
    /// Never: for a network that is safe without it, and for tests.
    None,
}

/// Where a host is, how TLS begins, which certificate the host must show, and the credentials for AUTH.
#[derive(Clone, PartialEq, Eq)]
pub struct RemoteSettings {
    /// What to connect to: `host:port`, `192.0.2.1:port` or `[2001:db8::1]:port`.
    pub address: String,
    /// The host of `address`, without brackets: the name or IP address that the certificate must carry.
    pub host: String,
    /// Default: STARTTLS.
    pub tls: TlsMode,
    /// A PEM file with certificates that are trusted instead of the system's. Absolute. Not with `pin`.
    pub ca: Option<PathBuf>,
    /// The SHA-256 of the one certificate that is trusted. Not with `ca`.
    pub pin: Option<[u8; 32]>,
    /// The login name and the secret, both never empty; `None`: without AUTH.
    pub credentials: Option<(String, Vec<u8>)>,
}

impl RemoteSettings {
    /// The login name; empty: without AUTH.
    pub fn login_name(&self) -> &str {
        self.credentials.as_ref().map_or("", |(name, _)| name)
    }
}

impl fmt::Debug for RemoteSettings {
    /// Without the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = format!("{}@{}", self.login_name(), self.address);
        f.debug_tuple("RemoteSettings").field(&address).finish_non_exhaustive()
    }
}

/// A configured host, ready to be connected to.
pub struct Remote {
    settings: RemoteSettings,
    tls: Option<ClientTls>,
}

impl Remote {
    /// Reads the certificates that are to be trusted.
    ///
    /// # Errors
    /// They cannot be read or used; the text says why.
    pub fn new(settings: &RemoteSettings) -> Result<Remote, String> {
        let trust = match (settings.tls, settings.pin, &settings.ca) {
            (TlsMode::None, _, _) => None,
            (_, Some(pin), _) => Some(Trust::Pin(pin)),
            (_, None, Some(file)) => Some(Trust::Authorities(file.clone())),
            (_, None, None) => Some(Trust::System),
        };
        let tls = trust.map(|trust| ClientTls::new(&trust)).transpose()?;
        Ok(Remote { settings: settings.clone(), tls })
    }

    /// `host:port`, as it is configured.
    pub fn address(&self) -> &str {
        &self.settings.address
    }

    /// Tries all addresses of the host, in the order of the system's resolver. Returns a session in which mail or ATRN may
    /// follow, and the peer's address. TLS and credentials are those of the settings, all else is in `options`.
    ///
    /// # Errors
    /// The failure at the last address that was tried, or [`SessionFailure::NoHost`]; those before it are logged.
    pub fn connect(
        &self, options: &ClientOptions, how: &Connect<'_>,
    ) -> Result<(ClientSession, SocketAddr), SessionFailure> {
        let (settings, address) = (&self.settings, &self.settings.address);
        let options = ClientOptions {
            starttls: if settings.tls == TlsMode::StartTls { StartTls::Required } else { StartTls::Never },
            tls: settings.tls == TlsMode::Implicit,
            credentials: settings.credentials.clone(),
            ..options.clone()
        };
        let how = Connect { tls: self.tls.as_ref().map(|tls| (tls, settings.host.as_str())), ..*how };
        let no_host = |reason: String| SessionFailure::NoHost(format!("{address} has no address: {reason}"));
        let mut failed: Option<(SocketAddr, SessionFailure)> = None;
        for socket in address.to_socket_addrs().map_err(|error| no_host(error.to_string()))? {
            if let Some((tried, failure)) = failed.take() {
                let (host, tried) = (&settings.host, literal(tried.ip()));
                log::info!("event=host-failed host={host} address={tried} error={}", quoted(failure));
            }
            match how.to(socket, options.clone()) {
                Ok(session) => return Ok((session, socket)),
                Err(SessionFailure::Cancelled) => return Err(SessionFailure::Cancelled),
                // A login that is rejected at one address of the provider must not count as several.
                Err(failure) if options.atrn && !matches!(failure, SessionFailure::Unreachable(_)) => {
                    return Err(failure);
                }
                Err(failure) => failed = Some((socket, failure)),
            }
        }
        Err(match failed {
            Some((_, SessionFailure::Unreachable(text))) => {
                SessionFailure::Unreachable(format!("no connection to {address}: {text}"))
            }
            Some((_, failure)) => failure,
            None => no_host("the name is known, without an address".to_owned()),
        })
    }
}
