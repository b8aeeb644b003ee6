//! Outgoing mail of customers, on its way to the world: by MX (RFC 5321 section 5.1) or through a smarthost.
//!
//! ```text
//! arrived ──▶ scheduler: which destination is due? ──▶ channel ──▶ workers: one session a destination
//!                 ▲                                                   │
//!                 └───────────── done, next attempt at … ◀────────────┘
//! ```
//!
//! `SPOOL/outgoing/<domain>/` is a Maildir like any other, held and settled like a customer's mail. The
//! scheduler keeps nothing that is not in the files: when a message is due is its time of modification.
//! One connection carries all that is due for a destination, and a host that is down is left alone for a
//! while, whoever has mail for it.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use super::StartError;
use crate::config::{self, Timeouts, TlsPolicy};
use crate::ids::Ids;
use crate::mail::address::Domain;
use crate::net::connection::CancelToken;
use crate::net::resolver::{MxRoute, Resolver};
use crate::net::tls::{self, ClientTls, Trust};
use crate::queue::{LockError, Queue, QueueLock, QueueName, QueuedMessage};
use crate::report::{Attempt, Peer, Reporter};
use crate::session::client::{ClientSession, Remote, SessionFailure, connect};
use crate::smtp::client::{Abort, Client, ClientOptions, DecidedBy, DeliveryResult, RecipientStatus, StartTls};
use crate::smtp::reply::{Reply, Severity};

/// Addresses tried for one destination in one attempt (RFC 5321 section 5.1 asks for two at least).
const ADDRESS_LIMIT: usize = 8;

/// How often the folders are looked through for mail that another process (inetd mode) has put there.
const RESCAN_INTERVAL: Duration = Duration::from_secs(300);

/// How long hosts of one destination are tried in one attempt: slow ones shall not keep a worker for hours.
const ATTEMPT_DEADLINE: Duration = Duration::from_secs(600);

/// How long new mail waits for more of it: what comes in one call shall go in one session.
const GATHER_DELAY: Duration = Duration::from_millis(200);

/// How soon a destination is looked at again when its mail or its host is busy.
const BUSY_RETRY_DELAY: Duration = Duration::from_secs(2);

enum RelayEvent {
    /// New mail for these destinations.
    Arrived(Vec<Domain>),
    /// A worker is done with these destinations, and when each is due again.
    Done(Vec<(Domain, Option<SystemTime>)>),
    /// Look whether it is time to stop.
    Wake,
}

/// Tells the relay of new mail.
#[derive(Clone)]
pub struct RelayHandle(Sender<RelayEvent>);

impl RelayHandle {
    pub fn arrived(&self, places: &[QueueName]) {
        let domains = places.iter().filter_map(|place| match place {
            QueueName::Destination(domain) => Some(domain.clone()),
            _ => None,
        });
        let domains: Vec<_> = domains.collect();
        if !domains.is_empty() {
            // Without a relay (inetd mode) the mail waits for the one that is started next.
            let _ = self.0.send(RelayEvent::Arrived(domains));
        }
    }

    pub fn wake(&self) {
        let _ = self.0.send(RelayEvent::Wake);
    }
}

/// The two ends of the relay's events.
pub struct RelayEvents(Receiver<RelayEvent>);

pub fn channel() -> (RelayHandle, RelayEvents) {
    let (sender, receiver) = crossbeam_channel::unbounded();
    (RelayHandle(sender), RelayEvents(receiver))
}

/// The scheduler.
pub struct Relay {
    worker: Arc<Worker>,
    handle: RelayHandle,
    events: Receiver<RelayEvent>,
}

