//! The settings of held mail in a customer's file at its provider: how long and how much is held, and how it is sent.

use std::time::Duration;

use super::known::KnownRecipients;
use super::table::Table;
use super::value::{DURATION, DURATION_OR_NONE, EXPIRY, NEVER_OR_LATER, SIZE, SIZE_OR_NONE, Text};
use crate::mail::address::Domain;
use crate::recipients::ConfigError;

/// The settings of the mail that is held for a customer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HeldConfig {
    /// A message of this age expires, whether the customer calls or not; `None`: never. From 1 s to 90 days, default 14
    /// days.
    pub expire_after: Option<Duration>,
    /// The sender of a message of this age gets a DSN about the delay, unless the customer has called since the message
    /// arrived; `None`, the default: never. Shorter than `expire_after`.
    pub delay_warning: Option<Duration>,
    /// For this time, a rejection that looks like a mistake of the customer's server is a deferral; zero, the default:
    /// never.
    pub soft_bounce: Duration,
    /// The recipients whose mail is accepted; other recipients are rejected.
    pub recipients: KnownRecipients,
    /// Octets of the files that may be held; `None`, the default: no limit.
    pub max_bytes: Option<u64>,
    /// Messages that may be held, from 1 on; `None`, the default: no limit.
    pub max_messages: Option<usize>,
    /// Whether mail beyond `max_bytes` or `max_messages` is deferred (the default) or rejected.
    pub over_quota: OverQuota,
    /// Messages in one turned session; `None`, the default: the value of `[limits]`; 0: no limit.
    pub messages_per_turn: Option<usize>,
    /// Octets of content in one turned session; `None`, the default: the value of `[limits]`; 0: no limit.
    pub octets_per_turn: Option<u64>,
    /// The longest time of a turned session; `None`, the default: the value of `[timeouts]`.
    pub turn: Option<Duration>,
    /// The shortest time from the end of a call without mail to the next ATRN. Default: zero.
    pub min_interval: Duration,
}

/// Whether mail for a customer whose quota is used up is deferred or rejected.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum OverQuota {
    /// It is deferred: the client tries again.
    #[default]
    Defer,
    /// It is rejected: the client returns it to its sender.
    Reject,
}

const OVER_QUOTA_EXPECTED: &str = "\"defer\" or \"reject\"";

/// The value of `over-quota`.
const OVER_QUOTA: Text<OverQuota> = Text::new(OVER_QUOTA_EXPECTED, |text| match text {
    "defer" => Ok(OverQuota::Defer),
    "reject" => Ok(OverQuota::Reject),
    _ => Err(format!("{text:?} is not a valid way to treat mail beyond the quota: write {OVER_QUOTA_EXPECTED}")),
});

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

impl Default for HeldConfig {
    fn default() -> HeldConfig {
        HeldConfig {
            expire_after: Some(14 * DAY),
            delay_warning: None,
            soft_bounce: Duration::ZERO,
            recipients: KnownRecipients::default(),
            max_bytes: None,
            max_messages: None,
            over_quota: OverQuota::default(),
            messages_per_turn: None,
            octets_per_turn: None,
            turn: None,
            min_interval: Duration::ZERO,
        }
    }
}

impl HeldConfig {
    /// Reads the keys from the file of a customer with these domains.
    pub(super) fn build(table: &mut Table<'_>, domains: &[Domain]) -> Result<HeldConfig, ConfigError> {
        let default = HeldConfig::default();
        let warning_line = table.line_of("delay-warning");
        let (expire_after, delay_warning) =
            (table.get("expire-after", EXPIRY), table.get("delay-warning", NEVER_OR_LATER));
        let held = HeldConfig {
            soft_bounce: table.or("soft-bounce", DURATION_OR_NONE, default.soft_bounce),
            max_bytes: table.optional("max-bytes", SIZE),
            max_messages: table.optional("max-messages", 1..=u32::MAX),
            over_quota: table.or("over-quota", OVER_QUOTA, default.over_quota),
            messages_per_turn: table.optional("messages-per-turn", 0..=u32::MAX),
            octets_per_turn: table.optional("octets-per-turn", SIZE_OR_NONE),
            turn: table.optional("turn", DURATION),
            min_interval: table.or("min-interval", DURATION_OR_NONE, default.min_interval),
            ..default
        };
        let recipients = table.file.note(KnownRecipients::build(table, domains));
        let (expire_after, delay_warning) =
            (expire_after?.unwrap_or(held.expire_after), delay_warning?.unwrap_or(held.delay_warning));
        if let (Some(expiry), Some(warning)) = (expire_after, delay_warning)
            && warning >= expiry
        {
            let text = "`delay-warning` must be shorter than `expire-after`, which is \"14d\" by default: write less here, \
                        or more there";
            return Err(warning_line.error(text));
        }
        Ok(HeldConfig { expire_after, delay_warning, recipients: recipients?, ..held })
    }
}

#[rustfmt::skip]
pub(super) const HELD_KEYS: [&str; 12] = [
    "expire-after", "delay-warning", "soft-bounce", "recipients", "recipients-file", "max-bytes", "max-messages",
    "over-quota", "messages-per-turn", "octets-per-turn", "turn", "min-interval",
];
