//! The relay's workers: one attempt at the mail that is due for a destination.

use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::hosts::{HostTable, RouteError};
use crate::config::{ProviderConfig, RelayConfig, TlsPolicy};
use crate::ids::Ids;
use crate::mail::address::Domain;
use crate::net::cancel::CancelToken;
use crate::net::resolver::{MxRoute, Resolver};
use crate::net::tls::{ClientTls, Trust};
use crate::net::trace::quoted;
use crate::provider::spool::{Spool, SpoolQueue};
use crate::queue::{LockError, QueueLock, QueueName, QueuedMessage};
use crate::report::{Attempt, Reporter, Via};
use crate::session::client::{ClientSession, Connect, SessionFailure};
use crate::session::{Remote, Timeouts};
use crate::smtp::client::{Abort, Client, ClientOptions, Rejection, StartTls};
use crate::smtp::reply::{Reply, Severity};
use crate::smtp::status::{DecidedBy, DeliveryResult, RecipientStatus};

/// Addresses tried for one destination in one attempt (RFC 5321 section 5.1 requires at least two).
const ADDRESS_LIMIT: usize = 8;

/// How long the hosts of one destination are tried in one attempt: slow ones must not keep a worker for hours.
const ATTEMPT_DEADLINE: Duration = Duration::from_secs(600);

/// Sessions in a row that a host may end without a decision on any message before it counts as down.
const HANG_UP_LIMIT: usize = 3;

/// How soon a destination is tried again if its queue or its host is busy.
const BUSY_RETRY_DELAY: Duration = Duration::from_secs(2);

/// What all workers share.
pub struct WorkerContext {
    hostname: String,
    pub(super) config: RelayConfig,
    pub(super) timeouts: Timeouts,
    pub(super) spool: Arc<Spool>,
    ids: Ids,
    reporter: Reporter,
    pub(super) smarthost: Option<Remote>,
    unverified_tls: ClientTls,
    /// Loaded if the configuration asks for verified certificates.
    verified_tls: Option<ClientTls>,
    hosts: HostTable,
    /// Each session under way has a clone.
    sessions: Arc<()>,
    pub(super) cancel: CancelToken,
}

/// When a destination is due again; `None`: its queue is empty.
pub(super) struct NextDue {
    pub(super) destination: Domain,
    pub(super) due: Option<SystemTime>,
}

/// Why one mail host has accepted no session, or has lost it before it decided on a message.
struct HostFailure {
    host: Domain,
    /// IP address and port; `-`: the host could not be looked up.
    address: String,
    error: RouteError,
}

impl HostFailure {
    /// Logs a failure that another host has made up for, or that another failure outweighs.
    fn log(&self) {
        let error = match &self.error {
            RouteError::Deferred(reply) | RouteError::Rejected(reply) => reply.to_string(),
            RouteError::Busy => "all connections are in use".to_owned(),
            RouteError::Cancelled => return,
        };
        log::info!("event=host-failed host={} address={} error={}", self.host, self.address, quoted(error));
    }

    /// Which of two failures decides what becomes of the mail; the other one is logged. A host that is only busy will
    /// accept it soon; and if one host is down and another one leads back to this one, the mail must wait for the first.
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

/// Whether every message of an attempt could be settled on disk.
type AllSettled = bool;

impl WorkerContext {
    /// # Errors
    /// The certificates or the smarthost that the configuration names cannot be used.
    pub fn new(
        config: &ProviderConfig, spool: &Arc<Spool>, ids: &Ids, reporter: Reporter, cancel: &CancelToken,
    ) -> Result<WorkerContext, String> {
        let relay = &config.relay;
        let verifies = relay.tls == TlsPolicy::Verify || relay.tls_for.values().any(|tls| *tls == TlsPolicy::Verify);
        Ok(WorkerContext {
            hostname: config.hostname.clone(),
            config: relay.clone(),
            timeouts: config.timeouts.clone(),
            spool: spool.clone(),
            ids: ids.clone(),
            reporter,
            smarthost: relay.smarthost.as_ref().map(Remote::new).transpose()?,
            unverified_tls: ClientTls::new(&Trust::Anyone)?,
            verified_tls: if verifies { Some(ClientTls::new(&Trust::System)?) } else { None },
            hosts: HostTable::default(),
            sessions: Arc::default(),
            cancel: cancel.clone(),
        })
    }

    /// Whether a session is under way.
    pub(super) fn has_sessions(&self) -> bool {
        Arc::strong_count(&self.sessions) > 1
    }

