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

    /// Whether the file has not changed for [`QUIET_TIME`]. Its ctime decides: a program may have set the time of modification
    /// to that of another file.
    pub fn is_quiet(&self, now: SystemTime) -> bool {
        let changed =
            Duration::new(u64::try_from(self.changed.0).unwrap_or(0), u32::try_from(self.changed.1).unwrap_or(0));
        SystemTime::UNIX_EPOCH + changed + QUIET_TIME <= now
    }
}
