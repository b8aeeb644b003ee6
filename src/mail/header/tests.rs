//! Headers as programs and people write them.

use proptest::prelude::*;

use super::*;

#[test]
fn the_topmost_received_field_names_the_client() {
    let check = |header: &str, wanted: Option<(&str, Option<&str>, bool)>| {
        let header = header.replace(" | ", "\r\n\t");
        let info = Header::parse(header.as_bytes()).client_info("Relay.example.net");
        let found = info.as_ref().map(|found| (found.address.to_string(), found.helo.as_deref(), found.extended));
        let found = found.as_ref().map(|(address, helo, extended)| (address.as_str(), *helo, *extended));
        assert_eq!(found, wanted, "{header}");
    };
    let ours = "Received: from mx.example ([192.0.2.1]) | by relay.example.net with ESMTPS (x) | id 1; | date\n";
    check(ours, Some(("192.0.2.1", Some("mx.example"), true)));
    check(&format!("Return-Path: <a@b.example>\n{ours}"), Some(("192.0.2.1", Some("mx.example"), true)));
    let other = "Received: from helo (name.example [IPv6:2001:db8::1]) by relay.example.net with SMTP; date\n";
    check(other, Some(("2001:db8::1", Some("helo"), false)));
    check(
        "Received: from unknown ([192.0.2.1]) by relay.example.net with SMTP; date\n",
        Some(("192.0.2.1", None, false)),
    );
    // Names in the form of an address: of the client, for Exim, and in its certificate.
    for field in [
        "from [203.0.113.9] (x [192.0.2.1])",
        "from [192.0.2.1] (helo=[203.0.113.9])",
        "from x ([192.0.2.1] helo=[203.0.113.9])",
        "from [203.0.113.9] (x [192.0.2.1]) (Client CN \"helo=z\")",
        "from [203.0.113.9] (x [192.0.2.1]) (using TLSv1.3) (Client CN \"y [198.51.100.1] z\", Issuer \"i\")",
    ] {
        let field = format!("Received: {field} by relay.example.net with ESMTP; date\n");
        check(&field, Some(("192.0.2.1", Some("[203.0.113.9]"), true)));
    }
    for none in [
        "",
        "Subject: x\n",
        "Received:\n",
        "Received: by relay.example.net; date\n",
        "Received: from mx.example by relay.example.net; date\n",
        "Received: from mx.example ([a.b]) by relay.example.net; date\n",
        "Received: from mx.example ([192.0.2.1) by relay.example.net; date\n",
        "Received: from mx.example ([192.0.2.1]) by elsewhere.example; date\n",
        "Received: from a ([192.0.2.1]) by elsewhere; date\nReceived: from a ([192.0.2.1]) by relay.example.net; date\n",
    ] {
        check(none, None);
    }
}

fn home() -> Domain {
    Domain::parse("home.example").unwrap()
}

fn written(mailboxes: &[Mailbox]) -> String {
    mailboxes.iter().map(Mailbox::to_string).collect::<Vec<_>>().join(" ")
}

fn additions() -> HeaderAdditions {
    HeaderAdditions { home: home(), date: "DATE".to_owned(), message_id: "<ID>".to_owned(), from: None, drop_bcc: true }
}

