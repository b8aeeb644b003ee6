//! The provider's spool: its queues, and which of them a recipient's mail goes to.
//!
//! ```text
//! SPOOL/domains/<domain>/     mail for a customer's domain, until the customer fetches it
//! SPOOL/outgoing/@all/        mail from customers and DSNs for domains elsewhere, until the relay has sent them; a message
//!                             is one file, whose name has its domain
//! SPOOL/outgoing/<domain>/    the same, from earlier versions: sent from there, and removed when it is empty; a domain
//!                             with other characters than letters, digits and hyphens has its `Domain::file_name`
//! SPOOL/postmaster/           mail for the provider's own postmaster (RFC 5321 section 4.5.1)
//! SPOOL/.odmr/                state files:
//!     serve                   the lock of `odmr serve`
//!     account-ACCOUNT.lock    the lock that a turned session of the account has, besides `odmr.lock` in each queue
//!     call-ACCOUNT, reload    for `odmr status`: the last call of an account, and the last reading of the configuration
//!     usage-ACCOUNT           an upper bound of the mail that is held for an account with a quota
//!     rate-ACCOUNT            how many messages an account with a rate has submitted in this hour
//!     unknown-ACCOUNT         the recipients that a customer's server does not know
//!     clock                   the history of the clock, by which mail expires
//!     tidy                    its time of modification is that of the last daily tidying
//!     scram-key               the key of the salts that are in no file
//!     logins, logins.lock     failed logins, and the networks that accounts have logged in from
//! SPOOL/.wake                 the socket at which other processes wake `odmr serve` when they have stored mail for the relay
//!                             ([`crate::net::wake`])
//! ```

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::Access;

use super::quota::Quotas;
use super::rates::RATE_FILE;
use crate::config::{Account, Accounts, HeldConfig, Knowledge, ProviderConfig};
use crate::ids::Ids;
use crate::mail::address::{Domain, Mailbox};
use crate::maildir::{self, Maildir, MessageWriter, USAGE_FILE, Usage, log_sweep_failed, with_path};
use crate::net::trace::quoted;
use crate::queue::envelope::ENVELOPE_LIMIT;
use crate::queue::{Queue, QueueDue, QueueName, QueuedEnvelope, SharedIndex, remove_unused_lock};
use crate::session::check_room;
use crate::smtp::reply::Reply;
use crate::sorting::sort_by;

/// How long the reply to RCPT waits for a list of recipients that another program is writing, and how often it is read.
const SETTLE_TIMEOUT: Duration = Duration::from_millis(2500);
const SETTLE_INTERVAL: Duration = Duration::from_millis(50);

/// The file in `SPOOL/.odmr` that `odmr serve` locks.
const LOCK_FILE: &str = "serve";

/// The lock in `.odmr/` that `serve` has while it reads its configuration.
const RELOAD_LOCK: &str = "reload.lock";

/// The prefix of the files that turned sessions lock.
const ACCOUNT_LOCK: &str = "account-";

/// The prefix of the files with unknown recipients.
const UNKNOWN_RECIPIENTS: &str = "unknown-";

/// The directory in `SPOOL/outgoing` for mail to all domains. No domain can have this name.
const OUTGOING: &str = "@all";

/// The maximum depth of a queue below the spool: `domains/<domain>`.
pub const SPOOL_DEPTH: usize = 2;

/// Finds, reads and writes the queues.
pub struct Spool {
    root: PathBuf,
    queue: Queue,
    accounts: Accounts,
    quotas: Quotas,
    /// Octets that messages from outside leave free on each disk.
    min_free: u64,
    /// The provider's own domain; `None`: its hostname is not a domain.
    own: Option<Domain>,
}

/// A queue of the spool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SpoolQueue {
    /// Mail for a customer's domain.
    Held(Domain),
    /// Mail for the provider's own postmaster.
    Postmaster,
    /// Mail from customers, and DSNs, for one domain elsewhere.
    Outgoing(Domain),
    /// The same for all domains elsewhere.
    AllOutgoing,
    /// Mail for one domain elsewhere, stored by an earlier version.
    OldOutgoing(Domain),
}

fn is_one(accounts: &[Option<&Account>]) -> bool {
    accounts.windows(2).all(|pair| pair[0].map(|one| &one.name) == pair[1].map(|other| &other.name))
}

fn held_path(root: &Path, domain: &Domain) -> PathBuf {
    root.join("domains").join(&*domain.file_name())
}

