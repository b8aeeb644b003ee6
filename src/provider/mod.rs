//! The provider: it takes in mail for its customers' domains, holds it, and hands it over when they call.
//!
//! ```text
//! listeners ─▶ a worker thread each connection ─┬─ inbound: mail into the queue
//!                                               └─ odmr: AUTH, mail into the queue, ATRN ─▶ the delivery thread
//! relay: mail of customers, out to the world
//! ```

pub mod delivery;
pub mod inbound;
pub mod odmr;
pub mod relay;
pub mod spool;

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::clock::Timestamp;
use crate::config;
use crate::ids::Ids;
use crate::mail::address::{ForwardPath, Mailbox};
use crate::net::connection::{CancelToken, Connection, Trace};
use crate::net::listener::{self, Acceptor, ConnectionLimiter};
use crate::net::tls::{self, ServerTls};
use crate::queue::Queue;
use crate::report::Reporter;
use crate::sasl::Mechanism;
use crate::session::server::{ServerSession, SessionLimits, address_literal, disk_full_reply};
use crate::smtp::command::MailFrom;
use crate::smtp::reply::Reply;
use crate::smtp::server::{Server, ServerOptions, ServerRole};
use delivery::{DeliveryThread, TurnSender, TurnSettings};
use relay::Relay;

/// What all threads of a provider share.
pub struct Shared {
    pub config: config::ProviderConfig,
    pub queue: Queue,
    pub ids: Ids,
    pub turns: TurnSender,
    pub relay: relay::RelayHandle,
    pub router: spool::RecipientRouter,
    pub rates: SubmissionRates,
    tls: Option<ServerTls>,
    cancel: CancelToken,
    abort: CancelToken,
    limiter: ConnectionLimiter,
    sessions: AtomicU64,
}

/// On which door a connection knocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listener {
    Inbound,
    Odmr,
    /// Port 366's protocol, TLS from the first octet.
    OdmrTls,
}

