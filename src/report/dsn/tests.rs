//! DSNs compared to files of `testdata/dsn`, and the limits of their lines.

use super::*;
use crate::ids::Ids;
use crate::mail::header::Header;
use proptest::prelude::*;

fn mailbox(text: &str) -> Mailbox {
    Mailbox::parse(text).unwrap()
}

fn report<'a>(recipient: &'a Mailbox, action: Action, status: &str) -> RecipientReport<'a> {
    RecipientReport {
        recipient,
        original: None,
        action,
        status: status.to_owned(),
        remote: None,
        reply: None,
        verdict: None,
        last_attempt: None,
        retry_until: None,
    }
}

fn dsn<'a>(to: &'a Mailbox, reports: &'a [RecipientReport<'a>]) -> Dsn<'a> {
    let now = Ids::fixed().clock().now();
    Dsn {
        reporting: "relay.example.net",
        to,
        envelope_id: None,
        arrived: Timestamp::from_seconds(now.seconds() - 3600),
        reports,
        now,
        message_id: "<id1@relay.example.net>",
        boundary: "Boundary1",
        utf8: false,
        full: false,
        thread: Header::parse(MESSAGE).thread(),
    }
}

/// Compares a DSN, with the returned part of `message`, to a file of `testdata/dsn`.
fn check(dsn: &Dsn, message: &[u8], expected: &str) {
    let returned = match dsn.full {
        true => message.to_vec(),
        false => dsn.returned_header(message, 1 << 16),
    };
    let seen = dsn.head() + str::from_utf8(&returned).unwrap() + &dsn.tail();
    assert!(seen == expected, "-- wanted --\n{expected}\n-- got --\n{seen}");
    assert!(dsn.utf8 || seen.is_ascii());
}

const MESSAGE: &[u8] = b"Received: from a\n\tby b\nFrom: eva@example.org\nTo: joe@example.com\nSubject: hello\n\
                         Message-ID: <1@example.org>\n\nThe body.\n";

#[test]
fn a_failure_is_reported_with_reason_and_advice() {
    let (to, joe, bob, ann) = (
        mailbox("eva@example.org"),
        mailbox("joe@example.com"),
        mailbox("\"bob b\"@nowhere.example"),
        mailbox("ann@example.net"),
    );
    let now = Ids::fixed().clock().now();
    let reports = [
        RecipientReport {
            original: Some("rfc822;joe+2Bold@example.com"),
            remote: Some("mx.example.com"),
            reply: Some(
                "550 5.1.1 <joe@example.com>: Recipient address rejected: User unknown in virtual mailbox table; \
                 see https://example.com/help",
            ),
            last_attempt: Some(now),
            retry_until: Some(now),
            ..report(&joe, Action::Failed, "5.1.1")
        },
        RecipientReport {
            verdict: Some("550 5.1.2 There is no domain nowhere.example"),
            ..report(&bob, Action::Failed, "5.1.2")
        },
        RecipientReport {
            remote: Some("[192.0.2.7]"),
            reply: Some("450 4.2.0\tnot  now; a very long reason that must be folded, with  its spaces,\tand tabs"),
            verdict: Some("554 5.4.7 Given up after 120 hours"),
            last_attempt: Some(now),
            ..report(&ann, Action::Failed, "4.4.7")
        },
    ];
    let dsn = Dsn { envelope_id: Some("QQ+2B1+0Ax"), ..dsn(&to, &reports) };
    check(&dsn, MESSAGE, include_str!("../../../testdata/dsn/failed.eml"));
}

/// Rules: DSNF-06.
#[test]
fn a_whole_message_is_returned() {
    let (to, joe) = (mailbox("eva@example.org"), mailbox("joe@example.com"));
    let reports = [report(&joe, Action::Failed, "nonsense")];
    let dsn = Dsn { full: true, ..dsn(&to, &reports) };
    check(&dsn, MESSAGE, include_str!("../../../testdata/dsn/full.eml"));
}

