//! The output and exit code of `odmr pull`: which recipients the customer did not accept, and why. The provider is a script.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;

use crate::running::Running;

/// What the provider sends after the turn. The lines of one entry are pipelined; `.` ends content.
type Script<'a> = &'a [&'a str];

/// A directory with the configuration and the mailboxes of one customer.
struct Place(tempfile::TempDir);

struct PullResult {
    code: i32,
    out: String,
    error: String,
    /// The customer's replies after the turn.
    replies: Vec<String>,
}

impl Place {
    /// `mailboxes`: more lines of `[mailboxes]`, and tables after it.
    fn new(mailboxes: &str) -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        fs::write(place.0.path().join("rest"), mailboxes).unwrap();
        place
    }

    /// Writes the configuration of a customer of the provider at `listener`, and returns its path.
    fn configure(&self, listener: &TcpListener) -> PathBuf {
        let rest = fs::read_to_string(self.0.path().join("rest")).unwrap();
        let config = self.0.path().join("customer.toml");
        let address = listener.local_addr().unwrap();
        let text = format!(
            "hostname = \"mail.example.org\"\n[provider]\naddress = \"{address}\"\ntls = \"none\"\nname = \"acme\"\n\
             secret = \"tanstaaftanstaaf\"\n[mailboxes]\nroot = \"mailboxes\"\n{rest}"
        );
        fs::write(&config, text).unwrap();
        fs::set_permissions(&config, fs::Permissions::from_mode(0o600)).unwrap();
        config
    }

    /// Calls a provider that plays this script. `limit`: a shell command before the start of the program.
    fn pull(&self, words: &[&str], limit: &str, script: Script<'_>) -> PullResult {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let config = self.configure(&listener);
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(format!("{limit} exec \"$0\" pull \"$@\"")).arg(env!("CARGO_BIN_EXE_odmr"));
        shell.args(["-c"]).arg(&config).args(words).env_remove("RUST_LOG");
        std::thread::scope(|scope| {
            let provider = scope.spawn(|| play_call(&listener.accept().unwrap().0, script));
            let done = shell.output().unwrap();
            let text = |octets: &[u8]| String::from_utf8_lossy(octets).into_owned();
            let replies = provider.join().unwrap();
            PullResult {
                code: done.status.code().unwrap(),
                out: text(&done.stdout),
                error: text(&done.stderr),
                replies,
            }
        })
    }
}

/// Plays the provider in one call, which announces as many messages as the script has. Returns the replies to the script, one
/// for each line that gets one.
fn play_call(stream: &TcpStream, script: Script<'_>) -> Vec<String> {
    // Two transactions with the same MAIL command have the same message, for different recipients.
    let mails = script.iter().flat_map(|text| text.lines()).filter(|line| line.starts_with("MAIL "));
    let messages = mails.collect::<std::collections::HashSet<_>>().len();
    let replies =
        play_atrn(stream, &format!("250 2.0.0 OK now reversing the connection, {messages} messages\r\n"), script);
    replies.expect("the call turns")
}

/// Plays the provider in one call, whose reply to ATRN is `atrn`. Returns the replies to the script; `None`: the customer does
/// not turn.
fn play_atrn(mut stream: &TcpStream, atrn: &str, script: Script<'_>) -> Option<Vec<String>> {
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut reader = BufReader::new(stream);
    let mut line = move || {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    };
    let mut send = |text: &str| stream.write_all(text.as_bytes()).unwrap();
    let handshake = [
        ("220 relay.example.net\r\n", "EHLO "),
        ("250-relay.example.net\r\n250-AUTH CRAM-MD5\r\n250 ATRN\r\n", "AUTH "),
        ("334 PDE4OTYuNjk3MTcwOTUyQHBvc3RvZmZpY2UucmVzdG9uLm1jaS5uZXQ+\r\n", ""),
        ("235 2.7.0 OK\r\n", "ATRN"),
    ];
    for (reply, next) in handshake {
        send(reply);
        assert!(line().starts_with(next));
    }
    send(atrn);
    if !line().starts_with("220 ") {
        return None;
    }
    let mut replies = Vec::new();
    for text in ["EHLO relay.example.net"].iter().chain(script).chain(&["QUIT"]) {
        // Content and its end are one entry, and get one reply.
        let expected = if text.ends_with("\r\n.") { 1 } else { text.lines().count() };
        send(&format!("{text}\r\n"));
        for _ in 0..expected {
            let mut reply = line();
            while reply.as_bytes().get(3) == Some(&b'-') {
                reply = line();
            }
            replies.push(reply);
        }
    }
    replies.pop();
    replies.remove(0);
    Some(replies)
}

