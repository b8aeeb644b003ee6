//! Single values of the configuration: strings and numbers.

use std::fmt;
use std::marker::PhantomData;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use data_encoding::HEXLOWER_PERMISSIVE;
use ipnet::IpNet;
use serde::de::{Error as _, Visitor};
use serde::{Deserialize, Deserializer};

use super::source::{ConfigError, Source};
use crate::mail::address::{Domain, Mailbox};
use crate::recipients::AddressPattern;
use crate::session::TlsMode;
use crate::smtp::limits;

/// A value that is written as a string. It is parsed while TOML is read, so that TOML adds the line to the error.
pub(super) struct Checked<T>(pub(super) T);

pub(super) trait Parse: Sized {
    /// What it should be, for the error about a value that is not a string.
    const EXPECTED: &'static str;
    fn parse(text: &str) -> Result<Self, String>;
    /// Whether it may be written as a number, too.
    const NUMBER: bool = false;
}

impl<'de, T: Parse> Deserialize<'de> for Checked<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Checked<T>, D::Error> {
        deserializer.deserialize_any(CheckedVisitor(PhantomData)).map(Checked)
    }
}

struct CheckedVisitor<T>(PhantomData<T>);

impl<T: Parse> Visitor<'_> for CheckedVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(T::EXPECTED)
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<T, E> {
        T::parse(text).map_err(E::custom)
    }

    fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<T, E> {
        if T::NUMBER {
            return self.visit_str(&number.to_string());
        }
        // The error must not repeat the number: it may be a secret without quotes.
        Err(E::custom(format!("a number stands here, expected {}", T::EXPECTED)))
    }
}

pub(super) struct Hostname(pub(super) String);

impl Parse for Hostname {
    const EXPECTED: &'static str = "a host name such as \"mail.example.org\"";

    fn parse(text: &str) -> Result<Hostname, String> {
        let domain = Domain::parse(text).filter(|_| !looks_like_ipv4(text));
        let domain =
            domain.ok_or_else(|| format!("{text:?} is no host name: write one such as \"mail.example.org\""))?;
        // The owner chooses the case. A name that is not ASCII cannot be sent in SMTP, so it becomes its A-labels.
        let name = if text.is_ascii() { text } else { domain.as_str() };
        Ok(Hostname(name.to_owned()))
    }
}

/// The mandatory `hostname`.
pub(super) fn hostname(source: &Source, hostname: Option<Checked<Hostname>>) -> Result<String, ConfigError> {
    let hostname = hostname.ok_or_else(|| {
        let text = "`hostname` is missing: the name of this machine in the DNS, such as \
                    hostname = \"mail.example.org\"";
        source.error(None, text)
    })?;
    Ok(hostname.0.0)
}

impl Parse for Domain {
    const EXPECTED: &'static str = "a domain such as \"example.org\"";

    fn parse(text: &str) -> Result<Domain, String> {
        let domain =
            Domain::parse(text).ok_or_else(|| format!("{text:?} is no domain: write one such as \"example.org\""))?;
        // RFC 2645 section 5.2.1: ATRN cannot name a domain without a dot.
        if !domain.as_str().contains('.') {
            return Err(format!(
                "{text:?} has no dot, and mail and ATRN need a domain in full: write one such as \"example.org\""
            ));
        }
        Ok(domain)
    }
}

impl Parse for PathBuf {
    const EXPECTED: &'static str = "a path in quotes";

    fn parse(text: &str) -> Result<PathBuf, String> {
        if text.is_empty() || text.contains('\0') {
            return Err(format!(
                "{text:?} is no path: write that of a file or directory, absolute or relative to this file"
            ));
        }
        Ok(PathBuf::from(text))
    }
}

pub(super) struct AccountName(pub(super) String);

impl Parse for AccountName {
    const EXPECTED: &'static str = "a login name in quotes";

