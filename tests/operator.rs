//! `odmr status`, `odmr queue` and `odmr expire`, with the files of either side.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use crate::running::Running;

const PROVIDER: &str = "hostname = \"relay.example.net\"\nspool = \"spool\"\ncustomers = \"customers.d\"\n[inbound]\n\
                        listen = [\"127.0.0.1:0\"]\n[odmr]\nlisten = [\"127.0.0.1:0\"]\nrequire-tls = false\n[relay]\n\
                        resolver = \"127.0.0.1:1\"\n";

const CUSTOMER: &str = "hostname = \"mail.example.org\"\n[provider]\naddress = \"127.0.0.1:1\"\ntls = \"none\"\n\
                        name = \"acme\"\nsecret = \"tanstaaftanstaaf\"\n[mailboxes]\nroot = \"mailboxes\"\n\
                        accept = [\"alice@example.org\"]\n[outgoing]\nqueue = \"outgoing\"\n";

/// A message with all parameters and two recipients, of whom one has it.
const LARGE: &str = "Return-Path: <bob@w.example>\nDelivered-To: alice@example.org\nX-ODMR-Recipient: NOTIFY=FAILURE,DELAY \
                     ORCPT=rfc822;alice@example.org\nDelivered-To: eva\u{6}example.org\nX-ODMR-Envelope: id=1large; \
                     arrived=2026-11-20T03:04:05Z; body=8BITMIME; ret=HDRS; envid=a+20b\n";
const LARGE_CONTENT: &str = "Received: from w.example by relay.example.net id 1large; now\nSubject: \u{e4}\u{1b}[2J\n\n\
                             .\n..two\nlast\n";
/// A message that another agent has delivered, without a size in the file's name.
const FOREIGN: &str = "Return-Path: <>\nDelivered-To: alice@example.org\nSubject: dsn\n\nbody";

/// A directory with the files of one side.
struct Place(tempfile::TempDir);

struct Done {
    code: i32,
    out: String,
    error: String,
}

impl Place {
    fn new(config: &str) -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        place.write("odmr.toml", config);
        fs::create_dir(place.path("customers.d")).unwrap();
        // The messages below are old, and must not expire.
        place.expire_after("never");
        place
    }

    fn expire_after(&self, time: &str) {
        let text = format!("domains = [\"example.org\"]\nsecret = \"tanstaaftanstaaf\"\nexpire-after = \"{time}\"\n");
        self.write("customers.d/acme.toml", &text);
    }

    /// A provider that holds [`LARGE`] and [`FOREIGN`].
    fn filled() -> Place {
        let place = Place::new(PROVIDER);
        let large = format!("{LARGE}{LARGE_CONTENT}");
        let name = format!("1763607845.M1P1.relay,S={},W=1,O=1763607900,A=2,L=450_4.2.1_mailbox_is_full", large.len());
        place.write(&format!("spool/domains/example.org/new/{name}"), &large);
        place.write("spool/domains/example.org/cur/1763607846.V1.other:2,F", FOREIGN);
        place.write("spool/domains/example.org/.refused/new/1763607847.x,S=10", "0123456789");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn run_with(&self, words: &[&str], input: &str) -> Done {
        let mut command = Command::new(env!("CARGO_BIN_EXE_odmr"));
        command.arg(words[0]).arg("-c").arg(self.path("odmr.toml")).args(&words[1..]).env_remove("RUST_LOG");
        let (stdin, stdout, stderr) = (Stdio::piped(), Stdio::piped(), Stdio::piped());
        let mut child = command.stdin(stdin).stdout(stdout).stderr(stderr).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let done = child.wait_with_output().unwrap();
        let text = |octets: Vec<u8>| String::from_utf8(octets).unwrap();
        Done { code: done.status.code().unwrap(), out: text(done.stdout), error: text(done.stderr) }
    }

    /// Runs the program, which must end with this exit code. Returns its output.
    fn run(&self, code: i32, words: &[&str]) -> String {
        let done = self.run_with(words, "");
        assert_eq!(done.code, code, "{words:?}: {}{}", done.out, done.error);
        if code == 0 { done.out } else { done.out + &done.error }
    }

    /// The files of the messages in a Maildir, by their unique names.
    fn files(&self, maildir: &str) -> BTreeMap<String, String> {
        let mut files = BTreeMap::new();
        for part in ["new", "cur"] {
            for entry in fs::read_dir(self.path(maildir).join(part)).into_iter().flatten() {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_str().unwrap().split([',', ':']).next().unwrap().to_owned();
                files.insert(name, fs::read_to_string(path).unwrap());
            }
        }
        files
    }
}

/// The value of a key in JSON that has the key once.
fn value<'a>(json: &'a str, key: &str) -> &'a str {
    let (_, rest) = json.split_once(&format!("\"{key}\": ")).unwrap_or_else(|| panic!("no {key} in {json}"));
    rest.split(['\n', ',']).next().unwrap()
}

/// A quota of which 90 % is used up is a warning. Imported messages count for the quota, but are not rejected because of it.
#[test]
fn a_quota_and_a_list_of_recipients_are_shown() {
    let place = Place::filled();
    let account = "domains = [\"example.org\", \"example.com\"]\nsecret = \"tanstaaftanstaaf\"\nmax-messages = 2\n\
                   max-bytes = \"1MiB\"\nrecipients-file = \"../list\"\n";
    place.write("customers.d/acme.toml", account);
    place.write("list", "");
    assert!(place.run(1, &["check"]).contains("has no address, and no mail would be accepted"));
    place.write("list", "alice@example.org\neva@example.org\n");
    let checked = place.run_with(&["check"], "");
    for text in [
        "acme.toml: 2 entries name the recipients, all others are rejected",
        "acme.toml: no recipient in example.com is listed",
    ] {
        assert!(checked.out.contains(text), "{}{}", checked.out, checked.error);
    }
    let text = place.run(0, &["status"]);
    assert!(text.contains(" of 1048576 octets, 2 of 2 messages\n    recipients: 2 entries\n"), "{text}");
    let warnings = place.run(1, &["status", "--warn", "300d"]);
    assert!(warnings.contains("acme: 100 % of its quota is used up: "), "{warnings}");
    let json = place.run(0, &["status", "--format", "json"]);
    for (key, expected) in [("quota_bytes", "1048576"), ("quota_messages", "2"), ("recipients", "2")] {
        assert_eq!(value(&json, key), expected, "{json}");
    }
    let metrics = place.run(0, &["status", "--format", "prometheus"]);
    for name in ["odmr_quota_bytes{account=\"acme\"} 1048576", "odmr_known_recipients{account=\"acme\"} 2"] {
        assert!(metrics.lines().any(|line| line == name), "{name}: {metrics}");
    }
    let batch =
        "EHLO a\r\nMAIL FROM:<a@b.example>\r\nRCPT TO:<bob@example.org>\r\nDATA\r\nSubject: x\r\n\r\nx\r\n.\r\n";
    let done = place.run_with(&["queue", "import"], batch);
    assert_eq!(done.code, 0, "{}{}", done.out, done.error);
    assert!(place.run(0, &["status"]).contains(" octets, 3 of 2 messages\n"));
}

