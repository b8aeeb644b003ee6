//! The steps after an attempt: DSNs, delays, expiry.

use std::sync::Mutex;

use super::*;
use crate::mail::address::{Domain, reverse_path};
use crate::maildir::{AttemptRecord, Maildir};
use crate::queue::{Queue, QueueName};
use crate::smtp::command::Notify;
use crate::smtp::reply::ReplyReader;

const HOUR: i64 = 3600;

/// Collects the DSNs that are stored.
#[derive(Default)]
struct StoredDsns(Mutex<Vec<String>>);

impl DsnSink for StoredDsns {
    fn store(&self, dsn: &DsnMessage) -> io::Result<()> {
        let text = String::from_utf8_lossy(&dsn.text).into_owned();
        self.0.lock().unwrap().push(text);
        Ok(())
    }

    fn is_ours(&self, _: &Mailbox) -> bool {
        false
    }
}

/// One message to `to@example.net`, a reporter, and the DSNs that it stores.
struct Case {
    directory: tempfile::TempDir,
    queue: Queue,
    name: QueueName,
    reporter: Reporter,
    stored: Arc<StoredDsns>,
}

impl Case {
    /// A message with this sender, NOTIFY, and age in seconds.
    fn new(from: &str, notify: &str, age: i64) -> Case {
        let (directory, ids, stored) = (tempfile::tempdir().unwrap(), Ids::fixed(), Arc::<StoredDsns>::default());
        let queue = Queue::new("host", ids.clone(), Duration::from_secs(60));
        let domain = Domain::parse("example.net");
        let name = QueueName {
            path: directory.path().join("outgoing/example.net"),
            domain,
            retries: true,
            ..QueueName::default()
        };
        let notify = if notify.is_empty() { Notify::default() } else { Notify::parse(notify.as_bytes()).unwrap() };
        let mailbox = Mailbox::parse("to@example.net").unwrap();
        let envelope = Envelope {
            recipients: vec![Recipient { mailbox, notify, original: None }],
            ..Envelope::new(reverse_path(from.as_bytes()).unwrap().0)
        };
        let arrived = Timestamp::from_seconds(ids.clock().now().seconds() - age);
        let envelope = QueuedEnvelope { id: "id".to_owned(), arrived, envelope };
        let mut writer = queue.begin_message(&[(name.clone(), envelope)], "").unwrap();
        writer.write(b"Subject: the one\n\nbody\n").unwrap();
        writer.commit().unwrap();
        let watch = Arc::new(ClockWatch::new(directory.path(), ids.clock()));
        let reporter = Reporter::new("relay.example.net", &ids, Some(stored.clone()), &watch);
        Case { directory, queue, name, reporter, stored }
    }

    /// Makes one attempt with this status. Returns the DSNs that were stored.
    fn attempt(&self, status: RecipientStatus, dsn: bool) -> Vec<String> {
        let hours = |hours: u64| Duration::from_secs(3600 * hours);
        let retry = Retry {
            first: Duration::from_secs(300),
            max: hours(4),
            give_up: hours(120),
            delay_warning: Some(hours(4)),
        };
        // The next attempt is due at once.
        let maildir = Maildir::new(&self.name.path);
        for entry in maildir.entries().unwrap() {
            std::fs::File::open(maildir.file(&entry)).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        }
        let mut lock = self.queue.lock(std::slice::from_ref(&self.name)).unwrap();
        let message = lock.next_message().unwrap();
        let (session, relay) = ("1", "mx.example.net");
        let (peer, retry) = (Some(relay), Some(&retry));
        let attempt =
            Attempt { relay, peer, peer_sends_dsn: dsn, retry, via: Via::Mx, ..Attempt::in_maildir(session, "-") };
        let result = DeliveryResult { recipients: vec![status], decided_by: DecidedBy::Peer };
        self.reporter.finish_attempt(message, result, &attempt, &mut lock).unwrap();
        std::mem::take(&mut *self.stored.0.lock().unwrap())
    }

