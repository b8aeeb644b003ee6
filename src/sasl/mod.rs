//! SASL (RFC 4422): who is there? Octets in, octets out; base64 and the AUTH command (RFC 4954) belong to SMTP.
//!
//! One mechanism a file, both sides of it. A [`Mechanism`] makes an exchange for either side:
//!
//! ```text
//!     server                                   client
//!     first() ── challenge, if any ──────────▶ step()      server-first (CRAM-MD5)
//!     step()  ◀────── response, if any ─────── initial()   client-first (PLAIN); or step(b"") after an
//!       │                                                  empty challenge
//!       ├─ Challenge ── another round ───────▶ step()
//!       └─ Done, Failed, Malformed, Unavailable            finished(): may a success be believed?
//! ```
//!
//! Nobody learns from an exchange whether a name exists: an unknown name costs the same work and ends the same
//! way as a wrong secret. Names and secrets are compared octet by octet; no SASLprep (RFC 4013) is done, which
//! changes nothing for ASCII.
//!
//! A new mechanism is a new file here, a line in each method of [`Mechanism`], and nothing elsewhere.

mod cram_md5;
mod plain;

use subtle::ConstantTimeEq;

/// Where a server finds what its customers know.
pub trait CredentialStore {
    /// The secret of the account with this name; `None` if there is no such account.
    fn secret(&self, name: &str) -> Result<Option<Vec<u8>>, Unavailable>;
}

/// The secrets cannot be asked just now; the client may try later.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unavailable;

/// The mechanisms this program knows.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Mechanism {
    /// RFC 2195; RFC 2645 section 5.1.2 makes it a must.
    CramMd5,
    /// RFC 4616; RFC 4954 section 4 makes it a must, under TLS.
    Plain,
}

impl Mechanism {
    /// All of them, the strongest first. CRAM-MD5 leads because it never shows the secret to the other side,
    /// who may not be who we think.
    pub const ALL: [Mechanism; 2] = [Mechanism::CramMd5, Mechanism::Plain];

    /// The name under which IANA lists it.
    pub fn name(self) -> &'static str {
        match self {
            Mechanism::CramMd5 => "CRAM-MD5",
            Mechanism::Plain => "PLAIN",
        }
    }

    /// Names are case-insensitive (RFC 4954 section 4).
    pub fn parse(name: &[u8]) -> Option<Mechanism> {
        let same = |mechanism: &Mechanism| mechanism.name().as_bytes().eq_ignore_ascii_case(name);
        Mechanism::ALL.into_iter().find(same)
    }

    /// It shows the secret to whoever listens, so it is neither offered nor used without TLS (RFC 4954 section 4).
    pub fn needs_tls(self) -> bool {
        match self {
            Mechanism::CramMd5 => false,
            Mechanism::Plain => true,
        }
    }

    /// The client speaks first and may do so in the AUTH command itself. With another mechanism an initial
    /// response is an error (RFC 4954 section 4).
    pub fn client_first(self) -> bool {
        match self {
            Mechanism::CramMd5 => false,
            Mechanism::Plain => true,
        }
    }

    /// What a client should use of what is offered; `tls`: is the connection encrypted?
    pub fn strongest(offered: &[Mechanism], tls: bool) -> Option<Mechanism> {
        let usable = |mechanism: &Mechanism| offered.contains(mechanism) && (tls || !mechanism.needs_tls());
        Mechanism::ALL.into_iter().find(usable)
    }

    /// The server's side. `challenge` must never have been used before; see `Stamps::challenge`.
    pub fn server(self, challenge: String) -> Box<dyn ServerExchange> {
        match self {
            Mechanism::CramMd5 => Box::new(cram_md5::Server::new(challenge)),
            Mechanism::Plain => Box::new(plain::Server),
        }
    }

    /// The client's side.
    pub fn client(self, name: &str, secret: &[u8]) -> Box<dyn ClientExchange> {
        match self {
            Mechanism::CramMd5 => Box::new(cram_md5::Client::new(name, secret)),
            Mechanism::Plain => Box::new(plain::Client::new(name, secret)),
        }
    }
}

