//! `odmr send`, also under the names `sendmail`, `mailq` and `newaliases`: the options of sendmail(8).
//!
//! Options of sendmail(8) that have no meaning here are accepted, and change nothing, because programs pass them. An
//! error is one line on stderr and an exit code of sysexits.h. [`crate::customer::sendmail`] does the work.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use getopts::{Matches, Options};
use log::LevelFilter;

use super::confine::{confine_sender, confine_submitter};
use super::exit::{ExitError, Sysexit};
use super::help::wrong_option;
use super::logging::{self, LogTarget};
use super::owner::{become_customer_owner, check_not_root, owner_to_become};
use super::process::{cancel_at_signal, print, print_fitted};
use super::pull;
use crate::config::CustomerConfig;
use crate::customer::daemon;
use crate::customer::sendmail::{self, SendmailError, SendmailOptions};
use crate::customer::submitter::SubmissionRoute;
use crate::ids::Ids;
use crate::maildir::shell_word;
use crate::net::cancel::CancelToken;
use crate::net::descriptor::Waiting;
use crate::net::tls;
use crate::plural::counted;
use crate::privileges::LoginUser;

/// The help that goes with an error of the command line.
const HINT: &str = "odmr send -h";

/// The configuration if neither `-C` nor `$ODMR_CONFIG` names one.
const DEFAULT_CONFIG: &str = "/etc/odmr/customer.toml";

const HELP: &str = include_str!("pages/send.txt");

/// The names by which programs call sendmail(8) (LSB; Debian policy 11.6), and the `-b` that each means.
pub(super) const NAMES: [(&str, Option<&str>); 3] =
    [("sendmail", None), ("mailq", Some("-bp")), ("newaliases", Some("-bi"))];

/// A mode of `-b` that submits mail.
type Mode = fn(&CustomerConfig, &Ids, &SendmailOptions, SubmissionRoute) -> Result<(), ExitError>;

/// Runs `odmr send` with these arguments, after the option `mode` that its name means.
///
/// # Errors
///
/// Nothing was queued.
pub(super) fn run(mode: Option<&str>, arguments: &[String]) -> Result<(), ExitError> {
    // As its only argument, `-h` asks for help. Otherwise it is a hop count, which our own Received fields replace.
    if matches!(arguments, [word] if word == "-h" || word == "--help") {
        return print_fitted(HELP);
    }
    let arguments = mode.into_iter().chain(arguments.iter().map(String::as_str));
    let options = options();
    let matches = options.parse(arguments).map_err(|error| ExitError::usage(wrong_option(error, &options), HINT))?;
    let named = last(&matches, "C").map(OsString::from).or_else(config_of_environment);
    let path = PathBuf::from(named.unwrap_or_else(|| DEFAULT_CONFIG.into()));
    let target = LogTarget::new(&matches, false);
    let logs_events = target.is_syslog() || matches.opt_present("v");
    target.start(if logs_events { LevelFilter::Info } else { LevelFilter::Error }, false);
    if matches.opt_present("q") {
        // The daemon calls at once. Without one, the next call sends what waits.
        return daemon::running(&load(&path)?)?.map_or(Ok(()), |process| pull::request_call(process, true));
    }
    let mode: Mode = match last(&matches, "b").as_deref() {
        Some("i") => return count_aliases(&load(&path)?, &path),
        None | Some("m") => {
            |config, ids, options, route| Ok(sendmail::send(config, ids, options, route, &mut Waiting(io::stdin()))?)
        }
        Some("s") => |config, ids, _, route| serve(config, ids, route),
        Some("p") => return list(&path),
        Some(other) => {
            return Err(ExitError::usage(format!("-b{other} is not supported: there are -bm, -bs, -bp and -bi"), HINT));
        }
    };
    // Read the login name before this process becomes another user.
    let options = sendmail_options(&matches, LoginUser::current());
    let (config, owner) = load_as_owner(&path)?;
    let route = sendmail::route(&config, owner.as_deref()).map_err(|error| of_file(&path, error))?;
    match route {
        SubmissionRoute::Queue => confine_sender(&config),
        SubmissionRoute::Listener(_) => confine_submitter(),
    }
    mode(&config, &Ids::system(tls::random), &options, route)
}