impl Listener {
    pub fn name(self) -> &'static str {
        match self {
            Listener::Inbound => "inbound",
            Listener::Odmr => "odmr",
            Listener::OdmrTls => "odmr-tls",
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
    pub fn start(config: config::ProviderConfig, ids: Ids) -> Result<RunningProvider, StartError> {
        let (shared, delivery, relay) = prepare(config, ids)?;
        let mut listeners = Vec::new();
        let config = &shared.config;
        for (door, addresses) in [
            (Listener::Inbound, &config.inbound.listen),
            (Listener::Odmr, &config.odmr.listen),
            (Listener::OdmrTls, &config.odmr.listen_tls),
        ] {
            for address in addresses {
                listeners.push((door, listener::bind(*address).map_err(StartError::System)?));
            }
        }
        let mut running = RunningProvider {
            shared: shared.clone(),
            inbound: Vec::new(),
            odmr: Vec::new(),
            odmr_tls: Vec::new(),
            threads: Vec::new(),
        };
        running.spawn("delivery", move || delivery.run())?;
        running.spawn("relay", move || relay.run())?;
        for (door, listener) in listeners {
            let address = listener.local_addr().map_err(system)?;
            log::info!("listening {} {address}", door.name());
            match door {
                Listener::Inbound => running.inbound.push(address),
                Listener::Odmr => running.odmr.push(address),
                Listener::OdmrTls => running.odmr_tls.push(address),
            }
            let shared = shared.clone();
            running.spawn(door.name(), move || {
                let gate = Acceptor {
                    name: door.name(),
                    greets: door != Listener::OdmrTls,
                    cancel: shared.cancel.clone(),
                    limiter: shared.limiter.clone(),
                };
                let serve = move |stream: TcpStream, peer| {
                    let connection = Connection::new(stream.into(), shared.trace(door));
                    shared.serve(door, connection, Some(peer));
                };
                gate.accept(&listener, Arc::new(serve));
            })?;
        }
        Ok(running)
    }

    /// Serves one connection that a supervisor has accepted (inetd, UCSPI), and what becomes of it after a
    /// turn; returns when it is over.
    pub fn serve_one(
        config: config::ProviderConfig,
        ids: Ids,
        door: Listener,
        connection: (OwnedFd, Option<OwnedFd>),
        peer: Option<IpAddr>,
        cancel: &CancelToken,
    ) -> Result<(), StartError> {
        // Outgoing mail is put into the queue; the `serve` that has no --inetd sends it.
        let grace = config.timeouts.shutdown;
        let (shared, delivery, _relay) = prepare(config, ids)?;
        let (signal, session, at_once) = (cancel.clone(), shared.cancel.clone(), shared.abort.clone());
        std::thread::spawn(move || {
            signal.wait_until(None);
            session.cancel();
            at_once.wait_until(Some(Instant::now() + grace));
            at_once.cancel();
        });
        let worker = {
            let shared = shared.clone();
            std::thread::Builder::new().spawn(move || {
                let trace = shared.trace(door);
                let connection = match connection {
                    (socket, None) => Connection::new(socket, trace),
                    (input, Some(output)) => Connection::pair(input, output, trace),
                };
                shared.serve(door, connection, peer);
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
pub struct RunningProvider {
    shared: Arc<Shared>,
    inbound: Vec<SocketAddr>,
    odmr: Vec<SocketAddr>,
    odmr_tls: Vec<SocketAddr>,
    threads: Vec<JoinHandle<()>>,
}

impl RunningProvider {
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
        let RunningProvider { shared, threads, .. } = self;
        let deadline = Instant::now() + shared.config.timeouts.shutdown;
        shared.cancel.cancel();
        shared.relay.wake();
        shared.limiter.wait_until_idle(deadline);
        shared.turns.wait_until_done(deadline);
        shared.abort.cancel();
        for thread in threads {
            let _ = thread.join();
        }
        // A word more for those who were cut off in the middle of content.
        shared.limiter.wait_until_idle(Instant::now() + Duration::from_secs(1));
    }

    fn spawn(&mut self, name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), StartError> {
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(work).map_err(system)?;
        self.threads.push(thread);
        Ok(())
    }
}

fn prepare(config: config::ProviderConfig, ids: Ids) -> Result<(Arc<Shared>, DeliveryThread, Relay), StartError> {
    let tls = match &config.tls {
        Some(files) => Some(tls::server_config(&files.certificate, &files.key).map_err(StartError::Config)?),
        None => None,
    };
    let cancel = CancelToken::new().map_err(system)?;
    let abort = CancelToken::new().map_err(system)?;
    let queue = Queue::new(&config.spool, &config.hostname, ids.clone(), config.timeouts.takeover);
    let sorter = spool::RecipientRouter::new(&config);
    let (relay, events) = relay::channel();
    let notices =
        spool::SpoolDsnSink { queue: queue.clone(), router: sorter.clone(), relay: relay.clone(), ids: ids.clone() };
    let reporter = Reporter::new(&config.hostname, &ids, Some(Arc::new(notices)));
    let outgoing = Relay::new(&config, &queue, &ids, reporter.clone(), (relay.clone(), events), &cancel)?;
    let rules = TurnSettings {
        timeouts: config.timeouts.clone(),
        messages: config.limits.messages_per_turn,
        reporter,
        cancel: cancel.clone(),
        abort: abort.clone(),
    };
    let (turns, delivery) = delivery::channel(config.limits.turned_sessions, rules).map_err(system)?;
    let shared = Shared {
        queue,
        ids,
        turns,
        relay,
        router: sorter,
        rates: SubmissionRates::default(),
        tls,
        cancel,
        abort,
        limiter: ConnectionLimiter::new(config.limits.connections, config.limits.connections_per_address),
        sessions: AtomicU64::new(0),
        config,
    };
    Ok((Arc::new(shared), delivery, outgoing))
}

fn system(error: io::Error) -> StartError {
    StartError::System(error.to_string())
}

impl Shared {
    /// Refuses mail that the disk would not hold, before it is sent (RFC 1870 section 6.1).
    fn check_room(&self, mail: &MailFrom) -> Result<(), Reply> {
        if self.queue.has_room(mail.size.unwrap_or(0)) { Ok(()) } else { Err(disk_full_reply()) }
    }

    /// The mailbox a path means; a postmaster without a domain is our own (RFC 5321 section 4.5.1).
    fn mailbox(&self, path: &ForwardPath) -> Result<Mailbox, Reply> {
        match path {
            ForwardPath::Mailbox(mailbox) => Ok(mailbox.clone()),
            ForwardPath::Postmaster => Mailbox::parse(&format!("postmaster@{}", self.config.hostname))
                .ok_or_else(|| Reply::new(550, "5.1.1", "There is no postmaster here")),
        }
    }

    fn trace(&self, door: Listener) -> Trace {
        let id = (self.sessions.fetch_add(1, Ordering::Relaxed) + 1).to_string();
        // In a transcript P is the provider on port 366, S any plain SMTP server.
        Trace { id, us: if door == Listener::Inbound { 'S' } else { 'P' }, them: 'C' }
    }

    /// One connection, up to its end or its turn.
    fn serve(self: &Arc<Shared>, door: Listener, connection: io::Result<Connection>, peer: Option<IpAddr>) {
        let begun = Instant::now();
        let literal = peer.map_or_else(|| "[unknown]".to_owned(), address_literal);
        let id = connection.as_ref().map_or_else(|_| String::new(), |connection| connection.trace.id.clone());
        log::info!("event=connected session={id} listener={} peer={literal}", door.name());
        let why = self.converse(door, connection, literal.clone()).unwrap_or_else(|error| error.to_string());
        log::info!(
            "event=closed session={id} listener={} peer={literal} seconds={:.3} reason={why:?}",
            door.name(),
            begun.elapsed().as_secs_f64()
        );
    }

    fn converse(
        self: &Arc<Shared>,
        door: Listener,
        connection: io::Result<Connection>,
        peer: String,
    ) -> io::Result<String> {
        let mut connection = connection?;
        let timeouts = &self.config.timeouts;
        let mut tls = self.tls.clone();
        if door == Listener::OdmrTls
            && let Some(tls) = tls.take()
        {
            connection.start_tls_server(&tls, Instant::now() + timeouts.handshake)?;
        }
        let server = Server::new(self.profile(door), connection.secure().is_some());
        let limits = SessionLimits::new(timeouts, &self.config.limits, &self.cancel, &self.abort);
        let session = ServerSession::new(connection, server, peer, tls, limits);
        Ok(match door {
            Listener::Inbound => inbound::serve(self, session),
            Listener::Odmr | Listener::OdmrTls => odmr::serve(self, session),
        })
    }

    fn profile(&self, door: Listener) -> ServerOptions {
        let config = &self.config;
        let mechanisms = Mechanism::ALL.into_iter();
        let mechanisms = mechanisms.filter(|mechanism| config.odmr.cram_md5 || *mechanism != Mechanism::CramMd5);
        ServerOptions {
            role: if door == Listener::Inbound { ServerRole::Inbound } else { ServerRole::Odmr },
            hostname: config.hostname.clone(),
            max_size: config.inbound.max_size,
            max_recipients: config.limits.recipients,
            max_errors: config.limits.errors,
            max_auth_failures: config.limits.auth_failures,
            starttls: self.tls.is_some(),
            require_tls: config.odmr.require_tls,
            dsn: true,
            mechanisms: mechanisms.collect(),
            ids: self.ids.clone(),
        }
    }
}

/// How many messages each account has handed in within the hour.
#[derive(Default)]
pub struct SubmissionRates {
    hours: Mutex<HashMap<String, (Timestamp, usize)>>,
}

impl SubmissionRates {
    /// Counts one more; `limit` 0: no limit.
    fn admit(&self, account: &str, limit: usize, now: Timestamp) -> bool {
        if limit == 0 {
            return true;
        }
        let mut hours = self.hours.lock().unwrap_or_else(PoisonError::into_inner);
        let hour = hours.entry(account.to_owned()).or_insert((now, 0));
        if now.seconds() - hour.0.seconds() >= 3600 {
            *hour = (now, 0);
        }
        hour.1 += 1;
        hour.1 <= limit
    }
}
