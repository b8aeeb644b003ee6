//! `[schedule]`: reads when `pull --daemon` calls. [`crate::schedule`] computes the moments.
//!
//! ```text
//! entry of `at`    DAYS TIMES | DAYS FROM-TO every STEP | DAYS every STEP
//! DAYS             * | mon,wed,fri-sun       ranges may go over the weekend: fri-mon
//! TIMES            08:00,12:30
//! FROM-TO          08:00-18:00               without the moment TO itself; 24:00 may end it
//! STEP             5m | 1h                   whole minutes, shorter than the window
//! ```
//!
//! An entry that is ambiguous, or never applies, is rejected.

use std::time::Duration;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use super::value::{Checked, Parse};
use crate::clock::Zone;
use crate::schedule::{Schedule, Times, Timetable, TimetableEntry, When};

/// `[schedule]`, or a provider's own.
#[derive(Deserialize, Default)]
#[serde(try_from = "RawSchedule")]
pub(super) struct ScheduleTable(pub(super) Schedule);

/// Minutes of a day.
const DAY: u16 = 24 * 60;

const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];

impl TryFrom<RawSchedule> for ScheduleTable {
    type Error = String;

    fn try_from(raw: RawSchedule) -> Result<ScheduleTable, String> {
        let default = Schedule::default();
        let every = raw.every.map(|every| every.0);
        let when = match (every, raw.at) {
            (Some(_), Some(_)) => {
                return Err("`every` and `at` exclude each other: take one of the two out, and for both say it in \
                            `at`, such as at = [\"* every 15m\", \"mon-fri 08:00,12:30\"]"
                    .to_owned());
            }
            (None, Some(rules)) => {
                let zone = raw.zone.map_or_else(Zone::system, |zone| zone.0);
                When::At(Timetable { entries: rules.0, zone })
            }
            (every, None) if raw.zone.is_none() => every.map_or(default.when, When::Every),
            (_, None) => {
                return Err("`zone` is for `at`, and there is none: add `at`, or take `zone` out".to_owned());
            }
        };
        let retry_max = raw.retry_max.map(|time| time.0);
        let retry_first = raw.retry_first.map_or_else(
            || [Some(default.retry_first), every, retry_max].into_iter().flatten().min().unwrap_or_default(),
            |time| time.0,
        );
        let retry_max = retry_max.unwrap_or(default.retry_max.max(retry_first));
        if retry_first > retry_max {
            return Err("`retry-first` must not be longer than `retry-max`: write less for the one, or more for the \
                        other"
                .to_owned());
        }
        let step = when.shortest_step();
        let jitter = raw.jitter.map_or_else(|| when.default_jitter(), |jitter| jitter.0.0);
        if step.is_some_and(|step| jitter >= step) {
            return Err("`jitter` must be shorter than `every`, and than each step of `at`, or calls would fall on \
                        each other: write less, or \"none\""
                .to_owned());
        }
        Ok(ScheduleTable(Schedule { when, jitter, retry_first, retry_max }))
    }
}

impl Parse for TimetableEntry {
    const EXPECTED: &'static str = "a time to call such as \"mon-fri 08:00,12:30\"";

    fn parse(text: &str) -> Result<TimetableEntry, String> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let (days, times) = match words[..] {
            [days, "every", step] => (days, window("00:00-24:00", step)),
            [days, window_of_day, "every", step] => (days, window(window_of_day, step)),
            [days, times] => (days, list(times)),
            _ => {
                return Err(format!(
                    "{text:?} is no time to call: write DAYS TIMES, DAYS FROM-TO every STEP, or DAYS every STEP, such \
                     as \"mon,wed 08:00,12:30\", \"mon-fri 08:00-18:00 every 5m\" or \"* every 1h\""
                ));
            }
        };
        Ok(TimetableEntry { days: parse_days(days)?, times: times? })
    }
}

fn parse_days(text: &str) -> Result<[bool; 7], String> {
    if text == "*" {
        return Ok([true; 7]);
    }
    let mut days = [false; 7];
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (from, to) = (day(first)?, day(last)?);
        if from == to && part.contains('-') {
            return Err(format!("{part:?} may be one day or all: write \"{first}\", or \"*\" for all"));
        }
        let count = (to + 7 - from) % 7;
        for number in (from..=from + count).map(|number| number % 7) {
            if std::mem::replace(&mut days[number], true) {
                return Err(format!("{} stands twice in {text:?}: write each day once", DAYS[number]));
            }
        }
    }
    Ok(days)
}

/// The number of a day of the week; 0 is Monday.
fn day(text: &str) -> Result<usize, String> {
    DAYS.iter().position(|day| day.eq_ignore_ascii_case(text)).ok_or_else(|| {
        format!(
            "{text:?} is no day: write mon, tue, wed, thu, fri, sat or sun, several with commas and hyphens as in \
             \"mon,wed,fri-sun\", or \"*\" alone for all"
        )
    })
}

