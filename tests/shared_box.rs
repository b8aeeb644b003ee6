//! `odmr send` of a user who may not write into the outgoing queue: it submits the message to the daemon.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::running::Running;
use crate::send::{CUSTOMER, OUTGOING, RunResult, TestCustomer, assert_contains};

/// The id of a user without rights.
const NOBODY: u32 = 65534;

const MESSAGE: &str = "Subject: x\n\nx\n";

/// A customer, and a user who may not write into its queue.
struct SharedBox {
    customer: TestCustomer,
    /// `None`: the test plays the listener.
    _daemon: Option<Running>,
    /// Root runs the tests, and the user is another one.
    is_root: bool,
}

impl SharedBox {
    /// With a daemon.
    fn new(config: &str) -> SharedBox {
        let customer = TestCustomer::with(config);
        let mut program = Command::new(env!("CARGO_BIN_EXE_odmr"));
        let mut daemon = Running::start(program.args(["pull", "--daemon", "-c"]).arg(customer.config()));
        let listener = daemon.listening("local");
        SharedBox::over(customer, Some(daemon), &listener)
    }

    /// `listener`: the address that replaces port 0 in the configuration, which the daemon has read already.
    fn over(customer: TestCustomer, daemon: Option<Running>, listener: &str) -> SharedBox {
        let shared = SharedBox { customer, _daemon: daemon, is_root: rustix::process::geteuid().is_root() };
        let directory = shared.customer.0.path();
        fs::write(directory.join("secret"), "tanstaaftanstaaf\n").unwrap();
        shared.set_mode("secret", 0o600);
        let config = fs::read_to_string(shared.customer.config()).unwrap();
        let config = config.replace("secret = \"tanstaaftanstaaf\"", "secret-file = \"secret\"");
        fs::write(shared.customer.config(), config.replace("127.0.0.1:0", listener)).unwrap();
        shared.set_mode("customer.toml", 0o644);
        shared.set_mode("", 0o755);
        for name in ["outgoing", "outgoing/tmp", "outgoing/new", "outgoing/cur"] {
            let _ = fs::create_dir(directory.join(name));
            shared.set_mode(name, 0o755);
        }
        if shared.is_root {
            // The user may have no access to the directory of cargo.
            let (program, copy) = (env!("CARGO_BIN_EXE_odmr"), directory.join("odmr"));
            fs::hard_link(program, &copy).or_else(|_| fs::copy(program, &copy).map(drop)).unwrap();
        }
        shared
    }

    fn set_mode(&self, name: &str, mode: u32) {
        fs::set_permissions(self.customer.0.path().join(name), fs::Permissions::from_mode(mode)).unwrap();
    }

    /// Runs `odmr send` as the user.
    fn send(&self, words: &[&str], input: &str) -> RunResult {
        if self.is_root {
            let mut command = Command::new(self.customer.0.path().join("odmr"));
            // Some programs pass an empty `$TMPDIR`.
            command.uid(NOBODY).gid(NOBODY).current_dir("/").env("TMPDIR", "");
            return self.customer.finish(command.arg("send").args(words), input);
        }
        // Without root, the test takes the right to write away meanwhile. The daemon needs it.
        self.set_mode("outgoing/new", 0o500);
        let mut command = Command::new(env!("CARGO_BIN_EXE_odmr"));
        let result = self.customer.finish(command.arg("send").args(words), input);
        self.set_mode("outgoing/new", 0o700);
        result
    }
}

/// The message has the header that it would have in the queue, and the listener does not change it.
#[test]
fn a_user_without_rights_in_the_queue_submits_to_the_daemon() {
    let shared = SharedBox::new(&format!("{CUSTOMER}{OUTGOING}"));
    if !shared.is_root {
        return;
    }
    let input = "From eva Fri Jan  2 03:04:05 2026\nFrom: root (Cron D\u{e4}mon)\nTo: dave@example.net, bob\nBcc: carl@example.net\n\
                 \n..\n.dot\nGr\u{fc}\u{df}e\n";
    let words = ["-t", "-i", "-f", "eva", "-N", "success", "-R", "hdrs", "-V", "QQ+2B1", "bob"];
    let sent = shared.send(&words, input);
    assert_eq!((sent.code, sent.error.as_str()), (0, ""));
    let message = shared.customer.only_queued();
    let expected = [
        "Return-Path: <eva@example.org>\nDelivered-To: dave@example.net\nX-ODMR-Recipient: NOTIFY=success\n\
         Delivered-To: carl@example.net\nX-ODMR-Recipient: NOTIFY=success\nX-ODMR-Envelope: id=",
        "; body=8BITMIME; ret=HDRS; envid=QQ+2B1\nReceived: from mail.example.org ([127.0.0.1])\n\tby mail.example.org with ",
        "\nReceived: by mail.example.org (odmr, from uid 65534)\n\tid ",
        "+0000\nFrom: root@example.org (Cron =?UTF-8?B?RMOkbW9u?=)\nTo: dave@example.net, bob@example.org\nDate: ",
        "\n\n..\n.dot\nGr\u{fc}\u{df}e\n",
    ];
    assert_contains(&message, &expected);
    assert!(!message.contains("Bcc") && message.matches("\nDate: ").count() == 1, "{message}");
    let at_home = shared.customer.messages("mailboxes/example.org/bob");
    assert_eq!(at_home.len(), 1);
    assert!(at_home[0].ends_with("\n\n..\n.dot\nGr\u{fc}\u{df}e\n") && !at_home[0].contains("Bcc"));

    // SMTPUTF8, and the null sender.
    assert_eq!(shared.send(&["-f", "<>", "zo\u{eb}@x.example"], "From: <j\u{fc}rgen@x.example>\n\nx\n").code, 0);
    let queued = shared.customer.queued().concat();
    assert_contains(&queued, &["Return-Path: <>\nDelivered-To: zo\u{eb}@x.example\n", "; smtputf8\n"]);
}

