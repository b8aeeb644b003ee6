//! `odmr expire`: makes the pass that `serve` makes once a minute; for cron, on machines that use inetd mode only.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use getopts::Matches;
use log::LevelFilter;

use super::confine::confine_provider;
use super::exit::{ExitError, Sysexit};
use super::logging::LogTarget;
use super::owner::become_spool_owner;
use super::process::{cancel_at_signal, config_path};
use crate::config::ProviderConfig;
use crate::ids::Ids;
use crate::net::cancel::CancelToken;
use crate::net::tls;
use crate::provider::accept::SpoolDsnSink;
use crate::provider::expiry::{ExpiryPass, ExpiryPlan, LeftFor};
use crate::provider::relay;
use crate::provider::reload::log_skipped;
use crate::provider::spool::Spool;
use crate::report::Reporter;
use crate::report::clock_watch::ClockWatch;

pub(super) const EXPIRE_SUMMARY: &str = include_str!("pages/expire.txt");

/// How long to wait for a session that has a queue.
const LOCK_WAIT: Duration = Duration::from_secs(5);

/// The reporter of a command: this process runs no relay, so each DSN wakes the relay of `serve`.
pub(super) fn reporter_beside_serve(config: &ProviderConfig, spool: &Arc<Spool>, ids: &Ids) -> Reporter {
    let relay = relay::channel(&config.spool).handle;
    let sink = SpoolDsnSink { spool: spool.clone(), relay, ids: ids.clone() };
    let watch = Arc::new(ClockWatch::new(&config.spool, ids.clock()));
    Reporter::new(&config.hostname, ids, Some(Arc::new(sink)), &watch)
}

/// Makes passes over all held mail, until nothing more expires.
///
/// # Errors
///
/// Some mail was left for the next time (75): a session has its queue, there are too many DSNs, or the disk fails.
pub(super) fn run(matches: &Matches) -> Result<(), ExitError> {
    LogTarget::new(matches, false).start(LevelFilter::Info, false);
    let config = ProviderConfig::load(&config_path(matches))?;
    become_spool_owner(&config)?;
    let (ids, cancel) = (Ids::system(tls::random), CancelToken::new()?);
    confine_provider(&config.spool, false);
    cancel_at_signal(&cancel)?;
    log_skipped(&config);
    let spool = Arc::new(Spool::new(&config, &ids));
    let reporter = reporter_beside_serve(&config, &spool, &ids);
    let (accounts, plan) = (&config.accounts, ExpiryPlan::default());
    let is_over = || cancel.is_cancelled();
    let pass = ExpiryPass { accounts, spool: &spool, reporter: &reporter, is_over: &is_over, wait: LOCK_WAIT };
    let mut left = BTreeMap::new();
    loop {
        let result = pass.run(&plan);
        // This pass has looked again at the others, but not at what has failed.
        left.retain(|_, reason| *reason == LeftFor::Failure);
        left.extend(result.left.into_iter().map(|(domain, reason)| (domain.to_string(), reason)));
        if !result.more || cancel.is_cancelled() {
            break;
        }
    }
    let Some((domain, reason)) = left.first_key_value() else { return Ok(()) };
    let more = if left.len() > 1 { format!(", and that of {} others", left.len() - 1) } else { String::new() };
    let text = format!("the mail of {domain}{more} is left for the next time: {}", reason.text());
    Err(ExitError::new(Sysexit::Temporary, text))
}
