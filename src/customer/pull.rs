//! One call: connect, TLS, AUTH, outgoing mail, ATRN, the turn, and incoming mail until the provider sends QUIT.
//!
//! Some providers send only a part of the mail in one call: Exim under TLS sends one message. So the customer calls
//! again at once after a call that has brought mail, until the provider has no more.
//!
//! A long upload must not delay incoming mail. After `[timeouts] outgoing` the customer fetches incoming mail over a
//! second connection, and again after each further interval of that length, while the upload goes on.
//!
//! The reply 453 to ATRN ("you have no mail") is a success (RFC 2645 section 5.2.1). After the 250 to ATRN the customer
//! sends its greeting: it is the SMTP server now, and the provider the client (RFC 2645 section 5.3).

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, SendError};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use super::counters::{CallCounters, Deferred, Summary};
use super::mailboxes::Mailboxes;
use super::next_hop::NextHops;
use super::outbox::Outbox;
use super::receiver::{IncomingMail, Receiver};
use super::retry_queue::RetryQueue;
use super::store;
use crate::config::{CustomerConfig, ProviderAccount};
use crate::ids::Ids;
use crate::mail::address::{self, Domain};
use crate::net::cancel::CancelToken;
use crate::net::connection::Connection;
use crate::net::trace::{log_no_thread, quoted};
use crate::report::Reporter;
use crate::report::calls::{CallRecord, CallResult};
use crate::sasl::Mechanism;
use crate::session::Remote;
use crate::session::client::{ClientSession, Connect, SessionFailure};
use crate::session::server::{ServerSession, SessionEnd, SessionLimits};
use crate::smtp::client::{Abort, Client, ClientOptions, Rejection, Stage};
use crate::smtp::limits;
use crate::smtp::reply::Severity;
use crate::smtp::server::ServerRole;
use crate::smtp::status::{is_login_rejected, is_too_soon, means_no_mail};
use crate::threads;
use crate::turn;

/// The most calls in a row to a provider that sends a part of the mail in each.
const CALL_LIMIT: u32 = 100;

/// Why a call has failed. Messages that were sent or received before the failure are not sent or received again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CallError {
    /// The configuration names something that cannot be used.
    Config(String),
    /// The host name of the provider has no address.
    NoHost(String),
    /// The provider cannot be connected to.
    Unavailable(String),
    /// The provider defers the call, the connection is lost, or a disk is full: a later call may succeed.
    Temporary(String),
    /// Another process is calling this provider for the same account.
    Busy(String),
    /// The provider defers ATRN because the last call has brought no mail. Outgoing mail was sent before ATRN.
    TooSoon(String),
    /// The provider rejects our name or secret, or does not prove that it knows the secret; or this user may not see
    /// the state of the daemon.
    Denied(String),
    /// The peer is not a provider, breaks the protocol, or shows a certificate that is not accepted.
    Protocol(String),
    /// A system call failed, or the mailboxes cannot be written to.
    System(String, io::ErrorKind),
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CallError::Config(text)
            | CallError::NoHost(text)
            | CallError::Unavailable(text)
            | CallError::Temporary(text)
            | CallError::Busy(text)
            | CallError::TooSoon(text)
            | CallError::Denied(text)
            | CallError::Protocol(text)
            | CallError::System(text, _) => f.write_str(text),
        }
    }
}

impl From<io::Error> for CallError {
    fn from(error: io::Error) -> CallError {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => CallError::Temporary(error.to_string()),
            kind => CallError::System(error.to_string(), kind),
        }
    }
}

/// A customer, ready to call.
pub struct Customer {
    /// The Maildirs, and the configuration.
    pub mailboxes: Arc<Mailboxes>,
    /// `None`: the customer sends no mail.
    pub outbox: Option<Arc<Outbox>>,
    /// Mail for next hops that no other host stores.
    pub retry_queue: Arc<RetryQueue>,
    /// Defer incoming mail instead of rejecting it, so that no sender gets a DSN.
    pub soft_bounce: bool,
    /// The providers, in the order of the configuration.
    remotes: Vec<Remote>,
}

