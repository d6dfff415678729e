//! What the destination finds where the source's facts point.

use std::collections::HashMap;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketType, sockopt};

use super::facts::{Facts, File, Host, Socket, SocketKind};
use super::gather::{all_processes, comm, criu_version, is_privileged, proc_path, read, this_host};
use super::memory::Memory;
use super::procfs::{self, Stat};

/// Where the tree is to be restored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The directory that receives the images.
    pub images: PathBuf,
    /// They go to memory instead, of which they may take so many bytes.
    pub memory: Option<u64>,
    /// The program CRIU.
    pub criu: PathBuf,
    /// There is a hook `address-prepare`: addresses that are missing now will be there.
    pub address_hook: bool,
    /// There is a hook `before-restore`: files that are missing or differ now may be right by then.
    pub restore_hook: bool,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) host: Host,
    pub(super) privileged: bool,
    /// Ids that the tree needs and that are in use.
    pub(super) taken: Vec<Taken>,
    /// The first id that does not exist here.
    pub(super) pid_max: Option<u32>,
    /// For each file of the facts its size and mode here.
    pub(super) files: Vec<Option<(u64, u32)>>,
    /// For each socket of the facts whether it can be bound here.
    pub(super) bound: Vec<Binding>,
    pub(super) memory: Memory,
}

/// An id in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Taken {
    pub(super) id: u32,
    pub(super) pid: u32,
    pub(super) comm: String,
    /// It is crxfer itself, or a thread of it.
    pub(super) own: bool,
}

/// Whether a socket can be bound to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Binding {
    Free,
    PortTaken,
    NoAddress,
    /// It was not, or could not be, tried.
    Unknown,
}

impl Found {
    /// Looks for everything that `facts` name. Binds sockets for a moment, sends nothing.
    pub(super) fn look(facts: &Facts, place: &Place) -> Self {
        let tree = &facts.tree;
        let pid_max = read("/proc/sys/kernel/pid_max".as_ref());
        let mut host = this_host();
        host.criu = criu_version(&place.criu);
        Self {
            host,
            privileged: is_privileged(),
            taken: if tree.own_pid_namespace {
                Vec::new()
            } else {
                taken(&tree.tasks)
            },
            pid_max: pid_max.trim().parse().ok(),
            files: if tree.own_mount_namespace {
                Vec::new()
            } else {
                facts.files.iter().map(file_here).collect()
            },
            bound: if tree.own_net_namespace {
                Vec::new()
            } else {
                facts.sockets.iter().map(binding).collect()
            },
            memory: Memory::look(&place.images, place.memory),
        }
    }
}

fn file_here(file: &File) -> Option<(u64, u32)> {
    let metadata = fs::metadata(&file.path).ok()?;
    Some((metadata.len(), metadata.mode()))
}

/// Which of `wanted` are pids, threads, process groups or sessions here.
fn taken(wanted: &[u32]) -> Vec<Taken> {
    let all = all_processes();
    let mut holders = HashMap::new();
    for (&pid, Stat { group, session, .. }) in &all {
        for id in [*session, *group] {
            holders.entry(id).or_insert(pid);
        }
    }
    let holder = |id| {
        // Threads have no entry in the listing of /proc, but a directory.
        let status = read(&proc_path(id, "status"));
        let of_thread = procfs::number(&status, "Tgid").and_then(|pid| u32::try_from(pid).ok());
        of_thread.or_else(|| holders.get(&id).copied())
    };
    let own = std::process::id();
    let taken = wanted.iter().filter_map(|&id| {
        let pid = holder(id)?;
        Some(Taken {
            id,
            pid,
            comm: comm(pid),
            own: pid == own,
        })
    });
    taken.collect()
}

/// Asks the kernel, by binding a socket that is closed again at once. One that does not listen
/// answers nobody.
fn binding(socket: &Socket) -> Binding {
    match try_bind(socket) {
        Ok(()) if nonlocal(socket) => Binding::Unknown,
        Ok(()) => Binding::Free,
        Err(Errno::ADDRNOTAVAIL) => Binding::NoAddress,
        // Of a UDP socket others may share the port, when both sides said so.
        Err(Errno::ADDRINUSE) if socket.kind == SocketKind::Listening => Binding::PortTaken,
        Err(_) => Binding::Unknown,
    }
}

