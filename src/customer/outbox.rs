//! The customer's outgoing mail: it waits in a queue until a call sends it to the provider.
//!
//! Mail for the customer's own domains does not travel: it is delivered at once, or with the next call if the user who
//! sends may not write into mailboxes. If the provider accepts no mail at all (502, 503, 530 or 550 to MAIL: RFC 2645
//! section 5.4 permits that), it goes to the submission host, if one is configured; otherwise it waits, which is logged.

use std::fs::File;
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::counters::CallCounters;
use super::mailboxes::{Mailboxes, RejectedRecipient, Routing};
use super::retry_queue::RetryQueue;
use super::store;
use super::success_dsn::SuccessDsn;
use crate::clock::Timestamp;
use crate::config::{CustomerConfig, OutgoingConfig};
use crate::ids::Ids;
use crate::mail::address::{Domain, ForwardPath, Mailbox};
use crate::mail::header::{HeaderAdditions, HeaderCompleter};
use crate::maildir::{MessageWriter, for_each_block, has_room};
use crate::net::cancel::CancelToken;
use crate::net::trace::quoted;
use crate::queue::{LockError, Queue, QueueLock, QueueName, QueuedEnvelope, QueuedMessage};
use crate::report::{Attempt, DsnMessage, DsnSink, Reporter, Via};
use crate::session::client::{ClientSession, Connect, SessionFailure};
use crate::session::{Remote, Timeouts, disk_full_reply};
use crate::smtp::client::{Client, ClientOptions};
use crate::smtp::command::{Envelope, Recipient};
use crate::smtp::reply::Reply;
use crate::smtp::server::message_too_large;
use crate::smtp::status::{DecidedBy, DeliveryResult, RecipientStatus};

/// The outgoing queue and its ways out.
pub struct Outbox {
    config: OutgoingConfig,
    hostname: String,
    timeouts: Timeouts,
    store: OutgoingStore,
    reporter: Reporter,
    retry_queue: Arc<RetryQueue>,
    waker: OnceLock<Waker>,
}

/// Wakes the thread that tries the retry queue.
type Waker = Box<dyn Fn() + Send + Sync>;

impl Outbox {
    /// `None`: the customer sends no mail.
    pub fn new(config: &CustomerConfig, mailboxes: &Arc<Mailboxes>, ids: &Ids) -> Option<Outbox> {
        let outgoing = config.outgoing.as_ref()?;
        let store = OutgoingStore {
            queue: Queue::new(&config.hostname, ids.clone(), config.timeouts.takeover),
            name: store::outgoing_queue(&outgoing.queue),
            mailboxes: mailboxes.clone(),
            ids: ids.clone(),
        };
        let reporter = Reporter::new(&config.hostname, ids, Some(Arc::new(store.clone())));
        Some(Outbox {
            config: outgoing.clone(),
            hostname: config.hostname.clone(),
            timeouts: config.timeouts.clone(),
            retry_queue: Arc::new(RetryQueue::new(config, mailboxes, reporter.clone())),
            reporter,
            store,
            waker: OnceLock::new(),
        })
    }

    pub fn config(&self) -> &OutgoingConfig {
        &self.config
    }

    pub fn hostname(&self) -> &str {
        &self.hostname
    }

    pub fn ids(&self) -> &Ids {
        &self.store.ids
    }

    pub fn retry_queue(&self) -> &Arc<RetryQueue> {
        &self.retry_queue
    }

    pub fn reporter(&self) -> &Reporter {
        &self.reporter
    }

    /// `wake` is called when a message was put into the retry queue. Without it the message waits for the next call, or
    /// until a daemon looks.
    pub fn on_retry_queued(&self, wake: Waker) {
        let _ = self.waker.set(wake);
    }

    /// Reports a message that was put into the retry queue.
    pub fn wake_retries(&self) {
        if let Some(wake) = self.waker.get() {
            wake();
        }
    }

    /// The mailbox that a path means: one of ours, which must exist, or one elsewhere.
    pub fn recipient(&self, path: &ForwardPath) -> Result<Mailbox, Reply> {
        match path {
            ForwardPath::Mailbox(mailbox)
                if !mailbox.domain().is_some_and(|domain| self.store.accepts_domain(domain)) =>
            {
                let qualified = mailbox.domain().is_some_and(|domain| domain.as_str().contains('.'));
                // RFC 6409 section 4.2.
                let unqualified = || Reply::new(554, "5.1.2", "The domain is not fully qualified");
                qualified.then(|| mailbox.clone()).ok_or_else(unqualified)
            }
            ours => {
                self.store.mailboxes.resolve(ours)?;
                self.store.mailboxes.canonical_recipient(ours)
            }
        }
    }

