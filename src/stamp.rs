//! What comes from outside: the time, the time of the clock on the wall, and what never repeats (queue ids, file names,
//! challenges), random numbers.
//!
//! Everything in the program that depends on the clock or on randomness goes through [`Stamps`], so that
//! a test replaces all of it at once with [`Stamps::fixed`] and a dialogue can be written down in advance.
//! (Deadlines are another matter: they are `std::time::Instant`s and belong to those who wait.)

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use data_encoding::HEXLOWER;
use jiff::Timestamp;
use jiff::civil::{DateTime, Time, Weekday};
use jiff::tz::{AmbiguousOffset, Offset, TimeZone};

/// The source of times and of names that never repeat. A clone is the same source.
#[derive(Clone)]
pub struct Ids {
    source: Arc<Source>,
}

impl Ids {
    /// The clock and the process id of this machine, and `random`, which must fill the whole slice with
    /// octets nobody can guess.
    pub fn system(random: fn(&mut [u8])) -> Ids {
        Ids::from(Source::System { random, last: AtomicU64::new(0), files: AtomicU64::new(0) })
    }

    /// For tests: the clock stands at 2026-01-02T03:04:05Z; ids, file names, challenges and numbers count
    /// 1, 2, 3…, each on its own.
    pub fn fixed() -> Ids {
        Ids::from(Source::Fixed {
            ids: AtomicU64::new(0),
            files: AtomicU64::new(0),
            challenges: AtomicU64::new(0),
            numbers: AtomicU64::new(0),
        })
    }

    pub fn now(&self) -> Timestamp_ {
        match &*self.source {
            Source::System { .. } => Timestamp_::from_microseconds(clock()),
            Source::Fixed { .. } => FIXED_TIME,
        }
    }

    /// A queue id: unique on this host, also among processes; 21 characters out of `0-9a-v`, so that it may
    /// stand in a file name, a header line and a reply. Ids of one process sort by time.
    /// [`Stamps::fixed`]: `id1`, `id2`, …
    pub fn queue_id(&self) -> String {
        match &*self.source {
            Source::System { random, last, .. } => {
                // The time tells the ids of one process apart, the process id those of one moment. The
                // random part is for what neither sees: containers that share a spool, a clock set back.
                let mut id = base32(tick(last), 11);
                id.push_str(&base32(u64::from(std::process::id()), 5));
                id.push_str(&base32(u64::from_le_bytes(octets(*random)), 5));
                id
            }
            Source::Fixed { ids, .. } => format!("id{}", count(ids)),
        }
    }

    /// A name for a new file in a Maildir: `seconds.M…P…Q…R….host`, as maildir(5) wants it: the microseconds,
    /// the process id, the process's count of deliveries and 32 random bits, so that one second, a clock that
    /// is set back and a reused process id do no harm. `/` and `:` in the host name are written `\057` and
    /// `\072`. [`Stamps::fixed`]: `1767323045.1.host`, counting.
    pub fn file_name(&self, hostname: &str) -> String {
        let host = hostname.replace('/', "\\057").replace(':', "\\072");
        match &*self.source {
            Source::System { random, last, files } => {
                let time = tick(last);
                let seconds = time / MICROSECONDS;
                let microseconds = time % MICROSECONDS;
                let process = std::process::id();
                let delivery = count(files);
                let random = HEXLOWER.encode(&octets::<4>(*random));
                format!("{seconds}.M{microseconds:06}P{process}Q{delivery}R{random}.{host}")
            }
            Source::Fixed { files, .. } => format!("{}.{}.{host}", FIXED_TIME.seconds, count(files)),
        }
    }

    /// A challenge for CRAM-MD5, `<random.timestamp@hostname>` (RFC 2195 section 2): 128 random bits written
    /// in digits, so that none is ever seen twice. [`Stamps::fixed`]: `<1.1767323045@hostname>`, counting.
    pub fn challenge(&self, hostname: &str) -> String {
        match &*self.source {
            Source::System { random, .. } => {
                let random = u128::from_le_bytes(octets(*random));
                format!("<{random}.{}@{hostname}>", self.now().seconds)
            }
            Source::Fixed { challenges, .. } => {
                format!("<{}.{}@{hostname}>", count(challenges), FIXED_TIME.seconds)
            }
        }
    }

    /// A number nobody can guess, for DNS (RFC 5452) and the order of equals; unlike the others it may repeat.
    /// [`Stamps::fixed`]: 1, 2, 3…
    pub fn random_number(&self) -> u64 {
        match &*self.source {
            Source::System { random, .. } => u64::from_le_bytes(octets(*random)),
            Source::Fixed { numbers, .. } => count(numbers),
        }
    }

    fn from(source: Source) -> Ids {
        Ids { source: Arc::new(source) }
    }
}

