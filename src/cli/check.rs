//! `odmr check`: finds the errors of a configuration, and what it names, without binding; it connects only with `--call`.
//!
//! It reports all errors, each with the file, the line and what to do, and ends with exit code 1 if there are any. A warning
//! is about what works, and is probably not meant so. `--address` shows where mail for an address goes, and by which rule;
//! `--print` shows the configuration that is in force; `--call` logs in to each provider.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use getopts::{Matches, Options};
use rustix::fs::Access;
use rustix::process::{Resource, getrlimit};

use super::call_check;
use super::check_report::{CheckReport, check_error, describe, names_of, validity};
use super::exit::ExitError;
use super::process::{config_path, find_owner, print};
use super::syslog;
use crate::clock::Clock;
use crate::config::{
    Config, CustomerConfig, MailboxesConfig, ProviderAccount, ProviderConfig, SourceLine, TlsFiles, effective,
    line_of_key,
};
use crate::customer::sendmail::user_mailbox;
use crate::ids::Ids;
use crate::mail::address::{Domain, ForwardPath};
use crate::maildir::write_remedy;
use crate::net::tls::{self, CertificateInfo};
use crate::privileges::LoginUser;
use crate::provider::certificate::DAYS_TO_RENEW;
use crate::provider::spool::{Spool, SpoolQueue};
use crate::recipients::RecipientRules;
use crate::session::Remote;
use crate::smtp::reply::Severity;

/// The options of `odmr check`.
pub(super) fn options(options: &mut Options) {
    let help = "says where mail for ADDR goes, and by which rule; may be given several times";
    options.optmulti("", "address", help, "ADDR");
    options.optflag("", "print", "prints the configuration with all defaults, without secrets");
    options.optflag("", "call", "also logs in to each provider of a customer, and fetches nothing");
    options.optflag("", "inetd", "also says where the log of `odmr serve --inetd` goes");
}

/// Checks the file that `-c` names, of either side.
///
/// # Errors
///
/// What is wrong; an option that is not for this side; an address that gets no mail here.
pub(super) fn run(matches: &Matches) -> Result<(), ExitError> {
    let path = config_path(matches);
    let (addresses, call) = (matches.opt_strs("address"), matches.opt_present("call"));
    let (config, findings) = Config::examine(&path);
    let for_customers = [(!addresses.is_empty(), "--address", "it says into which mailbox mail for an address goes")];
    let for_customers = for_customers.into_iter().chain([(call, "--call", "it logs in to the provider")]);
    if let (Ok(Config::Provider(_)), Some((_, option, why))) = (&config, for_customers.clone().find(|(used, ..)| *used))
    {
        let text = format!("{} is a provider's file, and {option} is for a customer's file: {why}", path.display());
        return Err(ExitError::usage(text, "odmr check -h"));
    }
    if let (Ok(Config::Customer(_)), true) = (&config, matches.opt_present("inetd")) {
        let text = "a customer's file, and --inetd is for a provider's file: it says where the log of `serve` goes";
        return Err(ExitError::usage(format!("{} is {text}", path.display()), "odmr check -h"));
    }
    if let (Ok(Config::Customer(config)), false) = (&config, addresses.is_empty()) {
        return explain(&config.mailboxes.rules, &addresses);
    }
    let mut report = CheckReport::default();
    findings.errors.iter().chain(&findings.skipped).for_each(|error| report.error(error));
    findings.warnings.iter().for_each(|warning| report.warn(warning));
    let summary = match &config {
        Err(_) => String::new(),
        Ok(_) if matches.opt_present("print") => {
            report.drop_warnings();
            String::new()
        }
        Ok(Config::Provider(config)) => {
            if matches.opt_present("inetd") {
                check_inetd_log(&path, &mut report);
            }
            check_provider(config, &path, &mut report)
        }
        Ok(Config::Customer(config)) => {
            let summary = check_customer(config, &path, &mut report)?;
            if call {
                call_check::run(config, &path, &mut report)?;
            }
            summary
        }
    };
    match matches.opt_present("print") && config.is_ok() {
        true => report.finish(effective(&path)?.trim_end()),
        false => report.finish(&format!("{}: good: {summary}", path.display())),
    }
}

/// Returns the numbers of customers and domains, for the summary.
fn check_provider(config: &ProviderConfig, path: &Path, report: &mut CheckReport) -> String {
    if let Some(files) = &config.tls {
        check_certificate(files, &config.hostname, report);
    }
    if let Some(smarthost) = &config.relay.smarthost
        && let Err(text) = Remote::new(smarthost)
    {
        report.error(line_of_key(path, &["relay", "ca"]).error(text));
    }
    let line = line_of_key(path, &["spool"]);
    check_directory(&line, &config.spool, report);
    check_spool(&line, &config.spool, report);
    check_unowned(&line, config, report);
    let limits = &config.limits;
    let listeners = [&config.inbound.listen, &config.odmr.listen, &config.odmr.listen_tls];
    let listeners = listeners.iter().filter(|addresses| !addresses.is_empty()).count();
    // A turned session has its connection and the message that it sends; the relay a connection and a message.
    let needed = limits.connections * 2 * listeners + limits.turned_sessions * 2 + config.relay.connections * 2;
    check_descriptors(&line_of_key(path, &["limits"]), needed, report);
    let domains: usize = config.accounts.iter().map(|account| account.domains.len()).sum();
    format!("a provider with {} customers, {domains} domains", config.accounts.iter().count())
}

