//! The delivery thread: one thread that sends held mail over all turned connections (RFC 2645 section 5.3).
//!
//! A worker thread submits a [`Turn`]; from then on this thread has the connection and the lock on the mail. It waits
//! with poll(2) for all connections at once, and then lets each session that can go on do a bounded piece of work, so it
//! never waits for one customer. A customer that does not answer costs a socket and its TLS state until the deadline of
//! its session. A panic ends one session; its mail stays in the queue.
//!
//! ```text
//! worker: TurnSender::submit ─▶ channel ─▶ DeliveryThread ─┬─ TurnedSession: replies ─▶ Client ─▶ settle
//!                        └────── pipe ───▶ (poll returns)  ├─ TurnedSession: content ─▶ connection
//!                                                          └─ …
//! ```

use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, TryRecvError};
use rustix::event::{PollFd, PollFlags, Timespec};

use super::turned_session::{DONE, TurnSettings, TurnedSession};
use crate::net::cancel::CancelToken;
use crate::net::trace::quoted;
use crate::platform;
use crate::turn::Turn;

/// Submits turns to the delivery thread. The thread ends after the last session if no sender is left.
pub struct TurnSender {
    // The channel is closed before the pipe: the end of the pipe wakes the thread, which then finds no sender.
    sender: Sender<(Box<Turn>, TurnSettings)>,
    waker: OwnedFd,
    sessions: Arc<SessionCount>,
    limit: AtomicUsize,
}

/// How many turned sessions there are, turns in the channel included.
#[derive(Default)]
struct SessionCount {
    count: Mutex<usize>,
    session_ended: Condvar,
}

impl SessionCount {
    fn lock(&self) -> MutexGuard<'_, usize> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remove_one(&self) {
        *self.lock() -= 1;
        self.session_ended.notify_all();
    }
}

impl TurnSender {
    /// Sets the most turned sessions at a time.
    pub fn set_limit(&self, limit: usize) {
        self.limit.store(limit, Ordering::Relaxed);
    }

    /// Submits a turn, which the delivery thread will begin with these settings.
    ///
    /// # Errors
    /// The turn, if there are as many turned sessions as permitted, or if the thread has ended.
    pub fn submit(&self, turn: Box<Turn>, settings: &TurnSettings) -> Result<(), Box<Turn>> {
        let mut count = self.sessions.lock();
        if *count >= self.limit.load(Ordering::Relaxed) {
            return Err(turn);
        }
        self.sender.send((turn, settings.clone())).map_err(|rejected| rejected.0.0)?;
        *count += 1;
        // If the pipe is full, the thread has enough octets to wake it.
        let _ = rustix::io::retry_on_intr(|| rustix::io::write(&self.waker, &[0]));
        Ok(())
    }

    /// Waits until there is no turned session, or until the deadline.
    pub fn wait_until_done(&self, deadline: Instant) {
        let left = deadline.saturating_duration_since(Instant::now());
        let _ = self.sessions.session_ended.wait_timeout_while(self.sessions.lock(), left, |count| *count > 0);
    }
}

/// The delivery thread before it runs.
pub struct DeliveryThread {
    turns: Receiver<(Box<Turn>, TurnSettings)>,
    /// Readable if turns were submitted since the last look into the channel.
    woken: OwnedFd,
    sessions: Arc<SessionCount>,
    /// Ends sessions after the messages under way.
    cancel: CancelToken,
    /// Ends sessions at once.
    abort: CancelToken,
}

/// Connects a sender of turns to a delivery thread; `limit`: the most turned sessions at a time.
///
/// # Errors
/// The system has no descriptors left.
pub fn channel(limit: usize, cancel: &CancelToken, abort: &CancelToken) -> io::Result<(TurnSender, DeliveryThread)> {
    // `limit` bounds the channel.
    let (sender, turns) = crossbeam_channel::unbounded();
    let (woken, waker) = platform::pipe()?;
    let sessions = Arc::<SessionCount>::default();
    let turn_sender = TurnSender { sender, waker, sessions: sessions.clone(), limit: AtomicUsize::new(limit) };
    let (cancel, abort) = (cancel.clone(), abort.clone());
    Ok((turn_sender, DeliveryThread { turns, woken, sessions, cancel, abort }))
}

