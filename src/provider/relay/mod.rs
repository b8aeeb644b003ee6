//! The relay: it sends mail from customers to the world, by MX (RFC 5321 section 5.1) or through a smarthost.
//!
//! ```text
//! arrived ─▶ scheduler: which destination is due? ─▶ channel ─▶ workers: one destination each
//!                ▲                                                 │
//!                └──────────── done, due again at … ◀──────────────┘
//! ```
//!
//! A destination is a domain; its mail is what [`SharedIndex`] tells of `SPOOL/outgoing/@all/`, and what an earlier version has
//! stored in `SPOOL/outgoing/<domain>/`. A smarthost gets the mail of all destinations that are due in one attempt. The keys
//! below are those of `[relay]`.
//!
//! An attempt has one session, and more with the same host if more than 20 messages wait for each of them. There are at
//! most `connections-per-host` connections to one address (or to a smarthost) and `connections` in all; an attempt that
//! waits for a connection gets one from an attempt that has several.
//!
//! When the relay tries again (RFC 5321 section 4.5.4.1):
//!
//! - A message: new mail is sent after 200 ms, so that one session sends what arrives together. After each attempt that
//!   leaves a recipient deferred or in doubt, the message waits for half of its age, but for at least `retry-first` (5
//!   min) and at most `retry-max` (4 h), a fifth more or less by chance. The time of modification of the file is when the
//!   next attempt is due, so it stays after a restart; what is known of hosts does not.
//! - A destination: it is due when the first of its messages is. All messages that are due then are sent in one attempt.
//!   It tries the hosts in the order of preference, at most 8 addresses of each host, IPv6 and IPv4 in turn. Its lookups
//!   end after 1 min, and it waits for a session for 10 min at most. If one of these limits leaves addresses untried, the
//!   next attempt begins after those that were tried, and so on to the end of the list. If no host gives a session, all
//!   these messages are deferred. If a message could not be recorded on disk, the destination waits for `retry-first`. If
//!   its queue is locked, or all permitted connections to its hosts are in use, it is tried again after 2 s, and the
//!   messages not tried yet are not deferred.
//! - An address of an MX host that no host in the world has (loopback, private, ...), or that is our own, is passed over, unless
//!   `allow-private` is set. If a destination has no other address, its mail is deferred.
//! - A host, by its address: if it cannot be connected to, or three sessions are lost before they have decided on any
//!   message, no destination connects to it for 0.8 `retry-first`; or for four times as long as it took to fail, at most
//!   `retry-max`, if that is more. A smarthost likewise after any failure before mail. Attempts meanwhile go on to the next
//!   address, which is not counted, or are deferred without a connection.
//! - If connections are short, DSNs and destinations that are slow come last, and those without a session give way: see
//!   `attempts`.
//! - Expiry: if an attempt at a message older than `give-up` (5 days) leaves a recipient deferred or in doubt, that
//!   recipient expires, and the sender gets a DSN. The first such attempt at a message older than `delay-warning` (4 h)
//!   sends a DSN that it is delayed.
//!
//! The spool is read again if another process has stored mail (inetd mode, `odmr expire`), which it reports by a datagram
//! ([`crate::net::wake`]), and every 5 min in case that is lost. `odmr queue` reports its changes so too; then no host counts
//! as down.

mod hosts;
mod attempts;
mod destinations;
mod order;
mod sessions;
mod worker;

use std::path::Path;
use std::sync::{Arc, Weak};
use std::thread::Builder;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use crate::mail::address::Domain;
use crate::maildir::Entry;
use crate::net::trace::quoted;
use crate::net::wake::WakeReason;
use crate::provider::spool::SpoolQueue;
use attempts::{AttemptPermit, NoAttempt};
use destinations::{DestinationTable, IsSlow, RESCAN_INTERVAL};
use hosts::AttemptKind;
use worker::NextDue;
pub use worker::WorkerContext;

/// How soon the scheduler looks again for a connection that a session gives up for an attempt that is due.
const YIELD_POLL: Duration = Duration::from_millis(100);

/// How often the scheduler looks at the clock, which may be set, and asks again for a thread that the system did not give.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// After the spool was read because of a datagram, it is not read again because of another one for so many times as long as
/// that took: mail goes out meanwhile, however much waits, and however often others store some.
const RESCAN_PAUSE_FACTOR: u32 = 4;

/// How many events the scheduler handles before it looks for destinations that are due.
const EVENTS_AT_ONCE: usize = 1000;