/// Says where the log of `odmr serve --inetd` goes, which inetd gives no descriptor for it.
fn check_inetd_log(path: &Path, report: &mut CheckReport) {
    match syslog::connect(None) {
        Ok(_) => report.note("the log of `odmr serve --inetd` goes to the system log, facility mail".to_owned()),
        Err(error) => report.warn(format!(
            "{}: no syslogd answers ({error}): where descriptor 2 is the connection or /dev/null, the log of `odmr serve \
             --inetd` goes nowhere; start a syslogd, name its socket with --syslog=PATH, or let inetd run `sh -c 'exec \
             odmr serve -c {} --inetd odmr --log-time 2>>/var/log/odmr.log'`",
            path.display(),
            path.display()
        )),
    }
}

/// Checks the provider's own certificate and its key, and notes the pins for customers.
fn check_certificate(files: &TlsFiles, hostname: &str, report: &mut CheckReport) {
    if let Err(error) = files.load() {
        report.error(error);
    }
    let Ok(certificate) = CertificateInfo::load(&files.certificate) else { return };
    let (name, names) = (files.certificate.display(), names_of(&certificate));
    if !certificate.is_for(hostname) {
        report.error(files.certificate_error(format!(
            "{name} is for {names} and not for {hostname}, so customers that check names reject it: get one for \
             {hostname}, or correct `hostname`"
        )));
    }
    if let Some((until, days)) = validity(&certificate, Clock::System.now()) {
        let renew = "renew it, so that customers can call";
        match days {
            ..0 => report.error(files.certificate_error(format!("{name} has expired on {}: {renew}", until.rfc3339()))),
            0..DAYS_TO_RENEW => {
                report.warn(files.certificate_error(format!("{name} expires on {}: {renew}", until.rfc3339())));
            }
            _ => {}
        }
    }
    report.note(format!("{name}: {}", describe(&certificate)));
}

/// Checks that all directories of queues can be written to, and are on one file system, as messages are moved in them.
fn check_spool(line: &SourceLine, spool: &Path, report: &mut CheckReport) {
    let Ok(root) = fs::metadata(spool) else { return };
    for directory in subdirectories(spool, 3) {
        let Ok(found) = fs::metadata(&directory) else { continue };
        let shown = directory.display();
        if found.dev() != root.dev() {
            report.error(line.error(format!(
                "{shown} is on another file system than {}: move its mail here, or unmount it",
                spool.display()
            )));
        }
        check_access(line, &directory, report);
    }
}

/// Reports held mail that no customer can fetch.
fn check_unowned(line: &SourceLine, config: &ProviderConfig, report: &mut CheckReport) {
    let spool = Spool::new(config, &Ids::system(tls::random));
    // A directory that cannot be read is reported as such.
    for (name, queue) in spool.all_queues().unwrap_or_default() {
        let SpoolQueue::Held(domain) = &queue else { continue };
        if spool.is_unowned(domain)
            && let Ok(messages @ 1..) = spool.queue().count(&spool.name(&queue), usize::MAX)
        {
            report.error(line.error(format!(
                "{messages} messages are held for {name}, which no customer has: write it in the `domains` of one, or \
                 see `odmr queue list {name}`, and return them with `odmr queue bounce ID`"
            )));
        }
    }
}

/// The directories below one, down to a depth.
fn subdirectories(directory: &Path, depth: usize) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().filter_map(Result::ok);
    let is_directory = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    let mut found: Vec<_> = entries.filter(is_directory).map(|entry| entry.path()).collect();
    found.sort();
    let below = |path: &PathBuf| if depth > 1 { subdirectories(path, depth - 1) } else { Vec::new() };
    let deeper: Vec<_> = found.iter().flat_map(below).collect();
    found.extend(deeper);
    found
}

/// Warns if the system permits fewer descriptors than the limits of connections need.
fn check_descriptors(line: &SourceLine, needed: usize, report: &mut CheckReport) {
    if let Some(limit) = getrlimit(Resource::Nofile).maximum
        && limit < needed as u64
    {
        report.warn(line.error(format!(
            "up to {needed} descriptors are needed, and the system permits {limit}: raise that (`ulimit -Hn`, \
             LimitNOFILE= of systemd), or write lower `connections` and `turned-sessions` in [limits]"
        )));
    }
}

