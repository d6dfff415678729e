//! Other ways to move a process, done as well as their tools allow.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::criu::{Criu, End};
use crate::hosts::{Host, Network};
use crate::run;
use crate::scratch::Scratch;

const RSYNC_PORT: u16 = 8730;
const PAGE_PORT: u16 = 8731;
const DUMP: [&str; 4] = [
    "--tcp-established",
    "--network-lock",
    "nftables",
    // Of clients that connect at that moment.
    "--skip-in-flight",
];
const RESTORE: [&str; 3] = ["--tcp-established", "--network-lock", "nftables"];

/// What is moved, from host A to B.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moving<'a> {
    pub(crate) criu: &'a Criu,
    pub(crate) network: &'a Network,
    pub(crate) pid: u32,
    /// Where images go, in memory.
    pub(crate) memory: &'a Scratch,
}

/// How long each part of a move took.
pub(crate) type Parts = Vec<(&'static str, Duration)>;

/// The method of the studies: a dump into memory that leaves the process running, copied by rsync;
/// then a second one that stops it, copied again, of which rsync moves only what changed; restore.
pub(crate) fn dump_twice_and_rsync(moving: Moving<'_>) -> Result<Parts> {
    let Moving {
        criu,
        network,
        pid,
        memory,
    } = moving;
    let (source, destination) = (
        memory.directory("source")?,
        memory.directory("destination")?,
    );
    let hosts = &network.hosts;
    let daemon = Daemon::start(&hosts.b, &destination, memory)?;
    let mut clock = Clock::new();
    let first = source.join("1");
    criu.dump(&hosts.a, pid, &first, End::LeaveRunning, &DUMP)?;
    clock.lap("first dump");
    daemon.copy(&hosts.a, &hosts.b, &first)?;
    clock.lap("first copy");
    network.prepare(&hosts.b)?;
    clock.lap("address");
    let second = source.join("2");
    criu.dump(&hosts.a, pid, &second, End::Kill, &DUMP)?;
    clock.lap("dump");
    daemon.copy(&hosts.a, &hosts.b, &second)?;
    clock.lap("copy");
    finish(moving, &destination, &mut clock)?;
    Ok(clock.parts)
}

/// What CRIU alone needs: one dump into memory and a restore from the same, with no copy at all.
pub(crate) fn dump_and_restore(moving: Moving<'_>) -> Result<Parts> {
    let Moving {
        criu,
        network,
        pid,
        memory,
    } = moving;
    let directory = memory.directory("both")?.join("1");
    let hosts = &network.hosts;
    network.prepare(&hosts.b)?;
    let mut clock = Clock::new();
    criu.dump(&hosts.a, pid, &directory, End::Kill, &DUMP)?;
    clock.lap("dump");
    finish(moving, &directory, &mut clock)?;
    Ok(clock.parts)
}

/// The disk-less method of the studies: one dump straight into a page server in the destination's
/// memory, then a copy of the small images; restore. Without soft-dirty CRIU has no pre-dumps.
pub(crate) fn dump_to_page_server(moving: Moving<'_>) -> Result<Parts> {
    let Moving {
        criu,
        network,
        pid,
        memory,
    } = moving;
    let (source, destination) = (
        memory.directory("source")?,
        memory.directory("destination")?,
    );
    let hosts = &network.hosts;
    let daemon = Daemon::start(&hosts.b, &destination, memory)?;
    let server = criu.page_server(&hosts.b, &destination, PAGE_PORT)?;
    let mut clock = Clock::new();
    network.prepare(&hosts.b)?;
    clock.lap("address");
    let (address, port) = (hosts.b.address.to_string(), PAGE_PORT.to_string());
    let remote = ["--page-server", "--address", &address, "--port", &port];
    let images = source.join("1");
    criu.dump(
        &hosts.a,
        pid,
        &images,
        End::Kill,
        &[&DUMP[..], &remote].concat(),
    )?;
    server.finish()?;
    clock.lap("dump");
    daemon.copy(&hosts.a, &hosts.b, &images)?;
    clock.lap("copy");
    finish(moving, &destination, &mut clock)?;
    Ok(clock.parts)
}

fn finish(moving: Moving<'_>, images: &Path, clock: &mut Clock) -> Result<()> {
    let Moving {
        criu,
        network,
        memory,
        ..
    } = moving;
    let hosts = &network.hosts;
    criu.restore_with(&hosts.b, images, &memory.directory("work")?, &RESTORE)?;
    clock.lap("restore");
    network.announce(&hosts.b)?;
    clock.lap("announce");
    network.withdraw(&hosts.a)?;
    // CRIU leaves the rules that lock the connections of what moved away.
    run::quiet(hosts.a.command("nft").args(["flush", "ruleset"])).map(drop)
}

/// Measures one part after the other.
pub(crate) struct Clock {
    last: Instant,
    pub(crate) parts: Parts,
}

impl Clock {
    pub(crate) fn new() -> Self {
        Self {
            last: Instant::now(),
            parts: Vec::new(),
        }
    }

    pub(crate) fn lap(&mut self, name: &'static str) {
        self.parts.push((name, self.last.elapsed()));
        self.last = Instant::now();
    }
}

/// `rsync --daemon` on the destination. It ends with its host at the latest.
#[derive(Debug)]
pub(crate) struct Daemon {
    child: Child,
}

impl Daemon {
    pub(crate) fn start(host: &Host, directory: &Path, memory: &Scratch) -> Result<Self> {
        let configuration: PathBuf = memory.path().join("rsyncd.conf");
        fs::write(
            &configuration,
            format!(
                "use chroot = no\nuid = root\ngid = root\n[images]\npath = {}\nread only = no\n",
                directory.display()
            ),
        )?;
        let mut command: Command = host.command("rsync");
        command
            .args(["--daemon", "--no-detach", "--port", &RSYNC_PORT.to_string()])
            .arg("--config")
            .arg(&configuration)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = command.spawn().context("cannot start the rsync daemon")?;
        let daemon = Self { child };
        run::wait_for("the rsync daemon to listen", Duration::from_secs(5), || {
            host.listens_on(RSYNC_PORT).then_some(())
        })?;
        Ok(daemon)
    }

    pub(crate) fn copy(&self, from: &Host, to: &Host, directory: &Path) -> Result<()> {
        let source = format!("{}/", directory.display());
        let target = format!("rsync://{}:{RSYNC_PORT}/images/", to.address);
        let mut command = from.command("rsync");
        run::quiet(command.args(rsync_options()).args([source, target])).map(drop)
    }
}

/// What rsync is called with: in place, as that is the faster way to copy to memory; and two dumps of
/// one second differ.
fn rsync_options() -> Vec<String> {
    let options = std::env::var("CRXFER_BENCH_RSYNC")
        .unwrap_or_else(|_| "-a --inplace --modify-window=-1".to_owned());
    options.split_whitespace().map(str::to_owned).collect()
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It ends with its host at the latest.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
