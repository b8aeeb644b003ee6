//! `user` and `group` of a provider or customer that root starts. The tests do nothing if another user than root runs them.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use nix::unistd::{Uid, User};
use rustix::process::Signal;

use crate::running::{Client, Running};

/// The user that the program becomes.
const USER: &str = "nobody";

const PROVIDER: &str = "user = \"nobody\"\nhostname = \"relay.example.net\"\nspool = \"var/spool\"\ncustomers = \"customers.d\"\n\
                        [inbound]\nlisten = [\"127.0.0.1:0\"]\n[odmr]\nlisten = [\"127.0.0.1:0\"]\n";

struct Place(tempfile::TempDir);

impl Place {
    /// The files of a provider, which all belong to the user. `None`: this process is not root.
    fn new() -> Option<Place> {
        if !Uid::effective().is_root() {
            return None;
        }
        let place = Place(tempfile::tempdir().unwrap());
        fs::set_permissions(place.0.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(place.path("customers.d")).unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let names = vec!["relay.example.net".to_owned()];
        let certificate = rcgen::CertificateParams::new(names).unwrap().self_signed(&key).unwrap();
        place.write("customers.d/acme.toml", "domains = [\"example.org\"]\nsecret-file = \"../acme.secret\"\n");
        place.write("acme.secret", "tanstaaftanstaaf\n");
        place.write("certificate.pem", &certificate.pem());
        place.write("key.pem", &key.serialize_pem());
        place.write("odmr.toml", &format!("{PROVIDER}[tls]\ncertificate = \"certificate.pem\"\nkey = \"key.pem\"\n"));
        Some(place)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o600)).unwrap();
        self.give(name, Some(user().uid.as_raw()));
    }

    /// Changes the owner of a file; `None`: to root.
    fn give(&self, name: &str, user: Option<u32>) {
        chown(self.path(name), Some(user.unwrap_or(0)), None).unwrap();
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_odmr"));
        command.args(words).arg("-c").arg(self.path("odmr.toml")).stdin(Stdio::null());
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    /// The output of `check`, which must end with this exit code.
    fn check(&self, code: i32) -> String {
        let done = self.run(&["check"]);
        let text = [done.stdout, done.stderr].map(|text| String::from_utf8(text).unwrap()).concat();
        assert_eq!(done.status.code(), Some(code), "{text}");
        text
    }
}

fn user() -> User {
    User::from_name(USER).unwrap().unwrap()
}

/// The user ids, the group ids and the supplementary groups of a process. All threads must have the same.
#[cfg(target_os = "linux")]
fn ids(process: &Running) -> [Vec<u32>; 3] {
    let mut ids: Vec<_> = process.thread_statuses().iter().map(|status| ids_of(status)).collect();
    ids.dedup();
    assert_eq!(ids.len(), 1, "{ids:?}");
    ids.remove(0)
}

#[cfg(target_os = "linux")]
fn ids_of(status: &str) -> [Vec<u32>; 3] {
    ["Uid:", "Gid:", "Groups:"].map(|key| {
        let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        line.split_whitespace().map(|id| id.parse().unwrap()).collect()
    })
}

#[test]
fn after_its_listeners_are_bound_root_becomes_the_user_for_good() {
    let Some(place) = Place::new() else { return };
    let mut serve = Running::start(&mut place.command(&["serve"]));
    let inbound = serve.listening("inbound");
    let owner = user();
    #[cfg(target_os = "linux")]
    {
        let [users, groups, others] = ids(&serve);
        assert_eq!((users, groups), (vec![owner.uid.as_raw(); 4], vec![owner.gid.as_raw(); 4]));
        assert!(!others.contains(&0), "{others:?}");
    }
    assert!(Client::connect(&inbound).send("a@b.example", "alice@example.org", 1).starts_with("250 "));
    // The spool and everything in it belong to the user.
    for name in ["var/spool", "var/spool/.odmr/serve", "var/spool/domains/example.org/new"] {
        assert_eq!(fs::metadata(place.path(name)).unwrap().uid(), owner.uid.as_raw(), "{name}");
    }
    assert_eq!(fs::metadata(place.path("var/spool")).unwrap().mode() & 0o777, 0o700);
    place.write("customers.d/beta.toml", "domains = [\"example.com\"]\nsecret = \"tanstaaftanstaaf\"\n");
    serve.signal(Signal::HUP);
    assert!(serve.wait_for("event=reloaded").contains("accounts=2 added=1"));
    // A second `serve` finds the spool locked, although it still is root.
    assert_eq!(place.run(&["serve"]).status.code(), Some(75));
    serve.signal(Signal::TERM);
    assert_eq!(serve.exit_code(), Some(0));
}

#[test]
fn the_group_may_be_another_one() {
    let Some(place) = Place::new() else { return };
    let config = fs::read_to_string(place.path("odmr.toml")).unwrap();
    place.write("odmr.toml", &format!("group = \"daemon\"\n{config}"));
    let mut serve = Running::start(&mut place.command(&["serve"]));
    serve.listening("inbound");
    let group = nix::unistd::Group::from_name("daemon").unwrap().unwrap().gid.as_raw();
    assert_eq!(fs::metadata(place.path("var/spool")).unwrap().gid(), group);
    #[cfg(target_os = "linux")]
    assert_eq!(ids(&serve)[1], vec![group; 4]);
}

