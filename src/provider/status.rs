//! What a provider holds, and what became of the last calls: read from its files, with or without a running `serve`.

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
    /// Domains that have mail and belong to no account any more, or to one whose file is skipped.
    pub unowned: Vec<DomainStatus>,
    pub postmaster: QueueSummary,
    /// Destinations elsewhere that have mail.
    pub outgoing: Vec<DomainStatus>,
    /// The end of the certificate's validity; `None`: there is no certificate, or it cannot be read.
    pub certificate_until: Option<Timestamp>,
    /// Customers' files with mistakes, and what is wrong: their customers are not among the accounts.
    pub skipped: Vec<(String, String)>,
    /// Whether an `odmr serve` with listeners runs; `None`: this user may not see that.
    pub serve: Option<bool>,
    /// The last reading of the configuration by `serve`.
    pub reload: Option<CallRecord>,
}

/// The mail that is held for a customer.
pub struct AccountStatus {
    pub name: String,
    /// Of all its domains.
    pub held: QueueSummary,
    pub domains: Vec<DomainStatus>,
    /// Whether these are all its domains.
    pub is_whole: bool,
    /// Octets of files, and messages, that may be held.
    pub quota_bytes: Option<u64>,
    pub quota_messages: Option<u64>,
    /// How many recipients it has named, if it has, or what is wrong with its list.
    pub recipients: Option<Result<u64, String>>,
    pub call: Option<CallRecord>,
    /// When the next call is permitted; `None`: now.
    pub next_call: Option<Timestamp>,
    /// How many recipients are rejected because the customer's server does not know them; `None`: it does not learn them.
    pub learned: Option<usize>,
    /// The age at which its mail expires. `None`: never.
    pub expire_after: Option<Duration>,
    /// When its oldest message expires. `None`: none does.
    pub next_expiry: Option<Timestamp>,
}

impl AccountStatus {
    /// How much of its quota is used up, in percent: of octets or of messages, whichever is more. `None`: it has none.
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
    /// Reads the status of the accounts and domains for which `wanted` is true; it gets the name of an account, if there is
    /// one, and a domain.
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
