//! Hand-over: mail for a next hop, the mail server that is there already, by LMTP (RFC 2033) or SMTP.
//!
//! ```text
//! provider ─ RCPT ──▶ asked through: RCPT to the next hop ──▶ its reply is ours
//!          ─ content ▶ kept until all of it is there, then to every next hop ─┬─ all took it: 250
//!                                                                             ├─ nobody took it: their reply
//!                                                                             └─ some took it: 250, and the rest
//!                                            ROOT/.handover, tried again ◀──────── is ours now (or is told of)
//! ```
//!
//! The provider keeps what was not answered 250, so nothing of ours waits as long as nobody has taken it. Only a
//! message that some have taken and others have not cannot go back: for those others it is stored, durably, before
//! the 250. All next hops of a message share one deadline, since the provider waits no longer; who has not answered
//! by then may have it, and gets it again.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, Write};
use std::net::ToSocketAddrs;
use std::time::{Duration, Instant, SystemTime};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::config::{self, Retry, Timeouts};
use crate::maildir::{Entry, for_each_block};
use crate::net::connection::CancelToken;
use crate::queue::{Envelope, LockError, Queue, QueueLock, QueueName, QueuedMessage};
use crate::recipients::{self, NextHop};
use crate::report::{Attempt, Peer, Reporter};
use crate::session::client::{ClientSession, SessionFailure, connect, connect_over};
use crate::session::server::storage_failure_reply;
use crate::smtp::client::{ClientInfo, ClientOptions, DecidedBy, DeliveryResult, OutgoingMessage, RecipientStatus};
use crate::smtp::command::Recipient;
use crate::smtp::content::WireSize;
use crate::smtp::reply::Reply;

use super::mailboxes::Mailboxes;

/// A next hop answers a command within this time, or it is down: whoever asks through waits for five minutes only
/// (RFC 5321 section 4.5.3.2).
const REPLY_TIMEOUT: Duration = Duration::from_secs(60);

/// All next hops of one recipient have answered within this time, and all of one message have taken it: the provider
/// waits for five and for ten minutes (section 4.5.3.2), and what is taken later it brings again.
const RCPT_DEADLINE: Duration = Duration::from_secs(4 * 60);
const CONTENT_DEADLINE: Duration = Duration::from_secs(9 * 60);

/// Mail that nobody waits for may take longer, but not for ever.
const RETRY_DEADLINE: Duration = Duration::from_secs(60 * 60);

/// One that could not be reached is left alone so long, and one that let us wait ten times as long as we have waited,
/// up to five minutes: each of a thousand recipients would wait again.
const DOWN_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_DOWN_PAUSE: Duration = Duration::from_secs(5 * 60);

/// Content up to this size is kept in memory, larger in a file without a name.
const MEMORY_LIMIT: usize = 256 * 1024;

/// What a next hop has made of a message.
pub struct HopDelivery {
    /// One a recipient.
    pub recipients: Vec<RecipientStatus>,
    /// It tells senders who asked (RFC 3461).
    pub dsn: bool,
}

/// The sessions with next hops of one who delivers; they outlast a message.
pub struct NextHops {
    hostname: String,
    timeouts: Timeouts,
    cancel: CancelToken,
    /// Nothing takes longer.
    limit: Option<Instant>,
    sessions: HashMap<NextHop, HopSession>,
    /// Sessions to be ended when nobody waits.
    closing: Vec<ClientSession>,
}

#[derive(Default)]
struct HopSession {
    session: Option<ClientSession>,
    /// The recipients of the transaction that is open there, by asking; all were accepted.
    recipients: Vec<Recipient>,
    open: bool,
    /// It was opened with SMTPUTF8.
    utf8: bool,
    /// It is left alone until then.
    down_until: Option<Instant>,
}

impl NextHops {
    pub fn new(hostname: &str, timeouts: &Timeouts, cancel: &CancelToken) -> NextHops {
        let timeouts = Timeouts {
            greeting: timeouts.greeting.min(REPLY_TIMEOUT),
            mail: timeouts.mail.min(REPLY_TIMEOUT),
            recipient: timeouts.recipient.min(REPLY_TIMEOUT),
            data: timeouts.data.min(REPLY_TIMEOUT),
            command: timeouts.command.min(REPLY_TIMEOUT),
            ..timeouts.clone()
        };
        NextHops {
            hostname: hostname.to_owned(),
            timeouts,
            cancel: cancel.clone(),
            limit: None,
            sessions: HashMap::new(),
            closing: Vec::new(),
        }
    }