const ALICE: &str = "accept = [\"alice@example.org\", \"bob@example.org\"]\n";

/// A message in four commands.
fn message<'a>(from: &'a str, to: &'a str) -> [String; 4] {
    let content = "Subject: x\r\n\r\nHello.\r\n.".to_owned();
    [format!("MAIL FROM:<{from}>"), format!("RCPT TO:<{to}>"), "DATA".to_owned(), content]
}

fn words(script: &[String]) -> Vec<&str> {
    script.iter().map(String::as_str).collect()
}

/// A mailbox is over its quota: its recipient is deferred, the others are accepted, and the exit code is 75.
#[test]
fn a_deferred_recipient_is_reported_also_if_quiet() {
    let place = Place::new(ALICE);
    let mailbox = place.0.path().join("mailboxes/example.org/alice");
    for directory in ["new", "cur", "tmp"] {
        fs::create_dir_all(mailbox.join(directory)).unwrap();
    }
    fs::write(mailbox.join("new/1700000000.M1P1.host"), "Subject: x\n\n").unwrap();
    fs::write(mailbox.join("maildirsize"), "10S\n12 1\n").unwrap();
    let line = "from <eva@example.net> to <alice@example.org>: deferred by us: 452 4.2.2 ";
    let script = [message("eva@example.net", "alice@example.org"), message("eva@example.net", "bob@example.org")];
    let mut script = script.concat();
    // The first message has no accepted recipient, so its content is not sent.
    script.drain(2..4);
    script.insert(2, "RSET".to_owned());
    let call = place.pull(&[], "", &words(&script));
    assert_eq!(call.code, 75, "{}", call.error);
    assert!(
        call.replies[1].starts_with("452 4.2.2 ") && call.replies[6].starts_with("250 2.6.0 "),
        "{:?}",
        call.replies
    );
    let (first, rest) = call.out.split_once('\n').unwrap();
    assert!(first.starts_with("1 message, ") && first.ends_with(", 1 deferred"), "{first}");
    assert!(rest.starts_with(line) && rest.lines().count() == 1, "{rest}");
    assert!(call.error.contains("odmr: 1 recipient was deferred here"), "{}", call.error);
    assert!(call.error.contains("deferred=1 ") && call.error.contains(" result=deferred\n"), "{}", call.error);
    let quiet = place.pull(&["-q"], "", &words(&script));
    assert_eq!(quiet.code, 75, "{}", quiet.error);
    assert!(quiet.out.starts_with(line) && quiet.out.lines().count() == 1, "{}", quiet.out);
}

/// The disk is full at the content. A limit of file sizes acts like a full disk.
#[test]
fn a_full_disk_is_reported_for_each_recipient() {
    let place = Place::new(ALICE);
    let body = format!("Subject: x\r\n\r\n{}.", "0123456789\r\n".repeat(2000));
    let script = ["MAIL FROM:<>", "RCPT TO:<alice@example.org>\r\nRCPT TO:<BOB@example.org>", "DATA", &body];
    let call = place.pull(&["-q"], "ulimit -f 16;", &script);
    assert_eq!(call.code, 75, "{}", call.error);
    let lines: Vec<_> = call.out.lines().collect();
    let deferred = |to: &str| format!("from <> to <{to}>: deferred by us: 452 4.3.1 The disk is full, try again later");
    assert_eq!(lines, [deferred("alice@example.org"), deferred("BOB@example.org")]);
}

