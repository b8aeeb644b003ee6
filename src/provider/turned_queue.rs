//! The mail of one turned session, on the side of the storage threads: they open messages and read ahead, settle them, and
//! release the lock at the end. A turned session uses the disk here and nowhere else.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::ops::ControlFlow;
use std::sync::{Arc, Condvar};
use std::time::{Duration, Instant};

use super::soft_bounce::{RejectedMessage, SoftBounces};
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
use crate::threads::Guarded;

/// Octets that are read at a time if a file is longer than expected.
const READ_BLOCK: usize = 4096;

/// While the opened messages have more recipients than this, no other is opened before one is sent: their addresses
/// take memory.
pub const RECIPIENTS_AHEAD: usize = 1000;

/// The maximum of messages whose settlement is postponed to the end of a session, and of the octets of their results.
pub const POSTPONED_LIMIT: usize = 1000;
const POSTPONED_OCTETS: usize = 512 * 1024;

/// A job that the delivery thread submits.
pub enum QueueJob {
    /// Open up to `messages` messages, and read up to `octets` octets of their content.
    Open { messages: usize, octets: usize },
    /// Read up to `octets` more octets of a message.
    Read { number: u64, octets: usize },
    /// Do not offer a message that was opened in this session.
    PassOver { number: u64 },
    /// Record the result of a message. If that fails, the failure is logged, and the session goes on without the message: the
    /// settlement of others may make room on a full disk.
    Settle(Settlement),
    /// The session gets no more replies: settle one of the postponed messages, if there is one.
    SettlePostponed,
    /// Show other sessions of the account that this one makes progress.
    Heartbeat,
    /// Check whether another session of the account has requested the lock.
    CheckTakeover,
    /// Release the lock, and log and record the session.
    End(TurnEnd),
}

/// The result of a message, to be recorded.
pub struct Settlement {
    pub number: u64,
    pub result: DeliveryResult,
    /// The message only needs to be removed: it was sent to all recipients, and no DSN is due.
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
    /// Why the session stopped offering mail before the queue was empty.
    pub stop: Option<&'static str>,
    /// A limit permits no more messages in this session.
    pub full: bool,
}

/// What a job reports to the delivery thread.
pub enum QueueReport {
    Opened(OpenedMessage),
    /// An [`QueueJob::Open`] is done. `more`: the queue may have more messages.
    AllOpened {
        more: bool,
    },
    Content {
        octets: Vec<u8>,
        /// These are the last octets of the content.
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
    /// Its number, by which later jobs name it.
    pub number: u64,
    pub message: OutgoingMessage,
    /// Octets of its content that are read and not yet sent.
    pub octets: Vec<u8>,
    /// All of its content is read.
    pub whole: bool,
}

/// The mail of one turned session.
pub struct TurnedQueue {
    mail: Option<LockedMail>,
    /// The session's id, for the log.
    session: String,
    account: String,
    /// The customer's address as a literal.
    peer: String,
    settings: Arc<TurnSettings>,
    begun: Instant,
    counters: TurnCounters,
    soft_bounces: SoftBounces,
    /// `None`: the account does not learn which recipients are unknown.
    learning: Option<Learning>,
}

/// What is released at the end of the session.
struct LockedMail {
    lock: QueueLock,
    /// The messages that are opened and not settled, each with its number, the oldest first.
    opened: Vec<(u64, QueuedMessage)>,
    next_number: u64,
    /// The messages that are settled at the end of the session: the replies to others may show whether their rejection
    /// is a mistake of the customer's server.
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

/// What a session has done, for the log. The first four count recipients.
#[derive(Default)]
struct TurnCounters {
    sent: usize,
    deferred: usize,
    rejected: usize,
    in_doubt: usize,
    /// Messages whose result could not be recorded on disk.
    unsettled: usize,
    /// Octets of the content that the customer accepted.
    octets: u64,
}

/// The number of turned sessions, including turns on their way to the delivery thread.
#[derive(Clone, Default)]
pub struct SessionCount(Arc<CountState>);

#[derive(Default)]
struct CountState {
    count: Guarded<usize>,
    session_ended: Condvar,
}

/// One of the turned sessions that are permitted at a time.
pub struct SessionPermit(SessionCount);

impl SessionCount {
    /// Counts one more session. `None`: there are `limit` already.
    pub fn admit(&self, limit: usize) -> Option<SessionPermit> {
        let mut count = self.0.count.lock();
        if *count >= limit {
            return None;
        }
        *count += 1;
        Some(SessionPermit(self.clone()))
    }

