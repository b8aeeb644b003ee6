//! The delivery thread: one thread that sends held mail over all turned connections (RFC 2645 section 5.3).
//!
//! A worker thread submits a [`Turn`]; from then on this thread owns the connection. It waits for all connections at
//! once, and each session that can go on does a bounded piece of work, so a slow customer does not delay the others. A
//! slow disk does not either: only the [storage threads](super::storage) use the lock on the mail, and the messages. The
//! jobs of a session are its *lane*: the storage threads do them in order, and the lane may end after its session. A
//! customer that does not reply costs a socket and its TLS state until its session's deadline. A panic ends one
//! session; its mail stays in the queue.
//!
//! ```text
//! worker: TurnSender::submit ─▶ channel ─▶ DeliveryThread ─┬─ TurnedSession: replies ─▶ Client ─▶ commands
//!                        └──── waker ────▶ (wait ends) ◀─┐ ├─ TurnedSession: content ─▶ connection
//!                                                reports │ └─ … jobs
//!                                                        └────── storage threads ◀┘
//! ```

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError};

use super::storage::{LaneReport, NumberedReport, StoragePool};
use super::turn_settings::{TurnLimits, TurnSettings};
use super::turned_queue::{QueueReport, SessionCount, SessionPermit, TurnedQueue};
use super::turned_session::{DONE, TurnedSession};
use crate::net::cancel::CancelToken;
use crate::net::poller::{Poller, PollerWaker};
use crate::net::trace::quoted;
use crate::turn::Turn;

/// While more jobs than this are blocked, no turn is accepted: the storage threads that still work would not be enough for
/// more sessions.
const BLOCKED_LIMIT: usize = 24;

/// How long the thread pauses after poll has failed: without it, the thread would use a whole processor.
const POLL_PAUSE: Duration = Duration::from_millis(500);

/// After the abort, the thread waits for jobs until none has been done for this time.
const LAST_JOBS_TIMEOUT: Duration = Duration::from_secs(2);

/// The poller's numbers for the two tokens; those of sessions follow.
const CANCEL: usize = 0;
const ABORT: usize = 1;

/// Submits turns to the delivery thread. When no sender is left, the thread ends after its last session.
pub struct TurnSender {
    // Dropped before `waker`: the thread must find the channel closed when it wakes, or it would sleep again.
    sender: Sender<SubmittedTurn>,
    waker: WakeOnDrop,
    sessions: SessionCount,
    limit: AtomicUsize,
    /// How many jobs of the storage threads are blocked.
    blocked: Arc<AtomicUsize>,
}

struct SubmittedTurn {
    turn: Box<Turn>,
    settings: Arc<TurnSettings>,
    limits: TurnLimits,
    permit: SessionPermit,
}

struct WakeOnDrop(PollerWaker);

impl Drop for WakeOnDrop {
    fn drop(&mut self) {
        self.0.wake();
    }
}

impl TurnSender {
    /// Sets the maximum of turned sessions at a time.
    pub fn set_limit(&self, limit: usize) {
        self.limit.store(limit, Ordering::Relaxed);
    }

    /// Submits a turn. The delivery thread begins it with these settings, and with the account's limits.
    ///
    /// # Errors
    /// The turn: there are as many turned sessions as permitted, or too many jobs wait for a disk that does not respond, or
    /// the thread has ended.
    pub fn submit(&self, turn: Box<Turn>, settings: &Arc<TurnSettings>, limits: TurnLimits) -> Result<(), Box<Turn>> {
        if self.blocked.load(Ordering::Relaxed) > BLOCKED_LIMIT {
            return Err(turn);
        }
        let Some(permit) = self.sessions.admit(self.limit.load(Ordering::Relaxed)) else {
            return Err(turn);
        };
        let submitted = SubmittedTurn { turn, settings: settings.clone(), limits, permit };
        self.sender.send(submitted).map_err(|rejected| rejected.0.turn)?;
        self.waker.0.wake();
        Ok(())
    }

    /// Waits until no turned session is left, or until the deadline.
    pub fn wait_until_done(&self, deadline: Instant) {
        self.sessions.wait_until_none(deadline);
    }
}

/// The delivery thread.
pub struct DeliveryThread {
    turns: Receiver<SubmittedTurn>,
    poller: Poller,
    pool: StoragePool<TurnedQueue>,
    reports: Receiver<NumberedReport<TurnedQueue>>,
    sessions: HashMap<usize, Box<ScheduledSession>>,
    next_number: usize,
    /// When each session must work even if nothing has happened. Sessions that have ended may still be listed.
    wake_ups: BTreeSet<(Instant, usize)>,
    /// Sessions that may have something to do.
    ready: Vec<usize>,
    /// How many lanes have not ended although their sessions have.
    ending: usize,
    /// Ends sessions after the messages under way.
    cancel: CancelToken,
    /// `cancel` has woken all sessions.
    cancelled: bool,
    /// Ends sessions at once.
    abort: CancelToken,
}

