//! Pins: the digest of a certificate or of a key that is trusted.

use std::fmt;

use data_encoding::{BASE64, HEXLOWER, HEXLOWER_PERMISSIVE};

use crate::sasl::CertificateDigests;

/// The SHA-256 digest of the certificate that the peer must present, or of its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pin {
    /// `sha256:`, of the DER form of the certificate.
    Certificate([u8; 32]),
    /// `spki-sha256:`, of the DER form of its SubjectPublicKeyInfo, which is the same after a renewal with the same key.
    Key([u8; 32]),
}

impl Pin {
    /// Parses a pin: its kind, a colon, and the digest in hexadecimal, with or without colons, or in base64; `None`: the text
    /// is not a pin.
    pub fn parse(text: &str) -> Option<Pin> {
        let (kind, digits) = text.split_once(':')?;
        let octets = HEXLOWER_PERMISSIVE.decode(digits.replace(':', "").as_bytes());
        let octets = octets.or_else(|_| BASE64.decode(digits.as_bytes())).ok()?.try_into().ok()?;
        match kind.to_ascii_lowercase().as_str() {
            "sha256" => Some(Pin::Certificate(octets)),
            "spki-sha256" => Some(Pin::Key(octets)),
            _ => None,
        }
    }

    /// Whether this is a pin of the certificate or of its key.
    pub fn is_of(&self, certificate: &CertificateDigests) -> bool {
        match self {
            Pin::Certificate(pin) => *pin == certificate.certificate,
            Pin::Key(pin) => *pin == certificate.key,
        }
    }
}

/// As [`Pin::parse`] reads it, in lower-case hexadecimal.
impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, digest) = match self {
            Pin::Certificate(digest) => ("sha256", digest),
            Pin::Key(digest) => ("spki-sha256", digest),
        };
        write!(f, "{kind}:{}", HEXLOWER.encode(digest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_is_read_in_each_form_that_tools_print() {
        let digits = "0123456789abcdef".repeat(4);
        let octets: [u8; 32] = HEXLOWER.decode(digits.as_bytes()).unwrap().try_into().unwrap();
        let upper = digits.to_uppercase();
        let colons: Vec<_> = upper.as_bytes().chunks(2).map(|pair| str::from_utf8(pair).unwrap()).collect();
        for text in [digits.clone(), upper.clone(), colons.join(":"), BASE64.encode(&octets)] {
            assert_eq!(Pin::parse(&format!("sha256:{text}")), Some(Pin::Certificate(octets)), "{text}");
            assert_eq!(Pin::parse(&format!("SPKI-SHA256:{text}")), Some(Pin::Key(octets)), "{text}");
        }
        for wrong in ["", &digits, &format!("sha1:{digits}"), &format!("sha256:{digits}00"), "sha256:", "spki-sha256:!"]
        {
            assert_eq!(Pin::parse(wrong), None, "{wrong}");
        }
        let pin = Pin::Key(octets);
        assert_eq!(Pin::parse(&pin.to_string()), Some(pin));
    }

    #[test]
    fn each_kind_is_compared_with_its_own_digest() {
        let certificate = CertificateDigests { certificate: [1; 32], key: [2; 32] };
        assert!(Pin::Certificate([1; 32]).is_of(&certificate) && Pin::Key([2; 32]).is_of(&certificate));
        assert!(!Pin::Certificate([2; 32]).is_of(&certificate) && !Pin::Key([1; 32]).is_of(&certificate));
    }
}