/// Returns the customer's providers and its accounts there, for the summary.
fn check_customer(config: &CustomerConfig, path: &Path, report: &mut CheckReport) -> Result<String, ExitError> {
    let mut user = rustix::process::geteuid().as_raw();
    match config.owner.as_ref().map(find_owner).transpose() {
        Ok(Some(owner)) => {
            let name = config.owner.as_ref().map(|owner| owner.user.clone()).unwrap_or_default();
            if !owner.may_read(path)? {
                report.warn(format!("{}: {name} may not read it, so SIGHUP cannot: chgrp it", path.display()));
            }
            user = if user == 0 { owner.uid() } else { user };
        }
        Ok(None) => {}
        Err(error) => report.error(error),
    }
    let root = &config.mailboxes.root;
    let line = line_of_key(path, &["mailboxes", "root"]);
    check_owner(&line, root, user, report);
    for provider in &config.providers {
        if let Err(text) = Remote::new(&provider.remote) {
            report.error(provider.error(&text));
        }
    }
    check_directory(&line, root, report);
    config.mailboxes.rules.warnings().iter().for_each(|warning| report.warn(warning));
    if let Some(outgoing) = &config.outgoing {
        if let Some(Err(text)) = outgoing.submission.as_ref().map(Remote::new) {
            report.error(line_of_key(path, &["outgoing", "ca"]).error(text));
        }
        check_directory(&line_of_key(path, &["outgoing", "queue"]), &outgoing.queue, report);
        warn_of_senders(&config.mailboxes, &outgoing.domain, report);
        let needed = if outgoing.listen.is_empty() { 0 } else { config.limits.connections * 2 };
        check_descriptors(&line_of_key(path, &["limits"]), needed, report);
    }
    let account =
        |provider: &ProviderAccount| format!("of {}, as {}", provider.remote.address, provider.remote.login_name());
    let accounts: Vec<_> = config.providers.iter().map(account).collect();
    Ok(format!("a customer {}", accounts.join("; ")))
}

/// Reports mailboxes that belong to another user than the one that `pull` runs as: `user`. Root may write into them, but
/// their user could not read what root has written.
fn check_owner(line: &SourceLine, root: &Path, user: u32, report: &mut CheckReport) {
    let of_another = |found: &Metadata| found.uid() != user;
    if fs::metadata(root).is_ok_and(|found| of_another(&found)) && user == 0 {
        let text = format!("{} belongs to another user: name that user in `user`, or be that user", root.display());
        return report.error(line.error(text));
    }
    let mailboxes = subdirectories(root, 2);
    let others = mailboxes.iter().filter(|path| fs::metadata(path).is_ok_and(|found| of_another(&found)));
    let others: Vec<_> = others.collect();
    if let [first, ..] = others[..] {
        let text = format!(
            "{} of {} directories belong to another user than the one that `odmr pull` runs as, the first is {}: that \
             user may not be able to read new mail there; chown them, or change `user`",
            others.len(),
            mailboxes.len(),
            first.display()
        );
        report.warn(line.error(text));
    }
}

/// Warns of each user whose mail has nobody to come back to: root, for whom cron sends, and the user of this process.
/// `domain`: that of their addresses.
fn warn_of_senders(mailboxes: &MailboxesConfig, domain: &Domain, report: &mut CheckReport) {
    let user = LoginUser::current().name;
    for name in ["root", &user].iter().take(if user == "root" { 1 } else { 2 }) {
        // Mail for a domain elsewhere is the matter of its host.
        let Some(sender) = user_mailbox(name, domain).filter(|_| mailboxes.rules.serves(domain)) else { continue };
        let resolved = mailboxes.rules.resolve(&ForwardPath::Mailbox(sender.clone()));
        // An alias that is not served has a warning of its own.
        if resolved.is_err_and(|reply| reply.severity() == Severity::Permanent) {
            let home = mailboxes.rules.home();
            let text = format!(
                "mail of {name} has nobody to come back to: its sender {sender} has no mailbox, so a DSN about it goes to \
                 postmaster@{domain}; write an alias, such as aliases = {{ \"{name}\" = \"alice@{home}\" }}"
            );
            report.warn(mailboxes.missing_alias(text));
        }
    }
}

/// Prints where mail for each address goes, and by which rule.
///
/// # Errors
///
/// An address gets no mail here.
fn explain(rules: &RecipientRules, addresses: &[String]) -> Result<(), ExitError> {
    let mut rejected = 0;
    for address in addresses {
        let (Ok(text) | Err(text)) = rules.explain_typed(address).inspect_err(|_| rejected += 1);
        print(&format!("{text}\n"))?;
    }
    match rejected {
        0 => Ok(()),
        _ => Err(check_error(format!("{rejected} of {} get no mail here", addresses.len()))),
    }
}

/// Checks that a directory can be written to, or, if it does not exist, can be created.
fn check_directory(line: &SourceLine, path: &Path, report: &mut CheckReport) {
    let existing = path.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"));
    match existing.is_dir() {
        true => check_access(line, existing, report),
        false => report.error(line.error(format!("{} is not a directory: move it away", existing.display()))),
    }
}

fn check_access(line: &SourceLine, directory: &Path, report: &mut CheckReport) {
    if let Err(error) = rustix::fs::access(directory, Access::WRITE_OK | Access::EXEC_OK) {
        let error = io::Error::from(error);
        let remedy = write_remedy(&error, directory);
        report.error(line.error(format!("{} cannot be written to: {error}{remedy}", directory.display())));
    }
}
