//! `odmr pull`: one call, with its progress on a terminal; or the daemon's start and its signals.

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use getopts::{Matches, Options};
use log::LevelFilter;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

use super::exit::{ExitError, Sysexit};
use super::logging::{self, LogTarget};
use super::process::{
    become_owner, cancel_at_signal, check_not_root, config_path, owner_to_become, print, raise_descriptor_limit,
};
use crate::config::CustomerConfig;
use crate::customer::Summary;
use crate::customer::counters::CallCounters;
use crate::customer::daemon::{self, DaemonEvent};
use crate::customer::pull::Customer;
use crate::ids::Ids;
use crate::net::cancel::CancelToken;
use crate::net::tls;
use crate::privileges::SystemUser;

/// The progress line appears after this time: most calls are over before.
const PROGRESS_DELAY: Duration = Duration::from_secs(1);

/// How often the progress line is written.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// The options of `odmr pull`.
pub(super) fn options(options: &mut Options) {
    options.optflag("v", "verbose", "logs the dialogue too, in transcript form, without secrets");
    options.optflag(
        "",
        "daemon",
        "calls by [schedule], and accepts mail by SMTP where [outgoing] says, until SIGTERM; SIGUSR1: call at once; \
         SIGHUP: read the configuration again",
    );
    options.optflag("", "now", "makes the running daemon call at once; if no daemon runs, calls");
    options.optflag("q", "quiet", "prints errors only: no summary, no progress");
}

/// Makes one call, runs the daemon, or makes the running daemon call.
pub(super) fn run(matches: &Matches) -> Result<(), ExitError> {
    let (is_daemon, now) = (matches.opt_present("daemon"), matches.opt_present("now"));
    if is_daemon && now {
        let text = "--daemon and --now exclude each other: --now is for a daemon that runs already";
        return Err(ExitError::usage(text, "odmr pull -h"));
    }
    let quiet = matches.opt_present("quiet");
    // On a terminal the summary and the progress line replace the log.
    let interactive = !is_daemon && io::stderr().is_terminal() && !matches.opt_present("verbose");
    let level = match (quiet, interactive) {
        (true, _) => LevelFilter::Error,
        (false, true) => LevelFilter::Warn,
        (false, false) => logging::verbosity(matches),
    };
    logging::start(LogTarget::Stderr, level);
    let path = config_path(matches);
    let config = CustomerConfig::load(&path)?;
    let owner = owner_to_become(&config)?;
    check_not_root(&config, &path)?;
    let ids = Ids::system(tls::random);
    let cancel = CancelToken::new()?;
    raise_descriptor_limit();
    if is_daemon {
        return run_daemon(&path, &config, owner, &ids, &cancel);
    }
    let customer = Customer::new(&config, &ids)?;
    become_owner(&config, owner)?;
    if now && let Some(process) = daemon::running(&config)? {
        return request_call(process, quiet);
    }
    cancel_at_signal(&cancel)?;
    call(&customer, &cancel, quiet, interactive)
}

/// Calls each provider once, and prints the summary.
fn call(customer: &Customer, cancel: &CancelToken, quiet: bool, interactive: bool) -> Result<(), ExitError> {
    let (begun, counters) = (Instant::now(), Arc::<CallCounters>::default());
    let progress = (interactive && !quiet).then(|| ProgressLine::start(&counters)).transpose()?;
    let called = customer.pull(cancel, &counters);
    drop(progress);
    let summary = counters.summary(begun.elapsed().as_secs_f64());
    // Mail that came before a failure stays, so the summary is of interest also then.
    let is_empty = summary == Summary { seconds: summary.seconds, ..Summary::default() };
    let printed = match quiet || called.is_err() && is_empty {
        true => Ok(()),
        false => print(&format!("{summary}\n")),
    };
    // A failed call decides the exit code, not a summary that could not be printed.
    called?;
    printed
}

fn run_daemon(
    path: &Path, config: &CustomerConfig, owner: Option<SystemUser>, ids: &Ids, cancel: &CancelToken,
) -> Result<(), ExitError> {
    // Ports below 1024 must be bound before the rights of root are given up.
    let bound = daemon::BoundDaemon::new(config, ids)?;
    let becomes_owner = owner.is_some();
    become_owner(config, owner)?;
    let (events, receiver) = daemon::event_channel();
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGUSR1])?;
    let (sender, stop) = (events.clone(), cancel.clone());
    std::thread::spawn(move || {
        for signal in signals.forever() {
            match signal {
                SIGHUP => sender.send(DaemonEvent::Reload),
                SIGUSR1 => sender.send(DaemonEvent::CallNow),
                _ => {
                    log::info!("event=stopping signal={signal}");
                    stop.cancel();
                    sender.send(DaemonEvent::Stop);
                }
            }
        }
    });
    let load = || CustomerConfig::load(path).map_err(|error| error.to_string());
    // The owner may not be able to read files that root could.
    if becomes_owner && let Err(error) = load() {
        log::warn!("event=no-reload error={error:?} way-out=\"let `user` read it\"");
    }
    daemon::run(bound, &load, ids, cancel, (events, receiver))?;
    log::info!("event=stopped");
    Ok(())
}

/// Makes the daemon call at once. `process` is its process id.
fn request_call(process: i32, quiet: bool) -> Result<(), ExitError> {
    let pid = rustix::process::Pid::from_raw(process)
        .ok_or_else(|| ExitError::new(Sysexit::OsError, format!("{process} is not a process id")))?;
    rustix::process::kill_process(pid, rustix::process::Signal::USR1).map_err(|error| {
        let text = format!("no signal can be sent to the daemon, process {process}: {error}; be its user, or root");
        ExitError::new(Sysexit::NoPermission, text)
    })?;
    if quiet { Ok(()) } else { print(&format!("the daemon, process {process}, calls now\n")) }
}

/// Shows on a terminal how far a call is, until it is dropped.
struct ProgressLine {
    ended: CancelToken,
    thread: Option<JoinHandle<()>>,
}

impl ProgressLine {
    fn start(counters: &Arc<CallCounters>) -> io::Result<ProgressLine> {
        let ended = CancelToken::new()?;
        let (counters, end) = (counters.clone(), ended.clone());
        let show = move || {
            let mut shown = false;
            let mut next = Instant::now() + PROGRESS_DELAY;
            while !end.wait_until(Some(next)) {
                let _ = write!(io::stderr(), "\r{}\x1b[K", counters.progress());
                shown = true;
                next = Instant::now() + PROGRESS_INTERVAL;
            }
            if shown {
                let _ = write!(io::stderr(), "\r\x1b[K");
            }
        };
        let thread = std::thread::Builder::new().name("progress".to_owned()).spawn(show)?;
        Ok(ProgressLine { ended, thread: Some(thread) })
    }
}

impl Drop for ProgressLine {
    fn drop(&mut self) {
        self.ended.cancel();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