/// If one recipient is rejected, no recipient gets the message, even if they need several transactions.
#[test]
fn the_daemon_gets_a_message_for_all_recipients_or_for_none() {
    let config = CUSTOMER.replace("received-hops = 3", "received-hops = 3\nrecipients = 100");
    let shared = SharedBox::new(&format!("{config}{OUTGOING}"));
    if !shared.is_root {
        return;
    }
    let none = |code: i32, words: &[&str], input: &str, part: &str| {
        let sent = shared.send(words, input);
        assert_eq!(sent.code, code, "{words:?}: {}", sent.error);
        assert_eq!(sent.error.lines().count(), 1, "{}", sent.error);
        assert_contains(&sent.error, &[part]);
        assert!(shared.customer.queued().is_empty());
    };
    let many: Vec<_> = (0..250).map(|number| format!("user{number}@x{}.example", number % 3)).collect();
    let good: Vec<_> = many.iter().map(String::as_str).collect();
    none(67, &[&good[..], &["nobody"]].concat(), MESSAGE, "<nobody@example.org>: ");
    none(67, &["nobody", "a@x.example"], MESSAGE, "<nobody@example.org>: ");
    none(65, &[&good[..1], &["dave@localhost"]].concat(), MESSAGE, "<dave@localhost>: ");
    none(65, &["d@x.example, <@"], MESSAGE, "<");
    none(64, &[], MESSAGE, "no recipient");
    none(69, &good, &("x".repeat(70) + "\n").repeat(1000), "70000");
    none(69, &good, &format!("{}\n", "Received: x\n".repeat(4)), "hops");
    // The fields of this program and of the daemon make it one hop too many.
    none(69, &good[..1], &format!("{}\n", "Received: x\n".repeat(3)), "hops");
    let sent = shared.send(&good, MESSAGE);
    assert_eq!((sent.code, sent.error.as_str()), (0, ""));
    let queued = shared.customer.queued();
    let count = |text: &String| text.matches("\nDelivered-To: ").count();
    let mut counts: Vec<_> = queued.iter().map(count).collect();
    counts.sort_unstable();
    assert_eq!(counts, [50, 100, 100]);
    let message_id = |text: &String| text.split("\nMessage-ID: ").nth(1).unwrap().lines().next().unwrap().to_owned();
    assert!(queued.iter().all(|text| message_id(text) == message_id(&queued[0])), "{queued:?}");
}

/// The content is stored in a temporary file, and arrives octet for octet.
#[test]
fn a_large_message_is_submitted() {
    let config = format!("{CUSTOMER}{OUTGOING}").replace("max-size = 70000", "max-size = \"60MiB\"");
    let shared = SharedBox::new(&config);
    if !shared.is_root {
        return;
    }
    let body = format!(".{}\n", "z".repeat(76)).repeat(5 * 1024 * 1024 / 78);
    let sent = shared.send(&["-i", "dave@x.example"], &format!("Subject: large\n\n{body}"));
    assert_eq!((sent.code, sent.error.as_str()), (0, ""));
    assert!(shared.customer.only_queued().ends_with(&format!("\n\n{body}")));
}

