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
use crate::dialogue::{Dialogue, Failure, converse, converse_over};
use crate::maildir::{Entry, each_piece};
use crate::outgoing::{Attempt, Desk, Peer};
use crate::queue::{Batch, Envelope, Hold, NoHold, Place, Queue};
use crate::rules::{self, NextHop};
use crate::session::storage_reply;
use crate::smtp::client::{Decided, Fate, Message, Origin, Outcome, Plan};
use crate::smtp::command::Recipient;
use crate::smtp::content::Sizer;
use crate::smtp::reply::Reply;
use crate::wire::Stop;

use super::mailboxes::Mailboxes;

/// A next hop answers a command within this time, or it is down: whoever asks through waits for five minutes only
/// (RFC 5321 section 4.5.3.2).
const PATIENCE: Duration = Duration::from_secs(60);

/// All next hops of one recipient have answered within this time, and all of one message have taken it: the provider
/// waits for five and for ten minutes (section 4.5.3.2), and what is taken later it brings again.
const ASKED: Duration = Duration::from_secs(4 * 60);
const TAKEN: Duration = Duration::from_secs(9 * 60);

/// Mail that nobody waits for may take longer, but not for ever.
const RETRIED: Duration = Duration::from_secs(60 * 60);

/// One that could not be reached is left alone so long, and one that let us wait ten times as long as we have waited,
/// up to five minutes: each of a thousand recipients would wait again.
const DOWN: Duration = Duration::from_secs(5);
const REST: Duration = Duration::from_secs(5 * 60);

/// Content up to this size is kept in memory, larger in a file without a name.
const IN_MEMORY: usize = 256 * 1024;

/// What a next hop has made of a message.
pub struct Delivered {
    /// One a recipient.
    pub fates: Vec<Fate>,
    /// It tells senders who asked (RFC 3461).
    pub dsn: bool,
}

/// The sessions with next hops of one who delivers; they outlast a message.
pub struct NextHops {
    hostname: String,
    timeouts: Timeouts,
    stop: Stop,
    /// Nothing takes longer.
    limit: Option<Instant>,
    sessions: HashMap<NextHop, Session>,
    /// Sessions to be ended when nobody waits.
    leaving: Vec<Dialogue>,
}

#[derive(Default)]
struct Session {
    dialogue: Option<Dialogue>,
    /// The recipients of the transaction that is open there, by asking; all were accepted.
    asked: Vec<Recipient>,
    open: bool,
    /// It was opened with SMTPUTF8.
    utf8: bool,
    /// It is left alone until then.
    down: Option<Instant>,
}

impl NextHops {
    pub fn new(hostname: &str, timeouts: &Timeouts, stop: &Stop) -> NextHops {
        let timeouts = Timeouts {
            greeting: timeouts.greeting.min(PATIENCE),
            mail: timeouts.mail.min(PATIENCE),
            recipient: timeouts.recipient.min(PATIENCE),
            data: timeouts.data.min(PATIENCE),
            command: timeouts.command.min(PATIENCE),
            ..timeouts.clone()
        };
        NextHops {
            hostname: hostname.to_owned(),
            timeouts,
            stop: stop.clone(),
            limit: None,
            sessions: HashMap::new(),
            leaving: Vec::new(),
        }
    }

    /// What follows is about one recipient that the provider waits for.
    pub fn for_a_recipient(&mut self) {
        self.limit = Some(Instant::now() + ASKED.min(self.timeouts.recipient * 4));
    }

    /// What follows is about one message that the provider waits for.
    pub fn for_a_message(&mut self) {
        self.limit = Some(Instant::now() + TAKEN.min(self.timeouts.end));
    }

    /// A new transaction: what was asked for the last one is forgotten.
    pub fn begin(&mut self) {
        self.leaving.drain(..).for_each(Dialogue::quit);
        self.sessions.values_mut().filter(|session| session.open).for_each(Session::withdraw);
    }

