//! Counts what waits in a queue, by the names of its files. No file is opened: a hundred thousand take less than a
//! second. So files that are not messages count too; only [`Queue::list`](super::Queue::list) opens them.

use std::collections::BTreeMap;
use std::fs::DirEntry;
use std::io;
use std::time::SystemTime;

use super::message::{readable_reply, set_aside_maildir};
use super::name::QueueName;
use super::retry;
use super::shared;
use crate::clock::Timestamp;
use crate::mail::address::Domain;
use crate::maildir::{Entry, IN_DOUBT, Maildir};

/// How many replies are shown.
const REPLIES_LIMIT: usize = 20;

/// How much waits in one queue, or in several.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueueSummary {
    /// The number of files.
    pub messages: u64,
    /// Octets of the files.
    pub bytes: u64,
    /// When the oldest message arrived, according to its name. `None`: the queue is empty.
    pub oldest: Option<Timestamp>,
    /// The number of messages that some recipients may already have.
    pub in_doubt: u64,
    /// The number of messages that stayed after an attempt.
    pub deferred: u64,
    /// The number of messages that have ended sessions.
    pub ended_sessions: u64,
    /// The number of messages that a customer has rejected, and that stay for the time of `soft-bounce`.
    pub soft_bounced: u64,
    /// When the first of those was rejected, and the last reply to it.
    pub first_soft_bounce: Option<(Timestamp, String)>,
    /// The last replies to messages that stay, each with the number of messages.
    pub replies: BTreeMap<String, u64>,
    /// When the next attempt is due; only for a queue with retries.
    pub next_attempt: Option<Timestamp>,
    /// The number of messages in `.refused`: rejected mail that no DSN can report.
    pub set_aside: u64,
    /// Octets of the files in `.refused`.
    pub set_aside_bytes: u64,
}

impl QueueSummary {
    /// Adds what waits in another queue.
    pub fn add(&mut self, other: &QueueSummary) {
        self.messages += other.messages;
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.in_doubt += other.in_doubt;
        self.deferred += other.deferred;
        self.ended_sessions += other.ended_sessions;
        self.soft_bounced += other.soft_bounced;
        let soft_bounces = [self.first_soft_bounce.take(), other.first_soft_bounce.clone()];
        self.first_soft_bounce = soft_bounces.into_iter().flatten().min();
        self.set_aside += other.set_aside;
        self.set_aside_bytes = self.set_aside_bytes.saturating_add(other.set_aside_bytes);
        self.oldest = self.oldest.into_iter().chain(other.oldest).min();
        self.next_attempt = self.next_attempt.into_iter().chain(other.next_attempt).min();
        for (reply, messages) in &other.replies {
            *self.replies.entry(reply.clone()).or_default() += messages;
        }
    }

    /// Whether the queue has no messages, also in `.refused`.
    pub fn is_empty(&self) -> bool {
        self.messages == 0 && self.set_aside == 0
    }

    /// The last replies with their numbers of messages, the most frequent first; at most 20.
    pub fn frequent_replies(&self) -> Vec<(&str, u64)> {
        let mut rest: Vec<_> = self.replies.iter().map(|(reply, messages)| (reply.as_str(), *messages)).collect();
        let mut replies = Vec::new();
        while replies.len() < REPLIES_LIMIT
            && let Some(most) = rest.iter().map(|(_, messages)| *messages).max()
            && let Some(at) = rest.iter().position(|(_, messages)| *messages == most)
        {
            replies.push(rest.remove(at));
        }
        replies
    }

    /// Counts a file of a queue. Ignores one that is gone.
    fn count_file(&mut self, name: &QueueName, entry: &Entry, file: &DirEntry, now: Timestamp) {
        let (size, named) = (entry.file_size(), arrival(entry, now));
        let (bytes, arrived) = match size.zip(named).filter(|_| !name.retries) {
            Some(known) => known,
            None => {
                let Ok(metadata) = file.metadata() else { return };
                let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                if name.retries {
                    let due = retry::due_at(modified).into();
                    self.next_attempt = self.next_attempt.into_iter().chain([due]).min();
                }
                let arrived = named.unwrap_or_else(|| retry::arrival_or_now(modified.into(), None, now));
                (size.unwrap_or(metadata.len()), arrived)
            }
        };
        self.count(entry, bytes, arrived);
    }

    fn count(&mut self, entry: &Entry, bytes: u64, arrived: Timestamp) {
        self.messages += 1;
        self.bytes = self.bytes.saturating_add(bytes);
        self.oldest = self.oldest.into_iter().chain([arrived]).min();
        self.in_doubt += u64::from(entry.has(IN_DOUBT));
        let record = entry.record();
        self.deferred += u64::from(record.attempts > 0);
        self.ended_sessions += u64::from(record.ended.is_some());
        let reply = record.last_reply.as_deref().map(readable_reply);
        if let Some(first_rejected) = record.first_rejected {
            self.soft_bounced += 1;
            let soft_bounce = (first_rejected, reply.clone().unwrap_or_default());
            self.first_soft_bounce = self.first_soft_bounce.take().into_iter().chain([soft_bounce]).min();
        }
        if let Some(reply) = reply {
            *self.replies.entry(reply).or_default() += 1;
        }
    }
}

/// Counts what waits in a queue. A file that is removed meanwhile is left out.
///
/// # Errors
/// A directory cannot be read.
pub(super) fn summarize(name: &QueueName, now: Timestamp) -> io::Result<QueueSummary> {
    let (maildir, mut summary) = (name.maildir(), QueueSummary::default());
    maildir.each_file(&mut |entry, file| {
        summary.count_file(name, &entry, file, now);
        Ok(())
    })?;
    (summary.set_aside, summary.set_aside_bytes) = set_aside(&set_aside_maildir(&maildir))?;
    Ok(summary)
}

/// Counts what waits in a shared directory, by domain. A file that is not a message, or cannot be read, is left out.
///
/// # Errors
/// A directory cannot be read.
pub(super) fn summarize_shared(name: &QueueName, now: Timestamp) -> io::Result<BTreeMap<Domain, QueueSummary>> {
    let mut summaries: BTreeMap<Domain, QueueSummary> = BTreeMap::new();
    name.maildir().each_file(&mut |entry, file| {
        if let Ok(Some(domain)) = shared::domain_of(name, &entry) {
            summaries.entry(domain).or_default().count_file(name, &entry, file, now);
        }
        Ok(())
    })?;
    Ok(summaries)
}

/// When a message arrived, according to the name of its file. `None`: it has no possible time.
pub(super) fn arrival(entry: &Entry, now: Timestamp) -> Option<Timestamp> {
    entry.record().first_seen.or_else(|| entry.named()).filter(|time| time.is_possible(now))
}

/// The number of messages in `.refused`, and their octets.
fn set_aside(rejected: &Maildir) -> io::Result<(u64, u64)> {
    let (mut messages, mut bytes) = (0, 0);
    rejected.each_file(&mut |entry, file| {
        messages += 1;
        let size = entry.file_size().or_else(|| file.metadata().ok().map(|metadata| metadata.len()));
        bytes = size.unwrap_or(0).saturating_add(bytes);
        Ok(())
    })?;
    Ok((messages, bytes))
}
