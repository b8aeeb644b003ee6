//! `[limits]` and `[timeouts]`: the bounds of each number. Their meaning and their defaults are in
//! [`crate::session::settings`].

use std::time::Duration;

use serde::Deserialize;

use super::value::{at_least, atrn, between, duration};
use crate::session::{Limits, Timeouts};

#[derive(Deserialize)]
#[serde(
    remote = "Limits",
    default = "Limits::default",
    deny_unknown_fields,
    expecting = "a table",
    rename_all = "kebab-case"
)]
pub(super) struct RawLimits {
    #[serde(deserialize_with = "at_least::<1, _>")]
    connections: usize,
    #[serde(deserialize_with = "at_least::<1, _>")]
    connections_per_address: usize,
    #[serde(deserialize_with = "between::<100, 1000, _>")]
    recipients: usize,
    #[serde(deserialize_with = "at_least::<1, _>")]
    errors: usize,
    #[serde(deserialize_with = "at_least::<3, _>")]
    auth_failures: usize,
    #[serde(deserialize_with = "at_least::<1, _>")]
    turned_sessions: usize,
    #[serde(deserialize_with = "at_least::<0, _>")]
    messages_per_turn: usize,
    #[serde(deserialize_with = "at_least::<1, _>")]
    received_hops: usize,
}

#[derive(Deserialize)]
#[serde(
    remote = "Timeouts",
    default = "Timeouts::default",
    deny_unknown_fields,
    expecting = "a table",
    rename_all = "kebab-case"
)]
pub(super) struct RawTimeouts {
    #[serde(deserialize_with = "duration")]
    connect: Duration,
    #[serde(deserialize_with = "duration")]
    greeting: Duration,
    #[serde(deserialize_with = "duration")]
    mail: Duration,
    #[serde(deserialize_with = "duration")]
    recipient: Duration,
    #[serde(deserialize_with = "duration")]
    data: Duration,
    #[serde(deserialize_with = "duration")]
    block: Duration,
    #[serde(deserialize_with = "duration")]
    end: Duration,
    #[serde(deserialize_with = "duration")]
    command: Duration,
    #[serde(deserialize_with = "atrn")]
    atrn: Duration,
    #[serde(deserialize_with = "duration")]
    handshake: Duration,
    #[serde(deserialize_with = "duration")]
    session: Duration,
    #[serde(deserialize_with = "duration")]
    turn: Duration,
    #[serde(deserialize_with = "duration")]
    takeover: Duration,
    #[serde(deserialize_with = "duration")]
    shutdown: Duration,
}