    /// The numbers of messages in the queue and in `.refused`.
    fn left(&self) -> (usize, usize) {
        let maildir = Maildir::new(&self.name.path);
        let set_aside = Maildir::new(self.directory.path().join("outgoing/example.net/.refused"));
        (maildir.entries().unwrap().len(), set_aside.entries().unwrap().len())
    }
}

fn rejected() -> RecipientStatus {
    RecipientStatus::Rejected(Reply::new(550, "5.1.1", "unknown"))
}

fn deferred() -> RecipientStatus {
    RecipientStatus::Deferred(Reply::new(451, "4.4.1", "later"))
}

fn sent() -> RecipientStatus {
    RecipientStatus::Sent(Reply::new(250, "2.0.0", "accepted"))
}

/// RFC 3461 section 5.2. Each check has the sender, NOTIFY, the age in hours, the status, and whether the peer offers
/// DSN; then the action and status in the DSN, and the numbers of messages that are left.
/// Rules: SMTP-66, DSN-06, DSN-07, DSN-08.
#[test]
fn each_status_is_reported_as_the_sender_asked() {
    let check = |from, notify, age, status: RecipientStatus, dsn, wanted: &str, left| {
        let case = Case::new(from, notify, age * HOUR);
        let dsns = case.attempt(status.clone(), dsn);
        let row = format!("{from} {notify} {age} {status:?} {dsn}");
        let seen: Vec<_> = dsns
            .iter()
            .map(|text| {
                let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("-");
                assert!(text.contains("Auto-Submitted: auto-replied") && text.contains("Subject: the one"), "{row}");
                format!("{} {}", field("Action: "), field("Status: "))
            })
            .collect();
        assert_eq!(seen.join(", "), wanted, "{row}");
        assert_eq!(case.left(), left, "{row}");
    };
    let own = "<a@b.example>";
    check(own, "", 0, rejected(), false, "failed 5.1.1", (0, 0));
    check(own, "SUCCESS", 0, rejected(), false, "", (0, 0));
    check(own, "NEVER", 0, rejected(), false, "", (0, 0));
    // There is no DSN about a DSN (RFC 5321 section 6.1).
    check("<>", "", 0, rejected(), false, "", (0, 0));
    check("<>", "", 121, deferred(), false, "", (0, 0));
    check(own, "", 0, sent(), false, "", (0, 0));
    check(own, "SUCCESS", 0, sent(), false, "relayed 2.0.0", (0, 0));
    check(own, "SUCCESS", 0, sent(), true, "", (0, 0));
    check(own, "", 3, deferred(), false, "", (1, 0));
    check(own, "", 5, deferred(), false, "delayed 4.4.1", (1, 0));
    check(own, "FAILURE", 5, deferred(), false, "", (1, 0));
    check("<>", "", 5, deferred(), false, "", (1, 0));
    check(own, "", 5, RecipientStatus::InDoubt, false, "delayed 4.4.2", (1, 0));
    check(own, "", 121, deferred(), false, "failed 5.4.7", (0, 0));
    check(own, "", 121, RecipientStatus::InDoubt, false, "failed 5.4.7", (0, 0));
    check(own, "", 121, sent(), false, "", (0, 0));
}

/// Untrusted clients may ask for any number of them.
#[test]
fn dsns_of_success_are_limited() {
    let case = Case::new("<a@b.example>", "SUCCESS", 0);
    let mut lock = case.queue.lock(std::slice::from_ref(&case.name)).unwrap();
    let mut envelope = {
        let message = lock.next_message().unwrap();
        message.with_recipients(message.envelope.recipients.clone())
    };
    let mut count = |from: &str| {
        envelope.envelope.from = reverse_path(from.as_bytes()).unwrap().0;
        (0..100).for_each(|_| case.reporter.report_delivered(&envelope, &[], b"Subject: x\n\n").unwrap());
        std::mem::take(&mut *case.stored.0.lock().unwrap()).len()
    };
    assert_eq!(count("<a@b.example>"), 30);
    assert_eq!(count("<x@other.example>"), 30);
    assert_eq!(count("<a@[192.0.2.1]>"), 30);
}

