//! Where the log goes: syslog, the journal, a file with times. No session waits for the reader of the log.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::running::{Client, Running};

const PROVIDER: &str = "hostname = \"relay.example.net\"\nspool = \"spool\"\ncustomers = \"customers.d\"\n[inbound]\n\
                        listen = [\"127.0.0.1:0\"]\n[odmr]\nlisten = [\"127.0.0.1:0\"]\nrequire-tls = false\n";
const CUSTOMER: &str = "hostname = \"mail.example.org\"\n[provider]\naddress = \"127.0.0.1:1\"\ntls = \"none\"\nname = \"acme\"\n\
                        secret = \"open sesame to me\"\n[mailboxes]\nroot = \"mail\"\naccept = [\"@example.org\"]\n\
                        [outgoing]\nqueue = \"out\"\n";

/// A configuration, and a socket of syslogd beside it.
struct Place(TempDir);

impl Place {
    fn new(config: &str) -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        fs::create_dir(place.path("customers.d")).unwrap();
        fs::write(place.path("odmr.toml"), config).unwrap();
        fs::set_permissions(place.path("odmr.toml"), fs::Permissions::from_mode(0o600)).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `words` with `-c FILE` and `--syslog=PATH`.
    fn syslog(&self, words: &str) -> Command {
        let mut command = self.command(words);
        command.arg(format!("--syslog={}", self.path("log").display()));
        command
    }

    fn command(&self, words: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_odmr"));
        command.args(words.split(' ')).arg("-c").arg(self.path("odmr.toml")).env_remove("RUST_LOG").env("TZ", "UTC");
        command.stdin(Stdio::null());
        command
    }

    fn syslogd(&self) -> UnixDatagram {
        let _ = fs::remove_file(self.path("log"));
        let socket = UnixDatagram::bind(self.path("log")).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        socket
    }
}

fn receive(socket: &UnixDatagram) -> String {
    let mut space = [0; 65536];
    let length = socket.recv(&mut space).unwrap();
    String::from_utf8(space[..length].to_vec()).unwrap()
}

fn wait_for(socket: &UnixDatagram, word: &str) -> String {
    std::iter::repeat_with(|| receive(socket)).find(|line| line.contains(word)).unwrap()
}

/// A running program whose log is not read from a pipe. It is killed when this is dropped.
struct Started(Child);

impl Started {
    fn new(command: &mut Command) -> Started {
        Started(command.spawn().unwrap())
    }

