//! Addresses as they are written, and as they are not.

use super::*;
use proptest::prelude::*;

#[test]
fn a_domain_is_labels_of_letters_digits_and_hyphens() {
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
    check("本本💩ا1日ba1اüč", Some("xn--1ba1-3ra6hw84bea0071tmxca89123j"));
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

#[test]
fn a_mailbox_is_written_in_its_shortest_form() {
    fn check(input: &str, expected: Option<(&str, &str)>) {
        let mailbox = Mailbox::parse(input);
        let seen = mailbox.as_ref().map(|mailbox| (mailbox.local(), mailbox.to_string()));
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
fn a_reverse_path_stands_in_angle_brackets() {
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
    check(b"<joe@a_b>", Err(PathError::BadDomain));
    check(b"<joe@x >", Err(PathError::BadDomain));
    check(b"<@a>", Err(PathError::Syntax));
    check(b"<@a,b:joe@x>", Err(PathError::Syntax));
    check(b"<@a_b:joe@x>", Err(PathError::BadDomain));
    check(b"<@:joe@x>", Err(PathError::BadDomain));
    check(b"<@a:>", Err(PathError::Syntax));
    check(b"<j\xe9@x>", Err(PathError::NotUtf8));
    check(b"<joe@x> \xe9", Ok(("joe@x", 7)));
}

#[test]
fn a_forward_path_may_be_postmaster_alone() {
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
    check(b"<postmaster@Example.org>", Ok(("postmaster@example.org", 24)));
    check(b"<@a,@b:joe@x>", Ok(("joe@x", 13)));
    check(b"<>", Err(PathError::Syntax));
    check(b"<joe>", Err(PathError::Syntax));
}

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
    fn a_domain_reads_back_as_itself(text in r"[\p{L}\p{N}-]{1,20}(\.[\p{L}\p{N}-]{1,9}){0,3}") {
        if let Some(domain) = Domain::parse(&text) {
            prop_assert!(domain.as_str().is_ascii());
            prop_assert_eq!(Domain::parse(domain.as_str()), Some(domain));
        }
    }

    #[test]
    fn any_local_part_without_controls_reads_back_as_itself(local in r"\PC{0,60}") {
        let host = Host::Name(Domain("example.org".to_owned()));
        let mailbox = Mailbox { local, host };
        prop_assert_eq!(Mailbox::parse(&mailbox.to_string()), Some(mailbox.clone()));
        let path = format!("<{mailbox}>");
        let expected = (ReversePath::Mailbox(mailbox), path.len());
        prop_assert_eq!(reverse_path(path.as_bytes()), Ok(expected));
    }
}
