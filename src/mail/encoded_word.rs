//! Encoded words: text beyond ASCII in a header that is ASCII (RFC 2047).
//!
//! ```text
//! Subject: Re: Prüfung der Öfen, Teil 2
//! Subject: Re: =?UTF-8?B?UHLDvGZ1bmc=?= der =?UTF-8?B?w5ZmZW4s?= Teil 2
//! ```

use data_encoding::BASE64;

/// Octets of an encoded word. RFC 2047 section 2 permits 75; with fewer, most fit on the line with the name of the field.
const WORD_LIMIT: usize = 64;

/// Octets of a line with an encoded word (RFC 2047 section 2).
pub const ENCODED_LINE_LIMIT: usize = 76;

/// The charset of text in UTF-8.
pub const UTF_8: &str = "UTF-8";

/// The charset of text: UTF-8 if the text is valid UTF-8, otherwise `unknown-8bit` (RFC 1428 section 3), from which every
/// octet can be decoded again: a program that does not know the charset must not invent one.
pub fn charset(text: &[u8]) -> &'static str {
    if std::str::from_utf8(text).is_ok() { UTF_8 } else { "unknown-8bit" }
}

/// The text as encoded words. The spaces between them are not part of the text (RFC 2047 section 6.2).
pub fn encode(text: &[u8], charset: &str) -> String {
    let limit = (WORD_LIMIT - "=??B??=".len() - charset.len()) / 4 * 3;
    let (mut words, mut rest) = (Vec::new(), text);
    while !rest.is_empty() {
        let mut length = rest.len().min(limit);
        // RFC 2047 section 5: a character must not be divided between two encoded words.
        while charset == UTF_8 && length > 1 && rest.get(length).is_some_and(|octet| octet & 0xC0 == 0x80) {
            length -= 1;
        }
        let (word, after) = rest.split_at(length);
        words.push(format!("=?{charset}?B?{}?=", BASE64.encode(word)));
        rest = after;
    }
    words.join(" ")
}

/// Encodes the words with octets above 127 in the text of an unstructured field or a comment. Words of ASCII and the white
/// space between them stay unchanged. `comment`: the text is a comment, in which `\` quotes the next octet.
pub fn encode_words(text: &[u8], charset: &str, comment: bool) -> Vec<u8> {
    let (mut out, mut encoded, mut rest) = (Vec::new(), Vec::new(), text);
    let mut after_encoded_word = false;
    while !rest.is_empty() {
        let (space, after) = rest.split_at(rest.iter().take_while(|octet| is_space(octet)).count());
        let (word, after) = after.split_at(after.iter().take_while(|octet| !is_space(octet)).count());
        rest = after;
        if !word.is_ascii() {
            match encoded.is_empty() {
                true => {
                    out.extend_from_slice(space);
                    // White space between two encoded words is not displayed, so it must be in one of them.
                    encoded.extend((after_encoded_word && !space.is_empty()).then_some(b' '));
                }
                false => encoded.extend(space.iter().filter(|octet| !matches!(octet, b'\r' | b'\n'))),
            }
            if comment {
                unquote(word, &mut encoded)
            } else {
                encoded.extend_from_slice(word)
            }
            continue;
        }
        after_encoded_word = is_encoded_word(word);
        if !encoded.is_empty() {
            encoded.extend(after_encoded_word.then_some(b' '));
            out.extend_from_slice(encode(&encoded, charset).as_bytes());
            encoded.clear();
        }
        out.extend_from_slice(space);
        out.extend_from_slice(word);
    }
    out.extend_from_slice(encode(&encoded, charset).as_bytes());
    out
}

/// Whether a word is an encoded word.
pub fn is_encoded_word(word: &[u8]) -> bool {
    word.len() > "=??q??=".len() && word.starts_with(b"=?") && word.ends_with(b"?=")
}

/// Appends text without the `\` of its quoted pairs and without line ends (RFC 5322 section 3.2.1).
pub fn unquote(text: &[u8], out: &mut Vec<u8>) {
    let mut quoted = false;
    for octet in text {
        quoted = *octet == b'\\' && !quoted;
        if !quoted && !matches!(octet, b'\r' | b'\n') {
            out.push(*octet);
        }
    }
}

