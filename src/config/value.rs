//! Single values of the configuration: which texts and numbers are valid, and what to write instead of an invalid one.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use toml::de::DeValue;

use crate::mail::address::{Domain, Mailbox};
use crate::net::pin::Pin;
use crate::recipients::AddressPattern;
use crate::sasl::{Mechanism, ScramVerifier};
use crate::session::TlsMode;
use crate::smtp::client::Without8BitMime;

/// A kind of values: which are valid, and how one is read.
pub(super) trait ValueKind<T> {
    /// Returns the checked value.
    ///
    /// # Errors
    ///
    /// The mistake in the value, and the remedy.
    fn read(&self, value: &DeValue<'_>) -> Result<T, String>;
}

/// A value that is written as a string.
pub(super) struct Text<T> {
    /// The expected text, for the error about a value of another type.
    expected: &'static str,
    /// Whether a number without quotes is accepted too.
    number: bool,
    parse: fn(&str) -> Result<T, String>,
}

impl<T> Text<T> {
    pub(super) const fn new(expected: &'static str, parse: fn(&str) -> Result<T, String>) -> Text<T> {
        Text { expected, number: false, parse }
    }

    pub(super) fn parse(&self, text: &str) -> Result<T, String> {
        (self.parse)(text)
    }
}

impl<T> ValueKind<T> for Text<T> {
    fn read(&self, value: &DeValue<'_>) -> Result<T, String> {
        match (value, integer(value)) {
            (DeValue::String(text), _) => self.parse(text),
            (_, Some(number)) if self.number => self.parse(&number.to_string()),
            // The number may be a secret without quotes, so the error must not contain it.
            (DeValue::Integer(_) | DeValue::Float(_), _) => {
                Err(format!("this is a number, expected {}", self.expected))
            }
            _ => Err(wrong_type(value, self.expected)),
        }
    }
}

/// `true` or `false`.
pub(super) struct Flag;

impl ValueKind<bool> for Flag {
    fn read(&self, value: &DeValue<'_>) -> Result<bool, String> {
        value.as_bool().ok_or_else(|| wrong_type(value, "true or false"))
    }
}

/// A whole number within bounds; `u32::MAX` means no upper bound.
impl ValueKind<usize> for RangeInclusive<u32> {
    fn read(&self, value: &DeValue<'_>) -> Result<usize, String> {
        let (least, most) = (*self.start(), *self.end());
        let bounds = match most {
            u32::MAX => format!("a whole number, {least} or more"),
            _ => format!("a whole number from {least} to {most}"),
        };
        match integer(value) {
            None => Err(wrong_type(value, &bounds)),
            Some(number) if number < i64::from(least) => Err(format!("{number} is too small: write {least} or more")),
            Some(number) if most != u32::MAX && number > i64::from(most) => {
                Err(format!("{number} is too large: write {most} or less"))
            }
            Some(number) => usize::try_from(number).map_err(|error| error.to_string()),
        }
    }
}

fn integer(value: &DeValue<'_>) -> Option<i64> {
    let number = value.as_integer()?;
    i64::from_str_radix(number.as_str(), number.radix()).ok()
}

/// The error text about a value of another type than `expected`.
pub(super) fn wrong_type(value: &DeValue<'_>, expected: &str) -> String {
    let found = match value {
        DeValue::String(text) => format!("string {text:?}"),
        DeValue::Integer(number) => format!("integer `{number}`"),
        DeValue::Float(number) => format!("floating point `{number}`"),
        DeValue::Boolean(flag) => format!("boolean `{flag}`"),
        other => other.type_str().to_owned(),
    };
    format!("invalid type: {found}, expected {expected}")
}

pub(super) const HOSTNAME: Text<String> = Text::new("a host name such as \"mail.example.org\"", |text| {
    let domain = Domain::parse(text).filter(|_| !looks_like_ipv4(text));
    let domain =
        domain.ok_or_else(|| format!("{text:?} is not a valid host name: write one such as \"mail.example.org\""))?;
    // RFC 5321 section 4.1.2: names in SMTP are ASCII, so a name in Unicode becomes its A-labels. Others stay as they are
    // spelled.
    Ok(if text.is_ascii() { text } else { domain.as_str() }.to_owned())
});

/// The error text if `hostname` is missing.
pub(super) const HOSTNAME_MISSING: &str =
    "`hostname` is missing: the name of this machine in the DNS, such as hostname = \"mail.example.org\"";

pub(super) const DOMAIN: Text<Domain> = Text::new("a domain such as \"example.org\"", |text| {
    let domain = Domain::parse(text)
        .ok_or_else(|| format!("{text:?} is not a valid domain: write one such as \"example.org\""))?;
    // RFC 2645 section 5.2.1: ATRN cannot name a domain without a dot.
    if !domain.as_str().contains('.') {
        return Err(format!(
            "{text:?} has no dot, and mail and ATRN need a domain in full: write one such as \"example.org\""
        ));
    }
    Ok(domain)
});

/// The name of a host or a domain elsewhere. Unlike a domain that is held here, it may have `_`, as names in the DNS have.
pub(super) fn domain_elsewhere(text: &str) -> Option<Domain> {
    let is_label = |label: &str| {
        !label.is_empty() && label.bytes().all(|octet| octet.is_ascii_alphanumeric() || matches!(octet, b'-' | b'_'))
    };
    Domain::parse(text)
        .or_else(|| Domain::parse_any(text).ok().filter(|domain| domain.as_str().split('.').all(is_label)))
}

/// A path as written: absolute, or relative to the directory of the file.
pub(super) const PATH: Text<PathBuf> = Text::new("a path in quotes", |text| {
    if text.is_empty() || text.contains('\0') {
        return Err(format!(
            "{text:?} is not a valid path: write that of a file or directory, absolute or relative to this file"
        ));
    }
    Ok(PathBuf::from(text))
});

pub(super) const ACCOUNT_NAME: Text<String> = Text::new("a login name in quotes", |text| {
    if text.is_empty() {
        return Err("the login name is empty: write the one that the provider gave you".to_owned());
    }
    if text.chars().any(char::is_control) {
        return Err(format!("the login name {text:?} has a control character in it: write letters and digits"));
    }
    Ok(text.to_owned())
});

pub(super) const SECRET: Text<Vec<u8>> = Text::new("a secret in quotes", |text| {
    check_secret(text.as_bytes()).map_err(|text| format!("the secret {text}"))?;
    Ok(text.into())
});

/// Rejects a secret that is empty, or not one line of text.
pub(super) fn check_secret(secret: &[u8]) -> Result<(), &'static str> {
    if secret.is_empty() {
        return Err("is empty, so that any client could log in: write the secret that both sides agreed on");
    }
    if secret.iter().any(u8::is_ascii_control) {
        return Err("has more than one line, or a control character, in it: a secret is one line of text");
    }
    Ok(())
}

