//! Limits: the bound, counting, several writers, and several limits.

use super::*;
use crate::maildir::{Entry, MessageWriter};

struct LimitedMaildirs {
    directory: tempfile::TempDir,
    maildirs: Vec<Maildir>,
    limit: Arc<UsageLimit>,
}

fn place(octets: u64, messages: u64) -> LimitedMaildirs {
    let directory = tempfile::tempdir().unwrap();
    let maildirs: Vec<_> = ["a", "b"].map(|name| Maildir::new(directory.path().join(name))).into();
    let limit = UsageLimit::new(directory.path(), "acme", maildirs.clone(), Usage { octets, messages });
    LimitedMaildirs { directory, maildirs, limit: Arc::new(limit) }
}

impl LimitedMaildirs {
    fn file(&self) -> PathBuf {
        self.directory.path().join(".odmr/usage-acme")
    }

    fn store(&self, index: usize, unique: &str, octets: usize) -> io::Result<Entry> {
        self.store_as(index, unique, octets, true)
    }

    fn store_as(&self, index: usize, unique: &str, octets: usize, enforced: bool) -> io::Result<Entry> {
        let mut writer = MessageWriter::default();
        writer.begin(&self.maildirs[index], unique, &vec![b'x'; octets])?;
        writer.count_in(&self.limit);
        if enforced {
            writer.enforce_limits();
        }
        writer.commit().map(|mut entries| entries.remove(0))
    }

    /// Stores a message for which there is room, as soon as the last count is no longer valid.
    fn store_after_count(&self, index: usize, unique: &str, octets: usize) {
        let late = Instant::now() + COUNT_LIFETIME;
        while let Err(error) = self.store(index, unique, octets) {
            assert!(Instant::now() < late, "{error}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn held(&self) -> Usage {
        self.limit.count().unwrap().0
    }

    fn exceeded(&self, stored: io::Result<Entry>) -> &'static str {
        let error = stored.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::QuotaExceeded, "{error}");
        LimitExceeded::of(&error).unwrap().unit
    }
}

#[test]
fn a_limit_is_reached_and_never_exceeded() {
    let place = place(1000, 4);
    place.store(0, "1", 600).unwrap();
    assert_eq!(place.exceeded(place.store(1, "2", 401)), "octets");
    let second = place.store(1, "2", 400).unwrap();
    assert_eq!(place.exceeded(place.store(0, "3", 1)), "octets");
    assert_eq!(place.held(), Usage { octets: 1000, messages: 2 });
    // A removed message makes room, and other agents use it up.
    place.maildirs[1].remove(&second).unwrap();
    place.store_after_count(0, "3", 1);
    std::fs::write(place.maildirs[0].path().join("cur/4:2,S"), vec![b'x'; 399]).unwrap();
    place.store_as(0, "5", 1, false).unwrap();
    assert_eq!(place.held(), Usage { octets: 1001, messages: 4 });
    assert_eq!(place.exceeded(place.store(0, "6", 399)), "octets");
    assert!(place.maildirs.iter().all(|maildir| std::fs::read_dir(maildir.path().join("tmp")).unwrap().count() == 0));
}

#[test]
fn messages_are_limited_without_octets() {
    let place = place(u64::MAX, 2);
    place.store(0, "1", 1).unwrap();
    place.limit.check(Usage { octets: u64::MAX, messages: 1 }).unwrap();
    assert!(place.limit.check(Usage { octets: 0, messages: 2 }).is_err());
    place.store(1, "2", 1).unwrap();
    assert_eq!(place.exceeded(place.store(1, "3", 1)), "messages");
}

