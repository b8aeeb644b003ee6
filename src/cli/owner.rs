//! `user` and `group`: a process that root has started becomes the owner of the mail. Checks of the rights of that
//! user.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::Access;

use super::exit::{ExitError, Sysexit};
use crate::config::{Config, ConfigError, CustomerConfig, MailOwner, ProviderAccount, ProviderConfig, line_of_key};
use crate::maildir::{shell_word, write_remedy};
use crate::net::trace::quoted;
use crate::platform;
use crate::privileges::SystemUser;
use crate::session::{Remote, RemoteSettings};
use crate::sorting::sort_by;

/// The user that this process must become before it reads or writes mail; `None`: it stays the same user.
///
/// # Errors
///
/// The system has no such user or group.
pub(super) fn owner_to_become(owner: Option<&MailOwner>) -> Result<Option<SystemUser>, ConfigError> {
    owner.filter(|_| rustix::process::geteuid().is_root()).map(MailOwner::find).transpose()
}

/// Checks that root does not write into mailboxes of another user, which could not read the files of root.
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

/// Becomes the owner of the mail until the process ends; `None`: this process stays the same user. Before that, makes
/// the directories that the owner could not make. Call it before there are threads.
///
/// # Errors
///
/// The directories cannot be created, or the rights of root cannot be given up.
pub(super) fn become_owner(owner: Option<&SystemUser>, directories: &[&Path]) -> Result<(), ExitError> {
    let Some(user) = owner else { return Ok(()) };
    for directory in directories {
        user.make_directory(directory)
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", directory.display())))?;
    }
    user.assume().map_err(|text| ExitError::new(Sysexit::OsError, text))
}

/// As root, becomes the owner of a provider's spool: `user`, or else the user that the spool belongs to. Otherwise
/// `serve` could not read the files of this command. Call it before there are threads.
///
/// # Errors
///
/// The owner is not known, or the rights of root cannot be given up.
pub(super) fn become_spool_owner(config: &ProviderConfig) -> Result<(), ExitError> {
    let owner = match owner_to_become(config.owner.as_ref())? {
        None if rustix::process::geteuid().is_root() => {
            SystemUser::owner_of(&config.spool).map_err(|text| ExitError::new(Sysexit::Config, text))?
        }
        owner => owner,
    };
    become_owner(owner.as_ref(), &[&config.spool])
}

/// The same for a customer's directories. Sets the umask too.
pub(super) fn become_customer_owner(config: &CustomerConfig, owner: Option<&SystemUser>) -> Result<(), ExitError> {
    let queue = config.outgoing.as_ref().map(|outgoing| &*outgoing.queue);
    let directories: Vec<_> = [Some(&*config.mailboxes.root), queue].into_iter().flatten().collect();
    become_owner(owner, &directories)?;
    // The umask is for mailboxes; queues and locks set a stricter mode of their own.
    platform::set_umask(config.mailboxes.umask);
    Ok(())
}

/// Logs the files that a reload cannot read because this process has become the owner. `known`: the errors before that.
pub(super) fn log_prevented_reload(owner: &SystemUser, path: &Path, known: &[String]) {
    for error in reload_errors(path).iter().filter(|error| !known.contains(error)) {
        let consequence = format!("a reload (SIGHUP) would fail; let {} read it", owner.name());
        log::warn!("event=reload-prevented error={} consequence={consequence:?}", quoted(error));
    }
}

/// The errors that a reload would meet: in the files of a configuration, and in those that they name.
pub(super) fn reload_errors(path: &Path) -> Vec<String> {
    let (config, findings) = Config::examine(path);
    let mut errors: Vec<_> = findings.errors.iter().chain(&findings.skipped).map(ToString::to_string).collect();
    let remote_error = |remote: &RemoteSettings, table: &str| {
        Remote::new(remote).err().map(|error| line_of_key(path, &[table, error.key]).error(error.text).to_string())
    };
    match config {
        None => {}
        Some(Config::Provider(config)) => {
            errors.extend(config.tls.iter().filter_map(|files| files.load().err()).map(|error| error.to_string()));
            errors.extend(config.relay.smarthost.iter().filter_map(|remote| remote_error(remote, "relay")));
        }
        Some(Config::Customer(config)) => {
            let of_provider =
                |provider: &ProviderAccount| Some(provider.error(&Remote::new(&provider.remote).err()?).to_string());
            errors.extend(config.providers.iter().filter_map(of_provider));
            let submission = config.outgoing.iter().filter_map(|outgoing| outgoing.submission.as_ref());
            errors.extend(submission.filter_map(|remote| remote_error(remote, "outgoing")));
        }
    }
    errors
}

/// Finds a directory that this process cannot write into: this one, or one below it, down to a depth.
///
/// # Errors
///
/// There is such a directory; the text names it, and what to type.
pub(super) fn check_owned(owner: &SystemUser, root: &Path, depth: usize) -> Result<(), String> {
    for directory in std::iter::once(root.to_owned()).chain(subdirectories(root, depth)) {
        if let Err(error) = rustix::fs::access(&directory, Access::WRITE_OK | Access::EXEC_OK) {
            let (name, error) = (owner.name(), io::Error::from(error));
            let remedy = match error.kind() {
                io::ErrorKind::PermissionDenied => format!("; type `chown -R {name} {}`", shell_word(root)),
                _ => write_remedy(&error, root),
            };
            let directory = directory.display();
            return Err(format!("{directory} cannot be written to by {name}: {error}{remedy}"));
        }
    }
    Ok(())
}

/// The directories below one, down to a depth.
pub(super) fn subdirectories(directory: &Path, depth: usize) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().filter_map(Result::ok);
    let is_directory = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    let mut found: Vec<_> = entries.filter(is_directory).map(|entry| entry.path()).collect();
    sort_by(&mut found, PathBuf::cmp);
    let below = |path: &PathBuf| if depth > 1 { subdirectories(path, depth - 1) } else { Vec::new() };
    let deeper: Vec<_> = found.iter().flat_map(below).collect();
    found.extend(deeper);
    found
}
