//! The turn: who was SMTP server becomes SMTP client, and the other way round (RFC 2645 section 5.3).
//!
//! ```text
//!            provider                                     customer
//!        Session (SMTP server)                         Client (SMTP client)
//!                 │  ◀──────────────── ATRN ─────────────── │
//!          Turn::offer                                      │
//!                 │  ── the channel ──▶ delivery thread     │
//!          Turn::begin ─────────────── 250 ───────────────▶ │
//!                 │                                   take_over
//!        Client (SMTP client)                          Server (SMTP server)
//!                 │  ◀──────────── 220 greeting ─────────── │
//!                 │  ───────────────── EHLO ──────────────▶ │
//! ```
//!
//! The SMTP role turns; TCP, TLS and who is provider and who is customer stay as they are, and so no TLS
//! begins or ends here. Both halves take the wire and the old role by value: nothing can be said in the old
//! role afterwards, and no octet crosses the turn unnoticed. Of what SMTP learned before nothing is kept
//! (a new greeting, a new EHLO). There is no way back: after the provider's QUIT both close.

use std::io;

use crate::net::connection::{Connection, Filled};
use crate::queue::QueueLock;
use crate::session::server::ServerSession;
use crate::smtp::client::{Client, ClientOptions};
use crate::smtp::reply::Reply;
use crate::smtp::server::{Server, ServerOptions};

/// The provider's half, on its way from the worker to the delivery thread. It carries the `250` that is
/// not said yet, and the lock on the mail, which is let go by `Drop` on every way out.
pub struct Turn {
    session: ServerSession,
    lock: QueueLock,
    /// How many messages wait, unless they are too many to be counted now.
    waiting: Option<usize>,
    account: String,
}

/// So many messages are counted and no more: the reply to ATRN is waited for.
const COUNT_LIMIT: usize = 10_000;

impl Turn {
    /// Whether the connection may turn: it may not when octets stand behind ATRN, which must be the last
    /// command of a group (RFC 2920 section 3.1). Then the session goes on, and the reply says why.
    pub fn offer(mut session: ServerSession, lock: QueueLock) -> Result<Box<Turn>, Box<(ServerSession, Reply)>> {
        let arrived = !matches!(session.connection.fill(), Ok(Filled::Nothing));
        if arrived || !session.connection.received().is_empty() {
            let reply = Reply::new(503, "5.5.1", "ATRN must be the last command: wait for its reply");
            return Err(Box::new((session, reply)));
        }
        let account = session.server.account().unwrap_or_default().to_owned();
        let waiting = lock.count(COUNT_LIMIT).ok().filter(|count| *count < COUNT_LIMIT);
        Ok(Box::new(Turn { session, lock, waiting, account }))
    }

    /// Nobody can take the turn: the session goes on in its old role.
    pub fn withdraw(self) -> ServerSession {
        self.session
    }

    /// Says the 250, in one line (some customers read no more), and becomes the SMTP client.
    pub fn begin(mut self) -> Turned {
        let waiting = match self.waiting {
            None => String::new(),
            Some(1) => ", 1 message".to_owned(),
            Some(count) => format!(", {count} messages"),
        };
        self.session.reply(&Reply::new(250, "2.0.0", format!("OK now reversing the connection{waiting}")));
        self.session.connection.trace.event("turn");
        let ServerSession { connection, server, peer, .. } = self.session;
        let options = ClientOptions {
            name: server.hostname().to_owned(),
            tls: connection.tls_info().is_some(),
            ..ClientOptions::default()
        };
        drop(server);
        Turned { connection, client: Client::new(options), lock: self.lock, peer, account: self.account }
    }
}

/// What the provider has after the turn.
pub struct Turned {
    pub connection: Connection,
    pub client: Client,
    pub lock: QueueLock,
    /// The customer's address as a literal.
    pub peer: String,
    /// The account that authenticated: outside SMTP it stays known.
    pub account: String,
}

/// The customer's half: ATRN was answered 250, and from now on it is the SMTP server.
///
/// Octets behind the 250 are an error: the provider has to wait for our greeting (RFC 2645 section 5.3).
pub fn take_over(connection: Connection, client: Client, profile: ServerOptions) -> io::Result<(Connection, Server)> {
    drop(client);
    if !connection.received().is_empty() {
        connection.shutdown();
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the provider spoke behind its 250, before our greeting: this is not RFC 2645",
        ));
    }
    connection.trace.event("turn");
    let tls = connection.tls_info().is_some();
    Ok((connection, Server::new(profile, tls)))
}
