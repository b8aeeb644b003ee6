//! The attempts under way, and the rules that prevent untrusted clients from using up all connections: a client that
//! forges the sender of mail chooses the host to which the DSN is sent.
//!
//! - In a queue, DSNs come after mail with a sender. If such mail arrives during an attempt, its DSNs wait for the next
//!   attempt.
//! - Attempts with DSNs alone come last, and have at most a quarter of all connections. An eighth is reserved for them.
//! - A destination is slow if an attempt had no session for 10 s, or if a host took as long for a message that is not large.
//!   Attempts at slow destinations come after other mail, and have at most a quarter of all connections.
//! - If mail is due and all connections are in use, attempts end that have had no session for at least 3 s, the longest
//!   first: their mail is deferred, and their destinations are slow. Attempts that are limited to a quarter do not end so.
//! - Sessions do not end so: the message under way would be sent twice. Instead, if mail is due, sessions that have not
//!   finished a message for 3 s do not count for the limit; at most `connections` of them.
//! - An attempt without a session ends after 10 min, and all its lookups end after 1 min.

use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use super::hosts::{AttemptKind, AttemptState, HostTable, TableState};
use crate::net::cancel::CancelToken;
use crate::sorting::sort_by;
use crate::threads::Guarded;

/// How long an attempt may have no session while mail waits for its connection.
const GIVE_WAY_AFTER: Duration = Duration::from_secs(3);

/// A destination is slow if an attempt had no session for this time, or a message took as long.
const SLOW_AFTER: Duration = Duration::from_secs(10);

/// A message of at least this many octets may take longer.
const LARGE: u64 = 1 << 20;

/// How long a destination counts as slow, unless an attempt finds that it is not.
const SLOW_FOR: Duration = Duration::from_secs(6 * 60 * 60);

/// The maximum of slow destinations in the table.
const SLOW_LIMIT: usize = 10_000;

/// How long one attempt tries the hosts of a destination: slow hosts must not occupy a worker for hours.
const ATTEMPT_DEADLINE: Duration = Duration::from_secs(600);

/// How long all lookups of one attempt last together.
const LOOKUP_DEADLINE: Duration = Duration::from_secs(60);

/// Why no attempt can begin.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum NoAttempt {
    /// All connections are in use.
    AllInUse,
    /// All connections for this kind of attempt are in use.
    KindInUse,
}

impl HostTable {
    /// Begins an attempt, which counts as one connection until the permit is dropped.
    pub(super) fn begin_attempt(self: &Arc<HostTable>, kind: AttemptKind) -> Result<AttemptPermit, NoAttempt> {
        // The token needs a descriptor. If there is none, there would be none for a connection either.
        let cancel = CancelToken::new().map_err(|_| NoAttempt::AllInUse)?;
        let mut state = self.state.lock();
        state.check_share(kind)?;
        let number = state.next_attempt;
        state.next_attempt += 1;
        let now = Instant::now();
        let attempt = AttemptState {
            kind,
            sessions: 0,
            idle_since: now,
            begun: now,
            first_session: None,
            progress: now,
            is_slow: false,
            gave_way: false,
            cancel: cancel.clone(),
        };
        state.attempts.insert(number, attempt);
        drop(state);
        let lookups = Guarded::new(LOOKUP_DEADLINE);
        Ok(AttemptPermit { hosts: self.clone(), number, kind, deadline: now + ATTEMPT_DEADLINE, cancel, lookups })
    }

    /// Ends up to `needed` attempts that have had no session for a while, for mail that is due while all connections are in
    /// use.
    pub(super) fn give_way(&self, needed: usize) {
        let mut state = self.state.lock();
        let has_share = state.limit / 4 > 0;
        let ending = state.attempts.values().filter(|attempt| attempt.gave_way).count();
        let may_end = |attempt: &&mut AttemptState| {
            attempt.sessions == 0 && !attempt.gave_way && !(has_share && attempt.kind != AttemptKind::Mail)
        };
        let mut idle: Vec<_> = state.attempts.values_mut().filter(may_end).collect();
        sort_by(&mut idle, |one, other| one.idle_since.cmp(&other.idle_since));
        for attempt in idle.into_iter().take(needed.saturating_sub(ending)) {
            if attempt.idle_since.elapsed() >= GIVE_WAY_AFTER {
                attempt.gave_way = true;
                attempt.cancel.cancel();
            }
        }
    }

    /// Ends the waits of all attempts that have no session, after the relay was cancelled.
    pub(super) fn cancel_attempts(&self) {
        self.state.lock().attempts.values().for_each(|attempt| attempt.cancel.cancel());
    }

    /// Whether a destination is slow.
    pub(super) fn is_slow(&self, destination: &str) -> bool {
        self.state.lock().slow.get(destination).is_some_and(|until| *until > Instant::now())
    }

    /// Removes a destination that has no mail from the slow ones.
    pub(super) fn forget_slow(&self, destination: &str) {
        self.state.lock().slow.remove(destination);
    }
}

