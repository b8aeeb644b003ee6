//! Outgoing mail, relayed by the program. The test plays the name server and the mail hosts.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::running::{Client, Running};

const SECRET: &str = "tanstaaftanstaaf";

/// The types of DNS records.
pub const A: u16 = 1;
const MX: u16 = 15;

/// The records that a test's name server has for a name and a type; `None`: it does not reply.
pub type Zone = fn(&str, u16) -> Option<Vec<Vec<u8>>>;

/// A name server (RFC 1035 section 4.1). It never replies that a name does not exist.
fn name_server(zone: Zone) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    thread::spawn(move || {
        let mut octets = [0; 1500];
        while let Ok((_, peer)) = socket.recv_from(&mut octets) {
            let (mut at, mut labels) = (12, Vec::new());
            while octets[at] > 0 {
                let end = at + 1 + usize::from(octets[at]);
                labels.push(String::from_utf8_lossy(&octets[at + 1..end]).into_owned());
                at = end;
            }
            let kind = u16::from_be_bytes([octets[at + 1], octets[at + 2]]);
            let Some(records) = zone(&labels.join("."), kind) else { continue };
            let mut reply = [&octets[..2], &[0x81, 0x80, 0, 1, 0, records.len() as u8, 0, 0, 0, 0]].concat();
            reply.extend_from_slice(&octets[12..at + 5]);
            for data in records {
                reply.extend([0xc0, 12, 0, kind as u8, 0, 1, 0, 0, 0, 60, 0, data.len() as u8]);
                reply.extend(data);
            }
            socket.send_to(&reply, peer).unwrap();
        }
    });
    address
}

/// The data of an MX record.
fn mx(preference: u8, host: &str) -> Vec<u8> {
    let labels = host.split('.').flat_map(|label| [&[label.len() as u8], label.as_bytes()].concat());
    [0, preference].into_iter().chain(labels).chain([0]).collect()
}

/// A mail host that accepts everything. Returns the lines that it receives.
pub fn mail_host(listener: TcpListener) -> Receiver<String> {
    let (sender, lines) = mpsc::channel();
    let serve = move |stream: TcpStream| {
        let reply = |text: &str| (&stream).write_all(text.as_bytes());
        let (mut content, _) = (false, reply("220 mx.example\r\n"));
        for line in BufReader::new(&stream).lines().map_while(Result::ok) {
            let _ = match line.as_str() {
                _ if content && line != "." => Ok(()),
                "DATA" => reply("354 go on\r\n"),
                _ => reply("250 ok\r\n"),
            };
            content = line == "DATA" || content && line != ".";
            let _ = sender.send(line);
        }
    };
    thread::spawn(move || listener.incoming().flatten().for_each(serve));
    lines
}

/// A provider that relays for one customer.
pub struct Place {
    directory: tempfile::TempDir,
    pub serve: Running,
    odmr: String,
}

impl Place {
    pub fn start(zone: Zone, relay: &str) -> Place {
        Place::prepared(zone, relay, |_| {})
    }

