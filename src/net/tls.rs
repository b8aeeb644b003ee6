//! Certificates, keys, trust and pins, made into TLS configurations and sessions.
//!
//! Every rustls type of the program is in this file. TLS 1.2 and 1.3 only (RFC 8996). No session resumption: the peer
//! proves its identity in each connection. No client certificates (RFC 8314 section 4.2). A `TlsSession` has no
//! socket: [`Connection`](crate::net::connection::Connection) feeds it the octets that came and sends those that it has
//! sealed. Every error text names the cause and what to do about it.
//!
//! Whom the connecting side trusts:
//!
//! ```text
//! Trust::System             the authorities of this machine; name and dates are checked
//! Trust::Authorities(file)  the authorities in the file, or the peer's own certificate in it; name and dates are checked
//! Trust::Pin(sha256)        exactly this certificate; its name and dates do not matter
//! Trust::Anyone             every certificate
//! ```
//!
//! In all four the peer proves, by its handshake signature, that it has the certificate's key.

use std::fmt;
use std::io::{self, BufRead, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use data_encoding::HEXLOWER;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{NoServerSessionStorage, ParsedCertificate};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, Connection, DigitallySignedStruct, Error,
    InconsistentKeys, InvalidMessage, OtherError, ProtocolVersion, RootCertStore, ServerConfig, ServerConnection,
    SignatureScheme,
};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// What the side that accepts connections needs: a certificate chain and its key. Cheap to clone.
#[derive(Clone)]
pub struct ServerTls(Arc<ServerConfig>);

/// What the side that makes connections needs: whom to trust. Cheap to clone.
#[derive(Clone)]
pub struct ClientTls(Arc<ClientConfig>);

/// Whom the connecting side trusts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trust {
    /// The certificate authorities of this machine.
    System,
    /// The authorities, or the peer's own certificate, in a PEM file.
    Authorities(PathBuf),
    /// The certificate with this SHA-256 of its DER form: see [`fingerprint`].
    Pin([u8; 32]),
    /// Every certificate: encryption without authentication is better than clear text (RFC 7435).
    Anyone,
}

/// What a TLS connection has negotiated.
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

/// Fills `octets` with random octets that are good enough for keys and nonces.
///
/// If the system has none yet, it waits: weak randomness would be worse than a late start.
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
        let (chain, secret) = (read(certificate)?, read(key)?);
        ServerTls::new(&chain, &certificate.display().to_string(), &secret, &key.display().to_string())
    }

    /// [`ServerTls::load`] with the PEM texts themselves.
    pub fn from_pem(certificate: &str, key: &str) -> Result<ServerTls, String> {
        ServerTls::new(certificate.as_bytes(), "the certificate", key.as_bytes(), "the key")
    }

    fn new(certificate: &[u8], certificate_name: &str, key: &[u8], key_name: &str) -> Result<ServerTls, String> {
        let chain = certificates(certificate, certificate_name)?;
        let key = private_key(key, key_name)?;
        let mut config = ServerConfig::builder_with_provider(PROVIDER.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| format!("TLS: {error}"))?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .map_err(|error| match error {
                Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => format!(
                    "{key_name} does not belong to the first certificate in {certificate_name}: \
                     the server's own certificate must come first, its issuers after it"
                ),
                error => format!("{certificate_name} and {key_name} cannot be used: {error}"),
            })?;
        // Calls are minutes apart, and each proves the peer's identity again: tickets would cost memory and octets.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(ServerTls(Arc::new(config)))
    }
}

impl ClientTls {
    /// A client that trusts the peers `trust` names. Reads their certificates now.
    ///
    /// # Errors
    ///
    /// A text with the file and what to do.
    pub fn new(trust: &Trust) -> Result<ClientTls, String> {
        ClientTls::with(Verification::new(trust)?, rustls::DEFAULT_VERSIONS)
    }

    /// TLS 1.2 alone, for tests.
    #[cfg(test)]
    pub(crate) fn tls12(trust: &Trust) -> Result<ClientTls, String> {
        ClientTls::with(Verification::new(trust)?, &[&rustls::version::TLS12])
    }

