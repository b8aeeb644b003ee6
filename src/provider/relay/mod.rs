//! The relay: it sends mail from customers to the world, by MX (RFC 5321 section 5.1) or through a smarthost.
//!
//! ```text
//! arrived ─▶ scheduler: which destination is due? ─▶ channel ─▶ workers: one destination each
//!                ▲                                                 │
//!                └──────────── done, due again at … ◀──────────────┘
//! ```
//!
//! A destination is a domain. Its mail is in `SPOOL/outgoing/@all/`, indexed by
//! [`SharedIndex`](crate::queue::SharedIndex); mail of earlier versions is in `SPOOL/outgoing/<domain>/`. A smarthost
//! gets the mail of all destinations that are due in one attempt. The keys below are those of `[relay]`.
//!
//! An attempt has one session, and more with the same host if more than 20 messages wait for each of them. There are at
//! most `connections-per-host` connections to one address (or to a smarthost) and `connections` in all. An attempt that waits
//! for a connection gets one from an attempt that has several.
//!
//! When the relay tries again (RFC 5321 section 4.5.4.1):
//!
//! - A message: new mail waits for 200 ms, so that one session sends all that arrives together. After each attempt that
//!   leaves a recipient deferred or in doubt, the message waits for half of its age, but for at least `retry-first` (5
//!   min) and at most `retry-max` (4 h), at random a fifth more or less. The file's time of modification is that of the
//!   next attempt, so it survives a restart. The state of hosts does not.
//! - A destination is due when its first message is. One attempt sends all messages that are due then. It tries the hosts in
//!   the order of preference, at most 8 addresses of each host, IPv6 and IPv4 in turn. All its lookups end after 1 min, and
//!   it waits for a session for at most 10 min. If one of these limits leaves addresses untried, the next attempt begins
//!   after those that were tried. If there is no session with any host, all these messages are deferred. If a result could
//!   not be recorded on disk, the destination waits for `retry-first`. If its queue is locked, or all permitted connections
//!   to its hosts are in use, the next attempt is after 2 s, and the messages not tried yet are not deferred.
//! - If an address of an MX host is not on the public Internet (loopback, private, ...) or is our own, the attempt skips
//!   it, unless `allow-private` is set. If a destination has no other address, its mail is deferred.
//! - If an address cannot be connected to, or three sessions with it are lost before a decision on any message, it is
//!   down: no attempt connects to it for 0.8 `retry-first`; or, if that is more, for four times as long as the failure
//!   took, at most `retry-max`. A smarthost is also down after any other failure before MAIL. For this time attempts
//!   skip the address, or defer the mail without a connection.
//! - If all connections are in use, DSNs and slow destinations come last, and attempts without a session give way: see
//!   `attempts`.
//! - Expiry: if an attempt leaves a recipient deferred or in doubt and the message is older than `give-up` (5 days), the
//!   recipient expires, and the sender gets a DSN. After the first such attempt at an age of more than `delay-warning` (4 h),
//!   the sender gets a DSN about the delay.
//!
//! When another process has stored mail (inetd mode, `odmr expire`), it sends a datagram ([`crate::net::wake`]), and
//! the relay reads the spool again. It also does so every 5 min, in case a datagram is lost. `odmr queue` sends one
//! after its changes, and the relay then marks all hosts as up.

mod hosts;
mod attempts;
mod destinations;
mod order;
mod sessions;
mod worker;

use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use crate::mail::address::Domain;
use crate::maildir::Entry;
use crate::net::trace::log_no_thread;
use crate::net::wake::WakeReason;
use crate::provider::spool::SpoolQueue;
use crate::threads;
use attempts::{AttemptPermit, NoAttempt};
use destinations::{DestinationTable, IsSlow, RESCAN_INTERVAL};
use hosts::AttemptKind;
use worker::NextDue;
pub use worker::WorkerContext;

/// How often the scheduler checks for a connection while a session is giving one up.
const YIELD_POLL: Duration = Duration::from_millis(100);

/// How often the scheduler reads the clock, which may be set, and asks again for a thread that the system denied.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// After the scheduler has read the spool, it does not read it again for this many times as long as the reading took.
/// Otherwise frequent datagrams and a long queue would leave no time to send mail.
const RESCAN_PAUSE_FACTOR: u32 = 4;

/// How many events the scheduler handles before it begins the next attempt.
const EVENTS_AT_ONCE: usize = 1000;

/// An event that wakes the scheduler.
enum RelayEvent {
    /// New mail for this destination, not due before `not_before`.
    Arrived { destination: Domain, entry: Entry, is_dsn: bool, not_before: Option<SystemTime> },
    /// A worker has finished its attempt at these destinations.
    Done(Vec<NextDue>),
    /// The relay may have been cancelled.
    Wake,
    /// Another process has stored mail. `again`: it has changed the queue, so all hosts are tried again.
    Look { again: bool },
    /// New attempts have this context; attempts under way keep theirs.
    Reload(Arc<WorkerContext>),
}