/// The verifier that SCRAM stores in place of a secret. The error does not contain it.
pub(super) const VERIFIER: Text<ScramVerifier> = Text::new("a verifier as `odmr secret` prints it", |text| {
    ScramVerifier::parse(text).map_err(|error| {
        format!(
            "this is not a valid verifier, as {error}: run `odmr secret NAME -c FILE`, which writes one here, or \
             `odmr secret`, which prints one"
        )
    })
});

/// The name of a mechanism.
pub(super) const MECHANISM: Text<Mechanism> = Text::new("a mechanism such as \"SCRAM-SHA-256\"", |text| {
    Mechanism::parse(text.as_bytes()).ok_or_else(|| {
        let names = Mechanism::ALL.map(|mechanism| format!("\"{mechanism}\"")).join(", ");
        format!("{text:?} is not a mechanism of this program: write one or more of {names}")
    })
});

/// An address to listen on. Without a host: all addresses of this machine.
pub(super) const LISTENER: Text<SocketAddr> = Text::new("an address and a port such as \"[::]:366\"", |text| {
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    let write =
        "write an address and a port, such as \"192.0.2.1:366\", \"[2001:db8::1]:366\", or \"[::]:366\" for all";
    if text.parse::<IpAddr>().is_ok() {
        return Err(format!("{text:?} has no port: {write}"));
    }
    if let Some(port) = text.strip_prefix(':') {
        return Ok(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port_number(port)?)));
    }
    let host = text.rsplit_once(':').map_or(text, |(host, _)| host);
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    if bare.parse::<IpAddr>().is_ok() || Domain::parse(host).is_none() || looks_like_ipv4(host) {
        return Err(format!("{text:?} is not a valid address with a port: {write}"));
    }
    Err(format!("{text:?} is a name, and a listener needs an address, as the address of a name may change: {write}"))
});

/// A host to connect to.
pub(super) struct HostPort {
    /// `host:port`, `192.0.2.1:port` or `[2001:db8::1]:port`.
    pub(super) address: String,
    /// The host of `address`, without brackets.
    pub(super) host: String,
}

