//! Configurations: the input is one file or several, each after a line `-- NAME --`. The first one is loaded.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use odmr::config::{Config, ConfigError, effective};

use super::check;
use super::folder::folder;

/// Files of one input.
const MOST_FILES: usize = 8;

pub fn run(input: &[u8]) {
    let folder = folder();
    let files = files(input);
    for (name, content) in &files {
        write(&folder.path().join(name), content);
    }
    let Some((first, _)) = files.first() else { return };
    let path = folder.path().join(first);
    let (built, findings) = Config::examine(&path);
    let loaded = Config::load(&path);
    findings.errors.iter().chain(&findings.skipped).chain(&findings.warnings).for_each(shown);
    // All mistakes are found, and the first of them is the one that counts.
    match &loaded {
        Ok(_) => assert!(findings.errors.is_empty() && built.is_some(), "{:?}", findings.errors),
        Err(error) => assert!(findings.errors.contains(error), "{error} is not among {:?}", findings.errors),
    }
    match (effective(&path), loaded) {
        (Ok(printed), Ok(_)) => printed_again(folder.path(), &printed),
        (Err(one), Err(other)) => assert_eq!(one, other),
        (one, other) => panic!("{one:?}, and loaded it is {:?}", other.map(drop)),
    }
}

/// The files of an input, with names that lead to no other directory.
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

/// Writes a file that only we may read; not if another one of the input is in the way.
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

/// What is printed is a configuration again, and prints the same.
fn printed_again(folder: &Path, printed: &str) {
    let own = printed.split("\n# ").next().unwrap_or_default();
    let (head, rest) = own.split_once('\n').expect("a line with the name of the file");
    assert!(head.starts_with("# "));
    let path = folder.join("printed.toml");
    write(&path, rest.as_bytes());
    let again = match effective(&path) {
        Ok(again) => again,
        Err(error) => panic!("{error}\n{rest}"),
    };
    let again = again.split("\n# ").next().and_then(|own| own.split_once('\n'));
    assert_eq!(again.map(|(_, again)| again.trim_end()), Some(rest.trim_end()));
}