fn list(text: &str) -> Result<Times, String> {
    if text.contains('-') {
        return Err(format!("{text:?} does not say how often: write \"{text} every 5m\", or times such as \"08:00\""));
    }
    let mut minutes = Vec::new();
    for part in text.split(',') {
        let minute = start(part)?;
        if minutes.contains(&minute) {
            return Err(format!("{part} stands twice in {text:?}: write each time once"));
        }
        minutes.push(minute);
    }
    Ok(Times::At(minutes))
}

fn window(text: &str, step: &str) -> Result<Times, String> {
    let Some((first, last)) = text.split_once('-') else {
        return Err(format!(
            "{text:?} is no window: write FROM-TO before `every`, such as \"08:00-18:00\", or nothing for the whole day"
        ));
    };
    let (from, to) = (start(first)?, minute(last)?);
    if to == 0 {
        return Err(format!("{text:?} ends before it begins: write \"{first}-24:00\" for up to the end of the day"));
    }
    if from == to {
        return Err(format!("{text:?} is empty: write \"{first}\" without `every` for one call, or a later end"));
    }
    if from > to {
        return Err(format!(
            "{text:?} goes over midnight: write two entries, \"{first}-24:00\", and \"00:00-{last}\" for the days after"
        ));
    }
    let length = to - from;
    let step = match parse_step(step)? {
        minutes if minutes < length => minutes,
        _ => {
            return Err(format!(
                "{step:?} is not shorter than the window {text:?}: write \"{first}\" without `every` for one call, or \
                 a shorter step"
            ));
        }
    };
    Ok(Times::Every { from, to, step })
}

/// A step in minutes, up to a day.
fn parse_step(text: &str) -> Result<u16, String> {
    let step = Duration::parse(text)?.as_millis();
    let minutes = u16::try_from(step / 60_000).ok().filter(|minutes| *minutes <= DAY && step % 60_000 == 0);
    minutes.ok_or_else(|| format!("{text:?} is no step: write whole minutes from 1m to 24h, such as \"5m\" or \"1h\""))
}

/// A minute of a day in which a call can begin, up to 1439.
fn start(text: &str) -> Result<u16, String> {
    match minute(text)? {
        DAY => Err("24:00 is the end of a day, where nothing begins: write 00:00, and the day after".to_owned()),
        minute => Ok(minute),
    }
}

/// A minute of a day, up to 1440.
fn minute(text: &str) -> Result<u16, String> {
    let digits = |tens: u8, ones: u8| u16::from(tens - b'0') * 10 + u16::from(ones - b'0');
    let minute = match *text.as_bytes() {
        [a, b, b':', c, d] if [a, b, c, d].iter().all(u8::is_ascii_digit) => {
            let (hour, minute) = (digits(a, b), digits(c, d));
            Some(hour * 60 + minute).filter(|all| minute < 60 && *all <= DAY)
        }
        _ => None,
    };
    minute.ok_or_else(|| {
        format!("{text:?} is no time of day: write two digits each, from \"00:00\" to \"23:59\", such as \"08:00\"")
    })
}

impl Parse for Zone {
    const EXPECTED: &'static str = "a time zone such as \"Europe/Berlin\"";

    fn parse(text: &str) -> Result<Zone, String> {
        Zone::parse(text).ok_or_else(|| {
            format!(
                "{text:?} is no time zone that this machine knows: write a name from /usr/share/zoneinfo such as \
                 \"Europe/Berlin\", or its rule as POSIX has it, such as \"CET-1CEST,M3.5.0,M10.5.0/3\", or take \
                 `zone` out for this machine's own"
            )
        })
    }
}

/// A time, or `none`.
struct Jitter(Duration);

impl Parse for Jitter {
    const EXPECTED: &'static str = "a time such as \"30s\", or \"none\"";

    fn parse(text: &str) -> Result<Jitter, String> {
        match text {
            "none" => Ok(Jitter(Duration::ZERO)),
            time => Duration::parse(time).map(Jitter).map_err(|text| format!("{text}, or \"none\"")),
        }
    }
}

// The table as it is written.

#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields, expecting = "a table", rename_all = "kebab-case")]
struct RawSchedule {
    every: Option<Checked<Duration>>,
    at: Option<Rules>,
    zone: Option<Checked<Zone>>,
    jitter: Option<Checked<Jitter>>,
    retry_first: Option<Checked<Duration>>,
    retry_max: Option<Checked<Duration>>,
}

struct Rules(Vec<TimetableEntry>);

