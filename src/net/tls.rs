//! TLS configurations, made of certificates, keys, trust and pins, and TLS sessions.
//!
//! No other file of the program has types of rustls. TLS 1.2 and 1.3 only (RFC 8996). No session resumption: the peer
//! proves its identity in each connection. A `TlsSession` has no socket: a [`Connection`](crate::net::connection::Connection)
//! feeds it the octets that have arrived and sends those that it has sealed. Each error text has the cause and the remedy.
//!
//! A server asks for a certificate of the client only if it is configured ([`ServerTls::asking`], RFC 8314 section 4.2). TLS
//! accepts any certificate, with any issuer and dates, and also none; the client proves that it has the key. Authentication
//! finds the account of the certificate by its pin ([`TlsChannel`]).
//!
//! Which certificates the connecting side trusts:
//!
//! ```text
//! Trust::System             the authorities of this machine; name and dates are checked
//! Trust::Authorities(file)  the authorities in the file, or the peer's own certificate in it; name and dates are checked
//! Trust::Pin(pin)           exactly this certificate, or each with this key; name and dates do not matter
//! Trust::Anyone             every certificate
//! ```
//!
//! In all four the peer proves, by its handshake signature, that it has the certificate's key. webpki reads certificates
//! of X.509 version 3 only. Another certificate is trusted if it is pinned, is in the file octet for octet, or need not be
//! trusted: then only its key is needed, which `x509` reads. Such a certificate has no names.

use std::fmt;
use std::io::{self, BufRead, Read, Write};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use data_encoding::HEXLOWER;
use rcgen::{CertificateParams, DnType, KeyPair};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption, WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{
    CryptoProvider, verify_tls12_signature, verify_tls13_signature, verify_tls13_signature_with_raw_key,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime, alg_id};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, Connection, DigitallySignedStruct,
    DistinguishedName, Error, InvalidMessage, OtherError, ProtocolVersion, RootCertStore, ServerConfig,
    ServerConnection, SignatureScheme,
};
use sha2::{Digest, Sha256};

use crate::clock::{Clock, Timestamp};
use crate::net::pin::Pin;
use crate::net::trace::quoted;
use crate::net::x509;
use crate::sasl::{CertificateDigests, TlsChannel};
use crate::text_file;

/// The configuration of the side that accepts connections: a certificate chain and its key. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ServerTls {
    config: Arc<ServerConfig>,
    /// The same configuration, which asks the client for a certificate.
    asking: Arc<ServerConfig>,
    /// See [`ServerTls::until`].
    until: Option<Timestamp>,
}

/// The configuration of the side that makes connections: the certificates that it trusts, and its own. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ClientTls {
    config: Arc<ClientConfig>,
    /// The certificate for a server that asks for one.
    identity: Option<Arc<CertifiedKey>>,
    /// The peer's certificate must be for the name of the peer.
    checks_name: bool,
}

/// Which certificates the connecting side trusts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trust {
    /// The certificate authorities of this machine.
    System,
    /// The authorities, or the peer's own certificate, in a PEM file.
    Authorities(PathBuf),
    /// The certificate or the key of any of these, whatever the name and the dates. Not empty.
    Pins(Vec<Pin>),
    /// Every certificate: encryption without authentication is better than clear text (RFC 7435).
    Anyone,
}

/// The result of a TLS negotiation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsInfo {
    /// "TLSv1.3" or "TLSv1.2".
    pub version: &'static str,
    /// The name in the IANA registry: "TLS_AES_128_GCM_SHA256".
    pub cipher: String,
}

/// For the `Received` field: `TLSv1.3 TLS_AES_256_GCM_SHA384`.
impl fmt::Display for TlsInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.version, self.cipher)
    }
}

/// Fills `octets` with random octets that are good enough for keys and nonces. Waits until the system has them: weak
/// randomness would be worse than a late start.
pub fn random(octets: &mut [u8]) {
    while PROVIDER.secure_random.fill(octets).is_err() {
        log::error!("event=no-randomness");
        std::thread::sleep(Duration::from_millis(200));
    }
}

impl ServerTls {
    /// Reads two PEM files: the certificate chain, the server's own certificate first, and its key.
    ///
    /// # Errors
    ///
    /// A text with the file and what to do.
    pub fn load(certificate: &Path, key: &Path) -> Result<ServerTls, String> {
        ServerTls::new(&PemText::read(certificate)?, &PemText::read(key)?)
    }

    /// The end of the certificate's validity; `None`: the certificate has no valid time there.
    pub fn until(&self) -> Option<Timestamp> {
        self.until
    }

    /// The same configuration, which asks the client for a certificate (RFC 8314 section 4.2: only if it is configured).
    pub fn asking(&self) -> ServerTls {
        ServerTls { config: self.asking.clone(), ..self.clone() }
    }

