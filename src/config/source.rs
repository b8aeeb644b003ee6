//! The files that are read: their text, their places, and what an error about them looks like.

use std::fmt;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use toml::Spanned;

use crate::recipients::{RuleError, SourceLine};

/// A mistake in a configuration. Shown as `FILE:LINE: text`, one line.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConfigError {
    pub file: PathBuf,
    /// From 1; `None`: the file as a whole, or something is missing.
    pub line: Option<usize>,
    /// What is wrong, what is allowed, and what to change.
    pub text: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = self.file.display();
        let line = match self.line {
            Some(line) => format!("{file}:{line}: {}", self.text),
            None => format!("{file}: {}", self.text),
        };
        // The name of a file may have a line end in it.
        f.write_str(&line.replace(char::is_control, "?"))
    }
}

impl std::error::Error for ConfigError {}

impl From<RuleError> for ConfigError {
    fn from(RuleError { source, text }: RuleError) -> ConfigError {
        ConfigError { file: source.file.to_path_buf(), line: Some(source.line), text }
    }
}

/// The keys that tell the two kinds of files apart.
#[derive(Deserialize)]
struct Outline {
    provider: Option<Spanned<IgnoredAny>>,
    spool: Option<IgnoredAny>,
    customers: Option<IgnoredAny>,
}

pub(super) enum FileKind {
    Provider,
    Customer,
}

/// One file, in memory while it is checked, so that an error can name the line.
pub(super) struct Source {
    pub(super) file: Arc<Path>,
    text: String,
    pub(super) metadata: Metadata,
    /// Whether to read files with secrets: a user who only submits mail needs none, and may not be able to read them.
    pub(super) reads_secrets: bool,
}

impl Source {
    pub(super) fn read(path: &Path) -> Result<Source, ConfigError> {
        let error = |text: String| ConfigError { file: path.to_owned(), line: None, text };
        let (metadata, octets) = read(path).map_err(|cause| error(format!("cannot be read: {cause}")))?;
        let text = String::from_utf8(octets).map_err(|cause| {
            let before = &cause.as_bytes()[..cause.utf8_error().valid_up_to()];
            ConfigError {
                line: Some(line_number(before)),
                ..error("is not UTF-8, as TOML must be: save it as UTF-8".to_owned())
            }
        })?;
        Ok(Source { file: path.into(), text, metadata, reads_secrets: true })
    }

    pub(super) fn parse<T: DeserializeOwned>(&self) -> Result<T, ConfigError> {
        toml::from_str(&self.text).map_err(|error| {
            let at = error.span();
            let mut text = one_line(error.message());
            if let Some(key) = at.clone().and_then(|at| self.text.get(at)).filter(|_| text == "duplicate key") {
                text = format!("`{key}` stands here a second time: take one of the two out");
            }
            self.error(at, text)
        })
    }

    pub(super) fn kind(&self) -> Result<Option<FileKind>, ConfigError> {
        let outline: Outline = self.parse()?;
        let provider = outline.spool.is_some() || outline.customers.is_some();
        match (provider, outline.provider) {
            (true, None) => Ok(Some(FileKind::Provider)),
            (false, Some(_)) => Ok(Some(FileKind::Customer)),
            (false, None) => Ok(None),
            (true, Some(table)) => Err(self.error(
                table.span(),
                "[provider] is for a customer's file, `spool` and `customers` are for a provider's: make two \
                 files of this one",
            )),
        }
    }

    pub(super) fn error(&self, at: impl Into<Option<Range<usize>>>, text: impl Into<String>) -> ConfigError {
        let line = at.into().map(|at| self.line(at).line);
        ConfigError { file: self.file.to_path_buf(), line, text: text.into() }
    }

    /// The line on which something begins.
    pub(super) fn line(&self, at: Range<usize>) -> SourceLine {
        let before = self.text.as_bytes().get(..at.start).unwrap_or_default();
        SourceLine { file: self.file.clone(), line: line_number(before) }
    }

    /// The directory that relative paths begin in, as the user wrote it.
    pub(super) fn directory(&self) -> &Path {
        self.file.parent().unwrap_or(Path::new(""))
    }

    /// Makes a path of this file absolute.
    pub(super) fn absolute(&self, path: &Path) -> PathBuf {
        let path = self.directory().join(path);
        std::path::absolute(&path).unwrap_or(path)
    }
}

/// The number, from 1, of the line that `before` ends in.
pub(super) fn line_number(before: &[u8]) -> usize {
    1 + before.iter().filter(|&&octet| octet == b'\n').count()
}

/// The error text of the TOML parser in one line, in the words of this program.
fn one_line(message: &str) -> String {
    message
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
        .replace("unknown field", "unknown key")
        .replace("expected a sequence", "expected a list, in [ ]")
        .replace("expected a map", "expected a table, such as { \"example.org\" = \"must\" }")
        .replace("expected a boolean", "expected true or false")
}

/// Octets of a file. A longer one is not a configuration, and would use up the memory.
const FILE_SIZE_LIMIT: u64 = 16 << 20;

pub(super) fn read(path: &Path) -> io::Result<(Metadata, Vec<u8>)> {
    // Opening a pipe waits for a writer, perhaps forever.
    if fs::metadata(path)?.file_type().is_fifo() {
        return Err(io::Error::other("is a pipe, and must be a file"));
    }
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    let mut octets = Vec::new();
    if file.take(FILE_SIZE_LIMIT + 1).read_to_end(&mut octets)? as u64 > FILE_SIZE_LIMIT {
        return Err(io::Error::other("it has more than 16 MiB"));
    }
    Ok((metadata, octets))
}

/// Rejects a file with a secret if every user of this machine may read or change it.
pub(super) fn check_private(metadata: &Metadata, path: &Path) -> Result<(), String> {
    let mode = metadata.permissions().mode();
    let what = match (mode & 0o004 != 0, mode & 0o002 != 0) {
        (false, false) => return Ok(()),
        (true, false) => "read",
        (false, true) => "change",
        (true, true) => "read and change",
    };
    let path = path.display();
    Err(format!("there is a secret in {path}, and every user may {what} it: chmod 640 {path}"))
}
