//! Making a tree whole after CRIU was killed.
//!
//! The tree runs on when CRIU dies, but its connections are dead until two things are undone, in this
//! order: its sockets are taken out of repair mode, and the rules that keep them silent are removed. The
//! other way round a packet of the peer meets a socket that does not know it, and the peer hears a reset.
//!
//! One thing cannot be healed: a process that CRIU makes run code of its own in the very moment of its
//! death ends by SIGTRAP or SIGSEGV. That was seen in eight of 277 kills spread over a dump,
//! always before post-dump: there no process runs such code any more.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;

use rustix::net::sockopt;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal, pidfd_getfd, pidfd_open};

use super::{Process, Tree, network};
use crate::criu::network_lock;
use crate::sys;

/// What was found and undone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Healed {
    /// Sockets that were taken out of repair mode.
    pub sockets: usize,
    /// nftables tables of CRIU's that were removed.
    pub tables: Vec<String>,
    /// Processes that were left stopped and were sent SIGCONT.
    pub woken: Vec<u32>,
    /// Processes that keep memory of CRIU's: a mapping that nothing uses and nobody can remove from
    /// outside. It does no harm.
    pub littered: Vec<u32>,
    /// What could not be undone, for people.
    pub problems: Vec<String>,
}

/// CRIU's nftables tables in the network namespace of process `pid` (0: the caller's). Empty where there is no nft.
pub fn lock_tables(pid: u32) -> Vec<String> {
    let tables = match pid {
        0 => Ok(network_lock::nftables_locks()),
        pid => network::inside(pid, network_lock::nftables_locks),
    };
    match tables {
        Ok(Ok(tables)) => tables,
        _ => Vec::new(),
    }
}

/// Takes the tree's sockets out of repair mode and removes CRIU's network lock: the table of
/// `run_id` where that is known, else those that are not in `foreign` and name one of the tree's
/// connections, or nothing while no CRIU is at work. Wakes what CRIU left stopped. To be repeated without harm.
///
/// Call it only when CRIU is gone, and after [`helpers_of`](super::copy::helpers_of) it are. The tree may be frozen meanwhile, and should be where it is
/// behind a fence; but what is stopped cannot be seen behind a fence of cgroup v1.
pub fn heal(tree: &Tree, run_id: Option<&str>, foreign: &[String]) -> Healed {
    let mut healed = Healed::default();
    let left = tree.left();
    let connections = heal_sockets(&left, &mut healed);
    let lock = Lock {
        run_id,
        foreign,
        connections: &connections,
    };
    let mut seen = HashSet::new();
    for process in &left {
        if network::name_of(process.pid).is_some_and(|name| seen.insert(name)) {
            lock.remove_beside(*process, &mut healed);
        }
    }
    if left.is_empty() {
        // It has ended by itself: most trees are in this namespace.
        healed.take(lock.remove(true));
    }
    for process in &left {
        wake(*process, &mut healed);
        if has_litter(process.pid) {
            healed.littered.push(process.pid);
        }
    }
    healed
}

/// The two ends of a connection.
type Connection = (SocketAddr, SocketAddr);

/// A socket of the tree's.
struct Socket {
    process: Process,
    descriptor: i32,
}

/// What the sockets of a tree are, each once.
#[derive(Default)]
struct Sockets {
    seen: HashSet<u64>,
    connections: HashSet<Connection>,
    /// Ports with listeners, and whether these share their address.
    listeners: BTreeMap<u16, bool>,
    in_repair: Vec<(Socket, Option<u16>)>,
}

/// Ends repair mode; gives the tree's connections.
fn heal_sockets(left: &[Process], healed: &mut Healed) -> HashSet<Connection> {
    let mut sockets = Sockets::default();
    for process in left {
        if let Err(error) = sockets.look_at(*process)
            && process.is_there()
        {
            healed.problems.push(format!(
                "the sockets of process {} cannot be seen ({error}): its connections may hang",
                process.pid
            ));
        }
    }
    for (socket, port) in &sockets.in_repair {
        // What was accepted has this from its listener, and CRIU's repair mode has overwritten it.
        let shares = port.and_then(|port| sockets.listeners.get(&port));
        match end_repair(socket, shares.copied().unwrap_or(false)) {
            Ok(()) => healed.sockets += 1,
            Err(_) if !socket.process.is_there() => {}
            Err(error) => healed.problems.push(format!(
                "socket {} of process {} stays in repair mode ({error}): its connection hangs",
                socket.descriptor, socket.process.pid
            )),
        }
    }
    sockets.connections
}

impl Sockets {
    fn look_at(&mut self, process: Process) -> std::io::Result<()> {
        let pidfd = open_process(process)?;
        for entry in fs::read_dir(format!("/proc/{}/fd", process.pid))? {
            let path = entry?.path();
            // Closed meanwhile.
            let Ok(target) = fs::read_link(&path) else {
                continue;
            };
            let inode = target.to_str().and_then(|target| {
                let inode = target.strip_prefix("socket:[")?.strip_suffix(']')?;
                inode.parse().ok()
            });
            let name = path.file_name().and_then(|name| name.to_str());
            let descriptor = name.and_then(|name| name.parse().ok());
            let (Some(inode), Some(descriptor)) = (inode, descriptor) else {
                continue;
            };
            if self.seen.insert(inode)
                && let Ok(copy) = pidfd_getfd(&pidfd, descriptor, PidfdGetfdFlags::empty())
            {
                let socket = Socket {
                    process,
                    descriptor,
                };
                self.take(socket, copy);
            }
        }
        Ok(())
    }