    /// Asks whether a next hop takes a recipient; `Err`: its reply, or that it is down. `message`: its sender, and
    /// what is known of its content.
    pub fn ask(&mut self, hop: &NextHop, message: &Message, recipient: &Recipient) -> Result<(), Reply> {
        let session = self.sessions.entry(hop.clone()).or_default();
        if session.open && session.asked.iter().any(|asked| rules::same(&asked.mailbox, &recipient.mailbox)) {
            return Ok(());
        }
        // RFC 6531 section 3.4: a recipient who needs SMTPUTF8 needs it at MAIL; the content goes to all in another
        // transaction then.
        let utf8 = message.utf8 || !recipient.mailbox.is_ascii();
        if session.open && utf8 && !session.utf8 {
            session.withdraw();
        }
        let message = &Message { utf8, ..message.clone() };
        // That a session has ended in a pause between two messages says nothing of the next hop.
        let idle = session.dialogue.is_some() && !session.open;
        let asked = match self.try_to_ask(hop, message, recipient) {
            Err(Failure::Lost(_) | Failure::Broken(_)) if idle => self.try_to_ask(hop, message, recipient),
            other => other,
        };
        let reply = asked.unwrap_or_else(|failure| not_now(hop, &failure));
        match reply.code() {
            200..=299 => Ok(()),
            // Behind RCPT a 552 means too many recipients, and so "later" (RFC 5321 section 4.5.3.1.10); what a next hop
            // means by it is its quota, or its SIZE.
            552 => Err(reply.recoded(550).passed_on()),
            _ => Err(upward(hop, reply)),
        }
    }

    fn try_to_ask(&mut self, hop: &NextHop, message: &Message, recipient: &Recipient) -> Result<Reply, Failure> {
        let session = self.session(hop)?;
        let begun = Instant::now();
        let replied = session.ask(message, recipient);
        if replied.is_err() {
            session.end();
            session.rest(begun, Duration::ZERO);
        }
        replied
    }

    /// Delivers a message to the recipients that a next hop has; a fate for each of them.
    pub fn deliver(
        &mut self,
        hop: &NextHop,
        message: &Message,
        content: &mut dyn Content,
        origin: Option<&Origin>,
    ) -> io::Result<Delivered> {
        let before = self.sessions.get(hop).is_some_and(|session| session.dialogue.is_some());
        let mut delivered = self.try_to_deliver(hop, message, content, origin)?;
        // A session that was there before may have ended while the content came. Nobody has it yet.
        let nobody = |outcome: &Outcome| {
            let lost = outcome.decided == Decided::ByLoss;
            lost && outcome.fates.iter().all(|fate| matches!(fate, Fate::Deferred(_)))
        };
        if before && delivered.as_ref().is_ok_and(nobody) {
            delivered = self.try_to_deliver(hop, message, content, origin)?;
        }
        let later = |failure| vec![Fate::Deferred(not_now(hop, &failure)); message.recipients.len()];
        let fates = delivered.map_or_else(later, |outcome| outcome.fates);
        let fates = fates.into_iter().map(|fate| passed_up(hop, fate)).collect();
        let dialogue = self.sessions.get(hop).and_then(|session| session.dialogue.as_ref());
        let dsn = dialogue.is_some_and(|dialogue| dialogue.client().offered().dsn);
        // The next message comes from somebody else.
        if dialogue.is_some_and(|dialogue| dialogue.client().is_disguised())
            && let Some(session) = self.sessions.get_mut(hop)
        {
            session.close();
            self.leaving.extend(session.dialogue.take());
        }
        Ok(Delivered { fates, dsn })
    }

    fn try_to_deliver(
        &mut self,
        hop: &NextHop,
        message: &Message,
        content: &mut dyn Content,
        origin: Option<&Origin>,
    ) -> io::Result<Result<Outcome, Failure>> {
        content.restart()?;
        Ok(self.session(hop).map(|session| session.deliver(message, content, origin)))
    }

    /// The session with a next hop, connected.
    fn session(&mut self, hop: &NextHop) -> Result<&mut Session, Failure> {
        let session = self.sessions.entry(hop.clone()).or_default();
        if session.dialogue.is_none() {
            let begun = Instant::now();
            if session.down.is_some_and(|until| begun < until) {
                return Err(Failure::Lost("it was not reachable a moment ago".to_owned()));
            }
            match connect(hop, &self.hostname, &self.timeouts, &self.stop, self.limit) {
                Ok(dialogue) => session.dialogue = Some(dialogue),
                Err(failure) => {
                    session.rest(begun, DOWN);
                    return Err(failure);
                }
            }
        }
        if let Some(dialogue) = &mut session.dialogue {
            dialogue.limit(self.limit);
        }
        Ok(session)
    }
}

