//! The command line: words, help, logging, signals, exit codes (sysexits.h).

pub mod demo;

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use getopts::{Matches, Options, ParsingStyle};
use log::{Level, LevelFilter};
use rustix::process::{Resource, Rlimit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

use crate::config::{self, Config};
use crate::customer::daemon::DaemonEvent;

use crate::customer::counters::CallCounters;
use crate::customer::pull;
use crate::customer::sendmail::{self, LoginUser, SendmailOptions};
use crate::customer::{CallError, Summary, daemon};
use crate::ids::Ids;
use crate::net::connection::CancelToken;
use crate::net::tls;
use crate::privileges;
use crate::provider::{Listener, Provider, StartError};
use crate::recipients::RecipientRules;

const OK: u8 = 0;
const USAGE: u8 = 64;
const NO_HOST: u8 = 68;
const UNAVAILABLE: u8 = 69;
const OS_ERROR: u8 = 71;
const TEMPORARY: u8 = 75;
const PROTOCOL: u8 = 76;
const NO_PERMISSION: u8 = 77;
const CONFIG: u8 = 78;

const HELP: &str = "\
odmr: On-Demand Mail Relay (RFC 2645), provider and customer in one program

    odmr serve -c FILE    the provider: holds mail for its customers, hands it over when they call
    odmr pull  -c FILE    the customer: calls its provider, its outgoing mail up, all its mail down
    odmr send             the customer's users and programs: takes a message as sendmail(8) does
    odmr check -c FILE    says what is wrong with a configuration
    odmr demo             provider and customer on loopback, with the dialogue

`odmr SUBCOMMAND -h` says more; `odmr --version` prints the version.
";

/// A subcommand: its name, what it does, whether it has a configuration.
struct Subcommand {
    name: &'static str,
    brief: &'static str,
    config: bool,
    run: fn(&Matches) -> Result<(), ExitError>,
}

/// What `odmr send -h` says; the options are those of sendmail(8), and so are its ways to write them.
const SEND_HELP: &str = "\
Usage: odmr send [options] [recipients]        (also under the name sendmail)

Takes a message on stdin, with LF or CRLF line ends, into the outgoing queue; a bare CR ends a line too. The next call
sends it. All or nothing: one bad recipient, and nothing is queued.

    -t            takes recipients from To, Cc and Bcc too; Bcc is removed in any case
    -i, -oi       a line of one dot is content, and not the end
    -f ADDR       the sender; default: the login name at `domain` of [outgoing]; -f '<>': none
    -r ADDR       the same
    -F NAME       the full name in a From that is added
    -N WHEN       what to be told of: never, or a list of success, failure, delay
    -R WHAT       what comes back with a notice of failure: full or hdrs
    -V ID         an identifier that comes back with notices
    -bm           takes a message from stdin (default)
    -bs           speaks SMTP on stdin and stdout
    -bp           lists what waits
    -C FILE       the configuration of the customer, with [outgoing]; default: $ODMR_CONFIG, or
                  /etc/odmr/customer.toml
    -v            says more on stderr

Other options of sendmail(8) that programs pass, such as -oem, -odb, -O, -B, -G and -U, change nothing.
Exit codes are those of sysexits.h: 64 usage, 65 address or header, 67 no such mailbox of ours, 69 too large,
73 and 74 files, 75 try again later, 77 permission, 78 configuration.
";

/// Where the customer's configuration is when nobody says.
const CUSTOMER_FILE: &str = "/etc/odmr/customer.toml";

const SUBCOMMANDS: [Subcommand; 4] = [
    Subcommand {
        name: "serve",
        brief: "Runs the provider in the foreground; logs to stderr; SIGTERM ends it.",
        config: true,
        run: serve,
    },
    Subcommand {
        name: "pull",
        brief: "Makes one call to the provider, or calls by the schedule. No mail is a success too.",
        config: true,
        run: pull_mail,
    },
    Subcommand { name: "check", brief: "Checks a configuration of either side.", config: true, run: check },
    Subcommand {
        name: "demo",
        brief: "Shows two letters on their way in one call over TLS: one up, the turn, one down into a Maildir.",
        config: false,
        run: |_| demo::run().map_err(|error| ExitError::new(OS_ERROR, error)),
    },
];

/// A text for stderr and an exit code.
struct ExitError {
    code: u8,
    text: String,
}

impl ExitError {
    fn new(code: u8, text: impl ToString) -> ExitError {
        ExitError { code, text: text.to_string() }
    }
}

impl From<config::ConfigError> for ExitError {
    fn from(error: config::ConfigError) -> ExitError {
        ExitError::new(CONFIG, error)
    }
}

impl From<StartError> for ExitError {
    fn from(error: StartError) -> ExitError {
        let code = if matches!(error, StartError::Config(_)) { CONFIG } else { OS_ERROR };
        ExitError::new(code, error)
    }
}

impl From<io::Error> for ExitError {
    fn from(error: io::Error) -> ExitError {
        ExitError::new(OS_ERROR, error)
    }
}

/// The program.
pub fn main() -> ExitCode {
    let arguments: Vec<String> =
        std::env::args_os().skip(1).map(|argument| argument.to_string_lossy().into_owned()).collect();
    // Before a word is said, even of a wrong option.
    if arguments.iter().any(|argument| argument.starts_with("--inetd")) && keep_log_out_of_connection().is_err() {
        return ExitCode::from(OS_ERROR);
    }
    let called = std::env::args_os().next().unwrap_or_default();
    let (name, result) = match Path::new(&called).file_name() {
        Some(name) if name == "sendmail" => ("sendmail", send(&arguments)),
        _ => ("odmr", run(&arguments)),
    };
    match result {
        Ok(()) => ExitCode::from(OK),
        Err(ExitError { code, text }) => {
            let _ = writeln!(io::stderr(), "{name}: {text}");
            ExitCode::from(code)
        }
    }
}

fn run(arguments: &[String]) -> Result<(), ExitError> {
    let mut global = Options::new();
    global.parsing_style(ParsingStyle::StopAtFirstFree);
    global.optflag("h", "help", "").optflag("V", "version", "");
    let matches = global.parse(arguments).map_err(|error| usage(&error.to_string(), "odmr -h"))?;
    if matches.opt_present("help") {
        return print(HELP);
    }
    if matches.opt_present("version") {
        return print(concat!("odmr ", env!("CARGO_PKG_VERSION"), "\n"));
    }
    let Some((word, rest)) = matches.free.split_first() else {
        return Err(usage("a subcommand is missing: serve, pull, send, check or demo", "odmr -h"));
    };
    if word == "send" {
        return send(rest);
    }
    match SUBCOMMANDS.iter().find(|subcommand| subcommand.name == word) {
        Some(subcommand) => subcommand.start(rest),
        None => {
            Err(usage(&format!("no such subcommand: {word}; there are serve, pull, send, check and demo"), "odmr -h"))
        }
    }
}

fn usage(text: &str, hint: &str) -> ExitError {
    ExitError::new(USAGE, format!("{text}; try `{hint}`"))
}

fn print(text: &str) -> Result<(), ExitError> {
    Ok(io::stdout().write_all(text.as_bytes())?)
}

impl Subcommand {
    fn start(&self, arguments: &[String]) -> Result<(), ExitError> {
        let hint = format!("odmr {} -h", self.name);
        let mut options = Options::new();
        options.optflag("h", "help", "prints this");
        if self.config {
            options.optopt("c", "config", "the configuration (TOML)", "FILE");
        }
        if self.name == "check" {
            options.optmulti(
                "",
                "address",
                "says where mail for ADDR goes, and by which rule; as often as you like",
                "ADDR",
            );
        }
        if matches!(self.name, "serve" | "pull") {
            options.optflag("v", "verbose", "logs the dialogue too, in transcript form, secrets blanked");
        }
        if self.name == "pull" {
            options.optflag(
                "",
                "daemon",
                "calls by [schedule], and takes mail by SMTP where [outgoing] says, until SIGTERM; SIGUSR1: call at \
                 once; SIGHUP: read the configuration anew",
            );
            options.optflag("", "now", "makes the running daemon call at once; if none runs, calls");
            options.optflag("q", "quiet", "prints errors only: no summary, no progress");
        }
        if self.name == "serve" {
            options.optopt("", "inetd", "one connection, on descriptors 0 and 1: odmr or inbound", "WHICH");
        }
        let matches = options.parse(arguments).map_err(|error| usage(&error.to_string(), &hint))?;
        if matches.opt_present("help") {
            let file = if self.config { " -c FILE" } else { "" };
            return print(&options.usage(&format!("odmr {}{file} [options]\n\n{}", self.name, self.brief)));
        }
        if let Some(word) = matches.free.first() {
            return Err(usage(&format!("one word too many: {word}"), &hint));
        }
        if self.config && !matches.opt_present("config") {
            return Err(usage("-c FILE is missing", &hint));
        }
        (self.run)(&matches)
    }
}

fn verbosity(matches: &Matches) -> LevelFilter {
    if matches.opt_present("verbose") { LevelFilter::Debug } else { LevelFilter::Info }
}

fn config_path(matches: &Matches) -> PathBuf {
    PathBuf::from(matches.opt_str("config").unwrap_or_default())
}

fn serve(matches: &Matches) -> Result<(), ExitError> {
    let inetd = match matches.opt_str("inetd").as_deref() {
        None => None,
        Some("odmr") => Some(Listener::Odmr),
        Some("inbound") => Some(Listener::Inbound),
        Some(other) => {
            return Err(usage(&format!("--inetd is odmr or inbound, not {other}"), "odmr serve -h"));
        }
    };
    log_to(log_target(inetd.is_some()), verbosity(matches));
    let config = config::ProviderConfig::load(&config_path(matches)).map_err(|error| logged(error.into(), inetd))?;
    let ids = Ids::system(tls::random);
    raise_descriptor_limit();
    // Before any thread is there, so that none is hit in our place.
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    match inetd {
        None => {
            let running = Provider::start(config, ids)?;
            if let Some(signal) = signals.forever().next() {
                log::info!("event=stopping signal={signal}");
            }
            running.stop();
            log::info!("event=stopped");
            Ok(())
        }
        Some(door) => {
            let cancel = CancelToken::new()?;
            stop_at_signal(signals, cancel.clone());
            let (connection, peer) = supervised_connection()?;
            Provider::serve_one(config, ids, door, connection, peer, &cancel)
                .map_err(|error| logged(error.into(), inetd))
        }
    }
}

fn pull_mail(matches: &Matches) -> Result<(), ExitError> {
    let (daemon, now) = (matches.opt_present("daemon"), matches.opt_present("now"));
    if daemon && now {
        return Err(usage("--daemon and --now exclude each other: --now speaks to a daemon that runs", "odmr pull -h"));
    }
    let quiet = matches.opt_present("quiet");
    // On a terminal the summary is what a person wants to see.
    let watched = !daemon && io::stderr().is_terminal() && !matches.opt_present("verbose");
    log_to(
        LogTarget::Stderr,
        match (quiet, watched) {
            (true, _) => LevelFilter::Error,
            (false, true) => LevelFilter::Warn,
            (false, false) => verbosity(matches),
        },
    );
    let path = config_path(matches);
    let config = config::CustomerConfig::load(&path)?;
    let user = owner(&config)?;
    not_for_others(&config, &path)?;
    let ids = Ids::system(tls::random);
    let cancel = CancelToken::new()?;
    raise_descriptor_limit();
    if daemon {
        return run_daemon(&path, &config, user, &ids, &cancel);
    }
    let customer = pull::Customer::new(&config, &ids)?;
    become_owner(&config, user)?;
    if let Some(process) = now.then(|| daemon::running(&config)).transpose()?.flatten() {
        return request_call(process, quiet);
    }
    stop_at_signal(Signals::new([SIGTERM, SIGINT])?, cancel.clone());
    let (begun, counters) = (Instant::now(), Arc::<CallCounters>::default());
    let progress = (watched && !quiet).then(|| ProgressLine::start(&counters)).transpose()?;
    let pulled = customer.pull(&cancel, &counters);
    drop(progress);
    let summary = counters.summary(begun.elapsed().as_secs_f64());
    // Also what came before a failure has come.
    let said = match quiet || pulled.is_err() && summary == (Summary { seconds: summary.seconds, ..Summary::default() })
    {
        true => Ok(()),
        false => print(&format!("{summary}\n")),
    };
    // How the call went counts for more than whether that could be said.
    pulled?;
    said
}

fn run_daemon(
    path: &Path,
    config: &config::CustomerConfig,
    user: Option<privileges::SystemUser>,
    ids: &Ids,
    cancel: &CancelToken,
) -> Result<(), ExitError> {
    // Ports below 1024 are bound before root's rights are gone.
    let ready = daemon::BoundDaemon::new(config, ids)?;
    let becomes_another = user.is_some();
    become_owner(config, user)?;
    let (bell, events) = daemon::event_channel();
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGUSR1])?;
    let (ringer, stopper) = (bell.clone(), cancel.clone());
    std::thread::spawn(move || {
        for signal in signals.forever() {
            match signal {
                SIGHUP => ringer.send(DaemonEvent::Reload),
                SIGUSR1 => ringer.send(DaemonEvent::CallNow),
                _ => {
                    log::info!("event=stopping signal={signal}");
                    stopper.cancel();
                    ringer.send(DaemonEvent::Stop);
                }
            }
        }
    });
    let load = || config::CustomerConfig::load(path).map_err(|error| error.to_string());
    // All that was readable for root may not be for its user.
    if becomes_another && let Err(error) = load() {
        log::warn!("event=no-reload error={error:?} way-out=\"let `user` read it\"");
    }
    daemon::run(ready, &load, ids, cancel, (bell, events))?;
    log::info!("event=stopped");
    Ok(())
}

