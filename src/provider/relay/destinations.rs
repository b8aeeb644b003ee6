//! Which destination of outgoing mail is due when.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use crate::mail::address::Domain;
use crate::net::trace::quoted;
use crate::provider::spool::{Spool, SpoolQueue};

/// How often the spool is read for mail that another process (inetd mode) has stored.
pub(super) const RESCAN_INTERVAL: Duration = Duration::from_secs(300);

/// How long new mail waits for more of it: what arrives in one call is sent in one session.
const GATHER_DELAY: Duration = Duration::from_millis(200);

/// Which destination is due when.
#[derive(Default)]
pub(super) struct DestinationTable {
    destinations: HashMap<Domain, DestinationState>,
}

#[derive(Clone, Copy)]
enum DestinationState {
    Due(SystemTime),
    /// A worker has it; `true`: more mail has arrived since.
    Busy(bool),
}

impl DestinationState {
    fn time(&self) -> Option<SystemTime> {
        match self {
            DestinationState::Due(due) => Some(*due),
            DestinationState::Busy(_) => None,
        }
    }
}

impl DestinationTable {
    /// Adds the destinations that have a queue and are not known yet.
    pub(super) fn read(&mut self, spool: &Spool) {
        let destinations = spool.destinations().unwrap_or_else(|error| {
            log::error!("event=spool-failed error={}", quoted(error));
            Vec::new()
        });
        let new = |domain: &Domain| !self.destinations.contains_key(domain);
        for domain in destinations.into_iter().filter(new).collect::<Vec<_>>() {
            match spool.queue().next_due(&spool.name(&SpoolQueue::Outgoing(domain.clone()))) {
                Ok(due) => self.done(domain, due),
                Err(error) => log::error!("event=spool-failed domain={domain} error={}", quoted(error)),
            }
        }
    }

    pub(super) fn arrived(&mut self, domain: Domain) {
        let soon = SystemTime::now() + GATHER_DELAY;
        let state = self.destinations.entry(domain).or_insert(DestinationState::Due(soon));
        *state = match *state {
            DestinationState::Busy(_) => DestinationState::Busy(true),
            DestinationState::Due(due) => DestinationState::Due(due.min(soon)),
        };
    }

    pub(super) fn done(&mut self, domain: Domain, due: Option<SystemTime>) {
        let arrived = matches!(self.destinations.get(&domain), Some(DestinationState::Busy(true)));
        let soon = arrived.then(|| SystemTime::now() + GATHER_DELAY);
        match due.into_iter().chain(soon).min() {
            Some(due) => self.destinations.insert(domain, DestinationState::Due(due)),
            None => self.destinations.remove(&domain),
        };
    }

    /// The next job: a destination that is due, or all of them if one session serves them all (`together`).
    pub(super) fn take_due(&mut self, now: SystemTime, together: bool) -> Option<Vec<Domain>> {
        let is_due = |state: &DestinationState| matches!(state, DestinationState::Due(due) if *due <= now);
        let due = self.destinations.iter().filter(|(_, state)| is_due(state));
        let job: Vec<_> = match together {
            true => due.map(|(domain, _)| domain.clone()).collect(),
            // The one that has waited longest comes first.
            false => due.min_by_key(|(_, state)| state.time()).map(|(domain, _)| domain.clone()).into_iter().collect(),
        };
        for domain in &job {
            self.destinations.insert(domain.clone(), DestinationState::Busy(false));
        }
        (!job.is_empty()).then_some(job)
    }

    /// How long no destination is due.
    pub(super) fn pause(&self, now: SystemTime) -> Duration {
        let next = self.destinations.values().filter_map(|state| match state {
            DestinationState::Due(due) => Some(due.duration_since(now).unwrap_or_default()),
            DestinationState::Busy(_) => None,
        });
        next.min().map_or(RESCAN_INTERVAL, |next| next.min(RESCAN_INTERVAL)) + Duration::from_millis(1)
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
        let mut table = DestinationTable::default();
        assert_eq!(table.take_due(now, false), None);
        table.arrived(a.clone());
        let soon = now + Duration::from_secs(1);
        assert_eq!(table.take_due(soon, false), Some(vec![a.clone()]));
        // While a worker has it, more mail makes it due again at once, but not twice.
        table.arrived(a.clone());
        assert_eq!(table.take_due(soon, false), None);
        table.done(a.clone(), Some(later));
        assert_eq!(table.take_due(soon, false), Some(vec![a.clone()]));
        table.done(a.clone(), Some(later));
        assert_eq!(table.take_due(soon, false), None);
        assert!(table.pause(now) <= Duration::from_secs(61));
        assert_eq!(table.take_due(later, false), Some(vec![a.clone()]));
        table.done(a.clone(), None);
        assert!(table.destinations.is_empty());
        // One way for all: one job for all.
        table.arrived(a.clone());
        table.arrived(b.clone());
        let mut job = table.take_due(soon, true).unwrap();
        job.sort();
        assert_eq!(job, [a, b]);
    }
}
