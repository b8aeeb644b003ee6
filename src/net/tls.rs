//! Certificates, keys, trust and pins, made into TLS configurations and sessions.
//!
//! Contract: every rustls type of the program lives in this file. TLS 1.2 and 1.3 only (RFC 8996), no session
//! resumption (each connection proves the peer again), no client certificates (RFC 8314 section 4.2). A
//! [`Session`] has no socket: [`Wire`](crate::net::connection::Wire) feeds it what came and writes what it has sealed.
//! Every error text names the cause and what to do about it.
//!
//! Who is believed, on the connecting side:
//!
//! ```text
//! Trust::System             authorities of this machine, name and dates checked
//! Trust::Authorities(file)  authorities in the file, or the peer's own certificate in it; name and dates checked
//! Trust::Pin(sha256)        exactly this certificate; its name and dates do not matter
//! ```
//!
//! In all three the peer still proves, by its handshake signature, that it has the certificate's key.

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

/// What the accepting side needs: a certificate chain and its key. Cheap to clone.
#[derive(Clone)]
pub struct ServerTls(Arc<ServerConfig>);

/// What the connecting side needs: whom to believe. Cheap to clone.
#[derive(Clone)]
pub struct ClientTls(Arc<ClientConfig>);

/// Whom the connecting side believes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trust {
    /// The certificate authorities of this machine.
    System,
    /// The authorities, or the peer's own certificate, in a PEM file.
    Authorities(PathBuf),
    /// The SHA-256 of the peer's certificate in DER form.
    Pin([u8; 32]),
    /// Whoever it is: better than clear text to a server that nobody has vouched for (RFC 7435).
    Anyone,
}

/// What a TLS connection agreed on, in the words of the registries ("TLSv1.3", "TLS_AES_128_GCM_SHA256").
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsInfo {
    pub version: &'static str,
    pub cipher: String,
}

