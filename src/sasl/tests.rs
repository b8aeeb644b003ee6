//! Both sides of every mechanism together.

use super::exchange::DUMMY_SECRET;
use super::*;

/// One account, and a name for which the store fails.
pub(super) struct One(pub &'static str, pub &'static [u8]);

impl CredentialStore for One {
    fn credentials(&self, name: &str) -> Result<Option<AccountCredentials>, Unavailable> {
        match name {
            "broken" => Err(Unavailable),
            name if name == self.0 => Ok(Some(AccountCredentials { secret: Some(self.1.to_vec()), verifier: None })),
            _ => Ok(None),
        }
    }

    fn verifier(&self, name: &str) -> Result<(ScramVerifier, bool), Unavailable> {
        let secret = self.credentials(name)?.and_then(|found| found.secret).filter(|secret| !secret.is_empty());
        Ok(match secret {
            Some(secret) => (ScramVerifier::new(&secret, b"sixteen octets..", 4096), true),
            None => (ScramVerifier::fake(b"key", name, &Default::default()), false),
        })
    }

    fn nonce(&self) -> String {
        "server".into()
    }

    fn challenge(&self) -> String {
        "<1.2@relay.example.net>".into()
    }
}

/// Rules: AUTH-01.
#[test]
fn names_are_read_in_any_case() {
    assert_eq!(Mechanism::parse(b"cram-md5"), Some(Mechanism::CramMd5));
    assert_eq!(Mechanism::parse(b"Plain"), Some(Mechanism::Plain));
    for name in [&b""[..], b"LOGIN", b"PLAIN ", b"CRAM_MD5", b"\xff"] {
        assert_eq!(Mechanism::parse(name), None);
    }
    for mechanism in Mechanism::ALL {
        assert_eq!(Mechanism::parse(mechanism.name().as_bytes()), Some(mechanism));
    }
}

/// The mechanisms with a secret.
const WITH_SECRET: [Mechanism; 4] =
    [Mechanism::ScramSha256Plus, Mechanism::ScramSha256, Mechanism::CramMd5, Mechanism::Plain];

const CERTIFICATE: CertificateDigests = CertificateDigests { certificate: [1; 32], key: [2; 32] };

/// TLS with and without a channel binding.
const TLS_1_3: TlsChannel = TlsChannel { exporter: Some([7; 32]), client_certificate: None };
const TLS_1_2: TlsChannel = TlsChannel { exporter: None, client_certificate: None };

/// Rules: CB-06.
#[test]
fn the_strongest_usable_mechanism_is_first() {
    use Mechanism::{CramMd5, External, Plain, ScramSha256, ScramSha256Plus};
    let check = |offered: &[Mechanism], channel: Option<&TlsChannel>, expected: &[Mechanism]| {
        let usable: Vec<_> = Mechanism::usable(offered, channel).collect();
        assert_eq!(usable, expected, "{offered:?} {channel:?}");
    };
    let all = [Plain, CramMd5, ScramSha256, ScramSha256Plus, External];
    check(&all, Some(&TLS_1_3), &[External, ScramSha256Plus, ScramSha256, CramMd5, Plain]);
    check(&all, Some(&TLS_1_2), &[External, ScramSha256, CramMd5, Plain]);
    check(&all, None, &[ScramSha256, CramMd5]);
    check(&[Plain, CramMd5], Some(&TLS_1_3), &[CramMd5, Plain]);
    check(&[Plain], None, &[]);
    check(&[], Some(&TLS_1_3), &[]);
}

/// With the initial response in AUTH, and after an empty challenge.
#[test]
fn client_and_server_agree() {
    for mechanism in WITH_SECRET {
        for (secret, expected) in
            [("right", ExchangeStep::Done("acme".into())), ("wrong", ExchangeStep::Failed("acme".into()))]
        {
            for initial in [true, false] {
                let got = authenticate(mechanism, secret, initial);
                assert_eq!(got, expected, "{mechanism:?} {secret:?} {initial}");
            }
        }
    }
}

fn authenticate(mechanism: Mechanism, secret: &str, use_initial: bool) -> ExchangeStep {
    let secrets = One("acme", b"right");
    let mut server = server(mechanism, &secrets);
    let mut client = client(mechanism, "acme", secret.as_bytes()).unwrap();
    let initial = client.initial();
    assert_eq!(initial.is_some(), mechanism.client_first());
    let first = server.first();
    assert_eq!(first.is_none(), mechanism.client_first());
    let response = match initial {
        Some(initial) if use_initial => initial,
        initial => {
            if initial.is_some() {
                client = self::client(mechanism, "acme", secret.as_bytes()).unwrap();
            }
            client.step(&first.unwrap_or_default()).unwrap()
        }
    };
    let mut step = server.step(&response, &secrets);
    while let ExchangeStep::Challenge(challenge) = &step {
        step = server.step(&client.step(challenge).unwrap(), &secrets);
    }
    assert!(client.finished() || matches!(step, ExchangeStep::Failed(_)));
    step
}

