//! The two sides of an authentication, and the accounts of the server.

use super::channel::CertificateDigests;
use super::verifier::{ScramVerifier, salted_password};

/// The accounts of a server.
pub trait CredentialStore {
    /// The credentials of the account with this name; `None`: there is no such account.
    ///
    /// # Errors
    /// The accounts cannot be read now.
    fn credentials(&self, name: &str) -> Result<Option<AccountCredentials>, Unavailable>;

    /// The account of this certificate. `wanted`: the account that the client asks for; then the result is that account, or
    /// `None`. If the client asks for none, `None` means that no account or several have the certificate.
    ///
    /// # Errors
    /// The accounts cannot be read now.
    fn account_of(
        &self, _certificate: &CertificateDigests, _wanted: Option<&str>,
    ) -> Result<Option<String>, Unavailable> {
        Ok(None)
    }

    /// Whether an account has this certificate, or one that cannot be read now may have it.
    fn knows(&self, _certificate: &CertificateDigests) -> bool {
        false
    }

    /// The verifier of the account with this name, stored or made of its secret, and `true`. If there is no such account, or it
    /// has no secret: a fake verifier, always the same for a name and after the same work, and `false`.
    ///
    /// # Errors
    /// The accounts cannot be read now, or too many verifiers are made at once.
    fn verifier(&self, name: &str) -> Result<(ScramVerifier, bool), Unavailable>;

    /// Computes [`salted_password`]. It needs about 10 ms, so a store limits how many sessions compute at the same
    /// time.
    ///
    /// # Errors
    /// Too many sessions are computing one.
    fn salted_password(&self, secret: &[u8], verifier: &ScramVerifier) -> Result<[u8; 32], Unavailable> {
        Ok(salted_password(secret, &verifier.salt, verifier.iterations))
    }

    /// A challenge that was never used before (RFC 2195 section 2).
    fn challenge(&self) -> String;

    /// A random text in ASCII letters and digits that was never used before, for SCRAM (RFC 5802 section 5.1).
    fn nonce(&self) -> String;
}

/// The accounts of a server that offers no AUTH.
pub struct NoCredentials;

impl CredentialStore for NoCredentials {
    fn credentials(&self, _: &str) -> Result<Option<AccountCredentials>, Unavailable> {
        Ok(None)
    }

    fn verifier(&self, name: &str) -> Result<(ScramVerifier, bool), Unavailable> {
        Ok((ScramVerifier::fake(b"", name, &Default::default()), false))
    }

    fn challenge(&self) -> String {
        String::new()
    }

    fn nonce(&self) -> String {
        String::new()
    }
}

/// The credentials of one account, at the server.
#[derive(Clone, Default)]
pub struct AccountCredentials {
    /// The secret in clear; `None`: the account has no mechanism that needs it.
    pub secret: Option<Vec<u8>>,
    /// The verifier that is stored in place of the secret.
    pub verifier: Option<ScramVerifier>,
}

/// The accounts cannot be read now; another attempt may succeed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unavailable;

/// One authentication, on the server's side.
pub trait ServerExchange: Send {
    /// The first challenge; `None` for a client-first mechanism, for which the server sends an empty challenge if AUTH had no
    /// initial response (RFC 4954 section 4).
    fn first(&mut self) -> Option<Vec<u8>>;

    /// Processes a response, decoded from base64.
    fn step(&mut self, response: &[u8], secrets: &dyn CredentialStore) -> ExchangeStep;
}

/// The result of one response.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ExchangeStep {
    /// Send this challenge and wait for the next response.
    Challenge(Vec<u8>),
    /// The client is authenticated as this account.
    Done(String),
    /// The client is not authenticated as the account of this name: the name is unknown, the secret is wrong, or the client
    /// has asked to act for another account.
    Failed(String),
    /// The response is not in the form of the mechanism; no secret was compared.
    Malformed,
    /// The account cannot be looked up now.
    Unavailable,
}

/// One authentication, on the client's side.
pub trait ClientExchange: Send {
    /// The initial response, for the AUTH command; `None`: the server sends first. If the line would be too long (RFC 4954
    /// section 4), the caller makes a new exchange, whose `step` returns the response for the empty challenge.
    fn initial(&mut self) -> Option<Vec<u8>>;

    /// The response to a challenge; `None`: the challenge is not acceptable, and the exchange must be cancelled.
    fn step(&mut self, challenge: &[u8]) -> Option<Vec<u8>>;

    /// Whether a success from the server is acceptable now. If a server reports success before that, it has not
    /// verified the client.
    fn finished(&self) -> bool;

    /// Why the last challenge was not acceptable, as the predicate of a sentence about the server.
    fn problem(&self) -> Option<&str> {
        None
    }
}

/// The secret that is compared for an unknown name, so that the work is the same. It authenticates no client.
pub(super) const DUMMY_SECRET: &[u8] = b"there is no such account";

/// Calls `check` with the secret of `name`. If there is none, it calls `check` with another secret, and fails.
pub(super) fn verify(name: &str, secrets: &dyn CredentialStore, check: impl FnOnce(&[u8]) -> bool) -> ExchangeStep {
    let Ok(credentials) = secrets.credentials(name) else {
        return ExchangeStep::Unavailable;
    };
    let secret = credentials.and_then(|credentials| credentials.secret);
    let right = check(secret.as_deref().unwrap_or(DUMMY_SECRET));
    // An empty secret authenticates no client, even if the configuration has one.
    let known = secret.is_some_and(|secret| !secret.is_empty());
    if right & known { ExchangeStep::Done(name.to_owned()) } else { ExchangeStep::Failed(name.to_owned()) }
}