/// Fills `octets` with randomness fit for keys and nonces.
///
/// Waits while the system has none yet: weak randomness would be worse than a late start.
pub fn random(octets: &mut [u8]) {
    while PROVIDER.secure_random.fill(octets).is_err() {
        log::error!("the system gives no randomness; trying again");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// The accepting side, from a PEM file with the certificate chain (own certificate first) and one with its key.
pub fn server_config(certificate: &Path, key: &Path) -> Result<ServerTls, String> {
    server_tls(&read(certificate)?, &certificate.display().to_string(), &read(key)?, &key.display().to_string())
}

/// The accepting side, from PEM texts.
pub fn server_from_pem(certificate: &str, key: &str) -> Result<ServerTls, String> {
    server_tls(certificate.as_bytes(), "the certificate", key.as_bytes(), "the key")
}

/// The connecting side.
pub fn client_config(trust: &Trust) -> Result<ClientTls, String> {
    client_tls(rule(trust)?, rustls::DEFAULT_VERSIONS)
}

/// A new self-signed certificate for `names` (domain names or IP addresses) and its key, both as PEM.
pub fn self_signed(names: &[&str]) -> Result<(String, String), String> {
    let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
    let made =
        rcgen::generate_simple_self_signed(names).map_err(|error| format!("cannot make a certificate: {error}"))?;
    Ok((made.cert.pem(), made.signing_key.serialize_pem()))
}

/// The SHA-256 of the first certificate in a PEM text, as [`Trust::Pin`] wants it.
pub fn fingerprint(certificate: &str) -> Result<[u8; 32], String> {
    let certificates = certificates(certificate.as_bytes(), "the certificate")?;
    Ok(digest(&certificates[0]))
}

/// One TLS connection without its socket: octets in, octets out.
pub(crate) struct TlsSession {
    connection: Connection,
    /// Sealed octets that `write_to` has not yet handed on.
    queued: usize,
}

/// Sealed octets rustls may hold before it takes no more; four full records.
const SEALED_LIMIT: usize = 64 * 1024;

impl TlsSession {
    pub(crate) fn server(tls: &ServerTls) -> io::Result<TlsSession> {
        let connection = ServerConnection::new(tls.0.clone()).map_err(failed)?;
        Ok(TlsSession::new(connection.into()))
    }

    /// `name` is what the peer's certificate must be for: a domain name or an IP address.
    pub(crate) fn client(tls: &ClientTls, name: &str) -> io::Result<TlsSession> {
        let wanted = ServerName::try_from(name.to_owned()).map_err(|_| {
            let text = format!("`{name}` is no name a certificate can be for");
            io::Error::new(io::ErrorKind::InvalidInput, text)
        })?;
        let connection = ClientConnection::new(tls.0.clone(), wanted).map_err(failed)?;
        Ok(TlsSession::new(connection.into()))
    }

    fn new(mut connection: Connection) -> TlsSession {
        connection.set_buffer_limit(Some(SEALED_LIMIT));
        let mut session = TlsSession { connection, queued: 0 };
        session.count();
        session
    }

    /// Takes octets from the socket and appends what they hold for us to `plain`: all of it, so that nothing
    /// decrypted is left where poll(2) cannot see it. Octets behind a close_notify are dropped.
    pub(crate) fn feed(&mut self, octets: &[u8], plain: &mut Vec<u8>) -> io::Result<()> {
        let mut source = Source(octets);
        loop {
            match self.connection.read_tls(&mut source) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                // Not an error: the source is empty. Asking once more than needed lets rustls shrink its buffer.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
            let processed = self.connection.process_new_packets();
            self.drain(plain)?;
            self.count();
            processed.map_err(failed)?;
        }
    }

    /// The socket is at its end.
    pub(crate) fn end_of_input(&mut self) -> io::Result<()> {
        self.connection.read_tls(&mut io::empty())?;
        self.connection.process_new_packets().map_err(failed)?;
        Ok(())
    }

    /// Whether the peer has ended its direction with a close_notify. An end without one may be an attacker's
    /// cut (RFC 8314 section 3.4) and is an `UnexpectedEof` error.
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

    /// Seals as much of `plain` as fits the limit; says how many octets that was.
    pub(crate) fn seal(&mut self, plain: &[u8]) -> io::Result<usize> {
        let taken = self.connection.writer().write(plain)?;
        self.count();
        if taken == 0 && !plain.is_empty() && !self.connection.wants_write() {
            // A TLS 1.2 connection whose keys are used up; 1.3 renews them.
            return Err(io::Error::other("the TLS keys of this connection are used up"));
        }
        Ok(taken)
    }

    pub(crate) fn write_to(&mut self, socket: &mut dyn Write) -> io::Result<usize> {
        let written = self.connection.write_tls(socket)?;
        self.queued = self.queued.saturating_sub(written);
        Ok(written)
    }

    pub(crate) fn wants_write(&self) -> bool {
        self.connection.wants_write()
    }

    pub(crate) fn handshaking(&self) -> bool {
        self.connection.is_handshaking()
    }

    /// Sealed octets not yet handed to the socket.
    pub(crate) fn queued(&self) -> usize {
        match self.connection.wants_write() {
            true => self.queued.max(1),
            false => 0,
        }
    }

    /// Queues the close_notify.
    pub(crate) fn close(&mut self) {
        self.connection.send_close_notify();
        self.count();
    }

    /// What was agreed on, once the handshake is over.
    pub(crate) fn secure(&self) -> Option<TlsInfo> {
        let version = match self.connection.protocol_version()? {
            ProtocolVersion::TLSv1_2 => "TLSv1.2",
            ProtocolVersion::TLSv1_3 => "TLSv1.3",
            _ => return None,
        };
        let suite = format!("{:?}", self.connection.negotiated_cipher_suite()?.suite());
        // rustls says TLS13_AES_…, the registry TLS_AES_….
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

    /// Asks rustls how much it has sealed: only this call tells.
    fn count(&mut self) {
        if let Ok(state) = self.connection.process_new_packets() {
            self.queued = state.tls_bytes_to_write();
        }
    }
}

/// A slice to read from that ends in `WouldBlock`, as a socket does.
struct Source<'a>(&'a [u8]);

impl Read for Source<'_> {
    fn read(&mut self, space: &mut [u8]) -> io::Result<usize> {
        match self.0.is_empty() {
            true => Err(io::ErrorKind::WouldBlock.into()),
            false => self.0.read(space),
        }
    }
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("ServerSide")
    }
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("ClientSide")
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

fn server_tls(certificate: &[u8], certificate_name: &str, key: &[u8], key_name: &str) -> Result<ServerTls, String> {
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
                 the server's own certificate must stand first, its issuers behind it"
            ),
            error => format!("{certificate_name} and {key_name} cannot be used: {error}"),
        })?;
    // Calls are minutes apart and each proves the peer again: tickets would be memory and octets for nothing.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(ServerTls(Arc::new(config)))
}

