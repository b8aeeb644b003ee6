//! Tests of expiry without a call: which messages expire, and which senders get DSNs.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::*;
use crate::clock::Clock;
use crate::config::ProviderConfig;
use crate::ids::Ids;
use crate::provider::accept::SpoolDsnSink;
use crate::provider::relay;
use crate::report::clock_watch::ClockWatch;

const HOUR: i64 = 3600;
const DAY: i64 = 24 * HOUR;

/// A spool with one customer.
struct Case {
    directory: tempfile::TempDir,
    plan: ExpiryPlan,
}

impl Case {
    fn new(account: &str) -> Case {
        let case = Case { directory: tempfile::tempdir().unwrap(), plan: ExpiryPlan::default() };
        case.write("provider.toml", "hostname = \"relay.example.net\"\nspool = \"spool\"\ncustomers = \"customers.d\"\n[inbound]\nlisten = [\"127.0.0.1:0\"]\n[odmr]\nlisten = [\"127.0.0.1:0\"]\nrequire-tls = false\n");
        case.account(account);
        case
    }

    fn account(&self, keys: &str) {
        self.write(
            "customers.d/acme.toml",
            &format!("domains = [\"example.org\"]\nsecret = \"tanstaaftanstaaf\"\n{keys}\n"),
        );
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        path
    }

    /// Puts a message of this age in seconds into the queue. `name`: the part of the file's name after the time.
    fn put(&self, age: i64, name: &str, head: &str) {
        let arrived = Timestamp::from_seconds(Clock::Fixed.now().seconds() - age);
        let text = format!(
            "{head}X-ODMR-Envelope: id=id0; arrived={}\nReceived: by relay.example.net\nSubject: hello\n\nHello.\n",
            arrived.rfc3339()
        );
        self.write(&format!("spool/domains/example.org/{}.{name}", path_of(name, arrived)), &text);
    }

    fn call(&self, age: i64, rest: &str) {
        let at = Timestamp::from_seconds(Clock::Fixed.now().seconds() - age);
        self.write("spool/.odmr/call-acme", &format!("at={}\n{rest}\n", at.rfc3339()));
    }

    fn pass(&self) -> PassResult {
        self.pass_that_waits(Duration::ZERO)
    }

    /// A pass. `wait`: how long it waits for a session that has the queue.
    fn pass_that_waits(&self, wait: Duration) -> PassResult {
        let ids = Ids::fixed();
        let config = ProviderConfig::load(&self.directory.path().join("provider.toml")).unwrap();
        let spool = Arc::new(Spool::new(&config, &ids));
        let sink = SpoolDsnSink { spool: spool.clone(), relay: relay::channel(&config.spool).handle, ids: ids.clone() };
        let watch = Arc::new(ClockWatch::new(&config.spool, ids.clock()));
        let reporter = Reporter::new(&config.hostname, &ids, Some(Arc::new(sink)), &watch);
        let accounts = &config.accounts;
        ExpiryPass { accounts, spool: &spool, reporter: &reporter, is_over: &|| false, wait }.run(&self.plan)
    }

