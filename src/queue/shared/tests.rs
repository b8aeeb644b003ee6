//! One directory for many domains: two sessions, several processes, and directories that are removed while mail is
//! stored.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use super::*;
use crate::ids::Ids;
use crate::mail::address::reverse_path;
use crate::queue::{LockError, Queue, QueueDue, QueueLock, QueuedEnvelope};
use crate::smtp::command::Recipient;
use crate::smtp::reply::Reply;
use crate::smtp::status::{DecidedBy, DeliveryResult, RecipientStatus};

fn octets<const N: usize>() -> [u8; N] {
    let mut octets = [0; N];
    File::open("/dev/urandom").and_then(|mut file| std::io::Read::read_exact(&mut file, &mut octets)).unwrap();
    octets
}

fn queue() -> Queue {
    Queue::new("relay.example.net", Ids::system(|octets_| octets_.fill(octets::<1>()[0])), Duration::from_secs(300))
}

struct SharedSpool {
    directory: tempfile::TempDir,
    queue: Queue,
    index: Arc<SharedIndex>,
}

impl SharedSpool {
    fn new() -> SharedSpool {
        SharedSpool { directory: tempfile::tempdir().unwrap(), queue: queue(), index: Arc::default() }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("outgoing/@all")
    }

    fn name(&self, domain: Option<&str>) -> QueueName {
        let domain = domain.map(|domain| Domain::parse_any(domain).unwrap());
        QueueName { path: self.path(), domain, retries: true, shared: true, ..QueueName::default() }
    }

    fn put(&self, from: &str, domain: &str) -> Entry {
        put(&self.queue, &self.name(Some(domain)), from)
    }

    fn lock(&self, domains: &[&str]) -> QueueLock {
        let names: Vec<_> = domains.iter().map(|domain| self.name(Some(domain))).collect();
        self.queue.lock_indexed(&names, &self.index).unwrap()
    }

    fn read(&self) {
        self.index.read(&self.name(None)).unwrap();
    }

    fn files(&self) -> Vec<Entry> {
        self.name(None).maildir().entries().unwrap()
    }
}

fn put(queue: &Queue, name: &QueueName, from: &str) -> Entry {
    let mailbox = format!("bob@{}", name.domain.as_ref().unwrap());
    let recipients = vec![Recipient::plain(Mailbox::parse_any(&mailbox).unwrap())];
    let from = reverse_path(format!("<{from}>").as_bytes()).unwrap().0;
    let envelope = Envelope { recipients, ..Envelope::new(from) };
    let arrived = Ids::fixed().clock().now();
    let copy = (name.clone(), QueuedEnvelope { id: "id1".to_owned(), arrived, envelope });
    let mut writer = queue.begin_message(&[copy], "").unwrap();
    writer.write(b"Subject: x\n\nx\n").unwrap();
    writer.commit().unwrap().remove(0)
}

/// The sender and the recipient of the next message. It gets this status; `None`: it is put back.
fn next(lock: &mut QueueLock, status: Option<RecipientStatus>) -> String {
    let Some(message) = lock.next_message() else { return "-".to_owned() };
    let to = format!("{} {}", message.envelope.from, message.envelope.recipients[0].mailbox);
    match status {
        Some(status) => {
            let result = DeliveryResult { recipients: vec![status], decided_by: DecidedBy::Peer };
            lock.settle(message, &result).unwrap();
        }
        None => lock.put_back(message),
    }
    to
}

fn sent() -> Option<RecipientStatus> {
    Some(RecipientStatus::Sent(Reply::new(250, "2.0.0", "OK")))
}

fn deferred() -> Option<RecipientStatus> {
    Some(RecipientStatus::Deferred(Reply::new(450, "4.2.1", "later")))
}

