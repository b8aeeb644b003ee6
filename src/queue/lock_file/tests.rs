//! Lock files of queues and accounts.

use std::collections::VecDeque;

use super::*;
use crate::queue::QueueLock;
use crate::queue::tests::{Spool, local_parts, result};

/// The queue of a domain of an account.
fn of_account(spool: &Spool, account: &str, domain: &str) -> QueueName {
    let lock = domains(spool).with_file_name(".odmr").join(format!("account-{account}.lock"));
    QueueName { account_lock: Some(lock), ..spool.name(domain) }
}

fn domains(spool: &Spool) -> PathBuf {
    spool.name("x.example").path.parent().unwrap().to_owned()
}

fn is_busy(spool: &Spool, names: &[QueueName]) -> bool {
    matches!(spool.queue.lock(names), Err(LockError::Busy(_)))
}

fn next(lock: &mut QueueLock) -> Option<String> {
    let message = lock.next_message()?;
    let name = local_parts(&message).remove(0);
    lock.settle(message, &result("=")).unwrap();
    Some(name)
}

fn put(spool: &Spool, domain: &str, to: &str) {
    let directory = spool.name(domain).path.join("new");
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join(format!("100.{to}")), format!("Delivered-To: {to}@{domain}\n\nx\n")).unwrap();
}

#[test]
fn an_account_has_one_lock_and_no_directory_for_a_domain_without_mail() {
    let spool = Spool::new();
    fs::create_dir_all(domains(&spool)).unwrap();
    let names: Vec<_> = (0..100).map(|number| of_account(&spool, "acme", &format!("d{number}.example"))).collect();
    let mut lock = spool.queue.lock(&names).unwrap();
    assert!(lock.is_empty().unwrap() && next(&mut lock).is_none());
    let files = |path: PathBuf| fs::read_dir(path).unwrap().count();
    assert_eq!((files(domains(&spool)), files(domains(&spool).with_file_name(".odmr"))), (0, 1));
    // Another session cannot lock any of its domains.
    assert!(is_busy(&spool, &names[7..8]) && is_busy(&spool, &names));
    assert!(!is_busy(&spool, &[of_account(&spool, "other", "other.example")]));
    put(&spool, "d7.example", "eva");
    assert!(lock.has_next());
    assert_eq!((next(&mut lock).as_deref(), next(&mut lock)), (Some("eva"), None));
    assert!(names[7].path.join(QUEUE_LOCK_FILE).exists());
    drop(lock);
    assert!(!names[7].path.join(QUEUE_LOCK_FILE).exists() && names[7].path.join("new").exists());
    assert!(!is_busy(&spool, &names));
}

/// An administrator moves a domain to another account while a session is under way, or upgrades the program.
#[test]
fn two_sessions_never_have_one_directory() {
    let spool = Spool::new();
    put(&spool, "x.example", "eva");
    let (before, after) = (of_account(&spool, "one", "x.example"), of_account(&spool, "two", "x.example"));
    let lock = spool.queue.lock(std::slice::from_ref(&before)).unwrap();
    assert!(is_busy(&spool, std::slice::from_ref(&after)) && is_busy(&spool, &[spool.name("x.example")]));
    drop(lock);
    let lock = spool.queue.lock(&[spool.name("x.example")]).unwrap();
    assert!(is_busy(&spool, std::slice::from_ref(&after)));
    drop(lock);
    fs::remove_file(before.path.join("new/100.eva")).unwrap();
    // There was no mail when the first session began.
    let mut first = spool.queue.lock(&[before]).unwrap();
    assert!(first.next_message().is_none());
    put(&spool, "x.example", "bob");
    let mut second = spool.queue.lock(&[after]).unwrap();
    assert!(!first.has_next());
    assert_eq!(next(&mut second).as_deref(), Some("bob"));
}

#[test]
fn a_directory_that_another_session_has_locked_is_left_out_if_there_is_other_mail() {
    let spool = Spool::new();
    let names = ["x.example", "y.example", "z.example"].map(|domain| of_account(&spool, "acme", domain));
    ["x.example", "z.example"].into_iter().for_each(|domain| put(&spool, domain, &domain[..1]));
    let other = spool.queue.lock(&[spool.name("x.example")]).unwrap();
    assert!(matches!(spool.queue.lock_account(&names[..2]), Err(LockError::Busy(_))));
    assert!(is_busy(&spool, &names));
    let mut lock = spool.queue.lock_account(&names).unwrap();
    assert!(lock.has_next() && is_busy(&spool, &names[1..2]));
    assert_eq!((next(&mut lock).as_deref(), next(&mut lock)), (Some("z"), None));
    drop(other);
    assert_eq!((next(&mut lock).as_deref(), next(&mut lock)), (Some("x"), None));
}

