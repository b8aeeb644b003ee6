//! The sessions of one attempt with one host. They share the queue's lock: each takes the next message, sends it and
//! settles it, so that no message is in two sessions.
//!
//! If the queue is long, the attempt opens additional sessions, as `connections-per-host` and `connections` permit. If
//! a session fails, its messages are deferred or in doubt, the others continue, and no more are opened: the host may
//! not permit as many. An additional session ends when another attempt waits for a connection.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::hosts::{HostPermit, HostTable, RouteError};
use super::order::HostAddress;
use super::worker::{AllSettled, AttemptRoute, ConnectFailure, HostFailure, WorkerContext, unreachable};
use crate::mail::address::{Domain, ReversePath};
use crate::net::trace::{log_no_thread, quoted};
use crate::queue::{QueueLock, QueuedMessage};
use crate::session::client::{ClientSession, MessageSource, SessionFailure};
use crate::smtp::client::Client;
use crate::smtp::status::DeliveryResult;
use crate::threads::{self, Guarded};

/// If more messages than this wait for each session, another one is opened.
const MESSAGES_PER_SESSION: usize = 20;

/// After this many sessions in a row that the host ends without a decision on any message, it is down.
const HANG_UP_LIMIT: usize = 3;

/// After a failure, a host is down for at least this many times as long as the failure took: a slow host must not occupy the
/// workers.
const DOWN_FACTOR: u32 = 4;

/// The state that the sessions of one attempt with one host share.
struct SharedQueue<'a> {
    lock: Guarded<&'a mut QueueLock>,
    hosts: &'a HostTable,
    destinations: &'a [Domain],
    /// The name for which connections count.
    host: &'a str,
    /// The number of open sessions.
    sessions: AtomicUsize,
    /// A session has failed, so no more are opened.
    session_failed: AtomicBool,
    /// The result of a message could not be recorded on disk.
    unsettled: AtomicBool,
}

impl<'a> SharedQueue<'a> {
    fn new(
        lock: &'a mut QueueLock, hosts: &'a HostTable, destinations: &'a [Domain], host: &'a str,
    ) -> SharedQueue<'a> {
        SharedQueue {
            lock: Guarded::new(lock),
            hosts,
            destinations,
            host,
            sessions: AtomicUsize::new(1),
            session_failed: AtomicBool::default(),
            unsettled: AtomicBool::default(),
        }
    }

    fn all_settled(&self) -> AllSettled {
        !self.unsettled.load(Ordering::Relaxed)
    }

    /// Whether the queue is long enough for one more session.
    fn needs_session(&self) -> bool {
        let enough = MESSAGES_PER_SESSION * self.sessions.load(Ordering::Relaxed);
        !self.session_failed.load(Ordering::Relaxed) && self.lock.lock().waiting() > enough
    }
}

/// The queue as one session sees it.
struct SessionQueue<'a, 'lock> {
    shared: &'a SharedQueue<'lock>,
    role: Role<'a>,
}

enum Role<'a> {
    /// The first session, and the function by which it opens another one.
    First(&'a dyn Fn()),
    /// An additional session. It sends no more messages if another attempt needs its connection to this host.
    Additional(&'a HostTable, &'a str),
}

impl MessageSource for SessionQueue<'_, '_> {
    fn next_message(&mut self) -> Option<QueuedMessage> {
        if matches!(self.role, Role::Additional(hosts, host) if hosts.must_yield(host)) {
            return None;
        }
        let mut message = self.shared.lock.lock().next_message();
        // If mail has arrived, leave the DSNs to the next attempt, which sends that mail first.
        if message.as_ref().is_some_and(|message| message.envelope.from == ReversePath::Null)
            && self.shared.hosts.mail_waits(self.shared.destinations, self.shared.host)
            && let Some(dsn) = message.take()
        {
            self.put_back(dsn);
        }
        if let Role::First(open) = self.role
            && message.is_some()
            && self.shared.needs_session()
        {
            open();
        }
        message
    }

    fn put_back(&mut self, message: QueuedMessage) {
        self.shared.lock.lock().put_back(message);
    }
}

/// The end of a session with a host.
enum Ended {
    Done,
    /// The host's limits (RFC 9422) are reached: it accepts more messages in another session.
    UsedUp,
    /// The connection was lost before the host decided on any message.
    Lost(SessionFailure),
}

