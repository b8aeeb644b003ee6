//! Certificates of both sides: each side prints the pin that the other one has to write, and no call fails while keys are
//! changed.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::Arc;

use rustix::process::Signal;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;

use crate::running::Running;

/// A provider and its customer in one directory.
struct Place {
    directory: tempfile::TempDir,
    serve: Running,
    address: String,
}

impl Place {
    /// Another customer of the provider has a certificate, so that the provider asks clients for theirs.
    fn start(acme: &str) -> Place {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("customers.d")).unwrap();
        let (certificate, key) = odmr::net::tls::self_signed(&["localhost"]).unwrap();
        write(&directory, "relay.pem", &certificate);
        write(&directory, "relay.key", &key);
        write(&directory, "provider.toml", PROVIDER);
        let (other, _) = odmr::net::tls::self_signed(&["other"]).unwrap();
        write(&directory, "other.pem", &other);
        let pin = &odmr::net::tls::CertificateInfo::load(&directory.path().join("other.pem")).unwrap().pins[0];
        let beta = format!("domains = [\"example.edu\"]\ncertificate = [\"{pin}\"]\n");
        write(&directory, "customers.d/beta.toml", &beta);
        write(&directory, "customers.d/acme.toml", &format!("domains = [\"example.org\"]\n{acme}"));
        let mut serve = Command::new(env!("CARGO_BIN_EXE_odmr"));
        let mut serve = Running::start(serve.arg("serve").arg("-c").arg(directory.path().join("provider.toml")));
        let address = serve.listening("odmr").replace("127.0.0.1", "localhost");
        Place { directory, serve, address }
    }

    /// Writes a new certificate and key for the customer.
    fn new_identity(&self, name: &str) {
        let (certificate, key) = odmr::net::tls::self_signed(&["me.example"]).unwrap();
        write(&self.directory, &format!("{name}.pem"), &certificate);
        write(&self.directory, &format!("{name}.key"), &key);
    }

    fn customer(&self, login: &str) {
        let text = format!(
            "hostname = \"mail.example.org\"\n[provider]\naddress = \"{}\"\nca = \"relay.pem\"\nname = \"acme\"\n{login}\n\
             [mailboxes]\nroot = \"mail\"\naccept = [\"@example.org\"]\n",
            self.address
        );
        write(&self.directory, "customer.toml", &text);
    }

    /// Runs `odmr` with the customer's file. Returns the exit code and the output.
    fn run(&self, arguments: &[&str]) -> (i32, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_odmr"));
        let command = command.current_dir(self.directory.path()).args(arguments).args(["-c", "customer.toml"]);
        let done = command.output().unwrap();
        let text = [done.stdout, done.stderr].map(|text| String::from_utf8(text).unwrap()).concat();
        (done.status.code().unwrap(), text)
    }

    /// The pin that `odmr check` prints for the provider.
    fn printed_pin(&self) -> String {
        let (code, output) = self.run(&["check"]);
        let pin = output.split("or certificate = [\"").nth(1).and_then(|rest| rest.split('"').next());
        pin.unwrap_or_else(|| panic!("{code} {output}")).to_owned()
    }

    /// Writes the provider's file of the customer, and reloads the provider.
    fn account(&mut self, pins: &[&str]) {
        let list = pins.iter().map(|pin| format!("\"{pin}\"")).collect::<Vec<_>>().join(", ");
        let text = format!("domains = [\"example.org\"]\ncertificate = [{list}]\n");
        write(&self.directory, "customers.d/acme.toml", &text);
        self.serve.signal(Signal::HUP);
        self.serve.wait_for("event=reloaded");
    }
}

const PROVIDER: &str = "hostname = \"localhost\"\nspool = \"spool\"\ncustomers = \"customers.d\"\n[tls]\n\
                        certificate = \"relay.pem\"\nkey = \"relay.key\"\n[inbound]\nlisten = []\n\
                        [odmr]\nlisten = [\"127.0.0.1:0\"]\n";

