//! The SMTP client role, without sockets (RFC 5321; for LMTP RFC 2033).
//!
//! A driver (`session/client`, `provider/turned_session`) gives the client its messages and each reply of the peer
//! ([`Client::reply`]), sends the octets that the client appends to `out`, and acts on the returned [`ClientStep`].
//!
//! # States
//!
//! `pending` has one [`Stage`] for each reply that the client waits for, in the order of the commands. A reply belongs to
//! the first of them, by its position and never by its text (RFC 2920 section 3.1). That stage is the state:
//!
//! ```text
//! state     sent           waits for  on success         on 4yz, 5yz                         on loss     RFC
//! Greeting  nothing        220        Ehlo               abort                               -           5321 3.1
//! Ehlo      EHLO, or LHLO  250        StartTls, Auth     5yz: Helo, if that is enough;       -           5321 3.2,
//!                                     or ready           otherwise abort                                 2033 4.1
//! Helo      HELO           250        ready              abort                               -           5321 3.2
//! StartTls  STARTTLS       220        TLS, then Ehlo     optional TLS: Auth or ready;        -           3207 4
//!                                                        otherwise abort
//! Auth      AUTH,          334, 235   334: Auth;         500-504, 534, 538: Auth with the    -           4954 4
//!           a response                235: ready         next mechanism, but not after
//!                                                        -PLUS; otherwise abort
//! Xclient   XCLIENT        220        Ehlo               ready                               -           (Postfix)
//! Xforward  XFORWARD       250        ready              ready                               -           (Postfix)
//! Atrn      ATRN           250        turned             abort, and ready for QUIT           -           2645 5.2.1
//! Mail      MAIL           250        Rcpt               message done                        deferred    5321 3.3
//! Rcpt      RCPT           250        next Rcpt or Data  next Rcpt or Data; all recipients   deferred    5321 3.3
//!                                                        failed: RSET, message done
//! Data      DATA           354        send content       RSET, message done                  deferred    5321 3.3
//! Session   no command     nothing    -                  421: abort; other: a violation      deferred    5321 3.8
//! Content   all content    250        message done       message done                        in doubt    5321 4.2.5
//! LoneDot   a dot          any reply  message done       message done                        as decided  2920 3.1
//! Rset      RSET           250        ready              ready                               -           5321 4.1.1.5
//! Quit      QUIT           221        closed             closed                              -           5321 4.1.1.10
//! ```
//!
//! - *Ready*: the driver may send a message, ATRN or QUIT. *Abort*: [`ClientStep::Abort`], and the client sends QUIT.
//!   *Message done*: [`ClientStep::MessageDone`]; with PIPELINING after the replies to the whole group. *On loss*: the status
//!   that the loss of the connection gives to the recipients without a negative reply.
//! - *Session*: the client waits for no reply, because it sends content (its end leads to Content) or nothing.
//! - Only the first digit of a reply decides, except for the codes in the table, 421, and 552 to RCPT. A 3yz where none is
//!   expected counts as 4yz.
//! - 421 is a 4yz in any state, and the client sends nothing after it, not even QUIT (RFC 5321 section 3.8).
//! - If 235 arrives before the client has proved that it knows the secret, the client aborts: such a server verifies
//!   nothing. In SCRAM the server must have proved that too (RFC 5802 section 5).
//!
//! # The recipients of a message
//!
//! ```text
//! sent      2yz to the content: the peer is responsible now (RFC 5321 section 4.2.5)
//! rejected  5yz to MAIL, RCPT (but 552), DATA or the content; or the peer lacks an extension that the message needs
//! deferred  4yz to one of these; 552 to RCPT (RFC 5321 section 4.5.3.1.10); or the connection was lost before all content
//!           was sent
//! in doubt  the connection was lost after all content was sent and before its reply arrived (RFC 1047): the peer may have
//!           the message, and then the next attempt sends it twice
//! ```
//!
//! A negative reply to MAIL decides for all recipients, to RCPT for one. A reply to DATA or the content decides for the
//! recipients that were accepted; with LMTP each of these gets its own reply to the content (RFC 2033 section 4.2). After
//! the loss of the connection [`Client::abandon`] returns the results: replies that have arrived count.
//!
//! # Groups of commands (RFC 2920)
//!
//! Commands wait in `queued`. Without PIPELINING the client sends one and waits for its reply. With PIPELINING the next
//! command follows MAIL, RCPT, RSET and content at once; every other command ends its group, and QUIT waits for all
//! replies. So MAIL, RCPT and DATA of a message are one group. It may follow the content of the message before at once; then
//! two messages are in flight, never more. If all recipients failed and the peer replies 354 to DATA nevertheless, the
//! content is a lone dot (section 3.1).
//!
//! # BDAT (RFC 3030)
//!
//! If the options permit chunks and the peer offers CHUNKING, one `BDAT size LAST` with all content replaces DATA. The client
//! sends it after the last reply to RCPT, so that no content is sent if no recipient was accepted. Its reply is Content.
//!
//! # LIMITS (RFC 9422)
//!
//! If the peer announces RCPTMAX or RCPTDOMAINMAX, a transaction has no more recipients, and the others are deferred as if the
//! peer had replied 452: another transaction follows at once. If the peer permits no other MAIL (MAILMAX), or no recipient of
//! a message, the message needs another session ([`Client::permits`]).
//!
//! # One recipient at a time
//!
//! A server that asks a next hop about each recipient before it replies to its own client uses
//! [`Client::begin_transaction`], [`Client::add_recipient`] and [`Client::send_data`]. Each of the first two leads to
//! [`ClientStep::Replied`]. The result has the accepted recipients only.

use std::borrow::Cow;
use std::collections::{HashSet, VecDeque};
use std::fmt;
use std::net::IpAddr;

use super::command::{Body, Envelope, Recipient, Return};
use super::extensions::PeerExtensions;
use super::limits;
use super::reply::{Reply, Severity};
use super::status::{DecidedBy, DeliveryResult, RecipientStatus, ends_session, is_mechanism_rejected};
use crate::mail::address::{Domain, Mailbox, ReversePath};
use crate::mail::received::ClientInfo;
use crate::sasl::{ClientExchange, Login, Mechanism, TlsChannel};