#[test]
fn recipients_come_from_to_cc_and_bcc_or_from_the_newest_resent_block() {
    fn check(header: &str, expected: Result<&str, &str>) {
        let seen = Header::parse(header.as_bytes()).recipients(&home()).map(|found| written(&found));
        assert_eq!(seen, expected.map(str::to_owned).map_err(str::to_owned), "{header}");
    }
    check("", Ok(""));
    check("Subject: x\n\nTo: a@x\n", Ok(""));
    check("To: a@x\nSubject: x\nCC: b@x\nbcc : c@x\nTo: d@x\n", Ok("a@x b@x c@x d@x"));
    check("To: a@x,\n b@x,\r\n\tc@x\r\n\r\n", Ok("a@x b@x c@x"));
    check("To:a@x\n \n\tb@x", Err("To: cannot read a@x b@x: the host is not a valid domain"));
    check("To: a@x, A@x, a@X\nCc: a@x\n", Ok("a@x A@x"));
    check("Tom: a@x\nReply-To: b@x\nTo:c@x", Ok("c@x"));
    check("From eva Fri Jan  2 03:04:05 2026\nTo: a@x\n\n", Ok("a@x"));
    check("To: undisclosed-recipients:;\nBcc: a@x\n", Ok("a@x"));
    check(
        "Bcc: Joe Doe\n",
        Err("Bcc: cannot read Joe Doe: this is not the name of a mailbox; \
                                  a display name needs an <address> after it"),
    );
    check("no header: here\nTo: a@x\n", Ok(""));
    // The newest block is first; a name that occurs again begins an older one.
    check("Resent-To: a@x\nResent-Cc: b@x\nTo: c@x\nBcc: d@x\n", Ok("a@x b@x"));
    check("Received: x\nResent-From: e\nRESENT-BCC: a@x\nReceived: y\nResent-To: b@x\nTo: c@x\n", Ok("a@x"));
    check("Resent-From: e\nResent-To: a@x\nResent-From: f\nResent-To: b@x\nTo: c@x\n", Ok("a@x"));
    check("Resent-To: a@x\nResent-To: b@x\n", Ok("a@x"));
    check("Resent-From: e\nTo: c@x\n", Ok(""));
}

#[test]
fn a_display_name_may_be_in_any_character_set() {
    let header = Header::parse(b"To: J\xfcrgen <a@x>\nCc: \"\xff\xfe\" <b@x>\n\n");
    assert_eq!(header.recipients(&home()).map(|found| written(&found)).as_deref(), Ok("a@x b@x"));
    let error = Header::parse(b"To: j\xfcrgen@x\n").recipients(&home());
    assert_eq!(error, Err("To: cannot read j\u{fffd}rgen@x: it is not in UTF-8".to_owned()));
    let error = Header::parse(b"To: a@x, <joe@m\xfcller.example>\n").recipients(&home());
    assert_eq!(error, Err("To: cannot read <joe@m\u{fffd}ller.example>: it is not in UTF-8".to_owned()));
}

#[test]
fn only_missing_fields_are_added_and_only_bcc_is_removed() {
    fn check(content: &[u8], additions: &HeaderAdditions, expected: &[u8], body: &[u8]) {
        let header = Header::parse(content);
        let seen = header.complete(additions);
        assert_eq!(seen.escape_ascii().to_string(), expected.escape_ascii().to_string());
        assert_eq!(content[header.octets()..].escape_ascii().to_string(), body.escape_ascii().to_string());
    }
    let add = additions();
    check(b"", &add, b"Date: DATE\nMessage-ID: <ID>\n\n", b"");
    check(b"\nbody\n", &add, b"Date: DATE\nMessage-ID: <ID>\n\n", b"body\n");
    check(b"hello\nTo: a@x\n", &add, b"Date: DATE\nMessage-ID: <ID>\n\n", b"hello\nTo: a@x\n");
    check(b" hello\n", &add, b"Date: DATE\nMessage-ID: <ID>\n\n", b" hello\n");
    check(b"To: a@x", &add, b"To: a@x\nDate: DATE\nMessage-ID: <ID>\n\n", b"");
    check(b"dAtE : never\nMESSAGE-ID:\n \n x\n\n", &add, b"dAtE : never\nMESSAGE-ID:\n \n x\n\n", b"");
    check(b"Date: 1\nMessage-ID: 2\nX-\xff: y\n", &add, b"Date: 1\nMessage-ID: 2\n\n", b"X-\xff: y\n");
    check(b"Date: 1\nMessage-Id: 2\nX:\t\0\r \n\nb", &add, b"Date: 1\nMessage-Id: 2\nX:\t\0\r \n\n", b"b");
    check(
        b"Date: 1\nMessage-ID: 2\nBCC: a,\n b\nX: y\nresent-bcc: c\n\n",
        &add,
        b"Date: 1\nMessage-ID: 2\nX: y\n\n",
        b"",
    );
    // Records of a delivery, and fields in the form of our own.
    check(
        b"Return-Path: <a@x>\nDate: 1\nX-ODMR-Envelope: id=1;\n  more\nContent-Length: 3\nMessage-ID: 2\nx-odmr-y: z\n\n",
        &add,
        b"Date: 1\nMessage-ID: 2\n\n",
        b"",
    );
    check(b"From e  Fri\nDate: 1\nMessage-ID: 2\n\nb", &add, b"Date: 1\nMessage-ID: 2\n\n", b"b");
    check(b"From e  Fri\n folded\n", &add, b"Date: DATE\nMessage-ID: <ID>\n\n", b" folded\n");
    check(b">From e\nFrom f\n>>From g h\nDate: 1\nMessage-ID: 2\n\nb", &add, b"Date: 1\nMessage-ID: 2\n\n", b"b");
    check(b"Date: 1\nFrom e  Fri\n", &add, b"Date: 1\nMessage-ID: <ID>\n\n", b"From e  Fri\n");
    check(
        b"From : e@x\r\nX: y\r\n\r\nb\r\n",
        &add,
        b"From : e@x\r\nX: y\r\nDate: DATE\r\nMessage-ID: <ID>\r\n\r\n",
        b"b\r\n",
    );
    let add = HeaderAdditions { from: Some("E\n<e@x>".to_owned()), drop_bcc: false, ..additions() };
    check(b"Bcc: a@x\n\n", &add, b"Bcc: a@x\nFrom: E <e@x>\nDate: DATE\nMessage-ID: <ID>\n\n", b"");
    check(b"Date: 1\nFROM: f@x\nMessage-ID: 2\n\n", &add, b"Date: 1\nFROM: f@x\nMessage-ID: 2\n\n", b"");
}