fn client_tls(rule: Verification, versions: &[&'static rustls::SupportedProtocolVersion]) -> Result<ClientTls, String> {
    let mut config = ClientConfig::builder_with_provider(PROVIDER.clone())
        .with_protocol_versions(versions)
        .map_err(|error| format!("TLS: {error}"))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Verifier { rule }))
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    Ok(ClientTls(Arc::new(config)))
}

/// How a peer's certificate is judged.
#[derive(Debug)]
enum Verification {
    Chain {
        authorities: Arc<WebPkiServerVerifier>,
        /// Certificates that are believed when the peer shows just them.
        exact: Vec<CertificateDer<'static>>,
    },
    Pin([u8; 32]),
    Anyone,
}

fn rule(trust: &Trust) -> Result<Verification, String> {
    match trust {
        Trust::System => system_rule(),
        Trust::Authorities(path) => file_rule(&read(path)?, &path.display().to_string()),
        Trust::Pin(pin) => Ok(Verification::Pin(*pin)),
        Trust::Anyone => Ok(Verification::Anyone),
    }
}

fn system_rule() -> Result<Verification, String> {
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        log::warn!("the system's certificate authorities: {error}");
    }
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(found.certs);
    if added == 0 {
        return Err("this system has no certificate authorities: install its ca-certificates package, \
             or set `ca` or `pin`"
            .to_string());
    }
    chain_rule(roots, Vec::new())
}

fn file_rule(pem: &[u8], name: &str) -> Result<Verification, String> {
    let exact = certificates(pem, name)?;
    let mut roots = RootCertStore::empty();
    for (index, certificate) in exact.iter().enumerate() {
        roots
            .add(certificate.clone())
            .map_err(|error| format!("certificate {} in {name} cannot be used: {error}", index + 1))?;
    }
    chain_rule(roots, exact)
}

fn chain_rule(roots: RootCertStore, exact: Vec<CertificateDer<'static>>) -> Result<Verification, String> {
    let authorities = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), PROVIDER.clone())
        .build()
        .map_err(|error| format!("the certificate authorities cannot be used: {error}"))?;
    Ok(Verification::Chain { authorities, exact })
}

#[derive(Debug)]
struct Verifier {
    rule: Verification,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match &self.rule {
            Verification::Pin(pin) => {
                let seen = digest(certificate);
                match bool::from(seen.ct_eq(pin)) {
                    true => Ok(ServerCertVerified::assertion()),
                    false => Err(refusal(not_pinned(&seen))),
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
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let known = &PROVIDER.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, known)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let known = &PROVIDER.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, known)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        PROVIDER.signature_verification_algorithms.supported_schemes()
    }
}

/// The peer's own certificate stands in the `ca` file. Path building refuses it when it says CA:TRUE, as
/// `openssl req -x509` makes them, but nothing is left to build. Dates (checked before anything else, so `error`
/// is theirs if they are wrong) and the name still count.
fn accept_exact(
    certificate: &CertificateDer<'_>,
    name: &ServerName<'_>,
    error: Error,
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

/// Turns "nobody here knows this certificate" into a text with the fingerprint, which only the verifier has.
fn with_fingerprint(error: Error, certificate: &CertificateDer<'_>) -> Error {
    match error {
        // `Other` is, among rarer things, a certificate that says CA:TRUE of itself.
        Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::Other(_)) => {
            refusal(unknown(&digest(certificate)))
        }
        other => other,
    }
}

fn unknown(seen: &[u8; 32]) -> String {
    format!(
        "nobody trusted here has signed the peer's certificate: set `ca` to a file with it or its authority, \
         or set `pin` (it is sha256:{}; compare that with what the peer's operator says)",
        HEXLOWER.encode(seen)
    )
}

