//! The limits and timeouts of sessions, with their defaults. `config` reads them from `[limits]` and `[timeouts]`. The
//! numbers of the RFCs are in [`smtp::limits`](limits).

use std::time::Duration;

use crate::net::limiter::ConnectionLimits;
use crate::smtp::client::Stage;
use crate::smtp::limits;
use crate::smtp::server::{ServerOptions, ServerRole};

/// `[limits]`: the numbers above which the program rejects or defers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Concurrent connections to each listener; excess connections get `421`. Default 1000, at least 1.
    pub connections: usize,
    /// Concurrent connections to each listener from one address. Default 50, at least 1.
    pub connections_per_address: usize,
    /// Recipients of one message; excess recipients get `452` (RFC 5321 section 4.5.3.1.10). From
    /// [`limits::FEWEST_RECIPIENTS`], the default, to 1000.
    pub recipients: usize,
    /// Commands that may fail before the server ends the session with `421`. Default 20, at least 1.
    pub errors: usize,
    /// AUTH commands that may fail before the server ends the session with `421`. At least
    /// [`limits::FEWEST_AUTH_FAILURES`], the default.
    pub auth_failures: usize,
    /// Concurrent turned sessions; an excess ATRN gets `451`. Default 10 000, at least 1.
    pub turned_sessions: usize,
    /// Messages sent in one turned session before QUIT; 0, the default: no limit.
    pub messages_per_turn: usize,
    /// Octets of content sent in one turned session before QUIT; 0, the default: no limit.
    pub octets_per_turn: u64,
    /// Octets that must be free on the disk after the message is stored; otherwise mail is deferred. Default 4 MiB.
    pub min_free: u64,
    /// A message with more `Received:` fields than this is in a mail loop (RFC 5321 section 6.3). Default 100, at least
    /// 1.
    pub received_hops: usize,
}

impl Limits {
    /// The limits of connections for a listener. `patience`, after which a silent client that is not trusted may lose
    /// its place, is `timeouts.command`.
    pub fn of_connections(&self, timeouts: &Timeouts) -> ConnectionLimits {
        ConnectionLimits { all: self.connections, each: self.connections_per_address, patience: timeouts.command }
    }

    /// The options of a server with these limits. `max_size`: octets of a message at most. TLS and AUTH are off; the
    /// listener adds them.
    pub fn server_options(&self, role: ServerRole, hostname: &str, max_size: u64) -> ServerOptions {
        ServerOptions {
            role,
            hostname: hostname.to_owned(),
            max_size,
            max_recipients: self.recipients,
            max_errors: self.errors,
            max_auth_failures: self.auth_failures,
            starttls: false,
            require_tls: false,
            dsn: true,
            soft_bounce: false,
            mechanisms: Vec::new(),
        }
    }
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections: 1000,
            connections_per_address: 50,
            recipients: limits::FEWEST_RECIPIENTS as usize,
            errors: 20,
            auth_failures: limits::FEWEST_AUTH_FAILURES as usize,
            turned_sessions: 10_000,
            messages_per_turn: 0,
            octets_per_turn: 0,
            min_free: 4 << 20,
            received_hops: limits::LOOP_HOPS,
        }
    }
}

/// `[timeouts]`: the times after which the program stops waiting, between 1 ms and 365 days. The defaults of those for
/// commands and replies are the minima of RFC 5321 section 4.5.3.2.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Timeouts {
    /// The client waits for the connection to one address. Default 30 s.
    pub connect: Duration,
    /// The client waits for the `220`, also after a turn. Default 5 min.
    pub greeting: Duration,
    /// The client waits for the reply to MAIL. Default 5 min.
    pub mail: Duration,
    /// The client waits for the reply to RCPT. Default 5 min.
    pub recipient: Duration,
    /// The client waits for the `354` to DATA. Default 2 min.
    pub data: Duration,
    /// Client and server wait for one block of content to be sent or received, 64 KiB. Default 3 min.
    pub block: Duration,
    /// The client waits for the reply to the content. Default 10 min.
    pub end: Duration,
    /// The server waits for a command; the client waits for the reply to each command that has no timeout of its own.
    /// Default 5 min.
    pub command: Duration,
    /// The customer waits for the reply to ATRN. At least [`limits::ATRN_TIMEOUT`], the default.
    pub atrn: Duration,
    /// The customer sends outgoing mail before ATRN for this long at most. If that does not suffice, it fetches
    /// incoming mail over another connection, and again at this interval until the outgoing mail is sent. Default 10
    /// min.
    pub outgoing: Duration,
    /// The duration of a TLS handshake. Default 1 min.
    pub handshake: Duration,
    /// The duration of a server's session before a turn, without the time that content earns (see
    /// [`PaceClock`](super::pace::PaceClock)). Default 1 h.
    pub session: Duration,
    /// The duration of a session after the turn, without the time that content earns. Default 12 h.
    pub turn: Duration,
    /// If the customer of a turned session has not replied for this long, its next call takes the session's lock over.
    /// Default 1 min.
    pub takeover: Duration,
    /// How long sessions may go on after a signal to stop. Default 10 s.
    pub shutdown: Duration,
}

impl Timeouts {
    /// How long the client waits for a reply (RFC 5321 section 4.5.3.2; RFC 2645 section 5.2.1).
    pub fn reply_timeout(&self, awaiting: Option<Stage>) -> Duration {
        match awaiting {
            Some(Stage::Greeting) => self.greeting,
            Some(Stage::Mail) => self.mail,
            Some(Stage::Rcpt(_)) => self.recipient,
            Some(Stage::Data) => self.data,
            Some(Stage::Content | Stage::LoneDot) => self.end,
            Some(Stage::Atrn) => self.atrn,
            _ => self.command,
        }
    }
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        let seconds = Duration::from_secs;
        Timeouts {
            connect: seconds(30),
            greeting: limits::GREETING_TIMEOUT,
            mail: limits::MAIL_TIMEOUT,
            recipient: limits::RCPT_TIMEOUT,
            data: limits::DATA_TIMEOUT,
            block: limits::BLOCK_TIMEOUT,
            end: limits::CONTENT_TIMEOUT,
            command: limits::COMMAND_TIMEOUT,
            atrn: limits::ATRN_TIMEOUT,
            outgoing: seconds(10 * 60),
            handshake: seconds(60),
            session: seconds(60 * 60),
            turn: seconds(12 * 60 * 60),
            takeover: seconds(60),
            shutdown: seconds(10),
        }
    }
}
