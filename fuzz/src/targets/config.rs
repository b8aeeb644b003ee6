//! Configurations: the input is one file, or several, each after a line `-- NAME --`. The first one is loaded.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use odmr::config::{Config, ConfigError, effective};

use super::check;
use super::directory::temporary_directory;

/// The most files of one input.
const MOST_FILES: usize = 8;

pub fn run(input: &[u8]) {
    let root = temporary_directory();
    let files = files(input);
    for (name, content) in &files {
        write(&root.path().join(name), content);
    }
    let Some((first, _)) = files.first() else { return };
    let path = root.path().join(first);
    let (built, findings) = Config::examine(&path);
    let loaded = Config::load(&path);
    findings.errors.iter().chain(&findings.skipped).chain(&findings.warnings).for_each(shown);
    // The error of a load is one of those that the check finds.
    match &loaded {
        Ok(_) => assert!(findings.errors.is_empty() && built.is_some(), "{:?}", findings.errors),
        Err(error) => assert!(findings.errors.contains(error), "{error} is not among {:?}", findings.errors),
    }
    match (effective(&path), loaded) {
        (Ok(printed), Ok(_)) => printed_again(root.path(), &printed),
        (Err(one), Err(other)) => assert_eq!(one, other),
        (one, other) => panic!("{one:?}, and loaded it is {:?}", other.map(drop)),
    }
}

/// The files of an input. Their names do not lead to another directory.
fn files(input: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<(String, Vec<u8>)> = Vec::new();
    for line in input.split_inclusive(|octet| *octet == b'\n') {
        let text = std::str::from_utf8(line).unwrap_or_default();
        let name = text.strip_prefix("-- ").and_then(|rest| rest.strip_suffix(" --\n"));
        let is_name = |name: &&str| {
            let plain = |octet: u8| octet.is_ascii_alphanumeric() || b"-._/".contains(&octet);
            !name.is_empty() && name.len() <= 60 && name.bytes().all(plain) && !name.starts_with('/')
        };
        match name.filter(is_name).filter(|name| !name.contains("..")) {
            Some(_) if files.len() == MOST_FILES => break,
            Some(name) => files.push((name.to_owned(), Vec::new())),
            None => match files.last_mut() {
                Some((_, content)) => content.extend_from_slice(line),
                None => files.push(("odmr.toml".to_owned(), line.to_vec())),
            },
        }
    }
    files
}

/// Writes a file that only this user may read. If the input has a file where a directory is needed, nothing is written.
pub fn write(path: &Path, content: &[u8]) {
    let _ = path.parent().map(fs::create_dir_all);
    if fs::write(path, content).is_ok() {
        let _ = fs::set_permissions(path, Permissions::from_mode(0o600));
    }
}

fn shown(error: &ConfigError) {
    let text = error.to_string();
    check::shown(&text);
    assert!(!text.is_empty());
}

/// Checks that the printed configuration can be loaded, and prints the same.
fn printed_again(root: &Path, printed: &str) {
    let own = printed.split("\n# ").next().unwrap_or_default();
    let (head, rest) = own.split_once('\n').expect("a line with the name of the file");
    assert!(head.starts_with("# "));
    let path = root.join("printed.toml");
    write(&path, rest.as_bytes());
    let again = match effective(&path) {
        Ok(again) => again,
        Err(error) => panic!("{error}\n{rest}"),
    };
    let again = again.split("\n# ").next().and_then(|own| own.split_once('\n'));
    assert_eq!(again.map(|(_, again)| again.trim_end()), Some(rest.trim_end()));
}