#[test]
fn in_a_signed_header_only_records_are_removed() {
    let fields = "From: r\u{fc}t <root>\nSubject: \u{fc}\nContent-Length: 3\nDate: 1\nMessage-ID: 2\n";
    for signature in
        ["DKIM-Signature: v=1\n", "ARC-Message-Signature: i=1\n", "Content-Type:\n Multipart/Signed; boundary=x\n"]
    {
        let content = format!("Return-Path: <>\nX-ODMR-A: b\n{fields}{signature}\n");
        let seen = Header::parse(content.as_bytes()).complete(&additions());
        assert_eq!(String::from_utf8(seen).unwrap(), format!("{fields}{signature}\n"));
    }
    // The same header without the signature is completed.
    let content = format!("{fields}Content-Type: multipart/mixed\n\n");
    let seen = Header::parse(content.as_bytes()).complete(&additions());
    let expected = "From: =?UTF-8?B?csO8dA==?= <root@home.example>\nSubject: =?UTF-8?B?w7w=?=\nDate: 1\nMessage-ID: 2\n\
        Content-Type: multipart/mixed\n\n";
    assert_eq!(String::from_utf8(seen).unwrap(), expected);
}

/// Headers of mutt, git send-email, a web shop, a list server and a program of 1990.
const SAMPLES: [&str; 5] = [
    "Date: Fri, 2 Jan 2026 03:04:05 +0000\nFrom: Joe Q. Public <joe@x.example>\nTo: \"Doe, Eva\" <eva@y.example>,\n\
     \tfriends: bob@z.example (Bob), \"x y\"@z.example;\nSubject: Re: a , b ;  c\nMessage-ID: <aXy@x.example>\n\
     MIME-Version: 1.0\nContent-Type: text/plain; charset=us-ascii\nIn-Reply-To: <1@y.example>\nUser-Agent: Mutt/2.2\n",
    "From: =?UTF-8?q?J=C3=BCrgen=20M=C3=BCller?= <j@x.example>\nTo: git@x.example\nCc: =?UTF-8?q?a=2C=20b?= <a@x.example>\n\
     Subject: [PATCH v2 1/2] =?UTF-8?q?t=C3=A9st?=\nDate: Fri,  2 Jan 2026 03:04:05 +0000\n\
     Message-ID: <20260102030405.1-2-j@x.example>\nX-Mailer: git-send-email 2.47\n",
    "To: undisclosed-recipients:;\nSubject:\nFROM: <shop@x.example>\nReply-to: no-reply@[192.0.2.1]\ndate: now\n\
     Message-Id: <shop>\nX-PHP-Originating-Script: 33:a.php\nMIME-Version: 1.0\n\
     Content-Type: multipart/alternative;\n  boundary=\"=_a;b\"\nList-Unsubscribe: <mailto:x@x.example>,\n <https://x.example>\n",
    "Received: from a ([192.0.2.1])\n\tby b; Fri, 2 Jan 2026 03:04:05 +0000\nReceived: by c; Fri, 2 Jan 2026 03:04:04 +0000\n\
     Sender: list-bounces@x.example\nResent-From: <@r.example:eva@y.example>\nFrom: Eva\n (at home)\n <eva@y.example>\n\
     Date: x\nMessage-ID: y\nPrecedence: list\nList-Id: A list <l.x.example>\nErrors-To: list-bounces@x.example\n",
    "DATE: 2 Jan 90 03:04 GMT\nfrom: joe@x.example , <eva@y.example>;\nmessage-id : <1@x>\nSubject : \t tabs\t\nTo: x!y@z\n\
     Keywords: \n a,\n\t\n b\nStatus: RO\n",
];

