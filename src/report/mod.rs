//! The steps after an attempt to send a message: the next attempt or expiry, DSNs, and the settlement (RFC 5321
//! sections 4.5.4 and 6.1, RFC 3461 section 5).
//!
//! A DSN is committed before the message that it reports is removed. So after a crash a sender may receive the DSN
//! twice, but it is never missing, except under load (see `limit`). There is no DSN to the null sender. If outgoing
//! mail without a sender is rejected, it is dropped; held mail is moved to `.refused`.

pub mod calls;
pub mod clock_history;
pub mod clock_watch;
pub mod dsn;
mod limit;
pub mod held;

use std::fmt;
use std::io::{self, Read};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crate::clock::Timestamp;
use crate::ids::Ids;
use crate::mail::address::{Mailbox, ReversePath};
use crate::mail::header::Header;
use crate::maildir::spooled::Content;
use crate::net::trace::quoted;
use crate::queue::retry::{self, Retry};
use crate::queue::{QueueLock, QueuedEnvelope, QueuedMessage};
use crate::smtp::command::{Body, Envelope, Recipient, Return};
use crate::smtp::limits::CONTENT_LINE;
use crate::smtp::reply::Reply;
use crate::smtp::status::{DecidedBy, DeliveryResult, RecipientStatus};
use clock_watch::ClockWatch;
use dsn::{Action, Dsn, RecipientReport};
use limit::DsnLimiter;

/// Octets of a message that a DSN returns whole at most, if the sender has asked for that (RFC 3461 section 4.3).
const RETURN_FULL_LIMIT: u64 = 64 * 1024;

/// Octets of a header that a DSN returns at most; the rest is left out.
const RETURNED_HEADER_LIMIT: usize = 64 * 1024;

/// A DSN to be stored for its recipient.
pub struct DsnMessage {
    /// The recipient: the sender of the message that the DSN is about.
    pub to: Mailbox,
    /// Header and body, with LF line ends.
    pub text: Vec<u8>,
    /// The DSN needs SMTPUTF8.
    pub utf8: bool,
    /// There are many DSNs: a DSN that goes elsewhere is not sent before this time.
    pub not_before: Option<SystemTime>,
}

impl DsnMessage {
    /// The envelope of the DSN, from the null sender (RFC 3461 section 6.1), with a new id.
    pub fn envelope(&self, ids: &Ids) -> QueuedEnvelope {
        let envelope = Envelope {
            recipients: vec![Recipient::plain(self.to.clone())],
            body: if self.utf8 { Body::EightBit } else { Body::SevenBit },
            utf8: self.utf8,
            ..Envelope::new(ReversePath::Null)
        };
        QueuedEnvelope { id: ids.queue_id(), arrived: ids.clock().now(), envelope }
    }
}

/// Stores DSNs for their recipients.
pub trait DsnSink: Send + Sync {
    /// Commits a DSN.
    ///
    /// # Errors
    /// The disk fails; no DSN is stored.
    fn store(&self, dsn: &DsnMessage) -> io::Result<()>;

    /// Whether the mailbox belongs to a customer or user here, so that its DSNs are not sent elsewhere.
    fn is_ours(&self, to: &Mailbox) -> bool;
}

/// The way by which a message is sent; `via=` in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// The provider to its customer, after the turn.
    Atrn,
    /// The relay, into the queue of a customer to which the domain now belongs.
    Held,
    /// The relay, by MX.
    Mx,
    /// The relay, by its smarthost.
    Smarthost,
    /// The customer to its provider, before the turn.
    Provider,
    /// The customer to its submission host.
    Submission,
    /// The customer to a next hop by LMTP.
    Lmtp,
    /// The customer to a next hop by SMTP.
    Smtp,
    /// The customer to a mailbox.
    Maildir,
    /// The customer to `/dev/null`.
    Discard,
    /// An administrator has returned the message to its sender.
    Administrator,
}

