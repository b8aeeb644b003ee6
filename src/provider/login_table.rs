//! The rules for how long an attempt to authenticate waits, so that clients cannot guess secrets. No clock, no files.
//!
//! The table counts the failures of each network (IPv4 /24, IPv6 /64) and of each account. After three, an attempt waits
//! one second, and twice as long after each further failure, up to 30 seconds. The greater count decides: a client that
//! guesses from many networks is slowed by the account's count, one that guesses at many accounts by the network's.
//!
//! The delays must not lock customers out:
//!
//! - The networks from which an account has authenticated are *known*: there, only the account's failures in that network
//!   count.
//! - Few attempts may wait at once, and a more urgent attempt displaces the least urgent one: those from known networks
//!   come first, then those from networks with fewer failures, then those from an address (IPv6: a /48) with fewer waiting
//!   attempts. So a customer is locked out neither by guesses from its own network nor by guesses from many. Only an
//!   attacker with thousands of networks can lock out a customer, while the attack lasts, in a network that is not known.
//! - Many customers may call at once from one network: eight attempts are decided at a time, the others wait until one
//!   of these has ended.
//!
//! ```text
//! failed 1795689600 12 network 192.0.2.0/24     time of the last failure, failures
//! failed 1795689600 12 account DIGEST
//! known 1795689600 0 DIGEST 192.0.2.0/24        time of a login or of the last failure, failures since the last login
//! waits 1795689630 12 ID 192.0.2.1              end of the wait, failures; `gone` in place of `waits`: the attempt is displaced
//! ```

use std::fmt::{self, Write as _};
use std::mem::discriminant;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use data_encoding::HEXLOWER;

/// Failures without a delay.
const FREE_FAILURES: u32 = 3;

/// The longest wait of an attempt, in seconds.
const LONGEST_DELAY: u32 = 30;

/// The maximum of a count, so that an hour without a failure ends any delay.
const MOST_FAILURES: u32 = 48;

/// Each time this many seconds pass without a failure, the count is halved.
const HALVED_AFTER: i64 = 15 * 60;

/// The maximum of attempts that wait at once, in all and from one network.
const WAITING_LIMIT: usize = 32;
const WAITING_LIMIT_EACH: usize = 8;

/// The maximum of open attempts of a network, an account or a known network, together with its failures. Further attempts wait
/// for the ends of these, without a delay: many customers may call at once.
const OPEN_LIMIT: u32 = 8;

/// The maximum of networks, and of accounts, whose failures are counted: those with the most.
const COUNTED_LIMIT: usize = 512;

/// The maximum of known networks, in all and of one account.
const KNOWN_LIMIT: usize = 4096;
const KNOWN_LIMIT_EACH: usize = 16;

/// Seconds after which another login from a known network is recorded: most logins must not write the file.
const KNOWN_RENEWED_AFTER: i64 = 24 * 60 * 60;

/// The text for an unknown address.
const UNKNOWN: &str = "unknown";

/// The network of addresses that count as one client.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ClientNetwork(Option<IpAddr>);

impl ClientNetwork {
    /// The network of an address; `None`: the address is unknown, for instance of a pipe.
    pub fn of(address: Option<IpAddr>) -> ClientNetwork {
        ClientNetwork(address.map(|address| match address.to_canonical() {
            IpAddr::V4(address) => Ipv4Addr::from_bits(address.to_bits() >> 8 << 8).into(),
            IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        }))
    }

    fn parse(text: &str) -> Option<ClientNetwork> {
        let address = text.split_once('/').map_or(text, |(address, _)| address);
        Some(ClientNetwork::of(parse_address(address)?))
    }
}

impl fmt::Display for ClientNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(address @ IpAddr::V4(_)) => write!(f, "{address}/24"),
            Some(address @ IpAddr::V6(_)) => write!(f, "{address}/64"),
            None => f.write_str(UNKNOWN),
        }
    }
}

/// The addresses that share places for waiting attempts: one IPv4 address, or a /48 of IPv6, which costs an attacker nothing.
fn site(address: Option<IpAddr>) -> Option<IpAddr> {
    address.map(|address| match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 80 << 80).into(),
        address => address,
    })
}

fn parse_address(text: &str) -> Option<Option<IpAddr>> {
    if text == UNKNOWN { Some(None) } else { Some(Some(text.parse().ok()?)) }
}