    /// Rejects a message of this size if it is too large, or the disk would not hold it.
    pub fn check_room(&self, octets: u64) -> Result<(), Reply> {
        self.check_size(octets)?;
        if has_room(&self.store.name.path, octets) { Ok(()) } else { Err(disk_full_reply()) }
    }

    /// Rejects a message of this size if it is too large.
    pub fn check_size(&self, octets: u64) -> Result<(), Reply> {
        if octets > self.config.max_size { Err(message_too_large(self.config.max_size)) } else { Ok(()) }
    }

    /// Begins to store a message; `received` is our `Received`.
    pub fn store(&self, submission: &Submission<'_>, received: &str) -> io::Result<SubmissionWriter> {
        let additions = HeaderAdditions {
            date: submission.arrived.rfc5322(),
            message_id: format!("<{}@{}>", submission.id, self.hostname),
            from: submission.header_from.clone(),
            drop_bcc: submission.drop_bcc,
        };
        let message = QueuedEnvelope {
            id: submission.id.to_owned(),
            arrived: submission.arrived,
            envelope: submission.envelope.clone(),
        };
        let (here, elsewhere) = self.store.divide(&message);
        // Without an announced size only a mailbox that is full already has no room.
        let octets = submission.size.unwrap_or(1) + received.len() as u64;
        let (writer, routing) = self.store.begin(&here, &elsewhere, octets, received)?;
        // Recipients here have the message with its commit; the hosts elsewhere report of the others.
        let success_dsn = routing.as_ref().and_then(|routing| SuccessDsn::new(&self.reporter, &here, routing, false));
        let retry_queued = routing.is_some_and(|routing| !routing.hop_recipients.is_empty());
        let completer = HeaderCompleter::new(additions);
        let (id, recipients) = (message.id, elsewhere.envelope.recipients);
        Ok(SubmissionWriter { writer, completer, buffer: Vec::new(), success_dsn, retry_queued, id, recipients })
    }

    /// How many messages wait.
    pub fn waiting(&self) -> u64 {
        self.store.queue.count(&self.store.name, usize::MAX).unwrap_or(0) as u64
    }

    /// Shows each message that waits.
    pub fn each_waiting(&self, show: impl FnMut(&QueuedMessage)) -> io::Result<()> {
        self.store.queue.each(&self.store.name, show)
    }

    /// A file that is gone with its last descriptor, for content that is read before it is stored.
    pub fn unnamed_file(&self) -> io::Result<File> {
        self.store.queue.unnamed_file(&self.store.name)
    }

    fn lock_if_any(&self) -> Option<QueueLock> {
        if self.store.queue.count(&self.store.name, 1).unwrap_or(0) == 0 {
            return None;
        }
        let lock = self.store.queue.lock(std::slice::from_ref(&self.store.name));
        let failed = |error: &LockError| {
            let reason = match error {
                LockError::Busy(_) => "another call is sending the outgoing mail".to_owned(),
                LockError::Failed(error) => error.to_string(),
            };
            log::warn!("event=outgoing-waits reason={}", quoted(reason));
        };
        lock.inspect_err(failed).ok()
    }

