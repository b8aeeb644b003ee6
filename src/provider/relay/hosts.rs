//! The hosts that the relay has connections to, and those that are down.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use crate::mail::address::Domain;
use crate::net::cancel::CancelToken;
use crate::smtp::reply::Reply;
use crate::threads::Guarded;

/// After an attempt has found all connections to a host in use, no additional session is opened for this time, so that
/// the attempt finds a connection when it tries again.
const YIELD_PAUSE: Duration = Duration::from_secs(5);

/// The maximum of hosts and addresses in `passed` for one destination. Only an attacker has more; then the next attempt begins
/// with the first address again.
const PASSED_LIMIT: usize = 1000;

/// The kind of an attempt.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum AttemptKind {
    /// Mail with a sender.
    Mail,
    /// Mail with a sender for a destination that is slow.
    Slow,
    /// DSNs alone.
    Dsn,
}

impl AttemptKind {
    /// The most urgent kind first.
    pub(super) const ALL: [AttemptKind; 3] = [AttemptKind::Mail, AttemptKind::Slow, AttemptKind::Dsn];
}

/// One attempt under way.
pub(super) struct AttemptState {
    pub(super) kind: AttemptKind,
    /// The number of open sessions.
    pub(super) sessions: usize,
    /// Since when there is no session.
    pub(super) idle_since: Instant,
    pub(super) begun: Instant,
    /// The time from the begin to the first session.
    pub(super) first_session: Option<Duration>,
    /// When a session last began, or finished a message.
    pub(super) progress: Instant,
    /// A host took long for a message that is not large.
    pub(super) is_slow: bool,
    /// The attempt has given way to other mail.
    pub(super) gave_way: bool,
    pub(super) cancel: CancelToken,
}

/// The state of each host, with the number of connections to it.
#[derive(Default)]
pub(super) struct HostTable {
    pub(super) state: Guarded<TableState>,
}

#[derive(Default)]
pub(super) struct TableState {
    /// The most connections in all.
    pub(super) limit: usize,
    /// The most connections to one host.
    limit_each: usize,
    /// There is no smarthost: mail goes to hosts that untrusted clients may choose.
    pub(super) by_mx: bool,
    /// By IP address and port; a smarthost by its name.
    hosts: HashMap<String, HostState>,
    /// The attempts under way, by number.
    pub(super) attempts: HashMap<u64, AttemptState>,
    /// The number of the next attempt.
    pub(super) next_attempt: u64,
    /// The slow destinations, each with the time until which it is slow.
    pub(super) slow: HashMap<String, Instant>,
    /// The destinations for which mail has arrived since their attempt began: the DSNs of the attempt wait for the next one.
    mail_waits: HashSet<String>,
    /// The number of additional sessions (not the first one of an attempt) of all attempts.
    pub(super) additional: usize,
    /// An attempt is due, and all connections are in use.
    attempt_waits: bool,
    /// That attempt has mail with a sender for the smarthost.
    smarthost_waits: bool,
    /// For each destination whose last attempt left addresses untried: the hosts and addresses that it and the attempts
    /// before it have tried.
    passed: HashMap<String, HashSet<String>>,
}

#[derive(Default)]
struct HostState {
    connections: usize,
    /// How many of them are for additional sessions.
    additional: usize,
    /// How many are for attempts with DSNs alone.
    dsns: usize,
    down_until: Option<Instant>,
    /// An attempt that found all connections in use tries again before this time.
    wanted_until: Option<Instant>,
    /// The same for attempts that had mail with a sender.
    mail_wanted_until: Option<Instant>,
}

impl HostState {
    fn is_down(&self) -> bool {
        self.down_until.is_some_and(|until| until > Instant::now())
    }

    /// Whether the entry has any information.
    fn is_needed(&self) -> bool {
        self.connections > 0 || self.is_down() || self.is_wanted()
    }

    fn is_wanted(&self) -> bool {
        self.wanted_until.is_some_and(|until| until > Instant::now())
    }

