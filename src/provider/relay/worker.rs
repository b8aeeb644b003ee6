//! The relay's workers: one attempt at the mail that is due for a destination.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::attempts::AttemptPermit;
use super::hosts::{HostTable, RouteError};
use super::order::{AddressOrder, HostAddress};
use crate::config::{ProviderConfig, RelayConfig, TlsPolicy};
use crate::ids::Ids;
use crate::mail::address::{Domain, literal};
use crate::maildir::for_each_block;
use crate::net::cancel::CancelToken;
use crate::net::reserved;
use crate::net::resolver::{MxHost, MxRoute, Resolver, address_for_name};
use crate::net::tls::{ClientTls, Trust, is_certificate_name};
use crate::net::trace::quoted;
use crate::provider::spool::{Spool, SpoolQueue};
use crate::queue::{LockError, QueueDue, QueueLock, QueuedMessage, SharedIndex};
use crate::report::{Attempt, Reporter, Via};
use crate::session::client::{ClientSession, Connect, SessionFailure};
use crate::session::{Remote, Timeouts};
use crate::smtp::client::{Abort, Client, ClientOptions, Rejection, StartTls};
use crate::smtp::command::Recipient;
use crate::smtp::reply::{Reply, Severity};
use crate::smtp::status::{DecidedBy, DeliveryResult, RecipientStatus};
use crate::threads::Guarded;

/// The maximum of addresses of one host in one attempt (RFC 5321 section 5.1 requires at least two).
const ADDRESS_LIMIT: usize = 8;

/// The time until the next attempt at a destination whose queue or host is busy.
const BUSY_RETRY_DELAY: Duration = Duration::from_secs(2);

/// The context that all workers share.
pub struct WorkerContext {
    hostname: String,
    pub(super) config: RelayConfig,
    pub(super) timeouts: Timeouts,
    pub(super) spool: Arc<Spool>,
    ids: Ids,
    pub(super) reporter: Reporter,
    pub(super) smarthost: Option<Remote>,
    unverified_tls: ClientTls,
    /// Loaded if the configuration asks for verified certificates.
    verified_tls: Option<ClientTls>,
    pub(super) hosts: Arc<HostTable>,
    /// The index of the directory with all outgoing mail.
    pub(super) index: Arc<SharedIndex>,
    pub(super) sessions: Arc<SessionsUnderWay>,
    pub(super) cancel: CancelToken,
}

/// Counts the sessions under way: each has a clone of the reference.
#[derive(Default)]
pub(super) struct SessionsUnderWay(pub(super) Arc<()>);

/// When a destination is due again.
pub(super) struct NextDue {
    pub(super) destination: Domain,
    pub(super) due: QueueDue,
}

/// The way of an attempt's mail: by MX, or to the smarthost.
pub(super) struct AttemptRoute<'a> {
    /// The destination, or the smarthost.
    pub(super) name: &'a str,
    pub(super) destinations: &'a [Domain],
    /// The name for which connections count; `None`: each address counts for itself.
    counted_as: Option<&'a str>,
    pub(super) permit: &'a AttemptPermit,
    look_up: &'a (dyn Fn(&Domain) -> Result<Vec<SocketAddr>, RouteError> + Sync),
    pub(super) connect: &'a (dyn Fn(&HostAddress) -> Result<ClientSession, ConnectFailure> + Sync),
}

/// Why there is no session with an address.
pub(super) struct ConnectFailure {
    pub(super) error: RouteError,
    /// The host is down.
    pub(super) down: bool,
}

/// Why there was no session with a mail host, or no session in which it decided on a message.
pub(super) struct HostFailure {
    pub(super) host: String,
    /// IP address and port; `-`: the host could not be resolved.
    pub(super) address: String,
    pub(super) error: RouteError,
}

impl HostFailure {
    /// Logs the failure of a host that does not decide on the mail: another host has accepted it, or another failure decides.
    pub(super) fn log(&self) {
        let error = match &self.error {
            RouteError::Deferred(reply) | RouteError::Rejected(reply) => reply.to_string(),
            RouteError::Busy => "all connections are in use".to_owned(),
            RouteError::Cancelled => return,
        };
        log::info!("event=host-failed host={} address={} error={}", self.host, self.address, quoted(error));
    }

