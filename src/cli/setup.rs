//! `odmr setup`: makes the user, directories and files that a provider or a customer needs on this system, and prints
//! what to type next.

pub(super) mod customer;
mod installer;
pub(super) mod names;
pub(super) mod provider;
mod users;

use std::path::{Path, PathBuf};

use super::exit::{ExitError, Sysexit};
use super::process::print;

const HELP: &str = include_str!("pages/setup.txt");

/// `odmr setup` without a side.
///
/// # Errors
///
/// The side is missing (64), unless the help is asked for.
pub(super) fn without_side(arguments: &[String]) -> Result<(), ExitError> {
    match arguments.first().map(String::as_str) {
        Some("-h" | "--help") => print(HELP),
        other => {
            let what = other.map_or_else(
                || "the word provider or customer is missing".to_owned(),
                |other| format!("there is no {other:?} to set up"),
            );
            let text = format!("{what}: type `odmr setup provider HOSTNAME`, or `odmr setup customer FILE`");
            Err(ExitError::new(Sysexit::Usage, text))
        }
    }
}

/// Checks that there is no configuration yet. `remedy`: what else to do, for the error.
///
/// # Errors
///
/// The configuration exists (73).
fn check_missing(config: &Path, remedy: &str) -> Result<(), ExitError> {
    let file = config.display();
    let text = format!(
        "{file} exists, and is not overwritten: `odmr check -c {file}` checks it;{remedy} to begin anew, type `mv {file} \
         {file}.old`"
    );
    config.symlink_metadata().map_or(Ok(()), |_| Err(ExitError::new(Sysexit::CannotCreate, text)))
}

/// A file in the directory of a configuration, with its name and another extension.
fn sibling(config: &Path, extension: &str) -> PathBuf {
    config.with_extension(extension)
}

/// The name of that file, without its directory.
fn sibling_name(config: &Path, extension: &str) -> String {
    sibling(config, extension).file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The directory of a configuration.
fn directory_of(config: &Path) -> &Path {
    config.parent().filter(|directory| !directory.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The command that starts a daemon: by systemd, if it runs here and its unit reads this file.
fn start_command(unit: &str, is_default: bool, command: &str) -> String {
    match is_default && Path::new("/run/systemd/system").exists() {
        true => format!("systemctl enable --now {unit}"),
        false => format!("{command} &"),
    }
}