    fn is_wanted_for_mail(&self) -> bool {
        self.mail_wanted_until.is_some_and(|until| until > Instant::now())
    }
}

/// Why an attempt has ended without a session that decided on its mail.
#[derive(Debug)]
pub(super) enum RouteError {
    /// All mail that is due is deferred with this reply.
    Deferred(Reply),
    /// All mail that is due is rejected with this reply.
    Rejected(Reply),
    /// All permitted connections to the host are in use: the next attempt is soon.
    Busy,
    /// The relay was cancelled.
    Cancelled,
}

impl HostTable {
    /// Sets the limits. `limit`: connections in all; `limit_each`: connections to one host; `by_mx`: there is no smarthost.
    pub(super) fn set_limits(&self, limit: usize, limit_each: usize, by_mx: bool) {
        let mut state = self.state.lock();
        (state.limit, state.limit_each, state.by_mx) = (limit, limit_each, by_mx);
    }

    /// Sets whether an attempt waits for a connection. `for_mail`: it has mail with a sender. Returns whether a
    /// connection will be free soon, because an additional session ends for it.
    pub(super) fn set_attempt_waits(&self, waits: bool, for_mail: bool) -> bool {
        let mut state = self.state.lock();
        (state.attempt_waits, state.smarthost_waits) = (waits, for_mail && !state.by_mx);
        waits && state.additional > 0
    }

    /// Sets whether mail has arrived for a destination since its attempt began; `false` at the end of the attempt.
    pub(super) fn set_mail_waits(&self, destination: &str, waits: bool) {
        let mut state = self.state.lock();
        match waits {
            true => drop(state.mail_waits.insert(destination.to_owned())),
            false => drop(state.mail_waits.remove(destination)),
        }
    }

    /// Whether the DSNs of an attempt at these destinations must wait for the next attempt: mail for one of them has
    /// arrived, or mail for another destination needs a connection to this host.
    pub(super) fn mail_waits(&self, destinations: &[Domain], host: &str) -> bool {
        let state = self.state.lock();
        state.smarthost_waits
            || state.hosts.get(host).is_some_and(HostState::is_wanted_for_mail)
            || !state.mail_waits.is_empty() && destinations.iter().any(|one| state.mail_waits.contains(one.as_str()))
    }