#[test]
fn the_lock_of_an_account_is_taken_over_like_that_of_a_queue() {
    let spool = Spool::new();
    put(&spool, "x.example", "eva");
    let name = of_account(&spool, "acme", "x.example");
    let lock = spool.queue.lock(std::slice::from_ref(&name)).unwrap();
    let path = name.account_lock.clone().unwrap();
    let since = |ago| {
        let file = File::options().write(true).open(&path).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(ago)).unwrap();
    };
    since(301);
    lock.heartbeat();
    assert!(is_busy(&spool, std::slice::from_ref(&name)));
    since(301);
    std::thread::scope(|scope| {
        let taker = scope.spawn(|| spool.queue.lock(std::slice::from_ref(&name)));
        while !lock.takeover_requested() {
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(lock);
        assert_eq!(next(&mut taker.join().unwrap().expect("the lock")).as_deref(), Some("eva"));
    });
    // A lock file that no session has used for long is removed, unless it is locked.
    let remove = || remove_unused_lock(&path).map(|()| path.exists()).unwrap();
    assert!(remove());
    since(37 * 60 * 60);
    let lock = File::open(&path).unwrap();
    lock.lock().unwrap();
    assert!(remove());
    drop(lock);
    assert!(!remove() && remove_unused_lock(&path).is_ok());
}

/// While an old lock file is being removed, one session ends and removes it, and the next one makes a new one.
#[test]
fn a_lock_file_that_a_session_has_made_again_is_not_removed() {
    let spool = Spool::new();
    put(&spool, "x.example", "eva");
    let name = of_account(&spool, "acme", "x.example");
    let path = name.path.join(QUEUE_LOCK_FILE);
    let old = open(&path).unwrap();
    fs::remove_file(&path).unwrap();
    let _lock = spool.queue.lock(std::slice::from_ref(&name)).unwrap();
    remove_unlocked(&path, old).unwrap();
    assert!(path.exists() && is_busy(&spool, &[of_account(&spool, "other", "x.example")]));
}

/// An account with many domains that have mail does not need a descriptor for each.
#[test]
fn a_directory_whose_mail_was_offered_is_released_if_there_are_many() {
    let spool = Spool::new();
    let names: Vec<_> = (0..300).map(|number| of_account(&spool, "acme", &format!("d{number}.example"))).collect();
    (0..300).for_each(|number| put(&spool, &format!("d{number}.example"), "eva"));
    let mut lock = spool.queue.lock_account(&names).unwrap();
    let (mut offered, mut most, mut under_way) = (0, 0, VecDeque::new());
    while let Some(message) = lock.next_message() {
        offered += 1;
        under_way.push_back(message);
        if under_way.len() > 16 {
            let message = under_way.pop_front().unwrap();
            let name = message.queue().clone();
            // To find a queue busy takes a tenth of a second, so not for each message.
            assert!(offered % 50 != 0 || is_busy(&spool, &[QueueName { account_lock: None, ..name }]));
            lock.settle(message, &result("~")).unwrap();
        }
        most = most.max(lock.queues.iter().filter(|queue| queue.lock.is_some()).count());
    }
    assert_eq!(offered, 300);
    assert!(most < 100, "{most}");
}

/// Another session may have locked its directory meanwhile.
#[test]
fn a_message_that_was_left_is_opened_again_unless_another_session_has_it() {
    let spool = Spool::new();
    let names: Vec<_> = (0..300).map(|number| of_account(&spool, "acme", &format!("d{number}.example"))).collect();
    (0..300).for_each(|number| put(&spool, &format!("d{number}.example"), "eva"));
    let mut lock = spool.queue.lock_account(&names).unwrap();
    let mut left = Vec::new();
    while let Some(message) = lock.next_message() {
        left.push((message.queue().clone(), message.entry().clone()));
        lock.leave(message);
        assert!(lock.queues.iter().filter(|queue| queue.lock.is_some()).count() < 100);
    }
    assert_eq!(left.len(), 300);
    let released = lock.queues.iter().find(|queue| queue.lock.is_none()).unwrap().name.clone();
    let other = spool.queue.lock(&[QueueName { account_lock: None, ..released.clone() }]).unwrap();
    let mut settled = 0;
    for (name, entry) in &left {
        if let Some(message) = lock.open_message(name, entry.clone()).unwrap() {
            lock.settle(message, &result("+")).unwrap();
            settled += 1;
        }
        assert!(lock.queues.iter().filter(|queue| queue.lock.is_some()).count() < 100);
    }
    assert_eq!((settled, lock.has_next()), (299, false));
    drop(other);
    let (name, entry) = left.into_iter().find(|(name, _)| *name == released).unwrap();
    assert!(lock.open_message(&name, entry).unwrap().is_some());
}
