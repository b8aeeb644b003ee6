//! The relay's workers: one attempt at the mail that is due for a destination.

use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use super::events::{RelayEvent, RelayHandle};
use super::hosts::{HostPermit, HostTable, HostUnavailable};
use crate::config::{ProviderConfig, RelayConfig, TlsPolicy};
use crate::ids::Ids;
use crate::mail::address::Domain;
use crate::net::cancel::CancelToken;
use crate::net::resolver::{MxRoute, Resolver};
use crate::net::tls::{ClientTls, Trust};
use crate::net::trace::quoted;
use crate::provider::spool::{Spool, SpoolQueue};
use crate::queue::{LockError, QueueLock, QueuedMessage};
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

/// How soon a destination is tried again if its queue or its host is busy.
const BUSY_RETRY_DELAY: Duration = Duration::from_secs(2);

/// What all workers share.
pub(super) struct Worker {
    hostname: String,
    config: RelayConfig,
    timeouts: Timeouts,
    spool: Spool,
    ids: Ids,
    reporter: Reporter,
    smarthost: Option<Remote>,
    unverified_tls: ClientTls,
    verified_tls: Option<ClientTls>,
    hosts: HostTable,
    pub(super) active_sessions: AtomicUsize,
    cancel: CancelToken,
}

/// Why there was no session: what that means for the mail that is due.
#[derive(Debug)]
enum RouteError {
    /// Not now, for this reason.
    Later(Reply),
    /// Never, for this reason.
    Never(Reply),
    /// The relay has all its connections to the host in use: soon.
    Busy,
    Cancelled,
}

impl From<(HostUnavailable, &str)> for RouteError {
    fn from((unavailable, address): (HostUnavailable, &str)) -> RouteError {
        match unavailable {
            HostUnavailable::Busy => RouteError::Busy,
            HostUnavailable::Down => {
                RouteError::Later(Reply::new(451, "4.4.1", format!("{address} was not reachable lately")))
            }
        }
    }
}

/// Whether every message of an attempt could be settled on disk.
type AllSettled = bool;

impl Worker {
    pub(super) fn new(
        config: &ProviderConfig, spool: &Spool, ids: &Ids, reporter: Reporter, cancel: &CancelToken,
    ) -> Result<Worker, String> {
        let relay = &config.relay;
        let verifies = relay.tls == TlsPolicy::Verify || relay.tls_for.values().any(|tls| *tls == TlsPolicy::Verify);
        Ok(Worker {
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
            active_sessions: AtomicUsize::new(0),
            cancel: cancel.clone(),
        })
    }

    /// Sessions that may be under way at once.
    pub(super) fn connection_limit(&self) -> usize {
        match &self.smarthost {
            None => self.config.connections,
            Some(_) => self.config.connections.min(self.config.connections_per_host),
        }
    }

    pub(super) fn has_smarthost(&self) -> bool {
        self.smarthost.is_some()
    }

    pub(super) fn spool(&self) -> &Spool {
        &self.spool
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled()
    }

    pub(super) fn shutdown_timeout(&self) -> Duration {
        self.timeouts.shutdown
    }

    pub(super) fn work(&self, job: Vec<Domain>, handle: &RelayHandle) {
        let not_before = catch_unwind(AssertUnwindSafe(|| self.attempt(&job))).unwrap_or_else(|_| {
            log::error!("event=panic destination={}", job[0]);
            Some(self.first_retry())
        });
        let next = |domain: &Domain| {
            let due = self.spool.queue().next_due(&self.spool.name(&SpoolQueue::Outgoing(domain.clone())));
            let due = due.unwrap_or_else(|_| Some(self.first_retry()));
            due.map(|due| not_before.map_or(due, |earliest| due.max(earliest)))
        };
        let done = job.iter().map(|domain| (domain.clone(), next(domain))).collect();
        handle.send(RelayEvent::Done(done));
    }

    fn first_retry(&self) -> SystemTime {
        SystemTime::now() + self.config.retry.first
    }

    /// One attempt at all mail that is due for these destinations. `Some`: no other attempt before then.
    fn attempt(&self, domains: &[Domain]) -> Option<SystemTime> {
        let names: Vec<_> =
            domains.iter().map(|domain| self.spool.name(&SpoolQueue::Outgoing(domain.clone()))).collect();
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
        match lock.next_message() {
            Some(message) => lock.put_back(message),
            None => return Some(self.first_retry()),
        }
        let sent = match &self.smarthost {
            Some(smarthost) => self.by_smarthost(smarthost, &mut lock),
            None => self.by_mx(&domains[0], &mut lock),
        };
        let settled = match sent {
            Ok(settled) => settled,
            Err(RouteError::Cancelled) => true,
            Err(RouteError::Busy) => return busy(),
            Err(RouteError::Later(reply)) => self.finish_all(&mut lock, &RecipientStatus::Deferred(reply)),
            Err(RouteError::Never(reply)) => self.finish_all(&mut lock, &RecipientStatus::Rejected(reply)),
        };
        // A message that could not be settled is still due; it must not be tried again at once.
        (!settled).then(|| self.first_retry())
    }

