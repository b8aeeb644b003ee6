//! SIGHUP to a provider at work, with the real binary: what changes, and what stays.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use rustix::process::Signal;

use crate::running::{Client, Running};

const PROVIDER: &str = "hostname = \"relay.example.net\"\nspool = \"spool\"\ncustomers = \"customers.d\"\n[inbound]\n\
                        listen = [\"127.0.0.1:0\"]\n[odmr]\nlisten = [\"127.0.0.1:0\"]\nrequire-tls = false\n";

/// A provider's files, and the program when it is started.
struct Place {
    directory: tempfile::TempDir,
    serve: Option<Running>,
    inbound: String,
    odmr: String,
}

impl Place {
    fn new(customers: &[(&str, &str)]) -> Place {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("customers.d")).unwrap();
        let place = Place { directory, serve: None, inbound: String::new(), odmr: String::new() };
        place.write("odmr.toml", PROVIDER);
        customers.iter().for_each(|(name, domains)| place.customer(name, domains));
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn customer(&self, name: &str, domains: &str) {
        let text = format!("domains = [{domains}]\nsecret = \"tanstaaftanstaaf\"\n");
        self.write(&format!("customers.d/{name}.toml"), &text);
    }

    /// Starts the program; returns its log up to the last listener.
    fn start(&mut self) {
        let mut serve = Command::new(env!("CARGO_BIN_EXE_odmr"));
        let mut serve = Running::start(serve.arg("serve").arg("-c").arg(self.path("odmr.toml")));
        (self.inbound, self.odmr) = (serve.listening("inbound"), serve.listening("odmr"));
        self.serve = Some(serve);
    }

    /// Sends SIGHUP, and waits for a line of the log.
    fn reload(&mut self, word: &str) -> String {
        let serve = self.serve.as_mut().unwrap();
        serve.signal(Signal::HUP);
        serve.wait_for(word)
    }

    /// The reply to RCPT in a new session.
    fn rcpt(&self, to: &str) -> String {
        Client::connect(&self.inbound).rcpt(to)
    }
}

#[test]
fn a_reload_adds_and_removes_customers_and_keeps_sessions() {
    let mut place = Place::new(&[("acme", "\"example.org\"")]);
    place.start();
    let mut session = Client::connect(&place.inbound);
    assert!(session.rcpt("alice@example.org").starts_with("250 "));
    assert!(place.rcpt("bob@example.net").starts_with("550 5.7.1 "));
    place.customer("beta", "\"example.net\"");
    let reloaded = place.reload("event=reloaded");
    assert!(reloaded.ends_with("event=reloaded accounts=2 added=1 removed=0 certificate-until=-"), "{reloaded}");
    assert!(place.rcpt("bob@example.net").starts_with("250 "));
    assert!(session.rcpt("alice@example.org").starts_with("250 "), "the session goes on");
    // The customer is removed: its mail stays, and is reported.
    assert!(session.command("DATA").starts_with("354 ") && session.command("x\r\n.").starts_with("250 "));
    fs::remove_file(place.path("customers.d/acme.toml")).unwrap();
    assert!(place.reload("event=reloaded").contains("accounts=1 added=0 removed=1"));
    place.serve.as_mut().unwrap().wait_for("event=mail-without-account domain=example.org messages=1");
    assert!(place.rcpt("alice@example.org").starts_with("550 5.7.1 "));
    assert_eq!(fs::read_dir(place.path("spool/domains/example.org/new")).unwrap().count(), 1);
}

#[test]
fn a_mistake_leaves_what_there_was() {
    let mut place = Place::new(&[("acme", "\"example.org\""), ("beta", "\"example.net\"")]);
    place.start();
    place.write("odmr.toml", "hostname = 1\n");
    place.reload("event=reload-failed");
    assert!(place.rcpt("alice@example.org").starts_with("250 "));
    // The spool stays the one that sessions write to.
    place.write("odmr.toml", &PROVIDER.replace("spool = \"spool\"", "spool = \"other\""));
    place.reload("event=restart-needed");
    assert!(place.rcpt("alice@example.org").starts_with("250 ") && !place.path("other").exists());
    place.write("odmr.toml", PROVIDER);
    place.write("customers.d/acme.toml", "domans = []\n");
    place.customer("gamma", "\"example.com\"");
    let skipped = place.reload("event=customer-skipped");
    assert!(skipped.contains("file=\"acme\"") && skipped.contains("acme.toml:1: "), "{skipped}");
    assert!(place.serve.as_mut().unwrap().wait_for("event=reloaded").contains("accounts=3 added=1 removed=0"));
    for (to, code) in [("alice@example.org", "250 "), ("bob@example.net", "250 "), ("c@example.com", "250 ")] {
        assert!(place.rcpt(to).starts_with(code), "{to}");
    }
    assert!(place.rcpt("d@elsewhere.example").starts_with("451 4.3.5 "), "nothing bounces while a file is skipped");
}

#[test]
fn at_the_start_a_file_with_a_mistake_is_skipped_and_its_mail_does_not_bounce() {
    let mut place = Place::new(&[("beta", "\"example.net\"")]);
    place.write("customers.d/acme.toml", "domains = [\"example.org\"]\n");
    place.start();
    assert!(place.rcpt("bob@example.net").starts_with("250 "));
    assert!(place.rcpt("alice@example.org").starts_with("451 4.3.5 "));
    let mut customer = Client::connect(&place.odmr);
    assert!(customer.command("AUTH CRAM-MD5").starts_with("334 "));
    // "acme " and 32 hexadecimal digits: whether the secret is right cannot be known now.
    assert!(customer.command("YWNtZSAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMA==").starts_with("454 4.7.0 "));
    place.customer("acme", "\"example.org\"");
    assert!(place.reload("event=reloaded").contains("accounts=2 added=1 removed=0"));
    assert!(place.rcpt("alice@example.org").starts_with("250 "));
}
