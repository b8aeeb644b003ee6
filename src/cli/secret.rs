//! `odmr secret`: makes the verifier that a provider stores in place of a customer's secret, of a secret that is typed or made
//! here.
//!
//! A secret that was made here is printed once, for the customer. No secret is written to a file.

use std::collections::BTreeSet;
use std::io::{self, BufRead, IsTerminal, Write};
use std::path::Path;

use getopts::{Matches, Options};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use signal_hook::consts::{SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

use super::exit::{ExitError, Sysexit};
use super::process::{config_path, print};
use crate::config::{ChangedFile, ProviderConfig, with_verifier};
use crate::maildir::replace_file_durably;
use crate::net::tls;
use crate::plural::counted;
use crate::sasl::{ITERATIONS, SALT_OCTETS, ScramVerifier, is_usable};
use crate::threads;

pub(super) const SECRET_SUMMARY: &str = include_str!("pages/secret.txt");

const HINT: &str = "odmr secret -h";

/// The comment about the place of a new secret. `odmr setup customer` makes a separate file for it.
const FOR_CUSTOMER: &str = "# for the customer, in [provider] of its file; if that has `secret-file`, write nothing but the secret into that file";

/// The characters of a secret that is made here: those that are not mistaken for each other. 32 of them, five bits each.
const ALPHABET: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";

/// Characters of such a secret: 140 bits.
const SECRET_LENGTH: usize = 28;

/// A shorter secret can be guessed.
const SHORT_SECRET: usize = 12;

pub(super) fn options(options: &mut Options) {
    options.optopt("c", "config", "the provider's configuration (TOML)", "FILE");
}

/// Prints a verifier, or writes it.
///
/// # Errors
///
/// The command line is wrong (64); the secret cannot be used, or there is no such customer (65); the configuration is wrong
/// (78); the file cannot be written (73).
pub(super) fn run(matches: &Matches) -> Result<(), ExitError> {
    match (matches.free.as_slice(), matches.opt_present("config")) {
        ([], false) => {
            let (verifier, made) = make()?;
            let line = format!("scram = \"{verifier}\"\n");
            print(&match made {
                None => line,
                Some(secret) => format!(
                    "{FOR_CUSTOMER}:\nsecret = \"{secret}\"\n\
                     # for the provider, in its file for this customer, in place of `secret`:\n{line}"
                ),
            })
        }
        ([name], true) => write(&config_path(matches), name),
        ([], true) => Err(ExitError::usage("with -c FILE, the login name of a customer is missing", HINT)),
        ([name], false) => Err(ExitError::usage(format!("-c FILE, the provider's, is missing for {name:?}"), HINT)),
        _ => Err(ExitError::usage("too many arguments", HINT)),
    }
}

/// Writes a verifier into the file of this customer, in one step.
fn write(config: &Path, name: &str) -> Result<(), ExitError> {
    let ProviderConfig { accounts, tls, .. } = ProviderConfig::load(config)?;
    // A file with a mistake is permitted: it may be in `scram`, which this replaces.
    if accounts.account(name).is_none() && !accounts.skipped().iter().any(|skipped| skipped.name == name) {
        let file = accounts.file(name);
        let text = format!("there is no customer {name:?}: make {} first, with its `domains`", file.display());
        return Err(ExitError::new(Sysexit::DataError, text));
    }
    let file = accounts.file(name);
    let change = |verifier: &ScramVerifier| {
        let changed = with_verifier(&file, &verifier.to_string())?;
        changed.check_account(tls.is_some()).map(|()| changed)
    };
    // Report what is wrong with the file before the secret is typed.
    change(&ScramVerifier::fake(b"", name, &BTreeSet::new()))?;
    let (verifier, made) = make()?;
    let ChangedFile { text, secret_file, .. } = change(&verifier)?;
    // Before the file is changed: if the secret cannot be printed, the old one stays.
    let printed = if made.is_some() { ", and what was printed is of no use" } else { "" };
    if let Some(secret) = made {
        print(&format!("{FOR_CUSTOMER}; this machine does not store it:\nsecret = \"{secret}\"\n"))?;
    }
    // A symbolic link stays, and its target is replaced.
    replace_file_durably(&file.canonicalize()?, &text).map_err(|error| {
        let without = format!("the secret is not changed{printed}");
        ExitError::from(error).of_file(&file, &text, "the secret is changed", &without)
    })?;
    let mut report = format!("# {} is changed; SIGHUP makes a running `odmr serve` read it\n", file.display());
    if let Some(old) = secret_file {
        report += &format!("# {} is not read any more: remove it\n", old.display());
    }
    print(&report)
}

/// Returns a verifier, and its secret if that was made here.
fn make() -> Result<(ScramVerifier, Option<String>), ExitError> {
    let typed = read_secret()?;
    let made = typed.is_empty().then(new_secret);
    let secret = made.as_ref().unwrap_or(&typed);
    if !is_usable(secret.as_bytes()) {
        let text = "a secret is printable ASCII without a tab: type another, or none to have one made";
        return Err(ExitError::new(Sysexit::DataError, text));
    }
    if secret.len() < SHORT_SECRET {
        let length = counted(secret.len(), "octet", "octets");
        eprintln!("odmr: the secret has {length} and can be guessed: {SHORT_SECRET} or more are better");
    }
    Ok((new_verifier(secret), made))
}

/// Makes the verifier of a secret.
pub(super) fn new_verifier(secret: &str) -> ScramVerifier {
    let mut salt = [0; SALT_OCTETS];
    tls::random(&mut salt);
    ScramVerifier::new(secret.as_bytes(), &salt, ITERATIONS)
}

/// Makes a secret.
pub(super) fn new_secret() -> String {
    let mut octets = [0; SECRET_LENGTH];
    tls::random(&mut octets);
    let groups = octets
        .chunks(4)
        .map(|group| group.iter().map(|octet| char::from(ALPHABET[usize::from(octet % 32)])).collect::<String>());
    groups.collect::<Vec<_>>().join("-")
}

/// Returns the secret that is typed, twice, or the first line of the input.
fn read_secret() -> Result<String, ExitError> {
    if !io::stdin().is_terminal() {
        return Ok(read_line()?);
    }
    let hidden = HiddenInput::begin()?;
    let first = hidden.ask("Secret (empty: one is made): ")?;
    if !first.is_empty() && hidden.ask("The same again: ")? != first {
        return Err(ExitError::new(Sysexit::DataError, "the two are not the same: begin again"));
    }
    Ok(first)
}

fn read_line() -> io::Result<String> {
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line)?;
    Ok(line.trim_end_matches(['\n', '\r']).to_owned())
}

/// Hides what is typed on the terminal until it is dropped.
struct HiddenInput(Termios);

impl HiddenInput {
    fn begin() -> io::Result<HiddenInput> {
        let before = tcgetattr(rustix::stdio::stdin())?;
        // A signal that ends the process must not leave the terminal without echo.
        let (restored, mut signals) = (before.clone(), Signals::new([SIGINT, SIGQUIT, SIGTERM])?);
        threads::spawn("signals", move || {
            if let Some(signal) = signals.forever().next() {
                let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &restored);
                std::process::exit(128 + signal);
            }
        })?;
        let mut silent = before.clone();
        silent.local_modes.remove(LocalModes::ECHO);
        tcsetattr(rustix::stdio::stdin(), OptionalActions::Flush, &silent)?;
        Ok(HiddenInput(before))
    }

    fn ask(&self, question: &str) -> io::Result<String> {
        write!(io::stderr(), "{question}")?;
        let line = read_line();
        writeln!(io::stderr())?;
        line
    }
}

impl Drop for HiddenInput {
    fn drop(&mut self) {
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &self.0);
    }
}
