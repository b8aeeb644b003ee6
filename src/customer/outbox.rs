//! The customer's outgoing mail: it waits in a queue until a call sends it to the provider.
//!
//! Mail for the customer's own domains does not leave this host: it is delivered at once, or by the next call if the
//! user who submits it may not write into mailboxes. If the provider accepts no mail at all (502, 503, 530 or 550 to
//! MAIL, which RFC 2645 section 5.4 permits), outgoing mail goes to the submission host. If no submission host is
//! configured, the mail waits in the queue, and the reason is logged.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::counters::{CallCounters, MessageRecipient};
use super::mailboxes::{Mailboxes, Routing, delivered_here, log_discarded};
use super::retry_queue::RetryQueue;
use super::store;
use super::success_dsn::SuccessDsn;
use crate::clock::Timestamp;
use crate::config::OutgoingConfig;
use crate::mail::address::{ForwardPath, Mailbox};
use crate::mail::header::{HeaderAdditions, HeaderCompleter};
use crate::maildir::{MessageWriter, for_each_block};
use crate::net::cancel::CancelToken;
use crate::net::trace::quoted;
use crate::queue::{LockError, QueueLock, QueueName, QueuedEnvelope, QueuedMessage};
use crate::recipients;
use crate::report::{Attempt, DsnMessage, DsnSink, Reporter, Via};
use crate::session::client::{ClientSession, Connect, MessageSource, SessionFailure};
use crate::session::{Remote, check_room, storage_failure_reply, storage_reply};
use crate::smtp::client::{Client, ClientOptions};
use crate::smtp::command::{Envelope, Recipient};
use crate::smtp::reply::Reply;
use crate::smtp::server::{MessageSink, check_qualified, message_too_large};
use crate::smtp::status::{DecidedBy, DeliveryResult, RecipientStatus};

/// Writes messages into the outgoing queue, and sends them.
pub struct Outbox {
    /// The table `[outgoing]`.
    pub config: OutgoingConfig,
    /// The customer's own Maildirs.
    pub mailboxes: Arc<Mailboxes>,
    /// Mail for next hops.
    pub retry_queue: Arc<RetryQueue>,
    store: OutgoingStore,
}

impl Outbox {
    /// The outgoing queue of the configuration; `None`: it has no `[outgoing]`, so the customer sends no mail.
    pub fn new(mailboxes: &Arc<Mailboxes>) -> Option<Outbox> {
        let config = mailboxes.config.outgoing.clone()?;
        let store = OutgoingStore { name: store::outgoing_queue(&config.queue), mailboxes: mailboxes.clone() };
        let sink = Arc::new(store.clone());
        let reporter = Reporter::new(&mailboxes.config.hostname, &mailboxes.ids, Some(sink), &mailboxes.watch);
        let retry_queue = Arc::new(RetryQueue::new(mailboxes, reporter));
        Some(Outbox { config, mailboxes: mailboxes.clone(), retry_queue, store })
    }

    /// The mailbox of a recipient: in one of our domains, where it must exist, or elsewhere.
    ///
    /// # Errors
    /// The negative reply to RCPT.
    pub fn recipient(&self, path: &ForwardPath) -> Result<Mailbox, Reply> {
        match path {
            ForwardPath::Mailbox(mailbox) if !self.store.is_local(mailbox) => {
                check_qualified(mailbox).map(|()| mailbox.clone())
            }
            ours => {
                self.mailboxes.resolve(ours)?;
                self.mailboxes.canonical_recipient(ours)
            }
        }
    }

    /// Checks that a message of this many octets is not too large, and that the disk has room for it.
    ///
    /// # Errors
    /// The negative reply to MAIL (RFC 1870 section 6.1).
    pub fn check_room(&self, octets: u64) -> Result<(), Reply> {
        self.check_size(octets)?;
        check_room(&self.config.queue, octets, self.mailboxes.config.limits.min_free)
    }

