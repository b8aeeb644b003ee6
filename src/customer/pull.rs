//! One call: dial, TLS, AUTH, ATRN, the turn, and mail until the provider says QUIT.
//!
//! 453 ("you have no mail") is a success. After the 250 to ATRN nothing but the greeting is said, and what
//! follows is an ordinary SMTP server session whose client is the provider (RFC 2645 section 5.3).

use std::fmt;
use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use super::counters::{CallCounters, Summary};
use super::mailboxes::Mailboxes;
use super::next_hop::{NextHops, RetryQueue};
use super::outbox::Outbox;
use super::receiver::Receiver;
use crate::config::{CustomerConfig, ProviderAccount, TlsMode};
use crate::ids::Ids;
use crate::mail::address::Domain;
use crate::net::connection::{self, CancelToken, Connection, Trace};
use crate::net::tls::ClientTls;
use crate::recipients;
use crate::report::Reporter;
use crate::session::client::{ClientSession, SessionFailure, client_tls};
use crate::session::server::{ServerSession, SessionEnd, SessionLimits};
use crate::smtp::client::{Abort, Client, ClientOptions, StartTls};
use crate::smtp::reply::Severity;
use crate::smtp::server::{ServerOptions, ServerRole};
use crate::turn;

/// A command line may have 512 octets (RFC 5321 section 4.5.3.1.4): longer lists take several calls.
const ATRN_LIST_LIMIT: usize = 512 - "ATRN \r\n".len();