#[test]
fn the_daemon_serves_the_session_on_stdin_and_stdout() {
    let shared = SharedBox::new(&format!("{CUSTOMER}{OUTGOING}"));
    if !shared.is_root {
        return;
    }
    let dialogue = "EHLO client\r\nMAIL FROM:<eva@example.org>\r\nRCPT TO:<nobody@example.org>\r\n\
                    RCPT TO:<dave@example.net>\r\nDATA\r\nSubject: by -bs\r\n\r\nx\r\n.\r\n";
    // Without QUIT the end of the input ends the session.
    for (end, replies) in [("QUIT\r\n", 8), ("", 7)] {
        let session = shared.send(&["-bs"], &format!("{dialogue}{end}"));
        assert_eq!((session.code, session.error.as_str()), (0, ""), "{}", session.out);
        let last = session.out.lines().filter(|line| line.get(3..4) == Some(" "));
        let codes: Vec<_> = last.map(|line| &line[..3]).collect();
        assert_eq!(codes, ["220", "250", "250", "550", "250", "354", "250", "221"][..replies], "{}", session.out);
    }
    let queued = shared.customer.queued();
    assert_eq!(queued.len(), 2);
    assert_contains(&queued[0], &["Received: from client ([127.0.0.1])\n", "\nSubject: by -bs\nDate: "]);
}

/// Plays a listener: sends each part of a script up to `|`, then reads a line. At the end it closes the connection, or sends
/// nothing until `held` is dropped.
fn play(listener: &TcpListener, script: &str, held: &mut Vec<TcpStream>) {
    let (mut socket, _) = listener.accept().unwrap();
    let mut lines = BufReader::new(socket.try_clone().unwrap());
    let (script, closes) = script.strip_suffix("close").map_or((script, false), |script| (script, true));
    for part in script.split_inclusive('|') {
        let _ = socket.write_all(part.trim_end_matches('|').as_bytes());
        if part.ends_with('|') {
            let _ = lines.read_line(&mut String::new());
        }
    }
    if !closes {
        let _ = io::copy(&mut lines, &mut io::sink());
        held.push(socket);
    }
}

/// Each error names the remedy, and no command waits for ever.
#[test]
fn a_listener_that_is_not_the_daemon_is_reported() {
    let times = "[timeouts]\ngreeting = \"1s\"\ncommand = \"1s\"\nend = \"1s\"\n";
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let customer = TestCustomer::with(&format!("{CUSTOMER}{OUTGOING}{times}"));
    let shared = SharedBox::over(customer, None, &address);
    let (scripts, played) = mpsc::channel::<String>();
    let server = std::thread::spawn(move || {
        let mut held = Vec::new();
        played.iter().for_each(|script| play(&listener, &script, &mut held));
        drop(listener);
    });
    let fails = |script: &str, words: &[&str], code: i32, part: &str| {
        scripts.send(script.to_owned()).unwrap();
        let begun = Instant::now();
        let sent = shared.send(words, MESSAGE);
        let shown = &script[..script.len().min(200)];
        assert_eq!(sent.code, code, "{shown:?}: {}", sent.error);
        assert!(sent.error.lines().count() == 1 && sent.error.contains(part), "{shown:?}: {}", sent.error);
        assert!(sent.error.len() < 1000 && begun.elapsed() < Duration::from_secs(9), "{shown:?}: {}", sent.error);
    };
    let to = &["d@x.example"];
    fails("", to, 75, "does not reply before its greeting: another service? check the port");
    fails("", &["-bs"], 75, "no reply");
    fails("close", to, 75, "before its greeting");
    fails("close", &["-bs"], 75, "is `odmr pull --daemon` running?");
    fails("SSH-2.0-x\r\n", to, 75, "not a reply of an SMTP server");
    fails(&"x".repeat(1_000_000), to, 75, "a reply line is too long");
    fails("554 5.7.1 no\u{1b}[2J\r\n", to, 69, ": the greeting was rejected: no?[2J");
    fails(&format!("{}554 no\r\n", "554-no\r\n".repeat(20_000)), to, 69, ": the greeting was rejected: no no");
    fails("421 later\r\n", to, 75, "later");
    fails("220 x\r\n|250 x\r\n|", to, 75, "does not reply");
    fails("220 x\r\n|250 x\r\n|550 5.7.1 not you\r\n|221 x\r\n", to, 69, "not you");
    fails("220 x\r\n|250 x\r\n|250 x\r\n|250 x\r\n|354 x\r\n|", to, 75, "may have it");
    fails("220 x\r\n|250 x\r\n|250 x\r\n|250 x\r\n|250 x\r\n|", to, 75, "354");
    fails("220 x\r\n|250 x\r\n|250 x\r\n|250 x\r\n|354 x\r\n250 x\r\n", to, 75, "may have it");
    drop(scripts);
    server.join().unwrap();
    for words in [to, &["-bs"]] {
        let sent = shared.send(words, MESSAGE);
        assert_eq!(sent.code, 75, "{}", sent.error);
        assert_contains(&sent.error, &[&address, "Connection refused", "is `odmr pull --daemon` running?"]);
    }
    assert!(shared.customer.queued().is_empty());
}

