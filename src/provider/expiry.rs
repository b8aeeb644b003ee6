//! Expires held mail, and warns its senders of the delay, without a call of the customer: `serve` makes a pass once a minute,
//! `odmr expire` makes one.
//!
//! The plan has the time at which each domain is due. A pass lists only due domains, so that a million messages cost
//! nothing while they wait; but it lists each domain at least once an hour, to find files of other agents. It lists
//! without a lock. Then it locks the queue for a few messages at a time, unless a session has the lock, and releases
//! the lock to a session that requests it. A domain whose disk hangs blocks one thread; `serve` starts another thread
//! for the other domains.

use std::collections::{HashMap, HashSet};
use std::io;
use std::time::{Duration, Instant};

use super::spool::{Spool, SpoolQueue};
use crate::clock::Timestamp;
use crate::config::{Account, Accounts};
use crate::mail::address::Domain;
use crate::maildir::Entry;
use crate::net::trace::quoted;
use crate::queue::{AgedMessages, LockError, QueueLock, QueueName};
use crate::report::Reporter;
use crate::report::calls::CallRecord;
use crate::report::held::{HeldExpiry, HeldOutcome};
use crate::threads::Guarded;

/// Messages of a domain that one pass handles before it goes on to the next domain.
const MESSAGES_IN_PASS: usize = if cfg!(test) { 100 } else { 2000 };

/// Messages that a pass handles before it releases the lock.
const MESSAGES_AT_ONCE: usize = 100;

/// A domain is listed at least this often.
const LOOK_INTERVAL: Duration = Duration::from_secs(60 * 60);

/// If a pass makes no progress in a domain for this time, the domain's disk hangs.
const STUCK_AFTER: Duration = Duration::from_secs(50);

/// After this many failures in a row the pass leaves the domain. After fewer it goes on: a few unreadable messages must
/// not delay the others.
const FAILURES_LIMIT: usize = 100;

/// How long a pass leaves a domain alone whose disk has failed.
const FAILURE_INTERVAL: Duration = Duration::from_secs(5 * 60);

/// How often a pass that waits for a session tries to lock its queue.
const LOCK_INTERVAL: Duration = Duration::from_millis(50);

/// When each domain is due. The passes of one process share the plan.
#[derive(Default)]
pub struct ExpiryPlan(Guarded<HashMap<Domain, DomainPlan>>);

struct DomainPlan {
    /// The times in the configuration for which the plan was made.
    times: [Option<Duration>; 2],
    /// When the domain was listed last.
    looked: Timestamp,
    /// When a message expires or is to be reported next; `None`: never.
    due: Option<Timestamp>,
    /// The domain is listed again at this time at the latest.
    look: Instant,
    /// If the last pass has not handled all messages: the last message that it has handled, and when a message before
    /// that is due.
    rest: Option<(Entry, Option<Timestamp>)>,
    /// A pass is in this domain, and made progress at this time.
    under_way: Option<Instant>,
}

/// One pass over the mail that is held for all customers.
pub struct ExpiryPass<'a> {
    pub accounts: &'a Accounts,
    pub spool: &'a Spool,
    pub reporter: &'a Reporter,
    /// Whether the pass must end after the message under way, because the process ends or the configuration was
    /// reloaded.
    pub is_over: &'a dyn Fn() -> bool,
    /// How long the pass waits for a session that has a queue.
    pub wait: Duration,
}

/// Why a pass has left messages that are due.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LeftFor {
    /// A session has the queue, or has requested it.
    Session,
    /// The limit of DSNs is reached for now.
    Dsns,
    /// The disk failed; the log has the error.
    Failure,
}

/// The result of a pass.
#[derive(Default)]
pub struct PassResult {
    /// The domains in which it has left messages that are due.
    pub left: Vec<(Domain, LeftFor)>,
    /// It has not handled all messages: the next pass goes on.
    pub more: bool,
}

impl LeftFor {
    /// The reason in words, for an administrator.
    pub fn text(self) -> &'static str {
        match self {
            LeftFor::Session => "a session has its mail",
            LeftFor::Dsns => "there are too many DSNs for now",
            LeftFor::Failure => "an operation failed, see the log",
        }
    }
}

impl ExpiryPlan {
    /// The domains that are due now, each with its account. Domains of a customer whose file is skipped are left out: its
    /// `expire-after` is unknown.
    fn due<'a>(&self, accounts: &'a Accounts, now: Timestamp) -> Vec<(&'a Account, &'a Domain)> {
        let (mut plans, instant) = (self.0.lock(), Instant::now());
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

    /// Begins a domain. `None`: another pass is in it.
    fn begin<'a>(&'a self, account: &Account, domain: &'a Domain, now: Timestamp) -> Option<DomainUnderWay<'a>> {
        let (mut plans, instant) = (self.0.lock(), Instant::now());
        let under_way = Some(instant);
        let look = instant + LOOK_INTERVAL;
        let before = plans.get(domain);
        if before.is_some_and(|before| before.under_way.is_some()) {
            return None;
        }
        let rest = before.and_then(|before| before.rest.clone());
        let plan = DomainPlan { times: times(account), looked: now, due: None, look, rest, under_way };
        plans.insert(domain.clone(), plan);
        Some(DomainUnderWay { plan: self, domain })
    }

    /// The number of domains in which a pass makes no progress.
    pub fn stuck(&self) -> usize {
        let is_stuck = |plan: &&DomainPlan| plan.under_way.is_some_and(|since| since.elapsed() >= STUCK_AFTER);
        self.0.lock().values().filter(is_stuck).count()
    }
}

