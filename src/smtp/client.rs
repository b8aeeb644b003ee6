//! The SMTP client role: a reply comes in, what to say goes out (RFC 5321, RFC 2920, RFC 4954, RFC 2645).
//!
//! Commands are lined up and said as the peer permits: one at a time, or in groups when it offers
//! PIPELINING. What was said and not yet answered stands in `outstanding`, in order; a reply belongs to
//! its front, by position and never by its text (RFC 2920 section 3.1). So replies may be read while
//! content is still being written, and the next transaction begins behind the content of the last.
//!
//! A transaction may also be opened recipient by recipient, each reply being somebody's question before it is
//! an answer to ours: [`Client::ask_mail`]. And the peer may speak LMTP (RFC 2033), which differs in two things:
//! LHLO, and one reply a recipient behind the content.
//!
//! ```text
//! greeting ─ EHLO ─┬─ STARTTLS ─ EHLO ─┬─ AUTH ─┬─ MAIL RCPT… DATA content ─┬─ QUIT
//!                  └─ (HELO)           └────────┤        ▲        │         ├─ ATRN ─▶ turned
//!                                               └────────┴────────┴─────────┘
//! ```

use std::collections::VecDeque;
use std::fmt;
use std::net::IpAddr;

use super::command::{Body, Envelope, Recipient, Return};
use super::extensions::PeerExtensions;
use super::limits;
use super::reply::{Reply, Severity};
use super::status::{DecidedBy, DeliveryResult, RecipientStatus, ends_session};
use crate::mail::address::Domain;
use crate::mail::received::ClientInfo;
use crate::sasl::{ClientExchange, Mechanism};

/// What is to happen before mail.
#[derive(Clone, Default)]
pub struct ClientOptions {
    /// Our name for EHLO.
    pub name: String,
    pub starttls: StartTls,
    /// TLS is there from the first octet, or from before the turn.
    pub tls: bool,
    /// The peer must offer ATRN, or it is told no secret (RFC 2645 section 5.1.1).
    pub atrn: bool,
    /// Account and secret, where the peer wants to know who we are.
    pub credentials: Option<(String, Vec<u8>)>,
    /// The peer speaks LMTP (RFC 2033).
    pub lmtp: bool,
    /// Content may go as one BDAT chunk where the peer offers CHUNKING (RFC 3030). Not so after a turn:
    /// some customers are pipes that look at lines.
    pub chunking: bool,
}

/// Whether TLS is begun with STARTTLS (RFC 3207).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StartTls {
    #[default]
    Never,
    /// When the peer offers it; else in clear.
    Offered,
    /// Without it nothing goes on.
    Required,
}

/// A message to be sent, without its content, which the driver has.
#[derive(Clone, Debug)]
pub struct OutgoingMessage {
    pub envelope: Envelope,
    /// Octets on the wire (RFC 1870), without dots that are added.
    pub size: u64,
    /// The content has octets above 127, whatever `BODY` its sender declared.
    pub eight_bit: bool,
}

/// Why a session goes no further. QUIT has been queued if it can be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Abort {
    /// The peer rejected something that the session needs.
    Rejected(Rejection),
    /// The peer offers no STARTTLS, and the options require it (RFC 3207 section 6).
    NoStartTls,
    /// The peer offers no ATRN: it is not a provider (RFC 2645 section 5.1.1).
    NoAtrn,
    /// The peer offers no mechanism that may be used here.
    NoMechanism,
    /// The peer replied 235 without proof that it knows the secret.
    Unproven,
}

/// A negative reply that ends what a session is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    pub stage: Stage,
    pub reply: Reply,
}

/// What a reply belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Greeting,
    Ehlo,
    Helo,
    StartTls,
    Auth,
    Atrn,
    /// A reply without a command: 421 may come at any time (RFC 5321 section 3.8).
    Session,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stage::Greeting => "the greeting",
            Stage::Ehlo => "EHLO",
            Stage::Helo => "HELO",
            Stage::StartTls => "STARTTLS",
            Stage::Auth => "AUTH",
            Stage::Atrn => "ATRN",
            Stage::Session => "the session",
        })
    }
}

/// The peer breaks the protocol; there is nothing to be said to it any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProtocolViolation(pub &'static str);

/// What a reply led to.
#[derive(Debug)]
pub enum ClientStep {
    /// Send what was lined up, wait for the next reply.
    Wait,
    /// Start TLS as TLS client, then call [`Client::secured`].
    StartTls,
    /// Nothing stands in the way of mail, ATRN or QUIT.
    Ready,
    /// The reply to what was asked with [`Client::ask_mail`] or [`Client::ask_recipient`].
    Replied(Reply),
    /// Send the content of the message in front, then call [`Client::content_sent`]; `chunk`: as it is,
    /// without dots and end, exactly as many octets as the message's size (RFC 3030).
    Content {
        chunk: bool,
    },
    /// The message in front is done with.
    MessageDone(DeliveryResult),
    /// ATRN was answered 250: from here on turn.rs.
    Turned,
    Abort(Abort),
    /// QUIT was answered.
    Closed,
}