/// A message of 1970 or of next year expires five days after it was first seen, not before.
#[test]
fn an_impossible_time_of_arrival_makes_no_message_late() {
    let now = Ids::fixed().clock().now().seconds();
    for age in [now, -365 * 24 * HOUR] {
        let case = Case::new("<a@b.example>", "", age);
        for since in [0, 3, 5, 121] {
            let maildir = Maildir::new(&case.name.path);
            if let Some(entry) =
                maildir.entries().unwrap().into_iter().find(|entry| entry.record().first_seen.is_some())
            {
                let first_seen = Some(Timestamp::from_seconds(now - since * HOUR));
                maildir.rename(&entry, None, &AttemptRecord { first_seen, ..entry.record() }).unwrap();
            }
            let dsns = case.attempt(deferred(), false).concat();
            let action = dsns.lines().find_map(|line| line.strip_prefix("Action: "));
            let wanted = [(5, "delayed"), (121, "failed")].iter().find(|(hours, _)| *hours == since);
            assert_eq!(action, wanted.map(|(_, action)| *action), "{age} {since}");
        }
        assert_eq!(case.left(), (0, 0));
    }
}

#[test]
fn the_sender_gets_one_dsn_about_a_delay() {
    let case = Case::new("<a@b.example>", "", 5 * HOUR);
    assert_eq!(case.attempt(deferred(), false).len(), 1);
    assert_eq!(case.attempt(deferred(), false).len(), 0);
    assert_eq!(case.attempt(rejected(), false).len(), 1);
    assert_eq!(case.left(), (0, 0));
}

/// Two weeks after the first attempt a call is lost during another message: this one was not tried, so it is not
/// returned to its sender.
#[test]
fn a_message_that_was_not_tried_in_a_call_does_not_expire_by_it() {
    let now = Ids::fixed().clock().now().seconds();
    for (decided_by, expired) in [(DecidedBy::UnrelatedConnectionLoss, 0), (DecidedBy::ConnectionLoss, 1)] {
        let case = Case::new("<a@b.example>", "", 0);
        let maildir = Maildir::new(&case.name.path);
        let entry = maildir.entries().unwrap().remove(0);
        let first_offered = Some(Timestamp::from_seconds(now - 15 * 24 * HOUR));
        maildir.rename(&entry, None, &AttemptRecord { first_offered, attempts: 1, ..entry.record() }).unwrap();
        let mut lock = case.queue.lock(std::slice::from_ref(&case.name)).unwrap();
        let message = lock.next_message().unwrap();
        let attempt = Attempt {
            via: Via::Atrn,
            give_up: Some(Duration::from_secs(14 * 24 * 3600)),
            ..Attempt::in_maildir("1", "-")
        };
        let result = DeliveryResult { recipients: vec![deferred()], decided_by };
        case.reporter.finish_attempt(message, result, &attempt, &mut lock).unwrap();
        assert_eq!((case.stored.0.lock().unwrap().len(), case.left()), (expired, (1 - expired, 0)));
    }
}

/// It does not expire if it was not tried, or if the DSN cannot be stored.
#[test]
fn a_message_that_a_session_defers_expires_by_its_age() {
    struct FullDisk;
    impl DsnSink for FullDisk {
        fn store(&self, _: &DsnMessage) -> io::Result<()> {
            Err(io::ErrorKind::StorageFull.into())
        }

        fn is_ours(&self, _: &Mailbox) -> bool {
            false
        }
    }
    let expire_after = Some(Duration::from_secs(3600));
    for (age, decided_by, full, status) in [
        (HOUR, DecidedBy::Peer, false, "rejected"),
        (HOUR, DecidedBy::ConnectionLoss, false, "rejected"),
        (HOUR - 1, DecidedBy::Peer, false, "deferred"),
        (HOUR, DecidedBy::UnrelatedConnectionLoss, false, "deferred"),
        (HOUR, DecidedBy::Peer, true, "deferred"),
    ] {
        let mut case = Case::new("<a@b.example>", "", age);
        if full {
            case.reporter.sink = Some(Arc::new(FullDisk));
        }
        let mut lock = case.queue.lock(std::slice::from_ref(&case.name)).unwrap();
        let message = lock.next_message().unwrap();
        let attempt = Attempt { via: Via::Atrn, expire_after, ..Attempt::in_maildir("1", "-") };
        let result = DeliveryResult { recipients: vec![deferred()], decided_by };
        let settled = case.reporter.finish_attempt(message, result, &attempt, &mut lock).unwrap();
        assert_eq!(settled.recipients[0].word(), status, "{age} {decided_by:?} {full}");
        let is_gone = status == "rejected";
        assert_eq!(
            (case.left(), case.stored.0.lock().unwrap().len()),
            ((usize::from(!is_gone), 0), usize::from(is_gone))
        );
    }
}

