//! The settings of all turned sessions that begin under one configuration.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use super::spool::Spool;
use crate::config::{Accounts, HeldConfig};
use crate::mail::address::Domain;
use crate::net::cancel::CancelToken;
use crate::report::Reporter;
use crate::session::{Limits, Timeouts};
use crate::smtp::client::Without8BitMime;
use crate::threads::Guarded;

/// The times and limits of turned sessions, and the tokens that end them.
pub struct TurnSettings {
    pub timeouts: Timeouts,
    /// The limits of accounts that have none of their own.
    pub limits: TurnLimits,
    /// A message that is deferred expires at this age, counted from its first offer. `None`: it does not.
    pub give_up: Option<Duration>,
    pub without_8bitmime: Without8BitMime,
    pub reporter: Reporter,
    /// The domains that accounts have lost: sessions about them end after the messages under way.
    pub lost: Arc<LostDomains>,
    /// The spool, which has the records of calls.
    pub spool: Arc<Spool>,
    /// Ends sessions after the messages under way.
    pub cancel: CancelToken,
    /// Ends sessions at once.
    pub abort: CancelToken,
}

/// The limits of one turned session: messages, octets and time. A reload does not change the limits of a session under
/// way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TurnLimits {
    /// When this many messages are accepted or under way, no other is begun; 0: no limit.
    pub messages: usize,
    /// The same for the octets of their content; 0: no limit.
    pub octets: u64,
    /// How long a session may last, as [`Timeouts::turn`].
    pub time: Duration,
}

impl TurnLimits {
    /// The limits of accounts that have none of their own.
    pub fn new(limits: &Limits, timeouts: &Timeouts) -> TurnLimits {
        TurnLimits { messages: limits.messages_per_turn, octets: limits.octets_per_turn, time: timeouts.turn }
    }

    /// The limits of an account.
    pub fn of_account(self, held: &HeldConfig) -> TurnLimits {
        TurnLimits {
            messages: held.messages_per_turn.unwrap_or(self.messages),
            octets: held.octets_per_turn.unwrap_or(self.octets),
            time: held.turn.unwrap_or(self.time),
        }
    }

    /// Whether a session that has sent `messages` and `octets` begins no other message.
    pub fn are_reached(&self, messages: usize, octets: u64) -> bool {
        let reached = |count: u64, limit: u64| limit > 0 && count >= limit;
        reached(messages as u64, self.messages as u64) || reached(octets, self.octets)
    }
}

/// The domains that reloads have removed from each account; all its domains, if the account was removed.
#[derive(Default)]
pub struct LostDomains(Guarded<HashMap<String, HashSet<Domain>>>);

impl LostDomains {
    /// Adds the domains that each account had before a reload and no longer has, and removes those that it has again.
    pub fn update(&self, before: &Accounts, after: &Accounts) {
        let mut lost = self.0.lock();
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
        let lost = self.0.lock();
        lost.get(account).is_some_and(|lost| domains.any(|domain| lost.contains(domain)))
    }
}
