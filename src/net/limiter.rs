//! The limits of a listener's connections, and which of them is closed to make room for another (RFC 5321 section 7.8).
//!
//! Clients that only open connections must not prevent customers and senders from connecting. A connection is *trusted* while
//! its client has authenticated, or has an open transaction with an accepted recipient. If few places are free, untrusted
//! connections are closed. The limiter checks this when it admits a connection; there is no timer.
//!
//! ```text
//! places free       what is closed to make room
//! more than 1/4     nothing
//! 1/4 and less      each untrusted connection whose last command is older than the patience: `patience` at 1/4, 5 s at
//!                   none, linear between
//! none              the untrusted connection whose last command is oldest; if all are trusted, the new one gets 421
//! ```
//!
//! Only complete commands and TLS handshakes count, not octets, and of them only the first ones (again after each
//! transaction): otherwise a client that repeats NOOP would always be newer than one on a slow line.
//!
//! A listener may reserve an eighth of its places for known networks, from which an account has authenticated before. Untrusted
//! connections from other networks have the rest, and displace no connection of that eighth.
//!
//! A displaced connection counts no longer. Its thread wakes, because the socket is shut down for reading, sends 421 if it
//! can, and ends. If it does not end because its client does not read, or if many end at once, the socket is shut down for
//! writing too.

use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar};
use std::time::{Duration, Instant};

use rustix::net::{Shutdown, shutdown};

use crate::log_limit::{LoggedWarnings, may_log};
use crate::threads::Guarded;

/// The patience when no place is free: the network of an honest client needs no longer for a command.
const LEAST_PATIENCE: Duration = Duration::from_secs(5);

/// Commands of an untrusted client that count. It needs fewer to authenticate, or to have a recipient accepted.
const COUNTED_COMMANDS: usize = 12;

/// A displaced connection whose thread has not ended after this time is shut down for writing.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// The displaced connections of a listener whose threads may not have ended: a quarter of `all`, but at least this many.
const FEWEST_ENDING: usize = 8;

/// The maximum of clients whose rejected connections are logged within a minute.
const LOGGED_LIMIT: usize = 100;

/// The limits of each listener.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionLimits {
    /// The most connections.
    pub all: usize,
    /// The most connections from one client, which is an IPv4 address or an IPv6 /64.
    pub each: usize,
    /// How long an untrusted client may take for a command when a quarter of the places is free.
    pub patience: Duration,
}

impl ConnectionLimits {
    /// The patience when `free` places are free.
    fn patience(&self, free: usize) -> Duration {
        let (least, quarter) = (LEAST_PATIENCE.min(self.patience), (self.all / 4).max(1));
        least + (self.patience - least).mul_f64(free.min(quarter) as f64 / quarter as f64)
    }

    fn most_ending(&self) -> usize {
        (self.all / 4).max(FEWEST_ENDING)
    }
}

/// Why a connection is not admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotAdmitted {
    /// The listener has no room.
    Full,
    /// The client has reached the limit of connections from one client.
    TooManyOfClient,
}

/// Limits the connections of listeners. Clones count together.
#[derive(Clone)]
pub struct ConnectionLimiter(Arc<LimiterState>);

struct LimiterState {
    connections: Guarded<Vec<Arc<AcceptedConnection>>>,
    released: Condvar,
    limits: Guarded<ConnectionLimits>,
    /// By listener and client: the connections that were not admitted.
    logged: Guarded<LoggedWarnings<(&'static str, IpAddr)>>,
}

impl ConnectionLimiter {
    /// A limiter without connections.
    pub fn new(limits: ConnectionLimits) -> ConnectionLimiter {
        let (connections, limits, logged) = (Guarded::default(), Guarded::new(limits), Guarded::default());
        ConnectionLimiter(Arc::new(LimiterState { connections, released: Condvar::new(), limits, logged }))
    }

    /// Changes the limits. They apply from the next connection on; the present ones stay.
    pub fn set_limits(&self, limits: ConnectionLimits) {
        *self.0.limits.lock() = limits;
    }