/// Whom to become before mail is touched; `None`: who we are.
fn owner(config: &config::CustomerConfig) -> Result<Option<privileges::SystemUser>, ExitError> {
    let wanted = config.owner.as_ref().filter(|_| rustix::process::geteuid().is_root());
    Ok(wanted.map(find_owner).transpose()?)
}

/// As root only for mailboxes that are root's: what it makes, their user could not read.
fn not_for_others(config: &config::CustomerConfig, path: &Path) -> Result<(), ExitError> {
    let root = &config.mailboxes.root;
    let theirs = |found: std::fs::Metadata| found.uid() != 0;
    if rustix::process::geteuid().is_root() && config.owner.is_none() && root.metadata().is_ok_and(theirs) {
        let text = format!("{} is another user's: name that user in `user`, or be that user", root.display());
        return Err(ExitError::new(CONFIG, format!("{}: {text}", path.display())));
    }
    Ok(())
}

fn find_owner(owner: &config::MailOwner) -> Result<privileges::SystemUser, config::ConfigError> {
    privileges::SystemUser::find(&owner.user, owner.group.as_deref()).map_err(|text| owner.error(text))
}

fn become_owner(config: &config::CustomerConfig, user: Option<privileges::SystemUser>) -> Result<(), ExitError> {
    if let Some(user) = user {
        let queue = config.outgoing.as_ref().map(|outgoing| &outgoing.queue);
        for folder in [Some(&config.mailboxes.root), queue].into_iter().flatten() {
            let made = user.make_directory(folder);
            made.map_err(|error| ExitError::new(OS_ERROR, format!("{}: {error}", folder.display())))?;
        }
        user.assume().map_err(|error| ExitError::new(OS_ERROR, error))?;
    }
    // The mailboxes say what others may do with mail; everything else is made for its owner only.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(config.mailboxes.umask));
    Ok(())
}

