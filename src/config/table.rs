//! The tables of a file. A [`Table`] rejects unknown keys, and returns each value once, checked, with its line.
//!
//! It notes each error in the [`Source`], which rejects the file at the end. A caller reads all values before it returns the
//! first error, so that one reading finds all mistakes.

use std::collections::HashSet;
use std::fmt;
use std::hash::Hash;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::source::Source;
use super::value::{ValueKind, wrong_type};
use crate::nearest::nearest;
use crate::recipients::{ConfigError, Located, SourceLine};

/// Keys that had another name in earlier versions: files with the former name are still read.
const FORMER_NAMES: [(&str, &str); 1] = [("delay-notice", "delay-warning")];

/// A table, whose unknown keys have been noted as errors.
pub(super) struct Table<'s> {
    pub(super) file: &'s Source,
    /// The line on which the table begins.
    pub(super) line: SourceLine,
    values: DeTable<'s>,
}

impl<'s> Table<'s> {
    /// A file as a table.
    ///
    /// # Errors
    ///
    /// The file is not valid TOML.
    pub(super) fn root(file: &'s Source, keys: &[&str]) -> Result<Table<'s>, ConfigError> {
        Ok(Table::new(file, file.whole(), file.parse()?, keys))
    }

    /// Notes each unknown key as an error, and each key by its former name as a warning. `keys`: all keys that the table may
    /// have, in the order in which the error about an unknown key lists them.
    fn new(file: &'s Source, line: SourceLine, mut values: DeTable<'s>, keys: &[&str]) -> Table<'s> {
        for (former, name) in FORMER_NAMES {
            let is_free = keys.contains(&name) && !values.contains_key(name);
            if let Some((key, value)) = is_free.then(|| values.remove_entry(former)).flatten() {
                let line = file.line(key.span());
                file.warn(line.error(format!("`{former}` is `{name}` now: write {name} = … in its place")));
                values.insert(Spanned::new(key.span(), name.into()), value);
            }
        }
        let expected = match keys {
            [one, other] => format!("`{one}` or `{other}`"),
            keys => format!("one of `{}`", keys.join("`, `")),
        };
        for unknown in values.keys().filter(|key| !keys.contains(&key.get_ref().as_ref())) {
            let near = nearest(unknown.get_ref(), keys.iter().copied());
            let near = near.map(|near| format!("; did you mean `{near}`?")).unwrap_or_default();
            let text = format!("unknown key `{}`, expected {expected}{near}", unknown.get_ref());
            let _ = file.note(Err::<(), _>(file.line(unknown.span()).error(text)));
        }
        Table { file, line, values }
    }

    /// A value that is not checked yet; `None`: the table has no such key, or its value was read before.
    pub(super) fn take(&mut self, key: &str) -> Option<Value<'s>> {
        self.values.remove(key).map(|value| Value::new(self.file, value))
    }

    /// Whether the table has a value that was not read before.
    pub(super) fn contains(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    /// The line of a value that was not read before; without such a value: of the table.
    pub(super) fn line_of(&self, key: &str) -> SourceLine {
        self.values.get(key).map_or_else(|| self.line.clone(), |value| self.file.line(value.span()))
    }

    /// A value with its line; `None`: the table has no such key.
    pub(super) fn located<T>(&mut self, key: &str, kind: impl ValueKind<T>) -> Result<Option<Located<T>>, ConfigError> {
        self.take(key).map(|value| value.read(&kind)).transpose()
    }

    /// A value without its line; `None`: the table has no such key.
    pub(super) fn get<T>(&mut self, key: &str, kind: impl ValueKind<T>) -> Result<Option<T>, ConfigError> {
        Ok(self.located(key, kind)?.map(|located| located.value))
    }

    /// As [`Table::get`]; `None` also if the value has a mistake, which is noted.
    pub(super) fn optional<T>(&mut self, key: &str, kind: impl ValueKind<T>) -> Option<T> {
        self.get(key, kind).ok().flatten()
    }

    /// A value without its line, or a default; the default also if the value has a mistake, which is noted.
    pub(super) fn or<T>(&mut self, key: &str, kind: impl ValueKind<T>, default: T) -> T {
        self.optional(key, kind).unwrap_or(default)
    }

    /// A mandatory value; `missing`: the text of the error if there is none.
    pub(super) fn required<T>(&mut self, key: &str, kind: impl ValueKind<T>, missing: &str) -> Result<T, ConfigError> {
        let value = self.get(key, kind)?;
        self.file.note(value.ok_or_else(|| self.line.error(missing)))
    }

    /// The values of a list; `None`: the table has no such key.
    pub(super) fn list<T>(
        &mut self, key: &str, kind: impl ValueKind<T>,
    ) -> Result<Option<Vec<Located<T>>>, ConfigError> {
        let Some(list) = self.take(key) else { return Ok(None) };
        match list.value {
            DeValue::Array(values) => {
                let read: Vec<_> = values.into_iter().map(|value| Value::new(self.file, value).read(&kind)).collect();
                read.into_iter().collect::<Result<_, _>>().map(Some)
            }
            other => self.file.note(Err(list.line.error(wrong_type(&other, "a list, in [ ]")))),
        }
    }

    /// A table in this one, which may have these keys; `None`: this one has no such key.
    pub(super) fn table(&mut self, key: &str, keys: &[&str]) -> Result<Option<Table<'s>>, ConfigError> {
        self.take(key).map(|value| value.table(keys, "a table")).transpose()
    }

    /// A table in this one. If it is missing or is another value: a table without values, on the line of this one.
    pub(super) fn table_or_empty(&mut self, key: &str, keys: &[&str]) -> Table<'s> {
        let empty = Table { file: self.file, line: self.line.clone(), values: DeTable::new() };
        self.table(key, keys).ok().flatten().unwrap_or(empty)
    }

    /// The keys and values of a table in this one that may have any keys, sorted by key.
    pub(super) fn entries(&mut self, key: &str) -> Result<Vec<(Located<String>, Value<'s>)>, ConfigError> {
        let expected = "a table, such as { \"example.org\" = \"must\" }";
        self.take(key).map_or_else(|| Ok(Vec::new()), |value| value.entries(expected))
    }
}