/// Calls each provider once, as [`Customer::pull`] does. Returns what was sent and received.
///
/// # Errors
/// Those of [`Customer::new`] and [`Customer::pull`].
pub fn pull(config: &CustomerConfig, ids: &Ids, cancel: &CancelToken) -> Result<Summary, CallError> {
    let (begun, counters) = (Instant::now(), Arc::default());
    Customer::new(config, ids)?.pull(cancel, &counters)?;
    Ok(counters.summary(begun.elapsed().as_secs_f64()))
}

impl Customer {
    /// Prepares calls by this configuration. It connects to no provider yet.
    ///
    /// # Errors
    /// [`CallError::Config`]: the certificates that the configuration names cannot be used.
    pub fn new(config: &CustomerConfig, ids: &Ids) -> Result<Customer, CallError> {
        let remote = |provider: &ProviderAccount| {
            Remote::new(&provider.remote).map_err(|error| CallError::Config(provider.error(&error).to_string()))
        };
        let remotes = config.providers.iter().map(remote).collect::<Result<_, _>>()?;
        let mailboxes = Arc::new(Mailboxes::new(config, ids));
        let outbox = Outbox::new(&mailboxes).map(Arc::new);
        let retry_queue = match &outbox {
            Some(outbox) => outbox.retry_queue.clone(),
            None => Arc::new(RetryQueue::new(&mailboxes, Reporter::new(&config.hostname, ids, None, &mailboxes.watch))),
        };
        Ok(Customer { mailboxes, outbox, retry_queue, soft_bounce: false, remotes })
    }

    /// The configuration that it was made from.
    pub fn config(&self) -> &CustomerConfig {
        &self.mailboxes.config
    }

    /// Calls each provider once, in the order of the configuration. A call that fails does not prevent the next.
    ///
    /// # Errors
    /// The first failure; [`CallError::TooSoon`] only if there is no other. The other failures are logged.
    pub fn pull(&self, cancel: &CancelToken, counters: &Arc<CallCounters>) -> Result<(), CallError> {
        let mut result = Ok(());
        for (number, provider) in self.config().providers.iter().enumerate() {
            match (self.call(number, cancel, counters), &result) {
                (Err(error), Ok(()) | Err(CallError::TooSoon(_))) => result = Err(error),
                (Err(CallError::TooSoon(_)), Err(_)) | (Ok(_), _) => {}
                (Err(error), Err(_)) => {
                    let (address, account) = (&provider.remote.address, provider.remote.login_name());
                    log::error!("event=call-failed provider={address} account={account} error={}", quoted(error));
                }
            }
        }
        result
    }

    /// Calls one provider: sends outgoing mail, if this provider accepts it, and fetches the mail of its domains.
    /// Domains whose names do not fit one ATRN command need several connections. `number`: the index of the provider in
    /// the configuration, from 0; if there is no such provider, returns 0. Returns how many recipients were deferred
    /// here and not accepted later in the call: their mail stays with the provider.
    ///
    /// # Errors
    /// The first failure.
    pub fn call(&self, number: usize, cancel: &CancelToken, counters: &Arc<CallCounters>) -> Result<u64, CallError> {
        let (Some(provider), Some(remote)) = (self.config().providers.get(number), self.remotes.get(number)) else {
            return Ok(0);
        };
        let begun = Instant::now();
        let before = counters.summary(0.0);
        let result = self.lock(provider).and_then(|_lock| self.call_alone(provider, remote, cancel, counters));
        let after = counters.summary(begun.elapsed().as_secs_f64());
        // Not below zero: this call may have accepted recipients that an earlier call to another provider has deferred.
        let deferred = after.deferred.saturating_sub(before.deferred);
        log::info!(
            "event=call provider={} account={} received={} octets={} rejected={} deferred={} sent={} waiting={} \
             duration={:.3} result={}",
            provider.remote.address,
            provider.remote.login_name(),
            after.messages - before.messages,
            after.octets - before.octets,
            after.rejected - before.rejected,
            deferred,
            after.sent - before.sent,
            after.waiting,
            after.seconds,
            match &result {
                Ok(()) if deferred > 0 => "deferred",
                Ok(()) => "done",
                Err(CallError::TooSoon(_)) => "too-soon",
                Err(_) => "failed",
            },
        );
        let counts = [
            ("received", after.messages - before.messages),
            ("octets", after.octets - before.octets),
            ("rejected", after.rejected - before.rejected),
            ("deferred", deferred),
            ("sent", after.sent - before.sent),
        ];
        self.record_call(provider, &result, begun.elapsed(), &counts);
        self.mailboxes.watch.look();
        self.mailboxes.tidy();
        result.map(|()| deferred)
    }

