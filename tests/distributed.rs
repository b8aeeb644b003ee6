//! The examples of `dist/examples`, the manual page and `make install`, with the real program.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use nix::unistd::{Group, User, geteuid};

use crate::project::read;

/// Copies of the examples, in a directory with all files that they name.
struct Copies(tempfile::TempDir);

impl Copies {
    const FILES: [&str; 3] = ["provider.toml", "customers.d/acme.toml", "customer.toml"];

    fn new() -> Copies {
        let copies = Copies(tempfile::tempdir().unwrap());
        // As root, `check` also tests whether the user of the example may read the files.
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

    /// The text of an example, with a user that exists and with directories that this test may write to.
    fn text(name: &str) -> String {
        let mut user = User::from_uid(geteuid()).unwrap().unwrap();
        if user.uid.is_root() {
            user = User::from_name("nobody").unwrap().unwrap();
        }
        let group = Group::from_gid(user.gid).unwrap().unwrap().name;
        let mut text =
            read(format!("dist/examples/{name}")).replace("\"/var/", "\"var/").replace("/etc/aliases", "aliases");
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
        let text = read(format!("dist/examples/{name}"));
        assert!(text.lines().next().unwrap().contains(&format!("/etc/odmr/{name}")), "{name}: where it belongs");
    }
}

/// An administrator may remove the `# ` before any key.
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
            // These have an effect only with another key.
            for (with, other) in [("zone", "at"), ("smarthost-tls", "smarthost"), ("submission-tls", "submission")] {
                if key == with {
                    changed = changed.replace(&format!("# {other} = "), &format!("{other} = "));
                }
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
    let page = read("doc/odmr.8");
    let mut names = subcommands("odmr", &help(&["-h"]));
    // `odmr setup` has two subcommands with different options.
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
        // The page has these once, for all subcommands.
        found.extend(["-h", "--help"].into_iter().filter(|option| expected.contains(*option)).map(str::to_owned));
        assert_eq!(found, expected, "doc/odmr.8: the options of {name}");
    }
    let documented = page.lines().filter_map(|line| line.strip_prefix(".Ss ")).map(str::to_owned);
    assert_eq!(documented.collect::<BTreeSet<_>>(), names, "doc/odmr.8: the subcommands");
}

/// The exit codes of the page are those of `src/sysexit.rs`.
#[test]
fn the_manual_page_has_each_exit_code() {
    let codes = read("src/sysexit.rs");
    let codes: BTreeSet<_> = codes
        .lines()
        .filter_map(|line| line.trim().strip_suffix(',')?.split_once(" = "))
        .map(|(_, code)| code)
        .collect();
    let page = read("doc/odmr.8");
    let page = page.split("\n.Sh EXIT STATUS\n").nth(1).unwrap().split("\n.Sh ").next().unwrap();
    let documented: BTreeSet<_> =
        page.lines().filter_map(|line| line.strip_prefix(".It ")).filter(|code| *code != "0").collect();
    assert_eq!(documented, codes);
}

/// `make` with variables, in the directory of the sources.
fn make(target: &str, variables: &[(&str, &Path)]) -> Output {
    let mut make = Command::new("make");
    // MAKEFLAGS would pass the variables and the parallelism of an outer make to this one.
    make.current_dir(env!("CARGO_MANIFEST_DIR")).env_remove("MAKEFLAGS").env_remove("ODMR").args(["-s", target]);
    make.args(variables.iter().map(|(name, value)| format!("{name}={}", value.display()))).output().unwrap()
}

/// The files below a directory, by their paths from there.
fn files(directory: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(next) = directories.pop() {
        for entry in fs::read_dir(next).unwrap().map(Result::unwrap) {
            match entry.file_type().unwrap().is_dir() {
                true => directories.push(entry.path()),
                false => drop(found.insert(entry.path().strip_prefix(directory).unwrap().to_owned())),
            }
        }
    }
    found
}