    /// Checks that a message of this many octets is not too large.
    ///
    /// # Errors
    /// The negative reply to MAIL.
    pub fn check_size(&self, octets: u64) -> Result<(), Reply> {
        if octets > self.config.max_size { Err(message_too_large(self.config.max_size)) } else { Ok(()) }
    }

    /// Begins to store a message. `received`: our `Received` field.
    ///
    /// # Errors
    /// A file cannot be created, the disk has no room, or a recipient in one of our domains has no mailbox any more.
    pub fn store(&self, submission: Submission<'_>, received: &str) -> io::Result<SubmissionWriter> {
        let additions = self.additions(&submission);
        let Submission { envelope, size, id, arrived, .. } = submission;
        let message = QueuedEnvelope { id, arrived, envelope: envelope.clone() };
        let (here, elsewhere) = self.store.divide(&message);
        // If the size was not announced, a mailbox has no room only if it is full already.
        let octets = size.unwrap_or(1) + received.len() as u64;
        let (mut writer, routing) = self.store.begin(&here, elsewhere.envelope.recipients, octets, received)?;
        writer.keep_free(self.mailboxes.config.limits.min_free, octets)?;
        Ok(SubmissionWriter {
            writer,
            completer: HeaderCompleter::new(additions),
            buffer: Vec::new(),
            // Our own recipients have the message when it is committed; other hosts send the DSNs for the others.
            success_dsn: SuccessDsn::new(&self.retry_queue.reporter, &here, &routing),
            retry_queue: (!routing.hop_recipients.is_empty()).then(|| self.retry_queue.clone()),
            message,
            queued: routing.elsewhere,
            discarded: routing.discarded,
        })
    }

    /// The fields that complete the header of a submitted message (RFC 6409 section 8).
    pub fn additions(&self, submission: &Submission<'_>) -> HeaderAdditions {
        HeaderAdditions {
            home: self.config.domain.clone(),
            date: submission.arrived.rfc5322(),
            message_id: format!("<{}@{}>", submission.id, self.mailboxes.config.hostname),
            from: submission.header_from.clone(),
            drop_bcc: submission.drop_bcc,
        }
    }

    /// The number of messages in the queue; 0 if it cannot be read.
    pub fn waiting(&self) -> u64 {
        self.mailboxes.queue.count(&self.store.name, usize::MAX).unwrap_or(0) as u64
    }

    /// A file without a name, for content that is read before it is stored. The system removes it when it is closed.
    ///
    /// # Errors
    /// It cannot be created in the queue.
    pub fn unnamed_file(&self) -> io::Result<File> {
        self.mailboxes.queue.unnamed_file(&self.store.name)
    }

    /// Whether the queue is empty. If it cannot be read, it counts as not empty.
    pub fn is_empty(&self) -> bool {
        self.mailboxes.queue.count(&self.store.name, 1).unwrap_or(1) == 0
    }

    /// Whether there is a submission host, and messages that may be for it.
    pub fn has_submissions(&self) -> bool {
        self.config.submission.is_some() && !self.is_empty()
    }

    /// Locks the queue. `None`: it is empty, or cannot be locked, which is logged. If it cannot be locked because the
    /// system fails, the call fails too, at its end: otherwise its result would be that all mail was sent.
    fn lock_if_any(&self, counters: &CallCounters) -> Option<QueueLock> {
        let queue = &self.mailboxes.queue;
        let locked = match queue.count(&self.store.name, 1) {
            Ok(0) => return None,
            Ok(_) => queue.lock(std::slice::from_ref(&self.store.name)),
            Err(error) => Err(LockError::Failed(error)),
        };
        let failed = |error| match error {
            LockError::Busy(_) => {
                log::warn!("event=outgoing-waits reason=\"another call is sending the outgoing mail\"");
            }
            LockError::Failed(error) => {
                log::warn!("event=outgoing-waits reason={}", quoted(&error));
                counters.outgoing_failed(error);
            }
        };
        locked.map_err(failed).ok()
    }

