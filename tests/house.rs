//! The house: the order of the modules, and what must not occur in them.
//!
//! `src/lib.rs` lists the top-level modules, called rooms, in the order of reading; each uses earlier ones only. These
//! tests read the sources and list every violation by file and line. `make house` prints the rooms with their sizes and
//! runs these tests.
//!
//! Product code is the code outside `#[cfg(test)]` and outside files declared under it (`tests.rs`).

mod items;
mod order;
mod paths;
pub(crate) mod source;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::OnceLock;

use items::{Definition, Extent, definitions, functions, test_modules};
use order::Crate;
use paths::{Path, tokens};
use source::{Source, closing, root, sources};

const MOST_PRODUCT_LINES: usize = 37_100;
const LONGEST_FUNCTION: usize = 70;
const LONGEST_TEST_MODULE: usize = 150;

/// Modules without sockets, files, clocks, randomness and threads, and the modules that each may use besides itself.
/// `sasl`, `mail` and `smtp` use so little of the crate that they could be a separate one.
const PURE: [(&str, &[&str]); 7] = [
    ("sasl", &["mail", "smtp", "clock::Timestamp"]),
    ("mail", &["sasl", "smtp", "clock::Timestamp", "sorting"]),
    ("smtp", &["sasl", "mail", "clock::Timestamp"]),
    ("report::dsn", &["sasl", "mail", "smtp", "clock::Timestamp"]),
    ("report::clock_history", &["clock::Timestamp", "sorting"]),
    ("schedule", &["sasl", "mail", "smtp", "clock"]),
    ("recipients", &["sasl", "mail", "smtp", "clock::Timestamp"]),
];

/// Modules of the standard library that pure code must not use, with the plain values in them that it may.
const IMPURE: [(&str, &[&str]); 8] = [
    ("env", &[]),
    ("fs", &[]),
    ("io", &[]),
    ("net", &["IpAddr", "Ipv4Addr", "Ipv6Addr", "SocketAddr", "AddrParseError"]),
    ("os", &[]),
    ("process", &[]),
    ("thread", &[]),
    ("time", &["Duration"]),
];

/// Dependencies that only compute. Pure code uses no others.
const COMPUTING_CRATES: [&str; 7] = ["data-encoding", "hmac", "idna", "md-5", "serde", "sha2", "subtle"];

/// Libraries that one file only uses.
const ONE_FILE: [(&str, &str); 7] = [
    ("jiff", "src/clock.rs"),
    ("landlock", "src/sandbox.rs"),
    ("mio", "src/net/poller.rs"),
    ("rcgen", "src/net/tls.rs"),
    ("rustls", "src/net/tls.rs"),
    ("rustls_native_certs", "src/net/tls.rs"),
    ("rustls_pemfile", "src/net/tls.rs"),
];

/// The files and directories whose code removes or renames files, and why.
const REMOVES_FILES: [(&str, &str); 4] = [
    ("src/cli/demo.rs", "its temporary directory"),
    ("src/maildir/", "messages, moved from tmp to new; quota records; what a crash left in tmp"),
    ("src/net/wake.rs", "its socket"),
    ("src/queue/", "messages that are settled; takeover requests"),
];

const REMOVING: [&str; 8] =
    ["remove_file", "remove_dir", "remove_dir_all", "rename", "renameat", "renameat_with", "unlink", "unlinkat"];

/// Names that no definition has any more, besides those with a word that `tests/words.rs` forbids.
const OLD_NAMES: &str = "
    Batch Hold Held NoHold Place Fate Outcome Decided Desk Post Told Words Session Dialogue Call Caller
    Party Host Secrets Intake Taking Stored Arrival Sorter Bounds Pace Gone Stop Halt Plan Offered Offers Said Origin
    Chunks Liner Sizer Headers Gate Visitors Book Visit Bell Line Diary Now Ready AtEnd Key Calendar Date Hosts
    Guest Talk Obstacle Written Name Mistake Found Walk Rule Shelf Outgoing Order Wishes Copies Prepared Ledger
    Amount Scratch Tally Wire Stamps Secure ServerSide ClientSide Hop Unresolved Upstream
    GLANCE SOON REST DOWN ASKED TAKEN FAREWELL PATIENCE LOOK_AROUND BLOCK";

/// Old names that one file has in another sense of the word.
const PERMITTED_NAMES: [(&str, &str, &str); 2] = [
    ("Host", "src/mail/address.rs", "a domain or an address literal, after @ or EHLO"),
    ("Line", "src/net/connection.rs", "a line of octets that was read"),
];

