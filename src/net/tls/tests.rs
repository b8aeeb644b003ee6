//! Tests of TLS sessions in memory, and of certificates and pins.

use super::*;

const NAME: &str = "relay.example.net";

impl PemText {
    fn new(text: &str, name: &str) -> PemText {
        PemText { octets: text.into(), name: name.to_owned() }
    }
}

impl ServerTls {
    /// [`ServerTls::load`] with the PEM texts themselves.
    pub(crate) fn from_pem(certificate: &str, key: &str) -> ServerTls {
        ServerTls::new(&PemText::new(certificate, "the certificate"), &PemText::new(key, "the key")).unwrap()
    }
}

impl ClientTls {
    /// TLS 1.2 only.
    pub(crate) fn tls12(trust: &Trust) -> ClientTls {
        ClientTls::with(Verification::new(trust).unwrap(), &[&rustls::version::TLS12]).unwrap()
    }
}

impl Trust {
    /// Trusts the first certificate in a PEM text.
    pub(crate) fn pin(certificate: &str) -> Trust {
        Trust::Pin(fingerprint(certificate))
    }
}

fn fingerprint(certificate: &str) -> [u8; 32] {
    digest(&PemText::new(certificate, "the certificate").certificates().unwrap()[0])
}

/// A server with a certificate for `NAME`, and that certificate.
fn server() -> (ServerTls, String) {
    let (certificate, key) = self_signed(&[NAME]).unwrap();
    (ServerTls::from_pem(&certificate, &key), certificate)
}

/// As `openssl req -x509` makes them: self-signed and CA:TRUE.
fn self_signed_authority(not_after: i32) -> (ServerTls, String) {
    let mut params = rcgen::CertificateParams::new(vec![NAME.to_string()]).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.not_after = rcgen::date_time_ymd(not_after, 1, 1);
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = params.self_signed(&key).unwrap().pem();
    let tls = ServerTls::from_pem(&certificate, &key.serialize_pem());
    (tls, certificate)
}

fn trusting(pem: &str) -> ClientTls {
    ClientTls::with(Verification::exact(&PemText::new(pem, "ca.pem")).unwrap(), rustls::DEFAULT_VERSIONS).unwrap()
}

fn pinning(pin: [u8; 32]) -> ClientTls {
    ClientTls::new(&Trust::Pin(pin)).unwrap()
}

/// Feeds what one session has sealed to the other, in pieces of `step` octets.
fn carry(from: &mut TlsSession, to: &mut TlsSession, plain: &mut Vec<u8>, step: usize) -> io::Result<()> {
    let mut sealed = Vec::new();
    while from.wants_write() {
        from.write_to(&mut sealed)?;
    }
    assert_eq!(from.unsent(), 0);
    for piece in sealed.chunks(step) {
        to.feed(piece, plain)?;
    }
    Ok(())
}

/// A handshake in memory; `Err`: the error of the client, then that of the server.
fn handshake(server: &ServerTls, client: &ClientTls, name: &str) -> Result<(TlsSession, TlsSession), (String, String)> {
    let mut server = TlsSession::server(server).unwrap();
    let mut client = TlsSession::client(client, name).unwrap();
    let mut plain = Vec::new();
    while client.handshaking() || server.handshaking() {
        let text = |error: io::Error, server: &mut TlsSession, client: &mut TlsSession| {
            let other = carry(client, server, &mut Vec::new(), 4096).unwrap_err();
            (error.to_string(), other.to_string())
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
fn the_peers_certificate_in_the_ca_file_is_trusted() {
    let (tls, certificate) = server();
    let (server, client) = handshake(&tls, &trusting(&certificate), NAME).unwrap();
    assert_eq!(client.info(), server.info());
    assert_eq!(client.info().unwrap().version, "TLSv1.3");
    assert!(client.info().unwrap().cipher.starts_with("TLS_"));
}

#[test]
fn a_self_signed_certificate_with_ca_true_is_trusted_if_it_is_in_the_ca_file() {
    let (tls, certificate) = self_signed_authority(4096);
    handshake(&tls, &trusting(&certificate), NAME).unwrap();
    let (_, other) = self_signed_authority(4096);
    let (client, server) = handshake(&tls, &trusting(&other), NAME).err().unwrap();
    assert!(client.contains("set `ca`") && client.contains("`pin`"), "{client}");
    assert!(server.contains("rejected this side's certificate"), "{server}");
}

/// Rules: TLS-19.
#[test]
fn a_certificate_in_the_ca_file_must_have_a_valid_name_and_dates() {
    let (tls, certificate) = self_signed_authority(4096);
    let (client, _) = handshake(&tls, &trusting(&certificate), "other.example").err().unwrap();
    assert!(client.contains("not for other.example"), "{client}");
    let (tls, certificate) = self_signed_authority(2001);
    let (client, _) = handshake(&tls, &trusting(&certificate), NAME).err().unwrap();
    assert!(client.contains("expired"), "{client}");
}

#[test]
fn certificates_signed_by_an_authority_in_the_ca_file_are_trusted() {
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let key = rcgen::KeyPair::generate().unwrap();
    let authority = rcgen::CertifiedIssuer::self_signed(params, key).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec![NAME.to_string()]).unwrap();
    let certificate = params.signed_by(&key, &authority).unwrap().pem();
    let tls = ServerTls::from_pem(&certificate, &key.serialize_pem());
    handshake(&tls, &trusting(&authority.pem()), NAME).unwrap();
    let (client, _) = handshake(&tls, &trusting(&authority.pem()), "a.example").err().unwrap();
    assert!(client.contains("for relay.example.net"), "{client}");
}

#[test]
fn a_pin_trusts_one_certificate_whatever_its_name_and_dates() {
    let (tls, certificate) = server();
    let pin = fingerprint(&certificate);
    handshake(&tls, &pinning(pin), "192.0.2.1").unwrap();
    let (expired, certificate) = self_signed_authority(2001);
    handshake(&expired, &pinning(fingerprint(&certificate)), NAME).unwrap();
    let (client, _) = handshake(&expired, &pinning(pin), NAME).err().unwrap();
    let seen = HEXLOWER.encode(&fingerprint(&certificate));
    assert!(client.contains("`pin`") && client.contains(&seen), "{client}");
}

#[test]
fn a_peer_without_the_key_of_the_pinned_certificate_is_rejected() {
    let (_, certificate) = server();
    let (_, key) = self_signed(&[NAME]).unwrap();
    let chain = PemText::new(&certificate, "").certificates().unwrap();
    let key = PemText::new(&key, "").private_key().unwrap();
    let key = PROVIDER.key_provider.load_private_key(key).unwrap();
    let impostor = rustls::sign::CertifiedKey::new(chain, key);
    let config = ServerConfig::builder_with_provider(PROVIDER.clone())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(impostor)));
    let pin = Trust::pin(&certificate);
    for client in [ClientTls::new(&pin).unwrap(), ClientTls::tls12(&pin)] {
        let tls = ServerTls(Arc::new(config.clone()));
        let (client, _) = handshake(&tls, &client, NAME).err().unwrap();
        assert!(client.contains("signature"), "{client}");
    }
}

