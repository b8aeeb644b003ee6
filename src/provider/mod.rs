//! The provider: it takes in mail for its customers' domains, holds it, and hands it over when they call.
//!
//! ```text
//! listeners ─▶ a worker thread each connection ─┬─ inbound: mail into the queue
//!                                               └─ odmr: AUTH, ATRN ─▶ the delivery thread
//! ```

pub mod delivery;
pub mod inbound;
pub mod odmr;

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use crate::config;
use crate::queue::Queue;
use crate::sasl::Mechanism;
use crate::session::{Bounds, Session, literal};
use crate::smtp::reply::Reply;
use crate::smtp::server::{Profile, Role, Server};
use crate::stamp::Stamps;
use crate::tls::{self, ServerSide};
use crate::wire::{Stop, Trace, Wire};
use delivery::{Delivery, Rules, Turns};

/// What all threads of a provider share.
pub struct Shared {
    pub config: config::Provider,
    pub queue: Queue,
    pub stamps: Stamps,
    pub turns: Turns,
    tls: Option<ServerSide>,
    stop: Stop,
    halt: Stop,
    visitors: Visitors,
    sessions: AtomicU64,
}

/// On which door a connection knocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    Inbound,
    Odmr,
    /// Port 366's protocol, TLS from the first octet.
    OdmrTls,
}

impl Door {
    pub fn name(self) -> &'static str {
        match self {
            Door::Inbound => "inbound",
            Door::Odmr => "odmr",
            Door::OdmrTls => "odmr-tls",
        }
    }
}

/// Why a provider cannot start.
#[derive(Debug)]
pub enum StartError {
    /// The configuration names something that cannot be used.
    Config(String),
    /// The system refuses.
    System(String),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StartError::Config(text) | StartError::System(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for StartError {}

/// A provider.
pub struct Provider;

impl Provider {
    /// Checks what the configuration names, binds every listener, and only then begins to work.
    pub fn start(config: config::Provider, stamps: Stamps) -> Result<Running, StartError> {
        let (shared, delivery) = prepare(config, stamps)?;
        let mut listeners = Vec::new();
        let config = &shared.config;
        for (door, addresses) in [
            (Door::Inbound, &config.inbound.listen),
            (Door::Odmr, &config.odmr.listen),
            (Door::OdmrTls, &config.odmr.listen_tls),
        ] {
            for address in addresses {
                listeners.push((door, bind(*address)?));
            }
        }
        let mut running = Running {
            shared: shared.clone(),
            inbound: Vec::new(),
            odmr: Vec::new(),
            odmr_tls: Vec::new(),
            threads: Vec::new(),
        };
        running.spawn("delivery", move || delivery.run())?;
        for (door, listener) in listeners {
            let address = listener.local_addr().map_err(system)?;
            log::info!("listening {} {address}", door.name());
            match door {
                Door::Inbound => running.inbound.push(address),
                Door::Odmr => running.odmr.push(address),
                Door::OdmrTls => running.odmr_tls.push(address),
            }
            let shared = shared.clone();
            running.spawn(door.name(), move || accept(&shared, door, &listener))?;
        }
        Ok(running)
    }

    /// Serves one connection that a supervisor has accepted (inetd, UCSPI), and what becomes of it after a
    /// turn; returns when it is over.
    pub fn serve_one(
        config: config::Provider,
        stamps: Stamps,
        door: Door,
        wire: (OwnedFd, Option<OwnedFd>),
        peer: Option<IpAddr>,
        stop: &Stop,
    ) -> Result<(), StartError> {
        let grace = config.timeouts.shutdown;
        let (shared, delivery) = prepare(config, stamps)?;
        let (signal, session, at_once) = (stop.clone(), shared.stop.clone(), shared.halt.clone());
        std::thread::spawn(move || {
            wait_for(&signal);
            session.stop();
            std::thread::sleep(grace);
            at_once.stop();
        });
        let worker = {
            let shared = shared.clone();
            std::thread::Builder::new().spawn(move || {
                let trace = shared.trace(door);
                let wire = match wire {
                    (socket, None) => Wire::new(socket, trace),
                    (input, Some(output)) => Wire::pair(input, output, trace),
                };
                shared.serve(door, wire, peer);
            })
        };
        let worker = worker.map_err(system)?;
        // With the worker's end gone no turn can come any more, and the delivery ends after its last.
        let deliverer = std::thread::Builder::new().spawn(move || delivery.run()).map_err(system)?;
        let _ = worker.join();
        drop(shared);
        let _ = deliverer.join();
        Ok(())
    }
}

/// A provider at work.
pub struct Running {
    shared: Arc<Shared>,
    inbound: Vec<SocketAddr>,
    odmr: Vec<SocketAddr>,
    odmr_tls: Vec<SocketAddr>,
    threads: Vec<JoinHandle<()>>,
}

impl Running {
    pub fn inbound(&self) -> &[SocketAddr] {
        &self.inbound
    }

    pub fn odmr(&self) -> &[SocketAddr] {
        &self.odmr
    }

    pub fn odmr_tls(&self) -> &[SocketAddr] {
        &self.odmr_tls
    }

    /// No new connections; sessions end at the next safe point, within the shutdown timeout.
    pub fn stop(self) {
        let Running { shared, threads, .. } = self;
        let deadline = Instant::now() + shared.config.timeouts.shutdown;
        shared.stop.stop();
        shared.visitors.wait_until_gone(deadline);
        shared.turns.wait_until_done(deadline);
        shared.halt.stop();
        for thread in threads {
            let _ = thread.join();
        }
        // A word more for those who were cut off in the middle of content.
        shared.visitors.wait_until_gone(Instant::now() + Duration::from_secs(1));
    }

    fn spawn(&mut self, name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), StartError> {
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(work).map_err(system)?;
        self.threads.push(thread);
        Ok(())
    }
}

fn prepare(config: config::Provider, stamps: Stamps) -> Result<(Arc<Shared>, Delivery), StartError> {
    let tls = match &config.tls {
        Some(files) => Some(tls::server_config(&files.certificate, &files.key).map_err(StartError::Config)?),
        None => None,
    };
    let stop = Stop::new().map_err(system)?;
    let halt = Stop::new().map_err(system)?;
    let rules = Rules {
        timeouts: config.timeouts.clone(),
        messages: config.limits.messages_per_turn,
        stop: stop.clone(),
        halt: halt.clone(),
    };
    let (turns, delivery) = delivery::channel(config.limits.turned_sessions, rules).map_err(system)?;
    let queue = Queue::new(&config.spool, &config.hostname, stamps.clone(), config.timeouts.takeover);
    let shared = Shared {
        queue,
        stamps,
        turns,
        tls,
        stop,
        halt,
        visitors: Visitors::default(),
        sessions: AtomicU64::new(0),
        config,
    };
    Ok((Arc::new(shared), delivery))
}

fn system(error: io::Error) -> StartError {
    StartError::System(error.to_string())
}

fn bind(address: SocketAddr) -> Result<TcpListener, StartError> {
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
        StartError::System(format!("cannot listen on {address}: {error}{way_out}"))
    })
}