    /// The same, after `prepare` has run in its directory.
    pub fn prepared(zone: Zone, relay: &str, prepare: impl FnOnce(&Path)) -> Place {
        let directory = tempfile::tempdir().unwrap();
        prepare(directory.path());
        let write = |name: &str, text: &str| {
            fs::write(directory.path().join(name), text).unwrap();
            fs::set_permissions(directory.path().join(name), fs::Permissions::from_mode(0o600)).unwrap();
        };
        fs::create_dir(directory.path().join("customers.d")).unwrap();
        write("customers.d/acme.toml", &format!("domains = [\"example.org\"]\nsecret = \"{SECRET}\"\n"));
        let text = "hostname = \"relay.example.net\"\nspool = \"spool\"\ncustomers = \"customers.d\"\n[inbound]\n\
                    listen = [\"127.0.0.1:0\"]\n[odmr]\nlisten = [\"127.0.0.1:0\"]\nrequire-tls = false\n";
        write("odmr.toml", &format!("{text}[relay]\nresolver = \"{}\"\n{relay}", name_server(zone)));
        let mut serve = Command::new(env!("CARGO_BIN_EXE_odmr"));
        let mut serve = Running::start(serve.arg("serve").arg("-c").arg(directory.path().join("odmr.toml")));
        let odmr = serve.listening("odmr");
        Place { directory, serve, odmr }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The output of a subcommand.
    pub fn odmr(&self, words: &[&str]) -> String {
        let mut odmr = Command::new(env!("CARGO_BIN_EXE_odmr"));
        let output = odmr.arg(words[0]).arg("-c").arg(self.path("odmr.toml")).args(&words[1..]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// The customer submits a message.
    pub fn submit(&self, from: &str, to: &str) {
        let mut customer = Client::connect(&self.odmr);
        assert!(customer.authenticate("acme", SECRET).starts_with("235 "));
        assert!(customer.send(from, to, 1).starts_with("250 "));
    }
}

fn private_zone(name: &str, kind: u16) -> Option<Vec<Vec<u8>>> {
    Some(match (name, kind) {
        ("mixed.example", MX) => vec![mx(1, "inner.example"), mx(2, "any.example")],
        ("inner.example" | "loopback.example", A) => vec![vec![127, 0, 0, 1]],
        ("private.example", A) => vec![vec![192, 168, 0, 1], vec![10, 0, 0, 1]],
        ("any.example", A) => vec![vec![0, 0, 0, 0]],
        _ => Vec::new(),
    })
}

/// The owner of a domain may write addresses of our network into the DNS. The relay must not connect to them.
#[test]
fn private_addresses_of_mail_hosts_are_passed_over() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let relay = format!("port = {}\nretry-first = \"1s\"\nretry-max = \"1s\"\n", listener.local_addr().unwrap().port());
    let mut place = Place::start(private_zone, &format!("{relay}give-up = \"3s\"\n"));
    for (domain, reason) in [
        ("loopback.example", "loopback.example has [127.0.0.1], which is a loopback address"),
        ("private.example", "private.example has [192.168.0.1], which is a private address"),
        ("any.example", "any.example has [0.0.0.0], which is the unspecified address"),
        ("mixed.example", "inner.example has [127.0.0.1], which is a loopback address"),
    ] {
        place.submit("alice@example.org", &format!("bob@{domain}"));
        let text = format!("451 4.4.4 No mail host of {domain} has an address in the world: {reason}");
        let line = place.serve.wait_for("event=deferred");
        assert!(line.ends_with(&format!("destination={domain} reply=\"{text}\"")), "{line}");
    }
    let line = place.serve.wait_for(" dsn=5.4.7 ");
    assert!(line.contains("451 4.4.4 No mail host of "), "{line}");
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err(), "a connection to a loopback address");
}

#[test]
fn allow_private_permits_private_addresses() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let relay = format!("port = {}\nallow-private = true\n", listener.local_addr().unwrap().port());
    let lines = mail_host(listener);
    let mut place = Place::start(private_zone, &relay);
    place.submit("alice@example.org", "bob@mixed.example");
    place.serve.wait_for(" status=sent via=mx ");
    assert!(lines.iter().any(|line| line == "RCPT TO:<bob@mixed.example>"));
    // A connection to 0.0.0.0 would be one to this machine.
    place.submit("alice@example.org", "bob@any.example");
    let line = place.serve.wait_for("event=deferred");
    assert!(line.contains("any.example has [0.0.0.0], which is the unspecified address"), "{line}");
}

#[test]
fn a_reload_permits_private_addresses() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let relay = format!("port = {}\nretry-first = \"1s\"\nallow-private = ", listener.local_addr().unwrap().port());
    let _lines = mail_host(listener);
    let mut place = Place::start(private_zone, &format!("{relay}false\n"));
    place.submit("alice@example.org", "bob@loopback.example");
    place.serve.wait_for("event=address-passed-over");
    place.serve.wait_for("event=deferred");
    let file = place.directory.path().join("odmr.toml");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text.replace("allow-private = false", "allow-private = true")).unwrap();
    place.serve.signal(Signal::HUP);
    place.serve.wait_for("event=reloaded");
    place.serve.wait_for("to=<bob@loopback.example> status=sent");
}

