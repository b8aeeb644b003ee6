//! The record of the last call of an account, in a small file, for `odmr status` and for DSNs.
//!
//! ```text
//! at=2026-01-02T03:04:05Z       when the call ended
//! peer=[192.0.2.1]              the other side: the customer's address, or the provider as configured
//! result=done                   done, no-mail, deferred (mail was deferred, or left by a stop or a reload) or failed
//! reason=…                      why it failed
//! duration=1.234                seconds
//! success=2026-01-02T03:04:05Z  when the last call that did not fail ended
//! calls=12                      the number of calls since the file was made
//! failed=1                      the number of those that failed
//! no-mail=2026-01-02T03:04:05Z a.example,b.example
//!                               when a call without mail ended, and the domains that it asked for; without them: all of
//!                               the account. A provider with `min-interval` writes one for each call in that time
//! count sent=3                  the counters of this call, a line each
//! ```
//!
//! The file is replaced in one step. If it is lost, no mail is lost: only the status lacks the call.

use std::fmt::Write as _;
use std::io;
use std::path::Path;
use std::time::Duration;

use crate::clock::Timestamp;
use crate::mail::address::Domain;
use crate::maildir::{read_state_file, replace_file};
use crate::net::trace::quoted;

/// Octets of a record that are read at most.
const RECORD_LIMIT: u64 = 1 << 24;

/// The result of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallResult {
    /// The session ended with QUIT, and no mail was deferred.
    Done,
    /// There was no mail for the customer.
    NoMail,
    /// Mail was deferred, or was left because the session was stopped.
    Deferred,
    Failed,
}

impl CallResult {
    const ALL: [CallResult; 4] = [CallResult::Done, CallResult::NoMail, CallResult::Deferred, CallResult::Failed];

    /// The word in the file and in the status.
    pub fn word(self) -> &'static str {
        match self {
            CallResult::Done => "done",
            CallResult::NoMail => "no-mail",
            CallResult::Deferred => "deferred",
            CallResult::Failed => "failed",
        }
    }
}

/// When an account last called, for DSNs about held mail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LastCall {
    /// No call is known.
    Never,
    At(Timestamp),
    /// The record cannot be read, or the clock was wrong.
    Unknown,
}

/// The last call of an account.
#[derive(Clone, Debug, PartialEq)]
pub struct CallRecord {
    /// When the call ended.
    pub at: Timestamp,
    /// The customer's address, or the provider as configured.
    pub peer: String,
    pub result: CallResult,
    /// Why the call failed; it may be empty if it did not.
    pub reason: String,
    pub duration: Duration,
    /// When the last call that did not fail ended.
    pub success: Option<Timestamp>,
    /// The number of calls since the file was made.
    pub calls: u64,
    /// The number of those that failed.
    pub failed: u64,
    /// The last calls without mail, the oldest first.
    pub without_mail: Vec<CallWithoutMail>,
    /// The counters of this call; empty at the provider if the connection did not turn.
    pub counts: Vec<(String, u64)>,
}

/// A call for which there was no mail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallWithoutMail {
    /// When the call ended.
    pub at: Timestamp,
    /// The domains that the call asked for; empty: all of the account.
    pub domains: Vec<String>,
}

/// The most calls without mail in a record; then the oldest are removed.
const WITHOUT_MAIL_LIMIT: usize = 1000;

impl CallWithoutMail {
    /// A call for these domains that ended at `at`.
    pub fn new(at: Timestamp, domains: &[Domain]) -> CallWithoutMail {
        CallWithoutMail { at, domains: domains.iter().map(Domain::to_string).collect() }
    }

    /// Adds this call to the calls before it. Removes from them those of more than `interval` ago, and the domains of
    /// this call.
    pub fn add_to(self, mut before: Vec<CallWithoutMail>, interval: Duration) -> Vec<CallWithoutMail> {
        before.retain_mut(|call| {
            let is_for_all = call.domains.is_empty();
            call.domains.retain(|domain| !self.domains.contains(domain));
            let counts = !self.domains.is_empty() && (is_for_all || !call.domains.is_empty());
            counts && call.permitted_at(&[], interval, self.at).is_some()
        });
        before.push(self);
        before.drain(..before.len().saturating_sub(WITHOUT_MAIL_LIMIT));
        before
    }

