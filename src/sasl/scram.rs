//! SCRAM-SHA-256 and SCRAM-SHA-256-PLUS (RFC 5802, RFC 7677): each side proves to the other that it knows the secret, without
//! sending it.
//!
//! ```text
//! client                                                             server
//! n,,n=NAME,r=NONCE                                ── client-first ─▶
//!                    ◀─ server-first ── r=NONCE+MORE,s=SALT,i=ITERATIONS
//! c=BINDING,r=NONCE+MORE,p=PROOF                   ── client-final ─▶
//!                    ◀─ server-final ─────────────────── v=SIGNATURE     in a 334: a 235 has no room for it
//! (empty)                                          ─────────────────▶    then 235 (RFC 4422 section 5)
//! ```
//!
//! The server stores a [`ScramVerifier`], with which it can check a proof but cannot make one. With -PLUS the binding is a
//! value that only the two ends of this TLS connection have (tls-exporter, RFC 9266): with an attacker between them, each end
//! has another value. Without -PLUS the client sends the flag `y` if the server has not offered it, or `n` if the client
//! cannot use it. A server that has offered -PLUS rejects `y`, because an attacker has removed -PLUS from the offer.
//!
//! Names and secrets are printable ASCII, which SASLprep does not change (RFC 5802 section 2.2 lets an implementation forbid
//! other characters). Other accounts use other mechanisms.

use data_encoding::BASE64;
use sha2::{Digest, Sha256};

use super::exchange::{ClientExchange, CredentialStore, ExchangeStep, ServerExchange, Unavailable};
use super::verifier::{
    HmacOutput, PERMITTED_ITERATIONS, ScramVerifier, finish, is_count, is_usable, keyed, keys, number,
    permitted_iterations, salted_password, same, xor,
};

/// The name of the channel binding of RFC 9266.
const TLS_EXPORTER: &str = "tls-exporter";

/// Octets of a client's nonce. Clients in use send 16 to 64.
const NONCE_LIMIT: usize = 256;

/// The server's side.
pub(super) struct ScramServer {
    /// The channel binding, if the mechanism is -PLUS.
    binding: Option<[u8; 32]>,
    /// The server has offered -PLUS on this connection.
    plus_offered: bool,
    /// The server's part of the nonce, never used before.
    nonce: String,
    state: ServerState,
}

enum ServerState {
    /// No message has arrived.
    Begin,
    /// The server-first message was sent.
    Challenged(Box<Challenged>),
    /// The server-final message was sent: the client has proved that it knows the secret of this account.
    Proved(String),
    Over,
}

/// The state that the server needs for the client-final message.
struct Challenged {
    account: String,
    verifier: ScramVerifier,
    /// The account exists, and the client does not act for another.
    may_pass: bool,
    /// The required value of `c=`.
    binding: Vec<u8>,
    nonce: String,
    /// The client-first message without its header, and the server-first message.
    messages: String,
}

impl ScramServer {
    /// `binding`: for -PLUS. `plus_offered`: -PLUS is offered on this connection. `nonce`: as [`is_nonce`] permits.
    pub(super) fn new(binding: Option<[u8; 32]>, plus_offered: bool, nonce: String) -> ScramServer {
        ScramServer { binding, plus_offered, nonce, state: ServerState::Begin }
    }

    /// Processes a response. `find`: returns the verifier of a name, and whether there is such an account; if there is none, a
    /// fake verifier.
    fn respond(
        &mut self, response: &[u8], find: impl FnOnce(&str) -> Result<(ScramVerifier, bool), Unavailable>,
    ) -> ExchangeStep {
        match std::mem::replace(&mut self.state, ServerState::Over) {
            ServerState::Begin => self.client_first(response, find).unwrap_or(ExchangeStep::Malformed),
            ServerState::Challenged(challenged) => {
                self.client_final(response, *challenged).unwrap_or(ExchangeStep::Malformed)
            }
            ServerState::Proved(account) if response.is_empty() => ExchangeStep::Done(account),
            ServerState::Proved(_) | ServerState::Over => ExchangeStep::Malformed,
        }
    }

