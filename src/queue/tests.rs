//! What is on disk before, during and after settlements.

use std::collections::HashMap;
use std::io::Read;
use std::path::PathBuf;

use proptest::prelude::*;

use super::*;
use crate::clock::Timestamp;
use crate::mail::address::{Domain, Mailbox, reverse_path};
use crate::maildir::spooled::Content;
use crate::smtp::command::{Envelope, Recipient};
use crate::smtp::content::ContentEncoder;
use crate::smtp::reply::Reply;
use crate::smtp::status::{DecidedBy, DeliveryResult, RecipientStatus};

const CONTENT: &str = "Received: x\nSubject: y\n\n.dot\nend\n";

fn domain(name: &str) -> Domain {
    Domain::parse(name).unwrap()
}

/// A spool of its own, and the Maildir of example.org in it.
struct Spool {
    directory: tempfile::TempDir,
    queue: Queue,
}

impl Spool {
    fn new() -> Spool {
        let directory = tempfile::tempdir().unwrap();
        let queue = Queue::new("host", Ids::fixed(), Duration::from_secs(300));
        Spool { directory, queue }
    }

    fn name(&self, name: &str) -> QueueName {
        QueueName { path: self.directory.path().join("domains").join(name), domain: Some(domain(name)), retries: false }
    }

    fn put(&self, names: &[&str]) {
        let recipients = names
            .iter()
            .map(|name| Recipient::plain(Mailbox::parse(&format!("{name}@example.org")).unwrap()))
            .collect();
        let from = reverse_path(b"<a@b.example>").unwrap().0;
        let arrived = Timestamp::from_seconds(1_767_323_045);
        let id = "id1".to_owned();
        let envelope = QueuedEnvelope { id, arrived, envelope: Envelope { recipients, ..Envelope::new(from) } };
        let mut writer = self.queue.begin_message(&[(self.name("example.org"), envelope)], &CONTENT[..12]).unwrap();
        writer.write(&CONTENT.as_bytes()[12..]).unwrap();
        assert_eq!(writer.commit().unwrap().len(), 1);
    }

    fn lock(&self) -> QueueLock {
        self.queue.lock(&[self.name("example.org")]).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join("domains/example.org").join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        fs::write(self.path(name), text).unwrap();
    }

    /// The files of a directory, in order: name and text.
    fn files(&self, directory: &str) -> Vec<(String, String)> {
        let Ok(files) = fs::read_dir(self.path(directory)) else { return Vec::new() };
        let read = |file: io::Result<fs::DirEntry>| {
            let path = file.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            let plain = fs::symlink_metadata(&path).unwrap().is_file();
            (name, if plain { fs::read_to_string(path).unwrap() } else { String::new() })
        };
        let mut files: Vec<_> = files.map(read).collect();
        files.sort();
        files
    }
}

fn local_parts(message: &QueuedMessage) -> Vec<String> {
    message.envelope.recipients.iter().map(|recipient| recipient.mailbox.local().to_owned()).collect()
}

fn offered(lock: &mut QueueLock) -> Vec<String> {
    lock.next_message().map(|message| local_parts(&message)).unwrap_or_default()
}

fn content(message: &mut QueuedMessage) -> String {
    let (mut text, mut piece) = (Vec::new(), [0; 7]);
    loop {
        match message.read(&mut piece).unwrap() {
            0 => return String::from_utf8(text).unwrap(),
            octets => text.extend_from_slice(&piece[..octets]),
        }
    }
}

/// `=` sent, `~` deferred, `!` rejected, `?` in doubt, `+` one recipient too many.
fn result(statuses: &str) -> DeliveryResult {
    let status = |sign| match sign {
        '=' => RecipientStatus::Sent(Reply::new(250, "2.0.0", "OK")),
        '~' => RecipientStatus::Deferred(Reply::new(450, "4.2.1", "later")),
        '+' => RecipientStatus::Deferred(Reply::new(452, "4.5.3", "too many")),
        '!' => RecipientStatus::Rejected(Reply::new(550, "5.1.1", "unknown")),
        '?' => RecipientStatus::InDoubt,
        other => panic!("{other}"),
    };
    DeliveryResult { recipients: statuses.chars().map(status).collect(), decided_by: DecidedBy::Peer }
}

