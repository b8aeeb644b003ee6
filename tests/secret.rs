//! `odmr secret`: what it prints and writes, and that the customer can authenticate with it.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use odmr::sasl::{ScramVerifier, salted_password};
use rustix::process::Signal;

use crate::running::Running;

fn odmr(arguments: &[&str], input: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_odmr"));
    command.args(arguments).env_remove("RUST_LOG").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // The program may end before it has read its input.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

fn text(octets: &[u8]) -> String {
    String::from_utf8(octets.to_vec()).unwrap()
}

/// The value of a key in the output.
fn value(output: &str, key: &str) -> String {
    let line = output.lines().find_map(|line| line.strip_prefix(&format!("{key} = \"")));
    line.unwrap_or_else(|| panic!("no {key} in {output}")).trim_end_matches('"').to_owned()
}

fn is_of(verifier: &str, secret: &str) -> bool {
    let verifier = ScramVerifier::parse(verifier).unwrap();
    verifier.is_of_salted(&salted_password(secret.as_bytes(), &verifier.salt, verifier.iterations))
}

#[test]
fn a_verifier_is_made_of_the_first_line_of_the_input_or_of_a_new_secret() {
    let typed = odmr(&["secret"], "open sesame, please\r\nnot this\n");
    let output = text(&typed.stdout);
    assert!(typed.status.success() && typed.stderr.is_empty() && output.lines().count() == 1, "{output}");
    assert!(is_of(&value(&output, "scram"), "open sesame, please"), "{output}");
    // Each verifier has its own salt.
    assert_ne!(odmr(&["secret"], "open sesame, please").stdout, typed.stdout);

    let made: Vec<_> = ["", "\n"].iter().map(|input| text(&odmr(&["secret"], input).stdout)).collect();
    for output in &made {
        let secret = value(output, "secret");
        assert!(is_of(&value(output, "scram"), &secret), "{output}");
        assert!(secret.len() == 34 && !secret.contains(['0', 'o', '1', 'l']), "{output}");
    }
    assert_ne!(value(&made[0], "secret"), value(&made[1], "secret"));

    let short = odmr(&["secret"], "sesame\n");
    assert!(short.status.success() && text(&short.stderr).contains("has 6 octets and can be guessed"));
    for wrong in ["sésame, ouvre-toi\n", "with a\ttab in it\n"] {
        let result = odmr(&["secret"], wrong);
        assert_eq!(result.status.code(), Some(65));
        assert!(text(&result.stderr).contains("printable ASCII") && result.stdout.is_empty());
    }
}

/// A provider and its customer.
struct Place {
    directory: tempfile::TempDir,
    serve: Option<Running>,
}

impl Place {
    fn new() -> Place {
        let place = Place { directory: tempfile::tempdir().unwrap(), serve: None };
        fs::create_dir(place.path("customers.d")).unwrap();
        let (certificate, key) = odmr::net::tls::self_signed(&["127.0.0.1"]).unwrap();
        place.write("relay.pem", &certificate);
        place.write("relay.key", &key);
        place.write(
            "provider.toml",
            "hostname = \"relay.example.net\"\nspool = \"spool\"\ncustomers = \"customers.d\"\n\
             [tls]\ncertificate = \"relay.pem\"\nkey = \"relay.key\"\n[inbound]\nlisten = []\n\
             [odmr]\nlisten = [\"127.0.0.1:0\"]\n",
        );
        place.write("acme.secret", "tanstaaftanstaaf\n");
        let acme =
            "# Acme, since 1999\ndomains = [\"example.org\"]\nsecret-file = \"../acme.secret\" # by phone\nrate = 7\n";
        place.write("customers.d/acme.toml", acme);
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o640)).unwrap();
    }

    fn secret(&self, arguments: &[&str], input: &str) -> Output {
        let config = self.path("provider.toml");
        odmr(&[&["secret"], arguments, &["-c", config.to_str().unwrap()]].concat(), input)
    }

    /// Makes a call. Returns the mechanism in the provider's log, or the exit code and the error.
    fn call(&mut self, address: &str, secret: &str, more: &str) -> Result<String, (Option<i32>, String)> {
        let text = format!(
            "hostname = \"mail.example.org\"\n[provider]\naddress = \"{address}\"\nca = \"relay.pem\"\nname = \"acme\"\n\
             secret = \"{secret}\"\n{more}\n[mailboxes]\nroot = \"mail\"\naccept = [\"alice@example.org\"]\n"
        );
        self.write("customer.toml", &text);
        let result = odmr(&["pull", "-c", self.path("customer.toml").to_str().unwrap()], "");
        if !result.status.success() {
            let error = String::from_utf8_lossy(&result.stderr).lines().last().unwrap_or_default().to_owned();
            return Err((result.status.code(), error));
        }
        let line = self.serve.as_mut().unwrap().wait_for("event=authenticated");
        let mechanism = line.rsplit_once("mechanism=").unwrap().1;
        Ok(mechanism.split(' ').next().unwrap_or_default().to_owned())
    }
}

