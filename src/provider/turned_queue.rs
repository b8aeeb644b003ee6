//! The mail of one turned session, as the storage threads have it: they open messages and read ahead, settle them, and
//! release the lock at the end. All that a turned session does on a disk is here.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::ops::ControlFlow;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::soft_bounce::{Rejected, SoftBounces};
use super::storage::LaneWork;
use super::turn_settings::TurnSettings;
use super::unknown::{self, Learning};
use crate::config::KnownRecipients;
use crate::mail::address::{Domain, Mailbox};
use crate::maildir::Entry;
use crate::net::trace::quoted;
use crate::queue::{NextStep, QueueLock, QueueName, QueuedMessage};
use crate::report::calls::{CallRecord, CallResult};
use crate::report::{Attempt, Reporter, Via};
use crate::smtp::client::OutgoingMessage;
use crate::smtp::command::Recipient;
use crate::smtp::reply::Reply;
use crate::smtp::status::{DecidedBy, DeliveryResult, RecipientStatus};

/// Octets that are read at a time if there are more than expected.
const READ_BLOCK: usize = 4096;

/// After messages with more recipients than this, no other is opened before they can be sent.
pub const RECIPIENTS_AHEAD: usize = 1000;

/// Messages that are settled at the end of a session at most, and octets that are remembered of them.
pub const POSTPONED_LIMIT: usize = 1000;
const POSTPONED_OCTETS: usize = 512 * 1024;

/// What the delivery thread wants done.
pub enum QueueJob {
    /// Open the next messages, so many at most, and read so many octets of their content at most.
    Open { messages: usize, octets: usize },
    /// Read the next octets of a message, so many at most.
    Read { number: u64, octets: usize },
    /// This session does not offer a message that was opened.
    PassOver { number: u64 },
    /// Record what became of a message. If that fails, which is logged, this session does not offer it again, and goes on:
    /// the others make room on a full disk.
    Settle(Settlement),
    /// The session has no more replies: settle one of the messages that have waited for them, if there is one.
    SettlePostponed,
    /// Show other sessions of the account that this one makes progress.
    Heartbeat,
    /// Look whether another session of the account wants the lock.
    CheckTakeover,
    /// Release the lock, and log and record the session.
    End(TurnEnd),
}

/// What became of a message.
pub struct Settlement {
    pub number: u64,
    pub result: DeliveryResult,
    /// The message is only to be removed: all recipients have it, and no DSN is due.
    pub is_removal: bool,
    /// The customer's name, if it gave one.
    pub peer: Option<String>,
    /// The customer's server sends DSNs itself.
    pub sends_dsn: bool,
}

/// How a session has ended.
pub struct TurnEnd {
    pub reason: String,
    /// The customer has replied to QUIT.
    pub done: bool,
    /// Why no more mail was offered before the customer had all.
    pub stop: Option<&'static str>,
    /// A limit permits no more messages in this session.
    pub full: bool,
}

/// What the jobs report.
pub enum QueueReport {
    Opened(OpenedMessage),
    /// No more messages are opened until that is asked for again; if `more` is not set, there are none.
    AllOpened {
        more: bool,
    },
    Content {
        octets: Vec<u8>,
        /// These are the last.
        whole: bool,
    },
    ContentFailed(io::Error),
    Settled,
    TakeoverRequested(bool),
    /// The lock is released.
    Released,
}

/// A message that was opened.
pub struct OpenedMessage {
    /// By which later jobs name it.
    pub number: u64,
    pub message: OutgoingMessage,
    /// The begin of its content.
    pub octets: Vec<u8>,
    /// That is all of its content.
    pub whole: bool,
}

/// The mail of one turned session.
pub struct TurnedQueue {
    mail: Option<LockedMail>,
    /// The id of the session in the log.
    session: String,
    account: String,
    /// The customer's address as a literal.
    peer: String,
    settings: Arc<TurnSettings>,
    begun: Instant,
    counters: TurnCounters,
    soft_bounces: SoftBounces,
    /// `None`: the recipients that the customer's server does not know are not learned.
    learning: Option<Learning>,
}