    fn new(certificate: &PemText, key: &PemText) -> Result<ServerTls, String> {
        let chain = certificate.certificates()?;
        certificate.check_version(&chain[0], key)?;
        // A certificate that webpki cannot read would be rejected by clients.
        ParsedCertificate::try_from(&chain[0])
            .map_err(|error| format!("{} and {} cannot be used: {error}", certificate.name, key.name))?;
        let until = x509::Certificate::read(&chain[0]).and_then(|certificate| certificate.until());
        let until = until.and_then(|until| Timestamp::parse_rfc3339(&until));
        let identity = Arc::new(SingleCertAndKey::from(certified_key(certificate, key)?));
        let config = |asks: bool| {
            let versions = ServerConfig::builder_with_provider(PROVIDER.clone()).with_safe_default_protocol_versions();
            let builder = versions.map_err(|error| format!("TLS: {error}"))?;
            let builder = match asks {
                true => builder.with_client_cert_verifier(Arc::new(AnyClient)),
                false => builder.with_no_client_auth(),
            };
            let mut config = builder.with_cert_resolver(identity.clone());
            // Each connection proves the peer's identity again, so session tickets would only cost memory and octets.
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.send_tls13_tickets = 0;
            Ok::<_, String>(Arc::new(config))
        };
        Ok(ServerTls { config: config(false)?, asking: config(true)?, until })
    }
}

/// A certificate of our own with its key.
fn certified_key(certificate: &PemText, key: &PemText) -> Result<Arc<CertifiedKey>, String> {
    let chain = certificate.certificates()?;
    // The error of rustls does not have the reason why it cannot read the key.
    let signing = PROVIDER.key_provider.load_private_key(key.private_key()?).map_err(|_| key.unusable_key())?;
    // rustls would compare them only if the certificate is of version 3.
    let public = signing.public_key();
    let Some(found) = key_of(&chain[0]) else {
        return Err(format!("{} holds a certificate that cannot be read: make it anew", certificate.name));
    };
    if public.is_some_and(|public| found != public.as_ref()) {
        return Err(format!(
            "{} does not belong to the first certificate in {}: the own certificate must come first, its issuers after it",
            key.name, certificate.name
        ));
    }
    Ok(Arc::new(CertifiedKey::new(chain, signing)))
}

/// The properties of a certificate, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateInfo {
    /// The names and addresses that it is for.
    pub names: Vec<String>,
    /// The end of its validity; `None`: the certificate has no valid time there.
    pub until: Option<Timestamp>,
    /// Its two pins: of the certificate, and of its key.
    pub pins: [String; 2],
    /// Its issuer is its subject, as in a self-signed certificate (RFC 5280 section 3.2).
    pub is_self_issued: bool,
    der: CertificateDer<'static>,
}

impl CertificateInfo {
    /// Reads the first certificate of a PEM file.
    ///
    /// # Errors
    ///
    /// A text with the file and what to do.
    pub fn load(path: &Path) -> Result<CertificateInfo, String> {
        PemText::read(path)?.certificates().map(|chain| CertificateInfo::new(&chain[0]))
    }

    /// Reads all certificates of a PEM file: its own, and those of its issuers.
    ///
    /// # Errors
    ///
    /// A text with the file and what to do.
    pub fn load_chain(path: &Path) -> Result<Vec<CertificateInfo>, String> {
        PemText::read(path)?.certificates().map(|chain| chain.iter().map(CertificateInfo::new).collect())
    }

    /// The data of a TLSA record for it (RFC 6698 section 2.1). `selector`: 0 for the certificate, 1 for its key; `matching`: 0
    /// for all octets, 1 for their SHA-256. `None`: this program does not know these numbers, or cannot read the key.
    pub fn association(&self, selector: u8, matching: u8) -> Option<Vec<u8>> {
        let octets = match selector {
            0 => self.der.as_ref(),
            1 => key_of(&self.der)?,
            _ => return None,
        };
        match matching {
            0 => Some(octets.to_vec()),
            1 => Some(Sha256::digest(octets).to_vec()),
            _ => None,
        }
    }

    fn new(certificate: &CertificateDer<'_>) -> CertificateInfo {
        let read = x509::Certificate::read(certificate);
        let is_self_issued = read.as_ref().is_some_and(|certificate| certificate.self_issued);
        let until = read.and_then(|certificate| certificate.until());
        let mut pins = [format!("sha256:{}", HEXLOWER.encode(&digest(certificate))), "spki-sha256:".to_owned()];
        pins[1] += &key_shown(certificate);
        let until = until.and_then(|until| Timestamp::parse_rfc3339(&until));
        let der = certificate.clone().into_owned();
        let mut info = CertificateInfo { names: Vec::new(), until, pins, is_self_issued, der };
        // rustls returns the names of a certificate only in the error about a name that it does not have.
        if let Err(Error::InvalidCertificate(CertificateError::NotValidForNameContext { presented, .. })) =
            info.verify_name("no-such-name.invalid")
        {
            info.names = presented.iter().map(|name| bare_name(name).to_owned()).collect();
        }
        info
    }

    /// Whether a client accepts the certificate for this name.
    pub fn is_for(&self, name: &str) -> bool {
        self.verify_name(name).is_ok()
    }

    fn verify_name(&self, name: &str) -> Result<(), Error> {
        let name = ServerName::try_from(name).map_err(|_| CertificateError::BadEncoding)?;
        verify_server_name(&ParsedCertificate::try_from(&self.der)?, &name)
    }
}

