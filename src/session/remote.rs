//! A host that the configuration names, with its TLS and credentials: the customer's provider, a smarthost or a
//! submission host.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use super::client::{ClientSession, Connect, SessionFailure};
use crate::mail::address::literal;
use crate::net::pin::Pin;
use crate::net::tls::{ClientTls, Trust};
use crate::net::trace::quoted;
use crate::sasl::Login;
use crate::smtp::client::{Abort, ClientOptions, Stage, StartTls};

/// How TLS begins on a connection to a configured host.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum TlsMode {
    /// By STARTTLS after EHLO (RFC 3207). If the host does not offer it, the client sends neither credentials nor mail.
    #[default]
    StartTls,
    /// With the first octet.
    Implicit,
    /// Never: for a network that is safe without TLS, and for tests.
    None,
}

/// The address of a host, how TLS begins, which certificate the host must show, and the credentials for AUTH.
#[derive(Clone, PartialEq, Eq)]
pub struct RemoteSettings {
    /// `host:port`, `192.0.2.1:port` or `[2001:db8::1]:port`.
    pub address: String,
    /// The host of `address`, without brackets: the name or IP address that the certificate must carry.
    pub host: String,
    /// Default: STARTTLS.
    pub tls: TlsMode,
    /// A PEM file with certificates that are trusted instead of the system's, by an absolute path. Not with `pins`.
    pub ca: Option<PathBuf>,
    /// Certificates and keys of which the host must show one; empty: any that `ca` or the system trusts. Not with `ca`.
    pub pins: Vec<Pin>,
    /// The certificate that this side shows if the host asks for one.
    pub identity: Option<ClientIdentity>,
    /// The credentials for AUTH; `None`: the client does not authenticate.
    pub login: Option<Login>,
}

/// The certificate of this side and its key: two PEM files, by absolute paths.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClientIdentity {
    /// The file of the certificate.
    pub certificate: PathBuf,
    /// The file of the private key.
    pub key: PathBuf,
}

/// Why the configuration of a host cannot be used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RemoteError {
    /// The wrong key of the configuration: `ca`, `certificate` or `key`.
    pub key: &'static str,
    /// A sentence that names the file.
    pub text: String,
}

impl fmt::Display for RemoteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl RemoteSettings {
    /// The login name; empty: the client does not authenticate.
    pub fn login_name(&self) -> &str {
        self.login.as_ref().map_or("", |login| &login.name)
    }
}

impl fmt::Debug for RemoteSettings {
    /// Without the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = format!("{}@{}", self.login_name(), self.address);
        f.debug_tuple("RemoteSettings").field(&address).finish_non_exhaustive()
    }
}

/// A configured host whose certificates were read.
pub struct Remote {
    settings: RemoteSettings,
    tls: Option<ClientTls>,
}

impl Remote {
    /// Reads the trusted certificates, and the one of this side.
    ///
    /// # Errors
    /// A file cannot be read or used.
    pub fn new(settings: &RemoteSettings) -> Result<Remote, RemoteError> {
        let trust = match (settings.tls, &settings.ca) {
            (TlsMode::None, _) => None,
            _ if !settings.pins.is_empty() => Some(Trust::Pins(settings.pins.clone())),
            (_, Some(file)) => Some(Trust::Authorities(file.clone())),
            (_, None) => Some(Trust::System),
        };
        let tls = trust.map(|trust| ClientTls::new(&trust)).transpose();
        let mut tls = tls.map_err(|text| RemoteError { key: "ca", text })?;
        if let (Some(trusting), Some(ClientIdentity { certificate, key })) = (&tls, &settings.identity) {
            tls = Some(trusting.clone().with_identity(certificate, key).map_err(|text| {
                let of_key = text.starts_with(&key.display().to_string()) && key != certificate;
                RemoteError { key: if of_key { "key" } else { "certificate" }, text }
            })?);
        }
        Ok(Remote { settings: settings.clone(), tls })
    }

    /// `host:port`, as configured.
    pub fn address(&self) -> &str {
        &self.settings.address
    }

    /// The name or IP address that the certificate must carry.
    pub fn host(&self) -> &str {
        &self.settings.host
    }

