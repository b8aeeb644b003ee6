//! One turned session: the provider is the SMTP client and sends the mail that it holds (RFC 2645 section 5.3).
//!
//! [`TurnedSession::work`] does a bounded piece of work: it reads replies, and sends commands and content. It never waits for
//! the customer or for the disk. The delivery thread calls it whenever there may be something to do.
//!
//! The storage threads open, read and settle the messages ([`turned_queue`](super::turned_queue)), in order and a
//! little ahead:
//!
//! ```text
//! Open ─▶ ahead ─▶ given to the client ─▶ replies ─▶ Settle ─▶ … all settled, and none is left ─▶ QUIT ─▶ End
//! ```

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::storage::{LaneHandle, StoragePool};
use super::turn_settings::{TurnLimits, TurnSettings};
use super::turned_queue::{
    OpenedMessage, POSTPONED_LIMIT, QueueJob, QueueReport, RECIPIENTS_AHEAD, SessionPermit, Settlement, TurnEnd,
    TurnParties, TurnedQueue,
};
use crate::mail::address::Domain;
use crate::net::connection::{Connection, Filled};
use crate::net::trace::quoted;
use crate::session::pace::PaceClock;
use crate::session::{ContentOutput, ReplyInput, send_commands};
use crate::smtp::client::{Abort, Client, ClientStep, Rejection, Stage};
use crate::smtp::limits;
use crate::smtp::reply::Reply;
use crate::smtp::status::{DeliveryResult, RecipientStatus, connection_lost, ends_session};
use crate::turn::Turned;

/// While more octets than this are unsent, the session reads no more content: a customer that reads slowly must not fill the
/// memory.
const HIGH_WATER: usize = 64 * 1024;

/// Steps of work for one session before it is the next session's turn.
const STEPS_PER_ROUND: usize = 8;

/// How long the session waits for the reply to QUIT.
const QUIT_TIMEOUT: Duration = Duration::from_secs(10);

/// How often a stalled session checks whether another session has requested its queues.
const TAKEOVER_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// How many messages are opened before the client is ready for them.
const MESSAGES_AHEAD: usize = 4;

/// Octets of content that are read before they can be sent.
const OCTETS_AHEAD: usize = 32 * 1024;

/// Octets of the content under way that are read at a time.
const READ_SIZE: usize = 32 * 1024;

/// If fewer octets than this are left of the content under way, more are read.
const READ_AGAIN: usize = 32 * 1024;

/// While this many messages are being settled, no other is begun: after a crash, each of them is sent once more.
const SETTLING_LIMIT: usize = 4;

/// The maximum of a session's descriptors: its connection, its lock, and messages ahead, under way or being settled.
pub const DESCRIPTORS: usize = 2 + MESSAGES_AHEAD + SETTLING_LIMIT + 1;

/// Reads from the connection in one piece of work.
const READS_PER_ROUND: usize = 4;

/// How often the session reads from a connection that the poller cannot watch, because it is a file.
const UNWATCHED_INTERVAL: Duration = Duration::from_millis(20);

/// The reason of a session that has sent all mail, for the log.
pub const DONE: &str = "done";

