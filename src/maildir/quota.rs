//! The quota of a mailbox, as in Courier's maildirquota(7) and Dovecot's `quota = maildir`.
//!
//! A mailbox has a quota if it has a file `maildirsize`:
//!
//! ```text
//! 10000000S,1000C        the limits, in octets and messages; 0 or missing: no limit
//! 950000 812             octets and messages when they were last counted
//! 4096 1                 one message of 4096 octets was delivered
//! -2048 -1               one message of 2048 octets was removed
//! ```
//!
//! There is no lock: each program appends a line in one write, and a new count replaces the file. So the sum may be a
//! little wrong if several programs write at once. The mailbox is counted again if it is full by that sum, and if the
//! file has become long. `.Trash` and messages that are marked as deleted do not count.

use std::collections::{BTreeMap, btree_map};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::maildir::entry::Entry;
use crate::maildir::files::{list, with_path};
use crate::net::trace::quoted;

const NAME: &str = "maildirsize";
const TRASH: &str = ".Trash";
/// The flag of a message that is marked as deleted.
const DELETED: char = 'T';

/// A file of this many octets is replaced by a new count (Maildir++).
const FILE_LIMIT: u64 = 5120;

/// For this long a count is valid even if the mailbox is full by it (Maildir++). Otherwise each message for a full
/// mailbox would count it again.
const COUNT_LIFETIME: Duration = Duration::from_secs(15 * 60);

/// How often a mailbox is counted at most, if it changes during the count.
const COUNT_ATTEMPTS: usize = 3;

/// The quotas of the mailboxes of one message, and what the message adds to them.
#[derive(Debug, Default)]
pub struct QuotaCheck {
    /// The mailboxes so far; `None`: the mailbox has no quota.
    mailboxes: BTreeMap<PathBuf, Option<Quota>>,
}

impl QuotaCheck {
    /// Reserves room for one more message of this many octets in a mailbox or sub-folder, in addition to those admitted
    /// before. `unique` returns a new file name, which is used for a new count.
    ///
    /// # Errors
    /// `QuotaExceeded` with the mailbox that has no room; the system's, if the quota cannot be read or the mailbox
    /// counted.
    pub fn admit(&mut self, maildir: &Path, unique: impl FnOnce() -> String, octets: u64) -> io::Result<()> {
        let Some(mailbox) = mailbox_of(maildir) else { return Ok(()) };
        let quota = match self.mailboxes.entry(mailbox.to_owned()) {
            btree_map::Entry::Occupied(known) => known.into_mut(),
            btree_map::Entry::Vacant(unknown) => unknown.insert(Quota::open(mailbox)?),
        };
        quota.as_mut().map_or(Ok(()), |quota| quota.admit(unique, octets))
    }

    /// Writes the admitted messages into the files, after they have become visible. An error is only logged: the
    /// message is stored, and if it were answered with an error, it would be sent again.
    pub fn record(&self) {
        for quota in self.mailboxes.values().flatten() {
            if let Err(error) = quota.record() {
                log::warn!("event=quota-not-recorded error={}", quoted(error));
            }
        }
    }
}

/// The mailbox in whose quota the messages of a Maildir count: itself, or the mailbox of which it is a sub-folder, even
/// if a rule names the sub-folder by its path. `None`: it is the trash, which does not count.
fn mailbox_of(maildir: &Path) -> Option<&Path> {
    let (Some(name), Some(parent)) = (maildir.file_name(), maildir.parent()) else { return Some(maildir) };
    if !name.as_encoded_bytes().starts_with(b".") || !parent.join("cur").is_dir() {
        return Some(maildir);
    }
    (name != TRASH).then_some(parent)
}

/// A number of messages and the octets of their files: what is stored, or a limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub octets: u64,
    pub messages: u64,
}

impl Usage {
    pub(super) fn plus(self, more: Usage) -> Usage {
        Usage { octets: self.octets.saturating_add(more.octets), messages: self.messages.saturating_add(more.messages) }
    }
}

/// The quota of one mailbox, and the messages admitted to it.
#[derive(Debug)]
struct Quota {
    mailbox: PathBuf,
    /// The first line of the file. It is never changed: it may have limits that this program does not know.
    definition: String,
    limits: Usage,
    /// The usage of the mailbox; `None`: the file has no valid sum.
    used: Option<Usage>,
    /// `used` is a recent count, which is valid even if the mailbox is full by it.
    fresh: bool,
    admitted: Usage,
    /// The permissions of the file, for its successor.
    permissions: Permissions,
}

