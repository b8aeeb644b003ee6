//! The directories that a provider or a customer needs after its start; the kernel denies it all others ([`sandbox`]).
//!
//! Call these functions after this process has become its final user, has bound its listeners, and has read its
//! configuration with the files that it names; and before it starts threads other than that of the log.

use std::path::Path;

use super::{logging, process};
use crate::config::CustomerConfig;
use crate::customer::store;
use crate::customer::submitter::temporary_directory;
use crate::maildir::prepare_directory;
use crate::net::trace::quoted;
use crate::provider::spool::SPOOL_DEPTH;
use crate::sandbox::{self, MailDirectory};

/// Denies a provider all other directories. `is_daemon`: logs the restrictions at level `info` instead of `debug`.
pub(super) fn confine_provider(spool: &Path, is_daemon: bool) {
    prepare_directory(spool, Some(0o700));
    // Each queue may be a symbolic link.
    enter([MailDirectory { path: spool.to_owned(), depth: SPOOL_DEPTH }], is_daemon);
}

/// The same for a customer that calls.
pub(super) fn confine_customer(config: &CustomerConfig, is_daemon: bool) {
    let directories = store::mail_directories(config);
    directories.iter().for_each(|(directory, mode)| prepare_directory(&directory.path, Some(*mode)));
    enter(directories.into_iter().map(|(directory, _)| directory), is_daemon);
}

/// The same for a user that submits mail or lists the queue; no directory is made.
pub(super) fn confine_sender(config: &CustomerConfig) {
    let directories = store::mail_directories(config);
    directories.iter().for_each(|(directory, _)| prepare_directory(&directory.path, None));
    enter(directories.into_iter().map(|(directory, _)| directory), false);
}

/// The same for a user that submits mail to the daemon: only a long message is stored, in a file without a name.
pub(super) fn confine_submitter() {
    enter([MailDirectory { path: temporary_directory(), depth: 0 }], false);
}

fn enter(directories: impl IntoIterator<Item = MailDirectory>, is_daemon: bool) {
    // This reads /proc, which is denied afterwards.
    process::ignores_hangup();
    let result = sandbox::enter(directories.into_iter().collect::<Vec<_>>().as_slice(), logging::do_in_thread);
    match (result, is_daemon) {
        (Ok(abi), true) => log::info!("event=confined landlock={abi}"),
        (Ok(abi), false) => log::debug!("event=confined landlock={abi}"),
        (Err(reason), true) => log::info!("event=confined landlock=none reason={}", quoted(reason)),
        (Err(reason), false) => log::debug!("event=confined landlock=none reason={}", quoted(reason)),
    }
}
