//! The messages of SCRAM in a transcript, which depend on each other and on the connection (RFC 5802).
//!
//! `{scram: TEXT}` in a line of either party is the base64 of TEXT, in which
//!
//! - `<proof SECRET>` is the proof of a client that knows the secret, for this message and the two before it;
//! - `<signature SECRET>` is the signature of a server that knows it, for the three messages before;
//! - `<bound TEXT>` is the base64 of TEXT and the channel binding of this connection (RFC 9266).

use data_encoding::BASE64;
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

/// The messages of an exchange, in the order of the dialogue.
#[derive(Default)]
pub struct Messages(Vec<String>);

impl Messages {
    /// The line with its messages in base64. `exporter`: the channel binding of the connection.
    pub fn expand(&mut self, line: &str, exporter: &dyn Fn() -> Option<[u8; 32]>) -> String {
        let Some((head, rest)) = line.split_once("{scram: ") else { return line.to_owned() };
        let Some((text, tail)) = rest.split_once('}') else { return line.to_owned() };
        let bound = |words: &str| {
            let binding = exporter().expect("TLS 1.3");
            BASE64.encode(&[words.as_bytes(), &binding].concat())
        };
        let text = replaced(text, "bound", bound);
        if ["n", "y", "p=", "x"].iter().any(|flag| text.starts_with(&format!("{flag},")) || text.starts_with("p=tls")) {
            self.0.clear();
        }
        let text = replaced(&text, "proof", |secret| {
            let without_proof = text.split(",p=").next().unwrap_or_default();
            let (client_key, _) = self.keys(secret);
            let signature = hmac(&Sha256::digest(client_key), &self.signed(without_proof));
            BASE64.encode(&std::array::from_fn::<u8, 32, _>(|index| client_key[index] ^ signature[index]))
        });
        let text = replaced(&text, "signature", |secret| {
            let without_proof = self.0.get(2).and_then(|last| last.split(",p=").next()).unwrap_or_default();
            BASE64.encode(&hmac(&self.keys(secret).1, &self.signed(without_proof)))
        });
        self.0.push(text.clone());
        format!("{head}{}{tail}", BASE64.encode(text.as_bytes()))
    }

    /// What both sides sign.
    fn signed(&self, without_proof: &str) -> Vec<u8> {
        let first = self.0.first().and_then(|first| first.splitn(3, ',').nth(2)).unwrap_or_default();
        let second = self.0.get(1).map(String::as_str).unwrap_or_default();
        format!("{first},{second},{without_proof}").into_bytes()
    }

    /// The client's key and the server's.
    fn keys(&self, secret: &str) -> ([u8; 32], [u8; 32]) {
        let second = self.0.get(1).map(String::as_str).unwrap_or_default();
        let attribute = |name: &str| second.split(',').find_map(|attribute| attribute.strip_prefix(name));
        let salt = attribute("s=").and_then(|salt| BASE64.decode(salt.as_bytes()).ok()).expect("a salt");
        let iterations: u32 = attribute("i=").and_then(|count| count.parse().ok()).expect("a count");
        let mut block = hmac(secret.as_bytes(), &[&salt[..], &[0, 0, 0, 1]].concat());
        let mut salted = block;
        for _ in 1..iterations {
            block = hmac(secret.as_bytes(), &block);
            salted = std::array::from_fn(|index| salted[index] ^ block[index]);
        }
        (hmac(&salted, b"Client Key"), hmac(&salted, b"Server Key"))
    }
}

/// The text in which `<word REST>` is replaced by what `with` returns for REST.
fn replaced(text: &str, word: &str, with: impl Fn(&str) -> String) -> String {
    let Some((head, rest)) = text.split_once(&format!("<{word} ")) else { return text.to_owned() };
    let (argument, tail) = rest.split_once('>').expect("a > at the end");
    format!("{head}{}{tail}", with(argument))
}

fn hmac(key: &[u8], data: &[u8]) -> [u8; 32] {
    let mut hmac = Hmac::<Sha256>::new_from_slice(key).expect("a key of any length");
    hmac.update(data);
    hmac.finalize().into_bytes().into()
}
