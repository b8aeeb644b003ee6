//! The relay: outgoing mail of customers, on its way to the world by MX (RFC 5321 section 5.1) or through a smarthost.
//!
//! ```text
//! arrived ──▶ scheduler: which destination is due? ──▶ channel ──▶ workers: one session a destination
//!                 ▲                                                   │
//!                 └───────────── done, next attempt at … ◀────────────┘
//! ```
//!
//! `SPOOL/outgoing/<domain>/` is a queue like any other, locked and settled like a customer's mail. The scheduler keeps
//! nothing that is not in the files: when a message is due is its time of modification. One connection carries all mail
//! that is due for a destination, and a host that is down is left alone for a while, whichever destination needs it.

mod destinations;
mod events;
mod hosts;
mod worker;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Instant, SystemTime};

use crossbeam_channel::RecvTimeoutError;

use crate::config::ProviderConfig;
use crate::ids::Ids;
use crate::mail::address::Domain;
use crate::net::cancel::CancelToken;
use crate::net::trace::quoted;
use crate::provider::spool::Spool;
use crate::report::Reporter;
use destinations::{DestinationTable, RESCAN_INTERVAL};
use events::RelayEvent;
pub use events::{RelayEvents, RelayHandle, channel};
use worker::Worker;

/// The scheduler.
pub struct Relay {
    worker: Arc<Worker>,
    handle: RelayHandle,
    events: RelayEvents,
}

impl Relay {
    /// # Errors
    /// The certificates or the smarthost that the configuration names cannot be used.
    pub fn new(
        config: &ProviderConfig, spool: &Spool, ids: &Ids, reporter: Reporter,
        (handle, events): (RelayHandle, RelayEvents), cancel: &CancelToken,
    ) -> Result<Relay, String> {
        let worker = Worker::new(config, spool, ids, reporter, cancel)?;
        Ok(Relay { worker: Arc::new(worker), handle, events })
    }

    /// Runs until it is cancelled; then waits a while for sessions under way, which end after their message.
    pub fn run(self) {
        let limit = self.worker.connection_limit();
        let (jobs, waiting) = crossbeam_channel::unbounded::<Vec<Domain>>();
        let mut workers = 0;
        let mut table = DestinationTable::default();
        table.read(self.worker.spool());
        let mut read = Instant::now();
        let mut under_way = 0;
        while !self.worker.is_cancelled() {
            if read.elapsed() >= RESCAN_INTERVAL {
                table.read(self.worker.spool());
                read = Instant::now();
            }
            while under_way < limit
                && let Some(job) = table.take_due(SystemTime::now(), self.worker.has_smarthost())
            {
                under_way += 1;
                if under_way > workers {
                    let (worker, handle, waiting) = (self.worker.clone(), self.handle.clone(), waiting.clone());
                    match std::thread::Builder::new().name("relay".to_owned()).spawn(move || {
                        waiting.iter().for_each(|job| worker.work(job, &handle));
                    }) {
                        Ok(_) => workers += 1,
                        Err(error) => log::error!("event=no-thread error={}", quoted(error)),
                    }
                }
                let _ = jobs.send(job);
            }
            let pause = if under_way < limit { table.pause(SystemTime::now()) } else { RESCAN_INTERVAL };
            match self.events.0.recv_timeout(pause) {
                Ok(RelayEvent::Arrived(domains)) => domains.into_iter().for_each(|domain| table.arrived(domain)),
                Ok(RelayEvent::Done(destinations)) => {
                    under_way -= 1;
                    destinations.into_iter().for_each(|(domain, due)| table.done(domain, due));
                }
                Ok(RelayEvent::Wake) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        // A worker that waits for a name server or a host that does not answer is not waited for: that loses nothing.
        drop(jobs);
        let deadline = Instant::now() + self.worker.shutdown_timeout();
        while self.worker.active_sessions.load(Ordering::SeqCst) > 0
            && !matches!(self.events.0.recv_deadline(deadline), Err(RecvTimeoutError::Timeout))
        {}
    }
}
