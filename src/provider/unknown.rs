//! `recipients = "learn"`: the provider learns from a customer's calls which recipients its server does not know.
//!
//! A recipient that was rejected with 5.1.1 in two calls, at least an hour apart, is *learned*: RCPT gets 550 5.1.1. So
//! the sender's own server reports the rejection, and no DSN goes to a forged sender. The provider forgets a recipient
//! when the customer accepts it, with any spelling of its local part, and a day after its last rejection, so that a new
//! mailbox gets its mail soon. Only the rejected spelling is learned: RFC 5321 section 2.4 permits `BOB` and `bob` to
//! be two mailboxes, and an untrusted client that sends to a missing one must not cause rejections of the other. The
//! postmaster is never learned.
//!
//! Each account has one file, `SPOOL/.odmr/unknown-ACCOUNT`. A turned session replaces it at its end, while it has the lock of
//! the account:
//!
//! ```text
//! 1795689600 1795693200 bob@example.org     first and last rejection, in seconds since 1970
//! ```
//!
//! If the file is lost or damaged, the recipients are learned anew. A time in the future, or before this program existed,
//! comes from a wrong clock: that recipient is forgotten.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::clock::Timestamp;
use crate::file_stamp::FileStamp;
use crate::mail::address::Mailbox;
use crate::maildir::{read_state_file, remove_if_there, replace_file, with_path};
use crate::net::trace::quoted;
use crate::sorting::sort_by;
use crate::threads::Guarded;

/// The least time from the first to the last rejection of a learned recipient, in seconds.
const LEARNED_AFTER: i64 = 60 * 60;

/// Seconds after its last rejection when a recipient is forgotten.
const FORGOTTEN_AFTER: i64 = 24 * 60 * 60;

/// The maximum of recipients in a file; the oldest are forgotten.
const RECIPIENTS_LIMIT: usize = if cfg!(test) { 100 } else { 10_000 };

/// The maximum size of a file in octets: two times and an address for each recipient.
const FILE_LIMIT: u64 = 400 * RECIPIENTS_LIMIT as u64;

/// The maximum of accounts whose files are cached; after it, the cache is emptied.
const ACCOUNTS_LIMIT: usize = 100;

/// The recipients of an account that were rejected lately, each by one key for all spellings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnknownRecipients(HashMap<String, UnknownRecipient>);

/// When a recipient was rejected.
#[derive(Clone, Debug, PartialEq, Eq)]
struct UnknownRecipient {
    /// In the spelling that was rejected.
    address: String,
    first: Timestamp,
    last: Timestamp,
}

impl UnknownRecipient {
    /// Whether it still counts: less than a day has passed, and the clock was right.
    fn counts(&self, now: Timestamp) -> bool {
        let possible = self.first.is_possible(now) && self.last.is_possible(now);
        possible && now.seconds() - self.last.seconds() < FORGOTTEN_AFTER
    }

    fn is_learned(&self, now: Timestamp) -> bool {
        self.counts(now) && self.last.seconds() - self.first.seconds() >= LEARNED_AFTER
    }
}

/// One key for all spellings of an address.
fn key(address: &str) -> String {
    address.to_ascii_lowercase()
}

/// Whether this address can be in a line of the file.
fn is_plain(address: &str) -> bool {
    address.contains('@') && !address.contains(char::is_control)
}

