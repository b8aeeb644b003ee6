//! Which messages of a queue a session offers next.
//!
//! A queue may have a million messages, so it is listed in pieces: a pass over its directories keeps the first messages by
//! their [`Rank`] that the session has not offered yet. When these are offered, there is another pass, which also finds what
//! has arrived meanwhile. A pass is divided too: a bounded number of files is read at a time.
//!
//! Held mail is ordered by size too: of the messages that a pass keeps, the smaller come first within an hour of arrival. The
//! size does not decide which messages are kept: so files of one unique name, whose sizes may differ, stay together, and a
//! large message waits for [`PIECE`] smaller ones at most.

use std::collections::{BinaryHeap, HashSet, VecDeque};
use std::ffi::OsStr;
use std::hash::{BuildHasher, RandomState};
use std::io;

use crate::clock::Timestamp;
use crate::maildir::{Entry, IN_DOUBT};

/// Messages that a pass keeps.
pub(super) const PIECE: usize = if cfg!(test) { 1000 } else { 8192 };

/// The work that is done at a time: files whose names are read. Some milliseconds, if the disk is quick.
pub(super) const STEP_WORK: usize = if cfg!(test) { 500 } else { 4096 };

/// What it costs to open a file, and to begin with a queue, in files whose names are read.
pub(super) const OPEN_WORK: usize = 64;
pub(super) const QUEUE_WORK: usize = 128;

/// When a session goes on to its next queue, it keeps so many messages in this one that are not to be offered yet.
const LEAST_KEPT: usize = 16;

/// What a file costs whose time is read too.
pub(super) const TIME_WORK: usize = 8;

/// A message in doubt that has ended so many sessions may end each one: it comes last.
const SESSIONS_IN_DOUBT: u32 = 2;

const HOUR: i64 = 60 * 60;

/// How long a held message comes last that has ended a session. Then it comes as if it had arrived at the end of this time:
/// what strangers send meanwhile may be more than a thin line carries, and would keep it back for ever. It is long, because the
/// message may end one more session, and what has arrived later waits for another call.
const LAST_FOR: i64 = 7 * 24 * HOUR;

/// The size of a message whose name does not tell it, because another agent has written it: that of an ordinary message.
const ASSUMED_SIZE: u64 = 64 << 10;

/// How the messages of a queue are ordered.
#[derive(Clone, Copy)]
pub(super) enum QueueOrder {
    /// Those in doubt first, then by the hour of arrival, the smaller first, those that have ended sessions last. `now`: by
    /// it, a time of arrival may be impossible.
    Held { now: Timestamp },
    /// The oldest first, then those in doubt, or that have ended sessions.
    Retries,
}

/// The messages of a phase come after those of the phases before it in all queues, so that these need not wait for them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Phase {
    /// In queues of held mail: the customer may have them, and knows that best while they are new.
    InDoubt,
    Ordinary,
    /// In queues with retries: messages without a sender. Mail of customers does not wait for the DSNs that strangers cause.
    Dsn,
    /// Messages that may end this session.
    Last,
}

impl Phase {
    pub(super) const FIRST: Phase = Phase::InDoubt;
}

/// Where a message comes in the order of its queue. Of messages of equal rank the oldest comes first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    phase: Phase,
    /// The sessions that it has ended.
    sessions: u32,
    /// Of held mail: the hour of its arrival.
    hour: i64,
}

