//! The mailboxes of a customer: copies of messages into the Maildirs that the rules in [`crate::recipients`] name. Each
//! copy has one `Return-Path` at its top (RFC 5321 section 4.4).

use std::collections::HashSet;
use std::fs::{self, DirEntry};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::store;
use crate::clock::Timestamp;
use crate::config::CustomerConfig;
use crate::ids::Ids;
use crate::mail::address::{ForwardPath, Mailbox, ReversePath};
use crate::maildir::spooled::Content;
use crate::maildir::{Maildir, MessageWriter, for_each_block, log_sweep_failed, with_path};
use crate::net::trace::quoted;
use crate::queue::{Queue, QueueName, QueuedEnvelope};
use crate::recipients::{self, Delivery, Destination, NextHop, RecipientRules};
use crate::report::Attempt;
use crate::report::clock_watch::ClockWatch;
use crate::session::{check_room, storage_failure_reply};
use crate::smtp::command::Recipient;
use crate::smtp::reply::Reply;
use crate::smtp::status::RecipientStatus;

/// The Maildirs of a customer, and what is needed to deliver into them.
pub struct Mailboxes {
    pub config: CustomerConfig,
    pub ids: Ids,
    /// Reads and writes the retry queue and the outgoing queue.
    pub queue: Queue,
    /// Watches the clock, by which mail expires.
    pub watch: Arc<ClockWatch>,
}

impl Mailboxes {
    /// The mailboxes of this configuration. Neither reads nor creates a file.
    pub fn new(config: &CustomerConfig, ids: &Ids) -> Mailboxes {
        let queue = Queue::new(&config.hostname, ids.clone(), config.timeouts.takeover);
        let watch = Arc::new(ClockWatch::new(&config.mailboxes.root, ids.clock()));
        Mailboxes { config: config.clone(), ids: ids.clone(), queue, watch }
    }

    /// The rules that say which recipients are ours, and where their mail goes.
    pub fn rules(&self) -> &RecipientRules {
        &self.config.mailboxes.rules
    }

    /// Logs the aliases whose mail is deferred, and whether mail for names without a mailbox goes to postmaster by
    /// default.
    pub fn log_warnings(&self) {
        for warning in self.rules().warnings() {
            log::warn!("event=alias-not-served error={}", quoted(warning));
        }
        if let Some(note) = self.rules().catch_all_note() {
            log::info!("event=catch-all-by-default consequence={}", quoted(&note.text));
        }
    }

    /// [`RecipientRules::resolve`], with the mailboxes that exist now.
    ///
    /// # Errors
    /// The reply that rejects or defers the recipient.
    pub fn resolve(&self, path: &ForwardPath) -> Result<Vec<Delivery>, Reply> {
        self.rules().resolve(path, &mailbox_exists)
    }

    /// [`RecipientRules::destination_of`], with the mailboxes that exist now.
    pub fn destination_of(&self, mailbox: &Mailbox) -> Option<Destination> {
        self.rules().destination_of(mailbox, &mailbox_exists)
    }

    /// The queue of mail for next hops.
    pub fn retry_queue(&self) -> QueueName {
        store::retry_queue(&self.config.mailboxes.root)
    }

    /// Once a day, in one process, removes files that were not used for 36 hours: those of writers that died, and the
    /// records of accounts that are no longer configured. A failure is logged.
    pub fn tidy(&self) {
        let root = &self.config.mailboxes.root;
        let outgoing = self.config.outgoing.as_ref().map(|outgoing| store::outgoing_queue(&outgoing.queue));
        store::tidy_daily(root, || {
            outgoing.into_iter().chain([self.retry_queue()]).for_each(|name| self.queue.tidy(&name, false));
            for domain in subdirectories(root, false)? {
                for mailbox in subdirectories(&domain, false)? {
                    // This user may have no access to a mailbox: sweep the others nevertheless.
                    self.sweep(&mailbox).unwrap_or_else(|error| log_sweep_failed("-", &error));
                }
            }
            let providers = self.config.providers.iter().map(|provider| &provider.remote);
            let known: Vec<_> =
                providers.map(|remote| store::account_file(remote.login_name(), &remote.address)).collect();
            let record = |name: &str| name.strip_prefix("last-").or(name.strip_prefix("next-")).map(str::to_owned);
            store::sweep_state_files(root, &|name| record(name).is_some_and(|account| !known.contains(&account)))
        });
    }

    /// Sweeps a mailbox and its Maildir++ folders.
    fn sweep(&self, mailbox: &Path) -> io::Result<()> {
        let folders = subdirectories(mailbox, true)?;
        folders.iter().map(PathBuf::as_path).chain([mailbox]).try_for_each(|path| self.maildir(path, &[]).sweep())
    }

