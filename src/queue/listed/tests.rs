//! Queues with more messages than a pass keeps.

use std::fs;

use super::*;
use crate::queue::tests::{Spool, local_parts, result};
use crate::queue::{NextStep, QueueLock, QueueName, QueuedMessage};
use crate::smtp::status::{DecidedBy, DeliveryResult};

/// Writes messages to `u0`, `u1` and so on. Their names have the order of the numbers; the files are made in another
/// order.
fn fill(spool: &Spool, count: usize) {
    for number in (0..count).map(|number| number * 7919 % count) {
        spool.write(&format!("new/{number:06}.x"), &format!("Delivered-To: u{number}@example.org\n\nx\n"));
    }
    fs::create_dir_all(spool.path("cur")).unwrap();
}

/// Calls `act` with each message offered. Returns the recipients in order, and the number of steps without a message.
fn offer_all(lock: &mut QueueLock, mut act: impl FnMut(&mut QueueLock, QueuedMessage)) -> (Vec<String>, usize) {
    let (mut offered, mut steps) = (Vec::new(), 0);
    loop {
        match lock.next_step() {
            NextStep::End => return (offered, steps),
            NextStep::Listing => steps += 1,
            NextStep::Message(message) => {
                offered.push(local_parts(&message).remove(0));
                act(lock, *message);
            }
        }
        assert!(lock.waiting() <= 2 * PIECE);
    }
}

fn numbers(numbers: impl IntoIterator<Item = usize>) -> Vec<String> {
    numbers.into_iter().map(|number| format!("u{number}")).collect()
}

#[test]
fn a_large_queue_is_offered_in_several_passes_the_oldest_first() {
    let (spool, count) = (Spool::new(), 2 * PIECE + 500);
    fill(&spool, count);
    for (number, name) in [(1, "000001.x,P=2-0-1767322800"), (2, "000002.x,P=1-0-1767322800"), (3, "000003.x:2,F")] {
        let directory = if name.contains(':') { "cur" } else { "new" };
        fs::rename(spool.path(&format!("new/{number:06}.x")), spool.path(&format!("{directory}/{name}"))).unwrap();
    }
    let mut expected = numbers([3, 0].into_iter().chain(4..count));
    expected.extend(numbers([2, 1]));
    for statuses in ["=", "~"] {
        let mut lock = spool.lock();
        assert!(lock.has_next() && lock.waiting() <= 1, "a few files are read for that");
        let mut settled = 0;
        let (offered, steps) = offer_all(&mut lock, |lock, message| {
            // Half of the messages, so that the rest stays for the next session.
            settled += 1;
            lock.settle(message, &result(if settled % 2 == 0 { statuses } else { "~" })).unwrap();
        });
        assert_eq!(offered, expected, "{statuses}");
        assert!(steps >= count / STEP_WORK, "{steps}");
        assert!(!lock.has_next() && lock.next_message().is_none());
        expected = expected.into_iter().step_by(2).collect();
        // A message that was offered again and has not ended the session is ordered as before.
        expected.sort_by_key(|name| (name != "u3", name[1..].parse::<usize>().unwrap()));
    }
}

/// The time of the fixed clock, at the begin of an hour.
const NOW: i64 = 1_767_322_800;

#[test]
fn held_mail_comes_by_doubt_hour_and_size() {
    let spool = Spool::new();
    let time = |hours: i64| NOW + 3600 * hours;
    let names = [
        // In doubt, and has ended one session at most.
        format!("cur/{}.b,S=900:2,F", time(-2)),
        format!("cur/{}.b,S=100:2,F", time(-1)),
        format!("cur/{}.b,S=100,P=1-0-{}:2,F", time(-5), time(-1)),
        // The clock was wrong: the times are years ago, or in years to come.
        "new/3.a,S=100".to_owned(),
        "new/no-time,S=200".to_owned(),
        format!("new/{}.a,S=300", time(24 * 365)),
        // By the hour, and by size within an hour.
        format!("new/{}.d,S=1000000", time(-2) + 1),
        format!("new/{}.e,S=200", time(-1) + 9),
        format!("new/{}.f,S=200", time(-1) + 10),
        format!("new/{}.a,S=65000", time(-1) + 8),
        // The file of another agent.
        format!("new/{}.g", time(-1) + 30),
        format!("new/{}.a,S=66000", time(-1) + 2),
        format!("new/{}.b,S=70000", time(-1) + 1),
        format!("new/4.b,S=1,T={}", time(0)),
        format!("new/{}.a,S=100", time(0) + 1),
        // By the number of sessions that they have ended.
        format!("new/{}.a,S=900,P=1-0-{}", time(-2), time(-1)),
        format!("new/{}.c,S=100,P=1-0-{}", time(-1), time(-1)),
        format!("cur/{}.b,S=100,P=2-0-{}:2,F", time(-6), time(-1)),
    ];
    // The files are made in another order.
    for at in (0..names.len()).map(|number| number * 7 % names.len()) {
        spool.write(&names[at], &format!("Delivered-To: u{at}@example.org\n\nx\n"));
    }
    assert_eq!(offer_all(&mut spool.lock(), |_, _| {}).0, numbers(0..names.len()));
}