/// The digest of a name that a client has sent, of an existing account or not. The file must contain neither names nor
/// secrets that were typed in place of names.
pub type AccountDigest = [u8; 16];

fn parse_digest(text: &str) -> Option<AccountDigest> {
    HEXLOWER.decode(text.as_bytes()).ok()?.try_into().ok()
}

/// The subject of a count.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Subject {
    /// The failures of a network.
    Network(ClientNetwork),
    /// The failures of an account.
    Account(AccountDigest),
    /// The failures of an account in a known network since its last login there.
    Known(AccountDigest, ClientNetwork),
    /// The attempts of a network that were rejected or displaced because too many wait. They are not in the file: each
    /// would have to write it.
    Rejected(ClientNetwork),
}

impl Subject {
    fn is_known(&self) -> bool {
        matches!(self, Subject::Known(..))
    }
}

#[derive(Clone, Copy, Debug)]
struct Count {
    subject: Subject,
    count: u32,
    /// The last time, in seconds since 1970.
    at: i64,
}

impl Count {
    /// The count at `now`: halved for each [`HALVED_AFTER`] that has passed.
    fn left(&self, now: i64) -> u32 {
        let halvings = now.saturating_sub(self.at).max(0) / HALVED_AFTER;
        self.count.checked_shr(u32::try_from(halvings).unwrap_or(u32::MAX)).unwrap_or(0)
    }
}

/// An attempt that waits.
#[derive(Clone, Debug)]
struct WaitingAttempt {
    id: String,
    address: Option<IpAddr>,
    until: i64,
    /// The failures of its network plus 1; 0: the network is known.
    failures: u32,
    /// Another attempt has displaced it.
    displaced: bool,
}

/// One AUTH command of a client.
#[derive(Clone, Debug)]
pub struct AttemptOrigin {
    /// Unique among all processes.
    pub id: String,
    /// `None`: unknown, for instance of a pipe.
    pub address: Option<IpAddr>,
    pub account: AccountDigest,
}

impl AttemptOrigin {
    fn network(&self) -> ClientNetwork {
        ClientNetwork::of(self.address)
    }

    fn known(&self) -> Subject {
        Subject::Known(self.account, self.network())
    }

    /// The subjects for which its failure counts.
    pub fn subjects(&self) -> [Subject; 2] {
        [Subject::Network(self.network()), Subject::Account(self.account)]
    }
}

/// Whether the server may decide an attempt.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Admission {
    /// Yes, now.
    Free,
    /// After this many seconds. The attempt counts as a failure until it succeeds or is withdrawn.
    Delayed(u32),
    /// No: too many attempts wait.
    Rejected,
}

/// The end of an attempt.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AttemptEnd {
    /// The client is authenticated.
    Succeeded,
    Failed,
    /// The server has compared no secret.
    Withdrawn,
}

/// The delay, in seconds, of an attempt that would be failure number `failures`.
fn delay(failures: u32) -> u32 {
    match failures.checked_sub(FREE_FAILURES + 1) {
        None => 0,
        Some(doublings) => 1_u32.checked_shl(doublings.min(31)).unwrap_or(LONGEST_DELAY).min(LONGEST_DELAY),
    }
}

/// The failures, the known networks, and the waiting attempts.
#[derive(Default, Debug)]
pub struct LoginTable {
    counts: Vec<Count>,
    waiting: Vec<WaitingAttempt>,
    /// Open attempts of this process without a delay, each with the subjects for which its failure would count. They are
    /// not in the file, so that a login from a known network writes nothing.
    open: Vec<(String, Vec<Subject>)>,
}

impl LoginTable {
    /// Begins an attempt. A delayed one counts as a failure from now on: otherwise many at once would all wait for the same
    /// time.
    pub fn begin(&mut self, attempt: &AttemptOrigin, now: i64) -> Admission {
        if self.open(attempt, now) {
            return Admission::Free;
        }
        let (failures, others) = self.counts_before(attempt, now);
        let order = match self.find(&attempt.known()) {
            Some(_) => 0,
            None => self.left(&Subject::Network(attempt.network()), now) + 1,
        };
        let seconds = delay(failures + others.saturating_sub(OPEN_LIMIT - FREE_FAILURES) + 1);
        if !self.reserve(attempt, order, now + i64::from(seconds), now) {
            self.add(Subject::Rejected(attempt.network()), u32::MAX, now);
            return Admission::Rejected;
        }
        self.count(attempt, now);
        Admission::Delayed(seconds)
    }

