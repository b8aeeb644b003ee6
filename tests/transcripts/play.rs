//! The runner: plays one transcript, in one mode, against the real program in a temporary directory.

use super::certificates::{Shows, identity};
use super::format::{Action, Becomes, DEFAULTS, File, Settings, Step, Transcript, matches, shown};
use super::scram::Messages;
use odmr::ids::Ids;
use odmr::net::cancel::CancelToken;
use rustls::pki_types::ServerName;
use std::collections::HashMap;
use std::fs::OpenOptions;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// The longest wait for anything that the program must do.
const STEP_TIMEOUT: Duration = Duration::from_secs(5);

/// Octets that a bytewise play sends one by one; the rest of a write goes in pieces of an odd size.
const BYTEWISE: usize = 4096;

/// The name of the runner's threads: a panic in a thread of another name is the program's.
pub const PLAYER: &str = "player";

#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Mode {
    bytewise: bool,
    tls: bool,
}

/// The plays that a transcript's settings allow.
pub fn modes(transcript: &Transcript) -> impl Iterator<Item = Mode> {
    let Settings { clear_only, tls_only, whole_only, .. } = transcript.settings;
    let all =
        [(false, false), (true, false), (false, true), (true, true)].map(|(bytewise, tls)| Mode { bytewise, tls });
    all.into_iter()
        .filter(move |mode| !(mode.bytewise && whole_only || mode.tls && clear_only || !mode.tls && tls_only))
}

/// Plays it.
///
/// # Errors
///
/// The step that failed: its file and line, the line itself, what was expected, and what arrived.
pub fn play(transcript: &Transcript, mode: Mode) -> Result<(), String> {
    let played = std::panic::catch_unwind(|| {
        let play = Play::new(transcript, mode)?;
        if transcript.name.starts_with("customer/") { play.customer() } else { play.provider() }
    });
    let failure = match played {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(failure)) => failure,
        Err(panic) => Failure {
            line: 1,
            wanted: "a play without a panic".into(),
            got: panic.downcast_ref::<String>().cloned().unwrap_or_default(),
        },
    };
    let indented = |text: &str| text.lines().map(|line| format!("    {line}\n")).collect::<String>();
    let path = format!("testdata/{}.smtp", transcript.name);
    // If the line names a passage, the reader looks for the wanted line in testdata/passages.txt.
    let text = crate::project::read(&path);
    let source = text.lines().nth(failure.line.saturating_sub(1)).unwrap_or_default();
    let (wanted, got) = (indented(&failure.wanted), indented(&failure.got));
    Err(format!("{path}:{}: {source}\n  wanted\n{wanted}  got\n{got}", failure.line))
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let cut = if self.bytewise { "bytewise" } else { "whole lines" };
        write!(f, "{cut}, {}", if self.tls { "TLS" } else { "clear" })
    }
}

/// Counts from now on the panics in threads that are not tests or players.
pub fn count_panics_of_the_program() -> impl Fn() -> usize {
    static PANICS: AtomicUsize = AtomicUsize::new(0);
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let thread = std::thread::current();
        if thread.name().is_none_or(|name| name != PLAYER && name != "main" && !name.contains("::")) {
            PANICS.fetch_add(1, Ordering::Relaxed);
        }
        before(panic);
    }));
    || PANICS.load(Ordering::Relaxed)
}

struct Failure {
    line: usize,
    wanted: String,
    got: String,
}

impl Failure {
    fn new(line: usize, wanted: impl Into<String>, got: impl Into<String>) -> Failure {
        Failure { line, wanted: wanted.into(), got: got.into() }
    }
}

fn listener_error(error: io::Error) -> Failure {
    Failure::new(1, "a listener", error.to_string())
}

/// The addresses of the provider's listeners.
struct Addresses {
    inbound: Option<SocketAddr>,
    odmr: Option<SocketAddr>,
    odmr_tls: Option<SocketAddr>,
}

impl Addresses {
    fn of(running: &odmr::provider::RunningProvider) -> Addresses {
        use odmr::provider::Listener::{Inbound, Odmr, OdmrTls};
        let [inbound, odmr, odmr_tls] = [Inbound, Odmr, OdmrTls].map(|listener| running.address(listener));
        Addresses { inbound, odmr, odmr_tls }
    }
}

struct Play<'a> {
    transcript: &'a Transcript,
    mode: Mode,
    directory: tempfile::TempDir,
    connections: HashMap<String, Connection>,
    current: String,
}