/// What the client must do before mail, and how it sends mail.
#[derive(Clone, Default)]
pub struct ClientOptions {
    /// The name of this host, for EHLO.
    pub name: String,
    pub starttls: StartTls,
    /// The TLS that the connection has already, from its first octet or from before the turn; `None`: it is in clear.
    pub tls: Option<TlsChannel>,
    /// The peer must offer ATRN. If it does not, it is not a provider and gets no secret (RFC 2645 section 5.1.1).
    pub atrn: bool,
    /// The login with which the client must authenticate; `None`: it sends no AUTH.
    pub login: Option<Login>,
    /// A random text that no session has used before, for SCRAM (RFC 5802 section 5.1).
    pub nonce: String,
    /// The peer speaks LMTP (RFC 2033).
    pub lmtp: bool,
    /// Content may be sent as one BDAT chunk (RFC 3030). False after a turn: a filter in front of the customer's server
    /// may expect lines.
    pub chunking: bool,
    pub without_8bitmime: Without8BitMime,
    /// The messages were submitted to this host: if an address in the header is not ASCII, MAIL has SMTPUTF8 even if the
    /// submitting program has not declared it. A message in transit is sent as it was declared: with SMTPUTF8, hosts after
    /// the next one might reject a message that they accept without it.
    pub submits: bool,
}

/// How the client sends 8-bit content if the peer does not offer 8BITMIME.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Without8BitMime {
    /// The client sends it unchanged, as qmail and Exim do. Nearly all servers accept it, though RFC 6152 section 3 forbids it.
    #[default]
    Send,
    /// The message is rejected with 5.6.3 (RFC 6152 section 3).
    Bounce,
}

/// Whether the client sends STARTTLS (RFC 3207).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StartTls {
    #[default]
    Never,
    /// If the peer offers it; otherwise the session goes on in clear.
    Offered,
    /// Always. The session is aborted if the peer does not offer or accept it.
    Required,
}

/// A message to be sent, without its content: the driver sends that.
#[derive(Clone, Debug)]
pub struct OutgoingMessage {
    pub envelope: Envelope,
    /// Octets on the wire (RFC 1870); 0 if the size is not known yet.
    pub size: u64,
    /// The content has octets above 127, even if the envelope has `BODY=7BIT`.
    pub eight_bit: bool,
    /// An address in the header is not ASCII: see [`ClientOptions::submits`].
    pub utf8_header: bool,
    /// Earlier attempts. If a transaction cannot have all recipients, each attempt begins with other ones.
    pub attempts: usize,
}

/// Why a session cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Abort {
    /// The peer rejected something that the session needs.
    Rejected(Rejection),
    /// The peer offers no STARTTLS, and the options require it (RFC 3207 section 6).
    NoStartTls,
    /// The peer offers no ATRN: it is not a provider (RFC 2645 section 5.1.1).
    NoAtrn,
    /// The peer offers no mechanism that the login and the connection permit. `starttls`: the peer offers STARTTLS, which the
    /// options forbid. `certificate`: the login has a certificate, and no secret.
    NoMechanism { starttls: bool, certificate: bool },
    /// The peer replied 235 before the exchange was complete: it has verified nothing, or has not proved its own identity.
    Unproven,
    /// The client has cancelled the authentication. The text is the predicate of a sentence about the peer.
    Unacceptable(String),
}

/// The reply that ends a session, and its command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    pub stage: Stage,
    pub reply: Reply,
}

/// The command that a reply belongs to. The module documentation has the table of all stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// No command: the server sends first (RFC 5321 section 3.1).
    Greeting,
    Ehlo,
    Helo,
    StartTls,
    /// AUTH, or a response to a challenge.
    Auth,
    Xclient,
    Xforward,
    Atrn,
    Mail,
    /// RCPT, with the number of the recipient in its message, from 0.
    Rcpt(usize),
    Data,
    /// All content of a message.
    Content,
    /// The end of empty content, after 354 though no recipient was accepted (RFC 2920 section 3.1).
    LoneDot,
    Rset,
    Quit,
    /// No command: 421 may arrive at any time (RFC 5321 section 3.8).
    Session,
}

impl Stage {
    /// Whether the next command must wait for this reply, even with PIPELINING (RFC 2920 section 3.1).
    fn ends_group(self) -> bool {
        !matches!(self, Stage::Rset | Stage::Mail | Stage::Rcpt(_) | Stage::Content | Stage::LoneDot)
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stage::Greeting => "the greeting",
            Stage::Ehlo => "EHLO",
            Stage::Helo => "HELO",
            Stage::StartTls => "STARTTLS",
            Stage::Auth => "AUTH",
            Stage::Xclient => "XCLIENT",
            Stage::Xforward => "XFORWARD",
            Stage::Atrn => "ATRN",
            Stage::Mail => "MAIL",
            Stage::Rcpt(_) => "RCPT",
            Stage::Data => "DATA",
            Stage::Content | Stage::LoneDot => "the content",
            Stage::Rset => "RSET",
            Stage::Quit => "QUIT",
            Stage::Session => "the session",
        })
    }
}

/// The peer has broken the protocol: close the connection without another command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProtocolViolation(pub &'static str);

/// What the driver does after a reply.
#[derive(Debug)]
pub enum ClientStep {
    /// Wait for the next reply.
    Wait,
    /// Start TLS as TLS client, then call [`Client::tls_started`].
    StartTls,
    /// Send a message, ATRN or QUIT.
    Ready,
    /// The reply to [`Client::begin_transaction`] or [`Client::add_recipient`].
    Replied(Reply),
    /// Send the content of the oldest message in flight, then call [`Client::content_sent`]. `chunk`: without added dots
    /// and end, exactly as many octets as the message's size (RFC 3030).
    Content { chunk: bool },
    /// The result of the oldest message in flight, which is in flight no longer.
    MessageDone(DeliveryResult),
    /// The peer has accepted ATRN: turn the connection (RFC 2645 section 5.3).
    Turned,
    /// The session cannot go on.
    Abort(Abort),
    /// The reply to QUIT has arrived: close.
    Closed,
}

