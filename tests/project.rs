//! The files of the project, for the tests that read them as text.

use std::fs;
use std::path::{Path, PathBuf};

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The text of a file; a relative path begins at the root.
pub fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// All files below a directory, in order; a relative path begins at the root.
pub fn files(directory: impl AsRef<Path>) -> Vec<PathBuf> {
    files_without(directory, &[])
}

/// As [`files`], but for those in directories of these names.
pub fn files_without(directory: impl AsRef<Path>, left_out: &[&str]) -> Vec<PathBuf> {
    let (mut directories, mut files) = (vec![root().join(directory)], Vec::new());
    while let Some(directory) = directories.pop() {
        let entries = fs::read_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
        for path in entries.map(|entry| entry.expect("an entry").path()) {
            if !path.is_dir() {
                files.push(path);
            } else if !left_out.iter().any(|name| path.ends_with(name)) {
                directories.push(path);
            }
        }
    }
    files.sort();
    files
}

pub fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found == extension)
}

/// What a text has between backquotes.
pub fn code_spans(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}