/// One authentication, seen from the server.
pub trait ServerExchange: Send {
    /// The challenge to begin with; `None` for a client-first mechanism: then, if AUTH came without an initial
    /// response, the server sends an empty challenge (RFC 4954 section 4).
    fn first(&mut self) -> Option<Vec<u8>>;

    /// What a response, already out of base64, leads to.
    fn step(&mut self, response: &[u8], secrets: &dyn CredentialStore) -> ExchangeStep;
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ExchangeStep {
    /// Send this and wait for the next response.
    Challenge(Vec<u8>),
    /// It is the holder of this account.
    Done(String),
    /// It is not: unknown name, wrong secret, or the wish to be somebody else.
    Failed,
    /// The response is not of the mechanism's form; no secret was compared.
    Malformed,
    /// The secrets cannot be asked just now.
    Unavailable,
}

/// One authentication, seen from the client.
pub trait ClientExchange: Send {
    /// What may be sent with the AUTH command. Who cannot send it there, because the line would grow too long
    /// (RFC 4954 section 4), drops it: `step` gives it again as the answer to the empty challenge.
    fn initial(&mut self) -> Option<Vec<u8>>;

    /// The response to a challenge; `None`: this goes wrong, cancel.
    fn step(&mut self, challenge: &[u8]) -> Option<Vec<u8>>;

    /// May a server's word of success be believed by now?
    fn finished(&self) -> bool;
}

/// Stands in for the secret of an unknown name, so that the work is the same. It opens nothing.
const DUMMY_SECRET: &[u8] = b"there is no such account";

/// Calls `check` with the secret of `name`, or with another one if there is none, which then fails all the same.
fn verify(name: &str, secrets: &dyn CredentialStore, check: impl FnOnce(&[u8]) -> bool) -> ExchangeStep {
    let Ok(secret) = secrets.secret(name) else {
        return ExchangeStep::Unavailable;
    };
    let right = check(secret.as_deref().unwrap_or(DUMMY_SECRET));
    // An empty secret is no secret, whoever let it in.
    let known = secret.is_some_and(|secret| !secret.is_empty());
    if right & known { ExchangeStep::Done(name.to_owned()) } else { ExchangeStep::Failed }
}

/// Compares without telling by the time it takes where the difference is. For values of the same length.
fn same(left: &[u8], right: &[u8]) -> bool {
    bool::from(left.ct_eq(right))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One account, and a name at which the store breaks down.
    pub(super) struct One(pub &'static str, pub &'static [u8]);

    impl CredentialStore for One {
        fn secret(&self, name: &str) -> Result<Option<Vec<u8>>, Unavailable> {
            match name {
                "broken" => Err(Unavailable),
                name if name == self.0 => Ok(Some(self.1.to_vec())),
                _ => Ok(None),
            }
        }
    }

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
    fn client_and_server_understand_each_other() {
        for mechanism in Mechanism::ALL {
            for (secret, expected) in [
                ("right", ExchangeStep::Done("acme".into())),
                ("wrong", ExchangeStep::Failed),
                ("", ExchangeStep::Failed),
            ] {
                for initial in [true, false] {
                    let got = converse(mechanism, secret, initial);
                    assert_eq!(got, expected, "{mechanism:?} {secret:?} {initial}");
                }
            }
        }
    }

    fn converse(mechanism: Mechanism, secret: &str, use_initial: bool) -> ExchangeStep {
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
    fn an_empty_secret_opens_nothing() {
        let secrets = One("acme", b"");
        let mut server = Mechanism::CramMd5.server("<1.2@h>".into());
        let mut client = Mechanism::CramMd5.client("acme", b"");
        let response = client.step(&server.first().unwrap()).unwrap();
        assert_eq!(server.step(&response, &secrets), ExchangeStep::Failed);
    }

    #[test]
    fn the_stand_in_for_an_unknown_name_opens_nothing() {
        for mechanism in Mechanism::ALL {
            let mut server = mechanism.server("<1.2@h>".into());
            let mut client = mechanism.client("stranger", DUMMY_SECRET);
            let challenge = server.first().unwrap_or_default();
            let response = client.step(&challenge).unwrap();
            let step = server.step(&response, &One("acme", b"right"));
            assert_eq!(step, ExchangeStep::Failed, "{mechanism:?}");
        }
    }
}
