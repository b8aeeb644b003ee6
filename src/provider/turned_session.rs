//! One turned connection: the driver of the client role that never waits for its peer.
//!
//! [`TurnedSession::work`] does a bounded piece of work: it reads replies, sends commands and content, settles messages.
//! The delivery thread calls it whenever there may be something to do.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::net::cancel::CancelToken;
use crate::net::connection::{Connection, Filled};
use crate::net::trace::quoted;
use crate::queue::{QueueLock, QueuedMessage};
use crate::report::{Attempt, Reporter, Via};
use crate::session::{ContentOutput, ReplyInput, Timeouts, send_commands};
use crate::smtp::client::{Abort, Awaiting, Client, ClientStep, Rejection};
use crate::smtp::reply::Reply;
use crate::smtp::status::{DeliveryResult, RecipientStatus, connection_lost, ends_session};
use crate::turn::Turned;

/// While more octets than this are unsent, no more content is read.
const HIGH_WATER: usize = 64 * 1024;

/// Steps of work for one session before the next has its turn.
const STEPS_PER_ROUND: usize = 8;

/// How long the session waits for the reply to QUIT.
const QUIT_TIMEOUT: Duration = Duration::from_secs(10);

/// How often a stalled session looks whether another session wants its queues.
const TAKEOVER_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Times and limits of a turned session, and how it is cancelled.
#[derive(Clone)]
pub struct TurnSettings {
    pub timeouts: Timeouts,
    /// Messages in one session; 0: no limit.
    pub messages: usize,
    pub reporter: Reporter,
    /// Ends sessions after the message under way.
    pub cancel: CancelToken,
    /// Ends them at once.
    pub abort: CancelToken,
}

/// How a session ends.
#[derive(Debug)]
pub enum TurnEnd {
    /// The customer has replied to QUIT.
    Done,
    /// For this reason.
    Failed(String),
}

impl TurnEnd {
    fn failed(reason: &str) -> TurnEnd {
        TurnEnd::Failed(reason.to_owned())
    }
}

/// For the log.
impl std::fmt::Display for TurnEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            TurnEnd::Done => f.write_str("done"),
            TurnEnd::Failed(reason) => f.write_str(reason),
        }
    }
}

impl From<std::io::Error> for TurnEnd {
    fn from(error: std::io::Error) -> TurnEnd {
        TurnEnd::Failed(error.to_string())
    }
}

