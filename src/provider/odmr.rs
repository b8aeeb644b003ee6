//! Port 366 up to ATRN: a customer logs in, submits its outgoing mail, and asks for the mail that is held for it.
//!
//! Before ATRN the session is that of a submission server (RFC 6409) with AUTH (RFC 2645 section 5.1). At ATRN (section
//! 5.2.1) the worker locks the mail of the account and gives the connection, as a [`Turn`], to the delivery thread. The
//! worker never becomes an SMTP client. If there is no turn, the session goes on, and the reply says why:
//!
//! ```text
//! 530 503 501   not authenticated, in a transaction, not a valid domain       smtp/server
//! 450           a domain is not the customer's, or another session has it     lock_mail
//! 450           the last call has brought no mail, and was a moment ago       check_interval
//! 451           the spool cannot be read                                      lock_mail
//! 453           no mail                                                       lock_mail
//! 503           commands were sent after ATRN without waiting for its reply   Turn::offer
//! 451           as many turned sessions as permitted, or too many that wait   turn
//!               for a disk
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

/// Serves one session until it ends or its connection has turned. Returns how it ended, for the log.
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
            // An attempt that the client has given up ends before its connection.
            drop(handler);
            session.close();
            return end.to_string();
        };
        // An account that was removed meanwhile, or has other domains, gets no mail of its old ones.
        let shared = reloader.current();
        let reply;
        (session, reply) = match turn(&shared, session, &domains) {
            Ok(()) => return "turned".to_owned(),
            Err(rejected) => rejected,
        };
        // The call that it comes too soon after stays the last one.
        if !is_too_soon(&reply) {
            record_call(&shared, &session, &domains, &reply);
        }
        session.reject(&reply);
    }
}

/// Records a call about these domains that has ended with a reply to ATRN, for the status and for [`check_interval`].
// Not below each command on the stack, as `turn`.
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

/// Checks that the last call of the account that has brought no mail for one of these domains was not a moment ago (RFC 2645
/// section 5.2.1). Each such call costs a login and a look at the disk.
///
/// # Errors
/// The reply to ATRN.
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

/// Gives the connection to the delivery thread, which sends the 250.
///
/// # Errors
/// The session and the reply to ATRN: the connection does not turn, and nothing is locked.
// Inlined, its room on the stack would be below that of each command of the session.
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

/// Locks the account, for the domains that the customer named, or for all its domains if it named none.
///
/// # Errors
/// The reply to ATRN, if a domain is not the customer's, a queue is locked or unreadable, or there is no mail.
fn lock_mail(shared: &Shared, account: Option<&Account>, named: &[Domain]) -> Result<QueueLock, Reply> {
    let own = account.map(|account| account.domains.as_slice()).unwrap_or_default();
    // RFC 2645 section 5.2.1: one foreign domain, whether it exists or not, and the customer gets no mail at all.
    let foreign = named.iter().find(|domain| !own.contains(domain));
    foreign.map_or(Ok(()), |foreign| shared.spool.check_skipped(foreign))?;
    if own.is_empty() || foreign.is_some() {
        return Err(Reply::new(450, "4.7.1", "You have no access to all of these domains"));
    }
    account.map_or(Ok(()), |account| check_interval(shared, account, named))?;
    let domains = if named.is_empty() { own } else { named };
    let names: Vec<_> = domains.iter().map(|domain| shared.spool.name(&SpoolQueue::Held(domain.clone()))).collect();
    let unreachable = || Reply::new(451, "4.3.0", "Your mail cannot be reached now, try again later");
    let unavailable = |error: std::io::Error| {
        log::error!("event=spool-failed error={}", quoted(error));
        unreachable()
    };
    let mut lock = shared.spool.queue().lock_account(&names).map_err(|error| match error {
        LockError::Busy(name) => Reply::new(450, "4.4.5", format!("Another session is fetching the mail of {name}")),
        LockError::Failed(error) => unavailable(error),
    })?;
    // The enhanced status code is the one that is registered for 453 (RFC 5248).
    let no_mail = || Reply::new(453, "4.3.2", "You have no mail");
    // Files that are no mail, and messages that this call skips, would make a turn for nothing.
    let none = lock.is_empty().map_err(unavailable)? || !lock.has_next();
    // Whether there is mail in a directory that cannot be read, nobody knows.
    if lock.is_short() || none && lock.is_unreadable() {
        return Err(unreachable());
    }
    if none {
        lock.count_call();
        return Err(no_mail());
    }
    Ok(lock)
}

