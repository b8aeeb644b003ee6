//! Stamps of files, which change with their content: a file need not be read again while its stamp is the same.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime};

/// A file that has not changed for this time is complete: no program is writing it.
pub const QUIET_TIME: Duration = Duration::from_secs(2);

/// The metadata that change with the content of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileStamp {
    file: (u64, u64),
    octets: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileStamp {
    /// The stamp of a file with this metadata.
    pub fn of(found: &Metadata) -> FileStamp {
        FileStamp {
            file: (found.dev(), found.ino()),
            octets: found.len(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        }
    }

    /// Whether the file has not changed for [`QUIET_TIME`].
    pub fn is_quiet(&self, now: SystemTime) -> bool {
        self.has_age(QUIET_TIME, now)
    }

    /// Whether the file has not changed for this time. Its ctime decides: a program may have set the time of modification to
    /// that of another file.
    pub fn has_age(&self, age: Duration, now: SystemTime) -> bool {
        let changed =
            Duration::new(u64::try_from(self.changed.0).unwrap_or(0), u32::try_from(self.changed.1).unwrap_or(0));
        SystemTime::UNIX_EPOCH + changed + age <= now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_has_the_age_of_the_last_change() {
        let directory = tempfile::tempdir().unwrap();
        let stamp = FileStamp::of(&directory.path().metadata().unwrap());
        let (now, minute) = (SystemTime::now(), Duration::from_secs(60));
        assert_eq!([now, now + minute].map(|at| stamp.has_age(minute, at)), [false, true]);
        assert!(!stamp.is_quiet(now) && stamp.is_quiet(now + minute));
    }
}
