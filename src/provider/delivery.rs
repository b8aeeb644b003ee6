//! The one delivery thread: every turned connection, multiplexed over poll(2).
//!
//! It never waits for one peer. A session that has nothing to read or write costs a socket and its TLS
//! state; one that stalls runs into its own deadline; one that panics is dropped, and its mail stays.
//!
//! ```text
//! Turns::submit ─▶ channel ─▶ Delivery ─┬─ session: replies ─▶ Client ─▶ settle
//!               (and a wake-up)         ├─ session: content ─▶ wire
//!                                       └─ …          a bounded piece of work each, in turn
//! ```

use std::collections::VecDeque;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError};
use rustix::event::{PollFd, PollFlags, Timespec};

use crate::config::Timeouts;
use crate::net::connection::{CancelToken, Connection, Filled, Line};
use crate::queue::{QueueLock, QueuedMessage};
use crate::report::{Attempt, Peer, Reporter};
use crate::session::client::REPLY_LINE_LIMIT;
use crate::smtp::client::{Abort, Awaiting, Client, ClientStep, DeliveryResult, RecipientStatus};
use crate::smtp::content::Stuffer;
use crate::smtp::reply::{Reply, ReplyReader};
use crate::turn::{Turn, Turned};

/// Content is read and sent in pieces of so many octets.
const CONTENT_BLOCK: usize = 32 * 1024;
/// While more than this is unsent, no more content is read.
const HIGH_WATER: usize = 64 * 1024;
/// Pieces of work for one session before the next has its turn.
const STEPS_PER_ROUND: usize = 8;
/// How long the end of a session may take once nothing is at stake any more.
const QUIT_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a stalled session looks whether somebody else wants its domains.
const TAKEOVER_CHECK_INTERVAL: Duration = Duration::from_secs(1);

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
    /// Hands a turn over; when nobody can take it, it comes back.
    pub fn submit(&self, turn: Box<Turn>) -> Result<(), Box<Turn>> {
        if !self.sessions.enter(self.limit) {
            return Err(turn);
        }
        if let Err(refused) = self.sender.try_send(turn) {
            self.sessions.leave();
            return Err(refused.into_inner());
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

/// Times and limits of a turned session, and how it is stopped.
#[derive(Clone)]
pub struct TurnSettings {
    pub timeouts: Timeouts,
    /// Messages in one session; 0: no limit.
    pub messages: usize,
    pub reporter: Reporter,
    /// Ends sessions behind the message under way.
    pub cancel: CancelToken,
    /// Ends them at once.
    pub abort: CancelToken,
}

/// A delivery thread's two ends; `limit` is the number of turned sessions.
pub fn channel(limit: usize, rules: TurnSettings) -> std::io::Result<(TurnSender, DeliveryThread)> {
    // `Sessions` bounds it.
    let (sender, turns) = crossbeam_channel::unbounded();
    let (woken, waker) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK)?;
    let sessions = Arc::<SessionCount>::default();
    let there = TurnSender { sender, waker, sessions: sessions.clone(), limit };
    Ok((there, DeliveryThread { turns, woken, sessions, settings: rules }))
}

impl DeliveryThread {
    /// Runs until all [`Turns`] are gone and all sessions have ended, or `halt` is said.
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
                    .extract_if(.., |session| session.is_due(now) && !self.work(session, now))
                    .for_each(TurnedSession::close);
            }
        }
        for mut session in sessions {
            session.end("the provider is shutting down");
            session.close();
        }
    }

    fn begin(&self, turn: Box<Turn>, sessions: &mut Vec<TurnedSession>) {
        match catch_unwind(AssertUnwindSafe(|| TurnedSession::new(turn.begin(), &self.settings))) {
            Ok(session) => sessions.push(session),
            Err(_) => self.sessions.leave(),
        }
    }

    /// One session's piece of work; `false`: it has ended.
    fn work(&self, session: &mut TurnedSession, now: Instant) -> bool {
        let worked = catch_unwind(AssertUnwindSafe(|| session.work(now)));
        let ended = match worked {
            Ok(Ok(())) => return true,
            Ok(Err(TurnEnd(why))) => catch_unwind(AssertUnwindSafe(|| session.end(&why))).is_err(),
            Err(_) => true,
        };
        if ended {
            log::error!("event=panic session={}", session.connection.trace.id);
        }
        self.sessions.leave();
        false
    }

    /// Waits until a session can go on, the earliest deadline, a new turn or a word to stop.
    fn wait(&self, sessions: &mut [TurnedSession], open: bool) {
        let now = Instant::now();
        let stopping = self.settings.cancel.is_cancelled();
        let mut until = now + Duration::from_secs(3600);
        let mut polls = vec![PollFd::from_borrowed_fd(self.settings.abort.fd(), PollFlags::IN)];
        // With the last sender gone this pipe would report its hang-up, again and again.
        if open {
            polls.push(PollFd::new(&self.woken, PollFlags::IN));
        }
        if !stopping {
            polls.push(PollFd::from_borrowed_fd(self.settings.cancel.fd(), PollFlags::IN));
        }
        let first = polls.len();
        let mut owners = Vec::with_capacity(sessions.len());
        for (number, session) in sessions.iter_mut().enumerate() {
            session.wake = session.wake_at(now, stopping);
            until = until.min(session.wake);
            let wanted = session.connection.interest();
            for (descriptor, flags) in [
                (session.connection.input_fd(), wanted & PollFlags::IN),
                (session.connection.output_fd(), wanted & PollFlags::OUT),
            ] {
                // Asked for nothing, poll(2) would still report a hang-up, again and again.
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
            Err(error) => log::error!("event=poll-failed error={error}"),
        }
        let ready: Vec<PollFlags> = polls.iter().map(|poll| poll.revents()).collect();
        drop(polls);
        if open && !ready[1].is_empty() {
            let mut octets = [0; 512];
            while matches!(rustix::io::read(&self.woken, &mut octets), Ok(512)) {}
        }
        for (owner, flags) in owners.into_iter().zip(&ready[first..]) {
            sessions[owner].woken |= !flags.is_empty();
            sessions[owner].readable |= flags.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR);
        }
    }
}

