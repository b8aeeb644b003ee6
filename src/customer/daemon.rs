//! `odmr pull --daemon`: calls by the schedule, and meanwhile a listener for the mail of this host's users.
//!
//! One loop waits for events: the time of a call, the end of one, a signal, an address that this machine has got, mail
//! for a next hop. Each call is a thread of its own, so that a provider that stalls delays no other; one at a time a
//! provider. The loop owns what is known of the calls, so there is nothing to lock. A new configuration holds for the
//! calls and sessions that begin after it; those under way end with the old one.

use std::fs::{File, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::counters::CallCounters;
use super::network;
use super::pull::{CallError, Customer};
use super::store;
use super::submission;
use crate::config::{CustomerConfig, MailOwner, ProviderAccount};
use crate::ids::Ids;
use crate::mail::address::literal;
use crate::net::cancel::CancelToken;
use crate::net::connection::Connection;
use crate::net::listener::{self, Acceptor, ConnectionLimiter};
use crate::net::trace::Trace;
use crate::schedule::{CallTimer, Clocks, Schedule};
use crate::smtp::reply::Reply;

/// The name of the listener, in the log.
const LISTENER_NAME: &str = "local";

/// How long one who is turned away may take to read why.
const REJECTION_TIMEOUT: Duration = Duration::from_secs(5);

/// So often the clock is looked at, as it may be set.
const CLOCK_CHECK_INTERVAL: Duration = Duration::from_secs(60);

/// Calls for the sake of a new address are so far apart at least: a network comes up in steps.
/// With each one that did not help it is twice as long, up to `GLANCE`.
const NETWORK_CALL_PAUSE: Duration = Duration::from_secs(3);

/// What the loop waits for.
#[derive(Debug)]
pub enum DaemonEvent {
    /// Call now, every provider.
    CallNow,
    /// The configuration has changed.
    Reload,
    /// Look whether you are to stop.
    Stop,
    /// This machine has got an address or a route.
    Network,
    /// Mail has come for a next hop.
    RetryQueued,
    /// Mail for next hops was tried.
    RetryEnded,
    /// A call has ended.
    CallEnded { key: AccountKey, begun: Clocks, error: Option<CallError> },
}

/// A provider and our name there.
pub type AccountKey = (String, String);

fn key(provider: &ProviderAccount) -> AccountKey {
    (provider.remote.address.clone(), provider.remote.login_name().to_owned())
}

/// What is needed before privileges are dropped: the configuration is good, the listeners are bound.
pub struct BoundDaemon {
    customer: Arc<Customer>,
    listeners: Vec<TcpListener>,
}

impl BoundDaemon {
    pub fn new(config: &CustomerConfig, ids: &Ids) -> Result<BoundDaemon, CallError> {
        let customer = Arc::new(Customer::new(config, ids)?);
        let addresses = config.outgoing.iter().flat_map(|outgoing| &outgoing.listen);
        let listeners = addresses.map(|address| listener::bind(*address)).collect::<Result<_, _>>();
        Ok(BoundDaemon { customer, listeners: listeners.map_err(CallError::System)? })
    }
}

/// The way to tell a daemon something.
#[derive(Clone)]
pub struct EventSender(Sender<DaemonEvent>);

impl EventSender {
    pub fn send(&self, event: DaemonEvent) {
        // Nobody listens: then it has ended.
        let _ = self.0.send(event);
    }
}

pub fn event_channel() -> (EventSender, Receiver<DaemonEvent>) {
    let (sender, receiver) = unbounded();
    (EventSender(sender), receiver)
}

/// Runs until it is told to stop. `load` reads the configuration anew.
pub fn run(
    ready: BoundDaemon, load: &dyn Fn() -> Result<CustomerConfig, String>, ids: &Ids, cancel: &CancelToken,
    (bell, events): (EventSender, Receiver<DaemonEvent>),
) -> Result<(), CallError> {
    let _alone = lock_daemon(ready.customer.config())?;
    wake_by(&ready.customer, &bell);
    let current = Arc::new(RwLock::new(ready.customer.clone()));
    let listeners = Listeners::start(ready.listeners, &current, cancel)?;
    let watcher = bell.clone();
    network::watch(move || watcher.send(DaemonEvent::Network), cancel);
    let mut daemon = Daemon {
        customer: ready.customer,
        providers: Vec::new(),
        ids: ids.clone(),
        cancel: cancel.clone(),
        bell,
        retrying: false,
        calls: 0,
        retry_pause_until: None,
        epoch: Instant::now(),
    };
    daemon.follow();
    while !cancel.is_cancelled() {
        let retry_queue = daemon.begin_what_is_due();
        let event = events.recv_timeout(daemon.pause(retry_queue));
        match event {
            Ok(DaemonEvent::CallNow) => daemon.providers.iter_mut().for_each(|line| line.at_once = true),
            Ok(DaemonEvent::Reload) => daemon.reload(load, &current),
            Ok(DaemonEvent::Network) => daemon.providers.iter_mut().for_each(|line| line.network = true),
            Ok(DaemonEvent::CallEnded { key, begun, error }) => daemon.ended(&key, begun, error),
            Ok(DaemonEvent::RetryEnded) => daemon.handed_over(),
            Ok(DaemonEvent::RetryQueued) => daemon.retry_pause_until = None,
            Ok(DaemonEvent::Stop) | Err(_) => {}
        }
    }
    // They have heard the word to stop. Who does not end in time is cut off with the process: a message half received
    // stays with the provider.
    let end = Instant::now() + daemon.customer.config().timeouts.shutdown;
    while daemon.is_busy() {
        match events.recv_deadline(end) {
            Ok(DaemonEvent::CallEnded { key, begun, error }) => daemon.ended(&key, begun, error),
            Ok(DaemonEvent::RetryEnded) => daemon.retrying = false,
            Ok(_) => {}
            Err(_) => break,
        }
    }
    listeners.close(end);
    Ok(())
}

/// The file that the daemon of these mailboxes locks, and writes its process into.
fn daemon_file(config: &CustomerConfig) -> Result<File, CallError> {
    store::state_file(&config.mailboxes.root, "daemon").map_err(|error| CallError::System(error.to_string()))
}

/// One daemon for the same mailboxes.
fn lock_daemon(config: &CustomerConfig) -> Result<File, CallError> {
    let system = |error: io::Error| CallError::System(error.to_string());
    let mut file = daemon_file(config)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let text = "a daemon is calling for these mailboxes already; `odmr pull --now` makes it call at once";
            return Err(CallError::Busy(text.to_owned()));
        }
        Err(TryLockError::Error(error)) => return Err(system(error)),
    }
    file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(system)?;
    Ok(file)
}

