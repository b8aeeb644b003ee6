//! Completes a header field of a submitted message (RFC 6409 section 8).
//!
//! ```text
//! From: root (Überwachung)        From: root@home.example (=?UTF-8?B?w5xiZXJ3YWNodW5n?=)
//! ```
//!
//! Addresses without a domain get ours, because on another host they would mean another mailbox. Text that is not ASCII is
//! encoded by RFC 2047, but not in an address, which needs SMTPUTF8 instead, and not in fields in which section 5 of that RFC
//! permits no encoded word.

use std::borrow::Cow;
use std::ops::Range;

use super::address::Domain;
use super::address_list::AddressList;
use super::encoded_word::{charset, encode, encode_words, fold, is_encoded_word, is_space, unquote};

use crate::sorting::sort_by;

/// Fields with a list of addresses. Those after `Resent-Bcc` are not in RFC 5322, but mail servers complete them, too.
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

/// Fields without free text, in which an encoded word has no meaning (RFC 2047 section 5).
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

/// Beginnings of the names of more such fields; except `Content-Description`, which is text.
const STRUCTURED_PREFIXES: [&str; 4] = ["ARC-", "Content-", "List-", "Resent-"];

/// Octets of a line without its line end (RFC 5322 section 2.1.1).
const LONGEST_LINE: usize = 998;

/// Octets of a folded line, if its addresses are not longer (RFC 5322 section 2.1.1).
const FOLDED_LINE: usize = 78;

/// Completes the field `raw`, which has its name and its line end. `home`: the domain for addresses without one.
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

/// Whether the field has an address that is not ASCII, which only a server with SMTPUTF8 can accept (RFC 6531 section 3.2).
pub fn needs_utf8(name: &[u8], raw: &[u8]) -> bool {
    let value = &raw[value_place(raw)..];
    !value.is_ascii() && is_address_field(name) && {
        let text = masked(value);
        let list = AddressList::parse(&text, None);
        // SMTPUTF8 is for addresses in UTF-8 only.
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

/// The place at which the value of a field begins: after the colon.
fn value_place(raw: &[u8]) -> usize {
    raw.iter().position(|octet| *octet == b':').map_or(raw.len(), |at| at + 1)
}

/// The value with `x` for each octet above 127, so that a list in any charset can be parsed, and places in it are places in
/// the value.
fn masked(value: &[u8]) -> String {
    value.iter().map(|octet| if octet.is_ascii() { char::from(*octet) } else { 'x' }).collect()
}

/// Octets of a value, and the text that replaces them.
type Edit = (Range<usize>, Vec<u8>);

/// The changes to a list of addresses.
fn edits(value: &[u8], home: &Domain) -> Vec<Edit> {
    let text = masked(value);
    let list = AddressList::parse(&text, Some(home));
    let mut edits = Vec::new();
    for address in &list.addresses {
        let place = &address.address;
        // RFC 6409 section 8.1: a local part alone has our domain only on this host.
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
    sort_by(&mut edits, |(one, _), (other, _)| one.start.cmp(&other.start));
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

/// Encodes the words of a display name, or of the name of a group, that are not comments or encoded words.
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
        // RFC 2047 section 6.2: white space between two encoded words is not displayed, so it must be in one of them.
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
        // RFC 2047 section 5: white space must separate an encoded word from other text.
        let pad = |octet: Option<&u8>| if octet.is_none_or(is_space) { "" } else { " " };
        let before = pad(value[..place.start].last());
        let after = pad(value.get(place.end));
        edits.push((place, format!("{before}{}{after}", encode(&text, charset(&text))).into_bytes()));
    }
}

/// Encodes the words of a comment that are not ASCII, also in the comments inside it.
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

/// Folds lines of more than [`LONGEST_LINE`] octets after the commas between addresses.
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
