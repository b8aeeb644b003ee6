//! The provider: it accepts mail for its customers' domains, holds it, and delivers it when they call.
//!
//! ```text
//! listeners ─▶ a worker thread each connection ─┬─ inbound: mail into the spool
//!                                               └─ odmr: AUTH, mail into the spool, ATRN ─▶ the delivery thread
//! relay: outgoing mail of customers, to the world
//! ```

pub mod spool;
pub mod relay;
pub mod turned_session;
pub mod delivery;
pub mod shared;
pub mod accept;
pub mod inbound;
pub mod odmr;

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::config::ProviderConfig;
use crate::ids::Ids;
use crate::mail::address::literal;
use crate::net::cancel::CancelToken;
use crate::net::connection::Connection;
use crate::net::listener::{self, Acceptor, ConnectionLimiter};
use crate::net::tls::ServerTls;
use crate::net::trace::{Trace, quoted};
use crate::report::Reporter;
use crate::sasl::Mechanism;
use crate::session::server::{ServerSession, SessionLimits};
use crate::smtp::server::{Server, ServerOptions, ServerRole};
use accept::SpoolDsnSink;
use delivery::DeliveryThread;
use relay::Relay;
use shared::{Shared, SubmissionRates};
use spool::{RecipientRouter, Spool};
use turned_session::TurnSettings;