    /// Delivers messages for our own mailboxes that users without access to the mailboxes have queued. A message that
    /// cannot be stored is counted as deferred, and stays in the queue.
    pub fn deliver_here(&self, counters: &CallCounters) {
        let Some(mut lock) = self.lock_if_any(counters) else { return };
        while let Some(mut message) = lock.next_message() {
            let queued =
                QueuedEnvelope { id: message.id.clone(), arrived: message.arrived, envelope: message.envelope.clone() };
            let (here, _) = self.store.divide(&queued);
            if here.envelope.recipients.is_empty() {
                continue;
            }
            let rejected = match self.copy(&here, &mut message) {
                Ok(rejected) => rejected,
                Err(error) => {
                    log::error!("event=storage-failed id={} error={}", here.id, quoted(&error));
                    let from = &message.envelope.from.to_string();
                    for recipient in &here.envelope.recipients {
                        let to = &recipient.mailbox.to_string();
                        let recipient = MessageRecipient { from, to, size: message.size, envelope_id: Some(&here.id) };
                        counters.not_accepted(&recipient, "us", &storage_reply(&error));
                    }
                    continue;
                }
            };
            // The rules may have changed since a recipient was accepted: then it may have no mailbox any more.
            let rejected: HashMap<_, _> =
                rejected.iter().map(|(recipient, reply)| (&recipient.mailbox, reply)).collect();
            let status = |recipient: &Recipient| match rejected.get(&recipient.mailbox) {
                Some(reply) => RecipientStatus::after_negative(reply),
                None if self.store.is_local(&recipient.mailbox) => delivered_here(),
                None => RecipientStatus::Deferred(Reply::new(451, "4.0.0", "Not yet")),
            };
            let recipients = message.envelope.recipients.iter().map(status).collect();
            // `copy` has sent the DSN of success.
            let give_up = Some(self.config.retry.give_up);
            let attempt = Attempt { give_up, ..Attempt::in_maildir("-", "-") };
            let result = DeliveryResult { recipients, decided_by: DecidedBy::Us };
            let _ = self.retry_queue.reporter.finish_attempt(message, result, &attempt, &mut lock);
        }
    }

    /// Copies a queued message into our mailboxes. Returns the recipients that the rules reject or defer, with the
    /// replies.
    fn copy(&self, here: &QueuedEnvelope, message: &mut QueuedMessage) -> io::Result<Vec<(Recipient, Reply)>> {
        let mut writer = MessageWriter::default();
        let routing = self.mailboxes.begin_all(&mut writer, here, Vec::new(), message.size, "")?;
        let mut success_dsn = SuccessDsn::new(&self.retry_queue.reporter, here, &routing);
        for_each_block(message, |block| {
            success_dsn.observe(block);
            writer.write(block)
        })?;
        writer.commit()?;
        success_dsn.send();
        Ok(routing.rejected)
    }

    /// Sends the messages that are due in a session with the provider, before ATRN. If the provider's limits permit no
    /// more messages in the session (RFC 9422), `connect` opens another one. Returns the last session; `None`: it has
    /// failed, which is logged.
    pub fn send(
        &self, session: ClientSession, connect: &dyn Fn() -> Result<ClientSession, SessionFailure>,
        counters: &CallCounters,
    ) -> Option<ClientSession> {
        let Some(mut lock) = self.lock_if_any(counters) else { return Some(session) };
        let last = self.send_in_sessions(session, connect, &mut lock, counters);
        // With a submission host, `submit` counts the call: a message that is skipped here must be skipped there too.
        if self.config.submission.is_none() {
            lock.count_call();
        }
        last
    }

    fn send_in_sessions(
        &self, mut session: ClientSession, connect: &dyn Fn() -> Result<ClientSession, SessionFailure>,
        lock: &mut QueueLock, counters: &CallCounters,
    ) -> Option<ClientSession> {
        let mut logged = false;
        loop {
            let id = session.id().to_owned();
            let lost =
                |failure: &SessionFailure| log::warn!("event=session-lost session={id} error={}", quoted(failure));
            if let Err(failure) = self.send_in_session(&mut session, lock, &mut logged, counters) {
                lost(&failure);
                session.close_after(&failure);
                return None;
            }
            if !session.is_used_up() || !lock.has_next() {
                return Some(session);
            }
            session.quit();
            session = connect().inspect_err(lost).ok()?;
        }
    }