impl Relay {
    pub fn new(
        config: &config::ProviderConfig,
        queue: &Queue,
        ids: &Ids,
        reporter: Reporter,
        (handle, events): (RelayHandle, RelayEvents),
        cancel: &CancelToken,
    ) -> Result<Relay, StartError> {
        let tls = |trust: &Trust| tls::client_config(trust).map_err(StartError::Config);
        let relay = &config.relay;
        let smarthost = match &relay.smarthost {
            None => None,
            Some(smarthost) => Some(Remote::new(smarthost).map_err(StartError::Config)?),
        };
        let verifies = relay.tls == TlsPolicy::Verify || relay.tls_for.values().any(|tls| *tls == TlsPolicy::Verify);
        let worker = Worker {
            hostname: config.hostname.clone(),
            config: relay.clone(),
            timeouts: config.timeouts.clone(),
            queue: queue.clone(),
            ids: ids.clone(),
            reporter,
            smarthost,
            unverified_tls: tls(&Trust::Anyone)?,
            verified_tls: if verifies { Some(tls(&Trust::System)?) } else { None },
            hosts: HostTable::default(),
            active_sessions: AtomicUsize::new(0),
            cancel: cancel.clone(),
        };
        Ok(Relay { worker: Arc::new(worker), handle, events: events.0 })
    }