/// The session is over, for this reason.
struct TurnEnd(String);

impl From<std::io::Error> for TurnEnd {
    fn from(error: std::io::Error) -> TurnEnd {
        TurnEnd(error.to_string())
    }
}

/// One turned connection.
struct TurnedSession {
    connection: Connection,
    client: Client,
    lock: QueueLock,
    account: String,
    peer: String,
    settings: TurnSettings,
    replies: ReplyReader,
    /// Messages given to the client, in order; the first is the one it speaks of.
    messages: VecDeque<QueuedMessage>,
    /// The hold had nothing more when last asked, and nothing was settled since.
    queue_empty: bool,
    /// The content of the first is being sent.
    content: Option<Stuffer>,
    /// More can be done without waiting.
    busy: bool,
    /// poll(2) said so.
    readable: bool,
    /// The same, of any kind.
    woken: bool,
    /// When to look at it if poll(2) says nothing.
    wake: Instant,
    begun: Instant,
    /// When patience ends: with the peer's next move, and with the session.
    deadline: Instant,
    last_progress: Instant,
    last_heartbeat: Instant,
    counters: TurnCounters,
}

/// What a session has done, for the log.
#[derive(Default)]
struct TurnCounters {
    offered: usize,
    sent: usize,
    deferred: usize,
    rejected: usize,
    in_doubt: usize,
    octets: u64,
}

impl TurnedSession {
    fn new(turned: Turned, rules: &TurnSettings) -> TurnedSession {
        let Turned { connection, client, lock, peer, account } = turned;
        let now = Instant::now();
        let domains: Vec<_> = lock.domains().map(|domain| domain.as_str()).collect();
        log::info!(
            "event=turned session={} peer={peer} account={account} domains={}",
            connection.trace.id,
            domains.join(",")
        );
        TurnedSession {
            connection,
            client,
            lock,
            account,
            peer,
            settings: rules.clone(),
            replies: ReplyReader::default(),
            messages: VecDeque::new(),
            queue_empty: false,
            content: None,
            busy: true,
            readable: false,
            woken: false,
            wake: now,
            begun: now,
            deadline: now + rules.timeouts.greeting,
            last_progress: now,
            last_heartbeat: now,
            counters: TurnCounters::default(),
        }
    }

    /// When this session must be looked at even if its peer does nothing.
    fn wake_at(&self, now: Instant, stopping: bool) -> Instant {
        if self.busy || (stopping && self.client.is_ready_for_message() && self.client.in_flight() == 0) {
            return now;
        }
        let end = self.begun + self.settings.timeouts.turn;
        let stalled = self.last_progress + self.settings.timeouts.takeover;
        let look = if stalled > now { stalled } else { now + TAKEOVER_CHECK_INTERVAL };
        self.deadline.min(end).min(look)
    }

    /// Whether there may be work. The stalled ones must cost nothing while others are served.
    fn is_due(&mut self, now: Instant) -> bool {
        std::mem::take(&mut self.woken) || self.busy || now >= self.wake
    }

