//! One directory for the mail of many domains, and the index of its messages.
//!
//! Strangers choose the domains to which DSNs are sent. A directory for each domain would remain after its mail, and
//! strangers could fill the disk with directories. So mail for domains elsewhere is in one directory: the name of a
//! message's file has its domain, and a session locks this file (flock(2)) as long as it has the message.
//!
//! Without an index the relay would list the whole directory for each domain. The relay records in the index what
//! arrives and what is settled. What other processes do is found when the directory is read again: from time to time,
//! and if a message is not found under its name.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::io;

use super::message;
use super::name::QueueName;
use crate::mail::address::{Domain, Mailbox, ReversePath};
use crate::maildir::{Entry, with_path};
use crate::net::trace::quoted;
use crate::smtp::command::Envelope;
use crate::sorting::sort_by;
use crate::threads::Guarded;

/// Octets of a file's name at most with the domain. A longer one would leave too little room for the record of
/// attempts: then the name does not have the domain.
const NAME_LIMIT: usize = 150;

/// The name for a new file in a shared directory: `unique`, with the domain of the recipients after `D=`, or after `B=`
/// (bounce) if the message has no sender.
pub(super) fn file_name(unique: String, domain: &Domain, envelope: &Envelope) -> String {
    let key = if envelope.from == ReversePath::Null { "B" } else { "D" };
    let name = format!("{unique},{key}={}", domain.file_name());
    if name.len() > NAME_LIMIT { unique } else { name }
}

/// The domain in the name of a file.
pub(super) fn named_domain(entry: &Entry) -> Option<Domain> {
    entry.destination().and_then(|(name, _)| Domain::of_file_name(name))
}

/// The domain of a message in a shared directory, by its name or by its recipients. `None`: the file is not a message,
/// which is logged.
///
/// # Errors
/// `NotFound`: the file is gone, or has another name; otherwise it cannot be read.
pub(super) fn domain_of(name: &QueueName, entry: &Entry) -> io::Result<Option<Domain>> {
    if let Some(domain) = named_domain(entry) {
        return Ok(Some(domain));
    }
    let path = name.maildir().file(entry);
    let not_mail = |reason: &str| {
        log::warn!("event=not-mail queue={name} file={} reason={}", quoted(path.display()), quoted(reason));
        Ok(None)
    };
    let file = match message::open_file(&path).map_err(|error| with_path(&path, error))? {
        Ok(file) => file,
        Err(kind) => return not_mail(kind),
    };
    let all = QueueName { domain: None, ..name.clone() };
    match message::read_envelope(&file, entry, &all).map_err(|error| with_path(&path, error))? {
        Ok(parsed) => {
            let settled = parsed.settled_addresses.iter().filter_map(|address| Mailbox::parse(address));
            let mut open = parsed.recipients().iter().map(|recipient| recipient.mailbox.clone()).chain(settled);
            match open.find_map(|mailbox| mailbox.domain().cloned()) {
                Some(domain) => Ok(Some(domain)),
                None => not_mail("it names no recipient with a domain"),
            }
        }
        Err(reason) => not_mail(&reason),
    }
}

/// The messages of a shared directory, by domain.
#[derive(Default)]
pub struct SharedIndex(Guarded<State>);

#[derive(Default)]
struct State {
    by_domain: HashMap<Domain, BTreeSet<Entry>>,
    /// The domains of files whose names do not have them, so that these are read once; `None`: the file is not a
    /// message.
    unnamed: HashMap<OsString, Option<Domain>>,
    /// See [`SharedIndex::take_news`].
    news: HashSet<Domain>,
}

impl SharedIndex {
    /// Reads the directory. A file that cannot be read is logged, and left out until the next call.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn read(&self, name: &QueueName) -> io::Result<()> {
        self.read_by(name, &|entry| domain_of(name, entry))
    }

    fn read_by(&self, name: &QueueName, domain_of: &dyn Fn(&Entry) -> io::Result<Option<Domain>>) -> io::Result<()> {
        // The lock is held until the end: what is added or settled meanwhile is recorded after it, and not overwritten.
        let (mut state, mut read) = (self.0.lock(), State::default());
        read.news = state.news.clone();
        name.maildir().each_file(&mut |entry, _| {
            let known = state.unnamed.get(entry.unique()).cloned();
            let domain = match known.map_or_else(|| domain_of(&entry), Ok) {
                Ok(domain) => domain,
                Err(error) => {
                    if error.kind() != io::ErrorKind::NotFound {
                        log::error!("event=unreadable queue={name} error={}", quoted(error));
                    }
                    return Ok(());
                }
            };
            if named_domain(&entry).is_none() {
                read.unnamed.insert(entry.unique().to_owned(), domain.clone());
            }
            if let Some(domain) = domain {
                if !state.by_domain.get(&domain).is_some_and(|entries| entries.contains(&entry)) {
                    read.news.insert(domain.clone());
                }
                read.by_domain.entry(domain).or_default().insert(entry);
            }
            Ok(())
        })?;
        *state = read;
        Ok(())
    }

    /// Records that a message has arrived.
    pub fn add(&self, domain: Domain, entry: Entry) {
        let mut state = self.0.lock();
        if named_domain(&entry).is_none() {
            state.unnamed.insert(entry.unique().to_owned(), Some(domain.clone()));
        }
        state.by_domain.entry(domain).or_default().insert(entry);
    }

    /// Records the present name of a message; `None`: it is gone.
    pub(super) fn replace(&self, domain: &Domain, unique: &OsStr, entry: Option<&Entry>) {
        let mut state = self.0.lock();
        let entries = state.by_domain.entry(domain.clone()).or_default();
        let first = Entry { name: unique.to_owned(), seen: false };
        let starts = |entry: &&Entry| entry.name.as_encoded_bytes().starts_with(unique.as_encoded_bytes());
        let same: Vec<_> =
            entries.range(first..).take_while(starts).filter(|entry| entry.unique() == unique).cloned().collect();
        for entry in same {
            entries.remove(&entry);
        }
        entries.extend(entry.cloned());
        if entries.is_empty() {
            state.by_domain.remove(domain);
        }
        if entry.is_none() {
            state.unnamed.remove(unique);
        }
    }

    /// The messages for a domain, as [`Maildir::entries`](crate::maildir::Maildir::entries) orders them.
    pub(super) fn entries(&self, domain: &Domain) -> Vec<Entry> {
        let mut entries: Vec<_> = self.0.lock().by_domain.get(domain).into_iter().flatten().cloned().collect();
        sort_by(&mut entries, Entry::by_age);
        entries
    }

    /// The domains for which [`SharedIndex::read`] has found new messages, or new names of messages, since the last
    /// call.
    pub fn take_news(&self) -> HashSet<Domain> {
        std::mem::take(&mut self.0.lock().news)
    }

    /// The domains with mail.
    pub fn domains(&self) -> Vec<Domain> {
        self.0.lock().by_domain.keys().cloned().collect()
    }
}

#[cfg(test)]
mod tests;
