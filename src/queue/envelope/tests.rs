//! Envelopes that this program writes, and those of other delivery agents.

use super::*;
use crate::mail::address::COMPARED;

fn domain() -> Option<Domain> {
    Domain::parse("example.org")
}

fn options(domain: &Option<Domain>) -> ParseOptions<'_> {
    ParseOptions { domain: domain.as_ref(), prefix: None, id: "id", arrived: Timestamp::from_seconds(0) }
}

fn parsed(text: &str) -> ParsedEnvelope {
    match parse(text.as_bytes(), true, options(&domain())) {
        Parsed::Envelope(parsed) => *parsed,
        other => panic!("{text}: {other:?}"),
    }
}

fn recipients(text: &str) -> Vec<String> {
    parsed(text).recipients().iter().map(|recipient| recipient.mailbox.to_string()).collect()
}

/// Rules: MD-15.
#[test]
fn an_envelope_is_read_as_it_was_written() {
    let parameters = b"NOTIFY=SUCCESS,DELAY ORCPT=rfc822;X+40y";
    let envelope = Envelope {
        from: reverse_path(b"<a@b.example>").unwrap().0,
        recipients: vec![
            with_parameters(Mailbox::parse("x@example.org").unwrap(), parameters),
            Recipient::plain(Mailbox::parse("\"y z\"@example.org").unwrap()),
        ],
        body: Body::EightBit,
        utf8: true,
        ret: Some(Return::Header),
        envelope_id: Some("QQ;314159".to_owned()),
    };
    let envelope = QueuedEnvelope { id: "abc".to_owned(), arrived: Timestamp::from_seconds(1_767_323_045), envelope };
    let text = envelope.to_header("X-ODMR-Refused: <x@example.org> 550\n") + "Received: x\n\nbody\n";
    let parsed = parsed(&text);
    assert_eq!(parsed.envelope, envelope);
    assert!(parsed.ours && text[parsed.octets..].starts_with("Received: x") && parsed.lines == 6);
}

#[test]
fn files_of_other_agents() {
    let postfix = "Return-Path: <a@b.example>\nX-Original-To: list@example.org\nDelivered-To: eva@example.org\n\
                   Received: by mx\n\nDelivered-To: mallory@example.org\n";
    assert_eq!(recipients(postfix), ["eva@example.org"]);
    assert!(!parsed(postfix).ours);
    let exim = "Return-path: <>\nEnvelope-to: eva@example.org, bob@example.org\nDelivery-date: now\n\tand then\n\
                Received: by mx\n";
    assert_eq!(recipients(exim), ["eva@example.org", "bob@example.org"]);
    assert_eq!(parsed(exim).envelope.envelope.from, ReversePath::Null);
    assert_eq!(recipients("Delivered-To: <eva@EXAMPLE.org>\r\nSubject: crlf\r\n"), ["eva@example.org"]);
    let other_domain = "Delivered-To: eva@example.net\nX-Original-To: eva@example.org\n\n";
    assert_eq!(recipients(other_domain), ["eva@example.org"]);
}

#[test]
fn a_file_without_a_recipient_in_the_domain_is_not_a_message() {
    for text in ["", "\n", "Subject: hello\n\n", "Return-Path: <a@b.c>\n"] {
        let parsed = parse(text.as_bytes(), true, options(&domain()));
        assert!(matches!(parsed, Parsed::NoRecipients), "{text:?}");
    }
    let unfinished = parse(b"Delivered-To: eva@exam", false, options(&domain()));
    assert!(matches!(unfinished, Parsed::More));
}

/// The recipients that can be read, those that cannot, and the reverse path or why it cannot be read.
fn summary(text: &[u8]) -> (String, Vec<String>, String) {
    match parse(text, true, options(&domain())) {
        Parsed::Envelope(parsed) => {
            let recipients: Vec<_> =
                parsed.recipients().iter().map(|recipient| recipient.mailbox.to_string()).collect();
            let unread = parsed.unread.iter().map(|unread| String::from_utf8_lossy(&unread.text).into_owned());
            (recipients.join(" "), unread.collect(), parsed.envelope.envelope.from.to_string())
        }
        Parsed::NoReversePath(reason) => (String::new(), vec![], reason),
        other => panic!("{other:?}"),
    }
}