/// Without cargo, `make install` installs the program that was built. If there is none, the error says what to type.
#[test]
fn make_installs_and_removes_the_program_that_was_built() {
    let directory = tempfile::tempdir().unwrap();
    let (root, target) = (directory.path().join("root"), directory.path().join("target"));
    let variables = [
        ("DESTDIR", root.as_path()),
        ("PREFIX", Path::new("/opt/odmr")),
        ("CARGO", Path::new("/nonexistent/cargo")),
        ("CARGO_TARGET_DIR", &target),
    ];
    let none = make("install", &variables);
    // The remedy depends on the owner of the sources.
    assert!(!none.status.success() && String::from_utf8_lossy(&none.stdout).starts_with("there is no "), "{none:?}");
    assert!(!root.exists(), "installed without a program");
    fs::create_dir_all(target.join("release")).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_odmr"), target.join("release/odmr")).unwrap();
    // A program of the same name that exists already stays.
    fs::create_dir_all(root.join("opt/odmr/bin")).unwrap();
    fs::write(root.join("opt/odmr/bin/mailq"), "another one").unwrap();
    // The target of a link does not belong to the program: it may be the page of another version, or /dev/null for a masked
    // unit.
    let other = directory.path().join("other");
    fs::write(&other, "another page").unwrap();
    fs::create_dir_all(root.join("opt/odmr/share/man/man8")).unwrap();
    std::os::unix::fs::symlink(&other, root.join("opt/odmr/share/man/man8/odmr.8")).unwrap();
    for _ in 0..2 {
        let done = make("install", &variables);
        assert!(done.status.success(), "{done:?}");
    }
    assert_eq!(fs::read_to_string(&other).unwrap(), "another page");
    let installed = files(&root.join("opt/odmr"));
    let read = |path: &str| fs::read_to_string(root.join("opt/odmr").join(path)).unwrap();
    for path in [
        "bin/odmr",
        "share/man/man8/odmr.8",
        "share/doc/odmr/doc/log.md",
        "share/doc/odmr/examples/customers.d/acme.toml",
    ] {
        assert!(installed.contains(Path::new(path)), "{path}: {installed:?}");
    }
    assert_eq!(fs::read_link(root.join("opt/odmr/sbin/sendmail")).unwrap(), Path::new("../bin/odmr"));
    assert_eq!(read("bin/mailq"), "another one");
    assert!(read("share/doc/odmr/examples/runit/odmr-serve/run").contains("exec /opt/odmr/bin/odmr serve"));
    assert!(read("share/man/man8/odmr.8").contains("/opt/odmr/share/doc/odmr"));
    assert!(read("share/doc/odmr/README.md").contains("](examples/README.md)"));
    if cfg!(target_os = "linux") {
        assert!(read("lib/systemd/system/odmr-serve.service").contains("ExecStart=/opt/odmr/bin/odmr serve"));
    }
    for prefix in ["/opt/my odmr", "/opt/a&b", "opt"] {
        let mut wrong = variables;
        wrong[1].1 = Path::new(prefix);
        let done = make("install", &wrong);
        assert!(!done.status.success() && String::from_utf8_lossy(&done.stderr).contains("PREFIX is "), "{done:?}");
    }
    let done = make("uninstall", &variables);
    assert!(done.status.success(), "{done:?}");
    assert_eq!(files(&root), BTreeSet::from([PathBuf::from("opt/odmr/bin/mailq")]));
}

/// The error names what is missing, and the command to type. cargo and rustc are scripts here.
#[test]
fn make_static_names_what_is_missing() {
    let directory = tempfile::tempdir().unwrap();
    let script = |name: &str, text: &str| {
        fs::write(directory.path().join(name), format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(directory.path().join(name), fs::Permissions::from_mode(0o755)).unwrap();
    };
    let run = |cc: &str| {
        let path = format!("{}:/usr/bin:/bin", directory.path().display());
        let command = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/static");
        let result = Command::new(command).env("PATH", path).env("CARGO", "cargo").env("CC", cc).output().unwrap();
        (result.status.code(), String::from_utf8([result.stdout, result.stderr].concat()).unwrap())
    };
    script("cargo", "echo cargo \"$@\"");
    script("rustc", "echo /nonexistent");
    let (code, text) = run("");
    assert!(code == Some(69) && text.lines().count() == 1, "{text}");
    assert!(text.contains("type `rustup target add ") && text.contains("-unknown-linux-musl`"), "{text}");
    script("rustc", "echo /");
    let (code, text) = run("cc");
    assert!(code == Some(0) && text.contains("cargo build --release --target "), "{text}");
}
