//! UDP sockets with large buffers, and what the host's routes carry.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt};

/// A non-blocking UDP socket at `address`. `[::]` takes IPv4 as well, and where the host has no
/// IPv6 it becomes `0.0.0.0`.
pub(super) fn bind(address: SocketAddr, buffer: usize) -> io::Result<UdpSocket> {
    match bind_exactly(address, buffer) {
        Err(error) if address.ip() == IpAddr::from(Ipv6Addr::UNSPECIFIED) && lacks_ipv6(&error) => {
            bind_exactly(
                SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port()),
                buffer,
            )
        }
        result => result,
    }
}

fn lacks_ipv6(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable
        || error.raw_os_error() == Some(rustix::io::Errno::AFNOSUPPORT.raw_os_error())
}

fn bind_exactly(address: SocketAddr, buffer: usize) -> io::Result<UdpSocket> {
    let family = if address.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::DGRAM, flags, Some(ipproto::UDP))?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, !address.ip().is_unspecified())?;
    }
    enlarge_buffers(&socket, buffer);
    rustix::net::bind(&socket, &address)?;
    Ok(socket.into())
}

/// The kernel's limit (`net.core.rmem_max`, 208 KiB on most systems) is passed where we may, and
/// else taken: a small buffer costs throughput, not correctness.
fn enlarge_buffers(socket: &OwnedFd, bytes: usize) {
    if sockopt::set_socket_recv_buffer_size_force(socket, bytes).is_err() {
        let _ = sockopt::set_socket_recv_buffer_size(socket, bytes);
    }
    if sockopt::set_socket_send_buffer_size_force(socket, bytes).is_err() {
        let _ = sockopt::set_socket_send_buffer_size(socket, bytes);
    }
}

/// Largest UDP payload that the first link of the route to `remote` carries, in bytes.
///
/// Without it the search for the path's packet size would begin far above most paths and lose
/// three probes at each step of the way down.
pub(super) fn largest_payload(remote: SocketAddr) -> Option<u16> {
    let remote = canonical(remote);
    let (any, headers): (IpAddr, u32) = match remote {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED.into(), 20 + 8),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED.into(), 40 + 8),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(remote).ok()?;
    let link = match remote {
        SocketAddr::V4(_) => sockopt::ip_mtu(&socket),
        SocketAddr::V6(_) => sockopt::ipv6_mtu(&socket),
    };
    let payload = link.ok()?.saturating_sub(headers);
    Some(u16::try_from(payload).unwrap_or(u16::MAX))
}

/// `remote` as IPv4 where a socket for both families shows it as a mapped IPv6 address.
pub(super) fn canonical(remote: SocketAddr) -> SocketAddr {
    SocketAddr::new(remote.ip().to_canonical(), remote.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_carries_large_packets() {
        let payload = largest_payload("127.0.0.1:9".parse().unwrap()).unwrap();
        assert!(payload > 6500, "{payload}");
        assert_eq!(
            largest_payload("[::ffff:127.0.0.1]:9".parse().unwrap()),
            Some(payload)
        );
    }

    #[test]
    fn a_socket_for_everything_takes_ipv4() {
        let socket = bind("[::]:0".parse().unwrap(), 4 << 20).unwrap();
        let port = socket.local_addr().unwrap().port();
        let from = UdpSocket::bind("127.0.0.1:0").unwrap();
        from.send_to(b"x", ("127.0.0.1", port)).unwrap();
        socket.set_nonblocking(false).unwrap();
        let mut buffer = [0; 4];
        let (_, sender) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!(canonical(sender), from.local_addr().unwrap());
    }
}
