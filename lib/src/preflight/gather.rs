//! Reads the tree and this host from /proc.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::facts::{CriuVersion, Facts, File, Host, Socket, SocketKind, Tree, limits};
use super::found::has_address;
use super::procfs::{self, Stat};
use super::survey::{
    Choices, Deleted, Process, Supervisor, Survey, container_of, docker_id, is_user_manager,
    restarts_children, unit_of,
};
use super::unix::peers_outside;

/// What keeps the source from looking at its tree.
#[derive(Debug, thiserror::Error)]
pub enum PreflightError {
    /// There is no such process.
    #[error("there is no process {0}")]
    NoProcess(u32),
    /// Something of it cannot be read.
    #[error("cannot read {path}: is crxfer run as root?")]
    Read {
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is crxfer, or an ancestor of it.
    #[error("process {0} is crxfer or what started it: it cannot be moved by its own child")]
    Own(u32),
}

const O_ACCMODE: u32 = 0o3;
const O_WRONLY: u32 = 0o1;
const O_APPEND: u32 = 0o2000;
const KIND: u32 = 0o170_000;
const FIFO: u32 = 0o010_000;
const CHARACTERS: u32 = 0o020_000;
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;

/// Looks at the tree below `root`, which runs on meanwhile: what comes and goes is left out.
///
/// Takes a few milliseconds for each process; CRIU is run twice, for its version and features.
///
/// # Errors
/// When `root` does not exist, holds this process, or may not be looked at.
pub fn gather(root: u32, choices: &Choices) -> Result<Survey, PreflightError> {
    let all = all_processes();
    if !all.contains_key(&root) {
        return Err(PreflightError::NoProcess(root));
    }
    let tree = descendants(root, &all);
    if tree.contains(&std::process::id()) {
        return Err(PreflightError::Own(root));
    }
    let maps = proc_path(root, "maps");
    fs::read(&maps).map_err(|source| PreflightError::Read { path: maps, source })?;

    let mut reading = Reading::new(root);
    let inside: HashSet<_> = tree.iter().copied().collect();
    reading.outside = all
        .keys()
        .copied()
        .filter(|pid| !inside.contains(pid))
        .collect();
    for &pid in &tree {
        if let Some(stat) = all.get(&pid) {
            reading.process(pid, stat);
        }
    }
    let supervisor = supervisor(root, &tree, &all);
    let fence = crate::tree::Fence::is_possible(&crate::tree::Tree::of(tree.iter().copied()));
    let mut host = this_host();
    host.criu = criu_version(&choices.criu);
    let unix_peers = if reading.tree.own_net_namespace {
        Vec::new()
    } else {
        peers_outside(&reading.inodes)
    };
    let (in_flight, nftables) = (reading.sockets(), has_nftables(&choices.criu));
    // A socket may be bound to an address that no device has (IP_FREEBIND): none needs it there either.
    let own_net = reading.tree.own_net_namespace;
    let needed = |socket: &Socket| own_net || has_address(socket.address);
    // A file that came and went meanwhile is not there at the next look either.
    let own_mounts = reading.tree.own_mount_namespace;
    let stays = |file: &File| own_mounts || fs::symlink_metadata(&file.path).is_ok();
    Ok(Survey {
        facts: Facts {
            host,
            force: choices.force,
            tree: reading.tree,
            files: reading.files.into_values().filter(stays).collect(),
            files_left_out: reading.files_left_out,
            sockets: reading.bound.into_iter().filter(needed).collect(),
        },
        choices: choices.clone(),
        processes: reading.processes,
        nftables,
        privileged: is_privileged(),
        shares_ipc: same_namespace(root, "ipc"),
        supervisor,
        unfenced: fence.err().map(|error| error.to_string()),
        in_flight,
        unix_peers,
    })
}

/// What a restored process notices of this host; CRIU is left open.
pub(super) fn this_host() -> Host {
    let uname = rustix::system::uname();
    let text = |text: &std::ffi::CStr| text.to_string_lossy().into_owned();
    let mut cpu_features = procfs::cpu_features(&read("/proc/cpuinfo".as_ref()));
    cpu_features.truncate(limits::CPU_FEATURES);
    Host {
        kernel: text(uname.release()),
        machine: text(uname.machine()),
        page_size: rustix::param::page_size() as u64,
        cpu_features,
        criu: None,
    }
}

/// The version of the program `criu`, `None` where it does not run.
pub(super) fn criu_version(criu: &Path) -> Option<CriuVersion> {
    let output = Command::new(criu)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .ok()?;
    CriuVersion::parse(&String::from_utf8_lossy(&output.stdout))
}

fn has_nftables(criu: &Path) -> bool {
    let mut check = Command::new(criu);
    check.args(["check", "--feature", "network_lock_nftables"]);
    check
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    check.status().is_ok_and(|status| status.success())
}

/// Whether this process may dump and restore.
pub(super) fn is_privileged() -> bool {
    const SYS_ADMIN: u64 = 1 << 21;
    const CHECKPOINT_RESTORE: u64 = 1 << 40;
    let status = read("/proc/self/status".as_ref());
    let effective = procfs::field(&status, "CapEff").unwrap_or_default();
    u64::from_str_radix(effective, 16).is_ok_and(|set| set & (SYS_ADMIN | CHECKPOINT_RESTORE) != 0)
}

/// Every process in this pid namespace.
pub(super) fn all_processes() -> HashMap<u32, Stat> {
    numbers_in("/proc".as_ref())
        .into_iter()
        .filter_map(|pid| Some((pid, Stat::of(pid)?)))
        .collect()
}

pub(super) fn proc_path(pid: u32, name: &str) -> PathBuf {
    format!("/proc/{pid}/{name}").into()
}

pub(super) fn comm(pid: u32) -> String {
    read(&proc_path(pid, "comm")).trim_end().to_owned()
}

/// The text of a file; empty where there is none.
pub(super) fn read(path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn numbers_in(directory: &Path) -> Vec<u32> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// `root` and what descends from it, parents before children.
fn descendants(root: u32, all: &HashMap<u32, Stat>) -> Vec<u32> {
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    for (&pid, stat) in all {
        children.entry(stat.parent).or_default().push(pid);
    }
    let mut tree = vec![root];
    let mut next = 0;
    while let Some(pid) = tree.get(next) {
        let mut below = children.remove(pid).unwrap_or_default();
        below.sort_unstable();
        tree.extend(below);
        next += 1;
    }
    tree
}

fn same_namespace(pid: u32, kind: &str) -> bool {
    let own = fs::read_link(format!("/proc/self/ns/{kind}")).ok();
    let theirs = fs::read_link(proc_path(pid, &format!("ns/{kind}"))).ok();
    own.is_none() || theirs.is_none() || own == theirs
}

/// What has been read of the tree so far.
struct Reading {
    root: u32,
    tree: Tree,
    processes: Vec<Process>,
    files: BTreeMap<String, File>,
    files_left_out: u32,
    path_bytes: usize,
    inodes: HashSet<u64>,
    bound: BTreeSet<Socket>,
    /// Processes that are not in the tree.
    outside: HashSet<u32>,
}

impl Reading {
    fn new(root: u32) -> Self {
        let tree = Tree {
            own_pid_namespace: !same_namespace(root, "pid"),
            own_net_namespace: !same_namespace(root, "net"),
            own_mount_namespace: !same_namespace(root, "mnt"),
            ..Tree::default()
        };
        Self {
            root,
            tree,
            processes: Vec::new(),
            files: BTreeMap::new(),
            files_left_out: 0,
            path_bytes: 0,
            inodes: HashSet::new(),
            bound: BTreeSet::new(),
            outside: HashSet::new(),
        }
    }

    fn process(&mut self, pid: u32, stat: &Stat) {
        let status = read(&proc_path(pid, "status"));
        self.tasks(pid, &status, stat);
        let part = |key| procfs::number(&status, key).unwrap_or(0);
        // Segments that several processes share are counted once, by their shares.
        let rollup = read(&proc_path(pid, "smaps_rollup"));
        let shared = procfs::number(&rollup, "Pss_Shmem").unwrap_or_else(|| part("RssShmem"));
        let memory = part("RssAnon")
            .saturating_add(part("VmSwap"))
            .saturating_add(shared);
        self.tree.memory_bytes = self.tree.memory_bytes.saturating_add(memory);

        let mut process = Process {
            pid,
            comm: comm(pid),
            session: stat.session,
            zombie: matches!(stat.state, 'Z' | 'X'),
            tracer: procfs::number(&status, "TracerPid")
                .and_then(|pid| pid.try_into().ok())
                .unwrap_or(0),
            ..Process::default()
        };
        if !process.zombie {
            for name in ["exe", "cwd", "root"] {
                self.path(&proc_path(pid, name), 0, &mut process);
            }
            self.mapped(pid, &mut process);
            self.descriptors(pid, &mut process);
        }
        self.processes.push(process);
    }

    fn tasks(&mut self, pid: u32, status: &str, stat: &Stat) {
        let mut ids: Vec<_> = numbers_in(&proc_path(pid, "task"))
            .into_iter()
            .map(|tid| {
                let status = read(&proc_path(pid, &format!("task/{tid}/status")));
                procfs::innermost(&status, "NSpid").unwrap_or(tid)
            })
            .collect();
        // CRIU makes stand-ins for leaders that have ended: their ids must be free too. Those of a
        // shell's job live on outside the tree.
        if !self.tree.own_pid_namespace {
            let leaders = [stat.group, stat.session].into_iter();
            ids.extend(leaders.filter(|id| !self.outside.contains(id)));
        }
        ids.extend(procfs::innermost(status, "NSpid"));
        for id in ids {
            let Err(at) = self.tree.tasks.binary_search(&id) else {
                continue;
            };
            if id == 0 {
                continue;
            }
            if self.tree.tasks.len() < limits::TASKS {
                self.tree.tasks.insert(at, id);
            } else {
                self.tree.tasks_left_out += 1;
            }
        }
    }

    fn mapped(&mut self, pid: u32, process: &mut Process) {
        let maps = read(&proc_path(pid, "maps"));
        let mut seen = HashSet::new();
        for mapping in procfs::mappings(&maps) {
            if mapping.path.starts_with("/SYSV") {
                process.sysv_memory = true;
            }
            if seen.insert(mapping.path) {
                let link = proc_path(pid, &format!("map_files/{}", trimmed(mapping.range)));
                self.path(&link, 0, process);
            }
        }
    }

    fn descriptors(&mut self, pid: u32, process: &mut Process) {
        for number in numbers_in(&proc_path(pid, "fd")) {
            let link = proc_path(pid, &format!("fd/{number}"));
            let info = read(&proc_path(pid, &format!("fdinfo/{number}")));
            process.locks |= info.lines().any(|line| line.starts_with("lock:"));
            self.path(&link, procfs::open_flags(&info), process);
        }
    }

    /// What the link `link` of /proc leads to: a file to check, or something to warn of.
    fn path(&mut self, link: &Path, flags: u32, process: &mut Process) {
        let Ok(target) = fs::read_link(link) else {
            return;
        };
        let Some(target) = target.to_str() else {
            self.files_left_out += 1;
            return;
        };
        if let Some(inode) = target.strip_prefix("socket:[") {
            self.inodes
                .extend(inode.trim_end_matches(']').parse::<u64>());
            return;
        }
        if let Some(kind) = target.strip_prefix("anon_inode:") {
            note(&mut process.special, kind);
            return;
        }
        let (path, deleted) = procfs::without_mark(target);
        let Ok(metadata) = fs::metadata(link) else {
            return;
        };
        match metadata.mode() & KIND {
            REGULAR if deleted => note_deleted(path, &metadata, process),
            CHARACTERS => note_device(path, process),
            REGULAR | DIRECTORY | FIFO if !deleted => self.file(path, &metadata, flags),
            _ => {}
        }
    }

    fn file(&mut self, path: &str, metadata: &Metadata, flags: u32) {
        let elsewhere = [
            "/proc/",
            "/sys/",
            "/dev/",
            "/memfd:",
            "/SYSV",
            "/anon_hugepage",
        ];
        if elsewhere.iter().any(|prefix| path.starts_with(prefix)) || path.starts_with("pipe:") {
            return;
        }
        let written = flags & O_ACCMODE != 0;
        let grows = flags & O_ACCMODE == O_WRONLY && flags & O_APPEND != 0;
        if let Some(file) = self.files.get_mut(path) {
            // Only where every descriptor is one for appending does CRIU leave its size alone.
            file.grows &= grows;
            file.written |= written;
            return;
        }
        let full =
            self.files.len() >= limits::FILES || self.path_bytes + path.len() > limits::PATHS;
        if full || !File::can_name(path) {
            self.files_left_out += 1;
            return;
        }
        self.path_bytes += path.len();
        let regular = metadata.mode() & KIND == REGULAR;
        let file = File {
            path: path.to_owned(),
            size: if regular { metadata.len() } else { 0 },
            mode: metadata.mode(),
            written,
            grows,
        };
        self.files.insert(path.to_owned(), file);
    }

    /// Finds the tree's sockets in its network namespace; gives the number of those being connected.
    fn sockets(&mut self) -> u32 {
        let mut in_flight = 0;
        for (name, tcp) in [
            ("tcp", true),
            ("tcp6", true),
            ("udp", false),
            ("udp6", false),
        ] {
            let text = read(&proc_path(self.root, &format!("net/{name}")));
            for line in procfs::inet_lines(&text) {
                if !self.inodes.contains(&line.inode) {
                    continue;
                }
                self.tree.inet_sockets = true;
                let (kind, port) = match line.state {
                    _ if !tcp => (SocketKind::Udp, line.port),
                    procfs::TCP_LISTEN => (SocketKind::Listening, line.port),
                    procfs::TCP_CLOSE => continue,
                    _ => (SocketKind::Connected, 0),
                };
                if kind == SocketKind::Connected {
                    self.tree.connections += 1;
                }
                if matches!(line.state, procfs::TCP_SYN_SENT | procfs::TCP_SYN_RECV) {
                    in_flight += 1;
                }
                if self.bound.len() < limits::SOCKETS {
                    self.bound.insert(Socket {
                        address: line.local,
                        port,
                        kind,
                    });
                }
            }
        }
        in_flight
    }
}

// /proc/PID/maps pads addresses with zeros, map_files does not.
fn trimmed(range: &str) -> String {
    let ends = range
        .split('-')
        .map(|end| match end.trim_start_matches('0') {
            "" => "0",
            end => end,
        });
    ends.collect::<Vec<_>>().join("-")
}

fn note(list: &mut Vec<String>, what: &str) {
    if list.len() < 64 && !list.iter().any(|known| known == what) {
        list.push(what.to_owned());
    }
}

fn note_device(path: &str, process: &mut Process) {
    if path.starts_with("/dev/pts/") || path == "/dev/tty" || path == "/dev/console" {
        note(&mut process.terminals, path);
    } else {
        note(&mut process.special, path);
    }
}

fn note_deleted(path: &str, metadata: &Metadata, process: &mut Process) {
    let memory = ["/memfd:", "/dev/zero", "/SYSV", "/anon_hugepage", "/[aio]"];
    if memory.iter().any(|prefix| path.starts_with(prefix)) || process.deleted.len() >= 64 {
        return;
    }
    let deleted = Deleted {
        path: path.to_owned(),
        bytes: metadata.blocks().saturating_mul(512),
        linked: metadata.nlink() > 0,
    };
    if !process.deleted.contains(&deleted) {
        process.deleted.push(deleted);
    }
}

fn supervisor(root: u32, tree: &[u32], all: &HashMap<u32, Stat>) -> Option<Supervisor> {
    let cgroups = read(&proc_path(root, "cgroup"));
    let paths = || procfs::cgroups(&cgroups).map(|(_, path)| path);
    let status = read(&proc_path(root, "status"));
    let first = procfs::innermost(&status, "NSpid") == Some(1) && root != 1;
    if let Some(name) = container_of(paths()).filter(|_| first) {
        let restart = docker_id(&name).and_then(docker_restart);
        return Some(Supervisor::Container { name, restart });
    }
    let parent = all.get(&root).map_or(0, |stat| stat.parent);
    let parent_comm = comm(parent);
    if parent > 1 && restarts_children(&parent_comm) {
        let (pid, comm) = (parent, parent_comm);
        return Some(Supervisor::Parent { pid, comm });
    }
    let unit = unit_of(paths()).filter(|unit| !is_user_manager(unit))?;
    match systemd_unit(&unit) {
        Some((main, _)) if main != 0 && !tree.contains(&main) => None,
        Some((_, restart)) => Some(Supervisor::Unit {
            name: unit,
            restart: Some(restart),
        }),
        // Within a container of ours the name may come from outside, where nobody answers.
        None => Some(Supervisor::Unit {
            name: unit,
            restart: None,
        }),
    }
}

/// Main process and restart policy of a unit, where systemd runs and knows it.
fn systemd_unit(unit: &str) -> Option<(u32, String)> {
    let mut show = Command::new("systemctl");
    show.args(["show", "-p", "LoadState,MainPID,Restart", "--", unit]);
    let text = answer(&mut show)?;
    let value = |key| {
        text.lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
    };
    value("LoadState").filter(|state| *state == "loaded")?;
    Some((
        value("MainPID")?.parse().ok()?,
        value("Restart")?.to_owned(),
    ))
}

fn docker_restart(id: &str) -> Option<String> {
    let mut inspect = Command::new("docker");
    inspect.args([
        "inspect",
        "--format",
        "{{.HostConfig.RestartPolicy.Name}}",
        id,
    ]);
    Some(answer(&mut inspect)?.trim().to_owned())
}

fn answer(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).output().ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::OwnedFd;
    use std::process::Child;

    use super::*;

    struct Running(Child);

    impl Drop for Running {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn gathered(child: &Running) -> Survey {
        let choices = Choices {
            criu: "/nonexistent/criu".into(),
            ..Choices::default()
        };
        gather(child.0.id(), &choices).expect("the child can be looked at")
    }

    #[test]
    fn a_process_is_found_with_what_it_has_open() {
        let directory = tempfile::tempdir().expect("a directory");
        let log = directory.path().join("log");
        fs::write(&log, "four").expect("a file");
        let append = OpenOptions::new()
            .append(true)
            .open(&log)
            .expect("it can be opened");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let port = listener.local_addr().expect("its address").port();
        let gone = directory.path().join("gone");
        let deleted = fs::File::create(&gone).expect("a file");
        fs::remove_file(&gone).expect("it is there");
        let child = Command::new("sleep")
            .arg("60")
            .current_dir(directory.path())
            .stdin(OwnedFd::from(listener))
            .stdout(append)
            .stderr(deleted)
            .spawn();
        let child = Running(child.expect("sleep can be run"));
        // Until exec is done: the fork has this test's mappings.
        while comm(child.0.id()) != "sleep" {
            std::thread::yield_now();
        }
        let survey = gathered(&child);
        let facts = &survey.facts;
        let file = |path: &Path| {
            facts
                .files
                .iter()
                .find(|file| Path::new(&file.path) == path)
        };
        let log = file(&log).expect("the log is named");
        assert!(log.size == 4 && log.grows && log.written, "{log:?}");
        assert!(file(directory.path()).is_some_and(|file| file.mode & KIND == DIRECTORY));
        let exe = fs::read_link(proc_path(child.0.id(), "exe")).expect("it runs");
        let exe = file(&exe).expect("the program is named");
        assert!(exe.size > 0 && !exe.written);
        assert!(
            facts.files.iter().any(|file| file.path.contains("libc")),
            "{:?}",
            facts.files
        );
        let listening = Socket {
            address: [127, 0, 0, 1].into(),
            port,
            kind: SocketKind::Listening,
        };
        assert_eq!(facts.sockets, [listening]);
        assert!(facts.tree.inet_sockets && facts.tree.connections == 0);
        assert!(facts.tree.tasks.contains(&child.0.id()) && facts.tree.memory_bytes > 0);
        assert!(!facts.tree.own_pid_namespace && !facts.tree.own_mount_namespace);
        let process = &survey.processes[0];
        assert_eq!(process.comm, "sleep");
        assert!(
            matches!(&process.deleted[..], [file] if Path::new(&file.path) == gone && !file.linked)
        );
        assert!(facts.host.criu.is_none() && !survey.nftables);
        assert_eq!(Facts::decode(&facts.encode()).as_ref(), Ok(facts));
    }

    #[test]
    fn a_connection_counts_once_and_needs_no_port() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let client = TcpStream::connect(listener.local_addr().expect("its address"));
        let child = Command::new("sleep")
            .arg("60")
            .stdin(OwnedFd::from(client.expect("it is there")))
            .spawn();
        let child = Running(child.expect("sleep can be run"));
        let survey = gathered(&child);
        let connected = Socket {
            address: [127, 0, 0, 1].into(),
            port: 0,
            kind: SocketKind::Connected,
        };
        assert_eq!(survey.facts.sockets, [connected]);
        assert_eq!((survey.facts.tree.connections, survey.in_flight), (1, 0));
    }

    #[test]
    fn children_belong_to_the_tree_and_shells_outside_do_not() {
        let child = Command::new("sh").args(["-c", "sleep 60 & wait"]).spawn();
        let mut child = Running(child.expect("sh can be run"));
        let survey = loop {
            let survey = gathered(&child);
            if survey.processes.len() == 2 {
                break survey;
            }
            std::thread::yield_now();
        };
        // The session and group are those of whoever started the test.
        let ids: Vec<_> = survey.processes.iter().map(|process| process.pid).collect();
        assert!(ids.iter().all(|id| survey.facts.tree.tasks.contains(id)));
        let below = i32::try_from(ids[1])
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        let _ = rustix::process::kill_process(below.expect("a pid"), rustix::process::Signal::KILL);
        let _ = child.0.wait();
    }

    #[test]
    fn neither_itself_nor_nobody_can_be_moved() {
        let choices = Choices::default();
        assert!(matches!(
            gather(std::process::id(), &choices),
            Err(PreflightError::Own(_))
        ));
        assert!(matches!(
            gather(u32::MAX, &choices),
            Err(PreflightError::NoProcess(_))
        ));
    }

    #[test]
    fn ranges_are_written_as_in_map_files() {
        assert_eq!(trimmed("00400000-00401000"), "400000-401000");
        assert_eq!(trimmed("00000000-0f"), "0-f");
    }
}
