//! The SCRAM verifiers that logins are checked against: those in the customers' files, those that are made of secrets in
//! clear, and fakes for names without an account.
//!
//! A client must not find out which names have an account. So, if any account has a secret in clear, the provider makes a
//! verifier for each name and each attempt: if it stored them, a quick reply would show that the customer has logged in
//! before. A fake has the same number of iterations and length of salt as the verifier of some account.

use std::collections::BTreeSet;
use std::sync::{Condvar, OnceLock, PoisonError};
use std::time::Duration;

use crate::config::Accounts;
use crate::sasl::{self, ITERATIONS, SALT_OCTETS, ScramVerifier, Unavailable, stable_salt};
use crate::threads::Guarded;

/// How many sessions may compute PBKDF2 at the same time: more would only slow each other down on a small machine.
const CONCURRENT_WORK: usize = 4;

/// How long a session waits until it may compute.
const WORK_WAIT: Duration = Duration::from_secs(30);

/// Finds and makes verifiers, and limits how many sessions compute at once. It outlives reloads.
#[derive(Default)]
pub struct Verifiers {
    key: OnceLock<[u8; 32]>,
    running: Guarded<usize>,
    ended: Condvar,
}

/// One session that computes.
struct WorkPermit<'a>(&'a Verifiers);

impl Drop for WorkPermit<'_> {
    fn drop(&mut self) {
        *self.0.running.lock() -= 1;
        self.0.ended.notify_one();
    }
}

impl Verifiers {
    /// See [`CredentialStore::verifier`](crate::sasl::CredentialStore::verifier).
    ///
    /// # Errors
    /// The customer's file has a mistake, the key was not set, or too many sessions compute for too long.
    pub fn find(&self, accounts: &Accounts, name: &str) -> Result<(ScramVerifier, bool), Unavailable> {
        let found = accounts.credentials(name)?.unwrap_or_default();
        let key = self.key()?;
        // An empty secret authenticates no client, even if the configuration has one.
        let secret = found.secret.filter(|secret| !secret.is_empty());
        let made = match accounts.have_secrets() {
            true => {
                let secret = secret.as_deref().unwrap_or(b"there is no such account");
                let salt = stable_salt(key, name);
                let salted = self.salted_password(secret, &salt, ITERATIONS)?;
                Some(ScramVerifier::of_salted(&salted, &salt, ITERATIONS))
            }
            false => None,
        };
        let fake = ScramVerifier::fake(key, name, &shapes(accounts));
        Ok(match (found.verifier, secret.and(made)) {
            (Some(stored), _) => (stored, true),
            (None, Some(made)) => (made, true),
            (None, None) => (fake, false),
        })
    }

    /// Sets the key. Call it before the first session: a session that read it would wait for the disk.
    pub fn set_key(&self, key: [u8; 32]) {
        let _ = self.key.set(key);
    }

    /// The key of the salts, and of digests of names.
    ///
    /// # Errors
    /// It was not set.
    pub fn key(&self) -> Result<&[u8; 32], Unavailable> {
        self.key.get().ok_or(Unavailable)
    }

    /// [`sasl::salted_password`], in at most four sessions at once.
    ///
    /// # Errors
    /// Other sessions computed for more than 30 seconds.
    pub fn salted_password(&self, secret: &[u8], salt: &[u8], iterations: u32) -> Result<[u8; 32], Unavailable> {
        let _turn = self.begin(WORK_WAIT)?;
        Ok(sasl::salted_password(secret, salt, iterations))
    }

    fn begin(&self, limit: Duration) -> Result<WorkPermit<'_>, Unavailable> {
        let running = self.running.lock();
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

/// The iterations and the octets of salt that the verifiers of all accounts have.
fn shapes(accounts: &Accounts) -> BTreeSet<(u32, usize)> {
    let stored = accounts.iter().filter_map(|account| account.verifier.as_ref());
    let mut shapes: BTreeSet<_> = stored.map(|verifier| (verifier.iterations, verifier.salt.len())).collect();
    if accounts.have_secrets() {
        shapes.insert((ITERATIONS, SALT_OCTETS));
    }
    shapes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_sessions_compute_at_once_and_a_fifth_waits_within_a_limit() {
        let work = Verifiers::default();
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
