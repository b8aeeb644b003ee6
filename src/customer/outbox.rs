//! The customer's outgoing mail: it waits in a Maildir until a call takes it to the provider.
//!
//! Mail for the customer's own domains does not travel: it is delivered at once, or with the next call when the
//! user who sends may not write into mailboxes. What the provider does not
//! take at all (502, 503, 530 or 550 to MAIL: RFC 2645 section 5.4 lets it) goes to the submission host, if
//! there is one, and otherwise waits, and that is said.

use std::fs::File;
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::counters::CallCounters;
use super::mailboxes::{Mailboxes, RejectedRecipient, Routing};
use super::next_hop::RetryQueue;
use super::receiver::SuccessDsn;
use crate::config;
use crate::ids::Ids;
use crate::mail::address::{ForwardPath, Mailbox};
use crate::mail::header::{HeaderAdditions, HeaderCompleter};
use crate::maildir::{MessageWriter, for_each_block};
use crate::net::connection::CancelToken;
use crate::queue::{Envelope, LockError, Queue, QueueLock, QueueName, QueuedMessage};
use crate::report::{Attempt, DsnMessage, DsnSink, Peer, Reporter};
use crate::session::client::{ClientSession, Remote, SessionFailure, mail_not_accepted_here};
use crate::session::server::disk_full_reply;
use crate::smtp::client::{Client, DecidedBy, DeliveryResult, RecipientStatus};
use crate::smtp::command::{MailFrom, Recipient};
use crate::smtp::reply::Reply;

/// The outgoing queue and its ways out.
pub struct Outbox {
    config: config::OutgoingConfig,
    hostname: String,
    timeouts: config::Timeouts,
    store_: OutgoingStore,
    reporter: Reporter,
    retry_queue: Arc<RetryQueue>,
    waker: OnceLock<Waker>,
}

/// Wakes who hands mail over to next hops.
type Waker = Box<dyn Fn() + Send + Sync>;

impl Outbox {
    /// `None`: the customer sends nothing.
    pub fn new(config: &config::CustomerConfig, mailboxes: &Arc<Mailboxes>, ids: &Ids) -> Option<Outbox> {
        let outgoing = config.outgoing.as_ref()?;
        let queue = Queue::new(&outgoing.queue, &config.hostname, ids.clone(), config.timeouts.takeover);
        let store = OutgoingStore { queue, mailboxes: mailboxes.clone(), ids: ids.clone() };
        let reporter = Reporter::new(&config.hostname, ids, Some(Arc::new(store.clone())));
        Some(Outbox {
            config: outgoing.clone(),
            hostname: config.hostname.clone(),
            timeouts: config.timeouts.clone(),
            retry_queue: Arc::new(RetryQueue::new(config, mailboxes, reporter.clone())),
            reporter,
            store_: store,
            waker: OnceLock::new(),
        })
    }

    pub fn config(&self) -> &config::OutgoingConfig {
        &self.config
    }

    pub fn hostname(&self) -> &str {
        &self.hostname
    }

    pub fn ids(&self) -> &Ids {
        &self.store_.ids
    }

    pub fn retry_queue(&self) -> &Arc<RetryQueue> {
        &self.retry_queue
    }

    /// `wake` is called when mail has come for a next hop. Where nobody is woken it goes with the next call, or when a
    /// daemon looks.
    pub fn on_retry_queued(&self, wake: Waker) {
        let _ = self.waker.set(wake);
    }

    /// Mail was put for a next hop.
    pub fn wake_retries(&self) {
        if let Some(wake) = self.waker.get() {
            wake();
        }
    }

    pub fn reporter(&self) -> &Reporter {
        &self.reporter
    }

    /// The mailbox a path means: one of ours, which must exist, or one elsewhere.
    pub fn recipient(&self, path: &ForwardPath) -> Result<Mailbox, Reply> {
        match path {
            ForwardPath::Mailbox(mailbox)
                if !mailbox.domain().is_some_and(|domain| self.store_.accepts_domain(domain)) =>
            {
                let qualified = mailbox.domain().is_some_and(|domain| domain.as_str().contains('.'));
                // RFC 6409 section 4.2.
                let unqualified = || Reply::new(554, "5.1.2", "The domain is not fully qualified");
                qualified.then(|| mailbox.clone()).ok_or_else(unqualified)
            }
            ours => {
                self.store_.mailboxes.resolve(ours)?;
                self.store_.mailboxes.canonical_recipient(ours)
            }
        }
    }