/// Exim writes one recipient a line; others quote, comment or add a display name.
#[test]
fn a_field_is_unfolded_and_divided_as_a_list() {
    for (field, expected) in [
        ("Envelope-to: eva@example.org,\n bob@example.org,\n\tzoe@example.org\n", "eva bob zoe"),
        ("Envelope-to:\r\n eva@example.org,\r\n bob@example.org\r\n", "eva bob"),
        ("Delivered-To:\n eva@example.org\n", "eva"),
        ("Delivered-To: eva@example.org,\n bob@example.org\nDelivered-To: <zoe@example.org>\n", "eva bob zoe"),
        ("Envelope-to: \"eva, b\"@example.org, bob@example.org\n", "\"eva, b\" bob"),
        ("Envelope-to: eva@example.org (a, b), Bob B <bob@example.org>,,\n", "eva bob"),
        ("Envelope-to: eva@example.org, Eva@EXAMPLE.org, eva@example.org\n", "eva Eva"),
        ("Delivered-To: \u{a0}zo\u{eb}@example.org\n", "\u{a0}zo\u{eb}"),
        ("Envelope-to: zo\u{eb}@example.org,\n eva@ex\n ample.org, bob@example.org\n", "zo\u{eb} bob"),
    ] {
        let expected: Vec<_> = expected
            .replace("a, b", "a,_b")
            .replace("eva, ", "eva,_")
            .split(' ')
            .map(|name| format!("{name}@example.org").replace('_', " "))
            .collect();
        let (recipients, ..) = summary(format!("Return-Path: <>\n{field}\nx\n").as_bytes());
        assert_eq!(recipients, expected.join(" "), "{field:?}");
    }
}

#[test]
fn a_recipient_that_cannot_be_read_is_not_lost() {
    for (fields, recipients, unread) in [
        (
            &b"Envelope-to: eva@example.org, b b@example.org, <zoe@example.org> x\n"[..],
            "eva@example.org",
            &["b b@example.org", "<zoe@example.org> x"][..],
        ),
        (
            b"Envelope-to: eva@example.org,\n \"bob@example.org,\n zoe@example.org\n",
            "eva@example.org",
            &["\"bob@example.org, zoe@example.org"],
        ),
        (b"Delivered-To: eva@example.org\nDelivered-To: bob\n", "eva@example.org", &["bob"]),
        (b"Delivered-To: eva@example.org\nDelivered-To: bob@example.net\n", "eva@example.org", &["bob@example.net"]),
        (
            b"Envelope-to: eva@example.org, b\xe4r@example.org, zo\xc3\xab@example.org\n",
            "eva@example.org zo\u{eb}@example.org",
            &["b\u{fffd}r@example.org"],
        ),
        // The last line has no line end.
        (b"Delivered-To: eva@example.org\nDelivered-To: bob@example.org", "eva@example.org bob@example.org", &[]),
        // If no `Delivered-To` can be used, the other fields name the same recipients.
        (b"Delivered-To: list\nX-Original-To: eva@example.org\n", "eva@example.org", &[]),
        (b"X-Original-To: list\nDelivered-To: eva@example.org\n", "eva@example.org", &[]),
        (b"Delivered-To: list\nX-Original-To: b b@example.org\n", "", &["list", "b b@example.org"]),
    ] {
        let (read, left, _) = summary(fields);
        assert_eq!((read.as_str(), left), (recipients, unread.iter().map(ToString::to_string).collect()), "{fields:?}");
    }
}

