//! A third host for clients. They reach a service by an address that moves with it.
//!
//! ```text
//!   host A (source)      host C (clients)        host B (destination)
//!   10.77.0.1 eth0 ─tbf─ port-a ┐      ┌ port-b ─tbf─ eth0 10.77.0.2
//!                               bridge eth0
//!                               10.77.0.3
//! ```
//!
//! The service address, 10.77.0.100, lies on the loopback device of the host that serves: prepared
//! there without a word, so that a restore can bind to it, and later announced to the bridge.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::{Host, Hosts, Rate};
use crate::run;
use crate::scratch::Scratch;

/// Where clients find the service, whichever host has it.
pub(crate) const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 100);

const FIRST_PID_C: u32 = 30_000;
/// Hardware addresses of A and B: the neighbour table of C tells by them who has the service address.
const HARDWARE: [&str; 2] = ["02:00:00:00:77:01", "02:00:00:00:77:02"];

/// Answers no question for addresses that are not on the device asked.
const PREPARE: &str = "#!/bin/sh
echo 1 >/proc/sys/net/ipv4/conf/all/arp_ignore
ip address replace SERVICE/32 dev lo
";
const ANNOUNCE: &str = "#!/bin/sh
echo 0 >/proc/sys/net/ipv4/conf/all/arp_ignore
setsid arping -q -c TIMES -A -I eth0 -s SERVICE SERVICE </dev/null >/dev/null 2>&1 &
";
const WITHDRAW: &str = "#!/bin/sh
echo 1 >/proc/sys/net/ipv4/conf/all/arp_ignore
ip address del SERVICE/32 dev lo
";

/// One of the two hosts that can serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    A,
    B,
}

impl Side {
    /// The one on the other end of the line.
    pub(crate) fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }
}

/// Two hosts for the service and one for its clients. Dropping it ends everything that runs on them.
#[derive(Debug)]
pub(crate) struct Network {
    pub(crate) hosts: Hosts,
    pub(crate) c: Host,
    scripts: Scratch,
}

impl Network {
    /// Starts the three hosts with the service address on A. Needs root.
    pub(crate) fn new(rate: Rate) -> Result<Self> {
        Self::announcing(rate, 2)
    }

    /// The same, where a host that gets the address says so `times` times, a second apart. Once is what
    /// moves to and fro need: a late word of the host before misleads clients.
    pub(crate) fn announcing(rate: Rate, times: u32) -> Result<Self> {
        let hosts = Hosts::apart()?;
        let c = Host::start("C", Ipv4Addr::new(10, 77, 0, 3), FIRST_PID_C)?;
        let network = Self {
            hosts,
            c,
            scripts: Scratch::new("address")?,
        };
        network.join().context("cannot join the hosts")?;
        network.hosts.shape(rate)?;
        for (name, text) in [
            ("prepare", PREPARE),
            ("announce", ANNOUNCE),
            ("withdraw", WITHDRAW),
        ] {
            let file = network.script(name);
            let text = text.replace("SERVICE", &SERVICE.to_string());
            fs::write(&file, text.replace("TIMES", &times.to_string()))?;
            fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
        }
        network.prepare(&network.hosts.a)?;
        network.announce(&network.hosts.a)?;
        Ok(network)
    }

    fn join(&self) -> Result<()> {
        let on_c = |words: &[&str]| run::quiet(self.c.network_command("ip").args(words)).map(drop);
        on_c(&["link", "add", "eth0", "type", "bridge"])?;
        let bridge = self.c.init.to_string();
        let ends = [(&self.hosts.a, "port-a"), (&self.hosts.b, "port-b")];
        for ((host, port), hardware) in ends.into_iter().zip(HARDWARE) {
            let pair = [
                "link", "add", "eth0", "address", hardware, "type", "veth", "peer", "name", port,
                "netns", &bridge,
            ];
            run::quiet(host.network_command("ip").args(pair))?;
            on_c(&["link", "set", port, "master", "eth0", "up"])?;
            host.configure()?;
        }
        self.c.configure()?;
        // A neighbour that changed a moment ago may change again: moves follow each other fast here.
        self.c.write("/proc/sys/net/ipv4/neigh/eth0/locktime", "0")
    }

    /// The script that does one step of moving the address: `prepare`, `announce` or `withdraw`.
    pub(crate) fn script(&self, step: &str) -> PathBuf {
        self.scripts.path().join(step)
    }

    /// Puts the service address on `host`, which nobody notices.
    pub(crate) fn prepare(&self, host: &Host) -> Result<()> {
        run::quiet(&mut host.command(self.script("prepare"))).map(drop)
    }

    /// Tells clients that `host` has the service address.
    pub(crate) fn announce(&self, host: &Host) -> Result<()> {
        run::quiet(&mut host.command(self.script("announce"))).map(drop)
    }

    /// Takes the service address from `host`.
    pub(crate) fn withdraw(&self, host: &Host) -> Result<()> {
        run::quiet(&mut host.command(self.script("withdraw"))).map(drop)
    }