#[test]
fn tls_1_2_is_negotiated_with_a_client_that_needs_it() {
    let (tls, certificate) = server();
    let pin = Trust::pin(&certificate);
    let (mut server, mut client) = handshake(&tls, &ClientTls::tls12(&pin), NAME).unwrap();
    let info = server.info().unwrap();
    assert_eq!(info.version, "TLSv1.2");
    assert!(info.cipher.starts_with("TLS_ECDHE_"), "{}", info.cipher);
    let mut received = Vec::new();
    client.seal(b"hello").unwrap();
    carry(&mut client, &mut server, &mut received, 1).unwrap();
    assert_eq!(received, b"hello");
}

#[test]
fn both_sides_can_renew_their_keys_while_both_send() {
    let (tls, certificate) = server();
    let pin = Trust::pin(&certificate);
    let (mut one, mut other) = handshake(&tls, &ClientTls::new(&pin).unwrap(), NAME).unwrap();
    for round in 0..20 {
        for (from, to) in [(0, 1), (1, 0)] {
            let (from, to) = match (from, to) {
                (0, 1) => (&mut one, &mut other),
                _ => (&mut other, &mut one),
            };
            let text = vec![round; 20_000];
            from.connection.refresh_traffic_keys().unwrap();
            assert_eq!(from.seal(&text).unwrap(), text.len());
            let mut received = Vec::new();
            carry(from, to, &mut received, 1000).unwrap();
            assert_eq!(received, text);
        }
    }
}

#[test]
fn sealed_octets_are_limited_and_counted() {
    let (tls, certificate) = server();
    let pin = Trust::pin(&certificate);
    let (mut server, _) = handshake(&tls, &ClientTls::new(&pin).unwrap(), NAME).unwrap();
    assert_eq!(server.unsent(), 0);
    assert_eq!(server.seal(&vec![b'x'; 1_000_000]).unwrap(), SEALED_LIMIT);
    assert!(server.unsent() > SEALED_LIMIT);
    let mut sealed = Vec::new();
    let written = server.write_to(&mut sealed).unwrap();
    assert_eq!(written, sealed.len());
    assert_eq!(server.unsent(), 0);
}

/// Rules: TLS-20.
#[test]
fn an_end_without_close_notify_is_an_error() {
    let (tls, certificate) = server();
    let pin = Trust::pin(&certificate);
    let (mut server, mut client) = handshake(&tls, &ClientTls::new(&pin).unwrap(), NAME).unwrap();
    assert!(!server.ended().unwrap());
    server.end_of_input().unwrap();
    let error = server.ended().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    server.close();
    carry(&mut server, &mut client, &mut Vec::new(), 10).unwrap();
    assert!(client.ended().unwrap());
}

#[test]
fn clear_text_is_reported_as_not_tls() {
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
fn errors_in_pem_files_name_the_file() {
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
    let directory = tempfile::tempdir().unwrap();
    let (first, second) = (directory.path().join("relay.pem"), directory.path().join("relay.key"));
    let fault = ServerTls::load(&first, &second).unwrap_err();
    assert!(fault.contains("relay.pem: "), "{fault}");
    for (certificate, key, expected) in table {
        std::fs::write(&first, certificate).unwrap();
        std::fs::write(&second, key).unwrap();
        let fault = ServerTls::load(&first, &second).unwrap_err();
        assert!(fault.contains(expected), "wanted {expected}\ngot    {fault}");
    }
    std::fs::write(&first, &certificate).unwrap();
    std::fs::write(&second, &key).unwrap();
    ServerTls::load(&first, &second).unwrap();
    ClientTls::new(&Trust::Authorities(first)).unwrap();
    let fault = ClientTls::new(&Trust::Authorities(second)).unwrap_err();
    assert!(fault.contains("holds no certificate"), "{fault}");
}

#[test]
fn two_random_values_differ() {
    let (mut one, mut other) = ([0; 32], [0; 32]);
    random(&mut one);
    random(&mut other);
    assert_ne!(one, other);
}