    /// A bounded piece of work.
    fn work(&mut self, now: Instant) -> Result<(), TurnEnd> {
        // An error that comes with the last replies must not cost us these: a 250 that was seen is no doubt.
        let filled = match std::mem::take(&mut self.readable) {
            true => self.connection.fill().inspect(|_| self.connection.acknowledge()),
            false => Ok(Filled::Nothing),
        };
        let before = self.connection.unsent();
        self.busy = true;
        for _ in 0..STEPS_PER_ROUND {
            let replied = self.take_replies(now)?;
            let moved = self.send_content(now)? || self.next_message()?;
            if let Err(error) = self.connection.flush() {
                let _ = self.connection.fill();
                self.take_replies(now)?;
                return Err(error.into());
            }
            // The flush may just have made room for more content: nobody else would wake us for it.
            let room = self.content.is_some() && self.connection.unsent() <= HIGH_WATER;
            if !replied && !moved && !room {
                self.busy = false;
                break;
            }
        }
        if filled? == Filled::End || self.connection.ended() {
            return Err(TurnEnd("the customer closed the connection".to_owned()));
        }
        // Slow is not silent: whoever reads has time, in proportion.
        let sending = self.content.is_some() || self.client.awaiting() == Some(Awaiting::End);
        if sending && self.connection.unsent() < before {
            self.progress(now);
            self.deadline = self.deadline.max(now + self.settings.timeouts.block);
        }
        self.check_deadlines(now)
    }

    fn take_replies(&mut self, now: Instant) -> Result<bool, TurnEnd> {
        let mut any = false;
        loop {
            let line = match self.connection.take_reply_line(REPLY_LINE_LIMIT) {
                Line::Whole(line) => line,
                Line::None => return Ok(any),
                Line::TooLong => return Err(TurnEnd("a reply line without end".to_owned())),
            };
            self.connection.trace.received(&line);
            let reply =
                self.replies.line(&line).map_err(|error| TurnEnd(format!("this is no reply: {:?}", error.0)))?;
            if let Some(reply) = reply {
                any = true;
                self.progress(now);
                self.handle_reply(reply, now)?;
            }
        }
    }

    fn handle_reply(&mut self, reply: Reply, now: Instant) -> Result<(), TurnEnd> {
        let farewell = reply.code() == 421;
        let mut said = Vec::new();
        let step = self.client.reply(reply.clone(), &mut said).map_err(|broken| TurnEnd(broken.0.to_owned()))?;
        self.send(&said);
        self.reset_deadline(now);
        match step {
            ClientStep::Wait | ClientStep::Ready => {}
            ClientStep::Content { .. } => self.content = Some(Stuffer::new()),
            ClientStep::MessageDone(result) => self.finish_message(&result)?,
            ClientStep::Closed => return Err(TurnEnd("done".to_owned())),
            ClientStep::Abort(Abort::Rejected { what, reply }) => {
                log::warn!("event=turn-refused session={} what={what:?} reply={:?}", self.id(), reply.to_string());
            }
            // None of them is in the plan of a turned client.
            ClientStep::Abort(_) | ClientStep::StartTls | ClientStep::Replied(_) | ClientStep::Turned => {
                return Err(TurnEnd("no such step".to_owned()));
            }
        }
        if farewell {
            return Err(TurnEnd(format!("the customer said {reply}")));
        }
        Ok(())
    }

    /// Sends a piece of the content under way.
    fn send_content(&mut self, now: Instant) -> Result<bool, TurnEnd> {
        let (Some(stuffer), Some(message)) = (&mut self.content, self.messages.front_mut()) else {
            return Ok(false);
        };
        if self.connection.unsent() > HIGH_WATER {
            return Ok(false);
        }
        let mut piece = [0; CONTENT_BLOCK];
        let octets = match message.read(&mut piece) {
            Ok(octets) => octets,
            Err(error) => {
                // It goes to the end of the line, or nothing behind it would ever be sent.
                message.move_to_end();
                return Err(error.into());
            }
        };
        if octets > 0 {
            stuffer.feed(&piece[..octets], self.connection.out());
            self.deadline = now + self.settings.timeouts.block;
        } else {
            stuffer.finish(self.connection.out());
            self.content = None;
            let mut said = Vec::new();
            self.client.content_sent(&mut said);
            self.send(&said);
            self.reset_deadline(now);
        }
        self.progress(now);
        Ok(true)
    }

