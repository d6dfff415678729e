//! Ends the stall that TCP's cork puts into every dump.
//!
//! CRIU corks its socket and pushes only after messages that have an answer. All behind the last push,
//! the end of the memory and CLOSE, then waits for the kernel's timer of 200 ms, while the application is
//! frozen. Where CRIU runs on this host its socket can be had by `pidfd_getfd`, and be uncorked from here.
//!
//! The duplicate lives for one call: as long as it does, nobody hears that CRIU has closed its socket.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::{getpeername, getsockname, sockopt};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// Other end of a connection, at a process of this host.
#[derive(Debug)]
pub(super) struct Corked {
    pub(super) pid: u32,
    pidfd: OwnedFd,
    descriptor: i32,
    inode: u64,
}

impl Corked {
    /// That of `socket`. None where it is not TCP's, or the other end not in this network namespace, or
    /// its process cannot be seen: then CRIU stalls as it does with its own server.
    pub(super) fn find(socket: impl AsFd) -> Option<Self> {
        let ours = SocketAddr::try_from(getsockname(&socket).ok()?).ok()?;
        let theirs = SocketAddr::try_from(getpeername(&socket).ok()??).ok()?;
        let inode = inode_of(canonical(theirs), canonical(ours))?;
        let mut processes = fs::read_dir("/proc").ok()?.flatten();
        processes.find_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            Self::at(pid, inode)
        })
    }

    fn at(pid: u32, inode: u64) -> Option<Self> {
        let wanted = format!("socket:[{inode}]");
        let mut entries = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten();
        let found = entries.find(|entry| {
            fs::read_link(entry.path()).is_ok_and(|target| target.as_os_str() == wanted.as_str())
        })?;
        let raw = Pid::from_raw(i32::try_from(pid).ok()?)?;
        let corked = Self {
            pid,
            pidfd: pidfd_open(raw, PidfdFlags::empty()).ok()?,
            descriptor: found.file_name().to_str()?.parse().ok()?,
            inode,
        };
        corked.duplicate().map(|_| corked)
    }

    /// Sends what waits in the other end's socket. False once that is closed, or its process has ended.
    pub(super) fn uncork(&self) -> bool {
        self.duplicate()
            .is_some_and(|socket| sockopt::set_tcp_cork(socket, false).is_ok())
    }

    /// Whether that process was started with images of a dump before. Not to be seen where CRIU is told
    /// so in another way, as by runc.
    pub(super) fn continues(&self) -> bool {
        let words = fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default();
        let mut words = words.split(|byte| *byte == 0);
        words.any(|word| {
            let rest = word.strip_prefix(b"--prev-images-dir");
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"="))
        })
    }

    /// The descriptor may meanwhile be another file's.
    fn duplicate(&self) -> Option<OwnedFd> {
        let socket = pidfd_getfd(&self.pidfd, self.descriptor, PidfdGetfdFlags::empty()).ok()?;
        let same = rustix::fs::fstat(&socket).is_ok_and(|stat| stat.st_ino == self.inode);
        same.then_some(socket)
    }
}

/// The socket of this network namespace at `local` that is connected to `remote`.
fn inode_of(local: SocketAddr, remote: SocketAddr) -> Option<u64> {
    ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"]
        .into_iter()
        .filter_map(|table| File::open(table).ok())
        .find_map(|table| {
            let mut lines = BufReader::new(table).lines().map_while(Result::ok);
            lines.find_map(|line| inode_in(&line, local, remote))
        })
}

/// The inode in one line of the kernel's table, if it is that of this connection.
fn inode_in(line: &str, local: SocketAddr, remote: SocketAddr) -> Option<u64> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let matches = address(fields.next()?)? == local && address(fields.next()?)? == remote;
    // State, queues, timer, retransmissions, uid, timeout.
    let inode = fields.nth(6)?.parse().ok()?;
    (matches && inode != 0).then_some(inode)
}

/// An address as the kernel writes it: words of the host's byte order in hexadecimal, and the port.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let mut bytes = [0; 16];
    let words = ip.as_bytes().chunks(8);
    if !ip.is_ascii() || !matches!(ip.len(), 8 | 32) {
        return None;
    }
    for (word, place) in words.zip(bytes.chunks_mut(4)) {
        let word = u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok()?;
        place.copy_from_slice(&word.to_ne_bytes());
    }
    let ip = match ip.len() {
        8 => IpAddr::V4(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3])),
        _ => IpAddr::V6(Ipv6Addr::from(bytes)),
    };
    Some(canonical(SocketAddr::new(ip, port)))
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn the_kernels_lines_are_read() {
        let line = "   1: 0100007F:8AE3 0200A8C0:0050 01 00000000:00000000 00:00000000 00000000     0        0 48215 1 0000000000000000 20 4 30 10 -1";
        let (local, remote) = ("127.0.0.1:35555", "192.168.0.2:80");
        let parse = |text: &str| text.parse().expect("an address");
        assert_eq!(inode_in(line, parse(local), parse(remote)), Some(48215));
        assert_eq!(inode_in(line, parse(remote), parse(local)), None);
        let mapped = address("0000000000000000FFFF00000100007F:0050");
        assert_eq!(mapped, Some(parse("127.0.0.1:80")));
        let six = address("00000000000000000000000001000000:0050");
        assert_eq!(six, Some(parse("[::1]:80")));
        for junk in ["", ":", "0100007F", "0100007G:0050", "01:0050", "ÄÄÄÄ:0050"] {
            assert_eq!(address(junk), None, "{junk}");
        }
    }

    #[test]
    fn what_a_corked_socket_holds_back_comes_at_once() {
        for bind in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(bind) else {
                println!("skipped: no {bind} here");
                continue;
            };
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (mut server, _) = listener.accept().unwrap();
            sockopt::set_tcp_cork(&client, true).unwrap();
            let corked = Corked::find(&server).expect("this very process has it");
            assert_eq!(corked.pid, std::process::id());
            client.write_all(b"tail").unwrap();
            server
                .set_read_timeout(Some(Duration::from_millis(50)))
                .unwrap();
            let mut bytes = [0; 4];
            server
                .read_exact(&mut bytes)
                .expect_err("the cork holds it back");
            assert!(corked.uncork());
            server.read_exact(&mut bytes).expect("it is let go");
            drop(client);
            // No duplicate of ours keeps it open.
            assert_eq!(server.read(&mut bytes).unwrap(), 0);
            assert!(!corked.uncork());
        }
    }

    #[test]
    fn other_sockets_have_no_cork() {
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(Corked::find(&one).is_none());
    }
}