#[test]
fn the_files_are_counted_if_the_bound_is_not_valid() {
    let place = place(1000, u64::MAX);
    place.store(0, "1", 500).unwrap();
    let good = std::fs::read_to_string(place.file()).unwrap();
    let (boot, now) = (boot_id(), uptime().as_millis());
    // In the first ten minutes of the system no bound can be so old.
    let old = now.checked_sub(600_000).map(|counted| format!("{boot} {counted} 0 900 1 - .\n"));
    let others = [
        String::new(),
        "rubbish\n".to_owned(),
        "\0".repeat(300),
        good[..good.len() - 2].to_owned(),
        good.replacen(boot, "01234567-0123-0123-0123-0123456789ab", 1),
        format!("{boot} {} 0 900 1 - .\n", now + 1_000_000),
        format!("{boot} {now} 0 900 -1 - .\n"),
        format!("{boot} {now} 0 900 1 - . .\n"),
    ];
    for text in others.into_iter().chain(old) {
        std::fs::write(place.file(), &text).unwrap();
        place.limit.check(Usage { octets: 500, messages: 1 }).unwrap();
        assert!(place.limit.check(Usage { octets: 501, messages: 1 }).is_err(), "{text:?}");
    }
    std::fs::remove_file(place.file()).unwrap();
    place.store(0, "2", 500).unwrap();
    // A process that was killed has left a bound that is too high: the files are counted.
    std::fs::write(place.file(), format!("{boot} {now} 0 9999 9 - .\n{good}")).unwrap();
    assert_eq!(place.exceeded(place.store(0, "3", 1)), "octets");
    let counted = Bound::read(&File::open(place.file()).unwrap()).unwrap();
    assert_eq!(counted.used, Usage { octets: 1000, messages: 2 });
    place.limit.recount_next().unwrap();
    assert_eq!(Bound::read(&File::open(place.file()).unwrap()), None);
}

#[test]
fn a_full_account_is_not_counted_for_each_recipient() {
    let place = place(1000, u64::MAX);
    place.store(0, "1", 1000).unwrap();
    let counted = || Bound::read(&File::open(place.file()).unwrap()).unwrap();
    let more = Usage { octets: 1, messages: 1 };
    for maildir in &place.maildirs {
        maildir.create().unwrap();
        for name in ["new", "cur"] {
            let long_ago = SystemTime::now() - Duration::from_secs(60);
            File::open(maildir.path().join(name)).unwrap().set_modified(long_ago).unwrap();
        }
    }
    // If the first count had been slow, it would be valid for some time.
    place.limit.recount_next().unwrap();
    assert!(place.limit.check(more).is_err());
    let first = counted();
    assert!(first.changes.is_some());
    std::thread::sleep(Duration::from_millis(20));
    assert!(place.limit.check(more).is_err());
    assert_eq!(counted(), first);
    // A slow count is valid for longer, even after changes.
    let slow = Bound { counted: uptime(), took: Duration::from_secs(1), changes: None, ..first };
    std::fs::write(place.file(), slow.to_text()).unwrap();
    assert!(place.limit.check(more).is_err());
    assert_eq!(counted().used, first.used);
    assert_eq!(counted().took, slow.took);
}

#[test]
fn a_message_for_several_accounts_is_stored_for_all_or_none() {
    let directory = tempfile::tempdir().unwrap();
    let of = |name: &str, octets| {
        let maildir = Maildir::new(directory.path().join(name));
        let limit = Usage { octets, messages: u64::MAX };
        (maildir.clone(), Arc::new(UsageLimit::new(directory.path(), name, vec![maildir], limit)))
    };
    let (small, large) = (of("a", 10), of("b", 1000));
    let store = |octets: usize| {
        let mut writer = MessageWriter::default();
        for (maildir, limit) in [&large, &small] {
            writer.begin(maildir, &format!("{octets}"), b"")?;
            writer.count_in(limit);
        }
        writer.enforce_limits();
        writer.write(&vec![b'x'; octets])?;
        writer.commit()
    };
    assert_eq!(LimitExceeded::of(&store(11).unwrap_err()).unwrap().name, "a");
    assert_eq!(large.1.count().unwrap().0, Usage::default());
    large.1.check(Usage { octets: 1000, messages: 1 }).unwrap();
    store(10).unwrap();
    assert_eq!(large.1.count().unwrap().0, Usage { octets: 10, messages: 1 });
    assert!(large.1.check(Usage { octets: 991, messages: 1 }).is_err());
}