#[test]
fn status_shows_held_mail_in_each_format() {
    let place = Place::filled();
    place.expire_after("14d");
    let text = place.run(0, &["status"]);
    let line = text.lines().find(|line| line.starts_with("acme ")).unwrap();
    let words: Vec<_> = line.split_whitespace().collect();
    let bytes = (LARGE.len() + LARGE_CONTENT.len() + FOREIGN.len()).to_string();
    assert_eq!((words[1], words[2], &words[4..8]), ("2", &*bytes, &["1", "1", "1", "never;"][..]), "{text}");
    assert!(line.ends_with("never; mail expires now"), "{text}");
    assert!(text.contains("1 × 450 4.2.1 mailbox is full"), "{text}");
    let json = place.run(0, &["status", "--format", "json", "example.org"]);
    let (accounts, rest) = json.split_once("\"unowned\"").unwrap();
    for (key, expected) in [
        ("account", "\"acme\""),
        ("bytes", &bytes),
        ("in_doubt", "1"),
        ("deferred", "1"),
        ("reply", "\"450 4.2.1 mailbox is full\""),
        ("oldest", "\"2025-11-20T03:04:05Z\""),
        ("set_aside", "1"),
        ("set_aside_bytes", "10"),
        ("last_call", "null"),
    ] {
        assert_eq!(value(accounts, key), expected, "{json}");
    }
    assert_eq!(value(rest, "certificate_until"), "null");
    let by_domain = place.run(0, &["status", "--format", "json", "--by", "domain"]);
    assert_eq!(value(&by_domain, "domain"), "\"example.org\"");
    let metrics = place.run(0, &["status", "--format", "prometheus"]);
    for line in [
        "odmr_queue_messages{account=\"acme\"} 2",
        "odmr_queue_oldest_timestamp_seconds{account=\"acme\"} 1763607845",
        "odmr_outgoing_messages 0",
        "# TYPE odmr_queue_bytes gauge",
        "# TYPE odmr_queue_next_expiry_timestamp_seconds gauge",
    ] {
        assert!(metrics.lines().any(|other| other == line), "{line} in {metrics}");
    }
    assert!(place.run(65, &["status", "nobody"]).contains("nobody is not an account or domain with mail here"));
    assert!(place.run(64, &["status", "--format", "xml"]).contains("not xml"));
    assert!(place.run(64, &["status", "a", "b"]).contains("\"b\""));
}

#[test]
fn warn_shows_only_what_an_administrator_must_act_on() {
    let place = Place::new(PROVIDER);
    assert_eq!(place.run(0, &["status", "--warn", "1h"]), "");
    assert!(place.run(0, &["status", "--warn", "1h", "--format", "json"]).contains("\"warnings\": []"));
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    place.write(&format!("spool/domains/example.org/new/{}.x", now - 7200), FOREIGN);
    assert_eq!(place.run(0, &["status", "--warn", "3h"]), "");
    let text = place.run(1, &["status", "--warn", "1h"]);
    assert!(text.starts_with("acme: 1 message waits, the oldest for 2h"), "{text}");
    // Mail of a customer that was removed, and rejected mail without a sender.
    place.write("spool/domains/old.example/new/1763607845.x", FOREIGN);
    place.write("spool/domains/example.org/.refused/new/1763607847.x", "x");
    let text = place.run(1, &["status", "--warn", "3h"]);
    assert!(text.contains("old.example: 1 message is held for it") && text.contains("acme: 1 message was rejected"));
    assert!(place.run(64, &["status", "--warn", "1"]).contains("--warn: \"1\" has no unit"));
    // Mail that has waited for more than half of the time after which it expires.
    for (expiry, near) in [("3h", true), ("5h", false), ("never", false)] {
        place.expire_after(expiry);
        let text = place.run(1, &["status", "--warn", "3h"]);
        assert_eq!(text.contains("acme: held mail expires in "), near, "{expiry}: {text}");
    }
}

/// Mail that is deferred although the customer's server rejects it, and recipients that the server does not know.
#[test]
fn status_shows_soft_bounces_and_learned_recipients() {
    let place = Place::new(PROVIDER);
    place.write(
        "customers.d/acme.toml",
        "domains = [\"example.org\", \"example.com\"]\nsecret = \"tanstaaftanstaaf\"\nrecipients = \"learn\"\n",
    );
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let day = 24 * 60 * 60;
    for (domain, days, reply) in [("org", 1, "554_5.7.1_no"), ("org", 2, "550_5.1.1_who"), ("com", 1, "554_5.3.0_no")] {
        let (arrived, rejected) = (now - days * day - 60, now - days * day);
        let name = format!("{arrived}.{days}x,O={rejected},A=3,R={rejected},L={reply}");
        place.write(&format!("spool/domains/example.{domain}/new/{name}"), FOREIGN);
    }
    let learned = format!("{} {now} eva@example.org\n{now} {now} bob@example.org\n", now - 3600);
    place.write("spool/.odmr/unknown-acme", &learned);
    let text = place.run(0, &["status"]);
    let soft = "3 rejected by its server, and deferred, since 2d ago: 550 5.1.1 who";
    let learned = "1 recipient is rejected: its server does not know it";
    assert!(text.contains(soft) && text.contains(learned), "{text}");
    let json = place.run(0, &["status", "--format", "json"]);
    for (key, expected) in
        [("soft_bounced", "3"), ("soft_bounced_reply", "\"550 5.1.1 who\""), ("learned_recipients", "1")]
    {
        assert_eq!(value(json.split("\"unowned\"").next().unwrap(), key), expected, "{json}");
    }
    let metrics = place.run(0, &["status", "--format", "prometheus"]);
    for line in ["odmr_queue_soft_bounced_messages{account=\"acme\"} 3", "odmr_learned_recipients{account=\"acme\"} 1"]
    {
        assert!(metrics.lines().any(|other| other == line), "{line} in {metrics}");
    }
    let warned = place.run(1, &["status", "--warn", "30d"]);
    assert!(warned.starts_with(&format!("acme: {soft}")), "{warned}");
    assert!(place.run(0, &["queue", "show", &format!("{}.1x", now - day - 60)]).contains("first rejected: 20"));
}

