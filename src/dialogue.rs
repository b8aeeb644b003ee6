//! One SMTP client session over one wire, for a thread that has nothing else to do.
//!
//! The driver of [`Client`] where waiting is allowed: the customer before the turn, submission, the relay.
//! (After the turn the provider's client is driven by `provider/delivery`, which never waits for one peer.)
//! Replies are read while content is being written, so two peers that talk at once do not block each other.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Read};
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::config::{self, Timeouts, TlsMode};
use crate::queue::{Batch, Hold};
use crate::smtp::address::Domain;
use crate::smtp::client::{Awaiting, Client, Decided, Fate, Halt, Message, Origin, Outcome, Plan, StartTls, Step};
use crate::smtp::command::Recipient;
use crate::smtp::content::{Liner, Stuffer};
use crate::smtp::reply::{Reply, ReplyReader};
use crate::tls::{self, ClientSide, Trust};
use crate::wire::{self, Filled, Line, Stop, Trace, Wire, Woken};

/// A reply line may be longer than RFC 5321 section 4.5.3.1.5 says, but not endless.
pub const REPLY_LINE_LIMIT: usize = 8 * 1024;

/// Content is read and sent in pieces of so many octets.
const BLOCK: usize = 32 * 1024;

/// So many messages refused at MAIL one after the other, and no more are tried.
const REFUSALS: usize = 3;

/// How long the reply to QUIT is waited for.
const FAREWELL: Duration = Duration::from_secs(5);

/// Why a session cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The peer refuses what we cannot do without.
    Halted(Halt),
    /// The peer, or its TLS, is not what it should be.
    Broken(String),
    /// The connection was lost, or too slow, in the handshake of TLS.
    NoTls(String),
    /// The connection is gone, or too slow.
    Lost(String),
    /// We were told to stop.
    Stopped,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Halted(Halt::Refused { what, reply }) => write!(f, "{what} was refused: {reply}"),
            Failure::Halted(Halt::NoAtrn) => f.write_str("ATRN was not offered"),
            Failure::Halted(Halt::NoStartTls) => f.write_str("STARTTLS is required and was not offered"),
            Failure::Halted(Halt::NoMechanism) => {
                f.write_str("no authentication was offered that can be used: CRAM-MD5, or PLAIN under TLS")
            }
            Failure::Halted(Halt::Unproven) => f.write_str("the peer did not prove that it knows the secret"),
            Failure::Broken(text) | Failure::NoTls(text) | Failure::Lost(text) => f.write_str(text),
            Failure::Stopped => f.write_str("stopped"),
        }
    }
}

fn lost(error: io::Error) -> Failure {
    Failure::Lost(format!("the connection was lost: {error}"))
}

/// What becomes of a message is decided outside.
pub type Settle<'a> = dyn FnMut(Batch, Outcome, &Client, &mut Hold) + 'a;

/// A session.
pub struct Dialogue {
    wire: Wire,
    client: Client,
    replies: ReplyReader,
    timeouts: Timeouts,
    stop: Stop,
    /// Whatever is waited for, not longer than this.
    limit: Option<Instant>,
    /// We were told to stop behind a message's content: so long its reply is waited for.
    grace: Option<(Instant, Stop)>,
}

impl Dialogue {
    pub fn new(wire: Wire, plan: Plan, timeouts: &Timeouts, stop: &Stop) -> Dialogue {
        Dialogue {
            wire,
            client: Client::new(plan),
            replies: ReplyReader::default(),
            timeouts: timeouts.clone(),
            stop: stop.clone(),
            limit: None,
            grace: None,
        }
    }

    /// From now on nothing is waited for beyond this moment.
    pub fn limit(&mut self, limit: Option<Instant>) {
        self.limit = limit;
    }

