//! The storage threads: they do the delivery thread's work on the disk, so that it never waits for one.
//!
//! Each turned session has a *lane*: the state that its jobs work on, and its jobs, which are done in order and one at a
//! time. A lane with jobs waits for a thread in one of two channels; the thread does some of its jobs, and puts the lane back
//! if there are more. The jobs' reports go to the delivery thread, and wake it.
//!
//! ```text
//!                                 ┌─▶ quick ─┬─▶ thread ─┐
//! LaneHandle::submit ─▶ a lane ───┤          ├─▶ thread ─┼─▶ reports ─▶ delivery thread
//!                          ▲      └─▶ slow ──┴─▶ …       │
//!                          └──── it has more jobs ───────┘
//! ```
//!
//! A disk may be slow, or a network file system may hang, for some lanes only. They must not delay the others:
//!
//! - A lane whose next job is slow waits in `slow`, which half of the threads serve. For a second after a job of more
//!   than 50 ms, the lane waits there too. So customers that cause fsyncs, because they reject their mail, do not delay
//!   the others.
//! - [`StoragePool::tend`] adds a thread for each thread whose job is blocked for longer than a second, up to 32
//!   threads. While any job is blocked, 100 ms are enough for that. [`StoragePool::blocked`] counts the blocked jobs:
//!   if there are too many, no more turns are accepted.
//!
//! A panic ends its lane only. Threads start when they are needed; those above four end after 10 s without work. A
//! thread whose job never ends is left when the process ends.

use std::cell::Cell;
use std::collections::VecDeque;
use std::io;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, select, unbounded};

use crate::net::trace::log_no_thread;
use crate::threads::{self, Guarded};

/// Threads for each of the two channels, not counting those whose job is blocked.
const THREADS_PER_ROLE: usize = 2;

/// The maximum of all threads.
const THREADS_LIMIT: usize = 32;

/// A job longer than this makes its lane slow.
const SLOW_JOB: Duration = Duration::from_millis(50);

/// How long a lane is slow after that.
const SLOW_TIME: Duration = Duration::from_secs(1);

/// A thread does at most this many jobs of a lane, then those of the next lane.
const JOBS_PER_TURN: usize = 16;

/// The times of a pool.
#[derive(Clone, Copy)]
struct PoolTimes {
    /// A job that takes longer than this is blocked.
    blocked: Duration,
    /// While a job is blocked, each job that takes longer than this has its thread replaced.
    suspect: Duration,
    /// A thread above those that always stay ends when it was idle for this time.
    idle: Duration,
}

impl Default for PoolTimes {
    fn default() -> PoolTimes {
        PoolTimes {
            blocked: Duration::from_secs(1),
            suspect: Duration::from_millis(100),
            idle: Duration::from_secs(10),
        }
    }
}

/// The state that the jobs of a lane work on.
pub trait LaneWork: Send + 'static {
    type Job: Send;
    type Report: Send;

    /// Whether a job waits for the disk in any case, because it makes something durable.
    fn is_slow(job: &Self::Job) -> bool;

    /// Does a job. After `Break` there are no more jobs, and the state is dropped.
    fn run(&mut self, job: Self::Job, report: &mut dyn FnMut(Self::Report)) -> ControlFlow<()>;
}

/// A report of a lane. They come in the order of its jobs.
#[derive(Debug, PartialEq, Eq)]
pub enum LaneReport<R> {
    Job(R),
    /// The last report of a lane: its state is dropped.
    Ended {
        /// A job has panicked.
        panicked: bool,
    },
}

/// A lane's number, and its report.
pub type NumberedReport<W> = (usize, LaneReport<<W as LaneWork>::Report>);

/// Lanes that wait for a thread.
type LaneChannel<W> = (Sender<Arc<Lane<W>>>, Receiver<Arc<Lane<W>>>);

struct Lane<W: LaneWork> {
    number: usize,
    state: Guarded<LaneState<W>>,
    quick: Sender<Arc<Lane<W>>>,
    slow: Sender<Arc<Lane<W>>>,
    reports: Reports<W>,
}