fn settle(lock: &mut QueueLock, statuses: &str) {
    let message = lock.next_message().expect("a message");
    assert_eq!(message.envelope.recipients.len(), statuses.len());
    lock.settle(message, &result(statuses)).unwrap();
}

#[test]
fn a_message_is_offered_as_it_was_stored() {
    let spool = Spool::new();
    spool.put(&["eva", "bob"]);
    let mut lock = spool.lock();
    assert!(!lock.is_empty().unwrap());
    assert_eq!(lock.domains().map(Domain::as_str).collect::<Vec<_>>(), ["example.org"]);
    let mut message = lock.next_message().unwrap();
    assert_eq!(message.envelope.from.to_string(), "a@b.example");
    assert_eq!((local_parts(&message), message.id.as_str()), (vec!["eva".to_owned(), "bob".to_owned()], "id1"));
    assert_eq!(content(&mut message), CONTENT);
    message.rewind().unwrap();
    assert_eq!(content(&mut message), CONTENT);
    assert_eq!(message.size, CONTENT.replace('\n', "\r\n").len() as u64);
    assert!(lock.next_message().is_none(), "each once");
    drop(message);
    drop(lock);
    assert_eq!(offered(&mut spool.lock()), ["eva", "bob"], "without a settlement nothing is removed");
}

#[test]
fn every_mix_of_statuses_leaves_the_right_files() {
    let names = ["eva", "bob", "zoe"];
    for total in 1..=3u32 {
        for number in 0..4usize.pow(total) {
            let statuses: String =
                (0..total).map(|digit| ['=', '~', '!', '?'][number / 4usize.pow(digit) % 4]).collect();
            let spool = Spool::new();
            spool.put(&names[..total as usize]);
            let mut lock = spool.lock();
            settle(&mut lock, &statuses);
            assert!(lock.next_message().is_none(), "{statuses}: not again in this session");
            let with = |wanted: &str| -> Vec<&str> {
                statuses
                    .chars()
                    .zip(names)
                    .filter(|(status, _)| wanted.contains(*status))
                    .map(|(_, name)| name)
                    .collect()
            };
            let text = |names: &[&str], marks: &str| {
                let to: String = names.iter().map(|name| format!("Delivered-To: {name}@example.org\n")).collect();
                let ours = "X-ODMR-Envelope: id=id1; arrived=2026-01-02T03:04:05Z\n";
                format!("Return-Path: <a@b.example>\n{to}{ours}{marks}{CONTENT}")
            };
            let (left, rejected, doubt) = (with("~?"), with("!"), statuses.contains('?'));
            let marks: String = rejected
                .iter()
                .map(|name| format!("X-ODMR-Refused: <{name}@example.org> 550 5.1.1 unknown\n"))
                .collect();
            let file = |names: &[&str], marks: &str, info: &str| {
                let text = text(names, marks);
                let connection = text.len() + text.matches('\n').count();
                let name = format!("1767323045.1.host,S={},W={connection}{info}", text.len());
                if names.is_empty() { vec![] } else { vec![(name, text)] }
            };
            let (new, cur) = if doubt { (vec![], file(&left, "", ":2,F")) } else { (file(&left, "", ""), vec![]) };
            assert_eq!(spool.files("new"), new, "{statuses}");
            assert_eq!(spool.files("cur"), cur, "{statuses}");
            assert_eq!(spool.files(".refused/new"), file(&rejected, &marks, ""), "{statuses}");
            assert!(spool.files("tmp").is_empty() && spool.files(".refused/tmp").is_empty(), "{statuses}");
            drop(lock);
            let mut lock = spool.lock();
            assert_eq!(lock.is_empty().unwrap(), left.is_empty());
            assert_eq!(offered(&mut lock), left, "{statuses}: the next session");
        }
    }
}

#[test]
fn one_recipient_too_many_is_offered_at_once_but_not_for_ever() {
    let spool = Spool::new();
    spool.put(&["eva", "bob", "zoe"]);
    let mut lock = spool.lock();
    settle(&mut lock, "=++");
    assert_eq!(spool.files("new").len(), 1);
    let message = lock.next_message().expect("the rest");
    assert_eq!(local_parts(&message), ["bob", "zoe"]);
    lock.settle(message, &result("++")).unwrap();
    assert!(lock.next_message().is_none(), "every recipient failed, so 452 did not mean too many");
}

