//! `odmr check`: finds the errors in a configuration and in the files that it names. It binds no ports, connects only
//! with `--call`, and asks name servers only with `--dns`.
//!
//! It reports all errors, each with the file, the line and what to do, and ends with exit code 1 if there are any. A
//! warning is about a setting that works, but is probably a mistake. `--address` prints where mail for an address goes,
//! and by which rule; `--print` prints the configuration that is in force; `--call` logs in to each provider; `--dns`
//! prints the records of DNS as they are and as they should be.

use std::cell::Cell;
use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use getopts::{Matches, Options};
use rustix::fs::Access;
use rustix::process::{Resource, getrlimit};

use super::call_check;
use super::check_report::{CheckReport, check_error, describe, describe_own, names_of, validity};
use super::dns;
use super::exit::ExitError;
use super::owner::{check_owned, reload_errors, subdirectories};
use super::process::{config_path, print};
use super::syslog;
use crate::clock::Clock;
use crate::config::{
    Account, Config, CustomerConfig, MailOwner, MailboxesConfig, OutgoingConfig, ProviderAccount, ProviderConfig,
    SourceLine, TlsFiles, effective, line_of_key,
};
use crate::customer::mailboxes::{find_mailbox, mailbox_exists};
use crate::customer::sendmail::user_mailbox;
use crate::ids::Ids;
use crate::mail::address::{Domain, ForwardPath, Mailbox};
use crate::maildir::{Entry, free_octets, shell_word, write_remedy};
use crate::net::tls::{self, CertificateInfo};
use crate::plural::counted;
use crate::privileges::{LoginUser, SystemUser};
use crate::provider::certificate::DAYS_TO_RENEW;
use crate::provider::spool::{SPOOL_DEPTH, Spool, SpoolQueue};
use crate::provider::turned_session;
use crate::recipients::{self, Destination, RecipientRules, directory_name};
use crate::report::clock_watch::ClockWatch;
use crate::session::{ClientIdentity, Limits};
use crate::smtp::reply::Severity;

/// The program that others call to send mail (LSB).
const SENDMAIL: &str = "/usr/sbin/sendmail";

/// The options of `odmr check`.
pub(super) fn options(options: &mut Options) {
    let help = "prints where mail for ADDR goes, and by which rule; may be given several times";
    options.optmulti("", "address", help, "ADDR");
    options.optflag("", "print", "prints the configuration with all defaults, without secrets");
    options.optflag("", "call", "also logs in to each provider of a customer, and fetches nothing");
    options.optflag("", "dns", "also prints the DNS records about mail, as they are and as they should be");
    options.optflag("", "inetd", "also prints where the log of `odmr serve --inetd` goes");
}

/// Checks the file that `-c` names, of either side.
///
/// # Errors
///
/// The configuration has errors; an option is not for this side; an address gets no mail here.
pub(super) fn run(matches: &Matches) -> Result<(), ExitError> {
    let path = config_path(matches);
    let (addresses, call) = (matches.opt_strs("address"), matches.opt_present("call"));
    let dns = matches.opt_present("dns");
    if dns && (matches.opt_present("print") || !addresses.is_empty()) {
        return Err(ExitError::usage("--dns excludes --print and --address", "odmr check -h"));
    }
    let (config, findings) = Config::examine(&path);
    let for_customers = [(!addresses.is_empty(), "--address", "it prints into which mailbox mail for an address goes")];
    let for_customers = for_customers.into_iter().chain([(call, "--call", "it logs in to the provider")]);
    if let (Some(Config::Provider(_)), Some((_, option, why))) =
        (&config, for_customers.clone().find(|(used, ..)| *used))
    {
        let text = format!("{} is a provider's file, and {option} is for a customer's file: {why}", path.display());
        return Err(ExitError::usage(text, "odmr check -h"));
    }
    if let (Some(Config::Customer(_)), true) = (&config, matches.opt_present("inetd")) {
        let text = "a customer's file, and --inetd is for a provider's file: it prints where the log of `serve` goes";
        return Err(ExitError::usage(format!("{} is {text}", path.display()), "odmr check -h"));
    }
    let is_sound = findings.errors.is_empty();
    if let (Some(Config::Customer(config)), true, false) = (&config, is_sound, addresses.is_empty()) {
        return explain(&config.mailboxes.rules, &addresses);
    }
    let mut report = CheckReport::default();
    findings.errors.iter().chain(&findings.skipped).for_each(|error| report.error(error));
    findings.warnings.iter().for_each(|warning| report.warn(warning));
    let summary = match &config {
        None => String::new(),
        Some(_) if matches.opt_present("print") => {
            report.drop_warnings();
            String::new()
        }
        Some(config) => {
            if matches.opt_present("inetd") && matches!(config, Config::Provider(_)) {
                check_inetd_log(&path, &mut report);
            }
            let places = Places::of(config, &path);
            let chain = if dns { dns::certificates(config) } else { Vec::new() };
            let summary = check_named(config, &path, &places, &mut report)?;
            if call
                && is_sound
                && let Config::Customer(config) = config
            {
                call_check::run(config, &path, &mut report)?;
            }
            if dns {
                dns::run(config, &path, &chain, &mut report)?;
            }
            summary
        }
    };
    match matches.opt_present("print") && is_sound {
        true => report.finish(effective(&path)?.trim_end()),
        false => report.finish(&format!("{}: good: {summary}", path.display())),
    }
}

