//! The quotas of accounts: the maximum of mail that is held for each, in all its domains together.
//!
//! The quota is checked at RCPT, with the size that MAIL declares, and again by [`UsageLimit`] with the exact size when
//! the message is stored. Messages that the provider itself must store, such as DSNs, count for the quota and may
//! exceed it. `.refused` has other limits.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use crate::config::{Account, Accounts, OverQuota};
use crate::log_limit::{LoggedWarnings, may_log};
use crate::mail::address::Domain;
use crate::maildir::{LimitExceeded, Maildir, Usage, UsageLimit};
use crate::net::trace::quoted;
use crate::platform::boot_id;
use crate::session::storage_failure_reply;
use crate::smtp::reply::Reply;
use crate::threads::Guarded;

/// The quotas of all accounts that have one.
pub struct Quotas {
    limits: HashMap<String, Arc<UsageLimit>>,
    /// By account, and which of its limits is exceeded.
    logged: Guarded<LoggedWarnings<(String, &'static str)>>,
}

impl Quotas {
    /// The quotas that the accounts have. `root`: the spool; `directory` returns the queue of a domain.
    pub fn new(root: &Path, accounts: &Accounts, directory: impl Fn(&Domain) -> Maildir) -> Quotas {
        // Read it now: after the sandbox has begun, this process cannot read it.
        boot_id();
        let limited = accounts.iter().filter_map(|account| {
            let (octets, messages) = (account.held.max_bytes, account.held.max_messages);
            if octets.is_none() && messages.is_none() {
                return None;
            }
            let limit = Usage {
                octets: octets.unwrap_or(u64::MAX),
                messages: messages.map_or(u64::MAX, |messages| messages as u64),
            };
            let maildirs = account.domains.iter().map(&directory).collect();
            Some((account.name.clone(), Arc::new(UsageLimit::new(root, &account.name, maildirs, limit))))
        });
        Quotas { limits: limited.collect(), logged: Guarded::default() }
    }

    /// The quota of an account; `None`: it has none.
    pub fn of(&self, account: &str) -> Option<&Arc<UsageLimit>> {
        self.limits.get(account)
    }

    /// Makes the next message count all files again: a process with another configuration may have added files without
    /// counting them.
    pub fn recount(&self) {
        for limit in self.limits.values() {
            limit.recount_next().unwrap_or_else(|error| log::error!("event=spool-failed error={}", quoted(error)));
        }
    }

    /// Checks that the account's quota permits `more` mail.
    ///
    /// # Errors
    /// The reply to RCPT: 452 or 552, depending on `over-quota`; 451 or 452 if the disk fails.
    pub fn check(&self, account: &Account, more: Usage) -> Result<(), Reply> {
        let checked = self.of(&account.name).map_or(Ok(()), |limit| limit.check(more));
        checked.map_err(|error| self.reply(&error, Some(account)))
    }

    /// The reply to a message or recipient that cannot be stored. `account`: `None` if the message is for several accounts.
    pub fn reply(&self, error: &io::Error, account: Option<&Account>) -> Reply {
        let Some(exceeded) = LimitExceeded::of(error) else { return storage_failure_reply(error) };
        self.log(exceeded);
        let over_quota = account.map(|account| account.held.over_quota).unwrap_or_default();
        match over_quota {
            // RFC 1870 section 6.1, RFC 5321 section 4.2.3; RFC 3463 section 3.3.
            OverQuota::Defer => Reply::new(452, "4.2.2", "Enough mail is held for that domain, try again later"),
            OverQuota::Reject => Reply::new(552, "5.2.2", "Enough mail is held for that domain"),
        }
    }

    fn log(&self, exceeded: &LimitExceeded) {
        let LimitExceeded { name, unit, .. } = exceeded;
        let mut logged = self.logged.lock();
        if let Some(others) = may_log(&mut logged, &[(name.clone(), *unit)], usize::MAX, Instant::now()) {
            log::warn!("event=over-quota account={name} reason={unit} times={}", others + 1);
        }
    }
}
