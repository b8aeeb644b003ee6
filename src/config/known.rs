//! The recipients of a customer: `recipients` of its file at the provider, or the file that `recipients-file` names, which
//! the customer may replace at any time.
//!
//! A process reads the named file at the first recipient of the customer, and again after it has changed. So a mistake
//! in it does not stop a reload, and reading it does not delay other customers. The file may be replaced by rename or
//! written in place, and a part of it may be a valid file. So a new list takes effect only after the file has not
//! changed for two seconds. Until then the old list is used; the RCPT of a recipient that it lacks waits, and is
//! deferred if the file continues to change. If the file has a mistake, the old list stays in use; without an old list
//! all recipients are deferred.

use std::fs::{self, OpenOptions};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use rustix::fs::OFlags;
use toml::de::DeValue;

use super::source::decode;
use super::table::{Table, values};
use super::value::{ACCEPTED, PATH, Text, wrong_type};
use crate::file_stamp::{FileStamp, QUIET_TIME};
use crate::mail::address::{Domain, Mailbox};
use crate::net::trace::quoted;
use crate::recipients::{ConfigError, ListedRecipient, Located, RecipientList, SourceLine};
use crate::sandbox;
use crate::threads::Guarded;

/// The most entries of a file.
const ENTRIES_LIMIT: u64 = 1_000_000;

/// The most octets of a file.
const FILE_LIMIT: u64 = 64 << 20;

/// The most octets of a line: more than an address has (RFC 5321 section 4.5.3.1).
const LINE_LIMIT: u64 = 1024;

/// The recipients in a customer's domains whose mail the provider accepts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum KnownRecipients {
    /// All.
    #[default]
    Any,
    /// All but those that the customer's server has rejected as unknown.
    Learn,
    /// Those in `recipients`.
    Listed(Arc<RecipientList>),
    /// Those in the file of `recipients-file`.
    File(Arc<RecipientsFile>),
}

/// The result of looking a recipient up in a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Knowledge {
    Known,
    Unknown,
    /// The list lacks the recipient, but its file has just changed: the new list decides.
    Changing,
    /// There is no valid list.
    Unsettled,
}

const EXPECTED: &str = "\"any\", \"learn\" or a list of addresses such as [\"alice@example.org\", \"@example.net\"]";

const ENTRY: Text<ListedRecipient> =
    Text::new("an address such as \"alice@example.org\", or \"@example.org\"", |text| {
        let (excepted, address) = text.strip_prefix('!').map_or((false, text), |address| (true, address));
        if excepted && address.starts_with('@') {
            return Err(format!("{text:?} excepts a whole domain: remove it, as only what is listed is known"));
        }
        Ok(ListedRecipient { pattern: ACCEPTED.parse(address)?.pattern, excepted })
    });

impl KnownRecipients {
    /// Reads `recipients` and `recipients-file` from the file of a customer with these domains.
    pub(super) fn build(table: &mut Table<'_>, domains: &[Domain]) -> Result<KnownRecipients, ConfigError> {
        let file = table.located("recipients-file", PATH);
        let Some(value) = table.take("recipients") else {
            return Ok(match file? {
                Some(file) => {
                    KnownRecipients::File(RecipientsFile::new(table.file.absolute(&file.value), domains, file.source))
                }
                None => KnownRecipients::Any,
            });
        };
        let line = value.line.clone();
        if file?.is_some() {
            return Err(line.error("`recipients` and `recipients-file` exclude each other: remove one of the two"));
        }
        match &value.value {
            DeValue::String(text) if text == "any" => return Ok(KnownRecipients::Any),
            DeValue::String(text) if text == "learn" => return Ok(KnownRecipients::Learn),
            DeValue::Array(_) => {}
            DeValue::String(text) => return Err(line.error(format!("{text:?} is not a valid value: write {EXPECTED}"))),
            other => return Err(line.error(wrong_type(other, EXPECTED))),
        }
        let entries: Vec<_> = value.one_or_many().into_iter().map(|value| value.read(&ENTRY)).collect();
        let entries: Vec<Located<_>> = entries.into_iter().collect::<Result<_, _>>()?;
        for Located { value, source } in &entries {
            check_domain(value, domains).map_err(|text| source.error(text))?;
        }
        if entries.is_empty() {
            return Err(line.error(format!("`recipients` is empty, and no mail would be accepted: write {EXPECTED}")));
        }
        Ok(KnownRecipients::Listed(Arc::new(values(entries).into_iter().collect())))
    }

