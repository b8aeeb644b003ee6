//! `odmr check`: finds the errors of a configuration that would stop `serve` or `pull`, without binding or connecting.
//!
//! Beside the file itself it checks the files that it names, the user, and that the directories can be written to. With
//! `--address` it shows where mail for an address goes, and by which rule. A warning says whose mail has nobody to come
//! back to.

use std::path::Path;

use getopts::{Matches, Options};
use rustix::fs::Access;

use super::exit::{ExitError, Sysexit};
use super::process::{check_not_root, config_path, find_owner, print};
use crate::config::{Config, CustomerConfig, MailboxesConfig, ProviderAccount, ProviderConfig};
use crate::customer::pull::Customer;
use crate::customer::sendmail::user_mailbox;
use crate::ids::Ids;
use crate::mail::address::{Domain, ForwardPath};
use crate::net::tls::{self, ServerTls};
use crate::privileges::LoginUser;
use crate::recipients::RecipientRules;
use crate::smtp::reply::Severity;

/// The options of `odmr check`.
pub(super) fn options(options: &mut Options) {
    let help = "says where mail for ADDR goes, and by which rule; may be given several times";
    options.optmulti("", "address", help, "ADDR");
}

/// Checks the file that `-c` names, of either side; with `--address`, explains the rules of a customer.
///
/// # Errors
///
/// The first mistake; `--address` with a provider's file; an address that gets no mail here.
pub(super) fn run(matches: &Matches) -> Result<(), ExitError> {
    let path = config_path(matches);
    let addresses = matches.opt_strs("address");
    let summary = match Config::load(&path).map_err(check_error)? {
        Config::Provider(_) if !addresses.is_empty() => {
            let text = "--address is for a customer's file: it says into which mailbox mail for an address goes";
            let text = format!("{} is a provider's file, and {text}", path.display());
            return Err(ExitError::usage(text, "odmr check -h"));
        }
        Config::Customer(config) if !addresses.is_empty() => return explain(&config.mailboxes.rules, &addresses),
        Config::Provider(config) => check_provider(&config, &path)?,
        Config::Customer(config) => check_customer(&config, &path)?,
    };
    print(&format!("{}: good: {summary}\n", path.display()))
}

fn check_error(text: impl ToString) -> ExitError {
    ExitError::new(Sysexit::CheckFailed, text)
}

/// Returns the numbers of customers and domains, for the summary.
fn check_provider(config: &ProviderConfig, path: &Path) -> Result<String, ExitError> {
    if let Some(files) = &config.tls {
        ServerTls::load(&files.certificate, &files.key)
            .map_err(|error| check_error(format!("{}: {error}", path.display())))?;
    }
    check_directory(&config.spool)?;
    let skipped: Vec<_> = config.accounts.skipped().iter().map(|skipped| skipped.error.to_string()).collect();
    if !skipped.is_empty() {
        return Err(check_error(skipped.join("\n")));
    }
    let domains: usize = config.accounts.iter().map(|account| account.domains.len()).sum();
    Ok(format!("a provider with {} customers, {domains} domains", config.accounts.iter().count()))
}

/// Returns the customer's providers and its accounts there, for the summary.
fn check_customer(config: &CustomerConfig, path: &Path) -> Result<String, ExitError> {
    if let Some(owner) = &config.owner
        && !find_owner(owner).map_err(check_error)?.may_read(path)?
    {
        print(&format!("{}: {} may not read it, so SIGHUP cannot: chgrp it\n", path.display(), owner.user))?;
    }
    check_not_root(config, path).map_err(|error| check_error(error.text))?;
    Customer::new(config, &Ids::system(tls::random)).map_err(check_error)?;
    check_directory(&config.mailboxes.root)?;
    config.mailboxes.rules.warnings().iter().try_for_each(|warning| print(&format!("{warning}\n")))?;
    if let Some(outgoing) = &config.outgoing {
        check_directory(&outgoing.queue)?;
        warn_of_senders(&config.mailboxes, &outgoing.domain)?;
    }
    let account =
        |provider: &ProviderAccount| format!("of {}, as {}", provider.remote.address, provider.remote.login_name());
    let accounts: Vec<_> = config.providers.iter().map(account).collect();
    Ok(format!("a customer {}", accounts.join("; ")))
}

/// Prints a warning for each user whose mail has nobody to come back to: root, for whom cron sends, and the user of this
/// process. `domain`: that of their addresses.
fn warn_of_senders(mailboxes: &MailboxesConfig, domain: &Domain) -> Result<(), ExitError> {
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
            print(&format!("{}\n", mailboxes.missing_alias(text)))?;
        }
    }
    Ok(())
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
fn check_directory(path: &Path) -> Result<(), ExitError> {
    let existing = path.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"));
    let name = existing.display();
    if !existing.is_dir() {
        return Err(check_error(format!("{name} is not a directory: move it away")));
    }
    rustix::fs::access(existing, Access::WRITE_OK | Access::EXEC_OK)
        .map_err(|error| check_error(format!("{name} is not writable: {error}; give write permission to its user")))
}
