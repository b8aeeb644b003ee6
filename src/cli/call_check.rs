//! `odmr check --call`: logs in to each provider, and compares the certificate and the domains with the configuration.

use std::collections::BTreeSet;
use std::path::Path;

use super::check_report::{CheckReport, describe, validity};
use super::exit::ExitError;
use crate::clock::Clock;
use crate::config::{CustomerConfig, ProviderAccount, SourceLine, line_of_key};
use crate::customer::CallError;
use crate::customer::probe::{Probe, probe};
use crate::ids::Ids;
use crate::net::cancel::CancelToken;
use crate::net::tls;
use crate::provider::certificate::DAYS_TO_RENEW;
use crate::sasl::Mechanism;
use crate::smtp::extensions::AccountDomains;

/// Logs in to each provider of a customer, and reports what does not fit its configuration.
///
/// # Errors
///
/// The errors of the system.
pub(super) fn run(config: &CustomerConfig, path: &Path, report: &mut CheckReport) -> Result<(), ExitError> {
    let (ids, cancel) = (Ids::system(tls::random), CancelToken::new()?);
    let accept = line_of_key(path, &["mailboxes", "accept"]);
    // The domains that the providers hold mail for; `None`: a provider does not list them all.
    let mut held = Some(BTreeSet::new());
    for provider in &config.providers {
        let (address, account) = (&provider.remote.address, provider.remote.login_name());
        let found = match probe(config, provider, &ids, &cancel) {
            Ok(found) => found,
            Err(error) => {
                held = None;
                match error {
                    // The text names the file and the line already.
                    CallError::Config(text) => report.error(text),
                    error => report.error(provider.address_line.error(error.to_string())),
                }
                continue;
            }
        };
        check_validity(provider, &found, report);
        let tls = found.certificate.as_ref().map_or_else(|| "in clear".to_owned(), describe);
        let (version, mechanism) = check_login(provider, &found, report);
        let domains = match &found.domains {
            None => "not listed".to_owned(),
            Some(listed) => listed.names.join(", ") + if listed.has_more { ", ..." } else { "" },
        };
        report.note(format!(
            "{address} {}: {tls}; logged in as {account} by {mechanism}{version}; domains: {domains}",
            found.address
        ));
        match found.domains {
            Some(listed) => {
                check_domains(config, provider, &listed, &accept, report);
                held = held.filter(|_| !listed.has_more).map(|held| held.into_iter().chain(listed.names).collect());
            }
            None => held = None,
        }
    }
    let served = config.mailboxes.rules.domains();
    for domain in served.iter().filter(|domain| held.as_ref().is_some_and(|held| !held.contains(domain.as_str()))) {
        report.warn(accept.error(format!(
            "no provider holds mail for {domain}, so none arrives for it: ask the provider to add it to the account, or \
             remove it here"
        )));
    }
    Ok(())
}

/// Checks that the login was by our own certificate, if there is one. Returns the TLS version and the mechanism, for the
/// user.
fn check_login(provider: &ProviderAccount, found: &Probe, report: &mut CheckReport) -> (String, &'static str) {
    let version = found.tls.as_ref().map(|tls| tls.version);
    let mechanism = found.mechanism.map_or("-", Mechanism::name);
    if provider.remote.identity.is_some() {
        let address = &provider.remote.address;
        if found.mechanism != Some(Mechanism::External) {
            report.warn(provider.certificate_line.error(format!(
                "{address} does not know this certificate, so the login was by {mechanism}: send the certificate's pin to its \
                 operator, for `certificate` in the file of the account"
            )));
        } else if version == Some("TLSv1.2") {
            // RFC 5246 section 7.4.6; TLS 1.3 encrypts it.
            report.warn(provider.certificate_line.error(format!(
                "{address} uses TLS 1.2, which sends this certificate in clear text: an eavesdropper sees which \
                 customer calls; ask its operator for TLS 1.3"
            )));
        }
    }
    (version.map_or_else(String::new, |version| format!(" under {version}")), mechanism)
}

/// Warns of the end of the provider's certificate: a customer with a pin trusts it after its end too, others cannot
/// call then.
fn check_validity(provider: &ProviderAccount, found: &Probe, report: &mut CheckReport) {
    let validity = found.certificate.as_ref().and_then(|certificate| validity(certificate, Clock::System.now()));
    if let Some((until, days)) = validity.filter(|(_, days)| *days < DAYS_TO_RENEW) {
        let word = if days < 0 { "has expired" } else { "expires" };
        let address = &provider.remote.address;
        report.warn(format!("{address}: its certificate {word} on {}: tell its operator", until.rfc3339()));
    }
}

/// Compares the domains of an account with `domains` and `accept` of the configuration.
fn check_domains(
    config: &CustomerConfig, provider: &ProviderAccount, listed: &AccountDomains, accept: &SourceLine,
    report: &mut CheckReport,
) {
    let (rules, address) = (&config.mailboxes.rules, &provider.remote.address);
    for name in &listed.names {
        if !rules.domains().iter().any(|domain| domain.as_str() == name) {
            report.warn(accept.error(format!(
                "{address} holds mail for {name}, and no address in it is accepted, so that mail would be rejected: add \
                 \"@{name}\" or addresses to `accept`; until then call with `odmr pull -c FILE --soft-bounce`"
            )));
        }
        if !provider.domains.is_empty() && !provider.domains.iter().any(|domain| domain.as_str() == name) {
            report.warn(provider.domains_line.error(format!(
                "{address} holds mail for {name}, which is not in `domains`, so it is not fetched: add it"
            )));
        }
    }
    for domain in &provider.domains {
        if !listed.has_more && !listed.names.iter().any(|name| name == domain.as_str()) {
            report.error(provider.domains_line.error(format!(
                "{domain} is not a domain of the account at {address}, which would reject the whole call: remove it"
            )));
        }
    }
}
