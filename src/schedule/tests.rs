//! Tests of schedules on a simulated machine, and of timetables against a scan of all minutes.

use super::*;
use crate::clock::Zone;
use crate::config::parse_schedule;
use proptest::prelude::*;
use std::cmp::Ordering;
use std::path::Path;
use std::sync::OnceLock;

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(60 * 60);

fn schedule(text: &str) -> Schedule {
    parse_schedule(text).unwrap_or_else(|error| panic!("{text}\n{error}"))
}

/// Both clocks of a machine.
struct Machine(Clocks);

impl Machine {
    fn at(text: &str) -> Machine {
        Machine(Clocks { date: Timestamp::parse_rfc3339(text).unwrap(), ticks: 1000 * HOUR })
    }

    fn passes(&mut self, time: Duration) -> Clocks {
        self.set(seconds(time));
        self.0.ticks += time;
        self.0
    }

    /// Sets the time of day, or lets the machine sleep while the ticks stop.
    fn set(&mut self, seconds: i64) -> Clocks {
        self.0.date = Timestamp::from_seconds(self.0.date.seconds() + seconds);
        self.0
    }

    fn calls(&mut self, timer: &mut CallTimer, time: Duration, success: bool) {
        self.ends(timer, time, if success { CallOutcome::Success } else { CallOutcome::Failure });
    }

    fn ends(&mut self, timer: &mut CallTimer, time: Duration, outcome: CallOutcome) {
        let begun = self.0;
        let ended = self.passes(time);
        timer.call_ended(begun, ended, outcome, 1);
    }

    /// Waits as the daemon does.
    fn waits(&mut self, timer: &CallTimer) -> String {
        loop {
            match timer.time_left(self.0) {
                Duration::ZERO => return self.0.date.rfc3339(),
                left => self.passes(left.min(MINUTE)),
            };
        }
    }
}

fn timer(text: &str, machine: &Machine) -> CallTimer {
    CallTimer::new(&schedule(text), machine.0, 1)
}

/// Each file of `testdata/schedule` has the keys of `[schedule]`, and all calls of one day.
#[test]
fn the_calls_of_whole_days_are_those_of_the_files() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/schedule");
    let mut files: Vec<_> = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert_eq!(files.len(), 5);
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        let lines = || text.lines().filter(|line| !line.starts_with('#'));
        let value = |key: &str| lines().find_map(|line| line.strip_prefix(key)).unwrap();
        let table: Vec<&str> = lines().take_while(|line| !line.is_empty()).collect();
        let day = value("day = ").trim_matches('"');
        let table = table.join("\n").replace(&format!("day = \"{day}\""), "jitter = \"none\"");
        let wanted: Vec<&str> = lines().skip_while(|line| !line.is_empty()).skip(1).collect();
        let zone = Zone::parse(value("zone = ").trim_matches('"')).unwrap();
        assert_eq!(a_day_of_calls(&table, &zone, day), wanted, "{}", file.display());
    }
}

/// The calls of a daemon that started the day before, as local time to the minute.
fn a_day_of_calls(table: &str, zone: &Zone, day: &str) -> Vec<String> {
    let mut machine = Machine::at(&format!("{day}T00:00:00Z"));
    machine.set(-24 * 60 * 60);
    let mut timer = timer(table, &machine);
    let mut calls = Vec::new();
    loop {
        machine.waits(&timer);
        let shown = zone.rfc3339(machine.0.date);
        machine.calls(&mut timer, 10 * SECOND, true);
        assert_eq!(&shown[16..19], ":00", "a call begins with the minute");
        match shown[..10].cmp(day) {
            Ordering::Less => {}
            Ordering::Equal => calls.push(format!("{}{}", &shown[..16], &shown[19..])),
            Ordering::Greater => return calls,
        }
    }
}

#[test]
fn with_every_the_first_call_is_at_once_and_the_next_counts_from_its_start() {
    let mut machine = Machine::at("2026-01-02T03:04:05Z");
    let mut timer = timer("every = \"15m\"\njitter = \"none\"", &machine);
    assert_eq!(timer.time_left(machine.0), Duration::ZERO);
    machine.calls(&mut timer, MINUTE, true);
    assert_eq!(timer.time_left(machine.0), 14 * MINUTE);
    assert_eq!(timer.next_call(machine.0).rfc3339(), "2026-01-02T03:19:05Z");
    // With `every`, the time of day does not count.
    assert_eq!(timer.time_left(machine.set(10_000)), 14 * MINUTE);
    machine.passes(14 * MINUTE);
    machine.calls(&mut timer, HOUR, true);
    assert_eq!(timer.time_left(machine.0), Duration::ZERO, "at once after one that took longer");
}