    /// Counts one more connection, and makes room for it. `known`: whether an account has authenticated from the network of
    /// `peer`; `None`: the listener reserves no places for such networks.
    ///
    /// # Errors
    ///
    /// A limit is reached.
    pub(super) fn admit(
        &self, listener: &'static str, socket: &Arc<OwnedFd>, peer: IpAddr, known: Option<bool>, now: Instant,
    ) -> Result<ConnectionPermit, NotAdmitted> {
        let limits = *self.0.limits.lock();
        let network = client_network(peer);
        let mut connections = self.0.connections.lock();
        let here: Vec<&AcceptedConnection> =
            connections.iter().map(|other| &**other).filter(|o| o.listener == listener).collect();
        let of_client = here.iter().filter(|other| client_network(other.peer) == network && !other.is_displaced());
        if of_client.count() >= limits.each {
            return Err(NotAdmitted::TooManyOfClient);
        }
        if !make_room(&here, known, &limits, now) {
            return Err(NotAdmitted::Full);
        }
        let accepted = Arc::new(AcceptedConnection {
            socket: socket.clone(),
            listener,
            peer,
            is_known: known == Some(true),
            begun: now,
            last: AtomicU64::new(0),
            commands: AtomicUsize::new(0),
            state: AtomicU8::new(UNTRUSTED),
        });
        connections.push(accepted.clone());
        Ok(ConnectionPermit { limiter: self.clone(), accepted })
    }

    /// Whether to log that a connection was not admitted, and how many of that client were not logged: see [`may_log`].
    pub(super) fn may_log(&self, listener: &'static str, peer: IpAddr, now: Instant) -> Option<usize> {
        let mut logged = self.0.logged.lock();
        may_log(&mut logged, &[(listener, client_network(peer))], LOGGED_LIMIT, now)
    }

    /// Makes room for a connection for which the system has no descriptor or no thread. Displaces the untrusted connections of
    /// all listeners that a full listener would have no patience with; if all of these are from known networks, only the
    /// oldest. Newer connections stay, because the shortage may end soon.
    pub(super) fn relieve(&self, now: Instant) {
        let limits = *self.0.limits.lock();
        let connections = self.0.connections.lock();
        let all: Vec<&AcceptedConnection> = connections.iter().map(|other| &**other).collect();
        cut_ending(&all, &limits, now);
        let is_silent = |other: &&&AcceptedConnection| {
            other.is_untrusted() && now.saturating_duration_since(other.last_command()) > limits.patience(0)
        };
        let silent = || all.iter().filter(is_silent);
        if silent().filter(|other| !other.is_known && other.displace(now)).count() == 0 {
            let oldest = silent().min_by_key(|other| other.last_command());
            oldest.map(|oldest| oldest.displace(now));
        }
    }

    /// Waits until there is no connection, or until the deadline.
    pub fn wait_until_idle(&self, deadline: Instant) {
        let left = deadline.saturating_duration_since(Instant::now());
        let _ =
            self.0.released.wait_timeout_while(self.0.connections.lock(), left, |connections| !connections.is_empty());
    }
}

/// Displaces untrusted connections until there is room for another. Returns whether there is. `here`: the connections of its
/// listener; `known`: as for [`ConnectionLimiter::admit`].
fn make_room(here: &[&AcceptedConnection], known: Option<bool>, limits: &ConnectionLimits, now: Instant) -> bool {
    let mut ending = cut_ending(here, limits, now);
    let (reserved, is_known) = (known.map_or(0, |_| limits.all / 8), known == Some(true));
    loop {
        // Count again each time: a connection may have become trusted.
        let (mut places, mut untrusted_unknown, mut untrusted_known) = (0, 0, 0);
        for other in here {
            match (other.state.load(Ordering::SeqCst), other.is_known) {
                (UNTRUSTED, true) => untrusted_known += 1,
                (UNTRUSTED, false) => untrusted_unknown += 1,
                (TRUSTED, _) => {}
                _ => continue,
            }
            places += 1;
        }
        let all_free = limits.all.saturating_sub(places);
        let for_unknown = (limits.all - reserved).saturating_sub(untrusted_unknown);
        let free = if is_known { all_free } else { all_free.min(for_unknown) };
        let is_spared = |other: &&AcceptedConnection| other.is_known && untrusted_known <= reserved;
        let untrusted = here.iter().copied().filter(|other| other.is_untrusted() && (is_known || !is_spared(other)));
        match untrusted.min_by_key(|other| (is_spared(other), other.last_command())) {
            Some(oldest) if free <= limits.all / 4 && ending < limits.most_ending() => {
                let silent = now.saturating_duration_since(oldest.last_command());
                if free > 0 && silent <= limits.patience(free) {
                    return true;
                }
                ending += usize::from(oldest.displace(now));
            }
            _ => return free > 0,
        }
    }
}

/// Shuts displaced connections down for writing too, if there are many, or those that do not end. Returns their number.
fn cut_ending(here: &[&AcceptedConnection], limits: &ConnectionLimits, now: Instant) -> usize {
    let ending = here.iter().filter(|other| other.is_displaced());
    let count = ending.clone().count();
    for other in ending {
        if count > limits.most_ending() / 2 || now.saturating_duration_since(other.last_command()) > END_TIMEOUT {
            other.cut();
        }
    }
    count
}

/// Returns the network that counts as one client: an IPv6 host has a whole /64.
fn client_network(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
    }
}