    /// Delivers messages for our own mailboxes that users without access to them have queued.
    pub fn deliver_here(&self) {
        let Some(mut lock) = self.lock_if_any() else { return };
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
                    log::error!("event=storage-failed id={} error={}", here.id, quoted(error));
                    continue;
                }
            };
            // A recipient that was accepted by earlier rules may have no mailbox any more.
            let status = |recipient: &Recipient| match rejected.iter().find(|rejected| rejected.recipient == *recipient)
            {
                Some(RejectedRecipient { reply, .. }) => RecipientStatus::Rejected(reply.clone()),
                None if here.envelope.recipients.contains(recipient) => {
                    RecipientStatus::Sent(Reply::new(250, "2.0.0", "Delivered here"))
                }
                None => RecipientStatus::Deferred(Reply::new(451, "4.0.0", "Not yet")),
            };
            let recipients = message.envelope.recipients.iter().map(status).collect();
            // The DSN of success was sent with the copies.
            let attempt = Attempt::in_maildir("-", "-");
            let result = DeliveryResult { recipients, decided_by: DecidedBy::Us };
            let _ = self.reporter.finish_attempt(message, result, &attempt, &mut lock);
        }
    }

    /// Copies a queued message into our mailboxes; returns the recipients that have none.
    fn copy(&self, here: &QueuedEnvelope, message: &mut QueuedMessage) -> io::Result<Vec<RejectedRecipient>> {
        let mut writer = MessageWriter::default();
        let (routing, rejected) = self.store.mailboxes.begin_all(&mut writer, here, message.size, "")?;
        let mut success_dsn = SuccessDsn::new(&self.reporter, here, &routing, false);
        for_each_block(message, |block| {
            if let Some(dsn) = &mut success_dsn {
                dsn.observe(block);
            }
            writer.write(block)
        })?;
        writer.commit()?;
        if let Some(dsn) = success_dsn {
            dsn.send();
        }
        Ok(rejected)
    }

    /// Sends what is due in a session with the provider, before ATRN.
    pub fn send(&self, session: &mut ClientSession, counters: &CallCounters) -> Result<(), SessionFailure> {
        let Some(mut lock) = self.lock_if_any() else { return Ok(()) };
        let id = session.id().to_owned();
        let mut logged = false;
        session.send_queue(&mut lock, &mut |message, mut result, client, lock| {
            if let Some(reply) = result.no_mail_accepted().cloned() {
                if !std::mem::replace(&mut logged, true) {
                    log::warn!("event=outgoing-waits session={id} reason={}", quoted(&reply));
                }
                for status in &mut result.recipients {
                    if let RecipientStatus::Rejected(reply) = status {
                        *status = RecipientStatus::Deferred(reply.clone());
                    }
                }
                if self.config.submission.is_some() {
                    // It stays due: the submission host is next, in this very call.
                    let settled = lock.settle(message, &result);
                    return settled.unwrap_or_else(|error| log::error!("event=settle-failed error={}", quoted(error)));
                }
            }
            self.finish_attempt(message, result, (&id, Via::Provider, client), lock, counters);
        })
    }

    /// Sends what is still due to the submission host.
    pub fn submit(&self, cancel: &CancelToken, counters: &CallCounters) {
        let Some(submission) = &self.config.submission else { return };
        let Some(mut lock) = self.lock_if_any() else { return };
        let remote = match Remote::new(submission) {
            Ok(remote) => remote,
            Err(error) => return log::error!("event=submission-failed error={}", quoted(error)),
        };
        let options = ClientOptions { name: self.hostname.clone(), chunking: true, ..ClientOptions::default() };
        let id = self.ids().session_id();
        let connect = Connect { id: &id, peer: 'S', tls: None, timeouts: &self.timeouts, cancel, limit: None };
        let sent = remote.connect(&options, &connect).and_then(|(mut session, _)| {
            session.send_queue(&mut lock, &mut |message, result, client, lock| {
                self.finish_attempt(message, result, (&id, Via::Submission, client), lock, counters);
            })?;
            session.quit();
            Ok(())
        });
        if let Err(failure) = sent {
            log::warn!("event=submission-failed session={id} error={}", quoted(&failure));
        }
    }

    fn finish_attempt(
        &self, message: QueuedMessage, result: DeliveryResult, (session, via, client): (&str, Via, &Client),
        lock: &mut QueueLock, counters: &CallCounters,
    ) {
        let mut retry = self.config.retry.clone();
        if result.decided_by == DecidedBy::ConnectionLoss {
            // A lost connection says nothing about the message: the next call may send it, whenever that is.
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
        };
        let recipients = message.envelope.recipients.clone();
        let Ok(settled) = self.reporter.finish_attempt(message, result, &attempt, lock) else { return };
        for (recipient, status) in recipients.iter().zip(&settled.recipients) {
            if let RecipientStatus::Rejected(reply) = status {
                counters.not_accepted(&recipient.mailbox, peer.unwrap_or("the provider"), reply);
            }
        }
        if settled.recipients.iter().any(RecipientStatus::is_sent) {
            counters.sent();
        }
    }
}

/// A message that a user or a program submits.
pub struct Submission<'a> {
    pub envelope: &'a Envelope,
    /// Octets on the wire, if they are known.
    pub size: Option<u64>,
    pub id: &'a str,
    pub arrived: Timestamp,
    /// A `From` for a header without one.
    pub header_from: Option<String>,
    pub drop_bcc: bool,
}