    fn send_in_session(
        &self, session: &mut ClientSession, lock: &mut QueueLock, logged: &mut bool, counters: &CallCounters,
    ) -> Result<(), SessionFailure> {
        let id = session.id().to_owned();
        session.send_queue(&mut self.mail_elsewhere(lock), &mut |message, mut result, client, mail| {
            let lock = &mut *mail.lock;
            if let Some(reply) = result.no_mail_accepted().cloned() {
                if !std::mem::replace(logged, true) {
                    log::warn!("event=outgoing-waits session={id} reason={}", quoted(&reply));
                }
                for status in &mut result.recipients {
                    if let RecipientStatus::Rejected(reply) = status {
                        *status = RecipientStatus::Deferred(reply.clone());
                    }
                }
                if self.config.submission.is_some() {
                    // The message stays due, so that `submit` sends it to the submission host in this call.
                    let settled = lock.settle(message, &result);
                    return settled.unwrap_or_else(|error| {
                        log::error!("event=settle-failed session={id} error={}", quoted(error))
                    });
                }
            }
            self.finish_attempt(message, result, (&id, Via::Provider, client), lock, counters);
        })
    }

    /// Sends the messages that are still due to the submission host, if one is configured. A failure is logged.
    pub fn submit(&self, cancel: &CancelToken, counters: &CallCounters) {
        let Some(submission) = &self.config.submission else { return };
        let Some(mut lock) = self.lock_if_any(counters) else { return };
        let remote = match Remote::new(submission) {
            Ok(remote) => remote,
            Err(error) => return log::error!("event=submission-failed error={}", quoted(error)),
        };
        // Connect only if a message is due, and not skipped in this call.
        while lock.has_next() && self.submit_in_session(&remote, &mut lock, cancel, counters) {}
        lock.count_call();
    }

    /// Returns whether the session ended because of the host's limits (RFC 9422), so that another session can send
    /// more.
    fn submit_in_session(
        &self, remote: &Remote, lock: &mut QueueLock, cancel: &CancelToken, counters: &CallCounters,
    ) -> bool {
        let (config, id) = (&self.mailboxes.config, self.mailboxes.ids.session_id());
        let options = ClientOptions {
            name: config.hostname.clone(),
            chunking: true,
            submits: true,
            nonce: self.mailboxes.ids.nonce(),
            without_8bitmime: self.config.without_8bitmime,
            ..ClientOptions::default()
        };
        let connect = Connect {
            id: &id,
            peer: 'S',
            tls: None,
            implicit_tls: false,
            timeouts: &config.timeouts,
            cancel,
            limit: None,
        };
        let sent = remote.connect(&options, &connect).and_then(|(mut session, _)| {
            session.send_queue(&mut self.mail_elsewhere(lock), &mut |message, result, client, mail| {
                self.finish_attempt(message, result, (&id, Via::Submission, client), mail.lock, counters);
            })?;
            let used_up = session.is_used_up();
            session.quit();
            Ok(used_up)
        });
        sent.unwrap_or_else(|failure| {
            log::warn!("event=submission-failed session={id} error={}", quoted(&failure));
            false
        })
    }

    fn mail_elsewhere<'a>(&'a self, lock: &'a mut QueueLock) -> MailElsewhere<'a> {
        MailElsewhere { lock, store: &self.store }
    }