#[test]
fn without_a_listener_on_loopback_the_remedy_is_named() {
    for listen in ["", "listen = [\"127.0.0.1:0\"]\n", "listen = [\"192.0.2.1:25\"]\n"] {
        let outgoing = format!("[outgoing]\nqueue = \"outgoing\"\n{listen}");
        let customer = TestCustomer::with(&format!("{CUSTOMER}{outgoing}"));
        let shared = SharedBox::over(customer, None, "127.0.0.1:0");
        for words in [&["d@x.example"], &["-bs"]] {
            let sent = shared.send(words, MESSAGE);
            assert_eq!((sent.code, sent.error.lines().count()), (77, 1), "{}", sent.error);
            assert_contains(&sent.error, &["ermission denied", "add listen = [\"127.0.0.1:25\"]", "customer.toml: "]);
        }
    }
}

#[test]
fn check_reports_what_keeps_other_users_from_sending() {
    let (secret, file) = ("secret = \"tanstaaftanstaaf\"", "secret-file = \"secret\"");
    let listen = "listen = [\"127.0.0.1:2525\"]\n";
    for (line, mode, listen, parts) in [
        (secret, 0o600, "", &["`secret-file`", "write listen = [\"127.0.0.1:25\"]"][..]),
        (secret, 0o600, listen, &["`secret-file`"]),
        (file, 0o644, "", &["write listen = [\"127.0.0.1:25\"]"]),
        (file, 0o644, listen, &[]),
    ] {
        let config = CUSTOMER.replace(secret, line);
        let customer = TestCustomer::with(&format!("{config}[outgoing]\nqueue = \"outgoing\"\n{listen}"));
        let place = |name: &str| customer.0.path().join(name);
        fs::write(place("secret"), "tanstaaftanstaaf\n").unwrap();
        for (name, mode) in [("secret", 0o600), ("customer.toml", mode)] {
            fs::set_permissions(place(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        let mut command = Command::new(env!("CARGO_BIN_EXE_odmr"));
        let checked = customer.finish(command.args(["check", "-c"]).arg(customer.config()), "");
        assert_eq!((checked.code, checked.error.as_str()), (0, ""));
        let note = "can send mail by `odmr send`; for all users ";
        assert_contains(&checked.out, parts);
        assert_eq!(
            (checked.out.contains(note), checked.out.contains(" listen = [")),
            (!parts.is_empty(), listen.is_empty())
        );
    }
}

/// The caller of a setuid program that sends mail must not choose a file that is read with the rights of its owner.
#[test]
fn the_environment_of_a_setuid_program_names_no_configuration() {
    let shared = SharedBox::over(TestCustomer::with("their-secret = 1\n"), None, "");
    if !shared.is_root {
        return;
    }
    let mut command = Command::new("setpriv");
    command.args(["--ruid", "65534", "--clear-groups"]).arg(shared.customer.0.path().join("odmr"));
    let sent = shared.customer.finish(command.args(["send", "d@x.example"]), MESSAGE);
    assert!(sent.code == 78 && sent.error.contains("/etc/odmr/customer.toml"), "{}", sent.error);
}

/// Runs as root only, which can make files that another user may not read.
#[test]
fn files_that_the_user_may_not_read_are_named() {
    let shared = SharedBox::new(&format!("{CUSTOMER}{OUTGOING}"));
    if !shared.is_root {
        return;
    }
    shared.set_mode("outgoing", 0o700);
    let listed = shared.send(&["-bp"], "");
    assert_eq!((listed.code, listed.out.as_str()), (77, ""));
    assert_contains(&listed.error, &["outgoing", "Permission denied", "be its owner, or root"]);
    let aliases = shared.send(&["-bi"], "").out;
    assert!(aliases.starts_with("0 aliases, "), "{aliases}");
    // With `user`, the message goes to the daemon: the owner could not read a file that another user has queued.
    let config = fs::read_to_string(shared.customer.config()).unwrap();
    fs::write(shared.customer.config(), format!("user = \"daemon\"\n{config}")).unwrap();
    ["outgoing", "outgoing/tmp", "outgoing/new"].iter().for_each(|name| shared.set_mode(name, 0o777));
    let sent = shared.send(&["d@x.example"], MESSAGE);
    assert_eq!((sent.code, sent.error.as_str()), (0, ""));
    assert_contains(&shared.customer.only_queued(), &["([127.0.0.1])"]);
    shared.set_mode("customer.toml", 0o640);
    let sent = shared.send(&["d@x.example"], MESSAGE);
    assert_eq!(sent.code, 77);
    assert_contains(&sent.error, &["customer.toml: Permission denied", "`secret-file`", "`chmod 644 "]);
}