/// A message in flight.
#[derive(Default)]
struct ClientTransaction {
    /// The reply to MAIL, if it was negative.
    mail_failure: Option<Reply>,
    /// The reply to each RCPT; `None`: it has not arrived.
    rcpt_replies: Vec<Option<Reply>>,
    /// How many of them are positive.
    accepted: usize,
    /// How many negative ones come before the first that is positive or has not arrived.
    leading_failures: usize,
    /// With LMTP: the replies to the content, one for each accepted recipient.
    content_replies: Vec<Reply>,
    /// The driver adds the recipients one at a time.
    stepwise: bool,
    /// MAIL had SMTPUTF8.
    utf8: bool,
    /// The number of RCPT commands, if the driver adds the recipients.
    rcpts: usize,
    /// The octets of the content; `None`: it is sent by DATA, not by BDAT.
    chunk: Option<u64>,
    /// All content was sent.
    content_sent: bool,
}

impl ClientTransaction {
    /// Adds the reply to the RCPT of a recipient.
    fn record(&mut self, number: usize, reply: Reply) {
        if let Some(recipient) = self.rcpt_replies.get_mut(number) {
            self.accepted += usize::from(reply.is_positive());
            *recipient = Some(reply);
        }
        let failed = |reply: &&Option<Reply>| matches!(reply, Some(reply) if !reply.is_positive());
        self.leading_failures += self.rcpt_replies[self.leading_failures..].iter().take_while(failed).count();
    }

    /// The result. `accepted`: the status of accepted recipients that have no reply to the content of their own (LMTP).
    fn result(&self, accepted: &RecipientStatus, decided_by: DecidedBy) -> DeliveryResult {
        let mut content_replies = self.content_replies.iter();
        let status = |recipient: &Option<Reply>| match (&self.mail_failure, recipient) {
            (Some(reply), _) => RecipientStatus::after_negative(reply),
            (None, Some(reply)) if !reply.is_positive() => RecipientStatus::after_rcpt(reply),
            (None, _) => content_replies.next().map_or_else(|| accepted.clone(), RecipientStatus::after_content),
        };
        DeliveryResult { recipients: self.rcpt_replies.iter().map(status).collect(), decided_by }
    }
}

/// The client role on one connection.
pub struct Client {
    /// STARTTLS sets `tls` in them.
    options: ClientOptions,
    extensions: PeerExtensions,
    /// The peer has accepted EHLO, not only HELO.
    extended: bool,
    peer_name: Option<String>,
    exchange: Option<Box<dyn ClientExchange>>,
    tried_mechanisms: Vec<Mechanism>,
    /// The client has sent `*`, which cancels AUTH (RFC 4954 section 4).
    auth_cancelled: bool,
    authenticated: bool,
    /// Commands that were not sent yet.
    queued: VecDeque<(Stage, Vec<u8>)>,
    /// The replies that the client waits for.
    pending: VecDeque<Stage>,
    /// The messages in flight, the oldest first.
    transactions: VecDeque<ClientTransaction>,
    /// The greeting, EHLO, TLS and AUTH are done, and the client waits for no reply to XCLIENT, XFORWARD or ATRN.
    ready: bool,
    /// As [`Client::closing`].
    closing: bool,
    /// The peer ended the session with its reply to a message, whose result was returned.
    ended_by_message: bool,
    client_overridden: bool,
    messages_waiting: Option<u64>,
    /// The number of MAIL commands (RFC 9422 section 4.1).
    mails: usize,
    /// The domains of the recipients, if the peer limits them (RFC 9422 section 4.3).
    domains: HashSet<String>,
}

impl Client {
    /// A client that waits for the greeting.
    pub fn new(options: ClientOptions) -> Client {
        Client {
            options,
            extensions: PeerExtensions::default(),
            extended: false,
            peer_name: None,
            exchange: None,
            tried_mechanisms: Vec::new(),
            auth_cancelled: false,
            authenticated: false,
            queued: VecDeque::new(),
            pending: VecDeque::from([Stage::Greeting]),
            transactions: VecDeque::new(),
            ready: false,
            closing: false,
            ended_by_message: false,
            client_overridden: false,
            messages_waiting: None,
            mails: 0,
            domains: HashSet::new(),
        }
    }

    /// The extensions that the peer offers.
    pub fn extensions(&self) -> &PeerExtensions {
        &self.extensions
    }

    /// The peer's name in its greeting or its reply to EHLO.
    pub fn peer_name(&self) -> Option<&str> {
        self.peer_name.as_deref()
    }

    /// The number of messages that the provider holds for this customer, if its reply to ATRN has it.
    pub fn messages_waiting(&self) -> Option<u64> {
        self.messages_waiting
    }

    /// Whether the peer has accepted XCLIENT: for the rest of the session it acts as if another client were connected.
    pub fn is_client_overridden(&self) -> bool {
        self.client_overridden
    }

    /// The command that the next reply belongs to, which decides how long to wait for it (RFC 5321 section 4.5.3.2);
    /// `None`: the client waits for no reply.
    pub fn awaiting(&self) -> Option<Stage> {
        self.pending.front().copied()
    }

    /// The mechanism by which the client has authenticated; `None`: it has not.
    pub fn mechanism(&self) -> Option<Mechanism> {
        self.tried_mechanisms.last().copied().filter(|_| self.authenticated)
    }

    /// Whether the commands sent now are part of an AUTH exchange, and must not be logged.
    pub fn in_auth(&self) -> bool {
        self.exchange.is_some()
    }

    /// Whether no more mail is sent: QUIT was queued, or the peer sent 421.
    pub fn closing(&self) -> bool {
        self.closing
    }

    /// The number of messages whose MAIL is sent or queued and that have no result yet: 0 to 2.
    pub fn in_flight(&self) -> usize {
        self.transactions.len()
    }

    /// Whether [`Client::send_message`] may be called: no message is in flight, or, with PIPELINING, one whose content was
    /// sent; and the peer permits another MAIL.
    pub fn is_ready_for_message(&self) -> bool {
        let before = self.transactions.back();
        let may_follow = before.is_none_or(|before| before.content_sent && self.extensions.pipelining);
        self.ready && !self.closing && may_follow && self.transactions.len() < 2 && !self.is_used_up()
    }

