//! The two sides of an authentication, and the accounts that a server checks it against.

use super::channel::CertificateDigests;
use super::verifier::{ScramVerifier, salted_password};

/// The accounts of a server.
pub trait CredentialStore {
    /// What the account with this name is checked against; `None` if there is no such account.
    ///
    /// # Errors
    /// The accounts cannot be read now.
    fn credentials(&self, name: &str) -> Result<Option<AccountCredentials>, Unavailable>;

    /// The account that this certificate opens. `wanted`: the account that the client asks for, if it asks for one: then the
    /// result is that account, or `None`. Otherwise `None` means that the certificate opens no account, or several.
    ///
    /// # Errors
    /// The accounts cannot be read now.
    fn account_of(
        &self, _certificate: &CertificateDigests, _wanted: Option<&str>,
    ) -> Result<Option<String>, Unavailable> {
        Ok(None)
    }

    /// Whether this certificate opens an account, or may open one that cannot be read now.
    fn knows(&self, _certificate: &CertificateDigests) -> bool {
        false
    }

    /// The verifier of the account with this name, stored or made of its secret, and whether there is such an account. If
    /// there is none, or it has no secret: one that no secret has, always the same for a name, after the same work.
    ///
    /// # Errors
    /// The accounts cannot be read now, or too many verifiers are made at once.
    fn verifier(&self, name: &str) -> Result<(ScramVerifier, bool), Unavailable>;

    /// [`salted_password`], which takes some time: a store limits how many sessions do it at once.
    ///
    /// # Errors
    /// Too many sessions do it.
    fn salted_password(&self, secret: &[u8], verifier: &ScramVerifier) -> Result<[u8; 32], Unavailable> {
        Ok(salted_password(secret, &verifier.salt, verifier.iterations))
    }

    /// A challenge that was never used before (RFC 2195 section 2).
    fn challenge(&self) -> String;

    /// A random text for SCRAM that was never used before, in letters and digits (RFC 5802 section 5.1).
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

/// What a server knows of one account.
#[derive(Clone, Default)]
pub struct AccountCredentials {
    /// The secret in clear; `None`: no mechanism that needs it opens the account.
    pub secret: Option<Vec<u8>>,
    /// What is stored in place of the secret.
    pub verifier: Option<ScramVerifier>,
}

/// The accounts cannot be read now; the client may try later.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unavailable;

/// One authentication, on the server's side.
pub trait ServerExchange: Send {
    /// The first challenge; `None` for a client-first mechanism: then, if AUTH had no initial response, the server sends an
    /// empty challenge (RFC 4954 section 4).
    fn first(&mut self) -> Option<Vec<u8>>;

    /// Processes a response, base64 already decoded.
    fn step(&mut self, response: &[u8], secrets: &dyn CredentialStore) -> ExchangeStep;
}

/// The result of one response.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ExchangeStep {
    /// Send this challenge and wait for the next response.
    Challenge(Vec<u8>),
    /// The client is authenticated as this account.
    Done(String),
    /// The client is not authenticated as the account of this name: unknown name, wrong secret, or it asked to act for
    /// another account.
    Failed(String),
    /// The response is not in the form of the mechanism; no secret was compared.
    Malformed,
    /// The secret cannot be looked up at the moment.
    Unavailable,
}

/// One authentication, on the client's side.
pub trait ClientExchange: Send {
    /// The initial response, for the AUTH command. If the line would be too long (RFC 4954 section 4) the caller drops it:
    /// `step` returns it again for the empty challenge.
    fn initial(&mut self) -> Option<Vec<u8>>;

    /// The response to a challenge; `None`: the challenge is not acceptable, cancel the exchange.
    fn step(&mut self, challenge: &[u8]) -> Option<Vec<u8>>;

    /// Whether a success from the server is acceptable now. A server that reports success too early has not verified
    /// anything.
    fn finished(&self) -> bool;

    /// Why the last challenge was not acceptable, as the end of a sentence that begins with the server.
    fn problem(&self) -> Option<&str> {
        None
    }
}

/// Used instead of the secret of an unknown name, so that the work is the same. It authenticates no client.
pub(super) const DUMMY_SECRET: &[u8] = b"there is no such account";

/// Calls `check` with the secret of `name`. If there is none it calls `check` with another secret, and fails.
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