    /// Records a call that has ended, for `odmr status`.
    fn record_call(
        &self, provider: &ProviderAccount, result: &Result<(), CallError>, duration: Duration, counts: &[(&str, u64)],
    ) {
        let (address, name) = (&provider.remote.address, provider.remote.login_name());
        let count = |wanted| counts.iter().any(|(key, count)| *key == wanted && *count > 0);
        let (result, reason) = match result {
            // Another process records its own call. A call that comes too soon must not replace the record of the last
            // one.
            Err(CallError::Busy(_) | CallError::TooSoon(_)) => return,
            Err(error) => (CallResult::Failed, error.to_string()),
            Ok(()) if count("deferred") => (CallResult::Deferred, String::new()),
            Ok(()) if count("received") => (CallResult::Done, String::new()),
            Ok(()) => (CallResult::NoMail, String::new()),
        };
        let mut record = CallRecord::new(self.mailboxes.ids.clock().now(), address, result, &reason);
        record.duration = duration;
        record.counts = counts.iter().map(|(key, count)| ((*key).to_owned(), *count)).collect();
        record.write(&store::call_record(&self.config().mailboxes.root, name, address), name);
    }

    fn call_alone(
        &self, provider: &ProviderAccount, remote: &Remote, cancel: &CancelToken, counters: &Arc<CallCounters>,
    ) -> Result<(), CallError> {
        let outbox = self.outbox.as_ref().filter(|_| provider.outgoing);
        if let Some(outbox) = outbox {
            outbox.deliver_here(counters);
        }
        let retried = self.retry_queue.retry(cancel);
        let lists = domain_lists(&provider.domains);
        let deferred = counters.deferred();
        let call = ProviderCall { customer: self, remote, outbox, cancel, counters, deferred, lists };
        let result = thread::scope(|scope| call.run(scope));
        if let Some(outbox) = outbox {
            counters.set_waiting(outbox.waiting());
        }
        // Incoming mail is fetched even if outgoing mail or the retry queue fails. TooSoon must not hide that failure.
        let waits = |what: &str, error: io::Error| {
            CallError::from(io::Error::new(error.kind(), format!("{what} waits, and cannot be sent: {error}")))
        };
        let sent = counters.take_outgoing_failure().map_or(Ok(()), |error| Err(waits("outgoing mail", error)));
        let sent = sent.and(retried.map_err(|error| waits("mail for next hops", error)));
        if let Ok(()) | Err(CallError::TooSoon(_)) = result { sent.and(result) } else { result }
    }

    /// Locks a provider's account, so that one process at a time calls it. If this process dies, the kernel releases
    /// the lock.
    fn lock(&self, provider: &ProviderAccount) -> Result<File, CallError> {
        let (address, name) = (&provider.remote.address, provider.remote.login_name());
        let file = format!("call-{}", store::account_file(name, address));
        let busy = || CallError::Busy(format!("another call to {address} as {name} is under way"));
        store::lock_state_file(&self.config().mailboxes.root, &file)?.ok_or_else(busy)
    }
}

/// Divides the domains into lists, each of which fits one command line (RFC 5321 section 4.5.3.1.4). Without domains
/// there is one list, which is empty: ATRN without domains asks for all of the account.
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

/// The connections of one call: one for each list of domains, and more if one is lost, or is still sending outgoing
/// mail.
struct ProviderCall<'a> {
    customer: &'a Customer,
    remote: &'a Remote,
    /// The outgoing mail, if this provider accepts it.
    outbox: Option<&'a Arc<Outbox>>,
    cancel: &'a CancelToken,
    counters: &'a Arc<CallCounters>,
    /// The recipients that were deferred before the first connection.
    deferred: Deferred,
    /// The domains to ask for, one list for each ATRN.
    lists: Vec<Vec<Domain>>,
}

