//! Local delivery: who has a mailbox here, and where it is.
//!
//! `root/<domain>/<local part>/` is a Maildir. A local part may hold anything (`../x`, slashes, spaces), so
//! its folder is a translation of it that stays below its domain's: small letters, digits, `._+=-` and
//! UTF-8 letters stand for themselves, capitals become small, everything else, and a dot in front, is `%HH`.

use std::collections::HashSet;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::config::{self, Accept};
use crate::maildir::{Copies, Maildir, has_room};
use crate::outgoing::Desk;
use crate::queue::Envelope;
use crate::sasl::{Secrets, Unavailable};
use crate::session::{Intake, Party, disk_full, storage_reply};
use crate::smtp::address::{Domain, ForwardPath, Mailbox, ReversePath};
use crate::smtp::command::MailFrom;
use crate::smtp::reply::Reply;
use crate::smtp::server::{Host, Server};
use crate::stamp::Stamps;

/// The name of a folder may have so many octets, with room for what mail readers put beside it.
const FOLDER_LIMIT: usize = 200;

/// Of a longer header no more comes back with a notice.
const HEADER_LIMIT: usize = 64 * 1024;

/// What came and went in one call.
#[derive(Debug, Default)]
pub struct Tally {
    pub messages: AtomicU64,
    pub octets: AtomicU64,
    /// Recipients that were refused.
    pub refused: AtomicU64,
    /// Outgoing messages that somebody took, and those that wait.
    pub sent: AtomicU64,
    pub kept: AtomicU64,
}

/// The mailboxes of a customer.
pub struct Mailboxes {
    root: PathBuf,
    /// Local parts in small letters.
    addresses: HashSet<(String, Domain)>,
    catch_all: HashSet<Domain>,
    /// The domains of all of these; the first is where a bare `postmaster` is at home.
    domains: Vec<Domain>,
    hostname: String,
    stamps: Stamps,
}

impl Mailboxes {
    pub fn new(config: &config::Customer, stamps: &Stamps) -> Mailboxes {
        let mut mailboxes = Mailboxes {
            root: config.mailboxes.root.clone(),
            addresses: HashSet::new(),
            catch_all: HashSet::new(),
            domains: Vec::new(),
            hostname: config.hostname.clone(),
            stamps: stamps.clone(),
        };
        for accept in &config.mailboxes.accept {
            let domain = match accept {
                Accept::Domain(domain) => {
                    mailboxes.catch_all.insert(domain.clone());
                    domain
                }
                Accept::Address(mailbox) => {
                    let Some(domain) = mailbox.domain() else { continue };
                    mailboxes.addresses.insert((mailbox.local().to_ascii_lowercase(), domain.clone()));
                    domain
                }
            };
            if !mailboxes.domains.contains(domain) {
                mailboxes.domains.push(domain.clone());
            }
        }
        mailboxes
    }

    /// Whether a domain has mailboxes here.
    pub fn serves(&self, domain: &Domain) -> bool {
        self.domains.contains(domain)
    }

    /// Which of our mailboxes is meant.
    pub fn find(&self, path: &ForwardPath) -> Result<Mailbox, Reply> {
        let nobody = || Reply::new(550, "5.1.1", "No such mailbox here");
        let mailbox = match path {
            ForwardPath::Mailbox(mailbox) => mailbox.clone(),
            // RFC 5321 section 4.5.1.
            ForwardPath::Postmaster => {
                let home = self.domains.first().ok_or_else(nobody)?;
                Mailbox::parse(&format!("postmaster@{home}")).ok_or_else(nobody)?
            }
        };
        let Some(domain) = mailbox.domain().filter(|domain| self.domains.contains(domain)) else {
            // A turned session is no relay.
            return Err(Reply::new(550, "5.7.1", "Relaying denied: that domain has no mailboxes here"));
        };
        let local = mailbox.local().to_ascii_lowercase();
        let known = local == "postmaster"
            || self.catch_all.contains(domain)
            || self.addresses.contains(&(local.clone(), domain.clone()));
        if !known || folder(&local).len() > FOLDER_LIMIT || local.is_empty() {
            return Err(nobody());
        }
        Ok(mailbox)
    }

    fn maildir(&self, mailbox: &Mailbox) -> Option<Maildir> {
        let domain = mailbox.domain()?;
        Some(Maildir::new(self.root.join(domain.as_str()).join(folder(mailbox.local()))))
    }

    /// Begins a copy in a mailbox: one Return-Path at the top (RFC 5321 section 4.4), then what the content
    /// begins with, our `Received`.
    pub fn begin(&self, copies: &mut Copies, from: &ReversePath, to: &Mailbox, head: &str) -> io::Result<()> {
        let Some(maildir) = self.maildir(to) else { return Ok(()) };
        let head = format!("Return-Path: <{from}>\nDelivered-To: {to}\n{head}");
        copies.begin(&maildir, &self.stamps.file_name(&self.hostname), head.as_bytes())
    }

    /// Refuses mail that the disk would not hold.
    pub fn make_room(&self, octets: u64) -> Result<(), Reply> {
        if has_room(&self.root, octets) { Ok(()) } else { Err(disk_full()) }
    }
}

/// The name of a mailbox's folder.
fn folder(local: &str) -> String {
    let mut name = String::with_capacity(local.len());
    for character in local.chars().map(|character| character.to_ascii_lowercase()) {
        let plain = match character {
            '.' => !name.is_empty(),
            '_' | '+' | '=' | '-' => true,
            other => other.is_alphanumeric(),
        };
        if plain {
            name.push(character);
        } else {
            let mut octets = [0; 4];
            for octet in character.encode_utf8(&mut octets).bytes() {
                name.push_str(&format!("%{octet:02X}"));
            }
        }
    }
    name
}

