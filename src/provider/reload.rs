//! Reloads the configuration at SIGHUP, and the certificate when its files change.
//!
//! A reload makes a new [`Shared`] state from the configuration. New connections begin with it, and sessions use its
//! accounts from the next MAIL, AUTH or ATRN on. Transactions, turned sessions and the relay's attempts under way keep the
//! state that they began with.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::accept::SpoolDsnSink;
use super::certificate::CertificateEnd;
use super::expiry::{ExpiryPass, ExpiryPlan};
use super::relay::WorkerContext;
use super::shared::{Lasting, Shared};
use super::spool::{Spool, SpoolQueue};
use super::turn_settings::{TurnLimits, TurnSettings};
use crate::clock::Timestamp;
use crate::config::{ProviderConfig, TlsFiles};
use crate::file_stamp::FileStamp;
use crate::net::cancel::CancelToken;
use crate::net::tls::ServerTls;
use crate::net::trace::quoted;
use crate::report::Reporter;
use crate::threads::{self, Guarded};

/// Makes the state that depends on the configuration. `earlier`: the relay's context before a reload.
///
/// # Errors
/// A file that the configuration names cannot be used.
pub fn configure(config: ProviderConfig, lasting: Lasting, earlier: Option<&WorkerContext>) -> Result<Shared, String> {
    let Lasting { ids, relay, cancel, .. } = &lasting;
    let tls = config.tls.as_ref().map(TlsFiles::load).transpose().map_err(|error| error.to_string())?;
    let spool = Arc::new(Spool::new(&config, ids));
    let sink = SpoolDsnSink { spool: spool.clone(), relay: relay.clone(), ids: ids.clone() };
    let reporter = Reporter::new(&config.hostname, ids, Some(Arc::new(sink)), &lasting.watch);
    let worker = WorkerContext::new(&config, &spool, ids, reporter.clone(), cancel, earlier)?;
    let turn_settings = TurnSettings {
        timeouts: config.timeouts.clone(),
        limits: TurnLimits::new(&config.limits, &config.timeouts),
        give_up: config.odmr.give_up,
        without_8bitmime: config.odmr.without_8bitmime,
        reporter,
        lost: lasting.lost.clone(),
        spool: spool.clone(),
        cancel: cancel.clone(),
        abort: lasting.abort.clone(),
    };
    let (worker, turn_settings) = (Arc::new(worker), Arc::new(turn_settings));
    Ok(Shared { config, spool, turn_settings, worker, tls, lasting })
}

/// Owns the state that new connections begin with, and replaces it. Clones share it.
#[derive(Clone)]
pub struct Reloader(Arc<ReloaderState>);

struct ReloaderState {
    current: Guarded<Arc<Shared>>,
    /// The settings that only a restart changes.
    fixed: Fixed,
    /// Locked during a reload: the certificate may change while the configuration is read.
    one_at_a_time: Guarded<()>,
}

impl Reloader {
    /// `shared`: the state at the start.
    pub fn new(shared: Arc<Shared>) -> Reloader {
        let fixed = Fixed::of(&shared.config);
        Reloader(Arc::new(ReloaderState { current: Guarded::new(shared), fixed, one_at_a_time: Guarded::default() }))
    }

    /// The state that a new connection, or a new transaction, begins with.
    pub fn current(&self) -> Arc<Shared> {
        self.0.current.lock().clone()
    }

    fn replace(&self, shared: &Arc<Shared>) {
        *self.0.current.lock() = shared.clone();
    }

