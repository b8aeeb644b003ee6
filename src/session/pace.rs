//! The time that content earns: the clock of a session does not run while content moves at the required pace.
//!
//! A session has an absolute deadline. Each octet of content postpones it by the time that the octet may take at the
//! required pace. So a message on a slow line is not cut, and a peer that sends an octet a minute gains hardly
//! anything. A message earns no more than the time for its size. At most [`limits::PACE_WINDOW`] of the earned time can
//! be unused, so that a burst does not pay for hours of silence.
//!
//! Every function has the present time as a parameter.

use std::time::{Duration, Instant};

use crate::smtp::limits;

/// The time that the content of one message earns.
#[derive(Debug)]
pub struct PaceClock {
    /// Octets a second.
    pace: u64,
    /// Octets that may still earn time.
    left: u64,
    /// Until this time the session's clock does not run.
    paid_until: Instant,
}

impl PaceClock {
    /// The clock of a message that has `size` octets at most and begins now. `pace`: octets a second, at least 1.
    pub fn new(pace: u64, size: u64, now: Instant) -> PaceClock {
        PaceClock { pace, left: size, paid_until: now }
    }

    /// Counts octets that have moved. Returns the time that they have earned; the caller postpones its deadlines by it.
    pub fn earn(&mut self, octets: usize, now: Instant) -> Duration {
        let octets = self.left.min(octets as u64);
        self.left -= octets;
        let from = self.paid_until.max(now);
        let time = Duration::from_micros(octets.saturating_mul(1_000_000) / self.pace);
        self.paid_until = from + time.min((now + limits::PACE_WINDOW).saturating_duration_since(from));
        self.paid_until - from
    }

    /// Ends or interrupts the transfer. Returns the time that was earned and not used; the caller takes it off its
    /// deadlines.
    pub fn stop(&mut self, now: Instant) -> Duration {
        let unused = self.paid_until.saturating_duration_since(now);
        self.paid_until -= unused;
        unused
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACE: u64 = 100;
    const SESSION: Duration = Duration::from_secs(60);

    /// Transfers blocks, each given as the seconds since the one before and its octets. Returns the second in which the
    /// session has ended, and whether it was cut.
    fn transfer(size: u64, blocks: &[(u64, usize)]) -> (u64, bool) {
        let begun = Instant::now();
        let (mut clock, mut deadline, mut now) = (PaceClock::new(PACE, size, begun), begun + SESSION, begun);
        for (every, octets) in blocks {
            now += Duration::from_secs(*every);
            if now >= deadline {
                return ((deadline - begun).as_secs(), true);
            }
            deadline += clock.earn(*octets, now);
        }
        deadline -= clock.stop(now);
        ((now - begun).as_secs(), now >= deadline)
    }

    #[test]
    fn a_sender_at_the_required_pace_is_not_cut() {
        assert_eq!(transfer(1 << 20, &[(1, 100); 10_000]), (10_000, false));
        // On average: bursts, and silence between them.
        assert_eq!(transfer(1 << 20, &[(50, 5_100); 200]), (10_000, false));
        let bursts = [(0, 6_000), (118, 6_000)].repeat(10);
        assert_eq!(transfer(1 << 20, &bursts), (1_180, false));
    }

    #[test]
    fn a_slower_sender_is_cut_soon_after_the_session_time() {
        // One octet a minute; a third of the pace; nothing.
        assert_eq!(transfer(1 << 20, &[(30, 1); 1_000]), (60, true));
        assert_eq!(transfer(1 << 20, &[(1, 33); 1_000]), (89, true));
        assert_eq!(transfer(1 << 20, &[(3_600, 0)]), (60, true));
    }

    #[test]
    fn a_burst_earns_two_minutes_at_most() {
        assert_eq!(transfer(1 << 30, &[(0, 1 << 20), (3_600, 1)]), (180, true));
        assert_eq!(transfer(1 << 30, &[(0, 1 << 20), (179, 1 << 20), (178, 1)]), (300, true));
    }

    #[test]
    fn a_message_earns_the_time_for_its_size_at_most() {
        // 1000 octets earn 10 seconds; those that follow earn nothing.
        assert_eq!(transfer(1_000, &[(1, 100); 1_000]), (70, true));
        assert_eq!(transfer(0, &[(1, 1_000); 1_000]), (60, true));
    }

    #[test]
    fn unused_time_is_returned_once() {
        let begun = Instant::now();
        let mut clock = PaceClock::new(PACE, 1 << 20, begun);
        assert_eq!(clock.earn(1 << 20, begun), limits::PACE_WINDOW);
        let later = begun + Duration::from_secs(20);
        assert_eq!(clock.stop(later), Duration::from_secs(100));
        assert_eq!(clock.stop(later), Duration::ZERO);
        assert_eq!(PaceClock::new(PACE, 1 << 20, begun).stop(later), Duration::ZERO);
    }
}
