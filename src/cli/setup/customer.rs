//! `odmr setup customer FILE`.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use getopts::{Matches, Options};

use super::installer::{DirectoryOf, Installer, Readers};
use super::{check_missing, directory_of, sibling, sibling_name, start_command};
use crate::cli::exit::{ExitError, Sysexit};
use crate::cli::process::print;
use crate::config::{CustomerBlock, CustomerConfig, NamesOnDisk, check_text};
use crate::mail::address::Mailbox;
use crate::net::tls::CertificateInfo;

pub const SETUP_CUSTOMER_SUMMARY: &str = include_str!("../pages/setup-customer.txt");

const DEFAULT_FILE: &str = "/etc/odmr/customer.toml";
const HINT: &str = "odmr setup customer -h";

/// Octets of a block, which a provider prints.
const BLOCK_LIMIT: u64 = 1 << 20;

pub fn options(options: &mut Options) {
    options.optopt("c", "config", "the configuration to make; default: /etc/odmr/customer.toml", "FILE");
    options.optopt("", "user", "the owner of the mail; is made if there is no such user; default: odmr", "NAME");
    options.optflag("", "certificate", "makes a certificate to log in with, and prints its pin for the provider");
}

/// Sets up a customer.
///
/// # Errors
///
/// The command line is wrong (64); the block cannot be read (66), or has a mistake (78); the configuration exists, or
/// something cannot be made (73, 77, 71).
pub fn run(matches: &Matches) -> Result<(), ExitError> {
    let [from] = matches.free.as_slice() else {
        let text = match matches.free.len() {
            0 => "FILE is missing, which `odmr customer add` has printed at the provider; `-` is the standard input",
            _ => "too many arguments: there is one FILE",
        };
        return Err(ExitError::usage(text, HINT));
    };
    let config = PathBuf::from(matches.opt_str("config").unwrap_or_else(|| DEFAULT_FILE.to_owned()));
    let file = config.display();
    check_missing(&config, " for one more provider add its table [[provider]] there;")?;
    let name = if from == "-" { Path::new("standard input") } else { Path::new(from) };
    let block = CustomerBlock::read(name, &read(from)?)?;
    let mut installer = Installer::begin(matches.opt_str("user"))?;
    installer.directory(directory_of(&config), &[], 0o755, DirectoryOf::Root)?;
    let secret_file = sibling(&config, "secret");
    if let Some(secret) = &block.secret {
        make_secret(&mut installer, &secret_file, secret)?;
    }
    // An account without a secret is opened by a certificate. Its files are made here, whatever names the block has.
    let names_one = block.config.providers.iter().any(|provider| provider.remote.identity.is_some());
    let wants_certificate = matches.opt_present("certificate") || names_one;
    let own = [sibling(&config, "pem"), sibling(&config, "key")];
    let [certificate, key] = &own;
    let info =
        wants_certificate.then(|| installer.certificate(certificate, key, &block.config.hostname)).transpose()?;
    let own_names = [sibling_name(&config, "pem"), sibling_name(&config, "key")];
    let text = block.installed(&NamesOnDisk {
        user: installer.user(),
        secret_file: &sibling_name(&config, "secret"),
        certificate: info.is_some().then(|| own_names.each_ref().map(String::as_str)),
        places: installer.owner.is_none().then_some(["mail", "outgoing", "127.0.0.1:5870"]),
    })?;
    let checked = check_text(&config, &text).map_err(|error| block.other_form(&error))?;
    let crate::config::Config::Customer(installed) = checked else {
        return Err(ExitError::new(Sysexit::Config, format!("{from} is not a customer's file")));
    };
    let postmaster = make_directories(&mut installer, &installed)?;
    // Last: as long as it is missing, an interrupted run can be repeated. Every user may read it, to send mail.
    if !installer.file(&config, &text, Readers::All)? {
        return Err(ExitError::new(Sysexit::CannotCreate, format!("{file} exists: another process has made it")));
    }
    let mut report = installer.report();
    if let Some(info) = &info {
        report += &about_pin(info, &installed);
    }
    print(&(report + &next(&config, from, block.secret.is_some(), postmaster.as_deref())))
}

