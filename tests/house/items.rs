//! The items of a file: its types and constants, its functions, its test modules.

use super::paths::{Token, tokens};
use super::source::{closing, line_of, test_items};

/// A type, trait, constant or static, but not one in an `impl` or a trait.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Definition {
    pub name: String,
    pub line: usize,
    /// `pub`, `pub(crate)`, `pub(super)`.
    pub exported: bool,
    /// The inline modules around it.
    pub inline: Vec<String>,
}

/// A function or a module, from its first line to its last.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Extent {
    pub name: String,
    pub line: usize,
    pub length: usize,
}

/// The kind of a block in braces.
#[derive(Clone, PartialEq, Eq)]
enum Block {
    Module(String),
    /// `impl` or `trait`
    Associated,
    Other,
}

/// The definitions of a blanked text, in order.
pub fn definitions(code: &str) -> Vec<Definition> {
    const KEYWORDS: [&str; 6] = ["struct", "enum", "trait", "type", "const", "static"];
    let tokens = tokens(code);
    let (mut definitions, mut blocks, mut begin, mut depth) = (Vec::new(), Vec::new(), 0, 0);
    for (at, token) in tokens.iter().enumerate() {
        match token.text {
            "(" | "[" => depth += 1,
            ")" | "]" => depth -= 1,
            "{" => {
                // A block within the parentheses of a call has its own statements.
                blocks.push((block(&tokens[begin..at]), std::mem::take(&mut depth)));
                begin = at + 1;
            }
            "}" => {
                depth = blocks.pop().map_or(0, |(_, depth)| depth);
                begin = at + 1;
            }
            ";" if depth == 0 => begin = at + 1,
            keyword if KEYWORDS.contains(&keyword) => definitions.extend(definition(&tokens, begin, at, &blocks)),
            _ => {}
        }
    }
    definitions
}

/// The definition whose keyword is token `at`, in the statement that begins with token `begin`.
fn definition(tokens: &[Token], begin: usize, at: usize, blocks: &[(Block, i32)]) -> Option<Definition> {
    if blocks.last().is_some_and(|(block, _)| *block == Block::Associated) {
        return None;
    }
    let exported = exported(&tokens[begin..at])?;
    let name = tokens[at + 1..].iter().find(|token| token.text != "mut")?;
    if !name.is_word() || ["fn", "unsafe", "async"].contains(&name.text) {
        return None;
    }
    let modules = blocks.iter().filter_map(|(block, _)| match block {
        Block::Module(name) => Some(name.clone()),
        _ => None,
    });
    Some(Definition { name: name.text.to_owned(), line: tokens[at].line, exported, inline: modules.collect() })
}

fn block(statement: &[Token]) -> Block {
    let at = statement.iter().position(|token| ["mod", "impl", "trait", "fn"].contains(&token.text));
    match at.map(|at| (statement[at].text, statement.get(at + 1))) {
        Some(("mod", Some(name))) => Block::Module(name.text.to_owned()),
        Some(("impl" | "trait", _)) => Block::Associated,
        _ => Block::Other,
    }
}

/// Whether an item is exported, by the tokens before its keyword; `None`: the keyword does not begin an item.
fn exported(mut before: &[Token]) -> Option<bool> {
    while let [first, bracket, rest @ ..] = before
        && (first.text, bracket.text) == ("#", "[")
    {
        let mut depth = 1;
        let end = rest.iter().position(|token| {
            depth += match token.text {
                "[" => 1,
                "]" => -1,
                _ => 0,
            };
            depth == 0
        })?;
        before = &rest[end + 1..];
    }
    let texts: Vec<&str> = before.iter().map(|token| token.text).collect();
    match texts[..] {
        [] | ["unsafe"] => Some(false),
        ["pub"] | ["pub", "unsafe"] | ["pub", "(", .., ")"] => Some(true),
        _ => None,
    }
}

/// The functions of a blanked text that have a body, in order. The length is from the line of `fn` to the closing brace.
pub fn functions(code: &str) -> Vec<Extent> {
    let tokens = tokens(code);
    let named = tokens.windows(2).filter(|pair| pair[0].text == "fn" && pair[1].is_word());
    let extent = |pair: &[Token]| {
        let begin = pair[0].offset;
        let end = closing(code, body(code, begin)?)?;
        let length = code[begin..end].matches('\n').count() + 1;
        Some(Extent { name: pair[1].text.to_owned(), line: pair[0].line, length })
    };
    named.filter_map(extent).collect()
}

/// The offset at which the body of the function at `begin` opens; `None`: it has no body.
fn body(code: &str, begin: usize) -> Option<usize> {
    let mut at = begin;
    while let Some(octet) = code.as_bytes().get(at) {
        match octet {
            b'{' => return Some(at),
            b';' => return None,
            b'(' | b'[' => at = closing(code, at)?,
            _ => {}
        }
        at += 1;
    }
    None
}

/// The test modules of a blanked text that have a body.
pub fn test_modules(code: &str) -> Vec<Extent> {
    let written_out = test_items(code).into_iter().filter(|item| item.has_body);
    let extent = |item: super::source::TestItem| {
        let line = line_of(code, item.range.start);
        Some(Extent { name: item.module?.to_owned(), line, length: line_of(code, item.range.end) - line + 1 })
    };
    written_out.filter_map(extent).collect()
}

#[cfg(test)]
mod tests {
    use super::super::source::blank;
    use super::*;

    #[test]
    fn definitions_are_found_at_any_depth_but_not_in_an_impl() {
        for (code, expected) in [
            ("pub struct A<const N: usize>(*const u8); enum B {}", "A+ B"),
            ("#[derive(A)] #[x(a = [1])] pub(crate) enum A { C { d: u8 } }", "A+"),
            ("impl X for [u8; 3] { type Y = u8; const Z: u8 = 1; fn f() { struct W; const V: u8 = 1; } }", "W V"),
            ("pub trait T { type Y; const Z: u8; } pub(super) type U = u8;", "T+ U+"),
            ("mod a { pub static mut B: &'static str = x; const fn f() {} }", "a::B+"),
            ("fn f() -> impl X { call(|| { const A: u8 = 1; }); type B = u8; }", "A B"),
            ("const _: () = (); pub const C: [u8; 2] = [0; 2];", "_ C+"),
        ] {
            let found = definitions(code).into_iter().map(|found| {
                [found.inline.as_slice(), &[found.name]].concat().join("::") + if found.exported { "+" } else { "" }
            });
            assert_eq!(found.collect::<Vec<_>>().join(" "), expected, "{code}");
        }
    }

    #[test]
    fn functions_are_measured_by_their_braces() {
        let code = "fn a() {\n  '{'; \"{\"; // {\n}\n\
                    fn b<'a>(x: fn(u8) -> u8) -> [u8; 2]\nwhere A: B\n{\n if x {\n }\n}\n\
                    trait T { fn c(); }\n/* fn d() {} */ type F = fn();";
        let found = functions(&blank(code)).into_iter().map(|found| (found.name, found.line, found.length));
        assert_eq!(found.collect::<Vec<_>>(), [("a".to_owned(), 1, 3), ("b".to_owned(), 4, 6)]);
    }

    #[test]
    fn test_modules_are_measured() {
        let code = "#[cfg(test)]\nfn helper() {\n}\n#[cfg(test)]\nmod tests {\n\n}\n#[cfg(test)]\nmod other;\n";
        assert_eq!(test_modules(code), [Extent { name: "tests".to_owned(), line: 4, length: 4 }]);
    }
}