    /// Whether the peer permits no other MAIL in this session (RFC 9422 section 4.1).
    pub fn is_used_up(&self) -> bool {
        self.extensions.limits.mails.is_some_and(|limit| self.mails >= limit)
    }

    /// Whether the peer permits a message with at least one of these recipients in this session. Before the first message
    /// it permits any.
    pub fn permits(&self, recipients: &[Recipient]) -> bool {
        !self.is_used_up() && recipients.iter().any(|recipient| self.permits_domain(&domain_of(recipient)))
    }

    /// Whether the peer permits RCPT for this recipient in the open transaction. RFC 9422 section 4.2: RCPT commands that
    /// have failed count, too.
    pub fn permits_recipient(&self, recipient: &Recipient) -> bool {
        let rcpts = self.transactions.front().map_or(0, |transaction| transaction.rcpts);
        let one_more = self.extensions.limits.recipients.is_none_or(|most| rcpts < most);
        one_more && self.permits_domain(&domain_of(recipient))
    }

    /// Whether the peer permits recipients of this domain in this session (RFC 9422 section 4.3).
    fn permits_domain(&self, domain: &str) -> bool {
        let limit = self.extensions.limits.domains;
        limit.is_none_or(|limit| self.domains.len() < limit || self.domains.contains(domain))
    }

    /// Counts the domain of a recipient. Returns whether the peer permits it.
    fn admit_domain(&mut self, recipient: &Recipient) -> bool {
        if self.extensions.limits.domains.is_none() {
            return true;
        }
        let domain = domain_of(recipient);
        let permitted = self.permits_domain(&domain);
        if permitted {
            self.domains.insert(domain);
        }
        permitted
    }

    /// The numbers of the recipients that the peer permits in one transaction, in order.
    fn permitted_recipients(&mut self, message: &OutgoingMessage) -> Vec<usize> {
        let recipients = &message.envelope.recipients;
        let count = recipients.len();
        let most = self.extensions.limits.recipients.unwrap_or(count);
        // Each attempt begins with later recipients, so that those who are deferred each time do not delay the others.
        let step = if self.extensions.limits.domains.is_some() { 1 } else { most };
        let first = message.attempts.wrapping_mul(step) % count.max(1);
        let mut permitted = Vec::with_capacity(most.min(count));
        for number in (first..count).chain(0..first) {
            if permitted.len() < most && self.admit_domain(&recipients[number]) {
                permitted.push(number);
            }
        }
        permitted.sort_unstable();
        permitted
    }

    /// Sends a message: MAIL, a RCPT for each recipient, DATA.
    ///
    /// # Errors
    /// The result, if the peer lacks an extension that the message needs, or permits none of its recipients. Nothing was sent
    /// then.
    pub fn send_message(&mut self, message: &OutgoingMessage, out: &mut Vec<u8>) -> Result<(), DeliveryResult> {
        let (recipients, utf8) = (&message.envelope.recipients, message.envelope.needs_utf8());
        if let Some(reply) = self.incompatibility(message) {
            let status = match self.extended {
                true => RecipientStatus::Rejected(reply),
                false => RecipientStatus::Deferred(reply),
            };
            return Err(DeliveryResult::all(status, recipients.len(), DecidedBy::Us));
        }
        let permitted = self.permitted_recipients(message);
        if permitted.is_empty() || self.is_used_up() {
            let status =
                RecipientStatus::Deferred(Reply::new(451, "4.5.3", "The peer permits no more in this session"));
            return Err(DeliveryResult::all(status, recipients.len(), DecidedBy::Us));
        }
        self.queue_mail(message);
        let mut rcpt_replies = vec![Some(one_too_many()); recipients.len()];
        for number in permitted {
            rcpt_replies[number] = None;
            self.queue_command(Stage::Rcpt(number), self.rcpt_line(&recipients[number], utf8));
        }
        self.transactions.push_back(ClientTransaction { rcpt_replies, utf8, ..ClientTransaction::default() });
        self.queue_data(message.size);
        self.flush_commands(out);
        Ok(())
    }

    /// Sends MAIL for a message whose recipients are added one at a time. No message may be in flight.
    ///
    /// # Errors
    /// The reply, if the peer lacks an extension that the message needs. Nothing was sent then.
    pub fn begin_transaction(&mut self, message: &OutgoingMessage, out: &mut Vec<u8>) -> Result<(), Reply> {
        if let Some(reply) = self.incompatibility(message) {
            let deferral = || Reply::new(451, "4.3.5", "The next hop offers no extensions now");
            return Err(if self.extended { reply } else { deferral() });
        }
        self.queue_mail(message);
        let utf8 = message.envelope.needs_utf8();
        self.transactions.push_back(ClientTransaction { stepwise: true, utf8, ..ClientTransaction::default() });
        self.flush_commands(out);
        Ok(())
    }

    /// Sends RCPT for one more recipient of the message of [`Client::begin_transaction`].
    ///
    /// # Errors
    /// The reply, if no transaction is open, the peer lacks SMTPUTF8, or its limits permit no more. Nothing was sent then.
    pub fn add_recipient(&mut self, recipient: &Recipient, out: &mut Vec<u8>) -> Result<(), Reply> {
        let Some(transaction) = self.transactions.front().filter(|transaction| transaction.stepwise) else {
            return Err(Reply::new(451, "4.5.0", "No transaction is open"));
        };
        if !recipient.mailbox.is_ascii() && !self.extensions.utf8 {
            return Err(no_utf8());
        }
        let (number, utf8) = (transaction.rcpt_replies.len(), transaction.utf8);
        if !self.permits_recipient(recipient) {
            return Err(one_too_many());
        }
        self.admit_domain(recipient);
        if let Some(transaction) = self.transactions.front_mut() {
            transaction.rcpts += 1;
        }
        self.queue_command(Stage::Rcpt(number), self.rcpt_line(recipient, utf8));
        self.flush_commands(out);
        Ok(())
    }

    /// Sends DATA or BDAT for the message of [`Client::begin_transaction`], whose content has `size` octets on the wire.
    pub fn send_data(&mut self, size: u64, out: &mut Vec<u8>) -> ClientStep {
        self.queue_data(size);
        self.flush_commands(out);
        self.chunk_or_wait(out)
    }

