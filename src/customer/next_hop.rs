//! Next hops: the mail servers to which a customer passes its incoming mail, by LMTP (RFC 2033) or SMTP.
//!
//! The customer sends RCPT to the next hop before it replies to the provider's RCPT ([`NextHops::check_recipient`]). It
//! sends the content to the next hop after all of it has arrived ([`NextHops::deliver`]). All next hops of a message
//! share one deadline, because the provider does not wait longer. If a next hop has not replied by then, it may have
//! the message, and gets it again.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};

use super::mailboxes::Mailboxes;
use crate::config::CustomerConfig;
use crate::mail::received::ClientInfo;
use crate::maildir::spooled::Content;
use crate::net::cancel::CancelToken;
use crate::net::trace::quoted;
use crate::platform;
use crate::recipients::{NextHop, same_mailbox};
use crate::report::{Attempt, Via};
use crate::session::client::{ClientSession, Connect, SessionFailure};
use crate::session::{Timeouts, storage_failure_reply};
use crate::smtp::client::{ClientOptions, OutgoingMessage, one_too_many};
use crate::smtp::command::Recipient;
use crate::smtp::reply::Reply;
use crate::smtp::status::{self, DecidedBy, DeliveryResult, HopReply, HopStage, RecipientStatus};

/// The longest wait for a next hop's reply to a command: the provider waits five minutes for RCPT (RFC 5321 section
/// 4.5.3.2).
const REPLY_TIMEOUT: Duration = Duration::from_secs(60);

/// How long all next hops of one recipient together may take: the provider waits five minutes (RFC 5321 section
/// 4.5.3.2).
const RCPT_DEADLINE: Duration = Duration::from_secs(4 * 60);

/// How long all next hops of one message together may take: the provider waits ten minutes (RFC 5321 section 4.5.3.2).
/// It sends the message again if the reply comes later.
const CONTENT_DEADLINE: Duration = Duration::from_secs(9 * 60);

/// How long a next hop may take for a message of the retry queue: the provider does not wait for it.
const RETRY_DEADLINE: Duration = Duration::from_secs(60 * 60);

/// After a failed connection a next hop is not tried again for this time.
const DOWN_PAUSE: Duration = Duration::from_secs(5);

/// After a failure that took longer than [`DOWN_PAUSE`], a next hop is not tried again for ten times its duration, at
/// most for this time. Otherwise each of a thousand recipients would wait as long again.
const LONGEST_DOWN_PAUSE: Duration = Duration::from_secs(5 * 60);

/// The result of an attempt to deliver a message to a next hop.
pub struct HopDelivery {
    /// The id of the session in the log; `-`: none.
    pub session: String,
    pub via: Via,
    /// The next hop, as configured; `-`: none.
    pub relay: String,
    /// The next hop sends DSNs of success itself (RFC 3461).
    pub sends_dsn: bool,
    /// All recipients of the message, in its order.
    pub recipients: Vec<(Recipient, RecipientStatus)>,
}

impl HopDelivery {
    /// The attempt, for the log and for DSNs, without retry times.
    pub fn attempt(&self) -> Attempt<'_> {
        let HopDelivery { session, via, relay, sends_dsn, .. } = self;
        Attempt { via: *via, peer_sends_dsn: *sends_dsn, ..Attempt::in_maildir(session, relay) }
    }
}

/// The sessions with all next hops. A session serves several messages.
pub struct NextHops {
    mailboxes: Arc<Mailboxes>,
    timeouts: Timeouts,
    cancel: CancelToken,
    /// The deadline of all waits.
    limit: Option<Instant>,
    sessions: HashMap<NextHop, HopSession>,
    /// Sessions to end with QUIT at the next MAIL, so that no recipient waits for the replies.
    closing: Vec<ClientSession>,
}

#[derive(Default)]
struct HopSession {
    session: Option<ClientSession>,
    /// The transaction that is open.
    transaction: Option<HopTransaction>,
    /// There is no new connection before this time.
    down_until: Option<Instant>,
}

struct HopTransaction {
    /// The recipients that the next hop has accepted.
    recipients: Vec<Recipient>,
    /// It was opened with SMTPUTF8.
    utf8: bool,
}

