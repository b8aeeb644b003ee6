//! Tests of the storage threads, with the simplest jobs.

use std::collections::HashMap;
use std::sync::atomic::AtomicBool;

use super::*;

enum FakeJob {
    /// Reports this number.
    Number(u32),
    /// Waits until all senders are dropped.
    Wait(Receiver<()>),
    /// The same, but the job counts as slow.
    SlowWait(Receiver<()>),
    Panic,
    End,
}

#[derive(Default)]
struct FakeWork {
    at_work: Arc<AtomicBool>,
    alive: Arc<()>,
}

impl LaneWork for FakeWork {
    type Job = FakeJob;
    type Report = u32;

    fn is_slow(job: &FakeJob) -> bool {
        matches!(job, FakeJob::SlowWait(_))
    }

    fn run(&mut self, job: FakeJob, report: &mut dyn FnMut(u32)) -> ControlFlow<()> {
        assert!(!self.at_work.swap(true, Ordering::SeqCst), "two jobs of a lane at a time");
        match job {
            FakeJob::Number(number) => report(number),
            FakeJob::Wait(until) | FakeJob::SlowWait(until) => {
                let _ = until.recv();
            }
            FakeJob::Panic => panic!("a defect"),
            FakeJob::End => return ControlFlow::Break(()),
        }
        self.at_work.store(false, Ordering::SeqCst);
        ControlFlow::Continue(())
    }
}

/// A pool, and the thread that tends it.
struct Owner {
    pool: StoragePool<FakeWork>,
    reports: Receiver<NumberedReport<FakeWork>>,
    /// By lane.
    received: HashMap<usize, Vec<LaneReport<u32>>>,
}

impl Owner {
    fn new(times: PoolTimes) -> Owner {
        let (mut pool, reports) = StoragePool::new(|| {});
        pool.times = times;
        Owner { pool, reports, received: HashMap::new() }
    }

    /// An owner for which a job is blocked after 30 ms.
    fn impatient() -> Owner {
        let short = Duration::from_millis(30);
        Owner::new(PoolTimes { blocked: short, suspect: short / 3, idle: short })
    }

    /// Tends the pool until the condition is true.
    fn until(&mut self, what: &str, so: impl Fn(&Owner) -> bool) {
        let late = Instant::now() + Duration::from_secs(20);
        while !so(self) {
            assert!(Instant::now() < late, "not within 20 s: {what}");
            let next = self.pool.tend(Instant::now()).unwrap_or_else(|| Instant::now() + Duration::from_millis(10));
            if let Ok((lane, report)) = self.reports.recv_deadline(next) {
                self.received.entry(lane).or_default().push(report);
            }
        }
    }

    fn received(&self, lane: usize) -> &[LaneReport<u32>] {
        self.received.get(&lane).map_or(&[], Vec::as_slice)
    }

    fn threads(&self) -> usize {
        self.pool.threads.lock().len()
    }
}

fn numbers(range: std::ops::Range<u32>) -> Vec<LaneReport<u32>> {
    range.map(LaneReport::Job).collect()
}

const ENDED: LaneReport<u32> = LaneReport::Ended { panicked: false };

#[test]
fn the_jobs_of_a_lane_are_done_in_order_and_one_at_a_time() {
    let mut owner = Owner::new(PoolTimes::default());
    let lanes: Vec<_> = (0..10).map(|number| owner.pool.lane(number, FakeWork::default())).collect();
    for number in 0..200 {
        lanes.iter().for_each(|lane| lane.submit(FakeJob::Number(number)));
        owner.pool.tend(Instant::now());
    }
    owner.until("all jobs", |owner| (0..10).all(|lane| owner.received(lane).len() == 200));
    assert!((0..10).all(|lane| owner.received(lane) == numbers(0..200)));
    assert!(owner.threads() <= 2 * THREADS_PER_ROLE);
}