    /// Whether so many octets more may come.
    pub fn check_room(&self, octets: u64) -> Result<(), Reply> {
        self.check_size(octets)?;
        if self.store_.queue.has_room(octets) { Ok(()) } else { Err(disk_full_reply()) }
    }

    /// Whether a message may have so many octets.
    pub fn check_size(&self, octets: u64) -> Result<(), Reply> {
        if octets > self.config.max_size {
            Err(crate::smtp::server::message_too_large(self.config.max_size))
        } else {
            Ok(())
        }
    }

    /// Begins to store a message; `received` is our `Received`, `from` a `From` for a header without one.
    pub fn store(&self, letter: &Submission<'_>, received: &str) -> io::Result<SubmissionWriter> {
        let additions = HeaderAdditions {
            date: letter.arrived.rfc5322(),
            message_id: format!("<{}@{}>", letter.id, self.hostname),
            from: letter.header_from.clone(),
            drop_bcc: letter.drop_bcc,
        };
        let envelope = Envelope::new(letter.mail, letter.recipients.to_vec(), letter.id, letter.arrived);
        let (here, elsewhere) = self.store_.divide(envelope);
        // Where nothing is known of its size, only who is full already has no room.
        let octets = letter.mail.size.unwrap_or(1) + received.len() as u64;
        let (copies, begun) = self.store_.begin(&here, &elsewhere, octets, received)?;
        // What stays here is delivered with its commit; of the rest others will tell.
        let told = begun.as_ref().and_then(|begun| SuccessDsn::new(&self.reporter, &here, begun, false));
        let waits = begun.is_some_and(|begun| !begun.hop_recipients.is_empty());
        Ok(SubmissionWriter {
            copies,
            completer: HeaderCompleter::new(additions),
            buffer: Vec::new(),
            success_dsn: told,
            retry_queued: waits,
        })
    }

    /// Messages that wait.
    pub fn waiting(&self) -> u64 {
        let entries = self.store_.queue.maildir(&QueueName::Outgoing).entries();
        entries.map_or(0, |entries| entries.len() as u64)
    }

    /// What waits, for a listing.
    pub fn each_waiting(&self, show: impl FnMut(&QueuedMessage)) -> io::Result<()> {
        self.store_.queue.each(&QueueName::Outgoing, show)
    }

    /// Room for content that is looked at before it is stored; it goes with its last descriptor.
    pub fn scratch(&self) -> io::Result<File> {
        let name = self.store_.ids.file_name(&self.hostname);
        self.store_.queue.maildir(&QueueName::Outgoing).unnamed_file(&name)
    }

    fn lock(&self) -> Result<QueueLock, String> {
        self.store_.queue.lock(&[QueueName::Outgoing]).map_err(|error| match error {
            LockError::Busy(_) => "another call is sending the outgoing mail".to_owned(),
            LockError::Failed(error) => error.to_string(),
        })
    }

    /// Delivers what users who may not write into mailboxes have queued for our own.
    pub fn deliver_here(&self) {
        let Some(mut lock) = self.lock_if_any() else { return };
        while let Some(mut message) = lock.next_message() {
            let (here, _) = self.store_.divide(message.envelope.clone());
            if here.recipients.is_empty() {
                continue;
            }
            let refused = match self.copy(&here, &mut message) {
                Ok(refused) => refused,
                Err(error) => {
                    log::error!("event=delivery-failed id={} error={:?}", here.id, error.to_string());
                    continue;
                }
            };
            // What was queued when the rules were others may have no mailbox any more.
            let status = |recipient: &Recipient| match refused.iter().find(|(other, _)| other == recipient) {
                Some((_, reply)) => RecipientStatus::Rejected(reply.clone()),
                None if here.recipients.contains(recipient) => {
                    RecipientStatus::Sent(Reply::new(250, "2.0.0", "Delivered here"))
                }
                None => RecipientStatus::Deferred(Reply::new(451, "4.0.0", "Not yet")),
            };
            let statuses = message.envelope.recipients.iter().map(status).collect();
            // Of a delivery that was asked for its sender has been told.
            let peer = Peer { name: None, dsn: true };
            let attempt = Attempt { peer, retry: None, done: "delivered", context: "here=yes" };
            let _ = self.reporter.finish_attempt(
                message,
                DeliveryResult { recipients: statuses, decided_by: DecidedBy::Us },
                &attempt,
                &mut lock,
            );
        }
    }

