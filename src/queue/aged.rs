//! The messages of a queue for which something is due by their age. No file is opened, and no lock is needed.

use std::collections::BinaryHeap;
use std::fs::DirEntry;
use std::io;

use super::name::QueueName;
use super::retry;
use crate::clock::Timestamp;
use crate::maildir::Entry;

/// What a look at the names of a queue has found.
#[derive(Default, PartialEq, Eq, Debug)]
pub struct AgedMessages {
    /// The messages for which something is due, in the order of their names, which begin with the time; and those whose time
    /// of arrival is impossible, so that who opens them records that they were seen now.
    pub due: Vec<Entry>,
    /// There are more of them, after these.
    pub more: bool,
    /// When something is due for one of the others. `None`: never.
    pub next: Option<Timestamp>,
}

/// Lists a queue. Not more than `limit` messages that are due are kept, those after `after`: for some nothing is due when they
/// are opened, and the others must not wait for them. `is_mail`: by what is known. `due`: when something is due for a message
/// that has arrived then, as far as the name tells; `None`: never.
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

/// When a message has arrived, by its name, or by its time of modification if other agents name their files otherwise. `None`:
/// these times are impossible, or its name is from a clock that was ahead.
fn arrived(entry: &Entry, file: &DirEntry, now: Timestamp) -> Option<Timestamp> {
    let named = entry.named();
    let modified =
        || Some(Timestamp::from(file.metadata().ok()?.modified().ok()?)).filter(|time| time.is_possible(now));
    let by_name = retry::arrival(named.unwrap_or(Timestamp::from_seconds(0)), entry.record().first_seen, now);
    by_name.or_else(|| if named.is_none_or(|named| named < now) { modified() } else { None })
}
