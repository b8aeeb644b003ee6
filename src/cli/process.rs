//! The process of a subcommand: its supervisor, its signals, its limits, its standard output.

use std::fmt::Display;
use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use getopts::{Matches, Options};
use rustix::process::{Resource, Rlimit};
use signal_hook::consts::{
    SIGALRM, SIGHUP, SIGINT, SIGIO, SIGPROF, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGVTALRM, SIGXCPU, SIGXFSZ,
};
use signal_hook::iterator::Signals;

use super::exit::{ExitError, Sysexit};
use super::terminal::fitted;
use crate::net::cancel::CancelToken;
use crate::net::descriptor::Waiting;
use crate::net::inherited::{self, PassedSockets, TakeError};
use crate::net::readiness::Readiness;
use crate::threads;

/// The file that `-c` names.
pub(super) fn config_path(matches: &Matches) -> PathBuf {
    PathBuf::from(matches.opt_str("config").unwrap_or_default())
}

/// Writes to standard output. It is not an error if the reader has closed it, as head(1) does.
///
/// # Errors
///
/// It cannot be written.
pub(super) fn print(text: &str) -> Result<(), ExitError> {
    written(Waiting(io::stdout()).write_all(text.as_bytes()))
}

/// The result of writing to standard output, as for [`print()`].
///
/// # Errors
///
/// It could not be written.
pub(super) fn written(result: io::Result<()>) -> Result<(), ExitError> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(error) => Err(ExitError::new(Sysexit::InputOutput, format!("standard output: {error}"))),
        Ok(()) => Ok(()),
    }
}

/// Writes text for a person to standard output, fitted to the width of a terminal.
///
/// # Errors
///
/// Those of [`print()`].
pub(super) fn print_fitted(text: &str) -> Result<(), ExitError> {
    print(&fitted(text, io::stdout()))
}

/// Takes over the descriptors that a supervisor has passed to this process: the sockets of `LISTEN_FDS`, and that of
/// `--ready-fd`. Call it before this process opens descriptors.
///
/// # Errors
///
/// A socket or the descriptor cannot be used.
pub(super) fn supervision(matches: &Matches) -> Result<(PassedSockets, Readiness), ExitError> {
    let option = matches.opt_str(READY_FD);
    let wrong = |text: &dyn Display| {
        ExitError::new(Sysexit::Usage, format!("--{READY_FD} {}: {text}", option.as_deref().unwrap_or_default()))
    };
    let number = match option.as_ref().map(|number| number.parse()) {
        None => None,
        Some(Ok(number @ 3..)) => Some(number),
        Some(Ok(0..3)) => {
            return Err(wrong(&"0, 1 and 2 are stdin, stdout and stderr; write another, for s6 into notification-fd"));
        }
        Some(_) => return Err(wrong(&"not the number of a descriptor, such as 3")),
    };
    let (sockets, pipe) = inherited::take(number).map_err(|error| match error {
        TakeError::ReadyFd(error) => {
            wrong(&format!("{error}; write the number that the supervisor listens on, for s6 that in notification-fd"))
        }
        TakeError::Sockets(text) => ExitError::new(Sysexit::Config, text),
    })?;
    Ok((sockets, Readiness::new(pipe)))
}

/// The option that names a descriptor for readiness.
const READY_FD: &str = "ready-fd";

/// Adds the option of daemons that report their readiness.
pub(super) fn readiness_option(options: &mut Options) {
    let help = "writes a newline to descriptor N when it is ready, and closes it, for s6; others: NOTIFY_SOCKET";
    options.optopt("", READY_FD, help, "N");
}

/// Whether an option is given that only a daemon has.
pub(super) fn has_readiness_option(matches: &Matches) -> bool {
    matches.opt_present(READY_FD)
}

