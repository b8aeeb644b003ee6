//! What the program gives up after its start. The tests of files need a Landlock that permits to move files between
//! directories (Linux 5.19); without it they print that, and test nothing.
#![cfg(target_os = "linux")]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::Signal;

use crate::running::{Client, Running};

const OUTSIDE: &str = "it is outside the directories that this process may use since its start: restart it";

/// A directory with others in it: `etc` has the configuration, the others have the files that it names.
struct Place(tempfile::TempDir);

impl Place {
    fn new(directories: &[&str]) -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        directories.iter().for_each(|name| fs::create_dir_all(place.path(name)).unwrap());
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Replaces a file by one with another inode, as editors and certbot do.
    fn write(&self, name: &str, text: &str) {
        fs::write(self.path("new"), text).unwrap();
        fs::set_permissions(self.path("new"), fs::Permissions::from_mode(0o600)).unwrap();
        fs::rename(self.path("new"), self.path(name)).unwrap();
    }

    fn link(&self, name: &str, target: impl AsRef<Path>) {
        let _ = fs::remove_file(self.path(name));
        symlink(target, self.path(name)).unwrap();
    }

    /// A provider with `[tls]` and customers in these directories.
    fn provider(&self, certificate: &str, customers: &str) {
        self.write(
            "etc/odmr.toml",
            &format!(
                "hostname = \"relay.example.net\"\nspool = \"../spool\"\ncustomers = \"{customers}\"\n\
                 [inbound]\nlisten = [\"127.0.0.1:0\"]\n[odmr]\nlisten = [\"127.0.0.1:0\"]\n\
                 [tls]\ncertificate = \"{certificate}/cert.pem\"\nkey = \"{certificate}/key.pem\"\n"
            ),
        );
    }

    /// A new certificate and its key; `number` is in their names.
    fn certificate(&self, directory: &str, number: &str) {
        let key = rcgen::KeyPair::generate().unwrap();
        let parameters = rcgen::CertificateParams::new(vec!["relay.example.net".to_owned()]).unwrap();
        self.write(&format!("{directory}/cert{number}.pem"), &parameters.self_signed(&key).unwrap().pem());
        self.write(&format!("{directory}/key{number}.pem"), &key.serialize_pem());
    }

    fn customer(&self, root: &str, queue: &str) {
        self.write(
            "etc/odmr.toml",
            &format!(
                "hostname = \"mail.example.org\"\n[provider]\naddress = \"127.0.0.1:1\"\ntls = \"none\"\n\
                 name = \"acme\"\nsecret-file = \"../secrets/acme\"\n[schedule]\nevery = \"1h\"\n\
                 [mailboxes]\nroot = \"{root}\"\naccept = [\"@example.org\"]\ncatch-all = \"create\"\n\
                 [outgoing]\nqueue = \"{queue}\"\nlisten = [\"127.0.0.1:0\"]\n"
            ),
        );
        self.write("secrets/acme", "tanstaaftanstaaf\n");
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_odmr"));
        command.args(words).arg(if words[0] == "send" { "-C" } else { "-c" }).arg(self.path("etc/odmr.toml"));
        command
    }

    /// Starts a daemon; `None`: this system has no Landlock.
    fn start(&self, words: &[&str]) -> Option<Running> {
        let mut daemon = Running::start(&mut self.command(words));
        let line = daemon.wait_for("event=confined");
        if line.contains("landlock=none reason=") {
            eprintln!("not tested: {line}");
            return None;
        }
        let abi: u32 = line.rsplit_once("landlock=").unwrap().1.parse().unwrap();
        assert!(abi >= 2, "{line}");
        Some(daemon)
    }

    fn count(&self, directory: &str) -> usize {
        fs::read_dir(self.path(directory)).map_or(0, Iterator::count)
    }
}

fn reload(daemon: &mut Running, word: &str) -> String {
    daemon.signal(Signal::HUP);
    daemon.wait_for(word)
}

#[test]
fn no_thread_gets_new_privileges_and_no_core_is_dumped() {
    let place = Place::new(&["etc", "tls", "customers"]);
    place.provider("../tls", "../customers");
    place.certificate("tls", "");
    // A core dump would be in the working directory.
    let mut shell = Command::new("sh");
    shell.args(["-c", "ulimit -c unlimited; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_odmr"), "serve", "-c"]);
    let mut serve = Running::start(shell.arg(place.path("etc/odmr.toml")).current_dir(place.path("etc")));
    // A greeting shows that the last thread has started.
    let _client = Client::connect(&serve.listening("odmr"));
    let statuses = serve.thread_statuses();
    // Threads: the log, signals, delivery, relay, upkeep, and two listeners.
    assert!(statuses.len() >= 7, "{statuses:?}");
    for status in statuses {
        assert!(status.contains("\nNoNewPrivs:\t1\n"), "{status}");
    }
    serve.signal(Signal::ABORT);
    let status = serve.child.wait().unwrap();
    assert_eq!((status.signal(), status.core_dumped()), (Some(Signal::ABORT.as_raw()), false));
}

