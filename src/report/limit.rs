//! Limits the DSNs that are sent. Otherwise untrusted clients could flood any domain with DSNs, by mail with forged
//! senders.
//!
//! At most [`DOMAIN_RATE`] DSNs a minute are sent to one domain, and [`TOTAL_RATE`] to all; those of one minute may be
//! sent at once. More DSNs of failure wait; those that would wait longer than [`LONGEST_WAIT`] are dropped, which is
//! logged. So that DSNs of failure are not late, DSNs of success are dropped when a quarter of a minute's number is
//! used up, and DSNs of a delay are deferred when half of it is. Under load that deviates from RFC 3461 section 5.2.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::dsn::Action;

use crate::threads::Guarded;

/// DSNs to one domain, a minute.
const DOMAIN_RATE: u32 = 120;

/// DSNs to all domains, a minute.
const TOTAL_RATE: u32 = 600;

/// How long a DSN of failure waits at most.
const LONGEST_WAIT: Duration = Duration::from_secs(60 * 60);

const MINUTE: Duration = Duration::from_secs(60);

/// When this many domains are counted, those without a backlog are removed, to bound the memory.
const DOMAINS_LIMIT: usize = 1000;

/// Counts the DSNs of one process.
#[derive(Default)]
pub(super) struct DsnLimiter(Guarded<Backlogs>);

/// When all DSNs so far would have been sent, if they were sent at the rate of the limit.
#[derive(Default)]
struct Backlogs {
    all: Option<Instant>,
    domains: HashMap<String, Instant>,
}

/// There are too many DSNs: this one is not sent.
#[derive(PartialEq, Eq, Debug)]
pub(super) struct TooMany;

impl DsnLimiter {
    /// Counts a DSN to a domain. Returns how long it must wait.
    pub(super) fn admit(&self, action: Action, domain: &str, now: Instant) -> Result<Duration, TooMany> {
        let mut backlogs = self.0.lock();
        let longest = match action {
            Action::Failed => MINUTE + LONGEST_WAIT,
            Action::Delayed => MINUTE / 2,
            Action::Delivered | Action::Relayed | Action::Expanded => MINUTE / 4,
        };
        let one_more = |end: Option<Instant>, limit: u32| end.map_or(now, |end| end.max(now)) + MINUTE / limit;
        let all = one_more(backlogs.all, TOTAL_RATE);
        let of_domain = one_more(backlogs.domains.get(domain).copied(), DOMAIN_RATE);
        let backlog = all.max(of_domain) - now;
        if backlog > longest {
            return Err(TooMany);
        }
        if backlogs.domains.len() >= DOMAINS_LIMIT {
            backlogs.domains.retain(|_, end| *end > now);
        }
        backlogs.all = Some(all);
        backlogs.domains.insert(domain.to_owned(), of_domain);
        Ok(backlog.saturating_sub(MINUTE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dsns_of_success_are_dropped_first_and_those_of_failure_wait() {
        let (limiter, now) = (DsnLimiter::default(), Instant::now());
        let admit = |action, domain: &str| limiter.admit(action, domain, now);
        let count = |action, domain| (0..).take_while(|_| admit(action, domain) == Ok(Duration::ZERO)).count();
        assert_eq!(count(Action::Relayed, "a.example"), 30);
        assert_eq!(admit(Action::Relayed, "a.example"), Err(TooMany));
        assert_eq!(count(Action::Delayed, "a.example"), 30);
        assert_eq!(admit(Action::Delayed, "a.example"), Err(TooMany));
        assert_eq!(count(Action::Failed, "a.example"), 60, "the next one waits");
        assert_eq!(admit(Action::Failed, "a.example"), Ok(Duration::from_secs(1)));
        // Another domain has its own limit, up to the limit for all.
        assert_eq!(admit(Action::Relayed, "b.example"), Ok(Duration::ZERO));
        let domains =
            (0..).take_while(|n| admit(Action::Failed, &format!("{n}.example")) == Ok(Duration::ZERO)).count();
        assert_eq!(domains, 600 - 123);
        assert_eq!(admit(Action::Relayed, "c.example"), Err(TooMany));
        // After two minutes DSNs of success are sent again.
        let later = now + 2 * MINUTE;
        assert_eq!(limiter.admit(Action::Relayed, "a.example", later), Ok(Duration::ZERO));
    }

    #[test]
    fn dsns_to_many_domains_are_limited_and_the_domains_forgotten() {
        let (limiter, now) = (DsnLimiter::default(), Instant::now());
        let admitted = (0..40_000).filter(|n| limiter.admit(Action::Failed, &format!("{n}.example"), now).is_ok());
        assert_eq!(admitted.count(), 61 * 600);
        assert!(limiter.admit(Action::Failed, "z.example", now + MINUTE).is_ok());
        let later = now + LONGEST_WAIT + 2 * MINUTE;
        assert!(limiter.admit(Action::Relayed, "z.example", later).is_ok());
        assert_eq!(limiter.0.lock().domains.len(), 1);
    }
}