/// A turned session. The lock on the mail belongs to its lane.
pub struct TurnedSession {
    pub(super) connection: Connection,
    client: Client,
    lane: LaneHandle<TurnedQueue>,
    account: String,
    domains: Vec<Domain>,
    settings: Arc<TurnSettings>,
    limits: TurnLimits,
    replies: ReplyInput,
    /// Messages that are opened and not yet given to the client, in order.
    ahead: VecDeque<OpenedMessage>,
    /// Messages given to the client, in order; its replies are about the first.
    sending: VecDeque<OpenedMessage>,
    /// The rest of the content of the first of them, while it is being sent.
    content: Option<ContentOutput>,
    storage: StorageState,
    /// A message was given to the client.
    begun: bool,
    /// Messages that are under way, or that were sent to at least one recipient.
    messages: usize,
    /// Messages with a rejected recipient, whose settlement may be postponed to the end of the session.
    rejected: usize,
    /// Octets of the content of `messages`.
    octets: u64,
    /// Why the session sends no more mail although there is more.
    stop: Option<&'static str>,
    /// The customer has replied to QUIT.
    done: bool,
    /// The session has ended, and waits until its lock is released.
    pub(super) ended: bool,
    /// There is more work to do without waiting.
    pub(super) busy: bool,
    /// There may be octets to read.
    readable: bool,
    /// The customer may have closed its side: the next read shows it.
    closed: bool,
    /// The poller cannot watch the connection.
    pub(super) unwatched: bool,
    /// When the customer's next step is due.
    deadline: Instant,
    /// When the session must end; content that flows extends it.
    turn_deadline: Instant,
    /// By how much the content of the first message extends it.
    pace: PaceClock,
    last_progress: Instant,
    last_heartbeat: Instant,
    next_takeover_check: Instant,
}

/// What the storage threads do for a session.
#[derive(Default)]
struct StorageState {
    /// They are opening messages.
    opening: bool,
    /// When they looked last, the queue had no more messages, and none was settled since.
    queue_empty: bool,
    /// They are reading the content of the first message.
    reading: bool,
    content_failed: Option<io::Error>,
    /// How many messages they are settling.
    settling: usize,
    /// They are checking whether another session has requested the lock.
    checking: bool,
    taken_over: bool,
}

impl TurnedSession {
    /// Begins the session: the client waits for the customer's greeting. `number` is the number of its lane.
    pub fn new(
        turned: Turned, (settings, limits): (Arc<TurnSettings>, TurnLimits), pool: &StoragePool<TurnedQueue>,
        number: usize, permit: SessionPermit,
    ) -> TurnedSession {
        let Turned { connection, client, lock, peer, account } = turned;
        let now = Instant::now();
        let domains: Vec<_> = lock.domains().cloned().collect();
        let names: Vec<_> = domains.iter().map(Domain::as_str).collect();
        let session = connection.trace.id.clone();
        log::info!("event=turned session={session} peer={peer} account={account} domains={}", names.join(","));
        let parties = TurnParties { session, account: account.clone(), peer };
        let queue = TurnedQueue::new(lock, parties, settings.clone(), permit);
        TurnedSession {
            connection,
            client,
            lane: pool.lane(number, queue),
            account,
            domains,
            replies: ReplyInput::default(),
            ahead: VecDeque::new(),
            sending: VecDeque::new(),
            content: None,
            storage: StorageState::default(),
            begun: false,
            messages: 0,
            rejected: 0,
            octets: 0,
            stop: None,
            done: false,
            ended: false,
            busy: true,
            readable: true,
            closed: false,
            unwatched: false,
            deadline: now + settings.timeouts.greeting,
            turn_deadline: now + limits.time,
            pace: PaceClock::new(limits::KNOWN_PEER_PACE, 0, now),
            last_progress: now,
            last_heartbeat: now,
            next_takeover_check: now + settings.timeouts.takeover,
            settings,
            limits,
        }
    }

    /// When there will be work even if the connection does not become ready and no report arrives; `None`: never.
    pub fn next_wake_up(&self, now: Instant) -> Option<Instant> {
        let deadline =
            if self.waits_for_storage() { self.turn_deadline } else { self.deadline.min(self.turn_deadline) };
        let check = self.next_takeover_check.max(self.last_progress + self.settings.timeouts.takeover);
        let until = if self.storage.checking { deadline } else { deadline.min(check) };
        let until = if self.unwatched { until.min(now + UNWATCHED_INTERVAL) } else { until };
        (!self.ended).then_some(until)
    }

    /// Reports that the connection has become ready. `closed`: see [`ReadyDescriptor`](crate::net::poller::ReadyDescriptor).
    pub fn set_ready(&mut self, closed: bool) {
        self.readable = true;
        self.closed |= closed;
    }