    /// Lets A and B no longer reach each other, or again; clients reach both all the time.
    pub(crate) fn part(&self, parted: bool) -> Result<()> {
        let state = if parted { "on" } else { "off" };
        for port in ["port-a", "port-b"] {
            let words = ["link", "set", "dev", port, "type", "bridge_slave"];
            let mut command = self.c.network_command("ip");
            run::quiet(command.args(words).args(["isolated", state]))?;
        }
        Ok(())
    }

    /// Takes the line of one host out of the switch, or puts it back: nobody reaches it.
    pub(crate) fn plug(&self, side: Side, plugged: bool) -> Result<()> {
        let port = match side {
            Side::A => "port-a",
            Side::B => "port-b",
        };
        let state = if plugged { "up" } else { "down" };
        let mut command = self.c.network_command("ip");
        run::quiet(command.args(["link", "set", port, state])).map(drop)
    }

    /// Has TCP try again at least every second on all three hosts, for connections made from now on:
    /// after a standstill clients go on at once.
    pub(crate) fn retry_soon(&self) -> Result<()> {
        for host in [&self.hosts.a, &self.hosts.b, &self.c] {
            host.write("/proc/sys/net/ipv4/tcp_rto_max_ms", "1000")?;
            // As long as without: minutes.
            host.write("/proc/sys/net/ipv4/tcp_retries2", "250")?;
        }
        Ok(())
    }

    pub(crate) fn host(&self, side: Side) -> &Host {
        match side {
            Side::A => &self.hosts.a,
            Side::B => &self.hosts.b,
        }
    }
}

/// Who has the service address, as the calling thread's network knows it.
pub(crate) fn neighbour() -> Option<Side> {
    let table = fs::read_to_string("/proc/thread-self/net/arp").ok()?;
    let address = SERVICE.to_string();
    let row = table
        .lines()
        .find(|row| row.split_whitespace().next() == Some(&address))?;
    let hardware = row.split_whitespace().nth(3)?;
    match HARDWARE.iter().position(|one| *one == hardware)? {
        0 => Some(Side::A),
        _ => Some(Side::B),
    }
}

/// Work that goes on in a thread of its own, with the network of one host, until it is told to stop.
#[derive(Debug)]
pub(crate) struct Background<T> {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<T>>>,
}

/// Tells work in the background when to end.
pub(crate) type Stop = Arc<AtomicBool>;

impl Host {
    /// Starts `work` with the network of this host.
    pub(crate) fn background<T: Send + 'static>(
        &self,
        work: impl FnOnce(Stop) -> Result<T> + Send + 'static,
    ) -> Result<Background<T>> {
        let network = File::open(
            Path::new("/proc")
                .join(self.init.to_string())
                .join("ns/net"),
        )
        .with_context(|| format!("host {} is gone", self.name))?;
        let stop = Stop::default();
        let seen = stop.clone();
        let thread = thread::spawn(move || {
            move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))?;
            work(seen)
        });
        Ok(Background {
            stop,
            thread: Some(thread),
        })
    }
}

impl Host {
    /// Has a program that does nothing take `pid` on this host.
    pub(crate) fn occupy(&self, pid: u32) -> Result<()> {
        // What is started later must not get the pids behind it, which a copy may need, too.
        let script = r#"last=$(cat /proc/sys/kernel/ns_last_pid)
            echo $(($0 - 1)) >/proc/sys/kernel/ns_last_pid
            setsid sleep 1000 </dev/null >/dev/null 2>&1 &
            echo $last >/proc/sys/kernel/ns_last_pid
            [ $! = $0 ]"#;
        let pid = pid.to_string();
        run::quiet(self.command("sh").args(["-c", script, &pid]))
            .with_context(|| format!("cannot take pid {pid} on host {}", self.name))
            .map(drop)
    }

    /// Hides the file `path` from all programs of this host.
    pub(crate) fn hide(&self, path: &Path) -> Result<()> {
        let mut command = self.command("mount");
        run::quiet(command.args(["--bind", "/dev/null"]).arg(path)).map(drop)
    }

    /// Takes the line of this host away, or gives it back.
    pub(crate) fn connect(&self, connected: bool) -> Result<()> {
        let state = if connected { "up" } else { "down" };
        let mut command = self.network_command("ip");
        run::quiet(command.args(["link", "set", "eth0", state])).map(drop)
    }
}

impl<T> Background<T> {
    /// Tells it to stop and gives what it found.
    pub(crate) fn finish(mut self) -> Result<T> {
        self.stop.store(true, Ordering::Relaxed);
        self.join()
    }

    /// Waits until it ends by itself.
    pub(crate) fn wait(mut self) -> Result<T> {
        self.join()
    }

    fn join(&mut self) -> Result<T> {
        let thread = self.thread.take().context("it was joined before")?;
        thread
            .join()
            .unwrap_or_else(|_| Err(anyhow!("work in the background panicked")))
    }
}

impl<T> Drop for Background<T> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