    /// Gives all recipients that are due the same status.
    fn finish_all(&self, lock: &mut QueueLock, status: &RecipientStatus) -> AllSettled {
        let mut settled = true;
        while let Some(message) = lock.next_message() {
            let result = DeliveryResult::all(status.clone(), message.envelope.recipients.len(), DecidedBy::Us);
            let attempt = self.attempt_with("-", None, false);
            settled &= self.reporter.finish_attempt(message, result, &attempt, lock).is_ok();
        }
        settled
    }

    fn attempt_with<'a>(&'a self, session: &'a str, peer: Option<&'a str>, peer_sends_dsn: bool) -> Attempt<'a> {
        let via = if self.has_smarthost() { Via::Smarthost } else { Via::Mx };
        let relay = peer.unwrap_or("-");
        Attempt { session, via, relay, peer, peer_sends_dsn, retry: Some(&self.config.retry) }
    }

    /// Sends all that the lock offers in one session. `address`: of the host. If it hangs up without a reply about any
    /// message, it counts as down.
    fn deliver(
        &self, mut session: ClientSession, lock: &mut QueueLock, address: &str,
    ) -> Result<AllSettled, RouteError> {
        let _active = ActiveSession::begin(&self.active_sessions);
        let (mut settled, mut answered) = (true, false);
        let id = session.id().to_owned();
        let mut settle = |message: QueuedMessage, result: DeliveryResult, client: &Client, lock: &mut QueueLock| {
            answered |= result.decided_by != DecidedBy::ConnectionLoss;
            let attempt = self.attempt_with(&id, client.peer_name(), client.extensions().dsn);
            settled &= self.reporter.finish_attempt(message, result, &attempt, lock).is_ok();
        };
        match session.send_queue(lock, &mut settle) {
            Ok(()) => session.quit(),
            Err(SessionFailure::Cancelled) => {}
            Err(failure) => {
                log::info!("event=session-lost session={id} host={address} error={}", quoted(&failure));
                if !answered {
                    self.hosts.mark_down(address, self.config.retry.first);
                    return Err(RouteError::Later(unreachable_reply(&failure)));
                }
            }
        }
        Ok(settled)
    }

    /// Sends all mail to one host.
    fn by_smarthost(&self, smarthost: &Remote, lock: &mut QueueLock) -> Result<AllSettled, RouteError> {
        let address = smarthost.address();
        let _permit = self.acquire(address)?;
        let options = ClientOptions { name: self.hostname.clone(), chunking: true, ..ClientOptions::default() };
        match smarthost.connect(&options, &self.connect(&self.ids.session_id())) {
            Ok((session, _)) => self.deliver(session, lock, address),
            Err(SessionFailure::Cancelled) => Err(RouteError::Cancelled),
            Err(failure) => {
                self.hosts.mark_down(address, self.config.retry.first);
                log::warn!("event=host-failed host={address} error={}", quoted(&failure));
                Err(RouteError::Later(unreachable_reply(&failure)))
            }
        }
    }

    fn connect<'a>(&'a self, id: &'a str) -> Connect<'a> {
        let (timeouts, cancel) = (&self.timeouts, &self.cancel);
        Connect { id, peer: 'S', tls: None, timeouts, cancel, limit: None }
    }

    fn acquire<'a>(&'a self, address: &str) -> Result<HostPermit<'a>, RouteError> {
        let permit = self.hosts.acquire(address, self.config.connections_per_host);
        permit.map_err(|unavailable| RouteError::from((unavailable, address)))
    }

    /// Finds a host that accepts the mail of a domain (RFC 5321 section 5.1).
    fn by_mx(&self, domain: &Domain, lock: &mut QueueLock) -> Result<AllSettled, RouteError> {
        let later = |text: String| RouteError::Later(Reply::new(451, "4.4.3", text));
        let resolver = match self.config.resolver {
            Some(server) => Resolver::at(server, &self.ids),
            None => Resolver::system(&self.ids).map_err(|error| later(format!("No name server: {error}")))?,
        };
        let route = resolver.route(domain).map_err(|error| later(format!("{domain} cannot be looked up: {error}")))?;
        let mut last = None;
        // Hosts without any address are an error of the domain's, and no time mends it (RFC 5321 section 5.1).
        let mut hopeless = true;
        let deadline = Instant::now() + ATTEMPT_DEADLINE;
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
                    return Err(RouteError::Cancelled);
                }
                if tried >= ADDRESS_LIMIT || Instant::now() >= deadline {
                    break;
                }
                tried += 1;
                let address = SocketAddr::new(address, self.config.port);
                match self.by_host(&host, address, self.config.policy(domain), lock) {
                    Ok(settled) => return Ok(settled),
                    Err(RouteError::Cancelled) => return Err(RouteError::Cancelled),
                    Err(error) => last = Some(better(last, error)),
                }
            }
        }
        if hopeless {
            last =
                Some(RouteError::Never(Reply::new(550, "5.4.4", format!("No mail host of {domain} has an address"))));
        }
        Err(last.unwrap_or_else(|| later(format!("No mail host of {domain} could be reached"))))
    }

    fn by_host(
        &self, host: &Domain, address: SocketAddr, policy: TlsPolicy, lock: &mut QueueLock,
    ) -> Result<AllSettled, RouteError> {
        let (session, _permit) = self.try_host(host, address, policy)?;
        self.deliver(session, lock, &address.to_string())
    }

    /// Connects to one address; with opportunistic TLS a second time in clear if TLS fails.
    fn try_host(
        &self, host: &Domain, address: SocketAddr, policy: TlsPolicy,
    ) -> Result<(ClientSession, HostPermit<'_>), RouteError> {
        let permit = self.acquire(&address.to_string())?;
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
        let mut result = Connect { tls: Some((tls, host.as_str())), ..connect }.to(address, options(required));
        if policy == TlsPolicy::May && matches!(result, Err(SessionFailure::Broken(_) | SessionFailure::NoTls(_))) {
            result = connect.to(address, options(StartTls::Never));
        }
        let session = match result {
            Ok(session) => session,
            Err(SessionFailure::Cancelled) => return Err(RouteError::Cancelled),
            Err(failure) => {
                if matches!(failure, SessionFailure::Lost(_) | SessionFailure::Unreachable(_)) {
                    self.hosts.mark_down(&address.to_string(), self.config.retry.first);
                }
                log::info!("event=host-failed host={host} address={address} error={}", quoted(&failure));
                return Err(route_error(&failure));
            }
        };
        // A host that calls itself by our name is us: this mail would go in circles.
        if session.client().peer_name().is_some_and(|name| name.eq_ignore_ascii_case(&self.hostname)) {
            session.quit();
            return Err(RouteError::Never(Reply::new(554, "5.4.6", "Mail for that domain comes back to this host")));
        }
        Ok((session, permit))
    }
}

