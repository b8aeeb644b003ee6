//! `odmr customer`: a provider's administrator adds, lists, shows and removes customers, even while `odmr serve` runs.
//!
//! The customer's own file is written to stdout, messages for the administrator to stderr. A customer exists as soon as
//! its file does; a running `serve` reads it at once.

mod block;
mod reload;

use std::fmt::Write as _;
use std::fs::{File, TryLockError};
use std::io::{self, IsTerminal, Write as _};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use getopts::{Matches, Options};

use super::dns::{DnsLookups, domain_records};
use super::exit::{ExitError, Sysexit};
use super::process::{config_path, print};
use super::secret::{new_secret, new_verifier};
use super::setup::names::{check_customer_name, typed_domain};
use crate::config::{Account, ProviderConfig, ProviderPlaces, check_new_account, effective_account, quote};
use crate::ids::Ids;
use crate::mail::address::Domain;
use crate::maildir::{create_file_durably, make_tree, remove_file_durably, shell_word, with_path};
use crate::net::descriptor::Waiting;
use crate::net::pin::Pin;
use crate::net::tls;
use crate::platform;
use crate::plural::counted;
use crate::privileges::SystemUser;
use crate::provider::spool::{Spool, SpoolQueue};
use block::{Opening, block_for};

pub(super) const CUSTOMER_SUMMARY: &str = include_str!("pages/customer.txt");

const HINT: &str = "odmr customer -h";

/// How long to wait for another `odmr customer`.
const LOCK_WAIT: Duration = Duration::from_secs(5);
const LOCK_PAUSE: Duration = Duration::from_millis(20);

pub(super) fn options(options: &mut Options) {
    let help =
        "add: PIN of the customer's certificate opens the account, and no secret does; may be given several times";
    options.optmulti("", "pin", help, "PIN");
}

/// Runs the command that the arguments name.
///
/// # Errors
///
/// The command line is wrong (64), or a name (65); a domain has an owner (65); the configuration has a mistake (78); the
/// customer exists, or the file cannot be written (73, 77); another `odmr customer` is at work (75).
pub(super) fn run(matches: &Matches) -> Result<(), ExitError> {
    let words: Vec<&str> = matches.free.iter().map(String::as_str).collect();
    let (path, pins) = (config_path(matches), matches.opt_strs("pin"));
    if let (false, Some(word)) = (pins.is_empty(), words.first().filter(|word| **word != "add")) {
        return Err(ExitError::usage(format!("--pin is for add, not for {word}"), HINT));
    }
    let text = match words[..] {
        ["add", name, _, ..] => return add(&path, name, &words[2..], &pins),
        ["list"] => return list(&path),
        ["show", name] => return show(&path, name),
        ["remove", name] => return remove(&path, name),
        ["add", ..] => {
            "add needs the customer's name and its domains: `odmr customer -c FILE add acme example.org >acme.toml`"
        }
        ["list", ..] => "list needs no more words",
        ["show", ..] => "show needs the name of one customer: see `odmr customer -c FILE list`",
        ["remove", ..] => "remove needs the name of one customer: see `odmr customer -c FILE list`",
        [] => "what to do is missing: add, list, show or remove",
        [word, ..] => &format!("customer does not know {word:?}: there are add, list, show and remove"),
    };
    Err(ExitError::usage(text, HINT))
}

