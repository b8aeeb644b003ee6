//! What never repeats, and what nobody can guess: queue ids, file names, challenges, random numbers.
//!
//! Everything in the program that depends on randomness asks [`Ids`], so that a test replaces all of it at once with
//! [`Ids::fixed`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use data_encoding::HEXLOWER;

use crate::clock::Clock;

/// The source of names that never repeat, and of random numbers. A clone is the same source.
#[derive(Clone)]
pub struct Ids {
    source: Arc<Source>,
}

impl Ids {
    /// The clock and the process id of this machine, and `random`, which must fill the whole slice with octets that
    /// nobody can guess.
    pub fn system(random: fn(&mut [u8])) -> Ids {
        Ids::from(Source::System { random, last: AtomicU64::new(0), files: AtomicU64::new(0) })
    }

    /// For tests: the clock is [`Clock::Fixed`]; ids, file names, challenges and numbers count 1, 2, 3…, each on its
    /// own.
    pub fn fixed() -> Ids {
        Ids::from(Source::Fixed {
            ids: AtomicU64::new(0),
            files: AtomicU64::new(0),
            challenges: AtomicU64::new(0),
            numbers: AtomicU64::new(0),
        })
    }

    /// The clock that these ids are made with.
    pub fn clock(&self) -> Clock {
        match &*self.source {
            Source::System { .. } => Clock::System,
            Source::Fixed { .. } => Clock::Fixed,
        }
    }

    /// A queue id: unique on this host, also among processes; 21 characters out of `0-9a-v`, so that it may
    /// stand in a file name, a header line and a reply. Ids of one process sort by time.
    /// [`Ids::fixed`]: `id1`, `id2`, …
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
    /// `\072`. [`Ids::fixed`]: `1767323045.1.host`, counting.
    pub fn file_name(&self, hostname: &str) -> String {
        let host = hostname.replace('/', "\\057").replace(':', "\\072");
        match &*self.source {
            Source::System { random, last, files } => {
                let time = tick(last);
                let seconds = time / 1_000_000;
                let microseconds = time % 1_000_000;
                let process = std::process::id();
                let delivery = count(files);
                let random = HEXLOWER.encode(&octets::<4>(*random));
                format!("{seconds}.M{microseconds:06}P{process}Q{delivery}R{random}.{host}")
            }
            Source::Fixed { files, .. } => format!("{}.{}.{host}", Clock::Fixed.now().seconds(), count(files)),
        }
    }

    /// A challenge for CRAM-MD5, `<random.timestamp@hostname>` (RFC 2195 section 2): 128 random bits written
    /// in digits, so that none is ever seen twice. [`Ids::fixed`]: `<1.1767323045@hostname>`, counting.
    pub fn challenge(&self, hostname: &str) -> String {
        match &*self.source {
            Source::System { random, .. } => {
                let random = u128::from_le_bytes(octets(*random));
                format!("<{random}.{}@{hostname}>", self.clock().now().seconds())
            }
            Source::Fixed { challenges, .. } => {
                format!("<{}.{}@{hostname}>", count(challenges), Clock::Fixed.now().seconds())
            }
        }
    }

    /// A number nobody can guess, for DNS (RFC 5452) and the order of equals; unlike the others it may repeat.
    /// [`Ids::fixed`]: 1, 2, 3…
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

/// The clock, but never the same value twice and never backwards within this process.
fn tick(last: &AtomicU64) -> u64 {
    let now = Clock::System.microseconds();
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
    fn fixed_ids_count() {
        let ids_ = Ids::fixed();
        let other = ids_.clone();
        assert_eq!(ids_.clock().now().rfc3339(), "2026-01-02T03:04:05Z");
        assert_eq!([ids_.queue_id(), other.queue_id()], ["id1", "id2"]);
        assert_eq!(ids_.file_name("host"), "1767323045.1.host");
        assert_eq!(other.file_name("a/b:c"), "1767323045.2.a\\057b\\072c");
        assert_eq!(ids_.challenge("host"), "<1.1767323045@host>");
        assert_eq!(ids_.challenge("host"), "<2.1767323045@host>");
        assert_eq!([ids_.random_number(), other.random_number()], [1, 2]);
        assert_eq!(Ids::fixed().queue_id(), "id1");
    }

    #[test]
    fn nothing_repeats_in_many_threads_even_without_randomness() {
        let ids_ = Ids::system(stuck);
        let made: Vec<(Vec<String>, Vec<String>)> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        let ids = (0..25_000).map(|_| ids_.queue_id()).collect();
                        let names = (0..25_000).map(|_| ids_.file_name("host")).collect();
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
        let ids_ = Ids::system(stuck);
        let name = ids_.file_name("mail.example.org");
        let process = std::process::id();
        let rest = name.trim_start_matches(|c: char| c.is_ascii_digit()).strip_prefix(".M").unwrap();
        let rest = rest.trim_start_matches(|c: char| c.is_ascii_digit());
        assert_eq!(rest, format!("P{process}Q1R07070707.mail.example.org"));

        let challenge = ids_.challenge("mail.example.org");
        let inner = challenge.strip_prefix('<').unwrap();
        let inner = inner.strip_suffix("@mail.example.org>").unwrap();
        let (random, time) = inner.split_once('.').unwrap();
        assert!(random.bytes().all(|c| c.is_ascii_digit()));
        assert!(time.parse::<i64>().unwrap() > 1_700_000_000);
    }
}