    fn with(
        verification: Verification, versions: &[&'static rustls::SupportedProtocolVersion],
    ) -> Result<ClientTls, String> {
        let mut config = ClientConfig::builder_with_provider(PROVIDER.clone())
            .with_protocol_versions(versions)
            .map_err(|error| format!("TLS: {error}"))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verification))
            .with_no_client_auth();
        config.resumption = Resumption::disabled();
        Ok(ClientTls(Arc::new(config)))
    }
}

/// Makes a self-signed certificate for `names` (domain names or IP addresses). Returns it and its key, both as PEM.
pub fn self_signed(names: &[&str]) -> Result<(String, String), String> {
    let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
    let made =
        rcgen::generate_simple_self_signed(names).map_err(|error| format!("cannot make a certificate: {error}"))?;
    Ok((made.cert.pem(), made.signing_key.serialize_pem()))
}

/// The SHA-256 of the first certificate in a PEM text, for [`Trust::Pin`].
pub fn fingerprint(certificate: &str) -> Result<[u8; 32], String> {
    let certificates = certificates(certificate.as_bytes(), "the certificate")?;
    Ok(digest(&certificates[0]))
}

/// One TLS connection without its socket.
pub(crate) struct TlsSession {
    connection: Connection,
    /// Sealed octets that `write_to` has not yet written.
    unsent: usize,
}

/// rustls seals no more while it holds this many octets: four full records.
const SEALED_LIMIT: usize = 64 * 1024;

impl TlsSession {
    pub(crate) fn server(tls: &ServerTls) -> io::Result<TlsSession> {
        let connection = ServerConnection::new(tls.0.clone()).map_err(failed)?;
        Ok(TlsSession::new(connection.into()))
    }

    /// `name`: the domain name or IP address that the peer's certificate must be for.
    pub(crate) fn client(tls: &ClientTls, name: &str) -> io::Result<TlsSession> {
        let wanted = ServerName::try_from(name.to_owned()).map_err(|_| {
            let text = format!("`{name}` is not a name that a certificate can be for");
            io::Error::new(io::ErrorKind::InvalidInput, text)
        })?;
        let connection = ClientConnection::new(tls.0.clone(), wanted).map_err(failed)?;
        Ok(TlsSession::new(connection.into()))
    }

    fn new(mut connection: Connection) -> TlsSession {
        connection.set_buffer_limit(Some(SEALED_LIMIT));
        let mut session = TlsSession { connection, unsent: 0 };
        session.count();
        session
    }

    /// Decrypts octets from the socket and appends the result to `plain`: all of it, because poll(2) does not report
    /// octets that are already decrypted. Octets after a close_notify are dropped.
    pub(crate) fn feed(&mut self, octets: &[u8], plain: &mut Vec<u8>) -> io::Result<()> {
        let mut source = SliceReader(octets);
        loop {
            match self.connection.read_tls(&mut source) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                // The source is empty, which is not an error. This last call lets rustls shrink its buffer.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
            let processed = self.connection.process_new_packets();
            self.drain(plain)?;
            self.count();
            processed.map_err(failed)?;
        }
    }

    /// Reports that the socket is at its end.
    pub(crate) fn end_of_input(&mut self) -> io::Result<()> {
        self.connection.read_tls(&mut io::empty())?;
        self.connection.process_new_packets().map_err(failed)?;
        Ok(())
    }

