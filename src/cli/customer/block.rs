//! The block: a customer's whole file, as its provider prints it for `odmr setup customer`.

use std::fmt::Write as _;

use crate::config::{ProviderConfig, quote};
use crate::mail::address::Domain;
use crate::net::tls::CertificateInfo;

/// The credentials that open the account.
pub(super) enum Opening<'a> {
    Secret(&'a str),
    /// A secret that this machine does not store.
    HiddenSecret,
    Certificate,
}

/// Returns the block for a customer with these domains, at least one; `relays`: it may submit mail.
pub(super) fn block_for(
    config: &ProviderConfig, name: &str, domains: &[Domain], opening: &Opening<'_>, relays: bool,
) -> String {
    let hostname = &config.hostname;
    let first = domains.first().map(Domain::as_str).unwrap_or_default();
    // A domain may be as long as a name can be.
    let own = Domain::parse(&format!("mail.{first}")).map_or_else(|| first.to_owned(), |own| own.to_string());
    let (port, tls) = entrance(config);
    let accept: Vec<_> = domains.iter().map(|domain| quote(format!("@{domain}"))).collect();
    format!(
        "\
# The customer {name} of {hostname}. On the customer's machine type as root: odmr setup customer {name}.toml

hostname = {own}

[provider]
address = {address}
tls = {tls}
{pin}name = {name_quoted}
{opening}
[mailboxes]
root = \"/var/mail/odmr\"
# All names of the domain, for the beginning. Better name the users, so that mail for others is rejected:
# accept = [{example}, ...]
accept = [{accept}]
catch-all = \"postmaster\"      # gets mail for names that have no mailbox
{outgoing}",
        own = quote(own),
        address = quote(format!("{hostname}:{port}")),
        pin = pin(config),
        name_quoted = quote(name),
        opening = opened_by(name, opening),
        example = quote(format!("alice@{first}")),
        accept = accept.join(", "),
        outgoing = if relays { OUTGOING } else { "" },
    )
}

const OUTGOING: &str = "
[outgoing]
queue = \"/var/spool/odmr-out\"
# Programs of this machine submit mail here, as long as `odmr pull --daemon` runs.
listen = [\"127.0.0.1:587\"]
";

fn opened_by(name: &str, opening: &Opening<'_>) -> String {
    match opening {
        Opening::Secret(secret) => format!("secret = {}\n", quote(secret)),
        Opening::HiddenSecret => {
            format!(
                "# secret = \"...\"      # not stored at the provider: `odmr secret {name} -c FILE` makes another there\n"
            )
        }
        Opening::Certificate => "certificate = \"customer.pem\"\nkey = \"customer.key\"\n".to_owned(),
    }
}

/// The port that a customer calls, and the value of `tls`. Port 0 means a different port after each start, so it is left
/// out; a port on loopback is used only if there is no other.
fn entrance(config: &ProviderConfig) -> (u16, &'static str) {
    let odmr = &config.odmr;
    let (listen, tls) = match (config.tls.is_some(), odmr.listen.is_empty() && !odmr.listen_tls.is_empty()) {
        (_, true) => (&odmr.listen_tls, "\"implicit\""),
        (true, false) => (&odmr.listen, "\"starttls\""),
        (false, false) => (&odmr.listen, "\"none\""),
    };
    // RFC 2645 section 4.
    let callable = listen.iter().filter(|address| address.port() != 0);
    let port = callable.min_by_key(|address| address.ip().is_loopback()).map_or(366, |address| address.port());
    (port, tls)
}

/// The line about trust: the pin of the provider's key, in a comment if an authority has signed its certificate.
fn pin(config: &ProviderConfig) -> String {
    let info = config.tls.as_ref().and_then(|files| CertificateInfo::load(&files.certificate).ok());
    let Some(CertificateInfo { pins: [_, pin], is_self_issued, .. }) = info else { return String::new() };
    let mut text = String::new();
    let _ = match is_self_issued {
        true => writeln!(text, "pin = \"{pin}\""),
        false => writeln!(text, "# pin = \"{pin}\"      # only if no authority known here has signed it"),
    };
    text
}
