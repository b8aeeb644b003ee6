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

use super::local;
use super::network;
use super::pull::{Caller, Error, state_file};
use super::tally::Tally;
use crate::config::{Customer, Owner, Schedule, Upstream};
use crate::listen::{self, Gate, Visitors};
use crate::schedule::{Diary, Now};
use crate::session::literal;
use crate::smtp::reply::Reply;
use crate::stamp::Stamps;
use crate::wire::{Stop, Trace, Wire};

/// The name of the listener, in the log.
const LISTENER: &str = "local";

/// How long one who is turned away may take to read why.
const FAREWELL: Duration = Duration::from_secs(5);

/// So often the clock is looked at, as it may be set.
const GLANCE: Duration = Duration::from_secs(60);

/// Calls for the sake of a new address are so far apart at least: a network comes up in steps.
/// With each one that did not help it is twice as long, up to `GLANCE`.
const BETWEEN_NETWORKS: Duration = Duration::from_secs(3);

/// What the loop waits for.
#[derive(Debug)]
pub enum Event {
    /// Call now, every provider.
    Now,
    /// The configuration has changed.
    Reload,
    /// Look whether you are to stop.
    Stop,
    /// This machine has got an address or a route.
    Network,
    /// Mail has come for a next hop.
    Handover,
    /// Mail for next hops was tried.
    HandedOver,
    /// A call has ended.
    Ended { key: Key, begun: Now, error: Option<Error> },
}

/// A provider and our name there.
pub type Key = (String, String);

fn key(provider: &Upstream) -> Key {
    (provider.address.clone(), provider.name.clone())
}

/// What is needed before privileges are dropped: the configuration is good, the listeners are bound.
pub struct Ready {
    caller: Arc<Caller>,
    listeners: Vec<TcpListener>,
}

impl Ready {
    pub fn new(config: &Customer, stamps: &Stamps) -> Result<Ready, Error> {
        let caller = Arc::new(Caller::new(config, stamps)?);
        let addresses = config.outgoing.iter().flat_map(|outgoing| &outgoing.listen);
        let listeners = addresses.map(|address| listen::bind(*address)).collect::<Result<_, _>>();
        Ok(Ready { caller, listeners: listeners.map_err(Error::System)? })
    }
}

/// The way to tell a daemon something.
#[derive(Clone)]
pub struct Bell(Sender<Event>);

impl Bell {
    pub fn ring(&self, event: Event) {
        // Nobody listens: then it has ended.
        let _ = self.0.send(event);
    }
}

pub fn bell() -> (Bell, Receiver<Event>) {
    let (sender, receiver) = unbounded();
    (Bell(sender), receiver)
}

/// Runs until it is told to stop. `load` reads the configuration anew.
pub fn run(
    ready: Ready,
    load: &dyn Fn() -> Result<Customer, String>,
    stamps: &Stamps,
    stop: &Stop,
    (bell, events): (Bell, Receiver<Event>),
) -> Result<(), Error> {
    let _alone = alone(ready.caller.config())?;
    wake_by(&ready.caller, &bell);
    let current = Arc::new(RwLock::new(ready.caller.clone()));
    let listeners = Listeners::start(ready.listeners, &current, stop)?;
    network::watch(bell.clone(), stop);
    let mut daemon = Daemon {
        caller: ready.caller,
        lines: Vec::new(),
        stamps: stamps.clone(),
        stop: stop.clone(),
        bell,
        handing_over: false,
        calls: 0,
        handover_rests: None,
        epoch: Instant::now(),
    };
    daemon.follow();
    while !stop.stopped() {
        let handover = daemon.begin_what_is_due();
        let event = events.recv_timeout(daemon.pause(handover));
        match event {
            Ok(Event::Now) => daemon.lines.iter_mut().for_each(|line| line.at_once = true),
            Ok(Event::Reload) => daemon.reload(load, &current),
            Ok(Event::Network) => daemon.lines.iter_mut().for_each(|line| line.network = true),
            Ok(Event::Ended { key, begun, error }) => daemon.ended(&key, begun, error),
            Ok(Event::HandedOver) => daemon.handed_over(),
            Ok(Event::Handover) => daemon.handover_rests = None,
            Ok(Event::Stop) | Err(_) => {}
        }
    }
    // They have heard the word to stop. Who does not end in time is cut off with the process: a message half received
    // stays with the provider.
    let end = Instant::now() + daemon.caller.config().timeouts.shutdown;
    while daemon.is_busy() {
        match events.recv_deadline(end) {
            Ok(Event::Ended { key, begun, error }) => daemon.ended(&key, begun, error),
            Ok(Event::HandedOver) => daemon.handing_over = false,
            Ok(_) => {}
            Err(_) => break,
        }
    }
    listeners.close(end);
    Ok(())
}