/// `odmr expire` needs no `serve`, prints nothing to stdout, and leaves mail that is not old enough.
#[test]
fn expire_returns_mail_that_is_too_old() {
    let place = Place::new(PROVIDER);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let file = format!("spool/domains/example.org/new/{}.x", now - 7200);
    place.write(&file, &FOREIGN.replace("<>", "<bob@w.example>"));
    let path = place.path(&file);
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_modified(SystemTime::now() - Duration::from_secs(7200))
        .unwrap();
    for (expiry, left) in [("3h", true), ("never", true), ("2h", false)] {
        place.expire_after(expiry);
        let Done { out, error, .. } = place.run_with(&["check"], "");
        let text = "acme.toml: of the mail that is held for acme, 1 message is older than its `expire-after`: ";
        assert_eq!(format!("{out}{error}").contains(text), !left, "{out}{error}");
        let Done { code, out, error } = place.run_with(&["expire"], "");
        assert_eq!((code, out.as_str()), (0, ""), "{expiry}: {error}");
        assert_eq!((error.contains("status=expired"), path.exists()), (!left, left), "{expiry}: {error}");
    }
    assert_eq!(place.files("spool/outgoing/@all").len(), 1);
    assert!(place.run(64, &["expire", "example.org"]).contains("has no argument"));
}

#[test]
fn list_and_show_print_each_message() {
    let place = Place::filled();
    place.write("spool/domains/example.org/new/1763607848.bad", "Subject: nobody\n\n");
    let list = place.run(0, &["queue", "list"]);
    let [large, foreign, bad] = &list.lines().collect::<Vec<_>>()[..] else { panic!("{list}") };
    assert!(large.starts_with("id=1large queue=example.org age="), "{large}");
    let rest = "from=<bob@w.example> to=<alice@example.org> to=<eva@example.org>(done) attempts=2 \
                reply=\"450 4.2.1 mailbox is full\"";
    assert!(large.ends_with(rest), "{large}");
    assert!(foreign.ends_with(" from=<> to=<alice@example.org> attempts=0 in-doubt"), "{foreign}");
    assert!(bad.starts_with("id=1763607848.bad ") && bad.contains("not-mail=\"it names no recipient\""), "{bad}");
    assert!(place.run(65, &["queue", "list", "example.com"]).contains("example.com is not"));
    let shown = place.run(0, &["queue", "show", "1large"]);
    for line in [
        "from: <bob@w.example> BODY=8BITMIME RET=HDRS ENVID=a+20b",
        "to: <alice@example.org> open NOTIFY=FAILURE,DELAY ORCPT=rfc822;alice@example.org",
        "to: <eva@example.org> done",
        "arrived: 2026-11-20T03:04:05Z",
        "first offered: 2025-11-20T03:05:00Z",
        "attempts: 2",
        // No escape sequence reaches the terminal.
        "Subject: \u{e4}?[2J",
    ] {
        assert!(shown.lines().any(|other| other == line), "{line} in {shown}");
    }
    assert!(!shown.contains("..two"), "{shown}");
    assert!(place.run(65, &["queue", "show", "nothing"]).contains("no message nothing waits here"));
    for (words, text) in [
        (&["queue"][..], "what to do is missing"),
        (&["queue", "lsit"], "does not know \"lsit\""),
        (&["queue", "remove"], "remove needs one id"),
        (&["queue", "list", "a", "b"], "list needs no more than one account or domain"),
    ] {
        assert!(place.run(64, words).contains(text), "{words:?}");
    }
}

#[test]
fn remove_sends_no_dsn_and_bounce_sends_one() {
    let place = Place::filled();
    place.write("spool/domains/example.org/new/1763607848.bad", "Subject: nobody\n\n");
    assert_eq!(place.run(0, &["queue", "remove", "1763607848.bad"]), "1763607848.bad: removed, from example.org\n");
    assert_eq!(place.run(0, &["queue", "bounce", "1large"]), "1large: bounced, from example.org\n");
    let dsns = place.files("spool/outgoing/@all");
    let [dsn] = &dsns.values().collect::<Vec<_>>()[..] else { panic!("{dsns:?}") };
    assert!(dsn.contains("Final-Recipient: rfc822; alice@example.org") && !dsn.contains("eva@"), "{dsn}");
    assert!(dsn.contains("Original-Envelope-Id: a b") && dsn.contains("Returned to its sender by"), "{dsn}");
    // The null sender gets no DSN (RFC 5321 section 4.5.5).
    let output = place.run(0, &["queue", "bounce", "1763607846.V1.other"]);
    assert_eq!(output, "1763607846.V1.other: set aside: it has no sender, from example.org\n");
    assert!(place.files("spool/domains/example.org").is_empty());
    assert_eq!(place.files("spool/domains/example.org/.refused").len(), 2);
    let dsn = dsns.keys().next().unwrap();
    assert!(place.run(0, &["queue", "remove", dsn]).contains("removed, from outgoing/w.example"));
    assert_eq!(place.run(0, &["queue", "list"]), "");
}

#[test]
fn retry_makes_messages_due_and_unskipped() {
    let place = Place::new(PROVIDER);
    let skipped = "1763607845.a,A=4,P=4-2-1763607900,L=421_x";
    place.write(&format!("spool/domains/example.org/new/{skipped}"), FOREIGN);
    let outgoing = "spool/outgoing/w.example/new/1763607845.b,A=1";
    place.write(outgoing, &FOREIGN.replace("example.org", "w.example"));
    let later = SystemTime::now() + Duration::from_secs(3600);
    File::options().append(true).open(place.path(outgoing)).unwrap().set_modified(later).unwrap();
    let text = place.run(0, &["status", "w.example"]);
    assert!(text.contains("  in 59m") || text.contains("  in 1h"), "{text}");
    for what in ["example.org", "w.example"] {
        assert_eq!(place.run(0, &["queue", "retry", what]), "1 message is due\n");
    }
    assert!(place.path("spool/domains/example.org/new/1763607845.a,A=4,L=421_x").exists());
    assert!(fs::metadata(place.path(outgoing)).unwrap().modified().unwrap() <= SystemTime::now());
    assert_eq!(place.run(0, &["queue", "retry", "1763607845.b"]), "1 message is due\n");
    // A domain with another character than letters, digits and hyphens.
    let file = "spool/outgoing/@all/new/1763607846.c,D=my_host.example";
    place.write(file, &FOREIGN.replace("example.org", "my_host.example"));
    assert_eq!(place.run(0, &["queue", "retry", "my_host.example"]), "1 message is due\n");
    assert!(place.run(0, &["status", "my_host.example"]).contains("my_host.example"));
}