    /// The end of a wait that begins now.
    fn within(&self, patience: Duration) -> Instant {
        let end = Instant::now() + patience;
        self.limit.map_or(end, |limit| limit.min(end))
    }

    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Begins TLS; `name`: what the peer's certificate must be for.
    pub fn begin_tls(&mut self, side: &ClientSide, name: &str) -> Result<(), Failure> {
        let deadline = self.within(self.timeouts.handshake);
        self.wire.start_tls_client(side, name, deadline).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => Failure::Broken(error.to_string()),
            _ => Failure::NoTls(format!("TLS did not come about: {error}")),
        })?;
        self.wire.trace.event("tls");
        Ok(())
    }

    /// Greeting, EHLO, TLS and AUTH: up to where mail or ATRN may be said.
    pub fn introduce(&mut self, tls: Option<(&ClientSide, &str)>) -> Result<(), Failure> {
        loop {
            match self.next()? {
                Step::Ready => return Ok(()),
                Step::StartTls => {
                    let Some((side, name)) = tls else {
                        return Err(Failure::Broken("TLS is not configured".to_owned()));
                    };
                    self.begin_tls(side, name)?;
                    let mut said = Vec::new();
                    self.client.secured(&mut said);
                    self.say(&said);
                }
                _ => {}
            }
        }
    }

    /// Sends all that the hold offers; every message is given to `settle`, whatever happens.
    pub fn deliver(&mut self, hold: &mut Hold, settle: &mut Settle<'_>) -> Result<(), Failure> {
        let mut under_way = VecDeque::new();
        let delivered = self.deliver_each(hold, &mut under_way, settle);
        if let Err(failure) = &delivered {
            let why = Reply::new(451, "4.4.2", failure.to_string());
            for (batch, outcome) in under_way.into_iter().zip(self.client.abandon(&why)) {
                settle(batch, outcome, &self.client, hold);
            }
        }
        delivered
    }

    fn deliver_each(
        &mut self,
        hold: &mut Hold,
        under_way: &mut VecDeque<Batch>,
        settle: &mut Settle<'_>,
    ) -> Result<(), Failure> {
        let (mut more, mut refusals) = (true, 0);
        loop {
            while more && self.client.wants_message() && !self.stop.stopped() {
                let Some(batch) = hold.offer() else {
                    more = false;
                    break;
                };
                if let Err(failure) = self.expect_silence() {
                    let fates = vec![
                        Fate::Deferred(Reply::new(451, "4.4.2", failure.to_string()));
                        batch.envelope.recipients.len()
                    ];
                    settle(batch, Outcome { fates, decided: Decided::ByLoss }, &self.client, hold);
                    return Err(failure);
                }
                let mut said = Vec::new();
                match self.client.send(batch.message(), &mut said) {
                    Ok(()) => under_way.push_back(batch),
                    Err(outcome) => settle(batch, outcome, &self.client, hold),
                }
                self.say(&said);
            }
            if self.client.in_flight() == 0 {
                // Behind a 421 nothing more is said.
                return match self.client.closing() {
                    true => Err(Failure::Lost("the peer shuts down".to_owned())),
                    false if self.stop.stopped() => Err(Failure::Stopped),
                    false => Ok(()),
                };
            }
            match self.next()? {
                Step::Content { chunk } => {
                    if let Some(batch) = under_way.front_mut() {
                        let size = batch.size;
                        self.send_content(batch, size, chunk)?;
                    }
                }
                Step::Settled(outcome) => {
                    if let Some(batch) = under_way.pop_front() {
                        // Where MAIL is not taken at all, the rest need not be tried; but one sender that is not liked
                        // says nothing of the others.
                        refusals = match no_place_for_mail(&outcome) {
                            Some(550) => refusals + 1,
                            Some(_) => REFUSALS,
                            None => 0,
                        };
                        more &= refusals < REFUSALS;
                        settle(batch, outcome, &self.client, hold);
                    }
                }
                _ => {}
            }
        }
    }

    /// Opens a transaction by asking; the peer's reply to MAIL.
    pub fn ask_mail(&mut self, message: &Message) -> Result<Reply, Failure> {
        self.expect_silence()?;
        let mut said = Vec::new();
        let asked = self.client.ask_mail(message, &mut said);
        self.answer(asked, &said)
    }

    /// The peer's reply to one recipient more.
    pub fn ask_recipient(&mut self, recipient: &Recipient) -> Result<Reply, Failure> {
        self.expect_silence()?;
        let mut said = Vec::new();
        let asked = self.client.ask_recipient(recipient, &mut said);
        self.answer(asked, &said)
    }

    fn answer(&mut self, asked: Result<(), Reply>, said: &[u8]) -> Result<Reply, Failure> {
        if let Err(reply) = asked {
            return Ok(reply);
        }
        self.say(said);
        loop {
            if let Step::Answered(reply) = self.next()? {
                return Ok(reply);
            }
        }
    }

    /// Lets go of a transaction that was opened by asking.
    pub fn withdraw(&mut self) {
        let mut said = Vec::new();
        self.client.withdraw(&mut said);
        self.say(&said);
    }

    /// Tells the peer who gave the next message to the host that gave it to us, if it wants to know.
    pub fn tell_origin(&mut self, origin: &Origin) -> Result<(), Failure> {
        self.expect_silence()?;
        let mut said = Vec::new();
        let awaited = self.client.tell_origin(origin, &mut said);
        self.say(&said);
        while awaited && !matches!(self.next()?, Step::Ready) {}
        Ok(())
    }

    /// The content of the transaction that was opened by asking, of `size` octets on the wire; a fate for each
    /// recipient that was accepted. After a failure the session is over.
    pub fn proceed(&mut self, content: &mut dyn Read, size: u64) -> Outcome {
        if let Err(failure) = self.expect_silence() {
            return self.abandon(&failure);
        }
        let mut said = Vec::new();
        let step = self.client.proceed(size, &mut said);
        self.say(&said);
        self.conclude(step, content, size)
    }

    /// One message from its MAIL on; a fate for each recipient. After a failure the session is over.
    pub fn transact(&mut self, message: Message, content: &mut dyn Read) -> Outcome {
        let (mut said, size) = (Vec::new(), message.size);
        let silence = self.expect_silence();
        if let Err(outcome) = self.client.send(message, &mut said) {
            return outcome;
        }
        if let Err(failure) = silence {
            return self.abandon(&failure);
        }
        self.say(&said);
        self.conclude(Step::Wait, content, size)
    }

    fn conclude(&mut self, mut step: Step, content: &mut dyn Read, size: u64) -> Outcome {
        loop {
            let gone_on = match step {
                Step::Settled(outcome) => return outcome,
                Step::Content { chunk } => self.send_content(content, size, chunk),
                _ => Ok(()),
            };
            step = match gone_on.and_then(|()| self.next()) {
                Ok(step) => step,
                Err(failure) => return self.abandon(&failure),
            };
        }
    }

    fn abandon(&mut self, failure: &Failure) -> Outcome {
        let why = Reply::new(451, "4.4.2", failure.to_string());
        self.client.abandon(&why).pop().unwrap_or(Outcome { fates: Vec::new(), decided: Decided::ByLoss })
    }

    /// The content of one message, `size` octets on the wire: by DATA with its dots and its end, or as one chunk.
    fn send_content(&mut self, content: &mut dyn Read, size: u64, chunk: bool) -> Result<(), Failure> {
        let (mut stuffer, mut liner) = (Stuffer::new(), Liner::new());
        let mut piece = vec![0; BLOCK];
        let mut sent = 0;
        loop {
            let octets = content.read(&mut piece).map_err(|error| Failure::Lost(error.to_string()))?;
            let out = self.wire.out();
            let before = out.len();
            match (chunk, octets) {
                (true, 0) => liner.finish(out),
                (true, _) => liner.feed(&piece[..octets], out),
                (false, 0) => stuffer.finish(out),
                (false, _) => stuffer.feed(&piece[..octets], out),
            }
            sent += (out.len() - before) as u64;
            if chunk && sent > size {
                // What is beyond the octets that BDAT has announced would be taken for commands.
                out.truncate(before);
                return Err(Failure::Lost("the message is longer than it was".to_owned()));
            }
            if octets == 0 {
                break;
            }
            let deadline = self.within(self.timeouts.block);
            self.wire.flush_or_stop(deadline, &self.stop).map_err(|error| match error.kind() {
                io::ErrorKind::Interrupted => Failure::Stopped,
                _ => lost(error),
            })?;
        }
        // BDAT has announced the octets: with one more or less the peer would take content for commands.
        if chunk && sent != size {
            return Err(Failure::Lost("the message is not as long as it was".to_owned()));
        }
        let mut said = Vec::new();
        self.client.content_sent(&mut said);
        self.say(&said);
        Ok(())
    }

    /// ATRN; `Ok`: the connection turns (RFC 2645 section 5.2.1).
    pub fn atrn(mut self, domains: &[Domain]) -> Result<(Wire, Client), Failure> {
        let mut said = Vec::new();
        self.client.atrn(domains, &mut said);
        self.say(&said);
        loop {
            match self.next() {
                Ok(Step::Turned) => return Ok((self.wire, self.client)),
                Ok(_) => {}
                Err(failure) => {
                    self.leave(&failure);
                    return Err(failure);
                }
            }
        }
    }

    /// Goes away after a failure: politely where the peer has only refused something, else without a word more.
    pub fn leave(self, failure: &Failure) {
        match failure {
            Failure::Halted(_) => self.quit(),
            Failure::Broken(_) | Failure::NoTls(_) | Failure::Lost(_) | Failure::Stopped => self.wire.shutdown(),
        }
    }

    /// QUIT, and its reply if the peer is so kind.
    pub fn quit(mut self) {
        let mut said = Vec::new();
        self.client.quit(&mut said);
        self.say(&said);
        self.limit(Some(Instant::now() + FAREWELL));
        // What was said before is answered first.
        while self.client.awaiting().is_some() && self.next().is_ok() {}
        self.wire.shutdown();
    }

    /// With nothing outstanding nothing may have come: a reply that nobody has asked for would be taken for the answer
    /// to what is said next, and a message for delivered that was refused.
    fn expect_silence(&mut self) -> Result<(), Failure> {
        if self.client.awaiting().is_some() {
            return Ok(());
        }
        if self.wire.fill().map_err(lost)? == Filled::End {
            return Err(Failure::Lost("the peer closed the connection".to_owned()));
        }
        match self.wire.received() {
            [] => Ok(()),
            // RFC 5321 section 3.8: that one may come at any time.
            said if said.starts_with(b"421") => Err(Failure::Lost("the peer shuts down".to_owned())),
            _ => Err(Failure::Broken("a reply came that nobody asked for".to_owned())),
        }
    }

    /// What the next reply leads to.
    fn next(&mut self) -> Result<Step, Failure> {
        let reply = self.reply(self.within(self.timeouts.patience(self.client.awaiting())))?;
        let farewell = reply.code() == 421;
        let mut said = Vec::new();
        let step =
            self.client.reply(reply.clone(), &mut said).map_err(|broken| Failure::Broken(broken.0.to_owned()))?;
        self.say(&said);
        match step {
            Step::Halt(halt) => Err(Failure::Halted(halt)),
            Step::Closed => Err(Failure::Lost("the peer closed the session".to_owned())),
            // What was settled by this reply is settled; nothing more will come.
            Step::Settled(_) => Ok(step),
            _ if farewell => Err(Failure::Lost(format!("the peer said {reply}"))),
            step => Ok(step),
        }
    }

    fn reply(&mut self, deadline: Instant) -> Result<Reply, Failure> {
        loop {
            match self.wire.take_reply_line(REPLY_LINE_LIMIT) {
                Line::Whole(line) => {
                    self.wire.trace.heard(&line);
                    let reply = self.replies.line(&line);
                    let reply = reply
                        .map_err(|error| Failure::Broken(format!("that is no SMTP server: it said {:?}", error.0)))?;
                    match reply {
                        Some(reply) => return Ok(reply),
                        None => continue,
                    }
                }
                Line::TooLong => return Err(Failure::Broken("a reply line without end".to_owned())),
                Line::None => {}
            }
            let (deadline, stop) = match &self.grace {
                Some((end, never)) => (deadline.min(*end), never),
                None => (deadline, &self.stop),
            };
            match self.wire.wait_input(deadline, stop).map_err(lost)? {
                Woken::Ready => {}
                Woken::Deadline => return Err(Failure::Lost("the peer does not answer".to_owned())),
                // The peer may have taken the message this very moment: to go now would bring it twice.
                Woken::Stopped if self.client.awaiting() == Some(Awaiting::End) => {
                    let never = Stop::new().map_err(lost)?;
                    self.grace = Some((Instant::now() + self.timeouts.shutdown, never));
                    continue;
                }
                Woken::Stopped => return Err(Failure::Stopped),
            }
            if self.wire.fill().map_err(lost)? == Filled::End {
                return Err(Failure::Lost("the peer closed the connection".to_owned()));
            }
        }
    }

    /// Logs and lines up what the client says; secrets are blanked.
    fn say(&mut self, octets: &[u8]) {
        let lines = octets.split_inclusive(|octet| *octet == b'\n').filter(|_| self.wire.trace.enabled());
        for line in lines {
            let line = line.trim_ascii_end();
            let end = if !self.client.in_auth() {
                line.len()
            } else if line.starts_with(b"AUTH ") {
                line.iter().enumerate().filter(|(_, octet)| **octet == b' ').nth(1).map_or(line.len(), |(at, _)| at)
            } else {
                0
            };
            let blanked: &[u8] = if end < line.len() { b" ***" } else { b"" };
            self.wire.trace.said(&[&line[..end], blanked].concat());
        }
        self.wire.say(octets);
    }
}

