//! When the next attempts in a queue with retries are due: at mail with a sender, and at DSNs, which can wait for it.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::SystemTime;

use rustix::fs::OFlags;

use super::retry;
use crate::maildir::{Entry, Maildir};
use crate::sorting::sort_by;

/// How the file of a message without a sender begins (RFC 5321 section 4.5.5).
const NULL_SENDER: &[u8] = b"Return-Path: <>\n";

/// How many messages are opened at most to find the first one with a sender.
const LOOK_LIMIT: usize = 100;

/// When the next attempts in a queue are due; both `None`: it is empty.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct QueueDue {
    /// When the first message with a sender is due.
    pub mail: Option<SystemTime>,
    /// When the first one without a sender is due, if that is earlier; otherwise it is sent with the mail.
    pub dsn: Option<SystemTime>,
}

impl QueueDue {
    /// The earlier of both.
    pub fn earliest(self) -> Option<SystemTime> {
        [self.mail, self.dsn].into_iter().flatten().min()
    }

    /// The same times, but none before `time`.
    pub fn not_before(self, time: SystemTime) -> QueueDue {
        QueueDue { mail: self.mail.map(|due| due.max(time)), dsn: self.dsn.map(|due| due.max(time)) }
    }

    /// For mail and for DSNs the earlier time of both.
    pub fn or_earlier(self, other: QueueDue) -> QueueDue {
        let earlier = |one: Option<SystemTime>, other| [one, other].into_iter().flatten().min();
        QueueDue { mail: earlier(self.mail, other.mail), dsn: earlier(self.dsn, other.dsn) }
    }
}

/// When the next attempts at these messages are due. If the first [`LOOK_LIMIT`] have no sender, `mail` is `None`.
pub(super) fn next(maildir: &Maildir, entries: Vec<Entry>) -> QueueDue {
    let due = |entry| Some((retry::due(&maildir.file(&entry))?, entry));
    let mut files: Vec<_> = entries.into_iter().filter_map(due).collect();
    let mut due = QueueDue::default();
    if let Some((first, entry)) = files.iter().min_by_key(|(due, _)| *due) {
        if !has_null_sender(maildir, entry) {
            return QueueDue { mail: Some(*first), dsn: None };
        }
        due.dsn = Some(*first);
    }
    sort_by(&mut files, |(one, _), (other, _)| one.cmp(other));
    due.mail = files.iter().take(LOOK_LIMIT).find(|(_, entry)| !has_null_sender(maildir, entry)).map(|(due, _)| *due);
    due
}

/// Whether a message has no sender, by its name or its file. A file that cannot be read counts as mail with a sender.
pub(super) fn has_null_sender(maildir: &Maildir, entry: &Entry) -> bool {
    entry.destination().map_or_else(|| begins_with_null_sender(&maildir.file(entry)), |(_, null)| null)
}

fn begins_with_null_sender(path: &Path) -> bool {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let mut octets = [0; NULL_SENDER.len()];
    let file = OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(path);
    file.and_then(|mut file| file.read_exact(&mut octets)).is_ok() && octets == NULL_SENDER
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::time::Duration;

    use super::*;

    #[test]
    fn mail_and_dsns_are_due_separately() {
        let directory = tempfile::tempdir().unwrap();
        let maildir = Maildir::new(directory.path().join("out"));
        fs::create_dir_all(directory.path().join("out/new")).unwrap();
        let next = || next(&maildir, maildir.entries().unwrap());
        assert_eq!(next(), QueueDue::default());
        let now = SystemTime::now();
        let at = |seconds| now + Duration::from_secs(seconds);
        let put = |unique: &str, sender: &str, due| {
            let path = directory.path().join("out/new").join(unique);
            fs::write(&path, format!("Return-Path: <{sender}>\nDelivered-To: bob@example.org\n\n")).unwrap();
            File::options().write(true).open(&path).unwrap().set_modified(due).unwrap();
        };
        put("1.a.x", "", at(10));
        assert_eq!(next(), QueueDue { mail: None, dsn: Some(at(10)) });
        put("2.a.x", "", at(5));
        put("3.a.x", "alice@example.net", at(20));
        put("4.a.x", "alice@example.net", at(30));
        let due = next();
        assert_eq!(due, QueueDue { mail: Some(at(20)), dsn: Some(at(5)) });
        assert_eq!(due.earliest(), Some(at(5)));
        assert_eq!(due.not_before(at(15)), QueueDue { mail: Some(at(20)), dsn: Some(at(15)) });
        put("5.a.x", "alice@example.net", at(1));
        assert_eq!(next(), QueueDue { mail: Some(at(1)), dsn: None });
        assert_eq!(
            due.or_earlier(QueueDue { mail: Some(at(1)), dsn: None }),
            QueueDue { mail: Some(at(1)), dsn: Some(at(5)) }
        );
    }
}
