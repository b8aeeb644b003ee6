//! Each kind of value: the values of valid texts, and the errors about mistakes.

use std::fmt;
use std::time::Duration;

use super::*;

/// The value of a text, or a phrase of the error about it.
fn check<T, U: PartialEq + fmt::Debug>(kind: &Text<T>, text: &str, value: fn(T) -> U, expected: Result<U, &str>) {
    match (kind.parse(text).map(value), expected) {
        (Ok(got), Ok(expected)) => assert_eq!(got, expected, "{text:?}"),
        (Err(got), Err(phrase)) => {
            assert!(got.contains(phrase), "{text:?}\nwanted: {phrase}\n   got: {got}");
        }
        (got, expected) => panic!("{text:?}\nwanted: {expected:?}\n   got: {got:?}"),
    }
}

#[test]
fn sizes() {
    let check = |text, expected| check(&SIZE, text, |size| size, expected);
    check("1000000", Ok(1_000_000));
    check("1", Ok(1));
    check("10KiB", Ok(10_240));
    check("50MiB", Ok(52_428_800));
    check("1GiB", Ok(1_073_741_824));
    check("0", Err("no message would be accepted"));
    check("0MiB", Err("no message would be accepted"));
    check("", Err("is not a valid size"));
    check("MiB", Err("is not a valid size"));
    check("50MB", Err("write a whole number of octets, or of KiB, MiB or GiB"));
    check("50 MiB", Err("is not a valid size"));
    check("1.5GiB", Err("is not a valid size"));
    check("-1", Err("is not a valid size"));
    check("50mib", Err("is not a valid size"));
    check("9223372036854775807", Ok(9_223_372_036_854_775_807));
    check("9223372036854775808", Err("is too large"));
    check("99999999999999999999999", Err("is too large"));
    check("99999999999GiB", Err("is too large"));
}

