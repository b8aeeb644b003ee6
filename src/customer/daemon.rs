//! `odmr pull --daemon`: calls by the schedule, and accepts the mail of this host's users ([`super::submission`]).
//!
//! One loop waits for events: a call is due or has ended, a signal, a new network address, mail for a next hop. Each
//! call has a thread, so that a provider that stalls does not delay the others; a provider gets one call at a time.
//! Only the loop uses the state of the calls, so it needs no lock. After a reload, calls and sessions that begin use
//! the new configuration; those that have begun end with the old one.

use std::fs::File;
use std::io::{self, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::network;
use super::pull::{CallError, Customer};
use super::store;
use super::submission::{self, SubmissionListeners};
use crate::config::{CustomerConfig, ProviderAccount};
use crate::ids::Ids;
use crate::maildir::write_error;
use crate::net::cancel::CancelToken;
use crate::net::inherited::InheritedListeners;
use crate::net::listener;
use crate::net::readiness::Readiness;
use crate::net::trace::{log_no_thread, quoted};
use crate::net::wake::receive_wakes;
use crate::report::calls::{self, CallRecord};
use crate::sandbox;
use crate::schedule::{CallOutcome, CallTimer, Clocks, Schedule};
use crate::threads;

/// The loop reads the clock at least this often: an administrator or NTP may set it.
const CLOCK_CHECK_INTERVAL: Duration = Duration::from_secs(60);

/// The shortest time between two calls because of a new address: a network that comes up reports several addresses and
/// routes, one after the other. Each of these calls that fails doubles the time, up to [`CLOCK_CHECK_INTERVAL`].
const NETWORK_CALL_PAUSE: Duration = Duration::from_secs(3);

/// The file in `ROOT/.odmr` that the daemon locks, and writes its process id into.
const LOCK_FILE: &str = "daemon";

/// The events of the loop.
#[derive(Debug)]
pub enum DaemonEvent {
    /// Call every provider now.
    CallNow,
    /// The configuration has changed.
    Reload,
    /// The daemon was cancelled.
    Stop,
    /// This machine has a new address or route.
    Network,
    /// A message was stored in the retry queue, by this or another process, or an administrator has made messages due.
    RetryQueued,
    /// The thread that retries the messages of the retry queue has ended.
    RetryEnded,
    /// A call has ended. `result`: the number of recipients that were deferred here, or the error.
    CallEnded { key: AccountKey, begun: Clocks, result: Result<u64, CallError> },
}

/// The address of a provider, and our login name there.
pub type AccountKey = (String, String);

fn key(provider: &ProviderAccount) -> AccountKey {
    (provider.remote.address.clone(), provider.remote.login_name().to_owned())
}

/// Sends events to the loop.
#[derive(Clone)]
pub struct EventSender(Sender<DaemonEvent>);

impl EventSender {
    /// Sends an event. If the daemon has ended, nothing happens.
    pub fn send(&self, event: DaemonEvent) {
        let _ = self.0.send(event);
    }
}

/// A daemon before privileges are dropped: its configuration can be used, and its listeners are bound.
pub struct BoundDaemon {
    /// Sends events to the daemon.
    pub events: EventSender,
    receiver: Receiver<DaemonEvent>,
    customer: Customer,
    listeners: Vec<TcpListener>,
    /// A supervisor has opened the listeners.
    inherited: bool,
}

impl BoundDaemon {
    /// Prepares the calls and binds the listeners. `sockets`: if a supervisor has passed some, they replace `listen` of
    /// `[outgoing]`.
    ///
    /// # Errors
    /// Those of [`Customer::new`]; [`CallError::System`] if a listener cannot be bound; [`CallError::Config`] if a
    /// supervisor passes a socket and the configuration has no `[outgoing]`.
    pub fn new(config: &CustomerConfig, ids: &Ids, mut sockets: InheritedListeners) -> Result<BoundDaemon, CallError> {
        let customer = Customer::new(config, ids)?;
        let addresses = config.outgoing.as_ref().map(|outgoing| &outgoing.listen[..]).unwrap_or_default();
        let passed = sockets.take(submission::PLAIN_NAME);
        let inherited = !passed.is_empty();
        if inherited && config.outgoing.is_none() {
            let text = "the supervisor passes a socket local, and the file has no [outgoing]: add it, with `queue`";
            return Err(CallError::Config(text.to_owned()));
        }
        let listeners = match inherited {
            true => passed,
            false => listener::bind(submission::LISTENER_NAME, addresses)?,
        };
        let (sender, receiver) = unbounded();
        Ok(BoundDaemon { events: EventSender(sender), receiver, customer, listeners, inherited })
    }
}

/// Runs the daemon until `cancel` is cancelled and [`DaemonEvent::Stop`] wakes the loop. `load` reads the configuration
/// again; `readiness` reports to the supervisor.
///
/// # Errors
/// [`CallError::Busy`]: another daemon runs for these mailboxes; [`CallError::System`]: a system call failed.
pub fn run(
    bound: BoundDaemon, load: &dyn Fn() -> Result<CustomerConfig, String>, readiness: &Readiness, cancel: &CancelToken,
) -> Result<(), CallError> {
    let BoundDaemon { events, receiver, customer, listeners, inherited } = bound;
    let _lock = lock(customer.config())?;
    let outbox = customer.outbox.clone();
    let listeners = SubmissionListeners::start(listeners, inherited, &customer.mailboxes, outbox, cancel)?;
    let (watcher, waker, mailboxes) = (events.clone(), events.clone(), &customer.config().mailboxes);
    // All users that may store mail for next hops may wake the daemon.
    let (mode, woken) = (0o666 & !mailboxes.umask, Box::new(move |_| waker.send(DaemonEvent::RetryQueued)));
    let wakes = receive_wakes(&mailboxes.root, mode, cancel, woken);
    network::watch(move || watcher.send(DaemonEvent::Network), cancel);
    let customer = Arc::new(customer);
    let fixed = fixed(customer.config());
    let mut daemon = Daemon {
        customer: customer.clone(),
        listeners,
        providers: Vec::new(),
        load,
        readiness,
        fixed,
        cancel: cancel.clone(),
        events,
        retrying: false,
        queued_since: false,
        calls: 0,
        retry_pause_until: None,
        epoch: Instant::now(),
    };
    daemon.adopt(customer);
    daemon.record_reload(None);
    daemon.update_providers();
    readiness.ready();
    while !cancel.is_cancelled() {
        daemon.start_what_is_due();
        if let Ok(event) = receiver.recv_timeout(daemon.pause()) {
            daemon.handle(event);
        }
    }
    readiness.stopping();
    // The calls are cancelled too. A call that does not end before the deadline ends with the process. No mail is lost:
    // the provider still has a message of which only a part has arrived.
    let deadline = Instant::now() + daemon.customer.config().timeouts.shutdown;
    while (daemon.retrying || daemon.calls > 0)
        && let Ok(event) = receiver.recv_deadline(deadline)
    {
        daemon.handle(event);
    }
    daemon.listeners.close(deadline);
    // The thread removes its socket. That must happen before the next daemon can get the lock and create its own.
    wakes.map(JoinHandle::join);
    Ok(())
}

/// Locks the mailboxes, so that one daemon at a time runs for them.
fn lock(config: &CustomerConfig) -> Result<File, CallError> {
    let text = "a daemon is calling for these mailboxes already; `odmr pull -c FILE --now` makes it call at once";
    let file = store::lock_for_daemon(&config.mailboxes.root, LOCK_FILE)?;
    let mut file = file.ok_or_else(|| CallError::Busy(text.to_owned()))?;
    let written = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
    let path = config.mailboxes.root.join(".odmr").join(LOCK_FILE);
    written.map(|()| file).map_err(|error| write_error(&path, error).into())
}

/// The process id of the daemon that runs for these mailboxes; `None`: none runs. No file is created.
///
/// # Errors
/// [`CallError::Denied`]: the daemon is that of another user; [`CallError::Busy`]: the daemon is just starting;
/// [`CallError::System`]: its file cannot be read.
pub fn running(config: &CustomerConfig) -> Result<Option<i32>, CallError> {
    let file = store::locked_state_file(&config.mailboxes.root, LOCK_FILE).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => CallError::Denied(format!("{error}; be the user of the daemon, or root")),
        _ => error.into(),
    })?;
    let Some(file) = file else { return Ok(None) };
    match io::read_to_string(file)?.trim().parse() {
        Ok(process) if process > 1 => Ok(Some(process)),
        _ => Err(CallError::Busy("a daemon is just starting, and will call".to_owned())),
    }
}