/// The DNS: `quietN.example` has a host that accepts connections and sends nothing; `mute.example` has hosts for whose names
/// the name server does not reply; `good.example` has a host that accepts mail.
fn tarpits(name: &str, kind: u16) -> Option<Vec<Vec<u8>>> {
    Some(match (name, kind) {
        ("mute.example", MX) => (0..6).map(|number| mx(number, &format!("h{number}.mute.example"))).collect(),
        ("good.example", A) => vec![vec![127, 0, 0, 1]],
        (name, A) if name.starts_with("quiet") => {
            vec![vec![127, 0, 2, name["quiet".len()..].split('.').next()?.parse().ok()?]]
        }
        (name, _) if name.ends_with(".mute.example") => return None,
        _ => Vec::new(),
    })
}

/// A provider with this number of connections, the lines that the host of `good.example` receives, and the listeners of this
/// number of silent hosts.
fn among_tarpits(connections: usize, silent: u8) -> (Place, Receiver<String>, Vec<TcpListener>) {
    let good = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = good.local_addr().unwrap().port();
    let silent =
        (1..=silent).map(|number| TcpListener::bind(SocketAddr::from(([127, 0, 2, number], port))).unwrap()).collect();
    let place = Place::start(tarpits, &format!("port = {port}\nallow-private = true\nconnections = {connections}\n"));
    (place, mail_host(good), silent)
}

/// The customer submits a message for the good host. Returns the time until it was sent.
fn send_good_mail(place: &mut Place) -> Duration {
    let begun = Instant::now();
    place.submit("alice@example.org", "bob@good.example");
    place.serve.wait_for("to=<bob@good.example> status=sent");
    begun.elapsed()
}

/// Forged senders of rejected mail choose the hosts that the DSNs go to.
#[test]
fn dsns_to_silent_hosts_do_not_delay_mail() {
    let (mut place, _lines, silent) = among_tarpits(20, 20);
    for number in 1..=20 {
        place.submit("", &format!("x@quiet{number}.example"));
    }
    // The DSNs use their share of the connections.
    silent[0].accept().unwrap();
    let took = send_good_mail(&mut place);
    assert!(took < Duration::from_secs(2), "{took:?}");
}

/// If mail waits for a connection, an attempt at a silent host or with a silent name server ends after a few seconds.
#[test]
fn attempts_without_a_session_give_way_to_mail() {
    let (mut place, _lines, silent) = among_tarpits(2, 1);
    place.submit("alice@example.org", "x@quiet1.example");
    place.submit("alice@example.org", "x@mute.example");
    silent[0].accept().unwrap();
    let took = send_good_mail(&mut place);
    assert!(took < Duration::from_secs(5), "{took:?}");
    // The attempt that has ended was deferred.
    place.submit("alice@example.org", "x@quiet1.example");
    let took = send_good_mail(&mut place);
    assert!(took < Duration::from_secs(5), "{took:?}");
}

/// One host is silent after the content, the other before it.
#[test]
fn sessions_that_stall_do_not_delay_mail() {
    let (mut place, _lines, silent) = among_tarpits(2, 2);
    let (sender, stalled) = mpsc::channel();
    for (listener, replies) in silent.into_iter().zip([5, 3]) {
        let sender = sender.clone();
        thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(&stream);
            for number in 0..replies {
                let reply = if number == 4 { "354 go on\r\n" } else { "250 ok\r\n" };
                (&stream).write_all(reply.replace("250", if number == 0 { "220" } else { "250" }).as_bytes()).unwrap();
                lines.read_line(&mut String::new()).unwrap();
            }
            sender.send(()).unwrap();
            thread::sleep(Duration::from_secs(60));
        });
    }
    place.submit("alice@example.org", "x@quiet1.example");
    place.submit("alice@example.org", "x@quiet2.example");
    stalled.recv().unwrap();
    stalled.recv().unwrap();
    let took = send_good_mail(&mut place);
    assert!(took < Duration::from_secs(5), "{took:?}");
}

#[test]
fn a_stop_ends_lookups_and_waits_for_a_greeting() {
    for to in ["x@quiet1.example", "x@mute.example"] {
        let (mut place, _lines, _silent) = among_tarpits(1, 1);
        place.submit("alice@example.org", to);
        thread::sleep(Duration::from_millis(600));
        place.serve.signal(Signal::TERM);
        let begun = Instant::now();
        place.serve.wait_for("event=stopped");
        assert_eq!(place.serve.exit_code(), Some(0));
        assert!(begun.elapsed() < Duration::from_secs(2), "{to}: {:?}", begun.elapsed());
    }
}
