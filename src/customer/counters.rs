//! What came and went: counted while a call is under way, summed up at its end.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::smtp::reply::{Reply, Severity};

/// So many failures are kept in words; the others are counted.
const LISTED_FAILURES: usize = 50;

/// The counters of a call; those who see things happen share them.
#[derive(Debug, Default)]
pub struct CallCounters {
    /// Messages that were taken, and the octets of their content.
    messages: AtomicU64,
    octets: AtomicU64,
    /// Octets of the message that is coming now, and how many there will be, if that was said.
    coming: AtomicU64,
    announced: AtomicU64,
    /// How many messages wait at the provider, if it said so.
    expected: AtomicU64,
    rejected: AtomicU64,
    deferred: AtomicU64,
    failures: Mutex<Vec<FailedRecipient>>,
    sent: AtomicU64,
    waiting: AtomicU64,
}

/// One recipient that somebody refused, or put off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailedRecipient {
    pub recipient: String,
    /// Who said no: us, the next hop, the provider.
    pub by: String,
    pub reply: Reply,
}

impl fmt::Display for FailedRecipient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = if self.reply.severity() == Severity::Permanent { "rejected" } else { "deferred" };
        write!(f, "<{}> was {word} by {}: {}", self.recipient, self.by, self.reply)
    }
}

fn add(counter: &AtomicU64, number: u64) {
    counter.fetch_add(number, Ordering::Relaxed);
}

fn value_of(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

impl CallCounters {
    /// The provider says how many messages wait.
    pub fn set_queued(&self, messages: u64) {
        add(&self.expected, messages);
    }

    /// A message begins; `octets`: as many as its MAIL announces, or 0.
    pub fn begin_message(&self, octets: u64) {
        self.announced.store(octets, Ordering::Relaxed);
        self.coming.store(0, Ordering::Relaxed);
    }

    pub fn add_octets(&self, octets: usize) {
        add(&self.coming, octets as u64);
    }

    /// The message was taken.
    pub fn message_done(&self) {
        add(&self.messages, 1);
        add(&self.octets, self.coming.swap(0, Ordering::Relaxed));
        self.announced.store(0, Ordering::Relaxed);
    }

    /// A recipient was refused, or put off.
    pub fn not_accepted(&self, recipient: impl fmt::Display, by: impl fmt::Display, reply: &Reply) {
        add(if reply.severity() == Severity::Permanent { &self.rejected } else { &self.deferred }, 1);
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        if failures.len() < LISTED_FAILURES {
            let (recipient, by) = (recipient.to_string(), by.to_string());
            failures.push(FailedRecipient { recipient, by, reply: reply.clone() });
        }
    }

    /// An outgoing message was taken.
    pub fn sent(&self) {
        add(&self.sent, 1);
    }

    /// So many outgoing messages wait for another call.
    pub fn set_waiting(&self, messages: u64) {
        self.waiting.store(messages, Ordering::Relaxed);
    }

    pub fn summary(&self, seconds: f64) -> Summary {
        Summary {
            messages: value_of(&self.messages),
            octets: value_of(&self.octets),
            rejected: value_of(&self.rejected),
            deferred: value_of(&self.deferred),
            failures: self.failures.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            sent: value_of(&self.sent),
            waiting: value_of(&self.waiting),
            seconds,
        }
    }

    /// How far the call is, in one line.
    pub fn progress(&self) -> String {
        let (messages, expected) = (value_of(&self.messages), value_of(&self.expected));
        let of_all = if expected > 0 { format!(" of {}", expected.max(messages)) } else { String::new() };
        let mut line =
            format!("{messages}{of_all} messages, {}", HumanSize(value_of(&self.octets) + value_of(&self.coming)));
        let announced = value_of(&self.announced);
        if announced > 0 {
            line.push_str(&format!(
                " (now {} of {})",
                HumanSize(value_of(&self.coming).min(announced)),
                HumanSize(announced)
            ));
        }
        if value_of(&self.sent) > 0 {
            line.push_str(&format!(", {} sent", value_of(&self.sent)));
        }
        line
    }
}

/// What a call has brought.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    pub messages: u64,
    /// Octets of content.
    pub octets: u64,
    /// Recipients that somebody refused, of incoming and of outgoing mail, and those that stay with the provider for
    /// now; some of them in words.
    pub rejected: u64,
    pub deferred: u64,
    pub failures: Vec<FailedRecipient>,
    /// Outgoing messages that somebody took.
    pub sent: u64,
    /// Outgoing messages that wait for another call.
    pub waiting: u64,
    pub seconds: f64,
}

impl fmt::Display for Summary {
    /// One line, and one for each failure.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} messages, {} bytes, {:.1} seconds", self.messages, self.octets, self.seconds)?;
        if self.rejected > 0 {
            write!(f, ", {} recipients rejected", self.rejected)?;
        }
        if self.deferred > 0 {
            write!(f, ", {} deferred", self.deferred)?;
        }
        if self.sent > 0 {
            write!(f, ", {} sent", self.sent)?;
        }
        if self.waiting > 0 {
            write!(f, ", {} waiting to be sent", self.waiting)?;
        }
        for failure in &self.failures {
            write!(f, "\n{failure}")?;
        }
        let more = (self.rejected + self.deferred).saturating_sub(self.failures.len() as u64);
        if more > 0 { write!(f, "\nand {more} more: the log has all of them") } else { Ok(()) }
    }
}

/// Octets as a person reads them.
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
    fn a_call_is_watched_and_summed_up() {
        let counters = CallCounters::default();
        assert_eq!(counters.progress(), "0 messages, 0 B");
        counters.set_queued(3);
        counters.begin_message(4096);
        counters.add_octets(1024);
        assert_eq!(counters.progress(), "0 of 3 messages, 1.0 KiB (now 1.0 KiB of 4.0 KiB)");
        counters.add_octets(3072);
        counters.message_done();
        assert_eq!(counters.progress(), "1 of 3 messages, 4.0 KiB");
        // Refused: its octets are no part of what came.
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
