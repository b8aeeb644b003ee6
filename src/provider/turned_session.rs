//! One turned session: the provider is SMTP client and sends the mail that it holds (RFC 2645 section 5.3).
//!
//! [`TurnedSession::work`] does a bounded piece of work without waiting for the customer: it reads replies, sends commands
//! and content, and settles messages. The delivery thread calls it whenever there may be something to do.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use crate::config::Accounts;
use crate::mail::address::Domain;
use crate::net::cancel::CancelToken;
use crate::net::connection::{Connection, Filled};
use crate::net::trace::quoted;
use crate::provider::spool::Spool;
use crate::queue::{QueueLock, QueuedMessage};
use crate::report::calls::{CallRecord, CallResult};
use crate::report::{Attempt, Reporter, Via};
use crate::session::pace::PaceClock;
use crate::session::{ContentOutput, ReplyInput, Timeouts, send_commands};
use crate::smtp::client::{Abort, Client, ClientStep, Rejection, Stage, Without8BitMime};
use crate::smtp::limits;
use crate::smtp::reply::Reply;
use crate::smtp::status::{DeliveryResult, RecipientStatus, connection_lost, ends_session};
use crate::turn::Turned;

/// While more octets than this are unsent, no more content is read.
const HIGH_WATER: usize = 64 * 1024;

/// Steps of work for one session before the next session may work.
const STEPS_PER_ROUND: usize = 8;

/// How long the session waits for the reply to QUIT.
const QUIT_TIMEOUT: Duration = Duration::from_secs(10);

/// How often a stalled session checks whether another session wants its queues.
const TAKEOVER_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Times and limits of turned sessions, and how they are cancelled.
#[derive(Clone)]
pub struct TurnSettings {
    pub timeouts: Timeouts,
    /// Messages in one session; 0: no limit.
    pub messages: usize,
    /// Messages that were deferred for so long since their first offer are given up.
    pub give_up: Duration,
    pub without_8bitmime: Without8BitMime,
    pub reporter: Reporter,
    /// Accounts whose sessions end after the messages under way, because their domains are no longer theirs.
    pub lost: Arc<LostDomains>,
    /// Has the records of calls.
    pub spool: Arc<Spool>,
    /// Ends sessions after the messages under way.
    pub cancel: CancelToken,
    /// Ends sessions at once.
    pub abort: CancelToken,
}

/// How a session ends that has done its work.
pub const DONE: &str = "done";

/// The domains that reloads have taken from each account: from one that is removed, all.
#[derive(Default)]
pub struct LostDomains(Mutex<HashMap<String, HashSet<Domain>>>);

impl LostDomains {
    /// Adds the domains that an account had before a reload and has no more; those that it has again are not lost.
    pub fn update(&self, before: &Accounts, after: &Accounts) {
        let mut lost = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for account in before.iter() {
            lost.entry(account.name.clone()).or_default().extend(account.domains.iter().cloned());
        }
        lost.retain(|name, domains| {
            domains.retain(|domain| after.owner(domain).is_none_or(|owner| owner.name != *name));
            !domains.is_empty()
        });
    }

    /// Whether the account has lost one of these domains.
    pub fn any<'a>(&self, account: &str, mut domains: impl Iterator<Item = &'a Domain>) -> bool {
        let lost = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lost.get(account).is_some_and(|lost| domains.any(|domain| lost.contains(domain)))
    }
}

/// A turned session. It has the lock on the mail until it is closed.
pub struct TurnedSession {
    pub(super) connection: Connection,
    client: Client,
    lock: QueueLock,
    account: String,
    peer: String,
    settings: TurnSettings,
    replies: ReplyInput,
    /// Messages given to the client, in order; its replies are about the first.
    messages: VecDeque<QueuedMessage>,
    /// The queues had no more messages when last read, and no message was settled since.
    queue_empty: bool,
    /// The rest of the content of the first message, while it is being sent.
    content: Option<ContentOutput>,
    /// Why no more mail is sent although there is more.
    stopped: Option<&'static str>,
    /// The customer has replied to QUIT.
    done: bool,
    /// There is more to do without waiting.
    busy: bool,
    /// What poll(2) has found on the connection since the last piece of work.
    found: PollFlags,
    /// When there is work even if poll(2) finds nothing.
    wake_up: Instant,
    begun: Instant,
    /// When the customer must have done its next step.
    deadline: Instant,
    /// When the session must be over; content earns time.
    turn_deadline: Instant,
    /// What the content of the first message earns.
    pace: PaceClock,
    last_progress: Instant,
    last_heartbeat: Instant,
    counters: TurnCounters,
    /// What the status will tell of this session, once it has ended.
    record: Option<CallRecord>,
}