/// Sends events to the scheduler. After the end of the relay, events are dropped.
#[derive(Clone)]
pub struct RelayHandle {
    events: Sender<RelayEvent>,
    /// Has no target if no relay runs in this process.
    relay: Weak<()>,
    /// The spool.
    root: Arc<Path>,
}

impl RelayHandle {
    /// Reports that mail was stored in this queue. `is_dsn`: it has the null sender. `not_before`: it is not due before. If
    /// no relay runs in this process (inetd mode, commands), that of a running `odmr serve` is woken.
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

    /// Reports a datagram of another process.
    pub fn woken(&self, reason: WakeReason) {
        self.send(RelayEvent::Look { again: reason == WakeReason::Retry });
    }

    /// Replaces the context of the attempts that begin from now on.
    pub fn reload(&self, worker: Arc<WorkerContext>) {
        self.send(RelayEvent::Reload(worker));
    }

    /// Wakes the scheduler. Call it after its token is cancelled.
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
    /// The target of [`RelayHandle::relay`].
    _relay: Arc<()>,
}

/// The channel of one relay. A process without a relay uses the handle only. `root`: the spool.
pub fn channel(root: &Path) -> RelayChannel {
    let ((sender, events), relay) = (crossbeam_channel::unbounded(), Arc::new(()));
    let handle = RelayHandle { events: sender, relay: Arc::downgrade(&relay), root: root.into() };
    RelayChannel { handle, events, _relay: relay }
}

/// Decides when the scheduler reads the spool.
struct Rescan {
    /// When the spool was read last, and how long that took.
    read: Instant,
    took: Duration,
    /// A datagram has arrived since then; `again`: as in [`RelayEvent::Look`].
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

    /// The time until the spool is to be read.
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

/// The scheduler, and the context that its workers share.
pub struct Relay {
    pub worker: Arc<WorkerContext>,
    pub channel: RelayChannel,
}

impl Relay {
    /// Runs until it is cancelled. Then it waits until the sessions under way have ended, each after its message, or until the
    /// shutdown timeout is over.
    pub fn run(self) {
        let Relay { mut worker, channel: RelayChannel { handle, events, _relay } } = self;
        let (jobs, waiting) = crossbeam_channel::unbounded::<Job>();
        let (mut threads, mut under_way, mut asked) = (0, 0, Instant::now());
        let mut table = DestinationTable::default();
        let mut rescan = Rescan::begin(&mut table, &worker);
        while !worker.cancel.is_cancelled() {
            rescan.read_if_due(&mut table, &worker);
            let (now, mut waits) = (SystemTime::now(), Waits::default());
            // If the system has denied a thread for a job, ask again.
            let mut needs_thread = under_way > threads && asked.elapsed() >= CHECK_INTERVAL;
            let pause = match next_job(&mut table, &worker, &mut waits) {
                Some(job) => {
                    under_way += 1;
                    needs_thread = under_way > threads;
                    let _ = jobs.send(job);
                    // Handle the events that have arrived before the next job.
                    Duration::ZERO
                }
                None if worker.hosts.set_attempt_waits(waits.any, waits.for_mail) || waits.ends_soon => YIELD_POLL,
                // Destinations that are due already wait for the end of an attempt, which is an event.
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
        // Wait for sessions only: a worker that waits for a name server or for a greeting has sent no mail.
        drop(jobs);
        worker.hosts.cancel_attempts();
        let deadline = Instant::now() + worker.timeouts.shutdown;
        while worker.has_sessions() && !matches!(events.recv_deadline(deadline), Err(RecvTimeoutError::Timeout)) {}
    }
}

/// Starts a worker thread. Returns whether the system has given one.
fn spawn_worker(handle: &RelayHandle, waiting: &Receiver<Job>) -> bool {
    let (handle, waiting) = (handle.clone(), waiting.clone());
    let done = move |Job { destinations, worker, permit }: Job| {
        let next = worker.work(&destinations, &permit);
        drop(permit);
        handle.send(RelayEvent::Done(next));
    };
    let spawned = threads::spawn("relay", move || waiting.iter().for_each(done));
    spawned.inspect_err(log_no_thread).is_ok()
}

/// One attempt, for a worker.
struct Job {
    destinations: Vec<Domain>,
    worker: Arc<WorkerContext>,
    permit: AttemptPermit,
}

/// Which attempts wait for a connection.
#[derive(Default)]
struct Waits {
    /// An attempt is due, and all connections are in use.
    any: bool,
    /// It has mail with a sender.
    for_mail: bool,
    /// That mail goes by MX: an attempt without a session may give way to it, and stalled sessions may no longer count.
    ends_soon: bool,
}

/// Begins the next attempt that is due. Returns it as a job for a worker.
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
