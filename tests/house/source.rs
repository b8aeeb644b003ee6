//! The source files of the program, as text that is safe to scan.
//!
//! [`blank`] removes comments and fills literals. It does not change offsets and line ends, so that a finding of a check
//! is code, and has the same line as in the file.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::PathBuf;

use crate::project;

/// Replaces each octet of a literal. Rust has no such token, so a check never reads it as code.
const FILLER: u8 = b'~';

pub struct Source {
    /// `src/queue/mod.rs`
    pub path: String,
    /// The path of the module: `["queue"]`; empty for `src/lib.rs` and `src/main.rs`.
    pub module: Vec<String>,
    /// The contents of the file.
    pub text: String,
    /// Without comments and literals.
    pub code: String,
    /// `code` without its tests; blank if the whole file is for tests.
    pub product: String,
}

impl Source {
    pub fn new(path: &str, text: &str) -> Source {
        let below = path.strip_prefix("src/").unwrap_or(path).trim_end_matches(".rs");
        let mut module: Vec<String> = below.split('/').map(str::to_owned).collect();
        if ["mod", "lib", "main"].contains(&module.last().map_or("", String::as_str)) {
            module.pop();
        }
        let code = blank(text);
        let product = without(&code, test_items(&code).into_iter().map(|item| item.range));
        Source { path: path.to_owned(), module, text: text.to_owned(), code, product }
    }

    /// The top-level module that the file belongs to; `None` for `src/lib.rs` and `src/main.rs`.
    pub fn room(&self) -> Option<&str> {
        self.module.first().map(String::as_str)
    }

    /// The number of lines of product code: without tests, comments and blank lines.
    pub fn product_lines(&self) -> usize {
        self.product.lines().filter(|line| !line.trim().is_empty()).count()
    }

    pub fn at(&self, line: usize) -> String {
        format!("{}:{line}", self.path)
    }
}

/// All files of `src/`, by path.
pub fn sources() -> Vec<Source> {
    let files = project::files(root().join("src")).into_iter().filter(|path| project::has_extension(path, "rs"));
    let source = |path: PathBuf| {
        let name = path.strip_prefix(root()).expect("a path below the root").display().to_string();
        Source::new(&name, &project::read(&path))
    };
    let mut sources: Vec<Source> = files.map(source).collect();
    blank_test_files(&mut sources);
    sources
}

/// The root of the package. The environment variable `HOUSE` names another one, to try the checks on a copy.
pub fn root() -> PathBuf {
    std::env::var_os("HOUSE").map_or_else(|| project::root().to_owned(), PathBuf::from)
}

/// A file that is declared as `#[cfg(test)] mod tests;`, and each file below it, has no product code.
pub fn blank_test_files(sources: &mut [Source]) {
    let mut tests = BTreeSet::new();
    for source in sources.iter() {
        for item in test_items(&source.code).iter().filter(|item| !item.has_body) {
            if let Some(name) = item.module {
                let mut module = source.module.clone();
                module.push(name.to_owned());
                tests.insert(module);
            }
        }
    }
    for source in sources {
        if (1..=source.module.len()).any(|length| tests.contains(&source.module[..length])) {
            source.product = without(&source.product, std::iter::once(0..source.product.len()));
        }
    }
}

/// The line of an offset, from 1.
pub fn line_of(text: &str, offset: usize) -> usize {
    text[..offset].matches('\n').count() + 1
}

/// The text with its comments as spaces and its literals as [`FILLER`]; same length, same lines.
pub fn blank(text: &str) -> String {
    let octets = text.as_bytes();
    let mut out = octets.to_vec();
    let mut at = 0;
    while at < octets.len() {
        let Some((end, filler)) = comment_or_literal(text, at) else {
            at = end_of_word(octets, at).max(at + 1);
            continue;
        };
        out[at..end].iter_mut().filter(|octet| **octet != b'\n').for_each(|octet| *octet = filler);
        at = end;
    }
    String::from_utf8(out).expect("only whole literals and comments are filled")
}