/// The hosts to try, in order. `hostname`: ours.
fn hosts(route: MxRoute, domain: &Domain, hostname: &str) -> Result<Vec<Domain>, Reply> {
    let hosts = match route {
        // RFC 7505 section 3.
        MxRoute::Null => return Err(Reply::new(556, "5.1.10", format!("{domain} takes no mail (null MX)"))),
        MxRoute::NoDomain => return Err(Reply::new(550, "5.1.2", format!("There is no domain {domain}"))),
        MxRoute::Implicit => return Ok(vec![domain.clone()]),
        MxRoute::Hosts(hosts) => hosts,
    };
    // RFC 5321 section 5.1: a host that is not preferred to ours would send the mail back to us.
    let own = hosts.iter().find(|mx| mx.host.as_str().eq_ignore_ascii_case(hostname)).map(|mx| mx.preference);
    let before = |preference: u16| own.is_none_or(|own| preference < own);
    let hosts: Vec<_> = hosts.into_iter().filter(|mx| before(mx.preference)).map(|mx| mx.host).collect();
    if hosts.is_empty() {
        return Err(Reply::new(554, "5.4.6", format!("This host is the mail host of {domain} and does not hold it")));
    }
    Ok(hosts)
}

/// Which of two errors decides. A host that is only busy is the best to wait for, and a host that is down may be the way
/// that one which leads back to us is not.
fn better(last: Option<RouteError>, error: RouteError) -> RouteError {
    match (last, error) {
        (Some(RouteError::Busy), _) | (_, RouteError::Busy) => RouteError::Busy,
        (Some(RouteError::Later(reply)), RouteError::Never(_)) => RouteError::Later(reply),
        (_, error) => error,
    }
}

/// What a failed session means for the mail.
fn route_error(failure: &SessionFailure) -> RouteError {
    match failure {
        // A greeting of 554 or 521 is the host's last word, but another host may accept; so the mail waits (RFC 5321
        // section 4.5.4.1 leaves that open).
        SessionFailure::Aborted(Abort::Rejected(Rejection { reply, .. }))
            if reply.severity() == Severity::Transient =>
        {
            RouteError::Later(reply.clone())
        }
        failure => RouteError::Later(unreachable_reply(failure)),
    }
}

fn unreachable_reply(failure: &SessionFailure) -> Reply {
    Reply::new(451, "4.4.1", failure.to_string())
}

/// A session under way; `Drop` ends it.
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
}