fn write(directory: &tempfile::TempDir, name: &str, text: &str) {
    let path = directory.path().join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
}

#[test]
fn both_sides_name_the_pin_that_is_missing_and_keys_change_without_a_lost_call() {
    let mut place = Place::start("secret = \"tanstaaftanstaaf\"\n");
    place.new_identity("me");
    place.customer("certificate = \"me.pem\"\nkey = \"me.key\"\n");
    // The provider does not know the certificate yet: both sides report its pin.
    let pin = place.printed_pin();
    assert!(pin.starts_with("spki-sha256:"), "{pin}");
    let (code, output) = place.run(&["check", "--call"]);
    assert!(code == 1 && output.contains("customer.toml:3: the provider does not know the certificate"), "{output}");
    assert_eq!(place.run(&["pull"]).0, 77);
    let line = place.serve.wait_for("event=unknown-certificate");
    assert!(line.ends_with(&format!(" peer=[127.0.0.1] pin={pin}")), "{line}");
    // With a secret the customer authenticates nevertheless, and the check reports that the certificate was not used.
    place.customer("certificate = \"me.pem\"\nkey = \"me.key\"\nsecret = \"tanstaaftanstaaf\"");
    let (code, output) = place.run(&["check", "--call"]);
    assert!(code == 0 && output.contains("; logged in as acme by SCRAM-SHA-256-PLUS under TLSv1.3; "), "{output}");
    assert!(output.contains("customer.toml:6: ") && output.contains(" does not know this certificate"), "{output}");
    // Now the account has the pin, and no secret.
    place.account(&[&pin]);
    let (code, output) = place.run(&["check", "--call"]);
    assert!(code == 0 && output.contains("; logged in as acme by EXTERNAL under TLSv1.3; "), "{output}");
    assert!(!output.contains("does not know"), "{output}");
    let line = place.serve.wait_for("event=authenticated");
    let expected = format!(" peer=[127.0.0.1] account=acme mechanism=EXTERNAL tls=TLSv1.3 pin={pin}");
    assert!(line.ends_with(&expected), "{line}");
    // A change of keys: first the provider gets the new pin beside the old one; last it removes the old one.
    let old = pin;
    place.new_identity("new");
    place.customer("certificate = \"new.pem\"\nkey = \"new.key\"\n");
    let new = place.printed_pin();
    assert_ne!(old, new);
    place.account(&[&old, &new]);
    let by = |place: &Place, name: &str| {
        place.customer(&format!("certificate = \"{name}.pem\"\nkey = \"{name}.key\"\n"));
        place.run(&["pull"]).0
    };
    assert_eq!([by(&place, "me"), by(&place, "new"), by(&place, "me")], [0, 0, 0]);
    place.account(&[&new]);
    assert_eq!([by(&place, "new"), by(&place, "me")], [0, 77]);
    let line = place.serve.wait_for("event=unknown-certificate");
    assert!(line.ends_with(&format!(" pin={old}")), "{line}");
}

#[test]
fn a_certificate_for_another_account_and_files_that_do_not_fit_are_named() {
    let mut place = Place::start("secret = \"tanstaaftanstaaf\"\n");
    place.new_identity("me");
    place.new_identity("you");
    place.customer("certificate = \"me.pem\"\nkey = \"me.key\"\n");
    let pin = place.printed_pin();
    place.account(&[&pin]);
    // The name is that of another account.
    let text = fs::read_to_string(place.directory.path().join("customer.toml")).unwrap();
    write(&place.directory, "customer.toml", &text.replace("name = \"acme\"", "name = \"beta\""));
    let (code, output) = place.run(&["pull"]);
    assert!(code == 77 && output.contains("535 5.7.8") && output.contains("`secret`, or `certificate`"), "{output}");
    let line = place.serve.wait_for("event=auth-failed");
    assert!(line.ends_with(&format!(" account=\"beta\" mechanism=EXTERNAL pin={pin}")), "{line}");
    for (files, expected) in [
        (["me.pem", "you.key"], "customer.toml:7: you.key does not belong to the first certificate in me.pem"),
        (
            ["no.pem", "me.key"],
            "customer.toml:6: no.pem: No such file or directory (os error 2); put the certificate there",
        ),
        (["me.pem", "no.key"], "customer.toml:7: no.key: No such file or directory (os error 2); put the key there"),
        (["me.key", "me.key"], "customer.toml:6: me.key holds no certificate"),
    ] {
        place.customer(&format!("certificate = \"{}\"\nkey = \"{}\"", files[0], files[1]));
        for (command, expected_code) in [("check", 1), ("pull", 78)] {
            let (code, output) = place.run(&[command]);
            let output = output.replace(&format!("{}/", place.directory.path().display()), "");
            assert!(code == expected_code && output.contains(expected), "{command} {code} {output}\n{expected}");
        }
    }
}

