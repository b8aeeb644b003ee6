//! Port 366 up to ATRN: a customer authenticates, submits its outgoing mail, and asks for the mail that is held for it.
//!
//! Before ATRN the session is that of a submission server (RFC 6409) with AUTH (RFC 2645 section 5.1). At ATRN (section
//! 5.2.1) the worker locks the account's mail and passes the connection, as a [`Turn`], to the delivery thread. The
//! worker never becomes an SMTP client. If the connection does not turn, the session goes on, and the reply gives the
//! reason:
//!
//! ```text
//! 530 503 501   not authenticated, in a transaction, not a valid domain       smtp/server
//! 450           a domain is not the customer's, or another session has its    lock_mail
//!               lock
//! 450           the last call found no mail, and ended less than              check_interval
//!               `min-interval` ago
//! 451           the spool, or the file of a domain's account, cannot be read  lock_mail
//! 453           no mail                                                       lock_mail
//! 503           the client sent commands after ATRN without waiting for its   Turn::offer
//!               reply
//! 451           there are as many turned sessions as permitted, or too many   turn
//!               of them wait for a disk
//! 250           the connection turns                                          delivery thread
//! ```

use std::cell::RefCell;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::accept::{self, HeaderPolicy, HeldQueues};
use super::login_table::{AttemptEnd, AttemptOrigin};
use super::logins::{LoginAttempt, Undecided};
use super::reload::Reloader;
use super::shared::{Lasting, Shared};
use super::spool::SpoolQueue;
use crate::config::Account;
use crate::mail::address::{Domain, ForwardPath, Mailbox, ReversePath};
use crate::net::trace::quoted;
use crate::queue::{LockError, QueueLock};
use crate::report::calls::{CallRecord, CallResult, CallWithoutMail};
use crate::sasl::{
    AccountCredentials, CertificateDigests, CredentialStore, ExchangeStep, Mechanism, ScramVerifier, Unavailable,
    name_digest,
};
use crate::session::server::{ServerSession, SessionEnd};
use crate::smtp::command::{Envelope, MailFrom, Notify};
use crate::smtp::reply::Reply;
use crate::smtp::server::{Incoming, MessageSink, SessionHandler, check_qualified};
use crate::smtp::status::{is_too_soon, means_no_mail, too_soon_reply};
use crate::turn::Turn;

/// Serves one session until it ends or its connection has turned. Returns the reason of its end, for the log.
pub fn serve(reloader: &Reloader, mut session: Box<ServerSession>, address: Option<IpAddr>) -> String {
    let mut handler = OdmrHandler {
        reloader,
        shared: reloader.current(),
        held: HeldQueues::default(),
        rate: None,
        client: OdmrClient {
            address,
            session: session.connection.trace.id.clone(),
            peer: session.peer.clone(),
            input: session.connection.share_input(),
        },
        attempt: RefCell::new(None),
    };
    session.greet();
    loop {
        let end = session.run(&mut handler);
        let SessionEnd::Atrn(domains) = end else {
            // The handler ends an AUTH that the client has abandoned: do it before the connection is closed.
            drop(handler);
            session.close();
            return end.to_string();
        };
        // A reload since AUTH may have removed the account, or some of its domains.
        let shared = reloader.current();
        let Err((returned, reply)) = turn(&shared, session, &domains) else { return "turned".to_owned() };
        session = returned;
        // If ATRN came too soon, the record of the earlier call stays: otherwise each attempt would begin the interval anew.
        if !is_too_soon(&reply) {
            record_call(&shared, &session, &domains, &reply);
        }
        session.reject(&reply);
    }
}

/// Records a call about these domains that has ended with a negative reply to ATRN, for `odmr status` and for
/// [`check_interval`].
// Not inlined, for the same reason as `turn`.
#[inline(never)]
fn record_call(shared: &Shared, session: &ServerSession, domains: &[Domain], reply: &Reply) {
    let Some(account) = session.server.account().and_then(|name| shared.config.accounts.account(name)) else { return };
    let (path, now) = (shared.spool.call_record(&account.name), shared.lasting.ids.clock().now());
    let (result, reason) = match means_no_mail(reply) {
        true => (CallResult::NoMail, "done".to_owned()),
        false => (CallResult::Failed, reply.to_string()),
    };
    let mut record = CallRecord::new(now, &session.peer, result, &reason);
    let interval = account.held.min_interval;
    if result == CallResult::NoMail && !interval.is_zero() {
        let before = CallRecord::read(&path).map(|record| record.without_mail).unwrap_or_default();
        record.without_mail = CallWithoutMail::new(now, domains).add_to(before, interval);
    }
    record.write(&path, &account.name);
}

