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

use crate::queue::Hold;
use crate::session::Session;
use crate::smtp::client::{Client, Plan};
use crate::smtp::reply::Reply;
use crate::smtp::server::{Profile, Server};
use crate::wire::{Filled, Wire};

/// The provider's half, on its way from the worker to the delivery thread. It carries the `250` that is
/// not said yet, and the lock on the mail, which is let go by `Drop` on every way out.
pub struct Turn {
    session: Session,
    hold: Hold,
    /// How many messages wait, unless they are too many to be counted now.
    waiting: Option<usize>,
    account: String,
}

/// So many messages are counted and no more: the reply to ATRN is waited for.
const COUNTED: usize = 10_000;

impl Turn {
    /// Whether the connection may turn: it may not when octets stand behind ATRN, which must be the last
    /// command of a group (RFC 2920 section 3.1). Then the session goes on, and the reply says why.
    pub fn offer(mut session: Session, hold: Hold) -> Result<Box<Turn>, Box<(Session, Reply)>> {
        let arrived = !matches!(session.wire.fill(), Ok(Filled::Nothing));
        if arrived || !session.wire.received().is_empty() {
            let reply = Reply::new(503, "5.5.1", "ATRN must be the last command: wait for its reply");
            return Err(Box::new((session, reply)));
        }
        let account = session.server.account().unwrap_or_default().to_owned();
        let waiting = hold.count(COUNTED).ok().filter(|count| *count < COUNTED);
        Ok(Box::new(Turn { session, hold, waiting, account }))
    }

    /// Nobody can take the turn: the session goes on in its old role.
    pub fn withdraw(self) -> Session {
        self.session
    }

    /// Says the 250, in one line (some customers read no more), and becomes the SMTP client.
    pub fn begin(mut self) -> Turned {
        let waiting = match self.waiting {
            None => String::new(),
            Some(1) => ", 1 message".to_owned(),
            Some(count) => format!(", {count} messages"),
        };
        self.session.say(&Reply::new(250, "2.0.0", format!("OK now reversing the connection{waiting}")));
        self.session.wire.trace.event("turn");
        let Session { wire, server, peer, .. } = self.session;
        let plan = Plan { name: server.hostname().to_owned(), tls: wire.secure().is_some(), ..Plan::default() };
        drop(server);
        Turned { wire, client: Client::new(plan), hold: self.hold, peer, account: self.account }
    }
}

/// What the provider has after the turn.
pub struct Turned {
    pub wire: Wire,
    pub client: Client,
    pub hold: Hold,
    /// The customer's address as a literal.
    pub peer: String,
    /// The account that authenticated: outside SMTP it stays known.
    pub account: String,
}

/// The customer's half: ATRN was answered 250, and from now on it is the SMTP server.
///
/// Octets behind the 250 are an error: the provider has to wait for our greeting (RFC 2645 section 5.3).
pub fn take_over(wire: Wire, client: Client, profile: Profile) -> io::Result<(Wire, Server)> {
    drop(client);
    if !wire.received().is_empty() {
        wire.shutdown();
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the provider spoke behind its 250, before our greeting: this is not RFC 2645",
        ));
    }
    wire.trace.event("turn");
    let tls = wire.secure().is_some();
    Ok((wire, Server::new(profile, tls)))
}
