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
        Trust::Pins(vec![Pin::Certificate(fingerprint(certificate))])
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

/// A server whose certificate is self-signed and has CA:TRUE, as those of `openssl req -x509`.
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
    ClientTls::new(&Trust::Pins(vec![Pin::Certificate(pin)])).unwrap()
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
fn handshake(
    server: &ServerTls, client: &ClientTls, name: &str,
) -> Result<(Box<TlsSession>, Box<TlsSession>), (String, String)> {
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
fn a_pin_trusts_one_certificate_with_any_name_and_dates() {
    let (tls, certificate) = server();
    let pin = fingerprint(&certificate);
    handshake(&tls, &pinning(pin), "192.0.2.1").unwrap();
    let (expired, certificate) = self_signed_authority(2001);
    handshake(&expired, &pinning(fingerprint(&certificate)), NAME).unwrap();
    let (client, _) = handshake(&expired, &pinning(pin), NAME).err().unwrap();
    let seen = HEXLOWER.encode(&fingerprint(&certificate));
    assert!(client.contains("`pin`") && client.contains(&seen), "{client}");
}

/// A file of `testdata/certificates`: a certificate and its key.
fn fixture(name: &str) -> String {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/certificates");
    std::fs::read_to_string(directory.join(format!("{name}.pem"))).unwrap()
}

/// A server that presents `certificate` and signs with `key`, even if they do not belong together.
fn server_with(certificate: &str, key: &str) -> ServerTls {
    let chain = PemText::new(certificate, "").certificates().unwrap();
    let key = PemText::new(key, "").private_key().unwrap();
    let key = PROVIDER.key_provider.load_private_key(key).unwrap();
    let config = ServerConfig::builder_with_provider(PROVIDER.clone())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(rustls::sign::CertifiedKey::new(
            chain, key,
        ))));
    let config = Arc::new(config);
    ServerTls { asking: config.clone(), config, until: None }
}

fn key_pin(certificate: &str) -> Pin {
    Pin::Key(key_digest(&PemText::new(certificate, "").certificates().unwrap()[0]).unwrap())
}

/// Clients of TLS 1.2 and of TLS 1.3.
fn both_versions(verification: impl Fn() -> Verification) -> [ClientTls; 2] {
    [&rustls::version::TLS12, &rustls::version::TLS13]
        .map(|version| ClientTls::with(verification(), &[version]).unwrap())
}

/// Makes the verification that trusts a certificate, given its PEM text.
const TRUSTING: [fn(&str) -> Verification; 4] = [
    |certificate| Verification::Pins(vec![Pin::Certificate(fingerprint(certificate))]),
    |certificate| Verification::Pins(vec![key_pin(certificate)]),
    |certificate| Verification::exact(&PemText::new(certificate, "ca.pem")).unwrap(),
    |_| Verification::Anyone,
];

/// `openssl x509 -req -signkey` makes certificates of version 1, which webpki does not read.
#[test]
fn certificates_with_each_kind_of_key_and_of_version_1_are_trusted_if_their_key_is_enough() {
    for name in ["rsa", "p384", "ed25519", "rsa-v1", "p256-v1", "p384-v1", "ed25519-v1"] {
        let pem = fixture(name);
        let tls = server_with(&pem, &pem);
        for verification in TRUSTING {
            for client in both_versions(|| verification(&pem)) {
                let shaken = handshake(&tls, &client, NAME);
                assert!(shaken.is_ok(), "{name}: {:?}", shaken.err());
            }
        }
        // Another certificate of the same kind is not enough.
        let other = fixture(if name == "rsa-v1" { "p256-v1" } else { "rsa-v1" });
        for verification in &TRUSTING[..3] {
            for client in both_versions(|| verification(&other)) {
                let (error, _) = handshake(&tls, &client, NAME).err().unwrap();
                assert!(error.contains("`pin`") && error.contains("spki-sha256:"), "{name}: {error}");
            }
        }
    }
}