impl Drop for NextHops {
    fn drop(&mut self) {
        let open = self.sessions.drain().filter_map(|(_, session)| session.dialogue);
        open.chain(self.leaving.drain(..)).for_each(Dialogue::quit);
    }
}

impl Session {
    fn ask(&mut self, message: &Message, recipient: &Recipient) -> Result<Reply, Failure> {
        let Some(dialogue) = &mut self.dialogue else { return Err(Failure::Lost("no session".to_owned())) };
        if !self.open {
            let reply = dialogue.ask_mail(message)?;
            if !reply.is_positive() {
                return Ok(reply);
            }
            (self.open, self.utf8) = (true, message.utf8);
        }
        let reply = dialogue.ask_recipient(recipient)?;
        if reply.is_positive() {
            self.asked.push(recipient.clone());
        }
        Ok(reply)
    }

    /// Leaves the next hop alone after something that began then and failed; `least`: at least so long.
    fn rest(&mut self, begun: Instant, least: Duration) {
        let waited = begun.elapsed();
        let rest = if waited > DOWN { least.max((10 * waited).min(REST)) } else { least };
        self.down = Some(Instant::now() + rest);
    }

    fn deliver(&mut self, message: &Message, content: &mut dyn Content, origin: Option<&Origin>) -> Outcome {
        let begun = Instant::now();
        let by_loss = |reply: Reply| {
            let fates = vec![Fate::Deferred(reply); message.recipients.len()];
            Outcome { fates, decided: Decided::ByLoss }
        };
        let lost = |text: &str| by_loss(Reply::new(451, "4.4.2", text.to_owned()));
        let Some(dialogue) = &mut self.dialogue else { return lost("no session with the next hop") };
        let offered = dialogue.client().offered();
        let origin = origin.filter(|_| !offered.xclient.is_empty() || !offered.xforward.is_empty());
        // What was asked is gone on with, if it is what is wanted and nothing must be said before.
        let fits = offered.eight_bit || !message.eight_bit;
        let outcome = if self.open && self.asked == message.recipients && origin.is_none() && fits {
            dialogue.proceed(content, message.size)
        } else {
            dialogue.withdraw();
            match origin.map_or(Ok(()), |origin| dialogue.tell_origin(origin)) {
                Ok(()) => dialogue.transact(message.clone(), content),
                Err(failure) => lost(&failure.to_string()),
            }
        };
        self.close();
        if outcome.decided == Decided::ByLoss || self.dialogue.as_ref().is_some_and(|it| it.client().closing()) {
            self.end();
            self.rest(begun, Duration::ZERO);
        }
        outcome
    }

    /// Lets the transaction go that is open.
    fn withdraw(&mut self) {
        self.close();
        if let Some(dialogue) = &mut self.dialogue {
            dialogue.withdraw();
        }
    }

    fn close(&mut self) {
        self.open = false;
        self.asked.clear();
    }

    fn end(&mut self) {
        self.close();
        self.dialogue = None;
    }
}

fn connect(
    hop: &NextHop,
    hostname: &str,
    timeouts: &Timeouts,
    stop: &Stop,
    limit: Option<Instant>,
) -> Result<Dialogue, Failure> {
    let lost = |error: io::Error| Failure::Lost(format!("{hop}: {error}"));
    let plan = |lmtp| Plan { name: hostname.to_owned(), lmtp, chunking: true, ..Plan::default() };
    let (address, lmtp) = match hop {
        NextHop::LmtpUnix(path) => {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
            let socket = socket.map_err(|error| lost(error.into()))?;
            // Without waiting: a listener that is there and takes nobody would hold us for ever.
            SocketAddrUnix::new(path)
                .and_then(|address| rustix::net::connect(&socket, &address))
                .map_err(|error| lost(error.into()))?;
            return converse_over(socket, &hop.to_string(), plan(true), None, timeouts, stop, limit);
        }
        NextHop::Lmtp { address, .. } => (address, true),
        NextHop::Smtp { address, .. } => (address, false),
    };
    let mut last = Failure::Lost(format!("{address} has no address"));
    for address in address.to_socket_addrs().map_err(lost)? {
        match converse(address, plan(lmtp), None, timeouts, stop, limit) {
            Ok(dialogue) => return Ok(dialogue),
            Err(Failure::Stopped) => return Err(Failure::Stopped),
            Err(failure) => last = failure,
        }
    }
    Err(last)
}

