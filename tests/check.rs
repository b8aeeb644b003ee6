//! `odmr check`: its output and its exit codes; `--address` for each table of `testdata/rules`.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use rustix::process::Signal;

use crate::running::Running;

/// The lines of a customer's file before the settings of `[mailboxes]`, which each table of `testdata/rules` has.
const HEAD: &str = "hostname = \"mail.example.org\"\n[provider]\naddress = \"relay.example.net\"\n\
                    name = \"acme\"\nsecret = \"open sesame to me\"\n[mailboxes]\n";

#[test]
fn each_address_goes_where_the_rules_say() {
    let tables = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/rules");
    let mut addresses = 0;
    for entry in fs::read_dir(tables).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        let (config, expected) = text.split_once("------\n").unwrap();
        let (config, mailboxes) = config.split_once("-- mailboxes --\n").unwrap_or((config, ""));
        let (table, aliases) = config.split_once("-- aliases --\n").unwrap_or((config, ""));
        let directory = tempfile::tempdir().unwrap();
        mailboxes.lines().for_each(|path| fs::create_dir_all(directory.path().join(path)).unwrap());
        let file = directory.path().join("odmr.toml");
        fs::write(&file, format!("{HEAD}{table}")).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(directory.path().join("aliases"), aliases).unwrap();
        let mut check = Command::new(env!("CARGO_BIN_EXE_odmr"));
        check.arg("check").arg("-c").arg(&file);
        for typed in expected.lines().filter_map(|line| line.strip_prefix("> ")) {
            check.arg("--address").arg(typed);
        }
        let result = check.output().unwrap();
        let expected_lines: Vec<_> = expected.lines().filter(|line| !line.starts_with("> ")).collect();
        let output = String::from_utf8(result.stdout).unwrap().replace(&format!("{}/", directory.path().display()), "");
        let error = String::from_utf8_lossy(&result.stderr).into_owned();
        assert_eq!(output.lines().collect::<Vec<_>>(), expected_lines, "{}: {error}", path.display());
        let rejected = expected_lines
            .iter()
            .any(|line| ["rejected: ", "deferred: 4", "is not an address"].iter().any(|word| line.contains(word)));
        assert_eq!(result.status.code(), Some(i32::from(rejected)), "{}: {error}", path.display());
        addresses += expected.lines().filter(|line| line.starts_with("> ")).count();
    }
    assert!(addresses >= 40, "{addresses} addresses");
}

#[test]
fn address_needs_a_customers_file() {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("customers.d")).unwrap();
    let file = directory.path().join("provider.toml");
    let text = "hostname = \"relay.example.net\"\nspool = \"spool\"\ncustomers = \"customers.d\"\n[inbound]\nlisten = []\n\
                [odmr]\nlisten = [\"127.0.0.1:0\"]\nrequire-tls = false\n";
    fs::write(&file, text).unwrap();
    let mut check = Command::new(env!("CARGO_BIN_EXE_odmr"));
    let done = check.arg("check").arg("-c").arg(&file).args(["--address", "alice@example.org"]).output().unwrap();
    let error = String::from_utf8(done.stderr).unwrap();
    assert_eq!(done.status.code(), Some(64), "{error}");
    assert!(error.contains("--address is for a customer's file"), "{error}");
}

/// `--dns` asks the name server of `[relay]`. If it does not reply, that is a warning.
#[test]
fn a_name_server_that_does_not_reply_is_a_warning() {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("customers.d")).unwrap();
    let account = directory.path().join("customers.d/acme.toml");
    fs::write(&account, "domains = [\"example.org\"]\nsecret = \"open sesame to me\"\n").unwrap();
    fs::set_permissions(&account, fs::Permissions::from_mode(0o600)).unwrap();
    let unused = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let file = directory.path().join("provider.toml");
    let text = format!(
        "hostname = \"relay.example.net\"\nspool = \"spool\"\ncustomers = \"customers.d\"\n[inbound]\nlisten = []\n\
         [odmr]\nlisten = [\"127.0.0.1:0\"]\nrequire-tls = false\n[relay]\nresolver = \"{unused}\"\n"
    );
    fs::write(&file, text).unwrap();
    let check = |more: &[&str]| {
        let mut check = Command::new(env!("CARGO_BIN_EXE_odmr"));
        check.arg("check").arg("-c").arg(&file).arg("--dns").args(more).output().unwrap()
    };
    let done = check(&[]);
    let output = String::from_utf8(done.stdout).unwrap();
    assert_eq!(done.status.code(), Some(0), "{output}");
    let first =
        format!("relay.example.net\n  A     warning   A records of relay.example.net: {unused}: Connection refused");
    assert!(output.starts_with(&first), "{output}");
    let rest = "warning: domains that were not looked up: 1, as no name server replies: check `resolver` in [relay]\n";
    assert!(output.contains(rest), "{output}");
    for other in [&["--print"][..], &["--address", "alice@example.org"]] {
        assert_eq!(check(other).status.code(), Some(64), "{other:?}");
    }
}