/// The schedule continues, and growing pauses add calls to it: there are not too many calls, and other mail is not
/// delayed.
#[test]
fn after_mail_was_deferred_the_next_call_is_after_a_pause_or_by_the_schedule() {
    let mut machine = Machine::at("2026-01-02T00:00:00Z");
    let mut timer = timer("every = \"15m\"\njitter = \"none\"\nretry-first = \"1m\"\nretry-max = \"1h\"", &machine);
    let mut calls = Vec::new();
    for _ in 0..7 {
        calls.push(machine.waits(&timer)[14..16].to_owned());
        machine.ends(&mut timer, SECOND, CallOutcome::Deferred);
    }
    assert_eq!(calls, ["00", "01", "03", "07", "15", "30", "45"]);
    // A failure now has the pause of an eighth failure, whatever the schedule; a success resets the pauses.
    machine.waits(&timer);
    machine.ends(&mut timer, SECOND, CallOutcome::Failure);
    assert!(timer.time_left(machine.0) >= HOUR);
    machine.waits(&timer);
    machine.ends(&mut timer, SECOND, CallOutcome::Success);
    assert_eq!(timer.time_left(machine.0), 15 * MINUTE - SECOND);
    machine.waits(&timer);
    machine.ends(&mut timer, SECOND, CallOutcome::Deferred);
    assert_eq!(timer.time_left(machine.0).as_secs(), 60);
}

#[test]
fn with_at_deferred_mail_adds_calls_to_the_timetable() {
    let mut machine = Machine::at("2026-01-02T08:00:00Z");
    let mut timer = timer("at = [\"* 09:30\"]\nzone = \"UTC\"\njitter = \"none\"\nretry-first = \"20m\"", &machine);
    machine.waits(&timer);
    let mut calls = Vec::new();
    for _ in 0..3 {
        machine.ends(&mut timer, SECOND, CallOutcome::Deferred);
        calls.push(machine.waits(&timer)[11..16].to_owned());
    }
    assert_eq!(calls, ["09:50", "10:30", "11:30"]);
    machine.ends(&mut timer, SECOND, CallOutcome::Success);
    assert_eq!(machine.waits(&timer), "2026-01-03T09:30:00Z");
}

#[test]
fn the_jitter_is_drawn_once_for_each_call_within_its_limit() {
    let machine = Machine::at("2026-01-02T03:04:05Z");
    // One of three milliseconds, 0 to 2.
    let mut drawn = Vec::new();
    let mut timer = timer("every = \"15m\"\njitter = \"2ms\"", &machine);
    for chance in 2..6 {
        timer.call_ended(machine.0, machine.0, CallOutcome::Success, chance);
        assert_eq!(timer.time_left(machine.0), timer.time_left(machine.0));
        drawn.push((timer.time_left(machine.0) - 15 * MINUTE).as_millis());
    }
    assert_eq!(drawn, [2, 0, 1, 2]);
}

#[test]
fn with_at_a_call_is_late_by_its_jitter() {
    let mut machine = Machine::at("2026-01-02T08:04:58Z");
    let timer = timer("at = [\"* every 5m\"]\nzone = \"UTC\"", &machine);
    let jitter = Duration::from_millis(1);
    assert_eq!(timer.time_left(machine.0), 2 * SECOND + jitter);
    assert_eq!(timer.time_left(machine.set(2)), jitter);
    assert_eq!(timer.time_left(machine.set(1)), Duration::ZERO);
    assert_eq!(timer.next_call(machine.0), machine.0.date);
}

#[test]
fn with_at_missed_calls_are_skipped() {
    let mut machine = Machine::at("2026-01-02T08:01:00Z");
    let table = "at = [\"* every 5m\"]\nzone = \"UTC\"\njitter = \"none\"";
    let mut timer = timer(table, &machine);
    assert_eq!(machine.waits(&timer), "2026-01-02T08:05:00Z");
    machine.calls(&mut timer, 7 * MINUTE, true);
    assert_eq!(machine.waits(&timer), "2026-01-02T08:15:00Z", "08:10 passed during the call");
    machine.calls(&mut timer, SECOND, true);
    machine.passes(2 * MINUTE);
    machine.set(5 * 60 * 60);
    assert_eq!(machine.0.date.rfc3339(), "2026-01-02T13:17:01Z");
    assert_eq!(machine.waits(&timer), "2026-01-02T13:20:00Z", "those during the night's sleep are skipped");
}