#[test]
fn a_reverse_path_that_cannot_be_read_is_not_the_null_path() {
    for (path, expected) in [
        ("\n <a@b.example>", "a@b.example"),
        (" <a\n @b.example>", "a@b.example"),
        (" <\"a b\"@b.example>", "\"a b\"@b.example"),
        (" <a@b.example> (a comment)", "a@b.example"),
        (" (a comment) <a@b.example>", "a@b.example"),
        (" a@b.example", "a@b.example"),
        (" <@c.example:a@b.example>", "a@b.example"),
        (" <>", ""),
        ("\n <>", ""),
        ("", ""),
        (" <MAILER-DAEMON>", ""),
        (" a@b.example, c@b.example", "Return-Path: cannot read a@b.example, c@b.example: it is not one address"),
        (
            " <a b@b.example>",
            "Return-Path: cannot read <a b@b.example>: this is not the name of a mailbox; a display name needs an <address> after it",
        ),
        (" <a@b.example", "Return-Path: cannot read <a@b.example: a > is missing"),
        (" <unknown>", "Return-Path: cannot read <unknown>: it has no @ and domain"),
    ] {
        let (.., from) = summary(format!("Return-Path:{path}\nDelivered-To: eva@example.org\n\nx\n").as_bytes());
        assert_eq!(from, expected, "{path:?}");
    }
    let latin1 = b"Return-Path: <\xe4@b.example>\nDelivered-To: eva@example.org\n\n";
    assert_eq!(summary(latin1).2, "Return-Path: it is not in UTF-8");
}

/// An agent writes no `Received`: the lines that the sender has forged begin with a second `Return-Path`.
#[test]
fn a_second_return_path_ends_the_envelope() {
    let text = "Return-Path: <a@b.example>\nDelivered-To: eva@example.org\nReturn-Path: <forged@b.example>\n\
                Delivered-To: mallory@example.org\nSubject: x\n\n";
    assert_eq!(recipients(text), ["eva@example.org"]);
    assert!(text[parsed(text).octets..].starts_with("Return-Path: <forged@b.example>\n"));
}

/// The line is not a field, and is not sent. After other lines it is content.
#[test]
fn the_first_line_of_an_mbox_is_skipped() {
    for line in ["From a@b.example  Fri Jan  2 03:04:05 2026\n", ">From a@b.example Fri Jan  2 03:04:05 2026\n"] {
        let text = format!("{line}Return-Path: <a@b.example>\nDelivered-To: eva@example.org\n{line}\nx\n");
        assert_eq!(recipients(&text), ["eva@example.org"]);
        assert_eq!((parsed(&text).lines, &text[parsed(&text).octets..]), (3, &*format!("{line}\nx\n")));
    }
}

/// The file with the marks of some recipients, as `settle` writes them.
fn marked(text: &[u8], numbers: &[usize], mark: Mark) -> Vec<u8> {
    let Parsed::Envelope(parsed) = parse(text, true, options(&domain())) else { panic!("{text:?}") };
    let mut marked = text.to_vec();
    for place in numbers.iter().flat_map(|number| &parsed.marks[*number]) {
        let octet = &mut marked[usize::try_from(*place).unwrap()];
        assert_eq!(*octet, b'@');
        *octet = mark.octet();
    }
    marked
}