/// Each format shows whether `serve` runs. There is no warning if it does not, because with inetd none runs.
#[test]
fn status_shows_whether_serve_runs() {
    let place = Place::new(PROVIDER);
    let check = |word: &str, json: &str, metric: u8| {
        let text = place.run(0, &["status"]);
        assert!(text.starts_with(&format!("serve: {word}\n")), "{text}");
        assert_eq!(value(&place.run(0, &["status", "--format", "json"]), "serve"), json);
        let metrics = place.run(0, &["status", "--format", "prometheus"]);
        assert!(metrics.contains(&format!("\nodmr_serve_running {metric}\n")), "{metrics}");
        assert_eq!(place.run(0, &["status", "--warn", "1h"]), "");
    };
    check("none", "false", 0);
    let mut serve = Command::new(env!("CARGO_BIN_EXE_odmr"));
    let mut serve = Running::start(serve.arg("serve").arg("-c").arg(place.path("odmr.toml")));
    serve.listening("odmr");
    check("running", "true", 1);
    serve.signal(rustix::process::Signal::TERM);
    assert_eq!(serve.exit_code(), Some(0));
    check("none", "false", 0);
}

/// If the disk has less than `min-free`, no mail is accepted.
#[test]
fn check_warns_of_a_disk_that_is_too_full() {
    for (config, directory) in [(PROVIDER, "spool"), (CUSTOMER, "mailboxes")] {
        let place = Place::new(&format!("{config}[limits]\nmin-free = \"900000GiB\"\n"));
        let line = config.lines().count() + 2;
        let text = place.run(0, &["check"]);
        let expected = format!("odmr.toml:{line}: the disk of {} has ", place.path(directory).display());
        assert!(text.contains(&expected), "{expected}: {text}");
        let rest = "octets free, and `min-free` is 966367641600000: all mail gets 452; make room, or write a smaller";
        assert!(text.contains(rest), "{text}");
        assert!(!Place::new(config).run(0, &["check"]).contains("min-free"));
    }
}

/// A user who was removed from `accept` may still have mail.
#[test]
fn check_names_mailboxes_that_no_rule_reaches() {
    let shared = "[mailboxes.deliver]\n\"info@example.org\" = \"maildir:mailboxes/example.org/desk\"\n";
    let place = Place::new(&CUSTOMER.replace("[outgoing]", &format!("{shared}[outgoing]")).replace(
        "accept = [",
        "aliases = { \"sales\" = \"alice@example.org\" }\naccept = [\"info@example.org\", \"@example.net\", ",
    ));
    for reached in ["example.org/alice", "example.org/desk", "example.org/postmaster", "example.net/any", "other/x/y"] {
        place.write(&format!("mailboxes/{reached}/new/1"), FOREIGN);
    }
    place.write("mailboxes/example.org/read/cur/1:2,S", FOREIGN);
    assert!(!place.run(0, &["check"]).contains("no rule"));
    for left in ["example.org/eva", "example.org/bob", "old.example/alice", "example.org/dora"] {
        place.write(&format!("mailboxes/{left}/new/1"), FOREIGN);
    }
    let text = place.run(0, &["check"]);
    let expected = "odmr.toml:8: new mail is in 4 mailboxes that no rule leads to, such as bob@example.org, dora@example.org, \
                    eva@example.org: write";
    assert!(text.contains(expected), "{text}");
}

/// Each command in an output has the path of the configuration.
#[test]
fn commands_in_outputs_can_be_typed() {
    let place = Place::filled();
    let file = place.path("odmr.toml");
    let file = file.display();
    place.write("spool/domains/gone.example/new/1763607845.x", FOREIGN);
    let checked = place.run(1, &["check"]);
    for command in ["list gone.example`", "bounce gone.example`"] {
        assert!(checked.contains(&format!("`odmr queue -c {file} {command}")), "{checked}");
    }
    let status = place.run(65, &["status", "nobody"]);
    assert!(status.contains(&format!("`odmr status -c {file}` shows all")), "{status}");
    let add = place.run(73, &["customer", "add", "acme", "example.net"]);
    assert!(add.contains(&format!("`odmr secret acme -c {file}`")), "{add}");
    assert!(add.contains(&format!("`odmr customer -c {file} remove acme`")), "{add}");
    let customer = Place::new(CUSTOMER);
    let text = customer.run(64, &["status", "--by", "domain"]);
    assert!(text.contains(&format!("`odmr queue -c {} list`", customer.path("odmr.toml").display())), "{text}");
}

/// The turned session of a customer locks the queue in another process.
#[test]
fn a_queue_that_a_session_has_locked_is_not_changed() {
    let place = Place::filled();
    let lock = File::create(place.path("spool/domains/example.org/odmr.lock")).unwrap();
    lock.lock().unwrap();
    for words in [["queue", "remove", "1large"], ["queue", "bounce", "1large"]] {
        assert!(place.run(75, &words).contains("a session has the queue example.org: try again later"));
    }
    assert_eq!(place.run(0, &["queue", "list"]).lines().count(), 2);
    drop(lock);
    place.run(0, &["queue", "remove", "1large"]);
}

#[test]
fn export_and_import_are_octet_for_octet() {
    let (place, other) = (Place::filled(), Place::new(PROVIDER));
    let before = place.files("spool/domains/example.org");
    let batch = place.run(0, &["queue", "export", "example.org"]);
    assert!(batch.starts_with("EHLO relay.example.net\r\nNOOP id=1large arrived=2026-11-20T03:04:05Z\r\n"), "{batch}");
    assert!(
        batch.contains("\r\n..\r\n...two\r\nlast\r\n.\r\n") && batch.ends_with("\r\nbody\r\n.\r\nQUIT\r\n"),
        "{batch}"
    );
    assert_eq!(place.files("spool/domains/example.org"), before);
    let done = other.run_with(&["queue", "import"], &batch);
    assert_eq!((done.code, &*done.out), (0, "2 messages imported\n"), "{}", done.error);
    let mut imported: Vec<_> = other.files("spool/domains/example.org").into_values().collect();
    imported.sort_by_key(|file| !file.contains("1large"));
    let open = LARGE.replace("Delivered-To: eva\u{6}example.org\n", "");
    assert_eq!(imported[0], format!("{open}{LARGE_CONTENT}"));
    assert!(
        imported[1]
            .starts_with("Return-Path: <>\nDelivered-To: alice@example.org\nX-ODMR-Envelope: id=1763607846.V1.other; ")
    );
    assert!(imported[1].ends_with("\nSubject: dsn\n\nbody\n"), "{}", imported[1]);
    assert_eq!(other.run(0, &["queue", "export", "example.org"]).lines().count(), batch.lines().count());
    // The error has the number of the line. Messages before it are stored.
    let wrong = batch.replace("MAIL FROM:<>", "MAIL TO:<>");
    let done = other.run_with(&["queue", "import"], &wrong);
    assert!(
        done.code == 65 && done.out == "1 message imported\n" && done.error.contains("line 14: 501"),
        "{}",
        done.error
    );
    // Content must not become a part of the envelope.
    let hostile = "MAIL FROM:<a@w.example>\nRCPT TO:<alice@example.org>\nDATA\nDelivered-To: eve@example.org\n\nx\n.\n";
    let done = other.run_with(&["queue", "import"], hostile);
    assert_eq!(done.code, 0, "{}", done.error);
    let list = other.run(0, &["queue", "list"]);
    assert!(list.contains("from=<a@w.example> to=<alice@example.org> ") && !list.contains("eve@"), "{list}");
}

