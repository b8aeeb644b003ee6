//! What becomes of a message after an attempt: retry times, expiry, and who is told (RFC 5321 sections 4.5.4
//! and 6.1, RFC 3461 section 5).
//!
//! A notice is durable before the mail it speaks of is removed: after a crash somebody may hear twice, never
//! not at all. The null sender is never told anything; its refused mail stays in `.refused`.

pub mod dsn;

use std::io::{self, Read};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::clock::Timestamp;
use crate::config::Retry;
use crate::ids::Ids;
use crate::mail::address::{Mailbox, ReversePath};
use crate::queue::{Envelope, QueueLock, QueuedMessage};
use crate::report::dsn::{Action, Dsn, RecipientReport};
use crate::smtp::client::{DecidedBy, DeliveryResult, RecipientStatus};
use crate::smtp::command::{Body, Recipient, Return};
use crate::smtp::reply::Reply;

/// A message up to this size comes back whole when its sender asked for that (RFC 3461 section 4.3).
const RETURN_FULL_LIMIT: u64 = 64 * 1024;

const PLAUSIBLE_AGE: i64 = 10 * 365 * 24 * 60 * 60;

/// Of a longer header no more comes back.
const RETURNED_HEADER_LIMIT: usize = 64 * 1024;

/// A notice, ready to be posted from the null sender.
pub struct DsnMessage {
    pub to: Mailbox,
    /// LF line ends.
    pub text: Vec<u8>,
    pub utf8: bool,
}

impl DsnMessage {
    /// The envelope it goes in.
    pub fn envelope(&self, ids: &Ids) -> Envelope {
        Envelope {
            from: ReversePath::Null,
            recipients: vec![Recipient::plain(self.to.clone())],
            id: ids.queue_id(),
            arrived: ids.clock().now(),
            body: if self.utf8 { Body::EightBit } else { Body::SevenBit },
            utf8: self.utf8,
            ret: None,
            envelope_id: None,
        }
    }
}

/// Puts a notice where its addressee will find it, durably.
pub trait DsnSink: Send + Sync {
    fn store(&self, letter: &DsnMessage) -> io::Result<()>;
}

/// The peer an attempt was made with.
#[derive(Clone, Copy, Default)]
pub struct Peer<'a> {
    pub name: Option<&'a str>,
    /// It offers DSN, so the rest is its affair (RFC 3461 section 5.2.2).
    pub dsn: bool,
}

/// One attempt at a message.
#[derive(Clone, Copy)]
pub struct Attempt<'a> {
    pub peer: Peer<'a>,
    /// This is outgoing mail, tried again and given up.
    pub retry: Option<&'a Retry>,
    /// What a delivery is called in the log, and what stands there of the session.
    pub done: &'a str,
    pub context: &'a str,
}

/// Acts on outcomes.
#[derive(Clone)]
pub struct Reporter {
    hostname: String,
    ids: Ids,
    /// None: nobody can be told.
    sink: Option<Arc<dyn DsnSink>>,
}

impl Reporter {
    pub fn new(hostname: &str, ids: &Ids, post: Option<Arc<dyn DsnSink>>) -> Reporter {
        Reporter { hostname: hostname.to_owned(), ids: ids.clone(), sink: post }
    }

    /// Tells who is to be told, then settles; logs either.
    pub fn finish_attempt(
        &self,
        message: QueuedMessage,
        result: DeliveryResult,
        attempt: &Attempt<'_>,
        lock: &mut QueueLock,
    ) -> io::Result<DeliveryResult> {
        let (id, size, recipients) = (message.envelope.id.clone(), message.size, message.envelope.recipients.clone());
        let context = attempt.context;
        let concluded = self.apply(message, result, attempt.peer, attempt.retry, lock).inspect_err(|error| {
            log::error!("event=settle-failed {context} id={id} error={:?}", error.to_string());
        })?;
        for (recipient, status) in recipients.iter().zip(&concluded.recipients) {
            let (word, reply) = match status {
                RecipientStatus::Sent(reply) => (attempt.done, reply.to_string()),
                RecipientStatus::Deferred(reply) => ("deferred", reply.to_string()),
                RecipientStatus::Rejected(reply) => ("refused", reply.to_string()),
                RecipientStatus::InDoubt => ("in-doubt", String::new()),
            };
            log::info!("event={word} {context} id={id} size={size} to=<{}> reply={reply:?}", recipient.mailbox);
        }
        Ok(concluded)
    }

