//! What the source finds out about its tree and itself before it asks the destination.

use std::path::PathBuf;

use super::facts::Facts;
use super::unix::UnixPeer;

/// Options of the migration that decide which checks apply, as they will reach CRIU: those of the
/// command line and those of a configuration file for CRIU together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choices {
    /// `--force`.
    pub force: bool,
    /// `--tcp-established`.
    pub tcp_established: bool,
    /// `--tcp-close`.
    pub tcp_close: bool,
    /// `--shell-job`.
    pub shell_job: bool,
    /// `--file-locks`.
    pub file_locks: bool,
    /// `--link-remap`.
    pub link_remap: bool,
    /// `--ext-unix-sk`.
    pub ext_unix_sk: bool,
    /// Any `--external`: it may stand for what CRIU would refuse otherwise.
    pub external: bool,
    /// `--ghost-limit` in bytes.
    pub ghost_limit: u64,
    /// There is a hook `before-source-kill`: it stops what would start the workload again.
    pub kill_hook: bool,
    /// There is a hook `after-freeze`: it may copy files that changed.
    pub freeze_hook: bool,
    /// The program, for its version and features.
    pub criu: PathBuf,
}

impl Default for Choices {
    /// CRIU's own defaults.
    fn default() -> Self {
        Self {
            force: false,
            tcp_established: false,
            tcp_close: false,
            shell_job: false,
            file_locks: false,
            link_remap: false,
            ext_unix_sk: false,
            external: false,
            ghost_limit: 1 << 20,
            kill_hook: false,
            freeze_hook: false,
            criu: "criu".into(),
        }
    }
}

/// Everything that the source knows; [`Survey::facts`] is for the destination.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// What the destination is told.
    pub facts: Facts,
    /// Options.
    pub choices: Choices,
    /// The processes, the root first.
    pub processes: Vec<Process>,
    /// CRIU here can lock connections with nftables.
    pub nftables: bool,
    /// crxfer may dump: effective CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE.
    pub privileged: bool,
    /// The tree uses this host's IPC namespace.
    pub shares_ipc: bool,
    /// What would notice that the workload is gone and start it again.
    pub supervisor: Option<Supervisor>,
    /// Why the kernel's freezer cannot hold the tree; `None` where it can.
    pub unfenced: Option<String>,
    /// Connections that are only being made.
    pub in_flight: u32,
    /// Other ends of the tree's UNIX sockets that are not in the tree.
    pub unix_peers: Vec<UnixPeer>,
}

/// A process of the tree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Process {
    /// Its pid here.
    pub pid: u32,
    /// Name of its program.
    pub comm: String,
    /// Its session.
    pub session: u32,
    /// It has ended, and nobody has asked how.
    pub zombie: bool,
    /// Who traces it; 0: nobody.
    pub tracer: u32,
    /// It has a lock on a file.
    pub locks: bool,
    /// It maps a System V segment.
    pub sysv_memory: bool,
    /// What of its descriptors may be in CRIU's way: what they are, as the kernel shows it.
    pub special: Vec<String>,
    /// Terminals that it has open.
    pub terminals: Vec<String>,
    /// Files that it has open and that were deleted.
    pub deleted: Vec<Deleted>,
}

/// A deleted file that is open or mapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deleted {
    /// Where it was.
    pub path: String,
    /// Bytes that CRIU would have to carry.
    pub bytes: u64,
    /// It has another name: CRIU makes a link to it rather than a copy.
    pub linked: bool,
}

/// What watches over the workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Supervisor {
    /// A unit of systemd whose main process is in the tree.
    Unit {
        /// Its name.
        name: String,
        /// Its `Restart=`; `None` where systemd did not say.
        restart: Option<String>,
    },
    /// A container whose first process is the root.
    Container {
        /// Its engine and id, as far as its control group says.
        name: String,
        /// Docker's restart policy; `None` where nobody said.
        restart: Option<String>,
    },
    /// The parent of the root is a program that starts others again.
    Parent {
        /// Its pid.
        pid: u32,
        /// Its name.
        comm: String,
    },
}

/// The unit of systemd that the control groups of a process belong to: the innermost one.
pub(super) fn unit_of<'a>(paths: impl Iterator<Item = &'a str>) -> Option<String> {
    let service = |path: &'a str| path.rsplit('/').find(|part| part.ends_with(".service"));
    paths.filter_map(service).next().map(str::to_owned)
}

/// Whether `unit` is the manager of a user's own units, whose units the system's cannot tell of.
pub(super) fn is_user_manager(unit: &str) -> bool {
    unit.starts_with("user@")
}

/// The container that the control groups of a process belong to.
pub(super) fn container_of<'a>(paths: impl Iterator<Item = &'a str>) -> Option<String> {
    const ENGINES: [&str; 4] = ["docker", "cri-containerd", "crio", "libpod"];
    for path in paths {
        let mut parent = "";
        let mut found = None;
        for part in path.split('/') {
            let part = part.strip_suffix(".scope").unwrap_or(part);
            let named = part.rsplit_once('-');
            if named.is_some_and(|(engine, id)| ENGINES.contains(&engine) && is_id(id))
                || part.starts_with("lxc.payload.")
            {
                found = Some(part.to_owned());
            } else if is_id(part) && ENGINES.contains(&parent) {
                found = Some(format!("{parent}-{part}"));
            }
            parent = part;
        }
        if found.is_some() {
            return found;
        }
    }
    None
}

/// The id in the name of a container, if it is one of Docker's.
pub(super) fn docker_id(container: &str) -> Option<&str> {
    container.strip_prefix("docker-").filter(|id| is_id(id))
}

/// Whether a program called `comm` starts its children again when they end.
pub(super) fn restarts_children(comm: &str) -> bool {
    const SUPERVISORS: [&str; 8] = [
        "runsv",
        "supervisord",
        "s6-supervise",
        "supervise",
        "monit",
        "circusd",
        "dinit",
        "nosh",
    ];
    SUPERVISORS.contains(&comm)
}

fn is_id(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unit_is_the_innermost_service() {
        let unit = |path| unit_of([path].into_iter());
        assert_eq!(
            unit("/system.slice/memcached.service").as_deref(),
            Some("memcached.service")
        );
        let user = "/user.slice/user-1000.slice/user@1000.service/app.slice/a.service";
        assert_eq!(unit(user).as_deref(), Some("a.service"));
        assert_eq!(unit("/user.slice/user-0.slice/session-3.scope"), None);
        assert_eq!(unit("/"), None);
        assert!(is_user_manager("user@1000.service") && !is_user_manager("a.service"));
    }

    #[test]
    fn containers_are_known_by_their_control_groups() {
        let id = "0123456789abcdef".repeat(4);
        let container = |path: String| container_of([path.as_str()].into_iter());
        let docker = format!("docker-{id}");
        assert_eq!(
            container(format!("/system.slice/{docker}.scope")),
            Some(docker.clone())
        );
        assert_eq!(container(format!("/docker/{id}")), Some(docker.clone()));
        assert_eq!(docker_id(&docker), Some(id.as_str()));
        let pod = container(format!("/kubepods.slice/cri-containerd-{id}.scope"));
        assert_eq!(docker_id(&pod.expect("a container")), None);
        assert!(container("/lxc.payload.web".into()).is_some());
        assert_eq!(container("/system.slice/docker.service".into()), None);
        assert_eq!(container(format!("/home/{id}")), None);
        assert_eq!(container("/libpod-conmon-x.scope".into()), None);
    }

    #[test]
    fn supervisors_are_known_by_name() {
        assert!(restarts_children("runsv") && !restarts_children("bash"));
    }
}
