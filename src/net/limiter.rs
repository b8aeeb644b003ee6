//! The limits of a listener's connections, and which of them makes room for another.
//!
//! A client whose connections cost it nothing must not keep customers and senders out. So a connection is a *stranger*
//! unless its client has authenticated, or has an open transaction with an accepted recipient, and when places are short
//! strangers are closed. All of it happens when a connection comes; there is no timer.
//!
//! ```text
//! places free       what is closed to make room
//! more than 1/4     nothing
//! 1/4 and less      each stranger whose last command is older than the patience, which is `patience` at 1/4 and
//!                   shrinks to 5 s at none (linear)
//! none              the stranger whose last command is oldest; if there is no stranger, the new connection gets 421
//! ```
//!
//! Only complete commands and TLS handshakes count, not octets, and only the first ones, also after each transaction: a
//! client that repeats NOOP is otherwise always newer than one that must wait for a thin line.
//!
//! A listener may keep an eighth of its places for networks that an account has authenticated from: strangers from other
//! networks have the rest, and close no connection of that eighth.
//!
//! A displaced connection has given up its place at once. Its thread wakes, because the socket is shut down for reading,
//! sends 421 if it can, and ends. If it does not end (its client does not read), or if many end at once, the socket is
//! shut down for writing too.

use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::{Shutdown, shutdown};

/// The patience with strangers when no place is free. A client of good will has waited for the network by then.
const LEAST_PATIENCE: Duration = Duration::from_secs(5);

/// Commands of a stranger that count as a sign of life. To authenticate, or to get a recipient accepted, takes less.
const COUNTED_COMMANDS: usize = 12;

/// A displaced connection whose thread has not ended after this time is shut down for writing.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// The number of displaced connections of a listener whose threads may not have ended, at least; else a quarter of `all`.
const FEWEST_ENDING: usize = 8;

/// The limits of each listener.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionLimits {
    /// The most connections.
    pub all: usize,
    /// The most connections from one client, which is an IPv4 address or an IPv6 /64.
    pub each: usize,
    /// How long a stranger may take for a command when a quarter of the places is free.
    pub patience: Duration,
}

impl ConnectionLimits {
    /// The patience with strangers when so many places are free, a quarter at most.
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
    /// The client has as many connections as one may have.
    TooManyOfClient,
}

/// Limits the connections of listeners. Clones count together.
#[derive(Clone)]
pub struct ConnectionLimiter(Arc<LimiterState>);

struct LimiterState {
    connections: Mutex<Vec<Arc<AcceptedConnection>>>,
    released: Condvar,
    limits: Mutex<ConnectionLimits>,
}

impl ConnectionLimiter {
    /// A limiter that counts no connection yet.
    pub fn new(limits: ConnectionLimits) -> ConnectionLimiter {
        let (connections, limits) = (Mutex::default(), Mutex::new(limits));
        ConnectionLimiter(Arc::new(LimiterState { connections, released: Condvar::new(), limits }))
    }

    /// Sets other limits; connections that there are stay.
    pub fn set_limits(&self, limits: ConnectionLimits) {
        *self.0.limits.lock().unwrap_or_else(PoisonError::into_inner) = limits;
    }