    fn finish_attempt(
        &self, message: QueuedMessage, result: DeliveryResult, (session, via, client): (&str, Via, &Client),
        lock: &mut QueueLock, counters: &CallCounters,
    ) {
        let mut retry = self.config.retry.clone();
        if result.decided_by.is_connection_loss() {
            // After a lost connection the message is due at once, so that the next call sends it, whenever that is.
            (retry.first, retry.max) = (Duration::ZERO, Duration::ZERO);
        }
        let peer = client.peer_name();
        let attempt = Attempt {
            session,
            via,
            relay: peer.unwrap_or("-"),
            peer,
            peer_sends_dsn: client.extensions().dsn,
            retry: Some(&retry),
            give_up: None,
            expire_after: None,
        };
        let (recipients, from, size) =
            (message.envelope.recipients.clone(), message.envelope.from.to_string(), message.size);
        let Ok(settled) = self.retry_queue.reporter.finish_attempt(message, result, &attempt, lock) else { return };
        for (recipient, status) in recipients.iter().zip(&settled.recipients) {
            if let RecipientStatus::Rejected(reply) = status {
                let to = &recipient.mailbox.to_string();
                let recipient = MessageRecipient { from: &from, to, size, envelope_id: None };
                counters.not_accepted(&recipient, peer.unwrap_or("the provider"), reply);
            }
        }
        if settled.recipients.iter().any(RecipientStatus::is_sent) {
            counters.sent();
        }
    }
}

/// The outgoing queue without the recipients in our own domains, for whom [`Outbox::deliver_here`] delivers the
/// message.
struct MailElsewhere<'a> {
    lock: &'a mut QueueLock,
    store: &'a OutgoingStore,
}

impl MessageSource for MailElsewhere<'_> {
    fn next_message(&mut self) -> Option<QueuedMessage> {
        loop {
            let mut message = self.lock.next_message()?;
            message.leave_out(|recipient| self.store.is_local(&recipient.mailbox));
            if !message.envelope.recipients.is_empty() {
                return Some(message);
            }
        }
    }

    fn put_back(&mut self, message: QueuedMessage) {
        self.lock.put_back(message);
    }
}

/// A message that a user or a program submits.
pub struct Submission<'a> {
    pub envelope: &'a Envelope,
    /// Octets on the wire; `None`: not known yet.
    pub size: Option<u64>,
    /// The queue id.
    pub id: String,
    pub arrived: Timestamp,
    /// The `From` that is added if the header has none.
    pub header_from: Option<String>,
    /// Remove `Bcc` fields from the header.
    pub drop_bcc: bool,
}

/// Writes a submitted message into the queue, and completes its header (RFC 6409 section 8).
pub struct SubmissionWriter {
    writer: MessageWriter,
    completer: HeaderCompleter,
    /// The octets to write next, with the fields that were added.
    buffer: Vec<u8>,
    success_dsn: SuccessDsn,
    /// The retry queue, if a recipient of the message is at a next hop.
    retry_queue: Option<Arc<RetryQueue>>,
    message: QueuedEnvelope,
    /// Recipients elsewhere, in the outgoing queue.
    queued: Vec<Recipient>,
    discarded: Vec<Recipient>,
}

impl SubmissionWriter {
    /// Appends content, with LF line ends.
    ///
    /// # Errors
    /// The content could not be written.
    pub fn write(&mut self, octets: &[u8]) -> io::Result<()> {
        self.buffer.clear();
        self.completer.feed(octets, &mut self.buffer);
        self.write_buffer()
    }

    /// Stores the message durably.
    ///
    /// # Errors
    /// The message could not be stored; nothing is left of it.
    pub fn commit(mut self) -> io::Result<()> {
        self.buffer.clear();
        self.completer.finish(&mut self.buffer);
        self.write_buffer()?;
        self.writer.commit()?;
        for recipient in &self.queued {
            log::info!("event=queued id={} to=<{}>", self.message.id, recipient.mailbox);
        }
        log_discarded("-", &self.message, &self.discarded, self.message.arrived);
        self.success_dsn.send();
        self.retry_queue.inspect(|retry_queue| retry_queue.wake());
        Ok(())
    }

    fn write_buffer(&mut self) -> io::Result<()> {
        self.success_dsn.observe(&self.buffer);
        self.writer.write(&self.buffer)
    }
}

impl MessageSink for SubmissionWriter {
    fn write(&mut self, octets: &[u8]) -> Result<(), Reply> {
        self.write(octets).map_err(|error| storage_failure_reply(&error))
    }

