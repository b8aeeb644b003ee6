//! The command line: help, subcommands, and `odmr serve`.
//!
//! Each subcommand has its file, except `serve`. A failure is one line on stderr (under inetd, in the system log) and an exit
//! code of sysexits.h.

mod call_check;
mod check;
mod check_report;
mod confine;
mod customer;
mod demo;
mod dns;
mod exit;
mod expire;
mod help;
mod inetd;
mod json;
mod log_queue;
mod logging;
mod owner;
mod process;
mod pull;
mod queue;
mod secret;
mod sendmail;
mod setup;
mod status;
mod syslog;
mod terminal;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use getopts::{Matches, Options};
use signal_hook::consts::SIGHUP;

use crate::clock;
use crate::config::{ProviderConfig, ProviderPlaces};
use crate::file_stamp::FileStamp;
use crate::ids::Ids;
use crate::net::cancel::CancelToken;
use crate::net::readiness::Readiness;
use crate::net::tls;
use crate::provider::spool::SPOOL_DEPTH;
use crate::provider::{Listener, PreparedProvider, StartError, SupervisedConnection};
use crate::sandbox;
use confine::confine_provider;
use exit::{ExitError, Sysexit};
use help::{EXIT_CODES, suggestion, wrong_option};
use logging::LogTarget;
use owner::{become_owner, check_owned, log_prevented_reload, owner_to_become, reload_errors};
use process::{DaemonSignals, print, print_fitted};
use setup::customer::SETUP_CUSTOMER_SUMMARY;
use setup::provider::SETUP_PROVIDER_SUMMARY;

const HELP: &str = include_str!("pages/odmr.txt");

/// A subcommand whose options getopts can list; `odmr send` has the options of sendmail(8) instead.
struct Subcommand {
    name: &'static str,
    summary: &'static str,
    /// Whether it needs `-c FILE`.
    has_config: bool,
    /// Its arguments, for the help; empty: it has none.
    arguments: &'static str,
    /// Adds its own options.
    options: fn(&mut Options),
    run: fn(&Matches) -> Result<(), ExitError>,
}

const SERVE_SUMMARY: &str = "Runs the provider in the foreground; logs to stderr or syslog; SIGTERM ends it.";

const PULL_SUMMARY: &str =
    "Makes one call to the provider, or calls by the schedule. It is a success too if there is no mail.";

const STATUS_SUMMARY: &str =
    "Shows the mail that waits, by account or domain, with its age, and the last calls, from the files of either side.";

const QUEUE_ARGUMENTS: &str =
    " list [ACCOUNT|DOMAIN] | show|remove|bounce|retry ID [DOMAIN] | bounce|retry|export DOMAIN | import";

const CUSTOMER_ARGUMENTS: &str = " add NAME DOMAIN ... | list | show NAME | remove NAME";

const SUBCOMMANDS: [Subcommand; 11] = [
    Subcommand::of_file("serve", SERVE_SUMMARY, "", serve_options, serve),
    Subcommand::of_file("pull", PULL_SUMMARY, "", pull::options, pull::run),
    Subcommand::of_file("check", "Checks a configuration of either side.", "", check::options, check::run),
    Subcommand::of_file("status", STATUS_SUMMARY, " [ACCOUNT|DOMAIN]", status::options, status::run),
    Subcommand::of_file("queue", queue::SUMMARY, QUEUE_ARGUMENTS, |_| {}, queue::run),
    Subcommand::of_file("expire", expire::EXPIRE_SUMMARY, "", logging::options, expire::run),
    Subcommand::of_file("customer", customer::CUSTOMER_SUMMARY, CUSTOMER_ARGUMENTS, customer::options, customer::run),
    Subcommand::new(
        "setup provider",
        SETUP_PROVIDER_SUMMARY,
        " HOSTNAME",
        setup::provider::options,
        setup::provider::run,
    ),
    Subcommand::new("setup customer", SETUP_CUSTOMER_SUMMARY, " FILE", setup::customer::options, setup::customer::run),
    Subcommand::new("secret", secret::SECRET_SUMMARY, " [NAME -c FILE]", secret::options, secret::run),
    Subcommand::new("demo", demo::DEMO_SUMMARY, "", demo::options, demo::run),
];