impl ClientTls {
    /// Returns the configuration of a client that trusts these certificates. Reads the files now.
    ///
    /// # Errors
    ///
    /// A text with the file and what to do.
    pub fn new(trust: &Trust) -> Result<ClientTls, String> {
        ClientTls::with(Verification::new(trust)?, rustls::DEFAULT_VERSIONS)
    }

    /// The same configuration with a client certificate, for a server that asks for one: the first of a PEM file, with
    /// its key in another file. Its names and its dates do not matter here.
    ///
    /// # Errors
    ///
    /// A text with the file and what to do.
    pub fn with_identity(self, certificate: &Path, key: &Path) -> Result<ClientTls, String> {
        let identity = certified_key(&PemText::read(certificate)?, &PemText::read(key)?)?;
        Ok(ClientTls { identity: Some(identity), ..self })
    }

    fn with(
        verification: Verification, versions: &[&'static rustls::SupportedProtocolVersion],
    ) -> Result<ClientTls, String> {
        let checks_name = matches!(verification, Verification::Chain { .. });
        let mut config = ClientConfig::builder_with_provider(PROVIDER.clone())
            .with_protocol_versions(versions)
            .map_err(|error| format!("TLS: {error}"))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verification))
            .with_no_client_auth();
        config.resumption = Resumption::disabled();
        Ok(ClientTls { config: Arc::new(config), identity: None, checks_name })
    }
}

/// Makes a self-signed certificate for `names` (domain names or IP addresses). Returns it and its key, both as PEM.
///
/// # Errors
///
/// A certificate cannot be for one of the names.
pub fn self_signed(names: &[&str]) -> Result<(String, String), String> {
    let key = new_key()?;
    Ok((certificate_with_key(names, &key)?, key))
}

/// Makes a private key, as PEM.
///
/// # Errors
///
/// The system has no randomness.
pub fn new_key() -> Result<String, String> {
    let made = KeyPair::generate().map_err(|error| format!("cannot make a key: {error}"))?;
    Ok(made.serialize_pem())
}

/// The validity of certificates that are made here: ten years.
const OWN_VALIDITY: Duration = Duration::from_secs(3653 * 24 * 60 * 60);

/// Makes a self-signed certificate for `names` with this key, as PEM. It is valid for ten years, from a day ago on, for
/// clients whose clock is slow.
///
/// # Errors
///
/// A certificate cannot be for one of the names, or the key cannot be read.
pub fn certificate_with_key(names: &[&str], key: &str) -> Result<String, String> {
    let unusable = || "cannot make a certificate: the file has no private key".to_owned();
    let key = rustls_pemfile::private_key(&mut key.as_bytes()).ok().flatten().ok_or_else(unusable)?;
    let make = || {
        let key = KeyPair::try_from(&key)?;
        let mut params = CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())?;
        let now = u64::try_from(Clock::System.now().seconds()).unwrap_or_default();
        let now = rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(now);
        (params.not_before, params.not_after) = (now - Duration::from_secs(24 * 60 * 60), now + OWN_VALIDITY);
        // Clients check the names above only. RFC 5280 section 4.1.2.4: the issuer must not be empty; 64 octets at most.
        let name = names.first().filter(|name| name.len() <= 64).unwrap_or(&"odmr");
        params.distinguished_name.push(DnType::CommonName, *name);
        Ok(params.self_signed(&key)?.pem())
    };
    make().map_err(|error: rcgen::Error| format!("cannot make a certificate: {error}"))
}

/// Returns whether the octets begin with the header of a TLS record (RFC 8446 section 5.1), as no command and no message does.
/// Exim sends records inside TLS if its transport passes a TLS connection to another process.
pub fn begins_as_record(octets: &[u8]) -> bool {
    matches!(octets, [0x14..=0x17, 0x03, 0x00..=0x04, ..])
}

/// One TLS connection without its socket.
pub(crate) struct TlsSession {
    connection: Connection,
    /// On the client's side: its own certificate, and whether the server has asked for it.
    shown: Option<Arc<ShownIdentity>>,
    /// Sealed octets that `write_to` has not yet written.
    unsent: usize,
}

/// The label of the channel binding `tls-exporter` (RFC 9266 section 2).
const EXPORTER_LABEL: &[u8] = b"EXPORTER-Channel-Binding";

/// Sealed octets that rustls may hold: four full records.
const SEALED_LIMIT: usize = 64 * 1024;

impl TlsSession {
    // Inlined, its large temporary values would stay on the stack of each thread during the handshake.
    #[inline(never)]
    pub(crate) fn server(tls: &ServerTls) -> io::Result<Box<TlsSession>> {
        Ok(TlsSession::new(ServerConnection::new(tls.config.clone()).map_err(failed)?.into(), None))
    }