struct ScheduledSession {
    session: TurnedSession,
    is_ready: bool,
    /// Its entry in `wake_ups`.
    wake_up: Option<Instant>,
}

/// Makes a delivery thread, and the sender of turns to it. `limit`: the maximum of turned sessions at a time.
///
/// # Errors
/// The system has no descriptors left.
pub fn channel(limit: usize, cancel: &CancelToken, abort: &CancelToken) -> io::Result<(TurnSender, DeliveryThread)> {
    // Not a bounded channel: `limit` bounds what is in it.
    let (sender, turns) = crossbeam_channel::unbounded();
    let poller = Poller::new()?;
    poller.watch(cancel.fd(), CANCEL)?;
    poller.watch(abort.fd(), ABORT)?;
    let waker = poller.waker();
    let (pool, reports) = StoragePool::new(move || waker.wake());
    let turn_sender = TurnSender {
        sender,
        waker: WakeOnDrop(poller.waker()),
        sessions: SessionCount::default(),
        limit: AtomicUsize::new(limit),
        blocked: pool.blocked(),
    };
    let delivery = DeliveryThread {
        turns,
        poller,
        pool,
        reports,
        sessions: HashMap::new(),
        next_number: ABORT + 1,
        wake_ups: BTreeSet::new(),
        ready: Vec::new(),
        ending: 0,
        cancel: cancel.clone(),
        cancelled: false,
        abort: abort.clone(),
    };
    Ok((turn_sender, delivery))
}

impl DeliveryThread {
    /// Runs until no [`TurnSender`] is left and all sessions have ended, or until it is aborted.
    pub fn run(mut self) {
        let mut open = true;
        while open || self.has_lanes() {
            self.wait(None);
            if self.abort.is_cancelled() {
                break;
            }
            open = self.begin_sessions();
            self.handle_reports();
            self.handle_wake_ups(Instant::now());
            for number in std::mem::take(&mut self.ready) {
                self.work(number, Instant::now());
            }
        }
        self.end_all();
    }

    /// Whether any lane has not ended. Each session has one; `ending` counts those of closed sessions.
    fn has_lanes(&self) -> bool {
        !self.sessions.is_empty() || self.ending > 0
    }

    /// Waits until a connection becomes ready, a report or a turn arrives, the wake-up time of a session comes, or the thread
    /// is cancelled or aborted; at most until `deadline`.
    fn wait(&mut self, deadline: Option<Instant>) {
        let now = Instant::now();
        let tend_at = self.pool.tend(now);
        let wake_up = self.wake_ups.first().map(|(wake_up, _)| *wake_up);
        let until = [deadline, tend_at, wake_up, (!self.ready.is_empty()).then_some(now)].into_iter().flatten().min();
        let found = self.poller.wait(until.map(|until| until.saturating_duration_since(now)));
        let found: io::Result<Vec<_>> = found.map(Iterator::collect);
        if let Err(error) = &found {
            // Instead, look at all connections after each pause.
            log::error!("event=poll-failed error={}", quoted(error));
            thread::sleep(POLL_PAUSE);
            self.set_all_ready();
        }
        for descriptor in found.unwrap_or_default() {
            if let Some(scheduled) = self.sessions.get_mut(&descriptor.number) {
                scheduled.session.set_ready(descriptor.closed);
                scheduled.set_ready(descriptor.number, &mut self.ready);
            }
        }
        // Wake all sessions, so that those between two messages end.
        if !self.cancelled && self.cancel.is_cancelled() {
            self.cancelled = true;
            self.set_all_ready();
        }
    }

    fn set_all_ready(&mut self) {
        for (number, scheduled) in &mut self.sessions {
            // The customer may have closed its side: the next read shows it.
            scheduled.session.set_ready(true);
            scheduled.set_ready(*number, &mut self.ready);
        }
    }

    /// Begins a session for each turn in the channel. Returns whether a sender is left.
    fn begin_sessions(&mut self) -> bool {
        loop {
            let SubmittedTurn { turn, settings, limits, permit } = match self.turns.try_recv() {
                Ok(submitted) => submitted,
                Err(error) => return error == TryRecvError::Empty,
            };
            let number = self.next_number;
            self.next_number += 1;
            let begin = || {
                let turned = turn.begin(settings.without_8bitmime);
                TurnedSession::new(turned, (settings, limits), &self.pool, number, permit)
            };
            let Ok(mut session) = catch_unwind(AssertUnwindSafe(begin)) else {
                log::error!("event=panic session=-");
                continue;
            };
            if let Err(error) = self.watch(&mut session, number) {
                session.end(&error.to_string());
            }
            let scheduled = ScheduledSession { session, is_ready: true, wake_up: None };
            self.sessions.insert(number, Box::new(scheduled));
            self.ready.push(number);
        }
    }

