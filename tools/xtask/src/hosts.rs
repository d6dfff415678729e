//! Two hosts on one machine: each has its own network, processes and mounts, a veth pair joins them.
//!
//! ```text
//!   host A (source)                       host B (destination)
//!   net, pid and mount namespace          net, pid and mount namespace
//!   10.77.0.1 eth0 ──── veth, tc tbf ──── eth0 10.77.0.2
//! ```
//!
//! Process 1 of each host is this program as `xtask init`. It reaps what is orphaned (CRIU needs the
//! pids of the dead to be free) and ends when its standard input is closed. The kernel closes that
//! with this process, however it ends, and then kills all that runs on the host.

mod clients;

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;
use std::{process, thread};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::{Pid, Signal, WaitOptions};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

pub(crate) use clients::{Background, Network, SERVICE, Side, Stop, neighbour};

use crate::run;

/// What the line between the hosts carries, in bits a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rate {
    /// As fast as the machine copies.
    Unlimited,
    /// Shaped with a token bucket, in both directions.
    Megabits(u32),
}

/// A pair of hosts joined by a line. Dropping it ends everything that runs on them.
#[derive(Debug)]
pub(crate) struct Hosts {
    pub(crate) a: Host,
    pub(crate) b: Host,
}

/// First pid that ordinary programs get on the source: away from the pids of `init`.
const FIRST_PID_A: u32 = 1000;
/// First pid on the destination, far above what images of host A want: threads of a receiving
/// crxfer must not hold the pids that a restore needs.
const FIRST_PID_B: u32 = 20_000;

impl Hosts {
    /// Starts both hosts and joins them. Needs root.
    pub(crate) fn new(rate: Rate) -> Result<Self> {
        let Self { a, b } = Self::apart()?;
        let far_end = b.init.to_string();
        let pair = [
            "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", &far_end,
        ];
        run::quiet(a.network_command("ip").args(pair)).context("cannot join the hosts")?;
        a.configure()?;
        b.configure()?;
        let hosts = Self { a, b };
        hosts.shape(rate)?;
        Ok(hosts)
    }

    /// Starts both hosts, which are not joined yet.
    fn apart() -> Result<Self> {
        Ok(Self {
            a: Host::start("A", Ipv4Addr::new(10, 77, 0, 1), FIRST_PID_A)?,
            b: Host::start("B", Ipv4Addr::new(10, 77, 0, 2), FIRST_PID_B)?,
        })
    }

    /// Changes what the line carries.
    pub(crate) fn shape(&self, rate: Rate) -> Result<()> {
        for host in [&self.a, &self.b] {
            host.shape(rate)
                .with_context(|| format!("cannot shape the line of host {}", host.name))?;
        }
        Ok(())
    }
}

/// One of the two hosts.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) name: &'static str,
    pub(crate) address: Ipv4Addr,
    /// Process 1 of the host, by its pid outside.
    init: i32,
    unshare: Child,
    /// Held open: `init` ends when it is closed.
    lifeline: Option<ChildStdin>,
}

impl Host {
    fn start(name: &'static str, address: Ipv4Addr, first_pid: u32) -> Result<Self> {
        let mut unshare = Command::new("unshare")
            .args([
                "--net",
                "--pid",
                "--mount",
                "--fork",
                "--mount-proc",
                "--kill-child",
            ])
            .arg(run::own_program()?)
            .arg("init")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Ctrl-C ends this program; the host then ends by its lifeline, in order.
            .process_group(0)
            .spawn()
            .context("cannot start unshare (package util-linux)")?;
        let lifeline = unshare.stdin.take();
        let mut greeting = String::new();
        let output = unshare
            .stdout
            .take()
            .context("unshare has no standard output")?;
        BufReader::new(output).read_line(&mut greeting)?;
        if greeting.trim() != "ready" {
            let _ = unshare.kill();
            let _ = unshare.wait();
            bail!("host {name} did not start: it needs root and namespaces");
        }
        let init = only_child(unshare.id())?;
        let host = Self {
            name,
            address,
            init,
            unshare,
            lifeline,
        };
        host.write("/proc/sys/kernel/ns_last_pid", &first_pid.to_string())?;
        Ok(host)
    }

    fn configure(&self) -> Result<()> {
        let address = format!("{}/24", self.address);
        let ip = |words: &[&str]| run::quiet(self.network_command("ip").args(words)).map(drop);
        ip(&["address", "add", &address, "dev", "eth0"])?;
        ip(&["link", "set", "eth0", "up"])?;
        ip(&["link", "set", "lo", "up"])
    }