fn not_pinned(seen: &[u8; 32]) -> String {
    format!(
        "the peer's certificate is not the one in `pin`: it is sha256:{}; \
         change `pin` only if the peer's operator says that this is the new one",
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

fn refusal(text: String) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(Untrusted(text)))))
}

fn failed(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, explain(&error))
}

/// What went wrong, and the way out.
fn explain(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(reason) => explain_certificate(reason),
        Error::AlertReceived(alert) => explain_alert(*alert),
        Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            "what the peer says is not TLS: does it speak plain text here, or STARTTLS? (see `tls`)".to_string()
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
            "a signature does not fit the peer's certificate: the peer has not its key, or it was changed on the way"
                .to_string()
        }
        other => format!(
            "the peer's certificate cannot be used ({}): its operator must replace it",
            Error::InvalidCertificate(other.clone())
        ),
    }
}

/// Names as rustls presents them, `DnsName("a.example")`, without their wrapping.
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
            format!("the peer refused this side's certificate ({alert:?}): the peer must set `ca` or `pin`")
        }
        HandshakeFailure | ProtocolVersion | InsufficientSecurity => {
            format!("no TLS version or cipher in common with the peer, which needs TLS 1.2 or 1.3 ({alert:?})")
        }
        other => format!("the peer broke off TLS ({other:?})"),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// All certificates of a PEM text; at least one.
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

