//! Counts what one call receives and sends, for the progress line during the call and the summary after it.
//!
//! A recipient that we defer may be accepted when the provider offers the message again in the same call, for instance
//! if there were too many for one transaction. So the counters store which recipients are deferred: the mail of those
//! that are left at the end of the call stays with the provider.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::io;

use crate::plural::counted;
use crate::smtp::reply::{Reply, Severity};
use crate::threads::Guarded;

/// The most failed recipients that a summary lists. The others are only counted.
const LISTED_FAILURES: usize = 50;

/// The length of a line of the summary, in octets, from which on it names no further recipient. A provider may name any
/// number of them.
const LISTED_FAILURE_LENGTH: usize = 1000;

/// Deferred recipients: their keys, and how many messages are deferred for each key.
pub type Deferred = HashMap<u64, u64>;

/// The counters of one call, shared by all threads that work for it.
#[derive(Debug, Default)]
pub struct CallCounters(Guarded<Counts>);

#[derive(Debug, Default)]
struct Counts {
    /// The result so far, without the deferred recipients and the failures.
    total: Summary,
    /// Messages with the same size, sender, recipient and ENVID have the same key. The keys are hashes, to save memory:
    /// if the disk is full, all mail of the provider is deferred.
    deferred: Deferred,
    /// The recipients that were deferred in a call that followed another at once. The provider may offer mail that was
    /// deferred in the call before again, or not.
    again: Option<Deferred>,
    hasher: RandomState,
    /// The first failures as lines of the summary, each with the key of the recipient if that is deferred.
    failures: Vec<(Option<u64>, String)>,
    /// Octets of the arriving message so far.
    arriving: u64,
    /// Octets of the arriving message as MAIL has announced them; 0: unknown.
    announced: u64,
    /// Messages that were waiting at the provider; 0: unknown.
    queued: u64,
    /// Why the outgoing queue could not be locked or read.
    outgoing_failure: Option<io::Error>,
}

impl CallCounters {
    /// Adds the number of messages that wait at the provider; 0 if it does not report the number.
    pub fn add_queued(&self, messages: u64) {
        self.0.lock().queued += messages;
    }

    /// A message begins. `octets`: its size as MAIL has announced it, or 0.
    pub fn begin_message(&self, octets: u64) {
        let mut counts = self.0.lock();
        (counts.announced, counts.arriving) = (octets, 0);
    }

    /// Adds octets of the content of the message that is arriving.
    pub fn add_octets(&self, octets: usize) {
        self.0.lock().arriving += octets as u64;
    }

    /// The message was accepted.
    pub fn message_done(&self) {
        let mut counts = self.0.lock();
        counts.total.messages += 1;
        counts.total.octets += counts.arriving;
        (counts.announced, counts.arriving) = (0, 0);
    }

    /// A recipient was rejected (5yz) or deferred (4yz). `by`: the host that decided, for the summary.
    pub fn not_accepted(&self, recipient: &MessageRecipient<'_>, by: impl fmt::Display, reply: &Reply) {
        let mut counts = self.0.lock();
        // After "too many recipients" (4.5.3) the provider sends the same message again, perhaps several times. Do not
        // count it as another message.
        let is_permanent = reply.severity() == Severity::Permanent;
        if is_permanent || reply.enhanced() == Some("4.5.3") {
            counts.release(recipient);
        }
        let (key, word) = match is_permanent {
            true => {
                counts.total.rejected += 1;
                (None, "rejected")
            }
            false => {
                let key = counts.key(recipient);
                if !counts.defer(key) {
                    return;
                }
                (Some(key), "deferred")
            }
        };
        if counts.failures.len() < LISTED_FAILURES {
            let MessageRecipient { from, to, .. } = recipient;
            let to = if to.is_empty() { "-".to_owned() } else { format!("<{to}>") };
            counts.failures.push((key, format!("from <{from}> to {to}: {word} by {by}: {reply}")));
        }
    }

    /// Adds a recipient to the line of a message that was deferred at MAIL, unless the line is too long already.
    pub fn name_recipient(&self, message: &MessageRecipient<'_>, to: &str) {
        let mut counts = self.0.lock();
        let key = Some(counts.key(message));
        if let Some((_, text)) = counts.failures.iter_mut().rev().find(|(deferred, _)| *deferred == key)
            && text.len() < LISTED_FAILURE_LENGTH
        {
            *text = match text.contains(" to -: deferred") {
                true => text.replacen(" to -: deferred", &format!(" to <{to}>: deferred"), 1),
                false => text.replacen(">: deferred", &format!(">, <{to}>: deferred"), 1),
            };
        }
    }