/// The end of the comment or literal that begins at `at`, and the octet that replaces each of its octets.
fn comment_or_literal(text: &str, at: usize) -> Option<(usize, u8)> {
    let octets = text.as_bytes();
    let literal = |end| (end, FILLER);
    match octets[at] {
        b'/' if octets[at..].starts_with(b"//") => Some((find(octets, at, b"\n"), b' ')),
        b'/' if octets[at..].starts_with(b"/*") => Some((end_of_comment(octets, at), b' ')),
        b'"' => Some(literal(end_of_string(octets, at + 1))),
        b'\'' => end_of_character(text, at).map(literal),
        b'r' | b'b' | b'c' => end_of_raw_string(octets, at).map(literal),
        _ => None,
    }
}

fn is_word(octet: u8) -> bool {
    octet.is_ascii_alphanumeric() || octet == b'_' || !octet.is_ascii()
}

fn end_of_word(octets: &[u8], at: usize) -> usize {
    octets[at..].iter().position(|octet| !is_word(*octet)).map_or(octets.len(), |length| at + length)
}

/// The offset of `wanted`, or that of the end of the text.
fn find(octets: &[u8], from: usize, wanted: &[u8]) -> usize {
    octets[from.min(octets.len())..]
        .windows(wanted.len())
        .position(|window| window == wanted)
        .map_or(octets.len(), |at| from + at)
}

/// The end of a block comment. Block comments may be nested.
fn end_of_comment(octets: &[u8], at: usize) -> usize {
    let (mut depth, mut at) = (0, at);
    while at < octets.len() {
        if octets[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if octets[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                break;
            }
        } else {
            at += 1;
        }
    }
    at
}

fn end_of_string(octets: &[u8], mut at: usize) -> usize {
    while at < octets.len() {
        match octets[at] {
            b'"' => return at + 1,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    octets.len()
}

/// The end of a character literal; `None`: the quotation mark begins a lifetime.
fn end_of_character(text: &str, at: usize) -> Option<usize> {
    let mut characters = text[at + 1..].char_indices();
    let (_, first) = characters.next()?;
    if first == '\\' {
        characters.next();
        return characters.find(|(_, character)| *character == '\'').map(|(offset, _)| at + 1 + offset + 1);
    }
    characters.next().filter(|(_, second)| *second == '\'').map(|(offset, _)| at + 1 + offset + 1)
}

/// The end of a raw string; `None`: it is a raw identifier (`r#type`) or another word.
fn end_of_raw_string(octets: &[u8], at: usize) -> Option<usize> {
    let prefix = end_of_word(octets, at);
    if ![b"r".as_slice(), b"br", b"cr"].contains(&&octets[at..prefix]) {
        return None;
    }
    let hashes = octets[prefix..].iter().take_while(|octet| **octet == b'#').count();
    let content = prefix + hashes + 1;
    if octets.get(content - 1) != Some(&b'"') {
        return None;
    }
    let closing = [b"\"".as_slice(), &b"#".repeat(hashes)].concat();
    Some((find(octets, content, &closing) + closing.len()).min(octets.len()))
}

/// An item under `#[cfg(test)]`.
pub struct TestItem<'a> {
    pub range: Range<usize>,
    /// The name, if the item is a module.
    pub module: Option<&'a str>,
    /// Whether the item ends with a brace: `mod tests { … }`, not `mod tests;`.
    pub has_body: bool,
}

/// The test items of a blanked text, in order.
pub fn test_items(code: &str) -> Vec<TestItem<'_>> {
    const ATTRIBUTE: &str = "#[cfg(test)]";
    let (mut items, mut from) = (Vec::new(), 0);
    while let Some(begin) = code[from..].find(ATTRIBUTE).map(|at| from + at) {
        let mut item = begin + ATTRIBUTE.len();
        while let Some(length) = attribute_length(&code[item..]) {
            item += length;
        }
        let end = item + item_length(&code[item..]);
        let module = code[item..end].split_once("mod ").filter(|(before, _)| is_visibility(before.trim()));
        let module = module.map(|(_, rest)| rest.split([';', ' ', '{']).next().unwrap_or_default());
        items.push(TestItem { range: begin..end, module, has_body: code[..end].ends_with('}') });
        from = end;
    }
    items
}

fn is_visibility(text: &str) -> bool {
    text.is_empty() || text == "pub" || (text.starts_with("pub(") && text.ends_with(')'))
}

