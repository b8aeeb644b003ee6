//! `odmr pull`: one call to each provider, or the daemon.
//!
//! On a terminal a call shows its progress, and at its end what it has sent and received. The daemon's signals are handled
//! here: SIGTERM and SIGINT end it, SIGHUP reloads the configuration, SIGUSR1 asks for a call; the others are ignored. One
//! call ends at SIGHUP too.

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use getopts::{Matches, Options};
use log::LevelFilter;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};

use super::confine::confine_customer;
use super::exit::{ExitError, Sysexit};
use super::logging::{self, LogTarget};
use super::owner::{become_customer_owner, check_not_root, log_prevented_reload, owner_to_become, reload_errors};
use super::process::{self, DaemonSignals, print};
use crate::config::CustomerConfig;
use crate::customer::counters::CallCounters;
use crate::customer::daemon::{self, DaemonEvent};
use crate::customer::pull::Customer;
use crate::customer::submission::PLAIN_NAME;
use crate::customer::{CallError, Summary};
use crate::ids::Ids;
use crate::net::cancel::CancelToken;
use crate::net::descriptor::Waiting;
use crate::net::inherited::PassedSockets;
use crate::net::readiness::Readiness;
use crate::net::tls;
use crate::plural::counted;
use crate::privileges::SystemUser;
use crate::threads;

/// The progress line appears after this time; most calls end before.
const PROGRESS_DELAY: Duration = Duration::from_secs(1);

/// How often the progress line is written.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// The options of `odmr pull`.
pub(super) fn options(options: &mut Options) {
    options.optflag("v", "verbose", "logs the dialogue too, in transcript form, without secrets");
    options.optflag(
        "",
        "daemon",
        "calls by [schedule], and accepts mail by SMTP at `listen` of [outgoing], until SIGTERM; SIGUSR1: call at once; \
         SIGHUP: read the configuration again",
    );
    process::readiness_option(options);
    options.optflag("", "now", "makes the running daemon call at once; if no daemon runs, calls");
    let help = "defers incoming mail that would be rejected (451 in place of 5yz), and prints it: for the first call";
    options.optflag("", "soft-bounce", help);
    options.optflag("q", "quiet", "prints errors, and recipients that were not accepted: no summary, no progress");
    logging::options(options);
}

/// Makes one call to each provider, runs the daemon, or makes the running daemon call.
///
/// # Errors
///
/// The first failure of a call, or that recipients were deferred here. Mail that was sent and received before that is
/// not affected.
pub(super) fn run(matches: &Matches) -> Result<(), ExitError> {
    let (is_daemon, now) = (matches.opt_present("daemon"), matches.opt_present("now"));
    let wrong = |text: &str| Err(ExitError::usage(text, "odmr pull -h"));
    if is_daemon && now {
        return wrong("--daemon and --now exclude each other: --now is for a daemon that runs already");
    }
    let soft_bounce = matches.opt_present("soft-bounce");
    if soft_bounce && (is_daemon || now) {
        return wrong("--soft-bounce is for one call, without --daemon and --now");
    }
    if !is_daemon && process::has_readiness_option(matches) {
        return wrong("--ready-fd is for --daemon");
    }
    let supervision = is_daemon.then(|| process::supervision(matches)).transpose()?;
    let quiet = matches.opt_present("quiet");
    // On a terminal the summary and the progress line replace the log.
    let interactive = !is_daemon && io::stderr().is_terminal() && !matches.opt_present("verbose");
    let target = LogTarget::new(matches, false);
    let level = match (quiet, interactive) {
        // `--quiet` does not affect the system log.
        _ if target.is_syslog() => logging::verbosity(matches),
        (true, _) => LevelFilter::Error,
        (false, true) => LevelFilter::Warn,
        (false, false) => logging::verbosity(matches),
    };
    target.start(level, is_daemon);
    let signals = is_daemon.then(DaemonSignals::catch).transpose()?;
    let path = process::config_path(matches);
    let config = CustomerConfig::load(&path)?;
    let owner = owner_to_become(config.owner.as_ref())?;
    check_not_root(&config, &path)?;
    let ids = Ids::system(tls::random);
    process::raise_descriptor_limit();
    if let (Some(signals), Some(supervision)) = (signals, supervision) {
        return run_daemon(&path, &config, owner.as_ref(), &ids, signals, supervision);
    }
    let cancel = CancelToken::new()?;
    let mut customer = Customer::new(&config, &ids)?;
    customer.soft_bounce = soft_bounce;
    become_customer_owner(&config, owner.as_ref())?;
    if now && let Some(process) = daemon::running(&config)? {
        return request_call(process, quiet);
    }
    confine_customer(&config, false);
    process::cancel_at_signal(&cancel)?;
    customer.mailboxes.log_warnings();
    call(&customer, &cancel, quiet, interactive)
}

