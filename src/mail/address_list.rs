//! Lists of addresses in header fields and on the command line (RFC 5322 sections 3.4 and 4.4).
//!
//! Programs and people write more than the grammar permits, so the parser is lenient: it accepts additional commas, `;` for
//! `,`, a group without its end, an address as its own display name, and any character in a display name. It does not guess:
//! a wrong guess could send the message to another person. An error shows the place.
//!
//! ```text
//! Joe Doe <joe@example.net>, (a comment) friends: eva, "Bob B."@example.org;
//! `-----------------------'              `--------------------------------'
//!     display name, address                           group
//! ```

use std::ops::Range;

use super::address::{Domain, Mailbox, PathError};

/// Characters of an unreadable address that an error shows.
const ERROR_EXCERPT: usize = 100;

/// Returns the mailboxes of a list in their order; a mailbox that occurs twice is twice in the result.
///
/// The parser knows display names, quoted strings, nested comments, groups, source routes and folded lines. A local part
/// without a host gets the host `home`. The result is empty if the list is empty or has only empty groups.
///
/// # Errors
/// An address cannot be read: a sentence that shows the first one, with the reason.
pub fn parse_addresses(text: &str, home: &Domain) -> Result<Vec<Mailbox>, String> {
    divide(text, Some(home)).into_iter().map(|address| address.mailbox).collect()
}

/// One address of a list.
#[derive(Debug)]
pub struct ListedAddress<'a> {
    /// Its part of the list, without the commas.
    pub text: &'a str,
    /// The octet of the list at which that part begins.
    pub at: usize,
    /// The mailbox; or, if the part cannot be read, a sentence that shows it, with the reason.
    pub mailbox: Result<Mailbox, String>,
    /// The octets of the address itself in the list, without display name and angle brackets. Empty: it cannot be read.
    pub address: Range<usize>,
    /// The address has an `@` and a host.
    pub qualified: bool,
}

/// The parts of a list.
#[derive(Debug, Default)]
pub struct AddressList<'a> {
    pub addresses: Vec<ListedAddress<'a>>,
    /// The octets of each word of each display name and of each name of a group: atoms, quoted strings, encoded words and
    /// special characters.
    pub phrases: Vec<Vec<Range<usize>>>,
    /// The octets of the comments with their parentheses. A comment inside another is part of it.
    pub comments: Vec<Range<usize>>,
    /// The places of the commas that divide the list.
    pub commas: Vec<usize>,
}

/// Divides a list into its addresses, as [`parse_addresses`] does, but continues after an address that cannot be read. A
/// quoted string, a comment or an angle bracket without its end extends to the end of the list. If `home` is `None`, a local
/// part without a host cannot be read.
pub fn divide<'a>(text: &'a str, home: Option<&Domain>) -> Vec<ListedAddress<'a>> {
    AddressList::parse(text, home).addresses
}

