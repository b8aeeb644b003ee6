//! When each destination of outgoing mail is due.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io;
use std::ops::Bound::{Excluded, Unbounded};
use std::time::{Duration, SystemTime};

use super::hosts::AttemptKind;
use super::worker::NextDue;
use crate::mail::address::Domain;
use crate::net::trace::quoted;
use crate::provider::spool::{Spool, SpoolQueue};
use crate::queue::{QueueDue, SharedIndex};

/// How often the spool is read for mail of another process whose datagram was lost.
pub(super) const RESCAN_INTERVAL: Duration = Duration::from_secs(300);

/// How long new mail waits for more, so that one session sends all that arrives together.
const GATHER_DELAY: Duration = Duration::from_millis(200);

/// The known destinations with mail. Their number has no limit, because untrusted clients choose where DSNs go: a
/// function that the scheduler calls for each attempt must not iterate over all of them.
#[derive(Default)]
pub(super) struct DestinationTable {
    /// When each destination is due; of a busy one, only the mail that has arrived since its attempt began.
    due: HashMap<Domain, QueueDue>,
    /// Destinations with an attempt under way.
    busy: HashSet<Domain>,
    /// The other destinations, by the time when their mail with a sender is due.
    mail: ByTime,
    /// The same for DSNs.
    dsns: ByTime,
    /// Busy destinations for which more mail was found in the spool: their due times are read after the attempt.
    news: HashSet<Domain>,
}

fn log_failed(queue: &str, error: &io::Error) {
    log::error!("event=spool-failed queue={queue} error={}", quoted(error));
}

/// Destinations by the time when they are due.
type ByTime = BTreeMap<SystemTime, BTreeSet<Domain>>;

/// The destinations that are due, the earliest first.
fn due_before(list: &ByTime, now: SystemTime) -> impl Iterator<Item = &Domain> {
    list.range(..=now).flat_map(|(_, domains)| domains)
}

/// Whether a destination is slow.
pub(super) type IsSlow<'a> = dyn Fn(&Domain) -> bool + 'a;

impl DestinationTable {
    /// Reads the spool for the due times of new destinations, and of those for which another process has stored mail.
    /// `again`: of all destinations, because an administrator may have changed them.
    pub(super) fn read(&mut self, spool: &Spool, index: &SharedIndex, again: bool) {
        index.read(&spool.name(&SpoolQueue::AllOutgoing)).unwrap_or_else(|error| log_failed("-", &error));
        let old = spool.old_destinations().unwrap_or_else(|error| {
            log_failed("-", &error);
            Vec::new()
        });
        let mut news = std::mem::take(&mut self.news);
        news.extend(index.take_news());
        // A process of an earlier version may still store mail there.
        news.extend(old);
        let known = index.domains().into_iter().filter(|domain| again || !self.due.contains_key(domain));
        news.extend(known.collect::<Vec<_>>());
        for domain in news {
            if self.busy.contains(&domain) {
                self.news.insert(domain);
                continue;
            }
            self.find_due(domain, spool, index);
        }
    }

    /// Records that new mail has arrived for a destination. `dsn`: it has the null sender. It is not due before `not_before`.
    pub(super) fn arrived(&mut self, domain: Domain, dsn: bool, not_before: Option<SystemTime>) {
        let due = Some(SystemTime::now() + GATHER_DELAY).max(not_before);
        self.add(domain, if dsn { QueueDue { mail: None, dsn: due } } else { QueueDue { mail: due, dsn: None } });
    }

    /// Records that a worker has finished its attempt at a destination. The attempt may have missed mail that was found
    /// while it ran.
    pub(super) fn done(&mut self, next: NextDue, spool: &Spool, index: &SharedIndex) {
        self.busy.remove(&next.destination);
        if self.news.remove(&next.destination) {
            self.find_due(next.destination.clone(), spool, index);
        }
        self.add(next.destination, next.due);
    }

    /// Reads when a destination is due.
    fn find_due(&mut self, domain: Domain, spool: &Spool, index: &SharedIndex) {
        match spool.outgoing_due(&domain, index) {
            Ok(due) => self.add(domain, due),
            Err(error) => log_failed(domain.as_str(), &error),
        }
    }

    /// Whether an attempt at the destination is under way.
    pub(super) fn is_busy(&self, domain: &Domain) -> bool {
        self.busy.contains(domain)
    }

    fn add(&mut self, domain: Domain, due: QueueDue) {
        self.unlist(&domain);
        let due = self.due.get(&domain).map_or(due, |earlier| due.or_earlier(*earlier));
        if due.earliest().is_none() {
            return;
        }
        if !self.busy.contains(&domain) {
            for (list, time) in [(&mut self.mail, due.mail), (&mut self.dsns, due.dsn)] {
                time.map(|time| list.entry(time).or_default().insert(domain.clone()));
            }
        }
        self.due.insert(domain, due);
    }

