//! Tests of the rules for clients that guess secrets.

use super::*;

const NOW: i64 = 1_767_323_045;
const ACME: u8 = 1;

fn network(text: &str) -> ClientNetwork {
    ClientNetwork::of(Some(text.parse().unwrap()))
}

fn attempt(id: &str, account: u8, address: &str) -> AttemptOrigin {
    AttemptOrigin { id: id.to_owned(), address: Some(address.parse().unwrap()), account: [account; 16] }
}

/// How many seconds a wrong secret waits; `None`: it is rejected.
fn guess(table: &mut LoginTable, account: u8, address: &str, now: i64) -> Option<u32> {
    let attempt = attempt("guess", account, address);
    let (counted, seconds) = match table.begin(&attempt, now) {
        Admission::Free => (false, 0),
        Admission::Delayed(seconds) => (true, seconds),
        Admission::Rejected => return None,
    };
    table.end(&attempt, counted, AttemptEnd::Failed, now);
    Some(seconds)
}

fn guess_often(table: &mut LoginTable, times: usize) {
    for _ in 0..times {
        guess(table, ACME, "192.0.2.1", NOW);
    }
}

/// How many seconds the right secret waits; `None`: it is rejected.
fn log_in(table: &mut LoginTable, account: u8, address: &str, now: i64) -> Option<u32> {
    let attempt = attempt("login", account, address);
    let admission = table.begin(&attempt, now);
    let end = if admission == Admission::Rejected { AttemptEnd::Withdrawn } else { AttemptEnd::Succeeded };
    table.end(&attempt, matches!(admission, Admission::Delayed(_)), end, now);
    match admission {
        Admission::Free => Some(0),
        Admission::Delayed(seconds) => Some(seconds),
        Admission::Rejected => None,
    }
}

/// The table after it was written and read again.
fn reread(table: &LoginTable) -> LoginTable {
    let (read, wrong) = LoginTable::parse(table.text().as_bytes());
    assert_eq!((read.text(), wrong), (table.text(), 0));
    read
}

#[test]
fn three_failures_are_free_and_then_the_delay_doubles() {
    let mut table = LoginTable::default();
    let delays: Vec<_> = (0..12).map(|_| guess(&mut table, ACME, "192.0.2.1", NOW)).collect();
    assert_eq!(delays, [0, 0, 0, 1, 2, 4, 8, 16, 30, 30, 30, 30].map(Some));
    // The same network; another account.
    assert_eq!(guess(&mut table, 2, "192.0.2.200", NOW), Some(30));
    // The same account; another network.
    assert_eq!(guess(&mut table, ACME, "198.51.100.1", NOW), Some(30));
    assert_eq!(guess(&mut table, 3, "198.51.100.1", NOW), Some(0));
}

