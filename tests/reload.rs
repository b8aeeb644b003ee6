//! SIGHUP to a running daemon: what changes, and what stays.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::running::{Client, Running};

const PROVIDER: &str = "hostname = \"relay.example.net\"\nspool = \"spool\"\ncustomers = \"customers.d\"\n[inbound]\n\
                        listen = [\"127.0.0.1:0\"]\n[odmr]\nlisten = [\"127.0.0.1:0\"]\nrequire-tls = false\n";

const SECRET: &str = "tanstaaftanstaaf";

/// A provider's files, and the program after its start.
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
        let text = format!("domains = [{domains}]\nsecret = \"{SECRET}\"\n");
        self.write(&format!("customers.d/{name}.toml"), &text);
    }

    /// Starts the program, and waits for its listeners.
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

/// `odmr customer add` cannot wake a process that is still starting.
#[test]
fn a_customer_that_is_added_during_the_start_is_known() {
    let (certificate, key) = odmr::net::tls::self_signed(&["relay.example.net"]).unwrap();
    let tls = "[tls]\ncertificate = \"relay.pem\"\nkey = \"relay.key\"\n[relay]\nresolver = \"127.0.0.1:1\"\n";
    for delay in 0..10 {
        let mut place = Place::new(&[("acme", "\"example.org\"")]);
        place.write("relay.pem", &certificate);
        place.write("relay.key", &key);
        place.write("odmr.toml", &format!("{PROVIDER}{tls}"));
        let (config, pin) = (place.path("odmr.toml"), format!("spki-sha256:{}", "0".repeat(64)));
        let add = thread::spawn(move || {
            thread::sleep(Duration::from_millis(delay * 2));
            let mut add = Command::new(env!("CARGO_BIN_EXE_odmr"));
            add.args(["customer", "add", "beta", "example.net", "--pin", &pin, "-c"]).arg(config).output().unwrap()
        });
        place.start();
        let added = add.join().unwrap();
        let report = String::from_utf8_lossy(&added.stderr);
        let is_clear = report.contains("`odmr serve` has read it") || report.contains("no `odmr serve` runs here now");
        assert!(added.status.success() && is_clear, "{delay}: {report}");
        let end = Instant::now() + Duration::from_secs(5);
        while !place.rcpt("bob@example.net").starts_with("250 ") {
            assert!(Instant::now() < end, "{delay}: {added:?}");
        }
    }
}

/// A reload that is under way may have begun before the customer was added: its result does not count.
#[test]
fn the_result_of_a_reload_under_way_is_not_that_of_a_new_customer() {
    let (certificate, key) = odmr::net::tls::self_signed(&["relay.example.net"]).unwrap();
    let tls = "[tls]\ncertificate = \"relay.pem\"\nkey = \"relay.key\"\n[relay]\nresolver = \"127.0.0.1:1\"\n";
    let mut place = Place::new(&[("acme", "\"example.org\"")]);
    place.write("relay.pem", &certificate);
    place.write("relay.key", &key);
    place.write("odmr.toml", &format!("{PROVIDER}{tls}"));
    place.start();
    place.reload("event=reloaded");
    let under_way = fs::File::open(place.path("spool/.odmr/reload.lock")).unwrap();
    under_way.lock().unwrap();
    let begun = Instant::now();
    let end = thread::spawn(move || {
        thread::sleep(Duration::from_millis(500));
        drop(under_way);
    });
    let mut add = Command::new(env!("CARGO_BIN_EXE_odmr"));
    add.args(["customer", "add", "beta", "example.net", "--pin", &format!("spki-sha256:{}", "0".repeat(64)), "-c"]);
    let added = add.arg(place.path("odmr.toml")).output().unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(500), "{added:?}");
    assert!(String::from_utf8_lossy(&added.stderr).contains("`odmr serve` has read it"), "{added:?}");
    assert!(place.rcpt("bob@example.net").starts_with("250 "));
    end.join().unwrap();
}

