//! Both roles: each with a scripted peer, then the client with the server.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::client::{
    Abort, Client, ClientOptions, ClientStep, OutgoingMessage, Rejection, Stage, StartTls, Without8BitMime,
};
use super::command::{Body, Envelope, MailFrom, Notify, Recipient};
use super::content::{ContentDecoder, ContentEncoder};
use super::reply::{Reply, ReplyReader};
use super::server::{Incoming, MessageSink, Server, ServerOptions, ServerRole, ServerStep as Served, SessionHandler};
use super::status::{DecidedBy, DeliveryResult, RecipientStatus};
use crate::mail::address::{Domain, ForwardPath, Mailbox, ReversePath, reverse_path};
use crate::mail::received::ClientInfo;
use crate::sasl::{AccountCredentials, CredentialStore, Login, Mechanism, ScramVerifier, TlsChannel, Unavailable};

fn mailbox(text: &str) -> Mailbox {
    Mailbox::parse_any(text).unwrap()
}

fn message(recipients: usize) -> OutgoingMessage {
    let recipients =
        (0..recipients).map(|number| Recipient::plain(mailbox(&format!("r{number}@example.org")))).collect();
    let from = reverse_path(b"<a@b.example>").unwrap().0;
    let envelope = Envelope { recipients, ..Envelope::new(from) };
    OutgoingMessage { envelope, size: 3, eight_bit: false, utf8_header: false, attempts: 0 }
}

fn server_options(role: ServerRole) -> ServerOptions {
    ServerOptions {
        role,
        hostname: "relay.example.net".to_owned(),
        max_size: 1000,
        max_recipients: 100,
        max_errors: 20,
        max_auth_failures: 3,
        starttls: false,
        require_tls: false,
        dsn: false,
        soft_bounce: false,
        mechanisms: Mechanism::ALL.to_vec(),
    }
}

fn options() -> ClientOptions {
    ClientOptions { name: "me.example".to_owned(), ..ClientOptions::default() }
}

fn with_credentials(tls: bool) -> ClientOptions {
    ClientOptions { tls: under(tls), atrn: true, login: login(b"right"), ..options() }
}

/// TLS 1.3; `None`: the connection is in clear.
fn under(tls: bool) -> Option<TlsChannel> {
    tls.then_some(TLS_1_3)
}

const TLS_1_3: TlsChannel = TlsChannel { exporter: Some([7; 32]), client_certificate: None };

fn login(secret: &[u8]) -> Option<Login> {
    Some(Login::with_secret("acme".to_owned(), secret.to_vec()))
}

// ---- the client with a scripted peer ----

/// A client with a scripted peer.
struct Scripted {
    client: Client,
    reader: ReplyReader,
    out: Vec<u8>,
}

impl Scripted {
    fn new(options: ClientOptions) -> Scripted {
        Scripted { client: Client::new(options), reader: ReplyReader::default(), out: Vec::new() }
    }

    /// The step after a reply, whose lines are separated by `/`, and the commands that were sent.
    fn receive(&mut self, reply: &str) -> (String, String) {
        let mut whole = None;
        for line in reply.split('/') {
            assert!(whole.is_none(), "{reply}");
            whole = self.reader.line(line.as_bytes()).unwrap();
        }
        let step = match self.client.reply(whole.unwrap(), &mut self.out) {
            Ok(ClientStep::StartTls) => self.client.tls_started(TLS_1_3, &mut self.out),
            Ok(step) => step,
            Err(broken) => return (format!("{broken:?}"), String::new()),
        };
        let step = match step {
            ClientStep::MessageDone(result) => format!("Done {}", statuses(&result)),
            ClientStep::Abort(Abort::Rejected(Rejection { stage, reply })) => {
                format!("Rejected {stage} {}", reply.code())
            }
            other => format!("{other:?}"),
        };
        (step, self.sent())
    }

    fn sent(&mut self) -> String {
        let text = String::from_utf8(std::mem::take(&mut self.out)).unwrap();
        text.replace("\r\n", "/").trim_end_matches('/').to_owned()
    }

    fn send(&mut self, recipients: usize) -> String {
        self.client.send_message(&message(recipients), &mut self.out).unwrap();
        self.sent()
    }
}

/// `=250` sent, `~451` deferred, `!550` rejected, `?` in doubt.
fn statuses(result: &DeliveryResult) -> String {
    let word = |status: &RecipientStatus| match status {
        RecipientStatus::Sent(reply) => format!("={}", reply.code()),
        RecipientStatus::Deferred(reply) => format!("~{}", reply.code()),
        RecipientStatus::Rejected(reply) => format!("!{}", reply.code()),
        RecipientStatus::InDoubt => "?".to_owned(),
    };
    result.recipients.iter().map(word).collect::<Vec<_>>().join(" ")
}

/// After the replies in `path`, `reply` leads to `step`, and `sent` is sent.
fn check(options: ClientOptions, path: &[&str], reply: &str, step: &str, sent: &str) {
    let mut scripted = Scripted::new(options);
    for &before in path {
        match before.split_once(' ') {
            Some(("send", recipients)) => drop(scripted.send(recipients.parse().unwrap())),
            Some(("content", _)) => scripted.client.content_sent(&mut scripted.out),
            Some(("atrn", _)) => scripted.client.atrn(&[Domain::parse("example.org").unwrap()], &mut scripted.out),
            Some(("quit", _)) => scripted.client.quit(&mut scripted.out),
            _ => drop(scripted.receive(before)),
        }
        scripted.sent();
    }
    let got = scripted.receive(reply);
    assert_eq!((got.0.as_str(), got.1.as_str()), (step, sent), "{path:?} {reply}");
}

/// Rules: SMTP-33, SMTP-51, PIPE-04.
#[test]
fn every_reply_to_the_greeting_ehlo_and_helo() {
    let check = |path: &[&str], reply: &str, step: &str, sent: &str| check(options(), path, reply, step, sent);
    let up = "220 x";
    check(&[], "220 x", "Wait", "EHLO me.example");
    check(&[], "220-x/220-y/220 z", "Wait", "EHLO me.example");
    check(&[], "220", "Wait", "EHLO me.example");
    check(&[], "259 odd", "Wait", "EHLO me.example");
    check(&[], "354 x", "Rejected the greeting 354", "QUIT");
    check(&[], "459 x", "Rejected the greeting 459", "QUIT");
    check(&[], "554 x", "Rejected the greeting 554", "QUIT");
    check(&[], "421 x", "Rejected the greeting 421", "");
    check(&[up], "250 x", "Ready", "");
    check(&[up], "259 x", "Ready", "");
    check(&[up], "250-x/250-PIPELINING/250 UNKNOWN thing", "Ready", "");
    check(&[up], "500 x", "Wait", "HELO me.example");
    check(&[up], "599 x", "Wait", "HELO me.example");
    check(&[up], "451 x", "Rejected EHLO 451", "QUIT");
    check(&[up], "354 x", "Rejected EHLO 354", "QUIT");
    check(&[up], "421 x", "Rejected EHLO 421", "");
    check(&[up, "502 x"], "250 x", "Ready", "");
    check(&[up, "502 x"], "550 x", "Rejected HELO 550", "QUIT");
    check(&[up, "502 x"], "421 x", "Rejected HELO 421", "");
    check(&[up, "502 x", "550 x"], "221 bye", "Closed", "");
    check(&[up, "502 x", "550 x"], "500 what?", "Closed", "");
    check(&[up, "250 x", "quit "], "221 bye", "Closed", "");
    check(&[up, "250 x"], "421 shutting down", "Rejected the session 421", "");
    let unsolicited = "ProtocolViolation(\"the peer sent a reply without a command\")";
    check(&[up, "250 x"], "250 x", unsolicited, "");
    check(&[up, "250 x"], "550 x", unsolicited, "");
}

/// Rules: TLS-02, TLS-03, TLS-14.
#[test]
fn starttls_is_the_first_command_and_what_was_offered_in_clear_does_not_count() {
    let starttls = || ClientOptions { starttls: StartTls::Required, ..with_credentials(false) };
    let offers = "250-x/250-STARTTLS/250-AUTH CRAM-MD5/250 ATRN";
    check(starttls(), &["220 x"], offers, "Wait", "STARTTLS");
    check(starttls(), &["220 x"], "250-x/250-AUTH CRAM-MD5/250 ATRN", "Abort(NoStartTls)", "QUIT");
    // HELO cannot lead to the TLS that is required.
    check(starttls(), &["220 x"], "500 x", "Rejected EHLO 500", "QUIT");
    check(starttls(), &["220 x", offers], "220 go", "Wait", "EHLO me.example");
    check(starttls(), &["220 x", offers], "454 x", "Rejected STARTTLS 454", "QUIT");
    check(starttls(), &["220 x", offers], "501 x", "Rejected STARTTLS 501", "QUIT");
    check(starttls(), &["220 x", offers], "421 x", "Rejected STARTTLS 421", "");
    check(starttls(), &["220 x", offers, "220 go"], offers, "Wait", "AUTH CRAM-MD5");
    // ATRN was offered in clear only.
    check(starttls(), &["220 x", offers, "220 go"], "250 x", "Abort(NoAtrn)", "QUIT");
    check(
        starttls(),
        &["220 x", offers, "220 go"],
        "250-x/250 ATRN",
        "Abort(NoMechanism { starttls: false, certificate: false })",
        "QUIT",
    );
}