#[test]
fn mail_that_arrives_after_the_lock_is_offered_too() {
    let spool = Spool::new();
    let mut lock = spool.lock();
    assert!(lock.is_empty().unwrap() && lock.next_message().is_none());
    for name in ["one", "two", "three"] {
        spool.put(&[name]);
        assert_eq!(offered(&mut lock), [name]);
        assert!(lock.next_message().is_none());
    }
}

#[test]
fn the_oldest_comes_first_and_domains_take_turns() {
    let spool = Spool::new();
    for name in ["300.a", "100.b", "200.c"] {
        for domain in ["example.org", "example.com"] {
            let text = format!("Delivered-To: {}@{domain}\n\n", &name[4..]);
            let path = spool.directory.path().join("domains").join(domain).join("new");
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join(format!("{name}.{domain}")), text).unwrap();
        }
    }
    let mut lock = spool.queue.lock(&[spool.name("example.org"), spool.name("example.com")]).unwrap();
    let mut seen: HashMap<String, Vec<String>> = HashMap::new();
    while let Some(message) = lock.next_message() {
        let recipient = &message.envelope.recipients[0];
        seen.entry(recipient.mailbox.domain().unwrap().to_string())
            .or_default()
            .push(recipient.mailbox.local().to_owned());
    }
    assert_eq!(seen.len(), 2);
    assert!(seen.values().all(|names| names == &["b", "c", "a"]), "{seen:?}");
}

#[test]
fn recipients_rejected_one_after_the_other_are_all_kept() {
    let spool = Spool::new();
    spool.put(&["eva", "bob", "zoe"]);
    // Names and replies of one length, so file names of one size.
    for statuses in ["!~~", "!~", "!"] {
        settle(&mut spool.lock(), statuses);
    }
    assert!(spool.lock().is_empty().unwrap());
    let kept: Vec<_> = spool.files(".refused/new").into_iter().map(|(_, text)| text).collect();
    assert_eq!(kept.len(), 3);
    for name in ["eva", "bob", "zoe"] {
        let mark = format!("X-ODMR-Refused: <{name}@example.org> 550");
        assert_eq!(kept.iter().filter(|text| text.contains(&mark)).count(), 1, "{name}");
    }
}

/// Killed between the copy in `.refused` and the removal: there may be two copies, but the settlement ends.
#[test]
fn a_rejection_that_was_interrupted_is_finished() {
    let spool = Spool::new();
    spool.put(&["eva", "bob"]);
    let before = spool.files("new");
    settle(&mut spool.lock(), "!~");
    fs::remove_file(spool.path("new").join(&spool.files("new")[0].0)).unwrap();
    spool.write(&format!("new/{}", before[0].0), &before[0].1);
    settle(&mut spool.lock(), "!=");
    assert!(spool.lock().is_empty().unwrap());
    assert!(!spool.files(".refused/new").is_empty());
}

/// Killed while it wrote the rest: the file left in `tmp` does not prevent a later settlement.
#[test]
fn a_rewrite_that_was_interrupted_does_not_prevent_a_later_one() {
    let spool = Spool::new();
    spool.put(&["eva", "bob"]);
    fs::create_dir_all(spool.path(".refused/new")).unwrap();
    for directory in ["tmp", ".refused/tmp"] {
        spool.write(&format!("{directory}/1767323045.1.host"), "half a mess");
    }
    settle(&mut spool.lock(), "!~");
    settle(&mut spool.lock(), "=");
    assert!(spool.lock().is_empty().unwrap());
    assert_eq!(spool.files(".refused/new").len(), 1);
    assert!(spool.files("tmp").is_empty());
}

