//! The files of a queue before, during and after settlements.

use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Instant;

use proptest::prelude::*;

use super::envelope::Mark;
use super::lock_file::TAKEOVER_WAIT;
use super::message::Opened;
use super::*;
use crate::clock::Timestamp;
use crate::mail::address::{COMPARED, Domain, Mailbox, reverse_path};
use crate::maildir::FileId;
use crate::maildir::spooled::Content;
use crate::smtp::command::{Body, Envelope, Recipient};
use crate::smtp::content::ContentEncoder;
use crate::smtp::reply::Reply;
use crate::smtp::status::{DecidedBy, DeliveryResult, RecipientStatus};

const CONTENT: &str = "Received: x\nSubject: y\n\n.dot\nend\n";

fn domain(name: &str) -> Domain {
    Domain::parse(name).unwrap()
}

/// A spool, with the Maildir of example.org.
pub(super) struct Spool {
    directory: tempfile::TempDir,
    pub(super) queue: Queue,
}

impl Spool {
    pub(super) fn new() -> Spool {
        let directory = tempfile::tempdir().unwrap();
        let queue = Queue::new("host", Ids::fixed(), Duration::from_secs(300));
        Spool { directory, queue }
    }

    pub(super) fn name(&self, name: &str) -> QueueName {
        QueueName {
            path: self.directory.path().join("domains").join(name),
            domain: Some(domain(name)),
            ..QueueName::default()
        }
    }

    fn put(&self, names: &[&str]) {
        self.put_from("a@b.example", names, CONTENT);
    }

    fn put_from(&self, from: &str, names: &[&str], content: &str) {
        let recipients = names
            .iter()
            .map(|name| Recipient::plain(Mailbox::parse(&format!("{name}@example.org")).unwrap()))
            .collect();
        let from = reverse_path(format!("<{from}>").as_bytes()).unwrap().0;
        let arrived = Timestamp::from_seconds(1_767_323_045);
        let id = "id1".to_owned();
        let envelope = QueuedEnvelope { id, arrived, envelope: Envelope { recipients, ..Envelope::new(from) } };
        let mut writer = self.queue.begin_message(&[(self.name("example.org"), envelope)], &content[..12]).unwrap();
        writer.write(&content.as_bytes()[12..]).unwrap();
        assert_eq!(writer.commit().unwrap().len(), 1);
    }

    pub(super) fn lock(&self) -> QueueLock {
        self.queue.lock(&[self.name("example.org")]).unwrap()
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join("domains/example.org").join(name)
    }