#[test]
fn a_reload_adds_and_removes_customers_and_sessions_go_on() {
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
fn a_mistake_leaves_the_old_configuration_in_force() {
    let mut place = Place::new(&[("acme", "\"example.org\""), ("beta", "\"example.net\"")]);
    place.start();
    place.write("odmr.toml", "hostname = 1\n");
    place.reload("event=reload-failed");
    assert!(place.rcpt("alice@example.org").starts_with("250 "));
    // The spool does not change: sessions write into it.
    place.write("odmr.toml", &PROVIDER.replace("spool = \"spool\"", "spool = \"other\""));
    place.reload("event=restart-needed");
    assert!(place.rcpt("alice@example.org").starts_with("250 ") && !place.path("other").exists());
    place.write("odmr.toml", PROVIDER);
    place.write("customers.d/acme.toml", "domans = []\n");
    place.customer("gamma", "\"example.com\"");
    let skipped = place.reload("event=customer-skipped");
    assert!(skipped.contains("/acme.toml\" error=") && skipped.contains("acme.toml:1: "), "{skipped}");
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
    // "acme " and 32 hexadecimal digits. Without the file of the account the secret cannot be checked.
    assert!(customer.command("YWNtZSAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMA==").starts_with("454 4.7.0 "));
    place.customer("acme", "\"example.org\"");
    assert!(place.reload("event=reloaded").contains("accounts=2 added=1 removed=0"));
    assert!(place.rcpt("alice@example.org").starts_with("250 "));
}

/// A customer must not get the mail of another one because its file was copied and still has the other one's domain. The order
/// of the files does not matter.
#[test]
fn a_domain_stays_with_the_customer_that_had_it() {
    let mut place = Place::new(&[("acme", "\"example.org\""), ("zeta", "\"example.net\"")]);
    place.start();
    let skipped = |place: &mut Place| {
        let line = place.reload("event=customer-skipped");
        // The configuration is in force only after this line.
        place.serve.as_mut().unwrap().wait_for("event=reloaded");
        line
    };
    let owner = |place: &mut Place, to: &str| {
        assert!(Client::connect(&place.inbound).send("a@b.example", to, 1).starts_with("250 "));
        place.serve.as_mut().unwrap().wait_for("event=queued").rsplit('=').next().unwrap().to_owned()
    };
    place.customer("beta", "\"example.net\"");
    let line = skipped(&mut place);
    assert!(line.contains("/beta.toml\" error=") && line.contains("beta.toml:1: example.net is in "), "{line}");
    assert_eq!(owner(&mut place, "bob@example.net"), "zeta");
    // The account of a customer whose file claims another one's domain stays as it was.
    place.customer("acme", "\"example.org\", \"example.net\"");
    assert!(skipped(&mut place).contains("/acme.toml\" error="));
    assert_eq!([owner(&mut place, "bob@example.net"), owner(&mut place, "a@example.org")], ["zeta", "acme"]);
    // If the file of the domain's customer has a mistake, its account stays as it was.
    place.write("customers.d/zeta.toml", "domains = [\"example.net\"]\n");
    place.customer("acme", "\"example.org\"");
    assert!(skipped(&mut place).contains("/zeta.toml\" error="));
    assert_eq!(owner(&mut place, "bob@example.net"), "zeta");
    // The domain moves.
    place.customer("zeta", "\"example.com\"");
    assert!(place.reload("event=reloaded").contains("accounts=3 added=1 removed=0"));
    assert_eq!(owner(&mut place, "bob@example.net"), "beta");
}

/// A session has the rights of its account after the reload: the domain may belong to another customer, and the old secret may
/// be known to others.
#[test]
fn sessions_on_port_366_see_the_accounts_of_a_reload() {
    let mut place = Place::new(&[("acme", "\"example.org\", \"example.com\""), ("beta", "\"example.net\"")]);
    place.start();
    let open = |place: &Place| Client::connect(&place.odmr);
    assert!(Client::connect(&place.inbound).send("a@b.example", "alice@example.org", 1).starts_with("250 "));
    let (mut asks, mut sends, mut waits, mut other) = (open(&place), open(&place), open(&place), open(&place));
    let (mut scram, mut narrowed) = (open(&place), open(&place));
    for session in [&mut asks, &mut sends] {
        assert!(session.authenticate("acme", SECRET).starts_with("235 "));
    }
    assert!(other.authenticate("beta", SECRET).starts_with("235 "));
    // The domain moves, and the secret changes.
    place.write("customers.d/acme.toml", "domains = [\"example.com\"]\nsecret = \"another secret\"\n");
    place.customer("beta", "\"example.net\", \"example.org\"");
    place.reload("event=reloaded");
    assert!(asks.command("ATRN example.org").starts_with("450 4.7.1 "));
    assert!(sends.command("MAIL FROM:<alice@example.org>").starts_with("550 5.7.1 "));
    assert!(waits.authenticate("acme", SECRET).starts_with("535 "));
    assert!(waits.authenticate("acme", "another secret").starts_with("235 "));
    assert!(scram.authenticate_by_scram("acme", SECRET).starts_with("535 "));
    assert!(scram.authenticate_by_scram("acme", "another secret").starts_with("235 "));
    assert!(other.command("ATRN example.org").starts_with("250 "));
    // From now on the account permits one mechanism only.
    place.customer("beta", "\"example.net\"]\nmechanisms = [\"SCRAM-SHA-256\"");
    place.reload("event=reloaded");
    assert!(narrowed.authenticate("beta", SECRET).starts_with("535 "));
    assert!(narrowed.authenticate_by_scram("beta", SECRET).starts_with("235 "));
    // The account is removed: its held mail stays with the provider, and its outgoing mail with the customer.
    let (mut late, mut late_scram) = (open(&place), open(&place));
    fs::remove_file(place.path("customers.d/acme.toml")).unwrap();
    place.reload("event=reloaded");
    assert!(asks.command("ATRN").starts_with("450 4.7.1 "));
    assert!(sends.command("MAIL FROM:<alice@example.com>").starts_with("450 4.7.1 "));
    assert!(late.authenticate("acme", "another secret").starts_with("535 "));
    assert!(late_scram.authenticate_by_scram("acme", "another secret").starts_with("535 "));
    assert!(!asks.command("EHLO client.example").contains("XDOMAINS"));
}

#[test]
fn a_turned_session_ends_when_another_customer_gets_its_domain() {
    let mut place = Place::new(&[("acme", "\"example.org\", \"example.com\""), ("beta", "\"example.net\"")]);
    place.start();
    for number in 0..2 {
        let from = format!("a{number}@b.example");
        assert!(Client::connect(&place.inbound).send(&from, "alice@example.org", 1).starts_with("250 "));
    }
    let mut customer = Client::connect(&place.odmr);
    assert!(customer.authenticate("acme", SECRET).starts_with("235 "));
    assert!(customer.command("ATRN").starts_with("250 "));
    for (reply, command) in [("220 mail.example.org", "EHLO "), ("250 OK", "MAIL "), ("250 OK", "RCPT ")] {
        assert!(customer.command(reply).starts_with(command));
    }
    place.customer("acme", "\"example.com\"");
    place.customer("beta", "\"example.net\", \"example.org\"");
    place.reload("event=reloaded");
    assert!(customer.command("250 OK").starts_with("DATA"));
    customer.command("354 go on");
    while customer.reply().trim_end() != "." {}
    assert!(customer.command("250 OK").starts_with("QUIT"), "the message under way was the last one");
    let ended = place.serve.as_mut().unwrap().wait_for("event=turn-ended");
    assert!(ended.contains(" sent=1 "), "{ended}");
}

#[test]
fn each_reload_names_the_keys_that_need_a_restart() {
    let mut place = Place::new(&[("acme", "\"example.org\"")]);
    place.start();
    for _ in 0..2 {
        place.write("odmr.toml", &PROVIDER.replacen("127.0.0.1:0", "127.0.0.1:1", 1));
        let line = place.reload("event=restart-needed");
        assert!(line.contains("reason=\"[inbound] `listen` changed"), "{line}");
    }
    place.write("odmr.toml", PROVIDER);
    place.reload("event=reloaded");
    place.write("odmr.toml", "x");
    assert!(place.reload("event=re").contains("event=reload-failed"), "nothing is changed any more");
}

/// A session that began before the reload must not make the shutdown wait until its deadline.
#[test]
fn after_a_reload_an_open_session_does_not_delay_the_end() {
    let mut place = Place::new(&[("acme", "\"example.org\"")]);
    place.start();
    let mut session = Client::connect(&place.inbound);
    assert!(session.rcpt("alice@example.org").starts_with("250 ") && session.command("DATA").starts_with("354 "));
    place.reload("event=reloaded");
    let serve = place.serve.as_mut().unwrap();
    let begun = Instant::now();
    serve.signal(Signal::TERM);
    serve.wait_for("event=stopping");
    std::thread::sleep(Duration::from_millis(300));
    assert!(session.command("x\r\n.").starts_with("250 "), "the message under way is accepted");
    assert_eq!(serve.exit_code(), Some(0));
    // The shutdown timeout is 10 s.
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

/// Otherwise clients that expect TLS would send their secrets and their mail in clear.
#[test]
fn without_a_certificate_the_listener_for_tls_closes_connections() {
    let mut place = Place::new(&[("acme", "\"example.org\"")]);
    let (certificate, key) = odmr::net::tls::self_signed(&["relay.example.net"]).unwrap();
    place.write("relay.pem", &certificate);
    place.write("relay.key", &key);
    let with_tls = "listen-tls = [\"127.0.0.1:0\"]\n[tls]\ncertificate = \"relay.pem\"\nkey = \"relay.key\"\n";
    place.write("odmr.toml", &format!("{PROVIDER}{with_tls}"));
    place.start();
    let address = place.serve.as_mut().unwrap().listening("odmr-tls");
    place.write("odmr.toml", PROVIDER);
    assert!(place.reload("event=restart-needed").contains("listen-tls"));
    let mut octets = Vec::new();
    std::net::TcpStream::connect(address).unwrap().read_to_end(&mut octets).unwrap();
    assert_eq!(octets, b"");
}

/// A provider with a customer that has authenticated, and another one, of example.invalid, whose file has a mistake at the
/// start.
fn beside_a_skipped_file() -> (Place, Client) {
    let mut place = Place::new(&[("beta", "\"example.net\"")]);
    place.write("customers.d/acme.toml", "domains = [\"example.invalid\"]\n");
    // The DNS has no such domain.
    place.write("odmr.toml", &format!("{PROVIDER}[relay]\nretry-first = \"1s\"\nresolver = \"{}\"\n", no_domains()));
    place.start();
    let mut customer = Client::connect(&place.odmr);
    assert!(customer.authenticate("beta", SECRET).starts_with("235 "));
    (place, customer)
}

/// A customer sends mail to another customer, whose file has a mistake at the start. The mail must wait, not bounce; after the
/// mistake was corrected, it is held.
#[test]
fn mail_from_a_customer_to_one_whose_file_is_skipped_waits() {
    let (mut place, mut customer) = beside_a_skipped_file();
    assert!(customer.send("bob@example.net", "Alice@example.invalid", 1).starts_with("250 "));
    let line = place.serve.as_mut().unwrap().wait_for("event=deferred");
    assert!(line.contains("destination=example.invalid reply=\"451 4.3.5 "), "{line}");
    place.customer("acme", "\"example.invalid\"");
    place.reload("event=reloaded");
    place.serve.as_mut().unwrap().wait_for(" status=sent via=held ");
    assert_eq!(fs::read_dir(place.path("spool/domains/example.invalid/new")).unwrap().count(), 1);
    assert!(!place.path("spool/domains/example.net").exists(), "no DSN");
}

/// The relay must apply the list of recipients and the quota of the customer as RCPT does.
#[test]
fn the_relay_holds_only_mail_that_rcpt_accepts() {
    let (mut place, mut customer) = beside_a_skipped_file();
    for to in ["bob@example.invalid", "alice@example.invalid", "alice+x@example.invalid"] {
        assert!(customer.send("bob@example.net", to, 1).starts_with("250 "));
        place.serve.as_mut().unwrap().wait_for("event=deferred");
    }
    let quota = "\"example.invalid\"]\nmax-messages = 1\nrecipients = [\"alice@example.invalid\"";
    place.customer("acme", quota);
    place.reload("event=reloaded");
    let serve = place.serve.as_mut().unwrap();
    let mut seen = Vec::new();
    while seen.len() < 3 {
        let line = serve.wait_for(" via=held ");
        let status = line.split(" status=").nth(1).unwrap().split(' ').next().unwrap().to_owned();
        let reply = line.split(" reply=\"").nth(1).unwrap()[..9].to_owned();
        if !seen.contains(&(status.clone(), reply.clone())) {
            seen.push((status, reply));
        }
    }
    seen.sort();
    let expected = [("deferred", "452 4.2.2"), ("rejected", "550 5.1.1"), ("sent", "250 2.0.0")];
    assert_eq!(seen, expected.map(|(status, reply)| (status.to_owned(), reply.to_owned())));
    let held = |domain: &str| fs::read_dir(place.path(&format!("spool/domains/{domain}/new"))).unwrap().count();
    assert_eq!((held("example.invalid"), held("example.net")), (1, 1), "one message, and the DSN of another");
}

/// A name server that knows no domain at all (RFC 1035 section 4.1.1: the reply code 3).
fn no_domains() -> std::net::SocketAddr {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut octets = [0; 1500];
        while let Ok((size, peer)) = socket.recv_from(&mut octets) {
            (octets[2], octets[3]) = (0x81, 0x83);
            let _ = socket.send_to(&octets[..size], peer);
        }
    });
    address
}

