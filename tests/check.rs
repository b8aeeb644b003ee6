//! `odmr check`: the real binary, its output and its exit codes; `--address` for each table of `testdata/rules`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

/// The lines of a customer's file before the settings of `[mailboxes]`, which each table of `testdata/rules` has.
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
        let directory = tempfile::tempdir().unwrap();
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
            .any(|line| ["refused: ", "deferred: 4", "is no address"].iter().any(|word| line.contains(word)));
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

/// Files that the configuration names are checked too.
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

/// A line of /etc/aliases that is for another mail server stops nothing.
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

/// Mail that programs of root submit comes from root: without a mailbox its DSNs have nobody to go to but postmaster.
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
        output.lines().find(|line| line.contains("mail of root has nobody")).map(str::to_owned)
    };
    let (users, outgoing) = ("accept = [\"alice@example.org\"]", "[outgoing]\nqueue = \"out\"\n");
    let warning = check(users, outgoing).unwrap();
    assert!(warning.contains("customer.toml:6: ") && warning.contains("root@example.org has no mailbox"), "{warning}");
    assert!(
        warning.contains(" goes to postmaster@example.org; ") && warning.contains("aliases = { \"root\" = "),
        "{warning}"
    );
    let other = format!("{users}\naliases = {{ info = \"alice@example.org\" }}");
    assert!(check(&other, outgoing).unwrap().contains("customer.toml:9: "));
    // It gets mail: by the alias that the warning names, or a catch-all. Or nothing is sent, or from elsewhere.
    let alias = format!("{users}\naliases = {{ \"root\" = \"alice@example.org\" }}");
    let elsewhere = format!("{outgoing}domain = \"example.net\"\n");
    for (mailboxes, outgoing) in
        [(&*alias, outgoing), ("accept = [\"@example.org\"]", outgoing), (users, ""), (users, &elsewhere)]
    {
        assert_eq!(check(mailboxes, outgoing), None, "{mailboxes} {outgoing}");
    }
}
