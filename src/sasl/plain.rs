//! PLAIN (RFC 4616): the client sends `[authzid] NUL authcid NUL passwd` with the secret itself, under TLS only.

use super::exchange::{ClientExchange, CredentialStore, ExchangeStep, ServerExchange};

/// The server's side.
pub(super) struct PlainServer;

impl ServerExchange for PlainServer {
    fn first(&mut self) -> Option<Vec<u8>> {
        None
    }

    /// The password is checked against a verifier even if the account has its secret in clear, so that an unknown name costs
    /// the same work.
    fn step(&mut self, response: &[u8], store: &dyn CredentialStore) -> ExchangeStep {
        let Some([wanted, name, password]) = parse(response) else {
            return ExchangeStep::Malformed;
        };
        let Ok((verifier, known)) = store.verifier(name) else { return ExchangeStep::Unavailable };
        let Ok(salted) = store.salted_password(password.as_bytes(), &verifier) else {
            return ExchangeStep::Unavailable;
        };
        // RFC 4616 section 2: a client may act for another account only if it is permitted to. Here no account is.
        let allowed = wanted.is_empty() | (wanted == name);
        let right = verifier.is_of_salted(&salted) & known & allowed & !name.is_empty() & !password.is_empty();
        if right { ExchangeStep::Done(name.to_owned()) } else { ExchangeStep::Failed(name.to_owned()) }
    }
}

/// The client's side.
pub(super) struct PlainClient {
    message: Vec<u8>,
    answered: bool,
}

impl PlainClient {
    pub(super) fn new(name: &str, secret: &[u8]) -> PlainClient {
        PlainClient { message: [b"\0", name.as_bytes(), b"\0", secret].concat(), answered: false }
    }
}

impl ClientExchange for PlainClient {
    fn initial(&mut self) -> Option<Vec<u8>> {
        Some(self.message.clone())
    }

    fn step(&mut self, _challenge: &[u8]) -> Option<Vec<u8>> {
        if std::mem::replace(&mut self.answered, true) {
            return None;
        }
        Some(self.message.clone())
    }

    /// The server proves nothing in this mechanism, so its success is accepted at any time.
    fn finished(&self) -> bool {
        true
    }
}

/// Parses three UTF-8 strings with NUL between them (RFC 4616 section 2). An empty name or password is not rejected
/// here, but after the check, so that the time does not differ.
fn parse(response: &[u8]) -> Option<[&str; 3]> {
    let mut parts = std::str::from_utf8(response).ok()?.split('\0');
    let three = [parts.next()?, parts.next()?, parts.next()?];
    parts.next().is_none().then_some(three)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sasl::tests::One;

    const TIM: One = One("tim", b"tanstaaftanstaaf");

    /// Rules: SASL-02, SASL-04.
    #[test]
    fn a_response_is_accepted_rejected_or_malformed() {
        let check = |response: &[u8], expected: ExchangeStep| {
            let shown = response.escape_ascii();
            assert_eq!(PlainServer.step(response, &TIM), expected, "{shown}");
        };
        let done = || ExchangeStep::Done("tim".into());
        let failed = |name: &str| ExchangeStep::Failed(name.into());
        check(b"\0tim\0tanstaaftanstaaf", done());
        check(b"tim\0tim\0tanstaaftanstaaf", done());
        check(b"Ursel\0tim\0tanstaaftanstaaf", failed("tim"));
        check(b"\0tim\0tanstaaftanstaa", failed("tim"));
        check(b"\0tim\0tanstaaftanstaaf\n", failed("tim"));
        check(b"\0tom\0tanstaaftanstaaf", failed("tom"));
        check(b"\0\0tanstaaftanstaaf", failed(""));
        check(b"\0tim\0", failed("tim"));
        check(b"\0\0", failed(""));
        check(b"\0broken\0x", ExchangeStep::Unavailable);
        check(b"", ExchangeStep::Malformed);
        check(b"tim", ExchangeStep::Malformed);
        check(b"tim\0tanstaaftanstaaf", ExchangeStep::Malformed);
        check(b"\0tim\0tanstaaf\0tanstaaf", ExchangeStep::Malformed);
        check(b"\0tim\0\xff", ExchangeStep::Malformed);
    }

    /// Rules: SASL-01.
    #[test]
    fn long_and_non_ascii_strings_pass() {
        let secrets = One("grün", "Kennwort für grün".as_bytes());
        let response = "\0grün\0Kennwort für grün".as_bytes();
        assert_eq!(PlainServer.step(response, &secrets), ExchangeStep::Done("grün".into()));

        let long = [b"\0".as_slice(), &[b'n'; 255], b"\0", &[b'p'; 255]].concat();
        assert_eq!(PlainServer.step(&long, &TIM), ExchangeStep::Failed("n".repeat(255)));
    }

    #[test]
    fn the_client_sends_its_message_with_auth_or_after_an_empty_challenge() {
        let message = Some(b"\0tim\0tanstaaftanstaaf".to_vec());
        let mut client = PlainClient::new("tim", b"tanstaaftanstaaf");
        assert_eq!(client.initial(), message);
        assert_eq!(client.step(b""), message);
        assert_eq!(client.step(b""), None, "one response only");
    }
}
