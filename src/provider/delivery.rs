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
use crate::dialogue::REPLY_LINE_LIMIT;
use crate::outgoing::{Attempt, Desk, Peer};
use crate::queue::{Batch, Hold};
use crate::smtp::client::{Awaiting, Client, Fate, Halt, Outcome, Step};
use crate::smtp::content::Stuffer;
use crate::smtp::reply::{Reply, ReplyReader};
use crate::turn::{Turn, Turned};
use crate::wire::{Filled, Line, Stop, Wire};

/// Content is read and sent in pieces of so many octets.
const BLOCK: usize = 32 * 1024;
/// While more than this is unsent, no more content is read.
const HIGH_WATER: usize = 64 * 1024;
/// Pieces of work for one session before the next has its turn.
const QUANTUM: usize = 8;
/// How long the end of a session may take once nothing is at stake any more.
const FAREWELL: Duration = Duration::from_secs(10);
/// How often a stalled session looks whether somebody else wants its domains.
const LOOK_AROUND: Duration = Duration::from_secs(1);

/// The way to the delivery thread.
pub struct Turns {
    sender: Sender<Box<Turn>>,
    waker: OwnedFd,
    sessions: Arc<Sessions>,
    limit: usize,
}

/// How many turned sessions there are, on their way included.
#[derive(Default)]
struct Sessions {
    count: Mutex<usize>,
    none: Condvar,
}

impl Sessions {
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

impl Turns {
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
pub struct Delivery {
    turns: Receiver<Box<Turn>>,
    woken: OwnedFd,
    sessions: Arc<Sessions>,
    rules: Rules,
}

/// Times and limits of a turned session, and how it is stopped.
#[derive(Clone)]
pub struct Rules {
    pub timeouts: Timeouts,
    /// Messages in one session; 0: no limit.
    pub messages: usize,
    pub desk: Desk,
    /// Ends sessions behind the message under way.
    pub stop: Stop,
    /// Ends them at once.
    pub halt: Stop,
}

/// A delivery thread's two ends; `limit` is the number of turned sessions.
pub fn channel(limit: usize, rules: Rules) -> std::io::Result<(Turns, Delivery)> {
    // `Sessions` bounds it.
    let (sender, turns) = crossbeam_channel::unbounded();
    let (woken, waker) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK)?;
    let sessions = Arc::<Sessions>::default();
    let there = Turns { sender, waker, sessions: sessions.clone(), limit };
    Ok((there, Delivery { turns, woken, sessions, rules }))
}

impl Delivery {
    /// Runs until all [`Turns`] are gone and all sessions have ended, or `halt` is said.
    pub fn run(self) {
        let mut sessions: Vec<Call> = Vec::new();
        let mut open = true;
        while (open || !sessions.is_empty()) && !self.rules.halt.stopped() {
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
                sessions.extract_if(.., |session| session.due(now) && !self.work(session, now)).for_each(Call::close);
            }
        }
        for mut session in sessions {
            session.end("the provider is shutting down");
            session.close();
        }
    }

    fn begin(&self, turn: Box<Turn>, sessions: &mut Vec<Call>) {
        match catch_unwind(AssertUnwindSafe(|| Call::new(turn.begin(), &self.rules))) {
            Ok(session) => sessions.push(session),
            Err(_) => self.sessions.leave(),
        }
    }

    /// One session's piece of work; `false`: it has ended.
    fn work(&self, session: &mut Call, now: Instant) -> bool {
        let worked = catch_unwind(AssertUnwindSafe(|| session.work(now)));
        let ended = match worked {
            Ok(Ok(())) => return true,
            Ok(Err(Gone(why))) => catch_unwind(AssertUnwindSafe(|| session.end(&why))).is_err(),
            Err(_) => true,
        };
        if ended {
            log::error!("event=panic session={}", session.wire.trace.id);
        }
        self.sessions.leave();
        false
    }

