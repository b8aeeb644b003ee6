//! The retry queue: mail that a next hop is to get and nobody else keeps. It waits under ROOT and is tried again.
//!
//! The provider keeps a message that was not answered 250, so nothing waits here as long as no recipient has the message.
//! Only a message that some destinations have accepted and others have not cannot stay with the provider: for those others
//! it is stored here, durably, before the 250.

use std::io;
use std::time::SystemTime;

use super::mailboxes::Mailboxes;
use super::next_hop::{HopDelivery, NextHops};
use crate::config::CustomerConfig;
use crate::ids::Ids;
use crate::maildir::spooled::Content;
use crate::maildir::{Entry, for_each_block};
use crate::net::cancel::CancelToken;
use crate::net::trace::quoted;
use crate::queue::retry::Retry;
use crate::queue::{LockError, Queue, QueueLock, QueueName, QueuedEnvelope, QueuedMessage};
use crate::recipients::{Destination, NextHop};
use crate::report::{Attempt, Reporter, Via};
use crate::session::{Timeouts, storage_failure_reply};
use crate::smtp::client::OutgoingMessage;
use crate::smtp::reply::Reply;
use crate::smtp::status::{DecidedBy, DeliveryResult, RecipientStatus};

/// Who decided on the recipients of a message.
#[derive(Clone, Copy)]
pub struct HopName<'a> {
    /// The id of the session in the log.
    pub session: &'a str,
    pub via: Via,
    pub name: &'a str,
    /// It sends DSNs of success itself (RFC 3461).
    pub dsn: bool,
}

impl HopName<'_> {
    /// A Maildir of ours.
    pub const MAILDIR: HopName<'static> = HopName { session: "-", via: Via::Maildir, name: "maildir", dsn: false };
}

/// How a message reaches a next hop.
pub fn via(hop: &NextHop) -> Via {
    match hop {
        NextHop::LmtpUnix(_) | NextHop::Lmtp { .. } => Via::Lmtp,
        NextHop::Smtp { .. } => Via::Smtp,
    }
}

pub struct RetryQueue {
    queue: Queue,
    name: QueueName,
    reporter: Reporter,
    retry: Retry,
    hostname: String,
    timeouts: Timeouts,
    ids: Ids,
}

impl RetryQueue {
    /// `reporter`: sends DSNs, if this customer sends mail at all.
    pub fn new(config: &CustomerConfig, mailboxes: &Mailboxes, reporter: Reporter) -> RetryQueue {
        RetryQueue {
            queue: mailboxes.queue().clone(),
            name: mailboxes.retry_queue(),
            reporter,
            retry: config.outgoing.as_ref().map(|outgoing| outgoing.retry.clone()).unwrap_or_default(),
            hostname: config.hostname.clone(),
            timeouts: config.timeouts.clone(),
            ids: mailboxes.ids().clone(),
        }
    }

    /// Checks that a message could be stored.
    pub fn check_writable(&self) -> io::Result<()> {
        self.queue.unnamed_file(&self.name).map(drop)
    }

    /// Stores a message for recipients that are neither sent nor the provider's any more, durably; then acts on their
    /// statuses.
    pub fn store(
        &self, message: &QueuedEnvelope, statuses: Vec<RecipientStatus>, content: &mut dyn Content, by: HopName<'_>,
    ) -> io::Result<()> {
        content.rewind()?;
        let mut writer = self.queue.begin_message(&[(self.name.clone(), message.clone())], "")?;
        for_each_block(content, |block| writer.write(block))?;
        let entries = writer.commit()?;
        // The message is safe: whatever fails now, it is tried again.
        if let Err(error) = self.finish_stored(entries, statuses, by) {
            log::warn!("event=settle-failed id={} error={}", message.id, quoted(error));
        }
        Ok(())
    }

    fn finish_stored(
        &self, entries: Vec<Entry>, statuses: Vec<RecipientStatus>, by: HopName<'_>,
    ) -> Result<(), String> {
        let mut lock = self.lock()?;
        for entry in entries {
            let message = lock.open_message(&self.name, entry).map_err(|error| error.to_string())?;
            if let Some(message) = message {
                self.finish_attempt(message, statuses.clone(), by, &mut lock).map_err(|error| error.to_string())?;
            }
        }
        Ok(())
    }

    fn finish_attempt(
        &self, message: QueuedMessage, statuses: Vec<RecipientStatus>, by: HopName<'_>, lock: &mut QueueLock,
    ) -> io::Result<DeliveryResult> {
        // Here 452 means that a disk is full: the next attempt is not at once.
        let recipients = statuses.into_iter().map(RecipientStatus::not_one_too_many).collect();
        let attempt = Attempt {
            session: by.session,
            via: by.via,
            relay: by.name,
            peer: None,
            peer_sends_dsn: by.dsn,
            retry: Some(&self.retry),
        };
        let result = DeliveryResult { recipients, decided_by: DecidedBy::Peer };
        self.reporter.finish_attempt(message, result, &attempt, lock)
    }