    /// `None`: the message is not in the form of RFC 5802 section 7.
    fn client_first(
        &mut self, response: &[u8], find: impl FnOnce(&str) -> Result<(ScramVerifier, bool), Unavailable>,
    ) -> Option<ExchangeStep> {
        let first = ClientFirst::parse(std::str::from_utf8(response).ok()?)?;
        let flag_passes = match (first.flag, &self.binding) {
            // RFC 5802 section 6: the client supports channel binding, and an attacker has removed our offer.
            (BindingFlag::NotOffered, None) => !self.plus_offered,
            (BindingFlag::Unsupported, None) => true,
            // RFC 5802 section 6: a type that the server does not support fails.
            (BindingFlag::Bound(name), Some(_)) => name == TLS_EXPORTER,
            (BindingFlag::Bound(_), None) | (BindingFlag::NotOffered | BindingFlag::Unsupported, Some(_)) => false,
        };
        if !flag_passes {
            return Some(ExchangeStep::Failed(first.name));
        }
        let Ok((verifier, known)) = find(&first.name) else { return Some(ExchangeStep::Unavailable) };
        let nonce = format!("{}{}", first.nonce, self.nonce);
        let server_first = format!("r={nonce},s={},i={}", BASE64.encode(&verifier.salt), verifier.iterations);
        let allowed = first.acts_for.is_none_or(|account| account == first.name);
        self.state = ServerState::Challenged(Box::new(Challenged {
            verifier,
            may_pass: known & allowed & is_usable(first.name.as_bytes()),
            binding: [first.header.as_bytes(), self.binding.as_ref().map_or(&[], |binding| binding)].concat(),
            nonce,
            messages: format!("{},{server_first}", first.bare),
            account: first.name,
        }));
        Some(ExchangeStep::Challenge(server_first.into_bytes()))
    }

    /// `None`: the message is not in the form of RFC 5802 section 7.
    fn client_final(&mut self, response: &[u8], challenged: Challenged) -> Option<ExchangeStep> {
        let (without_proof, proof) = std::str::from_utf8(response).ok()?.rsplit_once(",p=")?;
        let mut attributes = without_proof.split(',');
        let binding = decode(value_of(attributes.next(), 'c')?)?;
        let nonce = value_of(attributes.next(), 'r')?;
        only_extensions(attributes)?;
        let proof = HmacOutput::try_from(decode(proof)?).ok()?;

        let Challenged { account, verifier, may_pass, messages, .. } = challenged;
        let auth_message = format!("{messages},{without_proof}");
        let proved = verifier.accepts(&proof, auth_message.as_bytes());
        // RFC 5802 section 6: the binding must be checked always, and with it the header of the first message.
        let same_channel = binding.len() == challenged.binding.len() && same(&binding, &challenged.binding);
        if !(proved & same_channel & may_pass & (nonce == challenged.nonce)) {
            return Some(ExchangeStep::Failed(account));
        }
        let signature = finish(&keyed(&verifier.server_key), &[auth_message.as_bytes()]);
        self.state = ServerState::Proved(account);
        Some(ExchangeStep::Challenge(format!("v={}", BASE64.encode(&signature)).into_bytes()))
    }
}

impl ServerExchange for ScramServer {
    fn first(&mut self) -> Option<Vec<u8>> {
        None
    }

    fn step(&mut self, response: &[u8], store: &dyn CredentialStore) -> ExchangeStep {
        self.respond(response, |name| store.verifier(name))
    }
}

/// The flag of the client for channel binding.
#[derive(Clone, Copy)]
enum BindingFlag<'a> {
    /// `n`: the client does not support it.
    Unsupported,
    /// `y`: the client supports it, and the server has not offered it.
    NotOffered,
    /// `p=NAME`: the client uses the channel binding of this name.
    Bound(&'a str),
}

/// The client-first message.
struct ClientFirst<'a> {
    flag: BindingFlag<'a>,
    /// The account that the client wants to act for.
    acts_for: Option<String>,
    /// The flag and the account, with their commas.
    header: &'a str,
    /// The rest.
    bare: &'a str,
    name: String,
    nonce: &'a str,
}