#[test]
fn times() {
    let check = |text, expected: Result<u64, &str>| {
        check(&DURATION, text, |time| time, expected.map(Duration::from_millis));
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
    check("", Err("is not a valid time"));
    check("m", Err("is not a valid time"));
    check("5 m", Err("is not a valid time"));
    check("5min", Err("is not a valid time"));
    check("1.5h", Err("is not a valid time"));
    check("-5m", Err("is not a valid time"));
    check("1h30m", Err("is not a valid time"));
}

#[test]
fn addresses_to_listen_on() {
    let check = |text, expected| check(&LISTENER, text, |address| address.to_string(), expected);
    let ok = |text: &str| Ok(text.to_owned());
    check("[::]:25", ok("[::]:25"));
    check(":25", ok("[::]:25"));
    check("0.0.0.0:366", ok("0.0.0.0:366"));
    check("127.0.0.1:0", ok("127.0.0.1:0"));
    check("[2001:db8::1]:366", ok("[2001:db8::1]:366"));
    check("localhost:25", Err("is a name, and a listener needs an address"));
    check("relay.example.net", Err("is a name, and a listener needs an address"));
    check("127.0.0.1", Err("has no port"));
    check("::1", Err("has no port"));
    check("[::1]", Err("is not a valid address with a port"));
    check("127.0.0.1:65536", Err("is not a valid address with a port"));
    check("127.0.0.256:25", Err("is not a valid address with a port"));
    check("25", Err("is not a valid address with a port"));
    check("", Err("is not a valid address with a port"));
    check(":", Err("is not a valid port"));
    check(":smtp", Err("is not a valid port: write a number from 0 to 65535"));
    check(":+25", Err("is not a valid port"));
}

#[test]
fn addresses_to_call() {
    let check = |text, expected: Result<(&str, &str), &str>| {
        let expected = expected.map(|(address, host)| (address.to_owned(), host.to_owned()));
        check(&host_port::<366>(), text, |address| (address.address, address.host), expected);
    };
    check("relay.example.net:3660", Ok(("relay.example.net:3660", "relay.example.net")));
    check("relay.example.net", Ok(("relay.example.net:366", "relay.example.net")));
    check("my_relay:25", Ok(("my_relay:25", "my_relay")));
    check("relay/x", Err("is not a valid host with a port"));
    check("relay..x", Err("is not a valid host with a port"));
    check("Localhost", Ok(("localhost:366", "localhost")));
    check("192.0.2.1:1", Ok(("192.0.2.1:1", "192.0.2.1")));
    check("192.0.2.1", Ok(("192.0.2.1:366", "192.0.2.1")));
    check("[2001:DB8::1]:3660", Ok(("[2001:db8::1]:3660", "2001:db8::1")));
    check("[::1]", Ok(("[::1]:366", "::1")));
    check("::1", Err("write \"[::1]:366\""));
    check("[::1]366", Err("is not a valid host with a port"));
    check("[::1", Err("is not a valid host with a port"));
    check("[192.0.2.1]:366", Err("is not a valid host with a port"));
    check("192.0.2.256", Err("is not a valid host with a port"));
    check("", Err("is not a valid host with a port"));
    check(":366", Err("is not a valid host with a port"));
    check("a b:366", Err("is not a valid host with a port"));
    check("relay.example.net:", Err("is not a valid port"));
    check("relay.example.net:odmr", Err("is not a valid port"));
    check("relay.example.net:0", Err("no host listens on port 0"));
    check("a:1:2", Err("is not a valid port"));
}

#[test]
fn hosts_for_all_mail() {
    let check = |text, expected: Result<&str, &str>| {
        check(&host_port::<587>(), text, |address| address.address, expected.map(str::to_owned));
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
        check(&RESOLVER, text, |resolver| resolver.to_string(), expected.map(str::to_owned));
    };
    check("127.0.0.1:5353", Ok("127.0.0.1:5353"));
    check("[::1]:5353", Ok("[::1]:5353"));
    check("192.0.2.1", Ok("192.0.2.1:53"));
    check("2001:db8::1", Ok("[2001:db8::1]:53"));
    check("127.0.0.1:0", Err("is not a valid address of a DNS server"));
    check("localhost:53", Err("write an address and a port"));
    check(":53", Err("is not a valid address of a DNS server"));
    check("", Err("is not a valid address of a DNS server"));
}

#[test]
fn networks() {
    let check = |text, expected: Result<&str, &str>| {
        check(&NETWORK, text, |network| network.to_string(), expected.map(str::to_owned));
    };
    for same in ["192.168.1.0/24", "0.0.0.0/0", "::/0", "192.0.2.1", "fd00::/8", "2001:db8::1", "2001:db8::/127"] {
        check(same, Ok(same));
    }
    check("192.0.2.1/32", Ok("192.0.2.1"));
    check("192.168.1.5/24", Err("write \"192.168.1.0/24\" for the network, or \"192.168.1.5\" for the machine"));
    check("2001:db8::1/32", Err("write \"2001:db8::/32\""));
    for wrong in ["", "/", "/24", "192.0.2.0/", "192.0.2.0/33", "::/129", "::/256", "192.0.2.0/+4", "192.0.2/24"] {
        check(wrong, Err("is not a valid network: write one such as"));
    }
    check("localhost", Err("is not a valid network"));
    check("192.0.2.0/255.255.255.0", Err("is not a valid network"));
    check("::ffff:192.0.2.0/120", Err("is not a valid network"));
}

#[test]
fn machines_in_networks() {
    let contains = |network: &str, address: &str| NETWORK.parse(network).unwrap().contains(address.parse().unwrap());
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
fn times_of_delay_warnings() {
    let check = |text, expected| check(&NEVER_OR_LATER, text, |warning| warning, expected);
    check("never", Ok(None));
    check("4h", Ok(Some(Duration::from_secs(4 * 60 * 60))));
    check("0s", Err("would wait for nothing"));
    check("Never", Err("or \"never\""));
}

#[test]
fn fingerprints() {
    let check = |text: &str, expected| check(&PIN, text, |pin| pin, expected);
    let plain = "0123456789abcdef".repeat(4);
    let colons = ["01:23:45:67:89:AB:CD:EF"; 4].join(":");
    let octets = [0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef].repeat(4);
    let octets: [u8; 32] = octets.try_into().unwrap();
    check(&format!("sha256:{plain}"), Ok(Pin::Certificate(octets)));
    check(&format!("SHA256:{colons}"), Ok(Pin::Certificate(octets)));
    check(&format!("spki-sha256:{plain}"), Ok(Pin::Key(octets)));
    check(&format!("SPKI-SHA256:{colons}"), Ok(Pin::Key(octets)));
    check(&format!("spki-sha256:{}", &plain[2..]), Err("or \"spki-sha256:\" and the digits of the key"));
    check(&plain, Err("is not a valid fingerprint: write \"sha256:\" and 64 hexadecimal digits"));
    check(&colons, Err("is not a valid fingerprint"));
    check(&format!("sha1:{plain}"), Err("is not a valid fingerprint"));
    check(&format!("sha256:{plain}0"), Err("is not a valid fingerprint"));
    check(&format!("sha256:{plain}00"), Err("is not a valid fingerprint"));
    check(&format!("sha256:{}", &plain[2..]), Err("is not a valid fingerprint"));
    check("sha256:", Err("is not a valid fingerprint"));
}

#[test]
fn names_of_machines() {
    let check = |text, expected: Result<&str, &str>| {
        check(&HOSTNAME, text, |name| name, expected.map(str::to_owned));
    };
    check("mail.example.org", Ok("mail.example.org"));
    check("EXAMPLE.NET", Ok("EXAMPLE.NET"));
    check("localhost", Ok("localhost"));
    check("bücher.example", Ok("xn--bcher-kva.example"));
    check("", Err("is not a valid host name"));
    check("192.0.2.1", Err("is not a valid host name"));
    check("mail_1.example.org", Err("is not a valid host name"));
    check("mail.example.org:25", Err("is not a valid host name"));
}