    /// When a call for these domains, or if there are none for all, is permitted again after this one. `None`: it is
    /// permitted now, because it is for other domains, or `interval` has passed. If this call ended in the future, a
    /// clock was wrong, and it does not count.
    fn permitted_at(&self, domains: &[Domain], interval: Duration, now: Timestamp) -> Option<Timestamp> {
        let asks_again = |domain: &Domain| self.domains.iter().any(|other| other == domain.as_str());
        let is_repeated = domains.is_empty() || self.domains.is_empty() || domains.iter().any(asks_again);
        // A part of a second counts as a whole one.
        let seconds = interval.as_secs() + u64::from(interval.subsec_nanos() > 0);
        let next = self.at.seconds().saturating_add(i64::try_from(seconds).unwrap_or(i64::MAX));
        (is_repeated && self.at <= now && now.seconds() < next).then(|| Timestamp::from_seconds(next))
    }

    /// Reads a line of a record.
    fn parse(line: &str) -> Option<CallWithoutMail> {
        let line = line.strip_prefix("no-mail=")?;
        let (at, domains) = line.split_once(' ').unwrap_or((line, ""));
        let domains = domains.split(',').filter(|name| !name.is_empty());
        Some(CallWithoutMail { at: Timestamp::parse_rfc3339(at)?, domains: domains.map(str::to_owned).collect() })
    }
}

impl CallRecord {
    /// When a call for these domains, or if there are none for all, is permitted again. `None`: now.
    pub fn next_call(&self, domains: &[Domain], interval: Duration, now: Timestamp) -> Option<Timestamp> {
        self.without_mail.iter().filter_map(|call| call.permitted_at(domains, interval, now)).max()
    }

    /// The record of a call that ended at `at`, without counters.
    pub fn new(at: Timestamp, peer: &str, result: CallResult, reason: &str) -> CallRecord {
        let (peer, reason) = (peer.to_owned(), reason.to_owned());
        CallRecord {
            at,
            peer,
            result,
            reason,
            duration: Duration::ZERO,
            success: None,
            calls: 0,
            failed: 0,
            without_mail: Vec::new(),
            counts: Vec::new(),
        }
    }

    /// The record of a reload: the configuration was read, or could not be because of this error.
    pub fn of_reload(at: Timestamp, error: Option<&str>) -> CallRecord {
        let result = if error.is_some() { CallResult::Failed } else { CallResult::Done };
        CallRecord::new(at, "-", result, error.unwrap_or_default())
    }

    /// Reads a record; `None`: there is none, or it is damaged.
    pub fn read(path: &Path) -> Option<CallRecord> {
        CallRecord::parse(&read_state_file(path, RECORD_LIMIT).ok()?)
    }

    /// When the account last called. A call counts if its connection turned, or if there was no mail.
    pub fn last_call(path: &Path, now: Timestamp) -> LastCall {
        let Some(record) = CallRecord::read(path) else {
            return if path.exists() { LastCall::Unknown } else { LastCall::Never };
        };
        // Only a session that turned has counters.
        let counts = record.result != CallResult::Failed || !record.counts.is_empty();
        match if counts { Some(record.at) } else { record.success } {
            None => LastCall::Never,
            Some(at) if at.is_possible(now) => LastCall::At(at),
            Some(_) => LastCall::Unknown,
        }
    }

    fn parse(text: &str) -> Option<CallRecord> {
        let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        let time = |key| value(key).and_then(Timestamp::parse_rfc3339);
        let number = |key| value(key).and_then(|number| number.parse().ok()).unwrap_or(0);
        let result = value("result")?;
        let counts = text.lines().filter_map(|line| line.strip_prefix("count ")?.split_once('='));
        Some(CallRecord {
            at: time("at")?,
            peer: value("peer").unwrap_or("-").to_owned(),
            result: CallResult::ALL.into_iter().find(|known| known.word() == result)?,
            reason: value("reason").unwrap_or_default().to_owned(),
            duration: value("duration").and_then(parse_seconds).unwrap_or_default(),
            success: time("success"),
            calls: number("calls"),
            failed: number("failed"),
            without_mail: text.lines().filter_map(CallWithoutMail::parse).collect(),
            counts: counts.filter_map(|(key, count)| Some((key.to_owned(), count.parse().ok()?))).collect(),
        })
    }