/// RFC 5802 section 6: the flag of the client in each case.
///
/// Rules: CB-03.
#[test]
fn the_flag_of_scram_depends_on_the_connection_and_the_offer() {
    use Mechanism::{ScramSha256, ScramSha256Plus};
    let check = |mechanism: Mechanism, channel: &TlsChannel, offered: &[Mechanism], expected: Option<&str>| {
        let login = Login::with_secret("acme".to_owned(), b"right".to_vec());
        let client = mechanism.client(&login, channel, offered, "nonce".to_owned());
        let first = client.map(|mut client| String::from_utf8(client.initial().unwrap()).unwrap());
        assert_eq!(first.as_deref(), expected, "{mechanism:?} {channel:?} {offered:?}");
    };
    let (both, one) = ([ScramSha256, ScramSha256Plus], [ScramSha256]);
    check(ScramSha256Plus, &TLS_1_3, &both, Some("p=tls-exporter,,n=acme,r=nonce"));
    check(ScramSha256Plus, &TLS_1_2, &both, None);
    check(ScramSha256, &TLS_1_3, &one, Some("y,,n=acme,r=nonce"));
    check(ScramSha256, &TLS_1_2, &one, Some("n,,n=acme,r=nonce"));
    check(ScramSha256, &TLS_1_2, &both, Some("n,,n=acme,r=nonce"));
    // The login forbids -PLUS, which the server offers: `y` would mean that it does not.
    check(ScramSha256, &TLS_1_3, &both, Some("n,,n=acme,r=nonce"));
}

fn server(mechanism: Mechanism, secrets: &One) -> Box<dyn ServerExchange> {
    mechanism.server(secrets, &TLS_1_3, &Mechanism::ALL)
}

fn client(mechanism: Mechanism, name: &str, secret: &[u8]) -> Option<Box<dyn ClientExchange>> {
    let login = Login::with_secret(name.to_owned(), secret.to_vec());
    mechanism.client(&login, &TLS_1_3, &Mechanism::ALL, "nonce".to_owned())
}

#[test]
fn without_a_secret_no_mechanism_that_needs_one_is_used() {
    let login = Login { secret: None, ..Login::with_secret("acme".to_owned(), Vec::new()) };
    for mechanism in WITH_SECRET {
        assert!(mechanism.client(&login, &TLS_1_3, &Mechanism::ALL, "nonce".to_owned()).is_none());
    }
}

#[test]
fn a_certificate_is_used_if_there_is_one_and_the_server_has_asked_for_it() {
    for (certificate, shown) in [(true, true), (true, false), (false, true), (false, false)] {
        let login = Login { certificate, ..Login::with_secret("acme".to_owned(), b"right".to_vec()) };
        let channel = TlsChannel { client_certificate: shown.then_some(CERTIFICATE), ..TlsChannel::default() };
        let client = Mechanism::External.client(&login, &channel, &Mechanism::ALL, "nonce".to_owned());
        assert_eq!(client.is_some(), certificate && shown);
    }
}

#[test]
fn an_empty_secret_authenticates_no_client() {
    let secrets = One("acme", b"");
    for mechanism in [Mechanism::CramMd5, Mechanism::Plain] {
        let mut server = server(mechanism, &secrets);
        let mut client = client(mechanism, "acme", b"").unwrap();
        let response = client.step(&server.first().unwrap_or_default()).unwrap();
        assert_eq!(server.step(&response, &secrets), ExchangeStep::Failed("acme".into()));
    }
    assert!(client(Mechanism::ScramSha256, "acme", b"").is_none());
}

/// Rules: CRAM-08.
#[test]
fn the_dummy_secret_of_an_unknown_name_authenticates_no_client() {
    for mechanism in WITH_SECRET {
        let secrets = One("acme", b"right");
        let mut server = server(mechanism, &secrets);
        let mut client = client(mechanism, "stranger", DUMMY_SECRET).unwrap();
        let challenge = server.first().unwrap_or_default();
        let mut step = server.step(&client.step(&challenge).unwrap(), &secrets);
        while let ExchangeStep::Challenge(challenge) = &step {
            step = server.step(&client.step(challenge).unwrap(), &secrets);
        }
        assert_eq!(step, ExchangeStep::Failed("stranger".into()), "{mechanism:?}");
    }
}
