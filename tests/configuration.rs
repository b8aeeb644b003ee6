//! `doc/configuration.md` against the program: every key, default, bound, example, and what a reload does.
//!
//! Nothing is copied here from the code. The error about an unknown key lists the keys of a table, `check --print` has the
//! defaults, and bounds are tried by files with values just inside and just outside.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use odmr::config::{Config, effective};
use rustix::process::Signal;

use crate::project::{code_spans, read};
use crate::running::Running;

const PROVIDER: &str = "provider.toml";
const ACCOUNT: &str = "customers.d/NAME.toml";
const CUSTOMER: &str = "customer.toml";

/// The first key is that of no table.
const PROBE: &str = "odmr-probe";

/// A table, a key, and a value in TOML.
type Setting<'a> = (&'a str, &'a str, &'a str);

/// The settings of a file that can be read; each optional table with required keys is there.
fn least(file: &str) -> Vec<Setting<'static>> {
    let secret = "\"another random word\"";
    match file {
        PROVIDER => vec![
            ("", "hostname", "\"localhost\""),
            ("", "spool", "\"spool\""),
            ("", "customers", "\"customers.d\""),
            ("tls", "certificate", "\"a.pem\""),
            ("tls", "key", "\"a.key\""),
        ],
        ACCOUNT => vec![("", "domains", "[\"example.org\", \"example.com\"]"), ("", "secret", secret)],
        _ => vec![
            ("", "hostname", "\"localhost\""),
            ("provider", "address", "\"127.0.0.1:1\""),
            ("provider", "name", "\"login\""),
            ("provider", "secret", secret),
            ("mailboxes", "root", "\"mail\""),
            ("mailboxes", "accept", "[\"alice@example.org\", \"@example.com\"]"),
            ("outgoing", "queue", "\"out\""),
        ],
    }
}

/// The least file in which a key has an effect.
fn around(file: &str, table: &str, key: &str) -> Vec<Setting<'static>> {
    let mut settings = least(file);
    let without = |settings: &mut Vec<Setting<'_>>, key: &str| settings.retain(|setting| setting.1 != key);
    let more: &[Setting<'static>] = match (table, key) {
        ("", "group") => &[("", "user", "\"vmail\"")],
        ("schedule", "zone") => &[("schedule", "at", "[\"* 08:00\"]")],
        ("relay", "smarthost-tls" | "ca" | "pin") => &[("relay", "smarthost", "\"a.example\"")],
        ("relay", "certificate") => &[("relay", "smarthost", "\"a.example\""), ("relay", "key", "\"a.key\"")],
        ("relay", "key") => &[("relay", "smarthost", "\"a.example\""), ("relay", "certificate", "\"a.pem\"")],
        ("relay", "name") => &[("relay", "smarthost", "\"a.example\""), ("relay", "secret", "\"x\"")],
        ("relay", "secret" | "secret-file") => {
            &[("relay", "smarthost", "\"a.example\""), ("relay", "name", "\"login\"")]
        }
        ("relay", "mechanisms") => {
            &[("relay", "smarthost", "\"a.example\""), ("relay", "name", "\"a\""), ("relay", "secret", "\"x\"")]
        }
        ("outgoing", "submission-tls" | "ca" | "pin" | "mechanisms") => &[("outgoing", "submission", "\"a.example\"")],
        ("outgoing", "certificate") => &[("outgoing", "submission", "\"a.example\""), ("outgoing", "key", "\"a.key\"")],
        ("outgoing", "key") => &[("outgoing", "submission", "\"a.example\""), ("outgoing", "certificate", "\"a.pem\"")],
        ("outgoing", "name") => &[("outgoing", "submission", "\"a.example\""), ("outgoing", "secret", "\"x\"")],
        ("outgoing", "secret" | "secret-file") => {
            &[("outgoing", "submission", "\"a.example\""), ("outgoing", "name", "\"login\"")]
        }
        ("provider", "certificate") => &[("provider", "key", "\"a.key\"")],
        ("provider", "key") => &[("provider", "certificate", "\"a.pem\"")],
        _ => &[],
    };
    if matches!((file, key), (ACCOUNT, "secret-file" | "scram")) || (table, key) == ("provider", "secret-file") {
        without(&mut settings, "secret");
    }
    if (table, key) == ("provider", "outgoing") {
        settings.retain(|setting| setting.0 != "outgoing");
    }
    settings.extend(more);
    settings
}

