//! `odmr send` and the listener of `odmr pull --daemon`, as programs use them: replies, exit codes, and the files that are
//! created.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;

use crate::running::Running;

pub const CUSTOMER: &str = r#"hostname = "mail.example.org"

[provider]
address = "127.0.0.1:1"
tls = "none"
name = "acme"
secret = "tanstaaftanstaaf"

[mailboxes]
root = "mailboxes"
accept = ["alice@example.org", "bob@example.org"]

[limits]
received-hops = 3
"#;

pub const OUTGOING: &str = "[outgoing]\nqueue = \"outgoing\"\nmax-size = 70000\nlisten = [\"127.0.0.1:0\"]\n";

/// A directory with the configuration, the queue and the mailboxes of one customer.
pub struct TestCustomer(pub tempfile::TempDir);

/// The result of one run of the program.
pub struct RunResult {
    pub code: i32,
    pub out: String,
    pub error: String,
}

impl TestCustomer {
    fn new() -> TestCustomer {
        TestCustomer::with(&format!("{CUSTOMER}{OUTGOING}"))
    }

    pub fn with(config: &str) -> TestCustomer {
        let customer = TestCustomer(tempfile::tempdir().unwrap());
        fs::write(customer.config(), config).unwrap();
        fs::set_permissions(customer.config(), fs::Permissions::from_mode(0o600)).unwrap();
        customer
    }

    pub fn config(&self) -> PathBuf {
        self.0.path().join("customer.toml")
    }

    fn send(&self, words: &[&str], input: &str) -> RunResult {
        self.run(Path::new(env!("CARGO_BIN_EXE_odmr")), &[&["send"], words].concat(), input)
    }

    fn run(&self, program: &Path, words: &[&str], input: &str) -> RunResult {
        self.finish(Command::new(program).args(words), input)
    }

    /// Runs a command with this customer's configuration up to its end.
    pub fn finish(&self, command: &mut Command, input: &str) -> RunResult {
        let mut child = command
            .env("ODMR_CONFIG", self.config())
            .env_remove("RUST_LOG")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // The program may exit before it has read all of its input.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        let output = child.wait_with_output().unwrap();
        let text = |octets: Vec<u8>| String::from_utf8(octets).unwrap();
        RunResult { code: output.status.code().unwrap(), out: text(output.stdout), error: text(output.stderr) }
    }

    /// The messages in a Maildir.
    pub fn messages(&self, maildir: &str) -> Vec<String> {
        let Ok(files) = fs::read_dir(self.0.path().join(maildir).join("new")) else { return Vec::new() };
        let mut paths: Vec<_> = files.map(|file| file.unwrap().path()).collect();
        paths.sort();
        paths.iter().map(|path| String::from_utf8_lossy(&fs::read(path).unwrap()).into_owned()).collect()
    }

    pub fn queued(&self) -> Vec<String> {
        self.messages("outgoing")
    }

    /// The only message in the outgoing queue.
    pub fn only_queued(&self) -> String {
        let mut queued = self.queued();
        assert_eq!(queued.len(), 1, "{queued:?}");
        queued.remove(0)
    }
}

pub fn assert_contains(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in\n{text}");
    }
}

/// If one of the customer's own mailboxes is full, only its copy waits.
#[test]
fn a_full_mailbox_does_not_delay_other_recipients() {
    let customer = TestCustomer::new();
    let alice = customer.0.path().join("mailboxes/example.org/alice");
    ["tmp", "new", "cur"].iter().for_each(|name| fs::create_dir_all(alice.join(name)).unwrap());
    fs::write(alice.join("cur/1.x.host,S=5:2,S"), "12345").unwrap();
    // The quota leaves room for four octets.
    fs::write(alice.join("maildirsize"), "9S\n5 1\n").unwrap();
    let words = ["-f", "bob@example.org", "alice@example.org", "bob@example.org", "eva@example.net"];
    let sent = customer.send(&words, "Subject: x\n\nx\n");
    assert_eq!(sent.code, 0, "{}", sent.error);
    assert_eq!(customer.messages("mailboxes/example.org/bob").len(), 1);
    assert!(customer.messages("mailboxes/example.org/alice").is_empty());
    assert_eq!(customer.messages("outgoing").len(), 1);
    let [queued] = &customer.messages("mailboxes/.handover")[..] else { panic!("not one message waits") };
    assert!(queued.contains("\nDelivered-To: alice@example.org\n") && !queued.contains("bob@example.org\nX-O"));
}