/// Checks that `min-interval` has passed since the account's last call without mail for one of these domains (RFC 2645
/// section 5.2.1): each call costs a login and a read of the disk.
///
/// # Errors
/// The reply to ATRN, 450.
fn check_interval(shared: &Shared, account: &Account, domains: &[Domain]) -> Result<(), Reply> {
    let interval = account.held.min_interval;
    if interval.is_zero() {
        return Ok(());
    }
    let now = shared.lasting.ids.clock().now();
    let last = CallRecord::read(&shared.spool.call_record(&account.name));
    match last.and_then(|last| last.next_call(domains, interval, now)) {
        Some(next) => Err(too_soon_reply(next.seconds() - now.seconds())),
        None => Ok(()),
    }
}

/// Passes the connection to the delivery thread, which sends the 250.
///
/// # Errors
/// The session and the reply to ATRN: the connection does not turn, and nothing is locked.
// Not inlined: its stack frame would add to that of every command of the session.
#[inline(never)]
fn turn(shared: &Shared, session: Box<ServerSession>, domains: &[Domain]) -> Result<(), (Box<ServerSession>, Reply)> {
    let account = session.server.account().and_then(|name| shared.config.accounts.account(name));
    let lock = match lock_mail(shared, account, domains) {
        Ok(lock) => lock,
        Err(reply) => return Err((session, reply)),
    };
    let turn = Turn::offer(session, lock)?;
    let (settings, defaults) = (&shared.turn_settings, shared.turn_settings.limits);
    let limits = account.map_or(defaults, |account| defaults.of_account(&account.held));
    shared.lasting.turns.submit(turn, settings, limits).map_err(|turn| {
        let reply = Reply::new(451, "4.3.2", "Too many turned sessions, try again later");
        (turn.withdraw(), reply)
    })
}

/// Locks the account's queues: those of the domains that the customer named, or of all its domains if it named none.
///
/// # Errors
/// The reply to ATRN: a domain is not the customer's, a queue is locked or unreadable, or there is no mail.
fn lock_mail(shared: &Shared, account: Option<&Account>, named: &[Domain]) -> Result<QueueLock, Reply> {
    let own = account.map(|account| account.domains.as_slice()).unwrap_or_default();
    let foreign = named.iter().find(|domain| !own.contains(domain));
    // The domain may belong to an account whose file cannot be read: then 451, not 450.
    foreign.map_or(Ok(()), |foreign| shared.spool.check_not_skipped(foreign))?;
    // RFC 2645 section 5.2.1: if one domain is foreign, whether it exists or not, the whole command is rejected.
    if own.is_empty() || foreign.is_some() {
        return Err(Reply::new(450, "4.7.1", "You have no access to all of these domains"));
    }
    account.map_or(Ok(()), |account| check_interval(shared, account, named))?;
    let domains = if named.is_empty() { own } else { named };
    let names: Vec<_> = domains.iter().map(|domain| shared.spool.name(&SpoolQueue::Held(domain.clone()))).collect();
    let not_now = || Reply::new(451, "4.3.0", "Your mail cannot be reached now, try again later");
    let log_and_defer = |error: std::io::Error| {
        log::error!("event=spool-failed error={}", quoted(error));
        not_now()
    };
    let mut lock = shared.spool.queue().lock_account(&names).map_err(|error| match error {
        LockError::Busy(name) => Reply::new(450, "4.4.5", format!("Another session is fetching the mail of {name}")),
        LockError::Failed(error) => log_and_defer(error),
    })?;
    // Files that are not mail, and messages that this call skips, do not count: the turn would send nothing.
    let none = lock.is_empty().map_err(log_and_defer)? || !lock.has_next();
    // Do not reply 453 if a directory cannot be read: it may have mail.
    if lock.is_short() || none && lock.is_unreadable() {
        return Err(not_now());
    }
    if none {
        lock.count_call();
        // RFC 5248 registers this enhanced status code for 453.
        return Err(Reply::new(453, "4.3.2", "You have no mail"));
    }
    Ok(lock)
}