impl Quota {
    /// Reads the quota of a mailbox. `None`: it has no quota.
    fn open(mailbox: &Path) -> io::Result<Option<Quota>> {
        let path = mailbox.join(NAME);
        let file = match open(OpenOptions::new().read(true), &path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let metadata = file.metadata().map_err(|error| with_path(&path, error))?;
        if !metadata.is_file() {
            return Err(with_path(&path, io::Error::other("it is not a plain file")));
        }
        let mut content = Vec::new();
        file.take(FILE_LIMIT).read_to_end(&mut content).map_err(|error| with_path(&path, error))?;
        let Some(QuotaFile { definition, limits, sum, lines }) = parse(&content) else { return Ok(None) };
        let age = metadata.modified().ok().and_then(|written| written.elapsed().ok());
        Ok(Some(Quota {
            mailbox: mailbox.to_owned(),
            definition,
            limits,
            used: sum.filter(|_| (content.len() as u64) < FILE_LIMIT),
            fresh: lines == 1 && age.is_some_and(|age| age < COUNT_LIFETIME),
            admitted: Usage::default(),
            permissions: metadata.permissions(),
        }))
    }

    fn admit(&mut self, unique: impl FnOnce() -> String, octets: u64) -> io::Result<()> {
        let admitted = self.admitted.plus(Usage { octets, messages: 1 });
        let used = match self.used {
            Some(used) if self.fresh || self.exceeded(used, admitted).is_none() => used,
            _ => self.recount(&unique())?,
        };
        if let Some(exceeded) = self.exceeded(used, admitted) {
            return Err(with_path(&self.mailbox, io::Error::new(io::ErrorKind::QuotaExceeded, exceeded)));
        }
        self.admitted = admitted;
        Ok(())
    }

    /// The limit that would be exceeded, as the text of an error.
    fn exceeded(&self, used: Usage, admitted: Usage) -> Option<String> {
        let both = [
            ("octets", used.octets, admitted.octets, self.limits.octets),
            ("messages", used.messages, admitted.messages, self.limits.messages),
        ];
        let exceeded = |(_, used, admitted, limit): &(&str, u64, u64, u64)| used.saturating_add(*admitted) > *limit;
        let (unit, used, admitted, limit) = both.into_iter().find(exceeded)?;
        Some(format!("quota exceeded: {used} {unit} stored, {admitted} to come, {limit} allowed"))
    }

    /// Counts the mailbox and writes the result into the file.
    fn recount(&mut self, unique: &str) -> io::Result<Usage> {
        let mut used = Usage::default();
        for _ in 0..COUNT_ATTEMPTS {
            // Read the time of the last change before the directories, so that no change is missed.
            let changed = last_change(&self.mailbox)?;
            used = count(&self.mailbox)?;
            self.replace(unique, used)?;
            if last_change(&self.mailbox)? == changed {
                break;
            }
        }
        (self.used, self.fresh) = (Some(used), true);
        Ok(used)
    }

    /// Replaces the file by one with a new sum. A program that reads at that time finds the old file or the new one.
    fn replace(&self, unique: &str, used: Usage) -> io::Result<()> {
        let temporary = self.mailbox.join("tmp").join(format!("{unique}.{NAME}"));
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary);
        let mut file = file.map_err(|error| with_path(&temporary, error))?;
        let written = file
            .write_all(format!("{}\n{} {}\n", self.definition, used.octets, used.messages).as_bytes())
            .and_then(|()| file.set_permissions(self.permissions.clone()))
            // The limits are in no other file: a power cut must not leave this one empty.
            .and_then(|()| file.sync_all())
            .and_then(|()| fs::rename(&temporary, self.mailbox.join(NAME)));
        written.map_err(|error| {
            let _ = fs::remove_file(&temporary);
            with_path(&temporary, error)
        })
    }

    /// Appends a line with the admitted messages. The file is opened again, because another program may have replaced
    /// it: a line in the old file would be lost. If the new count already has these messages, they count twice; the
    /// next count corrects that before a message is rejected.
    fn record(&self) -> io::Result<()> {
        let Usage { octets, messages } = self.admitted;
        if messages == 0 {
            return Ok(());
        }
        let path = self.mailbox.join(NAME);
        match open(OpenOptions::new().append(true), &path) {
            // The quota was removed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            file => {
                file?.write_all(format!("{octets} {messages}\n").as_bytes()).map_err(|error| with_path(&path, error))
            }
        }
    }
}

/// Opens a file that the owner of the mailbox may have replaced: a symbolic link is not followed, and a pipe does not
/// block.
fn open(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    use rustix::fs::OFlags;
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    options.custom_flags(flags).open(path).map_err(|error| with_path(path, error))
}

