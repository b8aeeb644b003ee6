//! Which messages of a locked queue its session offers: the passes over its directories.

use std::collections::{HashMap, HashSet};
use std::io;
use std::time::SystemTime;

use super::due;
use super::envelope::ParsedEnvelope;
use super::listed::{Pass, QueueOrder, RankedEntry, TIME_WORK};
use super::lock_file::LockError;
use super::locked_queue::{LockedQueue, log_unreadable};
use super::message::{self, Opened};
use super::retry;
use crate::maildir::{Entry, FileId};
use crate::net::trace::quoted;
use crate::sorting::sort_by;

impl LockedQueue {
    /// Begins a pass, if all messages of the last one were offered.
    ///
    /// # Errors
    /// The directory cannot be locked.
    pub(super) fn begin_pass_if_empty(&mut self) -> io::Result<()> {
        if !self.listed.is_empty() {
            return Ok(());
        }
        self.listed.forgotten = None;
        match self.lock_if_mail(None) {
            Ok(()) => {}
            // Another session offers its messages.
            Err(LockError::Busy(_)) => return Ok(()),
            Err(LockError::Failed(error)) => return Err(error),
        }
        if self.has_lock() {
            let order = match self.name.retries {
                true => QueueOrder::Retries,
                false => QueueOrder::Held { now: self.ids.clock().now() },
            };
            self.listed.pass = Some(Pass::new(self.files(), order));
        }
        Ok(())
    }

    /// Whether a message is due at this time.
    fn is_due(&self, entry: &Entry, time: SystemTime) -> bool {
        !self.name.retries || retry::due(&self.maildir.file(entry)).is_none_or(|due| due <= time)
    }

    /// Whether the queue has a message that this session may offer. Stops at the first one found.
    pub(super) fn has_any(&self) -> bool {
        if !self.has_lock() {
            return false;
        }
        let (now, time) = (self.ids.clock().now(), SystemTime::now());
        let may_be_offered = |entry: &Entry| {
            !self.listed.offered.contains(entry.unique())
                && !message::is_skipped(entry, now)
                && self.notes.is_mail(&self.maildir, entry)
                && self.is_due(entry, time)
        };
        let is_message = |entry: &Entry| match self.open_file(entry, None) {
            Ok(Opened::Message(message)) => !message.envelope.recipients.is_empty(),
            _ => false,
        };
        self.files().filter_map(Result::ok).any(|entry| may_be_offered(&entry) && is_message(&entry))
    }

    /// Goes on with the pass. `work`: how many file names may be read; it is reduced by those that were.
    ///
    /// # Errors
    /// A directory cannot be read; the pass ends without a message.
    pub(super) fn go_on_listing(&mut self, work: &mut usize) -> io::Result<()> {
        let Some(mut pass) = self.listed.pass.take() else { return Ok(()) };
        let (now, time) = (self.ids.clock().now(), SystemTime::now());
        while *work > 0 {
            *work -= 1;
            let Some(entry) = pass.files.next() else {
                self.finish_pass(pass);
                return Ok(());
            };
            let entry = entry?;
            if self.listed.offered.contains(entry.unique()) {
                continue;
            }
            *work = work.saturating_sub(if self.name.retries { TIME_WORK } else { 0 });
            if !self.is_due(&entry, time) {
                continue;
            }
            match message::is_skipped(&entry, now) {
                true => self.skip(entry),
                false => {
                    let is_dsn = self.name.retries && due::has_null_sender(&self.maildir, &entry);
                    pass.add(entry, is_dsn);
                }
            }
        }
        self.listed.pass = Some(pass);
        Ok(())
    }

    fn finish_pass(&mut self, pass: Pass) {
        let (found, offered) = pass.finish();
        let left_out = self.left_out(&found);
        let offered = found.into_iter().take(offered);
        self.listed.add(offered.filter(|found| !left_out.contains(&found.entry)));
    }