/// The provider's status shows a call of the customer, even after `serve` has ended.
#[test]
fn the_last_call_is_recorded() {
    let place = Place::new(PROVIDER);
    let mut serve = Command::new(env!("CARGO_BIN_EXE_odmr"));
    let mut serve = Running::start(serve.arg("serve").arg("-c").arg(place.path("odmr.toml")));
    let address = serve.listening("odmr");
    let customer = Place::new(&CUSTOMER.replace("127.0.0.1:1", &address));
    customer.run(0, &["pull"]);
    let json = place.run(0, &["status", "--format", "json"]);
    assert_eq!((value(&json, "result"), value(&json, "peer")), ("\"no-mail\"", "\"[127.0.0.1]\""), "{json}");
    let json = customer.run(0, &["status", "--format", "json"]);
    assert_eq!((value(&json, "result"), value(&json, "calls")), ("\"no-mail\"", "1"), "{json}");
    place.write("spool/domains/example.org/new/1763607845.a", FOREIGN);
    customer.run(0, &["pull"]);
    // The provider records the call after the customer has closed the connection.
    let end = SystemTime::now() + Duration::from_secs(5);
    while !place.run(0, &["status"]).contains(" done, ") && SystemTime::now() < end {}
    for side in [&place, &customer] {
        let metrics = side.run(0, &["status", "--format", "prometheus"]);
        assert!(metrics.contains("odmr_last_call_successful{") && metrics.contains("odmr_calls_total{"), "{metrics}");
        assert!(metrics.lines().any(|line| line.starts_with("odmr_calls_total{") && line.ends_with(" 2")), "{metrics}");
    }
    assert!(place.run(0, &["status"]).contains("[127.0.0.1], done, 1 sent"));
    assert!(customer.run(0, &["status"]).contains(", done, 1 received"));
    assert!(place.run(0, &["status", "--format", "prometheus"]).contains("odmr_config_last_reload_successful 1"));
    drop(serve);
    customer.run(69, &["pull"]);
    std::thread::sleep(Duration::from_millis(1100));
    let text = customer.run(1, &["status", "--warn", "1s"]);
    assert!(text.contains("no call has succeeded for"), "{text}");
    let json = customer.run(0, &["status", "--format", "json"]);
    assert_eq!((value(&json, "result"), value(&json, "failed")), ("\"failed\"", "1"), "{json}");
}

/// A running relay tries mail that an administrator has made due, within seconds.
#[test]
fn a_running_relay_tries_messages_that_were_made_due() {
    let place = Place::new(PROVIDER);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let outgoing = &format!("spool/outgoing/w.example/new/{now}.b");
    place.write(outgoing, "Return-Path: <alice@example.org>\nDelivered-To: bob@w.example\nSubject: x\n\nx\n");
    let later = SystemTime::now() + Duration::from_secs(3600);
    File::options().append(true).open(place.path(outgoing)).unwrap().set_modified(later).unwrap();
    let mut serve = Command::new(env!("CARGO_BIN_EXE_odmr"));
    let mut serve = Running::start(serve.arg("serve").arg("-c").arg(place.path("odmr.toml")));
    serve.listening("odmr");
    std::thread::sleep(Duration::from_millis(300));
    place.run(0, &["queue", "retry", "w.example"]);
    serve.wait_for("event=deferred destination=w.example");
    let list = |place: &Place| place.run(0, &["queue", "list"]);
    let end = SystemTime::now() + Duration::from_secs(10);
    while !list(&place).contains("attempts=") && SystemTime::now() < end {}
    assert!(list(&place).contains("reply=\"451 4.4.3"), "{}", list(&place));
}

#[test]
fn a_customers_queues_are_listed_and_changed() {
    let place = Place::new(CUSTOMER);
    let to = |domain: &str| format!("Return-Path: <alice@example.org>\nDelivered-To: bob@{domain}\nSubject: x\n\nx\n");
    place.write("outgoing/new/1763607845.a", &to("w.example"));
    place.write("mailboxes/.handover/new/1763607846.b", &to("example.org"));
    let list = place.run(0, &["queue", "list"]);
    assert!(list.contains("id=1763607845.a queue=outgoing ") && list.contains("queue=next-hops "), "{list}");
    assert_eq!(place.run(0, &["queue", "list", "w.example"]).lines().count(), 1);
    assert_eq!(place.run(0, &["queue", "list", "outgoing"]).lines().count(), 1);
    // A customer's queues have mail for any domain. One word must not empty them.
    assert_eq!(place.run(0, &["queue", "list", "x.example"]), "");
    assert!(place.run(64, &["queue", "bounce", "1763607845.a", "w.example"]).contains("leave the domain out"));
    for word in ["outgoing", "w.example"] {
        place.run(65, &["queue", "bounce", word]);
    }
    let text = place.run(0, &["status"]);
    assert!(text.contains("daemon: none\n127.0.0.1:1 as acme: last call never\n"), "{text}");
    let json = place.run(0, &["status", "--format", "json", "acme"]);
    assert_eq!((value(&json, "role"), value(&json, "messages")), ("\"customer\"", "1"), "{json}");
    assert!(place.run(64, &["status", "--by", "domain"]).contains("provider's file"));
    let batch = place.run(0, &["queue", "export", "w.example"]);
    assert!(place.run(0, &["queue", "bounce", "1763607845.a"]).contains("bounced, from outgoing"));
    let dsn = place.files("mailboxes/example.org/alice");
    assert!(dsn.values().any(|dsn| dsn.contains("Final-Recipient: rfc822; bob@w.example")), "{dsn:?}");
    assert_eq!(place.run_with(&["queue", "import"], &batch).code, 0);
    assert_eq!(place.files("outgoing").len(), 1);
    let other = Place::new(CUSTOMER.split("[outgoing]").next().unwrap());
    assert!(other.run_with(&["queue", "import"], &batch).error.contains("no table [outgoing]"));
    assert_eq!(other.run(0, &["queue", "list"]), "");
}