    /// Whether the peer has sent close_notify.
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
                "the peer ended the connection without a TLS close_notify: what it sent may be cut short",
            )),
            Err(error) => Err(error),
        }
    }

    /// Encrypts as much of `plain` as the limit allows. Returns how many octets that was.
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

    pub(crate) fn wants_write(&self) -> bool {
        self.connection.wants_write()
    }

    pub(crate) fn handshaking(&self) -> bool {
        self.connection.is_handshaking()
    }

    /// Sealed octets not yet written to the socket.
    pub(crate) fn unsent(&self) -> usize {
        match self.connection.wants_write() {
            true => self.unsent.max(1),
            false => 0,
        }
    }

    /// Seals a close_notify.
    pub(crate) fn close(&mut self) {
        self.connection.send_close_notify();
        self.count();
    }

    /// What was negotiated; `None` in the handshake.
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

    fn drain(&mut self, plain: &mut Vec<u8>) -> io::Result<()> {
        let mut reader = self.connection.reader();
        loop {
            match reader.fill_buf() {
                Ok([]) => return Ok(()),
                Ok(chunk) => {
                    plain.extend_from_slice(chunk);
                    let used = chunk.len();
                    reader.consume(used);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    /// Asks rustls how many octets it has sealed; only this call returns that.
    fn count(&mut self) {
        if let Ok(state) = self.connection.process_new_packets() {
            self.unsent = state.tls_bytes_to_write();
        }
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

impl fmt::Debug for ServerTls {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("ServerTls")
    }
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("ClientTls")
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

/// How a peer's certificate is verified.
#[derive(Debug)]
enum Verification {
    Chain {
        authorities: Arc<WebPkiServerVerifier>,
        /// Certificates that are trusted if the peer presents exactly one of them.
        exact: Vec<CertificateDer<'static>>,
    },
    Pin([u8; 32]),
    Anyone,
}

impl Verification {
    fn new(trust: &Trust) -> Result<Verification, String> {
        match trust {
            Trust::System => Verification::system(),
            Trust::Authorities(path) => Verification::from_pem(&read(path)?, &path.display().to_string()),
            Trust::Pin(pin) => Ok(Verification::Pin(*pin)),
            Trust::Anyone => Ok(Verification::Anyone),
        }
    }

    fn system() -> Result<Verification, String> {
        let found = rustls_native_certs::load_native_certs();
        for error in &found.errors {
            log::warn!("event=authority-unreadable error={:?}", error.to_string());
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

    fn from_pem(pem: &[u8], name: &str) -> Result<Verification, String> {
        let exact = certificates(pem, name)?;
        let mut roots = RootCertStore::empty();
        for (index, certificate) in exact.iter().enumerate() {
            roots
                .add(certificate.clone())
                .map_err(|error| format!("certificate {} in {name} cannot be used: {error}", index + 1))?;
        }
        Verification::chain(roots, exact)
    }

    fn chain(roots: RootCertStore, exact: Vec<CertificateDer<'static>>) -> Result<Verification, String> {
        let authorities = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), PROVIDER.clone())
            .build()
            .map_err(|error| format!("the certificate authorities cannot be used: {error}"))?;
        Ok(Verification::Chain { authorities, exact })
    }
}

impl ServerCertVerifier for Verification {
    fn verify_server_cert(
        &self, certificate: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>], name: &ServerName<'_>,
        ocsp_response: &[u8], now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match self {
            Verification::Pin(pin) => {
                let seen = digest(certificate);
                match bool::from(seen.ct_eq(pin)) {
                    true => Ok(ServerCertVerified::assertion()),
                    false => Err(untrusted(not_pinned(&seen))),
                }
            }
            Verification::Anyone => Ok(ServerCertVerified::assertion()),
            Verification::Chain { authorities, exact } => authorities
                .verify_server_cert(certificate, intermediates, name, ocsp_response, now)
                .or_else(|error| match exact.iter().any(|known| known == certificate) {
                    true => accept_exact(certificate, name, error),
                    false => Err(with_fingerprint(error, certificate)),
                }),
        }
    }

    fn verify_tls12_signature(
        &self, message: &[u8], certificate: &CertificateDer<'_>, signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let known = &PROVIDER.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, known)
    }

    fn verify_tls13_signature(
        &self, message: &[u8], certificate: &CertificateDer<'_>, signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let known = &PROVIDER.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, known)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        PROVIDER.signature_verification_algorithms.supported_schemes()
    }
}

/// Accepts a peer's own certificate that is in the `ca` file. webpki rejects such a certificate if it has CA:TRUE, as
/// `openssl req -x509` makes them. Its dates must be valid (webpki checks them first, so `error` is about them if they
/// are not), and so must its name.
fn accept_exact(
    certificate: &CertificateDer<'_>, name: &ServerName<'_>, error: Error,
) -> Result<ServerCertVerified, Error> {
    use CertificateError::*;
    let dates = matches!(
        error,
        Error::InvalidCertificate(Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. })
    );
    if dates {
        return Err(error);
    }
    verify_server_name(&ParsedCertificate::try_from(certificate)?, name)?;
    Ok(ServerCertVerified::assertion())
}

/// Puts the fingerprint into the error for an unknown certificate: only the verifier knows it.
fn with_fingerprint(error: Error, certificate: &CertificateDer<'_>) -> Error {
    match error {
        // `Other` is, among rarer errors, a certificate with CA:TRUE.
        Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::Other(_)) => {
            untrusted(unknown(&digest(certificate)))
        }
        other => other,
    }
}

fn unknown(seen: &[u8; 32]) -> String {
    format!(
        "the peer's certificate is not signed by a trusted authority: set `ca` to a file with it or its authority, \
         or set `pin` (it is sha256:{}; compare that with what the peer's operator tells you)",
        HEXLOWER.encode(seen)
    )
}

fn not_pinned(seen: &[u8; 32]) -> String {
    format!(
        "the peer's certificate is not the one in `pin`: it is sha256:{}; \
         change `pin` only if the peer's operator confirms that this is the new one",
        HEXLOWER.encode(seen)
    )
}

#[derive(Debug)]
struct Untrusted(String);

impl fmt::Display for Untrusted {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for Untrusted {}

fn untrusted(text: String) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(Untrusted(text)))))
}

