//! Submission by the customer's own users and programs over SMTP (RFC 6409): `odmr send -bs`, and the listener of
//! `odmr pull --daemon`.
//!
//! A client may send from any address to any address. There is no AUTH and no TLS, so clients are accepted only from
//! this machine and the networks that the configuration names. Messages go into the [`Outbox`].

use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::mailboxes::Mailboxes;
use super::outbox::{Outbox, Submission};
use crate::ids::Ids;
use crate::mail::address::{ForwardPath, Mailbox, literal};
use crate::net::cancel::CancelToken;
use crate::net::connection::Connection;
use crate::net::limiter::{AcceptedConnection, ConnectionLimiter, ConnectionLimits};
use crate::net::listener::{Acceptor, log_listening};
use crate::net::trace::{Trace, quoted};
use crate::session::server::{ServerSession, SessionLimits};
use crate::session::storage_failure_reply;
use crate::smtp::command::{Envelope, MailFrom, Notify};
use crate::smtp::reply::Reply;
use crate::smtp::server::{Incoming, MessageSink, Server, ServerRole, SessionHandler};
use crate::threads::{self, Guarded};

/// The name of the listeners in the log.
pub const LISTENER_NAME: &str = "submission";

/// The name of the listeners in the line `listening NAME ADDRESS`, which supervisors and tests of others read, and in
/// `LISTEN_FDNAMES` of a supervisor that passes sockets.
pub const PLAIN_NAME: &str = "local";

/// The longest wait for a rejected client to read the reply.
const REJECTION_TIMEOUT: Duration = Duration::from_secs(5);

/// The listeners of `[outgoing]`, with a thread each.
pub struct SubmissionListeners {
    service: Arc<SubmissionService>,
    limiter: ConnectionLimiter,
    threads: Vec<JoinHandle<()>>,
}

impl SubmissionListeners {
    /// Begins to accept connections. Their messages go to `outbox`; `None`: connections are rejected. `inherited`: a
    /// supervisor has opened the listeners. `cancel` ends the listeners, and each session after the command under way.
    ///
    /// # Errors
    /// The system has no descriptors or threads.
    pub fn start(
        listeners: Vec<TcpListener>, inherited: bool, mailboxes: &Mailboxes, outbox: Option<Arc<Outbox>>,
        cancel: &CancelToken,
    ) -> io::Result<SubmissionListeners> {
        let (config, ids) = (&mailboxes.config, mailboxes.ids.clone());
        let limiter = ConnectionLimiter::new(config.limits.of_connections(&config.timeouts));
        let (outbox, cancel, abort) = (Guarded::new(outbox), cancel.clone(), CancelToken::new()?);
        let service = Arc::new(SubmissionService { outbox, ids, cancel, abort });
        let mut threads = Vec::new();
        for listener in listeners {
            let address = listener.local_addr()?;
            log_listening(LISTENER_NAME, PLAIN_NAME, address, inherited);
            let (cancel, limiter) = (service.cancel.clone(), limiter.clone());
            let acceptor = Acceptor { name: LISTENER_NAME, greets: true, cancel, limiter, known: None };
            let service = service.clone();
            let work = move || {
                acceptor.accept(&listener, Arc::new(move |accepted: &Arc<AcceptedConnection>| service.serve(accepted)))
            };
            threads.push(threads::spawn(LISTENER_NAME, work)?);
        }
        Ok(SubmissionListeners { service, limiter, threads })
    }

    /// Sets the outbox of the sessions that begin from now on, and the limits of connections.
    pub fn set_outbox(&self, outbox: Option<Arc<Outbox>>, limits: ConnectionLimits) {
        self.limiter.set_limits(limits);
        *self.service.outbox.lock() = outbox;
    }

    /// Waits until the deadline for the sessions to end, which were cancelled; then aborts those that are left.
    pub fn close(self, deadline: Instant) {
        for thread in self.threads {
            let _ = thread.join();
        }
        self.limiter.wait_until_idle(deadline);
        self.service.abort.cancel();
        self.limiter.wait_until_idle(Instant::now() + Duration::from_secs(1));
    }
}