impl UnknownRecipients {
    /// Reads the file of an account. If it is missing, or damaged, which is logged, the result is empty.
    pub fn read(path: &Path) -> UnknownRecipients {
        let read = match read_state_file(path, FILE_LIMIT + 1) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return UnknownRecipients::default(),
            read => {
                read.and_then(|text| UnknownRecipients::parse(&text).ok_or_else(|| io::Error::other("it is damaged")))
            }
        };
        read.unwrap_or_else(|error| {
            log::warn!("event=learned-unreadable error={}", quoted(with_path(path, error)));
            UnknownRecipients::default()
        })
    }

    fn parse(text: &str) -> Option<UnknownRecipients> {
        let recipients = text.lines().map(|line| {
            let mut fields = line.splitn(3, ' ');
            let mut time = || fields.next()?.parse().ok().map(Timestamp::from_seconds);
            let (first, last) = (time()?, time()?);
            let address = fields.next().filter(|address| is_plain(address))?;
            Some((key(address), UnknownRecipient { address: address.to_owned(), first, last }))
        });
        let recipients: Option<HashMap<_, _>> = recipients.collect();
        let fits = text.len() as u64 <= FILE_LIMIT && (text.is_empty() || text.ends_with('\n'));
        recipients.filter(|_| fits).map(UnknownRecipients)
    }

    /// The text of the file, with the latest rejections.
    fn text(&self) -> String {
        let mut recipients: Vec<_> = self.0.values().collect();
        let key = |unknown: &UnknownRecipient| (Reverse(unknown.last), unknown.first);
        sort_by(&mut recipients, |one, other| key(one).cmp(&key(other)).then_with(|| one.address.cmp(&other.address)));
        let mut text = String::new();
        for UnknownRecipient { address, first, last } in recipients.into_iter().take(RECIPIENTS_LIMIT) {
            let _ = writeln!(text, "{} {} {address}", first.seconds(), last.seconds());
        }
        text
    }

    /// The number of learned recipients.
    pub fn learned(&self, now: Timestamp) -> usize {
        self.0.values().filter(|unknown| unknown.is_learned(now)).count()
    }

    fn is_learned(&self, mailbox: &Mailbox, now: Timestamp) -> bool {
        let address = mailbox.canonical().to_string();
        self.0.get(&key(&address)).is_some_and(|unknown| unknown.address == address && unknown.is_learned(now))
    }
}

/// The recipients that one turned session learns and forgets.
pub struct Learning {
    path: PathBuf,
    /// When the session began. All its rejections have this time, as they are of one call.
    begun: Timestamp,
    /// `None`: the file was not read yet.
    recipients: Option<UnknownRecipients>,
    /// Keys of the recipients that the session has accepted. They are not learned even if a rejection is recorded after
    /// that: its settlement may have been postponed.
    accepted: HashSet<String>,
    changed: bool,
}

impl Learning {
    /// `path`: the file of the account.
    pub fn new(path: PathBuf, begun: Timestamp) -> Learning {
        Learning { path, begun, recipients: None, accepted: HashSet::new(), changed: false }
    }

    fn recipients(&mut self) -> &mut HashMap<String, UnknownRecipient> {
        let (path, begun) = (&self.path, self.begun);
        let recipients = self.recipients.get_or_insert_with(|| {
            let mut read = UnknownRecipients::read(path);
            read.0.retain(|_, unknown| unknown.counts(begun));
            read
        });
        &mut recipients.0
    }

    /// Forgets a recipient: the customer's server has accepted it.
    pub fn accepted(&mut self, mailbox: &Mailbox) {
        let key = key(&mailbox.canonical().to_string());
        self.changed |= self.recipients().remove(&key).is_some();
        if self.accepted.len() < RECIPIENTS_LIMIT {
            self.accepted.insert(key);
        }
    }

    /// Records that the customer's server has rejected a recipient with 5.1.1. Returns whether the recipient is learned
    /// now, and was not before.
    pub fn rejected(&mut self, mailbox: &Mailbox) -> bool {
        // RFC 5321 section 4.5.1: every server must accept mail for the postmaster.
        if mailbox.local().eq_ignore_ascii_case("postmaster") || !self.begun.is_possible(self.begun) {
            return false;
        }
        let address = mailbox.canonical().to_string();
        let (key, begun) = (key(&address), self.begun);
        // If `accepted` is full, this recipient may have been accepted without a record of it.
        if self.accepted.len() >= RECIPIENTS_LIMIT || self.accepted.contains(&key) || !is_plain(&address) {
            return false;
        }
        let recipients = self.recipients();
        let before = recipients.get(&key).filter(|unknown| unknown.address == address);
        if before.is_none() && recipients.len() >= 2 * RECIPIENTS_LIMIT {
            return false;
        }
        let was_learned = before.is_some_and(|unknown| unknown.is_learned(begun));
        let first = before.map_or(begun, |unknown| unknown.first);
        let unknown = UnknownRecipient { address, first, last: begun };
        let learned = unknown.is_learned(begun) && !was_learned;
        recipients.insert(key, unknown);
        self.changed = true;
        learned
    }