/// A value that is not checked yet.
pub(super) struct Value<'s> {
    file: &'s Source,
    pub(super) line: SourceLine,
    pub(super) value: DeValue<'s>,
}

impl<'s> Value<'s> {
    fn new(file: &'s Source, value: Spanned<DeValue<'s>>) -> Value<'s> {
        Value { file, line: file.line(value.span()), value: value.into_inner() }
    }

    /// The checked value.
    pub(super) fn read<T>(self, kind: &impl ValueKind<T>) -> Result<Located<T>, ConfigError> {
        self.file.note(match kind.read(&self.value) {
            Ok(value) => Ok(Located { value, source: self.line }),
            Err(text) => Err(self.line.error(text)),
        })
    }

    /// A string of any kind.
    pub(super) fn string(self, expected: &str) -> Result<Located<String>, ConfigError> {
        match self.value {
            DeValue::String(text) => Ok(Located { value: text.into_owned(), source: self.line }),
            other => Err(self.line.error(wrong_type(&other, expected))),
        }
    }

    /// A table that may have these keys.
    pub(super) fn table(self, keys: &[&str], expected: &str) -> Result<Table<'s>, ConfigError> {
        match self.value {
            DeValue::Table(values) => Ok(Table::new(self.file, self.line, values, keys)),
            other => self.file.note(Err(self.line.error(wrong_type(&other, expected)))),
        }
    }

    /// The keys and values of a table that may have any keys, sorted by key.
    pub(super) fn entries(self, expected: &str) -> Result<Vec<(Located<String>, Value<'s>)>, ConfigError> {
        let file = self.file;
        let entry = |(key, value): (Spanned<_>, _)| {
            let source = file.line(key.span());
            (Located { value: String::from(key.into_inner()), source }, Value::new(file, value))
        };
        match self.value {
            DeValue::Table(values) => Ok(values.into_iter().map(entry).collect()),
            other => Err(self.line.error(wrong_type(&other, expected))),
        }
    }

    /// The values of a list, or this value alone.
    pub(super) fn one_or_many(self) -> Vec<Value<'s>> {
        match self.value {
            DeValue::Array(values) => values.into_iter().map(|value| Value::new(self.file, value)).collect(),
            _ => vec![self],
        }
    }
}

/// The values of a list, without their lines.
pub(super) fn values<T>(list: Vec<Located<T>>) -> Vec<T> {
    list.into_iter().map(|entry| entry.value).collect()
}

/// Rejects a list in which a value occurs twice.
pub(super) fn check_unique<'a, T: Eq + Hash + fmt::Display + 'a>(
    entries: impl IntoIterator<Item = &'a Located<T>>,
) -> Result<(), ConfigError> {
    let mut seen = HashSet::new();
    let again = entries.into_iter().find(|entry| !seen.insert(&entry.value));
    again.map_or(Ok(()), |entry| Err(entry.source.duplicate(&entry.value)))
}