    /// The files in a directory of the spool.
    fn files(&self, directory: &str) -> Vec<String> {
        let Ok(files) = fs::read_dir(self.directory.path().join("spool").join(directory)) else { return Vec::new() };
        let mut names: Vec<_> = files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// The text of the only DSN; empty, if there is none.
    fn dsn(&self) -> String {
        let files = self.files("outgoing/@all/new");
        assert!(files.len() < 2, "{files:?}");
        let path = |name: &String| self.directory.path().join("spool/outgoing/@all/new").join(name);
        files.first().map(|name| fs::read_to_string(path(name)).unwrap()).unwrap_or_default()
    }

    /// How many messages are held, and how many are in `.refused`.
    fn left(&self) -> (usize, usize) {
        let held = ["new", "cur"].map(|part| self.files(&format!("domains/example.org/{part}")).len());
        (held[0] + held[1], self.files("domains/example.org/.refused/new").len())
    }
}

fn path_of(name: &str, arrived: Timestamp) -> String {
    format!("{}/{}", if name.contains(":2,") { "cur" } else { "new" }, arrived.seconds())
}

const FROM: &str = "Return-Path: <lester@dot.example>\n";
const TO: &str = "Delivered-To: alice@example.org\n";

fn unfolded(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A message expires at its age to the second. NOTIFY is respected, and the null sender gets no DSN.
#[test]
fn a_message_expires_at_its_age() {
    let plain = format!("{FROM}{TO}");
    let notify = |when: &str| format!("{plain}X-ODMR-Recipient: NOTIFY={when}\n");
    let (never, failure, delay) = (notify("NEVER"), notify("FAILURE"), notify("DELAY"));
    for (keys, age, head, action, left) in [
        ("", 14 * DAY - 1, plain.as_str(), "", (1, 0)),
        ("", 14 * DAY, &plain, "failed", (0, 0)),
        ("expire-after = \"1h\"", HOUR - 1, &plain, "", (1, 0)),
        ("expire-after = \"1h\"", HOUR, &plain, "failed", (0, 0)),
        ("expire-after = \"never\"", 400 * DAY, &plain, "", (1, 0)),
        ("", 14 * DAY, "Return-Path: <>\nDelivered-To: alice@example.org\n", "", (0, 1)),
        ("delay-warning = \"2h\"", 2 * HOUR - 1, &plain, "", (1, 0)),
        ("delay-warning = \"2h\"", 2 * HOUR, &plain, "delayed", (1, 0)),
        ("delay-warning = \"2h\"\nexpire-after = \"never\"", 300 * DAY, &plain, "delayed", (1, 0)),
        ("delay-warning = \"2h\"", 14 * DAY, &plain, "failed", (0, 0)),
        ("delay-warning = \"2h\"", 2 * HOUR, &failure, "", (1, 0)),
        ("delay-warning = \"2h\"", 2 * HOUR, &delay, "delayed", (1, 0)),
        ("", 14 * DAY, &never, "", (0, 0)),
        ("", 14 * DAY, &delay, "", (0, 0)),
    ] {
        let case = Case::new(keys);
        case.put(age, "x", head);
        assert_eq!(case.pass().left, [], "{keys} {age}");
        let dsn = case.dsn();
        assert_eq!(dsn.contains("Will-Retry-Until: "), action == "delayed" && !keys.contains("never"), "{keys} {age}");
        let found = dsn.lines().find_map(|line| line.strip_prefix("Action: ")).unwrap_or_default();
        assert_eq!((found, case.left()), (action, left), "{keys} {age} {head}");
        // Neither this process nor the next one reports a message twice.
        case.pass();
        assert_eq!(case.dsn(), dsn, "{keys} {age}");
        let next = Case { plan: ExpiryPlan::default(), ..case };
        next.pass();
        assert_eq!((next.dsn(), next.left()), (dsn, left), "{keys} {age}");
    }
}

/// The sender gets a warning only if the customer has not called since the message arrived. It has the day of the last call.
#[test]
fn a_warning_depends_on_the_last_call() {
    let never = "no call of the recipient's mail server for its mail is known";
    let on_day = "the recipient's mail server last called for its mail on 2026-01-01";
    for (age, call, wanted) in [
        (0, "", never),
        (23 * HOUR, "result=done\nsuccess=2026-01-01T04:04:05Z", on_day),
        (23 * HOUR, "result=no-mail\nsuccess=2026-01-01T04:04:05Z", on_day),
        (2 * HOUR, "result=done\nsuccess=2026-01-02T01:04:05Z", ""),
        (2 * HOUR, "result=no-mail", ""),
        // The connection was lost after the turn, or ATRN was rejected.
        (2 * HOUR, "result=failed\ncount sent=0", ""),
        (2 * HOUR, "result=failed\nreason=450", never),
        (2 * HOUR, "result=failed\nsuccess=2026-01-01T04:04:05Z", on_day),
        // The record is from a wrong clock, or damaged.
        (-400 * DAY, "result=done", ""),
        (2 * HOUR, "result=", ""),
    ] {
        let case = Case::new("delay-warning = \"3h\"");
        case.put(4 * HOUR, "x", &format!("{FROM}{TO}"));
        if !call.is_empty() {
            case.call(age, call);
        }
        case.pass();
        let dsn = unfolded(&case.dsn());
        assert!(if wanted.is_empty() { dsn.is_empty() } else { dsn.contains(wanted) }, "{call}: {dsn}");
        let until = "Will-Retry-Until: Thu, 15 Jan 2026 23:04:05 +0000";
        assert_eq!(dsn.contains(until), !wanted.is_empty(), "{dsn}");
    }
}

#[test]
fn the_dsn_has_the_reason_and_the_last_reply() {
    for (name, head, wanted) in [
        ("x:2,S", format!("{FROM}{TO}"), "Given up after 14 days: no call"),
        ("x:2,F", format!("{FROM}{TO}"), "the message may have been delivered"),
        (
            "x,A=3,L=450_4.2.1_mailbox_is_full",
            format!("{FROM}{TO}"),
            "its last reply to the message: 450 4.2.1 mailbox is full",
        ),
    ] {
        let case = Case::new("");
        case.put(14 * DAY, name, &head);
        case.pass();
        assert!(unfolded(&case.dsn()).contains(wanted), "{}", case.dsn());
    }
}

/// Settled recipients are not reported again, and a file with an unreadable recipient is not removed.
#[test]
fn only_open_recipients_expire() {
    let case = Case::new("");
    case.put(14 * DAY, "x", &format!("{FROM}{TO}delivered-to: carol@example.org\nDelivered-To: no address\n"));
    case.pass();
    let dsn = case.dsn();
    assert_eq!((dsn.matches("Action: failed").count(), dsn.matches("Last-Attempt-Date").count()), (2, 0), "{dsn}");
    assert_eq!(case.left(), (1, 0));
    case.pass();
    assert_eq!(case.dsn(), dsn);
}

/// Mail does not expire if its customer's file has a mistake, or while a session has it.
#[test]
fn a_mistake_and_a_session_stop_expiry() {
    let case = Case::new("");
    case.put(14 * DAY, "x", &format!("{FROM}{TO}"));
    case.account("expire-after = 5");
    case.pass();
    assert_eq!(case.left(), (1, 0));
    case.account("");
    let config = ProviderConfig::load(&case.directory.path().join("provider.toml")).unwrap();
    let spool = Spool::new(&config, &Ids::fixed());
    let name = spool.name(&SpoolQueue::Held(Domain::parse("example.org").unwrap()));
    let lock = spool.queue().lock_account(std::slice::from_ref(&name)).unwrap();
    assert_eq!(case.pass().left, [(Domain::parse("example.org").unwrap(), LeftFor::Session)]);
    drop(lock);
    assert_eq!((case.pass().left, case.left()), (Vec::new(), (0, 0)));
}

/// A session that requests the queue of a pass gets it.
#[test]
fn a_pass_yields_to_a_session() {
    let case = Case::new("");
    case.put(0, "x", &format!("{FROM}{TO}"));
    let config = ProviderConfig::load(&case.directory.path().join("provider.toml")).unwrap();
    let spool = Spool::new(&config, &Ids::fixed());
    let name = spool.name(&SpoolQueue::Held(Domain::parse("example.org").unwrap()));
    let lock = spool.queue().lock_yielding(&name).unwrap();
    assert!(!lock.takeover_requested());
    std::thread::scope(|scope| {
        let session = scope.spawn(|| spool.queue().lock_account(std::slice::from_ref(&name)).is_ok());
        while !lock.takeover_requested() {
            std::thread::yield_now();
        }
        drop(lock);
        assert!(session.join().unwrap());
    });
}

/// Otherwise its sender would get no DSN.
#[test]
fn a_message_stays_if_its_dsn_cannot_be_stored() {
    let case = Case::new("");
    case.put(14 * DAY, "x", &format!("{FROM}{TO}"));
    case.write("spool/outgoing", "a file where a directory should be");
    assert_eq!(case.pass().left.len(), 1);
    assert_eq!(case.left(), (1, 0));
    let outgoing: &Path = &case.directory.path().join("spool/outgoing");
    fs::remove_file(outgoing).unwrap();
    let case = Case { plan: ExpiryPlan::default(), ..case };
    assert_eq!((case.pass().left, case.left()), (Vec::new(), (0, 0)));
}

/// A domain is not listed before a message may be due, unless the configuration or the clock has changed.
#[test]
fn a_domain_is_listed_when_something_is_due() {
    let case = Case::new("");
    let config = ProviderConfig::load(&case.directory.path().join("provider.toml")).unwrap();
    let now = Clock::Fixed.now();
    let at = |seconds: i64| Timestamp::from_seconds(now.seconds() + seconds);
    let due = |accounts: &Accounts, now| case.plan.due(accounts, now).len();
    assert_eq!(due(&config.accounts, now), 1);
    case.put(14 * DAY - 100, "x", &format!("{FROM}{TO}"));
    case.pass();
    for (time, listed) in [(0, 0), (99, 0), (100, 1), (-1, 1)] {
        assert_eq!(due(&config.accounts, at(time)), listed, "{time}");
    }
    // While a pass hangs in the domain, no other pass begins it.
    let account = config.accounts.iter().next().unwrap();
    let under_way = case.plan.begin(account, &account.domains[0], now).unwrap();
    assert!(case.plan.begin(account, &account.domains[0], now).is_none());
    assert_eq!((due(&config.accounts, at(14 * DAY)), case.plan.stuck()), (0, 0));
    under_way.with_plan(|plan| plan.under_way = Instant::now().checked_sub(STUCK_AFTER));
    assert_eq!(case.plan.stuck(), 1);
    drop(under_way);
    assert_eq!(case.plan.stuck(), 0);
    case.account("expire-after = \"30d\"");
    let config = ProviderConfig::load(&case.directory.path().join("provider.toml")).unwrap();
    assert_eq!(due(&config.accounts, now), 1);
    case.account("expire-after = \"never\"");
    let config = ProviderConfig::load(&case.directory.path().join("provider.toml")).unwrap();
    assert_eq!(due(&config.accounts, now), 0);
}

/// A message with the time of a wrong clock has no age. Its age counts from the first pass that finds it.
#[test]
fn the_age_of_a_message_of_a_wrong_clock_counts_from_the_first_pass() {
    for age in [-5 * 365 * DAY, 50 * 365 * DAY] {
        let case = Case::new("");
        case.put(age, "x", &format!("{FROM}{TO}"));
        let named = Clock::Fixed.now().seconds() - age;
        let path = case.directory.path().join(format!("spool/domains/example.org/new/{named}.x"));
        let modified = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(named.unsigned_abs());
        fs::File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
        case.pass();
        assert_eq!(case.files("domains/example.org/new"), [format!("{named}.x,T={}", Clock::Fixed.now().seconds())]);
        let seen = Clock::Fixed.now().seconds() - 14 * DAY;
        fs::rename(
            path.with_file_name(format!("{named}.x,T={}", seen + 14 * DAY)),
            path.with_file_name(format!("{named}.x,T={seen}")),
        )
        .unwrap();
        let next = Case { plan: ExpiryPlan::default(), ..case };
        next.pass();
        assert_eq!(next.left(), (0, 0));
    }
}

/// A session that ends while a pass waits for its lock is a call.
#[test]
fn a_call_that_ends_during_the_pass_prevents_the_warning() {
    let case = Case::new("delay-warning = \"2h\"");
    case.put(3 * HOUR, "x", &format!("{FROM}{TO}"));
    let config = ProviderConfig::load(&case.directory.path().join("provider.toml")).unwrap();
    let spool = Spool::new(&config, &Ids::fixed());
    let name = spool.name(&SpoolQueue::Held(Domain::parse("example.org").unwrap()));
    let lock = spool.queue().lock_account(std::slice::from_ref(&name)).unwrap();
    let domain = Domain::parse("example.org").unwrap();
    std::thread::scope(|scope| {
        let pass = scope.spawn(|| case.pass_that_waits(Duration::from_secs(60)).left);
        while case.plan.0.lock().get(&domain).is_none_or(|plan| plan.under_way.is_none()) {
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_millis(200));
        case.call(0, "result=deferred");
        drop(lock);
        assert_eq!(pass.join().unwrap(), []);
    });
    assert_eq!((case.dsn().as_str(), case.left()), ("", (1, 0)));
}

/// If the DSN of one message cannot be stored, or the limit of its domain is reached, the others are handled all the same.
#[test]
fn a_message_without_its_dsn_does_not_delay_those_after_it() {
    let case = Case::new("delay-warning = \"2h\"");
    case.write(
        "customers.d/other.toml",
        "domains = [\"example.com\"]\nsecret = \"tanstaaftanstaaf\"\nexpire-after = \"never\"\n",
    );
    case.write("spool/domains/example.com", "a file where a directory should be");
    case.put(20 * DAY, "a", &format!("Return-Path: <eve@example.com>\n{TO}"));
    case.put(19 * DAY, "b", &format!("{FROM}{TO}"));
    assert_eq!(case.pass().left, [(Domain::parse("example.org").unwrap(), LeftFor::Failure)]);
    assert!(case.dsn().contains("To: <lester@dot.example>") && case.left() == (1, 0), "{}", case.dsn());

    let case = Case::new("delay-warning = \"2h\"");
    for number in 0..70 {
        case.put(4 * HOUR, &format!("{number}"), &format!("{FROM}{TO}"));
    }
    case.put(3 * HOUR, "b", &format!("Return-Path: <eve@world.example>\n{TO}"));
    assert_eq!(case.pass().left, [(Domain::parse("example.org").unwrap(), LeftFor::Dsns)]);
    let dsns = case.files("outgoing/@all/new");
    let text =
        |name: &String| fs::read_to_string(case.directory.path().join("spool/outgoing/@all/new").join(name)).unwrap();
    assert_eq!(dsns.iter().filter(|name| text(name).contains("To: <eve@world.example>")).count(), 1, "{}", dsns.len());
}

/// Files of other agents may be newer than their names, and are not due. Those after them expire.
#[test]
fn messages_that_are_not_due_do_not_delay_those_after_them() {
    let case = Case::new("");
    let copied = Clock::Fixed.now().seconds() - DAY;
    let copied = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(copied.unsigned_abs());
    for number in 0..150 {
        let named = Clock::Fixed.now().seconds() - 20 * DAY;
        let text = "Return-Path: <eva@world.example>\nDelivered-To: alice@example.org\nSubject: x\n\nx\n";
        let path = case.write(&format!("spool/domains/example.org/new/{named}.{number}.agent"), text);
        fs::File::options().write(true).open(path).unwrap().set_modified(copied).unwrap();
    }
    case.put(19 * DAY, "x", &format!("{FROM}{TO}"));
    let passes = (0..5).take_while(|_| case.pass().more).count();
    assert!(case.dsn().contains("To: <lester@dot.example>") && case.left() == (150, 0), "{:?}", case.left());
    assert_eq!(passes, 1);
}