/// What is given back at the end of the session.
struct LockedMail {
    lock: QueueLock,
    /// The messages that were opened and are not settled, by number, the oldest first.
    opened: Vec<(u64, QueuedMessage)>,
    next_number: u64,
    /// Those that are settled at the end: another message may show that their recipients do not exist.
    postponed: VecDeque<PostponedMessage>,
    postponed_octets: usize,
    _permit: SessionPermit,
}

/// A message that is settled at the end of the session. Its file is closed, and stays as it was.
struct PostponedMessage {
    queue: QueueName,
    entry: Entry,
    settlement: Settlement,
}

/// What a session has done, for the log.
#[derive(Default)]
struct TurnCounters {
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

/// How many turned sessions there are, turns on their way to the delivery thread included.
#[derive(Clone, Default)]
pub struct SessionCount(Arc<CountState>);

#[derive(Default)]
struct CountState {
    count: Mutex<usize>,
    session_ended: Condvar,
}

/// One of the turned sessions that are permitted at a time.
pub struct SessionPermit(SessionCount);

impl SessionCount {
    fn lock(&self) -> MutexGuard<'_, usize> {
        self.0.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts one session more. `None`: there are `limit`.
    pub fn admit(&self, limit: usize) -> Option<SessionPermit> {
        let mut count = self.lock();
        if *count >= limit {
            return None;
        }
        *count += 1;
        Some(SessionPermit(self.clone()))
    }

    /// Waits until there is none, or until the deadline.
    pub fn wait_until_none(&self, deadline: Instant) {
        let left = deadline.saturating_duration_since(Instant::now());
        let _ = self.0.session_ended.wait_timeout_while(self.lock(), left, |count| *count > 0);
    }
}

impl Drop for SessionPermit {
    fn drop(&mut self) {
        *self.0.lock() -= 1;
        self.0.0.session_ended.notify_all();
    }
}

/// Who has turned, for the log and the records.
pub struct TurnParties {
    pub session: String,
    pub account: String,
    pub peer: String,
}

impl TurnedQueue {
    /// `permit` is released together with the lock.
    pub fn new(
        lock: QueueLock, parties: TurnParties, settings: Arc<TurnSettings>, permit: SessionPermit,
    ) -> TurnedQueue {
        let TurnParties { session, account, peer } = parties;
        let held = settings.spool.held_config(&account);
        let learns = held.recipients == KnownRecipients::Learn;
        let learning = || Learning::new(settings.spool.unknown_recipients(&account), settings.reporter.now());
        let mail = LockedMail {
            lock,
            opened: Vec::new(),
            next_number: 0,
            postponed: VecDeque::new(),
            postponed_octets: 0,
            _permit: permit,
        };
        TurnedQueue {
            mail: Some(mail),
            soft_bounces: SoftBounces::new(held.soft_bounce),
            learning: learns.then(learning),
            session,
            account,
            peer,
            settings,
            begun: Instant::now(),
            counters: TurnCounters::default(),
        }
    }

    fn settle(&mut self, settlement: Settlement) {
        let Some(mail) = &mut self.mail else { return };
        let Some(message) = mail.take(settlement.number) else { return };
        let result = &settlement.result;
        if let Some(domain) = &message.queue().domain {
            self.soft_bounces.note(domain, result);
            let rejected = rejected(&message, domain, &self.settings.reporter);
            let undecided = self.soft_bounces.is_undecided(rejected, result);
            // When the connection is lost there are no more replies, and a doubt must be recorded.
            if undecided && !result.decided_by.is_connection_loss() && mail.may_postpone(result) {
                return mail.postpone(message, settlement);
            }
        }
        self.finish(message, settlement);
    }