    fn watch(&self, session: &mut TurnedSession, number: usize) -> io::Result<()> {
        for descriptor in session.connection.descriptors() {
            match self.poller.watch(descriptor, number) {
                // epoll does not watch plain files.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => session.unwatched = true,
                other => other?,
            }
        }
        Ok(())
    }

    /// Passes the reports of the lanes to their sessions. Returns whether there were any.
    fn handle_reports(&mut self) -> bool {
        let (mut any, now) = (false, Instant::now());
        while let Ok((number, report)) = self.reports.try_recv() {
            any = true;
            match (report, self.sessions.get_mut(&number)) {
                (LaneReport::Job(QueueReport::Released), Some(_)) => {
                    self.ending += 1;
                    self.close(number);
                }
                (LaneReport::Job(report), Some(scheduled)) => {
                    scheduled.session.receive(report, now);
                    scheduled.set_ready(number, &mut self.ready);
                }
                (LaneReport::Job(_), None) => {}
                (LaneReport::Ended { panicked }, Some(scheduled)) => {
                    if panicked {
                        log::error!("event=panic session={}", scheduled.session.connection.trace.id);
                    }
                    self.close(number);
                }
                (LaneReport::Ended { .. }, None) => self.ending = self.ending.saturating_sub(1),
            }
        }
        any
    }

    /// Marks the sessions whose wake-up time has come as ready.
    fn handle_wake_ups(&mut self, now: Instant) {
        while let Some((wake_up, number)) = self.wake_ups.first().copied()
            && wake_up <= now
        {
            self.wake_ups.pop_first();
            let Some(scheduled) = self.sessions.get_mut(&number) else { continue };
            scheduled.wake_up = None;
            // Most sessions have made progress since the entry was made, and must wake up later.
            if scheduled.session.next_wake_up(now).is_some_and(|wake_up| wake_up <= now) {
                scheduled.set_ready(number, &mut self.ready);
            } else {
                scheduled.schedule(number, now, &mut self.wake_ups);
            }
        }
    }

    /// Does a piece of a session's work, and schedules the next one.
    fn work(&mut self, number: usize, now: Instant) {
        let Some(scheduled) = self.sessions.get_mut(&number) else { return };
        scheduled.is_ready = false;
        let session = &mut scheduled.session;
        if session.ended {
            return;
        }
        let worked = catch_unwind(AssertUnwindSafe(|| match session.work(now) {
            Ok(true) => {}
            Ok(false) => session.end(DONE),
            Err(error) => session.end(&error.to_string()),
        }));
        if worked.is_err() {
            log::error!("event=panic session={}", session.connection.trace.id);
            // The session's lane outlives it, and reports its own end.
            self.ending += 1;
            return self.close(number);
        }
        if session.ended {
            // Otherwise the poller would report the closed connection again and again.
            session.connection.descriptors().for_each(|descriptor| self.poller.forget(descriptor));
        } else if session.busy {
            scheduled.set_ready(number, &mut self.ready);
        }
        scheduled.schedule(number, now, &mut self.wake_ups);
    }

    fn close(&mut self, number: usize) {
        if let Some(scheduled) = self.sessions.remove(&number) {
            let session = scheduled.session;
            session.connection.descriptors().for_each(|descriptor| self.poller.forget(descriptor));
            session.close();
        }
    }

    /// Ends all sessions, and waits for their last jobs. If a disk does not respond, the mail stays as it is: messages that
    /// the customer has accepted and that are not settled are sent once more.
    fn end_all(mut self) {
        for scheduled in self.sessions.values_mut().filter(|scheduled| !scheduled.session.ended) {
            scheduled.session.end("the provider is shutting down");
        }
        // No session works any more: a wake-up time in the past would make this loop spin.
        self.wake_ups.clear();
        let mut deadline = Instant::now() + LAST_JOBS_TIMEOUT;
        while self.has_lanes() {
            if Instant::now() >= deadline {
                log::error!("event=storage-abandoned sessions={}", self.sessions.len() + self.ending);
                let left: Vec<_> = self.sessions.keys().copied().collect();
                left.into_iter().for_each(|number| self.close(number));
                break;
            }
            self.ready.clear();
            self.wait(Some(deadline));
            if self.handle_reports() {
                deadline = Instant::now() + LAST_JOBS_TIMEOUT;
            }
        }
    }
}

impl ScheduledSession {
    fn set_ready(&mut self, number: usize, ready: &mut Vec<usize>) {
        if !std::mem::replace(&mut self.is_ready, true) {
            ready.push(number);
        }
    }

    /// Schedules the next wake-up, unless an earlier one is scheduled.
    fn schedule(&mut self, number: usize, now: Instant, wake_ups: &mut BTreeSet<(Instant, usize)>) {
        let Some(next) = self.session.next_wake_up(now) else { return };
        if self.wake_up.is_none_or(|wake_up| next < wake_up) {
            if let Some(wake_up) = self.wake_up.replace(next) {
                wake_ups.remove(&(wake_up, number));
            }
            wake_ups.insert((next, number));
        }
    }
}