#[test]
fn a_header_that_is_complete_passes_octet_for_octet() {
    for sample in SAMPLES {
        for line_end in ["\n", "\r\n"] {
            let content = format!("{sample}\nbody \u{fc}\n.\n\n\n From x\nlast").replace('\n', line_end);
            for completer in [HeaderCompleter::new(additions()), HeaderCompleter::relay()] {
                let seen = String::from_utf8(fed(completer, content.as_bytes(), &[7, 1, 30])).unwrap();
                assert_eq!(seen, content);
            }
        }
    }
}

#[test]
fn a_header_in_transit_loses_records_only() {
    let check = |content: &[u8], expected: &[u8]| {
        let header = Header::parse(content);
        let seen = [&header.relayed()[..], &content[header.octets()..]].concat();
        assert_eq!(seen.escape_ascii().to_string(), expected.escape_ascii().to_string());
        assert_eq!(Header::parse(expected).relayed().len(), Header::parse(expected).octets());
    };
    check(
        b"From e\n>From f\nReturn-Path: <a@x>,\n b\nFrom: root\nX-ODMR-Recipient: c\nBcc: \xfc\r\nContent-Length: 3\n\r\nReturn-Path: d\n",
        b"From e\n>From f\nFrom: root\nBcc: \xfc\r\nContent-Length: 3\n\r\nReturn-Path: d\n",
    );
    check(b"", b"");
    check(b" body", b" body");
    check(b"X: y", b"X: y");
}

/// Feeds a completer with pieces of `cuts` octets, in turn.
fn completed(content: &[u8], cuts: &[usize]) -> Vec<u8> {
    fed(HeaderCompleter::new(additions()), content, cuts)
}

fn fed(mut completer: HeaderCompleter, content: &[u8], cuts: &[usize]) -> Vec<u8> {
    let (mut out, mut rest) = (Vec::new(), content);
    for cut in cuts.iter().cycle() {
        let (piece, after) = rest.split_at(rest.len().min(*cut));
        completer.feed(piece, &mut out);
        rest = after;
        if rest.is_empty() {
            break;
        }
    }
    completer.finish(&mut out);
    out
}

#[test]
fn a_header_over_the_limit_is_not_changed() {
    for (length, touched) in [(HEADER_LIMIT, true), (HEADER_LIMIT + 1, false)] {
        let mut content = b"Bcc: a\nX: ".to_vec();
        content.resize(length - 2, b'y');
        content.extend_from_slice(b"\n\n");
        for body in [&b""[..], b"the body\n"] {
            let content = [&content[..], body].concat();
            for cuts in [&[content.len()][..], &[1 << 16], &[HEADER_LIMIT, 1], &[HEADER_LIMIT - 1, 1, 1]] {
                let seen = completed(&content, cuts);
                assert_eq!(seen == content, !touched, "{length} {cuts:?}");
                assert!(!touched || (seen.starts_with(b"X: y") && seen.ends_with(body)), "{length} {cuts:?}");
            }
        }
    }
}