/// The customer after the turn: it takes mail for its own mailboxes.
pub struct Receiver {
    mailboxes: Arc<Mailboxes>,
    /// Makes the notices of delivery that a sender asked for.
    desk: Option<Desk>,
    tally: Arc<Tally>,
}

impl Receiver {
    pub fn new(mailboxes: Arc<Mailboxes>, desk: Option<Desk>, tally: Arc<Tally>) -> Receiver {
        Receiver { mailboxes, desk, tally }
    }
}

impl Secrets for Receiver {
    /// Nobody authenticates to a customer.
    fn secret(&self, _: &str) -> Result<Option<Vec<u8>>, Unavailable> {
        Ok(None)
    }
}

impl Host for Receiver {
    fn sender(&mut self, mail: &MailFrom, _: Option<&str>) -> Result<(), Reply> {
        self.mailboxes.make_room(mail.size.unwrap_or(0))
    }

    fn recipient(&mut self, path: &ForwardPath) -> Result<Mailbox, Reply> {
        self.mailboxes.find(path).inspect_err(|_| {
            self.tally.refused.fetch_add(1, Ordering::Relaxed);
        })
    }
}

impl Party for Receiver {
    /// Final delivery: a file for each recipient.
    fn intake(&mut self, server: &Server, peer: &str, secure: Option<&str>) -> Result<Box<dyn Intake>, Reply> {
        let Some(transaction) = server.transaction() else {
            return Err(Reply::new(503, "5.5.1", "Say MAIL first"));
        };
        let (mail, stamps) = (&transaction.mail, &self.mailboxes.stamps);
        let (id, arrived) = (stamps.id(), stamps.now());
        let received = server.received(peer, secure, &id, arrived);
        let mut copies = Copies::default();
        for recipient in &transaction.recipients {
            let begun = self.mailboxes.begin(&mut copies, &mail.path, &recipient.mailbox, &received);
            begun.map_err(|error| storage_reply(&error))?;
        }
        let envelope = Envelope {
            from: mail.path.clone(),
            recipients: transaction.recipients.clone(),
            id: id.clone(),
            arrived,
            body: mail.body,
            utf8: mail.utf8,
            ret: mail.ret,
            envelope_id: mail.envelope_id.clone(),
        };
        let told = self.desk.as_ref().and_then(|desk| Told::new(desk, &envelope));
        Ok(Box::new(Delivery { copies, id, octets: 0, told, tally: self.tally.clone() }))
    }
}

/// A message on its way into its mailboxes.
struct Delivery {
    copies: Copies,
    id: String,
    octets: u64,
    told: Option<Told>,
    tally: Arc<Tally>,
}

/// What it takes to tell the sender of a delivery.
pub struct Told {
    desk: Desk,
    envelope: Envelope,
    header: Vec<u8>,
}

impl Told {
    /// `None`: none of these recipients is to be told of.
    pub fn new(desk: &Desk, envelope: &Envelope) -> Option<Told> {
        let asked = envelope.recipients.iter().any(|recipient| recipient.notify.success());
        asked.then(|| Told { desk: desk.clone(), envelope: envelope.clone(), header: Vec::new() })
    }

    /// Content goes by; its header is kept.
    pub fn see(&mut self, octets: &[u8]) {
        let room = HEADER_LIMIT.saturating_sub(self.header.len());
        self.header.extend_from_slice(&octets[..octets.len().min(room)]);
    }

    /// The mail is there; that its sender does not hear of it would be no reason to refuse it.
    pub fn tell(&self) {
        if let Err(error) = self.desk.delivered(&self.envelope, &self.header) {
            log::error!("event=notice-failed id={} error={:?}", self.envelope.id, error.to_string());
        }
    }
}

impl Intake for Delivery {
    fn write(&mut self, octets: &[u8]) -> io::Result<()> {
        self.octets += octets.len() as u64;
        if let Some(told) = &mut self.told {
            told.see(octets);
        }
        self.copies.write(octets)
    }

    fn commit(self: Box<Self>) -> io::Result<Reply> {
        self.copies.commit()?;
        self.tally.messages.fetch_add(1, Ordering::Relaxed);
        self.tally.octets.fetch_add(self.octets, Ordering::Relaxed);
        if let Some(told) = &self.told {
            told.tell();
        }
        Ok(Reply::new(250, "2.6.0", format!("OK, id={}", self.id)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_local_part_never_leaves_its_domain() {
        assert_eq!(folder("Alice.B"), "alice.b");
        assert_eq!(folder("user+detail"), "user+detail");
        assert_eq!(folder("../x"), "%2E.%2Fx");
        assert_eq!(folder("."), "%2E");
        assert_eq!(folder(".."), "%2E.");
        assert_eq!(folder("a/b c%"), "a%2Fb%20c%25");
        assert_eq!(folder("jürgen"), "jürgen");
        assert_eq!(folder("\0"), "%00");
    }

    proptest::proptest! {
        #[test]
        fn no_local_part_makes_a_path(local: String) {
            let name = folder(&local);
            proptest::prop_assert!(!name.starts_with('.') && !name.contains('/') && !name.contains('\0'));
        }

        #[test]
        fn two_local_parts_have_two_folders(one in "[ -~]{1,8}", other in "[ -~]{1,8}") {
            let same = one.eq_ignore_ascii_case(&other);
            proptest::prop_assert_eq!(folder(&one) == folder(&other), same);
        }
    }
}