/// Serves the connections of all listeners.
struct SubmissionService {
    outbox: Guarded<Option<Arc<Outbox>>>,
    ids: Ids,
    cancel: CancelToken,
    abort: CancelToken,
}

impl SubmissionService {
    fn serve(&self, accepted: &Arc<AcceptedConnection>) {
        let peer = accepted.peer;
        let (begun, id, address) = (Instant::now(), self.ids.session_id(), literal(peer));
        log::info!("event=connected session={id} listener={LISTENER_NAME} peer={address}");
        let outbox = self.outbox.lock().clone();
        let connection = Connection::accepted(accepted.socket().clone(), Trace { id: id.clone(), us: 'S', them: 'C' });
        let reason = match (connection, outbox.filter(|outbox| outbox.config.admits(peer))) {
            (Err(error), _) => error.to_string(),
            (Ok(connection), None) => reject(connection),
            (Ok(connection), Some(outbox)) => {
                serve(&outbox, connection, address.clone(), &self.cancel, &self.abort, Some(accepted))
            }
        };
        log::info!(
            "event=closed session={id} listener={LISTENER_NAME} peer={address} duration={:.3} reason={}",
            begun.elapsed().as_secs_f64(),
            quoted(reason)
        );
    }
}

/// Rejects a connection with 554 instead of a greeting (RFC 5321 section 3.1). Returns the reason for the log.
fn reject(mut connection: Connection) -> String {
    let mut octets = Vec::new();
    Reply::new(554, "5.7.1", "This server is for its own network only").write_to(&mut octets);
    connection.trace.sent(octets.trim_ascii_end());
    connection.send(&octets);
    let _ = connection.flush_all(Instant::now() + REJECTION_TIMEOUT, None);
    connection.shutdown();
    "not one of our networks".to_owned()
}

/// Serves one session up to its end. Returns the reason of the end, for the log. `peer`: the client, for `Received`.
/// `cancel` ends the session between two commands, `abort` at once. `accepted`: the connection, if a listener counts
/// it.
pub fn serve(
    outbox: &Arc<Outbox>, connection: Connection, peer: String, cancel: &CancelToken, abort: &CancelToken,
    accepted: Option<&Arc<AcceptedConnection>>,
) -> String {
    let config = &outbox.mailboxes.config;
    let options = config.limits.server_options(ServerRole::Submission, &config.hostname, outbox.config.max_size);
    let limits = SessionLimits::new(&config.timeouts, &config.limits, cancel, abort);
    let limits = SessionLimits { accepted: accepted.cloned(), ..limits };
    let mut session = ServerSession::new(connection, Server::new(options, None), peer, None, limits);
    session.greet();
    let end = session.run(&mut SubmissionHandler { outbox: outbox.clone() });
    session.close();
    end.to_string()
}

struct SubmissionHandler {
    outbox: Arc<Outbox>,
}

impl SessionHandler for SubmissionHandler {
    fn sender(&mut self, mail: &MailFrom, _: Option<&str>) -> Result<(), Reply> {
        self.outbox.check_room(mail.size.unwrap_or(0))
    }

    fn recipient(&mut self, path: &ForwardPath, _: &Notify, _: Option<&str>) -> Result<Mailbox, Reply> {
        self.outbox.recipient(path)
    }

