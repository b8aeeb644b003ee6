//! Time: the clock of this machine, timestamps, days and time zones.
//!
//! Code that depends on the time of day uses [`Clock`], so that a test can stop it with [`Clock::Fixed`]. Deadlines are
//! `std::time::Instant`s and do not use this file.

use std::sync::LazyLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jiff::civil::{DateTime, Time};
use jiff::tz::{AmbiguousOffset, TimeZone};

/// A source of the time of day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// The clock of this machine.
    System,
    /// For tests: always 2026-01-02T03:04:05Z.
    Fixed,
}

impl Clock {
    /// Returns the time now.
    pub fn now(self) -> Timestamp {
        Timestamp::from_seconds((self.microseconds() / 1_000_000).cast_signed())
    }

    /// Returns microseconds since 1970; 0 if the clock is before 1970.
    pub fn microseconds(self) -> u64 {
        match self {
            Clock::System => {
                let since = SystemTime::now().duration_since(UNIX_EPOCH);
                since.map_or(0, |since| u64::try_from(since.as_micros()).unwrap_or(0))
            }
            Clock::Fixed => 1_767_323_045_000_000,
        }
    }
}

/// Returns the time since the start of the system. It is the same for all processes, and cannot be set.
pub fn uptime() -> Duration {
    // Linux alone includes the time for which the system was suspended.
    #[cfg(target_os = "linux")]
    let clock = rustix::time::ClockId::Boottime;
    #[cfg(not(target_os = "linux"))]
    let clock = rustix::time::ClockId::Monotonic;
    let time = rustix::time::clock_gettime(clock);
    Duration::try_from(time).unwrap_or_default()
}

/// The time of day, and since the start of the system, at which this process began.
static BEGUN: LazyLock<(SystemTime, Duration)> = LazyLock::new(|| (SystemTime::now(), uptime()));

/// Records when this process began. Without this call, that is the first call of [`cautious_now`].
pub fn record_begin() {
    LazyLock::force(&BEGUN);
}

/// Returns the time of day for decisions on what is old enough to be removed: if the clock was set forward since this
/// process began, the time that it would show if it had not been. Otherwise files that are being written, and what was
/// set aside today, would be old at once. A process that began at an impossible time, before a machine without a clock had
/// the time, goes by the present clock: by its own nothing would ever be old.
pub fn cautious_now() -> SystemTime {
    let (begun, since) = *BEGUN;
    cautious_time(begun, uptime().saturating_sub(since), SystemTime::now())
}

fn cautious_time(begun: SystemTime, passed: Duration, now: SystemTime) -> SystemTime {
    let time = begun.checked_add(passed).filter(|_| Timestamp::from(begun).is_possible(now.into()));
    time.map_or(now, |time| time.min(now))
}

/// A point in time, in whole seconds since 1970, UTC.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct Timestamp {
    seconds: i64,
}

/// 2025-01-01T00:00:00Z: this program did not exist before that. A clock without a battery starts in 1970, in 2000 or
/// in the year in which the system was built.
const EARLIEST_POSSIBLE: i64 = 1_735_689_600;

/// Seconds by which the clocks of machines that share a directory may differ: an hour.
const CLOCK_SKEW: i64 = 60 * 60;

/// 0001-01-01T00:00:00Z
const EARLIEST: i64 = -62_135_596_800;

/// The time of a file. A time before 1970 becomes 1970.
impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Timestamp {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Timestamp::from_seconds(i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
    }
}

impl Timestamp {
    /// Returns the timestamp of this many seconds since 1970. The formats below have the years 1 to 9999 only: another time
    /// becomes the nearest one in these years.
    pub fn from_seconds(seconds: i64) -> Timestamp {
        Timestamp { seconds: seconds.clamp(EARLIEST, jiff::Timestamp::MAX.as_second()) }
    }

    /// Returns seconds since 1970; negative before.
    pub fn seconds(self) -> i64 {
        self.seconds
    }