/// The locks of the daemon are in the root of its start, so a reload does not change the root.
#[test]
fn a_customers_daemon_stays_in_its_root_and_has_the_new_limits() {
    let place = Place::new(&[]);
    let config = |root: &str, limits: &str| {
        let text = "hostname = \"mail.example.org\"\n[provider]\naddress = \"127.0.0.1:1\"\ntls = \"none\"\nname = \"acme\"\n\
                    secret = \"tanstaaftanstaaf\"\n[outgoing]\nqueue = \"out\"\nlisten = [\"127.0.0.1:0\"]\n";
        let mailboxes = "accept = [\"alice@example.org\"]\n";
        place.write("odmr.toml", &format!("{text}[mailboxes]\nroot = \"{root}\"\n{mailboxes}{limits}"));
    };
    config("mail", "");
    let mut daemon = Command::new(env!("CARGO_BIN_EXE_odmr"));
    let mut daemon = Running::start(daemon.args(["pull", "--daemon", "-c"]).arg(place.path("odmr.toml")));
    let address = daemon.listening("local");
    for number in 0..2 {
        config("other", "[limits]\nconnections-per-address = 1\n");
        daemon.signal(Signal::HUP);
        let line = daemon.wait_for("event=restart-needed");
        assert!(line.ends_with("reason=\"`root` changed, which takes effect after a restart\""), "{line}");
        daemon.wait_for("event=reloaded");
        let mut session = Client::connect(&address);
        assert!(session.send("bob@example.org", "alice@example.org", 1).starts_with("250 "), "{number}");
        let mut replies = String::new();
        std::net::TcpStream::connect(&address).unwrap().read_to_string(&mut replies).unwrap();
        assert!(replies.starts_with("421 "), "{replies}");
        assert!(session.command("QUIT").starts_with("221 "));
        daemon.wait_for("event=closed");
    }
    assert_eq!(fs::read_dir(place.path("mail/example.org/alice/new")).unwrap().count(), 2);
    assert!(!place.path("other").exists());
}