fn text_of(settings: &[Setting<'_>]) -> String {
    let mut tables: Vec<&str> = settings.iter().map(|setting| setting.0).collect();
    tables.sort_unstable();
    tables.dedup();
    let mut text = String::new();
    for table in tables {
        // A table within another one is a key there.
        if !table.is_empty() {
            text += &format!("[{table}]\n");
        }
        for (_, key, value) in settings.iter().filter(|setting| setting.0 == table) {
            text += &format!("{key} = {value}\n");
        }
    }
    text
}

/// The settings with another value of a key.
fn with<'a>(settings: &[Setting<'a>], table: &'a str, key: &'a str, value: &'a str) -> Vec<Setting<'a>> {
    let mut changed: Vec<_> =
        settings.iter().filter(|setting| (setting.0, setting.1) != (table, key)).copied().collect();
    changed.push((table, key, value));
    changed
}

/// A directory with the files that the examples name.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Files {
        let files = Files(tempfile::tempdir().unwrap());
        fs::create_dir(files.path("customers.d")).unwrap();
        for name in ["relay.secret", "submission.secret", "customer.secret", "customers.d/acme.secret"] {
            files.write(name, "a long random word\n");
        }
        files.write("aliases", "root: alice\n");
        files.write("customers.d/acme.recipients", "alice@example.org\n");
        let (certificate, key) = odmr::net::tls::self_signed(&["localhost"]).unwrap();
        let certificates = ["a", "relay", "me", "provider-ca", "smarthost-ca", "submission-ca"];
        certificates.iter().for_each(|name| files.write(&format!("{name}.pem"), &certificate));
        ["a", "relay", "me"].iter().for_each(|name| files.write(&format!("{name}.key"), &key));
        files.write_least();
        files
    }

    fn write_least(&self) {
        [PROVIDER, ACCOUNT, CUSTOMER].iter().for_each(|file| self.write(Files::name(file), &text_of(&least(file))));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o640)).unwrap();
    }

    fn name(file: &str) -> &str {
        if file == ACCOUNT { "customers.d/acme.toml" } else { file }
    }

    /// The path that `-c` names for this file.
    fn config(&self, file: &str) -> PathBuf {
        self.path(if file == CUSTOMER { CUSTOMER } else { PROVIDER })
    }

    /// Reads this text as a file, and the least files beside it; the error has all mistakes.
    fn read(&self, file: &str, text: &str) -> Result<(), String> {
        self.write_least();
        self.write(Files::name(file), text);
        let (_, found) = Config::examine(&self.config(file));
        let errors: Vec<_> = found.errors.iter().chain(&found.skipped).map(ToString::to_string).collect();
        if errors.is_empty() { Ok(()) } else { Err(errors.join("\n")) }
    }

    fn load(&self, file: &str, settings: &[Setting<'_>]) -> Result<(), String> {
        self.read(file, &text_of(settings))
    }

    /// What `check --print` prints of this file.
    fn printed(&self, file: &str, settings: &[Setting<'_>]) -> String {
        self.load(file, settings).unwrap();
        let all = effective(&self.config(file)).unwrap();
        // A provider's file, and that of its customer.
        let (first, second) = all.split_once("\n# ").unwrap_or((&all, ""));
        if file == ACCOUNT { second.to_owned() } else { first.to_owned() }
    }

    /// The keys of a table, as the error about an unknown key lists them; `None`: it is not a table with keys of its own.
    fn keys(&self, file: &str, table: &str) -> Option<Vec<String>> {
        let error = self.load(file, &with(&least(file), table, PROBE, "0")).expect_err(table);
        let (_, listed) = error.split_once(&format!("unknown key `{PROBE}`, expected "))?;
        let listed = listed.split(['\n', ';']).next()?;
        Some(code_spans(listed).map(str::to_owned).collect())
    }
}

/// A row of a table of the document.
#[derive(Debug)]
struct Row {
    file: &'static str,
    table: String,
    key: String,
    example: String,
    value: String,
    default: String,
    reload: String,
}

impl Row {
    /// The literals of TOML in a cell.
    fn literals(cell: &str) -> Vec<&str> {
        code_spans(cell)
            .filter(|text| text.starts_with(|first: char| "\"[".contains(first) || first.is_ascii_digit()))
            .collect()
    }

    fn default_value(&self) -> Option<&str> {
        self.default.strip_prefix('`')?.split('`').next()
    }

    /// The key that this one is compared with, and whether it may be equal.
    fn bounded_by(&self) -> Option<(&str, bool)> {
        [("shorter than `", false), ("at most `", true)]
            .into_iter()
            .find_map(|(words, equal)| Some((self.value.split_once(words)?.1.split('`').next()?, equal)))
    }

    fn place(&self) -> String {
        format!("{}: [{}] {}", self.file, self.table, self.key)
    }
}

fn document() -> String {
    read("doc/configuration.md")
}

/// The parts of the document, each with the files and the table of its headings.
fn parts(document: &str) -> Vec<(Vec<&'static str>, String, &str)> {
    let mut parts = Vec::new();
    for chapter in document.split("\n## ").skip(1) {
        let heading = chapter.lines().next().unwrap();
        let files = [PROVIDER, ACCOUNT, CUSTOMER].into_iter().filter(|file| heading.contains(&format!("`{file}`")));
        let files: Vec<_> = files.collect();
        for section in chapter.split("\n### ") {
            let table = section.strip_prefix("`[").and_then(|rest| rest.split(']').next()).unwrap_or_default();
            parts.push((files.clone(), table.to_owned(), section));
        }
    }
    parts
}

fn rows() -> Vec<Row> {
    let text = document();
    let mut rows = Vec::new();
    for (files, table, section) in parts(&text) {
        let mut lines = section.lines().skip_while(|line| !line.starts_with("| key and example | value | default |"));
        for line in lines.by_ref().skip(2).take_while(|line| line.starts_with('|')) {
            let cells: Vec<_> = line.trim_matches('|').split(" | ").map(str::trim).collect();
            let [example, value, default, reload, meaning] = cells[..] else { panic!("five cells: {line}") };
            assert!(!meaning.is_empty() && ["yes", "restart"].contains(&reload), "{line}");
            let (key, example) = example.trim_matches('`').split_once(" = ").expect(line);
            rows.extend(files.iter().map(|file| Row {
                file,
                table: table.clone(),
                key: key.to_owned(),
                example: example.to_owned(),
                value: value.to_owned(),
                default: default.to_owned(),
                reload: reload.to_owned(),
            }));
        }
    }
    rows
}

#[test]
fn the_document_has_each_key_in_its_table_and_no_other() {
    let (files, rows) = (Files::new(), rows());
    let documented: BTreeSet<_> = rows.iter().map(|row| (row.file, row.table.clone(), row.key.clone())).collect();
    assert_eq!(documented.len(), rows.len(), "a key has two rows");
    let mut accepted = BTreeSet::new();
    let mut schedules = Vec::new();
    for file in [PROVIDER, ACCOUNT, CUSTOMER] {
        for key in files.keys(file, "").unwrap() {
            let Some(keys) = files.keys(file, &key) else {
                accepted.insert((file, String::new(), key));
                continue;
            };
            schedules.extend(keys.iter().filter_map(|inner| files.keys(file, &format!("{key}.{inner}"))));
            if key == "schedule" {
                schedules.push(keys.clone());
            }
            accepted.extend(keys.into_iter().map(|inner| (file, key.clone(), inner)));
        }
    }
    let differ: Vec<_> = documented.symmetric_difference(&accepted).collect();
    assert!(
        differ.is_empty(),
        "in doc/configuration.md, but not accepted, or accepted, but without a row there (file, table, key): {differ:?}"
    );
    // The only table in another one.
    assert!(schedules.len() == 2 && schedules[0] == schedules[1], "{schedules:?}");
}

/// Whether `check --print` has a line of this key in this table.
fn is_printed(printed: &str, table: &str, key: &str) -> bool {
    let mut current = String::new();
    printed.lines().any(|line| {
        if let Some(head) = line.strip_prefix('[') {
            current = head.trim_matches(['[', ']']).replace("provider.schedule", "schedule");
        }
        current == table && line.starts_with(&format!("{key} = "))
    })
}

#[test]
fn each_default_is_that_of_the_program() {
    let files = Files::new();
    for row in rows() {
        let (file, table, key, place) = (row.file, &*row.table, &*row.key, row.place());
        let Some(default) = row.default_value() else {
            let mut without = least(file);
            without.retain(|setting| (setting.0, setting.1) != (table, key));
            if row.default.starts_with("required") {
                let mut text = text_of(&without);
                if !table.is_empty() && !text.contains(&format!("[{table}]\n")) {
                    text += &format!("[{table}]\n");
                }
                let error = files.read(file, &text).expect_err(&place);
                assert!(error.contains(&format!("`{key}`")), "{place}: {error}");
                continue;
            }
            let printed = files.printed(file, &without);
            assert!(row.default == "–" || row.default.starts_with("that of "), "{place}: {}", row.default);
            let is_derived = row.default.starts_with("that of the first");
            assert_eq!(is_printed(&printed, table, key), is_derived, "{place} is in\n{printed}");
            continue;
        };
        let without = around(file, table, key);
        let printed = files.printed(file, &without);
        assert!(is_printed(&printed, table, key), "{place} is not in\n{printed}");
        assert_eq!(files.printed(file, &with(&without, table, key, default)), printed, "{place}");
    }
}

/// Whether the program accepts values of one key.
struct Trial<'a> {
    files: &'a Files,
    row: &'a Row,
    around: Vec<Setting<'a>>,
}