/// A host to connect to; `PORT`: the default port.
pub(super) const fn host_port<const PORT: u16>() -> Text<HostPort> {
    let expected = match PORT {
        587 => "a host and a port such as \"smtp.example.net:587\"",
        _ => "a host and a port such as \"relay.example.net:366\"",
    };
    Text::new(expected, |text| {
        if text.contains("//") {
            return Err(format!("{text:?} is a URL: write HOST or HOST:PORT, such as \"relay.example.net:{PORT}\""));
        }
        let wrong = || {
            format!(
                "{text:?} is not a valid host with a port: write \"relay.example.net:{PORT}\", \"192.0.2.1:{PORT}\" or \
                 \"[2001:db8::1]:{PORT}\""
            )
        };
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (host, port) = rest.split_once(']').ok_or_else(wrong)?;
                let host: Ipv6Addr = host.parse().map_err(|_| wrong())?;
                let port = if port.is_empty() { None } else { Some(port.strip_prefix(':').ok_or_else(wrong)?) };
                (host.to_string(), port)
            }
            None if text.parse::<Ipv6Addr>().is_ok() => {
                return Err(format!(
                    "{text:?} needs brackets to tell the port from the address: write \"[{text}]:{PORT}\""
                ));
            }
            None => {
                let (host, port) = text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port)));
                if looks_like_ipv4(host) && host.parse::<Ipv4Addr>().is_err() {
                    return Err(wrong());
                }
                (domain_elsewhere(host).ok_or_else(wrong)?.as_str().to_owned(), port)
            }
        };
        let port = port.map_or(Ok(PORT), port_number)?;
        if port == 0 {
            return Err(format!("no host listens on port 0, as in {text:?}: write the host's, mostly {PORT}"));
        }
        let address = if text.starts_with('[') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        Ok(HostPort { address, host })
    })
}

const PORT_EXPECTED: &str = "a number from 1 to 65535";

/// A port to connect to.
pub(super) const PORT_NUMBER: Text<u16> = Text {
    expected: PORT_EXPECTED,
    number: true,
    parse: |text| {
        let port = port_number(text).ok().filter(|&port| port != 0);
        port.ok_or_else(|| format!("{text:?} is not a valid port to connect to: write {PORT_EXPECTED}"))
    },
};

pub(super) const RESOLVER: Text<SocketAddr> = Text::new("an address and a port such as \"127.0.0.1:53\"", |text| {
    // RFC 1035 section 4.2: the port of DNS servers is 53.
    let plain = text.parse::<IpAddr>().map(|address| SocketAddr::from((address, 53)));
    let address = plain.or_else(|_| text.parse()).ok().filter(|address| address.port() != 0);
    address.ok_or_else(|| {
        format!(
            "{text:?} is not a valid address of a DNS server: write an address and a port, such as \"127.0.0.1:53\" or \
             \"[2001:db8::1]:53\""
        )
    })
});

/// The machines of a network: `192.0.2.0/24`, `2001:db8::/32`, or one address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Network(IpNet);

impl Network {
    /// Whether an address is in the network. An IPv4 address that is mapped into IPv6 (RFC 4291 section 2.5.5.2), as it has
    /// on a socket for both, counts as the IPv4 address.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(&address.to_canonical())
    }
}

impl fmt::Display for Network {
    /// In the form of the file.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.prefix_len() == self.0.max_prefix_len() {
            true => self.0.addr().fmt(f),
            false => self.0.fmt(f),
        }
    }
}

pub(super) const NETWORK: Text<Network> = Text::new("a network such as \"192.168.1.0/24\"", |text| {
    let wrong = || {
        format!(
            "{text:?} is not a valid network: write one such as \"192.168.1.0/24\" or \"fd00::/8\", or a single address"
        )
    };
    let (address, prefix) = text.split_once('/').map_or((text, None), |(address, prefix)| (address, Some(prefix)));
    let address: IpAddr = address.parse().map_err(|_| wrong())?;
    let network = match prefix {
        None => IpNet::from(address),
        Some(digits) => {
            let prefix = digits.parse().ok().filter(|_| digits.bytes().all(|digit| digit.is_ascii_digit()));
            prefix.and_then(|prefix| IpNet::new(address, prefix).ok()).ok_or_else(wrong)?
        }
    };
    // A network of mapped addresses would be empty, as `contains` compares IPv4 addresses.
    if address.to_canonical() != address {
        return Err(wrong());
    }
    if network.network() != address {
        let whole = network.trunc();
        return Err(format!(
            "{text:?} is a machine and a network in one: write \"{whole}\" for the network, or \"{address}\" for the \
             machine"
        ));
    }
    Ok(Network(network))
});