    /// Ends the transaction of [`Client::begin_transaction`] with RSET.
    pub fn abort_transaction(&mut self, out: &mut Vec<u8>) {
        if self.transactions.front().is_some_and(|transaction| transaction.stepwise) {
            self.transactions.pop_front();
            self.queue_reset();
            self.flush_commands(out);
        }
    }

    /// Sends XCLIENT or XFORWARD, if the peer offers one, with the client that has sent the next message. Returns whether to
    /// wait for [`ClientStep::Ready`].
    pub fn send_client_info(&mut self, info: &ClientInfo, out: &mut Vec<u8>) -> bool {
        let (stage, verb, offered) = match &self.extensions {
            PeerExtensions { xclient, .. } if !xclient.is_empty() => (Stage::Xclient, "XCLIENT", xclient),
            PeerExtensions { xforward, .. } => (Stage::Xforward, "XFORWARD", xforward),
        };
        if !offered.iter().any(|name| name == "ADDR") {
            return false;
        }
        let attributes: String = offered.iter().filter_map(|name| client_attribute(info, name)).collect();
        self.ready = false;
        self.queue_command(stage, format!("{verb}{attributes}"));
        self.flush_commands(out);
        true
    }

    /// The driver has sent all content of the oldest message, with its end.
    pub fn content_sent(&mut self, out: &mut Vec<u8>) {
        let mut replies = 1;
        if let Some(transaction) = self.transactions.front_mut() {
            transaction.content_sent = true;
            if self.options.lmtp {
                // RFC 2033 section 4.2: one reply for each accepted recipient.
                replies = transaction.accepted;
            }
        }
        self.pending.extend(std::iter::repeat_n(Stage::Content, replies));
        self.flush_commands(out);
    }

    /// Sends EHLO again: after AUTH the provider may list the domains of the account.
    pub fn ehlo_again(&mut self, out: &mut Vec<u8>) {
        self.ready = false;
        self.send_ehlo();
        self.flush_commands(out);
    }

    /// Sends ATRN; without domains: for all domains of the account (RFC 2645 section 5.2.1).
    pub fn atrn(&mut self, domains: &[Domain], out: &mut Vec<u8>) {
        self.ready = false;
        let names: Vec<_> = domains.iter().map(Domain::as_str).collect();
        self.queue_command(Stage::Atrn, format!("ATRN {}", names.join(",")).trim_end());
        self.flush_commands(out);
    }

    /// Sends QUIT after all replies have arrived (RFC 5321 section 4.1.1.10).
    pub fn quit(&mut self, out: &mut Vec<u8>) {
        self.queue_quit();
        self.flush_commands(out);
    }

    /// TLS has started: the client forgets what the peer offered in clear and sends EHLO again (RFC 3207 section 4.2).
    pub fn tls_started(&mut self, channel: TlsChannel, out: &mut Vec<u8>) -> ClientStep {
        self.options.tls = Some(channel);
        self.extensions = PeerExtensions::default();
        let step = self.send_ehlo();
        self.flush_commands(out);
        step
    }

    /// The connection was lost: returns the results of the messages in flight, the oldest first. `reason`: the reply that
    /// defers their recipients.
    pub fn abandon(&mut self, reason: &Reply) -> Vec<DeliveryResult> {
        self.closing = true;
        self.queued.clear();
        self.pending.clear();
        let result = |(number, transaction): (usize, ClientTransaction)| {
            let accepted = match transaction.content_sent {
                true => RecipientStatus::InDoubt,
                false => RecipientStatus::Deferred(reason.clone()),
            };
            let first = number == 0 && !self.ended_by_message;
            let decided_by = if first { DecidedBy::ConnectionLoss } else { DecidedBy::UnrelatedConnectionLoss };
            transaction.result(&accepted, decided_by)
        };
        self.transactions.drain(..).enumerate().map(result).collect()
    }

    /// Processes one reply of the peer: the transitions in the table of states.
    ///
    /// # Errors
    /// The client waits for no reply, and the reply is not 421.
    pub fn reply(&mut self, reply: Reply, out: &mut Vec<u8>) -> Result<ClientStep, ProtocolViolation> {
        let last = ends_session(&reply);
        let stage = match self.pending.pop_front() {
            Some(stage) => stage,
            None if last => Stage::Session,
            None => return Err(ProtocolViolation("the peer sent a reply without a command")),
        };
        if last {
            self.closing = true;
            self.queued.clear();
        }
        let step = match (stage, reply.severity()) {
            (Stage::Greeting, Severity::Positive) => {
                self.peer_name = first_word(&reply);
                self.send_ehlo()
            }
            (Stage::Ehlo, Severity::Positive) => {
                self.extended = true;
                self.peer_name = first_word(&reply).or(self.peer_name.take());
                self.extensions = PeerExtensions::parse(&reply);
                self.starttls_or_proceed()
            }
            (Stage::Ehlo, Severity::Permanent) if self.is_helo_enough() => {
                self.queue_command(Stage::Helo, format!("HELO {}", self.options.name));
                ClientStep::Wait
            }
            (Stage::StartTls, Severity::Positive) => ClientStep::StartTls,
            (Stage::StartTls, _) if self.options.starttls == StartTls::Offered => self.proceed(),
            (Stage::Auth, _) => self.auth_replied(reply),
            (Stage::Xclient, Severity::Positive) => {
                self.client_overridden = true;
                self.send_ehlo()
            }
            // A peer that rejects XCLIENT or XFORWARD may accept the mail nevertheless.
            (Stage::Xclient | Stage::Xforward, _) | (Stage::Helo, Severity::Positive) => self.proceed(),
            (Stage::Atrn, Severity::Positive) => {
                self.messages_waiting = messages_waiting(&reply);
                ClientStep::Turned
            }
            (Stage::Atrn, _) => {
                self.ready = true;
                ClientStep::Abort(Abort::Rejected(Rejection { stage, reply }))
            }
            (Stage::Mail, _) => self.mail_replied(reply),
            (Stage::Rcpt(number), _) => self.rcpt_replied(number, reply, out),
            (Stage::Data, _) => self.data_replied(reply, out),
            (Stage::Content, _) => self.content_replied(reply),
            (Stage::LoneDot, _) => self.finish_transaction(None),
            (Stage::Rset, _) => ClientStep::Wait,
            (Stage::Quit, _) => ClientStep::Closed,
            (Stage::Greeting | Stage::Ehlo | Stage::Helo | Stage::StartTls | Stage::Session, _) => {
                self.abort(Abort::Rejected(Rejection { stage, reply }))
            }
        };
        self.ended_by_message |= last && matches!(step, ClientStep::MessageDone(_));
        self.flush_commands(out);
        Ok(step)
    }

