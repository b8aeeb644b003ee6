//! The program under a supervisor: readiness, and listening sockets by their names.

use std::fs;
use std::io::Read;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;

use crate::running::{Client, Running};

const PROVIDER: &str = "hostname = \"relay.example.net\"\nspool = \"spool\"\ncustomers = \"customers.d\"\n[inbound]\n\
                        listen = [\"127.0.0.1:0\"]\n[odmr]\nlisten = [\"127.0.0.1:0\"]\nrequire-tls = false\n";

const CUSTOMER: &str = "hostname = \"mail.example.org\"\n[provider]\naddress = \"127.0.0.1:1\"\ntls = \"none\"\n\
                        name = \"acme\"\nsecret = \"tanstaaftanstaaf\"\n[mailboxes]\nroot = \"mailboxes\"\n\
                        accept = [\"alice@example.org\"]\n[outgoing]\nqueue = \"outgoing\"\nlisten = [\"127.0.0.1:0\"]\n";

struct Place(tempfile::TempDir);

impl Place {
    fn new(config: &str) -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        fs::create_dir(place.0.path().join("customers.d")).unwrap();
        place.write("customers.d/acme.toml", "domains = [\"example.org\"]\nsecret = \"tanstaaftanstaaf\"\n");
        place.write("odmr.toml", config);
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o600)).unwrap();
    }

    /// A shell that executes the program after `setup`: redirections and variables.
    fn shell(&self, setup: &str, words: &str) -> Command {
        let mut shell = Command::new("sh");
        let script = format!("{setup} exec \"$0\" {words} -c \"$1\"");
        shell.arg("-c").arg(script).arg(env!("CARGO_BIN_EXE_odmr")).arg(self.path("odmr.toml"));
        shell.stdin(Stdio::null()).stdout(Stdio::null()).env_remove("NOTIFY_SOCKET");
        shell
    }

    /// Runs the command to its end. Returns the exit code and stderr.
    fn fails(&self, command: &mut Command) -> (Option<i32>, String) {
        let done = command.stderr(Stdio::piped()).output().unwrap();
        (done.status.code(), String::from_utf8(done.stderr).unwrap())
    }
}

/// Receives the next report on the socket of the supervisor.
fn report(socket: &UnixDatagram) -> String {
    let mut space = [0; 512];
    let length = socket.recv(&mut space).unwrap();
    String::from_utf8(space[..length].to_vec()).unwrap()
}

#[test]
fn a_daemon_reports_that_it_is_ready_reloads_and_stops() {
    for (config, words) in [(PROVIDER, "serve"), (CUSTOMER, "pull --daemon")] {
        let place = Place::new(config);
        let mut sockets =
            vec![(UnixDatagram::bind(place.path("notify")).unwrap(), place.path("notify").into_os_string())];
        #[cfg(target_os = "linux")]
        {
            use std::os::linux::net::SocketAddrExt;
            let name = format!("odmr-test-{}-{}", std::process::id(), words.len());
            let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
            sockets.push((UnixDatagram::bind_addr(&address).unwrap(), format!("@{name}").into()));
        }
        for (socket, address) in sockets {
            socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            let mut daemon = Running::start(place.shell("", words).env("NOTIFY_SOCKET", address));
            assert_eq!(report(&socket), "READY=1");
            daemon.wait_for("event=listening");
            for (text, event) in
                [(config.to_owned(), "event=reloaded"), (config.replace("= [", "= "), "event=reload-failed")]
            {
                place.write("odmr.toml", &text);
                daemon.signal(Signal::HUP);
                let reloading = report(&socket);
                let time = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").expect(&reloading);
                assert!(time.parse::<u64>().unwrap() > 0);
                daemon.wait_for(event);
                assert_eq!(report(&socket), "READY=1");
            }
            place.write("odmr.toml", config);
            daemon.signal(Signal::TERM);
            assert_eq!(report(&socket), "STOPPING=1");
            assert_eq!(daemon.exit_code(), Some(0));
        }
    }
}

#[test]
fn a_newline_on_a_descriptor_means_ready() {
    for (config, words) in [(PROVIDER, "serve --ready-fd 7"), (CUSTOMER, "pull --daemon --ready-fd 7")] {
        let place = Place::new(config);
        let mut daemon = Running::start(place.shell("exec 7>&1 1>&2;", words).stdout(Stdio::piped()));
        let mut written = String::new();
        // The end of the pipe shows that the descriptor was closed.
        daemon.child.stdout.take().unwrap().read_to_string(&mut written).unwrap();
        assert_eq!(written, "\n", "{words}");
        daemon.signal(Signal::TERM);
        assert_eq!(daemon.exit_code(), Some(0));
    }
}

