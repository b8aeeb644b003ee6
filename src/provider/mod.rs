//! The provider: it accepts mail for its customers' domains, holds it, and sends it after a customer's ATRN (RFC 2645).
//!
//! ```text
//! listeners ─▶ a worker thread for each connection ─┬─ inbound: mail from the world into the spool
//!                                                   └─ odmr: AUTH; mail from the customer into the spool;
//!                                                            ATRN ─▶ the delivery thread: held mail to the customer,
//!                                                                    opened and settled by the storage threads
//! relay: mail from customers to the world
//! ```

pub mod quota;
pub mod spool;
pub mod status;
pub mod relay;
pub mod storage;
pub mod unknown;
pub mod soft_bounce;
pub mod turn_settings;
pub mod turned_queue;
pub mod turned_session;
pub mod delivery;
pub mod verifiers;
pub mod rates;
pub mod login_table;
pub mod logins;
pub mod shared;
pub mod accept;
pub mod expiry;
pub mod certificate;
pub mod inbound;
pub mod odmr;
pub mod reload;

use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::config::ProviderConfig;
use crate::ids::Ids;
use crate::mail::address::literal;
use crate::net::cancel::CancelToken;
use crate::net::connection::Connection;
use crate::net::inherited::InheritedListeners;
use crate::net::limiter::{AcceptedConnection, ConnectionLimiter};
use crate::net::listener::{self, Acceptor, KnownNetworks};
use crate::net::trace::{Trace, quoted};
use crate::net::wake::{WakeReason, receive_wakes};
use crate::report::clock_watch::ClockWatch;
use crate::sasl::Mechanism;
use crate::session::server::{ServerSession, SessionLimits};
use crate::smtp::server::{Server, ServerOptions, ServerRole};
use crate::sysexit::Sysexit;
use crate::threads;
use delivery::DeliveryThread;
use logins::Logins;
use rates::SubmissionRates;
use relay::Relay;
use reload::{Reloader, configure, log_skipped};
use shared::{Lasting, Shared};

/// The permissions of the socket `SPOOL/.wake`: only processes of this user may wake the relay.
const SOCKET_MODE: u32 = 0o600;

/// A listener of the provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listener {
    Inbound,
    Odmr,
    /// The protocol of port 366, over TLS from the first octet on.
    OdmrTls,
}

impl Listener {
    /// All listeners.
    pub const ALL: [Listener; 3] = [Listener::Inbound, Listener::Odmr, Listener::OdmrTls];

    /// Its name in the log, and in `LISTEN_FDNAMES`.
    pub fn name(self) -> &'static str {
        match self {
            Listener::Inbound => "inbound",
            Listener::Odmr => "odmr",
            Listener::OdmrTls => "odmr-tls",
        }
    }
}

/// A connection that a supervisor (inetd, UCSPI) has accepted.
pub struct SupervisedConnection {
    /// Descriptor 0.
    pub input: OwnedFd,
    /// Descriptor 1, unless descriptor 0 is a socket and serves both ways.
    pub output: Option<OwnedFd>,
    /// The address of the client, if it is known.
    pub peer: Option<IpAddr>,
}

/// Why a provider cannot start.
#[derive(Debug)]
pub struct StartError {
    pub code: Sysexit,
    /// One line for the administrator.
    pub text: String,
}

impl StartError {
    /// A file or an address that the configuration names cannot be used.
    pub fn config(text: String) -> StartError {
        StartError { code: Sysexit::Config, text }
    }
}

impl From<io::Error> for StartError {
    fn from(error: io::Error) -> StartError {
        StartError { code: Sysexit::of_system(error.kind()), text: error.to_string() }
    }
}

/// Starts providers.
pub struct Provider;

impl Provider {
    /// Starts a provider: checks the files and addresses of the configuration, binds all listeners, and only then begins to
    /// work.
    ///
    /// # Errors
    /// A certificate, an address or a resource of the system cannot be used.
    pub fn start(config: ProviderConfig, ids: Ids) -> Result<RunningProvider, StartError> {
        let mut provider = PreparedProvider::new(config, ids, CancelToken::new()?)?;
        provider.bind(InheritedListeners::default(), true)?;
        provider.start(Box::new(|| {}))
    }
}

/// A provider whose configuration is usable, before it drops its privileges. It has no threads yet, and has not read or
/// written mail.
pub struct PreparedProvider {
    shared: Arc<Shared>,
    delivery: DeliveryThread,
    relay: Relay,
    listeners: Vec<BoundListener>,
    /// The lock of the spool.
    lock: Option<File>,
}