/// The file that the daemon of these mailboxes locks, and writes its process into.
fn daemon_file(config: &Customer) -> Result<File, Error> {
    state_file(config, "daemon")
}

/// One daemon for the same mailboxes.
fn alone(config: &Customer) -> Result<File, Error> {
    let system = |error: io::Error| Error::System(error.to_string());
    let mut file = daemon_file(config)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let text = "a daemon is calling for these mailboxes already; `odmr pull --now` makes it call at once";
            return Err(Error::Busy(text.to_owned()));
        }
        Err(TryLockError::Error(error)) => return Err(system(error)),
    }
    file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(system)?;
    Ok(file)
}

/// The process of the daemon that runs for these mailboxes, if there is one.
pub fn running(config: &Customer) -> Result<Option<i32>, Error> {
    let mut file = daemon_file(config)?;
    if file.try_lock().is_ok() {
        return Ok(None);
    }
    let mut text = String::new();
    let read = file.rewind().and_then(|()| file.read_to_string(&mut text));
    read.map_err(|error| Error::System(error.to_string()))?;
    match text.trim().parse() {
        Ok(process) if process > 1 => Ok(Some(process)),
        _ => Err(Error::Busy("a daemon is just starting, and will call".to_owned())),
    }
}

/// The state of the loop.
struct Daemon {
    caller: Arc<Caller>,
    /// One a provider, in the order of the configuration.
    lines: Vec<Line>,
    stamps: Stamps,
    stop: Stop,
    bell: Bell,
    /// A thread tries the mail for next hops.
    handing_over: bool,
    /// Calls under way, also to providers that are no longer configured.
    calls: usize,
    /// The last try left something due: another process is at it, or something is in its way. Not before this.
    handover_rests: Option<Instant>,
    epoch: Instant,
}

/// What is known of the calls to one provider.
struct Line {
    key: Key,
    schedule: Schedule,
    diary: Diary,
    calling: bool,
    at_once: bool,
    /// The last call has failed because nobody could be reached.
    unreachable: bool,
    /// An address or a route has come, and was not looked at yet.
    network: bool,
    /// One was the reason to call: no other one is before this.
    network_rests: Option<Instant>,
    network_calls: u32,
}

impl Daemon {
    fn now(&self) -> Now {
        Now { date: self.stamps.now(), ticks: self.epoch.elapsed() }
    }

    /// Takes the providers as they are configured; who was there before keeps his place in the schedule.
    fn follow(&mut self) {
        let now = self.now();
        let mut before = std::mem::take(&mut self.lines);
        for provider in &self.caller.config().providers {
            let known = before.iter().position(|line| line.key == key(provider)).map(|at| before.swap_remove(at));
            let mut line = known.unwrap_or_else(|| Line {
                key: key(provider),
                schedule: provider.schedule.clone(),
                diary: Diary::new(&provider.schedule, &self.stamps, now),
                calling: false,
                at_once: false,
                unreachable: false,
                network: false,
                network_rests: None,
                network_calls: 0,
            });
            if line.schedule != provider.schedule {
                line.schedule = provider.schedule.clone();
                line.diary = Diary::new(&provider.schedule, &self.stamps, now);
            }
            self.lines.push(line);
        }
        for line in self.lines.iter().filter(|line| !line.calling) {
            self.say_when(line);
        }
    }

    fn say_when(&self, line: &Line) {
        let next = line.diary.next(self.now()).rfc3339();
        log::info!("event=next-call provider={} account={} at={next}", line.key.0, line.key.1);
    }

    /// Says how long until mail for a next hop is due, if any waits.
    fn begin_what_is_due(&mut self) -> Option<Duration> {
        self.look_at_network();
        let now = self.now();
        for number in 0..self.lines.len() {
            let line = &mut self.lines[number];
            if !line.calling && (line.at_once || line.diary.left(now).is_zero()) {
                (line.calling, line.at_once) = (true, false);
                self.call(number, now);
            }
        }
        let handover = self.until_handover();
        if handover == Some(Duration::ZERO) {
            self.handing_over = true;
            let (caller, stop) = (self.caller.clone(), self.stop.clone());
            let end = AtEnd(self.bell.clone(), Some(Event::HandedOver));
            self.thread("handover", move || {
                let _end = end;
                caller.hand_over(&stop);
            });
            // It is said when that has ended.
            return None;
        }
        handover
    }