    /// What follows is about one recipient that the provider waits for.
    pub fn set_rcpt_deadline(&mut self) {
        self.limit = Some(Instant::now() + RCPT_DEADLINE.min(self.timeouts.recipient * 4));
    }

    /// What follows is about one message that the provider waits for.
    pub fn set_content_deadline(&mut self) {
        self.limit = Some(Instant::now() + CONTENT_DEADLINE.min(self.timeouts.end));
    }

    /// A new transaction: what was asked for the last one is forgotten.
    pub fn begin(&mut self) {
        self.closing.drain(..).for_each(ClientSession::quit);
        self.sessions.values_mut().filter(|session| session.open).for_each(HopSession::abort_transaction);
    }

    /// Asks whether a next hop takes a recipient; `Err`: its reply, or that it is down. `message`: its sender, and
    /// what is known of its content.
    pub fn check_recipient(
        &mut self,
        hop: &NextHop,
        message: &OutgoingMessage,
        recipient: &Recipient,
    ) -> Result<(), Reply> {
        let session = self.sessions.entry(hop.clone()).or_default();
        if session.open
            && session.recipients.iter().any(|asked| recipients::same_mailbox(&asked.mailbox, &recipient.mailbox))
        {
            return Ok(());
        }
        // RFC 6531 section 3.4: a recipient who needs SMTPUTF8 needs it at MAIL; the content goes to all in another
        // transaction then.
        let utf8 = message.utf8 || !recipient.mailbox.is_ascii();
        if session.open && utf8 && !session.utf8 {
            session.abort_transaction();
        }
        let message = &OutgoingMessage { utf8, ..message.clone() };
        // That a session has ended in a pause between two messages says nothing of the next hop.
        let idle = session.session.is_some() && !session.open;
        let asked = match self.try_recipient(hop, message, recipient) {
            Err(SessionFailure::Lost(_) | SessionFailure::Broken(_)) if idle => {
                self.try_recipient(hop, message, recipient)
            }
            other => other,
        };
        let reply = asked.unwrap_or_else(|failure| unavailable_reply(hop, &failure));
        match reply.code() {
            200..=299 => Ok(()),
            // Behind RCPT a 552 means too many recipients, and so "later" (RFC 5321 section 4.5.3.1.10); what a next hop
            // means by it is its quota, or its SIZE.
            552 => Err(reply.with_code(550).for_relaying()),
            _ => Err(upstream_reply(hop, reply)),
        }
    }

    fn try_recipient(
        &mut self,
        hop: &NextHop,
        message: &OutgoingMessage,
        recipient: &Recipient,
    ) -> Result<Reply, SessionFailure> {
        let session = self.session(hop)?;
        let begun = Instant::now();
        let replied = session.add_recipient(message, recipient);
        if replied.is_err() {
            session.end();
            session.mark_down(begun, Duration::ZERO);
        }
        replied
    }

    /// Delivers a message to the recipients that a next hop has; a fate for each of them.
    pub fn deliver(
        &mut self,
        hop: &NextHop,
        message: &OutgoingMessage,
        content: &mut dyn Content,
        origin: Option<&ClientInfo>,
    ) -> io::Result<HopDelivery> {
        let before = self.sessions.get(hop).is_some_and(|session| session.session.is_some());
        let mut delivered = self.try_delivery(hop, message, content, origin)?;
        // A session that was there before may have ended while the content came. Nobody has it yet.
        let nobody = |result: &DeliveryResult| {
            let lost = result.decided_by == DecidedBy::ConnectionLoss;
            lost && result.recipients.iter().all(|status| matches!(status, RecipientStatus::Deferred(_)))
        };
        if before && delivered.as_ref().is_ok_and(nobody) {
            delivered = self.try_delivery(hop, message, content, origin)?;
        }
        let later =
            |failure| vec![RecipientStatus::Deferred(unavailable_reply(hop, &failure)); message.recipients.len()];
        let statuses = delivered.map_or_else(later, |result| result.recipients);
        let statuses = statuses.into_iter().map(|status| upstream_status(hop, status)).collect();
        let session = self.sessions.get(hop).and_then(|session| session.session.as_ref());
        let dsn = session.is_some_and(|session| session.client().offered().dsn);
        // The next message comes from somebody else.
        if session.is_some_and(|session| session.client().is_client_overridden())
            && let Some(session) = self.sessions.get_mut(hop)
        {
            session.clear_transaction();
            self.closing.extend(session.session.take());
        }
        Ok(HopDelivery { recipients: statuses, dsn })
    }