    /// The addresses of the host, in the order of the system's resolver, but IPv6 and IPv4 alternately.
    ///
    /// # Errors
    /// [`SessionFailure::NoHost`], [`SessionFailure::Lost`] if the lookup may succeed later, or
    /// [`SessionFailure::Cancelled`].
    pub fn addresses(&self, how: &Connect<'_>) -> Result<Vec<SocketAddr>, SessionFailure> {
        let address = self.address();
        how.addresses(address).map_err(|error| match error.kind() {
            io::ErrorKind::Interrupted => SessionFailure::Cancelled,
            io::ErrorKind::TimedOut => {
                SessionFailure::Lost(format!("{address} cannot be looked up now: {error}; check the name server"))
            }
            _ => SessionFailure::NoHost(format!("{address} has no address: {error}")),
        })
    }

    /// Connects to one of the addresses. Returns a session in which mail or ATRN may follow. TLS and credentials are
    /// those of the settings; `options` has everything else.
    ///
    /// # Errors
    /// See [`SessionFailure`]; those of the connection have the configured address.
    pub fn connect_to(
        &self, address: SocketAddr, options: &ClientOptions, how: &Connect<'_>,
    ) -> Result<ClientSession, SessionFailure> {
        let settings = &self.settings;
        let options = ClientOptions {
            starttls: if settings.tls == TlsMode::StartTls { StartTls::Required } else { StartTls::Never },
            login: settings.login.clone(),
            ..options.clone()
        };
        let implicit_tls = settings.tls == TlsMode::Implicit;
        let how = Connect { tls: self.tls.as_ref().map(|tls| (tls, settings.host.as_str())), implicit_tls, ..*how };
        how.to(address, options).map_err(|failure| match failure {
            SessionFailure::Unreachable(text) => {
                SessionFailure::Unreachable(format!("no connection to {}: {text}", settings.address))
            }
            SessionFailure::Lost(text) => SessionFailure::Lost(format!("{}: {text}", settings.address)),
            SessionFailure::Broken(text) => SessionFailure::Broken(format!("{}: {text}", settings.address)),
            failure => failure,
        })
    }

    /// Tries the addresses of the host one after the other. Returns a session as [`Remote::connect_to`] does, and the
    /// peer's address.
    ///
    /// # Errors
    /// The first failure of an address that accepted the connection; if none did, the last one. The others are logged.
    pub fn connect(
        &self, options: &ClientOptions, how: &Connect<'_>,
    ) -> Result<(ClientSession, SocketAddr), SessionFailure> {
        self.connect_to_any(&self.addresses(how)?, options, how)
    }

    fn connect_to_any(
        &self, addresses: &[SocketAddr], options: &ClientOptions, how: &Connect<'_>,
    ) -> Result<(ClientSession, SocketAddr), SessionFailure> {
        let mut failed: Option<(SocketAddr, SessionFailure)> = None;
        for (number, socket) in addresses.iter().copied().enumerate() {
            // A nonce must not be used in two sessions.
            let options = &ClientOptions { nonce: format!("{}{number}", options.nonce), ..options.clone() };
            let failure = match self.connect_to(socket, options, how) {
                Ok(session) => {
                    failed.iter().for_each(|(address, failure)| self.log_failed(*address, failure));
                    return Ok((session, socket));
                }
                Err(SessionFailure::Cancelled) => return Err(SessionFailure::Cancelled),
                Err(failure) => failure,
            };
            // If the provider rejects a login, its other addresses would reject it too, and each would count the
            // failure.
            let decided = options.atrn && is_login_failure(&failure);
            let connected = |failure: &SessionFailure| !matches!(failure, SessionFailure::Unreachable(_));
            let (reported, other) = match failed.take() {
                Some((address, earlier)) if connected(&earlier) && !decided => {
                    ((address, earlier), Some((socket, failure)))
                }
                earlier => ((socket, failure), earlier),
            };
            other.iter().for_each(|(address, failure)| self.log_failed(*address, failure));
            if decided {
                return Err(reported.1);
            }
            failed = Some(reported);
        }
        Err(failed.map_or_else(|| SessionFailure::NoHost(format!("{} has no address", self.address())), |(_, it)| it))
    }

