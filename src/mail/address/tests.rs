//! Valid and invalid addresses.

use proptest::prelude::*;

use super::*;

#[test]
fn a_domain_consists_of_ldh_labels() {
    fn check(input: &str, expected: Option<&str>) {
        let domain = Domain::parse(input);
        assert_eq!(domain.as_ref().map(Domain::as_str), expected, "{input:?}");
    }
    let label = "a".repeat(63);
    let long = [&label[..], &label, &label, &label].join(".");
    check("example.org", Some("example.org"));
    check("EXAMPLE.Org", Some("example.org"));
    check("localhost", Some("localhost"));
    check("3com.a-b.1", Some("3com.a-b.1"));
    check("a--b.org", Some("a--b.org"));
    check(&label, Some(&label));
    check(&long, Some(&long));
    check(&format!("{long}.a"), None);
    check(&format!("{label}a.org"), None);
    for wrong in ["", ".", "a..b", ".a", "a.", "-a.org", "a-.org", "a_b.org", "a b", "a/b", "*.org", "a\0", "[1.2.3.4]"]
    {
        check(wrong, None);
    }
}

/// Rules: U8-07.
#[test]
fn a_u_label_becomes_its_a_label() {
    fn check(input: &str, expected: Option<&str>) {
        let domain = Domain::parse(input);
        assert_eq!(domain.as_ref().map(Domain::as_str), expected, "{input:?}");
    }
    check("bücher.example", Some("xn--bcher-kva.example"));
    check("BÜCHER.example", Some("xn--bcher-kva.example"));
    check("XN--bcher-KVA.example", Some("xn--bcher-kva.example"));
    check("münchen-ost.de", Some("xn--mnchen-ost-9db.de"));
    check("ü.ü", Some("xn--tda.xn--tda"));
    check("💩.la", Some("xn--ls8h.la"));
    // RFC 3492 section 7.1, samples A, B, D, G and L.
    check("ليهمابتكلموشعربي؟", Some("xn--egbpdaj6bu4bxfgehfvwxn"));
    check("他们为什么不说中文", Some("xn--ihqwcrb4cv8a8dqg056pqjye"));
    check("pročprostěnemluvíčesky", Some("xn--proprostnemluvesky-uyb24dma41a"));
    check("なぜみんな日本語を話してくれないのか", Some("xn--n8jok5ay5dzabd5bym9f0cm5685rrjetr6pdxa"));
    check("3年B組金八先生", Some("xn--3b-ww4c5e180e575a65lsy2b"));
    check("-ü.org", None);
    check("ü_.org", None);
    check("a\u{a0}b.org", None);
    check("a\u{85}b.org", None);
    check(&"ü".repeat(300), None);
    check(&"ü".repeat(2000), None);
}

#[test]
fn every_way_to_write_a_name_gives_one_domain() {
    fn check(expected: &str, ways: &[&str]) {
        for way in ways {
            let domain = Domain::parse(way);
            assert_eq!(domain.as_ref().map(Domain::as_str), Some(expected), "{}", way.escape_unicode());
        }
    }
    // Composed, decomposed, and in capitals.
    check("xn--bcher-kva.example", &["bücher.example", "bu\u{308}cher.example", "BU\u{308}CHER.Example"]);
    check("xn--caf-dma", &["café", "cafe\u{301}", "CAFE\u{301}", "CAFÉ"]);
    // Vietnamese: two marks on one character, in either order.
    check("xn--vit-5kz", &["việt", "vi\u{1ec7}t", "vie\u{323}\u{302}t", "vie\u{302}\u{323}t", "viê\u{323}t"]);
    check("xn--ph-rbt", &["phơ\u{309}", "phở", "pho\u{31b}\u{309}", "PHO\u{309}\u{31b}"]);
    // Hangul: syllables, and the jamo they consist of.
    check("xn--3e0b707e", &["한국", "\u{1112}\u{1161}\u{11ab}\u{1100}\u{116e}\u{11a8}", "\u{d558}\u{11ab}국"]);
    // Characters that Unicode has twice: the Ångström sign, an ideograph, kana of half width.
    check("xn--5ca", &["å", "Å", "\u{212b}", "a\u{30a}"]);
    check("xn--oh3a", &["\u{8c48}", "\u{f900}"]);
    check("xn--mckyg", &["ガル", "カ\u{3099}ル", "ｶﾞﾙ"]);
    // Full-width characters, and the full stops of East Asian keyboards.
    check("example.org", &["ｅｘａｍｐｌｅ.org", "ＥＸＡＭＰＬＥ．ＯＲＧ", "example。org", "example｡org"]);
    check("xn--fiqs8s.xn--fiqs8s", &["中国。中国", "中国.xn--fiqs8s", "XN--FIQS8S．中国"]);
    // Invisible characters that UTS #46 ignores.
    check("xn--bcher-kva", &["bü\u{ad}cher", "bü\u{200b}cher"]);
    check("xn--qei", &["❤", "❤\u{fe0f}"]);
    // IDNA2003 mapped "ß" to "ss" and the final sigma to the other one; IDNA2008 permits both.
    check("xn--strae-oqa", &["straße", "STRAẞE"]);
    check("xn--nxasmm1c", &["βόλος", "βο\u{301}λος"]);
    check("xn--nxasmq6b", &["βόλοσ", "ΒΌΛΟΣ"]);
}