/// The lines of the keys of a file. They are found before this process becomes a user that may not read the file.
struct Places<'a> {
    file: &'a Path,
    root: SourceLine,
    queue: SourceLine,
    limits: SourceLine,
    /// All users may read the file.
    is_public: bool,
    /// `root`, and the queue.
    directories: Vec<&'a Path>,
}

impl<'a> Places<'a> {
    fn of(config: &'a Config, path: &'a Path) -> Places<'a> {
        let line = |keys: &[&str]| line_of_key(path, keys);
        let (root, directories) = match config {
            Config::Provider(config) => (line(&["spool"]), vec![&*config.spool]),
            Config::Customer(config) => {
                let outgoing = config.outgoing.iter().map(|outgoing| &*outgoing.queue);
                (line(&["mailboxes", "root"]), std::iter::once(&*config.mailboxes.root).chain(outgoing).collect())
            }
        };
        let (queue, limits) = (line(&["outgoing", "queue"]), line(&["limits"]));
        let is_public = fs::metadata(path).is_ok_and(|found| found.mode() & 0o004 != 0);
        Places { file: path, root, queue, limits, is_public, directories }
    }

    /// Warns of directories on whose disk less than `min-free` is free.
    fn check_room(&self, min_free: u64, report: &mut CheckReport) {
        for directory in &self.directories {
            let existing = directory.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("."));
            if let Some(free) = free_octets(existing).filter(|free| *free < min_free) {
                report.warn(line_of_key(self.file, &["limits", "min-free"]).error(format!(
                    "the disk of {} has {free} octets free, and `min-free` is {min_free}: all mail gets 452; make room, or write \
                     a smaller `min-free` in [limits]",
                    directory.display()
                )));
            }
        }
    }

    /// Checks that each directory can be written to or made; `existing`: only those that exist, or only the others.
    fn check(&self, existing: bool, report: &mut CheckReport) {
        let with_lines = self.directories.iter().zip([&self.root, &self.queue]);
        for (directory, line) in with_lines.filter(|(directory, _)| directory.exists() == existing) {
            check_directory(line, directory, report);
        }
    }
}

/// Checks the files and directories that a configuration names, with the rights of the owner of the mail if the program
/// would have these. Returns the summary.
fn check_named(
    config: &Config, path: &Path, places: &Places<'_>, report: &mut CheckReport,
) -> Result<String, ExitError> {
    let (login, known) = (LoginUser::current().name, reload_errors(path));
    if let Config::Provider(config) = config
        && let Some(files) = &config.tls
    {
        check_certificate(files, &config.hostname, report);
        // With `user`, the rights of that user are checked below.
        if config.owner.is_none() {
            check_key_owner(files, &config.spool, report);
        }
    }
    known.iter().for_each(|error| report.error(error));
    // Directories that do not exist are made before the process becomes the owner.
    places.check(false, report);
    let owner = take_rights(config, path, &known, report)?;
    if !(owner.is_some() && matches!(config, Config::Provider(_))) {
        places.check(true, report);
    }
    match config {
        Config::Provider(config) => Ok(check_provider(config, places, owner.as_ref(), report)),
        Config::Customer(config) => Ok(check_customer(config, places, &login, report)),
    }
}

