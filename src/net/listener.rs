//! Listeners: one thread for each connection, within limits.
//!
//! Nobody takes all the threads: there is a limit on the connections of a listener, and on those of one
//! address. Who comes in vain is told so with 421. A panic ends its connection and nothing else.

use std::collections::HashMap;
use std::io::{self, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use crate::net::connection::CancelToken;
use crate::smtp::reply::Reply;

/// How long nobody is accepted when the system has nothing left to accept with.
const ACCEPT_RETRY_PAUSE: Duration = Duration::from_millis(100);

/// A listening socket; the error says what to do.
pub fn bind(address: SocketAddr) -> Result<TcpListener, String> {
    let listener = TcpListener::bind(address).and_then(|listener| {
        // A connection that is reset between poll(2) and accept(2) must not make the latter wait.
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    listener.map_err(|error| {
        let way_out = match error.kind() {
            io::ErrorKind::PermissionDenied => ": ports below 1024 need root, or a supervisor that passes them on",
            io::ErrorKind::AddrInUse => ": another program listens there; stop it or choose another address",
            _ => "",
        };
        format!("cannot listen on {address}: {error}{way_out}")
    })
}

/// A listener's rules.
pub struct Acceptor {
    /// For the log, and apart from other listeners in the count of visitors.
    pub name: &'static str,
    /// The server speaks first, in clear: who is turned away can be told.
    pub greets: bool,
    pub cancel: CancelToken,
    pub limiter: ConnectionLimiter,
}

impl Acceptor {
    /// Accepts until it is told to stop.
    pub fn accept(&self, listener: &TcpListener, serve: Arc<dyn Fn(TcpStream, IpAddr) + Send + Sync>) {
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
                Ok((stream, peer)) => self.admit(stream, peer.ip().to_canonical(), &serve),
                Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
                Err(error) => {
                    log::warn!("event=accept-failed listener={} error={:?}", self.name, error.to_string());
                    // Out of descriptors: the connection stays in the backlog, and asking at once would spin.
                    self.cancel.wait_until(Some(Instant::now() + ACCEPT_RETRY_PAUSE));
                }
            }
        }
    }

    fn admit(&self, stream: TcpStream, peer: IpAddr, serve: &Arc<dyn Fn(TcpStream, IpAddr) + Send + Sync>) {
        let Some(visit) = self.limiter.acquire(self.name, peer) else {
            log::warn!("event=too-many-connections listener={} peer={peer}", self.name);
            self.reject(&stream);
            return;
        };
        let serve = serve.clone();
        let name = self.name;
        let worker = std::thread::Builder::new().name(format!("{name}-worker")).spawn(move || {
            if catch_unwind(AssertUnwindSafe(|| serve(stream, peer))).is_err() {
                log::error!("event=panic listener={name} peer={peer}");
            }
            drop(visit);
        });
        if let Err(error) = worker {
            log::error!("event=no-thread listener={name} error={:?}", error.to_string());
        }
    }

    /// Says why, if that goes without waiting.
    fn reject(&self, stream: &TcpStream) {
        if self.greets {
            let mut octets = Vec::new();
            Reply::new(421, "4.7.0", "Too many connections, try again later").write_to(&mut octets);
            let _ = stream.set_nonblocking(true);
            let _ = (&mut &*stream).write(&octets);
        }
    }
}

/// Who may be one and the same: an IPv6 host has a whole /64 to itself.
fn client_network(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
    }
}

/// Who is here. Clones count together.
#[derive(Clone)]
pub struct ConnectionLimiter(Arc<LimiterState>);

struct LimiterState {
    connections: Mutex<HashMap<(&'static str, IpAddr), usize>>,
    released: Condvar,
    limit: usize,
    limit_each: usize,
}

impl ConnectionLimiter {
    /// `limit`: connections of a listener; `limit_each`: of them from one address.
    pub fn new(limit: usize, limit_each: usize) -> ConnectionLimiter {
        ConnectionLimiter(Arc::new(LimiterState {
            connections: Mutex::default(),
            released: Condvar::new(),
            limit,
            limit_each,
        }))
    }

    fn acquire(&self, listener: &'static str, peer: IpAddr) -> Option<ConnectionPermit> {
        let peer = client_network(peer);
        let mut present = self.0.lock();
        let all: usize = present.iter().filter(|((name, _), _)| *name == listener).map(|(_, count)| count).sum();
        let here = present.get(&(listener, peer)).copied().unwrap_or(0);
        if all >= self.0.limit || here >= self.0.limit_each {
            return None;
        }
        present.insert((listener, peer), here + 1);
        Some(ConnectionPermit { limiter: self.0.clone(), listener, peer })
    }

    /// Waits until nobody is here any more.
    pub fn wait_until_idle(&self, deadline: Instant) {
        let present = self.0.lock();
        let left = deadline.saturating_duration_since(Instant::now());
        let anybody = |present: &mut HashMap<(&'static str, IpAddr), usize>| present.values().any(|count| *count > 0);
        let _ = self.0.released.wait_timeout_while(present, left, anybody);
    }
}

impl LimiterState {
    fn lock(&self) -> MutexGuard<'_, HashMap<(&'static str, IpAddr), usize>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One visitor's presence, ended by `Drop`.
struct ConnectionPermit {
    limiter: Arc<LimiterState>,
    listener: &'static str,
    peer: IpAddr,
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let mut present = self.limiter.lock();
        let key = (self.listener, self.peer);
        if let Some(count) = present.get_mut(&key) {
            *count -= 1;
            if *count == 0 {
                present.remove(&key);
            }
        }
        self.limiter.released.notify_all();
    }
}
