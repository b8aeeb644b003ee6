//! Aliases and the rules for recipients. The input has the form of `testdata/rules`: the table `[mailboxes]`, the file
//! `aliases` after a line `-- aliases --`, and addresses after a line of hyphens, each after `> `.

use std::path::{Component, Path};

use odmr::config::CustomerConfig;
use odmr::mail::address::{ForwardPath, forward_path};
use odmr::recipients::Destination;

use super::check;
use super::config::write;
use super::directory::temporary_directory;

const HEAD: &str = "hostname = \"mail.example.org\"\n[provider]\naddress = \"relay.example.net\"\nname = \"acme\"\n\
                    secret = \"tanstaaftanstaaf\"\n[mailboxes]\n";

const TABLE: &str = "root = \"/var/mail/odmr\"\naccept = [\"alice@example.org\", \"bob@example.org\", \"@example.com\"]\n\
                     alias-file = \"aliases\"\n";

const ADDRESSES: [&str; 6] = [
    "alice@example.org",
    "alice+x@example.org",
    "root@example.com",
    "postmaster",
    "../x@example.com",
    "sales@example.org",
];

pub fn run(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let (rules, typed) = text.split_once("------\n").unwrap_or((&text, ""));
    let (table, aliases) = rules.split_once("-- aliases --\n").unwrap_or(("", rules));
    let table = if table.trim().is_empty() { TABLE } else { table };
    let root = temporary_directory();
    let path = root.path().join("odmr.toml");
    write(&path, format!("{HEAD}{table}").as_bytes());
    write(&root.path().join("aliases"), aliases.as_bytes());
    let config = match CustomerConfig::load(&path) {
        Ok(config) => config,
        Err(error) => return check::shown(&error.to_string()),
    };
    let rules = &config.mailboxes.rules;
    rules.warnings().iter().for_each(|warning| check::shown(&warning.to_string()));
    let typed = typed.lines().filter_map(|line| line.strip_prefix("> ")).take(20);
    for address in typed.chain(ADDRESSES) {
        for exists in [false, true] {
            let explained = rules.explain_typed(address, &|_| exists);
            let Ok((path, used)) = forward_path(format!("<{address}>").as_bytes()) else { continue };
            if used != address.len() + 2 {
                continue;
            }
            let canonical = match path {
                ForwardPath::Mailbox(mailbox) => ForwardPath::Mailbox(mailbox.canonical()),
                path => path,
            };
            let resolved = rules.resolve(&canonical, &|_| exists);
            if address.trim() == address && !address.starts_with('<') {
                assert_eq!(explained.is_ok(), resolved.is_ok(), "{address}");
            }
            match resolved {
                Err(reply) => check::reply(&reply),
                Ok(deliveries) => {
                    assert!((1..=100).contains(&deliveries.len()));
                    for (number, delivery) in deliveries.iter().enumerate() {
                        destination(&delivery.destination, rules.maildir_roots().map(AsRef::as_ref));
                        let is_same = |other: &odmr::recipients::Delivery| {
                            other.destination == delivery.destination && other.mailbox == delivery.mailbox
                        };
                        assert!(!deliveries[..number].iter().any(is_same), "{address} twice");
                    }
                }
            }
        }
    }
}

/// Checks that no address leads out of the directory of mailboxes.
fn destination<'a>(destination: &Destination, mut roots: impl Iterator<Item = &'a Path>) {
    let Destination::Maildir { path, folders: names } = destination else { return };
    let root = roots.find(|root| path.starts_with(root)).unwrap_or_else(|| panic!("{}", path.display()));
    let below = path.strip_prefix(root).expect("a path below its root");
    assert!(below.components().all(|part| matches!(part, Component::Normal(_))), "{}", path.display());
    assert!(below.components().all(|part| part.as_os_str().len() <= 255), "{}", path.display());
    assert!(names.iter().all(|name| !name.is_empty() && !name.contains(['/', '.', '\0'])), "{names:?}");
}
