//! What a login is checked against: verifiers that the customers' files have, those that are made of secrets in clear, and fakes
//! for names without an account.
//!
//! A client must not find out by the time of a reply which names have an account. So, if an account has a secret in clear, each
//! name takes the work of making a verifier: once, and then it is kept. Names without an account keep theirs in the same place.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use crate::config::Accounts;
use crate::sasl::{self, ITERATIONS, ScramVerifier, Unavailable, stable_salt};

/// Verifiers that are kept. More names than this, and all are made anew.
const KEPT_VERIFIERS: usize = 10_000;

/// PBKDF2 at the same time: as many sessions as would use the processors of a small machine.
const CONCURRENT_WORK: usize = 4;

/// How long a session waits until it may do it.
const WORK_WAIT: Duration = Duration::from_secs(30);

/// The verifiers of one configuration.
pub struct Verifiers {
    made: Mutex<HashMap<String, ScramVerifier>>,
    work: Arc<VerifierWork>,
}

impl Verifiers {
    /// None is made yet. `work` lasts over reloads.
    pub fn new(work: Arc<VerifierWork>) -> Verifiers {
        Verifiers { made: Mutex::default(), work }
    }

    /// The limit on PBKDF2, and the key of the salts.
    pub fn work(&self) -> &Arc<VerifierWork> {
        &self.work
    }

    /// As [`CredentialStore::verifier`](crate::sasl::CredentialStore::verifier). `key`: reads the key of the salts, once.
    ///
    /// # Errors
    /// The customer's file has a mistake, or too many sessions make verifiers.
    pub fn find(
        &self, accounts: &Accounts, name: &str, key: &dyn Fn() -> [u8; 32],
    ) -> Result<(ScramVerifier, bool), Unavailable> {
        let found = accounts.credentials(name)?.unwrap_or_default();
        let key = self.work.key.get_or_init(key);
        // An empty secret authenticates no client, even if the configuration has one.
        let secret = found.secret.filter(|secret| !secret.is_empty());
        let made = match accounts.have_secrets() {
            true => Some(self.make(name, secret.as_deref().unwrap_or(b"there is no such account"), key)?),
            false => None,
        };
        Ok(match (found.verifier, secret.and(made)) {
            (Some(stored), _) => (stored, true),
            (None, Some(made)) => (made, true),
            (None, None) => (ScramVerifier::fake(key, name), false),
        })
    }

    fn make(&self, name: &str, secret: &[u8], key: &[u8]) -> Result<ScramVerifier, Unavailable> {
        let lock = || self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(verifier) = lock().get(name) {
            return Ok(verifier.clone());
        }
        let _turn = self.work.begin(WORK_WAIT)?;
        let verifier = ScramVerifier::new(secret, &stable_salt(key, name), ITERATIONS);
        let mut made = lock();
        if made.len() >= KEPT_VERIFIERS {
            made.clear();
        }
        made.insert(name.to_owned(), verifier.clone());
        Ok(verifier)
    }
}

/// Limits how many sessions compute at once, and has the key of the salts.
#[derive(Default)]
pub struct VerifierWork {
    key: OnceLock<[u8; 32]>,
    running: Mutex<usize>,
    ended: Condvar,
}

/// One session that computes.
struct WorkPermit<'a>(&'a VerifierWork);

impl Drop for WorkPermit<'_> {
    fn drop(&mut self) {
        *self.0.running.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.ended.notify_one();
    }
}

impl VerifierWork {
    /// [`sasl::salted_password`], in four sessions at once.
    ///
    /// # Errors
    /// There was no place for too long.
    pub fn salted_password(&self, secret: &[u8], salt: &[u8], iterations: u32) -> Result<[u8; 32], Unavailable> {
        let _turn = self.begin(WORK_WAIT)?;
        Ok(sasl::salted_password(secret, salt, iterations))
    }

    fn begin(&self, limit: Duration) -> Result<WorkPermit<'_>, Unavailable> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let full = |running: &mut usize| *running >= CONCURRENT_WORK;
        let waited = self.ended.wait_timeout_while(running, limit, full);
        let (mut running, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            return Err(Unavailable);
        }
        *running += 1;
        Ok(WorkPermit(self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_compute_at_once_and_a_fifth_waits_but_not_for_ever() {
        let work = VerifierWork::default();
        let limit = Duration::from_millis(20);
        let mut running: Vec<_> = (0..CONCURRENT_WORK).map(|_| work.begin(limit).unwrap()).collect();
        assert!(work.begin(limit).is_err());
        running.pop();
        assert!(work.begin(limit).is_ok());
        std::thread::scope(|scope| {
            let _last = work.begin(limit).unwrap();
            let waiting = scope.spawn(|| work.begin(Duration::from_secs(60)).is_ok());
            running.pop();
            assert!(waiting.join().unwrap());
        });
    }
}
