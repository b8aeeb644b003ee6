//! Held mail expires, and its senders are warned of the delay, without a call of the customer: `serve` makes a pass once a minute,
//! `odmr expire` makes one.
//!
//! A pass lists only the domains for which something may be due, so that a million messages cost nothing while they wait: the
//! plan has the time for each domain. Files of other agents are seen within an hour. Names are read without a lock. Then the
//! pass locks the queue, if no session has it, for a few messages at a time, and gives the lock at once to a session that comes
//! meanwhile. A domain whose disk hangs keeps one thread; `serve` starts another for the others.

use std::collections::HashMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::spool::{Spool, SpoolQueue};
use crate::clock::Timestamp;
use crate::config::{Account, Accounts};
use crate::mail::address::Domain;
use crate::maildir::Entry;
use crate::net::cancel::CancelToken;
use crate::net::trace::quoted;
use crate::queue::{AgedMessages, LockError, QueueLock, QueueName};
use crate::report::Reporter;
use crate::report::calls::CallRecord;
use crate::report::held::{HeldExpiry, HeldOutcome};

/// Messages of a domain that one pass looks at; then the other domains come.
const MESSAGES_IN_PASS: usize = 2000;

/// Messages that are handled before the lock is released.
const MESSAGES_AT_ONCE: usize = 100;

/// A domain is listed so often at least.
const LOOK_INTERVAL: Duration = Duration::from_secs(60 * 60);

/// A domain in which a pass makes no progress for this time has a disk that hangs.
const STUCK_AFTER: Duration = Duration::from_secs(50);

/// When a domain is looked at again whose disk has failed.
const FAILURE_INTERVAL: Duration = Duration::from_secs(5 * 60);

/// How often a lock is tried that a session has, if it is waited for.
const LOCK_INTERVAL: Duration = Duration::from_millis(50);

/// When which domain is looked at again; the passes of one process share it.
#[derive(Default)]
pub struct ExpiryPlan(Mutex<HashMap<Domain, DomainPlan>>);

struct DomainPlan {
    /// The times of the configuration that the plan was made by.
    times: [Option<Duration>; 2],
    /// When the domain was listed.
    looked: Timestamp,
    /// When something is due.
    due: Option<Timestamp>,
    /// When the domain is listed at the latest.
    look: Instant,
    /// A pass is in this domain, and has made progress then.
    under_way: Option<Instant>,
}

/// One pass over the mail that is held for all customers.
pub struct ExpiryPass<'a> {
    pub accounts: &'a Accounts,
    pub spool: &'a Spool,
    pub reporter: &'a Reporter,
    /// Ends the pass after the message under way.
    pub cancel: &'a CancelToken,
    /// How long a session that has a queue is waited for.
    pub wait: Duration,
}

/// Why a pass has left messages for which something is due.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LeftFor {
    /// A session has the queue, or wants it.
    Session,
    /// There are too many DSNs for now.
    Dsns,
    /// The disk fails, which is logged.
    Failure,
}

/// What a pass has done.
#[derive(Default)]
pub struct PassResult {
    /// The domains in which it has left messages for which something is due.
    pub left: Vec<(Domain, LeftFor)>,
    /// In others it has to look again at once: it has not looked at all of their messages.
    pub again: bool,
}

impl LeftFor {
    /// For an administrator.
    pub fn text(self) -> &'static str {
        match self {
            LeftFor::Session => "a session has its mail",
            LeftFor::Dsns => "there are too many DSNs for now",
            LeftFor::Failure => "it failed",
        }
    }
}

impl ExpiryPlan {
    fn lock(&self) -> MutexGuard<'_, HashMap<Domain, DomainPlan>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The domains to look at now, each with its account. Those of a customer whose file has a mistake are left out: nobody knows
    /// what it wants.
    fn due<'a>(&self, accounts: &'a Accounts, now: Timestamp) -> Vec<(&'a Account, &'a Domain)> {
        let (mut plans, instant) = (self.lock(), Instant::now());
        plans.retain(|domain, plan| plan.under_way.is_some() || accounts.owner(domain).is_some());
        let is_due = |account: &Account, domain: &Domain| {
            plans.get(domain).is_none_or(|plan| {
                let is_new = plan.times != times(account) || now < plan.looked || instant >= plan.look;
                plan.under_way.is_none() && (is_new || plan.due.is_some_and(|due| due <= now))
            })
        };
        let wanted = |account: &&Account| times(account) != [None, None] && !accounts.is_skipped(&account.name);
        let domains =
            accounts.iter().filter(wanted).flat_map(|account| account.domains.iter().map(move |d| (account, d)));
        domains.filter(|(account, domain)| is_due(account, domain)).collect()
    }

    /// Begins with a domain. `None`: another pass is in it.
    fn begin<'a>(&'a self, account: &Account, domain: &'a Domain, now: Timestamp) -> Option<DomainUnderWay<'a>> {
        let (mut plans, instant) = (self.lock(), Instant::now());
        let under_way = Some(instant);
        let look = instant + LOOK_INTERVAL;
        let plan = DomainPlan { times: times(account), looked: now, due: None, look, under_way };
        match plans.insert(domain.clone(), plan) {
            Some(before) if before.under_way.is_some() => {
                plans.insert(domain.clone(), before);
                None
            }
            _ => Some(DomainUnderWay { plan: self, domain }),
        }
    }

    /// In how many domains a pass makes no progress.
    pub fn stuck(&self) -> usize {
        let is_stuck = |plan: &&DomainPlan| plan.under_way.is_some_and(|since| since.elapsed() >= STUCK_AFTER);
        self.lock().values().filter(is_stuck).count()
    }
}