#[test]
fn the_name_of_a_file_has_its_domain() {
    let place = SharedSpool::new();
    let long = format!("{}.{}.example", "x".repeat(60), "y".repeat(60));
    let odd = "my_host.example";
    for (from, domain, field) in [
        ("a@b.example", "w.example", ",D=w.example,"),
        ("", "w.example", ",B=w.example,"),
        ("a@b.example", odd, ",D=my_host.example,"),
        ("a@b.example", &long, ".net,S="),
    ] {
        let entry = place.put(from, domain);
        let name = entry.name.to_str().unwrap();
        assert!(name.contains(field) && name.starts_with(entry.unique().to_str().unwrap()), "{name}");
        assert_eq!(domain_of(&place.name(None), &entry).unwrap().unwrap().as_str(), domain);
    }
    // Files of another agent, one of them moved by a mail reader, and entries that are not messages.
    fs::write(place.path().join("new/1.x"), "Delivered-To: a@x.example\n\nx\n").unwrap();
    fs::write(place.path().join("cur/2.x:2,S"), "Delivered-To: a\u{6}y.example\nDelivered-To: b@y.example\n\n")
        .unwrap();
    fs::write(place.path().join("new/3.x"), "nothing\n").unwrap();
    fs::create_dir(place.path().join("new/4.x")).unwrap();
    for _ in 0..2 {
        place.read();
        let mut domains: Vec<_> = place.index.domains().iter().map(Domain::to_string).collect();
        domains.sort();
        assert_eq!(domains, [odd, "w.example", "x.example", &long, "y.example"]);
    }
    let summaries = place.queue.summaries(&place.name(None)).unwrap();
    let counts: Vec<_> = summaries.values().map(|summary| summary.messages).collect();
    assert_eq!((summaries.len(), counts.iter().sum::<u64>()), (5, 6));
    // The domain is the whole value: w.example is not ww.example.
    assert_eq!(place.index.entries(&Domain::parse("w.example").unwrap()).len(), 2);
    assert_eq!(place.index.entries(&Domain::parse("ww.example").unwrap()).len(), 0);
}

#[test]
fn each_session_gets_the_mail_of_its_domains_and_mail_comes_before_dsns() {
    let place = SharedSpool::new();
    for (from, domain) in
        [("", "a.example"), ("s@s.example", "a.example"), ("", "b.example"), ("s@s.example", "c.example")]
    {
        let entry = place.put(from, domain);
        place.index.add(Domain::parse(domain).unwrap(), entry);
    }
    let due = |domain| place.queue.next_due_by_sender(&place.name(Some(domain)), &place.index).unwrap();
    assert!(due("b.example").mail.is_none() && due("b.example").dsn.is_some() && due("a.example").mail.is_some());
    assert_eq!(due("other.example"), QueueDue::default());
    let (mut one, mut other) = (place.lock(&["a.example", "b.example"]), place.lock(&["c.example"]));
    assert_eq!(next(&mut other, sent()), "s@s.example bob@c.example");
    let sent: Vec<_> = (0..4).map(|_| next(&mut one, sent())).collect();
    assert_eq!(sent[0], "s@s.example bob@a.example");
    assert!(sent[1].starts_with(" bob@") && sent[2].starts_with(" bob@") && sent[3] == "-", "{sent:?}");
    assert!(place.files().is_empty() && place.index.domains().is_empty());
}

#[test]
fn a_deferred_message_is_known_by_its_new_name() {
    let place = SharedSpool::new();
    place.put("s@s.example", "a.example");
    place.read();
    assert_eq!(next(&mut place.lock(&["a.example"]), deferred()), "s@s.example bob@a.example");
    let files = place.files();
    assert_eq!(files[0].record().attempts, 1);
    assert!(files[0].destination() == Some(("a.example", false)), "{files:?}");
    assert_eq!(place.index.entries(&Domain::parse("a.example").unwrap()), files);
    // A mail reader has moved it, to a name without the domain: it is found all the same.
    let renamed = Entry { name: files[0].unique().to_owned(), seen: true };
    let maildir = place.name(None).maildir();
    fs::rename(maildir.file(&files[0]), maildir.file(&renamed)).unwrap();
    File::open(maildir.file(&renamed)).unwrap().set_modified(SystemTime::now()).unwrap();
    assert_eq!(next(&mut place.lock(&["a.example"]), sent()), "s@s.example bob@a.example");
    assert!(place.files().is_empty() && place.index.domains().is_empty());
}

/// Another process, such as `odmr queue`, has the lock of one message only.
#[test]
fn one_session_at_a_time_has_a_message() {
    let (place, other) = (SharedSpool::new(), queue());
    let (first, _) = (place.put("s@s.example", "a.example"), place.put("s@s.example", "a.example"));
    place.read();
    let all = place.name(None);
    let mut lock = place.lock(&["a.example"]);
    let message = lock.next_message().unwrap();
    assert_eq!(message.entry(), &first);
    let mut administrator = other.lock(std::slice::from_ref(&all)).unwrap();
    let busy = |error: io::Error| error.kind() == io::ErrorKind::WouldBlock;
    assert!(administrator.open_message(&all, first.clone()).is_err_and(busy));
    assert!(administrator.remove(&all, first.clone()).is_err_and(busy));
    assert!(administrator.make_due(&all, first.clone()).is_err_and(busy));
    assert!(administrator.lock_message(&all, &first).is_err_and(busy));
    let second = place.files().remove(1);
    assert!(administrator.lock_message(&all, &second).unwrap());
    lock.put_back(message);
    assert_eq!(next(&mut lock, sent()), "s@s.example bob@a.example");
    assert_eq!(next(&mut lock, sent()), "-", "the administrator has the other one");
    let message = administrator.open_message(&all, second.clone()).unwrap().unwrap();
    drop(message);
    assert!(administrator.remove(&all, second).unwrap());
    assert!(!administrator.remove(&all, first).unwrap(), "it was sent");
    assert!(place.files().is_empty());
    // A session opens the file before another one settles it, and locks it afterwards.
    let entry = place.put("s@s.example", "a.example");
    let file = File::open(all.maildir().file(&entry)).unwrap();
    assert!(administrator.remove(&all, entry.clone()).unwrap());
    assert!(message::lock_opened(&file, &all.maildir().file(&entry)).unwrap().is_none());
}