struct BoundListener {
    kind: Listener,
    socket: TcpListener,
    /// A supervisor has opened the socket.
    inherited: bool,
}

impl PreparedProvider {
    /// `cancel`: ends accepting, and sessions after the command or message under way.
    ///
    /// # Errors
    /// A certificate or a resource of the system cannot be used.
    pub fn new(config: ProviderConfig, ids: Ids, cancel: CancelToken) -> Result<PreparedProvider, StartError> {
        let (shared, delivery, relay) = prepare(config, ids, cancel)?;
        Ok(PreparedProvider { shared, delivery, relay, listeners: Vec::new(), lock: None })
    }

    /// Binds all listeners. The sockets that a supervisor passes for a listener replace the addresses in the configuration.
    /// `stays`: this process does not become another user, so it locks the spool now.
    ///
    /// # Errors
    /// An address or the spool cannot be used, or the supervisor passes a socket for which there is no TLS.
    pub fn bind(&mut self, mut sockets: InheritedListeners, stays: bool) -> Result<(), StartError> {
        // Do not create files as root: the other user could not write to them.
        match stays {
            true => self.lock = Some(self.lock_spool()?),
            false if self.shared.spool.is_locked()? => return Err(self.busy()),
            false => {}
        }
        let config = &self.shared.config;
        if sockets.has(Listener::OdmrTls.name()) && config.tls.is_none() {
            let text = "the supervisor passes a socket odmr-tls, and the file has no [tls]: add it, with `certificate` and `key`";
            return Err(StartError::config(text.to_owned()));
        }
        for (kind, addresses) in Listener::ALL.into_iter().zip(config.listen()) {
            let passed = sockets.take(kind.name());
            let inherited = !passed.is_empty();
            let opened = match inherited {
                true => passed,
                false => listener::bind(kind.name(), addresses)?,
            };
            self.listeners.extend(opened.into_iter().map(|socket| BoundListener { kind, socket, inherited }));
        }
        Ok(())
    }

    /// Begins to work. `reload` is called when a command has changed the configuration, and must not block.
    ///
    /// # Errors
    /// The spool cannot be used, or the system has no threads.
    pub fn start(mut self, reload: Box<dyn Fn() + Send>) -> Result<RunningProvider, StartError> {
        let lock = self.lock.take().map_or_else(|| self.lock_spool(), Ok)?;
        let PreparedProvider { shared, delivery, relay, listeners, .. } = self;
        shared.spool.recount();
        shared.record_reload(None);
        shared.read_login_key();
        // Read the known networks before the listeners reserve connections for them.
        shared.lasting.logins.synchronise();
        log_skipped(&shared.config);
        let (reloader, listening, threads) = (Reloader::new(shared.clone()), Vec::new(), Vec::new());
        let mut running = RunningProvider { reloader: reloader.clone(), listening, threads, _lock: lock };
        // Begin before the relay reads the spool: mail that is stored after that wakes it.
        let (cancel, relay_handle) = (&shared.lasting.cancel, shared.lasting.relay.clone());
        let woken = Box::new(move |reason| match reason {
            WakeReason::Reload => reload(),
            reason => relay_handle.woken(reason),
        });
        running.threads.extend(receive_wakes(&shared.config.spool, SOCKET_MODE, cancel, woken));
        running.threads.push(threads::spawn("delivery", move || delivery.run())?);
        running.threads.push(threads::spawn("relay", move || relay.run())?);
        let (watched, cancel) = (reloader.clone(), shared.lasting.cancel.clone());
        running.threads.push(threads::spawn("upkeep", move || watched.keep_up(&cancel))?);
        for BoundListener { kind, socket, inherited } in listeners {
            let (name, address) = (kind.name(), socket.local_addr()?);
            listener::log_listening(name, name, address, inherited);
            running.listening.push((kind, address));
            let acceptor = Acceptor {
                name,
                greets: kind != Listener::OdmrTls,
                cancel: shared.lasting.cancel.clone(),
                limiter: shared.lasting.limiter.clone(),
                known: known_networks(&shared, kind),
            };
            let reloader = reloader.clone();
            let service = move |accepted: &Arc<AcceptedConnection>| {
                let connection = Connection::accepted(accepted.socket().clone(), trace(&reloader.current(), kind));
                serve(&reloader, kind, connection, Some(accepted.peer), Some(accepted));
            };
            let accept = move || acceptor.accept(&socket, Arc::new(service));
            running.threads.push(threads::spawn(name, accept)?);
        }
        Ok(running)
    }