    fn apply(
        &self,
        mut message: QueuedMessage,
        mut result: DeliveryResult,
        peer: Peer<'_>,
        retry: Option<&Retry>,
        lock: &mut QueueLock,
    ) -> io::Result<DeliveryResult> {
        let now = self.ids.clock().now();
        // What we have decided is no word of the peer's.
        let peer = match result.decided_by {
            DecidedBy::Us => Peer { name: None, ..peer },
            DecidedBy::Peer | DecidedBy::PeerAtMail | DecidedBy::ConnectionLoss => peer,
        };
        let age = age(&message, now);
        let mut late = false;
        if let Some(retry) = retry {
            if age > retry.give_up {
                result.recipients.iter_mut().for_each(|status| expire(status, retry.give_up));
            }
            message.next_attempt = Some(SystemTime::now() + retry_pause(retry, age, self.ids.random_number()));
            // First of all, and it takes no room: whatever fails below, this is not sent again at once.
            message.record_next_attempt()?;
            late = retry.delay_notice.is_some_and(|delay| age > delay) && !message.is_delay_reported();
        }
        let until =
            retry.map(|retry| Timestamp::from_seconds(message.envelope.arrived.seconds() + seconds(retry.give_up)));
        message.rejections_reported = match self.report(&mut message, &result, peer, until.filter(|_| late), now) {
            Ok(told) => told,
            Err(error) => {
                // Who has the mail must not get it again because somebody else cannot be told.
                log::error!("event=notice-failed id={} error={:?}", message.envelope.id, error.to_string());
                late = false;
                if retry.is_none_or(|retry| age <= retry.give_up) {
                    result.recipients.iter_mut().for_each(defer_rejection);
                }
                false
            }
        };
        if late
            && result
                .recipients
                .iter()
                .any(|status| matches!(status, RecipientStatus::Deferred(_) | RecipientStatus::InDoubt))
        {
            message.mark_delay_reported()?;
        }
        message.settle(&result, lock)?;
        Ok(result)
    }

    /// One notice for all recipients of whom something is to be told. `false`: the sender cannot be told.
    fn report(
        &self,
        message: &mut QueuedMessage,
        result: &DeliveryResult,
        peer: Peer<'_>,
        late_until: Option<Timestamp>,
        now: Timestamp,
    ) -> io::Result<bool> {
        let to = match &message.envelope.from {
            ReversePath::Mailbox(to) if self.sink.is_some() => to.clone(),
            // RFC 5321 section 6.1: never a notice about a notice.
            ReversePath::Mailbox(_) | ReversePath::Null => return Ok(false),
        };
        let recipients = message.envelope.recipients.clone();
        let texts: Vec<_> = result.recipients.iter().map(DiagnosticText::of).collect();
        let mut reports = Vec::new();
        for ((recipient, status), words) in recipients.iter().zip(&result.recipients).zip(&texts) {
            if let Some(action) = action(recipient, status, peer, late_until.is_some()) {
                let delayed = matches!(action, Action::Delayed);
                reports.push(RecipientReport {
                    recipient: &recipient.mailbox,
                    original: recipient.original.as_deref(),
                    action,
                    status: words.status.clone(),
                    remote: peer.name,
                    diagnostic: words.diagnostic.as_deref(),
                    last_attempt: Some(now),
                    retry_until: late_until.filter(|_| delayed),
                });
            }
        }
        if !reports.is_empty() {
            message.rewind()?;
            let envelope = message.envelope.clone();
            let size = (!message.eight_bit || !to.is_ascii()).then_some(message.size);
            self.send(&envelope, size, message, &to, &reports, now)?;
        }
        Ok(true)
    }

    /// Final delivery has been made: those who asked are told (RFC 3461 section 5.2.3). `others`: recipients that
    /// somebody has who will not tell (sections 5.2.2 and 5.2.7.3). `header`: the message's.
    pub fn report_delivered(
        &self,
        envelope: &Envelope,
        others: &[(Recipient, Action)],
        header: &[u8],
    ) -> io::Result<()> {
        let ReversePath::Mailbox(to) = &envelope.from else { return Ok(()) };
        let here = envelope.recipients.iter().map(|recipient| (recipient, Action::Delivered));
        let reports: Vec<_> = here
            .chain(others.iter().map(|(recipient, action)| (recipient, *action)))
            .filter(|(recipient, _)| recipient.notify.success())
            .map(|(recipient, action)| RecipientReport {
                recipient: &recipient.mailbox,
                original: recipient.original.as_deref(),
                action,
                status: "2.0.0".to_owned(),
                remote: None,
                diagnostic: None,
                last_attempt: None,
                retry_until: None,
            })
            .collect();
        match reports.as_slice() {
            [] => Ok(()),
            reports => self.send(envelope, None, &mut &header[..], to, reports, self.ids.clock().now()),
        }
    }

