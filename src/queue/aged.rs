//! The messages of a queue for which something is due by their age: expiry, or a DSN about a delay. Only file names are
//! read, and no lock is needed.

use std::collections::BinaryHeap;
use std::fs::DirEntry;
use std::io;

use super::name::QueueName;
use super::retry;
use crate::clock::Timestamp;
use crate::maildir::Entry;

/// What the names of a queue's files show.
#[derive(Default, PartialEq, Eq, Debug)]
pub struct AgedMessages {
    /// The messages for which something is due, in the order of their names, which begin with the time. Messages whose
    /// time of arrival is impossible are among them: opening one records that it was seen now.
    pub due: Vec<Entry>,
    /// More messages are due, after these.
    pub more: bool,
    /// When something is due for one of the others. `None`: never.
    pub next: Option<Timestamp>,
}

/// Lists a queue. Returns the first `limit` messages that are due after `after`. The caller goes on after the last one:
/// when it opens messages, nothing may be due for some of them, and the others must not wait for these. `is_mail`:
/// whether a file may be a message. `due`: when something is due for a message with this time of arrival; `None`:
/// never.
pub(super) fn list(
    name: &QueueName, now: Timestamp, (limit, after): (usize, Option<&Entry>), is_mail: &dyn Fn(&Entry) -> bool,
    due: &dyn Fn(&Entry, Timestamp) -> Option<Timestamp>,
) -> io::Result<AgedMessages> {
    let (mut found, mut first) = (AgedMessages::default(), BinaryHeap::new());
    name.maildir().each_file(&mut |entry, file| {
        let time = match arrived(&entry, file, now) {
            Some(arrived) => due(&entry, arrived),
            None => Some(now),
        };
        match time {
            Some(time) if time <= now => {
                if after.is_none_or(|after| entry > *after) && is_mail(&entry) {
                    first.push(entry);
                }
                if first.len() > limit {
                    first.pop();
                    found.more = true;
                }
            }
            time => found.next = found.next.into_iter().chain(time).min(),
        }
        Ok(())
    })?;
    found.due = first.into_sorted_vec();
    Ok(found)
}

/// When a message arrived, by its name, or by its time of modification if another agent names its files otherwise.
/// `None`: these times are impossible, or a clock was fast when the file was named.
fn arrived(entry: &Entry, file: &DirEntry, now: Timestamp) -> Option<Timestamp> {
    let named = entry.named();
    let modified =
        || Some(Timestamp::from(file.metadata().ok()?.modified().ok()?)).filter(|time| time.is_possible(now));
    let by_name = retry::arrival(named.unwrap_or(Timestamp::from_seconds(0)), entry.record().first_seen, now);
    by_name.or_else(|| if named.is_none_or(|named| named < now) { modified() } else { None })
}
