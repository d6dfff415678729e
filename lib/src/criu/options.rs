//! What CRIU is told: the user's options, and those of one dump or restore.

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::path::PathBuf;

use crxfer_proto::criu::rpc;

/// CRIU's options that a user may set, on either side, for every operation alike.
///
/// The default is CRIU's own default except for the network lock. Options that only crxfer can know
/// (directories, page server, parent) are in [`DumpOptions`] and [`RestoreOptions`].
#[derive(Clone, Debug, PartialEq)]
pub struct CriuOptions {
    /// Dump and restore established TCP connections.
    pub tcp_established: bool,
    /// Restore connected sockets as closed.
    pub tcp_close: bool,
    /// Leave out connections that are not yet established.
    pub tcp_skip_in_flight: bool,
    /// The tree belongs to a terminal's session that stays outside.
    pub shell_job: bool,
    /// Dump file locks: nobody outside the tree may hold or wait for one of them.
    pub file_locks: bool,
    /// Give deleted but open files a name beside their old one for the time of the migration.
    pub link_remap: bool,
    /// Let UNIX sockets have peers outside the tree.
    pub ext_unix_sk: bool,
    /// Use any path to a device file if its own is inaccessible.
    pub evasive_devices: bool,
    /// Search for the paths of watched inodes even where the kernel gives none.
    pub force_irmap: bool,
    /// Where to search for them, besides CRIU's own list.
    pub irmap_scan_paths: Vec<String>,
    /// Do not fail on a sysctl that the destination lacks.
    pub weak_sysctls: bool,
    /// Find external bind mounts without being told.
    pub auto_ext_mnt: bool,
    /// Let external mounts share propagation with the outside.
    pub ext_sharing: bool,
    /// Let external mounts be slaves of the outside.
    pub ext_masters: bool,
    /// External resources, as in CRIU's `--external`.
    pub external: Vec<String>,
    /// Mount points to leave out.
    pub skip_mnt: Vec<String>,
    /// File systems to take in addition to those that CRIU knows.
    pub enable_fs: Vec<String>,
    /// Namespaces to restore empty: CLONE_NEW* bits (CRIU takes only CLONE_NEWNET).
    pub empty_ns: Option<u32>,
    /// How cgroups are treated; `None` is CRIU's default (soft).
    pub manage_cgroups: Option<CgroupMode>,
    /// Where the tree's cgroups are put: a controller (empty for all) and its new root.
    pub cgroup_roots: Vec<(String, String)>,
    /// The freezer cgroup that holds the tree, to freeze it at once instead of task by task.
    pub freeze_cgroup: Option<String>,
    /// Largest deleted file that is put into the images, in bytes; `None` is CRIU's 1 MiB.
    pub ghost_limit: Option<u32>,
    /// Which CPU features must be the same: CRIU's bits; `None` is all.
    pub cpu_cap: Option<u32>,
    /// How connections are kept silent while the tree is frozen.
    pub network_lock: NetworkLock,
    /// Seconds for collecting the tasks of the tree; `None` is CRIU's 10.
    pub timeout_s: Option<u32>,
    /// The security profile of the copy, as `TYPE:NAME`.
    pub lsm_profile: Option<String>,
    /// The SELinux context of restored mounts.
    pub lsm_mount_context: Option<String>,
    /// Restore mount namespaces with the older engine.
    pub mntns_compat_mode: bool,
    /// Do not require a file's permissions to be what they were.
    pub skip_file_rwx_check: bool,
    /// Work without root, as far as capabilities allow.
    pub unprivileged: bool,
    /// A file of CRIU options, which CRIU reads last: it wins over all of these.
    pub config_file: Option<PathBuf>,
    /// How much CRIU writes to its log: 1 errors, 2 warnings, 3 progress, 4 everything. The default,
    /// 2, explains failures; 4 writes a line for each range of pages, inside the freeze.
    pub log_level: u8,
}

impl Default for CriuOptions {
    fn default() -> Self {
        Self {
            tcp_established: false,
            tcp_close: false,
            tcp_skip_in_flight: false,
            shell_job: false,
            file_locks: false,
            link_remap: false,
            ext_unix_sk: false,
            evasive_devices: false,
            force_irmap: false,
            irmap_scan_paths: Vec::new(),
            weak_sysctls: false,
            auto_ext_mnt: false,
            ext_sharing: false,
            ext_masters: false,
            external: Vec::new(),
            skip_mnt: Vec::new(),
            enable_fs: Vec::new(),
            empty_ns: None,
            manage_cgroups: None,
            cgroup_roots: Vec::new(),
            freeze_cgroup: None,
            ghost_limit: None,
            cpu_cap: None,
            network_lock: NetworkLock::default(),
            timeout_s: None,
            lsm_profile: None,
            lsm_mount_context: None,
            mntns_compat_mode: false,
            skip_file_rwx_check: false,
            unprivileged: false,
            config_file: None,
            log_level: 2,
        }
    }
}