    /// The mailbox of a recipient for the envelope. `postmaster` without a domain is in our first domain (RFC 5321
    /// section 4.5.1).
    ///
    /// # Errors
    /// The reply to RCPT: there is no domain for postmaster.
    pub fn canonical_recipient(&self, path: &ForwardPath) -> Result<Mailbox, Reply> {
        let mailbox = match path {
            ForwardPath::Mailbox(mailbox) => Some(mailbox.canonical()),
            ForwardPath::Postmaster => {
                self.rules().domains().first().and_then(|home| recipients::address("postmaster", home))
            }
        };
        mailbox.ok_or_else(|| Reply::new(550, "5.1.1", "No such mailbox here"))
    }

    /// The mailbox at `path`, or the first of the Maildir++ `folders` that it has.
    fn maildir(&self, path: &Path, folders: &[String]) -> Maildir {
        let inbox = Maildir::mailbox(path, self.config.mailboxes.umask);
        folders.iter().map(|name| inbox.folder(name)).find(Maildir::exists).unwrap_or(inbox)
    }

    /// Checks that the quota of a mailbox has room for this many octets more. A next hop checks its own quotas.
    ///
    /// # Errors
    /// `QuotaExceeded`, and nothing else: any other failure occurs again, and is reported, when the copy is begun.
    pub fn check_quota(&self, destination: &Destination, octets: u64) -> io::Result<()> {
        let Destination::Maildir { path, folders } = destination else { return Ok(()) };
        match self.maildir(path, folders).check_quota(|| self.queue.unique(), octets) {
            Err(error) if error.kind() == io::ErrorKind::QuotaExceeded => Err(error),
            _ => Ok(()),
        }
    }

    /// Begins copies of a message that was submitted here: its recipients are all in our domains. The copy for
    /// recipients at a next hop, or whose mailbox has no room for `octets`, is in the retry queue. The copy for the
    /// recipients `elsewhere`, and for addresses elsewhere to which aliases lead, is in the outgoing queue. `head`: the
    /// beginning of the content, our `Received` field.
    ///
    /// # Errors
    /// A copy cannot be created, or there is no outgoing queue for it.
    pub fn begin_all(
        &self, writer: &mut MessageWriter, message: &QueuedEnvelope, elsewhere: Vec<Recipient>, octets: u64, head: &str,
    ) -> io::Result<Routing> {
        let (mut known, mut rejected, mut waiting) = (Vec::new(), Vec::new(), Vec::new());
        for recipient in &message.envelope.recipients {
            match self.resolve(&ForwardPath::Mailbox(recipient.mailbox.clone())) {
                Err(reply) => rejected.push((recipient.clone(), reply)),
                Ok(deliveries) => {
                    let count = deliveries.len();
                    // A mailbox that is full must not delay the other recipients.
                    let has_room = |delivery: &Delivery| self.check_quota(&delivery.destination, octets).is_ok();
                    let (here, full): (Vec<_>, Vec<_>) = deliveries.into_iter().partition(has_room);
                    waiting.extend(full.iter().map(|delivery| relayed_recipient(recipient, &delivery.mailbox, count)));
                    known.push((recipient.clone(), here));
                }
            }
        }
        let mut routing = self.begin_known(writer, &message.envelope.from, &known, head)?;
        waiting.extend(routing.hop_recipients.iter().flat_map(|(_, recipients)| recipients.clone()));
        if !waiting.is_empty() {
            self.queue.add_copy(writer, &self.retry_queue(), &message.with_recipients(waiting), head)?;
        }
        let by_aliases = std::mem::replace(&mut routing.elsewhere, elsewhere);
        by_aliases.into_iter().for_each(|recipient| routing.add_elsewhere(recipient));
        if !routing.elsewhere.is_empty() {
            let outgoing = self.config.outgoing.as_ref().ok_or_else(|| {
                io::Error::new(io::ErrorKind::NotFound, "an alias leads elsewhere, and there is no table [outgoing]")
            })?;
            let queue = store::outgoing_queue(&outgoing.queue);
            self.queue.add_copy(writer, &queue, &message.with_recipients(routing.elsewhere.clone()), head)?;
        }
        Ok(Routing { rejected, ..routing })
    }