/// Before each call strangers send four small messages, and the line carries three messages in each call. `file`: the
/// name of a large message that has arrived first, at [`NOW`]. Returns the number of hours after which the customer
/// gets it.
fn hours_until_sent(file: String) -> i64 {
    let entry = |name: String| Entry { name: name.into(), seen: false };
    let mut waiting = vec![entry(file)];
    for call in 1..1000 {
        let time = NOW + call * HOUR / 3;
        waiting.extend((0..4).map(|number| entry(format!("{time}.small{number},S=100"))));
        for _ in 0..3 {
            let mut pass = Pass::new(std::iter::empty(), QueueOrder::Held { now: Timestamp::from_seconds(time) });
            waiting.iter().for_each(|entry| pass.add(entry.clone(), false));
            let first = pass.finish().0.remove(0).entry;
            if first.unique().as_encoded_bytes().ends_with(b".large") {
                return call / 3;
            }
            waiting.retain(|entry| *entry != first);
        }
    }
    panic!("mail of strangers delays the message for ever")
}

/// Only mail of the same hour comes before a large message; if it has ended a session, only mail of a week.
#[test]
fn mail_of_strangers_does_not_delay_a_large_message_for_ever_if_the_line_is_too_thin_for_all() {
    assert!(hours_until_sent(format!("{NOW}.large,S=1000000")) <= 1);
    let days = |hours| (hours + 23) / 24;
    // After a week, the mail that waits then comes before it.
    assert_eq!(days(hours_until_sent(format!("{NOW}.large,S=1000000,P=1-0-{NOW}"))), 10);
    assert_eq!(days(hours_until_sent(format!("{NOW}.large,S=1000000,P=5-0-{NOW}"))), 10);
    assert!(hours_until_sent(format!("{NOW}.large,S=1000000,P=1-0-{}", NOW + 365 * 24 * HOUR)) <= 2);
}

/// A message of the second queue does not wait for those of a later phase in the first.
#[test]
fn messages_in_doubt_come_first_in_all_queues() {
    let spool = Spool::new();
    let names = ["a.example", "b.example", "c.example"].map(|name| spool.name(name));
    for name in &names {
        let domain = name.domain.as_ref().unwrap();
        for file in ["new/1.x", "cur/2.x:2,F", "new/3.x,P=1-0-1767322800"] {
            let path = name.path.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("Delivered-To: u{}@{domain}\n\nx\n", &file[4..5])).unwrap();
        }
    }
    let mut seen = Vec::new();
    offer_all(&mut spool.queue.lock(&names).unwrap(), |_, message| {
        seen.push(message.envelope.recipients[0].mailbox.to_string());
    });
    let of = |number| names.each_ref().map(|name| format!("u{number}@{}", name.domain.as_ref().unwrap()));
    assert_eq!(seen, [of(2), of(1), of(3)].concat());
}

/// A domain with much mail does not delay the others, even when it must be listed again.
#[test]
fn domains_take_turns() {
    let spool = Spool::new();
    let names = ["many.example", "few.example", "more.example"].map(|name| spool.name(name));
    let counts = [2 * PIECE, 20, PIECE];
    for (name, count) in names.iter().zip(counts) {
        let domain = name.domain.as_ref().unwrap();
        fs::create_dir_all(name.path.join("new")).unwrap();
        for number in 0..count {
            let file = name.path.join(format!("new/{number:06}.x"));
            fs::write(file, format!("Delivered-To: eva@{domain}\n\nx\n")).unwrap();
        }
    }
    let mut seen = Vec::new();
    let act = |lock: &mut QueueLock, message: QueuedMessage| {
        seen.push(names.iter().position(|name| name == message.queue()).unwrap());
        lock.settle(message, &result("=")).unwrap();
    };
    assert_eq!(offer_all(&mut spool.queue.lock(&names).unwrap(), act).0.len(), counts.iter().sum());
    let last = |queue| seen.iter().rposition(|other| *other == queue).unwrap();
    assert!(last(1) < 3 * (20 + 8), "the last of few is number {}", last(1));
    assert!(last(2) < 2 * PIECE + PIECE / 2, "the last of more is number {}", last(2));
}

