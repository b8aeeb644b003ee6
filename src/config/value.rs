//! Single values of the configuration: what one string, or one number, means.
//!
//! Each is parsed while TOML is read, so that TOML adds the line to the error.

use std::fmt;
use std::marker::PhantomData;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use data_encoding::HEXLOWER_PERMISSIVE;
use serde::de::{Error as _, Visitor};
use serde::{Deserialize, Deserializer};

use super::{Accept, TlsMode, TlsPolicy};
use crate::mail::address::{Domain, Mailbox};

/// A value that is written as a string and parsed where it stands, so that TOML adds the line to the error.
pub(super) struct Checked<T>(pub(super) T);

pub(super) trait Parse: Sized {
    /// What it should be, for who wrote something that is no string.
    const EXPECTED: &'static str;
    fn parse(text: &str) -> Result<Self, String>;
    /// Whether a plain number will do, too.
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
        // The number is not repeated: it may be a secret without its quotes.
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
        // The case is the owner's to choose; what is not ASCII cannot be said in SMTP.
        let name = if text.is_ascii() { text } else { domain.as_str() };
        Ok(Hostname(name.to_owned()))
    }
}

impl Parse for Domain {
    const EXPECTED: &'static str = "a domain such as \"example.org\"";

    fn parse(text: &str) -> Result<Domain, String> {
        let domain =
            Domain::parse(text).ok_or_else(|| format!("{text:?} is no domain: write one such as \"example.org\""))?;
        // RFC 2645 section 5.2.1: ATRN can name no other.
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

/// Addresses to listen on.
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

/// What to connect to; `PORT` is where no port is named.
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

/// A port to call.
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
        // RFC 1035 section 4.2.
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
pub struct Network {
    /// Its first address; never an IPv4 address that is mapped into IPv6.
    address: IpAddr,
    /// So many bits are the same in all of them.
    prefix: u8,
}

impl Network {
    /// Whether the machine is in it. An IPv4 address is the same when it comes mapped into IPv6 (RFC 4291 section
    /// 2.5.5.2), as from a socket for both.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(_), IpAddr::V4(_)) | (IpAddr::V6(_), IpAddr::V6(_)) => {
                first_address(address.to_canonical(), self.prefix) == self.address
            }
            _ => false,
        }
    }
}

impl fmt::Display for Network {
    /// As it is written in the file.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.prefix == bits(self.address) {
            true => write!(f, "{}", self.address),
            false => write!(f, "{}/{}", self.address, self.prefix),
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
        let prefix = match prefix {
            None => bits(address),
            Some(digits) if !digits.bytes().all(|digit| digit.is_ascii_digit()) => return Err(wrong()),
            Some(digits) => digits.parse().map_err(|_| wrong())?,
        };
        // Nobody would ever be in a network of mapped addresses.
        if prefix > bits(address) || address.to_canonical() != address {
            return Err(wrong());
        }
        let first = first_address(address, prefix);
        if first != address {
            return Err(format!(
                "{text:?} is a machine and a network in one: write \"{first}/{prefix}\" for the network, or \
                 \"{address}\" for the machine"
            ));
        }
        Ok(Network { address, prefix })
    }
}

fn bits(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

/// The address with nothing after the prefix.
fn first_address(address: IpAddr, prefix: u8) -> IpAddr {
    let rest = u32::from(bits(address).saturating_sub(prefix));
    // Shifting out everything is too far for the operators.
    match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(rest).unwrap_or(0);
            Ipv4Addr::from_bits(address.to_bits() & mask).into()
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(rest).unwrap_or(0);
            Ipv6Addr::from_bits(address.to_bits() & mask).into()
        }
    }
}

fn port_number(text: &str) -> Result<u16, String> {
    let digits = text.bytes().all(|digit| digit.is_ascii_digit());
    let port = text.parse().ok().filter(|_| digits);
    port.ok_or_else(|| format!("{text:?} is no port: write a number from 0 to 65535"))
}

/// Digits and dots are meant as an address, even where the letters of a name may be digits.
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

impl Parse for TlsPolicy {
    const EXPECTED: &'static str = "\"may\", \"must\" or \"verify\"";