/// In any form in which an agent may write the address.
#[test]
fn a_marked_recipient_is_settled_and_the_others_are_open() {
    for fields in [
        &b"Delivered-To: eva@example.org\nDelivered-To: bob@example.org\nDelivered-To: zoe@example.org\n"[..],
        b"Envelope-to: eva@example.org,bob@example.org, zoe@example.org\r\n",
        b"Envelope-to: eva@example.org,\n bob@example.org,\n\tzoe@example.org\n",
        b"Envelope-to:\r\n <eva@\r\n example.org>,\r\n bob@\r\n example.org, zoe\r\n @example.org\r\n",
        b"Envelope-to: eva@example.org (at @ home), \"Bob@B\" <bob@example.org> (@), (@) zoe@example.org\n",
        b"Envelope-to: <@a.example,@b.example:eva@example.org>, bob@example.org, zoe@example.org\n",
        b"Envelope-to: eva@example.org, bob@example.org, b\xe4r@example.org, zoe@example.org\n",
        b"Envelope-to: \xc3\xab <eva@example.org>, \xe4 <x@example.org>, bob@example.org, \xc3\xab <zoe@example.org>\n",
        b"Delivered-To: eva@example.org\nDelivered-To: bob@example.org, eva@example.org\nDelivered-To: zoe@example.org\n",
    ] {
        let names = ["eva", "bob", "zoe"];
        let left = |text: &[u8]| {
            let Parsed::Envelope(parsed) = parse(text, true, options(&domain())) else { panic!("{text:?}") };
            let local = |recipient: &Recipient| recipient.mailbox.local().to_owned();
            let unread: Vec<_> = parsed.unread.iter().map(|unread| unread.text.clone()).collect();
            (parsed.recipients().iter().map(local).collect::<Vec<_>>(), parsed.settled, unread)
        };
        // If `Delivered-To` names a recipient, settled or not, other fields do not count.
        let other = if fields.starts_with(b"Delivered-To") { "X-Original-To: list@example.org\n" } else { "" };
        let text = [fields, other.as_bytes(), b"Received: x\n\nx\n"].concat();
        let unread = left(&text).2;
        for mark in [Mark::Done, Mark::Rejected] {
            for some in 0..8 {
                let is_marked = |number: &usize| some & (1 << number) != 0;
                let numbers: Vec<usize> = (0..3).filter(is_marked).collect();
                let (open, settled, others) = left(&marked(&text, &numbers, mark));
                let expected: Vec<_> = (0..3).filter(|number| !is_marked(number)).map(|number| names[number]).collect();
                assert_eq!(open, expected, "{some} {fields:?}");
                assert_eq!(others, unread, "{some} {fields:?}");
                assert!(settled.len() >= numbers.len() && settled.iter().all(|other| *other == mark), "{fields:?}");
            }
        }
    }
}

/// Only an address that could be read before is marked.
#[test]
fn an_address_that_cannot_be_read_without_its_control_character_is_not_settled() {
    for text in ["eva\u{6}", "\u{6}", "b b\u{6}example.org", "eva@example\u{6}org"] {
        let (recipients, unread, _) =
            summary(format!("Delivered-To: bob@example.org\nDelivered-To: {text}\n\n").as_bytes());
        assert_eq!((recipients.as_str(), unread.len()), ("bob@example.org", 1), "{text:?}");
    }
}

/// The prefix of qmail's virtualdomains. It stays in lines that this program has written, and in a local part that is
/// empty without it.
#[test]
fn a_prefix_of_another_agent_is_removed() {
    let read = |text: &str| {
        let domain = domain();
        let options = ParseOptions { prefix: Some("acme-"), ..options(&domain) };
        let Parsed::Envelope(parsed) = parse(text.as_bytes(), true, options) else { panic!("{text:?}") };
        parsed.recipients().iter().map(|recipient| recipient.mailbox.to_string()).collect::<Vec<_>>().join(" ")
    };
    let fields = "Delivered-To: acme-eva@example.org\nDelivered-To: bob@example.org\nDelivered-To: acme-@example.org\n";
    assert_eq!(read(&format!("{fields}\n")), "eva@example.org bob@example.org acme-@example.org");
    assert!(read(&format!("{fields}X-ODMR-Envelope: id=x\n\n")).starts_with("acme-eva@example.org "));
    assert_eq!(read("X-Original-To: acme-eva@example.org\n\n"), "acme-eva@example.org");
}

/// To find the end of the envelope, lines of content that begin with white space are not read as its continuation.
#[test]
fn the_envelope_ends_before_endless_content() {
    let text = format!("Delivered-To: eva@example.org\nx\n{}", " y\n".repeat(100));
    let parsed = parse(text.as_bytes(), false, options(&None));
    assert!(matches!(parsed, Parsed::Envelope(parsed) if parsed.octets == 30));
}

