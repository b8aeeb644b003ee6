//! The SMTP client without its socket: all octets of a server. The first two octets of the input say what the client does; the
//! rest are the lines of the server. The client gets each reply when it waits for one, as in a session.

use std::collections::VecDeque;

use odmr::mail::address::{Domain, Mailbox, ReversePath};
use odmr::mail::received::ClientInfo;
use odmr::sasl::{Login, TlsChannel};
use odmr::smtp::client::{Client, ClientOptions, ClientStep, OutgoingMessage, Stage, StartTls, Without8BitMime};
use odmr::smtp::command::{Body, Envelope, Notify, Recipient, Return};
use odmr::smtp::reply::{Reply, ReplyReader};
use odmr::smtp::status::{DeliveryResult, connection_lost};

use super::check;

const SECRET: &[u8] = b"tanstaaftanstaaf";
const SECRET_IN_PLAIN: &str = "AHRhbnN0YWFmdGFuc3RhYWY";

pub fn run(input: &[u8]) {
    let Some(([how, what], rest)) = input.split_first_chunk::<2>() else { return };
    let mut session = Session::new(*how, *what);
    let mut reader = ReplyReader::default();
    for line in rest.split_inclusive(|octet| *octet == b'\n').take(400) {
        let end = line.strip_suffix(b"\n").map(|line| line.strip_suffix(b"\r").unwrap_or(line));
        let reply = match end {
            Some(line) => reader.line(line),
            None => Ok(reader.end(line)),
        };
        let Ok(reply) = reply else { break };
        // SCRAM with a million iterations takes half a second.
        if reply.as_ref().is_some_and(|reply| reply.code() == 334 && reply.lines().any(|text| text.len() > 200)) {
            break;
        }
        if reply.is_some_and(|reply| !session.replied(reply)) {
            break;
        }
    }
    session.lost();
}

/// What a client does when it is ready.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    /// Sends all messages, as many at a time as the client permits.
    Queue,
    /// Sends them one recipient at a time.
    Stepwise,
    Atrn,
    /// The domains of the account, then the queue.
    EhloAgain,
}

struct Session {
    client: Client,
    work: Work,
    tls: bool,
    tls_required: bool,
    waiting: VecDeque<OutgoingMessage>,
    /// Messages that have no result yet, each with whether its content was sent.
    in_flight: VecDeque<(OutgoingMessage, bool)>,
    /// The stepwise message under way.
    step: Option<Steps>,
    /// The client has sent XCLIENT or XFORWARD, if the server offers them.
    informed: bool,
}

/// A message whose recipients are added one at a time.
struct Steps {
    left: VecDeque<Recipient>,
    /// The reply to MAIL has arrived.
    begun: bool,
    accepted: usize,
}

fn messages() -> VecDeque<OutgoingMessage> {
    let recipient = |address: &str| Recipient::plain(Mailbox::parse_any(address).expect("a mailbox"));
    let from = ReversePath::Mailbox(Mailbox::parse("bob@w.example").expect("a mailbox"));
    let message = |from: &ReversePath, to: &[&str]| OutgoingMessage {
        envelope: Envelope { recipients: to.iter().map(|to| recipient(to)).collect(), ..Envelope::new(from.clone()) },
        size: 100,
        eight_bit: false,
        utf8_header: false,
        attempts: 0,
    };
    let one = message(&from, &["alice@example.org"]);
    let mut several = message(&from, &["alice@example.org", "bob@example.org", "eva@example.com", "joe@[192.0.2.1]"]);
    several.attempts = 1;
    let mut dsn = message(&ReversePath::Null, &["alice@example.org"]);
    dsn.envelope.ret = Some(Return::Header);
    dsn.envelope.envelope_id = Some("id+3D".to_owned());
    dsn.envelope.recipients[0].notify = Notify::parse(b"SUCCESS,DELAY").expect("a parameter");
    dsn.envelope.recipients[0].original = Some("rfc822;a+40b".to_owned());
    let mut utf8 = message(&from, &["j\u{fc}rgen@b\u{fc}cher.example", "alice@example.org"]);
    utf8.utf8_header = true;
    let mut eight_bit = message(&from, &["\"a b\"@example.org"]);
    eight_bit.eight_bit = true;
    eight_bit.envelope.body = Body::EightBit;
    VecDeque::from([one.clone(), several, dsn, utf8, eight_bit, one])
}

