//! Fields as programs submit them.

use data_encoding::BASE64;
use proptest::prelude::*;

use super::*;

fn home() -> Domain {
    Domain::parse("home.example").unwrap()
}

fn completed(field: &[u8]) -> Vec<u8> {
    let name = field.iter().position(|octet| *octet == b':').unwrap();
    complete(&field[..name], field, &home(), "\n").into_owned()
}

fn check(field: impl AsRef<[u8]>, expected: &str) {
    let seen = completed(field.as_ref());
    assert_eq!(seen.escape_ascii().to_string(), expected.as_bytes().escape_ascii().to_string());
}

fn unchanged(field: &str) {
    check(field, field);
}

#[test]
fn addresses_without_a_domain_get_ours() {
    check("From: root (Cron Daemon)\n", "From: root@home.example (Cron Daemon)\n");
    check("From: root\n", "From: root@home.example\n");
    check("From: \"(Cron Daemon)\" <root>\n", "From: \"(Cron Daemon)\" <root@home.example>\n");
    check(
        "to:ops@x.example, root,\n\tJoe <joe> , eva\n",
        "to:ops@x.example, root@home.example,\n\tJoe <joe@home.example> , eva@home.example\n",
    );
    check("Resent-To: a: joe, eva@x;\n", "Resent-To: a: joe@home.example, eva@x;\n");
    check("Sender: \"joe doe\"\n", "Sender: \"joe doe\"@home.example\n");
    check("Reply-To: <@a.example:joe>\n", "Reply-To: <@a.example:joe@home.example>\n");
    check("Cc: joe . doe (x)\n", "Cc: joe . doe@home.example (x)\n");
    for field in [
        "To: ops@x.example\n",
        "To: undisclosed-recipients:;\n",
        "From: <>\n",
        "From:\n",
        "To: ops@[192.0.2.1]\n",
        "From: Cron Daemon\n",
        "From: root@\n",
        "To: \"a, b\" <c@x>\n",
        "Cc: (root)\n",
        "To: Joe <joe\n",
        // Fields that are not lists of addresses.
        "Subject: root\n",
        "X-From: root\n",
        "In-Reply-To: root\n",
        "Received: root\n",
    ] {
        unchanged(field);
    }
}

#[test]
fn text_beyond_ascii_is_encoded_where_rfc_2047_permits() {
    check("Subject: Prüfung: Platte voll\n", "Subject: =?UTF-8?B?UHLDvGZ1bmc6?= Platte voll\n");
    check(b"X-Note: a \xfc\n", "X-Note: a =?unknown-8bit?B?/A==?=\n");
    check("Content-Description: ü\n", "Content-Description: =?UTF-8?B?w7w=?=\n");
    check("From: Jürgen Öz <j@x>\n", "From: =?UTF-8?B?SsO8cmdlbiDDlno=?= <j@x>\n");
    check("From: \"Öz, \\\"J.\\\"\"<j@x>\n", "From: =?UTF-8?B?w5Z6LCAiSi4i?= <j@x>\n");
    check("From: root (Über (x \\(ü))\n", "From: root@home.example (=?UTF-8?B?w5xiZXI=?= (x =?UTF-8?B?KMO8?=))\n");
    check("To: Fründe: a@x, Ü <b>;\n", "To: =?UTF-8?B?RnLDvG5kZQ==?= : a@x, =?UTF-8?B?w5w=?= <b@home.example>;\n");
    check("From: =?utf-8?q?a?= ü (c) <j@x>\n", "From: =?utf-8?q?a?= =?UTF-8?B?IMO8?= (c) <j@x>\n");
    check("From: Jürgen Öz\n", "From: =?UTF-8?B?SsO8cmdlbiDDlno=?=\n");
    check(b"From: J\xfcrgen <j@x>\n", "From: =?unknown-8bit?B?SvxyZ2Vu?= <j@x>\n");
    // An address stays, whatever its charset.
    unchanged("From: jürgen@x\n");
    check("From: Jürgen <jürgen@x>\n", "From: =?UTF-8?B?SsO8cmdlbg==?= <jürgen@x>\n");
    for field in [&b"From: j\xfcrgen\n"[..], b"Content-Type: text/plain; name=\"\xfc\"\n", b"List-Help: \xfc\n"] {
        assert_eq!(completed(field), field);
    }
    // Each name has its own charset, because a list may have names from many sources.
    check(
        b"To: \xc3\x9c <a@x>, \xdc <b@x> (\xc3\x9c)\n",
        "To: =?UTF-8?B?w5w=?= <a@x>, =?unknown-8bit?B?3A==?= <b@x> (=?UTF-8?B?w5w=?=)\n",
    );
}

#[test]
fn only_an_address_in_utf_8_needs_smtputf8() {
    let needs = |field: &[u8]| needs_utf8(&field[..field.iter().position(|octet| *octet == b':').unwrap()], field);
    for field in ["From: jürgen@x\n", "To: a@x, Joe <j@bücher.example>\n", "Resent-Cc: a: \"ü\"@x;\n"] {
        assert!(needs(field.as_bytes()), "{field}");
    }
    for field in
        [&b"From: j\xfcrgen@x\n"[..], "Subject: ü@x\n".as_bytes(), "To: Jürgen (ü) <j@x>\n".as_bytes(), b"To: a@x\n"]
    {
        assert!(!needs(field), "{}", field.escape_ascii());
    }
}