impl DeliveryThread {
    /// Runs until no [`TurnSender`] is left and all sessions have ended, or until it is aborted.
    pub fn run(self) {
        let mut sessions: Vec<TurnedSession> = Vec::new();
        let mut open = true;
        while open || !sessions.is_empty() {
            self.wait(&mut sessions, open);
            if self.abort.is_cancelled() {
                break;
            }
            open = self.begin_sessions(&mut sessions);
            let now = Instant::now();
            let ended = sessions.extract_if(.., |session| session.may_work(now) && !self.work(session, now));
            ended.for_each(TurnedSession::close);
        }
        for mut session in sessions {
            session.end("the provider is shutting down");
            session.close();
        }
    }

    /// Begins a session for each turn in the channel. Returns whether more turns may come.
    fn begin_sessions(&self, sessions: &mut Vec<TurnedSession>) -> bool {
        loop {
            let (turn, settings) = match self.turns.try_recv() {
                Ok(submitted) => submitted,
                Err(error) => return error == TryRecvError::Empty,
            };
            let begin = || TurnedSession::new(turn.begin(settings.without_8bitmime), settings);
            match catch_unwind(AssertUnwindSafe(begin)) {
                Ok(session) => sessions.push(session),
                Err(_) => {
                    log::error!("event=panic session=-");
                    self.sessions.remove_one();
                }
            }
        }
    }

    /// Lets a session do a piece of work. Returns whether it goes on; otherwise it has ended, and is to be closed.
    fn work(&self, session: &mut TurnedSession, now: Instant) -> bool {
        let goes_on = catch_unwind(AssertUnwindSafe(|| {
            match session.work(now) {
                Ok(true) => return true,
                Ok(false) => session.end(DONE),
                Err(error) => session.end(&error.to_string()),
            }
            false
        }));
        if goes_on.is_err() {
            log::error!("event=panic session={}", session.connection.trace.id);
        }
        let goes_on = goes_on.unwrap_or(false);
        if !goes_on {
            self.sessions.remove_one();
        }
        goes_on
    }

    /// Waits until a connection is ready, a session's wake-up time has come, a turn was submitted (if senders are
    /// `open`), or the thread is cancelled or aborted. Tells the sessions what poll(2) has found.
    fn wait(&self, sessions: &mut [TurnedSession], open: bool) {
        let now = Instant::now();
        let cancelled = self.cancel.is_cancelled();
        let until = sessions.iter_mut().map(|session| session.schedule_wake_up(now, cancelled)).min();
        let timeout = until.and_then(|until| Timespec::try_from(until.saturating_duration_since(now)).ok());
        let mut polls = vec![PollFd::from_borrowed_fd(self.abort.fd(), PollFlags::IN)];
        // Without a sender the pipe has ended, which poll(2) would report at every call.
        if open {
            polls.push(PollFd::new(&self.woken, PollFlags::IN));
        }
        // Once cancelled, the token stays readable.
        if !cancelled {
            polls.push(PollFd::from_borrowed_fd(self.cancel.fd(), PollFlags::IN));
        }
        let first = polls.len();
        // The session that each poll after `first` is for.
        let mut owners = Vec::with_capacity(sessions.len());
        for (number, session) in sessions.iter().enumerate() {
            let connection = &session.connection;
            let interest = connection.interest();
            for (descriptor, flags) in
                [(connection.input_fd(), interest & PollFlags::IN), (connection.output_fd(), interest & PollFlags::OUT)]
            {
                // Without a flag poll(2) would still report a hang-up, at every call.
                if !flags.is_empty() {
                    polls.push(PollFd::from_borrowed_fd(descriptor, flags));
                    owners.push(number);
                }
            }
        }
        match rustix::event::poll(&mut polls, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => log::error!("event=poll-failed error={}", quoted(error)),
        }
        let found: Vec<PollFlags> = polls.iter().map(PollFd::revents).collect();
        drop(polls);
        if open && !found[1].is_empty() {
            let mut octets = [0; 512];
            while matches!(rustix::io::read(&self.woken, &mut octets), Ok(512)) {}
        }
        for (owner, flags) in owners.into_iter().zip(&found[first..]) {
            sessions[owner].wake_up(*flags);
        }
    }
}