    // From the greeting to ready.

    fn send_ehlo(&mut self) -> ClientStep {
        let verb = if self.options.lmtp { "LHLO" } else { "EHLO" };
        self.queue_command(Stage::Ehlo, format!("{verb} {}", self.options.name));
        ClientStep::Wait
    }

    /// Whether the session needs no extension, so that HELO is enough (RFC 5321 section 3.2).
    fn is_helo_enough(&self) -> bool {
        self.options.starttls != StartTls::Required && self.options.login.is_none() && !self.options.lmtp
    }

    fn starttls_or_proceed(&mut self) -> ClientStep {
        match self.options.starttls {
            StartTls::Never => self.proceed(),
            _ if self.options.tls.is_some() => self.proceed(),
            _ if self.extensions.starttls => {
                self.queue_command(Stage::StartTls, "STARTTLS");
                ClientStep::Wait
            }
            StartTls::Offered => self.proceed(),
            StartTls::Required => self.abort(Abort::NoStartTls),
        }
    }

    /// What follows EHLO and TLS: AUTH, or the session is ready.
    fn proceed(&mut self) -> ClientStep {
        if self.options.atrn && !self.extensions.atrn {
            return self.abort(Abort::NoAtrn);
        }
        if let Some(login) = &self.options.login
            && !self.authenticated
        {
            let certificate = login.certificate && login.secret.is_none();
            let starttls = self.extensions.starttls && self.options.tls.is_none();
            let aborts = Abort::NoMechanism { starttls, certificate };
            return if self.send_auth() { ClientStep::Wait } else { self.abort(aborts) };
        }
        self.ready = true;
        ClientStep::Ready
    }

    /// Sends AUTH with the strongest mechanism that was not tried yet (RFC 4954 section 4). Returns whether there is one.
    fn send_auth(&mut self) -> bool {
        let Some(login) = &self.options.login else { return false };
        let (offered, channel) = (&self.extensions.mechanisms, self.options.tls.clone().unwrap_or_default());
        let exchange_by = |mechanism: Mechanism| mechanism.client(login, &channel, offered, self.options.nonce.clone());
        let untried = Mechanism::usable(offered, self.options.tls.as_ref())
            .filter(|mechanism| login.mechanisms.contains(mechanism) && !self.tried_mechanisms.contains(mechanism));
        let found = untried.filter_map(|mechanism| Some((mechanism, exchange_by(mechanism)?))).next();
        let Some((mechanism, mut exchange)) = found else { return false };
        let mut line = format!("AUTH {}", mechanism.name());
        if let Some(initial) = exchange.initial() {
            // RFC 4954 section 4: "=" is an empty response, and no initial response may make the line too long.
            let initial = if initial.is_empty() { "=".to_owned() } else { data_encoding::BASE64.encode(&initial) };
            if line.len() + 1 + initial.len() + "\r\n".len() <= limits::SENT_COMMAND_LINE {
                line = format!("{line} {initial}");
            } else if let Some(anew) = exchange_by(mechanism) {
                exchange = anew;
            }
        }
        self.tried_mechanisms.push(mechanism);
        self.auth_cancelled = false;
        self.exchange = Some(exchange);
        self.queue_command(Stage::Auth, line);
        true
    }

    fn auth_replied(&mut self, reply: Reply) -> ClientStep {
        let mut exchange = self.exchange.take();
        // After a failed -PLUS no other mechanism follows: it would not detect an attacker in between (RFC 5802 section
        // 6).
        let fallback = !self.tried_mechanisms.contains(&Mechanism::ScramSha256Plus);
        let problem = exchange.as_ref().filter(|_| self.auth_cancelled).and_then(|exchange| exchange.problem());
        if let Some(problem) = problem.map(str::to_owned) {
            return self.abort(Abort::Unacceptable(problem));
        }
        match (reply.severity(), &mut exchange) {
            (Severity::Intermediate, Some(running)) if !self.auth_cancelled => {
                let text = reply.lines().next().unwrap_or_default();
                let challenge = data_encoding::BASE64.decode(text.trim().as_bytes()).ok();
                let response = challenge.and_then(|challenge| running.step(&challenge));
                self.auth_cancelled = response.is_none();
                let line = response.map_or("*".to_owned(), |response| data_encoding::BASE64.encode(&response));
                self.exchange = exchange;
                self.queue_command(Stage::Auth, line);
                ClientStep::Wait
            }
            // RFC 4954 section 4: the server must reject an AUTH that the client has cancelled.
            (Severity::Positive, Some(done)) if done.finished() && self.auth_cancelled => {
                self.abort(Abort::Unacceptable("accepts it nevertheless".to_owned()))
            }
            (Severity::Positive, Some(done)) if done.finished() => {
                self.authenticated = true;
                self.proceed()
            }
            (Severity::Positive, _) => self.abort(Abort::Unproven),
            _ if fallback && is_mechanism_rejected(&reply) && self.send_auth() => ClientStep::Wait,
            _ => self.abort(Abort::Rejected(Rejection { stage: Stage::Auth, reply })),
        }
    }

    fn abort(&mut self, abort: Abort) -> ClientStep {
        self.queue_quit();
        ClientStep::Abort(abort)
    }

    // One message.

    fn mail_replied(&mut self, reply: Reply) -> ClientStep {
        match self.transactions.front_mut() {
            Some(transaction) if transaction.stepwise => {
                if !reply.is_positive() {
                    self.transactions.clear();
                }
                ClientStep::Replied(reply)
            }
            Some(transaction) if !reply.is_positive() => {
                transaction.mail_failure = Some(reply);
                self.queued.retain(|(stage, _)| *stage == Stage::Quit);
                if self.pending.is_empty() { self.finish_transaction(None) } else { ClientStep::Wait }
            }
            _ => ClientStep::Wait,
        }
    }

