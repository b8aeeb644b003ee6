//! Tests of the names of directories, and of typed addresses. `testdata/rules` has tests of the rules.

use super::names::DIRECTORY_NAME_LIMIT;
use super::*;
use proptest::prelude::*;
use std::path::{Component, Path};

#[test]
fn a_local_part_never_leaves_its_domain() {
    assert_eq!(directory_name("Alice.B"), "alice.b");
    assert_eq!(directory_name("user+detail"), "user+detail");
    assert_eq!(directory_name("../x"), "%2E.%2Fx");
    assert_eq!(directory_name("."), "%2E");
    assert_eq!(directory_name(".."), "%2E.");
    assert_eq!(directory_name("a/b c%"), "a%2Fb%20c%25");
    assert_eq!(directory_name("JÜRGEN"), "jürgen");
    assert_eq!(directory_name("\0"), "%00");
}

#[test]
fn the_folder_of_a_detail_keeps_its_case_and_has_no_levels() {
    fn check(detail: &str, expected: &[&str]) {
        assert_eq!(folder_names(detail), expected, "{detail:?}");
    }
    check("Lists", &["Lists", "lists"]);
    check("lists", &["lists"]);
    check("", &[]);
    check(".", &["%2E"]);
    check("../../X", &["%2E%2E%2F%2E%2E%2FX", "%2E%2E%2F%2E%2E%2Fx"]);
    check("a/b", &["a%2Fb"]);
    check("a.b", &["a%2Eb"]);
    check("\0", &["%00"]);
    check("Entwürfe", &["Entwürfe", "entwürfe"]);
    check(&"x".repeat(DIRECTORY_NAME_LIMIT + 1), &[]);
}

fn domain(text: &str) -> Domain {
    Domain::parse(text).unwrap()
}

/// Two domains with a catch-all each, one of them with its own route.
fn open() -> RecipientRules {
    let source = SourceLine { file: Path::new("odmr.toml").into(), line: Some(1) };
    let (home, other) = (domain("example.org"), AddressPattern::Domain(domain("example.com")));
    let accept = [AddressPattern::Domain(home.clone()), other.clone()];
    RecipientRules::new(RuleInput {
        root: "/var/mail".into(),
        home,
        accept: accept.map(|value| Located { value, source: source.clone() }).into(),
        except: Vec::new(),
        aliases: Vec::new(),
        domain_aliases: Vec::new(),
        separators: "+-".to_owned(),
        postmaster: None,
        routes: vec![RouteRule { pattern: Some(other), route: Route::Maildir("/srv".into()), source }],
        catch_alls: Vec::new(),
    })
    .unwrap()
}

#[test]
fn typed_addresses_are_checked() {
    fn check(typed: &str, expected: Option<&str>) {
        let text = open().explain_typed(typed, &|_| true).ok();
        let address = text.as_deref().and_then(|text| text.rsplit_once(": ")).map(|(address, _)| address);
        assert_eq!(address, expected, "{typed:?}");
    }
    check("alice@example.org", Some("alice@example.org"));
    check(" <Alice@Example.ORG> ", Some("Alice@example.org"));
    check("\"a b\"@example.org", Some("\"a b\"@example.org"));
    check("<\"a>b\"@example.org>", Some("\"a>b\"@example.org"));
    check("jürgen@example.org", Some("jürgen@example.org"));
    check("@one.example,@two.example:alice@example.org", Some("alice@example.org"));
    check("POSTMASTER", Some("Postmaster"));
    for wrong in ["", "<>", "alice", "alice@", "a b@example.org", "<alice@example.org", "alice@example.org>", "a\0@b"] {
        check(wrong, None);
    }
    let text = open().explain_typed("a\0b@example.org", &|_| true).unwrap_err();
    assert!(text.starts_with("\"a\\0b@example.org\" is not an address: write one"), "{text}");
}