    /// Reads the configuration anew. Listeners and sessions continue, but turned sessions of a removed account end
    /// after the message under way. If a customer's file has a mistake, its account is not changed; if any other file
    /// has one, nothing is changed. The result is logged.
    pub fn reload(&self, file: &Path) {
        let _one = self.0.one_at_a_time.lock();
        let old = self.current();
        let _reloading = old.spool.begin_reload();
        let accounts = &old.config.accounts;
        let renewed = ProviderConfig::load_again(file, accounts).map_err(|error| error.to_string());
        let changed = renewed.as_ref().map(|config| self.0.fixed.changed(config)).unwrap_or_default();
        match renewed.and_then(|config| renew(config, &old)) {
            Ok(shared) => {
                let shared = Arc::new(shared);
                self.replace(&shared);
                // An account may have a quota now that had none before.
                shared.spool.recount();
                shared.record_reload(None);
                log_reload(&old, &shared);
                if !changed.is_empty() {
                    let what = format!("{} changed, which takes effect after a restart", changed.join(", "));
                    log::warn!("event=restart-needed reason={what:?}");
                }
            }
            Err(error) => {
                old.record_reload(Some(&error));
                log_failure(&error, "the old configuration stays in effect");
            }
        }
    }

    /// Reads the certificate and its key anew. If they cannot be used, the old ones stay in use, and the error is
    /// logged.
    fn reload_certificate(&self) {
        let _one = self.0.one_at_a_time.lock();
        let old = self.current();
        let Some(files) = &old.config.tls else { return };
        match files.load() {
            Ok(tls) => {
                let until = end_of(Some(&tls));
                self.replace(&Arc::new(Shared { tls: Some(tls), ..Shared::clone(&old) }));
                log::info!("event=certificate-reloaded certificate-until={until}");
            }
            Err(error) => log_failure(&error.to_string(), "the old certificate stays in use"),
        }
    }