#[test]
fn a_u_label_must_follow_the_rules_for_its_script() {
    fn check(input: &str, expected: Option<&str>) {
        let domain = Domain::parse(input);
        assert_eq!(domain.as_ref().map(Domain::as_str), expected, "{}", input.escape_unicode());
    }
    // RFC 5892 appendix A.1 and A.2: a joiner needs a virama or joining characters before it.
    check("क्\u{200d}ष", Some("xn--11b2ezcw70k"));
    check("نامه\u{200c}ای", Some("xn--mgba3gch31f060k"));
    check("a\u{200d}b", None);
    check("ü\u{200c}", None);
    check("\u{200d}", None);
    // RFC 5893 section 2: a label from right to left has no Latin characters, no digit at its start and
    // no digits of two kinds. In such a domain, an ASCII label has no digit at its start either.
    check("מייל.example", Some("xn--eebajf.example"));
    check("מייל1.example", Some("xn--1-iicamh.example"));
    check("מיילa.example", None);
    check("1מייל.example", None);
    check("ש1٢", None);
    check("3com.מייל", None);
    check("本本💩ا1日ba1اüč", None);
    // RFC 5891 section 4.2.3.2: a label does not begin with a combining mark.
    check("\u{308}u.example", None);
    check("u.\u{308}", None);
    // Unassigned, for private use, a change of direction, a replacement for an unreadable character.
    check("a\u{378}", None);
    check("a\u{e000}", None);
    check("a\u{202e}b", None);
    check("a\u{fffd}", None);
    // The mapping gives a character, an empty label or a hyphen that ASCII domains may not have.
    check("a＿b", None);
    check("ａ／ｂ", None);
    check("a。。b", None);
    check("ü。", None);
    check("\u{ad}", None);
    check("－ａ", None);
    // In a domain with a U-label, an A-label must be decodable. In an ASCII domain it stays unchanged.
    check("xn--a.ü", None);
    check("xn--ü", None);
    check("xn--a.u", Some("xn--a.u"));
    check("r3---sn.ü", Some("r3---sn.xn--tda"));
}

#[test]
fn the_limits_are_for_the_domain_in_ascii() {
    fn check(input: &str, expected: Option<usize>) {
        assert_eq!(Domain::parse(input).map(|domain| domain.as_str().len()), expected, "{input:?}");
    }
    let label = "a".repeat(55);
    check(&format!("ü{label}"), Some(63));
    check(&format!("u\u{308}{label}"), Some(63));
    check(&format!("ü{label}a"), None);
    check(&format!("u\u{308}{label}a"), None);
    let three = format!("ü{label}.").repeat(3);
    check(&format!("{three}ü{label}"), Some(255));
    check(&format!("{three}ü{}.a", &label[2..]), Some(255));
    check(&format!("{three}ü{}.aa", &label[2..]), None);
}