    fn take(&mut self, socket: Socket, copy: OwnedFd) {
        // No socket of TCP's.
        let Ok(in_repair) = sys::is_in_tcp_repair(&copy) else {
            return;
        };
        let listens = sockopt::socket_acceptconn(&copy).unwrap_or(false);
        let shares = sockopt::socket_reuseaddr(&copy).unwrap_or(false);
        let copy = TcpStream::from(copy);
        let local = copy.local_addr().ok().map(canonical);
        if let (true, Some(local)) = (listens, local) {
            self.listeners.insert(local.port(), shares);
        }
        let peer = copy.peer_addr().ok().map(canonical);
        self.connections.extend(local.zip(peer));
        if in_repair {
            self.in_repair
                .push((socket, local.map(|local| local.port())));
        }
    }
}

fn end_repair(socket: &Socket, shares_address: bool) -> std::io::Result<()> {
    let pidfd = open_process(socket.process)?;
    let copy = pidfd_getfd(&pidfd, socket.descriptor, PidfdGetfdFlags::empty())?;
    sys::end_tcp_repair(&copy)?;
    Ok(sockopt::set_socket_reuseaddr(&copy, shares_address)?)
}

fn open_process(process: Process) -> std::io::Result<OwnedFd> {
    let pid = i32::try_from(process.pid).ok().and_then(Pid::from_raw);
    let gone = || std::io::Error::from(std::io::ErrorKind::NotFound);
    let pidfd = pidfd_open(pid.ok_or_else(gone)?, PidfdFlags::empty())?;
    process.is_there().then_some(pidfd).ok_or_else(gone)
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// How this run's table is told from others, in the network namespace of a tree.
struct Lock<'a> {
    run_id: Option<&'a str>,
    foreign: &'a [String],
    connections: &'a HashSet<Connection>,
}

impl Healed {
    fn take(&mut self, (tables, problems): (Vec<String>, Vec<String>)) {
        self.tables.extend(tables);
        self.problems.extend(problems);
    }
}

impl Lock<'_> {
    /// From the network namespace of `process`.
    fn remove_beside(&self, process: Process, healed: &mut Healed) {
        let own = network::own_name() == network::name_of(process.pid);
        match network::inside(process.pid, || self.remove(own)) {
            Ok(result) => healed.take(result),
            Err(_) if !process.is_there() => {}
            Err(error) => healed.problems.push(format!(
                "the network namespace of process {} cannot be entered ({error}): CRIU's nftables table may be left there",
                process.pid
            )),
        }
    }

    /// Names of the removed tables, and what went wrong. `own_namespace`: this process is there too.
    fn remove(&self, own_namespace: bool) -> (Vec<String>, Vec<String>) {
        let (mut removed, mut problems) = (Vec::new(), Vec::new());
        let tables = match self.run_id {
            Some(run_id) => network_lock::nftables_table(run_id).map(|table| vec![table]),
            None => network_lock::nftables_locks().map(|mut tables| {
                tables.retain(|table| self.is_ours(table, own_namespace));
                tables
            }),
        };
        match tables {
            // No nft: then CRIU had none either.
            Err(network_lock::LockError::Start(_)) => {}
            Err(error) => problems.push(error.to_string()),
            Ok(tables) => {
                for table in tables {
                    match network_lock::remove_table(&table) {
                        Ok(true) => removed.push(table),
                        Ok(false) | Err(network_lock::LockError::Start(_)) => {}
                        Err(error) => problems.push(error.to_string()),
                    }
                }
            }
        }
        (removed, problems)
    }

    fn is_ours(&self, table: &String, own_namespace: bool) -> bool {
        if self.foreign.contains(table) {
            return false;
        }
        let Ok(silenced) = network_lock::silenced_by(table) else {
            return false;
        };
        if silenced.is_nothing() {
            // CRIU was killed before it came to a connection; or another one is at work.
            return !a_criu_runs();
        }
        // A lock of everything is that of a tree with a network namespace of its own.
        let all = silenced.all && !own_namespace;
        all || !silenced.connections.is_disjoint(self.connections)
    }
}

/// Whether there is a CRIU in this thread's network namespace.
fn a_criu_runs() -> bool {
    let own = network::own_name();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.any(|pid| network_lock::is_process_of_criu(pid) && network::name_of(pid) == own)
}

/// Continues a process that is stopped and has no tracer any more.
fn wake(process: Process, healed: &mut Healed) {
    let status = fs::read_to_string(format!("/proc/{}/status", process.pid)).unwrap_or_default();
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
    let stopped = field("State:").is_some_and(|state| state.trim_start().starts_with('T'));
    let traced = field("TracerPid:").is_some_and(|tracer| tracer.trim() != "0");
    if stopped && !traced && matches!(process.signal(Signal::CONT), Ok(true)) {
        healed.woken.push(process.pid);
    }
}

// The name that CRIU's parasite has among the mappings.
fn has_litter(pid: u32) -> bool {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"));
    maps.is_ok_and(|maps| maps.contains("/memfd:CRIUMFD"))
}

#[cfg(test)]
mod tests;