/// Each of the `poison` messages makes the customer's server crash after its content. Returns the number of the call in
/// which the customer gets the last of the other messages.
fn calls_until_others_are_sent(poison: usize, in_doubt: bool) -> usize {
    let (spool, others) = (Spool::new(), 5);
    for number in 0..others + poison {
        let kind = if number < poison { "poison" } else { "other" };
        spool.write(&format!("new/{number}.x,S=100"), &format!("Delivered-To: {kind}{number}@example.org\n\nx\n"));
    }
    let mut sent = 0;
    for call in 1.. {
        let mut lock = spool.lock();
        while let Some(message) = lock.next_message() {
            if local_parts(&message)[0].starts_with("poison") {
                let statuses = if in_doubt { "?" } else { "~" };
                let lost = DeliveryResult { decided_by: DecidedBy::ConnectionLoss, ..result(statuses) };
                lock.settle(message, &lost).unwrap();
                break;
            }
            lock.settle(message, &result("=")).unwrap();
            sent += 1;
        }
        lock.count_call();
        if sent == others {
            return call;
        }
    }
    unreachable!()
}

#[test]
fn a_message_that_makes_the_customer_crash_delays_the_others_by_two_calls_at_most() {
    for poison in 0..4 {
        // If the content was not complete, the message is not in doubt.
        assert_eq!(calls_until_others_are_sent(poison, false), poison + 1);
        assert_eq!(calls_until_others_are_sent(poison, true), 2 * poison + 1);
    }
}

#[test]
fn two_files_of_one_message_are_recognized_at_the_limit_of_a_pass() {
    let ours = "X-ODMR-Envelope: id=x; arrived=2026-01-02T03:04:05Z\n";
    let rest = format!("Delivered-To: bob@example.org\n{ours}\nx\n");
    let whole = format!("Delivered-To: eva@example.org\n{rest}");
    for at in [PIECE - 2, PIECE - 1, PIECE] {
        for flags in ["", ":2,F"] {
            let spool = Spool::new();
            fill(&spool, PIECE + 10);
            spool.write(&format!("new/{at:06}.x"), &whole);
            spool.write(&format!("cur/{at:06}.x,S=96,W=101{flags}"), &rest);
            let (offered, _) = offer_all(&mut spool.lock(), |_, _| {});
            assert_eq!(offered.iter().filter(|name| *name == "bob").count(), 1, "{at} {flags}");
            assert_eq!((offered.len(), offered.contains(&"eva".to_owned())), (PIECE + 10, false), "{at} {flags}");
        }
    }
}

/// Another agent has given more files one unique name than a pass keeps.
#[test]
fn files_of_one_unique_name_that_fill_a_pass_are_all_offered() {
    let spool = Spool::new();
    for number in 0..PIECE + 5 {
        spool.write(&format!("new/1.x,{number:06}"), &format!("Delivered-To: u{number}@example.org\n\nx\n"));
    }
    let mut lock = spool.lock();
    let settle = |lock: &mut QueueLock, message: QueuedMessage| lock.settle(message, &result("=")).unwrap();
    assert_eq!(offer_all(&mut lock, settle).0, numbers(0..PIECE + 5));
}

#[test]
fn many_queues_remember_few_messages_of_a_later_phase() {
    let (spool, queues) = (Spool::new(), 20);
    let names: Vec<_> = (0..queues).map(|queue| spool.name(&format!("d{queue}.example"))).collect();
    for (queue, name) in names.iter().enumerate() {
        fs::create_dir_all(name.path.join("new")).unwrap();
        fs::create_dir_all(name.path.join("cur")).unwrap();
        for number in 0..200 {
            let file = name.path.join(format!("new/{number:06}.x,P=1-0-1767322800"));
            fs::write(file, format!("Delivered-To: last{number}@d{queue}.example\n\nx\n")).unwrap();
        }
        fs::write(name.path.join("new/300.x"), format!("Delivered-To: first@d{queue}.example\n\nx\n")).unwrap();
    }
    let (offered, _) = offer_all(&mut spool.queue.lock(&names).unwrap(), |_, _| {});
    assert_eq!(offered.len(), queues * 201);
    assert!(offered[..queues].iter().all(|name| name == "first"), "{:?}", &offered[..queues]);
}