    fn receive(&mut self, envelope: &Envelope, incoming: &Incoming<'_>) -> Result<Box<dyn MessageSink>, Reply> {
        let ids = &self.outbox.mailboxes.ids;
        let (id, arrived) = (ids.queue_id(), ids.clock().now());
        let received = incoming.received.field(&id, &arrived.rfc5322());
        // A program that submits by SMTP writes the header itself, `Bcc` included (RFC 6409 section 8.1).
        let submission = Submission { envelope, size: incoming.size, id, arrived, header_from: None, drop_bcc: false };
        match self.outbox.store(submission, &received) {
            Ok(writer) => Ok(Box::new(writer)),
            Err(error) => Err(storage_failure_reply(&error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpStream};
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::config::CustomerConfig;
    use crate::net::listener;

    const CUSTOMER: &str = "hostname = \"mail.example.org\"\n[provider]\naddress = \"127.0.0.1:1\"\ntls = \"none\"\n\
        name = \"acme\"\nsecret = \"tanstaaf\"\n[mailboxes]\nroot = \"mail\"\naccept = [\"@example.org\"]\n\
        [outgoing]\nqueue = \"outgoing\"\n";

    /// Listeners for this customer, and a client that connected before they began to accept.
    fn start(limits: &str) -> (SubmissionListeners, TcpStream, CancelToken) {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("customer.toml");
        fs::write(&file, format!("{CUSTOMER}{limits}")).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        let mailboxes = Arc::new(Mailboxes::new(&CustomerConfig::load(&file).unwrap(), &Ids::fixed()));
        let outbox = Outbox::new(&mailboxes).map(Arc::new);
        let mut listeners = listener::bind(LISTENER_NAME, &["127.0.0.1:0".parse().unwrap()]).unwrap();
        let listener = listeners.remove(0);
        let client = connect(listener.local_addr().unwrap());
        let cancel = CancelToken::new().unwrap();
        let listeners = SubmissionListeners::start(vec![listener], false, &mailboxes, outbox, &cancel).unwrap();
        (listeners, client, cancel)
    }

    fn connect(address: SocketAddr) -> TcpStream {
        let client = TcpStream::connect(address).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        client
    }

    fn expect(mut client: &TcpStream, code: &str) {
        let mut reply = vec![0; code.len()];
        client.read_exact(&mut reply).unwrap();
        assert_eq!(reply, code.as_bytes());
    }

    /// A daemon binds its listeners before it changes its user, so a client may have connected before it accepts.
    #[test]
    fn a_client_that_connected_before_the_start_is_served() {
        let (listeners, client, cancel) = start("");
        expect(&client, "220 ");
        cancel.cancel();
        listeners.close(Instant::now() + Duration::from_secs(10));
    }

    #[test]
    fn a_silent_client_makes_room_for_another() {
        let (listeners, silent, cancel) = start("[limits]\nconnections = 1\n");
        expect(&silent, "220 mail.example.org ESMTP mail of this host's users\r\n");
        let client = connect(silent.peer_addr().unwrap());
        expect(&silent, "421 4.3.2 ");
        expect(&client, "220 ");
        cancel.cancel();
        listeners.close(Instant::now() + Duration::from_secs(10));
    }

    /// Otherwise a client could hold its connection for ever after one accepted recipient or message.
    #[test]
    fn a_client_makes_room_after_its_transaction() {
        let (listeners, first, cancel) = start("[limits]\nconnections = 1\n");
        let address = first.peer_addr().unwrap();
        let greeting = "220 mail.example.org ESMTP mail of this host's users\r\n";
        let mut client = first;
        expect(&client, greeting);
        let transaction = [("HELO a", "250 mail.example.org\r\n"), ("MAIL FROM:<>", "250 2.1.0 OK\r\n"), RCPT];
        for end in [("RSET", "250 2.0.0 OK\r\n"), ("HELO b", "250 mail.example.org\r\n"), ("", "250 2.6.0 ")] {
            for (command, reply) in transaction.into_iter().chain(end.0.is_empty().then_some(DATA)) {
                write!(client, "{command}\r\n").unwrap();
                expect(&client, reply);
            }
            expect(&connect(address), "421 4.3.2 ");
            write!(client, "{}\r\n", if end.0.is_empty() { "." } else { end.0 }).unwrap();
            expect(&client, end.1);
            let other = loop {
                let other = connect(address);
                let mut code = [0; 3];
                (&other).read_exact(&mut code).unwrap();
                if code == *b"220" {
                    break other;
                }
            };
            let mut rest = String::new();
            client.read_to_string(&mut rest).unwrap();
            assert!(rest.ends_with("421 4.3.2 Too many connections, try again later\r\n"), "{rest}");
            client = other;
            expect(&client, &greeting[3..]);
        }
        cancel.cancel();
        listeners.close(Instant::now() + Duration::from_secs(10));
    }

    const RCPT: (&str, &str) = ("RCPT TO:<a@b.example>", "250 2.1.5 OK, recipient accepted\r\n");
    const DATA: (&str, &str) = ("DATA", "354 Go ahead, end with <CRLF>.<CRLF>\r\n");
}