/// The files that the configuration names are checked too.
#[test]
fn a_missing_certificate_is_reported_with_its_line() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("customer.toml");
    let text = HEAD.replace("\nname =", "\nca = \"ca.pem\"\nname =") + "root = \"mail\"\naccept = [\"@example.org\"]\n";
    fs::write(&file, text).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    for (command, code) in [("check", 1), ("pull", 78)] {
        let done = Command::new(env!("CARGO_BIN_EXE_odmr")).arg(command).arg("-c").arg(&file).output().unwrap();
        let error = String::from_utf8(done.stderr).unwrap();
        assert_eq!(done.status.code(), Some(code), "{error}");
        assert!(error.contains("customer.toml:4: ") && error.contains("or name others in `ca`"), "{error}");
    }
}

/// /etc/aliases may have lines for another mail server. They are warnings, not errors.
#[test]
fn aliases_that_are_not_served_are_reported() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("customer.toml");
    let table = "root = \"mail\"\naccept = [\"alice@example.org\"]\nalias-file = \"aliases\"\n";
    fs::write(&file, format!("{HEAD}{table}")).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(
        directory.path().join("aliases"),
        "a: alice\nlist: \"|/usr/bin/prog -x\"\ninfo: bob@w.example\nno: /dev/null\n",
    )
    .unwrap();
    let done = Command::new(env!("CARGO_BIN_EXE_odmr")).arg("check").arg("-c").arg(&file).output().unwrap();
    assert_eq!(done.status.code(), Some(0), "{}", String::from_utf8_lossy(&done.stderr));
    let output = String::from_utf8(done.stdout).unwrap();
    let [program, elsewhere, good] = &output.lines().collect::<Vec<_>>()[..] else { panic!("{output}") };
    assert!(program.contains("aliases:2: ") && program.contains("mail for list is deferred with 451"), "{program}");
    assert!(program.contains("remove that alias"), "{program}");
    assert!(elsewhere.contains("aliases:3: the alias info leads to bob@w.example"), "{elsewhere}");
    assert!(good.ends_with("good: a customer of relay.example.net:366, as acme"), "{good}");
}

/// Programs of root submit mail with the sender root. If root has no mailbox, its DSNs go to postmaster.
#[test]
fn a_sender_without_a_mailbox_is_reported() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("customer.toml");
    let check = |mailboxes: &str, outgoing: &str| {
        fs::write(&file, format!("{HEAD}root = \"mail\"\n{mailboxes}\n{outgoing}")).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        let done = Command::new(env!("CARGO_BIN_EXE_odmr")).arg("check").arg("-c").arg(&file).output().unwrap();
        assert_eq!(done.status.code(), Some(0), "{}", String::from_utf8_lossy(&done.stderr));
        let output = String::from_utf8(done.stdout).unwrap();
        assert!(output.ends_with("good: a customer of relay.example.net:366, as acme\n"), "{output}");
        output.lines().find(|line| line.contains("DSNs about mail that root sends")).map(str::to_owned)
    };
    let (users, outgoing) = ("accept = [\"alice@example.org\"]", "[outgoing]\nqueue = \"out\"\n");
    let warning = check(users, outgoing).unwrap();
    assert!(warning.contains("customer.toml:6: ") && warning.contains("root@example.org has no mailbox"), "{warning}");
    assert!(
        warning.contains(" go to postmaster@example.org; write an alias, ")
            && warning.contains("aliases = { \"root\" = "),
        "{warning}"
    );
    let other = format!("{users}\naliases = {{ info = \"alice@example.org\" }}");
    assert!(check(&other, outgoing).unwrap().contains("customer.toml:9: "));
    // No warning if root gets mail, by the alias that the warning names or by a catch-all; if no mail is sent; or if
    // the sender is elsewhere.
    let alias = format!("{users}\naliases = {{ \"root\" = \"alice@example.org\" }}");
    let elsewhere = format!("{outgoing}domain = \"example.net\"\n");
    for (mailboxes, outgoing) in
        [(&*alias, outgoing), ("accept = [\"@example.org\"]", outgoing), (users, ""), (users, &elsewhere)]
    {
        assert_eq!(check(mailboxes, outgoing), None, "{mailboxes} {outgoing}");
    }
}

