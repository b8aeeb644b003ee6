//! How long an attempt to authenticate waits, so that nobody guesses secrets: the rules, without a clock and without a file.
//!
//! Failures are counted for each network (IPv4 /24, IPv6 /64) and for each account. Three are free, the fourth waits one second,
//! and each further one twice as long, up to 30 seconds. An attempt waits for the greater of both; so a client that guesses from
//! many networks is slowed by the account, and one that guesses at many accounts by the network.
//!
//! That must not lock a customer out. So the networks from which an account has authenticated are *known*: from there it waits
//! only for failures of this account in this network. And few attempts wait at once, but one takes the place of another that
//! comes after it: those from known networks go first, then those from networks with fewer failures, then those from an address
//! (IPv6: a /48) from which fewer wait. So guesses from the customer's own network do not keep it out, nor those from many.
//! Only an attacker with thousands of networks everywhere keeps out a customer that is not known where it is, while it goes on.
//! Nor are customers slowed that call at once from one network: eight attempts are decided at a time, the others wait for them.
//!
//! ```text
//! failed 1795689600 12 network 192.0.2.0/24     time of the last failure, failures
//! failed 1795689600 12 account DIGEST
//! known 1795689600 0 DIGEST 192.0.2.0/24        time of a login or of the last failure, failures since the last login
//! waits 1795689630 12 ID 192.0.2.1              until when, by how many failures; `gone` if another has its place
//! ```

use std::fmt::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use data_encoding::HEXLOWER;

/// Failures without a delay.
const FREE_FAILURES: u32 = 3;

/// Seconds that an attempt waits at most.
const LONGEST_DELAY: u32 = 30;

/// Failures that are counted at most, so that an hour without one ends any delay.
const MOST_FAILURES: u32 = 48;

/// Seconds without a failure after which the failures count half.
const HALVED_AFTER: i64 = 15 * 60;

/// Attempts that wait at once, and those of one network.
const WAITING_LIMIT: usize = 32;
const WAITING_LIMIT_EACH: usize = 8;

/// Attempts of a network, an account or a known network that may be open at once, with the failures before them. Many customers
/// that call at once are no guessers: the others wait for their ends.
const OPEN_LIMIT: u32 = 8;

/// Networks, and accounts, whose failures are counted: those with the most.
const COUNTED_LIMIT: usize = 512;

/// Networks that are known, in all and of one account.
const KNOWN_LIMIT: usize = 4096;
const KNOWN_LIMIT_EACH: usize = 16;

/// Seconds after which a login from a known network is recorded again.
const KNOWN_RENEWED_AFTER: i64 = 24 * 60 * 60;

/// What stands for an address that is not known.
const UNKNOWN: &str = "unknown";

/// The addresses that count as one client.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ClientNetwork(Option<IpAddr>);

impl ClientNetwork {
    /// The network of an address; `None`: it is not known, as of a pipe.
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

/// The addresses that share places of attempts that wait: one of IPv4, or a /48 of IPv6, which anybody gets for nothing.
fn site(address: Option<IpAddr>) -> Option<IpAddr> {
    address.map(|address| match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 80 << 80).into(),
        address => address,
    })
}

fn parse_address(text: &str) -> Option<Option<IpAddr>> {
    if text == UNKNOWN { Some(None) } else { Some(Some(text.parse().ok()?)) }
}

/// A name that a client has given, whether there is such an account or not. The file must show neither names nor secrets that
/// were typed in place of names.
pub type AccountDigest = [u8; 16];

fn parse_digest(text: &str) -> Option<AccountDigest> {
    HEXLOWER.decode(text.as_bytes()).ok()?.try_into().ok()
}

/// What is counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Subject {
    /// The failures of a network.
    Network(ClientNetwork),
    /// The failures of an account.
    Account(AccountDigest),
    /// The failures of an account in a network that is known, since the last login.
    Known(AccountDigest, ClientNetwork),
    /// The attempts of a network that were rejected because too many wait. They are not in the file, which each would change.
    Rejected(ClientNetwork),
}

impl Subject {
    fn is_like(&self, other: &Subject) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }

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
    /// What is left of it.
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
    /// The failures of its network; 0: the network is known.
    failures: u32,
    /// Another attempt has its place.
    gone: bool,
}

/// One AUTH of a client.
#[derive(Clone, Debug)]
pub struct AttemptOrigin {
    /// Unique among the processes.
    pub id: String,
    /// `None`: it is not known, as of a pipe.
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

    /// What its failure counts for.
    pub fn subjects(&self) -> [Subject; 2] {
        [Subject::Network(self.network()), Subject::Account(self.account)]
    }
}

/// Whether an attempt may be decided.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Admission {
    /// Now.
    Free,
    /// After so many seconds. It counts as a failure until it has succeeded.
    Delayed(u32),
    /// Not at all: too many wait.
    Rejected,
}