    /// Replaces the record in the file by this one, and adds its numbers of calls. A failure is logged.
    pub fn write(mut self, path: &Path, account: &str) {
        let before = CallRecord::read(path);
        let failed = self.result == CallResult::Failed;
        (self.calls, self.failed) = before.as_ref().map_or((0, 0), |before| (before.calls, before.failed));
        self.calls = self.calls.saturating_add(1);
        self.failed = self.failed.saturating_add(u64::from(failed));
        let (success, without_mail) = before.map(|before| (before.success, before.without_mail)).unwrap_or_default();
        self.success = if failed { success } else { Some(self.at) };
        if self.without_mail.is_empty() {
            self.without_mail = without_mail;
        }
        if let Err(error) = replace_file(path, &self.text()) {
            log::warn!("event=call-not-recorded account={account} error={}", quoted(error));
        }
    }

    fn text(&self) -> String {
        let line = |text: &str| text.replace(|character: char| character.is_control(), " ");
        let mut text = format!(
            "at={}\npeer={}\nresult={}\nreason={}\nduration={}\n",
            self.at.rfc3339(),
            line(&self.peer),
            self.result.word(),
            line(&self.reason),
            seconds(self.duration),
        );
        if let Some(success) = self.success {
            let _ = writeln!(text, "success={}", success.rfc3339());
        }
        let _ = write!(text, "calls={}\nfailed={}\n", self.calls, self.failed);
        for CallWithoutMail { at, domains } in &self.without_mail {
            let _ = writeln!(text, "{}", format!("no-mail={} {}", at.rfc3339(), domains.join(",")).trim_end());
        }
        for (key, count) in &self.counts {
            let _ = writeln!(text, "count {key}={count}");
        }
        text
    }
}

/// A duration in seconds with three decimals.
pub fn seconds(duration: Duration) -> String {
    format!("{}.{:03}", duration.as_secs(), duration.subsec_millis())
}

fn parse_seconds(text: &str) -> Option<Duration> {
    let (seconds, thousandths) = text.split_once('.')?;
    Duration::from_secs(seconds.parse().ok()?).checked_add(Duration::from_millis(thousandths.parse().ok()?))
}

/// Writes a time, such as that of the next call, into a file.
///
/// # Errors
/// The system's; the file is unchanged.
pub fn write_time(path: &Path, time: Timestamp) -> io::Result<()> {
    replace_file(path, &format!("{}\n", time.rfc3339()))
}