/// For the log.
impl fmt::Display for Via {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Via::Atrn => "atrn",
            Via::Held => "held",
            Via::Mx => "mx",
            Via::Smarthost => "smarthost",
            Via::Provider => "provider",
            Via::Submission => "submission",
            Via::Lmtp => "lmtp",
            Via::Smtp => "smtp",
            Via::Maildir => "maildir",
            Via::Discard => "discard",
            Via::Administrator => "administrator",
        })
    }
}

/// One attempt at a message: the peer, and how long deferred recipients are tried.
#[derive(Clone, Copy)]
pub struct Attempt<'a> {
    /// The id of the session in the log.
    pub session: &'a str,
    pub via: Via,
    /// The peer's name for the log, or its address as configured.
    pub relay: &'a str,
    /// The peer's name for DSNs, if the peer has given one.
    pub peer: Option<&'a str>,
    /// The peer offers DSN: it reports success itself (RFC 3461 section 5.2.2).
    pub peer_sends_dsn: bool,
    /// When deferred recipients are tried again, and when they expire; `None`: at the next call.
    pub retry: Option<&'a Retry>,
    /// Without `retry`: recipients expire when they have been deferred for this long. The time counts from the first
    /// attempt, because before that the customer has not called for them.
    pub give_up: Option<Duration>,
    /// Without `retry`: a message of this age expires.
    pub expire_after: Option<Duration>,
}

impl<'a> Attempt<'a> {
    /// A delivery to a mailbox here; `file`: the unique name of the copy.
    pub fn in_maildir(session: &'a str, file: &'a str) -> Attempt<'a> {
        Attempt {
            session,
            via: Via::Maildir,
            relay: file,
            peer: None,
            peer_sends_dsn: true,
            retry: None,
            give_up: None,
            expire_after: None,
        }
    }

    /// A delivery to an alias for `/dev/null`.
    pub fn discarded(session: &'a str) -> Attempt<'a> {
        Attempt { via: Via::Discard, ..Attempt::in_maildir(session, "/dev/null") }
    }

    /// The return of a message to its sender by an administrator.
    pub fn by_administrator() -> Attempt<'a> {
        Attempt { via: Via::Administrator, ..Attempt::in_maildir("-", "-") }
    }

    /// Whether a peer was tried: a message that expires without a call, or that an administrator returns, has no new
    /// date of a last attempt (RFC 3464 section 2.3.7).
    fn was_made(&self) -> bool {
        self.session != "-" || !matches!(self.via, Via::Atrn | Via::Administrator)
    }

    /// Logs the status of one recipient.
    pub fn log(&self, message: &QueuedEnvelope, to: &Mailbox, status: &RecipientStatus, now: Timestamp) {
        self.log_as(status.word(), message, to, status, now);
    }

    /// Like [`Attempt::log`], with another word for the status.
    fn log_as(&self, word: &str, message: &QueuedEnvelope, to: &Mailbox, status: &RecipientStatus, now: Timestamp) {
        log::info!(
            "event=delivery session={} id={} from=<{}> to=<{to}> status={word} via={} relay={} dsn={} delay={} reply={}",
            self.session,
            message.id,
            message.envelope.from,
            self.via,
            quoted(self.relay),
            status.enhanced(),
            retry::age(message.arrived, now).as_secs(),
            quoted(status),
        );
    }
}

/// Sends DSNs, and settles messages after attempts.
#[derive(Clone)]
pub struct Reporter {
    hostname: String,
    ids: Ids,
    /// `None`: no DSN can be sent.
    sink: Option<Arc<dyn DsnSink>>,
    limiter: Arc<DsnLimiter>,
    watch: Arc<ClockWatch>,
}

/// The outcome of [`Reporter::report`].
#[derive(Clone, Copy, PartialEq, Eq)]
enum DsnOutcome {
    /// The message has no sender, so there is no recipient for a DSN.
    NoSender,
    /// The DSN was not stored, because there are too many.
    Suppressed,
    /// The DSN was stored, or none is due.
    Done,
}