impl TableState {
    /// Checks that the limits permit one more attempt of this kind.
    fn check_share(&self, kind: AttemptKind) -> Result<(), NoAttempt> {
        let count = |counts: &dyn Fn(&AttemptState) -> bool| self.attempts.values().filter(|one| counts(one)).count();
        if kind != AttemptKind::Mail && count(&|attempt| attempt.kind == kind) >= (self.limit / 4).max(1) {
            return Err(NoAttempt::KindInUse);
        }
        let in_use = |counts: &dyn Fn(&AttemptState) -> bool| {
            let stalled =
                count(&|attempt| self.by_mx && kind == AttemptKind::Mail && counts(attempt) && attempt.stalls());
            count(counts) - stalled.min(self.limit)
        };
        let reserved = if self.by_mx { self.limit / 8 } else { 0 };
        let all = in_use(&|_| true) + self.additional;
        let without_dsns = in_use(&|attempt| attempt.kind != AttemptKind::Dsn);
        match all >= self.limit || kind != AttemptKind::Dsn && without_dsns >= self.limit - reserved {
            true => Err(NoAttempt::AllInUse),
            false => Ok(()),
        }
    }
}

impl AttemptState {
    /// Whether it has a session that has not finished a message for a while.
    fn stalls(&self) -> bool {
        self.sessions > 0 && self.progress.elapsed() >= GIVE_WAY_AFTER
    }
}

/// An attempt, which counts until this is dropped.
pub(super) struct AttemptPermit {
    hosts: Arc<HostTable>,
    number: u64,
    kind: AttemptKind,
    deadline: Instant,
    cancel: CancelToken,
    /// The time that is left for its lookups.
    lookups: Guarded<Duration>,
}

impl AttemptPermit {
    /// The kind of the attempt.
    pub(super) fn kind(&self) -> AttemptKind {
        self.kind
    }

    /// The token that ends the attempt's waits before a session.
    pub(super) fn cancel(&self) -> &CancelToken {
        &self.cancel
    }

    /// After this time the attempt tries no further address.
    pub(super) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// The deadline for a session; `None` after the first one: then the hosts respond, and a long queue may take hours.
    pub(super) fn session_deadline(&self) -> Option<Instant> {
        self.with(|attempt| attempt.first_session.is_none()).unwrap_or(true).then_some(self.deadline)
    }

    /// Whether the attempt must end because other mail needs its connection.
    pub(super) fn gave_way(&self) -> bool {
        self.with(|attempt| attempt.gave_way).unwrap_or(false)
    }

    /// Whether there is no time left for a lookup.
    pub(super) fn lookups_are_over(&self) -> bool {
        Instant::now() >= self.deadline || self.lookups.lock().is_zero()
    }

    /// Calls `lookups` with the deadline of the lookups, and subtracts the time that they take.
    pub(super) fn look_up<T>(&self, lookups: impl FnOnce(Instant) -> T) -> T {
        let (begun, left) = (Instant::now(), *self.lookups.lock());
        let result = lookups(self.deadline.min(begun + left));
        *self.lookups.lock() = left.saturating_sub(begun.elapsed());
        result
    }

    /// Counts a session, until the result is dropped.
    pub(super) fn session_begun(&self) -> AttemptSession<'_> {
        self.with(|attempt| {
            attempt.sessions += 1;
            attempt.progress = Instant::now();
            attempt.first_session.get_or_insert(attempt.begun.elapsed());
        });
        AttemptSession(self)
    }

    /// Records that a session has finished a message of `octets`.
    pub(super) fn message_done(&self, octets: u64) {
        self.with(|attempt| {
            attempt.is_slow |= octets < LARGE && attempt.progress.elapsed() >= SLOW_AFTER;
            attempt.progress = Instant::now();
        });
    }

    /// Records at the end of the attempt whether its destination is slow.
    pub(super) fn record_speed(&self, destination: &str) {
        let mut state = self.hosts.state.lock();
        let Some(attempt) = state.attempts.get(&self.number) else { return };
        let (session, is_slow) = (attempt.first_session, attempt.gave_way || attempt.is_slow);
        if is_slow || session.unwrap_or_else(|| attempt.begun.elapsed()) >= SLOW_AFTER {
            let now = Instant::now();
            if state.slow.len() >= SLOW_LIMIT {
                state.slow.retain(|_, until| *until > now);
            }
            if state.slow.len() < SLOW_LIMIT {
                state.slow.insert(destination.to_owned(), now + SLOW_FOR);
            }
        } else if session.is_some() {
            state.slow.remove(destination);
        }
    }

    fn with<T>(&self, look: impl FnOnce(&mut AttemptState) -> T) -> Option<T> {
        let mut state: MutexGuard<'_, TableState> = self.hosts.state.lock();
        state.attempts.get_mut(&self.number).map(look)
    }
}

impl Drop for AttemptPermit {
    fn drop(&mut self) {
        self.hosts.state.lock().attempts.remove(&self.number);
    }
}