/// Decides who is authenticated, and which mail a customer may submit.
struct OdmrHandler<'a> {
    reloader: &'a Reloader,
    /// Of the transaction.
    shared: Arc<Shared>,
    held: HeldQueues,
    /// The account, and how many messages it may submit in an hour.
    rate: Option<(String, usize)>,
    client: OdmrClient,
    /// The AUTH command under way, or why it is not decided.
    attempt: RefCell<Option<Result<LoginAttempt, Undecided>>>,
}

/// Where attempts to authenticate come from.
struct OdmrClient {
    /// `None`: it is not known, as of a pipe.
    address: Option<IpAddr>,
    /// The id of the session, and the client's address as a literal, for the log.
    session: String,
    peer: String,
    /// The connection.
    input: Arc<OwnedFd>,
}

impl OdmrHandler<'_> {
    fn origin(&self, name: &str) -> Result<AttemptOrigin, Unavailable> {
        let account = name_digest(self.shared.lasting.verifiers.key()?, name);
        Ok(AttemptOrigin { id: self.client.session.clone(), address: self.client.address, account })
    }

    /// Waits until an AUTH command may be decided, which tries secrets for the account of this name: before anything is
    /// verified, so that the time tells nothing about the result.
    ///
    /// # Errors
    /// It must not be decided, and the session ends.
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

/// What opens an account now: a secret that was changed because others know it must not be of use in a session that was open
/// before.
impl CredentialStore for OdmrHandler<'_> {
    fn credentials(&self, name: &str) -> Result<Option<AccountCredentials>, Unavailable> {
        self.wait_for_attempt(name)?;
        // The wait was long enough for a reload.
        self.reloader.current().config.accounts.credentials(name)
    }

    fn account_of(
        &self, certificate: &CertificateDigests, wanted: Option<&str>,
    ) -> Result<Option<String>, Unavailable> {
        // Nobody can guess a certificate, so none waits: then guesses of its secret never delay a customer that has one.
        self.reloader.current().config.accounts.account_of(certificate, wanted)
    }

    fn knows(&self, certificate: &CertificateDigests) -> bool {
        self.reloader.current().config.accounts.knows(certificate)
    }

    fn verifier(&self, name: &str) -> Result<(ScramVerifier, bool), Unavailable> {
        self.wait_for_attempt(name)?;
        // The wait was long enough for a reload.
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

/// The account of this name, as it is now. `None`: it was removed.
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
            // No secret was compared.
            None | Some(ExchangeStep::Malformed | ExchangeStep::Unavailable) => AttemptEnd::Withdrawn,
        };
        match (self.attempt.take(), step) {
            (Some(Ok(attempt)), _) => attempt.end(end),
            // RFC 5321 section 3.8.
            (Some(Err(Undecided::Stopping)), _) => {
                return Some(Reply::new(421, "4.3.2", "Service shutting down, try again later"));
            }
            (Some(Err(Undecided::TooMany | Undecided::ClientGone)), _) => {
                return Some(Reply::new(421, "4.7.0", "Too many failed authentications, try again later"));
            }
            // By EXTERNAL.
            (None, Some(ExchangeStep::Done(account))) => {
                self.origin(account).into_iter().for_each(|origin| self.shared.lasting.logins.learn(origin));
            }
            (None, _) => {}
        }
        None
    }

    /// Checks that the customer may submit mail with this sender (RFC 6409 section 6.1), and now.
    fn sender(&mut self, mail: &MailFrom, name: Option<&str>) -> Result<(), Reply> {
        (self.shared, self.held) = (self.reloader.current(), HeldQueues::begin(mail));
        // Not 5yz: the customer keeps its mail, and gets 535 at the next AUTH.
        let gone = || Reply::new(450, "4.7.1", "Your account is not known here any more");
        let account = account(&self.shared, name).ok_or_else(gone)?;
        if !account.relay {
            return Err(Reply::new(550, "5.7.1", "This account hands in no outgoing mail"));
        }
        let own = match &mail.envelope.from {
            // A DSN has the null sender, and must not be rejected for it (RFC 6409 section 3.2).
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

    /// Accepts recipients in held domains, and in all others that are fully qualified (RFC 6409 section 4.2).
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