    /// Handles a report of its lane.
    pub fn receive(&mut self, report: QueueReport, now: Instant) {
        if !matches!(report, QueueReport::TakeoverRequested(_)) {
            // A customer that waits for the provider's disk is not stalled.
            self.last_progress = now;
        }
        match report {
            QueueReport::Opened(message) => self.ahead.push_back(message),
            QueueReport::AllOpened { more } => (self.storage.opening, self.storage.queue_empty) = (false, !more),
            QueueReport::Content { octets, whole } => {
                self.storage.reading = false;
                if let Some(message) = self.sending.front_mut() {
                    match message.octets.is_empty() {
                        true => message.octets = octets,
                        false => message.octets.extend_from_slice(&octets),
                    }
                    message.whole = whole;
                }
            }
            QueueReport::ContentFailed(error) => {
                (self.storage.reading, self.storage.content_failed) = (false, Some(error));
            }
            // The queue may offer the message again: the customer may permit fewer recipients in one transaction.
            QueueReport::Settled => {
                (self.storage.settling, self.storage.queue_empty) = (self.storage.settling - 1, false);
            }
            QueueReport::TakeoverRequested(requested) => {
                (self.storage.checking, self.storage.taken_over) = (false, requested);
            }
            QueueReport::Released => {}
        }
    }

    /// Does a bounded piece of work. Returns whether the session goes on; if not, the customer has replied to QUIT.
    ///
    /// # Errors
    /// Why the session cannot go on.
    pub fn work(&mut self, now: Instant) -> io::Result<bool> {
        // Handle the replies that arrived before an error of the connection: a message with the reply 250 is not in doubt.
        let filled = self.fill();
        let (unsent_before, mut flushed) = (self.connection.unsent(), 0);
        self.busy = true;
        for _ in 0..STEPS_PER_ROUND {
            let replied = self.handle_replies(now)?;
            let sent = !self.done && self.send_mail(now)?;
            let unsent = self.connection.unsent();
            if let Err(error) = self.connection.flush() {
                let _ = self.connection.fill();
                self.handle_replies(now)?;
                self.handle_last_reply(now)?;
                return if self.done { Ok(false) } else { Err(error) };
            }
            if self.done {
                return Ok(false);
            }
            flushed += unsent.saturating_sub(self.connection.unsent());
            // The flush may have made room for more content. The poller would not report that.
            let more = self.may_send_content() || self.wants_content();
            let more = more || self.connection.unsent() > 0 && !self.connection.congested();
            if !replied && !sent && !more {
                self.busy = self.readable;
                break;
            }
        }
        if !matches!(filled, Ok(Filled::Bytes(_) | Filled::Nothing)) || self.connection.ended() {
            self.handle_last_reply(now)?;
            filled?;
            if self.done {
                return Ok(false);
            }
            // If the end was reported together with octets, this read returns its error.
            self.connection.fill()?;
            return Err(io::Error::other("the customer closed the connection"));
        }
        self.open_ahead();
        // A customer that reads slowly is not stalled: extend the deadlines.
        let sending = self.content.is_some() || self.client.awaiting() == Some(Stage::Content);
        let earned = if sending { self.pace.earn(flushed, now) } else { Duration::ZERO };
        self.turn_deadline += earned;
        if sending && self.connection.unsent() < unsent_before {
            self.record_progress(now);
            self.deadline = self.deadline.max(now + self.settings.timeouts.block + earned);
        }
        self.check_deadlines(now)?;
        Ok(true)
    }

    /// Reads a bounded amount of what has arrived.
    fn fill(&mut self) -> io::Result<Filled> {
        let mut arrived = Filled::Nothing;
        self.readable |= self.unwatched;
        for _ in 0..READS_PER_ROUND {
            if !self.readable {
                break;
            }
            let filled = self.connection.fill()?;
            self.closed &= filled != Filled::Nothing;
            self.readable = self.closed || !self.connection.drained();
            match filled {
                Filled::Bytes(_) => {
                    self.connection.acknowledge();
                    arrived = filled;
                }
                Filled::Nothing => break,
                Filled::End => return Ok(filled),
            }
        }
        Ok(arrived)
    }

