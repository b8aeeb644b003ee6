//! The house: modules lie on floors, and each uses lower floors only (the list stands in `src/lib.rs`).
//!
//! What holds the design together is what does *not* occur. These tests read the sources and say so, file by file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Floors whose rooms may use each other: the protocol, the ground, the session and its turn, the door.
const NEIGHBOURS: &[usize] = &[1, 2, 4, 6];

#[test]
fn every_module_stands_on_a_floor() {
    let floors = floors();
    for source in sources() {
        let named = source.room == "lib" || source.room == "main" || floors.contains_key(&source.room);
        assert!(named, "{} is on no floor of src/lib.rs", source.path);
    }
}

#[test]
fn modules_use_lower_floors_only() {
    let floors = floors();
    let mut wrong = Vec::new();
    for source in sources().iter().filter(|source| source.room != "lib" && source.room != "main") {
        let Some(floor) = floors.get(&source.room) else { continue };
        for used in source.rooms_used(&floors) {
            let other = floors[&used];
            if used != source.room && other >= *floor && !(other == *floor && NEIGHBOURS.contains(floor)) {
                wrong.push(format!("{} (floor {floor}) uses {used} (floor {other})", source.path));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// `super::super` would be a way round the other tests: such a path begins with `crate::`.
#[test]
fn no_path_climbs_twice() {
    forbid("super::super", |_| true, |_| false);
}

/// Floor 1 is the protocol: no sockets, no files, no clock, no threads.
#[test]
fn the_protocol_is_pure() {
    let floors = floors();
    for name in ["std::net", "std::fs", "std::time", "std::thread", "std::io", "rustix::", "std::os"] {
        forbid(name, |source| floors.get(&source.room) == Some(&1), |_| false);
    }
    // `use std::{io, …}` would hide them.
    forbid("use std::{", |source| floors.get(&source.room) == Some(&1), |_| false);
}

#[test]
fn the_calendar_stands_in_one_file() {
    forbid("jiff", |_| true, |source| source.path == "src/stamp.rs");
}

#[test]
fn tls_types_stand_in_one_file() {
    forbid("rustls::", |_| true, |source| source.path == "src/tls.rs");
    forbid("rustls_pemfile", |_| true, |source| source.path == "src/tls.rs");
    forbid("rcgen::", |_| true, |source| source.path == "src/tls.rs");
}

#[test]
fn no_unsafe_code() {
    forbid("unsafe", |_| true, |_| false);
    let lib = std::fs::read_to_string(root().join("src/lib.rs")).expect("src/lib.rs");
    assert!(lib.contains("#![forbid(unsafe_code)]"));
}

/// Only the queue settles, so only the queue and the Maildirs it stands on make files vanish.
#[test]
fn only_the_queue_removes_mail() {
    let may = |source: &Source| ["queue", "maildir", "cli", "demo"].contains(&source.room.as_str());
    for name in ["remove_file", "remove_dir", "fs::rename", "unlink", "renameat"] {
        forbid(name, |_| true, may);
    }
}

/// Each file says at its head what it is.
#[test]
fn every_file_begins_with_its_contract() {
    for source in sources() {
        assert!(source.text.starts_with("//!"), "{} begins without //!", source.path);
    }
}

struct Source {
    /// `src/queue/mod.rs`
    path: String,
    /// The top-level module: `queue`.
    room: String,
    text: String,
    /// Without comments.
    code: String,
}

impl Source {
    /// The rooms that this file names: `crate::queue::…`, `crate::{queue, wire}`, and `super::queue` at the top level.
    fn rooms_used(&self, floors: &BTreeMap<String, usize>) -> Vec<String> {
        let top_level = self.path.matches('/').count() == 1;
        let roots = ["crate::"].iter().chain(top_level.then_some(&"super::"));
        let mut names = Vec::new();
        for root in roots {
            for (at, _) in self.code.match_indices(root) {
                let rest = &self.code[at + root.len()..];
                match rest.strip_prefix('{') {
                    Some(group) => names.extend(heads_of(group)),
                    None => names.push(word(rest)),
                }
            }
        }
        names.into_iter().filter(|name| floors.contains_key(*name)).map(str::to_owned).collect()
    }

    /// What is not unit tests; they stand last.
    fn product(&self) -> &str {
        self.code.split("#[cfg(test)]\nmod ").next().unwrap_or_default()
    }
}

/// The first words of a `{a::b, c::{d, e}}` group's members, from behind its opening brace.
fn heads_of(group: &str) -> Vec<&str> {
    let (mut depth, mut heads, mut begins) = (0, Vec::new(), true);
    for (at, character) in group.char_indices() {
        match character {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => begins = true,
            _ if begins && !character.is_whitespace() => {
                heads.push(word(&group[at..]));
                begins = false;
            }
            _ => {}
        }
    }
    heads
}

fn word(text: &str) -> &str {
    let end = text.find(|character: char| !character.is_alphanumeric() && character != '_').unwrap_or(text.len());
    &text[..end]
}

/// Fails for each file among `among`, not excepted, whose product code has `name` as a word of its own.
fn forbid(name: &str, among: impl Fn(&Source) -> bool, except: impl Fn(&Source) -> bool) {
    let mut wrong = Vec::new();
    for source in sources().iter().filter(|source| among(source) && !except(source)) {
        let text = source.product();
        let of_a_word = |character: Option<char>| {
            character.is_some_and(|character| character.is_alphanumeric() || character == '_')
        };
        let found = text.match_indices(name).any(|(at, _)| {
            let before = of_a_word(text[..at].chars().next_back());
            let after = name.ends_with(|last: char| last.is_alphanumeric())
                && of_a_word(text[at + name.len()..].chars().next());
            !before && !after
        });
        if found {
            wrong.push(source.path.clone());
        }
    }
    assert!(wrong.is_empty(), "{name} is named in {}", wrong.join(", "));
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The floor of each module of `src/lib.rs`: `// floor 2: ground` and the `pub mod` lines below it.
fn floors() -> BTreeMap<String, usize> {
    let lib = std::fs::read_to_string(root().join("src/lib.rs")).expect("src/lib.rs");
    let (mut floors, mut floor) = (BTreeMap::new(), None);
    for line in lib.lines() {
        if let Some((number, _)) = line.strip_prefix("// floor ").and_then(|rest| rest.split_once(':')) {
            floor = Some(number.parse().unwrap_or_else(|_| panic!("not a floor: {line}")));
        }
        let module =
            line.strip_prefix("pub mod ").or(line.strip_prefix("mod ")).and_then(|rest| rest.strip_suffix(';'));
        if let Some(module) = module {
            floors.insert(module.to_owned(), floor.unwrap_or_else(|| panic!("{module} is above the first floor")));
        }
    }
    assert!(!floors.is_empty(), "src/lib.rs names no floors");
    floors
}

fn sources() -> Vec<Source> {
    let (mut folders, mut files): (Vec<PathBuf>, Vec<PathBuf>) = (vec![root().join("src")], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a source folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    files.iter().map(|path| source(path)).collect()
}

fn source(path: &Path) -> Source {
    let text = std::fs::read_to_string(path).expect("a source file");
    let path = path.strip_prefix(root()).expect("below the root").display().to_string();
    let below = path.trim_start_matches("src/");
    let room = below.split('/').next().unwrap_or_default().trim_end_matches(".rs").to_owned();
    let without_comment = |line: &str| line.split("//").next().unwrap_or_default().to_owned();
    let code = text.lines().map(without_comment).collect::<Vec<_>>().join("\n");
    Source { path, room, text, code }
}

#[test]
fn groups_are_read() {
    assert_eq!(heads_of("a::b, c::{d, e},\n    f}; g"), ["a", "c", "f"]);
}