fn port_number(text: &str) -> Result<u16, String> {
    let digits = text.bytes().all(|digit| digit.is_ascii_digit());
    let port = text.parse().ok().filter(|_| digits);
    port.ok_or_else(|| format!("{text:?} is not a valid port: write a number from 0 to 65535"))
}

/// Whether a text has the form of an IPv4 address. `192.0.2.256` is a valid domain, but was meant as an address.
fn looks_like_ipv4(host: &str) -> bool {
    host.bytes().all(|octet| octet.is_ascii_digit() || octet == b'.')
}

const TLS_MODES: &str = "\"starttls\", \"implicit\" or \"none\"";

pub(super) const TLS_MODE: Text<TlsMode> = Text::new(TLS_MODES, |text| match text {
    "starttls" => Ok(TlsMode::StartTls),
    "implicit" => Ok(TlsMode::Implicit),
    "none" => Ok(TlsMode::None),
    _ => Err(format!("{text:?} is not a valid TLS mode: write {TLS_MODES}")),
});

/// The SHA-256 digest of a certificate, or of its key.
pub(super) const PIN: Text<Pin> = Text::new("a fingerprint such as \"sha256:0123…\"", |text| {
    Pin::parse(text).ok_or_else(|| {
        format!(
            "{text:?} is not a valid fingerprint: write \"sha256:\" and 64 hexadecimal digits, with or without \
             colons, as `openssl x509 -in FILE -noout -fingerprint -sha256` shows them; or \"spki-sha256:\" and the \
             digits of the key, which survives renewals: `openssl x509 -in FILE -noout -pubkey | openssl pkey -pubin \
             -outform der | openssl sha256`"
        )
    })
});

/// An address whose host is a domain, not an address literal.
pub(super) fn address_with_domain(text: &str) -> Option<Mailbox> {
    Mailbox::parse(text).filter(|mailbox| mailbox.domain().is_some()).map(|mailbox| mailbox.canonical())
}

const WITHOUT_8BITMIME_EXPECTED: &str = "\"send\" or \"bounce\"";

/// The value of `without-8bitmime`: what to do with 8-bit content if a peer does not offer 8BITMIME.
pub(super) const WITHOUT_8BITMIME: Text<Without8BitMime> = Text::new(WITHOUT_8BITMIME_EXPECTED, |text| match text {
    "send" => Ok(Without8BitMime::Send),
    "bounce" => Ok(Without8BitMime::Bounce),
    _ => Err(format!("{text:?} is not a valid way to treat 8-bit content: write {WITHOUT_8BITMIME_EXPECTED}")),
});

/// An entry of `accept`: an address, or each address of a domain.
pub(super) struct Accepted {
    pub(super) pattern: AddressPattern,
    /// For errors: `alice@example.org` or `@example.org`, spelled as in the file.
    pub(super) shown: String,
}

const ACCEPTED_EXPECTED: &str = "an address such as \"alice@example.org\", or \"@example.org\" for a whole domain";

pub(super) const ACCEPTED: Text<Accepted> = Text::new(ACCEPTED_EXPECTED, |text| {
    if let Some(domain) = text.strip_prefix('@') {
        let pattern = AddressPattern::Domain(DOMAIN.parse(domain)?);
        return Ok(Accepted { shown: pattern.to_string(), pattern });
    }
    let accepted = Mailbox::parse(text).and_then(|mailbox| {
        Some(Accepted { pattern: AddressPattern::of(&mailbox)?, shown: mailbox.canonical().to_string() })
    });
    accepted.ok_or_else(|| format!("{text:?} is not a valid address: write {ACCEPTED_EXPECTED}"))
});

/// The default limit of a message's size, in octets.
pub(super) const MAX_SIZE: u64 = 50 * 1024 * 1024;

