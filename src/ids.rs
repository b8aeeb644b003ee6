//! Names that never repeat (queue ids, file names, challenges), and random numbers.
//!
//! All code that depends on randomness uses [`Ids`], so that a test can replace it by [`Ids::fixed`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use data_encoding::HEXLOWER;

use crate::clock::Clock;

/// The source of names that never repeat, and of random numbers. A clone is the same source.
#[derive(Clone)]
pub struct Ids {
    /// Fills a slice with random octets. `None`: for tests, all results are counted.
    random: Option<fn(&mut [u8])>,
    counters: Arc<Counters>,
}

#[derive(Default)]
struct Counters {
    /// The last result of `tick`.
    last_tick: AtomicU64,
    queue_ids: AtomicU64,
    sessions: AtomicU64,
    files: AtomicU64,
    challenges: AtomicU64,
    nonces: AtomicU64,
    numbers: AtomicU64,
}

impl Ids {
    /// Returns ids that are made of the clock, the process id and `random`, which must fill the whole slice with octets that
    /// cannot be predicted.
    pub fn system(random: fn(&mut [u8])) -> Ids {
        Ids { random: Some(random), counters: Arc::default() }
    }

    /// Returns ids for tests: the clock is [`Clock::Fixed`]; queue ids, session ids, file names, challenges and numbers
    /// are counted 1, 2, 3…, each kind separately.
    pub fn fixed() -> Ids {
        Ids { random: None, counters: Arc::default() }
    }

    /// Returns the clock of these ids.
    pub fn clock(&self) -> Clock {
        if self.random.is_some() { Clock::System } else { Clock::Fixed }
    }

    /// Returns a new queue id, unique on this host, also among processes. It has 21 characters of `0-9a-v`, so it is
    /// valid in a file name, a header field and a reply. The ids of one process sort by time. [`Ids::fixed`]: `id1`,
    /// `id2`, …
    pub fn queue_id(&self) -> String {
        match self.random {
            // Ids of one process differ in their time, ids of one moment in their process. The random part prevents equal
            // ids in containers that share a spool, and after a clock was set back.
            Some(random) => self.tick_and_process() + &base32(u64::from_le_bytes(octets(random)), 5),
            None => format!("id{}", count(&self.counters.queue_ids)),
        }
    }

    /// Returns a new id for a session in the log: unique on this host, also among processes; 16 characters.
    /// [`Ids::fixed`]: `1`, `2`, …
    pub fn session_id(&self) -> String {
        match self.random {
            Some(_) => self.tick_and_process(),
            None => count(&self.counters.sessions).to_string(),
        }
    }

    /// Returns a name for a new file in a Maildir, `seconds.M…P…Q…R….host`, as maildir(5) defines it: microseconds,
    /// process id, the number of names that this process has made, and 32 random bits. So names differ even within one second,
    /// after the clock was set back, and if a process id is used again. `/` and `:` in the host name become `\057` and
    /// `\072`. [`Ids::fixed`]: `1767323045.1.host`, counted.
    pub fn file_name(&self, hostname: &str) -> String {
        let host = hostname.replace('/', "\\057").replace(':', "\\072");
        let number = count(&self.counters.files);
        let Some(random) = self.random else {
            return format!("{}.{number}.{host}", Clock::Fixed.now().seconds());
        };
        let time = tick(&self.counters.last_tick);
        let (seconds, microseconds) = (time / 1_000_000, time % 1_000_000);
        let (process, random) = (std::process::id(), HEXLOWER.encode(&octets::<4>(random)));
        format!("{seconds}.M{microseconds:06}P{process}Q{number}R{random}.{host}")
    }

    /// Returns a new challenge for CRAM-MD5, `<random.timestamp@hostname>` (RFC 2195 section 2), with 128 random bits as
    /// digits, so that a recorded response is never valid again. [`Ids::fixed`]: `<1.1767323045@hostname>`, counted.
    pub fn challenge(&self, hostname: &str) -> String {
        let number = match self.random {
            Some(random) => u128::from_le_bytes(octets(random)),
            None => count(&self.counters.challenges).into(),
        };
        format!("<{number}.{}@{hostname}>", self.clock().now().seconds())
    }

    /// Returns a new nonce for SCRAM (RFC 5802 section 5.1): 128 random bits in hexadecimal. [`Ids::fixed`]: `nonce1-`,
    /// `nonce2-`…
    pub fn nonce(&self) -> String {
        match self.random {
            Some(random) => HEXLOWER.encode(&octets::<16>(random)),
            None => format!("nonce{}-", count(&self.counters.nonces)),
        }
    }