    /// `name`: the domain name or IP address that the peer's certificate must be for (see [`is_certificate_name`]).
    #[inline(never)]
    pub(crate) fn client(tls: &ClientTls, name: &str) -> io::Result<Box<TlsSession>> {
        let wanted = match ServerName::try_from(name.to_owned()) {
            Ok(name) => name,
            // The DNS permits names of mail hosts that TLS does not. If the name is not verified, TLS needs none.
            Err(_) if !tls.checks_name => ServerName::from(Ipv4Addr::UNSPECIFIED),
            Err(_) => {
                let text = format!("`{name}` is not a name that a certificate can be for");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
        };
        let shown = tls.identity.clone().map(|key| Arc::new(ShownIdentity { key, asked: AtomicBool::new(false) }));
        let config = match &shown {
            None => tls.config.clone(),
            Some(shown) => {
                let mut config = ClientConfig::clone(&tls.config);
                config.client_auth_cert_resolver = shown.clone();
                Arc::new(config)
            }
        };
        Ok(TlsSession::new(ClientConnection::new(config, wanted).map_err(failed)?.into(), shown))
    }

    fn new(mut connection: Connection, shown: Option<Arc<ShownIdentity>>) -> Box<TlsSession> {
        connection.set_buffer_limit(Some(SEALED_LIMIT));
        let mut session = Box::new(TlsSession { connection, shown, unsent: 0 });
        session.count();
        session
    }

    /// Decrypts octets from the socket and appends all of the result to `plain`, because poll(2) does not report octets
    /// that are already decrypted. Octets after a close_notify are dropped.
    pub(crate) fn feed(&mut self, octets: &[u8], plain: &mut Vec<u8>) -> io::Result<()> {
        let mut source = SliceReader(octets);
        loop {
            match self.connection.read_tls(&mut source) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                // The slice is empty, which is not an error. In this last call rustls has shrunk its buffer.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
            let handshaking = self.connection.is_handshaking();
            let processed = self.connection.process_new_packets();
            match self.connection.reader().read_to_end(plain) {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                _ => {}
            }
            self.count();
            processed.map_err(|error| match error {
                // Exim sends a last QUIT in clear. In the handshake the error means that `tls` is wrong.
                Error::InvalidMessage(InvalidMessage::InvalidContentType) if !handshaking => {
                    io::Error::new(io::ErrorKind::InvalidData, "the peer spoke outside TLS")
                }
                error => failed(error),
            })?;
        }
    }

    /// Reports to rustls that the socket is at its end.
    pub(crate) fn end_of_input(&mut self) -> io::Result<()> {
        self.connection.read_tls(&mut io::empty())?;
        self.connection.process_new_packets().map_err(failed).map(drop)
    }

    /// Returns whether the peer has sent close_notify.
    ///
    /// # Errors
    ///
    /// `UnexpectedEof` for an end without close_notify: an attacker may have cut the connection (RFC 8314 section 3.4).
    pub(crate) fn ended(&mut self) -> io::Result<bool> {
        match self.connection.reader().fill_buf() {
            Ok(rest) => Ok(rest.is_empty()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the peer ended the connection without a TLS close_notify: its data may be incomplete",
            )),
            Err(error) => Err(error),
        }
    }

    /// Encrypts as much of `plain` as [`SEALED_LIMIT`] permits. Returns the number of octets.
    pub(crate) fn seal(&mut self, plain: &[u8]) -> io::Result<usize> {
        let sealed = self.connection.writer().write(plain)?;
        self.count();
        if sealed == 0 && !plain.is_empty() && !self.connection.wants_write() {
            // TLS 1.2 cannot renew the keys of a connection; TLS 1.3 can.
            return Err(io::Error::other("the TLS keys of this connection are used up"));
        }
        Ok(sealed)
    }

    /// Writes sealed octets, in one call if possible. Returns how many the socket accepted.
    pub(crate) fn write_to(&mut self, socket: &mut dyn Write) -> io::Result<usize> {
        let written = self.connection.write_tls(socket)?;
        self.unsent = self.unsent.saturating_sub(written);
        Ok(written)
    }

    /// Returns whether there are sealed octets to write.
    pub(crate) fn wants_write(&self) -> bool {
        self.connection.wants_write()
    }

    /// Returns whether the handshake is not yet complete.
    pub(crate) fn handshaking(&self) -> bool {
        self.connection.is_handshaking()
    }

    /// Returns how many sealed octets were not yet written to the socket.
    pub(crate) fn unsent(&self) -> usize {
        if self.wants_write() { self.unsent.max(1) } else { 0 }
    }

    /// Seals a close_notify.
    pub(crate) fn close(&mut self) {
        self.connection.send_close_notify();
        self.count();
    }

    /// Returns the version and the cipher; `None` in the handshake.
    pub(crate) fn info(&self) -> Option<TlsInfo> {
        let version = match self.connection.protocol_version()? {
            ProtocolVersion::TLSv1_2 => "TLSv1.2",
            ProtocolVersion::TLSv1_3 => "TLSv1.3",
            _ => return None,
        };
        let suite = format!("{:?}", self.connection.negotiated_cipher_suite()?.suite());
        // rustls writes TLS13_AES_…, the registry TLS_AES_….
        let cipher = suite.replacen("TLS13_", "TLS_", 1);
        Some(TlsInfo { version, cipher })
    }

    /// Returns the properties that an authentication may use, after the handshake.
    pub(crate) fn channel(&self) -> TlsChannel {
        // RFC 9266 section 4.2: under TLS 1.2 the channel binding would require the extended master secret.
        let exporter = match self.connection.protocol_version() {
            Some(ProtocolVersion::TLSv1_3) => {
                self.connection.export_keying_material([0; 32], EXPORTER_LABEL, Some(b"")).ok()
            }
            _ => None,
        };
        let client_certificate = match &self.connection {
            Connection::Server(server) => server.peer_certificates().and_then(|chain| digests(chain.first()?)),
            Connection::Client(_) => self.shown.as_ref().and_then(|shown| shown.digests()),
        };
        TlsChannel { exporter, client_certificate }
    }