impl ProviderCall<'_> {
    /// Sends outgoing mail, and receives incoming mail for each list of domains. Returns the first failure; but if
    /// incoming mail is fetched again during a long upload, the result of the last fetch.
    fn run<'s>(&'s self, scope: &'s Scope<'s, '_>) -> Result<(), CallError> {
        let (mut result, mut upload) = (Ok(()), None);
        for domains in &self.lists {
            result = result.and(self.send_and_receive(scope, domains, &mut upload));
        }
        if let Some(upload) = upload {
            self.receive_during(&upload, &mut result);
            // `Temporary` may mean that the provider permits one connection only, which the upload had: fetch incoming
            // mail now.
            if matches!(result, Err(CallError::Temporary(_))) {
                result = self.receive_all();
            }
        }
        // Outgoing mail that the provider does not accept goes to the submission host, after the incoming mail.
        if let Some(outbox) = self.outbox.filter(|outbox| outbox.has_submissions()) {
            let submit = || outbox.submit(self.cancel, self.counters);
            if let Some(upload) = spawn(scope, submit) {
                self.receive_during(&upload, &mut result);
            }
        }
        // A cancelled call is not a success: it may have left outgoing mail.
        if self.cancel.is_cancelled() { result.and(Err(stopped())) } else { result }
    }

    /// Sends outgoing mail, turns the connection and receives incoming mail. If sending fails or takes too long,
    /// incoming mail is received over another connection. `upload`: outgoing mail that is being sent over its own
    /// connection.
    fn send_and_receive<'s>(
        &'s self, scope: &'s Scope<'s, '_>, domains: &[Domain], upload: &mut Option<UploadEnd>,
    ) -> Result<(), CallError> {
        let (session, peer) = self.connect()?;
        match self.outbox.filter(|outbox| upload.is_none() && !outbox.is_empty()) {
            None => self.receive(session, peer, domains),
            Some(outbox) => match self.send(scope, outbox, session, upload) {
                Some(session) => self.receive(session, peer, domains),
                None => self.connect_and_receive(domains),
            },
        }
    }

    /// Sends outgoing mail. Returns the session, in which ATRN may follow; `None`: it was lost, or it still sends mail
    /// after `[timeouts] outgoing` and is `upload` from then on. The message under way is not cut off: otherwise each
    /// call would begin it again, and a message that takes longer would never be sent.
    fn send<'s>(
        &'s self, scope: &'s Scope<'s, '_>, outbox: &'s Outbox, session: ClientSession, upload: &mut Option<UploadEnd>,
    ) -> Option<ClientSession> {
        let id = session.id().to_owned();
        let connect = || self.try_connect().map(|(session, _)| session);
        // The channel has no buffer, so no session is lost in it: either it is received below, or `send` returns it.
        let (sender, returned_session) = mpsc::sync_channel(0);
        let end = spawn(scope, move || {
            if let Some(session) = outbox.send(session, &connect, self.counters)
                && let Err(SendError(session)) = sender.send(session)
            {
                ClientSession::quit(session);
            }
        })?;
        match returned_session.recv_timeout(self.customer.config().timeouts.outgoing) {
            Ok(session) => return Some(session),
            Err(RecvTimeoutError::Disconnected) => {}
            Err(RecvTimeoutError::Timeout) => {
                log::info!("event=upload-continues session={id}");
                *upload = Some(end);
            }
        }
        None
    }

    /// Fetches incoming mail at intervals of `[timeouts] outgoing` until an upload has ended. Sets `result` to that of
    /// the last fetch.
    fn receive_during(&self, upload: &UploadEnd, result: &mut Result<(), CallError>) {
        let interval = self.customer.config().timeouts.outgoing;
        while upload.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
            if !self.cancel.is_cancelled() {
                *result = self.receive_all();
            }
        }
    }

    /// Fetches incoming mail again, for all lists. `TooSoon` is not a failure here: the last fetch has just ended.
    fn receive_all(&self) -> Result<(), CallError> {
        self.counters.offered_again(&self.deferred);
        let fetch = |domains: &Vec<Domain>| match self.connect_and_receive(domains) {
            Err(CallError::TooSoon(_)) => Ok(()),
            fetched => fetched,
        };
        self.lists.iter().map(fetch).fold(Ok(()), Result::and)
    }

    fn connect_and_receive(&self, domains: &[Domain]) -> Result<(), CallError> {
        let (session, peer) = self.connect()?;
        self.receive(session, peer, domains)
    }

    /// Sends ATRN, turns the connection and receives mail; calls again until the provider has no more.
    fn receive(&self, session: ClientSession, peer: IpAddr, domains: &[Domain]) -> Result<(), CallError> {
        let Some((connection, client)) = atrn(session, domains).map_err(call_error)? else { return Ok(()) };
        self.counters.begin_call();
        self.counters.add_queued(client.messages_waiting().unwrap_or(0));
        let first = self.serve_provider(connection, client, peer)?;
        match first.ended_without_command {
            Some(error) => Err(CallError::Temporary(no_command_text(&error))),
            None => self.receive_rest(first, domains),
        }
    }

    /// Calls again until the provider has no more mail. `last`: the result of the turn before. If a connection or ATRN
    /// fails, this is logged and is not an error, because the provider may want a pause.
    ///
    /// # Errors
    /// A turned session was lost, or the provider breaks the protocol.
    fn receive_rest(&self, mut last: TurnResult, domains: &[Domain]) -> Result<(), CallError> {
        let (mut calls, provider) = (0, self.remote.address());
        let mut known = last.settled.clone();
        let reason = loop {
            if last.is_all() || self.cancel.is_cancelled() {
                return Ok(());
            }
            if calls + 1 == CALL_LIMIT {
                break "it may have more mail, for the next call".to_owned();
            }
            calls += 1;
            match self.call_again(&mut known, domains) {
                Ok(next) => last = next,
                Err(CallEnd::Finished) => return Ok(()),
                Err(CallEnd::NothingNew(reason)) => break reason,
                Err(CallEnd::Failed(error)) => return Err(error),
            }
        };
        log::info!("event=not-called-again provider={provider} calls={calls} reason={}", quoted(reason));
        Ok(())
    }

    /// Calls once more. `known`: the fingerprints of the mail of the calls before; those of this call are added.
    ///
    /// # Errors
    /// Why no further call follows at once.
    fn call_again(&self, known: &mut HashSet<u64>, domains: &[Domain]) -> Result<TurnResult, CallEnd> {
        let called = self.try_connect().and_then(|(session, peer)| Ok((atrn(session, domains)?, peer)));
        let (connection, client, peer) = match called {
            Ok((Some((connection, client)), peer)) => (connection, client, peer),
            Ok((None, _)) | Err(SessionFailure::Cancelled) => return Err(CallEnd::Finished),
            Err(failure) => return Err(CallEnd::NothingNew(failure.to_string())),
        };
        self.counters.begin_next_call();
        let next = self.serve_provider(connection, client, peer).map_err(CallEnd::Failed)?;
        if let Some(error) = next.ended_without_command {
            return Err(CallEnd::NothingNew(no_command_text(&error)));
        }
        if !next.settled.is_empty() && next.settled.is_subset(known) {
            let reason = "it sends again what was accepted: it does not read our replies";
            return Err(CallEnd::NothingNew(reason.to_owned()));
        }
        known.extend(&next.settled);
        Ok(next)
    }

    fn connect(&self) -> Result<(ClientSession, IpAddr), CallError> {
        self.try_connect().map_err(call_error)
    }

    /// Connects and authenticates. Returns the session and the provider's address.
    fn try_connect(&self) -> Result<(ClientSession, IpAddr), SessionFailure> {
        let Mailboxes { config, ids, .. } = &*self.customer.mailboxes;
        let (id, timeouts, cancel) = (&ids.session_id(), &config.timeouts, self.cancel);
        let outgoing = config.outgoing.as_ref();
        let options = ClientOptions {
            name: config.hostname.clone(),
            chunking: true,
            submits: true,
            atrn: true,
            nonce: ids.nonce(),
            without_8bitmime: outgoing.map(|outgoing| outgoing.without_8bitmime).unwrap_or_default(),
            ..ClientOptions::default()
        };
        let connect = Connect { id, peer: 'P', tls: None, implicit_tls: false, timeouts, cancel, limit: None };
        let (session, peer) = self.remote.connect(&options, &connect)?;
        let (provider, address) = (self.remote.address(), address::literal(peer.ip()));
        let tls = session.tls_info().map_or("none", |tls| tls.version);
        let mechanism = session.client().mechanism().map_or("-", Mechanism::name);
        log::info!("event=connected session={id} provider={provider} peer={address} tls={tls} mechanism={mechanism}");
        Ok((session, peer.ip()))
    }

    /// Does the customer's half of the turn, and serves the provider until it sends QUIT, or closes the connection
    /// without any command.
    fn serve_provider(&self, connection: Connection, client: Client, peer: IpAddr) -> Result<TurnResult, CallError> {
        let announced = client.messages_waiting();
        let Customer { mailboxes, outbox, retry_queue, soft_bounce, .. } = self.customer;
        let config = &mailboxes.config;
        let mut options =
            config.limits.server_options(ServerRole::Customer, &config.hostname, config.mailboxes.max_size);
        // A customer that sends no mail cannot send DSNs, so it must not offer DSN (RFC 3461).
        options.dsn = outbox.is_some();
        options.soft_bounce = *soft_bounce;
        let (connection, server) = turn::accept(connection, client, options, self.cancel).map_err(|error| {
            if self.cancel.is_cancelled() { stopped() } else { CallError::Protocol(error.to_string()) }
        })?;
        // `cancel` may end the session within a message: the provider still has it.
        let limits = SessionLimits::new(&config.timeouts, &config.limits, self.cancel, self.cancel);
        let limits = SessionLimits { session: config.timeouts.turn, ..limits };
        let hops = NextHops::new(mailboxes, self.cancel);
        let mut receiver = Receiver::new(retry_queue.clone(), self.counters.clone(), hops, *soft_bounce);
        let mut session = ServerSession::new(connection, server, address::literal(peer), None, limits);
        session.greet();
        let end = session.run(&mut receiver);
        session.close();
        let IncomingMail { messages, settled } = receiver.into_incoming();
        let result = |ended_without_command| TurnResult { announced, messages, settled, ended_without_command };
        match end {
            SessionEnd::Quit => Ok(result(None)),
            SessionEnd::NoCommand(error) => Ok(result(Some(error))),
            SessionEnd::Closed(reason) => Err(CallError::Temporary(format!("the call was cut short: {reason}"))),
            SessionEnd::TlsRecord => Err(CallError::Protocol(
                "the provider sent a TLS record in place of a message, that is TLS inside TLS; if it is Exim, its transport \
                 needs `hosts_nopass_tls = *`"
                    .to_owned(),
            )),
            SessionEnd::Atrn(_) => Err(CallError::Protocol("the provider sent ATRN".to_owned())),
        }
    }
}