    fn try_delivery(
        &mut self,
        hop: &NextHop,
        message: &OutgoingMessage,
        content: &mut dyn Content,
        origin: Option<&ClientInfo>,
    ) -> io::Result<Result<DeliveryResult, SessionFailure>> {
        content.rewind()?;
        Ok(self.session(hop).map(|session| session.deliver(message, content, origin)))
    }

    /// The session with a next hop, connected.
    fn session(&mut self, hop: &NextHop) -> Result<&mut HopSession, SessionFailure> {
        let session = self.sessions.entry(hop.clone()).or_default();
        if session.session.is_none() {
            let begun = Instant::now();
            if session.down_until.is_some_and(|until| begun < until) {
                return Err(SessionFailure::Lost("it was not reachable a moment ago".to_owned()));
            }
            match connect_hop(hop, &self.hostname, &self.timeouts, &self.cancel, self.limit) {
                Ok(connected) => session.session = Some(connected),
                Err(failure) => {
                    session.mark_down(begun, DOWN_PAUSE);
                    return Err(failure);
                }
            }
        }
        if let Some(session) = &mut session.session {
            session.limit(self.limit);
        }
        Ok(session)
    }
}

impl Drop for NextHops {
    fn drop(&mut self) {
        let open = self.sessions.drain().filter_map(|(_, session)| session.session);
        open.chain(self.closing.drain(..)).for_each(ClientSession::quit);
    }
}

impl HopSession {
    fn add_recipient(&mut self, message: &OutgoingMessage, recipient: &Recipient) -> Result<Reply, SessionFailure> {
        let Some(session) = &mut self.session else { return Err(SessionFailure::Lost("no session".to_owned())) };
        if !self.open {
            let reply = session.begin_transaction(message)?;
            if !reply.is_positive() {
                return Ok(reply);
            }
            (self.open, self.utf8) = (true, message.utf8);
        }
        let reply = session.add_recipient(recipient)?;
        if reply.is_positive() {
            self.recipients.push(recipient.clone());
        }
        Ok(reply)
    }

    /// Leaves the next hop alone after something that began then and failed; `least`: at least so long.
    fn mark_down(&mut self, begun: Instant, least: Duration) {
        let waited = begun.elapsed();
        let rest = if waited > DOWN_PAUSE { least.max((10 * waited).min(LONGEST_DOWN_PAUSE)) } else { least };
        self.down_until = Some(Instant::now() + rest);
    }

    fn deliver(
        &mut self,
        message: &OutgoingMessage,
        content: &mut dyn Content,
        origin: Option<&ClientInfo>,
    ) -> DeliveryResult {
        let begun = Instant::now();
        let by_loss = |reply: Reply| {
            let statuses = vec![RecipientStatus::Deferred(reply); message.recipients.len()];
            DeliveryResult { recipients: statuses, decided_by: DecidedBy::ConnectionLoss }
        };
        let lost = |text: &str| by_loss(Reply::new(451, "4.4.2", text.to_owned()));
        let Some(session) = &mut self.session else { return lost("no session with the next hop") };
        let offered = session.client().offered();
        let origin = origin.filter(|_| !offered.xclient.is_empty() || !offered.xforward.is_empty());
        // What was asked is gone on with, if it is what is wanted and nothing must be said before.
        let fits = offered.eight_bit || !message.eight_bit;
        let result = if self.open && self.recipients == message.recipients && origin.is_none() && fits {
            session.send_data(content, message.size)
        } else {
            session.abort_transaction();
            match origin.map_or(Ok(()), |origin| session.send_client_info(origin)) {
                Ok(()) => session.send_message(message.clone(), content),
                Err(failure) => lost(&failure.to_string()),
            }
        };
        self.clear_transaction();
        if result.decided_by == DecidedBy::ConnectionLoss
            || self.session.as_ref().is_some_and(|it| it.client().closing())
        {
            self.end();
            self.mark_down(begun, Duration::ZERO);
        }
        result
    }

