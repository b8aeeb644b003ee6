//! Tests of TLS sessions in memory, and of certificates and pins.

use super::*;

const NAME: &str = "relay.example.net";

/// A server with a certificate for `NAME`, and that certificate.
fn server() -> (ServerTls, String) {
    let (certificate, key) = self_signed(&[NAME]).unwrap();
    (ServerTls::from_pem(&certificate, &key).unwrap(), certificate)
}

/// As `openssl req -x509` makes them: self-signed and CA:TRUE.
fn self_signed_authority(not_after: i32) -> (ServerTls, String) {
    let mut params = rcgen::CertificateParams::new(vec![NAME.to_string()]).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.not_after = rcgen::date_time_ymd(not_after, 1, 1);
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = params.self_signed(&key).unwrap().pem();
    let tls = ServerTls::from_pem(&certificate, &key.serialize_pem()).unwrap();
    (tls, certificate)
}

fn trusting(pem: &str) -> ClientTls {
    ClientTls::with(Verification::from_pem(pem.as_bytes(), "ca.pem").unwrap(), rustls::DEFAULT_VERSIONS).unwrap()
}

fn pinning(pin: [u8; 32]) -> ClientTls {
    ClientTls::new(&Trust::Pin(pin)).unwrap()
}

/// Carries what one session has sealed to the other, in pieces of `step` octets.
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

/// Handshake in memory; `Err`: the error of the client, and then that of the server.
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
fn the_certificate_in_the_ca_file_is_trusted() {
    let (tls, certificate) = server();
    let (server, client) = shake(&tls, &trusting(&certificate), NAME).unwrap();
    assert_eq!(client.info(), server.info());
    assert_eq!(client.info().unwrap().version, "TLSv1.3");
    assert!(client.info().unwrap().cipher.starts_with("TLS_"));
}

#[test]
fn a_self_signed_certificate_that_says_ca_true_is_trusted_when_identical() {
    let (tls, certificate) = self_signed_authority(4096);
    shake(&tls, &trusting(&certificate), NAME).unwrap();
    let (_, other) = self_signed_authority(4096);
    let (client, server) = shake(&tls, &trusting(&other), NAME).err().unwrap();
    assert!(client.contains("set `ca`") && client.contains("`pin`"), "{client}");
    assert!(server.contains("rejected this side's certificate"), "{server}");
}

/// Rules: TLS-19.
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
    let tls = ServerTls::from_pem(&certificate, &key.serialize_pem()).unwrap();
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
fn a_pinned_certificate_without_its_key_is_rejected() {
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
    for client in [ClientTls::new(&pin), ClientTls::tls12(&pin)] {
        let tls = ServerTls(Arc::new(config.clone()));
        let (client, _) = shake(&tls, &client.unwrap(), NAME).err().unwrap();
        assert!(client.contains("signature"), "{client}");
    }
}

#[test]
fn tls_1_2_is_offered_too() {
    let (tls, certificate) = server();
    let pin = Trust::Pin(fingerprint(&certificate).unwrap());
    let (mut server, mut client) = shake(&tls, &ClientTls::tls12(&pin).unwrap(), NAME).unwrap();
    let info = server.info().unwrap();
    assert_eq!(info.version, "TLSv1.2");
    assert!(info.cipher.starts_with("TLS_ECDHE_"), "{}", info.cipher);
    let mut received = Vec::new();
    client.seal(b"hello").unwrap();
    carry(&mut client, &mut server, &mut received, 1).unwrap();
    assert_eq!(received, b"hello");
}

#[test]
fn keys_are_renewed_while_both_send() {
    let (tls, certificate) = server();
    let pin = Trust::Pin(fingerprint(&certificate).unwrap());
    let (mut one, mut other) = shake(&tls, &ClientTls::new(&pin).unwrap(), NAME).unwrap();
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
fn sealing_has_a_limit_and_counts() {
    let (tls, certificate) = server();
    let pin = Trust::Pin(fingerprint(&certificate).unwrap());
    let (mut server, _) = shake(&tls, &ClientTls::new(&pin).unwrap(), NAME).unwrap();
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
fn an_end_needs_a_close_notify() {
    let (tls, certificate) = server();
    let pin = Trust::Pin(fingerprint(&certificate).unwrap());
    let (mut server, mut client) = shake(&tls, &ClientTls::new(&pin).unwrap(), NAME).unwrap();
    assert!(!server.ended().unwrap());
    server.end_of_input().unwrap();
    let error = server.ended().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    server.close();
    carry(&mut server, &mut client, &mut Vec::new(), 10).unwrap();
    assert!(client.ended().unwrap());
}

#[test]
fn clear_text_is_distinguished_from_tls() {
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
fn errors_in_files_name_the_file() {
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
fn randomness_differs() {
    let (mut one, mut other) = ([0; 32], [0; 32]);
    random(&mut one);
    random(&mut other);
    assert_ne!(one, other);
}