    /// Returns the failure of two that decides on the mail, and logs the other. A busy host decides first, as it will
    /// accept the mail soon. A deferral decides before a rejection: if one host is down and another one is the provider
    /// itself, the mail must wait for the first.
    fn or(self, earlier: Option<HostFailure>) -> HostFailure {
        let rank = |failure: &HostFailure| match failure.error {
            RouteError::Rejected(_) => 0,
            RouteError::Deferred(_) => 1,
            RouteError::Busy | RouteError::Cancelled => 2,
        };
        let Some(earlier) = earlier else { return self };
        let (decides, other) = if rank(&earlier) > rank(&self) { (earlier, self) } else { (self, earlier) };
        other.log();
        decides
    }
}

/// The progress of an attempt in the order of its addresses.
#[derive(Default)]
struct Progress {
    failure: Option<HostFailure>,
    /// For each host, how many of its addresses were tried.
    tried: HashMap<String, usize>,
    /// The addresses that were tried, and the hosts that could not be resolved.
    reached: HashSet<String>,
    /// A limit has left addresses untried.
    cut: bool,
}

impl Progress {
    fn failed(&mut self, host: &str, address: String, error: RouteError) {
        self.failure = Some(HostFailure { host: host.to_owned(), address, error }.or(self.failure.take()));
    }

    /// Records that the attempt skips a host or an address. The failure of another host decides instead, unless it is a
    /// rejection: then the mail waits for the skipped one.
    fn left_out(&mut self, host: &str, address: &str) {
        if self.failure.as_ref().is_none_or(|failure| matches!(failure.error, RouteError::Rejected(_))) {
            let reply = Reply::new(451, "4.4.1", format!("{host} ({address}) was not reachable lately"));
            self.failed(host, address.to_owned(), RouteError::Deferred(reply));
        }
    }
}

/// Whether the results of all messages of an attempt could be recorded on disk.
pub(super) type AllSettled = bool;

impl AttemptRoute<'_> {
    /// The name for which connections to this address count.
    pub(super) fn counted_as(&self, to: &HostAddress) -> String {
        self.counted_as.map_or_else(|| to.address.to_string(), str::to_owned)
    }
}

impl WorkerContext {
    /// The context of a configuration. `earlier`: the context before a reload, whose state of hosts and sessions it shares.
    ///
    /// # Errors
    /// The certificates or the smarthost that the configuration names cannot be used.
    pub fn new(
        config: &ProviderConfig, spool: &Arc<Spool>, ids: &Ids, reporter: Reporter, cancel: &CancelToken,
        earlier: Option<&WorkerContext>,
    ) -> Result<WorkerContext, String> {
        let relay = &config.relay;
        let verifies = relay.tls == TlsPolicy::Verify || relay.tls_for.values().any(|tls| *tls == TlsPolicy::Verify);
        // All sessions of a relay with a smarthost are with one host.
        let per_host = relay.smarthost.as_ref().map_or(usize::MAX, |_| relay.connections_per_host);
        let limit = relay.connections.min(per_host);
        let hosts = earlier.map(|earlier| earlier.hosts.clone()).unwrap_or_default();
        let context = WorkerContext {
            hostname: config.hostname.clone(),
            config: relay.clone(),
            timeouts: config.timeouts.clone(),
            spool: spool.clone(),
            ids: ids.clone(),
            reporter,
            smarthost: relay.smarthost.as_ref().map(Remote::new).transpose().map_err(|error| error.text)?,
            unverified_tls: ClientTls::new(&Trust::Anyone)?,
            verified_tls: if verifies { Some(ClientTls::new(&Trust::System)?) } else { None },
            hosts,
            index: earlier.map(|earlier| earlier.index.clone()).unwrap_or_default(),
            sessions: earlier.map(|earlier| earlier.sessions.clone()).unwrap_or_default(),
            cancel: cancel.clone(),
        };
        // Change the shared limits last, when nothing can fail any more.
        context.hosts.set_limits(limit, relay.connections_per_host, context.smarthost.is_none());
        Ok(context)
    }