/// Reads a time that [`write_time`] has written. `None`: there is none, or the file is damaged.
pub fn read_time(path: &Path) -> Option<Timestamp> {
    Timestamp::parse_rfc3339(read_state_file(path, 100).ok()?.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The user that owns the mail may have made them, so that root reads another file or hangs.
    #[test]
    fn a_link_and_a_pipe_are_not_read_as_a_record() {
        let directory = tempfile::tempdir().unwrap();
        let [file, link, pipe] = ["file", "link", "pipe"].map(|name| directory.path().join(name));
        CallRecord::of_reload(Timestamp::from_seconds(1), None).write(&file, "-");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        assert!(CallRecord::read(&file).is_some());
        assert_eq!((CallRecord::read(&link), CallRecord::read(&pipe)), (None, None));
    }

    #[test]
    fn a_record_is_read_as_it_was_written_and_calls_are_counted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state/call-acme");
        assert_eq!(CallRecord::read(&path), None);
        let time = Timestamp::from_seconds;
        let record = |at, result| CallRecord {
            counts: vec![("sent".to_owned(), 3)],
            duration: Duration::from_millis(1_050),
            ..CallRecord::new(time(at), "[192.0.2.1]", result, "a\nb=c")
        };
        let domains = ["a.example", "b.example"].map(|name| Domain::parse(name).unwrap());
        let call = |domains| CallWithoutMail::new(time(1_767_323_045), domains);
        let without_mail = vec![call(&domains), call(&[])];
        CallRecord { without_mail: without_mail.clone(), ..record(1_767_323_045, CallResult::Done) }
            .write(&path, "acme");
        record(1_767_323_046, CallResult::Failed).write(&path, "acme");
        let read = CallRecord::read(&path).unwrap();
        let expected = CallRecord {
            success: Some(time(1_767_323_045)),
            calls: 2,
            failed: 1,
            reason: "a b=c".to_owned(),
            without_mail,
            ..record(1_767_323_046, CallResult::Failed)
        };
        assert_eq!(read, expected);
        // A power cut may leave an empty file.
        std::fs::write(&path, "").unwrap();
        assert_eq!(CallRecord::read(&path), None);
        record(1_767_323_047, CallResult::NoMail).write(&path, "acme");
        assert_eq!(CallRecord::read(&path).map(|record| record.calls), Some(1));
        // A disk with errors may leave any numbers.
        let most = u64::MAX;
        let text =
            format!("at=2026-01-02T03:04:05Z\nresult=done\nduration={most}.{most}\ncalls={most}\nfailed={most}\n");
        std::fs::write(&path, text).unwrap();
        record(1_767_323_048, CallResult::Failed).write(&path, "acme");
        let read = CallRecord::read(&path).unwrap();
        assert_eq!((read.at, read.calls, read.failed), (time(1_767_323_048), most, most));
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn the_next_call_waits_for_an_interval_after_one_without_mail() {
        let (time, interval) = (Timestamp::from_seconds, Duration::from_millis(9_500));
        let [a, b, c] = ["a.example", "b.example", "c.example"].map(|name| Domain::parse(name).unwrap());
        let all = CallWithoutMail::new(time(100), &[]);
        for (now, next) in [(99, None), (100, Some(110)), (109, Some(110)), (110, None), (i64::MAX, None), (0, None)] {
            assert_eq!(all.permitted_at(&[], interval, time(now)).map(Timestamp::seconds), next, "{now}");
        }
        assert!(all.permitted_at(std::slice::from_ref(&c), interval, time(101)).is_some());

        let mut record = CallRecord::new(time(100), "-", CallResult::NoMail, "");
        let add = |record: &mut CallRecord, at, domains: &[&Domain]| {
            let domains: Vec<_> = domains.iter().map(|domain| (*domain).clone()).collect();
            let before = std::mem::take(&mut record.without_mail);
            record.without_mail = CallWithoutMail::new(time(at), &domains).add_to(before, interval);
        };
        let next = |record: &CallRecord, now, domains: &[&Domain]| {
            let domains: Vec<_> = domains.iter().map(|domain| (*domain).clone()).collect();
            record.next_call(&domains, interval, time(now)).map(Timestamp::seconds)
        };
        // The customer asks for one domain after the other: the interval of each counts from its own call.
        add(&mut record, 100, &[&a]);
        add(&mut record, 105, &[&b]);
        assert_eq!(
            [&[][..], &[&a], &[&b], &[&c, &a]].map(|domains| next(&record, 106, domains)),
            [Some(115), Some(110), Some(115), Some(110)]
        );
        assert_eq!((next(&record, 106, &[&c]), next(&record, 110, &[&a])), (None, None));
        add(&mut record, 110, &[&a]);
        assert_eq!(record.without_mail.len(), 2);
        assert_eq!([&a, &b].map(|domain| next(&record, 114, &[domain])), [Some(120), Some(115)]);
        add(&mut record, 116, &[&c]);
        assert_eq!(record.without_mail.len(), 2, "a call before the interval is forgotten");
        add(&mut record, 117, &[]);
        assert_eq!(record.without_mail, [CallWithoutMail::new(time(117), &[])]);
    }
}
