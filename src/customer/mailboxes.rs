//! The mailboxes of a customer: Maildirs, and where the rules lead mail that is to be delivered here.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};

use super::next_hop::Content;
use crate::config;
use crate::ids::Ids;
use crate::mail::address::{Domain, ForwardPath, Mailbox, ReversePath};
use crate::maildir::{Maildir, MessageWriter, for_each_block, has_room};
use crate::queue::{Envelope, Queue, QueueName};
use crate::recipients::{self, Delivery, NextHop, RecipientRules};
use crate::session::server::{disk_full_reply, storage_failure_reply};
use crate::smtp::client::RecipientStatus;
use crate::smtp::command::Recipient;
use crate::smtp::reply::Reply;

/// The rules, and the Maildirs they lead to.
pub struct Mailboxes {
    rules: RecipientRules,
    umask: u32,
    /// Under the root mail waits for next hops.
    queue: Queue,
    ids: Ids,
    root: PathBuf,
}

impl Mailboxes {
    pub fn new(config: &config::CustomerConfig, ids: &Ids) -> Mailboxes {
        let root = &config.mailboxes.root;
        Mailboxes {
            rules: config.mailboxes.rules.clone(),
            umask: config.mailboxes.umask,
            queue: Queue::new(root, &config.hostname, ids.clone(), config.timeouts.takeover),
            ids: ids.clone(),
            root: root.clone(),
        }
    }

    pub fn ids(&self) -> &Ids {
        &self.ids
    }

    /// Where mail waits for next hops.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Whether mail for a domain is ours.
    pub fn accepts_domain(&self, domain: &Domain) -> bool {
        self.rules.serves(domain)
    }

    /// Whether some mail goes to next hops.
    pub fn has_next_hops(&self) -> bool {
        self.rules.has_next_hops()
    }

    /// Where mail for a recipient goes.
    pub fn resolve(&self, path: &ForwardPath) -> Result<Vec<Delivery>, Reply> {
        self.rules.resolve(path)
    }

    /// The recipient as an envelope has it: `postmaster` alone is at home in our first domain (RFC 5321 section 4.5.1).
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

    /// Where a final address belongs, without any alias.
    pub fn destination(&self, mailbox: &Mailbox) -> Option<recipients::Destination> {
        self.rules.destination_of(mailbox)
    }

    /// The Maildir of ours that an address has if no next hop takes it.
    pub fn fallback(&self, mailbox: &Mailbox) -> PathBuf {
        self.rules.maildir_of(mailbox)
    }

    /// Whether it must be taken, if not by a next hop then by us (RFC 5321 section 4.5.1).
    pub fn must_accept(&self, mailbox: &Mailbox) -> bool {
        self.rules.is_fallback(mailbox)
    }

    /// Begins a copy in a Maildir, or in the first of its folders that there is; one Return-Path at the top (RFC 5321
    /// section 4.4), then what the content begins with, our `Received`. `original`: whom the sender meant.
    pub fn begin(
        &self,
        copies: &mut MessageWriter,
        from: &ReversePath,
        (to, original): (&Mailbox, &Mailbox),
        (path, folders): (&Path, &[String]),
        head: &str,
    ) -> io::Result<()> {
        let maildir = self.maildir(path, folders);
        let mut lines = format!("Return-Path: <{from}>\nDelivered-To: {to}\n");
        if to != original {
            lines.push_str(&format!("X-Original-To: {original}\n"));
        }
        lines.push_str(head);
        copies.begin(&maildir, &self.queue.unique(), lines.as_bytes())
    }

    /// A mailbox, or the first of its folders that there is.
    fn maildir(&self, path: &Path, folders: &[String]) -> Maildir {
        let inbox = Maildir::masked(path, self.umask);
        folders.iter().map(|name| inbox.folder(name)).find(Maildir::exists).unwrap_or(inbox)
    }

    /// Whether a mailbox may have so many octets more.
    pub fn admits(&self, (path, folders): (&Path, &[String]), octets: u64) -> io::Result<()> {
        self.maildir(path, folders).admits(|| self.queue.unique(), octets)
    }