/// Waits until a token is said.
fn wait_for(stop: &Stop) {
    while !stop.stopped() {
        let mut polls = [PollFd::from_borrowed_fd(stop.fd(), PollFlags::IN)];
        let _ = rustix::event::poll(&mut polls, None);
    }
}

/// A listener: one worker thread for each connection.
fn accept(shared: &Arc<Shared>, door: Door, listener: &TcpListener) {
    loop {
        let mut polls = [
            PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(shared.stop.fd(), PollFlags::IN),
        ];
        let _ = rustix::event::poll(&mut polls, None);
        if shared.stop.stopped() {
            return;
        }
        match listener.accept() {
            Ok((stream, peer)) => admit(shared, door, stream, peer.ip().to_canonical()),
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(error) => {
                log::warn!("event=accept-failed listener={} error={:?}", door.name(), error.to_string());
                // Out of descriptors: the connection stays in the backlog, and asking at once would spin.
                let mut polls = [PollFd::from_borrowed_fd(shared.stop.fd(), PollFlags::IN)];
                let pause = rustix::event::Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
                let _ = rustix::event::poll(&mut polls, Some(&pause));
            }
        }
    }
}

fn admit(shared: &Arc<Shared>, door: Door, stream: TcpStream, peer: IpAddr) {
    let trace = shared.trace(door);
    let limits = &shared.config.limits;
    if !shared.visitors.enter(door, peer, limits.connections, limits.connections_per_address) {
        log::warn!("event=too-many-connections session={} listener={} peer={peer}", trace.id, door.name());
        turn_away(&stream, door);
        return;
    }
    let id = trace.id.clone();
    let worker = {
        let shared = shared.clone();
        std::thread::Builder::new().name(format!("{}-{id}", door.name())).spawn(move || {
            let visit = Visit { shared: shared.clone(), door, peer };
            let worked = catch_unwind(AssertUnwindSafe(|| {
                shared.serve(door, Wire::new(stream.into(), trace), Some(peer));
            }));
            if worked.is_err() {
                log::error!("event=panic session={id}");
            }
            drop(visit);
        })
    };
    if let Err(error) = worker {
        shared.visitors.leave(door, peer);
        log::error!("event=no-thread error={:?}", error.to_string());
    }
}