#[test]
fn a_network_is_a_24_of_ipv4_or_a_64_of_ipv6() {
    for (address, text) in [
        ("192.0.2.77", "192.0.2.0/24"),
        ("::ffff:192.0.2.77", "192.0.2.0/24"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
    ] {
        assert_eq!(network(address).to_string(), text);
        assert_eq!(ClientNetwork::parse(text), Some(network(address)));
    }
    assert_eq!(ClientNetwork::parse("unknown"), Some(ClientNetwork::of(None)));
    assert_eq!(ClientNetwork::parse("192.0.2"), None);
}

#[test]
fn of_many_attempts_at_once_eight_are_free_eight_wait_and_the_others_are_rejected() {
    let mut table = LoginTable::default();
    let begin = |number: u32| table.begin(&attempt(&number.to_string(), ACME, "192.0.2.1"), NOW);
    let admissions: Vec<_> = (0..20).map(begin).collect();
    assert_eq!(admissions[..9], [[Admission::Free; 8].as_slice(), &[Admission::Delayed(1)]].concat());
    assert_eq!(admissions.iter().filter(|admission| matches!(admission, Admission::Delayed(_))).count(), 8);
    assert_eq!(admissions[16..], [Admission::Rejected; 4]);
    // Another process reads the same from the file. Each place is free again after its time.
    let mut table = reread(&table);
    assert_eq!(table.begin(&attempt("late", 2, "192.0.2.1"), NOW + 1), Admission::Rejected);
    assert_eq!(table.begin(&attempt("late", 2, "192.0.2.1"), NOW + 2), Admission::Delayed(30));
}

/// For instance all use one NAT address, or loopback.
#[test]
fn customers_that_call_at_once_from_one_network_have_no_delay() {
    let mut table = LoginTable::default();
    let attempts: Vec<_> = (0..100).map(|number| attempt(&number.to_string(), number, "192.0.2.1")).collect();
    for round in 0..2 {
        let (mut waiting, mut open) = (attempts.clone(), Vec::new());
        while !waiting.is_empty() {
            let (begun, crowded): (Vec<_>, _) = waiting.into_iter().partition(|attempt| table.open(attempt, NOW));
            assert!(crowded.iter().all(|attempt| table.is_crowded(attempt, NOW)));
            // From a known network only the attempts at the same account count.
            assert_eq!(begun.len(), if round == 0 { 8.min(begun.len() + crowded.len()) } else { 100 });
            open.extend(begun);
            for attempt in open.drain(..) {
                assert_eq!(table.begin(&attempt, NOW), Admission::Free);
                table.end(&attempt, false, AttemptEnd::Succeeded, NOW);
            }
            waiting = crowded;
        }
    }
    assert!(!table.text().contains("failed"));
}

/// A client begins exchanges and does not end them, to delay others.
#[test]
fn after_the_wait_for_open_attempts_an_attempt_is_delayed_as_after_failures() {
    let mut table = LoginTable::default();
    (0..8).for_each(|number| drop(format!("{:?}", table.begin(&attempt(&number.to_string(), ACME, "192.0.2.1"), NOW))));
    let customer = attempt("customer", 2, "192.0.2.9");
    assert!(!table.open(&customer, NOW) && table.is_crowded(&customer, NOW));
    assert_eq!(table.begin(&customer, NOW), Admission::Delayed(1));
    let elsewhere = attempt("elsewhere", 2, "198.51.100.1");
    assert_eq!(table.begin(&elsewhere, NOW), Admission::Free);
}

/// An attacker must not be able to lock a customer out.
#[test]
fn in_a_known_network_only_the_accounts_own_failures_there_count() {
    let mut table = LoginTable::default();
    assert_eq!(log_in(&mut table, ACME, "203.0.113.1", NOW), Some(0));
    let text = table.text();
    assert_eq!(text, format!("known {NOW} 0 {} 203.0.113.0/24\n", "01".repeat(16)));
    for _ in 0..100 {
        guess(&mut table, ACME, "192.0.2.1", NOW);
        guess(&mut table, 2, "203.0.113.200", NOW);
    }
    let mut table = reread(&table);
    assert_eq!(log_in(&mut table, ACME, "203.0.113.1", NOW), Some(0));
    // A login from a known network changes the file at most once a day.
    let text = table.text();
    assert_eq!(log_in(&mut table, ACME, "203.0.113.1", NOW), Some(0));
    assert_eq!(table.text(), text);
    assert_eq!(log_in(&mut table, ACME, "203.0.113.1", NOW + 86_400), Some(0));
    assert!(table.text().contains(&format!("known {} 0 ", NOW + 86_400)));
    // The failures of the account count there until it has logged in.
    let delays: Vec<_> = (0..5).map(|_| guess(&mut table, ACME, "203.0.113.1", NOW + 86_400)).collect();
    assert_eq!(delays, [0, 0, 0, 1, 2].map(Some));
    assert_eq!(log_in(&mut table, ACME, "203.0.113.1", NOW + 86_400), Some(4));
    assert_eq!(guess(&mut table, ACME, "203.0.113.1", NOW + 86_400), Some(0));
}

#[test]
fn of_many_attempts_at_once_from_a_known_network_eight_are_free() {
    let mut table = LoginTable::default();
    log_in(&mut table, ACME, "203.0.113.1", NOW);
    let begin = |number: u32| table.begin(&attempt(&number.to_string(), ACME, "203.0.113.1"), NOW);
    let admissions: Vec<_> = (0..10).map(begin).collect();
    let delayed = [Admission::Delayed(1), Admission::Delayed(2)];
    assert_eq!(admissions, [[Admission::Free; 8].as_slice(), &delayed].concat());
}

/// Otherwise a client that guesses and has an account could clear the count of its network.
#[test]
fn a_login_clears_neither_its_network_nor_its_account() {
    let mut table = LoginTable::default();
    for expected in [0, 0, 0, 1, 2] {
        assert_eq!(guess(&mut table, ACME, "192.0.2.1", NOW), Some(expected));
        assert!(log_in(&mut table, 9, "192.0.2.1", NOW).is_some());
    }
}

#[test]
fn an_attempt_without_a_compared_secret_does_not_count() {
    let mut table = LoginTable::default();
    for _ in 0..10 {
        let attempt = attempt("withdrawn", ACME, "192.0.2.1");
        assert_eq!(table.begin(&attempt, NOW), Admission::Free);
        table.end(&attempt, false, AttemptEnd::Withdrawn, NOW);
    }
    assert_eq!(table.text(), "");
}

#[test]
fn failures_are_halved_each_quarter_of_an_hour_even_if_the_clock_is_set_back() {
    let full = || {
        let mut table = LoginTable::default();
        guess_often(&mut table, 100);
        table
    };
    for (later, expected) in [(0, 30), (899, 30), (900, 30), (3 * 900, 8), (4 * 900, 1), (5 * 900, 0), (1 << 40, 0)] {
        assert_eq!(guess(&mut full(), ACME, "192.0.2.1", NOW + later), Some(expected), "{later}");
    }
    // The clock is set back by a year: from then on the failures are halved as before.
    let (mut table, past) = (full(), NOW - 365 * 86_400);
    assert_eq!(guess(&mut table, ACME, "192.0.2.1", past), Some(30));
    let mut table = reread(&table);
    assert_eq!(guess(&mut table, ACME, "192.0.2.1", past + 3600), Some(1));
    // Waiting attempts do not occupy their places for a year.
    let mut table = LoginTable::default();
    for number in 0..20 {
        table.begin(&attempt(&number.to_string(), ACME, "192.0.2.1"), NOW);
    }
    assert_eq!(table.begin(&attempt("other", ACME, "192.0.2.1"), past), Admission::Delayed(30));
}

/// A customer calls from a new network while clients of many networks guess its secret.
#[test]
fn an_attempt_from_a_network_with_fewer_failures_displaces_the_one_with_the_most() {
    let mut table = LoginTable::default();
    let address = |number: usize| format!("10.0.{number}.1");
    for number in 0..100 {
        guess(&mut table, ACME, &address(number), NOW);
    }
    let mut begin = |number: usize| table.begin(&attempt(&format!("a{number}"), ACME, &address(number)), NOW);
    let admissions: Vec<_> = (0..100).map(&mut begin).collect();
    assert_eq!(admissions.iter().filter(|admission| **admission == Admission::Delayed(30)).count(), 32);
    assert_eq!(admissions.iter().filter(|admission| **admission == Admission::Rejected).count(), 68);
    let customer = attempt("customer", ACME, "203.0.113.1");
    assert_eq!(table.begin(&customer, NOW), Admission::Delayed(30));
    let displaced = |table: &LoginTable| (0..100).filter(|number| table.is_displaced(&format!("a{number}"))).count();
    assert_eq!(displaced(&table), 1);
    // All of them try again, and the customer is not displaced. Another process reads the same.
    for number in 0..100 {
        assert_ne!(table.begin(&attempt(&format!("b{number}"), ACME, &address(number)), NOW), Admission::Free);
    }
    let table = reread(&table);
    assert!(!table.is_displaced("customer"));
    assert_eq!(displaced(&table), 1);
}

/// The same, before the networks have any failure.
#[test]
fn among_equals_an_attempt_from_a_network_without_rejections_comes_first() {
    let mut table = LoginTable::default();
    let mut begin =
        |number: usize| table.begin(&attempt(&format!("a{number}"), ACME, &format!("10.0.{number}.1")), NOW);
    (0..60).for_each(|number| drop(format!("{:?}", begin(number))));
    assert_eq!(begin(60), Admission::Rejected);
    // The clients that wait ask for more places, over other connections.
    for number in (0..40).chain(0..40) {
        begin(number);
    }
    assert_eq!(table.begin(&attempt("customer", ACME, "203.0.113.1"), NOW), Admission::Delayed(30));
    assert!(!table.is_displaced("customer"));
}

/// One client in a customer's network guesses, and occupies all places of the network.
#[test]
fn an_address_does_not_lock_out_the_others_of_its_network() {
    let mut table = LoginTable::default();
    let mut begin = |id: String, address| table.begin(&attempt(&id, ACME, address), NOW);
    (0..20).for_each(|number| drop(format!("{:?}", begin(format!("a{number}"), "203.0.113.66"))));
    assert_eq!(begin("a20".to_owned(), "203.0.113.66"), Admission::Rejected);
    assert_eq!(begin("customer".to_owned(), "203.0.113.1"), Admission::Delayed(30));
    (21..40).for_each(|number| assert_eq!(begin(format!("a{number}"), "203.0.113.66"), Admission::Rejected));
    let table = reread(&table);
    assert!(!table.is_displaced("customer"));
    assert_eq!((0..20).filter(|number| table.is_displaced(&format!("a{number}"))).count(), 1);
}

/// An attacker uses 65,536 networks of IPv6, each once.
#[test]
fn a_site_with_many_networks_does_not_lock_others_out() {
    let mut table = LoginTable::default();
    guess_often(&mut table, 20);
    let mut begin = |id: String, address: &str| table.begin(&attempt(&id, ACME, address), NOW + 40);
    (0..1000)
        .for_each(|number| drop(format!("{:?}", begin(format!("a{number}"), &format!("2001:db8:1:{number:x}::1")))));
    assert_eq!(begin("customer".to_owned(), "203.0.113.1"), Admission::Delayed(30));
    (0..1000)
        .for_each(|number| drop(format!("{:?}", begin(format!("b{number}"), &format!("2001:db8:1:f{number:x}::1")))));
    assert!(!table.is_displaced("customer"));
}

/// A customer's secret was wrong for days, and is corrected while clients of many networks guess.
#[test]
fn an_attempt_from_a_known_network_comes_first() {
    let mut table = LoginTable::default();
    log_in(&mut table, 2, "203.0.113.1", NOW);
    for _ in 0..100 {
        guess(&mut table, 2, "203.0.113.1", NOW);
    }
    guess_often(&mut table, 20);
    for number in 0..100 {
        table.begin(&attempt(&format!("a{number}"), ACME, &format!("10.0.{number}.1")), NOW);
    }
    assert_eq!(table.begin(&attempt("customer", 2, "203.0.113.1"), NOW), Admission::Delayed(30));
    for number in 0..100 {
        table.begin(&attempt(&format!("b{number}"), ACME, &format!("10.1.{number}.1")), NOW);
    }
    assert!(!table.is_displaced("customer"));
}

#[test]
fn the_table_is_bounded_and_invented_names_clear_no_count() {
    let mut table = LoginTable::default();
    guess_often(&mut table, 20);
    log_in(&mut table, ACME, "203.0.113.1", NOW);
    let invented = |number: u32| {
        let address = Some(Ipv6Addr::from_bits(0x2001_0db8_u128 << 96 | u128::from(number) << 64).into());
        AttemptOrigin { id: "invented".to_owned(), address, account: u128::from(number).to_le_bytes() }
    };
    for number in 0..2000 {
        let attempt = invented(number);
        let counted = matches!(table.begin(&attempt, NOW + 1), Admission::Delayed(_));
        table.end(&attempt, counted, AttemptEnd::Failed, NOW + 1);
        // The attacker also has an account, and logs in from all its networks.
        table.learn([9; 16], attempt.network(), NOW + 1);
    }
    let text = table.text();
    let lines = text.lines().filter(|line| !line.starts_with("waits"));
    assert_eq!(lines.count(), 2 * COUNTED_LIMIT + KNOWN_LIMIT_EACH + 1);
    assert_eq!(guess(&mut table, ACME, "192.0.2.1", NOW + 1), Some(30));
    // Two subjects that replace each other in the table have delays, too.
    let delays: Vec<_> = (3000..3020).map(|number| table.begin(&invented(3000 + number % 2), NOW + 40)).collect();
    assert!(!delays.contains(&Admission::Free), "{delays:?}");
    assert!(table.knows(network("203.0.113.9")) && !table.knows(network("203.0.114.9")));
}

#[test]
fn a_full_list_of_known_networks_changes_once_a_day() {
    let mut table = LoginTable::default();
    let mut log_in_all = |count: u128, now| {
        for number in 0..count {
            table.learn(number.to_le_bytes(), network("192.0.2.1"), now);
        }
        table.text()
    };
    let text = log_in_all(KNOWN_LIMIT as u128 + 100, NOW);
    assert_eq!(text.lines().count(), KNOWN_LIMIT);
    assert!(text.len() < 1 << 20);
    assert_eq!(log_in_all(KNOWN_LIMIT as u128 + 100, NOW + 1), text);
    assert_ne!(log_in_all(KNOWN_LIMIT as u128 + 100, NOW + 86_400), text);
}

#[test]
fn a_damaged_line_is_left_out() {
    let digest = "01".repeat(16);
    let good = format!("failed {NOW} 20 network 192.0.2.0/24\nknown {NOW} 0 {digest} 203.0.113.0/24\n");
    for bad in [
        "\n",
        "failed\n",
        "failed -1 20 network 192.0.2.0/24\n",
        "failed 1 99999999999 network 192.0.2.0/24\n",
        "failed 1 20 network 192.0.2.0/24 x\n",
        "failed 1 20 account 00\n",
        "known 1 0 \u{e4} 192.0.2.0/24\n",
        "failed 1 20 network 192.0.2.0/24",
    ] {
        let (mut table, wrong) = LoginTable::parse(format!("{good}{bad}").as_bytes());
        assert_eq!((table.text(), wrong), (good.clone(), 1), "{bad}");
        assert_eq!(guess(&mut table, 7, "192.0.2.1", NOW), Some(30));
    }
    assert_eq!(LoginTable::parse(b"\0\xff\n\n").1, 2);
    // Impossible times and counts.
    let (mut table, wrong) =
        LoginTable::parse(format!("failed {} 4294967295 network 192.0.2.0/24\n", i64::MAX).as_bytes());
    assert_eq!(wrong, 0);
    assert_eq!(guess(&mut table, 7, "192.0.2.1", NOW), Some(30));
    assert_eq!(guess(&mut table, 7, "192.0.2.1", NOW + 3600), Some(1));
}