/// As root, becomes the owner of the mail, and reports the files that a reload could not read as that user. Returns the
/// owner that this process has become; `None`: it is the same user as before.
fn take_rights(
    config: &Config, path: &Path, known: &[String], report: &mut CheckReport,
) -> Result<Option<SystemUser>, ExitError> {
    let is_root = rustix::process::geteuid().is_root();
    let owner = match config.owner().map(MailOwner::find).transpose() {
        Ok(Some(owner)) => owner,
        Ok(None) => {
            if is_root && let Config::Provider(config) = config {
                let text = format!(
                    "`user` is missing, so `odmr serve` stays root if root starts it: make a user, write user = \"odmr\" \
                     above, and type `chown -R odmr {}`",
                    shell_word(&config.spool)
                );
                report.warn(line_of_key(path, &["spool"]).error(text));
            }
            return Ok(None);
        }
        Err(error) => {
            report.error(error);
            return Ok(None);
        }
    };
    let name = owner.name();
    if !is_root {
        if !owner.may_read(path)? {
            report
                .warn(format!("{}: {name} may not read it, so a reload (SIGHUP) would fail: chgrp it", path.display()));
        }
        return Ok(None);
    }
    let line = line_of_key(path, &["user"]);
    if let Err(text) = owner.assume() {
        report.error(line.error(text));
        return Ok(None);
    }
    for error in reload_errors(path).iter().filter(|error| !known.contains(error)) {
        report.warn(format!("{error}; root may read it, and {name} may not, so a reload (SIGHUP) would fail: chgrp it to a group of {name}"));
    }
    if let Config::Provider(config) = config
        && let Some(files) = &config.tls
        && [&files.certificate, &files.key].iter().any(|file| denied(file))
    {
        report.note(deploy_hook(files, name, path));
    }
    Ok(Some(owner))
}

/// Whether this user may not read a file.
fn denied(file: &Path) -> bool {
    fs::File::open(file).is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
}

/// A program that copies the certificate and the key for a user, whenever they are renewed. `config`: the provider's file.
fn deploy_hook(files: &TlsFiles, user: &str, config: &Path) -> String {
    let directory = config.parent().unwrap_or(Path::new("")).join("tls");
    let directory = std::path::absolute(&directory).unwrap_or(directory);
    let directory = directory.display();
    let (certificate, key) = (files.certificate.display(), files.key.display());
    format!(
        "deploy hook, as only root may read the key: save it as a program (certbot: \
         /etc/letsencrypt/renewal-hooks/deploy/odmr), run it once, and name its copies in [tls]\n    #!/bin/sh -e\n    \
         install -d -m 0755 '{directory}'\n    \
         install -o {user} -m 0600 '{certificate}' '{directory}/certificate.pem'\n    \
         install -o {user} -m 0600 '{key}' '{directory}/key.pem'\n    \
         pkill -HUP -u {user} -f 'odmr serve' || :    # or: systemctl reload odmr-serve"
    )
}

/// Returns the numbers of customers and domains, for the summary. `owner`: the user that this process has become.
fn check_provider(
    config: &ProviderConfig, places: &Places<'_>, owner: Option<&SystemUser>, report: &mut CheckReport,
) -> String {
    if let Some(owner) = owner
        && config.spool.exists()
        && let Err(text) = check_owned(owner, &config.spool, SPOOL_DEPTH + 1)
    {
        report.error(places.root.error(text));
    }
    places.check_room(config.limits.min_free, report);
    check_spool(&places.root, &config.spool, owner.is_none(), report);
    check_unowned(places, config, report);
    check_expired(config, report);
    config.accounts.iter().for_each(|account| check_recipients(&config.accounts.file(&account.name), account, report));
    let limits = &config.limits;
    let listeners = config.listen().iter().filter(|addresses| !addresses.is_empty()).count();
    let domains: usize = config.accounts.iter().map(|account| account.domains.len()).sum();
    // Turned sessions have the locks of accounts and of domains; the relay has a connection and a message.
    let turned = limits.turned_sessions.min(config.accounts.iter().count()) * turned_session::DESCRIPTORS + domains;
    let needed = descriptors_of_listener(limits) * listeners + turned + config.relay.connections * 2;
    check_descriptors(&places.limits, needed, report);
    let customers = counted(config.accounts.iter().count(), "customer", "customers");
    format!("a provider with {customers}, {}", counted(domains, "domain", "domains"))
}