#[test]
fn many_files_that_are_not_messages_take_several_steps() {
    let spool = Spool::new();
    for number in 0..100 {
        spool.write(&format!("new/{number:06}.x"), "no recipient\n");
    }
    spool.write("new/200000.x", "Delivered-To: eva@example.org\n\nx\n");
    let (offered, steps) = offer_all(&mut spool.lock(), |_, _| {});
    assert_eq!(offered, ["eva"]);
    assert!(steps >= 100 * OPEN_WORK / STEP_WORK, "{steps}");
}

/// While some messages are under way, others arrive, are moved by mail readers, and have ended sessions.
#[test]
fn each_message_of_many_queues_is_offered_once() {
    let spool = Spool::new();
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut dice = move |sides: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        usize::try_from(seed % sides as u64).unwrap()
    };
    let lock_file = spool.path("../../.odmr/account-acme.lock");
    let names: Vec<_> = (0..90)
        .map(|number| QueueName { account_lock: Some(lock_file.clone()), ..spool.name(&format!("d{number}.example")) })
        .collect();
    let (mut expected, mut made) = (Vec::new(), 0);
    let mut put = |queue: usize, flags: &str, expected: &mut Vec<String>| {
        made += 1;
        let (path, to) = (&names[queue].path, format!("u{made}"));
        ["new", "cur"].iter().for_each(|name| fs::create_dir_all(path.join(name)).unwrap());
        let directory = if flags.contains(':') { "cur" } else { "new" };
        let text = format!("Delivered-To: {to}@d{queue}.example\n\nx\n");
        fs::write(path.join(directory).join(format!("{made:06}.x{flags}")), text).unwrap();
        expected.push(to);
    };
    for queue in 0..90 {
        let count = match queue {
            3 => PIECE + 77,
            50 => PIECE,
            _ => dice(40),
        };
        for _ in 0..count {
            let flags = ["", "", "", "", ":2,S", ":2,F", ",P=1-0-1767322800", ",P=2-0-1767322800"][dice(8)];
            put(queue, flags, &mut expected);
        }
    }
    let mut lock = spool.queue.lock_account(&names).unwrap();
    let (mut offered, mut under_way) = (Vec::new(), Vec::new());
    loop {
        match lock.next_step() {
            NextStep::Listing => {}
            NextStep::Message(message) => {
                offered.push(local_parts(&message).remove(0));
                under_way.push(*message);
            }
            NextStep::End if under_way.is_empty() => break,
            NextStep::End => {}
        }
        while under_way.len() > 12 || !under_way.is_empty() && dice(20) == 0 {
            let message = under_way.swap_remove(dice(under_way.len()));
            let statuses = ["=", "~", "!", "?"][dice(4)];
            lock.settle(message, &result(statuses)).unwrap();
        }
        let locked = lock.queues.iter().filter(|queue| queue.lock.is_some() && queue.under_way == 0).count();
        assert!(locked <= 70, "{locked} directories are locked");
        if offered.len() < 3000 && dice(50) == 0 {
            put(dice(90), "", &mut expected);
        }
        if dice(100) == 0 {
            let path = &names[dice(90)].path;
            if let Some(Ok(file)) = fs::read_dir(path.join("new")).ok().and_then(|mut files| files.next()) {
                let name = file.file_name().into_string().unwrap();
                let _ = fs::rename(file.path(), path.join("cur").join(format!("{name}:2,S")));
            }
        }
    }
    expected.sort_unstable();
    offered.sort_unstable();
    let missing: Vec<_> = expected.iter().filter(|to| offered.binary_search(to).is_err()).collect();
    let twice: Vec<_> = offered.windows(2).filter(|pair| pair[0] == pair[1]).map(|pair| &pair[0]).collect();
    assert!(missing.is_empty() && twice.is_empty(), "missing {missing:?}, twice {twice:?} of {}", expected.len());
}
