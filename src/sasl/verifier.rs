//! The verifier that SCRAM stores in place of a secret (RFC 5802 section 3, RFC 5803), and the computations of both sides.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::RangeInclusive;

use data_encoding::BASE64;
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// Iterations of PBKDF2 for the verifiers that are made here (RFC 7677 section 4).
pub const ITERATIONS: u32 = 15_000;

/// The permitted iterations of a verifier, and of a server's challenge. Fewer than 4,096 protect the secret too little (RFC
/// 7677 section 4). With more than a million, a server could use up the processor of a client (RFC 5802 section 9).
pub const PERMITTED_ITERATIONS: RangeInclusive<u32> = 4_096..=1_000_000;

/// Octets of the salts that are made here, and the fewest of a verifier's salt.
pub const SALT_OCTETS: usize = 16;

pub(super) type HmacOutput = [u8; 32];

/// Returns whether SCRAM can use this name or secret: it is printable ASCII, which SASLprep does not change.
pub fn is_usable(text: &[u8]) -> bool {
    !text.is_empty() && text.iter().all(|octet| matches!(octet, b' '..=b'~'))
}

/// Returns the SaltedPassword of RFC 5802 section 3: one block of PBKDF2 with HMAC-SHA-256 (RFC 8018 section 5.2). 15,000
/// iterations take about 10 ms.
pub fn salted_password(secret: &[u8], salt: &[u8], iterations: u32) -> HmacOutput {
    let hmac = keyed(secret);
    let mut block = finish(&hmac, &[salt, &1_u32.to_be_bytes()]);
    let mut sum = block;
    for _ in 1..iterations {
        block = finish(&hmac, &[&block]);
        sum = xor(&sum, &block);
    }
    sum
}

/// The values that a server stores in place of a secret (RFC 5802 section 3).
#[derive(Clone, PartialEq, Eq)]
pub struct ScramVerifier {
    pub iterations: u32,
    pub salt: Vec<u8>,
    pub stored_key: [u8; 32],
    pub server_key: [u8; 32],
}

impl ScramVerifier {
    /// Returns the verifier of a secret.
    pub fn new(secret: &[u8], salt: &[u8], iterations: u32) -> ScramVerifier {
        ScramVerifier::of_salted(&salted_password(secret, salt, iterations), salt, iterations)
    }

    /// Returns the verifier of the secret with this [`salted_password`].
    pub fn of_salted(salted: &HmacOutput, salt: &[u8], iterations: u32) -> ScramVerifier {
        let (client_key, server_key) = keys(salted);
        ScramVerifier { iterations, salt: salt.to_vec(), stored_key: Sha256::digest(client_key).into(), server_key }
    }

    /// Returns a verifier that belongs to no secret, always the same for a name; its salt is that of [`stable_salt`]. `shapes`:
    /// the iterations and the octets of the salt of each account. The fake has one of these, as others would show that there
    /// is no such account. If a shape is added or removed, only names that get it, or have had it, get another one.
    pub fn fake(key: &[u8], name: &str, shapes: &BTreeSet<(u32, usize)>) -> ScramVerifier {
        let derive = |purpose: &[u8]| finish(&keyed(key), &[purpose, name.as_bytes()]);
        let weight = |shape: &&(u32, usize)| derive(format!("shape {} {} ", shape.0, shape.1).as_bytes());
        let (iterations, octets) = shapes.iter().max_by_key(weight).copied().unwrap_or((ITERATIONS, SALT_OCTETS));
        let mut salt = derive(b"salt ").to_vec();
        while salt.len() < octets {
            salt.extend(derive(format!("salt {} ", salt.len()).as_bytes()));
        }
        salt.truncate(octets);
        ScramVerifier { iterations, salt, stored_key: derive(b"stored key "), server_key: derive(b"server key ") }
    }

