//! The list of recipients that a customer gives its provider, which rejects all others at RCPT.

use std::collections::BTreeSet;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};

use super::input::AddressPattern;
use crate::mail::address::{Domain, Mailbox};

/// The begin of a detail: `alice+detail` is a recipient if `alice` is.
const SEPARATOR: char = '+';

/// One entry of a list.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ListedRecipient {
    /// An address, or all those of a domain.
    pub pattern: AddressPattern,
    /// `!spam@example.org`: an exception in a domain that is listed as a whole.
    pub excepted: bool,
}

/// A list of recipients. It has the hashes of addresses, 8 octets each. If two addresses have the same hash, an unknown
/// recipient is accepted, which gains a client nothing.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RecipientList {
    whole: BTreeSet<Domain>,
    /// Hashes of addresses, sorted.
    listed: Vec<u64>,
    excepted: Vec<u64>,
    /// The domains that an entry is about.
    named: BTreeSet<Domain>,
}

fn hash(pattern: &AddressPattern) -> u64 {
    let mut hasher = DefaultHasher::new();
    pattern.hash(&mut hasher);
    hasher.finish()
}

impl FromIterator<ListedRecipient> for RecipientList {
    fn from_iter<I: IntoIterator<Item = ListedRecipient>>(entries: I) -> RecipientList {
        let mut list = RecipientList::default();
        entries.into_iter().for_each(|entry| list.add(entry));
        list.sort();
        list
    }
}

impl RecipientList {
    /// Adds an entry. Call [`RecipientList::sort`] after the last one.
    pub fn add(&mut self, entry: ListedRecipient) {
        if let Some(domain) = entry.pattern.domain().filter(|domain| !self.named.contains(domain)) {
            self.named.insert(domain.clone());
        }
        match entry.pattern {
            AddressPattern::Domain(domain) => drop(self.whole.insert(domain)),
            address if entry.excepted => self.excepted.push(hash(&address)),
            address => self.listed.push(hash(&address)),
        }
    }

    /// Sorts the list, so that [`RecipientList::knows`] can search it.
    pub fn sort(&mut self) {
        for hashes in [&mut self.listed, &mut self.excepted] {
            hashes.sort_unstable();
            hashes.dedup();
            hashes.shrink_to_fit();
        }
    }

    /// Whether the list has no entry.
    pub fn is_empty(&self) -> bool {
        self.named.is_empty()
    }

    /// The number of entries, not counting exceptions.
    pub fn count(&self) -> u64 {
        (self.whole.len() + self.listed.len()) as u64
    }

    /// Whether an entry is about the domain. If not, only its postmaster is a recipient.
    pub fn names(&self, domain: &Domain) -> bool {
        self.named.contains(domain)
    }

    /// Whether a mailbox in a domain of the customer is a recipient. The most specific entry decides: that of the address,
    /// of the address without its detail, or of the domain.
    pub fn knows(&self, mailbox: &Mailbox) -> bool {
        let Some(domain) = mailbox.domain() else { return false };
        let local = mailbox.local();
        // RFC 5321 section 4.5.1: every domain has a postmaster.
        if local.eq_ignore_ascii_case("postmaster") {
            return true;
        }
        let base = local.split_once(SEPARATOR).map(|(base, _)| base).filter(|base| !base.is_empty());
        for name in [Some(local), base].into_iter().flatten() {
            let hash = hash(&AddressPattern::address(name, domain));
            if self.excepted.binary_search(&hash).is_ok() {
                return false;
            }
            if self.listed.binary_search(&hash).is_ok() {
                return true;
            }
        }
        self.whole.contains(domain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_specific_entry_decides() {
        let entry = |text: &str| {
            let (excepted, text) = text.strip_prefix('!').map_or((false, text), |text| (true, text));
            let pattern = match text.strip_prefix('@') {
                Some(domain) => AddressPattern::Domain(Domain::parse(domain).unwrap()),
                None => AddressPattern::of(&Mailbox::parse(text).unwrap()).unwrap(),
            };
            ListedRecipient { pattern, excepted }
        };
        let entries = [
            "Alice@example.org",
            "\"b c\"@example.org",
            "!alice+spam@example.org",
            "eva+news@example.org",
            "@example.net",
            "!spam@example.net",
            "spam+ham@example.net",
            "jörg@example.org",
            "!nobody@example.com",
        ];
        let list: RecipientList = entries.into_iter().map(entry).collect();
        for (address, known) in [
            ("alice@example.org", true),
            ("ALICE@EXAMPLE.ORG", true),
            ("alice+x@example.org", true),
            ("alice+spam@example.org", false),
            ("alice+spam+x@example.org", true),
            ("alic@example.org", false),
            ("+x@example.org", false),
            ("\"B C\"@example.org", true),
            ("b@example.org", false),
            ("JÖRG@example.org", true),
            ("eva@example.org", false),
            ("eva+news@example.org", true),
            ("abuse@example.org", false),
            ("postmaster@example.org", true),
            ("Postmaster@example.com", true),
            ("any@example.net", true),
            ("spam@example.net", false),
            ("spam+x@example.net", false),
            ("spam+ham@example.net", true),
            ("alice@sub.example.org", false),
            ("any@example.com", false),
        ] {
            assert_eq!(list.knows(&Mailbox::parse(address).unwrap()), known, "{address}");
        }
        assert_eq!((list.count(), list.is_empty()), (6, false));
        let named = ["example.org", "example.com", "example.edu"].map(|name| list.names(&Domain::parse(name).unwrap()));
        assert_eq!(named, [true, true, false]);
    }
}