/// Mail readers and other agents may read the envelope too.
#[test]
fn an_address_is_in_angle_brackets_if_it_would_be_read_as_a_list() {
    for (address, expected) in [
        ("eva@example.org", "eva@example.org"),
        ("Eva@Example.NET", "Eva@Example.NET"),
        ("\"a, b\"@example.net", "\"a, b\"@example.net"),
        ("taro..y@phone.example", "taro..y@phone.example"),
        ("joe@my_host.example.", "joe@my_host.example."),
        ("a,b@example.net", "<a,b@example.net>"),
        ("..@example.net", "<..@example.net>"),
        ("\u{a0}@example.net", "<\u{a0}@example.net>"),
        ("joe@x@example.net", "<joe@x@example.net>"),
        ("\"a\".b@example.net", "<\"a\".b@example.net>"),
        ("=?a?q?b?=@example.net", "=?a?q?b?=@example.net"),
        ("..=?a?q?b?=@example.net", "<..=?a?q?b?=@example.net>"),
    ] {
        assert_eq!(field_value(&Mailbox::parse_any(address).unwrap()), expected);
    }
}

/// A recipient elsewhere keeps the spelling that the client has sent.
#[test]
fn a_recipient_elsewhere_keeps_its_spelling() {
    let text = "Return-Path: <A@B.Example>\nDelivered-To: Eva@EXAMPLE.org\nDelivered-To: \"bob\"@example.org.\n";
    let ours = format!("{text}X-ODMR-Envelope: id=x\n\n");
    assert_eq!(recipients(&ours), ["Eva@EXAMPLE.org", "\"bob\"@example.org."]);
    assert_eq!(parsed(&ours).envelope.envelope.from.to_string(), "A@B.Example");
    // Other agents deliver to domains that are held here.
    assert_eq!(recipients(&format!("{text}\n")), ["Eva@example.org", "bob@example.org"]);
}

/// Writes a message for these addresses, reads it, and marks each of its recipients alone.
fn check_round_trip(from: &str, to: &[String]) {
    let mut mailboxes: Vec<Mailbox> = Vec::new();
    for mailbox in to.iter().filter_map(|text| Mailbox::parse_any(text).ok()) {
        if !mailboxes.contains(&mailbox) {
            mailboxes.push(mailbox);
        }
    }
    let from = reverse_path(format!("<{from}>").as_bytes()).map_or(ReversePath::Null, |(path, _)| path);
    let recipients: Vec<_> = mailboxes.iter().cloned().map(Recipient::plain).collect();
    let envelope = Envelope { recipients, ..Envelope::new(from) };
    let queued = QueuedEnvelope { id: "abc".to_owned(), arrived: Timestamp::from_seconds(1_767_323_045), envelope };
    let text = queued.to_header("") + "Received: x\n\nbody\n";
    let read = |text: &[u8]| match parse(text, true, options(&None)) {
        Parsed::Envelope(parsed) => Some(*parsed),
        Parsed::NoRecipients if mailboxes.is_empty() => None,
        other => panic!("{other:?}: {text:?}"),
    };
    let Some(parsed) = read(text.as_bytes()) else { return };
    assert_eq!(parsed.envelope, queued, "{text:?}");
    assert!(parsed.unread.is_empty() && text[parsed.octets..].starts_with("Received: x"), "{text:?}");
    // Equal addresses may be spelled differently.
    let spelled = |parsed: &ParsedEnvelope| -> Vec<String> {
        parsed.recipients().iter().map(|recipient| recipient.mailbox.to_string()).collect()
    };
    let expected: Vec<_> = mailboxes.iter().map(Mailbox::to_string).collect();
    assert_eq!(spelled(&parsed), expected);
    assert_eq!(parsed.envelope.envelope.from.to_string(), queued.envelope.from.to_string());
    for number in 0..mailboxes.len() {
        for mark in [Mark::Done, Mark::Rejected] {
            let mut marked = text.clone().into_bytes();
            for place in &parsed.marks[number] {
                let octet = &mut marked[usize::try_from(*place).unwrap()];
                assert_eq!(*octet, b'@', "{text:?}");
                *octet = mark.octet();
            }
            let marked = read(&marked).unwrap();
            let mut left = expected.clone();
            left.remove(number);
            assert_eq!((spelled(&marked), &marked.settled[..]), (left, &[mark][..]), "{text:?}");
            assert!(marked.unread.is_empty(), "{text:?}");
        }
    }
}