/// Signals that end a process by default, and must not end a daemon: a stray one would cut its sessions. SIGPIPE is not among
/// them, because the runtime of Rust ignores it, nor SIGXFSZ, because [`catch_file_size_signal`] catches it.
const IGNORED_BY_DAEMONS: [i32; 9] = [SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGALRM, SIGVTALRM, SIGPROF, SIGXCPU, SIGIO];

/// The signals of a daemon. None of them ends the process any more; signals before [`DaemonSignals::handle`] wait for it.
pub(super) struct DaemonSignals(Signals);

impl DaemonSignals {
    /// Catches the signals. A daemon calls it first: a signal of its supervisor during the start must not end it.
    ///
    /// # Errors
    ///
    /// The signal handlers cannot be installed.
    pub fn catch() -> io::Result<DaemonSignals> {
        Signals::new([SIGTERM, SIGINT].iter().chain(&IGNORED_BY_DAEMONS)).map(DaemonSignals)
    }

    /// Handles the signals in a new thread: SIGTERM and SIGINT are logged and cancel the token. Then `act` is called
    /// with each signal; it returns whether the signal has a meaning for this daemon. The others are logged.
    ///
    /// # Errors
    ///
    /// The system has no thread left.
    pub fn handle(self, cancel: &CancelToken, mut act: impl FnMut(i32) -> bool + Send + 'static) -> io::Result<()> {
        let cancel = cancel.clone();
        for_each_signal(self.0, move |signal| {
            let stops = matches!(signal, SIGTERM | SIGINT);
            if stops {
                stop(signal, &cancel);
            }
            if !act(signal) && !stops {
                log::info!("event=signal-ignored signal={signal}");
            }
        })
    }
}

/// Cancels the token at SIGTERM, SIGINT, and SIGHUP: when its terminal is closed, a command ends in good order. SIGHUP
/// remains ignored if nohup(1) has started this process.
///
/// # Errors
///
/// The signal handlers cannot be installed, or the system has no thread left.
pub(super) fn cancel_at_signal(cancel: &CancelToken) -> io::Result<()> {
    let hangup = (!ignores_hangup()).then_some(SIGHUP);
    let (signals, cancel) = (Signals::new([SIGTERM, SIGINT].into_iter().chain(hangup))?, cancel.clone());
    for_each_signal(signals, move |signal| stop(signal, &cancel))
}

fn stop(signal: i32, cancel: &CancelToken) {
    log::info!("event=stopping signal={signal}");
    cancel.cancel();
}

fn for_each_signal(mut signals: Signals, act: impl FnMut(i32) + Send + 'static) -> io::Result<()> {
    threads::spawn("signals", move || signals.forever().for_each(act)).map(drop)
}

/// Whether this process ignored SIGHUP at the first call of this function. Only on Linux can this be found out without
/// unsafe code. On other systems it is true if neither stdout nor stderr is a terminal, because that is how nohup(1)
/// starts a command.
pub(super) fn ignores_hangup() -> bool {
    static IGNORED: OnceLock<bool> = OnceLock::new();
    *IGNORED.get_or_init(read_ignores_hangup)
}

fn read_ignores_hangup() -> bool {
    let Ok(status) = fs::read_to_string("/proc/self/status") else {
        return !io::stdout().is_terminal() && !io::stderr().is_terminal();
    };
    // proc(5): a mask in hexadecimal digits, in which the lowest bit is signal 1.
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask >> (SIGHUP - 1) & 1 == 1)
}

/// Catches SIGXFSZ, so that a write beyond the limit of file sizes (RLIMIT_FSIZE) is an error as on a full disk, and not
/// the end of the process. The signal is not logged: the log may be the file that has reached the limit.
///
/// # Errors
///
/// The signal handler cannot be installed.
pub(super) fn catch_file_size_signal() -> io::Result<()> {
    signal_hook::flag::register(SIGXFSZ, Arc::default()).map(drop)
}

/// Raises the soft limit of open descriptors to the hard one: each connection needs one, and there may be thousands.
pub(super) fn raise_descriptor_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    let _ = rustix::process::setrlimit(Resource::Nofile, raised);
}