/// What wakes the scheduler.
enum RelayEvent {
    /// New mail for this destination, which is not due before then.
    Arrived { destination: Domain, entry: Entry, is_dsn: bool, not_before: Option<SystemTime> },
    /// A worker has finished its attempt at these destinations.
    Done(Vec<NextDue>),
    /// The relay may have been cancelled.
    Wake,
    /// Another process has stored mail; `again`: or has made mail due, and wants hosts to be tried that were down.
    Look { again: bool },
    /// The workers go on with this; attempts under way end as they began.
    Reload(Arc<WorkerContext>),
}

/// Sends events to the scheduler. After the relay's end they are dropped.
#[derive(Clone)]
pub struct RelayHandle {
    events: Sender<RelayEvent>,
    /// Gone if no relay runs in this process.
    relay: Weak<()>,
    /// That of the spool.
    root: Arc<Path>,
}

impl RelayHandle {
    /// Reports that mail was stored in this queue; `is_dsn`: without a sender; `not_before`: it is not due before then. In inetd
    /// mode, and in a command, no relay runs here: that of a running `odmr serve` is woken.
    pub fn arrived(&self, queue: &SpoolQueue, entry: Entry, is_dsn: bool, not_before: Option<SystemTime>) {
        match queue {
            SpoolQueue::Outgoing(destination) if self.relay.strong_count() > 0 => {
                self.send(RelayEvent::Arrived { destination: destination.clone(), entry, is_dsn, not_before });
            }
            SpoolQueue::Outgoing(_) => WakeReason::Outgoing.send(&self.root),
            // The next ATRN reads the queue.
            _ => {}
        }
    }

    /// Reports what another process has done.
    pub fn woken(&self, reason: WakeReason) {
        self.send(RelayEvent::Look { again: reason == WakeReason::Retry });
    }

    /// From now on attempts are made with this.
    pub fn reload(&self, worker: Arc<WorkerContext>) {
        self.send(RelayEvent::Reload(worker));
    }

    /// Wakes the scheduler, after its token was cancelled.
    pub fn wake(&self) {
        self.send(RelayEvent::Wake);
    }

    fn send(&self, event: RelayEvent) {
        let _ = self.events.send(event);
    }
}

/// The events of a relay, and the handle that sends them.
pub struct RelayChannel {
    pub handle: RelayHandle,
    events: Receiver<RelayEvent>,
    /// As long as there is one.
    _relay: Arc<()>,
}

/// A channel for one relay. Where the handle is all that is used of it, there is none. `root`: that of the spool.
pub fn channel(root: &Path) -> RelayChannel {
    let ((sender, events), relay) = (crossbeam_channel::unbounded(), Arc::new(()));
    let handle = RelayHandle { events: sender, relay: Arc::downgrade(&relay), root: root.into() };
    RelayChannel { handle, events, _relay: relay }
}

/// When the spool is read.
struct Rescan {
    /// When it was read last, and how long that took.
    read: Instant,
    took: Duration,
    /// Another process has stored mail since then, or more than that.
    asked: bool,
    again: bool,
}

impl Rescan {
    /// Reads the spool for the first time.
    fn begin(table: &mut DestinationTable, worker: &WorkerContext) -> Rescan {
        let mut rescan = Rescan { read: Instant::now(), took: Duration::ZERO, asked: true, again: false };
        rescan.read_if_due(table, worker);
        rescan
    }

    /// How long it need not be read.
    fn pause(&self) -> Duration {
        let pause = if self.asked { self.took.saturating_mul(RESCAN_PAUSE_FACTOR) } else { RESCAN_INTERVAL };
        pause.min(RESCAN_INTERVAL).saturating_sub(self.read.elapsed())
    }

    fn read_if_due(&mut self, table: &mut DestinationTable, worker: &WorkerContext) {
        if !self.pause().is_zero() {
            return;
        }
        let begun = Instant::now();
        let again = self.again;
        if again {
            worker.hosts.forget_down();
        }
        table.read(&worker.spool, &worker.index, again);
        *self = Rescan { read: Instant::now(), took: begun.elapsed(), asked: false, again: false };
    }
}

/// The scheduler, and what its workers share.
pub struct Relay {
    pub worker: Arc<WorkerContext>,
    pub channel: RelayChannel,
}