    fn parse(text: &str) -> Result<AccountName, String> {
        if text.is_empty() {
            return Err("the login name is empty: write the one the provider gave you".to_owned());
        }
        if text.chars().any(char::is_control) {
            return Err(format!("the login name {text:?} has a control character in it: letters and digits are best"));
        }
        Ok(AccountName(text.to_owned()))
    }
}

pub(super) struct Secret(pub(super) Vec<u8>);

impl Parse for Secret {
    const EXPECTED: &'static str = "a secret in quotes";

    fn parse(text: &str) -> Result<Secret, String> {
        check_secret(text.as_bytes()).map_err(|text| format!("the secret {text}"))?;
        Ok(Secret(text.into()))
    }
}

pub(super) fn check_secret(secret: &[u8]) -> Result<(), &'static str> {
    if secret.is_empty() {
        return Err("is empty, and anybody could log in: write the secret the two sides agreed on");
    }
    if secret.iter().any(u8::is_ascii_control) {
        return Err("has more than one line, or a control character, in it: a secret is one line of text");
    }
    Ok(())
}

/// An address to listen on.
impl Parse for SocketAddr {
    const EXPECTED: &'static str = "an address and a port such as \"[::]:366\"";

    fn parse(text: &str) -> Result<SocketAddr, String> {
        if let Ok(address) = text.parse() {
            return Ok(address);
        }
        let write = "write an address and a port, such as \"192.0.2.1:366\", \"[2001:db8::1]:366\", or \
                     \"[::]:366\" for all";
        if text.parse::<IpAddr>().is_ok() {
            return Err(format!("{text:?} has no port: {write}"));
        }
        if let Some(port) = text.strip_prefix(':') {
            let port = port_number(port)?;
            return Ok(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)));
        }
        let host = text.rsplit_once(':').map_or(text, |(host, _)| host);
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        if bare.parse::<IpAddr>().is_ok() || Domain::parse(host).is_none() || looks_like_ipv4(host) {
            return Err(format!("{text:?} is no address with a port: {write}"));
        }
        Err(format!("{text:?} is a name, and to listen takes an address, as a name may change its own: {write}"))
    }
}

/// What to connect to; `PORT`: the default port.
pub(super) struct HostPort<const PORT: u16> {
    pub(super) address: String,
    pub(super) host: String,
}

impl<const PORT: u16> Parse for HostPort<PORT> {
    const EXPECTED: &'static str = match PORT {
        587 => "a host and a port such as \"smtp.example.net:587\"",
        _ => "a host and a port such as \"relay.example.net:366\"",
    };

    fn parse(text: &str) -> Result<HostPort<PORT>, String> {
        let wrong = || {
            format!(
                "{text:?} is no host with a port: write \"relay.example.net:{PORT}\", \"192.0.2.1:{PORT}\" or \
                 \"[2001:db8::1]:{PORT}\""
            )
        };
        let (host, port, six) = match text.strip_prefix('[') {
            Some(rest) => {
                let (host, port) = rest.split_once(']').ok_or_else(wrong)?;
                let host: Ipv6Addr = host.parse().map_err(|_| wrong())?;
                let port = match port {
                    "" => None,
                    port => Some(port.strip_prefix(':').ok_or_else(wrong)?),
                };
                (host.to_string(), port, true)
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
                let host = Domain::parse(host).ok_or_else(wrong)?;
                (host.as_str().to_owned(), port, false)
            }
        };
        let port = port.map_or(Ok(PORT), port_number)?;
        if port == 0 {
            return Err(format!("nobody can be called at port 0, as in {text:?}: write the host's, mostly {PORT}"));
        }
        let address = if six { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        Ok(HostPort { address, host })
    }
}

/// A port to connect to.
pub(super) struct Port(pub(super) u16);

impl Parse for Port {
    const EXPECTED: &'static str = "a number from 1 to 65535";
    const NUMBER: bool = true;