/// Mail submitted for an alias is discarded, deferred, or queued as outgoing mail, for each recipient once.
#[test]
fn aliases_lead_to_dev_null_and_elsewhere() {
    let config = CUSTOMER.replace("[limits]", "alias-file = \"aliases\"\n[limits]");
    let customer = TestCustomer::with(&format!("{config}{OUTGOING}"));
    let aliases = "noreply: /dev/null\nlist: alice, \"|/bin/prog\"\nboth: alice, Eva@w.example\nfar: Eva@w.example\n";
    fs::write(customer.0.path().join("aliases"), aliases).unwrap();
    let send = |to: &[&str]| {
        let sent = customer.send(&[&["-f", "bob@example.org"], to].concat(), "Subject: x\n\nx\n");
        (sent.code, sent.error)
    };
    assert_eq!(send(&["noreply"]), (0, String::new()));
    assert!(customer.queued().is_empty() && !customer.0.path().join("mailboxes/example.org").exists());
    // A message is queued for all recipients or for none.
    let (code, error) = send(&["alice", "list", "far"]);
    assert_eq!(code, 75, "{error}");
    assert_contains(&error, &["<list@example.org>: The alias for that address has a target that is not served"]);
    assert!(customer.queued().is_empty() && customer.messages("mailboxes/example.org/alice").is_empty());
    assert_eq!(send(&["both", "far", "noreply", "Eva@w.example", "eva@w.example"]), (0, String::new()));
    assert_eq!(customer.messages("mailboxes/example.org/alice").len(), 1);
    assert_contains(
        &customer.only_queued(),
        &[
            "Return-Path: <bob@example.org>\nDelivered-To: Eva@w.example\nDelivered-To: eva@w.example\nX-ODMR-Envelope: ",
        ],
    );
    let session = customer.send(
        &["-bs"],
        "EHLO c\r\nMAIL FROM:<bob@example.org>\r\nRCPT TO:<list@example.org>\r\nRCPT TO:<far@example.org>\r\n\
         RCPT TO:<noreply@example.org>\r\nDATA\r\nSubject: y\r\n.\r\nQUIT\r\n",
    );
    assert_contains(&session.out, &["\r\n451 4.3.5 ", "\r\n250 2.1.5 ", "\r\n250 2.6.0 "]);
    assert_eq!(customer.queued().len(), 2);
    assert!(customer.messages("mailboxes/.handover").is_empty());
}

#[test]
fn missing_header_fields_are_added() {
    let customer = TestCustomer::new();
    let sent =
        customer.send(&["-f", "eva", "-F", "Eva E.", "dave@example.net"], "Subject: hello\n\nHello.\n.\nnot this\n");
    assert_eq!((sent.code, sent.error.as_str()), (0, ""));
    let message = customer.only_queued();
    assert_contains(
        &message,
        &[
            "Return-Path: <eva@example.org>\nDelivered-To: dave@example.net\nX-ODMR-Envelope: id=",
            "; body=7BIT\nReceived: by mail.example.org (odmr, from uid ",
            "\nSubject: hello\nFrom: \"Eva E.\" <eva@example.org>\nDate: ",
            "\nMessage-ID: <",
            "@mail.example.org>\n\nHello.\n",
        ],
    );
    assert!(!message.contains("not this"));
}

/// Headers as cron, a web application, and a program that reads an mbox write them.
#[test]
fn a_submitted_header_is_completed() {
    let customer = TestCustomer::new();
    let input = ">From eva Fri Jan  2 03:04:05 2026\nFrom eva Fri Jan  2 03:04:05 2026\nReturn-Path: <old@x.example>\n\
                 X-ODMR-Envelope: id=forged\nContent-Length: 7\nFrom: root (Cron Dämon)\nTo: ops@example.net, root\n\
                 Subject: Prüfung\nX-Note: root\n\nFrom here\nReturn-Path: body\n";
    let marked = format!("\u{feff}{input}");
    for input in [input.to_owned(), input.replace('\n', "\r\n"), input.replace('\n', "\r\r\n"), marked] {
        let customer = TestCustomer::new();
        let sent = customer.send(&["-i", "-f", "<>", "ops@example.net"], &input);
        assert_eq!((sent.code, sent.error.as_str()), (0, ""));
        let message = customer.only_queued();
        assert_contains(
            &message,
            &[
                "+0000\nFrom: root@example.org (Cron =?UTF-8?B?RMOkbW9u?=)\nTo: ops@example.net, root@example.org\n\
                 Subject: =?UTF-8?B?UHLDvGZ1bmc=?=\nX-Note: root\nDate: ",
                "\n\nFrom here\nReturn-Path: body\n",
            ],
        );
        assert!(!message.contains("forged") && !message.contains("old@x") && !message.contains("Content-Length"));
    }
    // A signed header is not changed, except that records of the queue are removed.
    let sent = customer.send(&["-i", "ops@example.net"], &input.replace("X-Note: root", "DKIM-Signature: v=1"));
    assert_eq!((sent.code, sent.error.as_str()), (0, ""));
    let message = customer.only_queued();
    let signed =
        "+0000\nContent-Length: 7\nFrom: root (Cron Dämon)\nTo: ops@example.net, root\nSubject: Prüfung\nDKIM-";
    assert_contains(&message, &[signed, "; body=8BITMIME\n"]);
}

