//! Server sessions: all octets of a client. The first octet of the input selects the listener and its options; the rest is
//! what the client sends. At the octet 0xFF the client waits for a reply before it continues; after STARTTLS it continues
//! under TLS.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use odmr::mail::address::{Domain, ForwardPath, Mailbox};
use odmr::net::cancel::CancelToken;
use odmr::net::connection::{Connection, Filled, WaitResult};
use odmr::net::tls::{ClientTls, ServerTls, Trust, self_signed};
use odmr::net::trace::Trace;
use odmr::sasl::{CredentialStore, Mechanism};
use odmr::session::server::{ServerSession, SessionEnd, SessionLimits};
use odmr::session::{Limits, Timeouts};
use odmr::smtp::client::{Client, ClientOptions};
use odmr::smtp::command::{Envelope, MailFrom, Notify};
use odmr::smtp::reply::Reply;
use odmr::smtp::server::{Incoming, MessageSink, Server, ServerOptions, ServerRole, SessionHandler, Unaccepted};
use odmr::turn;

use super::check;
use super::directory::temporary_directory;
use super::peer::{PART, PAUSE, Socket, play, receive};
use super::sasl::Store;

/// Octets of a message.
const MAX_SIZE: u64 = 2000;

/// Messages that were accepted, with their content.
pub type Accepted = Arc<Mutex<Vec<(Envelope, Vec<u8>)>>>;

/// Accepts mail. It rejects the sender `rejected` and the recipient `no`, and defers the recipient `later` and content with
/// `FULL` or `LATE`.
pub struct Handler {
    pub role: ServerRole,
    pub accepted: Accepted,
}

fn reply_to(local: &str) -> Result<(), Reply> {
    match local {
        "rejected" | "no" => Err(Reply::new(550, "5.1.1", "No")),
        "later" => Err(Reply::new(451, "4.3.0", "Later")),
        _ => Ok(()),
    }
}

impl SessionHandler for Handler {
    fn credentials(&self) -> &dyn CredentialStore {
        &Store
    }

    fn sender(&mut self, mail: &MailFrom, account: Option<&str>) -> Result<(), Reply> {
        // RFC 2645 section 5.2.1, RFC 6409 section 4.3.
        assert_eq!(account, (self.role == ServerRole::Odmr).then_some("acme"));
        assert!(mail.size.is_none_or(|size| size <= MAX_SIZE) && mail.envelope.recipients.is_empty());
        reply_to(mail.envelope.from.to_string().split('@').next().unwrap_or_default())
    }

    fn recipient(&mut self, path: &ForwardPath, _: &Notify, _: Option<&str>) -> Result<Mailbox, Reply> {
        match path {
            ForwardPath::Mailbox(mailbox) => reply_to(mailbox.local()).map(|()| mailbox.clone()),
            ForwardPath::Postmaster => Ok(Mailbox::parse("postmaster@example.org").expect("a mailbox")),
        }
    }

    fn domains(&self, account: &str) -> Vec<Domain> {
        assert_eq!(account, "acme");
        vec![Domain::parse("example.org").expect("a domain")]
    }

    fn not_accepted(&mut self, _: Unaccepted<'_>, reply: &Reply) {
        assert!(reply.code() >= 400);
    }

    fn receive(&mut self, envelope: &Envelope, incoming: &Incoming<'_>) -> Result<Box<dyn MessageSink>, Reply> {
        assert!((1..=100).contains(&envelope.recipients.len()));
        let field = incoming.received.field("id1", "Fri, 02 Jan 2026 03:04:05 +0000");
        assert!(field.lines().skip(1).all(|line| line.starts_with('\t')), "{field}");
        Ok(Box::new(Sink { accepted: self.accepted.clone(), envelope: envelope.clone(), content: Vec::new() }))
    }
}

struct Sink {
    accepted: Accepted,
    envelope: Envelope,
    content: Vec<u8>,
}

impl MessageSink for Sink {
    fn write(&mut self, octets: &[u8]) -> Result<(), Reply> {
        self.content.extend_from_slice(octets);
        match self.content.windows(4).any(|part| part == b"FULL") {
            true => Err(Reply::new(452, "4.3.1", "Full")),
            false => Ok(()),
        }
    }

