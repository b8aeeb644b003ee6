//! The words of the house: one concept has one word, the field's.
//!
//! The text of every file that belongs to the project is read: code, comments, names (`put_off` and `PutOff` are the words
//! `put off`), strings, dialogues, documentation, recipes. What a word of the list means has another word, which the finding
//! says. `ALLOWED` has the exceptions: another meaning of the word, or a name that other programs or files at rest have.

use std::collections::BTreeSet;

use crate::project::{files_without, root};

/// What does not occur, and what to write. `_` is any one word.
const WORDS: [(&str, &str); 28] = [
    ("letter", "message; or character, initial"),
    ("letters", "messages; or characters"),
    ("notice", "DSN; or warning"),
    ("notices", "DSNs; or warnings"),
    ("folder", "directory; of Maildir++: mailbox directory"),
    ("folders", "directories"),
    ("door", "listener"),
    ("doors", "listeners"),
    ("put off", "defer, deferred"),
    ("puts off", "defers"),
    ("putting off", "deferring"),
    ("put _ off", "defer"),
    ("puts _ off", "defers"),
    ("hand in", "submit"),
    ("hands in", "submits"),
    ("handed in", "submitted"),
    ("handing in", "submitting"),
    ("hand _ in", "submit"),
    ("hands _ in", "submits"),
    ("refuse", "reject"),
    ("refuses", "rejects"),
    ("refused", "rejected"),
    ("refusing", "rejecting"),
    ("refusal", "rejection"),
    ("refusals", "rejections"),
    ("behind", "after"),
    ("stands", "is"),
    ("is no", "is not a"),
];

/// Where a word of the list is right. The first is the begin of the path, the second what is around the word, as words in
/// small letters, the third why.
const ALLOWED: &[(&str, &str, &str)] = &[
    ("", "there is no", "something does not exist"),
    ("", "is no longer", "something has ended"),
    ("", "letters and digits", "of the alphabet"),
    ("", "letters , digits", "of the alphabet"),
    ("", "begins with a letter", "of the alphabet"),
    ("", ". refused", "a directory of mail at rest"),
    ("", "odmr refused", "a field of mail at rest, X-ODMR-Refused"),
    ("", "connection refused", "ECONNREFUSED"),
    ("", "behind cgnat", "a place"),
    ("tests/interop/dns.py", "refused", "a code of the DNS"),
    ("", "delay notice", "the former name of a key of the configuration"),
    ("src/maildir/", "folder", "of Maildir++"),
    ("src/maildir/", "folders", "of Maildir++"),
    ("src/recipients/", "folder", "of Maildir++"),
    ("src/recipients/", "folders", "of Maildir++"),
    ("src/customer/", "folder", "of Maildir++"),
    ("src/customer/", "folders", "of Maildir++"),
    ("fuzz/", "folders", "of Maildir++"),
    ("src/net/resolver", "refused", "an RCODE of the DNS"),
    ("testdata/rules/", "folder", "of Maildir++"),
];

/// Text that is not ours: a licence, messages and certificates of others, the lists of versions.
const NOT_OURS: &[&str] = &[
    "LICENSE-",
    "Cargo.lock",
    "testdata/certificates/",
    "fuzz/corpus/",
    "packaging/debian/copyright",
    "tests/words.rs",
];

#[test]
fn the_words_of_the_house() {
    let mut findings = Vec::new();
    let mut used = BTreeSet::new();
    for file in files_without("", &["target", ".git", "__pycache__", "certs"]) {
        let path = file.strip_prefix(root()).expect("below the root").to_string_lossy();
        if NOT_OURS.iter().any(|begin| path.starts_with(begin)) {
            continue;
        }
        let text = std::fs::read(&file).expect("a file of the project");
        let text = format!("{path}\n{}", String::from_utf8_lossy(&text));
        let words = words(&text);
        for (at, (line, _)) in words.iter().enumerate() {
            let Some((word, instead)) = WORDS.iter().find(|(word, _)| is_at(&words, at, word)) else { continue };
            let allowed = ALLOWED.iter().position(|(begin, around, _)| {
                let before = around.split(' ').take_while(|part| !word.starts_with(part)).count();
                path.starts_with(begin) && at >= before && is_at(&words, at - before, around)
            });
            match allowed {
                Some(number) => drop(used.insert(number)),
                None => findings.push(format!("{path}:{line}: {word:?}: write {instead}")),
            }
        }
    }
    let unused = (0..ALLOWED.len()).filter(|number| !used.contains(number));
    findings.extend(unused.map(|number| format!("tests/words.rs: nothing needs {:?}", ALLOWED[number])));
    assert!(findings.is_empty(), "{} findings:\n{}", findings.len(), findings.join("\n"));
}

/// The words of a text in small letters, each with its line, 0 for the path before the text. A name is taken apart, at `_`,
/// `-` and before its capitals.
fn words(text: &str) -> Vec<(usize, String)> {
    let mut words = Vec::new();
    for (line, text) in text.lines().enumerate() {
        let mut word = String::new();
        let mut previous = ' ';
        for character in text.chars().chain([' ']) {
            let begins = character.is_uppercase() && previous.is_lowercase();
            if (begins || !character.is_alphabetic()) && !word.is_empty() {
                words.push((line, std::mem::take(&mut word)));
            }
            if character.is_alphabetic() {
                word.extend(character.to_lowercase());
            } else if matches!(character, '.' | ',' | ':' | ';' | '?' | '!') {
                // No phrase goes over the end of a sentence.
                words.push((line, character.to_string()));
            }
            previous = character;
        }
    }
    words
}

fn is_at(words: &[(usize, String)], at: usize, phrase: &str) -> bool {
    let mut parts = phrase.split(' ').zip(words[at..].iter().map(|(_, word)| word.as_str()));
    parts.all(|(part, word)| part == word || part == "_") && words.len() - at >= phrase.split(' ').count()
}

#[test]
fn names_are_taken_apart() {
    let found = |text: &str| {
        let words = words(text);
        let at = |at| WORDS.iter().find(|(word, _)| is_at(&words, at, word)).map(|(word, _)| *word);
        (0..words.len()).find_map(at)
    };
    for (text, wanted) in [
        ("fn put_off()", Some("put off")),
        ("PutOff", Some("put off")),
        ("puts it off", Some("puts _ off")),
        ("is refused-removed", Some("refused")),
        ("REFUSED", Some("refused")),
        ("this is no\nSMTP command", Some("is no")),
        ("it is. No other", None),
        ("noticed, withstands, input office", None),
    ] {
        assert_eq!(found(text), wanted, "{text}");
    }
}