/// A provider's files, with a certificate for these names that expires after this number of days.
fn provider(names: &[&str], days: i64) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("customers.d")).unwrap();
    let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut parameters = rcgen::CertificateParams::new(names).unwrap();
    let now = std::time::SystemTime::now();
    let day = std::time::Duration::from_secs(24 * 60 * 60);
    let end = if days < 0 { now - day * days.unsigned_abs() as u32 } else { now + day * days as u32 };
    parameters.not_before = (now - day * 400).into();
    parameters.not_after = (end + day / 2).into();
    let key = rcgen::KeyPair::generate().unwrap();
    write(&directory, "relay.pem", &parameters.self_signed(&key).unwrap().pem());
    write(&directory, "relay.key", &key.serialize_pem());
    write(&directory, "provider.toml", PROVIDER);
    write(&directory, "customers.d/acme.toml", "domains = [\"example.org\"]\nsecret = \"tanstaaftanstaaf\"\n");
    directory
}

const PROVIDER: &str = "hostname = \"relay.example.net\"\nspool = \"spool\"\ncustomers = \"customers.d\"\n[tls]\n\
                        certificate = \"relay.pem\"\nkey = \"relay.key\"\n[inbound]\nlisten = [\"127.0.0.1:0\"]\n\
                        [odmr]\nlisten = [\"127.0.0.1:0\"]\n";

fn write(directory: &tempfile::TempDir, name: &str, text: &str) {
    let path = directory.path().join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
}

/// The exit code, the output and the errors of `odmr WORDS -c FILE`, without the name of the directory.
fn run(directory: &tempfile::TempDir, file: &str, words: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_odmr"));
    let done = command.args(words).arg("-c").arg(directory.path().join(file)).env_remove("RUST_LOG").output().unwrap();
    let text =
        |octets: Vec<u8>| String::from_utf8(octets).unwrap().replace(&format!("{}/", directory.path().display()), "");
    (done.status.code().unwrap(), text(done.stdout), text(done.stderr))
}

/// The certificate and the spool are checked even if a key of the file is misspelt.
#[test]
fn mistakes_in_the_file_do_not_hide_those_of_files_that_it_names() {
    let directory = provider(&["relay.example.net"], -3);
    write(
        &directory,
        "provider.toml",
        &format!("{PROVIDER}[limits]\nconections = 5\n[timeouts]\ncommand = \"soon\"\n"),
    );
    let (code, output, error) = run(&directory, "provider.toml", &["check"]);
    let [key, time, certificate] = error.lines().collect::<Vec<_>>()[..] else { panic!("{error}") };
    assert!(code == 1 && !output.contains("good:"), "{output}");
    assert!(key.contains("provider.toml:12: unknown key `conections`"), "{key}");
    assert!(
        time.contains("provider.toml:14: ") && certificate.contains("provider.toml:5: relay.pem has expired"),
        "{error}"
    );
    for option in ["--print", "--call"] {
        assert_ne!(run(&directory, "provider.toml", &["check", option]).0, 0);
    }
}