/// Why a call has failed. What came before is kept in any case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CallError {
    /// The configuration names something that cannot be used.
    Config(String),
    /// The name of the provider has no address.
    NoHost(String),
    /// Nobody answers there.
    Unavailable(String),
    /// Not now: try again later.
    Temporary(String),
    /// Another call to this provider is under way.
    Busy(String),
    /// The provider does not let us in.
    Denied(String),
    /// The other end, or its certificate, is not what it should be.
    Protocol(String),
    /// The system refuses: a port, a thread.
    System(String),
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CallError::Config(text)
            | CallError::NoHost(text)
            | CallError::Unavailable(text)
            | CallError::Temporary(text)
            | CallError::Busy(text)
            | CallError::Denied(text)
            | CallError::Protocol(text)
            | CallError::System(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for CallError {}

/// A customer, ready to call.
pub struct Customer {
    config: CustomerConfig,
    ids: Ids,
    /// What each provider's certificate is checked against, in their order.
    tls: Vec<Option<ClientTls>>,
    mailboxes: Arc<Mailboxes>,
    outbox: Option<Arc<Outbox>>,
    retry_queue: Arc<RetryQueue>,
}

/// One call to each provider; see [`Caller::pull`].
pub fn pull(config: &CustomerConfig, ids: &Ids, cancel: &CancelToken) -> Result<Summary, CallError> {
    Customer::new(config, ids)?.pull(cancel, &Arc::default())
}

impl Customer {
    /// Looks at what the configuration names: certificates, folders.
    pub fn new(config: &CustomerConfig, ids: &Ids) -> Result<Customer, CallError> {
        let tls = |provider: &ProviderAccount| {
            client_tls(provider.tls, provider.pin, provider.ca.as_deref())
                .map_err(|text| CallError::Config(provider.error(&text).to_string()))
        };
        let tls = config.providers.iter().map(tls).collect::<Result<_, _>>()?;
        let mailboxes = Arc::new(Mailboxes::new(config, ids));
        let outbox = Outbox::new(config, &mailboxes, ids).map(Arc::new);
        let retry_queue = match &outbox {
            Some(outbox) => outbox.retry_queue().clone(),
            None => Arc::new(RetryQueue::new(config, &mailboxes, Reporter::new(&config.hostname, ids, None))),
        };
        Ok(Customer { config: config.clone(), ids: ids.clone(), tls, mailboxes, outbox, retry_queue })
    }

    pub fn config(&self) -> &CustomerConfig {
        &self.config
    }

    pub fn outbox(&self) -> Option<&Arc<Outbox>> {
        self.outbox.as_ref()
    }

    /// When mail is due that waits for a next hop.
    pub fn retry_due(&self) -> Option<SystemTime> {
        self.retry_queue.due()
    }

    /// Tries mail that waits for a next hop, as far as it is due.
    pub fn retry_next_hops(&self, cancel: &CancelToken) {
        self.retry_queue.retry(&self.mailboxes, cancel);
    }

    /// One call to each provider, in the order of the configuration; one that fails does not keep us from the next.
    pub fn pull(&self, cancel: &CancelToken, counters: &Arc<CallCounters>) -> Result<Summary, CallError> {
        let begun = Instant::now();
        let mut result = Ok(());
        for number in 0..self.config.providers.len() {
            result = result.and(self.call(number, cancel, counters));
        }
        result.map(|()| counters.summary(begun.elapsed().as_secs_f64()))
    }

    /// Hands over outgoing mail, if this provider takes it, and fetches the mail of its domains, in as few calls as
    /// their names take. What came before a failure is kept. `number`: of the provider, in the order of the
    /// configuration; where there is none, there is no call.
    pub fn call(&self, number: usize, cancel: &CancelToken, counters: &Arc<CallCounters>) -> Result<(), CallError> {
        let (Some(provider), Some(tls)) = (self.config.providers.get(number), self.tls.get(number)) else {
            return Ok(());
        };
        let begun = Instant::now();
        let before = counters.summary(0.0);
        let result = self.lock(provider).and_then(|_lock| self.call_alone(provider, tls.as_ref(), cancel, counters));
        let after = counters.summary(begun.elapsed().as_secs_f64());
        log::info!(
            "event=call provider={} account={} messages={} octets={} refused={} put-off={} sent={} kept={} seconds={:.3} outcome={:?}",
            provider.address,
            provider.name,
            after.messages - before.messages,
            after.octets - before.octets,
            after.rejected - before.rejected,
            after.deferred - before.deferred,
            after.sent - before.sent,
            after.waiting,
            after.seconds,
            result.as_ref().map_or_else(CallError::to_string, |()| "good".to_owned())
        );
        result
    }

    fn call_alone(
        &self,
        provider: &ProviderAccount,
        tls: Option<&ClientTls>,
        cancel: &CancelToken,
        counters: &Arc<CallCounters>,
    ) -> Result<(), CallError> {
        let outbox = self.outbox.as_ref().filter(|_| provider.outgoing);
        if let Some(outbox) = outbox {
            outbox.deliver_here();
        }
        self.retry_next_hops(cancel);
        let mut result = Ok(());
        for domains in domain_lists(&provider.domains) {
            result = result
                .and(ProviderConnection { customer: self, provider, tls, outbox, cancel, counters }.run(&domains));
        }
        // What the provider would not take goes to the submission host, after the mail that came.
        if let Some(outbox) = outbox {
            outbox.submit(cancel, counters);
            counters.kept(outbox.waiting());
        }
        result
    }

    /// One call at a time to a provider's account, also of several processes; the kernel lets the lock go with us.
    fn lock(&self, provider: &ProviderAccount) -> Result<File, CallError> {
        let name = recipients::directory_name(&format!("{}@{}", provider.name, provider.address));
        let file = state_file(&self.config, &format!("call-{name}"))?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => {
                Err(CallError::Busy(format!("another call to {} as {} is under way", provider.address, provider.name)))
            }
            Err(TryLockError::Error(error)) => Err(CallError::System(error.to_string())),
        }
    }
}

/// A lock of a customer, in a folder beside its mailboxes, which no domain can be called like. Links are not followed:
/// root may look at another user's folder.
pub fn state_file(config: &CustomerConfig, name: &str) -> Result<File, CallError> {
    let folder = config.mailboxes.root.join(".odmr");
    let made = DirBuilder::new().recursive(true).mode(0o700).create(&folder);
    made.map_err(|error| CallError::System(format!("{}: {error}; give its user the right to", folder.display())))?;
    let path = folder.join(name);
    let flags = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).read(true).write(true).mode(0o600).custom_flags(flags);
    options.open(&path).map_err(|error| CallError::System(format!("{}: {error}", path.display())))
}