/// How CRIU treats the cgroups of the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CgroupMode {
    /// Not at all: the copy stays in the cgroup of whoever restores it, and dies with that service.
    Ignore,
    /// Only put tasks into cgroups that exist.
    None,
    /// As `None`, and set the properties.
    Props,
    /// Create what is missing, with its properties; leave what exists. CRIU's default.
    Soft,
    /// Create what is missing and set the properties of all.
    Full,
    /// Create all; fail if one exists.
    Strict,
}

/// How connections are kept silent while their owner is frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum NetworkLock {
    /// `iptables`: CRIU's default, but 40 ms of freeze for each connection.
    Iptables,
    /// nftables: well below a millisecond for each connection. Needs CRIU built with libnftables.
    #[default]
    Nftables,
    /// Not at all: the caller keeps packets away by other means.
    Skip,
}

/// What becomes of the source's tree after an accepted dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Leave {
    /// It is killed: a migration.
    #[default]
    Killed,
    /// It runs on: a snapshot.
    Running,
    /// It stays stopped, for SIGCONT or SIGKILL.
    Stopped,
}

/// One final dump.
///
/// Directories are descriptors of this process; CRIU opens them through /proc while the call lasts.
#[derive(Clone, Debug)]
pub struct DumpOptions<'a> {
    /// Root of the tree.
    pub pid: u32,
    /// Where images go.
    pub images: BorrowedFd<'a>,
    /// Where the log and `stats-dump` go.
    pub work: BorrowedFd<'a>,
    /// Name of the log in `work`.
    pub log_file: String,
    /// The image directory of the iteration before, relative to `images`.
    pub parent: Option<String>,
    /// Use soft-dirty: pages unchanged since the parent are left to it.
    pub track_mem: bool,
    /// Send memory over the socket that the worker was [started](super::Worker::start) with.
    pub page_server: bool,
    /// Leave memory at the source, to be fetched later.
    pub lazy_pages: bool,
    /// What becomes of the tree.
    pub leave: Leave,
    /// A UNIX datagram socket in which CRIU keeps pidfds from iteration to iteration.
    pub pidfd_store: Option<BorrowedFd<'a>>,
    /// The user's options.
    pub criu: CriuOptions,
}

impl<'a> DumpOptions<'a> {
    /// A dump of `pid` with no parent and no page server, after which the tree is killed.
    pub fn new(pid: u32, images: BorrowedFd<'a>, work: BorrowedFd<'a>, criu: CriuOptions) -> Self {
        Self {
            pid,
            images,
            work,
            log_file: "dump.log".into(),
            parent: None,
            track_mem: false,
            page_server: false,
            lazy_pages: false,
            leave: Leave::Killed,
            pidfd_store: None,
            criu,
        }
    }

    pub(super) fn message(&self, inherited: Option<RawFd>) -> rpc::Opts {
        let own = rpc::Opts {
            pid: Some(self.pid.cast_signed()),
            leave_running: flag(self.leave == Leave::Running),
            leave_stopped: flag(self.leave == Leave::Stopped),
            parent_img: self.parent.clone(),
            track_mem: flag(self.track_mem),
            lazy_pages: flag(self.lazy_pages),
            ps: page_server(self.page_server, inherited),
            pidfd_store_sk: self.pidfd_store.map(|socket| socket.as_raw_fd()),
            notify_scripts: Some(true),
            ..Default::default()
        };
        self.criu
            .message(own, self.images, self.work, &self.log_file)
    }
}

/// One pre-dump: the changed memory of a tree that goes on running. Needs soft-dirty.
#[derive(Clone, Debug)]
pub struct PreDumpOptions<'a> {
    /// Root of the tree.
    pub pid: u32,
    /// Where images go.
    pub images: BorrowedFd<'a>,
    /// Where the log and `stats-dump` go.
    pub work: BorrowedFd<'a>,
    /// Name of the log in `work`.
    pub log_file: String,
    /// The image directory of the iteration before, relative to `images`.
    pub parent: Option<String>,
    /// Send memory over the socket that the worker was [started](super::Worker::start) with.
    pub page_server: bool,
    /// Read memory while the tree runs again instead of pinning it in pipes: less memory.
    pub read_memory: bool,
    /// A UNIX datagram socket in which CRIU keeps pidfds from iteration to iteration.
    pub pidfd_store: Option<BorrowedFd<'a>>,
    /// The user's options.
    pub criu: CriuOptions,
}

