//! The paths that a file uses, resolved to the module that each names.
//!
//! A resolved path begins with `crate`, or with the name of a library. In `src/queue/x.rs`,
//! `use super::{a, b::C}` uses `crate::queue::a` and `crate::queue::b::C`; after `use std::io;`, `io::Read` is
//! `std::io::Read`.

use std::collections::{BTreeMap, BTreeSet};

use super::source::{Source, closing};

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Path {
    pub segments: Vec<String>,
    pub line: usize,
    pub place: Place,
}

/// Where a path is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    Code,
    /// In code, beginning with a name that a `use` imports.
    Imported,
    Use,
    /// `pub use`: the name is re-exported.
    PublicUse,
}

impl Path {
    /// Whether it is the path `prefix`, or leads below it; both as `a::b`.
    pub fn is_below(&self, prefix: &str) -> bool {
        let mut segments = self.segments.iter();
        prefix.split("::").all(|wanted| segments.next().is_some_and(|segment| segment == wanted))
    }

    /// The `number`th segment; empty beyond the last.
    pub fn segment(&self, number: usize) -> &str {
        self.segments.get(number).map_or("", String::as_str)
    }
}

impl std::fmt::Display for Path {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.segments.join("::"))
    }
}

/// The names in a file, and the paths that they mean.
pub struct Names {
    /// Each path of the file, resolved.
    pub paths: Vec<Path>,
    /// The names that `use` imports into the file, with the path of each.
    pub imported: BTreeMap<String, Path>,
    /// The modules of which `use …::*` imports every name.
    pub globs: Vec<Path>,
}

/// The paths of a file's product code; `modules` are all modules of the crate.
pub fn names(source: &Source, modules: &BTreeSet<Vec<String>>) -> Names {
    let written = written(&source.product);
    let resolve = |raw: &Raw, imported: &BTreeMap<String, Path>| {
        let module = [source.module.as_slice(), &raw.inline].concat();
        let (segments, by_import) = absolute(&raw.segments, &module, modules, imported);
        let place = if by_import && raw.place == Place::Code { Place::Imported } else { raw.place };
        Path { segments, line: raw.line, place }
    };
    // An import may begin with a name that another one imports, so the first pass only collects the names.
    let mut imported = BTreeMap::new();
    for _ in 0..2 {
        let uses =
            written.iter().filter_map(|raw| raw.name.as_ref().map(|name| (name.clone(), resolve(raw, &imported))));
        imported = uses.collect();
    }
    let paths: Vec<Path> = written.iter().map(|raw| resolve(raw, &imported)).collect();
    let globs = paths.iter().filter(|path| path.segments.last().is_some_and(|last| last == "*")).cloned().collect();
    Names { paths, imported, globs }
}

/// The path from the root of the crate, or of a library; and whether it begins with an imported name.
fn absolute(
    segments: &[String], module: &[String], modules: &BTreeSet<Vec<String>>, imported: &BTreeMap<String, Path>,
) -> (Vec<String>, bool) {
    let ours = |module: &[String], rest: &[String]| [&["crate".to_owned()], module, rest].concat();
    let (head, rest) = segments.split_first().expect("a path has a segment");
    let by_import = imported.get(head).filter(|path| path.segments[0] != *head);
    let segments = match head.as_str() {
        "crate" => segments.to_vec(),
        "self" => ours(module, rest),
        "super" => ours(&module[..module.len().saturating_sub(1)], rest),
        _ if modules.contains(&[module, std::slice::from_ref(head)].concat()) => ours(module, segments),
        _ => match by_import {
            Some(path) => return ([path.segments.as_slice(), rest].concat(), true),
            None => segments.to_vec(),
        },
    };
    (segments, false)
}

/// A path as it is written.
struct Raw {
    segments: Vec<String>,
    line: usize,
    place: Place,
    /// The name that it imports into the file, if it is a `use`.
    name: Option<String>,
    /// The inline modules around it.
    inline: Vec<String>,
}

/// Every path of two segments or more, and each leaf of a `use`.
fn written(code: &str) -> Vec<Raw> {
    let tokens = tokens(code);
    let (mut raws, mut inline): (Vec<Raw>, Vec<(String, usize)>) = (Vec::new(), Vec::new());
    let mut at = 0;
    while at < tokens.len() {
        inline.retain(|(_, end)| tokens[at].offset < *end);
        let within = || inline.iter().map(|(name, _)| name.clone()).collect();
        let line = tokens[at].line;
        if tokens[at].text == "use" {
            let public = at > 0 && ["pub", ")"].contains(&tokens[at - 1].text);
            let place = if public { Place::PublicUse } else { Place::Use };
            let mut leaves = Vec::new();
            at = leaves_of(&tokens, at + 1, &[], &mut leaves);
            let leaf = |(segments, name, line)| Raw { segments, line, place, name, inline: within() };
            raws.extend(leaves.into_iter().map(leaf));
        } else if tokens[at].is_word() {
            let mut segments = vec![tokens[at].text.to_owned()];
            while tokens.get(at + 1).is_some_and(|token| token.text == "::")
                && tokens.get(at + 2).is_some_and(Token::is_word)
            {
                segments.push(tokens[at + 2].text.to_owned());
                at += 2;
            }
            if let [.., before, name, brace] = &tokens[..tokens.len().min(at + 2)]
                && before.text == "mod"
                && brace.text == "{"
            {
                inline.push((name.text.to_owned(), closing(code, brace.offset).unwrap_or(code.len())));
            } else if segments.len() > 1 {
                raws.push(Raw { segments, line, place: Place::Code, name: None, inline: within() });
            }
        }
        at += 1;
    }
    raws
}