/// How an attempt has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AttemptEnd {
    /// The client is authenticated.
    Succeeded,
    Failed,
    /// No secret was tested.
    Withdrawn,
}

/// Seconds that the attempt waits that would be so many failures.
fn delay(failures: u32) -> u32 {
    match failures.checked_sub(FREE_FAILURES + 1) {
        None => 0,
        Some(doublings) => 1_u32.checked_shl(doublings.min(31)).unwrap_or(LONGEST_DELAY).min(LONGEST_DELAY),
    }
}

/// The failures, the known networks, and who waits.
#[derive(Default, Debug)]
pub struct LoginTable {
    counts: Vec<Count>,
    waiting: Vec<WaitingAttempt>,
    /// Attempts of this process that nothing delays, and what their failures would count for. They are not in the file, so that
    /// an ordinary login writes nothing.
    open: Vec<(String, Vec<Subject>)>,
}

impl LoginTable {
    /// Begins an attempt. One that is delayed counts as a failure from now on, so that many at once do not wait for the same.
    pub fn begin(&mut self, attempt: &AttemptOrigin, now: i64) -> Admission {
        if self.open(attempt, now) {
            return Admission::Free;
        }
        let (failures, others) = self.standing(attempt, now);
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

    /// Begins an attempt if nothing delays it. Returns whether it may be decided.
    pub fn open(&mut self, attempt: &AttemptOrigin, now: i64) -> bool {
        self.settle(now);
        // It may be begun once more, in what another process has written.
        self.open.retain(|(id, _)| *id != attempt.id);
        let (failures, others) = self.standing(attempt, now);
        let is_free = delay(failures + 1) == 0 && failures + others < OPEN_LIMIT;
        if is_free {
            self.open.push((attempt.id.clone(), self.subjects_of(attempt)));
        }
        is_free
    }

    /// Whether only others that are open delay an attempt.
    pub fn is_crowded(&self, attempt: &AttemptOrigin, now: i64) -> bool {
        let (failures, others) = self.standing(attempt, now);
        delay(failures + 1) == 0 && failures + others >= OPEN_LIMIT
    }

    /// What the failure of an attempt counts for: in a known network, for nothing else.
    fn subjects_of(&self, attempt: &AttemptOrigin) -> Vec<Subject> {
        match self.find(&attempt.known()) {
            Some(_) => vec![attempt.known()],
            None => attempt.subjects().to_vec(),
        }
    }

    /// The failures before an attempt, and the other attempts that are open: of that among its subjects that has the most.
    fn standing(&self, attempt: &AttemptOrigin, now: i64) -> (u32, u32) {
        let is_other_of = |subject, (id, open): &(String, Vec<Subject>)| *id != attempt.id && open.contains(subject);
        let others = |subject| self.open.iter().filter(|open| is_other_of(subject, open)).count();
        let subjects = self.subjects_of(attempt);
        let failures = subjects.iter().map(|subject| self.most(subject, now)).max().unwrap_or(0);
        (failures, subjects.iter().map(others).max().map_or(0, |others| u32::try_from(others).unwrap_or(MOST_FAILURES)))
    }

    /// Ends an attempt. `counted`: it was, when it began.
    pub fn end(&mut self, attempt: &AttemptOrigin, counted: bool, end: AttemptEnd, now: i64) {
        self.settle(now);
        self.waiting.retain(|waiting| waiting.id != attempt.id);
        self.open.retain(|(id, _)| *id != attempt.id);
        match (end, counted) {
            (AttemptEnd::Failed, true) | (AttemptEnd::Withdrawn | AttemptEnd::Succeeded, false) => {}
            (AttemptEnd::Failed, false) => self.count(attempt, now),
            (AttemptEnd::Withdrawn | AttemptEnd::Succeeded, true) => self.uncount(attempt, now),
        }
        // The failures of the network and of the account stay: one who has an account must not clear its network by logging in.
        if end == AttemptEnd::Succeeded {
            self.learn(attempt.account, attempt.network(), now);
        }
    }

    /// Whether an attempt that waits must give up: another has its place.
    pub fn is_displaced(&self, id: &str) -> bool {
        self.waiting.iter().any(|waiting| waiting.gone && waiting.id == id)
    }

    /// Whether an account has authenticated from this network.
    pub fn knows(&self, network: ClientNetwork) -> bool {
        self.counts.iter().any(|count| matches!(count.subject, Subject::Known(_, known) if known == network))
    }

    /// Takes over what is not in the file from an earlier table.
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

    /// The least of a kind, if there is no room for one more.
    fn least(&self, kind: &Subject, now: i64) -> Option<usize> {
        let alike = || self.counts.iter().enumerate().filter(|(_, count)| count.subject.is_like(kind));
        let is_full = !kind.is_known() && alike().count() >= COUNTED_LIMIT;
        let least = alike().filter(|_| is_full).min_by_key(|(_, count)| (count.left(now), count.at));
        least.map(|(at, _)| at)
    }

    /// What a subject has at most: one that there is no room for may have as much as the least that there is.
    fn most(&self, subject: &Subject, now: i64) -> u32 {
        let found = self.find(subject).or_else(|| self.least(subject, now));
        found.map_or(0, |at| self.counts[at].left(now))
    }

    /// Counts one more, up to `limit`. If there is no room, it takes the place of the least, and its count: with many that are
    /// invented, one can neither clear one that was counted often, nor keep others from being counted.
    fn add(&mut self, subject: Subject, limit: u32, now: i64) {
        let count = Count { subject, count: self.most(&subject, now).saturating_add(1).min(limit), at: now };
        match self.find(&subject).or_else(|| self.least(&subject, now)) {
            Some(at) => self.counts[at] = count,
            None => self.counts.push(count),
        }
    }

    /// Counts a failure of the network, of the account, and of both if the network is known.
    fn count(&mut self, attempt: &AttemptOrigin, now: i64) {
        let known = Some(attempt.known()).filter(|known| self.find(known).is_some());
        attempt.subjects().into_iter().chain(known).for_each(|subject| self.add(subject, MOST_FAILURES, now));
    }

    /// Takes that back.
    fn uncount(&mut self, attempt: &AttemptOrigin, now: i64) {
        for subject in attempt.subjects().into_iter().chain([attempt.known()]) {
            if let Some(at) = self.find(&subject) {
                self.counts[at].count = self.counts[at].count.saturating_sub(1);
            }
        }
        self.settle(now);
    }

    /// Finds a place for an attempt that waits. `failures`: as [`WaitingAttempt::failures`]. Returns whether there is one.
    fn reserve(&mut self, attempt: &AttemptOrigin, failures: u32, until: i64, now: i64) -> bool {
        let AttemptOrigin { id, address, .. } = attempt.clone();
        let there = || self.waiting.iter().enumerate().filter(|(_, waiting)| !waiting.gone);
        let is_near = |waiting: &WaitingAttempt| ClientNetwork::of(waiting.address) == attempt.network();
        let is_full_near = there().filter(|(_, waiting)| is_near(waiting)).count() >= WAITING_LIMIT_EACH;
        if is_full_near || there().count() >= WAITING_LIMIT {
            // Otherwise those who use up all places would lock out every customer from a new network. Among those that have
            // guessed as often, one from a network that did not come in vain before goes first.
            let order = |failures: u32, address, more| {
                // Of one network the later attempt has more.
                let failures = if is_full_near { failures.min(1) } else { failures };
                let places = there().filter(|(_, waiting)| site(waiting.address) == site(address)).count() + more;
                (failures, places, self.left(&Subject::Rejected(ClientNetwork::of(address)), now))
            };
            let all = there().filter(|(_, waiting)| !is_full_near || is_near(waiting));
            let last = all.map(|(at, waiting)| (order(waiting.failures, waiting.address, 0), at)).max();
            match last.filter(|(last, _)| *last > order(failures, address, 1)) {
                Some((_, at)) => {
                    self.waiting[at].gone = true;
                    let network = ClientNetwork::of(self.waiting[at].address);
                    self.add(Subject::Rejected(network), u32::MAX, now);
                }
                None => return false,
            }
        }
        // A second more: of the clock, only whole seconds are known.
        self.waiting.push(WaitingAttempt { id, address, until: until + 1, failures, gone: false });
        let mut gone = self.waiting.iter().filter(|waiting| waiting.gone);
        if gone.clone().count() > WAITING_LIMIT
            && let Some(first) = gone.next().map(|first| first.id.clone())
        {
            self.waiting.retain(|waiting| waiting.id != first);
        }
        true
    }

    /// The account has authenticated from this network.
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
        // One account in many networks must not take the place of other customers.
        let oldest = if own().count() >= KNOWN_LIMIT_EACH {
            own().min()
        } else if known().count() >= KNOWN_LIMIT {
            // With more customers than that, each login would write the file if this one could be recent.
            let all = known().map(|(at, count)| (count.at, at));
            all.min().filter(|(seconds, _)| now - seconds >= KNOWN_RENEWED_AFTER)
        } else {
            return true;
        };
        oldest.map(|(_, at)| self.counts.remove(at)).is_some()
    }

    /// Forgets what is over. If the clock was set back, a time in the future becomes `now`: no delay lasts longer for that.
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
        for WaitingAttempt { id, address, until, failures, gone } in &self.waiting {
            let word = if *gone { "gone" } else { "waits" };
            let address = address.map_or_else(|| UNKNOWN.to_owned(), |address| address.to_string());
            let _ = writeln!(text, "{word} {until} {failures} {id} {address}");
        }
        text
    }

    /// Reads that text, and returns how many lines cannot be read, or are too many.
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
                self.waiting.push(WaitingAttempt { id, address, until: at, failures: count, gone: *word == "gone" });
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
