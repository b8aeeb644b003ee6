//! A whole customer, for one call. The first octet of the input says how it is configured, the rest is what its provider
//! sends, with the octet 0xFF where it waits for something. With `turned` the provider has let it come to the turn before.

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
use super::folder::{check_not_lost, contains, folder, messages};
use super::server::never;
use super::talk::{PART, talk};

const REST: &str = "[mailboxes]\nroot = \"mailboxes\"\naccept = [\"alice@example.org\", \"bob@example.org\", \"@example.com\"]\n\
                    catch-all = \"create\"\nmax-size = \"16KiB\"\naliases = { \"team@example.org\" = [\"alice\", \"bob\"] }\n";

const OUTGOING: &str = "[outgoing]\nqueue = \"outgoing\"\n";

/// How a provider lets a customer come to the turn.
const BEFORE_TURN: [&[u8]; 5] = [
    b"220 relay.example.net ESMTP\r\n",
    b"250-relay.example.net\r\n250-AUTH CRAM-MD5\r\n250 ATRN\r\n",
    b"334 PDE4OTYuNjk3MTcwOTUyQHBvc3RvZmZpY2UucmVzdG9uLm1jaS5uZXQ+\r\n",
    b"235 2.7.0 OK\r\n",
    b"250 2.0.0 OK now reversing the connection\r\n",
];

/// Mail of the customer that waits.
const WAITING: [&str; 2] = [
    "Return-Path: <alice@example.org>\nDelivered-To: dave@example.net\nX-ODMR-Envelope: id=idx1; \
     arrived=2026-01-02T03:04:05Z\nReceived: by mail.example.org (odmr, from uid 0)\nSubject: waiting-1\n\n.\n..two\nlast",
    "Return-Path: <>\nDelivered-To: dave@example.net\nDelivered-To: eva@example.com\nX-ODMR-Envelope: id=idx2; \
     arrived=2026-01-02T03:04:05Z\nReceived: by mail.example.org (odmr, from uid 0)\nSubject: waiting-2\n\n\u{fc}\n",
];

pub fn run(input: &[u8]) {
    let Some((how, rest)) = input.split_first() else { return };
    let (turned, outgoing) = (how & 1 == 1, how & 2 == 2 && how & 1 == 0);
    let folder = folder();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let provider = format!(
        "hostname = \"mail.example.org\"\n[provider]\naddress = \"{address}\"\ntls = \"{}\"\nname = \"acme\"\nsecret = \
         \"tanstaaftanstaaf\"\n",
        if how & 12 == 12 { "starttls" } else { "none" }
    );
    let config = provider + REST + if outgoing { OUTGOING } else { "" };
    write(&folder.path().join("odmr.toml"), config.as_bytes());
    if outgoing {
        wait(&folder.path().join("outgoing"));
    }
    let before = if turned { &BEFORE_TURN[..] } else { &[] };
    let parts: Vec<&[u8]> = before.iter().copied().chain(rest.split(|octet| *octet == PART)).take(24).collect();
    let config = CustomerConfig::load(&folder.path().join("odmr.toml")).expect("a configuration");
    let over = AtomicBool::new(false);
    let heard = thread::scope(|scope| {
        let provider = scope.spawn(|| accept(&listener, &parts, &over));
        let customer = Customer::new(&config, &Ids::fixed()).expect("a customer");
        let called = customer.pull(never(), &Arc::default());
        if let Err(error) = called {
            super::check::shown(&error.to_string());
        }
        over.store(true, Ordering::Relaxed);
        // Wakes the provider.
        drop(TcpStream::connect(address));
        provider.join().expect("the provider")
    });
    check_call(folder.path(), &heard, rest, outgoing);
}

/// The first call gets what the input says; the others are put off.
fn accept(listener: &TcpListener, parts: &[&[u8]], over: &AtomicBool) -> Vec<u8> {
    let mut heard = Vec::new();
    for number in 0u32.. {
        let (mut socket, _) = listener.accept().expect("a call");
        if over.load(Ordering::Relaxed) {
            break;
        }
        match number {
            0 => heard = talk(&mut socket, parts, false),
            _ => drop(talk(&mut socket, &[b"421 4.3.2 later\r\n"], false)),
        }
    }
    heard
}

fn wait(queue: &Path) {
    for name in ["tmp", "new", "cur"] {
        fs::create_dir_all(queue.join(name)).expect("a directory");
    }
    for (number, text) in WAITING.iter().enumerate() {
        write(&queue.join(format!("new/{number}")), text.as_bytes());
    }
}

fn check_call(folder: &Path, heard: &[u8], input: &[u8], outgoing: bool) {
    let stored = messages(&folder.join("mailboxes"));
    let lines = heard.split(|octet| *octet == b'\n');
    let accepted = lines.filter(|line| line.starts_with(b"250 2.6.0 OK, id=")).count();
    assert!(stored.len() >= accepted, "{accepted} were accepted, and {} are there", stored.len());
    for (path, content) in &stored {
        // RFC 5321 section 2.3.8.
        assert!(!content.contains(&b'\r'), "{} has a CR", path.display());
    }
    // The secret is never sent in clear.
    assert!(!contains(heard, b"tanstaaftanstaaf") && !contains(heard, b"\nAUTH PLAIN"));
    for waiting in WAITING.iter().filter(|_| outgoing) {
        check_not_lost(folder, waiting, heard, input);
    }
}