/// The connection may be displaced.
const UNTRUSTED: u8 = 0;
/// The client has authenticated, or has an open transaction with an accepted recipient.
const TRUSTED: u8 = 1;
/// The connection counts no longer, and the socket is shut down for reading.
const DISPLACED: u8 = 2;
/// As [`DISPLACED`], and the socket is shut down for writing.
const CUT: u8 = 3;

/// An accepted connection, which the limiter, the listener and the session share.
#[derive(Debug)]
pub struct AcceptedConnection {
    /// The address of the client.
    pub peer: IpAddr,
    socket: Arc<OwnedFd>,
    listener: &'static str,
    /// An account has authenticated from the network of the client before.
    is_known: bool,
    begun: Instant,
    /// When the last command was complete, or when the connection was displaced: microseconds after `begun`.
    last: AtomicU64,
    commands: AtomicUsize,
    state: AtomicU8,
}

impl AcceptedConnection {
    /// The `reason` of a displaced connection in the log.
    pub const DISPLACED: &str = "it made room for other connections";

    /// The socket of the connection.
    pub fn socket(&self) -> &Arc<OwnedFd> {
        &self.socket
    }

    /// Notes a complete command, or a TLS handshake.
    pub fn note_command(&self, now: Instant) {
        if self.is_untrusted() && self.commands.fetch_add(1, Ordering::Relaxed) < COUNTED_COMMANDS {
            self.set_last(now);
        }
    }

    /// Makes the connection trusted, unless it is displaced.
    pub fn trust(&self) {
        self.change(UNTRUSTED, TRUSTED);
    }

    /// Makes a trusted connection untrusted, with a last command at `now`.
    pub fn distrust(&self, now: Instant) {
        if self.state.load(Ordering::SeqCst) == TRUSTED {
            self.commands.store(0, Ordering::Relaxed);
            self.set_last(now);
            // Last: with an old `last` the connection would be displaced at once.
            self.change(TRUSTED, UNTRUSTED);
        }
    }

    /// Whether the session must end, with 421 4.3.2, because another connection has displaced it.
    pub fn is_displaced(&self) -> bool {
        self.state.load(Ordering::SeqCst) >= DISPLACED
    }

    fn is_untrusted(&self) -> bool {
        self.state.load(Ordering::SeqCst) == UNTRUSTED
    }

    /// Returns whether the state was `from`.
    fn change(&self, from: u8, to: u8) -> bool {
        self.state.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    fn last_command(&self) -> Instant {
        self.begun + Duration::from_micros(self.last.load(Ordering::Relaxed))
    }

    fn set_last(&self, now: Instant) {
        let since = now.saturating_duration_since(self.begun).as_micros();
        self.last.store(u64::try_from(since).unwrap_or_default(), Ordering::Relaxed);
    }

    /// Displaces an untrusted connection. Returns whether it was one.
    fn displace(&self, now: Instant) -> bool {
        let was_untrusted = self.change(UNTRUSTED, DISPLACED);
        if was_untrusted {
            self.set_last(now);
            // Its thread, which waits for a command, reads the end of the input.
            let _ = shutdown(&self.socket, Shutdown::Read);
        }
        was_untrusted
    }

    /// Shuts a displaced connection down for writing: its thread, which waits for the client to read, gets an error.
    fn cut(&self) {
        if self.change(DISPLACED, CUT) {
            let _ = shutdown(&self.socket, Shutdown::Both);
        }
    }
}

/// A place for one connection, until it is dropped.
pub(super) struct ConnectionPermit {
    limiter: ConnectionLimiter,
    accepted: Arc<AcceptedConnection>,
}

impl ConnectionPermit {
    pub(super) fn accepted(&self) -> &Arc<AcceptedConnection> {
        &self.accepted
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let mut connections = self.limiter.0.connections.lock();
        if let Some(at) = connections.iter().position(|other| Arc::ptr_eq(other, &self.accepted)) {
            connections.swap_remove(at);
        }
        self.limiter.0.released.notify_all();
    }
}

#[cfg(test)]
mod tests;