    /// Parses `SCRAM-SHA-256$ITERATIONS:SALT$STOREDKEY:SERVERKEY`, the last three in base64 (RFC 5803 section 4).
    ///
    /// # Errors
    /// The text is not valid: why, without any part of it.
    pub fn parse(text: &str) -> Result<ScramVerifier, String> {
        let fields = text.strip_prefix("SCRAM-SHA-256$").and_then(|rest| rest.split_once('$'));
        let fields = fields.and_then(|(head, keys)| Some((head.split_once(':')?, keys.split_once(':')?)));
        let ((iterations, salt), (stored, server)) =
            fields.ok_or("it must have the form SCRAM-SHA-256$ITERATIONS:SALT$STOREDKEY:SERVERKEY")?;
        let octets = |text: &str, what| BASE64.decode(text.as_bytes()).map_err(|_| format!("its {what} is not base64"));
        let key = |text, what| {
            HmacOutput::try_from(octets(text, what)?)
                .map_err(|key| format!("its {what} has {} octets, not 32", key.len()))
        };
        let iterations = number(iterations).filter(|number| PERMITTED_ITERATIONS.contains(number));
        let iterations = iterations.ok_or_else(|| format!("its iterations must be {}", permitted_iterations()))?;
        let salt = octets(salt, "salt")?;
        if salt.len() < SALT_OCTETS {
            return Err(format!("its salt has {} octets, fewer than {SALT_OCTETS}", salt.len()));
        }
        let (stored_key, server_key) = (key(stored, "stored key")?, key(server, "server key")?);
        Ok(ScramVerifier { iterations, salt, stored_key, server_key })
    }

    /// Whether this is the verifier of the secret with this [`salted_password`].
    pub fn is_of_salted(&self, salted: &[u8; 32]) -> bool {
        let (client_key, server_key) = keys(salted);
        same(&Sha256::digest(client_key), &self.stored_key) & same(&server_key, &self.server_key)
    }

    /// Whether the proof is from a client that knows the secret (RFC 5802 section 3).
    pub(super) fn accepts(&self, proof: &HmacOutput, auth_message: &[u8]) -> bool {
        let client_key = xor(proof, &finish(&keyed(&self.stored_key), &[auth_message]));
        same(&Sha256::digest(client_key), &self.stored_key)
    }
}

/// In the form that [`ScramVerifier::parse`] reads.
impl fmt::Display for ScramVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [salt, stored, server] = [&self.salt[..], &self.stored_key, &self.server_key].map(|key| BASE64.encode(key));
        write!(f, "SCRAM-SHA-256${}:{salt}${stored}:{server}", self.iterations)
    }
}

/// Without the keys: with them, an attacker could impersonate the server.
impl fmt::Debug for ScramVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ScramVerifier({} iterations)", self.iterations)
    }
}

/// Returns the salt of a name whose verifier is not stored. It is always the same: another salt in each exchange would show
/// that the name has no stored verifier.
pub fn stable_salt(key: &[u8], name: &str) -> [u8; SALT_OCTETS] {
    let octets = finish(&keyed(key), &[b"salt ", name.as_bytes()]);
    std::array::from_fn(|index| octets[index])
}

/// Returns a digest of a name. Without the key, the name cannot be computed from it, nor from the name's salt, which every
/// client gets.
pub fn name_digest(key: &[u8], name: &str) -> [u8; 16] {
    let octets = finish(&keyed(key), &[b"account ", name.as_bytes()]);
    std::array::from_fn(|index| octets[index])
}

/// Whether the text is a `posit-number` (RFC 5802 section 7).
pub(super) fn is_count(text: &str) -> bool {
    text.bytes().all(|octet| octet.is_ascii_digit()) && text.starts_with(|digit| matches!(digit, '1'..='9'))
}

pub(super) fn number(text: &str) -> Option<u32> {
    Some(text).filter(|text| is_count(text))?.parse().ok()
}

pub(super) fn permitted_iterations() -> String {
    format!("{} to {}", PERMITTED_ITERATIONS.start(), PERMITTED_ITERATIONS.end())
}

/// ClientKey and ServerKey (RFC 5802 section 3).
pub(super) fn keys(salted: &HmacOutput) -> (HmacOutput, HmacOutput) {
    let hmac = keyed(salted);
    (finish(&hmac, &[b"Client Key"]), finish(&hmac, &[b"Server Key"]))
}

pub(super) fn keyed(key: &[u8]) -> Hmac<Sha256> {
    Hmac::new_from_slice(key).expect("RFC 2104: a key may have any length")
}

pub(super) fn finish(keyed: &Hmac<Sha256>, data: &[&[u8]]) -> HmacOutput {
    let mut hmac = keyed.clone();
    data.iter().for_each(|data| hmac.update(data));
    hmac.finalize().into_bytes().into()
}

pub(super) fn xor(left: &HmacOutput, right: &HmacOutput) -> HmacOutput {
    std::array::from_fn(|index| left[index] ^ right[index])
}

/// Compares two values of the same length, in a time that does not depend on them.
pub(super) fn same(left: &[u8], right: &[u8]) -> bool {
    bool::from(left.ct_eq(right))
}