    /// Looks up a mailbox in a domain of the customer. `account`: for the log.
    pub fn look_up(&self, mailbox: &Mailbox, account: &str) -> Knowledge {
        let (list, settled) = match self {
            KnownRecipients::Any | KnownRecipients::Learn => return Knowledge::Known,
            KnownRecipients::Listed(list) => (Some(list.clone()), true),
            KnownRecipients::File(file) => file.current(account),
        };
        match (list.map(|list| list.knows(mailbox)), settled) {
            (Some(true), _) => Knowledge::Known,
            (_, false) => Knowledge::Changing,
            (Some(false), true) => Knowledge::Unknown,
            (None, true) => Knowledge::Unsettled,
        }
    }

    /// Reads the list; `None`: the customer has no list.
    ///
    /// # Errors
    ///
    /// The first mistake in the file, or that it cannot be read.
    pub fn read(&self) -> Result<Option<Arc<RecipientList>>, ConfigError> {
        match self {
            KnownRecipients::Any | KnownRecipients::Learn => Ok(None),
            KnownRecipients::Listed(list) => Ok(Some(list.clone())),
            KnownRecipients::File(file) => {
                read(&file.path, &file.domains).map(|list| Some(list.into())).map_err(|error| error.on(&file.line))
            }
        }
    }
}

fn check_domain(entry: &ListedRecipient, domains: &[Domain]) -> Result<(), String> {
    match entry.pattern.domain().is_some_and(|domain| domains.contains(domain)) {
        true => Ok(()),
        false => {
            Err(format!("{} is in no domain of this account: remove it, or add the domain to `domains`", entry.pattern))
        }
    }
}

/// A file of recipients, and the list that was read last.
#[derive(Debug)]
pub struct RecipientsFile {
    path: PathBuf,
    domains: Vec<Domain>,
    /// The line of the configuration that names the file.
    line: SourceLine,
    state: Guarded<FileState>,
}

#[derive(Debug, Default)]
struct FileState {
    /// `None`: no list could be read so far.
    list: Option<Arc<RecipientList>>,
    /// The stamp of the file at the last reading, whether it succeeded or not; `None`: the file may have been written
    /// during the reading.
    read: Option<Option<FileStamp>>,
    /// The last change that was seen, and when.
    change: Option<(Option<FileStamp>, Instant)>,
    /// Whether a thread is reading the file.
    is_read: bool,
}

/// Two files are the same if their paths and domains are.
impl PartialEq for RecipientsFile {
    fn eq(&self, other: &RecipientsFile) -> bool {
        (&self.path, &self.domains) == (&other.path, &other.domains)
    }
}

impl Eq for RecipientsFile {}

impl RecipientsFile {
    /// The file of recipients in these domains that this line names.
    fn new(path: PathBuf, domains: &[Domain], line: SourceLine) -> Arc<RecipientsFile> {
        sandbox::note_file(&path);
        Arc::new(RecipientsFile { path, domains: domains.to_owned(), line, state: Guarded::default() })
    }

    /// Returns the list, and whether it is that of the present file.
    fn current(&self, account: &str) -> (Option<Arc<RecipientList>>, bool) {
        let (mut state, now) = (self.state.lock(), Instant::now());
        let stamp = self.stamp();
        let is_quiet = stamp.is_some_and(|stamp| stamp.is_quiet(SystemTime::now()));
        if state.list.is_none() && state.read.is_none() {
            // Other threads wait for the lock during this, because there is no old list.
            let read = read(&self.path, &self.domains);
            let is_whole = read.is_err() || is_quiet && self.stamp() == stamp;
            state.read = is_whole.then_some(stamp);
            state.change = (!is_whole).then_some((stamp, now));
            self.use_read(&mut state, read, account);
            return (state.list.clone(), is_whole);
        }
        if state.is_read {
            return (state.list.clone(), false);
        }
        if state.read == Some(stamp) {
            state.change = None;
            return (state.list.clone(), true);
        }
        let since = state.change.filter(|(seen, _)| *seen == stamp).map_or(now, |(_, since)| since);
        state.change = Some((stamp, since));
        if !is_quiet && now < since + QUIET_TIME {
            return (state.list.clone(), false);
        }
        state.is_read = true;
        drop(state);
        // Reading a long file takes a second, in which other threads use the old list.
        let (read, after) = (read(&self.path, &self.domains), self.stamp());
        let mut state = self.state.lock();
        state.is_read = false;
        if after != stamp {
            // The file has changed again, or was just being truncated: the system changes the time after the size.
            return (state.list.clone(), false);
        }
        self.use_read(&mut state, read, account);
        (state.read, state.change) = (Some(stamp), None);
        (state.list.clone(), true)
    }