/// RFC 5246 section 7.4.6: the certificate is not encrypted.
#[test]
fn a_certificate_in_clear_text_is_reported() {
    let directory = tempfile::tempdir().unwrap();
    let (certificate, key) = odmr::net::tls::self_signed(&["localhost"]).unwrap();
    write(&directory, "me.pem", &certificate);
    write(&directory, "me.key", &key);
    write(&directory, "relay.pem", &certificate);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string().replace("127.0.0.1", "localhost");
    let server = std::thread::spawn(move || {
        let config = server_of(&[&rustls::version::TLS12], &certificate, &key);
        let (mut socket, _) = listener.accept().unwrap();
        let mut connection = rustls::ServerConnection::new(config).unwrap();
        let mut lines = BufReader::new(rustls::Stream::new(&mut connection, &mut socket));
        let ehlo = "250-relay.example.net\r\n250-AUTH EXTERNAL\r\n250 ATRN\r\n";
        for reply in ["220 relay\r\n", ehlo, "235 2.7.0 ok\r\n", ehlo, "221 bye\r\n"] {
            lines.get_mut().write_all(reply.as_bytes()).unwrap();
            let _ = lines.read_line(&mut String::new());
        }
    });
    let text = format!(
        "hostname = \"mail.example.org\"\n[provider]\naddress = \"{address}\"\ntls = \"implicit\"\nca = \"relay.pem\"\n\
         name = \"acme\"\ncertificate = \"me.pem\"\nkey = \"me.key\"\n[mailboxes]\nroot = \"mail\"\n\
         accept = [\"@example.org\"]\n"
    );
    write(&directory, "customer.toml", &text);
    let mut check = Command::new(env!("CARGO_BIN_EXE_odmr"));
    let done = check.current_dir(directory.path()).args(["check", "--call", "-c", "customer.toml"]).output().unwrap();
    let output = [done.stdout, done.stderr].map(|text| String::from_utf8(text).unwrap()).concat();
    assert!(output.contains("; logged in as acme by EXTERNAL under TLSv1.2; domains: not listed"), "{output}");
    assert!(
        output.contains("customer.toml:7: localhost:") && output.contains(" uses TLS 1.2, which sends this"),
        "{output}"
    );
    server.join().unwrap();
}

/// A TLS server of these versions that asks for a certificate.
fn server_of(
    versions: &[&'static rustls::SupportedProtocolVersion], certificate: &str, key: &str,
) -> Arc<rustls::ServerConfig> {
    let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()];
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(chain[0].clone()).unwrap();
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build().unwrap();
    let config = rustls::ServerConfig::builder_with_provider(provider).with_protocol_versions(versions).unwrap();
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
    Arc::new(config.with_client_cert_verifier(clients).with_single_cert(chain, key).unwrap())
}

