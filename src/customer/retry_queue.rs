//! The retry queue, under ROOT: mail for next hops and full mailboxes that no other host stores.
//!
//! As long as no recipient has a message, the customer does not reply 250 to it, and it stays with the provider. If
//! some destinations have accepted a message and others have not, the customer must reply 250, and the provider no
//! longer has the message for the others. For them it is stored here, durably, before the 250.

use std::io::{self, Read};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use super::mailboxes::{Mailboxes, Routing};
use super::next_hop::{HopDelivery, NextHops};
use crate::mail::address::{ForwardPath, Mailbox, ReversePath};
use crate::maildir::spooled::Content;
use crate::maildir::{Entry, MessageWriter, for_each_block};
use crate::net::cancel::CancelToken;
use crate::net::trace::quoted;
use crate::net::wake::WakeReason;
use crate::queue::retry::Retry;
use crate::queue::{LockError, QueueLock, QueuedEnvelope, QueuedMessage};
use crate::recipients::{Destination, NextHop, address, same_mailbox};
use crate::report::{Attempt, Reporter, Via};
use crate::session::storage_failure_reply;
use crate::smtp::command::Recipient;
use crate::smtp::reply::Reply;
use crate::smtp::status::{DecidedBy, DeliveryResult, RecipientStatus};
use crate::sorting::sort_by;

/// Wakes the thread that retries the messages.
type Waker = Box<dyn Fn() + Send + Sync>;

/// Stores messages in the retry queue, and retries them.
pub struct RetryQueue {
    /// The Maildirs, and the configuration.
    pub mailboxes: Arc<Mailboxes>,
    /// Sends DSNs, if this customer sends mail.
    pub reporter: Reporter,
    retry: Retry,
    waker: OnceLock<Waker>,
}

impl RetryQueue {
    /// The retry queue of `mailboxes`. Neither reads nor creates a file.
    pub fn new(mailboxes: &Arc<Mailboxes>, reporter: Reporter) -> RetryQueue {
        let outgoing = mailboxes.config.outgoing.as_ref();
        let retry = outgoing.map(|outgoing| outgoing.retry.clone()).unwrap_or_default();
        RetryQueue { mailboxes: mailboxes.clone(), reporter, retry, waker: OnceLock::new() }
    }

    /// Sets what [`RetryQueue::wake`] calls. A second call has no effect.
    pub fn set_waker(&self, waker: Waker) {
        let _ = self.waker.set(waker);
    }

    /// Reports that a user's message was stored. If no waker was set, this wakes the daemon, if one runs.
    pub fn wake(&self) {
        match self.waker.get() {
            Some(wake) => wake(),
            None => WakeReason::Outgoing.send(&self.mailboxes.config.mailboxes.root),
        }
    }

    /// Checks that a message can be stored now.
    ///
    /// # Errors
    /// No file can be created in the queue.
    pub fn check_writable(&self) -> io::Result<()> {
        self.mailboxes.queue.unnamed_file(&self.mailboxes.retry_queue()).map(drop)
    }

    /// Stores a message durably for recipients that do not have it, and for whom the provider does not store it. Then
    /// acts on their `statuses`, one for each recipient in order, which are the result of `attempt`.
    ///
    /// # Errors
    /// The message could not be stored.
    pub fn store(
        &self, message: &QueuedEnvelope, statuses: Vec<RecipientStatus>, content: &mut dyn Content,
        attempt: &Attempt<'_>,
    ) -> io::Result<()> {
        content.rewind()?;
        let copy = (self.mailboxes.retry_queue(), message.clone());
        let mut writer = self.mailboxes.queue.begin_message(&[copy], "")?;
        for_each_block(content, |block| writer.write(block))?;
        let entries = writer.commit()?;
        // The message is stored. If anything fails now, the message is retried.
        if let Err(error) = self.finish_stored(entries, &statuses, attempt) {
            log::warn!("event=settle-failed id={} error={}", message.id, quoted(error));
        }
        Ok(())
    }