impl<'a> AddressList<'a> {
    /// Reads a list as [`divide`] does.
    pub fn parse(text: &'a str, home: Option<&Domain>) -> AddressList<'a> {
        let mut list = AddressList::default();
        let mut grouped = false;
        let mut element = Element::default();
        let Tokens { found, comments, unfinished } = tokens(text);
        list.comments = comments;
        for (token, range) in found {
            if matches!(token, Token::Special(',' | ';')) && element.stage != ElementStage::Inside {
                list.add(&element, text, home);
                element = Element::default();
                list.commas.extend(token.is(',').then_some(range.start));
                // Outside of a group, some programs write a semicolon for a comma.
                grouped &= token.is(',');
                continue;
            }
            element.extend(range.clone());
            match (element.stage, token) {
                (ElementStage::Before, Token::Special(':')) if grouped || !element.is_phrase() => {
                    element.fail("this cannot be the name of a group");
                }
                (ElementStage::Before, Token::Special(':')) => {
                    list.phrases.push(element.before_ranges);
                    element = Element::default();
                    grouped = true;
                }
                (ElementStage::Before, Token::Special('<')) => element.stage = ElementStage::Inside,
                (ElementStage::Inside, Token::Special('>')) => element.stage = ElementStage::After,
                (ElementStage::Before, token) => {
                    element.before.push(token);
                    element.before_ranges.push(range);
                }
                (ElementStage::Inside, token) => {
                    element.inside.push(token);
                    element.inside_ranges.push(range);
                }
                (ElementStage::After, _) => {
                    element.fail("something follows the >; is a comma missing?");
                }
            }
        }
        if let Some((at, reason)) = unfinished {
            element.error = element.error.or(Some((at..text.len(), reason)));
            element.extend(at..text.trim_end().len());
        }
        list.add(&element, text, home);
        list
    }

    fn add(&mut self, element: &Element<'a>, text: &'a str, home: Option<&Domain>) {
        let Some(address) = element.address(text, home) else { return };
        // Words without angle brackets that are not an address may be a display name.
        if element.stage != ElementStage::Before || address.mailbox.is_err() && element.is_phrase() {
            self.phrases.push(element.before_ranges.clone());
        }
        self.addresses.push(address);
    }
}

/// The tokens between two commas.
#[derive(Debug, Default)]
struct Element<'a> {
    stage: ElementStage,
    /// A display name, or the address itself if no angle brackets follow.
    before: Vec<Token<'a>>,
    before_ranges: Vec<Range<usize>>,
    /// The tokens between the angle brackets, where commas and a colon belong to a source route.
    inside: Vec<Token<'a>>,
    inside_ranges: Vec<Range<usize>>,
    /// Its octets in the list.
    range: Range<usize>,
    /// The octets that cannot be read, and the reason.
    error: Option<(Range<usize>, &'static str)>,
}

/// Whether the tokens are before, inside or after the angle brackets of an element.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum ElementStage {
    #[default]
    Before,
    Inside,
    After,
}

impl Element<'_> {
    fn extend(&mut self, token: Range<usize>) {
        let start = if self.range.is_empty() { token.start } else { self.range.start };
        self.range = start..token.end;
    }

    /// Records why the element cannot be read, unless it has an earlier error.
    fn fail(&mut self, reason: &'static str) {
        self.error.get_or_insert((self.range.clone(), reason));
    }

    fn is_phrase(&self) -> bool {
        !self.before.is_empty() && self.before.iter().all(|token| !token.is('@') && !token.is('>'))
    }

    /// The address of the element; `None`: the element is empty (RFC 5322 section 4.4).
    fn address<'t>(&self, text: &'t str, home: Option<&Domain>) -> Option<ListedAddress<'t>> {
        let mailbox = match (&self.error, self.stage) {
            (Some((range, reason)), _) => Err(unreadable(&text[range.clone()], reason)),
            (None, ElementStage::Before) if self.before.is_empty() => return None,
            (None, _) => self.mailbox(home).map_err(|reason| unreadable(&text[self.range.clone()], reason)),
        };
        let (address, qualified) = match &mailbox {
            Ok(_) => self.address_place(),
            Err(_) => (0..0, false),
        };
        Some(ListedAddress { text: &text[self.range.clone()], at: self.range.start, mailbox, address, qualified })
    }

    /// The octets of an address that can be read, and whether it has a host.
    fn address_place(&self) -> (Range<usize>, bool) {
        let (tokens, ranges) = match self.stage {
            ElementStage::Before => (&self.before[..], &self.before_ranges),
            _ => (without_route(&self.inside).unwrap_or_default(), &self.inside_ranges),
        };
        let ranges = &ranges[ranges.len() - tokens.len()..];
        let place = ranges.first().zip(ranges.last()).map_or(0..0, |(first, last)| first.start..last.end);
        (place, tokens.iter().any(|token| token.is('@')))
    }

    fn mailbox(&self, home: Option<&Domain>) -> Result<Mailbox, &'static str> {
        match self.stage {
            ElementStage::Before => mailbox(&self.before, home),
            ElementStage::Inside => Err("a > is missing"),
            ElementStage::After => without_route(&self.inside).and_then(|inside| mailbox(inside, home)),
        }
    }
}