    /// Begins an attempt if it has no delay. Returns whether it does.
    pub fn open(&mut self, attempt: &AttemptOrigin, now: i64) -> bool {
        self.settle(now);
        // The attempt may be open already: after the file is read, it begins again in the new table.
        self.open.retain(|(id, _)| *id != attempt.id);
        let (failures, others) = self.counts_before(attempt, now);
        let is_free = delay(failures + 1) == 0 && failures + others < OPEN_LIMIT;
        if is_free {
            self.open.push((attempt.id.clone(), self.subjects_of(attempt)));
        }
        is_free
    }

    /// Whether an attempt waits only because too many others are open.
    pub fn is_crowded(&self, attempt: &AttemptOrigin, now: i64) -> bool {
        let (failures, others) = self.counts_before(attempt, now);
        delay(failures + 1) == 0 && failures + others >= OPEN_LIMIT
    }

    /// The subjects whose counts decide the delay of an attempt: from a known network, that one alone.
    fn subjects_of(&self, attempt: &AttemptOrigin) -> Vec<Subject> {
        match self.find(&attempt.known()) {
            Some(_) => vec![attempt.known()],
            None => attempt.subjects().to_vec(),
        }
    }

    /// The failures before an attempt, and the number of other open attempts: for each, the highest of its subjects.
    fn counts_before(&self, attempt: &AttemptOrigin, now: i64) -> (u32, u32) {
        let is_other_of = |subject, (id, open): &(String, Vec<Subject>)| *id != attempt.id && open.contains(subject);
        let others = |subject| self.open.iter().filter(|open| is_other_of(subject, open)).count();
        let subjects = self.subjects_of(attempt);
        let failures = subjects.iter().map(|subject| self.most(subject, now)).max().unwrap_or(0);
        (failures, subjects.iter().map(others).max().map_or(0, |others| u32::try_from(others).unwrap_or(MOST_FAILURES)))
    }

    /// Ends an attempt. `counted`: its begin was counted as a failure.
    pub fn end(&mut self, attempt: &AttemptOrigin, counted: bool, end: AttemptEnd, now: i64) {
        self.settle(now);
        self.waiting.retain(|waiting| waiting.id != attempt.id);
        self.open.retain(|(id, _)| *id != attempt.id);
        match (end, counted) {
            (AttemptEnd::Failed, true) | (AttemptEnd::Withdrawn | AttemptEnd::Succeeded, false) => {}
            (AttemptEnd::Failed, false) => self.count(attempt, now),
            (AttemptEnd::Withdrawn | AttemptEnd::Succeeded, true) => self.uncount(attempt, now),
        }
        // A login does not clear the counts of the network and the account: otherwise a guesser with an account could clear
        // its network.
        if end == AttemptEnd::Succeeded {
            self.learn(attempt.account, attempt.network(), now);
        }
    }

    /// Whether another attempt has displaced this waiting one.
    pub fn is_displaced(&self, id: &str) -> bool {
        self.waiting.iter().any(|waiting| waiting.displaced && waiting.id == id)
    }

    /// Whether an account has authenticated from this network.
    pub fn knows(&self, network: ClientNetwork) -> bool {
        self.counts.iter().any(|count| matches!(count.subject, Subject::Known(_, known) if known == network))
    }

    /// Moves the state that is not in the file from an earlier table to this one.
    pub fn take_unwritten(&mut self, earlier: &mut LoginTable) {
        self.open = std::mem::take(&mut earlier.open);
        let rejected = earlier.counts.iter().filter(|count| matches!(count.subject, Subject::Rejected(_)));
        self.counts.extend(rejected);
    }

    fn find(&self, subject: &Subject) -> Option<usize> {
        self.counts.iter().position(|count| count.subject == *subject)
    }

    fn left(&self, subject: &Subject, now: i64) -> u32 {
        self.find(subject).map_or(0, |at| self.counts[at].left(now))
    }

    /// The lowest count of this kind, which a new one replaces; `None`: there is room for one more.
    fn least(&self, kind: &Subject, now: i64) -> Option<usize> {
        let is_alike = |(_, count): &(usize, &Count)| discriminant(&count.subject) == discriminant(kind);
        let alike = || self.counts.iter().enumerate().filter(is_alike);
        let is_full = !kind.is_known() && alike().count() >= COUNTED_LIMIT;
        let least = alike().filter(|_| is_full).min_by_key(|(_, count)| (count.left(now), count.at));
        least.map(|(at, _)| at)
    }