    /// Counts one more connection to a host. Attempts with DSNs alone have at most half of the connections to a host,
    /// and none while mail waits for one: untrusted clients may have caused DSNs to many domains with this host.
    ///
    /// # Errors
    /// The host is busy.
    pub(super) fn acquire(&self, host: &str, kind: AttemptKind) -> Result<HostPermit<'_>, RouteError> {
        let mut state = self.state.lock();
        let limit_each = state.limit_each;
        if !state.hosts.contains_key(host) {
            state.hosts.retain(|_, host| host.is_needed());
        }
        let entry = state.hosts.entry(host.to_owned()).or_default();
        let is_dsn = kind == AttemptKind::Dsn;
        let full_of_dsns = entry.dsns >= (limit_each / 2).max(1) || entry.is_wanted_for_mail();
        if entry.connections >= limit_each || is_dsn && full_of_dsns {
            let until = Some(Instant::now() + YIELD_PAUSE);
            entry.wanted_until = until;
            if !is_dsn {
                entry.mail_wanted_until = until;
            }
            return Err(RouteError::Busy);
        }
        entry.connections += 1;
        entry.dsns += usize::from(is_dsn);
        entry.wanted_until = None;
        if !is_dsn {
            entry.mail_wanted_until = None;
        }
        Ok(HostPermit { table: self, host: host.to_owned(), additional: false, is_dsn })
    }

    /// Counts a connection for an additional session with a host. `None`: the limits or waiting attempts do not permit
    /// it.
    pub(super) fn acquire_additional(&self, host: &str) -> Option<HostPermit<'_>> {
        let mut state = self.state.lock();
        if state.attempt_waits || state.attempts.len() + state.additional >= state.limit {
            return None;
        }
        let limit_each = state.limit_each;
        let entry = state.hosts.get_mut(host)?;
        if entry.connections >= limit_each || entry.is_wanted() {
            return None;
        }
        entry.connections += 1;
        entry.additional += 1;
        state.additional += 1;
        Some(HostPermit { table: self, host: host.to_owned(), additional: true, is_dsn: false })
    }

    /// Whether an additional session must end because an attempt waits for its connection.
    pub(super) fn must_yield(&self, host: &str) -> bool {
        let state = self.state.lock();
        state.attempt_waits || state.hosts.get(host).is_some_and(HostState::is_wanted)
    }

    /// Whether a busy host will soon have a connection for another attempt, because an additional session ends for it.
    pub(super) fn yields(&self, host: &str) -> bool {
        self.state.lock().hosts.get(host).is_some_and(|host| host.additional > 0)
    }

    /// Whether a host is down: no attempt connects to it now.
    pub(super) fn is_down(&self, host: &str) -> bool {
        self.state.lock().hosts.get(host).is_some_and(HostState::is_down)
    }

    /// Marks all hosts as up and all destinations as not slow, so that the next attempts try them: for `odmr queue
    /// retry`.
    pub(super) fn forget_down(&self) {
        let mut state = self.state.lock();
        state.hosts.values_mut().for_each(|host| host.down_until = None);
        state.slow.clear();
    }

    /// Marks a host as down for `pause`.
    pub(super) fn mark_down(&self, host: &str, pause: Duration) {
        let mut state = self.state.lock();
        // Remove unused entries: otherwise the table would grow with every host ever connected to.
        state.hosts.retain(|_, host| host.is_needed());
        state.hosts.entry(host.to_owned()).or_default().down_until = Some(Instant::now() + pause);
    }

    /// The hosts and addresses that earlier attempts at a destination have tried, if they left others untried.
    pub(super) fn passed(&self, destination: &str) -> HashSet<String> {
        self.state.lock().passed.get(destination).cloned().unwrap_or_default()
    }

    /// Records the hosts and addresses that the next attempt at a destination skips; empty: none.
    pub(super) fn set_passed(&self, destination: &str, passed: HashSet<String>) {
        let mut state = self.state.lock();
        match passed.is_empty() || passed.len() > PASSED_LIMIT {
            true => state.passed.remove(destination),
            false => state.passed.insert(destination.to_owned(), passed),
        };
    }
}

/// One connection to a host, which counts until this is dropped.
pub(super) struct HostPermit<'a> {
    table: &'a HostTable,
    host: String,
    additional: bool,
    is_dsn: bool,
}

impl HostPermit<'_> {
    /// The name of the host for which the connection counts.
    pub(super) fn host(&self) -> &str {
        &self.host
    }
}

