//! `odmr check --call`: connects to a provider and authenticates as a call does, and asks for the domains of the
//! account. It sends no ATRN, so no mail is sent or received.

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

/// What a call to a provider would find.
#[derive(Debug)]
pub struct Probe {
    /// The provider's IP address, as an address literal.
    pub address: String,
    /// The provider's certificate; `None`: the connection does not use TLS.
    pub certificate: Option<CertificateInfo>,
    /// The negotiated version and cipher suite; `None`: the connection does not use TLS.
    pub tls: Option<TlsInfo>,
    /// The mechanism of AUTH; `None`: AUTH was not needed.
    pub mechanism: Option<Mechanism>,
    /// The domains of the account; `None`: the provider does not report them.
    pub domains: Option<AccountDomains>,
}

/// Connects to a provider, authenticates, asks for the domains and ends the session.
///
/// # Errors
/// Those of a call up to AUTH.
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
    // The question is a second EHLO. A provider that rejects it has not reported the domains, which is not an error.
    let domains = session.ask_domains().unwrap_or_default();
    session.quit();
    Ok(Probe { address: literal(address.ip()), certificate, tls, mechanism, domains })
}