/// The reply to MAIL, if it may say that this server takes no mail from us (RFC 2645 section 5.4).
pub fn no_place_for_mail(outcome: &Outcome) -> Option<u16> {
    outcome.fates.iter().filter(|_| outcome.decided == Decided::AtMail).find_map(|fate| match fate {
        Fate::Refused(reply) => Some(reply.code()).filter(|code| matches!(code, 502 | 503 | 530 | 550)),
        _ => None,
    })
}

/// A host that takes all mail, and how to talk to it: the relay's smarthost, a customer's submission host.
pub struct Upstream {
    config: config::Smarthost,
    side: Option<ClientSide>,
}

impl Upstream {
    pub fn new(config: &config::Smarthost) -> Result<Upstream, String> {
        let side = client_side(config.tls, config.pin, config.ca.as_deref())?;
        Ok(Upstream { config: config.clone(), side })
    }

    pub fn address(&self) -> &str {
        &self.config.address
    }

    /// A session in which mail may be sent.
    pub fn connect(&self, hostname: &str, timeouts: &Timeouts, stop: &Stop) -> Result<Dialogue, Failure> {
        let config = &self.config;
        let addresses = config
            .address
            .to_socket_addrs()
            .map_err(|error| Failure::Lost(format!("{} has no address: {error}", config.address)))?;
        let mut last = Failure::Lost(format!("{} has no address", config.address));
        for address in addresses {
            let plan = Plan {
                name: hostname.to_owned(),
                starttls: if config.tls == TlsMode::StartTls { StartTls::Required } else { StartTls::Never },
                tls: config.tls == TlsMode::Implicit,
                credentials: config.credentials.clone(),
                chunking: true,
                ..Plan::default()
            };
            let side = self.side.as_ref().map(|side| (side, config.host.as_str()));
            match converse(address, plan, side, timeouts, stop, None) {
                Ok(dialogue) => return Ok(dialogue),
                Err(Failure::Stopped) => return Err(Failure::Stopped),
                Err(failure) => last = failure,
            }
        }
        Err(last)
    }
}