/// Runs as root only, which can make such files.
#[test]
fn keys_that_another_user_cannot_read_are_named_with_the_remedy() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let place = Place::start("secret = \"tanstaaftanstaaf\"\n");
    place.new_identity("me");
    place.customer("certificate = \"me.pem\"\nkey = \"me.key\"\n");
    let text = fs::read_to_string(place.directory.path().join("customer.toml")).unwrap();
    write(&place.directory, "customer.toml", &format!("user = \"nobody\"\n{text}"));
    std::os::unix::fs::chown(place.directory.path().join("customer.toml"), Some(65534), None).unwrap();
    for name in ["", "relay.pem", "me.pem"] {
        fs::set_permissions(place.directory.path().join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let (_, output) = place.run(&["check"]);
    let expected = "me.key may not be read by this user: chown it";
    let line = output.lines().find(|line| line.contains(expected)).unwrap_or_else(|| panic!("{output}"));
    assert!(
        line.contains("customer.toml:8: ")
            && line.contains("root may read it, and nobody may not, so a reload (SIGHUP) would fail"),
        "{line}"
    );
    std::os::unix::fs::chown(place.directory.path().join("me.key"), Some(65534), None).unwrap();
    assert!(!place.run(&["check"]).1.contains(expected));
    // The provider's key, if the spool belongs to another user.
    let check = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_odmr"));
        let done = command.current_dir(place.directory.path()).args(["check", "-c", "provider.toml"]).output().unwrap();
        String::from_utf8(done.stdout).unwrap().replace(&format!("{}/", place.directory.path().display()), "")
    };
    assert!(!check().contains("relay.key"), "{}", check());
    std::os::unix::fs::chown(place.directory.path().join("spool"), Some(65534), None).unwrap();
    let expected = "provider.toml:6: relay.key may not be read by the user to whom the spool belongs";
    assert!(check().contains(expected), "{}", check());
}

/// The files on the provider's disk do not open an account that has only a certificate.
#[test]
fn a_copy_of_the_provider_opens_no_account_with_a_certificate() {
    let mut place = Place::start("secret = \"tanstaaftanstaaf\"\n");
    place.new_identity("me");
    place.customer("certificate = \"me.pem\"\nkey = \"me.key\"\n");
    let pins = odmr::net::tls::CertificateInfo::load(&place.directory.path().join("me.pem")).unwrap().pins;
    place.account(&[&pins[0], &pins[1]]);
    assert_eq!(place.run(&["pull"]).0, 0);
    // A thief has each word of the provider's files, but not the customer's key.
    let mut found = Vec::new();
    for name in
        ["provider.toml", "customers.d/acme.toml", "customers.d/beta.toml", "relay.pem", "relay.key", "other.pem"]
    {
        found.push(fs::read_to_string(place.directory.path().join(name)).unwrap());
    }
    collect(&place.directory.path().join("spool"), &mut found);
    let mut tried: Vec<_> = found
        .iter()
        .flat_map(|text| text.split(['"', '\n', ' ', ':', '[', ']', ',']))
        .filter(|word| !word.is_empty() && !word.chars().any(char::is_control))
        .map(str::to_owned)
        .chain(pins.clone())
        .collect();
    tried.sort();
    tried.dedup();
    assert!(tried.len() > 30 && pins.iter().all(|pin| tried.contains(pin)), "{tried:?}");
    for secret in tried {
        // Without this, each attempt would be delayed more than the one before.
        let _ = fs::remove_file(place.directory.path().join("spool/.odmr/logins"));
        place.customer(&format!("secret = '{}'", secret.replace('\'', "")));
        let (code, output) = place.run(&["check", "--call"]);
        assert!(
            code == 1 && (output.contains("535 5.7.8") || output.contains("customer.toml:6: ")),
            "{secret}: {output}"
        );
    }
    // The thief also has the provider's certificate and key.
    place.customer("certificate = \"relay.pem\"\nkey = \"relay.key\"");
    assert_eq!(place.run(&["pull"]).0, 77);
}

/// The texts of all files below a directory.
fn collect(directory: &std::path::Path, texts: &mut Vec<String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        match entry.path() {
            path if path.is_dir() => collect(&path, texts),
            path if !path.is_file() => {} // a socket
            path => texts.push(String::from_utf8_lossy(&fs::read(path).unwrap()).into_owned()),
        }
    }
}