    /// Lets the transaction go that is open.
    fn abort_transaction(&mut self) {
        self.clear_transaction();
        if let Some(session) = &mut self.session {
            session.abort_transaction();
        }
    }

    fn clear_transaction(&mut self) {
        self.open = false;
        self.recipients.clear();
    }

    fn end(&mut self) {
        self.clear_transaction();
        self.session = None;
    }
}

fn connect_hop(
    hop: &NextHop,
    hostname: &str,
    timeouts: &Timeouts,
    cancel: &CancelToken,
    limit: Option<Instant>,
) -> Result<ClientSession, SessionFailure> {
    let lost = |error: io::Error| SessionFailure::Lost(format!("{hop}: {error}"));
    let options = |lmtp| ClientOptions { name: hostname.to_owned(), lmtp, chunking: true, ..ClientOptions::default() };
    let (address, lmtp) = match hop {
        NextHop::LmtpUnix(path) => {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
            let socket = socket.map_err(|error| lost(error.into()))?;
            // Without waiting: a listener that is there and takes nobody would hold us for ever.
            SocketAddrUnix::new(path)
                .and_then(|address| rustix::net::connect(&socket, &address))
                .map_err(|error| lost(error.into()))?;
            return connect_over(socket, &hop.to_string(), options(true), None, timeouts, cancel, limit);
        }
        NextHop::Lmtp { address, .. } => (address, true),
        NextHop::Smtp { address, .. } => (address, false),
    };
    let mut last = SessionFailure::Lost(format!("{address} has no address"));
    for address in address.to_socket_addrs().map_err(lost)? {
        match connect(address, options(lmtp), None, timeouts, cancel, limit) {
            Ok(session) => return Ok(session),
            Err(SessionFailure::Cancelled) => return Err(SessionFailure::Cancelled),
            Err(failure) => last = failure,
        }
    }
    Err(last)
}

/// What the provider hears of a next hop that is down: the mail stays there.
fn unavailable_reply(hop: &NextHop, failure: &SessionFailure) -> Reply {
    log::warn!("event=next-hop-failed next-hop={:?} error={:?}", hop.to_string(), failure.to_string());
    Reply::new(451, "4.4.1", "The mail server behind this one is not available now")
}

/// A next hop's reply as the provider shall hear it: as it is, unless it speaks of us and not of the mail.
fn upstream_reply(hop: &NextHop, reply: Reply) -> Reply {
    match reply.code() {
        400..=420 | 422..=499 | 505..=529 | 531..=599 => reply.for_relaying(),
        421 => Reply::new(451, "4.3.2", "The mail server behind this one is not available now"),
        // It does not know a command, or wants authentication: nobody's mail may come back for that.
        _ => {
            log::error!("event=next-hop-unfit next-hop={:?} reply={:?}", hop.to_string(), reply.to_string());
            Reply::new(451, "4.3.5", "The mail server behind this one does not take mail from here")
        }
    }
}

/// A fate as the provider shall hear of it, or the retries.
fn upstream_status(hop: &NextHop, status: RecipientStatus) -> RecipientStatus {
    match status {
        // Behind RCPT, where that one counts as "later" (RFC 5321 section 4.5.3.1.10): see `ask`.
        RecipientStatus::Deferred(reply) if reply.code() == 552 => {
            RecipientStatus::Rejected(reply.with_code(550).for_relaying())
        }
        // We have decided so, though the words are those of a refusal: a hop that has forgotten EHLO for a minute.
        RecipientStatus::Deferred(reply) if reply.code() >= 500 => {
            RecipientStatus::Deferred(Reply::new(451, "4.3.5", format!("Not now: {reply}")))
        }
        RecipientStatus::Deferred(reply) => RecipientStatus::Deferred(upstream_reply(hop, reply)),
        RecipientStatus::Rejected(reply) => match upstream_reply(hop, reply) {
            reply if reply.code() < 500 => RecipientStatus::Deferred(reply),
            reply => RecipientStatus::Rejected(reply),
        },
        other => other,
    }
}

/// Content that can be sent again from its beginning.
pub trait Content: Read {
    fn rewind(&mut self) -> io::Result<()>;
}

