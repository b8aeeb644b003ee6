//! The quota of a mailbox, as Courier's maildirquota(7) describes it and Dovecot's `quota = maildir` keeps it.
//!
//! Where a mailbox has a file `maildirsize` there is a quota:
//!
//! ```text
//! 10000000S,1000C        how many octets and messages may stand there; 0 or nothing said: any
//! 950000 812             the sum when they were last counted
//! 4096 1                 one came
//! -2048 -1               one went
//! ```
//!
//! Nobody takes a lock: a line is appended in one write, and a file that is counted anew replaces the old one.
//! So the sum may be a little off where several write at once; it is counted again when it says that the mailbox
//! is full, and when the file has grown long. `.Trash` and messages marked as deleted do not count.

use super::{list, with_path};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

const NAME: &str = "maildirsize";
const TRASH: &str = ".Trash";

/// A file of so many octets is counted anew (Maildir++).
const LONG: u64 = 5120;

/// A fresh count is believed so long when it says that the mailbox is full (Maildir++).
const STALE: Duration = Duration::from_secs(15 * 60);

/// So often is counted where mail comes and goes meanwhile.
const ROUNDS: usize = 3;

/// What one commit brings into mailboxes with a quota.
#[derive(Debug, Default)]
pub struct QuotaCheck {
    mailboxes: BTreeMap<PathBuf, Option<Quota>>,
}

impl QuotaCheck {
    /// Finds room for one message more, beside those admitted before. An error of the kind `QuotaExceeded`
    /// says which mailbox has none. `unique` makes a name for a new count, where it takes one.
    pub fn admit(&mut self, maildir: &Path, unique: impl FnOnce() -> String, octets: u64) -> io::Result<()> {
        let Some(mailbox) = mailbox(maildir) else { return Ok(()) };
        let account = match self.mailboxes.entry(mailbox.to_owned()) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => unknown.insert(Quota::open(mailbox)?),
        };
        account.as_mut().map_or(Ok(()), |account| account.admit(unique, octets))
    }

    /// Writes down what was admitted, once it can be seen.
    pub fn record(&self) {
        for account in self.mailboxes.values().flatten() {
            // The messages have been delivered: to say now that they were not would bring them twice.
            if let Err(error) = account.record() {
                log::warn!("event=quota-not-recorded error={:?}", error.to_string());
            }
        }
    }
}

/// The mailbox in whose quota the messages of a Maildir count: its own, or that of which it is a folder.
fn mailbox(maildir: &Path) -> Option<&Path> {
    let (Some(name), Some(parent)) = (maildir.file_name(), maildir.parent()) else { return Some(maildir) };
    if !name.as_encoded_bytes().starts_with(b".") || !parent.join("cur").is_dir() {
        return Some(maildir);
    }
    (name != TRASH).then_some(parent)
}

/// Octets and messages: how many there are, or may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Usage {
    octets: u64,
    messages: u64,
}

impl Usage {
    fn plus(self, more: Usage) -> Usage {
        Usage { octets: self.octets.saturating_add(more.octets), messages: self.messages.saturating_add(more.messages) }
    }
}

/// The quota of one mailbox, and what is to come into it.
#[derive(Debug)]
struct Quota {
    mailbox: PathBuf,
    /// The first line, kept as it is: it may say more than we know.
    definition: String,
    limits: Usage,
    /// What stands there; `None`: the file does not tell.
    used: Option<Usage>,
    /// Whether `used` is believed even when it says that the mailbox is full.
    fresh: bool,
    coming: Usage,
    /// Those of the file, for the one that replaces it.
    permissions: Permissions,
}