struct LaneState<W: LaneWork> {
    jobs: VecDeque<W::Job>,
    /// `None`: a thread has it, or it was dropped.
    work: Option<W>,
    /// The lane is in a channel, or a thread has it, or it has ended.
    scheduled: bool,
    /// The handle is dropped: no more jobs follow.
    closed: bool,
    slow_until: Instant,
}

/// Sends the reports of the lanes to the delivery thread.
struct Reports<W: LaneWork> {
    sender: Sender<NumberedReport<W>>,
    wake: Arc<dyn Fn() + Send + Sync>,
}

impl<W: LaneWork> Reports<W> {
    fn send(&self, number: usize, report: LaneReport<W::Report>) {
        // It fails only after the end of the delivery thread.
        let _ = self.sender.send((number, report));
        (self.wake)();
    }
}

impl<W: LaneWork> Clone for Reports<W> {
    fn clone(&self) -> Reports<W> {
        Reports { sender: self.sender.clone(), wake: self.wake.clone() }
    }
}

impl<W: LaneWork> LaneState<W> {
    fn is_slow(&self) -> bool {
        Instant::now() < self.slow_until || self.jobs.front().is_some_and(W::is_slow)
    }
}

impl<W: LaneWork> Lane<W> {
    fn schedule(self: &Arc<Self>, mut state: MutexGuard<'_, LaneState<W>>) {
        if !std::mem::replace(&mut state.scheduled, true) {
            self.send_to_channel(&state);
        }
    }

    fn send_to_channel(self: &Arc<Self>, state: &LaneState<W>) {
        let channel = if state.is_slow() { &self.slow } else { &self.quick };
        // It fails only after the end of the pool, which has a receiver.
        let _ = channel.send(self.clone());
    }

    /// Does some of the jobs, none after a slow one. A thread for quick lanes does no slow job.
    fn work(self: &Arc<Self>, thread: &ThreadState) {
        let Some(mut work) = self.state.lock().work.take() else { return };
        for _ in 0..JOBS_PER_TURN {
            let mut state = self.state.lock();
            if thread.role == ThreadRole::Quick && state.is_slow() {
                break;
            }
            let Some(job) = state.jobs.pop_front() else {
                if state.closed {
                    break;
                }
                (state.work, state.scheduled) = (Some(work), false);
                return;
            };
            drop(state);
            let (begun, slow) = (thread.begin_job(), W::is_slow(&job));
            let mut report = |report| self.reports.send(self.number, LaneReport::Job(report));
            let done = catch_unwind(AssertUnwindSafe(|| work.run(job, &mut report)));
            if !matches!(done, Ok(ControlFlow::Continue(()))) {
                return self.end(work, done.is_err());
            }
            let surprise = begun.elapsed() > SLOW_JOB && !slow;
            if surprise {
                self.state.lock().slow_until = Instant::now() + SLOW_TIME;
            }
            if surprise || slow {
                break;
            }
        }
        let mut state = self.state.lock();
        match state.closed && state.jobs.is_empty() {
            true => {
                drop(state);
                self.end(work, false);
            }
            false => {
                state.work = Some(work);
                self.send_to_channel(&state);
            }
        }
    }

    fn end(&self, work: W, panicked: bool) {
        // Drop it here, not in the delivery thread: it closes files, which may wait for the disk.
        let dropped = catch_unwind(AssertUnwindSafe(|| drop(work)));
        self.state.lock().jobs.clear();
        self.reports.send(self.number, LaneReport::Ended { panicked: panicked || dropped.is_err() });
    }
}

/// Submits the jobs of one lane. After it is dropped, the lane does its remaining jobs and ends.
pub struct LaneHandle<W: LaneWork>(Arc<Lane<W>>);

