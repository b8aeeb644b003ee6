//! Authentication (SASL, RFC 4422). Octets in, octets out; base64 and the AUTH command (RFC 4954) belong to SMTP.
//!
//! Each file has both sides of one mechanism. A [`Mechanism`] makes an exchange for either side:
//!
//! ```text
//!     server                                   client
//!     first() ── challenge, if any ──────────▶ step()      server-first (CRAM-MD5)
//!     step()  ◀────── response, if any ─────── initial()   client-first (PLAIN); or step(b"") after an
//!       │                                                  empty challenge
//!       ├─ Challenge ── another round ───────▶ step()
//!       └─ Done, Failed, Malformed, Unavailable            finished(): is a success plausible?
//! ```
//!
//! An exchange does not reveal whether a name exists: an unknown name takes the same work and has the same result as a
//! wrong secret. Names and secrets are compared octet by octet, without SASLprep (RFC 4013), which changes nothing for
//! ASCII.
//!
//! To add a mechanism, add a file here and a line in each method of [`Mechanism`].

mod channel;
mod exchange;
mod external;
mod cram_md5;
mod plain;

use std::fmt;

pub use channel::{CertificateDigests, TlsChannel};
pub use exchange::{
    AccountCredentials, ClientExchange, CredentialStore, ExchangeStep, NoCredentials, ServerExchange, Unavailable,
};

/// The mechanisms this program knows.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Mechanism {
    /// RFC 4422 appendix A, by a certificate of the client.
    External,
    /// RFC 2195; RFC 2645 section 5.1.2 requires it.
    CramMd5,
    /// RFC 4616; RFC 4954 section 4 requires it, under TLS.
    Plain,
}

impl Mechanism {
    /// All mechanisms, the strongest first. EXTERNAL needs no secret at the server; CRAM-MD5 does not send it to a server
    /// that may not be the right one.
    pub const ALL: [Mechanism; 3] = [Mechanism::External, Mechanism::CramMd5, Mechanism::Plain];

    /// The name in the IANA registry.
    pub fn name(self) -> &'static str {
        match self {
            Mechanism::External => "EXTERNAL",
            Mechanism::CramMd5 => "CRAM-MD5",
            Mechanism::Plain => "PLAIN",
        }
    }

    /// The mechanism of this name, in any case (RFC 4954 section 4); `None`: this program does not know it.
    pub fn parse(name: &[u8]) -> Option<Mechanism> {
        let same = |mechanism: &Mechanism| mechanism.name().as_bytes().eq_ignore_ascii_case(name);
        Mechanism::ALL.into_iter().find(same)
    }

    /// Whether the mechanism is neither offered nor used without TLS: it sends the secret in clear (RFC 4954 section 4), or
    /// depends on what TLS has proved.
    pub fn needs_tls(self) -> bool {
        matches!(self, Mechanism::External | Mechanism::Plain)
    }

    /// Whether the client sends first, so that AUTH may have an initial response. With another mechanism an initial
    /// response is an error (RFC 4954 section 4).
    pub fn client_first(self) -> bool {
        matches!(self, Mechanism::External | Mechanism::Plain)
    }

    /// The mechanisms that a client may use, of those that are offered, in the order of preference. `tls`: the connection is
    /// encrypted.
    pub fn usable(offered: &[Mechanism], tls: bool) -> impl Iterator<Item = Mechanism> {
        let usable = move |mechanism: &Mechanism| offered.contains(mechanism) && (tls || !mechanism.needs_tls());
        Mechanism::ALL.into_iter().filter(usable)
    }

    /// An exchange for the server. `channel`: what TLS tells it. `offered`: the mechanisms in the reply to EHLO.
    pub fn server(
        self, store: &dyn CredentialStore, channel: &TlsChannel, _offered: &[Mechanism],
    ) -> Box<dyn ServerExchange> {
        match self {
            Mechanism::External => Box::new(external::ExternalServer(channel.client_certificate)),
            Mechanism::CramMd5 => Box::new(cram_md5::CramMd5Server(store.challenge())),
            Mechanism::Plain => Box::new(plain::PlainServer),
        }
    }

    /// An exchange for the client; `None`: the login has not what the mechanism needs. `channel`: what TLS tells it.
    /// `offered`: the mechanisms in the server's reply to EHLO. `nonce`: random, and never used before.
    pub fn client(
        self, login: &Login, channel: &TlsChannel, _offered: &[Mechanism], _nonce: String,
    ) -> Option<Box<dyn ClientExchange>> {
        let secret = login.secret.as_deref();
        Some(match self {
            // A server that has not asked for the certificate does not know whose it is.
            Mechanism::External => {
                channel.client_certificate.filter(|_| login.certificate)?;
                Box::new(external::ExternalClient::new(&login.name))
            }
            Mechanism::CramMd5 => Box::new(cram_md5::CramMd5Client::new(&login.name, secret?)),
            Mechanism::Plain => Box::new(plain::PlainClient::new(&login.name, secret?)),
        })
    }
}