/// Notes how many recipients a customer has named, and warns of domains in which there is none.
fn check_recipients(file: &Path, account: &Account, report: &mut CheckReport) {
    let list = match account.held.recipients.read() {
        Ok(Some(list)) => list,
        Ok(None) => return,
        Err(error) => return report.error(error),
    };
    let file = file.display();
    let entries = counted(list.count(), "entry names", "entries name");
    report.note(format!("{file}: {entries} the recipients, all others are rejected"));
    for domain in account.domains.iter().filter(|domain| !list.names(domain)) {
        report.warn(format!(
            "{file}: no recipient in {domain} is listed, so all but postmaster@{domain} are rejected: add some, or \"@{domain}\""
        ));
    }
}

/// Reports where the log of `odmr serve --inetd` goes: inetd gives that process no descriptor for a log.
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
    let Ok(certificate) = CertificateInfo::load(&files.certificate) else { return };
    let (name, names) = (files.certificate.display(), names_of(&certificate));
    if !certificate.is_for(hostname) {
        report.error(files.certificate_line.error(format!(
            "{name} is for {names} and not for {hostname}, so customers that check names reject it: get one for \
             {hostname}, or correct `hostname`"
        )));
    }
    if let Some((until, days)) = validity(&certificate, Clock::System.now()) {
        let renew = "renew it, so that customers can call";
        match days {
            ..0 => report
                .error(files.certificate_line.error(format!("{name} has expired on {}: {renew}", until.rfc3339()))),
            0..DAYS_TO_RENEW => {
                report.warn(files.certificate_line.error(format!("{name} expires on {}: {renew}", until.rfc3339())));
            }
            _ => {}
        }
    }
    report.note(format!("{name}: {}", describe(&certificate)));
}

/// Warns if the spool belongs to another user than root, and that user may not read the key.
fn check_key_owner(files: &TlsFiles, spool: &Path, report: &mut CheckReport) {
    if rustix::process::geteuid().is_root()
        && let Ok(Some(owner)) = SystemUser::owner_of(spool)
        && matches!(owner.may_read(&files.key), Ok(false))
    {
        report.warn(files.key_line.error(format!(
            "{} may not be read by the user to whom the spool belongs: if `odmr serve` runs as that user, chown it, or chgrp \
             it and chmod 640",
            files.key.display()
        )));
    }
}

/// Checks that all directories of queues are on one file system, because messages are moved between them; `access`: also
/// that they can be written to.
fn check_spool(line: &SourceLine, spool: &Path, access: bool, report: &mut CheckReport) {
    let Ok(root) = fs::metadata(spool) else { return };
    for directory in subdirectories(spool, SPOOL_DEPTH + 1) {
        let Ok(found) = fs::metadata(&directory) else { continue };
        let shown = directory.display();
        if found.dev() != root.dev() {
            report.error(line.error(format!(
                "{shown} is on another file system than {}: move its mail here, or unmount it",
                spool.display()
            )));
        }
        if access {
            check_access(line, &directory, report);
        }
    }
}

/// Reports held mail that no customer can fetch.
fn check_unowned(places: &Places<'_>, config: &ProviderConfig, report: &mut CheckReport) {
    let spool = Spool::new(config, &Ids::system(tls::random));
    // A directory that cannot be read is reported as such.
    for (name, queue) in spool.all_queues().unwrap_or_default() {
        let SpoolQueue::Held(domain) = &queue else { continue };
        if spool.is_unowned(domain)
            && let Ok(messages @ 1..) = spool.queue().count(&spool.name(&queue), usize::MAX)
        {
            let queue = format!("odmr queue -c {}", shell_word(places.file));
            report.error(places.root.error(format!(
                "{} held for {name}, which no customer has: write it in the `domains` of one, or see `{queue} list {name}`, \
                 and return all to the senders with `{queue} bounce {name}`",
                counted(messages, "message is", "messages are")
            )));
        }
    }
}