    fn send(
        &self,
        envelope: &Envelope,
        // Of the content, where it may be returned whole at all: 8-bit content may not be wrapped into a 7-bit
        // notice (RFC 2046 section 5.2.1).
        size: Option<u64>,
        content: &mut impl Read,
        to: &Mailbox,
        reports: &[RecipientReport<'_>],
        now: Timestamp,
    ) -> io::Result<()> {
        let failures = reports.iter().any(|report| matches!(report.action, Action::Failed));
        let utf8 = !to.is_ascii();
        let short = size.is_some_and(|size| size <= RETURN_FULL_LIMIT);
        let full = failures && short && envelope.ret == Some(Return::Full);
        let id = self.ids.queue_id();
        let message_id = format!("<{id}@{}>", self.hostname);
        let boundary = format!("=_{id}");
        let notice = Dsn {
            reporting: &self.hostname,
            to,
            envelope_id: envelope.envelope_id.as_deref(),
            arrived: envelope.arrived,
            received_from: None,
            reports,
            now,
            message_id: &message_id,
            boundary: &boundary,
            utf8,
            full,
        };
        let returned = match full {
            true => {
                let mut whole = Vec::new();
                content.take(2 * RETURN_FULL_LIMIT).read_to_end(&mut whole)?;
                whole
            }
            false => notice.returned_header(content, RETURNED_HEADER_LIMIT)?,
        };
        let mut text = notice.head().into_bytes();
        text.extend_from_slice(&returned);
        text.extend_from_slice(notice.tail().as_bytes());
        let Some(post) = &self.sink else { return Ok(()) };
        post.store(&DsnMessage { to: to.clone(), text, utf8 })?;
        log::info!("event=notice id={id} about={} to=<{to}>", envelope.id);
        Ok(())
    }
}

/// Status and diagnosis of a fate, for a report.
struct DiagnosticText {
    status: String,
    diagnostic: Option<String>,
}

impl DiagnosticText {
    fn of(status: &RecipientStatus) -> DiagnosticText {
        let (reply, class) = match status {
            RecipientStatus::Sent(reply) => (Some(reply), "2.0.0"),
            RecipientStatus::Deferred(reply) => (Some(reply), "4.0.0"),
            RecipientStatus::Rejected(reply) => (Some(reply), "5.0.0"),
            RecipientStatus::InDoubt => (None, "4.4.2"),
        };
        DiagnosticText {
            // RFC 3464 section 2.3.4: where the peer gave no code, its class is all that is known.
            status: reply.and_then(Reply::enhanced).unwrap_or(class).to_owned(),
            diagnostic: reply.map(Reply::to_string),
        }
    }
}

/// What is to be told of a recipient, if anything (RFC 3461 section 5.2).
fn action(recipient: &Recipient, status: &RecipientStatus, peer: Peer<'_>, late: bool) -> Option<Action> {
    let notify = &recipient.notify;
    match status {
        RecipientStatus::Rejected(_) => notify.failure().then_some(Action::Failed),
        RecipientStatus::Sent(_) => (notify.success() && !peer.dsn).then_some(Action::Relayed),
        RecipientStatus::Deferred(_) | RecipientStatus::InDoubt => (late && notify.delay()).then_some(Action::Delayed),
    }
}

/// A refusal of which its sender could not be told is tried again, and told of then.
fn defer_rejection(status: &mut RecipientStatus) {
    if let RecipientStatus::Rejected(reply) = status {
        *status =
            RecipientStatus::Deferred(Reply::new(451, "4.3.0", format!("A notice could not be stored about: {reply}")));
    }
}

/// RFC 5321 section 4.5.4.1: after four or five days nobody tries any longer.
fn expire(status: &mut RecipientStatus, after: Duration) {
    let last = match status {
        RecipientStatus::Deferred(reply) => reply.to_string(),
        RecipientStatus::InDoubt => "no reply to the content".to_owned(),
        RecipientStatus::Sent(_) | RecipientStatus::Rejected(_) => return,
    };
    let time = match after.as_secs() {
        seconds if seconds < 7200 => format!("{seconds} seconds"),
        seconds => format!("{} hours", seconds / 3600),
    };
    *status = RecipientStatus::Rejected(Reply::new(554, "5.4.7", format!("Given up after {time}; at last: {last}")));
}

/// The pause before the next attempt: half the message's age, within bounds, a fifth more or less by chance
/// so that what failed together is not tried together. The age stands in the file, so no count is kept.
fn retry_pause(retry: &Retry, age: Duration, chance: u64) -> Duration {
    let pause = (age / 2).clamp(retry.first, retry.max);
    let permille = 800 + u32::try_from(chance % 401).unwrap_or(0);
    (pause * permille / 1000).max(Duration::from_millis(1))
}

fn age(message: &QueuedMessage, now: Timestamp) -> Duration {
    let seconds = now.seconds().saturating_sub(message.envelope.arrived.seconds());
    // So old no letter is: it came before the clock was set, and its age is not known.
    let seconds = if seconds > PLAUSIBLE_AGE { 0 } else { seconds };
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

fn seconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_secs()).unwrap_or(i64::MAX / 4)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::mail::address::{Domain, reverse_path};
    use crate::queue::{Queue, QueueName};
    use crate::smtp::command::Notify;