    /// A queued message, into our mailboxes; those who have none.
    fn copy(&self, here: &Envelope, message: &mut QueuedMessage) -> io::Result<Vec<RejectedRecipient>> {
        let mut copies = MessageWriter::default();
        let (begun, refused) = self.store_.mailboxes.begin_all(&mut copies, here, message.size, "")?;
        let mut told = SuccessDsn::new(&self.reporter, here, &begun, false);
        for_each_block(message, |piece| {
            if let Some(told) = &mut told {
                told.observe(piece);
            }
            copies.write(piece)
        })?;
        copies.commit()?;
        if let Some(told) = told {
            told.send();
        }
        Ok(refused)
    }

    /// Sends what is due in a session with the provider, before ATRN.
    pub fn send(&self, session: &mut ClientSession, counters: &CallCounters) -> Result<(), SessionFailure> {
        let Some(mut lock) = self.lock_if_any() else { return Ok(()) };
        let mut said = false;
        session.send_queue(&mut lock, &mut |message, mut result, client, lock| {
            if mail_not_accepted_here(&result).is_some() {
                if !std::mem::replace(&mut said, true) {
                    log::warn!("event=outgoing-kept reason={:?}", reason(&result));
                }
                for status in &mut result.recipients {
                    if let RecipientStatus::Rejected(reply) = status {
                        *status = RecipientStatus::Deferred(reply.clone());
                    }
                }
                if self.config.submission.is_some() {
                    // It stays due: the submission host is next, in this very call.
                    let settled = message.settle(&result, lock);
                    return settled.unwrap_or_else(|error| log::error!("event=settle-failed error={error:?}"));
                }
            }
            self.finish_attempt(message, result, client, lock, counters);
        })
    }

    /// Sends what is still due to the submission host.
    pub fn submit(&self, cancel: &CancelToken, counters: &CallCounters) {
        let Some(submission) = &self.config.submission else { return };
        let Some(mut lock) = self.lock_if_any() else { return };
        let upstream = match Remote::new(submission) {
            Ok(upstream) => upstream,
            Err(error) => return log::error!("event=submission-failed error={error:?}"),
        };
        let sent = upstream.connect(&self.hostname, &self.timeouts, cancel).and_then(|mut session| {
            session.send_queue(&mut lock, &mut |message, result, client, lock| {
                self.finish_attempt(message, result, client, lock, counters);
            })?;
            session.quit();
            Ok(())
        });
        if let Err(failure) = sent {
            log::warn!("event=submission-failed error={:?}", failure.to_string());
        }
    }

    fn lock_if_any(&self) -> Option<QueueLock> {
        if self.store_.queue.maildir(&QueueName::Outgoing).is_empty().unwrap_or(true) {
            return None;
        }
        self.lock().inspect_err(|error| log::warn!("event=outgoing-kept reason={error:?}")).ok()
    }

    fn finish_attempt(
        &self,
        message: QueuedMessage,
        result: DeliveryResult,
        client: &Client,
        lock: &mut QueueLock,
        counters: &CallCounters,
    ) {
        let peer = Peer { name: client.peer_name(), dsn: client.offered().dsn };
        let mut retry = self.config.retry.clone();
        if result.decided_by == DecidedBy::ConnectionLoss {
            // That the line dropped says nothing of the mail: the next call may take it, whenever that is.
            (retry.first, retry.max) = (Duration::ZERO, Duration::ZERO);
        }
        let context = format!("host={}", peer.name.unwrap_or("-"));
        let attempt = Attempt { peer, retry: Some(&retry), done: "sent", context: &context };
        let recipients = message.envelope.recipients.clone();
        let Ok(concluded) = self.reporter.finish_attempt(message, result, &attempt, lock) else { return };
        for (recipient, status) in recipients.iter().zip(&concluded.recipients) {
            if let RecipientStatus::Rejected(reply) = status {
                counters.refused(&recipient.mailbox, peer.name.unwrap_or("the provider"), reply);
            }
        }
        if concluded.recipients.iter().any(|status| matches!(status, RecipientStatus::Sent(_))) {
            counters.sent();
        }
    }
}

fn reason(result: &DeliveryResult) -> String {
    result
        .recipients
        .iter()
        .find_map(|status| if let RecipientStatus::Rejected(reply) = status { Some(reply.to_string()) } else { None })
        .unwrap_or_default()
}

