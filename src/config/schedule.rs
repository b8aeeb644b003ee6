//! Reads `[schedule]`: the times at which `pull --daemon` calls. [`crate::schedule`] computes when a call is due.
//!
//! ```text
//! entry of `at`    DAYS TIMES | DAYS FROM-TO every STEP | DAYS every STEP
//! DAYS             * | mon,wed,fri-sun       ranges may go over the weekend: fri-mon
//! TIMES            08:00,12:30
//! FROM-TO          08:00-18:00               no call at TO itself; TO may be 24:00
//! STEP             5m | 1h                   whole minutes, shorter than the window
//! ```
//!
//! An entry that is ambiguous, or never applies, is rejected.

use std::time::Duration;

use super::table::{Table, values};
use super::value::{DURATION, Text};
use crate::clock::Zone;
use crate::recipients::ConfigError;
use crate::schedule::{Schedule, Times, Timetable, TimetableEntry, When};

pub(super) const SCHEDULE_KEYS: [&str; 6] = ["every", "at", "zone", "jitter", "retry-first", "retry-max"];

/// The minutes of a day.
const DAY: u16 = 24 * 60;

const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];

/// Reads `[schedule]`, or the `schedule` of a provider.
pub(super) fn read(mut table: Table<'_>) -> Result<Schedule, ConfigError> {
    let (line, at_line) = (table.line.clone(), table.line_of("at"));
    let default = Schedule::default();
    let (every, at, zone) = (table.get("every", DURATION), table.list("at", ENTRY), table.get("zone", ZONE));
    let (retry_max, retry_first) = (table.get("retry-max", DURATION), table.get("retry-first", DURATION));
    let (written_jitter, every) = (table.get("jitter", JITTER), every?);
    let when = match (every, at?, zone?) {
        (Some(_), Some(_), _) => {
            let text = "`every` and `at` exclude each other: remove one of the two, and for both write it in `at`, \
                        such as at = [\"* every 15m\", \"mon-fri 08:00,12:30\"]";
            return Err(line.error(text));
        }
        (None, Some(entries), _) if entries.is_empty() => {
            let text = "`at` is empty, and no call would ever be made: write a time to call, such as \"* every 1h\", \
                        or remove it for a call every 15m";
            return Err(at_line.error(text));
        }
        (None, Some(entries), zone) => {
            When::At(Timetable { entries: values(entries), zone: zone.unwrap_or_else(Zone::system) })
        }
        (_, None, Some(_)) => {
            return Err(line.error("`zone` is for `at`, and there is none: add `at`, or remove `zone`"));
        }
        (every, None, None) => every.map_or(default.when, When::Every),
    };
    let retry_max = retry_max?;
    let shortest = [Some(default.retry_first), every, retry_max].into_iter().flatten().min();
    let retry_first = retry_first?.or(shortest).unwrap_or_default();
    let retry_max = retry_max.unwrap_or(default.retry_max.max(retry_first));
    if retry_first > retry_max {
        let text = "`retry-first` must not be longer than `retry-max`: write less for the one, or more for the other";
        return Err(line.error(text));
    }
    let jitter = written_jitter?.unwrap_or_else(|| when.default_jitter());
    if when.shortest_step().is_some_and(|step| jitter >= step) {
        let text = "`jitter` must be shorter than `every`, and than each step of `at`, or calls would fall on each \
                    other: write less, or \"none\"";
        return Err(line.error(text));
    }
    Ok(Schedule { when, jitter, retry_first, retry_max })
}

const ENTRY: Text<TimetableEntry> = Text::new("a time to call such as \"mon-fri 08:00,12:30\"", |text| {
    let words: Vec<&str> = text.split_whitespace().collect();
    let (days, times) = match words[..] {
        [days, "every", step] => (days, window("00:00-24:00", step)),
        [days, window_of_day, "every", step] => (days, window(window_of_day, step)),
        [days, times] => (days, list(times)),
        _ => {
            return Err(format!(
                "{text:?} is not a valid time to call: write DAYS TIMES, DAYS FROM-TO every STEP, or DAYS every STEP, \
                 such as \"mon,wed 08:00,12:30\", \"mon-fri 08:00-18:00 every 5m\" or \"* every 1h\""
            ));
        }
    };
    Ok(TimetableEntry { days: parse_days(days)?, times: times? })
});

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
                return Err(format!("{} is twice in {text:?}: write each day once", DAYS[number]));
            }
        }
    }
    Ok(days)
}

/// The number of a day of the week; 0 is Monday.
fn day(text: &str) -> Result<usize, String> {
    DAYS.iter().position(|day| day.eq_ignore_ascii_case(text)).ok_or_else(|| {
        format!(
            "{text:?} is not a valid day: write mon, tue, wed, thu, fri, sat or sun, several with commas and hyphens \
             as in \"mon,wed,fri-sun\", or \"*\" alone for all"
        )
    })
}