impl Session {
    fn new(how: u8, what: u8) -> Session {
        let work = [Work::Queue, Work::Stepwise, Work::Atrn, Work::EhloAgain][usize::from(what % 4)];
        let starttls = [StartTls::Never, StartTls::Offered, StartTls::Required, StartTls::Never][usize::from(how % 4)];
        let tls = how & 4 == 4;
        let login = Login::with_secret("acme".to_owned(), SECRET.to_vec());
        let options = ClientOptions {
            name: "client.example.org".to_owned(),
            starttls,
            tls: tls.then(channel),
            atrn: work == Work::Atrn,
            login: (how & 8 == 8).then_some(login),
            nonce: "nonce".to_owned(),
            lmtp: how & 16 == 16,
            chunking: how & 32 == 32,
            without_8bitmime: if how & 64 == 64 { Without8BitMime::Bounce } else { Without8BitMime::Send },
            submits: how & 128 == 128,
        };
        Session {
            client: Client::new(options),
            work,
            tls,
            tls_required: starttls == StartTls::Required,
            waiting: messages(),
            in_flight: VecDeque::new(),
            step: None,
            informed: what & 4 == 4,
        }
    }

    /// Lets the client write, and checks what it has written.
    fn send<T>(&mut self, write: impl FnOnce(&mut Client, &mut Vec<u8>) -> T) -> T {
        let mut out = Vec::new();
        let is_closing = self.client.closing();
        let result = write(&mut self.client, &mut out);
        let lines = check::commands(&out);
        assert!(!is_closing || lines.iter().all(|line| [&b"QUIT"[..], b"."].contains(line)), "{}", out.escape_ascii());
        if !self.client.extensions().pipelining {
            assert!(lines.len() <= 1, "without PIPELINING: {}", out.escape_ascii());
        }
        for line in lines {
            let word = line.split(|octet| *octet == b' ').next().unwrap_or_default();
            if self.tls_required && !self.tls {
                assert!([&b"EHLO"[..], b"LHLO", b"STARTTLS", b"QUIT"].contains(&word), "{}", line.escape_ascii());
            }
            let text = String::from_utf8_lossy(line);
            if !self.tls {
                assert!(!text.starts_with("AUTH PLAIN") && !text.contains(SECRET_IN_PLAIN), "{text}");
            }
        }
        result
    }

    /// Passes one reply of the server to the client. Returns `false` if the session is over.
    fn replied(&mut self, reply: Reply) -> bool {
        let (awaited, code) = (self.client.awaiting(), reply.code());
        let step = self.send(|client, out| client.reply(reply, out));
        let Ok(step) = step else {
            assert!(awaited.is_none() && code != 421);
            return false;
        };
        assert!(awaited.is_some() || code == 421);
        assert!(code != 421 || self.client.closing());
        if code == 421 && !matches!(step, ClientStep::MessageDone(_)) {
            // A session closes the connection then.
            if matches!(step, ClientStep::Replied(_)) && awaited == Some(Stage::Mail) {
                self.in_flight.clear();
            }
            return false;
        }
        match step {
            ClientStep::Wait => {}
            ClientStep::StartTls => {
                assert!(awaited == Some(Stage::StartTls) && !self.tls && code / 100 == 2);
                self.tls = true;
                self.send(|client, out| client.tls_started(channel(), out));
            }
            ClientStep::Ready => self.ready(),
            ClientStep::Replied(reply) => self.stepwise_replied(&reply),
            ClientStep::Content { chunk } => {
                assert!(chunk || awaited == Some(Stage::Data) && code / 100 == 3);
                self.content();
            }
            ClientStep::MessageDone(result) => {
                let (message, sent) = self.in_flight.pop_front().expect("a message was under way");
                done(&message, sent, &result, awaited == Some(Stage::Content));
            }
            ClientStep::Turned => {
                assert!(self.work == Work::Atrn && awaited == Some(Stage::Atrn) && code / 100 == 2);
                return false;
            }
            ClientStep::Abort(_) | ClientStep::Closed => return false,
        }
        assert_eq!(self.client.in_flight(), self.in_flight.len());
        assert!(self.in_flight.len() <= 2);
        self.more();
        true
    }