    /// Counts one more connection, and makes room for it. `known`: whether an account has authenticated from the network of
    /// `peer`; `None`: the listener keeps no places for such networks.
    ///
    /// # Errors
    ///
    /// A limit is reached.
    pub(super) fn admit(
        &self, listener: &'static str, socket: &Arc<OwnedFd>, peer: IpAddr, known: Option<bool>, now: Instant,
    ) -> Result<ConnectionPermit, NotAdmitted> {
        let limits = *self.0.limits.lock().unwrap_or_else(PoisonError::into_inner);
        let network = client_network(peer);
        let mut connections = self.lock();
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
            standing: AtomicU8::new(STRANGER),
        });
        connections.push(accepted.clone());
        Ok(ConnectionPermit { limiter: self.clone(), accepted })
    }

    /// Makes room for a connection that the system has no descriptor or no thread for. Displaces the strangers of all listeners
    /// with the patience of a listener that is full; of networks that are known the oldest, if there are no others. A client
    /// that has just come stays: the lack may be over in a moment.
    pub(super) fn relieve(&self, now: Instant) {
        let limits = *self.0.limits.lock().unwrap_or_else(PoisonError::into_inner);
        let connections = self.lock();
        let all: Vec<&AcceptedConnection> = connections.iter().map(|other| &**other).collect();
        cut_ending(&all, &limits, now);
        let is_silent = |other: &&&AcceptedConnection| {
            other.is_stranger() && now.saturating_duration_since(other.last_command()) > limits.patience(0)
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
        let _ = self.0.released.wait_timeout_while(self.lock(), left, |connections| !connections.is_empty());
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<AcceptedConnection>>> {
        self.0.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Displaces strangers until there is room for a connection. Returns whether there is. `here`: the connections of its
/// listener; `known`: as for [`ConnectionLimiter::admit`].
fn make_room(here: &[&AcceptedConnection], known: Option<bool>, limits: &ConnectionLimits, now: Instant) -> bool {
    let mut ending = cut_ending(here, limits, now);
    let (kept, is_known) = (known.map_or(0, |_| limits.all / 8), known == Some(true));
    loop {
        // A connection may stop to be a stranger meanwhile.
        let (mut places, mut unknown_strangers, mut known_strangers) = (0, 0, 0);
        for other in here {
            match (other.standing.load(Ordering::SeqCst), other.is_known) {
                (STRANGER, true) => known_strangers += 1,
                (STRANGER, false) => unknown_strangers += 1,
                (TRUSTED, _) => {}
                _ => continue,
            }
            places += 1;
        }
        let all_free = limits.all.saturating_sub(places);
        let free = match is_known {
            true => all_free,
            false => all_free.min((limits.all - kept).saturating_sub(unknown_strangers)),
        };
        let is_spared = |other: &&AcceptedConnection| other.is_known && known_strangers <= kept;
        let strangers = here.iter().copied().filter(|other| other.is_stranger() && (is_known || !is_spared(other)));
        match strangers.min_by_key(|other| (is_spared(other), other.last_command())) {
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

/// Shuts displaced connections down for writing too if they are many, or do not end. Returns how many there are.
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

/// Returns the addresses that count as one client: an IPv6 host has a whole /64 to itself.
fn client_network(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
    }
}

/// It may be displaced.
const STRANGER: u8 = 0;
/// The client has authenticated, or has an open transaction with a recipient.
const TRUSTED: u8 = 1;
/// It has given up its place, and the socket is shut down for reading.
const DISPLACED: u8 = 2;
/// As [`DISPLACED`], and the socket is shut down for writing.
const CUT: u8 = 3;

/// What the limiter, the listener and the session of an accepted connection share.
#[derive(Debug)]
pub struct AcceptedConnection {
    /// The address of the client.
    pub peer: IpAddr,
    socket: Arc<OwnedFd>,
    listener: &'static str,
    /// An account has authenticated from that network.
    is_known: bool,
    begun: Instant,
    /// When the last command was complete, or when the connection was displaced: microseconds after `begun`.
    last: AtomicU64,
    commands: AtomicUsize,
    standing: AtomicU8,
}

impl AcceptedConnection {
    /// The reason in the log why a displaced connection has ended.
    pub const DISPLACED: &str = "it made room for other connections";

    /// The socket of the connection.
    pub fn socket(&self) -> &Arc<OwnedFd> {
        &self.socket
    }

    /// Notes a complete command, or a TLS handshake.
    pub fn note_command(&self, now: Instant) {
        if self.is_stranger() && self.commands.fetch_add(1, Ordering::Relaxed) < COUNTED_COMMANDS {
            self.set_last(now);
        }
    }

    /// Makes the connection no stranger any more, unless it is displaced.
    pub fn trust(&self) {
        self.change(STRANGER, TRUSTED);
    }

    /// Makes the connection a stranger again, whose last command is now, if it was trusted.
    pub fn distrust(&self, now: Instant) {
        if self.standing.load(Ordering::SeqCst) == TRUSTED {
            self.commands.store(0, Ordering::Relaxed);
            self.set_last(now);
            // After that: a stranger is judged by them.
            self.change(TRUSTED, STRANGER);
        }
    }

    /// Whether the session must end, with 421 4.3.2, because another connection has the place.
    pub fn is_displaced(&self) -> bool {
        self.standing.load(Ordering::SeqCst) >= DISPLACED
    }

    fn is_stranger(&self) -> bool {
        self.standing.load(Ordering::SeqCst) == STRANGER
    }

    /// Returns whether the standing was `from`.
    fn change(&self, from: u8, to: u8) -> bool {
        self.standing.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    fn last_command(&self) -> Instant {
        self.begun + Duration::from_micros(self.last.load(Ordering::Relaxed))
    }

    fn set_last(&self, now: Instant) {
        let since = now.saturating_duration_since(self.begun).as_micros();
        self.last.store(u64::try_from(since).unwrap_or_default(), Ordering::Relaxed);
    }

    /// Takes the place of a stranger. Returns whether it was one.
    fn displace(&self, now: Instant) -> bool {
        let was_stranger = self.change(STRANGER, DISPLACED);
        if was_stranger {
            self.set_last(now);
            // Its thread, which waits for a command, finds the end of the input.
            let _ = shutdown(&self.socket, Shutdown::Read);
        }
        was_stranger
    }

    /// Its thread, which waits for the client to read, finds an error.
    fn cut(&self) {
        if self.change(DISPLACED, CUT) {
            let _ = shutdown(&self.socket, Shutdown::Both);
        }
    }
}

/// One connection, counted until this is dropped.
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
        let mut connections = self.limiter.lock();
        if let Some(at) = connections.iter().position(|other| Arc::ptr_eq(other, &self.accepted)) {
            connections.swap_remove(at);
        }
        self.limiter.0.released.notify_all();
    }
}

#[cfg(test)]
mod tests;