impl<W: LaneWork> LaneHandle<W> {
    /// Submits a job. The caller bounds how many there are. After the end of the lane, the job is dropped.
    pub fn submit(&self, job: W::Job) {
        let mut state = self.0.state.lock();
        state.jobs.push_back(job);
        self.0.schedule(state);
    }
}

impl<W: LaneWork> Drop for LaneHandle<W> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.closed = true;
        self.0.schedule(state);
    }
}

/// Which lanes a thread serves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum ThreadRole {
    /// Those that are not slow.
    Quick,
    /// All lanes.
    Any,
}

/// A storage thread.
struct ThreadState {
    role: ThreadRole,
    /// When its job has begun; `None`: it is idle.
    since: Guarded<Option<Instant>>,
}

impl ThreadState {
    fn begin_job(&self) -> Instant {
        *self.since.lock().insert(Instant::now())
    }

    fn is_idle(&self) -> bool {
        self.since.lock().is_none()
    }

    /// When its job will have run for this time; `None`: it is idle.
    fn overdue(&self, time: Duration) -> Option<Instant> {
        self.since.lock().map(|since| since + time)
    }

    /// Whether it is idle, or its job has run for less than this time.
    fn works(&self, now: Instant, time: Duration) -> bool {
        self.overdue(time).is_none_or(|overdue| now < overdue)
    }
}

type Threads = Arc<Guarded<Vec<Arc<ThreadState>>>>;

/// The storage threads.
pub struct StoragePool<W: LaneWork> {
    quick: LaneChannel<W>,
    slow: LaneChannel<W>,
    reports: Reports<W>,
    threads: Threads,
    /// After the system has denied a thread, the pool does not ask again before this time.
    no_thread_until: Cell<Option<Instant>>,
    blocked: Arc<AtomicUsize>,
    times: PoolTimes,
}

impl<W: LaneWork> StoragePool<W> {
    /// Returns a pool without threads, and the receiver of its lanes' reports. `wake` is called after each report.
    pub fn new(wake: impl Fn() + Send + Sync + 'static) -> (StoragePool<W>, Receiver<NumberedReport<W>>) {
        let (sender, receiver) = unbounded();
        let pool = StoragePool {
            quick: unbounded(),
            slow: unbounded(),
            reports: Reports { sender, wake: Arc::new(wake) },
            threads: Arc::default(),
            no_thread_until: Cell::default(),
            blocked: Arc::default(),
            times: PoolTimes::default(),
        };
        (pool, receiver)
    }

    /// Makes a lane, whose reports have this number.
    pub fn lane(&self, number: usize, work: W) -> LaneHandle<W> {
        let state = LaneState {
            jobs: VecDeque::new(),
            work: Some(work),
            scheduled: false,
            closed: false,
            slow_until: Instant::now(),
        };
        LaneHandle(Arc::new(Lane {
            number,
            state: Guarded::new(state),
            quick: self.quick.0.clone(),
            slow: self.slow.0.clone(),
            reports: self.reports.clone(),
        }))
    }

    /// The number of jobs that were blocked for longer than a second at the last call of [`StoragePool::tend`].
    pub fn blocked(&self) -> Arc<AtomicUsize> {
        self.blocked.clone()
    }

