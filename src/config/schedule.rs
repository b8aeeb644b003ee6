//! `[schedule]`: when `pull --daemon` calls.

use std::time::Duration;

use serde::Deserialize;

use super::value::duration;

/// `[schedule]`: when `pull --daemon` calls.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table", rename_all = "kebab-case")]
pub struct Schedule {
    /// From one call to the next. Default 15 min.
    #[serde(deserialize_with = "duration")]
    pub every: Duration,
}

impl Default for Schedule {
    fn default() -> Schedule {
        Schedule { every: Duration::from_secs(15 * 60) }
    }
}