impl<'a> Play<'a> {
    fn new(transcript: &'a Transcript, mode: Mode) -> Result<Play<'a>, Failure> {
        let directory =
            tempfile::tempdir().map_err(|error| Failure::new(1, "a temporary directory", error.to_string()))?;
        Ok(Play { transcript, mode, directory, connections: HashMap::new(), current: String::new() })
    }

    fn provider(mut self) -> Result<(), Failure> {
        let host = TcpListener::bind("127.0.0.1:0").map_err(listener_error)?;
        self.write_files(&DEFAULTS[1..], &[("{host}", host.local_addr().map_err(listener_error)?)])?;
        let config = odmr::config::ProviderConfig::load(&self.directory.path().join("provider.toml"))
            .map_err(|error| self.unusable(&error.to_string()))?;
        let running = odmr::provider::Provider::start(config, Ids::fixed())
            .map_err(|error| Failure::new(1, "a provider", error.text))?;
        let transcript = self.transcript;
        let addresses = Addresses::of(&running);
        let (mut running, (ended, stopped)) = (Some(running), channel());
        let mut stop = || {
            if let Some(running) = running.take() {
                let ended = ended.clone();
                std::thread::spawn(move || {
                    running.stop();
                    let _ = ended.send(());
                });
            }
        };
        let played = transcript.steps.iter().try_for_each(|step| match &step.action {
            Action::Connect { listener, name, .. } if listener == "host" => {
                self.called(step.line, &host, self.mode.tls, name)
            }
            Action::Connect { listener, name, shown } => {
                self.call(step.line, &addresses, listener, name, shown.as_deref())
            }
            Action::Stop => self.flush(step.line).map(|()| stop()),
            _ => self.step(step),
        });
        let last = transcript.steps.last().map_or(1, |step| step.line);
        let played = played.and_then(|()| self.flush(last));
        if played.is_ok() && transcript.name.starts_with("relay/") {
            self.wait_for_files();
        }
        self.connections.clear();
        stop();
        let stopped = stopped.recv_timeout(STEP_TIMEOUT);
        played?;
        stopped.map_err(|_| Failure::new(last, "the provider stops", format!("not within {STEP_TIMEOUT:?}")))?;
        self.check_files()
    }

    fn customer(mut self) -> Result<(), Failure> {
        let listener = TcpListener::bind("127.0.0.1:0").map_err(listener_error)?;
        let hop = TcpListener::bind("127.0.0.1:0").map_err(listener_error)?;
        let address = listener.local_addr().map_err(listener_error)?;
        let addresses = [("{address}", address), ("{hop}", hop.local_addr().map_err(listener_error)?)];
        self.write_files(&DEFAULTS[..1], &addresses)?;
        let config = odmr::config::CustomerConfig::load(&self.directory.path().join("customer.toml"))
            .map_err(|error| self.unusable(&error.to_string()))?;
        let stop = CancelToken::new().map_err(|error| Failure::new(1, "a stop token", error.to_string()))?;
        let token = stop.clone();
        let (ended, mut pull) = channel();
        let soft_bounce = self.transcript.settings.soft_bounce;
        let customer = std::thread::spawn(move || {
            let result = odmr::customer::pull::Customer::new(&config, &Ids::fixed()).and_then(|mut customer| {
                customer.soft_bounce = soft_bounce;
                customer.pull(&token, &Arc::default())
            });
            let _ = ended.send(result.map_err(|error| error.to_string()));
        });
        let transcript = self.transcript;
        let played = transcript.steps.iter().try_for_each(|step| match &step.action {
            Action::Connect { name, listener: which, .. } if which == "hop" => {
                self.called(step.line, &hop, false, name)
            }
            Action::Connect { name, .. } => self.called(step.line, &listener, self.mode.tls, name),
            Action::Pull { succeeds } => self.ended(step.line, &listener, &mut pull, *succeeds),
            Action::Stop => self.flush(step.line).map(|()| stop.cancel()),
            _ => self.step(step),
        });
        let last = transcript.steps.last().map_or(1, |step| step.line);
        let mut played = played.and_then(|()| self.flush(last));
        self.connections.clear();
        // A customer that still runs is told to stop. If it does not, its play fails.
        let begun = Instant::now();
        while !customer.is_finished() && begun.elapsed() < STEP_TIMEOUT {
            played = played.and_then(|()| self.answer_other_call(last, &listener));
            if begun.elapsed() > STEP_TIMEOUT / 5 {
                stop.cancel();
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        played?;
        if !customer.is_finished() {
            return Err(Failure::new(last, "the customer's call ends", format!("not within {STEP_TIMEOUT:?}")));
        }
        self.check_files()
    }

    // The files.

    /// Writes the configuration and the transcript's own files.
    fn write_files(&self, defaults: &[(&str, &str)], addresses: &[(&str, SocketAddr)]) -> Result<(), Failure> {
        let settings = &self.transcript.settings;
        let certificate = self.mode.tls || settings.certificate;
        if certificate {
            self.write(0, "relay.pem", identity().certificate.as_bytes())?;
            self.write(0, "relay.key", identity().key.as_bytes())?;
        }
        let names = |file: &str| self.transcript.before.iter().any(|own| own.text.contains(file));
        for (name, client) in identity().clients.iter().filter(|(name, _)| names(&format!("\"{name}.pem\""))) {
            self.write(0, &format!("{name}.pem"), client.pem.as_bytes())?;
            self.write(0, &format!("{name}.key"), client.key.as_bytes())?;
        }
        let fill = |text: &str| {
            let tls_mode = if settings.starttls {
                "starttls"
            } else if self.mode.tls {
                "implicit"
            } else {
                "none"
            };
            let with_pins = identity().clients.iter().fold(text.to_owned(), |text, (name, client)| {
                let [certificate, key] = client.pins();
                text.replace(&format!("{{sha256:{name}}}"), &certificate)
                    .replace(&format!("{{spki-sha256:{name}}}"), &key)
            });
            let filled = addresses.iter().fold(with_pins, |text, (name, at)| text.replace(name, &at.to_string()));
            filled
                .replace("{dir}", &self.directory.path().display().to_string())
                .replace(
                    "{tls}",
                    if certificate { "[tls]\ncertificate = \"relay.pem\"\nkey = \"relay.key\"\n" } else { "" },
                )
                .replace("{listen-tls}", if certificate { r#"["127.0.0.1:0"]"# } else { "[]" })
                .replace("{require-tls}", if settings.require_tls { "true" } else { "false" })
                .replace("{tls-mode}", tls_mode)
                .replace("{ca}", if certificate { "ca = \"relay.pem\"" } else { "" })
        };
        let is_own = |file: &File| file.path.starts_with("customers.d/") && !file.overlay;
        let own_customers = self.transcript.before.iter().any(is_own);
        for (path, text) in defaults {
            // Whole files of customers replace all of the default.
            if path.starts_with("customers.d/") && own_customers {
                continue;
            }
            self.write(0, path, fill(text).as_bytes())?;
        }
        for file in &self.transcript.before {
            let content = if file.path.ends_with(".toml") { fill(&file.text).into_bytes() } else { file.content() };
            self.write(file.line, &file.path, &content)?;
        }
        Ok(())
    }

    fn write(&self, line: usize, path: &str, content: &[u8]) -> Result<(), Failure> {
        let path = self.directory.path().join(path);
        let parent = path.parent().unwrap_or(&path);
        let maildir = if matches!(parent.file_name().and_then(|name| name.to_str()), Some("new" | "cur")) {
            ["tmp", "new", "cur"].map(|name| parent.with_file_name(name)).to_vec()
        } else {
            vec![parent.to_owned()]
        };
        let made = maildir.iter().try_for_each(std::fs::create_dir_all);
        // The program rejects secrets that other users can read.
        let created =
            made.and_then(|()| OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&path));
        let written = created.and_then(|mut file| file.write_all(content));
        written.map_err(|error| Failure::new(line, format!("the file {}", path.display()), error.to_string()))
    }

    /// A configuration that cannot be used, at the line of the file that the error names.
    fn unusable(&self, error: &str) -> Failure {
        let named = self.transcript.before.iter().find(|file| error.contains(&file.path));
        Failure::new(named.map_or(1, |file| file.line), "a good configuration", error)
    }

    /// Waits until the files are those under `== after ==`: the relay records the result of an attempt after its last reply,
    /// and a provider that stops drops an attempt.
    fn wait_for_files(&self) {
        let deadline = Instant::now() + STEP_TIMEOUT;
        while self.check_files().is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Compares the files under `== after ==`.
    fn check_files(&self) -> Result<(), Failure> {
        let after = &self.transcript.after;
        for file in after {
            match file.path.strip_suffix('/') {
                _ if file.gone => self.check_gone(file)?,
                Some(directory) => self.check_directory(file, directory)?,
                None => self.check_file(file)?,
            }
        }
        // A directory whose files were named by position has no others.
        let numbered = |file: &File| {
            file.path.rsplit_once('/').and_then(|(directory, name)| Some((directory.to_owned(), name.parse().ok()?)))
        };
        for (file, (directory, _)) in after.iter().filter_map(|file| Some((file, numbered(file)?))) {
            let named: Option<usize> =
                after.iter().filter_map(numbered).filter(|(other, _)| *other == directory).map(|(_, name)| name).max();
            let there = self.list(&directory);
            if named.is_some_and(|named| named < there.len())
                && !after.iter().any(|other| other.path == format!("{directory}/"))
            {
                return Err(Failure::new(file.line, format!("no other files in {directory}"), there.join("\n")));
            }
        }
        Ok(())
    }

    fn check_gone(&self, file: &File) -> Result<(), Failure> {
        let path = self.directory.path().join(&file.path);
        if path.exists() { Err(Failure::new(file.line, format!("no {}", file.path), "it exists")) } else { Ok(()) }
    }

    fn check_directory(&self, file: &File, directory: &str) -> Result<(), Failure> {
        let there = self.list(directory);
        let wanted: Vec<&str> = file.text.lines().collect();
        let same =
            |(pattern, name): (&&str, &String)| matches(pattern, name) || matches(pattern, &without_attempts(name));
        if wanted.len() == there.len() && wanted.iter().zip(&there).all(same) {
            return Ok(());
        }
        let listed = |names: &[String]| if names.is_empty() { "(empty)".to_owned() } else { names.join("\n") };
        let wanted: Vec<String> = wanted.into_iter().map(str::to_owned).collect();
        Err(Failure::new(
            file.line,
            format!("{directory}/\n{}", listed(&wanted)),
            format!("{directory}/\n{}", listed(&there)),
        ))
    }

    fn check_file(&self, file: &File) -> Result<(), Failure> {
        let mut path = self.directory.path().join(&file.path);
        if !path.exists()
            && let Some((directory, wanted)) = file.path.rsplit_once('/')
        {
            let there = self.list(directory);
            let position = || there.get(wanted.parse::<usize>().ok()?.checked_sub(1)?);
            if let Some(name) = there.iter().find(|name| without_attempts(name) == wanted).or_else(position) {
                path = self.directory.path().join(directory).join(name);
            }
        }
        let content = match std::fs::read(&path) {
            Ok(content) => content,
            Err(error) => {
                return Err(Failure::new(
                    file.line,
                    file.path.clone(),
                    format!("{error}; there are\n{}", self.everything()),
                ));
            }
        };
        let got: Vec<String> = content.split(|octet| *octet == b'\n').map(shown).collect();
        let wanted: Vec<&str> = file.text.split('\n').collect();
        if wanted.len() == got.len() && wanted.iter().zip(&got).all(|(pattern, line)| matches(pattern, line)) {
            return Ok(());
        }
        Err(Failure::new(
            file.line,
            format!("{}\n{}", file.path, file.text),
            format!("{}\n{}", path.display(), got.join("\n")),
        ))
    }

    /// The names in a directory in order; none if it does not exist.
    fn list(&self, directory: &str) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.directory.path().join(directory)) else { return Vec::new() };
        let mut names: Vec<String> = entries.flatten().map(|entry| entry.file_name().display().to_string()).collect();
        names.sort();
        names
    }

    /// The paths of all files, for a failure's text.
    fn everything(&self) -> String {
        let (mut directories, mut files) = (vec![self.directory.path().to_owned()], Vec::new());
        while let Some(directory) = directories.pop() {
            for path in std::fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()) {
                if path.is_dir() { directories.push(path) } else { files.push(path.display().to_string()) }
            }
        }
        files.sort();
        files.join("\n")
    }

    // The dialogue.

    /// Opens a connection to the provider. In a TLS play it is under TLS before the first line is read.
    fn call(
        &mut self, line: usize, addresses: &Addresses, listener: &str, name: &str, shown: Option<&str>,
    ) -> Result<(), Failure> {
        self.flush(line)?;
        let tls = self.mode.tls || listener == "odmr-tls";
        let address = match listener {
            "inbound" => addresses.inbound,
            "odmr" if !tls => addresses.odmr,
            _ => addresses.odmr_tls,
        };
        let failed = |error: String| Failure::new(line, format!("a connection to {listener}"), error);
        let address = address.ok_or_else(|| failed("no such listener".into()))?;
        let socket = TcpStream::connect_timeout(&address, STEP_TIMEOUT).map_err(|error| failed(error.to_string()))?;
        let mut connection = Connection::new(socket).map_err(|error| failed(error.to_string()))?;
        if tls && listener == "inbound" {
            connection.lead_through_starttls().map_err(|error| failed(error.to_string()))?;
        } else if tls {
            connection.tls_client(shown).map_err(|error| failed(error.to_string()))?;
        }
        self.take_up(name, connection);
        Ok(())
    }

    /// Accepts the program's connection.
    fn called(&mut self, line: usize, listener: &TcpListener, tls: bool, name: &str) -> Result<(), Failure> {
        self.flush(line)?;
        let none = |error: String| Failure::new(line, "a call", error);
        listener.set_nonblocking(true).map_err(|error| none(error.to_string()))?;
        let deadline = Instant::now() + STEP_TIMEOUT;
        let socket = loop {
            match listener.accept() {
                Ok((socket, _)) => break socket,
                Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => return Err(none(error.to_string())),
            }
        };
        let opened = socket.set_nonblocking(false).and_then(|()| Connection::new(socket)).and_then(|mut connection| {
            connection.accepted = true;
            if tls {
                connection.tls_server(None)?;
            }
            Ok(connection)
        });
        self.take_up(name, opened.map_err(|error| none(error.to_string()))?);
        Ok(())
    }

    fn take_up(&mut self, name: &str, connection: Connection) {
        self.connections.insert(name.to_owned(), connection);
        self.current = name.to_owned();
    }

    fn ended(
        &mut self, line: usize, listener: &TcpListener, pull: &mut Receiver<Result<(), String>>, succeeds: bool,
    ) -> Result<(), Failure> {
        self.flush(line)?;
        let wanted = if succeeds { "the call ends well" } else { "the call fails" };
        let deadline = Instant::now() + STEP_TIMEOUT;
        let got = loop {
            match pull.recv_timeout(Duration::from_millis(1)) {
                Ok(result) if result.is_ok() == succeeds => return Ok(()),
                Ok(Ok(())) => break "it ended well".to_owned(),
                Ok(Err(error)) => break error,
                Err(_) if Instant::now() < deadline => self.answer_other_call(line, listener)?,
                Err(_) => {
                    break format!(
                        "no end within {STEP_TIMEOUT:?}; there was
{}",
                        self.arrived()
                    );
                }
            }
        };
        Err(Failure::new(line, wanted, got))
    }

    /// A customer that got mail calls again, and gets 453.
    fn answer_other_call(&self, line: usize, listener: &TcpListener) -> Result<(), Failure> {
        let failed = |error: io::Error| Failure::new(line, "453 for a call after the dialogue", error.to_string());
        listener.set_nonblocking(true).map_err(failed)?;
        let Ok((socket, _)) = listener.accept() else { return Ok(()) };
        if self.transcript.settings.only_these_calls {
            return Err(Failure::new(line, "no other call", "one more"));
        }
        // A customer that was told to stop closes.
        let _ = socket.set_nonblocking(false).and_then(|()| Connection::new(socket)?.no_mail(self.mode.tls));
        Ok(())
    }

    fn arrived(&mut self) -> String {
        self.connections.get_mut(&self.current).map(|connection| connection.rest()).unwrap_or_default()
    }

    fn step(&mut self, step: &Step) -> Result<(), Failure> {
        let line = step.line;
        if let Action::Send { octets, .. } = &step.action {
            let connection = self.connection(line)?;
            let octets = match std::str::from_utf8(octets) {
                Ok(text) => connection.expand(text).into_bytes(),
                Err(_) => octets.clone(),
            };
            connection.unsent.extend_from_slice(&octets);
            return Ok(());
        }
        self.flush(line)?;
        match &step.action {
            Action::Use(name) => self.current = name.clone(),
            Action::Tls { shown } => {
                let connection = self.connection(line)?;
                let shown = shown.as_deref();
                let shaken =
                    if connection.accepted { connection.tls_server(shown) } else { connection.tls_client(shown) };
                shaken.map_err(|error| Failure::new(line, "a TLS handshake", error.to_string()))?;
            }
            Action::InClear => self.connection(line)?.in_clear = true,
            Action::Silence(time) => {
                let got = self.connection(line)?.listen(*time);
                if !got.is_empty() {
                    return Err(Failure::new(line, "silence", got));
                }
            }
            Action::Fault { path, becomes } => self.fault(line, path, becomes)?,
            Action::Close => {
                let closed = self.connections.remove(&self.current).map_or(Ok(()), Connection::close);
                closed.map_err(|got| Failure::new(line, "the peer closes too", got))?;
            }
            Action::Expect { party, text } => {
                let connection = self.connection(line)?;
                let got = connection.line();
                let text = &connection.expand(text);
                if !got.as_ref().is_ok_and(|got| matches(text, got)) {
                    let rest = connection.rest();
                    let got = got.map_or_else(|error| error, |got| format!("{party}: {got}\n{rest}"));
                    return Err(Failure::new(line, format!("{party}: {text}"), got));
                }
            }
            Action::ExpectOctets { party, octets } => {
                let got = self.connection(line)?.octets(octets.len());
                if got != *octets {
                    return Err(Failure::new(
                        line,
                        format!("{party}| {}", shown(octets)),
                        format!("{party}| {}", shown(&got)),
                    ));
                }
            }
            Action::ExpectClose { party } => {
                if let Err(got) = self.connection(line)?.end() {
                    return Err(Failure::new(line, format!("{party}!"), got));
                }
            }
            Action::Turn | Action::Send { .. } | Action::Connect { .. } | Action::Pull { .. } | Action::Stop => {}
        }
        Ok(())
    }

    fn fault(&self, line: usize, path: &str, becomes: &Becomes) -> Result<(), Failure> {
        let path: PathBuf = self.directory.path().join(path);
        let gone = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        // The path need not have existed; another error shows in the next step.
        drop(gone);
        let made = match becomes {
            Becomes::File => path
                .parent()
                .map_or(Ok(()), std::fs::create_dir_all)
                .and_then(|()| std::fs::write(&path, "in the way\n")),
            Becomes::Directory => std::fs::create_dir_all(&path),
            Becomes::Gone => Ok(()),
        };
        made.map_err(|error| Failure::new(line, "the fault", error.to_string()))
    }

    /// Sends what the runner has collected, in one write or octet by octet.
    fn flush(&mut self, line: usize) -> Result<(), Failure> {
        let bytewise = self.mode.bytewise;
        let Some(connection) = self.connections.get_mut(&self.current) else { return Ok(()) };
        let octets = std::mem::take(&mut connection.unsent);
        let (single, rest) = octets.split_at(if bytewise { octets.len().min(BYTEWISE) } else { 0 });
        let mut pieces = single.chunks(1).chain(rest.chunks(if bytewise { 997 } else { usize::MAX }));
        match pieces.try_for_each(|piece| connection.send(piece)) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                Err(Failure::new(line, "the peer reads on", error.to_string()))
            }
            // The next expected line shows that the peer has closed.
            _ => Ok(()),
        }
    }