/// MAIL announces a size for which the disk has no room. The pipelined RCPT commands name the recipients, and are not counted
/// as other failures.
#[test]
fn a_full_disk_is_reported_for_the_sender() {
    let place = Place::new(&format!("{ALICE}max-size = \"1000000GiB\"\n"));
    let group = "MAIL FROM:<eva@example.net> SIZE=1000000000000000\r\nRCPT TO:<alice@example.org>\r\nRCPT TO:<bob@example.org>\r\nDATA";
    let call = place.pull(&["-q"], "", &[group]);
    assert_eq!(call.code, 75, "{}", call.error);
    let to = "<alice@example.org>, <bob@example.org>";
    let text = format!("from <eva@example.net> to {to}: deferred by us: 452 4.3.1 The disk is full, try again later\n");
    assert_eq!(call.out, text);
}

/// If outgoing mail cannot be sent, the call must not look like a success. Incoming mail is fetched all the same.
#[test]
fn a_queue_that_cannot_be_locked_fails_the_call_after_the_incoming_mail() {
    let script = message("eva@example.net", "alice@example.org");
    let outgoing = "[outgoing]\nqueue = \"queue\"\n";
    for (directory, text, what, rest) in [
        ("queue", "", "outgoing mail", format!("{ALICE}{outgoing}")),
        ("mailboxes/.handover", "Delivered-To: x\n", "mail for next hops", ALICE.to_owned()),
    ] {
        let place = Place::new(&rest);
        let queue = place.0.path().join(directory);
        ["new", "cur", "tmp", "odmr.lock"].iter().for_each(|name| fs::create_dir_all(queue.join(name)).unwrap());
        fs::write(queue.join("new/1.1.a"), text).unwrap();
        let lock = queue.join("odmr.lock");
        let lock = lock.display();
        for words in [&[][..], &["-q"]] {
            let call = place.pull(words, "", &self::words(&script));
            assert_eq!((call.code, call.replies.len()), (73, 4), "{}", call.error);
            let last = call.error.lines().last().unwrap_or_default();
            let remedy = "Is a directory (os error 21); a directory is where a file must be: move it away";
            assert_eq!(last, format!("odmr: {what} waits, and cannot be sent: {lock} cannot be written to: {remedy}"));
            assert!(words.len() == 1 || call.error.contains(" result=failed\n"), "{}", call.error);
        }
    }
}