/// The keys that a reload does not change, with their values.
fn fixed(config: &CustomerConfig) -> Vec<(&'static str, String)> {
    let (owner, mailboxes) = (config.owner.as_ref(), &config.mailboxes);
    let listen = config.outgoing.as_ref().map(|outgoing| &outgoing.listen[..]).unwrap_or_default();
    vec![
        ("`listen`", format!("{listen:?}")),
        ("`user`", format!("{:?}", owner.map(|owner| &owner.user))),
        ("`group`", format!("{:?}", owner.map(|owner| &owner.group))),
        ("`umask`", format!("{:o}", mailboxes.umask)),
        ("`root`", format!("{:?}", mailboxes.root)),
    ]
}

/// The state of the loop.
struct Daemon<'a> {
    customer: Arc<Customer>,
    listeners: SubmissionListeners,
    /// In the order of the configuration.
    providers: Vec<ProviderState>,
    load: &'a dyn Fn() -> Result<CustomerConfig, String>,
    readiness: &'a Readiness,
    /// The result of [`fixed`] at the start.
    fixed: Vec<(&'static str, String)>,
    cancel: CancelToken,
    events: EventSender,
    /// A thread is retrying the messages of the retry queue.
    retrying: bool,
    /// Mail was stored in the retry queue after that thread began. The thread may have missed it.
    queued_since: bool,
    /// The number of calls that have not ended, including those to providers that are no longer configured.
    calls: usize,
    /// No retries before then: messages were still due after the last retries, because another process has locked the
    /// queue or because of an error. Without a pause the loop would try again at once, for ever.
    retry_pause_until: Option<Instant>,
    /// When the daemon started.
    epoch: Instant,
}