    pub(super) fn write(&self, name: &str, text: &str) {
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

pub(super) fn local_parts(message: &QueuedMessage) -> Vec<String> {
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
pub(super) fn result(statuses: &str) -> DeliveryResult {
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
    assert!(lock.next_message().is_none(), "each message is offered once");
    drop(message);
    drop(lock);
    assert_eq!(offered(&mut spool.lock()), ["eva", "bob"], "without a settlement nothing is removed");
}

/// A domain in an envelope is sent with A-labels. If its UTF-8 counted as content, the message could not be sent to a
/// server without 8BITMIME (RFC 6152 section 3).
#[test]
fn a_domain_in_utf_8_does_not_make_the_content_8_bit() {
    for (from, content, eight_bit) in [
        ("a@b.example", CONTENT, false),
        ("a@bücher.example", CONTENT, false),
        ("a@bücher.example", "Received: x\nSubject: y\n\né\n", true),
        ("a@b.example", "Received: x\nSubject: y\n\né\n", true),
    ] {
        let spool = Spool::new();
        spool.put_from(from, &["alice"], content);
        let message = spool.lock().next_message().unwrap();
        let size = content.len() + content.lines().count();
        assert_eq!((message.eight_bit, message.size), (eight_bit, size as u64), "{from} {content}");
        assert_eq!(message.envelope.from.to_string(), from);
    }
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
            let (left, rejected, doubt) = (with("~?"), with("!"), statuses.contains('?'));
            // A recipient is marked only if there are several.
            let marks = |status: char| match status {
                '=' if total > 1 => '\u{6}',
                '!' if total > 1 => '\u{15}',
                _ => '@',
            };
            let to: String = statuses
                .chars()
                .zip(names)
                .map(|(status, name)| format!("Delivered-To: {name}{}example.org\n", marks(status)))
                .collect();
            let ours = "X-ODMR-Envelope: id=id1; arrived=2026-01-02T03:04:05Z\n";
            let text = format!("Return-Path: <a@b.example>\n{to}{ours}{CONTENT}");
            let reply = match statuses.chars().rfind(|status| "~?".contains(*status)) {
                Some('?') => "no_reply_to_the_content",
                Some(_) => "450_4.2.1_later",
                None => "550_5.1.1_unknown",
            };
            let (size, wire_size) = (text.len(), text.len() + text.matches('\n').count());
            let now = Ids::fixed().clock().now().seconds();
            let info = if doubt { ":2,F" } else { "" };
            let name = format!("1767323045.1.host,S={size},W={wire_size},O={now},A=1,L={reply}{info}");
            let file = vec![(name, text)];
            let (new, cur, kept) = match (left.is_empty(), doubt, rejected.is_empty()) {
                (false, false, _) => (file, vec![], vec![]),
                (false, true, _) => (vec![], file, vec![]),
                (true, _, false) => (vec![], vec![], file),
                (true, _, true) => (vec![], vec![], vec![]),
            };
            assert_eq!(spool.files("new"), new, "{statuses}");
            assert_eq!(spool.files("cur"), cur, "{statuses}");
            assert_eq!(spool.files(".refused/new"), kept, "{statuses}");
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
fn recipients_rejected_in_several_sessions_are_all_set_aside() {
    let spool = Spool::new();
    spool.put(&["eva", "bob", "zoe"]);
    settle(&mut spool.lock(), "!~~");
    assert!(spool.files(".refused/new").is_empty(), "the message is still sent to the others");
    settle(&mut spool.lock(), "!=");
    assert!(spool.lock().is_empty().unwrap());
    let [(name, text)] = spool.files(".refused/new").try_into().unwrap();
    assert!(name.ends_with(",A=2,L=550_5.1.1_unknown"), "{name}");
    for to in ["eva\u{15}", "bob\u{15}", "zoe\u{6}"] {
        assert!(text.contains(&format!("Delivered-To: {to}example.org\n")), "{text:?}");
    }
}

/// An earlier version stored copies under the same name.
#[test]
fn a_message_that_is_set_aside_overwrites_no_other() {
    let spool = Spool::new();
    let text = "Delivered-To: eva@example.org\n\nx\n";
    spool.write("new/100.mx", text);
    let record = format!("O={},A=1,L=550_5.1.1_unknown", Ids::fixed().clock().now().seconds());
    for name in ["100.mx", &format!("100.mx,{record}"), &format!("100.mx,{record}.r1")] {
        spool.write(&format!(".refused/new/{name}"), "another");
    }
    settle(&mut spool.lock(), "!");
    assert!(spool.lock().is_empty().unwrap());
    assert_eq!(spool.files(".refused/new").iter().filter(|(_, kept)| kept == text).count(), 1);
    assert_eq!(spool.files(".refused/new").len(), 4);
}

/// The program was killed after the settlement of the last recipient and before the removal.
#[test]
fn a_settlement_that_was_interrupted_is_finished() {
    for (mark, kept) in [('\u{6}', 0), ('\u{15}', 1)] {
        let spool = Spool::new();
        spool.write(
            "new/100.mx",
            &format!("Delivered-To: eva\u{6}example.org\nDelivered-To: bob{mark}example.org\n\nx\n"),
        );
        assert!(!spool.lock().is_empty().unwrap());
        assert!(spool.lock().next_message().is_none(), "no recipient gets it again");
        assert!(spool.lock().is_empty().unwrap());
        assert_eq!(spool.files(".refused/new").len(), kept);
    }
}

/// The size, the inode and the time of modification stay.
#[test]
fn a_settlement_writes_one_octet_into_the_same_file() {
    let exim = "Return-path: <a@b.example>\nEnvelope-to: eva@example.org,\n bob@example.org\n\nx\n";
    let spool = Spool::new();
    spool.write("new/100.mx", exim);
    let modified = SystemTime::now() - Duration::from_secs(3600);
    let file = File::options().read(true).write(true).open(spool.path("new/100.mx")).unwrap();
    file.set_modified(modified).unwrap();
    settle(&mut spool.lock(), "=~");
    let [(_, text)] = spool.files("new").try_into().unwrap();
    let octets = |text: &str| text.as_bytes().to_vec();
    let changed: Vec<_> = octets(exim).into_iter().zip(octets(&text)).filter(|(old, new)| old != new).collect();
    assert_eq!((text.len(), changed), (exim.len(), vec![(b'@', Mark::Done.octet())]));
    let mut same = String::new();
    (&file).read_to_string(&mut same).unwrap();
    assert_eq!((same, file.metadata().unwrap().modified().unwrap()), (text, modified));
}

/// This user may read but not write another agent's file: a copy replaces it before it is offered.
#[test]
fn a_file_that_cannot_be_written_is_replaced_if_it_must_be_marked() {
    for (to, copied) in [("Delivered-To: eva@example.org\n", false), (TWO_RECIPIENTS, true)] {
        let spool = Spool::new();
        spool.write("new/100.mx", &format!("{to}\nx\n"));
        let path = spool.path("new/100.mx");
        let before = FileId::of_path(&path).unwrap();
        spool.name("example.org").maildir().create().unwrap();
        let mut message = match QueuedMessage::open(
            &spool.name("example.org"),
            spool.name("example.org").maildir().entries().unwrap().remove(0),
            None,
            Ids::fixed().clock().now(),
        ) {
            Ok(Opened::Message(message)) => message,
            _ => panic!("no message"),
        };
        message.use_file(File::open(&path).unwrap());
        message.rewind().unwrap();
        message.ensure_markable("copy").unwrap();
        assert_eq!((FileId::of_path(&path).unwrap() != before, spool.files("tmp")), (copied, vec![]));
        assert_eq!(content(&mut message), "\nx\n");
        message.settle(&result(if copied { "=~" } else { "=" }), Ids::fixed().clock().now()).unwrap();
        assert_eq!(offered(&mut spool.lock()), if copied { vec!["bob"] } else { vec![] });
    }
}

const TWO_RECIPIENTS: &str = "Delivered-To: eva@example.org\nDelivered-To: bob@example.org\n";

/// An earlier version wrote the rest of a message as a second file, and then removed the first.
#[test]
fn a_message_left_twice_by_an_earlier_version_is_removed_once() {
    let fields = "Return-Path: <a@b.example>\nDelivered-To: eva@example.org\nDelivered-To: bob@example.org\n";
    let rest = "Return-Path: <a@b.example>\nDelivered-To: bob@example.org\nX-ODMR-Envelope: id=x; arrived=2026-01-02T03:04:05Z\n";
    for ours in ["", "X-ODMR-Envelope: id=x; arrived=2026-01-02T03:04:05Z\n"] {
        for (before, after) in [
            ("new/100.M1.mx", "new/100.M1.mx,S=96,W=101"),
            ("new/100.M1.mx,S=196,W=201", "new/100.M1.mx,S=96,W=101"),
            ("cur/100.M1.mx,S=196:2,S", "new/100.M1.mx,S=96,W=101"),
            ("new/100.M1.mx", "cur/100.M1.mx,S=96,W=101:2,F"),
        ] {
            let spool = Spool::new();
            spool.write(before, &format!("{fields}{ours}\nx\n"));
            spool.write(after, &format!("{rest}\nx\n"));
            let mut lock = spool.lock();
            assert_eq!(offered(&mut lock), ["bob"], "{before} {after}: eva has it already");
            assert!(lock.next_message().is_none());
            assert_eq!(spool.files("new").len() + spool.files("cur").len(), 1);
        }
    }
}

/// The work of storing, opening and settling a message, and of finding it twice, grows in proportion to its recipients.
#[test]
fn the_work_for_a_message_grows_in_proportion_to_its_recipients() {
    let compared = |recipients: usize| {
        let (spool, before) = (Spool::new(), COMPARED.get());
        let names: Vec<_> = (0..recipients).map(|number| format!("u{number}")).collect();
        spool.put(&names.iter().map(String::as_str).collect::<Vec<_>>());
        settle(&mut spool.lock(), &("=".repeat(recipients / 2) + &"~".repeat(recipients - recipients / 2)));
        let rest = |names: &[String]| {
            let lines = names.iter().map(|name| format!("Delivered-To: {name}@example.org\n"));
            lines.collect::<String>() + "X-ODMR-Envelope: id=x; arrived=2026-01-02T03:04:05Z\n\nx\n"
        };
        spool.write("new/100.M1.mx", &rest(&names));
        spool.write("new/100.M1.mx,S=96,W=101", &rest(&names[recipients / 2..]));
        let mut lock = spool.lock();
        for _ in 0..2 {
            assert_eq!(lock.next_message().unwrap().envelope.recipients.len(), recipients - recipients / 2);
        }
        assert!(lock.next_message().is_none());
        COMPARED.get() - before
    };
    let (few, many) = (compared(100), compared(2000));
    assert!(many <= 30 * few, "{few} for 100 recipients, {many} for 2,000");
}

/// Only a file that is certainly the older one of a message is removed.
#[test]
fn two_messages_of_one_unique_name_both_stay() {
    let spool = Spool::new();
    spool.write("new/100,A", "Delivered-To: eva@example.org\n\na\n");
    spool.write("new/100,B", "Delivered-To: bob@example.org\n\nb longer\n");
    spool.write("new/100,C", "no recipient\n");
    settle(&mut spool.lock(), "=");
    settle(&mut spool.lock(), "=");
    assert_eq!(spool.files("new").len(), 1);
}

#[test]
fn files_of_other_agents_are_offered_and_entries_that_are_not_messages_stay() {
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
    crate::platform::make_fifo(&spool.path("new/9.pipe"));
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
    assert!(lock.next_message().is_none(), "nothing else is a message");
    assert_eq!(spool.files("new").len(), 9, "the other entries stay");
    assert!(spool.files("cur").is_empty());
    assert_eq!((lock.not_mail(), lock.is_empty().unwrap()), (8, true), "they do not count as waiting");
    // Its agent was still writing the file, or an administrator has corrected it.
    spool.write("new/6.empty", postfix);
    assert!(!lock.is_empty().unwrap(), "a file that has changed is read again");
    drop(lock);
    assert_eq!(offered(&mut spool.lock()), ["eva"]);
}

const EXIM: &str = "Return-path: <a@b.example>\nEnvelope-to: eva@example.org,\n b b@example.org,\n bob@example.org,\n\
                    \u{20}ann@example.net\nDelivery-date: now\nReceived: by mx\n\nx\n";

/// The readable recipients are settled; the file stays for the others, and no recipient gets the message twice.
#[test]
fn a_file_stays_for_the_recipients_that_cannot_be_read() {
    for (statuses, left) in [("==", &[][..]), ("=~", &["bob"]), ("=?", &["bob"]), ("!=", &[]), ("!!", &[])] {
        let spool = Spool::new();
        spool.write("new/100.mx", EXIM);
        let mut lock = spool.lock();
        let message = lock.next_message().unwrap();
        assert_eq!(local_parts(&message), ["eva", "bob"]);
        lock.settle(message, &result(statuses)).unwrap();
        assert!(lock.next_message().is_none(), "{statuses}: not again in this session");
        drop(lock);
        let mut lock = spool.lock();
        assert_eq!(offered(&mut lock), left, "{statuses}: the next session");
        assert!(lock.next_message().is_none());
        drop(lock);
        if !left.is_empty() {
            settle(&mut spool.lock(), "=");
        }
        let mut lock = spool.lock();
        assert!(lock.next_message().is_none());
        assert_eq!((lock.not_mail(), lock.is_empty().unwrap()), (1, true), "it does not count as waiting");
        let [(_, text)] = [spool.files("new"), spool.files("cur")].concat().try_into().unwrap();
        assert!(
            text.ends_with(
                " b b@example.org,\n bob\u{6}example.org,\n ann@example.net\nDelivery-date: now\nReceived: by mx\n\nx\n"
            ) || statuses == "!!",
            "{text:?}"
        );
    }
}

/// Without the reverse path no sender would get the DSN.
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
fn the_size_in_the_file_name_of_another_agent_is_ignored() {
    let spool = Spool::new();
    spool.write("new/1,S=3,W=3", "Delivered-To: eva@example.org\nSubject: x\n\nlonger\n");
    assert_eq!(spool.lock().next_message().unwrap().size, "Subject: x\r\n\r\nlonger\r\n".len() as u64);
}

/// With BDAT a client announces the size, and must send exactly that number of octets (RFC 3030 section 2). A batch or
/// a DSN may bring line ends of CRLF into our files.
#[test]
fn the_size_in_our_file_names_is_that_on_the_wire() {
    for text in ["", "a", "a\n", "a\r\nb\r\n", "a\rb\n\r\n", "a\r"] {
        let spool = Spool::new();
        let content = format!("Received: x\n\n{text}");
        spool.put_from("a@b.example", &["eva"], &content);
        let (mut encoder, mut wire) = (ContentEncoder::bdat(), Vec::new());
        encoder.feed(content.as_bytes(), &mut wire);
        encoder.finish(&mut wire);
        assert_eq!(spool.lock().next_message().unwrap().size, wire.len() as u64, "{text:?}");
    }
}

#[test]
fn the_header_decides_whether_smtputf8_is_needed() {
    let check = |fields: &str, declared: bool, needed: bool, in_header: bool| {
        let spool = Spool::new();
        let envelope = format!(
            "Return-Path: <a@b.example>\nDelivered-To: c@example.org\nX-ODMR-Envelope: id=1; \
             arrived=2026-01-02T03:04:05Z; body=7BIT{}\n",
            if declared { "; smtputf8" } else { "" }
        );
        spool.write("new/1", &format!("{envelope}{fields}\nFrom: <jürgen@x.example>\n"));
        let message = spool.lock().next_message().unwrap().outgoing_message();
        let seen = (message.envelope.utf8, message.utf8_header);
        assert_eq!(seen, (needed, in_header), "{} octets", fields.len());
        let kept = if declared && !needed { Body::Undeclared } else { Body::SevenBit };
        assert_eq!(message.envelope.body, kept);
    };
    let text = "Subject: Prüfung\nFrom: Jürgen <j@x.example>\n";
    let address = "Cc: <jürgen@x.example>\n";
    for declared in [false, true] {
        check("", declared, false, false);
        check(text, declared, false, false);
        check(address, declared, declared, true);
    }
    // The header is read in blocks, which may end anywhere in it.
    for length in (16 << 10) - 40..(16 << 10) + 10 {
        let field = format!("X: {}\n", "x".repeat(length - 4));
        check(&format!("{field}{address}"), true, true, true);
        check(&format!("{field}{text}"), true, false, false);
    }
    // In a header longer than the limit, the sender's declaration decides.
    let long = "X: y\n".repeat(20_000);
    check(&format!("{long}{text}"), true, true, true);
    check(&format!("{long}{text}"), false, false, false);
}

/// Rules: MD-16.
#[test]
fn one_session_at_a_time_has_a_queue() {
    let spool = Spool::new();
    spool.put(&["eva"]);
    let lock = spool.lock();
    // flock(2) belongs to the open file: a second open file in this process is locked out like another process.
    let other = Queue::new("host", Ids::fixed(), Duration::from_secs(300));
    for queue in [&spool.queue, &other] {
        match queue.lock(&[spool.name("example.com"), spool.name("example.org")]) {
            Err(LockError::Busy(name)) => assert_eq!(name, spool.name("example.org")),
            _ => panic!("two sessions have one queue"),
        }
    }
    assert!(!lock.takeover_requested(), "a holder that makes progress is not asked");
    // All queues were locked or none: example.com is free again.
    drop(spool.queue.lock(&[spool.name("example.com")]).unwrap());
    drop(lock);
    assert_eq!(offered(&mut other.lock(&[spool.name("example.org")]).unwrap()), ["eva"]);
}

#[test]
fn a_copy_of_the_descriptor_in_a_child_process_does_not_keep_the_lock() {
    let spool = Spool::new();
    let name = spool.name("example.org");
    let lock = spool.queue.try_lock(&name).unwrap();
    let _copy = lock.queues[0].lock.as_ref().unwrap().file.try_clone().unwrap();
    drop(lock);
    assert!(spool.queue.try_lock(&name).is_ok());
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
        // The new holder has made progress just now.
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
fn the_error_about_a_queue_that_cannot_be_locked_names_the_file() {
    let spool = Spool::new();
    fs::create_dir_all(spool.path("odmr.lock")).unwrap();
    match spool.queue.lock(&[spool.name("example.org")]) {
        Err(LockError::Failed(error)) => assert!(error.to_string().contains("odmr.lock"), "{error}"),
        _ => panic!("a directory was locked"),
    }
    fs::remove_dir(spool.path("odmr.lock")).unwrap();
    // A pipe does not block.
    let mode = rustix::fs::Mode::RWXU;
    rustix::fs::mkfifoat(rustix::fs::CWD, spool.path("odmr.lock"), mode).unwrap();
    assert!(matches!(spool.queue.lock(&[spool.name("example.org")]), Err(LockError::Failed(_))));
}

/// A settlement that fails loses nothing, and the session goes on.
#[test]
fn a_disk_that_fails_loses_nothing() {
    let spool = Spool::new();
    spool.put(&["eva"]);
    spool.put(&["bob"]);
    spool.write(".refused", "a file where a directory should be");
    let mut lock = spool.lock();
    let message = lock.next_message().unwrap();
    assert!(lock.settle(message, &result("!")).is_err());
    settle(&mut lock, "=");
    assert!(lock.next_message().is_none(), "not again in this session");
    drop(lock);
    fs::remove_file(spool.path(".refused")).unwrap();
    settle(&mut spool.lock(), "!");
    assert!(spool.lock().is_empty().unwrap());
    assert_eq!(spool.files(".refused/new").len(), 1);
}

/// A mail reader moves or links the file between the offer and the settlement.
#[test]
fn a_message_that_a_mail_reader_moves_is_the_same_message() {
    let move_file = |what: &str, from: &Path, to: &Path| {
        match what {
            "linked" => fs::hard_link(from, to),
            _ => fs::rename(from, to),
        }
        .unwrap();
        if what == "moved and linked" {
            fs::hard_link(to, to.with_file_name("100.mx,A=1:2,RS")).unwrap();
        }
    };
    for what in ["moved", "linked", "moved and linked"] {
        for statuses in ["==", "=~", "~~", "!!", "??"] {
            let spool = Spool::new();
            spool.write("new/100.mx", &format!("{TWO_RECIPIENTS}\nx\n"));
            fs::create_dir_all(spool.path("cur")).unwrap();
            let mut lock = spool.lock();
            let message = lock.next_message().unwrap();
            let name = &spool.files("new")[0].0;
            move_file(what, &spool.path("new").join(name), &spool.path("cur").join(format!("{name}:2,S")));
            lock.settle(message, &result(statuses)).unwrap();
            drop(lock);
            let mut lock = spool.lock();
            let left: Vec<_> =
                ["eva", "bob"].into_iter().zip(statuses.chars()).filter(|(_, status)| "~?".contains(*status)).collect();
            let left: Vec<_> = left.into_iter().map(|(name, _)| name).collect();
            assert_eq!(offered(&mut lock), left, "{what} {statuses}");
            assert!(lock.next_message().is_none(), "{what} {statuses}: once");
            drop(lock);
            if !left.is_empty() {
                settle(&mut spool.lock(), &"=".repeat(left.len()));
            }
            // The next session removes the other name.
            let mut lock = spool.lock();
            assert!(
                lock.next_message().is_none() && lock.is_empty().unwrap(),
                "{what} {statuses}: {:?} {:?}",
                spool.files("new"),
                spool.files("cur")
            );
        }
    }
}

#[test]
fn a_message_that_is_moved_after_it_was_listed_and_before_it_is_opened_is_offered() {
    let spool = Spool::new();
    spool.write("new/100.mx", "Delivered-To: eva@example.org\n\nx\n");
    spool.write("new/200.mx", "Delivered-To: bob@example.org\n\nx\n");
    fs::create_dir_all(spool.path("cur")).unwrap();
    let mut lock = spool.lock();
    assert_eq!(offered(&mut lock), ["eva"]);
    fs::rename(spool.path("new/200.mx"), spool.path("cur/200.mx:2,FS")).unwrap();
    assert_eq!(offered(&mut lock), ["bob"]);
    assert!(lock.next_message().is_none());
}

/// A mail reader moves half of the messages and removes the other half. The directory is read a few times for that, not
/// once for each message.
#[test]
fn a_queue_whose_messages_are_all_moved_or_removed_is_listed_once_more() {
    let spool = Spool::new();
    let count: usize = 2000;
    for number in 0..count {
        spool.write(&format!("new/{number:05}.mx"), "Delivered-To: eva@example.org\n\nx\n");
    }
    fs::create_dir_all(spool.path("cur")).unwrap();
    let mut lock = spool.lock();
    let mut offered = usize::from(lock.next_message().is_some());
    for number in 1..count {
        let (from, to) = (spool.path(&format!("new/{number:05}.mx")), spool.path(&format!("cur/{number:05}.mx:2,S")));
        if number.is_multiple_of(2) { fs::remove_file(from).unwrap() } else { fs::rename(from, to).unwrap() }
    }
    let begun = Instant::now();
    while lock.next_message().is_some() {
        offered += 1;
    }
    assert_eq!(offered, 1 + count / 2);
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
}

/// The files of a queue may have other names elsewhere, in a backup say. The queue is not searched for these.
#[test]
fn messages_with_links_elsewhere_are_removed_without_a_search() {
    let spool = Spool::new();
    let count: usize = 2000;
    fs::create_dir_all(spool.path("backup")).unwrap();
    for number in 0..count {
        spool.write(&format!("new/{number:05}.mx"), "Delivered-To: eva@example.org\n\nx\n");
        fs::hard_link(spool.path(&format!("new/{number:05}.mx")), spool.path(&format!("backup/{number:05}"))).unwrap();
    }
    let mut lock = spool.lock();
    assert!(lock.has_next());
    let begun = Instant::now();
    for _ in 0..count {
        settle(&mut lock, "=");
    }
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    assert!(lock.is_empty().unwrap());
    assert_eq!(spool.files("backup").len(), count);
}

/// A mail reader was killed between link and unlink, and the file must be copied to be marked.
#[test]
fn a_copy_replaces_both_names() {
    let spool = Spool::new();
    spool.write("new/100.mx", &format!("{TWO_RECIPIENTS}\nx\n"));
    fs::create_dir_all(spool.path("cur")).unwrap();
    fs::hard_link(spool.path("new/100.mx"), spool.path("cur/100.mx:2,S")).unwrap();
    let name = spool.name("example.org");
    name.maildir().create().unwrap();
    let entry = name.maildir().entries().unwrap().remove(1);
    let Ok(Opened::Message(mut message)) = QueuedMessage::open(&name, entry, None, Ids::fixed().clock().now()) else {
        panic!("no message")
    };
    message.use_file(File::open(spool.path("new/100.mx")).unwrap());
    message.ensure_markable("copy").unwrap();
    assert_eq!(spool.files("new").len() + spool.files("cur").len(), 1);
}

/// A mail reader moves and flags messages all the time, some by rename and some by link and unlink.
#[test]
fn no_message_is_lost_or_doubled_while_a_mail_reader_renames_files() {
    let (spool, count) = (Spool::new(), 150);
    for number in 0..count {
        spool.put(&[&format!("a{number}"), &format!("b{number}")]);
    }
    let done = std::sync::atomic::AtomicBool::new(false);
    let at_work = || {
        for turn in (0usize..).take_while(|_| !done.load(std::sync::atomic::Ordering::Relaxed)) {
            for entry in spool.name("example.org").maildir().entries().unwrap_or_default() {
                let name = entry.name.to_str().unwrap();
                let base = name.split(':').next().unwrap();
                let to = spool.path("cur").join(format!("{base}:2,{}", ["S", "RS", "FS"][turn % 3]));
                let from = spool.path(if entry.seen { "cur" } else { "new" }).join(name);
                let _ = if turn.is_multiple_of(2) {
                    fs::rename(&from, &to)
                } else {
                    fs::hard_link(&from, &to).and_then(|()| fs::remove_file(&from))
                };
                std::thread::sleep(Duration::from_micros(5));
            }
        }
    };
    let mut sent = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(at_work);
        for _ in 0..60 {
            let mut lock = spool.lock();
            while let Some(message) = lock.next_message() {
                let names = local_parts(&message);
                let statuses = if names.len() > 1 && names[0].len().is_multiple_of(2) { "=~" } else { "==" };
                let statuses = &statuses[..names.len()];
                sent.extend(
                    names.into_iter().zip(statuses.chars()).filter(|(_, status)| *status == '=').map(|(name, _)| name),
                );
                let _ = lock.settle(message, &result(statuses));
            }
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    sent.sort();
    let unique: std::collections::BTreeSet<_> = sent.iter().collect();
    assert_eq!((sent.len(), unique.len()), (2 * count, 2 * count));
    assert!(spool.lock().is_empty().unwrap(), "{:?} {:?}", spool.files("new"), spool.files("cur"));
}

/// The mark keeps the next session from sending it.
#[test]
fn a_message_that_cannot_be_removed_is_not_sent_again() {
    let spool = Spool::new();
    spool.put(&["eva"]);
    let mut lock = spool.lock();
    let message = lock.next_message().unwrap();
    let (path, kept) = (spool.path("new").join(&spool.files("new")[0].0), spool.path("kept"));
    fs::rename(&path, &kept).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(lock.settle(message, &result("=")).is_err());
    drop(lock);
    fs::remove_dir(spool.path("new").join(&spool.files("new")[0].0)).unwrap();
    fs::rename(&kept, &path).unwrap();
    assert!(spool.lock().next_message().is_none());
    assert!(spool.lock().is_empty().unwrap(), "the next session has removed it");
}

/// The order of the offers in each of some calls. Messages to `ends` end their session.
fn calls(spool: &Spool, calls: usize, ends: &[&str]) -> Vec<String> {
    let call = |_| {
        let mut lock = spool.lock();
        let mut order = Vec::new();
        while let Some(message) = lock.next_message() {
            let name = local_parts(&message).remove(0);
            let lost = ends.contains(&name.as_str());
            order.push(name);
            if lost {
                lock.settle(message, &DeliveryResult::lost("gone", 1)).unwrap();
                break;
            }
        }
        lock.count_call();
        order.join(" ")
    };
    (0..calls).map(call).collect()
}

#[test]
fn a_message_that_ends_sessions_is_offered_last_and_then_skipped() {
    let spool = Spool::new();
    for name in ["bad", "one", "two"] {
        spool.put(&[name]);
    }
    let (last, skipped) = ("one two bad", "one two");
    let expected = [
        &["bad", last, last, skipped, last, skipped, skipped, last][..],
        &[&[skipped; 4][..], &[last], &[skipped; 8], &[last], &[skipped; 8], &[last]].concat(),
    ]
    .concat();
    assert_eq!(calls(&spool, expected.len(), &["bad"]), expected);
    let [(name, _)] =
        spool.files("new").into_iter().filter(|(name, _)| name.contains(",P=")).collect::<Vec<_>>().try_into().unwrap();
    assert!(name.contains(",A=8,P=8-8-"), "{name}");
    // A session that is not counted as a call changes nothing.
    assert_eq!(offered(&mut spool.lock()), ["one"]);
    assert!(spool.files("new").iter().any(|(name, _)| name.contains(",P=8-8-")));
    // After a day it is offered again, and a reply ends the count.
    let day_ago = Ids::fixed().clock().now().seconds() - 24 * 3600;
    let other = format!("{},P=8-8-{day_ago}", name.split(",P=").next().unwrap());
    fs::rename(spool.path("new").join(&name), spool.path("new").join(other)).unwrap();
    assert_eq!(calls(&spool, 2, &[]), ["one two bad"; 2]);
    let mut lock = spool.lock();
    while let Some(message) = lock.next_message() {
        lock.settle(message, &result("~")).unwrap();
    }
    assert!(spool.files("new").iter().all(|(name, _)| !name.contains(",P=")));
}

/// The file name of the only message after it has ended this many sessions. `pause`: until its next attempt.
fn name_after(sessions: usize, pause: Duration, lost: &DeliveryResult) -> String {
    let spool = Spool::new();
    spool.put(&["bad"]);
    for _ in 0..sessions {
        let mut lock = spool.lock();
        let mut message = lock.next_message().unwrap();
        message.next_attempt = Some(SystemTime::now() + pause);
        lock.settle(message, lost).unwrap();
    }
    spool.files("new").remove(0).0
}

/// The next call tries a customer's message again, whenever that is: its pause is a moment, which may be over or not
/// when the end of the session is recorded.
#[test]
fn calls_skip_a_message_that_ends_sessions_unless_it_waits_for_its_next_attempt() {
    let (moment, pause) = (Duration::from_millis(200), Duration::from_secs(300));
    let lost = DeliveryResult::lost("gone", 1);
    assert!(name_after(3, moment, &lost).contains(",P=3-1-"));
    assert!(name_after(3, pause, &lost).contains(",P=3-0-"));
    let stopped = name_after(3, moment, &lost.stopped());
    assert!(!stopped.contains(",A=") && !stopped.contains(",P="), "{stopped}");
}

/// The connection may be lost while a second message waits for the first: the second was not tried.
#[test]
fn a_message_after_the_one_that_ends_its_session_is_not_counted() {
    let spool = Spool::new();
    for name in ["bad", "mad", "one"] {
        spool.put(&[name]);
    }
    let earlier = || DeliveryResult { decided_by: DecidedBy::UnrelatedConnectionLoss, ..result("~") };
    let mut last_before_one = Vec::new();
    for _ in 0..4 {
        let mut lock = spool.lock();
        while let Some(message) = lock.next_message() {
            let name = local_parts(&message).remove(0);
            if name == "one" {
                lock.settle(message, &result("~")).unwrap();
                continue;
            }
            let follower = lock.next_message();
            lock.settle(message, &DeliveryResult::lost("gone", 1)).unwrap();
            if let Some(follower) = follower {
                last_before_one.push(local_parts(&follower).remove(0));
                lock.settle(follower, &earlier()).unwrap();
            }
            break;
        }
    }
    assert_eq!(last_before_one, ["mad", "one", "mad", "bad"], "the order of the offers");
    let count = |name: &str| {
        let file = spool.files("new").into_iter().find(|(_, text)| text.contains(&format!("{name}@"))).unwrap().0;
        let entry = crate::maildir::Entry { name: file.into(), seen: false };
        (entry.record().attempts, entry.record().ended.map(|ended| ended.sessions))
    };
    assert_eq!([count("bad"), count("mad")], [(2, Some(2)), (2, Some(2))]);
}

#[test]
fn a_message_that_ended_a_session_is_not_offered_before_those_of_other_queues() {
    let spool = Spool::new();
    spool.put(&["bad"]);
    let other = spool.directory.path().join("domains/example.com/new");
    fs::create_dir_all(&other).unwrap();
    fs::write(other.join("300.x"), "Delivered-To: zoe@example.com\n\n").unwrap();
    let lock = || spool.queue.lock(&[spool.name("example.org"), spool.name("example.com")]).unwrap();
    let mut first = lock();
    let message = first.next_message().unwrap();
    assert_eq!(local_parts(&message), ["bad"]);
    first.settle(message, &DeliveryResult::lost("gone", 1)).unwrap();
    drop(first);
    let mut second = lock();
    assert!(second.has_next());
    assert_eq!([offered(&mut second), offered(&mut second)], [["zoe"], ["bad"]]);
}

/// The record has room in every name that the system permits, and the message remains the same one.
#[test]
fn a_long_file_name_records_attempts() {
    let ended = DeliveryResult::lost("gone", 2);
    for length in [200, 215, 230, 243, 250, 255] {
        for info in ["", ":2,RS"] {
            let spool = Spool::new();
            let names: Vec<_> =
                ["a", "b"].map(|end| format!("1767323045.{}{end}", "l".repeat(length - 12 - info.len()))).into();
            let directory = if info.is_empty() { "new" } else { "cur" };
            for name in &names {
                spool.write(&format!("{directory}/{name}{info}"), &format!("{TWO_RECIPIENTS}\nx\n"));
            }
            for result in [&ended, &ended, &ended, &ended, &result("=~"), &result("?")] {
                for _ in 0..2 {
                    let mut lock = spool.lock();
                    (0..4).for_each(|_| lock.count_call());
                    let Some(message) = lock.next_message() else { continue };
                    lock.settle(message, result).unwrap();
                }
            }
            let mut lock = spool.lock();
            while let Some(message) = lock.next_message() {
                assert!(message.first_offered(Ids::fixed().clock().now()).is_some(), "{length}");
                lock.settle(message, &result("=")).unwrap();
            }
            let left = [spool.files("new"), spool.files("cur")].concat();
            assert!(left.iter().all(|(name, _)| name.contains(",P=")), "{length} {left:?}");
        }
    }
}

#[test]
fn file_names_are_octets() {
    use std::os::unix::ffi::OsStrExt;
    let spool = Spool::new();
    let names: [&[u8]; 8] = [
        b"cur/1.2_1.host,U=103:2:2,RS",
        b"new/2.M1.\xe4rger.host",
        b"new/3 with a space",
        b"cur/4.host:1,x",
        b"cur/5.host",
        b"new/6.host:2,",
        b"new/7.host,S=1,W=1",
        b"cur/8.host;2,S",
    ];
    for name in names {
        let path = spool.path("").join(std::ffi::OsStr::from_bytes(name));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{TWO_RECIPIENTS}\nx\n")).unwrap();
    }
    for statuses in ["=~", "~", "="] {
        let mut lock = spool.lock();
        for _ in 0..names.len() {
            settle(&mut lock, statuses);
        }
        assert!(lock.next_message().is_none());
    }
    assert!(spool.lock().is_empty().unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// With all statuses in any order, each recipient is sent once or rejected once.
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
        let (mut sent, mut with_rejected) = (Vec::new(), std::collections::HashSet::new());
        for turn in 0.. {
            prop_assert!(turn < 200, "the queue is empty in the end");
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
                    if status == '!' {
                        with_rejected.insert(name[..2].to_owned());
                    }
                    if "=!".contains(status) {
                        sent.push(name);
                    }
                }
                lock.settle(message, &result(&statuses)).unwrap();
            }
        }
        sent.sort();
        prop_assert_eq!(sent, expected);
        prop_assert_eq!(spool.files(".refused/new").len(), with_rejected.len());
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

/// If every recipient failed, 452 did not mean "too many recipients": the next attempt is not made at once.
#[test]
fn a_452_for_all_recipients_waits_and_a_452_for_some_does_not() {
    for (statuses, due_at_once) in [("++", false), ("=+", true)] {
        let directory = tempfile::tempdir().unwrap();
        let name = QueueName {
            path: directory.path().into(),
            domain: Some(domain("example.net")),
            retries: true,
            ..QueueName::default()
        };
        let queue = outgoing(&name, &["a@example.net", "b@example.net"]);
        let mut lock = queue.lock(std::slice::from_ref(&name)).unwrap();
        let mut message = lock.next_message().unwrap();
        message.next_attempt = Some(SystemTime::now() + Duration::from_secs(3600));
        lock.settle(message, &result(statuses)).unwrap();
        assert_eq!(lock.next_message().is_some(), due_at_once);
        assert_eq!(queue.next_due(&name).unwrap().unwrap() <= SystemTime::now(), due_at_once);
    }
}

#[test]
fn a_message_that_was_deferred_while_the_clock_was_a_year_fast_is_due_at_once() {
    for (ahead, due) in [(Duration::from_secs(3600), false), (Duration::from_secs(365 * 24 * 3600), true)] {
        let directory = tempfile::tempdir().unwrap();
        let name = QueueName { path: directory.path().into(), retries: true, ..QueueName::default() };
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
    let names: Vec<_> =
        name.maildir().entries().unwrap().into_iter().map(|entry| entry.name.into_string().unwrap()).collect();
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
            let name = QueueName { path: directory.path().into(), retries, ..QueueName::default() };
            let queue = outgoing_since(&name, &["a@example.net"], Timestamp::from_seconds(arrived));
            queue
                .list(&name, &mut |message| {
                    assert_eq!(message.arrived.seconds(), if possible { arrived } else { now });
                    Ok(())
                })
                .unwrap();
            let (unchanged, mark) =
                (name.maildir().entries().unwrap().remove(0).name.into_string().unwrap(), format!(",T={now}"));
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

#[test]
fn a_settlement_for_some_recipients_does_not_change_the_time_of_the_first_session() {
    let (directory, now) = (tempfile::tempdir().unwrap(), Ids::fixed().clock().now());
    let name = QueueName { path: directory.path().into(), ..QueueName::default() };
    let queue = outgoing_since(&name, &["a@example.net", "b@example.net"], Timestamp::from_seconds(0));
    settle(&mut queue.lock(std::slice::from_ref(&name)).unwrap(), "=~");
    let (file, arrived) = arrival(&queue, &name);
    assert_eq!((file.contains(",T="), arrived), (true, now.seconds()));
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
        let name = QueueName { path: directory.path().into(), retries, ..QueueName::default() };
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
        assert_eq!(entry.record().first_seen.is_some(), marked, "{retries} {named} {modified}");
    }
}

#[test]
fn a_locked_queue_can_be_listed() {
    let directory = tempfile::tempdir().unwrap();
    let name = QueueName { path: directory.path().into(), retries: true, ..QueueName::default() };
    let queue = outgoing(&name, &["a@example.net"]);
    let _lock = queue.lock(std::slice::from_ref(&name)).unwrap();
    let mut seen = Vec::new();
    queue
        .list(&name, &mut |message| {
            seen.push((message.id, message.next_attempt.is_some()));
            Ok(())
        })
        .unwrap();
    assert_eq!(seen, [("id".to_owned(), true)]);
}
