//! `odmr setup` and `odmr customer`: from nothing to the first message, and their errors.
//!
//! If root runs the tests, the commands run as nobody, except in the tests of files that root creates.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use nix::unistd::{Uid, User};

use crate::running::{Client, Running};

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        fs::set_permissions(place.0.path(), fs::Permissions::from_mode(0o755)).unwrap();
        if is_root() {
            let nobody = nobody();
            chown(place.0.path(), Some(nobody.uid.as_raw()), Some(nobody.gid.as_raw())).unwrap();
        }
        place
    }

    /// A directory with the files of a provider that listens on loopback.
    fn with_provider() -> Place {
        let place = Place::new();
        place.good(&["setup", "provider", "relay.example.net", "-c", "p/provider.toml"]);
        place.on_loopback("p/provider.toml");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    /// Writes a file that belongs to the user of the commands.
    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
        if is_root() {
            chown(self.path(name), Some(nobody().uid.as_raw()), Some(nobody().gid.as_raw())).unwrap();
        }
    }

    fn on_loopback(&self, config: &str) {
        let text = self.text(config);
        let ports = ["[::]:25", "[::]:366", "[::]:2525", "[::]:3660"];
        let text = ports.iter().fold(text, |text, port| text.replace(&format!("\"{port}\""), "\"127.0.0.1:0\""));
        fs::write(self.path(config), text).unwrap();
    }

    /// A command that does not run as root.
    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_odmr"));
        command.args(words).current_dir(self.0.path()).env_remove("RUST_LOG").stdin(Stdio::null());
        if is_root() {
            command.uid(nobody().uid.as_raw()).gid(nobody().gid.as_raw());
        }
        command
    }

    /// Runs a command as root, with this umask.
    fn as_root(&self, umask: &str, words: &[&str]) -> Output {
        let mut command = Command::new("sh");
        command.arg("-c").arg(format!("umask {umask}; exec \"$@\"")).arg("sh").arg(env!("CARGO_BIN_EXE_odmr"));
        command.args(words).current_dir(self.0.path()).stdin(Stdio::null()).output().unwrap()
    }

    fn good(&self, words: &[&str]) -> String {
        good(&self.command(words).output().unwrap())
    }

    /// Runs a command, which must fail with this exit code and this part of the error, and print nothing else.
    fn bad(&self, words: &[&str], code: i32, part: &str) {
        let done = self.command(words).output().unwrap();
        let error = text_of(&done.stderr);
        assert!(done.status.code() == Some(code) && error.contains(part), "{words:?}: {:?} {error}", done.status);
        assert!(error.lines().count() == 1 && done.stdout.is_empty(), "{words:?}: {error}");
    }

    fn serve(&self) -> Running {
        Running::start(&mut self.command(&["serve", "-c", "p/provider.toml"]))
    }

    /// `odmr customer -c p/provider.toml`.
    fn customer(&self, words: &[&str]) -> Output {
        self.command(&[&["customer", "-c", "p/provider.toml"], words].concat()).output().unwrap()
    }

    fn customers(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("p/customers.d")).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// The mode of a file, and its user and group.
    fn mode(&self, name: &str) -> (u32, u32, u32) {
        let found = fs::symlink_metadata(self.path(name)).unwrap();
        (found.mode() & 0o7777, found.uid(), found.gid())
    }
}

fn is_root() -> bool {
    Uid::effective().is_root()
}

fn nobody() -> User {
    User::from_name("nobody").unwrap().unwrap()
}

fn text_of(octets: &[u8]) -> String {
    String::from_utf8(octets.to_vec()).unwrap()
}

fn good(done: &Output) -> String {
    assert!(done.status.success(), "{:?} {} {}", done.status, text_of(&done.stdout), text_of(&done.stderr));
    text_of(&done.stdout)
}

fn value(text: &str, key: &str) -> String {
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{key} = \"")));
    line.unwrap_or_else(|| panic!("no {key} in {text}")).trim_end_matches('"').to_owned()
}