    fn parse(text: &str) -> Result<Port, String> {
        let port = port_number(text).ok().filter(|&port| port != 0);
        port.map(Port).ok_or_else(|| format!("{text:?} is no port to call: write {}", Port::EXPECTED))
    }
}

pub(super) struct ResolverAddress(pub(super) SocketAddr);

impl Parse for ResolverAddress {
    const EXPECTED: &'static str = "an address and a port such as \"127.0.0.1:53\"";

    fn parse(text: &str) -> Result<ResolverAddress, String> {
        // RFC 1035 section 4.2: the port of DNS servers is 53.
        let plain = text.parse::<IpAddr>().map(|address| SocketAddr::from((address, 53)));
        let address = plain.or_else(|_| text.parse()).ok().filter(|address| address.port() != 0);
        address.map(ResolverAddress).ok_or_else(|| {
            format!(
                "{text:?} is no address of a DNS server: write an address and a port, such as \"127.0.0.1:53\" or \
                 \"[2001:db8::1]:53\""
            )
        })
    }
}

/// The machines of a network: `192.0.2.0/24`, `2001:db8::/32`, or one address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Network(IpNet);

impl Network {
    /// Whether a machine is in the network. An IPv4 address that is mapped into IPv6, as a socket for both has it,
    /// counts as the IPv4 address (RFC 4291 section 2.5.5.2).
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(&address.to_canonical())
    }
}

impl fmt::Display for Network {
    /// As it is written in the file.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.prefix_len() == self.0.max_prefix_len() {
            true => self.0.addr().fmt(f),
            false => self.0.fmt(f),
        }
    }
}

impl Parse for Network {
    const EXPECTED: &'static str = "a network such as \"192.168.1.0/24\"";

    fn parse(text: &str) -> Result<Network, String> {
        let wrong = || {
            format!("{text:?} is no network: write one such as \"192.168.1.0/24\" or \"fd00::/8\", or a single address")
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
        // A network of mapped addresses would contain no machine: `contains` sees IPv4 addresses in their place.
        if address.to_canonical() != address {
            return Err(wrong());
        }
        if network.network() != address {
            let whole = network.trunc();
            return Err(format!(
                "{text:?} is a machine and a network in one: write \"{whole}\" for the network, or \"{address}\" for \
                 the machine"
            ));
        }
        Ok(Network(network))
    }
}

fn port_number(text: &str) -> Result<u16, String> {
    let digits = text.bytes().all(|digit| digit.is_ascii_digit());
    let port = text.parse().ok().filter(|_| digits);
    port.ok_or_else(|| format!("{text:?} is no port: write a number from 0 to 65535"))
}

/// Whether a text is meant as an IPv4 address: a domain of digits and dots is valid, but nobody means it.
fn looks_like_ipv4(host: &str) -> bool {
    host.bytes().all(|octet| octet.is_ascii_digit() || octet == b'.')
}

impl Parse for TlsMode {
    const EXPECTED: &'static str = "\"starttls\", \"implicit\" or \"none\"";

    fn parse(text: &str) -> Result<TlsMode, String> {
        match text {
            "starttls" => Ok(TlsMode::StartTls),
            "implicit" => Ok(TlsMode::Implicit),
            "none" => Ok(TlsMode::None),
            _ => Err(format!("{text:?} is no way to use TLS: write {}", TlsMode::EXPECTED)),
        }
    }
}

pub(super) struct Pin(pub(super) [u8; 32]);

impl Parse for Pin {
    const EXPECTED: &'static str = "a fingerprint such as \"sha256:0123…\"";