#[test]
fn a_message_left_twice_by_a_crash_is_removed_once() {
    let foreign = "Return-Path: <a@b.example>\nDelivered-To: eva@example.org\nDelivered-To: bob@example.org\n\nx\n";
    let files = [
        (None, foreign),
        // Written by another agent: without sizes, with sizes, seen.
        (Some("new/100.M1.mx"), foreign),
        (Some("new/100.M1.mx,S=96,W=101"), foreign),
        (Some("cur/100.M1.mx,S=96:2,S"), foreign),
    ];
    for (name, text) in files {
        for statuses in ["=~", "=?"] {
            let spool = Spool::new();
            match name {
                Some(name) => spool.write(name, text),
                None => spool.put(&["eva", "bob"]),
            }
            let directory = name.map_or("new", |name| &name[..3]);
            let before = spool.files(directory);
            settle(&mut spool.lock(), statuses);
            // As if it had been killed before it removed the original.
            spool.write(&format!("{directory}/{}", before[0].0), &before[0].1);
            assert_eq!(spool.files("new").len() + spool.files("cur").len(), 2);
            let mut lock = spool.lock();
            assert_eq!(offered(&mut lock), ["bob"], "{name:?} {statuses}: eva has it already");
            assert!(lock.next_message().is_none());
            assert_eq!(spool.files("new").len() + spool.files("cur").len(), 1);
        }
    }
}

/// Equal names prove nothing: only a file that was certainly superseded is removed.
#[test]
fn two_messages_of_one_name_are_both_kept() {
    let spool = Spool::new();
    spool.write("new/100,A", "Delivered-To: eva@example.org\n\na\n");
    spool.write("new/100,B", "Delivered-To: bob@example.org\n\nb longer\n");
    spool.write("new/100,C", "no recipient\n");
    settle(&mut spool.lock(), "=");
    settle(&mut spool.lock(), "=");
    assert_eq!(spool.files("new").len(), 1);
}

#[test]
fn files_of_other_agents_and_other_things() {
    let spool = Spool::new();
    let postfix = "Return-Path: <>\nX-Original-To: l@example.org\nDelivered-To: eva@example.org\nReceived: by mx\n\nx";
    let exim = "Return-path: <a@b.example>\nEnvelope-to: eva@example.org,bob@example.org\nDelivery-date: now\n\n.y\r\n";
    spool.write("new/1.postfix", postfix);
    spool.write("cur/2.exim:2,S", exim);
    spool.write("new/3.nobody", "Subject: hello\n\n");
    spool.write("new/4.other", "Delivered-To: eva@example.net\n\n");
    spool.write("new/5.endless", &"Delivered-To: eva@example.net\n".repeat(100_000));
    spool.write("new/6.empty", "");
    spool.write("new/.hidden", postfix);
    spool.write("elsewhere", postfix);
    fs::create_dir(spool.path("new/7.directory")).unwrap();
    std::os::unix::fs::symlink(spool.path("elsewhere"), spool.path("new/8.link")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, spool.path("new/9.pipe"), rustix::fs::Mode::RUSR).unwrap();
    std::os::unix::fs::symlink("nowhere", spool.path("new/91.dangling")).unwrap();
    let mut lock = spool.lock();
    for (recipients, text) in [(vec!["eva"], "Received: by mx\n\nx"), (vec!["eva", "bob"], "\n.y\r\n")] {
        let mut message = lock.next_message().unwrap();
        assert_eq!(local_parts(&message), recipients);
        assert_eq!(content(&mut message), text);
        let (mut encoder, mut connection) = (ContentEncoder::data(), Vec::new());
        encoder.feed(text.as_bytes(), &mut connection);
        encoder.finish(&mut connection);
        let dots = text.matches("\n.").count();
        assert_eq!(message.size as usize, connection.len() - 3 - dots, "measured, not read from a name");
        lock.settle(message, &result(&"=".repeat(recipients.len()))).unwrap();
    }
    assert!(lock.next_message().is_none(), "nothing else is mail");
    assert_eq!(spool.files("new").len(), 9, "and nothing else is touched");
    assert!(spool.files("cur").is_empty());
}

const EXIM: &str = "Return-path: <a@b.example>\nEnvelope-to: eva@example.org,\n b b@example.org,\n bob@example.org,\n\
                    \u{20}ann@example.net\nDelivery-date: now\nReceived: by mx\n\nx\n";

/// The fields of a file that was written again.
fn rest(names: &[&str]) -> String {
    let to: String = names.iter().map(|name| format!("Delivered-To: {name}@example.org\n")).collect();
    let ours = "X-ODMR-Envelope: id=100.mx; arrived=2026-01-02T02:04:05Z\n";
    let unread = "Delivered-To: b b@example.org\nDelivered-To: ann@example.net\n";
    format!("Return-Path: <a@b.example>\n{to}{ours}{unread}Received: by mx\n\nx\n")
}