/// Divides the domains into lists that fit a line; no domains is one call for all.
fn domain_lists(domains: &[Domain]) -> Vec<Vec<Domain>> {
    let mut lists = vec![Vec::new()];
    let mut length = 0;
    for domain in domains {
        let more = domain.as_str().len() + 1;
        if length + more > ATRN_LIST_LIMIT + 1 {
            lists.push(Vec::new());
            length = 0;
        }
        length += more;
        if let Some(list) = lists.last_mut() {
            list.push(domain.clone());
        }
    }
    lists
}

/// One connection to the provider, or two.
struct ProviderConnection<'a> {
    customer: &'a Customer,
    provider: &'a ProviderAccount,
    tls: Option<&'a ClientTls>,
    /// The outgoing mail, if it goes with this call.
    outbox: Option<&'a Arc<Outbox>>,
    cancel: &'a CancelToken,
    counters: &'a Arc<CallCounters>,
}

impl ProviderConnection<'_> {
    /// Outgoing mail up, the turn, incoming mail down; a failure of the first half costs the second nothing
    /// but another connection.
    fn run(&self, domains: &[Domain]) -> Result<(), CallError> {
        let (mut session, mut peer) = self.connect()?;
        if let Some(outbox) = self.outbox
            && let Err(failure) = outbox.send(&mut session, self.counters)
        {
            log::warn!("event=outgoing-cut-short error={:?}", failure.to_string());
            session.close_after(&failure);
            (session, peer) = self.connect()?;
        }
        match session.atrn(domains) {
            Ok((connection, client)) => {
                self.counters.set_queued(client.waiting().unwrap_or(0));
                self.receive(connection, client, peer)
            }
            Err(failure) => call_error(failure).map_or(Ok(()), Err),
        }
    }

    /// A connection that has come as far as AUTH.
    fn connect(&self) -> Result<(ClientSession, IpAddr), CallError> {
        let config = self.provider;
        let (stream, peer) = self.dial()?;
        log::info!("event=connected provider={} peer={peer}", config.address);
        let trace = Trace { id: "pull".to_owned(), us: 'C', them: 'P' };
        let connection = Connection::new(stream, trace)
            .map_err(|error| CallError::Temporary(format!("the connection was lost: {error}")))?;
        let options = ClientOptions {
            name: self.customer.config.hostname.clone(),
            starttls: if config.tls == TlsMode::StartTls { StartTls::Required } else { StartTls::Never },
            tls: config.tls == TlsMode::Implicit,
            credentials: Some((config.name.clone(), config.secret.clone())),
            chunking: true,
            atrn: true,
            ..ClientOptions::default()
        };
        let mut session = ClientSession::new(connection, options, &self.customer.config.timeouts, self.cancel);
        let tls = self.tls.map(|tls| (tls, config.host.as_str()));
        let introduced = match (config.tls, tls) {
            (TlsMode::Implicit, Some((tls, name))) => session.begin_tls(tls, name),
            _ => Ok(()),
        };
        match introduced.and_then(|()| session.handshake(tls)) {
            Ok(()) => Ok((session, peer.ip())),
            Err(failure) => {
                session.close_after(&failure);
                Err(call_error(failure).unwrap_or_else(|| CallError::Protocol("453 came before ATRN".to_owned())))
            }
        }
    }

    /// Tries all addresses of the name, in the order the system gives.
    fn dial(&self) -> Result<(OwnedFd, SocketAddr), CallError> {
        let address = &self.provider.address;
        let found = address.to_socket_addrs().map_err(|error| {
            CallError::NoHost(format!("{address} has no address: {error}; check `address` and the name server"))
        })?;
        let mut last = "the name has no address".to_owned();
        for socket in found {
            if self.cancel.is_cancelled() {
                return Err(CallError::Temporary("stopped".to_owned()));
            }
            let deadline = Instant::now() + self.customer.config.timeouts.connect;
            match connection::connect(socket, deadline, self.cancel) {
                Ok(stream) => return Ok((stream, socket)),
                Err(error) => {
                    last = format!("{socket}: {error}");
                    log::info!("event=no-connection peer={socket} error={:?}", error.to_string());
                }
            }
        }
        Err(CallError::Unavailable(format!("no connection to {address}: {last}")))
    }

    /// The customer's half of the turn, and mail until QUIT.
    fn receive(&self, connection: Connection, client: Client, peer: IpAddr) -> Result<(), CallError> {
        let config = &self.customer.config;
        let profile = ServerOptions {
            role: ServerRole::Customer,
            hostname: config.hostname.clone(),
            max_size: config.mailboxes.max_size,
            max_recipients: config.limits.recipients,
            max_errors: config.limits.errors,
            max_auth_failures: config.limits.auth_failures,
            starttls: false,
            require_tls: false,
            // Whoever sends no mail cannot send notices.
            dsn: self.customer.outbox.is_some(),
            mechanisms: Vec::new(),
            ids: self.customer.ids.clone(),
        };
        let (connection, server) =
            turn::take_over(connection, client, profile).map_err(|error| CallError::Protocol(error.to_string()))?;
        // A message half received stays with the provider: nothing is lost by stopping at once.
        let limits = SessionLimits::new(&config.timeouts, &config.limits, self.cancel, self.cancel);
        let limits = SessionLimits { session: config.timeouts.turn, ..limits };
        let reporter = self.customer.outbox.as_ref().map(|outbox| outbox.reporter().clone());
        let hops = NextHops::new(&config.hostname, &config.timeouts, self.cancel);
        let (mailboxes, retry_queue) = (self.customer.mailboxes.clone(), self.customer.retry_queue.clone());
        let mut receiver = Receiver::new(mailboxes, retry_queue, reporter, self.counters.clone(), hops);
        let mut session =
            ServerSession::new(connection, server, crate::session::server::address_literal(peer), None, limits);
        session.greet();
        let end = session.run(&mut receiver);
        session.close();
        match end {
            SessionEnd::Quit => Ok(()),
            SessionEnd::Closed(why) => Err(CallError::Temporary(format!("the call was cut short: {why}"))),
            SessionEnd::Atrn(_) => Err(CallError::Protocol("the provider said ATRN".to_owned())),
        }
    }
}