/// The files below a directory that contain this text.
fn files_with(directory: &Path, text: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    // A socket has no content.
    let found = entries.filter(|path| path.is_dir() || path.is_file()).flat_map(|path| match path.is_dir() {
        true => files_with(&path, text),
        false => {
            let octets = fs::read(&path).unwrap();
            octets.windows(text.len()).any(|part| part == text.as_bytes()).then_some(path).into_iter().collect()
        }
    });
    found.collect()
}

/// Only the customer's own file has the new secret.
#[test]
fn with_a_verifier_the_account_opens_for_its_secret_only() {
    let mut place = Place::new();
    let mut serve = Running::start(
        Command::new(env!("CARGO_BIN_EXE_odmr")).arg("serve").arg("-c").arg(place.path("provider.toml")),
    );
    let address = serve.listening("odmr");
    place.serve = Some(serve);
    assert_eq!(place.call(&address, "tanstaaftanstaaf", "").as_deref(), Ok("SCRAM-SHA-256-PLUS"));
    assert_eq!(place.call(&address, "tanstaaftanstaaf", "mechanisms = [\"CRAM-MD5\"]").as_deref(), Ok("CRAM-MD5"));

    let made = place.secret(&["acme"], "");
    let output = text(&made.stdout);
    assert!(
        made.status.success() && output.contains("SIGHUP") && output.contains("acme.secret is not read"),
        "{output}"
    );
    let secret = value(&output, "secret");
    assert!(output.contains("in [provider] of its file; if that has `secret-file`, "), "{output}");
    let file = fs::read_to_string(place.path("customers.d/acme.toml")).unwrap();
    let [first, second, third, fourth] = file.lines().collect::<Vec<_>>()[..] else { panic!("{file}") };
    assert_eq!([first, second, fourth], ["# Acme, since 1999", "domains = [\"example.org\"]", "rate = 7"]);
    let verifier = third.strip_prefix("scram = \"").and_then(|rest| rest.strip_suffix("\" # by phone")).unwrap();
    assert!(is_of(verifier, &secret));
    let mode = place.path("customers.d/acme.toml").metadata().unwrap().permissions().mode();
    assert_eq!((mode & 0o777, fs::read_dir(place.path("customers.d")).unwrap().count()), (0o640, 1));

    place.serve.as_mut().unwrap().signal(Signal::HUP);
    place.serve.as_mut().unwrap().wait_for("event=reloaded");
    assert!(files_with(place.directory.path(), &secret).is_empty());
    for (mechanisms, expected) in [
        ("", "SCRAM-SHA-256-PLUS"),
        ("mechanisms = [\"SCRAM-SHA-256\"]", "SCRAM-SHA-256"),
        ("mechanisms = [\"PLAIN\"]", "PLAIN"),
    ] {
        assert_eq!(place.call(&address, &secret, mechanisms).as_deref(), Ok(expected));
        let (code, error) = place.call(&address, "tanstaaftanstaaf", mechanisms).unwrap_err();
        assert!(code == Some(77) && error.contains("535 5.7.8"), "{code:?} {error}");
    }
    // Nothing that the provider has stored opens the account.
    let stored = verifier.split(['$', ':']).skip(2).chain([verifier]);
    for mechanisms in ["", "mechanisms = [\"PLAIN\"]"] {
        for stored in stored.clone() {
            // A success ends the delays after wrong secrets.
            assert!(place.call(&address, &secret, "").is_ok());
            let (code, error) = place.call(&address, stored, mechanisms).unwrap_err();
            assert!(code == Some(77) && error.contains("535 5.7.8"), "{stored}: {code:?} {error}");
        }
    }
    let (code, error) = place.call(&address, &secret, "mechanisms = [\"CRAM-MD5\"]").unwrap_err();
    assert!(code == Some(76) && error.contains("`mechanisms` may permit others"), "{code:?} {error}");
}