/// Rules: SUB-07.
#[test]
fn a_header_submitted_by_smtp_is_completed() {
    let customer = TestCustomer::new();
    let dialogue = [
        "EHLO client",
        "MAIL FROM:<eva@example.org> SMTPUTF8",
        "RCPT TO:<dave@example.net>",
        "DATA",
        "Return-Path: <old@x.example>",
        "From: \"Eva Ö.\" <eva>",
        "Bcc: joe",
        "Content-Length: 7",
        "",
        "Hello.",
        ".",
        "MAIL FROM:<eva@example.org>",
        "RCPT TO:<alice@example.org>",
        "DATA",
        "Subject: a CR too many\r",
        "",
        "Hello.",
        ".",
        "QUIT",
        "",
    ];
    let session = customer.send(&["-bs"], &dialogue.join("\r\n"));
    assert_eq!((session.code, session.error.as_str()), (0, ""));
    let message = customer.only_queued();
    assert_contains(&message, &["+0000\nFrom: =?UTF-8?B?RXZhIMOWLg==?= <eva@example.org>\nBcc: joe@example.org\n"]);
    assert_contains(&message, &["Date: ", "Message-ID: <", "@mail.example.org>\n\nHello.\n"]);
    // RFC 5321 section 2.3.8: in SMTP a bare CR is an error, even before CRLF.
    assert_contains(&session.out, &["\r\n554 5.6.0"]);
    assert!(customer.messages("mailboxes/example.org/alice").is_empty());
}

#[test]
fn recipients_of_header_and_command_line_get_one_copy_without_bcc() {
    let customer = TestCustomer::new();
    let header = "From: a@b.example\nDate: x\nMessage-ID: <1@x>\nTo: Dave <dave@example.net>,\n erin@example.net\n\
                  Bcc: frank@example.net\nCc: dave@example.net\n\n";
    let sent = customer.send(&["-ti", "-f", "<>", "grace@example.net"], &format!("{header}.\nHello.\n"));
    assert_eq!((sent.code, sent.error.as_str()), (0, ""));
    let message = customer.only_queued();
    assert_contains(
        &message,
        &[
            "Return-Path: <>\n",
            "\nTo: Dave <dave@example.net>,\n erin@example.net\nCc: dave@example.net\n\n.\nHello.\n",
        ],
    );
    let to: Vec<_> = message.lines().filter_map(|line| line.strip_prefix("Delivered-To: ")).collect();
    assert_eq!(to, ["grace@example.net", "dave@example.net", "erin@example.net", "frank@example.net"]);
    assert!(!message.contains("Bcc"));
}