impl NextHops {
    /// Prepares sessions, and connects to no next hop yet. `cancel` ends each wait.
    pub fn new(mailboxes: &Arc<Mailboxes>, cancel: &CancelToken) -> NextHops {
        let timeouts = &mailboxes.config.timeouts;
        let timeouts = Timeouts {
            greeting: timeouts.greeting.min(REPLY_TIMEOUT),
            mail: timeouts.mail.min(REPLY_TIMEOUT),
            recipient: timeouts.recipient.min(REPLY_TIMEOUT),
            data: timeouts.data.min(REPLY_TIMEOUT),
            command: timeouts.command.min(REPLY_TIMEOUT),
            ..timeouts.clone()
        };
        NextHops {
            mailboxes: mailboxes.clone(),
            timeouts,
            cancel: cancel.clone(),
            limit: None,
            sessions: HashMap::new(),
            closing: Vec::new(),
        }
    }

    /// Sets the deadline for one recipient that the provider waits for.
    pub fn set_rcpt_deadline(&mut self) {
        self.limit = Some(Instant::now() + RCPT_DEADLINE.min(self.timeouts.recipient * 4));
    }

    /// Sets the deadline for the content of one message that the provider waits for.
    pub fn set_content_deadline(&mut self) {
        self.limit = Some(Instant::now() + CONTENT_DEADLINE.min(self.timeouts.end));
    }

    /// Sets the deadline for one message of the retry queue.
    pub fn set_retry_deadline(&mut self) {
        self.limit = Some(Instant::now() + RETRY_DEADLINE);
    }

    /// Prepares for a new message: aborts the transactions that are open at next hops.
    pub fn begin(&mut self) {
        self.closing.drain(..).for_each(ClientSession::quit);
        self.sessions.values_mut().filter(|hop| hop.transaction.is_some()).for_each(HopSession::abort_transaction);
    }

    /// Sends RCPT for a recipient to its next hop. `message`: the envelope without recipients, and what is known of the
    /// content. `first`: no recipient of the message is accepted yet.
    ///
    /// # Errors
    /// The next hop's reply in the form for the provider, or 451 if the next hop is down.
    pub fn check_recipient(
        &mut self, hop: &NextHop, message: &OutgoingMessage, recipient: &Recipient, first: bool,
    ) -> Result<(), Reply> {
        let session = self.sessions.entry(hop.clone()).or_default();
        // RFC 6531 section 3.4: a recipient that needs SMTPUTF8 needs it at MAIL, so a transaction without it is
        // aborted here, and the content goes to all recipients in another one. The same happens if the header, which
        // has not arrived yet, needs it.
        let mut message = message.clone();
        message.envelope.drop_needless_utf8(false);
        let utf8 = message.envelope.needs_utf8() || !recipient.mailbox.is_ascii();
        let known = |known: &Recipient| same_mailbox(&known.mailbox, &recipient.mailbox);
        let is_full = session.session.as_ref().is_some_and(|session| !session.client().permits_recipient(recipient));
        match &session.transaction {
            Some(transaction) if transaction.recipients.iter().any(known) => return Ok(()),
            // This transaction permits no further RCPT (RFC 9422), and has no accepted recipient. Begin another: 452 to
            // every recipient would not mean "too many recipients".
            Some(transaction) if is_full && (first || transaction.recipients.is_empty()) => session.abort_transaction(),
            Some(transaction) if utf8 && !transaction.utf8 => session.abort_transaction(),
            _ => {}
        }
        message.envelope.utf8 = utf8;
        // A next hop may close an idle session between two messages. It is not down, so connect again.
        let idle = session.session.is_some() && session.transaction.is_none();
        let mut checked = self.try_recipient(hop, &message, recipient);
        if idle && matches!(checked, Err(SessionFailure::Lost(_) | SessionFailure::Broken(_))) {
            checked = self.try_recipient(hop, &message, recipient);
        }
        match checked {
            Ok(reply) if reply.is_positive() => Ok(()),
            Ok(reply) => Err(upstream_reply(hop, status::reply_of_hop(reply, HopStage::Recipient))),
            Err(failure) => Err(unavailable_reply(hop, &failure)),
        }
    }

    fn try_recipient(
        &mut self, hop: &NextHop, message: &OutgoingMessage, recipient: &Recipient,
    ) -> Result<Reply, SessionFailure> {
        if let Some(session) = self.sessions.get_mut(hop)
            && session.transaction.is_none()
        {
            self.closing.extend(session.take_used_up(std::slice::from_ref(recipient)));
        }
        let session = self.session(hop)?;
        let begun = Instant::now();
        let reply = session.add_recipient(message, recipient);
        if reply.is_err() || session.session.as_ref().is_some_and(ClientSession::is_over) {
            session.end(begun);
        }
        reply
    }

