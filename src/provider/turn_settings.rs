//! What all turned sessions that begin with one configuration share.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::spool::Spool;
use crate::config::Accounts;
use crate::mail::address::Domain;
use crate::net::cancel::CancelToken;
use crate::report::Reporter;
use crate::session::Timeouts;
use crate::smtp::client::Without8BitMime;

/// Times and limits of turned sessions, and how they are cancelled.
pub struct TurnSettings {
    pub timeouts: Timeouts,
    /// Messages in one session; 0: no limit.
    pub messages: usize,
    /// Messages that were deferred for so long since their first offer are given up.
    /// `None`: they are not.
    pub give_up: Option<Duration>,
    pub without_8bitmime: Without8BitMime,
    pub reporter: Reporter,
    /// Accounts whose sessions end after the messages under way, because their domains are no longer theirs.
    pub lost: Arc<LostDomains>,
    /// Has the records of calls.
    pub spool: Arc<Spool>,
    /// Ends sessions after the messages under way.
    pub cancel: CancelToken,
    /// Ends sessions at once.
    pub abort: CancelToken,
}

/// The domains that reloads have taken from each account: from one that is removed, all.
#[derive(Default)]
pub struct LostDomains(Mutex<HashMap<String, HashSet<Domain>>>);

impl LostDomains {
    /// Adds the domains that an account had before a reload and has no more; those that it has again are not lost.
    pub fn update(&self, before: &Accounts, after: &Accounts) {
        let mut lost = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for account in before.iter() {
            lost.entry(account.name.clone()).or_default().extend(account.domains.iter().cloned());
        }
        lost.retain(|name, domains| {
            domains.retain(|domain| after.owner(domain).is_none_or(|owner| owner.name != *name));
            !domains.is_empty()
        });
    }

    /// Whether the account has lost one of these domains.
    pub fn any<'a>(&self, account: &str, mut domains: impl Iterator<Item = &'a Domain>) -> bool {
        let lost = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lost.get(account).is_some_and(|lost| domains.any(|domain| lost.contains(domain)))
    }
}
