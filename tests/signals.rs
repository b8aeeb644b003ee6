//! Signals and the limit of file sizes: what ends the program, and what does not.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;

use crate::running::{Client, Running};

/// Signals that end a process by default, but not the daemons.
const IGNORED: [Signal; 11] = [
    Signal::HUP,
    Signal::USR1,
    Signal::USR2,
    Signal::QUIT,
    Signal::ALARM,
    Signal::VTALARM,
    Signal::PROF,
    Signal::XCPU,
    Signal::IO,
    Signal::PIPE,
    Signal::XFSZ,
];

const PROVIDER: &str = "hostname = \"relay.example.net\"\nspool = \"spool\"\ncustomers = \"customers.d\"\n[inbound]\n\
                        listen = [\"127.0.0.1:0\"]\n[odmr]\nlisten = [\"127.0.0.1:0\"]\nrequire-tls = false\n";

const ACME: &str = "domains = [\"example.org\"]\nsecret = \"tanstaaftanstaaf\"\n";

/// The beginning of the file of a customer whose provider listens at `ADDRESS`.
const CUSTOMER: &str = "hostname = \"mail.example.org\"\n[provider]\naddress = \"ADDRESS\"\ntls = \"none\"\n\
                        name = \"acme\"\nsecret = \"tanstaaftanstaaf\"\n[mailboxes]\nroot = \"mailboxes\"\n\
                        accept = [\"alice@example.org\"]\n[outgoing]\nqueue = \"outgoing\"\nlisten = [\"127.0.0.1:0\"]\n";

/// A directory with the files of a provider or of a customer.
struct Place(tempfile::TempDir);

impl Place {
    fn provider() -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        fs::create_dir(place.0.path().join("customers.d")).unwrap();
        place.write("customers.d/acme.toml", ACME);
        place.write("odmr.toml", PROVIDER);
        place
    }

    fn customer(provider: &str) -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        place.write("odmr.toml", &CUSTOMER.replace("ADDRESS", provider));
        place
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.0.path().join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn config(&self) -> PathBuf {
        self.0.path().join("odmr.toml")
    }

    /// How many messages a Maildir has in `new`.
    fn count(&self, maildir: &str) -> usize {
        fs::read_dir(self.0.path().join(maildir).join("new")).map_or(0, Iterator::count)
    }

    /// Starts the program from a shell, after `setup`.
    fn start(&self, setup: &str, words: &str) -> Running {
        let mut shell = Command::new("sh");
        let script = format!("{setup} exec \"$0\" {words} -c \"$1\"");
        let child = shell.arg("-c").arg(script).arg(env!("CARGO_BIN_EXE_odmr")).arg(self.config());
        Running::start(child.stdin(Stdio::piped()).stdout(Stdio::piped()))
    }
}

/// Sends each signal of `IGNORED`, and waits for its line in the log. `is_used`: signals with an effect, and its log line.
fn send_all_ignored(daemon: &mut Running, is_used: &[(Signal, &str)]) {
    for signal in IGNORED {
        daemon.signal(signal);
        match is_used.iter().find(|(used, _)| *used == signal) {
            Some((_, event)) => drop(daemon.wait_for(event)),
            // These two are not logged.
            None if matches!(signal, Signal::PIPE | Signal::XFSZ) => {}
            None => drop(daemon.wait_for(&format!("event=signal-ignored signal={}", signal.as_raw()))),
        }
    }
}

#[test]
fn serve_is_ended_by_sigterm_and_sigint_only() {
    for end in [Signal::TERM, Signal::INT] {
        let place = Place::provider();
        let mut serve = place.start("", "serve");
        let mut client = Client::connect(&serve.listening("inbound"));
        send_all_ignored(&mut serve, &[(Signal::HUP, "event=reloaded")]);
        assert!(client.send("a@b.example", "alice@example.org", 1).starts_with("250 "));
        serve.signal(end);
        assert_eq!(serve.exit_code(), Some(0));
        assert_eq!(place.count("spool/domains/example.org"), 1);
    }
}

#[test]
fn the_connection_of_inetd_is_ended_by_sigterm_only() {
    let place = Place::provider();
    let mut serve = place.start("", "serve --inetd inbound");
    let mut replies = BufReader::new(serve.child.stdout.take().unwrap());
    let mut reply = || {
        let mut line = String::new();
        replies.read_line(&mut line).unwrap();
        line
    };
    assert!(reply().starts_with("220 "));
    send_all_ignored(&mut serve, &[]);
    serve.child.stdin.as_ref().unwrap().write_all(b"NOOP\r\n").unwrap();
    assert!(reply().starts_with("250 "));
    serve.signal(Signal::TERM);
    assert!(reply().starts_with("421 "));
    assert_eq!(serve.exit_code(), Some(0));
}

