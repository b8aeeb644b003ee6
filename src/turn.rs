//! The turn: the SMTP server becomes the SMTP client, and the SMTP client the SMTP server (RFC 2645 section 5.3).
//!
//! ```text
//!  provider                                                                 customer
//!  SMTP server                                                              SMTP client
//!      │ ◀──────────────────────── ATRN example.org ─────────────────────────── │
//!  the worker locks the mail of example.org                                     │
//!  Turn::offer: more octets after ATRN? 503, and the session goes on            │
//!  the worker submits the turn to the delivery thread                           │
//!  Turn::begin ────────────── 250 OK now reversing the connection ────────────▶ │
//!  SMTP client                           turn::accept: more octets after the 250, not QUIT? close
//!      │                                                                    SMTP server
//!      │ ◀────────────────────────── 220 greeting ───────────────────────────── │
//!      │ ────────────────────────────── EHLO ─────────────────────────────────▶ │
//!      │                  … the provider sends the mail …                       │
//!      │ ────────────────────────────── QUIT ─────────────────────────────────▶ │
//! ```
//!
//! Only the SMTP roles turn. TCP and TLS go on as they are: the customer stays the TLS client. The extensions that a side
//! has learned from EHLO before the turn are discarded: there is a new greeting and a new EHLO (RFC 2645 section 5.3).
//! There is no second turn: after QUIT both sides close.
//!
//! The invariant: no octet that has arrived in the old role is parsed in the new one, and none is sent in the old role after
//! the turn. Both halves consume the connection and the old role, so the compiler prevents the latter. If octets have
//! arrived too early, [`Turn::offer`] and [`accept`] prevent the turn. The one exception is the QUIT of a provider that has
//! no mail and does not wait for the greeting. After [`Turn::begin`] the provider expects the greeting of an SMTP server;
//! any other line ends the session.

use std::io;
use std::time::{Duration, Instant};

use crate::net::cancel::CancelToken;
use crate::net::connection::{Connection, Filled, WaitResult};
use crate::queue::QueueLock;
use crate::session::server::ServerSession;
use crate::smtp::client::{Client, ClientOptions, Without8BitMime};
use crate::smtp::reply::Reply;
use crate::smtp::server::{Server, ServerOptions};

/// The provider's half, on its way from the worker to the delivery thread.
pub struct Turn {
    session: Box<ServerSession>,
    /// `Drop` releases the lock, however the turn ends.
    lock: QueueLock,
    /// The 250 to ATRN, not sent yet.
    reply: Reply,
}

/// The reply to ATRN has the number of messages only if it is smaller: counting more would delay the reply.
const COUNT_LIMIT: usize = 10_000;

impl Turn {
    /// Prepares the turn of a session that has received ATRN; `lock` holds the queues of the domains in it.
    ///
    /// # Errors
    /// Octets have arrived after ATRN, which must be the last command of a group (RFC 2920 section 3.1), or the
    /// connection has ended. Returns the session, and the reply to ATRN.
    pub fn offer(mut session: Box<ServerSession>, lock: QueueLock) -> Result<Box<Turn>, (Box<ServerSession>, Reply)> {
        let quiet = matches!(session.connection.fill(), Ok(Filled::Nothing));
        if !quiet || !session.connection.received().is_empty() {
            let reply = Reply::new(503, "5.5.1", "ATRN must be the last command: wait for its reply");
            return Err((session, reply));
        }
        let waiting = match lock.count(COUNT_LIMIT) {
            Ok(1) => ", 1 message".to_owned(),
            Ok(count) if count < COUNT_LIMIT => format!(", {count} messages"),
            _ => String::new(),
        };
        // One line: fetchmail reads no more. Our customer reads the number before a word that begins with "message"
        // (`smtp::client`), and so knows whether to call again.
        let reply = Reply::new(250, "2.0.0", format!("OK now reversing the connection{waiting}"));
        Ok(Box::new(Turn { session, lock, reply }))
    }

    /// Cancels a turn that the delivery thread cannot accept. Returns the session, in which this side is still the
    /// server.
    pub fn withdraw(self) -> Box<ServerSession> {
        self.session
    }

    /// Queues the 250 on the connection, and makes the SMTP client of the session (RFC 2645 section 5.3).
    pub fn begin(mut self, without_8bitmime: Without8BitMime) -> Turned {
        self.session.reply(&self.reply);
        let ServerSession { connection, server, peer, .. } = *self.session;
        connection.trace.event("turn");
        let account = server.account().unwrap_or_default().to_owned();
        let (name, tls) = (server.hostname().to_owned(), connection.tls_channel());
        let client = Client::new(ClientOptions { name, tls, without_8bitmime, ..ClientOptions::default() });
        Turned { connection, client, lock: self.lock, peer, account }
    }
}

/// The provider's half after the turn.
pub struct Turned {
    pub connection: Connection,
    /// The client, which waits for the customer's greeting.
    pub client: Client,
    pub lock: QueueLock,
    /// The customer's address as a literal, `[192.0.2.1]`.
    pub peer: String,
    /// The account as which the customer has authenticated.
    pub account: String,
}

/// The customer's half: the provider has replied 250 to ATRN, and the customer becomes the SMTP server. Returns the server,
/// which has not sent its greeting yet.
///
/// Exim does not wait for the greeting if it has nothing to send: its QUIT arrives with its 250. That QUIT stays in the
/// input, and the server replies to it.
///
/// # Errors
/// Other octets have arrived after the 250: the provider must wait for the greeting (RFC 2645 section 5.3). The connection is
/// closed.
pub fn accept(
    mut connection: Connection, client: Client, options: ServerOptions, cancel: &CancelToken,
) -> Result<(Connection, Server), &'static str> {
    drop(client);
    if !matches!(has_nothing_but_quit(&mut connection, cancel), Ok(true)) {
        connection.shutdown();
        return Err("the provider sent octets after its 250 and before our greeting (RFC 2645 section 5.3)");
    }
    connection.trace.event("turn");
    let tls = connection.tls_channel();
    Ok((connection, Server::new(options, tls)))
}

/// How long the customer waits for the rest of a QUIT whose first octets have arrived.
const QUIT_TIMEOUT: Duration = Duration::from_secs(5);

/// Whether nothing has arrived, or only QUIT.
fn has_nothing_but_quit(connection: &mut Connection, cancel: &CancelToken) -> io::Result<bool> {
    let (quit, deadline) = (b"QUIT\r\n", Instant::now() + QUIT_TIMEOUT);
    loop {
        let received = connection.received();
        if received.is_empty() || received == quit || !quit.starts_with(received) {
            return Ok(received.is_empty() || received == quit);
        }
        if connection.wait_input(deadline, cancel)? != WaitResult::Ready || connection.fill()? == Filled::End {
            return Ok(false);
        }
    }
}