#[test]
fn long_lines_of_addresses_are_folded_at_their_commas() {
    let many: Vec<_> = (0..300).map(|number| format!("\"a, {number}\" <list-member-{number}@example.net>")).collect();
    for separator in [", ", ",", " ,"] {
        let field = format!("To: {}\n", many.join(separator));
        let seen = String::from_utf8(completed(field.as_bytes())).unwrap();
        assert!(seen.lines().all(|line| line.len() <= FOLDED_LINE), "{seen}");
        assert_eq!(seen.replace(['\n', ' '], ""), field.trim_end().replace(' ', ""));
        assert_eq!(completed(seen.as_bytes()), seen.as_bytes());
    }
    // A line within the limit stays, and so does one that has no comma.
    let short = format!("To: {}\n", many[..22].join(", "));
    assert!(short.len() > 800);
    unchanged(&short);
    unchanged(&format!("To: {}@x\n", "a".repeat(200) + &"(c)".repeat(400)));
    unchanged(&format!("Subject: {}\n", "a, ".repeat(500)));
}

#[test]
fn encoded_lines_are_short() {
    let name = "Jürgen ".repeat(40);
    for field in [format!("Subject: {name}\n"), format!("Disposition-Notification-To: \"{name}\" <j@x>, Ü <k@x>\n")] {
        let seen = String::from_utf8(completed(field.as_bytes())).unwrap();
        assert!(seen.is_ascii() && seen.lines().all(|line| line.len() <= 76), "{seen}");
    }
}

/// The text of a field without its folds, with its encoded words decoded.
fn decoded(field: &[u8]) -> Vec<u8> {
    let (mut out, mut after_encoded) = (Vec::new(), false);
    let mut rest: Vec<u8> = field.iter().copied().filter(|octet| !matches!(octet, b'\r' | b'\n')).collect();
    while !rest.is_empty() {
        let space = rest.iter().take_while(|octet| is_space(octet)).count();
        let word = rest[space..].iter().take_while(|octet| !is_space(octet)).count();
        let piece: Vec<u8> = rest.drain(..space + word).collect();
        let (space, word) = piece.split_at(space);
        let base64 = word.strip_prefix(b"=?UTF-8?B?").or_else(|| word.strip_prefix(b"=?unknown-8bit?B?"));
        let base64 = base64.and_then(|word| word.strip_suffix(b"?="));
        if !(after_encoded && base64.is_some()) {
            out.extend_from_slice(space);
        }
        match base64 {
            Some(base64) => out.extend(BASE64.decode(base64).unwrap()),
            None => out.extend_from_slice(word),
        }
        after_encoded = base64.is_some();
    }
    out
}

proptest! {
    #[test]
    fn no_octets_make_it_panic(value: Vec<u8>, name in "From|To|Subject|X") {
        let field = [name.as_bytes(), b":", &value].concat();
        let _ = (completed(&field), needs_utf8(name.as_bytes(), &field));
    }

    #[test]
    fn no_punctuation_makes_it_panic(value in "[aü@.,:;<>()\"\\\\\\[\\] =?\\n]{0,60}") {
        let field = format!("To: {value}\n");
        let seen = completed(field.as_bytes());
        prop_assert!(!field.is_ascii() || field.len() > 998 || seen.len() >= field.len());
        // A completed field is not changed again.
        if field.is_ascii() {
            prop_assert_eq!(completed(&seen), seen);
        }
    }

    #[test]
    fn the_encoded_text_is_the_text(value in "([aü€ö,.=\\\\]{1,12}[ \t]{1,2}(\n )?){0,20}") {
        let field = format!("Subject: x {value}y\n");
        let seen = completed(field.as_bytes());
        prop_assert!(seen.is_ascii());
        prop_assert_eq!(
            String::from_utf8(decoded(&seen)).unwrap(),
            field.replace('\n', "")
        );
    }

    #[test]
    fn qualified_addresses_stay_octet_for_octet(
        value in "([a-z]{1,9}@x\\.example|\"[a-z, ]{0,9}\" <a@x>|[A-Z][a-z]{0,9} \\([a-z]{0,5}\\) <b@y>)(, ?([a-z]{1,9}@x|c@z \\(d\\))){0,12}",
    ) {
        let field = format!("Cc: {value}\n");
        prop_assert_eq!(completed(field.as_bytes()), field.as_bytes());
    }

    /// A completed field is one field with the same addresses and without blank lines.
    #[test]
    fn no_address_is_lost_or_added(
        value in "([aüb@.,:;<>()\"\\\\\\[\\] =?]|\n |\n\t|\"ü, b\" <a@b>|=\\?utf-8\\?q\\?a,b\\?=|Ü ö|joe|\\(ü\\)|<joe>|[a-z]{40} [ü]{40}){0,30}x",
        long: bool,
    ) {
        let pad = if long { "Eva <eva@example.org>, ".repeat(50) } else { String::new() };
        let field = format!("To: {pad}{value}\n");
        let seen = completed(field.as_bytes());
        let seen = String::from_utf8(seen).unwrap();
        // `None`: one of them cannot be read.
        let addresses = |field: &str| -> Option<Vec<String>> {
            let listed = AddressList::parse(&field["To:".len()..], Some(&home())).addresses;
            listed.into_iter().map(|address| Some(address.mailbox.ok()?.to_string())).collect()
        };
        if let Some(expected) = addresses(&field) {
            prop_assert_eq!(addresses(&seen), Some(expected), "{:?} -> {:?}", field, seen);
        }
        let blank = |line: &str| line.trim().is_empty();
        let lines: Vec<&str> = seen.trim_end_matches('\n').split('\n').collect();
        prop_assert!(lines[1..].iter().all(|line| line.starts_with([' ', '\t'])), "{:?}", seen);
        prop_assert!(lines.iter().filter(|line| blank(line)).count() <= field.trim_end_matches('\n').split('\n').filter(|line| blank(line)).count(), "{:?} -> {:?}", field, seen);
    }
}
