//! What the subcommands do with their own process: its user, its signals, its limits, its standard output.

use std::fs::Metadata;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;

use getopts::Matches;
use rustix::process::{Resource, Rlimit};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::exit::{ExitError, Sysexit};
use crate::config::{ConfigError, CustomerConfig, MailOwner};
use crate::net::cancel::CancelToken;
use crate::privileges::SystemUser;

/// The file that `-c` names.
pub(super) fn config_path(matches: &Matches) -> PathBuf {
    PathBuf::from(matches.opt_str("config").unwrap_or_default())
}

/// Writes to standard output.
pub(super) fn print(text: &str) -> Result<(), ExitError> {
    Ok(io::stdout().write_all(text.as_bytes())?)
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
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(config.mailboxes.umask));
    Ok(())
}

/// Logs SIGTERM or SIGINT and cancels the token.
///
/// # Errors
///
/// The signal handlers cannot be installed, or the system has no thread left.
pub(super) fn cancel_at_signal(cancel: &CancelToken) -> io::Result<()> {
    let cancel = cancel.clone();
    at_signals(&[SIGTERM, SIGINT], move |signal| {
        log::info!("event=stopping signal={signal}");
        cancel.cancel();
    })
}

/// Calls `act` at each of these signals, in a thread of its own.
///
/// # Errors
///
/// The signal handlers cannot be installed, or the system has no thread left.
pub(super) fn at_signals(signals: &[i32], act: impl FnMut(i32) + Send + 'static) -> io::Result<()> {
    let mut signals = Signals::new(signals)?;
    thread::Builder::new().name("signals".to_owned()).spawn(move || signals.forever().for_each(act)).map(drop)
}

/// Raises the soft limit of open descriptors to the hard one: each connection needs one, and there may be thousands.
pub(super) fn raise_descriptor_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    let _ = rustix::process::setrlimit(Resource::Nofile, raised);
}