    /// Returns whether an event of this program can have this time: it is not before 2025, and not more than an hour after
    /// `now`. If not, a clock was wrong.
    pub fn is_possible(self, now: Timestamp) -> bool {
        self.seconds >= EARLIEST_POSSIBLE && self.seconds <= now.seconds.saturating_add(CLOCK_SKEW)
    }

    /// Returns the form of header fields: `Fri, 02 Jan 2026 03:04:05 +0000` (RFC 5322 section 3.3).
    pub fn rfc5322(self) -> String {
        self.jiff().strftime("%a, %d %b %Y %H:%M:%S +0000").to_string()
    }

    /// Returns the form of our own files and of the log: `2026-01-02T03:04:05Z` (RFC 3339).
    pub fn rfc3339(self) -> String {
        self.jiff().to_string()
    }

    /// Parses the form of [`Timestamp::rfc3339`], also with another offset; a fraction of a second is dropped. `None`: the
    /// text is not valid.
    pub fn parse_rfc3339(text: &str) -> Option<Timestamp> {
        text.parse().ok().map(Timestamp::from_jiff)
    }

    fn from_jiff(moment: jiff::Timestamp) -> Timestamp {
        Timestamp::from_seconds(moment.as_second())
    }

    fn jiff(self) -> jiff::Timestamp {
        // `from_seconds` keeps the seconds in range, so the default is never used.
        jiff::Timestamp::from_second(self.seconds).unwrap_or(jiff::Timestamp::UNIX_EPOCH)
    }
}

/// A time zone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Zone(TimeZone);

impl Zone {
    /// Returns the time zone of this machine, from `TZ` or `/etc/localtime` as they are now; UTC if neither can be read.
    pub fn system() -> Zone {
        Zone(TimeZone::system())
    }

    /// Returns the zone of a name that this machine has, such as `Europe/Berlin` (`UTC` always exists), or of a POSIX rule, such
    /// as `CET-1CEST,M3.5.0,M10.5.0/3`. A rule without daylight saving time must have its name in `<>`, as in `<+03>-3`:
    /// `UTC+3` is not accepted, because in POSIX it is three hours west of UTC. `None`: the text is neither.
    pub fn parse(text: &str) -> Option<Zone> {
        let rule = text.contains(',') || text.starts_with('<');
        let zone = if rule { TimeZone::posix(text) } else { TimeZone::get(text) };
        zone.ok().map(Zone)
    }

    /// Returns the calendar day in this zone.
    pub fn day(&self, moment: Timestamp) -> Day {
        Day(self.0.to_datetime(moment.jiff()).date())
    }

    /// Returns when the clock of this zone shows this minute of that day. `minute`: since midnight, 0 to 1439. `None`: the
    /// minute is out of bounds, or the year is not one of a [`Timestamp`].
    pub fn occurrence(&self, day: Day, minute: u16) -> Option<Occurrence> {
        let (hour, minute) = (i8::try_from(minute / 60).ok()?, i8::try_from(minute % 60).ok()?);
        let shown = DateTime::from_parts(day.0, Time::new(hour, minute, 0, 0).ok()?);
        let found = self.0.to_ambiguous_timestamp(shown);
        Some(match found.offset() {
            AmbiguousOffset::Unambiguous { .. } => Occurrence::Once(Timestamp::from_jiff(found.unambiguous().ok()?)),
            AmbiguousOffset::Fold { .. } => Occurrence::Twice(
                Timestamp::from_jiff(found.earlier().ok()?),
                Timestamp::from_jiff(found.later().ok()?),
            ),
            // `earlier` uses the offset after the change, so it is a time before the change, which is the next transition.
            AmbiguousOffset::Gap { .. } => {
                let before = found.earlier().ok()?;
                Occurrence::Never(Timestamp::from_jiff(self.0.following(before).next()?.timestamp()))
            }
        })
    }