    /// Returns the certificate of the peer; `None` before it has sent one.
    pub(crate) fn peer_certificate(&self) -> Option<CertificateInfo> {
        self.connection.peer_certificates()?.first().map(CertificateInfo::new)
    }

    /// Updates the number of sealed octets: rustls returns it from this call only.
    fn count(&mut self) {
        if let Ok(state) = self.connection.process_new_packets() {
            self.unsent = state.tls_bytes_to_write();
        }
    }
}

/// Our own certificate in one connection, and whether the server has asked for it.
#[derive(Debug)]
struct ShownIdentity {
    key: Arc<CertifiedKey>,
    asked: AtomicBool,
}

impl ShownIdentity {
    /// The digests of the certificate, if the server has asked for it.
    fn digests(&self) -> Option<CertificateDigests> {
        self.asked.load(Ordering::Relaxed).then(|| digests(self.key.cert.first()?)).flatten()
    }
}

impl ResolvesClientCert for ShownIdentity {
    /// The authorities that the server names do not matter: it decides whether it accepts the certificate.
    fn resolve(&self, _authorities: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.key.key.choose_scheme(schemes)?;
        self.asked.store(true, Ordering::Relaxed);
        Some(self.key.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// A slice that ends in `WouldBlock` when it is read, as a socket does.
struct SliceReader<'a>(&'a [u8]);

impl Read for SliceReader<'_> {
    fn read(&mut self, space: &mut [u8]) -> io::Result<usize> {
        match self.0.is_empty() {
            true => Err(io::ErrorKind::WouldBlock.into()),
            false => self.0.read(space),
        }
    }
}

static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| Arc::new(provider()));

#[cfg(not(feature = "aws-lc-rs"))]
fn provider() -> CryptoProvider {
    rustls::crypto::ring::default_provider()
}

#[cfg(feature = "aws-lc-rs")]
fn provider() -> CryptoProvider {
    rustls::crypto::aws_lc_rs::default_provider()
}

/// The rule by which a peer's certificate is verified.
#[derive(Debug)]
enum Verification {
    Chain {
        authorities: Arc<WebPkiServerVerifier>,
        /// Certificates that are trusted if the peer presents exactly one of them.
        exact: Vec<CertificateDer<'static>>,
    },
    /// Not empty.
    Pins(Vec<Pin>),
    Anyone,
}

impl Verification {
    fn new(trust: &Trust) -> Result<Verification, String> {
        match trust {
            Trust::System => Verification::system(),
            Trust::Authorities(path) => Verification::exact(&PemText::read(path)?),
            Trust::Pins(pins) => Ok(Verification::Pins(pins.clone())),
            Trust::Anyone => Ok(Verification::Anyone),
        }
    }

    fn system() -> Result<Verification, String> {
        let found = rustls_native_certs::load_native_certs();
        for error in &found.errors {
            log::warn!("event=authority-unreadable error={}", quoted(error));
        }
        let mut roots = RootCertStore::empty();
        let (added, _) = roots.add_parsable_certificates(found.certs);
        if added == 0 {
            return Err("this system has no certificate authorities: install its ca-certificates package, \
                 or set `ca` or `pin`"
                .to_string());
        }
        Verification::chain(roots, Vec::new())
    }

    /// Trusts the certificates in `file`, as authorities or as the peer's own.
    fn exact(file: &PemText) -> Result<Verification, String> {
        let exact = file.certificates()?;
        let mut roots = RootCertStore::empty();
        for (certificate, number) in exact.iter().zip(1..) {
            // One that cannot be an authority may be the peer's own.
            if let Err(error) = roots.add(certificate.clone())
                && key_digest(certificate).is_none()
            {
                return Err(format!("certificate {number} in {} cannot be used: {error}", file.name));
            }
        }
        Verification::chain(roots, exact)
    }

    /// The key that verifies the handshake signature if only the key of the certificate is trusted; `None`: webpki reads the
    /// key. A signature must be verified with the very key that was compared with the pin: two parsers might find different
    /// ones.
    fn lone_key<'a>(&self, certificate: &'a CertificateDer<'_>) -> Result<Option<&'a [u8]>, Error> {
        match (ParsedCertificate::try_from(certificate), self) {
            (Ok(_), Verification::Chain { .. } | Verification::Anyone) => Ok(None),
            // A pin of the whole certificate covers its key.
            (Ok(_), Verification::Pins(pins))
                if pins.iter().any(|pin| matches!(pin, Pin::Certificate(_)) && fits(pin, certificate)) =>
            {
                Ok(None)
            }
            (Ok(_), Verification::Pins(_)) | (Err(_), _) => any_key(certificate).map(Some),
        }
    }

    fn chain(roots: RootCertStore, exact: Vec<CertificateDer<'static>>) -> Result<Verification, String> {
        let authorities = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), PROVIDER.clone())
            .build()
            .map_err(|error| format!("the certificate authorities cannot be used: {error}"))?;
        Ok(Verification::Chain { authorities, exact })
    }
}