/// The state of the calls to one provider.
struct ProviderState {
    key: AccountKey,
    schedule: Schedule,
    timer: CallTimer,
    calling: bool,
    /// Call now, without regard to the schedule.
    at_once: bool,
    /// The last call has failed, and the next one may succeed.
    unreachable: bool,
    /// There is a new address or route, for which no call has begun yet.
    network: bool,
    /// No call because of a new address before then.
    network_pause_until: Option<Instant>,
    /// The number of such calls since the last success.
    network_calls: u32,
}

impl ProviderState {
    fn time_left(&self, now: Clocks) -> Duration {
        if self.at_once { Duration::ZERO } else { self.timer.time_left(now) }
    }

    /// Logs the time of the next call, and records it for `odmr status`.
    fn log_next_call(&self, root: &Path, now: Clocks) {
        let ((provider, account), at) = (&self.key, self.timer.next_call(now));
        log::info!("event=next-call provider={provider} account={account} at={}", at.rfc3339());
        if let Err(error) = calls::write_time(&store::next_call(root, account, provider), at) {
            log::warn!("event=call-not-recorded account={account} error={}", quoted(error));
        }
    }
}

impl Daemon<'_> {
    fn now(&self) -> Clocks {
        Clocks { date: self.customer.mailboxes.ids.clock().now(), ticks: self.epoch.elapsed() }
    }

    fn handle(&mut self, event: DaemonEvent) {
        match event {
            DaemonEvent::CallNow => self.providers.iter_mut().for_each(|state| state.at_once = true),
            DaemonEvent::Network => self.providers.iter_mut().for_each(|state| state.network = true),
            DaemonEvent::Reload if !self.cancel.is_cancelled() => {
                self.readiness.reloading();
                self.reload();
                self.readiness.ready();
            }
            DaemonEvent::Reload | DaemonEvent::Stop => {}
            DaemonEvent::RetryQueued => (self.queued_since, self.retry_pause_until) = (true, None),
            DaemonEvent::RetryEnded => {
                (self.retrying, self.retry_pause_until) = (false, None);
                if !self.queued_since && self.until_retry() == Some(Duration::ZERO) {
                    self.retry_pause_until = Some(Instant::now() + CLOCK_CHECK_INTERVAL);
                }
            }
            DaemonEvent::CallEnded { key, begun, result } => self.call_ended(&key, begun, &result),
        }
    }

    /// Uses this customer for the calls and sessions that begin from now on.
    fn adopt(&mut self, customer: Arc<Customer>) {
        let events = self.events.clone();
        customer.retry_queue.set_waker(Box::new(move || events.send(DaemonEvent::RetryQueued)));
        customer.mailboxes.log_warnings();
        let config = customer.config();
        self.listeners.set_outbox(customer.outbox.clone(), config.limits.of_connections(&config.timeouts));
        self.customer = customer;
    }

    /// Makes the list of providers from the configuration. The time of a provider's next call does not change, unless
    /// its schedule has changed.
    fn update_providers(&mut self) {
        let (now, ids) = (self.now(), self.customer.mailboxes.ids.clone());
        let mut before = std::mem::take(&mut self.providers);
        for provider in &self.customer.config().providers {
            let timer = || CallTimer::new(&provider.schedule, now, ids.random_number());
            let known = before.iter().position(|state| state.key == key(provider)).map(|at| before.swap_remove(at));
            let mut state = known.unwrap_or_else(|| ProviderState {
                key: key(provider),
                schedule: provider.schedule.clone(),
                timer: timer(),
                calling: false,
                at_once: false,
                unreachable: false,
                network: false,
                network_pause_until: None,
                network_calls: 0,
            });
            if state.schedule != provider.schedule {
                (state.schedule, state.timer) = (provider.schedule.clone(), timer());
            }
            self.providers.push(state);
        }
        let root = &self.customer.config().mailboxes.root;
        self.providers.iter().filter(|state| !state.calling).for_each(|state| state.log_next_call(root, now));
    }

    fn start_what_is_due(&mut self) {
        self.call_after_network_change();
        let now = self.now();
        for number in 0..self.providers.len() {
            let state = &mut self.providers[number];
            if !state.calling && state.time_left(now).is_zero() {
                (state.calling, state.at_once) = (true, false);
                self.call(number, now);
            }
        }
        if self.until_retry() == Some(Duration::ZERO) {
            (self.retrying, self.queued_since) = (true, false);
            let (customer, cancel) = (self.customer.clone(), self.cancel.clone());
            self.spawn("retry", DaemonEvent::RetryEnded, move || {
                // `retry` logs a failure.
                let _ = customer.retry_queue.retry(&cancel);
                DaemonEvent::RetryEnded
            });
        }
    }

    fn call(&mut self, number: usize, begun: Clocks) {
        self.calls += 1;
        let (customer, cancel) = (self.customer.clone(), self.cancel.clone());
        let key = self.providers[number].key.clone();
        let ended = move |result| DaemonEvent::CallEnded { key: key.clone(), begun, result };
        let panicked = ended(Err(CallError::System("the call's thread has failed".to_owned(), io::ErrorKind::Other)));
        self.spawn("call", panicked, move || ended(customer.call(number, &cancel, &Arc::default())));
    }

    /// Runs `work` in a new thread, and sends the event that it returns; if it panics, or the system has no thread,
    /// `failed`.
    fn spawn(&self, name: &str, failed: DaemonEvent, work: impl FnOnce() -> DaemonEvent + Send + 'static) {
        let mut end = NotifyOnDrop { events: self.events.clone(), event: Some(failed) };
        let work = move || {
            end.event = Some(work());
            drop(end);
        };
        if let Err(error) = threads::spawn(name, work) {
            log_no_thread(&error);
        }
    }

    fn call_ended(&mut self, key: &AccountKey, begun: Clocks, result: &Result<u64, CallError>) {
        let (now, chance) = (self.now(), self.customer.mailboxes.ids.random_number());
        self.calls = self.calls.saturating_sub(1);
        let Some(state) = self.providers.iter_mut().find(|state| state.key == *key) else { return };
        (state.calling, state.unreachable) = (false, false);
        let (provider, account) = key;
        match result {
            Ok(_) => state.network_calls = 0,
            Err(CallError::Busy(reason) | CallError::TooSoon(reason)) => {
                log::info!("event=call-skipped provider={provider} account={account} reason={}", quoted(reason));
            }
            Err(_) if self.cancel.is_cancelled() => return,
            // The provider is down or busy (450, 451): the next call may succeed.
            Err(error @ (CallError::NoHost(_) | CallError::Unavailable(_) | CallError::Temporary(_))) => {
                log::warn!("event=call-failed provider={provider} account={account} error={}", quoted(error));
                state.unreachable = true;
            }
            // An administrator has to change something.
            Err(error) => {
                log::error!("event=call-failed provider={provider} account={account} error={}", quoted(error));
            }
        }
        // A call that another process is making, or that ended a moment ago, has fetched the mail.
        let outcome = match result {
            Ok(0) | Err(CallError::Busy(_) | CallError::TooSoon(_)) => CallOutcome::Success,
            Ok(_) => CallOutcome::Deferred,
            Err(_) => CallOutcome::Failure,
        };
        state.timer.call_ended(begun, now, outcome, chance);
        state.log_next_call(&self.customer.config().mailboxes.root, now);
    }

    /// After a new address or route, makes a call due to each provider whose last call failed. A call that has not
    /// ended may have begun before that, and is awaited first.
    fn call_after_network_change(&mut self) {
        let (now, moment) = (self.now(), Instant::now());
        for state in self.providers.iter_mut().filter(|state| state.network && !state.calling) {
            if state.network_pause_until.is_some_and(|until| moment < until) {
                continue;
            }
            state.network = false;
            if state.unreachable {
                log::info!("event=network provider={} account={}", state.key.0, state.key.1);
                state.timer.network_is_back(now);
                let pause = NETWORK_CALL_PAUSE.saturating_mul(2_u32.saturating_pow(state.network_calls));
                state.network_pause_until = Some(moment + pause.min(CLOCK_CHECK_INTERVAL));
                state.network_calls = state.network_calls.saturating_add(1);
            }
        }
    }

    fn reload(&mut self) {
        let mut changed = Vec::new();
        let loaded = (self.load)().and_then(|mut config| {
            changed = fixed(&config);
            changed.retain(|value| !self.fixed.contains(value));
            config.mailboxes.stay_in_place(&self.customer.config().mailboxes);
            for (directory, _) in store::mail_directories(&config) {
                sandbox::check_writable(&directory.path)?;
            }
            Customer::new(&config, &self.customer.mailboxes.ids).map_err(|error| error.to_string())
        });
        let customer = match loaded {
            Ok(customer) => Arc::new(customer),
            Err(error) => {
                let consequence = "the old configuration stays in effect";
                self.record_reload(Some(&error));
                return log::error!("event=reload-failed error={} consequence={consequence:?}", quoted(error));
            }
        };
        if !changed.is_empty() {
            let keys: Vec<_> = changed.iter().map(|(key, _)| *key).collect();
            let what = format!("{} changed, which takes effect after a restart", keys.join(", "));
            log::warn!("event=restart-needed reason={what:?}");
        }
        self.adopt(customer);
        log::info!("event=reloaded");
        self.record_reload(None);
        self.update_providers();
    }

    /// Records for `odmr status` that the configuration was read, or why not.
    fn record_reload(&self, error: Option<&str>) {
        let record = CallRecord::of_reload(self.now().date, error);
        record.write(&store::reload_record(&self.customer.config().mailboxes.root), "-");
    }

    /// How long the loop may wait for an event: until a call or a retry may be due.
    fn pause(&self) -> Duration {
        let (now, moment) = (self.now(), Instant::now());
        let waiting = || self.providers.iter().filter(|state| !state.calling);
        let calls = waiting().map(|state| state.time_left(now));
        let networks = waiting().filter(|state| state.network).filter_map(|state| state.network_pause_until);
        let networks = networks.map(|until| until.saturating_duration_since(moment));
        calls.chain(networks).chain(self.until_retry()).fold(CLOCK_CHECK_INTERVAL, Duration::min)
    }

    /// The time until messages of the retry queue are due; `None`: it is empty, or a thread is retrying them.
    fn until_retry(&self) -> Option<Duration> {
        if self.retrying {
            return None;
        }
        let left = self.customer.retry_queue.due()?.duration_since(SystemTime::now()).unwrap_or_default();
        let pause = self.retry_pause_until.map(|until| until.saturating_duration_since(Instant::now()));
        Some(left.max(pause.unwrap_or_default()))
    }
}

/// Sends an event when it is dropped, even by a panic.
struct NotifyOnDrop {
    events: EventSender,
    event: Option<DaemonEvent>,
}

impl Drop for NotifyOnDrop {
    fn drop(&mut self) {
        if let Some(event) = self.event.take() {
            self.events.send(event);
        }
    }
}