    /// Makes one attempt at all mail that is due for these destinations. Returns when each is due again.
    pub(super) fn work(&self, job: &[Domain]) -> Vec<NextDue> {
        let not_before = catch_unwind(AssertUnwindSafe(|| self.attempt(job))).unwrap_or_else(|_| {
            log::error!("event=panic destination={}", job[0]);
            Some(self.first_retry())
        });
        let next = |domain: &Domain| {
            let due = self.spool.queue().next_due(&self.queue_name(domain));
            let due = due.unwrap_or_else(|_| Some(self.first_retry()));
            NextDue { destination: domain.clone(), due: due.map(|due| not_before.map_or(due, |time| due.max(time))) }
        };
        job.iter().map(next).collect()
    }

    fn queue_name(&self, destination: &Domain) -> QueueName {
        self.spool.name(&SpoolQueue::Outgoing(destination.clone()))
    }

    fn first_retry(&self) -> SystemTime {
        SystemTime::now() + self.config.retry.first
    }

    /// One attempt at all mail that is due for these destinations. `Some`: no other attempt before then.
    fn attempt(&self, destinations: &[Domain]) -> Option<SystemTime> {
        let names: Vec<_> = destinations.iter().map(|domain| self.queue_name(domain)).collect();
        let busy = || Some(SystemTime::now() + BUSY_RETRY_DELAY);
        let mut lock = match self.spool.queue().lock(&names) {
            Ok(lock) => lock,
            Err(LockError::Busy(_)) => return busy(),
            Err(LockError::Failed(error)) => {
                log::error!("event=spool-failed error={}", quoted(error));
                return Some(self.first_retry());
            }
        };
        // Without a message a host would be connected to for nothing.
        if !lock.has_next() {
            return Some(self.first_retry());
        }
        let sent = match &self.smarthost {
            Some(smarthost) => self.by_smarthost(smarthost, &mut lock),
            None => self.by_mx(&destinations[0], &mut lock),
        };
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
        // A message that could not be settled is still due. Without a pause it would be tried again and again.
        (!all_settled).then(|| self.first_retry())
    }

    /// Gives all recipients that are due the same status.
    fn finish_all(&self, lock: &mut QueueLock, status: &RecipientStatus) -> AllSettled {
        let mut all_settled = true;
        while let Some(message) = lock.next_message() {
            let result = DeliveryResult::all(status.clone(), message.envelope.recipients.len(), DecidedBy::Us);
            all_settled &= self.reporter.finish_attempt(message, result, &self.attempt_with("-", None), lock).is_ok();
        }
        all_settled
    }