/// Sends ATRN. Returns what the turn needs: the connection and the state of the client. `None`: there is no mail.
///
/// # Errors
/// The provider has rejected ATRN, or the session has failed.
fn atrn(session: ClientSession, domains: &[Domain]) -> Result<Option<(Connection, Client)>, SessionFailure> {
    match session.atrn(domains) {
        Ok(turned) => Ok(Some(turned)),
        Err(failure) if is_success(&failure) => Ok(None),
        Err(failure) => Err(failure),
    }
}

/// What the provider has sent after one turn.
struct TurnResult {
    /// How many messages were waiting; `None`: the provider has not announced it.
    announced: Option<u64>,
    /// How many messages the provider has offered.
    messages: u64,
    /// The fingerprints of the mail that was accepted or rejected ([`IncomingMail::settled`]).
    settled: HashSet<u64>,
    /// Why the session ended before the provider sent any command.
    ended_without_command: Option<io::Error>,
}

impl TurnResult {
    /// Whether another call would bring nothing new: no mail was settled in this one, or all that was announced was
    /// offered.
    fn is_all(&self) -> bool {
        self.settled.is_empty() || self.announced.is_some_and(|announced| self.messages >= announced)
    }
}

/// Why no further call follows at once.
enum CallEnd {
    /// The provider has no more mail, or the call was cancelled.
    Finished,
    /// The last call has brought no new mail, for this reason.
    NothingNew(String),
    Failed(CallError),
}