    /// Starts the threads that are missing. Call it after jobs were submitted, and again at the time that it returns, if any.
    /// The caller must never be blocked by a disk itself.
    pub fn tend(&self, now: Instant) -> Option<Instant> {
        let mut threads = self.threads.lock();
        let blocked = threads.iter().filter(|thread| !thread.works(now, self.times.blocked)).count();
        let before = self.blocked.swap(blocked, Ordering::Relaxed);
        if blocked != before {
            log::warn!("event=storage-blocked jobs={blocked}");
        }
        let patience = if blocked > 0 { self.times.suspect } else { self.times.blocked };
        let missing = |threads: &[Arc<ThreadState>]| {
            let count = |role, counts: &dyn Fn(&ThreadState) -> bool| {
                threads.iter().filter(|thread| thread.role == role && counts(thread)).count()
            };
            let idle = |role| count(role, &ThreadState::is_idle);
            let too_few = |role| count(role, &|thread| thread.works(now, patience)) < THREADS_PER_ROLE;
            let (quick, any) = (self.quick.1.len(), self.slow.1.len());
            match (idle(ThreadRole::Quick), idle(ThreadRole::Any)) {
                // The first thread serves all lanes: it may be the only one that the system permits.
                _ if quick + any > 0 && count(ThreadRole::Any, &|_| true) == 0 => Some(ThreadRole::Any),
                (_, idle) if any > idle && too_few(ThreadRole::Any) => Some(ThreadRole::Any),
                (idle, others) if quick + any <= idle + others => None,
                (idle, _) if quick > idle && too_few(ThreadRole::Quick) => Some(ThreadRole::Quick),
                _ => too_few(ThreadRole::Any).then_some(ThreadRole::Any),
            }
        };
        let mut no_thread_until = self.no_thread_until.get().filter(|until| now < *until);
        while no_thread_until.is_none()
            && threads.len() < THREADS_LIMIT
            && let Some(role) = missing(&threads)
        {
            if let Err(error) = self.start_thread(role, &mut threads) {
                log_no_thread(&error);
                no_thread_until = Some(now + self.times.blocked);
            }
        }
        self.no_thread_until.set(no_thread_until);
        let times = [self.times.blocked, patience];
        let overdue = threads.iter().flat_map(|thread| times.map(|time| thread.overdue(time)));
        overdue.chain([no_thread_until]).flatten().filter(|time| *time > now).min()
    }

    fn start_thread(&self, role: ThreadRole, threads: &mut Vec<Arc<ThreadState>>) -> io::Result<()> {
        let state = Arc::new(ThreadState { role, since: Guarded::default() });
        let thread = StorageThread {
            state: state.clone(),
            quick: self.quick.1.clone(),
            slow: self.slow.1.clone(),
            threads: self.threads.clone(),
            times: self.times,
        };
        threads::spawn("storage", move || thread.run())?;
        threads.push(state);
        Ok(())
    }
}

struct StorageThread<W: LaneWork> {
    state: Arc<ThreadState>,
    quick: Receiver<Arc<Lane<W>>>,
    slow: Receiver<Arc<Lane<W>>>,
    threads: Threads,
    times: PoolTimes,
}

impl<W: LaneWork> StorageThread<W> {
    /// Works until the pool and all lanes have ended, or there are enough other threads.
    fn run(self) {
        loop {
            match self.next_lane() {
                Ok(lane) => {
                    self.state.begin_job();
                    lane.work(&self.state);
                    // Drop it before the wait: it has senders of the channel, which would never be disconnected.
                    drop(lane);
                    *self.state.since.lock() = None;
                }
                Err(RecvTimeoutError::Timeout) if !self.is_superfluous() => {}
                Err(_) => break,
            }
        }
    }

    fn next_lane(&self) -> Result<Arc<Lane<W>>, RecvTimeoutError> {
        match self.state.role {
            ThreadRole::Quick => self.quick.recv_timeout(self.times.idle),
            ThreadRole::Any => select! {
                recv(self.quick) -> lane => lane.map_err(|_| RecvTimeoutError::Disconnected),
                recv(self.slow) -> lane => lane.map_err(|_| RecvTimeoutError::Disconnected),
                default(self.times.idle) => Err(RecvTimeoutError::Timeout),
            },
        }
    }

    /// Whether the other threads are enough; if so, this one is removed from the list.
    fn is_superfluous(&self) -> bool {
        let (mut threads, now) = (self.threads.lock(), Instant::now());
        let works =
            |thread: &&Arc<ThreadState>| thread.role == self.state.role && thread.works(now, self.times.blocked);
        let superfluous = threads.iter().filter(works).count() > THREADS_PER_ROLE;
        if superfluous {
            threads.retain(|thread| !Arc::ptr_eq(thread, &self.state));
        }
        superfluous
    }
}

#[cfg(test)]
mod tests;