fn times(account: &Account) -> [Option<Duration>; 2] {
    [account.held.expire_after, account.held.delay_warning]
}

/// A pass is in this domain, until this is dropped.
struct DomainUnderWay<'a> {
    plan: &'a ExpiryPlan,
    domain: &'a Domain,
}

impl DomainUnderWay<'_> {
    fn with_plan(&self, change: impl FnOnce(&mut DomainPlan)) {
        if let Some(plan) = self.plan.lock().get_mut(self.domain) {
            change(plan);
        }
    }

    fn progress(&self) {
        self.with_plan(|plan| plan.under_way = Some(Instant::now()));
    }
}

impl Drop for DomainUnderWay<'_> {
    fn drop(&mut self) {
        self.with_plan(|plan| plan.under_way = None);
    }
}

impl ExpiryPass<'_> {
    /// Makes the pass.
    pub fn run(&self, plan: &ExpiryPlan) -> PassResult {
        self.reporter.watch().look();
        let mut result = PassResult::default();
        for (account, domain) in plan.due(self.accounts, self.reporter.now()) {
            if self.cancel.is_cancelled() {
                break;
            }
            let now = self.reporter.now();
            let Some(under_way) = plan.begin(account, domain, now) else { continue };
            let held = HeldExpiry {
                expire_after: account.held.expire_after,
                delay_warning: account.held.delay_warning,
                last_call: CallRecord::last_call(&self.spool.call_record(&account.name), now),
            };
            let name = self.spool.name(&SpoolQueue::Held(domain.clone()));
            match self.expire_domain(&name, &held, &under_way) {
                Ok((next, again)) => {
                    // What arrives from now on.
                    let soonest = held.shortest().map(|age| self.reporter.watch().history().when(now, age));
                    let again_now = again.then_some(now);
                    under_way.with_plan(|plan| plan.due = next.into_iter().chain(soonest).chain(again_now).min());
                    result.again |= again;
                }
                Err(reason) => {
                    under_way.with_plan(|plan| match reason {
                        LeftFor::Failure => plan.look = Instant::now() + FAILURE_INTERVAL,
                        LeftFor::Session | LeftFor::Dsns => plan.due = Some(now),
                    });
                    result.left.push((domain.clone(), reason));
                }
            }
        }
        result
    }

    /// Does what is due in a domain. Returns when something is due next, and whether the domain must be looked at again now.
    fn expire_domain(
        &self, name: &QueueName, held: &HeldExpiry, under_way: &DomainUnderWay<'_>,
    ) -> Result<(Option<Timestamp>, bool), LeftFor> {
        let history = self.reporter.watch().history();
        let due = |entry: &Entry, arrived| held.due(&history, entry, arrived);
        let found = self.spool.queue().aged(name, MESSAGES_IN_PASS, &due);
        let AgedMessages { due, more, mut next } = found.map_err(|error| failed(name, &error))?;
        under_way.progress();
        let (mut due, mut again, mut failure) = (due.into_iter().peekable(), more, None);
        while due.peek().is_some() {
            let mut lock = self.lock(name)?;
            for entry in due.by_ref().take(MESSAGES_AT_ONCE) {
                if self.cancel.is_cancelled() || lock.takeover_requested() {
                    return Err(LeftFor::Session);
                }
                let message = match lock.open_message(name, entry) {
                    Ok(None) => continue,
                    Ok(Some(message)) => message,
                    Err(error) => {
                        failure = Some(failed(name, &error));
                        continue;
                    }
                };
                match self.reporter.expire_held(message, held, &mut lock) {
                    Ok(HeldOutcome::Waits(due)) => next = next.into_iter().chain(due).min(),
                    Ok(HeldOutcome::Expired | HeldOutcome::Warned) => again = true,
                    Ok(HeldOutcome::TooManyDsns) => return Err(LeftFor::Dsns),
                    Err(_) => return Err(LeftFor::Failure),
                }
                under_way.progress();
            }
        }
        failure.map_or(Ok((next, again)), Err)
    }

    fn lock(&self, name: &QueueName) -> Result<QueueLock, LeftFor> {
        let late = Instant::now() + self.wait;
        loop {
            match self.spool.queue().lock_yielding(name) {
                Ok(lock) => return Ok(lock),
                Err(LockError::Failed(error)) => return Err(failed(name, &error)),
                Err(LockError::Busy(_)) if Instant::now() >= late => return Err(LeftFor::Session),
                Err(LockError::Busy(_)) => std::thread::sleep(LOCK_INTERVAL),
            }
        }
    }
}

fn failed(name: &QueueName, error: &io::Error) -> LeftFor {
    log::error!("event=spool-failed queue={name} error={}", quoted(error));
    LeftFor::Failure
}

#[cfg(test)]
mod tests;