#[test]
fn a_delay_is_reported_without_advice() {
    let (to, joe) = (mailbox("eva@example.org"), mailbox("joe@example.com"));
    let now = Ids::fixed().clock().now();
    let reports = [RecipientReport {
        remote: Some("mx.example.com"),
        reply: Some("451 4.3.0 Try again later"),
        last_attempt: Some(now),
        retry_until: Some(Timestamp::from_seconds(now.seconds() + 4 * 86400)),
        ..report(&joe, Action::Delayed, "4.3.0")
    }];
    check(&dsn(&to, &reports), MESSAGE, include_str!("../../../testdata/dsn/delayed.eml"));
}

#[test]
fn success_is_reported_as_delivered_relayed_or_expanded() {
    let (to, joe, ann) = (mailbox("eva@example.org"), mailbox("joe@example.com"), mailbox("ann@example.com"));
    let all = mailbox("all@example.com");
    let reports = [
        report(&joe, Action::Delivered, "2.1.5"),
        RecipientReport {
            remote: Some("mx.example.com"),
            reply: Some("250 2.0.0 Ok: queued as 4F1"),
            ..report(&ann, Action::Relayed, "2.0.0")
        },
        report(&all, Action::Expanded, "2.0.0"),
    ];
    let dsn = Dsn { reporting: "localhost", ..dsn(&to, &reports) };
    check(&dsn, MESSAGE, include_str!("../../../testdata/dsn/success.eml"));
}

/// Two DSNs about the same message.
/// Rules: DSNF-07.
#[test]
fn a_dsn_is_in_ascii_unless_it_may_be_in_utf8() {
    let (to, joe) = (mailbox("jürgen@example.org"), mailbox("\"jo é\"@bücher.example"));
    let message = "From: Jürgen <jürgen@example.org>\nSubject: Grüße\n\nText\n".as_bytes();
    let reports = [RecipientReport {
        original: Some("utf-8;jo\\x{20}\\x{E9}@b\\x{FC}cher.example"),
        remote: Some("mx.example.com"),
        reply: Some("553 5.6.7 Ungültig"),
        ..report(&joe, Action::Failed, "5.6.7")
    }];
    let ascii = dsn(&to, &reports);
    check(&ascii, message, include_str!("../../../testdata/dsn/ascii.eml"));
    let utf8 = Dsn { utf8: true, ..ascii };
    check(&utf8, message, include_str!("../../../testdata/dsn/utf8.eml"));
}

#[test]
fn a_returned_header_has_complete_lines_in_seven_bits() {
    fn check(message: &[u8], limit: usize, expected: &str) {
        let to = mailbox("a@x");
        let seen = dsn(&to, &[]).returned_header(message, limit);
        assert_eq!(String::from_utf8(seen).as_deref(), Ok(expected), "{}", message.escape_ascii());
    }
    check(b"", 100, "");
    check(b"\nbody\n", 100, "");
    check(b"body\n", 100, "");
    check(b"A: b", 100, "A: b\n");
    check(b"A: b\r\n c\r\n\r\nbody\r\n", 100, "A: b\n c\n");
    check(b"A: b\nbody\nC: d\n", 100, "A: b\n");
    check(b"A: b\nC: d\n\nbody\n", 10, "A: b\nC: d\n");
    check(b"A: b\nC: d\n\nbody\n", 9, "A: b\n");
    check(b"A: b\nC: d\n\nbody\n", 0, "");
    check("A: é\r\x1b\0\nB: ".as_bytes(), 100, "A: ? ??\nB: \n");
    check(b"A: \xff\xe9\n", 100, "A: ??\n");
    check(&[b"A:", &[b'x'; 2000][..]].concat(), 4000, &{
        format!("A:{}\n {}\n {}\n", "x".repeat(995), "x".repeat(997), "x".repeat(8))
    });
}