/// Makes a daemon call at once.
fn request_call(process: i32, quiet: bool) -> Result<(), ExitError> {
    let no_process = || ExitError::new(OS_ERROR, format!("{process} is no process"));
    let target = rustix::process::Pid::from_raw(process).ok_or_else(no_process)?;
    rustix::process::kill_process(target, rustix::process::Signal::USR1).map_err(|error| {
        ExitError::new(
            NO_PERMISSION,
            format!("the daemon, process {process}, cannot be told: {error}; be its user, or root"),
        )
    })?;
    if quiet { Ok(()) } else { print(&format!("the daemon, process {process}, calls now\n")) }
}

/// Shows on a terminal how far a call is, from its first second on.
struct ProgressLine {
    ended: CancelToken,
    thread: Option<JoinHandle<()>>,
}

impl ProgressLine {
    fn start(counters: &Arc<CallCounters>) -> io::Result<ProgressLine> {
        let ended = CancelToken::new()?;
        let (counters, end) = (counters.clone(), ended.clone());
        let show = move || {
            let mut shown = false;
            let mut next = Instant::now() + Duration::from_secs(1);
            while !end.wait_until(Some(next)) {
                let _ = write!(io::stderr(), "\r{}\x1b[K", counters.progress());
                shown = true;
                next = Instant::now() + Duration::from_millis(200);
            }
            if shown {
                let _ = write!(io::stderr(), "\r\x1b[K");
            }
        };
        let thread = std::thread::Builder::new().name("progress".to_owned()).spawn(show)?;
        Ok(ProgressLine { ended, thread: Some(thread) })
    }
}