    /// Gives the client the next message, or QUIT when there is none.
    fn next_message(&mut self) -> Result<bool, TurnEnd> {
        // Asking the hold means listing a folder: not for every wake-up.
        if !self.client.is_ready_for_message() || (self.queue_empty && self.client.in_flight() > 0) {
            return Ok(false);
        }
        let limit = self.settings.messages;
        let enough = self.settings.cancel.is_cancelled() || (limit > 0 && self.counters.offered >= limit);
        let mut said = Vec::new();
        match if enough { None } else { self.lock.next_message() } {
            Some(message) => {
                self.counters.offered += 1;
                match self.client.send_message(message.outgoing_message(), &mut said) {
                    Ok(()) => self.messages.push_back(message),
                    Err(result) => self.finish_attempt(message, &result)?,
                }
            }
            None if self.client.in_flight() == 0 => self.client.quit(&mut said),
            None => {
                self.queue_empty = true;
                return Ok(false);
            }
        }
        self.send(&said);
        if self.client.in_flight() <= 1 {
            self.reset_deadline(Instant::now());
        }
        Ok(true)
    }

    fn finish_message(&mut self, result: &DeliveryResult) -> Result<(), TurnEnd> {
        self.queue_empty = false;
        match self.messages.pop_front() {
            Some(message) => self.finish_attempt(message, result),
            None => Ok(()),
        }
    }

    fn finish_attempt(&mut self, message: QueuedMessage, result: &DeliveryResult) -> Result<(), TurnEnd> {
        let size = message.size;
        let peer = Peer { name: self.client.peer_name(), dsn: self.client.offered().dsn };
        let context = format!("session={} account={}", self.connection.trace.id, self.account);
        let attempt = Attempt { peer, retry: None, done: "delivered", context: &context };
        if self.settings.reporter.finish_attempt(message, result.clone(), &attempt, &mut self.lock).is_err() {
            // The disk does not take what has been done: to go on would be to do it again and again.
            return Err(TurnEnd("the outcome could not be kept".to_owned()));
        }
        for status in &result.recipients {
            *match status {
                RecipientStatus::Sent(_) => &mut self.counters.sent,
                RecipientStatus::Deferred(_) => &mut self.counters.deferred,
                RecipientStatus::Rejected(_) => &mut self.counters.rejected,
                RecipientStatus::InDoubt => &mut self.counters.in_doubt,
            } += 1;
        }
        if result.recipients.iter().any(|status| matches!(status, RecipientStatus::Sent(_))) {
            self.counters.octets += size;
        }
        Ok(())
    }

    /// Ends the session: what was under way goes back where it came from, or into doubt.
    fn end(&mut self, why: &str) {
        let gone = Reply::new(451, "4.4.2", "The connection was lost");
        for result in self.client.abandon(&gone) {
            // Logged where it failed; the mail stays as it is.
            let _ = self.finish_message(&result);
        }
        let counters = &self.counters;
        log::info!(
            "event=turn-ended session={} peer={} account={} delivered={} deferred={} refused={} in-doubt={} octets={} \
             seconds={:.3} reason={why:?}",
            self.id(),
            self.peer,
            self.account,
            counters.sent,
            counters.deferred,
            counters.rejected,
            counters.in_doubt,
            counters.octets,
            self.begun.elapsed().as_secs_f64()
        );
    }

    /// Lets go of the mail, and closes: in this order, so that a customer who sees the end and calls again
    /// finds its domains free. TLS ends with close_notify (RFC 8314 section 3.4).
    fn close(self) {
        drop(self.lock);
        self.connection.shutdown();
    }

    fn id(&self) -> &str {
        &self.connection.trace.id
    }

    fn send(&mut self, octets: &[u8]) {
        for line in octets.split_inclusive(|octet| *octet == b'\n') {
            self.connection.trace.sent(line);
        }
        self.connection.send(octets);
    }

    /// The peer has moved: patience begins anew, as long as the state allows (RFC 5321 section 4.5.3.2).
    fn reset_deadline(&mut self, now: Instant) {
        let times = &self.settings.timeouts;
        let patience = match self.client.awaiting() {
            _ if self.content.is_some() => times.block,
            _ if self.client.closing() => QUIT_TIMEOUT.min(times.command),
            awaiting => times.reply_timeout(awaiting),
        };
        self.deadline = now + patience;
    }

    fn progress(&mut self, now: Instant) {
        self.last_progress = now;
        if now.duration_since(self.last_heartbeat) > self.settings.timeouts.takeover / 4 {
            self.last_heartbeat = now;
            self.lock.heartbeat();
        }
    }

    fn check_deadlines(&self, now: Instant) -> Result<(), TurnEnd> {
        if now >= self.deadline {
            return Err(TurnEnd("the customer does not answer".to_owned()));
        }
        if now >= self.begun + self.settings.timeouts.turn {
            return Err(TurnEnd("the session has taken too long".to_owned()));
        }
        if now >= self.last_progress + self.settings.timeouts.takeover && self.lock.takeover_requested() {
            return Err(TurnEnd("taken over by another session of the customer".to_owned()));
        }
        Ok(())
    }
}