/// Drops the source route `@one.example,@two.example:` before an address (RFC 5322 section 4.4).
fn without_route<'a, 'b>(inside: &'a [Token<'b>]) -> Result<&'a [Token<'b>], &'static str> {
    if !inside.first().is_some_and(|first| first.is('@')) {
        return Ok(inside);
    }
    let colon = inside.iter().position(|token| token.is(':')).ok_or("a source route ends in a colon")?;
    Ok(&inside[colon + 1..])
}

fn mailbox(tokens: &[Token], home: Option<&Domain>) -> Result<Mailbox, &'static str> {
    const LOCAL: &str = "this is not the name of a mailbox; a display name needs an <address> after it";
    const HOST: &str = "the host is not a valid domain";
    let (local, host) = match tokens.iter().position(|token| token.is('@')) {
        Some(at) => (&tokens[..at], host(&tokens[at + 1..]).ok_or(HOST)?),
        None if matches!(tokens, [Token::Quoted(content)] if content.is_empty()) => return Err(LOCAL),
        None => (tokens, home.ok_or("it has no @ and domain")?.to_string()),
    };
    // RFC 5322 section 4.4: a header may have quoted strings with dots between them. RFC 5321 section 4.1.2: SMTP needs one
    // quoted string.
    let obsolete = local.len() > 1 && local.iter().any(|token| matches!(token, Token::Quoted(_)));
    let local = dotted(local).ok_or(LOCAL)?;
    // The caller has replaced octets that are not UTF-8 by this character.
    if local.contains(char::REPLACEMENT_CHARACTER) || host.contains(char::REPLACEMENT_CHARACTER) {
        return Err("it is not in UTF-8");
    }
    let mailbox = Mailbox::parse_any(&format!("{local}@{host}"));
    let mailbox = if obsolete { mailbox.and_then(|it| Mailbox::parse_any(&it.header_form())) } else { mailbox };
    mailbox.map_err(|error| match error {
        PathError::BadDomain => HOST,
        PathError::NotIdna => "IDNA does not allow the domain (RFC 5891)",
        _ => "the name is too long, or holds control characters",
    })
}

fn host(tokens: &[Token]) -> Option<String> {
    match tokens {
        [Token::Literal(literal)] => Some(format!("[{literal}]")),
        _ if tokens.iter().any(|token| matches!(token, Token::Quoted(_))) => None,
        _ => dotted(tokens),
    }
}

/// The text of words with dots between them (RFC 5322 section 4.4, `obs-local-part`). Mobile networks have assigned addresses
/// with several dots in a row, or with a dot at an end.
fn dotted(tokens: &[Token]) -> Option<String> {
    let (mut content, mut after_word, mut words) = (String::new(), false, 0);
    for token in tokens {
        match token {
            Token::Special('.') => content.push('.'),
            Token::Quoted(text) if !after_word => content.push_str(&format!("\"{text}\"")),
            Token::Atom(text) if !after_word && !text.contains(['(', ')', '[', ']']) => content.push_str(text),
            _ => return None,
        }
        after_word = !token.is('.');
        words += usize::from(after_word);
    }
    (words > 0).then_some(content)
}

/// A token of a structured field. White space and comments are not tokens.
#[derive(PartialEq, Eq, Debug)]
enum Token<'a> {
    /// An atom, or other text without special characters: in a display name any character is accepted.
    Atom(&'a str),
    /// `=?charset?q?text?=` (RFC 2047): part of a display name, never of an address. Some programs write a comma in it, which
    /// does not divide the list.
    Encoded,
    /// The content of a quoted string, with its backslashes.
    Quoted(String),
    /// The content of square brackets.
    Literal(String),
    Special(char),
}

impl Token<'_> {
    fn is(&self, special: char) -> bool {
        *self == Token::Special(special)
    }
}