/// What a client logs in with.
#[derive(Clone, PartialEq, Eq)]
pub struct Login {
    /// The login name, never empty.
    pub name: String,
    /// Never empty; `None`: mechanisms with a secret are not used.
    pub secret: Option<Vec<u8>>,
    /// The client shows a certificate if the server asks for one in TLS.
    pub certificate: bool,
    /// The mechanisms that may be used.
    pub mechanisms: Vec<Mechanism>,
}

impl Login {
    /// A login with a secret, by each mechanism that has one.
    pub fn with_secret(name: String, secret: Vec<u8>) -> Login {
        Login { name, secret: Some(secret), certificate: false, mechanisms: Mechanism::ALL.to_vec() }
    }
}

impl fmt::Debug for Login {
    /// Without the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Login").field("name", &self.name).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::exchange::DUMMY_SECRET;
    use super::*;

    /// The mechanisms with a secret.
    const WITH_SECRET: [Mechanism; 2] = [Mechanism::CramMd5, Mechanism::Plain];

    const CERTIFICATE: CertificateDigests = CertificateDigests { certificate: [1; 32], key: [2; 32] };

    /// One account, and a name for which the store fails.
    pub(super) struct One(pub &'static str, pub &'static [u8]);

    impl CredentialStore for One {
        fn credentials(&self, name: &str) -> Result<Option<AccountCredentials>, Unavailable> {
            match name {
                "broken" => Err(Unavailable),
                name if name == self.0 => Ok(Some(AccountCredentials { secret: Some(self.1.to_vec()) })),
                _ => Ok(None),
            }
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

    #[test]
    fn the_strongest_usable_mechanism_is_first() {
        use Mechanism::{CramMd5, External, Plain};
        let check = |offered: &[Mechanism], tls, expected| {
            assert_eq!(Mechanism::usable(offered, tls).next(), expected, "{offered:?} {tls}");
        };
        check(&[Plain, CramMd5], true, Some(CramMd5));
        check(&[Plain, CramMd5], false, Some(CramMd5));
        check(&[Plain, CramMd5, External], true, Some(External));
        check(&[Plain, External], false, None);
        check(&[Plain], true, Some(Plain));
        check(&[Plain], false, None);
        check(&[], true, None);
    }

    /// Both sides of every mechanism agree, also when the client holds its initial response back.
    #[test]
    fn client_and_server_agree() {
        for mechanism in WITH_SECRET {
            for (secret, expected) in [
                ("right", ExchangeStep::Done("acme".into())),
                ("wrong", ExchangeStep::Failed("acme".into())),
                ("", ExchangeStep::Failed("acme".into())),
            ] {
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
            _ => client.step(&first.unwrap_or_default()).unwrap(),
        };
        assert!(client.finished());
        server.step(&response, &secrets)
    }

    fn server(mechanism: Mechanism, secrets: &One) -> Box<dyn ServerExchange> {
        mechanism.server(secrets, &TlsChannel::default(), &Mechanism::ALL)
    }

    fn client(mechanism: Mechanism, name: &str, secret: &[u8]) -> Option<Box<dyn ClientExchange>> {
        let login = Login::with_secret(name.to_owned(), secret.to_vec());
        mechanism.client(&login, &TlsChannel::default(), &Mechanism::ALL, "nonce".to_owned())
    }

    #[test]
    fn without_a_secret_no_mechanism_that_needs_one_is_used() {
        let login = Login { secret: None, ..Login::with_secret("acme".to_owned(), Vec::new()) };
        for mechanism in WITH_SECRET {
            assert!(mechanism.client(&login, &TlsChannel::default(), &Mechanism::ALL, "nonce".to_owned()).is_none());
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
        let mut server = server(Mechanism::CramMd5, &secrets);
        let mut client = client(Mechanism::CramMd5, "acme", b"").unwrap();
        let response = client.step(&server.first().unwrap()).unwrap();
        assert_eq!(server.step(&response, &secrets), ExchangeStep::Failed("acme".into()));
    }

    /// Rules: CRAM-08.
    #[test]
    fn the_secret_used_for_an_unknown_name_authenticates_no_client() {
        for mechanism in WITH_SECRET {
            let secrets = One("acme", b"right");
            let mut server = server(mechanism, &secrets);
            let mut client = client(mechanism, "stranger", DUMMY_SECRET).unwrap();
            let challenge = server.first().unwrap_or_default();
            let response = client.step(&challenge).unwrap();
            let step = server.step(&response, &secrets);
            assert_eq!(step, ExchangeStep::Failed("stranger".into()), "{mechanism:?}");
        }
    }
}