#[test]
fn the_kinds_of_keys_are_those_of_our_own_certificates_too() {
    for name in ["rsa", "p384", "ed25519"] {
        let pem = fixture(name);
        for client in both_versions(|| Verification::exact(&PemText::new(&pem, "ca.pem")).unwrap()) {
            handshake(&ServerTls::from_pem(&pem, &pem), &client, NAME).unwrap();
            let (error, _) = handshake(&ServerTls::from_pem(&pem, &pem), &client, "a.example").err().unwrap();
            assert!(error.contains("not for a.example but for relay.example.net, 192.0.2.1: correct"), "{error}");
        }
    }
}

#[test]
fn a_certificate_that_webpki_does_not_read_must_itself_be_trusted() {
    let pem = fixture("p256-v1");
    let tls = server_with(&pem, &pem);
    // Trust in authorities is not enough.
    let (client, _) = handshake(&tls, &trusting(&server().1), NAME).err().unwrap();
    assert!(client.contains("set `ca` to a file with it") && client.contains("spki-sha256:"), "{client}");
}

#[test]
fn a_pin_of_the_key_survives_a_renewal() {
    let key = rcgen::KeyPair::generate().unwrap();
    let renewed = || {
        let params = rcgen::CertificateParams::new(vec![NAME.to_string()]).unwrap();
        params.self_signed(&key).unwrap().pem()
    };
    let (old, new) = (renewed(), renewed());
    assert_ne!(fingerprint(&old), fingerprint(&new));
    let tls = ServerTls::from_pem(&new, &key.serialize_pem());
    handshake(&tls, &ClientTls::new(&Trust::Pins(vec![key_pin(&old)])).unwrap(), "192.0.2.1").unwrap();
    let (client, _) = handshake(&tls, &ClientTls::new(&Trust::pin(&old)).unwrap(), NAME).err().unwrap();
    let (Pin::Key(pin) | Pin::Certificate(pin)) = key_pin(&old);
    assert!(
        client.contains(&format!("(a pin of the key, spki-sha256:{}, survives", HEXLOWER.encode(&pin))),
        "{client}"
    );
}

/// While a provider changes its key, customers have the pins of both.
#[test]
fn one_of_several_pins_is_enough() {
    let names = ["p256-v1", "rsa", "rsa-v1", "ed25519"].map(fixture);
    let [shown, one, two, other] = &names;
    let of_whole = |pem: &str| Pin::Certificate(fingerprint(pem));
    for (pem, pins) in [
        (shown, vec![key_pin(one), key_pin(shown)]),
        (one, vec![of_whole(two), key_pin(one)]),
        (one, vec![key_pin(two), of_whole(one), key_pin(other)]),
        (one, vec![of_whole(one), key_pin(one)]),
    ] {
        for client in both_versions(|| Verification::Pins(pins.clone())) {
            handshake(&server_with(pem, pem), &client, "192.0.2.1").unwrap();
            // The certificate matches a pin, but the server does not have its key.
            let key = if pem == two { one } else { two };
            assert!(handshake(&server_with(pem, key), &client, NAME).is_err());
        }
    }
    let pins = vec![of_whole(one), key_pin(two)];
    for client in both_versions(|| Verification::Pins(pins.clone())) {
        let (error, _) = handshake(&server_with(other, other), &client, NAME).err().unwrap();
        let expected =
            format!("matches none of the pins in `pin`: it is {}, and its key is {};", of_whole(other), key_pin(other));
        assert!(error.contains(&expected), "{error}");
    }
}

#[test]
fn a_peer_without_the_key_of_its_certificate_is_rejected() {
    let (own, own_key) = self_signed(&[NAME]).unwrap();
    for (certificate, key) in [
        (own, self_signed(&[NAME]).unwrap().1),
        (fixture("p256-v1"), own_key),
        (fixture("rsa-v1"), fixture("rsa")),
        (fixture("ed25519-v1"), fixture("ed25519")),
    ] {
        let tls = server_with(&certificate, &key);
        for verification in TRUSTING {
            for client in both_versions(|| verification(&certificate)) {
                let (error, _) = handshake(&tls, &client, NAME).err().unwrap();
                assert!(error.contains("a signature does not match"), "{error}");
            }
        }
    }
}