/// The readable recipients are settled; the file stays for the others, and nobody gets the message twice.
#[test]
fn a_file_stays_for_the_recipients_that_cannot_be_read() {
    for (statuses, left) in [("==", &[][..]), ("=~", &["bob"]), ("=?", &["bob"]), ("!=", &[]), ("!!", &[])] {
        for crash in [false, true] {
            let spool = Spool::new();
            spool.write("new/100.mx", EXIM);
            let arrived = SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_319_445);
            let file = File::options().write(true).open(spool.path("new/100.mx")).unwrap();
            file.set_modified(arrived).unwrap();
            let mut lock = spool.lock();
            let message = lock.next_message().unwrap();
            assert_eq!(local_parts(&message), ["eva", "bob"]);
            lock.settle(message, &result(statuses)).unwrap();
            assert!(lock.next_message().is_none(), "{statuses}: not again in this session");
            drop(lock);
            if crash {
                // As if it had been killed before it removed the original.
                spool.write("new/100.mx", EXIM);
            }
            let mut lock = spool.lock();
            assert_eq!(offered(&mut lock), left, "{statuses} {crash}: the next session");
            assert!(lock.next_message().is_none());
            let files: Vec<_> = spool.files("new").into_iter().chain(spool.files("cur")).collect();
            assert_eq!(files.into_iter().map(|(_, text)| text).collect::<Vec<_>>(), [rest(left)], "{statuses} {crash}");
            drop(lock);
            if !left.is_empty() {
                settle(&mut spool.lock(), "=");
                assert!(spool.lock().next_message().is_none());
                let files: Vec<_> = spool.files("new").into_iter().chain(spool.files("cur")).collect();
                assert_eq!(files.into_iter().map(|(_, text)| text).collect::<Vec<_>>(), [rest(&[])]);
            }
        }
    }
}

/// Without the reverse path nobody would get the DSN.
#[test]
fn a_file_whose_return_path_cannot_be_read_stays() {
    let spool = Spool::new();
    let text = "Return-Path: <a b@b.example>\nDelivered-To: eva@example.org\n\nx\n";
    spool.write("new/1.mx", text);
    spool.write("new/2.mx", "Return-Path:\n <a@b.example>\nDelivered-To: bob@example.org\n\nx\n");
    let mut lock = spool.lock();
    let message = lock.next_message().unwrap();
    assert_eq!(
        (local_parts(&message), message.envelope.from.to_string()),
        (vec!["bob".to_owned()], "a@b.example".to_owned())
    );
    lock.settle(message, &result("=")).unwrap();
    assert!(lock.next_message().is_none());
    assert_eq!(spool.files("new"), [("1.mx".to_owned(), text.to_owned())]);
}

#[test]
fn the_size_in_a_name_of_another_agent_is_not_believed() {
    let spool = Spool::new();
    spool.write("new/1,S=3,W=3", "Delivered-To: eva@example.org\nSubject: x\n\nlonger\n");
    assert_eq!(spool.lock().next_message().unwrap().size, "Subject: x\r\n\r\nlonger\r\n".len() as u64);
}

/// Rules: MD-16.
#[test]
fn one_session_at_a_time_has_a_queue() {
    let spool = Spool::new();
    spool.put(&["eva"]);
    let lock = spool.lock();
    // flock belongs to the open file, so a second handle here is what a second process is.
    let other = Queue::new("host", Ids::fixed(), Duration::from_secs(300));
    for queue in [&spool.queue, &other] {
        match queue.lock(&[spool.name("example.com"), spool.name("example.org")]) {
            Err(LockError::Busy(name)) => assert_eq!(name, spool.name("example.org")),
            _ => panic!("two sessions have one queue"),
        }
    }
    assert!(!lock.takeover_requested(), "a holder at work is left alone");
    // All or none: example.com is free again.
    drop(spool.queue.lock(&[spool.name("example.com")]).unwrap());
    drop(lock);
    assert_eq!(offered(&mut other.lock(&[spool.name("example.org")]).unwrap()), ["eva"]);
}

fn lock_since(spool: &Spool, ago: Duration) {
    let lock = File::options().write(true).open(spool.path("odmr.lock")).unwrap();
    lock.set_modified(SystemTime::now() - ago).unwrap();
}