    fn rcpt_replied(&mut self, number: usize, reply: Reply, out: &mut Vec<u8>) -> ClientStep {
        let Some(transaction) = self.transactions.front_mut() else {
            return ClientStep::Wait;
        };
        if transaction.stepwise {
            if reply.is_positive() {
                transaction.rcpt_replies.push(None);
                transaction.record(transaction.rcpt_replies.len() - 1, reply.clone());
            }
            return ClientStep::Replied(reply);
        }
        transaction.record(number, reply);
        if transaction.leading_failures == transaction.rcpt_replies.len() {
            self.queued.retain(|(stage, _)| *stage == Stage::Quit);
            if self.pending.is_empty() {
                self.queue_reset();
                return self.finish_transaction(None);
            }
        }
        self.chunk_or_wait(out)
    }

    /// Queues DATA, unless the content is sent by BDAT.
    fn queue_data(&mut self, size: u64) {
        let chunking = self.options.chunking && self.extensions.chunking;
        if let Some(transaction) = self.transactions.back_mut() {
            transaction.stepwise = false;
            transaction.chunk = chunking.then_some(size);
        }
        if !chunking {
            self.queue_command(Stage::Data, "DATA");
        }
    }

    /// Sends BDAT after the last reply to RCPT.
    fn chunk_or_wait(&mut self, out: &mut Vec<u8>) -> ClientStep {
        match self.transactions.front() {
            Some(ClientTransaction { chunk: Some(octets), mail_failure, .. })
                if self.pending.is_empty() && self.queued.is_empty() =>
            {
                if mail_failure.is_some() {
                    return self.finish_transaction(None);
                }
                out.extend_from_slice(format!("BDAT {octets} LAST\r\n").as_bytes());
                ClientStep::Content { chunk: true }
            }
            _ => ClientStep::Wait,
        }
    }

    fn data_replied(&mut self, reply: Reply, out: &mut Vec<u8>) -> ClientStep {
        let accepted = self.transactions.front().is_some_and(|open| open.mail_failure.is_none() && open.accepted > 0);
        match (reply.severity(), accepted) {
            (Severity::Intermediate, true) => ClientStep::Content { chunk: false },
            (Severity::Intermediate, false) => {
                out.extend_from_slice(b".\r\n");
                if self.options.lmtp {
                    // RFC 2033 section 4.2: without accepted recipients there is no reply.
                    return self.finish_transaction(None);
                }
                self.pending.push_back(Stage::LoneDot);
                ClientStep::Wait
            }
            (severity, accepted) => {
                self.queue_reset();
                let reply = match severity {
                    Severity::Positive => Reply::new(451, "4.5.0", "The peer did not reply 354 to DATA"),
                    _ => reply,
                };
                self.finish_transaction(accepted.then_some(&reply))
            }
        }
    }

    fn content_replied(&mut self, reply: Reply) -> ClientStep {
        if ends_session(&reply) {
            // Some LMTP servers mean only one recipient by 421, and reply for the others, too. Such a reply is ignored, as one
            // to RSET is. If it counted for the next message, that would be lost: a 250 would mean that it was sent.
            self.pending
                .iter_mut()
                .take_while(|stage| **stage == Stage::Content)
                .for_each(|stage| *stage = Stage::Rset);
        }
        // RFC 2033 section 4.2: one reply for each accepted recipient. After 421 the rest are deferred.
        if self.options.lmtp
            && !ends_session(&reply)
            && let Some(transaction) = self.transactions.front_mut()
        {
            transaction.content_replies.push(reply);
            if transaction.content_replies.len() < transaction.accepted {
                return ClientStep::Wait;
            }
            return self.finish_transaction(None);
        }
        self.finish_transaction(Some(&reply))
    }

    /// Ends the oldest message. `last`: the reply that decides on its accepted recipients.
    fn finish_transaction(&mut self, last: Option<&Reply>) -> ClientStep {
        let Some(transaction) = self.transactions.pop_front() else {
            return ClientStep::Wait;
        };
        let accepted = match last {
            Some(last) if transaction.content_sent => RecipientStatus::after_content(last),
            Some(last) => RecipientStatus::after_negative(last),
            None => RecipientStatus::Deferred(Reply::new(451, "4.5.0", "No reply decided on this recipient")),
        };
        // A reply to BDAT counts as one to DATA: see `DecidedBy`.
        let decided_by = match (&transaction.mail_failure, transaction.content_sent && transaction.chunk.is_none()) {
            (Some(_), _) => DecidedBy::PeerAtMail,
            (None, true) => DecidedBy::PeerAtContent,
            (None, false) if last.is_some() => DecidedBy::PeerAtData,
            (None, false) => DecidedBy::Peer,
        };
        ClientStep::MessageDone(transaction.result(&accepted, decided_by))
    }

    /// Whether the content may be sent to the peer: it is 7-bit, or the peer offers 8BITMIME, or the options permit 8-bit
    /// content without it (RFC 6152 section 3). A message that needs SMTPUTF8 always needs 8BITMIME (RFC 6531 section 3.1).
    pub fn may_send_content(&self, message: &OutgoingMessage) -> bool {
        let send_anyway = self.options.without_8bitmime == Without8BitMime::Send && !message.envelope.needs_utf8();
        !message.eight_bit || self.extensions.eight_bit || send_anyway
    }

    /// The reply that rejects a message, if the peer lacks an extension that the message needs. The callers defer the message
    /// if the peer has rejected EHLO, because that may be temporary.
    fn incompatibility(&self, message: &OutgoingMessage) -> Option<Reply> {
        let offered = &self.extensions;
        match offered.size {
            // RFC 6531 section 3.2.
            _ if message.envelope.needs_utf8() && !offered.utf8 => Some(no_utf8()),
            _ if !self.may_send_content(message) => {
                Some(Reply::new(554, "5.6.3", "The next hop does not offer 8BITMIME"))
            }
            Some(limit) if limit > 0 && message.size > limit => {
                Some(Reply::new(552, "5.3.4", format!("The next hop accepts no more than {limit} octets")))
            }
            _ => None,
        }
    }

    // Command lines.