fn list(text: &str) -> Result<Times, String> {
    if text.contains('-') {
        return Err(format!("{text:?} has no step: write \"{text} every 5m\", or times such as \"08:00\""));
    }
    let mut minutes = Vec::new();
    for part in text.split(',') {
        let minute = start(part)?;
        if minutes.contains(&minute) {
            return Err(format!("{part} is twice in {text:?}: write each time once"));
        }
        minutes.push(minute);
    }
    Ok(Times::At(minutes))
}

fn window(text: &str, step: &str) -> Result<Times, String> {
    let Some((first, last)) = text.split_once('-') else {
        return Err(format!(
            "{text:?} is not a valid window: write FROM-TO before `every`, such as \"08:00-18:00\", or nothing for \
             the whole day"
        ));
    };
    let (from, to) = (start(first)?, minute(last)?);
    if to == 0 {
        return Err(format!("{text:?} ends before it begins: write \"{first}-24:00\" for up to the end of the day"));
    }
    if from == to {
        return Err(format!("{text:?} is empty: write \"{first}\" without `every` for one call, or a larger end"));
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

/// A step in minutes, from 1 to 1440.
fn parse_step(text: &str) -> Result<u16, String> {
    let step = DURATION.parse(text)?.as_millis();
    let minutes = u16::try_from(step / 60_000).ok().filter(|minutes| *minutes <= DAY && step % 60_000 == 0);
    minutes.ok_or_else(|| {
        format!("{text:?} is not a valid step: write whole minutes from 1m to 24h, such as \"5m\" or \"1h\"")
    })
}

/// A minute of a day in which a call can begin, from 0 to 1439.
fn start(text: &str) -> Result<u16, String> {
    match minute(text)? {
        DAY => Err("24:00 is the end of a day, and no call begins then: write 00:00, and the day after".to_owned()),
        minute => Ok(minute),
    }
}

/// A minute of a day, from 0 to 1440.
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
        format!(
            "{text:?} is not a valid time of day: write two digits each, from \"00:00\" to \"23:59\", such as \"08:00\""
        )
    })
}

const ZONE: Text<Zone> = Text::new("a time zone such as \"Europe/Berlin\"", |text| {
    Zone::parse(text).ok_or_else(|| {
        format!(
            "{text:?} is not a time zone that this machine knows: write a name from /usr/share/zoneinfo such as \
             \"Europe/Berlin\", or its rule as POSIX has it, such as \"CET-1CEST,M3.5.0,M10.5.0/3\", or remove `zone` \
             for this machine's own"
        )
    })
});

/// A time, or `none`.
const JITTER: Text<Duration> = Text::new("a time such as \"30s\", or \"none\"", |text| match text {
    "none" => Ok(Duration::ZERO),
    time => DURATION.parse(time).map_err(|text| format!("{text}, or \"none\"")),
});