/// Each check relies on `blank`. If it misreads a comment or a literal, a bracket has no partner.
#[test]
fn the_brackets_of_every_file_match() {
    let unmatched = |source: &&Source| {
        let code = format!("{{{}}}", source.code);
        closing(&code, 0) != Some(code.len() - 1)
    };
    let unmatched = house().sources.iter().filter(unmatched);
    check("correct `blank` in tests/house/source.rs", unmatched.map(|source| source.at(1)));
}

#[test]
fn every_module_is_in_the_order_of_lib_rs() {
    let house = house();
    let known = |source: &&Source| source.room().is_none_or(|room| house.rooms.iter().any(|other| other == room));
    let unknown = house.sources.iter().filter(|source| !known(source));
    check("add `pub mod …;` to src/lib.rs at its place in the order of reading", unknown.map(|source| source.at(1)));
}

#[test]
fn each_room_uses_earlier_rooms_only() {
    check(
        "move what is used to the room that uses it, or to one before it in src/lib.rs",
        house().uses_against_the_order(),
    );
}

/// Each of these would hide a use of another module from the check of the order.
#[test]
fn no_path_leads_around_the_order() {
    let mut findings = words_in_all_code(&["super", "::", "super"], "begin the path with crate::");
    findings.extend(words_in_all_code(&["#", "[", "path"], "keep the file where its module name says"));
    findings.extend(words_in_all_code(&["include", "!"], "make it a module"));
    check("paths and files are where their names say", findings);
}

#[test]
fn the_files_of_a_room_form_no_circle() {
    check("move what both sides use into a file that uses neither", house().circles());
}

#[test]
fn pure_code_names_no_socket_file_clock_randomness_or_thread() {
    let impure_crates = impure_crates();
    let mut findings = Vec::new();
    for (module, allowed) in PURE {
        let below = |source: &Source| format!("{}::", source.module.join("::")).starts_with(&format!("{module}::"));
        if !house().sources.iter().any(below) {
            findings.push(format!("src/lib.rs: there is no {module}"));
        }
        for (source, path) in house().uses().filter(|(source, _)| below(source)) {
            let pure = match path.segment(0) {
                "crate" => path.is_below(&format!("crate::{module}")) || is_allowed(path, allowed),
                _ => is_pure(path, &impure_crates),
            };
            if !pure {
                findings.push(format!("{}: {path}", source.at(path.line)));
            }
        }
    }
    check("pass the value to the pure code, or do this in the caller (see PURE and IMPURE)", findings);
}

#[test]
fn tls_time_and_polling_libraries_are_named_in_one_file_each() {
    let house = house();
    let mut findings = Vec::new();
    for (library, only) in ONE_FILE {
        let uses = house
            .uses()
            .filter(|(source, path)| source.path != only && path.segments.iter().any(|segment| segment == library));
        findings.extend(uses.map(|(source, path)| format!("{}: {path}: belongs in {only}", source.at(path.line))));
    }
    check("use the types of the file that uses this library", findings);
}

#[test]
fn only_queue_and_maildir_remove_or_rename_files() {
    let removes =
        |(_, path): &(&Source, &Path)| path.segments.last().is_some_and(|last| REMOVING.contains(&last.as_str()));
    let (mut findings, mut used) = (Vec::new(), Vec::new());
    for (source, path) in house().paths().filter(removes) {
        match REMOVES_FILES.iter().find(|(allowed, _)| source.path.starts_with(allowed)) {
            Some((allowed, _)) => used.push(*allowed),
            None => findings.push(format!("{}: {path}", source.at(path.line))),
        }
    }
    let unused = REMOVES_FILES.iter().filter(|(allowed, _)| !used.contains(allowed));
    findings.extend(unused.map(|(allowed, _)| format!("{allowed} removes nothing: delete it from REMOVES_FILES")));
    check("let queue or maildir do it, or give the reason in REMOVES_FILES", findings);
}

#[test]
fn no_code_is_unsafe() {
    let lib = std::fs::read_to_string(root().join("src/lib.rs")).expect("src/lib.rs");
    assert!(lib.contains("#![forbid(unsafe_code)]"), "src/lib.rs: add #![forbid(unsafe_code)]");
    check("unsafe code is forbidden", words_in_all_code(&["unsafe"], "write it without"));
}

#[test]
fn every_file_begins_with_its_documentation() {
    let house = house();
    let without = house.sources.iter().filter(|source| !source.text.starts_with("//!"));
    check("begin the file with //! and a sentence about it", without.map(|source| source.at(1)));
}

