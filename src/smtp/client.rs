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

use super::address::{Domain, ReversePath};
use super::command::{Body, Recipient, Return};
use super::reply::{Reply, Severity};
use crate::sasl::{ClientExchange, Mechanism};

/// A client may not use an initial response that makes the line longer (RFC 4954 section 4).
const AUTH_LINE_LIMIT: usize = 512 - 2;

/// What is to happen before mail.
#[derive(Clone, Default)]
pub struct Plan {
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

/// A message to be sent: its envelope. The content is the driver's.
#[derive(Clone, Debug)]
pub struct Message {
    pub from: ReversePath,
    pub recipients: Vec<Recipient>,
    /// Octets on the wire (RFC 1870), without dots that are added.
    pub size: u64,
    /// What its sender said of the content; `eight_bit`: what it is.
    pub body: Body,
    pub eight_bit: bool,
    /// It came with SMTPUTF8 (RFC 6531).
    pub utf8: bool,
    /// RFC 3461.
    pub ret: Option<Return>,
    pub envelope_id: Option<String>,
}

/// What became of one recipient.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The peer has said 2yz behind the content: it is the peer's now.
    Delivered(Reply),
    /// Not this time; the mail stays.
    Deferred(Reply),
    /// Never, by a 5yz.
    Refused(Reply),
    /// All content was sent and no reply seen (RFC 1047): neither delivered nor failed.
    InDoubt,
}

/// What became of a message, a fate for each of its recipients, in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub fates: Vec<Fate>,
    pub decided: Decided,
}

/// What the fates of a message go back to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decided {
    /// The peer, recipient by recipient or for the content.
    ByPeer,
    /// The peer, with its refusal of MAIL: it may be no place for this mail at all.
    AtMail,
    /// We, before a word was said of it.
    ByUs,
    /// The connection was lost, which says nothing of the mail.
    ByLoss,
}

/// Why a conversation goes no further. QUIT has been lined up where it can be said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Halt {
    /// The peer refused something we cannot do without.
    Refused { what: &'static str, reply: Reply },
    /// The peer offers no STARTTLS, and we must have it (RFC 3207 section 6).
    NoStartTls,
    /// The peer offers no ATRN: it is no provider (RFC 2645 section 5.1.1).
    NoAtrn,
    /// The peer offers no mechanism that may be used here.
    NoMechanism,
    /// The peer said 235 and did not prove that it knows the secret.
    Unproven,
}

/// The peer breaks the protocol; there is nothing to be said to it any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken(pub &'static str);