    /// MAIL, with parameters only of extensions that the peer offers (RFC 5321 section 4.1.1.11).
    fn mail_line(&self, message: &OutgoingMessage) -> String {
        let (envelope, offered) = (&message.envelope, &self.extensions);
        let mut line = match &envelope.from {
            ReversePath::Null => "MAIL FROM:<>".to_owned(),
            ReversePath::Mailbox(mailbox) => format!("MAIL FROM:<{}>", spelled(mailbox, envelope.needs_utf8())),
        };
        // RFC 1870 section 6: no SIZE if the size is not known.
        if offered.size.is_some() && message.size > 0 {
            line.push_str(&format!(" SIZE={}", message.size));
        }
        // Undeclared content may be 8-bit. 7-bit content is valid as 8BITMIME, too.
        if offered.eight_bit && envelope.body != Body::SevenBit {
            line.push_str(" BODY=8BITMIME");
        }
        if envelope.needs_utf8() || offered.utf8 && message.utf8_header && self.options.submits {
            line.push_str(" SMTPUTF8");
        }
        // RFC 3461 section 5.2.1: the parameters are relayed unchanged.
        if offered.dsn {
            match envelope.ret {
                Some(Return::Full) => line.push_str(" RET=FULL"),
                Some(Return::Header) => line.push_str(" RET=HDRS"),
                None => {}
            }
            line.extend(envelope.envelope_id.iter().map(|id| format!(" ENVID={id}")));
        }
        // RFC 4954 section 5: a client that has authenticated must send AUTH=<> for a sender that it does not vouch for.
        if self.authenticated && offered.auth {
            line.push_str(" AUTH=<>");
        }
        line
    }

    /// RCPT, with parameters only of extensions that the peer offers. `utf8`: MAIL had SMTPUTF8.
    fn rcpt_line(&self, recipient: &Recipient, utf8: bool) -> String {
        let mut line = format!("RCPT TO:<{}>", spelled(&recipient.mailbox, utf8));
        if self.extensions.dsn {
            line.extend(recipient.notify.as_given().map(|notify| format!(" NOTIFY={notify}")));
            line.extend(recipient.original.iter().map(|original| format!(" ORCPT={original}")));
        }
        line
    }

    fn queue_mail(&mut self, message: &OutgoingMessage) {
        self.mails += 1;
        self.queue_command(Stage::Mail, self.mail_line(message));
    }

    fn queue_quit(&mut self) {
        if !self.closing {
            self.closing = true;
            self.queue_command(Stage::Quit, "QUIT");
        }
    }

    /// Queues RSET, so that the peer drops the transaction. After QUIT it is not needed.
    fn queue_reset(&mut self) {
        if !self.closing {
            self.queue_command(Stage::Rset, "RSET");
        }
    }

    fn queue_command(&mut self, stage: Stage, line: impl Into<Vec<u8>>) {
        self.queued.push_back((stage, line.into()));
    }

    /// Sends the queued commands that may be sent now (RFC 2920 section 3.1).
    fn flush_commands(&mut self, out: &mut Vec<u8>) {
        let pipelining = self.extensions.pipelining;
        let may_follow = |last: &Stage, next: Stage| pipelining && !last.ends_group() && next != Stage::Quit;
        while let Some((stage, line)) = self.queued.pop_front() {
            if self.pending.back().is_some_and(|last| !may_follow(last, stage)) {
                self.queued.push_front((stage, line));
                return;
            }
            out.extend_from_slice(&line);
            out.extend_from_slice(b"\r\n");
            self.pending.push_back(stage);
        }
    }
}

fn first_word(reply: &Reply) -> Option<String> {
    let word = reply.lines().next()?.split_ascii_whitespace().next()?;
    Some(word.to_owned())
}

/// The number before the word `messages` in a reply.
fn messages_waiting(reply: &Reply) -> Option<u64> {
    let words: Vec<_> = reply.lines().flat_map(str::split_ascii_whitespace).collect();
    let mut pairs = words.windows(2).filter(|pair| pair[1].starts_with("message"));
    pairs.find_map(|pair| pair[0].parse().ok())
}

/// An address as it was received; without SMTPUTF8 its domain has A-labels (RFC 6531 section 3.2).
fn spelled(mailbox: &Mailbox, utf8: bool) -> Cow<'_, str> {
    if utf8 { Cow::Owned(mailbox.to_string()) } else { mailbox.with_a_labels() }
}

/// The domain of a recipient, in lower case, to compare it with others; empty if there is none.
fn domain_of(recipient: &Recipient) -> String {
    let address = recipient.mailbox.to_string();
    address.rsplit_once('@').map_or("", |(_, domain)| domain).to_ascii_lowercase()
}

/// The reply for a recipient that the limits of the peer do not permit in this transaction (RFC 9422).
pub fn one_too_many() -> Reply {
    Reply::new(452, "4.5.3", "The peer permits no more recipients in one transaction")
}

fn no_utf8() -> Reply {
    Reply::new(553, "5.6.7", "The next hop does not offer SMTPUTF8")
}

/// ` NAME=value` for XCLIENT and XFORWARD; `None`: this program does not know the attribute.
fn client_attribute(info: &ClientInfo, name: &str) -> Option<String> {
    let value = match name {
        "ADDR" => match info.address {
            IpAddr::V4(address) => address.to_string(),
            IpAddr::V6(address) => format!("IPV6:{address}"),
        },
        // The DNS name of the address was not looked up, and the name in EHLO may be wrong.
        "NAME" => "[UNAVAILABLE]".to_owned(),
        "HELO" => info.helo.as_deref().map_or("[UNAVAILABLE]".to_owned(), xtext),
        "PROTO" => if info.extended { "ESMTP" } else { "SMTP" }.to_owned(),
        "SOURCE" => "REMOTE".to_owned(),
        _ => return None,
    };
    Some(format!(" {name}={value}"))
}

/// The text as xtext (RFC 3461 section 4): an octet that ends a word or begins an escape becomes `+HH`.
fn xtext(text: &str) -> String {
    let plain = |octet: u8| octet.is_ascii_graphic() && !matches!(octet, b'+' | b'=');
    let word = |octet: u8| if plain(octet) { char::from(octet).to_string() } else { format!("+{octet:02X}") };
    text.bytes().map(word).collect()
}
