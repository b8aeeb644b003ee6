//! Reads files in the format of aliases(5), such as `/etc/aliases`. Names and targets have the same form in `aliases` of
//! `[mailboxes]`.
//!
//! ```text
//! # a comment
//! postmaster: root
//! root:  alice, bob@example.com     # a name without a domain is in every domain, such a target in the first
//! "a b": alice,
//!   \bob                            # a line that begins with a space continues; \bob: the mailbox, not an alias
//! info@example.org: alice
//! @example.net: alice               # all recipients there that have no other rule
//! ```
//!
//! `/dev/null` discards mail. A program, another file, `:include:` and the like are for other mail servers that read
//! the same file. Mail for such an alias is deferred; all other aliases are in effect.

use std::path::Path;
use std::sync::Arc;

use super::source::decode;
use super::value::{ACCEPTED, address_with_domain};
use crate::mail::address::{Domain, Mailbox};
use crate::recipients::{AddressPattern, Alias, AliasTarget, ConfigError, SourceLine, TargetKind, address};

/// Reads a file of aliases; targets without a domain are in `home`.
pub(super) fn parse(file: &Arc<Path>, octets: &[u8], home: &Domain) -> Result<Vec<Alias>, ConfigError> {
    let mut aliases: Vec<Alias> = Vec::new();
    for (index, line) in decode(file, octets)?.lines().enumerate() {
        let source = SourceLine { file: file.clone(), line: Some(index + 1) };
        let line = strip_comment(line);
        if line.trim().is_empty() {
            continue;
        }
        let pieces = pieces(line).map_err(|text| source.error(text))?;
        let targets = if line.starts_with(char::is_whitespace) {
            pieces.targets(None)
        } else {
            aliases.last().map_or(Ok(()), check_targets)?;
            let written = pieces.name.ok_or_else(|| {
                source.error(format!("{:?} has no colon: write a name, a colon, and the targets", line.trim()))
            })?;
            let name = name(written.trim()).map_err(|text| source.error(text))?;
            aliases.push(Alias { name, targets: Vec::new(), source: source.clone() });
            pieces.targets(Some(written))
        };
        let Some(alias) = aliases.last_mut() else {
            return Err(source.error(
                "this line begins with a space, so it continues an alias, and there is none before it: remove the \
                 space",
            ));
        };
        for written in targets {
            alias.targets.push(target(written, home, source.clone())?);
        }
    }
    aliases.last().map_or(Ok(()), check_targets)?;
    Ok(aliases)
}

/// Rejects an alias that has no target.
pub(super) fn check_targets(alias: &Alias) -> Result<(), ConfigError> {
    match alias.targets.is_empty() {
        true => Err(alias
            .source
            .error(format!("the alias {} leads nowhere: name one mailbox or more, or remove it", alias.name))),
        false => Ok(()),
    }
}

/// A line and its separators outside quotes.
struct Pieces<'a> {
    /// The text before the first colon.
    name: Option<&'a str>,
    line: &'a str,
    /// The offsets of the commas.
    commas: Vec<usize>,
}

impl<'a> Pieces<'a> {
    /// The texts between commas, after the name if there is one. Empty ones are left out.
    fn targets(&self, name: Option<&str>) -> Vec<&'a str> {
        let begin = name.map_or(0, |name| name.len() + 1);
        let mut ends = self.commas.clone();
        ends.push(self.line.len());
        let mut from = begin;
        let mut targets = Vec::with_capacity(ends.len());
        for end in ends.into_iter().filter(|end| *end >= begin) {
            targets.push(self.line[from..end].trim());
            from = end + 1;
        }
        targets.retain(|target| !target.is_empty());
        targets
    }
}

fn pieces(line: &str) -> Result<Pieces<'_>, &'static str> {
    let mut pieces = Pieces { name: None, line, commas: Vec::new() };
    let mut quotes = Quotes::default();
    for (at, _) in line.char_indices().filter(|(_, character)| quotes.next(*character)) {
        match line.as_bytes()[at] {
            b':' if pieces.name.is_none() => pieces.name = Some(&line[..at]),
            b',' => pieces.commas.push(at),
            _ => {}
        }
    }
    if quotes.open {
        return Err("a quote is open at the end of the line: close it with another \"");
    }
    // A name has no commas: the colon is part of a target.
    if pieces.commas.first().is_some_and(|comma| pieces.name.is_some_and(|name| *comma < name.len())) {
        pieces.name = None;
    }
    Ok(pieces)
}

/// Finds the characters in quotes. In quotes a backslash escapes the next character.
#[derive(Default)]
struct Quotes {
    open: bool,
    escaped: bool,
}

impl Quotes {
    /// Reads the next character. Returns whether it is outside quotes and not a quote itself.
    fn next(&mut self, character: char) -> bool {
        let open = self.open;
        match character {
            _ if self.escaped => self.escaped = false,
            '\\' => self.escaped = open,
            '"' => self.open = !open,
            _ => {}
        }
        !open && character != '"'
    }
}