impl Trial<'_> {
    fn accepts(&self, value: &str) {
        let Row { file, table, key, .. } = self.row;
        if let Err(error) = self.files.load(file, &with(&self.around, table, key, value)) {
            panic!("{}: {value} is not accepted: {error}", self.row.place());
        }
    }

    fn rejects(&self, value: &str) {
        let Row { file, table, key, .. } = self.row;
        let result = self.files.load(file, &with(&self.around, table, key, value));
        assert!(result.is_err(), "{}: {value} is accepted", self.row.place());
    }

    /// A number with a word of its unit: just inside and just outside.
    fn bounds(&self, least: i128, most: Option<i128>, largest: i128, unit: &str) {
        let shown = |number: i128| if unit.is_empty() { number.to_string() } else { format!("\"{number}{unit}\"") };
        self.accepts(&shown(least));
        self.rejects(&shown(least - 1));
        self.accepts(&shown(most.unwrap_or(largest)));
        most.iter().for_each(|most| self.rejects(&shown(most + 1)));
    }
}

fn milliseconds(literal: &str) -> i128 {
    let duration = odmr::config::duration(literal.trim_matches('"'));
    duration.map_or(0, |duration| i128::try_from(duration.as_millis()).unwrap())
}

#[test]
fn each_bound_is_that_of_the_program() {
    let files = Files::new();
    let year = 365 * 24 * 60 * 60 * 1000;
    for row in rows() {
        let mut trial = Trial { files: &files, row: &row, around: around(row.file, &row.table, &row.key) };
        trial.accepts(&row.example);
        let literals = Row::literals(&row.value);
        let range = row.value.split_once("` to `").map(|_| (literals[0], literals[1]));
        let from = row.value.contains("` or more").then(|| literals[0].parse().expect("a number"));
        if let (Some((other, equal)), true) = (row.bounded_by(), row.value.starts_with("time")) {
            trial.around = with(&trial.around, &row.table, other, "\"2h\"");
            trial.accepts("\"119m\"");
            trial.rejects("\"121m\"");
            if equal {
                trial.accepts("\"120m\"")
            } else {
                trial.rejects("\"120m\"")
            }
            trial.around = around(row.file, &row.table, &row.key);
            if range.is_some() {
                trial.around = with(&trial.around, &row.table, other, "\"365d\"");
            }
        }
        literals.iter().for_each(|literal| trial.accepts(literal));
        trial.rejects(if row.value.starts_with("flag") { "7" } else { "true" });
        match row.value.split([' ', ',']).next().unwrap() {
            "flag" => ["true", "false"].iter().for_each(|flag| trial.accepts(flag)),
            "one" => trial.rejects(&format!("\"{PROBE}\"")),
            "number" => {
                let range = range.map(|(least, most)| (least.parse().unwrap(), most.parse().ok()));
                let (least, most) = range.or(from.map(|from| (from, None))).expect("bounds");
                trial.bounds(least, most, i64::MAX.into(), "");
            }
            "size" => {
                trial.bounds(from.unwrap_or(0), None, i64::MAX.into(), "");
                trial.rejects(&format!("\"{}\"", 1_i128 << 63));
            }
            "time" if row.value.contains("`\"0s\"`") => trial.accepts("\"1ms\""),
            "time" => {
                let (least, most) = range.map_or((1, year), |(least, most)| (milliseconds(least), milliseconds(most)));
                match row.bounded_by().is_some() && range.is_none() {
                    true => trial.rejects("\"0ms\""),
                    false => trial.bounds(least, Some(most), year, "ms"),
                }
            }
            "octal" => ["\"001\"", "\"100\""].iter().for_each(|mask| trial.rejects(mask)),
            "pin" => {
                let pins = |count: u32| {
                    let pins: Vec<_> = (0..count).map(|number| format!("\"sha256:{number:064x}\"")).collect();
                    format!("[{}]", pins.join(", "))
                };
                [1, 8].iter().for_each(|count| trial.accepts(&pins(*count)));
                [0, 9].iter().for_each(|count| trial.rejects(&pins(*count)));
            }
            "list" if !row.value.contains("not empty") => trial.accepts("[]"),
            _ => {}
        }
        if row.value.contains("not empty") {
            trial.rejects("[]");
        }
    }
}