/// `$ODMR_CONFIG`. A program with the rights of another user (setuid, setgid) ignores it: otherwise the user that has
/// started it could make it read any file, and make directories, with these rights.
fn config_of_environment() -> Option<OsString> {
    use rustix::process::{getegid, geteuid, getgid, getuid};
    std::env::var_os("ODMR_CONFIG").filter(|_| getuid() == geteuid() && getgid() == getegid())
}

/// `-bp`: lists what waits, as far as this user may read it.
fn list(path: &Path) -> Result<(), ExitError> {
    let (config, _) = load_as_owner(path)?;
    confine_sender(&config);
    print(&sendmail::list(&config, &Ids::system(tls::random))?)
}

/// `-bi`: there is no database to make of the aliases, which were checked with the configuration.
fn count_aliases(config: &CustomerConfig, path: &Path) -> Result<(), ExitError> {
    let rules = &config.mailboxes.rules;
    let warnings = match rules.warnings().len() {
        0 => "all valid".to_owned(),
        count => format!("{}: see `odmr check -c {}`", counted(count, "warning", "warnings"), shell_word(path)),
    };
    let aliases = counted(rules.alias_count(), "alias", "aliases");
    print(&format!("{aliases}, {warnings}; a daemon that runs reads them again at SIGHUP\n"))
}

/// `-bs`: one SMTP session on stdin and stdout.
fn serve(config: &CustomerConfig, ids: &Ids, route: SubmissionRoute) -> Result<(), ExitError> {
    let cancel = CancelToken::new()?;
    cancel_at_signal(&cancel)?;
    let input = rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3).map_err(io::Error::from)?;
    let output = rustix::io::fcntl_dupfd_cloexec(io::stdout(), 3).map_err(io::Error::from)?;
    Ok(sendmail::serve(config, ids, route, (input, output), &cancel)?)
}

fn options() -> Options {
    let mut options = Options::new();
    // Each may be given several times; the last one counts. From `O` and from `G` on they change nothing: programs pass
    // them, as sendmail(8) has them.
    for name in ["h", "f", "r", "F", "N", "R", "V", "C", "b", "o", "O", "B", "A", "L", "X", "e", "p"] {
        options.optmulti(name, "", "", "");
    }
    for name in ["t", "i", "v", "G", "U", "n", "m", "I"] {
        options.optflagmulti(name, "", "");
    }
    options.optflagopt("q", "", "", "");
    logging::options(&mut options);
    options
}

/// The last value of an option.
fn last(matches: &Matches, name: &str) -> Option<String> {
    matches.opt_strs(name).pop()
}

fn sendmail_options(matches: &Matches, user: LoginUser) -> SendmailOptions {
    SendmailOptions {
        recipients_from_header: matches.opt_present("t"),
        ignore_dots: matches.opt_present("i") || matches.opt_strs("o").iter().any(|value| value == "i"),
        sender: last(matches, "f").or_else(|| last(matches, "r")),
        full_name: last(matches, "F"),
        notify: last(matches, "N"),
        envelope_id: last(matches, "V"),
        ret: last(matches, "R"),
        recipients: matches.free.clone(),
        user,
    }
}

/// An error about the content of a file, which the text names.
fn of_file(path: &Path, error: SendmailError) -> ExitError {
    ExitError::from(SendmailError { text: format!("{}: {}", path.display(), error.text), ..error })
}

/// Reads the configuration.
fn load(path: &Path) -> Result<CustomerConfig, ExitError> {
    // A file that this user may not read is not a wrong configuration.
    if let Err(error) = File::open(path)
        && error.kind() == io::ErrorKind::PermissionDenied
    {
        let (shown, path) = (path.display(), shell_word(path));
        let text = format!(
            "{shown}: {error}: for all users to send mail, move its secrets into files (`secret-file`) and type `chmod 644 \
             {path}`"
        );
        return Err(ExitError::new(Sysexit::NoPermission, text));
    }
    Ok(CustomerConfig::load_to_send(path)?)
}

/// Reads the configuration, and as root becomes the owner of the mail. Returns the owner as well, if that is a user that this
/// process cannot become.
fn load_as_owner(path: &Path) -> Result<(CustomerConfig, Option<String>), ExitError> {
    let config = load(path)?;
    if let Some(owner) = &config.owner
        && !rustix::process::geteuid().is_root()
        && !owner.find()?.is_current()
    {
        let user = owner.user.clone();
        return Ok((config, Some(user)));
    }
    check_not_root(&config, path)?;
    become_customer_owner(&config, owner_to_become(config.owner.as_ref())?.as_ref())?;
    Ok((config, None))
}
