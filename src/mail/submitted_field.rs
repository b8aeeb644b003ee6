//! A header field of a message that is submitted here, as it leaves (RFC 6409 section 8).
//!
//! ```text
//! From: root (Überwachung)        From: root@home.example (=?UTF-8?B?w5xiZXJ3YWNodW5n?=)
//! ```
//!
//! Addresses without a domain get ours, because elsewhere they would mean another mailbox. Text beyond ASCII is encoded by
//! RFC 2047, but not in an address, which then needs SMTPUTF8, and not in fields in which section 5 of that RFC permits no
//! encoded word.

use std::borrow::Cow;
use std::ops::Range;

use super::address::Domain;
use super::address_list::AddressList;
use super::encoded_word::{charset, encode, encode_words, fold, is_encoded_word, is_space, unquote};

/// Fields with a list of addresses. The second line is not in RFC 5322, but mail servers read and complete these too.
const ADDRESS_FIELDS: [&str; 18] = [
    "From",
    "Sender",
    "Reply-To",
    "To",
    "Cc",
    "Bcc",
    "Resent-From",
    "Resent-Sender",
    "Resent-Reply-To",
    "Resent-To",
    "Resent-Cc",
    "Resent-Bcc", //
    "Apparently-To",
    "Disposition-Notification-To",
    "Errors-To",
    "Mail-Followup-To",
    "Mail-Reply-To",
    "Return-Receipt-To",
];

/// Fields without free text, in which an encoded word means nothing (RFC 2047 section 5).
const STRUCTURED_FIELDS: [&str; 13] = [
    "Authentication-Results",
    "Auto-Submitted",
    "Date",
    "Delivered-To",
    "DKIM-Signature",
    "Envelope-To",
    "In-Reply-To",
    "Message-ID",
    "MIME-Version",
    "Received",
    "Received-SPF",
    "References",
    "X-Original-To",
];

/// Beginnings of the names of more such fields. `Content-Description` is text.
const STRUCTURED_PREFIXES: [&str; 4] = ["ARC-", "Content-", "List-", "Resent-"];

/// Octets of a line without its line end (RFC 5322 section 2.1.1).
const LONGEST_LINE: usize = 998;

/// Octets of a line that is folded, if its addresses permit (RFC 5322 section 2.1.1).
const FOLDED_LINE: usize = 78;

/// The field `raw` with its name and its line end, complete. `home`: our domain.
pub fn complete<'a>(name: &[u8], raw: &'a [u8], home: &Domain, line_end: &str) -> Cow<'a, [u8]> {
    let value = value_place(raw);
    if is_address_field(name) {
        let edits = edits(&raw[value..], home);
        let mut field = Cow::Borrowed(raw);
        if !edits.is_empty() {
            field = Cow::Owned([&raw[..value], &apply(&raw[value..], edits)].concat());
            if !raw.is_ascii() {
                field = Cow::Owned(fold(&field, line_end));
            }
        }
        if field.split(|octet| *octet == b'\n').any(is_long) {
            field = Cow::Owned(fold_at_commas(&field, line_end));
        }
        field
    } else if !raw.is_ascii() && is_text_field(name) {
        let text = &raw[value..];
        Cow::Owned(fold(&[&raw[..value], &encode_words(text, charset(text), false)].concat(), line_end))
    } else {
        Cow::Borrowed(raw)
    }
}

/// Whether the field has an address beyond ASCII, which only a server with SMTPUTF8 can accept (RFC 6531 section 3.2).
pub fn needs_utf8(name: &[u8], raw: &[u8]) -> bool {
    let value = &raw[value_place(raw)..];
    !value.is_ascii() && is_address_field(name) && {
        let text = masked(value);
        let list = AddressList::parse(&text, None);
        // What is not in UTF-8 is no address that SMTPUTF8 could carry.
        let is_utf8 = |address: &[u8]| !address.is_ascii() && std::str::from_utf8(address).is_ok();
        list.addresses.iter().any(|address| is_utf8(&value[address.address.clone()]))
    }
}

fn is_address_field(name: &[u8]) -> bool {
    ADDRESS_FIELDS.iter().any(|field| name.eq_ignore_ascii_case(field.as_bytes()))
}

fn is_text_field(name: &[u8]) -> bool {
    let is = |field: &str| name.eq_ignore_ascii_case(field.as_bytes());
    let begins = |prefix: &str| {
        let begin = name.get(..prefix.len());
        begin.is_some_and(|begin| begin.eq_ignore_ascii_case(prefix.as_bytes()))
    };
    let structured = STRUCTURED_FIELDS.into_iter().any(is) || STRUCTURED_PREFIXES.into_iter().any(begins);
    !structured || is("Content-Description")
}

/// Where the value of a field begins: after the colon.
fn value_place(raw: &[u8]) -> usize {
    raw.iter().position(|octet| *octet == b':').map_or(raw.len(), |at| at + 1)
}

/// The value with a letter for each octet above 127, so that a list in any charset can be read, and places in it are places
/// in the value.
fn masked(value: &[u8]) -> String {
    value.iter().map(|octet| if octet.is_ascii() { char::from(*octet) } else { 'x' }).collect()
}