#[test]
fn a_provider_may_read_only_the_directories_that_it_has_named_at_the_start() {
    let place = Place::new(&["etc", "live", "archive", "customers", "secrets", "other"]);
    place.provider("../live", "../customers");
    // The layout of certbot.
    place.certificate("archive", "1");
    for name in ["cert", "key"] {
        place.link(&format!("live/{name}.pem"), format!("../archive/{name}1.pem"));
    }
    place.write("customers/acme.toml", "domains = [\"example.org\"]\nsecret-file = \"../secrets/acme\"\n");
    place.write("secrets/acme", "tanstaaftanstaaf\n");
    let Some(mut serve) = place.start(&["serve"]) else { return };
    let inbound = serve.listening("inbound");
    assert!(Client::connect(&inbound).send("a@b.example", "alice@example.org", 1).starts_with("250 "));
    assert_eq!(place.count("spool/domains/example.org/new"), 1);

    // The certificate is renewed, with another target of the link; the files of the customer are replaced; a customer
    // is added.
    place.certificate("archive", "2");
    for name in ["cert", "key"] {
        place.link(&format!("live/{name}.pem"), format!("../archive/{name}2.pem"));
    }
    place.write("secrets/acme", "other-other-other\n");
    place.write("customers/acme.toml", "domains = [\"example.org\"]\nsecret-file = \"../secrets/acme\"\n");
    place.write("customers/beta.toml", "domains = [\"example.com\"]\nsecret-file = \"../secrets/acme\"\n");
    assert!(reload(&mut serve, "event=reloaded").contains("accounts=2 added=1"));

    // The user may read this file, but the process may not.
    place.write("other/secret", "tanstaaftanstaaf\n");
    place.write("customers/gamma.toml", "domains = [\"example.info\"]\nsecret-file = \"../other/secret\"\n");
    let skipped = reload(&mut serve, "event=customer-skipped");
    assert!(skipped.contains("customers/gamma.toml") && skipped.contains(OUTSIDE), "{skipped}");
    place.certificate("other", "");
    place.provider("../other", "../customers");
    let failed = reload(&mut serve, "event=reload-failed");
    assert!(failed.contains("cert.pem: ") && failed.contains(OUTSIDE), "{failed}");
    assert!(failed.ends_with("consequence=\"the old configuration stays in effect\""), "{failed}");
    place.provider("../live", "../other");
    let failed = reload(&mut serve, "event=reload-failed");
    assert!(failed.contains("other cannot be read: ") && failed.contains(OUTSIDE), "{failed}");
    // STARTTLS still works, with the old certificate.
    assert!(Client::connect(&inbound).command("STARTTLS").starts_with("220 "));
    serve.signal(Signal::TERM);
    assert_eq!(serve.exit_code(), Some(0));

    place.provider("../other", "../customers");
    let mut serve = place.start(&["serve"]).unwrap();
    serve.listening("odmr");
}

/// Landlock permits directories, not their names: another directory of the same name is outside, and the error says that.
#[test]
fn a_directory_that_is_replaced_needs_a_restart() {
    let place = Place::new(&["etc", "tls", "customers", "secrets"]);
    place.provider("../tls", "../customers");
    place.certificate("tls", "");
    place.write("secrets/acme", "tanstaaftanstaaf\n");
    place.write("customers/acme.toml", "domains = [\"example.org\"]\nsecret-file = \"../secrets/acme\"\n");
    let Some(mut serve) = place.start(&["serve"]) else { return };
    serve.listening("odmr");
    let replace = |name: &str| {
        fs::create_dir(place.path("anew")).unwrap();
        for entry in fs::read_dir(place.path(name)).unwrap().map(Result::unwrap) {
            fs::copy(entry.path(), place.path("anew").join(entry.file_name())).unwrap();
        }
        fs::rename(place.path(name), place.path(&format!("old-{name}"))).unwrap();
        fs::rename(place.path("anew"), place.path(name)).unwrap();
    };
    replace("secrets");
    let skipped = reload(&mut serve, "event=customer-skipped");
    assert!(skipped.contains("secrets/acme cannot be read: ") && skipped.contains(OUTSIDE), "{skipped}");
    replace("tls");
    let failed = reload(&mut serve, "event=reload-failed");
    assert!(failed.contains("cert.pem: ") && failed.contains(OUTSIDE), "{failed}");
    replace("customers");
    let failed = reload(&mut serve, "event=reload-failed");
    assert!(failed.contains("customers cannot be read: ") && failed.contains(OUTSIDE), "{failed}");
    serve.signal(Signal::TERM);
    assert_eq!(serve.exit_code(), Some(0));
}