    fn parse(text: &str) -> Result<TlsPolicy, String> {
        match text {
            "may" => Ok(TlsPolicy::May),
            "must" => Ok(TlsPolicy::Must),
            "verify" => Ok(TlsPolicy::Verify),
            _ => Err(format!("{text:?} says nothing about TLS: write {}", TlsPolicy::EXPECTED)),
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

impl Parse for Accept {
    const EXPECTED: &'static str = "an address such as \"alice@example.org\", or \"@example.org\" for a whole domain";

    fn parse(text: &str) -> Result<Accept, String> {
        if let Some(domain) = text.strip_prefix('@') {
            return <Domain as Parse>::parse(domain).map(Accept::Domain);
        }
        match Mailbox::parse(text) {
            Some(mailbox) if mailbox.domain().is_some() => Ok(Accept::Address(mailbox)),
            _ => {
                let expected = Accept::EXPECTED;
                Err(format!("{text:?} is no address: write {expected}"))
            }
        }
    }
}

pub(super) struct OctetCount(pub(super) u64);

/// The largest letter where none is named.
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
            // SMTP cannot count further than i64, nor can files.
            Some(size) if size > i64::MAX.cast_unsigned() => Err(format!("{text:?} is too large: {write}")),
            None => Err(format!("{text:?} is too large: {write}")),
            Some(0) => Err(format!("with a size of {text:?} no letter would pass: {write}")),
            Some(size) => Ok(OctetCount(size)),
        }
    }
}

/// RFC 2645 section 5.2.1: the timeout for ATRN must be at least ten minutes, as the provider may need them.
pub(super) const ATRN_FLOOR: Duration = Duration::from_secs(600);

/// No deadline lies further away; it keeps sums of times in range.
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