    /// A recipient was accepted; if `recipient` has no address, MAIL was accepted. It is not deferred any more.
    pub fn accepted(&self, recipient: &MessageRecipient<'_>) {
        self.0.lock().release(recipient);
    }

    /// A call begins.
    pub fn begin_call(&self) {
        self.0.lock().again = None;
    }

    /// A call begins that follows a call to the same provider at once.
    pub fn begin_next_call(&self) {
        self.0.lock().again = Some(Deferred::default());
    }

    /// The recipients that are deferred now, for [`CallCounters::offered_again`].
    pub fn deferred(&self) -> Deferred {
        self.0.lock().deferred.clone()
    }

    /// The provider begins to offer all of its mail again. Forgets the recipients that were deferred, except those
    /// `before`: otherwise they would count twice if they are deferred again, and once if they are accepted now.
    pub fn offered_again(&self, before: &Deferred) {
        let mut counts = self.0.lock();
        counts.deferred.clone_from(before);
        counts.failures.retain(|(key, _)| key.is_none_or(|key| before.contains_key(&key)));
    }

    /// An outgoing message was sent to at least one recipient.
    pub fn sent(&self) {
        self.0.lock().total.sent += 1;
    }

    /// The outgoing queue cannot be locked or read. The first failure is stored.
    pub fn outgoing_failed(&self, error: io::Error) {
        self.0.lock().outgoing_failure.get_or_insert(error);
    }

    /// Removes and returns the failure of the outgoing queue.
    pub fn take_outgoing_failure(&self) -> Option<io::Error> {
        self.0.lock().outgoing_failure.take()
    }

    /// Sets how many outgoing messages wait for another call.
    pub fn set_waiting(&self, messages: u64) {
        self.0.lock().total.waiting = messages;
    }

    /// The result so far. `seconds`: the duration of the call.
    pub fn summary(&self, seconds: f64) -> Summary {
        let counts = self.0.lock();
        let deferred = counts.deferred.values().sum();
        let failures = counts.failures.iter().map(|(_, failure)| failure.clone()).collect();
        Summary { seconds, deferred, failures, ..counts.total.clone() }
    }

    /// The progress of the call, in one line without a line end.
    pub fn progress(&self) -> String {
        let Counts { total: Summary { messages, octets, sent, .. }, arriving, announced, queued, .. } = &*self.0.lock();
        let all = counted(*queued.max(messages), "message", "messages");
        let of_all = if *queued > 0 { format!("{messages} of {all}") } else { all };
        let mut line = format!("{of_all}, {}", human_size(octets + arriving));
        if *announced > 0 {
            line += &format!(" (now {} of {})", human_size(*arriving.min(announced)), human_size(*announced));
        }
        if *sent > 0 {
            line += &format!(", {sent} sent");
        }
        line
    }
}

impl Counts {
    fn key(&self, recipient: &MessageRecipient<'_>) -> u64 {
        let MessageRecipient { from, to, size, envelope_id } = recipient;
        // A provider may send an address again in another case.
        self.hasher.hash_one((from.to_lowercase(), to.to_lowercase(), size, envelope_id))
    }

    /// Counts a deferred recipient. Returns false if a call before has deferred it already.
    fn defer(&mut self, key: u64) -> bool {
        let deferred = self.deferred.entry(key).or_default();
        let again = self.again.as_mut().map(|again| again.entry(key).or_default());
        let is_new = again.is_none_or(|again| {
            *again += 1;
            *again > *deferred
        });
        *deferred += u64::from(is_new);
        is_new
    }

    /// Removes a recipient from the deferred ones, if it is among them. Of several messages with one key it removes
    /// one.
    fn release(&mut self, recipient: &MessageRecipient<'_>) {
        let key = self.key(recipient);
        let Some(count) = self.deferred.get_mut(&key) else { return };
        *count -= 1;
        if *count == 0 {
            self.deferred.remove(&key);
        }
        if let Some(again) = self.again.as_mut().and_then(|again| again.get_mut(&key)) {
            *again = again.saturating_sub(1);
        }
        if let Some(listed) = self.failures.iter().position(|(deferred, _)| *deferred == Some(key)) {
            self.failures.remove(listed);
        }
    }
}

/// A recipient of a message. The parameters of MAIL distinguish it from recipients of other messages.
#[derive(Clone, Copy, Debug)]
pub struct MessageRecipient<'a> {
    /// The reverse path; empty: the null sender.
    pub from: &'a str,
    /// The forward path; empty: MAIL was rejected or deferred, before any recipient was named.
    pub to: &'a str,
    /// `SIZE` in octets; 0: it was not announced.
    pub size: u64,
    /// `ENVID`.
    pub envelope_id: Option<&'a str>,
}

