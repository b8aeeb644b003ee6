//! One call: connect, TLS, AUTH, outgoing mail, ATRN, the turn, and incoming mail until the provider sends QUIT.
//!
//! 453 ("you have no mail") is a success. After the 250 to ATRN the customer sends nothing but its greeting, and what
//! follows is an ordinary SMTP server session whose client is the provider (RFC 2645 section 5.3).

use std::fmt;
use std::fs::{File, TryLockError};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use super::counters::{CallCounters, Summary};
use super::mailboxes::Mailboxes;
use super::next_hop::NextHops;
use super::outbox::Outbox;
use super::receiver::Receiver;
use super::retry_queue::RetryQueue;
use super::store;
use crate::config::{CustomerConfig, ProviderAccount};
use crate::ids::Ids;
use crate::mail::address::{self, Domain};
use crate::net::cancel::CancelToken;
use crate::net::connection::Connection;
use crate::net::trace::quoted;
use crate::recipients;
use crate::report::Reporter;
use crate::session::Remote;
use crate::session::client::{ClientSession, Connect, SessionFailure};
use crate::session::server::{ServerSession, SessionEnd, SessionLimits};
use crate::smtp::client::{Abort, Client, ClientOptions, Rejection, Stage};
use crate::smtp::limits;
use crate::smtp::reply::Severity;
use crate::smtp::server::ServerRole;
use crate::smtp::status::{is_login_rejected, is_no_mail};
use crate::turn;

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
    /// The providers in the order of the configuration, ready to be connected to.
    providers: Vec<Remote>,
    mailboxes: Arc<Mailboxes>,
    outbox: Option<Arc<Outbox>>,
    retry_queue: Arc<RetryQueue>,
}

/// One call to each provider; see [`Customer::pull`].
pub fn pull(config: &CustomerConfig, ids: &Ids, cancel: &CancelToken) -> Result<Summary, CallError> {
    Customer::new(config, ids)?.pull(cancel, &Arc::default())
}

impl Customer {
    /// # Errors
    /// [`CallError::Config`]: the certificates that the configuration names cannot be used.
    pub fn new(config: &CustomerConfig, ids: &Ids) -> Result<Customer, CallError> {
        let remote = |provider: &ProviderAccount| {
            Remote::new(&provider.remote).map_err(|text| CallError::Config(provider.error(&text).to_string()))
        };
        let providers = config.providers.iter().map(remote).collect::<Result<_, _>>()?;
        let mailboxes = Arc::new(Mailboxes::new(config, ids));
        let outbox = Outbox::new(config, &mailboxes, ids).map(Arc::new);
        let retry_queue = match &outbox {
            Some(outbox) => outbox.retry_queue().clone(),
            None => Arc::new(RetryQueue::new(config, &mailboxes, Reporter::new(&config.hostname, ids, None))),
        };
        Ok(Customer { config: config.clone(), ids: ids.clone(), providers, mailboxes, outbox, retry_queue })
    }

    pub fn config(&self) -> &CustomerConfig {
        &self.config
    }

    pub fn outbox(&self) -> Option<&Arc<Outbox>> {
        self.outbox.as_ref()
    }

    /// When the retry queue is due.
    pub fn retry_due(&self) -> Option<SystemTime> {
        self.retry_queue.due()
    }

    /// Tries the messages of the retry queue that are due.
    pub fn retry_next_hops(&self, cancel: &CancelToken) {
        self.retry_queue.retry(&self.mailboxes, cancel);
    }

    /// One call to each provider, in the order of the configuration; a call that fails does not prevent the next.
    /// Returns the first failure; the others are logged.
    pub fn pull(&self, cancel: &CancelToken, counters: &Arc<CallCounters>) -> Result<Summary, CallError> {
        let begun = Instant::now();
        let mut result = Ok(());
        for (number, provider) in self.config.providers.iter().enumerate() {
            match (self.call(number, cancel, counters), &result) {
                (Err(error), Ok(())) => result = Err(error),
                (Err(error), Err(_)) => {
                    let remote = &provider.remote;
                    let (address, account) = (&remote.address, remote.login_name());
                    log::error!("event=call-failed provider={address} account={account} error={}", quoted(error));
                }
                (Ok(()), _) => {}
            }
        }
        result.map(|()| counters.summary(begun.elapsed().as_secs_f64()))
    }