/// Whole files begin with their path; fragments are read within the least file.
#[test]
fn each_example_is_read() {
    let (files, text) = (Files::new(), document());
    let mut tried = 0;
    for (of_chapter, _, section) in parts(&text) {
        for block in section.split("```toml\n").skip(1) {
            let block = block.split("```").next().unwrap().replace("\"/var/", "\"var/");
            let (file, whole) = match block.strip_prefix("# /etc/odmr/") {
                Some(name) if name.starts_with("customers.d/") => (ACCOUNT, true),
                Some(name) if name.starts_with(CUSTOMER) => (CUSTOMER, true),
                Some(_) => (PROVIDER, true),
                None => (of_chapter.first().copied().unwrap_or(CUSTOMER), false),
            };
            let has = |table: &str| block.contains(&format!("[{table}]"));
            let rest: Vec<_> = least(file).into_iter().filter(|setting| !whole && !has(setting.0)).collect();
            let (top, tables): (Vec<_>, Vec<_>) = rest.into_iter().partition(|setting| setting.0.is_empty());
            let result = files.read(file, &format!("{}{}{block}", text_of(&top), text_of(&tables)));
            assert!(result.is_ok(), "{file}: {result:?}\n{block}");
            tried += 1;
        }
    }
    assert!(tried >= 8, "{tried} examples");
}