impl Content for QueuedMessage {
    fn rewind(&mut self) -> io::Result<()> {
        self.rewind()
    }
}

/// Content that is looked at as a whole, or sent more than once: a small one in memory, a large one in a file that is
/// gone with us.
#[derive(Default)]
pub struct SpooledContent {
    memory: Vec<u8>,
    file: Option<BufWriter<File>>,
    sizer: WireSize,
    eight_bit: bool,
    /// Where the next octet is read, as long as there is no file.
    at: usize,
}

impl SpooledContent {
    /// `file`: makes the file, when it is needed.
    pub fn write(&mut self, octets: &[u8], file: impl FnOnce() -> io::Result<File>) -> io::Result<()> {
        self.sizer.feed(octets);
        self.eight_bit |= !octets.is_ascii();
        if self.file.is_none() && self.memory.len() + octets.len() > MEMORY_LIMIT {
            let mut begun = BufWriter::new(file()?);
            begun.write_all(&self.memory)?;
            self.file = Some(begun);
        }
        match &mut self.file {
            Some(file) => file.write_all(octets),
            None => {
                self.memory.extend_from_slice(octets);
                Ok(())
            }
        }
    }

    /// Octets on the wire.
    pub fn size(&self) -> u64 {
        self.sizer.finish()
    }

    pub fn eight_bit(&self) -> bool {
        self.eight_bit
    }

    /// The first octets, where the header is.
    pub fn first_octets(&self) -> &[u8] {
        &self.memory
    }
}

/// From where [`Content::restart`] has put it.
impl Read for SpooledContent {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(file) = &mut self.file {
            return file.get_mut().read(buffer);
        }
        let octets = (&self.memory[self.at..]).read(buffer)?;
        self.at += octets;
        Ok(octets)
    }
}

impl Content for SpooledContent {
    fn rewind(&mut self) -> io::Result<()> {
        self.at = 0;
        self.file.as_mut().map_or(Ok(()), Seek::rewind)
    }
}

/// Who has decided on a message.
#[derive(Clone, Copy)]
pub struct HopName<'a> {
    pub name: &'a str,
    /// It tells senders who asked (RFC 3461).
    pub dsn: bool,
}

/// Mail that a next hop shall have and nobody else keeps: it waits under ROOT and is tried again.
pub struct RetryQueue {
    queue: Queue,
    reporter: Reporter,
    retry: Retry,
    hostname: String,
    timeouts: Timeouts,
}

impl RetryQueue {
    /// `desk`: tells senders what became of their mail, as far as anybody can be told.
    pub fn new(config: &config::CustomerConfig, mailboxes: &Mailboxes, reporter: Reporter) -> RetryQueue {
        RetryQueue {
            queue: mailboxes.queue().clone(),
            reporter,
            retry: config.outgoing.as_ref().map(|outgoing| outgoing.retry.clone()).unwrap_or_default(),
            hostname: config.hostname.clone(),
            timeouts: config.timeouts.clone(),
        }
    }

    /// Whether anything could be stored.
    pub fn is_ready(&self) -> io::Result<()> {
        self.queue.maildir(&QueueName::Retry).unnamed_file(&self.queue.unique()).map(drop)
    }

    /// Stores what became neither delivered nor the provider's again, durably; then acts on the fates, one a recipient.
    /// `by`: who has decided on them.
    pub fn store(
        &self,
        envelope: Envelope,
        statuses: Vec<RecipientStatus>,
        content: &mut dyn Content,
        by: HopName<'_>,
    ) -> io::Result<()> {
        content.rewind()?;
        let mut copies = self.queue.begin_message(&[(QueueName::Retry, envelope)], "")?;
        for_each_block(content, |piece| copies.write(piece))?;
        let entries = copies.commit()?;
        // It is safe: whatever fails now, it is tried again.
        if let Err(error) = self.finish_stored(entries, statuses, by) {
            log::warn!("event=handover-unsettled error={error:?}");
        }
        Ok(())
    }

    fn finish_stored(
        &self,
        entries: Vec<Entry>,
        statuses: Vec<RecipientStatus>,
        by: HopName<'_>,
    ) -> Result<(), String> {
        let mut lock = self.lock()?;
        for entry in entries {
            let message = lock.open_message(&QueueName::Retry, entry).map_err(|error| error.to_string())?;
            if let Some(message) = message {
                self.finish_attempt(message, statuses.clone(), by, &mut lock).map_err(|error| error.to_string())?;
            }
        }
        Ok(())
    }