/// What is awaited, and so how long (RFC 5321 section 4.5.3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Awaiting {
    Greeting,
    /// EHLO, STARTTLS, AUTH, RSET, QUIT and the like.
    Command,
    Mail,
    Recipient,
    Data,
    /// The reply to all content.
    End,
    Atrn,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum PendingReply {
    Greeting,
    Ehlo,
    Helo,
    StartTls,
    Auth,
    Xclient,
    Xforward,
    Mail,
    Rcpt(usize),
    Data,
    Content,
    /// The end of a message to nobody (RFC 2920 section 3.1).
    LoneDot,
    Rset,
    Atrn,
    Quit,
}

impl PendingReply {
    /// RFC 2920 section 3.1: RSET, MAIL and RCPT may stand anywhere in a group, content too; everything
    /// else only at its end.
    fn ends_group(&self) -> bool {
        !matches!(
            self,
            PendingReply::Rset
                | PendingReply::Mail
                | PendingReply::Rcpt(_)
                | PendingReply::Content
                | PendingReply::LoneDot
        )
    }

    fn awaiting(&self) -> Awaiting {
        match self {
            PendingReply::Greeting => Awaiting::Greeting,
            PendingReply::Mail => Awaiting::Mail,
            PendingReply::Rcpt(_) => Awaiting::Recipient,
            PendingReply::Data => Awaiting::Data,
            PendingReply::Content | PendingReply::LoneDot => Awaiting::End,
            PendingReply::Atrn => Awaiting::Atrn,
            PendingReply::Ehlo | PendingReply::Helo | PendingReply::StartTls | PendingReply::Auth => Awaiting::Command,
            PendingReply::Xclient | PendingReply::Xforward | PendingReply::Rset | PendingReply::Quit => {
                Awaiting::Command
            }
        }
    }
}

/// One message under way.
struct ClientTransaction {
    /// The reply to MAIL, if it was a refusal.
    mail: Option<Reply>,
    /// The replies to RCPT.
    recipients: Vec<Option<Reply>>,
    /// The replies to the content, by recipient that was accepted; SMTP has one for all.
    content_replies: Vec<Reply>,
    /// Its recipients are asked for one by one.
    stepwise: bool,
    content: ContentProgress,
    /// The content goes as one chunk of so many octets.
    chunk: Option<u64>,
}

impl ClientTransaction {
    /// A rejection of MAIL is for all recipients, one of RCPT for that recipient; `accepted` is the status of the others.
    fn result(&self, accepted: &RecipientStatus) -> DeliveryResult {
        let mut content_replies = self.content_replies.iter();
        let status = |recipient: &Option<Reply>| match (&self.mail, recipient) {
            (Some(mail), _) => RecipientStatus::after_negative(mail),
            (None, Some(reply)) if !reply.is_positive() => RecipientStatus::after_rcpt(reply),
            (None, _) => content_replies.next().map_or_else(|| accepted.clone(), RecipientStatus::after_content),
        };
        let decided_by = if self.mail.is_some() { DecidedBy::PeerAtMail } else { DecidedBy::Peer };
        DeliveryResult { recipients: self.recipients.iter().map(status).collect(), decided_by }
    }