    fn finish_stored(
        &self, entries: Vec<Entry>, statuses: &[RecipientStatus], attempt: &Attempt<'_>,
    ) -> io::Result<()> {
        let mut lock = self.lock()?;
        for entry in entries {
            if let Some(message) = lock.open_message(&self.mailboxes.retry_queue(), entry)? {
                self.finish_attempt(message, statuses.to_vec(), attempt, &mut lock);
            }
        }
        Ok(())
    }

    /// `statuses`: one for each recipient, in order.
    fn finish_attempt(
        &self, message: QueuedMessage, statuses: Vec<RecipientStatus>, attempt: &Attempt<'_>, lock: &mut QueueLock,
    ) {
        // A next hop that replies 452 here has a full disk, not too many recipients: do not retry at once.
        let recipients = statuses.into_iter().map(RecipientStatus::not_one_too_many).collect();
        let attempt = Attempt { retry: Some(&self.retry), ..*attempt };
        let result = DeliveryResult { recipients, decided_by: DecidedBy::Peer };
        // A failure is logged by the reporter.
        let _ = self.reporter.finish_attempt(message, result, &attempt, lock);
    }

    fn lock(&self) -> io::Result<QueueLock> {
        self.mailboxes.queue.try_lock(&self.mailboxes.retry_queue()).map_err(|error| match error {
            LockError::Busy(_) => io::Error::other("another process is retrying it"),
            LockError::Failed(error) => error,
        })
    }

    /// When the next attempt is due; `None`: the queue is empty or cannot be read.
    pub fn due(&self) -> Option<SystemTime> {
        self.mailboxes.queue.next_due(&self.mailboxes.retry_queue()).unwrap_or(None)
    }

    /// Retries all messages that are due, until it is cancelled. If another process is doing that, it returns at once.
    ///
    /// # Errors
    /// The queue cannot be read or locked, which is logged.
    pub fn retry(&self, cancel: &CancelToken) -> io::Result<()> {
        let failed = |error: &io::Error| log::warn!("event=retry-waits reason={}", quoted(error));
        let due = self.mailboxes.queue.next_due(&self.mailboxes.retry_queue()).inspect_err(failed)?;
        if due.is_none_or(|due| due > SystemTime::now()) {
            return Ok(());
        }
        let mut lock = match self.mailboxes.queue.try_lock(&self.mailboxes.retry_queue()) {
            Ok(lock) => lock,
            Err(LockError::Busy(_)) => {
                log::info!("event=retry-waits reason=\"another process is retrying it\"");
                return Ok(());
            }
            Err(LockError::Failed(error)) => return Err(error).inspect_err(failed),
        };
        let mut hops = NextHops::new(&self.mailboxes, cancel);
        while !cancel.is_cancelled() {
            lock.heartbeat();
            let Some(mut message) = lock.next_message() else { break };
            let (tried, mut statuses) = self.attempt(&mut hops, &mut message);
            self.redirect_dsn(&mut message, &mut statuses);
            self.finish_attempt(message, statuses, &tried.attempt(), &mut lock);
        }
        Ok(())
    }