/// If `accept` of a new customer is not complete, the message stays with the provider.
#[test]
fn soft_bounce_defers_instead_of_rejecting_and_prints_it() {
    let place = Place::new(ALICE);
    let script = ["MAIL FROM:<eva@example.net>", "RCPT TO:<carol@example.org>\r\nRCPT TO:<x@elsewhere.example>"];
    let call = place.pull(&["--soft-bounce", "-q"], "", &script);
    assert_eq!(call.code, 75, "{}", call.error);
    assert!(call.replies[1].starts_with("451 4.1.1 Soft bounce: 550 5.1.1 "), "{:?}", call.replies);
    let line = |to: &str, code: &str| {
        format!("from <eva@example.net> to <{to}>: deferred by us: 451 4.{code} Soft bounce: 550 5.{code} ")
    };
    let lines: Vec<_> = call.out.lines().collect();
    assert!(lines[0].starts_with(&line("carol@example.org", "1.1")), "{}", call.out);
    assert!(lines[1].starts_with(&line("x@elsewhere.example", "7.1")) && lines.len() == 2, "{}", call.out);
    // The size of the second message is too large.
    let script = [
        "MAIL FROM:<eva@example.net>",
        "RCPT TO:<carol@example.org>",
        "RSET",
        "MAIL FROM:<big@example.net> SIZE=99999999999",
    ];
    let call = place.pull(&["--soft-bounce", "-q"], "", &script);
    let lines: Vec<_> = call.out.lines().collect();
    let line = "from <big@example.net> to -: deferred by us: 451 4.3.4 Soft bounce: 552 5.3.4 ";
    assert!(lines.len() == 2 && lines[1].starts_with(line), "{}", call.out);
    // Without soft bounce this number of rejections would end the session with 421.
    let mut script = vec!["MAIL FROM:<eva@example.net>".to_owned()];
    script.extend((0..500).map(|number| format!("RCPT TO:<x{number}@example.org>")));
    script.push("RCPT TO:<alice@example.org>".to_owned());
    let call = place.pull(&["--soft-bounce", "-q"], "", &words(&script));
    assert!(call.replies.last().unwrap().starts_with("250 "), "{:?}", call.replies.last());
    for option in ["--daemon", "--now"] {
        let mut pull = Command::new(env!("CARGO_BIN_EXE_odmr"));
        let done = pull.args(["pull", "--soft-bounce", option, "-c", "/dev/null"]).output().unwrap();
        assert_eq!(done.status.code(), Some(64));
    }
}

#[test]
fn rejected_recipients_are_reported_and_the_call_succeeds() {
    let place = Place::new(&format!("{ALICE}max-size = 70000\n"));
    let bare = "Subject: x\r\n\r\nsmug\ngled\r\n.";
    let long = "x".repeat(13_000);
    let script = [
        "MAIL FROM:<big@example.net> SIZE=70001",
        "MAIL FROM:<eva@example.net> SIZE=100",
        "RCPT TO:<nobody@example.org>\r\nRCPT TO:<x@elsewhere.example>\r\nRCPT TO:<no\x1baddress>",
        // No recipient was accepted, which was reported already.
        "DATA",
        "RCPT TO:<alice@example.org>",
        &long,
        "DATA",
        bare,
    ];
    for options in [&["-q"][..], &[]] {
        let call = place.pull(options, "", &script);
        assert_eq!(call.code, 0, "{}", call.error);
        let expected = [
            "from <big@example.net> to -: rejected by us: 552 5.3.4 ",
            "from <eva@example.net> to <nobody@example.org>: rejected by us: 550 5.1.1 ",
            "from <eva@example.net> to <x@elsewhere.example>: rejected by us: 550 5.7.1 ",
            "from <eva@example.net> to <\"<no\\x1baddress>\">: rejected by us: 501 5.1.3 ",
            "from <eva@example.net> to -: rejected by us: 500 5.5.2 ",
            "from <eva@example.net> to <alice@example.org>: rejected by us: 554 5.6.0 ",
        ];
        let lines: Vec<_> = call.out.lines().skip(usize::from(options.is_empty())).collect();
        assert_eq!(lines.len(), expected.len(), "{:?}\n{:?}", call.out, call.replies);
        for (line, expected) in lines.iter().zip(expected) {
            assert!(line.starts_with(expected), "{line}");
        }
    }
}

/// The provider sends the 101st recipient again, in another transaction.
#[test]
fn a_recipient_that_is_accepted_in_another_transaction_is_not_reported() {
    let place = Place::new("accept = [\"@example.org\"]\n");
    let mut script = vec!["MAIL FROM:<eva@example.net> SIZE=20".to_owned()];
    script.extend((0..=100).map(|number| format!("RCPT TO:<a{number}@example.org>")));
    script.extend(["DATA".to_owned(), "Subject: x\r\n\r\nHello.\r\n.".to_owned()]);
    let whole = place.pull(&["-q"], "", &words(&script));
    assert!(whole.replies[101].starts_with("452 4.5.3 "), "{:?}", whole.replies);
    assert_eq!(whole.code, 75, "{}", whole.error);
    let mut rest = message("eva@example.net", "A100@example.org").to_vec();
    rest[0] += " SIZE=20";
    script.extend(rest);
    let call = place.pull(&["-q"], "", &words(&script));
    assert_eq!((call.code, call.out.as_str()), (0, ""), "{}", call.error);
}