    /// Whether a session is under way.
    pub(super) fn has_sessions(&self) -> bool {
        Arc::strong_count(&self.sessions.0) > 1
    }

    /// Makes one attempt at all mail that is due for these destinations. Returns when each is due again.
    pub(super) fn work(&self, job: &[Domain], permit: &AttemptPermit) -> Vec<NextDue> {
        let not_before = catch_unwind(AssertUnwindSafe(|| self.attempt(job, permit))).unwrap_or_else(|_| {
            log::error!("event=panic destination={}", job[0]);
            Some(self.first_retry())
        });
        let next = |domain: &Domain| {
            self.spool.remove_old_destination(domain);
            let due = self.spool.outgoing_due(domain, &self.index);
            if due.as_ref().is_ok_and(|due| due.earliest().is_none()) {
                self.hosts.set_passed(domain.as_str(), HashSet::new());
                self.hosts.forget_slow(domain.as_str());
            }
            let due = due.unwrap_or_else(|_| QueueDue { mail: Some(self.first_retry()), dsn: None });
            NextDue { destination: domain.clone(), due: not_before.map_or(due, |time| due.not_before(time)) }
        };
        job.iter().map(next).collect()
    }

    fn first_retry(&self) -> SystemTime {
        SystemTime::now() + self.config.retry.first
    }

    /// Makes one attempt at all mail that is due for these destinations. `Some`: the next attempt must not be earlier.
    fn attempt(&self, destinations: &[Domain], permit: &AttemptPermit) -> Option<SystemTime> {
        let (held, elsewhere): (Vec<_>, _) = destinations.iter().cloned().partition(|domain| self.spool.holds(domain));
        let all_held = held.iter().filter(|domain| !self.hold(domain)).count() == 0;
        let next = if elsewhere.is_empty() { None } else { self.attempt_elsewhere(&elsewhere, permit) };
        next.or_else(|| (!all_held).then(|| self.first_retry()))
    }

    /// Moves the mail for a domain that now belongs to a customer into the held queue of that domain: this host is its
    /// mail host.
    fn hold(&self, domain: &Domain) -> AllSettled {
        let names = self.spool.outgoing_names(domain);
        let Ok(mut lock) = self.spool.queue().lock_indexed(&names, &self.index) else { return false };
        let attempt = Attempt { via: Via::Held, peer_sends_dsn: true, ..self.attempt_with("-", None) };
        let mut all_settled = true;
        while let Some(mut message) = lock.next_message() {
            let recipients = self.hold_message(domain, &mut message);
            let result = DeliveryResult { recipients, decided_by: DecidedBy::Us };
            all_settled &= self.reporter.finish_attempt(message, result, &attempt, &mut lock).is_ok();
        }
        all_settled
    }

    /// Stores a copy of a message for those of its recipients that would be accepted at RCPT. Returns the status of each
    /// recipient.
    fn hold_message(&self, domain: &Domain, message: &mut QueuedMessage) -> Vec<RecipientStatus> {
        let not_accepted = |reply: Reply| match reply.severity() {
            Severity::Permanent => RecipientStatus::Rejected(reply),
            _ => RecipientStatus::Deferred(reply),
        };
        // The size is checked when the copy is stored.
        let check = |to: &Recipient| self.spool.check_recipient(&to.mailbox, &[], 0).err().map(not_accepted);
        let checked: Vec<_> = message.envelope.recipients.iter().map(check).collect();
        let accepted = message.envelope.recipients.iter().zip(&checked).filter(|(_, reply)| reply.is_none());
        let accepted = accepted.map(|(to, _)| Recipient { mailbox: to.mailbox.canonical(), ..to.clone() });
        let copy = message.with_recipients(accepted.collect());
        let queue = SpoolQueue::Held(domain.clone());
        let stored = match copy.envelope.recipients.is_empty() {
            true => Ok(Vec::new()),
            false => self.spool.begin_incoming(&[(queue.clone(), copy)], "", 0).and_then(|mut writer| {
                for_each_block(message, |octets| writer.write(octets))?;
                writer.commit()
            }),
        };
        let status = match stored {
            Ok(_) => RecipientStatus::Sent(Reply::new(250, "2.0.0", "It is held here for the customer")),
            Err(error) => not_accepted(self.spool.failure_reply(&error, [&queue])),
        };
        checked.into_iter().map(|reply| reply.unwrap_or_else(|| status.clone())).collect()
    }