#[test]
fn an_odmr_domain_has_a_dot_and_is_ascii() {
    fn check(input: &[u8], expected: Option<&str>) {
        let domain = Domain::parse_odmr(input);
        assert_eq!(domain.as_ref().map(Domain::as_str), expected, "{input:?}");
    }
    check(b"Example.ORG", Some("example.org"));
    check(b"1.a-b", Some("1.a-b"));
    check(b"xn--bcher-kva.example", Some("xn--bcher-kva.example"));
    check("bücher.example".as_bytes(), None);
    check(b"localhost", None);
    check(b"example.org.", None);
    check(b" example.org", None);
    check(b"a-.example.org", None);
    check(b"\xff.org", None);
    check(b"", None);
}

#[test]
fn a_host_is_a_domain_or_an_address_literal() {
    fn check(input: &str, expected: Option<&str>) {
        let host = Host::parse(input).map(|host| host.to_string());
        assert_eq!(host.as_deref(), expected, "{input:?}");
    }
    check("Example.org", Some("example.org"));
    check("[192.0.2.1]", Some("[192.0.2.1]"));
    check("[IPv6:2001:DB8:0::1]", Some("[IPv6:2001:db8::1]"));
    check("[ipv6:::1]", Some("[IPv6:::1]"));
    check("[IPv6:::ffff:192.0.2.1]", Some("[IPv6:::ffff:192.0.2.1]"));
    for wrong in [
        "[]",
        "[",
        "[192.0.2.1",
        "192.0.2.1]",
        "[192.0.2]",
        "[192.0.2.256]",
        "[192.0.2.1.]",
        "[ 192.0.2.1]",
        "[::1]",
        "[IPv6:]",
        "[IPv6:1]",
        "[IPv6:192.0.2.1]",
        "[IPv6:fe80::1%eth0]",
        "[IPv6:[::1]]",
        "[example.org]",
        "[X25:1234]",
        "[ïïïï]",
    ] {
        check(wrong, None);
    }
}