    /// Writes the file, if anything has changed. A failure is logged.
    pub fn write(self, account: &str) {
        if let Some(recipients) = self.recipients.filter(|_| self.changed) {
            log_not_recorded(replace_file(&self.path, &recipients.text()), account);
        }
    }
}

/// Removes the file of an account that does not learn. Otherwise, if the account learned again, recipients that its
/// server has accepted since then would be rejected. A failure is logged.
pub fn forget(path: &Path, account: &str) {
    log_not_recorded(remove_if_there(path), account);
}

fn log_not_recorded(recorded: io::Result<()>, account: &str) {
    if let Err(error) = recorded {
        log::warn!("event=learned-not-recorded account={account} error={}", quoted(error));
    }
}

/// A cache of the accounts' files: RCPT reads a file again only when it has changed.
#[derive(Default)]
pub struct UnknownCache(Guarded<HashMap<PathBuf, (FileStamp, Arc<UnknownRecipients>)>>);

impl UnknownCache {
    /// Whether a recipient of the account with this file is learned.
    pub fn is_learned(&self, path: &Path, mailbox: &Mailbox, now: Timestamp) -> bool {
        // The end of the next call logs the error.
        let Ok(found) = std::fs::metadata(path) else { return false };
        self.recipients(path, FileStamp::of(&found)).is_learned(mailbox, now)
    }

    fn recipients(&self, path: &Path, stamp: FileStamp) -> Arc<UnknownRecipients> {
        let files = || self.0.lock();
        if let Some((_, recipients)) = files().get(path).filter(|(read, _)| *read == stamp) {
            return recipients.clone();
        }
        // Read without the lock, so that other sessions do not wait for this file.
        let recipients = Arc::new(UnknownRecipients::read(path));
        let mut files = files();
        if files.len() >= ACCOUNTS_LIMIT {
            files.clear();
        }
        files.insert(path.to_owned(), (stamp, recipients.clone()));
        recipients
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_767_323_045;

    fn mailbox(text: &str) -> Mailbox {
        Mailbox::parse(text).unwrap()
    }

    fn time(seconds: i64) -> Timestamp {
        Timestamp::from_seconds(NOW + seconds)
    }

    /// One call in which the recipient is rejected `rejections` times, or accepted if that is 0.
    fn call(path: &Path, at: i64, address: &str, rejections: usize) {
        let mut learning = Learning::new(path.to_owned(), time(at));
        for _ in 0..rejections {
            learning.rejected(&mailbox(address));
        }
        if rejections == 0 {
            learning.accepted(&mailbox(address));
        }
        learning.write("acme");
    }

    #[test]
    fn a_recipient_is_learned_after_two_calls_an_hour_apart_and_forgotten_after_a_day_or_when_accepted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(".odmr/unknown-acme");
        let cache = UnknownCache::default();
        let learned = |address: &str, at| cache.is_learned(&path, &mailbox(address), time(at));
        call(&path, 0, "Bob@example.org", 2);
        assert!(!learned("Bob@example.org", 7200));
        call(&path, 3599, "Bob@example.org", 1);
        assert!(!learned("Bob@example.org", 7200));
        call(&path, 3600, "Bob@example.org", 1);
        assert!(learned("Bob@EXAMPLE.org", 3600) && learned("\"Bob\"@example.org", 3600));
        assert!(!learned("alice@example.org", 3600) && !learned("bob@example.com", 3600));
        assert!(learned("Bob@example.org", 3600 + 86_399) && !learned("Bob@example.org", 3600 + 86_400));
        call(&path, 4000, "boB@example.org", 0);
        assert!(!learned("Bob@example.org", 4000));
        for at in [0, 4000] {
            call(&path, at, "PostMaster@example.org", 1);
        }
        assert!(!learned("postmaster@example.org", 4000));
        // Two rejections more than a day apart do not count together.
        call(&path, 0, "carol@example.org", 1);
        call(&path, 90_000, "carol@example.org", 1);
        assert!(!learned("carol@example.org", 90_000));
        call(&path, 93_600, "carol@example.org", 1);
        assert!(learned("carol@example.org", 93_600));
        assert_eq!(UnknownRecipients::read(&path).learned(time(93_600)), 1);
    }