    /// Settles the oldest of the messages that were postponed.
    fn settle_postponed(&mut self) {
        let Some(mail) = &mut self.mail else { return };
        let Some(PostponedMessage { queue, entry, settlement }) = mail.postponed.pop_front() else { return };
        mail.lock.heartbeat();
        match mail.lock.open_message(&queue, entry) {
            Ok(Some(message)) if message.envelope.recipients.len() == settlement.result.recipients.len() => {
                self.finish(message, settlement);
            }
            // Another program has removed or changed it, or has it.
            Ok(_) => {}
            Err(error) => {
                log::error!("event=unreadable queue={queue} error={}", quoted(error));
                self.counters.unsettled += 1;
            }
        }
    }

    /// Records what became of a message. A rejection that looks like a mistake of the customer's side is a deferral.
    fn finish(&mut self, mut message: QueuedMessage, settlement: Settlement) {
        let Settlement { mut result, peer, sends_dsn, .. } = settlement;
        let Some(mail) = &mut self.mail else { return };
        let size = message.size;
        let domain = message.queue().domain.clone();
        if let Some(domain) = &domain {
            let rejected = rejected(&message, domain, &self.settings.reporter);
            let first_rejected = self.soft_bounces.defer(rejected, &mut result);
            let is_of_peer = !result.decided_by.is_connection_loss() && result.decided_by != DecidedBy::Us;
            if is_of_peer || first_rejected.is_some() {
                message.first_rejected = first_rejected;
            }
        }
        let mailbox = |recipient: &Recipient| recipient.mailbox.clone();
        let recipients = self.learning.as_ref().map(|_| message.envelope.recipients.iter().map(mailbox).collect());
        let attempt = Attempt {
            session: &self.session,
            via: Via::Atrn,
            relay: peer.as_deref().unwrap_or(&self.peer),
            peer: peer.as_deref(),
            peer_sends_dsn: sends_dsn,
            retry: None,
            give_up: self.settings.give_up,
            expire_after: self.settings.spool.expire_after(&self.account),
        };
        let Ok(result) = self.settings.reporter.finish_attempt(message, result, &attempt, &mut mail.lock) else {
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
        if let Some((recipients, domain)) = recipients.zip(domain) {
            self.learn(recipients, &domain, &result);
        }
    }

    /// Learns which recipients the customer's server knows. A rejection that may be a mistake of its side teaches nothing.
    fn learn(&mut self, recipients: Vec<Mailbox>, domain: &Domain, result: &DeliveryResult) {
        let Some(learning) = &mut self.learning else { return };
        // A reply to MAIL, or to DATA or the content of all recipients, need not be about a recipient.
        let at_rcpt = match result.decided_by {
            DecidedBy::PeerAtMail => false,
            DecidedBy::PeerAtData | DecidedBy::PeerAtContent => result.recipients.iter().any(RecipientStatus::is_sent),
            _ => true,
        };
        let is_unknown = |reply: &Reply| reply.is_from_peer() && reply.enhanced() == Some("5.1.1");
        let teaches = at_rcpt && self.soft_bounces.is_accepting(domain);
        for (mailbox, status) in recipients.iter().zip(&result.recipients) {
            match status {
                RecipientStatus::Sent(_) => learning.accepted(mailbox),
                RecipientStatus::Rejected(reply) if teaches && is_unknown(reply) && learning.rejected(mailbox) => {
                    let (session, account) = (&self.session, &self.account);
                    log::warn!("event=recipient-learned session={session} account={account} to=<{mailbox}>");
                }
                _ => {}
            }
        }
    }

    /// Logs the domains with mail that the customer has rejected, and that waits for a person to look after its server.
    fn log_soft_bounces(&self) {
        let (session, account) = (&self.session, &self.account);
        for (domain, messages, reply) in self.soft_bounces.deferred() {
            let reply = quoted(reply);
            log::warn!(
                "event=soft-bounced session={session} account={account} domain={domain} messages={messages} reply={reply}"
            );
        }
    }

    /// Releases the lock, so that the customer finds its mail unlocked when it sees the end of the connection and calls
    /// again. Then it logs the session, and writes the record of the call.
    fn end(&mut self, end: TurnEnd, report: &mut dyn FnMut(QueueReport)) {
        let TurnEnd { reason, done, stop, full } = end;
        let Some(mut mail) = self.mail.take() else { return };
        // The last one becomes the first again.
        while let Some((_, message)) = mail.opened.pop() {
            mail.lock.put_back(message);
        }
        let stop = if mail.lock.is_short() { Some("no descriptors are left") } else { stop };
        let stopped = stop.filter(|_| done && (mail.lock.is_short() || mail.lock.has_next()));
        let more = full && mail.lock.has_next();
        if !more {
            mail.lock.count_call();
        }
        let limited = (done && more).then_some("a limit of this session is reached, and more mail waits");
        let reason = stopped.or(limited).unwrap_or(&reason);
        self.log_soft_bounces();
        let TurnCounters { sent, deferred, rejected, in_doubt, unsettled, octets } = self.counters;
        let (skipped, not_mail) = (mail.lock.skipped(), mail.lock.not_mail());
        let duration = self.begun.elapsed();
        let result = match (done, deferred + in_doubt) {
            (false, _) => CallResult::Failed,
            (true, 0) if stopped.is_none() => CallResult::Done,
            (true, _) => CallResult::Deferred,
        };
        let mut record = CallRecord::new(self.settings.reporter.now(), &self.peer, result, reason);
        record.duration = duration;
        let counts = [("sent", sent), ("deferred", deferred), ("rejected", rejected), ("in-doubt", in_doubt)];
        record.counts = counts.into_iter().map(|(key, count)| (key.to_owned(), count as u64)).collect();
        record.counts.push(("octets".to_owned(), octets));
        // Before the lock is released: the next session reads it.
        match self.learning.take() {
            Some(learning) => learning.write(&self.account),
            None => unknown::forget(&self.settings.spool.unknown_recipients(&self.account), &self.account),
        }
        // And a pass of expiry that waits for the lock warns of no delay, as the customer has called.
        record.write(&self.settings.spool.call_record(&self.account), &self.account);
        drop(mail);
        report(QueueReport::Released);
        log::info!(
            "event=turn-ended session={} peer={} account={} sent={sent} deferred={deferred} rejected={rejected} \
             in-doubt={in_doubt} unsettled={unsettled} skipped={skipped} not-mail={not_mail} octets={octets} \
             duration={:.3} reason={}",
            self.session,
            self.peer,
            self.account,
            duration.as_secs_f64(),
            quoted(reason)
        );
    }
}

/// A message of this domain, as it counts for soft bounces.
fn rejected<'a>(message: &QueuedMessage, domain: &'a Domain, reporter: &Reporter) -> Rejected<'a> {
    let now = reporter.now();
    let first = message.first_rejected.filter(|first| first.is_possible(now));
    let age = first.map_or(Duration::ZERO, |first| reporter.watch().age(first));
    Rejected { domain, first: first.unwrap_or(now), age }
}