/// Decides which clients are authenticated, and which mail a customer may submit.
struct OdmrHandler<'a> {
    reloader: &'a Reloader,
    /// The state that the current transaction began with.
    shared: Arc<Shared>,
    held: HeldQueues,
    /// The account, and how many messages it may submit in an hour (0: no limit).
    rate: Option<(String, usize)>,
    client: OdmrClient,
    /// The AUTH command under way, or why the server does not decide it.
    attempt: RefCell<Option<Result<LoginAttempt, Undecided>>>,
}

/// The client that attempts to authenticate.
struct OdmrClient {
    /// `None`: unknown, for instance of a pipe.
    address: Option<IpAddr>,
    /// The session's id, and the client's address as a literal, for the log.
    session: String,
    peer: String,
    /// The connection, watched for its end while an attempt waits.
    input: Arc<OwnedFd>,
}

impl OdmrHandler<'_> {
    fn origin(&self, name: &str) -> Result<AttemptOrigin, Unavailable> {
        let account = name_digest(self.shared.lasting.verifiers.key()?, name);
        Ok(AttemptOrigin { id: self.client.session.clone(), address: self.client.address, account })
    }

    /// Waits until an AUTH command for the account of this name may be decided. The wait comes before the verification:
    /// otherwise its length would reveal the result.
    ///
    /// # Errors
    /// The command must not be decided, and the session ends.
    fn wait_for_attempt(&self, name: &str) -> Result<(), Unavailable> {
        let Lasting { logins, cancel, .. } = &self.shared.lasting;
        let OdmrClient { session, peer, input, .. } = &self.client;
        let log = |seconds: Option<u32>, times: usize| {
            let account = quoted(name);
            match seconds {
                Some(seconds) => log::warn!(
                    "event=auth-slowed session={session} peer={peer} account={account} duration={seconds} times={times}"
                ),
                None => log::warn!(
                    "event=auth-slowed session={session} peer={peer} account={account} times={times} \
                     reason=\"too many attempts wait\""
                ),
            }
        };
        let waited = LoginAttempt::wait(logins, self.origin(name)?, input.as_fd(), cancel, &log);
        let result = waited.as_ref().map(|_| ()).map_err(|_| Unavailable);
        self.attempt.replace(Some(waited));
        result
    }
}

/// The credentials of the accounts as they are now: a secret that was replaced because it leaked must not work in a session
/// that began before.
impl CredentialStore for OdmrHandler<'_> {
    fn credentials(&self, name: &str) -> Result<Option<AccountCredentials>, Unavailable> {
        self.wait_for_attempt(name)?;
        // Read the accounts after the wait: there may have been a reload.
        self.reloader.current().config.accounts.credentials(name)
    }

    fn account_of(
        &self, certificate: &CertificateDigests, wanted: Option<&str>,
    ) -> Result<Option<String>, Unavailable> {
        // A certificate cannot be guessed, so its client does not wait: guesses of the account's secret by others do not delay
        // a customer with a certificate.
        self.reloader.current().config.accounts.account_of(certificate, wanted)
    }

    fn knows(&self, certificate: &CertificateDigests) -> bool {
        self.reloader.current().config.accounts.knows(certificate)
    }

    fn verifier(&self, name: &str) -> Result<(ScramVerifier, bool), Unavailable> {
        self.wait_for_attempt(name)?;
        // As in `credentials`, after the wait.
        let Shared { config, lasting, .. } = &*self.reloader.current();
        lasting.verifiers.find(&config.accounts, name)
    }

    fn salted_password(&self, secret: &[u8], verifier: &ScramVerifier) -> Result<[u8; 32], Unavailable> {
        self.shared.lasting.verifiers.salted_password(secret, &verifier.salt, verifier.iterations)
    }

    fn challenge(&self) -> String {
        self.shared.lasting.ids.challenge(&self.shared.config.hostname)
    }

    fn nonce(&self) -> String {
        self.shared.lasting.ids.nonce()
    }
}

/// The account of this name. `None`: it was removed.
fn account(shared: &Shared, name: Option<&str>) -> Option<Account> {
    name.and_then(|name| shared.config.accounts.account(name)).cloned()
}

