//! The certificates of the plays: one of the server's, and those that clients show by name.

use rustls::client::ResolvesClientCert;
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::CertifiedKey;
use rustls::{DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

/// One certificate of the server for all plays: making keys is slow.
pub struct Identity {
    pub certificate: String,
    pub key: String,
    pub client: Arc<rustls::ClientConfig>,
    pub server: Arc<rustls::ServerConfig>,
    /// The same, and asks for a certificate of the client.
    pub asking: Arc<rustls::ServerConfig>,
    /// The certificates of clients, by name: see the parent module.
    pub clients: BTreeMap<&'static str, ClientCertificate>,
}

pub struct ClientCertificate {
    pub pem: String,
    pub key: String,
    pub der: CertificateDer<'static>,
    spki: Vec<u8>,
}

impl ClientCertificate {
    fn new(key: &rcgen::KeyPair, expired: bool) -> ClientCertificate {
        let mut params = rcgen::CertificateParams::new(vec!["me.example".to_owned()]).expect("a name");
        if expired {
            params.not_before = rcgen::date_time_ymd(2000, 1, 1);
            params.not_after = rcgen::date_time_ymd(2001, 1, 1);
        }
        let certificate = params.self_signed(key).expect("a certificate");
        ClientCertificate {
            pem: certificate.pem(),
            key: key.serialize_pem(),
            der: certificate.der().clone(),
            spki: rcgen::PublicKeyData::subject_public_key_info(key),
        }
    }

    /// Both pins, of the certificate and of the key.
    pub fn pins(&self) -> [String; 2] {
        let hex = |octets: &[u8]| data_encoding::HEXLOWER.encode(&Sha256::digest(octets));
        [format!("sha256:{}", hex(&self.der)), format!("spki-sha256:{}", hex(&self.spki))]
    }
}

pub fn identity() -> &'static Identity {
    static IDENTITY: OnceLock<Identity> = OnceLock::new();
    IDENTITY.get_or_init(|| {
        let (certificate, key) = odmr::net::tls::self_signed(&["localhost", "127.0.0.1"]).expect("a certificate");
        let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).expect("PEM")];
        let mut roots = rustls::RootCertStore::empty();
        roots.add(chain[0].clone()).expect("a root");
        let client = rustls::ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
        let client = client.expect("versions").with_root_certificates(roots);
        let client = client.with_client_cert_resolver(Arc::new(NeverAsked));
        let server = |asks| {
            let secret = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("PEM");
            let server = rustls::ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
            let server = server.expect("versions");
            let server = match asks {
                true => server.with_client_cert_verifier(Arc::new(AnyClient)),
                false => server.with_no_client_auth(),
            };
            Arc::new(server.with_single_cert(chain.clone(), secret).expect("a key"))
        };
        let (server, asking) = (server(false), server(true));
        let keys = [(); 3].map(|()| rcgen::KeyPair::generate().expect("a key"));
        let clients = BTreeMap::from([
            ("me", ClientCertificate::new(&keys[0], false)),
            ("renewed", ClientCertificate::new(&keys[0], false)),
            ("expired", ClientCertificate::new(&keys[0], true)),
            ("other", ClientCertificate::new(&keys[1], false)),
            ("third", ClientCertificate::new(&keys[2], false)),
        ]);
        Identity { certificate, key, client: Arc::new(client), server, asking, clients }
    })
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Fails the play if the program requests a client certificate: it may do so only if configured (RFC 8314 section 4.2).
#[derive(Debug)]
struct NeverAsked;

impl ResolvesClientCert for NeverAsked {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        panic!("the program requests a client certificate");
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Shows the certificate of this name, or none, and knows whether the program has requested it.
#[derive(Debug)]
pub struct Shows {
    key: Option<Arc<CertifiedKey>>,
    asked: AtomicBool,
}

impl Shows {
    pub fn new(name: &str) -> Arc<Shows> {
        let key = identity().clients.get(name).map(|client| {
            let secret = PrivateKeyDer::from_pem_slice(client.key.as_bytes()).expect("PEM");
            let key = provider().key_provider.load_private_key(secret).expect("a key");
            Arc::new(CertifiedKey::new(vec![client.der.clone()], key))
        });
        Arc::new(Shows { key, asked: AtomicBool::new(false) })
    }

    pub fn was_asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }

    /// The client configuration with this certificate.
    pub fn config(self: &Arc<Shows>) -> Arc<rustls::ClientConfig> {
        let mut config = rustls::ClientConfig::clone(&identity().client);
        config.client_auth_cert_resolver = self.clone();
        Arc::new(config)
    }
}

impl ResolvesClientCert for Shows {
    fn resolve(&self, authorities: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        assert!(authorities.is_empty(), "the program names authorities, and the customer's certificate has none");
        self.asked.store(true, Ordering::Relaxed);
        self.key.clone()
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Asks for a certificate, and accepts any or none.
#[derive(Debug)]
struct AnyClient;

impl ClientCertVerifier for AnyClient {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self, _: &CertificateDer<'_>, _: &[CertificateDer<'_>], _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self, message: &[u8], certificate: &CertificateDer<'_>, signature: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &provider().signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self, message: &[u8], certificate: &CertificateDer<'_>, signature: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
