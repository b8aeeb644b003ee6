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

mod exchange;
mod cram_md5;
mod plain;

pub use exchange::{ClientExchange, CredentialStore, ExchangeStep, NoCredentials, ServerExchange, Unavailable};

/// The mechanisms this program knows.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Mechanism {
    /// RFC 2195; RFC 2645 section 5.1.2 requires it.
    CramMd5,
    /// RFC 4616; RFC 4954 section 4 requires it, under TLS.
    Plain,
}

impl Mechanism {
    /// All mechanisms, the strongest first. CRAM-MD5 comes first because it does not send the secret to a server that
    /// may not be the right one.
    pub const ALL: [Mechanism; 2] = [Mechanism::CramMd5, Mechanism::Plain];

    /// The name in the IANA registry.
    pub fn name(self) -> &'static str {
        match self {
            Mechanism::CramMd5 => "CRAM-MD5",
            Mechanism::Plain => "PLAIN",
        }
    }

    /// The mechanism of this name, in any case (RFC 4954 section 4); `None`: this program does not know it.
    pub fn parse(name: &[u8]) -> Option<Mechanism> {
        let same = |mechanism: &Mechanism| mechanism.name().as_bytes().eq_ignore_ascii_case(name);
        Mechanism::ALL.into_iter().find(same)
    }

    /// Whether the mechanism sends the secret in clear, and so is neither offered nor used without TLS (RFC 4954 section
    /// 4).
    pub fn needs_tls(self) -> bool {
        matches!(self, Mechanism::Plain)
    }

    /// Whether the client sends first, so that AUTH may have an initial response. With another mechanism an initial
    /// response is an error (RFC 4954 section 4).
    pub fn client_first(self) -> bool {
        matches!(self, Mechanism::Plain)
    }

    /// The mechanism that a client should use, of those that are offered; `None`: it can use none of them. `tls`: the
    /// connection is encrypted.
    pub fn strongest(offered: &[Mechanism], tls: bool) -> Option<Mechanism> {
        let usable = |mechanism: &Mechanism| offered.contains(mechanism) && (tls || !mechanism.needs_tls());
        Mechanism::ALL.into_iter().find(usable)
    }

    /// An exchange for the server. `challenge` must not have been used before: see [`CredentialStore::challenge`].
    pub fn server(self, challenge: String) -> Box<dyn ServerExchange> {
        match self {
            Mechanism::CramMd5 => Box::new(cram_md5::CramMd5Server(challenge)),
            Mechanism::Plain => Box::new(plain::PlainServer),
        }
    }

    /// An exchange for the client, which authenticates as the account `name`.
    pub fn client(self, name: &str, secret: &[u8]) -> Box<dyn ClientExchange> {
        match self {
            Mechanism::CramMd5 => Box::new(cram_md5::CramMd5Client::new(name, secret)),
            Mechanism::Plain => Box::new(plain::PlainClient::new(name, secret)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::exchange::DUMMY_SECRET;
    use super::*;

    /// One account, and a name for which the store fails.
    pub(super) struct One(pub &'static str, pub &'static [u8]);

    impl CredentialStore for One {
        fn secret(&self, name: &str) -> Result<Option<Vec<u8>>, Unavailable> {
            match name {
                "broken" => Err(Unavailable),
                name if name == self.0 => Ok(Some(self.1.to_vec())),
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
    fn the_strongest_usable_mechanism_is_chosen() {
        use Mechanism::{CramMd5, Plain};
        let check = |offered: &[Mechanism], tls, expected| {
            assert_eq!(Mechanism::strongest(offered, tls), expected, "{offered:?} {tls}");
        };
        check(&[Plain, CramMd5], true, Some(CramMd5));
        check(&[Plain, CramMd5], false, Some(CramMd5));
        check(&[Plain], true, Some(Plain));
        check(&[Plain], false, None);
        check(&[], true, None);
    }

    /// Both sides of every mechanism agree, also when the client holds its initial response back.
    #[test]
    fn client_and_server_agree() {
        for mechanism in Mechanism::ALL {
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
        let mut server = mechanism.server("<1.2@relay.example.net>".into());
        let mut client = mechanism.client("acme", secret.as_bytes());
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

    #[test]
    fn an_empty_secret_authenticates_no_client() {
        let secrets = One("acme", b"");
        let mut server = Mechanism::CramMd5.server("<1.2@h>".into());
        let mut client = Mechanism::CramMd5.client("acme", b"");
        let response = client.step(&server.first().unwrap()).unwrap();
        assert_eq!(server.step(&response, &secrets), ExchangeStep::Failed("acme".into()));
    }

    /// Rules: CRAM-08.
    #[test]
    fn the_secret_used_for_an_unknown_name_authenticates_no_client() {
        for mechanism in Mechanism::ALL {
            let mut server = mechanism.server("<1.2@h>".into());
            let mut client = mechanism.client("stranger", DUMMY_SECRET);
            let challenge = server.first().unwrap_or_default();
            let response = client.step(&challenge).unwrap();
            let step = server.step(&response, &One("acme", b"right"));
            assert_eq!(step, ExchangeStep::Failed("stranger".into()), "{mechanism:?}");
        }
    }
}