#[test]
fn every_reply_to_auth_and_atrn() {
    let offers = "250-x/250-AUTH CRAM-MD5 PLAIN/250 ATRN";
    let check = |path: &[&str], reply: &str, step: &str, sent: &str| {
        let path = [&["220 x", offers], path].concat();
        check(with_credentials(true), &path, reply, step, sent);
    };
    let plain = format!("AUTH PLAIN {}", data_encoding::BASE64.encode(b"\0acme\0right"));
    let challenge = "334 PDEuMkBoPg==";
    check(&[], challenge, "Wait", "YWNtZSA2NzZkMGI4NmI4ZmVkZWI4OGFmZWMzOWM3NTg4NThjNQ==");
    check(&[], "334 not base64", "Wait", "*");
    check(&["334 not base64"], "501 cancelled", "Wait", &plain);
    check(&["334 not base64"], "235 come in", "Abort(Unproven)", "QUIT");
    // A success before the challenge proves nothing.
    check(&[], "235 come in", "Abort(Unproven)", "QUIT");
    check(&[], "504 x", "Wait", &plain);
    check(&[], "534 x", "Wait", &plain);
    check(&[], "538 x", "Wait", &plain);
    check(&["504 x"], "504 x", "Rejected AUTH 504", "QUIT");
    check(&[], "535 x", "Rejected AUTH 535", "QUIT");
    check(&[], "454 x", "Rejected AUTH 454", "QUIT");
    check(&[], "421 x", "Rejected AUTH 421", "");
    check(&[challenge], "235 2.7.0 x", "Ready", "");
    check(&[challenge], "299 x", "Ready", "");
    check(&[challenge], challenge, "Wait", "*");
    check(&[challenge], "535 5.7.8 x", "Rejected AUTH 535", "QUIT");
    let nevertheless = "Abort(Unacceptable(\"accepts it nevertheless\"))";
    check(&[challenge, challenge], "235 x", nevertheless, "QUIT");
    check(&["504 x", "334 not base64"], "235 x", nevertheless, "QUIT");
    check(&["504 x"], "235 x", "Ready", "");
    let inside = |rest: &[&'static str]| [&[challenge, "235 x"], rest].concat();
    check(&inside(&["atrn "]), "250 x", "Turned", "");
    check(&inside(&["atrn "]), "259 x", "Turned", "");
    check(&inside(&["atrn "]), "450 x", "Rejected ATRN 450", "");
    check(&inside(&["atrn "]), "453 x", "Rejected ATRN 453", "");
    check(&inside(&["atrn "]), "530 x", "Rejected ATRN 530", "");
    check(&inside(&["atrn "]), "421 x", "Rejected ATRN 421", "");
    // After a rejection the client may send ATRN again, or QUIT.
    check(&inside(&["atrn ", "450 x", "atrn "]), "250 x", "Turned", "");
    check(&inside(&["atrn ", "450 x", "quit "]), "221 x", "Closed", "");
}

/// Rules: SCR-07.
#[test]
fn after_plus_no_weaker_mechanism_is_tried() {
    let scram = "250-x/250-AUTH SCRAM-SHA-256 CRAM-MD5 PLAIN/250 ATRN";
    let plus = "250-x/250-AUTH SCRAM-SHA-256-PLUS SCRAM-SHA-256 CRAM-MD5 PLAIN/250 ATRN";
    let check = |offers, path: &[&str], reply: &str, step: &str, sent: &str| {
        check(with_credentials(true), &[&["220 x", offers], path].concat(), reply, step, sent);
    };
    let initial = |mechanism, text: &str| format!("AUTH {mechanism} {}", data_encoding::BASE64.encode(text.as_bytes()));
    let challenge = |text: &str| format!("334 {}", data_encoding::BASE64.encode(text.as_bytes()));
    check(plus, &[], "535 x", "Rejected AUTH 535", "QUIT");
    // An attacker in between could read an exchange without the channel binding.
    check(plus, &[], "504 x", "Rejected AUTH 504", "QUIT");
    check(scram, &[], "504 x", "Wait", "AUTH CRAM-MD5");
    check(scram, &[], "235 come in", "Abort(Unproven)", "QUIT");
    let few = challenge("r=c,s=QUJD,i=1");
    check(scram, &[], &few, "Wait", "*");
    let problem = "Abort(Unacceptable(\"asks for 1 iterations of SCRAM, and this client accepts 4096 to 1000000\"))";
    check(scram, &[&few], "501 cancelled", problem, "QUIT");
    check(scram, &[&few], "235 come in", problem, "QUIT");

    let mut scripted = Scripted::new(ClientOptions { nonce: "c".to_owned(), ..with_credentials(true) });
    scripted.receive("220 x");
    assert_eq!(scripted.receive(plus).1, initial("SCRAM-SHA-256-PLUS", "p=tls-exporter,,n=acme,r=c"));
    let salt = data_encoding::BASE64.encode(b"sixteen octets..");
    let sent = scripted.receive(&challenge(&format!("r=cs,s={salt},i=4096"))).1;
    assert!(!sent.starts_with("AUTH") && sent.len() > 100, "{sent}");
    assert_eq!(scripted.receive("235 come in").0, "Abort(Unproven)");
}

/// Rules: AUTH-17, AUTH-19.
#[test]
fn no_secret_is_sent_in_clear_or_to_a_server_without_atrn() {
    let check = |tls, offers: &str, step: &str, sent: &str| {
        check(with_credentials(tls), &["220 x"], offers, step, sent);
    };
    check(false, "250-x/250-AUTH PLAIN/250 ATRN", "Abort(NoMechanism { starttls: false, certificate: false })", "QUIT");
    check(false, "250-x/250-AUTH PLAIN CRAM-MD5/250 ATRN", "Wait", "AUTH CRAM-MD5");
    check(true, "250-x/250 AUTH PLAIN CRAM-MD5", "Abort(NoAtrn)", "QUIT");
    check(true, "250-x/250-AUTH LOGIN/250 ATRN", "Abort(NoMechanism { starttls: false, certificate: false })", "QUIT");
    check(true, "500 x", "Rejected EHLO 500", "QUIT");
}

/// Rules: AUTH-11.
#[test]
fn an_initial_response_that_is_too_long_is_sent_after_the_challenge() {
    let options = ClientOptions { login: login(&[b'x'; 600]), ..with_credentials(true) };
    let mut scripted = Scripted::new(options);
    assert_eq!(scripted.receive("220 x").1, "EHLO me.example");
    assert_eq!(scripted.receive("250-x/250-AUTH PLAIN/250 ATRN").1, "AUTH PLAIN");
    let response = scripted.receive("334 ").1;
    assert_eq!(data_encoding::BASE64.decode(response.as_bytes()).unwrap().len(), 606);
}

/// Rules: SMTP-15, SMTP-42.
#[test]
fn one_command_at_a_time_without_pipelining() {
    let check = |path: &[&str], reply: &str, step: &str, sent: &str| {
        let path = [&["220 x", "250 x", "send 2"], path].concat();
        check(options(), &path, reply, step, sent);
    };
    check(&[], "250 x", "Wait", "RCPT TO:<r0@example.org>");
    check(&[], "259 x", "Wait", "RCPT TO:<r0@example.org>");
    check(&[], "250-x/250-y/250 z", "Wait", "RCPT TO:<r0@example.org>");
    check(&[], "354 x", "Done ~354 ~354", "");
    check(&[], "459 x", "Done ~459 ~459", "");
    check(&[], "550 x", "Done !550 !550", "");
    check(&[], "599 x", "Done !599 !599", "");
    check(&[], "421 x", "Done ~421 ~421", "");
    let mail = "250 x";
    check(&[mail], "250 x", "Wait", "RCPT TO:<r1@example.org>");
    check(&[mail], "550 x", "Wait", "RCPT TO:<r1@example.org>");
    check(&[mail, "550 x"], "251 x", "Wait", "DATA");
    check(&[mail, "251 x"], "550 x", "Wait", "DATA");
    check(&[mail, "550 x"], "450 x", "Done !550 ~450", "RSET");
    check(&[mail, "552 x"], "552 x", "Done ~552 ~552", "RSET");
    check(&[mail, "354 x"], "599 x", "Done ~354 !599", "RSET");
    check(&[mail, "550 x"], "421 x", "Done !550 ~421", "");
    check(&[mail, "550 x", "450 x"], "250 reset", "Wait", "");
    check(&[mail, "550 x", "450 x"], "500 what?", "Wait", "");
    check(&[mail, "550 x", "450 x", "250 reset", "send 1"], "250 x", "Wait", "RCPT TO:<r0@example.org>");
    let data = [mail, "250 x", "550 x"];
    let at = |rest: &[&'static str]| [&data, rest].concat();
    check(&data, "354 x", "Content { chunk: false }", "");
    check(&data, "399 x", "Content { chunk: false }", "");
    check(&data, "250 x", "Done ~451 !550", "RSET");
    check(&data, "451 x", "Done ~451 !550", "RSET");
    check(&data, "554 x", "Done !554 !550", "RSET");
    check(&data, "421 x", "Done ~421 !550", "");
    check(&at(&["354 x", "content "]), "250 x", "Done =250 !550", "");
    check(&at(&["354 x", "content "]), "259-x/259 y", "Done =259 !550", "");
    check(&at(&["354 x", "content "]), "354 x", "Done ~354 !550", "");
    check(&at(&["354 x", "content "]), "459 x", "Done ~459 !550", "");
    check(&at(&["354 x", "content "]), "552 x", "Done !552 !550", "");
    check(&at(&["354 x", "content "]), "421 x", "Done ~421 !550", "");
    // No reply is pending while content is being sent.
    check(&at(&["354 x"]), "452 x", "ProtocolViolation(\"the peer sent a reply without a command\")", "");
    check(&at(&["354 x"]), "421 x", "Rejected the session 421", "");
}

#[test]
fn a_group_at_a_time_with_pipelining() {
    let offers = "250-x/250-PIPELINING/250-SIZE 100/250 8BITMIME";
    let mut scripted = Scripted::new(options());
    scripted.receive("220 x");
    scripted.receive(offers);
    scripted.sent();
    let group = "MAIL FROM:<a@b.example> SIZE=3 BODY=8BITMIME/RCPT TO:<r0@example.org>/RCPT TO:<r1@example.org>/DATA";
    assert_eq!(scripted.send(2), group);
    assert!(!scripted.client.is_ready_for_message(), "DATA ends a group");
    let check = |path: &[&str], reply: &str, step: &str, sent: &str| {
        let path = [&["220 x", offers, "send 2"], path].concat();
        check(options(), &path, reply, step, sent);
    };
    let rejected = ["250 x", "550 x", "450 x"];
    let after = |rest: &[&'static str]| [&rejected, rest].concat();
    // RFC 2920 section 3.1: 354 although no recipient was accepted, so the content is a lone dot.
    check(&rejected, "354 x", "Wait", ".");
    check(&after(&["354 x"]), "250 x", "Done !550 ~450", "");
    check(&after(&["354 x"]), "554 x", "Done !550 ~450", "");
    check(&after(&["354 x"]), "421 x", "Done !550 ~450", "");
    check(&rejected, "554 x", "Done !550 ~450", "RSET");
    check(&rejected, "421 x", "Done !550 ~450", "");
    // After a rejected MAIL the replies to RCPT do not count.
    check(&["451 x", "503 x", "503 x"], "503 x", "Done ~451 ~451", "RSET");
    check(&["550 x", "503 x", "503 x"], "503 x", "Done !550 !550", "RSET");
    check(&["451 x", "250 x", "250 x"], "354 x", "Wait", ".");
    check(&["451 x", "250 x", "250 x", "354 x"], "250 x", "Done ~451 ~451", "");
}

#[test]
fn the_next_group_is_sent_after_the_final_dot() {
    let mut scripted = Scripted::new(options());
    scripted.receive("220 x");
    scripted.receive("250-x/250 PIPELINING");
    scripted.send(1);
    for reply in ["250 x", "250 x", "354 x"] {
        scripted.receive(reply);
        assert!(!scripted.client.is_ready_for_message());
    }
    scripted.client.content_sent(&mut scripted.out);
    assert!(scripted.client.is_ready_for_message());
    scripted.sent();
    assert_eq!(scripted.send(1), "MAIL FROM:<a@b.example>/RCPT TO:<r0@example.org>/DATA");
    assert!(!scripted.client.is_ready_for_message(), "two messages are in flight");
    assert_eq!(scripted.receive("250 x").0, "Done =250");
    assert_eq!(scripted.receive("250 x").0, "Wait");
    // QUIT waits for all replies, and stays queued if the commands of a message are dropped.
    let mut scripted = Scripted::new(options());
    scripted.receive("220 x");
    scripted.receive("250 x");
    scripted.sent();
    scripted.send(1);
    scripted.client.quit(&mut scripted.out);
    assert_eq!(scripted.sent(), "");
    assert_eq!(scripted.receive("550 x"), ("Done !550".to_owned(), "QUIT".to_owned()));
}

/// With an SMTPUTF8 that its sender has not declared, a host after the next one might reject a message that it can accept.
#[test]
fn only_submitted_mail_has_an_smtputf8_that_was_not_declared() {
    for submits in [false, true] {
        let mut peer = Scripted::new(ClientOptions { submits, ..options() });
        peer.receive("220 x");
        peer.receive("250-x/250-8BITMIME/250 SMTPUTF8");
        let message = OutgoingMessage { eight_bit: true, utf8_header: true, ..message(1) };
        let mut out = Vec::new();
        peer.client.send_message(&message, &mut out).unwrap();
        let expected: &[u8] = match submits {
            true => b"MAIL FROM:<a@b.example> BODY=8BITMIME SMTPUTF8\r\n",
            false => b"MAIL FROM:<a@b.example> BODY=8BITMIME\r\n",
        };
        assert_eq!(out, expected);
    }
}

/// Rules: SIZE-01.
#[test]
fn a_message_that_needs_a_missing_extension_is_not_sent() {
    let send = |offers: &str, change: fn(&mut OutgoingMessage)| {
        let without_8bitmime = Without8BitMime::Bounce;
        let mut scripted = Scripted::new(ClientOptions { without_8bitmime, ..options() });
        scripted.receive("220 x");
        scripted.receive(offers);
        scripted.sent();
        let mut message = message(2);
        change(&mut message);
        let result = scripted.client.send_message(&message, &mut scripted.out).err();
        assert_eq!(result.is_some(), scripted.out.is_empty());
        (result.map(|result| statuses(&result)).unwrap_or_default(), scripted.sent())
    };
    assert_eq!(send("250 x", |message| message.envelope.utf8 = true).0, "!553 !553");
    assert_eq!(
        send("250 x", |message| message.envelope.recipients[1] = Recipient::plain(mailbox("é@example.org"))).0,
        "!553 !553"
    );
    assert_eq!(send("250 x", |message| message.eight_bit = true).0, "!554 !554");
    assert_eq!(send("250-x/250 SIZE 2", |_| {}).0, "!552 !552");
    assert_eq!(send("250-x/250 SIZE 3", |_| {}).1, "MAIL FROM:<a@b.example> SIZE=3");
    assert_eq!(send("250-x/250 SIZE", |_| {}).1, "MAIL FROM:<a@b.example> SIZE=3");
    assert_eq!(send("250-x/250 size 0", |_| {}).1, "MAIL FROM:<a@b.example> SIZE=3");
    // RFC 6531 section 3.2: a domain needs no extension, as its A-labels are the same name.
    let labels = |message: &mut OutgoingMessage| {
        message.envelope.from = ReversePath::Mailbox(mailbox("A..b@x"));
        message.envelope.recipients.truncate(1);
        message.envelope.recipients[0] = Recipient::plain(mailbox("Eva@B\u{dc}CHER.example"));
    };
    assert_eq!(send("250-x/250 PIPELINING", labels).1, "MAIL FROM:<A..b@x>/RCPT TO:<Eva@xn--bcher-kva.example>/DATA");
    let sent = send("250-x/250-PIPELINING/250 SMTPUTF8", |message| {
        message.envelope.recipients.truncate(1);
        message.envelope.recipients[0] = Recipient::plain(mailbox("\u{e9}@B\u{dc}CHER.example"));
    });
    assert_eq!(sent.1, "MAIL FROM:<a@b.example> SMTPUTF8/RCPT TO:<\u{e9}@B\u{dc}CHER.example>/DATA");
    let utf8 = send("250-x/250-8BITMIME/250 SMTPUTF8", |message| message.envelope.utf8 = true);
    assert_eq!(utf8.1, "MAIL FROM:<a@b.example> BODY=8BITMIME SMTPUTF8");
    assert_eq!(
        send("250-x/250 8BITMIME", |message| message.envelope.body = Body::SevenBit).1,
        "MAIL FROM:<a@b.example>"
    );
}

/// A message with SMTPUTF8 is not: SMTPUTF8 requires 8BITMIME (RFC 6531 section 3.1).
#[test]
fn eight_bit_content_is_sent_without_8bitmime_by_default() {
    let send = |ehlo: &[&str], utf8: bool| {
        let mut scripted = Scripted::new(options());
        scripted.receive("220 x");
        ehlo.iter().for_each(|reply| drop(scripted.receive(reply)));
        scripted.sent();
        let mut message = message(1);
        message.eight_bit = true;
        (message.envelope.body, message.envelope.utf8) = (Body::EightBit, utf8);
        let result = scripted.client.send_message(&message, &mut scripted.out).err();
        result.map_or_else(|| scripted.sent(), |result| statuses(&result))
    };
    assert_eq!(send(&["250-x/250 PIPELINING"], false), "MAIL FROM:<a@b.example>/RCPT TO:<r0@example.org>/DATA");
    assert_eq!(send(&["500 what", "250 x"], false), "MAIL FROM:<a@b.example>");
    assert_eq!(send(&["250-x/250 8BITMIME"], false), "MAIL FROM:<a@b.example> BODY=8BITMIME");
    assert_eq!(send(&["250-x/250 SMTPUTF8"], true), "!554");
    assert_eq!(send(&["250 x"], true), "!553");
}

// ---- the server with a scripted client ----

/// A handler with scripted replies and one account.
#[derive(Default)]
struct ScriptedHandler {
    mixes: VecDeque<Mix>,
    now: Option<Mix>,
    recipients: usize,
}

impl CredentialStore for ScriptedHandler {
    fn credentials(&self, name: &str) -> Result<Option<AccountCredentials>, Unavailable> {
        match name {
            "broken" => Err(Unavailable),
            "acme" => Ok(Some(AccountCredentials { secret: Some(b"right".to_vec()), verifier: None })),
            _ => Ok(None),
        }
    }

    fn verifier(&self, name: &str) -> Result<(ScramVerifier, bool), Unavailable> {
        Ok(match CredentialStore::credentials(self, name)?.and_then(|found| found.secret) {
            Some(secret) => (ScramVerifier::new(&secret, b"sixteen octets..", 4096), true),
            None => (ScramVerifier::fake(b"key", name, &Default::default()), false),
        })
    }

    fn challenge(&self) -> String {
        "<1.1767323045@relay.example.net>".to_owned()
    }

    fn nonce(&self) -> String {
        "server".to_owned()
    }
}

impl SessionHandler for ScriptedHandler {
    fn credentials(&self) -> &dyn CredentialStore {
        self
    }

    fn receive(&mut self, _: &Envelope, _: &Incoming<'_>) -> Result<Box<dyn MessageSink>, Reply> {
        Err(Reply::new(451, "4.3.0", "nothing is stored here"))
    }

    fn sender(&mut self, _: &MailFrom, _: Option<&str>) -> Result<(), Reply> {
        self.now = self.mixes.pop_front();
        self.recipients = 0;
        self.now.as_ref().map_or(Ok(()), |mix| scripted_reply(mix.mail))
    }

    fn recipient(&mut self, path: &ForwardPath, _: &Notify, _: Option<&str>) -> Result<Mailbox, Reply> {
        let code = self.now.as_ref().and_then(|mix| mix.recipients.get(self.recipients)).copied();
        self.recipients += 1;
        scripted_reply(code.unwrap_or(250))?;
        match path {
            ForwardPath::Mailbox(mailbox) => Ok(mailbox.clone()),
            ForwardPath::Postmaster => Ok(mailbox("postmaster@example.org")),
        }
    }
}

fn scripted_reply(code: u16) -> Result<(), Reply> {
    match code {
        200..400 => Ok(()),
        code => Err(Reply::bare(code, "scripted")),
    }
}

/// One step as text: `250 2.0.0`, `close 421 4.7.0`, `data`, `chunk`, `chunk 503 5.5.1`, `atrn a,b`.
fn served(step: &Served) -> String {
    let reply = |reply: &Reply| format!("{} {}", reply.code(), reply.enhanced().unwrap_or_default()).trim().to_owned();
    match step {
        Served::Reply(sent) => reply(sent),
        Served::Close(sent) => format!("close {}", reply(sent)),
        Served::StartTls(_) => "starttls".to_owned(),
        Served::Data(_) => "data".to_owned(),
        Served::Chunk { rejected: None, .. } => "chunk".to_owned(),
        Served::Chunk { rejected: Some(sent), .. } => format!("chunk {}", reply(sent)),
        Served::Atrn(domains) => format!("atrn {}", domains.iter().map(Domain::as_str).collect::<Vec<_>>().join(",")),
    }
}

/// Checks that each line leads to its step. Like a driver, it ends content and starts TLS.
fn session(server_options: ServerOptions, tls: bool, lines: &[(&str, &str)]) {
    let mut server = Server::new(server_options, under(tls));
    for (number, (line, expected)) in lines.iter().enumerate() {
        let step = server.line(line.as_bytes(), &mut ScriptedHandler::default());
        assert_eq!(served(&step), *expected, "line {number}, {line:?} of {lines:?}");
        match step {
            Served::StartTls(_) => server.tls_started(TLS_1_3),
            Served::Data(_) => server.end_transaction(),
            Served::Chunk { last: true, rejected: None, .. } => server.end_transaction(),
            _ => {}
        }
    }
}

const EHLO: (&str, &str) = ("EHLO a.example", "250");
const MAIL: (&str, &str) = ("MAIL FROM:<a@b.example>", "250 2.1.0");
const RCPT: (&str, &str) = ("RCPT TO:<r@example.org>", "250 2.1.5");

/// Rules: SMTP-41.
#[test]
fn commands_out_of_their_order_get_503_or_530() {
    for role in [ServerRole::Inbound, ServerRole::Customer] {
        let check = |lines: &[(&str, &str)]| session(server_options(role), false, lines);
        check(&[("NOOP", "250 2.0.0"), ("RSET", "250 2.0.0"), ("HELP", "214 2.0.0"), ("VRFY a", "252 2.0.0")]);
        check(&[("MAIL FROM:<>", "503 5.5.1"), ("RCPT TO:<a@b.c>", "503 5.5.1"), ("DATA", "503 5.5.1")]);
        check(&[EHLO, (RCPT.0, "503 5.5.1"), MAIL, (MAIL.0, "503 5.5.1")]);
        check(&[EHLO, MAIL, ("DATA", "503 5.5.1"), RCPT, ("DATA", "data"), MAIL, RCPT, RCPT, ("DATA", "data")]);
        check(&[EHLO, MAIL, RCPT, ("RSET", "250 2.0.0"), ("DATA", "503 5.5.1"), MAIL]);
        check(&[EHLO, MAIL, RCPT, EHLO, ("DATA", "503 5.5.1"), MAIL]);
        check(&[("HELO a", "250"), MAIL, RCPT, ("HELO a", "250"), ("DATA", "503 5.5.1")]);
        check(&[EHLO, MAIL, RCPT, ("DATA x", "501 5.5.4"), ("DATA", "data")]);
        check(&[("QUIT", "close 221 2.0.0")]);
        check(&[("GET / HTTP/1.1", "close 421 4.7.0")]);
        check(&[("XYZZY", "500 5.5.1"), ("", "500 5.5.2"), ("ETRN x", "502 5.5.1"), ("EXPN x", "502 5.5.1")]);
        check(&[EHLO, ("AUTH PLAIN", "502 5.5.1"), ("ATRN", "502 5.5.1"), ("STARTTLS", "502 5.5.1")]);
        check(&[
            EHLO,
            ("MAIL FROM:<a@b.example> SIZE=1001", "552 5.3.4"),
            ("MAIL FROM:<a@b.example> SIZE=1000", "250 2.1.0"),
        ]);
        check(&[EHLO, MAIL, ("RCPT TO:<é@example.org>", "553 5.6.7"), RCPT]);
    }
    let odmr = |lines: &[(&str, &str)]| session(server_options(ServerRole::Odmr), true, lines);
    odmr(&[EHLO, ("VRFY a", "502 5.5.1"), ("XYZZY", "502 5.5.1"), ("TURN", "502 5.5.1")]);
    // Mail is accepted after AUTH only, and ATRN not inside a transaction.
    odmr(&[EHLO, ("MAIL FROM:<>", "530 5.7.0"), ("RCPT TO:<a@b.c>", "530 5.7.0"), ("DATA", "530 5.7.0")]);
    odmr(&[EHLO, ("BDAT 3", "chunk 530 5.7.0")]);
    let auth = ("AUTH PLAIN AGFjbWUAcmlnaHQ=", "235 2.7.0");
    odmr(&[EHLO, auth, MAIL, ("ATRN", "503 5.5.1"), RCPT, ("DATA", "data"), ("ATRN", "atrn ")]);
    odmr(&[EHLO, auth, ("MAIL FROM:<a@b.example> AUTH=<>", "250 2.1.0"), (auth.0, "503 5.5.1")]);
}

#[test]
fn the_octets_of_a_rejected_chunk_are_read() {
    let check = |lines: &[(&str, &str)]| session(server_options(ServerRole::Inbound), false, lines);
    check(&[("BDAT 3 LAST", "chunk 503 5.5.1")]);
    check(&[EHLO, MAIL, ("BDAT 3", "chunk 503 5.5.1"), (RCPT.0, "503 5.5.1")]);
    check(&[EHLO, MAIL, RCPT, ("BDAT 3", "chunk"), ("DATA", "503 5.5.1"), ("BDAT 0 LAST", "chunk"), MAIL]);
    check(&[EHLO, MAIL, RCPT, ("BDAT 3", "chunk"), (RCPT.0, "503 5.5.1"), ("BDAT 0 LAST", "chunk")]);
    check(&[EHLO, MAIL, RCPT, ("BDAT 600", "chunk"), ("BDAT 401 LAST", "chunk 552 5.3.4"), MAIL]);
    check(&[
        EHLO,
        MAIL,
        RCPT,
        ("BDAT 600", "chunk"),
        ("BDAT 401", "chunk 552 5.3.4"),
        ("BDAT 1 LAST", "chunk 503 5.5.1"),
        MAIL,
    ]);
    check(&[
        EHLO,
        MAIL,
        RCPT,
        ("BDAT 3 FIRST", "chunk 501 5.5.4"),
        ("BDAT 3", "chunk 503 5.5.1"),
        ("RSET", "250 2.0.0"),
        MAIL,
    ]);
    check(&[EHLO, MAIL, RCPT, ("BDAT", "501 5.5.4"), ("BDAT x", "501 5.5.4"), ("BDAT 3 LAST", "chunk")]);
    check(&[EHLO, MAIL, RCPT, ("BDAT 99999999999999999999", "close 552 5.3.4")]);
}

#[test]
fn every_reply_to_auth() {
    let base64 = |octets: &[u8]| data_encoding::BASE64.encode(octets);
    let plain = |message: &[u8]| format!("AUTH PLAIN {}", base64(message));
    let right = plain(b"\0acme\0right");
    let check =
        |tls, lines: &[(&str, &str)]| session(server_options(ServerRole::Odmr), tls, &[&[EHLO], lines].concat());
    check(
        true,
        &[(&right, "235 2.7.0"), (&right, "503 5.5.1"), ("ATRN a.example,b.example", "atrn a.example,b.example")],
    );
    check(true, &[(&plain(b"acme\0acme\0right"), "235 2.7.0")]);
    check(
        true,
        &[(&plain(b"\0acme\0wrong"), "535 5.7.8"), ("ATRN", "530 5.7.0"), (&right, "235 2.7.0"), ("ATRN", "atrn ")],
    );
    check(true, &[(&plain(b"\0nobody\0right"), "535 5.7.8"), (&plain(b"other\0acme\0right"), "535 5.7.8")]);
    check(true, &[(&plain(b"\0broken\0x"), "454 4.7.0"), (&plain(b"malformed"), "501 5.5.2")]);
    check(true, &[("AUTH PLAIN =", "501 5.5.2"), ("AUTH PLAIN !", "501 5.5.2"), ("AUTH PLAIN *", "501 5.7.0")]);
    check(true, &[("AUTH PLAIN", "334"), ("*", "501 5.7.0"), ("AUTH PLAIN", "334"), ("AGFjbWUAcmlnaHQ=", "235 2.7.0")]);
    check(true, &[("AUTH PLAIN", "334"), ("no base64", "501 5.5.2"), ("NOOP", "250 2.0.0")]);
    check(true, &[("AUTH PLAIN", "334"), ("", "501 5.5.2"), ("NOOP", "250 2.0.0")]);
    check(true, &[("AUTH CRAM-MD5 PDE+", "501 5.7.0"), ("AUTH LOGIN", "504 5.5.4"), ("AUTH", "501 5.5.4")]);
    check(true, &[("AUTH CRAM-MD5", "334"), ("*", "501 5.7.0"), ("AUTH cram-md5", "334"), ("eA==", "501 5.5.2")]);
    // PLAIN is not offered in clear (RFC 4954 section 4).
    check(false, &[("AUTH PLAIN", "504 5.5.4"), (&right, "504 5.5.4"), ("AUTH CRAM-MD5", "334"), ("*", "501 5.7.0")]);
    // RFC 9266 section 4.1: whatever the result of the exchange, only QUIT follows.
    let plus = format!("AUTH SCRAM-SHA-256-PLUS {}", data_encoding::BASE64.encode(b"p=tls-exporter,,n=acme,r=c"));
    let foreign = format!("AUTH SCRAM-SHA-256-PLUS {}", data_encoding::BASE64.encode(b"p=tls-unique,,n=acme,r=c"));
    let used_up = [("NOOP", "close 421 4.7.0")];
    check(true, &[&[(plus.as_str(), "334"), ("*", "501 5.7.0")], &used_up[..]].concat());
    check(true, &[&[(plus.as_str(), "334"), ("eA==", "501 5.5.2")], &used_up[..]].concat());
    check(true, &[&[(foreign.as_str(), "535 5.7.8")], &used_up[..]].concat());
    check(true, &[(&foreign, "535 5.7.8"), ("QUIT", "close 221 2.0.0")]);
    check(false, &[(&plus, "504 5.5.4"), ("NOOP", "250 2.0.0")]);
    // RFC 4954 section 9.
    let wrong = plain(b"\0acme\0wrong");
    let failed = (wrong.as_str(), "535 5.7.8");
    check(true, &[failed, failed, failed, (&right, "close 421 4.7.0")]);
    session(server_options(ServerRole::Odmr), true, &[(&right, "503 5.5.1"), ("HELO a", "250"), (&right, "503 5.5.1")]);
    let required = ServerOptions { require_tls: true, starttls: true, ..server_options(ServerRole::Odmr) };
    let secured = [EHLO, ("AUTH CRAM-MD5", "530 5.7.0"), ("ATRN", "530 5.7.0"), ("STARTTLS", "starttls")];
    let inside =
        [(right.as_str(), "503 5.5.1"), EHLO, ("STARTTLS", "503 5.5.1"), (&right, "235 2.7.0"), ("ATRN", "atrn ")];
    session(required, false, &[&secured[..], &inside].concat());

    let mut server = Server::new(server_options(ServerRole::Odmr), under(true));
    server.line(b"EHLO a", &mut ScriptedHandler::default());
    server.line(b"AUTH PLAIN", &mut ScriptedHandler::default());
    assert!(server.in_auth());
    assert_eq!(served(&server.line_too_long(&mut ScriptedHandler::default())), "500 5.5.6");
    assert!(!server.in_auth());
    assert_eq!(served(&server.line_too_long(&mut ScriptedHandler::default())), "500 5.5.2");
}

#[test]
fn what_ehlo_offers() {
    let offers = |server_options: ServerOptions, tls| match Server::new(server_options, under(tls))
        .line(b"EHLO a", &mut ScriptedHandler::default())
    {
        Served::Reply(reply) => reply.lines().collect::<Vec<_>>().join("/"),
        other => panic!("{other:?}"),
    };
    let mail =
        "relay.example.net/PIPELINING/SIZE 1000/8BITMIME/SMTPUTF8/ENHANCEDSTATUSCODES/LIMITS RCPTMAX=100/CHUNKING";
    assert_eq!(offers(server_options(ServerRole::Inbound), false), mail);
    assert_eq!(offers(server_options(ServerRole::Customer), true), mail);
    let starttls = |role| ServerOptions { starttls: true, ..server_options(role) };
    assert_eq!(offers(starttls(ServerRole::Inbound), false), format!("{mail}/STARTTLS"));
    assert_eq!(offers(starttls(ServerRole::Inbound), true), mail);
    assert_eq!(offers(starttls(ServerRole::Customer), false), mail);
    assert_eq!(
        offers(ServerOptions { dsn: true, ..server_options(ServerRole::Submission) }, false),
        format!("{mail}/DSN")
    );
    let odmr = |mechanisms| format!("{mail}{mechanisms}/ATRN");
    assert_eq!(
        offers(server_options(ServerRole::Odmr), true),
        odmr("/AUTH SCRAM-SHA-256-PLUS SCRAM-SHA-256 CRAM-MD5 PLAIN")
    );
    assert_eq!(offers(server_options(ServerRole::Odmr), false), odmr("/AUTH SCRAM-SHA-256 CRAM-MD5"));
    let required = ServerOptions { require_tls: true, ..starttls(ServerRole::Odmr) };
    assert_eq!(offers(required, false), odmr("/STARTTLS"));
}

#[test]
fn too_many_failed_commands_or_recipients_close_the_session() {
    let mut server = Server::new(
        ServerOptions { max_errors: 5, max_recipients: 2, ..server_options(ServerRole::Inbound) },
        under(false),
    );
    let mut send_reply = |line: &str| served(&server.line(line.as_bytes(), &mut ScriptedHandler::default()));
    for line in ["EHLO a", "X", "X", "X", "NOOP", MAIL.0, RCPT.0, "RCPT TO:<s@example.org>"] {
        send_reply(line);
    }
    assert_eq!(send_reply("RCPT TO:<t@example.org>"), "452 4.5.3");
    assert_eq!(send_reply("X"), "500 5.5.1");
    assert_eq!(send_reply("X"), "close 421 4.7.0");
}

#[test]
fn an_unauthenticated_client_that_sends_no_mail_has_a_limit_of_commands() {
    let (hello, mail) = (["EHLO a"], ["EHLO a", MAIL.0, RCPT.0]);
    let junk: [(&[&str], &[&str]); 9] = [
        (&hello, &["NOOP"]),
        (&hello, &["HELP"]),
        (&hello, &["VRFY x"]),
        (&hello, &["RSET"]),
        (&[], &["EHLO a"]),
        (&hello, &["MAIL FROM:<a@b.example> SIZE=2000"]),
        (&hello, &[MAIL.0, "RSET"]),
        (&mail, &[RCPT.0]),
        (&mail, &["BDAT 0"]),
    ];
    let limit = 102;
    for role in [ServerRole::Inbound, ServerRole::Submission, ServerRole::Customer] {
        for (before, repeated) in junk {
            let mut server = Server::new(ServerOptions { max_recipients: 2, ..server_options(role) }, under(false));
            // The count begins anew with the accepted recipient.
            let left =
                limit - before.iter().rev().position(|line| *line == RCPT.0).map_or(before.len(), |after| after + 1);
            let lines = before.iter().chain(repeated.iter().cycle().take(left));
            let mut send = |line: &str| served(&server.line(line.as_bytes(), &mut ScriptedHandler::default()));
            lines.for_each(|line| assert!(!send(line).starts_with("close"), "{role:?} {line}"));
            let reply = send(repeated[left % repeated.len()]);
            assert_eq!(reply == "close 421 4.7.0", role == ServerRole::Inbound, "{role:?} {repeated:?}: {reply}");
        }
    }
    // A message resets the count, and deferrals do not count.
    let mut server =
        Server::new(ServerOptions { max_recipients: 2, ..server_options(ServerRole::Inbound) }, under(false));
    let send = |server: &mut Server, line: &str| served(&server.line(line.as_bytes(), &mut ScriptedHandler::default()));
    send(&mut server, "EHLO a");
    for _ in 0..3 {
        for line in [MAIL.0, RCPT.0, "RCPT TO:<s@example.org>"] {
            assert!(send(&mut server, line).starts_with("250"));
        }
        for _ in 0..300 {
            assert_eq!(send(&mut server, "RCPT TO:<t@example.org>"), "452 4.5.3");
        }
        (0..90).for_each(|_| assert_eq!(send(&mut server, "NOOP"), "250 2.0.0"));
        server.end_transaction();
    }
    // The first recipient of each transaction resets it, too: a host may verify addresses before it accepts mail for them.
    for line in [MAIL.0, RCPT.0, "RSET"].iter().cycle().take(1000) {
        assert!(send(&mut server, line).starts_with("250"));
    }
}

#[test]
fn a_client_on_port_366_may_repeat_commands_after_it_has_authenticated() {
    let mut server = Server::new(server_options(ServerRole::Odmr), under(true));
    let mut send = |line: &str| served(&server.line(line.as_bytes(), &mut ScriptedHandler::default()));
    send("EHLO a");
    (1..200).for_each(|_| assert_eq!(send(MAIL.0), "530 5.7.0"));
    assert_eq!(send(MAIL.0), "close 421 4.7.0");
    let mut server = Server::new(server_options(ServerRole::Odmr), under(true));
    let mut send = |line: &str| served(&server.line(line.as_bytes(), &mut ScriptedHandler::default()));
    send("EHLO a");
    assert_eq!(send("AUTH PLAIN AGFjbWUAcmlnaHQ="), "235 2.7.0");
    (0..1000).for_each(|_| assert_eq!(send("NOOP"), "250 2.0.0"));
}

#[test]
fn received_has_the_protocol_and_the_client() {
    let received = |server_options: ServerOptions, tls, lines: &[&str]| {
        let mut server = Server::new(server_options, under(tls));
        lines.iter().for_each(|line| drop(server.line(line.as_bytes(), &mut ScriptedHandler::default())));
        let (_, incoming) = server.incoming("1", "[192.0.2.1]", tls.then_some("TLSv1.3")).unwrap();
        incoming.received.field("id1", "Fri, 02 Jan 2026 03:04:05 +0000").replace("\n\t", " ")
    };
    let inbound = || server_options(ServerRole::Inbound);
    let date = "Fri, 02 Jan 2026 03:04:05 +0000\n";
    assert_eq!(
        received(inbound(), true, &["EHLO a.example", MAIL.0, RCPT.0]),
        format!(
            "Received: from a.example ([192.0.2.1]) by relay.example.net with ESMTPS (TLSv1.3) \
             id id1 for <r@example.org>; {date}"
        )
    );
    let with = |server_options, tls, lines: &[&str]| {
        let line = received(server_options, tls, lines);
        line.split(" with ").nth(1).unwrap().split(' ').next().unwrap().to_owned()
    };
    assert_eq!(with(inbound(), false, &["HELO a", MAIL.0]), "SMTP");
    assert_eq!(with(inbound(), true, &["HELO a", MAIL.0]), "SMTP");
    assert_eq!(with(inbound(), false, &["EHLO a", MAIL.0]), "ESMTP");
    assert_eq!(with(inbound(), true, &["EHLO a", "MAIL FROM:<a@b.example> SMTPUTF8"]), "UTF8SMTPS");
    assert!(received(inbound(), false, &["EHLO a(b", MAIL.0]).starts_with("Received: from unknown ("));
    let two = received(inbound(), false, &["EHLO a", MAIL.0, RCPT.0, "RCPT TO:<s@example.org>"]);
    assert!(!two.contains("example.org"), "{two}");
}

/// Lines of a client, valid and invalid.
fn lines() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let known = proptest::sample::select(vec![
        "EHLO a.example",
        "HELO a",
        "EHLO",
        "MAIL FROM:<a@b.example>",
        "MAIL FROM:<> SIZE=2000",
        "RCPT TO:<r@example.org>",
        "RCPT TO:<s@example.org>",
        "RCPT TO:<Postmaster>",
        "RCPT TO:r",
        "DATA",
        "DATA x",
        "BDAT 10",
        "BDAT 10 LAST",
        "BDAT 2000",
        "BDAT 5 NOW",
        "BDAT 999999999999",
        "RSET",
        "NOOP",
        "HELP",
        "VRFY x",
        "QUIT",
        "STARTTLS",
        "AUTH PLAIN",
        "AUTH PLAIN AGFjbWUAcmlnaHQ=",
        "AUTH PLAIN AGFjbWUAd3Jvbmc=",
        "AUTH CRAM-MD5",
        "AGFjbWUAcmlnaHQ=",
        "*",
        "ATRN",
        "ATRN example.org",
        "ATRN x",
        "GET / HTTP/1.0",
        "XYZZY",
    ]);
    let any = prop_oneof![9 => known.prop_map(|line| line.as_bytes().to_vec()), 1 => any::<Vec<u8>>()];
    proptest::collection::vec(any, 0..40)
}

proptest! {
    /// Each command has one reply (RFC 5321 section 4.2) with an enhanced code of its class (RFC 2034 section 4), content is
    /// read only for an accepted recipient, and authentication stays (ODMR-06).
    /// Rules: SMTP-36, ESC-02.
    #[test]
    fn each_line_has_one_reply_and_leads_to_a_permitted_step(
        lines in lines(),
        role in proptest::sample::select(vec![ServerRole::Inbound, ServerRole::Odmr, ServerRole::Customer]),
        (tls, starttls, require_tls) in any::<(bool, bool, bool)>(),
        codes in proptest::collection::vec(proptest::sample::select(vec![250u16, 250, 450, 550]), 0..10),
    ) {
        let mut server = Server::new(ServerOptions { starttls, require_tls, ..server_options(role) }, under(tls));
        let mut handler = ScriptedHandler::default();
        handler.mixes.extend(codes.iter().map(|code| Mix { mail: *code, recipients: codes.clone(), data: 354, end: 250 }));
        let mut account: Option<String> = None;
        for line in &lines {
            let before = server.in_auth();
            let step = server.line(line, &mut handler);
            let replies = match &step {
                Served::Reply(reply) | Served::Close(reply) | Served::StartTls(reply) | Served::Data(reply) => vec![reply],
                Served::Chunk { rejected, .. } => rejected.iter().collect(),
                Served::Atrn(_) => vec![],
            };
            for reply in replies {
                let class = reply.enhanced().map(|enhanced| u16::from(enhanced.as_bytes()[0] - b'0'));
                let bare = matches!(reply.code(), 334 | 354) || line.to_ascii_uppercase().get(1..4) == Some(b"HLO")
                    || line.to_ascii_uppercase().get(1..4) == Some(b"ELO");
                let scripted = reply.lines().next() == Some("scripted");
                prop_assert!(class == Some(reply.code() / 100) || (class.is_none() && (bare || scripted)), "{reply:?}");
                let mut octets = Vec::new();
                reply.write_to(&mut octets);
                let mut reader = ReplyReader::default();
                let whole = octets.split_inclusive(|octet| *octet == b'\n').filter(|line| {
                    reader.line(line.strip_suffix(b"\r\n").expect("CRLF")).unwrap().is_some()
                });
                prop_assert_eq!(whole.count(), 1, "one reply");
            }
            match step {
                Served::Reply(ref reply) => prop_assert_eq!(server.in_auth(), reply.code() == 334),
                Served::Close(_) => break,
                Served::StartTls(_) => {
                    prop_assert!(account.is_none());
                    server.tls_started(TLS_1_3);
                    prop_assert!(server.client_name().is_none());
                }
                Served::Data(_) => {
                    prop_assert!(!before && !server.transaction().unwrap().envelope.recipients.is_empty());
                    server.end_transaction();
                }
                Served::Chunk { rejected: None, last, .. } => {
                    prop_assert!(!server.transaction().unwrap().envelope.recipients.is_empty());
                    if last { server.end_transaction() }
                }
                Served::Chunk { .. } => {}
                Served::Atrn(_) => prop_assert!(account.is_some() && role == ServerRole::Odmr && (tls || starttls || !require_tls)),
            }
            prop_assert!(account.is_none() || server.account() == account.as_deref(), "ODMR-06");
            account = server.account().map(str::to_owned);
        }
    }

    /// The result has a status for each recipient.
    #[test]
    fn each_message_has_one_result_whatever_the_peer_replies(
        pipelining: bool,
        codes in proptest::collection::vec(proptest::sample::select(vec![250u16, 250, 250, 354, 354, 451, 550, 421, 552, 259]), 0..60),
    ) {
        let mut client = Client::new(options());
        let (mut out, mut given, mut settled) = (Vec::new(), 0, 0);
        client.reply(Reply::bare(220, "x"), &mut out).unwrap();
        let ehlo = Reply::bare(250, "x");
        client.reply(if pipelining { ehlo.with_line("PIPELINING") } else { ehlo }, &mut out).unwrap();
        for code in codes {
            while client.is_ready_for_message() {
                client.send_message(&message(1 + given % 3), &mut out).unwrap();
                given += 1;
            }
            match client.reply(Reply::bare(code, "x"), &mut out) {
                Ok(ClientStep::Content { .. }) => client.content_sent(&mut out),
                Ok(ClientStep::MessageDone(result)) => {
                    prop_assert_eq!(result.recipients.len(), 1 + settled % 3);
                    settled += 1;
                }
                Ok(_) => {}
                Err(_) => break,
            }
            prop_assert_eq!(client.in_flight(), given - settled);
            if code == 421 {
                prop_assert!(client.closing());
                break;
            }
        }
        for result in client.abandon(&Reply::bare(441, "gone")) {
            prop_assert_eq!(result.recipients.len(), 1 + settled % 3);
            settled += 1;
        }
        prop_assert_eq!(given, settled);
        prop_assert_eq!(client.in_flight(), 0);
    }
}

// ---- both roles, joined ----

/// The replies of a server in one transaction. 0 as `end`: it closes without a reply.
#[derive(Clone, Debug)]
struct Mix {
    mail: u16,
    recipients: Vec<u16>,
    data: u16,
    end: u16,
}

impl Mix {
    fn good(recipients: usize) -> Mix {
        Mix { mail: 250, recipients: vec![250; recipients], data: 354, end: 250 }
    }
}

/// The server, and its end of the connection.
struct Peer {
    server: Server,
    handler: ScriptedHandler,
    content: Option<(ContentDecoder, Vec<u8>, bool)>,
    messages: Vec<(Vec<String>, Vec<u8>)>,
    replies: usize,
    /// The connection is cut instead of this reply.
    cut: Option<usize>,
    closed: bool,
    pipelining: bool,
    knows_ehlo: bool,
    /// Replies 354 although no recipient was accepted (RFC 2920 section 3.1 permits it).
    always_354: bool,
    /// Each reply has three lines.
    multiline: bool,
}

impl Peer {
    fn new(server_options: ServerOptions, tls: bool, mixes: impl IntoIterator<Item = Mix>) -> Peer {
        Peer {
            server: Server::new(server_options, under(tls)),
            handler: ScriptedHandler { mixes: mixes.into_iter().collect(), ..ScriptedHandler::default() },
            content: None,
            messages: Vec::new(),
            replies: 0,
            cut: None,
            closed: false,
            pipelining: true,
            knows_ehlo: true,
            always_354: false,
            multiline: false,
        }
    }

    fn send_reply(&mut self, reply: &Reply, out: &mut Vec<u8>) {
        self.closed |= self.cut == Some(self.replies);
        if self.closed {
            return;
        }
        self.replies += 1;
        let mut octets = Vec::new();
        reply.write_to(&mut octets);
        let text = String::from_utf8(octets).unwrap();
        let text = if self.pipelining { text } else { text.replace("250-PIPELINING\r\n", "") };
        if self.multiline && !text.starts_with("334") {
            out.extend_from_slice(format!("{}-first\r\n{0}-\r\n", reply.code()).as_bytes());
        }
        out.extend_from_slice(text.as_bytes());
        self.closed |= reply.code() == 421;
    }

    /// Reads the input, content octet by octet, and replies.
    fn feed(&mut self, input: &mut Vec<u8>, out: &mut Vec<u8>) {
        while !self.closed && !input.is_empty() {
            if self.content.is_some() {
                self.read_content(input, out);
                continue;
            }
            let Some(end) = input.windows(2).position(|two| two == b"\r\n") else { return };
            let line: Vec<u8> = input.drain(..end + 2).take(end).collect();
            let groups = self.pipelining && [&b"MAIL"[..], b"RCPT", b"RSET"].iter().any(|verb| line.starts_with(verb));
            assert!(groups || input.is_empty(), "{:?} after {:?}", input.escape_ascii(), line.escape_ascii());
            self.command(&line, out);
        }
    }

    fn read_content(&mut self, input: &mut Vec<u8>, out: &mut Vec<u8>) {
        let (decoder, octets, _) = self.content.as_mut().unwrap();
        let fed = decoder.feed(&input[..1], octets);
        input.drain(..fed.used);
        if !fed.end {
            return;
        }
        let (_, octets, real) = self.content.take().unwrap();
        if !real {
            assert!(octets.is_empty(), "a lone dot");
            self.server.end_transaction();
            return self.send_reply(&Reply::bare(554, "no recipients"), out);
        }
        let code = self.handler.now.as_ref().map_or(250, |mix| mix.end);
        if code == 250 {
            let recipients = &self.server.transaction().unwrap().envelope.recipients;
            self.messages.push((recipients.iter().map(|recipient| recipient.mailbox.to_string()).collect(), octets));
        }
        self.server.end_transaction();
        self.closed |= code == 0;
        self.send_reply(&Reply::bare(code.max(200), "end"), out);
    }

    fn command(&mut self, line: &[u8], out: &mut Vec<u8>) {
        if !self.knows_ehlo && line.starts_with(b"EHLO") {
            return self.send_reply(&Reply::bare(500, "EHLO?"), out);
        }
        let no_recipient =
            self.server.transaction().is_none_or(|transaction| transaction.envelope.recipients.is_empty());
        if self.always_354 && line == b"DATA" && no_recipient {
            self.content = Some((ContentDecoder::data(), Vec::new(), false));
            return self.send_reply(&Reply::bare(354, "no recipients"), out);
        }
        match self.server.line(line, &mut self.handler) {
            Served::Reply(reply) => self.send_reply(&reply, out),
            Served::Close(reply) => {
                self.send_reply(&reply, out);
                self.closed = true;
            }
            Served::StartTls(reply) => {
                self.send_reply(&reply, out);
                self.server.tls_started(TLS_1_3);
            }
            Served::Data(reply) => match self.handler.now.as_ref().map_or(354, |mix| mix.data) {
                354 => {
                    self.content = Some((ContentDecoder::data(), Vec::new(), true));
                    self.send_reply(&reply, out);
                }
                code => {
                    self.server.end_transaction();
                    self.send_reply(&Reply::bare(code, "scripted"), out);
                }
            },
            Served::Atrn(_) => self.send_reply(&Reply::new(250, "2.0.0", "OK now reversing the connection"), out),
            Served::Chunk { .. } => panic!("the client does not send BDAT"),
        }
    }
}

/// The result of a session.
#[derive(Debug, Default)]
struct Run {
    results: Vec<DeliveryResult>,
    abort: Option<Abort>,
    turned: bool,
    sent_quit: bool,
    /// The most messages that were in flight.
    deepest: usize,
    /// Messages whose content was sent.
    sent: usize,
}

const CONTENT: &[u8] = b"a\n.b\n..\n";

/// Runs client and server alternately, up to the end of the session.
fn run_session(client: &mut Client, peer: &mut Peer, messages: impl IntoIterator<Item = OutgoingMessage>) -> Run {
    let mut messages = messages.into_iter();
    let (mut up, mut down, mut run) = (Vec::new(), Vec::new(), Run::default());
    let mut reader = ReplyReader::default();
    let greeting = peer.server.greeting();
    peer.send_reply(&greeting, &mut down);
    loop {
        let mut moved = false;
        while let Some(end) = down.windows(2).position(|two| two == b"\r\n") {
            moved = true;
            let line: Vec<u8> = down.drain(..end + 2).take(end).collect();
            let Some(reply) = reader.line(&line).unwrap() else { continue };
            let (gone, sent) = (reply.code() == 421, up.len());
            match client.reply(reply, &mut up).unwrap() {
                ClientStep::Wait | ClientStep::Ready | ClientStep::Replied(_) => {}
                ClientStep::StartTls => drop(client.tls_started(TLS_1_3, &mut up)),
                ClientStep::Content { .. } => {
                    let mut encoder = ContentEncoder::data();
                    encoder.feed(CONTENT, &mut up);
                    encoder.finish(&mut up);
                    client.content_sent(&mut up);
                    run.sent += 1;
                }
                ClientStep::MessageDone(result) => run.results.push(result),
                ClientStep::Turned => {
                    run.turned = true;
                    return run;
                }
                ClientStep::Abort(abort) => run.abort = Some(abort),
                ClientStep::Closed => return run,
            }
            if gone {
                run.results.extend(client.abandon(&lost()));
                assert_eq!((down.len(), up.len()), (0, sent), "nothing is sent after 421");
                return run;
            }
        }
        while client.is_ready_for_message() {
            moved = true;
            match messages.next() {
                Some(message) => client.send_message(&message, &mut up).unwrap(),
                None if client.in_flight() == 0 && run.abort.is_none() && client.extensions().atrn => {
                    client.atrn(&[], &mut up);
                }
                None if client.in_flight() == 0 => client.quit(&mut up),
                None => break,
            }
            run.deepest = run.deepest.max(client.in_flight());
        }
        run.sent_quit |= up.ends_with(b"QUIT\r\n");
        moved |= !up.is_empty();
        peer.feed(&mut up, &mut down);
        if peer.closed && down.is_empty() {
            run.results.extend(client.abandon(&lost()));
            return run;
        }
        assert!(moved || !down.is_empty(), "neither side can go on");
    }
}

fn lost() -> Reply {
    Reply::bare(441, "the connection was lost")
}

/// The statuses that follow from a mix by RFC 5321 (sections 3.3, 4.2.1, 4.5.3.1.10), RFC 2920 and RFC 1047.
fn statuses_by_the_rfcs(mix: &Mix) -> String {
    let class = |code: u16| if code >= 500 { format!("!{code}") } else { format!("~{code}") };
    let total = mix.recipients.len();
    if mix.mail != 250 {
        return vec![class(mix.mail); total].join(" ");
    }
    let shutdown = mix.recipients.iter().position(|code| *code == 421);
    let own = |code: u16| if code == 552 { "~552".to_owned() } else { class(code) };
    let accepted_any = mix.recipients.contains(&250);
    let accepted = match (shutdown, accepted_any, mix.data, mix.end) {
        (Some(_), ..) => "~441".to_owned(),
        (None, false, ..) => String::new(),
        (None, true, 354, 0) => "?".to_owned(),
        (None, true, 354, 250) => "=250".to_owned(),
        (None, true, 354, end) => class(end),
        (None, true, data, _) => class(data),
    };
    let status = |(number, code): (usize, &u16)| match *code {
        _ if shutdown.is_some_and(|at| number > at) => "~441".to_owned(),
        250 => accepted.clone(),
        code => own(code),
    };
    mix.recipients.iter().enumerate().map(status).collect::<Vec<_>>().join(" ")
}

#[test]
fn every_mix_of_replies_has_the_result_that_the_rfcs_define() {
    let mut mixes = Vec::new();
    let recipient = [250, 452, 550, 552, 421];
    for total in 1..=3u32 {
        for number in 0..5usize.pow(total) {
            let recipients: Vec<u16> = (0..total).map(|place| recipient[number / 5usize.pow(place) % 5]).collect();
            for mail in [250, 451, 550, 421] {
                for data in [354, 451, 554, 421] {
                    for end in [250, 452, 554, 421, 0] {
                        let once = (mail == 250 || (data, end) == (354, 250)) && (data == 354 || end == 250);
                        if once {
                            mixes.push(Mix { mail, recipients: recipients.clone(), data, end });
                        }
                    }
                }
            }
        }
    }
    assert!(mixes.len() > 1500);
    for mix in &mixes {
        for (pipelining, always_354) in [(true, false), (true, true), (false, false)] {
            let mut peer = Peer::new(server_options(ServerRole::Customer), true, [mix.clone(), Mix::good(1)]);
            (peer.pipelining, peer.always_354) = (pipelining, always_354);
            let mut client = Client::new(options());
            let run = run_session(&mut client, &mut peer, [message(mix.recipients.len()), message(1)]);
            let context = format!("{mix:?} pipelining {pipelining} always_354 {always_354}");
            assert_eq!(statuses(&run.results[0]), statuses_by_the_rfcs(mix), "{context}");
            let delivered: Vec<_> = peer.messages.iter().map(|(recipients, _)| recipients.len()).collect();
            let accepted = mix.recipients.iter().filter(|code| **code == 250).count();
            let first = statuses(&run.results[0]).contains('=').then_some(accepted);
            // The next message is sent, unless the connection was lost before or during it.
            let second = match run.results.get(1).map(statuses).as_deref() {
                Some("=250") => Some(1),
                None | Some("~441") => {
                    assert!(peer.closed && !run.sent_quit, "{context}");
                    None
                }
                other => panic!("{other:?} {context}"),
            };
            assert_eq!(delivered, first.into_iter().chain(second).collect::<Vec<_>>(), "{context}");
            assert!(peer.messages.iter().all(|(_, octets)| octets == CONTENT), "{context}");
        }
    }
}

#[test]
fn a_message_is_in_doubt_if_all_content_was_sent_and_no_reply_arrived() {
    for pipelining in [true, false] {
        for multiline in [true, false] {
            let setup = |cut| {
                let mut peer = Peer::new(server_options(ServerRole::Customer), true, (0..4).map(|_| Mix::good(2)));
                (peer.pipelining, peer.multiline, peer.cut) = (pipelining, multiline, cut);
                let mut client = Client::new(options());
                let run = run_session(&mut client, &mut peer, (0..4).map(|_| message(2)));
                assert_eq!(client.in_flight(), 0);
                (run, peer)
            };
            let (whole, peer) = setup(None);
            assert_eq!(whole.results.len(), 4);
            assert!(whole.sent_quit && whole.results.iter().all(|result| statuses(result) == "=250 =250"));
            assert_eq!(whole.deepest, if pipelining { 2 } else { 1 });
            // The greeting, EHLO, five for each message, QUIT.
            assert_eq!(peer.replies, 2 + 4 * 5 + 1);
            for cut in 0..peer.replies {
                let (run, peer) = setup(Some(cut));
                let seen: Vec<_> = run.results.iter().map(statuses).collect();
                let settled = cut.saturating_sub(2) / 5;
                let doubt = run.sent - settled.min(run.sent);
                let delivered = seen.iter().filter(|statuses| *statuses == "=250 =250").count();
                assert_eq!(delivered, settled, "cut {cut}: {seen:?}");
                let in_doubt = seen.iter().filter(|statuses| *statuses == "? ?").count();
                assert_eq!(in_doubt, doubt, "cut {cut}: {seen:?}");
                assert!(
                    seen[delivered + in_doubt..].iter().all(|statuses| statuses == "~441 ~441"),
                    "cut {cut}: {seen:?}"
                );
                // A message that the peer has is sent or in doubt, never deferred.
                assert_eq!(peer.messages.len(), delivered + in_doubt, "cut {cut}");
                let at_end = (2..22).contains(&cut) && (cut - 2) % 5 == 4;
                assert_eq!(in_doubt == 1, at_end, "cut {cut}");
            }
        }
    }
}

/// If MAIL was deferred, the 503 to RCPT that follows rejects no recipient.
#[test]
fn after_a_negative_reply_to_mail_it_decides_for_all_recipients() {
    for (mail, expected) in [("451 x", "~451 ~451"), ("550 x", "!550 !550")] {
        for received_replies in 0..=2 {
            let mut scripted = Scripted::new(options());
            for reply in ["220 x", "250-x/250 PIPELINING"] {
                scripted.receive(reply);
            }
            scripted.send(2);
            scripted.receive(mail);
            (0..received_replies).for_each(|_| drop(scripted.receive("503 x")));
            let results = scripted.client.abandon(&lost());
            assert_eq!(results.iter().map(statuses).collect::<Vec<_>>(), [expected], "{mail} {received_replies}");
        }
    }
    let mut scripted = Scripted::new(options());
    for reply in ["220 x", "250-x/250 PIPELINING"] {
        scripted.receive(reply);
    }
    scripted.send(3);
    for reply in ["250 x", "552 x", "550 x"] {
        scripted.receive(reply);
    }
    let results = scripted.client.abandon(&lost());
    assert_eq!(results.iter().map(statuses).collect::<Vec<_>>(), ["~552 !550 ~441"], "552 to RCPT: too many, for now");
}

/// If the peer replies 421 to the content of a message, the message after it did not cause the loss of the connection.
#[test]
fn only_the_message_that_ended_the_session_counts_as_the_cause() {
    for (last, expected) in [
        ("421 x", vec![DecidedBy::UnrelatedConnectionLoss]),
        ("250 x", vec![DecidedBy::ConnectionLoss]),
        ("", vec![DecidedBy::ConnectionLoss, DecidedBy::UnrelatedConnectionLoss]),
    ] {
        let mut scripted = Scripted::new(options());
        for reply in ["220 x", "250-x/250 PIPELINING"] {
            scripted.receive(reply);
        }
        scripted.send(1);
        for reply in ["250 x", "250 x", "354 x"] {
            scripted.receive(reply);
        }
        scripted.client.content_sent(&mut scripted.out);
        scripted.send(1);
        if !last.is_empty() {
            assert!(scripted.receive(last).0.starts_with("Done"));
        }
        let results = scripted.client.abandon(&lost());
        assert_eq!(results.iter().map(|result| result.decided_by).collect::<Vec<_>>(), expected, "{last}");
    }
}

#[test]
fn a_server_without_ehlo_gets_helo() {
    let mut peer = Peer::new(server_options(ServerRole::Customer), false, (0..3).map(|_| Mix::good(1)));
    peer.knows_ehlo = false;
    peer.pipelining = false;
    let mut client = Client::new(options());
    let run = run_session(&mut client, &mut peer, (0..3).map(|_| message(1)));
    assert_eq!((run.results.len(), run.deepest, peer.messages.len()), (3, 1, 3));
    assert!(!client.extensions().pipelining && run.sent_quit);
}

/// The relay sends mail to any host: with TLS if the host offers it, otherwise in clear.
#[test]
fn optional_starttls_may_fail() {
    let offered = || ClientOptions { starttls: StartTls::Offered, ..options() };
    check(offered(), &["220 x"], "250-x/250 STARTTLS", "Wait", "STARTTLS");
    check(offered(), &["220 x", "250-x/250 STARTTLS"], "220 go", "Wait", "EHLO me.example");
    check(offered(), &["220 x", "250-x/250 STARTTLS"], "454 not now", "Ready", "");
    check(offered(), &["220 x"], "250 x", "Ready", "");
    check(offered(), &["220 x"], "500 x", "Wait", "HELO me.example");
}

#[test]
fn starttls_auth_and_atrn_from_end_to_end() {
    let authenticate = |tls, starttls, secret: &str, mechanisms: &[Mechanism]| {
        let server_options = ServerOptions {
            starttls,
            require_tls: starttls,
            mechanisms: mechanisms.to_vec(),
            ..server_options(ServerRole::Odmr)
        };
        let mut peer = Peer::new(server_options, tls, []);
        let starttls = if starttls { StartTls::Required } else { StartTls::Never };
        let options = ClientOptions {
            name: "caller.example".to_owned(),
            starttls,
            tls: under(tls),
            atrn: true,
            login: login(secret.as_bytes()),
            nonce: "client".to_owned(),
            ..ClientOptions::default()
        };
        let mut client = Client::new(options);
        let run = run_session(&mut client, &mut peer, []);
        assert_eq!(peer.server.account().is_some(), run.turned);
        (run, peer.server.account().map(str::to_owned))
    };
    for mechanism in [Mechanism::CramMd5, Mechanism::Plain] {
        for (tls, starttls) in [(true, false), (false, true), (false, false)] {
            let usable = mechanism.is_possible(under(tls || starttls).as_ref());
            let (run, account) = authenticate(tls, starttls, "right", &[mechanism]);
            assert_eq!(run.turned, usable, "{mechanism:?} {tls} {starttls}");
            assert_eq!(account.as_deref(), usable.then_some("acme"));
            let (run, _) = authenticate(tls, starttls, "wrong", &[mechanism]);
            match run.abort {
                Some(Abort::Rejected(Rejection { stage: Stage::Auth, reply })) => assert_eq!(reply.code(), 535),
                Some(Abort::NoMechanism { .. }) => assert!(!usable),
                other => panic!("{other:?}"),
            }
            assert!(run.sent_quit && !run.turned);
        }
    }
}

#[test]
fn the_reply_to_atrn_may_have_the_number_of_messages() {
    for (reply, wanted) in [
        ("250 2.0.0 OK now reversing the connection, 12 messages", Some(12)),
        ("250 1 message for you", Some(1)),
        ("250 OK now reversing the connection", None),
        ("250 many messages", None),
        ("250 99999999999999999999999 messages", None),
    ] {
        let mut scripted = Scripted::new(options());
        scripted.receive("220 x");
        scripted.receive("250 x");
        scripted.client.atrn(&[], &mut scripted.out);
        assert_eq!(scripted.receive(reply).0, "Turned");
        assert_eq!(scripted.client.messages_waiting(), wanted, "{reply}");
    }
}

// ---- recipients one at a time, and LMTP ----

impl Scripted {
    fn begin_transaction(&mut self) -> String {
        self.client.begin_transaction(&message(0), &mut self.out).unwrap();
        self.sent()
    }

    fn add_recipient(&mut self, local: &str) -> String {
        let recipient = Recipient::plain(mailbox(&format!("{local}@example.org")));
        self.client.add_recipient(&recipient, &mut self.out).unwrap();
        self.sent()
    }

    fn send_data(&mut self, size: u64) -> (String, String) {
        let step = self.client.send_data(size, &mut self.out);
        (format!("{step:?}"), self.sent())
    }

    fn content_sent(&mut self) -> String {
        self.client.content_sent(&mut self.out);
        self.sent()
    }
}

fn lmtp() -> ClientOptions {
    ClientOptions { lmtp: true, ..options() }
}

fn step_and_sent(step: &str, sent: &str) -> (String, String) {
    (step.to_owned(), sent.to_owned())
}

#[test]
fn recipients_are_added_one_at_a_time() {
    for offered in ["250-x/250 PIPELINING", "250 x"] {
        let mut scripted = Scripted::new(options());
        assert_eq!(scripted.receive("220 x").1, "EHLO me.example");
        assert_eq!(scripted.receive(offered).0, "Ready");
        assert_eq!(scripted.begin_transaction(), "MAIL FROM:<a@b.example>");
        assert!(scripted.receive("250 ok").0.starts_with("Replied"));
        for (local, reply) in [("a", "250 ok"), ("b", "550 no"), ("c", "250 ok"), ("d", "451 later")] {
            assert_eq!(scripted.add_recipient(local), format!("RCPT TO:<{local}@example.org>"));
            let (step, sent) = scripted.receive(reply);
            assert!(step.starts_with("Replied") && step.contains(&reply[..3]) && sent.is_empty(), "{step}");
        }
        assert_eq!(scripted.send_data(3), step_and_sent("Wait", "DATA"));
        assert_eq!(scripted.receive("354 go on").0, "Content { chunk: false }");
        scripted.content_sent();
        // Rejected recipients are not part of the result.
        assert_eq!(scripted.receive("250 ok").0, "Done =250 =250");
        assert!(scripted.client.is_ready_for_message());
    }
}

/// A client whose peer has announced limits.
fn offering(limits: &str) -> Scripted {
    let mut scripted = Scripted::new(options());
    scripted.receive("220 x");
    scripted.receive(&format!("250-x/250-PIPELINING/250 LIMITS {limits}"));
    scripted.sent();
    scripted
}

/// RFC 9422 section 4.3: a recipient that is deferred in each attempt does not delay those of other domains.
#[test]
fn each_attempt_begins_with_another_domain() {
    for (attempts, first) in [(0, "r0@one.example"), (1, "r1@two.example"), (2, "r0@one.example")] {
        let mut scripted = offering("RCPTDOMAINMAX=1");
        let mut message = OutgoingMessage { attempts, ..message(2) };
        let recipients = ["r0@one.example", "r1@two.example"].map(|address| Recipient::plain(mailbox(address)));
        message.envelope.recipients = recipients.to_vec();
        scripted.client.send_message(&message, &mut scripted.out).unwrap();
        let sent = scripted.sent();
        assert!(
            sent.contains(&format!("RCPT TO:<{first}>")) && sent.matches("RCPT").count() == 1,
            "{attempts}: {sent}"
        );
    }
}

/// RFC 9422 section 4: the limits, and which recipients a transaction has then.
///
/// Rules: LIM-01, LIM-02, LIM-03, LIM-04.
#[test]
fn the_limits_of_the_peer_are_obeyed() {
    let rcpts = |sent: &str| sent.split('/').filter_map(|line| line.strip_prefix("RCPT TO:<r")).count();
    for (limits, mails, recipients) in [
        ("MAILMAX=2 RCPTMAX=3", 2, 3),
        ("x=1 mailmax=1 RCPTMAX= RCPTDOMAINMAX=1", 1, 5),
        ("MAILMAX RCPTMAX=03 MAILMAX=0", 4, 5),
        ("RCPTMAX=1000000 MAILMAX=-1", 4, 5),
    ] {
        let mut scripted = offering(limits);
        for _ in 0..mails {
            assert!(scripted.client.permits(&message(5).envelope.recipients), "{limits}");
            let sent = scripted.send(5);
            assert_eq!(rcpts(&sent), recipients, "{limits}: {sent}");
            (0..recipients).for_each(|_| drop(scripted.receive("250 x")));
            // One reply to MAIL, then that to DATA.
            scripted.receive("250 x");
            assert_eq!(scripted.receive("354 x").0, "Content { chunk: false }");
            scripted.client.content_sent(&mut scripted.out);
            let untried = " ~452".repeat(5 - recipients);
            let expected = format!("Done {}{untried}", vec!["=250"; recipients].join(" "));
            assert_eq!(scripted.receive("250 x").0, expected);
            scripted.sent();
        }
        assert_eq!(scripted.client.is_used_up(), mails < 4, "{limits}");
        assert_eq!(scripted.client.is_ready_for_message(), mails == 4, "{limits}");
        scripted.client.quit(&mut scripted.out);
        assert_eq!(scripted.sent(), "QUIT");
    }
    // Another attempt begins with other recipients.
    for (attempts, first) in [(0, "0 r1"), (1, "2 r3"), (2, "0 r4"), (3, "1 r2")] {
        let mut scripted = offering("RCPTMAX=2");
        let message = OutgoingMessage { attempts, ..message(5) };
        scripted.client.send_message(&message, &mut scripted.out).unwrap();
        let sent = scripted.sent();
        let numbers: Vec<_> = sent.split("<r").skip(1).map(|rest| rest.split('@').next().unwrap()).collect();
        assert_eq!(numbers.join(" r"), first, "{attempts}");
    }
    // One domain in a session: the others need another one.
    let mut scripted = offering("RCPTDOMAINMAX=1");
    scripted.send(1);
    let other = [Recipient::plain(mailbox("r@EXAMPLE.org")), Recipient::plain(mailbox("r@example.com"))];
    assert!(scripted.client.permits(&other) && !scripted.client.permits(&other[1..]));
    // The next EHLO replaces the limits.
    let mut scripted = Scripted::new(ClientOptions { starttls: StartTls::Required, ..options() });
    for reply in ["220 x", "250-x/250-STARTTLS/250 LIMITS MAILMAX=1", "220 go", "250 x"] {
        scripted.receive(reply);
    }
    scripted.sent();
    scripted.send(1);
    assert!(!scripted.client.is_used_up());
    // Recipients one at a time: RCPT commands that have failed count, too.
    let mut scripted = offering("RCPTMAX=2");
    scripted.begin_transaction();
    scripted.receive("250 ok");
    for (local, reply) in [("a", "550 no"), ("b", "250 ok")] {
        scripted.add_recipient(local);
        scripted.receive(reply);
    }
    let third = scripted.client.add_recipient(&other[0], &mut scripted.out).unwrap_err();
    assert_eq!((third.code(), third.enhanced()), (452, Some("4.5.3")));
}

#[test]
fn a_transaction_is_aborted_with_rset() {
    let mut scripted = Scripted::new(options());
    scripted.receive("220 x");
    scripted.receive("250 x");
    scripted.sent();
    scripted.begin_transaction();
    scripted.receive("250 ok");
    scripted.add_recipient("a");
    scripted.receive("250 ok");
    scripted.client.abort_transaction(&mut scripted.out);
    assert_eq!(scripted.sent(), "RSET");
    assert_eq!(scripted.receive("250 ok"), step_and_sent("Wait", ""));
    // Without a transaction there is nothing to reset.
    scripted.client.abort_transaction(&mut scripted.out);
    assert_eq!(scripted.sent(), "");
    // A rejected MAIL leaves no transaction either.
    scripted.begin_transaction();
    assert!(scripted.receive("550 not you").0.starts_with("Replied"));
    assert!(
        scripted.client.is_ready_for_message()
            && scripted.client.add_recipient(&message(1).envelope.recipients[0], &mut Vec::new()).is_err()
    );
}

#[test]
fn lmtp_replies_for_each_recipient() {
    let check = |path: &[&str], reply: &str, step: &str, sent: &str| check(lmtp(), path, reply, step, sent);
    check(&[], "220 x", "Wait", "LHLO me.example");
    // LMTP has no HELO (RFC 2033 section 4.1).
    check(&["220 x"], "500 what", "Rejected EHLO 500", "QUIT");
    let ready = ["220 x", "250-x/250 PIPELINING", "send 3"];
    let sent = |replies: &[&'static str]| [&ready[..], replies, &["354 go on", "content sent"]].concat();
    let all = sent(&["250 m", "250 a", "250 b", "250 c"]);
    check(&all, "250 a", "Wait", "");
    check(&[&all[..], &["250 a", "452 b"]].concat(), "550 c", "Done =250 ~452 !550", "");
    // After 421 only the recipients that have their reply are sent.
    check(&[&all[..], &["250 a"]].concat(), "421 bye", "Done =250 ~421 ~421", "");
    // Recipients that were not accepted get no reply to the content (section 4.2).
    let some = sent(&["250 m", "550 a", "250 b", "450 c"]);
    check(&some, "250 b", "Done !550 =250 ~450", "");
    // Without accepted recipients the dot gets no reply.
    check(&[&ready[..], &["250 m", "550 a", "550 b", "550 c"]].concat(), "354 odd", "Done !550 !550 !550", ".");
}

/// An LMTP session in which the content for three recipients was sent.
fn lmtp_content_sent() -> Scripted {
    let mut scripted = Scripted::new(lmtp());
    scripted.receive("220 x");
    scripted.receive("250-x/250 PIPELINING");
    scripted.send(3);
    for reply in ["250 m", "250 a", "250 b", "250 c", "354 go on"] {
        scripted.receive(reply);
    }
    scripted.content_sent();
    scripted
}

#[test]
fn a_lost_lmtp_session_leaves_only_the_other_recipients_in_doubt() {
    let mut scripted = lmtp_content_sent();
    scripted.receive("250 a");
    let left = scripted.client.abandon(&Reply::new(451, "4.4.2", "gone"));
    assert_eq!(left.iter().map(statuses).collect::<Vec<_>>(), ["=250 ? ?"]);
}

/// Some LMTP servers mean only one recipient by 421. Their replies for the others are not about the next message, whose
/// content was not sent.
#[test]
fn no_reply_after_421_counts_for_the_next_message() {
    let mut scripted = lmtp_content_sent();
    assert_eq!(scripted.send(1), "MAIL FROM:<a@b.example>/RCPT TO:<r0@example.org>/DATA");
    assert_eq!(scripted.receive("421 a").0, "Done ~421 ~421 ~421");
    for reply in ["250 b", "550 c", "250 m", "250 a"] {
        assert_eq!(scripted.receive(reply), step_and_sent("Wait", ""), "{reply}");
    }
    assert_eq!(scripted.receive("354 go on").0, "Content { chunk: false }");
    let left = scripted.client.abandon(&Reply::new(451, "4.4.2", "gone"));
    assert_eq!(left.iter().map(statuses).collect::<Vec<_>>(), ["~451"]);
}

#[test]
fn the_peer_gets_the_client_info_that_it_offers_to_accept() {
    let origin = ClientInfo { address: "192.0.2.9".parse().unwrap(), helo: Some("a+b =c".to_owned()), extended: true };
    let begin = |offered: &str| {
        let mut scripted = Scripted::new(options());
        scripted.receive("220 x");
        scripted.receive(offered);
        scripted.sent();
        let awaited = scripted.client.send_client_info(&origin, &mut scripted.out);
        (scripted, awaited)
    };
    let (mut scripted, awaited) =
        begin("250-x/250-XFORWARD NAME ADDR PROTO HELO SOURCE PORT/250 XCLIENT NAME ADDR PROTO HELO");
    assert!(awaited && !scripted.client.is_ready_for_message());
    assert_eq!(scripted.sent(), "XCLIENT NAME=[UNAVAILABLE] ADDR=192.0.2.9 PROTO=ESMTP HELO=a+2Bb+20+3Dc");
    // For the peer the session begins anew, with another client.
    assert_eq!(scripted.receive("220 x"), step_and_sent("Wait", "EHLO me.example"));
    assert_eq!(scripted.receive("250 x").0, "Ready");
    assert!(scripted.client.is_client_overridden());
    let (mut scripted, awaited) = begin("250-x/250 XFORWARD NAME ADDR PROTO HELO SOURCE PORT");
    let sent = "XFORWARD NAME=[UNAVAILABLE] ADDR=192.0.2.9 PROTO=ESMTP HELO=a+2Bb+20+3Dc SOURCE=REMOTE";
    assert_eq!((scripted.sent().as_str(), awaited), (sent, true));
    assert_eq!(scripted.receive("501 no"), step_and_sent("Ready", ""));
    let (mut scripted, awaited) = begin("250-x/250 XCLIENT ADDR");
    assert!(awaited);
    scripted.sent();
    assert_eq!(scripted.receive("550 not you"), step_and_sent("Ready", ""));
    for silent in ["250 x", "250-x/250 XCLIENT NAME", "250-x/250 XFORWARD"] {
        let (mut scripted, awaited) = begin(silent);
        assert!(!awaited && scripted.sent().is_empty() && scripted.client.is_ready_for_message());
    }
}