/// `50MiB` is 50 and `MiB`.
fn number_and_unit(text: &str) -> (Option<u64>, &str) {
    let end = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(end);
    let number = match number {
        "" => None,
        // What does not fit is as good as the largest: the caller refuses both.
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
    if time < ATRN_FLOOR {
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

/// A whole number within its bounds; `u32::MAX` is no bound.
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What a value is read as, or a phrase of what is said about it.
    fn check<T: Parse, U: PartialEq + fmt::Debug>(text: &str, value: fn(T) -> U, expected: Result<U, &str>) {
        match (T::parse(text).map(value), expected) {
            (Ok(got), Ok(expected)) => assert_eq!(got, expected, "{text:?}"),
            (Err(got), Err(phrase)) => {
                assert!(got.contains(phrase), "{text:?}\nwanted: {phrase}\n   got: {got}");
            }
            (got, expected) => panic!("{text:?}\nwanted: {expected:?}\n   got: {got:?}"),
        }
    }

    #[test]
    fn sizes() {
        let check = |text, expected| check(text, |size: OctetCount| size.0, expected);
        check("1000000", Ok(1_000_000));
        check("1", Ok(1));
        check("10KiB", Ok(10_240));
        check("50MiB", Ok(52_428_800));
        check("1GiB", Ok(1_073_741_824));
        check("0", Err("no letter would pass"));
        check("0MiB", Err("no letter would pass"));
        check("", Err("is no size"));
        check("MiB", Err("is no size"));
        check("50MB", Err("write a whole number of octets, or of KiB, MiB or GiB"));
        check("50 MiB", Err("is no size"));
        check("1.5GiB", Err("is no size"));
        check("-1", Err("is no size"));
        check("50mib", Err("is no size"));
        check("9223372036854775807", Ok(9_223_372_036_854_775_807));
        check("9223372036854775808", Err("is too large"));
        check("99999999999999999999999", Err("is too large"));
        check("99999999999GiB", Err("is too large"));
    }

    #[test]
    fn times() {
        let check = |text, expected: Result<u64, &str>| {
            check(text, |time: Duration| time, expected.map(Duration::from_millis));
        };
        check("500ms", Ok(500));
        check("30s", Ok(30_000));
        check("5m", Ok(300_000));
        check("2h", Ok(7_200_000));
        check("1d", Ok(86_400_000));
        check("365d", Ok(365 * 86_400_000));
        check("366d", Err("longer than a year"));
        check("99999999999999999999999999s", Err("longer than a year"));
        check("0s", Err("would wait for nothing"));
        check("0ms", Err("would wait for nothing"));
        check("300", Err("has no unit: write a whole number of ms, s, m, h or d"));
        check("", Err("is no time"));
        check("m", Err("is no time"));
        check("5 m", Err("is no time"));
        check("5min", Err("is no time"));
        check("1.5h", Err("is no time"));
        check("-5m", Err("is no time"));
        check("1h30m", Err("is no time"));
    }

    #[test]
    fn addresses_to_listen_on() {
        let check = |text, expected| check(text, |address: SocketAddr| address.to_string(), expected);
        let ok = |text: &str| Ok(text.to_owned());
        check("[::]:25", ok("[::]:25"));
        check(":25", ok("[::]:25"));
        check("0.0.0.0:366", ok("0.0.0.0:366"));
        check("127.0.0.1:0", ok("127.0.0.1:0"));
        check("[2001:db8::1]:366", ok("[2001:db8::1]:366"));
        check("localhost:25", Err("is a name, and to listen takes an address"));
        check("relay.example.net", Err("is a name, and to listen takes an address"));
        check("127.0.0.1", Err("has no port"));
        check("::1", Err("has no port"));
        check("[::1]", Err("is no address with a port"));
        check("127.0.0.1:65536", Err("is no address with a port"));
        check("127.0.0.256:25", Err("is no address with a port"));
        check("25", Err("is no address with a port"));
        check("", Err("is no address with a port"));
        check(":", Err("is no port"));
        check(":smtp", Err("is no port: write a number from 0 to 65535"));
        check(":+25", Err("is no port"));
    }

    #[test]
    fn addresses_to_call() {
        let check = |text, expected: Result<(&str, &str), &str>| {
            let expected = expected.map(|(address, host)| (address.to_owned(), host.to_owned()));
            check(text, |address: HostPort<366>| (address.address, address.host), expected);
        };
        check("relay.example.net:3660", Ok(("relay.example.net:3660", "relay.example.net")));
        check("relay.example.net", Ok(("relay.example.net:366", "relay.example.net")));
        check("Localhost", Ok(("localhost:366", "localhost")));
        check("192.0.2.1:1", Ok(("192.0.2.1:1", "192.0.2.1")));
        check("192.0.2.1", Ok(("192.0.2.1:366", "192.0.2.1")));
        check("[2001:DB8::1]:3660", Ok(("[2001:db8::1]:3660", "2001:db8::1")));
        check("[::1]", Ok(("[::1]:366", "::1")));
        check("::1", Err("write \"[::1]:366\""));
        check("[::1]366", Err("is no host with a port"));
        check("[::1", Err("is no host with a port"));
        check("[192.0.2.1]:366", Err("is no host with a port"));
        check("192.0.2.256", Err("is no host with a port"));
        check("", Err("is no host with a port"));
        check(":366", Err("is no host with a port"));
        check("a b:366", Err("is no host with a port"));
        check("relay.example.net:", Err("is no port"));
        check("relay.example.net:odmr", Err("is no port"));
        check("relay.example.net:0", Err("nobody can be called at port 0"));
        check("a:1:2", Err("is no port"));
    }

    #[test]
    fn hosts_for_all_mail() {
        let check = |text, expected: Result<&str, &str>| {
            check(text, |address: HostPort<587>| address.address, expected.map(str::to_owned));
        };
        check("smtp.example.net", Ok("smtp.example.net:587"));
        check("smtp.example.net:25", Ok("smtp.example.net:25"));
        check("::1", Err("write \"[::1]:587\""));
        check("smtp.example.net:0", Err("mostly 587"));
        check("a b", Err("\"[2001:db8::1]:587\""));
    }

    #[test]
    fn dns_servers() {
        let check = |text, expected: Result<&str, &str>| {
            check(text, |resolver: ResolverAddress| resolver.0.to_string(), expected.map(str::to_owned));
        };
        check("127.0.0.1:5353", Ok("127.0.0.1:5353"));
        check("[::1]:5353", Ok("[::1]:5353"));
        check("192.0.2.1", Ok("192.0.2.1:53"));
        check("2001:db8::1", Ok("[2001:db8::1]:53"));
        check("127.0.0.1:0", Err("is no address of a DNS server"));
        check("localhost:53", Err("write an address and a port"));
        check(":53", Err("is no address of a DNS server"));
        check("", Err("is no address of a DNS server"));
    }

    #[test]
    fn networks() {
        let check = |text, expected: Result<&str, &str>| {
            check(text, |network: Network| network.to_string(), expected.map(str::to_owned));
        };
        for same in ["192.168.1.0/24", "0.0.0.0/0", "::/0", "192.0.2.1", "fd00::/8", "2001:db8::1", "2001:db8::/127"] {
            check(same, Ok(same));
        }
        check("192.0.2.1/32", Ok("192.0.2.1"));
        check("192.168.1.5/24", Err("write \"192.168.1.0/24\" for the network, or \"192.168.1.5\" for the machine"));
        check("2001:db8::1/32", Err("write \"2001:db8::/32\""));
        for wrong in ["", "/", "/24", "192.0.2.0/", "192.0.2.0/33", "::/129", "::/256", "192.0.2.0/+4", "192.0.2/24"] {
            check(wrong, Err("is no network: write one such as"));
        }
        check("localhost", Err("is no network"));
        check("192.0.2.0/255.255.255.0", Err("is no network"));
        check("::ffff:192.0.2.0/120", Err("is no network"));
    }

    #[test]
    fn machines_in_networks() {
        let contains = |network: &str, address: &str| {
            <Network as Parse>::parse(network).unwrap().contains(address.parse().unwrap())
        };
        for (network, inside, outside) in [
            ("192.168.1.0/24", "192.168.1.255", "192.168.2.0"),
            ("192.168.1.0/24", "::ffff:192.168.1.1", "::ffff:192.168.0.255"),
            ("192.168.1.128/25", "192.168.1.128", "192.168.1.127"),
            ("192.0.2.1", "192.0.2.1", "192.0.2.0"),
            ("0.0.0.0/0", "203.0.113.1", "2001:db8::1"),
            ("::/0", "2001:db8::1", "203.0.113.1"),
            ("::/0", "::1", "::ffff:203.0.113.1"),
            ("fd00::/8", "fdff:ffff::1", "fe00::"),
            ("2001:db8::1", "2001:db8::1", "2001:db8::2"),
        ] {
            assert!(contains(network, inside), "{inside} in {network}");
            assert!(!contains(network, outside), "{outside} not in {network}");
        }
    }

    #[test]
    fn times_of_notices() {
        let check = |text, expected| check(text, |notice: DelayWarning| notice.0, expected);
        check("never", Ok(None));
        check("4h", Ok(Some(Duration::from_secs(4 * 60 * 60))));
        check("0s", Err("would wait for nothing"));
        check("Never", Err("or \"never\""));
    }

    #[test]
    fn fingerprints() {
        let check = |text: &str, expected| check(text, |pin: Pin| pin.0, expected);
        let plain = "0123456789abcdef".repeat(4);
        let colons = ["01:23:45:67:89:AB:CD:EF"; 4].join(":");
        let octets = [0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef].repeat(4);
        let octets: [u8; 32] = octets.try_into().unwrap();
        check(&format!("sha256:{plain}"), Ok(octets));
        check(&format!("SHA256:{colons}"), Ok(octets));
        check(&plain, Err("is no fingerprint: write \"sha256:\" and 64 hexadecimal digits"));
        check(&colons, Err("is no fingerprint"));
        check(&format!("sha1:{plain}"), Err("is no fingerprint"));
        check(&format!("sha256:{plain}0"), Err("is no fingerprint"));
        check(&format!("sha256:{plain}00"), Err("is no fingerprint"));
        check(&format!("sha256:{}", &plain[2..]), Err("is no fingerprint"));
        check("sha256:", Err("is no fingerprint"));
    }

    #[test]
    fn names_of_machines() {
        let check = |text, expected: Result<&str, &str>| {
            check(text, |name: Hostname| name.0, expected.map(str::to_owned));
        };
        check("mail.example.org", Ok("mail.example.org"));
        check("EXAMPLE.NET", Ok("EXAMPLE.NET"));
        check("localhost", Ok("localhost"));
        check("bücher.example", Ok("xn--bcher-kva.example"));
        check("", Err("is no host name"));
        check("192.0.2.1", Err("is no host name"));
        check("mail_1.example.org", Err("is no host name"));
        check("mail.example.org:25", Err("is no host name"));
    }
}