    fn accepted(&self) -> usize {
        self.recipients.iter().flatten().filter(|reply| reply.is_positive()).count()
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum ContentProgress {
    NotYet,
    Sending,
    Sent,
}

/// The client role on one connection.
pub struct Client {
    options: ClientOptions,
    extensions: PeerExtensions,
    tls: bool,
    exchange: Option<(Mechanism, Box<dyn ClientExchange>)>,
    tried: Vec<Mechanism>,
    authenticated: bool,
    /// "*" was said.
    cancelled: bool,
    /// The name in the peer's greeting or EHLO reply.
    peer_name: Option<String>,
    queued: VecDeque<(PendingReply, Vec<u8>)>,
    pending: VecDeque<PendingReply>,
    transactions: VecDeque<ClientTransaction>,
    ready: bool,
    /// EHLO was answered, not HELO.
    extended: bool,
    /// How many messages wait for us, by the reply to ATRN.
    messages_waiting: Option<u64>,
    /// XCLIENT was said: the peer takes us for somebody else, for the rest of the session.
    client_overridden: bool,
    /// No mail is sent any more: QUIT was lined up, or the peer said 421.
    closing: bool,
}

impl Client {
    /// A client that waits for the greeting (RFC 5321 section 4.3.1).
    pub fn new(options: ClientOptions) -> Client {
        let tls = options.tls;
        Client {
            options,
            extensions: PeerExtensions::default(),
            tls,
            exchange: None,
            tried: Vec::new(),
            authenticated: false,
            cancelled: false,
            peer_name: None,
            queued: VecDeque::new(),
            pending: VecDeque::from([PendingReply::Greeting]),
            transactions: VecDeque::new(),
            ready: false,
            extended: false,
            messages_waiting: None,
            client_overridden: false,
            closing: false,
        }
    }

    /// What the peer offers.
    pub fn extensions(&self) -> &PeerExtensions {
        &self.extensions
    }

    /// Our own name, as EHLO says it.
    pub fn name(&self) -> &str {
        &self.options.name
    }

    pub fn peer_name(&self) -> Option<&str> {
        self.peer_name.as_deref()
    }

    /// How many messages the provider has for us, if its reply to ATRN says so.
    pub fn messages_waiting(&self) -> Option<u64> {
        self.messages_waiting
    }

    /// Whether the peer takes us for the origin of a message, and so of all that follow.
    pub fn is_client_overridden(&self) -> bool {
        self.client_overridden
    }

    /// What the next reply is the answer to; `None`: nothing is outstanding.
    pub fn awaiting(&self) -> Option<Awaiting> {
        self.pending.front().map(PendingReply::awaiting)
    }

    /// Whether what is being said now is a secret, and not for any log.
    pub fn in_auth(&self) -> bool {
        self.exchange.is_some()
    }

    /// QUIT was said, or the peer said 421: only the end is awaited.
    pub fn closing(&self) -> bool {
        self.closing
    }

    /// Messages given and not yet settled.
    pub fn in_flight(&self) -> usize {
        self.transactions.len()
    }

    /// Whether [`Client::send`] may be called: nothing is under way, or all that is awaited of the
    /// message before is the reply to its content.
    pub fn is_ready_for_message(&self) -> bool {
        self.ready
            && !self.closing
            && match self.transactions.front() {
                None => true,
                Some(front) => {
                    self.extensions.pipelining && front.content == ContentProgress::Sent && self.transactions.len() == 1
                }
            }
    }

    /// Takes the next message. `Err`: it cannot go to this peer at all, and nothing was said of it.
    pub fn send_message(&mut self, message: OutgoingMessage, out: &mut Vec<u8>) -> Result<(), DeliveryResult> {
        if let Some(reply) = self.incompatibility(&message) {
            // Who does not even know EHLO today may know it tomorrow.
            let status =
                if self.extended { RecipientStatus::Rejected(reply) } else { RecipientStatus::Deferred(reply) };
            return Err(DeliveryResult {
                recipients: vec![status; message.envelope.recipients.len()],
                decided_by: DecidedBy::Us,
            });
        }
        self.queue_command(PendingReply::Mail, self.mail_line(&message));
        for (number, recipient) in message.envelope.recipients.iter().enumerate() {
            self.queue_command(PendingReply::Rcpt(number), self.rcpt_line(recipient));
        }
        let chunk = (self.options.chunking && self.extensions.chunking).then_some(message.size);
        if chunk.is_none() {
            self.queue_command(PendingReply::Data, "DATA");
        }
        let recipients = vec![None; message.envelope.recipients.len()];
        self.begin(recipients, chunk, false);
        self.flush_commands(out);
        Ok(())
    }

    fn begin(&mut self, recipients: Vec<Option<Reply>>, chunk: Option<u64>, asking: bool) {
        let content = ContentProgress::NotYet;
        self.transactions.push_back(ClientTransaction {
            mail: None,
            recipients,
            content_replies: Vec::new(),
            stepwise: asking,
            content,
            chunk,
        });
    }

    /// Opens a transaction whose recipients are not known yet, and whose content is not: nothing else is under way.
    pub fn begin_transaction(&mut self, message: &OutgoingMessage, out: &mut Vec<u8>) -> Result<(), Reply> {
        if let Some(reply) = self.incompatibility(message) {
            // Who does not even know EHLO today may know it tomorrow.
            let later = || Reply::new(451, "4.3.5", "The next hop offers no extensions now");
            return Err(if self.extended { reply } else { later() });
        }
        self.queue_command(PendingReply::Mail, self.mail_line(message));
        self.begin(Vec::new(), None, true);
        self.flush_commands(out);
        Ok(())
    }

    /// One recipient more of the transaction that [`Client::ask_mail`] has opened.
    pub fn add_recipient(&mut self, recipient: &Recipient, out: &mut Vec<u8>) -> Result<(), Reply> {
        let line = self.rcpt_line(recipient);
        let Some(asked) = self.transactions.front_mut().filter(|front| front.stepwise) else {
            return Err(Reply::new(451, "4.5.0", "No transaction is open"));
        };
        if !recipient.mailbox.is_ascii() && !self.extensions.utf8 {
            // RFC 6531 section 3.2.
            return Err(no_utf8());
        }
        let number = asked.recipients.len();
        asked.recipients.push(None);
        self.queue_command(PendingReply::Rcpt(number), line);
        self.flush_commands(out);
        Ok(())
    }

    /// All recipients have been asked for: on with the content, of so many octets.
    pub fn send_data(&mut self, size: u64, out: &mut Vec<u8>) -> ClientStep {
        let chunk = (self.options.chunking && self.extensions.chunking).then_some(size);
        if let Some(asked) = self.transactions.front_mut() {
            (asked.stepwise, asked.chunk) = (false, chunk);
        }
        if chunk.is_none() {
            self.queue_command(PendingReply::Data, "DATA");
            self.flush_commands(out);
        }
        self.chunk_or_wait(out)
    }

    /// Lets the transaction go that [`Client::ask_mail`] has opened.
    pub fn abort_transaction(&mut self, out: &mut Vec<u8>) {
        if self.transactions.front().is_some_and(|front| front.stepwise) {
            self.transactions.pop_front();
            self.reset();
            self.flush_commands(out);
        }
    }

    /// Says who gave the next message to the host that gave it to us, where the peer wants to know. `true`: wait for
    /// [`Step::Ready`].
    pub fn send_client_info(&mut self, origin: &ClientInfo, out: &mut Vec<u8>) -> bool {
        let attributes = |wanted: &[String]| -> String {
            let value = |name: &String| match name.as_str() {
                "ADDR" => Some(match origin.address {
                    IpAddr::V4(address) => address.to_string(),
                    IpAddr::V6(address) => format!("IPV6:{address}"),
                }),
                // The name that DNS gives the address is not known here, and EHLO's may be a lie.
                "NAME" => Some("[UNAVAILABLE]".to_owned()),
                "HELO" => Some(origin.helo.as_deref().map_or("[UNAVAILABLE]".to_owned(), xtext)),
                "PROTO" => Some(if origin.extended { "ESMTP" } else { "SMTP" }.to_owned()),
                "SOURCE" => Some("REMOTE".to_owned()),
                _ => None,
            };
            wanted.iter().filter_map(|name| Some(format!(" {name}={}", value(name)?))).collect()
        };
        let (said, line) = if !self.extensions.xclient.is_empty() {
            (PendingReply::Xclient, format!("XCLIENT{}", attributes(&self.extensions.xclient)))
        } else if !self.extensions.xforward.is_empty() {
            (PendingReply::Xforward, format!("XFORWARD{}", attributes(&self.extensions.xforward)))
        } else {
            return false;
        };
        if !line.contains(" ADDR=") {
            return false;
        }
        self.ready = false;
        self.queue_command(said, line);
        self.flush_commands(out);
        true
    }

    /// The content of the message in front went into the write buffer, with its end.
    pub fn content_sent(&mut self, out: &mut Vec<u8>) {
        let mut replies = 1;
        if let Some(front) = self.transactions.front_mut() {
            front.content = ContentProgress::Sent;
            if self.options.lmtp {
                // RFC 2033 section 4.2: one for each recipient that was accepted.
                replies = front.accepted();
            }
        }
        self.pending.extend(std::iter::repeat_n(PendingReply::Content, replies));
        self.flush_commands(out);
    }

    /// ATRN (RFC 2645 section 5.2.1); without domains: all that the account has.
    pub fn atrn(&mut self, domains: &[Domain], out: &mut Vec<u8>) {
        self.ready = false;
        let names: Vec<_> = domains.iter().map(Domain::as_str).collect();
        let line = if names.is_empty() { "ATRN".to_owned() } else { format!("ATRN {}", names.join(",")) };
        self.queue_command(PendingReply::Atrn, line);
        self.flush_commands(out);
    }

    /// QUIT, once all is answered (RFC 5321 section 4.1.1.10).
    pub fn quit(&mut self, out: &mut Vec<u8>) {
        if !self.closing {
            self.closing = true;
            self.queue_command(PendingReply::Quit, "QUIT");
            self.flush_commands(out);
        }
    }

    /// TLS has begun: what was learned before is forgotten, EHLO is said again (RFC 3207 section 4.2).
    pub fn tls_started(&mut self, out: &mut Vec<u8>) -> ClientStep {
        self.tls = true;
        self.extensions = PeerExtensions::default();
        self.enter_ehlo(out)
    }

    /// The connection is gone: the outcomes of all messages under way, in order.
    pub fn abandon(&mut self, why: &Reply) -> Vec<DeliveryResult> {
        self.closing = true;
        self.queued.clear();
        self.pending.clear();
        let result = |transaction: ClientTransaction| {
            let open = match transaction.content {
                ContentProgress::Sent => RecipientStatus::InDoubt,
                ContentProgress::NotYet | ContentProgress::Sending => RecipientStatus::Deferred(why.clone()),
            };
            DeliveryResult { decided_by: DecidedBy::ConnectionLoss, ..transaction.result(&open) }
        };
        self.transactions.drain(..).map(result).collect()
    }

    /// One reply of the peer.
    pub fn reply(&mut self, reply: Reply, out: &mut Vec<u8>) -> Result<ClientStep, ProtocolViolation> {
        let Some(said) = self.pending.pop_front() else {
            // Also without a question a server that shuts down says 421 (RFC 5321 section 3.8).
            if ends_session(&reply) {
                self.closing = true;
                return Ok(ClientStep::Abort(Abort::Rejected(Rejection { stage: Stage::Session, reply })));
            }
            return Err(ProtocolViolation("a reply came that nobody asked for"));
        };
        if ends_session(&reply) {
            self.closing = true;
            self.queued.clear();
        }
        let step = match said {
            PendingReply::Greeting => self.greeting_replied(reply, out),
            PendingReply::Ehlo => self.ehlo_replied(reply, out),
            PendingReply::Helo => self.helo_replied(reply, out),
            PendingReply::StartTls => self.starttls_replied(reply, out),
            PendingReply::Auth => self.auth_replied(reply, out),
            PendingReply::Mail => self.mail_replied(reply),
            PendingReply::Rcpt(number) => self.rcpt_replied(number, reply, out),
            PendingReply::Data => self.data_replied(reply, out),
            PendingReply::Content => self.content_replied(reply),
            PendingReply::LoneDot => self.finish_transaction(None),
            PendingReply::Rset => ClientStep::Wait,
            PendingReply::Xclient => self.xclient_replied(reply, out),
            // Whatever it is: that the peer does not want to know is no reason to keep the mail.
            PendingReply::Xforward => self.ehlo_done(out),
            PendingReply::Atrn if reply.is_positive() => {
                self.messages_waiting = messages(&reply);
                ClientStep::Turned
            }
            PendingReply::Atrn => {
                self.ready = true;
                ClientStep::Abort(Abort::Rejected(Rejection { stage: Stage::Atrn, reply }))
            }
            PendingReply::Quit => ClientStep::Closed,
        };
        self.flush_commands(out);
        Ok(step)
    }

    // Entering a state: what is said there.

    fn enter_ehlo(&mut self, out: &mut Vec<u8>) -> ClientStep {
        // RFC 2033 section 4.1.
        let verb = if self.options.lmtp { "LHLO" } else { "EHLO" };
        self.queue_command(PendingReply::Ehlo, format!("{verb} {}", self.options.name));
        self.flush_commands(out);
        ClientStep::Wait
    }

    fn enter_auth(&mut self, out: &mut Vec<u8>) -> ClientStep {
        let Some((name, secret)) = &self.options.credentials else {
            return ClientStep::Ready;
        };
        let untried: Vec<_> =
            self.extensions.mechanisms.iter().copied().filter(|mechanism| !self.tried.contains(mechanism)).collect();
        let Some(mechanism) = Mechanism::strongest(&untried, self.tls) else {
            return self.abort(Abort::NoMechanism, out);
        };
        self.tried.push(mechanism);
        let mut exchange = mechanism.client(name, secret);
        let mut line = format!("AUTH {}", mechanism.name());
        if let Some(initial) = exchange.initial() {
            // RFC 4954 section 4: "=" stands for a response of no length.
            let initial = if initial.is_empty() { "=".to_owned() } else { data_encoding::BASE64.encode(&initial) };
            // RFC 4954 section 4: no initial response that makes the line too long.
            if line.len() + 1 + initial.len() + "\r\n".len() <= limits::SENT_COMMAND_LINE {
                line = format!("{line} {initial}");
            } else {
                exchange = mechanism.client(name, secret);
            }
        }
        self.cancelled = false;
        self.exchange = Some((mechanism, exchange));
        self.queue_command(PendingReply::Auth, line);
        self.flush_commands(out);
        ClientStep::Wait
    }

    fn abort(&mut self, abort: Abort, out: &mut Vec<u8>) -> ClientStep {
        self.quit(out);
        ClientStep::Abort(abort)
    }

    fn rejected(&mut self, stage: Stage, reply: Reply, out: &mut Vec<u8>) -> ClientStep {
        self.abort(Abort::Rejected(Rejection { stage, reply }), out)
    }

    // A reply in a state: which state is next.

    fn greeting_replied(&mut self, reply: Reply, out: &mut Vec<u8>) -> ClientStep {
        self.peer_name = first_word(&reply);
        match reply.severity() {
            Severity::Positive => self.enter_ehlo(out),
            _ => self.rejected(Stage::Greeting, reply, out),
        }
    }

    fn ehlo_replied(&mut self, reply: Reply, out: &mut Vec<u8>) -> ClientStep {
        match reply.severity() {
            Severity::Positive => {
                self.peer_name = first_word(&reply).or(self.peer_name.take());
                self.extended = true;
                self.extensions = PeerExtensions::parse(&reply);
                match self.options.starttls {
                    StartTls::Offered | StartTls::Required if !self.tls && self.extensions.starttls => {
                        self.queue_command(PendingReply::StartTls, "STARTTLS");
                        ClientStep::Wait
                    }
                    StartTls::Required if !self.tls => self.abort(Abort::NoStartTls, out),
                    _ => self.ehlo_done(out),
                }
            }
            // RFC 5321 section 3.2. Who needs TLS or AUTH has no use for a server without extensions.
            Severity::Permanent
                if self.options.starttls != StartTls::Required
                    && self.options.credentials.is_none()
                    && !self.options.lmtp =>
            {
                self.queue_command(PendingReply::Helo, format!("HELO {}", self.options.name));
                ClientStep::Wait
            }
            _ => self.rejected(Stage::Ehlo, reply, out),
        }
    }

    fn helo_replied(&mut self, reply: Reply, out: &mut Vec<u8>) -> ClientStep {
        match reply.severity() {
            Severity::Positive => self.ehlo_done(out),
            _ => self.rejected(Stage::Helo, reply, out),
        }
    }

    fn ehlo_done(&mut self, out: &mut Vec<u8>) -> ClientStep {
        if self.options.atrn && !self.extensions.atrn {
            return self.abort(Abort::NoAtrn, out);
        }
        if self.options.credentials.is_some() && !self.authenticated {
            return self.enter_auth(out);
        }
        self.ready = true;
        ClientStep::Ready
    }

    /// After XCLIENT the session begins anew, with a greeting and EHLO.
    fn xclient_replied(&mut self, reply: Reply, out: &mut Vec<u8>) -> ClientStep {
        match reply.severity() {
            Severity::Positive => {
                self.client_overridden = true;
                self.enter_ehlo(out)
            }
            _ => self.ehlo_done(out),
        }
    }

    fn starttls_replied(&mut self, reply: Reply, out: &mut Vec<u8>) -> ClientStep {
        match reply.severity() {
            Severity::Positive => ClientStep::StartTls,
            _ if self.options.starttls == StartTls::Offered => self.ehlo_done(out),
            _ => self.rejected(Stage::StartTls, reply, out),
        }
    }

    fn auth_replied(&mut self, reply: Reply, out: &mut Vec<u8>) -> ClientStep {
        let Some((_, exchange)) = &mut self.exchange else {
            return self.rejected(Stage::Auth, reply, out);
        };
        match (reply.severity(), reply.code()) {
            // It goes on after our "*": then we do not.
            (Severity::Intermediate, _) if self.cancelled => self.rejected(Stage::Auth, reply, out),
            (Severity::Intermediate, _) => {
                let text = reply.lines().next().unwrap_or_default();
                let response = data_encoding::BASE64
                    .decode(text.trim().as_bytes())
                    .ok()
                    .and_then(|challenge| exchange.step(&challenge))
                    .map(|response| data_encoding::BASE64.encode(&response));
                // RFC 4954 section 4: "*" cancels.
                self.cancelled = response.is_none();
                self.queue_command(PendingReply::Auth, response.unwrap_or_else(|| "*".to_owned()));
                ClientStep::Wait
            }
            (Severity::Positive, _) => {
                let proven = exchange.finished();
                self.exchange = None;
                if !proven {
                    return self.abort(Abort::Unproven, out);
                }
                self.authenticated = true;
                self.ehlo_done(out)
            }
            // RFC 4954 sections 4 and 6: not this mechanism, maybe another.
            (Severity::Permanent, 500..=504 | 534 | 538) => {
                self.exchange = None;
                match self.enter_auth(out) {
                    ClientStep::Abort(Abort::NoMechanism) => {
                        ClientStep::Abort(Abort::Rejected(Rejection { stage: Stage::Auth, reply }))
                    }
                    step => step,
                }
            }
            _ => {
                self.exchange = None;
                self.rejected(Stage::Auth, reply, out)
            }
        }
    }

    fn mail_replied(&mut self, reply: Reply) -> ClientStep {
        if self.transactions.front().is_some_and(|front| front.stepwise) {
            if !reply.is_positive() {
                self.transactions.clear();
            }
            return ClientStep::Replied(reply);
        }
        if reply.is_positive() {
            return ClientStep::Wait;
        }
        if let Some(front) = self.transactions.front_mut() {
            front.mail = Some(reply);
        }
        if self.drop_queued() {
            return self.finish_transaction(None);
        }
        ClientStep::Wait
    }

    fn rcpt_replied(&mut self, number: usize, reply: Reply, out: &mut Vec<u8>) -> ClientStep {
        if let Some(front) = self.transactions.front_mut()
            && let Some(slot) = front.recipients.get_mut(number)
        {
            *slot = Some(reply.clone());
            if front.stepwise {
                // One that was refused has no part in what follows.
                front.recipients.truncate(if !reply.is_positive() { number } else { number + 1 });
                return ClientStep::Replied(reply);
            }
            let all_refused =
                front.recipients.iter().all(|reply| reply.as_ref().is_some_and(|reply| !reply.is_positive()));
            if all_refused && self.drop_queued() {
                self.reset();
                return self.finish_transaction(None);
            }
        }
        self.chunk_or_wait(out)
    }

    /// With CHUNKING nothing answers DATA: the last reply to RCPT decides.
    fn chunk_or_wait(&mut self, out: &mut Vec<u8>) -> ClientStep {
        let Some(front) = self.transactions.front_mut() else {
            return ClientStep::Wait;
        };
        let Some(octets) = front.chunk.filter(|_| self.pending.is_empty() && self.queued.is_empty()) else {
            return ClientStep::Wait;
        };
        if front.mail.is_some() {
            return self.finish_transaction(None);
        }
        front.content = ContentProgress::Sending;
        out.extend_from_slice(format!("BDAT {octets} LAST\r\n").as_bytes());
        ClientStep::Content { chunk: true }
    }

    fn data_replied(&mut self, reply: Reply, out: &mut Vec<u8>) -> ClientStep {
        let Some(front) = self.transactions.front_mut() else {
            return ClientStep::Wait;
        };
        let somebody = front.mail.is_none() && front.recipients.iter().flatten().any(|reply| reply.is_positive());
        match (reply.severity(), somebody) {
            // RFC 5321 section 3.3: content is sent behind 354 only.
            (Severity::Intermediate, true) => {
                front.content = ContentProgress::Sending;
                ClientStep::Content { chunk: false }
            }
            // RFC 2920 section 3.1: the message goes to nobody, so it is empty.
            (Severity::Intermediate, false) => {
                out.extend_from_slice(b".\r\n");
                if self.options.lmtp {
                    // RFC 2033 section 4.2: as many replies as recipients, so none.
                    return self.finish_transaction(None);
                }
                self.pending.push_back(PendingReply::LoneDot);
                ClientStep::Wait
            }
            (_, somebody) => {
                self.reset();
                // 2yz is no answer to DATA.
                let odd = reply.is_positive();
                let reply = if odd { Reply::new(451, "4.5.0", "DATA was not answered with 354") } else { reply };
                self.finish_transaction(somebody.then_some(&reply))
            }
        }
    }

    fn content_replied(&mut self, reply: Reply) -> ClientStep {
        // Behind a 421 the other recipients get no reply, and no mail.
        if self.options.lmtp
            && !ends_session(&reply)
            && let Some(front) = self.transactions.front_mut()
        {
            front.content_replies.push(reply);
            return if front.content_replies.len() < front.accepted() {
                ClientStep::Wait
            } else {
                self.finish_transaction(None)
            };
        }
        self.finish_transaction(Some(&reply))
    }

    /// The message in front is done; `last` is the reply to its content, or to DATA.
    fn finish_transaction(&mut self, last: Option<&Reply>) -> ClientStep {
        let Some(transaction) = self.transactions.pop_front() else {
            return ClientStep::Wait;
        };
        let accepted = match last {
            Some(last) if transaction.content == ContentProgress::Sent => RecipientStatus::after_content(last),
            Some(last) => RecipientStatus::after_negative(last),
            None => RecipientStatus::Deferred(Reply::new(451, "4.5.0", "No reply decided on this recipient")),
        };
        ClientStep::MessageDone(transaction.result(&accepted))
    }

    /// Nothing of the message in front may stay with the peer; who goes anyway need not say so.
    fn reset(&mut self) {
        if !self.closing {
            self.queue_command(PendingReply::Rset, "RSET");
        }
    }

    /// Takes back what was lined up for the message in front and not said. `true`: nothing of it is
    /// outstanding any more either.
    fn drop_queued(&mut self) -> bool {
        self.queued.retain(|(said, _)| *said == PendingReply::Quit);
        self.pending.is_empty()
    }

    /// Why the peer cannot be given this message.
    fn incompatibility(&self, message: &OutgoingMessage) -> Option<Reply> {
        let offered = &self.extensions;
        if message.envelope.needs_utf8() && !offered.utf8 {
            // RFC 6531 section 3.2.
            return Some(no_utf8());
        }
        if message.eight_bit && !offered.eight_bit {
            // RFC 6152 section 3: whatever was declared.
            return Some(Reply::new(554, "5.6.3", "The next hop does not offer 8BITMIME"));
        }
        match offered.size {
            Some(limit) if limit > 0 && message.size > limit => {
                Some(Reply::new(552, "5.3.4", format!("The next hop takes no more than {limit} octets")))
            }
            _ => None,
        }
    }

    /// RFC 5321 section 4.1.1.3: parameters only of extensions that the peer offers.
    fn mail_line(&self, message: &OutgoingMessage) -> String {
        let mut line = format!("MAIL FROM:<{}>", message.envelope.from);
        // RFC 1870 section 6: nothing where nothing is known.
        if self.extensions.size.is_some() && message.size > 0 {
            line.push_str(&format!(" SIZE={}", message.size));
        }
        // 7-bit content is 8BITMIME content too, so what nobody declared goes as that.
        if self.extensions.eight_bit && message.envelope.body != Body::SevenBit {
            line.push_str(" BODY=8BITMIME");
        }
        if message.envelope.needs_utf8() {
            line.push_str(" SMTPUTF8");
        }
        // RFC 3461 section 5.2.1: passed on as they were given.
        if self.extensions.dsn {
            match message.envelope.ret {
                Some(Return::Full) => line.push_str(" RET=FULL"),
                Some(Return::Header) => line.push_str(" RET=HDRS"),
                None => {}
            }
            if let Some(id) = &message.envelope.envelope_id {
                line.push_str(&format!(" ENVID={id}"));
            }
        }
        // RFC 4954 section 5: what we pass on comes from somebody the peer cannot ask.
        if self.authenticated && self.extensions.auth {
            line.push_str(" AUTH=<>");
        }
        line
    }

    fn rcpt_line(&self, recipient: &Recipient) -> String {
        let mut line = format!("RCPT TO:<{}>", recipient.mailbox);
        if self.extensions.dsn {
            if let Some(notify) = recipient.notify.as_given() {
                line.push_str(&format!(" NOTIFY={notify}"));
            }
            if let Some(original) = &recipient.original {
                line.push_str(&format!(" ORCPT={original}"));
            }
        }
        line
    }

    fn queue_command(&mut self, said: PendingReply, line: impl Into<Vec<u8>>) {
        self.queued.push_back((said, line.into()));
    }

    /// Says as much of what is lined up as the peer permits now.
    fn flush_commands(&mut self, out: &mut Vec<u8>) {
        while let Some((next, line)) = self.queued.pop_front() {
            let may = match self.pending.back() {
                None => true,
                Some(last) => self.extensions.pipelining && !last.ends_group() && next != PendingReply::Quit,
            };
            if !may {
                self.queued.push_front((next, line));
                return;
            }
            out.extend_from_slice(&line);
            out.extend_from_slice(b"\r\n");
            self.pending.push_back(next);
        }
    }
}

fn first_word(reply: &Reply) -> Option<String> {
    let word = reply.lines().next()?.split_ascii_whitespace().next()?;
    Some(word.to_owned())
}

/// `12 messages`, somewhere in the text. Nothing depends on it: it is for who watches.
fn messages(reply: &Reply) -> Option<u64> {
    let words: Vec<_> = reply.lines().flat_map(str::split_ascii_whitespace).collect();
    let pair = words.windows(2).find(|pair| pair[1].starts_with("message") && pair[0].parse::<u64>().is_ok())?;
    pair[0].parse().ok()
}

fn no_utf8() -> Reply {
    Reply::new(553, "5.6.7", "The next hop does not offer SMTPUTF8")
}

/// RFC 3461 section 4: what would end a word, or looks like an escape, is `+HH`.
fn xtext(text: &str) -> String {
    let plain = |octet: u8| octet.is_ascii_graphic() && !matches!(octet, b'+' | b'=');
    let word = |octet: u8| if plain(octet) { char::from(octet).to_string() } else { format!("+{octet:02X}") };
    text.bytes().map(word).collect()
}
