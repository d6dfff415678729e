//! Checks that the source can make alone.

use super::check::Check;
use super::facts::{CriuVersion, Host};
use super::procfs::kernel_version;
use super::survey::{Process, Supervisor, Survey};

/// What CRIU's dump does, in ms, for each connection that it locks with iptables.
const IPTABLES_MS: u32 = 40;

/// Checks of the source alone, each with what to do where it does not pass.
pub fn check_source(survey: &Survey) -> Vec<Check> {
    vec![
        privileges(survey.privileged),
        criu(&survey.facts.host, survey.facts.tree.inet_sockets),
        session(survey),
        terminals(survey),
        processes(survey),
        descriptors(survey),
        deleted_files(survey),
        file_locks(survey),
        shared_memory(survey),
        unix_sockets(survey),
        connections(survey),
        network_lock(survey),
        supervisor(survey),
        fence(survey),
    ]
}

pub(super) fn privileges(privileged: bool) -> Check {
    const NAME: &str = "privileges";
    if privileged {
        return Check::passed(NAME, "crxfer may dump and restore");
    }
    Check::failed(
        NAME,
        "crxfer has neither CAP_SYS_ADMIN nor CAP_CHECKPOINT_RESTORE",
        "run it as root",
    )
}

/// Whether CRIU on `host` can work there at all.
pub(super) fn criu(host: &Host, inet_sockets: bool) -> Check {
    const NAME: &str = "criu";
    let Some(version) = host.criu else {
        return Check::failed(
            NAME,
            "CRIU was not found",
            "install CRIU 4.2 or later, or name it",
        );
    };
    let found = format!("CRIU {version} on Linux {}", host.kernel);
    let new_kernel = kernel_version(&host.kernel).is_some_and(|kernel| kernel >= (6, 16));
    if new_kernel && inet_sockets && version < FIRST_FOR_6_16 {
        return Check::failed(
            NAME,
            format!("{found} cannot dump processes with IPv4 or IPv6 sockets"),
            "install CRIU 4.2 or later: kernels since 6.16 refuse a socket option that older ones set",
        );
    }
    Check::passed(NAME, found)
}

/// The first version that gets along with kernels since 6.16, and the first that writes page counts
/// where older ones do not look for them.
pub(super) const FIRST_FOR_6_16: CriuVersion = CriuVersion {
    major: 4,
    minor: 2,
    sublevel: 0,
};

fn session(survey: &Survey) -> Check {
    const NAME: &str = "session";
    let Some(root) = survey.processes.first() else {
        return Check::skipped(NAME, "the tree was not read");
    };
    if root.session == root.pid || survey.choices.shell_job {
        return Check::passed(
            NAME,
            format!("process {} can be the root of a tree", root.pid),
        );
    }
    let (pid, session) = (root.pid, root.session);
    let who = match session {
        0 => "a process outside its pid namespace".to_owned(),
        _ => format!("process {session}"),
    };
    Check::failed(
        NAME,
        format!(
            "process {pid} ({}) is not the leader of its session, {who} is",
            root.comm
        ),
        "start it with setsid, name the leader with --pid, or give --shell-job if it is a job of a shell",
    )
}

fn terminals(survey: &Survey) -> Check {
    const NAME: &str = "terminals";
    let found = collect(survey, |process| process.terminals.clone());
    // A terminal whose other side is in the tree moves with it.
    let own = survey.processes.iter().any(|process| {
        let master = |path: &String| path.ends_with("/ptmx");
        process.special.iter().any(master)
    });
    if found.is_empty() || survey.choices.shell_job || survey.choices.external || own {
        return Check::passed(NAME, "none from outside the tree");
    }
    Check::warning(
        NAME,
        format!("open: {}", found.join(", ")),
        "CRIU refuses a terminal whose other side is not in the tree: start the program with its \
         input and output elsewhere, or give --shell-job",
    )
}

fn processes(survey: &Survey) -> Check {
    const NAME: &str = "processes";
    let traced = survey.processes.iter().find(|process| process.tracer != 0);
    if let Some(process) = traced {
        return Check::failed(
            NAME,
            format!("{} is traced by process {}", named(process), process.tracer),
            "end the debugger or strace: a process has one tracer, and CRIU must be it",
        );
    }
    if let Some(root) = survey.processes.first().filter(|root| root.zombie) {
        return Check::failed(
            NAME,
            format!("{} has ended", named(root)),
            "name a process that runs",
        );
    }
    Check::passed(NAME, format!("{} in the tree", survey.processes.len()))
}