/// The result of a call.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    /// Incoming messages that were accepted.
    pub messages: u64,
    /// Octets of their content.
    pub octets: u64,
    /// Recipients that were rejected, of incoming and outgoing mail.
    pub rejected: u64,
    /// Recipients of incoming mail that we deferred and did not accept after that: their mail stays with the provider.
    pub deferred: u64,
    /// The first of the rejected and deferred recipients, a line for each, at most 50.
    pub failures: Vec<String>,
    /// Outgoing messages that were sent to at least one recipient.
    pub sent: u64,
    /// Outgoing messages that wait for another call.
    pub waiting: u64,
    /// The duration of the call, in seconds.
    pub seconds: f64,
}

impl fmt::Display for Summary {
    /// One line, and one for each listed failure.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (messages, bytes) = (counted(self.messages, "message", "messages"), counted(self.octets, "byte", "bytes"));
        write!(f, "{messages}, {bytes}, {:.1} seconds", self.seconds)?;
        for (count, one, several) in [
            (self.rejected, "recipient rejected", "recipients rejected"),
            (self.deferred, "deferred", "deferred"),
            (self.sent, "sent", "sent"),
            (self.waiting, "waiting to be sent", "waiting to be sent"),
        ] {
            if count > 0 {
                write!(f, ", {}", counted(count, one, several))?;
            }
        }
        self.failure_lines().iter().try_for_each(|failure| write!(f, "\n{failure}"))
    }
}

impl Summary {
    /// The rejected and deferred recipients: a line for each that is listed, and one with the number of the others.
    pub fn failure_lines(&self) -> Vec<String> {
        let more = (self.rejected + self.deferred).saturating_sub(self.failures.len() as u64);
        let more = (more > 0).then(|| format!("and {more} more: the log has all of them"));
        self.failures.iter().cloned().chain(more).collect()
    }
}