/// The error text for a turned session in which the provider sent no command.
fn no_command_text(error: &io::Error) -> String {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    match error.kind() {
        // Exim does that if none of its mail is due for a retry.
        BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof => {
            "the provider closed the turned connection without a command: its mail may not be due yet".to_owned()
        }
        _ => format!("the call was cut short: {error}"),
    }
}

/// The end of work in a thread: no value arrives, but the channel is disconnected then.
type UploadEnd = mpsc::Receiver<()>;

/// Begins work in a new thread; `None`: the system has no thread, which is logged.
fn spawn<'s>(scope: &'s Scope<'s, '_>, work: impl FnOnce() + Send + 's) -> Option<UploadEnd> {
    let (running, end) = mpsc::channel();
    let work = move || {
        work();
        drop(running);
    };
    match threads::spawn_scoped(scope, "upload", work) {
        Ok(()) => Some(end),
        Err(error) => {
            log_no_thread(&error);
            None
        }
    }
}

/// Whether the failure is the 453 of a provider that has no mail: then the call is a success (RFC 2645 section 5.2.1).
fn is_success(failure: &SessionFailure) -> bool {
    matches!(
        failure,
        SessionFailure::Aborted(Abort::Rejected(Rejection { stage: Stage::Atrn, reply })) if means_no_mail(reply)
    )
}

