//! Compares the log with `doc/log.md`: its tables have each event and key that `src/` logs, and no others.

use std::collections::{BTreeMap, BTreeSet};

use crate::house::source::{Source, closing, line_of, root, sources};

/// Log lines without an event: those that other programs read, and an error before the log is set up.
const WITHOUT_EVENT: [&str; 2] = ["listening {", "{text}"];

type Keys = BTreeSet<String>;

/// A log line of the program.
struct Logged {
    at: String,
    event: String,
    keys: Keys,
}

/// An event in the table of events.
struct Documented {
    keys: Keys,
    /// The same for events that share a row and its keys: each key must be logged with one of them.
    row: usize,
}

#[test]
fn each_log_line_is_an_event_with_keys() {
    let mut findings = Vec::new();
    for source in &sources() {
        for (at, text) in log_texts(source) {
            if !WITHOUT_EVENT.iter().any(|allowed| text.starts_with(allowed)) && fields(&text).is_none() {
                findings.push(format!("{at}: {text:?}: write event=NAME key=value …"));
            }
        }
    }
    assert!(findings.is_empty(), "\n{}", findings.join("\n"));
}

#[test]
fn each_logged_event_and_key_is_documented() {
    let documented = events();
    let mut findings = Vec::new();
    for logged in logged() {
        let Some(event) = documented.get(&logged.event) else {
            findings.push(format!("{}: event={} is not in doc/log.md", logged.at, logged.event));
            continue;
        };
        let missing = logged.keys.difference(&event.keys);
        findings.extend(missing.map(|key| format!("{}: doc/log.md has no {key} for {}", logged.at, logged.event)));
    }
    assert!(findings.is_empty(), "\n{}", findings.join("\n"));
}

#[test]
fn each_documented_event_and_key_is_logged() {
    let (documented, logged) = (events(), logged());
    let mut findings = Vec::new();
    for (name, event) in &documented {
        if !logged.iter().any(|logged| logged.event == *name) {
            findings.push(format!("no line has event={name}"));
        }
        let of_the_row =
            logged.iter().filter(|logged| documented.get(&logged.event).is_some_and(|d| d.row == event.row));
        let keys: Keys = of_the_row.flat_map(|logged| logged.keys.iter().cloned()).collect();
        findings.extend(event.keys.difference(&keys).map(|key| format!("event={name} is never logged with {key}")));
    }
    assert!(findings.is_empty(), "doc/log.md has what src/ does not log:\n{}", findings.join("\n"));
}

#[test]
fn each_key_is_explained() {
    let explained: Keys = table("Keys").iter().flat_map(|row| code_spans(&row[0])).collect();
    let used: Keys = events().into_values().flat_map(|event| event.keys).collect();
    let findings: Vec<_> = used.difference(&explained).map(|key| format!("add a row for {key}")).collect();
    let unused = explained.difference(&used).map(|key| format!("no event has {key}: remove its row"));
    let findings: Vec<_> = findings.into_iter().chain(unused).collect();
    assert!(findings.is_empty(), "the table of section Keys in doc/log.md:\n{}", findings.join("\n"));
}

/// Every log line with an event. Its keys include those that the same file adds by a text such as `" provider-id={}"`.
fn logged() -> Vec<Logged> {
    let mut all = Vec::new();
    for source in &sources() {
        let added: Vec<Vec<String>> = literals(source, 0..source.code.len())
            .iter()
            .filter_map(|text| text.strip_prefix(' ').and_then(fields))
            .collect();
        for (at, text) in log_texts(source) {
            let Some(mut keys) = text.strip_prefix("event=").and_then(|_| fields(&text)) else { continue };
            let event = text["event=".len()..].split(' ').next().unwrap_or_default().to_owned();
            keys.retain(|key| key != "event");
            if text.ends_with("}{}") {
                keys.extend(added.iter().flatten().cloned());
            }
            all.push(Logged { at, event, keys: keys.into_iter().collect() });
        }
    }
    all
}