#[test]
fn the_envelope_records_body_type_smtputf8_and_dsn_options() {
    let customer = TestCustomer::new();
    let check = |words: &[&str], input: &str, parts: &[&str]| {
        let sent = customer.send(words, input);
        assert_eq!((sent.code, sent.error.as_str()), (0, ""), "{words:?}");
        assert_contains(&customer.queued().concat(), parts);
    };
    check(&["d@x.example"], "Subject: x\r\n\r\nGrüße\r\n", &["; body=8BITMIME\n", "\nSubject: x\n", "\n\nGrüße\n"]);
    // A Subject beyond ASCII is encoded, and needs no extension. An address beyond ASCII needs SMTPUTF8.
    check(&["e@x.example"], "Subject: Grüße\n\n1%\r2%\r\n", &[": e@x.example\n", "; body=7BIT\n", "\n\n1%\n2%\n"]);
    check(
        &["f@x.example"],
        "From: <jürgen@x.example>\n\nx\n",
        &["; body=8BITMIME; smtputf8\n", "\nFrom: <jürgen@x.ex"],
    );
    check(&["zoë@x.example"], "Subject: x\n\n", &["Delivered-To: zoë@x.example\n", "; body=7BIT; smtputf8\n"]);
    check(
        &["-N", "success,delay", "-R", "hdrs", "-V", "QQ+2B1", "d@x.example"],
        "Subject: x\n\n",
        &["X-ODMR-Recipient: NOTIFY=success,delay\n", "; ret=HDRS; envid=QQ+2B1\n"],
    );
    // Addresses elsewhere are not changed.
    check(
        &["-f", "Cron@My_Host.example", "taro..y@Phone.example", "\"joe\"@b\u{fc}cher.example"],
        "Subject: x\n\n",
        &[
            "Return-Path: <Cron@My_Host.example>\nDelivered-To: taro..y@Phone.example\n\
             Delivered-To: \"joe\"@b\u{fc}cher.example\n",
            "; body=7BIT\n",
        ],
    );
    // A header without SMTPUTF8 has A-labels, and quotes where RFC 5322 needs them.
    check(
        &["-f", "eva..e@b\u{fc}cher.example", "d@x.example"],
        "Subject: x\n\n",
        &["Return-Path: <eva..e@b\u{fc}cher.example>\n", "; body=7BIT\n", "<\"eva..e\"@xn--bcher-kva.example>\n"],
    );
    check(&["-oi", "-oem", "-odb", "-O", "x=y", "-B8BITMIME", "d@x.example"], "Subject: v\n\n", &["\nSubject: v\n"])
}

#[test]
fn mail_for_the_customers_own_domains_is_delivered_at_once() {
    let customer = TestCustomer::new();
    let sent = customer.send(&["-f", "alice", "bob", "dave@example.net"], "Subject: hello\n\nHello.\n");
    assert_eq!((sent.code, sent.error.as_str()), (0, ""));
    assert_contains(&customer.only_queued(), &["Delivered-To: dave@example.net\n"]);
    let local = customer.messages("mailboxes/example.org/bob");
    assert_contains(
        &local[0],
        &["Return-Path: <alice@example.org>\nDelivered-To: bob@example.org\nReceived: ", "\n\nHello.\n"],
    );
}

#[test]
fn each_error_has_its_exit_code_and_one_line_and_queues_nothing() {
    let customer = TestCustomer::new();
    let long = "x".repeat(70) + "\n";
    let check = |code: i32, words: &[&str], input: &str, part: &str| {
        let sent = customer.send(words, input);
        assert_eq!(sent.code, code, "{words:?}: {}", sent.error);
        assert_eq!(sent.error.lines().count(), 1, "{words:?}: {}", sent.error);
        assert_contains(&sent.error, &["odmr: ", part]);
    };
    check(64, &[], "Subject: x\n\n", "no recipient");
    check(64, &["-Z"], "", "Z");
    check(64, &["-bd"], "", "-bd");
    check(64, &["-N", "sometimes", "d@x.example"], "", "-N");
    check(64, &["-R", "some", "d@x.example"], "", "-R");
    check(64, &["-V", "a b", "d@x.example"], "", "-V");
    check(65, &["d@x.example", "not an address"], "", "not an address");
    check(65, &["d@x.example", ""], "", "");
    check(65, &["-f", "a@b@c", "d@x.example"], "", "a@b@c");
    check(65, &["-f", "a@b.example, c@d.example", "d@x.example"], "", "one address");
    check(65, &["-t"], "Subject: x\n\nTo: d@x.example\n", "no recipient");
    check(65, &["-t"], "To: d@x.example, <broken\n\n", "To");
    check(65, &["dave@[192.0.2.1]"], "", "192.0.2.1");
    check(65, &["dave@b\u{fc}\u{200c}cher.example"], "", "IDNA");
    check(65, &["-t"], "To: dave@b\u{fffd}cher.example\n\n", "not in UTF-8");
    check(65, &["dave@localhost"], "", "localhost");
    check(67, &["d@x.example", "nobody@example.org"], "", "nobody@example.org");
    check(69, &["d@x.example"], &long.repeat(1000), "70000");
    check(69, &["d@x.example"], &format!("{}\n", "Received: x\n".repeat(4)), "hops");
    check(78, &["-C", "/nowhere/customer.toml", "d@x.example"], "", "/nowhere/customer.toml");
    assert!(customer.queued().is_empty());
    assert!(customer.messages("mailboxes/example.org/alice").is_empty());
    let tmp = fs::read_dir(customer.0.path().join("outgoing/tmp"));
    assert!(tmp.into_iter().flatten().next().is_none(), "a file is left in tmp");

    let without_queue = TestCustomer::with(CUSTOMER);
    let sent = without_queue.send(&["d@x.example"], "Subject: x\n\n");
    assert_eq!(sent.code, 78);
    assert_contains(&sent.error, &["[outgoing]"]);

    let blocked = TestCustomer::new();
    fs::write(blocked.0.path().join("outgoing"), "in the way").unwrap();
    assert_eq!(blocked.send(&["d@x.example"], "Subject: x\n\n").code, 73);
}