    /// Begins copies for all recipients of an envelope, who are ours; those that a next hop shall have wait for it, and
    /// those whose mailboxes have no room for a message of so many `octets`.
    pub fn begin_all(
        &self,
        copies: &mut MessageWriter,
        envelope: &Envelope,
        octets: u64,
        head: &str,
    ) -> io::Result<(Routing, Vec<RejectedRecipient>)> {
        let (mut known, mut refused, mut waiting) = (Vec::new(), Vec::new(), Vec::new());
        for recipient in &envelope.recipients {
            match self.resolve(&ForwardPath::Mailbox(recipient.mailbox.clone())) {
                Err(reply) => refused.push((recipient.clone(), reply)),
                Ok(mut deliveries) => {
                    // Nobody else waits for such a one.
                    let many = deliveries.len();
                    deliveries.retain(|delivery| {
                        let room = self.has_room_now(&delivery.destination, octets);
                        if !room {
                            waiting.push(relayed_recipient(recipient, &delivery.mailbox, many));
                        }
                        room
                    });
                    known.push((recipient.clone(), deliveries));
                }
            }
        }
        let begun = self.begin_known(copies, &envelope.from, &known, head)?;
        waiting.extend(begun.hop_recipients.iter().flat_map(|(_, recipients)| recipients.clone()));
        if !waiting.is_empty() {
            let envelope = Envelope { recipients: waiting, ..envelope.clone() };
            self.queue.add_copy(copies, &QueueName::Retry, &envelope, head)?;
        }
        Ok((begun, refused))
    }

    fn has_room_now(&self, place: &recipients::Destination, octets: u64) -> bool {
        let recipients::Destination::Maildir { path, folders } = place else { return true };
        let full = |error: &io::Error| error.kind() == io::ErrorKind::QuotaExceeded;
        !self.admits((path, folders), octets).as_ref().is_err_and(full)
    }

    /// Begins copies for recipients of whom it is known where they go; who is meant twice, by two aliases say, gets one.
    pub fn begin_known(
        &self,
        copies: &mut MessageWriter,
        from: &ReversePath,
        recipients: &[(Recipient, Vec<Delivery>)],
        head: &str,
    ) -> io::Result<Routing> {
        let (mut begun, mut seen) = (Routing::default(), HashSet::new());
        for (recipient, deliveries) in recipients {
            let mut all_here = true;
            for delivery in deliveries {
                let to = relayed_recipient(recipient, &delivery.mailbox, deliveries.len());
                match &delivery.destination {
                    recipients::Destination::Maildir { path, folders } => {
                        if seen.insert(delivery.destination.clone()) {
                            let names = (&delivery.mailbox, &recipient.mailbox);
                            self.begin(copies, from, names, (path, folders), head)?;
                            begun.maildir_recipients.push(to);
                        }
                    }
                    recipients::Destination::NextHop(hop) => {
                        all_here = false;
                        begun.add(hop, to);
                    }
                }
            }
            match (all_here, deliveries.len()) {
                // Of him who waits he hears later.
                (_, 0) => {}
                (true, _) => begun.delivered_here.push(recipient.clone()),
                (false, 1) => {}
                // Next hops do not know whom they were meant for, so we tell (RFC 3461 section 5.2.7.3).
                (false, _) => begun.expanded.push(recipient.clone()),
            }
        }
        Ok(begun)
    }

    /// Delivers one message into a Maildir, for one recipient.
    pub fn copy(
        &self,
        from: &ReversePath,
        to: &Mailbox,
        place: (&Path, &[String]),
        content: &mut dyn Content,
    ) -> RecipientStatus {
        let mut copied = || {
            let mut copies = MessageWriter::default();
            self.begin(&mut copies, from, (to, to), place, "")?;
            content.rewind()?;
            for_each_block(content, |piece| copies.write(piece))?;
            copies.commit()
        };
        match copied() {
            Ok(_) => RecipientStatus::Sent(Reply::new(250, "2.0.0", "Delivered here")),
            Err(error) => RecipientStatus::Deferred(storage_failure_reply(&error)),
        }
    }

    /// Delivers to a Maildir of ours what no next hop takes and somebody must.
    pub fn deliver_fallback(&self, from: &ReversePath, to: &Mailbox, content: &mut dyn Content) -> RecipientStatus {
        self.copy(from, to, (&self.fallback(to), &[]), content)
    }

    /// Refuses mail that the disk would not hold.
    pub fn check_room(&self, octets: u64) -> Result<(), Reply> {
        if has_room(&self.root, octets) { Ok(()) } else { Err(disk_full_reply()) }
    }
}

/// A recipient whom the rules do not know.
pub type RejectedRecipient = (Recipient, Reply);

/// Where the recipients of a message go.
#[derive(Default)]
pub struct Routing {
    /// Who has it when the copies are committed.
    pub delivered_here: Vec<Recipient>,
    /// Who stands for several, next hops among them.
    pub expanded: Vec<Recipient>,
    /// Those whom the copies are for.
    pub maildir_recipients: Vec<Recipient>,
    /// What each next hop shall have.
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

/// A recipient as a next hop gets it, one of so many in whose place it was meant. What its sender wants to know goes
/// with it, unless several would tell him (RFC 3461 section 5.2.7.3).
pub fn relayed_recipient(meant: &Recipient, to: &Mailbox, of: usize) -> Recipient {
    match of {
        1 => Recipient { mailbox: to.clone(), ..meant.clone() },
        _ => Recipient { notify: meant.notify.without_success(), ..Recipient::plain(to.clone()) },
    }
}
