//! Which destination of outgoing mail is due when.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, SystemTime};

use super::worker::NextDue;
use crate::mail::address::Domain;
use crate::net::trace::quoted;
use crate::provider::spool::{Spool, SpoolQueue};

/// How often the spool is read for mail that another process (inetd mode) has stored.
pub(super) const RESCAN_INTERVAL: Duration = Duration::from_secs(300);

/// How often the scheduler looks whether an administrator wants mail to be tried.
pub(super) const REQUEST_INTERVAL: Duration = Duration::from_secs(5);

/// How long new mail waits for more: one session sends what arrives together.
const GATHER_DELAY: Duration = Duration::from_millis(200);

/// All destinations that have mail, as far as the relay knows.
#[derive(Default)]
pub(super) struct DestinationTable {
    /// When an attempt at a destination is due; for a busy one, at mail that has arrived since its attempt began.
    due: HashMap<Domain, SystemTime>,
    /// Destinations that a worker has.
    busy: HashSet<Domain>,
}

impl DestinationTable {
    /// Adds the destinations that have a queue in the spool and are not known yet. `again`: also when those that are known
    /// are due, which an administrator may have changed.
    pub(super) fn read(&mut self, spool: &Spool, again: bool) {
        let failed = |queue: &str, error| log::error!("event=spool-failed queue={queue} error={}", quoted(error));
        let destinations = spool.destinations().unwrap_or_else(|error| {
            failed("-", error);
            Vec::new()
        });
        for domain in destinations {
            if (again || !self.due.contains_key(&domain)) && !self.busy.contains(&domain) {
                match spool.queue().next_due(&spool.name(&SpoolQueue::Outgoing(domain.clone()))) {
                    Ok(due) => self.add(domain, due),
                    Err(error) => failed(domain.as_str(), error),
                }
            }
        }
    }

    /// New mail has arrived for a destination.
    pub(super) fn arrived(&mut self, domain: Domain) {
        self.add(domain, Some(SystemTime::now() + GATHER_DELAY));
    }

    /// A worker has finished its attempt at a destination.
    pub(super) fn done(&mut self, next: NextDue) {
        self.busy.remove(&next.destination);
        self.add(next.destination, next.due);
    }

    fn add(&mut self, domain: Domain, due: Option<SystemTime>) {
        if let Some(due) = due {
            let earliest = self.due.entry(domain).or_insert(due);
            *earliest = due.min(*earliest);
        }
    }

    fn waiting(&self) -> impl Iterator<Item = (&Domain, SystemTime)> {
        self.due.iter().filter(|(domain, _)| !self.busy.contains(*domain)).map(|(domain, due)| (domain, *due))
    }

    /// Whether a destination is due that no worker has.
    pub(super) fn is_due(&self, now: SystemTime) -> bool {
        self.waiting().any(|(_, due)| due <= now)
    }

    /// Takes the destination that has been due for longest, or all that are due if one session sends the mail of all of
    /// them (`together`). They are busy until [`DestinationTable::done`].
    pub(super) fn take_due(&mut self, now: SystemTime, together: bool) -> Option<Vec<Domain>> {
        let due = self.waiting().filter(|(_, due)| *due <= now);
        let job: Vec<_> = match together {
            true => due.map(|(domain, _)| domain.clone()).collect(),
            false => due.min_by_key(|(_, due)| *due).map(|(domain, _)| domain.clone()).into_iter().collect(),
        };
        for domain in &job {
            self.due.remove(domain);
            self.busy.insert(domain.clone());
        }
        (!job.is_empty()).then_some(job)
    }

    /// How long no destination will be due, at most until the spool is to be read again.
    pub(super) fn pause(&self, now: SystemTime) -> Duration {
        let next = self.waiting().map(|(_, due)| due.duration_since(now).unwrap_or_default()).min();
        next.map_or(RESCAN_INTERVAL, |next| next.min(RESCAN_INTERVAL)) + Duration::from_millis(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain(name: &str) -> Domain {
        Domain::parse(name).unwrap()
    }

    #[test]
    fn the_table_gives_each_destination_to_one_worker() {
        let (now, a, b) = (SystemTime::now(), domain("a.example"), domain("b.example"));
        let later = now + Duration::from_secs(60);
        let next = |due| NextDue { destination: domain("a.example"), due };
        let mut table = DestinationTable::default();
        assert_eq!(table.take_due(now, false), None);
        table.arrived(a.clone());
        let soon = now + Duration::from_secs(1);
        assert_eq!(table.take_due(soon, false), Some(vec![a.clone()]));
        // While a worker has it, more mail makes it due again at once, but not twice.
        table.arrived(a.clone());
        assert_eq!(table.take_due(soon, false), None);
        table.done(next(Some(later)));
        assert_eq!(table.take_due(soon, false), Some(vec![a.clone()]));
        table.done(next(Some(later)));
        assert_eq!(table.take_due(soon, false), None);
        assert!(table.pause(now) <= Duration::from_secs(61));
        assert_eq!(table.take_due(later, false), Some(vec![a.clone()]));
        table.done(next(None));
        assert!(table.due.is_empty() && table.busy.is_empty());
        // One session for all: one job for all.
        table.arrived(a.clone());
        table.arrived(b.clone());
        let mut job = table.take_due(soon, true).unwrap();
        job.sort();
        assert_eq!(job, [a, b]);
    }
}