/// `tests/distributed.rs` tries each line of these files.
#[test]
fn the_commented_examples_have_each_key_in_its_table() {
    for row in rows() {
        let text = read(Path::new("dist/examples").join(Files::name(row.file)));
        let head = format!("{}]", row.table);
        let section = text.split("\n[").find(|part| row.table.is_empty() || part.starts_with(&head));
        let section = section.unwrap_or_else(|| panic!("{}", row.place()));
        // A customer's file refers to the provider's for these.
        if section.contains("# as in provider.toml") {
            continue;
        }
        let words = section.split(|character: char| !character.is_ascii_alphanumeric() && character != '-');
        assert!(words.into_iter().any(|word| word == row.key), "dist/examples does not have {}", row.place());
    }
}

/// Each rule has one name and one number, in the program and in the document.
#[test]
fn the_rules_of_mailboxes_are_numbered_as_in_the_program() {
    let (program, document) = (read("src/recipients/mod.rs"), document());
    let in_program = program.lines().filter_map(|line| line.strip_prefix("//! ")?.split_once(". *"));
    let in_program: Vec<_> = in_program.map(|(number, rest)| (number, rest.split('*').next().unwrap())).collect();
    let (_, section) = document.split_once("\n## Rules of mailboxes\n").unwrap();
    let rows = section.lines().skip_while(|line| !line.starts_with("|---")).skip(1);
    let rows = rows.map_while(|line| line.strip_prefix("| ")?.split_once(" | "));
    let in_document: Vec<_> = rows.map(|(number, rest)| (number, rest.split(" | ").next().unwrap())).collect();
    assert_eq!(in_document, in_program, "doc/configuration.md (left) and the head of src/recipients/mod.rs (right)");
}

