//! Addresses that no public host has. A record in the DNS may have one: without this check any domain could make this
//! machine connect to its own ports or to those of its network.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

/// Networks for which the standard library has no stable method: address, length of the prefix, kind (RFC 6890).
#[rustfmt::skip]
const NETWORKS_V4: [(Ipv4Addr, u32, &str); 7] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8, "of \"this network\""),
    (Ipv4Addr::new(100, 64, 0, 0), 10, "a private address"),
    (Ipv4Addr::new(192, 0, 0, 0), 24, "a reserved address"),
    (Ipv4Addr::new(192, 88, 99, 0), 24, "a reserved address"),
    (Ipv4Addr::new(198, 18, 0, 0), 15, "a private address"),
    (Ipv4Addr::new(240, 0, 0, 0), 4, "a reserved address"),
    (Ipv4Addr::new(255, 255, 255, 255), 32, "a broadcast address"),
];

#[rustfmt::skip]
const NETWORKS_V6: [(Ipv6Addr, u32, &str); 8] = [
    (Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0), 7, "a private address"),
    (Ipv6Addr::new(0x64, 0xff9b, 1, 0, 0, 0, 0, 0), 48, "a private address"),
    (Ipv6Addr::new(0, 0, 0, 0, 0xffff, 0, 0, 0), 96, "a private address"),
    (Ipv6Addr::new(0x5f00, 0, 0, 0, 0, 0, 0, 0), 16, "a reserved address"),
    (Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 0), 10, "a private address"),
    (Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 0), 64, "a reserved address"),
    (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 32, "an address for documentation"),
    (Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 0), 20, "an address for documentation"),
];

/// Why an address cannot be that of one host (RFC 1122 section 3.2.1.3, RFC 4291 section 2); `None`: it can. A connection to
/// 0.0.0.0 or `::` would lead to this machine.
pub fn no_host(address: IpAddr) -> Option<&'static str> {
    // ::ffff:0.0.0.0 is 0.0.0.0 too.
    match address.to_canonical() {
        address if address.is_unspecified() => Some("the unspecified address"),
        address if address.is_multicast() => Some("a multicast address"),
        IpAddr::V4(Ipv4Addr::BROADCAST) => Some("a broadcast address"),
        _ => None,
    }
}

/// Why an address is not that of a public host: it is loopback, link-local, private, for documentation, reserved, or cannot
/// be that of one host. `None`: it may be. The IPv6 forms of an IPv4 address (mapped, compatible, NAT64, 6to4) are of the
/// kind of that address.
pub fn not_public(address: IpAddr) -> Option<&'static str> {
    no_host(address).or_else(|| match address.to_canonical() {
        IpAddr::V4(address) => reserved_v4(address),
        IpAddr::V6(address) => reserved_v6(address),
    })
}

fn reserved_v4(address: Ipv4Addr) -> Option<&'static str> {
    match address {
        _ if address.is_loopback() => Some("a loopback address"),
        _ if address.is_link_local() => Some("a link-local address"),
        _ if address.is_private() => Some("a private address"),
        _ if address.is_documentation() => Some("an address for documentation"),
        _ => {
            let within = |network: Ipv4Addr, length: u32| (address.to_bits() ^ network.to_bits()) >> (32 - length) == 0;
            NETWORKS_V4.iter().find(|(network, length, _)| within(*network, *length)).map(|(.., what)| *what)
        }
    }
}

fn reserved_v6(address: Ipv6Addr) -> Option<&'static str> {
    match address.segments() {
        _ if address.is_loopback() => Some("a loopback address"),
        _ if address.is_unicast_link_local() => Some("a link-local address"),
        // IPv4-compatible (RFC 4291 section 2.5.5.1) and NAT64 (RFC 6052 section 2.1).
        [0, 0, 0, 0, 0, 0, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] |
        // 6to4 (RFC 3056 section 2).
        [0x2002, high, low, ..] => not_public(Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low)).into()),
        _ => {
            let within = |network: Ipv6Addr, length: u32| (address.to_bits() ^ network.to_bits()) >> (128 - length) == 0;
            NETWORKS_V6.iter().find(|(network, length, _)| within(*network, *length)).map(|(.., what)| *what)
        }
    }
}

/// Whether an interface of this machine has the address. Nothing is sent: the system chooses the source address of a
/// datagram to it, which is the same address only if it is one of this machine.
pub fn is_own(address: IpAddr) -> bool {
    let address = address.to_canonical();
    let any: IpAddr = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let source = UdpSocket::bind((any, 0)).and_then(|socket| {
        socket.connect(SocketAddr::new(address, 9))?;
        socket.local_addr()
    });
    source.is_ok_and(|source| source.ip() == address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_no_public_host_has_are_known() {
        #[rustfmt::skip]
        let reserved = [
            "127.0.0.1", "127.255.0.9", "::1", "::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::1",
            "169.254.1.1", "fe80::1", "febf::1", "::ffff:169.254.1.1",
            "0.0.0.0", "0.1.2.3", "::", "::ffff:0.0.0.0", "224.0.0.1", "239.1.2.3", "ff02::1", "255.255.255.255", "240.0.0.1",
            "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "::ffff:10.0.0.1", "2002:a00:1::", "64:ff9b::a00:1",
            "100.64.0.1", "100.127.255.255", "::ffff:100.64.0.1", "fc00::1", "fdff::1", "fec0::1",
            "192.0.2.1", "198.51.100.1", "203.0.113.9", "2001:db8::1", "3fff::1", "::ffff:192.0.2.1", "198.18.0.1", "100::1",
            "192.0.0.8", "64:ff9b:1::808:808", "64:ff9b:1:a00:0:100::", "::ffff:0:10.0.0.1", "5f00::1",
        ];
        for address in reserved {
            assert!(not_public(address.parse().unwrap()).is_some(), "{address}");
        }
        #[rustfmt::skip]
        let public = [
            "8.8.8.8", "1.0.0.1", "100.63.255.255", "100.128.0.1", "172.15.0.1", "172.32.0.1", "192.167.1.1", "169.253.1.1",
            "198.17.0.1", "198.20.0.1", "223.255.255.1", "::ffff:8.8.8.8", "2001:4860::8888", "2a00::1", "64:ff9b::808:808",
            "2002:808:808::1", "2001:db9::1",
        ];
        for address in public {
            assert_eq!(not_public(address.parse().unwrap()), None, "{address}");
        }
    }

    #[test]
    fn an_address_of_an_interface_is_ours() {
        assert!(is_own("127.0.0.1".parse().unwrap()));
        assert!(is_own("::ffff:127.0.0.1".parse().unwrap()));
        assert!(!is_own("8.8.8.8".parse().unwrap()));
        assert!(!is_own("2001:4860::8888".parse().unwrap()));
    }
}