/// The format strings of the log macros of product code, each with its file and line; not those of dialogues.
fn log_texts(source: &Source) -> Vec<(String, String)> {
    let mut texts = Vec::new();
    for level in ["error", "warn", "info"] {
        for (begin, call) in source.product.match_indices(&format!("log::{level}!(")) {
            let open = begin + call.len() - 1;
            let close = closing(&source.product, open).expect("a closed bracket");
            let text = literals(source, open..close).into_iter().next().unwrap_or_default();
            texts.push((source.at(line_of(&source.code, begin)), text));
        }
    }
    texts
}

/// The string literals of product code within these offsets, with the escapes of quotation marks and line ends decoded.
fn literals(source: &Source, range: std::ops::Range<usize>) -> Vec<String> {
    let octets = source.product.as_bytes();
    let (mut found, mut at) = (Vec::new(), range.start);
    while at < range.end {
        if octets[at] != b'~' {
            at += 1;
            continue;
        }
        let end = (at..range.end).find(|at| !matches!(octets[*at], b'~' | b'\n')).unwrap_or(range.end);
        let literal = source.text[at..end].trim_end();
        let literal = literal.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(literal);
        let lines: Vec<&str> = literal.split("\\\n").collect();
        let joined =
            std::iter::once(lines[0]).chain(lines[1..].iter().map(|line| line.trim_start())).collect::<String>();
        found.push(joined.replace("\\\"", "\""));
        at = end;
    }
    found
}

/// The keys of `key=value key="v a l u e"`, in order; `None`: the text does not have this form.
fn fields(text: &str) -> Option<Vec<String>> {
    let (mut keys, mut rest) = (Vec::new(), text);
    while !rest.is_empty() {
        let (key, value) = rest.split_once('=')?;
        let is_key = !key.is_empty() && key.bytes().all(|octet| octet.is_ascii_lowercase() || octet == b'-');
        if !is_key {
            return None;
        }
        keys.push(key.to_owned());
        let length = match value.strip_prefix('"') {
            Some(quoted) => quoted.find('"')? + 2,
            None => value.find(' ').unwrap_or(value.len()),
        };
        rest = value[length..].trim_start_matches(' ');
    }
    (!keys.is_empty()).then_some(keys)
}

/// The events of `doc/log.md`. If a row has as many groups of keys as events, each event has one group; otherwise the events
/// share all keys.
fn events() -> BTreeMap<String, Documented> {
    let mut events = BTreeMap::new();
    for (row, columns) in table("Events").iter().enumerate() {
        let names = code_spans(&columns[0]);
        let groups: Vec<Keys> =
            code_spans(&columns[2]).iter().map(|group| group.split(' ').map(str::to_owned).collect()).collect();
        for (number, name) in names.iter().enumerate() {
            let of_its_own = names.len() > 1 && groups.len() == names.len();
            let keys = if of_its_own { groups[number].clone() } else { groups.iter().flatten().cloned().collect() };
            let row = if of_its_own { row * 100 + number } else { row * 100 };
            assert!(events.insert(name.clone(), Documented { keys, row }).is_none(), "{name} is in two rows");
        }
    }
    events
}

/// The rows of the table under a heading of `doc/log.md`.
fn table(heading: &str) -> Vec<Vec<String>> {
    let text = std::fs::read_to_string(root().join("doc/log.md")).expect("doc/log.md");
    let (_, section) = text.split_once(&format!("\n## {heading}\n")).expect("the heading");
    let section = section.split("\n## ").next().unwrap_or_default();
    let rows = section.lines().filter(|line| line.starts_with("| `"));
    rows.map(|row| row.trim_matches('|').split(" | ").map(|cell| cell.trim().to_owned()).collect()).collect()
}

fn code_spans(cell: &str) -> Vec<String> {
    crate::project::code_spans(cell).map(str::to_owned).collect()
}

#[test]
fn fields_are_read_as_they_are_written() {
    assert_eq!(
        fields("event=a b-c={x} d=\"e f\" g={}{}"),
        Some(["event", "b-c", "d", "g"].map(str::to_owned).to_vec())
    );
    for wrong in ["", "event", "event=a b", "event=a B=c", "event=a \"b=c", "event=a b=\"c"] {
        assert_eq!(fields(wrong), None, "{wrong}");
    }
}