#[test]
fn a_next_hop_that_is_down_is_named() {
    let place = Place::new(&format!("{ALICE}deliver = {{ \"alice@example.org\" = \"lmtp:127.0.0.1:1\" }}\n"));
    let script = message("eva@example.net", "alice@example.org");
    let call = place.pull(&["-q"], "", &[&script[0], &script[1]]);
    assert_eq!(call.code, 75, "{}", call.error);
    let line = "from <eva@example.net> to <alice@example.org>: deferred by lmtp:127.0.0.1:1: 451 4.4.1 ";
    assert!(call.out.starts_with(line), "{}", call.out);
}

/// By the schedule the daemon would call an hour later.
#[test]
fn the_daemon_calls_again_after_a_pause_if_mail_was_deferred_here() {
    let schedule = "[schedule]\nevery = \"1h\"\nretry-first = \"1s\"\njitter = \"none\"\n";
    let place = Place::new(&format!("{ALICE}max-size = \"1000000GiB\"\n{schedule}"));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut program = Command::new(env!("CARGO_BIN_EXE_odmr"));
    let config = place.configure(&listener);
    let mut daemon = Running::start(program.args(["pull", "--daemon", "-c"]).arg(config));
    for (size, result, next) in [("1000000000000000", "deferred", true), ("10", "done", false)] {
        let script = [format!("MAIL FROM:<eva@example.net> SIZE={size}"), "RSET".to_owned()];
        play_call(&listener.accept().unwrap().0, &words(&script));
        let call = daemon.wait_for("event=call ");
        assert!(call.ends_with(&format!(" result={result}")), "{call}");
        daemon.wait_for("event=next-call ");
        listener.set_nonblocking(true).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        assert!(listener.accept().is_err(), "the daemon called again at once");
        listener.set_nonblocking(!next).unwrap();
    }
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.exit_code(), Some(0));
}

#[test]
fn a_call_without_mail_is_a_success_and_silent() {
    let call = Place::new(ALICE).pull(&["-q"], "", &[]);
    assert_eq!((call.code, call.out.as_str(), call.error.as_str()), (0, "", ""));
}

/// A call within the provider's `min-interval`: the record of the last call stays. A script may try again (exit code 75).
#[test]
fn a_call_that_comes_too_soon_is_not_a_failure_for_the_daemon_and_the_status() {
    let place = Place::new(&format!("{ALICE}[schedule]\nevery = \"1h\"\nretry-first = \"1s\"\njitter = \"none\"\n"));
    let (done, _) = pull_in_calls(&place, &[]);
    assert_eq!(done.status.code(), Some(0));
    let record = place.0.path().join("mailboxes/.odmr");
    let read = || {
        let files = fs::read_dir(&record).unwrap().map(|file| file.unwrap().path());
        let file = files.into_iter().find(|path| path.file_name().unwrap().as_encoded_bytes().starts_with(b"last-"));
        fs::read_to_string(file.unwrap()).unwrap()
    };
    let before = read();
    assert!(before.contains("result=no-mail"), "{before}");

    const TOO_SOON: &str = "450 4.7.0 Your last call has brought no mail: call again in 42 seconds\r\n";
    let (done, count) = pull_in_calls(&place, &[(TOO_SOON, Vec::new())]);
    let error = String::from_utf8(done.stderr).unwrap();
    assert_eq!((done.status.code(), count), (Some(75), 1), "{error}");
    assert!(error.contains("call again in 42 seconds") && error.contains(" result=too-soon"), "{error}");

    // `-q` prints nothing, because cron would mail it.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut quiet = Command::new(env!("CARGO_BIN_EXE_odmr"));
    quiet.args(["pull", "-q", "-c"]).arg(place.configure(&listener)).env_remove("RUST_LOG");
    let quiet = quiet.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    play_atrn(&listener.accept().unwrap().0, TOO_SOON, &[]);
    let done = quiet.wait_with_output().unwrap();
    assert_eq!((done.status.code(), &done.stdout[..], &done.stderr[..]), (Some(75), &b""[..], &b""[..]));

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut program = Command::new(env!("CARGO_BIN_EXE_odmr"));
    let config = place.configure(&listener);
    let mut daemon = Running::start(program.args(["pull", "--daemon", "-c"]).arg(config));
    play_atrn(&listener.accept().unwrap().0, TOO_SOON, &[]);
    let call = daemon.wait_for("event=call-skipped ");
    assert!(call.contains("call again in 42 seconds"), "{call}");
    let next = daemon.wait_for("event=next-call ");
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.exit_code(), Some(0));
    assert_eq!(read(), before, "{next}");
}