#[test]
fn errors_name_what_is_wrong_and_change_nothing() {
    let place = Place::new();
    let check = |arguments: &[&str], code: i32, part: &str| {
        let result = place.secret(arguments, "open sesame, please\n");
        let error = text(&result.stderr);
        assert!(result.status.code() == Some(code) && error.contains(part), "{arguments:?}: {error}");
    };
    check(&[], 64, "the login name of a customer is missing; try `odmr secret -h`");
    check(&["acme", "beta"], 64, "too many arguments");
    check(&["beta"], 65, "there is no customer \"beta\": make ");
    check(&["../customers.d/acme"], 65, "there is no customer");
    let without_file = odmr(&["secret", "acme"], "");
    assert!(without_file.status.code() == Some(64) && text(&without_file.stderr).contains("-c FILE, the provider's"));
    // `-c` names the file of a customer.
    place.write("provider.toml", "hostname = \"h.example\"\n[provider]\n");
    check(&["acme"], 78, "is a customer's file");

    // If the new secret cannot be printed, the file must not have its verifier: no copy of the secret would exist.
    let place = Place::new();
    let before = fs::read(place.path("customers.d/acme.toml")).unwrap();
    if let Ok(full) = fs::OpenOptions::new().write(true).open("/dev/full") {
        let mut command = Command::new(env!("CARGO_BIN_EXE_odmr"));
        let command = command.args(["secret", "acme", "-c"]).arg(place.path("provider.toml"));
        let status = command.stdin(Stdio::null()).stdout(full).stderr(Stdio::null()).status().unwrap();
        assert_eq!(status.code(), Some(74));
        assert!(fs::read(place.path("customers.d/acme.toml")).unwrap() == before);
    }

    // If the file cannot be written, the secret that was printed opens nothing.
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -f 0; exec \"$0\" secret acme -c \"$1\"", env!("CARGO_BIN_EXE_odmr")]);
    let failed = command.arg(place.path("provider.toml")).stdin(Stdio::null()).output().unwrap();
    let error = text(&failed.stderr);
    assert!(error.contains("the secret is not changed, and what was printed is of no use"), "{error}");
    assert!(fs::read(place.path("customers.d/acme.toml")).unwrap() == before);

    // A wrong verifier in the file is replaced.
    place.write("customers.d/acme.toml", "domains = [\"example.org\"]\nscram = \"SCRAM-SHA-256$1\"\n");
    let replaced = place.secret(&["acme"], "open sesame, please\n");
    assert!(replaced.status.success(), "{}", text(&replaced.stderr));
    let file = fs::read_to_string(place.path("customers.d/acme.toml")).unwrap();
    assert!(is_of(&value(&file, "scram"), "open sesame, please"));
    // Nothing is written if the customer would have no account after that, or still its old secret.
    let customer = place.path("customers.d/acme.toml");
    let fails = |part: &str| {
        let before = fs::read(&customer).unwrap();
        let failed = place.secret(&["acme"], "open sesame, please\n");
        let error = text(&failed.stderr);
        assert!(failed.status.code() == Some(78) && error.contains(part), "{error}");
        assert!(error.contains("; nothing is changed") && fs::read(&customer).unwrap() == before, "{error}");
    };
    let acme = "domains = [\"example.org\"]\nsecret = \"tanstaaftanstaaf\"\n";
    place.write("customers.d/acme.toml", &format!("{acme}mechanisms = [\"CRAM-MD5\"]\n"));
    fails("customers.d/acme.toml:3: no login is possible, as CRAM-MD5 needs a `secret` in clear");
    place.write("customers.d/acme.toml", "certificate = [\"spki-sha256:1\"]\ndomains = [\"example.org\"]\n");
    fails("customers.d/acme.toml:1: ");
    place.write(
        "customers.d/acme.toml",
        &format!("domains = [\"example.org\"]\ncertificate = [\"sha256:{}\"]\n", "00".repeat(32)),
    );
    fs::set_permissions(&customer, fs::Permissions::from_mode(0o644)).unwrap();
    fails("acme.toml, and every user may read it: chmod 640 ");
    // A symbolic link stays one. Relative paths in its file begin at the directory of the customers.
    place.write(
        "acme.toml",
        "domains = [\"example.org\"]\nsecret-file = \"../acme.secret\"\nmechanisms = [\"PLAIN\"]\n",
    );
    fs::remove_file(&customer).unwrap();
    std::os::unix::fs::symlink("../acme.toml", &customer).unwrap();
    let linked = place.secret(&["acme"], "open sesame, please\n");
    let (output, errors) = (text(&linked.stdout), text(&linked.stderr));
    assert!(
        linked.status.success() && output.contains("customers.d/../acme.secret is not read any more"),
        "{output}{errors}"
    );
    assert!(is_of(&value(&fs::read_to_string(place.path("acme.toml")).unwrap(), "scram"), "open sesame, please"));
    assert!(customer.is_symlink());
    fs::remove_file(&customer).unwrap();
    // An error of TOML is reported with its line.
    place.write("customers.d/acme.toml", "domains = [\"example.org\"]\nscram = SCRAM\n");
    let broken = place.secret(&["acme"], "open sesame, please\n");
    assert!(broken.status.code() == Some(78) && text(&broken.stderr).contains("customers.d/acme.toml:2: "));
}