fn descriptors(survey: &Survey) -> Check {
    const NAME: &str = "descriptors";
    let refused = collect(survey, |process| kinds(process, Kind::Refused));
    let doubtful = collect(survey, |process| kinds(process, Kind::Doubtful));
    if !refused.is_empty() {
        return Check::failed(
            NAME,
            format!("CRIU cannot dump {}", refused.join(", ")),
            "configure the program so that it does not use this",
        );
    }
    if !doubtful.is_empty() {
        return Check::warning(
            NAME,
            format!("CRIU may not be able to dump {}", doubtful.join(", ")),
            "it may need a plugin of CRIU or --external",
        );
    }
    Check::passed(NAME, "all of kinds that CRIU knows")
}

#[derive(PartialEq)]
enum Kind {
    Known,
    Refused,
    Doubtful,
}

fn kinds(process: &Process, kind: Kind) -> Vec<String> {
    let special = process.special.iter();
    let found = special.filter(|what| kind_of(what) == kind);
    found
        .map(|what| format!("{what} of {}", named(process)))
        .collect()
}

fn kind_of(what: &str) -> Kind {
    const KNOWN: [&str; 16] = [
        "[eventfd]",
        "[eventpoll]",
        "inotify",
        "[fanotify]",
        "[signalfd]",
        "[timerfd]",
        "bpf-map",
        "[pidfd]",
        "/dev/null",
        "/dev/zero",
        "/dev/full",
        "/dev/random",
        "/dev/urandom",
        "/dev/ptmx",
        "/dev/pts/ptmx",
        "/dev/net/tun",
    ];
    const REFUSED: [&str; 5] = [
        "[io_uring]",
        "[userfaultfd]",
        "[perf_event]",
        "bpf-prog",
        "[secretmem]",
    ];
    match what {
        _ if KNOWN.contains(&what) => Kind::Known,
        _ if REFUSED.contains(&what) => Kind::Refused,
        _ => Kind::Doubtful,
    }
}

fn deleted_files(survey: &Survey) -> Check {
    const NAME: &str = "deleted files";
    let choices = &survey.choices;
    for process in &survey.processes {
        for file in &process.deleted {
            let what = format!("{}, deleted, in use by {}", file.path, named(process));
            if file.linked && !choices.link_remap {
                return Check::failed(
                    NAME,
                    format!("{what}, has another name"),
                    "give --link-remap",
                );
            }
            if !file.linked && file.bytes > choices.ghost_limit {
                return Check::failed(
                    NAME,
                    format!(
                        "{what}, has {} bytes, CRIU takes {}",
                        file.bytes, choices.ghost_limit
                    ),
                    "raise --ghost-limit, or let the program close it",
                );
            }
        }
    }
    Check::passed(NAME, "none in the way")
}

fn file_locks(survey: &Survey) -> Check {
    const NAME: &str = "file locks";
    let holder = survey.processes.iter().find(|process| process.locks);
    match holder {
        None => Check::passed(NAME, "none"),
        Some(_) if survey.choices.file_locks => Check::passed(NAME, "moved with --file-locks"),
        Some(process) => Check::failed(
            NAME,
            format!("{} has a lock on a file", named(process)),
            "give --file-locks, if nobody else uses that file",
        ),
    }
}

fn shared_memory(survey: &Survey) -> Check {
    const NAME: &str = "System V memory";
    let user = survey.processes.iter().find(|process| process.sysv_memory);
    match user.filter(|_| survey.shares_ipc) {
        None => Check::passed(NAME, "none of this host"),
        Some(process) => Check::failed(
            NAME,
            format!("{} uses a System V segment of this host", named(process)),
            "run it in an IPC namespace of its own (unshare --ipc)",
        ),
    }
}

fn unix_sockets(survey: &Survey) -> Check {
    const NAME: &str = "UNIX sockets";
    let choices = &survey.choices;
    let shown = |datagram| {
        let ends = survey
            .unix_peers
            .iter()
            .filter(|peer| peer.datagram == datagram);
        let mut names: Vec<_> = ends
            .map(|peer| {
                if peer.name.is_empty() {
                    "one without a name"
                } else {
                    &peer.name
                }
            })
            .collect();
        names.truncate(8);
        names.join(", ")
    };
    let (streams, datagrams) = (shown(false), shown(true));
    if !streams.is_empty() {
        let found = format!("connected to a process outside the tree: {streams}");
        if choices.external {
            return Check::warning(NAME, found, "--external must name each of them");
        }
        let advice = "let the program close them: output to the journal of systemd is such a socket \
                      (StandardOutput=null or a file), so is a connection to D-Bus";
        return Check::failed(NAME, found, advice);
    }
    if !datagrams.is_empty() && !choices.ext_unix_sk && !choices.external {
        let found = format!("sends to a process outside the tree: {datagrams}");
        let advice = "give --ext-unix-sk: the restored program then sends to the destination's";
        return Check::failed(NAME, found, advice);
    }
    Check::passed(NAME, "none that CRIU would refuse")
}

