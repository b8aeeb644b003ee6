//! Authentication (SASL, RFC 4422). Octets in, octets out; base64 and the AUTH command (RFC 4954) belong to SMTP.
//!
//! Each mechanism is a file with both its sides. A [`Mechanism`] makes an exchange for either side:
//!
//! ```text
//!     server                                   client
//!     first() ── challenge, if any ──────────▶ step()      server-first (CRAM-MD5)
//!     step()  ◀────── response, if any ─────── initial()   client-first (PLAIN, SCRAM); or step(b"") after
//!       │                                                  an empty challenge
//!       ├─ Challenge ── another round ───────▶ step()
//!       └─ Done, Failed, Malformed, Unavailable            finished(): is a success plausible?
//! ```
//!
//! An exchange does not reveal whether a name exists: an unknown name costs the same work and has the same result as a wrong
//! secret. Names and secrets are compared octet by octet, without SASLprep (RFC 4013), which does not change ASCII.
//!
//! To add a mechanism, add a file here and a line in each method of [`Mechanism`].

mod channel;
mod verifier;
mod exchange;
mod external;
mod cram_md5;
mod plain;
mod scram;

use std::fmt;

pub use channel::{CertificateDigests, TlsChannel};
pub use exchange::{
    AccountCredentials, ClientExchange, CredentialStore, ExchangeStep, NoCredentials, ServerExchange, Unavailable,
};
pub use verifier::{ITERATIONS, SALT_OCTETS, ScramVerifier, is_usable, name_digest, salted_password, stable_salt};

use scram::{ClientBinding, ScramClient, ScramServer};

/// The mechanisms this program knows.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Mechanism {
    /// RFC 4422 appendix A: the client has a certificate in TLS.
    External,
    /// RFC 7677, with the channel binding of RFC 9266.
    ScramSha256Plus,
    /// RFC 7677.
    ScramSha256,
    /// RFC 2195; RFC 2645 section 5.1.2 requires it.
    CramMd5,
    /// RFC 4616; RFC 4954 section 4 requires it, under TLS.
    Plain,
}

impl Mechanism {
    /// All mechanisms, the strongest first. EXTERNAL has no secret that the server could lose; SCRAM proves to the client that
    /// the server knows the secret; CRAM-MD5 does not send the secret, PLAIN does.
    pub const ALL: [Mechanism; 5] =
        [Mechanism::External, Mechanism::ScramSha256Plus, Mechanism::ScramSha256, Mechanism::CramMd5, Mechanism::Plain];