    /// Tries one message, each recipient at its destination by the present rules. Returns the attempt at the last next
    /// hop, or one in a Maildir here if there was none, and the status of each recipient in order.
    fn attempt(&self, hops: &mut NextHops, message: &mut QueuedMessage) -> (HopDelivery, Vec<RecipientStatus>) {
        let (session, relay) = ("-".to_owned(), "-".to_owned());
        let mut tried = HopDelivery { session, via: Via::Maildir, relay, sends_dsn: false, recipients: Vec::new() };
        let (mut by_hop, mut statuses): (Vec<(NextHop, Vec<usize>)>, _) = (Vec::new(), Vec::new());
        let envelope = message.envelope.clone();
        for (number, recipient) in envelope.recipients.iter().enumerate() {
            let status = match self.mailboxes.destination_of(&recipient.mailbox) {
                Some(Destination::NextHop(hop)) => {
                    match by_hop.iter_mut().find(|(other, _)| *other == hop) {
                        Some((_, numbers)) => numbers.push(number),
                        None => by_hop.push((hop, vec![number])),
                    }
                    continue;
                }
                Some(Destination::Maildir { path, folders }) => {
                    self.mailboxes.copy(&envelope.from, &recipient.mailbox, (&path, &folders), message)
                }
                // The rules have changed since the recipient was accepted.
                Some(Destination::Discard | Destination::Elsewhere) | None => {
                    RecipientStatus::Rejected(Reply::new(550, "5.1.1", "No such mailbox here any more"))
                }
            };
            statuses.push((number, status));
        }
        for (hop, numbers) in by_hop {
            let recipients = numbers.iter().map(|number| envelope.recipients[*number].clone()).collect();
            let mut outgoing = message.outgoing_message();
            outgoing.envelope.recipients = recipients;
            hops.set_retry_deadline();
            tried = hops.deliver(&hop, &outgoing, message, None);
            self.mailboxes.deliver_fallbacks(&envelope.from, &mut tried.recipients, &[], message);
            statuses.extend(numbers.into_iter().zip(tried.recipients.drain(..).map(|(_, status)| status)));
        }
        sort_by(&mut statuses, |(one, _), (other, _)| one.cmp(other));
        (tried, statuses.into_iter().map(|(_, status)| status).collect())
    }

    /// Delivers a DSN of this host to postmaster for each recipient that is rejected, for instance root if the next hop
    /// does not know that name. A rejected DSN has no sender to get another DSN, so it would be lost.
    fn redirect_dsn(&self, message: &mut QueuedMessage, statuses: &mut [RecipientStatus]) {
        if message.envelope.from != ReversePath::Null || !statuses.iter().any(RecipientStatus::is_rejected) {
            return;
        }
        // Every other message in this queue begins with the `Received` field of this host.
        let mut first = [0; b"Received:".len()];
        if message.rewind().and_then(|()| message.read_exact(&mut first)).is_err() || first == *b"Received:" {
            return;
        }
        for (recipient, status) in message.envelope.recipients.clone().iter().zip(statuses) {
            if status.is_rejected()
                && let Some(postmaster) = recipient.mailbox.domain().and_then(|domain| address("postmaster", domain))
            {
                let consequence = format!("<{postmaster}> gets it");
                log::warn!("event=dsn-undeliverable to=<{}> consequence={}", recipient.mailbox, quoted(consequence));
                *status = self.deliver_to_postmaster(message, &postmaster, &recipient.mailbox);
            }
        }
    }

    /// Delivers a message to a postmaster. If the rules lead from postmaster to the rejected recipient, the message
    /// goes into the postmaster's Maildir here.
    fn deliver_to_postmaster(
        &self, message: &mut QueuedMessage, postmaster: &Mailbox, rejected: &Mailbox,
    ) -> RecipientStatus {
        let rules = self.mailboxes.rules();
        let deliveries = self.mailboxes.resolve(&ForwardPath::Mailbox(postmaster.clone())).unwrap_or_default();
        if deliveries.iter().any(|delivery| same_mailbox(&delivery.mailbox, rejected)) {
            return self.mailboxes.copy(&ReversePath::Null, postmaster, (&rules.maildir_of(postmaster), &[]), message);
        }
        let envelope = message.with_recipients(vec![Recipient::plain(postmaster.clone())]);
        let mut writer = MessageWriter::default();
        let stored = self.mailboxes.begin_all(&mut writer, &envelope, Vec::new(), message.size, "");
        let stored = stored.and_then(|routing| {
            message.rewind()?;
            for_each_block(message, |block| writer.write(block))?;
            writer.commit().map(|_| routing)
        });
        match stored {
            // A recipient that the rules defer or reject, for instance an alias to a program.
            Ok(Routing { rejected, .. }) if !rejected.is_empty() => RecipientStatus::Deferred(rejected[0].1.clone()),
            Ok(_) => RecipientStatus::Sent(Reply::new(250, "2.0.0", "Postmaster gets it")),
            Err(error) => RecipientStatus::Deferred(storage_failure_reply(&error)),
        }
    }
}
