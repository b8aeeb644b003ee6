//! Which messages of a queue a session offers next.
//!
//! A queue may have a million messages, more than memory should hold. So it is listed in passes: each pass over the
//! directories keeps the first [`PIECE`] messages, by their [`Rank`], that the session has not offered yet. When these
//! are offered, the next pass also finds messages that have arrived meanwhile. A pass reads a bounded number of file
//! names at a time, so that a large directory does not block other sessions.
//!
//! Of the held messages that a pass has kept, the smaller come first within an hour of arrival. The size does not
//! decide which messages are kept: files of one unique name, whose sizes may differ, stay together, and a large message
//! waits for [`PIECE`] smaller ones at most.

use std::collections::{BinaryHeap, HashSet, VecDeque};
use std::ffi::OsStr;
use std::hash::{BuildHasher, RandomState};
use std::io;

use crate::clock::Timestamp;
use crate::maildir::{Entry, IN_DOUBT};
use crate::sorting::sort_by_cached_key;

/// How many messages a pass keeps.
pub(super) const PIECE: usize = if cfg!(test) { 1000 } else { 8192 };

/// The work of one step: this many file names are read. On a quick disk that takes some milliseconds.
pub(super) const STEP_WORK: usize = if cfg!(test) { 500 } else { 4096 };

/// The work of opening a file, and of beginning a pass over a queue, in file names read.
pub(super) const OPEN_WORK: usize = 64;
pub(super) const QUEUE_WORK: usize = 128;

/// How many listed messages of a queue a session remembers at least when it goes on to its next queue.
const LEAST_KEPT: usize = 16;

/// The work of reading the time of a file, in file names read.
pub(super) const TIME_WORK: usize = 8;

/// A message in doubt comes last if it has ended this many sessions: it may end every one.
const SESSIONS_IN_DOUBT: u32 = 2;

const HOUR: i64 = 60 * 60;

/// Seconds for which a held message comes last after it has ended a session. Then it is ordered as if it had arrived at
/// the end of this time; without that, new mail, of which there may be more than a thin line carries, would delay it
/// for ever. The time is long because the message may end one more session, and then later mail waits for another call.
const LAST_FOR: i64 = 7 * 24 * HOUR;

/// The size assumed for a message of another agent whose name does not have it: that of an ordinary message.
const ASSUMED_SIZE: u64 = 64 << 10;

/// How the messages of a queue are ordered.
#[derive(Clone, Copy)]
pub(super) enum QueueOrder {
    /// Messages in doubt first; then by the hour of arrival, the smaller first; last those that have ended sessions.
    /// `now` decides whether a time of arrival is possible.
    Held { now: Timestamp },
    /// The oldest first; last those in doubt and those that have ended sessions.
    Retries,
}

/// All queues of a session finish a phase before the next one begins, so that no message waits for one of a later
/// phase.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Phase {
    /// In queues of held mail: the customer may already have these, and recognizes a duplicate best while it is new.
    InDoubt,
    Ordinary,
    /// In queues with retries: messages without a sender, so that customers' mail does not wait for DSNs that strangers
    /// cause.
    Dsn,
    /// Messages that may end this session.
    Last,
}

impl Phase {
    pub(super) const FIRST: Phase = Phase::InDoubt;
}

/// The place of a message in the order of its queue. Of messages of equal rank the oldest comes first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    phase: Phase,
    /// The number of sessions that it has ended.
    sessions: u32,
    /// The hour of arrival, of held mail.
    hour: i64,
}

impl Rank {
    /// `is_dsn`: the message has no sender, and comes after those with one.
    pub(super) fn of(entry: &Entry, order: QueueOrder, is_dsn: bool) -> Rank {
        let (ended, in_doubt) = (entry.ended(), entry.has(IN_DOUBT));
        let sessions = ended.map_or(0, |ended| ended.sessions);
        if let (QueueOrder::Held { now }, Some(ended), false) = (order, ended, in_doubt && sessions < SESSIONS_IN_DOUBT)
        {
            let until = ended.at.seconds().saturating_add(LAST_FOR);
            // If the session ended in the future, a clock was wrong: the record does not count.
            let hour = if ended.at > now { hour(entry, now) } else { until / HOUR };
            if ended.at > now || until < now.seconds() {
                return Rank { phase: Phase::Ordinary, sessions: 0, hour };
            }
        }
        let (phase, hour) = match order {
            QueueOrder::Held { now } if in_doubt && sessions < SESSIONS_IN_DOUBT => (Phase::InDoubt, hour(entry, now)),
            QueueOrder::Held { now } if ended.is_none() => (Phase::Ordinary, hour(entry, now)),
            QueueOrder::Retries if in_doubt => (Phase::Last, 0),
            _ if ended.is_some() => (Phase::Last, 0),
            _ if is_dsn => (Phase::Dsn, 0),
            _ => (Phase::Ordinary, 0),
        };
        Rank { phase, sessions, hour }
    }