/// A catch-all without a mailbox is an error at the start. In a reload it leaves the old configuration in force.
#[test]
fn a_customers_daemon_has_the_new_catch_all() {
    let place = Place::new(&[]);
    let config = |lines: &str| {
        let text = "hostname = \"mail.example.org\"\n[provider]\naddress = \"127.0.0.1:1\"\ntls = \"none\"\nname = \"acme\"\n\
                    secret = \"tanstaaftanstaaf\"\n[outgoing]\nqueue = \"out\"\nlisten = [\"127.0.0.1:0\"]\n\
                    [mailboxes]\nroot = \"mail\"\naccept = [\"alice@example.org\", \"@example.org\"]\n";
        place.write("odmr.toml", &format!("{text}{lines}"));
    };
    let command = |words: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_odmr"));
        command.args(words).arg("-c").arg(place.path("odmr.toml"));
        command
    };
    let count =
        |name: &str| fs::read_dir(place.path(&format!("mail/example.org/{name}/new"))).map_or(0, Iterator::count);
    config("");
    let mut daemon = Running::start(&mut command(&["pull", "--daemon"]));
    let address = daemon.listening("local");
    let by_default = daemon.wait_for("event=catch-all-by-default");
    assert!(by_default.contains("goes to postmaster@example.org; catch-all = "), "{by_default}");
    let send = |to: &str| assert!(Client::connect(&address).send("a@example.org", to, 1).starts_with("250 "), "{to}");
    send("word@example.org");
    assert_eq!(["postmaster", "word"].map(count), [1, 0]);
    let mut reload = |lines: &str, word: &str| {
        config(lines);
        daemon.signal(Signal::HUP);
        daemon.wait_for(word)
    };
    reload("catch-all = \"alice@example.org\"\n", "event=reloaded");
    send("word@example.org");
    assert_eq!(["postmaster", "word", "alice"].map(count), [1, 0, 1]);
    let nowhere = "aliases = { postmaster = \"/dev/null\" }\n";
    let failed = reload(nowhere, "event=reload-failed");
    let line = "write catch-all = { \\\"example.org\\\" = \\\"alice@example.org\\\" }";
    assert!(failed.contains("odmr.toml:12: ") && failed.contains(line), "{failed}");
    send("word@example.org");
    assert_eq!(["postmaster", "word", "alice"].map(count), [1, 0, 2]);
    // A mailbox that was created later gets mail without a reload.
    fs::create_dir(place.path("mail/example.org/shop")).unwrap();
    send("Shop@example.org");
    assert_eq!(["shop", "alice"].map(count), [1, 2]);
    reload("catch-all = \"create\"\n", "event=reloaded");
    send("word@example.org");
    assert_eq!(["postmaster", "word", "alice"].map(count), [1, 1, 2]);
    config(nowhere);
    for (words, code) in [(["check"].as_slice(), 1), (&["pull"], 78), (&["pull", "--daemon"], 78)] {
        let done = command(words).output().unwrap();
        let error = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(error.contains("odmr.toml:12: ") && error.contains(&line.replace('\\', "")), "{error}");
        assert_eq!(done.status.code(), Some(code), "{error}");
    }
}