/// The length of one attribute, with the space before it.
fn attribute_length(code: &str) -> Option<usize> {
    let space = code.len() - code.trim_start().len();
    code[space..].starts_with("#[").then(|| closing(code, space + 1).map_or(code.len(), |at| at + 1))
}

/// The length of an item. It ends with its first `;`, or with the brace that closes its body; a field or a variant ends
/// with its comma.
fn item_length(code: &str) -> usize {
    const ITEMS: [&str; 12] =
        ["async", "const", "enum", "fn", "impl", "mod", "static", "struct", "trait", "type", "unsafe", "use"];
    let mut words = code.split(|character: char| !character.is_alphanumeric() && character != '_');
    let first = words.find(|word| !["", "pub", "crate", "super"].contains(word)).unwrap_or_default();
    let mut at = 0;
    while at < code.len() {
        match code.as_bytes()[at] {
            b';' => return at + 1,
            b',' if !ITEMS.contains(&first) => return at + 1,
            b'{' if first != "use" => return closing(code, at).map_or(code.len(), |at| at + 1),
            b'(' | b'[' | b'{' => at = closing(code, at).unwrap_or(code.len()),
            b'}' => return at,
            _ => {}
        }
        at += 1;
    }
    code.len()
}

/// The text with these ranges replaced by spaces, so that its length and its lines do not change.
fn without(code: &str, ranges: impl IntoIterator<Item = Range<usize>>) -> String {
    let mut out = code.as_bytes().to_vec();
    for range in ranges {
        out[range].iter_mut().filter(|octet| **octet != b'\n').for_each(|octet| *octet = b' ');
    }
    String::from_utf8(out).expect("a range begins and ends with a character")
}

/// The offset at which the bracket that opens at `open` closes.
pub fn closing(code: &str, open: usize) -> Option<usize> {
    let mut depth = 0;
    for (at, octet) in (open..).zip(code.as_bytes()[open..].iter()) {
        match octet {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(at);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_are_blanked_and_lines_do_not_change() {
        for (input, expected) in [
            ("a // {\nb", "a     \nb"),
            ("a /* { /* } */ */ b", "a                 b"),
            ("f(\"{\\\"//\n\", b)", "f(~~~~~~\n~, b)"),
            ("r#\"\"{\"# r#type", "~~~~~~~ r#type"),
            ("br\"\\\" b\"{\"", "~~~~~ b~~~"),
            ("'{' '\\'' b'\\x7b' '\\u{7b}' 'é'", "~~~ ~~~~ b~~~~~~ ~~~~~~~~ ~~~~"),
            ("<'a, 'static>(&'a str, 'x')", "<'a, 'static>(&'a str, ~~~)"),
        ] {
            assert_eq!(blank(input), expected, "{input}");
        }
    }

    #[test]
    fn tests_are_not_product_code() {
        for (input, expected) in [
            ("fn a() {}\n#[cfg(test)]\nmod tests {\n fn b() {}\n}\nfn c() {}", "fn a() {}\n \n fn c() {}"),
            ("#[cfg(test)]\n#[allow(x)]\npub(crate) fn f<A, B>(a: [u8; 2]) { x; }\nfn g() {}", "fn g() {}"),
            ("#[cfg(test)]\nuse a::{b, c};\nuse d;", "use d;"),
            ("struct A { #[cfg(test)] a: u8, b: u8 }", "struct A { b: u8 }"),
            ("#[cfg(not(test))]\nfn g() {}", "#[cfg(not(test))] fn g() {}"),
        ] {
            let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
            assert_eq!(words(&Source::new("src/a.rs", input).product), words(expected), "{input}");
        }
    }

    #[test]
    fn a_file_of_tests_has_no_product_code() {
        let file = Source::new;
        let mut sources = [
            file("src/queue/mod.rs", "#[cfg(test)]\nmod tests;\nmod retry;"),
            file("src/queue/retry.rs", "fn a() {}"),
            file("src/queue/tests.rs", "mod more;\nfn b() {}"),
            file("src/queue/tests/more.rs", "fn c() {}"),
        ];
        blank_test_files(&mut sources);
        assert_eq!(sources.each_ref().map(Source::product_lines), [1, 1, 0, 0]);
    }
}
