//! Checks that each rule of `testdata/conformance.md` has a test that cites it.
//!
//! A test cites a rule, and counts for a side, like this:
//!
//! - a transcript by the id in the comment at its head: for the customer if it is in `customer/`, else for the
//!   provider;
//! - a Rust test by a line `/// Rules: ODMR-22, ODMR-26.` directly above it: for the customer if its file is below a
//!   directory `customer/` or is `tests/send.rs`, for the provider if it is below `provider/`, else for both, because
//!   both use the shared modules. Cite a rule above a shared test only if the test proves it for both sides.
//!
//! A test must contain the evidence of each rule that it cites: a transcript in order, after the comment at its head; a
//! Rust test in its function, or in the constants of its file, because tables refer to them. A rule for both sides needs
//! a test for each side. Rules without a test are in `testdata/conformance-untested.txt`, with a reason. That list must
//! not grow.
//!
//! `make rules` prints a line for each rule and side.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::project::{files, has_extension, read, root};
use crate::transcripts::format::expand::expand;

/// Entries of `testdata/conformance-untested.txt`. Lower it when a rule gets its test; never raise it.
const UNTESTED_AT_MOST: usize = 15;

#[test]
fn every_rule_has_a_test() {
    let rules = rules();
    let tests = tests();
    let untested = untested();
    let mut wrong = Vec::new();
    for test in &tests {
        for id in &test.cites {
            match rules.iter().find(|rule| rule.id == *id) {
                None => wrong.push(format!("{} cites {id}, which is not in conformance.md", test.name)),
                Some(rule) if rule.sides.is_empty() => {
                    wrong.push(format!("{} cites {id}, which conformance.md marks n/a", test.name));
                }
                Some(rule) if !test.has(&rule.evidence) => {
                    wrong.push(format!("{} cites {id}, but does not contain {}", test.name, rule.evidence));
                }
                Some(_) => {}
            }
        }
    }
    for (id, side) in rules.iter().flat_map(|rule| rule.sides.iter().map(|side| (&rule.id, *side))) {
        let tested = tests.iter().any(|test| test.proves(id, side));
        match (tested, untested.contains_key(&(id.clone(), side))) {
            (false, false) => wrong.push(format!("{id} {side} has no test")),
            (true, true) => wrong.push(format!("{id} {side} has a test: remove it from conformance-untested.txt")),
            _ => {}
        }
    }
    for (id, side) in untested.keys() {
        if !rules.iter().any(|rule| rule.id == *id && rule.sides.contains(side)) {
            wrong.push(format!("conformance-untested.txt names {id} {side}, which is not in conformance.md"));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    let count = untested.len();
    assert!(count <= UNTESTED_AT_MOST, "{count} rules without a test, more than {UNTESTED_AT_MOST}");
    assert!(count >= UNTESTED_AT_MOST, "{count} rules without a test: lower UNTESTED_AT_MOST");
}

#[test]
fn each_rule_has_one_id() {
    let mut seen = BTreeSet::new();
    for rule in rules() {
        assert!(seen.insert(rule.id.clone()), "{} is in conformance.md twice", rule.id);
    }
}

/// `make rules`: prints for each rule and side the tests that prove it.
#[test]
#[ignore = "prints the table of `make rules`"]
fn print_the_rules() {
    let tests = tests();
    let untested = untested();
    for rule in rules() {
        if rule.sides.is_empty() {
            println!("{:<8}  -  does not apply: {}", rule.id, rule.reason);
        }
        for side in &rule.sides {
            let names: Vec<&str> =
                tests.iter().filter(|test| test.proves(&rule.id, *side)).map(|test| test.name.as_str()).collect();
            let reason = || untested.get(&(rule.id.clone(), *side)).map_or("", String::as_str);
            let text = if names.is_empty() { format!("no test yet: {}", reason()) } else { names.join(", ") };
            println!("{:<8}  {side}  {text}", rule.id);
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Side {
    Provider,
    Customer,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Side::Provider { "P" } else { "C" })
    }
}

struct Rule {
    id: String,
    /// Empty: the rule does not apply.
    sides: Vec<Side>,
    evidence: Evidence,
    /// Why the rule does not apply.
    reason: String,
}

/// Alternatives: all words of one of them must occur.
struct Evidence {
    text: String,
    alternatives: Vec<Vec<String>>,
}

impl Evidence {
    /// Reads words in backticks, and `or` between alternatives.
    fn parse(text: &str) -> Evidence {
        let words = |alternative: &str| alternative.split('`').skip(1).step_by(2).map(str::to_lowercase).collect();
        let alternatives: Vec<Vec<String>> =
            text.split("` or `").map(|part| words(&format!("`{}`", part.trim_matches('`')))).collect();
        Evidence { text: text.to_owned(), alternatives }
    }
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The rows of the tables of `testdata/conformance.md`.
fn rules() -> Vec<Rule> {
    let text = read("testdata/conformance.md");
    let mut rules = Vec::new();
    for line in text.lines().filter(|line| line.contains(" | ") && !line.starts_with("ID | ")) {
        let [id, _, side, _, last] = line.split(" | ").collect::<Vec<_>>()[..] else {
            panic!("conformance.md: not five columns: {line}");
        };
        assert!(is_id(id), "conformance.md: not an id: {line}");
        let sides = match side.split(' ').next() {
            Some("P") => vec![Side::Provider],
            Some("C") => vec![Side::Customer],
            Some("B") => vec![Side::Provider, Side::Customer],
            Some("n/a") => vec![],
            _ => panic!("conformance.md: not a side: {line}"),
        };
        let evidence = Evidence::parse(last);
        let words =
            evidence.alternatives.iter().all(|words| !words.is_empty() && words.iter().all(|word| !word.is_empty()));
        assert!(words || sides.is_empty(), "conformance.md: no evidence in backticks: {line}");
        rules.push(Rule { id: id.to_owned(), sides, evidence, reason: last.to_owned() });
    }
    assert!(rules.len() > 300, "conformance.md has {} rules only", rules.len());
    rules
}

/// `testdata/conformance-untested.txt`: id, side, and the reason, for each rule that has no test yet.
fn untested() -> BTreeMap<(String, Side), String> {
    let mut untested = BTreeMap::new();
    for line in read("testdata/conformance-untested.txt").lines() {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (id, rest) = line.split_once(' ').unwrap_or_else(|| panic!("conformance-untested.txt: no side: {line}"));
        let (side, reason) = match rest.split_once(' ') {
            Some(("P", reason)) => (Side::Provider, reason),
            Some(("C", reason)) => (Side::Customer, reason),
            _ => panic!("conformance-untested.txt: not an id, a side and a reason: {line}"),
        };
        let twice = untested.insert((id.to_owned(), side), reason.to_owned());
        assert!(twice.is_none(), "conformance-untested.txt: {id} {side} is there twice");
    }
    untested
}

/// A transcript or a Rust test that cites rules.
struct Test {
    /// `provider/turn/bare-atrn.smtp`, `src/queue/tests.rs: no_recipient_is_lost_or_doubled`
    name: String,
    sides: Vec<Side>,
    cites: Vec<String>,
    /// In lower case.
    text: String,
    transcript: bool,
}

impl Test {
    fn proves(&self, id: &str, side: Side) -> bool {
        self.sides.contains(&side) && self.cites.iter().any(|cited| cited == id)
    }

    fn has(&self, evidence: &Evidence) -> bool {
        evidence.alternatives.iter().any(|words| self.has_in_order(words))
    }

    /// Whether the test has all words; in a transcript in this order, because a reply comes after its command.
    fn has_in_order(&self, words: &[String]) -> bool {
        if !self.transcript {
            return words.iter().all(|word| has_code_or_word(&self.text, word));
        }
        let mut lines = self.text.lines().peekable();
        words.iter().all(|word| {
            while lines.next_if(|line| !line_has(line, word)).is_some() {}
            lines.peek().is_some()
        })
    }
}

/// A word of evidence: `MAIL FROM`, `450`, `450/453`.
fn has_code_or_word(text: &str, word: &str) -> bool {
    if word.split('/').all(is_code) { word.split('/').any(|code| has(text, code)) } else { has(text, word) }
}

/// Whether a line of a transcript has a word. A code must be that of a reply: `P: 450 …`, `C: 250-…`, `P| 250 …`.
fn line_has(line: &str, word: &str) -> bool {
    if !word.split('/').all(is_code) {
        return has(line, word);
    }
    let Some((speaker, rest)) = line.split_at_checked(1) else { return false };
    let Some(reply) = rest.strip_prefix(": ").or(rest.strip_prefix("| ")) else { return false };
    let has_code = |code| reply.strip_prefix(code).is_some_and(|after: &str| !after.starts_with(char::is_alphanumeric));
    "cps".contains(speaker) && word.split('/').any(has_code)
}

/// Whether `text` has `word` as a whole word, or as the beginning of one if `word` ends in `*`.
fn has(text: &str, word: &str) -> bool {
    let (word, whole) = match word.strip_suffix('*') {
        Some(beginning) if !beginning.is_empty() => (beginning, false),
        _ => (word, true),
    };
    // A character next to an escape such as `\n` does not belong to the same word.
    let of_a_word = |c: Option<char>| c.is_some_and(char::is_alphanumeric) && !word.contains('\\');
    text.match_indices(word).any(|(at, _)| {
        let before = of_a_word(word.chars().next()) && of_a_word(text[..at].chars().next_back());
        let after = of_a_word(word.chars().next_back()) && of_a_word(text[at + word.len()..].chars().next());
        !(before || whole && after)
    })
}

fn is_code(word: &str) -> bool {
    word.len() == 3 && word.starts_with(['2', '3', '4', '5']) && word.bytes().all(|octet| octet.is_ascii_digit())
}

/// `ODMR-22`, `ODMR-D8`, `8BIT-01`; not `UTF-8`, `SHA-256` or `2026-01`.
fn is_id(word: &str) -> bool {
    let Some((kind, number)) = word.split_once('-') else { return false };
    let kind_is = kind.bytes().all(|octet| octet.is_ascii_uppercase() || octet.is_ascii_digit())
        && kind.bytes().any(|octet| octet.is_ascii_uppercase())
        && kind.len() >= 2;
    let digits = |text: &str| text.bytes().all(|octet| octet.is_ascii_digit());
    let number_is = match number.strip_prefix('D') {
        Some(number) => (1..=2).contains(&number.len()) && digits(number),
        None => number.len() == 2 && digits(number),
    };
    kind_is && number_is
}

/// The ids in a comment.
fn ids(comment: &str) -> Vec<String> {
    let words = comment.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
    words.filter(|word| is_id(word)).map(str::to_owned).collect()
}

fn tests() -> Vec<Test> {
    let mut tests = Vec::new();
    for path in files("testdata").into_iter().filter(|path| has_extension(path, "smtp")) {
        let name = path.strip_prefix(root().join("testdata")).expect("below testdata").display().to_string();
        tests.push(transcript(name, &read(&path)));
    }
    for directory in ["src", "tests"] {
        for path in files(directory).into_iter().filter(|path| has_extension(path, "rs")) {
            let name = path.strip_prefix(root()).expect("below the root").display().to_string();
            tests.extend(rust_tests(&name, &read(&path)));
        }
    }
    tests
}

fn transcript(name: String, text: &str) -> Test {
    let head: Vec<&str> = text.lines().take_while(|line| line.starts_with('#')).collect();
    let side = if name.starts_with("customer/") { Side::Customer } else { Side::Provider };
    let directory = name.split('/').next().unwrap_or_default();
    let lines = expand(directory, text).unwrap_or_else(|(line, what)| panic!("testdata/{name}:{line}: {what}"));
    let body: Vec<&str> = lines.iter().skip(head.len()).map(|(_, line)| line.as_str()).collect();
    // `{...}` matches any text, so it is not evidence.
    let text = body.join("\n").replace("{...}", "").to_lowercase();
    Test { name, sides: vec![side], cites: ids(&head.join("\n")), text, transcript: true }
}

/// The tests of a file with a line `/// Rules: …` above them.
fn rust_tests(file: &str, text: &str) -> Vec<Test> {
    let sides = if file.contains("/customer/") || file == "tests/send.rs" {
        vec![Side::Customer]
    } else if file.contains("/provider/") {
        vec![Side::Provider]
    } else {
        vec![Side::Provider, Side::Customer]
    };
    let lines: Vec<&str> = text.lines().collect();
    let constants = items(&lines, |line| line.starts_with("const ") || line.starts_with("static "));
    let mut tests = Vec::new();
    for (number, line) in lines.iter().enumerate() {
        let Some(rules) = line.trim_start().strip_prefix("/// Rules: ") else { continue };
        let head = |line: &&&str| line.trim_start().starts_with(['/', '#']);
        let above = lines[..number].iter().rev().take_while(head).count();
        let below = lines[number..].iter().take_while(head).count();
        let marked = lines[number - above..number + below].iter().any(|line| line.trim() == "#[test]");
        let begin = number + below;
        let name = lines.get(begin).and_then(|line| line.trim_start().strip_prefix("fn "));
        let (Some(name), true) = (name, marked) else {
            panic!("{file}:{}: rules are cited above a test function", number + 1);
        };
        let name = name.split('(').next().unwrap_or_default();
        let cites = ids(rules);
        let words = rules.trim_end_matches('.').split(", ").count();
        assert_eq!(cites.len(), words, "{file}:{}: write `/// Rules: ODMR-22, ODMR-26.`", number + 1);
        let body = item(&lines[begin..]);
        let text = format!("{body}\n{constants}").to_lowercase();
        tests.push(Test { name: format!("{file}: {name}"), sides: sides.clone(), cites, text, transcript: false });
    }
    tests
}

/// The items whose first line meets the condition.
fn items(lines: &[&str], begins: impl Fn(&str) -> bool) -> String {
    let found = lines.iter().enumerate().filter(|(_, line)| begins(line.trim_start()));
    found.map(|(number, _)| item(&lines[number..])).collect::<Vec<_>>().join("\n")
}

/// The first item of these lines, in the layout of rustfmt: up to the line that closes it at the same depth.
fn item(lines: &[&str]) -> String {
    let first = lines[0];
    let depth = &first[..first.len() - first.trim_start().len()];
    let ends = |line: &&str| {
        line.strip_prefix(depth).is_some_and(|rest| rest.starts_with(['}', ']', ')']) && !rest.ends_with('{'))
    };
    let length =
        if first.ends_with([';', '}']) { 0 } else { lines.iter().skip(1).position(ends).map_or(0, |at| at + 1) };
    lines[..=length].join("\n")
}

#[test]
fn evidence_is_found_in_tests() {
    let evidence = |text| Evidence::parse(text);
    let played = transcript(
        "provider/x.smtp".to_owned(),
        "# One (ODMR-22, SMTP-01).\n# RFC 2645.\nC: atrn\nP: 450-4.7.1 {...}\nC| x\\n.\\nMAIL\n",
    );
    assert_eq!(played.cites, ["ODMR-22", "SMTP-01"]);
    for found in ["`ATRN` `450`", "`551/450`", "`500` or `ATRN`", "`450-4.7.1`", "`\\n.\\n`", "`AT*`"] {
        assert!(played.has(&evidence(found)), "{found}");
    }
    for missing in ["`ATRN` `250`", "`450` `ATRN`", "`AT`", "`..`", "`RFC`", "`4.7`, `451`", "`500` `ATRN` or `530`"] {
        assert!(!played.has(&evidence(missing)), "{missing}");
    }
    let file = "const A: &str = \"550\";\n/// It is so.\n/// Rules: SMTP-01.\n#[test]\n\
                fn so() {\n    let x = 450;\n}\nfn no() { 451 }\n";
    let [test] = &rust_tests("src/customer/x.rs", file)[..] else { panic!("one test") };
    assert_eq!((test.name.as_str(), &test.cites[..]), ("src/customer/x.rs: so", &["SMTP-01".to_owned()][..]));
    assert!(test.has(&evidence("`450` `550`")) && !test.has(&evidence("`451`")));
    assert!(test.proves("SMTP-01", Side::Customer) && !test.proves("SMTP-01", Side::Provider));
    assert_eq!(
        ids("UTF-8, SHA-256, 2026-01, CVE-2011-0411, ODMR-D8, 8BIT-01…AUTH-09"),
        ["ODMR-D8", "8BIT-01", "AUTH-09"]
    );
}

/// RFC 5321 section 4.5.3.2: the shortest timeouts of each side; these are the defaults of the configuration.
///
/// Rules: SMTP-60, ODMR-D13.
#[test]
fn timeouts_reach_the_minima_of_the_rfcs() {
    let timeouts = odmr::session::Timeouts::default();
    let minutes = |count: u64| std::time::Duration::from_secs(60 * count);
    assert!(timeouts.greeting >= minutes(5) && timeouts.command >= minutes(5));
    assert!(timeouts.mail >= minutes(5) && timeouts.recipient >= minutes(5));
    assert!(timeouts.data >= minutes(2) && timeouts.block >= minutes(3) && timeouts.end >= minutes(10));
    assert!(timeouts.atrn >= minutes(10));
}