    fn connection(&mut self, line: usize) -> Result<&mut Connection, Failure> {
        self.connections.get_mut(&self.current).ok_or_else(|| Failure::new(line, "an open connection", "none"))
    }
}

/// The runner's end of a connection. Each read has an absolute deadline.
struct Connection {
    socket: TcpStream,
    tls: Option<rustls::Connection>,
    received: Vec<u8>,
    unsent: Vec<u8>,
    in_clear: bool,
    /// The program connected: the runner is the server of TLS.
    accepted: bool,
    scram: Messages,
}

enum Arrived {
    Octets,
    End,
    Late,
    Broken(io::Error),
}

impl Connection {
    fn new(socket: TcpStream) -> io::Result<Connection> {
        socket.set_nodelay(true)?;
        socket.set_write_timeout(Some(STEP_TIMEOUT))?;
        let (received, unsent, scram) = (Vec::new(), Vec::new(), Messages::default());
        Ok(Connection { socket, tls: None, received, unsent, in_clear: false, accepted: false, scram })
    }

    /// A line with its messages of SCRAM.
    fn expand(&mut self, line: &str) -> String {
        let exporter = || {
            let tls = self.tls.as_ref()?;
            tls.export_keying_material([0; 32], b"EXPORTER-Channel-Binding", Some(b"")).ok()
        };
        self.scram.expand(line, &exporter)
    }