    fn call(&mut self, number: usize, begun: Now) {
        self.calls += 1;
        let (caller, stop) = (self.caller.clone(), self.stop.clone());
        let key = self.lines[number].key.clone();
        let unexpected = Error::System("the call ended in the middle".to_owned());
        let ended = Event::Ended { key: key.clone(), begun, error: Some(unexpected) };
        let end = AtEnd(self.bell.clone(), Some(ended));
        self.thread("call", move || {
            let mut end = end;
            let called = caller.call(number, &stop, &Arc::<Tally>::default());
            end.1 = Some(Event::Ended { key, begun, error: called.err() });
        });
    }

    fn is_busy(&self) -> bool {
        self.handing_over || self.calls > 0
    }

    fn thread(&self, name: &str, work: impl FnOnce() + Send + 'static) {
        match std::thread::Builder::new().name(name.to_owned()).spawn(work) {
            Ok(_) => {}
            // What was to be done is dropped, and tells of its end.
            Err(error) => log::error!("event=no-thread error={:?}", error.to_string()),
        }
    }

    fn ended(&mut self, key: &Key, begun: Now, error: Option<Error>) {
        let now = self.now();
        self.calls = self.calls.saturating_sub(1);
        let Some(at) = self.lines.iter().position(|line| line.key == *key) else { return };
        let line = &mut self.lines[at];
        line.calling = false;
        line.unreachable = false;
        let (address, account) = key;
        let good = match &error {
            None => {
                line.network_calls = 0;
                true
            }
            // Somebody else calls: that is as good.
            Some(Error::Busy(text)) => {
                log::info!("event=not-called provider={address} account={account} reason={text:?}");
                true
            }
            Some(_) if self.stop.stopped() => return,
            // The provider is down or busy (450, 451): it is waited for.
            Some(Error::NoHost(text) | Error::Unavailable(text) | Error::Temporary(text)) => {
                log::warn!("event=call-failed provider={address} account={account} error={text:?}");
                line.unreachable = true;
                false
            }
            // It does not let us in, or is not what it should be: somebody must look.
            Some(Error::Denied(text) | Error::Protocol(text) | Error::Config(text) | Error::System(text)) => {
                log::error!("event=call-refused provider={address} account={account} error={text:?}");
                false
            }
        };
        line.diary.called(begun, now, good);
        self.say_when(&self.lines[at]);
    }

    /// A call that failed may go through now; one that is under way may have begun too early, and is waited for.
    fn look_at_network(&mut self) {
        let (now, moment) = (self.now(), Instant::now());
        for line in self.lines.iter_mut().filter(|line| line.network && !line.calling) {
            if line.network_rests.is_some_and(|until| moment < until) {
                continue;
            }
            line.network = false;
            if line.unreachable {
                log::info!("event=network provider={} account={}", line.key.0, line.key.1);
                line.diary.network_is_back(now);
                let rest = BETWEEN_NETWORKS.saturating_mul(2_u32.saturating_pow(line.network_calls));
                line.network_rests = Some(moment + rest.min(GLANCE));
                line.network_calls = line.network_calls.saturating_add(1);
            }
        }
    }

    fn reload(&mut self, load: &dyn Fn() -> Result<Customer, String>, current: &RwLock<Arc<Caller>>) {
        let made = load()
            .and_then(|config| Caller::new(&config, &self.stamps).map_err(|error| error.to_string()))
            .map(Arc::new);
        let caller = match made {
            Ok(caller) => caller,
            Err(error) => {
                return log::error!("event=reload-failed error={error:?} consequence=\"the old configuration holds\"");
            }
        };
        let (old, new) = (self.caller.config(), caller.config());
        let names = |owner: &Owner| (owner.user.clone(), owner.group.clone());
        let visitors = |config: &Customer| (config.limits.connections, config.limits.connections_per_address);
        let listens = |config: &Customer| config.outgoing.as_ref().map(|outgoing| outgoing.listen.clone());
        if listens(old).unwrap_or_default() != listens(new).unwrap_or_default()
            || (old.owner.as_ref().map(names), old.mailboxes.umask)
                != (new.owner.as_ref().map(names), new.mailboxes.umask)
            || old.mailboxes.root != new.mailboxes.root
            || visitors(old) != visitors(new)
        {
            let what = "`listen`, `user`, `group`, `umask`, `root` or a limit of connections has changed";
            log::warn!("event=restart-needed reason={what:?}");
        }
        wake_by(&caller, &self.bell);
        *current.write().unwrap_or_else(PoisonError::into_inner) = caller.clone();
        self.caller = caller;
        log::info!("event=reloaded");
        self.follow();
    }

    /// How long nothing has to be done; `handover`: as far as mail for next hops goes.
    fn pause(&self, handover: Option<Duration>) -> Duration {
        let now = self.now();
        let waiting = self.lines.iter().filter(|line| !line.calling);
        let call = waiting.map(|line| if line.at_once { Duration::ZERO } else { line.diary.left(now) }).min();
        let rests = |line: &Line| line.network_rests.filter(|_| line.network && !line.calling);
        let network = self.lines.iter().filter_map(rests).min();
        let network = network.map(|until| until.saturating_duration_since(Instant::now()));
        [Some(GLANCE), call, handover, network].into_iter().flatten().min().unwrap_or(GLANCE)
    }