#[test]
fn a_holder_without_progress_is_asked_to_release() {
    let spool = Spool::new();
    spool.put(&["eva"]);
    let lock = spool.lock();
    lock_since(&spool, Duration::from_secs(299));
    assert!(matches!(spool.queue.lock(&[spool.name("example.org")]), Err(LockError::Busy(_))));
    lock_since(&spool, Duration::from_secs(301));
    lock.heartbeat();
    assert!(matches!(spool.queue.lock(&[spool.name("example.org")]), Err(LockError::Busy(_))));
    lock_since(&spool, Duration::from_secs(301));
    std::thread::scope(|scope| {
        let taker = scope.spawn(|| spool.queue.lock(&[spool.name("example.org")]));
        while !lock.takeover_requested() {
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(lock);
        let mut lock = taker.join().unwrap().expect("the domain");
        assert!(!lock.takeover_requested());
        assert_eq!(offered(&mut lock), ["eva"]);
        // The new holder is at work.
        assert!(matches!(spool.queue.lock(&[spool.name("example.org")]), Err(LockError::Busy(_))));
    });
}

#[test]
fn a_holder_that_does_not_release_its_lock_keeps_it() {
    let spool = Spool::new();
    let _lock = spool.lock();
    lock_since(&spool, Duration::from_secs(301));
    let begun = Instant::now();
    assert!(matches!(spool.queue.lock(&[spool.name("example.org")]), Err(LockError::Busy(_))));
    assert!(begun.elapsed() >= TAKEOVER_WAIT);
}

#[test]
fn a_queue_that_cannot_be_locked_says_why() {
    let spool = Spool::new();
    fs::create_dir_all(spool.path("odmr.lock")).unwrap();
    match spool.queue.lock(&[spool.name("example.org")]) {
        Err(LockError::Failed(error)) => assert!(error.to_string().contains("odmr.lock"), "{error}"),
        _ => panic!("a directory was locked"),
    }
}

/// A settlement that fails loses nothing.
#[test]
fn a_disk_that_fails_loses_nothing() {
    let spool = Spool::new();
    spool.put(&["eva", "bob"]);
    let before = spool.files("new");
    spool.write(".refused", "a file where a directory should be");
    let mut lock = spool.lock();
    let message = lock.next_message().unwrap();
    assert!(lock.settle(message, &result("!=")).is_err());
    assert_eq!(spool.files("new"), before);
    drop(lock);
    fs::remove_file(spool.path(".refused")).unwrap();
    settle(&mut spool.lock(), "!=");
    assert!(spool.lock().is_empty().unwrap());
    assert_eq!(spool.files(".refused/new").len(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Whatever the statuses and their order: each recipient is sent once or rejected once.
    #[test]
    fn no_recipient_is_lost_or_doubled(
        messages in proptest::collection::vec(1usize..=3, 1..5),
        mut dice in proptest::collection::vec(0usize..6, 0..60),
        foreign: bool,
    ) {
        let spool = Spool::new();
        let mut expected = Vec::new();
        for (number, recipients) in messages.iter().enumerate() {
            let names: Vec<_> = (0..*recipients).map(|recipient| format!("m{number}r{recipient}")).collect();
            if foreign && number % 2 == 0 {
                let to: String = names.iter().map(|name| format!("Delivered-To: {name}@example.org\n")).collect();
                spool.write(&format!("new/{number}.mx"), &format!("{to}\n{CONTENT}"));
            } else {
                spool.put(&names.iter().map(String::as_str).collect::<Vec<_>>());
            }
            expected.extend(names);
        }
        let mut sent = Vec::new();
        for turn in 0.. {
            prop_assert!(turn < 200, "it comes to an end");
            let mut lock = spool.lock();
            if lock.is_empty().unwrap() {
                break;
            }
            while let Some(message) = lock.next_message() {
                let names = local_parts(&message);
                let mut statuses = String::new();
                for name in names {
                    let status = dice.pop().map_or('=', |number| ['=', '~', '!', '?', '+', '~'][number]);
                    statuses.push(status);
                    if status == '=' {
                        sent.push(name);
                    }
                }
                lock.settle(message, &result(&statuses)).unwrap();
            }
        }
        let rejected = spool.files(".refused/new").into_iter().flat_map(|(_, text)| {
            let names = text.lines().filter_map(|line| line.strip_prefix("X-ODMR-Refused: <"));
            names.map(|rest| rest.split('@').next().unwrap().to_owned()).collect::<Vec<_>>()
        });
        let mut all: Vec<_> = sent.into_iter().chain(rejected).collect();
        all.sort();
        prop_assert_eq!(all, expected);
        prop_assert!(spool.files("tmp").is_empty() && spool.files(".refused/tmp").is_empty());
    }
}

/// A queue with one message for `name`.
fn outgoing(name: &QueueName, to: &[&str]) -> Queue {
    outgoing_since(name, to, Ids::fixed().clock().now())
}

fn outgoing_since(name: &QueueName, to: &[&str], arrived: Timestamp) -> Queue {
    let queue = Queue::new("host", Ids::fixed(), Duration::from_secs(60));
    let recipients = to.iter().map(|to| Recipient::plain(Mailbox::parse(to).unwrap())).collect();
    let envelope = Envelope { recipients, ..Envelope::new(reverse_path(b"<>").unwrap().0) };
    let envelope = QueuedEnvelope { id: "id".to_owned(), arrived, envelope };
    let mut writer = queue.begin_message(&[(name.clone(), envelope)], "").unwrap();
    writer.write(b"Subject: x\n\n").unwrap();
    writer.commit().unwrap();
    queue
}

/// If every recipient failed, 452 did not mean "too many recipients", and the next attempt is not made at once.
#[test]
fn a_452_for_all_recipients_waits_and_a_452_for_some_does_not() {
    for (statuses, due_at_once) in [("++", false), ("=+", true)] {
        let directory = tempfile::tempdir().unwrap();
        let name = QueueName { path: directory.path().into(), domain: Some(domain("example.net")), retries: true };
        let queue = outgoing(&name, &["a@example.net", "b@example.net"]);
        let mut lock = queue.lock(std::slice::from_ref(&name)).unwrap();
        let mut message = lock.next_message().unwrap();
        message.next_attempt = Some(SystemTime::now() + Duration::from_secs(3600));
        lock.settle(message, &result(statuses)).unwrap();
        assert_eq!(lock.next_message().is_some(), due_at_once);
        assert_eq!(queue.next_due(&name).unwrap().unwrap() <= SystemTime::now(), due_at_once);
    }
}

/// A message that was deferred while the clock was a year ahead does not wait for a year.
#[test]
fn a_clock_that_was_wrong_defers_nothing_for_long() {
    for (ahead, due) in [(Duration::from_secs(3600), false), (Duration::from_secs(365 * 24 * 3600), true)] {
        let directory = tempfile::tempdir().unwrap();
        let name = QueueName { path: directory.path().into(), domain: None, retries: true };
        let queue = outgoing(&name, &["a@example.net"]);
        let mut lock = queue.lock(std::slice::from_ref(&name)).unwrap();
        let mut message = lock.next_message().unwrap();
        message.next_attempt = Some(SystemTime::now() + ahead);
        lock.settle(message, &result("+")).unwrap();
        drop(lock);
        assert_eq!(queue.next_due(&name).unwrap().unwrap() <= SystemTime::now(), due);
        assert_eq!(queue.lock(std::slice::from_ref(&name)).unwrap().next_message().is_some(), due);
    }
}

/// The names in `new` and the time of arrival of the one message of a queue, after a session that offers it.
fn arrival(queue: &Queue, name: &QueueName) -> (String, i64) {
    let arrived = queue.lock(std::slice::from_ref(name)).unwrap().next_message().unwrap().arrived.seconds();
    let names: Vec<_> = name.maildir().entries().unwrap().into_iter().map(|entry| entry.name).collect();
    (names.join(" "), arrived)
}

/// In both kinds of queue: if the time of arrival is impossible, the age counts from the first session, and not from a
/// later one; if the time is possible, the file keeps its name.
#[test]
fn an_impossible_time_of_arrival_is_replaced_by_the_time_of_the_first_session() {
    let now = Ids::fixed().clock().now().seconds();
    let (year, hour) = (365 * 24 * 3600, 3600);
    for retries in [true, false] {
        for (arrived, possible) in [
            (0, false),
            (946_684_800, false),
            (now + year, false),
            (now - 120 * hour, true),
            (now, true),
            (now + 60, true),
        ] {
            let directory = tempfile::tempdir().unwrap();
            let name = QueueName { path: directory.path().into(), domain: None, retries };
            let queue = outgoing_since(&name, &["a@example.net"], Timestamp::from_seconds(arrived));
            queue
                .each(&name, |message| assert_eq!(message.arrived.seconds(), if possible { arrived } else { now }))
                .unwrap();
            let (unchanged, mark) = (name.maildir().entries().unwrap().remove(0).name, format!(",T={now}"));
            let marked = if possible { unchanged } else { unchanged + &mark };
            let effective = if possible { arrived } else { now };
            assert_eq!(arrival(&queue, &name), (marked.clone(), effective), "{retries} {arrived}");
            assert_eq!(arrival(&queue, &name), (marked.clone(), effective), "{retries} {arrived}: the second session");
            if !possible {
                // As if the first session had been a day ago.
                let maildir = name.maildir();
                let earlier = marked.replace(&mark, &format!(",T={}", now - 24 * hour));
                let file = |name: &str| maildir.path().join("new").join(name);
                fs::rename(file(&marked), file(&earlier)).unwrap();
                assert_eq!(arrival(&queue, &name), (earlier, now - 24 * hour), "{retries} {arrived}: a day later");
            }
        }
    }
}

/// The record moves into the envelope when the rest of a message is written again.
#[test]
fn the_rest_of_a_message_keeps_the_time_of_the_first_session() {
    let (directory, now) = (tempfile::tempdir().unwrap(), Ids::fixed().clock().now());
    let name = QueueName { path: directory.path().into(), domain: None, retries: false };
    let queue = outgoing_since(&name, &["a@example.net", "b@example.net"], Timestamp::from_seconds(0));
    settle(&mut queue.lock(std::slice::from_ref(&name)).unwrap(), "=~");
    let (file, arrived) = arrival(&queue, &name);
    assert_eq!((file.contains(",T="), arrived), (false, now.seconds()));
}

/// Files of other agents have no time in their envelope.
#[test]
fn the_age_of_files_of_other_agents_counts_from_a_possible_time() {
    let now = Ids::fixed().clock().now().seconds();
    let [day_ago, hour_ago] = [now - 24 * 3600, now - 3600];
    // Whether the queue has retries, the time in the name, the time of modification, and the time of arrival.
    for (retries, named, modified, arrived, marked) in [
        (false, "7", hour_ago, hour_ago, false),
        (false, "7", 0, now, true),
        (false, "x", now + 7200, now, true),
        (true, &day_ago.to_string(), now + 7200, day_ago, false),
        (true, &day_ago.to_string(), 0, day_ago, false),
        (true, "7", hour_ago, now, true),
        (true, "msg", hour_ago, now, true),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let name = QueueName { path: directory.path().into(), domain: None, retries };
        name.maildir().create().unwrap();
        let path = directory.path().join(format!("new/{named}.x.host"));
        fs::write(&path, "Delivered-To: a@example.net\n\nx\n").unwrap();
        let set = SystemTime::UNIX_EPOCH + Duration::from_secs(modified.cast_unsigned());
        fs::File::options().write(true).open(&path).unwrap().set_modified(set).unwrap();
        let queue = Queue::new("host", Ids::fixed(), Duration::from_secs(60));
        let mut lock = queue.lock(std::slice::from_ref(&name)).unwrap();
        let entry = name.maildir().entries().unwrap().remove(0);
        let message = lock.open_message(&name, entry).unwrap().unwrap();
        assert_eq!(message.arrived.seconds(), arrived, "{retries} {named} {modified}");
        let entry = name.maildir().entries().unwrap().remove(0);
        assert_eq!(entry.first_seen().is_some(), marked, "{retries} {named} {modified}");
    }
}

/// Listing the queue needs no lock and moves nothing.
#[test]
fn a_locked_queue_can_be_listed() {
    let directory = tempfile::tempdir().unwrap();
    let name = QueueName { path: directory.path().into(), domain: None, retries: true };
    let queue = outgoing(&name, &["a@example.net"]);
    let _lock = queue.lock(std::slice::from_ref(&name)).unwrap();
    let mut seen = Vec::new();
    queue.each(&name, |message| seen.push((message.id.clone(), message.due().is_some()))).unwrap();
    assert_eq!(seen, [("id".to_owned(), true)]);
}
