//! Limits of `.refused`, the directory of a queue for rejected mail that no DSN can report: 30 days and 32 MiB. Without
//! them any sender could fill the disk. The oldest messages are removed first.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use super::message::set_aside_maildir;
use super::name::QueueName;
use crate::clock::cautious_now;
use crate::sorting::sort_by;
use crate::threads::Guarded;

/// The age at which a message is removed, from the time at which it was set aside.
const AGE_LIMIT: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// Octets on disk in one queue. The newest message stays whatever its size.
const OCTETS_LIMIT: u64 = 32 << 20;

/// Octets that a file takes at least: without a minimum, a million empty files would count nothing.
const DISK_BLOCK: u64 = 4096;

/// The octets that are added to a directory before it is listed again: to list it for each message would take too long.
const LISTED_AFTER: u64 = OCTETS_LIMIT / 16;

/// The octets that were added to `.refused` of each queue since it was listed.
#[derive(Default)]
pub(super) struct SetAsideLimits(Guarded<HashMap<PathBuf, u64>>);

impl SetAsideLimits {
    /// Counts a message of this size that was set aside. If enough was added, applies the limits.
    ///
    /// # Errors
    /// The disk fails.
    pub(super) fn added(&self, name: &QueueName, octets: u64) -> io::Result<()> {
        let mut added = self.0.lock();
        if let Some(added) = added.get_mut(&name.path)
            && *added < LISTED_AFTER
        {
            *added += on_disk(octets);
            return Ok(());
        }
        added.insert(name.path.clone(), 0);
        drop(added);
        apply_limits(name, cautious_now())
    }
}

/// The octets that a file takes on disk.
fn on_disk(octets: u64) -> u64 {
    octets.div_ceil(DISK_BLOCK).max(1).saturating_mul(DISK_BLOCK)
}

/// Applies the limits to `.refused` of a queue. A message's age counts from its time of change (ctime), which the move
/// set.
///
/// # Errors
/// The disk fails.
pub(super) fn apply_limits(name: &QueueName, now: SystemTime) -> io::Result<()> {
    let maildir = set_aside_maildir(&name.maildir());
    let (mut files, mut octets) = (Vec::new(), 0_u64);
    maildir.each_file(&mut |entry, file| {
        let Ok(metadata) = file.metadata() else { return Ok(()) };
        let since = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(metadata.ctime()).unwrap_or(0));
        let size = on_disk(metadata.len());
        octets = octets.saturating_add(size);
        files.push((since, metadata.ctime_nsec(), entry, size));
        Ok(())
    })?;
    sort_by(&mut files, Ord::cmp);
    let (newest, mut messages, mut removed) = (files.len().saturating_sub(1), 0, 0_u64);
    for (number, (since, _, entry, size)) in files.into_iter().enumerate() {
        let is_old = now.duration_since(since).is_ok_and(|age| age > AGE_LIMIT);
        if !is_old && (octets <= OCTETS_LIMIT || number == newest) {
            break;
        }
        match maildir.remove(&entry) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        octets -= size;
        messages += 1;
        removed += size;
    }
    if messages > 0 {
        log::info!("event=set-aside-removed queue={name} messages={messages} octets={removed}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn names(name: &QueueName) -> Vec<String> {
        let files = fs::read_dir(name.path.join(".refused/new")).unwrap();
        let mut names: Vec<_> = files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn the_oldest_messages_are_removed_by_age_and_by_size() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("example.org");
        let name = QueueName { path, ..QueueName::default() };
        apply_limits(&name, SystemTime::now()).unwrap();
        set_aside_maildir(&name.maildir()).create().unwrap();
        let limits = SetAsideLimits::default();
        let put = |file: &str, size: u64| {
            // A sparse file.
            fs::File::create(name.path.join(".refused/new").join(file)).unwrap().set_len(size).unwrap();
            limits.added(&name, size).unwrap();
            std::thread::sleep(Duration::from_millis(20));
        };
        // The order of the names is not that of their ages: the last name is the oldest file.
        for number in (0..9).rev() {
            put(&format!("{number}.x"), OCTETS_LIMIT / 8);
        }
        assert_eq!(names(&name), ["0.x", "1.x", "2.x", "3.x", "4.x", "5.x", "6.x", "7.x"]);
        // Each small file counts as a block.
        for number in 0..=LISTED_AFTER / DISK_BLOCK {
            fs::write(name.path.join(".refused/new").join(format!("s{number}")), "x").unwrap();
            limits.added(&name, 1).unwrap();
        }
        assert_eq!(names(&name)[..2], ["0.x", "1.x"]);
        assert!(!names(&name).contains(&"7.x".to_owned()) && names(&name).contains(&"6.x".to_owned()));
        put("large.x", 2 * OCTETS_LIMIT);
        apply_limits(&name, SystemTime::now()).unwrap();
        assert_eq!(names(&name), ["large.x"]);
        apply_limits(&name, SystemTime::now() + AGE_LIMIT - Duration::from_secs(60)).unwrap();
        assert_eq!(names(&name), ["large.x"]);
        apply_limits(&name, SystemTime::now() + AGE_LIMIT + Duration::from_secs(60)).unwrap();
        assert_eq!(names(&name), Vec::<String>::new());
    }
}