/// Calls each provider once, and prints the summary; if `quiet`, only the recipients that were not accepted.
///
/// # Errors
///
/// The first failure of a call; [`Sysexit::Temporary`] if recipients were deferred here.
fn call(customer: &Customer, cancel: &CancelToken, quiet: bool, interactive: bool) -> Result<(), ExitError> {
    let (begun, counters) = (Instant::now(), Arc::<CallCounters>::default());
    let called = thread::scope(|scope| {
        // The sender is dropped after the call, also by a panic; that ends the progress line.
        let (_under_way, ended) = mpsc::channel();
        if interactive && !quiet {
            let counters = &counters;
            threads::spawn_scoped(scope, "progress", move || show_progress(counters, &ended))?;
        }
        io::Result::Ok(customer.pull(cancel, &counters))
    })?;
    let summary = counters.summary(begun.elapsed().as_secs_f64());
    // A failure does not undo what was sent and received before it, so the summary is printed also then.
    let is_empty = summary == Summary { seconds: summary.seconds, ..Summary::default() };
    let text = match quiet {
        true => summary.failure_lines().join("\n"),
        false if called.is_err() && is_empty => String::new(),
        false => summary.to_string(),
    };
    // On one terminal or in one file the log comes before the summary.
    logging::write_out();
    let printed = if text.is_empty() { Ok(()) } else { print(&format!("{text}\n")) };
    // Otherwise a cron job that calls often would mail this error each time.
    if let (true, Err(CallError::TooSoon(_))) = (quiet, &called) {
        return Err(ExitError::new(Sysexit::Temporary, ""));
    }
    // If both the call and the printing failed, the call decides the exit code.
    called?;
    printed?;
    match summary.deferred {
        0 => Ok(()),
        deferred => {
            let text = format!(
                "{} deferred here, and the mail waits where it is: remove the cause that the replies name, and call again",
                counted(deferred, "recipient was", "recipients were")
            );
            Err(ExitError::new(Sysexit::Temporary, text))
        }
    }
}

/// Runs the daemon until SIGTERM or SIGINT. `owner`: the user to become, as in [`become_customer_owner`].
fn run_daemon(
    path: &Path, config: &CustomerConfig, owner: Option<&SystemUser>, ids: &Ids, signals: DaemonSignals,
    (sockets, readiness): (PassedSockets, Readiness),
) -> Result<(), ExitError> {
    let sockets = sockets.into_listeners(&[PLAIN_NAME], Some(PLAIN_NAME)).map_err(CallError::Config)?;
    // Ports below 1024 must be bound before the rights of root are given up.
    let bound = daemon::BoundDaemon::new(config, ids, sockets)?;
    let known = owner.map(|_| reload_errors(path)).unwrap_or_default();
    become_customer_owner(config, owner)?;
    confine_customer(config, true);
    let (sender, cancel) = (bound.events.clone(), CancelToken::new()?);
    signals.handle(&cancel, move |signal| {
        let event = match signal {
            SIGHUP => DaemonEvent::Reload,
            SIGUSR1 => DaemonEvent::CallNow,
            SIGTERM | SIGINT => DaemonEvent::Stop,
            _ => return false,
        };
        sender.send(event);
        true
    })?;
    let load = || CustomerConfig::load(path).map_err(|error| error.to_string());
    if let Some(owner) = owner {
        log_prevented_reload(owner, path, &known);
    }
    daemon::run(bound, &load, &readiness, &cancel)?;
    log::info!("event=stopped");
    Ok(())
}

/// Asks the daemon to call at once. `process`: its process id.
pub(super) fn request_call(process: i32, quiet: bool) -> Result<(), ExitError> {
    let pid = rustix::process::Pid::from_raw(process)
        .ok_or_else(|| ExitError::new(Sysexit::OsError, format!("{process} is not a process id")))?;
    rustix::process::kill_process(pid, rustix::process::Signal::USR1).map_err(|error| {
        let text = format!("no signal can be sent to the daemon, process {process}: {error}; be its user, or root");
        ExitError::new(Sysexit::NoPermission, text)
    })?;
    if quiet { Ok(()) } else { print(&format!("the daemon, process {process}, calls now\n")) }
}

/// Shows the progress of the call on the terminal, until the sender of `ended` is dropped.
fn show_progress(counters: &CallCounters, ended: &Receiver<()>) {
    let mut delay = PROGRESS_DELAY;
    while ended.recv_timeout(delay) == Err(RecvTimeoutError::Timeout) {
        let _ = Waiting(io::stderr()).write_all(format!("\r{}\x1b[K", counters.progress()).as_bytes());
        delay = PROGRESS_INTERVAL;
    }
    if delay == PROGRESS_INTERVAL {
        let _ = Waiting(io::stderr()).write_all(b"\r\x1b[K");
    }
}
