//! `odmr check`: the real binary, what it says, and its exit codes; `--address` for each table of `testdata/rules`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

/// So many lines stand before those of `[mailboxes]`.
const HEAD: &str = "hostname = \"mail.example.org\"\n[provider]\naddress = \"relay.example.net\"\n\
                    name = \"acme\"\nsecret = \"s\"\n[mailboxes]\n";

#[test]
fn each_address_goes_where_the_rules_say() {
    let tables = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/rules");
    let mut addresses = 0;
    for entry in fs::read_dir(tables).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        let (config, expected) = text.split_once("------\n").unwrap();
        let (table, aliases) = config.split_once("-- aliases --\n").unwrap_or((config, ""));
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("odmr.toml");
        fs::write(&file, format!("{HEAD}{table}")).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(folder.path().join("aliases"), aliases).unwrap();
        let mut check = Command::new(env!("CARGO_BIN_EXE_odmr"));
        check.arg("check").arg("-c").arg(&file);
        for typed in expected.lines().filter_map(|line| line.strip_prefix("> ")) {
            check.arg("--address").arg(typed);
        }
        let done = check.output().unwrap();
        let wanted: Vec<_> = expected.lines().filter(|line| !line.starts_with("> ")).collect();
        let said = String::from_utf8(done.stdout).unwrap().replace(&format!("{}/", folder.path().display()), "");
        let error = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(said.lines().collect::<Vec<_>>(), wanted, "{}: {error}", path.display());
        let refused = wanted.iter().any(|line| line.contains("refused: ") || line.contains("is no address"));
        assert_eq!(done.status.code(), Some(i32::from(refused)), "{}: {error}", path.display());
        addresses += expected.lines().filter(|line| line.starts_with("> ")).count();
    }
    assert!(addresses >= 40, "{addresses} addresses");
}

#[test]
fn a_provider_s_file_has_no_addresses() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("customers.d")).unwrap();
    let file = folder.path().join("provider.toml");
    let text = "hostname = \"relay.example.net\"\nspool = \"spool\"\ncustomers = \"customers.d\"\n[inbound]\nlisten = []\n\
                [odmr]\nlisten = [\"127.0.0.1:0\"]\nrequire-tls = false\n";
    fs::write(&file, text).unwrap();
    let mut check = Command::new(env!("CARGO_BIN_EXE_odmr"));
    let done = check.arg("check").arg("-c").arg(&file).args(["--address", "alice@example.org"]).output().unwrap();
    let error = String::from_utf8(done.stderr).unwrap();
    assert_eq!(done.status.code(), Some(64), "{error}");
    assert!(error.contains("--address is for a customer's file"), "{error}");
}

/// What the file only names is looked at, too.
#[test]
fn a_missing_certificate_is_named_with_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("customer.toml");
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