    fn commit(self: Box<Self>) -> Result<String, Reply> {
        if self.content.windows(4).any(|part| part == b"LATE") {
            return Err(Reply::new(451, "4.3.0", "Late"));
        }
        // RFC 5321 section 2.3.8: a CR without LF, or an LF without CR, is not accepted.
        assert!(!self.content.contains(&b'\r') && self.content.len() as u64 <= MAX_SIZE);
        let mut accepted = self.accepted.lock().expect("no panic");
        accepted.push((self.envelope, self.content));
        Ok(format!("id{}", accepted.len()))
    }
}

/// A server's certificate, and a client that trusts it.
fn tls() -> &'static (ServerTls, ClientTls) {
    static TLS: OnceLock<(ServerTls, ClientTls)> = OnceLock::new();
    TLS.get_or_init(|| {
        let root = temporary_directory();
        let (certificate, key) = self_signed(&["relay.example.net"]).expect("a certificate");
        let files = [("relay.pem", certificate), ("relay.key", key)].map(|(name, text)| {
            super::config::write(&root.path().join(name), text.as_bytes());
            root.path().join(name)
        });
        let server = ServerTls::load(&files[0], &files[1]).expect("a certificate");
        let client = ClientTls::new(&Trust::Authorities(files[0].clone())).expect("a certificate");
        (server, client)
    })
}

/// A token that is never cancelled.
pub fn never() -> &'static CancelToken {
    static NEVER: OnceLock<CancelToken> = OnceLock::new();
    NEVER.get_or_init(|| CancelToken::new().expect("a token"))
}

pub fn connection(socket: UnixStream, us: char) -> Connection {
    Connection::new(socket.into(), Trace { id: "1".to_owned(), us, them: 'C' }).expect("a connection")
}

pub fn session_limits() -> SessionLimits {
    let timeouts = Timeouts { handshake: Duration::from_secs(10), ..Timeouts::default() };
    SessionLimits::new(&timeouts, &Limits::default(), never(), never())
}

fn options(how: u8) -> ServerOptions {
    let role = [ServerRole::Inbound, ServerRole::Odmr, ServerRole::Submission, ServerRole::Customer];
    ServerOptions {
        starttls: how & 4 == 0,
        require_tls: how & 8 == 8,
        soft_bounce: how & 16 == 16,
        mechanisms: Mechanism::ALL.to_vec(),
        ..Limits::default().server_options(role[usize::from(how % 4)], "relay.example.net", MAX_SIZE)
    }
}

pub fn run(input: &[u8]) {
    let Some((how, rest)) = input.split_first() else { return };
    let mut parts: Vec<&[u8]> = rest.split(|octet| *octet == PART).take(12).collect();
    let (options, accepted) = (options(*how), Accepted::default());
    let (ours, mut theirs) = UnixStream::pair().expect("two sockets");
    // Before the customer's greeting the provider may send nothing but QUIT.
    let early = (options.role == ServerRole::Customer && how & 32 == 32).then(|| parts.remove(0));
    if let Some(early) = early {
        theirs.write_all(early).expect("room in the buffer");
    }
    if parts.is_empty() {
        theirs.end();
    }
    let received = thread::scope(|scope| {
        let client = scope.spawn(|| play_client(theirs, &parts, early.is_some()));
        let connection = connection(ours, 'P');
        match early {
            Some(early) => {
                if let Some((connection, server)) = after_turn(connection, options.clone(), early) {
                    serve(connection, server, &options, &accepted);
                }
            }
            None => serve(connection, Server::new(options.clone(), None), &options, &accepted),
        }
        client.join().expect("the client")
    });
    let count = [&received.clear, &received.tls].map(|replies| {
        let replies = check::replies(replies);
        replies.iter().filter(|reply| reply.starts_with(b"250 2.6.0 OK, id=")).count()
    });
    assert_eq!(count.iter().sum::<usize>(), accepted.lock().expect("no panic").len(), "each 250 is a message");
    if let Some(begun) = &received.begun {
        // RFC 3207 section 6: octets in clear after STARTTLS are not read as commands.
        assert!(matches!(begun[..], [] | [0x15 | 0x16, ..]), "{}", begun.escape_ascii());
        let ends = |count| parts[..count].concat().trim_ascii_end().to_ascii_uppercase().ends_with(b"STARTTLS");
        assert!((1..=parts.len()).any(ends), "octets after STARTTLS");
    }
}