    /// Delivers a message to its recipients at a next hop, in as many transactions as the limits of the next hop
    /// require (RFC 9422). `info`: the client that sent the message to the provider, for XCLIENT or XFORWARD. If there
    /// is no session, or the content cannot be read, all recipients are deferred.
    pub fn deliver(
        &mut self, hop: &NextHop, message: &OutgoingMessage, content: &mut dyn Content, info: Option<&ClientInfo>,
    ) -> HopDelivery {
        let mut delivery = self.deliver_permitted(hop, message, content, info);
        let (too_many, mut before) = (RecipientStatus::Deferred(one_too_many()), delivery.recipients.len());
        loop {
            let is_rest = |number: &usize| delivery.recipients[*number].1 == too_many;
            let rest: Vec<_> = (0..delivery.recipients.len()).filter(is_rest).collect();
            if rest.is_empty() || rest.len() == before {
                return delivery;
            }
            before = rest.len();
            let recipients = rest.iter().map(|number| delivery.recipients[*number].0.clone()).collect();
            let message = OutgoingMessage { envelope: message.envelope.with_recipients(recipients), ..message.clone() };
            let other = self.deliver_permitted(hop, &message, content, info);
            for (number, recipient) in rest.into_iter().zip(other.recipients) {
                delivery.recipients[number] = recipient;
            }
        }
    }

    /// Delivers in one transaction. The recipients beyond the limits of the next hop are deferred as [`one_too_many`].
    fn deliver_permitted(
        &mut self, hop: &NextHop, message: &OutgoingMessage, content: &mut dyn Content, info: Option<&ClientInfo>,
    ) -> HopDelivery {
        let connected = self.sessions.get(hop).is_some_and(|session| session.session.is_some());
        let mut result = self.try_delivery(hop, message, content, info);
        // The next hop may have closed the session while the content arrived. If no recipient has the message, connect
        // again.
        let deferred = |status: &RecipientStatus| matches!(status, RecipientStatus::Deferred(_));
        if connected && result.decided_by.is_connection_loss() && result.recipients.iter().all(deferred) {
            result = self.try_delivery(hop, message, content, info);
        }
        let untried = || RecipientStatus::Deferred(Reply::new(451, "4.0.0", "Not yet"));
        let stage = match result.decided_by {
            DecidedBy::PeerAtContent => HopStage::Content,
            _ => HopStage::Message,
        };
        let upstream = |reply| upstream_reply(hop, reply);
        let statuses = result.recipients.into_iter().map(|status| status.of_hop(stage, upstream));
        let statuses = statuses.chain(std::iter::repeat_with(untried));
        let mut delivery = HopDelivery {
            session: "-".to_owned(),
            via: if matches!(hop, NextHop::Smtp { .. }) { Via::Smtp } else { Via::Lmtp },
            relay: hop.to_string(),
            sends_dsn: false,
            recipients: message.envelope.recipients.iter().cloned().zip(statuses).collect(),
        };
        if let Some(hop_session) = self.sessions.get_mut(hop)
            && let Some(session) = &hop_session.session
        {
            delivery.session = session.id().to_owned();
            delivery.sends_dsn = session.client().extensions().dsn;
            // XCLIENT is in force for the rest of a session, and the next message may come from another client.
            if session.client().is_client_overridden() {
                hop_session.transaction = None;
                self.closing.extend(hop_session.session.take());
            }
        }
        delivery
    }

    fn try_delivery(
        &mut self, hop: &NextHop, message: &OutgoingMessage, content: &mut dyn Content, info: Option<&ClientInfo>,
    ) -> DeliveryResult {
        let session = content.rewind().map_err(|error| storage_failure_reply(&error));
        let session = session.and_then(|()| self.session(hop).map_err(|failure| unavailable_reply(hop, &failure)));
        match session {
            Ok(session) => session.deliver(message, content, info),
            Err(reply) => {
                let count = message.envelope.recipients.len();
                DeliveryResult::all(RecipientStatus::Deferred(reply), count, DecidedBy::Us)
            }
        }
    }