/// The process of the daemon that runs for these mailboxes, if there is one.
pub fn running(config: &CustomerConfig) -> Result<Option<i32>, CallError> {
    let mut file = daemon_file(config)?;
    if file.try_lock().is_ok() {
        return Ok(None);
    }
    let mut text = String::new();
    let read = file.rewind().and_then(|()| file.read_to_string(&mut text));
    read.map_err(|error| CallError::System(error.to_string()))?;
    match text.trim().parse() {
        Ok(process) if process > 1 => Ok(Some(process)),
        _ => Err(CallError::Busy("a daemon is just starting, and will call".to_owned())),
    }
}

/// The state of the loop.
struct Daemon {
    customer: Arc<Customer>,
    /// One a provider, in the order of the configuration.
    providers: Vec<ProviderState>,
    ids: Ids,
    cancel: CancelToken,
    bell: EventSender,
    /// A thread tries the mail for next hops.
    retrying: bool,
    /// Calls under way, also to providers that are no longer configured.
    calls: usize,
    /// The last try left something due: another process is at it, or something is in its way. Not before this.
    retry_pause_until: Option<Instant>,
    epoch: Instant,
}

/// What is known of the calls to one provider.
struct ProviderState {
    key: AccountKey,
    schedule: Schedule,
    timer: CallTimer,
    calling: bool,
    at_once: bool,
    /// The last call has failed because nobody could be reached.
    unreachable: bool,
    /// An address or a route has come, and was not looked at yet.
    network: bool,
    /// One was the reason to call: no other one is before this.
    network_pause_until: Option<Instant>,
    network_calls: u32,
}