impl Drop for ProgressLine {
    fn drop(&mut self) {
        self.ended.cancel();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl From<CallError> for ExitError {
    fn from(error: CallError) -> ExitError {
        let code = match &error {
            CallError::Config(_) => CONFIG,
            CallError::NoHost(_) => NO_HOST,
            CallError::Unavailable(_) => UNAVAILABLE,
            CallError::Temporary(_) | CallError::Busy(_) => TEMPORARY,
            CallError::Denied(_) => NO_PERMISSION,
            CallError::Protocol(_) => PROTOCOL,
            CallError::System(_) => OS_ERROR,
        };
        ExitError::new(code, error)
    }
}

/// `odmr send`, also by the name of `sendmail`: its options are not those of the other subcommands.
fn send(arguments: &[String]) -> Result<(), ExitError> {
    const HINT: &str = "odmr send -h";
    let mut options = Options::new();
    // Alone it asks for help; as programs pass it, it counts hops, which our own Received fields do.
    if matches!(arguments, [word] if word == "-h" || word == "--help") {
        return print(SEND_HELP);
    }
    options.optmulti("h", "", "", "").optflagmulti("t", "", "").optflagmulti("i", "", "").optflagmulti("v", "", "");
    for word in ["f", "r", "F", "N", "R", "V", "C"] {
        options.optmulti(word, "", "", "");
    }
    options.optmulti("b", "", "", "");
    options.optmulti("o", "", "", "");
    // Read and let go: what they ask for is done in any case, or is another's affair.
    for word in ["O", "B", "A", "L", "X", "e", "p"] {
        options.optmulti(word, "", "", "");
    }
    options.optflagopt("q", "", "", "");
    for word in ["G", "U", "n", "m", "I"] {
        options.optflagmulti(word, "", "");
    }
    let matches = options.parse(arguments).map_err(|error| usage(&error.to_string(), HINT))?;
    if matches.opt_present("q") {
        // What waits goes with the next call, whoever asks for it here.
        return Ok(());
    }
    log_to(LogTarget::Stderr, if matches.opt_present("v") { LevelFilter::Info } else { LevelFilter::Error });
    let last = |word: &str| matches.opt_strs(word).pop();
    let mode = last("b").unwrap_or_else(|| "m".to_owned());
    if !matches!(mode.as_str(), "m" | "s" | "p") {
        return Err(usage(&format!("-b{mode} is not done here: there are -bm, -bs and -bp"), HINT));
    }
    let order = SendmailOptions {
        from_header: matches.opt_present("t"),
        ignore_dots: matches.opt_present("i") || matches.opt_strs("o").iter().any(|word| word == "i"),
        sender: last("f").or_else(|| last("r")),
        full_name: last("F"),
        notify: last("N"),
        envelope_id: last("V"),
        ret: last("R"),
        recipients: matches.free.clone(),
        // Before we become somebody else.
        user: LoginUser::login(),
    };
    let file = last("C").map(PathBuf::from).or_else(|| std::env::var_os("ODMR_CONFIG").map(PathBuf::from));
    let file = file.unwrap_or_else(|| PathBuf::from(CUSTOMER_FILE));
    let config = customer_file(&file)?;
    // What anybody else sends is his: who calls could not read it.
    if let Some(owner) = &config.owner
        && !rustix::process::geteuid().is_root()
        && !find_owner(owner)?.is_current()
    {
        let text = format!("only {} and root may send here: hand it in by SMTP where [outgoing] listens", owner.user);
        return Err(ExitError::new(NO_PERMISSION, format!("{}: {text}", file.display())));
    }
    not_for_others(&config, &file)?;
    become_owner(&config, owner(&config)?)?;
    let ids = Ids::system(tls::random);
    let done = match mode.as_str() {
        "p" => sendmail::list(&config, &ids, &mut io::stdout()),
        "s" => {
            let cancel = CancelToken::new()?;
            stop_at_signal(Signals::new([SIGTERM, SIGINT])?, cancel.clone());
            let input = rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3).map_err(io::Error::from)?;
            let output = rustix::io::fcntl_dupfd_cloexec(io::stdout(), 3).map_err(io::Error::from)?;
            sendmail::serve(&config, &ids, (input, output), &cancel)
        }
        _ => sendmail::send(&config, &ids, &order, &mut io::stdin().lock()),
    };
    done.map_err(|refused| ExitError::new(refused.exit as u8, refused.text))
}

/// That a user may not read the file is another thing than a wrong one.
fn customer_file(path: &Path) -> Result<config::CustomerConfig, ExitError> {
    match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err(ExitError::new(NO_PERMISSION, format!("{}: {error}", path.display())))
        }
        _ => Ok(config::CustomerConfig::load_to_send(path)?),
    }
}