    const HOUR: i64 = 3600;

    /// Keeps what is posted.
    #[derive(Default)]
    struct Letterbox(Mutex<Vec<String>>);

    impl DsnSink for Letterbox {
        fn store(&self, letter: &DsnMessage) -> io::Result<()> {
            let text = String::from_utf8_lossy(&letter.text).into_owned();
            self.0.lock().unwrap().push(text);
            Ok(())
        }
    }

    /// One letter to `to@example.net`, as old as that, with its sender and NOTIFY; a desk; what it has posted.
    struct Case {
        folder: tempfile::TempDir,
        queue: Queue,
        place: QueueName,
        reporter: Reporter,
        posted: Arc<Letterbox>,
    }

    impl Case {
        fn new(from: &str, notify: &str, age: i64) -> Case {
            let (folder, ids, posted) = (tempfile::tempdir().unwrap(), Ids::fixed(), Arc::<Letterbox>::default());
            let queue = Queue::new(folder.path(), "host", ids.clone(), Duration::from_secs(60));
            let place = QueueName::Destination(Domain::parse("example.net").unwrap());
            let notify = if notify.is_empty() { Notify::default() } else { Notify::parse(notify.as_bytes()).unwrap() };
            let mailbox = Mailbox::parse("to@example.net").unwrap();
            let envelope = Envelope {
                from: reverse_path(from.as_bytes()).unwrap().0,
                recipients: vec![Recipient { mailbox, notify, original: None }],
                id: "id".to_owned(),
                arrived: Timestamp::from_seconds(ids.clock().now().seconds() - age),
                body: Body::Unsaid,
                utf8: false,
                ret: None,
                envelope_id: None,
            };
            let mut copies = queue.begin_message(&[(place.clone(), envelope)], "").unwrap();
            copies.write(b"Subject: the one\n\nbody\n").unwrap();
            copies.commit().unwrap();
            let reporter = Reporter::new("relay.example.net", &ids, Some(posted.clone()));
            Case { folder, queue, place, reporter, posted }
        }

        /// One attempt that ends so; what was posted by it.
        fn attempt(&self, status: RecipientStatus, dsn: bool) -> Vec<String> {
            let hours = |hours: u64| Duration::from_secs(3600 * hours);
            let retry = Retry {
                first: Duration::from_secs(300),
                max: hours(4),
                give_up: hours(120),
                delay_notice: Some(hours(4)),
            };
            // The next attempt is not waited for.
            let maildir = self.queue.maildir(&self.place);
            for entry in maildir.entries().unwrap() {
                std::fs::File::open(maildir.file(&entry)).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
            }
            let mut lock = self.queue.lock(std::slice::from_ref(&self.place)).unwrap();
            let message = lock.next_message().unwrap();
            let peer = Peer { name: Some("mx.example.net"), dsn };
            let attempt = Attempt { peer, retry: Some(&retry), done: "relayed", context: "" };
            let result = DeliveryResult { recipients: vec![status], decided_by: DecidedBy::Peer };
            self.reporter.finish_attempt(message, result, &attempt, &mut lock).unwrap();
            std::mem::take(&mut *self.posted.0.lock().unwrap())
        }