    /// Waits until no session is left, or until the deadline.
    pub fn wait_until_none(&self, deadline: Instant) {
        let left = deadline.saturating_duration_since(Instant::now());
        let _ = self.0.session_ended.wait_timeout_while(self.0.count.lock(), left, |count| *count > 0);
    }
}

impl Drop for SessionPermit {
    fn drop(&mut self) {
        *self.0.0.count.lock() -= 1;
        self.0.0.session_ended.notify_all();
    }
}

/// The two ends of the session, for the log and the records: its id, the account, and the customer's address as a literal.
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
            let rejected = rejected_message(&message, domain, &self.settings.reporter);
            let undecided = self.soft_bounces.is_undecided(rejected, result);
            // After the loss of the connection there are no more replies to wait for, and the doubt must be recorded now.
            if undecided && !result.decided_by.is_connection_loss() && mail.may_postpone(result) {
                return mail.postpone(message, settlement);
            }
        }
        self.finish(message, settlement);
    }

    /// Settles the oldest of the postponed messages.
    fn settle_postponed(&mut self) {
        let Some(mail) = &mut self.mail else { return };
        let Some(PostponedMessage { queue, entry, settlement }) = mail.postponed.pop_front() else { return };
        mail.lock.heartbeat();
        match mail.lock.open_message(&queue, entry) {
            Ok(Some(message)) if message.envelope.recipients.len() == settlement.result.recipients.len() => {
                self.finish(message, settlement);
            }
            // Another program has removed, changed or locked the message.
            Ok(_) => {}
            Err(error) => {
                log::error!("event=unreadable queue={queue} error={}", quoted(error));
                self.counters.unsettled += 1;
            }
        }
    }

    /// Records the result of a message. With `soft-bounce`, a rejection that looks like a mistake on the customer's side is
    /// recorded as a deferral.
    fn finish(&mut self, mut message: QueuedMessage, settlement: Settlement) {
        let Settlement { mut result, peer, sends_dsn, .. } = settlement;
        let Some(mail) = &mut self.mail else { return };
        let size = message.size;
        let domain = message.queue().domain.clone();
        if let Some(domain) = &domain {
            let rejected = rejected_message(&message, domain, &self.settings.reporter);
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

    /// Learns which recipients the customer's server does not know. A rejection that may be a mistake on its side is ignored.
    fn learn(&mut self, recipients: Vec<Mailbox>, domain: &Domain, result: &DeliveryResult) {
        let Some(learning) = &mut self.learning else { return };
        // A reply to MAIL, or one to DATA or to the content that rejects all recipients, need not be about a recipient.
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

    /// Logs the domains with rejected mail that `soft-bounce` has deferred, so that an administrator repairs the
    /// customer's server.
    fn log_soft_bounces(&self) {
        let (session, account) = (&self.session, &self.account);
        for (domain, messages, reply) in self.soft_bounces.deferred() {
            let reply = quoted(reply);
            log::warn!(
                "event=soft-bounced session={session} account={account} domain={domain} messages={messages} reply={reply}"
            );
        }
    }

    /// Writes the record of the call, releases the lock and logs the session. The connection is closed after that, so that a
    /// customer that sees its end and calls again finds its mail unlocked.
    fn end(&mut self, end: TurnEnd, report: &mut dyn FnMut(QueueReport)) {
        let TurnEnd { reason, done, stop, full } = end;
        let Some(mut mail) = self.mail.take() else { return };
        // In reverse: `put_back` puts each message in front of the others.
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
        // Write before the lock is released: the next session reads the file.
        match self.learning.take() {
            Some(learning) => learning.write(&self.account),
            None => unknown::forget(&self.settings.spool.unknown_recipients(&self.account), &self.account),
        }
        // A pass of expiry that waits for the lock must find the call, or it would send a warning of the delay.
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

/// The parts of a message of this domain that decide on a soft bounce.
fn rejected_message<'a>(message: &QueuedMessage, domain: &'a Domain, reporter: &Reporter) -> RejectedMessage<'a> {
    let now = reporter.now();
    let first = message.first_rejected.filter(|first| first.is_possible(now));
    let age = first.map_or(Duration::ZERO, |first| reporter.watch().age(first));
    RejectedMessage { domain, first: first.unwrap_or(now), age }
}

impl LockedMail {
    /// Whether the settlement of one more message may be postponed within the limits of memory.
    fn may_postpone(&self, result: &DeliveryResult) -> bool {
        self.postponed.len() < POSTPONED_LIMIT && self.postponed_octets + octets_of(result) <= POSTPONED_OCTETS
    }

    /// Postpones the settlement of a message to the end of the session. Until then it is not offered again.
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
                // The listing goes on in the next job, after those of other customers.
                NextStep::Listing => break,
                NextStep::End => return report(QueueReport::AllOpened { more: false }),
            };
            // If the read fails, the session asks for the same octets later, and gets the error then.
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

/// About how many octets of memory a result takes.
fn octets_of(result: &DeliveryResult) -> usize {
    let text = |status: &RecipientStatus| status.reply().map_or(0, |reply| reply.lines().map(str::len).sum());
    result.recipients.iter().map(|status| 200 + text(status)).sum()
}

/// Reads up to `octets` more octets of the content. Returns them, and whether they are the last.
fn read(message: &mut QueuedMessage, octets: usize) -> io::Result<(Vec<u8>, bool)> {
    // The size on the wire is at least that of the file. One octet more, so that the last read finds the end.
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
            // The next call returns the error.
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