/// The content of a file `maildirsize`.
#[derive(Debug, PartialEq, Eq)]
struct QuotaFile {
    definition: String,
    limits: Usage,
    /// `None`: there is no sum, a line is not valid, or the sum is negative.
    sum: Option<Usage>,
    /// The number of lines after the first.
    lines: usize,
}

/// Reads a file. `None`: it defines no quota.
fn parse(content: &[u8]) -> Option<QuotaFile> {
    let mut parts = content.splitn(2, |octet| *octet == b'\n');
    let definition = str::from_utf8(parts.next()?).ok()?;
    let lines = parts.next().and_then(|lines| str::from_utf8(lines).ok()).unwrap_or_default();
    Some(QuotaFile {
        definition: definition.to_owned(),
        limits: limits(definition)?,
        // If the last line lacks its end, the file was truncated, and an appended line would continue it.
        sum: if lines.ends_with('\n') { sum(lines) } else { None },
        lines: lines.lines().count(),
    })
}

/// Reads the limits: numbers, each followed by a character for its unit. Unknown parts are ignored. `None`: there is
/// not a single limit.
fn limits(definition: &str) -> Option<Usage> {
    let (mut limits, mut defined) = (Usage { octets: u64::MAX, messages: u64::MAX }, false);
    for part in definition.split(',') {
        let mut number = part.trim().chars();
        let Some(unit) = number.next_back().filter(char::is_ascii_alphabetic) else { continue };
        let number = number.as_str();
        if number.is_empty() || !number.bytes().all(|octet| octet.is_ascii_digit()) {
            continue;
        }
        defined = true;
        // A number above 64 bits means no limit too.
        let limit = number.parse().ok().filter(|limit| *limit != 0).unwrap_or(u64::MAX);
        match unit {
            'S' => limits.octets = limit,
            'C' => limits.messages = limit,
            _ => {}
        }
    }
    defined.then_some(limits)
}

/// Adds up lines of two numbers, octets and messages. `None`: a line is not valid, or the sum is negative.
fn sum(lines: &str) -> Option<Usage> {
    let (mut octets, mut messages) = (0, 0);
    for line in lines.lines() {
        let mut numbers = line.split_ascii_whitespace().map(|number| number.parse::<i64>().ok());
        octets += i128::from(numbers.next()??);
        messages += i128::from(numbers.next()??);
        if numbers.next().is_some() {
            return None;
        }
    }
    Some(Usage { octets: octets.try_into().ok()?, messages: messages.try_into().ok()? })
}

/// Counts the messages of a mailbox and its sub-folders.
fn count(mailbox: &Path) -> io::Result<Usage> {
    let mut sum = Usage::default();
    for directory in message_directories(mailbox)? {
        for file in list(&directory) {
            let file = file?;
            let entry = Entry { name: file.file_name(), seen: true };
            if entry.name.as_encoded_bytes().starts_with(b".") || entry.has(DELETED) {
                continue;
            }
            // A file that is removed during the count does not count.
            let size = size(&entry).or_else(|| fs::metadata(file.path()).ok().map(|metadata| metadata.len()));
            if let Some(octets) = size {
                sum = sum.plus(Usage { octets, messages: 1 });
            }
        }
    }
    Ok(sum)
}

/// When a message was last added to the mailbox or its sub-folders, or removed from them.
fn last_change(mailbox: &Path) -> io::Result<Option<SystemTime>> {
    let changed = |directory: PathBuf| fs::metadata(directory).and_then(|metadata| metadata.modified()).ok();
    Ok(message_directories(mailbox)?.into_iter().filter_map(changed).max())
}

/// The directories whose messages count: `new` and `cur` of the mailbox and of each sub-folder but the trash.
fn message_directories(mailbox: &Path) -> io::Result<Vec<PathBuf>> {
    let mut directories = vec![mailbox.join("new"), mailbox.join("cur")];
    for found in list(mailbox) {
        let found = found?;
        let name = found.file_name();
        // A symbolic link may lead to a shared folder of another user, which does not count.
        let sub_folder = name.as_encoded_bytes().starts_with(b".") && found.file_type().is_ok_and(|kind| kind.is_dir());
        if sub_folder && name != TRASH {
            directories.extend(["new", "cur"].map(|half| found.path().join(half)));
        }
    }
    Ok(directories)
}

/// The size in octets in the name of a message (Maildir++ `S=`).
fn size(entry: &Entry) -> Option<u64> {
    entry.field("S=")?.parse().ok()
}

#[cfg(test)]
mod tests;
