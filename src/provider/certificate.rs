//! Logs the end of the provider's certificate once a day from 14 days before it: otherwise the administrator would
//! see it only when customers cannot call.

use crate::clock::Timestamp;
use crate::net::tls::ServerTls;

/// Seconds.
const DAY: i64 = 24 * 60 * 60;

/// The number of days before its end from which a certificate is to be renewed.
pub const DAYS_TO_RENEW: i64 = 14;

/// Logs the end of the certificate once a day.
#[derive(Default)]
pub struct CertificateEnd {
    /// When an end was logged, and that end.
    last: Option<(Timestamp, Timestamp)>,
}

impl CertificateEnd {
    /// Logs the end of this certificate if it is near and was not logged for a day.
    pub fn log(&mut self, tls: Option<&ServerTls>, now: Timestamp) {
        if let Some(until) = tls.and_then(ServerTls::until)
            && self.is_due(until, now)
        {
            let (end, days) = (until.rfc3339(), days_left(until, now));
            log::warn!("event=certificate-ends certificate-until={end} days={days}");
        }
    }

    fn is_due(&mut self, until: Timestamp, now: Timestamp) -> bool {
        let logged = |(at, end): &(Timestamp, Timestamp)| *end == until && now.seconds() - at.seconds() < DAY;
        let due = days_left(until, now) < DAYS_TO_RENEW && !self.last.as_ref().is_some_and(logged);
        if due {
            self.last = Some((now, until));
        }
        due
    }
}

/// Whole days until the end; negative after it.
pub fn days_left(until: Timestamp, now: Timestamp) -> i64 {
    (until.seconds() - now.seconds()).div_euclid(DAY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_is_logged_once_a_day_from_fourteen_days_before() {
        let (mut end, until) = (CertificateEnd::default(), Timestamp::from_seconds(100 * DAY));
        let mut due = |hour: i64, until| end.is_due(until, Timestamp::from_seconds(hour * 3600));
        let hours = 84 * 24..102 * 24;
        let logged: Vec<_> = hours.filter(|hour| due(*hour, until)).collect();
        assert_eq!(logged, (86..102).map(|day| day * 24 + 1).collect::<Vec<_>>());
        // A new certificate that ends soon is logged at once, and one that does not is not.
        assert!(due(102 * 24, Timestamp::from_seconds(110 * DAY)));
        assert!(!due(102 * 24, Timestamp::from_seconds(190 * DAY)));
    }
}
