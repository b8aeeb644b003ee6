//! A whole customer, for one call. The first octet of the input selects its configuration; the rest is what its provider
//! sends, with the octet 0xFF where it waits for a command. With `turned` the connection has turned before that.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use odmr::config::CustomerConfig;
use odmr::customer::pull::Customer;
use odmr::ids::Ids;

use super::config::write;
use super::directory::{check_not_lost, contains, messages, temporary_directory};
use super::peer::{PART, play};
use super::server::never;

const REST: &str = "[mailboxes]\nroot = \"mailboxes\"\naccept = [\"alice@example.org\", \"bob@example.org\", \"@example.com\"]\n\
                    catch-all = \"create\"\nmax-size = \"16KiB\"\naliases = { \"team@example.org\" = [\"alice\", \"bob\"] }\n";

const OUTGOING: &str = "[outgoing]\nqueue = \"outgoing\"\n";

/// What a provider sends up to the turn.
const BEFORE_TURN: [&[u8]; 5] = [
    b"220 relay.example.net ESMTP\r\n",
    b"250-relay.example.net\r\n250-AUTH CRAM-MD5\r\n250 ATRN\r\n",
    b"334 PDE4OTYuNjk3MTcwOTUyQHBvc3RvZmZpY2UucmVzdG9uLm1jaS5uZXQ+\r\n",
    b"235 2.7.0 OK\r\n",
    b"250 2.0.0 OK now reversing the connection\r\n",
];

/// The customer's outgoing messages.
const WAITING: [&str; 2] = [
    "Return-Path: <alice@example.org>\nDelivered-To: dave@example.net\nX-ODMR-Envelope: id=idx1; \
     arrived=2026-01-02T03:04:05Z\nReceived: by mail.example.org (odmr, from uid 0)\nSubject: waiting-1\n\n.\n..two\nlast",
    "Return-Path: <>\nDelivered-To: dave@example.net\nDelivered-To: eva@example.com\nX-ODMR-Envelope: id=idx2; \
     arrived=2026-01-02T03:04:05Z\nReceived: by mail.example.org (odmr, from uid 0)\nSubject: waiting-2\n\n\u{fc}\n",
];

pub fn run(input: &[u8]) {
    let Some((how, rest)) = input.split_first() else { return };
    let (turned, outgoing) = (how & 1 == 1, how & 2 == 2 && how & 1 == 0);
    let root = temporary_directory();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let provider = format!(
        "hostname = \"mail.example.org\"\n[provider]\naddress = \"{address}\"\ntls = \"{}\"\nname = \"acme\"\nsecret = \
         \"tanstaaftanstaaf\"\n",
        if how & 12 == 12 { "starttls" } else { "none" }
    );
    let config = provider + REST + if outgoing { OUTGOING } else { "" };
    write(&root.path().join("odmr.toml"), config.as_bytes());
    if outgoing {
        store_waiting(&root.path().join("outgoing"));
    }
    let before = if turned { &BEFORE_TURN[..] } else { &[] };
    let parts: Vec<&[u8]> = before.iter().copied().chain(rest.split(|octet| *octet == PART)).take(24).collect();
    let config = CustomerConfig::load(&root.path().join("odmr.toml")).expect("a configuration");
    let over = AtomicBool::new(false);
    let received = thread::scope(|scope| {
        let provider = scope.spawn(|| accept(&listener, &parts, &over));
        let customer = Customer::new(&config, &Ids::fixed()).expect("a customer");
        let called = customer.pull(never(), &Arc::default());
        if let Err(error) = called {
            super::check::shown(&error.to_string());
        }
        over.store(true, Ordering::Relaxed);
        // A connection ends the provider's wait.
        drop(TcpStream::connect(address));
        provider.join().expect("the provider")
    });
    check_call(root.path(), &received, rest, outgoing);
}

/// The first call gets the octets of the input; the others get 421.
fn accept(listener: &TcpListener, parts: &[&[u8]], over: &AtomicBool) -> Vec<u8> {
    let mut received = Vec::new();
    for number in 0u32.. {
        let (mut socket, _) = listener.accept().expect("a call");
        if over.load(Ordering::Relaxed) {
            break;
        }
        match number {
            0 => received = play(&mut socket, parts, false),
            _ => drop(play(&mut socket, &[b"421 4.3.2 later\r\n"], false)),
        }
    }
    received
}

fn store_waiting(queue: &Path) {
    for name in ["tmp", "new", "cur"] {
        fs::create_dir_all(queue.join(name)).expect("a directory");
    }
    for (number, text) in WAITING.iter().enumerate() {
        write(&queue.join(format!("new/{number}")), text.as_bytes());
    }
}

fn check_call(root: &Path, received: &[u8], input: &[u8], outgoing: bool) {
    let stored = messages(&root.join("mailboxes"));
    let lines = received.split(|octet| *octet == b'\n');
    let accepted = lines.filter(|line| line.starts_with(b"250 2.6.0 OK, id=")).count();
    assert!(stored.len() >= accepted, "{accepted} messages were accepted, and {} are stored", stored.len());
    for (path, content) in &stored {
        // RFC 5321 section 2.3.8: a message must not contain a bare CR.
        assert!(!content.contains(&b'\r'), "{} has a CR", path.display());
    }
    // The secret is never sent in clear.
    assert!(!contains(received, b"tanstaaftanstaaf") && !contains(received, b"\nAUTH PLAIN"));
    for waiting in WAITING.iter().filter(|_| outgoing) {
        check_not_lost(root, waiting, received, input);
    }
}