    /// An attempt in a session with this client; `None`: without a session.
    fn attempt_with<'a>(&'a self, session: &'a str, client: Option<&'a Client>) -> Attempt<'a> {
        let peer = client.and_then(Client::peer_name);
        Attempt {
            session,
            via: if self.smarthost.is_some() { Via::Smarthost } else { Via::Mx },
            relay: peer.unwrap_or("-"),
            peer,
            peer_sends_dsn: client.is_some_and(|client| client.extensions().dsn),
            retry: Some(&self.config.retry),
            give_up: None,
        }
    }

    /// Sends all messages that the lock offers to the host at `address`. A host that ends the session on one message may accept
    /// the others: they are sent in another session.
    ///
    /// # Errors
    /// No session, or the host ended [`HANG_UP_LIMIT`] of them without a decision on any message; then it counts as down.
    fn deliver_to(
        &self, address: &str, lock: &mut QueueLock, connect: impl Fn() -> Result<ClientSession, RouteError>,
    ) -> Result<AllSettled, RouteError> {
        let mut hang_ups = 0;
        loop {
            let (all_settled, lost) = self.deliver(connect()?, lock, address);
            let Some(failure) = lost.filter(|_| all_settled && lock.has_next()) else { return Ok(all_settled) };
            hang_ups += 1;
            if hang_ups == HANG_UP_LIMIT {
                self.hosts.mark_down(address, self.config.retry.first);
                return Err(unreachable(&failure));
            }
        }
    }

    /// Sends all messages that the lock offers in one session. Returns also how it was lost, if it decided on no message.
    fn deliver(
        &self, mut session: ClientSession, lock: &mut QueueLock, address: &str,
    ) -> (AllSettled, Option<SessionFailure>) {
        let _under_way = self.sessions.clone();
        let (mut all_settled, mut decided) = (true, false);
        let id = session.id().to_owned();
        let mut settle = |message: QueuedMessage, result: DeliveryResult, client: &Client, lock: &mut QueueLock| {
            decided |= !result.decided_by.is_connection_loss();
            let attempt = self.attempt_with(&id, Some(client));
            all_settled &= self.reporter.finish_attempt(message, result, &attempt, lock).is_ok();
        };
        match session.send_queue(lock, &mut settle) {
            Ok(()) => session.quit(),
            Err(SessionFailure::Cancelled) => {}
            Err(failure) => {
                log::info!("event=session-lost session={id} host={address} error={}", quoted(&failure));
                return (all_settled, Some(failure).filter(|_| !decided));
            }
        }
        (all_settled, None)
    }

    /// Sends the mail of all destinations to the smarthost.
    fn by_smarthost(&self, smarthost: &Remote, lock: &mut QueueLock) -> Result<AllSettled, RouteError> {
        let address = smarthost.address();
        let _permit = self.hosts.acquire(address, self.config.connections_per_host)?;
        let options = ClientOptions { name: self.hostname.clone(), chunking: true, ..ClientOptions::default() };
        self.deliver_to(address, lock, || match smarthost.connect(&options, &self.connect(&self.ids.session_id())) {
            Ok((session, _)) => Ok(session),
            Err(SessionFailure::Cancelled) => Err(RouteError::Cancelled),
            Err(failure) => {
                self.hosts.mark_down(address, self.config.retry.first);
                Err(unreachable(&failure))
            }
        })
    }

    fn connect<'a>(&'a self, id: &'a str) -> Connect<'a> {
        Connect { id, peer: 'S', tls: None, timeouts: &self.timeouts, cancel: &self.cancel, limit: None }
    }

    /// Sends the mail of one destination to the first of its hosts that accepts a session (RFC 5321 section 5.1).
    fn by_mx(&self, destination: &Domain, lock: &mut QueueLock) -> Result<AllSettled, RouteError> {
        let deferred = |text: String| RouteError::Deferred(Reply::new(451, "4.4.3", text));
        let not_found = |name: &Domain, error| deferred(format!("{name} cannot be looked up: {error}"));
        let resolver = match self.config.resolver {
            Some(server) => Resolver::at(server, &self.ids),
            None => Resolver::system(&self.ids).map_err(|error| deferred(format!("No name server: {error}")))?,
        };
        let route = resolver.route(destination).map_err(|error| not_found(destination, error))?;
        let deadline = Instant::now() + ATTEMPT_DEADLINE;
        let mut tried = 0;
        let mut failure: Option<HostFailure> = None;
        for host in hosts(route, destination, &self.hostname).map_err(RouteError::Rejected)? {
            let addresses = match resolver.addresses(&host) {
                Ok(addresses) => addresses,
                Err(error) => {
                    let error = not_found(&host, error);
                    failure = Some(HostFailure { host, address: "-".to_owned(), error }.or(failure));
                    continue;
                }
            };
            for address in addresses {
                if tried >= ADDRESS_LIMIT || Instant::now() >= deadline {
                    let unreached = || deferred(format!("No mail host of {destination} could be reached"));
                    return Err(failure.map_or_else(unreached, |failure| failure.error));
                }
                tried += 1;
                let address = SocketAddr::new(address, self.config.port);
                match self.by_host(&host, address, self.config.policy(destination), lock) {
                    Ok(all_settled) => {
                        failure.iter().for_each(HostFailure::log);
                        return Ok(all_settled);
                    }
                    Err(RouteError::Cancelled) => return Err(RouteError::Cancelled),
                    Err(error) => {
                        let failed = HostFailure { host: host.clone(), address: address.to_string(), error };
                        failure = Some(failed.or(failure));
                    }
                }
            }
        }
        // Hosts without any address are a permanent error of the domain (RFC 5321 section 5.1).
        let no_address =
            || RouteError::Rejected(Reply::new(550, "5.4.4", format!("No mail host of {destination} has an address")));
        Err(failure.map_or_else(no_address, |failure| failure.error))
    }

    /// Sends all messages that the lock offers to one address of a mail host.
    fn by_host(
        &self, host: &Domain, address: SocketAddr, policy: TlsPolicy, lock: &mut QueueLock,
    ) -> Result<AllSettled, RouteError> {
        let name = address.to_string();
        let _permit = self.hosts.acquire(&name, self.config.connections_per_host)?;
        self.deliver_to(&name, lock, || self.session_with(host, address, policy))
    }

    /// A session with one address of a mail host. If TLS is optional and fails, the relay connects a second time, without TLS.
    fn session_with(&self, host: &Domain, address: SocketAddr, policy: TlsPolicy) -> Result<ClientSession, RouteError> {
        if self.cancel.is_cancelled() {
            return Err(RouteError::Cancelled);
        }
        let tls = match (policy, &self.verified_tls) {
            (TlsPolicy::Verify, Some(tls)) => tls,
            _ => &self.unverified_tls,
        };
        let options = |starttls| ClientOptions {
            name: self.hostname.clone(),
            starttls,
            chunking: true,
            ..ClientOptions::default()
        };
        let required = if policy == TlsPolicy::May { StartTls::Offered } else { StartTls::Required };
        let id = self.ids.session_id();
        let connect = self.connect(&id);
        let mut connected = Connect { tls: Some((tls, host.as_str())), ..connect }.to(address, options(required));
        if policy == TlsPolicy::May && matches!(connected, Err(SessionFailure::Broken(_) | SessionFailure::NoTls(_))) {
            connected = connect.to(address, options(StartTls::Never));
        }
        let session = connected.map_err(|failure| match failure {
            SessionFailure::Cancelled => RouteError::Cancelled,
            // A greeting of 554 or 521 only says that this host accepts no mail. Another host may, so the mail waits.
            // RFC 5321 section 4.5.4.1 permits that.
            SessionFailure::Aborted(Abort::Rejected(Rejection { reply, .. }))
                if reply.severity() == Severity::Transient =>
            {
                RouteError::Deferred(reply)
            }
            failure => {
                if matches!(failure, SessionFailure::Lost(_) | SessionFailure::Unreachable(_)) {
                    self.hosts.mark_down(&address.to_string(), self.config.retry.first);
                }
                unreachable(&failure)
            }
        })?;
        // A host that calls itself by our name is this one: the mail would go in circles.
        if session.client().peer_name().is_some_and(|name| name.eq_ignore_ascii_case(&self.hostname)) {
            session.quit();
            return Err(RouteError::Rejected(Reply::new(554, "5.4.6", "Mail for that domain comes back to this host")));
        }
        Ok(session)
    }
}

