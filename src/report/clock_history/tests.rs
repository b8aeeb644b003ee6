//! The ages of messages while the clock is set forward and back.

use super::*;

/// Day `day` of a calendar that begins on 2026-01-01.
fn day(day: i64) -> Timestamp {
    Timestamp::from_seconds(1_767_225_600 + day * DAY)
}

const YEARS: i64 = 5 * 365;

/// Looks at the clock on these days. Returns the history, which is written and read after each.
fn looks(days: &[i64]) -> ClockHistory {
    let mut history = ClockHistory::new(day(days[0]));
    for now in &days[1..] {
        history.look(day(*now));
        let read = ClockHistory::parse(&history.text());
        assert_eq!(read.as_ref(), Some(&history));
    }
    history
}

/// Each row has the days of the looks, and days of arrival with the age in days at the last look.
#[test]
fn a_clock_that_is_set_makes_no_message_older() {
    type Row = (&'static str, &'static [i64], &'static [(i64, u64)]);
    let rows: [Row; 16] = [
        ("the clock goes", &[0, 1, 2, 14], &[(0, 14), (13, 1), (14, 0)]),
        ("the machine was off, or cron looks seldom", &[0, 99], &[(0, 99), (-10, 109)]),
        ("set forward", &[10, 10 + YEARS], &[(0, 10), (9, 1), (10, 0), (10 + YEARS, 0)]),
        ("set forward, and two weeks later", &[10, 10 + YEARS, 24 + YEARS], &[(0, 24), (10 + YEARS, 14)]),
        // The time for which the clock was fast is unknown.
        ("set forward and back", &[10, 10 + YEARS, 11], &[(0, 10), (10, 0), (11, 0), (10 + YEARS, 0)]),
        ("back, and past that time again", &[10, 10 + YEARS, 11, 25], &[(0, 24), (11, 14), (10 + YEARS, 0)]),
        ("back by less", &[10, 10 + YEARS, 10 + YEARS / 2, 12 + YEARS / 2], &[(0, 12), (9, 3), (12 + YEARS / 2, 0)]),
        ("back, a month ahead", &[10, 10 + YEARS, 40], &[(0, 10), (9, 1)]),
        ("forward, then slow by 80 days", &[10, 10 + YEARS, 11, -69, 12], &[(-69, 0), (10, 0), (0, 10)]),
        ("the same at once", &[10, 10 + YEARS, -70, 12], &[(-70, 0), (10, 2), (0, 12)]),
        ("set back", &[10, 10 - YEARS], &[(0, 0), (9, 0), (10 - YEARS, 0)]),
        ("set back and forward", &[10, 10 - YEARS, 11], &[(0, 11), (10, 1), (10 - YEARS, 0)]),
        ("both, and two weeks later", &[10, 10 - YEARS, 11, 25], &[(0, 25), (10, 15), (10 - YEARS, 14)]),
        ("set back by a month and forward", &[40, 10, 41], &[(39, 2), (10, 0), (41, 0)]),
        ("set forward twice", &[0, YEARS, 1 + YEARS, 1 + 2 * YEARS], &[(0, 1), (YEARS, 1), (1 + 2 * YEARS, 0)]),
        ("set forward while the machine was off, and back", &[0, YEARS, 3, 4], &[(0, 1), (3, 1), (YEARS, 0)]),
    ];
    for (what, days, messages) in rows {
        let history = looks(days);
        for (arrived, age) in messages {
            assert_eq!(history.age(day(*arrived)).as_secs() / 86_400, *age, "{what}: {arrived}");
        }
    }
}

#[test]
fn the_history_of_a_clock_without_a_battery_stays_short() {
    let days: Vec<_> = (0..100).flat_map(|boot| [-20_000, boot]).collect();
    let history = looks(&days);
    assert!(history.text().lines().count() <= 2, "{}", history.text());
    assert_eq!(history.age(day(90)).as_secs() / 86_400, 9);
    let days: Vec<_> = (0..100).map(|jump| jump * 101).collect();
    assert_eq!(looks(&days).jumps.len(), JUMPS_LIMIT);
}

#[test]
fn a_step_is_reported_if_the_clock_was_set() {
    let mut history = ClockHistory::new(day(0));
    let hour = |hours: i64| Timestamp::from_seconds(day(0).seconds() + hours * 3600);
    for (now, step) in [
        (hour(1), ClockStep::Passed),
        (hour(0), ClockStep::Passed),
        (day(100), ClockStep::Passed),
        (day(201), ClockStep::SetFrom(day(100))),
        (day(190), ClockStep::SetFrom(day(201))),
        (day(191), ClockStep::Passed),
        (day(202), ClockStep::SetFrom(day(191))),
    ] {
        assert_eq!(history.look(now), step, "{now:?}");
    }
}

/// No order of clocks that are wrong by more than 100 days makes a message older than it is.
#[test]
fn no_order_of_steps_makes_a_message_older() {
    const WRONG: [i64; 8] = [0, 0, YEARS, 3 * 365, -YEARS, -300, 200, -2 * YEARS];
    let mut random = 1u64;
    let mut choose = |limit: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        i64::try_from((random >> 33) % limit).unwrap()
    };
    for _ in 0..3000 {
        let (mut truth, mut history, mut messages) = (0, ClockHistory::new(day(0)), Vec::new());
        let mut steps = Vec::new();
        let mut wrong = 0;
        for _ in 0..12 {
            let passed = choose(20);
            truth += passed;
            let next = WRONG[usize::try_from(choose(8)).unwrap()];
            wrong = if choose(2) == 0 { wrong } else { next };
            steps.push((truth, wrong));
            history.look(day(truth + wrong));
            for (arrived, stated) in &messages {
                let stated = day(*stated);
                let age = i64::try_from(history.age(stated).as_secs()).unwrap() / DAY;
                assert!(age <= truth - arrived, "{steps:?}: {arrived} {stated:?} is {age} old\n{}", history.text());
            }
            messages.push((truth, truth + wrong));
        }
    }
}

#[test]
fn a_damaged_file_is_ignored() {
    for text in ["", "seen=", "seen=yesterday\n", "latest=2026-01-01T00:00:00Z\n", "\0\0\0"] {
        assert_eq!(ClockHistory::parse(text), None, "{text}");
    }
    let text = "seen=2026-01-02T00:00:00Z\njump=2026-01-01T00:00:00Z\njump=2031-01-01T00:00:00Z 2026-01-01T00:00:00Z\n\
                jump=2026-01-01T00:00:00Z 2031-01-01T00:00:00Z\n";
    assert_eq!(ClockHistory::parse(text), Some(ClockHistory::new(day(1))));
}