    /// The count of a subject. If the table is full and does not have the subject: the lowest count in the table,
    /// because the subject may have had as many failures.
    fn most(&self, subject: &Subject, now: i64) -> u32 {
        let found = self.find(subject).or_else(|| self.least(subject, now));
        found.map_or(0, |at| self.counts[at].left(now))
    }

    /// Counts one more, up to `limit`. If there is no room, the subject replaces the lowest, and continues its count.
    /// So a client that invents names can neither clear a high count nor prevent the counting of others.
    fn add(&mut self, subject: Subject, limit: u32, now: i64) {
        let count = Count { subject, count: self.most(&subject, now).saturating_add(1).min(limit), at: now };
        match self.find(&subject).or_else(|| self.least(&subject, now)) {
            Some(at) => self.counts[at] = count,
            None => self.counts.push(count),
        }
    }

    /// Counts a failure of the network, of the account, and of the known network if it is one.
    fn count(&mut self, attempt: &AttemptOrigin, now: i64) {
        let known = Some(attempt.known()).filter(|known| self.find(known).is_some());
        attempt.subjects().into_iter().chain(known).for_each(|subject| self.add(subject, MOST_FAILURES, now));
    }

    /// Reverses [`LoginTable::count`].
    fn uncount(&mut self, attempt: &AttemptOrigin, now: i64) {
        for subject in attempt.subjects().into_iter().chain([attempt.known()]) {
            if let Some(at) = self.find(&subject) {
                self.counts[at].count = self.counts[at].count.saturating_sub(1);
            }
        }
        self.settle(now);
    }

    /// Finds a place for an attempt to wait. `failures`: as [`WaitingAttempt::failures`]. Returns whether there is one.
    fn reserve(&mut self, attempt: &AttemptOrigin, failures: u32, until: i64, now: i64) -> bool {
        let AttemptOrigin { id, address, .. } = attempt.clone();
        let there = || self.waiting.iter().enumerate().filter(|(_, waiting)| !waiting.displaced);
        let is_near = |waiting: &WaitingAttempt| ClientNetwork::of(waiting.address) == attempt.network();
        let is_full_near = there().filter(|(_, waiting)| is_near(waiting)).count() >= WAITING_LIMIT_EACH;
        if is_full_near || there().count() >= WAITING_LIMIT {
            // Displace the least urgent attempt: otherwise an attacker that has all places would lock out all customers in
            // unknown networks. Among equals, an attempt from a network without rejected attempts comes first.
            let order = |failures: u32, address, more| {
                // Within one network, the newer of two attempts has more failures only because it is newer.
                let failures = if is_full_near { failures.min(1) } else { failures };
                let places = there().filter(|(_, waiting)| site(waiting.address) == site(address)).count() + more;
                (failures, places, self.left(&Subject::Rejected(ClientNetwork::of(address)), now))
            };
            let all = there().filter(|(_, waiting)| !is_full_near || is_near(waiting));
            let last = all.map(|(at, waiting)| (order(waiting.failures, waiting.address, 0), at)).max();
            match last.filter(|(last, _)| *last > order(failures, address, 1)) {
                Some((_, at)) => {
                    self.waiting[at].displaced = true;
                    let network = ClientNetwork::of(self.waiting[at].address);
                    self.add(Subject::Rejected(network), u32::MAX, now);
                }
                None => return false,
            }
        }
        // One second more, because the clock has whole seconds only.
        self.waiting.push(WaitingAttempt { id, address, until: until + 1, failures, displaced: false });
        let mut displaced = self.waiting.iter().filter(|waiting| waiting.displaced);
        if displaced.clone().count() > WAITING_LIMIT
            && let Some(first) = displaced.next().map(|first| first.id.clone())
        {
            self.waiting.retain(|waiting| waiting.id != first);
        }
        true
    }