/// The connecting side with TLS 1.2 alone, for the tests of this file and of `wire`.
#[cfg(test)]
pub(crate) fn client_tls12(trust: &Trust) -> Result<ClientTls, String> {
    client_tls(rule(trust)?, &[&rustls::version::TLS12])
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: &str = "relay.example.net";

    /// A server with a certificate for `NAME`, and that certificate.
    fn server() -> (ServerTls, String) {
        let (certificate, key) = self_signed(&[NAME]).unwrap();
        (server_from_pem(&certificate, &key).unwrap(), certificate)
    }

    /// As `openssl req -x509` makes them: self-signed and CA:TRUE.
    fn self_signed_authority(not_after: i32) -> (ServerTls, String) {
        let mut params = rcgen::CertificateParams::new(vec![NAME.to_string()]).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.not_after = rcgen::date_time_ymd(not_after, 1, 1);
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap().pem();
        let tls = server_from_pem(&certificate, &key.serialize_pem()).unwrap();
        (tls, certificate)
    }

    fn trusting(pem: &str) -> ClientTls {
        client_tls(file_rule(pem.as_bytes(), "ca.pem").unwrap(), rustls::DEFAULT_VERSIONS).unwrap()
    }

    fn pinning(pin: [u8; 32]) -> ClientTls {
        client_config(&Trust::Pin(pin)).unwrap()
    }

    /// Carries what one session has sealed to the other, in pieces of `step` octets.
    fn carry(from: &mut TlsSession, to: &mut TlsSession, plain: &mut Vec<u8>, step: usize) -> io::Result<()> {
        let mut sealed = Vec::new();
        while from.wants_write() {
            from.write_to(&mut sealed)?;
        }
        assert_eq!(from.queued(), 0);
        for piece in sealed.chunks(step) {
            to.feed(piece, plain)?;
        }
        Ok(())
    }

    /// Handshake in memory; `Err` is what the client says, then what the server then says.
    fn shake(server: &ServerTls, client: &ClientTls, name: &str) -> Result<(TlsSession, TlsSession), (String, String)> {
        let mut server = TlsSession::server(server).unwrap();
        let mut client = TlsSession::client(client, name).unwrap();
        let mut plain = Vec::new();
        while client.handshaking() || server.handshaking() {
            let text = |error: io::Error, server: &mut TlsSession, client: &mut TlsSession| {
                let seen = carry(client, server, &mut Vec::new(), 4096).unwrap_err();
                (error.to_string(), seen.to_string())
            };
            carry(&mut client, &mut server, &mut plain, 100).unwrap();
            if let Err(error) = carry(&mut server, &mut client, &mut plain, 100) {
                return Err(text(error, &mut server, &mut client));
            }
        }
        assert!(plain.is_empty());
        Ok((server, client))
    }

    #[test]
    fn the_certificate_in_the_ca_file_is_believed() {
        let (tls, certificate) = server();
        let (server, client) = shake(&tls, &trusting(&certificate), NAME).unwrap();
        assert_eq!(client.secure(), server.secure());
        assert_eq!(client.secure().unwrap().version, "TLSv1.3");
        assert!(client.secure().unwrap().cipher.starts_with("TLS_"));
    }

    #[test]
    fn a_self_signed_certificate_that_says_ca_true_is_believed_when_identical() {
        let (tls, certificate) = self_signed_authority(4096);
        shake(&tls, &trusting(&certificate), NAME).unwrap();
        let (_, other) = self_signed_authority(4096);
        let (client, server) = shake(&tls, &trusting(&other), NAME).err().unwrap();
        assert!(client.contains("set `ca`") && client.contains("`pin`"), "{client}");
        assert!(server.contains("refused this side's certificate"), "{server}");
    }

    #[test]
    fn an_identical_certificate_still_needs_its_name_and_dates() {
        let (tls, certificate) = self_signed_authority(4096);
        let (client, _) = shake(&tls, &trusting(&certificate), "other.example").err().unwrap();
        assert!(client.contains("not for other.example"), "{client}");
        let (tls, certificate) = self_signed_authority(2001);
        let (client, _) = shake(&tls, &trusting(&certificate), NAME).err().unwrap();
        assert!(client.contains("expired"), "{client}");
    }

    #[test]
    fn an_authority_signs_for_its_servers() {
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        let authority = rcgen::CertifiedIssuer::self_signed(params, key).unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec![NAME.to_string()]).unwrap();
        let certificate = params.signed_by(&key, &authority).unwrap().pem();
        let tls = server_from_pem(&certificate, &key.serialize_pem()).unwrap();
        shake(&tls, &trusting(&authority.pem()), NAME).unwrap();
        let (client, _) = shake(&tls, &trusting(&authority.pem()), "a.example").err().unwrap();
        assert!(client.contains("for relay.example.net"), "{client}");
    }

    #[test]
    fn a_pin_is_one_certificate_under_any_name() {
        let (tls, certificate) = server();
        let pin = fingerprint(&certificate).unwrap();
        shake(&tls, &pinning(pin), "192.0.2.1").unwrap();
        let (expired, certificate) = self_signed_authority(2001);
        shake(&expired, &pinning(fingerprint(&certificate).unwrap()), NAME).unwrap();
        let (client, _) = shake(&expired, &pinning(pin), NAME).err().unwrap();
        let seen = HEXLOWER.encode(&fingerprint(&certificate).unwrap());
        assert!(client.contains("`pin`") && client.contains(&seen), "{client}");
    }

    #[test]
    fn a_pinned_certificate_without_its_key_is_refused() {
        let (_, certificate) = server();
        let (_, key) = self_signed(&[NAME]).unwrap();
        let chain = certificates(certificate.as_bytes(), "").unwrap();
        let key = private_key(key.as_bytes(), "").unwrap();
        let key = PROVIDER.key_provider.load_private_key(key).unwrap();
        let thief = rustls::sign::CertifiedKey::new(chain, key);
        let config = ServerConfig::builder_with_provider(PROVIDER.clone())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(thief)));
        let pin = Trust::Pin(fingerprint(&certificate).unwrap());
        for client in [client_config(&pin), client_tls12(&pin)] {
            let tls = ServerTls(Arc::new(config.clone()));
            let (client, _) = shake(&tls, &client.unwrap(), NAME).err().unwrap();
            assert!(client.contains("signature"), "{client}");
        }
    }

    #[test]
    fn tls_1_2_is_spoken_too() {
        let (tls, certificate) = server();
        let pin = Trust::Pin(fingerprint(&certificate).unwrap());
        let (mut server, mut client) = shake(&tls, &client_tls12(&pin).unwrap(), NAME).unwrap();
        let secure = server.secure().unwrap();
        assert_eq!(secure.version, "TLSv1.2");
        assert!(secure.cipher.starts_with("TLS_ECDHE_"), "{}", secure.cipher);
        let mut heard = Vec::new();
        client.seal(b"hello").unwrap();
        carry(&mut client, &mut server, &mut heard, 1).unwrap();
        assert_eq!(heard, b"hello");
    }

    #[test]
    fn keys_are_renewed_while_both_talk() {
        let (tls, certificate) = server();
        let pin = Trust::Pin(fingerprint(&certificate).unwrap());
        let (mut one, mut other) = shake(&tls, &client_config(&pin).unwrap(), NAME).unwrap();
        for round in 0..20 {
            for (from, to) in [(0, 1), (1, 0)] {
                let (from, to) = match (from, to) {
                    (0, 1) => (&mut one, &mut other),
                    _ => (&mut other, &mut one),
                };
                let text = vec![round; 20_000];
                from.connection.refresh_traffic_keys().unwrap();
                assert_eq!(from.seal(&text).unwrap(), text.len());
                let mut heard = Vec::new();
                carry(from, to, &mut heard, 1000).unwrap();
                assert_eq!(heard, text);
            }
        }
    }

    #[test]
    fn sealing_has_a_limit_and_counts() {
        let (tls, certificate) = server();
        let pin = Trust::Pin(fingerprint(&certificate).unwrap());
        let (mut server, _) = shake(&tls, &client_config(&pin).unwrap(), NAME).unwrap();
        assert_eq!(server.queued(), 0);
        assert_eq!(server.seal(&vec![b'x'; 1_000_000]).unwrap(), SEALED_LIMIT);
        assert!(server.queued() > SEALED_LIMIT);
        let mut sealed = Vec::new();
        let written = server.write_to(&mut sealed).unwrap();
        assert_eq!(written, sealed.len());
        assert_eq!(server.queued(), 0);
    }

    #[test]
    fn an_end_needs_a_close_notify() {
        let (tls, certificate) = server();
        let pin = Trust::Pin(fingerprint(&certificate).unwrap());
        let (mut server, mut client) = shake(&tls, &client_config(&pin).unwrap(), NAME).unwrap();
        assert!(!server.ended().unwrap());
        server.end_of_input().unwrap();
        let error = server.ended().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        server.close();
        carry(&mut server, &mut client, &mut Vec::new(), 10).unwrap();
        assert!(client.ended().unwrap());
    }

    #[test]
    fn plain_text_is_told_from_tls() {
        let (tls, _) = server();
        let mut server = TlsSession::server(&tls).unwrap();
        let error = server.feed(b"EHLO example.org\r\n", &mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains("not TLS"), "{error}");
        let mut client = TlsSession::client(&pinning([0; 32]), NAME).unwrap();
        let error = client.feed(b"220 relay.example.net\r\n", &mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains("not TLS"), "{error}");
        assert!(TlsSession::client(&pinning([0; 32]), "no name").is_err());
    }

    #[test]
    fn faults_in_files_are_told_with_the_file() {
        let (certificate, key) = self_signed(&[NAME]).unwrap();
        let (_, other) = self_signed(&[NAME]).unwrap();
        let locked = "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n";
        let table: &[(&str, &str, &str)] = &[
            ("", &key, "relay.pem holds no certificate"),
            (&certificate, "", "relay.key holds no private key"),
            (&certificate, &certificate, "relay.key holds no private key"),
            (&certificate, locked, "relay.key is encrypted"),
            (&certificate, &other, "relay.key does not belong to"),
            ("-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n", &key, "relay.pem is not well-formed"),
        ];
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (folder.path().join("relay.pem"), folder.path().join("relay.key"));
        let fault = server_config(&first, &second).unwrap_err();
        assert!(fault.contains("relay.pem: "), "{fault}");
        for (certificate, key, expected) in table {
            std::fs::write(&first, certificate).unwrap();
            std::fs::write(&second, key).unwrap();
            let fault = server_config(&first, &second).unwrap_err();
            assert!(fault.contains(expected), "wanted {expected}\ngot    {fault}");
        }
        std::fs::write(&first, &certificate).unwrap();
        std::fs::write(&second, &key).unwrap();
        server_config(&first, &second).unwrap();
        client_config(&Trust::Authorities(first)).unwrap();
        let fault = client_config(&Trust::Authorities(second)).unwrap_err();
        assert!(fault.contains("holds no certificate"), "{fault}");
    }

    #[test]
    fn randomness_differs() {
        let (mut one, mut other) = ([0; 32], [0; 32]);
        random(&mut one);
        random(&mut other);
        assert_ne!(one, other);
    }
}
