//! The examples of `dist/examples` and the manual page, against the real program.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use nix::unistd::{Group, User, geteuid};

fn source(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// The examples as somebody copies them, in a directory of their own that has everything they name.
struct Copies(tempfile::TempDir);

impl Copies {
    const FILES: [&str; 3] = ["provider.toml", "customers.d/acme.toml", "customer.toml"];

    fn new() -> Copies {
        let copies = Copies(tempfile::tempdir().unwrap());
        // `check` also tries, as root, what the user of the example may read.
        fs::set_permissions(copies.path(""), fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(copies.path("customers.d")).unwrap();
        for name in Self::FILES {
            copies.write(name, &Self::text(name));
        }
        let (certificate, key) = odmr::net::tls::self_signed(&["relay.example.net"]).unwrap();
        copies.write("relay.pem", &certificate);
        copies.write("relay.key", &key);
        copies.write("provider-ca.pem", &certificate);
        for (name, text) in [("acme.recipients", "alice@example.org\n"), ("aliases", "postmaster: alice@example.org\n")]
        {
            fs::write(copies.path(name), text).unwrap();
            fs::set_permissions(copies.path(name), fs::Permissions::from_mode(0o644)).unwrap();
        }
        copies
    }

    /// The text of an example with a user that is there, and with directories that this test may write to.
    fn text(name: &str) -> String {
        let mut user = User::from_uid(geteuid()).unwrap().unwrap();
        if user.uid.is_root() {
            user = User::from_name("nobody").unwrap().unwrap();
        }
        let group = Group::from_gid(user.gid).unwrap().unwrap().name;
        let mut text =
            source(&format!("dist/examples/{name}")).replace("\"/var/", "\"var/").replace("/etc/aliases", "aliases");
        for (key, here) in [("user", &user.name), ("group", &group)] {
            text = text.replace(&format!("{key} = \"odmr\""), &format!("{key} = \"{here}\""));
        }
        text
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o640)).unwrap();
    }

    /// `odmr check` of the provider or of the customer.
    fn check(&self, name: &str) -> Output {
        let name = if name == "customer.toml" { name } else { "provider.toml" };
        Command::new(env!("CARGO_BIN_EXE_odmr")).args(["check", "-c"]).arg(self.path(name)).output().unwrap()
    }
}

#[test]
fn the_examples_are_valid() {
    let copies = Copies::new();
    for name in Copies::FILES {
        let result = copies.check(name);
        assert!(result.status.success(), "{name}: {result:?}");
        let text = source(&format!("dist/examples/{name}"));
        assert!(text.lines().next().unwrap().contains(&format!("/etc/odmr/{name}")), "{name}: where it belongs");
    }
}

/// A key in a comment is one that somebody uncomments.
#[test]
fn each_line_of_the_examples_that_is_commented_out_is_valid() {
    let copies = Copies::new();
    let mut tried = 0;
    for name in Copies::FILES {
        let text = Copies::text(name);
        for (at, _) in text.match_indices("\n# ") {
            let line = text[at + 3..].lines().next().unwrap();
            let Some((key, _)) = line.split_once(" = ") else { continue };
            if key.contains(' ') {
                continue;
            }
            let mut changed = format!("{}{}", &text[..=at], &text[at + 3..]);
            // These two have an effect only with another key.
            if key == "zone" {
                changed = changed.replace("# at = ", "at = ");
            }
            if key == "smarthost-tls" {
                changed = changed.replace("# smarthost = ", "smarthost = ");
            }
            copies.write(name, &changed);
            let result = copies.check(name);
            assert!(result.status.success(), "{name}: {line}: {result:?}");
            tried += 1;
        }
        copies.write(name, &text);
    }
    assert!(tried > 100, "{tried} lines");
}

fn help(arguments: &[&str]) -> String {
    let result = Command::new(env!("CARGO_BIN_EXE_odmr")).args(arguments).output().unwrap();
    assert!(result.status.success(), "{arguments:?}: {result:?}");
    String::from_utf8(result.stdout).unwrap()
}

/// The options that a help text lists, such as `-c` and `--config`.
fn options_in_help(help: &str) -> BTreeSet<String> {
    let listed = help.lines().filter(|line| line.trim_start().starts_with('-'));
    let names = listed.flat_map(|line| line.split_whitespace().take_while(|word| word.starts_with('-')));
    names.map(|name| name.split([',', '=']).next().unwrap().to_owned()).collect()
}

/// The options that a section of the manual page lists.
fn options_in_manual(section: &str) -> BTreeSet<String> {
    let mut options = BTreeSet::new();
    for line in section.lines().filter_map(|line| line.strip_prefix(".It Fl ")) {
        let names = line.split(' ').take_while(|word| !word.starts_with(char::is_uppercase) || word.len() == 1);
        options.extend(names.filter(|word| *word != ",").map(|word| format!("-{}", word.trim_end_matches('='))));
    }
    options
}

/// The subcommands that a help text lists after `words`.
fn subcommands(words: &str, help: &str) -> BTreeSet<String> {
    let rest = help.lines().filter_map(|line| line.strip_prefix(&format!("    {words} ")));
    let names = rest.map(|rest| rest.split(' ').next().unwrap()).filter(|name| !["help", "version"].contains(name));
    names.map(|name| format!("{words} {name}")).collect()
}

#[test]
fn the_manual_page_has_each_subcommand_and_option() {
    let page = source("doc/odmr.8");
    let mut names = subcommands("odmr", &help(&["-h"]));
    // `odmr setup` is two, each with options of its own.
    if names.remove("odmr setup") {
        names.extend(subcommands("odmr setup", &help(&["setup", "-h"])));
    }
    for name in &names {
        let words: Vec<_> = name.split(' ').skip(1).chain(["-h"]).collect();
        let expected = options_in_help(&help(&words));
        let section = page
            .split(&format!("\n.Ss {name}\n"))
            .nth(1)
            .and_then(|rest| rest.split("\n.Ss ").next()?.split("\n.Sh ").next());
        let mut found = options_in_manual(section.unwrap_or_else(|| panic!("doc/odmr.8: there is no {name}")));
        // The page says it once for all.
        found.extend(["-h", "--help"].into_iter().filter(|option| expected.contains(*option)).map(str::to_owned));
        assert_eq!(found, expected, "doc/odmr.8: the options of {name}");
    }
    let documented = page.lines().filter_map(|line| line.strip_prefix(".Ss ")).map(str::to_owned);
    assert_eq!(documented.collect::<BTreeSet<_>>(), names, "doc/odmr.8: the subcommands");
}

/// `exit.rs` says it: the codes of the page are those of the program.
#[test]
fn the_manual_page_has_each_exit_code() {
    let codes = source("src/cli/exit.rs");
    let codes: BTreeSet<_> = codes
        .lines()
        .filter_map(|line| line.trim().strip_suffix(',')?.split_once(" = "))
        .map(|(_, code)| code)
        .collect();
    let page = source("doc/odmr.8");
    let page = page.split("\n.Sh EXIT STATUS\n").nth(1).unwrap().split("\n.Sh ").next().unwrap();
    let documented: BTreeSet<_> =
        page.lines().filter_map(|line| line.strip_prefix(".It ")).filter(|code| *code != "0").collect();
    assert_eq!(documented, codes);
}