/// Whether this host has `address`, as far as the kernel tells.
pub(super) fn has_address(address: IpAddr) -> bool {
    let socket = Socket {
        address,
        port: 0,
        kind: SocketKind::Udp,
    };
    try_bind(&socket) != Err(Errno::ADDRNOTAVAIL)
}

fn try_bind(socket: &Socket) -> Result<(), Errno> {
    let kind = match socket.kind {
        SocketKind::Udp => SocketType::DGRAM,
        SocketKind::Listening | SocketKind::Connected => SocketType::STREAM,
    };
    let family = match socket.address {
        IpAddr::V4(_) => AddressFamily::INET,
        IpAddr::V6(_) => AddressFamily::INET6,
    };
    let fd = net::socket(family, kind, None)?;
    sockopt::set_socket_reuseaddr(&fd, true)?;
    if family == AddressFamily::INET6 {
        // A socket of the tree for both families is not told apart from one for each.
        sockopt::set_ipv6_v6only(&fd, true)?;
    }
    net::bind(&fd, &SocketAddr::new(socket.address, socket.port))
}

/// Whether the kernel lets sockets be bound to addresses that it does not have.
fn nonlocal(socket: &Socket) -> bool {
    let family = if socket.address.is_ipv4() {
        "ipv4"
    } else {
        "ipv6"
    };
    let path = format!("/proc/sys/net/{family}/ip_nonlocal_bind");
    !socket.address.is_unspecified()
        && !socket.address.is_loopback()
        && read(path.as_ref()).trim() == "1"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_this_host_are_told_from_others() {
        assert!(has_address("127.0.0.1".parse().expect("an address")));
        assert!(has_address("0.0.0.0".parse().expect("an address")));
        let other = socket("192.0.2.77", 0, SocketKind::Udp);
        assert!(nonlocal(&other) || !has_address(other.address));
    }

    fn socket(address: &str, port: u16, kind: SocketKind) -> Socket {
        Socket {
            address: address.parse().expect("an address"),
            port,
            kind,
        }
    }

    #[test]
    fn the_kernel_says_what_can_be_bound() {
        let busy = std::net::TcpListener::bind("127.0.0.1:0").expect("a listener");
        let port = busy.local_addr().expect("its address").port();
        let listening = SocketKind::Listening;
        assert_eq!(
            binding(&socket("127.0.0.1", port, listening)),
            Binding::PortTaken
        );
        assert_eq!(
            binding(&socket("127.0.0.1", 0, SocketKind::Connected)),
            Binding::Free
        );
        drop(busy);
        assert_eq!(
            binding(&socket("127.0.0.1", port, listening)),
            Binding::Free
        );
        assert_eq!(
            binding(&socket("192.0.2.77", 0, SocketKind::Udp)),
            Binding::NoAddress
        );
    }

    #[test]
    fn own_threads_hold_their_ids() {
        let (tell, told) = std::sync::mpsc::channel();
        let (end, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            tell.send(rustix::thread::gettid().as_raw_nonzero().get())
                .expect("the test waits");
            let _ = wait.recv();
        });
        let id = u32::try_from(told.recv().expect("an id")).expect("ids are positive");
        let found = taken(&[id, u32::MAX]);
        drop(end);
        thread.join().expect("it ends");
        assert!(
            matches!(&found[..], [taken] if taken.id == id && taken.own),
            "{found:?}"
        );
    }

    #[test]
    fn what_facts_name_is_looked_for() {
        let mut facts = crate::preflight::facts::sample();
        facts.files[0].path = "/".into();
        facts.files[1].path = "/nonexistent/file".into();
        facts.tree.tasks = vec![1, std::process::id()];
        let place = Place {
            images: "/".into(),
            memory: None,
            criu: "/nonexistent/criu".into(),
            ..Place::default()
        };
        let found = Found::look(&facts, &place);
        assert!(found.files[0].is_some_and(|(_, mode)| mode & 0o170_000 == 0o040_000));
        assert_eq!(found.files[1], None);
        assert_eq!(found.bound.len(), facts.sockets.len());
        assert_eq!(found.taken.len(), 2);
        assert!(found.host.page_size >= 4096 && found.host.criu.is_none());
        facts.tree.own_mount_namespace = true;
        facts.tree.own_pid_namespace = true;
        let found = Found::look(&facts, &place);
        assert!(found.files.is_empty() && found.taken.is_empty());
    }
}