impl<'a> ClientFirst<'a> {
    fn parse(text: &'a str) -> Option<ClientFirst<'a>> {
        let (flag, rest) = text.split_once(',')?;
        let (acts_for, bare) = rest.split_once(',')?;
        let header = text.strip_suffix(bare)?;
        let flag = match flag {
            "n" => BindingFlag::Unsupported,
            "y" => BindingFlag::NotOffered,
            _ => BindingFlag::Bound(value_of(Some(flag), 'p')?),
        };
        let acts_for = match acts_for {
            "" => None,
            _ => Some(unescape(value_of(Some(acts_for), 'a')?)?),
        };
        // RFC 5802 section 5.1: the order is fixed, and `m=`, which would be the first attribute, fails.
        let mut attributes = bare.split(',');
        let name = unescape(value_of(attributes.next(), 'n')?)?;
        // With a longer nonce the challenge would not fit into one line of a reply (RFC 5321 section 4.5.3.1.5).
        let nonce = value_of(attributes.next(), 'r').filter(|nonce| is_nonce(nonce) && nonce.len() <= NONCE_LIMIT)?;
        only_extensions(attributes)?;
        Some(ClientFirst { flag, acts_for, header, bare, name, nonce })
    }
}

/// The client's knowledge about channel binding on its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ClientBinding {
    /// The connection has no channel binding, or the client must not use it: flag `n`.
    Unsupported,
    /// The connection has one, but the server does not offer -PLUS: flag `y`.
    NotOffered,
    /// The mechanism is -PLUS, with this channel binding.
    TlsExporter([u8; 32]),
}

/// The client's side.
pub(super) struct ScramClient {
    secret: Vec<u8>,
    nonce: String,
    /// The flag, with its commas.
    header: String,
    /// The channel binding; empty without -PLUS.
    binding: Vec<u8>,
    /// The client-first message without its header.
    bare: String,
    state: ClientState,
    problem: Option<String>,
}

#[derive(Clone, Copy)]
enum ClientState {
    /// No message was sent.
    Begin,
    /// The client-first message was sent.
    Named,
    /// The client-final message was sent. The server must send this signature as its proof that it knows the secret.
    Proved(HmacOutput),
    /// The server has sent it.
    Verified,
    Over,
}

impl ScramClient {
    /// Returns `None` if SCRAM cannot use this name or secret. `nonce`: as [`is_nonce`] permits, never used before.
    pub(super) fn new(name: &str, secret: &[u8], nonce: String, binding: ClientBinding) -> Option<ScramClient> {
        let (header, binding) = match binding {
            ClientBinding::Unsupported => ("n,,".to_owned(), Vec::new()),
            ClientBinding::NotOffered => ("y,,".to_owned(), Vec::new()),
            ClientBinding::TlsExporter(value) => (format!("p={TLS_EXPORTER},,"), value.to_vec()),
        };
        let bare = format!("n={},r={nonce}", escape(name));
        let usable = is_usable(name.as_bytes()) && is_usable(secret);
        let (secret, state) = (secret.to_vec(), ClientState::Begin);
        usable.then_some(ScramClient { secret, nonce, header, binding, bare, state, problem: None })
    }

    fn first(&mut self) -> Vec<u8> {
        self.state = ClientState::Named;
        format!("{}{}", self.header, self.bare).into_bytes()
    }

    /// Makes the client-final message for a server-first message.
    ///
    /// # Errors
    /// Why the server-first message is not acceptable.
    fn server_first(&mut self, challenge: &[u8]) -> Result<Vec<u8>, String> {
        let (server_first, nonce, salt, iterations) = std::str::from_utf8(challenge)
            .ok()
            .and_then(|text| {
                let mut attributes = text.split(',');
                let nonce = value_of(attributes.next(), 'r').filter(|nonce| is_nonce(nonce))?;
                let salt = decode(value_of(attributes.next(), 's')?)?;
                let iterations = value_of(attributes.next(), 'i').filter(|count| is_count(count))?;
                only_extensions(attributes)?;
                Some((text, nonce, salt, iterations))
            })
            .ok_or("sent a first message that is not one of SCRAM")?;
        // RFC 5802 section 5.1: the server's nonce is ours with its own part added.
        if nonce.strip_prefix(&self.nonce).is_none_or(str::is_empty) {
            return Err("did not add its own part to the nonce".to_owned());
        }
        let accepted = number(iterations).filter(|number| PERMITTED_ITERATIONS.contains(number));
        let Some(count) = accepted else {
            return Err(format!(
                "asks for {iterations:.20} iterations of SCRAM, and this client accepts {}",
                permitted_iterations()
            ));
        };
        let salted = salted_password(&self.secret, &salt, count);
        let (client_key, server_key) = keys(&salted);
        let binding = BASE64.encode(&[self.header.as_bytes(), &self.binding].concat());
        let without_proof = format!("c={binding},r={nonce}");
        let auth_message = format!("{},{server_first},{without_proof}", self.bare);
        let stored_key = Sha256::digest(client_key);
        let proof = xor(&client_key, &finish(&keyed(&stored_key), &[auth_message.as_bytes()]));
        self.state = ClientState::Proved(finish(&keyed(&server_key), &[auth_message.as_bytes()]));
        Ok(format!("{without_proof},p={}", BASE64.encode(&proof)).into_bytes())
    }