#[test]
fn with_at_a_caller_that_asks_late_misses_no_call() {
    let mut machine = Machine::at("2026-01-02T08:01:00Z");
    let timer = timer("at = [\"sun 03:30\"]\nzone = \"UTC\"", &machine);
    assert_eq!(timer.next_call(machine.0).rfc3339(), "2026-01-04T03:30:01Z");
    machine.passes(48 * HOUR);
    assert_eq!(timer.time_left(machine.0), Duration::ZERO);
}

#[test]
fn with_at_the_time_of_day_counts_if_the_clock_is_set() {
    let table = "at = [\"* 08:30,09:30,10:30\"]\nzone = \"UTC\"\njitter = \"none\"";
    let check = |set: i64, next: &str| {
        let mut machine = Machine::at("2026-01-02T08:20:00Z");
        let mut timer = timer(table, &machine);
        machine.waits(&timer);
        machine.calls(&mut timer, SECOND, true);
        machine.passes(5 * MINUTE);
        machine.set(set);
        assert_eq!(machine.waits(&timer), format!("2026-01-02T{next}:00Z"), "{set}");
    };
    check(0, "09:30");
    check(30, "09:30");
    check(-30 * 60, "08:30");
    check(-2 * 60 * 60, "08:30");
    check(30 * 60, "09:30");
    check(60 * 60, "10:30");
    // The clock is set back a little during the call: its moment does not come a second time.
    let mut machine = Machine::at("2026-01-02T08:30:00Z");
    let mut timer = timer(table, &machine);
    let begun = machine.0;
    machine.set(-20);
    timer.call_ended(begun, machine.0, CallOutcome::Success, 1);
    assert_eq!(machine.waits(&timer), "2026-01-02T09:30:00Z");
}

#[test]
fn a_call_that_was_due_just_before_the_machine_woke_is_made() {
    let mut machine = Machine::at("2026-01-02T08:00:00Z");
    let timer = timer("at = [\"* 09:30\"]\nzone = \"UTC\"\njitter = \"none\"", &machine);
    machine.passes(30 * MINUTE);
    machine.set(60 * 60);
    assert_eq!(timer.time_left(machine.passes(MINUTE)), Duration::ZERO, "09:31");
    assert_eq!(timer.next_call(machine.passes(2 * MINUTE)).rfc3339(), "2026-01-03T09:30:00Z");
}

#[test]
fn failures_make_growing_pauses_with_any_schedule() {
    for table in ["every = \"15m\"", "at = [\"sun 03:30\"]\nzone = \"UTC\""] {
        let mut machine = Machine::at("2026-01-02T03:04:05Z");
        let mut timer = timer(&format!("{table}\nretry-max = \"5m\""), &machine);
        for minutes in [1, 2, 4, 5, 5] {
            machine.calls(&mut timer, 10 * SECOND, false);
            let pause = timer.time_left(machine.0);
            assert!(pause >= minutes * MINUTE && pause <= minutes * MINUTE * 11 / 10, "{pause:?}");
            machine.passes(pause);
        }
        machine.calls(&mut timer, Duration::ZERO, true);
        assert!(timer.time_left(machine.0) >= 15 * MINUTE, "by the schedule again");
        machine.calls(&mut timer, Duration::ZERO, false);
        assert!(timer.time_left(machine.0) < 2 * MINUTE, "from the beginning again");
    }
}

#[test]
fn when_the_network_is_back_the_pause_ends() {
    let mut machine = Machine::at("2026-01-02T03:04:05Z");
    let mut timer = timer("every = \"15m\"", &machine);
    machine.calls(&mut timer, SECOND, true);
    let left = timer.time_left(machine.0);
    timer.network_is_back(machine.0);
    assert_eq!(timer.time_left(machine.0), left, "there was no pause");
    machine.calls(&mut timer, SECOND, false);
    machine.calls(&mut timer, SECOND, false);
    assert!(timer.time_left(machine.0) >= 2 * MINUTE);
    timer.network_is_back(machine.passes(SECOND));
    assert_eq!(timer.time_left(machine.0), Duration::ZERO);
    machine.calls(&mut timer, SECOND, false);
    assert!(timer.time_left(machine.0) >= 4 * MINUTE, "the pauses grow, as the network may come back all the time");
}