/// Warns of held mail that `odmr serve` would return to its senders at once: after an upgrade, or with a shorter time.
fn check_expired(config: &ProviderConfig, report: &mut CheckReport) {
    let ids = Ids::system(tls::random);
    let (spool, history) = (Spool::new(config, &ids), ClockWatch::new(&config.spool, ids.clock()).history());
    for account in config.accounts.iter() {
        let Some(after) = account.held.expire_after else { continue };
        let messages = Cell::new(0);
        let count = |_: &Entry, arrived| {
            messages.set(messages.get() + usize::from(history.age(arrived) >= after));
            None
        };
        for domain in &account.domains {
            // A directory that cannot be read is reported as such.
            let _ = spool.queue().aged(&spool.name(&SpoolQueue::Held(domain.clone())), (0, None), &count);
        }
        if let messages @ 1.. = messages.get() {
            let (file, name) = (config.accounts.file(&account.name), &account.name);
            report.warn(format!(
                "{}: of the mail that is held for {name}, {} older than its `expire-after`: `odmr serve` and `odmr expire` \
                 return it to its senders; write a longer time, or \"never\", to keep it",
                file.display(),
                counted(messages, "message is", "messages are")
            ));
        }
    }
}

/// The most descriptors that the connections of a listener have: each has one for itself, one for the content that arrives,
/// and one for a copy of it. A quarter as many connections have made room for others and have not ended yet.
fn descriptors_of_listener(limits: &Limits) -> usize {
    limits.connections * 3 + limits.connections / 4
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

/// Returns the customer's providers and its accounts there, for the summary. `login`: the user of this process.
fn check_customer(config: &CustomerConfig, places: &Places<'_>, login: &str, report: &mut CheckReport) -> String {
    check_owner(&places.root, &config.mailboxes.root, rustix::process::geteuid().as_raw(), report);
    for provider in &config.providers {
        if let Some(identity) = &provider.remote.identity {
            check_own_certificate(provider, identity, report);
        }
    }
    places.check_room(config.limits.min_free, report);
    note_left_mailboxes(&places.root, &config.mailboxes, report);
    config.mailboxes.rules.warnings().iter().for_each(|warning| report.warn(warning));
    config.mailboxes.rules.catch_all_note().into_iter().for_each(|note| report.note(note));
    if let Some(outgoing) = &config.outgoing {
        warn_of_senders(&config.mailboxes, &outgoing.domain, login, report);
        note_other_senders(config, outgoing, places, report);
        let needed = if outgoing.listen.is_empty() { 0 } else { descriptors_of_listener(&config.limits) };
        check_descriptors(&places.limits, needed, report);
    }
    let account =
        |provider: &ProviderAccount| format!("of {}, as {}", provider.remote.address, provider.remote.login_name());
    let accounts: Vec<_> = config.providers.iter().map(account).collect();
    format!("a customer {}", accounts.join("; "))
}

/// Checks a customer's own certificate, and notes the pins for the provider. Its names do not matter.
fn check_own_certificate(provider: &ProviderAccount, identity: &ClientIdentity, report: &mut CheckReport) {
    let Ok(certificate) = CertificateInfo::load(&identity.certificate) else { return };
    let name = identity.certificate.display();
    if let Some((until, days @ ..DAYS_TO_RENEW)) = validity(&certificate, Clock::System.now()) {
        let word = if days < 0 { "has expired" } else { "expires" };
        report.warn(provider.certificate_line.error(format!(
            "{name} {word} on {}: an `odmr serve` goes by the pin and accepts it, other providers may not; renew it with the \
             same key",
            until.rfc3339()
        )));
    }
    report.note(format!("{name}: {}", describe_own(&certificate)));
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
            "{} of {} another user than the one that `odmr pull` runs as, the first is {}: that user may not be able to \
             read new mail there; chown them, or change `user`",
            others.len(),
            counted(mailboxes.len(), "directory belongs to", "directories belong to"),
            first.display()
        );
        report.warn(line.error(text));
    }
}

/// Notes mailboxes with new mail to which no rule leads: the user was removed from `accept`, or has another mailbox.
fn note_left_mailboxes(line: &SourceLine, mailboxes: &MailboxesConfig, report: &mut CheckReport) {
    let (root, rules) = (&mailboxes.root, &mailboxes.rules);
    let is_in_another_root = |path: &Path| rules.maildir_roots().any(|other| other != root && path.starts_with(other));
    let has_new = |path: &PathBuf| fs::read_dir(path.join("new")).is_ok_and(|mut files| files.next().is_some());
    let (mut left, directories) = (Vec::new(), subdirectories(root, 2));
    for path in directories.iter().take(5000).filter(|path| has_new(path)) {
        let Some(mailbox) = mailbox_of_directory(root, path) else { continue };
        let destination = rules.destination_of(&mailbox, &mailbox_exists);
        let is_reached = matches!(destination, Some(Destination::Maildir { path: to, .. }) if to == *path);
        if !is_reached && !rules.is_fallback(&mailbox) && !is_in_another_root(path) {
            left.push(mailbox.to_string());
        }
    }
    if !left.is_empty() {
        report.note(line.error(format!(
            "new mail is in {} that no rule leads to, such as {}: write the address in `accept` again, or move the mail away",
            counted(left.len(), "mailbox", "mailboxes"),
            left[..left.len().min(3)].join(", ")
        )));
    }
}

