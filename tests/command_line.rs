//! The command line: help, errors, and that errors do not go into the connection of inetd.

use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Output, Stdio};

fn odmr(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_odmr"));
    command.args(arguments).env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> Output {
    odmr(arguments).output().unwrap()
}

#[test]
fn help_is_on_stdout() {
    for arguments in [
        &["-h"][..],
        &["help"],
        &["version"],
        &["help", "serve"],
        &["help", "send"],
        &["help", "help"],
        &["help", "exit-codes"],
        &["--version"],
        &["serve", "-h"],
        &["pull", "-h"],
        &["check", "-h"],
        &["send", "-h"],
        &["status", "-h"],
        &["queue", "-h"],
        &["secret", "-h"],
    ] {
        let result = run(arguments);
        assert_eq!(result.status.code(), Some(0), "{arguments:?}");
        assert!(String::from_utf8_lossy(&result.stdout).contains("odmr ") && result.stderr.is_empty(), "{arguments:?}");
    }
}

#[test]
fn each_failure_is_one_line_on_stderr() {
    let missing = ["-c", "/nonexistent/odmr.toml"];
    let check = |code: i32, arguments: &[&str], part: &str| {
        let result = run(arguments);
        let error = String::from_utf8(result.stderr).unwrap();
        assert_eq!(result.status.code(), Some(code), "{arguments:?}: {error}");
        assert!(error.starts_with("odmr: ") && error.contains(part), "{arguments:?}: {error}");
        assert!(error.lines().count() == 1 && result.stdout.is_empty(), "{arguments:?}: {error}");
    };
    check(64, &[], "a subcommand is missing: serve, pull, check, status, queue, ");
    check(64, &[], " or send; `odmr help` describes each");
    check(64, &["sreve"], "no such subcommand: sreve; did you mean serve? try `odmr -h`");
    check(64, &["help", "chekc"], "no such subcommand: chekc; did you mean check?");
    check(64, &["some\u{1b}[2Jthing\u{9b}2J"], "no such subcommand: some\\x1b[2Jthing\\x9b2J; try `odmr -h`");
    check(64, &["something"], "no such subcommand: something; try `odmr -h`");
    check(64, &["serve"], "-c FILE is missing");
    check(64, &["serve", "--nonsense"], "no such option: --nonsense; try `odmr serve -h`");
    check(64, &["serve", "--verbsoe"], "no such option: --verbsoe; did you mean --verbose?");
    check(64, &["serve", "-c"], "the value of -c is missing");
    check(64, &["send", "--log-tmie"], "did you mean --log-time?");
    check(64, &["queue", "-c", "x"], "what to do is missing: list, show, remove, bounce, retry, export or import");
    check(64, &["queue", "-c", "x", "lst"], "did you mean list?");
    check(64, &["check", "-c", "x", "y"], "\"y\"");
    check(64, &["pull", "-c", "x", "--daemon", "--now"], "exclude each other");
    check(64, &["serve", "-c", "x", "--inetd", "smtp"], "not smtp");
    check(78, &[&["serve"], &missing[..]].concat(), "/nonexistent/odmr.toml");
    check(78, &[&["pull"], &missing[..]].concat(), "/nonexistent/odmr.toml");
    check(1, &[&["check"], &missing[..]].concat(), "/nonexistent/odmr.toml");
    // Here stderr is not the connection, so the failure is printed there, once.
    check(78, &[&["serve", "--inetd", "odmr"], &missing[..]].concat(), "/nonexistent/odmr.toml");
}

/// Under inetd descriptor 2 is the connection too. The client must not receive an error message as a reply.
#[test]
fn a_failure_does_not_go_into_the_connection() {
    for arguments in [&["serve", "--inetd", "odmr", "-c", "/nonexistent/odmr.toml"][..], &["serve", "--inetd", "x"]] {
        let (mut client, server) = UnixStream::pair().unwrap();
        let descriptor = || Stdio::from(OwnedFd::from(server.try_clone().unwrap()));
        let mut command = odmr(arguments);
        let status = command.stdin(descriptor()).stdout(descriptor()).stderr(descriptor()).status().unwrap();
        drop((command, server));
        assert!(!status.success(), "{arguments:?}");
        let mut received = String::new();
        client.read_to_string(&mut received).unwrap();
        assert_eq!(received, "", "{arguments:?}");
    }
}

/// A reader such as head(1) may close standard output early. A full disk is an error.
#[test]
fn standard_output_may_be_closed_early_but_not_fail() {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("customers.d")).unwrap();
    let file = directory.path().join("odmr.toml");
    fs::write(&file, "hostname = \"relay.example.net\"\nspool = \"spool\"\ncustomers = \"customers.d\"\n[odmr]\nrequire-tls = false\n").unwrap();
    let sender = directory.path().join("customer.toml");
    let customer = "hostname = \"mail.example.org\"\n[provider]\naddress = \"127.0.0.1:9\"\ntls = \"none\"\nname = \"acme\"\n\
                    secret-file = \"secret\"\n[mailboxes]\nroot = \"mail\"\naccept = [\"@example.org\"]\n[outgoing]\nqueue = \"out\"\n";
    fs::write(&sender, customer).unwrap();
    let (file, sender) = (file.to_str().unwrap(), sender.to_str().unwrap());
    // The list of this message is longer than a buffer.
    let recipients: String = (0..2000).map(|user| format!("RCPT TO:<{user:040}@example.org>\r\n")).collect();
    let batch = format!("EHLO a.example\r\nMAIL FROM:<>\r\n{recipients}DATA\r\n\r\n.\r\nQUIT\r\n");
    fs::write(directory.path().join("batch"), batch).unwrap();
    let batch = fs::File::open(directory.path().join("batch")).unwrap();
    let imported = odmr(&["queue", "-c", file, "import"]).stdin(batch).output().unwrap();
    assert_eq!(imported.status.code(), Some(0), "{imported:?}");
    let (import, list) = (["queue", "-c", file, "import"], ["queue", "-c", file, "list"]);
    for arguments in [["status", "-c", file, ""], import, list, ["send", "-C", sender, "-bp"]] {
        let arguments: Vec<_> = arguments.into_iter().filter(|argument| !argument.is_empty()).collect();
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let ended = odmr(&arguments).stdout(writer).output().unwrap();
        assert_eq!((ended.status.code(), ended.stderr.len()), (Some(0), 0), "{arguments:?}: {ended:?}");
        if let Ok(full) = fs::File::options().write(true).open("/dev/full") {
            let full = odmr(&arguments).stdout(full).output().unwrap();
            assert_eq!(full.status.code(), Some(74), "{arguments:?}: {full:?}");
            assert!(String::from_utf8_lossy(&full.stderr).starts_with("odmr: standard output: "), "{full:?}");
        }
    }
}