    /// The session with a next hop, connected if necessary.
    fn session(&mut self, hop: &NextHop) -> Result<&mut HopSession, SessionFailure> {
        let session = self.sessions.entry(hop.clone()).or_default();
        if session.session.is_none() {
            let begun = Instant::now();
            if session.down_until.is_some_and(|until| begun < until) {
                return Err(SessionFailure::Unreachable("it was not reachable a moment ago".to_owned()));
            }
            let (id, timeouts, cancel) = (&self.mailboxes.ids.session_id(), &self.timeouts, &self.cancel);
            let connect =
                Connect { id, peer: 'S', tls: None, implicit_tls: false, timeouts, cancel, limit: self.limit };
            let connected = connect_hop(hop, &self.mailboxes.config, &connect);
            session.session = Some(connected.inspect_err(|_| session.mark_down(begun, DOWN_PAUSE))?);
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
        if self.transaction.is_none() {
            let reply = session.begin_transaction(message)?;
            if !reply.is_positive() {
                return Ok(reply);
            }
        }
        let begun = || HopTransaction { recipients: Vec::new(), utf8: message.envelope.utf8 };
        let transaction = self.transaction.get_or_insert_with(begun);
        let reply = session.add_recipient(recipient)?;
        if reply.is_positive() {
            transaction.recipients.push(recipient.clone());
        }
        Ok(reply)
    }

    fn deliver(
        &mut self, message: &OutgoingMessage, content: &mut dyn Content, info: Option<&ClientInfo>,
    ) -> DeliveryResult {
        let begun = Instant::now();
        let recipients = &message.envelope.recipients;
        let no_session = || DeliveryResult::lost("no session with the next hop", recipients.len());
        let Some(session) = &self.session else { return no_session() };
        let (client, offered) = (session.client(), session.client().extensions());
        let info = info.filter(|_| !offered.xclient.is_empty() || !offered.xforward.is_empty());
        // The content may follow in the open transaction if it has exactly these recipients, and no XCLIENT or XFORWARD
        // must come first.
        let fits = client.may_send_content(message) && info.is_none();
        let needs_utf8 = message.envelope.needs_utf8();
        let is_right = |open: &HopTransaction| fits && (open.utf8 || !needs_utf8) && open.recipients == *recipients;
        if !self.transaction.as_ref().is_some_and(is_right) {
            self.abort_transaction();
            if let Some(session) = self.take_used_up(recipients) {
                session.quit();
                return DeliveryResult::lost("the next hop permits no more in this session", recipients.len());
            }
        }
        let Some(session) = &mut self.session else { return no_session() };
        let result = match self.transaction.take() {
            Some(_) => session.send_data(content, message.size),
            None => match info.map_or(Ok(()), |info| session.send_client_info(info)) {
                Ok(()) => session.send_message(message, content),
                Err(failure) => DeliveryResult::lost(failure.to_string(), recipients.len()),
            },
        };
        if result.decided_by.is_connection_loss() || session.is_over() {
            self.end(begun);
        }
        result
    }

    /// Takes the session out if the limits of the next hop permit no message to any of these recipients in it (RFC
    /// 9422).
    fn take_used_up(&mut self, recipients: &[Recipient]) -> Option<ClientSession> {
        self.session.take_if(|session| !session.client().permits(recipients))
    }

    fn abort_transaction(&mut self) {
        self.transaction = None;
        if let Some(session) = &mut self.session {
            session.abort_transaction();
        }
    }

    /// Drops the session, in which a command that began at `begun` has failed.
    fn end(&mut self, begun: Instant) {
        (self.session, self.transaction) = (None, None);
        self.mark_down(begun, Duration::ZERO);
    }

    /// Prevents new connections after the failure of a command or connection that began at `begun`: for `least`, or
    /// longer if the failure took long.
    fn mark_down(&mut self, begun: Instant, least: Duration) {
        let waited = begun.elapsed();
        let slow = waited > DOWN_PAUSE;
        let pause = if slow { least.max((10 * waited).min(LONGEST_DOWN_PAUSE)) } else { least };
        self.down_until = Some(Instant::now() + pause);
    }
}

/// Connects to a next hop, up to its reply to EHLO or LHLO.
fn connect_hop(hop: &NextHop, config: &CustomerConfig, connect: &Connect<'_>) -> Result<ClientSession, SessionFailure> {
    let unreachable = |error: io::Error| SessionFailure::Unreachable(format!("{hop}: {error}"));
    let (name, without_8bitmime) = (&config.hostname, config.mailboxes.without_8bitmime);
    let options =
        |lmtp| ClientOptions { name: name.clone(), lmtp, chunking: true, without_8bitmime, ..ClientOptions::default() };
    let (address, lmtp) = match hop {
        NextHop::LmtpUnix(path) => {
            let socket = platform::socket(AddressFamily::UNIX, SocketType::STREAM).map_err(unreachable)?;
            // The socket is non-blocking: a listener that never accepts would block connect(2) for ever.
            SocketAddrUnix::new(path)
                .and_then(|address| rustix::net::connect(&socket, &address))
                .map_err(|error| unreachable(error.into()))?;
            return connect.over(socket, options(true));
        }
        NextHop::Lmtp { address, .. } => (address, true),
        NextHop::Smtp { address, .. } => (address, false),
    };
    let addresses = connect.addresses(address).map_err(|error| match error.kind() {
        io::ErrorKind::Interrupted => SessionFailure::Cancelled,
        _ => unreachable(error),
    })?;
    connect_to_any(&addresses, &options(lmtp), connect)
}

fn connect_to_any(
    addresses: &[SocketAddr], options: &ClientOptions, connect: &Connect<'_>,
) -> Result<ClientSession, SessionFailure> {
    let mut last = SessionFailure::NoHost("no address".to_owned());
    for (at, socket) in addresses.iter().enumerate() {
        // Each address has a share of the time that is left. Otherwise a first address that does not reply would use
        // all of it up, in this call and in each later one.
        let share = |limit: Instant| {
            let (now, left) = (Instant::now(), u32::try_from(addresses.len() - at).unwrap_or(u32::MAX));
            now + limit.saturating_duration_since(now) / left
        };
        let connect = Connect { limit: connect.limit.map(share), ..*connect };
        match connect.to(*socket, options.clone()) {
            Ok(session) => return Ok(session),
            Err(SessionFailure::Cancelled) => return Err(SessionFailure::Cancelled),
            Err(failure) => last = failure,
        }
    }
    Err(last)
}

/// The reply if a next hop is down. It defers the mail, which stays with the provider or in the retry queue.
fn unavailable_reply(hop: &NextHop, failure: &SessionFailure) -> Reply {
    log::warn!("event=next-hop-failed next-hop={} error={}", quoted(hop), quoted(failure));
    Reply::new(451, "4.4.1", "The next mail server is not available now")
}

/// A next hop's negative reply in the form for the provider.
fn upstream_reply(hop: &NextHop, reply: HopReply) -> Reply {
    match reply {
        HopReply::AboutMail(reply) => reply,
        HopReply::Unavailable => Reply::new(451, "4.3.2", "The next mail server is not available now"),
        HopReply::Unfit(reply) => {
            log::error!("event=next-hop-unfit next-hop={} reply={}", quoted(hop), quoted(reply));
            Reply::new(451, "4.3.5", "The next mail server does not accept mail from here")
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    /// All addresses share one deadline, and the next call begins with the first of them again.
    #[test]
    fn addresses_that_do_not_reply_leave_time_for_one_that_does() {
        let silent: Vec<_> = (0..3).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let good = TcpListener::bind("127.0.0.1:0").unwrap();
        let addresses: Vec<_> = silent.iter().chain([&good]).map(|host| host.local_addr().unwrap()).collect();
        let host = thread::spawn(move || {
            let (mut socket, _) = good.accept().unwrap();
            socket.write_all(b"220 x\r\n").unwrap();
            let _ = socket.read(&mut [0; 100]);
            socket.write_all(b"250 x\r\n").unwrap();
        });
        let (timeouts, cancel) = (Timeouts::default(), CancelToken::new().unwrap());
        let limit = Some(Instant::now() + Duration::from_millis(2000));
        let connect =
            Connect { id: "1", peer: 'S', tls: None, implicit_tls: false, timeouts: &timeouts, cancel: &cancel, limit };
        let options = ClientOptions { name: "mail.example.org".to_owned(), ..ClientOptions::default() };
        assert!(connect_to_any(&addresses, &options, &connect).is_ok());
        host.join().unwrap();
        // One address may use all the time.
        let begun = Instant::now();
        let connect = Connect { limit: Some(begun + Duration::from_millis(300)), ..connect };
        assert!(connect_to_any(&addresses[..1], &options, &connect).is_err());
        assert!(begun.elapsed() >= Duration::from_millis(300));
    }

    const UNFIT: &str = "451 4.3.5 The next mail server does not accept mail from here";

    /// The status of a recipient at a next hop, and the status that the provider or the retry queue gets.
    #[test]
    fn statuses_of_a_next_hop_become_statuses_for_the_provider() {
        let hop = NextHop::LmtpUnix("/run/lmtp".into());
        for (status, expected) in [
            (
                RecipientStatus::Deferred(Reply::new(554, "5.6.3", "no 8BITMIME")),
                "deferred 451 4.3.5 Not now: 554 5.6.3 no 8BITMIME",
            ),
            (RecipientStatus::Deferred(Reply::new(552, "5.2.2", "Over quota")), "rejected 550 5.2.2 Over quota"),
            (RecipientStatus::Deferred(Reply::new(452, "4.2.2", "Over quota")), "deferred 452 4.2.2 Over quota"),
            (RecipientStatus::Rejected(Reply::new(550, "5.1.1", "Gone")), "rejected 550 5.1.1 Gone"),
            (RecipientStatus::Rejected(Reply::new(552, "5.3.4", "Too large")), "rejected 552 5.3.4 Too large"),
            (RecipientStatus::Rejected(Reply::new(501, "5.1.3", "Syntax")), "rejected 554 5.1.3 Syntax"),
            (RecipientStatus::Rejected(Reply::bare(503, "What")), &format!("deferred {UNFIT}")),
        ] {
            let translated = match status.of_hop(HopStage::Message, |reply| upstream_reply(&hop, reply)) {
                RecipientStatus::Deferred(reply) => format!("deferred {reply}"),
                RecipientStatus::Rejected(reply) => format!("rejected {reply}"),
                other => format!("{other:?}"),
            };
            assert_eq!(translated, expected);
        }
    }

    /// A next hop's reply to RCPT and to the content, and what the provider receives at the same stage.
    #[test]
    fn replies_about_the_mail_are_relayed_and_others_are_not() {
        let hop = NextHop::LmtpUnix("/run/lmtp".into());
        let down = "451 4.3.2 The next mail server is not available now";
        for (reply, to_rcpt, to_content) in [
            (Reply::new(550, "5.1.1", "No such user"), "550 5.1.1 No such user", "550 5.1.1 No such user"),
            (Reply::new(452, "4.2.2", "Over quota"), "452 4.2.2 Over quota", "452 4.2.2 Over quota"),
            (Reply::new(552, "5.2.2", "Over quota"), "550 5.2.2 Over quota", "552 5.2.2 Over quota"),
            (Reply::bare(550, "non\u{e9}"), "550 5.0.0 non?", "550 5.0.0 non?"),
            (Reply::bare(421, "bye"), down, down),
            (Reply::bare(354, "odd"), UNFIT, UNFIT),
            (Reply::new(501, "5.1.3", "syntax"), "550 5.1.3 syntax", "554 5.1.3 syntax"),
            (Reply::bare(504, "not qualified"), "550 5.0.0 not qualified", "554 5.0.0 not qualified"),
            (Reply::bare(500, "too long"), "550 5.0.0 too long", "554 5.0.0 too long"),
            (Reply::new(500, "5.5.1", "what"), UNFIT, "554 5.5.1 what"),
            (Reply::bare(502, "what"), UNFIT, "554 5.0.0 what"),
            (Reply::new(503, "5.7.1", "policy"), "550 5.7.1 policy", "554 5.7.1 policy"),
            (Reply::bare(530, "who are you"), UNFIT, UNFIT),
            (Reply::new(530, "5.7.0", "who"), UNFIT, UNFIT),
            (Reply::new(530, "5.7.1", "policy"), "550 5.7.1 policy", "554 5.7.1 policy"),
            (Reply::new(535, "5.7.8", "who"), UNFIT, UNFIT),
            (Reply::new(538, "5.7.11", "who"), UNFIT, UNFIT),
            (Reply::new(538, "5.1.8", "sender"), "550 5.1.8 sender", "554 5.1.8 sender"),
        ] {
            let relayed = |stage| upstream_reply(&hop, status::reply_of_hop(reply.clone(), stage)).to_string();
            assert_eq!(relayed(HopStage::Recipient), to_rcpt);
            assert_eq!(relayed(HopStage::Content), to_content);
        }
    }
}