impl Rank {
    /// `is_dsn`: it comes after those with a sender.
    pub(super) fn of(entry: &Entry, order: QueueOrder, is_dsn: bool) -> Rank {
        let (ended, in_doubt) = (entry.ended(), entry.has(IN_DOUBT));
        let sessions = ended.map_or(0, |ended| ended.sessions);
        if let (QueueOrder::Held { now }, Some(ended), false) = (order, ended, in_doubt && sessions < SESSIONS_IN_DOUBT)
        {
            let until = ended.at.seconds().saturating_add(LAST_FOR);
            // If the session has ended in the future, a clock was wrong.
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

    /// The rank of a message that is to be the next.
    const NEXT: Rank = Rank { phase: Phase::FIRST, sessions: 0, hour: 0 };
}

/// The hour of arrival, according to the name. Messages whose time is impossible come first, because they are all that waits
/// from the time before the clock was set.
fn hour(entry: &Entry, now: Timestamp) -> i64 {
    let is_possible = |time: &Timestamp| time.is_possible(now);
    let arrived = entry.named().filter(is_possible).or_else(|| entry.record().first_seen.filter(is_possible));
    arrived.map_or(0, |arrived| arrived.seconds() / HOUR)
}

/// A message with its rank. The order is that in which messages are kept; see [`Kept::into_sorted`].
#[derive(PartialEq, Eq)]
pub(super) struct RankedEntry {
    rank: Rank,
    /// Octets of the unique name, with which the file's name begins: comparisons need not look for its end.
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

    /// Files of one unique name may be one message, so they come one after the other.
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
    /// In order.
    waiting: VecDeque<RankedEntry>,
    pub(super) pass: Option<Pass>,
    /// The phase of the first of the messages that were forgotten: the next pass finds them again.
    pub(super) forgotten: Option<Phase>,
    /// The messages that this session has offered and that are still there: each is offered once.
    pub(super) offered: NameSet,
    /// Messages that were not found where they were listed.
    pub(super) missed: NameSet,
    /// A pass has ended.
    once: bool,
    /// How many messages this session skips.
    pub(super) skipped: usize,
    /// Those for which it was not counted yet.
    pub(super) uncounted: Vec<Entry>,
    /// How many files have no recipient that can be sent to.
    pub(super) not_mail: usize,
}

/// A set of unique names. The set is for one queue, because other agents may give files in two Maildirs the same name. Only a
/// hash of each name is kept, with a key that nobody knows: a customer may defer a million messages in one session.
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

/// A pass over the directories of a queue, and the messages that it has found so far for each phase.
pub(super) struct Pass {
    /// Those that were not read yet.
    pub(super) files: Box<dyn Iterator<Item = io::Result<Entry>> + Send>,
    order: QueueOrder,
    in_doubt: Kept,
    ordinary: Kept,
    dsns: Kept,
    last: Kept,
}

impl Pass {
    /// `files`: those of the queue.
    pub(super) fn new(files: impl Iterator<Item = io::Result<Entry>> + Send + 'static, order: QueueOrder) -> Pass {
        let [in_doubt, ordinary, dsns, last] = Default::default();
        Pass { files: Box::new(files), order, in_doubt, ordinary, dsns, last }
    }

    /// Adds a message that is to be offered. `is_dsn`: it comes after those with a sender.
    pub(super) fn add(&mut self, entry: Entry, is_dsn: bool) {
        let found = RankedEntry::new(Rank::of(&entry, self.order, is_dsn), entry);
        match found.rank.phase {
            Phase::InDoubt => self.in_doubt.add(found, PIECE / 4),
            Phase::Ordinary => self.ordinary.add(found, PIECE),
            Phase::Dsn => self.dsns.add(found, PIECE / 4),
            Phase::Last => self.last.add(found, PIECE / 4),
        }
    }

    /// The messages that were found, in order, and how many of them are to be offered before the next pass: those of a phase
    /// only if there are no more of the phases before it.
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

/// The first of some messages.
#[derive(Default)]
struct Kept {
    messages: BinaryHeap<RankedEntry>,
    /// The first of the others.
    left: Option<RankedEntry>,
}

impl Kept {
    /// Adds a message; keeps `limit`.
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

    /// The messages in the order in which they are offered. Those of equal rank and the same unique name are all among them,
    /// or none is.
    fn into_sorted(self, order: QueueOrder) -> Vec<RankedEntry> {
        let mut messages = self.messages.into_sorted_vec();
        if let Some(left) = self.left {
            let is_whole = |found: &RankedEntry| found.rank != left.rank || found.unique() != left.unique();
            // If all have one name, each is offered.
            let whole = messages.iter().rposition(is_whole).map_or(messages.len(), |at| at + 1);
            messages.truncate(whole);
        }
        if let QueueOrder::Held { .. } = order {
            let size = |entry: &Entry| entry.file_size().unwrap_or(ASSUMED_SIZE);
            let size = |found: &RankedEntry| if found.rank.phase == Phase::Last { 0 } else { size(&found.entry) };
            messages.sort_by_cached_key(|found| (found.rank, size(found)));
        }
        messages
    }
}

impl Listed {
    /// Whether there is a message that is to be offered in this phase.
    pub(super) fn has(&self, phase: Phase) -> bool {
        self.waiting.front().is_some_and(|next| next.rank.phase <= phase)
    }

    /// Takes the next message, if it is to be offered in this phase.
    pub(super) fn pop(&mut self, phase: Phase) -> Option<Entry> {
        if self.has(phase) { self.waiting.pop_front().map(|next| next.entry) } else { None }
    }

    /// Adds what a pass has found.
    pub(super) fn add(&mut self, found: impl Iterator<Item = RankedEntry>) {
        self.once = true;
        self.waiting.extend(found);
    }

    /// Takes back a message, to be offered next.
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

    /// Forgets the messages that wait: the next pass finds them again.
    pub(super) fn forget(&mut self) {
        (self.forgotten, self.waiting) = (self.phase(), VecDeque::new());
    }

    /// How many messages wait at least: one, if that is not known.
    pub(super) fn waiting(&self) -> usize {
        if self.once { self.waiting.len() } else { 1 }
    }

    /// Forgets most messages that wait; `queues`: the queues of the session.
    pub(super) fn trim(&mut self, queues: usize) {
        let kept = (PIECE / queues.max(1)).max(LEAST_KEPT);
        // Not each time: that would copy them.
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