/// What the provider hears of a next hop that is down: the mail stays there.
fn not_now(hop: &NextHop, failure: &Failure) -> Reply {
    log::warn!("event=next-hop-failed next-hop={:?} error={:?}", hop.to_string(), failure.to_string());
    Reply::new(451, "4.4.1", "The mail server behind this one is not available now")
}

/// A next hop's reply as the provider shall hear it: as it is, unless it speaks of us and not of the mail.
fn upward(hop: &NextHop, reply: Reply) -> Reply {
    match reply.code() {
        400..=420 | 422..=499 | 505..=529 | 531..=599 => reply.passed_on(),
        421 => Reply::new(451, "4.3.2", "The mail server behind this one is not available now"),
        // It does not know a command, or wants authentication: nobody's mail may come back for that.
        _ => {
            log::error!("event=next-hop-unfit next-hop={:?} reply={:?}", hop.to_string(), reply.to_string());
            Reply::new(451, "4.3.5", "The mail server behind this one does not take mail from here")
        }
    }
}

/// A fate as the provider shall hear of it, or the retries.
fn passed_up(hop: &NextHop, fate: Fate) -> Fate {
    match fate {
        // Behind RCPT, where that one counts as "later" (RFC 5321 section 4.5.3.1.10): see `ask`.
        Fate::Deferred(reply) if reply.code() == 552 => Fate::Refused(reply.recoded(550).passed_on()),
        // We have decided so, though the words are those of a refusal: a hop that has forgotten EHLO for a minute.
        Fate::Deferred(reply) if reply.code() >= 500 => {
            Fate::Deferred(Reply::new(451, "4.3.5", format!("Not now: {reply}")))
        }
        Fate::Deferred(reply) => Fate::Deferred(upward(hop, reply)),
        Fate::Refused(reply) => match upward(hop, reply) {
            reply if reply.code() < 500 => Fate::Deferred(reply),
            reply => Fate::Refused(reply),
        },
        other => other,
    }
}

/// Content that can be sent again from its beginning.
pub trait Content: Read {
    fn restart(&mut self) -> io::Result<()>;
}

impl Content for Batch {
    fn restart(&mut self) -> io::Result<()> {
        self.rewind()
    }
}

/// Content that is looked at as a whole, or sent more than once: a small one in memory, a large one in a file that is
/// gone with us.
#[derive(Default)]
pub struct Scratch {
    memory: Vec<u8>,
    file: Option<BufWriter<File>>,
    sizer: Sizer,
    eight_bit: bool,
    /// Where the next octet is read, as long as there is no file.
    at: usize,
}

impl Scratch {
    /// `file`: makes the file, when it is needed.
    pub fn write(&mut self, octets: &[u8], file: impl FnOnce() -> io::Result<File>) -> io::Result<()> {
        self.sizer.feed(octets);
        self.eight_bit |= !octets.is_ascii();
        if self.file.is_none() && self.memory.len() + octets.len() > IN_MEMORY {
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
    pub fn beginning(&self) -> &[u8] {
        &self.memory
    }
}

/// From where [`Content::restart`] has put it.
impl Read for Scratch {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(file) = &mut self.file {
            return file.get_mut().read(buffer);
        }
        let octets = (&self.memory[self.at..]).read(buffer)?;
        self.at += octets;
        Ok(octets)
    }
}

impl Content for Scratch {
    fn restart(&mut self) -> io::Result<()> {
        self.at = 0;
        self.file.as_mut().map_or(Ok(()), Seek::rewind)
    }
}

/// Who has decided on a message.
#[derive(Clone, Copy)]
pub struct By<'a> {
    pub name: &'a str,
    /// It tells senders who asked (RFC 3461).
    pub dsn: bool,
}