/// The names of the files in a directory, sorted; none if it does not exist.
fn files_in(directory: &Path) -> io::Result<Vec<String>> {
    let files = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(|error| with_path(directory, error))?,
    };
    let mut names: Vec<_> = files.filter_map(|file| file.ok()?.file_name().into_string().ok()).collect();
    sort_by(&mut names, String::cmp);
    Ok(names)
}

impl Spool {
    /// The spool of a configuration. Directories of queues are made when the first message is stored in them.
    pub fn new(config: &ProviderConfig, ids: &Ids) -> Spool {
        let root = config.spool.clone();
        Spool {
            quotas: Quotas::new(&root, &config.accounts, |domain| Maildir::new(held_path(&root, domain))),
            min_free: config.limits.min_free,
            root,
            queue: Queue::new(&config.hostname, ids.clone(), config.timeouts.takeover),
            accounts: config.accounts.clone(),
            own: Domain::parse(&config.hostname),
        }
    }

    /// The storage of the queues, which locks and reads them by their [`Spool::name`].
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// The secret key of salts and of digests of names, the same in each process. If it cannot be stored, which is
    /// logged, this process has another key.
    pub fn login_key(&self, ids: &Ids) -> [u8; 32] {
        let new = ids.key();
        maildir::state_key(&self.root, "scram-key", new).unwrap_or_else(|error| {
            log::error!("event=spool-failed error={}", quoted(error));
            new
        })
    }

    /// Locks the spool for one `odmr serve`, as long as the returned file is open. `None`: another process has the lock.
    ///
    /// # Errors
    /// The spool cannot be written to; the text has the remedy.
    pub fn lock(&self) -> io::Result<Option<File>> {
        let lock = maildir::lock_for_daemon(&self.root, LOCK_FILE)?;
        rustix::fs::access(&self.root, Access::WRITE_OK | Access::EXEC_OK).map_err(|error| {
            let text = format!("{} cannot be written to: {error}", self.root.display());
            maildir::with_remedy(&self.root, io::Error::new(error.kind(), text))
        })?;
        Ok(lock)
    }

    /// Whether an `odmr serve` has the lock of the spool. No file is created.
    ///
    /// # Errors
    /// The lock cannot be read.
    pub fn is_locked(&self) -> io::Result<bool> {
        maildir::locked_state_file(&self.root, LOCK_FILE).map(|file| file.is_some())
    }

    /// The name of a queue: its directory, its locks and limits, and whether each message has its own time of the next
    /// attempt.
    pub fn name(&self, queue: &SpoolQueue) -> QueueName {
        let (path, domain) = match queue {
            SpoolQueue::Held(domain) => (held_path(&self.root, domain), Some(domain)),
            SpoolQueue::Postmaster => (self.root.join("postmaster"), None),
            SpoolQueue::Outgoing(domain) => (self.outgoing().join(OUTGOING), Some(domain)),
            SpoolQueue::AllOutgoing => (self.outgoing().join(OUTGOING), None),
            SpoolQueue::OldOutgoing(domain) => (self.outgoing().join(&*domain.file_name()), Some(domain)),
        };
        let owner = domain.and_then(|domain| self.accounts.owner(domain));
        let prefix = owner.and_then(|owner| owner.delivered_to_prefix.clone());
        let holder = owner.filter(|_| matches!(queue, SpoolQueue::Held(_)));
        let limit = holder.and_then(|owner| self.quotas.of(&owner.name)).cloned();
        let account_lock =
            holder.map(|owner| self.root.join(".odmr").join(format!("{ACCOUNT_LOCK}{}.lock", owner.name)));
        let retries = !matches!(queue, SpoolQueue::Held(_) | SpoolQueue::Postmaster);
        let shared = matches!(queue, SpoolQueue::Outgoing(_) | SpoolQueue::AllOutgoing);
        QueueName { path, domain: domain.cloned(), prefix, retries, account_lock, shared, limit }
    }

    fn outgoing(&self) -> PathBuf {
        self.root.join("outgoing")
    }

    /// The queues with mail for a domain elsewhere: two, if an earlier version has stored some.
    pub fn outgoing_names(&self, domain: &Domain) -> Vec<QueueName> {
        let old = self.name(&SpoolQueue::OldOutgoing(domain.clone()));
        let old = Some(old).filter(|old| old.path.exists());
        [self.name(&SpoolQueue::Outgoing(domain.clone()))].into_iter().chain(old).collect()
    }

    /// When the next attempt at mail for a domain elsewhere is due.
    ///
    /// # Errors
    /// A directory cannot be read.
    pub fn outgoing_due(&self, domain: &Domain, index: &SharedIndex) -> io::Result<QueueDue> {
        self.outgoing_names(domain)
            .iter()
            .try_fold(QueueDue::default(), |due, name| Ok(due.or_earlier(self.queue.next_due_by_sender(name, index)?)))
    }