/// What a reply led to.
#[derive(Debug)]
pub enum Step {
    /// Send what was lined up, wait for the next reply.
    Wait,
    /// Start TLS as TLS client, then call [`Client::secured`].
    StartTls,
    /// Nothing stands in the way of mail, ATRN or QUIT.
    Ready,
    /// The reply to what was asked with [`Client::ask_mail`] or [`Client::ask_recipient`].
    Answered(Reply),
    /// Send the content of the message in front, then call [`Client::content_sent`]; `chunk`: as it is,
    /// without dots and end, exactly as many octets as the message's size (RFC 3030).
    Content {
        chunk: bool,
    },
    /// The message in front is done with.
    Settled(Outcome),
    /// ATRN was answered 250: from here on turn.rs.
    Turned,
    Halt(Halt),
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

/// What the peer offered with its last EHLO; nothing of it outlives TLS or the turn.
#[derive(Clone, Debug, Default)]
pub struct Offered {
    pub pipelining: bool,
    /// `Some(0)`: offered without a limit (RFC 1870 section 4).
    pub size: Option<u64>,
    pub eight_bit: bool,
    pub utf8: bool,
    pub chunking: bool,
    pub dsn: bool,
    pub starttls: bool,
    pub atrn: bool,
    pub auth: bool,
    pub mechanisms: Vec<Mechanism>,
    /// The attributes that XCLIENT or XFORWARD may carry.
    pub xclient: Vec<String>,
    pub xforward: Vec<String>,
}

/// Who gave a message to the host that gave it to us, for the filters of the next hop (XCLIENT and XFORWARD, as
/// Postfix documents them).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// As the commands want it: `192.0.2.1`, `IPV6:2001:db8::1`.
    pub address: String,
    /// The name it gave with EHLO or HELO.
    pub helo: Option<String>,
    /// That was EHLO.
    pub extended: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Said {
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

impl Said {
    /// RFC 2920 section 3.1: RSET, MAIL and RCPT may stand anywhere in a group, content too; everything
    /// else only at its end.
    fn ends_group(&self) -> bool {
        !matches!(self, Said::Rset | Said::Mail | Said::Rcpt(_) | Said::Content | Said::LoneDot)
    }

    fn awaiting(&self) -> Awaiting {
        match self {
            Said::Greeting => Awaiting::Greeting,
            Said::Mail => Awaiting::Mail,
            Said::Rcpt(_) => Awaiting::Recipient,
            Said::Data => Awaiting::Data,
            Said::Content | Said::LoneDot => Awaiting::End,
            Said::Atrn => Awaiting::Atrn,
            Said::Ehlo | Said::Helo | Said::StartTls | Said::Auth => Awaiting::Command,
            Said::Xclient | Said::Xforward | Said::Rset | Said::Quit => Awaiting::Command,
        }
    }
}

/// One message under way.
struct Transaction {
    /// The reply to MAIL, if it was a refusal.
    mail: Option<Reply>,
    /// The replies to RCPT.
    recipients: Vec<Option<Reply>>,
    /// The replies to the content, by recipient that was accepted; SMTP has one for all.
    finals: Vec<Reply>,
    /// Its recipients are asked for one by one.
    asking: bool,
    content: Progress,
    /// The content goes as one chunk of so many octets.
    chunk: Option<u64>,
}

impl Transaction {
    /// A refusal of MAIL is for all, one of RCPT for that recipient; `accepted` is the fate of the others.
    fn outcome(&self, accepted: &Fate) -> Outcome {
        let mut finals = self.finals.iter();
        let fate = |recipient: &Option<Reply>| match (&self.mail, recipient) {
            (Some(mail), _) => fate_of(mail),
            // RFC 5321 section 4.5.3.1.10: 552 to RCPT means too many, for now.
            (None, Some(reply)) if reply.code() == 552 => Fate::Deferred(reply.clone()),
            (None, Some(reply)) if refuses(reply) => fate_of(reply),
            (None, _) => finals.next().map_or_else(|| accepted.clone(), verdict),
        };
        let decided = if self.mail.is_some() { Decided::AtMail } else { Decided::ByPeer };
        Outcome { fates: self.recipients.iter().map(fate).collect(), decided }
    }

    fn accepted(&self) -> usize {
        let taken = |reply: &&Option<Reply>| reply.as_ref().is_some_and(|reply| !refuses(reply));
        self.recipients.iter().filter(taken).count()
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    NotYet,
    Sending,
    Sent,
}

/// The client role on one connection.
pub struct Client {
    plan: Plan,
    offered: Offered,
    tls: bool,
    exchange: Option<(Mechanism, Box<dyn ClientExchange>)>,
    tried: Vec<Mechanism>,
    authenticated: bool,
    /// "*" was said.
    cancelled: bool,
    /// The name in the peer's greeting or EHLO reply.
    peer_name: Option<String>,
    to_say: VecDeque<(Said, Vec<u8>)>,
    outstanding: VecDeque<Said>,
    transactions: VecDeque<Transaction>,
    ready: bool,
    /// EHLO was answered, not HELO.
    extended: bool,
    /// How many messages wait for us, by the reply to ATRN.
    waiting: Option<u64>,
    /// XCLIENT was said: the peer takes us for somebody else, for the rest of the session.
    disguised: bool,
    /// No mail is sent any more: QUIT was lined up, or the peer said 421.
    closing: bool,
}

impl Client {
    /// A client that waits for the greeting (RFC 5321 section 4.3.1).
    pub fn new(plan: Plan) -> Client {
        let tls = plan.tls;
        Client {
            plan,
            offered: Offered::default(),
            tls,
            exchange: None,
            tried: Vec::new(),
            authenticated: false,
            cancelled: false,
            peer_name: None,
            to_say: VecDeque::new(),
            outstanding: VecDeque::from([Said::Greeting]),
            transactions: VecDeque::new(),
            ready: false,
            extended: false,
            waiting: None,
            disguised: false,
            closing: false,
        }
    }

    /// What the peer offers.
    pub fn offered(&self) -> &Offered {
        &self.offered
    }

    /// Our own name, as EHLO says it.
    pub fn name(&self) -> &str {
        &self.plan.name
    }

    pub fn peer_name(&self) -> Option<&str> {
        self.peer_name.as_deref()
    }

    /// How many messages the provider has for us, if its reply to ATRN says so.
    pub fn waiting(&self) -> Option<u64> {
        self.waiting
    }

    /// Whether the peer takes us for the origin of a message, and so of all that follow.
    pub fn is_disguised(&self) -> bool {
        self.disguised
    }

    /// What the next reply is the answer to; `None`: nothing is outstanding.
    pub fn awaiting(&self) -> Option<Awaiting> {
        self.outstanding.front().map(Said::awaiting)
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
    pub fn wants_message(&self) -> bool {
        self.ready
            && !self.closing
            && match self.transactions.front() {
                None => true,
                Some(front) => {
                    self.offered.pipelining && front.content == Progress::Sent && self.transactions.len() == 1
                }
            }
    }

    /// Takes the next message. `Err`: it cannot go to this peer at all, and nothing was said of it.
    pub fn send(&mut self, message: Message, out: &mut Vec<u8>) -> Result<(), Outcome> {
        if let Some(reply) = self.unfit(&message) {
            // Who does not even know EHLO today may know it tomorrow.
            let fate = if self.extended { Fate::Refused(reply) } else { Fate::Deferred(reply) };
            return Err(Outcome { fates: vec![fate; message.recipients.len()], decided: Decided::ByUs });
        }
        self.line_up(Said::Mail, self.mail_line(&message));
        for (number, recipient) in message.recipients.iter().enumerate() {
            self.line_up(Said::Rcpt(number), self.rcpt_line(recipient));
        }
        let chunk = (self.plan.chunking && self.offered.chunking).then_some(message.size);
        if chunk.is_none() {
            self.line_up(Said::Data, "DATA");
        }
        let recipients = vec![None; message.recipients.len()];
        self.begin(recipients, chunk, false);
        self.say(out);
        Ok(())
    }

    fn begin(&mut self, recipients: Vec<Option<Reply>>, chunk: Option<u64>, asking: bool) {
        let content = Progress::NotYet;
        self.transactions.push_back(Transaction { mail: None, recipients, finals: Vec::new(), asking, content, chunk });
    }

    /// Opens a transaction whose recipients are not known yet, and whose content is not: nothing else is under way.
    pub fn ask_mail(&mut self, message: &Message, out: &mut Vec<u8>) -> Result<(), Reply> {
        if let Some(reply) = self.unfit(message) {
            // Who does not even know EHLO today may know it tomorrow.
            let later = || Reply::new(451, "4.3.5", "The next hop offers no extensions now");
            return Err(if self.extended { reply } else { later() });
        }
        self.line_up(Said::Mail, self.mail_line(message));
        self.begin(Vec::new(), None, true);
        self.say(out);
        Ok(())
    }

    /// One recipient more of the transaction that [`Client::ask_mail`] has opened.
    pub fn ask_recipient(&mut self, recipient: &Recipient, out: &mut Vec<u8>) -> Result<(), Reply> {
        let line = self.rcpt_line(recipient);
        let Some(asked) = self.transactions.front_mut().filter(|front| front.asking) else {
            return Err(Reply::new(451, "4.5.0", "No transaction is open"));
        };
        if !recipient.mailbox.is_ascii() && !self.offered.utf8 {
            // RFC 6531 section 3.2.
            return Err(no_utf8());
        }
        let number = asked.recipients.len();
        asked.recipients.push(None);
        self.line_up(Said::Rcpt(number), line);
        self.say(out);
        Ok(())
    }

    /// All recipients have been asked for: on with the content, of so many octets.
    pub fn proceed(&mut self, size: u64, out: &mut Vec<u8>) -> Step {
        let chunk = (self.plan.chunking && self.offered.chunking).then_some(size);
        if let Some(asked) = self.transactions.front_mut() {
            (asked.asking, asked.chunk) = (false, chunk);
        }
        if chunk.is_none() {
            self.line_up(Said::Data, "DATA");
            self.say(out);
        }
        self.chunk_or_wait(out)
    }

    /// Lets the transaction go that [`Client::ask_mail`] has opened.
    pub fn withdraw(&mut self, out: &mut Vec<u8>) {
        if self.transactions.front().is_some_and(|front| front.asking) {
            self.transactions.pop_front();
            self.reset();
            self.say(out);
        }
    }

    /// Says who gave the next message to the host that gave it to us, where the peer wants to know. `true`: wait for
    /// [`Step::Ready`].
    pub fn tell_origin(&mut self, origin: &Origin, out: &mut Vec<u8>) -> bool {
        let attributes = |wanted: &[String]| -> String {
            let value = |name: &String| match name.as_str() {
                "ADDR" => Some(origin.address.clone()),
                // The name that DNS gives the address is not known here, and EHLO's may be a lie.
                "NAME" => Some("[UNAVAILABLE]".to_owned()),
                "HELO" => Some(origin.helo.as_deref().map_or("[UNAVAILABLE]".to_owned(), xtext)),
                "PROTO" => Some(if origin.extended { "ESMTP" } else { "SMTP" }.to_owned()),
                "SOURCE" => Some("REMOTE".to_owned()),
                _ => None,
            };
            wanted.iter().filter_map(|name| Some(format!(" {name}={}", value(name)?))).collect()
        };
        let (said, line) = if !self.offered.xclient.is_empty() {
            (Said::Xclient, format!("XCLIENT{}", attributes(&self.offered.xclient)))
        } else if !self.offered.xforward.is_empty() {
            (Said::Xforward, format!("XFORWARD{}", attributes(&self.offered.xforward)))
        } else {
            return false;
        };
        if !line.contains(" ADDR=") {
            return false;
        }
        self.ready = false;
        self.line_up(said, line);
        self.say(out);
        true
    }

    /// The content of the message in front went into the write buffer, with its end.
    pub fn content_sent(&mut self, out: &mut Vec<u8>) {
        let mut replies = 1;
        if let Some(front) = self.transactions.front_mut() {
            front.content = Progress::Sent;
            if self.plan.lmtp {
                // RFC 2033 section 4.2: one for each recipient that was accepted.
                replies = front.accepted();
            }
        }
        self.outstanding.extend(std::iter::repeat_n(Said::Content, replies));
        self.say(out);
    }

    /// ATRN (RFC 2645 section 5.2.1); without domains: all that the account has.
    pub fn atrn(&mut self, domains: &[Domain], out: &mut Vec<u8>) {
        self.ready = false;
        let names: Vec<_> = domains.iter().map(Domain::as_str).collect();
        let line = if names.is_empty() { "ATRN".to_owned() } else { format!("ATRN {}", names.join(",")) };
        self.line_up(Said::Atrn, line);
        self.say(out);
    }

    /// QUIT, once all is answered (RFC 5321 section 4.1.1.10).
    pub fn quit(&mut self, out: &mut Vec<u8>) {
        if !self.closing {
            self.closing = true;
            self.line_up(Said::Quit, "QUIT");
            self.say(out);
        }
    }

    /// TLS has begun: what was learned before is forgotten, EHLO is said again (RFC 3207 section 4.2).
    pub fn secured(&mut self, out: &mut Vec<u8>) -> Step {
        self.tls = true;
        self.offered = Offered::default();
        self.enter_ehlo(out)
    }

    /// The connection is gone: the outcomes of all messages under way, in order.
    pub fn abandon(&mut self, why: &Reply) -> Vec<Outcome> {
        self.closing = true;
        self.to_say.clear();
        self.outstanding.clear();
        let outcome = |transaction: Transaction| {
            let open = match transaction.content {
                Progress::Sent => Fate::InDoubt,
                Progress::NotYet | Progress::Sending => Fate::Deferred(why.clone()),
            };
            Outcome { decided: Decided::ByLoss, ..transaction.outcome(&open) }
        };
        self.transactions.drain(..).map(outcome).collect()
    }

    /// One reply of the peer.
    pub fn reply(&mut self, reply: Reply, out: &mut Vec<u8>) -> Result<Step, Broken> {
        let Some(said) = self.outstanding.pop_front() else {
            // Also without a question a server that shuts down says 421 (RFC 5321 section 3.8).
            if reply.code() == 421 {
                self.closing = true;
                return Ok(Step::Halt(Halt::Refused { what: "the session", reply }));
            }
            return Err(Broken("a reply came that nobody asked for"));
        };
        if reply.code() == 421 {
            self.closing = true;
            self.to_say.clear();
        }
        let step = match said {
            Said::Greeting => self.greeted(reply, out),
            Said::Ehlo => self.ehlo_answered(reply, out),
            Said::Helo => self.helo_answered(reply, out),
            Said::StartTls => self.starttls_answered(reply, out),
            Said::Auth => self.auth_answered(reply, out),
            Said::Mail => self.mail_answered(reply),
            Said::Rcpt(number) => self.rcpt_answered(number, reply, out),
            Said::Data => self.data_answered(reply, out),
            Said::Content => self.content_answered(reply),
            Said::LoneDot => self.settle(None),
            Said::Rset => Step::Wait,
            Said::Xclient => self.xclient_answered(reply, out),
            // Whatever it is: that the peer does not want to know is no reason to keep the mail.
            Said::Xforward => self.introduced(out),
            Said::Atrn if reply.is_positive() => {
                self.waiting = messages(&reply);
                Step::Turned
            }
            Said::Atrn => {
                self.ready = true;
                Step::Halt(Halt::Refused { what: "ATRN", reply })
            }
            Said::Quit => Step::Closed,
        };
        self.say(out);
        Ok(step)
    }

    // Entering a state: what is said there.

    fn enter_ehlo(&mut self, out: &mut Vec<u8>) -> Step {
        // RFC 2033 section 4.1.
        let verb = if self.plan.lmtp { "LHLO" } else { "EHLO" };
        self.line_up(Said::Ehlo, format!("{verb} {}", self.plan.name));
        self.say(out);
        Step::Wait
    }

    fn enter_auth(&mut self, out: &mut Vec<u8>) -> Step {
        let Some((name, secret)) = &self.plan.credentials else {
            return Step::Ready;
        };
        let untried: Vec<_> =
            self.offered.mechanisms.iter().copied().filter(|mechanism| !self.tried.contains(mechanism)).collect();
        let Some(mechanism) = Mechanism::strongest(&untried, self.tls) else {
            return self.halt(Halt::NoMechanism, out);
        };
        self.tried.push(mechanism);
        let mut exchange = mechanism.client(name, secret);
        let mut line = format!("AUTH {}", mechanism.name());
        if let Some(initial) = exchange.initial() {
            // RFC 4954 section 4: "=" stands for a response of no length.
            let initial = if initial.is_empty() { "=".to_owned() } else { data_encoding::BASE64.encode(&initial) };
            if line.len() + 1 + initial.len() <= AUTH_LINE_LIMIT {
                line = format!("{line} {initial}");
            } else {
                exchange = mechanism.client(name, secret);
            }
        }
        self.cancelled = false;
        self.exchange = Some((mechanism, exchange));
        self.line_up(Said::Auth, line);
        self.say(out);
        Step::Wait
    }

    fn halt(&mut self, halt: Halt, out: &mut Vec<u8>) -> Step {
        self.quit(out);
        Step::Halt(halt)
    }

    fn refused(&mut self, what: &'static str, reply: Reply, out: &mut Vec<u8>) -> Step {
        self.halt(Halt::Refused { what, reply }, out)
    }

    // A reply in a state: which state is next.

    fn greeted(&mut self, reply: Reply, out: &mut Vec<u8>) -> Step {
        self.peer_name = first_word(&reply);
        match reply.severity() {
            Severity::Positive => self.enter_ehlo(out),
            _ => self.refused("the greeting", reply, out),
        }
    }

    fn ehlo_answered(&mut self, reply: Reply, out: &mut Vec<u8>) -> Step {
        match reply.severity() {
            Severity::Positive => {
                self.peer_name = first_word(&reply).or(self.peer_name.take());
                self.extended = true;
                self.offered = Offered::read(&reply);
                match self.plan.starttls {
                    StartTls::Offered | StartTls::Required if !self.tls && self.offered.starttls => {
                        self.line_up(Said::StartTls, "STARTTLS");
                        Step::Wait
                    }
                    StartTls::Required if !self.tls => self.halt(Halt::NoStartTls, out),
                    _ => self.introduced(out),
                }
            }
            // RFC 5321 section 3.2. Who needs TLS or AUTH has no use for a server without extensions.
            Severity::Permanent
                if self.plan.starttls != StartTls::Required && self.plan.credentials.is_none() && !self.plan.lmtp =>
            {
                self.line_up(Said::Helo, format!("HELO {}", self.plan.name));
                Step::Wait
            }
            _ => self.refused("EHLO", reply, out),
        }
    }

    fn helo_answered(&mut self, reply: Reply, out: &mut Vec<u8>) -> Step {
        match reply.severity() {
            Severity::Positive => self.introduced(out),
            _ => self.refused("HELO", reply, out),
        }
    }

    fn introduced(&mut self, out: &mut Vec<u8>) -> Step {
        if self.plan.atrn && !self.offered.atrn {
            return self.halt(Halt::NoAtrn, out);
        }
        if self.plan.credentials.is_some() && !self.authenticated {
            return self.enter_auth(out);
        }
        self.ready = true;
        Step::Ready
    }

    /// After XCLIENT the session begins anew, with a greeting and EHLO.
    fn xclient_answered(&mut self, reply: Reply, out: &mut Vec<u8>) -> Step {
        match reply.severity() {
            Severity::Positive => {
                self.disguised = true;
                self.enter_ehlo(out)
            }
            _ => self.introduced(out),
        }
    }

    fn starttls_answered(&mut self, reply: Reply, out: &mut Vec<u8>) -> Step {
        match reply.severity() {
            Severity::Positive => Step::StartTls,
            _ if self.plan.starttls == StartTls::Offered => self.introduced(out),
            _ => self.refused("STARTTLS", reply, out),
        }
    }

    fn auth_answered(&mut self, reply: Reply, out: &mut Vec<u8>) -> Step {
        let Some((_, exchange)) = &mut self.exchange else {
            return self.refused("AUTH", reply, out);
        };
        match (reply.severity(), reply.code()) {
            // It goes on after our "*": then we do not.
            (Severity::Intermediate, _) if self.cancelled => self.refused("AUTH", reply, out),
            (Severity::Intermediate, _) => {
                let text = reply.lines().next().unwrap_or_default();
                let response = data_encoding::BASE64
                    .decode(text.trim().as_bytes())
                    .ok()
                    .and_then(|challenge| exchange.step(&challenge))
                    .map(|response| data_encoding::BASE64.encode(&response));
                // RFC 4954 section 4: "*" cancels.
                self.cancelled = response.is_none();
                self.line_up(Said::Auth, response.unwrap_or_else(|| "*".to_owned()));
                Step::Wait
            }
            (Severity::Positive, _) => {
                let proven = exchange.finished();
                self.exchange = None;
                if !proven {
                    return self.halt(Halt::Unproven, out);
                }
                self.authenticated = true;
                self.introduced(out)
            }
            // RFC 4954 sections 4 and 6: not this mechanism, maybe another.
            (Severity::Permanent, 500..=504 | 534 | 538) => {
                self.exchange = None;
                match self.enter_auth(out) {
                    Step::Halt(Halt::NoMechanism) => Step::Halt(Halt::Refused { what: "AUTH", reply }),
                    step => step,
                }
            }
            _ => {
                self.exchange = None;
                self.refused("AUTH", reply, out)
            }
        }
    }

    fn mail_answered(&mut self, reply: Reply) -> Step {
        if self.transactions.front().is_some_and(|front| front.asking) {
            if !reply.is_positive() {
                self.transactions.clear();
            }
            return Step::Answered(reply);
        }
        if reply.is_positive() {
            return Step::Wait;
        }
        if let Some(front) = self.transactions.front_mut() {
            front.mail = Some(reply);
        }
        if self.forget_unsaid() {
            return self.settle(None);
        }
        Step::Wait
    }

    fn rcpt_answered(&mut self, number: usize, reply: Reply, out: &mut Vec<u8>) -> Step {
        if let Some(front) = self.transactions.front_mut()
            && let Some(slot) = front.recipients.get_mut(number)
        {
            *slot = Some(reply.clone());
            if front.asking {
                // One that was refused has no part in what follows.
                front.recipients.truncate(if refuses(&reply) { number } else { number + 1 });
                return Step::Answered(reply);
            }
            let all_refused = front.recipients.iter().all(|reply| reply.as_ref().is_some_and(refuses));
            if all_refused && self.forget_unsaid() {
                self.reset();
                return self.settle(None);
            }
        }
        self.chunk_or_wait(out)
    }

    /// With CHUNKING nothing answers DATA: the last reply to RCPT decides.
    fn chunk_or_wait(&mut self, out: &mut Vec<u8>) -> Step {
        let Some(front) = self.transactions.front_mut() else {
            return Step::Wait;
        };
        let Some(octets) = front.chunk.filter(|_| self.outstanding.is_empty() && self.to_say.is_empty()) else {
            return Step::Wait;
        };
        if front.mail.is_some() {
            return self.settle(None);
        }
        front.content = Progress::Sending;
        out.extend_from_slice(format!("BDAT {octets} LAST\r\n").as_bytes());
        Step::Content { chunk: true }
    }

    fn data_answered(&mut self, reply: Reply, out: &mut Vec<u8>) -> Step {
        let Some(front) = self.transactions.front_mut() else {
            return Step::Wait;
        };
        let somebody = front.mail.is_none() && front.recipients.iter().flatten().any(|reply| !refuses(reply));
        match (reply.severity(), somebody) {
            // RFC 5321 section 3.3: content is sent behind 354 only.
            (Severity::Intermediate, true) => {
                front.content = Progress::Sending;
                Step::Content { chunk: false }
            }
            // RFC 2920 section 3.1: the message goes to nobody, so it is empty.
            (Severity::Intermediate, false) => {
                out.extend_from_slice(b".\r\n");
                if self.plan.lmtp {
                    // RFC 2033 section 4.2: as many replies as recipients, so none.
                    return self.settle(None);
                }
                self.outstanding.push_back(Said::LoneDot);
                Step::Wait
            }
            (_, somebody) => {
                self.reset();
                // 2yz is no answer to DATA.
                let odd = reply.is_positive();
                let reply = if odd { Reply::new(451, "4.5.0", "DATA was not answered with 354") } else { reply };
                self.settle(somebody.then_some(&reply))
            }
        }
    }

    fn content_answered(&mut self, reply: Reply) -> Step {
        // Behind a 421 the other recipients get no reply, and no mail.
        if self.plan.lmtp
            && reply.code() != 421
            && let Some(front) = self.transactions.front_mut()
        {
            front.finals.push(reply);
            return if front.finals.len() < front.accepted() { Step::Wait } else { self.settle(None) };
        }
        self.settle(Some(&reply))
    }

    /// The message in front is done; `last` is the reply to its content, or to DATA.
    fn settle(&mut self, last: Option<&Reply>) -> Step {
        let Some(transaction) = self.transactions.pop_front() else {
            return Step::Wait;
        };
        let accepted = match last {
            Some(last) if transaction.content == Progress::Sent => verdict(last),
            Some(last) => fate_of(last),
            None => Fate::Deferred(Reply::new(451, "4.5.0", "No reply decided on this recipient")),
        };
        Step::Settled(transaction.outcome(&accepted))
    }

    /// Nothing of the message in front may stay with the peer; who goes anyway need not say so.
    fn reset(&mut self) {
        if !self.closing {
            self.line_up(Said::Rset, "RSET");
        }
    }

    /// Takes back what was lined up for the message in front and not said. `true`: nothing of it is
    /// outstanding any more either.
    fn forget_unsaid(&mut self) -> bool {
        self.to_say.retain(|(said, _)| *said == Said::Quit);
        self.outstanding.is_empty()
    }

    /// Why the peer cannot be given this message.
    fn unfit(&self, message: &Message) -> Option<Reply> {
        let offered = &self.offered;
        if needs_utf8(message) && !offered.utf8 {
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
    fn mail_line(&self, message: &Message) -> String {
        let mut line = format!("MAIL FROM:<{}>", message.from);
        // RFC 1870 section 6: nothing where nothing is known.
        if self.offered.size.is_some() && message.size > 0 {
            line.push_str(&format!(" SIZE={}", message.size));
        }
        // 7-bit content is 8BITMIME content too, so what nobody declared goes as that.
        if self.offered.eight_bit && message.body != Body::SevenBit {
            line.push_str(" BODY=8BITMIME");
        }
        if needs_utf8(message) {
            line.push_str(" SMTPUTF8");
        }
        // RFC 3461 section 5.2.1: passed on as they were given.
        if self.offered.dsn {
            match message.ret {
                Some(Return::Full) => line.push_str(" RET=FULL"),
                Some(Return::Header) => line.push_str(" RET=HDRS"),
                None => {}
            }
            if let Some(id) = &message.envelope_id {
                line.push_str(&format!(" ENVID={id}"));
            }
        }
        // RFC 4954 section 5: what we pass on comes from somebody the peer cannot ask.
        if self.authenticated && self.offered.auth {
            line.push_str(" AUTH=<>");
        }
        line
    }

    fn rcpt_line(&self, recipient: &Recipient) -> String {
        let mut line = format!("RCPT TO:<{}>", recipient.mailbox);
        if self.offered.dsn {
            if let Some(notify) = recipient.notify.said() {
                line.push_str(&format!(" NOTIFY={notify}"));
            }
            if let Some(original) = &recipient.original {
                line.push_str(&format!(" ORCPT={original}"));
            }
        }
        line
    }

    fn line_up(&mut self, said: Said, line: impl Into<Vec<u8>>) {
        self.to_say.push_back((said, line.into()));
    }

    /// Says as much of what is lined up as the peer permits now.
    fn say(&mut self, out: &mut Vec<u8>) {
        while let Some((next, line)) = self.to_say.pop_front() {
            let may = match self.outstanding.back() {
                None => true,
                Some(last) => self.offered.pipelining && !last.ends_group() && next != Said::Quit,
            };
            if !may {
                self.to_say.push_front((next, line));
                return;
            }
            out.extend_from_slice(&line);
            out.extend_from_slice(b"\r\n");
            self.outstanding.push_back(next);
        }
    }
}

impl Offered {
    /// Reads the lines of an EHLO reply; what is not known is passed over.
    fn read(reply: &Reply) -> Offered {
        let mut offered = Offered::default();
        for line in reply.lines().skip(1) {
            let mut words = line.split_ascii_whitespace();
            match words.next().map(str::to_ascii_uppercase).as_deref() {
                Some("PIPELINING") => offered.pipelining = true,
                Some("SIZE") => {
                    offered.size = Some(words.next().and_then(|number| number.parse().ok()).unwrap_or(0));
                }
                Some("8BITMIME") => offered.eight_bit = true,
                Some("SMTPUTF8") => offered.utf8 = true,
                Some("CHUNKING") => offered.chunking = true,
                Some("DSN") => offered.dsn = true,
                Some("STARTTLS") => offered.starttls = true,
                Some("ATRN") => offered.atrn = true,
                Some("XCLIENT") => offered.xclient = words.map(str::to_ascii_uppercase).collect(),
                Some("XFORWARD") => offered.xforward = words.map(str::to_ascii_uppercase).collect(),
                Some("AUTH") => {
                    offered.auth = true;
                    offered.mechanisms.extend(words.filter_map(|word| Mechanism::parse(word.as_bytes())));
                }
                _ => {}
            }
        }
        offered
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

fn needs_utf8(message: &Message) -> bool {
    message.utf8 || !message.from.is_ascii() || message.recipients.iter().any(|recipient| !recipient.mailbox.is_ascii())
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

/// What a reply to the content means.
fn verdict(reply: &Reply) -> Fate {
    if reply.is_positive() { Fate::Delivered(reply.clone()) } else { fate_of(reply) }
}

fn refuses(reply: &Reply) -> bool {
    !reply.is_positive()
}

fn fate_of(refusal: &Reply) -> Fate {
    match refusal.severity() {
        Severity::Permanent => Fate::Refused(refusal.clone()),
        _ => Fate::Deferred(refusal.clone()),
    }
}