/// A client that presents this certificate and signs with this key, even if they do not belong together.
fn client_with(client: ClientTls, certificate: &str, key: &str) -> ClientTls {
    let chain = PemText::new(certificate, "").certificates().unwrap();
    let key = PROVIDER.key_provider.load_private_key(PemText::new(key, "").private_key().unwrap()).unwrap();
    ClientTls { identity: Some(Arc::new(CertifiedKey::new(chain, key))), ..client }
}

/// The certificate may have any issuer, version and dates: the provider compares it with its pins.
#[test]
fn each_certificate_of_a_client_is_accepted_and_its_digests_are_known() {
    let (tls, _) = server();
    let (expired, expired_key) = expired();
    for (certificate, key) in [
        self_signed(&["me"]).unwrap(),
        (expired, expired_key),
        (fixture("rsa"), fixture("rsa")),
        (fixture("rsa-v1"), fixture("rsa-v1")),
        (fixture("p256-v1"), fixture("p256-v1")),
        (fixture("p384-v1"), fixture("p384-v1")),
        (fixture("ed25519-v1"), fixture("ed25519-v1")),
    ] {
        let chain = PemText::new(&certificate, "").certificates().unwrap();
        for client in both_versions(|| Verification::Anyone) {
            let (server, client) = handshake(&tls.asking(), &client_with(client, &certificate, &key), NAME).unwrap();
            assert_eq!(server.channel().client_certificate, digests(&chain[0]));
            assert_eq!(client.channel(), server.channel(), "both sides know what was shown, and have one exporter");
            assert_eq!(server.channel().exporter.is_some(), server.info().unwrap().version == "TLSv1.3");
        }
    }
}