#[test]
fn the_certificate_of_a_provider_is_described_and_judged() {
    let directory = provider(&["relay.example.net", "127.0.0.1"], 100);
    let (code, output, error) = run(&directory, "provider.toml", &["check"]);
    assert_eq!((code, &*error), (0, ""), "{output}");
    let line = output.lines().find(|line| line.starts_with("relay.pem: for ")).unwrap();
    assert!(line.contains("relay.example.net, 127.0.0.1, until ") && line.contains(" (100 days); "), "{line}");
    assert!(line.contains("pin = \"sha256:") && line.contains("pin = \"spki-sha256:"), "{line}");
    assert!(output.ends_with("provider.toml: good: a provider with 1 customer, 1 domain\n"), "{output}");
    // A certificate that expires soon is a warning. One that has expired, or is for another name, is an error.
    let (code, output, _) = run(&provider(&["relay.example.net"], 5), "provider.toml", &["check"]);
    assert!(code == 0 && output.contains("provider.toml:5: relay.pem expires on "), "{output}");
    let (code, _, error) = run(&provider(&["mail.example.net"], -3), "provider.toml", &["check"]);
    let [name, end] = error.lines().collect::<Vec<_>>()[..] else { panic!("{error}") };
    assert_eq!(code, 1);
    assert!(
        name.contains("provider.toml:5: relay.pem is for mail.example.net and not for relay.example.net"),
        "{name}"
    );
    assert!(end.contains("provider.toml:5: relay.pem has expired on ") && end.contains("renew it"), "{end}");
    // If the key is missing, `serve` fails with the same text.
    let directory = provider(&["relay.example.net"], 100);
    fs::remove_file(directory.path().join("relay.key")).unwrap();
    for (command, expected) in [("check", 1), ("serve", 78)] {
        let (code, _, error) = run(&directory, "provider.toml", &[command]);
        assert_eq!(code, expected);
        let text = "provider.toml:6: relay.key: No such file or directory (os error 2); put the key there, or name";
        assert!(error.contains(text), "{error}");
    }
}

#[test]
fn all_errors_of_all_files_are_reported() {
    let directory = provider(&["relay.example.net"], -3);
    write(&directory, "customers.d/beta.toml", "domains = [\"nodot\"]\nsecret = \"\"\n");
    write(&directory, "customers.d/gamma.toml", "domains = [\"example.org\"]\nsecret = \"x\"\n");
    write(&directory, "customers.d/delta", "");
    fs::create_dir_all(directory.path().join("spool/domains")).unwrap();
    fs::write(directory.path().join("spool/outgoing"), "").unwrap();
    let (code, output, error) = run(&directory, "provider.toml", &["check"]);
    assert_eq!(code, 1, "{output}");
    for (place, text) in [
        ("customers.d/beta.toml:1: ", "has no dot"),
        ("customers.d/beta.toml:2: ", "is empty"),
        ("customers.d/gamma.toml:1: ", "example.org is in customers.d/acme.toml too"),
        ("provider.toml:5: ", "has expired"),
    ] {
        assert!(error.lines().any(|line| line.contains(place) && line.contains(text)), "{place}{text} in\n{error}");
    }
    assert!(error.lines().all(|line| line.starts_with("odmr: ")), "{error}");
    for warning in ["customers.d/delta: is not read", "customers.d/gamma.toml:2: the secret has 1 octet "] {
        assert!(output.contains(warning), "{warning} in\n{output}");
    }
    assert!(!output.contains("good:"), "{output}");
    // The valid account and all defaults are printed.
    let (code, output, _) = run(&directory, "provider.toml", &["check", "--print"]);
    assert_eq!(code, 1, "{output}");
}

#[test]
fn the_configuration_is_printed_without_secrets() {
    let directory = provider(&["relay.example.net"], 100);
    let (code, output, error) = run(&directory, "provider.toml", &["check", "--print"]);
    assert_eq!((code, &*error), (0, ""));
    assert!(output.starts_with("# provider.toml\nhostname = \"relay.example.net\"\nspool = \"spool\"\n"), "{output}");
    for line in ["turned-sessions = 10000", "# customers.d/acme.toml", "secret = \"***\"", "rate = 0"] {
        assert!(output.lines().any(|printed| printed == line), "{line} in\n{output}");
    }
    assert!(!output.contains("tanstaaf"), "{output}");
    let verifier = "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:\
                    wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=";
    let account = format!("domains = [\"example.org\"]\nscram = \"{verifier}\"\nmechanisms = [\"scram-sha-256\"]\n");
    write(&directory, "customers.d/acme.toml", &account);
    let (code, output, _) = run(&directory, "provider.toml", &["check", "--print"]);
    let printed = output.contains("scram = \"***\"\nmechanisms = [\"SCRAM-SHA-256\"]\n");
    assert!(code == 0 && printed && !output.contains("W22ZaJ0SNY7soEsUEjb6gQ"), "{output}");
}