    /// RFC 5321 section 2.4: BOB and bob may be two mailboxes. Mail to a missing one must not cause rejections of the
    /// other.
    #[test]
    fn only_the_rejected_spelling_is_learned() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("unknown-acme");
        let cache = UnknownCache::default();
        let learned = |address: &str| cache.is_learned(&path, &mailbox(address), time(7200));
        // U+212A, KELVIN SIGN: its lower case is `k`.
        for (unknown, exists) in
            [("BOB@example.org", "bob@example.org"), ("\u{212a}ate@example.org", "kate@example.org")]
        {
            [0, 3600].iter().for_each(|at| call(&path, *at, unknown, 1));
            assert!(learned(unknown) && !learned(exists), "{exists}");
        }
        assert!(learned("\"BOB\"@Example.ORG"));
        // But if the server accepts one spelling, all are forgotten.
        call(&path, 3700, "Bob@example.org", 0);
        assert!(!learned("BOB@example.org"));
        // One rejection each of two spellings.
        call(&path, 3800, "carol@example.org", 1);
        call(&path, 7400, "Carol@example.org", 1);
        assert!(!learned("carol@example.org") && !learned("Carol@example.org"));
    }

    /// A postponed rejection is settled after later messages.
    #[test]
    fn a_recipient_that_the_session_has_accepted_is_not_learned() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("unknown-acme");
        let bob = mailbox("bob@example.org");
        for at in [0, 3600] {
            let mut learning = Learning::new(path.clone(), time(at));
            learning.accepted(&bob);
            assert!(!learning.rejected(&bob));
            learning.write("acme");
        }
        call(&path, 7200, "bob@example.org", 1);
        assert!(!UnknownCache::default().is_learned(&path, &bob, time(7200)));
    }

    #[test]
    fn rejections_under_a_wrong_clock_do_not_count() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("unknown-acme");
        let year = 365 * 86_400;
        let learned = |at| UnknownCache::default().is_learned(&path, &mailbox("bob@example.org"), time(at));
        for (calls, asked) in [
            (&[0, 3 * year][..], 3 * year),
            (&[3 * year, 0], 0),
            (&[3 * year, 3 * year + 3600], 0),
            (&[-NOW, 3600 - NOW], 3600 - NOW),
            (&[-NOW, 0], 0),
        ] {
            calls.iter().for_each(|at| call(&path, *at, "bob@example.org", 1));
            assert!(!learned(asked), "{calls:?}");
            call(&path, asked, "bob@example.org", 0);
            std::fs::write(&path, "").unwrap();
        }
    }

    #[test]
    fn a_file_is_limited_and_a_damaged_one_is_empty() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("unknown-acme");
        let address = |number: usize| mailbox(&format!("u{number}@example.org"));
        for (at, numbers, expected) in [(0, 0..10, 0), (3600, 0..5 * RECIPIENTS_LIMIT, 10)] {
            let mut learning = Learning::new(path.clone(), time(at));
            let learned = numbers.filter(|number| learning.rejected(&address(*number))).count();
            assert_eq!(learned, expected);
            learning.write("acme");
            assert!(UnknownRecipients::read(&path).0.len() <= RECIPIENTS_LIMIT);
        }
        let good = std::fs::read_to_string(&path).unwrap();
        assert_eq!(UnknownRecipients::parse(&good).unwrap().text(), good);
        let long = "1 2 a@example.org\n".repeat(FILE_LIMIT as usize / 10);
        for bad in ["1 2 a@example.org", "1 2\n", "x 2 a@example.org\n", "1 2 a\n", "\n", "\0\0\0", &long] {
            std::fs::write(&path, bad).unwrap();
            assert_eq!(UnknownRecipients::read(&path), UnknownRecipients::default());
        }
        std::fs::write(&path, b"\xff").unwrap();
        assert_eq!(UnknownRecipients::read(&path), UnknownRecipients::default());
    }
}