    fn stop(&mut self) -> Option<i32> {
        kill_process(Pid::from_raw(self.0.id().cast_signed()).unwrap(), Signal::TERM).unwrap();
        self.0.wait().unwrap().code()
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Reads the address of the listener `inbound` from its event.
fn inbound(socket: &UnixDatagram) -> String {
    wait_for(socket, "event=listening listener=inbound ").rsplit('=').next().unwrap().to_owned()
}

/// The format of RFC 3164 section 4.1, as syslog(3) writes it.
#[test]
fn syslog_gets_each_line_with_facility_severity_time_and_ident() {
    let place = Place::new(PROVIDER);
    fs::write(place.path("customers.d/acme.toml"), "domains = [\"example.org\"]\nsecret = \"open sesame to me\"\n")
        .unwrap();
    fs::set_permissions(place.path("customers.d/acme.toml"), fs::Permissions::from_mode(0o600)).unwrap();
    let syslogd = place.syslogd();
    let mut serve = Started::new(place.syslog("serve").stderr(fs::File::create(place.path("stderr")).unwrap()));
    let line = wait_for(&syslogd, "event=listening listener=odmr ");
    let (priority, rest) = line.split_at(4);
    assert_eq!(priority, "<22>", "{line}");
    assert!(rest.as_bytes()[3] == b' ' && rest.as_bytes()[6] == b' ' && rest.as_bytes()[12] == b':', "{line}");
    assert!(rest[16..].starts_with(&format!("odmr[{}]: event=", serve.0.id())), "{line}");
    let mut client = Client::connect(line.rsplit('=').next().unwrap());
    // One line for each failure, which fail2ban reads; its three keys are there even if the name of the account is hostile.
    let plain = |text: &str| data_encoding::BASE64.encode(text.as_bytes());
    assert!(client.command("AUTH CRAM-MD5").starts_with("334 "));
    assert!(client.command(&plain("ac\"me\" peer=[192.0.2.1] 0123456789abcdef0123456789abcdef")).starts_with("535 "));
    let line = wait_for(&syslogd, "event=auth-failed");
    assert!(line.starts_with("<20>"), "{line}");
    assert!(line.contains("peer=[127.0.0.1] account=\"ac\\\"me\\\" peer=[192.0.2.1]\" mechanism=CRAM-MD5"), "{line}");
    // A cancelled AUTH has tested no secret, and is not logged as a failure.
    assert!(client.command("AUTH CRAM-MD5").starts_with("334 "));
    assert!(client.command("*").starts_with("501 "));
    assert!(wait_for(&syslogd, "session=").contains("event=command-rejected"));
    assert_eq!(serve.stop(), Some(0));
    wait_for(&syslogd, "event=stopped");
    assert_eq!(fs::read_to_string(place.path("stderr")).unwrap(), "");
}

#[test]
fn lines_wait_for_a_syslogd_that_is_restarted() {
    let place = Place::new(PROVIDER);
    let syslogd = place.syslogd();
    let mut serve = Started::new(place.syslog("serve").stderr(Stdio::null()));
    let address = inbound(&syslogd);
    wait_for(&syslogd, "listening odmr ");
    drop(syslogd);
    for _ in 0..50 {
        Client::connect(&address);
    }
    let syslogd = place.syslogd();
    for _ in 0..50 {
        wait_for(&syslogd, "event=connected");
    }
    assert_eq!(serve.stop(), Some(0));
    wait_for(&syslogd, "event=stopped");
}

/// If syslogd reads nothing, sessions continue, the program ends, and the lines that syslogd has not read are on stderr.
#[test]
fn a_syslogd_that_hangs_delays_no_session() {
    let place = Place::new(PROVIDER);
    let syslogd = place.syslogd();
    let mut serve = Started::new(place.syslog("serve -v").stderr(fs::File::create(place.path("stderr")).unwrap()));
    let address = inbound(&syslogd);
    let begun = Instant::now();
    (0..600).for_each(|_| drop(Client::connect(&address)));
    assert_eq!(serve.stop(), Some(0));
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    let error = fs::read_to_string(place.path("stderr")).unwrap();
    assert!(error.ends_with("event=stopped\n"), "{error}");
}

#[test]
fn without_a_syslogd_the_log_goes_to_stderr_with_a_warning() {
    let place = Place::new(PROVIDER);
    let mut serve = Running::start(&mut place.syslog("serve"));
    let line = serve.wait_for("event=no-syslog");
    assert!(line.starts_with("warning: ") && line.contains("/log: "), "{line}");
    let address = serve.listening("inbound");
    serve.listening("odmr");
    let syslogd = place.syslogd();
    Client::connect(&address);
    wait_for(&syslogd, "event=connected");
}

/// stderr is the journal if it has the inode that JOURNAL_STREAM names. Otherwise lines have no priorities.
#[test]
fn the_journal_gets_priorities() {
    let place = Place::new(PROVIDER);
    let first_line = |is_journal: bool| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let theirs = OwnedFd::from(theirs);
        let file = rustix::fs::fstat(&theirs).unwrap();
        let journal = format!("{}:{}", file.st_dev, file.st_ino + u64::from(!is_journal));
        let mut command = place.command("serve");
        let mut serve = Started::new(command.env("JOURNAL_STREAM", journal).stderr(theirs));
        drop(command);
        let lines: Vec<_> = BufReader::new(ours).lines().take(2).map(Result::unwrap).collect();
        serve.stop();
        lines[0].clone()
    };
    for (is_journal, begin) in [(true, "<6>"), (false, "")] {
        let line = first_line(is_journal);
        assert!(
            line.starts_with(&format!("{begin}listening ")) || line.starts_with(&format!("{begin}event=")),
            "{line}"
        );
    }
}

#[test]
fn log_time_puts_the_time_before_each_line() {
    let place = Place::new(CUSTOMER);
    let done = place.command("pull --log-time").output().unwrap();
    let log = String::from_utf8(done.stderr).unwrap();
    let lines: Vec<_> = log.lines().filter(|line| line.contains("event=")).collect();
    assert!(lines.iter().any(|line| line.contains("Z event=call provider=")), "{log}");
    for line in lines {
        assert_eq!((&line[10..11], &line[19..20], &line[23..25]), ("T", ".", "Z "), "{line}");
    }
}

/// `send` and `pull -q` do not print the lines that they log to syslog. A failure is printed and logged.
#[test]
fn commands_log_to_syslog_too() {
    let place = Place::new(CUSTOMER);
    let syslogd = place.syslogd();
    let done = place.syslog("pull -q").output().unwrap();
    assert_eq!(done.status.code(), Some(69));
    let error = String::from_utf8(done.stderr).unwrap();
    assert!(error.starts_with("odmr: ") && error.lines().count() == 1, "{error}");
    assert!(wait_for(&syslogd, "event=call ").starts_with("<22>"));
    assert!(wait_for(&syslogd, "event=failed ").starts_with("<19>"));
    let mut send = Command::new(env!("CARGO_BIN_EXE_odmr"));
    send.arg("send").arg("-C").arg(place.path("odmr.toml")).arg(format!("--syslog={}", place.path("log").display()));
    let done = send.args(["-f", "alice@example.org", "bob@example.net"]).stdin(Stdio::null()).output().unwrap();
    assert!(done.status.success() && done.stderr.is_empty(), "{}", String::from_utf8_lossy(&done.stderr));
    wait_for(&syslogd, "event=queued ");
}

/// If nothing reads the pipe on stderr, lines are lost. They are counted when the pipe is read again.
#[test]
fn a_stderr_that_is_not_read_delays_no_session() {
    let place = Place::new(PROVIDER);
    let mut serve = Running::start(&mut place.command("serve -v"));
    let address = serve.listening("inbound");
    let (begun, long) = (Instant::now(), format!("NOOP {}", "x".repeat(480)));
    // A session ends after too many commands without a message.
    for _ in 0..27 {
        let mut client = Client::connect(&address);
        (0..150).for_each(|_| assert!(client.command(&long).starts_with("250 ")));
    }
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    let line = serve.wait_for("event=log-lost");
    let lost: u64 = line.rsplit('=').next().unwrap().parse().unwrap();
    assert!(line.starts_with("error: ") && lost > 1000, "{line}");
    Client::connect(&address);
    serve.wait_for("event=connected");
}

/// A full disk loses lines. The next line begins at the begin of a line of the file.
#[test]
fn lines_that_a_full_disk_loses_are_counted() {
    if !Path::new("/dev/full").exists() {
        return;
    }
    // A limit of file sizes acts like a full disk, which has room again after the file was emptied.
    let place = Place::new(PROVIDER);
    let mut shell = Command::new("sh");
    let script = "ulimit -f 8; exec \"$0\" serve -c \"$1\" 2>>\"$2\"";
    let log = place.path("serve.log");
    shell
        .args(["-c", script, env!("CARGO_BIN_EXE_odmr")])
        .arg(place.path("odmr.toml"))
        .arg(&log)
        .env_remove("RUST_LOG");
    let mut serve = Started::new(shell.stdin(Stdio::null()));
    let begun = Instant::now();
    let read = || fs::read_to_string(&log).unwrap_or_default();
    while !read().contains("listening odmr ") {
        assert!(begun.elapsed() < Duration::from_secs(20));
    }
    let text = read();
    let address = text.lines().find_map(|line| line.strip_prefix("listening inbound ")).unwrap().to_owned();
    for _ in 0..100 {
        Client::connect(&address);
    }
    std::thread::sleep(Duration::from_millis(300));
    fs::write(&log, "").unwrap();
    Client::connect(&address);
    while !read().contains("event=log-lost lines=") {
        assert!(begun.elapsed() < Duration::from_secs(20), "{}", read());
    }
    assert!(read().lines().all(|line| line.is_empty() || line.contains("event=")), "{}", read());
    assert_eq!(serve.stop(), Some(0));
}

#[test]
fn check_reports_where_the_log_of_inetd_goes() {
    let place = Place::new(PROVIDER);
    let done = place.command("check --inetd").output().unwrap();
    let text = String::from_utf8(done.stdout).unwrap();
    let there = ["/dev/log", "/var/run/log", "/var/run/syslog"]
        .iter()
        .any(|path| UnixDatagram::unbound().unwrap().connect(path).is_ok());
    let expected = if there { "goes to the system log" } else { "goes nowhere; start a syslogd" };
    assert!(done.status.success() && text.contains(expected), "{text}");
    let done = Place::new(CUSTOMER).command("check --inetd").output().unwrap();
    assert_eq!(done.status.code(), Some(64));
}