/// Whether a certificate can be for this name.
pub fn is_certificate_name(name: &str) -> bool {
    ServerName::try_from(name).is_ok()
}

impl ServerCertVerifier for Verification {
    fn verify_server_cert(
        &self, certificate: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>], name: &ServerName<'_>,
        ocsp_response: &[u8], now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match self {
            Verification::Anyone => Ok(ServerCertVerified::assertion()),
            Verification::Pins(pins) if pins.iter().any(|pin| fits(pin, certificate)) => {
                Ok(ServerCertVerified::assertion())
            }
            Verification::Pins(pins) => Err(untrusted(wrong_pin(pins, certificate))),
            Verification::Chain { authorities, exact } => authorities
                .verify_server_cert(certificate, intermediates, name, ocsp_response, now)
                .or_else(|error| match exact.contains(certificate) {
                    true => accept_exact(certificate, name, error),
                    false => Err(with_fingerprint(error, certificate)),
                }),
        }
    }

    fn verify_tls12_signature(
        &self, message: &[u8], certificate: &CertificateDer<'_>, signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let verified = match self.lone_key(certificate)? {
            None => {
                verify_tls12_signature(message, certificate, signature, &PROVIDER.signature_verification_algorithms)
            }
            Some(key) => verify_tls12_with_key(message, key, signature),
        };
        verified.map_err(|error| with_key_kind(error, certificate))
    }

    fn verify_tls13_signature(
        &self, message: &[u8], certificate: &CertificateDer<'_>, signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &PROVIDER.signature_verification_algorithms;
        let verified = match self.lone_key(certificate)? {
            None => verify_tls13_signature(message, certificate, signature, algorithms),
            Some(key) => verify_tls13_with_key(message, key, signature),
        };
        verified.map_err(|error| with_key_kind(error, certificate))
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        PROVIDER.signature_verification_algorithms.supported_schemes()
    }
}

/// Accepts any certificate of a client, or none. Signatures are verified with the key that `x509` reads, as its digest is of
/// that key.
#[derive(Debug)]
struct AnyClient;

impl ClientCertVerifier for AnyClient {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    /// No names of authorities: most of these certificates are self-signed, and a client might send only certificates of the
    /// authorities named.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    /// The dates do not matter: a pin is trusted as long as the configuration has it.
    fn verify_client_cert(
        &self, certificate: &CertificateDer<'_>, _intermediates: &[CertificateDer<'_>], _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        any_key(certificate).map(|_| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self, message: &[u8], certificate: &CertificateDer<'_>, signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_with_key(message, any_key(certificate)?, signature)
            .map_err(|error| with_key_kind(error, certificate))
    }

    fn verify_tls13_signature(
        &self, message: &[u8], certificate: &CertificateDer<'_>, signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_with_key(message, any_key(certificate)?, signature)
            .map_err(|error| with_key_kind(error, certificate))
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        PROVIDER.signature_verification_algorithms.supported_schemes()
    }
}

/// The SubjectPublicKeyInfo of a certificate.
fn any_key<'a>(certificate: &'a CertificateDer<'_>) -> Result<&'a [u8], Error> {
    key_of(certificate).ok_or_else(|| CertificateError::BadEncoding.into())
}