fn failed(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, explain(&error))
}

/// What is wrong, and what to do.
fn explain(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(reason) => explain_certificate(reason),
        Error::AlertReceived(alert) => explain_alert(*alert),
        Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            "what the peer sends is not TLS: does it use clear text or STARTTLS on this port? (see `tls`)".to_string()
        }
        Error::PeerIncompatible(reason) => {
            format!("no TLS version or cipher in common with the peer, which needs TLS 1.2 or 1.3 ({reason:?})")
        }
        other => format!("TLS failed: {other}"),
    }
}

fn explain_certificate(reason: &CertificateError) -> String {
    use CertificateError::*;
    match reason {
        Other(OtherError(inner)) => inner.to_string(),
        Expired | ExpiredContext { .. } => {
            "the peer's certificate has expired: its operator must renew it, unless this machine's clock is wrong"
                .to_string()
        }
        NotValidYet | NotValidYetContext { .. } => {
            "the peer's certificate is not valid yet: this machine's clock is wrong, or the peer's was".to_string()
        }
        NotValidForNameContext { expected, presented } => format!(
            "the peer's certificate is not for {} but for {}: correct `address`, or set `pin`",
            expected.to_str(),
            listed(presented)
        ),
        BadSignature => {
            "a signature does not match the peer's certificate: the peer does not have its key, or it was changed on the way"
                .to_string()
        }
        other => format!(
            "the peer's certificate cannot be used ({}): its operator must replace it",
            Error::InvalidCertificate(other.clone())
        ),
    }
}

/// The names in what rustls presents, `DnsName("a.example")`, for an error text.
fn listed(presented: &[String]) -> String {
    if presented.is_empty() {
        return "no name at all".to_string();
    }
    let bare = |name: &String| name.split('"').nth(1).unwrap_or(name).to_string();
    presented.iter().map(bare).collect::<Vec<_>>().join(", ")
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
        HandshakeFailure | ProtocolVersion | InsufficientSecurity => {
            format!("no TLS version or cipher in common with the peer, which needs TLS 1.2 or 1.3 ({alert:?})")
        }
        other => format!("the peer ended TLS with an alert ({other:?})"),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// All certificates of a PEM text; at least one. `name`: the file, for errors.
fn certificates(pem: &[u8], name: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let found = rustls_pemfile::certs(&mut &pem[..])
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| format!("{name} is not well-formed PEM: {error}"))?;
    match found.is_empty() {
        true => Err(format!("{name} holds no certificate (a PEM block BEGIN CERTIFICATE)")),
        false => Ok(found),
    }
}

fn private_key(pem: &[u8], name: &str) -> Result<PrivateKeyDer<'static>, String> {
    rustls_pemfile::private_key(&mut &pem[..])
        .map_err(|error| format!("{name} is not well-formed PEM: {error}"))?
        .ok_or_else(|| match pem.windows(9).any(|part| part == b"ENCRYPTED") {
            true => format!("{name} is encrypted: decrypt it with `openssl pkey`"),
            false => format!("{name} holds no private key (a PEM block BEGIN PRIVATE KEY)"),
        })
}

fn digest(certificate: &CertificateDer<'_>) -> [u8; 32] {
    Sha256::digest(certificate.as_ref()).into()
}

#[cfg(test)]
mod tests;