impl Reporter {
    /// `hostname`: the name of the reporting server in DSNs. `sink` stores them; `None`: no DSN can be sent. `watch`
    /// measures the age by which mail expires.
    pub fn new(hostname: &str, ids: &Ids, sink: Option<Arc<dyn DsnSink>>, watch: &Arc<ClockWatch>) -> Reporter {
        let (hostname, ids, watch) = (hostname.to_owned(), ids.clone(), watch.clone());
        Reporter { hostname, ids, sink, limiter: Arc::default(), watch }
    }

    /// Whether DSNs can be sent.
    pub fn can_report(&self) -> bool {
        self.sink.is_some()
    }

    /// The present time.
    pub fn now(&self) -> Timestamp {
        self.ids.clock().now()
    }

    /// Stores the DSN that is due, then settles the message, and logs each recipient. Returns the result that was
    /// settled: expired recipients are rejected in it.
    ///
    /// # Errors
    /// The disk fails, which is logged. No recipient is lost, but some may receive the message twice.
    pub fn finish_attempt(
        &self, message: QueuedMessage, result: DeliveryResult, attempt: &Attempt<'_>, lock: &mut QueueLock,
    ) -> io::Result<DeliveryResult> {
        let envelope = message.with_recipients(message.envelope.recipients.clone());
        let dropped = is_dropped(&message, attempt).then(|| message.entry().name.clone());
        let before = result.clone();
        let settled = self.apply(message, result, attempt, lock).inspect_err(|error| {
            let (session, id) = (attempt.session, &envelope.id);
            log::error!("event=settle-failed session={session} id={id} error={}", quoted(error));
        })?;
        let now = self.ids.clock().now();
        let statuses = before.recipients.iter().zip(&settled.recipients);
        for (recipient, (before, status)) in envelope.envelope.recipients.iter().zip(statuses) {
            let has_expired = before.is_open() && status.is_rejected();
            let word = if has_expired { EXPIRED } else { status.word() };
            attempt.log_as(word, &envelope, &recipient.mailbox, status, now);
            if let Some(file) = dropped.as_ref().filter(|_| status.is_rejected()) {
                let (session, id, to) = (attempt.session, &envelope.id, &recipient.mailbox);
                let (file, reply) = (quoted(file.display()), quoted(status));
                log::warn!("event=dsn-dropped session={session} id={id} to=<{to}> file={file} reply={reply}");
            }
        }
        Ok(settled)
    }

    fn apply(
        &self, mut message: QueuedMessage, mut result: DeliveryResult, attempt: &Attempt<'_>, lock: &mut QueueLock,
    ) -> io::Result<DeliveryResult> {
        let now = self.ids.clock().now();
        let age = self.watch.age(message.arrived);
        let mut late_until = None;
        let expired = match attempt.retry {
            Some(retry) => Some(retry.give_up).filter(|give_up| age > *give_up),
            // A message that was not tried in this call waits for the next one.
            None if result.decided_by == DecidedBy::UnrelatedConnectionLoss => None,
            None => attempt.expire_after.filter(|expire_after| age >= *expire_after).or_else(|| {
                let (give_up, first) = attempt.give_up.zip(message.first_offered(now))?;
                (self.watch.age(first) > give_up).then_some(give_up)
            }),
        };
        let before = result.clone();
        if let Some(give_up) = expired {
            result.recipients.iter_mut().for_each(|status| expire(status, give_up));
        }
        if let Some(retry) = attempt.retry {
            message.next_attempt = Some(SystemTime::now() + retry.pause(age, self.ids.random_number()));
            // Record this first: if the rest fails on a full disk, the message is not tried again at once. An error is
            // ignored here, because `settle` sets the time again and reports it.
            let _ = message.record_next_attempt();
            let late = retry.delay_warning.is_some_and(|delay| age > delay) && !message.is_delay_reported();
            late_until = late.then(|| self.watch.history().when(message.arrived, retry.give_up));
        }
        match self.report(&mut message, (&before, &result), attempt, &mut late_until, now) {
            Ok(outcome) => {
                message.rejections_reported = outcome != DsnOutcome::NoSender || is_dropped(&message, attempt);
            }
            Err(error) => {
                // Settle all the same: recipients that have the message must not get it again because a DSN about
                // another cannot be stored.
                log::error!("event=dsn-failed id={} error={}", message.id, quoted(error));
                late_until = None;
                let stays = attempt.expire_after.is_some();
                if stays {
                    result.clone_from(&before);
                }
                if stays || expired.is_none() {
                    result.recipients.iter_mut().for_each(defer_rejection);
                }
            }
        }
        if late_until.is_some() && result.recipients.iter().any(RecipientStatus::is_open) {
            // The settlement is more important: it follows even if this fails.
            let _ = record_delay(&mut message);
        }
        lock.settle(message, &result)?;
        Ok(result)
    }