        /// Messages that wait, and that were set aside.
        fn left(&self) -> (usize, usize) {
            let maildir = self.queue.maildir(&self.place);
            let refused = crate::maildir::Maildir::new(self.folder.path().join("outgoing/example.net/.refused"));
            (maildir.entries().unwrap().len(), refused.entries().unwrap().len())
        }
    }

    fn refused() -> RecipientStatus {
        RecipientStatus::Rejected(Reply::new(550, "5.1.1", "unknown"))
    }

    fn deferred() -> RecipientStatus {
        RecipientStatus::Deferred(Reply::new(451, "4.4.1", "later"))
    }

    fn delivered() -> RecipientStatus {
        RecipientStatus::Sent(Reply::new(250, "2.0.0", "taken"))
    }

    /// RFC 3461 section 5.2, a row each: sender, NOTIFY, age in hours, fate, whether the peer has DSN; the action
    /// and status of the one notice, and what is left.
    #[test]
    fn who_is_told_what() {
        let check = |from, notify, age, status: RecipientStatus, dsn, wanted: &str, left| {
            let case = Case::new(from, notify, age * HOUR);
            let told = case.attempt(status.clone(), dsn);
            let row = format!("{from} {notify} {age} {status:?} {dsn}");
            let seen: Vec<_> = told
                .iter()
                .map(|text| {
                    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("-");
                    assert!(
                        text.contains("Auto-Submitted: auto-replied") && text.contains("Subject: the one"),
                        "{row}"
                    );
                    format!("{} {}", field("Action: "), field("Status: "))
                })
                .collect();
            assert_eq!(seen.join(", "), wanted, "{row}");
            assert_eq!(case.left(), left, "{row}");
        };
        let own = "<a@b.example>";
        check(own, "", 0, refused(), false, "failed 5.1.1", (0, 0));
        check(own, "SUCCESS", 0, refused(), false, "", (0, 0));
        check(own, "NEVER", 0, refused(), false, "", (0, 0));
        // Never about a notice (RFC 5321 section 6.1); it is set aside.
        check("<>", "", 0, refused(), false, "", (0, 1));
        check(own, "", 0, delivered(), false, "", (0, 0));
        check(own, "SUCCESS", 0, delivered(), false, "relayed 2.0.0", (0, 0));
        check(own, "SUCCESS", 0, delivered(), true, "", (0, 0));
        check(own, "", 3, deferred(), false, "", (1, 0));
        check(own, "", 5, deferred(), false, "delayed 4.4.1", (1, 0));
        check(own, "FAILURE", 5, deferred(), false, "", (1, 0));
        check("<>", "", 5, deferred(), false, "", (1, 0));
        check(own, "", 5, RecipientStatus::InDoubt, false, "delayed 4.4.2", (1, 0));
        check(own, "", 121, deferred(), false, "failed 5.4.7", (0, 0));
        check(own, "", 121, RecipientStatus::InDoubt, false, "failed 5.4.7", (0, 0));
        check(own, "", 121, delivered(), false, "", (0, 0));
    }

    #[test]
    fn one_is_told_once_that_a_letter_is_late() {
        let case = Case::new("<a@b.example>", "", 5 * HOUR);
        assert_eq!(case.attempt(deferred(), false).len(), 1);
        assert_eq!(case.attempt(deferred(), false).len(), 0);
        assert_eq!(case.attempt(refused(), false).len(), 1);
        assert_eq!(case.left(), (0, 0));
    }

    #[test]
    fn pauses_grow_with_age_and_have_bounds() {
        let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
        let retry = Retry { first: minutes(5), max: minutes(240), give_up: minutes(7200), delay_notice: None };
        for (age, least, most) in [(0, 4, 6), (10, 4, 6), (60, 24, 36), (480, 192, 288), (7000, 192, 288)] {
            for chance in [0, 200, 400, u64::MAX] {
                let pause = retry_pause(&retry, minutes(age), chance);
                assert!((minutes(least)..=minutes(most)).contains(&pause), "{age}: {pause:?}");
            }
        }
    }
}
