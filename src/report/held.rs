//! Held mail expires, or its sender is warned, without an attempt: it waits for its customer, which may never call.

use std::collections::HashSet;
use std::io;
use std::time::Duration;

use super::calls::LastCall;
use super::clock_history::ClockHistory;
use super::clock_watch::ClockWatch;
use super::{Attempt, DsnOutcome, EXPIRED, Reporter, Via, is_dropped, long_time, record_delay};
use crate::clock::Timestamp;
use crate::mail::address::ReversePath;
use crate::maildir::{DELAY_REPORTED, Entry, IN_DOUBT};
use crate::net::trace::quoted;
use crate::queue::{QueueLock, QueuedMessage};
use crate::smtp::reply::Reply;
use crate::smtp::status::{DecidedBy, DeliveryResult, RecipientStatus};

/// When the held mail of a customer expires, and when its senders are warned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldExpiry {
    /// A message of this age expires. `None`: never.
    pub expire_after: Option<Duration>,
    /// The sender of a message of this age gets a DSN about the delay, unless the customer has called since the message
    /// arrived. `None`: never.
    pub delay_warning: Option<Duration>,
    pub last_call: LastCall,
}

/// The outcome of [`Reporter::expire_held`] for one message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeldOutcome {
    /// The message has expired.
    Expired,
    /// The sender was warned. The message expires at this time; `None`: never.
    Warned(Option<Timestamp>),
    /// Nothing is due yet, but at this time; `None`: never.
    Waits(Option<Timestamp>),
    /// The DSN that is due cannot be sent now, because there are too many. The message stays.
    TooManyDsns,
}

impl HeldExpiry {
    /// Whether a warning may be due for a message with this time of arrival: the customer has not called since.
    fn may_warn(&self, arrived: Timestamp) -> bool {
        match self.last_call {
            LastCall::Never => true,
            LastCall::At(at) => at < arrived,
            LastCall::Unknown => false,
        }
    }

    /// When something is due for a message of this name and time of arrival. `None`: never.
    pub fn due(&self, history: &ClockHistory, entry: &Entry, arrived: Timestamp) -> Option<Timestamp> {
        let warning = self.delay_warning.filter(|_| !entry.has(DELAY_REPORTED) && self.may_warn(arrived));
        self.expire_after.into_iter().chain(warning).min().map(|age| history.when(arrived, age))
    }

    /// The least age at which something is due for a message. `None`: nothing ever is.
    pub fn shortest(&self) -> Option<Duration> {
        self.expire_after.into_iter().chain(self.delay_warning).min()
    }

    /// The text about the last call in a DSN.
    fn last_call(&self) -> String {
        match self.last_call {
            LastCall::Never => "no call of the recipient's mail server for its mail is known".to_owned(),
            LastCall::At(at) => {
                let day = at.rfc3339();
                let day = day.split('T').next().unwrap_or_default();
                format!("the recipient's mail server last called for its mail on {day}")
            }
            LastCall::Unknown => "it is not known when the recipient's mail server last called for its mail".to_owned(),
        }
    }
}

impl Reporter {
    /// The watch by which mail expires.
    pub fn watch(&self) -> &ClockWatch {
        &self.watch
    }

    /// If a held message is old enough, lets it expire (RFC 5321 section 4.5.4.1) or warns its sender. `lock`: that of
    /// its queue. `suppressed`: the hosts to which this pass can send no more DSNs, each with `true` for DSNs of
    /// expiry.
    ///
    /// # Errors
    /// The disk fails, which is logged. The message stays as it was, and its sender may get the DSN once more.
    pub fn expire_held(
        &self, mut message: QueuedMessage, held: &HeldExpiry, suppressed: &mut HashSet<(bool, String)>,
        lock: &mut QueueLock,
    ) -> io::Result<HeldOutcome> {
        let age = self.watch.age(message.arrived);
        let is_due = |limit: Option<Duration>| limit.filter(|limit| age >= *limit);
        let expired = is_due(held.expire_after);
        let warns =
            is_due(held.delay_warning).is_some() && !message.is_delay_reported() && held.may_warn(message.arrived);
        if expired.is_none() && !warns {
            let due = held.due(&self.watch.history(), message.entry(), message.arrived);
            lock.put_back(message);
            return Ok(HeldOutcome::Waits(due));
        }
        let sender = match &message.envelope.from {
            ReversePath::Mailbox(from) => Some((expired.is_some(), from.host().to_string())),
            ReversePath::Null => None,
        };
        if sender.as_ref().is_some_and(|sender| suppressed.contains(sender)) {
            lock.put_back(message);
            return Ok(HeldOutcome::TooManyDsns);
        }
        let attempt = Attempt { via: Via::Atrn, ..Attempt::in_maildir("-", "-") };
        let before = DeliveryResult::all(waits(&message, held), message.envelope.recipients.len(), DecidedBy::Us);
        let result = expired.map_or_else(|| before.clone(), |after| expire_all(&before, &message, after, held));
        let now = self.now();
        let expiry = held.expire_after.map(|after| self.watch.history().when(message.arrived, after));
        let mut late_until = expired.is_none().then(|| expiry.unwrap_or(Timestamp::from_seconds(i64::MAX)));
        let reported = self.report(&mut message, (&before, &result), &attempt, &mut late_until, now);
        let outcome = match reported {
            Ok(DsnOutcome::Suppressed) => {
                suppressed.extend(sender);
                lock.put_back(message);
                return Ok(HeldOutcome::TooManyDsns);
            }
            Ok(outcome) => outcome,
            Err(error) => {
                log::error!("event=dsn-failed id={} error={}", message.id, quoted(&error));
                lock.put_back(message);
                return Err(error);
            }
        };
        let envelope = message.with_recipients(message.envelope.recipients.clone());
        let settled = if expired.is_none() {
            let recorded = record_delay(&mut message);
            lock.put_back(message);
            recorded
        } else {
            message.rejections_reported = outcome != DsnOutcome::NoSender || is_dropped(&message, &attempt);
            lock.settle(message, &result).inspect_err(|error| {
                log::error!("event=settle-failed session=- id={} error={}", envelope.id, quoted(error));
            })
        };
        settled?;
        if expired.is_none() {
            return Ok(HeldOutcome::Warned(expiry));
        }
        for (recipient, status) in envelope.envelope.recipients.iter().zip(&result.recipients) {
            attempt.log_as(EXPIRED, &envelope, &recipient.mailbox, status, now);
        }
        Ok(HeldOutcome::Expired)
    }
}

/// The status of each recipient of a message that waits for a call.
fn waits(message: &QueuedMessage, held: &HeldExpiry) -> RecipientStatus {
    match message.entry().has(IN_DOUBT) {
        true => RecipientStatus::InDoubt,
        // RFC 3463 section 3.5: 4.4.1, "no answer from host".
        false => {
            RecipientStatus::Deferred(Reply::new(451, "4.4.1", format!("The message waits: {}", held.last_call())))
        }
    }
}

/// Rejects all recipients of a message, because it has expired.
fn expire_all(before: &DeliveryResult, message: &QueuedMessage, after: Duration, held: &HeldExpiry) -> DeliveryResult {
    let mut text = format!("Given up after {}: {}", long_time(after), held.last_call());
    if message.entry().has(IN_DOUBT) {
        text += "; the message may have been delivered, as the connection was lost before the reply (RFC 1047)";
    } else if let Some(reply) = message.last_reply() {
        text += &format!("; its last reply to the message: {reply}");
    }
    let status = RecipientStatus::Rejected(Reply::new(554, "5.4.7", text));
    DeliveryResult::all(status, before.recipients.len(), before.decided_by)
}
