//! Port 366 up to ATRN: which customer is this, which mail may it have, and what does it submit (RFC 2645 section 5)?
//!
//! A customer submits its outgoing mail before ATRN, as to any submission server (RFC 6409).
//!
//! The worker never becomes an SMTP client: it passes the connection to the delivery thread as a [`Turn`], or stays SMTP
//! server and replies why not. The replies to ATRN come in this order: 530, 503, 501 (the protocol's, in `smtp/server`),
//! then 450, 451, 453 (here), then 250 (the delivery thread's).

use std::sync::Arc;

use super::accept::{self, HeaderPolicy};
use super::shared::Shared;
use super::spool::SpoolQueue;
use crate::config::Account;
use crate::mail::address::{Domain, ForwardPath, Mailbox, ReversePath};
use crate::queue::{LockError, QueueLock};
use crate::sasl::{CredentialStore, Unavailable};
use crate::session::server::{ServerSession, SessionEnd};
use crate::smtp::command::{Envelope, MailFrom, Notify};
use crate::smtp::reply::Reply;
use crate::smtp::server::{Incoming, MessageSink, SessionHandler};
use crate::turn::Turn;

/// One session, up to its end or its turn; returns how it ended.
pub fn serve(shared: &Arc<Shared>, mut session: ServerSession) -> String {
    let mut handler = OdmrHandler { shared: shared.clone() };
    session.greet();
    loop {
        let domains = match session.run(&mut handler) {
            SessionEnd::Atrn(domains) => domains,
            end => {
                session.close();
                return end.to_string();
            }
        };
        let offered = match lock_mail(shared, session.server.account(), &domains) {
            Ok(lock) => Turn::offer(session, lock),
            Err(reply) => Err(Box::new((session, reply))),
        };
        let rejected = match offered {
            Ok(turn) => match shared.turns.submit(turn) {
                Ok(()) => return "turned".to_owned(),
                Err(turn) => {
                    Box::new((turn.withdraw(), Reply::new(451, "4.3.2", "Too many turned sessions, try again later")))
                }
            },
            Err(rejected) => rejected,
        };
        let reply;
        (session, reply) = *rejected;
        session.log_rejection(&reply);
        session.reply(&reply);
    }
}

/// Locks all mail that was asked for, if there is any; otherwise returns why not (RFC 2645 section 5.2.1).
fn lock_mail(shared: &Shared, account: Option<&str>, asked: &[Domain]) -> Result<QueueLock, Reply> {
    let account = account.and_then(|name| shared.config.accounts.account(name));
    let own = account.map(|account| account.domains.as_slice()).unwrap_or_default();
    // One foreign domain, existing or not, and no mail is sent for any of them.
    if own.is_empty() || asked.iter().any(|domain| !own.contains(domain)) {
        return Err(Reply::new(450, "4.7.1", "You have no access to all of these domains"));
    }
    let domains = if asked.is_empty() { own } else { asked };
    let names: Vec<_> = domains.iter().map(|domain| shared.spool.name(&SpoolQueue::Held(domain.clone()))).collect();
    let lock = match shared.spool.queue().lock(&names) {
        Ok(lock) => lock,
        Err(LockError::Busy(name)) => {
            return Err(Reply::new(450, "4.4.5", format!("Another session is fetching the mail of {name}")));
        }
        Err(LockError::Failed(error)) => return Err(unavailable(&error)),
    };
    match lock.is_empty() {
        Ok(false) => Ok(lock),
        // RFC 2645 section 5.2.1; the enhanced code is the one registered for 453 (RFC 5248).
        Ok(true) => Err(Reply::new(453, "4.3.2", "You have no mail")),
        Err(error) => Err(unavailable(&error)),
    }
}

fn unavailable(error: &std::io::Error) -> Reply {
    log::error!("event=spool-failed error={:?}", error.to_string());
    Reply::new(451, "4.3.0", "Your mail cannot be reached now, try again later")
}

struct OdmrHandler {
    shared: Arc<Shared>,
}

impl CredentialStore for OdmrHandler {
    fn secret(&self, name: &str) -> Result<Option<Vec<u8>>, Unavailable> {
        self.shared.config.accounts.secret(name)
    }

    fn challenge(&self) -> String {
        self.shared.ids.challenge(&self.shared.config.hostname)
    }
}

impl OdmrHandler {
    fn account(&self, name: Option<&str>) -> Result<&Account, Reply> {
        let account = name.and_then(|name| self.shared.config.accounts.account(name));
        account.ok_or_else(|| Reply::new(530, "5.7.0", "Authentication required"))
    }
}

impl SessionHandler for OdmrHandler {
    fn credentials(&self) -> &dyn CredentialStore {
        self
    }

    /// Which senders an account may use (RFC 6409 section 6.1), and how many messages it may submit.
    fn sender(&mut self, mail: &MailFrom, account: Option<&str>) -> Result<(), Reply> {
        let account = self.account(account)?;
        if !account.relay {
            return Err(Reply::new(550, "5.7.1", "This account hands in no outgoing mail"));
        }
        let own = match &mail.envelope.from {
            // RFC 6409 section 3.2: a DSN has no sender, and that is not a reason to reject it.
            ReversePath::Null => true,
            ReversePath::Mailbox(sender) => sender.domain().is_some_and(|domain| account.domains.contains(domain)),
        };
        if !own && !account.any_sender {
            return Err(Reply::new(550, "5.7.1", "That sender's domain is not this account's"));
        }
        self.shared.check_room(mail)?;
        if !self.shared.rates.admit(&account.name, account.rate, self.shared.ids.clock().now()) {
            return Err(Reply::new(452, "4.3.2", format!("No more than {} messages an hour", account.rate)));
        }
        Ok(())
    }

    fn recipient(&mut self, path: &ForwardPath, _: &Notify, _: Option<&str>) -> Result<Mailbox, Reply> {
        let mailbox = self.shared.mailbox(path)?;
        // RFC 6409 section 4.2: all domains are fully qualified.
        let qualified = mailbox.domain().is_some_and(|domain| domain.as_str().contains('.'));
        match self.shared.router.queue_for(&mailbox) {
            Some(SpoolQueue::Outgoing(_)) | None if !qualified => {
                Err(Reply::new(554, "5.1.2", "The domain is not fully qualified"))
            }
            _ => Ok(mailbox),
        }
    }

    fn size_limit(&self, account: Option<&str>) -> u64 {
        self.account(account).ok().and_then(|account| account.max_size).unwrap_or(u64::MAX)
    }

    fn receive(&mut self, envelope: &Envelope, incoming: &Incoming<'_>) -> Result<Box<dyn MessageSink>, Reply> {
        accept::store(&self.shared, envelope, incoming, HeaderPolicy::Complete)
    }
}
