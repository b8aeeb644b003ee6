//! `[limits]` and `[timeouts]`: the bounds of each number. Their meaning and their defaults are in
//! [`crate::session::settings`].

use std::ops::RangeInclusive;
use std::time::Duration;

use super::table::Table;
use super::value::{DURATION, SIZE_OR_NONE};
use crate::recipients::ConfigError;
use crate::session::{Limits, Timeouts};
use crate::smtp::limits::{ATRN_TIMEOUT, FEWEST_AUTH_FAILURES, FEWEST_RECIPIENTS};

/// Each key of `[limits]` with its bounds.
pub(super) fn limit_values(limits: &mut Limits) -> [(&'static str, RangeInclusive<u32>, &mut usize); 8] {
    [
        ("connections", 1..=u32::MAX, &mut limits.connections),
        ("connections-per-address", 1..=u32::MAX, &mut limits.connections_per_address),
        ("recipients", FEWEST_RECIPIENTS..=1000, &mut limits.recipients),
        ("errors", 1..=u32::MAX, &mut limits.errors),
        ("auth-failures", FEWEST_AUTH_FAILURES..=u32::MAX, &mut limits.auth_failures),
        ("turned-sessions", 1..=u32::MAX, &mut limits.turned_sessions),
        ("messages-per-turn", 0..=u32::MAX, &mut limits.messages_per_turn),
        ("received-hops", 1..=u32::MAX, &mut limits.received_hops),
    ]
}

/// Each key of `[limits]` whose value is a size.
pub(super) fn size_values(limits: &mut Limits) -> [(&'static str, &mut u64); 2] {
    [("octets-per-turn", &mut limits.octets_per_turn), ("min-free", &mut limits.min_free)]
}

/// The table `[limits]` of a file.
pub(super) fn limits(file: &mut Table<'_>) -> Limits {
    let mut limits = Limits::default();
    let numbers: Vec<_> = limit_values(&mut limits).into_iter().map(|(key, ..)| key).collect();
    let sizes = size_values(&mut limits).map(|(key, _)| key);
    let mut table = file.table_or_empty("limits", &[&numbers[..], &sizes].concat());
    for (key, bounds, limit) in limit_values(&mut limits) {
        *limit = table.or(key, bounds, *limit);
    }
    for (key, limit) in size_values(&mut limits) {
        *limit = table.or(key, SIZE_OR_NONE, *limit);
    }
    limits
}

/// Each key of `[timeouts]`.
pub(super) fn timeout_values(timeouts: &mut Timeouts) -> [(&'static str, &mut Duration); 15] {
    [
        ("connect", &mut timeouts.connect),
        ("greeting", &mut timeouts.greeting),
        ("mail", &mut timeouts.mail),
        ("recipient", &mut timeouts.recipient),
        ("data", &mut timeouts.data),
        ("block", &mut timeouts.block),
        ("end", &mut timeouts.end),
        ("command", &mut timeouts.command),
        ("atrn", &mut timeouts.atrn),
        ("outgoing", &mut timeouts.outgoing),
        ("handshake", &mut timeouts.handshake),
        ("session", &mut timeouts.session),
        ("turn", &mut timeouts.turn),
        ("takeover", &mut timeouts.takeover),
        ("shutdown", &mut timeouts.shutdown),
    ]
}

/// The table `[timeouts]` of a file.
pub(super) fn timeouts(file: &mut Table<'_>) -> Result<Timeouts, ConfigError> {
    let mut timeouts = Timeouts::default();
    let values = timeout_values(&mut timeouts);
    let mut table = file.table_or_empty("timeouts", &values.each_ref().map(|(key, _)| *key));
    let atrn = table.line_of("atrn");
    for (key, timeout) in values {
        *timeout = table.or(key, DURATION, *timeout);
    }
    if timeouts.atrn < ATRN_TIMEOUT {
        let text = "RFC 2645 section 5.2.1 permits the provider ten minutes for ATRN: write \"10m\" or more";
        return Err(atrn.error(text));
    }
    Ok(timeouts)
}
