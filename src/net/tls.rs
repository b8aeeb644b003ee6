//! Certificates, keys, trust and pins, made into TLS configurations and sessions.
//!
//! Every rustls type of the program is in this file. TLS 1.2 and 1.3 only (RFC 8996). No session resumption: the peer
//! proves its identity in each connection. No client certificates (RFC 8314 section 4.2). A `TlsSession` has no
//! socket: [`net::connection::Connection`](crate::net::connection::Connection) feeds it the octets that have arrived
//! and sends those that it has sealed. Every error text names the cause and what to do about it.
//!
//! Which certificates the connecting side trusts:
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

use crate::net::trace::quoted;

/// What the side that accepts connections needs: a certificate chain and its key. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ServerTls(Arc<ServerConfig>);

/// What the side that makes connections needs: which certificates it trusts. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ClientTls(Arc<ClientConfig>);

/// Which certificates the connecting side trusts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trust {
    /// The certificate authorities of this machine.
    System,
    /// The authorities, or the peer's own certificate, in a PEM file.
    Authorities(PathBuf),
    /// The certificate with this SHA-256 of its DER form, whatever its name and dates.
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

    fn new(certificate: &PemText, key: &PemText) -> Result<ServerTls, String> {
        let mut config = ServerConfig::builder_with_provider(PROVIDER.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| format!("TLS: {error}"))?
            .with_no_client_auth()
            .with_single_cert(certificate.certificates()?, key.private_key()?)
            .map_err(|error| match error {
                Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => format!(
                    "{} does not belong to the first certificate in {}: \
                     the server's own certificate must come first, its issuers after it",
                    key.name, certificate.name
                ),
                error => format!("{} and {} cannot be used: {error}", certificate.name, key.name),
            })?;
        // Calls are minutes apart, and each proves the peer's identity again: tickets would cost memory and octets.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(ServerTls(Arc::new(config)))
    }
}

impl ClientTls {
    /// Returns what a client needs that trusts these certificates. Reads the files now.
    ///
    /// # Errors
    ///
    /// A text with the file and what to do.
    pub fn new(trust: &Trust) -> Result<ClientTls, String> {
        ClientTls::with(Verification::new(trust)?, rustls::DEFAULT_VERSIONS)
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
///
/// # Errors
///
/// A name that a certificate cannot be for.
pub fn self_signed(names: &[&str]) -> Result<(String, String), String> {
    let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
    let made = rcgen::generate_simple_self_signed(names);
    let made = made.map_err(|error| format!("cannot make a certificate: {error}"))?;
    Ok((made.cert.pem(), made.signing_key.serialize_pem()))
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
        Ok(TlsSession::new(ServerConnection::new(tls.0.clone()).map_err(failed)?.into()))
    }

    /// `name`: the domain name or IP address that the peer's certificate must be for.
    pub(crate) fn client(tls: &ClientTls, name: &str) -> io::Result<TlsSession> {
        let wanted = ServerName::try_from(name.to_owned()).map_err(|_| {
            let text = format!("`{name}` is not a name that a certificate can be for");
            io::Error::new(io::ErrorKind::InvalidInput, text)
        })?;
        Ok(TlsSession::new(ClientConnection::new(tls.0.clone(), wanted).map_err(failed)?.into()))
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
            match self.connection.reader().read_to_end(plain) {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                _ => {}
            }
            self.count();
            processed.map_err(failed)?;
        }
    }

    /// Reports that the socket is at its end.
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

    /// Returns what was negotiated; `None` in the handshake.
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
            Trust::Authorities(path) => Verification::exact(&PemText::read(path)?),
            Trust::Pin(pin) => Ok(Verification::Pin(*pin)),
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
            let added = roots.add(certificate.clone());
            added.map_err(|error| format!("certificate {number} in {} cannot be used: {error}", file.name))?;
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
            Verification::Anyone => Ok(ServerCertVerified::assertion()),
            Verification::Pin(pin) if digest(certificate).ct_eq(pin).into() => Ok(ServerCertVerified::assertion()),
            Verification::Pin(_) => Err(untrusted(format!(
                "the peer's certificate is not the one in `pin`: it is sha256:{}; \
                 change `pin` only if the peer's operator confirms that this is the new one",
                HEXLOWER.encode(&digest(certificate))
            ))),
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
        verify_tls12_signature(message, certificate, signature, &PROVIDER.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self, message: &[u8], certificate: &CertificateDer<'_>, signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &PROVIDER.signature_verification_algorithms)
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
    if let Error::InvalidCertificate(Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. }) = error
    {
        return Err(error);
    }
    verify_server_name(&ParsedCertificate::try_from(certificate)?, name)?;
    Ok(ServerCertVerified::assertion())
}

/// Puts the fingerprint into the error for an unknown certificate: only the verifier knows it.
fn with_fingerprint(error: Error, certificate: &CertificateDer<'_>) -> Error {
    match error {
        // `Other` is, among rarer errors, a certificate with CA:TRUE.
        Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::Other(_)) => untrusted(format!(
            "the peer's certificate is not signed by a trusted authority: set `ca` to a file with it or its authority, \
             or set `pin` (it is sha256:{}; compare that with what the peer's operator tells you)",
            HEXLOWER.encode(&digest(certificate))
        )),
        other => other,
    }
}

fn untrusted(text: String) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(io::Error::other(text)))))
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
        Error::PeerIncompatible(reason) => nothing_in_common(reason),
        other => format!("TLS failed: {other}"),
    }
}

fn nothing_in_common(reason: &dyn fmt::Debug) -> String {
    format!("no TLS version or cipher in common with the peer, which needs TLS 1.2 or 1.3 ({reason:?})")
}

fn explain_certificate(reason: &CertificateError) -> String {
    use CertificateError::*;
    let text = match reason {
        Other(OtherError(inner)) => return inner.to_string(),
        NotValidForNameContext { expected, presented } => {
            // rustls presents `DnsName("a.example")`.
            let names: Vec<&str> = presented.iter().map(|name| name.split('"').nth(1).unwrap_or(name)).collect();
            let names = if names.is_empty() { "no name at all".to_string() } else { names.join(", ") };
            let expected = expected.to_str();
            return format!(
                "the peer's certificate is not for {expected} but for {names}: correct `address`, or set `pin`"
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
        let octets = std::fs::read(path).map_err(|error| format!("{name}: {error}"))?;
        Ok(PemText { octets, name })
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
        found.ok_or_else(|| match self.octets.windows(9).any(|part| part == b"ENCRYPTED") {
            true => format!("{} is encrypted: decrypt it with `openssl pkey`", self.name),
            false => format!("{} holds no private key (a PEM block BEGIN PRIVATE KEY)", self.name),
        })
    }

    fn malformed(&self, error: io::Error) -> String {
        format!("{} is not well-formed PEM: {error}", self.name)
    }
}

fn digest(certificate: &CertificateDer<'_>) -> [u8; 32] {
    Sha256::digest(certificate.as_ref()).into()
}

#[cfg(test)]
mod tests;