/// A moment, in whole seconds since 1970, UTC.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct Timestamp_ {
    seconds: i64,
}

impl Timestamp_ {
    /// A moment outside the years 1 to 9999 becomes the nearest one inside: what is printed must stay
    /// readable, and so old or so young no letter is.
    pub fn from_seconds(seconds: i64) -> Timestamp_ {
        Timestamp_ { seconds: seconds.clamp(EARLIEST, Timestamp::MAX.as_second()) }
    }

    pub fn seconds(self) -> i64 {
        self.seconds
    }

    /// As header lines want it: `Fri, 02 Jan 2026 03:04:05 +0000` (RFC 5322 section 3.3).
    pub fn rfc5322(self) -> String {
        let civil = self.civil();
        let weekday = match civil.weekday() {
            Weekday::Monday => "Mon",
            Weekday::Tuesday => "Tue",
            Weekday::Wednesday => "Wed",
            Weekday::Thursday => "Thu",
            Weekday::Friday => "Fri",
            Weekday::Saturday => "Sat",
            Weekday::Sunday => "Sun",
        };
        let month = match civil.month() {
            1 => "Jan",
            2 => "Feb",
            3 => "Mar",
            4 => "Apr",
            5 => "May",
            6 => "Jun",
            7 => "Jul",
            8 => "Aug",
            9 => "Sep",
            10 => "Oct",
            11 => "Nov",
            _ => "Dec",
        };
        format!(
            "{weekday}, {:02} {month} {:04} {:02}:{:02}:{:02} +0000",
            civil.day(),
            civil.year(),
            civil.hour(),
            civil.minute(),
            civil.second()
        )
    }

    /// As our own files and logs want it: `2026-01-02T03:04:05Z` (RFC 3339).
    pub fn rfc3339(self) -> String {
        let civil = self.civil();
        format!(
            "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}Z",
            civil.year(),
            civil.month(),
            civil.day(),
            civil.hour(),
            civil.minute(),
            civil.second()
        )
    }

    /// Reads what [`Date::rfc3339`] writes, and other offsets; a fraction of a second is dropped.
    pub fn parse_rfc3339(text: &str) -> Option<Timestamp_> {
        let moment: Timestamp = text.parse().ok()?;
        Some(Timestamp_::from_seconds(moment.as_second()))
    }

    fn from_microseconds(microseconds: u64) -> Timestamp_ {
        Timestamp_::from_seconds((microseconds / MICROSECONDS).cast_signed())
    }

    fn civil(self) -> DateTime {
        Offset::UTC.to_datetime(self.timestamp())
    }

    fn timestamp(self) -> Timestamp {
        // In range since `from_seconds`, so the fallback is never taken.
        Timestamp::from_second(self.seconds).unwrap_or(Timestamp::UNIX_EPOCH)
    }
}

/// What the clock on the wall says where this is the zone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Zone(TimeZone);

impl Zone {
    /// That of this machine, as `TZ` or `/etc/localtime` says now; UTC where neither can be used.
    pub fn system() -> Zone {
        Zone(TimeZone::system())
    }

    /// A name of the zones that this machine knows, such as `Europe/Berlin`; `UTC` it always knows. Or a rule as POSIX
    /// writes it, such as `CET-1CEST,M3.5.0,M10.5.0/3`. A rule without changes must have its name in `<>`, as in
    /// `<+03>-3`: in `UTC+3` the sign would mean the contrary of what it seems to.
    pub fn parse(text: &str) -> Option<Zone> {
        let rule = text.contains(',') || text.starts_with('<');
        let zone = if rule { TimeZone::posix(text) } else { TimeZone::get(text) };
        zone.ok().map(Zone)
    }

    /// The day it is there.
    pub fn day(&self, moment: Timestamp_) -> Day {
        Day(self.0.to_datetime(moment.timestamp()).date())
    }

    /// When the clock shows this minute of that day, counted from midnight, up to 1439. None: outside the years that a
    /// [`Date`] can be in.
    pub fn occurrence(&self, day: Day, minute: u16) -> Option<Occurrence> {
        let (hour, minute) = (i8::try_from(minute / 60).ok()?, i8::try_from(minute % 60).ok()?);
        let shown = DateTime::from_parts(day.0, Time::new(hour, minute, 0, 0).ok()?);
        let found = self.0.to_ambiguous_timestamp(shown);
        Some(match found.offset() {
            AmbiguousOffset::Unambiguous { .. } => Occurrence::Once(date(found.unambiguous().ok()?)),
            AmbiguousOffset::Fold { .. } => Occurrence::Twice(date(found.earlier().ok()?), date(found.later().ok()?)),
            // With the offset that holds afterwards it is a moment before the clock is put forward.
            AmbiguousOffset::Gap { .. } => {
                let before = found.earlier().ok()?;
                Occurrence::Never(date(self.0.following(before).next()?.timestamp()))
            }
        })
    }