    fn parse(text: &str) -> Result<Pin, String> {
        let wrong = || {
            format!(
                "{text:?} is no fingerprint: write \"sha256:\" and 64 hexadecimal digits, with or without colons, as \
                 `openssl x509 -in FILE -noout -fingerprint -sha256` shows them"
            )
        };
        let (kind, digits) = text.split_once(':').ok_or_else(wrong)?;
        if !kind.eq_ignore_ascii_case("sha256") {
            return Err(wrong());
        }
        let digits = digits.replace(':', "");
        let octets = HEXLOWER_PERMISSIVE.decode(digits.as_bytes()).map_err(|_| wrong())?;
        octets.try_into().map(Pin).map_err(|_| wrong())
    }
}

/// An address whose host is a domain, not an address literal.
pub(super) fn address_with_domain(text: &str) -> Option<Mailbox> {
    Mailbox::parse(text).filter(|mailbox| mailbox.domain().is_some())
}

/// An entry of `accept`.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) enum Accept {
    /// `alice@example.org`; its host is a domain.
    Address(Mailbox),
    /// `@example.org`: each address in this domain.
    Domain(Domain),
}

impl From<Accept> for AddressPattern {
    fn from(accept: Accept) -> AddressPattern {
        match accept {
            Accept::Domain(domain) => AddressPattern::Domain(domain),
            Accept::Address(mailbox) => match mailbox.domain() {
                Some(domain) => AddressPattern::address(mailbox.local(), domain),
                None => AddressPattern::bare(mailbox.local()),
            },
        }
    }
}

impl fmt::Display for Accept {
    /// As it is written in the file.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Accept::Address(mailbox) => mailbox.fmt(f),
            Accept::Domain(domain) => write!(f, "@{domain}"),
        }
    }
}

impl Parse for Accept {
    const EXPECTED: &'static str = "an address such as \"alice@example.org\", or \"@example.org\" for a whole domain";

    fn parse(text: &str) -> Result<Accept, String> {
        if let Some(domain) = text.strip_prefix('@') {
            return <Domain as Parse>::parse(domain).map(Accept::Domain);
        }
        let mailbox = address_with_domain(text);
        mailbox.map(Accept::Address).ok_or_else(|| format!("{text:?} is no address: write {}", Accept::EXPECTED))
    }
}

pub(super) struct OctetCount(pub(super) u64);

/// The default of the maximal size of a message, in octets.
pub(super) const MAX_SIZE: u64 = 50 * 1024 * 1024;

impl Parse for OctetCount {
    const EXPECTED: &'static str = "a size such as \"50MiB\"";
    const NUMBER: bool = true;

    fn parse(text: &str) -> Result<OctetCount, String> {
        let write = "write a whole number of octets, or of KiB, MiB or GiB, such as \"50MiB\"";
        let (number, unit) = number_and_unit(text);
        let unit: u64 = match unit {
            "" => 1,
            "KiB" => 1024,
            "MiB" => 1024 * 1024,
            "GiB" => 1024 * 1024 * 1024,
            _ => return Err(format!("{text:?} is no size: {write}")),
        };
        let number = number.ok_or_else(|| format!("{text:?} is no size: {write}"))?;
        match number.checked_mul(unit) {
            // Offsets in files are `i64`.
            Some(size) if size > i64::MAX.cast_unsigned() => Err(format!("{text:?} is too large: {write}")),
            None => Err(format!("{text:?} is too large: {write}")),
            Some(0) => Err(format!("with a size of {text:?} no letter would pass: {write}")),
            Some(size) => Ok(OctetCount(size)),
        }
    }
}

/// The longest time, so that a deadline is never out of the range of `Instant`.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 60 * 60);

impl Parse for Duration {
    const EXPECTED: &'static str = "a time such as \"5m\"";

    fn parse(text: &str) -> Result<Duration, String> {
        let write = "write a whole number of ms, s, m, h or d, such as \"90s\" or \"5m\"";
        let (number, unit) = number_and_unit(text);
        let milliseconds = match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60 * 1000,
            "h" => 60 * 60 * 1000,
            "d" => 24 * 60 * 60 * 1000,
            "" if number.is_some() => return Err(format!("{text:?} has no unit: {write}")),
            _ => return Err(format!("{text:?} is no time: {write}")),
        };
        let number = number.ok_or_else(|| format!("{text:?} is no time: {write}"))?;
        let time = Duration::from_millis(number.saturating_mul(milliseconds));
        if time.is_zero() {
            return Err(format!("{text:?} would wait for nothing: {write}"));
        }
        if time > LONGEST {
            return Err(format!("{text:?} is longer than a year: {write}"));
        }
        Ok(time)
    }
}