    /// The rank of a message that was put back: it is offered next.
    const NEXT: Rank = Rank { phase: Phase::FIRST, sessions: 0, hour: 0 };
}

/// The hour of arrival, according to the file's name. Messages whose time is impossible come first: they are from the
/// time before the clock was set, and so the oldest.
fn hour(entry: &Entry, now: Timestamp) -> i64 {
    let is_possible = |time: &Timestamp| time.is_possible(now);
    let arrived = entry.named().filter(is_possible).or_else(|| entry.record().first_seen.filter(is_possible));
    arrived.map_or(0, |arrived| arrived.seconds() / HOUR)
}

/// A message with its rank. [`Kept`] keeps messages in this order; [`Kept::into_sorted`] has the order of offering.
#[derive(PartialEq, Eq)]
pub(super) struct RankedEntry {
    rank: Rank,
    /// Octets of the unique name, with which the file's name begins, so that comparisons need not look for its end.
    unique: usize,
    pub(super) entry: Entry,
}

impl RankedEntry {
    fn new(rank: Rank, entry: Entry) -> RankedEntry {
        RankedEntry { rank, unique: entry.unique().len(), entry }
    }

    fn unique(&self) -> &[u8] {
        &self.entry.name.as_encoded_bytes()[..self.unique]
    }

    /// Files of one unique name may be one message: they must be next to each other.
    fn key(&self) -> (Rank, &[u8], &Entry) {
        (self.rank, self.unique(), &self.entry)
    }
}