/// The line without its comment, which begins with a `#` at the begin of the line or after a space.
fn strip_comment(line: &str) -> &str {
    let mut quotes = Quotes::default();
    let comment = line.char_indices().find(|(at, character)| {
        quotes.next(*character) && *character == '#' && line[..*at].chars().next_back().is_none_or(char::is_whitespace)
    });
    comment.map_or(line, |(at, _)| &line[..at])
}

/// The name of an alias: an address, `@domain`, or a local part.
pub(super) fn name(text: &str) -> Result<AddressPattern, String> {
    let wrong = || {
        format!(
            "{text:?} is not a valid alias name: write an address such as \"info@example.org\", \"@example.org\" for a \
             whole domain, or a name such as \"root\" for every domain"
        )
    };
    if let Some(name) = bare(text) {
        return Ok(AddressPattern::bare(name.local()));
    }
    let accepted = ACCEPTED.parse(text).map_err(|error| if text.starts_with('@') { error } else { wrong() })?;
    Ok(accepted.pattern)
}

/// One target of an alias.
pub(super) fn target(text: &str, home: &Domain, source: SourceLine) -> Result<AliasTarget, ConfigError> {
    // A program or a file may be quoted as a whole; in an address the domain follows the quotes.
    let inside = match text.strip_prefix('"') {
        None => text,
        Some(quoted) => quoted.strip_suffix('"').unwrap_or_default(),
    };
    let what = match inside {
        // `:blackhole:` is Exim's.
        "/dev/null" | ":blackhole:" => return Ok(AliasTarget { kind: TargetKind::Discard, source }),
        _ if inside.starts_with('|') => "a program",
        _ if inside.starts_with('/') => "a file",
        _ if inside.starts_with(":include:") => "a list in another file",
        _ if inside.starts_with(':') => "an order to another mail server",
        _ => "",
    };
    let unserved = |written: &str, what: &str| TargetKind::Unserved(format!("{written:?} is {what}"));
    if !what.is_empty() {
        return Ok(AliasTarget { kind: unserved(inside, what), source });
    }
    let (rest, direct) = text.strip_prefix('\\').map_or((text, false), |rest| (rest, true));
    let mailbox = match bare(rest) {
        Some(name) => address(name.local(), home),
        None => address_with_domain(rest),
    };
    match mailbox {
        // Such as root@localhost, which is for the local mail server. No domain here lacks a dot.
        Some(mailbox) if !mailbox.domain().is_some_and(|domain| domain.as_str().contains('.')) => {
            Ok(AliasTarget { kind: unserved(text, "an address at a host without a domain"), source })
        }
        Some(mailbox) => Ok(AliasTarget { kind: TargetKind::Mailbox { mailbox, direct }, source }),
        None => Err(source.error(format!(
            "{text:?} is not a valid address: write one such as \"alice@example.org\", or a name such as \"alice\" \
             for the one at {home}"
        ))),
    }
}