/// Says why, if that goes without waiting.
fn turn_away(stream: &TcpStream, door: Door) {
    if door != Door::OdmrTls {
        let mut octets = Vec::new();
        Reply::new(421, "4.7.0", "Too many connections, try again later").write_to(&mut octets);
        let _ = stream.set_nonblocking(true);
        let _ = io::Write::write(&mut &*stream, &octets);
    }
}

impl Shared {
    fn trace(&self, door: Door) -> Trace {
        let id = (self.sessions.fetch_add(1, Ordering::Relaxed) + 1).to_string();
        // In a transcript P is the provider on port 366, S any plain SMTP server.
        Trace { id, us: if door == Door::Inbound { 'S' } else { 'P' }, them: 'C' }
    }

    /// One connection, up to its end or its turn.
    fn serve(self: &Arc<Shared>, door: Door, wire: io::Result<Wire>, peer: Option<IpAddr>) {
        let begun = Instant::now();
        let literal = peer.map_or_else(|| "[unknown]".to_owned(), literal);
        let id = wire.as_ref().map_or_else(|_| String::new(), |wire| wire.trace.id.clone());
        log::info!("event=connected session={id} listener={} peer={literal}", door.name());
        let why = self.converse(door, wire, literal.clone()).unwrap_or_else(|error| error.to_string());
        log::info!(
            "event=closed session={id} listener={} peer={literal} seconds={:.3} reason={why:?}",
            door.name(),
            begun.elapsed().as_secs_f64()
        );
    }

    fn converse(self: &Arc<Shared>, door: Door, wire: io::Result<Wire>, peer: String) -> io::Result<String> {
        let mut wire = wire?;
        let timeouts = &self.config.timeouts;
        let mut tls = self.tls.clone();
        if door == Door::OdmrTls
            && let Some(side) = tls.take()
        {
            wire.start_tls_server(&side, Instant::now() + timeouts.handshake)?;
        }
        let server = Server::new(self.profile(door), wire.secure().is_some());
        let bounds = Bounds {
            command: timeouts.command,
            handshake: timeouts.handshake,
            session: timeouts.session,
            hops: self.config.limits.received_hops,
            stop: self.stop.clone(),
            halt: self.halt.clone(),
        };
        let session = Session::new(wire, server, peer, tls, bounds);
        Ok(match door {
            Door::Inbound => inbound::serve(self, session),
            Door::Odmr | Door::OdmrTls => odmr::serve(self, session),
        })
    }

    fn profile(&self, door: Door) -> Profile {
        let config = &self.config;
        let mechanisms = Mechanism::ALL.into_iter();
        let mechanisms = mechanisms.filter(|mechanism| config.odmr.cram_md5 || *mechanism != Mechanism::CramMd5);
        Profile {
            role: if door == Door::Inbound { Role::Inbound } else { Role::Odmr },
            hostname: config.hostname.clone(),
            max_size: config.inbound.max_size,
            max_recipients: config.limits.recipients,
            max_errors: config.limits.errors,
            max_auth_failures: config.limits.auth_failures,
            starttls: self.tls.is_some(),
            require_tls: config.odmr.require_tls,
            mechanisms: mechanisms.collect(),
            stamps: self.stamps.clone(),
        }
    }
}

/// Who may be one and the same: an IPv6 host has a whole /64 to itself.
fn network(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
    }
}

/// Who is here before a turn: so that nobody takes all the threads.
#[derive(Default)]
struct Visitors {
    present: Mutex<HashMap<(&'static str, IpAddr), usize>>,
    left: Condvar,
}

impl Visitors {
    fn enter(&self, door: Door, peer: IpAddr, limit: usize, limit_each: usize) -> bool {
        let peer = network(peer);
        let mut present = self.lock();
        let all: usize = present.iter().filter(|((name, _), _)| *name == door.name()).map(|(_, count)| count).sum();
        let here = present.get(&(door.name(), peer)).copied().unwrap_or(0);
        let admitted = all < limit && here < limit_each;
        if admitted {
            present.insert((door.name(), peer), here + 1);
        }
        admitted
    }

    fn leave(&self, door: Door, peer: IpAddr) {
        let peer = network(peer);
        let mut present = self.lock();
        if let Some(count) = present.get_mut(&(door.name(), peer)) {
            *count -= 1;
            if *count == 0 {
                present.remove(&(door.name(), peer));
            }
        }
        self.left.notify_all();
    }

    fn wait_until_gone(&self, deadline: Instant) {
        let present = self.lock();
        let left = deadline.saturating_duration_since(Instant::now());
        let _ = self.left.wait_timeout_while(present, left, |present| !present.is_empty());
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(&'static str, IpAddr), usize>> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One visitor's presence, ended by `Drop`.
struct Visit {
    shared: Arc<Shared>,
    door: Door,
    peer: IpAddr,
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.shared.visitors.leave(self.door, self.peer);
    }
}