impl WorkerContext {
    /// Sends all messages that the lock offers to one address. If the host ends the session because of one message, the others
    /// are sent in another session.
    ///
    /// # Errors
    /// There is no session, or the host ended [`HANG_UP_LIMIT`] of them without a decision on any message; then it is down.
    pub(super) fn deliver_to(
        &self, route: &AttemptRoute<'_>, to: &HostAddress, lock: &mut QueueLock,
    ) -> Result<AllSettled, RouteError> {
        let host = route.counted_as(to);
        let shared = &SharedQueue::new(lock, &self.hosts, route.destinations, &host);
        let sent = thread::scope(|scope| {
            let open = || {
                let Some(permit) = self.hosts.acquire_additional(shared.host) else { return };
                shared.sessions.fetch_add(1, Ordering::Relaxed);
                let session = move || self.send_additional(route, to, shared, permit);
                if let Err(error) = threads::spawn_scoped(scope, "relay", session) {
                    log_no_thread(&error);
                    shared.session_failed.store(true, Ordering::Relaxed);
                }
            };
            self.send_first(route, to, shared, &open)
        });
        sent.map(|()| shared.all_settled())
    }

    /// Sends in the first session, and in those that follow if the host ends it.
    fn send_first(
        &self, route: &AttemptRoute<'_>, to: &HostAddress, shared: &SharedQueue<'_>, open: &dyn Fn(),
    ) -> Result<(), RouteError> {
        let mut hang_ups = 0;
        loop {
            let begun = Instant::now();
            let session = (route.connect)(to).map_err(|ConnectFailure { error, down }| {
                if down {
                    self.mark_down(to, begun.elapsed());
                }
                error
            })?;
            let ended = self.deliver(route, session, to, SessionQueue { shared, role: Role::First(open) });
            if matches!(ended, Ended::Done) || !shared.all_settled() || !shared.lock.lock().has_next() {
                return Ok(());
            }
            let Ended::Lost(failure) = ended else { continue };
            hang_ups += 1;
            if hang_ups == HANG_UP_LIMIT {
                self.mark_down(to, Duration::ZERO);
                return Err(unreachable(&failure));
            }
        }
    }

    /// Sends in an additional session. If it cannot be opened, the host is not down: it may just limit its connections.
    fn send_additional(
        &self, route: &AttemptRoute<'_>, to: &HostAddress, shared: &SharedQueue<'_>, permit: HostPermit<'_>,
    ) {
        match (route.connect)(to) {
            Ok(session) => {
                let role = Role::Additional(&self.hosts, permit.host());
                self.deliver(route, session, to, SessionQueue { shared, role });
            }
            Err(ConnectFailure { error, .. }) => {
                shared.session_failed.store(true, Ordering::Relaxed);
                HostFailure { host: to.host.clone(), address: to.address.to_string(), error }.log();
            }
        }
        shared.sessions.fetch_sub(1, Ordering::Relaxed);
    }

    /// Marks a host as down for 0.8 of the first pause of a message, so that it is up at the message's next attempt; or
    /// longer, if the failure took long.
    fn mark_down(&self, to: &HostAddress, took: Duration) {
        let retry = &self.config.retry;
        let pause = retry.first.mul_f32(0.8).max((took * DOWN_FACTOR).min(retry.max));
        self.hosts.mark_down(&to.address.to_string(), pause);
    }

    /// Sends messages in one session.
    fn deliver(
        &self, route: &AttemptRoute<'_>, mut session: ClientSession, to: &HostAddress, mut queue: SessionQueue<'_, '_>,
    ) -> Ended {
        let _under_way = (self.sessions.0.clone(), route.permit.session_begun());
        let mut decided = false;
        let id = session.id().to_owned();
        let mut settle = |message: QueuedMessage, result: DeliveryResult, client: &Client, queue: &mut SessionQueue| {
            route.permit.message_done(message.size);
            decided |= !result.decided_by.is_connection_loss();
            let attempt = self.attempt_with(&id, Some(client));
            let shared = queue.shared;
            if self.reporter.finish_attempt(message, result, &attempt, &mut shared.lock.lock()).is_err() {
                shared.unsettled.store(true, Ordering::Relaxed);
            }
        };
        match session.send_queue(&mut queue, &mut settle) {
            Ok(()) => {
                let ended = if session.is_used_up() { Ended::UsedUp } else { Ended::Done };
                session.quit();
                ended
            }
            Err(SessionFailure::Cancelled) => Ended::Done,
            Err(failure) => {
                queue.shared.session_failed.store(true, Ordering::Relaxed);
                log::info!("event=session-lost session={id} host={} error={}", to.address, quoted(&failure));
                if decided { Ended::Done } else { Ended::Lost(failure) }
            }
        }
    }
}