impl<'de> Deserialize<'de> for Rules {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Rules, D::Error> {
        let rules: Vec<Checked<TimetableEntry>> = Vec::deserialize(deserializer)?;
        if rules.is_empty() {
            let text = "`at` is empty, and no call would ever be made: write a time to call, such as \"* every 1h\", \
                        or take it out for a call every 15m";
            return Err(D::Error::custom(text));
        }
        Ok(Rules(rules.into_iter().map(|rule| rule.0).collect()))
    }
}

/// Reads the keys of a `[schedule]`.
#[cfg(test)]
pub(crate) fn parse(text: &str) -> Result<Schedule, toml::de::Error> {
    toml::from_str(text).map(|table: ScheduleTable| table.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn rule(days: [u8; 7], times: Times) -> TimetableEntry {
        TimetableEntry { days: days.map(|day| day == 1), times }
    }

    #[test]
    fn entries_are_read() {
        let check =
            |text: &str, days, times: Times| assert_eq!(TimetableEntry::parse(text), Ok(rule(days, times)), "{text}");
        let all = [1; 7];
        check("sun 03:30", [0, 0, 0, 0, 0, 0, 1], Times::At(vec![210]));
        check("MON,Wed  23:59,00:00", [1, 0, 1, 0, 0, 0, 0], Times::At(vec![1439, 0]));
        check("fri-mon 12:00", [1, 0, 0, 0, 1, 1, 1], Times::At(vec![720]));
        check("mon,wed,fri-sun 12:00", [1, 0, 1, 0, 1, 1, 1], Times::At(vec![720]));
        check("sun-sat 12:00", all, Times::At(vec![720]));
        check(
            " mon-fri   08:00-18:00 every  5m ",
            [1, 1, 1, 1, 1, 0, 0],
            Times::Every { from: 480, to: 1080, step: 5 },
        );
        check("* 08:00-08:02 every 1m", all, Times::Every { from: 480, to: 482, step: 1 });
        check("* 22:00-24:00 every 60s", all, Times::Every { from: 1320, to: 1440, step: 1 });
        check("* every 1h", all, Times::Every { from: 0, to: 1440, step: 60 });
        check("* every 7h", all, Times::Every { from: 0, to: 1440, step: 420 });
    }

    #[test]
    #[rustfmt::skip]
    fn entries_that_say_nothing_or_two_things_are_refused_with_the_way_out() {
        let check = |text: &str, wrong: &str, way_out: &str| {
            let said = TimetableEntry::parse(text).expect_err(text);
            assert!(said.contains(wrong) && said.contains(way_out), "\nwanted: {wrong} … {way_out}\n   got: {said}");
        };
        check("", "is no time to call", "write DAYS TIMES, DAYS FROM-TO every STEP, or DAYS every STEP");
        check("mon", "is no time to call", "\"* every 1h\"");
        check("08:00", "is no time to call", "\"mon,wed 08:00,12:30\"");
        check("mon 08:00 - 18:00 every 5m", "is no time to call", "\"mon-fri 08:00-18:00 every 5m\"");
        check("mon 08:00 12:00", "is no time to call", "\"mon,wed 08:00,12:30\"");
        check("mon wed 08:00 every 5m", "is no time to call", "DAYS FROM-TO every STEP");
        check("monday 08:00", "\"monday\" is no day", "write mon, tue, wed");
        check("08:00 mon", "\"08:00\" is no day", "write mon, tue, wed");
        check("*,mon 08:00", "\"*\" is no day", "\"*\" alone for all");
        check("mon, 08:00", "\"\" is no day", "write mon, tue, wed");
        check("mon-wed-fri 08:00", "\"wed-fri\" is no day", "with commas and hyphens");
        check("mon-mon 08:00", "\"mon-mon\" may be one day or all", "write \"mon\", or \"*\"");
        check("mon,tue,mon 08:00", "mon stands twice in \"mon,tue,mon\"", "write each day once");
        check("sat-tue,mon 08:00", "mon stands twice", "write each day once");
        check("mon 8:00", "\"8:00\" is no time of day", "such as \"08:00\"");
        check("mon 08:60", "\"08:60\" is no time of day", "from \"00:00\" to \"23:59\"");
        check("mon 24:01", "\"24:01\" is no time of day", "from \"00:00\" to \"23:59\"");
        check("mon +8:00", "\"+8:00\" is no time of day", "two digits each");
        check("mon 08:00,", "\"\" is no time of day", "two digits each");
        check("mon 24:00", "24:00 is the end of a day", "write 00:00, and the day after");
        check("mon 08:00,09:00,08:00", "08:00 stands twice", "write each time once");
        check("mon 08:00-18:00", "does not say how often", "write \"08:00-18:00 every 5m\"");
        check("mon 08:00 every 5m", "\"08:00\" is no window", "such as \"08:00-18:00\"");
        check("mon 08:00-18:0 every 5m", "\"18:0\" is no time of day", "two digits each");
        check("mon 24:00-24:00 every 5m", "24:00 is the end of a day", "write 00:00");
        check("mon 18:00-00:00 every 5m", "ends before it begins", "write \"18:00-24:00\"");
        check("mon 08:00-08:00 every 5m", "is empty", "write \"08:00\" without `every`");
        check("mon 22:00-06:00 every 5m", "goes over midnight", "write two entries, \"22:00-24:00\", and \"00:00-06:00\"");
        check("mon 08:00-09:00 every 1h", "\"1h\" is not shorter than the window \"08:00-09:00\"", "write \"08:00\" without `every`");
        check("* every 24h", "is not shorter than the window", "write \"00:00\" without `every`");
        check("* every 90s", "\"90s\" is no step", "write whole minutes from 1m to 24h");
        check("* every 25h", "\"25h\" is no step", "from 1m to 24h");
        check("* every 365d", "\"365d\" is no step", "from 1m to 24h");
        check("* every 5", "\"5\" has no unit", "such as \"90s\" or \"5m\"");
        check("* every 0m", "would wait for nothing", "such as \"90s\" or \"5m\"");
        check("* every hour", "\"hour\" is no time", "such as \"90s\" or \"5m\"");
    }

    fn read(text: &str) -> Result<Schedule, String> {
        parse(text).map_err(|error| error.message().to_owned())
    }

    #[test]
    fn every_key_is_read_and_the_others_have_their_defaults() {
        let schedule = |when, jitter, retry_first, retry_max| Ok(Schedule { when, jitter, retry_first, retry_max });
        let (half_minute, hour) = (MINUTE / 2, 60 * MINUTE);
        assert_eq!(read(""), Ok(Schedule::default()));
        assert_eq!(read(""), schedule(When::Every(15 * MINUTE), half_minute, MINUTE, hour));
        let second = Duration::from_secs(1);
        assert_eq!(read("every = \"1s\""), schedule(When::Every(second), second / 10, second, hour));
        let table = "at = [\"* every 1h\", \"sun 03:30\"]\nzone = \"UTC\"";
        let rules = vec![TimetableEntry::parse("* every 1h").unwrap(), TimetableEntry::parse("sun 03:30").unwrap()];
        let at = When::At(Timetable { entries: rules, zone: Zone::parse("UTC").unwrap() });
        assert_eq!(read(table), schedule(at.clone(), half_minute, MINUTE, hour));
        let all = format!("{table}\njitter = \"10m\"\nretry-first = \"2m\"\nretry-max = \"4m\"");
        assert_eq!(read(&all), schedule(at, 10 * MINUTE, 2 * MINUTE, 4 * MINUTE));
        assert_eq!(read("jitter = \"none\"").unwrap().jitter, Duration::ZERO);
        // What is not written gives way.
        let retry = |text| read(text).map(|schedule| (schedule.retry_first, schedule.retry_max));
        assert_eq!(retry("retry-max = \"30s\""), Ok((half_minute, half_minute)));
        assert_eq!(retry("retry-first = \"2h\""), Ok((2 * hour, 2 * hour)));
    }

    #[test]
    #[rustfmt::skip]
    fn mistakes_in_the_table_are_named() {
        let check = |text: &str, wrong: &str, way_out: &str| {
            let said = read(text).expect_err(text);
            assert!(said.contains(wrong) && said.contains(way_out), "\nwanted: {wrong} … {way_out}\n   got: {said}");
        };
        check("every = \"5m\"\nat = [\"* 08:00\"]", "exclude each other", "take one of the two out");
        check("at = []", "`at` is empty", "write a time to call");
        check("at = \"* 08:00\"", "expected a sequence", "");
        check("at = [\"mon\"]", "is no time to call", "write DAYS TIMES");
        check("at = [5]", "a number stands here", "expected a time to call such as");
        check("zone = \"UTC\"", "`zone` is for `at`, and there is none", "take `zone` out");
        check("at = [\"* 08:00\"]\nzone = \"Europe/Berln\"", "is no time zone", "such as \"Europe/Berlin\"");
        check("at = [\"* 08:00\"]\nzone = \"UTC+3\"", "is no time zone", "or take `zone` out");
        check("jitter = \"0s\"", "would wait for nothing", "or \"none\"");
        check("jitter = \"15m\"", "`jitter` must be shorter than `every`", "write less, or \"none\"");
        check("at = [\"* 08:00\", \"* every 1m\"]\njitter = \"1m\"", "than each step of `at`", "write less");
        check("retry-first = \"2m\"\nretry-max = \"1m\"", "must not be longer than `retry-max`", "write less");
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(text in "([a-z*,-]{0,9}|mon-fri|\\*) ?([0-9:,-]{0,12}|08:00-18:00) ?(every)? ?.{0,4}") {
            let _ = TimetableEntry::parse(&text);
        }
    }
}