fn expired() -> (String, String) {
    let mut params = rcgen::CertificateParams::new(vec!["me".to_string()]).unwrap();
    (params.not_before, params.not_after) = (rcgen::date_time_ymd(2000, 1, 1), rcgen::date_time_ymd(2001, 1, 1));
    let key = rcgen::KeyPair::generate().unwrap();
    (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
}

/// RFC 8314 section 4.2.
#[test]
fn a_client_sends_a_certificate_only_if_it_is_asked_and_has_one() {
    let (tls, _) = server();
    let (certificate, key) = self_signed(&["me"]).unwrap();
    for without in both_versions(|| Verification::Anyone) {
        let with = client_with(without.clone(), &certificate, &key);
        for (server, client) in [(&tls, &with), (&tls.asking(), &without)] {
            let (server, client) = handshake(server, client, NAME).unwrap();
            assert_eq!(server.channel().client_certificate, None);
            assert_eq!(client.channel(), server.channel());
        }
    }
}

#[test]
fn a_client_without_the_key_of_its_certificate_is_rejected() {
    let (tls, _) = server();
    let (own, own_key) = self_signed(&["me"]).unwrap();
    for (certificate, key) in [
        (own, self_signed(&["me"]).unwrap().1),
        (fixture("p256-v1"), own_key),
        (fixture("rsa-v1"), fixture("rsa")),
        (fixture("ed25519-v1"), fixture("ed25519")),
    ] {
        for client in both_versions(|| Verification::Anyone) {
            let mut server = TlsSession::server(&tls.asking()).unwrap();
            let mut client = TlsSession::client(&client_with(client, &certificate, &key), NAME).unwrap();
            let error = loop {
                assert!(server.handshaking());
                if let Err(error) = carry(&mut client, &mut server, &mut Vec::new(), 4096) {
                    break error.to_string();
                }
                carry(&mut server, &mut client, &mut Vec::new(), 4096).unwrap();
            };
            assert!(error.contains("a signature does not match"), "{error}");
        }
    }
}

/// The files of a client's certificate: its version does not matter, but its key does.
#[test]
fn a_client_needs_the_key_of_its_own_certificate() {
    let directory = tempfile::tempdir().unwrap();
    let (first, second) = (directory.path().join("me.pem"), directory.path().join("me.key"));
    let (certificate, key) = self_signed(&["me"]).unwrap();
    let load = |certificate: &str, key: &str| {
        std::fs::write(&first, certificate).unwrap();
        std::fs::write(&second, key).unwrap();
        ClientTls::new(&Trust::Anyone).unwrap().with_identity(&first, &second).map(drop)
    };
    for name in ["rsa-v1", "p256-v1", "ed25519", "p384"] {
        assert_eq!(load(&fixture(name), &fixture(name)), Ok(()), "{name}");
    }
    assert_eq!(load(&certificate, &key), Ok(()));
    let error = load(&certificate, &self_signed(&["me"]).unwrap().1).unwrap_err();
    assert!(error.contains("me.key does not belong to the first certificate in"), "{error}");
    let error = load(&fixture("rsa-v1"), &fixture("rsa")).unwrap_err();
    assert!(error.contains("me.key does not belong to"), "{error}");
    let error = load(&certificate, "").unwrap_err();
    assert!(error.contains("me.key holds no private key"), "{error}");
}

#[test]
fn the_error_about_an_unusable_key_has_the_kinds_that_are_usable() {
    for name in ["rsa", "p384", "rsa-v1", "ed25519-v1"] {
        assert!(is_usable(&x509::PublicKey::read(key_of(&certificate_of(name)).unwrap()).unwrap()), "{name}");
    }
    let unusable = if cfg!(feature = "aws-lc-rs") { &["rsa-1024"][..] } else { &["rsa-1024", "p521"] };
    for name in unusable {
        let pem = PemText::new(&fixture(name), "relay.pem");
        let error = ServerTls::new(&pem, &pem).unwrap_err();
        assert!(
            error.starts_with("relay.pem holds a key that cannot be used here") && error.contains("P-384"),
            "{error}"
        );
        let error = with_key_kind(CertificateError::BadSignature.into(), &certificate_of(name));
        assert!(explain(&error).contains(KEY_KINDS), "{error}");
    }
}

fn certificate_of(name: &str) -> CertificateDer<'static> {
    PemText::new(&fixture(name), name).certificates().unwrap().remove(0)
}

#[test]
fn our_own_certificate_must_be_of_version_3() {
    for name in ["rsa-v1", "p256-v1", "ed25519-v1"] {
        let pem = PemText::new(&fixture(name), "relay.pem");
        let error = ServerTls::new(&pem, &pem).unwrap_err();
        assert!(error.contains("X.509 version 1") && error.contains("`openssl req -x509 -key relay.pem"), "{error}");
    }
    // The certificate and its key may be in one file: the command must not overwrite it.
    let pem = PemText::new(&fixture("rsa-v1"), "relay.pem");
    assert!(!ServerTls::new(&pem, &pem).unwrap_err().contains("-out relay.pem"));
    // Only the certificate of the server itself matters: an issuer may have version 1.
    let own = fixture("p384");
    let chain = format!("{own}{}", fixture("rsa-v1"));
    ServerTls::new(&PemText::new(&chain, ""), &PemText::new(&own, "")).unwrap();
}

#[test]
fn no_octets_are_read_as_a_certificate_by_mistake() {
    let whole = certificate_of("rsa-v1");
    let read = x509::Certificate::read(&whole).unwrap();
    assert_eq!(read.version, 1);
    assert_eq!(x509::Certificate::read(&certificate_of("rsa")).unwrap().version, 3);
    for end in 0..whole.len() {
        assert_eq!(x509::Certificate::read(&whole[..end]), None, "{end}");
    }
    for at in 0..whole.len() {
        let mut changed = whole.to_vec();
        changed[at] ^= 0x81;
        let _ = x509::Certificate::read(&changed).map(|certificate| x509::PublicKey::read(certificate.public_key));
    }
    for end in 0..read.public_key.len() {
        assert_eq!(x509::PublicKey::read(&read.public_key[..end]), None, "{end}");
    }
}