    fn attempt_elsewhere(&self, destinations: &[Domain], permit: &AttemptPermit) -> Option<SystemTime> {
        let names: Vec<_> = destinations.iter().flat_map(|domain| self.spool.outgoing_names(domain)).collect();
        let busy = || Some(SystemTime::now() + BUSY_RETRY_DELAY);
        let mut lock = match self.spool.queue().lock_indexed(&names, &self.index) {
            Ok(lock) => lock,
            Err(LockError::Busy(_)) => return busy(),
            Err(LockError::Failed(error)) => {
                log::error!("event=spool-failed error={}", quoted(error));
                return Some(self.first_retry());
            }
        };
        // Do not connect to a host if no message is due.
        if !lock.has_next() {
            return Some(self.first_retry());
        }
        let sent = match &self.smarthost {
            Some(smarthost) => self.by_smarthost(smarthost, destinations, permit, &mut lock),
            None => self.by_mx(&destinations[0], permit, &mut lock),
        };
        // If the domain may belong to a customer whose file is skipped, do not reject: the mail is to be held here.
        let skipped = || destinations.iter().find_map(|domain| self.spool.check_not_skipped(domain).err());
        let sent = sent.map_err(|error| match (error, skipped()) {
            (RouteError::Rejected(_), Some(reply)) => RouteError::Deferred(reply),
            (error, _) => error,
        });
        let all_settled = match sent {
            Ok(all_settled) => all_settled,
            Err(RouteError::Cancelled) => true,
            Err(RouteError::Busy) => return busy(),
            Err(RouteError::Deferred(reply)) => {
                for destination in destinations {
                    log::warn!("event=deferred destination={destination} reply={}", quoted(&reply));
                }
                self.finish_all(&mut lock, &RecipientStatus::Deferred(reply))
            }
            Err(RouteError::Rejected(reply)) => {
                for destination in destinations {
                    log::warn!("event=rejected destination={destination} reply={}", quoted(&reply));
                }
                self.finish_all(&mut lock, &RecipientStatus::Rejected(reply))
            }
        };
        // A message whose result could not be recorded is still due: without a pause, it would be sent again and again.
        (!all_settled).then(|| self.first_retry())
    }

    /// Settles all messages that are due, each recipient with the same status.
    fn finish_all(&self, lock: &mut QueueLock, status: &RecipientStatus) -> AllSettled {
        let mut all_settled = true;
        while let Some(message) = lock.next_message() {
            let result = DeliveryResult::all(status.clone(), message.envelope.recipients.len(), DecidedBy::Us);
            all_settled &= self.reporter.finish_attempt(message, result, &self.attempt_with("-", None), lock).is_ok();
        }
        all_settled
    }