    /// The name in the IANA registry.
    pub fn name(self) -> &'static str {
        match self {
            Mechanism::External => "EXTERNAL",
            Mechanism::ScramSha256Plus => "SCRAM-SHA-256-PLUS",
            Mechanism::ScramSha256 => "SCRAM-SHA-256",
            Mechanism::CramMd5 => "CRAM-MD5",
            Mechanism::Plain => "PLAIN",
        }
    }

    /// The mechanism of this name, in any case (RFC 4954 section 4); `None`: this program does not know it.
    pub fn parse(name: &[u8]) -> Option<Mechanism> {
        let same = |mechanism: &Mechanism| mechanism.name().as_bytes().eq_ignore_ascii_case(name);
        Mechanism::ALL.into_iter().find(same)
    }

    /// Whether the mechanism must not be offered or used without TLS: it sends the secret in clear (RFC 4954 section 4), or
    /// uses the identity that TLS has proved.
    pub fn needs_tls(self) -> bool {
        matches!(self, Mechanism::External | Mechanism::Plain)
    }

    /// Whether a server can offer the mechanism, and a client use it, on a connection with this TLS; `None`: the connection is
    /// in clear.
    pub fn is_possible(self, channel: Option<&TlsChannel>) -> bool {
        match self {
            // RFC 5802 section 6: it needs a channel binding, which TLS 1.2 has not here (RFC 9266 section 4.2).
            Mechanism::ScramSha256Plus => channel.is_some_and(|channel| channel.exporter.is_some()),
            mechanism => channel.is_some() || !mechanism.needs_tls(),
        }
    }

    /// Whether the mechanism is of the SCRAM family (RFC 5802).
    pub fn is_scram(self) -> bool {
        matches!(self, Mechanism::ScramSha256Plus | Mechanism::ScramSha256)
    }

    /// Whether the client sends first, so that AUTH may have an initial response. If the server sends first, an initial
    /// response is an error (RFC 4954 section 4).
    pub fn client_first(self) -> bool {
        self != Mechanism::CramMd5
    }

    /// The mechanisms in `offered` that a client may use, the strongest first. `channel`: as for [`Mechanism::is_possible`].
    pub fn usable(offered: &[Mechanism], channel: Option<&TlsChannel>) -> impl Iterator<Item = Mechanism> {
        let usable = move |mechanism: &Mechanism| offered.contains(mechanism) && mechanism.is_possible(channel);
        Mechanism::ALL.into_iter().filter(usable)
    }

    /// An exchange for the server. `channel`: the TLS of the connection. `offered`: the mechanisms in the reply to EHLO.
    pub fn server(
        self, store: &dyn CredentialStore, channel: &TlsChannel, offered: &[Mechanism],
    ) -> Box<dyn ServerExchange> {
        let plus_offered = offered.contains(&Mechanism::ScramSha256Plus);
        let scram = |binding| Box::new(ScramServer::new(binding, plus_offered, store.nonce()));
        match (self, channel.exporter) {
            (Mechanism::External, _) => Box::new(external::ExternalServer(channel.client_certificate)),
            (Mechanism::ScramSha256Plus, Some(exporter)) => scram(Some(exporter)),
            (Mechanism::ScramSha256Plus | Mechanism::ScramSha256, _) => scram(None),
            (Mechanism::CramMd5, _) => Box::new(cram_md5::CramMd5Server(store.challenge())),
            (Mechanism::Plain, _) => Box::new(plain::PlainServer),
        }
    }

    /// An exchange for the client; `None`: the login or the connection lacks something that the mechanism needs. `channel`: the
    /// TLS of the connection. `offered`: the mechanisms in the server's reply to EHLO. `nonce`: random, and never used before.
    pub fn client(
        self, login: &Login, channel: &TlsChannel, offered: &[Mechanism], nonce: String,
    ) -> Option<Box<dyn ClientExchange>> {
        let (name, secret) = (login.name.as_str(), login.secret.as_deref());
        let plus = Mechanism::ScramSha256Plus;
        let binding = match (self == plus, channel.exporter) {
            (true, exporter) => ClientBinding::TlsExporter(exporter?),
            // RFC 5802 section 6: `y` only if the server does not offer -PLUS, which this client could use; otherwise `n`.
            (false, Some(_)) if !offered.contains(&plus) => ClientBinding::NotOffered,
            (false, _) => ClientBinding::Unsupported,
        };
        Some(match self {
            // A server that has not asked for the certificate does not have it.
            Mechanism::External => {
                channel.client_certificate.filter(|_| login.certificate)?;
                Box::new(external::ExternalClient::new(name))
            }
            Mechanism::ScramSha256Plus | Mechanism::ScramSha256 => {
                Box::new(ScramClient::new(name, secret?, nonce, binding)?)
            }
            Mechanism::CramMd5 => Box::new(cram_md5::CramMd5Client::new(name, secret?)),
            Mechanism::Plain => Box::new(plain::PlainClient::new(name, secret?)),
        })
    }
}

impl fmt::Display for Mechanism {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The name and the credentials of a client.
#[derive(Clone, PartialEq, Eq)]
pub struct Login {
    /// The login name, never empty.
    pub name: String,
    /// Never empty; `None`: mechanisms with a secret are not used.
    pub secret: Option<Vec<u8>>,
    /// The client sends a certificate if the server asks for one in TLS.
    pub certificate: bool,
    /// The mechanisms that may be used.
    pub mechanisms: Vec<Mechanism>,
}

impl Login {
    /// A login with a secret, by any mechanism.
    pub fn with_secret(name: String, secret: Vec<u8>) -> Login {
        Login { name, secret: Some(secret), certificate: false, mechanisms: Mechanism::ALL.to_vec() }
    }
}

impl fmt::Debug for Login {
    /// Without the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Login").field("name", &self.name).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