/// With two accounts at one provider, a domain belongs to the account whose call fetches its mail.
#[test]
fn a_customers_account_is_found_by_its_domain() {
    let second = "[[provider]]\naddress = \"127.0.0.1:1\"\ntls = \"none\"\nname = \"two\"\n\
                  secret = \"tanstaaftanstaaf\"\ndomains = [\"example.net\"]\noutgoing = false\n[mailboxes]";
    let config =
        CUSTOMER.replace("[provider]", "[[provider]]").replace("acme\"\n", "acme\"\ndomains = [\"example.org\"]\n");
    let place =
        Place::new(&config.replace("[mailboxes]", second).replace("accept = [", "accept = [\"bob@example.net\", "));
    for (domain, account) in [("example.org", "\"acme\""), ("example.net", "\"two\"")] {
        let json = place.run(0, &["status", "--format", "json", domain]);
        assert!(json.matches("\"account\": ").count() == 1 && value(&json, "account") == account, "{json}");
    }
    place.run(69, &["pull"]);
    let text = place.run(1, &["status", "--warn", "1h"]);
    assert!(text.contains("127.0.0.1:1 as acme: ") && text.contains("127.0.0.1:1 as two: "), "{text}");
}

/// The status has the time of the next call while a daemon runs.
#[test]
fn the_next_call_of_a_running_daemon_is_shown() {
    let place = Place::new(CUSTOMER);
    let mut daemon = Command::new(env!("CARGO_BIN_EXE_odmr"));
    let mut daemon = Running::start(daemon.args(["pull", "--daemon", "-c"]).arg(place.path("odmr.toml")));
    daemon.wait_for("event=call-failed");
    daemon.wait_for("event=next-call");
    let status = || place.run(0, &["status", "--format", "json"]);
    let end = SystemTime::now() + Duration::from_secs(5);
    while value(&status(), "next_call") == "null" && SystemTime::now() < end {}
    let json = status();
    assert_eq!(value(&json, "daemon"), daemon.child.id().to_string(), "{json}");
    assert!(value(&json, "next_call").starts_with("\"20"), "{json}");
    assert!(json.contains("\"reason\": \"\"") && value(&json, "result") == "\"failed\"", "{json}");
    let text = place.run(0, &["status"]);
    assert!(text.contains(", failed: ") && text.contains("; next call in "), "{text}");
    daemon.signal(rustix::process::Signal::TERM);
    assert_eq!(daemon.exit_code(), Some(0));
    let json = status();
    assert_eq!((value(&json, "daemon"), value(&json, "next_call")), ("null", "null"), "{json}");
}

/// Sets the times of files and directories to 37 hours ago.
fn make_old(place: &Place, names: &[&str]) {
    let old = SystemTime::now() - Duration::from_secs(37 * 60 * 60);
    for name in names {
        let times = fs::FileTimes::new().set_accessed(old).set_modified(old);
        File::open(place.path(name)).unwrap().set_times(times).unwrap();
    }
}

/// An empty queue that was not used for 37 hours.
fn unused_queue(place: &Place, name: &str) {
    for part in ["tmp", "new", "cur"] {
        let part = format!("{name}/{part}");
        fs::create_dir_all(place.path(&part)).unwrap();
        make_old(place, &[&part]);
    }
}

/// Files that were not used for 36 hours are removed if they are not needed; not mail, and nothing that may belong to a
/// customer whose file has a mistake.
#[test]
fn files_left_over_in_a_spool_are_removed() {
    for skipped in [false, true] {
        let place = Place::new(PROVIDER);
        if skipped {
            place.write("customers.d/bad.toml", "domains = 7\n");
        }
        for name in ["example.org", "gone.example", "mail.example"] {
            unused_queue(&place, &format!("spool/domains/{name}"));
        }
        unused_queue(&place, "spool/outgoing/w.example");
        place.write("spool/domains/mail.example/new/1763607845.a", FOREIGN);
        for name in [
            "domains/mail.example/new",
            "domains/example.org/tmp/1.left",
            ".odmr/call-gone",
            ".odmr/unknown-gone",
            ".odmr/rate-gone",
            ".odmr/rate-acme",
            ".odmr/retry",
            ".odmr/.call-x.1.1",
        ] {
            let name = format!("spool/{name}");
            if !place.path(&name).exists() {
                place.write(&name, "at=2026-01-02T03:04:05Z\nresult=done\n");
            }
            make_old(&place, &[&name]);
        }
        place.write("spool/.odmr/call-old", "at=2026-01-02T03:04:05Z\nresult=done\n");
        let mut serve = Command::new(env!("CARGO_BIN_EXE_odmr"));
        let mut serve = Running::start(serve.arg("serve").arg("-c").arg(place.path("odmr.toml")));
        serve.wait_for(if skipped { ".call-x.1.1" } else { "call-gone" });
        serve.signal(rustix::process::Signal::TERM);
        assert_eq!(serve.exit_code(), Some(0));
        let left = ["domains/example.org/new", "domains/mail.example/new/1763607845.a", ".odmr/call-old"];
        left.iter().for_each(|name| assert!(place.path(&format!("spool/{name}")).exists(), "{name}"));
        for name in ["outgoing/w.example", "domains/example.org/tmp/1.left", ".odmr/.call-x.1.1"] {
            assert!(!place.path(&format!("spool/{name}")).exists(), "{name}");
        }
        // The account has no rate.
        let files =
            ["call-gone", "unknown-gone", "rate-gone", "rate-acme", "retry"].map(|name| format!(".odmr/{name}"));
        for name in ["domains/gone.example"].into_iter().chain(files.iter().map(String::as_str)) {
            assert_eq!(place.path(&format!("spool/{name}")).exists(), skipped, "{name}");
        }
        let text = place.run(1, &["check"]);
        assert_eq!(
            text.contains("odmr.toml:2: 1 message is held for mail.example, which no customer has: "),
            !skipped,
            "{text}"
        );
        // It is done once a day.
        place.write("spool/domains/example.org/tmp/2.left", "");
        make_old(&place, &["spool/domains/example.org/tmp/2.left"]);
        let mut serve = Command::new(env!("CARGO_BIN_EXE_odmr"));
        let mut serve = Running::start(serve.arg("serve").arg("-c").arg(place.path("odmr.toml")));
        serve.listening("odmr");
        serve.signal(rustix::process::Signal::TERM);
        assert_eq!(serve.exit_code(), Some(0));
        assert!(place.path("spool/domains/example.org/tmp/2.left").exists());
    }
}

#[test]
fn files_left_over_in_mailboxes_are_removed() {
    let place = Place::new(CUSTOMER);
    let left = [
        "outgoing/tmp/1",
        "mailboxes/.handover/tmp/1",
        "mailboxes/example.org/alice/tmp/1",
        "mailboxes/example.org/alice/.Junk/tmp/1",
        "mailboxes/.odmr/last-gone%40relay.example.net",
    ];
    let stays = [
        "mailboxes/example.org/alice/tmp/2",
        "mailboxes/example.org/alice/x/tmp/1",
        "mailboxes/.odmr/last-acme%40127.0.0.1%3A1",
    ];
    left.iter().chain(&stays).for_each(|name| place.write(name, "x"));
    make_old(&place, &left);
    make_old(&place, &stays[1..]);
    place.run(69, &["pull"]);
    left.iter().for_each(|name| assert!(!place.path(name).exists(), "{name}"));
    stays.iter().for_each(|name| assert!(place.path(name).exists(), "{name}"));
}