fn connections(survey: &Survey) -> Check {
    const NAME: &str = "connections";
    let (count, choices) = (survey.facts.tree.connections, &survey.choices);
    if count == 0 {
        return Check::passed(NAME, "no TCP connection");
    }
    if !choices.tcp_established && !choices.tcp_close {
        return Check::failed(
            NAME,
            format!("{count} TCP connections"),
            "give --tcp-established to move them, or --tcp-close to end them",
        );
    }
    if survey.in_flight > 0 {
        return Check::warning(
            NAME,
            format!(
                "{} of {count} TCP connections are being made",
                survey.in_flight
            ),
            "CRIU refuses those that still are at the freeze, unless --skip-in-flight is given",
        );
    }
    Check::passed(NAME, format!("{count} TCP connections"))
}

fn network_lock(survey: &Survey) -> Check {
    const NAME: &str = "network lock";
    let count = survey.facts.tree.connections;
    if count == 0 || survey.choices.tcp_close {
        return Check::skipped(NAME, "no TCP connection to lock");
    }
    if survey.nftables {
        return Check::passed(NAME, "nftables");
    }
    let cost = count.saturating_mul(IPTABLES_MS);
    Check::warning(
        NAME,
        format!(
            "CRIU cannot use nftables here; iptables adds about {cost} ms of downtime for {count} connections"
        ),
        "use a CRIU built with nftables, and a kernel with nf_tables",
    )
}

/// What holds the tree when CRIU dies in the moment of the hand-over.
fn fence(survey: &Survey) -> Check {
    const NAME: &str = "fence";
    let Some(why) = &survey.unfenced else {
        return Check::passed(NAME, "the kernel can hold the workload still");
    };
    Check::guarded(
        NAME,
        survey.choices.force,
        format!(
            "nothing could hold the workload if CRIU died in the hand-over, and it would run twice: {why}"
        ),
        "mount cgroup v2 (mount -t cgroup2 none /sys/fs/cgroup/unified) or the freezer of v1, \
         writable here",
    )
}

fn supervisor(survey: &Survey) -> Check {
    const NAME: &str = "supervisor";
    let choices = &survey.choices;
    let Some(supervisor) = &survey.supervisor else {
        return Check::passed(NAME, "none that would start the workload again");
    };
    let (what, how) = supervisor_texts(supervisor);
    if choices.kill_hook {
        return Check::passed(
            NAME,
            format!("{what}; the hook before-source-kill stops it"),
        );
    }
    match restarts(supervisor) {
        Some(false) => Check::passed(NAME, format!("{what}, which does not start it again")),
        Some(true) => Check::guarded(
            NAME,
            choices.force,
            format!(
                "{what}, which starts it again when it is killed after the move: it would run twice"
            ),
            format!("{how} in a hook before-source-kill"),
        ),
        None => Check::warning(
            NAME,
            format!("{what}, which may start it again when it is killed after the move"),
            format!("make sure that it does not, or {how} in a hook before-source-kill"),
        ),
    }
}

/// Whether the workload would be started again after SIGKILL; `None` where that is not known.
fn restarts(supervisor: &Supervisor) -> Option<bool> {
    match supervisor {
        Supervisor::Unit { restart, .. } => {
            let never =
                |policy: &String| !matches!(policy.as_str(), "no" | "on-success" | "on-watchdog");
            restart.as_ref().map(never)
        }
        Supervisor::Container { restart, .. } => restart
            .as_ref()
            .map(|policy| !matches!(policy.as_str(), "" | "no")),
        Supervisor::Parent { .. } => Some(true),
    }
}

fn supervisor_texts(supervisor: &Supervisor) -> (String, String) {
    match supervisor {
        Supervisor::Unit { name, restart } => {
            let policy = restart.as_deref().unwrap_or("unknown");
            (
                format!("it belongs to {name} of systemd (Restart={policy})"),
                format!(
                    "take that away (a drop-in with Restart=no under /run/systemd/system/{name}.d)"
                ),
            )
        }
        Supervisor::Container { name, restart } => {
            let policy = restart.as_deref().unwrap_or("unknown");
            (
                format!("it is the container {name} (restart policy {policy})"),
                "set its restart policy to no (docker update --restart=no)".to_owned(),
            )
        }
        Supervisor::Parent { pid, comm } => (
            format!("its parent is {comm} (process {pid})"),
            format!("tell {comm} to let it go"),
        ),
    }
}

