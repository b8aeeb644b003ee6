//! What the relay's scheduler waits for.

use std::time::SystemTime;

use crossbeam_channel::{Receiver, Sender};

use crate::mail::address::Domain;
use crate::provider::spool::SpoolQueue;

/// What wakes the scheduler.
pub(super) enum RelayEvent {
    /// New mail for these destinations.
    Arrived(Vec<Domain>),
    /// A worker is done with these destinations, and when each is due again; `None`: its queue is empty.
    Done(Vec<(Domain, Option<SystemTime>)>),
    /// The relay may have been cancelled.
    Wake,
}

/// Wakes the relay.
#[derive(Clone)]
pub struct RelayHandle(Sender<RelayEvent>);

impl RelayHandle {
    /// Reports mail that was stored. In inetd mode no relay runs here: the mail waits for the one of `odmr serve`.
    pub fn arrived(&self, queues: &[SpoolQueue]) {
        let destinations = queues.iter().filter_map(|queue| match queue {
            SpoolQueue::Outgoing(domain) => Some(domain.clone()),
            SpoolQueue::Held(_) | SpoolQueue::Postmaster => None,
        });
        let destinations: Vec<_> = destinations.collect();
        if !destinations.is_empty() {
            self.send(RelayEvent::Arrived(destinations));
        }
    }

    pub fn wake(&self) {
        self.send(RelayEvent::Wake);
    }

    pub(super) fn send(&self, event: RelayEvent) {
        // A relay that has ended needs no events.
        let _ = self.0.send(event);
    }
}

/// The relay's end of its events.
pub struct RelayEvents(pub(super) Receiver<RelayEvent>);

pub fn channel() -> (RelayHandle, RelayEvents) {
    let (sender, receiver) = crossbeam_channel::unbounded();
    (RelayHandle(sender), RelayEvents(receiver))
}