/// The error of a call whose session has failed.
pub(super) fn call_error(failure: SessionFailure) -> CallError {
    match failure {
        SessionFailure::Aborted(abort) => abort_error(abort),
        SessionFailure::Broken(text) => CallError::Protocol(text),
        SessionFailure::NoHost(text) => CallError::NoHost(format!("{text}; check `address` and the name server")),
        SessionFailure::Unreachable(text) => CallError::Unavailable(format!(
            "{text}; is `odmr serve` running there, and does no firewall close the port? check `address`: usually it is \
             port 366"
        )),
        SessionFailure::NoTls(text) | SessionFailure::Lost(text) => CallError::Temporary(text),
        SessionFailure::Cancelled => stopped(),
    }
}

fn stopped() -> CallError {
    CallError::Temporary("stopped".to_owned())
}

/// The error of a call whose session was aborted.
fn abort_error(abort: Abort) -> CallError {
    match abort {
        Abort::Rejected(Rejection { stage, reply }) => {
            let text = format!("the provider rejected {stage}: {reply}");
            match reply.severity() {
                Severity::Transient if stage == Stage::Atrn && is_too_soon(&reply) => CallError::TooSoon(text),
                Severity::Transient => CallError::Temporary(text),
                _ if stage == Stage::Auth || is_login_rejected(&reply) => {
                    CallError::Denied(format!("{text}; check `name` and `secret`, or `certificate`"))
                }
                _ => CallError::Protocol(text),
            }
        }
        Abort::NoStartTls => CallError::Protocol(
            "the provider offers no STARTTLS, so neither the secret nor mail was sent to it; \
             use `tls = \"implicit\"` if it has a port for that"
                .to_owned(),
        ),
        Abort::NoAtrn => CallError::Protocol(
            "the server does not offer ATRN, so it is not a provider of on-demand mail, and the secret was not sent to it; \
             check host and port in `address`"
                .to_owned(),
        ),
        Abort::NoMechanism { starttls: false, certificate: true } => CallError::Denied(
            "the provider does not know the certificate, and there is no `secret`: give its operator the pin that `odmr \
             check` prints, for `certificate` in the file of the account"
                .to_owned(),
        ),
        Abort::NoMechanism { starttls: true, .. } => CallError::Protocol(
            "the provider offers no authentication in clear, but STARTTLS: set `tls = \"starttls\"`".to_owned(),
        ),
        Abort::NoMechanism { starttls: false, certificate: false } => CallError::Protocol(
            "the provider offers no authentication that can be used: SCRAM-SHA-256, CRAM-MD5, or PLAIN under TLS; \
             `mechanisms` may permit others"
                .to_owned(),
        ),
        Abort::Unproven => CallError::Denied("the provider did not prove that it knows the secret".to_owned()),
        Abort::Unacceptable(text) => CallError::Denied(format!("the login was cancelled: the provider {text}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rules: AMB-13.
    #[test]
    fn a_long_list_of_domains_takes_several_connections() {
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