impl Drop for HostPermit<'_> {
    fn drop(&mut self) {
        let mut state = self.table.state.lock();
        state.additional -= usize::from(self.additional);
        if let Some(host) = state.hosts.get_mut(&self.host) {
            host.connections -= 1;
            host.additional -= usize::from(self.additional);
            host.dsns -= usize::from(self.is_dsn);
            if !host.is_needed() {
                state.hosts.remove(&self.host);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const ADDRESS: &str = "127.0.0.2:25";

    #[test]
    fn a_busy_host_has_no_permit_and_a_host_is_down_for_its_pause() {
        let hosts = HostTable::default();
        hosts.set_limits(20, 1, true);
        let permit = hosts.acquire(ADDRESS, AttemptKind::Mail).ok().unwrap();
        assert!(matches!(hosts.acquire(ADDRESS, AttemptKind::Mail), Err(RouteError::Busy)));
        drop(permit);
        assert!(hosts.acquire(ADDRESS, AttemptKind::Mail).is_ok());
        assert!(!hosts.is_down(ADDRESS));
        hosts.mark_down(ADDRESS, Duration::from_secs(60));
        assert!(hosts.is_down(ADDRESS));
        hosts.mark_down(ADDRESS, Duration::ZERO);
        assert!(!hosts.is_down(ADDRESS));
    }

    #[test]
    fn dsns_do_not_use_up_the_connections_to_a_host() {
        let hosts = HostTable::default();
        let acquire = |kind| hosts.acquire(ADDRESS, kind);
        hosts.set_limits(20, 5, true);
        let dsns = [acquire(AttemptKind::Dsn).ok().unwrap(), acquire(AttemptKind::Dsn).ok().unwrap()];
        assert!(matches!(acquire(AttemptKind::Dsn), Err(RouteError::Busy)));
        assert!(!hosts.mail_waits(&[], ADDRESS));
        let mail: Vec<_> = (0..3).map(|_| acquire(AttemptKind::Mail).ok().unwrap()).collect();
        assert!(matches!(acquire(AttemptKind::Mail), Err(RouteError::Busy)));
        assert!(hosts.mail_waits(&[], ADDRESS) && !hosts.mail_waits(&[], "127.0.0.3:25"));
        drop((dsns, mail));
        assert!(matches!(acquire(AttemptKind::Dsn), Err(RouteError::Busy)), "it is for mail");
        assert!(acquire(AttemptKind::Slow).is_ok() && acquire(AttemptKind::Dsn).is_ok());
        hosts.set_limits(20, 1, true);
        assert!(acquire(AttemptKind::Dsn).is_ok(), "one after the other");
        // With a smarthost, DSNs wait for any attempt with mail, and for mail that has arrived for their destinations.
        let destinations = [Domain::parse("a.example").unwrap(), Domain::parse("b.example").unwrap()];
        hosts.set_limits(5, 5, false);
        for (waits, for_mail) in [(true, false), (true, true), (false, false)] {
            hosts.set_attempt_waits(waits, for_mail);
            assert_eq!(hosts.mail_waits(&destinations, "smart.example:587"), for_mail);
        }
        hosts.set_mail_waits("b.example", true);
        assert!(hosts.mail_waits(&destinations, "smart.example:587"));
        assert!(!hosts.mail_waits(&destinations[..1], "smart.example:587"));
    }

    #[test]
    fn additional_sessions_use_only_connections_that_no_attempt_waits_for() {
        let hosts = Arc::new(HostTable::default());
        hosts.set_limits(4, 3, true);
        let begin = || hosts.begin_attempt(AttemptKind::Mail).ok();
        let one = begin().unwrap();
        assert!(hosts.acquire_additional(ADDRESS).is_none(), "there is no first session");
        let first = hosts.acquire(ADDRESS, AttemptKind::Mail).ok().unwrap();
        let second = hosts.acquire_additional(ADDRESS).unwrap();
        let _third = hosts.acquire_additional(ADDRESS).unwrap();
        assert!(hosts.acquire_additional(ADDRESS).is_none(), "the limit of the host");
        // An attempt at another destination needs the same host: a session ends for it.
        let _two = begin().unwrap();
        assert!(!hosts.must_yield(ADDRESS));
        assert!(matches!(hosts.acquire(ADDRESS, AttemptKind::Mail), Err(RouteError::Busy)));
        assert!(hosts.must_yield(ADDRESS) && hosts.yields(ADDRESS));
        drop(second);
        assert!(hosts.acquire_additional(ADDRESS).is_none(), "it is for the attempt");
        let _other = hosts.acquire(ADDRESS, AttemptKind::Mail).ok().unwrap();
        assert!(!hosts.must_yield(ADDRESS));
        // Two attempts and an additional session; then all connections are in use, and one more attempt is due.
        let _three = begin().unwrap();
        assert!(begin().is_none());
        assert!(hosts.set_attempt_waits(true, true) && hosts.must_yield(ADDRESS));
        drop(first);
        assert!(hosts.acquire_additional(ADDRESS).is_none());
        drop(one);
        assert!(begin().is_some() && !hosts.set_attempt_waits(false, false));
    }
}