    fn log_failed(&self, address: SocketAddr, failure: &SessionFailure) {
        let (host, address) = (&self.settings.host, literal(address.ip()));
        log::info!("event=host-failed host={host} address={address} error={}", quoted(failure));
    }
}

/// Whether the client has sent credentials and the peer has not accepted them, or has not proved that it knows the
/// secret.
fn is_login_failure(failure: &SessionFailure) -> bool {
    match failure {
        SessionFailure::Aborted(Abort::Rejected(rejection)) => rejection.stage == Stage::Auth,
        SessionFailure::Aborted(abort) => matches!(abort, Abort::Unproven | Abort::Unacceptable(_)),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::net::TcpListener;
    use std::thread;
    use std::time::Duration;

    use super::*;
    use crate::net::cancel::CancelToken;
    use crate::session::Timeouts;

    /// A host that sends these replies, the first one as its greeting, and closes the connection.
    fn host(replies: &'static [&'static str]) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            let mut commands = BufReader::new(socket.try_clone().unwrap());
            for reply in replies {
                socket.write_all(reply.as_bytes()).unwrap();
                let _ = commands.read_line(&mut String::new());
            }
        });
        address
    }

    fn connect(addresses: &[SocketAddr], silence: Duration) -> Result<SocketAddr, SessionFailure> {
        let settings = RemoteSettings {
            address: "relay.example.net:366".to_owned(),
            host: "relay.example.net".to_owned(),
            tls: TlsMode::None,
            ca: None,
            pins: Vec::new(),
            identity: None,
            login: Some(Login::with_secret("acme".to_owned(), b"secret".to_vec())),
        };
        let timeouts = Timeouts { greeting: silence, ..Timeouts::default() };
        let cancel = CancelToken::new().unwrap();
        let how = Connect {
            id: "1",
            peer: 'P',
            tls: None,
            implicit_tls: false,
            timeouts: &timeouts,
            cancel: &cancel,
            limit: None,
        };
        let options = ClientOptions { name: "mail.example.org".to_owned(), atrn: true, ..ClientOptions::default() };
        Remote::new(&settings).unwrap().connect_to_any(addresses, &options, &how).map(|(_, address)| address)
    }

    const EHLO: &str = "250-relay.example.net\r\n250-AUTH CRAM-MD5\r\n250 ATRN\r\n";
    const GOOD: &[&str] = &["220 relay.example.net\r\n", EHLO, "334 PDEuMkByZWxheT4=\r\n", "235 2.7.0 ok\r\n"];
    const DENIED: &[&str] = &["220 relay.example.net\r\n", EHLO, "334 PDEuMkByZWxheT4=\r\n", "535 5.7.8 no\r\n"];

    /// The first addresses of a provider may accept connections and fail afterwards.
    #[test]
    fn the_next_address_is_tried_unless_a_login_was_rejected() {
        let silence = Duration::from_secs(20);
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        for first in
            [&["554 no\r\n"][..], &["421 later\r\n"], &["220 x\r\n", "250 no ATRN\r\n"], &["220 x\r\n"], &["no\r\n"]]
        {
            let good = host(GOOD);
            assert_eq!(connect(&[closed, host(first), good], silence), Ok(good), "{first:?}");
        }
        // A host that sends no greeting.
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let good = host(GOOD);
        assert_eq!(connect(&[silent.local_addr().unwrap(), good], Duration::from_millis(50)), Ok(good));
        // The login is tried once, and an address without a listener does not hide that it was rejected.
        let failure = connect(&[closed, host(DENIED), host(GOOD)], silence).unwrap_err();
        assert_eq!(failure.to_string(), "AUTH was rejected: 535 5.7.8 no");
        let failure = connect(&[host(&["554 no\r\n"]), closed], silence).unwrap_err();
        assert_eq!(failure.to_string(), "the greeting was rejected: 554 no");
        let failure = connect(&[closed], silence).unwrap_err();
        assert!(failure.to_string().starts_with("no connection to relay.example.net:366: 127.0.0.1:"), "{failure}");
    }
}
