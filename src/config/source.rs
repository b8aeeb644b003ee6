//! The files of a configuration: reads them, finds the line of an offset, and checks the modes of files with secrets.

use std::cell::RefCell;
use std::io::{Error, ErrorKind};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use toml::de::{DeTable, DeValue};

use crate::maildir::shell_word;
use crate::recipients::{ConfigError, SourceLine};
use crate::sorting::sort_by;
pub(super) use crate::text_file::read;

/// The end of the error's text about a file that cannot be read: what to do.
pub(super) fn read_remedy(error: &Error) -> &'static str {
    match error.kind() {
        ErrorKind::NotFound => "; correct the name, or make that file",
        ErrorKind::IsADirectory => "; name a file in it",
        ErrorKind::PermissionDenied => "; be root, or let this user read it: chgrp it, and chmod 640",
        _ => "",
    }
}

/// The side that a file is for.
pub(super) enum FileKind {
    Provider,
    Customer,
}

/// The findings in the files of a configuration.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    /// The mistakes, in the order in which they were found.
    pub errors: Vec<ConfigError>,
    /// The mistakes in the files of single customers. The provider skips these files and reads the others.
    pub skipped: Vec<ConfigError>,
    /// Settings that are valid and probably not intended.
    pub warnings: Vec<ConfigError>,
}

impl Findings {
    /// One mistake.
    pub(super) fn error(error: ConfigError) -> Findings {
        Findings { errors: vec![error], ..Findings::default() }
    }
}

/// One TOML file. Its text is in memory while it is checked, so that an error can name the line.
pub(super) struct Source {
    pub(super) file: Arc<Path>,
    text: String,
    /// The offset of each line end.
    line_ends: Vec<usize>,
    /// The permissions of the file.
    pub(super) mode: u32,
    /// Mistakes and warnings so far. `odmr check` reports all of them, so reading does not stop at the first mistake.
    findings: RefCell<Findings>,
    /// Whether to read the files of `secret-file`. A user that only submits mail does not need the secrets, and often
    /// may not read them.
    pub(super) reads_secrets: bool,
}

impl Source {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// It cannot be read, or is not UTF-8.
    pub(super) fn read(path: &Path) -> Result<Source, ConfigError> {
        let file = SourceLine { file: path.into(), line: None };
        let (mode, octets) = read(path).map_err(|cause| {
            let remedy = read_remedy(&cause);
            file.error(format!("cannot be read: {cause}{remedy}"))
        })?;
        Ok(Source::new(&file.file, decode(&file.file, &octets)?, mode))
    }

    /// A file with this text; `mode`: its permissions.
    pub(super) fn new(file: &Arc<Path>, text: &str, mode: u32) -> Source {
        let line_ends = text.match_indices('\n').map(|(at, _)| at).collect();
        let findings = RefCell::default();
        Source { file: file.clone(), text: text.to_owned(), line_ends, mode, findings, reads_secrets: true }
    }

    /// The whole text.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// Notes the error of a result, once, so that the caller can read the rest of the file. Returns the result.
    pub(super) fn note<T>(&self, result: Result<T, ConfigError>) -> Result<T, ConfigError> {
        if let Err(error) = &result {
            let errors = &mut self.findings.borrow_mut().errors;
            if !errors.contains(error) {
                errors.push(error.clone());
            }
        }
        result
    }

    /// Notes a warning.
    pub(super) fn warn(&self, warning: ConfigError) {
        self.findings.borrow_mut().warnings.push(warning);
    }

    /// Notes what was found in the file of one customer.
    pub(super) fn note_customer(&self, found: Findings) {
        let mut findings = self.findings.borrow_mut();
        findings.skipped.extend(found.errors);
        findings.warnings.extend(found.warnings);
    }

    /// Reads a file and builds the configuration. Returns it or the first mistake, and all findings.
    pub(super) fn examine<T>(
        path: &Path, build: impl FnOnce(&Source) -> Result<T, ConfigError>,
    ) -> (Result<T, ConfigError>, Findings) {
        match Source::read(path) {
            Ok(source) => source.finish(build),
            Err(error) => (Err(error.clone()), Findings::error(error)),
        }
    }

    /// As [`Source::examine`], but returns the configuration also after mistakes, if it could be built.
    pub(super) fn examine_all<T>(
        path: &Path, build: impl FnOnce(&Source) -> Result<T, ConfigError>,
    ) -> (Option<T>, Findings) {
        match Source::read(path) {
            Ok(source) => (source.note(build(&source)).ok(), source.findings.take()),
            Err(error) => (None, Findings::error(error)),
        }
    }

    /// Builds the configuration from this file, as [`Source::examine`] does.
    pub(super) fn finish<T>(
        &self, build: impl FnOnce(&Source) -> Result<T, ConfigError>,
    ) -> (Result<T, ConfigError>, Findings) {
        let built = self.note(build(self));
        let findings = self.findings.take();
        let first = findings.errors.first().cloned();
        (first.map_or(built, Err), findings)
    }