/// Folds lines of more than [`ENCODED_LINE_LIMIT`] octets before white space (RFC 5322 section 2.2.3). A line without white
/// space stays long.
pub fn fold(field: &[u8], line_end: &str) -> Vec<u8> {
    // RFC 5322 section 4.5.8: white space may precede the colon. A name without its colon on the line would not be a field.
    let name = field.iter().position(|octet| *octet == b':').map_or(0, |colon| colon + 1);
    let (mut out, mut length) = (Vec::with_capacity(field.len() + 16), name);
    out.extend_from_slice(&field[..name]);
    for line in field[name..].split_inclusive(|octet| *octet == b'\n') {
        let mut rest = line;
        while !rest.is_empty() {
            let space = rest.iter().take_while(|octet| is_space(octet)).count();
            let word = rest[space..].iter().take_while(|octet| !is_space(octet)).count();
            let (piece, after) = rest.split_at(space + word);
            // A line of white space would end the header for some programs, a line that begins with a CR for all.
            let may_fold = word > 0 && matches!(rest[0], b' ' | b'\t');
            if length > 0 && may_fold && length + piece.len() > ENCODED_LINE_LIMIT {
                out.extend_from_slice(line_end.as_bytes());
                length = 0;
            }
            out.extend_from_slice(piece);
            length += piece.len();
            rest = after;
        }
        length = 0;
    }
    out
}

/// Whether an octet is white space of a header, a line end included.
pub fn is_space(octet: &u8) -> bool {
    matches!(octet, b' ' | b'\t' | b'\r' | b'\n')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_beyond_ascii_are_encoded_and_the_others_stay() {
        let check = |text: &[u8], expected: &str| {
            let seen = encode_words(text, charset(text), false);
            assert_eq!(seen.escape_ascii().to_string(), expected.as_bytes().escape_ascii().to_string());
        };
        check(b"", "");
        check(b" \t plain = ?text \n", " \t plain = ?text \n");
        check(
            " Re: Prüfung  der Öfen, Teil 2\n".as_bytes(),
            " Re: =?UTF-8?B?UHLDvGZ1bmc=?=  der =?UTF-8?B?w5ZmZW4s?= Teil 2\n",
        );
        // The white space between two of these words is part of the text; the line end in it is not.
        check("ü\n  ö".as_bytes(), "=?UTF-8?B?w7wgIMO2?=");
        check(b"Pr\xfcfung", "=?unknown-8bit?B?UHL8ZnVuZw==?=");
        // With encoded words of the sender before and after.
        check(" =?utf-8?q?a?= ü =?utf-8?q?b?=".as_bytes(), " =?utf-8?q?a?= =?UTF-8?B?IMO8IA==?= =?utf-8?q?b?=");
    }

    #[test]
    fn no_character_is_divided_and_no_word_is_long() {
        for pad in 0..4 {
            let text = format!("{}{}", "x".repeat(pad), "a€ü".repeat(40));
            let mut decoded = String::new();
            for word in encode(text.as_bytes(), UTF_8).split(' ') {
                assert!(word.len() <= WORD_LIMIT, "{word}");
                let base64 = word.strip_prefix("=?UTF-8?B?").and_then(|word| word.strip_suffix("?=")).unwrap();
                decoded += &String::from_utf8(BASE64.decode(base64.as_bytes()).unwrap()).unwrap();
            }
            assert_eq!(decoded, text);
        }
    }

    #[test]
    fn lines_are_folded_before_white_space() {
        let (word, long) = ("x".repeat(30), "y".repeat(90));
        let seen = fold(format!("A: {word} {word}  {word} \n {long} {word}\n").as_bytes(), "\n");
        assert_eq!(String::from_utf8(seen).unwrap(), format!("A: {word} {word}\n  {word} \n {long}\n {word}\n"));
        // RFC 5322 section 4.5.8: white space before the colon. A line with the name only would end the header.
        let named = format!("Subject :{word}{word}{word} {word}\n");
        let expected = format!("Subject :{word}{word}{word}\n {word}\n");
        assert_eq!(String::from_utf8(fold(named.as_bytes(), "\n")).unwrap(), expected);
        // A line that begins with a CR would end the header.
        let bare = format!("A: {word} {word}\r {word}\n");
        assert_eq!(fold(bare.as_bytes(), "\n"), bare.as_bytes());
    }
}
