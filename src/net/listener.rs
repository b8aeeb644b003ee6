//! Listeners: one thread for each connection, within limits.
//!
//! The connections of a listener are limited, and so are those from one client, so that no client can use up all
//! threads. Excess connections get 421 (RFC 5321 section 3.1). A panic ends its connection and nothing else.

use std::io::{self, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use crate::net::cancel::{CancelToken, poll};
use crate::net::trace::quoted;
use crate::smtp::reply::Reply;

/// The pause after accept(2) failed, usually because the system has no descriptors left.
const ACCEPT_RETRY_PAUSE: Duration = Duration::from_millis(100);

/// Serves one connection in a thread of its own; the second argument is the peer's address.
pub type Service = Arc<dyn Fn(TcpStream, IpAddr) + Send + Sync>;

/// Opens a listening socket for [`Acceptor::accept`].
///
/// # Errors
///
/// A text with the address, the cause and what to do.
pub fn bind(address: SocketAddr) -> Result<TcpListener, String> {
    let listener = TcpListener::bind(address);
    // If a connection is reset between poll(2) and accept(2), accept(2) must not wait for the next one.
    listener.and_then(|listener| listener.set_nonblocking(true).map(|()| listener)).map_err(|error| {
        let advice = match error.kind() {
            io::ErrorKind::PermissionDenied => ": ports below 1024 need root, or a supervisor that passes them on",
            io::ErrorKind::AddrInUse => ": another program listens there; stop it or choose another address",
            _ => "",
        };
        format!("cannot listen on {address}: {error}{advice}")
    })
}

/// Accepts the connections of one listener.
pub struct Acceptor {
    /// The listener's name in the log; each name has limits of its own.
    pub name: &'static str,
    /// Whether the protocol begins with a greeting in clear, so that excess connections can get a reply.
    pub greets: bool,
    /// Ends `accept`.
    pub cancel: CancelToken,
    /// Counts the connections.
    pub limiter: ConnectionLimiter,
}

impl Acceptor {
    /// Accepts connections and serves each in a new thread, until `cancel` is cancelled. `listener`: from [`bind`].
    pub fn accept(&self, listener: &TcpListener, service: Service) {
        loop {
            let descriptors = [listener.as_fd(), self.cancel.fd()];
            let _ = poll(&mut descriptors.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)), None);
            if self.cancel.is_cancelled() {
                return;
            }
            match listener.accept() {
                Ok((stream, peer)) => self.admit(stream, peer.ip().to_canonical(), &service),
                Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
                Err(error) => {
                    log::warn!("event=accept-failed listener={} error={}", self.name, quoted(error));
                    // The connection stays in the backlog, so poll(2) would return at once.
                    self.cancel.wait_until(Some(Instant::now() + ACCEPT_RETRY_PAUSE));
                }
            }
        }
    }

    fn admit(&self, stream: TcpStream, peer: IpAddr, service: &Service) {
        let Some(permit) = self.limiter.acquire(self.name, peer) else {
            log::warn!("event=too-many-connections listener={} peer={peer}", self.name);
            self.reject(&stream);
            return;
        };
        let (service, name) = (service.clone(), self.name);
        let worker = std::thread::Builder::new().name(format!("{name}-worker")).spawn(move || {
            if catch_unwind(AssertUnwindSafe(|| service(stream, peer))).is_err() {
                log::error!("event=panic listener={name} peer={peer}");
            }
            drop(permit);
        });
        if let Err(error) = worker {
            log::error!("event=no-thread listener={name} error={}", quoted(error));
        }
    }

    /// Sends 421, if that is possible without waiting.
    fn reject(&self, mut stream: &TcpStream) {
        if self.greets && stream.set_nonblocking(true).is_ok() {
            let mut octets = Vec::new();
            Reply::new(421, "4.7.0", "Too many connections, try again later").write_to(&mut octets);
            let _ = stream.write(&octets);
        }
    }
}

/// Limits the connections of listeners. Clones count together.
#[derive(Clone)]
pub struct ConnectionLimiter(Arc<LimiterState>);

struct LimiterState {
    connections: Mutex<Vec<CountedAs>>,
    released: Condvar,
    limit: usize,
    limit_each: usize,
}

/// What a connection counts as: its listener, and the network of its client.
type CountedAs = (&'static str, IpAddr);

impl ConnectionLimiter {
    /// `limit`: the most connections of one listener; `limit_each`: the most of one listener from one client, which is
    /// an IPv4 address or an IPv6 /64.
    pub fn new(limit: usize, limit_each: usize) -> ConnectionLimiter {
        let connections = Mutex::default();
        ConnectionLimiter(Arc::new(LimiterState { connections, released: Condvar::new(), limit, limit_each }))
    }

    /// Counts one more connection; `None`: a limit is reached.
    fn acquire(&self, listener: &'static str, peer: IpAddr) -> Option<ConnectionPermit> {
        let counted = (listener, client_network(peer));
        let mut connections = self.lock();
        let all = connections.iter().filter(|(name, _)| *name == listener).count();
        let from_client = connections.iter().filter(|other| **other == counted).count();
        if all >= self.0.limit || from_client >= self.0.limit_each {
            return None;
        }
        connections.push(counted);
        Some(ConnectionPermit { limiter: self.clone(), counted })
    }

    /// Waits until there is no connection, or until the deadline.
    pub fn wait_until_idle(&self, deadline: Instant) {
        let left = deadline.saturating_duration_since(Instant::now());
        let _ = self.0.released.wait_timeout_while(self.lock(), left, |connections| !connections.is_empty());
    }

    fn lock(&self) -> MutexGuard<'_, Vec<CountedAs>> {
        self.0.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the addresses that count as one client: an IPv6 host has a whole /64 to itself.
fn client_network(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
    }
}

/// One connection, counted until this is dropped.
struct ConnectionPermit {
    limiter: ConnectionLimiter,
    counted: CountedAs,
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let mut connections = self.limiter.lock();
        if let Some(at) = connections.iter().position(|other| *other == self.counted) {
            connections.swap_remove(at);
        }
        self.limiter.0.released.notify_all();
    }
}