fn named(process: &Process) -> String {
    format!("process {} ({})", process.pid, process.comm)
}

/// Each once, the first few.
fn collect(survey: &Survey, of: impl Fn(&Process) -> Vec<String>) -> Vec<String> {
    let mut all: Vec<_> = survey.processes.iter().flat_map(of).collect();
    all.sort_unstable();
    all.dedup();
    all.truncate(8);
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preflight::check::Outcome::{self, Failed, Passed, Skipped, Warning};
    use crate::preflight::facts::sample;
    use crate::preflight::survey::Deleted;
    use crate::preflight::unix::UnixPeer;

    fn survey() -> Survey {
        let root = Process {
            pid: 400,
            session: 400,
            comm: "service".into(),
            ..Process::default()
        };
        let child = Process {
            pid: 401,
            session: 400,
            ..root.clone()
        };
        let mut survey = Survey {
            facts: sample(),
            processes: vec![root, child],
            nftables: true,
            privileged: true,
            shares_ipc: true,
            ..Survey::default()
        };
        survey.choices.tcp_established = true;
        survey
    }

    /// The outcome of the check `name` after `change`.
    fn outcome(name: &str, change: impl FnOnce(&mut Survey)) -> Outcome {
        let mut survey = survey();
        change(&mut survey);
        let checks = check_source(&survey);
        let check = checks
            .iter()
            .find(|check| check.name == name)
            .expect("there is such a check");
        let must_advise = matches!(check.outcome, Failed | Warning);
        assert_eq!(must_advise, !check.advice.is_empty(), "{check}");
        check.outcome
    }

    #[test]
    fn a_plain_service_passes() {
        let checks = check_source(&survey());
        assert!(
            checks.iter().all(|check| check.outcome == Passed),
            "{checks:?}"
        );
    }

    #[test]
    fn crxfer_needs_privileges() {
        assert_eq!(
            outcome("privileges", |survey| survey.privileged = false),
            Failed
        );
    }

    #[test]
    fn criu_must_be_there_and_fit_the_kernel() {
        let with = |version, kernel: &str, inet| {
            outcome("criu", |survey| {
                survey.facts.host.criu = version;
                survey.facts.host.kernel = kernel.into();
                survey.facts.tree.inet_sockets = inet;
            })
        };
        let (old, new) = (CriuVersion::new(4, 1, 1), CriuVersion::new(4, 2, 0));
        assert_eq!(with(None, "6.1.0", false), Failed);
        assert_eq!(with(old, "6.16.1", true), Failed);
        assert_eq!(with(old, "6.16.1", false), Passed);
        assert_eq!(with(old, "6.15.9", true), Passed);
        assert_eq!(with(new, "7.0", true), Passed);
    }

    #[test]
    fn the_root_leads_its_session_or_is_a_shell_job() {
        assert_eq!(
            outcome("session", |survey| survey.processes[0].session = 7),
            Failed
        );
        let job = |survey: &mut Survey| {
            survey.processes[0].session = 7;
            survey.choices.shell_job = true;
        };
        assert_eq!(outcome("session", job), Passed);
        assert_eq!(
            outcome("session", |survey| survey.processes.clear()),
            Skipped
        );
    }

    #[test]
    fn a_terminal_from_outside_is_warned_of() {
        let terminal =
            |survey: &mut Survey| survey.processes[0].terminals = vec!["/dev/pts/0".into()];
        assert_eq!(outcome("terminals", terminal), Warning);
        let own = |survey: &mut Survey| {
            terminal(survey);
            survey.processes[1].special = vec!["/dev/ptmx".into()];
        };
        assert_eq!(outcome("terminals", own), Passed);
    }

    #[test]
    fn a_traced_or_dead_process_stops_it() {
        assert_eq!(
            outcome("processes", |survey| survey.processes[1].tracer = 9),
            Failed
        );
        assert_eq!(
            outcome("processes", |survey| survey.processes[0].zombie = true),
            Failed
        );
        assert_eq!(
            outcome("processes", |survey| survey.processes[1].zombie = true),
            Passed
        );
    }

    #[test]
    fn descriptors_that_criu_refuses_stop_it_and_unknown_ones_do_not() {
        let with = |what: &str| {
            outcome("descriptors", |survey| {
                survey.processes[1].special = vec![what.into()]
            })
        };
        assert_eq!(with("[io_uring]"), Failed);
        assert_eq!(with("[userfaultfd]"), Failed);
        assert_eq!(with("[eventpoll]"), Passed);
        assert_eq!(with("/dev/urandom"), Passed);
        assert_eq!(with("/dev/nvidia0"), Warning);
        assert_eq!(with("[something-new]"), Warning);
    }

    #[test]
    fn deleted_files_need_an_option() {
        let with = |linked, bytes, remap| {
            outcome("deleted files", |survey| {
                survey.choices.link_remap = remap;
                survey.processes[0].deleted = vec![Deleted {
                    path: "/a".into(),
                    bytes,
                    linked,
                }];
            })
        };
        assert_eq!(with(true, 0, false), Failed);
        assert_eq!(with(true, 1 << 30, true), Passed);
        assert_eq!(with(false, 1 << 20, false), Passed);
        assert_eq!(with(false, (1 << 20) + 512, false), Failed);
    }

    #[test]
    fn locks_and_system_v_memory_are_found() {
        let lock = |survey: &mut Survey| survey.processes[1].locks = true;
        assert_eq!(outcome("file locks", lock), Failed);
        let allowed = |survey: &mut Survey| {
            lock(survey);
            survey.choices.file_locks = true;
        };
        assert_eq!(outcome("file locks", allowed), Passed);
        let memory = |survey: &mut Survey| survey.processes[0].sysv_memory = true;
        assert_eq!(outcome("System V memory", memory), Failed);
        let own = |survey: &mut Survey| {
            memory(survey);
            survey.shares_ipc = false;
        };
        assert_eq!(outcome("System V memory", own), Passed);
    }

    #[test]
    fn unix_sockets_to_others_are_refused_or_need_an_option() {
        let with = |datagram, change: fn(&mut Survey)| {
            outcome("UNIX sockets", |survey| {
                let name = "/run/systemd/journal/stdout".into();
                survey.unix_peers = vec![UnixPeer { name, datagram }];
                change(survey);
            })
        };
        assert_eq!(with(false, |_| ()), Failed);
        assert_eq!(
            with(false, |survey| survey.choices.ext_unix_sk = true),
            Failed
        );
        assert_eq!(
            with(false, |survey| survey.choices.external = true),
            Warning
        );
        assert_eq!(with(true, |_| ()), Failed);
        assert_eq!(
            with(true, |survey| survey.choices.ext_unix_sk = true),
            Passed
        );
    }

    #[test]
    fn connections_need_a_choice() {
        let none = |survey: &mut Survey| survey.choices.tcp_established = false;
        assert_eq!(outcome("connections", none), Failed);
        let close = |survey: &mut Survey| {
            survey.choices.tcp_established = false;
            survey.choices.tcp_close = true;
        };
        assert_eq!(outcome("connections", close), Passed);
        assert_eq!(
            outcome("connections", |survey| survey.in_flight = 1),
            Warning
        );
        let without = |survey: &mut Survey| {
            none(survey);
            survey.facts.tree.connections = 0;
        };
        assert_eq!(outcome("connections", without), Passed);
    }

    #[test]
    fn iptables_is_warned_of_with_its_cost() {
        let mut with = survey();
        with.nftables = false;
        with.facts.tree.connections = 200;
        let check = network_lock(&with);
        assert!(
            check.outcome == Warning && check.found.contains("8000 ms"),
            "{check}"
        );
        assert_eq!(
            outcome("network lock", |survey| survey.facts.tree.connections = 0),
            Skipped
        );
    }

    #[test]
    fn a_supervisor_that_would_start_it_again_stops_it() {
        let unit = |restart: Option<&str>| Supervisor::Unit {
            name: "a.service".into(),
            restart: restart.map(str::to_owned),
        };
        let container = |restart: Option<&str>| Supervisor::Container {
            name: "docker-1".into(),
            restart: restart.map(str::to_owned),
        };
        let with =
            |supervisor| outcome("supervisor", |survey| survey.supervisor = Some(supervisor));
        assert_eq!(with(unit(Some("on-failure"))), Failed);
        assert_eq!(with(unit(Some("no"))), Passed);
        assert_eq!(with(unit(None)), Warning);
        assert_eq!(with(container(Some("always"))), Failed);
        assert_eq!(with(container(Some(""))), Passed);
        assert_eq!(with(container(None)), Warning);
        let parent = Supervisor::Parent {
            pid: 9,
            comm: "runsv".into(),
        };
        assert_eq!(with(parent.clone()), Failed);
        let changed = |change: fn(&mut Survey)| {
            outcome("supervisor", |survey| {
                survey.supervisor = Some(parent.clone());
                change(survey);
            })
        };
        assert_eq!(changed(|survey| survey.choices.kill_hook = true), Passed);
        assert_eq!(changed(|survey| survey.choices.force = true), Warning);
    }
}