    /// Leaves a message out of this session because it has ended others.
    fn skip(&mut self, entry: Entry) {
        self.listed.offered.insert(entry.unique());
        self.listed.skipped += 1;
        if let Some(ended) = entry.record().ended {
            let (queue, file, sessions) = (&self.name, quoted(entry.name.display()), ended.sessions);
            log::info!("event=skipped queue={queue} file={file} sessions={sessions} skip={}", ended.skip - 1);
            self.listed.uncounted.push(entry);
        }
    }

    pub(super) fn count_call(&mut self) {
        for entry in std::mem::take(&mut self.listed.uncounted) {
            let mut record = entry.record();
            if let Some(ended) = &mut record.ended {
                ended.skip = ended.skip.saturating_sub(1);
            }
            match self.maildir.rename(&entry, None, &record) {
                Ok(renamed) => drop(self.listed.offered.insert(renamed.unique())),
                // Without this record the message is skipped for a day at most (`SKIP_LIMIT`).
                Err(error) => log::warn!("event=skip-not-recorded queue={} error={}", self.name, quoted(error)),
            }
        }
    }

    /// The entries that must not be offered, because another entry is the same message: it would be sent twice.
    fn left_out(&self, found: &[RankedEntry]) -> HashSet<Entry> {
        let mut left_out = HashSet::new();
        let mut entries: Vec<_> = found.iter().map(|found| &found.entry).collect();
        sort_by(&mut entries, |one, other| Entry::by_age(one, other));
        for pair in entries.windows(2).filter(|pair| pair[0].unique() == pair[1].unique()) {
            let id = |entry: &Entry| FileId::of_path(&self.maildir.file(entry)).ok();
            match (id(pair[0]), id(pair[1])) {
                // A mail reader has moved the file while the directories were read.
                (None, _) => drop(left_out.insert(pair[0].clone())),
                (_, None) => drop(left_out.insert(pair[1].clone())),
                // A mail reader is moving the file, or was killed between link and unlink.
                (Some(one), Some(other)) if one == other => drop(left_out.insert(pair[0].clone())),
                _ => match self.remove_superseded(pair[0], pair[1]) {
                    Ok(removed) => left_out.extend(removed.cloned()),
                    // If these are two files of one message, either would be sent to recipients that have it already.
                    Err(error) => {
                        log_unreadable(&self.name, &error);
                        left_out.extend(pair.iter().copied().cloned());
                    }
                },
            }
        }
        left_out
    }

    /// Removes and returns the older of two files of one message, which a crash of an earlier version in `settle` has
    /// left: it has recipients that are settled in the newer one. `None`: these are two messages.
    ///
    /// # Errors
    /// A file cannot be read or removed.
    fn remove_superseded<'a>(&self, one: &'a Entry, other: &'a Entry) -> io::Result<Option<&'a Entry>> {
        let (Some(first), Some(second)) = (self.parse(one)?, self.parse(other)?) else { return Ok(None) };
        // Only a file that we have written can be the newer one, with some recipients of the older.
        let is_rest = |few: &ParsedEnvelope, many: &ParsedEnvelope| {
            let (some, all) = (few.recipients(), many.recipients());
            let all_by_mailbox: HashMap<_, _> = all.iter().map(|recipient| (&recipient.mailbox, recipient)).collect();
            few.ours
                && few.unread == many.unread
                && some.len() < all.len()
                && some.iter().all(|recipient| all_by_mailbox.get(&recipient.mailbox) == Some(&recipient))
        };
        let before = if is_rest(&first, &second) { Some(other) } else { is_rest(&second, &first).then_some(one) };
        if let Some(before) = before {
            log::warn!("event=half-settled file={}", quoted(before.name.display()));
            self.maildir.remove(before)?;
        }
        Ok(before)
    }

    /// The envelope of a file; `None`: it is not a message for a recipient of this queue, or it cannot be opened.
    fn parse(&self, entry: &Entry) -> io::Result<Option<ParsedEnvelope>> {
        let Ok(Ok(file)) = message::open_file(&self.maildir.file(entry)) else { return Ok(None) };
        message::read_envelope(&file, entry, &self.name).map(Result::ok)
    }
}