    /// Sends one DSN for all recipients that need one. `before`: the result of the attempt, before recipients expired.
    /// `late_until`: when the message will expire, if a DSN about the delay is due; `None` afterwards if none was sent.
    fn report(
        &self, message: &mut QueuedMessage, (before, result): (&DeliveryResult, &DeliveryResult),
        attempt: &Attempt<'_>, late_until: &mut Option<Timestamp>, now: Timestamp,
    ) -> io::Result<DsnOutcome> {
        let to = match &message.envelope.from {
            ReversePath::Mailbox(to) if self.sink.is_some() => to.clone(),
            // Never a DSN about a DSN (RFC 5321 section 6.1).
            ReversePath::Mailbox(_) | ReversePath::Null => return Ok(DsnOutcome::NoSender),
        };
        let recipients = message.envelope.recipients.clone();
        let mut reports = Vec::new();
        let statuses = before.recipients.iter().zip(&result.recipients);
        let texts: Vec<_> = statuses.clone().map(|(before, status)| diagnostics(before, status)).collect();
        for ((recipient, (_, status)), (reply, verdict)) in recipients.iter().zip(statuses).zip(&texts) {
            if let Some(action) = action(recipient, status, attempt.peer_sends_dsn, late_until.is_some()) {
                reports.push(RecipientReport {
                    recipient: &recipient.mailbox,
                    original: recipient.original.as_deref(),
                    action,
                    status: status.enhanced().to_owned(),
                    remote: attempt.peer,
                    reply: reply.as_deref(),
                    verdict: verdict.as_deref(),
                    last_attempt: attempt.was_made().then_some(now),
                    // Mail that never expires has no such date.
                    retry_until: late_until.filter(|until| *until < Timestamp::from_seconds(i64::MAX)),
                });
            }
        }
        if !reports.is_empty() {
            message.rewind()?;
            let about = message.with_recipients(Vec::new());
            // 8-bit content may not be part of a 7-bit DSN (RFC 2046 section 5.2.1).
            let may_be_whole = (!message.eight_bit || !to.is_ascii()) && message.size <= RETURN_FULL_LIMIT;
            if !self.send(&about, (may_be_whole, message), &to, &reports, attempt.via)? {
                // A later attempt reports the delay.
                *late_until = None;
                return Ok(DsnOutcome::Suppressed);
            }
        }
        Ok(DsnOutcome::Done)
    }

