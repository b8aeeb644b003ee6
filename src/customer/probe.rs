//! `odmr check --call`: connects to a provider as a call does, up to AUTH, and asks for the domains of the account. There is
//! no ATRN, so no mail moves.

use super::pull::{CallError, call_error};
use crate::config::{CustomerConfig, ProviderAccount};
use crate::ids::Ids;
use crate::mail::address::literal;
use crate::net::cancel::CancelToken;
use crate::net::tls::{CertificateInfo, TlsInfo};
use crate::sasl::Mechanism;
use crate::session::client::Connect;
use crate::session::{Remote, RemoteError};
use crate::smtp::client::ClientOptions;
use crate::smtp::extensions::AccountDomains;

/// What a provider has shown.
#[derive(Debug)]
pub struct Probe {
    /// Its address as a literal.
    pub address: String,
    /// Of the provider. `None`: the connection is in clear.
    pub certificate: Option<CertificateInfo>,
    /// What TLS has negotiated.
    pub tls: Option<TlsInfo>,
    /// By which the customer has logged in.
    pub mechanism: Option<Mechanism>,
    /// The domains of the account; `None`: the provider does not tell them.
    pub domains: Option<AccountDomains>,
}

/// Connects to a provider, logs in, asks for the domains and ends the session.
///
/// # Errors
/// As those of a call.
pub fn probe(
    config: &CustomerConfig, provider: &ProviderAccount, ids: &Ids, cancel: &CancelToken,
) -> Result<Probe, CallError> {
    let unusable = |error: RemoteError| CallError::Config(provider.error(&error).to_string());
    let remote = Remote::new(&provider.remote).map_err(unusable)?;
    let (name, nonce) = (config.hostname.clone(), ids.nonce());
    let options = ClientOptions { name, nonce, atrn: true, ..ClientOptions::default() };
    let (id, timeouts) = (&ids.session_id(), &config.timeouts);
    let connect = Connect { id, peer: 'P', tls: None, implicit_tls: false, timeouts, cancel, limit: None };
    let (mut session, address) = remote.connect(&options, &connect).map_err(call_error)?;
    let (certificate, tls, mechanism) = (session.peer_certificate(), session.tls_info(), session.client().mechanism());
    // A provider that accepts EHLO only once has told nothing.
    let domains = session.ask_domains().unwrap_or_default();
    session.quit();
    Ok(Probe { address: literal(address.ip()), certificate, tls, mechanism, domains })
}