    /// The same file, without reading those of `secret-file`.
    pub(super) fn without_secrets(self) -> Source {
        Source { reads_secrets: false, ..self }
    }

    /// The keys and values of the file.
    pub(super) fn parse(&self) -> Result<DeTable<'_>, ConfigError> {
        let (table, mut errors) = DeTable::parse_recoverable(&self.text);
        let start = |error: &toml::de::Error| error.span().map(|span| span.start);
        sort_by(&mut errors, |one, other| start(one).cmp(&start(other)));
        let errors = errors.into_iter().map(|error| {
            let line = error.span().map_or_else(|| self.whole(), |at| self.line(at));
            let text = error.message().split_whitespace().collect::<Vec<_>>().join(" ");
            match error.span().and_then(|at| self.text.get(at)) {
                Some(key) if text == "duplicate key" => line.duplicate(format_args!("`{key}`")),
                _ => line.error(text),
            }
        });
        // Do not check the values of a file that is not valid TOML: more errors would follow from the same mistake.
        match errors.map(|error| self.note(Err::<(), _>(error))).fold(Ok(()), Result::and) {
            Ok(()) => Ok(table.into_inner()),
            Err(first) => Err(first),
        }
    }

    /// As [`super::line_of_key`].
    pub(super) fn line_of_key(&self, keys: &[&str]) -> SourceLine {
        let (mut line, mut place) = (self.whole(), self.parse().ok());
        for key in keys {
            let Some(value) = place.take().and_then(|mut table| table.remove(*key)) else { break };
            line = self.line(value.span());
            place = match value.into_inner() {
                DeValue::Table(table) => Some(table),
                _ => None,
            };
        }
        line
    }

    /// The side that the file is for; `None`: it has no key that decides it.
    pub(super) fn kind(&self) -> Result<Option<FileKind>, ConfigError> {
        let document = self.parse()?;
        let provider = document.contains_key("spool") || document.contains_key("customers");
        match (provider, document.get("provider")) {
            (true, None) => Ok(Some(FileKind::Provider)),
            (false, Some(_)) => Ok(Some(FileKind::Customer)),
            (false, None) if document.contains_key("domains") => Err(self.whole().error(
                "is the file of one customer at a provider (it has `domains`): name the provider's file, which has `spool` \
                 and `customers`",
            )),
            (false, None) => Ok(None),
            (true, Some(table)) => Err(self.line(table.span()).error(
                "[provider] is for a customer's file, `spool` and `customers` are for a provider's: make two \
                 files of this one",
            )),
        }
    }

    /// The source of an error about the file as a whole.
    pub(super) fn whole(&self) -> SourceLine {
        SourceLine { file: self.file.clone(), line: None }
    }

    /// The line on which something begins.
    pub(super) fn line(&self, at: Range<usize>) -> SourceLine {
        let before = self.line_ends.partition_point(|end| *end < at.start);
        SourceLine { file: self.file.clone(), line: Some(before + 1) }
    }

    /// A path of this file, relative to the directory of the file as the user wrote it.
    pub(super) fn relative(&self, path: &Path) -> PathBuf {
        self.file.parent().unwrap_or(Path::new("")).join(path)
    }

    /// A path of this file, absolute.
    pub(super) fn absolute(&self, path: &Path) -> PathBuf {
        let path = self.relative(path);
        std::path::absolute(&path).unwrap_or(path)
    }
}

/// The text of a file.
///
/// # Errors
///
/// The line that is not UTF-8.
pub(super) fn decode<'a>(file: &Arc<Path>, octets: &'a [u8]) -> Result<&'a str, ConfigError> {
    str::from_utf8(octets).map_err(|cause| {
        let before = octets[..cause.valid_up_to()].iter().filter(|octet| **octet == b'\n').count();
        SourceLine { file: file.clone(), line: Some(before + 1) }.error("is not UTF-8: save it as UTF-8")
    })
}

/// Rejects a file with a secret if all users of this machine may read or change it: they could log in as its owner.
pub(super) fn check_private(mode: u32, path: &Path) -> Result<(), String> {
    // The type of the file, if the system has told it. `chmod 640 /dev/null` would be bad advice.
    let is_file = matches!(mode & 0o170_000, 0 | 0o100_000);
    let what = match (mode & 0o004 != 0, mode & 0o002 != 0) {
        (false, false) => return Ok(()),
        _ if !is_file => return Err(format!("{} is not a file: name a file in its place", path.display())),
        (true, false) => "read",
        (false, true) => "change",
        (true, true) => "read and change",
    };
    Err(format!(
        "there is a secret in {}, and every user may {what} it: chmod 640 {}",
        path.display(),
        shell_word(path)
    ))
}