    fn lock(&self) -> Result<QueueLock, String> {
        self.queue.try_lock(&self.name).map_err(|error| match error {
            LockError::Busy(_) => "another process is at it".to_owned(),
            LockError::Failed(error) => error.to_string(),
        })
    }

    /// When the next attempt is due; `None`: the queue is empty.
    pub fn due(&self) -> Option<SystemTime> {
        self.queue.next_due(&self.name).unwrap_or(None)
    }

    /// Tries all messages that are due.
    pub fn retry(&self, mailboxes: &Mailboxes, cancel: &CancelToken) {
        if self.due().is_none_or(|due| due > SystemTime::now()) {
            return;
        }
        let mut lock = match self.lock() {
            Ok(lock) => lock,
            Err(error) => return log::info!("event=retry-waits reason={}", quoted(error)),
        };
        let mut hops = NextHops::new(&self.hostname, &self.timeouts, &self.ids, cancel);
        while !cancel.is_cancelled() {
            lock.heartbeat();
            let Some(mut message) = lock.next_message() else { return };
            let tried = self.attempt(mailboxes, &mut hops, &mut message);
            let by = HopName { session: &tried.session, via: tried.via, name: &tried.name, dsn: tried.dsn };
            // A failure is logged where it happens.
            let _ = self.finish_attempt(message, tried.statuses, by, &mut lock);
        }
    }

    /// Tries one message: each recipient at its destination by the rules as they are now.
    fn attempt(&self, mailboxes: &Mailboxes, hops: &mut NextHops, message: &mut QueuedMessage) -> TriedMessage {
        let recipients = message.envelope.recipients.clone();
        let mut statuses: Vec<Option<RecipientStatus>> = vec![None; recipients.len()];
        let mut tried = TriedMessage::default();
        for number in 0..recipients.len() {
            let mailbox = &recipients[number].mailbox;
            if statuses[number].is_some() {
                continue;
            }
            match mailboxes.destination(mailbox) {
                // The rules that accepted it have changed since.
                None => {
                    let reply = Reply::new(550, "5.1.1", "No such mailbox here any more");
                    statuses[number] = Some(RecipientStatus::Rejected(reply));
                }
                Some(Destination::Maildir { path, folders }) => {
                    let from = message.envelope.from.clone();
                    statuses[number] = Some(mailboxes.copy(&from, mailbox, (&path, &folders), message));
                }
                Some(Destination::NextHop(hop)) => {
                    let same = |other: &usize| {
                        let destination = mailboxes.destination(&recipients[*other].mailbox);
                        matches!(destination, Some(Destination::NextHop(its)) if its == hop)
                    };
                    let numbers: Vec<_> = (number..recipients.len()).filter(same).collect();
                    let wanted = numbers.iter().map(|number| recipients[*number].clone()).collect();
                    let outgoing = OutgoingMessage {
                        envelope: message.envelope.with_recipients(wanted),
                        ..message.outgoing_message()
                    };
                    let found = deliver(mailboxes, hops, &hop, &outgoing, message);
                    for (number, status) in numbers.into_iter().zip(found.recipients) {
                        statuses[number] = Some(status);
                    }
                    (tried.session, tried.via, tried.dsn) = (found.session, via(&hop), found.dsn);
                    tried.name = hop.to_string();
                }
            }
        }
        let untried = || RecipientStatus::Deferred(Reply::new(451, "4.0.0", "Not yet"));
        tried.statuses = statuses.into_iter().map(|status| status.unwrap_or_else(untried)).collect();
        tried
    }
}

/// One attempt at a message of the retry queue.
struct TriedMessage {
    statuses: Vec<RecipientStatus>,
    /// The last next hop. A Maildir of ours sends no DSN; it is here only after a change of the rules.
    session: String,
    via: Via,
    name: String,
    dsn: bool,
}

impl Default for TriedMessage {
    fn default() -> TriedMessage {
        let (session, name) = ("-".to_owned(), "-".to_owned());
        TriedMessage { statuses: Vec::new(), session, via: Via::Maildir, name, dsn: false }
    }
}

/// Delivers a message to one next hop, or to our own Maildir a recipient that must be accepted.
fn deliver(
    mailboxes: &Mailboxes, hops: &mut NextHops, hop: &NextHop, outgoing: &OutgoingMessage, content: &mut QueuedMessage,
) -> HopDelivery {
    hops.set_retry_deadline();
    let recipients = &outgoing.envelope.recipients;
    let mut delivery = hops.deliver(hop, outgoing, content, None).unwrap_or_else(|error| HopDelivery {
        session: "-".to_owned(),
        recipients: vec![RecipientStatus::Deferred(storage_failure_reply(&error)); recipients.len()],
        dsn: false,
    });
    for (recipient, status) in recipients.iter().zip(&mut delivery.recipients) {
        if status.is_rejected() && mailboxes.must_accept(&recipient.mailbox) {
            *status = mailboxes.deliver_fallback(&outgoing.envelope.from, &recipient.mailbox, content);
        }
    }
    delivery
}
