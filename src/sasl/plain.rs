//! PLAIN (RFC 4616): `[authzid] NUL authcid NUL passwd`, the secret itself. Only under TLS.

use sha2::{Digest, Sha256};

use super::{ClientExchange, CredentialStore, ExchangeStep, ServerExchange, same, verify};

pub(super) struct Server;

impl ServerExchange for Server {
    fn first(&mut self) -> Option<Vec<u8>> {
        None
    }

    fn step(&mut self, response: &[u8], secrets: &dyn CredentialStore) -> ExchangeStep {
        let Some([wanted, name, password]) = parse(response) else {
            return ExchangeStep::Malformed;
        };
        // RFC 4616 section 2: who wants to be somebody else must be allowed to. Here nobody is.
        let allowed = wanted.is_empty() | (wanted == name);
        verify(name, secrets, |secret| {
            // Digests have one length, so the comparison does not tell the secret's.
            let same = same(&Sha256::digest(secret), &Sha256::digest(password));
            same & allowed & !name.is_empty() & !password.is_empty()
        })
    }
}

pub(super) struct Client {
    message: Vec<u8>,
    answered: bool,
}

impl Client {
    pub(super) fn new(name: &str, secret: &[u8]) -> Client {
        Client { message: [b"\0", name.as_bytes(), b"\0", secret].concat(), answered: false }
    }
}

impl ClientExchange for Client {
    fn initial(&mut self) -> Option<Vec<u8>> {
        Some(self.message.clone())
    }

    fn step(&mut self, _challenge: &[u8]) -> Option<Vec<u8>> {
        if std::mem::replace(&mut self.answered, true) {
            return None;
        }
        Some(self.message.clone())
    }

    /// The server proves nothing in this mechanism, so there is nothing to wait for.
    fn finished(&self) -> bool {
        true
    }
}

/// Three UTF-8 strings with a NUL between them, none inside (RFC 4616 section 2). Whether one is empty that must
/// not be is asked later, where the work is the same for all.
fn parse(response: &[u8]) -> Option<[&str; 3]> {
    let mut parts = std::str::from_utf8(response).ok()?.split('\0');
    let three = [parts.next()?, parts.next()?, parts.next()?];
    parts.next().is_none().then_some(three)
}

#[cfg(test)]
mod tests {
    use super::super::tests::One;
    use super::*;

    const TIM: One = One("tim", b"tanstaaftanstaaf");

    #[test]
    fn responses_end_as_they_should() {
        let check = |response: &[u8], expected: ExchangeStep| {
            let shown = response.escape_ascii();
            assert_eq!(Server.step(response, &TIM), expected, "{shown}");
        };
        let done = || ExchangeStep::Done("tim".into());
        check(b"\0tim\0tanstaaftanstaaf", done());
        check(b"tim\0tim\0tanstaaftanstaaf", done());
        check(b"Ursel\0tim\0tanstaaftanstaaf", ExchangeStep::Failed);
        check(b"\0tim\0tanstaaftanstaa", ExchangeStep::Failed);
        check(b"\0tim\0tanstaaftanstaaf\n", ExchangeStep::Failed);
        check(b"\0tom\0tanstaaftanstaaf", ExchangeStep::Failed);
        check(b"\0\0tanstaaftanstaaf", ExchangeStep::Failed);
        check(b"\0tim\0", ExchangeStep::Failed);
        check(b"\0\0", ExchangeStep::Failed);
        check(b"\0broken\0x", ExchangeStep::Unavailable);
        check(b"", ExchangeStep::Malformed);
        check(b"tim", ExchangeStep::Malformed);
        check(b"tim\0tanstaaftanstaaf", ExchangeStep::Malformed);
        check(b"\0tim\0tanstaaf\0tanstaaf", ExchangeStep::Malformed);
        check(b"\0tim\0\xff", ExchangeStep::Malformed);
    }

    #[test]
    fn long_and_non_ascii_strings_pass() {
        let secrets = One("grün", "Kennwort für grün".as_bytes());
        let response = "\0grün\0Kennwort für grün".as_bytes();
        assert_eq!(Server.step(response, &secrets), ExchangeStep::Done("grün".into()));

        let long = [b"\0".as_slice(), &[b'n'; 255], b"\0", &[b'p'; 255]].concat();
        assert_eq!(Server.step(&long, &TIM), ExchangeStep::Failed);
    }

    #[test]
    fn the_client_says_it_with_auth_or_after_an_empty_challenge() {
        let message = Some(b"\0tim\0tanstaaftanstaaf".to_vec());
        let mut client = Client::new("tim", b"tanstaaftanstaaf");
        assert_eq!(client.initial(), message);
        assert_eq!(client.step(b""), message);
        assert_eq!(client.step(b""), None, "not again and again");
    }
}