    /// Acts as a provider without mail.
    fn no_mail(mut self, tls: bool) -> io::Result<()> {
        if tls {
            self.tls_server(None)?;
        }
        self.send(b"220 relay.example.net\r\n")?;
        loop {
            let line = self.line().map_err(io::Error::other)?;
            let reply = match line.split(' ').next().unwrap_or_default() {
                "EHLO" if self.tls.is_some() => "250-relay.example.net\r\n250-AUTH CRAM-MD5 PLAIN\r\n250 ATRN\r\n",
                "EHLO" => "250-relay.example.net\r\n250-AUTH CRAM-MD5 PLAIN\r\n250-STARTTLS\r\n250 ATRN\r\n",
                "STARTTLS" => "220 go ahead\r\n",
                "AUTH" if line == "AUTH CRAM-MD5" => "334 PDEuMkByZWxheS5leGFtcGxlLm5ldD4=\r\n",
                "ATRN" => "453 no mail\r\n",
                "QUIT" => return self.send(b"221 bye\r\n"),
                _ => "235 2.7.0 authenticated\r\n",
            };
            self.send(reply.as_bytes())?;
            if line == "STARTTLS" {
                self.tls_server(None)?;
            }
        }
    }

    /// `shown`: the program must request a certificate, and gets that of this name, or none. `None`: it may not request one.
    fn tls_client(&mut self, shown: Option<&str>) -> io::Result<()> {
        let name = ServerName::try_from("localhost").map_err(io::Error::other)?;
        let shows = shown.map(Shows::new);
        let config = shows.as_ref().map_or_else(|| identity().client.clone(), Shows::config);
        let connection = rustls::ClientConnection::new(config, name).map_err(io::Error::other)?;
        self.shake_hands(connection.into())?;
        match shows {
            Some(shows) if !shows.was_asked() => Err(io::Error::other("the program asks for no certificate")),
            _ => Ok(()),
        }
    }