/// A leaf of a `use`: its path, the name that it imports, its line.
type Leaf = (Vec<String>, Option<String>, usize);

/// Reads a tree of a `use` from token `at`. Returns the index of the token after it.
fn leaves_of(tokens: &[Token], mut at: usize, prefix: &[String], leaves: &mut Vec<Leaf>) -> usize {
    let mut path = prefix.to_vec();
    let begin = at;
    while let Some(token) = tokens.get(at) {
        match token.text {
            "::" => at += 1,
            "{" => {
                at += 1;
                while tokens.get(at).is_some_and(|token| token.text != "}") {
                    at = leaves_of(tokens, at, &path, leaves);
                    at += usize::from(tokens.get(at).is_some_and(|token| token.text == ","));
                }
                return at + 1;
            }
            "as" => break,
            "self" if !path.is_empty() => at += 1,
            "*" => {
                path.push("*".to_owned());
                at += 1;
            }
            word if token.is_word() => {
                path.push(word.to_owned());
                at += 1;
            }
            _ => break,
        }
    }
    let mut name = path.last().filter(|last| *last != "*").cloned();
    if tokens.get(at).is_some_and(|token| token.text == "as") {
        name = tokens.get(at + 1).map(|token| token.text.to_owned());
        at += 2;
    }
    if !path.is_empty() {
        leaves.push((path, name, tokens[begin].line));
    }
    // Skip a token that cannot be in a `use`: otherwise the loop would not end.
    if at == begin { at + 1 } else { at }
}

#[derive(Clone, Copy)]
pub struct Token<'a> {
    pub text: &'a str,
    pub offset: usize,
    pub line: usize,
}

impl Token<'_> {
    pub fn is_word(&self) -> bool {
        self.text.starts_with(|first: char| first.is_alphabetic() || first == '_')
    }
}

/// The tokens of a blanked text: words, numbers, lifetimes, `::`, and every other character by itself.
pub fn tokens(code: &str) -> Vec<Token<'_>> {
    let (mut tokens, mut at, mut line) = (Vec::new(), 0, 1);
    while let Some(first) = code[at..].chars().next() {
        let rest = &code[at..];
        let end_of_word = |text: &str| {
            text.find(|character: char| !character.is_alphanumeric() && character != '_').unwrap_or(text.len())
        };
        let length = match first {
            '\'' => 1 + end_of_word(&rest[1..]),
            ':' if rest.starts_with("::") => 2,
            _ => end_of_word(rest).max(first.len_utf8()),
        };
        if !first.is_whitespace() && first != '~' {
            tokens.push(Token { text: &rest[..length], offset: at, line });
        }
        line += usize::from(first == '\n');
        at += length;
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths_of(path: &str, text: &str) -> Vec<String> {
        let modules = ["queue", "queue::retry", "turn"].map(|module| module.split("::").map(str::to_owned).collect());
        let names = names(&Source::new(path, text), &BTreeSet::from(modules));
        names.paths.iter().map(|path| format!("{} {path}", path.line)).collect()
    }

    #[test]
    fn groups_are_read() {
        assert_eq!(
            paths_of("src/turn.rs", "use crate::{\n    queue::{self, retry::{Retry as R, *}},\n    turn,\n};\n"),
            ["2 crate::queue", "2 crate::queue::retry::Retry", "2 crate::queue::retry::*", "3 crate::turn"]
        );
    }

    #[test]
    fn paths_are_resolved_by_the_module_they_are_in() {
        for (path, text, expected) in [
            ("src/queue/retry.rs", "fn f() { super::Queue::new() }", "1 crate::queue::Queue::new"),
            ("src/queue/retry.rs", "mod linux { fn f() { super::g() } }", "1 crate::queue::retry::g"),
            ("src/turn.rs", "fn f(a: super::queue::Queue) {}", "1 crate::queue::Queue"),
            ("src/queue/mod.rs", "pub fn f() -> retry::Retry {}", "1 crate::queue::retry::Retry"),
            ("src/turn.rs", "fn f(a: Vec<crate::queue::Queue>) {}", "1 crate::queue::Queue"),
            ("src/turn.rs", "fn f(a: crate\n::queue\n::Queue) {}", "1 crate::queue::Queue"),
            ("src/turn.rs", "log::info!(\"crate::queue\"); // crate::queue", "1 log::info"),
            ("src/turn.rs", "use std::io as x; fn f(a: x::Error) {}", "1 std::io, 1 std::io::Error"),
            ("src/turn.rs", "#[cfg(test)]\nmod tests { use crate::queue; }", ""),
        ] {
            assert_eq!(paths_of(path, text).join(", "), expected, "{text}");
        }
    }

    #[test]
    fn a_reexport_is_distinguished_from_a_use() {
        let source = Source::new("src/queue/mod.rs", "pub(crate) use retry::Retry;\nuse retry::A;\n");
        let modules = [vec!["queue".to_owned()], vec!["queue".to_owned(), "retry".to_owned()]];
        let names = names(&source, &BTreeSet::from(modules));
        assert_eq!(names.paths.iter().map(|path| path.place).collect::<Vec<_>>(), [Place::PublicUse, Place::Use]);
        assert_eq!(names.imported["Retry"].to_string(), "crate::queue::retry::Retry");
    }
}