proptest::proptest! {
    #[test]
    fn no_file_makes_the_parser_panic(front: Vec<u8>, end: bool) {
        let _ = parse(&front, end, options(&domain()));
    }

    /// If any recipients are settled in any order, the others stay open, and the rest of the file is unchanged.
    #[test]
    fn every_set_of_marks_is_read_again(envelope in foreign_envelope(), order: u64, some: u64) {
        let read = |text: &[u8]| match parse(text, true, options(&None)) {
            Parsed::Envelope(parsed) => {
                let recipients: Vec<_> = parsed.recipients().iter().map(|recipient| recipient.mailbox.to_string()).collect();
                Some((recipients, parsed.unread, parsed.octets, parsed.marks))
            }
            _ => None,
        };
        if let Some((mut open, unread, octets, mut marks)) = read(&envelope) {
            let mut text = envelope.clone();
            let (mut order, mut some) = (order, some);
            while !open.is_empty() && some & 1 == 0 {
                let number = usize::try_from(order % open.len() as u64).unwrap();
                (order, some) = (order.rotate_right(3), some >> 1);
                open.remove(number);
                for place in marks.remove(number) {
                    let octet = &mut text[usize::try_from(place).unwrap()];
                    proptest::prop_assert_eq!(*octet, b'@');
                    *octet = [Mark::Done, Mark::Rejected][number % 2].octet();
                }
                let again = read(&text);
                let expected = Some((open.clone(), unread.clone(), octets, marks.clone()));
                proptest::prop_assert_eq!(again, expected, "{}", String::from_utf8_lossy(&text));
            }
        }
    }

    #[test]
    fn every_address_that_the_server_accepts_is_read_as_it_was_written(
        from in r#"[a@.,:;()"\\\[\] \u{a0}ü_%=?/]{0,12}@([a.,_\-/ü]{1,8}|\[[a:.]{1,6}\])"#,
        to in proptest::collection::vec(
            r#"[a@.,:;"\\\u{a0}ü_%=?/ ]{1,12}@([a.,_\-/ü]{1,8}|\[[a:.]{1,6}\])"#, 0..4,
        ),
        quoted in proptest::collection::vec(
            r#""([a@.,:;()<>\[\] \u{a0}ü=?]|\\["\\]){0,8}"@([a._\-%]{1,8}\.?|\[192\.0\.2\.1\])"#, 0..3,
        ),
        encoded in r"[.,]{0,1}=\?a\?q\?[a@>,]{0,3}\?=[.,]{0,1}@[a_.]{1,4}",
    ) {
        let to: Vec<String> = to.into_iter().chain(quoted).chain([encoded]).collect();
        check_round_trip(&from, &to);
    }
}

/// Parts of lists of recipients.
const PIECES: &[&[u8]] = &[
    b"eva@example.org",
    b"bob@example.org",
    b"\"q@q\"@example.org",
    b"\"a(b\"@example.org",
    b"\"x\\\"@\"@example.org",
    b"<zoe@example.org>",
    b"\"E, va\" <eva@example.org>",
    b"\"at@home\" <e2@example.org>",
    b"(c@d.example) k@example.org",
    b"l@example.org (at @ home)",
    b"m@(x)example.org",
    b"n(@)@example.org",
    b"@a.example,@b.example:r@example.org",
    b"<@a.example,@b.example:r2@example.org>",
    b"g: g1@example.org, g2@example.org;",
    b"p@[192.0.2.1]",
    b"b\xe4r@example.org",
    b"\xc3\xab@example.org",
    b"\xc3\xab <u@example.org>",
    b"root",
    b"@",
    b"a@b@example.org",
    b"\"open@example.org",
    b"(open",
    b"<half@example.org",
    b"x\x06example.org",
    b"\"y\x15\"@example.org",
    b"Z <z@example.org> (@)",
    b"\"\"@example.org",
    b"",
    b" ",
    b"s @ example.org",
    b"t.@example.org",
    b"eva@EXAMPLE.org",
    b"((@)@) v@example.org",
    b"w@example.org(",
    b"\\@@example.org",
];