/// If a customer's file has a mistake, the status names it, and an import does not send mail for its domains elsewhere.
#[test]
fn a_skipped_customers_file_is_shown() {
    let place = Place::filled();
    place.write("customers.d/other.toml", "domains = [\"other.example\"]\nsecret = \"tanstaaftanstaaf\"\n");
    place.write("customers.d/acme.toml", "domain = [\"example.org\"]\nsecret = \"tanstaaftanstaaf\"\n");
    let text = place.run(0, &["status"]);
    assert!(text.contains("customer acme: skipped: ") && text.contains("acme.toml:1"), "{text}");
    assert!(text.contains("of no account that can be read") && text.contains("other "), "{text}");
    let json = place.run(0, &["status", "--format", "json"]);
    let skipped = json.split_once("\"skipped\": [").unwrap().1;
    assert!(value(skipped, "account") == "\"acme\"" && value(skipped, "error").contains("acme.toml:1"), "{json}");
    assert!(place.run(1, &["status", "--warn", "1d"]).contains("customer acme: skipped: "));
    assert!(place.run(0, &["status", "--format", "prometheus"]).contains("\nodmr_config_skipped_customers 1\n"));
    let batch = "MAIL FROM:<a@w.example>\nRCPT TO:<alice@example.org>\nDATA\nx\n.\n";
    let done = place.run_with(&["queue", "import"], batch);
    assert!(done.code == 65 && done.error.contains("a customer's file has a mistake"), "{}", done.error);
    let done = place.run_with(&["queue", "import"], &batch.replace("example.org", "other.example"));
    assert_eq!(done.code, 0, "{}", done.error);
}

/// Other agents may write any octets into names of files and envelopes. The terminal and a batch must not get control
/// characters.
#[test]
fn hostile_names_are_escaped() {
    let (place, other) = (Place::new(PROVIDER), Place::new(PROVIDER));
    let text = "Return-Path: <bob@w.example>\nDelivered-To: alice@example.org\n";
    let new = "spool/domains/example.org/new";
    place.write(&format!("{new}/1763607845.a\x1b[2J\r\nRSET"), &format!("{text}Received: x\n\nx\n"));
    place.write(
        &format!("{new}/1763607846.b"),
        &format!("{text}X-ODMR-Envelope: id=1j\u{9b}2J; envid=x\rRSET\nReceived: x\n\nx\n"),
    );
    let list = place.run(0, &["queue", "list"]);
    assert!(list.starts_with("id=1763607845.a\\x1b[2J\\x0d\\x0aRSET queue=example.org "), "{list:?}");
    assert_eq!(list.lines().count(), 2);
    let shown = place.run(0, &["queue", "show", "1763607845.a\\x1b[2J\\x0d\\x0aRSET"]);
    let shown = shown + &place.run(0, &["queue", "show", "1763607846.b"]);
    let batch = place.run(0, &["queue", "export", "example.org"]);
    for text in [list, shown, batch.replace("\r\n", "\n")] {
        assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "{text:?}");
    }
    let done = other.run_with(&["queue", "import"], &batch);
    assert_eq!((done.code, &*done.out), (0, "2 messages imported\n"), "{}", done.error);
}

/// Reading a pipe would block for ever. A size in the name of a file may be any number.
#[test]
fn a_pipe_and_wrong_sizes_in_names_do_not_stop_commands() {
    let place = Place::new(PROVIDER);
    let new = "spool/outgoing/w.example/new";
    place.write(&format!("{new}/1763607845.a,S=18446744073709551615"), &FOREIGN.replace("example.org", "w.example"));
    place.write(&format!("{new}/1763607846.b,S=18446744073709551615"), &FOREIGN.replace("example.org", "w.example"));
    let pipe = place.path(&format!("{new}/1763607847.c"));
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    assert!(place.run(0, &["status"]).contains(" 18446744073709551615 "));
    assert_eq!(place.run(0, &["queue", "list"]).lines().count(), 3);
    assert!(place.run(0, &["queue", "show", "1763607847.c"]).contains("not mail: "));
    assert_eq!(place.run(0, &["queue", "retry", "w.example"]), "2 messages are due\n");
    assert!(place.run(65, &["queue", "bounce", "1763607847.c"]).contains("not bounced"));
    place.run(0, &["queue", "remove", "1763607847.c"]);
    // A time so far ahead means that a clock was wrong: the relay tries at once.
    let later = SystemTime::now() + Duration::from_secs(90 * 24 * 3600);
    let file = place.path(&format!("{new}/1763607845.a,S=18446744073709551615"));
    File::options().append(true).open(file).unwrap().set_modified(later).unwrap();
    assert!(place.run(0, &["status"]).contains("  now\n"));
}

/// A message that cannot be bounced stays, and the output says that.
#[test]
fn a_message_without_a_dsn_is_not_reported_as_bounced() {
    let place = Place::filled();
    place.write("spool/outgoing/@all/tmp", "no directory");
    let text = place.run(75, &["queue", "bounce", "1large"]);
    assert!(text.contains("1large: not bounced: the DSN cannot be stored"), "{text}");
    assert_eq!(place.files("spool/domains/example.org").len(), 2);
    let place = Place::new(CUSTOMER.split("[outgoing]").next().unwrap());
    place.write("mailboxes/.handover/new/1763607846.b", &FOREIGN.replace("<>", "<bob@w.example>"));
    let text = place.run(0, &["queue", "bounce", "1763607846.b"]);
    assert!(text.contains("set aside: this customer sends no mail"), "{text}");
}

/// DSNs for address literals go to the provider's postmaster. Untrusted clients could cause any number of them.
#[test]
fn untrusted_clients_do_not_fill_the_postmasters_queue() {
    let place = Place::new(PROVIDER);
    for number in 0..999 {
        place.write(&format!("spool/postmaster/new/1763607845.{number}"), FOREIGN);
    }
    for (id, count) in [("1763607846.a", 1000), ("1763607847.b", 1000)] {
        let text = "Return-Path: <carol@[192.0.2.9]>\nDelivered-To: alice@example.org\nSubject: x\n\nx\n";
        place.write(&format!("spool/domains/example.org/new/{id}"), text);
        assert!(place.run(0, &["queue", "bounce", id]).contains(": bounced, from example.org"));
        assert_eq!(place.files("spool/postmaster").len(), count, "{id}");
    }
}