#[test]
fn one_exported_name_is_one_concept() {
    let mut by_name: BTreeMap<String, Vec<(String, Definition)>> = BTreeMap::new();
    for source in &house().sources {
        let mut of_file = definitions(&source.product);
        // Two definitions in one module are alternatives by `cfg`.
        of_file.dedup_by(|one, other| (&one.name, &one.inline) == (&other.name, &other.inline));
        for found in of_file.into_iter().filter(|found| found.name != "_") {
            by_name.entry(found.name.clone()).or_default().push((source.at(found.line), found));
        }
    }
    let twice = by_name.iter().filter(|(_, all)| all.len() > 1 && all.iter().any(|(_, found)| found.exported));
    let finding = |(name, all): (&String, &Vec<(String, Definition)>)| {
        let place = |(at, found): &(String, Definition)| {
            format!("\n    {at}: {}", if found.exported { "exported" } else { "private" })
        };
        format!("{name}{}", all.iter().map(place).collect::<String>())
    };
    check("give each concept its own name", twice.map(finding));
}

#[test]
fn no_old_name_is_defined() {
    let (mut findings, mut used) = (Vec::new(), Vec::new());
    for source in &house().sources {
        for found in definitions(&source.code) {
            if !OLD_NAMES.split_whitespace().any(|old| old == found.name) {
                continue;
            }
            match PERMITTED_NAMES.iter().find(|(name, path, _)| *name == found.name && *path == source.path) {
                Some(permitted) => used.push(permitted),
                None => findings.push(format!("{}: {}", source.at(found.line), found.name)),
            }
        }
    }
    let unused = PERMITTED_NAMES.iter().filter(|permitted| !used.contains(permitted));
    findings.extend(unused.map(|(name, path, _)| format!("{path} defines no {name}: delete it from PERMITTED_NAMES")));
    check("these words were replaced in the whole program: use the term of the field", findings);
}

#[test]
fn no_function_is_longer_than_a_screen() {
    let long = all_functions().into_iter().filter(|(_, function)| function.length > LONGEST_FUNCTION);
    let finding = |(at, function): (String, Extent)| format!("{at}: {} has {} lines", function.name, function.length);
    check(&format!("divide it: a function has at most {LONGEST_FUNCTION} lines"), long.map(finding));
}

#[test]
fn the_program_stays_small() {
    let lines: usize = house().sources.iter().map(Source::product_lines).sum();
    assert!(
        lines <= MOST_PRODUCT_LINES,
        "src/ has {lines} lines of product code, {} more than {MOST_PRODUCT_LINES}: remove some, or \
         raise the number in tests/house.rs and write in the commit what they are worth",
        lines - MOST_PRODUCT_LINES
    );
}

#[test]
fn long_unit_tests_are_in_a_file_of_their_own() {
    let mut findings = Vec::new();
    for source in &house().sources {
        let long = test_modules(&source.code).into_iter().filter(|module| module.length > LONGEST_TEST_MODULE);
        findings.extend(
            long.map(|module| format!("{}: mod {} has {} lines", source.at(module.line), module.name, module.length)),
        );
    }
    check(&format!("move tests of more than {LONGEST_TEST_MODULE} lines to tests.rs beside the file"), findings);
}

/// Prints the table of `make house`.
#[test]
fn the_rooms_and_their_sizes() {
    let house = house();
    let mut table = String::from("\nlines of product code, by room in the order of src/lib.rs\n");
    let lines_of = |room: Option<&str>| -> usize {
        house.sources.iter().filter(|source| source.room() == room).map(Source::product_lines).sum()
    };
    let rooms = house.rooms.iter().map(|room| (room.as_str(), lines_of(Some(room))));
    let mut total = 0;
    for (room, lines) in rooms.chain([("lib, main", lines_of(None))]) {
        let _ = writeln!(table, "{lines:7}  {room}");
        total += lines;
    }
    let _ = writeln!(table, "{total:7}  of {MOST_PRODUCT_LINES}\n\nthe longest functions, of {LONGEST_FUNCTION} lines");
    let mut functions = all_functions();
    functions.sort_by_key(|(_, function)| std::cmp::Reverse(function.length));
    for (at, function) in functions.iter().take(5) {
        let _ = writeln!(table, "{:7}  {} {at}", function.length, function.name);
    }
    println!("{table}");
}

fn house() -> &'static Crate {
    static HOUSE: OnceLock<Crate> = OnceLock::new();
    HOUSE.get_or_init(|| Crate::new(sources()))
}

