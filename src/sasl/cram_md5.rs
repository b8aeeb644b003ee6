//! CRAM-MD5 (RFC 2195): the server sends a challenge, the client responds with its name and an HMAC-MD5 of it.
//!
//! The client does not send the secret, but the server must store it in clear, and an eavesdropper can guess secrets offline.
//! So the secret should be long and random, and the connection should use TLS.

use data_encoding::HEXLOWER;
use hmac::{Hmac, KeyInit, Mac};
use md5::Md5;

use super::exchange::{ClientExchange, CredentialStore, ExchangeStep, ServerExchange, verify};
use super::verifier::same;

/// The server's side, with the challenge that it sends.
pub(super) struct CramMd5Server(pub(super) String);

impl ServerExchange for CramMd5Server {
    fn first(&mut self) -> Option<Vec<u8>> {
        Some(self.0.clone().into_bytes())
    }

    fn step(&mut self, response: &[u8], secrets: &dyn CredentialStore) -> ExchangeStep {
        let Some((name, digest)) = parse(response) else {
            return ExchangeStep::Malformed;
        };
        verify(name, secrets, |secret| same(&hmac_md5(secret, self.0.as_bytes()), &digest))
    }
}

/// The client's side.
pub(super) struct CramMd5Client {
    name: String,
    secret: Vec<u8>,
    answered: bool,
}

impl CramMd5Client {
    pub(super) fn new(name: &str, secret: &[u8]) -> CramMd5Client {
        CramMd5Client { name: name.to_owned(), secret: secret.to_owned(), answered: false }
    }
}

impl ClientExchange for CramMd5Client {
    /// `None`: the server sends first, and RFC 4954 section 4 forbids an initial response.
    fn initial(&mut self) -> Option<Vec<u8>> {
        None
    }

    /// The challenge may be any octets: that in RFC 2645 section 6 has no `<>` and ends in LF.
    fn step(&mut self, challenge: &[u8]) -> Option<Vec<u8>> {
        if std::mem::replace(&mut self.answered, true) {
            return None;
        }
        let digest = HEXLOWER.encode(&hmac_md5(&self.secret, challenge));
        Some(format!("{} {digest}", self.name).into_bytes())
    }

    fn finished(&self) -> bool {
        self.answered
    }
}

/// Parses `name SP digest`, the digest in lower-case hexadecimal (RFC 2195 section 2). A name may contain spaces, so the last
/// space separates. A line end after the digest is dropped: the example in RFC 2645 section 6 has one.
fn parse(response: &[u8]) -> Option<(&str, [u8; 16])> {
    let response = response.strip_suffix(b"\n").unwrap_or(response);
    let response = response.strip_suffix(b"\r").unwrap_or(response);
    let (name, digest) = std::str::from_utf8(response).ok()?.rsplit_once(' ')?;
    let digest = HEXLOWER.decode(digest.as_bytes()).ok()?;
    if name.is_empty() {
        return None;
    }
    Some((name, digest.try_into().ok()?))
}