    /// The domains elsewhere for which an earlier version has stored mail, ordered by the names of their directories.
    ///
    /// # Errors
    /// The directory of these queues exists and cannot be read.
    pub fn old_destinations(&self) -> io::Result<Vec<Domain>> {
        self.domains_in("outgoing")
    }

    /// Removes the directories without mail that earlier versions have left for domains elsewhere. A failure is logged.
    pub fn remove_old_destinations(&self) {
        let destinations = self.old_destinations().unwrap_or_default();
        destinations.iter().for_each(|domain| self.remove_old_destination(domain));
    }

    /// Removes the directory of one domain elsewhere, if it has no mail. A failure is logged.
    pub fn remove_old_destination(&self, domain: &Domain) {
        let name = self.name(&SpoolQueue::OldOutgoing(domain.clone()));
        if let Err(error) = self.queue.remove_empty(&name) {
            maildir::log_sweep_failed(&name, &error);
        }
    }

    /// All queues, each with its name for administrators: the domains of customers and former customers, the postmaster's,
    /// `outgoing`, and `outgoing/DOMAIN` of earlier versions.
    ///
    /// # Errors
    /// A directory exists and cannot be read.
    pub fn all_queues(&self) -> io::Result<Vec<(String, SpoolQueue)>> {
        let (held, old) = (self.domains_in("domains")?, self.old_destinations()?);
        let held = held.into_iter().map(|domain| (domain.to_string(), SpoolQueue::Held(domain)));
        let old = old.into_iter().map(|domain| (format!("outgoing/{domain}"), SpoolQueue::OldOutgoing(domain)));
        let others = [("postmaster", SpoolQueue::Postmaster), ("outgoing", SpoolQueue::AllOutgoing)];
        let others = others.map(|(name, queue)| (name.to_owned(), queue));
        Ok(held.chain(others).chain(old).collect())
    }

    /// The name of the account that a domain belongs to.
    pub fn owner(&self, domain: &Domain) -> Option<&str> {
        self.accounts.owner(domain).map(|account| account.name.as_str())
    }

    /// The domains of an account; none, if there is no such account.
    pub fn domains_of(&self, account: &str) -> &[Domain] {
        self.accounts.account(account).map_or(&[], |account| &account.domains)
    }

    /// The age at which an account's held mail expires. `None`: never; or the account was removed, or its file has a mistake.
    pub fn expire_after(&self, account: &str) -> Option<Duration> {
        self.accounts.account(account).filter(|_| !self.accounts.is_skipped(account))?.held.expire_after
    }

    /// Whether no customer has this domain, even if the skipped files were valid.
    pub fn is_unowned(&self, domain: &Domain) -> bool {
        self.accounts.owner(domain).is_none() && !self.accounts.may_be_skipped(domain)
    }

    /// Whether a domain may belong to a customer whose file is skipped.
    pub fn may_be_skipped(&self, domain: &Domain) -> bool {
        self.accounts.may_be_skipped(domain)
    }

    /// The file with the last call of an account ([`CallRecord`](crate::report::calls::CallRecord)).
    pub fn call_record(&self, account: &str) -> PathBuf {
        self.root.join(".odmr").join(format!("call-{account}"))
    }

    /// The file with the recipients that the account's server does not know.
    pub fn unknown_recipients(&self, account: &str) -> PathBuf {
        self.root.join(".odmr").join(format!("{UNKNOWN_RECIPIENTS}{account}"))
    }

    /// The settings of an account's held mail; the defaults, if the account was removed.
    pub fn held_config(&self, account: &str) -> HeldConfig {
        self.accounts.account(account).map(|account| account.held.clone()).unwrap_or_default()
    }

    /// The file with the last reading of the configuration ([`CallRecord`](crate::report::calls::CallRecord)).
    pub fn reload_record(&self) -> PathBuf {
        self.root.join(".odmr/reload")
    }

    /// Shows to other processes that this one is reading the configuration, until the result is dropped. If that fails, they
    /// may only take the result of this reading for that of a later one.
    pub fn begin_reload(&self) -> Option<File> {
        maildir::lock_for_daemon(&self.root, RELOAD_LOCK).ok().flatten()
    }

    /// Whether another process is reading the configuration.
    pub fn is_reloading(&self) -> bool {
        matches!(maildir::locked_state_file(&self.root, RELOAD_LOCK), Ok(Some(_)))
    }