#[test]
fn a_status_that_is_not_valid_is_replaced_by_the_general_code() {
    let joe = mailbox("joe@x");
    for (action, status, expected) in [
        (Action::Failed, "5.1.1", "5.1.1"),
        (Action::Failed, "4.4.7", "4.4.7"),
        (Action::Failed, "5.7.999", "5.7.999"),
        (Action::Failed, "2.0.0", "5.0.0"),
        (Action::Failed, "", "5.0.0"),
        (Action::Failed, "5.1", "5.0.0"),
        (Action::Failed, "5.1.1.1", "5.0.0"),
        (Action::Failed, "5.1.1000", "5.0.0"),
        (Action::Failed, "5.1.x\n", "5.0.0"),
        (Action::Delayed, "4.4.1", "4.4.1"),
        (Action::Delayed, "5.1.1", "4.0.0"),
        (Action::Relayed, "250", "2.0.0"),
        (Action::Expanded, "4.0.0", "2.0.0"),
        (Action::Delivered, "2.1.5", "2.1.5"),
    ] {
        assert_eq!(report(&joe, action, status).status(), expected, "{action:?} {status}");
    }
}

#[test]
fn xtext_is_decoded_and_addresses_escaped() {
    for (xtext, expected) in
        [("a+2Bb", "a+b"), ("+3D+3d", "=="), ("a+", "a+"), ("+2", "+2"), ("+XY", "+XY"), ("++2B1", "++1")]
    {
        assert_eq!(decoded(xtext), expected);
    }
    for (plain, text) in [("jürgen@x", "j\\x{FC}rgen@x"), ("a+b=c d\\", "a\\x{2B}b\\x{3D}c\\x{20}d\\x{5C}")] {
        assert_eq!(escaped(plain), text);
        assert_eq!(unescaped(text), plain);
    }
    for text in ["\\x{", "\\x{}", "\\x{D800}", "\\x{110000}", "\\x{+41}", "\\x{00000041}", "\\x"] {
        assert_eq!(unescaped(text), text);
    }
}

proptest! {
    #[test]
    fn no_text_adds_a_line_or_a_field(text in "\\PC{0,30}[\r\n\t\0]\\PC{0,2000}", utf8: bool) {
        let (to, joe) = (mailbox("a@x"), mailbox("b@x"));
        let reports = [RecipientReport {
            original: Some(&text),
            remote: Some(&text),
            reply: Some(&text),
            ..report(&joe, Action::Failed, &text)
        }];
        let envelope_id = Some(&*text);
        let head = Dsn { envelope_id, utf8, ..dsn(&to, &reports) }.head();
        prop_assert!(utf8 || head.is_ascii());
        prop_assert!(head.lines().all(|line| line.len() <= CONTENT_LINE));
        prop_assert!(head.chars().all(|c| c == '\n' || c == '\t' || !c.is_control()));
        let fields = head.lines().filter(|line| line.starts_with("Remote-MTA: ")).count();
        prop_assert_eq!(fields, 1);
    }

    #[test]
    fn no_content_makes_the_parser_panic(message: Vec<u8>, limit in 0_usize..200, utf8: bool) {
        let to = mailbox("a@x");
        let seen = Dsn { utf8, ..dsn(&to, &[]) }.returned_header(&message[..], limit);
        prop_assert!(utf8 || seen.is_ascii());
    }
}

/// RFC 5322 forbids some spellings of an address that a client may have sent in MAIL.
#[test]
fn the_sender_is_written_in_the_spelling_that_a_header_permits() {
    let joe = mailbox("joe@example.com");
    let reports = [report(&joe, Action::Failed, "5.1.1")];
    for (from, expected) in [
        ("Eva@Example.ORG", "To: <Eva@Example.ORG>\n"),
        ("eva@b\u{fc}cher.example", "To: <eva@xn--bcher-kva.example>\n"),
        ("taro..y@phone.example", "To: <\"taro..y\"@phone.example>\n"),
        ("a,b@example.org", "To: <\"a,b\"@example.org>\n"),
    ] {
        let to = Mailbox::parse_any(from).unwrap();
        let head = dsn(&to, &reports).head();
        assert!(head.contains(expected) && head.is_ascii(), "{head}");
    }
}