/// A number of octets, at least 1.
pub(super) const SIZE: Text<u64> = Text {
    expected: "a size such as \"50MiB\"",
    number: true,
    parse: |text| {
        let write = "write a whole number of octets, or of KiB, MiB or GiB, such as \"50MiB\"";
        let (number, unit) = number_and_unit(text);
        let shift = [("", 0), ("KiB", 10), ("MiB", 20), ("GiB", 30)].into_iter().find(|(name, _)| *name == unit);
        let (Some(number), Some((_, shift))) = (number, shift) else {
            return Err(format!("{text:?} is not a valid size: {write}"));
        };
        // Offsets in files are `i64`, so a larger size cannot be stored.
        match number.checked_mul(1 << shift).filter(|size| i64::try_from(*size).is_ok()) {
            None => Err(format!("{text:?} is too large: {write}")),
            Some(0) => Err(format!("with a size of {text:?} no message would be accepted: {write}")),
            Some(size) => Ok(size),
        }
    },
};

/// A number of octets, or 0 for no limit.
pub(super) const SIZE_OR_NONE: Text<u64> = Text {
    expected: "a size such as \"50MiB\", or 0",
    number: true,
    parse: |text| if text == "0" { Ok(0) } else { SIZE.parse(text) },
};

/// The longest time. `Instant` may not be able to represent the deadline of a longer one.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// A time, from 1 ms to 365 days.
pub(super) const DURATION: Text<Duration> = Text::new("a time such as \"5m\"", |text| {
    let write = "write a whole number of ms, s, m, h or d, such as \"90s\" or \"5m\"";
    let (number, unit) = number_and_unit(text);
    let milliseconds = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60 * 1000,
        "h" => 60 * 60 * 1000,
        "d" => 24 * 60 * 60 * 1000,
        "" if number.is_some() => return Err(format!("{text:?} has no unit: {write}")),
        _ => return Err(format!("{text:?} is not a valid time: {write}")),
    };
    let number = number.ok_or_else(|| format!("{text:?} is not a valid time: {write}"))?;
    match Duration::from_millis(number.saturating_mul(milliseconds)) {
        Duration::ZERO => Err(format!("{text:?} would wait for nothing: {write}")),
        time if time > LONGEST => Err(format!("{text:?} is longer than a year: {write}")),
        time => Ok(time),
    }
});

/// A time, or zero.
pub(super) const DURATION_OR_NONE: Text<Duration> = Text::new("a time such as \"2d\", or \"0s\"", |text| match text {
    "0ms" | "0s" | "0m" | "0h" | "0d" => Ok(Duration::ZERO),
    _ => DURATION.parse(text),
});

/// Reads a time, such as `4h`, from the command line: from 1 ms to 365 days.
///
/// # Errors
/// The mistake in the text, and the remedy.
pub fn duration(text: &str) -> Result<Duration, String> {
    DURATION.parse(text)
}

/// A time, or `never`.
pub(super) const NEVER_OR_LATER: Text<Option<Duration>> = Text::new("a time such as \"4h\", or \"never\"", |text| {
    if text == "never" {
        return Ok(None);
    }
    DURATION.parse(text).map(Some).map_err(|text| format!("{text}, or \"never\""))
});

/// The time after which held mail expires, from 1 s to 90 days, or never.
pub(super) const EXPIRY: Text<Option<Duration>> = Text::new("a time such as \"14d\", or \"never\"", |text| {
    let most = Duration::from_secs(90 * 24 * 60 * 60);
    match NEVER_OR_LATER.parse(text)? {
        Some(time) if time < Duration::from_secs(1) => Err(format!("{text:?} is too short: write \"1s\" or more")),
        Some(time) if time > most => Err(format!("{text:?} is too long: write \"90d\" or less, or \"never\"")),
        time => Ok(time),
    }
});

/// Divides `50MiB` into 50 and `MiB`. A number that is too large becomes `u64::MAX`.
fn number_and_unit(text: &str) -> (Option<u64>, &str) {
    let (number, unit) = text.split_at(text.bytes().take_while(u8::is_ascii_digit).count());
    // Callers reject `u64::MAX`.
    ((!number.is_empty()).then(|| number.parse().unwrap_or(u64::MAX)), unit)
}

/// The name of a user or a group of this machine.
pub(super) const SYSTEM_NAME: Text<String> = Text::new("the name of a user or group, such as \"vmail\"", |text| {
    let plain = |octet: u8| octet.is_ascii_graphic() && !matches!(octet, b':' | b'/');
    match !text.is_empty() && text.bytes().all(plain) {
        true => Ok(text.to_owned()),
        false => Err(format!("{text:?} is not a valid name of a user or group: write one such as \"vmail\"")),
    }
});

#[cfg(test)]
mod tests;
