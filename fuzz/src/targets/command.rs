//! Command lines: each line of the input is a command. If the server's parser accepts it, our client sends it, and the parser
//! must read that as the same command.

use odmr::mail::address::{ForwardPath, ReversePath};
use odmr::smtp::client::{Client, ClientOptions, OutgoingMessage};
use odmr::smtp::command::{Body, Command, Envelope, MailFrom, Recipient, Verb};
use odmr::smtp::extensions::ServerExtensions;
use odmr::smtp::reply::Reply;

use super::check;

pub const ALL: ServerExtensions = ServerExtensions { size: true, eight_bit: true, utf8: true, auth: true, dsn: true };

pub fn run(input: &[u8]) {
    for line in input.split(|octet| *octet == b'\n').take(50) {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        for offers in [ALL, ServerExtensions::default()] {
            match parse(line, offers) {
                Err(reply) => {
                    assert!(matches!(reply.code(), 500..=504 | 550 | 553 | 555), "{reply}");
                    check::reply(&reply);
                }
                Ok(command) => round_trip(command),
            }
        }
    }
}

/// Parses a command line as a server does.
pub fn parse(line: &[u8], offers: ServerExtensions) -> Result<Command, Reply> {
    let (verb, rest) = Verb::of(line)?;
    Command::parse(verb, rest, offers)
}

/// A client that is ready to send to a server with these lines in its reply to EHLO.
pub fn ready_client(options: ClientOptions, offers: &[&str]) -> Client {
    let (mut client, mut out) = (Client::new(options), Vec::new());
    let hello =
        offers.iter().fold(Reply::bare(250, "relay.example.net"), |reply, line| reply.with_line(line.to_string()));
    for reply in [Reply::bare(220, "relay.example.net"), hello] {
        client.reply(reply, &mut out).expect("a reply that is awaited");
    }
    client
}

const EVERYTHING: [&str; 6] = ["PIPELINING", "SIZE 0", "8BITMIME", "SMTPUTF8", "DSN", "ATRN"];

fn sent_again(client: &mut Client, write: impl FnOnce(&mut Client, &mut Vec<u8>)) -> Vec<Command> {
    let mut out = Vec::new();
    write(client, &mut out);
    let parsed = |line: &&[u8]| match parse(line, ALL) {
        Ok(command) => command,
        Err(reply) => panic!("{} gets {reply}", line.escape_ascii()),
    };
    check::commands(&out).iter().map(parsed).collect()
}

fn round_trip(command: Command) {
    match command {
        Command::Atrn(domains) => {
            let mut client = ready_client(ClientOptions::default(), &EVERYTHING);
            let again = sent_again(&mut client, |client, out| client.atrn(&domains, out));
            assert_eq!(again, [Command::Atrn(domains)]);
        }
        Command::Ehlo(name) => {
            let mut client =
                ready_client(ClientOptions { name: name.clone(), ..ClientOptions::default() }, &EVERYTHING);
            assert_eq!(sent_again(&mut client, Client::ehlo_again), [Command::Ehlo(name)]);
        }
        Command::Mail(mail) => {
            let MailFrom { envelope, size } = mail;
            transaction(&envelope, size.unwrap_or(0));
        }
        Command::Rcpt(rcpt) => {
            if let ForwardPath::Mailbox(mailbox) = &rcpt.path {
                let path = ForwardPath::Mailbox(mailbox.clone()).to_string();
                assert_eq!(parse(format!("RCPT TO:<{path}>").as_bytes(), ALL).map(recipient), Ok(Some(path)));
            }
            if let Some(recipient) = rcpt.recipient() {
                let envelope = Envelope { recipients: vec![recipient], ..Envelope::new(ReversePath::Null) };
                transaction(&envelope, 1);
            }
        }
        _ => {}
    }
}

fn recipient(command: Command) -> Option<String> {
    match command {
        Command::Rcpt(rcpt) => Some(rcpt.path.to_string()),
        _ => None,
    }
}

/// Checks that a server with all extensions receives the whole envelope, and a server without any receives its addresses.
fn transaction(envelope: &Envelope, size: u64) {
    let message =
        OutgoingMessage { envelope: envelope.clone(), size, eight_bit: false, utf8_header: false, attempts: 0 };
    let mut message = message;
    if message.envelope.recipients.is_empty() {
        let postmaster = odmr::mail::address::Mailbox::parse("postmaster@example.org").expect("a mailbox");
        message.envelope.recipients.push(Recipient::plain(postmaster));
    }
    for offers in [&EVERYTHING[..], &["PIPELINING"]] {
        let mut client = ready_client(ClientOptions::default(), offers);
        let mut sent = false;
        let commands = sent_again(&mut client, |client, out| sent = client.send_message(&message, out).is_ok());
        if !sent {
            assert!(commands.is_empty() && message.envelope.needs_utf8() && offers.len() == 1);
            continue;
        }
        let all = offers.len() > 1;
        let wanted = &message.envelope;
        match &commands[0] {
            Command::Mail(MailFrom { envelope, size: announced }) => {
                assert_eq!(envelope.from, wanted.from);
                assert_eq!(*announced, (all && size > 0).then_some(size));
                if all {
                    assert_eq!(envelope.from.to_string(), spelled(&wanted.from, wanted.needs_utf8()));
                    assert_eq!(envelope.utf8, wanted.needs_utf8());
                    assert_eq!((envelope.ret, &envelope.envelope_id), (wanted.ret, &wanted.envelope_id));
                    assert_eq!(envelope.body == Body::SevenBit, wanted.body == Body::SevenBit);
                }
            }
            other => panic!("{other:?}"),
        }
        for (command, wanted) in commands[1..].iter().zip(&wanted.recipients) {
            match command {
                Command::Rcpt(rcpt) if all => assert_eq!(rcpt.clone().recipient().as_ref(), Some(wanted)),
                Command::Rcpt(rcpt) => {
                    assert_eq!(
                        rcpt.clone().recipient().map(|recipient| recipient.mailbox),
                        Some(wanted.mailbox.clone())
                    );
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(commands.len(), wanted.recipients.len() + 2);
        assert_eq!(commands.last(), Some(&Command::Data));
    }
}

/// The path as the client writes it.
fn spelled(path: &ReversePath, utf8: bool) -> String {
    match path {
        ReversePath::Mailbox(mailbox) if !utf8 => mailbox.with_a_labels().into_owned(),
        path => path.to_string(),
    }
}