    /// The attempt for reports. `client`: that of the session; `None`: there was no session.
    pub(super) fn attempt_with<'a>(&'a self, session: &'a str, client: Option<&'a Client>) -> Attempt<'a> {
        let peer = client.and_then(Client::peer_name);
        Attempt {
            session,
            via: if self.smarthost.is_some() { Via::Smarthost } else { Via::Mx },
            relay: peer.unwrap_or("-"),
            peer,
            peer_sends_dsn: client.is_some_and(|client| client.extensions().dsn),
            retry: Some(&self.config.retry),
            give_up: None,
            expire_after: None,
        }
    }

    /// Sends the mail of all destinations to the smarthost.
    fn by_smarthost(
        &self, smarthost: &Remote, destinations: &[Domain], permit: &AttemptPermit, lock: &mut QueueLock,
    ) -> Result<AllSettled, RouteError> {
        let options = self.client_options(StartTls::Never);
        let addresses = smarthost.addresses(&self.connect("-", permit)).map_err(|failure| match failure {
            SessionFailure::Cancelled => RouteError::Cancelled,
            failure => unreachable(&failure),
        })?;
        let connect = |to: &HostAddress| {
            let options = ClientOptions { nonce: self.ids.nonce(), ..options.clone() };
            let connected = smarthost.connect_to(to.address, &options, &self.connect(&self.ids.session_id(), permit));
            connected.map(|session| session.established(&self.cancel)).map_err(|failure| match failure {
                SessionFailure::Cancelled => ConnectFailure { error: RouteError::Cancelled, down: false },
                failure => ConnectFailure { error: unreachable(&failure), down: true },
            })
        };
        let name = smarthost.address();
        let look_up = &|_: &Domain| Ok(Vec::new());
        let route = AttemptRoute { name, destinations, counted_as: Some(name), permit, look_up, connect: &connect };
        self.by_route(&route, &AddressOrder::of_addresses(smarthost.host(), addresses), lock)
    }

    /// The options that all sessions have in common. A smarthost has its own TLS settings.
    fn client_options(&self, starttls: StartTls) -> ClientOptions {
        ClientOptions {
            name: self.hostname.clone(),
            starttls,
            chunking: true,
            without_8bitmime: self.config.without_8bitmime,
            ..ClientOptions::default()
        }
    }

    fn connect<'a>(&'a self, id: &'a str, permit: &'a AttemptPermit) -> Connect<'a> {
        Connect {
            id,
            peer: 'S',
            tls: None,
            implicit_tls: false,
            timeouts: &self.timeouts,
            cancel: permit.cancel(),
            limit: permit.session_deadline(),
        }
    }

    /// Sends the mail of one destination, and records whether it is slow.
    fn by_mx(
        &self, destination: &Domain, permit: &AttemptPermit, lock: &mut QueueLock,
    ) -> Result<AllSettled, RouteError> {
        let sent = self.by_mx_hosts(destination, permit, lock);
        permit.record_speed(destination.as_str());
        match sent {
            Err(RouteError::Deferred(_)) if self.cancel.is_cancelled() => Err(RouteError::Cancelled),
            Err(RouteError::Deferred(_)) if permit.gave_way() => {
                let text = format!("No mail host of {destination} has answered yet, and other mail waits");
                Err(RouteError::Deferred(Reply::new(451, "4.4.1", text)))
            }
            sent => sent,
        }
    }

    /// Sends the mail of one destination to the first of its hosts that accepts a session (RFC 5321 section 5.1).
    fn by_mx_hosts(
        &self, destination: &Domain, permit: &AttemptPermit, lock: &mut QueueLock,
    ) -> Result<AllSettled, RouteError> {
        let deferred = |text: String| RouteError::Deferred(Reply::new(451, "4.4.3", text));
        let not_found = |name: &Domain, error| deferred(format!("{name} cannot be looked up: {error}"));
        let resolver = match self.config.resolver {
            Some(server) => Resolver::at(server, &self.ids),
            None => Resolver::system(&self.ids).map_err(|error| deferred(format!("No name server: {error}")))?,
        };
        let within = |deadline| resolver.clone().within(deadline, permit.cancel());
        let route = permit.look_up(|deadline| within(deadline).route(destination));
        let route = route.map_err(|error| not_found(destination, error))?;
        let hosts = hosts(route, destination, &self.hostname).map_err(RouteError::Rejected)?;
        let passed_over = Guarded::new(Vec::new());
        let look_up = |host: &Domain| {
            if let Some(address) = address_for_name(host) {
                log::info!("event=mx-is-address destination={destination} host={host} address={address}");
            }
            let found = permit.look_up(|deadline| within(deadline).addresses(host));
            let mut found = found.map_err(|error| not_found(host, error))?;
            found.retain(|address| match self.unusable(*address) {
                None => true,
                Some(reason) => {
                    let address = literal(*address);
                    log::info!(
                        "event=address-passed-over destination={destination} host={host} address={address} reason={}",
                        quoted(reason)
                    );
                    let text = format!("{host} has {address}, which is {reason}");
                    passed_over.lock().push(text);
                    false
                }
            });
            Ok(found.into_iter().map(|address| SocketAddr::new(address, self.config.port)).collect())
        };
        let policy = self.config.policy(destination);
        let connect = |to: &HostAddress| self.session_with(to, policy, permit);
        let (name, destinations) = (destination.as_str(), std::slice::from_ref(destination));
        let (look_up, connect) = (&look_up, &connect);
        let route = AttemptRoute { name, destinations, counted_as: None, permit, look_up, connect };
        let sent = self.by_route(&route, &AddressOrder::of_hosts(hosts), lock);
        let passed_over = passed_over.into_inner();
        match (sent, passed_over.first()) {
            // Do not reject: the owner of the domain may correct the address.
            (Err(RouteError::Rejected(_)), Some(text)) => {
                let text = format!("No mail host of {destination} has an address in the world: {text}");
                Err(RouteError::Deferred(Reply::new(451, "4.4.4", text)))
            }
            (sent, _) => sent,
        }
    }

    /// Why the relay does not connect to this address of an MX host; `None`: it does. The owner of a domain, who
    /// chooses its addresses, must not reach hosts in the networks of this machine.
    fn unusable(&self, address: IpAddr) -> Option<&'static str> {
        if self.config.allow_private {
            return reserved::no_host(address);
        }
        reserved::not_public(address).or_else(|| reserved::is_own(address).then_some("an address of this machine"))
    }

    /// Sends all messages that the lock offers to the first address that accepts a session. If a limit cut off the last
    /// attempts, it skips the addresses that they have tried, so that the end of a long list is reached.
    fn by_route(
        &self, route: &AttemptRoute<'_>, order: &AddressOrder, lock: &mut QueueLock,
    ) -> Result<AllSettled, RouteError> {
        let mut passed = self.hosts.passed(route.name);
        let mut progress = Progress::default();
        let mut sent = self.by_addresses(route, order.clone(), &passed, &mut progress, lock);
        if sent.is_none() && progress.reached.is_empty() && !progress.cut && !passed.is_empty() {
            passed.clear();
            progress = Progress::default();
            sent = self.by_addresses(route, order.clone(), &passed, &mut progress, lock);
        }
        let cut = progress.cut;
        match sent {
            None if cut => {
                passed.extend(progress.reached);
                self.hosts.set_passed(route.name, passed);
            }
            None | Some(Ok(_)) => self.hosts.set_passed(route.name, HashSet::new()),
            Some(Err(_)) => {}
        }
        if let Some(sent) = sent {
            progress.failure.iter().for_each(HostFailure::log);
            return sent;
        }
        let name = route.name;
        Err(match progress.failure {
            Some(HostFailure { error: RouteError::Rejected(_), .. }) | None if cut => {
                RouteError::Deferred(Reply::new(451, "4.4.3", format!("No mail host of {name} could be reached")))
            }
            Some(failure) => failure.error,
            // RFC 5321 section 5.1: hosts without any usable address are a permanent error of the domain.
            None => {
                RouteError::Rejected(Reply::new(550, "5.4.4", format!("No mail host of {name} has a usable address")))
            }
        })
    }

    /// Tries one address after the other, except those in `passed`. `None`: the attempt has failed at each of them.
    fn by_addresses(
        &self, route: &AttemptRoute<'_>, mut order: AddressOrder, passed: &HashSet<String>, progress: &mut Progress,
        lock: &mut QueueLock,
    ) -> Option<Result<AllSettled, RouteError>> {
        let look_up = |host: &Domain, progress: &mut Progress| {
            if route.permit.lookups_are_over() || route.permit.gave_way() {
                progress.cut = true;
                return Vec::new();
            }
            if passed.contains(host.as_str()) {
                progress.left_out(host.as_str(), "-");
                return Vec::new();
            }
            (route.look_up)(host).unwrap_or_else(|error| {
                progress.reached.insert(host.to_string());
                progress.failed(host.as_str(), "-".to_owned(), error);
                Vec::new()
            })
        };
        while let Some(to) = order.next(&mut |host| look_up(host, progress)) {
            let address = to.address.to_string();
            // RFC 5321 section 5.1: the order begins with the most preferred host. A host that is down is skipped, and does
            // not count for the limit of addresses.
            if passed.contains(&address) || self.hosts.is_down(&address) {
                progress.left_out(&to.host, &address);
                continue;
            }
            let tried = progress.tried.entry(to.host.clone()).or_default();
            if *tried >= ADDRESS_LIMIT || Instant::now() >= route.permit.deadline() || route.permit.gave_way() {
                progress.cut = true;
                continue;
            }
            let sent = self.hosts.acquire(&route.counted_as(&to), route.permit.kind()).and_then(|_permit| {
                *tried += 1;
                progress.reached.insert(address.clone());
                self.deliver_to(route, &to, lock)
            });
            match sent {
                Ok(_) | Err(RouteError::Cancelled) => return Some(sent),
                // Wait for this host if a session will end for the attempt: a long queue that has all its connections is not a
                // reason to send the mail to a less preferred host.
                Err(RouteError::Busy) if self.hosts.yields(&route.counted_as(&to)) => return Some(sent),
                Err(error) => progress.failed(&to.host, address, error),
            }
        }
        None
    }

    /// Opens a session with one address of a mail host. If TLS is optional and fails, the relay connects a second time
    /// without TLS.
    fn session_with(
        &self, to: &HostAddress, policy: TlsPolicy, permit: &AttemptPermit,
    ) -> Result<ClientSession, ConnectFailure> {
        let failed = |error| ConnectFailure { error, down: false };
        if self.cancel.is_cancelled() {
            return Err(failed(RouteError::Cancelled));
        }
        let tls = match (policy, &self.verified_tls) {
            (TlsPolicy::Verify, Some(tls)) => tls,
            _ => &self.unverified_tls,
        };
        let required = if policy == TlsPolicy::May { StartTls::Offered } else { StartTls::Required };
        let id = self.ids.session_id();
        let connect = self.connect(&id, permit);
        // An MX record may have a name that no certificate can have, such as an address in brackets.
        let address = to.address.ip().to_string();
        let name = if is_certificate_name(&to.host) { to.host.as_str() } else { &address };
        let mut connected = Connect { tls: Some((tls, name)), ..connect }.to(to.address, self.client_options(required));
        let mut tls_error = None;
        if policy == TlsPolicy::May
            && let Err(failure @ (SessionFailure::Broken(_) | SessionFailure::NoTls(_))) = &connected
        {
            tls_error = Some(failure.to_string());
            connected = connect.to(to.address, self.client_options(StartTls::Never));
        }
        let session = connected.map_err(|failure| match failure {
            SessionFailure::Cancelled if self.cancel.is_cancelled() => failed(RouteError::Cancelled),
            // A greeting of 554 or 521 means that this host accepts no mail. Another host may accept it, so the mail is
            // deferred, as RFC 5321 section 4.5.4.1 permits.
            SessionFailure::Aborted(Abort::Rejected(Rejection { reply, .. }))
                if reply.severity() == Severity::Transient =>
            {
                failed(RouteError::Deferred(reply))
            }
            failure => {
                let down = matches!(failure, SessionFailure::Lost(_) | SessionFailure::Unreachable(_));
                ConnectFailure { error: unreachable(&failure), down }
            }
        })?;
        if !session.is_tls() && session.client().extensions().starttls {
            let error = tls_error.unwrap_or_else(|| "STARTTLS was rejected".to_owned());
            let (host, address) = (&to.host, literal(to.address.ip()));
            log::info!("event=tls-failed session={id} host={host} address={address} error={}", quoted(error));
        }
        // A host that greets with our name is this provider: the mail would loop.
        if session.client().peer_name().is_some_and(|name| name.eq_ignore_ascii_case(&self.hostname)) {
            session.quit();
            let reply = Reply::new(554, "5.4.6", "Mail for that domain comes back to this host");
            return Err(failed(RouteError::Rejected(reply)));
        }
        Ok(session.established(&self.cancel))
    }
}

