//! The files of outgoing mail on a provider's disk: one for each message that waits, and none after it.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::relaying::{A, Place, mail_host};

/// Files and directories below a directory.
fn inodes(path: &Path) -> usize {
    let Ok(files) = fs::read_dir(path) else { return 0 };
    let inside = |path: &Path| if path.is_dir() { inodes(path) } else { 0 };
    files.flatten().map(|file| 1 + inside(&file.path())).sum()
}

/// The names below a directory.
fn tree(path: &Path) -> String {
    let Ok(files) = fs::read_dir(path) else { return String::new() };
    files.flatten().map(|file| format!("{}\n{}", file.path().display(), tree(&file.path()))).collect()
}

/// Waits until the condition is true. `state`: the text of the failure if it stays false.
fn wait_until(condition: impl Fn() -> bool, state: impl Fn() -> String) {
    let end = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < end, "{}", state());
        thread::sleep(Duration::from_millis(20));
    }
}

/// The DNS: `private-…` has a host for which mail is deferred, `good.example` a host that accepts it; others have none.
fn zone(name: &str, kind: u16) -> Option<Vec<Vec<u8>>> {
    Some(match (name, kind) {
        (name, A) if name.starts_with("private-") => vec![vec![10, 0, 0, 1]],
        ("good.example", A) => vec![vec![127, 0, 0, 1]],
        _ => Vec::new(),
    })
}

/// Forged senders choose the domains of DSNs, so a domain must not leave files on the disk.
#[test]
fn dsns_leave_no_files() {
    let mut place = Place::start(zone, "retry-first = \"1s\"\nretry-max = \"1s\"\ngive-up = \"2s\"\n");
    let spool = place.path("spool");
    place.submit("", "x@warm.example");
    place.serve.wait_for("event=dsn-dropped");
    wait_until(|| fs::read_dir(spool.join("outgoing/@all/new")).unwrap().count() == 0, || tree(&spool));
    let before = inodes(&spool);
    for number in 0..15 {
        place.submit("", &format!("x@private-{number}.example"));
        place.submit("", &format!("x@none-{number}.example"));
    }
    // Each message that waits is one file.
    let waiting = inodes(&spool) - before;
    assert!(waiting <= 30, "{waiting}");
    for _ in 0..30 {
        let line = place.serve.wait_for("event=dsn-dropped");
        assert!(line.contains(" to=<x@") && line.contains(".relay.example.net,B="), "{line}");
    }
    wait_until(|| inodes(&spool) == before, || tree(&spool));
    let names: Vec<_> = fs::read_dir(spool.join("outgoing")).unwrap().map(|file| file.unwrap().file_name()).collect();
    assert_eq!(names, ["@all"]);
    assert_eq!(place.odmr(&["queue", "list"]), "");
}

/// A message that an earlier version has stored in a directory of its domain is sent, and the directory is removed after that.
/// Empty ones are removed at the start.
#[test]
fn the_layout_of_an_earlier_version_is_emptied() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let relay = format!("port = {}\nallow-private = true\n", listener.local_addr().unwrap().port());
    let lines = mail_host(listener);
    let prepare = |directory: &Path| {
        for (destination, file) in [("good.example", "new/1763607845.a"), ("empty.example", ""), ("kept.example", "")] {
            for part in ["tmp", "new", "cur"] {
                fs::create_dir_all(directory.join("spool/outgoing").join(destination).join(part)).unwrap();
            }
            let path = directory.join("spool/outgoing").join(destination);
            fs::write(path.join("odmr.lock"), "").unwrap();
            if !file.is_empty() {
                let text = "Return-Path: <alice@example.org>\nDelivered-To: old@good.example\nSubject: x\n\nx\n";
                fs::write(path.join(file), text).unwrap();
            }
        }
        let set_aside = directory.join("spool/outgoing/kept.example/.refused/new");
        fs::create_dir_all(&set_aside).unwrap();
        fs::write(set_aside.join("1763607845.b"), "Return-Path: <>\nDelivered-To: x@kept.example\n\nx\n").unwrap();
    };
    let mut place = Place::prepared(zone, &relay, prepare);
    assert!(place.odmr(&["queue", "list"]).lines().all(|line| line.contains(" queue=outgoing/good.example ")));
    place.serve.wait_for("to=<old@good.example> status=sent");
    let outgoing = place.path("spool/outgoing");
    let removed = || !outgoing.join("good.example").exists() && !outgoing.join("empty.example").exists();
    wait_until(removed, || tree(&outgoing));
    // A rejected message stays for the postmaster.
    assert!(outgoing.join("kept.example/.refused/new/1763607845.b").exists());
    // New mail for the same domain.
    place.submit("alice@example.org", "new@good.example");
    place.serve.wait_for("to=<new@good.example> status=sent");
    assert!(!outgoing.join("good.example").exists());
    let sent: Vec<_> = lines.try_iter().filter(|line| line.starts_with("RCPT")).collect();
    assert_eq!(sent, ["RCPT TO:<old@good.example>", "RCPT TO:<new@good.example>"]);
}

/// An administrator lists, exports and removes outgoing mail by its domain.
#[test]
fn outgoing_mail_is_listed_by_domain() {
    let mut place = Place::start(zone, "");
    for domain in ["private-1.example", "private-2.example"] {
        place.submit("alice@example.org", &format!("x@{domain}"));
        place.serve.wait_for(&format!("to=<x@{domain}> status=deferred"));
    }
    let list = place.odmr(&["queue", "list", "private-2.example"]);
    assert!(list.lines().count() == 1 && list.contains(" queue=outgoing/private-2.example "), "{list}");
    let status = place.odmr(&["status"]);
    assert!(status.contains("private-1.example ") && status.contains("private-2.example "), "{status}");
    let batch = place.odmr(&["queue", "export", "private-1.example"]);
    assert!(batch.contains("RCPT TO:<x@private-1.example>") && !batch.contains("private-2"), "{batch}");
    // The running relay sends what was made due.
    assert_eq!(place.odmr(&["queue", "retry", "private-1.example"]), "1 message is due\n");
    place.serve.wait_for("to=<x@private-1.example> status=deferred");
    let id = |domain: &str| {
        let list = place.odmr(&["queue", "list", domain]);
        list.split(' ').next().unwrap().strip_prefix("id=").unwrap().to_owned()
    };
    let (one, other) = (id("private-1.example"), id("private-2.example"));
    assert_eq!(place.odmr(&["queue", "remove", &one]), format!("{one}: removed, from outgoing/private-1.example\n"));
    assert_eq!(
        place.odmr(&["queue", "bounce", &other]),
        format!("{other}: bounced, from outgoing/private-2.example\n")
    );
    // The DSN waits for the customer.
    let list = place.odmr(&["queue", "list"]);
    assert!(list.contains("queue=example.org ") && !list.contains("queue=outgoing"), "{list}");
}