#[test]
fn a_descriptor_that_cannot_be_used_is_a_wrong_option() {
    let place = Place::new(PROVIDER);
    for (number, phrase) in [
        ("7", "write the number that the supervisor listens on"),
        ("1", "0, 1 and 2 are stdin, stdout and stderr"),
        ("x", "not the number of a descriptor, such as 3"),
        ("-1", "not the number of a descriptor, such as 3"),
    ] {
        let (code, error) = place.fails(&mut place.shell("", &format!("serve --ready-fd={number}")));
        assert!(code == Some(64) && error.contains(phrase), "{number}: {code:?} {error}");
    }
    for words in ["serve --inetd odmr --ready-fd 7", "pull --ready-fd 7"] {
        assert_eq!(place.fails(&mut place.shell("", words)).0, Some(64), "{words}");
    }
}

/// Passes these two sockets as the descriptors 3 and 4.
fn pass(command: &mut Command, sockets: [&TcpListener; 2]) {
    let [one, other] = sockets.map(|socket| OwnedFd::from(socket.try_clone().unwrap()));
    command.stdin(one).stdout(other);
}

const PASSED: &str = "exec 3<&0 4<&1 </dev/null >/dev/null; LISTEN_PID=$$; LISTEN_FDS=2; export LISTEN_PID LISTEN_FDS;";

fn sockets() -> [TcpListener; 2] {
    [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap())
}

#[test]
fn passed_sockets_replace_listen_by_name() {
    let [one, other] = sockets();
    let addresses = [&one, &other].map(|socket| socket.local_addr().unwrap().to_string());
    // This machine does not have the address 192.0.2.1, so binding it would fail: `listen` is not used.
    let place = Place::new(&PROVIDER.replacen("127.0.0.1", "192.0.2.1", 1));
    let mut command = place.shell(PASSED, "serve");
    pass(&mut command, [&one, &other]);
    let mut serve = Running::start(command.env("LISTEN_FDNAMES", "inbound:inbound"));
    for address in &addresses {
        assert_eq!(serve.listening("inbound"), *address);
        assert!(serve.wait_for("event=listening listener=inbound").ends_with(" source=supervisor"));
    }
    assert!(!serve.wait_for("event=listening listener=odmr").contains("source="));
    for address in &addresses {
        assert!(Client::connect(address).send("a@b.example", "alice@example.org", 1).starts_with("250 "));
    }
    // They stay after a reload.
    serve.signal(Signal::HUP);
    serve.wait_for("event=reloaded");
    Client::connect(&addresses[0]);

    let place = Place::new(CUSTOMER);
    let mut command = place.shell(PASSED, "pull --daemon");
    pass(&mut command, [&one, &other]);
    let mut daemon = Running::start(command.env("LISTEN_FDNAMES", "local:local"));
    assert_eq!([daemon.listening("local"), daemon.listening("local")], addresses);
}

#[test]
fn sockets_of_another_process_are_ignored() {
    let place = Place::new(PROVIDER);
    let mut command = place.shell("exec 3<&0 4<&1 >/dev/null;", "serve");
    pass(&mut command, sockets().each_ref());
    let mut serve = Running::start(command.envs([("LISTEN_PID", "1"), ("LISTEN_FDS", "2")]));
    assert!(!serve.wait_for("event=listening listener=inbound").contains("source="));
}

/// A descriptor that the program itself opens gets the next free number. It must not be used as a socket of the supervisor.
#[test]
fn a_count_of_more_sockets_than_were_passed_is_an_error() {
    let place = Place::new(PROVIDER);
    for count in 3..7 {
        let setup = PASSED.replace("LISTEN_FDS=2", &format!("LISTEN_FDS={count}"));
        let mut command = place.shell(&setup, "serve");
        pass(&mut command, sockets().each_ref());
        let (code, error) = place.fails(&mut command);
        assert!(code == Some(78) && error.contains("the descriptor 5 cannot be used: "), "{code:?} {error}");
    }
    for ready in [5, 6, 7, 8] {
        let mut command = place.shell(PASSED, &format!("serve --ready-fd {ready}"));
        pass(&mut command, sockets().each_ref());
        assert_eq!(place.fails(&mut command).0, Some(64));
    }
}

#[test]
fn sockets_that_the_configuration_does_not_use_are_errors() {
    let (place, customer) = (Place::new(PROVIDER), Place::new(CUSTOMER.split("[outgoing]").next().unwrap()));
    for (place, words, names, phrase) in [
        (&place, "serve", None, "2 sockets have been passed without names; for each write FileDescriptorName="),
        (
            &place,
            "serve",
            Some("inbound:web"),
            "write FileDescriptorName=inbound, odmr or odmr-tls in its .socket unit",
        ),
        (&place, "serve", Some("inbound"), "LISTEN_FDNAMES has 1 names for 2 sockets"),
        (&place, "serve", Some("inbound:odmr-tls"), "the file has no [tls]: add it"),
        (&customer, "pull --daemon", Some("local:odmr"), "write FileDescriptorName=local in"),
        (&customer, "pull --daemon", Some("local:local"), "the file has no [outgoing]: add it"),
    ] {
        let mut command = place.shell(PASSED, words);
        pass(&mut command, sockets().each_ref());
        if let Some(names) = names {
            command.env("LISTEN_FDNAMES", names);
        }
        let (code, error) = place.fails(&mut command);
        assert!(code == Some(78) && error.contains(phrase), "{names:?}: {code:?} {error}");
    }
}