impl Quota {
    /// The quota of a mailbox, where it has one.
    fn open(mailbox: &Path) -> io::Result<Option<Quota>> {
        let path = mailbox.join(NAME);
        let file = match open(OpenOptions::new().read(true), &path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let metadata = file.metadata().map_err(|error| with_path(&path, error))?;
        if !metadata.is_file() {
            return Err(with_path(&path, io::Error::other("is no plain file")));
        }
        let mut content = Vec::new();
        file.take(LONG).read_to_end(&mut content).map_err(|error| with_path(&path, error))?;
        let Some(Content { definition, limits, sum, lines }) = parse(&content) else { return Ok(None) };
        let age = metadata.modified().ok().and_then(|written| written.elapsed().ok());
        Ok(Some(Quota {
            mailbox: mailbox.to_owned(),
            definition,
            limits,
            used: sum.filter(|_| (content.len() as u64) < LONG),
            fresh: lines == 1 && age.is_some_and(|age| age < STALE),
            coming: Usage::default(),
            permissions: metadata.permissions(),
        }))
    }

    fn admit(&mut self, unique: impl FnOnce() -> String, octets: u64) -> io::Result<()> {
        let coming = self.coming.plus(Usage { octets, messages: 1 });
        let used = match self.used {
            Some(used) if self.fresh || self.full(used, coming).is_none() => used,
            _ => self.recount(&unique())?,
        };
        if let Some(full) = self.full(used, coming) {
            return Err(with_path(&self.mailbox, io::Error::new(io::ErrorKind::QuotaExceeded, full)));
        }
        self.coming = coming;
        Ok(())
    }

    /// Which limit would be broken.
    fn full(&self, used: Usage, coming: Usage) -> Option<String> {
        let sum = used.plus(coming);
        let text = |used, coming, unit, limit| {
            format!("the quota is used up: {used} {unit} stand there, {coming} would come, {limit} are allowed")
        };
        if sum.octets > self.limits.octets {
            Some(text(used.octets, coming.octets, "octets", self.limits.octets))
        } else if sum.messages > self.limits.messages {
            Some(text(used.messages, coming.messages, "messages", self.limits.messages))
        } else {
            None
        }
    }

    /// Counts what stands there, and writes it down.
    fn recount(&mut self, unique: &str) -> io::Result<Usage> {
        let mut round = 1;
        let used = loop {
            // The time of the last change is taken before the folders are read.
            let changed = last_change(&self.mailbox)?;
            let used = count(&self.mailbox)?;
            self.replace(unique, used)?;
            if round == ROUNDS || last_change(&self.mailbox)? == changed {
                break used;
            }
            round += 1;
        };
        (self.used, self.fresh) = (Some(used), true);
        Ok(used)
    }

    /// Puts a new sum in place of the old ones. Who reads meanwhile finds the old file or the new.
    fn replace(&self, unique: &str, used: Usage) -> io::Result<()> {
        let temporary = self.mailbox.join("tmp").join(format!("{unique}.{NAME}"));
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary);
        let mut file = file.map_err(|error| with_path(&temporary, error))?;
        let written = file
            .write_all(format!("{}\n{} {}\n", self.definition, used.octets, used.messages).as_bytes())
            .and_then(|()| file.set_permissions(self.permissions.clone()))
            // The limits stand nowhere else: a power cut must not leave an empty file.
            .and_then(|()| file.sync_all())
            .and_then(|()| fs::rename(&temporary, self.mailbox.join(NAME)));
        written.map_err(|error| {
            let _ = fs::remove_file(&temporary);
            with_path(&temporary, error)
        })
    }

    /// Appends what came. The file is opened anew: it may have been replaced since. If that count has our messages
    /// already they count twice, which the next count mends before anything is refused; written into the old file
    /// they might not count at all.
    fn record(&self) -> io::Result<()> {
        let Usage { octets, messages } = self.coming;
        if messages == 0 {
            return Ok(());
        }
        let path = self.mailbox.join(NAME);
        match open(OpenOptions::new().append(true), &path) {
            // Somebody has lifted the quota.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            file => {
                file?.write_all(format!("{octets} {messages}\n").as_bytes()).map_err(|error| with_path(&path, error))
            }
        }
    }
}

/// Opens a file that the mailbox's owner may have made: a link is not followed, a pipe not waited for.
fn open(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    use rustix::fs::OFlags;
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    options.custom_flags(flags).open(path).map_err(|error| with_path(path, error))
}