/// The hosts for the mail of a domain, the preferred ones first; at least one. `hostname`: the provider's.
///
/// # Errors
/// The reply that rejects the mail.
fn hosts(route: MxRoute, domain: &Domain, hostname: &str) -> Result<Vec<MxHost>, Reply> {
    let hosts = match route {
        // RFC 7505 section 3.
        MxRoute::Null => return Err(Reply::new(556, "5.1.10", format!("{domain} accepts no mail (null MX)"))),
        MxRoute::NoDomain => return Err(Reply::new(550, "5.1.2", format!("There is no domain {domain}"))),
        MxRoute::NoHost => {
            return Err(Reply::new(550, "5.1.2", format!("{domain} has neither a mail host nor a usable address")));
        }
        MxRoute::NotDnsName => {
            return Err(Reply::new(550, "5.1.2", format!("{domain} cannot be looked up: DNS has no such names")));
        }
        MxRoute::Implicit => return Ok(vec![MxHost { preference: 0, host: domain.clone() }]),
        MxRoute::Hosts(hosts) => hosts,
    };
    if hosts.is_empty() {
        return Err(Reply::new(554, "5.4.4", format!("The MX records of {domain} name no host")));
    }
    // RFC 5321 section 5.1: if the provider is among the hosts, only hosts that are preferred to it may get the mail. Others
    // would send it back.
    let own = hosts.iter().find(|mx| mx.host.as_str().eq_ignore_ascii_case(hostname)).map(|mx| mx.preference);
    let before = |preference: u16| own.is_none_or(|own| preference < own);
    let hosts: Vec<_> = hosts.into_iter().filter(|mx| before(mx.preference)).collect();
    if hosts.is_empty() {
        return Err(Reply::new(554, "5.4.6", format!("This host is the mail host of {domain} and does not hold it")));
    }
    Ok(hosts)
}

