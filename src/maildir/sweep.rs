//! Removes files of dead writers, and unused directories, after 36 hours.

use std::fmt;
use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::files::{list, remove_if_there, set_times};
use crate::clock::{Timestamp, cautious_now};
use crate::net::trace::quoted;

/// A file or directory that was not used for this long is left over (maildir(5)).
const STALE_AGE: Duration = Duration::from_secs(36 * 60 * 60);

/// Removes the files of a directory that were not used for 36 hours, if `is_left` is true of their names.
///
/// If a file was last used at an impossible time, its writer may have begun before the clock was set, and may still be
/// writing: its 36 hours begin now.
pub(super) fn sweep(directory: &Path, is_left: &dyn Fn(&str) -> bool) -> io::Result<()> {
    let now = cautious_now();
    for found in list(directory) {
        let found = found?;
        let Ok(metadata) = found.metadata() else { continue };
        if metadata.is_dir() || !is_left(&found.file_name().to_string_lossy()) {
            continue;
        }
        // On a file system that is mounted noatime, only the time of the last write is known (maildir(5)).
        let used = metadata.accessed().ok().max(metadata.modified().ok());
        if used.is_some_and(|used| !Timestamp::from(used).is_possible(now.into())) {
            set_times(&found.path(), now)?;
        } else if used.is_some_and(|used| is_stale(used, now)) {
            remove_if_there(&found.path())?;
            log_swept(&found.path());
        }
    }
    Ok(())
}

/// See [`Maildir::remove_unused`](super::Maildir::remove_unused).
///
/// A writer may begin a message at the same time, and makes missing directories. So `tmp` is removed first: if it
/// contains a file of a writer, that fails, and the Maildir stays.
pub(super) fn remove_unused(path: &Path, others: &[&str], stale: bool) -> io::Result<bool> {
    // An administrator may have replaced the Maildir by a symbolic link: it stays.
    let is_directory = |path: &Path| fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir());
    let parts = ["tmp", "new", "cur"].map(|name| path.join(name));
    let now = cautious_now();
    let is_unused = |part: &Path| {
        // A part may be missing if one process removes the Maildir while another makes it.
        let used = match fs::metadata(part).and_then(|metadata| metadata.modified()) {
            Err(error) => return error.kind() == io::ErrorKind::NotFound,
            Ok(used) => used,
        };
        (!stale || is_stale(used, now)) && list(part).next().is_none()
    };
    let is_known = |name: &str| ["tmp", "new", "cur"].contains(&name) || others.contains(&name);
    if !is_directory(path) || !parts.iter().all(|part| is_unused(part)) {
        return Ok(false);
    }
    for found in list(path) {
        let found = found?;
        if !is_known(&found.file_name().to_string_lossy()) {
            return Ok(false);
        }
        if found.file_type()?.is_dir() && !parts.contains(&found.path()) {
            remove_unused(&found.path(), &[], stale)?;
            if found.path().exists() {
                return Ok(false);
            }
        }
    }
    for part in &parts {
        match fs::remove_dir(part) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Ok(false),
            _ => {}
        }
    }
    others.iter().try_for_each(|name| remove_if_there(&path.join(name)))?;
    let removed = fs::remove_dir(path).is_ok();
    if removed && stale {
        log_swept(path);
    }
    Ok(removed)
}

fn is_stale(used: SystemTime, now: SystemTime) -> bool {
    now.duration_since(used).is_ok_and(|age| age > STALE_AGE)
}

/// Logs that left-over files could not be removed. `queue`: the domain of the queue; `-`: they are not in a queue.
pub fn log_sweep_failed(queue: impl fmt::Display, error: &io::Error) {
    log::warn!("event=sweep-failed queue={queue} error={}", quoted(error));
}

fn log_swept(path: &Path) {
    log::info!("event=swept file={}", quoted(path.display()));
}