/// Every function of `src/`, including those of tests, each with its file and line.
fn all_functions() -> Vec<(String, Extent)> {
    let mut all = Vec::new();
    for source in &house().sources {
        all.extend(functions(&source.code).into_iter().map(|function| (source.at(function.line), function)));
    }
    all
}

/// Fails if there are findings, with what to do about them.
fn check(what_to_do: &str, findings: impl IntoIterator<Item = String>) {
    let findings: Vec<String> = findings.into_iter().collect();
    assert!(findings.is_empty(), "{what_to_do} ({}):\n{}", findings.len(), findings.join("\n"));
}

/// The lines of product code and tests in which these tokens follow each other.
fn words_in_all_code(wanted: &[&str], what_to_do: &str) -> Vec<String> {
    let mut findings = Vec::new();
    for source in &house().sources {
        let tokens = tokens(&source.code);
        let found = tokens
            .windows(wanted.len())
            .filter(|found| found.iter().map(|token| token.text).eq(wanted.iter().copied()));
        let lines = found.map(|found| found[0].line);
        findings.extend(lines.map(|line| format!("{}: {}: {what_to_do}", source.at(line), wanted.concat())));
    }
    findings
}

/// The dependencies that pure code must not use, by their names in code.
fn impure_crates() -> Vec<String> {
    let manifest = std::fs::read_to_string(root().join("Cargo.toml")).expect("Cargo.toml");
    let (mut impure, mut is_dependency) = (Vec::new(), false);
    for line in manifest.lines() {
        if line.starts_with('[') {
            is_dependency = line.ends_with("dependencies]") && !line.contains("dev-");
        } else if let Some((name, _)) = line.split_once('=').filter(|_| is_dependency)
            && !COMPUTING_CRATES.contains(&name.trim())
        {
            impure.push(name.trim().replace('-', "_"));
        }
    }
    impure
}

/// Whether a path outside the crate is a plain value or a computation.
fn is_pure(path: &Path, impure_crates: &[String]) -> bool {
    match path.segment(0) {
        "std" | "core" | "alloc" => {
            let everything = ["", "*"].contains(&path.segment(1));
            let random = path.segments.iter().any(|segment| segment == "RandomState");
            let module = IMPURE.iter().find(|(module, _)| *module == path.segment(1));
            !everything && !random && module.is_none_or(|(_, values)| values.contains(&path.segment(2)))
        }
        library => !impure_crates.iter().any(|impure| impure == library),
    }
}

/// Whether pure code may use this path of the crate: it is below one of `allowed`, and does not read the clock.
fn is_allowed(path: &Path, allowed: &[&str]) -> bool {
    // `Clock` reads the clock. After an import of the module, or of all names in it, `Clock` could be used too.
    let reads_clock = path.is_below("crate::clock") && ["", "*", "Clock"].contains(&path.segment(2));
    !reads_clock && allowed.iter().any(|module| path.is_below(&format!("crate::{module}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> Path {
        Path { segments: text.split("::").map(str::to_owned).collect(), line: 1, place: paths::Place::Use }
    }

    #[test]
    fn values_are_pure_and_system_calls_are_not() {
        let impure_crates = ["log".to_owned(), "signal_hook".to_owned()];
        for (name, expected) in [
            ("std::net::IpAddr", true),
            ("core::net::Ipv6Addr", true),
            ("std::net::TcpStream", false),
            ("std::net", false),
            ("std::time::Duration::from_secs", true),
            ("std::time::Instant::now", false),
            ("std::io", false),
            ("std::collections::HashMap", true),
            ("std::collections::hash_map::RandomState", false),
            ("std", false),
            ("std::*", false),
            ("log::info", false),
            ("signal_hook::x", false),
            ("subtle::Choice", true),
            ("Self::new", true),
        ] {
            assert_eq!(is_pure(&path(name), &impure_crates), expected, "{name}");
        }
    }

    #[test]
    fn pure_code_may_use_timestamps_but_not_read_the_clock() {
        for (name, allowed, expected) in [
            ("crate::clock::Timestamp", "clock::Timestamp", true),
            ("crate::clock::Timestamp::from_seconds", "clock::Timestamp", true),
            ("crate::clock::Day", "clock::Timestamp", false),
            ("crate::clock::Day", "clock", true),
            ("crate::clock::Clock", "clock", false),
            ("crate::clock", "clock", false),
            ("crate::clock::*", "clock", false),
            ("crate::ids::Ids", "clock", false),
        ] {
            assert_eq!(is_allowed(&path(name), &[allowed]), expected, "{name}");
        }
    }
}
