//! Address lists as programs and people write them.

use proptest::prelude::*;

use super::*;

fn home() -> Domain {
    Domain::parse("home.example").unwrap()
}

fn read(input: &str) -> Result<String, String> {
    let mailboxes = parse_addresses(input, &home())?;
    Ok(mailboxes.iter().map(Mailbox::to_string).collect::<Vec<_>>().join(" "))
}

fn check(input: &str, expected: &str) {
    assert_eq!(read(input).as_deref(), Ok(expected), "{input:?}");
}

#[test]
fn an_address_is_read_with_and_without_its_host() {
    // Addresses alone.
    check("", "");
    check(" \r\n\t", "");
    check("joe@x.example", "joe@x.example");
    check("Joe@X.EXAMPLE", "Joe@X.EXAMPLE");
    check("joe@[192.0.2.1]", "joe@[192.0.2.1]");
    check("joe@[ IPv6:2001:db8::1 ]", "joe@[IPv6:2001:db8::1]");
    check("joe@bücher.example", "joe@bücher.example");
    check("jürgen@x", "jürgen@x");
    check("o'neill+tag=1@x", "o'neill+tag=1@x");
    check("a!#$%&'*+-/=?^_`{|}~@x", "a!#$%&'*+-/=?^_`{|}~@x");
    check("joe.doe@x.y", "joe.doe@x.y");
    // Addresses of other hosts are returned as they were written.
    for text in ["j..oe@x", ".joe@x", "joe.@x", "j\\oe@x", "joe@a_b", "joe@x.", "joe@[x]"] {
        check(text, text);
    }
    check("\"joe\"@x", "\"joe\"@x");
    check("\"joe doe\"@x", "\"joe doe\"@x");
    check("\"a@b,c\"@x", "\"a@b,c\"@x");
    check(r#""a\"b\\c"@x"#, r#""a\"b\\c"@x"#);
    check("<joe@x>", "joe@x");
    check("< joe @ x >", "joe@x");
    // Names without a host.
    check("joe", "joe@home.example");
    check("joe.doe", "joe.doe@home.example");
    check("<joe>", "joe@home.example");
    check("Joe <joe>", "joe@home.example");
    check("\"joe doe\"", "\"joe doe\"@home.example");
    check("Postmaster", "Postmaster@home.example");
    // Obsolete forms.
    check("<@a.example,@b.example:joe@x>", "joe@x");
    check("Joe < @a , , @b : joe@x >", "joe@x");
    check("\"joe\".doe@X", "joe.doe@X");
    check("joe.\"d o\"@x", "\"joe.d o\"@x");
    check("joe..\"doe\"@x", "\"joe..doe\"@x");
}

#[test]
fn any_display_name_is_accepted() {
    check("Joe <joe@x>", "joe@x");
    check("Joe Q. Public <joe@x>", "joe@x");
    check("\"Public, Joe Q.\" <joe@x>", "joe@x");
    check("\"Joe \\\"the boss\\\" <b@y>\" <joe@x>", "joe@x");
    check("\"\" <joe@x>", "joe@x");
    check("joe@x <joe@x>", "joe@x");
    check("J\u{fffd}rgen <joe@x>", "joe@x");
    check("Jürgen Öztürk<joe@x>", "joe@x");
    check("[List] Joe <joe@x>", "joe@x");
    check("O'Neill <joe@x>", "joe@x");
    check("=?utf-8?Q?J=C3=BCrgen?= <joe@x>", "joe@x");
    check("=?utf-8?Q?Doe,_J?= =?utf-8?B?w7w=?=\r\n =?us-ascii?q?.?= <joe@x>, eva", "joe@x eva@home.example");
    check("=?utf-8?Q?a=40b?=<joe@x>", "joe@x");
    check("=?= <joe@x>", "joe@x");
}

#[test]
fn commas_semicolons_comments_and_groups_divide_a_list() {
    // Lists.
    check("a@x,b@y", "a@x b@y");
    check("a@x, b@y ,c", "a@x b@y c@home.example");
    check(",, a@x,, b@y,", "a@x b@y");
    check("a@x; b@y;", "a@x b@y");
    check("Doe, Joe <joe@x>", "Doe@home.example joe@x");
    check("a@x, a@x", "a@x a@x");
    // Comments and folds.
    check("joe@x (Joe)", "joe@x");
    check("(Joe) joe@x", "joe@x");
    check("joe(a)@(b)x(c).(d)y", "joe@x.y");
    check("(a (b (c) \\) \\( ) d) joe@x", "joe@x");
    check("(a, b <c@d>) Joe (;:) <(e)joe(f)@x(g)> (h)", "joe@x");
    check("\"(not a comment)\" <joe@x>", "joe@x");
    check("Joe\r\n <joe@x>,\r\n\tEva\n <eva@y>", "joe@x eva@y");
    check("\"Joe\r\n Doe\" <joe@x>", "joe@x");
    check("joe . doe @ x . y", "joe.doe@x.y");
    // Groups.
    check("undisclosed-recipients:;", "");
    check("undisclosed recipients: ;", "");
    check("undisclosed-recipients:", "");
    check("friends: joe@x, Eva <eva@y>;", "joe@x eva@y");
    check("friends: joe@x;, foes: eva@y; , bob@z", "joe@x eva@y bob@z");
    check("friends: joe@x; bob@z", "joe@x bob@z");
    check("\"my: friends\" (and): joe, ;", "joe@home.example");
    check("friends:,,;", "");
}

#[test]
fn an_error_shows_the_address_that_cannot_be_read() {
    fn check(input: &str, expected: &str) {
        assert_eq!(read(input), Err(format!("cannot read {expected}")), "{input:?}");
    }
    let local = "this is not the name of a mailbox; a display name needs an <address> after it";
    let bracket = "something follows the >; is a comma missing?";
    let host = "the host is not a valid domain";
    let group = "this cannot be the name of a group";
    for (input, shown) in [
        ("Joe Doe", "Joe Doe"),
        ("a@x,  Joe\r\n Doe , b@y", "Joe Doe"),
        ("Joe joe@x", "Joe joe@x"),
        ("<>", "<>"),
        ("Joe <>", "Joe <>"),
        ("@x", "@x"),
        ("...@x", "...@x"),
        ("\"\"", "\"\""),
        ("\"joe\"doe@x", "\"joe\"doe@x"),
        ("=?utf-8?q?joe?=", "=?utf-8?q?joe?="),
        ("joe)@x", "joe)@x"),
        (">", ">"),
        ("joe>", "joe>"),
    ] {
        check(input, &format!("{shown}: {local}"));
    }
    check("joe@", &format!("joe@: {host}"));
    check("joe@a b", &format!("joe@a b: {host}"));
    check("joe@x@y", &format!("joe@x@y: {host}"));
    check("joe@\"x\"", &format!("joe@\"x\": {host}"));
    check("joe@[x y\\]]", &format!("joe@[x y\\]]: {host}"));
    // RFC 5891: a label must not have these characters.
    for domain in ["ü\u{200c}", "a\u{e000}", "-ü"] {
        check(&format!("joe@{domain}"), &format!("joe@{domain}: IDNA does not allow the domain (RFC 5891)"));
    }
    check("joe@[192.0.2.1].x", &format!("joe@[192.0.2.1].x: {host}"));
    check("joe <a@x> eva <b@x>", &format!("joe <a@x> eva: {bracket}"));
    check("<a@x> b@x", &format!("<a@x> b: {bracket}"));
    check("<<a@x>>", &format!("<<a@x>>: {bracket}"));
    check("<a@x>:", &format!("<a@x>:: {bracket}"));
    check("eva, Joe <joe@x, bob", "Joe <joe@x, bob: a > is missing");
    check("<@a joe@x>", "<@a joe@x>: a source route ends in a colon");
    check("Joe (the boss", "(the boss: a ) is missing");
    check("Joe (a (b)", "(a (b): a ) is missing");
    check("eva, \"Joe <joe@x>", "\"Joe <joe@x>: a \" is missing");
    check("joe@[192.0.2.1", "[192.0.2.1: a ] is missing");
    check("a: b: c@x;;", &format!("b:: {group}"));
    check("joe@x: eva@y;", &format!("joe@x:: {group}"));
    check(": joe@x;", &format!(":: {group}"));
    check("joe@x, : eva;", &format!(":: {group}"));
    check("j\u{fffd}@x", "j\u{fffd}@x: it is not in UTF-8");
    check("joe@m\u{fffd}ller.example", "joe@m\u{fffd}ller.example: it is not in UTF-8");
    check("j\u{1b}[2J\0@x", "[2J?@x: a ] is missing");
    check("j\u{1b}@x", "j?@x: the name is too long, or holds control characters");
    let long = "j".repeat(256);
    check(&format!("{long}@x"), &format!("{}…: the name is too long, or holds control characters", &long[..100]));
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text: String) {
        let _ = parse_addresses(&text, &home());
    }

    #[test]
    fn no_punctuation_makes_it_panic(text in "[a@.,:;<>()\"\\\\\\[\\] =?\\r\\nü]{0,40}") {
        for mailbox in parse_addresses(&text, &home()).unwrap_or_default() {
            prop_assert_eq!(Mailbox::parse_any(&mailbox.to_string()), Ok(mailbox));
        }
    }
}