#[test]
fn many_writers_fill_an_account_and_never_exceed_it() {
    let place = place(100_000, u64::MAX);
    let place = &place;
    std::thread::scope(|scope| {
        for writer in 0..8 {
            scope.spawn(move || {
                let mut rejected = 0;
                for number in 0.. {
                    // The sizes are 100 to 2,000 octets, in another order for each writer.
                    let octets = 100 + (number * 7919 + writer * 104_729) % 1901;
                    match place.store(number % 2, &format!("{writer}-{number}"), octets) {
                        Ok(entry) if number % 3 == 0 => place.maildirs[number % 2].remove(&entry).unwrap(),
                        Ok(_) => {}
                        Err(error) => {
                            assert_eq!(error.kind(), io::ErrorKind::QuotaExceeded, "{error}");
                            rejected += 1;
                        }
                    }
                    assert!(place.held().octets <= 100_000 + 8 * 2000);
                    if rejected > 60 {
                        break;
                    }
                }
            });
        }
    });
    assert!(place.held().octets <= 100_000);
    // Then a message can be stored that needs exactly the rest.
    let left = 100_000 - place.held().octets;
    place.store_after_count(0, "last", usize::try_from(left).unwrap());
    assert_eq!(place.held().octets, 100_000);
}

#[test]
fn an_account_whose_lock_is_stuck_does_not_block_others() {
    let directory = tempfile::tempdir().unwrap();
    let of = |name: &str| {
        let maildir = Maildir::new(directory.path().join(name));
        let limit = Usage { octets: 1000, messages: u64::MAX };
        (maildir.clone(), Arc::new(UsageLimit::new(directory.path(), name, vec![maildir], limit)))
    };
    let (healthy, stuck) = (of("a"), of("b"));
    let store = |unique: &str, places: &[&(Maildir, Arc<UsageLimit>)]| {
        let mut writer = MessageWriter::default();
        for (maildir, limit) in places {
            writer.begin(maildir, unique, b"x")?;
            writer.count_in(limit);
        }
        writer.enforce_limits();
        writer.commit()
    };
    let (begun, done) = (Instant::now(), std::sync::Barrier::new(2));
    std::thread::scope(|scope| {
        // The disk of one account hangs while a thread has its lock.
        let held = stuck.1.lock(LOCK_TIMEOUT).unwrap();
        let both = scope.spawn(|| {
            done.wait();
            store("both", &[&healthy, &stuck])
        });
        done.wait();
        for number in 0.. {
            store(&format!("one-{number}"), &[&healthy]).unwrap();
            if begun.elapsed() > SHARED_LOCK_TIMEOUT * 5 {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(begun.elapsed() < LOCK_TIMEOUT / 3, "{:?}", begun.elapsed());
        assert!(!both.is_finished());
        drop(held);
        assert_eq!(both.join().unwrap().unwrap().len(), 2);
    });
}

#[test]
fn threads_do_not_wait_for_ever_for_a_lock_that_is_stuck() {
    let place = place(1000, u64::MAX);
    let held = place.limit.lock(LOCK_TIMEOUT).unwrap();
    let patience = Duration::from_millis(50);
    std::thread::scope(|scope| {
        let in_vain = || place.limit.lock(patience).map(drop).unwrap_err();
        let waiting: Vec<_> = (0..4).map(|_| scope.spawn(in_vain)).collect();
        for thread in waiting {
            assert_eq!(thread.join().unwrap().kind(), io::ErrorKind::TimedOut);
        }
    });
    drop(held);
    place.store(0, "1", 500).unwrap();
}