/// A customer of a provider on this machine.
fn customer(directory: &tempfile::TempDir, address: &str, rest: &str) {
    let text = format!(
        "hostname = \"mail.example.org\"\n[provider]\naddress = \"{address}\"\nname = \"acme\"\n{rest}[mailboxes]\n\
         root = \"mail\"\naccept = [\"alice@example.org\", \"@example.net\"]\n"
    );
    write(directory, "customer.toml", &text);
}

const LOGIN: &str = "secret = \"tanstaaftanstaaf\"\nca = \"relay.pem\"\n";

#[test]
fn check_call_fetches_no_mail() {
    let directory = provider(&["localhost"], 100);
    let account = "domains = [\"example.org\", \"example.com\"]\nsecret = \"tanstaaftanstaaf\"\n";
    write(&directory, "customers.d/acme.toml", account);
    let mut serve = Command::new(env!("CARGO_BIN_EXE_odmr"));
    let mut serve = Running::start(serve.arg("serve").arg("-c").arg(directory.path().join("provider.toml")));
    let address = serve.listening("odmr").replace("127.0.0.1", "localhost");
    customer(&directory, &address, LOGIN);
    let (code, output, error) = run(&directory, "customer.toml", &["check", "--call"]);
    assert_eq!((code, &*error), (0, ""), "{output}");
    let line = output.lines().find(|line| line.starts_with(&address)).unwrap();
    assert!(line.contains(" [127.0.0.1]: for localhost, until ") && line.contains(" (100 days); pin = "), "{line}");
    assert!(
        line.ends_with("; logged in as acme by SCRAM-SHA-256-PLUS under TLSv1.3; domains: example.org, example.com"),
        "{line}"
    );
    for warning in [
        "customer.toml:9: localhost:",
        " holds mail for example.com, and no address in it is accepted",
        "customer.toml:9: no provider holds mail for example.net",
    ] {
        assert!(output.contains(warning), "{warning} in\n{output}");
    }
    assert!(!directory.path().join("mail").exists());
    // ATRN would fail for a domain that the account does not have.
    customer(&directory, &address, &format!("{LOGIN}domains = [\"example.org\", \"example.net\"]\n"));
    let (code, output, error) = run(&directory, "customer.toml", &["check", "--call"]);
    assert!(code == 1 && error.contains("customer.toml:7: example.net is not a domain of the account"), "{error}");
    assert!(
        output.contains("customer.toml:7: ") && output.contains("example.com, which is not in `domains`"),
        "{output}"
    );
    // A wrong secret; no TLS; no listener.
    customer(&directory, &address, "secret = \"another secret\"\nca = \"relay.pem\"\n");
    let (code, _, error) = run(&directory, "customer.toml", &["check", "--call"]);
    assert!(code == 1 && error.contains("customer.toml:3: the provider rejected AUTH: 535 5.7.8"), "{error}");
    customer(&directory, &address, "secret = \"tanstaaftanstaaf\"\ntls = \"none\"\n");
    let (code, _, error) = run(&directory, "customer.toml", &["pull"]);
    assert!(code == 76 && error.contains("but STARTTLS: set `tls = \"starttls\"`"), "{error}");
    drop(serve);
    let (code, _, error) = run(&directory, "customer.toml", &["check", "--call"]);
    assert!(
        code == 1 && error.contains("Connection refused") && error.contains("is `odmr serve` running there"),
        "{error}"
    );
    let (code, _, error) = run(&directory, "provider.toml", &["check", "--call"]);
    assert!(code == 64 && error.contains("--call is for a customer's file"), "{error}");
}