/// A submitted message on its way into the queue, its header completed (RFC 6409 section 8).
pub struct SubmissionWriter {
    writer: MessageWriter,
    completer: HeaderCompleter,
    buffer: Vec<u8>,
    success_dsn: Option<SuccessDsn>,
    retry_queued: bool,
    id: String,
    /// Recipients elsewhere, which are queued.
    recipients: Vec<Recipient>,
}

impl SubmissionWriter {
    pub fn write(&mut self, octets: &[u8]) -> io::Result<()> {
        self.buffer.clear();
        self.completer.feed(octets, &mut self.buffer);
        self.pass_on()
    }

    /// Returns whether the retry queue has a part of the message: call [`Outbox::wake_retries`] then.
    pub fn commit(mut self) -> io::Result<bool> {
        self.buffer.clear();
        self.completer.finish(&mut self.buffer);
        self.pass_on()?;
        self.writer.commit()?;
        for recipient in &self.recipients {
            log::info!("event=queued id={} to=<{}>", self.id, recipient.mailbox);
        }
        if let Some(dsn) = &self.success_dsn {
            dsn.send();
        }
        Ok(self.retry_queued)
    }

    fn pass_on(&mut self) -> io::Result<()> {
        if let Some(dsn) = &mut self.success_dsn {
            dsn.observe(&self.buffer);
        }
        self.writer.write(&self.buffer)
    }
}

/// Where outgoing mail and DSNs are stored: our own mailboxes, or the outgoing queue.
#[derive(Clone)]
struct OutgoingStore {
    queue: Queue,
    name: QueueName,
    mailboxes: Arc<Mailboxes>,
    ids: Ids,
}

impl OutgoingStore {
    fn accepts_domain(&self, domain: &Domain) -> bool {
        self.mailboxes.accepts_domain(domain)
    }

    /// The same message for our own mailboxes, and for all recipients elsewhere.
    fn divide(&self, message: &QueuedEnvelope) -> (QueuedEnvelope, QueuedEnvelope) {
        let ours = |recipient: &Recipient| recipient.mailbox.domain().is_some_and(|domain| self.accepts_domain(domain));
        let (here, elsewhere) = message.envelope.recipients.iter().cloned().partition(ours);
        (message.with_recipients(here), message.with_recipients(elsewhere))
    }

    /// Begins a copy for each of our own mailboxes, and one for all recipients elsewhere. `None`: this user may not write
    /// into the mailboxes, so all of the message is queued for the next call.
    fn begin(
        &self, here: &QueuedEnvelope, elsewhere: &QueuedEnvelope, octets: u64, head: &str,
    ) -> io::Result<(MessageWriter, Option<Routing>)> {
        let mut writer = MessageWriter::default();
        match self.mailboxes.begin_all(&mut writer, here, octets, head) {
            // The same rules have accepted its recipients before.
            Ok((_, rejected)) if !rejected.is_empty() => {
                Err(io::Error::new(io::ErrorKind::NotFound, "a recipient has no mailbox here any more"))
            }
            Ok((routing, _)) => {
                if !elsewhere.envelope.recipients.is_empty() {
                    self.queue.add_copy(&mut writer, &self.name, elsewhere, head)?;
                }
                Ok((writer, Some(routing)))
            }
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                let recipients = [&here.envelope.recipients[..], &elsewhere.envelope.recipients[..]].concat();
                let all = here.with_recipients(recipients);
                Ok((self.queue.begin_message(&[(self.name.clone(), all)], head)?, None))
            }
            Err(error) => Err(error),
        }
    }
}

impl DsnSink for OutgoingStore {
    fn store(&self, dsn: &DsnMessage) -> io::Result<()> {
        let local = dsn.to.domain().is_some_and(|domain| self.accepts_domain(domain));
        if local && self.mailboxes.resolve(&ForwardPath::Mailbox(dsn.to.clone())).is_err() {
            log::warn!("event=dsn-undeliverable to=<{}>", dsn.to);
            return Ok(());
        }
        let (here, elsewhere) = self.divide(&dsn.envelope(&self.ids));
        let (mut writer, _) = self.begin(&here, &elsewhere, dsn.text.len() as u64, "")?;
        writer.write(&dsn.text)?;
        writer.commit().map(drop)
    }
}