impl Daemon {
    fn now(&self) -> Clocks {
        Clocks { date: self.ids.clock().now(), ticks: self.epoch.elapsed() }
    }

    /// Takes the providers as they are configured; who was there before keeps his place in the schedule.
    fn follow(&mut self) {
        let now = self.now();
        let mut before = std::mem::take(&mut self.providers);
        for provider in &self.customer.config().providers {
            let known = before.iter().position(|line| line.key == key(provider)).map(|at| before.swap_remove(at));
            let mut line = known.unwrap_or_else(|| ProviderState {
                key: key(provider),
                schedule: provider.schedule.clone(),
                timer: CallTimer::new(&provider.schedule, now, self.ids.random_number()),
                calling: false,
                at_once: false,
                unreachable: false,
                network: false,
                network_pause_until: None,
                network_calls: 0,
            });
            if line.schedule != provider.schedule {
                line.schedule = provider.schedule.clone();
                line.timer = CallTimer::new(&provider.schedule, now, self.ids.random_number());
            }
            self.providers.push(line);
        }
        for line in self.providers.iter().filter(|line| !line.calling) {
            self.say_when(line);
        }
    }

    fn say_when(&self, line: &ProviderState) {
        let next = line.timer.next_call(self.now()).rfc3339();
        log::info!("event=next-call provider={} account={} at={next}", line.key.0, line.key.1);
    }

    /// Says how long until mail for a next hop is due, if any waits.
    fn begin_what_is_due(&mut self) -> Option<Duration> {
        self.look_at_network();
        let now = self.now();
        for number in 0..self.providers.len() {
            let line = &mut self.providers[number];
            if !line.calling && (line.at_once || line.timer.time_left(now).is_zero()) {
                (line.calling, line.at_once) = (true, false);
                self.call(number, now);
            }
        }
        let retry_queue = self.until_handover();
        if retry_queue == Some(Duration::ZERO) {
            self.retrying = true;
            let (customer, cancel) = (self.customer.clone(), self.cancel.clone());
            let end = NotifyOnDrop(self.bell.clone(), Some(DaemonEvent::RetryEnded));
            self.thread("handover", move || {
                let _end = end;
                customer.retry_next_hops(&cancel);
            });
            // It is said when that has ended.
            return None;
        }
        retry_queue
    }

    fn call(&mut self, number: usize, begun: Clocks) {
        self.calls += 1;
        let (customer, cancel) = (self.customer.clone(), self.cancel.clone());
        let key = self.providers[number].key.clone();
        let unexpected = CallError::System("the call ended in the middle".to_owned());
        let ended = DaemonEvent::CallEnded { key: key.clone(), begun, error: Some(unexpected) };
        let end = NotifyOnDrop(self.bell.clone(), Some(ended));
        self.thread("call", move || {
            let mut end = end;
            let called = customer.call(number, &cancel, &Arc::<CallCounters>::default());
            end.1 = Some(DaemonEvent::CallEnded { key, begun, error: called.err() });
        });
    }

    fn is_busy(&self) -> bool {
        self.retrying || self.calls > 0
    }

    fn thread(&self, name: &str, work: impl FnOnce() + Send + 'static) {
        match std::thread::Builder::new().name(name.to_owned()).spawn(work) {
            Ok(_) => {}
            // What was to be done is dropped, and tells of its end.
            Err(error) => log::error!("event=no-thread error={:?}", error.to_string()),
        }
    }

    fn ended(&mut self, key: &AccountKey, begun: Clocks, error: Option<CallError>) {
        let now = self.now();
        self.calls = self.calls.saturating_sub(1);
        let Some(at) = self.providers.iter().position(|line| line.key == *key) else { return };
        let line = &mut self.providers[at];
        line.calling = false;
        line.unreachable = false;
        let (address, account) = key;
        let good = match &error {
            None => {
                line.network_calls = 0;
                true
            }
            // Somebody else calls: that is as good.
            Some(CallError::Busy(text)) => {
                log::info!("event=not-called provider={address} account={account} reason={text:?}");
                true
            }
            Some(_) if self.cancel.is_cancelled() => return,
            // The provider is down or busy (450, 451): it is waited for.
            Some(CallError::NoHost(text) | CallError::Unavailable(text) | CallError::Temporary(text)) => {
                log::warn!("event=call-failed provider={address} account={account} error={text:?}");
                line.unreachable = true;
                false
            }
            // It does not let us in, or is not what it should be: somebody must look.
            Some(
                CallError::Denied(text) | CallError::Protocol(text) | CallError::Config(text) | CallError::System(text),
            ) => {
                log::error!("event=call-refused provider={address} account={account} error={text:?}");
                false
            }
        };
        line.timer.call_ended(begun, now, good, self.ids.random_number());
        self.say_when(&self.providers[at]);
    }