#[test]
fn the_rules_of_mailboxes_send_mail_where_the_document_says() {
    let (files, text) = (Files::new(), document());
    let chapter = text.split("\n## Rules of mailboxes\n").nth(1).unwrap();
    let block = chapter.split("```toml\n").nth(1).unwrap().split("```").next().unwrap();
    let rest: Vec<_> = least(CUSTOMER).into_iter().filter(|setting| setting.0 != "mailboxes").collect();
    files.write(CUSTOMER, &format!("{}{block}", text_of(&rest)));
    let expected: Vec<_> = chapter.lines().filter_map(|line| line.strip_prefix("    ")).take(5).collect();
    let mut check = Command::new(env!("CARGO_BIN_EXE_odmr"));
    check.arg("check").arg("-c").arg(files.path(CUSTOMER));
    for line in &expected {
        check.args(["--address", line.split(':').next().unwrap()]);
    }
    let printed = String::from_utf8(check.output().unwrap().stdout).unwrap();
    assert_eq!(printed.lines().collect::<Vec<_>>(), expected);
}

/// The file with the examples of all keys that go together, and the keys that it changes.
fn all_changed<'a>(files: &Files, rows: &'a [Row], file: &str, start: &[Setting<'a>]) -> (String, Vec<&'a Row>) {
    let (mut settings, mut changed) = (start.to_vec(), Vec::new());
    // A process may write only where it could at its start.
    let rows = rows.iter().filter(|row| row.file == file && !["queue", "deliver"].contains(&&*row.key));
    for row in rows {
        let more = with(&settings, &row.table, &row.key, &row.example);
        if files.load(file, &more).is_ok() {
            settings = more;
            changed.push(row);
        }
    }
    (text_of(&settings), changed)
}

/// A daemon is reloaded with all keys changed; its log names those that need a restart.
#[test]
fn a_reload_changes_each_key_that_needs_no_restart() {
    let (files, rows) = (Files::new(), rows());
    for (file, command, listener) in [(PROVIDER, "serve", "odmr"), (CUSTOMER, "pull", "local")] {
        let mut start = least(file);
        match file {
            PROVIDER => {
                start.extend([("inbound", "listen", "[\"127.0.0.1:0\"]"), ("odmr", "listen", "[\"127.0.0.1:0\"]")])
            }
            _ => start.push(("outgoing", "listen", "[\"127.0.0.1:0\"]")),
        }
        let (all, changed) = all_changed(&files, &rows, file, &start);
        files.write(file, &text_of(&start));
        let mut daemon = Command::new(env!("CARGO_BIN_EXE_odmr"));
        daemon.args([command, "-c"]).arg(files.path(file)).args((command == "pull").then_some("--daemon"));
        let mut daemon = Running::start(&mut daemon);
        daemon.listening(listener);
        files.write(file, &all);
        daemon.signal(Signal::HUP);
        let line = loop {
            let line = daemon.wait_for("event=re");
            assert!(!line.contains("event=reload-failed"), "{line}\n{all}");
            if line.contains("event=restart-needed") {
                break line;
            }
        };
        let named = line.split_once("reason=\"").unwrap().1.split(" changed, which").next().unwrap();
        // A customer's daemon names the key alone.
        let name = |row: &&Row| match row.file == PROVIDER && !row.table.is_empty() {
            true => format!("[{}] `{}`", row.table, row.key),
            false => format!("`{}`", row.key),
        };
        let restart: BTreeSet<_> = changed.iter().filter(|row| row.reload == "restart").map(name).collect();
        assert_eq!(named.split(", ").map(str::to_owned).collect::<BTreeSet<_>>(), restart);
        let all_rows = rows.iter().filter(|row| row.file == file && row.reload == "restart");
        assert_eq!(restart.len(), all_rows.count(), "a key was not changed");
    }
}
