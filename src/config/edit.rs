//! Changes the file of a customer at its provider: replaces the secret by a verifier, and leaves the rest as it is.

use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::de::DeValue;

use super::accounts::Account;
use super::source::Source;
use crate::recipients::ConfigError;
use crate::sorting::sort_by;

/// The changed text of a customer's file.
pub struct ChangedFile {
    pub text: String,
    /// The file of `secret-file`, which the changed file no longer names.
    pub secret_file: Option<PathBuf>,
    source: Source,
}

impl ChangedFile {
    /// Checks that the changed file is valid. Otherwise the provider would skip it, and the old secret would still open
    /// the account. `tls`: whether the provider has a certificate.
    ///
    /// # Errors
    ///
    /// The first mistake.
    pub fn check_account(&self, tls: bool) -> Result<(), ConfigError> {
        let (account, _) = self.source.finish(|source| Account::read(source, tls));
        let unchanged = |error: ConfigError| error.source.error(format!("{}; nothing is changed", error.text));
        account.map(drop).map_err(unchanged)
    }
}

/// Returns the text of a customer's file in which `scram`, with this verifier, replaces `secret`, `secret-file` or another
/// `scram`. Comments and all other keys stay. The file itself is not changed.
///
/// # Errors
///
/// The file cannot be read, or is not valid TOML.
pub fn with_verifier(path: &Path, verifier: &str) -> Result<ChangedFile, ConfigError> {
    let source = Source::read(path)?;
    let (mut spans, mut secret_file) = (Vec::new(), None);
    for (key, value) in source.parse()? {
        if !["secret", "secret-file", "scram"].contains(&key.get_ref().as_ref()) {
            continue;
        }
        spans.push(key.span().start..value.span().end);
        if let (true, DeValue::String(file)) = (key.get_ref() == "secret-file", value.get_ref()) {
            secret_file = Some(source.relative(Path::new(file.as_ref())));
        }
    }
    let line = format!("scram = \"{verifier}\"");
    let first = spans.iter().map(|span| span.start).min();
    let with = |span: Range<usize>| {
        let text = if Some(span.start) == first { line.clone() } else { String::new() };
        (span, text)
    };
    let mut text = edited(source.text(), spans.into_iter().map(with).collect());
    if first.is_none() {
        let separator = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
        text.push_str(&format!("{separator}{line}\n"));
    }
    // Check the result: at the end of some files the new line would be part of a table.
    let changed = Source::new(&source.file, &text, source.mode);
    let is_changed = changed.parse().is_ok_and(|table| {
        let value = table.get("scram").and_then(|value| value.get_ref().as_str().map(str::to_owned));
        value.as_deref() == Some(verifier) && !table.contains_key("secret") && !table.contains_key("secret-file")
    });
    match is_changed {
        true => Ok(ChangedFile { text, secret_file, source: changed }),
        false => Err(source.whole().error(format!("cannot be changed: write {line} in it, in place of the secret"))),
    }
}

/// Returns the text with these ranges replaced, which must not overlap. Removes lines that become blank.
pub(super) fn edited(text: &str, mut edits: Vec<(Range<usize>, String)>) -> String {
    sort_by(&mut edits, |(one, _), (other, _)| one.start.cmp(&other.start));
    let mut changed = text.to_owned();
    // Begin with the last one, so that the offsets of the others stay valid.
    for (span, with) in edits.into_iter().rev() {
        changed.replace_range(span.clone(), &with);
        if with.is_empty() {
            remove_if_blank(&mut changed, span.start);
        }
    }
    changed
}

/// Removes the line at this offset if it is blank.
fn remove_if_blank(text: &mut String, at: usize) {
    let begin = text[..at].rfind('\n').map_or(0, |end| end + 1);
    let end = text[at..].find('\n').map_or(text.len(), |end| at + end + 1);
    if text[begin..end].trim().is_empty() {
        text.replace_range(begin..end, "");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(text: &str) -> Result<(String, Option<String>), String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("acme.toml");
        std::fs::write(&path, text).unwrap();
        let name = |path: PathBuf| path.file_name().unwrap().display().to_string();
        with_verifier(&path, "V")
            .map(|changed| (changed.text, changed.secret_file.map(name)))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn the_verifier_takes_the_place_of_the_secret_and_all_else_stays() {
        let check = |before: &str, after: &str, file: Option<&str>| {
            assert_eq!(changed(before).unwrap(), (after.to_owned(), file.map(str::to_owned)), "{before:?}");
        };
        let scram = "scram = \"V\"";
        let domains = "domains = [\"example.org\"]";
        check(
            &format!("# Acme\n{domains}\n\nsecret = \"x\" # by telephone\nrelay = false\n"),
            &format!("# Acme\n{domains}\n\n{scram} # by telephone\nrelay = false\n"),
            None,
        );
        check(
            &format!("secret-file = 'acme.key'\r\n{domains}\r\n"),
            &format!("{scram}\r\n{domains}\r\n"),
            Some("acme.key"),
        );
        check(&format!("{domains}\nscram=\"old\""), &format!("{domains}\n{scram}"), None);
        check(&format!("  \"secret\"  =  \"\"\"\nx\"\"\"\n{domains}\n"), &format!("  {scram}\n{domains}\n"), None);
        // Several secrets are a mistake, which this corrects.
        check(&format!("secret = 'x'\n{domains}\nscram = 'x'\n"), &format!("{scram}\n{domains}\n"), None);
        check(&format!("{domains}\nsecret = 'x'\nscram = 'x' # old\n"), &format!("{domains}\n{scram}\n # old\n"), None);
        // An account that opens by a certificate only.
        check(domains, &format!("{domains}\n{scram}\n"), None);
        check("", &format!("{scram}\n"), None);
        // In a comment, not a key.
        let note = "domains = [\"example.org\"] # secret = \"x\"\n";
        check(note, &format!("{note}{scram}\n"), None);
    }

    #[test]
    fn a_file_that_cannot_be_changed_is_named() {
        let error = changed("domains = [").unwrap_err();
        assert!(error.contains("acme.toml:1: "), "{error}");
        // At its end a key would be part of the table.
        let error = changed("[table]\n").unwrap_err();
        assert!(error.contains("acme.toml: cannot be changed: write scram = "), "{error}");
    }
}