    /// Sends outgoing mail, if this provider accepts it, and fetches the mail of its domains, in as few connections as
    /// their names need. What happened before a failure stays. `number`: of the provider, in the order of the
    /// configuration; without one there is no call.
    pub fn call(&self, number: usize, cancel: &CancelToken, counters: &Arc<CallCounters>) -> Result<(), CallError> {
        let (Some(provider), Some(remote)) = (self.config.providers.get(number), self.providers.get(number)) else {
            return Ok(());
        };
        let begun = Instant::now();
        let before = counters.summary(0.0);
        let result = self.lock(provider).and_then(|_lock| self.call_alone(provider, remote, cancel, counters));
        let after = counters.summary(begun.elapsed().as_secs_f64());
        log::info!(
            "event=call provider={} account={} received={} octets={} rejected={} deferred={} sent={} waiting={} \
             duration={:.3} result={}",
            provider.remote.address,
            provider.remote.login_name(),
            after.messages - before.messages,
            after.octets - before.octets,
            after.rejected - before.rejected,
            after.deferred - before.deferred,
            after.sent - before.sent,
            after.waiting,
            after.seconds,
            if result.is_ok() { "done" } else { "failed" },
        );
        result
    }

    fn call_alone(
        &self, provider: &ProviderAccount, remote: &Remote, cancel: &CancelToken, counters: &Arc<CallCounters>,
    ) -> Result<(), CallError> {
        let outbox = self.outbox.as_ref().filter(|_| provider.outgoing);
        if let Some(outbox) = outbox {
            outbox.deliver_here();
        }
        self.retry_next_hops(cancel);
        let call = ProviderConnection { customer: self, remote, outbox, cancel, counters };
        let mut result = Ok(());
        for domains in domain_lists(&provider.domains) {
            result = result.and(call.run(&domains));
        }
        // The submission host gets what the provider does not accept, after the incoming mail.
        if let Some(outbox) = outbox {
            outbox.submit(cancel, counters);
            counters.set_waiting(outbox.waiting());
        }
        result
    }

    /// One call at a time to a provider's account, also among processes. The kernel releases the lock with this process.
    fn lock(&self, provider: &ProviderAccount) -> Result<File, CallError> {
        let (address, name) = (&provider.remote.address, provider.remote.login_name());
        let lock = format!("call-{}", recipients::directory_name(&format!("{name}@{address}")));
        let system = |error: std::io::Error| CallError::System(error.to_string());
        let file = store::state_file(&self.config.mailboxes.root, &lock).map_err(system)?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => {
                Err(CallError::Busy(format!("another call to {address} as {name} is under way")))
            }
            Err(TryLockError::Error(error)) => Err(system(error)),
        }
    }
}