    /// Runs until it is told to stop; then waits a while for what is under way, which ends at its next wait.
    pub fn run(self) {
        let config = &self.worker.config;
        let limit = match &self.worker.smarthost {
            None => config.connections,
            Some(_) => config.connections.min(config.connections_per_host),
        };
        let (jobs, waiting) = crossbeam_channel::unbounded::<Vec<Domain>>();
        let mut workers = 0;
        let mut calendar = DestinationTable::default();
        calendar.read(&self.worker.queue);
        let mut read = Instant::now();
        let mut under_way = 0;
        while !self.worker.cancel.is_cancelled() {
            if read.elapsed() >= RESCAN_INTERVAL {
                calendar.read(&self.worker.queue);
                read = Instant::now();
            }
            while under_way < limit
                && let Some(job) = calendar.take_due(SystemTime::now(), self.worker.smarthost.is_some())
            {
                under_way += 1;
                if under_way > workers {
                    let (worker, handle, waiting) = (self.worker.clone(), self.handle.clone(), waiting.clone());
                    match std::thread::Builder::new().name("relay".to_owned()).spawn(move || {
                        waiting.iter().for_each(|job| worker.work(job, &handle));
                    }) {
                        Ok(_) => workers += 1,
                        Err(error) => log::error!("event=no-thread error={:?}", error.to_string()),
                    }
                }
                let _ = jobs.send(job);
            }
            let pause = if under_way < limit { calendar.pause(SystemTime::now()) } else { RESCAN_INTERVAL };
            match self.events.recv_timeout(pause) {
                Ok(RelayEvent::Arrived(domains)) => domains.into_iter().for_each(|domain| calendar.arrived(domain)),
                Ok(RelayEvent::Done(destinations)) => {
                    under_way -= 1;
                    destinations.into_iter().for_each(|(domain, due)| calendar.done(domain, due));
                }
                Ok(RelayEvent::Wake) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        // Sessions end behind their message. Who waits for a name server or a host that does not answer is not
        // waited for: nothing is lost by that.
        drop(jobs);
        let deadline = Instant::now() + self.worker.timeouts.shutdown;
        while self.worker.active_sessions.load(Ordering::SeqCst) > 0
            && !matches!(self.events.recv_deadline(deadline), Err(RecvTimeoutError::Timeout))
        {}
    }
}

/// Which destination is due when.
#[derive(Default)]
struct DestinationTable {
    destinations: HashMap<Domain, DestinationState>,
}

#[derive(Clone, Copy)]
enum DestinationState {
    Due(SystemTime),
    /// A worker has it; `true`: more mail has arrived meanwhile.
    Busy(bool),
}

impl DestinationState {
    fn time(&self) -> Option<SystemTime> {
        match self {
            DestinationState::Due(due) => Some(*due),
            DestinationState::Busy(_) => None,
        }
    }
}

impl DestinationTable {
    /// What the files say of destinations that are not known yet.
    fn read(&mut self, queue: &Queue) {
        let destinations = queue.destinations().unwrap_or_else(|error| {
            log::error!("event=spool-failed error={:?}", error.to_string());
            Vec::new()
        });
        for domain in
            destinations.into_iter().filter(|domain| !self.destinations.contains_key(domain)).collect::<Vec<_>>()
        {
            match queue.next_due(&QueueName::Destination(domain.clone())) {
                Ok(due) => self.done(domain, due),
                Err(error) => log::error!("event=spool-failed domain={domain} error={:?}", error.to_string()),
            }
        }
    }

    fn arrived(&mut self, domain: Domain) {
        let soon = SystemTime::now() + GATHER_DELAY;
        let date = self.destinations.entry(domain).or_insert(DestinationState::Due(soon));
        *date = match *date {
            DestinationState::Busy(_) => DestinationState::Busy(true),
            DestinationState::Due(due) => DestinationState::Due(due.min(soon)),
        };
    }

    fn done(&mut self, domain: Domain, due: Option<SystemTime>) {
        let arrived = matches!(self.destinations.get(&domain), Some(DestinationState::Busy(true)));
        let soon = arrived.then(|| SystemTime::now() + GATHER_DELAY);
        match due.into_iter().chain(soon).min() {
            Some(due) => self.destinations.insert(domain, DestinationState::Due(due)),
            None => self.destinations.remove(&domain),
        };
    }

    /// The next job: a destination that is due, or all of them where they have one way (`together`).
    fn take_due(&mut self, now: SystemTime, together: bool) -> Option<Vec<Domain>> {
        let is_due = |date: &DestinationState| matches!(date, DestinationState::Due(due) if *due <= now);
        let due = self.destinations.iter().filter(|(_, date)| is_due(date));
        let job: Vec<_> = match together {
            true => due.map(|(domain, _)| domain.clone()).collect(),
            // Who has waited longest comes first.
            false => due.min_by_key(|(_, date)| date.time()).map(|(domain, _)| domain.clone()).into_iter().collect(),
        };
        for domain in &job {
            self.destinations.insert(domain.clone(), DestinationState::Busy(false));
        }
        (!job.is_empty()).then_some(job)
    }

    /// How long nothing is due.
    fn pause(&self, now: SystemTime) -> Duration {
        let next = self.destinations.values().filter_map(|date| match date {
            DestinationState::Due(due) => Some(due.duration_since(now).unwrap_or_default()),
            DestinationState::Busy(_) => None,
        });
        next.min().map_or(RESCAN_INTERVAL, |next| next.min(RESCAN_INTERVAL)) + Duration::from_millis(1)
    }
}

/// What all workers share.
struct Worker {
    hostname: String,
    config: config::RelayConfig,
    timeouts: Timeouts,
    queue: Queue,
    ids: Ids,
    reporter: Reporter,
    smarthost: Option<Remote>,
    unverified_tls: ClientTls,
    verified_tls: Option<ClientTls>,
    hosts: HostTable,
    /// Sessions under way.
    active_sessions: AtomicUsize,
    cancel: CancelToken,
}

/// Why no session came about: what it means for the mail that is due.
enum RouteError {
    /// Not now, for this reason.
    Later(Reply),
    /// Never, for this reason.
    Never(Reply),
    /// All the host's connections are taken by others: soon.
    Busy,
    Stopped,
}

impl Worker {
    fn work(&self, job: Vec<Domain>, handle: &RelayHandle) {
        let due = catch_unwind(AssertUnwindSafe(|| self.attempt(&job))).unwrap_or_else(|_| {
            log::error!("event=panic destination={}", job[0]);
            Some(SystemTime::now() + self.config.retry.first)
        });
        let next = |domain: &Domain| {
            let files = self.queue.next_due(&QueueName::Destination(domain.clone()));
            let files = files.unwrap_or_else(|_| Some(SystemTime::now() + self.config.retry.first));
            files.map(|files| due.map_or(files, |due| due.max(files)))
        };
        let done = job.iter().map(|domain| (domain.clone(), next(domain))).collect();
        let _ = handle.0.send(RelayEvent::Done(done));
    }

    /// One attempt at all that is due for these destinations. `Some`: not before then.
    fn attempt(&self, domains: &[Domain]) -> Option<SystemTime> {
        let places: Vec<_> = domains.iter().cloned().map(QueueName::Destination).collect();
        let mut lock = match self.queue.lock(&places) {
            Ok(lock) => lock,
            Err(LockError::Busy(_)) => return Some(SystemTime::now() + BUSY_RETRY_DELAY),
            Err(LockError::Failed(error)) => {
                log::error!("event=spool-failed error={:?}", error.to_string());
                return Some(SystemTime::now() + self.config.retry.first);
            }
        };
        // Files that are nobody's mail are no reason to disturb a host.
        if !lock.has_message() {
            return Some(SystemTime::now() + self.config.retry.first);
        }
        let delivered = match &self.smarthost {
            Some(smarthost) => self.by_smarthost(smarthost, &mut lock),
            None => self.by_mx(&domains[0], &mut lock),
        };
        let settled = match delivered {
            Ok(settled) => settled,
            Err(RouteError::Stopped) => true,
            Err(RouteError::Busy) => return Some(SystemTime::now() + BUSY_RETRY_DELAY),
            Err(RouteError::Later(reply)) => self.finish_all(&mut lock, &RecipientStatus::Deferred(reply)),
            Err(RouteError::Never(reply)) => self.finish_all(&mut lock, &RecipientStatus::Rejected(reply)),
        };
        // What could not be kept on disk is due as it was before: not at once again.
        (!settled).then(|| SystemTime::now() + self.config.retry.first)
    }

    /// The same fate for all that is due; `false`: not all of it could be kept.
    fn finish_all(&self, lock: &mut QueueLock, status: &RecipientStatus) -> bool {
        let mut settled = true;
        while let Some(message) = lock.next_message() {
            let statuses = vec![status.clone(); message.envelope.recipients.len()];
            settled &= self.finish_attempt(
                message,
                DeliveryResult { recipients: statuses, decided_by: DecidedBy::Us },
                Peer::default(),
                lock,
            );
        }
        settled
    }

    /// All that the hold offers, in one session; `false`: not all outcomes could be kept. `address`: of a host
    /// that goes without a word on any message, and is as good as down then.
    fn deliver(&self, mut session: ClientSession, lock: &mut QueueLock, address: &str) -> Result<bool, RouteError> {
        let _talk = ActiveSession::begin(&self.active_sessions);
        let (mut settled, mut answered) = (true, false);
        let mut settle = |message: QueuedMessage, result: DeliveryResult, client: &Client, lock: &mut QueueLock| {
            let peer = Peer { name: client.peer_name(), dsn: client.offered().dsn };
            answered |= result.decided_by != DecidedBy::ConnectionLoss;
            settled &= self.finish_attempt(message, result, peer, lock);
        };
        match session.send_queue(lock, &mut settle) {
            Ok(()) => session.quit(),
            Err(SessionFailure::Cancelled) => {}
            Err(failure) => {
                log::info!("event=relay-cut-short host={address} error={:?}", failure.to_string());
                if !answered {
                    self.hosts.mark_down(address, self.config.retry.first);
                    return Err(RouteError::Later(unreachable_host(&failure)));
                }
            }
        }
        Ok(settled)
    }

    fn finish_attempt(
        &self,
        message: QueuedMessage,
        result: DeliveryResult,
        peer: Peer<'_>,
        lock: &mut QueueLock,
    ) -> bool {
        let context = format!("host={}", peer.name.unwrap_or("-"));
        let attempt = Attempt { peer, retry: Some(&self.config.retry), done: "relayed", context: &context };
        self.reporter.finish_attempt(message, result, &attempt, lock).is_ok()
    }

    /// All to one host.
    fn by_smarthost(&self, smarthost: &Remote, lock: &mut QueueLock) -> Result<bool, RouteError> {
        let address = smarthost.address();
        let guest = self.hosts.enter(address, self.config.connections_per_host)?;
        match smarthost.connect(&self.hostname, &self.timeouts, &self.cancel) {
            Ok(session) => {
                let settled = self.deliver(session, lock, address);
                drop(guest);
                settled
            }
            Err(SessionFailure::Cancelled) => Err(RouteError::Stopped),
            Err(failure) => {
                self.hosts.mark_down(address, self.config.retry.first);
                log::warn!("event=host-failed host={address} error={:?}", failure.to_string());
                Err(RouteError::Later(unreachable_host(&failure)))
            }
        }
    }

    /// Finds a host that takes the mail of a domain (RFC 5321 section 5.1).
    fn by_mx(&self, domain: &Domain, lock: &mut QueueLock) -> Result<bool, RouteError> {
        let later = |text: String| RouteError::Later(Reply::new(451, "4.4.3", text));
        let resolver = match self.config.resolver {
            Some(server) => Resolver::at(server, &self.ids),
            None => Resolver::system(&self.ids).map_err(|error| later(format!("No name server: {error}")))?,
        };
        let route = resolver.route(domain).map_err(|error| later(format!("{domain} cannot be looked up: {error}")))?;
        let policy = self.config.policy(domain);
        let mut last = None;
        // Hosts without any address are an error of the domain's, and no time mends it (RFC 5321 section 5.1).
        let mut hopeless = true;
        let patience = Instant::now() + ATTEMPT_DEADLINE;
        let mut tried = 0;
        for host in hosts(route, domain, &self.hostname).map_err(RouteError::Never)? {
            let addresses = match resolver.addresses(&host) {
                Ok(addresses) => addresses,
                Err(error) => {
                    hopeless = false;
                    last = Some(later(format!("{host} cannot be looked up: {error}")));
                    continue;
                }
            };
            hopeless &= addresses.is_empty();
            for address in addresses {
                if self.cancel.is_cancelled() {
                    return Err(RouteError::Stopped);
                }
                if tried >= ADDRESS_LIMIT || Instant::now() >= patience {
                    break;
                }
                tried += 1;
                let obstacle = match self.try_host(&host, address, policy) {
                    Ok((session, guest)) => {
                        let address = SocketAddr::new(address, self.config.port).to_string();
                        let delivered = self.deliver(session, lock, &address);
                        drop(guest);
                        match delivered {
                            Ok(settled) => return Ok(settled),
                            Err(obstacle) => obstacle,
                        }
                    }
                    Err(obstacle) => obstacle,
                };
                last = match (last, obstacle) {
                    (_, RouteError::Stopped) => return Err(RouteError::Stopped),
                    // A host that is only busy is the best that can be waited for, and one that is down may be
                    // the way that a host which leads back to us is not.
                    (Some(RouteError::Busy), _) | (_, RouteError::Busy) => Some(RouteError::Busy),
                    (Some(RouteError::Later(reply)), RouteError::Never(_)) => Some(RouteError::Later(reply)),
                    (_, obstacle) => Some(obstacle),
                };
            }
        }
        if hopeless {
            last =
                Some(RouteError::Never(Reply::new(550, "5.4.4", format!("No mail host of {domain} has an address"))));
        }
        Err(last.unwrap_or_else(|| later(format!("No mail host of {domain} could be reached"))))
    }

    /// One address; with opportunistic TLS a second time in clear when TLS fails.
    fn try_host(
        &self,
        host: &Domain,
        address: IpAddr,
        policy: TlsPolicy,
    ) -> Result<(ClientSession, HostPermit<'_>), RouteError> {
        let address = SocketAddr::new(address, self.config.port);
        let guest = self.hosts.enter(&address.to_string(), self.config.connections_per_host)?;
        let tls = match (policy, &self.verified_tls) {
            (TlsPolicy::Verify, Some(tls)) => tls,
            _ => &self.unverified_tls,
        };
        let options = |starttls| ClientOptions {
            name: self.hostname.clone(),
            starttls,
            tls: false,
            chunking: true,
            ..ClientOptions::default()
        };
        let required = if policy == TlsPolicy::May { StartTls::Offered } else { StartTls::Required };
        let tls = Some((tls, host.as_str()));
        let mut result = connect(address, options(required), tls, &self.timeouts, &self.cancel, None);
        if policy == TlsPolicy::May && matches!(result, Err(SessionFailure::Broken(_) | SessionFailure::NoTls(_))) {
            result = connect(address, options(StartTls::Never), None, &self.timeouts, &self.cancel, None);
        }
        let session = match result {
            Ok(session) => session,
            Err(SessionFailure::Cancelled) => return Err(RouteError::Stopped),
            Err(failure) => {
                if matches!(failure, SessionFailure::Lost(_)) {
                    self.hosts.mark_down(&address.to_string(), self.config.retry.first);
                }
                log::info!("event=host-failed host={host} address={address} error={:?}", failure.to_string());
                return Err(route_error(&failure));
            }
        };
        // A host that calls itself by our name is us: this mail would go in circles.
        if session.client().peer_name().is_some_and(|name| name.eq_ignore_ascii_case(&self.hostname)) {
            session.quit();
            return Err(RouteError::Never(Reply::new(554, "5.4.6", "Mail for that domain comes back to this host")));
        }
        Ok((session, guest))
    }
}

/// The hosts to try, in order.
fn hosts(route: MxRoute, domain: &Domain, hostname: &str) -> Result<Vec<Domain>, Reply> {
    let hops = match route {
        // RFC 7505 section 3.
        MxRoute::Null => return Err(Reply::new(556, "5.1.10", format!("{domain} takes no mail (null MX)"))),
        MxRoute::NoDomain => return Err(Reply::new(550, "5.1.2", format!("There is no domain {domain}"))),
        MxRoute::Implicit => return Ok(vec![domain.clone()]),
        MxRoute::Hosts(hops) => hops,
    };
    // RFC 5321 section 5.1: we are no way to the domain, and whoever is less preferred than we are would
    // send the mail back to us.
    let own = hops.iter().find(|hop| hop.host.as_str().eq_ignore_ascii_case(hostname)).map(|hop| hop.preference);
    let before = |preference: u16| own.is_none_or(|own| preference < own);
    let hosts: Vec<_> = hops.into_iter().filter(|hop| before(hop.preference)).map(|hop| hop.host).collect();
    if hosts.is_empty() {
        return Err(Reply::new(554, "5.4.6", format!("This host is the mail host of {domain} and does not hold it")));
    }
    Ok(hosts)
}

/// What a failed conversation means for the mail.
fn route_error(failure: &SessionFailure) -> RouteError {
    match failure {
        // A greeting of 554 or 521 is the host's last word, but another host may speak otherwise; so the
        // mail waits (RFC 5321 section 4.5.4.1 leaves it to us).
        SessionFailure::Aborted(Abort::Rejected { reply, .. }) if reply.severity() == Severity::Transient => {
            RouteError::Later(reply.clone())
        }
        failure => RouteError::Later(unreachable_host(failure)),
    }
}

fn unreachable_host(failure: &SessionFailure) -> Reply {
    Reply::new(451, "4.4.1", failure.to_string())
}

/// A session under way, ended by `Drop`.
struct ActiveSession<'a>(&'a AtomicUsize);

impl ActiveSession<'_> {
    fn begin(count: &AtomicUsize) -> ActiveSession<'_> {
        count.fetch_add(1, Ordering::SeqCst);
        ActiveSession(count)
    }
}

