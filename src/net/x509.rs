//! The version and the public key of a certificate (RFC 5280 section 4.1), read from its DER (ITU-T X.690).
//!
//! webpki reads certificates of version 3 only. If a pin or a file trusts a certificate itself, and not its issuer, the
//! handshake needs its key only, so its version does not matter.

/// The parts of a certificate that this program reads.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Certificate<'a> {
    /// 1 to 3.
    pub(super) version: u8,
    /// Whether the issuer and the subject are the same (RFC 5280 section 3.2).
    pub(super) self_issued: bool,
    /// The end of its validity: `YYMMDDHHMMSSZ`, or from 2050 on `YYYYMMDDHHMMSSZ` (RFC 5280 section 4.1.2.5).
    pub(super) not_after: &'a [u8],
    /// The SubjectPublicKeyInfo with its tag: a pin of the key has the SHA-256 of these octets.
    pub(super) public_key: &'a [u8],
}

/// The parts of a SubjectPublicKeyInfo.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct PublicKey<'a> {
    /// The AlgorithmIdentifier without its outer SEQUENCE.
    pub(super) algorithm: &'a [u8],
    /// The content of the BIT STRING.
    pub(super) key: &'a [u8],
}

const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;
const SEQUENCE: u8 = 0x30;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
/// `[0] EXPLICIT`.
const VERSION: u8 = 0xa0;

impl Certificate<'_> {
    /// Reads a certificate up to its key; `None`: the octets are not a certificate.
    pub(super) fn read(der: &[u8]) -> Option<Certificate<'_>> {
        let certificate = Elements(der).next(SEQUENCE)?.content;
        let mut fields = Elements(Elements(certificate).next(SEQUENCE)?.content);
        let version = match fields.next(VERSION) {
            // Version 1 is the default, which DER omits.
            None => 1,
            Some(version) => match Elements(version.content).next(INTEGER)?.content {
                [number @ 0..=2] => number + 1,
                _ => return None,
            },
        };
        fields.next(INTEGER)?; // serialNumber
        fields.next(SEQUENCE)?; // signature
        let issuer = fields.next(SEQUENCE)?.whole;
        let mut validity = Elements(fields.next(SEQUENCE)?.content);
        let mut time = || validity.next(UTC_TIME).or_else(|| validity.next(GENERALIZED_TIME));
        time()?; // notBefore
        let not_after = time()?.content;
        let self_issued = fields.next(SEQUENCE)?.whole == issuer;
        Some(Certificate { version, self_issued, not_after, public_key: fields.next(SEQUENCE)?.whole })
    }

    /// The end of its validity in the form of RFC 3339; `None`: it is not a valid time.
    pub(super) fn until(&self) -> Option<String> {
        let text = std::str::from_utf8(self.not_after).ok()?;
        let text = match text.len() {
            // RFC 5280 section 4.1.2.5.1.
            13 if text.is_ascii() => format!("{}{text}", if &text[..2] < "50" { "20" } else { "19" }),
            15 if text.is_ascii() => text.to_owned(),
            _ => return None,
        };
        let part = |from: usize, length: usize| &text[from..from + length];
        let (date, time) = ((part(0, 4), part(4, 2), part(6, 2)), (part(8, 2), part(10, 2), part(12, 3)));
        Some(format!("{}-{}-{}T{}:{}:{}", date.0, date.1, date.2, time.0, time.1, time.2))
    }
}

impl PublicKey<'_> {
    /// Reads a SubjectPublicKeyInfo; `None`: the octets are not one.
    pub(super) fn read(der: &[u8]) -> Option<PublicKey<'_>> {
        let mut parts = Elements(Elements(der).next(SEQUENCE)?.content);
        let algorithm = parts.next(SEQUENCE)?.content;
        match parts.next(BIT_STRING)?.content {
            // 0: all bits of the last octet are used.
            [0, key @ ..] => Some(PublicKey { algorithm, key }),
            _ => None,
        }
    }
}

/// DER elements, one after the other.
struct Elements<'a>(&'a [u8]);

struct Element<'a> {
    /// With its tag and length.
    whole: &'a [u8],
    content: &'a [u8],
}

impl<'a> Elements<'a> {
    /// Removes and returns the next element if it has this tag.
    fn next(&mut self, tag: u8) -> Option<Element<'a>> {
        let [first, length, rest @ ..] = self.0 else { return None };
        let (header, length) = match *length {
            length @ ..=0x7f => (2, usize::from(length)),
            // Two octets of length are enough: rustls rejects certificates of 64 KiB and more.
            count @ 0x81..=0x82 => {
                let count = usize::from(count & 0x7f);
                let octets = rest.get(..count)?;
                (2 + count, octets.iter().fold(0, |length, octet| length << 8 | usize::from(*octet)))
            }
            _ => return None,
        };
        let whole = self.0.get(..header + length).filter(|_| *first == tag)?;
        self.0 = &self.0[whole.len()..];
        Some(Element { whole, content: &whole[header..] })
    }
}