    /// A call that failed may go through now; one that is under way may have begun too early, and is waited for.
    fn look_at_network(&mut self) {
        let (now, moment) = (self.now(), Instant::now());
        for line in self.providers.iter_mut().filter(|line| line.network && !line.calling) {
            if line.network_pause_until.is_some_and(|until| moment < until) {
                continue;
            }
            line.network = false;
            if line.unreachable {
                log::info!("event=network provider={} account={}", line.key.0, line.key.1);
                line.timer.network_is_back(now);
                let rest = NETWORK_CALL_PAUSE.saturating_mul(2_u32.saturating_pow(line.network_calls));
                line.network_pause_until = Some(moment + rest.min(CLOCK_CHECK_INTERVAL));
                line.network_calls = line.network_calls.saturating_add(1);
            }
        }
    }

    fn reload(&mut self, load: &dyn Fn() -> Result<CustomerConfig, String>, current: &RwLock<Arc<Customer>>) {
        let made = load()
            .and_then(|config| Customer::new(&config, &self.ids).map_err(|error| error.to_string()))
            .map(Arc::new);
        let customer = match made {
            Ok(customer) => customer,
            Err(error) => {
                return log::error!("event=reload-failed error={error:?} consequence=\"the old configuration holds\"");
            }
        };
        let (old, new) = (self.customer.config(), customer.config());
        let names = |owner: &MailOwner| (owner.user.clone(), owner.group.clone());
        let visitors = |config: &CustomerConfig| (config.limits.connections, config.limits.connections_per_address);
        let listens = |config: &CustomerConfig| config.outgoing.as_ref().map(|outgoing| outgoing.listen.clone());
        if listens(old).unwrap_or_default() != listens(new).unwrap_or_default()
            || (old.owner.as_ref().map(names), old.mailboxes.umask)
                != (new.owner.as_ref().map(names), new.mailboxes.umask)
            || old.mailboxes.root != new.mailboxes.root
            || visitors(old) != visitors(new)
        {
            let what = "`listen`, `user`, `group`, `umask`, `root` or a limit of connections has changed";
            log::warn!("event=restart-needed reason={what:?}");
        }
        wake_by(&customer, &self.bell);
        *current.write().unwrap_or_else(PoisonError::into_inner) = customer.clone();
        self.customer = customer;
        log::info!("event=reloaded");
        self.follow();
    }

    /// How long nothing has to be done; `handover`: as far as mail for next hops goes.
    fn pause(&self, retry_queue: Option<Duration>) -> Duration {
        let now = self.now();
        let waiting = self.providers.iter().filter(|line| !line.calling);
        let call = waiting.map(|line| if line.at_once { Duration::ZERO } else { line.timer.time_left(now) }).min();
        let rests = |line: &ProviderState| line.network_pause_until.filter(|_| line.network && !line.calling);
        let network = self.providers.iter().filter_map(rests).min();
        let network = network.map(|until| until.saturating_duration_since(Instant::now()));
        [Some(CLOCK_CHECK_INTERVAL), call, retry_queue, network]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(CLOCK_CHECK_INTERVAL)
    }

    /// How long until mail for a next hop is tried; `None`: there is none, or it is being tried.
    fn until_handover(&self) -> Option<Duration> {
        if self.retrying {
            return None;
        }
        let due = self.customer.retry_due()?;
        let left = due.duration_since(SystemTime::now()).unwrap_or_default();
        let rest = self.retry_pause_until.map(|until| until.saturating_duration_since(Instant::now()));
        Some(left.max(rest.unwrap_or_default()))
    }