    /// Handles all replies that have arrived. Returns whether there were any.
    fn handle_replies(&mut self, now: Instant) -> io::Result<bool> {
        let mut any = false;
        while !self.done
            && let Some(reply) = self.replies.next(&mut self.connection).map_err(io::Error::other)?
        {
            any = true;
            self.record_progress(now);
            self.handle_reply(reply, now)?;
        }
        Ok(any)
    }

    /// Handles a last reply without a line end: the customer closed the connection after it.
    fn handle_last_reply(&mut self, now: Instant) -> io::Result<()> {
        match self.replies.next_at_end(&mut self.connection) {
            Some(reply) if !self.done => self.handle_reply(reply, now),
            _ => Ok(()),
        }
    }

    fn handle_reply(&mut self, reply: Reply, now: Instant) -> io::Result<()> {
        let mut commands = Vec::new();
        let step = self.client.reply(reply.clone(), &mut commands);
        let step = step.map_err(|violation| io::Error::other(violation.0))?;
        self.send(&commands);
        self.reset_deadline(now);
        match step {
            ClientStep::Wait | ClientStep::Ready => {}
            ClientStep::Content { chunk } => {
                let size = self.sending.front().map_or(0, |opened| opened.message.size);
                self.content = Some(ContentOutput::new(chunk, size));
                self.pace = PaceClock::new(limits::KNOWN_PEER_PACE, size, now);
            }
            ClientStep::MessageDone(result) => {
                self.turn_deadline -= self.pace.stop(now);
                self.settle_first(result);
            }
            ClientStep::Closed => {
                self.done = true;
                return Ok(());
            }
            ClientStep::Abort(Abort::Rejected(Rejection { stage, reply })) => {
                let session = &self.connection.trace.id;
                log::warn!("event=turn-rejected session={session} stage=\"{stage}\" reply={}", quoted(reply));
            }
            // With the options of a turned session, the client does none of these.
            ClientStep::Abort(_) | ClientStep::StartTls | ClientStep::Replied(_) | ClientStep::Turned => {
                return Err(io::Error::other("a step that no turned session has"));
            }
        }
        match ends_session(&reply) {
            true => Err(io::Error::other(format!("the customer ended the session: {reply}"))),
            false => Ok(()),
        }
    }

    /// Sends content and begins messages, as far as possible now. Returns whether there was anything to do.
    fn send_mail(&mut self, now: Instant) -> io::Result<bool> {
        let mut any = false;
        while self.send_content(now)? || self.next_message() {
            any = true;
        }
        Ok(any)
    }

    /// Whether a block of the content under way, or its end, may be sent now.
    fn may_send_content(&self) -> bool {
        let is_ready = |opened: &OpenedMessage| opened.whole || !opened.octets.is_empty();
        self.content.is_some()
            && self.connection.unsent() <= HIGH_WATER
            && (self.storage.content_failed.is_some() || self.sending.front().is_some_and(is_ready))
    }

    /// Whether to read more of the content under way: not while too much of it is unsent.
    fn wants_content(&self) -> bool {
        let few = |opened: &OpenedMessage| !opened.whole && opened.octets.len() < READ_AGAIN;
        self.content.is_some()
            && !self.storage.reading
            && self.connection.unsent() <= HIGH_WATER
            && self.sending.front().is_some_and(few)
    }

    /// Sends a block of the content under way. Returns whether there was one to send.
    fn send_content(&mut self, now: Instant) -> io::Result<bool> {
        let may_send = self.may_send_content();
        let (Some(content), Some(opened)) = (&mut self.content, self.sending.front_mut()) else {
            return Ok(false);
        };
        if may_send {
            if let Some(error) = self.storage.content_failed.take() {
                return Err(error);
            }
            let mut rest = opened.octets.as_slice();
            let ended = content.send_block(&mut rest, &mut self.connection)?;
            let sent = opened.octets.len() - rest.len();
            opened.octets.drain(..sent);
            if opened.octets.is_empty() {
                // Free the buffer: the customer may not read on for minutes.
                opened.octets = Vec::new();
            }
            self.deadline = now + self.settings.timeouts.block;
            if ended {
                (self.content, opened.octets) = (None, Vec::new());
                let mut commands = Vec::new();
                self.client.content_sent(&mut commands);
                self.send(&commands);
                self.reset_deadline(now);
            }
            self.record_progress(now);
        }
        if self.wants_content()
            && let Some(opened) = self.sending.front()
        {
            self.storage.reading = true;
            self.lane.submit(QueueJob::Read { number: opened.number, octets: READ_SIZE });
        }
        Ok(may_send)
    }