/// Otherwise `serve` could not read the files.
#[test]
fn a_queue_command_of_root_leaves_files_of_the_user() {
    let Some(place) = Place::new() else { return };
    let mut serve = Running::start(&mut place.command(&["serve"]));
    let inbound = serve.listening("inbound");
    assert!(Client::connect(&inbound).send("a@b.example", "alice@example.org", 1).starts_with("250 "));
    let exported = place.run(&["queue", "export", "example.org"]);
    assert!(exported.status.success() && !exported.stdout.is_empty());
    let mut import = place.command(&["queue", "import"]).stdin(Stdio::piped()).spawn().unwrap();
    import.stdin.take().unwrap().write_all(&exported.stdout).unwrap();
    assert!(import.wait().unwrap().success());
    let queue = place.path("var/spool/domains/example.org/new");
    let owners: Vec<_> = fs::read_dir(queue).unwrap().map(|file| file.unwrap().metadata().unwrap().uid()).collect();
    assert_eq!(owners, vec![user().uid.as_raw(); 2]);
}

#[test]
fn under_inetd_root_becomes_the_user_too() {
    let Some(place) = Place::new() else { return };
    let mut command = place.command(&["serve", "--inetd", "inbound"]);
    let mut serve = Running::start(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
    let mut greeting = String::new();
    BufReader::new(serve.child.stdout.take().unwrap()).read_line(&mut greeting).unwrap();
    assert!(greeting.starts_with("220 "));
    #[cfg(target_os = "linux")]
    assert_eq!(ids(&serve)[0], vec![user().uid.as_raw(); 4]);
    assert_eq!(fs::metadata(place.path("var/spool")).unwrap().uid(), user().uid.as_raw());
    serve.child.stdin.take().unwrap().write_all(b"QUIT\r\n").unwrap();
    assert_eq!(serve.exit_code(), Some(0));
}

#[test]
fn a_spool_of_another_user_is_an_error_with_the_command_to_type() {
    let Some(place) = Place::new() else { return };
    fs::create_dir_all(place.path("var/spool/domains/example.org")).unwrap();
    let remedy = format!("type `chown -R {USER} {}`", place.path("var/spool").display());
    for own in [&[][..], &["var/spool"], &["var/spool", "var/spool/domains"]] {
        own.iter().for_each(|name| place.give(name, Some(user().uid.as_raw())));
        let done = place.run(&["serve"]);
        let error = String::from_utf8(done.stderr).unwrap();
        assert!(done.status.code() == Some(73) && error.contains(&remedy), "{error}");
        let text = place.check(1);
        assert!(text.contains("odmr.toml:3: ") && text.contains(&remedy), "{text}");
        // Root leaves no files there.
        assert!(!place.path("var/spool/.odmr").exists());
    }
    place.give("var/spool/domains/example.org", Some(user().uid.as_raw()));
    Running::start(&mut place.command(&["serve"])).listening("inbound");
    place.check(0);
}

/// A daemon that root has started works, but a reload, as the user, could not read these files.
#[test]
fn check_and_serve_name_the_files_that_only_root_may_read() {
    let Some(place) = Place::new() else { return };
    assert!(!place.check(0).contains("SIGHUP"));
    for (file, phrase) in [
        ("odmr.toml", "odmr.toml: cannot be read: Permission denied"),
        ("customers.d/acme.toml", "acme.toml: cannot be read: Permission denied"),
        ("acme.secret", "acme.secret"),
        ("certificate.pem", "certificate.pem may not be read by this user: "),
        ("key.pem", "key.pem may not be read by this user: "),
    ] {
        place.give(file, None);
        let text = place.check(0);
        let line = text.lines().find(|line| line.contains(phrase)).unwrap_or_else(|| panic!("{phrase}: {text}"));
        assert!(
            line.contains("root may read it, and nobody may not, so a reload (SIGHUP) would fail: chgrp it"),
            "{line}"
        );
        let hook = "install -o nobody -m 0600 ";
        assert_eq!(text.contains(hook), file.ends_with(".pem"), "{text}");
        let mut serve = Running::start(&mut place.command(&["serve"]));
        assert!(serve.wait_for("event=reload-prevented").contains("let nobody read it"));
        serve.listening("inbound");
        place.give(file, Some(user().uid.as_raw()));
        serve.signal(Signal::HUP);
        serve.wait_for("event=reloaded");
    }
    fs::set_permissions(place.path("customers.d"), fs::Permissions::from_mode(0o700)).unwrap();
    assert!(place.check(0).contains("customers.d cannot be read: Permission denied"));
}

#[test]
fn check_and_the_daemon_of_a_customer_name_the_files_that_only_root_may_read() {
    let Some(place) = Place::new() else { return };
    place.write(
        "odmr.toml",
        "user = \"nobody\"\nhostname = \"mail.example.org\"\n[provider]\naddress = \"127.0.0.1:1\"\nname = \"acme\"\n\
         secret-file = \"acme.secret\"\nca = \"certificate.pem\"\n[mailboxes]\nroot = \"var/mail\"\n\
         accept = [\"@example.org\"]\n[outgoing]\nqueue = \"var/out\"\nlisten = [\"127.0.0.1:0\"]\n",
    );
    assert!(!place.check(0).contains("SIGHUP"));
    for (file, phrase) in [
        ("odmr.toml", "odmr.toml: cannot be read: Permission denied"),
        ("acme.secret", "acme.secret"),
        ("certificate.pem", "certificate.pem may not be read by this user: "),
    ] {
        place.give(file, None);
        let text = place.check(0);
        let line = text.lines().find(|line| line.contains(phrase)).unwrap_or_else(|| panic!("{phrase}: {text}"));
        assert!(
            line.contains("root may read it, and nobody may not, so a reload (SIGHUP) would fail: chgrp it"),
            "{line}"
        );
        let mut daemon = Running::start(&mut place.command(&["pull", "--daemon"]));
        assert!(daemon.wait_for("event=reload-prevented").contains("let nobody read it"));
        daemon.listening("local");
        place.give(file, Some(user().uid.as_raw()));
    }
    // `check` has created nothing; the daemon has created the directories for the user.
    for name in ["var/mail", "var/out"] {
        assert_eq!(fs::metadata(place.path(name)).unwrap().uid(), user().uid.as_raw(), "{name}");
        place.give(name, None);
        let text = place.check(1);
        assert!(text.contains(&format!("{name} ")), "{text}");
        place.give(name, Some(user().uid.as_raw()));
    }
}

/// certbot creates the directories of the certificate for root only. With the hook that `check` prints, the user can
/// read them.
#[test]
fn the_deploy_hook_that_check_prints_copies_the_key() {
    let Some(place) = Place::new() else { return };
    fs::create_dir(place.path("live")).unwrap();
    fs::set_permissions(place.path("live"), fs::Permissions::from_mode(0o700)).unwrap();
    for name in ["certificate.pem", "key.pem"] {
        fs::rename(place.path(name), place.path("live").join(name)).unwrap();
        place.give(&format!("live/{name}"), None);
    }
    let config = fs::read_to_string(place.path("odmr.toml")).unwrap();
    place.write(
        "odmr.toml",
        &config.replace("= \"certificate", "= \"live/certificate").replace("= \"key", "= \"live/key"),
    );
    let text = place.check(0);
    let hook: Vec<_> = text.lines().skip_while(|line| !line.contains("#!/bin/sh")).map(str::trim_start).collect();
    let copies: Vec<_> = hook.iter().filter(|line| line.starts_with("install ")).copied().collect();
    assert_eq!(copies.len(), 3, "{text}");
    assert!(Command::new("sh").args(["-ec", &copies.join("\n")]).status().unwrap().success());
    place.write(
        "odmr.toml",
        &config.replace("= \"certificate", "= \"tls/certificate").replace("= \"key", "= \"tls/key"),
    );
    let text = place.check(0);
    assert!(!text.contains("SIGHUP") && !text.contains("deploy hook"), "{text}");
}

#[test]
fn without_a_user_root_stays_and_check_warns() {
    let Some(place) = Place::new() else { return };
    let config = fs::read_to_string(place.path("odmr.toml")).unwrap();
    place.write("odmr.toml", &config.replace("user = \"nobody\"\n", ""));
    let text = place.check(0);
    assert!(text.contains("odmr.toml:2: `user` is missing") && text.contains("type `chown -R odmr /"), "{text}");
    // Without quotes, the command would also change other directories.
    place.write("odmr.toml", &config.replace("user = \"nobody\"\n", "").replace("spool = \"", "spool = \"it's a "));
    let text = place.check(0);
    assert!(text.contains("type `chown -R odmr '/") && text.contains("it'\\''s a "), "{text}");
    place.write("odmr.toml", &config.replace("user = \"nobody\"\n", ""));
    let mut serve = Running::start(&mut place.command(&["serve"]));
    serve.listening("inbound");
    assert_eq!(fs::metadata(place.path("var/spool")).unwrap().uid(), 0);
    // A change needs a restart.
    place.write("odmr.toml", &config);
    serve.signal(Signal::HUP);
    assert!(serve.wait_for("event=restart-needed").contains("`user`"));
    serve.signal(Signal::TERM);
    serve.exit_code();
    place.write("odmr.toml", &config.replace("\"nobody\"", "\"no-such-user\""));
    let done = place.run(&["serve"]);
    assert_eq!(done.status.code(), Some(78));
    let error = String::from_utf8(done.stderr).unwrap();
    assert!(
        error.contains("odmr.toml:1: there is no user") && place.check(1).contains("type `useradd -r no-such-user`"),
        "{error}"
    );
}