/// Rules: SMTP-20.
#[test]
fn the_canonical_form_of_a_mailbox_is_the_shortest() {
    fn check(input: &str, expected: Option<(&str, &str)>) {
        let mailbox = Mailbox::parse(input);
        assert!(mailbox.as_ref().is_none_or(|mailbox| mailbox.to_string() == input));
        let seen = mailbox.as_ref().map(|mailbox| (mailbox.local(), mailbox.canonical().to_string()));
        assert_eq!(seen, expected.map(|(local, text)| (local, text.to_owned())), "{input:?}");
    }
    check("Joe@Example.ORG", Some(("Joe", "Joe@example.org")));
    check(r#""joe"@example.org"#, Some(("joe", "joe@example.org")));
    check(r#""j\o\e"@example.org"#, Some(("joe", "joe@example.org")));
    check(r#""a.b"@x"#, Some(("a.b", "a.b@x")));
    check("a!#$%&'*+-/=?^_`{|}~.b@x", Some(("a!#$%&'*+-/=?^_`{|}~.b", "a!#$%&'*+-/=?^_`{|}~.b@x")));
    check(r#""Joe Doe"@x"#, Some(("Joe Doe", r#""Joe Doe"@x"#)));
    check(r#""a\"\\b"@x"#, Some((r#"a"\b"#, r#""a\"\\b"@x"#)));
    check(r#""a@b>c"@x"#, Some(("a@b>c", r#""a@b>c"@x"#)));
    check(r#""a..b"@x"#, Some(("a..b", r#""a..b"@x"#)));
    check(r#"""@x"#, Some(("", r#"""@x"#)));
    check("joe@[192.0.2.1]", Some(("joe", "joe@[192.0.2.1]")));
    check("jürgen@bücher.example", Some(("jürgen", "jürgen@xn--bcher-kva.example")));
    check(r#""jü gen"@x"#, Some(("jü gen", r#""jü gen"@x"#)));
    for wrong in [
        "",
        "@",
        "joe",
        "joe@",
        "@x",
        ".joe@x",
        "joe.@x",
        "j..oe@x",
        "joe doe@x",
        "joe@x@y",
        "joe@a_b",
        " joe@x",
        "joe@x ",
        "<joe@x>",
        "joe\0@x",
        "joe\u{85}@x",
        "j\"o\"e@x",
        "\"joe\"",
        "\"joe@x",
        "\"joe\"a@x",
        "\"joe\\\"@x",
        "\"a\rb\"@x",
        "\"a\\\nb\"@x",
        "\"a\0b\"@x",
        "\"a\tb\"@x",
        "\"a\x7fb\"@x",
        "\"\\ü\"@x",
    ] {
        check(wrong, None);
    }
}

/// RFC 2181 section 11: DNS has such names. Mobile networks have assigned such local parts.
#[test]
fn an_address_of_another_host_is_written_as_it_was_received() {
    fn check(input: &str, local: &str, domain: &str) {
        let mailbox = Mailbox::parse_any(input).unwrap_or_else(|error| panic!("{input:?}: {error:?}"));
        assert_eq!((mailbox.to_string(), mailbox.local()), (input.to_owned(), local), "{input:?}");
        assert_eq!(mailbox.host().to_string(), domain, "{input:?}");
        assert_eq!(reverse_path(format!("<{input}>").as_bytes()).unwrap().0.to_string(), input);
    }
    check("Joe@Example.ORG", "Joe", "example.org");
    check("taro..y@phone.example", "taro..y", "phone.example");
    check(".hanako.@phone.example", ".hanako.", "phone.example");
    check("joe@mx_1.example", "joe", "mx_1.example");
    check("joe@-x.example.", "joe", "-x.example");
    check("joe@a..b", "joe", "a..b");
    check("joe@a/../b", "joe", "a/../b");
    check("joe@BÜCHER.example", "joe", "xn--bcher-kva.example");
    check("joe@my_host.bücher.example", "joe", "my_host.xn--bcher-kva.example");
    check("\"joe\"@x", "joe", "x");
    check("\"j\\oe\"@x", "joe", "x");
    check("\"a b\".c@x", "a b.c", "x");
    check("john,doe@x", "john,doe", "x");
    check("joe@x@y", "joe@x", "y");
    check("DOMAIN\\joe@x", "DOMAIN\\joe", "x");
    check("joe@[X25:1234]", "joe", "[x25:1234]");
    check("joe@[::1]", "joe", "[::1]");
    for wrong in [
        "",
        "@",
        "joe",
        "joe@",
        "@x",
        "@x@y",
        "joe@.",
        "joe@..",
        "joe doe@x",
        "j<oe@x",
        "joe>@x",
        "jo(e)@x",
        "[joe]@x",
        " joe@x",
        "joe@x ",
        "joe\0@x",
        "jo\te@x",
        "\"j\roe\"@x",
        "joe\n@x",
        "joe\u{85}@x",
        "\"joe@x",
        "\"joe\\\"@x",
        "\"joe\"",
        "jo\\\"e\"@x",
        "joe@x,y",
        "joe@x;",
        "joe@\"x\"",
        "joe@x\\y",
        "joe@[]",
        "joe@[a b]",
        "joe@[x]]",
        "joe@[a@b]",
        "joe@[a>b]",
        "joe@[\"]",
    ] {
        assert!(Mailbox::parse_any(wrong).is_err(), "{wrong:?}");
    }
}

#[test]
fn domains_of_other_hosts_too_have_no_label_that_idna_does_not_permit() {
    let long = "ü".repeat(60);
    for domain in ["ü_", "-ü", "ü-", "a\u{200d}b", "a\u{e000}", "a\u{202e}b", "m\u{fffd}ller", "1מייל", long.as_str()]
    {
        let domain = format!("{domain}.example");
        assert_eq!(Domain::parse_any(&domain), Err(PathError::NotIdna), "{}", domain.escape_unicode());
    }
    // UTS #46 maps these to "a/c", "%" and "_", which IDNA does not permit.
    for text in ["\u{2100}.example", "a\u{ff05}b.example", "\u{e4}.a\u{ff3f}b.example"] {
        assert_eq!(Domain::parse_any(text), Err(PathError::NotIdna), "{text}");
    }
    assert!(Domain::parse_any("a_b.\u{e4}.example").is_ok());
}

#[test]
fn spellings_of_one_address_are_equal() {
    let read = |text: &str| Mailbox::parse_any(text).unwrap();
    for (one, other) in [
        ("joe@x.example", "joe@X.Example"),
        ("joe@x.example", "\"joe\"@x.example."),
        ("joe@bücher.example", "joe@XN--bcher-kva.example"),
        ("taro..y@x", "\"taro..y\"@x"),
    ] {
        assert_eq!(read(one), read(other));
        assert_eq!(read(one).host(), read(other).canonical().host());
    }
    assert_ne!(read("joe@x"), read("Joe@x"));
    assert_ne!(read("joe@x_y"), read("joe@x-y"));
}

#[test]
fn an_address_has_a_form_for_each_place() {
    fn check(input: &str, with_a_labels: &str, canonical: &str, header: &str) {
        let mailbox = Mailbox::parse_any(input).unwrap();
        let forms = (mailbox.with_a_labels(), mailbox.canonical().to_string(), mailbox.header_form());
        assert_eq!(forms, (with_a_labels.into(), canonical.to_owned(), header.into()), "{input:?}");
        assert_eq!(mailbox.canonical(), mailbox);
        for form in [with_a_labels, canonical, header] {
            assert_eq!(Mailbox::parse_any(form).as_ref(), Ok(&mailbox), "{form:?}");
        }
    }
    check("Joe@X.example", "Joe@X.example", "Joe@x.example", "Joe@X.example");
    check("\"joe\"@X", "\"joe\"@X", "joe@x", "\"joe\"@X");
    check("jo..e@X", "jo..e@X", "jo..e@x", "\"jo..e\"@X");
    check("\"jo..e\"@X", "\"jo..e\"@X", "\"jo..e\"@x", "\"jo..e\"@X");
    check(
        "a,b@Bücher.example",
        "a,b@xn--bcher-kva.example",
        "a,b@xn--bcher-kva.example",
        "\"a,b\"@xn--bcher-kva.example",
    );
    check("\"a\".b@x", "\"a\".b@x", "a.b@x", "a.b@x");
}

#[test]
fn a_domain_has_a_safe_name_of_a_file() {
    fn check(input: &str, expected: &str) {
        let domain = Domain::parse_any(input).unwrap();
        assert_eq!(domain.file_name(), expected, "{input:?}");
        assert_eq!(Domain::of_file_name(expected), Some(domain), "{input:?}");
    }
    check("Example.ORG", "example.org");
    check("my_host.example", "my_host.example");
    check("a..", "a..");
    check("../x", "%2E.%2Fx");
    check("a/b%c", "a%2Fb%25c");
    check("-x.example", "-x.example");
    for wrong in ["", ".", "..", "Example.org", "a%2fb", "a%2Eb", "%2", "%GG", "%+1", "a%00b", "%FF", "a b", "%E4%BD"] {
        assert_eq!(Domain::of_file_name(wrong), None, "{wrong:?}");
    }
    // The limit is that of the file name.
    assert!(Domain::parse_any(&"/".repeat(85)).is_ok());
    assert_eq!(Domain::parse_any(&"/".repeat(86)), Err(PathError::TooLong));
}

#[test]
fn a_mailbox_needs_smtputf8_only_for_its_local_part() {
    fn check(input: &str, expected: bool) {
        assert_eq!(Mailbox::parse(input).map(|mailbox| mailbox.is_ascii()), Some(expected), "{input:?}");
    }
    check("joe@example.org", true);
    check("joe@bücher.example", true);
    check("jürgen@example.org", false);
}

#[test]
fn a_reverse_path_has_angle_brackets() {
    fn check(input: &[u8], expected: Result<(&str, usize), PathError>) {
        let seen = reverse_path(input).map(|(path, used)| (path.to_string(), used));
        assert_eq!(
            seen,
            expected.map(|(path, used)| (path.to_owned(), used)),
            "{:?}",
            input.escape_ascii().to_string()
        );
    }
    check(b"<>", Ok(("", 2)));
    check(b"<> SIZE=10", Ok(("", 2)));
    check(b"<joe@example.org> SIZE=10", Ok(("joe@example.org", 17)));
    check(b"<\"a>b\\\">\"@x>>", Ok(("\"a>b\\\">\"@x", 12)));
    check(b"<@a.example,@b:joe@x>", Ok(("joe@x", 21)));
    check(b"<@a:\"b:c\"@x>", Ok(("\"b:c\"@x", 12)));
    check("<jürgen@x>".as_bytes(), Ok(("jürgen@x", 11)));
    check(b"", Err(PathError::Syntax));
    check(b"joe@x", Err(PathError::Syntax));
    check(b" <joe@x>", Err(PathError::Syntax));
    check(b"<joe@x", Err(PathError::Syntax));
    check(b"<joe>", Err(PathError::Syntax));
    check(b"<postmaster>", Err(PathError::Syntax));
    check(b"<\"joe@x>", Err(PathError::Syntax));
    check(b"<<joe@x>>", Err(PathError::Syntax));
    check(b"<joe@a_b>", Ok(("joe@a_b", 9)));
    check("<joe@\u{fc}_\u{200c}>".as_bytes(), Err(PathError::NotIdna));
    check(b"<joe@a,b>", Err(PathError::BadDomain));
    check(b"<joe@x >", Err(PathError::BadDomain));
    check(b"<@a>", Err(PathError::Syntax));
    check(b"<@a,b:joe@x>", Err(PathError::Syntax));
    check(b"<@a_b:joe@x>", Ok(("joe@x", 12)));
    check(b"<@a(b:joe@x>", Err(PathError::BadDomain));
    check(b"<@:joe@x>", Err(PathError::BadDomain));
    check(b"<@a:>", Err(PathError::Syntax));
    check(b"<j\xe9@x>", Err(PathError::NotUtf8));
    check(b"<joe@x> \xe9", Ok(("joe@x", 7)));
}

#[test]
fn a_forward_path_may_be_postmaster_without_a_domain() {
    fn check(input: &[u8], expected: Result<(&str, usize), PathError>) {
        let seen = forward_path(input).map(|(path, used)| (path.to_string(), used));
        assert_eq!(
            seen,
            expected.map(|(path, used)| (path.to_owned(), used)),
            "{:?}",
            input.escape_ascii().to_string()
        );
    }
    check(b"<Postmaster>", Ok(("Postmaster", 12)));
    check(b"<POSTmaster> NOTIFY=NEVER", Ok(("Postmaster", 12)));
    check(b"<postmaster@Example.org>", Ok(("postmaster@Example.org", 24)));
    check(b"<@a,@b:joe@x>", Ok(("joe@x", 13)));
    check(b"<>", Err(PathError::Syntax));
    check(b"<joe>", Err(PathError::Syntax));
}

/// Rules: SMTP-12.
#[test]
fn each_part_of_a_path_has_its_limit() {
    fn check(local: usize, route: usize, expected: Result<usize, PathError>) {
        let route = "@a,".repeat(route);
        let path = format!("<{route}@a:{}@x>", "l".repeat(local));
        assert_eq!(reverse_path(path.as_bytes()).map(|(_, used)| used), expected, "{path}");
    }
    check(64, 0, Ok(71));
    check(255, 0, Ok(262));
    check(256, 0, Err(PathError::TooLong));
    check(1, 330, Ok(998));
    check(3, 330, Ok(1000));
    check(4, 330, Err(PathError::TooLong));
}

proptest! {
    #[test]
    fn no_octets_make_a_parser_panic(input: Vec<u8>) {
        let framed = [b"<", &input[..], b">"].concat();
        let _ = (reverse_path(&input), forward_path(&framed), Domain::parse_odmr(&input));
        let text = String::from_utf8_lossy(&input);
        let _ = (Domain::parse(&text), Host::parse(&format!("[{text}]")));
        let _ = Mailbox::parse(&text);
    }

    #[test]
    fn a_path_ends_within_its_input_at_a_bracket(input in r#"<[a@.:,"\\> <]{0,20}"#) {
        if let Ok((_, used)) = reverse_path(input.as_bytes()) {
            prop_assert_eq!(input.as_bytes()[used - 1], b'>');
        }
    }

    #[test]
    fn a_domain_reads_back_as_itself(
        text in r"[\p{L}\p{N}\p{M}-]{1,9}([.。][\p{L}\p{N}-]{1,9}){0,3}",
        european in r"[A-Za-zÀ-ỹ\u{300}-\u{323}-]{1,20}([.。．][a-zα-ω]{1,9}){0,3}",
        asian in r"[가-힣ᄀ-ᇂ一-龥ぁ-ヶ｡-ﾟ]{1,12}([.。．][0-9א-ת]{1,9}){0,3}",
    ) {
        for text in [text, european, asian] {
            if let Some(domain) = Domain::parse(&text) {
                prop_assert!(domain.as_str().is_ascii());
                prop_assert_eq!(Domain::parse(&domain.to_string()), Some(domain));
            }
        }
    }

    #[test]
    fn an_ascii_domain_only_changes_to_lower_case(
        text in r"[a-zA-Z0-9-]{0,9}(([._]?|\.XN--)[a-zA-Z0-9-]{1,62}){0,6}",
    ) {
        let is_label = |label: &str| {
            !label.is_empty() && label.len() <= 63 && label.trim_matches('-') == label && !label.contains('_')
        };
        let expected = text.len() <= 255 && text.split('.').all(is_label);
        prop_assert_eq!(Domain::parse(&text), expected.then(|| Domain(text.to_lowercase())));
    }

    #[test]
    fn a_file_name_belongs_to_one_domain_and_is_not_a_path(text in r"[a-z._/%~!\-]{1,90}", octets in r"[!-~]{1,40}") {
        for text in [text, octets] {
            let Ok(domain) = Domain::parse_any(&text) else { continue };
            let name = domain.file_name();
            prop_assert!(!name.starts_with('.') && !name.contains(['/', '\0']) && name.len() <= 255);
            prop_assert_eq!(Domain::of_file_name(&name), Some(domain.clone()));
        }
    }

    #[test]
    fn no_address_has_an_octet_with_a_meaning_outside_of_quotes(
        text in r#"[a@.,:;<>()"\\\[\] ü_%\x00-\x1f]{0,12}@[a.,_\-/"<>()\[\]:;@ü ]{0,8}"#,
    ) {
        if let Ok(mailbox) = Mailbox::parse_any(&text) {
            prop_assert_eq!(mailbox.to_string(), text.clone());
            prop_assert!(!text.contains(char::is_control));
            let framed = format!("<{text}> SIZE=1");
            let expected = (ReversePath::Mailbox(mailbox.clone()), text.len() + 2);
            prop_assert_eq!(reverse_path(framed.as_bytes()), Ok(expected));
            let canonical = mailbox.canonical().to_string();
            for form in [canonical.into(), mailbox.with_a_labels(), mailbox.header_form()] {
                prop_assert_eq!(Mailbox::parse_any(&form), Ok(mailbox.clone()));
            }
            let header = Mailbox::parse_any(&mailbox.header_form()).unwrap();
            prop_assert!(is_dot_string(header.spelled_local()) || is_quoted_string(header.spelled_local()));
        }
    }

    #[test]
    fn any_local_part_without_controls_reads_back_as_itself(local in r"\PC{0,60}") {
        let host = Host::Name(Domain("example.org".to_owned()));
        let text = format!("{}@{host}", shortest(&local));
        let mailbox = Mailbox { at: shortest(&local).len(), text: text.clone(), local, host };
        let read = Mailbox::parse(&text);
        prop_assert_eq!(read.as_ref(), Some(&mailbox));
        prop_assert_eq!(read.map(|read| read.to_string()), Some(text));
        let path = format!("<{mailbox}>");
        let expected = (ReversePath::Mailbox(mailbox), path.len());
        prop_assert_eq!(reverse_path(path.as_bytes()), Ok(expected));
    }
}
