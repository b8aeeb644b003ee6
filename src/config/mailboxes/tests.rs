//! `[mailboxes]` in whole files: the values, and the errors about mistakes.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use tempfile::TempDir;

use super::MailboxesConfig;
use crate::config::{ConfigError, CustomerConfig};
use crate::mail::address::Domain;

/// The lines before those of `[mailboxes]`.
const HEAD: &str = "hostname = \"mail.example.org\"\n[provider]\naddress = \"relay.example.net\"\n\
                    name = \"acme\"\nsecret = \"s\"\n[mailboxes]\n";

/// Loads a customer's file with this table, in a directory with a file `aliases`. The error is without that directory.
fn load(table: &str, aliases: &str) -> Result<MailboxesConfig, String> {
    load_below(HEAD, table, aliases)
}

fn load_below(head: &str, table: &str, aliases: &str) -> Result<MailboxesConfig, String> {
    load_in(&TempDir::new().unwrap(), head, table, aliases)
}

fn load_in(directory: &TempDir, head: &str, table: &str, aliases: &str) -> Result<MailboxesConfig, String> {
    let path = directory.path().join("odmr.toml");
    fs::write(&path, format!("{head}{table}")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(directory.path().join("aliases"), aliases).unwrap();
    let error = |error: ConfigError| error.to_string().replace(&format!("{}/", directory.path().display()), "");
    CustomerConfig::load(&path).map(|customer| customer.mailboxes).map_err(error)
}

/// A table with these additional lines is rejected; line 1 is the first of them.
#[track_caller]
fn check(lines: &str, aliases: &str, place: &str, phrase: &str) {
    let table = "root = \"mail\"\naccept = [\"alice@example.org\", \"bob@example.org\", \"@example.com\"]\n";
    let Err(error) = load(&format!("{table}{lines}\n"), aliases) else { panic!("no error of {lines}") };
    let place = match place.parse::<usize>() {
        Ok(line) => format!("odmr.toml:{}", HEAD.lines().count() + 2 + line),
        Err(_) => place.to_owned(),
    };
    let right = error.starts_with(&format!("{place}: ")) && error.contains(phrase);
    assert!(right, "{lines}\n{aliases}\nwanted: {place}: … {phrase} …\n   got: {error}");
}

#[test]
#[rustfmt::skip]
fn mistakes_in_mailboxes_are_named() {
    let toml = |lines: &str, place: usize, phrase: &str| check(lines, "", &place.to_string(), phrase);
    toml("except = [\"spam\"]", 1, "\"spam\" is not a valid address: write one such as");
    toml("except = [\"@example.com\"]", 1, "is not a valid address");
    toml("except = [\"spam@example.org\"]", 1, "spam@example.org is an exception without effect");
    toml("except = [\n\"alice@example.org\"]", 2, "alice@example.org is in `accept` too");
    toml("except = [\"x@example.com\"]\naliases = { \"X@example.com\" = \"alice\" }", 1, "x@example.com is an alias too (odmr.toml:10): remove one");
    toml("except = [\"x@example.com\"]\naliases = { X = \"alice\" }", 1, "x@example.com is an alias too");
    toml("except = [\"Abuse@example.com\"]", 1, "abuse@example.com must be accepted (RFC 5321 section 4.5.1");
    toml("domain-aliases = { \"example.net\" = \"example.edu\" }", 1, "example.edu has no rules here: add it to `accept`");
    toml("domain-aliases = { \"example.com\" = \"example.org\" }", 1, "example.com has rules, in `accept`");
    toml("domain-aliases = { \"a.example\" = \"example.org\", \"b.example\" = \"a.example\" }", 1, "a.example is itself another name only");
    toml("domain-aliases = { \"a.example\" = \"a.example\" }", 1, "a.example is itself another name only");
    toml("[mailboxes.domain-aliases]\n\"A.example\" = \"example.org\"\n\"a.example\" = \"example.org\"", 3, "a.example occurs a second time here");
    toml("domain-aliases = { \"a.example\" = \"localhost\" }", 1, "has no dot");
    toml("domain-aliases = { localhost = \"example.org\" }", 1, "has no dot");
    toml("separator = \"a\"", 1, "'a' cannot separate a detail from a name");
    toml("separator = \"+@\"", 1, "'@' cannot separate");
    toml("separator = 1", 1, "expected a character such as \"+\"");
    toml("postmaster = \"nobody@example.org\"", 1, "nobody@example.org has no mailbox here (no rule matches it), and `postmaster` must lead to");
    toml("postmaster = \"alice@example.net\"", 1, "alice@example.net has no mailbox here (foreign");
    toml("postmaster = \"alice\"", 1, "is not a valid address");
    toml("umask = \"700\"", 1, "the owner of a mailbox could not use it");
    toml("umask = \"0177\"", 1, "the owner of a mailbox could not use it");
    toml("umask = \"000\"", 1, "every user could change mail");
    toml("umask = \"078\"", 1, "\"078\" is not a valid umask: write octal digits");
    toml("umask = \"77\"", 1, "is not a valid umask");
    toml("umask = 77", 1, "expected octal digits in quotes");
    toml("deliver = \"dovecot\"", 1, "\"dovecot\" is not a valid way to deliver: write \"lmtp:/run/dovecot/lmtp\"");
    toml("deliver = \"lmtp:\"", 1, "is not a valid way to deliver");
    toml("deliver = \"mbox:/var/mail\"", 1, "is not a valid way to deliver");
    toml("deliver = \"smtp:/run/smtp\"", 1, "has a path, and SMTP goes to a host");
    toml("deliver = \"smtp:a:b\"", 1, "\"b\" is not a valid port");
    toml("deliver = \"lmtp:::1\"", 1, "write \"[::1]:24\"");
    toml("deliver = [\"lmtp:a\"]", 1, "a way to deliver such as \"lmtp:/run/dovecot/lmtp\", or a table of them");
    toml("[mailboxes.deliver]\n\"x\" = \"lmtp:a\"", 2, "\"x\" has no dot");
    toml("[mailboxes.deliver]\n\"x\" = \"lmtp:a\"", 2, "or \"*\" for all that have no rule of their own");
    toml("[mailboxes.deliver]\n\"*\" = \"lmtp:a\"\n\"example.net\" = \"lmtp:a\"", 3, "example.net is not one of our domains");
    toml("[mailboxes.deliver]\n\"x@example.net\" = \"lmtp:a\"", 2, "example.net is not one of our domains");
    toml("[mailboxes.deliver]\n\"x@example.org\" = \"lmtp:a\"", 2, "x@example.org is not one of our mailboxes");
    toml("[mailboxes.deliver]\n\"alice+x@example.org\" = \"lmtp:a\"", 2, "is a mailbox with a detail, which goes where the mailbox does: write alice@example.org");
    toml("[mailboxes.deliver]\n\"abuse@example.org\" = \"lmtp:a\"", 2, "mail for abuse@example.org goes to postmaster@example.org");
    toml("[mailboxes.deliver]\n\"a@b@c\" = \"lmtp:a\"", 2, "is not a valid address");
    toml("[mailboxes.deliver]\n\"Example.com\" = \"lmtp:a\"\n\"example.com\" = \"lmtp:b\"", 3, "@example.com occurs a second time here");
    toml("domain-aliases = { \"example.net\" = \"example.org\" }\ndeliver = { \"example.net\" = \"lmtp:a\" }", 2, "example.net is another name of example.org only");
    toml("aliases = { \"x@example.com\" = \"alice\" }\ndeliver = { \"x@example.com\" = \"lmtp:a\" }", 2, "x@example.com gets no mail, as an alias (odmr.toml:9) sends it elsewhere");
    toml("deliver = { \"alice@example.org\" = 5 }", 1, "invalid type: integer `5`, expected a string");
}

#[test]
#[rustfmt::skip]
fn mistakes_in_a_catch_all_are_named() {
    let toml = |lines: &str, place: usize, phrase: &str| check(lines, "list: |/bin/cat", &place.to_string(), phrase);
    toml("catch-all = 5", 1, "expected an address such as \"alice@example.org\", \"postmaster\", or \"create\"");
    toml("catch-all = \"alice\"", 1, "\"alice\" is not a valid address for a catch-all: write an address such as");
    toml("catch-all = { \"example.com\" = \"crate\" }", 1, "\"crate\" is not a valid address for a catch-all");
    toml("catch-all = { \"example.com\" = [\"alice@example.org\"] }", 1, "expected an address such as");
    toml("catch-all = { \"@example.com\" = \"create\" }", 1, "\"@example.com\"");
    toml("catch-all = { \"example.org\" = \"create\" }", 1, "a catch-all for example.org has no effect: it is for the domains that are in `accept` as a whole, and \"@example.org\" is not among them");
    toml("[mailboxes.catch-all]\n\"Example.com\" = \"create\"\n\"example.com\" = \"create\"", 3, "example.com occurs a second time here");
    toml("domain-aliases = { \"a.example\" = \"example.com\" }\ncatch-all = { \"a.example\" = \"create\" }", 2, "a.example is another name of example.com only: write example.com");
    toml("catch-all = { \"example.com\" = \"create\" }\ndeliver = { \"example.com\" = \"lmtp:a\" }", 1, "a catch-all for example.com has no effect, as `deliver` gives all its names to a next hop");
    toml("catch-all = \"carol@example.org\"", 1, "carol@example.org leads to no mailbox here (no rule matches it), and `catch-all` must: name another address");
    toml("catch-all = { \"*\" = \"create\", \"example.com\" = \"alice@example.net\" }", 1, "alice@example.net leads to no mailbox here (foreign");
    toml("except = [\"x@example.com\"]\ncatch-all = \"x@example.com\"", 2, "x@example.com leads to no mailbox here (exception)");
    toml("aliases = { all = [\"alice\", \"dave@w.example\"] }\ncatch-all = \"all@example.com\"", 2, "all@example.com leads to no mailbox here (an alias leads to dave@w.example)");
    toml("alias-file = \"aliases\"\ncatch-all = \"list@example.com\"", 2, "list@example.com leads to no mailbox here (\"|/bin/cat\" is a program)");
}

/// A domain is accepted as a whole, and its postmaster has no mailbox here. The error has the line to write, which is valid
/// as it is.
#[test]
fn a_domain_without_a_postmaster_here_needs_a_catch_all() {
    let line = "catch-all = { \"example.com\" = \"alice@example.com\" }";
    let check = |lines: &str, aliases: &str, place: usize, fault: &str| {
        let phrase = format!(
            "postmaster@example.com gets mail for names without a mailbox, and leads to none ({fault}): below [mailboxes] \
             write {line}, or another address here, or catch-all = \"create\""
        );
        check(lines, aliases, &place.to_string(), &phrase);
        for line in [line, "catch-all = \"create\""] {
            let table = "root = \"mail\"\naccept = [\"alice@example.org\", \"@example.com\"]";
            let lines = lines.replace("catch-all = \"postmaster\"\n", "");
            load(&format!("{table}\n{line}\n{lines}\n"), aliases).unwrap();
        }
    };
    let file = "alias-file = \"aliases\"";
    check("aliases = { postmaster = \"/dev/null\" }", "", 0, "an alias leads to /dev/null");
    check(file, "postmaster: root\nroot: dave@w.example", 0, "an alias leads to dave@w.example");
    check(file, "postmaster: root\nroot: alice, |/bin/cat", 0, "\"|/bin/cat\" is a program");
    check(&format!("catch-all = \"postmaster\"\n{file}"), "postmaster: /dev/null", 1, "an alias leads to /dev/null");
    // One line is enough for several domains.
    let table =
        "root = \"mail\"\naccept = [\"@example.org\",\n\"@example.com\"]\naliases = { postmaster = \"/dev/null\" }\n";
    let (error, line) = (load(table, "").unwrap_err(), "catch-all = { \"*\" = \"alice@example.org\" }");
    let expected =
        format!("(an alias leads to /dev/null), and so in 1 other domains: below [mailboxes] write {line}, or");
    assert!(error.starts_with("odmr.toml:8: postmaster@example.org gets mail") && error.contains(&expected), "{error}");
    load(&format!("{table}{line}\n"), "").unwrap();
    // No catch-all is needed if the file discards such mail, if a next hop gets it, or if postmaster has a mailbox too.
    let good = |lines: &str| {
        let table = format!("root = \"mail\"\naccept = [\"alice@example.org\", \"@example.com\"]\n{file}\n{lines}\n");
        load(&table, "postmaster: no\nno: /dev/null").unwrap();
    };
    good("catch-all = \"no@example.org\"");
    good("deliver = { \"example.com\" = \"lmtp:a\" }");
    good("deliver = \"lmtp:a\"\n");
    good("aliases = { \"postmaster@example.com\" = [\"alice\", \"/dev/null\"] }");
}

#[test]
fn a_default_catch_all_is_noted() {
    let note = |lines: &str| {
        let table = "root = \"mail\"\naccept = [\"alice@example.org\",\n\"@example.com\", \"@example.net\"]\n";
        let mailboxes = load(&format!("{table}{lines}\n"), "").unwrap();
        mailboxes
            .rules
            .catch_all_note()
            .map(|note| (note.source.line.unwrap() - HEAD.lines().count(), note.text.clone()))
    };
    let (line, text) = note("").unwrap();
    let expected = "mail for names without a mailbox goes to postmaster@example.com, and so in 1 other domains; ";
    assert!(line == 3 && text.starts_with(expected), "{line} {text}");
    let (_, text) = note("catch-all = { \"example.com\" = \"create\" }").unwrap();
    assert!(text.starts_with("mail for names without a mailbox goes to postmaster@example.net; "), "{text}");
    for said in ["\"postmaster\"", "\"create\"", "\"alice@example.org\"", "{ \"*\" = \"create\" }"] {
        assert_eq!(note(&format!("catch-all = {said}")), None, "{said}");
    }
    assert_eq!(note("deliver = \"lmtp:a\""), None);
}

#[test]
#[rustfmt::skip]
fn mistakes_in_aliases_are_named() {
    let toml = |lines: &str, place: isize, phrase: &str| {
        check(&format!("[mailboxes.aliases]\n{lines}"), "", &(1 + place).to_string(), phrase);
    };
    toml("\"a b\" = \"alice\"", 1, "\"a b\" is not a valid alias name");
    toml("info = []", 1, "the alias info leads nowhere");
    toml("info = 5", 1, "expected a string, or a list");
    toml("info = [\n\"alice\",\n\"carol\"]", 3, "the alias info leads to carol@example.org, which has no mailbox here (no rule matches it): add it to `accept`");
    toml("info = \"|/bin/cat\"", 1, "\"|/bin/cat\" is a program, and aliases lead to mailboxes here: remove that alias, accept the address itself, and send it to the local mail server");
    toml("info = [\"alice\",\n\"dave@localhost\"]", 2, "is an address at a host without a domain");
    toml("info = \"/var/mail/info\"", 1, "is a file");
    toml("info = \":include:/etc/list\"", 1, "is a list in another file");
    toml("a = \"alice\"\nb = \"c\"\nc = \"d\"\nd = \"b\"", 2, "b -> c -> d -> b: these aliases go in circles");
    toml("postmaster = \"abuse\"", 1, "postmaster -> postmaster@example.org -> postmaster: these aliases go in circles");
    toml("bob = \"bob\"\npostmaster = [\"bob\", \"abuse\"]", 2, "postmaster -> postmaster@example.org -> postmaster: these aliases go in circles");
    toml("\"info@example.org\" = [\"info@example.org\", \"bob\"]", 1, "the alias info@example.org leads to info@example.org, which has no mailbox here");
    toml("\"Info@example.org\" = \"alice\"\n\"info@example.org\" = \"bob\"", 2, "info@example.org is in odmr.toml:10 too");
    toml("\"@localhost\" = \"alice\"", 1, "has no dot");
    let steps = |count: usize| (1..count).fold("a0 = \"alice\"".to_owned(), |text, at| format!("{text}\na{at} = \"a{}\"", at - 1));
    assert!(load(&format!("root = \"mail\"\naccept = [\"alice@example.org\"]\n[mailboxes.aliases]\n{}", steps(10)), "").is_ok());
    toml(&steps(11), 11, "a10 -> a9 -> a8 -> a7 -> a6 -> a5 -> a4 -> a3 -> a2 -> a1: more than 10 steps");
    let list = |count: usize| format!("all = [{}]", (0..count).map(|at| format!("\"u{at}@example.com\",")).collect::<String>());
    assert!(load(&format!("root = \"mail\"\naccept = [\"@example.com\"]\n[mailboxes.aliases]\n{}", list(100)), "").is_ok());
    toml(&list(101), 1, "the alias all leads to more than 100 mailboxes");
    for (alias, name) in [("alice@example.org", "alice@example.org"), ("alice", "alice@example.org"), ("@example.com", "@example.com")] {
        let phrase = format!("{name} is in `accept` and an alias (odmr.toml:10) that keeps all mail from it: remove one");
        toml(&format!("\"{alias}\" = \"bob\""), -1, &phrase);
    }
}

#[test]
#[rustfmt::skip]
fn mistakes_in_the_file_of_aliases_are_named() {
    let file = |aliases: &str, place: &str, phrase: &str| check("alias-file = \"aliases\"", aliases, place, phrase);
    file("root: alice\n\nRoot: bob", "aliases:3", "root is in aliases:1 too: put all targets into one of the two");
    file("a: bob\nroot: alice,\n  carol", "aliases:3", "the alias root leads to carol@example.org, which has no mailbox here");
    file("a: b\nb: a", "aliases:1", "a -> b -> a: these aliases go in circles");
    file("alice: bob", "0", "alice@example.org is in `accept` and an alias (aliases:1)");
    check("alias-file = \"aliases\"\naliases = { root = \"alice\" }", "root: bob", "aliases:1", "root is in odmr.toml:10 too");
    check("alias-file = [\"aliases\", \"aliases\"]", "root: bob", "aliases:1", "root is in aliases:1 too");
    check("alias-file = [\n\"aliases\",\n\"none\"]", "", "3", "the aliases in none cannot be read: No such file");
    check("alias-file = \"\"", "", "1", "is not a valid path");
    check("alias-file = 5", "", "1", "expected a string, or a list of them");
}

/// A line for another mail server must not affect the other aliases.
#[test]
fn aliases_that_are_not_served_are_warnings() {
    let check = |lines: &str, aliases: &str, expected: &[(&str, &str)]| {
        let directory = TempDir::new().unwrap();
        let table = format!(
            "root = \"mail\"\naccept = [\"alice@example.org\", \"bob@example.org\", \"@example.com\"]\n{lines}\n\
             alias-file = \"aliases\"\n"
        );
        let mailboxes = load_in(&directory, HEAD, &table, aliases).unwrap();
        let warnings: Vec<_> = mailboxes.rules.warnings().iter().map(ConfigError::to_string).collect();
        assert_eq!(warnings.len(), expected.len(), "{warnings:?}");
        for (warning, (place, phrase)) in warnings.iter().zip(expected) {
            let warning = warning.replace(&format!("{}/", directory.path().display()), "");
            assert!(warning.starts_with(&format!("{place}: ")) && warning.contains(phrase), "{phrase}\n{warning}");
        }
        assert!(
            mailboxes.rules.explain_typed("root@example.org", &|_| false).unwrap().ends_with("/mail/example.org/alice")
        );
    };
    let root = "\nroot: alice\n";
    check("", &format!("noreply: /dev/null{root}"), &[]);
    let program = "is a program, and aliases lead to mailboxes here: mail for list is deferred with 451; remove that alias, \
                   accept the address itself, ";
    check("", &format!("list: \"|/bin/cat -n, x\"{root}"), &[("aliases:1", program)]);
    check(
        "",
        &format!("x: bob,\n  /var/mail/x, :include:/etc/x{root}"),
        &[("aliases:2", "is a file"), ("aliases:2", "is a list")],
    );
    check(
        "",
        &format!("list: :fail: gone{root}"),
        &[("aliases:1", "write an alias list in `aliases`, which counts in place")],
    );
    let elsewhere = "the alias x leads to dave@example.net, which is not in one of our domains: mail from the provider for it is \
                     deferred with 451, and only mail that is submitted here is sent there; for both, remove that alias";
    check("", &format!("x: bob,\n  dave@example.net{root}"), &[("aliases:2", elsewhere)]);
    check("aliases = { x = \"dave@example.net\" }", root, &[("odmr.toml:9", elsewhere)]);
    // Such a line contradicts no other rule, at any place.
    let served =
        "aliases = { list = \"bob\" }\nexcept = [\"x@example.com\"]\ndeliver = { \"bob@example.org\" = \"lmtp:/x\" }";
    check(
        served,
        &format!("list: |/bin/cat{root}bob: |/bin/cat\nx@example.com: |/bin/cat"),
        &[("aliases:3", "mail for bob is deferred"), ("aliases:4", "mail for x@example.com is deferred")],
    );
    check("", &format!("list: |/bin/cat{root}List: bob"), &[]);
    check(
        "",
        &format!("@example.com: |/bin/cat{root}LIST: list2\nlist2: :include:/x"),
        &[("aliases:1", "mail for @example.com is deferred"), ("aliases:4", "mail for list2 is deferred")],
    );
}

#[test]
fn names_in_domains_that_are_not_asked_for_get_no_mail() {
    fn check(lines: &str, aliases: &str, place: &str, phrase: &str) {
        let head = HEAD.replace("[mailboxes]", "domains = [\"example.org\"]\n[mailboxes]");
        let table = format!("root = \"mail\"\naccept = [\"alice@example.org\"]\n{lines}\n");
        let error = load_below(&head, &table, aliases).unwrap_err();
        assert!(error.starts_with(&format!("{place}: {phrase} can get no mail")), "{error}");
    }
    check("aliases = { \"info@example.com\" = \"alice\" }", "", "odmr.toml:10", "info@example.com");
    check("domain-aliases = { \"example.net\" = \"example.org\" }", "", "odmr.toml:10", "example.net");
    check("alias-file = \"aliases\"", "root: alice\n@example.com: alice", "aliases:2", "@example.com");
}

#[test]
fn every_key_of_mailboxes_is_read() {
    let text = "root = \"/var/mail\"\naccept = [\"@example.org\"]\nexcept = [\"spam@example.org\"]\n\
                aliases = { \"info@example.com\" = \"alice\" }\nalias-file = \"aliases\"\n\
                domain-aliases = { \"example.net\" = \"example.org\" }\nseparator = \"\"\n\
                catch-all = { \"*\" = \"postmaster\" }\npostmaster = \"alice@example.org\"\numask = \"0027\"\nmax-size = \"1KiB\"\n\
                deliver = \"lmtp:run/lmtp\"\n";
    let mailboxes = load(text, "root: alice").unwrap();
    assert_eq!((mailboxes.umask, mailboxes.max_size), (0o027, 1024));
    let domains: Vec<_> = mailboxes.rules.domains().iter().map(Domain::as_str).collect();
    assert_eq!(domains, ["example.org", "example.com", "example.net"]);
    let error = mailboxes.rules.explain_typed("a+b@example.net", &|_| false).unwrap();
    let expected = "a+b@example.net: domain alias of example.org, catch-all @example.org -> lmtp:/";
    assert!(error.starts_with(expected) && error.ends_with("/run/lmtp"), "{error}");
}