/// What a session has done, for the log.
#[derive(Default)]
struct TurnCounters {
    /// Messages given to the client.
    offered: usize,
    /// Recipients.
    sent: usize,
    deferred: usize,
    rejected: usize,
    in_doubt: usize,
    /// Messages of which the disk did not permit to record what became of them.
    unsettled: usize,
    /// Octets of content that was accepted.
    octets: u64,
}

impl TurnedSession {
    /// Begins the session: the client waits for the customer's greeting.
    pub fn new(turned: Turned, settings: TurnSettings) -> TurnedSession {
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
            replies: ReplyInput::default(),
            messages: VecDeque::new(),
            queue_empty: false,
            content: None,
            stopped: None,
            done: false,
            busy: true,
            found: PollFlags::empty(),
            wake_up: now,
            begun: now,
            deadline: now + settings.timeouts.greeting,
            turn_deadline: now + settings.timeouts.turn,
            pace: PaceClock::new(limits::KNOWN_PEER_PACE, 0, now),
            last_progress: now,
            last_heartbeat: now,
            counters: TurnCounters::default(),
            settings,
            record: None,
        }
    }

    /// Computes and returns when there will be work even if poll(2) finds nothing. `cancelled`: no message is begun.
    pub fn schedule_wake_up(&mut self, now: Instant, cancelled: bool) -> Instant {
        let timeouts = &self.settings.timeouts;
        let idle = self.client.is_ready_for_message() && self.client.in_flight() == 0;
        self.wake_up = if self.busy || (idle && cancelled) {
            now
        } else {
            let stalled = self.last_progress + timeouts.takeover;
            let check = if stalled > now { stalled } else { now + TAKEOVER_CHECK_INTERVAL };
            self.deadline.min(self.turn_deadline).min(check)
        };
        self.wake_up
    }

    /// Reports what poll(2) has found on the connection.
    pub fn wake_up(&mut self, found: PollFlags) {
        self.found |= found;
    }

    /// Whether [`TurnedSession::work`] may find something to do. Stalled sessions must cost nothing while others work.
    pub fn may_work(&self, now: Instant) -> bool {
        !self.found.is_empty() || self.busy || now >= self.wake_up
    }

    /// Does a bounded piece of work. Returns whether the session goes on; if not, the customer has replied to QUIT.
    ///
    /// # Errors
    /// Why the session cannot go on.
    pub fn work(&mut self, now: Instant) -> io::Result<bool> {
        // The last replies may arrive together with an error of the connection. They are handled before it: a message
        // that was answered 250 is not in doubt.
        let found = std::mem::replace(&mut self.found, PollFlags::empty());
        let filled = match found.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
            true => self.connection.fill().inspect(|_| self.connection.acknowledge()),
            false => Ok(Filled::Nothing),
        };
        let (unsent_before, mut flushed) = (self.connection.unsent(), 0);
        self.busy = true;
        for _ in 0..STEPS_PER_ROUND {
            let replied = self.handle_replies(now)?;
            let sent = !self.done && (self.send_content(now)? || self.next_message()?);
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
            // The flush may have made room for more content, which poll(2) would not report.
            let room = self.content.is_some() && self.connection.unsent() <= HIGH_WATER;
            if !replied && !sent && !room {
                self.busy = false;
                break;
            }
        }
        if !matches!(filled, Ok(Filled::Bytes(_) | Filled::Nothing)) || self.connection.ended() {
            self.handle_last_reply(now)?;
            filled?;
            if self.done {
                return Ok(false);
            }
            // The reason, if the end was reported together with octets.
            self.connection.fill()?;
            return Err(io::Error::other("the customer closed the connection"));
        }
        // A customer that reads slowly is not silent: it gets more time.
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

    /// Handles a reply that the customer has not ended before it closed the connection.
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
                let size = self.messages.front().map_or(0, |message| message.size);
                self.content = Some(ContentOutput::new(chunk, size));
                self.pace = PaceClock::new(limits::KNOWN_PEER_PACE, size, now);
            }
            ClientStep::MessageDone(result) => {
                self.turn_deadline -= self.pace.stop(now);
                self.finish_message(&result);
            }
            ClientStep::Closed => {
                self.done = true;
                return Ok(());
            }
            ClientStep::Abort(Abort::Rejected(Rejection { stage, reply })) => {
                let session = &self.connection.trace.id;
                log::warn!("event=turn-rejected session={session} stage=\"{stage}\" reply={}", quoted(reply));
            }
            // The options of a turned client lead to none of these.
            ClientStep::Abort(_) | ClientStep::StartTls | ClientStep::Replied(_) | ClientStep::Turned => {
                return Err(io::Error::other("a step that no turned session has"));
            }
        }
        match ends_session(&reply) {
            true => Err(io::Error::other(format!("the customer ended the session: {reply}"))),
            false => Ok(()),
        }
    }

    /// Sends a block of the content under way. Returns whether there was one to send.
    fn send_content(&mut self, now: Instant) -> io::Result<bool> {
        let (Some(content), Some(message)) = (&mut self.content, self.messages.front_mut()) else {
            return Ok(false);
        };
        if self.connection.unsent() > HIGH_WATER {
            return Ok(false);
        }
        match content.send_block(message, &mut self.connection)? {
            false => self.deadline = now + self.settings.timeouts.block,
            true => {
                self.content = None;
                let mut commands = Vec::new();
                self.client.content_sent(&mut commands);
                self.send(&commands);
                self.reset_deadline(now);
            }
        }
        self.record_progress(now);
        Ok(true)
    }

    /// Gives the client the next message, or lets it send QUIT if there is none. Returns whether there was anything to
    /// do.
    fn next_message(&mut self) -> io::Result<bool> {
        // `QueueLock::next_message` may list a directory: not at every wake-up.
        let full = self.is_full() && self.client.in_flight() == 0 && !self.client.closing();
        if !(full || self.client.is_ready_for_message()) || (self.queue_empty && self.client.in_flight() > 0) {
            return Ok(false);
        }
        let stop = match self.settings.cancel.is_cancelled() {
            true => Some("stopped"),
            false => self.settings.lost.any(&self.account, self.lock.domains()).then_some("a domain was taken away"),
        };
        let enough = stop.is_some() || self.is_full();
        let mut commands = Vec::new();
        match if enough { None } else { self.lock.next_message() } {
            // RFC 9422 section 4.3: this session has other domains.
            Some(message) if !self.client.permits(&message.envelope.recipients) => return Ok(true),
            Some(message) => {
                self.counters.offered += 1;
                match self.client.send_message(message.outgoing_message(), &mut commands) {
                    Ok(()) => self.messages.push_back(message),
                    Err(result) => self.finish_attempt(message, &result),
                }
            }
            None if self.client.in_flight() == 0 => {
                self.stopped = stop.filter(|_| self.lock.has_next());
                self.client.quit(&mut commands);
            }
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

    /// Whether a limit permits no more messages in this session.
    fn is_full(&self) -> bool {
        let limit = self.settings.messages;
        self.client.is_used_up() || limit > 0 && self.counters.offered >= limit
    }

    /// Acts on the result of the first of the messages given to the client.
    fn finish_message(&mut self, result: &DeliveryResult) {
        self.queue_empty = false;
        if let Some(message) = self.messages.pop_front() {
            self.finish_attempt(message, result);
        }
    }

    /// Settles a message. If that fails, which is logged, this session does not offer the message again, and goes on: the
    /// others make room on a full disk.
    fn finish_attempt(&mut self, message: QueuedMessage, result: &DeliveryResult) {
        let size = message.size;
        let attempt = Attempt {
            session: &self.connection.trace.id,
            via: Via::Atrn,
            relay: self.client.peer_name().unwrap_or(&self.peer),
            peer: self.client.peer_name(),
            peer_sends_dsn: self.client.extensions().dsn,
            retry: None,
            give_up: Some(self.settings.give_up),
        };
        let settled = self.settings.reporter.finish_attempt(message, result.clone(), &attempt, &mut self.lock);
        let Ok(result) = settled else {
            self.counters.unsettled += 1;
            return;
        };
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
    }

    /// Ends the session for this reason: messages under way are deferred, or are in doubt.
    pub fn end(&mut self, reason: &str) {
        let aborted = self.settings.abort.is_cancelled();
        for result in self.client.abandon(&connection_lost("The connection was lost")) {
            self.finish_message(&if aborted { result.stopped() } else { result });
        }
        if !(self.is_full() && self.lock.has_next()) {
            self.lock.count_call();
        }
        let done = reason == DONE;
        let reason = self.stopped.filter(|_| done).unwrap_or(reason);
        let TurnCounters { sent, deferred, rejected, in_doubt, unsettled, octets, .. } = self.counters;
        let (skipped, not_mail) = (self.lock.skipped(), self.lock.not_mail());
        log::info!(
            "event=turn-ended session={} peer={} account={} sent={sent} deferred={deferred} rejected={rejected} \
             in-doubt={in_doubt} unsettled={unsettled} skipped={skipped} not-mail={not_mail} octets={octets} \
             duration={:.3} reason={}",
            self.connection.trace.id,
            self.peer,
            self.account,
            self.begun.elapsed().as_secs_f64(),
            quoted(reason)
        );
        let result = match (done, deferred + in_doubt) {
            (false, _) => CallResult::Failed,
            (true, 0) if self.stopped.is_none() => CallResult::Done,
            (true, _) => CallResult::Deferred,
        };
        let mut record = CallRecord::new(self.settings.reporter.now(), &self.peer, result, reason);
        record.duration = self.begun.elapsed();
        let counts = [("sent", sent), ("deferred", deferred), ("rejected", rejected), ("in-doubt", in_doubt)];
        record.counts = counts.into_iter().map(|(key, count)| (key.to_owned(), count as u64)).collect();
        record.counts.push(("octets".to_owned(), octets));
        self.record = Some(record);
    }

    /// Releases the queues, then closes the connection: a customer that sees the end and calls again must find them
    /// unlocked. TLS ends with close_notify (RFC 8446 section 6.1).
    pub fn close(self) {
        drop(self.lock);
        self.connection.close_without_waiting();
        // Last: it may take as long as the disk does.
        if let Some(record) = self.record {
            record.write(&self.settings.spool.call_record(&self.account), &self.account);
        }
    }

    fn send(&mut self, octets: &[u8]) {
        send_commands(&mut self.connection, &self.client, octets);
    }

    /// Begins the deadline of the customer's next step (RFC 5321 section 4.5.3.2).
    fn reset_deadline(&mut self, now: Instant) {
        let timeouts = &self.settings.timeouts;
        let timeout = match self.client.awaiting() {
            _ if self.content.is_some() => timeouts.block,
            _ if self.client.closing() => QUIT_TIMEOUT.min(timeouts.command),
            awaiting => timeouts.reply_timeout(awaiting),
        };
        self.deadline = now + timeout;
    }

    /// Records that the customer makes progress: no other session may take its queues over.
    fn record_progress(&mut self, now: Instant) {
        self.last_progress = now;
        if now.duration_since(self.last_heartbeat) > self.settings.timeouts.takeover / 4 {
            self.last_heartbeat = now;
            self.lock.heartbeat();
        }
    }

    fn check_deadlines(&self, now: Instant) -> io::Result<()> {
        let takeover = self.settings.timeouts.takeover;
        let reason = if now >= self.deadline {
            "the customer does not answer"
        } else if now >= self.turn_deadline {
            "the session has taken too long"
        } else if now >= self.last_progress + takeover && self.lock.takeover_requested() {
            "taken over by another session of the customer"
        } else {
            return Ok(());
        };
        Err(io::Error::other(reason))
    }
}
