//! State files, which may be damaged. The input is one file, which each reader of a state file reads.

use std::fs;
use std::path::Path;
use std::time::Duration;

use odmr::clock::{Clock, Timestamp};
use odmr::mail::address::{Domain, Mailbox};
use odmr::maildir::{Maildir, Usage, UsageLimit};
use odmr::net::trace::quoted;
use odmr::provider::login_table::{Admission, AttemptEnd, AttemptOrigin, ClientNetwork, LoginTable};
use odmr::provider::unknown::{Learning, UnknownRecipients};
use odmr::report::calls::{CallRecord, CallResult, read_time};
use odmr::report::clock_history::ClockHistory;
use odmr::report::clock_watch::ClockWatch;

use super::check;
use super::directory::temporary_directory;

pub fn run(input: &[u8]) {
    let root = temporary_directory();
    let path = root.path().join("state");
    fs::write(&path, input).expect("a file");
    let text = String::from_utf8_lossy(input);
    call(&path);
    unknown(&path);
    clock(&text);
    logins(input);
    usage(root.path(), input);
    let _ = read_time(&path);
    let state = root.path().join(".odmr");
    fs::create_dir_all(&state).expect("a directory");
    fs::write(state.join("clock"), input).expect("a file");
    let watch = ClockWatch::new(root.path(), Clock::Fixed);
    watch.look();
    watch.age(now());
}

fn now() -> Timestamp {
    Clock::Fixed.now()
}

fn later(seconds: i64) -> Timestamp {
    Timestamp::from_seconds(now().seconds().saturating_add(seconds))
}

fn domain() -> Domain {
    Domain::parse("example.org").expect("a domain")
}

/// The record of a call. The next call replaces it, and that record must be readable.
fn call(path: &Path) {
    CallRecord::last_call(path, now());
    if let Some(record) = CallRecord::read(path) {
        record.next_call(&[domain()], Duration::from_secs(60), now());
        check::shown(&quoted(&record.reason));
    }
    CallRecord::new(now(), "[192.0.2.1]", CallResult::Done, "").write(path, "acme");
    let record = CallRecord::read(path).expect("what was written");
    assert_eq!((record.at, record.result, record.success), (now(), CallResult::Done, Some(now())));
    assert!(record.calls > 0);
}

fn unknown(path: &Path) {
    let known = UnknownRecipients::read(path).learned(now());
    assert!(known <= 100_000);
    let mut learning = Learning::new(path.to_owned(), now());
    learning.rejected(&Mailbox::parse("bob@example.org").expect("a mailbox"));
    learning.write("acme");
    UnknownRecipients::read(path).learned(later(7200));
}

fn clock(text: &str) {
    let Some(mut history) = ClockHistory::parse(text) else { return };
    assert_eq!(ClockHistory::parse(&history.text()).as_ref(), Some(&history), "{}", history.text());
    for step in [0, 60, -86_400, 400 * 86_400, i64::MAX, i64::MIN, 0] {
        history.look(later(step));
        for arrived in [-1_000_000, 0, 1_000_000].map(later) {
            // No message is older than its time of arrival and the clock permit.
            let most = u64::try_from(history.seen.seconds() - arrived.seconds()).unwrap_or(0);
            assert!(history.age(arrived).as_secs() <= most, "{}", history.text());
        }
        history.when(now(), Duration::from_secs(3600));
        assert!(history.text().len() < 64 * 1024);
    }
}

fn logins(text: &[u8]) {
    let (table, _) = LoginTable::parse(text);
    let written = table.text();
    let (mut table, wrong) = LoginTable::parse(written.as_bytes());
    assert_eq!((table.text(), wrong), (written, 0));
    let address = "192.0.2.1".parse().ok();
    let attempt = AttemptOrigin { id: "1".to_owned(), address, account: [1; 16] };
    for (moment, end) in [(0, AttemptEnd::Failed), (1, AttemptEnd::Succeeded), (2, AttemptEnd::Withdrawn)] {
        let at = now().seconds() + moment;
        let counted = match table.begin(&attempt, at) {
            Admission::Free => false,
            Admission::Delayed(seconds) => {
                assert!((1..=30).contains(&seconds));
                true
            }
            Admission::Rejected => continue,
        };
        table.end(&attempt, counted, end, at);
        assert!(!table.is_displaced(&attempt.id));
        assert!(end != AttemptEnd::Succeeded || table.knows(ClientNetwork::of(address)));
    }
}

/// A wrong record of usage must not reject mail: the files are counted first.
fn usage(root: &Path, input: &[u8]) {
    let directory = root.join(".odmr");
    fs::create_dir_all(&directory).expect("a directory");
    fs::write(directory.join("usage-acme"), input).expect("a file");
    let limit = Usage { octets: 1000, messages: 2 };
    let usage = UsageLimit::new(root, "acme", vec![Maildir::new(root.join("held"))], limit);
    let more = Usage { octets: 1, messages: 1 };
    usage.is_far(more);
    let _ = usage.check(more);
    usage.recount_next().expect("a file");
    assert!(usage.check(more).is_ok());
}