/// Divides the domains into lists that fit a command line; without domains there is one list, of all.
fn domain_lists(domains: &[Domain]) -> Vec<Vec<Domain>> {
    let mut lists = vec![Vec::new()];
    let mut length = 0;
    for domain in domains {
        let more = domain.as_str().len() + 1;
        if length + more > limits::ATRN_DOMAINS + 1 {
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
    remote: &'a Remote,
    /// The outgoing mail, if this provider accepts it.
    outbox: Option<&'a Arc<Outbox>>,
    cancel: &'a CancelToken,
    counters: &'a Arc<CallCounters>,
}

impl ProviderConnection<'_> {
    /// Sends outgoing mail, turns, receives incoming mail. A failure of the first half costs the second nothing but
    /// another connection.
    fn run(&self, domains: &[Domain]) -> Result<(), CallError> {
        let (mut session, mut peer) = self.connect()?;
        if let Some(outbox) = self.outbox
            && let Err(failure) = outbox.send(&mut session, self.counters)
        {
            log::warn!("event=session-lost session={} error={}", session.id(), quoted(&failure));
            session.close_after(&failure);
            (session, peer) = self.connect()?;
        }
        match session.atrn(domains) {
            Ok((connection, client)) => {
                self.counters.set_queued(client.messages_waiting().unwrap_or(0));
                self.receive(connection, client, peer)
            }
            Err(failure) if is_success(&failure) => Ok(()),
            Err(failure) => Err(call_error(failure)),
        }
    }

    /// A session that has come as far as AUTH.
    fn connect(&self) -> Result<(ClientSession, IpAddr), CallError> {
        let config = &self.customer.config;
        let (id, timeouts, cancel) = (&self.customer.ids.session_id(), &config.timeouts, self.cancel);
        let options =
            ClientOptions { name: config.hostname.clone(), chunking: true, atrn: true, ..ClientOptions::default() };
        let connect = Connect { id, peer: 'P', tls: None, timeouts, cancel, limit: None };
        let (session, peer) = self.remote.connect(&options, &connect).map_err(call_error)?;
        log::info!("event=connected session={id} provider={} peer={peer}", self.remote.address());
        Ok((session, peer.ip()))
    }

    /// The customer's half of the turn, and mail until QUIT.
    fn receive(&self, connection: Connection, client: Client, peer: IpAddr) -> Result<(), CallError> {
        let customer = self.customer;
        let config = &customer.config;
        let mut options =
            config.limits.server_options(ServerRole::Customer, &config.hostname, config.mailboxes.max_size);
        // A customer that sends no mail cannot send DSNs.
        options.dsn = customer.outbox.is_some();
        let (connection, server) =
            turn::take_over(connection, client, options).map_err(|error| CallError::Protocol(error.to_string()))?;
        // A message received in part stays with the provider: to end at once loses nothing.
        let limits = SessionLimits::new(&config.timeouts, &config.limits, self.cancel, self.cancel);
        let limits = SessionLimits { session: config.timeouts.turn, ..limits };
        let reporter = customer.outbox.as_ref().map(|outbox| outbox.reporter().clone());
        let hops = NextHops::new(&config.hostname, &config.timeouts, &customer.ids, self.cancel);
        let (mailboxes, retry_queue) = (customer.mailboxes.clone(), customer.retry_queue.clone());
        let mut receiver = Receiver::new(mailboxes, retry_queue, reporter, self.counters.clone(), hops);
        let mut session = ServerSession::new(connection, server, address::literal(peer), None, limits);
        session.greet();
        let end = session.run(&mut receiver);
        session.close();
        match end {
            SessionEnd::Quit => Ok(()),
            SessionEnd::Closed(reason) => Err(CallError::Temporary(format!("the call was cut short: {reason}"))),
            SessionEnd::Atrn(_) => Err(CallError::Protocol("the provider sent ATRN".to_owned())),
        }
    }
}

/// The provider has no mail for us: the call is a success (RFC 2645 section 5.2.1).
fn is_success(failure: &SessionFailure) -> bool {
    matches!(
        failure,
        SessionFailure::Aborted(Abort::Rejected(Rejection { stage: Stage::Atrn, reply })) if is_no_mail(reply)
    )
}

/// What a failed session means for the caller.
fn call_error(failure: SessionFailure) -> CallError {
    match failure {
        SessionFailure::Aborted(abort) => abort_error(abort),
        SessionFailure::Broken(text) => CallError::Protocol(text),
        SessionFailure::NoHost(text) => CallError::NoHost(format!("{text}; check `address` and the name server")),
        SessionFailure::Unreachable(text) => CallError::Unavailable(text),
        SessionFailure::NoTls(text) | SessionFailure::Lost(text) => CallError::Temporary(text),
        SessionFailure::Cancelled => CallError::Temporary("stopped".to_owned()),
    }
}

/// What an abort means for the caller.
fn abort_error(abort: Abort) -> CallError {
    match abort {
        Abort::Rejected(Rejection { stage, reply }) => {
            let text = format!("the provider refused {stage}: {reply}");
            match reply.severity() {
                Severity::Transient => CallError::Temporary(text),
                _ if stage == Stage::Auth || is_login_rejected(&reply) => {
                    CallError::Denied(format!("{text}; check `name` and `secret`"))
                }
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
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rules: AMB-13.
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