#[test]
fn from_nothing_to_the_first_message() {
    let place = Place::new();
    let made = place.good(&["setup", "provider", "Relay.Example.NET.", "-c", "p/provider.toml"]);
    for part in [
        "made p/customers.d\n",
        "made p/provider.key\n",
        "2525 and 3660",
        "    odmr check -c p/provider.toml --dns\n    odmr serve -c p/provider.toml &\n",
        "    odmr customer -c p/provider.toml add acme example.org >acme.toml\n",
    ] {
        assert!(made.contains(part), "{made}");
    }
    assert!(place.text("p/provider.toml").contains("\nhostname = \"relay.example.net\"\n"));
    assert_eq!((place.mode("p/provider.key").0, place.mode("p/spool").0), (0o600, 0o700));
    // Two lines, the pin and the summary: there is no warning.
    let checked = place.good(&["check", "-c", "p/provider.toml"]);
    assert!(checked.lines().count() == 2 && checked.contains(": good: a provider with 0 customers"), "{checked}");

    place.on_loopback("p/provider.toml");
    let mut serve = place.serve();
    let (inbound, odmr) = (serve.listening("inbound"), serve.listening("odmr"));
    let added = place.customer(&["add", "acme", "Example.ORG", "bücher.example"]);
    let (block, report) = (good(&added), text_of(&added.stderr));
    assert!(report.contains("p/customers.d/acme.toml is made, and the running `odmr serve` has read it."), "{report}");
    assert!(report.contains("odmr setup customer acme.toml"), "{report}");
    assert!(serve.wait_for("event=reloaded").contains("accounts=1 added=1"));
    let (account, secret) = (place.text("p/customers.d/acme.toml"), value(&block, "secret"));
    assert!(account.contains("domains = [\"example.org\", \"xn--bcher-kva.example\"]"), "{account}");
    assert!(account.contains("scram = \"SCRAM-SHA-256$") && !account.contains(&secret), "{account}");
    assert_eq!(place.mode("p/customers.d/acme.toml").0, 0o640);
    assert!(block.contains("accept = [\"@example.org\", \"@xn--bcher-kva.example\"]"), "{block}");
    assert!(block.contains("pin = \"spki-sha256:") && !report.contains(&secret), "{block}{report}");

    let block = block.replace("relay.example.net:366", &odmr).replace("127.0.0.1:587", "127.0.0.1:5870");
    let mut setup = place.command(&["setup", "customer", "-", "-c", "c/customer.toml"]);
    let mut child = setup.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(block.as_bytes()).unwrap();
    let made = good(&child.wait_with_output().unwrap());
    assert!(made.contains("    odmr check -c c/customer.toml --call "), "{made}");
    // Every user may read it, to send mail; the secret is in another file.
    let config = place.text("c/customer.toml");
    assert!(config.contains("secret-file = \"customer.secret\"\n") && !config.contains(&secret), "{config}");
    let modes = ["c/customer.toml", "c/customer.secret", "c/mail/example.org/postmaster/tmp"];
    assert_eq!(modes.map(|name| place.mode(name).0), [0o644, 0o600, 0o700]);
    let checked = place.good(&["check", "-c", "c/customer.toml", "--call"]);
    assert!(checked.contains("domains: example.org, xn--bcher-kva.example\n"), "{checked}");
    assert!(checked.lines().count() == 2, "{checked}");

    assert!(Client::connect(&inbound).send("a@b.example", "anybody@example.org", 1).starts_with("250 "));
    let pulled = place.good(&["pull", "-c", "c/customer.toml"]);
    assert!(pulled.starts_with("1 message"), "{pulled}");
    assert_eq!(fs::read_dir(place.path("c/mail/example.org/postmaster/new")).unwrap().count(), 1);
}