    /// Begins copies for recipients whose destinations are known. If several recipients lead to one Maildir, for
    /// instance by two aliases, it gets one copy. `head`: the beginning of the content, our `Received` field.
    ///
    /// # Errors
    /// A copy cannot be created.
    pub fn begin_known(
        &self, writer: &mut MessageWriter, from: &ReversePath, recipients: &[(Recipient, Vec<Delivery>)], head: &str,
    ) -> io::Result<Routing> {
        let (mut routing, mut seen) = (Routing::default(), HashSet::new());
        for (recipient, deliveries) in recipients {
            let mut all_here = true;
            for Delivery { mailbox, destination, fallback, .. } in deliveries {
                let relayed = relayed_recipient(recipient, mailbox, deliveries.len());
                match destination {
                    Destination::Maildir { path, folders } if seen.insert(destination) => {
                        let lines = first_lines(from, mailbox, &recipient.mailbox) + head;
                        writer.begin(&self.maildir(path, folders), &self.queue.unique(), lines.as_bytes())?;
                        routing.maildir_recipients.push(relayed);
                    }
                    Destination::Maildir { .. } => {}
                    Destination::Discard => routing.discarded.push(relayed),
                    Destination::NextHop(hop) => {
                        all_here = false;
                        if *fallback {
                            routing.fallbacks.push(mailbox.clone());
                        }
                        routing.add(hop, relayed);
                    }
                    Destination::Elsewhere => {
                        all_here = false;
                        routing.add_elsewhere(relayed);
                    }
                }
            }
            match (all_here, deliveries.len()) {
                // All of its copies are in the retry queue, which sends the DSN.
                (_, 0) => {}
                (true, _) => routing.delivered_here.push(recipient.clone()),
                (false, 1) => {}
                // Next hops do not know the recipient that the sender named, so the DSN is ours (RFC 3461 section
                // 5.2.7.3).
                (false, _) => routing.expanded.push(recipient.clone()),
            }
        }
        Ok(routing)
    }

    /// Delivers a message for one recipient into the Maildir at `path`, or the first of the Maildir++ `folders` that it
    /// has. Returns `Sent`, or `Deferred` if the copy cannot be written.
    pub fn copy(
        &self, from: &ReversePath, to: &Mailbox, (path, folders): (&Path, &[String]), content: &mut dyn Content,
    ) -> RecipientStatus {
        let mut writer = MessageWriter::default();
        let mut begun = || {
            let lines = first_lines(from, to, to);
            writer.begin(&self.maildir(path, folders), &self.queue.unique(), lines.as_bytes())?;
            content.rewind()?;
            for_each_block(content, |block| writer.write(block))
        };
        match begun().and_then(|()| writer.commit()) {
            Ok(_) => delivered_here(),
            Err(error) => RecipientStatus::Deferred(storage_failure_reply(&error)),
        }
    }

    /// Delivers into a Maildir here for each recipient that a next hop has rejected although it must be accepted:
    /// postmaster and abuse (RFC 5321 section 4.5.1, RFC 2142), and those in `fallbacks`. Replaces their statuses.
    pub fn deliver_fallbacks(
        &self, from: &ReversePath, recipients: &mut [(Recipient, RecipientStatus)], fallbacks: &[Mailbox],
        content: &mut dyn Content,
    ) {
        for (Recipient { mailbox, .. }, status) in recipients {
            if status.is_rejected() && (self.rules().is_fallback(mailbox) || fallbacks.contains(mailbox)) {
                *status = self.copy(from, mailbox, (&self.rules().maildir_of(mailbox), &[]), content);
            }
        }
    }

    /// Checks that the disk has room for a message of this many octets (RFC 1870 section 6.1).
    ///
    /// # Errors
    /// The reply to MAIL.
    pub fn check_room(&self, octets: u64) -> Result<(), Reply> {
        check_room(&self.config.mailboxes.root, octets, self.config.limits.min_free)
    }
}

/// Whether a file or directory exists at the path of a mailbox.
///
/// # Errors
/// The path cannot be looked up.
pub fn find_mailbox(path: &Path) -> io::Result<bool> {
    for ancestor in path.ancestors() {
        match fs::symlink_metadata(ancestor) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(with_path(ancestor, error)),
            // A symbolic link that leads nowhere: the file system with the mailboxes may not be mounted.
            Ok(_) => return Ok(ancestor == path || !ancestor.is_dir()),
        }
    }
    Ok(false)
}

/// As [`find_mailbox`], but a mailbox that cannot be looked up counts as one that exists. Its mail is then deferred; if
/// it counted as missing, another mailbox, such as that of postmaster, would get the mail.
pub fn mailbox_exists(path: &Path) -> bool {
    find_mailbox(path).unwrap_or(true)
}

/// The lines of a copy before its content. `original`: the recipient that the sender named.
fn first_lines(from: &ReversePath, to: &Mailbox, original: &Mailbox) -> String {
    let original = if to == original { String::new() } else { format!("X-Original-To: {original}\n") };
    format!("Return-Path: <{from}>\nDelivered-To: {to}\n{original}")
}