/// Everything that `serve` and `pull` would stumble over, without binding or dialling.
fn check(matches: &Matches) -> Result<(), ExitError> {
    let path = config_path(matches);
    let wrong = |text: String| ExitError::new(1, text);
    let addresses = matches.opt_strs("address");
    match Config::load(&path).map_err(|error| wrong(error.to_string()))? {
        Config::Provider(_) if !addresses.is_empty() => {
            let text = "--address is for a customer's file: it says into which mailbox mail for an address goes";
            Err(usage(&format!("{} is a provider's file, and {text}", path.display()), "odmr check -h"))
        }
        Config::Customer(config) if !addresses.is_empty() => explain(&config.mailboxes.rules, &addresses),
        Config::Provider(config) => {
            if let Some(files) = &config.tls {
                tls::server_config(&files.certificate, &files.key)
                    .map_err(|error| wrong(format!("{}: {error}", path.display())))?;
            }
            usable(&config.spool).map_err(wrong)?;
            let accounts = config.accounts.iter().count();
            let domains: usize = config.accounts.iter().map(|account| account.domains.len()).sum();
            print(&format!("{}: good: a provider with {accounts} customers, {domains} domains\n", path.display()))
        }
        Config::Customer(config) => {
            if let Some(owner) = &config.owner {
                let user = find_owner(owner).map_err(|error| wrong(error.to_string()))?;
                if !user.may_read(&path)? {
                    let name = &owner.user;
                    print(&format!("{}: {name} may not read it, so SIGHUP cannot: chgrp it\n", path.display()))?;
                }
            }
            not_for_others(&config, &path).map_err(|failure| wrong(failure.text))?;
            pull::Customer::new(&config, &Ids::system(tls::random)).map_err(|error| wrong(error.to_string()))?;
            usable(&config.mailboxes.root).map_err(wrong)?;
            if let Some(outgoing) = &config.outgoing {
                usable(&outgoing.queue).map_err(wrong)?;
            }
            let of = |provider: &config::ProviderAccount| format!("of {}, as {}", provider.address, provider.name);
            let providers: Vec<_> = config.providers.iter().map(of).collect();
            print(&format!("{}: good: a customer {}\n", path.display(), providers.join("; ")))
        }
    }
}