    /// Returns a new secret key. [`Ids::fixed`]: always the same.
    pub fn key(&self) -> [u8; 32] {
        self.random.map_or([b'k'; 32], octets)
    }

    /// Returns a random number that cannot be predicted, for DNS queries (RFC 5452) and for the order of MX hosts of equal
    /// preference (RFC 5321 section 5.1). It may repeat. [`Ids::fixed`]: 1, 2, 3…
    pub fn random_number(&self) -> u64 {
        match self.random {
            Some(random) => u64::from_le_bytes(octets(random)),
            None => count(&self.counters.numbers),
        }
    }

    fn tick_and_process(&self) -> String {
        base32(tick(&self.counters.last_tick), 11) + &base32(u64::from(std::process::id()), 5)
    }
}

/// Microseconds since 1970. Each result is larger than the one before, even if the clock was set back.
fn tick(last: &AtomicU64) -> u64 {
    let now = Clock::System.microseconds();
    let next = |last: u64| now.max(last.saturating_add(1));
    match last.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |last| Some(next(last))) {
        Ok(before) | Err(before) => next(before),
    }
}

/// Returns the next number: 1, 2, 3…
fn count(counter: &AtomicU64) -> u64 {
    counter.fetch_add(1, Ordering::Relaxed).wrapping_add(1)
}

fn octets<const N: usize>(random: fn(&mut [u8])) -> [u8; N] {
    let mut octets = [0; N];
    random(&mut octets);
    octets
}

/// The lowest `5 * width` bits of `number`, in digits that sort in the order of the numbers.
fn base32(number: u64, width: usize) -> String {
    const DIGITS: &[u8; 32] = b"0123456789abcdefghijklmnopqrstuv";
    (0..width).rev().map(|place| char::from(DIGITS[(number >> (5 * place) & 31) as usize])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    /// A source of randomness that always returns the same octets.
    fn stuck(octets: &mut [u8]) {
        octets.fill(7);
    }

    /// Rules: MD-02, CRAM-01.
    #[test]
    fn fixed_ids_are_counted() {
        let source = Ids::fixed();
        let other = source.clone();
        assert_eq!(source.clock().now().rfc3339(), "2026-01-02T03:04:05Z");
        assert_eq!([source.queue_id(), other.queue_id()], ["id1", "id2"]);
        assert_eq!(source.file_name("host"), "1767323045.1.host");
        assert_eq!(other.file_name("a/b:c"), "1767323045.2.a\\057b\\072c");
        assert_eq!(source.challenge("host"), "<1.1767323045@host>");
        assert_eq!(source.challenge("host"), "<2.1767323045@host>");
        assert_eq!([source.random_number(), other.random_number()], [1, 2]);
        assert_eq!(Ids::fixed().queue_id(), "id1");
    }

    /// Rules: MD-03.
    #[test]
    fn no_id_or_name_repeats_in_many_threads_even_without_randomness() {
        let source = Ids::system(stuck);
        let made: Vec<(Vec<String>, Vec<String>)> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        let ids = (0..25_000).map(|_| source.queue_id()).collect();
                        let names = (0..25_000).map(|_| source.file_name("host")).collect();
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
    fn a_queue_id_is_valid_in_a_file_name() {
        let id = Ids::system(stuck).queue_id();
        assert_eq!(id.len(), 21, "{id}");
        assert!(id.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'v')));
    }

    #[test]
    fn a_random_number_is_eight_random_octets() {
        assert_eq!(Ids::system(stuck).random_number(), 0x0707_0707_0707_0707);
    }

    #[test]
    fn a_tick_never_repeats_when_the_clock_is_set_back() {
        let last = AtomicU64::new(u64::MAX / 2);
        assert_eq!(tick(&last), u64::MAX / 2 + 1);
        assert_eq!(tick(&last), u64::MAX / 2 + 2);
    }

    /// Rules: CRAM-01.
    #[test]
    fn file_names_and_challenges_have_the_form_of_their_standards() {
        let source = Ids::system(stuck);
        let name = source.file_name("mail.example.org");
        let process = std::process::id();
        let rest = name.trim_start_matches(|c: char| c.is_ascii_digit()).strip_prefix(".M").unwrap();
        let rest = rest.trim_start_matches(|c: char| c.is_ascii_digit());
        assert_eq!(rest, format!("P{process}Q1R07070707.mail.example.org"));

        let challenge = source.challenge("mail.example.org");
        let inner = challenge.strip_prefix('<').unwrap();
        let inner = inner.strip_suffix("@mail.example.org>").unwrap();
        let (random, time) = inner.split_once('.').unwrap();
        assert!(random.bytes().all(|c| c.is_ascii_digit()));
        assert!(time.parse::<i64>().unwrap() > 1_700_000_000);
    }
}
