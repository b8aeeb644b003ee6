//! `odmr setup provider HOSTNAME`.

use std::fmt::Write as _;
use std::io;
use std::net::{Ipv6Addr, TcpListener};
use std::path::{Path, PathBuf};

use getopts::{Matches, Options};

use super::installer::{DirectoryOf, Installer, Readers, checked_certificate};
use super::names::typed_domain;
use super::{check_missing, directory_of, sibling, sibling_name, start_command};
use crate::cli::dns::provider_records;
use crate::cli::exit::{ExitError, Sysexit};
use crate::cli::process::print;
use crate::config::{check_text, quote};
use crate::net::tls::CertificateInfo;

pub const SETUP_PROVIDER_SUMMARY: &str = include_str!("../pages/setup-provider.txt");

const DEFAULT_FILE: &str = "/etc/odmr/provider.toml";
const DEFAULT_SPOOL: &str = "/var/spool/odmr";
const COMMAND: &str = "odmr setup provider";
const HINT: &str = "odmr setup provider -h";

pub fn options(options: &mut Options) {
    options.optopt("c", "config", "the configuration to make; default: /etc/odmr/provider.toml", "FILE");
    let help = "the directory for the mail that waits; default: /var/spool/odmr, without root `spool` in the directory of FILE";
    options.optopt("", "spool", help, "DIR");
    options.optopt("", "user", "the owner of the mail; is made if there is no such user; default: odmr", "NAME");
    options.optopt("", "certificate", "a certificate for HOSTNAME that exists, in PEM, in place of a new one", "FILE");
    options.optopt("", "key", "its key", "FILE");
}

const USER_COMMENT: &str = "# If root starts `odmr serve`, it becomes this user when its ports are open.";

/// The settings of the command line.
struct ProviderSetup {
    hostname: String,
    config: PathBuf,
    spool: PathBuf,
    /// A certificate and a key that exist. Absolute.
    given: Option<[PathBuf; 2]>,
    is_root: bool,
}

/// Sets up a provider.
///
/// # Errors
///
/// The command line is wrong (64, 65); the configuration exists, or something cannot be made (73, 77, 71); a certificate
/// cannot be used (78).
pub fn run(matches: &Matches) -> Result<(), ExitError> {
    let setup = ProviderSetup::read(matches)?;
    let file = setup.config.display();
    check_missing(&setup.config, "")?;
    if let Some([certificate, key]) = &setup.given {
        setup.check_name(&checked_certificate(certificate, key)?, certificate)?;
    }
    let mut installer = Installer::begin(matches.opt_str("user"))?;
    installer.directory(directory_of(&setup.config), &[], 0o755, DirectoryOf::Root)?;
    installer.directory(&directory_of(&setup.config).join("customers.d"), &[], 0o750, DirectoryOf::Root)?;
    installer.directory(&setup.spool, &[], 0o700, DirectoryOf::Mail)?;
    let (certificate, key) = match &setup.given {
        Some([certificate, key]) => (certificate.clone(), key.clone()),
        None => (sibling(&setup.config, "pem"), sibling(&setup.config, "key")),
    };
    let info = match &setup.given {
        Some(_) => checked_certificate(&certificate, &key)?,
        None => installer.certificate(&certificate, &key, &setup.hostname)?,
    };
    setup.check_name(&info, &certificate)?;
    let text = setup.text(installer.user())?;
    check_text(&setup.config, &text)?;
    // Last: as long as it is missing, an interrupted run can be repeated.
    if !installer.file(&setup.config, &text, Readers::User)? {
        return Err(ExitError::new(Sysexit::CannotCreate, format!("{file} exists: another process has made it")));
    }
    print(&(installer.report() + &setup.next(&installer, &info, &key)))
}

impl ProviderSetup {
    fn read(matches: &Matches) -> Result<ProviderSetup, ExitError> {
        let [hostname] = matches.free.as_slice() else {
            let text = match matches.free.len() {
                0 => {
                    "HOSTNAME is missing, the name of this machine in the DNS: type one such as `odmr setup provider \
                      relay.example.net`"
                }
                _ => "too many arguments: a machine has one HOSTNAME",
            };
            return Err(ExitError::usage(text, HINT));
        };
        let hostname = typed_domain(hostname, COMMAND, "relay.example.net")?.as_str().to_owned();
        let is_root = rustix::process::geteuid().is_root();
        let config = PathBuf::from(matches.opt_str("config").unwrap_or_else(|| DEFAULT_FILE.to_owned()));
        let spool = match matches.opt_str("spool") {
            Some(spool) => spool.into(),
            None if is_root => DEFAULT_SPOOL.into(),
            None => directory_of(&config).join("spool"),
        };
        let given = match (matches.opt_str("certificate"), matches.opt_str("key")) {
            (None, None) => None,
            (Some(certificate), Some(key)) => Some([absolute(&certificate)?, absolute(&key)?]),
            _ => return Err(ExitError::usage("--certificate and --key belong together: type both", HINT)),
        };
        let spool = absolute(spool)?;
        Ok(ProviderSetup { hostname, config, spool, given, is_root })
    }