    /// Sends a DSN of success, if the sender has asked for it: about recipients whose mail is in a mailbox here (RFC
    /// 3461 section 5.2.3), and about `others`, whose next server sends no DSN (sections 5.2.2 and 5.2.7.3). `header`:
    /// the header of the message.
    ///
    /// # Errors
    /// The DSN cannot be stored.
    pub fn report_delivered(
        &self, message: &QueuedEnvelope, others: &[(Recipient, Action)], header: &[u8],
    ) -> io::Result<()> {
        let ReversePath::Mailbox(to) = &message.envelope.from else { return Ok(()) };
        let here = message.envelope.recipients.iter().map(|recipient| (recipient, Action::Delivered));
        let reports: Vec<_> = here
            .chain(others.iter().map(|(recipient, action)| (recipient, *action)))
            .filter(|(recipient, _)| recipient.notify.success())
            .map(|(recipient, action)| RecipientReport {
                recipient: &recipient.mailbox,
                original: recipient.original.as_deref(),
                action,
                status: "2.0.0".to_owned(),
                remote: None,
                reply: None,
                verdict: None,
                last_attempt: None,
                retry_until: None,
            })
            .collect();
        match reports.as_slice() {
            [] => Ok(()),
            reports => self.send(message, (false, &mut &header[..]), to, reports, Via::Maildir).map(drop),
        }
    }

