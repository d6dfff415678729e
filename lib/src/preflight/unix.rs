//! UNIX sockets of the tree whose other end is outside: /proc/net/unix does not tell, the kernel's
//! socket diagnosis (unix_diag) does.

use std::collections::{HashMap, HashSet};

use rustix::io::Errno;
use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, SocketType, netlink};

/// The other end of a socket of the tree, in a process that is not part of it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct UnixPeer {
    /// A path, or `@` and an abstract name; empty where it has none.
    pub name: String,
    /// A datagram socket: those can be left outside.
    pub datagram: bool,
}

/// A socket as the kernel tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    inode: u64,
    datagram: bool,
    peer: Option<u64>,
    name: String,
}

const HEADER: usize = 16;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const DUMP_REQUEST: u16 = 0x301;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const SHOW_NAME: u32 = 1;
const SHOW_PEER: u32 = 4;
const NAME: u16 = 0;
const PEER: u16 = 2;
const SOCK_DGRAM: u8 = 2;
const AF_UNIX: u8 = 1;

/// Ends outside the tree of the sockets with these inodes, each once; none where the kernel does not
/// say. Sees the network namespace of this process.
pub(super) fn peers_outside(inodes: &HashSet<u64>) -> Vec<UnixPeer> {
    judge(&ask().unwrap_or_default(), inodes)
}

fn judge(entries: &[Entry], inodes: &HashSet<u64>) -> Vec<UnixPeer> {
    let names: HashMap<_, _> = entries
        .iter()
        .map(|entry| (entry.inode, &entry.name))
        .collect();
    let ours = entries.iter().filter(|entry| inodes.contains(&entry.inode));
    let outside = ours.filter_map(|entry| {
        let peer = entry
            .peer
            .filter(|peer| *peer != 0 && !inodes.contains(peer))?;
        let name = names
            .get(&peer)
            .map_or_else(String::new, |name| (*name).clone());
        Some(UnixPeer {
            name,
            datagram: entry.datagram,
        })
    });
    let mut outside: Vec<_> = outside.collect();
    outside.sort_unstable();
    outside.dedup();
    outside
}

fn ask() -> Result<Vec<Entry>, Errno> {
    let socket = net::socket(
        AddressFamily::NETLINK,
        SocketType::RAW,
        Some(netlink::SOCK_DIAG),
    )?;
    net::send(&socket, &request(), SendFlags::empty())?;
    let mut buffer = vec![0; 64 << 10];
    let mut entries = Vec::new();
    loop {
        let (count, _) = net::recv(&socket, buffer.as_mut_slice(), RecvFlags::empty())?;
        if count == 0 || messages(&buffer[..count], &mut entries) {
            return Ok(entries);
        }
    }
}

// All states, with names and peers.
fn request() -> Vec<u8> {
    let words = [
        40_u32.to_ne_bytes(),
        pair(SOCK_DIAG_BY_FAMILY, DUMP_REQUEST),
        [0; 4],
        [0; 4],
        [AF_UNIX, 0, 0, 0],
        u32::MAX.to_ne_bytes(),
        [0; 4],
        (SHOW_NAME | SHOW_PEER).to_ne_bytes(),
        [0; 4],
        [0; 4],
    ];
    words.concat()
}

fn pair(first: u16, second: u16) -> [u8; 4] {
    let (first, second) = (first.to_ne_bytes(), second.to_ne_bytes());
    [first[0], first[1], second[0], second[1]]
}

/// Takes the sockets of one datagram; true where it was the last.
fn messages(mut bytes: &[u8], entries: &mut Vec<Entry>) -> bool {
    while let (Some(length), Some(kind)) = (word(bytes, 0), half(bytes, 4)) {
        let length = length as usize;
        if matches!(kind, ERROR | DONE) || length < HEADER || length > bytes.len() {
            return true;
        }
        if kind == SOCK_DIAG_BY_FAMILY {
            entries.extend(entry(&bytes[HEADER..length]));
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    false
}

fn entry(message: &[u8]) -> Option<Entry> {
    let mut entry = Entry {
        inode: word(message, 4)?.into(),
        datagram: *message.get(1)? == SOCK_DGRAM,
        peer: None,
        name: String::new(),
    };
    let mut attributes = message.get(16..)?;
    while let (Some(length), Some(kind)) = (half(attributes, 0), half(attributes, 2)) {
        let length = usize::from(length);
        let Some(value) = attributes.get(4..length) else {
            break;
        };
        match kind {
            NAME => entry.name = name(value),
            PEER => entry.peer = word(value, 0).map(u64::from),
            _ => {}
        }
        attributes = attributes
            .get(length.next_multiple_of(4)..)
            .unwrap_or_default();
    }
    Some(entry)
}

fn name(bytes: &[u8]) -> String {
    match bytes.split_first() {
        Some((0, rest)) => format!("@{}", String::from_utf8_lossy(rest)),
        _ => String::from_utf8_lossy(bytes)
            .trim_end_matches('\0')
            .to_owned(),
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at + 2)?;
    Some(u16::from_ne_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    use super::*;

    fn inode(socket: impl AsFd) -> u64 {
        rustix::fs::fstat(socket).expect("it is open").st_ino
    }

    #[test]
    fn the_kernel_knows_the_other_end() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("listens");
        let listener = UnixListener::bind(&path).expect("a listener");
        let client = UnixStream::connect(&path).expect("it listens");
        let (accepted, _) = listener.accept().expect("a client");
        let name = path.display().to_string();
        let outside = peers_outside(&HashSet::from([inode(&client)]));
        assert_eq!(
            outside,
            [UnixPeer {
                name,
                datagram: false
            }]
        );
        let both = HashSet::from([inode(&client), inode(&accepted), inode(&listener)]);
        assert!(peers_outside(&both).is_empty());

        let (one, _other) = UnixDatagram::pair().expect("a pair");
        let outside = peers_outside(&HashSet::from([inode(&one)]));
        assert_eq!(
            outside,
            [UnixPeer {
                name: String::new(),
                datagram: true
            }]
        );
    }

    #[test]
    fn damaged_answers_end() {
        let mut entries = Vec::new();
        assert!(messages(&[0; 32], &mut entries));
        assert!(messages(&[255; 32], &mut entries));
        assert!(!messages(&[], &mut entries));
        let mut short = request();
        short[0] = 18;
        assert!(!messages(&short[..18], &mut entries) && entries.is_empty());
        assert_eq!(entry(&[0; 20]).map(|entry| entry.peer), Some(None));
    }
}
