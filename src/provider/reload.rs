//! The configuration read anew: at SIGHUP, and the certificate when its files change.
//!
//! What all threads share is made from the configuration, and made once more at a reload. New connections begin with the
//! new one, and sessions go on with its accounts at the next MAIL, AUTH or ATRN; transactions, turned sessions and the
//! relay's attempts under way end with the one that they began with.

use std::collections::HashSet;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::{Builder, JoinHandle};
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

/// Makes what depends on the configuration. `earlier`: the relay's context before a reload.
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

/// Has the state that new connections begin with, and replaces it.
#[derive(Clone)]
pub struct Reloader(Arc<ReloaderState>);

struct ReloaderState {
    current: RwLock<Arc<Shared>>,
    /// What stays until a restart.
    fixed: Fixed,
    /// The certificate may change while the configuration is read.
    one_at_a_time: Mutex<()>,
}

impl Reloader {
    /// `shared`: the state at the start.
    pub fn new(shared: Arc<Shared>) -> Reloader {
        let fixed = Fixed::of(&shared.config);
        Reloader(Arc::new(ReloaderState { current: RwLock::new(shared), fixed, one_at_a_time: Mutex::default() }))
    }

    /// The state that a new connection, or a new transaction, begins with.
    pub fn current(&self) -> Arc<Shared> {
        self.0.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn replace(&self, shared: &Arc<Shared>) {
        *self.0.current.write().unwrap_or_else(PoisonError::into_inner) = shared.clone();
    }

    /// Reads the configuration anew. Listeners, sessions and turned sessions stay; those of an account that is removed end
    /// after the message under way. A customer's file with a mistake leaves its account as it was. The result is logged: a
    /// mistake anywhere else leaves everything as it was.
    pub fn reload(&self, file: &Path) {
        let _one = self.0.one_at_a_time.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.current();
        let accounts = &old.config.accounts;
        let renewed = ProviderConfig::load_again(file, accounts).map_err(|error| error.to_string());
        let changed = renewed.as_ref().map(|config| self.0.fixed.changed(config)).unwrap_or_default();
        match renewed.and_then(|config| renew(config, &old)) {
            Ok(shared) => {
                let shared = Arc::new(shared);
                self.replace(&shared);
                // An account that had no quota has one now.
                shared.spool.recount();
                shared.record_reload(None);
                log_reload(&old, &shared);
                if !changed.is_empty() {
                    let what = format!("{} changed, and stays as it was until then", changed.join(", "));
                    log::warn!("event=restart-needed reason={what:?}");
                }
            }
            Err(error) => {
                old.record_reload(Some(&error));
                log_failure(&error, "the old configuration holds");
            }
        }
    }

    /// Reads the certificate and its key anew. If they do not fit each other, the old ones stay.
    fn reload_certificate(&self) {
        let _one = self.0.one_at_a_time.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.current();
        let Some(files) = &old.config.tls else { return };
        match files.load() {
            Ok(tls) => {
                let until = end_of(Some(&tls));
                self.replace(&Arc::new(Shared { tls: Some(tls), ..Shared::clone(&old) }));
                log::info!("event=certificate-reloaded certificate-until={until}");
            }
            Err(error) => log_failure(&error.to_string(), "the old certificate holds"),
        }
    }

    /// Looks once a minute whether the files of the certificate have changed, until it is cancelled. Logs its end, lets held
    /// mail expire, and removes what is left over in the spool, once a day.
    pub fn keep_up(&self, cancel: &CancelToken) {
        let stamp = || {
            let shared = self.current();
            let files = shared.config.tls.iter().flat_map(|files| [&files.certificate, &files.key]);
            // Also what chmod(1) changes: a file that could not be read may be readable now.
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
            // Passes that hang leave the other domains to the next one.
            if expiring.len() <= plan.stuck().min(STUCK_PASSES_LIMIT) {
                expiring.extend(self.expire(&plan, cancel));
            }
            // The disk of a domain may hang: that must hold up neither a new certificate nor the end.
            if tidying.as_ref().is_none_or(JoinHandle::is_finished) {
                let (spool, first) = (self.current().spool.clone(), tidying.is_none());
                let tidy = move || {
                    if first {
                        spool.remove_old_destinations();
                    }
                    spool.tidy();
                };
                tidying = Builder::new().name("tidy".to_owned()).spawn(tidy).ok();
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

    /// Begins a pass over held mail by the configuration as it is now. `None`: the system has no thread.
    fn expire(&self, plan: &Arc<ExpiryPlan>, cancel: &CancelToken) -> Option<JoinHandle<()>> {
        let (shared, plan, cancel, reloader) = (self.current(), plan.clone(), cancel.clone(), self.clone());
        let pass = move || {
            // After a reload the next pass goes on: the account may be gone, or a mistake in `expire-after` be mended.
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
        Builder::new().name("expiry".to_owned()).spawn(pass).ok()
    }
}

/// Passes over held mail that may hang, each in a domain whose disk does.
const STUCK_PASSES_LIMIT: usize = 4;

/// How often the files of the certificate and the time are looked at.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(60);

/// How long the end waits for the daily tidying and for expiry, which may end anywhere.
const LAST_TIDYING: Duration = Duration::from_secs(1);

/// The state with this configuration; what lasts over reloads is that of `old`.
fn renew(mut config: ProviderConfig, old: &Shared) -> Result<Shared, String> {
    // Sessions, turned sessions and the relay go on with the old one until a restart.
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

/// The end of a certificate's validity, for the log; `-`: there is none.
fn end_of(tls: Option<&ServerTls>) -> String {
    tls.and_then(ServerTls::until).map_or_else(|| "-".to_owned(), Timestamp::rfc3339)
}

/// Logs what a reload has changed, and what it has not.
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

/// What a reload leaves as it was at the start, by its keys.
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

    /// The keys whose values in a file are others.
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