/// The hosts that the mail of a domain may go to, the preferred ones first; at least one. `hostname`: ours.
///
/// # Errors
/// The reply that rejects the mail.
fn hosts(route: MxRoute, domain: &Domain, hostname: &str) -> Result<Vec<Domain>, Reply> {
    let hosts = match route {
        // RFC 7505 section 3.
        MxRoute::Null => return Err(Reply::new(556, "5.1.10", format!("{domain} takes no mail (null MX)"))),
        MxRoute::NoDomain => return Err(Reply::new(550, "5.1.2", format!("There is no domain {domain}"))),
        MxRoute::Implicit => return Ok(vec![domain.clone()]),
        MxRoute::Hosts(hosts) => hosts,
    };
    // A host that is not preferred to ours would send the mail back to us (RFC 5321 section 5.1).
    let own = hosts.iter().find(|mx| mx.host.as_str().eq_ignore_ascii_case(hostname)).map(|mx| mx.preference);
    let before = |preference: u16| own.is_none_or(|own| preference < own);
    let hosts: Vec<_> = hosts.into_iter().filter(|mx| before(mx.preference)).map(|mx| mx.host).collect();
    if hosts.is_empty() {
        return Err(Reply::new(554, "5.4.6", format!("This host is the mail host of {domain} and does not hold it")));
    }
    Ok(hosts)
}

/// The session failed; another attempt may succeed.
fn unreachable(failure: &SessionFailure) -> RouteError {
    RouteError::Deferred(Reply::new(451, "4.4.1", failure.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::resolver::MxHost;

    fn domain(name: &str) -> Domain {
        Domain::parse(name).unwrap()
    }

    /// RFC 5321 section 5.1 and RFC 7505, for mail to `example.org` on `relay.example.net`.
    /// Rules: SMTP-71, SMTP-72.
    #[test]
    fn routes_become_hosts_or_a_rejection() {
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
        // Our own name removes itself and all hosts that are not preferred to it.
        let own = (20, "relay.example.net");
        check(mx(&[(10, "a.example"), own, (20, "b.example"), (30, "c.example")]), Ok(&["a.example"]));
        check(mx(&[(20, "b.example"), own]), Err(554));
    }
}
