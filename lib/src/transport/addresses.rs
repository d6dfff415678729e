//! Which addresses a ticket should name.

use std::io;
use std::net::{IpAddr, SocketAddr};

use crate::ticket::MAX_ADDRESSES;

/// Under which addresses a socket bound to `bound` can be reached: itself, or for `0.0.0.0` and
/// `[::]` those of the host's interfaces.
pub(super) fn reachable(bound: SocketAddr) -> io::Result<Vec<SocketAddr>> {
    if !bound.ip().is_unspecified() {
        return Ok(vec![bound]);
    }
    let mut hosts: Vec<IpAddr> = if_addrs::get_if_addrs()?
        .into_iter()
        .map(|interface| interface.ip())
        .collect();
    // A socket on [::] takes both families (socket::bind).
    hosts.retain(|ip| bound.is_ipv6() || ip.is_ipv4());
    Ok(order(hosts)
        .into_iter()
        .map(|ip| SocketAddr::new(ip, bound.port()))
        .collect())
}

/// The best first, at most [`MAX_ADDRESSES`]: IPv4, then IPv6, then loopback, which is kept even if
/// there are many others. Link-local ones are left out: they mean nothing without an interface.
fn order(mut hosts: Vec<IpAddr>) -> Vec<IpAddr> {
    hosts.retain(|ip| match ip {
        IpAddr::V4(v4) => !v4.is_link_local() && !v4.is_unspecified(),
        IpAddr::V6(v6) => !v6.is_unicast_link_local() && !v6.is_unspecified(),
    });
    hosts.sort_by_key(|ip| (ip.is_loopback(), ip.is_ipv6()));
    hosts.dedup();
    if let Some(loopback) = hosts.iter().copied().find(IpAddr::is_loopback) {
        hosts.retain(|ip| !ip.is_loopback());
        hosts.truncate(MAX_ADDRESSES - 1);
        hosts.push(loopback);
    }
    hosts.truncate(MAX_ADDRESSES);
    hosts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn loopback_comes_last_and_link_local_not_at_all() {
        let found = order(ips(&[
            "127.0.0.1",
            "::1",
            "fe80::1",
            "169.254.3.4",
            "2001:db8::1",
            "10.0.0.1",
        ]));
        assert_eq!(found, ips(&["10.0.0.1", "2001:db8::1", "127.0.0.1"]));
    }

    #[test]
    fn many_addresses_do_not_push_loopback_out() {
        let mut hosts = ips(&["127.0.0.1"]);
        hosts.extend((1..20).map(|last| IpAddr::from([10, 0, 0, last])));
        let found = order(hosts);
        assert_eq!(found.len(), MAX_ADDRESSES);
        assert!(found[MAX_ADDRESSES - 1].is_loopback());
    }

    #[test]
    fn a_socket_at_one_address_is_reached_there() {
        let bound = "192.0.2.7:4433".parse().unwrap();
        assert_eq!(reachable(bound).unwrap(), vec![bound]);
    }
}