/// Verifies a signature of TLS 1.3 with a key alone.
fn verify_tls13_with_key(
    message: &[u8], key: &[u8], signature: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, Error> {
    let algorithms = &PROVIDER.signature_verification_algorithms;
    verify_tls13_signature_with_raw_key(message, &SubjectPublicKeyInfoDer::from(key), signature, algorithms)
}

/// Verifies a signature of TLS 1.2 with a key alone: rustls has a function for that in TLS 1.3 only.
fn verify_tls12_with_key(
    message: &[u8], key: &[u8], signature: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, Error> {
    let mapping = PROVIDER.signature_verification_algorithms.mapping;
    let scheme = mapping.iter().find(|(scheme, _)| *scheme == signature.scheme);
    let key = x509::PublicKey::read(key).ok_or(CertificateError::BadEncoding)?;
    // In TLS 1.2 a scheme does not imply the curve: the key has it.
    let algorithms = scheme.map_or(&[][..], |(_, algorithms)| algorithms).iter();
    let mut fitting = algorithms.filter(|algorithm| algorithm.public_key_alg_id().as_ref() == key.algorithm);
    match fitting.any(|algorithm| algorithm.verify_signature(key.key, message, signature.signature()).is_ok()) {
        true => Ok(HandshakeSignatureValid::assertion()),
        false => Err(CertificateError::BadSignature.into()),
    }
}

/// Accepts a peer's own certificate that is in the `ca` file. webpki rejects it if it has CA:TRUE, as certificates of
/// `openssl req -x509` have. Its dates must be valid (webpki checks them first, so `error` is about them if they are not),
/// and so must its name. A certificate of version 1 has no names that count (RFC 9525 section 2): its key is enough.
fn accept_exact(
    certificate: &CertificateDer<'_>, name: &ServerName<'_>, error: Error,
) -> Result<ServerCertVerified, Error> {
    use CertificateError::*;
    let Ok(parsed) = ParsedCertificate::try_from(certificate) else {
        return Ok(ServerCertVerified::assertion());
    };
    if let Error::InvalidCertificate(Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. }) = error
    {
        return Err(error);
    }
    verify_server_name(&parsed, name)?;
    Ok(ServerCertVerified::assertion())
}

/// Adds both pins to the error about an unknown certificate: only the verifier has the certificate.
fn with_fingerprint(error: Error, certificate: &CertificateDer<'_>) -> Error {
    use CertificateError::*;
    match error {
        // `BadSignature` and `Unsupported…`: an authority with the issuer's name has another key, as a self-signed
        // certificate has that was made anew. `Other`: a certificate with CA:TRUE, or of version 1, or rarer errors.
        Error::InvalidCertificate(
            UnknownIssuer
            | BadSignature
            | UnsupportedSignatureAlgorithmContext { .. }
            | UnsupportedSignatureAlgorithmForPublicKeyContext { .. }
            | Other(_),
        ) => untrusted(format!(
            "the peer's certificate is not signed by a trusted authority: set `ca` to a file with it or its authority, \
             or set `pin` (it is sha256:{}, and its key is spki-sha256:{}; compare that with what the peer's operator \
             tells you)",
            HEXLOWER.encode(&digest(certificate)),
            key_shown(certificate)
        )),
        other => other,
    }
}

fn wrong_pin(pins: &[Pin], certificate: &CertificateDer<'_>) -> String {
    let confirm = "change `pin` only if the peer's operator confirms that this is the new one";
    let key = key_shown(certificate);
    let digest = HEXLOWER.encode(&digest(certificate));
    match pins {
        [Pin::Certificate(_)] => format!(
            "the peer's certificate is not the one in `pin`: it is sha256:{digest}; {confirm} \
             (a pin of the key, spki-sha256:{key}, survives renewals)",
        ),
        [Pin::Key(_)] => format!("the peer's key is not the one in `pin`: it is spki-sha256:{key}; {confirm}"),
        _ => format!(
            "the peer's certificate matches none of the pins in `pin`: it is sha256:{digest}, and its key is \
             spki-sha256:{key}; {confirm}"
        ),
    }
}

/// Replaces the error about a signature if keys of this kind are not supported.
fn with_key_kind(error: Error, certificate: &CertificateDer<'_>) -> Error {
    match key_of(certificate).and_then(x509::PublicKey::read) {
        Some(key) if !is_usable(&key) => untrusted(format!(
            "the peer's certificate has a key that cannot be used here: its operator must make one of another kind \
             ({KEY_KINDS})"
        )),
        _ => error,
    }
}

fn is_usable(key: &x509::PublicKey<'_>) -> bool {
    // The DER form of an RSA key is longer than its modulus, which must have 2048 bits.
    let short = key.algorithm == alg_id::RSA_ENCRYPTION.as_ref() && key.key.len() < 2048 / 8;
    let mut algorithms = PROVIDER.signature_verification_algorithms.all.iter();
    !short && algorithms.any(|algorithm| algorithm.public_key_alg_id().as_ref() == key.algorithm)
}

fn untrusted(text: String) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(io::Error::other(text)))))
}

fn failed(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, explain(&error))
}

/// The cause of an error and its remedy.
fn explain(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(reason) => explain_certificate(reason),
        Error::AlertReceived(alert) => explain_alert(*alert),
        Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            "what the peer sends is not TLS: does it use clear text or STARTTLS on this port? (see `tls`)".to_string()
        }
        Error::PeerIncompatible(reason) => nothing_in_common(reason),
        other => format!("TLS failed: {other}"),
    }
}

fn nothing_in_common(reason: &dyn fmt::Debug) -> String {
    format!(
        "no TLS version, cipher or kind of key in common with the peer, which needs TLS 1.2 or 1.3 and {KEY_KINDS} \
         ({reason:?})"
    )
}

fn explain_certificate(reason: &CertificateError) -> String {
    use CertificateError::*;
    let text = match reason {
        Other(OtherError(inner)) => return inner.to_string(),
        NotValidForNameContext { expected, presented } => {
            let names: Vec<&str> = presented.iter().map(|name| bare_name(name)).collect();
            let names = if names.is_empty() { "no name at all".to_string() } else { names.join(", ") };
            let expected = expected.to_str();
            return format!(
                "the peer's certificate is not for {expected} but for {names}: correct the address, or set `pin`"
            );
        }
        Expired | ExpiredContext { .. } => {
            "the peer's certificate has expired: its operator must renew it, unless this machine's clock is wrong"
        }
        NotValidYet | NotValidYetContext { .. } => {
            "the peer's certificate is not valid yet: this machine's clock is wrong, or the peer's was"
        }
        BadSignature => {
            "a signature does not match the peer's certificate: the peer does not have its key, or it was changed on the way"
        }
        other => {
            let error = Error::InvalidCertificate(other.clone());
            return format!("the peer's certificate cannot be used ({error}): its operator must replace it");
        }
    };
    text.to_string()
}

/// A name of a certificate, which rustls presents as `DnsName("a.example")` or `IpAddress(192.0.2.1)`.
fn bare_name(presented: &str) -> &str {
    let inside = presented.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')'));
    inside.unwrap_or(presented).trim_matches('"')
}

