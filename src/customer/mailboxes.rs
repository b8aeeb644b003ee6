//! The mailboxes of a customer: its Maildirs, and the destinations that the rules give to each recipient.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};

use super::store;
use crate::config::CustomerConfig;
use crate::ids::Ids;
use crate::mail::address::{Domain, ForwardPath, Mailbox, ReversePath};
use crate::maildir::spooled::Content;
use crate::maildir::{Maildir, MessageWriter, for_each_block, has_room};
use crate::queue::{Queue, QueueName, QueuedEnvelope};
use crate::recipients::{self, Delivery, Destination, NextHop, RecipientRules};
use crate::session::{disk_full_reply, storage_failure_reply};
use crate::smtp::command::Recipient;
use crate::smtp::reply::Reply;
use crate::smtp::status::RecipientStatus;

/// The rules, and the Maildirs that they lead to.
pub struct Mailboxes {
    rules: RecipientRules,
    umask: u32,
    /// Writes the queue of mail for next hops.
    queue: Queue,
    ids: Ids,
    root: PathBuf,
}

impl Mailboxes {
    pub fn new(config: &CustomerConfig, ids: &Ids) -> Mailboxes {
        let root = &config.mailboxes.root;
        Mailboxes {
            rules: config.mailboxes.rules.clone(),
            umask: config.mailboxes.umask,
            queue: Queue::new(&config.hostname, ids.clone(), config.timeouts.takeover),
            ids: ids.clone(),
            root: root.clone(),
        }
    }

    pub fn ids(&self) -> &Ids {
        &self.ids
    }

    /// Reads and writes the retry queue.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// The queue of mail for next hops.
    pub fn retry_queue(&self) -> QueueName {
        store::retry_queue(&self.root)
    }

    /// Whether the rules accept mail for a domain.
    pub fn accepts_domain(&self, domain: &Domain) -> bool {
        self.rules.serves(domain)
    }

    /// Whether some mail goes to next hops.
    pub fn has_next_hops(&self) -> bool {
        self.rules.has_next_hops()
    }

    /// The destinations of a recipient.
    pub fn resolve(&self, path: &ForwardPath) -> Result<Vec<Delivery>, Reply> {
        self.rules.resolve(path)
    }

    /// The recipient as an envelope has it: `postmaster` alone is in our first domain (RFC 5321 section 4.5.1).
    pub fn canonical_recipient(&self, path: &ForwardPath) -> Result<Mailbox, Reply> {
        let nobody = || Reply::new(550, "5.1.1", "No such mailbox here");
        match path {
            ForwardPath::Mailbox(mailbox) => Ok(mailbox.clone()),
            ForwardPath::Postmaster => {
                let home = self.rules.domains().first().ok_or_else(nobody)?;
                Mailbox::parse(&format!("postmaster@{home}")).ok_or_else(nobody)
            }
        }
    }

    /// The destination of a final address, without any alias.
    pub fn destination(&self, mailbox: &Mailbox) -> Option<Destination> {
        self.rules.destination_of(mailbox)
    }

    /// The Maildir of an address that no next hop accepts.
    pub fn fallback(&self, mailbox: &Mailbox) -> PathBuf {
        self.rules.maildir_of(mailbox)
    }

    /// Whether mail for it must be accepted, by us if no next hop does (RFC 5321 section 4.5.1).
    pub fn must_accept(&self, mailbox: &Mailbox) -> bool {
        self.rules.is_fallback(mailbox)
    }

    /// Begins a copy in a Maildir, with one Return-Path at the top (RFC 5321 section 4.4); `head` is the beginning of the
    /// content: our `Received`.
    fn begin(&self, writer: &mut MessageWriter, copy: &Copy<'_>, head: &str) -> io::Result<()> {
        let Copy { from, to, original, .. } = copy;
        let mut lines = format!("Return-Path: <{from}>\nDelivered-To: {to}\n");
        if to != original {
            lines.push_str(&format!("X-Original-To: {original}\n"));
        }
        lines.push_str(head);
        writer.begin(&self.maildir(copy.path, copy.folders), &self.queue.unique(), lines.as_bytes())
    }

    /// A mailbox, or the first of these folders that it has.
    fn maildir(&self, path: &Path, folders: &[String]) -> Maildir {
        let inbox = Maildir::mailbox(path, self.umask);
        folders.iter().map(|name| inbox.folder(name)).find(Maildir::exists).unwrap_or(inbox)
    }

    /// Whether the quota of a mailbox has room for this many octets more; a next hop has its own.
    pub fn admits(&self, destination: &Destination, octets: u64) -> io::Result<()> {
        match destination {
            Destination::Maildir { path, folders } => {
                self.maildir(path, folders).check_quota(|| self.queue.unique(), octets)
            }
            Destination::NextHop(_) => Ok(()),
        }
    }

