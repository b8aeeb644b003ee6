//! Our client and our server, over a socket. The input is a MAIL command, RCPT commands and an empty line; then content. If
//! the client reports a message as sent, the server must have the same envelope and the same content.

use std::os::unix::net::UnixStream;
use std::thread;

use odmr::net::connection::Connection;
use odmr::net::tls::begins_as_record;
use odmr::session::client::Connect;
use odmr::session::server::{ServerSession, SessionEnd};
use odmr::session::{Limits, Timeouts};
use odmr::smtp::client::{ClientOptions, OutgoingMessage, Without8BitMime};
use odmr::smtp::command::{Command, Envelope};
use odmr::smtp::content::WireSize;
use odmr::smtp::server::{Server, ServerRole};
use odmr::smtp::status::RecipientStatus;

use super::command::{ALL, parse};
use super::content::normalised;
use super::server::{Accepted, Handler, connection, never, session_limits};

/// Octets of a message that the server accepts.
const MAX_SIZE: u64 = 2000;

pub fn run(input: &[u8]) {
    let Some((how, rest)) = input.split_first() else { return };
    let Some((message, content)) = message(rest) else { return };
    if begins_as_record(&normalised(content)) {
        // The server closes without a reply.
        return;
    }
    let (ours, theirs) = UnixStream::pair().expect("two sockets");
    let accepted = Accepted::default();
    let result = thread::scope(|scope| {
        let messages = accepted.clone();
        let server = scope.spawn(move || serve(connection(ours, 'S'), messages));
        let options = ClientOptions {
            name: "client.example.org".to_owned(),
            chunking: how & 1 == 1,
            submits: how & 2 == 2,
            without_8bitmime: if how & 4 == 4 { Without8BitMime::Bounce } else { Without8BitMime::Send },
            ..ClientOptions::default()
        };
        let timeouts = Timeouts::default();
        let (id, peer, implicit_tls, limit) = ("2", 'S', false, None);
        let connect = Connect { id, peer, tls: None, implicit_tls, timeouts: &timeouts, cancel: never(), limit };
        let mut session = connect.over(theirs.into(), options).expect("a session");
        let result = match how & 8 == 8 {
            true => one_by_one(&mut session, &message, content),
            false => session.send_message(&message, &mut &content[..]).recipients,
        };
        session.quit();
        server.join().expect("the server");
        result
    });
    let mut accepted = accepted.lock().expect("no panic");
    let sent: Vec<_> = message.envelope.recipients.iter().zip(&result).filter(|(_, status)| status.is_sent()).collect();
    assert!(accepted.len() <= 1 && accepted.is_empty() == sent.is_empty(), "{result:?}");
    assert!(result.iter().all(|status| *status != RecipientStatus::InDoubt), "{result:?}");
    let Some((envelope, stored)) = accepted.pop() else { return };
    assert_eq!(stored, normalised(content));
    assert_eq!((&envelope.from, envelope.ret), (&message.envelope.from, message.envelope.ret));
    assert_eq!(envelope.envelope_id, message.envelope.envelope_id);
    let mut recipients = envelope.recipients.iter();
    for (recipient, _) in sent {
        // The server drops a recipient that is named twice.
        match recipients.as_slice().first() {
            Some(next) if next == recipient => drop(recipients.next()),
            _ => assert!(envelope.recipients.iter().any(|other| other.mailbox == recipient.mailbox)),
        }
    }
    assert_eq!(recipients.next(), None);
}

/// The message of an input, with at least one recipient.
fn message(input: &[u8]) -> Option<(OutgoingMessage, &[u8])> {
    let mut envelope: Option<Envelope> = None;
    let mut rest = input;
    loop {
        let end = rest.iter().position(|octet| *octet == b'\n')?;
        let line = rest[..end].strip_suffix(b"\r").unwrap_or(&rest[..end]);
        rest = &rest[end + 1..];
        match (parse(line, ALL), &mut envelope) {
            _ if line.is_empty() => break,
            (Ok(Command::Mail(mail)), None) => envelope = Some(mail.envelope),
            (Ok(Command::Rcpt(rcpt)), Some(envelope)) if envelope.recipients.len() < 20 => {
                envelope.recipients.extend(rcpt.recipient());
            }
            _ => {}
        }
    }
    let envelope = envelope.filter(|envelope| !envelope.recipients.is_empty())?;
    let mut size = WireSize::default();
    size.feed(rest);
    let (size, eight_bit) = (size.finish(), !rest.is_ascii());
    Some((OutgoingMessage { envelope, size, eight_bit, utf8_header: false, attempts: 0 }, rest))
}

fn serve(connection: Connection, accepted: Accepted) {
    let role = ServerRole::Customer;
    let server = Server::new(Limits::default().server_options(role, "relay.example.net", MAX_SIZE), None);
    let mut session = ServerSession::new(connection, server, "[192.0.2.1]".to_owned(), None, session_limits());
    session.greet();
    let end = session.run(&mut Handler { role, accepted });
    assert!(matches!(end, SessionEnd::Quit), "{end}");
    session.close();
}

/// Sends the message step by step, as a customer does that checks each recipient with its next hop.
fn one_by_one(
    session: &mut odmr::session::client::ClientSession, message: &OutgoingMessage, content: &[u8],
) -> Vec<RecipientStatus> {
    let count = message.envelope.recipients.len();
    let deferred = |reply: &odmr::smtp::reply::Reply| RecipientStatus::after_negative(reply);
    let reply = session.begin_transaction(message).expect("the session goes on");
    if !reply.is_positive() {
        return vec![deferred(&reply); count];
    }
    let mut result = Vec::new();
    for recipient in &message.envelope.recipients {
        let reply = session.add_recipient(recipient).expect("the session goes on");
        result.push((!reply.is_positive()).then(|| deferred(&reply)));
    }
    if result.iter().all(Option::is_some) {
        session.abort_transaction();
        return result.into_iter().flatten().collect();
    }
    let mut statuses = session.send_data(&mut &content[..], message.size).recipients.into_iter();
    let all = result.into_iter().map(|status| status.unwrap_or_else(|| statuses.next().expect("a status for each")));
    all.collect()
}