/// The recipient that was sent the message is settled even if the delay cannot be recorded.
#[test]
fn if_a_delay_cannot_be_recorded_no_recipient_gets_the_message_twice() {
    let case = Case::new("<a@b.example>", "", 5 * HOUR);
    let maildir = Maildir::new(&case.name.path);
    let entry = maildir.entries().unwrap().remove(0);
    let text = std::fs::read_to_string(maildir.file(&entry)).unwrap();
    let more = text.replacen("Delivered-To: ", "Delivered-To: eva@example.net\nDelivered-To: ", 1);
    std::fs::write(maildir.file(&entry), more).unwrap();
    std::fs::File::open(maildir.file(&entry)).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
    let mut lock = case.queue.lock(std::slice::from_ref(&case.name)).unwrap();
    let message = lock.next_message().unwrap();
    // The flag would move it to `cur`.
    std::fs::remove_dir(maildir.path().join("cur")).unwrap();
    std::fs::write(maildir.path().join("cur"), "a file where a directory should be").unwrap();
    let retry = Retry::default();
    let attempt = Attempt { retry: Some(&retry), ..Attempt::in_maildir("1", "-") };
    let result = DeliveryResult { recipients: vec![sent(), deferred()], decided_by: DecidedBy::Peer };
    let _ = case.reporter.finish_attempt(message, result, &attempt, &mut lock);
    std::fs::remove_file(maildir.path().join("cur")).unwrap();
    let mut open = Vec::new();
    drop(lock);
    case.queue
        .list(&case.name, &mut |message| {
            let recipients = message.envelope.unwrap().envelope.recipients;
            open.extend(recipients.iter().map(|recipient| recipient.mailbox.to_string()));
            Ok(())
        })
        .unwrap();
    assert_eq!(open, ["to@example.net"]);
}

#[test]
fn content_that_a_dsn_may_not_contain_is_not_returned_whole() {
    for (content, plain) in
        [(&b"Subject: x\n\nx\n"[..], true), (&[b'x'; 998], true), (&[b'x'; 999], false), (b"a\0b\n", false)]
    {
        assert_eq!(is_plain(content), plain);
    }
}

#[test]
fn a_dsn_divides_the_reply_of_the_peer_from_our_verdict() {
    let reply = |text: &str| ReplyReader::default().line(text.as_bytes()).unwrap().unwrap();
    let later = RecipientStatus::Deferred(reply("450 4.2.1 full,\tcome  back"));
    let lost = RecipientStatus::Deferred(Reply::new(451, "4.4.2", "The connection was lost"));
    let unknown = RecipientStatus::Rejected(reply("550 nobody"));
    let given_up = |status: &RecipientStatus| {
        let mut expired = status.clone();
        expire(&mut expired, Duration::from_secs(86400));
        expired
    };
    let verdict = "554 5.4.7 Given up after 24 hours";
    for (before, status, wanted) in [
        (&later, later.clone(), (Some("450 4.2.1 full,\tcome  back"), None)),
        (&later, given_up(&later), (Some("450 4.2.1 full,\tcome  back"), Some(verdict.to_owned()))),
        (&unknown, given_up(&unknown), (Some("550 nobody"), None)),
        (&lost, lost.clone(), (None, Some(lost.to_string()))),
        (&lost, given_up(&lost), (None, Some(format!("{verdict}; at last: {lost}")))),
    ] {
        assert_eq!(diagnostics(before, &status), (wanted.0.map(str::to_owned), wanted.1));
    }
}