    fn finish_attempt(
        &self,
        message: QueuedMessage,
        mut statuses: Vec<RecipientStatus>,
        by: HopName<'_>,
        lock: &mut QueueLock,
    ) -> io::Result<DeliveryResult> {
        for status in &mut statuses {
            // Here it is not "too many recipients" (RFC 5321 section 4.5.3.1.10), and so not for at once.
            if let RecipientStatus::Deferred(reply) = status
                && reply.code() == 452
            {
                *status = RecipientStatus::Deferred(reply.clone().with_code(451));
            }
        }
        let context = format!("next-hop={:?}", by.name);
        let peer = Peer { name: None, dsn: by.dsn };
        let attempt = Attempt { peer, retry: Some(&self.retry), done: "handed-over", context: &context };
        self.reporter.finish_attempt(
            message,
            DeliveryResult { recipients: statuses, decided_by: DecidedBy::Peer },
            &attempt,
            lock,
        )
    }

    fn lock(&self) -> Result<QueueLock, String> {
        self.queue.try_lock(&QueueName::Retry).map_err(|error| match error {
            LockError::Busy(_) => "another process is at it".to_owned(),
            LockError::Failed(error) => error.to_string(),
        })
    }

    /// When the next attempt is due; `None`: nothing waits.
    pub fn due(&self) -> Option<SystemTime> {
        self.queue.next_due(&QueueName::Retry).unwrap_or(None)
    }

    /// Tries what is due.
    pub fn retry(&self, mailboxes: &Mailboxes, cancel: &CancelToken) {
        if self.due().is_none_or(|due| due > SystemTime::now()) {
            return;
        }
        let mut lock = match self.lock() {
            Ok(lock) => lock,
            Err(error) => return log::info!("event=handover-waits reason={error:?}"),
        };
        let mut hops = NextHops::new(&self.hostname, &self.timeouts, cancel);
        while !cancel.is_cancelled() {
            lock.heartbeat();
            let Some(mut message) = lock.next_message() else { return };
            let (statuses, name, dsn) = self.attempt(mailboxes, &mut hops, &mut message);
            // What is wrong with it stands in the log.
            let _ = self.finish_attempt(message, statuses, HopName { name: &name, dsn }, &mut lock);
        }
    }