const NO_COUNT: &str = "250 2.0.0 OK now reversing the connection\r\n";

/// Calls a provider that plays these calls, each with the reply to ATRN and the script after it. If there is one more call, it
/// replies 453. Returns the output, and how many calls there were.
fn pull_in_calls(place: &Place, calls: &[(&str, Vec<String>)]) -> (std::process::Output, usize) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut odmr = Command::new(env!("CARGO_BIN_EXE_odmr"));
    odmr.args(["pull", "-c"]).arg(place.configure(&listener)).env_remove("RUST_LOG");
    let mut child = odmr.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut count = 0;
    while child.try_wait().unwrap().is_none() {
        let Ok((stream, _)) = listener.accept() else {
            std::thread::sleep(Duration::from_millis(2));
            continue;
        };
        stream.set_nonblocking(false).unwrap();
        match calls.get(count) {
            Some((atrn, script)) => play_atrn(&stream, atrn, &words(script)),
            None => play_atrn(&stream, "453 You have no mail\r\n", &[]),
        };
        count += 1;
    }
    (child.wait_with_output().unwrap(), count)
}

/// Exim under TLS sends one message in each call.
#[test]
fn a_call_that_has_brought_mail_is_followed_by_the_next_at_once() {
    let one = |number: usize| (NO_COUNT, message(&format!("m{number}@example.net"), "alice@example.org").to_vec());
    for (messages, expected) in [(3, 4), (99, 100), (120, 100)] {
        let place = Place::new(ALICE);
        let calls: Vec<_> = (0..messages).map(one).collect();
        let (done, count) = pull_in_calls(&place, &calls);
        let (out, error) = (String::from_utf8(done.stdout).unwrap(), String::from_utf8(done.stderr).unwrap());
        assert_eq!((done.status.code(), count), (Some(0), expected), "{error}");
        assert!(out.starts_with(&format!("{} messages, ", messages.min(100))), "{out}");
        let new = place.0.path().join("mailboxes/example.org/alice/new");
        assert_eq!(fs::read_dir(new).unwrap().count(), messages.min(100));
        assert_eq!(error.contains("event=not-called-again "), messages > 100, "{error}");
        assert!(error.contains(&format!(" received={} ", messages.min(100))), "{error}");
    }
}