/// Runs the program with the arguments of this process; returns its exit code.
pub fn main() -> ExitCode {
    clock::record_begin();
    sandbox::harden();
    let arguments: Vec<String> =
        std::env::args_os().skip(1).map(|argument| argument.to_string_lossy().into_owned()).collect();
    // Before the options are parsed: an error about a wrong option must not go into the connection.
    let inetd = arguments.iter().any(|argument| argument.starts_with("--inetd"));
    if inetd && inetd::keep_stderr_out_of_connection().is_err() {
        return ExitCode::from(Sysexit::OsError as u8);
    }
    // It cannot fail, because SIGXFSZ can be caught. Uncaught, it would end the process at a write beyond the limit of
    // file sizes.
    let _ = process::catch_file_size_signal();
    let called = std::env::args_os().next().unwrap_or_default();
    let name = Path::new(&called).file_name();
    let (program, result) = match sendmail::NAMES.into_iter().find(|(program, _)| name == Some(OsStr::new(program))) {
        Some((program, mode)) => (program, sendmail::run(mode, &arguments)),
        None => ("odmr", run(&arguments)),
    };
    match result {
        Ok(()) => {
            logging::write_out();
            ExitCode::SUCCESS
        }
        Err(ExitError { code, text }) => {
            logging::report_failure(program, &text, inetd);
            ExitCode::from(code as u8)
        }
    }
}

/// Runs the subcommand that the first argument names, with the others.
fn run(arguments: &[String]) -> Result<(), ExitError> {
    let usage = |text: String| Err(ExitError::usage(text, "odmr -h"));
    let Some((word, rest)) = arguments.split_first() else {
        let mut names: Vec<_> = SUBCOMMANDS.iter().map(Subcommand::word).collect();
        names.dedup();
        let text = format!("a subcommand is missing: {} or send; `odmr help` describes each", names.join(", "));
        return Err(ExitError::new(Sysexit::Usage, text));
    };
    let side = rest.first().map(|side| format!("{word} {side}"));
    if let Some(subcommand) = SUBCOMMANDS.iter().find(|subcommand| side.as_deref() == Some(subcommand.name)) {
        return subcommand.start(&rest[1..]);
    }
    match (word.as_str(), rest) {
        ("-h" | "--help", _) | ("help", []) => print_fitted(HELP),
        ("-V" | "--version" | "version", _) => print(concat!("odmr ", env!("CARGO_PKG_VERSION"), "\n")),
        ("exit-codes", _) => print_fitted(EXIT_CODES),
        ("help", topic) => run(&[topic, &["-h".to_owned()]].concat()),
        ("send", _) => sendmail::run(None, rest),
        ("setup", _) => setup::without_side(rest),
        _ => match SUBCOMMANDS.iter().find(|subcommand| subcommand.name == word) {
            Some(subcommand) => subcommand.start(rest),
            None => {
                let suggestion = suggestion(
                    word,
                    SUBCOMMANDS.iter().map(Subcommand::word).chain(["send", "help", "version", "exit-codes"]),
                );
                usage(format!("no such subcommand: {word}{suggestion}"))
            }
        },
    }
}

impl Subcommand {
    const fn new(
        name: &'static str, summary: &'static str, arguments: &'static str, options: fn(&mut Options),
        run: fn(&Matches) -> Result<(), ExitError>,
    ) -> Subcommand {
        Subcommand { name, summary, has_config: false, arguments, options, run }
    }

    /// One that needs `-c FILE`.
    const fn of_file(
        name: &'static str, summary: &'static str, arguments: &'static str, options: fn(&mut Options),
        run: fn(&Matches) -> Result<(), ExitError>,
    ) -> Subcommand {
        Subcommand { has_config: true, ..Subcommand::new(name, summary, arguments, options, run) }
    }

    /// The first word of its name.
    fn word(&self) -> &'static str {
        self.name.split(' ').next().unwrap_or(self.name)
    }

    /// Parses the options, and runs the subcommand or prints its help.
    fn start(&self, arguments: &[String]) -> Result<(), ExitError> {
        let hint = format!("odmr {} -h", self.name);
        let mut options = Options::new();
        options.optflag("h", "help", "prints this");
        if self.has_config {
            options.optopt("c", "config", "the configuration (TOML)", "FILE");
        }
        (self.options)(&mut options);
        let matches =
            options.parse(arguments).map_err(|error| ExitError::usage(wrong_option(error, &options), &hint))?;
        if matches.opt_present("help") {
            let (name, arguments) = (self.name, self.arguments);
            let file = if self.has_config { " -c FILE" } else { "" };
            let usage =
                options.usage(&format!("odmr {name}{file} [options]{arguments}\n\n{}", self.summary.trim_end()));
            return print_fitted(&usage);
        }
        if let Some(word) = matches.free.first().filter(|_| self.arguments.is_empty()) {
            return Err(ExitError::usage(format!("{} has no argument {word:?}", self.name), &hint));
        }
        if self.has_config && !matches.opt_present("config") {
            let side = if self.name == "pull" { "customer" } else { "provider" };
            return Err(ExitError::usage(format!("-c FILE is missing, such as -c /etc/odmr/{side}.toml"), &hint));
        }
        (self.run)(&matches)
    }
}