impl PreDumpOptions<'_> {
    pub(super) fn message(&self, inherited: Option<RawFd>) -> rpc::Opts {
        let own = rpc::Opts {
            pid: Some(self.pid.cast_signed()),
            parent_img: self.parent.clone(),
            track_mem: Some(true),
            ps: page_server(self.page_server, inherited),
            pidfd_store_sk: self.pidfd_store.map(|socket| socket.as_raw_fd()),
            pre_dump_mode: self.read_memory.then_some(rpc::PreDumpMode::VmRead.into()),
            ..Default::default()
        };
        self.criu
            .message(own, self.images, self.work, &self.log_file)
    }
}

/// One restore.
#[derive(Clone, Debug)]
pub struct RestoreOptions<'a> {
    /// The images; `parent` in it is followed.
    pub images: BorrowedFd<'a>,
    /// Where the log and `stats-restore` go.
    pub work: BorrowedFd<'a>,
    /// Name of the log in `work`.
    pub log_file: String,
    /// The root directory of a tree with its own mount namespace.
    pub root: Option<String>,
    /// Make the copy a child of this process, which must then reap it. Otherwise it becomes a child
    /// of the nearest subreaper when the worker ends.
    pub sibling: bool,
    /// Fetch memory on first access from a lazy-pages daemon that listens in `work`.
    pub lazy_pages: bool,
    /// Leave the copy stopped, for SIGCONT.
    pub leave_stopped: bool,
    /// The user's options.
    pub criu: CriuOptions,
}

impl<'a> RestoreOptions<'a> {
    /// A restore from `images` whose copy runs when it is accepted.
    pub fn new(images: BorrowedFd<'a>, work: BorrowedFd<'a>, criu: CriuOptions) -> Self {
        Self {
            images,
            work,
            log_file: "restore.log".into(),
            root: None,
            sibling: false,
            lazy_pages: false,
            leave_stopped: false,
            criu,
        }
    }

    pub(super) fn message(&self) -> rpc::Opts {
        let own = rpc::Opts {
            root: self.root.clone(),
            rst_sibling: flag(self.sibling),
            lazy_pages: flag(self.lazy_pages),
            leave_stopped: flag(self.leave_stopped),
            mntns_compat_mode: flag(self.criu.mntns_compat_mode),
            notify_scripts: Some(true),
            ..Default::default()
        };
        self.criu
            .message(own, self.images, self.work, &self.log_file)
    }
}

impl CriuOptions {
    /// `own` completed by the user's options and the directories.
    fn message(
        &self,
        own: rpc::Opts,
        images: BorrowedFd<'_>,
        work: BorrowedFd<'_>,
        log_file: &str,
    ) -> rpc::Opts {
        rpc::Opts {
            images_dir_fd: Some(images.as_raw_fd()),
            work_dir_fd: Some(work.as_raw_fd()),
            log_file: Some(log_file.to_owned()),
            log_level: Some(self.log_level.into()),
            tcp_established: flag(self.tcp_established),
            tcp_close: flag(self.tcp_close),
            tcp_skip_in_flight: flag(self.tcp_skip_in_flight),
            shell_job: flag(self.shell_job),
            file_locks: flag(self.file_locks),
            link_remap: flag(self.link_remap),
            ext_unix_sk: flag(self.ext_unix_sk),
            evasive_devices: flag(self.evasive_devices),
            force_irmap: flag(self.force_irmap),
            irmap_scan_paths: self.irmap_scan_paths.clone(),
            weak_sysctls: flag(self.weak_sysctls),
            auto_ext_mnt: flag(self.auto_ext_mnt),
            ext_sharing: flag(self.ext_sharing),
            ext_masters: flag(self.ext_masters),
            external: self.external.clone(),
            skip_mnt: self.skip_mnt.clone(),
            enable_fs: self.enable_fs.clone(),
            empty_ns: self.empty_ns,
            manage_cgroups_mode: self.manage_cgroups.map(|mode| mode.number().into()),
            cg_root: self.cgroup_roots.iter().map(cgroup_root).collect(),
            freeze_cgroup: self.freeze_cgroup.clone(),
            ghost_limit: self.ghost_limit,
            cpu_cap: self.cpu_cap,
            network_lock: Some(self.network_lock.number().into()),
            timeout: self.timeout_s,
            lsm_profile: self.lsm_profile.clone(),
            lsm_mount_context: self.lsm_mount_context.clone(),
            skip_file_rwx_check: flag(self.skip_file_rwx_check),
            unprivileged: flag(self.unprivileged),
            config_file: self
                .config_file
                .as_ref()
                .map(|path| path.to_string_lossy().into_owned()),
            ..own
        }
    }
}