#[test]
fn the_program_also_runs_under_the_name_sendmail() {
    let customer = TestCustomer::new();
    let program = customer.0.path().join("sendmail");
    symlink(env!("CARGO_BIN_EXE_odmr"), &program).unwrap();
    let sent = customer.run(&program, &["-oi", "-t"], "To: dave@example.net\n\nHello.\n");
    assert_eq!((sent.code, sent.error.as_str()), (0, ""));
    customer.only_queued();
    let wrong = customer.run(&program, &[], "");
    assert_eq!(wrong.code, 64);
    assert_contains(&wrong.error, &["sendmail: "]);
}

#[test]
fn the_queue_is_listed() {
    let customer = TestCustomer::new();
    assert_eq!(customer.send(&["-bp"], "").out, "Mail queue is empty\n");
    customer.send(&["-f", "eva", "dave@example.net", "erin@example.net"], "Subject: x\n\nHello.\n");
    let listed = customer.send(&["-bp"], "");
    assert_eq!((listed.code, listed.error.as_str()), (0, ""));
    assert_contains(
        &listed.out,
        &[" <eva@example.org>\n", " dave@example.net\n", " erin@example.net\n", "with the next call", "1 message, "],
    );
}

#[test]
fn mail_for_next_hops_is_listed_too() {
    let deliver = "[mailboxes]\ndeliver = { \"bob@example.org\" = \"smtp:127.0.0.1:1\" }\n";
    for (outgoing, listed) in [(OUTGOING, 2), ("", 1)] {
        let customer = TestCustomer::with(&format!("{}{OUTGOING}", CUSTOMER.replace("[mailboxes]\n", deliver)));
        let sent = customer.send(&["-f", "eva", "dave@example.net", "bob"], "Subject: x\n\nHello.\n");
        assert_eq!((sent.code, sent.error.as_str()), (0, ""));
        let config = format!("{}{outgoing}", CUSTOMER.replace("[mailboxes]\n", deliver));
        fs::write(customer.config(), config).unwrap();
        let list = customer.send(&["-bp"], "");
        assert_eq!((list.code, list.error.as_str()), (0, ""));
        assert_contains(
            &list.out,
            &[
                " bob@example.org (next hop smtp:127.0.0.1:1)\n",
                &format!("{listed} message{}, ", if listed == 1 { "" } else { "s" }),
            ],
        );
        assert_eq!(list.out.contains(" dave@example.net\n"), !outgoing.is_empty());
    }
}

#[test]
fn the_program_has_the_other_names_of_sendmail() {
    let customer = TestCustomer::with(&CUSTOMER.replace(
        "[mailboxes]\n",
        "[mailboxes]\nalias-file = \"aliases\"\naliases = { \"info@example.org\" = \"alice@example.org\" }\n",
    ));
    let named = |name: &str, words: &[&str]| {
        let program = customer.0.path().join(name);
        let _ = symlink(env!("CARGO_BIN_EXE_odmr"), &program);
        customer.run(&program, words, "")
    };
    let aliases = customer.0.path().join("aliases");
    fs::write(&aliases, "postmaster: root\nroot: alice, bob\n").unwrap();
    for (name, words, output) in [
        ("mailq", &[][..], "Mail queue is empty\n"),
        ("mailq", &["-v"], "Mail queue is empty\n"),
        ("sendmail", &["-bp"], "Mail queue is empty\n"),
        ("newaliases", &[], "3 aliases, "),
        ("newaliases", &["-oA/etc/aliases"], "3 aliases, "),
        ("sendmail", &["-bi"], "3 aliases, "),
        // No daemon runs.
        ("sendmail", &["-q"], ""),
        ("sendmail", &["-q30m"], ""),
    ] {
        let result = named(name, words);
        assert_eq!((result.code, result.error.as_str()), (0, ""), "{name} {words:?}");
        assert!(result.out.starts_with(output) && result.out.is_empty() == output.is_empty(), "{name}: {}", result.out);
    }
    assert!(!customer.0.path().join("mailboxes").exists(), "they create nothing");
    fs::write(&aliases, "postmaster: root\nroot: alice, no body\n").unwrap();
    let wrong = named("newaliases", &[]);
    assert_eq!((wrong.code, wrong.error.lines().count()), (78, 1));
    assert_contains(&wrong.error, &["newaliases: ", "aliases:2"]);
}