/// The error of a session that failed: another attempt may succeed.
pub(super) fn unreachable(failure: &SessionFailure) -> RouteError {
    RouteError::Deferred(Reply::new(451, "4.4.1", failure.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain(name: &str) -> Domain {
        Domain::parse(name).unwrap()
    }

    /// RFC 5321 section 5.1 and RFC 7505, for mail to `example.org` on `relay.example.net`.
    /// Rules: SMTP-71, SMTP-72.
    #[test]
    fn routes_become_hosts_or_a_rejection() {
        let check = |route, wanted: Result<&[&str], u16>| {
            let found = hosts(route, &domain("example.org"), "Relay.example.net");
            let names = found.map(|hosts| hosts.iter().map(|mx| mx.host.to_string()).collect::<Vec<_>>());
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
        check(MxRoute::NoHost, Err(550));
        check(MxRoute::NotDnsName, Err(550));
        check(mx(&[]), Err(554));
        check(mx(&[(10, "a.example"), (20, "b.example")]), Ok(&["a.example", "b.example"]));
        // The provider's own name removes itself and all hosts that are not preferred to it.
        let own = (20, "relay.example.net");
        check(mx(&[(10, "a.example"), own, (20, "b.example"), (30, "c.example")]), Ok(&["a.example"]));
        check(mx(&[(20, "b.example"), own]), Err(554));
        // The reason must be true: "names no host" differs from "this is the host".
        let text = hosts(mx(&[]), &domain("example.org"), "relay.example.net").unwrap_err().to_string();
        assert_eq!(text, "554 5.4.4 The MX records of example.org name no host");
    }
}