fn explain_alert(alert: AlertDescription) -> String {
    use AlertDescription::*;
    match alert {
        UnknownCA
        | BadCertificate
        | CertificateUnknown
        | CertificateExpired
        | UnsupportedCertificate
        | CertificateRevoked => {
            format!("the peer rejected this side's certificate ({alert:?}): the peer must set `ca` or `pin`")
        }
        HandshakeFailure | ProtocolVersion | InsufficientSecurity => nothing_in_common(&alert),
        other => format!("the peer ended TLS with an alert ({other:?})"),
    }
}

/// A PEM text (RFC 7468).
struct PemText {
    octets: Vec<u8>,
    /// The file, for errors.
    name: String,
}

impl PemText {
    fn read(path: &Path) -> Result<PemText, String> {
        let name = path.display().to_string();
        // An error of `text_file` has its own remedy.
        let (_, octets) = text_file::read(path).map_err(|error| match (error.kind(), error.raw_os_error()) {
            (io::ErrorKind::PermissionDenied, Some(_)) => format!(
                "{name} may not be read by this user: chown it to the user that `odmr` runs as, or chgrp it and chmod 640"
            ),
            _ => format!("{name}: {error}"),
        })?;
        Ok(PemText { octets: text_file::without_inner_marks(octets), name })
    }

    /// Returns all certificates; at least one.
    fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, String> {
        let found = rustls_pemfile::certs(&mut &self.octets[..]).collect::<Result<Vec<_>, _>>();
        let found = found.map_err(|error| self.malformed(error))?;
        match found.is_empty() {
            true => Err(format!("{} holds no certificate (a PEM block BEGIN CERTIFICATE)", self.name)),
            false => Ok(found),
        }
    }

    fn private_key(&self) -> Result<PrivateKeyDer<'static>, String> {
        let found = rustls_pemfile::private_key(&mut &self.octets[..]).map_err(|error| self.malformed(error))?;
        let holds = |text: &[u8]| self.octets.windows(text.len()).any(|part| part == text);
        found.ok_or_else(|| match () {
            () if holds(b"ENCRYPTED") => format!("{} is encrypted: decrypt it with `openssl pkey`", self.name),
            // A DSA or OpenSSH key.
            () if holds(b" PRIVATE KEY-----") => self.unusable_key(),
            () => format!("{} holds no private key (a PEM block BEGIN PRIVATE KEY)", self.name),
        })
    }

    fn unusable_key(&self) -> String {
        format!("{} holds a key that cannot be used here: make one of another kind ({KEY_KINDS})", self.name)
    }

    /// Rejects a certificate of our own that is not of version 3: most clients would not accept it.
    fn check_version(&self, certificate: &CertificateDer<'_>, key: &PemText) -> Result<(), String> {
        match x509::Certificate::read(certificate) {
            Some(x509::Certificate { version: version @ ..3, .. }) => Err(format!(
                "{name} holds a certificate of X.509 version {version}, which names no host, and must hold one of \
                 version 3: make it with `openssl req -x509 -key {key} -days 365 -subj /CN=HOST -addext \
                 subjectAltName=DNS:HOST -out NEW.pem`, or with `openssl x509 -req … -extfile FILE` if an authority \
                 signs it, and set `certificate` to NEW.pem",
                name = self.name,
                key = key.name
            )),
            _ => Ok(()),
        }
    }

    fn malformed(&self, error: io::Error) -> String {
        format!("{} is not well-formed PEM ({error}): copy it again from where it was made", self.name)
    }
}

/// The kinds of keys that both TLS roles support, for errors.
#[cfg(not(feature = "aws-lc-rs"))]
const KEY_KINDS: &str = "RSA of 2048 to 4096 bits, EC on P-256 or P-384, or Ed25519";
#[cfg(feature = "aws-lc-rs")]
const KEY_KINDS: &str = "RSA of 2048 to 4096 bits, EC on P-256, P-384 or P-521, or Ed25519";

fn digest(certificate: &CertificateDer<'_>) -> [u8; 32] {
    Sha256::digest(certificate.as_ref()).into()
}

/// The SubjectPublicKeyInfo of a certificate; `None`: it is not a certificate.
fn key_of<'a>(certificate: &'a CertificateDer<'_>) -> Option<&'a [u8]> {
    x509::Certificate::read(certificate).map(|certificate| certificate.public_key)
}

fn fits(pin: &Pin, certificate: &CertificateDer<'_>) -> bool {
    match pin {
        Pin::Certificate(pin) => digest(certificate) == *pin,
        Pin::Key(pin) => key_digest(certificate) == Some(*pin),
    }
}

fn key_digest(certificate: &CertificateDer<'_>) -> Option<[u8; 32]> {
    key_of(certificate).map(|key| Sha256::digest(key).into())
}

/// Both digests; `None`: it is not a certificate.
fn digests(certificate: &CertificateDer<'_>) -> Option<CertificateDigests> {
    Some(CertificateDigests { certificate: digest(certificate), key: key_digest(certificate)? })
}

fn key_shown(certificate: &CertificateDer<'_>) -> String {
    key_digest(certificate).map_or_else(|| "?".to_owned(), |digest| HEXLOWER.encode(&digest))
}

#[cfg(test)]
mod tests;