    /// One message, to wherever its recipients belong by the rules as they are now.
    fn attempt(
        &self,
        mailboxes: &Mailboxes,
        hops: &mut NextHops,
        message: &mut QueuedMessage,
    ) -> (Vec<RecipientStatus>, String, bool) {
        let recipients = message.envelope.recipients.clone();
        let mut statuses: Vec<Option<RecipientStatus>> = vec![None; recipients.len()];
        // Of a delivery into a Maildir of ours nobody else tells; that one is as rare as a change of the rules.
        let (mut name, mut dsn) = ("-".to_owned(), false);
        for number in 0..recipients.len() {
            if statuses[number].is_some() {
                continue;
            }
            match mailboxes.destination(&recipients[number].mailbox) {
                // It was taken by rules that are no more.
                None => {
                    statuses[number] =
                        Some(RecipientStatus::Rejected(Reply::new(550, "5.1.1", "No such mailbox here any more")))
                }
                Some(recipients::Destination::Maildir { path, folders }) => {
                    let from = message.envelope.from.clone();
                    let copied = mailboxes.copy(&from, &recipients[number].mailbox, (&path, &folders), message);
                    statuses[number] = Some(copied);
                }
                Some(recipients::Destination::NextHop(hop)) => {
                    let same = |other: &usize| matches!(mailboxes.destination(&recipients[*other].mailbox), Some(recipients::Destination::NextHop(its)) if its == hop);
                    let numbers: Vec<_> = (number..recipients.len()).filter(same).collect();
                    let wanted = numbers.iter().map(|number| recipients[*number].clone()).collect();
                    let outgoing = OutgoingMessage { recipients: wanted, ..message.outgoing_message() };
                    hops.limit = Some(Instant::now() + RETRY_DEADLINE);
                    let found = hops.deliver(&hop, &outgoing, message, None).unwrap_or_else(|error| HopDelivery {
                        recipients: vec![
                            RecipientStatus::Deferred(storage_failure_reply(&error));
                            outgoing.recipients.len()
                        ],
                        dsn: false,
                    });
                    (name, dsn) = (hop.to_string(), found.dsn);
                    for (number, status) in numbers.into_iter().zip(found.recipients) {
                        let mailbox = &recipients[number].mailbox;
                        statuses[number] = Some(match status {
                            RecipientStatus::Rejected(_) if mailboxes.must_accept(mailbox) => {
                                mailboxes.deliver_fallback(&outgoing.from, mailbox, message)
                            }
                            status => status,
                        });
                    }
                }
            }
        }
        let untried = || RecipientStatus::Deferred(Reply::new(451, "4.0.0", "Not yet"));
        (statuses.into_iter().map(|status| status.unwrap_or_else(untried)).collect(), name, dsn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What was decided is passed up, whatever the code of its words.
    #[test]
    fn a_deferral_stays_one_and_a_refusal_for_its_size_becomes_one() {
        let hop = NextHop::LmtpUnix("/run/lmtp".into());
        for (status, wanted) in [
            (
                RecipientStatus::Deferred(Reply::new(554, "5.6.3", "no 8BITMIME")),
                "later 451 4.3.5 Not now: 554 5.6.3 no 8BITMIME",
            ),
            (RecipientStatus::Deferred(Reply::new(552, "5.2.2", "Over quota")), "never 550 5.2.2 Over quota"),
            (RecipientStatus::Deferred(Reply::new(452, "4.2.2", "Over quota")), "later 452 4.2.2 Over quota"),
            (RecipientStatus::Rejected(Reply::new(550, "5.1.1", "Gone")), "never 550 5.1.1 Gone"),
            (RecipientStatus::Rejected(Reply::new(552, "5.3.4", "Too large")), "never 552 5.3.4 Too large"),
            (
                RecipientStatus::Rejected(Reply::bare(503, "What")),
                "later 451 4.3.5 The mail server behind this one does not take mail from here",
            ),
        ] {
            let got = match upstream_status(&hop, status) {
                RecipientStatus::Deferred(reply) => format!("later {reply}"),
                RecipientStatus::Rejected(reply) => format!("never {reply}"),
                other => format!("{other:?}"),
            };
            assert_eq!(got, wanted);
        }
    }

    /// What a next hop says, and what the provider hears.
    #[test]
    fn replies_about_the_mail_are_passed_on_and_others_are_not() {
        let hop = NextHop::LmtpUnix("/run/lmtp".into());
        for (said, heard) in [
            (Reply::new(550, "5.1.1", "No such user"), "550 5.1.1 No such user"),
            (Reply::new(452, "4.2.2", "Over quota"), "452 4.2.2 Over quota"),
            (Reply::bare(550, "non\u{e9}"), "550 5.0.0 non?"),
            (Reply::bare(421, "bye"), "451 4.3.2 The mail server behind this one is not available now"),
            (Reply::bare(530, "who are you"), "451 4.3.5 The mail server behind this one does not take mail from here"),
            (Reply::bare(500, "what"), "451 4.3.5 The mail server behind this one does not take mail from here"),
            (Reply::bare(354, "odd"), "451 4.3.5 The mail server behind this one does not take mail from here"),
        ] {
            assert_eq!(upstream_reply(&hop, said).to_string(), heard);
        }
    }

    #[test]
    fn content_is_read_again_from_memory_and_from_a_file() {
        for (pieces, in_memory) in [(1, true), (MEMORY_LIMIT / 1000 + 2, false)] {
            let piece = [b"x".repeat(998), b"\r\n".to_vec()].concat();
            let (mut scratch, mut files) = (SpooledContent::default(), 0);
            for _ in 0..pieces {
                let made = scratch.write(&piece, || {
                    files += 1;
                    tempfile::tempfile()
                });
                made.unwrap();
            }
            assert_eq!((files == 0, scratch.size(), scratch.eight_bit()), (in_memory, 1000 * pieces as u64, false));
            for _ in 0..2 {
                let mut all = Vec::new();
                scratch.rewind().unwrap();
                scratch.read_to_end(&mut all).unwrap();
                assert!(all == piece.repeat(pieces) && scratch.first_octets().starts_with(&piece));
            }
        }
    }
}
