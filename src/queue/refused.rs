//! What is kept in `.refused` of a queue: rejected mail of which no sender can be told, for a month, and so much of it. The
//! oldest goes first.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use super::message::rejected_maildir;
use super::name::QueueName;

/// How long a message is kept.
const LONGEST: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// Octets that are kept in one queue. The newest message is kept whatever its size.
const OCTETS: u64 = 32 << 20;

/// Octets that a file takes at least: a disk has blocks, and inodes.
const DISK_BLOCK: u64 = 4096;

/// How much of [`OCTETS`] may be added before the directory is listed again.
const LISTED_AFTER: u64 = OCTETS / 16;

/// Keeps `.refused` of each queue within its limits.
#[derive(Default)]
pub(super) struct RefusedLimits(Mutex<HashMap<PathBuf, u64>>);

impl RefusedLimits {
    /// A message of so many octets was added to a queue. Removes what is too much by now.
    ///
    /// # Errors
    /// The disk fails.
    pub(super) fn added(&self, name: &QueueName, octets: u64) -> io::Result<()> {
        let mut added = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(added) = added.get_mut(&name.path)
            && *added < LISTED_AFTER
        {
            *added += on_disk(octets);
            return Ok(());
        }
        added.insert(name.path.clone(), 0);
        drop(added);
        trim(name, SystemTime::now())
    }
}

/// The octets that a file takes on disk.
fn on_disk(octets: u64) -> u64 {
    octets.div_ceil(DISK_BLOCK).max(1).saturating_mul(DISK_BLOCK)
}

/// Removes what is in `.refused` for too long or is too much, the oldest first; by the time at which it was moved there.
///
/// # Errors
/// The disk fails.
pub(super) fn trim(name: &QueueName, now: SystemTime) -> io::Result<()> {
    let maildir = rejected_maildir(&name.maildir());
    let (mut files, mut octets) = (Vec::new(), 0_u64);
    maildir.each_file(&mut |entry, file| {
        let Ok(metadata) = file.metadata() else { return Ok(()) };
        let since = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(metadata.ctime()).unwrap_or(0));
        let size = on_disk(metadata.len());
        octets = octets.saturating_add(size);
        files.push((since, metadata.ctime_nsec(), entry, size));
        Ok(())
    })?;
    files.sort_unstable();
    let (newest, mut messages, mut removed) = (files.len().saturating_sub(1), 0, 0_u64);
    for (number, (since, _, entry, size)) in files.into_iter().enumerate() {
        let is_old = now.duration_since(since).is_ok_and(|age| age > LONGEST);
        if !is_old && (octets <= OCTETS || number == newest) {
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
        log::info!("event=refused-removed queue={name} messages={messages} octets={removed}");
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
    fn the_oldest_goes_first_by_age_and_by_size() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("example.org");
        let name = QueueName { path, ..QueueName::default() };
        trim(&name, SystemTime::now()).unwrap();
        rejected_maildir(&name.maildir()).create().unwrap();
        let limits = RefusedLimits::default();
        let put = |file: &str, size: u64| {
            // A sparse file.
            fs::File::create(name.path.join(".refused/new").join(file)).unwrap().set_len(size).unwrap();
            limits.added(&name, size).unwrap();
            std::thread::sleep(Duration::from_millis(20));
        };
        // By name the last one is the oldest.
        for number in (0..9).rev() {
            put(&format!("{number}.x"), OCTETS / 8);
        }
        assert_eq!(names(&name), ["0.x", "1.x", "2.x", "3.x", "4.x", "5.x", "6.x", "7.x"]);
        // Small ones count by their blocks, and the directory is not listed for each of them.
        for number in 0..=LISTED_AFTER / DISK_BLOCK {
            fs::write(name.path.join(".refused/new").join(format!("s{number}")), "x").unwrap();
            limits.added(&name, 1).unwrap();
        }
        assert_eq!(names(&name)[..2], ["0.x", "1.x"]);
        assert!(!names(&name).contains(&"7.x".to_owned()) && names(&name).contains(&"6.x".to_owned()));
        put("large.x", 2 * OCTETS);
        trim(&name, SystemTime::now()).unwrap();
        assert_eq!(names(&name), ["large.x"]);
        trim(&name, SystemTime::now() + LONGEST - Duration::from_secs(60)).unwrap();
        assert_eq!(names(&name), ["large.x"]);
        trim(&name, SystemTime::now() + LONGEST + Duration::from_secs(60)).unwrap();
        assert_eq!(names(&name), Vec::<String>::new());
    }
}