#[test]
fn a_directory_that_was_missing_at_the_start_may_be_created_later() {
    let place = Place::new(&["etc", "tls", "customers"]);
    place.provider("../tls", "../customers");
    place.certificate("tls", "");
    place.write("customers/acme.toml", "domains = [\"example.org\"]\nsecret-file = \"../mnt/secret\"\n");
    let Some(mut serve) = place.start(&["serve"]) else { return };
    assert!(serve.wait_for("event=customer-skipped").contains("mnt/secret cannot be read: "));
    fs::create_dir(place.path("mnt")).unwrap();
    place.write("mnt/secret", "tanstaaftanstaaf\n");
    assert!(reload(&mut serve, "event=reloaded").contains("accounts=1 added=1"));
}

#[test]
fn a_spool_may_have_links_to_other_file_systems() {
    let place = Place::new(&["etc", "tls", "customers", "spool/domains", "big/org", "big/outgoing"]);
    place.provider("../tls", "../customers");
    place.certificate("tls", "");
    place.write("customers/acme.toml", "domains = [\"example.org\"]\nsecret = \"tanstaaftanstaaf\"\n");
    place.link("spool/domains/example.org", "../../big/org");
    place.link("spool/outgoing", place.path("big/outgoing"));
    let Some(mut serve) = place.start(&["serve"]) else { return };
    let inbound = serve.listening("inbound");
    assert!(Client::connect(&inbound).send("a@b.example", "alice@example.org", 1).starts_with("250 "));
    assert_eq!(place.count("big/org/new"), 1);
}

#[test]
fn a_customer_writes_mail_only_to_the_targets_of_links_at_the_start() {
    let place = Place::new(&["etc", "secrets", "mail/example.org", "home/alice", "home/bob", "queue", "other"]);
    place.customer("../mail", "../queue");
    place.link("mail/example.org/alice", "../../home/alice");
    let Some(mut daemon) = place.start(&["pull", "--daemon"]) else { return };
    let local = daemon.listening("local");
    for to in ["alice@example.org", "carol@example.org", "dave@elsewhere.example"] {
        let reply = Client::connect(&local).send("eva@example.org", to, 1);
        assert!(reply.starts_with("250 "), "{to}: {reply}");
    }
    let stored = ["home/alice/new", "mail/example.org/carol/new", "queue/new"].map(|name| place.count(name));
    assert_eq!(stored, [1, 1, 1]);
    // A link was created later. The message waits, and each attempt logs the reason.
    place.link("mail/example.org/bob", "../../home/bob");
    let reply = Client::connect(&local).send("eva@example.org", "bob@example.org", 1);
    assert!(reply.starts_with("250 ") && place.count("queue/new") == 2, "{reply}");
    daemon.signal(Signal::USR1);
    assert!(daemon.wait_for("event=storage-failed").contains(OUTSIDE));
    place.customer("../mail", "../other");
    let failed = reload(&mut daemon, "event=reload-failed");
    assert!(failed.contains(&format!("other: {OUTSIDE}")), "{failed}");
    place.customer("../mail", "../queue");
    reload(&mut daemon, "event=reloaded");
    assert!(Client::connect(&local).send("eva@example.org", "alice@example.org", 1).starts_with("250 "));
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.exit_code(), Some(0));

    let mut daemon = place.start(&["pull", "--daemon"]).unwrap();
    // The first call after a restart delivers it.
    daemon.wait_for("to=<bob@example.org> status=sent");
    assert_eq!(place.count("home/bob/new"), 1);
}

#[test]
fn commands_are_confined_too() {
    let place = Place::new(&["etc", "secrets", "mail"]);
    place.customer("../mail", "../queue");
    for words in [&["send", "-v", "bob@example.org"][..], &["pull", "-v"]] {
        let done = place.command(words).env("RUST_LOG", "debug").stdin(Stdio::null()).output().unwrap();
        let log = String::from_utf8(done.stderr).unwrap();
        assert!(log.contains("event=confined landlock="), "{log}");
    }
    assert_eq!(place.count("mail/example.org/bob/new"), 1);
}