fn serve_options(options: &mut Options) {
    options.optflag("v", "verbose", "logs the dialogue too, in transcript form, without secrets");
    options.optopt("", "inetd", "serves one connection, on descriptors 0 and 1: odmr or inbound", "LISTENER");
    logging::options(options);
    process::readiness_option(options);
}

/// `odmr serve`: the provider until SIGTERM or SIGINT, or the one connection of `--inetd`. Other signals are ignored.
fn serve(matches: &Matches) -> Result<(), ExitError> {
    let listener = match matches.opt_str("inetd").as_deref() {
        None => None,
        Some("odmr") => Some(Listener::Odmr),
        Some("inbound") => Some(Listener::Inbound),
        Some(other) => {
            return Err(ExitError::usage(format!("--inetd is odmr or inbound, not {other}"), "odmr serve -h"));
        }
    };
    if listener.is_some() && process::has_readiness_option(matches) {
        return Err(ExitError::usage("--ready-fd is for listeners, without --inetd", "odmr serve -h"));
    }
    // With `--inetd` the supervisor passes a connection, not listeners.
    let supervision = listener.is_none().then(|| process::supervision(matches)).transpose()?;
    LogTarget::new(matches, listener.is_some()).start(logging::verbosity(matches), true);
    let (signals, path) = (DaemonSignals::catch()?, process::config_path(matches));
    let customers = customers_stamp(&path);
    let config = ProviderConfig::load(&path)?;
    let owner = owner_to_become(config.owner.as_ref())?;
    let (ids, cancel, spool) = (Ids::system(tls::random), CancelToken::new()?, config.spool.clone());
    process::raise_descriptor_limit();
    let known = owner.as_ref().map(|_| reload_errors(&path)).unwrap_or_default();
    let only = only_listener(&config);
    let mut provider = PreparedProvider::new(config, ids, cancel.clone())?;
    let readiness = match supervision {
        None => Readiness::default(),
        Some((sockets, readiness)) => {
            let sockets = sockets.into_listeners(&Listener::ALL.map(Listener::name), only);
            provider.bind(sockets.map_err(StartError::config)?, owner.is_none())?;
            readiness
        }
    };
    become_owner(owner.as_ref(), &[&spool])?;
    if let Some(owner) = &owner {
        check_owned(owner, &spool, SPOOL_DEPTH).map_err(|text| ExitError::new(Sysexit::CannotCreate, text))?;
    }
    confine_provider(&spool, listener.is_none());
    if let Some(listener) = listener {
        signals.handle(&cancel, |_| false)?;
        return Ok(provider.serve_one(listener, SupervisedConnection::from_supervisor()?)?);
    }
    if let Some(owner) = &owner {
        log_prevented_reload(owner, &path, &known);
    }
    run_daemon(provider, path, customers, signals, Arc::new(readiness))
}

/// The one listener of a configuration; `None`: it has several.
fn only_listener(config: &ProviderConfig) -> Option<&'static str> {
    let mut with_address = Listener::ALL.iter().zip(config.listen()).filter(|(_, addresses)| !addresses.is_empty());
    let first = with_address.next()?;
    with_address.next().is_none().then(|| first.0.name())
}

/// A stamp that changes with the directory of customers' files; `None`: it is missing, or this user may not read it.
fn customers_stamp(path: &Path) -> Option<FileStamp> {
    let found = ProviderPlaces::read(path)?.customers.metadata().ok()?;
    Some(FileStamp::of(&found))
}

/// Runs the provider until SIGTERM or SIGINT. `customers`: the [`customers_stamp`] before the configuration was read.
fn run_daemon(
    provider: PreparedProvider, path: PathBuf, customers: Option<FileStamp>, signals: DaemonSignals,
    readiness: Arc<Readiness>,
) -> Result<(), ExitError> {
    // Other commands ask for a reload by a socket; it is the same as SIGHUP.
    let reload = || {
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::HUP);
    };
    let (running, stopped) = (provider.start(Box::new(reload))?, CancelToken::new()?);
    let (reloader, reporter) = (running.reloader().clone(), readiness.clone());
    // While this process started, `odmr customer add` could not wake it: mail for the new customer would be rejected.
    if customers_stamp(&path).is_some_and(|found| customers != Some(found)) {
        reloader.reload(&path);
    }
    readiness.ready();
    // Signals that arrived before are handled now.
    signals.handle(&stopped, move |signal| {
        if signal == SIGHUP {
            reporter.reloading();
            reloader.reload(&path);
            reporter.ready();
        }
        signal == SIGHUP
    })?;
    stopped.wait_until(None);
    readiness.stopping();
    running.stop();
    log::info!("event=stopped");
    Ok(())
}