    fn lock_spool(&self) -> Result<File, StartError> {
        self.shared.spool.lock()?.ok_or_else(|| self.busy())
    }

    fn busy(&self) -> StartError {
        let spool = self.shared.config.spool.display();
        let text = format!("another `odmr serve` has the spool {spool}: stop it, or name another `spool`");
        StartError { code: Sysexit::Temporary, text }
    }

    /// Serves one connection that a supervisor has accepted, also after a turn, and returns after its end. Mail that the
    /// customer submits is stored in the spool. This process has no relay: it wakes that of a running `odmr serve`.
    ///
    /// # Errors
    /// The system has no threads.
    pub fn serve_one(self, listener: Listener, connection: SupervisedConnection) -> Result<(), StartError> {
        let PreparedProvider { shared, delivery, relay, .. } = self;
        // Its handles then know that no relay runs here, and wake another process.
        drop(relay);
        log_skipped(&shared.config);
        let (cancel, abort) = (shared.lasting.cancel.clone(), shared.lasting.abort.clone());
        let timeout = shared.config.timeouts.shutdown;
        let (spool, watch) = (shared.spool.clone(), shared.lasting.watch.clone());
        let logins = shared.lasting.logins.clone();
        threads::spawn("shutdown", move || {
            cancel.wait_until(None);
            std::thread::sleep(timeout);
            abort.cancel();
        })?;
        // The worker has the only `TurnSender`: after its end, the delivery thread ends after the last session.
        let worker = threads::spawn("session", move || {
            let SupervisedConnection { input, output, peer } = connection;
            let trace = trace(&shared, listener);
            if listener != Listener::Inbound {
                shared.read_login_key();
            }
            serve(&Reloader::new(shared), listener, Ok(Connection::over(input, output, trace)), peer, None);
        })?;
        delivery.run();
        let _ = worker.join();
        if listener != Listener::Inbound {
            // Wait for the thread that writes the last failure: it would end with this process.
            logins.synchronise();
        }
        watch.look();
        spool.tidy();
        Ok(())
    }
}

/// A running provider.
pub struct RunningProvider {
    reloader: Reloader,
    listening: Vec<(Listener, SocketAddr)>,
    threads: Vec<JoinHandle<()>>,
    /// The lock of the spool.
    _lock: File,
}

impl RunningProvider {
    /// The address of a listener; if it has several, the first.
    pub fn address(&self, listener: Listener) -> Option<SocketAddr> {
        self.listening.iter().find(|(other, _)| *other == listener).map(|(_, address)| *address)
    }

    /// Stops: accepts no more connections, and waits for sessions to end after the command or message under way. When the
    /// shutdown timeout is over, it ends the others at once.
    pub fn stop(self) {
        let RunningProvider { reloader, threads, .. } = self;
        let shared = reloader.current();
        let deadline = Instant::now() + shared.config.timeouts.shutdown;
        shared.lasting.cancel.cancel();
        shared.lasting.relay.wake();
        shared.lasting.limiter.wait_until_idle(deadline);
        shared.lasting.turns.wait_until_done(deadline);
        shared.lasting.abort.cancel();
        for thread in threads {
            let _ = thread.join();
        }
        // Sessions that the abort ended in the middle of content send a last reply.
        shared.lasting.limiter.wait_until_idle(Instant::now() + Duration::from_secs(1));
    }

    /// The reloader, which reads the configuration anew.
    pub fn reloader(&self) -> &Reloader {
        &self.reloader
    }
}

/// Makes all parts that do not depend on listeners. The relay and the delivery thread do not run yet.
fn prepare(
    config: ProviderConfig, ids: Ids, cancel: CancelToken,
) -> Result<(Arc<Shared>, DeliveryThread, Relay), StartError> {
    let abort = CancelToken::new()?;
    let channel = relay::channel(&config.spool);
    let (turns, delivery) = delivery::channel(config.limits.turned_sessions, &cancel, &abort)?;
    let limiter = ConnectionLimiter::new(config.limits.of_connections(&config.timeouts));
    let watch = Arc::new(ClockWatch::new(&config.spool, ids.clock()));
    let rates = SubmissionRates::new(&config.spool, ids.clock());
    let logins = Arc::new(Logins::new(&config.spool, ids.clock()));
    let lasting = Lasting {
        ids,
        watch,
        turns: Arc::new(turns),
        relay: channel.handle.clone(),
        rates: Arc::new(rates),
        verifiers: Arc::default(),
        logins,
        lost: Arc::default(),
        unknown: Arc::default(),
        cancel,
        abort,
        limiter,
    };
    let shared = configure(config, lasting, None).map_err(StartError::config)?;
    let relay = Relay { worker: shared.worker.clone(), channel };
    Ok((Arc::new(shared), delivery, relay))
}