    /// `2026-01-02T04:04:05+01:00` (RFC 3339).
    pub fn rfc3339(&self, moment: Timestamp_) -> String {
        let moment = moment.timestamp();
        moment.display_with_offset(self.0.to_offset(moment)).to_string()
    }
}

/// A day of the calendar, wherever.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Day(jiff::civil::Date);

impl Day {
    /// 0 is Monday, 6 is Sunday.
    pub fn weekday(self) -> usize {
        // In range by what it is, so the fallback is never taken.
        usize::try_from(self.0.weekday().to_monday_zero_offset()).unwrap_or(0)
    }

    /// None: it is the last one of the calendar.
    pub fn next(self) -> Option<Day> {
        self.0.tomorrow().ok().map(Day)
    }

    /// None: it is the first one of the calendar.
    pub fn previous(self) -> Option<Day> {
        self.0.yesterday().ok().map(Day)
    }
}

/// How often the clock shows one minute of one day, and when.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Occurrence {
    Once(Timestamp_),
    /// The clock is put back, and the minute comes again.
    Twice(Timestamp_, Timestamp_),
    /// The clock is put forward over it, at this moment.
    Never(Timestamp_),
}

fn date(moment: Timestamp) -> Timestamp_ {
    Timestamp_::from_seconds(moment.as_second())
}

enum Source {
    System {
        random: fn(&mut [u8]),
        /// The last tick that was given out.
        last: AtomicU64,
        files: AtomicU64,
    },
    Fixed {
        ids: AtomicU64,
        files: AtomicU64,
        challenges: AtomicU64,
        numbers: AtomicU64,
    },
}

/// 2026-01-02T03:04:05Z
const FIXED_TIME: Timestamp_ = Timestamp_ { seconds: 1_767_323_045 };

/// 0001-01-01T00:00:00Z
const EARLIEST: i64 = -62_135_596_800;

const MICROSECONDS: u64 = 1_000_000;

/// Microseconds since 1970. A clock before 1970 counts as 1970.
fn clock() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_micros()).unwrap_or(0))
}

/// The clock, but never the same value twice and never backwards within this process.
fn tick(last: &AtomicU64) -> u64 {
    let now = clock();
    let next = |last: u64| now.max(last.saturating_add(1));
    match last.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |last| Some(next(last))) {
        Ok(before) | Err(before) => next(before),
    }
}

/// 1, 2, 3…
fn count(counter: &AtomicU64) -> u64 {
    counter.fetch_add(1, Ordering::Relaxed).wrapping_add(1)
}

fn octets<const N: usize>(random: fn(&mut [u8])) -> [u8; N] {
    let mut octets = [0; N];
    random(&mut octets);
    octets
}