    /// Begins copies for all recipients of a message, which are ours. Recipients whose destination is a next hop, or a
    /// mailbox without room for `octets`, get theirs in the retry queue.
    pub fn begin_all(
        &self, writer: &mut MessageWriter, message: &QueuedEnvelope, octets: u64, head: &str,
    ) -> io::Result<(Routing, Vec<RejectedRecipient>)> {
        let (mut known, mut rejected, mut waiting) = (Vec::new(), Vec::new(), Vec::new());
        for recipient in &message.envelope.recipients {
            match self.resolve(&ForwardPath::Mailbox(recipient.mailbox.clone())) {
                Err(reply) => rejected.push(RejectedRecipient { recipient: recipient.clone(), reply }),
                Ok(mut deliveries) => {
                    // The other recipients do not wait for one whose mailbox is full.
                    let count = deliveries.len();
                    deliveries.retain(|delivery| {
                        let room = self.has_room_now(&delivery.destination, octets);
                        if !room {
                            waiting.push(relayed_recipient(recipient, &delivery.mailbox, count));
                        }
                        room
                    });
                    known.push((recipient.clone(), deliveries));
                }
            }
        }
        let routing = self.begin_known(writer, &message.envelope.from, &known, head)?;
        waiting.extend(routing.hop_recipients.iter().flat_map(|(_, recipients)| recipients.clone()));
        if !waiting.is_empty() {
            self.queue.add_copy(writer, &self.retry_queue(), &message.with_recipients(waiting), head)?;
        }
        Ok((routing, rejected))
    }

    fn has_room_now(&self, destination: &Destination, octets: u64) -> bool {
        let full = |error: &io::Error| error.kind() == io::ErrorKind::QuotaExceeded;
        !self.admits(destination, octets).as_ref().is_err_and(full)
    }

    /// Begins copies for recipients whose destinations are known. A mailbox that several recipients lead to, by two
    /// aliases for instance, gets one copy.
    pub fn begin_known(
        &self, writer: &mut MessageWriter, from: &ReversePath, recipients: &[(Recipient, Vec<Delivery>)], head: &str,
    ) -> io::Result<Routing> {
        let (mut routing, mut seen) = (Routing::default(), HashSet::new());
        for (recipient, deliveries) in recipients {
            let mut all_here = true;
            for delivery in deliveries {
                let relayed = relayed_recipient(recipient, &delivery.mailbox, deliveries.len());
                match &delivery.destination {
                    Destination::Maildir { path, folders } => {
                        if seen.insert(delivery.destination.clone()) {
                            let (to, original) = (&delivery.mailbox, &recipient.mailbox);
                            self.begin(writer, &Copy { from, to, original, path, folders }, head)?;
                            routing.maildir_recipients.push(relayed);
                        }
                    }
                    Destination::NextHop(hop) => {
                        all_here = false;
                        routing.add(hop, relayed);
                    }
                }
            }
            match (all_here, deliveries.len()) {
                // All of its deliveries wait in the retry queue: the sender gets a DSN from there.
                (_, 0) => {}
                (true, _) => routing.delivered_here.push(recipient.clone()),
                (false, 1) => {}
                // Next hops do not know the recipient that the sender meant, so we report it (RFC 3461 section 5.2.7.3).
                (false, _) => routing.expanded.push(recipient.clone()),
            }
        }
        Ok(routing)
    }

    /// Delivers one message into a Maildir, for one recipient.
    pub fn copy(
        &self, from: &ReversePath, to: &Mailbox, (path, folders): (&Path, &[String]), content: &mut dyn Content,
    ) -> RecipientStatus {
        let mut copied = || {
            let mut writer = MessageWriter::default();
            self.begin(&mut writer, &Copy { from, to, original: to, path, folders }, "")?;
            content.rewind()?;
            for_each_block(content, |block| writer.write(block))?;
            writer.commit()
        };
        match copied() {
            Ok(_) => RecipientStatus::Sent(Reply::new(250, "2.0.0", "Delivered here")),
            Err(error) => RecipientStatus::Deferred(storage_failure_reply(&error)),
        }
    }

    /// Delivers to our own Maildir what must be accepted and no next hop accepts.
    pub fn deliver_fallback(&self, from: &ReversePath, to: &Mailbox, content: &mut dyn Content) -> RecipientStatus {
        self.copy(from, to, (&self.fallback(to), &[]), content)
    }

    /// Rejects mail that the disk would not hold.
    pub fn check_room(&self, octets: u64) -> Result<(), Reply> {
        if has_room(&self.root, octets) { Ok(()) } else { Err(disk_full_reply()) }
    }
}

/// A copy of a message in one Maildir.
struct Copy<'a> {
    from: &'a ReversePath,
    to: &'a Mailbox,
    /// The recipient that the sender meant.
    original: &'a Mailbox,
    path: &'a Path,
    /// Maildir++ folders: the first that exists.
    folders: &'a [String],
}

/// A recipient that the rules reject.
pub struct RejectedRecipient {
    pub recipient: Recipient,
    pub reply: Reply,
}

/// Where the recipients of a message go.
#[derive(Default)]
pub struct Routing {
    /// Recipients that have the message when the copies are committed.
    pub delivered_here: Vec<Recipient>,
    /// Recipients that stand for several, next hops among them.
    pub expanded: Vec<Recipient>,
    /// The recipients of the copies, one for each Maildir.
    pub maildir_recipients: Vec<Recipient>,
    /// The recipients of each next hop.
    pub hop_recipients: Vec<(NextHop, Vec<Recipient>)>,
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
}

/// A recipient as its destination gets it; `of`: how many destinations the recipient that the sender meant has. NOTIFY
/// goes with it, unless several destinations would report success (RFC 3461 section 5.2.7.3).
pub fn relayed_recipient(meant: &Recipient, to: &Mailbox, of: usize) -> Recipient {
    match of {
        1 => Recipient { mailbox: to.clone(), ..meant.clone() },
        _ => Recipient { notify: meant.notify.without_success(), ..Recipient::plain(to.clone()) },
    }
}