/// Where mail for each address goes, and by which rule.
fn explain(rules: &RecipientRules, addresses: &[String]) -> Result<(), ExitError> {
    let mut refused = 0;
    for address in addresses {
        let (Ok(text) | Err(text)) = rules.explain_typed(address).inspect_err(|_| refused += 1);
        print(&format!("{text}\n"))?;
    }
    match refused {
        0 => Ok(()),
        _ => Err(ExitError::new(1, format!("{refused} of {} get no mail here", addresses.len()))),
    }
}

/// A folder that is there and can be written to, or can be made.
fn usable(folder: &Path) -> Result<(), String> {
    let there = folder.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"));
    let writable = rustix::fs::access(there, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK);
    match writable {
        _ if !there.is_dir() => Err(format!("{} is not a folder: move it away", there.display())),
        Err(error) => Err(format!("{} cannot be written to: {error}; give its user the right to", there.display())),
        Ok(()) => Ok(()),
    }
}

/// The user sees an error on stderr in any case; behind inetd nobody looks there.
fn logged(failure: ExitError, inetd: Option<Listener>) -> ExitError {
    if inetd.is_some() {
        log::error!("{}", failure.text);
    }
    failure
}

fn stop_at_signal(mut signals: Signals, cancel: CancelToken) {
    std::thread::spawn(move || {
        if signals.forever().next().is_some() {
            cancel.cancel();
        }
    });
}

/// Ten thousand connections need ten thousand descriptors.
fn raise_descriptor_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    let _ = rustix::process::setrlimit(Resource::Nofile, raised);
}