/// The tokens of a text.
struct Tokens<'a> {
    /// Each token with its octets in the text.
    found: Vec<(Token<'a>, Range<usize>)>,
    comments: Vec<Range<usize>>,
    /// The place of a token without its end, and the reason. It and the text after it are not in `found`.
    unfinished: Option<(usize, &'static str)>,
}

fn tokens(text: &str) -> Tokens<'_> {
    let mut tokens = Tokens { found: Vec::new(), comments: Vec::new(), unfinished: None };
    let mut at = 0;
    while let Some(first) = text[at..].chars().next() {
        let rest = &text[at..];
        let token = match first {
            first if first.is_whitespace() => Ok((None, first.len_utf8())),
            '(' => comment(rest)
                .inspect(|length| tokens.comments.push(at..at + length))
                .map(|length| (None, length))
                .ok_or("a ) is missing"),
            '"' => enclosed(rest, '"')
                .map(|(content, length)| (Some(Token::Quoted(content)), length))
                .ok_or("a \" is missing"),
            '[' => enclosed(rest, ']')
                .map(|(content, length)| (Some(Token::Literal(content.replace(char::is_whitespace, ""))), length))
                .ok_or("a ] is missing"),
            '<' | '>' | '@' | ',' | ';' | ':' | '.' => Ok((Some(Token::Special(first)), 1)),
            _ => match encoded_word(rest) {
                Some(length) => Ok((Some(Token::Encoded), length)),
                None => {
                    let ends = |c: char| c.is_whitespace() || "<>@,;:.\"([".contains(c);
                    let length = rest.find(ends).unwrap_or(rest.len());
                    Ok((Some(Token::Atom(&rest[..length])), length))
                }
            },
        };
        match token {
            Ok((token, length)) => {
                tokens.found.extend(token.map(|token| (token, at..at + length)));
                at += length;
            }
            Err(reason) => {
                tokens.unfinished = Some((at, reason));
                break;
            }
        }
    }
    tokens
}

/// The length of the comment that begins the text, with the comments inside it; `None`: it does not end.
fn comment(text: &str) -> Option<usize> {
    let (mut depth, mut escaped) = (0_usize, false);
    for (at, octet) in text.bytes().enumerate() {
        match octet {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'(' => depth += 1,
            b')' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(at + 1);
        }
    }
    None
}

/// The content of the quoted string or domain literal that begins the text, with its backslashes, and its length; `None`: it
/// does not end. The line ends of folded lines in it are dropped (RFC 5322 section 2.2.3).
fn enclosed(text: &str, end: char) -> Option<(String, usize)> {
    let (mut content, mut escaped) = (String::new(), false);
    for (at, character) in text.char_indices().skip(1) {
        match character {
            '\r' | '\n' => {}
            _ if character == end && !escaped => return Some((content, at + 1)),
            _ => {
                escaped = character == '\\' && !escaped;
                content.push(character);
            }
        }
    }
    None
}

/// The length of the encoded word that begins the text; `None`: there is none. RFC 2047 section 2 permits 75 octets, but
/// programs write longer ones, up to the longest line (RFC 5322 section 2.1.1).
fn encoded_word(text: &str) -> Option<usize> {
    const LIMIT: usize = 998;
    let length = text.bytes().take(LIMIT).take_while(u8::is_ascii_graphic).count();
    let mut parts = text[..length].strip_prefix("=?")?.splitn(3, '?');
    let (charset, encoding, rest) = (parts.next()?, parts.next()?, parts.next()?);
    let (content, after) = rest.split_once('?')?;
    let ends = encoding.len() == 1 && after.starts_with('=');
    ends.then_some("=?".len() + charset.len() + "?q?".len() + content.len() + "?=".len())
}

/// An error about a part of the text, on one line.
fn unreadable(part: &str, reason: &str) -> String {
    let words: Vec<&str> = part.split_whitespace().collect();
    let mut shown = words.join(" ").replace(char::is_control, "?");
    if let Some((cut, _)) = shown.char_indices().nth(ERROR_EXCERPT) {
        shown.truncate(cut);
        shown.push('…');
    }
    format!("cannot read {shown}: {reason}")
}

#[cfg(test)]
mod tests;