impl CgroupMode {
    const WORDS: [(Self, &str); 6] = [
        (Self::Ignore, "ignore"),
        (Self::None, "none"),
        (Self::Props, "props"),
        (Self::Soft, "soft"),
        (Self::Full, "full"),
        (Self::Strict, "strict"),
    ];

    /// CRIU's word for it.
    pub fn as_str(self) -> &'static str {
        let found = Self::WORDS.iter().find(|(mode, _)| *mode == self);
        found.map_or("soft", |(_, word)| word)
    }

    /// The mode that CRIU calls `word`.
    pub fn named(word: &str) -> Option<Self> {
        let found = Self::WORDS.iter().find(|(_, known)| *known == word);
        found.map(|(mode, _)| *mode)
    }

    fn number(self) -> rpc::CgMode {
        match self {
            Self::Ignore => rpc::CgMode::Ignore,
            Self::None => rpc::CgMode::CgNone,
            Self::Props => rpc::CgMode::Props,
            Self::Soft => rpc::CgMode::Soft,
            Self::Full => rpc::CgMode::Full,
            Self::Strict => rpc::CgMode::Strict,
        }
    }
}

impl NetworkLock {
    fn number(self) -> rpc::NetworkLockMethod {
        match self {
            Self::Iptables => rpc::NetworkLockMethod::Iptables,
            Self::Nftables => rpc::NetworkLockMethod::Nftables,
            Self::Skip => rpc::NetworkLockMethod::Skip,
        }
    }
}

/// CRIU looks at some flags only for presence, so what is off is not sent.
fn flag(on: bool) -> Option<bool> {
    on.then_some(true)
}

fn cgroup_root((controller, path): &(String, String)) -> rpc::CgroupRoot {
    rpc::CgroupRoot {
        ctrl: (!controller.is_empty()).then(|| controller.clone()),
        path: Some(path.clone()),
    }
}

fn page_server(wanted: bool, inherited: Option<RawFd>) -> Option<rpc::PageServerInfo> {
    wanted.then(|| rpc::PageServerInfo {
        fd: inherited,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;
    use std::os::fd::AsFd;

    #[test]
    fn a_plain_dump_sends_only_what_was_asked_for() {
        let directory = std::fs::File::open("/").expect("the root directory opens");
        let fd = directory.as_raw_fd();
        let mut options = DumpOptions::new(
            7,
            directory.as_fd(),
            directory.as_fd(),
            CriuOptions::default(),
        );
        options.page_server = true;
        let message = options.message(Some(5));
        assert_eq!(
            message,
            rpc::Opts {
                images_dir_fd: Some(fd),
                work_dir_fd: Some(fd),
                pid: Some(7),
                log_level: Some(2),
                log_file: Some("dump.log".into()),
                notify_scripts: Some(true),
                network_lock: Some(rpc::NetworkLockMethod::Nftables.into()),
                ps: Some(rpc::PageServerInfo {
                    fd: Some(5),
                    ..Default::default()
                }),
                ..Default::default()
            }
        );
    }

    #[test]
    fn options_have_the_numbers_of_criu_on_the_wire() {
        let bytes = rpc::Req {
            r#type: Some(rpc::ReqType::Dump.into()),
            opts: Some(rpc::Opts {
                images_dir_fd: Some(3),
                pid: Some(7),
                network_lock: Some(rpc::NetworkLockMethod::Nftables.into()),
                leave_stopped: Some(true),
                ..Default::default()
            }),
            ..Default::default()
        }
        .encode_to_vec();
        // type 1 = 1; opts 2 of 10 bytes: 1 = 3, 2 = 7, 64 = 2, 69 = 1.
        let expected = [
            0x08, 0x01, 0x12, 0x0a, 0x08, 0x03, 0x10, 0x07, 0x80, 0x04, 0x02, 0xa8, 0x04, 0x01,
        ];
        assert_eq!(bytes, expected);
    }
}