    /// Until it is cancelled, checks once a minute whether the files of the certificate have changed, and begins a pass of
    /// expiry over held mail. Once a day it logs the certificate's end, if that is near, and tidies the spool.
    pub fn keep_up(&self, cancel: &CancelToken) {
        let stamp = || {
            let shared = self.current();
            let files = shared.config.tls.iter().flat_map(|files| [&files.certificate, &files.key]);
            // The stamp includes the mode: chmod(1) may have made a file readable.
            files.map(|file| file.metadata().ok().map(|found| FileStamp::of(&found))).collect()
        };
        let mut seen: Vec<_> = stamp();
        let (mut end, clock) = (CertificateEnd::default(), self.current().lasting.ids.clock());
        let mut log_end = || end.log(self.current().tls.as_ref(), clock.now());
        let mut tidying: Option<JoinHandle<()>> = None;
        let (mut expiring, plan): (Vec<JoinHandle<()>>, Arc<ExpiryPlan>) = Default::default();
        loop {
            log_end();
            expiring.retain(|pass| !pass.is_finished());
            // If a pass hangs in one domain, another pass handles the others.
            if expiring.len() <= plan.stuck().min(STUCK_PASSES_LIMIT) {
                expiring.extend(self.expire(&plan, cancel));
            }
            // Tidy in a thread: a disk that hangs must delay neither a new certificate nor the end of the process.
            if tidying.as_ref().is_none_or(JoinHandle::is_finished) {
                let (spool, first) = (self.current().spool.clone(), tidying.is_none());
                let tidy = move || {
                    if first {
                        spool.remove_old_destinations();
                    }
                    spool.tidy();
                };
                tidying = threads::spawn("tidy", tidy).ok();
            }
            if cancel.wait_until(Some(Instant::now() + UPKEEP_INTERVAL)) {
                break;
            }
            let now = stamp();
            if now != seen {
                self.reload_certificate();
                seen = now;
            }
        }
        let late = Instant::now() + LAST_TIDYING;
        while tidying.iter().chain(&expiring).any(|thread| !thread.is_finished()) && Instant::now() < late {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Begins a pass of expiry over held mail, with the current configuration. `None`: the system has no thread.
    fn expire(&self, plan: &Arc<ExpiryPlan>, cancel: &CancelToken) -> Option<JoinHandle<()>> {
        let (shared, plan, cancel, reloader) = (self.current(), plan.clone(), cancel.clone(), self.clone());
        let pass = move || {
            // A reload ends the pass: the account may be removed, or its `expire-after` corrected. The next pass goes on.
            let is_over = || cancel.is_cancelled() || !Arc::ptr_eq(&shared.spool, &reloader.current().spool);
            let pass = ExpiryPass {
                accounts: &shared.config.accounts,
                spool: &shared.spool,
                reporter: &shared.turn_settings.reporter,
                is_over: &is_over,
                wait: Duration::ZERO,
            };
            pass.run(&plan);
        };
        threads::spawn("expiry", pass).ok()
    }
}

/// How many passes may hang at a time, each in a domain whose disk hangs, before no other begins.
const STUCK_PASSES_LIMIT: usize = 4;

/// How often the upkeep thread does its checks.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(60);

/// How long the end of the process waits for tidying and expiry. Both may be interrupted anywhere.
const LAST_TIDYING: Duration = Duration::from_secs(1);

/// The state of this configuration, with the part of `old` that outlives reloads.
fn renew(mut config: ProviderConfig, old: &Shared) -> Result<Shared, String> {
    // The spool changes only at a restart: sessions and the relay use the old one.
    config.spool.clone_from(&old.config.spool);
    let shared = configure(config, old.lasting.clone(), Some(&old.worker))?;
    let (limits, accounts) = (&shared.config.limits, &shared.config.accounts);
    shared.lasting.limiter.set_limits(limits.of_connections(&shared.config.timeouts));
    shared.lasting.turns.set_limit(limits.turned_sessions);
    shared.lasting.lost.update(&old.config.accounts, accounts);
    shared.lasting.relay.reload(shared.worker.clone());
    Ok(shared)
}

fn log_failure(error: &str, consequence: &str) {
    log::error!("event=reload-failed error={} consequence={consequence:?}", quoted(error));
}

/// The end of a certificate's validity, for the log; `-`: there is no certificate.
fn end_of(tls: Option<&ServerTls>) -> String {
    tls.and_then(ServerTls::until).map_or_else(|| "-".to_owned(), Timestamp::rfc3339)
}

/// Logs what a reload has changed, and domains without an account that have mail.
fn log_reload(old: &Shared, new: &Shared) {
    let names =
        |shared: &Shared| shared.config.accounts.iter().map(|account| account.name.clone()).collect::<HashSet<_>>();
    let (before, after) = (names(old), names(new));
    log_skipped(&new.config);
    let (added, removed) = (after.difference(&before).count(), before.difference(&after).count());
    let until = end_of(new.tls.as_ref());
    log::info!("event=reloaded accounts={} added={added} removed={removed} certificate-until={until}", after.len());
    let domains = old.config.accounts.iter().flat_map(|account| &account.domains);
    for domain in domains.filter(|domain| new.config.accounts.owner(domain).is_none()) {
        let messages = new.spool.queue().count(&new.spool.name(&SpoolQueue::Held(domain.clone())), usize::MAX);
        if let Ok(messages @ 1..) = messages {
            log::warn!("event=mail-without-account domain={domain} messages={messages}");
        }
    }
}

/// The keys whose values a reload does not change, each with its value at the start.
struct Fixed([(&'static str, String); 6]);

impl Fixed {
    fn of(config: &ProviderConfig) -> Fixed {
        let ProviderConfig { inbound, odmr, spool, owner, .. } = config;
        Fixed([
            ("[inbound] `listen`", format!("{:?}", inbound.listen)),
            ("[odmr] `listen`", format!("{:?}", odmr.listen)),
            ("[odmr] `listen-tls`", format!("{:?}", odmr.listen_tls)),
            ("`spool`", format!("{spool:?}")),
            ("`user`", format!("{:?}", owner.as_ref().map(|owner| &owner.user))),
            ("`group`", format!("{:?}", owner.as_ref().map(|owner| &owner.group))),
        ])
    }

    /// The keys that have other values in this configuration.
    fn changed(&self, config: &ProviderConfig) -> Vec<&'static str> {
        let now = Fixed::of(config);
        self.0.iter().zip(&now.0).filter(|(fixed, now)| fixed != now).map(|((key, _), _)| *key).collect()
    }
}

/// Logs the customers' files that are skipped.
pub fn log_skipped(config: &ProviderConfig) {
    for skipped in config.accounts.skipped() {
        let (file, error) = (quoted(skipped.error.source.file.display()), quoted(&skipped.error));
        log::error!("event=customer-skipped file={file} error={error}");
    }
}