/// Adds a customer.
fn add(path: &Path, name: &str, domains: &[&str], pins: &[String]) -> Result<(), ExitError> {
    // Each file and directory is made with its own mode.
    platform::set_umask(0o022);
    check_customer_name(name)?;
    let command = format!("odmr customer -c {} add {name}", path.display());
    let domains = typed_domains(domains, &command)?;
    if let Some(pin) = pins.iter().find(|pin| Pin::parse(pin).is_none()) {
        let text = format!(
            "{pin:?} is not a pin: type the one that `odmr check -c FILE` shows on the customer's side, spki-sha256: and 64 digits"
        );
        return Err(ExitError::new(Sysexit::DataError, text));
    }
    let Some(places) = ProviderPlaces::read(path) else {
        let text = format!("{} has no `customers` and no `spool`", path.display());
        return Err(ProviderConfig::load(path).map_or_else(ExitError::from, |_| ExitError::new(Sysexit::Config, text)));
    };
    let lock = lock(path)?;
    let group = group_of_files(&places, path)?;
    make_tree(&places.customers, &[], 0o750, group.map(|group| (0, group))).map_err(cannot_change)?;
    let config = ProviderConfig::load(path)?;
    let file = config.accounts.file(name);
    check_new(&config, path, name, &domains)?;
    let secret = pins.is_empty().then(new_secret);
    let text = account_text(&domains, secret.as_deref(), pins);
    check_new_account(&file, &text, config.tls.is_some())?;
    let opening = secret.as_deref().map_or(Opening::Certificate, Opening::Secret);
    // Print before the account is made: if that fails, there is no account, and the command can be repeated.
    print_secret(&block_for(&config, name, &domains, &opening, true))?;
    create_file_durably(&file, &text, 0o640, group).map_err(|error| {
        let with = format!("{name} is a customer from the next reload (SIGHUP) on");
        let without = format!("there is no customer {name}, and what was printed is of no use");
        cannot_change(error).of_file(&file, &text, &with, &without)
    })?;
    drop(lock);
    let reload = reload::request(&config);
    let mut report = format!("{name} is a customer: {} is made, and {reload}.\n", file.display());
    let place = if io::stdout().is_terminal() { "Above is" } else { "Standard output has" };
    let secret = secret.map_or("", |_| ", with the secret, which is stored nowhere here");
    let _ = writeln!(
        report,
        "{place} the customer's whole file{secret}.\nSend it so that no other person can read it, and keep no copy. On the customer's \
         machine type as root:\n\n    odmr setup customer {name}.toml"
    );
    for (domain, messages) in held(&config, &domains).into_iter().filter(|(_, held)| !matches!(held, Ok(0))) {
        let _ = writeln!(report, "Held for {domain} already: {}. {name} gets that.", amount(&messages));
    }
    print_to_person(&report);
    // Last: name servers may be slow.
    print_to_person(&dns_report(&config, &domains, true));
    Ok(())
}

fn typed_domains(texts: &[&str], command: &str) -> Result<Vec<Domain>, ExitError> {
    let mut domains = Vec::new();
    for text in texts {
        let domain = typed_domain(text, command, "example.org")?;
        if domains.contains(&domain) {
            return Err(ExitError::new(Sysexit::DataError, format!("{domain} is given twice: type it once")));
        }
        domains.push(domain);
    }
    Ok(domains)
}

/// Waits until no other `odmr customer` changes the customers: two must not give a domain to two customers. `path`: the
/// provider's file, which exists also before the directory of the customers.
fn lock(path: &Path) -> Result<File, ExitError> {
    let opened = File::open(path).map_err(|error| {
        ProviderConfig::load(path).map_or_else(ExitError::from, |_| cannot_change(with_path(path, error)))
    })?;
    let late = Instant::now() + LOCK_WAIT;
    loop {
        match opened.try_lock() {
            Ok(()) => return Ok(opened),
            Err(TryLockError::WouldBlock) if Instant::now() < late => thread::sleep(LOCK_PAUSE),
            Err(TryLockError::WouldBlock) => {
                let text =
                    "another `odmr customer` changes the customers now: wait for its end, and type the same again";
                return Err(ExitError::new(Sysexit::Temporary, text));
            }
            Err(TryLockError::Error(error)) => return Err(cannot_change(with_path(path, error))),
        }
    }
}