    /// Gives the client the next message, or has it send QUIT if there is none. Returns whether there was anything to do.
    fn next_message(&mut self) -> bool {
        let idle = self.client.in_flight() == 0;
        let full = self.is_full() && idle && !self.client.closing();
        if !(full || self.client.is_ready_for_message()) {
            return false;
        }
        let stop = match self.settings.cancel.is_cancelled() {
            true => Some("stopped"),
            false => self.settings.lost.any(&self.account, self.domains.iter()).then_some("the account lost a domain"),
        };
        let mut commands = Vec::new();
        let StorageState { opening, queue_empty, settling, .. } = self.storage;
        let next = match stop.is_some() || self.is_full() {
            true => None,
            false if settling >= SETTLING_LIMIT => return false,
            false if self.ahead.is_empty() && (opening || !queue_empty) => return false,
            false => self.ahead.pop_front(),
        };
        match next {
            // RFC 9422 section 4.3: the customer limits the domains of a session, and this one has had others.
            Some(opened) if !self.client.permits(&opened.message.envelope.recipients) => {
                self.lane.submit(QueueJob::PassOver { number: opened.number });
                return true;
            }
            Some(opened) => {
                (self.begun, self.messages) = (true, self.messages + 1);
                self.octets += opened.message.size;
                match self.client.send_message(&opened.message, &mut commands) {
                    Ok(()) => self.sending.push_back(opened),
                    Err(result) => self.settle(&opened, result),
                }
            }
            // QUIT after all messages are settled: the customer may call again at once, and must not get them twice.
            None if idle && settling == 0 => {
                self.stop = stop;
                self.client.quit(&mut commands);
            }
            None => return false,
        }
        self.send(&commands);
        if self.client.in_flight() <= 1 {
            self.reset_deadline(Instant::now());
        }
        true
    }

    /// Has the storage threads open the next messages. The first are opened when the client is ready for one.
    fn open_ahead(&mut self) {
        let StorageState { opening, queue_empty, .. } = self.storage;
        let begun = self.begun || self.client.is_ready_for_message();
        let recipients: usize = self.ahead.iter().map(|opened| opened.message.envelope.recipients.len()).sum();
        let enough = self.ahead.len() > MESSAGES_AHEAD / 2 || recipients > RECIPIENTS_AHEAD;
        if !begun || self.client.closing() || opening || queue_empty || enough {
            return;
        }
        let limit = self.limits.messages;
        let wanted = if limit == 0 { usize::MAX } else { limit.saturating_sub(self.messages + self.ahead.len()) };
        let messages = wanted.min(MESSAGES_AHEAD - self.ahead.len());
        if messages > 0 && !self.is_full() {
            self.storage.opening = true;
            let read: usize = self.ahead.iter().map(|opened| opened.octets.len()).sum();
            self.lane.submit(QueueJob::Open { messages, octets: OCTETS_AHEAD.saturating_sub(read) });
        }
    }

    /// Whether the session waits for the disk and not for the customer.
    fn waits_for_storage(&self) -> bool {
        let StorageState { opening, reading, settling, .. } = self.storage;
        let for_content = self.content.is_some() && reading && self.connection.unsent() == 0;
        for_content || self.client.awaiting().is_none() && self.content.is_none() && (opening || settling > 0)
    }

    /// Whether a limit permits no more messages in this session.
    fn is_full(&self) -> bool {
        self.client.is_used_up() || self.limits.are_reached(self.messages, self.octets)
    }