impl Drop for ActiveSession<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The hosts of the world, as far as we have to do with them.
#[derive(Default)]
struct HostTable {
    state: Mutex<HashMap<String, HostState>>,
}

#[derive(Default)]
struct HostState {
    connections: usize,
    down_until: Option<Instant>,
}

impl HostTable {
    /// One connection more to a host, unless it is known to be down or has enough of us.
    fn enter(&self, address: &str, limit: usize) -> Result<HostPermit<'_>, RouteError> {
        let mut state = self.lock();
        let host = state.entry(address.to_owned()).or_default();
        if host.down_until.is_some_and(|until| until > Instant::now()) {
            return Err(RouteError::Later(Reply::new(451, "4.4.1", format!("{address} was not reachable lately"))));
        }
        if host.connections >= limit {
            return Err(RouteError::Busy);
        }
        host.connections += 1;
        Ok(HostPermit { hosts: self, address: address.to_owned() })
    }

    fn mark_down(&self, address: &str, pause: Duration) {
        let mut state = self.lock();
        // Those that have been left alone long enough are forgotten.
        state.retain(|_, host| host.connections > 0 || host.down_until.is_some_and(|until| until > Instant::now()));
        state.entry(address.to_owned()).or_default().down_until = Some(Instant::now() + pause.mul_f32(0.8));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, HostState>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection to a host, ended by `Drop`.
struct HostPermit<'a> {
    hosts: &'a HostTable,
    address: String,
}