    /// `shown`: the runner requests a certificate, and the program must show that of this name, or none. `None`: the runner
    /// requests none.
    fn tls_server(&mut self, shown: Option<&str>) -> io::Result<()> {
        let Some(name) = shown else {
            let connection = rustls::ServerConnection::new(identity().server.clone()).map_err(io::Error::other)?;
            return self.shake_hands(connection.into());
        };
        let connection = rustls::ServerConnection::new(identity().asking.clone()).map_err(io::Error::other)?;
        self.shake_hands(connection.into())?;
        let chain = self.tls.as_ref().and_then(|tls| tls.peer_certificates());
        let found =
            identity().clients.iter().find(|(_, client)| chain.is_some_and(|chain| chain == [client.der.clone()]));
        match (chain, found) {
            (None, _) if name == "none" => Ok(()),
            (Some(_), Some((found, _))) if *found == name => Ok(()),
            (Some(_), found) => Err(io::Error::other(format!("the certificate {:?}", found.map(|(name, _)| name)))),
            (None, _) => Err(io::Error::other("no certificate")),
        }
    }

    fn shake_hands(&mut self, mut connection: rustls::Connection) -> io::Result<()> {
        if !self.received.is_empty() {
            return Err(io::Error::other(format!("before the handshake came {}", shown(&self.received))));
        }
        self.socket.set_read_timeout(Some(STEP_TIMEOUT))?;
        while connection.is_handshaking() {
            connection.complete_io(&mut self.socket)?;
        }
        // The server's last flight, TLS 1.3 tickets.
        while connection.wants_write() {
            connection.write_tls(&mut self.socket)?;
        }
        // Octets that came with the last flight must be read now: no later read would be woken for them.
        match connection.reader().read_to_end(&mut self.received) {
            Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
            _ => {}
        }
        self.tls = Some(connection);
        Ok(())
    }