/// Checks that a customer and its domains are new.
fn check_new(config: &ProviderConfig, path: &Path, name: &str, domains: &[Domain]) -> Result<(), ExitError> {
    let (file, path) = (config.accounts.file(name), shell_word(path));
    if file.symlink_metadata().is_ok() {
        let text = format!(
            "{} exists, so there is a customer {name}: add a domain in its `domains`, make another secret with `odmr secret \
             {name} -c {path}`, or remove the customer with `odmr customer -c {path} remove {name}`",
            file.display()
        );
        return Err(ExitError::new(Sysexit::CannotCreate, text));
    }
    if let Some(skipped) = config.accounts.skipped().first() {
        let text = format!("{}; correct that first: that customer may have one of these domains", skipped.error);
        return Err(ExitError::new(Sysexit::Config, text));
    }
    for domain in domains {
        if let Some(owner) = config.accounts.owner(domain) {
            let text = format!(
                "{domain} is a domain of {} ({}): a domain has one owner; remove it there first, or leave it out here",
                owner.name,
                config.accounts.file(&owner.name).display()
            );
            return Err(ExitError::new(Sysexit::DataError, text));
        }
    }
    Ok(())
}

/// The file of a customer at its provider.
fn account_text(domains: &[Domain], secret: Option<&str>, pins: &[String]) -> String {
    let list = |values: &[String]| values.iter().map(quote).collect::<Vec<_>>().join(", ");
    let domains: Vec<_> = domains.iter().map(Domain::to_string).collect();
    let opened_by = match secret {
        Some(secret) => {
            format!(
                "# The verifier of the secret, which only the customer has.\nscram = \"{}\"\n",
                new_verifier(secret)
            )
        }
        None => format!("# The pin of the customer's certificate.\ncertificate = [{}]\n", list(pins)),
    };
    format!("domains = [{}]\n{opened_by}", list(&domains))
}

/// The group of a new file, which `serve` must read at the next reload: that of `user`, or of the owner of the spool, or else
/// that of the provider's file. `None`: that of this process, which is not root.
fn group_of_files(places: &ProviderPlaces, path: &Path) -> Result<Option<u32>, ExitError> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    if let Some(owner) = &places.owner {
        return Ok(Some(owner.find()?.gid()));
    }
    let owner = SystemUser::owner_of(&places.spool).map_err(|text| ExitError::new(Sysexit::Config, text))?;
    let group_of_config = || path.metadata().ok().map(|found| found.gid());
    Ok(owner.map(|owner| owner.gid()).or_else(group_of_config))
}

/// Writes to standard output what cannot be printed again.
///
/// # Errors
///
/// Standard output cannot be written to, or its reader has closed it.
fn print_secret(text: &str) -> Result<(), ExitError> {
    let mut out = Waiting(io::stdout());
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    // A power cut must not destroy the only copy. For a pipe or a terminal it fails, and is not needed.
    let _ = rustix::fs::fsync(io::stdout());
    written.map_err(|error| {
        ExitError::new(Sysexit::InputOutput, format!("standard output: {error}; there is no new customer"))
    })
}

/// The error of changing the customers' files.
fn cannot_change(error: io::Error) -> ExitError {
    ExitError::cannot_create(error, "be root, or the user that the customers' files belong to")
}

/// Writes to stderr, for a person.
fn print_to_person(text: &str) {
    let _ = Waiting(io::stderr()).write_all(text.as_bytes());
}

/// The DNS records of domains, as they are and as they should be.
fn dns_report(config: &ProviderConfig, domains: &[Domain], relays: bool) -> String {
    let lookups = DnsLookups::brief(config.relay.resolver);
    let mut text = String::new();
    for domain in domains {
        let records = domain_records(domain, &config.hostname, relays, &lookups);
        if !records.is_empty() {
            text += "\n";
        }
        text.extend(records.iter().map(|record| format!("{record}\n")));
    }
    text
}