impl SessionHandler for OdmrHandler<'_> {
    fn credentials(&self) -> &dyn CredentialStore {
        self
    }

    fn permits(&self, account: &str, mechanism: Mechanism) -> bool {
        let shared = self.reloader.current();
        shared.config.accounts.account(account).is_some_and(|account| account.permits(mechanism))
    }

    fn authentication_step(&mut self, step: Option<&ExchangeStep>) -> Option<Reply> {
        let end = match step {
            Some(ExchangeStep::Challenge(_)) => return None,
            Some(ExchangeStep::Done(_)) => AttemptEnd::Succeeded,
            Some(ExchangeStep::Failed(_)) => AttemptEnd::Failed,
            // The server has compared no secret.
            None | Some(ExchangeStep::Malformed | ExchangeStep::Unavailable) => AttemptEnd::Withdrawn,
        };
        match (self.attempt.take(), step) {
            (Some(Ok(attempt)), _) => attempt.end(end),
            // RFC 5321 section 3.8: a server that shuts down replies 421.
            (Some(Err(Undecided::Stopping)), _) => {
                return Some(Reply::new(421, "4.3.2", "Service shutting down, try again later"));
            }
            (Some(Err(Undecided::TooMany | Undecided::ClientGone)), _) => {
                return Some(Reply::new(421, "4.7.0", "Too many failed authentications, try again later"));
            }
            // EXTERNAL does not wait, but the client's network counts as known from now on.
            (None, Some(ExchangeStep::Done(account))) => {
                self.origin(account).into_iter().for_each(|origin| self.shared.lasting.logins.learn(origin));
            }
            (None, _) => {}
        }
        None
    }

    /// Checks that the customer may submit mail with this sender (RFC 6409 section 6.1), and that the disk has room and the
    /// account's rate is not reached.
    fn sender(&mut self, mail: &MailFrom, name: Option<&str>) -> Result<(), Reply> {
        (self.shared, self.held) = (self.reloader.current(), HeldQueues::begin(mail));
        // Not 5yz: the customer would return the mail to its senders. It gets 535 at its next AUTH.
        let removed = || Reply::new(450, "4.7.1", "Your account is not known here any more");
        let account = account(&self.shared, name).ok_or_else(removed)?;
        if !account.relay {
            return Err(Reply::new(550, "5.7.1", "This account may not submit outgoing mail"));
        }
        let own = match &mail.envelope.from {
            // RFC 6409 section 3.2: a DSN has the null sender, and must not be rejected for it.
            ReversePath::Null => true,
            ReversePath::Mailbox(sender) => sender.domain().is_some_and(|domain| account.domains.contains(domain)),
        };
        if !own && !account.any_sender {
            return Err(Reply::new(550, "5.7.1", "That sender's domain is not this account's"));
        }
        self.shared.check_room(mail)?;
        self.shared.lasting.rates.check(&account.name, account.rate)?;
        self.rate = Some((account.name, account.rate));
        Ok(())
    }

    /// Accepts recipients in held domains, and in all other domains that are fully qualified (RFC 6409 section 4.2).
    fn recipient(&mut self, path: &ForwardPath, _: &Notify, _: Option<&str>) -> Result<Mailbox, Reply> {
        let mailbox = self.shared.mailbox(path)?;
        if let Some(queue) = self.shared.spool.held_queue(&mailbox) {
            return self.held.add(&self.shared, &mailbox, queue);
        }
        check_qualified(&mailbox).map(|()| mailbox)
    }

    fn domains(&self, name: &str) -> Vec<Domain> {
        account(&self.reloader.current(), Some(name)).map(|account| account.domains).unwrap_or_default()
    }

    fn size_limit(&self, name: Option<&str>) -> u64 {
        account(&self.reloader.current(), name).and_then(|account| account.max_size).unwrap_or(u64::MAX)
    }

    fn receive(&mut self, envelope: &Envelope, incoming: &Incoming<'_>) -> Result<Box<dyn MessageSink>, Reply> {
        let permit = match &self.rate {
            Some((name, rate)) => self.shared.lasting.rates.admit(name, *rate)?,
            None => None,
        };
        accept::store(&self.shared, envelope, incoming, HeaderPolicy::Relay, permit)
    }
}