/// A session of an attempt, until it is dropped.
pub(super) struct AttemptSession<'a>(&'a AttemptPermit);

impl Drop for AttemptSession<'_> {
    fn drop(&mut self) {
        self.0.with(|attempt| {
            attempt.sessions -= 1;
            attempt.idle_since = Instant::now();
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(limit: usize) -> Arc<HostTable> {
        let hosts = Arc::new(HostTable::default());
        hosts.set_limits(limit, 5, true);
        hosts
    }

    #[test]
    fn dsns_and_slow_destinations_do_not_use_up_the_connections() {
        let hosts = table(20);
        for kind in [AttemptKind::Dsn, AttemptKind::Slow] {
            let held: Vec<_> = (0..5).map(|_| hosts.begin_attempt(kind).ok().unwrap()).collect();
            assert_eq!(hosts.begin_attempt(kind).err(), Some(NoAttempt::KindInUse));
            drop(held);
        }
        let mail: Vec<_> = (0..18).map(|_| hosts.begin_attempt(AttemptKind::Mail).ok().unwrap()).collect();
        assert_eq!(hosts.begin_attempt(AttemptKind::Mail).err(), Some(NoAttempt::AllInUse));
        let dsns: Vec<_> = (0..2).map(|_| hosts.begin_attempt(AttemptKind::Dsn).ok().unwrap()).collect();
        assert_eq!(hosts.begin_attempt(AttemptKind::Dsn).err(), Some(NoAttempt::AllInUse));
        drop((mail, dsns));
        // A single connection is for each kind in turn.
        let hosts = table(1);
        for kind in AttemptKind::ALL {
            let held = hosts.begin_attempt(kind).ok().unwrap();
            assert_eq!(hosts.begin_attempt(AttemptKind::Mail).err(), Some(NoAttempt::AllInUse));
            drop(held);
        }
    }

    #[test]
    fn the_attempt_that_has_had_no_session_for_longest_gives_way() {
        let hosts = table(3);
        let attempts: Vec<_> = (0..3).map(|_| hosts.begin_attempt(AttemptKind::Mail).ok().unwrap()).collect();
        let session = attempts[0].session_begun();
        hosts.give_way(1);
        assert!(!attempts[1].gave_way(), "it has just begun");
        for attempt in &attempts {
            attempt.with(|state| state.idle_since -= GIVE_WAY_AFTER);
        }
        hosts.give_way(1);
        assert!(attempts[1].gave_way() && attempts[1].cancel().is_cancelled());
        hosts.give_way(1);
        assert!(!attempts[2].gave_way(), "one is ending");
        attempts[1].record_speed("slow.example");
        assert!(hosts.is_slow("slow.example") && !hosts.is_slow("other.example"));
        drop(session);
        attempts[0].record_speed("slow.example");
        assert!(!hosts.is_slow("slow.example"));
    }

    #[test]
    fn sessions_that_stall_do_not_count_if_mail_is_due() {
        let hosts = table(2);
        let begin = |kind| hosts.begin_attempt(kind);
        let attempts: Vec<_> = (0..2).map(|_| begin(AttemptKind::Mail).ok().unwrap()).collect();
        let _sessions: Vec<_> = attempts.iter().map(AttemptPermit::session_begun).collect();
        assert_eq!(begin(AttemptKind::Mail).err(), Some(NoAttempt::AllInUse));
        let stall = |attempt: &AttemptPermit| {
            attempt.with(|state| state.progress -= SLOW_AFTER);
        };
        attempts.iter().for_each(stall);
        assert_eq!(begin(AttemptKind::Slow).err(), Some(NoAttempt::AllInUse));
        let more: Vec<_> = (0..2).map(|_| begin(AttemptKind::Mail).ok().unwrap()).collect();
        assert_eq!(begin(AttemptKind::Mail).err(), Some(NoAttempt::AllInUse));
        let _more: Vec<_> = more.iter().map(AttemptPermit::session_begun).collect();
        more.iter().for_each(stall);
        assert_eq!(begin(AttemptKind::Mail).err(), Some(NoAttempt::AllInUse), "not without end");
        more[0].message_done(LARGE);
        more[0].record_speed("large.example");
        attempts[0].message_done(1);
        attempts[0].record_speed("slow.example");
        assert!(hosts.is_slow("slow.example") && !hosts.is_slow("large.example"));
    }

    #[test]
    fn all_lookups_of_an_attempt_have_one_deadline() {
        let attempt = table(1).begin_attempt(AttemptKind::Mail).ok().unwrap();
        assert!(!attempt.lookups_are_over());
        *attempt.lookups.lock() = Duration::from_millis(1);
        attempt.look_up(|deadline| std::thread::sleep(deadline.saturating_duration_since(Instant::now())));
        assert!(attempt.lookups_are_over());
        assert!(attempt.session_deadline().is_some());
        drop(attempt.session_begun());
        assert_eq!(attempt.session_deadline(), None);
    }
}