    fn ready(&mut self) {
        if self.client.closing() {
            return;
        }
        match self.work {
            Work::Atrn => {
                let domains = ["example.org", "example.com"].map(|name| Domain::parse(name).expect("a domain"));
                self.send(|client, out| client.atrn(&domains, out));
            }
            Work::EhloAgain => {
                self.work = Work::Queue;
                self.send(Client::ehlo_again);
            }
            Work::Stepwise if !self.informed => {
                self.informed = true;
                let address = "192.0.2.1".parse().expect("an address");
                let info = ClientInfo { address, helo: Some("a +=b".to_owned()), extended: true };
                self.send(|client, out| client.send_client_info(&info, out));
            }
            Work::Queue | Work::Stepwise => {}
        }
    }

    /// Sends what may be sent now.
    fn more(&mut self) {
        while self.work == Work::Queue && self.client.is_ready_for_message() {
            let Some(message) = self.waiting.pop_front() else { break };
            if !self.client.permits(&message.envelope.recipients) {
                break;
            }
            match self.send(|client, out| client.send_message(&message, out)) {
                Ok(()) => self.in_flight.push_back((message, false)),
                Err(result) => done(&message, false, &result, false),
            }
        }
        while self.work == Work::Stepwise && self.in_flight.is_empty() && self.client.is_ready_for_message() {
            let Some(message) = self.waiting.pop_front() else { break };
            if self.send(|client, out| client.begin_transaction(&message, out)).is_ok() {
                let left = message.envelope.recipients.iter().cloned().collect();
                self.step = Some(Steps { left, begun: false, accepted: 0 });
                self.in_flight.push_back((message, false));
            }
        }
        if self.waiting.is_empty()
            && self.in_flight.is_empty()
            && !self.client.closing()
            && self.client.awaiting().is_none()
        {
            self.send(Client::quit);
        }
    }

    /// The reply to MAIL or RCPT of a stepwise message.
    fn stepwise_replied(&mut self, reply: &Reply) {
        let mut steps = self.step.take().expect("a message is under way");
        match (reply.is_positive(), steps.begun) {
            (false, false) => return self.in_flight.clear(),
            (true, true) => steps.accepted += 1,
            _ => {}
        }
        steps.begun = true;
        while let Some(recipient) = steps.left.pop_front() {
            if self.send(|client, out| client.add_recipient(&recipient, out)).is_ok() {
                self.step = Some(steps);
                return;
            }
        }
        if steps.accepted == 0 {
            self.send(Client::abort_transaction);
            self.in_flight.clear();
            return;
        }
        // The result has only the recipients that were accepted.
        let (message, _) = self.in_flight.back_mut().expect("a message is under way");
        message.envelope.recipients.truncate(steps.accepted);
        if let ClientStep::Content { chunk } = self.send(|client, out| client.send_data(100, out)) {
            assert!(chunk);
            self.content();
        }
    }

    fn content(&mut self) {
        let (_, sent) = self.in_flight.front_mut().expect("a message is under way");
        assert!(!std::mem::replace(sent, true), "the content is sent once");
        self.send(Client::content_sent);
    }

    /// The connection is lost. Each message that was begun must have a result.
    fn lost(mut self) {
        let results = self.client.abandon(&connection_lost("lost"));
        if let (Some(steps), Some((message, _))) = (&self.step, self.in_flight.back_mut()) {
            message.envelope.recipients.truncate(steps.accepted);
        }
        assert_eq!(results.len(), self.in_flight.len());
        for ((message, sent), result) in self.in_flight.iter().zip(&results) {
            // With LMTP some recipients may have their replies.
            done(message, *sent, result, *sent);
        }
    }
}

fn channel() -> TlsChannel {
    TlsChannel { exporter: Some([7; 32]), client_certificate: None }
}

/// Checks that each recipient has one status, and that none is `Sent` without the content and a reply to it.
fn done(message: &OutgoingMessage, content_sent: bool, result: &DeliveryResult, replied: bool) {
    assert_eq!(result.recipients.len(), message.envelope.recipients.len());
    assert!(replied && content_sent || !result.recipients.iter().any(|status| status.is_sent()), "{result:?}");
}