/// The parties in a logged dialogue: `P` is the provider on port 366, `S` any other server, `C` the client.
fn trace(shared: &Shared, listener: Listener) -> Trace {
    Trace { id: shared.lasting.ids.session_id(), us: if listener == Listener::Inbound { 'S' } else { 'P' }, them: 'C' }
}

/// The networks for which a listener reserves a part of its connections: on port 366, those of customers. Otherwise
/// many untrusted clients could prevent customers from connecting.
fn known_networks(shared: &Shared, listener: Listener) -> Option<KnownNetworks> {
    let logins = shared.lasting.logins.clone();
    (listener != Listener::Inbound).then(|| Box::new(move |address| logins.knows(address)) as KnownNetworks)
}

/// Serves one connection until it ends or has turned. `accepted`: `None` if no listener counts the connection.
fn serve(
    reloader: &Reloader, listener: Listener, connection: io::Result<Connection>, address: Option<IpAddr>,
    accepted: Option<&Arc<AcceptedConnection>>,
) {
    let begun = Instant::now();
    let peer = address.map_or_else(|| "[unknown]".to_owned(), literal);
    let id = connection.as_ref().map_or_else(|_| "-".to_owned(), |connection| connection.trace.id.clone());
    let name = listener.name();
    log::info!("event=connected session={id} listener={name} peer={peer}");
    let session = connection
        .and_then(|connection| begin_session(&reloader.current(), listener, connection, peer.clone(), accepted));
    let mut reason = match (session, listener) {
        (Err(error), _) => error.to_string(),
        (Ok(session), Listener::Inbound) => inbound::serve(reloader, session),
        (Ok(session), Listener::Odmr | Listener::OdmrTls) => odmr::serve(reloader, session, address),
    };
    // A displaced connection may end with an error of TLS, which would blame the client.
    if accepted.is_some_and(|accepted| accepted.is_displaced()) {
        reason = AcceptedConnection::DISPLACED.to_owned();
    }
    log::info!(
        "event=closed session={id} listener={name} peer={peer} duration={:.3} reason={}",
        begun.elapsed().as_secs_f64(),
        quoted(reason)
    );
}

fn begin_session(
    shared: &Shared, listener: Listener, mut connection: Connection, peer: String,
    accepted: Option<&Arc<AcceptedConnection>>,
) -> io::Result<Box<ServerSession>> {
    let config = &shared.config;
    let mut tls = shared.tls.clone();
    // RFC 8314 section 4.2: ask clients for a certificate only if some account accepts one.
    if listener != Listener::Inbound && config.accounts.has_certificates() {
        tls = tls.map(|tls| tls.asking());
    }
    if listener == Listener::OdmrTls {
        // A reload may have removed [tls]. The listener still runs, and must not serve clients without TLS.
        let tls = tls.take().ok_or_else(|| io::Error::other("[tls] was removed: restart odmr"))?;
        connection.start_tls_server(&tls, Instant::now() + config.timeouts.handshake)?;
        accepted.inspect(|accepted| accepted.note_command(Instant::now()));
    }
    let role = if listener == Listener::Inbound { ServerRole::Inbound } else { ServerRole::Odmr };
    let mechanisms = config.accounts.mechanisms().into_iter();
    let mechanisms = mechanisms.filter(|mechanism| config.odmr.cram_md5 || *mechanism != Mechanism::CramMd5);
    let options = ServerOptions {
        starttls: shared.tls.is_some(),
        require_tls: config.odmr.require_tls,
        mechanisms: mechanisms.collect(),
        dsn: listener != Listener::Inbound || config.inbound.offer_dsn,
        ..config.limits.server_options(role, &config.hostname, config.inbound.max_size)
    };
    let server = Server::new(options, connection.tls_channel());
    let limits = SessionLimits::new(&config.timeouts, &config.limits, &shared.lasting.cancel, &shared.lasting.abort);
    let limits = SessionLimits { accepted: accepted.cloned(), ..limits };
    Ok(ServerSession::new(connection, server, peer, tls, limits))
}