    fn unlist(&mut self, domain: &Domain) {
        let Some(due) = self.due.get(domain) else { return };
        for (list, time) in [(&mut self.mail, due.mail), (&mut self.dsns, due.dsn)] {
            if let Some(domains) = time.and_then(|time| list.get_mut(&time)) {
                domains.remove(domain);
            }
            if let Some(time) = time.filter(|time| list.get(time).is_some_and(BTreeSet::is_empty)) {
                list.remove(&time);
            }
        }
    }

    /// The destinations that are due for an attempt of this kind and not busy, the earliest first.
    fn due_of<'a>(
        &'a self, now: SystemTime, kind: AttemptKind, is_slow: &'a IsSlow<'_>,
    ) -> impl Iterator<Item = &'a Domain> {
        let list = if kind == AttemptKind::Dsn { &self.dsns } else { &self.mail };
        let has_mail = move |domain| self.due.get(domain).is_some_and(|due| due.mail.is_some_and(|mail| mail <= now));
        due_before(list, now).filter(move |domain| match kind {
            AttemptKind::Mail => !is_slow(domain),
            AttemptKind::Slow => is_slow(domain),
            // An attempt at the destination's mail sends its DSNs too.
            AttemptKind::Dsn => !has_mail(domain),
        })
    }

    /// Whether a destination is due for an attempt of this kind.
    pub(super) fn is_due_of(&self, now: SystemTime, kind: AttemptKind, is_slow: &IsSlow<'_>) -> bool {
        self.due_of(now, kind, is_slow).next().is_some()
    }

    /// The number of destinations that are due for attempts of this kind, up to `limit`.
    pub(super) fn count_due(&self, now: SystemTime, kind: AttemptKind, is_slow: &IsSlow<'_>, limit: usize) -> usize {
        self.due_of(now, kind, is_slow).take(limit).count()
    }

    /// Whether any destination is due.
    pub(super) fn is_due(&self, now: SystemTime) -> bool {
        [&self.mail, &self.dsns].into_iter().any(|list| due_before(list, now).next().is_some())
    }

    /// Takes the earliest destination that is due for an attempt of this kind. It is busy until [`DestinationTable::done`].
    pub(super) fn take_due(&mut self, now: SystemTime, kind: AttemptKind, is_slow: &IsSlow<'_>) -> Option<Domain> {
        let domain = self.due_of(now, kind, is_slow).next()?.clone();
        self.take(&domain);
        Some(domain)
    }

    /// Takes all destinations that are due, for one attempt at the mail of all of them.
    pub(super) fn take_all_due(&mut self, now: SystemTime) -> Vec<Domain> {
        let due = due_before(&self.mail, now).chain(due_before(&self.dsns, now));
        let mut seen = HashSet::new();
        let job: Vec<_> = due.filter(|domain| seen.insert(*domain)).cloned().collect();
        job.iter().for_each(|domain| self.take(domain));
        job
    }

    fn take(&mut self, domain: &Domain) {
        self.unlist(domain);
        self.due.remove(domain);
        self.busy.insert(domain.clone());
    }

    /// The time until another destination becomes due, at most [`RESCAN_INTERVAL`].
    pub(super) fn pause(&self, now: SystemTime) -> Duration {
        let after = |list: &ByTime| list.range((Excluded(now), Unbounded)).next().map(|(time, _)| *time);
        let next = [after(&self.mail), after(&self.dsns)].into_iter().flatten().min();
        let next = next.map(|due| due.duration_since(SystemTime::now()).unwrap_or_default());
        next.map_or(RESCAN_INTERVAL, |next| next.min(RESCAN_INTERVAL)) + Duration::from_millis(1)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Config;
    use crate::ids::Ids;

    fn domain(name: &str) -> Domain {
        Domain::parse(name).unwrap()
    }

    /// The spool of a provider in this directory.
    fn spool(directory: &Path) -> Spool {
        let text = "hostname = \"relay.example.net\"\nspool = \".\"\ncustomers = \"customers.d\"\n[odmr]\nrequire-tls = false\n";
        std::fs::create_dir(directory.join("customers.d")).unwrap();
        let path = directory.join("provider.toml");
        std::fs::write(&path, text).unwrap();
        let Config::Provider(config) = Config::load(&path).unwrap() else { panic!("a customer") };
        Spool::new(&config, &Ids::system(|octets| octets.fill(1)))
    }

    fn mail(time: SystemTime) -> QueueDue {
        QueueDue { mail: Some(time), dsn: None }
    }

    #[test]
    fn the_table_gives_each_destination_to_one_worker() {
        let (now, a, b) = (SystemTime::now(), domain("a.example"), domain("b.example"));
        let later = now + Duration::from_secs(60);
        let next = |due| NextDue { destination: domain("a.example"), due };
        let (directory, index, mut table) =
            (tempfile::tempdir().unwrap(), SharedIndex::default(), DestinationTable::default());
        let spool = spool(directory.path());
        let done = |table: &mut DestinationTable, due| table.done(next(due), &spool, &index);
        let take = |table: &mut DestinationTable, now| table.take_due(now, AttemptKind::Mail, &|_| false);
        assert_eq!(take(&mut table, now), None);
        table.arrived(a.clone(), false, None);
        let soon = now + Duration::from_secs(1);
        assert_eq!(take(&mut table, soon), Some(a.clone()));
        // More mail during the attempt makes the destination due again at its end, once.
        table.arrived(a.clone(), false, None);
        assert_eq!(take(&mut table, soon), None);
        done(&mut table, mail(later));
        assert_eq!(take(&mut table, soon), Some(a.clone()));
        done(&mut table, mail(later));
        assert_eq!(take(&mut table, soon), None);
        assert!(table.pause(now) <= Duration::from_secs(61));
        assert_eq!(take(&mut table, later), Some(a.clone()));
        done(&mut table, QueueDue::default());
        assert!(table.due.is_empty() && table.busy.is_empty() && table.mail.is_empty() && table.dsns.is_empty());
        // For a smarthost, one attempt takes all.
        table.arrived(a.clone(), false, None);
        table.arrived(b.clone(), true, None);
        let mut job = table.take_all_due(soon);
        job.sort();
        assert_eq!(job, [a, b]);
    }

    #[test]
    fn mail_of_other_processes_is_found_even_if_its_destination_is_due_later() {
        let directory = tempfile::tempdir().unwrap();
        let spool = spool(directory.path());
        let (index, a) = (SharedIndex::default(), domain("a.example"));
        let put = |directory_name: &str, file: &str, due: SystemTime| {
            let new = directory.path().join("outgoing").join(directory_name).join("new");
            std::fs::create_dir_all(&new).unwrap();
            std::fs::write(new.join(file), "Return-Path: <b@b.example>\nDelivered-To: a@a.example\n\n").unwrap();
            std::fs::File::options().write(true).open(new.join(file)).unwrap().set_modified(due).unwrap();
        };
        let (now, mut table) = (SystemTime::now(), DestinationTable::default());
        let due_after_read = |table: &mut DestinationTable, at| {
            table.read(&spool, &index, false);
            table.take_due(at, AttemptKind::Mail, &|_| false)
        };
        let later = now + Duration::from_secs(4 * 3600);
        put("@all", "1.a,D=a.example", later);
        assert_eq!(due_after_read(&mut table, now), None);
        put("@all", "2.a,D=a.example", now);
        assert_eq!(due_after_read(&mut table, now), Some(a.clone()));
        // During an attempt.
        put("@all", "3.a,D=a.example", now);
        assert_eq!(due_after_read(&mut table, now), None);
        let done = |table: &mut DestinationTable| {
            table.done(NextDue { destination: a.clone(), due: mail(later) }, &spool, &index);
            table.take_due(now, AttemptKind::Mail, &|_| false)
        };
        assert_eq!(done(&mut table), Some(a.clone()));
        assert_eq!(done(&mut table), None);
        assert_eq!(due_after_read(&mut table, now), None);
        put("a.example", "4.a", now);
        assert_eq!(due_after_read(&mut table, now), Some(a));
    }

    #[test]
    fn destinations_with_dsns_alone_and_slow_ones_come_later() {
        let (now, a, b) = (SystemTime::now(), domain("a.example"), domain("b.example"));
        let soon = now + Duration::from_secs(1);
        let slow = |domain: &Domain| domain.as_str() == "b.example";
        let mut table = DestinationTable::default();
        table.arrived(a.clone(), true, None);
        table.arrived(b.clone(), false, None);
        let count = |table: &DestinationTable| AttemptKind::ALL.map(|kind| table.count_due(soon, kind, &slow, 10));
        assert_eq!(count(&table), [0, 1, 1]);
        // Mail for the same destination.
        table.arrived(a.clone(), false, None);
        assert_eq!(count(&table), [1, 1, 0]);
        assert_eq!(table.take_due(soon, AttemptKind::Mail, &slow), Some(a.clone()));
        assert_eq!(table.take_due(soon, AttemptKind::Slow, &slow), Some(b));
        // Mail that is not due yet does not make the DSNs urgent.
        let (directory, index) = (tempfile::tempdir().unwrap(), SharedIndex::default());
        let due = QueueDue { mail: Some(soon + RESCAN_INTERVAL), dsn: Some(now) };
        table.done(NextDue { destination: a, due }, &spool(directory.path()), &index);
        assert_eq!(count(&table), [0, 0, 1]);
    }
}