/// A message waits in the queue for a name that had a next hop, and whose domain has Maildirs now.
#[test]
fn a_queued_message_makes_no_mailbox_for_a_name_without_one() {
    let source = SourceLine { file: Path::new("odmr.toml").into(), line: Some(1) };
    let rules = |catch_all: CatchAll| {
        let accept = vec![Located { value: AddressPattern::Domain(domain("example.org")), source: source.clone() }];
        let team = ["lmtp", "bob", "alice"].map(|name| AliasTarget {
            kind: TargetKind::Mailbox { mailbox: address(name, &domain("example.org")).unwrap(), direct: false },
            source: source.clone(),
        });
        let (name, hop) = (AddressPattern::bare("team"), NextHop::LmtpUnix("/run/lmtp".into()));
        let pattern = Some(AddressPattern::address("lmtp", &domain("example.org")));
        RecipientRules::new(RuleInput {
            root: "/var/mail".into(),
            home: domain("example.org"),
            accept,
            except: Vec::new(),
            aliases: vec![Alias { name, targets: team.into(), source: source.clone() }],
            domain_aliases: Vec::new(),
            separators: "+".to_owned(),
            postmaster: None,
            routes: vec![RouteRule { pattern, route: Route::NextHop(hop), source: source.clone() }],
            catch_alls: vec![CatchAllRule { domain: None, catch_all, source: source.clone() }],
        })
        .unwrap()
    };
    let check = |catch_all: CatchAll, local: &str, exists: bool, expected: &str| {
        let word = address(local, &domain("example.org")).unwrap();
        let destination = rules(catch_all).destination_of(&word, &|_| exists).unwrap();
        assert_eq!(destination.to_string(), expected, "{local}");
    };
    let to = |local: &str| CatchAll::Mailbox(address(local, &domain("example.org")).unwrap());
    check(CatchAll::Postmaster, "word", false, "maildir:/var/mail/example.org/postmaster");
    check(CatchAll::Postmaster, "word", true, "maildir:/var/mail/example.org/word");
    check(CatchAll::Create, "word", false, "maildir:/var/mail/example.org/word");
    check(to("caught"), "word+x", false, "maildir:/var/mail/example.org/caught");
    check(to("caught"), "caught", false, "maildir:/var/mail/example.org/caught");
    // The recipient has one status, so one mailbox gets the message. A next hop would reject the name.
    check(to("team"), "word", false, "maildir:/var/mail/example.org/bob");
    check(to("lmtp"), "word", false, "maildir:/var/mail/example.org/word");
}

/// Whether a name is safe as one component of a path.
fn harmless(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\0']) && name.len() <= DIRECTORY_NAME_LIMIT
}

proptest! {
    #[test]
    fn no_local_part_makes_a_path(local: String) {
        let name = directory_name(&local);
        prop_assert!(!name.starts_with('.') && !name.contains('/') && !name.contains('\0'));
    }

    #[test]
    fn two_local_parts_have_two_directories(one in "[ -~]{1,8}", other in "[ -~]{1,8}") {
        let same = one.eq_ignore_ascii_case(&other);
        prop_assert_eq!(directory_name(&one) == directory_name(&other), same);
    }

    #[test]
    fn no_detail_makes_a_path(detail: String) {
        for name in folder_names(&detail) {
            prop_assert!(harmless(&name) && !name.contains('.'), "{:?}", name);
        }
    }

    #[test]
    fn no_address_leaves_the_root(
        local in r"(\PC{0,80}|[./+-]{0,9}|[a-c./%]{0,5}[+-][a-c./%]{0,9}|(\.\./){1,9}x?)",
        other: bool,
    ) {
        let rules = open();
        let (name, root) = if other { ("example.com", "/srv") } else { ("example.org", "/var/mail/example.org") };
        let Some(mailbox) = address(&local, &domain(name)) else { return Ok(()) };
        prop_assert!(rules.maildir_of(&mailbox).starts_with("/var/mail"));
        let Ok(deliveries) = rules.resolve(&ForwardPath::Mailbox(mailbox), &|_| true) else { return Ok(()) };
        prop_assert_eq!(deliveries.len(), 1);
        let Destination::Maildir { path, folders } = &deliveries[0].destination else {
            return Err(TestCaseError::fail("no Maildir"));
        };
        let below: Vec<_> = path.strip_prefix(root).unwrap().components().collect();
        let [Component::Normal(name)] = below.as_slice() else {
            return Err(TestCaseError::fail(format!("{}", path.display())));
        };
        prop_assert!(harmless(name.to_str().unwrap()));
        for folder in folders {
            prop_assert!(harmless(folder) && !folder.contains('.'), "{:?}", folder);
        }
    }
}