/// In a process that [`directories_are_removed_while_mail_is_stored`] starts, the directory in which it stores mail.
const WRITER: &str = "ODMR_TEST_WRITER";

fn old_name(path: PathBuf) -> QueueName {
    let domain = Some(Domain::parse("w.example").unwrap());
    QueueName { path, domain, ..QueueName::default() }
}

/// Stores messages, and finds each of them: by its name, or in a session.
fn write_and_find(name: &QueueName) {
    let queue = queue();
    for _ in 0..150 {
        let entry = put(&queue, name, "s@s.example");
        name.maildir().remove(&entry).unwrap();
        if let Err(LockError::Failed(error)) = queue.try_lock(name) {
            panic!("{error}");
        }
        // The queue is empty for a while, so that it can be removed.
        thread::sleep(Duration::from_millis(1));
    }
}

/// An empty queue is removed all the time, while threads and other processes store mail in it and lock it.
#[test]
fn directories_are_removed_while_mail_is_stored() {
    if let Some(path) = std::env::var_os(WRITER) {
        return write_and_find(&old_name(path.into()));
    }
    let directory = tempfile::tempdir().unwrap();
    let name = &old_name(directory.path().join("outgoing/w.example"));
    let done = AtomicBool::new(false);
    let (written, stored, removed) = thread::scope(|scope| {
        let remove = || {
            let (queue, mut removed) = (queue(), 0);
            while !done.load(Ordering::Relaxed) {
                removed += usize::from(queue.remove_empty(name).unwrap());
            }
            removed
        };
        let removers = [scope.spawn(remove), scope.spawn(remove)];
        let process = || {
            let test = "queue::shared::tests::directories_are_removed_while_mail_is_stored";
            let mut process = Command::new(std::env::current_exe().unwrap());
            process.args([test, "--exact"]).env(WRITER, &name.path).spawn().unwrap()
        };
        let mut processes = [process(), process()];
        let threads = [(); 2].map(|()| scope.spawn(|| write_and_find(name)));
        let written = threads.map(|thread| thread.join().is_ok());
        let stored = processes.each_mut().map(|process| process.wait().unwrap().success());
        done.store(true, Ordering::Relaxed);
        (written, stored, removers.map(|remover| remover.join().unwrap()))
    });
    assert_eq!((written, stored), ([true; 2], [true; 2]));
    assert!(removed.iter().sum::<usize>() > 0, "it was never removed");
    // The writers have ended.
    let _ = queue().remove_empty(name).unwrap();
    assert!(!name.path.exists());
}

#[test]
fn a_file_that_could_not_be_read_once_is_read_again() {
    let place = SharedSpool::new();
    let long = format!("{}.{}.example", "x".repeat(60), "y".repeat(60));
    place.put("a@b.example", &long);
    // The file was renamed meanwhile, or no descriptors were left.
    for kind in [std::io::ErrorKind::NotFound, std::io::ErrorKind::OutOfMemory] {
        place.index.read_by(&place.name(None), &|_| Err(kind.into())).unwrap();
        assert!(place.index.domains().is_empty());
        place.read();
        assert_eq!(place.index.domains(), [Domain::parse(&long).unwrap()]);
        // The index is empty for the next round.
        fs::rename(place.path(), place.directory.path().join("away")).unwrap();
        place.read();
        fs::rename(place.directory.path().join("away"), place.path()).unwrap();
    }
}

#[test]
fn the_index_finds_the_domains_for_which_other_processes_have_stored_mail() {
    let place = SharedSpool::new();
    place.put("a@b.example", "w.example");
    place.read();
    let news = |place: &SharedSpool| {
        let mut news: Vec<_> = place.index.take_news().iter().map(Domain::to_string).collect();
        news.sort();
        news
    };
    assert_eq!(news(&place), ["w.example"]);
    place.read();
    assert!(news(&place).is_empty());
    let x = Domain::parse("x.example").unwrap();
    place.index.add(x, place.put("a@b.example", "x.example"));
    for _ in 0..2 {
        place.put("a@b.example", "w.example");
        place.put("", "y.example");
    }
    // A session has read the directory too.
    place.read();
    place.read();
    assert_eq!(news(&place), ["w.example", "y.example"]);
}