/// Other providers do not list domains, and other services may send no greeting.
#[test]
fn a_provider_that_does_not_list_domains_passes_the_check() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let tls = "secret = \"tanstaaftanstaaf\"\ntls = \"none\"\n";
    customer(&directory, &listener.local_addr().unwrap().to_string(), tls);
    let provider = std::thread::spawn(move || {
        let (socket, _) = listener.accept().unwrap();
        let mut lines = BufReader::new(socket.try_clone().unwrap()).lines();
        let ehlo = "250-relay.example.net\r\n250-AUTH CRAM-MD5\r\n250 ATRN";
        let mut commands = Vec::new();
        for reply in ["220 relay.example.net", ehlo, "334 PDE4OTYuNjk3MTcwOTUyQHg+", "235 2.7.0 OK", ehlo, "221 bye"] {
            (&socket).write_all(format!("{reply}\r\n").as_bytes()).unwrap();
            commands.extend(lines.next());
        }
        drop(socket);
        // The next call gets no greeting.
        drop(listener.accept().unwrap());
        commands.into_iter().map(Result::unwrap).collect::<Vec<_>>()
    });
    let (code, output, error) = run(&directory, "customer.toml", &["check", "--call"]);
    assert_eq!((code, &*error), (0, ""), "{output}");
    assert!(
        output.contains(" [127.0.0.1]: in clear; logged in as acme by CRAM-MD5; domains: not listed\n"),
        "{output}"
    );
    assert!(!output.contains("no provider holds"), "{output}");
    let (code, _, error) = run(&directory, "customer.toml", &["pull"]);
    assert!(code == 75 && error.contains(" before its greeting: another service? check the port"), "{error}");
    assert!(error.contains("odmr: 127.0.0.1:"), "{error}");
    let commands = provider.join().unwrap();
    assert!(commands.iter().all(|command| !command.starts_with("ATRN")) && commands[4] == "QUIT", "{commands:?}");
}

/// Two `serve` would relay the same mail, and neither would know the turned sessions of the other.
#[test]
fn a_spool_has_one_serve_that_can_write_to_it() {
    let directory = provider(&["relay.example.net"], 3);
    let mut first = Command::new(env!("CARGO_BIN_EXE_odmr"));
    let mut first = Running::start(first.arg("serve").arg("-c").arg(directory.path().join("provider.toml")));
    // Another thread logs the end of the certificate, before the listeners or after them.
    let mut awaited = vec!["event=certificate-ends certificate-until=", "listening odmr "];
    while !awaited.is_empty() {
        let line = first.wait_for("");
        awaited.retain(|word| !line.contains(word));
    }
    let (code, _, error) = run(&directory, "provider.toml", &["serve"]);
    assert!(code == 75 && error.contains("another `odmr serve` has the spool"), "{error}");
    // A check, and a connection of inetd, are possible at the same time.
    assert_eq!(run(&directory, "provider.toml", &["check"]).0, 0);
    let (code, output, _) = run(&directory, "provider.toml", &["serve", "--inetd", "inbound"]);
    assert!(code == 0 && output.starts_with("220 "), "{output}");
    first.signal(Signal::TERM);
    assert_eq!(first.exit_code(), Some(0));
    fs::write(directory.path().join("file"), "").unwrap();
    write(&directory, "provider.toml", &PROVIDER.replace("\"spool\"", "\"file/spool\""));
    let (code, _, error) = run(&directory, "provider.toml", &["serve"]);
    assert!(code == 73 && error.contains("file/spool/.odmr: Not a directory"), "{error}");
    let (code, _, error) = run(&directory, "provider.toml", &["check"]);
    assert!(code == 1 && error.contains("provider.toml:2: file is not a directory"), "{error}");
}

/// Dovecot could not read files that root writes there. Runs as root only, which can make such a mailbox.
#[test]
fn mailboxes_of_another_user_are_reported() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    customer(&directory, "192.0.2.1", "secret = \"tanstaaftanstaaf\"\n");
    let mailbox = directory.path().join("mail/example.org/alice");
    fs::create_dir_all(&mailbox).unwrap();
    assert!(!run(&directory, "customer.toml", &["check"]).1.contains("another user"));
    std::os::unix::fs::chown(&mailbox, Some(65534), None).unwrap();
    let (code, output, _) = run(&directory, "customer.toml", &["check"]);
    let text = "customer.toml:7: 1 of 2 directories belong to another user than the one that `odmr pull` runs as, the first \
                is mail/example.org/alice: ";
    assert!(code == 0 && output.contains(text), "{output}");
    std::os::unix::fs::chown(directory.path().join("mail"), Some(65534), None).unwrap();
    let (code, _, error) = run(&directory, "customer.toml", &["check"]);
    assert!(code == 1 && error.contains("customer.toml:7: mail belongs to another user: name that user"), "{error}");
}