    /// How long until mail for a next hop is tried; `None`: there is none, or it is being tried.
    fn until_handover(&self) -> Option<Duration> {
        if self.handing_over {
            return None;
        }
        let due = self.caller.handover_due()?;
        let left = due.duration_since(SystemTime::now()).unwrap_or_default();
        let rest = self.handover_rests.map(|until| until.saturating_duration_since(Instant::now()));
        Some(left.max(rest.unwrap_or_default()))
    }

    fn handed_over(&mut self) {
        self.handing_over = false;
        self.handover_rests = None;
        if self.until_handover() == Some(Duration::ZERO) {
            self.handover_rests = Some(Instant::now() + GLANCE);
        }
    }
}

/// Mail for a next hop that one of our users hands in is tried at once.
fn wake_by(caller: &Caller, bell: &Bell) {
    if let Some(outbox) = caller.outbox() {
        let bell = bell.clone();
        outbox.on_handover(Box::new(move || bell.ring(Event::Handover)));
    }
}

/// Tells the loop that something has ended, also by a panic.
struct AtEnd(Bell, Option<Event>);

impl Drop for AtEnd {
    fn drop(&mut self) {
        if let Some(event) = self.1.take() {
            self.0.ring(event);
        }
    }
}

/// The listeners of `[outgoing]`, a thread each.
struct Listeners {
    threads: Vec<JoinHandle<()>>,
    visitors: Visitors,
    halt: Stop,
}

impl Listeners {
    fn start(bound: Vec<TcpListener>, current: &Arc<RwLock<Arc<Caller>>>, stop: &Stop) -> Result<Listeners, Error> {
        let system = |error: io::Error| Error::System(error.to_string());
        let limits = current.read().unwrap_or_else(PoisonError::into_inner).config().limits.clone();
        let visitors = Visitors::new(limits.connections, limits.connections_per_address);
        let halt = Stop::new().map_err(system)?;
        let mut threads = Vec::new();
        for listener in bound {
            log::info!("listening {LISTENER} {}", listener.local_addr().map_err(system)?);
            let gate = Gate { name: LISTENER, greets: true, stop: stop.clone(), visitors: visitors.clone() };
            let door = Door { current: current.clone(), stop: stop.clone(), halt: halt.clone() };
            let work = move || gate.accept(&listener, Arc::new(move |stream, peer| door.serve(stream, peer)));
            threads.push(std::thread::Builder::new().name(LISTENER.to_owned()).spawn(work).map_err(system)?);
        }
        Ok(Listeners { threads, visitors, halt })
    }

    /// Sessions come to a good end, or to an end, by then. The word to stop has been said.
    fn close(self, end: Instant) {
        for thread in self.threads {
            let _ = thread.join();
        }
        self.visitors.wait_until_gone(end);
        self.halt.stop();
        self.visitors.wait_until_gone(Instant::now() + Duration::from_secs(1));
    }
}

/// Behind it one connection is served.
struct Door {
    current: Arc<RwLock<Arc<Caller>>>,
    stop: Stop,
    halt: Stop,
}

impl Door {
    fn serve(&self, stream: TcpStream, peer: IpAddr) {
        let trace = Trace { id: format!("{LISTENER}-{peer}"), us: 'S', them: 'C' };
        let peer_name = literal(peer);
        let wire = match Wire::new(OwnedFd::from(stream), trace) {
            Ok(wire) => wire,
            Err(error) => return log::warn!("event=no-session peer={peer_name} error={:?}", error.to_string()),
        };
        let caller = self.current.read().unwrap_or_else(PoisonError::into_inner).clone();
        let why = match caller.outbox().filter(|outbox| outbox.config().admits(peer)) {
            Some(outbox) => local::serve(caller.config(), outbox, wire, peer_name.clone(), &self.stop, &self.halt),
            None => turn_away(wire),
        };
        log::info!("event=closed listener={LISTENER} peer={peer_name} reason={why:?}");
    }
}

/// RFC 5321 section 3.1: a server that gives no service says so with 554 in place of its greeting.
fn turn_away(mut wire: Wire) -> String {
    let mut octets = Vec::new();
    Reply::new(554, "5.7.1", "This server is for its own network only").write_to(&mut octets);
    wire.trace.said(octets.trim_ascii_end());
    wire.say(&octets);
    let _ = wire.flush_all(Instant::now() + FAREWELL);
    wire.shutdown();
    "not one of our networks".to_owned()
}