/// Mail that a next hop shall have and nobody else keeps: it waits under ROOT and is tried again.
pub struct Handover {
    queue: Queue,
    desk: Desk,
    retry: Retry,
    hostname: String,
    timeouts: Timeouts,
}

impl Handover {
    /// `desk`: tells senders what became of their mail, as far as anybody can be told.
    pub fn new(config: &config::Customer, mailboxes: &Mailboxes, desk: Desk) -> Handover {
        Handover {
            queue: mailboxes.queue().clone(),
            desk,
            retry: config.outgoing.as_ref().map(|outgoing| outgoing.retry.clone()).unwrap_or_default(),
            hostname: config.hostname.clone(),
            timeouts: config.timeouts.clone(),
        }
    }

    /// Whether anything could be stored.
    pub fn is_ready(&self) -> io::Result<()> {
        self.queue.maildir(&Place::Handover).scratch(&self.queue.unique()).map(drop)
    }

    /// Stores what became neither delivered nor the provider's again, durably; then acts on the fates, one a recipient.
    /// `by`: who has decided on them.
    pub fn keep(&self, envelope: Envelope, fates: Vec<Fate>, content: &mut dyn Content, by: By<'_>) -> io::Result<()> {
        content.restart()?;
        let mut copies = self.queue.put(&[(Place::Handover, envelope)], "")?;
        each_piece(content, |piece| copies.write(piece))?;
        let entries = copies.commit()?;
        // It is safe: whatever fails now, it is tried again.
        if let Err(error) = self.conclude_stored(entries, fates, by) {
            log::warn!("event=handover-unsettled error={error:?}");
        }
        Ok(())
    }

    fn conclude_stored(&self, entries: Vec<Entry>, fates: Vec<Fate>, by: By<'_>) -> Result<(), String> {
        let mut hold = self.hold()?;
        for entry in entries {
            let batch = hold.claim(&Place::Handover, entry).map_err(|error| error.to_string())?;
            if let Some(batch) = batch {
                self.conclude(batch, fates.clone(), by, &mut hold).map_err(|error| error.to_string())?;
            }
        }
        Ok(())
    }

    fn conclude(&self, batch: Batch, mut fates: Vec<Fate>, by: By<'_>, hold: &mut Hold) -> io::Result<Outcome> {
        for fate in &mut fates {
            // Here it is not "too many recipients" (RFC 5321 section 4.5.3.1.10), and so not for at once.
            if let Fate::Deferred(reply) = fate
                && reply.code() == 452
            {
                *fate = Fate::Deferred(reply.clone().recoded(451));
            }
        }
        let context = format!("next-hop={:?}", by.name);
        let peer = Peer { name: None, dsn: by.dsn };
        let attempt = Attempt { peer, retry: Some(&self.retry), done: "handed-over", context: &context };
        self.desk.conclude(batch, Outcome { fates, decided: Decided::ByPeer }, &attempt, hold)
    }

    fn hold(&self) -> Result<Hold, String> {
        self.queue.hold_now(&Place::Handover).map_err(|error| match error {
            NoHold::Busy(_) => "another process is at it".to_owned(),
            NoHold::Failed(error) => error.to_string(),
        })
    }

    /// When the next attempt is due; `None`: nothing waits.
    pub fn due(&self) -> Option<SystemTime> {
        self.queue.next_due(&Place::Handover).unwrap_or(None)
    }

    /// Tries what is due.
    pub fn retry(&self, mailboxes: &Mailboxes, stop: &Stop) {
        if self.due().is_none_or(|due| due > SystemTime::now()) {
            return;
        }
        let mut hold = match self.hold() {
            Ok(hold) => hold,
            Err(error) => return log::info!("event=handover-waits reason={error:?}"),
        };
        let mut hops = NextHops::new(&self.hostname, &self.timeouts, stop);
        while !stop.stopped() {
            hold.progress();
            let Some(mut batch) = hold.offer() else { return };
            let (fates, name, dsn) = self.attempt(mailboxes, &mut hops, &mut batch);
            // What is wrong with it stands in the log.
            let _ = self.conclude(batch, fates, By { name: &name, dsn }, &mut hold);
        }
    }

