//! Descriptors that the program inherits: it waits if they would block, and does not change their flags.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

const CUSTOMER: &str = "hostname = \"mail.example.org\"\n[provider]\naddress = \"127.0.0.1:1\"\ntls = \"none\"\n\
                        name = \"acme\"\nsecret = \"tanstaaftanstaaf\"\n[mailboxes]\nroot = \"mailboxes\"\n\
                        accept = [\"alice@example.org\"]\n[outgoing]\nqueue = \"outgoing\"\n";

const PROVIDER: &str =
    "hostname = \"relay.example.net\"\nspool = \"spool\"\ncustomers = \"customers.d\"\n[odmr]\nrequire-tls = false\n";

/// More time than the program needs up to its first read or write.
const LATE: Duration = Duration::from_millis(300);

fn place(config: &str) -> (tempfile::TempDir, String) {
    let place = tempfile::tempdir().unwrap();
    fs::create_dir(place.path().join("customers.d")).unwrap();
    let file = place.path().join("odmr.toml");
    fs::write(&file, config).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    (place, file.to_str().unwrap().to_owned())
}

fn queued(place: &Path) -> usize {
    fs::read_dir(place.join("outgoing/new")).map_or(0, Iterator::count)
}

fn program(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_odmr"));
    command.args(arguments).env_remove("RUST_LOG").stdin(Stdio::null()).stdout(Stdio::null());
    command
}

fn pipe() -> (OwnedFd, OwnedFd) {
    let (reader, writer) = std::io::pipe().unwrap();
    (reader.into(), writer.into())
}

fn sockets() -> (OwnedFd, OwnedFd) {
    let (one, other) = UnixStream::pair().unwrap();
    (one.into(), other.into())
}

fn set_nonblocking(fd: impl AsFd, nonblocking: bool) {
    let flags = fcntl_getfl(&fd).unwrap();
    fcntl_setfl(&fd, if nonblocking { flags | OFlags::NONBLOCK } else { flags - OFlags::NONBLOCK }).unwrap();
}

fn is_nonblocking(fd: impl AsFd) -> bool {
    fcntl_getfl(fd).unwrap().contains(OFlags::NONBLOCK)
}

fn duplicate(fd: &OwnedFd) -> Stdio {
    fd.try_clone().unwrap().into()
}

#[test]
fn a_message_may_come_late_on_stdin() {
    for (reader, writer) in [pipe(), sockets()] {
        let (place, config) = place(CUSTOMER);
        set_nonblocking(&reader, true);
        let mut child = program(&["send", "-C", &config, "-t"]).stdin(duplicate(&reader)).spawn().unwrap();
        let mut writer = fs::File::from(writer);
        for part in ["To: dave@example.net\nSub", "ject: late\n\nHello.\n"] {
            thread::sleep(LATE);
            writer.write_all(part.as_bytes()).unwrap();
        }
        drop(writer);
        assert!(child.wait().unwrap().success());
        assert!(is_nonblocking(&reader));
        assert_eq!(queued(place.path()), 1);
    }
}

/// Runs the program with a non-blocking output that is full at first. Returns what it has written.
fn run_into_full(arguments: &[&str], is_stderr: bool, (reader, writer): (OwnedFd, OwnedFd)) -> (ExitStatus, String) {
    set_nonblocking(&writer, true);
    let mut full = fs::File::from(writer.try_clone().unwrap());
    while full.write(&[b'x'; 1000]).is_ok() {}
    while full.write(b"x").is_ok() {}
    let mut command = program(arguments);
    if is_stderr {
        command.stderr(duplicate(&writer))
    } else {
        command.stdout(duplicate(&writer))
    };
    let mut child = command.spawn().unwrap();
    thread::sleep(LATE);
    let nonblocking = is_nonblocking(&writer);
    drop((command, full, writer));
    let mut output = String::new();
    fs::File::from(reader).read_to_string(&mut output).unwrap();
    assert!(nonblocking, "{arguments:?}");
    (child.wait().unwrap(), output.trim_start_matches('x').to_owned())
}

#[test]
fn output_waits_for_a_slow_reader() {
    for outlet in [pipe, sockets] {
        let (_place, config) = place(CUSTOMER);
        let (status, help) = run_into_full(&["-h"], false, outlet());
        assert!(status.success() && help.ends_with(" version          the version\n"), "{help}");
        let (status, listing) = run_into_full(&["send", "-C", &config, "-bp"], false, outlet());
        assert!(status.success() && listing == "Mail queue is empty\n", "{listing}");
        let (status, error) = run_into_full(&["nonsense"], true, outlet());
        assert!(status.code() == Some(64) && error.starts_with("odmr: no such"), "{error}");
        // The log is on stderr.
        let (status, log) = run_into_full(&["pull", "-v", "-c", &config], true, outlet());
        assert!(status.code() == Some(69) && log.contains("event=call "), "{log}");
    }
}

/// Plays a session over descriptors of the caller: both blocking, then both non-blocking.
fn sessions(arguments: &[&str], greeting: &str) {
    for nonblocking in [false, true] {
        for (as_sockets, ends) in [(false, [pipe(), pipe()]), (true, [sockets(), sockets()])] {
            let [(input, ours), (theirs, output)] = ends;
            for end in [&input, &output] {
                set_nonblocking(end, nonblocking);
            }
            let mut command = program(arguments);
            // inetd passes one socket for both directions.
            let (read_from, write_to) = match as_sockets {
                true => (ours.try_clone().unwrap(), ours),
                false => (theirs, ours),
            };
            command.stdin(duplicate(&input)).stderr(Stdio::null());
            command.stdout(duplicate(if as_sockets { &input } else { &output }));
            let mut child = command.spawn().unwrap();
            thread::sleep(LATE);
            assert_eq!((is_nonblocking(&input), is_nonblocking(&output)), (nonblocking, nonblocking), "{arguments:?}");
            fs::File::from(write_to).write_all(b"NOOP\r\nQUIT\r\n").unwrap();
            assert!(child.wait().unwrap().success());
            assert_eq!((is_nonblocking(&input), is_nonblocking(&output)), (nonblocking, nonblocking), "{arguments:?}");
            drop((command, input, output));
            let mut replies = String::new();
            fs::File::from(read_from).read_to_string(&mut replies).unwrap();
            assert!(replies.starts_with(greeting) && replies.contains("\r\n221 "), "{arguments:?}: {replies}");
        }
    }
}

#[test]
fn smtp_over_the_callers_descriptors() {
    let (_place, config) = place(CUSTOMER);
    sessions(&["send", "-C", &config, "-bs"], "220 mail.example.org ");
    let (_place, config) = place(PROVIDER);
    sessions(&["serve", "-c", &config, "--inetd", "inbound"], "220 relay.example.net ");
    sessions(&["serve", "-c", &config, "--inetd", "odmr"], "220 relay.example.net ");
}
