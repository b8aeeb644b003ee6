//! A whole provider, for one connection. The first octet of the input selects the listener; the rest is what the client
//! sends, with the octet 0xFF where it waits for a reply. With `turned` the connection has turned before that, and there is
//! mail: the rest is what the customer's server sends.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

use odmr::config::ProviderConfig;
use odmr::ids::Ids;
use odmr::net::cancel::CancelToken;
use odmr::provider::{Listener, PreparedProvider, SupervisedConnection};

use super::check;
use super::config::write;
use super::directory::{check_not_lost, messages, temporary_directory};
use super::peer::{PART, play};

const CONFIG: &str = "hostname = \"relay.example.net\"\nspool = \"spool\"\ncustomers = \"customers.d\"\n[inbound]\n\
                      listen = [\"127.0.0.1:0\"]\nmax-size = \"16KiB\"\n[odmr]\nlisten = [\"127.0.0.1:0\"]\nrequire-tls = false\n\
                      [relay]\nresolver = \"127.0.0.1:1\"\n[timeouts]\nshutdown = \"1ms\"\n";

const ACME: &str =
    "domains = [\"example.org\", \"example.com\"]\nsecret = \"tanstaaftanstaaf\"\nexpire-after = \"never\"\n";

/// What a customer sends up to the turn. The response is that to the first challenge of [`Ids::fixed`].
const BEFORE_TURN: [&[u8]; 4] = [
    b"EHLO mail.example.org\r\n",
    b"AUTH CRAM-MD5\r\n",
    b"YWNtZSBmMDBiNWE3ZGJjNWRjYTA4ZTBlNDE0YWYxZWVkNjZlNw==\r\n",
    b"ATRN\r\n",
];

/// Messages that wait for the customer, each with its own subject.
const WAITING: [&str; 3] = [
    "Return-Path: <bob@w.example>\nDelivered-To: alice@example.org\nX-ODMR-Envelope: id=id7; arrived=2026-01-02T03:04:05Z\n\
     Received: by relay.example.net; Fri, 02 Jan 2026 03:04:05 +0000\nSubject: waiting-1\n\n.\n..two\nlast",
    "Return-Path: <eva@w.example>\nDelivered-To: alice@example.org\nDelivered-To: bob@example.org\n\
     X-ODMR-Envelope: id=id8; arrived=2026-01-02T03:04:05Z; body=8BITMIME\n\
     Received: by relay.example.net; Fri, 02 Jan 2026 03:04:05 +0000\nSubject: waiting-2\n\n\u{fc}\r\n",
    "Return-Path: <>\nDelivered-To: \"j\u{fc}rgen b\"@example.org\nReceived: by x\nSubject: waiting-3\n\n",
];

pub fn run(input: &[u8]) {
    let Some((how, rest)) = input.split_first() else { return };
    let root = temporary_directory();
    write(&root.path().join("odmr.toml"), CONFIG.as_bytes());
    write(&root.path().join("customers.d/acme.toml"), ACME.as_bytes());
    let spool = root.path().join("spool");
    let (listener, turned) = match how % 4 {
        0 => (Listener::Inbound, false),
        1 => (Listener::Odmr, false),
        _ => (Listener::Odmr, true),
    };
    if *how & 4 == 4 || turned {
        store_waiting(&spool);
    }
    let before = if turned { &BEFORE_TURN[..] } else { &[] };
    let parts: Vec<&[u8]> = before.iter().copied().chain(rest.split(|octet| *octet == PART)).take(24).collect();
    let config = ProviderConfig::load(&root.path().join("odmr.toml")).expect("a configuration");
    let cancel = CancelToken::new().expect("a token");
    let provider = PreparedProvider::new(config, Ids::fixed(), cancel.clone()).expect("a provider");
    let (ours, mut theirs) = UnixStream::pair().expect("two sockets");
    let received = thread::scope(|scope| {
        let client = scope.spawn(|| play(&mut theirs, &parts, true));
        let peer = "192.0.2.1".parse().ok();
        let served = provider.serve_one(listener, SupervisedConnection { input: ours.into(), output: None, peer });
        served.expect("a thread");
        client.join().expect("the client")
    });
    cancel.cancel();
    let stored = messages(&spool);
    if turned {
        return WAITING.iter().for_each(|waiting| check_not_lost(&spool, waiting, &received, rest));
    }
    // After the turn the provider sends commands, which are not replies.
    const TURN: &[u8] = b"250 2.0.0 OK now reversing";
    let turn = received.windows(TURN.len()).position(|part| part == TURN);
    let replies = check::replies(&received[..turn.unwrap_or(received.len())]);
    let accepted = replies.iter().filter(|reply| reply.starts_with(b"250 2.6.0 OK, id=")).count();
    assert!(stored.len() >= accepted, "{accepted} messages were accepted, and {} are stored", stored.len());
}

fn store_waiting(spool: &Path) {
    let directory = spool.join("domains/example.org");
    for name in ["tmp", "new", "cur"] {
        fs::create_dir_all(directory.join(name)).expect("a directory");
    }
    for (number, text) in WAITING.iter().enumerate() {
        write(&directory.join(format!("new/{number}")), text.as_bytes());
    }
}