    /// Returns the time in this zone, `2026-01-02T04:04:05+01:00` (RFC 3339).
    pub fn rfc3339(&self, moment: Timestamp) -> String {
        let moment = moment.jiff();
        moment.display_with_offset(self.0.to_offset(moment)).to_string()
    }

    /// Returns the time in this zone in the form of syslog, `Jan  2 04:04:05` (RFC 3164 section 4.1.2).
    pub fn rfc3164(&self, moment: Timestamp) -> String {
        self.0.to_datetime(moment.jiff()).strftime("%b %e %H:%M:%S").to_string()
    }
}

/// A day of the calendar.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Day(jiff::civil::Date);

impl Day {
    /// Returns 0 for Monday to 6 for Sunday.
    pub fn weekday(self) -> usize {
        // Always 0 to 6, so the default is never used.
        usize::try_from(self.0.weekday().to_monday_zero_offset()).unwrap_or(0)
    }

    /// Returns the day after. `None`: this is the last day of the calendar.
    pub fn next(self) -> Option<Day> {
        self.0.tomorrow().ok().map(Day)
    }

    /// Returns the day before. `None`: this is the first day of the calendar.
    pub fn previous(self) -> Option<Day> {
        self.0.yesterday().ok().map(Day)
    }
}

/// How often the clock shows one minute of one day, and when.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Occurrence {
    /// At this time.
    Once(Timestamp),
    /// At these times: the clock is set back between them.
    Twice(Timestamp, Timestamp),
    /// The clock is set forward, at this time, and skips the minute.
    Never(Timestamp),
}