    /// Settles the first of the messages given to the client.
    fn settle_first(&mut self, result: DeliveryResult) {
        if let Some(opened) = self.sending.pop_front() {
            self.settle(&opened, result);
        }
    }

    fn settle(&mut self, opened: &OpenedMessage, result: DeliveryResult) {
        self.storage.settling += 1;
        if !result.recipients.iter().any(RecipientStatus::is_sent) {
            // A message with no recipient sent does not count for the limits: those that the customer defers in each session
            // would otherwise use them up before the others.
            (self.messages, self.octets) = (self.messages - 1, self.octets - opened.message.size);
        }
        let (peer, sends_dsn) = (self.client.peer_name().map(str::to_owned), self.client.extensions().dsn);
        let wants_dsn = opened.message.envelope.recipients.iter().any(|recipient| recipient.notify.success());
        let is_removal = result.recipients.iter().all(RecipientStatus::is_sent) && (sends_dsn || !wants_dsn);
        self.rejected += usize::from(result.recipients.iter().any(RecipientStatus::is_rejected));
        let number = opened.number;
        self.lane.submit(QueueJob::Settle(Settlement { number, result, is_removal, peer, sends_dsn }));
    }

    /// Ends the session for this reason. Messages under way are deferred or in doubt.
    pub fn end(&mut self, reason: &str) {
        self.ended = true;
        let aborted = self.settings.abort.is_cancelled();
        for result in self.client.abandon(&connection_lost("The connection was lost")) {
            self.settle_first(if aborted { result.stopped() } else { result });
        }
        // One job each: a settlement may write a DSN, and other sessions need the storage threads too.
        (0..self.rejected.min(POSTPONED_LIMIT)).for_each(|_| self.lane.submit(QueueJob::SettlePostponed));
        let (done, full) = (reason == DONE, self.is_full());
        self.lane.submit(QueueJob::End(TurnEnd { reason: reason.to_owned(), done, stop: self.stop, full }));
    }

    /// Closes the connection. Call it after the lock is released: a customer that sees the end and calls again at once would
    /// find its mail locked. TLS ends with close_notify (RFC 8446 section 6.1).
    pub fn close(self) {
        self.connection.close_without_waiting();
    }

    fn send(&mut self, octets: &[u8]) {
        send_commands(&mut self.connection, &self.client, octets);
    }

    /// Sets the deadline of the customer's next step (RFC 5321 section 4.5.3.2).
    fn reset_deadline(&mut self, now: Instant) {
        let timeouts = &self.settings.timeouts;
        let timeout = match self.client.awaiting() {
            _ if self.content.is_some() => timeouts.block,
            _ if self.client.closing() => QUIT_TIMEOUT.min(timeouts.command),
            awaiting => timeouts.reply_timeout(awaiting),
        };
        self.deadline = now + timeout;
    }

    /// Records that the customer makes progress, so that no other session takes its queues over.
    fn record_progress(&mut self, now: Instant) {
        (self.last_progress, self.storage.taken_over) = (now, false);
        if now.duration_since(self.last_heartbeat) > self.settings.timeouts.takeover / 4 {
            self.last_heartbeat = now;
            self.lane.submit(QueueJob::Heartbeat);
        }
    }

    fn check_deadlines(&mut self, now: Instant) -> io::Result<()> {
        let stalled = now >= self.last_progress + self.settings.timeouts.takeover;
        let reason = if now >= self.deadline && !self.waits_for_storage() {
            "the customer does not reply"
        } else if now >= self.turn_deadline {
            "the session has lasted too long"
        } else if stalled && self.storage.taken_over {
            "taken over by another session of the customer"
        } else {
            if stalled && !self.storage.checking && now >= self.next_takeover_check {
                self.storage.checking = true;
                self.next_takeover_check = now + TAKEOVER_CHECK_INTERVAL;
                self.lane.submit(QueueJob::CheckTakeover);
            }
            return Ok(());
        };
        Err(io::Error::other(reason))
    }
}