    /// Makes a network known: the account has authenticated from it.
    fn learn(&mut self, account: AccountDigest, network: ClientNetwork, now: i64) {
        let subject = Subject::Known(account, network);
        match self.find(&subject) {
            Some(at) => {
                let known = &mut self.counts[at];
                if known.count > 0 || now - known.at >= KNOWN_RENEWED_AFTER {
                    (known.count, known.at) = (0, now);
                }
            }
            None if self.make_room(account, now) => self.counts.push(Count { subject, count: 0, at: now }),
            None => {}
        }
    }

    /// Makes room for another network of an account. Returns whether there is room.
    fn make_room(&mut self, account: AccountDigest, now: i64) -> bool {
        let is_own = |subject| matches!(subject, Subject::Known(other, _) if other == account);
        let known = || self.counts.iter().enumerate().filter(|(_, count)| count.subject.is_known());
        let own = || known().filter(|(_, count)| is_own(count.subject)).map(|(at, count)| (count.at, at));
        // An account that logs in from many networks must not displace those of other customers.
        let oldest = if own().count() >= KNOWN_LIMIT_EACH {
            own().min()
        } else if known().count() >= KNOWN_LIMIT {
            // Do not replace a network that was recorded within the last day: with too many customers, each login would
            // write the file.
            let all = known().map(|(at, count)| (count.at, at));
            all.min().filter(|(seconds, _)| now - seconds >= KNOWN_RENEWED_AFTER)
        } else {
            return true;
        };
        oldest.map(|(_, at)| self.counts.remove(at)).is_some()
    }

    /// Removes counts that are 0 and waits that are over. If the clock was set back, times in the future become `now`, so
    /// that no delay gets longer.
    fn settle(&mut self, now: i64) {
        for count in &mut self.counts {
            count.at = count.at.min(now);
        }
        self.counts.retain(|count| count.subject.is_known() || count.left(now) > 0);
        self.waiting.retain(|waiting| waiting.until > now && waiting.until <= now + i64::from(LONGEST_DELAY) + 1);
    }

    /// The text of the file.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for Count { subject, count, at } in &self.counts {
            let _ = match subject {
                Subject::Network(network) => writeln!(text, "failed {at} {count} network {network}"),
                Subject::Account(digest) => writeln!(text, "failed {at} {count} account {}", HEXLOWER.encode(digest)),
                Subject::Known(digest, network) => {
                    writeln!(text, "known {at} {count} {} {network}", HEXLOWER.encode(digest))
                }
                Subject::Rejected(_) => Ok(()),
            };
        }
        for WaitingAttempt { id, address, until, failures, displaced } in &self.waiting {
            let word = if *displaced { "gone" } else { "waits" };
            let address = address.map_or_else(|| UNKNOWN.to_owned(), |address| address.to_string());
            let _ = writeln!(text, "{word} {until} {failures} {id} {address}");
        }
        text
    }

    /// Reads the text of the file. Returns also the number of lines that are damaged or too many.
    pub fn parse(text: &[u8]) -> (LoginTable, usize) {
        let (mut table, mut wrong) = (LoginTable::default(), 0);
        for line in text.split_inclusive(|octet| *octet == b'\n') {
            if table.parse_line(line).is_none() {
                wrong += 1;
            }
        }
        (table, wrong)
    }

    fn parse_line(&mut self, line: &[u8]) -> Option<()> {
        let fields: Vec<_> = str::from_utf8(line).ok()?.strip_suffix('\n')?.split(' ').collect();
        let [word, at, count, first, second] = fields.as_slice() else { return None };
        let at = at.parse().ok().filter(|at| *at >= 0)?;
        let count = count.parse::<u32>().ok()?.min(MOST_FAILURES);
        let subject = match (*word, *first) {
            ("failed", "network") => Subject::Network(ClientNetwork::parse(second)?),
            ("failed", "account") => Subject::Account(parse_digest(second)?),
            ("known", digest) => Subject::Known(parse_digest(digest)?, ClientNetwork::parse(second)?),
            ("waits" | "gone", id) if self.waiting.len() < 2 * WAITING_LIMIT => {
                let (id, address) = (id.to_owned(), parse_address(second)?);
                self.waiting.push(WaitingAttempt {
                    id,
                    address,
                    until: at,
                    failures: count,
                    displaced: *word == "gone",
                });
                return Some(());
            }
            _ => return None,
        };
        if self.counts.len() >= KNOWN_LIMIT + 2 * COUNTED_LIMIT {
            return None;
        }
        self.counts.push(Count { subject, count, at });
        Some(())
    }
}

#[cfg(test)]
mod tests;