/// The customer's half of the turn. `early`: octets that have arrived before its greeting.
fn after_turn(mut connection: Connection, options: ServerOptions, early: &[u8]) -> Option<(Connection, Server)> {
    let _ = connection.fill();
    let turned = turn::accept(connection, Client::new(ClientOptions::default()), options, never()).ok();
    assert_eq!(turned.is_some(), early.is_empty() || early == b"QUIT\r\n", "{}", early.escape_ascii());
    turned
}

fn serve(connection: Connection, server: Server, options: &ServerOptions, accepted: &Accepted) {
    let tls = options.starttls.then(|| tls().0.clone());
    let mut session = ServerSession::new(connection, server, "[192.0.2.1]".to_owned(), tls, session_limits());
    session.greet();
    let mut handler = Handler { role: options.role, accepted: accepted.clone() };
    while let SessionEnd::Atrn(_) = session.run(&mut handler) {
        assert!(options.role == ServerRole::Odmr && session.server.account() == Some("acme"));
        session.reject(&Reply::new(450, "4.4.5", "Another session is fetching the mail"));
    }
    if options.require_tls && options.role == ServerRole::Odmr && !session.connection.is_tls() {
        assert!(session.server.account().is_none() && accepted.lock().expect("no panic").is_empty());
    }
    session.close();
}

/// What a client has received.
#[derive(Default)]
struct Received {
    /// In clear, up to the 220 to STARTTLS.
    clear: Vec<u8>,
    /// In clear, after the 220 to STARTTLS; `None`: there was none.
    begun: Option<Vec<u8>>,
    /// Under TLS.
    tls: Vec<u8>,
}

const GO_AHEAD: &[u8] = b"220 2.0.0 Go ahead\r\n";

/// Plays the client. `waits`: it sends nothing before the greeting.
fn play_client(mut socket: UnixStream, parts: &[&[u8]], waits: bool) -> Received {
    let mut received = Received::default();
    for (number, part) in parts.iter().enumerate() {
        if (number > 0 || waits) && !receive(&mut socket, &mut received.clear, Some(PAUSE)) {
            break;
        }
        if received.clear.ends_with(GO_AHEAD) {
            received.tls = play_in_tls(socket, &parts[number..]);
            received.begun = Some(Vec::new());
            return received;
        }
        if socket.write_all(part).is_err() {
            break;
        }
    }
    received.clear.extend(play(&mut socket, &[], false));
    if let Some(at) = received.clear.windows(GO_AHEAD.len()).position(|part| part == GO_AHEAD) {
        received.begun = Some(received.clear.split_off(at + GO_AHEAD.len()));
    }
    received
}

/// Continues under TLS, and closes the connection without QUIT.
fn play_in_tls(socket: UnixStream, parts: &[&[u8]]) -> Vec<u8> {
    let deadline = Instant::now() + Duration::from_secs(20);
    let end = socket.try_clone().expect("a descriptor");
    let mut connection = connection(socket, 'C');
    let mut received = Vec::new();
    if connection.start_tls_client(&tls().1, "relay.example.net", deadline, None).is_err() {
        return received;
    }
    for number in 0..=parts.len() {
        match parts.get(number) {
            Some(part) => {
                connection.send(part);
                let _ = connection.flush_all(deadline, None);
            }
            None => end.end(),
        }
        let until = if number < parts.len() { Instant::now() + PAUSE } else { deadline };
        loop {
            match connection.wait_input(until, never()) {
                Ok(WaitResult::Ready) => {}
                // The server may be waiting for the rest of a command.
                Ok(_) if number < parts.len() => break,
                Ok(other) => panic!("{other:?} after {}", received.escape_ascii()),
                Err(_) => return received,
            }
            let filled = connection.fill();
            received.extend_from_slice(connection.received());
            connection.consume(usize::MAX);
            match filled {
                Ok(Filled::Bytes(_)) if number < parts.len() => break,
                Ok(Filled::Bytes(_) | Filled::Nothing) => {}
                Ok(Filled::End) | Err(_) => return received,
            }
        }
    }
    received
}