#[test]
fn a_lane_ends_after_a_last_job_a_panic_or_the_drop_of_its_handle() {
    let mut owner = Owner::new(PoolTimes::default());
    let works: Vec<_> = (0..3).map(|_| FakeWork::default()).collect();
    let alive: Vec<_> = works.iter().map(|work| Arc::downgrade(&work.alive)).collect();
    let lanes: Vec<_> = works.into_iter().enumerate().map(|(number, work)| owner.pool.lane(number, work)).collect();
    for (lane, last) in lanes.iter().zip([Some(FakeJob::End), Some(FakeJob::Panic), None]) {
        lane.submit(FakeJob::Number(0));
        if let Some(last) = last {
            lane.submit(last);
            lane.submit(FakeJob::Number(1));
        }
    }
    let mut lanes = lanes;
    drop(lanes.pop());
    owner.until("the ends", |owner| (0..3).all(|lane| owner.received(lane).len() == 2));
    assert_eq!(owner.received(0), [LaneReport::Job(0), ENDED]);
    assert_eq!(owner.received(1), [LaneReport::Job(0), LaneReport::Ended { panicked: true }]);
    assert_eq!(owner.received(2), [LaneReport::Job(0), ENDED]);
    assert!(alive.iter().all(|alive| alive.upgrade().is_none()), "the state of the lanes is dropped");
    // The threads continue.
    let after = owner.pool.lane(7, FakeWork::default());
    after.submit(FakeJob::Number(0));
    owner.until("a job after the panic", |owner| owner.received(7).len() == 1);
    // A job after the end of its lane is dropped.
    lanes[0].submit(FakeJob::Number(2));
    drop(lanes);
    owner.pool.tend(Instant::now());
    assert_eq!(owner.received(0).len(), 2);
}

#[test]
fn slow_jobs_leave_threads_to_quick_jobs() {
    // No job counts as blocked in this test.
    let hour = Duration::from_secs(3600);
    let mut owner = Owner::new(PoolTimes { blocked: hour, suspect: hour, idle: hour });
    let (keep, wait) = unbounded();
    let slow: Vec<_> = (0..20).map(|number| owner.pool.lane(number, FakeWork::default())).collect();
    for (number, lane) in (0..).zip(&slow) {
        lane.submit(FakeJob::Number(number));
        lane.submit(FakeJob::SlowWait(wait.clone()));
        lane.submit(FakeJob::Number(number));
    }
    owner.until("their quick jobs", |owner| (0..20).all(|lane| owner.received(lane).len() == 1));
    let quick = owner.pool.lane(20, FakeWork::default());
    quick.submit(FakeJob::Number(0));
    owner.until("a quick job", |owner| owner.received(20).len() == 1);
    assert!(owner.threads() <= 2 * THREADS_PER_ROLE);
    drop(keep);
    owner.until("the slow ones", |owner| (0..20).all(|lane| owner.received(lane).len() == 2));
}

#[test]
fn a_lane_is_slow_for_a_while_after_a_job_that_took_longer_than_expected() {
    let mut owner = Owner::new(PoolTimes::default());
    let work = FakeWork::default();
    let at_work = work.at_work.clone();
    let lane = owner.pool.lane(0, work);
    let (keep, wait) = unbounded();
    lane.submit(FakeJob::Wait(wait));
    lane.submit(FakeJob::Number(0));
    assert!(!lane.0.state.lock().is_slow());
    owner.until("the begin of the first job", |_| at_work.load(Ordering::SeqCst));
    std::thread::sleep(2 * SLOW_JOB);
    drop(keep);
    owner.until("the next job", |owner| owner.received(0).len() == 1);
    assert!(lane.0.state.lock().is_slow());
}