/// Clients write the configured host into the server name indication. RFC 6066 section 3 permits only domain names there, but
/// this server does not choose its certificate by it.
#[test]
fn a_server_name_that_is_an_address_does_not_end_the_session() {
    let (tls, _) = server();
    for (name, allowed) in [
        ("127.0.0.1", "a.example"),
        ("2001:db8::1", "abc.example"),
        ("relay.example.net.", "relay.example.netx"),
        ("relay_1.example.net", "relay-1.example.net"),
    ] {
        for client in both_versions(|| Verification::Anyone) {
            let mut client = TlsSession::client(&client, allowed).unwrap();
            let mut hello = Vec::new();
            client.write_to(&mut hello).unwrap();
            let at = hello.windows(allowed.len()).position(|part| part == allowed.as_bytes()).unwrap();
            hello[at..at + name.len()].copy_from_slice(name.as_bytes());
            let mut server = TlsSession::server(&tls).unwrap();
            server.feed(&hello, &mut Vec::new()).unwrap();
            assert!(server.wants_write(), "{name}");
        }
    }
}

#[test]
fn a_name_that_is_not_verified_may_be_anything() {
    let (tls, certificate) = server();
    for name in ["no name", "", "-mx.example", "mx..example", "192.0.2.1", "2001:db8::1"] {
        handshake(&tls, &ClientTls::new(&Trust::Anyone).unwrap(), name).unwrap();
        handshake(&tls, &ClientTls::new(&Trust::pin(&certificate)).unwrap(), name).unwrap();
        assert!(handshake(&tls, &trusting(&certificate), "192.0.2.1").is_err());
    }
    assert!(TlsSession::client(&trusting(&certificate), "no name").is_err());
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
}

#[test]
fn errors_in_pem_files_name_the_file() {
    let (certificate, key) = self_signed(&[NAME]).unwrap();
    let (_, other) = self_signed(&[NAME]).unwrap();
    let locked = "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n";
    let foreign = "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n";
    let table: &[(&str, &str, &str)] = &[
        ("", &key, "relay.pem holds no certificate"),
        (&certificate, "", "relay.key holds no private key"),
        (&certificate, &certificate, "relay.key holds no private key"),
        (&certificate, locked, "relay.key is encrypted"),
        (&certificate, foreign, "relay.key holds a key that cannot be used here"),
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
    // Editors add a byte order mark, and write CRLF; the last line may have no end.
    let with_mark = |text: &str| format!("\u{feff}{}", text.replace('\n', "\r\n"));
    for change in [str::to_owned, with_mark, |text| text.trim().to_owned()] as [fn(&str) -> String; 3] {
        std::fs::write(&first, change(&certificate)).unwrap();
        std::fs::write(&second, change(&key)).unwrap();
        ServerTls::load(&first, &second).unwrap();
        ClientTls::new(&Trust::Authorities(first.clone())).unwrap();
    }
    let wide: Vec<u8> = certificate.encode_utf16().flat_map(u16::to_le_bytes).collect();
    std::fs::write(&first, wide).unwrap();
    let fault = ServerTls::load(&first, &second).unwrap_err();
    assert!(fault.ends_with("relay.pem: it is UTF-16 or UTF-32: save it as UTF-8"), "{fault}");
    let fault = ClientTls::new(&Trust::Authorities(second)).unwrap_err();
    assert!(fault.contains("holds no certificate"), "{fault}");
}

/// Users join files to make a chain, and each may begin with a byte order mark.
#[test]
fn no_certificate_of_joined_files_is_lost() {
    let pems = [fixture("p384"), fixture("rsa-v1")];
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), pems.map(|pem| format!("\u{feff}{pem}")).concat()).unwrap();
    assert_eq!(PemText::read(file.path()).unwrap().certificates().unwrap().len(), 2);
}

#[test]
fn two_random_values_differ() {
    let (mut one, mut other) = ([0; 32], [0; 32]);
    random(&mut one);
    random(&mut other);
    assert_ne!(one, other);
}