#[test]
fn a_customer_is_listed_shown_and_removed_and_its_mail_stays() {
    let place = Place::with_provider();
    let none = place.customer(&["list"]);
    assert!(good(&none).is_empty() && text_of(&none.stderr).contains("add NAME DOMAIN"));
    let mut serve = place.serve();
    let inbound = serve.listening("inbound");
    let secret = value(&good(&place.customer(&["add", "acme", "example.org"])), "secret");
    let pin = format!("spki-sha256:{}", "0123456789abcdef".repeat(4));
    let of_beta = place.customer(&["add", "beta", "example.com", "example.net", "--pin", &pin]);
    let block = good(&of_beta);
    assert!(block.contains("key = \"customer.key\"\n") && !block.contains("secret"), "{block}");
    assert!(!text_of(&of_beta.stderr).contains("secret"));
    assert_eq!(good(&place.customer(&["list"])), "acme  example.org\nbeta  example.com, example.net\n");

    let shown = good(&place.customer(&["show", "acme"]));
    assert!(shown.contains("relay = true\n") && shown.contains("\nname = \"acme\"\n"), "{shown}");
    assert!(!shown.contains(&secret) && shown.contains("`odmr secret acme -c FILE`"), "{shown}");
    let verifier = place.text("p/customers.d/acme.toml").split('$').next_back().unwrap().to_owned();
    assert!(!shown.contains(&verifier[..40]), "{shown}");
    assert!(good(&place.customer(&["show", "beta"])).contains(&pin));

    for _ in 0..2 {
        assert!(Client::connect(&inbound).send("a@b.example", "x@example.org", 1).starts_with("250 "));
    }
    let removed = good(&place.customer(&["remove", "acme"]));
    assert!(removed.contains("acme.toml is removed, and the running `odmr serve` has read it."), "{removed}");
    assert!(removed.contains("Held for example.org: 2 messages. That stays"), "{removed}");
    assert!(serve.wait_for("removed=1").contains("event=reloaded accounts=1"));
    assert_eq!(place.customers(), ["beta.toml"]);
    assert!(Client::connect(&inbound).rcpt("x@example.org").starts_with("550 "));
    // The next customer of the domain gets the mail.
    let again = text_of(&place.customer(&["add", "gamma", "example.org"]).stderr);
    assert!(again.contains("Held for example.org already: 2 messages. gamma gets that."), "{again}");
    assert_eq!(fs::read_dir(place.path("p/spool/domains/example.org/new")).unwrap().count(), 2);

    // A file with a mistake is removed too.
    place.write("p/customers.d/beta.toml", "domans = []\n");
    let listed = place.customer(&["list"]);
    assert!(good(&listed) == "gamma  example.org\n" && text_of(&listed.stderr).contains("beta.toml:1: "));
    assert!(good(&place.customer(&["remove", "beta"])).contains("had a mistake"));
}

#[test]
fn without_a_daemon_a_change_waits_for_its_start() {
    let place = Place::with_provider();
    fs::remove_dir(place.path("p/customers.d")).unwrap();
    let added = place.customer(&["add", "acme", "example.org"]);
    good(&added);
    assert!(text_of(&added.stderr).contains("no `odmr serve` runs here now: the next one reads it."));
    // The directory was missing, and has been created.
    assert_eq!((place.mode("p/customers.d").0, place.customers()), (0o750, vec!["acme.toml".to_owned()]));
    // A `serve` that is killed leaves its socket.
    let mut serve = place.serve();
    serve.listening("odmr");
    serve.child.kill().unwrap();
    serve.child.wait().unwrap();
    assert!(place.path("p/spool/.wake").exists());
    assert!(good(&place.customer(&["remove", "acme"])).contains("no `odmr serve` runs here now"));
}

#[test]
fn the_command_reports_an_error_of_the_reload() {
    let place = Place::with_provider();
    good(&place.customer(&["add", "acme", "example.org"]));
    let mut serve = place.serve();
    serve.listening("odmr");
    // The daemon may have an error that the command does not have; here the certificate is missing.
    fs::rename(place.path("p/provider.pem"), place.path("p/old.pem")).unwrap();
    let removed = good(&place.customer(&["remove", "acme"]));
    assert!(removed.contains("keeps its old configuration") && removed.contains("provider.pem"), "{removed}");
    serve.wait_for("event=reload-failed");
}

