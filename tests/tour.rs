//! `doc/tour.md`: it explains each line of `odmr demo`, and the files, functions, replies and tests that it names exist.

use std::fs;
use std::process::Command;

use crate::project::{code_spans, read, root};
use crate::transcripts::format::matches;

const OMITTED: &str = "...";

fn tour() -> String {
    read("doc/tour.md")
}

/// What `odmr demo` prints; it must leave no file.
fn demo(arguments: &[&str]) -> String {
    let temporary = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_odmr"));
    command.arg("demo").args(arguments).env_remove("RUST_LOG").env("TMPDIR", temporary.path());
    let run = command.output().unwrap();
    assert!(run.status.success() && run.stderr.is_empty(), "{}", String::from_utf8_lossy(&run.stderr));
    assert_eq!(fs::read_dir(temporary.path()).unwrap().count(), 0);
    String::from_utf8(run.stdout).unwrap()
}

/// The dialogue in a text: its lines without the `C: `, `S: ` or `P: ` before them.
fn dialogue(text: &str) -> Vec<&str> {
    let sent = |line: &str| line.starts_with("    ") && line.get(5..7) == Some(": ");
    text.lines().filter(|line| sent(line) || line.starts_with("    ==")).map(|line| &line[7..]).collect()
}

#[test]
fn the_demonstration_is_explained_line_by_line() {
    let (tour, plain, explained) = (tour(), demo(&[]), demo(&["--explain"]));
    let patterns = dialogue(&tour).into_iter().map(|pattern| pattern.replace(OMITTED, "{...}")).collect::<Vec<_>>();
    let lines = dialogue(&plain);
    assert!(lines.len() > 80, "{plain}");
    assert_eq!(dialogue(&explained).len(), lines.len());
    let unexplained: Vec<_> =
        lines.iter().filter(|line| !patterns.iter().any(|pattern| matches(pattern, line))).collect();
    assert!(unexplained.is_empty(), "doc/tour.md leaves out {unexplained:#?}");
    let text = tour.lines().filter(|line| !line.starts_with("    ") && !line.starts_with("# "));
    let mut printed = explained.lines();
    for line in text {
        assert!(printed.any(|printed| printed == line), "--explain does not print {line:?}");
    }
    assert!(tour.lines().count() <= 280 && tour.len() <= 20 * 1024, "{} octets", tour.len());
}

/// Each group of lines, with the paragraph that follows it.
fn explanations(tour: &str) -> Vec<(Vec<&str>, &str)> {
    let paragraphs: Vec<_> = tour.split("\n\n").collect();
    let with_lines = paragraphs.windows(2).map(|pair| {
        let lines: Vec<_> = pair[0].lines().filter(|line| line.starts_with("    ")).collect();
        (lines, pair[1])
    });
    with_lines.filter(|(lines, _)| !lines.is_empty()).collect()
}

#[test]
fn each_group_of_lines_has_a_section_and_a_source_file_with_its_replies() {
    for (lines, text) in explanations(&tour()) {
        let files: Vec<_> = code_spans(text).filter(|word| word.starts_with("src/")).map(read).collect();
        assert!(text.starts_with("RFC ") && text.contains("section") && !files.is_empty(), "{lines:?}: {text}");
        for reply in dialogue(&lines.join("\n")).into_iter().filter_map(reply_text) {
            assert!(files.iter().any(|file| file.contains(&reply)), "no file that is named has {reply:?}: {text}");
        }
    }
}

/// The text of a reply up to what differs: without the code, the enhanced status code and the name of the server, at most
/// three words, and only the first word of a line with a keyword of EHLO. `None`: there is none.
fn reply_text(line: &str) -> Option<String> {
    let (code, text) = line.split_at_checked(3)?;
    code.parse::<u16>().ok()?;
    let (begin, _) = text.split_once(OMITTED).unwrap_or((text, ""));
    let mut words: Vec<_> = begin.get(1..)?.split(' ').collect();
    words.retain(|word| {
        !(word.is_empty() || word.starts_with("2.") || word.ends_with(".net") || word.ends_with(".org"))
    });
    let changes = |word: &&str| word.contains(|character: char| character.is_ascii_digit());
    let count = words.iter().skip(1).position(changes).map_or(words.len(), |at| at + 1);
    words.truncate(count.min(3));
    (!words.is_empty()).then(|| words.join(" "))
}

#[test]
fn what_is_named_exists() {
    let (tour, mut last) = (tour(), String::new());
    let text: String = tour.lines().filter(|line| !line.starts_with("    ")).flat_map(|line| [line, "\n"]).collect();
    let is_name = |word: &str| word.chars().all(|character| character.is_alphanumeric() || character == '_');
    let mut functions = 0;
    for word in code_spans(&text) {
        if word.ends_with(".smtp") || word.ends_with(".txt") {
            assert!(root().join("testdata").join(word).is_file(), "testdata has no {word}");
        } else if ["src/", "tests/", "doc/"].iter().any(|directory| word.starts_with(directory)) {
            last = read(word);
        } else if let Some(name) = word.strip_suffix("()") {
            functions += 1;
            let defined = [format!("fn {name}("), format!("fn {name}<")];
            assert!(
                defined.iter().any(|defined| last.contains(defined)),
                "{name}() is not in the file named before it"
            );
        } else if word.starts_with(char::is_uppercase) && is_name(word) {
            assert!(last.contains(word), "{word} is not in the file named before it");
        }
    }
    assert!(functions > 40, "{functions}");
}