    /// Removes what is left over, once a day in one process: files of writers that died; queues without mail whose
    /// domain has no customer; state files of removed accounts, and `rate-ACCOUNT` of accounts without a rate. Each
    /// must be unused for 36 hours. A failure is logged.
    pub fn tidy(&self) {
        maildir::tidy_daily(&self.root, || {
            for (_, queue) in self.all_queues()? {
                let unwanted = match &queue {
                    SpoolQueue::Held(domain) => self.is_unowned(domain),
                    SpoolQueue::Postmaster | SpoolQueue::Outgoing(_) | SpoolQueue::AllOutgoing => false,
                    SpoolQueue::OldOutgoing(_) => true,
                };
                self.queue.tidy(&self.name(&queue), unwanted);
            }
            for file in files_in(&self.root.join(".odmr"))? {
                if file.starts_with(ACCOUNT_LOCK) && file.ends_with(".lock") {
                    let removed = remove_unused_lock(&self.root.join(".odmr").join(file));
                    removed.unwrap_or_else(|error| log_sweep_failed("-", &error));
                }
            }
            let is_removed = |account: &str| self.accounts.account(account).is_none();
            let has_no_rate = |account: &str| self.accounts.account(account).is_none_or(|account| account.rate == 0);
            let starts = ["call-", USAGE_FILE, UNKNOWN_RECIPIENTS];
            let is_left = |name: &str| {
                // Earlier versions used the file `retry` where a datagram wakes the relay now.
                name == "retry"
                    || name.strip_prefix(RATE_FILE).is_some_and(has_no_rate)
                    || starts.iter().any(|start| name.strip_prefix(start).is_some_and(is_removed))
            };
            maildir::sweep_state_files(&self.root, &|name| self.accounts.skipped().is_empty() && is_left(name))
        });
    }

    fn domains_in(&self, directory: &str) -> io::Result<Vec<Domain>> {
        let names = files_in(&self.root.join(directory))?;
        Ok(names.iter().filter_map(|name| Domain::of_file_name(name)).collect())
    }

    /// Checks that the disk has room for a message of `octets` and for `min-free`.
    ///
    /// # Errors
    /// The reply to MAIL.
    pub fn check_room(&self, octets: u64) -> Result<(), Reply> {
        check_room(&self.root, octets, self.min_free)
    }

    /// Has all files of accounts with a quota counted again.
    pub fn recount(&self) {
        self.quotas.recount();
    }

    /// Checks that a recipient of held mail is in the customer's list, if it has one, and that there is room for a message of
    /// `size` octets. `others`: the queues of the message's earlier recipients.
    ///
    /// # Errors
    /// The reply to RCPT.
    pub fn check_recipient(&self, mailbox: &Mailbox, others: &[SpoolQueue], size: u64) -> Result<(), Reply> {
        let Some(domain) = mailbox.domain() else { return Ok(()) };
        let Some(account) = self.accounts.owner(domain) else { return Ok(()) };
        let late = Instant::now() + SETTLE_TIMEOUT;
        let knowledge = loop {
            match account.held.recipients.look_up(mailbox, &account.name) {
                // Another program may still be writing the file: only time shows that it is done.
                Knowledge::Changing if Instant::now() < late => std::thread::sleep(SETTLE_INTERVAL),
                knowledge => break knowledge,
            }
        };
        match knowledge {
            Knowledge::Known => {}
            // RFC 5321 section 3.3, RFC 3463 section 3.2.
            Knowledge::Unknown => return Err(Reply::new(550, "5.1.1", "No such mailbox in that domain")),
            Knowledge::Changing | Knowledge::Unsettled => {
                return Err(Reply::new(451, "4.3.5", "The list of recipients cannot be used now, try again later"));
            }
        }
        let queue = SpoolQueue::Held(domain.clone());
        if others.contains(&queue) {
            return Ok(());
        }
        // RFC 1870 section 6.1. MAIL has checked the spool, and the queue may be on another file system.
        check_room(&held_path(&self.root, domain), size, self.min_free)?;
        let is_its_own =
            |other: &&SpoolQueue| matches!(other, SpoolQueue::Held(other) if account.domains.contains(other));
        let copies = 1 + others.iter().filter(is_its_own).count() as u64;
        self.quotas.check(account, Usage { octets: size.saturating_mul(copies), messages: copies })
    }