/// Where a connection was accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listener {
    Inbound,
    Odmr,
    /// The protocol of port 366, with TLS from the first octet.
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
    pub fn start(config: ProviderConfig, ids: Ids) -> Result<RunningProvider, StartError> {
        let (shared, delivery, relay) = prepare(config, ids)?;
        let mut listeners = Vec::new();
        let config = &shared.config;
        for (kind, addresses) in [
            (Listener::Inbound, &config.inbound.listen),
            (Listener::Odmr, &config.odmr.listen),
            (Listener::OdmrTls, &config.odmr.listen_tls),
        ] {
            for address in addresses {
                listeners.push((kind, listener::bind(*address).map_err(StartError::System)?));
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
        for (kind, listener) in listeners {
            let address = listener.local_addr().map_err(system)?;
            // Tests and supervisors outside read this line.
            log::info!("listening {} {address}", kind.name());
            log::info!("event=listening listener={} address={address}", kind.name());
            match kind {
                Listener::Inbound => running.inbound.push(address),
                Listener::Odmr => running.odmr.push(address),
                Listener::OdmrTls => running.odmr_tls.push(address),
            }
            let shared = shared.clone();
            running.spawn(kind.name(), move || {
                let acceptor = Acceptor {
                    name: kind.name(),
                    greets: kind != Listener::OdmrTls,
                    cancel: shared.cancel.clone(),
                    limiter: shared.limiter.clone(),
                };
                let serve = move |stream: TcpStream, peer| {
                    let connection = Connection::new(stream.into(), trace(&shared, kind));
                    serve(&shared, kind, connection, Some(peer));
                };
                acceptor.accept(&listener, Arc::new(serve));
            })?;
        }
        Ok(running)
    }

    /// Serves one connection that a supervisor has accepted (inetd, UCSPI), also after a turn; returns when it is over.
    pub fn serve_one(
        config: ProviderConfig, ids: Ids, listener: Listener, connection: (OwnedFd, Option<OwnedFd>),
        peer: Option<IpAddr>, cancel: &CancelToken,
    ) -> Result<(), StartError> {
        // Outgoing mail waits in its queue: the `odmr serve` without --inetd sends it.
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
                let trace = trace(&shared, listener);
                let connection = match connection {
                    (socket, None) => Connection::new(socket, trace),
                    (input, Some(output)) => Connection::pair(input, output, trace),
                };
                serve(&shared, listener, connection, peer);
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

fn prepare(config: ProviderConfig, ids: Ids) -> Result<(Arc<Shared>, DeliveryThread, Relay), StartError> {
    let tls = match &config.tls {
        Some(files) => Some(ServerTls::load(&files.certificate, &files.key).map_err(StartError::Config)?),
        None => None,
    };
    let cancel = CancelToken::new().map_err(system)?;
    let abort = CancelToken::new().map_err(system)?;
    let spool = Spool::new(&config, &ids);
    let router = RecipientRouter::new(&config);
    let (handle, events) = relay::channel();
    let sink = SpoolDsnSink { spool: spool.clone(), router: router.clone(), relay: handle.clone(), ids: ids.clone() };
    let reporter = Reporter::new(&config.hostname, &ids, Some(Arc::new(sink)));
    let relay = Relay::new(&config, &spool, &ids, reporter.clone(), (handle.clone(), events), &cancel);
    let relay = relay.map_err(StartError::Config)?;
    let settings = TurnSettings {
        timeouts: config.timeouts.clone(),
        messages: config.limits.messages_per_turn,
        reporter,
        cancel: cancel.clone(),
        abort: abort.clone(),
    };
    let (turns, delivery) = delivery::channel(config.limits.turned_sessions, settings).map_err(system)?;
    let limiter = ConnectionLimiter::new(config.limits.connections, config.limits.connections_per_address);
    let rates = SubmissionRates::default();
    let shared = Shared { spool, ids, turns, relay: handle, router, rates, tls, cancel, abort, limiter, config };
    Ok((Arc::new(shared), delivery, relay))
}

fn system(error: io::Error) -> StartError {
    StartError::System(error.to_string())
}

fn trace(shared: &Shared, listener: Listener) -> Trace {
    // In a transcript P is the provider on port 366, S any plain SMTP server.
    Trace { id: shared.ids.session_id(), us: if listener == Listener::Inbound { 'S' } else { 'P' }, them: 'C' }
}

/// One connection, up to its end or its turn.
fn serve(shared: &Arc<Shared>, listener: Listener, connection: io::Result<Connection>, peer: Option<IpAddr>) {
    let begun = Instant::now();
    let peer = peer.map_or_else(|| "[unknown]".to_owned(), literal);
    let id = connection.as_ref().map_or_else(|_| "-".to_owned(), |connection| connection.trace.id.clone());
    log::info!("event=connected session={id} listener={} peer={peer}", listener.name());
    let session = connection.and_then(|connection| begin_session(shared, listener, connection, peer.clone()));
    let reason = match (session, listener) {
        (Err(error), _) => error.to_string(),
        (Ok(session), Listener::Inbound) => inbound::serve(shared, session),
        (Ok(session), Listener::Odmr | Listener::OdmrTls) => odmr::serve(shared, session),
    };
    log::info!(
        "event=closed session={id} listener={} peer={peer} duration={:.3} reason={}",
        listener.name(),
        begun.elapsed().as_secs_f64(),
        quoted(reason)
    );
}

fn begin_session(
    shared: &Shared, listener: Listener, mut connection: Connection, peer: String,
) -> io::Result<ServerSession> {
    let timeouts = &shared.config.timeouts;
    let mut tls = shared.tls.clone();
    if listener == Listener::OdmrTls
        && let Some(tls) = tls.take()
    {
        connection.start_tls_server(&tls, Instant::now() + timeouts.handshake)?;
    }
    let server = Server::new(server_options(shared, listener), connection.tls_info().is_some());
    let limits = SessionLimits::new(timeouts, &shared.config.limits, &shared.cancel, &shared.abort);
    Ok(ServerSession::new(connection, server, peer, tls, limits))
}

fn server_options(shared: &Shared, listener: Listener) -> ServerOptions {
    let config = &shared.config;
    let mechanisms = Mechanism::ALL.into_iter();
    let mechanisms = mechanisms.filter(|mechanism| config.odmr.cram_md5 || *mechanism != Mechanism::CramMd5);
    let role = if listener == Listener::Inbound { ServerRole::Inbound } else { ServerRole::Odmr };
    ServerOptions {
        starttls: shared.tls.is_some(),
        require_tls: config.odmr.require_tls,
        dsn: true,
        mechanisms: mechanisms.collect(),
        ..config.limits.server_options(role, &config.hostname, config.inbound.max_size)
    }
}
