//! SASL exchanges: each mechanism, both sides. The first octet of the input selects the mechanism; the rest are the messages
//! of the other side, with the octet 0xFF between them.

use std::sync::OnceLock;

use odmr::sasl::{
    AccountCredentials, CertificateDigests, CredentialStore, ExchangeStep, Login, Mechanism, ScramVerifier, TlsChannel,
    Unavailable,
};

/// The most messages of one exchange.
const MOST_MESSAGES: usize = 6;

const NAME: &str = "acme";
const SECRET: &[u8] = b"tanstaaftanstaaf";
const CERTIFICATE: CertificateDigests = CertificateDigests { certificate: [1; 32], key: [2; 32] };

/// One account.
pub struct Store;

impl CredentialStore for Store {
    fn credentials(&self, name: &str) -> Result<Option<AccountCredentials>, Unavailable> {
        match name {
            "broken" => Err(Unavailable),
            _ => Ok((name == NAME).then(|| AccountCredentials { secret: Some(SECRET.to_vec()), verifier: None })),
        }
    }

    fn account_of(
        &self, certificate: &CertificateDigests, wanted: Option<&str>,
    ) -> Result<Option<String>, Unavailable> {
        let known = *certificate == CERTIFICATE && wanted.is_none_or(|wanted| wanted == NAME);
        Ok(known.then(|| NAME.to_owned()))
    }

    fn knows(&self, certificate: &CertificateDigests) -> bool {
        *certificate == CERTIFICATE
    }

    fn verifier(&self, name: &str) -> Result<(ScramVerifier, bool), Unavailable> {
        static VERIFIER: OnceLock<ScramVerifier> = OnceLock::new();
        match name {
            "broken" => Err(Unavailable),
            NAME => Ok((VERIFIER.get_or_init(|| ScramVerifier::new(SECRET, b"sixteen octets..", 4096)).clone(), true)),
            name => Ok((ScramVerifier::fake(b"key", name, &Default::default()), false)),
        }
    }

    fn challenge(&self) -> String {
        "<1.1767323045@relay.example.net>".to_owned()
    }

    fn nonce(&self) -> String {
        "nonce1-".to_owned()
    }
}

pub fn run(input: &[u8]) {
    let Some((how, rest)) = input.split_first() else { return };
    let mechanism = Mechanism::ALL[usize::from(how % 5)];
    let channel = TlsChannel {
        exporter: (how & 0x40 == 0).then_some([7; 32]),
        client_certificate: (how & 0x20 == 0).then_some(CERTIFICATE),
    };
    let messages: Vec<&[u8]> = rest.split(|octet| *octet == 0xFF).take(MOST_MESSAGES).collect();
    server(mechanism, &channel, &messages);
    client(mechanism, &channel, &messages);
    agreement(mechanism, &channel, &messages, usize::from(how >> 3) % 4);
}

/// A server that knows the secret. It must not authenticate a client that has not proved that it knows the secret.
fn server(mechanism: Mechanism, channel: &TlsChannel, messages: &[&[u8]]) {
    let mut exchange = mechanism.server(&Store, channel, &Mechanism::ALL);
    assert_eq!(exchange.first().is_none(), mechanism.client_first());
    for message in messages {
        match exchange.step(message, &Store) {
            ExchangeStep::Challenge(challenge) => assert!(mechanism.is_scram() && challenge.is_ascii()),
            ExchangeStep::Done(account) => {
                assert_eq!(account, NAME);
                let proved = match mechanism {
                    Mechanism::External => channel.client_certificate == Some(CERTIFICATE),
                    Mechanism::Plain => message.ends_with(SECRET),
                    // The HMAC-MD5 of the challenge above.
                    Mechanism::CramMd5 => digest().is_some_and(|right| message.trim_ascii_end() == right),
                    Mechanism::ScramSha256 | Mechanism::ScramSha256Plus => {
                        messages.iter().any(|message| message.windows(3).any(|part| part == b",p="))
                    }
                };
                assert!(proved, "{mechanism} {}", message.escape_ascii());
                return;
            }
            ExchangeStep::Failed(_) | ExchangeStep::Malformed | ExchangeStep::Unavailable => return,
        }
    }
}

fn login(secret: &[u8]) -> Login {
    Login { certificate: true, ..Login::with_secret(NAME.to_owned(), secret.to_vec()) }
}

/// The right response to the challenge of [`Store`].
fn digest() -> Option<Vec<u8>> {
    let mut client = Mechanism::CramMd5.client(&login(SECRET), &TlsChannel::default(), &[], "c".to_owned())?;
    client.step(Store.challenge().as_bytes())
}

/// A client whose server does not know the secret.
fn client(mechanism: Mechanism, channel: &TlsChannel, messages: &[&[u8]]) {
    let Some(mut exchange) = mechanism.client(&login(SECRET), channel, &Mechanism::ALL, "client".to_owned()) else {
        return;
    };
    let initial = exchange.initial();
    assert!(initial.is_none() || mechanism.client_first());
    for message in messages.iter().filter(|message| !is_slow(message)) {
        let Some(response) = exchange.step(message) else {
            break;
        };
        // Only PLAIN sends the secret.
        let has_secret = response.windows(SECRET.len()).any(|part| part == SECRET);
        assert!(!has_secret || mechanism == Mechanism::Plain);
        assert!(!mechanism.is_scram() || !exchange.finished(), "SCRAM proves the server");
    }
}

/// A million iterations take half a second.
fn is_slow(message: &[u8]) -> bool {
    let count = message.windows(2).position(|part| part == b"i=").map(|at| &message[at + 2..]);
    count.is_some_and(|count| count.iter().take_while(|octet| octet.is_ascii_digit()).count() > 4)
}

/// Checks that both sides succeed if they have the same secret, and that SCRAM fails if one message was changed in transit.
fn agreement(mechanism: Mechanism, channel: &TlsChannel, messages: &[&[u8]], changed: usize) {
    let (secret, change) = (messages[0], messages.get(1).copied());
    let (secret, change) = if change.is_some() { (secret, change) } else { (SECRET, Some(secret)) };
    let Some(mut client) = mechanism.client(&login(secret), channel, &Mechanism::ALL, "client".to_owned()) else {
        return;
    };
    let mut server = mechanism.server(&Store, channel, &Mechanism::ALL);
    let mut was_changed = false;
    let mut in_transit = |message: Vec<u8>, number: usize| match change {
        Some(change) if number == changed && change != message && !is_slow(change) => {
            was_changed = true;
            change.to_vec()
        }
        _ => message,
    };
    let challenge = server.first();
    let first = client.initial();
    let mut response = match (challenge, first) {
        (Some(challenge), _) => client.step(&in_transit(challenge, 3)),
        (None, first) => first,
    };
    let mut end = None;
    for round in 0..MOST_MESSAGES {
        let Some(message) = response else { break };
        match server.step(&in_transit(message, 2 * round), &Store) {
            ExchangeStep::Challenge(challenge) => response = client.step(&in_transit(challenge, 2 * round + 1)),
            step => {
                end = Some(step);
                break;
            }
        }
    }
    let right = secret == SECRET || mechanism == Mechanism::External;
    let done = matches!(end, Some(ExchangeStep::Done(_)));
    if !was_changed {
        assert_eq!(done, right, "{mechanism} {end:?}");
        assert!(!done || client.finished());
    } else if mechanism.is_scram() {
        // The proofs of SCRAM cover all messages.
        assert!(!(done && client.finished()), "{mechanism}");
    }
}