    /// Verifies the server-final message. Returns the empty response.
    ///
    /// # Errors
    /// Why the server-final message is not acceptable.
    fn server_final(&mut self, challenge: &[u8], expected: &HmacOutput) -> Result<Vec<u8>, String> {
        let malformed = "sent a last message that is not one of SCRAM";
        let mut attributes = std::str::from_utf8(challenge).map_err(|_| malformed)?.split(',');
        let result = attributes.next();
        only_extensions(attributes).ok_or(malformed)?;
        // The server reports an error, and will reply 535 to the empty response. A 235 would not be accepted: the state is
        // not `Verified`.
        if value_of(result, 'e').is_some() {
            return Ok(Vec::new());
        }
        let signature = value_of(result, 'v').and_then(decode).ok_or(malformed)?;
        if signature.len() != expected.len() || !same(&signature, expected) {
            return Err("does not know the secret, as its signature is wrong".to_owned());
        }
        self.state = ClientState::Verified;
        Ok(Vec::new())
    }
}

impl ClientExchange for ScramClient {
    fn initial(&mut self) -> Option<Vec<u8>> {
        Some(self.first())
    }

    fn step(&mut self, challenge: &[u8]) -> Option<Vec<u8>> {
        let response = match std::mem::replace(&mut self.state, ClientState::Over) {
            ClientState::Begin if challenge.is_empty() => Ok(self.first()),
            ClientState::Named => self.server_first(challenge),
            ClientState::Proved(expected) => self.server_final(challenge, &expected),
            ClientState::Begin | ClientState::Verified | ClientState::Over => {
                Err("sent a challenge out of order".to_owned())
            }
        };
        response.map_err(|problem| self.problem = Some(problem)).ok()
    }

    /// RFC 5802 section 5: without the server's signature the authentication has failed, even if the server replies 235.
    fn finished(&self) -> bool {
        matches!(self.state, ClientState::Verified)
    }

    fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }
}

/// The value of the attribute with this name; `None`: the attribute has another name, or the value is empty or has a NUL
/// (RFC 5802 section 7).
fn value_of(attribute: Option<&str>, name: char) -> Option<&str> {
    let value = attribute?.strip_prefix(name)?.strip_prefix('=')?;
    (!value.is_empty() && !value.contains('\0')).then_some(value)
}

/// Checks that the rest of a message has only optional extensions, which are ignored. There a known attribute is out of
/// order, and `m=` announces an extension that must not be ignored (RFC 5802 section 5.1).
fn only_extensions<'a>(mut attributes: impl Iterator<Item = &'a str>) -> Option<()> {
    let is_extension = |attribute: &str| {
        let name = attribute.chars().next().filter(|name| name.is_ascii_alphabetic() && !"aceimnprsv".contains(*name));
        name.and_then(|name| value_of(Some(attribute), name)).is_some()
    };
    attributes.all(is_extension).then_some(())
}

/// Escapes a name for a message (RFC 5802 section 5.1).
fn escape(name: &str) -> String {
    name.replace('=', "=3D").replace(',', "=2C")
}

/// Reads an escaped name; `None`: it has another `=` (RFC 5802 section 5.1).
fn unescape(name: &str) -> Option<String> {
    let mut parts = name.split('=');
    let mut plain = parts.next()?.to_owned();
    for part in parts {
        let (octet, rest) = match part.strip_prefix("2C") {
            Some(rest) => (',', rest),
            None => ('=', part.strip_prefix("3D")?),
        };
        plain.push(octet);
        plain.push_str(rest);
    }
    Some(plain)
}

/// Whether the text is `printable` (RFC 5802 section 7).
fn is_nonce(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|octet| octet.is_ascii_graphic() && octet != b',')
}

fn decode(text: &str) -> Option<Vec<u8>> {
    BASE64.decode(text.as_bytes()).ok()
}

#[cfg(test)]
mod tests;