/// The mailbox of a local part without a domain, with the placeholder domain `x`.
fn bare(text: &str) -> Option<Mailbox> {
    Mailbox::parse(&format!("{text}@x")).filter(|_| text != "\"\"")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(text: &[u8]) -> Result<Vec<Alias>, String> {
        let file: Arc<Path> = Path::new("aliases").into();
        parse(&file, text, &Domain::parse("example.org").unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn each_form_of_an_alias_is_read() {
        fn check(text: &str, expected: &[&str]) {
            let shown = |alias: Alias| {
                let target = |target: &AliasTarget| match &target.kind {
                    TargetKind::Mailbox { mailbox, direct } => format!("{}{mailbox}", if *direct { "\\" } else { "" }),
                    TargetKind::Discard => "DISCARD".to_owned(),
                    TargetKind::Unserved(what) => format!("({what})"),
                };
                let targets: Vec<_> = alias.targets.iter().map(target).collect();
                format!("{} {} = {}", alias.source.line.unwrap(), alias.name, targets.join(" "))
            };
            let got: Vec<_> = read(text.as_bytes()).unwrap().into_iter().map(shown).collect();
            assert_eq!(got, expected, "{text:?}");
        }
        check("", &[]);
        check("# nothing\n\n   \n\t# here\n", &[]);
        check("root: alice", &["1 root = alice@example.org"]);
        check("ROOT:alice\r\n", &["1 root = alice@example.org"]);
        check("root :\talice , bob@example.com,", &["1 root = alice@example.org bob@example.com"]);
        check(
            "\na: b,\n  c\n# between\n\n\td\ne: f",
            &["2 a = b@example.org c@example.org d@example.org", "7 e = f@example.org"],
        );
        check("a:\n b", &["1 a = b@example.org"]);
        check("a: b # all of it: c, d", &["1 a = b@example.org"]);
        check("a: b#c", &["1 a = b#c@example.org"]);
        check("a: a, \\a, \\b@example.com", &["1 a = a@example.org \\a@example.org \\b@example.com"]);
        check("\"a b\": \"c, #d\"", &["1 \"a b\" = \"c, #d\"@example.org"]);
        check("\"a:b\": \"c\"", &["1 \"a:b\" = c@example.org"]);
        check("\"a \\\" b\"@example.org: c", &["1 \"a \\\" b\"@example.org = c@example.org"]);
        check("Info@Example.ORG: Alice", &["1 info@example.org = Alice@example.org"]);
        check("@example.net: alice", &["1 @example.net = alice@example.org"]);
        check("a: /dev/null", &["1 a = DISCARD"]);
        check("a: \"/dev/null\", b", &["1 a = DISCARD b@example.org"]);
        check("a: :blackhole:", &["1 a = DISCARD"]);
        check("a: |/bin/cat", &["1 a = (\"|/bin/cat\" is a program)"]);
        check("a: \"|/bin/cat -n, x\"", &["1 a = (\"|/bin/cat -n, x\" is a program)"]);
        check("a: b,\n /var/mail/b", &["1 a = b@example.org (\"/var/mail/b\" is a file)"]);
        check("a: /dev/null/x", &["1 a = (\"/dev/null/x\" is a file)"]);
        check("a: :include:/etc/list", &["1 a = (\":include:/etc/list\" is a list in another file)"]);
        check("a: :fail: gone", &["1 a = (\":fail: gone\" is an order to another mail server)"]);
        check("a: b@localhost", &["1 a = (\"b@localhost\" is an address at a host without a domain)"]);
        check("jürgen: Jürgen@bücher.example", &["1 jürgen = Jürgen@xn--bcher-kva.example"]);
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        fn check(text: &[u8], place: &str, phrase: &str) {
            let error = read(text).unwrap_err();
            let right = error.starts_with(&format!("aliases:{place}: ")) && error.contains(phrase);
            assert!(right, "{text:?}\nwanted: aliases:{place}: … {phrase}\n   got: {error}");
        }
        check(b"a: b\nc", "2", "\"c\" has no colon");
        check(b"a, b: c", "1", "has no colon");
        check(b"  a: b", "1", "begins with a space");
        check(b"a:\nb: c", "1", "the alias a leads nowhere");
        check(b"b: c\na: ,", "2", "the alias a leads nowhere");
        check(b"a: \"b", "1", "a quote is open");
        check(b"a: b c", "1", "\"b c\" is not a valid address");
        check(b"a: b\n  c@", "2", "\"c@\" is not a valid address");
        check(b"a: b@[192.0.2.1]", "1", "is not a valid address");
        check(b"a: Alice <alice@example.org>", "1", "is not a valid address");
        check(b"a b: c", "1", "\"a b\" is not a valid alias name");
        check(b": c", "1", "\"\" is not a valid alias name");
        check(b"\"\": c", "1", "is not a valid alias name");
        check(b"a@[192.0.2.1]: c", "1", "is not a valid alias name");
        check(b"@localhost: c", "1", "has no dot");
        check(b"a: b\n\xe4: c", "2", "is not UTF-8");
    }

    proptest! {
        #[test]
        fn no_octets_make_the_parser_panic(octets: Vec<u8>) {
            let _ = read(&octets);
        }

        #[test]
        fn no_line_makes_the_parser_panic(text in "[ab\"\\\\:,#@| \n\t<ä]{0,30}") {
            let _ = read(text.as_bytes());
        }

        #[test]
        fn what_is_written_is_read_again(
            aliases in proptest::collection::vec(("[a-z]{1,8}", proptest::collection::vec("[ -~ü]{1,8}", 1..4)), 0..5),
            glue in "(, ?|,\n |, # x\n\t)",
        ) {
            let home = Domain::parse("example.org").unwrap();
            let mailbox = |local: &String| address(local, &home).unwrap();
            let line = |(name, targets): &(String, Vec<String>)| {
                let targets: Vec<_> = targets.iter().map(|local| mailbox(local).to_string()).collect();
                format!("{name}: {}\n", targets.join(&glue))
            };
            let plain = |(_, targets): &(String, Vec<String>)| {
                // Such an address means something else here.
                !targets.iter().any(|local| local.starts_with(['|', '/', '#']))
            };
            prop_assume!(aliases.iter().all(plain));
            let text: String = aliases.iter().map(line).collect();
            let read = read(text.as_bytes()).unwrap();
            prop_assert_eq!(read.len(), aliases.len());
            for (alias, (name, targets)) in read.iter().zip(&aliases) {
                prop_assert_eq!(&alias.name, &AddressPattern::bare(name));
                let got: Vec<_> = alias.targets.iter().map(|target| target.kind.clone()).collect();
                let plain = |local| TargetKind::Mailbox { mailbox: mailbox(local), direct: false };
                prop_assert_eq!(got, targets.iter().map(plain).collect::<Vec<_>>());
            }
        }
    }
}