#[test]
fn jobs_that_hang_block_only_their_lanes_and_their_threads_end() {
    let mut owner = Owner::impatient();
    let mut senders = Vec::new();
    for number in 0..24 {
        let lane = owner.pool.lane(number, FakeWork::default());
        let (keep, wait) = unbounded();
        lane.submit(if number % 2 == 0 { FakeJob::Wait(wait) } else { FakeJob::SlowWait(wait) });
        lane.submit(FakeJob::Number(0));
        senders.push((lane, keep));
    }
    owner.until("the count of blocked jobs", |owner| owner.pool.blocked().load(Ordering::Relaxed) == 24);
    let other = owner.pool.lane(24, FakeWork::default());
    for number in 0..100 {
        other.submit(FakeJob::Number(number));
        owner.until("a job of another lane", |owner| owner.received(24).len() as u32 == number + 1);
    }
    assert!(owner.threads() <= THREADS_LIMIT, "{}", owner.threads());
    // Dropping a handle does not wait for its lane.
    let lanes: Vec<_> = senders.into_iter().map(|(lane, keep)| (drop(lane), keep).1).collect();
    assert!((0..24).all(|lane| owner.received(lane).is_empty()));
    drop(lanes);
    owner.until("their ends", |owner| (0..24).all(|lane| owner.received(lane) == [LaneReport::Job(0), ENDED]));
    owner.until("the end of the threads", |owner| owner.threads() <= 2 * THREADS_PER_ROLE);
    assert_eq!(owner.pool.blocked().load(Ordering::Relaxed), 0);
}

/// For instance if the user has a limit of processes.
#[test]
fn if_the_system_permits_one_thread_it_serves_all_lanes_and_the_pool_does_not_ask_again_at_once() {
    let mut owner = Owner::new(PoolTimes::default());
    let lanes: Vec<_> = (0..3).map(|number| owner.pool.lane(number, FakeWork::default())).collect();
    let (keep, wait) = unbounded();
    lanes[0].submit(FakeJob::Wait(wait.clone()));
    owner.pool.tend(Instant::now());
    assert_eq!(owner.threads(), 1);
    let until = Instant::now() + Duration::from_secs(3600);
    owner.pool.no_thread_until.set(Some(until));
    lanes[1].submit(FakeJob::SlowWait(wait));
    lanes.iter().for_each(|lane| lane.submit(FakeJob::Number(0)));
    drop(keep);
    owner.until("all jobs", |owner| (0..3).all(|lane| owner.received(lane) == numbers(0..1)));
    assert_eq!(owner.threads(), 1);
    let (_keep, wait) = unbounded();
    lanes.iter().for_each(|lane| lane.submit(FakeJob::Wait(wait.clone())));
    let next = owner.pool.tend(Instant::now());
    assert!(owner.threads() == 1 && next.is_some_and(|next| next <= until), "{next:?}");
    owner.pool.tend(until);
    assert!(owner.threads() > 1);
}

#[test]
fn the_number_of_threads_stays_within_the_limit() {
    let mut owner = Owner::impatient();
    let (keep, wait) = unbounded();
    let lanes: Vec<_> = (0..50).map(|number| owner.pool.lane(number, FakeWork::default())).collect();
    lanes.iter().for_each(|lane| lane.submit(FakeJob::Wait(wait.clone())));
    owner.until("as many as permitted", |owner| owner.pool.blocked().load(Ordering::Relaxed) == THREADS_LIMIT);
    assert_eq!(owner.threads(), THREADS_LIMIT);
    drop(keep);
    drop(lanes);
    owner.until("all ends", |owner| (0..50).all(|lane| owner.received(lane) == [ENDED]));
}

#[test]
fn the_threads_end_after_the_pool_and_its_lanes() {
    let owner = Owner::new(PoolTimes::default());
    let lane = owner.pool.lane(0, FakeWork::default());
    lane.submit(FakeJob::Number(0));
    owner.pool.tend(Instant::now());
    let threads = owner.pool.threads.clone();
    let first = Arc::downgrade(&threads.lock()[0]);
    drop(lane);
    drop(owner);
    threads.lock().clear();
    let late = Instant::now() + Duration::from_secs(20);
    while first.strong_count() > 0 {
        assert!(Instant::now() < late, "the thread goes on without a pool");
        std::thread::sleep(Duration::from_millis(1));
    }
}
