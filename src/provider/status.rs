//! The status of a provider: its held mail and the last calls, read from its files, with or without a running `serve`.

use std::io;
use std::time::Duration;

use super::spool::{Spool, SpoolQueue};
use super::unknown::UnknownRecipients;
use crate::clock::Timestamp;
use crate::config::{KnownRecipients, ProviderConfig};
use crate::ids::Ids;
use crate::net::tls::ServerTls;
use crate::queue::QueueSummary;
use crate::report::calls::CallRecord;
use crate::report::clock_watch::ClockWatch;

/// The status of a provider.
pub struct ProviderStatus {
    pub accounts: Vec<AccountStatus>,
    /// Domains with mail whose account is removed, or whose account's file is skipped.
    pub unowned: Vec<DomainStatus>,
    pub postmaster: QueueSummary,
    /// Domains elsewhere for which mail waits.
    pub outgoing: Vec<DomainStatus>,
    /// The end of the certificate's validity; `None`: there is no certificate, or it cannot be read.
    pub certificate_until: Option<Timestamp>,
    /// The names of customers whose files have mistakes, and the errors: these are not among the accounts.
    pub skipped: Vec<(String, String)>,
    /// Whether an `odmr serve` with listeners runs; `None`: this user cannot find out.
    pub serve: Option<bool>,
    /// The last time when `serve` read the configuration.
    pub reload: Option<CallRecord>,
}

/// The mail that is held for a customer.
pub struct AccountStatus {
    pub name: String,
    /// The sum over all its domains.
    pub held: QueueSummary,
    pub domains: Vec<DomainStatus>,
    /// Whether these are all its domains.
    pub is_whole: bool,
    /// The quota: octets of files, and messages; `None`: no limit.
    pub quota_bytes: Option<u64>,
    pub quota_messages: Option<u64>,
    /// The number of recipients in its list, or the error in the list; `None`: it has no list.
    pub recipients: Option<Result<u64, String>>,
    pub call: Option<CallRecord>,
    /// When the next call is permitted; `None`: now.
    pub next_call: Option<Timestamp>,
    /// The number of learned recipients, which the customer's server does not know; `None`: the account does not learn them.
    pub learned: Option<usize>,
    /// The age at which its mail expires. `None`: never.
    pub expire_after: Option<Duration>,
    /// When its oldest message expires. `None`: it has none, or none expires.
    pub next_expiry: Option<Timestamp>,
}

impl AccountStatus {
    /// The used part of the quota, in percent: the higher of octets and messages. `None`: the account has no quota.
    pub fn quota_used(&self) -> Option<u64> {
        let (bytes, messages) = (self.held.bytes, self.held.messages);
        let percent = |used: u64, limit: u64| {
            u64::try_from(u128::from(used) * 100 / u128::from(limit.max(1))).unwrap_or(u64::MAX)
        };
        let of_bytes = self.quota_bytes.map(|limit| percent(bytes, limit));
        of_bytes.max(self.quota_messages.map(|limit| percent(messages, limit)))
    }
}

/// The mail that waits for a domain.
pub struct DomainStatus {
    pub domain: String,
    pub waiting: QueueSummary,
}

impl ProviderStatus {
    /// Reads the status of the accounts and domains for which `wanted` is true. `wanted` gets the account's name, if there
    /// is an account, and the domain.
    ///
    /// # Errors
    /// A directory cannot be read.
    pub fn read(
        config: &ProviderConfig, ids: &Ids, wanted: impl Fn(Option<&str>, &str) -> bool,
    ) -> io::Result<ProviderStatus> {
        let spool = Spool::new(config, ids);
        let summary = |queue: &SpoolQueue| spool.queue().summary(&spool.name(queue));
        let (mut accounts, now) = (Vec::new(), ids.clock().now());
        let history = ClockWatch::new(&config.spool, ids.clock()).history();
        for account in config.accounts.iter() {
            let call = CallRecord::read(&spool.call_record(&account.name));
            let learned = || UnknownRecipients::read(&spool.unknown_recipients(&account.name)).learned(now);
            let mut status = AccountStatus {
                name: account.name.clone(),
                held: QueueSummary::default(),
                domains: Vec::new(),
                next_call: call.as_ref().and_then(|last| last.next_call(&[], account.held.min_interval, now)),
                is_whole: true,
                quota_bytes: account.held.max_bytes,
                quota_messages: account.held.max_messages.map(|messages| messages as u64),
                recipients: match account.held.recipients.read() {
                    Ok(list) => list.map(|list| Ok(list.count())),
                    Err(error) => Some(Err(error.to_string())),
                },
                call,
                learned: (account.held.recipients == KnownRecipients::Learn).then(learned),
                expire_after: account.held.expire_after,
                next_expiry: None,
            };
            for domain in account.domains.iter().filter(|domain| wanted(Some(&account.name), domain.as_str())) {
                let waiting = summary(&SpoolQueue::Held(domain.clone()))?;
                status.held.add(&waiting);
                status.domains.push(DomainStatus { domain: domain.to_string(), waiting });
            }
            status.is_whole = status.domains.len() == account.domains.len();
            let oldest = status.held.oldest.zip(account.held.expire_after);
            status.next_expiry = oldest.map(|(oldest, age)| history.when(oldest, age));
            if !status.domains.is_empty() {
                accounts.push(status);
            }
        }
        let (mut unowned, mut postmaster) = (Vec::new(), QueueSummary::default());
        let mut outgoing = spool.queue().summaries(&spool.name(&SpoolQueue::AllOutgoing))?;
        for (_, queue) in spool.all_queues()? {
            match &queue {
                SpoolQueue::Postmaster if wanted(None, "postmaster") => postmaster = summary(&queue)?,
                SpoolQueue::Held(domain) if spool.owner(domain).is_none() && wanted(None, domain.as_str()) => {
                    unowned.push(DomainStatus { domain: domain.to_string(), waiting: summary(&queue)? });
                }
                SpoolQueue::OldOutgoing(domain) => outgoing.entry(domain.clone()).or_default().add(&summary(&queue)?),
                _ => {}
            }
        }
        let outgoing =
            outgoing.into_iter().map(|(domain, waiting)| DomainStatus { domain: domain.to_string(), waiting });
        let mut outgoing: Vec<_> = outgoing.filter(|status| wanted(None, &status.domain)).collect();
        [&mut unowned, &mut outgoing].into_iter().for_each(|list| list.retain(|status| !status.waiting.is_empty()));
        let tls = config.tls.as_ref().and_then(|files| ServerTls::load(&files.certificate, &files.key).ok());
        let skipped = config.accounts.skipped().iter();
        Ok(ProviderStatus {
            accounts,
            unowned,
            postmaster,
            outgoing,
            certificate_until: tls.and_then(|tls| tls.until()),
            skipped: skipped.map(|skipped| (skipped.name.clone(), skipped.error.to_string())).collect(),
            serve: spool.is_locked().ok(),
            reload: CallRecord::read(&spool.reload_record()),
        })
    }
}