    /// Waits until a session can go on, the earliest deadline, a new turn or a word to stop.
    fn wait(&self, sessions: &mut [Call], open: bool) {
        let now = Instant::now();
        let stopping = self.rules.stop.stopped();
        let mut until = now + Duration::from_secs(3600);
        let mut polls = vec![PollFd::from_borrowed_fd(self.rules.halt.fd(), PollFlags::IN)];
        // With the last sender gone this pipe would report its hang-up, again and again.
        if open {
            polls.push(PollFd::new(&self.woken, PollFlags::IN));
        }
        if !stopping {
            polls.push(PollFd::from_borrowed_fd(self.rules.stop.fd(), PollFlags::IN));
        }
        let first = polls.len();
        let mut owners = Vec::with_capacity(sessions.len());
        for (number, session) in sessions.iter_mut().enumerate() {
            session.wake = session.wake_at(now, stopping);
            until = until.min(session.wake);
            let wanted = session.wire.interest();
            for (descriptor, flags) in
                [(session.wire.input_fd(), wanted & PollFlags::IN), (session.wire.output_fd(), wanted & PollFlags::OUT)]
            {
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
struct Gone(String);

impl From<std::io::Error> for Gone {
    fn from(error: std::io::Error) -> Gone {
        Gone(error.to_string())
    }
}

/// One turned connection.
struct Call {
    wire: Wire,
    client: Client,
    hold: Hold,
    account: String,
    peer: String,
    rules: Rules,
    replies: ReplyReader,
    /// Messages given to the client, in order; the first is the one it speaks of.
    batches: VecDeque<Batch>,
    /// The hold had nothing more when last asked, and nothing was settled since.
    dry: bool,
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
    told_progress: Instant,
    tally: Tally,
}

/// What a session has done, for the log.
#[derive(Default)]
struct Tally {
    offered: usize,
    delivered: usize,
    deferred: usize,
    refused: usize,
    in_doubt: usize,
    octets: u64,
}

impl Call {
    fn new(turned: Turned, rules: &Rules) -> Call {
        let Turned { wire, client, hold, peer, account } = turned;
        let now = Instant::now();
        let domains: Vec<_> = hold.domains().map(|domain| domain.as_str()).collect();
        log::info!(
            "event=turned session={} peer={peer} account={account} domains={}",
            wire.trace.id,
            domains.join(",")
        );
        Call {
            wire,
            client,
            hold,
            account,
            peer,
            rules: rules.clone(),
            replies: ReplyReader::default(),
            batches: VecDeque::new(),
            dry: false,
            content: None,
            busy: true,
            readable: false,
            woken: false,
            wake: now,
            begun: now,
            deadline: now + rules.timeouts.greeting,
            last_progress: now,
            told_progress: now,
            tally: Tally::default(),
        }
    }

    /// When this session must be looked at even if its peer does nothing.
    fn wake_at(&self, now: Instant, stopping: bool) -> Instant {
        if self.busy || (stopping && self.client.wants_message() && self.client.in_flight() == 0) {
            return now;
        }
        let end = self.begun + self.rules.timeouts.turn;
        let stalled = self.last_progress + self.rules.timeouts.takeover;
        let look = if stalled > now { stalled } else { now + LOOK_AROUND };
        self.deadline.min(end).min(look)
    }

    /// Whether there may be work. The stalled ones must cost nothing while others are served.
    fn due(&mut self, now: Instant) -> bool {
        std::mem::take(&mut self.woken) || self.busy || now >= self.wake
    }

    /// A bounded piece of work.
    fn work(&mut self, now: Instant) -> Result<(), Gone> {
        // An error that comes with the last replies must not cost us these: a 250 that was seen is no doubt.
        let filled = match std::mem::take(&mut self.readable) {
            true => self.wire.fill().inspect(|_| self.wire.acknowledge()),
            false => Ok(Filled::Nothing),
        };
        let before = self.wire.unsent();
        self.busy = true;
        for _ in 0..QUANTUM {
            let replied = self.take_replies(now)?;
            let moved = self.send_content(now)? || self.offer()?;
            if let Err(error) = self.wire.flush() {
                let _ = self.wire.fill();
                self.take_replies(now)?;
                return Err(error.into());
            }
            // The flush may just have made room for more content: nobody else would wake us for it.
            let room = self.content.is_some() && self.wire.unsent() <= HIGH_WATER;
            if !replied && !moved && !room {
                self.busy = false;
                break;
            }
        }
        if filled? == Filled::End || self.wire.ended() {
            return Err(Gone("the customer closed the connection".to_owned()));
        }
        // Slow is not silent: whoever reads has time, in proportion.
        let sending = self.content.is_some() || self.client.awaiting() == Some(Awaiting::End);
        if sending && self.wire.unsent() < before {
            self.progress(now);
            self.deadline = self.deadline.max(now + self.rules.timeouts.block);
        }
        self.check_patience(now)
    }

    fn take_replies(&mut self, now: Instant) -> Result<bool, Gone> {
        let mut any = false;
        loop {
            let line = match self.wire.take_reply_line(REPLY_LINE_LIMIT) {
                Line::Whole(line) => line,
                Line::None => return Ok(any),
                Line::TooLong => return Err(Gone("a reply line without end".to_owned())),
            };
            self.wire.trace.heard(&line);
            let reply = self.replies.line(&line).map_err(|error| Gone(format!("this is no reply: {:?}", error.0)))?;
            if let Some(reply) = reply {
                any = true;
                self.progress(now);
                self.answer(reply, now)?;
            }
        }
    }

    fn answer(&mut self, reply: Reply, now: Instant) -> Result<(), Gone> {
        let farewell = reply.code() == 421;
        let mut said = Vec::new();
        let step = self.client.reply(reply.clone(), &mut said).map_err(|broken| Gone(broken.0.to_owned()))?;
        self.say(&said);
        self.rearm(now);
        match step {
            Step::Wait | Step::Ready => {}
            Step::Content { .. } => self.content = Some(Stuffer::new()),
            Step::Settled(outcome) => self.settle(&outcome)?,
            Step::Closed => return Err(Gone("done".to_owned())),
            Step::Halt(Halt::Refused { what, reply }) => {
                log::warn!("event=turn-refused session={} what={what:?} reply={:?}", self.id(), reply.to_string());
            }
            // None of them is in the plan of a turned client.
            Step::Halt(_) | Step::StartTls | Step::Answered(_) | Step::Turned => {
                return Err(Gone("no such step".to_owned()));
            }
        }
        if farewell {
            return Err(Gone(format!("the customer said {reply}")));
        }
        Ok(())
    }

    /// Sends a piece of the content under way.
    fn send_content(&mut self, now: Instant) -> Result<bool, Gone> {
        let (Some(stuffer), Some(batch)) = (&mut self.content, self.batches.front_mut()) else {
            return Ok(false);
        };
        if self.wire.unsent() > HIGH_WATER {
            return Ok(false);
        }
        let mut piece = [0; BLOCK];
        let octets = match batch.read(&mut piece) {
            Ok(octets) => octets,
            Err(error) => {
                // It goes to the end of the line, or nothing behind it would ever be sent.
                batch.put_last();
                return Err(error.into());
            }
        };
        if octets > 0 {
            stuffer.feed(&piece[..octets], self.wire.out());
            self.deadline = now + self.rules.timeouts.block;
        } else {
            stuffer.finish(self.wire.out());
            self.content = None;
            let mut said = Vec::new();
            self.client.content_sent(&mut said);
            self.say(&said);
            self.rearm(now);
        }
        self.progress(now);
        Ok(true)
    }

    /// Gives the client the next message, or QUIT when there is none.
    fn offer(&mut self) -> Result<bool, Gone> {
        // Asking the hold means listing a folder: not for every wake-up.
        if !self.client.wants_message() || (self.dry && self.client.in_flight() > 0) {
            return Ok(false);
        }
        let limit = self.rules.messages;
        let enough = self.rules.stop.stopped() || (limit > 0 && self.tally.offered >= limit);
        let mut said = Vec::new();
        match if enough { None } else { self.hold.offer() } {
            Some(batch) => {
                self.tally.offered += 1;
                match self.client.send(batch.message(), &mut said) {
                    Ok(()) => self.batches.push_back(batch),
                    Err(outcome) => self.settle_batch(batch, &outcome)?,
                }
            }
            None if self.client.in_flight() == 0 => self.client.quit(&mut said),
            None => {
                self.dry = true;
                return Ok(false);
            }
        }
        self.say(&said);
        if self.client.in_flight() <= 1 {
            self.rearm(Instant::now());
        }
        Ok(true)
    }

    fn settle(&mut self, outcome: &Outcome) -> Result<(), Gone> {
        self.dry = false;
        match self.batches.pop_front() {
            Some(batch) => self.settle_batch(batch, outcome),
            None => Ok(()),
        }
    }

    fn settle_batch(&mut self, batch: Batch, outcome: &Outcome) -> Result<(), Gone> {
        let size = batch.size;
        let peer = Peer { name: self.client.peer_name(), dsn: self.client.offered().dsn };
        let context = format!("session={} account={}", self.wire.trace.id, self.account);
        let attempt = Attempt { peer, retry: None, done: "delivered", context: &context };
        if self.rules.desk.conclude(batch, outcome.clone(), &attempt, &mut self.hold).is_err() {
            // The disk does not take what has been done: to go on would be to do it again and again.
            return Err(Gone("the outcome could not be kept".to_owned()));
        }
        for fate in &outcome.fates {
            *match fate {
                Fate::Delivered(_) => &mut self.tally.delivered,
                Fate::Deferred(_) => &mut self.tally.deferred,
                Fate::Refused(_) => &mut self.tally.refused,
                Fate::InDoubt => &mut self.tally.in_doubt,
            } += 1;
        }
        if outcome.fates.iter().any(|fate| matches!(fate, Fate::Delivered(_))) {
            self.tally.octets += size;
        }
        Ok(())
    }

    /// Ends the session: what was under way goes back where it came from, or into doubt.
    fn end(&mut self, why: &str) {
        let gone = Reply::new(451, "4.4.2", "The connection was lost");
        for outcome in self.client.abandon(&gone) {
            // Logged where it failed; the mail stays as it is.
            let _ = self.settle(&outcome);
        }
        let tally = &self.tally;
        log::info!(
            "event=turn-ended session={} peer={} account={} delivered={} deferred={} refused={} in-doubt={} octets={} \
             seconds={:.3} reason={why:?}",
            self.id(),
            self.peer,
            self.account,
            tally.delivered,
            tally.deferred,
            tally.refused,
            tally.in_doubt,
            tally.octets,
            self.begun.elapsed().as_secs_f64()
        );
    }

    /// Lets go of the mail, and closes: in this order, so that a customer who sees the end and calls again
    /// finds its domains free. TLS ends with close_notify (RFC 8314 section 3.4).
    fn close(self) {
        drop(self.hold);
        self.wire.shutdown();
    }

    fn id(&self) -> &str {
        &self.wire.trace.id
    }

    fn say(&mut self, octets: &[u8]) {
        for line in octets.split_inclusive(|octet| *octet == b'\n') {
            self.wire.trace.said(line);
        }
        self.wire.say(octets);
    }

    /// The peer has moved: patience begins anew, as long as the state allows (RFC 5321 section 4.5.3.2).
    fn rearm(&mut self, now: Instant) {
        let times = &self.rules.timeouts;
        let patience = match self.client.awaiting() {
            _ if self.content.is_some() => times.block,
            _ if self.client.closing() => FAREWELL.min(times.command),
            awaiting => times.patience(awaiting),
        };
        self.deadline = now + patience;
    }

    fn progress(&mut self, now: Instant) {
        self.last_progress = now;
        if now.duration_since(self.told_progress) > self.rules.timeouts.takeover / 4 {
            self.told_progress = now;
            self.hold.progress();
        }
    }

    fn check_patience(&self, now: Instant) -> Result<(), Gone> {
        if now >= self.deadline {
            return Err(Gone("the customer does not answer".to_owned()));
        }
        if now >= self.begun + self.rules.timeouts.turn {
            return Err(Gone("the session has taken too long".to_owned()));
        }
        if now >= self.last_progress + self.rules.timeouts.takeover && self.hold.wanted() {
            return Err(Gone("taken over by another session of the customer".to_owned()));
        }
        Ok(())
    }
}