impl Relay {
    /// Runs until it is cancelled, and then until the sessions under way have ended, after their message, or the shutdown
    /// timeout is over.
    pub fn run(self) {
        let Relay { mut worker, channel: RelayChannel { handle, events, _relay } } = self;
        let (jobs, waiting) = crossbeam_channel::unbounded::<Job>();
        let (mut threads, mut under_way, mut asked) = (0, 0, Instant::now());
        let mut table = DestinationTable::default();
        let mut rescan = Rescan::begin(&mut table, &worker);
        while !worker.cancel.is_cancelled() {
            rescan.read_if_due(&mut table, &worker);
            let (now, mut waits) = (SystemTime::now(), Waits::default());
            // If the system has given none for a job, it may do so by now.
            let mut needs_thread = under_way > threads && asked.elapsed() >= CHECK_INTERVAL;
            let pause = match next_job(&mut table, &worker, &mut waits) {
                Some(job) => {
                    under_way += 1;
                    needs_thread = under_way > threads;
                    let _ = jobs.send(job);
                    // What has happened meanwhile comes before the next one.
                    Duration::ZERO
                }
                None if worker.hosts.set_attempt_waits(waits.any, waits.for_mail) || waits.ends_soon => YIELD_POLL,
                // What was due before now waits for an attempt to end.
                None => table.pause(now),
            };
            if needs_thread {
                asked = Instant::now();
                threads += usize::from(spawn_worker(&handle, &waiting));
            }
            let first = events.recv_timeout(pause.min(rescan.pause()).min(CHECK_INTERVAL));
            for event in first.into_iter().chain(events.try_iter().take(EVENTS_AT_ONCE)) {
                match event {
                    RelayEvent::Arrived { destination, entry, is_dsn, not_before } => {
                        worker.index.add(destination.clone(), entry);
                        if !is_dsn && table.is_busy(&destination) {
                            worker.hosts.set_mail_waits(destination.as_str(), true);
                        }
                        table.arrived(destination, is_dsn, not_before);
                    }
                    RelayEvent::Done(destinations) => {
                        under_way -= 1;
                        for next in destinations {
                            worker.hosts.set_mail_waits(next.destination.as_str(), false);
                            table.done(next, &worker.spool, &worker.index);
                        }
                    }
                    RelayEvent::Reload(renewed) => worker = renewed,
                    RelayEvent::Look { again } => (rescan.asked, rescan.again) = (true, rescan.again || again),
                    RelayEvent::Wake => {}
                }
            }
        }
        // Only sessions are waited for. A worker that waits for a name server or a host to answer has sent nothing.
        drop(jobs);
        worker.hosts.cancel_attempts();
        let deadline = Instant::now() + worker.timeouts.shutdown;
        while worker.has_sessions() && !matches!(events.recv_deadline(deadline), Err(RecvTimeoutError::Timeout)) {}
    }
}

/// Begins a thread that works on jobs; returns whether there is one.
fn spawn_worker(handle: &RelayHandle, waiting: &Receiver<Job>) -> bool {
    let (handle, waiting) = (handle.clone(), waiting.clone());
    let done = move |Job { destinations, worker, permit }: Job| {
        let next = worker.work(&destinations, &permit);
        drop(permit);
        handle.send(RelayEvent::Done(next));
    };
    let spawned = Builder::new().name("relay".to_owned()).spawn(move || waiting.iter().for_each(done));
    spawned.inspect_err(|error| log::error!("event=no-thread error={}", quoted(error))).is_ok()
}

/// One attempt, for a worker.
struct Job {
    destinations: Vec<Domain>,
    worker: Arc<WorkerContext>,
    permit: AttemptPermit,
}

/// What waits for a connection.
#[derive(Default)]
struct Waits {
    /// An attempt is due, and all connections are in use.
    any: bool,
    /// It is one at mail with a sender.
    for_mail: bool,
    /// That mail goes by MX: an attempt without a session may give way to it, and one with a session may stall.
    ends_soon: bool,
}

/// The next job for a worker, whose attempt has begun.
fn next_job(table: &mut DestinationTable, worker: &Arc<WorkerContext>, waits: &mut Waits) -> Option<Job> {
    let now = SystemTime::now();
    let is_slow: &IsSlow<'_> = &|domain| worker.hosts.is_slow(domain.as_str());
    let job = |destinations, permit| Job { destinations, worker: worker.clone(), permit };
    if worker.smarthost.is_some() {
        if !table.is_due(now) {
            return None;
        }
        let permit = worker.hosts.begin_attempt(AttemptKind::Mail);
        waits.any |= permit.is_err();
        waits.for_mail |= permit.is_err() && table.is_due_of(now, AttemptKind::Mail, &|_| false);
        return permit.ok().map(|permit| job(table.take_all_due(now), permit));
    }
    for kind in AttemptKind::ALL {
        if !table.is_due_of(now, kind, is_slow) {
            continue;
        }
        match worker.hosts.begin_attempt(kind) {
            Ok(permit) => return table.take_due(now, kind, is_slow).map(|destination| job(vec![destination], permit)),
            Err(NoAttempt::KindInUse) => {}
            Err(NoAttempt::AllInUse) => {
                waits.any = true;
                if kind == AttemptKind::Mail {
                    (waits.for_mail, waits.ends_soon) = (true, true);
                    worker.hosts.give_way(table.count_due(now, kind, is_slow, worker.config.connections));
                }
            }
        }
    }
    None
}