#[test]
fn at_the_end_of_the_calendar_there_is_no_call_and_no_panic() {
    for date in [Timestamp::from_seconds(i64::MIN), Timestamp::from_seconds(i64::MAX)] {
        let mut machine = Machine(Clocks { date, ticks: Duration::ZERO });
        let mut timer = timer("at = [\"* 02:30\", \"mon every 7h\"]\nzone = \"UTC\"", &machine);
        let _ = timer.next_call(machine.0);
        machine.calls(&mut timer, SECOND, true);
        let _ = timer.next_call(machine.0);
    }
}

#[test]
fn the_clock_may_change_over_midnight() {
    let check = |zone: &str, rules: &str, day: &str, wanted: &[&str]| {
        let schedule = schedule(&format!("at = {rules}\nzone = {zone:?}"));
        let When::At(timetable) = schedule.when else { panic!("a timetable") };
        let noon = Timestamp::parse_rfc3339(&format!("{day}T12:00:00Z")).unwrap();
        let next = |after: &Timestamp| Some(first_after(&timetable, *after));
        let calls = successors(next(&noon), next).map(|call| timetable.zone.rfc3339(call));
        assert_eq!(calls.take(wanted.len()).collect::<Vec<_>>(), wanted);
    };
    // At 00:30 of Sunday it is 23:30 of Saturday again.
    let rules = "[\"sat 23:00-24:00 every 20m\", \"sun 00:00-00:45 every 20m\", \"sat 23:45\", \"sun 00:10\"]";
    check(
        "AAA0BBB,M3.5.0/23:45,M10.5.0/0:30",
        rules,
        "2026-10-24",
        &[
            "2026-10-24T23:00:00+01:00",
            "2026-10-24T23:20:00+01:00",
            "2026-10-24T23:40:00+01:00",
            "2026-10-24T23:45:00+01:00",
            "2026-10-25T00:00:00+01:00",
            "2026-10-25T00:10:00+01:00",
            "2026-10-25T00:20:00+01:00",
            "2026-10-24T23:40:00+00:00",
            "2026-10-25T00:00:00+00:00",
            "2026-10-25T00:20:00+00:00",
            "2026-10-25T00:40:00+00:00",
            "2026-10-31T23:00:00+00:00",
        ],
    );
    // At 23:45 of Sunday it is 00:45 of Monday.
    check(
        "AAA0BBB,M3.5.0/23:45,M10.5.0/0:30",
        "[\"sun 23:50\", \"mon 00:30,00:50\"]",
        "2026-03-29",
        &["2026-03-30T00:45:00+01:00", "2026-03-30T00:50:00+01:00", "2026-04-05T23:50:00+01:00"],
    );
    // The skipped hour has all of a weekly window: the next one is after a week.
    check(
        "CET-1CEST,M3.5.0,M10.5.0/3",
        "[\"sun 02:00-03:00 every 50m\"]",
        "2026-03-22",
        &["2026-04-05T02:00:00+02:00", "2026-04-05T02:50:00+02:00"],
    );
}

/// Zones whose clocks change by an hour or by half an hour, in the night, at midnight or over midnight.
const ZONES: [&str; 5] = [
    "CET-1CEST,M3.5.0,M10.5.0/3",
    "<-03>3<-02>,M10.3.0/0,M2.3.0/0",
    "<+1030>-10:30<+11>-11,M10.1.0,M4.1.0",
    "CST5CDT,M3.2.0/0,M11.1.0/1",
    "AAA0BBB,M3.5.0/23:45,M10.5.0/0:30",
];

/// Two days on which the clock changes in each of them, counted from 2026-01-01.
const CHANGES: [[i64; 2]; 5] = [[87, 297], [290, 45], [276, 94], [66, 304], [87, 297]];

/// The time that the clock shows in one minute.
struct Shown {
    moment: Timestamp,
    text: String,
    weekday: usize,
    /// No earlier minute showed the same time.
    first: bool,
}