/// A time, or `never`.
pub(super) struct DelayWarning(pub(super) Option<Duration>);

impl Parse for DelayWarning {
    const EXPECTED: &'static str = "a time such as \"4h\", or \"never\"";

    fn parse(text: &str) -> Result<DelayWarning, String> {
        match text {
            "never" => Ok(DelayWarning(None)),
            time => match Duration::parse(time) {
                Ok(time) => Ok(DelayWarning(Some(time))),
                Err(text) => Err(format!("{text}, or \"never\"")),
            },
        }
    }
}

/// Divides `50MiB` into 50 and `MiB`.
fn number_and_unit(text: &str) -> (Option<u64>, &str) {
    let end = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(end);
    let number = match number {
        "" => None,
        // The caller rejects the largest number like those that are larger.
        number => Some(number.parse().unwrap_or(u64::MAX)),
    };
    (number, unit)
}

/// The name of a user or a group of this machine.
pub(super) struct SystemName(pub(super) String);

impl Parse for SystemName {
    const EXPECTED: &'static str = "the name of a user or group, such as \"vmail\"";

    fn parse(text: &str) -> Result<SystemName, String> {
        let plain = |octet: u8| octet.is_ascii_graphic() && !matches!(octet, b':' | b'/');
        match !text.is_empty() && text.bytes().all(plain) {
            true => Ok(SystemName(text.to_owned())),
            false => Err(format!("{text:?} is no name of a user or group: write one such as \"vmail\"")),
        }
    }
}

pub(super) fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    Checked::deserialize(deserializer).map(|entry| entry.0)
}

pub(super) fn atrn<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let time = duration(deserializer)?;
    if time < limits::SHORTEST_ATRN_TIMEOUT {
        let text = "RFC 2645 section 5.2.1 lets the provider take ten minutes for ATRN: write \"10m\" or more";
        return Err(D::Error::custom(text));
    }
    Ok(time)
}

pub(super) fn at_least<'de, const FLOOR: u32, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    between::<FLOOR, { u32::MAX }, D>(deserializer)
}

pub(super) fn between<'de, const FLOOR: u32, const CEILING: u32, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<usize, D::Error> {
    WholeNumber::<FLOOR, CEILING>::deserialize(deserializer).map(|whole| whole.0)
}

/// A whole number within its bounds; the ceiling `u32::MAX` means no upper bound.
pub(super) struct WholeNumber<const FLOOR: u32, const CEILING: u32>(pub(super) usize);

impl<'de, const FLOOR: u32, const CEILING: u32> Deserialize<'de> for WholeNumber<FLOOR, CEILING> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(WholeVisitor::<FLOOR, CEILING>)
    }
}

struct WholeVisitor<const FLOOR: u32, const CEILING: u32>;

impl<const FLOOR: u32, const CEILING: u32> Visitor<'_> for WholeVisitor<FLOOR, CEILING> {
    type Value = WholeNumber<FLOOR, CEILING>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match CEILING {
            u32::MAX => write!(f, "a whole number, {FLOOR} or more"),
            _ => write!(f, "a whole number from {FLOOR} to {CEILING}"),
        }
    }

    fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<WholeNumber<FLOOR, CEILING>, E> {
        if number < i64::from(FLOOR) {
            return Err(E::custom(format!("{number} is too small: write {FLOOR} or more")));
        }
        if CEILING != u32::MAX && number > i64::from(CEILING) {
            return Err(E::custom(format!("{number} is too large: write {CEILING} or less")));
        }
        usize::try_from(number).map(WholeNumber).map_err(E::custom)
    }
}