/// What a failure means for the caller; `None`: there is no mail, and that is none.
fn call_error(failure: SessionFailure) -> Option<CallError> {
    match failure {
        SessionFailure::Aborted(abort) => abort_error(abort),
        SessionFailure::Broken(text) => Some(CallError::Protocol(text)),
        SessionFailure::NoTls(text) | SessionFailure::Lost(text) => Some(CallError::Temporary(text)),
        SessionFailure::Cancelled => Some(CallError::Temporary("stopped".to_owned())),
    }
}

/// What a refusal means for the caller; `None`: all is well (RFC 2645 section 5.2.1).
fn abort_error(abort: Abort) -> Option<CallError> {
    Some(match abort {
        Abort::Rejected { what: "ATRN", reply } if reply.code() == 453 => return None,
        Abort::Rejected { what, reply } => {
            let text = format!("the provider refused {what}: {reply}");
            match (what, reply.severity(), reply.code()) {
                (_, Severity::Transient, _) => CallError::Temporary(text),
                ("AUTH", ..) | (_, _, 530 | 535) => CallError::Denied(format!("{text}; check `name` and `secret`")),
                _ => CallError::Protocol(text),
            }
        }
        Abort::NoStartTls => CallError::Protocol(
            "the provider offers no STARTTLS, so neither secret nor mail was entrusted to it; \
             use `tls = \"implicit\"` if it has a port for that"
                .to_owned(),
        ),
        Abort::NoAtrn => CallError::Protocol(
            "the server does not offer ATRN, so it is no provider of on-demand mail, and was not told the secret; \
             check host and port in `address`"
                .to_owned(),
        ),
        Abort::NoMechanism => CallError::Protocol(
            "the provider offers no authentication that can be used: CRAM-MD5, or PLAIN under TLS".to_owned(),
        ),
        Abort::Unproven => CallError::Denied("the provider did not prove that it knows the secret".to_owned()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lists_take_several_calls() {
        assert_eq!(domain_lists(&[]), [Vec::new()]);
        let domains: Vec<_> =
            (0..100).map(|number| Domain::parse(&format!("customer-{number}.example.org")).unwrap()).collect();
        let lists = domain_lists(&domains);
        assert!(lists.len() > 1 && lists.concat() == domains);
        for list in lists {
            let names: Vec<_> = list.iter().map(Domain::as_str).collect();
            assert!(format!("ATRN {}\r\n", names.join(",")).len() <= 512);
        }
    }
}