/// The connection a supervisor passes: a socket on descriptor 0 (inetd), or two ends of it (UCSPI); the
/// peer by the socket, or by `TCPREMOTEIP` where a program in between has replaced it.
type SupervisedConnection = ((OwnedFd, Option<OwnedFd>), Option<IpAddr>);

fn supervised_connection() -> Result<SupervisedConnection, ExitError> {
    let input = rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3).map_err(io::Error::from)?;
    let peer = rustix::net::getpeername(&input).ok().flatten();
    let by_socket = peer.and_then(|peer| SocketAddr::try_from(peer).ok()).map(|peer| peer.ip());
    let by_name = || std::env::var("TCPREMOTEIP").ok().and_then(|text| text.parse().ok());
    let is_socket = rustix::net::sockopt::socket_type(&input).is_ok();
    let output = match is_socket {
        true => None,
        false => Some(rustix::io::fcntl_dupfd_cloexec(io::stdout(), 3).map_err(io::Error::from)?),
    };
    Ok(((input, output), by_socket.or_else(by_name)))
}

/// inetd puts the connection on descriptor 2 too: nothing may be written there then.
fn keep_log_out_of_connection() -> io::Result<()> {
    if is_connection(io::stderr().as_fd()) {
        let null = File::options().write(true).open("/dev/null")?;
        rustix::stdio::dup2_stderr(null)?;
    }
    Ok(())
}

fn is_connection(descriptor: impl AsFd) -> bool {
    let same =
        |one: &rustix::fs::Stat, other: &rustix::fs::Stat| (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino);
    match (rustix::fs::fstat(descriptor), rustix::fs::fstat(io::stdin())) {
        (Ok(one), Ok(other)) => same(&one, &other),
        _ => false,
    }
}

/// Where log lines go.
enum LogTarget {
    Stderr,
    Syslog(UnixDatagram),
}

/// stderr, unless descriptor 2 was the connection: then the system's log, as inetd's servers do.
fn log_target(inetd: bool) -> LogTarget {
    let null = || rustix::fs::stat("/dev/null").ok();
    let muted = inetd
        && match (rustix::fs::fstat(io::stderr()), null()) {
            (Ok(stderr), Some(null)) => stderr.st_rdev == null.st_rdev,
            _ => false,
        };
    let syslog = || -> io::Result<UnixDatagram> {
        let socket = UnixDatagram::unbound()?;
        socket.connect("/dev/log")?;
        Ok(socket)
    };
    match muted.then(syslog) {
        Some(Ok(socket)) => LogTarget::Syslog(socket),
        _ => LogTarget::Stderr,
    }
}

/// Writes each record as one datagram, with the priority in front (RFC 3164).
struct Syslog(UnixDatagram);

impl Write for Syslog {
    fn write(&mut self, record: &[u8]) -> io::Result<usize> {
        // That nobody reads the log is no reason to stop a delivery.
        let _ = self.0.send(record);
        Ok(record.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One line an event; `RUST_LOG` says more or less of it (`debug`: the dialogue too).
fn log_to(target: LogTarget, level: LevelFilter) {
    let mut builder = env_logger::Builder::new();
    builder.filter_level(level);
    // rustls' own words are for those who debug rustls.
    builder.filter_module("rustls", LevelFilter::Warn);
    builder.parse_default_env();
    let syslog = matches!(target, LogTarget::Syslog(_));
    builder.format(move |out, record| {
        if syslog {
            // Facility 2: mail.
            let severity = match record.level() {
                Level::Error => 3,
                Level::Warn => 4,
                Level::Info => 6,
                Level::Debug | Level::Trace => 7,
            };
            return write!(out, "<{}>odmr[{}]: {}", 2 * 8 + severity, std::process::id(), record.args());
        }
        match record.level() {
            Level::Error => writeln!(out, "error: {}", record.args()),
            Level::Warn => writeln!(out, "warning: {}", record.args()),
            _ => writeln!(out, "{}", record.args()),
        }
    });
    if let LogTarget::Syslog(socket) = target {
        builder.target(env_logger::Target::Pipe(Box::new(Syslog(socket))));
    }
    // A second logger in one process is none of our making.
    let _ = builder.try_init();
    // A panic's words must not end up in a connection either.
    std::panic::set_hook(Box::new(|panic| log::error!("event=panic {}", panic.to_string().replace('\n', " "))));
}