/// What a file `maildirsize` says.
#[derive(Debug, PartialEq, Eq)]
struct Content {
    definition: String,
    limits: Usage,
    /// `None` where there is none, a line is broken, or it is below nothing.
    sum: Option<Usage>,
    lines: usize,
}

/// Reads a file; `None`: it defines no quota.
fn parse(content: &[u8]) -> Option<Content> {
    let mut parts = content.splitn(2, |octet| *octet == b'\n');
    let definition = str::from_utf8(parts.next()?).ok()?;
    let lines = parts.next().and_then(|lines| str::from_utf8(lines).ok()).unwrap_or_default();
    Some(Content {
        definition: definition.to_owned(),
        limits: limits(definition)?,
        // A last line without its end was cut off, and the next one would be joined to it.
        sum: if lines.ends_with('\n') { sum(lines) } else { None },
        lines: lines.lines().count(),
    })
}

/// Reads a definition: numbers, each with a letter for what it limits. What is not known is passed over.
fn limits(definition: &str) -> Option<Usage> {
    let (mut limits, mut defined) = (Usage { octets: u64::MAX, messages: u64::MAX }, false);
    for part in definition.split(',') {
        let mut number = part.trim().chars();
        let Some(letter) = number.next_back().filter(char::is_ascii_alphabetic) else { continue };
        let number = number.as_str();
        if number.is_empty() || !number.bytes().all(|octet| octet.is_ascii_digit()) {
            continue;
        }
        defined = true;
        // More than can be said in 64 bits is no limit either.
        let limit = number.parse().ok().filter(|limit| *limit != 0).unwrap_or(u64::MAX);
        match letter {
            'S' => limits.octets = limit,
            'C' => limits.messages = limit,
            _ => {}
        }
    }
    defined.then_some(limits)
}

/// The sum of lines of two numbers, octets and messages.
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

/// Counts a mailbox and its folders.
fn count(mailbox: &Path) -> io::Result<Usage> {
    let mut sum = Usage::default();
    for folder in folders(mailbox)? {
        for file in list(&folder)? {
            let file = file.map_err(|error| with_path(&folder, error))?;
            let name = file.file_name();
            let name = name.to_string_lossy();
            if name.starts_with('.') || deleted(&name) {
                continue;
            }
            // What is gone since it was listed does not count.
            let size = size(&name).or_else(|| fs::metadata(file.path()).ok().map(|metadata| metadata.len()));
            if let Some(octets) = size {
                sum = sum.plus(Usage { octets, messages: 1 });
            }
        }
    }
    Ok(sum)
}

/// When the last message came into a mailbox and its folders, or went.
fn last_change(mailbox: &Path) -> io::Result<Option<SystemTime>> {
    let changed = |folder: PathBuf| fs::metadata(folder).and_then(|metadata| metadata.modified()).ok();
    Ok(folders(mailbox)?.into_iter().filter_map(changed).max())
}

/// Where the messages stand that count.
fn folders(mailbox: &Path) -> io::Result<Vec<PathBuf>> {
    let mut folders = vec![mailbox.join("new"), mailbox.join("cur")];
    for found in list(mailbox)? {
        let found = found.map_err(|error| with_path(mailbox, error))?;
        let name = found.file_name();
        // A link leads to somebody else's folder, which is shared.
        let folder = name.as_encoded_bytes().starts_with(b".") && found.file_type().is_ok_and(|kind| kind.is_dir());
        if folder && name != TRASH {
            folders.extend(["new", "cur"].map(|half| found.path().join(half)));
        }
    }
    Ok(folders)
}

/// The size that the name of a message tells (`,S=`).
fn size(name: &str) -> Option<u64> {
    let base = name.split(':').next()?;
    base.split(',').skip(1).find_map(|field| field.strip_prefix("S="))?.parse().ok()
}