/// Returns microseconds of the monotonic clock of the system, for sd_notify(3).
pub fn monotonic_microseconds() -> i64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec * 1_000_000 + now.tv_nsec / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_have_the_forms_of_the_rfcs() {
        let check = |seconds, rfc5322: &str, rfc3339: &str| {
            let date = Timestamp::from_seconds(seconds);
            assert_eq!(date.rfc5322(), rfc5322);
            assert_eq!(date.rfc3339(), rfc3339);
            assert_eq!(Timestamp::parse_rfc3339(rfc3339), Some(date));
        };
        check(1_767_323_045, "Fri, 02 Jan 2026 03:04:05 +0000", "2026-01-02T03:04:05Z");
        check(0, "Thu, 01 Jan 1970 00:00:00 +0000", "1970-01-01T00:00:00Z");
        check(951_782_399, "Mon, 28 Feb 2000 23:59:59 +0000", "2000-02-28T23:59:59Z");
        check(951_782_400, "Tue, 29 Feb 2000 00:00:00 +0000", "2000-02-29T00:00:00Z");
    }

    #[test]
    fn timestamps_outside_the_years_1_to_9999_become_the_nearest_inside() {
        assert_eq!(Timestamp::from_seconds(i64::MIN).rfc3339(), "0001-01-01T00:00:00Z");
        assert!(Timestamp::from_seconds(i64::MAX).rfc5322().contains(" Dec 9999 "));
    }

    #[test]
    fn a_clock_that_is_set_forward_makes_nothing_old() {
        let (hour, year) = (Duration::from_secs(3600), Duration::from_secs(365 * 86_400));
        let begun = UNIX_EPOCH + 60 * year;
        for (now, time) in [
            (begun + hour, begun + hour),
            (begun + year, begun + hour),
            (begun - year, begun - year),
            (begun + hour / 2, begun + hour / 2),
        ] {
            assert_eq!(cautious_time(begun, hour, now), time);
        }
        // Many small machines begin in 1970, until a time server has told them the time.
        assert_eq!(cautious_time(UNIX_EPOCH, hour, begun), begun);
    }

    #[test]
    fn a_time_before_2025_or_in_the_future_is_impossible() {
        let now = Clock::Fixed.now();
        for (seconds, possible) in [
            (0, false),
            (1_735_689_599, false),
            (1_735_689_600, true),
            (now.seconds(), true),
            (now.seconds() + 3600, true),
            (now.seconds() + 3601, false),
            (i64::MAX, false),
        ] {
            assert_eq!(Timestamp::from_seconds(seconds).is_possible(now), possible, "{seconds}");
        }
        // A clock in 1970 is itself wrong.
        assert!(!Timestamp::from_seconds(0).is_possible(Timestamp::from_seconds(0)));
    }

    #[test]
    fn other_forms_of_rfc_3339_are_parsed_or_rejected() {
        let read = |text: &str| Timestamp::parse_rfc3339(text).map(Timestamp::seconds);
        assert_eq!(read("2026-01-02T04:04:05.999+01:00"), Some(1_767_323_045));
        for text in ["", "yesterday", "2026-13-02T03:04:05Z", "2026-01-02", "2026-01-02T03:04:05"] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    /// The rule of Central Europe, for machines without time zone files.
    const BERLIN: &str = "CET-1CEST,M3.5.0,M10.5.0/3";

    #[test]
    fn a_clock_shows_a_minute_once_twice_or_never() {
        let zone = Zone::parse(BERLIN).unwrap();
        let at = |text: &str| Timestamp::parse_rfc3339(text).unwrap();
        let check = |noon: &str, minute: u16, wanted: Occurrence| {
            assert_eq!(zone.occurrence(zone.day(at(noon)), minute), Some(wanted), "{noon} {minute}");
        };
        let (spring, autumn) = ("2026-03-29T12:00:00Z", "2026-10-25T12:00:00Z");
        check(spring, 119, Occurrence::Once(at("2026-03-29T01:59:00+01:00")));
        check(spring, 120, Occurrence::Never(at("2026-03-29T03:00:00+02:00")));
        check(spring, 179, Occurrence::Never(at("2026-03-29T03:00:00+02:00")));
        check(spring, 180, Occurrence::Once(at("2026-03-29T03:00:00+02:00")));
        check(autumn, 119, Occurrence::Once(at("2026-10-25T01:59:00+02:00")));
        check(autumn, 120, Occurrence::Twice(at("2026-10-25T02:00:00+02:00"), at("2026-10-25T02:00:00+01:00")));
        check(autumn, 179, Occurrence::Twice(at("2026-10-25T02:59:00+02:00"), at("2026-10-25T02:59:00+01:00")));
        check(autumn, 180, Occurrence::Once(at("2026-10-25T03:00:00+01:00")));
        assert_eq!(zone.occurrence(zone.day(at(autumn)), 24 * 60), None);
        assert_eq!(zone.rfc3339(at("2026-10-25T00:30:00Z")), "2026-10-25T02:30:00+02:00");
        assert_eq!(zone.rfc3339(at("2026-10-25T01:30:00Z")), "2026-10-25T02:30:00+01:00");
        assert_eq!(zone.rfc3164(at("2026-10-02T01:30:00Z")), "Oct  2 03:30:00");
    }

    #[test]
    fn days_follow_each_other_until_the_calendar_ends() {
        let zone = Zone::parse("<+03>-3").unwrap();
        let sunday = zone.day(Timestamp::parse_rfc3339("2026-03-28T21:00:00Z").unwrap());
        assert_eq!((sunday.weekday(), sunday.next().unwrap().weekday()), (6, 0));
        assert_eq!(sunday.next().unwrap().previous(), Some(sunday));
        assert_eq!(zone.day(Timestamp::from_seconds(i64::MAX)).next().and_then(Day::next), None);
    }

    #[test]
    fn zones_are_names_or_complete_rules() {
        for text in ["UTC", BERLIN, "<+03>-3", "EST5EDT,M3.2.0,M11.1.0"] {
            assert!(Zone::parse(text).is_some(), "{text}");
        }
        for text in ["", "Nowhere/Atlantis", "UTC+3", "GMT-1", "<+03", "CET-1CEST,M13.5.0,M10.5.0", "../../etc/passwd"]
        {
            assert_eq!(Zone::parse(text), None, "{text}");
        }
    }
}