    fn check_name(&self, info: &CertificateInfo, certificate: &Path) -> Result<(), ExitError> {
        let (hostname, certificate) = (&self.hostname, certificate.display());
        if info.is_for(hostname) {
            return Ok(());
        }
        let text = format!(
            "{certificate} is for {} and not for {hostname}: get one for {hostname}, or, if an earlier set-up has made it, move \
             it and its key away",
            info.names.join(", ")
        );
        Err(ExitError::new(Sysexit::Config, text))
    }

    /// The ports of mail and of ODMR: without root a process cannot open those of the standards.
    fn ports(&self) -> [u16; 2] {
        if self.is_root { [25, 366] } else { [2525, 3660] }
    }

    /// The configuration.
    fn text(&self, user: Option<&str>) -> Result<String, ExitError> {
        let path = |path: &Path| {
            let text = path.to_str().map(quote);
            let error = || ExitError::new(Sysexit::DataError, format!("{} is not UTF-8: name another", path.display()));
            text.ok_or_else(error)
        };
        let names = [sibling_name(&self.config, "pem"), sibling_name(&self.config, "key")];
        let [certificate, key] = match &self.given {
            Some([certificate, key]) => [path(certificate)?, path(key)?],
            None => names.map(quote),
        };
        let user = user.map(|user| format!("\n{USER_COMMENT}\nuser = {}\n", quote(user))).unwrap_or_default();
        let ([inbound, odmr], spool, file) = (self.ports(), path(&self.spool)?, self.config.display());
        let hostname = quote(&self.hostname);
        Ok(format!(
            "\
# A provider of On-Demand Mail Relay (RFC 2645).
#
#     odmr check -c {file}            reports mistakes
#     odmr check -c {file} --print    shows all settings

hostname = {hostname}
{user}
# Mail that waits, in a Maildir for each domain.
spool = {spool}

# A file for each customer: `odmr customer -c {file} add NAME DOMAIN` makes it.
customers = \"customers.d\"

[tls]
certificate = {certificate}
key = {key}

# Mail from the Internet. [::] means all addresses, IPv4 too.
[inbound]
listen = [\"[::]:{inbound}\"]

# Calls of customers.
[odmr]
listen = [\"[::]:{odmr}\"]
"
        ))
    }

    /// The text about the next steps.
    fn next(&self, installer: &Installer, info: &CertificateInfo, key: &Path) -> String {
        let (mut text, file, hostname) = (String::new(), self.config.display(), &self.hostname);
        if let Some(owner) = &installer.owner
            && matches!(owner.may_read(key), Ok(false))
        {
            let (name, key) = (owner.name(), key.display());
            let _ = writeln!(
                text,
                "\n{name} may not read {key}: `odmr check -c {file}` prints a program that copies it after each renewal"
            );
        }
        if !self.is_root {
            text +=
                "Ports below 1024 need root or a supervisor, so `listen` has 2525 and 3660 in place of 25 and 366.\n";
        } else if is_in_use(25) {
            text += "\nPort 25 is in use: stop the mail server that has it, or give it another port or address.\n";
        }
        let records = provider_records(hostname, Some(info));
        if !records.is_empty() {
            text += "\nPut into the DNS:\n\n";
            text.extend(records.iter().map(|record| format!("    {record}\n")));
        }
        let start = start_command("odmr-serve", file.to_string() == DEFAULT_FILE, &format!("odmr serve -c {file}"));
        let _ = write!(
            text,
            "\nThen type:\n\n    odmr check -c {file} --dns\n    {start}\n    odmr customer -c {file} add acme example.org \
             >acme.toml\n\nThe last one, with the name and the domains of your first customer, writes the customer's whole file. \
             Send it\nto the customer, who types `odmr setup customer acme.toml`.\n"
        );
        text
    }
}

fn absolute(path: impl AsRef<Path>) -> Result<PathBuf, ExitError> {
    Ok(std::path::absolute(path)?)
}

/// Whether another process listens at this port.
fn is_in_use(port: u16) -> bool {
    TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse)
}