    /// One message, to wherever its recipients belong by the rules as they are now.
    fn attempt(&self, mailboxes: &Mailboxes, hops: &mut NextHops, batch: &mut Batch) -> (Vec<Fate>, String, bool) {
        let recipients = batch.envelope.recipients.clone();
        let mut fates: Vec<Option<Fate>> = vec![None; recipients.len()];
        // Of a delivery into a Maildir of ours nobody else tells; that one is as rare as a change of the rules.
        let (mut name, mut dsn) = ("-".to_owned(), false);
        for number in 0..recipients.len() {
            if fates[number].is_some() {
                continue;
            }
            match mailboxes.place(&recipients[number].mailbox) {
                // It was taken by rules that are no more.
                None => fates[number] = Some(Fate::Refused(Reply::new(550, "5.1.1", "No such mailbox here any more"))),
                Some(rules::Place::Maildir { path, folders }) => {
                    let from = batch.envelope.from.clone();
                    let copied = mailboxes.copy(&from, &recipients[number].mailbox, (&path, &folders), batch);
                    fates[number] = Some(copied);
                }
                Some(rules::Place::NextHop(hop)) => {
                    let same = |other: &usize| matches!(mailboxes.place(&recipients[*other].mailbox), Some(rules::Place::NextHop(its)) if its == hop);
                    let numbers: Vec<_> = (number..recipients.len()).filter(same).collect();
                    let wanted = numbers.iter().map(|number| recipients[*number].clone()).collect();
                    let message = Message { recipients: wanted, ..batch.message() };
                    hops.limit = Some(Instant::now() + RETRIED);
                    let found = hops.deliver(&hop, &message, batch, None).unwrap_or_else(|error| Delivered {
                        fates: vec![Fate::Deferred(storage_reply(&error)); message.recipients.len()],
                        dsn: false,
                    });
                    (name, dsn) = (hop.to_string(), found.dsn);
                    for (number, fate) in numbers.into_iter().zip(found.fates) {
                        let mailbox = &recipients[number].mailbox;
                        fates[number] = Some(match fate {
                            Fate::Refused(_) if mailboxes.must_take(mailbox) => {
                                mailboxes.take_in(&message.from, mailbox, batch)
                            }
                            fate => fate,
                        });
                    }
                }
            }
        }
        let untried = || Fate::Deferred(Reply::new(451, "4.0.0", "Not yet"));
        (fates.into_iter().map(|fate| fate.unwrap_or_else(untried)).collect(), name, dsn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What was decided is passed up, whatever the code of its words.
    #[test]
    fn a_deferral_stays_one_and_a_refusal_for_its_size_becomes_one() {
        let hop = NextHop::LmtpUnix("/run/lmtp".into());
        for (fate, wanted) in [
            (Fate::Deferred(Reply::new(554, "5.6.3", "no 8BITMIME")), "later 451 4.3.5 Not now: 554 5.6.3 no 8BITMIME"),
            (Fate::Deferred(Reply::new(552, "5.2.2", "Over quota")), "never 550 5.2.2 Over quota"),
            (Fate::Deferred(Reply::new(452, "4.2.2", "Over quota")), "later 452 4.2.2 Over quota"),
            (Fate::Refused(Reply::new(550, "5.1.1", "Gone")), "never 550 5.1.1 Gone"),
            (Fate::Refused(Reply::new(552, "5.3.4", "Too large")), "never 552 5.3.4 Too large"),
            (
                Fate::Refused(Reply::bare(503, "What")),
                "later 451 4.3.5 The mail server behind this one does not take mail from here",
            ),
        ] {
            let got = match passed_up(&hop, fate) {
                Fate::Deferred(reply) => format!("later {reply}"),
                Fate::Refused(reply) => format!("never {reply}"),
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
            assert_eq!(upward(&hop, said).to_string(), heard);
        }
    }

    #[test]
    fn content_is_read_again_from_memory_and_from_a_file() {
        for (pieces, in_memory) in [(1, true), (IN_MEMORY / 1000 + 2, false)] {
            let piece = [b"x".repeat(998), b"\r\n".to_vec()].concat();
            let (mut scratch, mut files) = (Scratch::default(), 0);
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
                scratch.restart().unwrap();
                scratch.read_to_end(&mut all).unwrap();
                assert!(all == piece.repeat(pieces) && scratch.beginning().starts_with(&piece));
            }
        }
    }
}
