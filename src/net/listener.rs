//! Listeners: one thread for each connection, within limits.
//!
//! The connections of a listener are limited, and so are those from one address: one client cannot use up all threads.
//! Excess connections get 421. A panic ends its connection and nothing else.

use std::collections::HashMap;
use std::io::{self, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use crate::net::cancel::CancelToken;
use crate::smtp::reply::Reply;

/// How long nothing is accepted if the system has no descriptors left.
const ACCEPT_RETRY_PAUSE: Duration = Duration::from_millis(100);

/// Serves one connection, in a thread of its own, from the address of the peer.
pub type Service = Arc<dyn Fn(TcpStream, IpAddr) + Send + Sync>;

/// Opens a listening socket. The text of the error says what to do.
pub fn bind(address: SocketAddr) -> Result<TcpListener, String> {
    let listener = TcpListener::bind(address).and_then(|listener| {
        // If a connection is reset between poll(2) and accept(2), accept(2) must not wait for the next one.
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    listener.map_err(|error| {
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
    /// For the log; each name has limits of its own.
    pub name: &'static str,
    /// The protocol begins with a greeting in clear, so excess connections can get a reply.
    pub greets: bool,
    /// Ends `accept`.
    pub cancel: CancelToken,
    pub limiter: ConnectionLimiter,
}

impl Acceptor {
    /// Accepts connections and serves each in a new thread, until it is cancelled.
    pub fn accept(&self, listener: &TcpListener, service: Service) {
        loop {
            let mut polls = [
                PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.cancel.fd(), PollFlags::IN),
            ];
            let _ = rustix::event::poll(&mut polls, None);
            if self.cancel.is_cancelled() {
                return;
            }
            match listener.accept() {
                Ok((stream, peer)) => self.admit(stream, peer.ip().to_canonical(), &service),
                Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
                Err(error) => {
                    log::warn!("event=accept-failed listener={} error={:?}", self.name, error.to_string());
                    // Out of descriptors: the connection stays in the backlog, so poll(2) would return at once.
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
            log::error!("event=no-thread listener={name} error={:?}", error.to_string());
        }
    }

    /// Sends 421, if that is possible without waiting.
    fn reject(&self, stream: &TcpStream) {
        if self.greets {
            let mut octets = Vec::new();
            Reply::new(421, "4.7.0", "Too many connections, try again later").write_to(&mut octets);
            let _ = stream.set_nonblocking(true);
            let _ = (&mut &*stream).write(&octets);
        }
    }
}

/// Limits the connections of listeners. Clones count together.
#[derive(Clone)]
pub struct ConnectionLimiter(Arc<LimiterState>);

struct LimiterState {
    connections: Mutex<ConnectionCounts>,
    released: Condvar,
    limit: usize,
    limit_each: usize,
}

/// How many connections there are, by listener and network of the client.
type ConnectionCounts = HashMap<(&'static str, IpAddr), usize>;

impl ConnectionLimiter {
    /// `limit`: connections of one listener; `limit_each`: connections of one listener from one client.
    pub fn new(limit: usize, limit_each: usize) -> ConnectionLimiter {
        ConnectionLimiter(Arc::new(LimiterState {
            connections: Mutex::default(),
            released: Condvar::new(),
            limit,
            limit_each,
        }))
    }

    /// Counts one more connection; `None`: a limit is reached.
    fn acquire(&self, listener: &'static str, peer: IpAddr) -> Option<ConnectionPermit> {
        let key = (listener, client_network(peer));
        let mut connections = self.0.lock();
        let all: usize = connections.iter().filter(|((name, _), _)| *name == listener).map(|(_, count)| count).sum();
        let from_client = connections.get(&key).copied().unwrap_or(0);
        if all >= self.0.limit || from_client >= self.0.limit_each {
            return None;
        }
        connections.insert(key, from_client + 1);
        Some(ConnectionPermit { limiter: self.0.clone(), key })
    }

    /// Waits until there is no connection, or until the deadline.
    pub fn wait_until_idle(&self, deadline: Instant) {
        let connections = self.0.lock();
        let left = deadline.saturating_duration_since(Instant::now());
        let busy = |connections: &mut ConnectionCounts| !connections.is_empty();
        let _ = self.0.released.wait_timeout_while(connections, left, busy);
    }
}

impl LimiterState {
    fn lock(&self) -> MutexGuard<'_, ConnectionCounts> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The addresses that count as one client: an IPv6 host has a whole /64 to itself.
fn client_network(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
    }
}

/// One connection, counted until this is dropped.
struct ConnectionPermit {
    limiter: Arc<LimiterState>,
    key: (&'static str, IpAddr),
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let mut connections = self.limiter.lock();
        if let Some(count) = connections.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                connections.remove(&self.key);
            }
        }
        self.limiter.released.notify_all();
    }
}