    fn commit(self: Box<Self>) -> Result<String, Reply> {
        let id = self.message.id.clone();
        (*self).commit().map_err(|error| storage_failure_reply(&error))?;
        Ok(id)
    }
}

/// Stores outgoing mail and DSNs: in our own mailboxes, or in the outgoing queue.
#[derive(Clone)]
struct OutgoingStore {
    name: QueueName,
    mailboxes: Arc<Mailboxes>,
}

impl OutgoingStore {
    fn is_local(&self, mailbox: &Mailbox) -> bool {
        mailbox.domain().is_some_and(|domain| self.mailboxes.rules().serves(domain))
    }

    /// The message with the recipients in our own domains, and with those elsewhere.
    fn divide(&self, message: &QueuedEnvelope) -> (QueuedEnvelope, QueuedEnvelope) {
        let local = |recipient: &Recipient| self.is_local(&recipient.mailbox);
        let (here, elsewhere) = message.envelope.recipients.iter().cloned().partition(local);
        (message.with_recipients(here), message.with_recipients(elsewhere))
    }

    /// Begins a copy for each of our own mailboxes, and one for all recipients elsewhere, those of aliases included. If
    /// this user may not write into the mailboxes, one copy for all recipients is queued for the next call, and the
    /// routing has `elsewhere` only.
    fn begin(
        &self, here: &QueuedEnvelope, elsewhere: Vec<Recipient>, octets: u64, head: &str,
    ) -> io::Result<(MessageWriter, Routing)> {
        let mut writer = MessageWriter::default();
        match self.mailboxes.begin_all(&mut writer, here, elsewhere.clone(), octets, head) {
            // The recipients were accepted before, so the rules or the mailboxes have changed since.
            Ok(routing) if !routing.rejected.is_empty() => {
                Err(io::Error::new(io::ErrorKind::NotFound, "a recipient has no mailbox here any more"))
            }
            Ok(routing) => Ok((writer, routing)),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                let all = here.with_recipients([&here.envelope.recipients[..], &elsewhere[..]].concat());
                let writer = self.mailboxes.queue.begin_message(&[(self.name.clone(), all)], head)?;
                Ok((writer, Routing { elsewhere, ..Routing::default() }))
            }
            Err(error) => Err(error),
        }
    }
}

impl DsnSink for OutgoingStore {
    fn store(&self, dsn: &DsnMessage) -> io::Result<()> {
        let mut envelope = dsn.envelope(&self.mailboxes.ids);
        let path = ForwardPath::Mailbox(dsn.to.clone());
        if self.is_local(&dsn.to) && self.mailboxes.resolve(&path).is_err() {
            // The sender has no mailbox, for instance root, for whom cron sends. Each domain has a postmaster (RFC 5321
            // section 4.5.1), who gets the DSN.
            let postmaster = dsn.to.domain().and_then(|domain| recipients::address("postmaster", domain));
            let postmaster =
                postmaster.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "there is no postmaster"))?;
            let consequence = format!("<{postmaster}> gets it");
            log::warn!("event=dsn-undeliverable to=<{}> consequence={}", dsn.to, quoted(consequence));
            envelope = envelope.with_recipients(vec![Recipient::plain(postmaster)]);
        }
        let (here, elsewhere) = self.divide(&envelope);
        let octets = dsn.text.len() as u64;
        let (mut writer, routing) = self.begin(&here, elsewhere.envelope.recipients, octets, "")?;
        writer.write(&dsn.text)?;
        // In the queue a file's time of modification defers the DSN. In a mailbox, mail readers show it as the date.
        let not_before = dsn.not_before.filter(|_| here.envelope.recipients.is_empty());
        not_before.into_iter().for_each(|time| writer.set_modified(time));
        writer.commit()?;
        log_discarded("-", &envelope, &routing.discarded, envelope.arrived);
        Ok(())
    }

    fn is_ours(&self, to: &Mailbox) -> bool {
        self.is_local(to)
    }
}