/// The status of a recipient whose copy is in a Maildir here.
pub fn delivered_here() -> RecipientStatus {
    RecipientStatus::Sent(Reply::new(250, "2.0.0", "Delivered here"))
}

/// Where the recipients of a message go.
#[derive(Default)]
pub struct Routing {
    /// Recipients that have the message when the copies are committed.
    pub delivered_here: Vec<Recipient>,
    /// Recipients with several destinations, next hops among them.
    pub expanded: Vec<Recipient>,
    /// The recipients of the copies, one for each Maildir, in the order of the copies.
    pub maildir_recipients: Vec<Recipient>,
    /// The recipients of each next hop.
    pub hop_recipients: Vec<(NextHop, Vec<Recipient>)>,
    /// Recipients at next hops that get the message in a Maildir here if the next hop rejects them
    /// ([`Delivery::fallback`]).
    pub fallbacks: Vec<Mailbox>,
    /// Recipients in none of our domains. A turned session has none.
    pub elsewhere: Vec<Recipient>,
    /// Recipients whose mail is accepted and discarded.
    pub discarded: Vec<Recipient>,
    /// Recipients that the rules reject or defer, with the reply.
    pub rejected: Vec<(Recipient, Reply)>,
}

impl Routing {
    fn add(&mut self, hop: &NextHop, to: Recipient) {
        match self.hop_recipients.iter_mut().find(|(other, _)| other == hop) {
            None => self.hop_recipients.push((hop.clone(), vec![to])),
            Some((_, recipients)) => {
                if !recipients.iter().any(|other| recipients::same_mailbox(&other.mailbox, &to.mailbox)) {
                    recipients.push(to);
                }
            }
        }
    }

    fn add_elsewhere(&mut self, to: Recipient) {
        if !self.elsewhere.iter().any(|other| other.mailbox == to.mailbox) {
            self.elsewhere.push(to);
        }
    }
}

/// Logs that a message was accepted for these recipients and discarded.
pub fn log_discarded(session: &str, message: &QueuedEnvelope, recipients: &[Recipient], now: Timestamp) {
    let status = RecipientStatus::Sent(Reply::new(250, "2.0.0", "Discarded here"));
    for recipient in recipients {
        Attempt::discarded(session).log(message, &recipient.mailbox, &status, now);
    }
}

/// A recipient as one of its destinations gets it. `to`: its address there; `count`: how many destinations it has. If
/// there are several, NOTIFY=SUCCESS is left out, because each of them would send a DSN (RFC 3461 section 5.2.7.3).
pub fn relayed_recipient(named: &Recipient, to: &Mailbox, count: usize) -> Recipient {
    match count {
        1 => Recipient { mailbox: to.clone(), ..named.clone() },
        _ => Recipient { notify: named.notify.without_success(), ..Recipient::plain(to.clone()) },
    }
}

/// The directories in a directory: those whose names begin with a dot, or (`dotted` is false) the others.
fn subdirectories(path: &Path, dotted: bool) -> io::Result<Vec<PathBuf>> {
    let files = fs::read_dir(path).and_then(Iterator::collect::<io::Result<Vec<DirEntry>>>);
    let files = files.map_err(|error| with_path(path, error))?;
    let wanted = |file: &DirEntry| {
        let is_dotted = file.file_name().as_encoded_bytes().starts_with(b".");
        is_dotted == dotted && file.file_type().is_ok_and(|kind| kind.is_dir())
    };
    Ok(files.into_iter().filter(wanted).map(|file| file.path()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// Otherwise another user would get the mail of a mailbox whose disk is not mounted.
    #[test]
    fn a_mailbox_that_cannot_be_looked_up_counts_as_one_that_exists() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        fs::create_dir_all(path("example.org/alice")).unwrap();
        fs::write(path("example.org/file"), "").unwrap();
        symlink("/nonexistent/disk", path("example.net")).unwrap();
        symlink("/nonexistent/bob", path("example.org/bob")).unwrap();
        symlink("example.org", path("example.edu")).unwrap();
        for (name, expected) in [
            ("example.org/alice", true),
            ("example.org/bob", true),
            ("example.org/file", true),
            ("example.org/file/word", true),
            ("example.edu/alice", true),
            ("example.net/word", true),
            ("example.org/word", false),
            ("example.edu/word", false),
            ("example.com/word", false),
        ] {
            assert_eq!(mailbox_exists(&path(name)), expected, "{name}");
        }
        let error = find_mailbox(&path("example.org/file/word")).unwrap_err().to_string();
        assert!(error.contains("example.org/file/word: Not a directory"), "{error}");
    }
}