#[test]
fn no_customer_is_added_if_its_secret_cannot_be_printed() {
    let place = Place::with_provider();
    let add = || place.command(&["customer", "-c", "p/provider.toml", "add", "acme", "example.org"]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let ended = add().stdout(writer).output().unwrap();
    assert_eq!(ended.status.code(), Some(74), "{ended:?}");
    if let Ok(full) = fs::File::options().write(true).open("/dev/full") {
        let full = add().stdout(full).output().unwrap();
        assert!(
            full.status.code() == Some(74) && text_of(&full.stderr).contains("there is no new customer"),
            "{full:?}"
        );
    }
    assert!(place.customers().is_empty());
}

#[test]
fn of_commands_that_add_a_domain_at_the_same_time_one_succeeds() {
    let place = Place::with_provider();
    for round in 0..5 {
        let names = ["a", "b", "c"].map(|name| format!("{name}{round}"));
        let domain = format!("d{round}.example");
        if round == 0 {
            // The commands of the first round create the directory.
            fs::remove_dir(place.path("p/customers.d")).unwrap();
        }
        let children = names.each_ref().map(|name| {
            let mut command = place.command(&["customer", "-c", "p/provider.toml", "add", name, &domain]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        });
        let done = children.map(|child| child.wait_with_output().unwrap());
        assert_eq!(done.iter().filter(|done| done.status.success()).count(), 1, "{done:?}");
        for other in done.iter().filter(|done| !done.status.success()) {
            assert!(other.status.code() == Some(65) && other.stdout.is_empty(), "{other:?}");
            assert!(text_of(&other.stderr).contains(&format!("{domain} is a domain of ")), "{other:?}");
        }
    }
    assert_eq!(place.customers().len(), 5);
}

#[test]
fn errors_of_customer_add_change_nothing() {
    let place = Place::with_provider();
    good(&place.customer(&["add", "acme", "example.org"]));
    let bad = |words: &[&str], code: i32, part: &str| {
        place.bad(&[&["customer", "-c", "p/provider.toml"], words].concat(), code, part);
    };
    bad(&[], 64, "add, list, show or remove; try `odmr customer -h`");
    bad(&["ad"], 64, "there are add, list, show and remove");
    bad(&["add", "beta"], 64, "add acme example.org >acme.toml");
    bad(&["list", "--pin", "x"], 64, "--pin is for add");
    bad(&["show"], 64, "needs the name of one customer");
    bad(&["list", "acme"], 64, "list");
    bad(&["add", "../beta", "example.com"], 65, "is not a valid name of a customer");
    bad(&["add", "beta", "user@example.com"], 65, "type `odmr customer -c p/provider.toml add beta example.com`");
    bad(&["add", "beta", "example.com", "EXAMPLE.com."], 65, "example.com is given twice");
    bad(
        &["add", "beta", "example.com", "Example.org"],
        65,
        "example.org is a domain of acme (p/customers.d/acme.toml)",
    );
    bad(&["add", "beta", "example.com", "--pin", "sha256:12"], 65, "is not a pin");
    bad(&["add", "acme", "example.com"], 73, "p/customers.d/acme.toml exists");
    bad(&["show", "beta"], 65, "`odmr customer -c p/provider.toml list` shows them");
    bad(&["remove", "../provider"], 65, "there is no customer");
    place.write("p/customers.d/zeta.toml", "domains = [\"example.com\"]\n");
    bad(&["add", "beta", "example.com"], 78, "zeta.toml: `secret` is missing");
    bad(&["show", "zeta"], 78, "zeta.toml: ");
    place.bad(&["customer", "-c", "nothing.toml", "list"], 78, "nothing.toml: ");
    place.bad(&["customer", "-c", "nothing.toml", "remove", "acme"], 78, "nothing.toml: ");
    place.bad(&["customer", "-c", "nothing.toml", "add", "acme", "example.org"], 78, "nothing.toml: ");
    assert_eq!(place.customers(), ["acme.toml", "zeta.toml"]);
}

/// `mail.` before the longest domain would not be a valid name. The port of a listener on loopback cannot be called from
/// another machine.
#[test]
fn a_block_is_good_for_the_longest_domain_and_any_listener() {
    let place = Place::with_provider();
    let text = place.text("p/provider.toml");
    let listen = "listen = [\"127.0.0.1:0\", \"127.0.0.1:10366\", \"[::]:367\", \"192.0.2.1:368\"]";
    let at = text.rfind("listen = ").unwrap();
    place.write("p/provider.toml", &(text[..at].to_owned() + listen));
    let domain = format!("{}example", format!("{}.", "a".repeat(60)).repeat(4));
    let block = good(&place.customer(&["add", "acme", &domain]));
    assert_eq!((value(&block, "address"), value(&block, "hostname")), ("relay.example.net:367".to_owned(), domain));
    place.write("acme.toml", &block);
    place.good(&["setup", "customer", "acme.toml", "-c", "c/customer.toml"]);
}

/// A block of unknown origin must not name files that root would read.
#[test]
fn a_block_has_the_keys_that_a_provider_prints_and_no_others() {
    let place = Place::with_provider();
    let block = good(&place.customer(&["add", "acme", "example.org"]));
    let bad = |block: &str, code: i32, part: &str| {
        place.write("acme.toml", block);
        place.bad(&["setup", "customer", "acme.toml", "-c", "c/customer.toml"], code, part);
        assert!(!place.path("c").exists());
    };
    let with = |from: &str, to: &str| {
        assert!(block.contains(from));
        block.replace(from, to)
    };
    bad(
        &with("secret = ", "secret-file = "),
        78,
        "acme.toml:10: `secret-file` is not in what `odmr customer add` prints",
    );
    bad(&with("catch-all = ", "alias-file = "), 78, "acme.toml:17: `alias-file` is not");
    bad(&with("[outgoing]", "[limits]"), 78, "`limits` is not");
    bad(&with("[provider]", "[[provider]]"), 78, "write one table [provider]");
    bad(&with("tls = \"starttls\"", "tls = \"tsl\""), 78, "acme.toml:7: \"tsl\"");
    bad(&place.text("p/provider.toml"), 78, "name the file that `odmr customer add` has printed");
    bad("> hostname = \"x.example\"\n", 78, "acme.toml:1: ");
    bad("", 78, "name the file that `odmr customer add` has printed");
    place.bad(&["setup", "customer", "beta.toml", "-c", "c/customer.toml"], 66, "beta.toml: No such file");
    place.bad(&["setup", "customer", ".", "-c", "c/customer.toml"], 66, "type the name of the file");
    place.bad(&["setup", "customer"], 64, "FILE is missing");
}

#[test]
fn a_certificate_on_request_and_for_an_account_without_a_secret() {
    let place = Place::with_provider();
    place.write("acme.toml", &good(&place.customer(&["add", "acme", "example.org"])));
    let made = place.good(&["setup", "customer", "acme.toml", "-c", "c/customer.toml", "--certificate"]);
    let pin = made.split("certificate = [\"").nth(1).unwrap().split('"').next().unwrap();
    assert!(made.contains("In customers.d/acme.toml there:") && made.contains("acme.toml has the secret"), "{made}");
    assert_eq!(place.mode("c/customer.key").0, 0o600);
    let checked = place.good(&["check", "-c", "c/customer.toml"]);
    assert!(checked.contains(pin), "{checked}");
    // The provider knows the pin of the key that exists already, so that key is used.
    fs::create_dir(place.path("d")).unwrap();
    for name in ["customer.key", "customer.pem"] {
        place.write(&format!("d/{name}"), &place.text(&format!("c/{name}")));
        fs::set_permissions(place.path(&format!("d/{name}")), fs::Permissions::from_mode(0o600)).unwrap();
    }
    if is_root() {
        chown(place.path("d"), Some(nobody().uid.as_raw()), None).unwrap();
    }
    place.write("beta.toml", &good(&place.customer(&["add", "beta", "example.com", "--pin", pin])));
    let made = place.good(&["setup", "customer", "beta.toml", "-c", "d/customer.toml"]);
    assert!(made.contains(pin) && !made.contains("made d/customer.key") && !made.contains("secret"), "{made}");
    assert!(place.good(&["check", "-c", "d/customer.toml"]).contains(pin));
}

/// Each case is the state after a crash at another step.
#[test]
fn a_run_that_was_interrupted_can_be_repeated() {
    let place = Place::with_provider();
    place.write("acme.toml", &good(&place.customer(&["add", "acme", "example.org"])));
    let setup = ["setup", "customer", "acme.toml", "-c", "c/customer.toml", "--certificate"];
    place.good(&setup);
    let [certificate, key] = ["p/provider.pem", "p/provider.key"].map(|name| place.text(name));
    let before = [place.text("c/customer.toml"), place.text("c/customer.key")];
    for lost in [
        &["p/provider.toml", "c/customer.toml"][..],
        &["p/provider.toml", "p/provider.pem", "c/customer.toml", "c/customer.pem"],
        &["p/provider.toml", "p/spool", "c/customer.toml", "c/outgoing"],
        &["p/provider.toml", "p/customers.d", "c/customer.toml", "c/mail"],
        &["c/customer.toml", "c/customer.secret"],
    ] {
        for lost in lost.iter().map(|name| place.path(name)) {
            if lost.is_dir() { fs::remove_dir_all(lost).unwrap() } else { fs::remove_file(lost).unwrap() }
        }
        if !place.path("p/provider.toml").exists() {
            place.good(&["setup", "provider", "relay.example.net", "-c", "p/provider.toml"]);
        }
        place.good(&setup);
        place.good(&["check", "-c", "p/provider.toml"]);
        place.good(&["check", "-c", "c/customer.toml"]);
        assert_eq!([place.text("c/customer.toml"), place.text("c/customer.key")], before, "{lost:?}");
        // The key must not change, because customers have its pin.
        assert_eq!(place.text("p/provider.key"), key, "{lost:?}");
    }
    assert_ne!(place.text("p/provider.pem"), certificate);
    // All files exist.
    place.bad(&["setup", "provider", "relay.example.net", "-c", "p/provider.toml"], 73, "is not overwritten");
    place.bad(&setup, 73, "is not overwritten");
    // Files of another set-up are not overwritten.
    fs::remove_file(place.path("c/customer.toml")).unwrap();
    place.write("c/customer.secret", "another\n");
    place.bad(&setup, 73, "c/customer.secret exists, with another secret");
    fs::remove_file(place.path("p/provider.toml")).unwrap();
    place.bad(
        &["setup", "provider", "mx.example.net", "-c", "p/provider.toml"],
        78,
        "is for relay.example.net and not for",
    );
    assert!(!place.path("p/provider.toml").exists() && !place.path("c/customer.toml").exists());
}

#[test]
fn errors_of_setup_name_what_is_wrong() {
    let place = Place::with_provider();
    let given = ["--certificate", "p/provider.pem", "--key", "p/provider.key", "-c", "q/provider.toml"];
    let bad = |words: &[&str], code: i32, part: &str| place.bad(&[&["setup"], words].concat(), code, part);
    bad(&[], 64, "`odmr setup provider HOSTNAME`, or `odmr setup customer FILE`");
    bad(&["both"], 64, "there is no \"both\" to set up");
    bad(&["provider"], 64, "HOSTNAME is missing");
    bad(&["provider", "a.example", "b.example"], 64, "too many arguments");
    bad(&["provider", "https://relay.example.net/"], 65, "is a URL: type `odmr setup provider relay.example.net`");
    bad(&["provider", "relay"], 65, "has no dot");
    bad(&["provider", "relay.example.net", "--key", "x"], 64, "belong together");
    bad(&["provider", "relay.example.net", "--user", "mail"], 77, "only root");
    bad(
        &[&["provider", "mx.example.net"], &given[..]].concat(),
        78,
        "is for relay.example.net and not for mx.example.net",
    );
    place.write("file", "");
    bad(&["provider", "relay.example.net", "-c", "file/provider.toml"], 73, "file: ");
    assert!(!place.path("q").exists());
    place.good(&[&["setup", "provider", "relay.example.net"], &given[..]].concat());
    assert!(!place.path("q/provider.key").exists());
    place.good(&["check", "-c", "q/provider.toml"]);
    for words in [&["setup", "-h"][..], &["setup", "provider", "-h"], &["setup", "customer", "-h"], &["customer", "-h"]]
    {
        assert!(place.good(words).contains("odmr "), "{words:?}");
    }
}

/// With any umask the user can read the files, and other users cannot read the secrets.
#[test]
fn files_that_root_creates_belong_to_the_user() {
    if !is_root() {
        return;
    }
    let user = nobody();
    let (uid, gid) = (user.uid.as_raw(), user.gid.as_raw());
    for umask in ["0777", "0"] {
        let place = Place::new();
        let setup = ["--user", "nobody", "--spool", "var/spool", "-c", "etc/provider.toml"];
        let made = good(&place.as_root(umask, &[&["setup", "provider", "relay.example.net"], &setup[..]].concat()));
        assert!(!made.contains("the user") && !made.contains("2525"), "{made}");
        place.on_loopback("etc/provider.toml");
        let add = ["customer", "-c", "etc/provider.toml", "add", "acme", "example.org"];
        let block = good(&place.as_root(umask, &add));
        let root = place.path("mail").display().to_string();
        let block = block.replace("/var/mail/odmr", &root).replace("/var/spool/odmr-out", &(root + "-out"));
        place.write("acme.toml", &block);
        let setup = ["setup", "customer", "acme.toml", "--user", "nobody", "-c", "etc/customer.toml", "--certificate"];
        good(&place.as_root(umask, &setup));
        for (name, expected) in [
            ("etc", (0o755, 0, gid)),
            ("etc/provider.toml", (0o640, 0, gid)),
            ("etc/provider.key", (0o640, 0, gid)),
            ("etc/provider.pem", (0o644, 0, gid)),
            ("etc/customers.d", (0o750, 0, gid)),
            ("etc/customers.d/acme.toml", (0o640, 0, gid)),
            ("var", (0o755, 0, 0)),
            ("var/spool", (0o700, uid, gid)),
            ("etc/customer.toml", (0o644, 0, gid)),
            ("etc/customer.secret", (0o640, 0, gid)),
            ("etc/customer.key", (0o640, 0, gid)),
            ("mail", (0o700, uid, gid)),
            ("mail/example.org", (0o700, uid, gid)),
            ("mail/example.org/postmaster/new", (0o700, uid, gid)),
            ("mail-out", (0o700, uid, gid)),
        ] {
            assert_eq!(place.mode(name), expected, "{name} with umask {umask}");
        }
        for config in ["etc/provider.toml", "etc/customer.toml"] {
            let checked = good(&place.as_root(umask, &["check", "-c", config]));
            assert_eq!(checked.lines().count(), 2, "{checked}");
        }
        // A spool of another user is an error.
        fs::remove_file(place.path("etc/provider.toml")).unwrap();
        chown(place.path("var/spool"), Some(0), None).unwrap();
        let setup = [
            "setup",
            "provider",
            "relay.example.net",
            "--user",
            "nobody",
            "--spool",
            "var/spool",
            "-c",
            "etc/provider.toml",
        ];
        let failed = place.as_root(umask, &setup);
        let error = text_of(&failed.stderr);
        assert!(failed.status.code() == Some(73) && error.contains("chown -R nobody "), "{error}");
    }
}