    /// Stores a DSN, unless there are too many. Returns whether it was stored. `may_be_whole`: all of `content` may be
    /// returned.
    fn send(
        &self, about: &QueuedEnvelope, (may_be_whole, content): (bool, &mut impl Read), to: &Mailbox,
        reports: &[RecipientReport<'_>], via: Via,
    ) -> io::Result<bool> {
        let Some(sink) = &self.sink else { return Ok(false) };
        let Some(wait) = self.admit(about, to, reports, via, sink.is_ours(to)) else { return Ok(false) };
        let not_before = Some(wait).filter(|wait| !wait.is_zero()).map(|wait| SystemTime::now() + wait);
        let failures = reports.iter().any(|report| matches!(report.action, Action::Failed));
        let full = failures && may_be_whole && about.envelope.ret == Some(Return::Full);
        let mut returned = Vec::new();
        content
            .take(if full { 2 * RETURN_FULL_LIMIT } else { RETURNED_HEADER_LIMIT as u64 })
            .read_to_end(&mut returned)?;
        // A part of a DSN must not have a NUL or a line of more than 998 octets (RFC 2045 section 2.7), nor be recoded.
        let full = full && is_plain(&returned);
        let utf8 = !to.is_ascii();
        let id = self.ids.queue_id();
        let dsn = Dsn {
            reporting: &self.hostname,
            to,
            envelope_id: about.envelope.envelope_id.as_deref(),
            arrived: about.arrived,
            reports,
            now: self.ids.clock().now(),
            message_id: &format!("<{id}@{}>", self.hostname),
            boundary: &format!("=_{id}"),
            utf8,
            full,
            thread: Header::parse(&returned).thread(),
        };
        if !full {
            returned = dsn.returned_header(&returned, RETURNED_HEADER_LIMIT);
        }
        let mut text = dsn.head().into_bytes();
        text.extend_from_slice(&returned);
        text.extend_from_slice(dsn.tail().as_bytes());
        sink.store(&DsnMessage { to: to.clone(), text, utf8, not_before })?;
        log::info!("event=dsn-sent id={id} about={} to=<{to}>", about.id);
        if !wait.is_zero() {
            log::info!("event=dsn-waits id={id} duration={}", wait.as_secs());
        }
        Ok(true)
    }

    /// How long a DSN waits before it is sent; `None`: it is dropped, which is logged. `is_ours`: see
    /// [`DsnSink::is_ours`].
    ///
    /// Customers and users here get every DSN, except that DSNs of success are limited: untrusted clients may forge the
    /// sender of mail to a customer.
    fn admit(
        &self, about: &QueuedEnvelope, to: &Mailbox, reports: &[RecipientReport<'_>], via: Via, is_ours: bool,
    ) -> Option<Duration> {
        let action = reports.iter().map(|report| report.action).min().unwrap_or(Action::Failed);
        let needed = matches!(action, Action::Failed | Action::Delayed);
        if via == Via::Administrator || is_ours && (needed || via != Via::Atrn) {
            return Some(Duration::ZERO);
        }
        let host = to.host().to_string();
        let wait = self.limiter.admit(action, &host, Instant::now());
        if wait.is_err() {
            let reason = quoted(format!("too many DSNs: {}", action.name()));
            log::warn!("event=dsn-suppressed about={} to=<{to}> reason={reason}", about.id);
        }
        wait.ok()
    }
}

/// Records that the sender has received a DSN about the delay. If that fails, it is logged, and the sender gets another
/// DSN.
fn record_delay(message: &mut QueuedMessage) -> io::Result<()> {
    message.mark_delay_reported().inspect_err(|error| {
        log::warn!("event=delay-not-recorded id={} error={}", message.id, quoted(error));
    })
}

/// Whether a rejected message is dropped instead of set aside: outgoing mail without a sender, such as a DSN (RFC 5321
/// section 6.1). Mail for recipients here is set aside for the postmaster.
fn is_dropped(message: &QueuedMessage, attempt: &Attempt<'_>) -> bool {
    let is_outgoing = matches!(attempt.via, Via::Mx | Via::Smarthost | Via::Provider | Via::Submission);
    message.envelope.from == ReversePath::Null && (is_outgoing || message.queue().shared)
}

/// Whether content may be a part of a message in transfer encoding 7bit or 8bit.
fn is_plain(content: &[u8]) -> bool {
    !content.contains(&0) && content.split(|octet| *octet == b'\n').all(|line| line.len() <= CONTENT_LINE)
}

/// The `status` in the log of a recipient that has expired.
const EXPIRED: &str = "expired";

/// The text that [`expire`] writes before the last status.
const AT_LAST: &str = "; at last: ";

/// The two texts of a DSN about a recipient: the peer's last reply, if it has sent one, and this program's own
/// decision.
fn diagnostics(before: &RecipientStatus, status: &RecipientStatus) -> (Option<String>, Option<String>) {
    let text = status.to_string();
    match before.reply() {
        Some(reply) if !reply.is_from_peer() => (None, Some(text)),
        None => (None, Some(text)),
        Some(reply) if before == status => (Some(reply.to_string()), None),
        Some(reply) => (Some(reply.to_string()), text.split(AT_LAST).next().map(str::to_owned)),
    }
}

/// The action that a DSN reports for a recipient; `None`: no DSN is due (RFC 3461 section 5.2).
fn action(recipient: &Recipient, status: &RecipientStatus, peer_sends_dsn: bool, late: bool) -> Option<Action> {
    let notify = &recipient.notify;
    match status {
        RecipientStatus::Rejected(_) => notify.failure().then_some(Action::Failed),
        RecipientStatus::Sent(_) => (notify.success() && !peer_sends_dsn).then_some(Action::Relayed),
        RecipientStatus::Deferred(_) | RecipientStatus::InDoubt => (late && notify.delay()).then_some(Action::Delayed),
    }
}

/// Defers a rejection whose DSN could not be stored, so that the next attempt reports it.
fn defer_rejection(status: &mut RecipientStatus) {
    if let RecipientStatus::Rejected(reply) = status {
        *status =
            RecipientStatus::Deferred(Reply::new(451, "4.3.0", format!("A DSN could not be stored about: {reply}")));
    }
}

/// If the recipient is open, rejects it because the message has expired (RFC 5321 section 4.5.4.1).
fn expire(status: &mut RecipientStatus, after: Duration) {
    if status.is_open() {
        let text = format!("Given up after {}{AT_LAST}{status}", long_time(after));
        *status = RecipientStatus::Rejected(Reply::new(554, "5.4.7", text));
    }
}

/// A duration in words: seconds below two hours, hours below a week, then days.
fn long_time(time: Duration) -> String {
    const DAY: u64 = 24 * 60 * 60;
    match time.as_secs() {
        1 => "1 second".to_owned(),
        seconds if seconds < 7200 => format!("{seconds} seconds"),
        seconds if seconds < 7 * DAY || seconds % DAY != 0 => format!("{} hours", seconds / 3600),
        seconds => format!("{} days", seconds / DAY),
    }
}

#[cfg(test)]
mod tests;