/// A number of octets in `B`, `KiB`, `MiB` or `GiB`.
fn human_size(octets: u64) -> String {
    let (mut size, mut unit) = (octets as f64, "");
    for next in ["Ki", "Mi", "Gi"] {
        if size < 1024.0 {
            break;
        }
        (size, unit) = (size / 1024.0, next);
    }
    if unit.is_empty() { format!("{octets} B") } else { format!("{size:.1} {unit}B") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_and_summary_of_a_call() {
        let counters = CallCounters::default();
        assert_eq!(counters.progress(), "0 messages, 0 B");
        counters.add_queued(3);
        counters.begin_message(4096);
        counters.add_octets(1024);
        assert_eq!(counters.progress(), "0 of 3 messages, 1.0 KiB (now 1.0 KiB of 4.0 KiB)");
        counters.add_octets(3072);
        counters.message_done();
        assert_eq!(counters.progress(), "1 of 3 messages, 4.0 KiB");
        // A message that is rejected: its octets do not count.
        counters.begin_message(0);
        counters.add_octets(5);
        counters.begin_message(0);
        counters.add_octets(3 << 20);
        counters.message_done();
        counters.sent();
        assert_eq!(counters.progress(), "2 of 3 messages, 3.0 MiB, 1 sent");
        counters.not_accepted(&to("joe@example.org"), "us", &Reply::new(550, "5.1.1", "No such mailbox here"));
        let summary = counters.summary(1.25).to_string();
        let failure = "from <eva@example.net> to <joe@example.org>: rejected by us: 550 5.1.1 No such mailbox here";
        assert_eq!(summary, format!("2 messages, 3149824 bytes, 1.2 seconds, 1 recipient rejected, 1 sent\n{failure}"));
        for _ in 0..60 {
            counters.not_accepted(&to("x"), "us", &Reply::new(550, "5.1.1", "No"));
        }
        assert!(counters.summary(0.0).to_string().ends_with("\nand 11 more: the log has all of them"));
    }

    fn to(to: &str) -> MessageRecipient<'_> {
        MessageRecipient { from: "eva@example.net", to, size: 100, envelope_id: None }
    }

    fn full() -> Reply {
        Reply::new(452, "4.3.1", "The disk is full")
    }

    #[test]
    fn a_deferred_recipient_counts_until_it_is_accepted() {
        let counters = CallCounters::default();
        for name in ["joe@example.org", "", "ann@example.org"] {
            counters.not_accepted(&to(name), "us", &full());
        }
        let summary = counters.summary(0.0);
        assert_eq!((summary.deferred, summary.rejected), (3, 0));
        let failure = |to: &str| format!("from <eva@example.net> to {to}: deferred by us: 452 4.3.1 The disk is full");
        assert_eq!(summary.failures, [failure("<joe@example.org>"), failure("-"), failure("<ann@example.org>")]);
        // Another message: its size, ENVID or sender is different.
        counters.accepted(&MessageRecipient { size: 101, ..to("ann@example.org") });
        counters.accepted(&MessageRecipient { envelope_id: Some("1"), ..to("ann@example.org") });
        counters.accepted(&MessageRecipient { from: "", ..to("ann@example.org") });
        assert_eq!(counters.summary(0.0), summary);
        counters.accepted(&to(""));
        counters.accepted(&to("Ann@example.org"));
        assert_eq!(counters.summary(0.0).failures, [failure("<joe@example.org>")]);
        // A rejection after a deferral replaces it.
        counters.not_accepted(&to("joe@example.org"), "us", &Reply::new(550, "5.1.1", "No"));
        let summary = counters.summary(0.0);
        assert_eq!((summary.deferred, summary.rejected, summary.failures.len()), (0, 1, 1));
    }

    /// In the next call the provider may offer deferred mail again, or not.
    #[test]
    fn a_recipient_that_the_next_call_defers_again_counts_once() {
        let counters = CallCounters::default();
        let defer = |names: &[&str]| names.iter().for_each(|name| counters.not_accepted(&to(name), "us", &full()));
        counters.begin_call();
        defer(&["joe@example.org", "joe@example.org", "ann@example.org", "eve@example.org"]);
        counters.begin_next_call();
        defer(&["joe@example.org", "eve@example.org", "eve@example.org"]);
        counters.accepted(&to("ann@example.org"));
        let summary = counters.summary(0.0);
        assert_eq!((summary.deferred, summary.failures.len()), (4, 4), "{:?}", summary.failures);
        // Another provider has other messages.
        counters.begin_call();
        defer(&["joe@example.org"]);
        assert_eq!(counters.summary(0.0).deferred, 5);
    }

    /// During a long upload the provider offers its mail several times.
    #[test]
    fn a_recipient_that_is_deferred_in_each_of_several_fetches_counts_once() {
        let counters = CallCounters::default();
        counters.not_accepted(&to("joe@example.org"), "us", &full());
        let before = counters.deferred();
        for _ in 0..3 {
            counters.offered_again(&before);
            counters.not_accepted(&to("ann@example.org"), "us", &full());
        }
        counters.not_accepted(&to("bad@example.org"), "us", &Reply::new(550, "5.1.1", "No"));
        let summary = counters.summary(0.0);
        assert_eq!((summary.deferred, summary.rejected, summary.failures.len()), (2, 1, 3));
        counters.offered_again(&before);
        counters.accepted(&to("ann@example.org"));
        let summary = counters.summary(0.0);
        assert_eq!((summary.deferred, summary.rejected, summary.failures.len()), (1, 1, 2));
    }

    /// With 250 recipients and 100 in a transaction, each of the last 50 gets 452 4.5.3 twice. A full disk may defer
    /// two messages that have the same key.
    #[test]
    fn too_many_recipients_count_once_and_a_full_disk_defers_each_message() {
        let counters = CallCounters::default();
        let deferred = || (counters.summary(0.0).deferred, counters.summary(0.0).failures.len());
        for _ in 0..2 {
            counters.not_accepted(&to("joe@example.org"), "us", &Reply::new(452, "4.5.3", "Too many recipients"));
        }
        assert_eq!(deferred(), (1, 1));
        counters.accepted(&to("joe@example.org"));
        assert_eq!(deferred(), (0, 0));
        for _ in 0..2 {
            counters.not_accepted(&to("joe@example.org"), "us", &full());
        }
        assert_eq!(deferred(), (2, 2));
        counters.accepted(&to("joe@example.org"));
        assert_eq!(deferred(), (1, 1));
    }

    #[test]
    fn deferred_recipients_that_are_not_listed_are_counted_and_released() {
        let counters = CallCounters::default();
        let names: Vec<_> = (0..LISTED_FAILURES + 10).map(|number| format!("{number}@example.org")).collect();
        names.iter().for_each(|name| counters.not_accepted(&to(name), "us", &full()));
        assert!(counters.summary(0.0).to_string().ends_with("\nand 10 more: the log has all of them"));
        names.iter().rev().take(10).for_each(|name| counters.accepted(&to(name)));
        assert!(counters.summary(0.0).failure_lines().iter().all(|line| line.contains(" deferred by us: ")));
        names.iter().for_each(|name| counters.accepted(&to(name)));
        assert_eq!(counters.summary(0.0), Summary::default());
    }
}