/// Connects by TCP and introduces itself, until `limit` at the latest.
pub fn converse(
    address: SocketAddr,
    plan: Plan,
    side: Option<(&ClientSide, &str)>,
    timeouts: &Timeouts,
    stop: &Stop,
    limit: Option<Instant>,
) -> Result<Dialogue, Failure> {
    let deadline = Instant::now() + timeouts.connect;
    let deadline = limit.map_or(deadline, |limit| limit.min(deadline));
    let socket = wire::connect(address, deadline, stop).map_err(|error| match error.kind() {
        io::ErrorKind::Interrupted => Failure::Stopped,
        _ => Failure::Lost(format!("{address}: {error}")),
    })?;
    converse_over(socket, &format!("relay-{address}"), plan, side, timeouts, stop, limit)
}

/// Introduces itself over a connection; `name`: what it is called in the log.
pub fn converse_over(
    socket: OwnedFd,
    name: &str,
    plan: Plan,
    side: Option<(&ClientSide, &str)>,
    timeouts: &Timeouts,
    stop: &Stop,
    limit: Option<Instant>,
) -> Result<Dialogue, Failure> {
    let trace = Trace { id: name.to_owned(), us: 'C', them: 'S' };
    let implicit = plan.tls;
    let wire = Wire::new(socket, trace).map_err(|error| Failure::Lost(format!("{name}: {error}")))?;
    let mut dialogue = Dialogue::new(wire, plan, timeouts, stop);
    dialogue.limit(limit);
    let begun = match side {
        Some((side, name)) if implicit => dialogue.begin_tls(side, name),
        _ => Ok(()),
    };
    match begun.and_then(|()| dialogue.introduce(side)) {
        Ok(()) => Ok(dialogue),
        Err(failure) => {
            dialogue.leave(&failure);
            Err(failure)
        }
    }
}

/// What a peer's certificate is checked against; `None`: no TLS.
pub fn client_side(tls: TlsMode, pin: Option<[u8; 32]>, ca: Option<&Path>) -> Result<Option<ClientSide>, String> {
    let trust = match (tls, pin, ca) {
        (TlsMode::None, _, _) => return Ok(None),
        (_, Some(pin), _) => Trust::Pin(pin),
        (_, None, Some(file)) => Trust::Authorities(file.to_owned()),
        (_, None, None) => Trust::System,
    };
    tls::client_config(&trust).map(Some)
}