/// Each case: what the provider sends in the second call, how many messages and calls there are, and the reason of the end.
#[test]
fn no_further_call_follows_one_that_brings_nothing_new() {
    let message = |name: &str| message(&format!("{name}@example.net"), "alice@example.org").to_vec();
    let again = "it sends again what was accepted: it does not read our replies";
    for (second, messages, calls, reason) in [
        ((NO_COUNT, message("one")), 2, 2, again),
        ((NO_COUNT, [message("one"), message("two")].concat()), 3, 3, ""),
        ((NO_COUNT, Vec::new()), 1, 2, ""),
        (("250 turning, 1 message\r\n", message("two")), 2, 2, ""),
        (("250 turning, 2 messages\r\n", message("two")), 2, 3, ""),
        (("450 4.7.1 Not so fast\r\n", Vec::new()), 1, 2, "ATRN was rejected: 450 4.7.1 Not so fast"),
        (("451 4.3.0 Not now\r\n", Vec::new()), 1, 2, "ATRN was rejected: 451 4.3.0 Not now"),
    ] {
        let place = Place::new(ALICE);
        let (done, count) = pull_in_calls(&place, &[(NO_COUNT, message("one")), second]);
        let (out, error) = (String::from_utf8(done.stdout).unwrap(), String::from_utf8(done.stderr).unwrap());
        assert_eq!((done.status.code(), count), (Some(0), calls), "{error}");
        assert!(out.starts_with(&format!("{messages} message{}, ", if messages == 1 { "" } else { "s" })), "{out}");
        assert_eq!(error.contains("event=not-called-again "), !reason.is_empty(), "{error}");
        assert!(error.contains(reason), "{error}");
    }
}

/// The exit codes and texts of the dialogues in `testdata/customer/exim`.
#[test]
fn a_turn_that_brings_no_mail_has_a_reason() {
    let tls_record = "odmr: the provider sent a TLS record in place of a message, that is TLS inside TLS; if it is Exim, its \
                transport needs `hosts_nopass_tls = *`\n";
    let closed = "odmr: the provider closed the turned connection without a command: its mail may not be due yet\n";
    let early = "odmr: the provider sent octets after its 250 and before our greeting (RFC 2645 section 5.3)\n";
    for (octets, code, text) in [
        (&b"250 turning\r\nQUIT\r\n"[..], 0, ""),
        (b"250 turning\r\nQUIT\r\nNOOP\r\n", 76, early),
        (b"250 turning\r\nEHLO x\r\n", 76, early),
        (b"250 turning\r\n", 75, closed),
        (b"250 turning\r\n\x17\x03\x03\0\x20xx\r\n", 76, tls_record),
    ] {
        let place = Place::new(ALICE);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut odmr = Command::new(env!("CARGO_BIN_EXE_odmr"));
        odmr.args(["pull", "-q", "-c"]).arg(place.configure(&listener)).env_remove("RUST_LOG");
        let done = std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                let (turning, rest) = octets.split_at(b"250 turning\r\n".len());
                // The TLS record is sent after the customer's greeting, all else with the reply to ATRN.
                let early = if rest.starts_with(b"\x17") { turning } else { octets };
                let _ = std::str::from_utf8(early).map(|early| play_until_atrn(&stream, early));
                let _ = stream.write_all(&octets[early.len()..]);
                let _ = stream.shutdown(std::net::Shutdown::Write);
                let _ = std::io::copy(&mut stream, &mut std::io::sink());
            });
            odmr.output().unwrap()
        });
        let error = String::from_utf8(done.stderr).unwrap();
        assert_eq!((done.status.code(), error.as_str()), (Some(code), text), "{octets:?}");
    }
}

/// Plays the provider up to its reply to ATRN. If `atrn` is only the reply, it waits for the greeting.
fn play_until_atrn(mut stream: &TcpStream, atrn: &str) {
    let mut reader = BufReader::new(stream);
    let mut line = || reader.read_line(&mut String::new());
    for reply in [
        "220 relay.example.net\r\n",
        "250-relay.example.net\r\n250-AUTH CRAM-MD5\r\n250 ATRN\r\n",
        "334 PDE4OTYuNjk3MTcwOTUyQHBvc3RvZmZpY2UucmVzdG9uLm1jaS5uZXQ+\r\n",
        "235 2.7.0 OK\r\n",
        atrn,
    ] {
        stream.write_all(reply.as_bytes()).unwrap();
        if reply.lines().count() == 1 || reply != atrn {
            let _ = line();
        }
    }
}