    fn shape(&self, rate: Rate) -> Result<()> {
        // Fails where nothing is set yet, which is as good.
        let _ = run::quiet(
            self.network_command("tc")
                .args(["qdisc", "del", "dev", "eth0", "root"]),
        );
        let Rate::Megabits(megabits) = rate else {
            return Ok(());
        };
        let rate = format!("{megabits}mbit");
        // The bucket holds what the timer lets pass in one tick at 1 Gb/s, and a whole GSO packet.
        let bucket = [
            "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", &rate, "burst", "256kb",
        ];
        run::quiet(
            self.network_command("tc")
                .args(bucket)
                .args(["latency", "30ms"]),
        )
        .map(drop)
    }

    /// A command that will run on this host: in its network, with its processes and mounts.
    pub(crate) fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = self.enter(&["--net", "--pid", "--mount"]);
        command.arg(program.as_ref());
        command
    }

    /// A command that sees only the network of this host, with the pids of outside.
    fn network_command(&self, program: &str) -> Command {
        let mut command = self.enter(&["--net"]);
        command.arg(program);
        command
    }

    fn enter(&self, namespaces: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg("--target")
            .arg(self.init.to_string())
            .args(namespaces)
            .arg("--");
        command
    }

    /// Starts a workload as CRIU wants it: a session of its own, nothing open that was opened outside.
    /// Gives its pid on this host.
    pub(crate) fn start_workload(&self, program: &Path, arguments: &[&str]) -> Result<u32> {
        // bash: the plain shell of Debian cannot close descriptors above 9.
        let script = r#"exec </dev/null >/dev/null 2>&1
            for fd in /proc/self/fd/*; do fd=${fd##*/}; [ "$fd" -le 2 ] || eval "exec $fd>&-"; done
            echo $$ >"$0"; exec "$@""#;
        let pid_file = std::env::temp_dir().join(format!("crxfer-pid-{}-{}", self.init, self.name));
        let _ = fs::remove_file(&pid_file);
        let mut command = self.command("setsid");
        command
            .args(["--fork", "bash", "-c", script])
            .arg(&pid_file)
            .arg(program)
            .args(arguments);
        run::quiet(&mut command)?;
        let pid = run::wait_for("the workload to start", Duration::from_secs(5), || {
            fs::read_to_string(&pid_file).ok()?.trim().parse().ok()
        });
        let _ = fs::remove_file(&pid_file);
        pid
    }

    /// Does `work` with the network of this host, in a thread of its own.
    pub(crate) fn within<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let network = File::open(format!("/proc/{}/ns/net", self.init))
            .with_context(|| format!("host {} is gone", self.name))?;
        thread::scope(|scope| {
            let worker = scope.spawn(move || {
                move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))?;
                work()
            });
            worker
                .join()
                .unwrap_or_else(|_| Err(anyhow!("the work on the host panicked")))
        })
    }

    /// The file of this host that its programs know as `path`.
    pub(crate) fn file(&self, path: &Path) -> PathBuf {
        let inside = path.strip_prefix("/").unwrap_or(path);
        Path::new(&format!("/proc/{}/root", self.init)).join(inside)
    }

    /// Has the next processes of this host get pids above `pid`.
    pub(crate) fn next_pids(&self, pid: u32) -> Result<()> {
        self.write("/proc/sys/kernel/ns_last_pid", &pid.to_string())
    }

    /// What is mounted here, a line each.
    pub(crate) fn mounts(&self) -> Result<Vec<String>> {
        let table = fs::read_to_string(format!("/proc/{}/mounts", self.init))?;
        Ok(table.lines().map(str::to_owned).collect())
    }

    /// The pid namespace, as links in /proc name it.
    pub(crate) fn pid_namespace(&self) -> Option<PathBuf> {
        fs::read_link(format!("/proc/{}/ns/pid", self.init)).ok()
    }

    fn write(&self, path: &str, text: &str) -> Result<()> {
        let mut command = self.command("sh");
        run::quiet(command.args(["-c", r#"echo "$1" >"$0""#, path, text])).map(drop)
    }

    /// Sends `signal` to process `pid` of this host.
    pub(crate) fn signal(&self, pid: u32, signal: &str) -> Result<()> {
        run::quiet(self.command("kill").args(["-s", signal, &pid.to_string()])).map(drop)
    }

    /// Ends the session of `pid`, a workload or its restored copy, and waits until its pids are free.
    pub(crate) fn end(&self, pid: u32) -> Result<()> {
        let members = self.session_of(pid);
        for member in &members {
            // May have ended with another one.
            let _ = self.signal(*member, "KILL");
        }
        run::wait_for("the workload to end", Duration::from_secs(10), || {
            members
                .iter()
                .all(|&member| {
                    !self
                        .file(&PathBuf::from(format!("/proc/{member}")))
                        .exists()
                })
                .then_some(())
        })
    }

    /// The processes in the session of `pid`.
    pub(crate) fn session_of(&self, pid: u32) -> Vec<u32> {
        let processes = fs::read_dir(self.file(Path::new("/proc")))
            .into_iter()
            .flatten()
            .flatten();
        let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        pids.filter(|&other| self.session(other) == Some(pid) || other == pid)
            .collect()
    }

    fn session(&self, pid: u32) -> Option<u32> {
        let stat = fs::read_to_string(self.file(Path::new(&format!("/proc/{pid}/stat")))).ok()?;
        // pid (name) state ppid pgrp session …; the name may hold anything.
        stat.rsplit_once(')')?
            .1
            .split_whitespace()
            .nth(3)?
            .parse()
            .ok()
    }

    /// Waits until no TCP connection of this host is open: CRIU dumps open ones only on request.
    pub(crate) fn wait_for_closed_connections(&self) -> Result<()> {
        const ESTABLISHED: &str = "01";
        const CLOSE_WAIT: &str = "08";
        run::wait_for("connections to close", Duration::from_secs(5), || {
            let open = |(_, state): &(String, String)| state == ESTABLISHED || state == CLOSE_WAIT;
            (!self.sockets().iter().any(open)).then_some(())
        })
    }

    /// Whether a program of this host listens on TCP port `port`.
    pub(crate) fn listens_on(&self, port: u16) -> bool {
        const LISTEN: &str = "0A";
        let port = format!(":{port:04X}");
        self.sockets()
            .iter()
            .any(|(local, state)| local.ends_with(&port) && state == LISTEN)
    }

    /// Local address and state of each TCP socket, as the kernel writes them.
    fn sockets(&self) -> Vec<(String, String)> {
        let table = fs::read_to_string(format!("/proc/{}/net/tcp", self.init)).unwrap_or_default();
        let rows = table
            .lines()
            .skip(1)
            .map(|row| row.split_whitespace().collect::<Vec<_>>());
        rows.filter_map(|row| Some((row.get(1)?.to_string(), row.get(3)?.to_string())))
            .collect()
    }

    /// Bytes that the line brought to and took from this host so far, as the kernel counts them.
    pub(crate) fn line_bytes(&self) -> Result<LineBytes> {
        let table = fs::read_to_string(format!("/proc/{}/net/dev", self.init))?;
        let row = table
            .lines()
            .find_map(|row| row.trim_start().strip_prefix("eth0:"));
        let numbers: Vec<u64> = row
            .unwrap_or_default()
            .split_whitespace()
            .filter_map(|word| word.parse().ok())
            .collect();
        match (numbers.first(), numbers.get(8)) {
            (Some(&received), Some(&sent)) => Ok(LineBytes { received, sent }),
            _ => bail!("host {} has no interface eth0", self.name),
        }
    }
}

/// Traffic of one host since it was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LineBytes {
    pub(crate) received: u64,
    pub(crate) sent: u64,
}

impl LineBytes {
    /// Bytes in both directions since `earlier`.
    pub(crate) fn since(self, earlier: Self) -> u64 {
        (self.received - earlier.received) + (self.sent - earlier.sent)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        drop(self.lifeline.take());
        let _ = self.unshare.wait();
    }
}

/// The only child of process `parent`.
pub(crate) fn only_child(parent: u32) -> Result<i32> {
    let list = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"))?;
    list.split_whitespace()
        .next()
        .and_then(|pid| pid.parse().ok())
        .with_context(|| format!("process {parent} has no child"))
}

/// Sends SIGKILL to a process by its pid outside; one that is gone is no error.
pub(crate) fn kill(pid: i32) {
    if let Some(pid) = Pid::from_raw(pid) {
        let _ = rustix::process::kill_process(pid, Signal::KILL);
    }
}

/// Sends SIGTERM to a process by its pid outside; one that is gone is no error.
pub(crate) fn terminate(pid: i32) {
    if let Some(pid) = Pid::from_raw(pid) {
        let _ = rustix::process::kill_process(pid, Signal::TERM);
    }
}

/// Has a stopped process go on, by its pid outside; one that is gone is no error.
pub(crate) fn go_on(pid: u32) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, Signal::CONT);
    }
}

/// Process 1 of a host: reaps the dead until its standard input is closed.
pub(crate) fn init() -> Result<()> {
    thread::spawn(|| {
        let _ = io::stdin().read_to_end(&mut Vec::new());
        // The kernel kills the rest of the host with its process 1.
        process::exit(0);
    });
    println!("ready");
    io::stdout().flush()?;
    loop {
        if rustix::process::wait(WaitOptions::empty()).is_err() {
            // No child at the moment.
            thread::sleep(Duration::from_millis(5));
        }
    }
}
