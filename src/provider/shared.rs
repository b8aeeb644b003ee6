//! The state that all threads of a provider share.

use std::sync::Arc;

use super::delivery::TurnSender;
use super::logins::Logins;
use super::rates::SubmissionRates;
use super::relay::{RelayHandle, WorkerContext};
use super::spool::Spool;
use super::turn_settings::{LostDomains, TurnSettings};
use super::unknown::UnknownCache;
use super::verifiers::Verifiers;
use crate::config::{KnownRecipients, ProviderConfig};
use crate::ids::Ids;
use crate::mail::address::{ForwardPath, Mailbox};
use crate::net::cancel::CancelToken;
use crate::net::limiter::ConnectionLimiter;
use crate::net::tls::ServerTls;
use crate::report::calls::CallRecord;
use crate::report::clock_watch::ClockWatch;
use crate::smtp::command::MailFrom;
use crate::smtp::reply::Reply;

/// The part of the state that outlives reloads.
#[derive(Clone)]
pub struct Lasting {
    pub ids: Ids,
    pub turns: Arc<TurnSender>,
    pub relay: RelayHandle,
    pub rates: Arc<SubmissionRates>,
    pub verifiers: Arc<Verifiers>,
    pub logins: Arc<Logins>,
    pub lost: Arc<LostDomains>,
    pub unknown: Arc<UnknownCache>,
    /// Ends sessions after the command or message under way.
    pub cancel: CancelToken,
    /// Ends sessions at once.
    pub abort: CancelToken,
    pub limiter: ConnectionLimiter,
    /// The clock by which mail expires.
    pub watch: Arc<ClockWatch>,
}

/// The state that all threads of a provider share. A reload replaces it for new sessions and transactions.
#[derive(Clone)]
pub struct Shared {
    pub config: ProviderConfig,
    pub spool: Arc<Spool>,
    pub turn_settings: Arc<TurnSettings>,
    pub worker: Arc<WorkerContext>,
    /// The provider's certificate; `None`: without TLS.
    pub tls: Option<ServerTls>,
    pub lasting: Lasting,
}

impl Shared {
    /// Reads the key that sessions on port 366 need, before the first of them.
    pub fn read_login_key(&self) {
        self.lasting.verifiers.set_key(self.spool.login_key(&self.lasting.ids));
    }

    /// Checks that the disk has room for a message of the size that MAIL declares (RFC 1870 section 6.1).
    ///
    /// # Errors
    /// The reply to MAIL.
    pub fn check_room(&self, mail: &MailFrom) -> Result<(), Reply> {
        self.spool.check_room(mail.size.unwrap_or(0))
    }

    /// Checks, for a customer with `recipients = "learn"`, that its server has not rejected this recipient lately.
    ///
    /// # Errors
    /// The reply to RCPT, 550 (RFC 5321 section 3.3).
    pub fn check_learned(&self, mailbox: &Mailbox) -> Result<(), Reply> {
        let Some(owner) = mailbox.domain().and_then(|domain| self.config.accounts.owner(domain)) else {
            return Ok(());
        };
        let (file, now) = (self.spool.unknown_recipients(&owner.name), self.lasting.ids.clock().now());
        let learns = owner.held.recipients == KnownRecipients::Learn;
        match learns && self.lasting.unknown.is_learned(&file, mailbox, now) {
            true => Err(Reply::new(550, "5.1.1", "The server that this mail is for does not know that recipient")),
            false => Ok(()),
        }
    }

    /// Records for `odmr status` that the configuration was read, or the error.
    pub fn record_reload(&self, error: Option<&str>) {
        CallRecord::of_reload(self.lasting.ids.clock().now(), error).write(&self.spool.reload_record(), "-");
    }

    /// The mailbox of a path. `Postmaster` without a domain is the provider's own (RFC 5321 section 4.5.1).
    ///
    /// # Errors
    /// The reply to RCPT: the provider's hostname is not a domain.
    pub fn mailbox(&self, path: &ForwardPath) -> Result<Mailbox, Reply> {
        match path {
            ForwardPath::Mailbox(mailbox) => Ok(mailbox.clone()),
            ForwardPath::Postmaster => Mailbox::parse(&format!("postmaster@{}", self.config.hostname))
                .ok_or_else(|| Reply::new(550, "5.1.1", "There is no postmaster here")),
        }
    }
}