/// Whether a message is marked as deleted: it has the flag T.
fn deleted(name: &str) -> bool {
    name.split_once(":2,")
        .is_some_and(|(_, info)| info.bytes().take_while(u8::is_ascii_uppercase).any(|flag| flag == b'T'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::maildir::{Maildir, MessageWriter};
    use proptest::prelude::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    const ANY: u64 = u64::MAX;

    /// A mailbox with a quota.
    fn mailbox_with(content: &str) -> (tempfile::TempDir, Maildir) {
        let folder = tempfile::tempdir().unwrap();
        let maildir = Maildir::new(folder.path().join("eva"));
        maildir.create().unwrap();
        fs::write(maildir.path().join(NAME), content).unwrap();
        (folder, maildir)
    }

    fn maildirsize(maildir: &Maildir) -> String {
        fs::read_to_string(maildir.path().join(NAME)).unwrap()
    }

    /// Delivers a message of so many octets.
    fn deliver(maildir: &Maildir, unique: &str, octets: usize) -> io::Result<()> {
        let mut copies = MessageWriter::default();
        copies.begin(maildir, unique, &vec![b'x'; octets])?;
        copies.commit().map(|_| ())
    }

    fn age(maildir: &Maildir, age: Duration) {
        let file = File::options().write(true).open(maildir.path().join(NAME)).unwrap();
        file.set_modified(SystemTime::now() - age).unwrap();
    }

    fn full(delivered: io::Result<()>) -> String {
        let error = delivered.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::QuotaExceeded, "{error}");
        error.to_string()
    }

    #[test]
    fn definitions_are_read() {
        let check = |definition: &str, expected: Option<(u64, u64)>| {
            let expected = expected.map(|(octets, messages)| Usage { octets, messages });
            assert_eq!(limits(definition), expected, "{definition:?}");
        };
        check("1000S,10C", Some((1000, 10)));
        check("10C,1000S", Some((1000, 10)));
        check("1000S", Some((1000, ANY)));
        check("10C", Some((ANY, 10)));
        check(" 1000S , 10C \r", Some((1000, 10)));
        check("0S,10C", Some((ANY, 10)));
        check("0S", Some((ANY, ANY)));
        // Letters that nobody has given a meaning.
        check("7X,1000S,3s", Some((1000, ANY)));
        check("7X", Some((ANY, ANY)));
        check("1000S,rubbish", Some((1000, ANY)));
        check("99999999999999999999S,10C", Some((ANY, 10)));
        for nothing in ["", " ", "S", "C,S", "1000", "-5S", "+5S", "1 000S", "ten C", "1000é", "1000 1"] {
            check(nothing, None);
        }
    }

    #[test]
    fn files_are_read() {
        let check = |content: &[u8], expected: Option<(u64, u64)>, lines: usize| {
            let read = parse(content).unwrap();
            let expected = expected.map(|(octets, messages)| Usage { octets, messages });
            assert_eq!((read.sum, read.lines), (expected, lines), "{}", content.escape_ascii());
        };
        check(b"9S\n0 0\n", Some((0, 0)), 1);
        check(b"9S\n100 2\n50 1\n-100 -2\n", Some((50, 1)), 3);
        // As Courier pads them.
        check(b"9S\n         100            2\n        -100           -1\n", Some((0, 1)), 2);
        check(b"9S\r\n100 2\r\n", Some((100, 2)), 1);
        // A sum that is not there, or none at all.
        check(b"9S", None, 0);
        check(b"9S\n", None, 0);
        check(b"9S\n100 2\n\n", None, 2);
        check(b"9S\n100\n", None, 1);
        check(b"9S\n100 2 3\n", None, 1);
        check(b"9S\n100 two\n", None, 1);
        check(b"9S\n100 2\n-101 -1\n", None, 2);
        check(b"9S\n100 2\n-10 -3\n", None, 2);
        check(b"9S\n99999999999999999999 1\n", None, 1);
        // Cut off, or hit by a power cut.
        check(b"9S\n100 2\n50", None, 2);
        check(b"9S\n100 2\n\0\0\0\0\n", None, 2);
        check(b"9S\n\xff\xfe\n", None, 0);
        for nothing in [&b""[..], b"\n", b"\n100 2\n", b"rubbish\n100 2\n", b"\xff9S\n100 2\n", b"\0\0\0"] {
            assert_eq!(parse(nothing), None, "{}", nothing.escape_ascii());
        }
    }

    proptest! {
        #[test]
        fn any_file_can_be_read(content: Vec<u8>, lines in "[0-9SC,]{0,9}\n[-+0-9 \n]{0,60}") {
            parse(&content);
            parse(lines.as_bytes());
        }

        #[test]
        fn the_sum_is_that_of_the_lines(octets: u32, messages: u16, changes: Vec<(i64, i32)>) {
            let mut content = format!("{octets}S,{messages}C\n{octets} {messages}\n");
            let mut expected = (i128::from(octets), i128::from(messages));
            for (octets, messages) in &changes {
                content.push_str(&format!("{octets:12} {messages}\n"));
                expected = (expected.0 + i128::from(*octets), expected.1 + i128::from(*messages));
            }
            let read = parse(content.as_bytes()).unwrap();
            let sum = u64::try_from(expected.0).ok().zip(u64::try_from(expected.1).ok());
            prop_assert_eq!(read.sum, sum.map(|(octets, messages)| Usage { octets, messages }));
            prop_assert_eq!(read.lines, changes.len() + 1);
        }
    }

    #[test]
    fn names_tell_the_size_and_whether_a_message_counts() {
        let check = |name: &str, expected: Option<u64>, gone: bool| {
            assert_eq!((size(name), deleted(name)), (expected, gone), "{name}");
        };
        check("1.M2P3.host,S=10", Some(10), false);
        check("1.M2P3.host,S=10,W=12:2,FS", Some(10), false);
        check("1.M2P3.host,W=12,S=10:2,ST", Some(10), true);
        check("1.M2P3.host:2,T", None, true);
        // Small letters are keywords; what is no flag is none.
        check("1.M2P3.host,S=10:2,St", Some(10), false);
        check("1.M2P3.host,S=10:2,S,T", Some(10), false);
        check("1.M2P3.host,S=:1,T", None, false);
        check("1.M2P3.host,S=1x:2,", None, false);
        check("S=10", None, false);
        check("", None, false);
    }

    #[test]
    fn what_fits_is_counted() {
        let (_folder, maildir) = mailbox_with("100S,3C\n10 1\n");
        deliver(&maildir, "1", 40).unwrap();
        assert_eq!(maildirsize(&maildir), "100S,3C\n10 1\n40 1\n");
        // To the last octet.
        deliver(&maildir, "2", 50).unwrap();
        assert_eq!(maildirsize(&maildir), "100S,3C\n10 1\n40 1\n50 1\n");
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_limit() {
        for (content, expected) in [
            ("100S,5C\n90 1\n", "the quota is used up: 90 octets stand there, 11 would come, 100 are allowed"),
            ("100S,5C\n9 5\n", "the quota is used up: 5 messages stand there, 1 would come, 5 are allowed"),
            ("100S\n100 9\n", "the quota is used up: 100 octets stand there, 11 would come, 100 are allowed"),
            ("5C\n9000 5\n", "the quota is used up: 5 messages stand there, 1 would come, 5 are allowed"),
        ] {
            let (_folder, maildir) = mailbox_with(content);
            let error = full(deliver(&maildir, "1", 11));
            assert_eq!(error, format!("{}: {expected}", maildir.path().display()));
            assert!(maildir.is_empty().unwrap());
            assert_eq!(fs::read_dir(maildir.path().join("tmp")).unwrap().count(), 0);
            assert_eq!(maildirsize(&maildir), content);
        }
    }

    #[test]
    fn where_no_quota_is_none_is_made() {
        let (_folder, maildir) = mailbox_with("");
        fs::remove_file(maildir.path().join(NAME)).unwrap();
        deliver(&maildir, "1", 10).unwrap();
        assert!(!maildir.path().join(NAME).exists());
        // A file that defines none is nobody's business.
        for content in ["", "\n", "hello\n1 1\n"] {
            let (_folder, maildir) = mailbox_with(content);
            deliver(&maildir, "1", 10).unwrap();
            assert_eq!(maildirsize(&maildir), content);
        }
        // One without limits is kept for those who want to know how much is there.
        let (_folder, maildir) = mailbox_with("0S\n70 7\n");
        deliver(&maildir, "1", 10).unwrap();
        assert_eq!(maildirsize(&maildir), "0S\n70 7\n10 1\n");
    }

    #[test]
    fn several_mailboxes_have_room_or_none_gets_the_message() {
        let (_folder, eva) = mailbox_with("100S\n0 0\n");
        let (_folder, adam) = mailbox_with("100S\n95 1\n");
        let (_folder, free) = mailbox_with("");
        for order in [[&eva, &adam, &free], [&adam, &free, &eva]] {
            let mut copies = MessageWriter::default();
            order.iter().for_each(|maildir| copies.begin(maildir, "1", b"0123456789").unwrap());
            let error = full(copies.commit().map(|_| ()));
            assert!(error.starts_with(&adam.path().display().to_string()), "{error}");
            order.iter().for_each(|maildir| assert!(maildir.is_empty().unwrap()));
        }
        assert_eq!((maildirsize(&eva), maildirsize(&adam)), ("100S\n0 0\n".into(), "100S\n95 1\n".into()));
    }

    #[test]
    fn two_copies_for_one_mailbox_count_together() {
        let (_folder, maildir) = mailbox_with("100S\n70 1\n");
        let lists = maildir.folder("lists");
        Maildir::new(lists.path()).create().unwrap();
        let commit = |octets: &[u8]| {
            let mut copies = MessageWriter::default();
            copies.begin(&maildir, "1", octets).unwrap();
            copies.begin(&lists, "2", octets).unwrap();
            copies.commit().map(|_| ())
        };
        assert!(full(commit(&[b'x'; 16])).contains("70 octets stand there, 32 would come"));
        assert!(maildir.is_empty().unwrap() && lists.is_empty().unwrap());
        commit(&[b'x'; 15]).unwrap();
        assert_eq!(maildirsize(&maildir), "100S\n70 1\n30 2\n");
    }

    #[test]
    fn a_dropped_draft_is_not_counted() {
        let (_folder, maildir) = mailbox_with("100S\n0 0\n");
        let mut copies = MessageWriter::default();
        copies.begin(&maildir, "1", b"0123456789").unwrap();
        drop(copies);
        // Nor is one that could not be shown.
        fs::write(maildir.path().join("new/2,S=10,W=10"), "").unwrap();
        assert_eq!(deliver(&maildir, "2", 10).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(maildirsize(&maildir), "100S\n0 0\n");
    }

    /// What stands there is one message of 20 octets.
    #[test]
    fn it_is_counted_anew_when_the_file_is_in_doubt() {
        let young = Duration::from_secs(14 * 60);
        let long = format!("100S\n{}", "0 00\n".repeat(1023));
        for (content, written, recounted) in [
            // Enough room: whatever stands there is believed.
            ("100S\n90 1\n", STALE, false),
            ("100S\n50 1\n40 1\n", STALE, false),
            // Full: a fresh count is believed.
            ("100S\n91 1\n", young, false),
            ("100S\n91 1\n", STALE, true),
            ("100S\n50 1\n41 1\n", young, true),
            ("1C\n50 1\n41 1\n-41 -1\n", young, true),
            // No sum.
            ("100S\n", young, true),
            ("100S", young, true),
            ("100S\n10 1\n-11 -1\n", young, true),
            ("100S\n10 1\n1", young, true),
            // 5120 octets, and a line less.
            (&long, young, true),
            (&long[5..].replacen("0 00", "100S", 1), young, false),
        ] {
            let (_folder, maildir) = mailbox_with(content);
            fs::write(maildir.path().join("cur/0,S=20:2,S"), "").unwrap();
            age(&maildir, written);
            let fits = deliver(&maildir, "1", 10);
            let now = maildirsize(&maildir);
            let definition = content.lines().next().unwrap();
            let case = format!("{content:.40} {now:.40}");
            if recounted {
                let came = if fits.is_ok() { "10 1\n" } else { "" };
                assert_eq!(now, format!("{definition}\n20 1\n{came}"), "{case}");
            } else {
                assert!(now.starts_with(content), "{case}");
            }
            assert_eq!(fits.is_ok(), now.lines().last() == Some("10 1"), "{case}");
            assert_eq!(fs::read_dir(maildir.path().join("tmp")).unwrap().count(), 0, "{case}");
        }
    }

    #[test]
    fn what_counts_is_counted() {
        let (folder, maildir) = mailbox_with("7X,1000S\n");
        for name in [".lists", ".lists.rust", TRASH, "other"] {
            Maildir::new(maildir.path().join(name)).create().unwrap();
        }
        let other = Maildir::new(folder.path().join("adam"));
        other.create().unwrap();
        symlink(other.path(), maildir.path().join(".shared")).unwrap();
        for (name, octets) in [
            ("new/1,S=1", 500),
            ("cur/2,S=2,W=3:2,S", 500),
            ("cur/3:2,", 4),
            (".lists/new/4,S=8", 500),
            (".lists.rust/cur/5:2,RS", 16),
            // These do not.
            ("cur/6,S=100:2,ST", 100),
            ("new/.hidden", 100),
            ("tmp/7,S=100", 100),
            (".Trash/cur/8,S=100:2,", 100),
            ("other/new/9,S=100", 100),
            (".shared/new/10,S=100", 100),
            (".file", 100),
        ] {
            fs::write(maildir.path().join(name), vec![b'x'; octets]).unwrap();
        }
        let path = maildir.path().join(NAME);
        fs::set_permissions(&path, Permissions::from_mode(0o646)).unwrap();
        deliver(&maildir, "11", 32).unwrap();
        assert_eq!(maildirsize(&maildir), "7X,1000S\n31 5\n32 1\n");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o646);
    }

    #[test]
    fn a_message_in_a_sub_folder_counts_in_the_mailbox() {
        let (_folder, maildir) = mailbox_with("30S\n0 0\n");
        for name in ["lists", "Trash"] {
            Maildir::new(maildir.folder(name).path()).create().unwrap();
        }
        deliver(&maildir.folder("lists"), "1", 20).unwrap();
        assert_eq!(maildirsize(&maildir), "30S\n0 0\n20 1\n");
        let error = full(deliver(&maildir.folder("lists"), "2", 11));
        assert!(error.starts_with(&format!("{}: ", maildir.path().display())), "{error}");
        // What is thrown away needs no room.
        deliver(&maildir.folder("Trash"), "3", 1000).unwrap();
        assert_eq!(maildirsize(&maildir), "30S\n20 1\n");
        // A name alone makes no sub-folder.
        let (folder, _) = mailbox_with("");
        let hidden = folder.path().join(".maildir");
        assert_eq!(mailbox(&hidden), Some(hidden.as_path()));
        for path in ["/", ".", "..", "", "eva"] {
            assert_eq!(mailbox(Path::new(path)), Some(Path::new(path)));
        }
    }

    #[test]
    fn what_is_no_plain_file_is_neither_followed_nor_waited_for() {
        let (folder, maildir) = mailbox_with("");
        let path = maildir.path().join(NAME);
        let other = folder.path().join("other");
        fs::write(&other, "100S\n").unwrap();
        let replace: [fn(&Path, &Path); 3] = [
            |path, other| symlink(other, path).unwrap(),
            |path, _| fs::create_dir(path).unwrap(),
            |path, _| {
                rustix::fs::mkfifoat(rustix::fs::CWD, path, rustix::fs::Mode::RUSR).unwrap();
            },
        ];
        fs::remove_file(&path).unwrap();
        for replace in replace {
            replace(&path, &other);
            let error = deliver(&maildir, "1", 10).unwrap_err().to_string();
            assert!(error.contains(NAME), "{error}");
            assert!(maildir.is_empty().unwrap());
            assert_eq!(fs::read_to_string(&other).unwrap(), "100S\n");
            fs::remove_file(&path).or_else(|_| fs::remove_dir(&path)).unwrap();
        }
    }

    #[test]
    fn what_was_delivered_stays_delivered_when_it_cannot_be_counted() {
        let (_folder, maildir) = mailbox_with("100S\n0 0\n");
        let path = maildir.path().join(NAME);
        let mut ledger = QuotaCheck::default();
        ledger.admit(maildir.path(), || "1".to_owned(), 10).unwrap();
        fs::remove_file(&path).unwrap();
        ledger.record();
        assert!(!path.exists());
        fs::create_dir(&path).unwrap();
        ledger.record();
        assert!(path.is_dir());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]

        /// One writer, and a reader who says what he removes: then the sum is never off.
        #[test]
        fn a_message_is_refused_exactly_when_there_is_no_room(
            limits in (100_u64..400, 2_u64..8),
            steps in proptest::collection::vec((0_usize..120, any::<bool>()), 1..20),
        ) {
            let (_folder, maildir) = mailbox_with(&format!("{}S,{}C\n", limits.0, limits.1));
            let mut there = Vec::new();
            for (number, (octets, removes)) in steps.into_iter().enumerate() {
                let sum: usize = there.iter().map(|(_, octets)| octets).sum();
                let fits = (sum + octets) as u64 <= limits.0 && (there.len() as u64) < limits.1;
                match deliver(&maildir, &number.to_string(), octets) {
                    Ok(()) => there.push((format!("new/{number},S={octets},W={octets}"), octets)),
                    refused => _ = full(refused),
                }
                prop_assert_eq!(fits, there.last().is_some_and(|(name, _)| name.starts_with(&format!("new/{number},"))));
                if removes && !there.is_empty() {
                    let (name, octets) = there.remove(0);
                    fs::remove_file(maildir.path().join(name)).unwrap();
                    let mut file = File::options().append(true).open(maildir.path().join(NAME)).unwrap();
                    writeln!(file, "-{octets} -1").unwrap();
                }
            }
        }
    }

    /// Delivers from two threads, so many each; how many were taken.
    fn race(maildir: &Maildir, each: usize) -> usize {
        let deliver = |thread: usize| {
            let taken = (0..each).filter(|number| match deliver(maildir, &format!("{thread}-{number}"), 10) {
                Ok(()) => true,
                refused => full(refused).is_empty(),
            });
            taken.count()
        };
        std::thread::scope(|scope| {
            let threads = [0, 1].map(|thread| scope.spawn(move || deliver(thread)));
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        })
    }

    #[test]
    fn two_writers_lose_no_line() {
        let (_folder, maildir) = mailbox_with("10000S,1000C\n0 0\n");
        assert_eq!(race(&maildir, 100), 200);
        let read = parse(maildirsize(&maildir).as_bytes()).unwrap();
        assert_eq!((read.sum, read.lines), (Some(Usage { octets: 2000, messages: 200 }), 201));
    }

    /// Each delivery into the full mailbox counts anew, while the other thread delivers.
    #[test]
    fn two_writers_that_count_anew_lose_no_message_and_leave_a_file_that_is_read() {
        let (_folder, maildir) = mailbox_with("500S\n");
        let taken = race(&maildir, 60);
        assert_eq!(maildir.entries().unwrap().len(), taken);
        assert!(taken >= 50, "{taken}");
        let read = parse(maildirsize(&maildir).as_bytes()).unwrap();
        assert_eq!(read.definition, "500S");
        assert!(read.sum.is_some());
        // Whatever the race did to the sum, the next count mends it.
        age(&maildir, STALE);
        full(deliver(&maildir, "last", 500));
        let octets = 10 * taken;
        assert_eq!(maildirsize(&maildir), format!("500S\n{octets} {taken}\n"));
        assert_eq!(fs::read_dir(maildir.path().join("tmp")).unwrap().count(), 0);
    }
}