impl Drop for HostPermit<'_> {
    fn drop(&mut self) {
        if let Some(host) = self.hosts.lock().get_mut(&self.address) {
            host.connections = host.connections.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::resolver::MxHost;

    fn domain(name: &str) -> Domain {
        Domain::parse(name).unwrap()
    }

    /// RFC 5321 section 5.1 and RFC 7505, for mail to `example.org` on `relay.example.net`.
    #[test]
    fn routes_become_hosts_or_a_refusal() {
        let check = |route, wanted: Result<&[&str], u16>| {
            let found = hosts(route, &domain("example.org"), "Relay.example.net");
            let names = found.map(|hosts| hosts.iter().map(Domain::to_string).collect::<Vec<_>>());
            let wanted = wanted.map(|names| names.iter().map(|name| (*name).to_owned()).collect());
            assert_eq!(names.map_err(|reply| reply.code()), wanted);
        };
        let mx = |hops: &[(u16, &str)]| {
            MxRoute::Hosts(
                hops.iter().map(|(preference, host)| MxHost { preference: *preference, host: domain(host) }).collect(),
            )
        };
        check(MxRoute::Implicit, Ok(&["example.org"]));
        check(MxRoute::Null, Err(556));
        check(MxRoute::NoDomain, Err(550));
        check(mx(&[]), Err(554));
        check(mx(&[(10, "a.example"), (20, "b.example")]), Ok(&["a.example", "b.example"]));
        // Our own name cuts the tail, and what is as preferred as we are goes with it.
        let own = (20, "relay.example.net");
        check(mx(&[(10, "a.example"), own, (20, "b.example"), (30, "c.example")]), Ok(&["a.example"]));
        check(mx(&[(20, "b.example"), own]), Err(554));
    }

    #[test]
    fn the_calendar_gives_each_destination_to_one_worker() {
        let (now, a, b) = (SystemTime::now(), domain("a.example"), domain("b.example"));
        let later = now + Duration::from_secs(60);
        let mut calendar = DestinationTable::default();
        assert_eq!(calendar.take_due(now, false), None);
        calendar.arrived(a.clone());
        let soon = now + Duration::from_secs(1);
        assert_eq!(calendar.take_due(soon, false), Some(vec![a.clone()]));
        // While a worker has it, more mail makes it due again at once, but not twice.
        calendar.arrived(a.clone());
        assert_eq!(calendar.take_due(soon, false), None);
        calendar.done(a.clone(), Some(later));
        assert_eq!(calendar.take_due(soon, false), Some(vec![a.clone()]));
        calendar.done(a.clone(), Some(later));
        assert_eq!(calendar.take_due(soon, false), None);
        assert!(calendar.pause(now) <= Duration::from_secs(61));
        assert_eq!(calendar.take_due(later, false), Some(vec![a.clone()]));
        calendar.done(a.clone(), None);
        assert!(calendar.destinations.is_empty());
        // One way for all: one job for all.
        calendar.arrived(a.clone());
        calendar.arrived(b.clone());
        let mut job = calendar.take_due(soon, true).unwrap();
        job.sort();
        assert_eq!(job, [a, b]);
    }

    #[test]
    fn hosts_have_limits_and_are_left_alone_when_down() {
        let hosts = HostTable::default();
        let address = "127.0.0.2:25";
        let guest = hosts.enter(address, 1).ok().unwrap();
        assert!(matches!(hosts.enter(address, 1), Err(RouteError::Busy)));
        drop(guest);
        assert!(hosts.enter(address, 1).is_ok());
        hosts.mark_down(address, Duration::from_secs(60));
        assert!(matches!(hosts.enter(address, 1), Err(RouteError::Later(_))));
    }
}