    fn stamp(&self) -> Option<FileStamp> {
        fs::metadata(&self.path).ok().map(|found| FileStamp::of(&found))
    }

    /// Stores the list that was read, or logs the mistake.
    fn use_read(&self, state: &mut FileState, read: Result<RecipientList, ListError>, account: &str) {
        match read {
            Ok(list) => {
                log::info!("event=recipients-read account={account} recipients={}", list.count());
                state.list = Some(list.into());
            }
            Err(error) => {
                let error = quoted(error.on(&SourceLine { file: self.path.as_path().into(), line: None }));
                let has_list = state.list.is_some();
                let consequence = if has_list { "the old list is used" } else { "mail for all recipients is deferred" };
                log::error!("event=recipients-unreadable account={account} error={error} consequence={consequence:?}");
            }
        }
    }
}

/// Why a file is not a valid list.
enum ListError {
    /// A mistake in a line.
    Line(ConfigError),
    Whole(String),
}

impl ListError {
    /// The error with its source. `line`: the line that names the file.
    fn on(self, line: &SourceLine) -> ConfigError {
        match self {
            ListError::Line(error) => error,
            ListError::Whole(text) => line.error(text),
        }
    }
}

/// Reads a file line by line, within bounds: the customer may write anything into it.
fn read(path: &Path, domains: &[Domain]) -> Result<RecipientList, ListError> {
    let shown = path.display();
    let failed =
        |error: io::Error| ListError::Whole(format!("{shown} cannot be read: {}", sandbox::explain(path, error)));
    // Without these flags, opening a pipe waits for a writer, and a terminal for its user.
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(failed)?;
    let found = file.metadata().map_err(failed)?;
    if !found.is_file() {
        return Err(ListError::Whole(format!("{shown} is not a file")));
    }
    if found.len() > FILE_LIMIT {
        return Err(ListError::Whole(format!("{shown} has more than 64 MiB")));
    }
    let (mut list, mut entries, mut number) = (RecipientList::default(), 0, 0);
    let (mut reader, mut line) = (BufReader::with_capacity(64 << 10, file.take(FILE_LIMIT)), Vec::new());
    let named: Arc<Path> = path.into();
    loop {
        line.clear();
        if reader.by_ref().take(LINE_LIMIT).read_until(b'\n', &mut line).map_err(failed)? == 0 {
            break;
        }
        number += 1;
        let source = SourceLine { file: named.clone(), line: Some(number) };
        let wrong = |text: String| ListError::Line(source.error(text));
        // The last line may lack its end. If an address was cut off, the rest of it is not in a domain of the account.
        if line.len() as u64 == LINE_LIMIT && !line.ends_with(b"\n") {
            return Err(wrong("the line is too long: write one address in each line".to_owned()));
        }
        let text = decode(&named, &line).map_err(|_| wrong("is not UTF-8: save it as UTF-8".to_owned()))?.trim();
        let text = if number == 1 { text.trim_start_matches('\u{feff}').trim() } else { text };
        if text.is_empty() || text.starts_with('#') {
            continue;
        }
        let entry = ENTRY.parse(text).and_then(|entry| check_domain(&entry, domains).map(|()| entry)).map_err(wrong)?;
        entries += 1;
        if entries > ENTRIES_LIMIT {
            return Err(ListError::Whole(format!(
                "{shown} has more than a million addresses: write \"@example.org\" for a domain"
            )));
        }
        list.add(entry);
    }
    if list.is_empty() {
        let text = format!("{shown} has no address, and no mail would be accepted: write one in each line");
        return Err(ListError::Whole(text));
    }
    list.sort();
    Ok(list)
}

#[cfg(test)]
mod tests;