/// Envelopes as other agents write them, and worse.
fn foreign_envelope() -> impl proptest::strategy::Strategy<Value = Vec<u8>> {
    use proptest::prelude::*;
    let glue: Vec<&'static [u8]> = vec![b",", b", ", b",\n ", b",\r\n\t", b" ", b"\n ", b"; ", b",,", b"\n\t,\n "];
    let names: Vec<&'static [u8]> = vec![
        b"Delivered-To: ",
        b"Envelope-to:",
        b"X-Original-To: ",
        b"delivered-to:\n ",
        b"Return-Path: <>\nDelivered-To: ",
    ];
    let piece =
        (proptest::sample::select(PIECES), proptest::sample::select(glue), any::<proptest::sample::Index>(), 0..8u8);
    let end: Vec<&'static [u8]> = vec![b"\n", b"\r\n", b" \n"];
    let field =
        (proptest::sample::select(names), proptest::collection::vec(piece, 1..5), proptest::sample::select(end));
    proptest::collection::vec(field, 1..4).prop_map(|fields| {
        let mut text = Vec::new();
        for (name, pieces, end) in fields {
            text.extend_from_slice(name);
            for (number, (piece, glue, fold, dice)) in pieces.into_iter().enumerate() {
                if number > 0 {
                    text.extend_from_slice(glue);
                }
                // Sometimes folded, at any place.
                let at = if dice == 0 { fold.index(piece.len() + 1) } else { piece.len() };
                text.extend_from_slice(&piece[..at]);
                if dice == 0 {
                    text.extend_from_slice(b"\r\n ");
                }
                text.extend_from_slice(&piece[at..]);
            }
            text.extend_from_slice(end);
        }
        text.extend_from_slice(b"Received: x\n\nx\n");
        text
    })
}

/// Each recipient is named twice.
#[test]
fn the_work_for_an_envelope_grows_in_proportion_to_its_recipients() {
    let compared = |recipients: usize| {
        let before = COMPARED.get();
        let line = |number| format!("Delivered-To: u{number}@example.org\n");
        let lines: String = (0..recipients).chain(0..recipients).map(line).collect();
        let parsed = parsed(&(lines + "\n"));
        assert_eq!((parsed.recipients().len(), parsed.marks[recipients - 1].len()), (recipients, 2));
        COMPARED.get() - before
    };
    let (few, many) = (compared(500), compared(10_000));
    assert!(many <= 30 * few, "{few} for 500 recipients, {many} for 10,000");
}

/// The comment has thousands of characters that could be the mark.
#[test]
fn the_mark_of_an_address_with_a_long_comment_is_outside_the_comment() {
    for comment in ["@", "\x06", "x@\x15 "] {
        let comment = comment.repeat(20_000);
        let text = format!("Delivered-To: \"a@b\" <eva@example.org> ({comment})\n\n");
        let place = parsed(&text).marks[0][0];
        assert_eq!(place, text.find("@example").unwrap() as u64);
        let mut marked = text.clone().into_bytes();
        marked[usize::try_from(place).unwrap()] = Mark::Rejected.octet();
        let marked = parsed(&String::from_utf8(marked).unwrap());
        assert_eq!((marked.settled.as_slice(), marked.recipients()), (&[Mark::Rejected][..], &[][..]));
    }
    // Octets that are not UTF-8 in a list of many.
    let list = b"Delivered-To: ".iter().copied().chain(b"u@example.org, ".repeat(20_000));
    let text: Vec<u8> = list.chain(*b"eva@example.org, \xe4@example.org\n\n").collect();
    let Parsed::Envelope(parsed) = parse(&text, true, options(&domain())) else { panic!() };
    let place = usize::try_from(parsed.marks[1][0]).unwrap();
    assert_eq!((&text[place - 3..place + 8], parsed.unread.len()), (&b"eva@example"[..], 1));
}