impl PartialOrd for RankedEntry {
    fn partial_cmp(&self, other: &RankedEntry) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for RankedEntry {
    fn cmp(&self, other: &RankedEntry) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

/// What a session has listed of a queue.
#[derive(Default)]
pub(super) struct Listed {
    /// The messages to be offered, in order.
    waiting: VecDeque<RankedEntry>,
    pub(super) pass: Option<Pass>,
    /// The phase of the first message that was forgotten; the next pass finds it again.
    pub(super) forgotten: Option<Phase>,
    /// Messages that this session has offered and that are still in the queue: each is offered once.
    pub(super) offered: NameSet,
    /// Messages that were not found under the name that was listed.
    pub(super) missed: NameSet,
    /// A pass has ended.
    once: bool,
    /// The number of messages that this session skips.
    pub(super) skipped: usize,
    /// Skipped messages for which this session was not counted as a call yet.
    pub(super) uncounted: Vec<Entry>,
    /// The number of files without a recipient that this queue could send to.
    pub(super) not_mail: usize,
}

/// A set of unique names in one queue; other agents may give files in two Maildirs the same name. To save memory it has
/// only a hash of each name: a customer may defer a million messages in one session. The key of the hash is random, so
/// that no sender can choose names that collide.
#[derive(Default)]
pub(super) struct NameSet {
    hashes: HashSet<u64>,
    key: RandomState,
}

impl NameSet {
    /// Returns whether the name is new.
    pub(super) fn insert(&mut self, unique: &OsStr) -> bool {
        self.hashes.insert(self.key.hash_one(unique))
    }

    pub(super) fn remove(&mut self, unique: &OsStr) {
        self.hashes.remove(&self.key.hash_one(unique));
    }

    pub(super) fn contains(&self, unique: &OsStr) -> bool {
        self.hashes.contains(&self.key.hash_one(unique))
    }
}

/// A pass over the directories of a queue, with the messages found so far for each phase.
pub(super) struct Pass {
    /// The files that were not read yet.
    pub(super) files: Box<dyn Iterator<Item = io::Result<Entry>> + Send>,
    order: QueueOrder,
    in_doubt: Kept,
    ordinary: Kept,
    dsns: Kept,
    last: Kept,
}

impl Pass {
    /// Begins a pass over these files.
    pub(super) fn new(files: impl Iterator<Item = io::Result<Entry>> + Send + 'static, order: QueueOrder) -> Pass {
        let [in_doubt, ordinary, dsns, last] = Default::default();
        Pass { files: Box::new(files), order, in_doubt, ordinary, dsns, last }
    }

    /// Adds a message that is to be offered. `is_dsn`: it has no sender.
    pub(super) fn add(&mut self, entry: Entry, is_dsn: bool) {
        let found = RankedEntry::new(Rank::of(&entry, self.order, is_dsn), entry);
        match found.rank.phase {
            Phase::InDoubt => self.in_doubt.add(found, PIECE / 4),
            Phase::Ordinary => self.ordinary.add(found, PIECE),
            Phase::Dsn => self.dsns.add(found, PIECE / 4),
            Phase::Last => self.last.add(found, PIECE / 4),
        }
    }

    /// The messages that were found, in order, and how many of them are to be offered before the next pass. If a phase
    /// had more messages than were kept, those of later phases wait for the next pass.
    pub(super) fn finish(self) -> (Vec<RankedEntry>, usize) {
        let (mut found, mut offered, mut more) = (Vec::new(), 0, false);
        for kept in [self.in_doubt, self.ordinary, self.dsns, self.last] {
            let is_last = more;
            more |= kept.left.is_some();
            found.extend(kept.into_sorted(self.order));
            offered = if is_last { offered } else { found.len() };
        }
        (found, offered)
    }
}

/// The first messages of a phase.
#[derive(Default)]
struct Kept {
    messages: BinaryHeap<RankedEntry>,
    /// The first message that is not among them.
    left: Option<RankedEntry>,
}

impl Kept {
    /// Adds a message; keeps the first `limit` of all.
    fn add(&mut self, found: RankedEntry, limit: usize) {
        let is_full = self.messages.len() >= limit;
        let left = match self.messages.peek_mut() {
            Some(mut last) if is_full && found < *last => std::mem::replace(&mut *last, found),
            Some(_) if is_full => found,
            last => {
                drop(last);
                return self.messages.push(found);
            }
        };
        if self.left.as_ref().is_none_or(|other| left < *other) {
            self.left = Some(left);
        }
    }

    /// The messages in the order in which they are offered. Of those with equal rank and the same unique name, all are
    /// returned or none, so that two names of one message are seen together.
    fn into_sorted(self, order: QueueOrder) -> Vec<RankedEntry> {
        let mut messages = self.messages.into_sorted_vec();
        if let Some(left) = self.left {
            let is_whole = |found: &RankedEntry| found.rank != left.rank || found.unique() != left.unique();
            // If all have one unique name, each is returned: otherwise no pass would return any.
            let whole = messages.iter().rposition(is_whole).map_or(messages.len(), |at| at + 1);
            messages.truncate(whole);
        }
        if let QueueOrder::Held { .. } = order {
            let size = |entry: &Entry| entry.file_size().unwrap_or(ASSUMED_SIZE);
            let size = |found: &RankedEntry| if found.rank.phase == Phase::Last { 0 } else { size(&found.entry) };
            sort_by_cached_key(&mut messages, |found| (found.rank, size(found)));
        }
        messages
    }
}

impl Listed {
    /// Whether a listed message is to be offered in this phase.
    pub(super) fn has(&self, phase: Phase) -> bool {
        self.waiting.front().is_some_and(|next| next.rank.phase <= phase)
    }

    /// Removes and returns the next message, if it is to be offered in this phase.
    pub(super) fn pop(&mut self, phase: Phase) -> Option<Entry> {
        if self.has(phase) { self.waiting.pop_front().map(|next| next.entry) } else { None }
    }

    /// Adds what a pass has found.
    pub(super) fn add(&mut self, found: impl Iterator<Item = RankedEntry>) {
        self.once = true;
        self.waiting.extend(found);
    }

    /// Puts a message back, to be offered next.
    pub(super) fn put_back(&mut self, entry: Entry) {
        self.offered.remove(entry.unique());
        self.waiting.push_front(RankedEntry::new(Rank::NEXT, entry));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The phase of the next message.
    pub(super) fn phase(&self) -> Option<Phase> {
        self.waiting.front().map(|next| next.rank.phase).or(self.forgotten)
    }

    /// Forgets the listed messages, to save memory. The next pass finds them again.
    pub(super) fn forget(&mut self) {
        (self.forgotten, self.waiting) = (self.phase(), VecDeque::new());
    }

    /// The number of listed messages; before the first pass has ended, 1.
    pub(super) fn waiting(&self) -> usize {
        if self.once { self.waiting.len() } else { 1 }
    }

    /// Forgets the last of the listed messages, so that those of all `queues` of the session need bounded memory.
    pub(super) fn trim(&mut self, queues: usize) {
        let kept = (PIECE / queues.max(1)).max(LEAST_KEPT);
        // To shrink copies the messages: do it only if it saves half of the memory.
        if self.waiting.len() > kept || self.waiting.capacity() > 2 * kept {
            self.waiting.truncate(kept);
            self.waiting.shrink_to_fit();
        }
    }

    pub(super) fn is_passing(&self) -> bool {
        self.pass.is_some()
    }
}

#[cfg(test)]
mod tests;
