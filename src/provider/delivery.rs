//! The one delivery thread: every turned connection, multiplexed over poll(2).
//!
//! It never waits for one peer. A session without anything to read or write costs a socket and its TLS state; one that
//! stalls meets its own deadline; one that panics is dropped, and its mail stays.
//!
//! ```text
//! TurnSender::submit ─▶ channel ─▶ DeliveryThread ─┬─ session: replies ─▶ Client ─▶ settle
//!                  (and a wake-up)                 ├─ session: content ─▶ connection
//!                                                  └─ …          a bounded piece of work each, one after the other
//! ```

use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError};
use rustix::event::{PollFd, PollFlags, Timespec};

use super::turned_session::{TurnEnd, TurnSettings, TurnedSession};
use crate::net::trace::quoted;
use crate::turn::Turn;

/// The way to the delivery thread.
pub struct TurnSender {
    sender: Sender<Box<Turn>>,
    waker: OwnedFd,
    sessions: Arc<SessionCount>,
    limit: usize,
}

/// How many turned sessions there are, on their way included.
#[derive(Default)]
struct SessionCount {
    count: Mutex<usize>,
    none: Condvar,
}

impl SessionCount {
    fn enter(&self, limit: usize) -> bool {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        let admitted = *count < limit;
        *count += usize::from(admitted);
        admitted
    }

    fn leave(&self) {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.none.notify_all();
    }

    fn wait_until_none(&self, deadline: Instant) {
        let count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        let left = deadline.saturating_duration_since(Instant::now());
        let _ = self.none.wait_timeout_while(count, left, |count| *count > 0);
    }
}

impl TurnSender {
    /// Passes a turn to the delivery thread; if that cannot accept it, the turn comes back.
    pub fn submit(&self, turn: Box<Turn>) -> Result<(), Box<Turn>> {
        if !self.sessions.enter(self.limit) {
            return Err(turn);
        }
        if let Err(rejected) = self.sender.try_send(turn) {
            self.sessions.leave();
            return Err(rejected.into_inner());
        }
        // A full pipe is as good a wake-up as one octet more.
        let _ = rustix::io::retry_on_intr(|| rustix::io::write(&self.waker, &[0]));
        Ok(())
    }

    /// Waits until the last turned session has ended.
    pub fn wait_until_done(&self, deadline: Instant) {
        self.sessions.wait_until_none(deadline);
    }
}

/// What the delivery thread runs on.
pub struct DeliveryThread {
    turns: Receiver<Box<Turn>>,
    woken: OwnedFd,
    sessions: Arc<SessionCount>,
    settings: TurnSettings,
}

/// The two ends of the delivery thread; `limit`: how many turned sessions there may be.
pub fn channel(limit: usize, settings: TurnSettings) -> std::io::Result<(TurnSender, DeliveryThread)> {
    // `SessionCount` bounds it.
    let (sender, turns) = crossbeam_channel::unbounded();
    let (woken, waker) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK)?;
    let sessions = Arc::<SessionCount>::default();
    let turn_sender = TurnSender { sender, waker, sessions: sessions.clone(), limit };
    Ok((turn_sender, DeliveryThread { turns, woken, sessions, settings }))
}

impl DeliveryThread {
    /// Runs until every [`TurnSender`] is gone and all sessions have ended, or it is aborted.
    pub fn run(self) {
        let mut sessions: Vec<TurnedSession> = Vec::new();
        let mut open = true;
        while (open || !sessions.is_empty()) && !self.settings.abort.is_cancelled() {
            loop {
                match self.turns.try_recv() {
                    Ok(turn) => self.begin(turn, &mut sessions),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        open = false;
                        break;
                    }
                }
            }
            if open || !sessions.is_empty() {
                self.wait(&mut sessions, open);
                let now = Instant::now();
                sessions
                    .extract_if(.., |session| session.take_wake_up(now) && !self.work(session, now))
                    .for_each(TurnedSession::close);
            }
        }
        for mut session in sessions {
            session.end(&TurnEnd::Failed("the provider is shutting down".to_owned()));
            session.close();
        }
    }

    fn begin(&self, turn: Box<Turn>, sessions: &mut Vec<TurnedSession>) {
        match catch_unwind(AssertUnwindSafe(|| TurnedSession::new(turn.begin(), &self.settings))) {
            Ok(session) => sessions.push(session),
            Err(_) => self.sessions.leave(),
        }
    }

    /// Does one session's piece of work; `false`: it has ended.
    fn work(&self, session: &mut TurnedSession, now: Instant) -> bool {
        let worked = catch_unwind(AssertUnwindSafe(|| session.work(now)));
        let panicked = match worked {
            Ok(Ok(())) => return true,
            Ok(Err(end)) => catch_unwind(AssertUnwindSafe(|| session.end(&end))).is_err(),
            Err(_) => true,
        };
        if panicked {
            log::error!("event=panic session={}", session.id());
        }
        self.sessions.leave();
        false
    }

    /// Waits until a session can go on, until the earliest deadline, for a new turn, or until it is cancelled.
    fn wait(&self, sessions: &mut [TurnedSession], open: bool) {
        let now = Instant::now();
        let cancelled = self.settings.cancel.is_cancelled();
        let mut until = now + Duration::from_secs(3600);
        let mut polls = vec![PollFd::from_borrowed_fd(self.settings.abort.fd(), PollFlags::IN)];
        // Once the last sender is gone this pipe would report its hang-up, again and again.
        if open {
            polls.push(PollFd::new(&self.woken, PollFlags::IN));
        }
        if !cancelled {
            polls.push(PollFd::from_borrowed_fd(self.settings.cancel.fd(), PollFlags::IN));
        }
        let first = polls.len();
        let mut owners = Vec::with_capacity(sessions.len());
        for (number, session) in sessions.iter_mut().enumerate() {
            until = until.min(session.schedule(now, cancelled));
            let connection = session.connection();
            let wanted = connection.interest();
            for (descriptor, flags) in
                [(connection.input_fd(), wanted & PollFlags::IN), (connection.output_fd(), wanted & PollFlags::OUT)]
            {
                // Without a flag poll(2) would still report a hang-up, again and again.
                if !flags.is_empty() {
                    polls.push(PollFd::from_borrowed_fd(descriptor, flags));
                    owners.push(number);
                }
            }
        }
        // Rounded up, so that a deadline has passed when it wakes us.
        let left = until.saturating_duration_since(now);
        let millis = if left.is_zero() { 0 } else { left.as_millis() as i64 + 1 };
        let timeout = Timespec { tv_sec: millis / 1000, tv_nsec: millis % 1000 * 1_000_000 };
        match rustix::event::poll(&mut polls, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => log::error!("event=poll-failed error={}", quoted(error)),
        }
        let ready: Vec<PollFlags> = polls.iter().map(|poll| poll.revents()).collect();
        drop(polls);
        if open && !ready[1].is_empty() {
            let mut octets = [0; 512];
            while matches!(rustix::io::read(&self.woken, &mut octets), Ok(512)) {}
        }
        for (owner, flags) in owners.into_iter().zip(&ready[first..]) {
            if !flags.is_empty() {
                sessions[owner].wake_up(flags.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR));
            }
        }
    }
}