    /// The reply to the content of a message that could not be stored in these queues.
    pub fn failure_reply<'a>(&self, error: &io::Error, queues: impl IntoIterator<Item = &'a SpoolQueue>) -> Reply {
        let accounts: Vec<_> = queues.into_iter().map(|queue| self.holder(queue)).collect();
        // There is one reply for all recipients, so it rejects only if the quota of all of them does.
        self.quotas.reply(error, accounts.first().copied().flatten().filter(|_| is_one(&accounts)))
    }

    /// Whether a message for several accounts fits into the quota of each, however large its content is. The content has
    /// one reply for all recipients: an account without room would defer the message for the others too, at each attempt.
    pub fn may_go_together(&self, queues: &[SpoolQueue], size: Option<u64>) -> bool {
        let accounts: Vec<_> = queues.iter().map(|queue| self.holder(queue)).collect();
        let has_room = |account: &&Account| {
            let copies = accounts.iter().flatten().filter(|other| other.name == account.name).count() as u64;
            let most = size.map_or(u64::MAX, |size| size.saturating_add(ENVELOPE_LIMIT as u64).saturating_mul(copies));
            self.quotas.of(&account.name).is_none_or(|limit| limit.is_far(Usage { octets: most, messages: copies }))
        };
        is_one(&accounts) || accounts.iter().flatten().all(has_room)
    }

    fn holder(&self, queue: &SpoolQueue) -> Option<&Account> {
        match queue {
            SpoolQueue::Held(domain) => self.accounts.owner(domain),
            _ => None,
        }
    }

    /// Begins a message from outside, as [`Spool::begin_message`], within the quotas of the accounts and the room on the disk.
    /// `octets`: the expected size of the content.
    ///
    /// # Errors
    /// `StorageFull`, and those of [`Spool::begin_message`]. [`Spool::failure_reply`] makes replies of these and of the
    /// writer's.
    pub fn begin_incoming(
        &self, copies: &[(SpoolQueue, QueuedEnvelope)], head: &str, octets: u64,
    ) -> io::Result<MessageWriter> {
        let mut writer = self.begin_message(copies, head)?;
        writer.enforce_limits();
        writer.keep_free(self.min_free, octets)?;
        Ok(writer)
    }

    /// Begins a message with a copy in each of these queues, without regard to quotas and `min-free`: if a DSN could
    /// not be stored, the message that it is about would stay for ever. `head`: the first lines of the content, or
    /// empty.
    ///
    /// # Errors
    /// A file cannot be made; `InvalidInput` if an envelope is too long.
    pub fn begin_message(&self, copies: &[(SpoolQueue, QueuedEnvelope)], head: &str) -> io::Result<MessageWriter> {
        let copies: Vec<_> = copies.iter().map(|(queue, envelope)| (self.name(queue), envelope.clone())).collect();
        self.queue.begin_message(&copies, head)
    }

    /// The queue of held mail for this mailbox: in a customer's domain, or the provider's postmaster (RFC 5321 section 4.5.1).
    /// `None`: mail for this mailbox would have to be relayed.
    pub fn held_queue(&self, mailbox: &Mailbox) -> Option<SpoolQueue> {
        let domain = mailbox.domain()?;
        if self.accounts.owner(domain).is_some() {
            return Some(SpoolQueue::Held(domain.clone()));
        }
        let is_own = self.own.as_ref() == Some(domain);
        (is_own && mailbox.local().eq_ignore_ascii_case("postmaster")).then_some(SpoolQueue::Postmaster)
    }

    /// Whether mail for the domain is held here.
    pub fn holds(&self, domain: &Domain) -> bool {
        self.accounts.owner(domain).is_some()
    }

    /// Checks that the domain cannot belong to a customer whose file is skipped, so that a mistake in the file does not
    /// reject the customer's mail.
    ///
    /// # Errors
    /// The reply to RCPT or ATRN, 451. It is also the reason why the relay defers the mail.
    pub fn check_not_skipped(&self, domain: &Domain) -> Result<(), Reply> {
        match self.accounts.may_be_skipped(domain) {
            true => {
                Err(Reply::new(451, "4.3.5", "The configuration for that domain cannot be read now, try again later"))
            }
            false => Ok(()),
        }
    }

    /// The address of the provider's postmaster; `None`: its hostname is not a domain.
    pub fn postmaster(&self) -> Option<Mailbox> {
        self.own.as_ref().and_then(|own| Mailbox::parse(&format!("postmaster@{own}")))
    }

    /// The queue of mail for this mailbox, held or outgoing. `None`: its domain is an address literal.
    pub fn queue_for(&self, mailbox: &Mailbox) -> Option<SpoolQueue> {
        self.held_queue(mailbox).or_else(|| mailbox.domain().map(|domain| SpoolQueue::Outgoing(domain.clone())))
    }
}
