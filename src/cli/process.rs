//! What the subcommands do with their own process: its user, its signals, its limits, its standard output.

use std::fs::{self, Metadata};
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use getopts::Matches;
use rustix::process::{Resource, Rlimit};
use signal_hook::consts::{
    SIGALRM, SIGHUP, SIGINT, SIGIO, SIGPROF, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGVTALRM, SIGXCPU, SIGXFSZ,
};
use signal_hook::iterator::Signals;

use super::exit::{ExitError, Sysexit};
use crate::config::{ConfigError, CustomerConfig, MailOwner};
use crate::net::cancel::CancelToken;
use crate::net::descriptor::Waiting;
use crate::platform;
use crate::privileges::SystemUser;

/// The file that `-c` names.
pub(super) fn config_path(matches: &Matches) -> PathBuf {
    PathBuf::from(matches.opt_str("config").unwrap_or_default())
}

/// Writes to standard output.
pub(super) fn print(text: &str) -> Result<(), ExitError> {
    Ok(Waiting(io::stdout()).write_all(text.as_bytes())?)
}

/// The user that this process must become before it touches mail; `None` if it stays what it is.
///
/// # Errors
///
/// The system has no such user or group.
pub(super) fn owner_to_become(config: &CustomerConfig) -> Result<Option<SystemUser>, ConfigError> {
    let owner = config.owner.as_ref().filter(|_| rustix::process::geteuid().is_root());
    owner.map(find_owner).transpose()
}

/// The system's user and group for `user` and `group` of the configuration.
///
/// # Errors
///
/// The system has no such user or group.
pub(super) fn find_owner(owner: &MailOwner) -> Result<SystemUser, ConfigError> {
    SystemUser::find(&owner.user, owner.group.as_deref()).map_err(|text| owner.error(text))
}

/// Checks that root does not write into mailboxes of another user, who could not read what root creates.
///
/// # Errors
///
/// This process is root, `user` is not configured, and the mailboxes belong to another user.
pub(super) fn check_not_root(config: &CustomerConfig, path: &Path) -> Result<(), ExitError> {
    let root = &config.mailboxes.root;
    let of_another = |found: Metadata| found.uid() != 0;
    if rustix::process::geteuid().is_root() && config.owner.is_none() && root.metadata().is_ok_and(of_another) {
        let text = format!("{} belongs to another user: name that user in `user`, or be that user", root.display());
        return Err(ExitError::new(Sysexit::Config, format!("{}: {text}", path.display())));
    }
    Ok(())
}

/// Becomes the owner of the mail, for good, and sets the umask. Directories that the owner could not create are created
/// before. Call it before there are threads.
///
/// # Errors
///
/// The directories cannot be created, or the rights of root cannot be given up.
pub(super) fn become_owner(config: &CustomerConfig, owner: Option<SystemUser>) -> Result<(), ExitError> {
    let os_error = |text: String| ExitError::new(Sysexit::OsError, text);
    if let Some(user) = owner {
        let queue = config.outgoing.as_ref().map(|outgoing| &outgoing.queue);
        for directory in [Some(&config.mailboxes.root), queue].into_iter().flatten() {
            user.make_directory(directory).map_err(|error| os_error(format!("{}: {error}", directory.display())))?;
        }
        user.assume().map_err(os_error)?;
    }
    // The umask is for mailboxes; queues and locks set a stricter mode of their own.
    platform::set_umask(config.mailboxes.umask);
    Ok(())
}

/// Becomes the owner of a provider's spool, if this process is root and the spool is another user's: what root made there,
/// `serve` could not read. Call it before there are threads.
///
/// # Errors
///
/// The owner is not known, or the rights of root cannot be given up.
pub(super) fn become_spool_owner(spool: &Path) -> Result<(), ExitError> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let owner = SystemUser::owner_of(spool).map_err(|text| ExitError::new(Sysexit::Config, text))?;
    owner.map_or(Ok(()), |owner| owner.assume().map_err(|text| ExitError::new(Sysexit::OsError, text)))
}

/// Signals that end a process by default, but no daemon: a stray one must not cut its sessions. SIGPIPE is not among them,
/// because the runtime of Rust ignores it, and SIGXFSZ not, because [`catch_file_size_signal`] catches it.
const IGNORED_BY_DAEMONS: [i32; 9] = [SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGALRM, SIGVTALRM, SIGPROF, SIGXCPU, SIGIO];

/// The signals of a daemon. None of them ends the process any more; those that come before [`DaemonSignals::handle`] wait.
pub(super) struct DaemonSignals(Signals);

impl DaemonSignals {
    /// Catches the signals. A daemon does it first: what a supervisor sends while the daemon starts must not end it.
    ///
    /// # Errors
    ///
    /// The signal handlers cannot be installed.
    pub fn catch() -> io::Result<DaemonSignals> {
        Signals::new([SIGTERM, SIGINT].iter().chain(&IGNORED_BY_DAEMONS)).map(DaemonSignals)
    }

    /// Handles the signals in a thread of its own: SIGTERM and SIGINT are logged and cancel the token. Then `act` is called
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
    thread::Builder::new().name("signals".to_owned()).spawn(move || signals.forever().for_each(act)).map(drop)
}

/// Whether this process ignores SIGHUP. Only Linux can tell without unsafe code. Elsewhere it is true if neither stdout nor
/// stderr is a terminal, because that is how nohup(1) starts a command.
fn ignores_hangup() -> bool {
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