/// The lowest `5 * width` bits of `number`, in digits that sort like the number.
fn base32(number: u64, width: usize) -> String {
    const DIGITS: &[u8; 32] = b"0123456789abcdefghijklmnopqrstuv";
    (0..width).rev().map(|place| char::from(DIGITS[(number >> (5 * place) & 31) as usize])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    /// Always the same octets: what stays unique with it does not hang on luck.
    fn stuck(octets: &mut [u8]) {
        octets.fill(7);
    }

    #[test]
    fn fixed_stamps_count() {
        let stamps = Ids::fixed();
        let other = stamps.clone();
        assert_eq!(stamps.now().rfc3339(), "2026-01-02T03:04:05Z");
        assert_eq!([stamps.queue_id(), other.queue_id()], ["id1", "id2"]);
        assert_eq!(stamps.file_name("host"), "1767323045.1.host");
        assert_eq!(other.file_name("a/b:c"), "1767323045.2.a\\057b\\072c");
        assert_eq!(stamps.challenge("host"), "<1.1767323045@host>");
        assert_eq!(stamps.challenge("host"), "<2.1767323045@host>");
        assert_eq!([stamps.random_number(), other.random_number()], [1, 2]);
        assert_eq!(Ids::fixed().queue_id(), "id1");
    }

    #[test]
    fn nothing_repeats_in_many_threads_even_without_randomness() {
        let stamps = Ids::system(stuck);
        let made: Vec<(Vec<String>, Vec<String>)> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        let ids = (0..25_000).map(|_| stamps.queue_id()).collect();
                        let names = (0..25_000).map(|_| stamps.file_name("host")).collect();
                        (ids, names)
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let mut ids = HashSet::new();
        let mut names = HashSet::new();
        for (some_ids, some_names) in made {
            assert!(some_ids.is_sorted(), "the ids of one thread sort by time");
            ids.extend(some_ids);
            names.extend(some_names);
        }
        assert_eq!((ids.len(), names.len()), (100_000, 100_000));
    }

    #[test]
    fn an_id_may_stand_in_a_file_name() {
        let id = Ids::system(stuck).queue_id();
        assert_eq!(id.len(), 21, "{id}");
        assert!(id.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'v')));
    }

    #[test]
    fn a_system_number_is_all_random_octets() {
        assert_eq!(Ids::system(stuck).random_number(), 0x0707_0707_0707_0707);
    }

    #[test]
    fn a_tick_never_repeats_when_the_clock_is_set_back() {
        let last = AtomicU64::new(u64::MAX / 2);
        assert_eq!(tick(&last), u64::MAX / 2 + 1);
        assert_eq!(tick(&last), u64::MAX / 2 + 2);
    }

    #[test]
    fn a_system_file_name_and_challenge_have_their_shape() {
        let stamps = Ids::system(stuck);
        let name = stamps.file_name("mail.example.org");
        let process = std::process::id();
        let rest = name.trim_start_matches(|c: char| c.is_ascii_digit()).strip_prefix(".M").unwrap();
        let rest = rest.trim_start_matches(|c: char| c.is_ascii_digit());
        assert_eq!(rest, format!("P{process}Q1R07070707.mail.example.org"));

        let challenge = stamps.challenge("mail.example.org");
        let inner = challenge.strip_prefix('<').unwrap();
        let inner = inner.strip_suffix("@mail.example.org>").unwrap();
        let (random, time) = inner.split_once('.').unwrap();
        assert!(random.bytes().all(|c| c.is_ascii_digit()));
        assert!(time.parse::<i64>().unwrap() > 1_700_000_000);
    }

    #[test]
    fn dates_are_written_as_the_rfcs_want() {
        let check = |seconds, rfc5322: &str, rfc3339: &str| {
            let date = Timestamp_::from_seconds(seconds);
            assert_eq!(date.rfc5322(), rfc5322);
            assert_eq!(date.rfc3339(), rfc3339);
            assert_eq!(Timestamp_::parse_rfc3339(rfc3339), Some(date));
        };
        check(1_767_323_045, "Fri, 02 Jan 2026 03:04:05 +0000", "2026-01-02T03:04:05Z");
        check(0, "Thu, 01 Jan 1970 00:00:00 +0000", "1970-01-01T00:00:00Z");
        check(951_782_399, "Mon, 28 Feb 2000 23:59:59 +0000", "2000-02-28T23:59:59Z");
        check(951_782_400, "Tue, 29 Feb 2000 00:00:00 +0000", "2000-02-29T00:00:00Z");
    }

    #[test]
    fn dates_far_away_stay_readable() {
        assert_eq!(Timestamp_::from_seconds(i64::MIN).rfc3339(), "0001-01-01T00:00:00Z");
        assert!(Timestamp_::from_seconds(i64::MAX).rfc5322().contains(" Dec 9999 "));
    }

    #[test]
    fn other_forms_of_a_date_are_read_or_refused() {
        let read = |text: &str| Timestamp_::parse_rfc3339(text).map(Timestamp_::seconds);
        assert_eq!(read("2026-01-02T04:04:05.999+01:00"), Some(1_767_323_045));
        for text in ["", "yesterday", "2026-13-02T03:04:05Z", "2026-01-02", "2026-01-02T03:04:05"] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    /// Central Europe's changes of the clock, without files of zones.
    const BERLIN: &str = "CET-1CEST,M3.5.0,M10.5.0/3";

    #[test]
    fn a_minute_comes_once_twice_or_never() {
        let zone = Zone::parse(BERLIN).unwrap();
        let at = |text: &str| Timestamp_::parse_rfc3339(text).unwrap();
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
    }

    #[test]
    fn days_follow_each_other_until_the_calendar_ends() {
        let zone = Zone::parse("<+03>-3").unwrap();
        let sunday = zone.day(Timestamp_::parse_rfc3339("2026-03-28T21:00:00Z").unwrap());
        assert_eq!((sunday.weekday(), sunday.next().unwrap().weekday()), (6, 0));
        assert_eq!(sunday.next().unwrap().previous(), Some(sunday));
        assert_eq!(zone.day(Timestamp_::from_seconds(i64::MAX)).next().and_then(Day::next), None);
    }

    #[test]
    fn zones_are_names_or_whole_rules() {
        for text in ["UTC", BERLIN, "<+03>-3", "EST5EDT,M3.2.0,M11.1.0"] {
            assert!(Zone::parse(text).is_some(), "{text}");
        }
        for text in ["", "Nowhere/Atlantis", "UTC+3", "GMT-1", "<+03", "CET-1CEST,M13.5.0,M10.5.0", "../../etc/passwd"]
        {
            assert_eq!(Zone::parse(text), None, "{text}");
        }
    }
}