proptest! {
    #[test]
    fn no_octets_make_it_panic(content: Vec<u8>) {
        let header = Header::parse(&content);
        let _ = (header.recipients(&home()), header.complete(&additions()), header.relayed(), header.needs_utf8());
        prop_assert!(header.octets() <= content.len());
    }

    #[test]
    fn the_result_of_a_completer_does_not_depend_on_the_cuts(
        content in "(>?From a\r?\n){0,2}((To|Bcc|Date|Return-Path|Subject|X y|): ?[aü,\0]{0,3}\r?\n|[ \t][a ]?\r?\n|\r?\n){0,6}[a\n:]{0,5}",
        cuts in proptest::collection::vec(1_usize..20, 1..5),
    ) {
        let content = content.as_bytes();
        let header = Header::parse(content);
        let expected = [&header.complete(&additions())[..], &content[header.octets()..]].concat();
        prop_assert_eq!(completed(content, &cuts), expected);
        let expected = [&header.relayed()[..], &content[header.octets()..]].concat();
        prop_assert_eq!(fed(HeaderCompleter::relay(), content, &cuts), expected);
    }

    #[test]
    fn a_body_passes_octet_for_octet(body: Vec<u8>, header in "(To: a\n|Subject: ü\n|DKIM-Signature: x\n){0,3}", cut in 1_usize..40) {
        let content = [header.as_bytes(), b"\n", &body].concat();
        for completer in [HeaderCompleter::new(additions()), HeaderCompleter::relay()] {
            let seen = fed(completer, &content, &[cut]);
            prop_assert!(seen.ends_with(&[b"\n", &body[..]].concat()));
        }
    }

    #[test]
    fn mail_in_transit_passes_octet_for_octet(mut content: Vec<u8>, cut in 1_usize..40) {
        prop_assume!(!content.to_ascii_lowercase().windows(2).any(|pair| matches!(pair, b"x-" | b"re")));
        prop_assert_eq!(&fed(HeaderCompleter::relay(), &content, &[cut]), &content);
        content.splice(..0, *b"From: root\nSubject: \xfc\n");
        prop_assert_eq!(&fed(HeaderCompleter::relay(), &content, &[cut]), &content);
    }

    #[test]
    fn a_complete_header_is_not_changed(
        content in "((To|Date|Message-ID|X|Subject): ?[aü ]{0,3}\n([ \t]a\n){0,2}){0,6}\n[a\n]{0,5}",
    ) {
        let once = completed(content.as_bytes(), &[content.len().max(1)]);
        prop_assert_eq!(completed(&once, &[once.len()]), once);
    }
}

/// RFC 5322 section 3.6.4.
#[test]
fn a_thread_is_read_from_the_ids() {
    let thread = |text: &str| {
        let Thread { message_id, references } = Header::parse(text.as_bytes()).thread();
        (message_id.unwrap_or_default(), references.join(" "))
    };
    let pair = |one: &str, other: &str| (one.to_owned(), other.to_owned());
    assert_eq!(thread("Message-ID: <3@x>\nReferences: <1@x>\n <2@x>\n\n"), pair("<3@x>", "<1@x> <2@x>"));
    assert_eq!(thread("Message-ID: <3@x>\nIn-Reply-To: <2@x>\n\n"), pair("<3@x>", "<2@x>"));
    assert_eq!(thread("In-Reply-To: <1@x> <2@x>\n\n"), pair("", ""), "two parents are no thread");
    assert_eq!(thread("Message-ID: <a b@x>\nReferences: <\u{e4}@x> <> x <1@x\n\n"), pair("", ""));
    let many: String = (0..30).map(|number| format!(" <{number}@x>")).collect();
    assert!(thread(&format!("Message-ID: <x>\nReferences:{many}\n\n")).1.starts_with("<10@x> <11@x>"));
    assert_eq!(thread(&format!("Message-ID: <{}@x>\n\n", "l".repeat(300))), pair("", ""));
}