impl LockedMail {
    /// Whether there is room to remember what became of one more message.
    fn may_postpone(&self, result: &DeliveryResult) -> bool {
        self.postponed.len() < POSTPONED_LIMIT && self.postponed_octets + octets_of(result) <= POSTPONED_OCTETS
    }

    /// Settles a message at the end. Until then it is not offered again.
    fn postpone(&mut self, message: QueuedMessage, settlement: Settlement) {
        self.postponed_octets += octets_of(&settlement.result);
        let (queue, entry) = (message.queue().clone(), message.entry().clone());
        self.postponed.push_back(PostponedMessage { queue, entry, settlement });
        self.lock.leave(message);
    }

    fn open(&mut self, messages: usize, mut octets: usize, report: &mut dyn FnMut(QueueReport)) {
        let mut recipients = 0;
        for _ in 0..messages {
            let mut message = match self.lock.next_step() {
                NextStep::Message(message) => *message,
                // Another job goes on, after those of other customers.
                NextStep::Listing => break,
                NextStep::End => return report(QueueReport::AllOpened { more: false }),
            };
            // If that fails, the session will ask for the same octets, and get the error.
            let (begin, whole) = read(&mut message, octets).unwrap_or_default();
            octets -= begin.len();
            let (number, outgoing) = (self.next_number, message.outgoing_message());
            self.next_number += 1;
            recipients += outgoing.envelope.recipients.len();
            self.opened.push((number, message));
            report(QueueReport::Opened(OpenedMessage { number, message: outgoing, octets: begin, whole }));
            if recipients > RECIPIENTS_AHEAD {
                break;
            }
        }
        report(QueueReport::AllOpened { more: true });
    }