#[test]
fn the_daemon_of_a_customer_is_ended_by_sigterm_and_sigint_only() {
    for end in [Signal::TERM, Signal::INT] {
        let place = Place::customer("127.0.0.1:1");
        let mut daemon = place.start("", "pull --daemon");
        let address = daemon.listening("local");
        daemon.wait_for("event=call-failed");
        send_all_ignored(&mut daemon, &[(Signal::HUP, "event=reloaded"), (Signal::USR1, "event=call-failed")]);
        assert!(Client::connect(&address).send("alice@example.org", "d@b.example", 1).starts_with("250 "));
        daemon.signal(end);
        assert_eq!(daemon.exit_code(), Some(0));
        assert_eq!(place.count("outgoing"), 1);
    }
}

/// If the terminal of a call is closed, the call ends as after SIGTERM. If nohup(1) has started it, it continues.
#[test]
fn sighup_ends_a_single_call_as_sigterm_does() {
    // If nohup(1) has started the tests, their children ignore SIGHUP too.
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).map_or("0", str::trim);
    let ignored = u64::from_str_radix(mask, 16).unwrap() & 1 == 1;
    let cases = [("", Signal::HUP, false), ("trap '' HUP;", Signal::HUP, true), ("trap '' HUP;", Signal::TERM, false)];
    for (setup, signal, goes_on) in cases.into_iter().skip(usize::from(ignored)) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let place = Place::customer(&listener.local_addr().unwrap().to_string());
        let mut call = place.start(setup, "pull");
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let line = || {
            let mut line = String::new();
            BufReader::new(&stream).read_line(&mut line).unwrap();
            line
        };
        let send = |reply: &str| (&stream).write_all(reply.as_bytes()).unwrap();
        send("220 relay.example.net\r\n");
        assert!(line().starts_with("EHLO "));
        call.signal(signal);
        if goes_on {
            // The signal was sent before this reply. A call that SIGHUP ends would send no further command.
            send("250-relay.example.net\r\n250-AUTH CRAM-MD5\r\n250 ATRN\r\n");
            assert!(line().starts_with("AUTH "));
            call.signal(Signal::TERM);
        }
        call.wait_for("event=stopping");
        assert!(call.exit_code().is_some(), "{setup} {signal:?}: killed");
    }
}

/// RLIMIT_FSIZE of 8 KiB: a longer message is deferred as if the disk were full.
const LIMIT: &str = "ulimit -f 16;";

#[test]
fn content_beyond_the_limit_of_file_sizes_is_deferred_by_the_listeners() {
    let (provider, customer) = (Place::provider(), Place::customer("127.0.0.1:1"));
    let mut serve = provider.start(LIMIT, "serve");
    let mut inbound = Client::connect(&serve.listening("inbound"));
    let mut daemon = customer.start(LIMIT, "pull --daemon");
    let mut local = Client::connect(&daemon.listening("local"));
    for (lines, reply) in [(10, "250 "), (1000, "452 4.3.1 "), (10, "250 ")] {
        assert!(inbound.send("a@b.example", "alice@example.org", lines).starts_with(reply));
        assert!(local.send("alice@example.org", "d@b.example", lines).starts_with(reply));
    }
    assert_eq!((provider.count("spool/domains/example.org"), customer.count("outgoing")), (2, 2));
    let left = |place: &Place, maildir: &str| fs::read_dir(place.0.path().join(maildir).join("tmp")).unwrap().count();
    assert_eq!((left(&provider, "spool/domains/example.org"), left(&customer, "outgoing")), (0, 0));
}

#[test]
fn content_beyond_the_limit_of_file_sizes_stays_with_the_provider() {
    let provider = Place::provider();
    let mut serve = provider.start("", "serve");
    let (inbound, odmr) = (serve.listening("inbound"), serve.listening("odmr"));
    let mut inbound = Client::connect(&inbound);
    for lines in [1000, 10] {
        assert!(inbound.send("a@b.example", "alice@example.org", lines).starts_with("250 "));
    }
    let customer = Place::customer(&odmr);
    let mailbox = "mailboxes/example.org/alice";
    assert!(customer.start(LIMIT, "pull").exit_code().is_some(), "killed");
    assert_eq!((customer.count(mailbox), held(&provider)), (1, 1));
    assert_eq!(customer.start("", "pull").exit_code(), Some(0));
    assert_eq!((customer.count(mailbox), held(&provider)), (2, 0));
}

/// How many messages the provider holds.
fn held(provider: &Place) -> usize {
    let directory = provider.0.path().join("spool/domains/example.org");
    ["new", "cur"].iter().map(|name| fs::read_dir(directory.join(name)).map_or(0, Iterator::count)).sum()
}

#[test]
fn sendmail_reports_the_limit_of_file_sizes() {
    let customer = Place::customer("127.0.0.1:1");
    for (lines, code) in [(10, 0), (10_000, 75)] {
        let mut shell = Command::new("sh");
        let script = format!("{LIMIT} exec \"$0\" send -C \"$1\" d@b.example");
        shell.arg("-c").arg(script).arg(Path::new(env!("CARGO_BIN_EXE_odmr"))).arg(customer.config());
        let mut child = shell.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let content = format!("Subject: x\n\n{}", "x\n".repeat(lines));
        // The program may exit before it has read all of its input.
        let _ = child.stdin.take().unwrap().write_all(content.as_bytes());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{}", String::from_utf8_lossy(&output.stderr));
    }
    assert_eq!(customer.count("outgoing"), 1);
}