/// Text that takes the place of a part of a value.
type Edit = (Range<usize>, Vec<u8>);

/// What changes in a list of addresses.
fn edits(value: &[u8], home: &Domain) -> Vec<Edit> {
    let text = masked(value);
    let list = AddressList::parse(&text, Some(home));
    let mut edits = Vec::new();
    for address in &list.addresses {
        let place = &address.address;
        // RFC 6409 section 8.1: a local part alone means our domain only as long as it is here.
        if !place.is_empty() && !address.qualified && std::str::from_utf8(&value[place.clone()]).is_ok() {
            edits.push((place.end..place.end, format!("@{home}").into_bytes()));
        }
    }
    for words in &list.phrases {
        edit_phrase(value, words, &mut edits);
    }
    for comment in list.comments.iter().filter(|comment| !value[(*comment).clone()].is_ascii()) {
        edits.push((comment.clone(), encode_comment(&value[comment.clone()])));
    }
    edits.sort_by_key(|(place, _)| place.start);
    edits
}

fn apply(value: &[u8], edits: Vec<Edit>) -> Vec<u8> {
    let (mut out, mut at) = (Vec::new(), 0);
    for (place, text) in edits {
        out.extend_from_slice(&value[at..place.start]);
        out.extend_from_slice(&text);
        at = place.end;
    }
    out.extend_from_slice(&value[at..]);
    out
}

/// Encodes the words of a display name, or of the name of a group, between its comments and its own encoded words.
fn edit_phrase(value: &[u8], words: &[Range<usize>], edits: &mut Vec<Edit>) {
    let is_encoded = |word: &Range<usize>| is_encoded_word(&value[word.clone()]);
    let apart = |before: &Range<usize>, after: &Range<usize>| {
        is_encoded(before) || is_encoded(after) || !value[before.end..after.start].iter().all(is_space)
    };
    let mut done = 0_usize;
    for run in words.chunk_by(|before, after| !apart(before, after)) {
        let before = done.checked_sub(1).map(|last| &words[last]);
        done += run.len();
        let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
        let place = first.start..last.end;
        if value[place.clone()].is_ascii() {
            continue;
        }
        let mut text = Vec::new();
        // White space between two encoded words is not shown (RFC 2047 section 6.2).
        text.extend(before.is_some_and(is_encoded).then_some(b' '));
        let mut end = first.start;
        for word in run {
            text.extend((word.start > end).then_some(b' '));
            let content = &value[word.clone()];
            match content.strip_prefix(b"\"").and_then(|content| content.strip_suffix(b"\"")) {
                Some(content) => unquote(content, &mut text),
                None => text.extend_from_slice(content),
            }
            end = word.end;
        }
        text.extend(words.get(done).is_some_and(is_encoded).then_some(b' '));
        // RFC 2047 section 5: white space separates an encoded word from what is beside it.
        let pad = |octet: Option<&u8>| if octet.is_none_or(is_space) { "" } else { " " };
        let before = pad(value[..place.start].last());
        let after = pad(value.get(place.end));
        edits.push((place, format!("{before}{}{after}", encode(&text, charset(&text))).into_bytes()));
    }
}

/// A comment with its parentheses and those inside it, in which the words beyond ASCII are encoded.
fn encode_comment(comment: &[u8]) -> Vec<u8> {
    let charset = charset(comment);
    let (mut out, mut begin, mut quoted) = (Vec::new(), 0, false);
    for (at, octet) in comment.iter().enumerate() {
        match octet {
            _ if quoted => quoted = false,
            b'\\' => quoted = true,
            b'(' | b')' => {
                out.extend(encode_words(&comment[begin..at], charset, true));
                out.push(*octet);
                begin = at + 1;
            }
            _ => {}
        }
    }
    out
}

fn is_long(line: &[u8]) -> bool {
    line.strip_suffix(b"\r").unwrap_or(line).len() > LONGEST_LINE
}

/// Folds the long lines of a list of addresses after commas between addresses.
fn fold_at_commas(field: &[u8], line_end: &str) -> Vec<u8> {
    let value = value_place(field);
    let text = masked(&field[value..]);
    let mut commas = AddressList::parse(&text, None).commas.into_iter().map(|comma| value + comma).peekable();
    let (mut out, mut start) = (Vec::new(), 0);
    for line in field.split_inclusive(|octet| *octet == b'\n') {
        let end = start + line.len();
        let (mut at, mut length) = (start, 0);
        let long = is_long(line.strip_suffix(b"\n").unwrap_or(line));
        let mut ends = Vec::new();
        while let Some(comma) = commas.next_if(|comma| *comma < end) {
            ends.extend(long.then_some(comma + 1));
        }
        for next in ends.into_iter().chain([end]) {
            let piece = &field[at..next];
            if length > 0 && length + piece.trim_ascii_end().len() > FOLDED_LINE && !piece.trim_ascii().is_empty() {
                out.extend_from_slice(line_end.as_bytes());
                let space = (!matches!(piece.first(), Some(b' ' | b'\t'))).then_some(b' ');
                length = usize::from(space.is_some());
                out.extend(space);
            }
            out.extend_from_slice(piece);
            length += piece.len();
            at = next;
        }
        start = end;
    }
    out
}

#[cfg(test)]
mod tests;