#[test]
fn smtp_on_stdin_and_stdout() {
    let customer = TestCustomer::new();
    let session = customer.send(
        &["-bs"],
        "EHLO client\r\nVRFY alice\r\nAUTH PLAIN\r\nSTARTTLS\r\nATRN\r\nMAIL FROM:<eva@example.org> RET=HDRS\r\n\
         RCPT TO:<nobody@example.org>\r\nRCPT TO:<dave@localhost>\r\nRCPT TO:<dave@example.net> NOTIFY=NEVER\r\nDATA\r\n\
         Subject: hello\r\n\r\nHello.\r\n.\r\nMAIL FROM:<> SIZE=70001\r\nQUIT\r\n",
    );
    assert_eq!((session.code, session.error.as_str()), (0, ""));
    let lines: Vec<_> = session.out.split("\r\n").collect();
    assert_eq!(lines[0], "220 mail.example.org ESMTP mail of this host's users");
    let extensions: Vec<_> = lines[1..9].iter().map(|line| &line[4..]).collect();
    let expected = [
        "mail.example.org",
        "PIPELINING",
        "SIZE 70000",
        "8BITMIME",
        "SMTPUTF8",
        "ENHANCEDSTATUSCODES",
        "LIMITS RCPTMAX=100",
        "CHUNKING",
    ];
    assert_eq!(extensions, expected);
    assert_eq!(lines[9], "250 DSN");
    let codes: Vec<_> = lines[10..].iter().filter_map(|line| line.get(..9)).collect();
    let expected = [
        "252 2.0.0",
        "502 5.5.1",
        "502 5.5.1",
        "502 5.5.1",
        "250 2.1.0",
        "550 5.1.1",
        "554 5.1.2",
        "250 2.1.5",
        "354 Go ah",
        "250 2.6.0",
        "552 5.3.4",
        "221 2.0.0",
    ];
    assert_eq!(codes, expected);
    assert_contains(
        &customer.only_queued(),
        &[
            "Delivered-To: dave@example.net\nX-ODMR-Recipient: NOTIFY=NEVER\n",
            "; ret=HDRS\nReceived: from client (uid ",
            "\tby mail.example.org with ESMTP\n",
            "\nSubject: hello\nDate: ",
        ],
    );
}

fn connect(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream
}

/// Each call fails, because no provider listens.
#[test]
fn the_daemon_accepts_mail_calls_and_ends_at_sigterm() {
    let customer = TestCustomer::new();
    let mut program = Command::new(env!("CARGO_BIN_EXE_odmr"));
    let mut daemon = Running::start(program.args(["pull", "--daemon", "-c"]).arg(customer.config()));
    let address = daemon.listening("local");
    daemon.wait_for("event=call-failed");
    // `-q` makes the daemon call.
    assert_eq!((customer.send(&["-q"], "").code, customer.send(&["-q"], "").error.as_str()), (0, ""));
    daemon.wait_for("event=call-failed");
    let mut stream = connect(&address);
    let dialogue = "EHLO client\r\nMAIL FROM:<eva@example.org>\r\nRCPT TO:<dave@example.net>\r\nDATA\r\n\
                    Subject: hello\r\n.\r\nQUIT\r\n";
    stream.write_all(dialogue.as_bytes()).unwrap();
    let mut replies = String::new();
    stream.read_to_string(&mut replies).unwrap();
    assert_contains(&replies, &["220 mail.example.org ", "\r\n250 2.6.0 OK, id=", "\r\n221 2.0.0 "]);
    assert_contains(
        &customer.only_queued(),
        &["Received: from client ([127.0.0.1])\n\tby mail.example.org with ESMTP\n"],
    );

    let idle = connect(&address);
    let mut greeting = String::new();
    let mut idle = BufReader::new(idle);
    idle.read_line(&mut greeting).unwrap();
    daemon.signal(Signal::TERM);
    let mut reply = String::new();
    idle.read_line(&mut reply).unwrap();
    assert!(reply.starts_with("421 4.3.2"), "{reply}");
    assert_eq!(daemon.exit_code(), Some(0));
}