/// All minutes of ten days, from the day before the change on.
fn minutes_shown(zone: usize, change: usize) -> &'static [Shown] {
    static SHOWN: [[OnceLock<Vec<Shown>>; 2]; 5] = [const { [const { OnceLock::new() }; 2] }; 5];
    SHOWN[zone][change].get_or_init(|| {
        let year = Timestamp::parse_rfc3339("2026-01-01T00:00:00Z").unwrap();
        let from = year.seconds() + (CHANGES[zone][change] - 1) * 24 * 60 * 60;
        let zone = Zone::parse(ZONES[zone]).unwrap();
        let mut shown: Vec<Shown> = Vec::new();
        for minute in 0..10 * 24 * 60 {
            let moment = Timestamp::from_seconds(from + 60 * minute);
            let text = zone.rfc3339(moment)[..16].to_owned();
            let recent = &shown[shown.len().saturating_sub(120)..];
            let first = recent.iter().all(|other| other.text != text);
            shown.push(Shown { moment, text, weekday: zone.day(moment).weekday(), first });
        }
        shown
    })
}

/// The opposite of the module's approach: whether a call is due in this minute.
fn is_call(timetable: &Timetable, shown: &[Shown], at: usize) -> bool {
    let Shown { text, weekday, first, .. } = &shown[at];
    let minute = |text: &str| text[11..13].parse::<u16>().unwrap() * 60 + text[14..16].parse::<u16>().unwrap();
    timetable.entries.iter().any(|entry| match &entry.times {
        Times::Every { from, to, step } => {
            let minute = minute(text);
            entry.days[*weekday] && (*from..*to).contains(&minute) && (minute - from).is_multiple_of(*step)
        }
        Times::At(minutes) => {
            let shown_now = entry.days[*weekday] && *first && minutes.contains(&minute(text));
            let Some(Shown { text: before, weekday: day_before, .. }) = at.checked_sub(1).map(|before| &shown[before])
            else {
                return shown_now;
            };
            // The times that the clock skipped between the last minute and this one.
            let left_out = |minutes_of_day: &u16| match before[..10].cmp(&text[..10]) {
                _ if before >= text => false,
                Ordering::Equal => entry.days[*weekday] && (minute(before) + 1..minute(text)).contains(minutes_of_day),
                _ => {
                    (entry.days[*day_before] && *minutes_of_day > minute(before))
                        || (entry.days[*weekday] && *minutes_of_day < minute(text))
                }
            };
            shown_now || minutes.iter().any(left_out)
        }
    })
}

fn rule() -> impl Strategy<Value = String> {
    let days = prop_oneof![Just("*"), Just("sun"), Just("sat-mon"), Just("fri,sun"), Just("tue-thu")];
    // Most minutes are near the changes of the clock.
    let minute = prop_oneof![0..240_u16, 1380..1440_u16, 0..1440_u16];
    let clock = |minute: u16| format!("{:02}:{:02}", minute / 60, minute % 60);
    let times = prop_oneof![
        prop::collection::btree_set(minute.clone(), 1..4).prop_map(move |set| set
            .into_iter()
            .map(clock)
            .collect::<Vec<_>>()
            .join(",")),
        (minute, 2..600_u16, 1..120_u16).prop_map(move |(from, length, step)| {
            let to = (from + length).min(1440).max(from + 1);
            format!("{}-{} every {step}m", clock(from), clock(to))
        }),
        (1..1440_u16).prop_map(|step| format!("every {step}m")),
    ];
    (days, times).prop_map(|(days, times)| format!("{days} {times}"))
}

proptest! {
    #[test]
    fn the_next_call_is_the_first_that_a_scan_of_all_minutes_finds(
        rules in prop::collection::vec(rule(), 1..4),
        (zone, change) in (0..ZONES.len(), 0..2_usize),
        second in 0..2 * 24 * 60 * 60_i64,
    ) {
        let table = format!("at = {rules:?}\nzone = {:?}\njitter = \"none\"", ZONES[zone]);
        // The parser rejects a window that is not longer than its step.
        let Ok(schedule) = parse_schedule(&table) else { return Ok(()) };
        let When::At(timetable) = schedule.when else { unreachable!() };
        let shown = minutes_shown(zone, change);
        let after = Timestamp::from_seconds(shown[12 * 60].moment.seconds() + second);
        let wanted = (0..shown.len()).find(|&at| shown[at].moment > after && is_call(&timetable, shown, at));
        let found = first_after(&timetable, after);
        match wanted {
            Some(at) => prop_assert_eq!(timetable.zone.rfc3339(found), timetable.zone.rfc3339(shown[at].moment)),
            None => prop_assert!(found > shown[shown.len() - 1].moment),
        }
    }
}
