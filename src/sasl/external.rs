//! EXTERNAL (RFC 4422 appendix A): the client has proved its identity in TLS, by a certificate. It sends the name of its
//! account, or nothing if only one account has the certificate.

use super::channel::CertificateDigests;
use super::exchange::{ClientExchange, CredentialStore, ExchangeStep, ServerExchange};

/// The server's side, with the certificate of the client.
pub(super) struct ExternalServer(pub(super) Option<CertificateDigests>);

impl ServerExchange for ExternalServer {
    fn first(&mut self) -> Option<Vec<u8>> {
        None
    }

    fn step(&mut self, response: &[u8], secrets: &dyn CredentialStore) -> ExchangeStep {
        // RFC 4422 appendix A.1: UTF-8 without NUL.
        let Some(wanted) = str::from_utf8(response).ok().filter(|wanted| !wanted.contains('\0')) else {
            return ExchangeStep::Malformed;
        };
        let failed = || ExchangeStep::Failed(wanted.to_owned());
        // RFC 4422 appendix A.2: without credentials from TLS the authentication fails.
        let Some(certificate) = &self.0 else { return failed() };
        match secrets.account_of(certificate, Some(wanted).filter(|wanted| !wanted.is_empty())) {
            Ok(account) => account.map_or_else(failed, ExchangeStep::Done),
            Err(_) => ExchangeStep::Unavailable,
        }
    }
}

/// The client's side, with the name of its account.
pub(super) struct ExternalClient {
    name: String,
    answered: bool,
}

impl ExternalClient {
    pub(super) fn new(name: &str) -> ExternalClient {
        ExternalClient { name: name.to_owned(), answered: false }
    }
}

impl ClientExchange for ExternalClient {
    /// The name is sent even if only one account has the certificate: if that is another account, the server rejects the
    /// client, which would otherwise get the mail of that account.
    fn initial(&mut self) -> Option<Vec<u8>> {
        Some(self.name.clone().into_bytes())
    }

    fn step(&mut self, _challenge: &[u8]) -> Option<Vec<u8>> {
        (!std::mem::replace(&mut self.answered, true)).then(|| self.name.clone().into_bytes())
    }

    /// The server proves its identity in TLS only, so its success is accepted at any time.
    fn finished(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sasl::{AccountCredentials, ScramVerifier, Unavailable};

    const MINE: CertificateDigests = CertificateDigests { certificate: [1; 32], key: [2; 32] };
    const SHARED: CertificateDigests = CertificateDigests { certificate: [3; 32], key: [4; 32] };
    const OTHER: CertificateDigests = CertificateDigests { certificate: [5; 32], key: [6; 32] };

    /// acme has `MINE`; acme and beta have `SHARED`.
    struct Accounts;

    impl CredentialStore for Accounts {
        fn credentials(&self, _: &str) -> Result<Option<AccountCredentials>, Unavailable> {
            Ok(None)
        }

        fn account_of(
            &self, certificate: &CertificateDigests, wanted: Option<&str>,
        ) -> Result<Option<String>, Unavailable> {
            Ok(match (*certificate, wanted) {
                (_, Some("broken")) => return Err(Unavailable),
                (MINE, None | Some("acme")) => Some("acme".to_owned()),
                (SHARED, Some(name @ ("acme" | "beta"))) => Some(name.to_owned()),
                _ => None,
            })
        }

        fn verifier(&self, name: &str) -> Result<(ScramVerifier, bool), Unavailable> {
            Ok((ScramVerifier::fake(b"key", name, &Default::default()), false))
        }

        fn challenge(&self) -> String {
            String::new()
        }

        fn nonce(&self) -> String {
            String::new()
        }
    }

    /// Rules: EXT-01, EXT-02.
    #[test]
    fn the_certificate_decides_on_the_account() {
        let check = |certificate, response: &[u8], expected: ExchangeStep| {
            let step = ExternalServer(certificate).step(response, &Accounts);
            assert_eq!(step, expected, "{certificate:?} {}", response.escape_ascii());
        };
        let done = |name: &str| ExchangeStep::Done(name.into());
        let failed = |name: &str| ExchangeStep::Failed(name.into());
        check(Some(MINE), b"", done("acme"));
        check(Some(MINE), b"acme", done("acme"));
        check(Some(MINE), b"beta", failed("beta"));
        check(Some(MINE), b"Acme", failed("Acme"));
        check(Some(SHARED), b"beta", done("beta"));
        check(Some(SHARED), b"", failed(""));
        check(Some(OTHER), b"", failed(""));
        check(Some(OTHER), b"acme", failed("acme"));
        check(None, b"", failed(""));
        check(None, b"acme", failed("acme"));
        check(Some(MINE), b"broken", ExchangeStep::Unavailable);
        for malformed in [&b"acme\0"[..], b"\0", b"\xff", b"acme\xc3"] {
            check(Some(MINE), malformed, ExchangeStep::Malformed);
        }
    }

    #[test]
    fn the_client_sends_its_account_with_auth_or_after_an_empty_challenge() {
        let mut client = ExternalClient::new("acme");
        assert_eq!((client.initial(), client.finished()), (Some(b"acme".to_vec()), true));
        assert_eq!(client.step(b""), Some(b"acme".to_vec()));
        assert_eq!(client.step(b""), None, "one response only");
    }
}