    fn handed_over(&mut self) {
        self.retrying = false;
        self.retry_pause_until = None;
        if self.until_handover() == Some(Duration::ZERO) {
            self.retry_pause_until = Some(Instant::now() + CLOCK_CHECK_INTERVAL);
        }
    }
}

/// Mail for a next hop that one of our users hands in is tried at once.
fn wake_by(customer: &Customer, bell: &EventSender) {
    if let Some(outbox) = customer.outbox() {
        let bell = bell.clone();
        outbox.on_retry_queued(Box::new(move || bell.send(DaemonEvent::RetryQueued)));
    }
}

/// Tells the loop that something has ended, also by a panic.
struct NotifyOnDrop(EventSender, Option<DaemonEvent>);

impl Drop for NotifyOnDrop {
    fn drop(&mut self) {
        if let Some(event) = self.1.take() {
            self.0.send(event);
        }
    }
}

/// The listeners of `[outgoing]`, a thread each.
struct Listeners {
    threads: Vec<JoinHandle<()>>,
    visitors: ConnectionLimiter,
    abort: CancelToken,
}

impl Listeners {
    fn start(
        bound: Vec<TcpListener>, current: &Arc<RwLock<Arc<Customer>>>, cancel: &CancelToken,
    ) -> Result<Listeners, CallError> {
        let system = |error: io::Error| CallError::System(error.to_string());
        let limits = current.read().unwrap_or_else(PoisonError::into_inner).config().limits.clone();
        let visitors = ConnectionLimiter::new(limits.connections, limits.connections_per_address);
        let abort = CancelToken::new().map_err(system)?;
        let mut threads = Vec::new();
        for listener in bound {
            log::info!("listening {LISTENER_NAME} {}", listener.local_addr().map_err(system)?);
            let gate =
                Acceptor { name: LISTENER_NAME, greets: true, cancel: cancel.clone(), limiter: visitors.clone() };
            let door = SubmissionListener { current: current.clone(), cancel: cancel.clone(), abort: abort.clone() };
            let work = move || gate.accept(&listener, Arc::new(move |stream, peer| door.serve(stream, peer)));
            threads.push(std::thread::Builder::new().name(LISTENER_NAME.to_owned()).spawn(work).map_err(system)?);
        }
        Ok(Listeners { threads, visitors, abort })
    }

    /// Sessions come to a good end, or to an end, by then. The word to stop has been said.
    fn close(self, end: Instant) {
        for thread in self.threads {
            let _ = thread.join();
        }
        self.visitors.wait_until_idle(end);
        self.abort.cancel();
        self.visitors.wait_until_idle(Instant::now() + Duration::from_secs(1));
    }
}

/// Behind it one connection is served.
struct SubmissionListener {
    current: Arc<RwLock<Arc<Customer>>>,
    cancel: CancelToken,
    abort: CancelToken,
}

impl SubmissionListener {
    fn serve(&self, stream: TcpStream, peer: IpAddr) {
        let trace = Trace { id: format!("{LISTENER_NAME}-{peer}"), us: 'S', them: 'C' };
        let peer_name = literal(peer);
        let connection = match Connection::new(OwnedFd::from(stream), trace) {
            Ok(connection) => connection,
            Err(error) => return log::warn!("event=no-session peer={peer_name} error={:?}", error.to_string()),
        };
        let customer = self.current.read().unwrap_or_else(PoisonError::into_inner).clone();
        let why = match customer.outbox().filter(|outbox| outbox.config().admits(peer)) {
            Some(outbox) => {
                submission::serve(customer.config(), outbox, connection, peer_name.clone(), &self.cancel, &self.abort)
            }
            None => reject(connection),
        };
        log::info!("event=closed listener={LISTENER_NAME} peer={peer_name} reason={why:?}");
    }
}

/// RFC 5321 section 3.1: a server that gives no service says so with 554 in place of its greeting.
fn reject(mut connection: Connection) -> String {
    let mut octets = Vec::new();
    Reply::new(554, "5.7.1", "This server is for its own network only").write_to(&mut octets);
    connection.trace.sent(octets.trim_ascii_end());
    connection.send(&octets);
    let _ = connection.flush_all(Instant::now() + REJECTION_TIMEOUT, None);
    connection.shutdown();
    "not one of our networks".to_owned()
}