/// Reads the block.
fn read(from: &str) -> Result<String, ExitError> {
    let mut text = String::new();
    let input = match from {
        "-" => io::stdin().take(BLOCK_LIMIT + 1).read_to_string(&mut text),
        path => fs::File::open(path).and_then(|file| file.take(BLOCK_LIMIT + 1).read_to_string(&mut text)),
    };
    let wrong = |why: &str| {
        let text =
            format!("{from}: {why}; type the name of the file that `odmr customer add` has printed at the provider");
        ExitError::new(Sysexit::NoInput, text)
    };
    match input {
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(wrong("is not UTF-8")),
        Err(error) => Err(wrong(&error.to_string())),
        Ok(octets) if octets as u64 > BLOCK_LIMIT => Err(wrong("has more than 1 MiB")),
        Ok(_) => Ok(text.trim_start_matches('\u{feff}').to_owned()),
    }
}

/// Writes the secret into a separate file, so that every user may read the configuration.
fn make_secret(installer: &mut Installer, file: &Path, secret: &str) -> Result<(), ExitError> {
    let text = format!("{secret}\n");
    if installer.file(file, &text, Readers::User)? || fs::read_to_string(file).is_ok_and(|found| found == text) {
        return Ok(());
    }
    let file = file.display();
    let text = format!("{file} exists, with another secret: if no configuration needs it, type `mv {file} {file}.old`");
    Err(ExitError::new(Sysexit::CannotCreate, text))
}

/// Makes the directories of the mail. Returns the mailbox of postmaster, if it was made.
fn make_directories(installer: &mut Installer, config: &CustomerConfig) -> Result<Option<PathBuf>, ExitError> {
    let (rules, root) = (&config.mailboxes.rules, &config.mailboxes.root);
    let mailbox = Mailbox::parse(&format!("postmaster@{}", rules.home())).map(|mailbox| rules.maildir_of(&mailbox));
    let mailbox = mailbox.filter(|mailbox| mailbox.starts_with(root));
    let mut below: Vec<PathBuf> = Vec::new();
    if let Some(inside) = mailbox.as_deref().and_then(|mailbox| mailbox.strip_prefix(root).ok()) {
        let above: Vec<_> = inside.ancestors().filter(|path| !path.as_os_str().is_empty()).collect();
        below.extend(above.into_iter().rev().map(Path::to_owned));
        below.extend(["new", "cur", "tmp"].map(|name| inside.join(name)));
    }
    // If they exist, the first message makes the mailbox.
    let is_new = installer.directory(root, &below, 0o777 & !config.mailboxes.umask, DirectoryOf::Mail)?;
    if let Some(outgoing) = &config.outgoing {
        installer.directory(&outgoing.queue, &[], 0o700, DirectoryOf::Mail)?;
    }
    Ok(mailbox.filter(|_| is_new))
}

/// The text by which the administrator sends the pin of our certificate to the provider.
fn about_pin(info: &CertificateInfo, config: &CustomerConfig) -> String {
    let [_, pin] = &info.pins;
    let account = config.providers.first().map_or("", |provider| provider.remote.login_name());
    format!(
        "\nThe provider must know the pin of this machine's key. In customers.d/{account}.toml there:\n\n    certificate = \
         [\"{pin}\"]\n"
    )
}

/// The text about the next steps. `secret`: whether `from` has one.
fn next(config: &Path, from: &str, secret: bool, postmaster: Option<&Path>) -> String {
    let file = config.display();
    let (check, pull) = (format!("odmr check -c {file} --call"), format!("odmr pull -c {file}"));
    let start = start_command("odmr-pull", file.to_string() == DEFAULT_FILE, &format!("{pull} --daemon"));
    let width = check.len().max(start.len());
    let mut text = format!(
        "\nThen type:\n\n    {check:width$}    # logs in, and fetches nothing\n    {pull:width$}    # makes one call\n    \
         {start:width$}    # calls again and again\n\n"
    );
    if let Some(postmaster) = postmaster {
        let postmaster = postmaster.display();
        let _ = writeln!(
            text,
            "Mail for all names arrives in {postmaster}.\nBetter name the users, in `accept` of {file}."
        );
    }
    if secret && from != "-" {
        let readable = fs::metadata(from).is_ok_and(|found| found.mode() & 0o004 != 0);
        let who = if readable { ", and every user may read it" } else { "" };
        let _ = writeln!(text, "{from} has the secret{who}: remove it.");
    }
    text
}