    /// Does STARTTLS before the first line of a transcript, which reads the greeting after it.
    fn lead_through_starttls(&mut self) -> io::Result<()> {
        let greeting = self.line().map_err(io::Error::other)?;
        self.send(b"EHLO localhost\r\n")?;
        while self.line().map_err(io::Error::other)?.starts_with("250-") {}
        self.send(b"STARTTLS\r\n")?;
        let reply = self.line().map_err(io::Error::other)?;
        if !reply.starts_with("220") {
            return Err(io::Error::other(reply));
        }
        self.tls_client(None)?;
        self.received = format!("{greeting}\r\n").into_bytes();
        Ok(())
    }

    fn send(&mut self, octets: &[u8]) -> io::Result<()> {
        let Some(tls) = self.tls.as_mut().filter(|_| !self.in_clear) else { return self.socket.write_all(octets) };
        // rustls buffers 64 KiB of plaintext at most.
        for piece in octets.chunks(16 * 1024) {
            tls.writer().write_all(piece)?;
            while tls.wants_write() {
                tls.write_tls(&mut self.socket)?;
            }
        }
        Ok(())
    }

    /// Reads once.
    fn read(&mut self, deadline: Instant) -> Arrived {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Arrived::Late;
        }
        let _ = self.socket.set_read_timeout(Some(left));
        let before = self.received.len();
        let read = match &mut self.tls {
            None => {
                let mut buffer = [0; 16 * 1024];
                self.socket.read(&mut buffer).inspect(|count| self.received.extend_from_slice(&buffer[..*count]))
            }
            Some(tls) => tls.read_tls(&mut self.socket).and_then(|count| {
                tls.process_new_packets().map_err(io::Error::other)?;
                let end = tls.reader().read_to_end(&mut self.received);
                match end {
                    Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(count),
                    Err(error) => Err(error),
                    // close_notify
                    Ok(_) => Ok(0),
                }
            }),
        };
        match read {
            _ if self.received.len() > before => Arrived::Octets,
            Ok(0) => Arrived::End,
            Ok(_) => Arrived::Octets,
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) =>
            {
                Arrived::Octets
            }
            Err(error) => Arrived::Broken(error),
        }
    }

    /// The next line without its CRLF; what ends in a bare LF keeps it, shown.
    fn line(&mut self) -> Result<String, String> {
        let deadline = Instant::now() + STEP_TIMEOUT;
        loop {
            if let Some(end) = self.received.iter().position(|octet| *octet == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                return Ok(shown(line.strip_suffix(b"\r\n").unwrap_or(&line)));
            }
            let why = match self.read(deadline) {
                Arrived::Octets => continue,
                Arrived::End => "(closed)".to_owned(),
                Arrived::Late => format!("(nothing within {STEP_TIMEOUT:?})"),
                Arrived::Broken(error) => format!("({error})"),
            };
            return Err(format!("{}{why}", shown(&self.received)));
        }
    }

    /// `count` octets, or as many as came in time.
    fn octets(&mut self, count: usize) -> Vec<u8> {
        let deadline = Instant::now() + STEP_TIMEOUT;
        while self.received.len() < count && matches!(self.read(deadline), Arrived::Octets) {}
        self.received.drain(..count.min(self.received.len())).collect()
    }

    /// The peer's close, without an octet before it.
    fn end(&mut self) -> Result<(), String> {
        let deadline = Instant::now() + STEP_TIMEOUT;
        loop {
            if !self.received.is_empty() {
                return Err(self.rest());
            }
            match self.read(deadline) {
                Arrived::Octets => {}
                Arrived::End => return Ok(()),
                Arrived::Late => return Err(format!("(still open after {STEP_TIMEOUT:?})")),
                // If the peer closes before it has read all, its close is a reset.
                Arrived::Broken(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(()),
                // RFC 8314 section 3.4: close_notify before the close.
                Arrived::Broken(error) => return Err(error.to_string()),
            }
        }
    }

    /// Closes without QUIT and close_notify, and waits until the peer closes too.
    fn close(self) -> Result<(), String> {
        let deadline = Instant::now() + STEP_TIMEOUT;
        let _ = self.socket.shutdown(Shutdown::Write);
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(format!("(still open after {STEP_TIMEOUT:?})"));
            }
            let _ = self.socket.set_read_timeout(Some(left));
            match (&self.socket).read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {
                }
                Err(_) => return Ok(()),
            }
        }
    }

    /// What arrives within that time, shown.
    fn listen(&mut self, time: Duration) -> String {
        let deadline = Instant::now() + time;
        while self.received.is_empty() {
            match self.read(deadline) {
                Arrived::Octets => {}
                Arrived::Late => return String::new(),
                Arrived::End => return "(closed)".into(),
                Arrived::Broken(error) => return error.to_string(),
            }
        }
        shown(&self.received)
    }

    /// The first lines of what has arrived and was not read.
    fn rest(&mut self) -> String {
        let _ = self.read(Instant::now() + Duration::from_millis(50));
        let text = String::from_utf8_lossy(&self.received).into_owned();
        text.lines().take(8).map(|line| format!("   {}\n", shown(line.as_bytes()))).collect()
    }
}

/// The name of a file without its record of attempts: the time of the first one, their number, the time of the first deferred
/// rejection, the sessions that they have ended, the last reply.
fn without_attempts(name: &str) -> String {
    let (base, info) = name.split_at(name.find(':').unwrap_or(name.len()));
    let is_record = |field: &&str| ["O=", "A=", "R=", "P=", "L="].iter().any(|key| field.starts_with(key));
    base.split(',').filter(|field| !is_record(field)).collect::<Vec<_>>().join(",") + info
}
