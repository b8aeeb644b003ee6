//! Next hops: the mail servers that are there already, by LMTP (RFC 2033) or SMTP.
//!
//! A recipient is checked with its next hop before we reply to RCPT ([`NextHops::check_recipient`]); the content goes to
//! the next hop once all of it has arrived ([`NextHops::deliver`]). All next hops of a message share one deadline, as the
//! provider waits no longer. A next hop that has not replied by then may have the message, and gets it again.

use std::collections::HashMap;
use std::io;
use std::net::ToSocketAddrs;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::ids::Ids;
use crate::mail::received::ClientInfo;
use crate::maildir::spooled::Content;
use crate::net::cancel::CancelToken;
use crate::net::trace::quoted;
use crate::recipients::{NextHop, same_mailbox};
use crate::session::Timeouts;
use crate::session::client::{ClientSession, Connect, SessionFailure};
use crate::smtp::client::{ClientOptions, OutgoingMessage};
use crate::smtp::command::Recipient;
use crate::smtp::reply::Reply;
use crate::smtp::status::{self, DecidedBy, DeliveryResult, HopReply, RecipientStatus};

/// How long a next hop may take to reply to a command: the provider waits five minutes for RCPT (RFC 5321 section
/// 4.5.3.2).
const REPLY_TIMEOUT: Duration = Duration::from_secs(60);

/// How long all next hops of one recipient may take, and all next hops of one message: the provider waits five and ten
/// minutes (RFC 5321 section 4.5.3.2), and sends again what is accepted later.
const RCPT_DEADLINE: Duration = Duration::from_secs(4 * 60);
const CONTENT_DEADLINE: Duration = Duration::from_secs(9 * 60);

/// How long a next hop may take with a message that nobody waits for.
const RETRY_DEADLINE: Duration = Duration::from_secs(60 * 60);

/// A next hop that could not be reached is left alone for this time. One that let us wait is left alone ten times as
/// long, up to the second time: otherwise each of a thousand recipients would wait again.
const DOWN_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_DOWN_PAUSE: Duration = Duration::from_secs(5 * 60);

/// What became of a message at a next hop.
pub struct HopDelivery {
    /// The id of the session in the log.
    pub session: String,
    /// One for each recipient.
    pub recipients: Vec<RecipientStatus>,
    /// The next hop sends DSNs of success itself (RFC 3461).
    pub dsn: bool,
}

/// The sessions with next hops; they outlast a message.
pub struct NextHops {
    hostname: String,
    timeouts: Timeouts,
    cancel: CancelToken,
    ids: Ids,
    /// No wait lasts longer.
    limit: Option<Instant>,
    sessions: HashMap<NextHop, HopSession>,
    /// Sessions to be closed when nobody waits.
    closing: Vec<ClientSession>,
}

#[derive(Default)]
struct HopSession {
    session: Option<ClientSession>,
    /// The recipients of the transaction that is open, all accepted.
    recipients: Vec<Recipient>,
    open: bool,
    /// The transaction was opened with SMTPUTF8.
    utf8: bool,
    /// The next hop is left alone until then.
    down_until: Option<Instant>,
}

