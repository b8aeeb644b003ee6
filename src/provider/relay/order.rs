//! The order in which the addresses of mail hosts are tried (RFC 5321 section 5.1).

use std::collections::VecDeque;
use std::net::SocketAddr;

use crate::mail::address::Domain;
use crate::net::resolver::MxHost;

/// One address of a mail host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct HostAddress {
    /// The name of the host.
    pub(super) host: String,
    pub(super) address: SocketAddr,
}

/// The addresses of some hosts, the most preferred ones first. IPv6 and IPv4 alternate, within a host and across hosts of
/// equal preference: if one family does not work here, a limit of addresses must not cut off the other.
#[derive(Clone, Default)]
pub(super) struct AddressOrder {
    /// Hosts that are not looked up yet, the most preferred ones first.
    hosts: VecDeque<MxHost>,
    /// The preference of the hosts whose addresses are in `found`.
    preference: Option<u16>,
    found: VecDeque<HostAddress>,
    /// Whether the next address is an IPv6 one, if possible; `None`: either.
    ipv6: Option<bool>,
}

impl AddressOrder {
    /// The addresses of these hosts. `hosts`: the most preferred ones first, those of equal preference in random order.
    pub(super) fn of_hosts(hosts: Vec<MxHost>) -> AddressOrder {
        AddressOrder { hosts: hosts.into(), ..AddressOrder::default() }
    }

    /// These addresses of one host, in their order, but with alternating families.
    pub(super) fn of_addresses(host: &str, addresses: Vec<SocketAddr>) -> AddressOrder {
        let found = addresses.into_iter().map(|address| HostAddress { host: host.to_owned(), address }).collect();
        AddressOrder { found, ..AddressOrder::default() }
    }

    /// The next address; `None`: there are no more. `look_up` returns the addresses of a host. It is called for each host only
    /// when an address of that host may be the next.
    pub(super) fn next(&mut self, look_up: &mut dyn FnMut(&Domain) -> Vec<SocketAddr>) -> Option<HostAddress> {
        loop {
            let is_next = |found: &HostAddress| self.ipv6.is_none_or(|ipv6| found.address.is_ipv6() == ipv6);
            if let Some(next) = self.found.iter().position(is_next).and_then(|at| self.found.remove(at)) {
                self.ipv6 = Some(!next.address.is_ipv6());
                return Some(next);
            }
            let is_last = self.found.is_empty();
            match self.hosts.front() {
                Some(next) if is_last || self.preference == Some(next.preference) => {}
                // Hosts of equal preference are all looked up, and only addresses of the other family are left.
                _ => return self.found.pop_front(),
            }
            let MxHost { preference, host } = self.hosts.pop_front()?;
            if self.preference.replace(preference) != Some(preference) {
                self.ipv6 = None;
            }
            let address = |address| HostAddress { host: host.to_string(), address };
            self.found.extend(look_up(&host).into_iter().map(address));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn socket(address: &str) -> SocketAddr {
        SocketAddr::new(address.parse().unwrap(), 25)
    }

    /// `hosts`: preference, name, addresses. Returns the addresses in order, and for each host after how many of them it was
    /// looked up.
    fn order(hosts: &[(u16, &str, &[&str])]) -> (Vec<String>, Vec<(String, usize)>) {
        let mx = |(preference, name, _): &(u16, &str, &[&str])| MxHost {
            preference: *preference,
            host: Domain::parse(name).unwrap(),
        };
        let mut order = AddressOrder::of_hosts(hosts.iter().map(mx).collect());
        let (mut addresses, mut looked_up) = (Vec::new(), Vec::new());
        loop {
            let count = addresses.len();
            let next = order.next(&mut |host| {
                looked_up.push((host.to_string(), count));
                let found = hosts.iter().find(|(_, name, _)| *name == host.as_str()).unwrap();
                found.2.iter().map(|address| socket(address)).collect()
            });
            let Some(next) = next else { return (addresses, looked_up) };
            addresses.push(next.address.ip().to_string());
        }
    }

    #[test]
    fn preferred_hosts_come_first_and_families_alternate() {
        let check =
            |hosts: &[(u16, &str, &[&str])], expected: &[&str]| assert_eq!(order(hosts).0, expected, "{hosts:?}");
        check(&[], &[]);
        check(&[(10, "a.example", &[])], &[]);
        // Within a host.
        check(
            &[(10, "a.example", &["::1", "::2", "::3", "::4", "10.0.0.1", "10.0.0.2"])],
            &["::1", "10.0.0.1", "::2", "10.0.0.2", "::3", "::4"],
        );
        check(&[(10, "a.example", &["10.0.0.1", "10.0.0.2", "::1"])], &["10.0.0.1", "::1", "10.0.0.2"]);
        // Across hosts of equal preference; a mapped address is an IPv6 one.
        check(
            &[
                (10, "a.example", &["::1", "::2"]),
                (10, "b.example", &[]),
                (10, "c.example", &["10.0.0.1", "::ffff:10.0.0.3"]),
            ],
            &["::1", "10.0.0.1", "::2", "::ffff:10.0.0.3"],
        );
        check(
            &[
                (10, "a.example", &["10.0.0.1"]),
                (10, "b.example", &["10.0.0.2", "::2"]),
                (10, "c.example", &["10.0.0.3"]),
            ],
            &["10.0.0.1", "::2", "10.0.0.2", "10.0.0.3"],
        );
        // Not across hosts of different preference.
        check(
            &[(10, "a.example", &["::1", "::2"]), (20, "b.example", &["10.0.0.1", "::3"])],
            &["::1", "::2", "10.0.0.1", "::3"],
        );
    }

    #[test]
    fn a_host_is_not_looked_up_before_its_turn() {
        let hosts: &[(u16, &str, &[&str])] =
            &[(10, "a.example", &["::1", "10.0.0.1"]), (10, "b.example", &["::2"]), (20, "c.example", &["::3"])];
        let (addresses, looked_up) = order(hosts);
        assert_eq!(addresses, ["::1", "10.0.0.1", "::2", "::3"]);
        let expected = [("a.example", 0), ("b.example", 2), ("c.example", 3)];
        assert_eq!(looked_up, expected.map(|(name, count)| (name.to_owned(), count)));
    }

    #[test]
    fn the_addresses_of_a_smarthost_begin_with_the_family_that_the_system_prefers() {
        let addresses = ["10.0.0.1", "10.0.0.2", "::1"].map(socket);
        let mut order = AddressOrder::of_addresses("smtp.example.net", addresses.to_vec());
        let mut next = || order.next(&mut |_| Vec::new()).map(|found| found.address);
        assert_eq!(
            [next(), next(), next(), next()],
            [Some(addresses[0]), Some(addresses[2]), Some(addresses[1]), None]
        );
    }
}