fn times(account: &Account) -> [Option<Duration>; 2] {
    [account.held.expire_after, account.held.delay_warning]
}

/// Marks a domain as under way until it is dropped.
struct DomainUnderWay<'a> {
    plan: &'a ExpiryPlan,
    domain: &'a Domain,
}

impl DomainUnderWay<'_> {
    fn with_plan(&self, change: impl FnOnce(&mut DomainPlan)) {
        if let Some(plan) = self.plan.0.lock().get_mut(self.domain) {
            change(plan);
        }
    }

    /// The last message that the last pass has handled, and when a message before that is due.
    fn rest(&self) -> (Option<Entry>, Option<Timestamp>) {
        let plans = self.plan.0.lock();
        let rest = plans.get(self.domain).and_then(|plan| plan.rest.clone());
        rest.map_or((None, None), |(last, due)| (Some(last), due))
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

/// The result of a pass in one domain.
#[derive(Default)]
struct DomainResult {
    /// When a message is due next.
    next: Option<Timestamp>,
    /// The last message that was handled, if it was not the last of all.
    last: Option<Entry>,
    left: Option<LeftFor>,
}

impl DomainResult {
    fn add(&mut self, due: Option<Timestamp>) {
        self.next = self.next.into_iter().chain(due).min();
    }
}

impl ExpiryPass<'_> {
    /// Makes the pass.
    pub fn run(&self, plan: &ExpiryPlan) -> PassResult {
        self.reporter.watch().look();
        let mut result = PassResult::default();
        for (account, domain) in plan.due(self.accounts, self.reporter.now()) {
            if (self.is_over)() {
                break;
            }
            let now = self.reporter.now();
            let Some(under_way) = plan.begin(account, domain, now) else { continue };
            let mut found = DomainResult::default();
            let stopped = self.expire_domain(account, domain, &under_way, &mut found);
            let left = stopped.err().or(found.left);
            let more = found.last.is_some();
            under_way.with_plan(|plan| {
                plan.rest = found.last.map(|last| (last, found.next));
                match left {
                    Some(LeftFor::Failure) => plan.look = Instant::now() + FAILURE_INTERVAL,
                    Some(_) => plan.due = Some(now),
                    None => plan.due = if more { Some(now) } else { found.next },
                }
            });
            result.more |= more && left != Some(LeftFor::Failure) && stopped != Err(LeftFor::Session);
            result.left.extend(left.map(|reason| (domain.clone(), reason)));
        }
        result
    }

    /// Handles the messages of a domain that are due.
    fn expire_domain(
        &self, account: &Account, domain: &Domain, under_way: &DomainUnderWay<'_>, found: &mut DomainResult,
    ) -> Result<(), LeftFor> {
        let (name, now) = (self.spool.name(&SpoolQueue::Held(domain.clone())), self.reporter.now());
        let history = self.reporter.watch().history();
        let last_call = || CallRecord::last_call(&self.spool.call_record(&account.name), self.reporter.now());
        let (expire_after, delay_warning) = (account.held.expire_after, account.held.delay_warning);
        let mut held = HeldExpiry { expire_after, delay_warning, last_call: last_call() };
        let (after, waits) = under_way.rest();
        let due = |entry: &Entry, arrived| held.due(&history, entry, arrived);
        let listed = self.spool.queue().aged(&name, (MESSAGES_IN_PASS, after.as_ref()), &due);
        let AgedMessages { due, more, next } = listed.map_err(|error| failed(&name, &error))?;
        under_way.progress();
        // A message that arrives from now on is not due before `soonest`.
        let soonest = held.shortest().map(|age| history.when(now, age));
        [waits, next, soonest].into_iter().for_each(|due| found.add(due));
        let (mut due, mut failures, mut suppressed) = (due.into_iter().peekable(), 0, HashSet::new());
        while due.peek().is_some() {
            let mut lock = self.lock(&name)?;
            // Read again under the lock: the customer may have called since the listing.
            held.last_call = last_call();
            for entry in due.by_ref().take(MESSAGES_AT_ONCE) {
                if (self.is_over)() || lock.takeover_requested() {
                    return Err(LeftFor::Session);
                }
                found.last = Some(entry.clone());
                failures =
                    if self.expire(&name, entry, &held, &mut lock, &mut suppressed, found) { 0 } else { failures + 1 };
                if failures >= FAILURES_LIMIT {
                    return Err(LeftFor::Failure);
                }
                under_way.progress();
            }
        }
        found.last = found.last.take().filter(|_| more);
        Ok(())
    }

    /// Expires or reports one message. Returns `false` if the disk fails.
    fn expire(
        &self, name: &QueueName, entry: Entry, held: &HeldExpiry, lock: &mut QueueLock,
        suppressed: &mut HashSet<(bool, String)>, found: &mut DomainResult,
    ) -> bool {
        let outcome = match lock.open_message(name, entry) {
            Ok(None) => return true,
            Ok(Some(message)) => self.reporter.expire_held(message, held, suppressed, lock).ok(),
            Err(error) => {
                failed(name, &error);
                None
            }
        };
        match outcome {
            Some(HeldOutcome::Waits(due) | HeldOutcome::Warned(due)) => found.add(due),
            Some(HeldOutcome::Expired) => {}
            Some(HeldOutcome::TooManyDsns) => found.left = found.left.or(Some(LeftFor::Dsns)),
            None => found.left = Some(LeftFor::Failure),
        }
        outcome.is_some()
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