/// One turned connection.
pub struct TurnedSession {
    connection: Connection,
    client: Client,
    lock: QueueLock,
    account: String,
    peer: String,
    settings: TurnSettings,
    replies: ReplyInput,
    /// Messages given to the client, in order; its replies are about the first.
    messages: VecDeque<QueuedMessage>,
    /// The lock offered nothing when last asked, and nothing was settled since.
    queue_empty: bool,
    /// The content of the first message is being sent.
    content: Option<ContentOutput>,
    /// There is more to do without waiting.
    busy: bool,
    /// The poller has found input.
    readable: bool,
    /// The poller has found anything.
    woken: bool,
    /// When to look at the session if the poller finds nothing.
    wake: Instant,
    begun: Instant,
    /// When the peer must have done its next step.
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
    pub fn new(turned: Turned, settings: &TurnSettings) -> TurnedSession {
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
            settings: settings.clone(),
            replies: ReplyInput::default(),
            messages: VecDeque::new(),
            queue_empty: false,
            content: None,
            busy: true,
            readable: false,
            woken: false,
            wake: now,
            begun: now,
            deadline: now + settings.timeouts.greeting,
            last_progress: now,
            last_heartbeat: now,
            counters: TurnCounters::default(),
        }
    }

    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    pub fn id(&self) -> &str {
        &self.connection.trace.id
    }

    /// Computes when the session must be looked at even if its peer does nothing, and returns that.
    pub fn schedule(&mut self, now: Instant, cancelled: bool) -> Instant {
        self.wake = self.next_wake(now, cancelled);
        self.wake
    }

    fn next_wake(&self, now: Instant, cancelled: bool) -> Instant {
        if self.busy || (cancelled && self.client.is_ready_for_message() && self.client.in_flight() == 0) {
            return now;
        }
        let end = self.begun + self.settings.timeouts.turn;
        let stalled = self.last_progress + self.settings.timeouts.takeover;
        let check = if stalled > now { stalled } else { now + TAKEOVER_CHECK_INTERVAL };
        self.deadline.min(end).min(check)
    }

    /// The poller has found something on the connection; `readable`: input, or its end.
    pub fn wake_up(&mut self, readable: bool) {
        self.woken = true;
        self.readable |= readable;
    }

    /// Whether there may be work, and forgets that the poller said so. Stalled sessions must cost nothing while others
    /// are served.
    pub fn take_wake_up(&mut self, now: Instant) -> bool {
        std::mem::take(&mut self.woken) || self.busy || now >= self.wake
    }

    /// Does a bounded piece of work.
    ///
    /// # Errors
    /// How the session has ended.
    pub fn work(&mut self, now: Instant) -> Result<(), TurnEnd> {
        // The last replies may arrive together with an error. They are handled first: a 250 that was received is no doubt.
        let filled = match std::mem::take(&mut self.readable) {
            true => self.connection.fill().inspect(|_| self.connection.acknowledge()),
            false => Ok(Filled::Nothing),
        };
        let before = self.connection.unsent();
        self.busy = true;
        for _ in 0..STEPS_PER_ROUND {
            let replied = self.take_replies(now)?;
            let sent = self.send_content(now)? || self.next_message()?;
            if let Err(error) = self.connection.flush() {
                let _ = self.connection.fill();
                self.take_replies(now)?;
                return Err(error.into());
            }
            // The flush may have made room for more content: the poller would not report that.
            let room = self.content.is_some() && self.connection.unsent() <= HIGH_WATER;
            if !replied && !sent && !room {
                self.busy = false;
                break;
            }
        }
        if filled? == Filled::End || self.connection.ended() {
            return Err(TurnEnd::failed("the customer closed the connection"));
        }
        // A slow peer is not a silent one: while it reads, it has more time.
        let sending = self.content.is_some() || self.client.awaiting() == Some(Awaiting::End);
        if sending && self.connection.unsent() < before {
            self.progress(now);
            self.deadline = self.deadline.max(now + self.settings.timeouts.block);
        }
        self.check_deadlines(now)
    }

    fn take_replies(&mut self, now: Instant) -> Result<bool, TurnEnd> {
        let mut any = false;
        while let Some(reply) = self.replies.next(&mut self.connection).map_err(TurnEnd::Failed)? {
            any = true;
            self.progress(now);
            self.handle_reply(reply, now)?;
        }
        Ok(any)
    }

    fn handle_reply(&mut self, reply: Reply, now: Instant) -> Result<(), TurnEnd> {
        let last = ends_session(&reply);
        let mut commands = Vec::new();
        let step = self.client.reply(reply.clone(), &mut commands);
        let step = step.map_err(|violation| TurnEnd::failed(violation.0))?;
        self.send(&commands);
        self.reset_deadline(now);
        match step {
            ClientStep::Wait | ClientStep::Ready => {}
            ClientStep::Content { chunk } => {
                let size = self.messages.front().map_or(0, |message| message.size);
                self.content = Some(ContentOutput::new(chunk, size));
            }
            ClientStep::MessageDone(result) => self.finish_message(&result)?,
            ClientStep::Closed => return Err(TurnEnd::Done),
            ClientStep::Abort(Abort::Rejected(Rejection { stage, reply })) => {
                log::warn!("event=turn-rejected session={} stage=\"{stage}\" reply={}", self.id(), quoted(reply));
            }
            // The options of a turned client lead to none of them.
            ClientStep::Abort(_) | ClientStep::StartTls | ClientStep::Replied(_) | ClientStep::Turned => {
                return Err(TurnEnd::failed("a step that no turned session has"));
            }
        }
        match last {
            true => Err(TurnEnd::Failed(format!("the customer ended the session: {reply}"))),
            false => Ok(()),
        }
    }

    /// Sends a block of the content under way. Returns whether there was any.
    fn send_content(&mut self, now: Instant) -> Result<bool, TurnEnd> {
        let (Some(content), Some(message)) = (&mut self.content, self.messages.front_mut()) else {
            return Ok(false);
        };
        if self.connection.unsent() > HIGH_WATER {
            return Ok(false);
        }
        match content.send_block(message, &mut self.connection) {
            Err(error) => {
                // Otherwise the message would end every session, and those after it would never be sent.
                message.move_to_end();
                return Err(error.into());
            }
            Ok(false) => self.deadline = now + self.settings.timeouts.block,
            Ok(true) => {
                self.content = None;
                let mut commands = Vec::new();
                self.client.content_sent(&mut commands);
                self.send(&commands);
                self.reset_deadline(now);
            }
        }
        self.progress(now);
        Ok(true)
    }

    /// Gives the client the next message, or QUIT if there is none. Returns whether there was anything to do.
    fn next_message(&mut self) -> Result<bool, TurnEnd> {
        // To ask the lock means to list a directory: not at every wake-up.
        if !self.client.is_ready_for_message() || (self.queue_empty && self.client.in_flight() > 0) {
            return Ok(false);
        }
        let limit = self.settings.messages;
        let enough = self.settings.cancel.is_cancelled() || (limit > 0 && self.counters.offered >= limit);
        let mut commands = Vec::new();
        match if enough { None } else { self.lock.next_message() } {
            Some(message) => {
                self.counters.offered += 1;
                match self.client.send_message(message.outgoing_message(), &mut commands) {
                    Ok(()) => self.messages.push_back(message),
                    Err(result) => self.finish_attempt(message, &result)?,
                }
            }
            None if self.client.in_flight() == 0 => self.client.quit(&mut commands),
            None => {
                self.queue_empty = true;
                return Ok(false);
            }
        }
        self.send(&commands);
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
        let attempt = Attempt {
            session: &self.connection.trace.id,
            via: Via::Atrn,
            relay: &self.peer,
            peer: self.client.peer_name(),
            peer_sends_dsn: self.client.extensions().dsn,
            retry: None,
        };
        if self.settings.reporter.finish_attempt(message, result.clone(), &attempt, &mut self.lock).is_err() {
            // The disk does not record what was done: to go on would be to do it again and again.
            return Err(TurnEnd::failed("the result could not be recorded"));
        }
        for status in &result.recipients {
            *match status {
                RecipientStatus::Sent(_) => &mut self.counters.sent,
                RecipientStatus::Deferred(_) => &mut self.counters.deferred,
                RecipientStatus::Rejected(_) => &mut self.counters.rejected,
                RecipientStatus::InDoubt => &mut self.counters.in_doubt,
            } += 1;
        }
        if result.recipients.iter().any(RecipientStatus::is_sent) {
            self.counters.octets += size;
        }
        Ok(())
    }

    /// Ends the session: messages under way go back to their queue, or are in doubt.
    pub fn end(&mut self, reason: &TurnEnd) {
        for result in self.client.abandon(&connection_lost("The connection was lost")) {
            // A failure was logged where it happened; the message stays as it is.
            let _ = self.finish_message(&result);
        }
        let counters = &self.counters;
        log::info!(
            "event=turn-ended session={} peer={} account={} sent={} deferred={} rejected={} in-doubt={} octets={} \
             duration={:.3} reason={}",
            self.id(),
            self.peer,
            self.account,
            counters.sent,
            counters.deferred,
            counters.rejected,
            counters.in_doubt,
            counters.octets,
            self.begun.elapsed().as_secs_f64(),
            quoted(reason)
        );
    }

    /// Releases the queues, then closes: a customer that sees the end and calls again finds them unlocked. TLS ends with
    /// close_notify (RFC 8314 section 3.4).
    pub fn close(self) {
        drop(self.lock);
        self.connection.shutdown();
    }

    fn send(&mut self, octets: &[u8]) {
        send_commands(&mut self.connection, &self.client, octets);
    }

    /// The peer has done its step: the deadline of the next one begins (RFC 5321 section 4.5.3.2).
    fn reset_deadline(&mut self, now: Instant) {
        let timeouts = &self.settings.timeouts;
        let timeout = match self.client.awaiting() {
            _ if self.content.is_some() => timeouts.block,
            _ if self.client.closing() => QUIT_TIMEOUT.min(timeouts.command),
            awaiting => timeouts.reply_timeout(awaiting),
        };
        self.deadline = now + timeout;
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
            return Err(TurnEnd::failed("the customer does not answer"));
        }
        if now >= self.begun + self.settings.timeouts.turn {
            return Err(TurnEnd::failed("the session has taken too long"));
        }
        if now >= self.last_progress + self.settings.timeouts.takeover && self.lock.takeover_requested() {
            return Err(TurnEnd::failed("taken over by another session of the customer"));
        }
        Ok(())
    }
}