impl NextHops {
    pub fn new(hostname: &str, timeouts: &Timeouts, ids: &Ids, cancel: &CancelToken) -> NextHops {
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
            ids: ids.clone(),
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

    /// What follows is about one message that nobody waits for.
    pub fn set_retry_deadline(&mut self) {
        self.limit = Some(Instant::now() + RETRY_DEADLINE);
    }

    /// Begins a new transaction: recipients checked for the last one are forgotten.
    pub fn begin(&mut self) {
        self.closing.drain(..).for_each(ClientSession::quit);
        self.sessions.values_mut().filter(|session| session.open).for_each(HopSession::abort_transaction);
    }

    /// Checks a recipient with its next hop. `message`: the envelope so far, and what is known of the content.
    ///
    /// # Errors
    /// The next hop's reply as the provider must receive it, or 451 if the next hop is down.
    pub fn check_recipient(
        &mut self, hop: &NextHop, message: &OutgoingMessage, recipient: &Recipient,
    ) -> Result<(), Reply> {
        let session = self.sessions.entry(hop.clone()).or_default();
        if session.open && session.recipients.iter().any(|known| same_mailbox(&known.mailbox, &recipient.mailbox)) {
            return Ok(());
        }
        // RFC 6531 section 3.4: a recipient that needs SMTPUTF8 needs it at MAIL; then the content goes to all recipients
        // in another transaction.
        let utf8 = message.envelope.utf8 || !recipient.mailbox.is_ascii();
        if session.open && utf8 && !session.utf8 {
            session.abort_transaction();
        }
        let mut message = message.clone();
        message.envelope.utf8 = utf8;
        // A session that ended between two messages says nothing about the next hop.
        let idle = session.session.is_some() && !session.open;
        let checked = match self.try_recipient(hop, &message, recipient) {
            Err(SessionFailure::Lost(_) | SessionFailure::Broken(_)) if idle => {
                self.try_recipient(hop, &message, recipient)
            }
            other => other,
        };
        match checked {
            Ok(reply) if reply.is_positive() => Ok(()),
            Ok(reply) => Err(upstream_reply(hop, status::rcpt_reply_of_hop(reply))),
            Err(failure) => Err(unavailable_reply(hop, &failure)),
        }
    }

    fn try_recipient(
        &mut self, hop: &NextHop, message: &OutgoingMessage, recipient: &Recipient,
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

    /// Delivers a message to its recipients at a next hop.
    ///
    /// # Errors
    /// The content cannot be read.
    pub fn deliver(
        &mut self, hop: &NextHop, message: &OutgoingMessage, content: &mut dyn Content, info: Option<&ClientInfo>,
    ) -> io::Result<HopDelivery> {
        let before = self.sessions.get(hop).is_some_and(|session| session.session.is_some());
        let mut delivered = self.try_delivery(hop, message, content, info)?;
        // A session that was there before may have ended while the content arrived. No recipient has it yet.
        let untouched = |result: &DeliveryResult| {
            let deferred = |status: &RecipientStatus| matches!(status, RecipientStatus::Deferred(_));
            result.decided_by == DecidedBy::ConnectionLoss && result.recipients.iter().all(deferred)
        };
        if before && delivered.as_ref().is_ok_and(untouched) {
            delivered = self.try_delivery(hop, message, content, info)?;
        }
        let count = message.envelope.recipients.len();
        let later = |failure| vec![RecipientStatus::Deferred(unavailable_reply(hop, &failure)); count];
        let statuses = delivered.map_or_else(later, |result| result.recipients);
        let recipients = statuses.into_iter().map(|status| status.of_hop(|reply| upstream_reply(hop, reply))).collect();
        let session = self.sessions.get(hop).and_then(|session| session.session.as_ref());
        let dsn = session.is_some_and(|session| session.client().extensions().dsn);
        let id = session.map_or_else(|| "-".to_owned(), |session| session.id().to_owned());
        // XCLIENT holds for the rest of a session, and the next message comes from another client.
        if session.is_some_and(|session| session.client().is_client_overridden())
            && let Some(session) = self.sessions.get_mut(hop)
        {
            session.clear_transaction();
            self.closing.extend(session.session.take());
        }
        Ok(HopDelivery { session: id, recipients, dsn })
    }

    fn try_delivery(
        &mut self, hop: &NextHop, message: &OutgoingMessage, content: &mut dyn Content, info: Option<&ClientInfo>,
    ) -> io::Result<Result<DeliveryResult, SessionFailure>> {
        content.rewind()?;
        Ok(self.session(hop).map(|session| session.deliver(message, content, info)))
    }

    /// The session with a next hop, connected.
    fn session(&mut self, hop: &NextHop) -> Result<&mut HopSession, SessionFailure> {
        let session = self.sessions.entry(hop.clone()).or_default();
        if session.session.is_none() {
            let begun = Instant::now();
            if session.down_until.is_some_and(|until| begun < until) {
                return Err(SessionFailure::Unreachable("it was not reachable a moment ago".to_owned()));
            }
            let (id, timeouts, cancel) = (&self.ids.session_id(), &self.timeouts, &self.cancel);
            let connect = Connect { id, peer: 'S', tls: None, timeouts, cancel, limit: self.limit };
            match connect_hop(hop, &self.hostname, &connect) {
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
            (self.open, self.utf8) = (true, message.envelope.utf8);
        }
        let reply = session.add_recipient(recipient)?;
        if reply.is_positive() {
            self.recipients.push(recipient.clone());
        }
        Ok(reply)
    }

    /// Leaves the next hop alone after a failure of something that began at `begun`; for `least` at least.
    fn mark_down(&mut self, begun: Instant, least: Duration) {
        let waited = begun.elapsed();
        let slow = waited > DOWN_PAUSE;
        let pause = if slow { least.max((10 * waited).min(LONGEST_DOWN_PAUSE)) } else { least };
        self.down_until = Some(Instant::now() + pause);
    }

    fn deliver(
        &mut self, message: &OutgoingMessage, content: &mut dyn Content, info: Option<&ClientInfo>,
    ) -> DeliveryResult {
        let begun = Instant::now();
        let recipients = &message.envelope.recipients;
        let Some(session) = &mut self.session else {
            return DeliveryResult::lost("no session with the next hop", recipients.len());
        };
        let offered = session.client().extensions();
        let info = info.filter(|_| !offered.xclient.is_empty() || !offered.xforward.is_empty());
        // The open transaction goes on if its recipients are the right ones and no other command must come first.
        let fits = offered.eight_bit || !message.eight_bit;
        let result = if self.open && self.recipients == *recipients && info.is_none() && fits {
            session.send_data(content, message.size)
        } else {
            session.abort_transaction();
            match info.map_or(Ok(()), |info| session.send_client_info(info)) {
                Ok(()) => session.send_message(message.clone(), content),
                Err(failure) => DeliveryResult::lost(failure.to_string(), recipients.len()),
            }
        };
        self.clear_transaction();
        if result.decided_by == DecidedBy::ConnectionLoss
            || self.session.as_ref().is_some_and(|session| session.client().closing())
        {
            self.end();
            self.mark_down(begun, Duration::ZERO);
        }
        result
    }

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

fn connect_hop(hop: &NextHop, hostname: &str, connect: &Connect<'_>) -> Result<ClientSession, SessionFailure> {
    let unreachable = |error: io::Error| SessionFailure::Unreachable(format!("{hop}: {error}"));
    let options = |lmtp| ClientOptions { name: hostname.to_owned(), lmtp, chunking: true, ..ClientOptions::default() };
    let (address, lmtp) = match hop {
        NextHop::LmtpUnix(path) => {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
            let socket = socket.map_err(|error| unreachable(error.into()))?;
            // Non-blocking: a listener that never accepts would block us for ever.
            SocketAddrUnix::new(path)
                .and_then(|address| rustix::net::connect(&socket, &address))
                .map_err(|error| unreachable(error.into()))?;
            return connect.over(socket, options(true));
        }
        NextHop::Lmtp { address, .. } => (address, true),
        NextHop::Smtp { address, .. } => (address, false),
    };
    let mut last = SessionFailure::NoHost(format!("{address} has no address"));
    for address in address.to_socket_addrs().map_err(unreachable)? {
        match connect.to(address, options(lmtp)) {
            Ok(session) => return Ok(session),
            Err(SessionFailure::Cancelled) => return Err(SessionFailure::Cancelled),
            Err(failure) => last = failure,
        }
    }
    Err(last)
}

/// The reply to the provider if the next hop is down: the mail stays there.
fn unavailable_reply(hop: &NextHop, failure: &SessionFailure) -> Reply {
    log::warn!("event=next-hop-failed next-hop={} error={}", quoted(hop), quoted(failure));
    Reply::new(451, "4.4.1", "The mail server behind this one is not available now")
}

/// A next hop's negative reply as the provider must receive it.
fn upstream_reply(hop: &NextHop, reply: HopReply) -> Reply {
    match reply {
        HopReply::AboutMail(reply) => reply,
        HopReply::Unavailable => Reply::new(451, "4.3.2", "The mail server behind this one is not available now"),
        HopReply::Unfit(reply) => {
            log::error!("event=next-hop-unfit next-hop={} reply={}", quoted(hop), quoted(reply));
            Reply::new(451, "4.3.5", "The mail server behind this one does not take mail from here")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The status is passed on, whatever the code of its reply.
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
            let got = match status.of_hop(|reply| upstream_reply(&hop, reply)) {
                RecipientStatus::Deferred(reply) => format!("later {reply}"),
                RecipientStatus::Rejected(reply) => format!("never {reply}"),
                other => format!("{other:?}"),
            };
            assert_eq!(got, wanted);
        }
    }

    /// A next hop's reply, and what the provider receives.
    #[test]
    fn replies_about_the_mail_are_passed_on_and_others_are_not() {
        let hop = NextHop::LmtpUnix("/run/lmtp".into());
        for (reply, wanted) in [
            (Reply::new(550, "5.1.1", "No such user"), "550 5.1.1 No such user"),
            (Reply::new(452, "4.2.2", "Over quota"), "452 4.2.2 Over quota"),
            (Reply::bare(550, "non\u{e9}"), "550 5.0.0 non?"),
            (Reply::bare(421, "bye"), "451 4.3.2 The mail server behind this one is not available now"),
            (Reply::bare(530, "who are you"), "451 4.3.5 The mail server behind this one does not take mail from here"),
            (Reply::bare(500, "what"), "451 4.3.5 The mail server behind this one does not take mail from here"),
            (Reply::bare(354, "odd"), "451 4.3.5 The mail server behind this one does not take mail from here"),
        ] {
            assert_eq!(upstream_reply(&hop, status::reply_of_hop(reply)).to_string(), wanted);
        }
    }
}