fn list(path: &Path) -> Result<(), ExitError> {
    let config = ProviderConfig::load(path)?;
    let width = config.accounts.iter().map(|account| account.name.chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for account in config.accounts.iter() {
        let domains: Vec<_> = account.domains.iter().map(Domain::as_str).collect();
        let _ = writeln!(text, "{:width$}  {}", account.name, domains.join(", "));
    }
    print(&text)?;
    for skipped in config.accounts.skipped() {
        print_to_person(&format!("odmr: {}\n", skipped.error));
    }
    if text.is_empty() && config.accounts.skipped().is_empty() {
        print_to_person(&format!(
            "there is no customer: `odmr customer -c {} add NAME DOMAIN` makes one\n",
            path.display()
        ));
    }
    Ok(())
}

/// The account of a customer.
fn find<'a>(config: &'a ProviderConfig, path: &Path, name: &str) -> Result<&'a Account, ExitError> {
    if let Some(account) = config.accounts.account(name) {
        return Ok(account);
    }
    match config.accounts.skipped().iter().find(|skipped| skipped.name == name) {
        Some(skipped) => Err(skipped.error.clone().into()),
        None => Err(no_customer(path, name)),
    }
}

fn no_customer(path: &Path, name: &str) -> ExitError {
    let text = format!("there is no customer {name:?}: `odmr customer -c {} list` shows them", path.display());
    ExitError::new(Sysexit::DataError, text)
}

fn show(path: &Path, name: &str) -> Result<(), ExitError> {
    let config = ProviderConfig::load(path)?;
    let account = find(&config, path, name)?;
    let opening = match account.secret.is_some() || account.verifier.is_some() {
        true => Opening::HiddenSecret,
        false => Opening::Certificate,
    };
    print(&format!(
        "{}\n# The customer's own file:\n\n{}",
        effective_account(&config.accounts.file(name), account)?,
        block_for(&config, name, &account.domains, &opening, account.relay),
    ))?;
    print(&dns_report(&config, &account.domains, account.relay))
}

fn remove(path: &Path, name: &str) -> Result<(), ExitError> {
    let lock = lock(path)?;
    let config = ProviderConfig::load(path)?;
    if config.accounts.account(name).is_none() && !config.accounts.is_skipped(name) {
        return Err(no_customer(path, name));
    }
    let file = config.accounts.file(name);
    remove_file_durably(&file).map_err(cannot_change)?;
    drop(lock);
    let reload = reload::request(&config);
    print(&format!("{name} is not a customer any more: {} is removed, and {reload}.\n", file.display()))?;
    // After the reload no more mail is accepted.
    print(&match config.accounts.account(name) {
        Some(account) => held_report(&config, path, &account.domains),
        None => format!(
            "Its file had a mistake, so its domains are not known: `odmr check -c {}` names held mail that no customer has.\n",
            path.display()
        ),
    })
}

/// How many messages are held for each domain.
fn held<'a>(config: &ProviderConfig, domains: &'a [Domain]) -> Vec<(&'a Domain, io::Result<usize>)> {
    let spool = Spool::new(config, &Ids::system(tls::random));
    let count = |domain: &Domain| spool.queue().count(&spool.name(&SpoolQueue::Held(domain.clone())), usize::MAX);
    domains.iter().map(|domain| (domain, count(domain))).collect()
}

fn amount(messages: &io::Result<usize>) -> String {
    match messages {
        Ok(messages) => counted(*messages, "message", "messages"),
        Err(error) => format!("the amount is unknown ({error})"),
    }
}

/// The mail that is held for domains without a customer, and what to do with it.
fn held_report(config: &ProviderConfig, path: &Path, domains: &[Domain]) -> String {
    let (mut text, file) = (String::new(), shell_word(path));
    for (domain, messages) in held(config, domains) {
        let _ = match &messages {
            Ok(0) => writeln!(text, "No mail is held for {domain}."),
            _ => writeln!(
                text,
                "Held for {domain}: {}. That stays until a customer has {domain} again, or you decide on it:\n    odmr queue -c {file} \
                 list {domain}      shows it\n    odmr queue -c {file} bounce {domain}    returns it to its senders\n    odmr \
                 queue -c {file} export {domain} >{domain}.bsmtp    writes it to a file, to be sent elsewhere",
                amount(&messages)
            ),
        };
    }
    text + "From now on new mail is rejected: change the MX records.\n"
}