fn hmac_md5(secret: &[u8], challenge: &[u8]) -> [u8; 16] {
    let mut hmac = Hmac::<Md5>::new_from_slice(secret).expect("RFC 2104: a key may have any length");
    hmac.update(challenge);
    hmac.finalize().into_bytes().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sasl::tests::One;

    const CHALLENGE: &str = "<1896.697170952@postoffice.reston.mci.net>";
    const TIM: One = One("tim", b"tanstaaftanstaaf");
    const RESPONSE: &[u8] = b"tim b913a602c7eda7a495b4e6e7334d3890";

    fn serve(response: &[u8], secrets: &One) -> ExchangeStep {
        CramMd5Server(CHALLENGE.into()).step(response, secrets)
    }

    /// Rules: CRAM-02.
    #[test]
    fn the_example_of_rfc_2195_passes_on_both_sides() {
        let mut client = CramMd5Client::new("tim", b"tanstaaftanstaaf");
        assert_eq!(client.initial(), None);
        assert!(!client.finished(), "a success before the challenge does not count");
        let response = client.step(CHALLENGE.as_bytes());
        assert_eq!(response.as_deref(), Some(RESPONSE));
        assert!(client.finished());
        assert_eq!(client.step(CHALLENGE.as_bytes()), None, "one round, no more");
        assert_eq!(serve(RESPONSE, &TIM), ExchangeStep::Done("tim".into()));
    }

    #[test]
    fn a_response_is_accepted_rejected_or_malformed() {
        let check = |response: &[u8], expected: ExchangeStep| {
            let shown = response.escape_ascii();
            assert_eq!(serve(response, &TIM), expected, "{shown}");
        };
        let done = || ExchangeStep::Done("tim".into());
        let failed = |name: &str| ExchangeStep::Failed(name.into());
        check(b"tim b913a602c7eda7a495b4e6e7334d3890\n", done());
        check(b"tim b913a602c7eda7a495b4e6e7334d3890\r\n", done());
        check(b"tim b913a602c7eda7a495b4e6e7334d3891", failed("tim"));
        check(b"tom b913a602c7eda7a495b4e6e7334d3890", failed("tom"));
        check(b"Tim b913a602c7eda7a495b4e6e7334d3890", failed("Tim"));
        check(b"tim  b913a602c7eda7a495b4e6e7334d3890", failed("tim "));
        check(b"broken b913a602c7eda7a495b4e6e7334d3890", ExchangeStep::Unavailable);
        for malformed in [
            &b""[..],
            b" ",
            b"tim",
            b"tim ",
            b" b913a602c7eda7a495b4e6e7334d3890",
            b"tim b913a602c7eda7a495b4e6e7334d389",
            b"tim b913a602c7eda7a495b4e6e7334d389000",
            b"tim B913A602C7EDA7A495B4E6E7334D3890",
            b"tim b913a602c7eda7a495b4e6e7334d389x",
            b"\xff b913a602c7eda7a495b4e6e7334d3890",
            b"tim b913a602c7eda7a495b4e6e7334d3890 ",
        ] {
            check(malformed, ExchangeStep::Malformed);
        }
    }

    #[test]
    fn a_name_may_contain_spaces() {
        let secrets = One("tim the boy", b"tanstaaftanstaaf");
        let response = b"tim the boy b913a602c7eda7a495b4e6e7334d3890";
        assert_eq!(serve(response, &secrets), ExchangeStep::Done("tim the boy".into()));
    }

    /// RFC 2202 section 2: keys shorter than a block, and longer ones, which are hashed first.
    /// Rules: CRAM-03.
    #[test]
    fn keys_of_every_length_pass_the_vectors_of_rfc_2202() {
        let check = |key: &[u8], data: &[u8], digest: &str| {
            assert_eq!(HEXLOWER.encode(&hmac_md5(key, data)), digest);
        };
        check(&[0x0b; 16], b"Hi There", "9294727a3638bb1c13f48ef8158bfc9d");
        check(b"Jefe", b"what do ya want for nothing?", "750c783e6ab0b503eaa86e310a5db738");
        check(
            &[0xaa; 80],
            b"Test Using Larger Than Block-Size Key - Hash Key First",
            "6b1ab7fe4bd7bf8f0b62e6ce61b9d0cd",
        );
    }

    /// The challenge of RFC 2645 section 6; its digest there is that of RFC 2195, and wrong.
    /// Rules: CRAM-04.
    #[test]
    fn every_octet_of_a_challenge_counts() {
        let mut with = CramMd5Client::new("foobar.net", b"tanstaaftanstaaf");
        let mut without = CramMd5Client::new("foobar.net", b"tanstaaftanstaaf");
        let with = with.step(b"1896.697170952@ISP.COM\n").unwrap();
        let without = without.step(b"1896.697170952@ISP.COM").unwrap();
        assert_ne!(with, without, "the LF is part of it");
        for response in [&with, &without] {
            assert!(response.starts_with(b"foobar.net "));
            assert!(!response.ends_with(b"b913a602c7eda7a495b4e6e7334d3890"));
        }
    }
}