    fn read(&mut self, number: u64, octets: usize) -> QueueReport {
        let message = self.opened.iter_mut().find(|(other, _)| *other == number).map(|(_, message)| message);
        let read = message.map(|message| read(message, octets)).unwrap_or_else(|| Ok((Vec::new(), true)));
        match read {
            Ok((octets, whole)) => QueueReport::Content { octets, whole },
            Err(error) => QueueReport::ContentFailed(error),
        }
    }

    fn pass_over(&mut self, number: u64) {
        if let Some(message) = self.take(number) {
            self.lock.leave(message);
        }
    }

    fn take(&mut self, number: u64) -> Option<QueuedMessage> {
        let at = self.opened.iter().position(|(other, _)| *other == number)?;
        Some(self.opened.remove(at).1)
    }
}

/// How much memory a result takes, more or less.
fn octets_of(result: &DeliveryResult) -> usize {
    let text = |status: &RecipientStatus| status.reply().map_or(0, |reply| reply.lines().map(str::len).sum());
    result.recipients.iter().map(|status| 200 + text(status)).sum()
}

/// The next octets of the content, so many at most, and whether they are the last.
fn read(message: &mut QueuedMessage, octets: usize) -> io::Result<(Vec<u8>, bool)> {
    // The size on the wire is that of the file or more: the last read finds the end.
    let expected = usize::try_from(message.size).unwrap_or(octets).saturating_add(1).min(octets);
    let mut content = Vec::with_capacity(expected);
    while content.len() < octets {
        let before = content.len();
        let room = if before < expected { expected } else { octets.min(before + READ_BLOCK) };
        content.resize(room, 0);
        let read = message.read(&mut content[before..]);
        content.truncate(before + *read.as_ref().unwrap_or(&0));
        match read {
            Ok(0) => return Ok((content, true)),
            // The next call gets the error.
            Err(_) if before > 0 => break,
            other => other?,
        };
    }
    Ok((content, false))
}

impl LaneWork for TurnedQueue {
    type Job = QueueJob;
    type Report = QueueReport;

    fn is_slow(job: &QueueJob) -> bool {
        match job {
            QueueJob::Settle(settlement) => !settlement.is_removal,
            job => matches!(job, QueueJob::SettlePostponed),
        }
    }

    fn run(&mut self, job: QueueJob, report: &mut dyn FnMut(QueueReport)) -> ControlFlow<()> {
        match (job, &mut self.mail) {
            (QueueJob::Open { messages, octets }, Some(mail)) => mail.open(messages, octets, report),
            (QueueJob::Read { number, octets }, Some(mail)) => report(mail.read(number, octets)),
            (QueueJob::PassOver { number }, Some(mail)) => mail.pass_over(number),
            (QueueJob::Heartbeat, Some(mail)) => mail.lock.heartbeat(),
            (QueueJob::CheckTakeover, Some(mail)) => {
                report(QueueReport::TakeoverRequested(mail.lock.takeover_requested()));
            }
            (QueueJob::Settle(settlement), _) => {
                self.settle(settlement);
                report(QueueReport::Settled);
            }
            (QueueJob::SettlePostponed, _) => self.settle_postponed(),
            (QueueJob::End(end), _) => {
                self.end(end, report);
                return ControlFlow::Break(());
            }
            (_, None) => {}
        }
        ControlFlow::Continue(())
    }
}