/// Reads the keys of a `[schedule]`.
#[cfg(test)]
pub(crate) fn parse(text: &str) -> Result<Schedule, ConfigError> {
    let source = super::source::Source::new(&std::path::Path::new("odmr.toml").into(), text, 0);
    read(Table::root(&source, &SCHEDULE_KEYS)?)
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
        let check = |text: &str, days, times: Times| assert_eq!(ENTRY.parse(text), Ok(rule(days, times)), "{text}");
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
    fn ambiguous_and_empty_entries_are_rejected() {
        let check = |text: &str, wrong: &str, remedy: &str| {
            let error = ENTRY.parse(text).expect_err(text);
            assert!(error.contains(wrong) && error.contains(remedy), "\nwanted: {wrong} … {remedy}\n   got: {error}");
        };
        check("", "is not a valid time to call", "write DAYS TIMES, DAYS FROM-TO every STEP, or DAYS every STEP");
        check("mon", "is not a valid time to call", "\"* every 1h\"");
        check("08:00", "is not a valid time to call", "\"mon,wed 08:00,12:30\"");
        check("mon 08:00 - 18:00 every 5m", "is not a valid time to call", "\"mon-fri 08:00-18:00 every 5m\"");
        check("mon 08:00 12:00", "is not a valid time to call", "\"mon,wed 08:00,12:30\"");
        check("mon wed 08:00 every 5m", "is not a valid time to call", "DAYS FROM-TO every STEP");
        check("monday 08:00", "\"monday\" is not a valid day", "write mon, tue, wed");
        check("08:00 mon", "\"08:00\" is not a valid day", "write mon, tue, wed");
        check("*,mon 08:00", "\"*\" is not a valid day", "\"*\" alone for all");
        check("mon, 08:00", "\"\" is not a valid day", "write mon, tue, wed");
        check("mon-wed-fri 08:00", "\"wed-fri\" is not a valid day", "with commas and hyphens");
        check("mon-mon 08:00", "\"mon-mon\" may be one day or all", "write \"mon\", or \"*\"");
        check("mon,tue,mon 08:00", "mon is twice in \"mon,tue,mon\"", "write each day once");
        check("sat-tue,mon 08:00", "mon is twice", "write each day once");
        check("mon 8:00", "\"8:00\" is not a valid time of day", "such as \"08:00\"");
        check("mon 08:60", "\"08:60\" is not a valid time of day", "from \"00:00\" to \"23:59\"");
        check("mon 24:01", "\"24:01\" is not a valid time of day", "from \"00:00\" to \"23:59\"");
        check("mon +8:00", "\"+8:00\" is not a valid time of day", "two digits each");
        check("mon 08:00,", "\"\" is not a valid time of day", "two digits each");
        check("mon 24:00", "24:00 is the end of a day", "write 00:00, and the day after");
        check("mon 08:00,09:00,08:00", "08:00 is twice", "write each time once");
        check("mon 08:00-18:00", "has no step", "write \"08:00-18:00 every 5m\"");
        check("mon 08:00 every 5m", "\"08:00\" is not a valid window", "such as \"08:00-18:00\"");
        check("mon 08:00-18:0 every 5m", "\"18:0\" is not a valid time of day", "two digits each");
        check("mon 24:00-24:00 every 5m", "24:00 is the end of a day", "write 00:00");
        check("mon 18:00-00:00 every 5m", "ends before it begins", "write \"18:00-24:00\"");
        check("mon 08:00-08:00 every 5m", "is empty", "write \"08:00\" without `every`");
        check("mon 22:00-06:00 every 5m", "goes over midnight", "write two entries, \"22:00-24:00\", and \"00:00-06:00\"");
        check("mon 08:00-09:00 every 1h", "\"1h\" is not shorter than the window \"08:00-09:00\"", "write \"08:00\" without `every`");
        check("* every 24h", "is not shorter than the window", "write \"00:00\" without `every`");
        check("* every 90s", "\"90s\" is not a valid step", "write whole minutes from 1m to 24h");
        check("* every 25h", "\"25h\" is not a valid step", "from 1m to 24h");
        check("* every 365d", "\"365d\" is not a valid step", "from 1m to 24h");
        check("* every 5", "\"5\" has no unit", "such as \"90s\" or \"5m\"");
        check("* every 0m", "would wait for nothing", "such as \"90s\" or \"5m\"");
        check("* every hour", "\"hour\" is not a valid time", "such as \"90s\" or \"5m\"");
    }

    fn read(text: &str) -> Result<Schedule, String> {
        parse(text).map_err(|error| error.text)
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
        let rules = vec![ENTRY.parse("* every 1h").unwrap(), ENTRY.parse("sun 03:30").unwrap()];
        let at = When::At(Timetable { entries: rules, zone: Zone::parse("UTC").unwrap() });
        assert_eq!(read(table), schedule(at.clone(), half_minute, MINUTE, hour));
        let all = format!("{table}\njitter = \"10m\"\nretry-first = \"2m\"\nretry-max = \"4m\"");
        assert_eq!(read(&all), schedule(at, 10 * MINUTE, 2 * MINUTE, 4 * MINUTE));
        assert_eq!(read("jitter = \"none\"").unwrap().jitter, Duration::ZERO);
        // A default adapts to the values that are written.
        let retry = |text| read(text).map(|schedule| (schedule.retry_first, schedule.retry_max));
        assert_eq!(retry("retry-max = \"30s\""), Ok((half_minute, half_minute)));
        assert_eq!(retry("retry-first = \"2h\""), Ok((2 * hour, 2 * hour)));
    }

    #[test]
    #[rustfmt::skip]
    fn mistakes_in_the_table_are_named() {
        let check = |text: &str, wrong: &str, remedy: &str| {
            let error = read(text).expect_err(text);
            assert!(error.contains(wrong) && error.contains(remedy), "\nwanted: {wrong} … {remedy}\n   got: {error}");
        };
        check("every = \"5m\"\nat = [\"* 08:00\"]", "exclude each other", "remove one of the two");
        check("at = []", "`at` is empty", "write a time to call");
        check("at = \"* 08:00\"", "expected a list, in [ ]", "");
        check("at = [\"mon\"]", "is not a valid time to call", "write DAYS TIMES");
        check("at = [5]", "this is a number", "expected a time to call such as");
        check("zone = \"UTC\"", "`zone` is for `at`, and there is none", "remove `zone`");
        check("at = [\"* 08:00\"]\nzone = \"Europe/Berln\"", "is not a time zone", "such as \"Europe/Berlin\"");
        check("at = [\"* 08:00\"]\nzone = \"UTC+3\"", "is not a time zone", "or remove `zone`");
        check("jitter = \"0s\"", "would wait for nothing", "or \"none\"");
        check("jitter = \"15m\"", "`jitter` must be shorter than `every`", "write less, or \"none\"");
        check("at = [\"* 08:00\", \"* every 1m\"]\njitter = \"1m\"", "than each step of `at`", "write less");
        check("retry-first = \"2m\"\nretry-max = \"1m\"", "must not be longer than `retry-max`", "write less");
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(text in "([a-z*,-]{0,9}|mon-fri|\\*) ?([0-9:,-]{0,12}|08:00-18:00) ?(every)? \
                                           ?.{0,4}") {
            let _ = ENTRY.parse(&text);
        }
    }
}
