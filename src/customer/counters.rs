//! Counts what one call receives and sends, for the progress line during the call and the summary after it.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::smtp::reply::{Reply, Severity};

/// How many failed recipients a summary lists; the others are only counted.
const LISTED_FAILURES: usize = 50;

/// The counters of one call, shared by all threads that work for it.
#[derive(Debug, Default)]
pub struct CallCounters(Mutex<Counts>);

#[derive(Debug, Default)]
struct Counts {
    /// What is complete.
    total: Summary,
    /// Octets of the message that is arriving.
    arriving: u64,
    /// Octets of that message as MAIL announced them; 0: unknown.
    announced: u64,
    /// Messages that were waiting at the provider; 0: unknown.
    queued: u64,
}

impl CallCounters {
    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds the number of messages that the provider reports as waiting; 0 if it reports none.
    pub fn add_queued(&self, messages: u64) {
        self.lock().queued += messages;
    }

    /// A message begins. `octets`: its size as MAIL announced it, or 0.
    pub fn begin_message(&self, octets: u64) {
        let mut counts = self.lock();
        (counts.announced, counts.arriving) = (octets, 0);
    }

    /// Adds octets of the content of the message that is arriving.
    pub fn add_octets(&self, octets: usize) {
        self.lock().arriving += octets as u64;
    }

    /// The message was accepted.
    pub fn message_done(&self) {
        let mut counts = self.lock();
        counts.total.messages += 1;
        counts.total.octets += counts.arriving;
        (counts.announced, counts.arriving) = (0, 0);
    }

    /// A recipient was rejected, if the reply is permanent, or deferred. `by`: who decided that, for the summary.
    pub fn not_accepted(&self, recipient: impl fmt::Display, by: impl fmt::Display, reply: &Reply) {
        let total = &mut self.lock().total;
        let (count, word) = match reply.severity() {
            Severity::Permanent => (&mut total.rejected, "rejected"),
            _ => (&mut total.deferred, "deferred"),
        };
        *count += 1;
        if total.failures.len() < LISTED_FAILURES {
            total.failures.push(format!("<{recipient}> was {word} by {by}: {reply}"));
        }
    }

    /// An outgoing message was sent to at least one recipient.
    pub fn sent(&self) {
        self.lock().total.sent += 1;
    }

    /// Sets how many outgoing messages wait for another call.
    pub fn set_waiting(&self, messages: u64) {
        self.lock().total.waiting = messages;
    }

    /// What was counted up to now. `seconds`: the duration of the call.
    pub fn summary(&self, seconds: f64) -> Summary {
        Summary { seconds, ..self.lock().total.clone() }
    }

    /// The progress of the call, in one line without its end.
    pub fn progress(&self) -> String {
        let Counts { total: Summary { messages, octets, sent, .. }, arriving, announced, queued } = &*self.lock();
        let of_all = if *queued > 0 { format!(" of {}", queued.max(messages)) } else { String::new() };
        let mut line = format!("{messages}{of_all} messages, {}", HumanSize(octets + arriving));
        if *announced > 0 {
            line += &format!(" (now {} of {})", HumanSize(*arriving.min(announced)), HumanSize(*announced));
        }
        if *sent > 0 {
            line += &format!(", {sent} sent");
        }
        line
    }
}

/// The result of a call.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    /// Messages that were received and accepted.
    pub messages: u64,
    /// Octets of their content.
    pub octets: u64,
    /// Recipients that were rejected, of incoming and outgoing mail.
    pub rejected: u64,
    /// Recipients that were deferred: their mail stays with the provider.
    pub deferred: u64,
    /// The first of the rejected and deferred recipients, a line for each.
    pub failures: Vec<String>,
    /// Outgoing messages that were sent.
    pub sent: u64,
    /// Outgoing messages that wait for another call.
    pub waiting: u64,
    /// The duration of the call.
    pub seconds: f64,
}

impl fmt::Display for Summary {
    /// One line, and one for each listed failure.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} messages, {} bytes, {:.1} seconds", self.messages, self.octets, self.seconds)?;
        for (count, text) in [
            (self.rejected, "recipients rejected"),
            (self.deferred, "deferred"),
            (self.sent, "sent"),
            (self.waiting, "waiting to be sent"),
        ] {
            if count > 0 {
                write!(f, ", {count} {text}")?;
            }
        }
        self.failures.iter().try_for_each(|failure| write!(f, "\n{failure}"))?;
        let more = (self.rejected + self.deferred).saturating_sub(self.failures.len() as u64);
        if more > 0 { write!(f, "\nand {more} more: the log has all of them") } else { Ok(()) }
    }
}

/// A number of octets in a unit that is easy to read: `B`, `KiB`, `MiB` or `GiB`.
struct HumanSize(u64);

impl fmt::Display for HumanSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mut size, mut unit) = (self.0 as f64, "");
        for next in ["Ki", "Mi", "Gi"] {
            if size < 1024.0 {
                break;
            }
            (size, unit) = (size / 1024.0, next);
        }
        if unit.is_empty() { write!(f, "{} B", self.0) } else { write!(f, "{size:.1} {unit}B") }
    }
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
        counters.not_accepted("joe@example.org", "us", &Reply::new(550, "5.1.1", "No such mailbox here"));
        let summary = counters.summary(1.25).to_string();
        let failure = "<joe@example.org> was rejected by us: 550 5.1.1 No such mailbox here";
        assert_eq!(
            summary,
            format!("2 messages, 3149824 bytes, 1.2 seconds, 1 recipients rejected, 1 sent\n{failure}")
        );
        for _ in 0..60 {
            counters.not_accepted("x", "us", &Reply::new(550, "5.1.1", "No"));
        }
        assert!(counters.summary(0.0).to_string().ends_with("\nand 11 more: the log has all of them"));
    }
}