/// Otherwise one copy of the message would be removed, and the other sent.
#[test]
fn a_message_in_two_queues_is_changed_in_both_or_in_none() {
    let place = Place::new(PROVIDER);
    let batch =
        "NOOP id=both\nMAIL FROM:<a@w.example>\nRCPT TO:<alice@example.org>\nRCPT TO:<b@x.example>\nDATA\nx\n.\n";
    assert_eq!(place.run_with(&["queue", "import"], batch).code, 0);
    // A session of the relay locks the message like this.
    let message = fs::read_dir(place.path("spool/outgoing/@all/new")).unwrap().next().unwrap().unwrap();
    let lock = File::open(message.path()).unwrap();
    lock.lock().unwrap();
    assert!(place.run(75, &["queue", "remove", "both"]).contains("a session has the queue outgoing/x.example"));
    assert_eq!(place.run(0, &["queue", "list"]).lines().count(), 2);
    drop(lock);
    assert_eq!(place.run(0, &["queue", "remove", "both"]).lines().count(), 2);
}

/// The name of an account means all of its domains. An unknown name is an error, not an empty queue.
#[test]
fn list_accepts_accounts_and_reports_unknown_names() {
    let place = of_two_accounts();
    let account = "domains = [\"example.com\", \"empty.example\"]\nsecret = \"tanstaaftanstaaf\"\n";
    place.write("customers.d/other.toml", account);
    let ids = |list: String| list.lines().map(|line| line.split(' ').next().unwrap().to_owned()).collect::<Vec<_>>();
    assert_eq!(ids(place.run(0, &["queue", "list", "other"])), ["id=both", "id=null"]);
    assert_eq!(ids(place.run(0, &["queue", "list", "acme"])), ["id=both"]);
    for empty in ["empty.example", "outgoing", "postmaster"] {
        assert_eq!(place.run(0, &["queue", "list", empty]), "");
    }
    assert_eq!(place.run(0, &["queue", "export", "empty.example"]), "EHLO relay.example.net\r\nQUIT\r\n");
    // `export` takes the name of no account.
    for (words, what) in [
        (["list", "nobody"], "an account or domain"),
        (["list", "acme!"], "an account or domain"),
        (["list", "nobody.example"], "an account or domain"),
        (["export", "nobody.example"], "a domain"),
        (["export", "acme"], "a domain"),
    ] {
        let (text, name) = (place.run(65, &["queue", words[0], words[1]]), words[1]);
        let all = format!("`odmr queue -c {} list`", place.path("odmr.toml").display());
        assert!(text.starts_with(&format!("odmr: {name} is not {what} with mail here: {all} shows all")), "{text}");
    }
}

/// A provider that holds a message `both` for two accounts, and one more for example.com.
fn of_two_accounts() -> Place {
    let place = Place::new(PROVIDER);
    place.write("customers.d/other.toml", "domains = [\"example.com\"]\nsecret = \"tanstaaftanstaaf\"\n");
    let batch = "NOOP id=both\nMAIL FROM:<a@w.example>\nRCPT TO:<alice@example.org>\nRCPT TO:<bob@example.com>\nDATA\nx\n\
                 .\nNOOP id=null\nMAIL FROM:<>\nRCPT TO:<bob@example.com>\nDATA\ny\n.\n";
    let done = place.run_with(&["queue", "import"], batch);
    assert_eq!(done.code, 0, "{}", done.error);
    place
}

/// If two customers have a message, a command must name the domain, and does not change the message of the other customer.
#[test]
fn a_message_of_two_accounts_is_changed_for_the_one_that_is_named() {
    let place = of_two_accounts();
    let file = place.path("odmr.toml");
    for word in ["remove", "bounce"] {
        let text = place.run(65, &["queue", word, "both"]);
        for name in ["example.org (acme)", "example.com (other)"] {
            assert!(text.contains(name), "{text}");
        }
        assert!(text.contains(&format!("`odmr queue -c {} {word} both example.", file.display())), "{text}");
    }
    assert_eq!(place.run(0, &["queue", "list"]).lines().count(), 3);
    assert_eq!(place.run(0, &["queue", "show", "both", "Example.ORG"]).matches("id: both\n").count(), 1);
    assert_eq!(place.run(0, &["queue", "retry", "both", "example.org"]), "1 message is due\n");
    assert!(
        place
            .run(65, &["queue", "bounce", "both", "w.example"])
            .contains("no message both waits here for w.example: `odmr")
    );
    assert_eq!(place.run(0, &["queue", "bounce", "both", "example.com"]), "both: bounced, from example.com\n");
    assert_eq!(place.run(0, &["queue", "remove", "both"]), "both: removed, from example.org\n");
    assert!(place.run(64, &["queue", "export", "example.org", "example.com"]).contains("export needs one domain"));
    assert!(place.run(64, &["queue", "remove"]).contains("remove needs one id"));
}

/// One command, which `customer remove` prints, returns the mail of a removed customer.
#[test]
fn the_mail_of_a_removed_customer_is_returned_at_once() {
    let place = of_two_accounts();
    let removed = place.run(0, &["customer", "remove", "other"]);
    let command = format!("odmr queue -c {} bounce example.com ", place.path("odmr.toml").display());
    assert!(removed.contains(&command), "{removed}");
    // The other copy belongs to no account any more.
    assert!(place.run(65, &["queue", "remove", "both"]).contains("example.com (of no account)"));
    let output = place.run(0, &["queue", "bounce", "example.com"]);
    assert!(output.contains("both: bounced, from example.com\n") && output.contains("null: set aside"), "{output}");
    assert_eq!(place.run(0, &["queue", "list", "example.org"]).lines().count(), 1);
    assert_eq!(place.files("spool/domains/example.com").len(), 0);
    assert!(place.run(65, &["queue", "bounce", "example.com"]).contains("no message example.com waits"));
    // Without an id, `remove` must not remove all mail of a customer.
    assert!(place.run(65, &["queue", "remove", "example.org"]).contains("no message example.org waits"));
}

/// A message must be listed even if its file is renamed at the same time.
#[test]
fn a_message_that_is_renamed_is_not_missed() {
    let place = Place::new(PROVIDER);
    for number in 0..2000 {
        place.write(&format!("spool/domains/example.org/new/{}.x", 1_763_607_845 + number), FOREIGN);
    }
    std::thread::scope(|scope| {
        // A turn renames the files of deferred messages like this, the oldest first.
        scope.spawn(|| {
            for number in 0..2000 {
                let name = format!("spool/domains/example.org/new/{}.x", 1_763_607_845 + number);
                fs::rename(place.path(&name), place.path(&format!("{name},A=1"))).unwrap();
            }
        });
        for _ in 0..5 {
            let batch = place.run(0, &["queue", "export", "example.org"]);
            assert_eq!(batch.matches("DATA\r\n").count(), 2000);
        }
    });
}