/// The mailbox of `ROOT/<domain>/<local part>`; `None`: this is another directory, or its name is encoded.
fn mailbox_of_directory(root: &Path, path: &Path) -> Option<Mailbox> {
    let mut names = path.strip_prefix(root).ok()?.iter().map(OsStr::to_str);
    let (domain, local) = (Domain::parse(names.next()??)?, names.next()??);
    recipients::address(local, &domain).filter(|_| directory_name(local) == local)
}

/// Warns if DSNs for a user have no mailbox: for root, as which cron sends mail, and for `user`, the user of this
/// process. `domain`: that of their addresses.
fn warn_of_senders(mailboxes: &MailboxesConfig, domain: &Domain, user: &str, report: &mut CheckReport) {
    for name in ["root", user].iter().take(if user == "root" { 1 } else { 2 }) {
        // This program does not know the mailboxes of other domains.
        let Some(sender) = user_mailbox(name, domain).filter(|_| mailboxes.rules.serves(domain)) else { continue };
        let resolved = mailboxes.rules.resolve(&ForwardPath::Mailbox(sender.clone()), &mailbox_exists);
        // An alias with a target that is not served has its own warning.
        if resolved.is_err_and(|reply| reply.severity() == Severity::Permanent) {
            let home = mailboxes.rules.home();
            let text = format!(
                "{sender} has no mailbox, so DSNs about mail that {name} sends go to postmaster@{domain}; write an alias, such as aliases = {{ \"{name}\" = \"alice@{home}\" }}"
            );
            report.warn(mailboxes.aliases_line.error(text));
        }
    }
}

/// Notes that other users cannot send mail, and how they could; a warning if `sendmail` is this program.
fn note_other_senders(
    config: &CustomerConfig, outgoing: &OutgoingConfig, places: &Places<'_>, report: &mut CheckReport,
) {
    let mut remedies = Vec::new();
    if !places.is_public {
        remedies.push("move the secrets of this file into others (`secret-file`) and `chmod 644` it");
    }
    let is_public = |name: &&str| fs::metadata(outgoing.queue.join(name)).is_ok_and(|found| found.mode() & 0o002 != 0);
    let queues = config.owner.is_none() && ["tmp", "new"].iter().all(is_public);
    if !queues && outgoing.loopback_listener().is_none() {
        remedies.push("write listen = [\"127.0.0.1:25\"] in [outgoing], for `odmr pull --daemon`");
    }
    if remedies.is_empty() {
        return;
    }
    let text =
        format!("only its owner and root can send mail by `odmr send`; for all users {}", remedies.join(", and "));
    let this_program = std::env::current_exe().and_then(fs::canonicalize).ok();
    match fs::canonicalize(SENDMAIL).is_ok_and(|program| Some(program) == this_program) {
        true => report.warn(places.queue.error(text)),
        false => report.note(places.queue.error(text)),
    }
}

/// Prints where mail for each address goes, and by which rule.
///
/// # Errors
///
/// An address gets no mail here, or this user has no right to see whether its mailbox exists.
fn explain(rules: &RecipientRules, addresses: &[String]) -> Result<(), ExitError> {
    let mut rejected = 0;
    let unseen = Cell::new(None);
    let mailbox_exists = |path: &Path| {
        find_mailbox(path).unwrap_or_else(|error| {
            unseen.set(Some(error));
            true
        })
    };
    for address in addresses {
        let (Ok(text) | Err(text)) = rules.explain_typed(address, &mailbox_exists).inspect_err(|_| rejected += 1);
        print(&format!("{text}\n"))?;
    }
    if let Some(error) = unseen.take() {
        let text =
            format!("whether a mailbox exists is unknown: {error}; be the owner of the mailboxes, or correct that");
        return Err(check_error(text));
    }
    match rejected {
        0 => Ok(()),
        _ => Err(check_error(format!("{} no mail here", counted(rejected, "address gets", "addresses get")))),
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