/// A message handed in by a user or a program.
pub struct Submission<'a> {
    pub mail: &'a MailFrom,
    pub recipients: &'a [Recipient],
    pub id: &'a str,
    pub arrived: crate::clock::Timestamp,
    pub header_from: Option<String>,
    pub drop_bcc: bool,
}

/// A message on its way into the queue, its header completed (RFC 6409 section 8).
pub struct SubmissionWriter {
    copies: MessageWriter,
    completer: HeaderCompleter,
    buffer: Vec<u8>,
    success_dsn: Option<SuccessDsn>,
    retry_queued: bool,
}

impl SubmissionWriter {
    pub fn write(&mut self, octets: &[u8]) -> io::Result<()> {
        self.buffer.clear();
        self.completer.feed(octets, &mut self.buffer);
        self.pass()
    }

    /// `true`: something waits for a next hop, see [`Outbox::hand_over`].
    pub fn commit(mut self) -> io::Result<bool> {
        self.buffer.clear();
        self.completer.finish(&mut self.buffer);
        self.pass()?;
        self.copies.commit()?;
        if let Some(told) = &self.success_dsn {
            told.send();
        }
        Ok(self.retry_queued)
    }

    fn pass(&mut self) -> io::Result<()> {
        if let Some(told) = &mut self.success_dsn {
            told.observe(&self.buffer);
        }
        self.copies.write(&self.buffer)
    }
}

/// Where outgoing mail is put, and notices: our own mailboxes, or the queue.
#[derive(Clone)]
struct OutgoingStore {
    queue: Queue,
    mailboxes: Arc<Mailboxes>,
    ids: Ids,
}

impl OutgoingStore {
    fn accepts_domain(&self, domain: &crate::mail::address::Domain) -> bool {
        self.mailboxes.accepts_domain(domain)
    }

    /// The same message for our own mailboxes, and for all recipients elsewhere.
    fn divide(&self, mut envelope: Envelope) -> (Envelope, Envelope) {
        let ours = |recipient: &Recipient| recipient.mailbox.domain().is_some_and(|domain| self.accepts_domain(domain));
        let (here, elsewhere) = envelope.recipients.drain(..).partition(ours);
        (Envelope { recipients: here, ..envelope.clone() }, Envelope { recipients: elsewhere, ..envelope })
    }

    /// A copy for each of our own mailboxes, and one for all recipients elsewhere. `None`: the mailboxes are not ours to
    /// write into, so all of it is queued, for whoever makes the next call.
    fn begin(
        &self,
        here: &Envelope,
        elsewhere: &Envelope,
        octets: u64,
        head: &str,
    ) -> io::Result<(MessageWriter, Option<Routing>)> {
        let mut copies = MessageWriter::default();
        match self.mailboxes.begin_all(&mut copies, here, octets, head) {
            // Its recipients were looked up before, by the same rules.
            Ok((_, refused)) if !refused.is_empty() => {
                Err(io::Error::new(io::ErrorKind::NotFound, "a recipient has no mailbox here any more"))
            }
            Ok((begun, _)) => {
                if !elsewhere.recipients.is_empty() {
                    self.queue.add_copy(&mut copies, &QueueName::Outgoing, elsewhere, head)?;
                }
                Ok((copies, Some(begun)))
            }
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                let recipients = [&here.recipients[..], &elsewhere.recipients[..]].concat();
                let all = Envelope { recipients, ..here.clone() };
                Ok((self.queue.begin_message(&[(QueueName::Outgoing, all)], head)?, None))
            }
            Err(error) => Err(error),
        }
    }
}

impl DsnSink for OutgoingStore {
    fn store(&self, letter: &DsnMessage) -> io::Result<()> {
        let local = letter.to.domain().is_some_and(|domain| self.accepts_domain(domain));
        if local && self.mailboxes.resolve(&ForwardPath::Mailbox(letter.to.clone())).is_err() {
            log::warn!("event=notice-undeliverable to=<{}>", letter.to);
            return Ok(());
        }
        let envelope = letter.envelope(&self.ids);
        let (here, elsewhere) = self.divide(envelope);
        let (mut copies, _) = self.begin(&here, &elsewhere, letter.text.len() as u64, "")?;
        copies.write(&letter.text)?;
        copies.commit().map(drop)
    }
}
