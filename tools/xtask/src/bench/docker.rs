//! A memcached in a Docker container, moved by crxfer-docker and by what Docker's own commands can do.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

use super::baseline::{Clock, Daemon as Rsync, Parts};
use super::{Options, median};
use crate::apt;
use crate::crxfer::migrate::Migration;
use crate::crxfer::{Crxfer, Place};
use crate::docker::{self, Daemons};
use crate::hosts::{Host, Rate};
use crate::run;
use crate::scratch::Scratch;
use crate::stage::Stage;
use crate::table::table;

/// The container's name.
const NAME: &str = "store";

const RATES: [u32; 2] = [1000, 100];

/// A way to move it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    /// Checkpoint that leaves it running, rsync, second checkpoint, rsync, start from it
    TwoCheckpoints,
    Crxfer,
}

const METHODS: [Method; 2] = [Method::TwoCheckpoints, Method::Crxfer];

impl Method {
    fn name(self) -> &'static str {
        match self {
            Self::TwoCheckpoints => "two checkpoints, rsync",
            Self::Crxfer => "crxfer-docker",
        }
    }
}

/// Downtimes in ms, and bytes on the line.
type Runs = Vec<(f64, f64)>;

pub(super) fn run(options: &Options) -> Result<()> {
    apt::ensure(&apt::NETWORK)?;
    apt::ensure(&[apt::MEMCACHED, apt::RSYNC, apt::ARPING, apt::DOCKER])?;
    let crxfer = Crxfer::build()?;
    let mib = options.mib.unwrap_or(150);
    println!(
        "memcached in a container with {mib} MB in values of 100 KB, {} rewritten a second; a client asks every 2 ms\n",
        options.writes
    );
    let mut cells: Vec<(u32, Method, Runs)> = RATES
        .iter()
        .flat_map(|&rate| METHODS.map(|method| (rate, method, Runs::new())))
        .collect();
    for _ in 0..options.pairs {
        for (rate, method, runs) in &mut cells {
            let measured = one(&crxfer, *method, *rate, mib, options.writes)
                .with_context(|| format!("{} at {rate} Mb/s failed", method.name()))?;
            runs.push(measured);
        }
    }
    println!("\n{}", summary(&cells));
    Ok(())
}

fn one(crxfer: &Crxfer, method: Method, rate: u32, mib: u64, writes: u32) -> Result<(f64, f64)> {
    let (stage, daemons) = docker::serving(NAME, Rate::Megabits(rate), mib, writes, &[])?;
    let memory = Scratch::within(Path::new("/dev/shm"), "docker")?;
    let before = stage.network.hosts.b.line_bytes()?;
    let parts = match method {
        Method::TwoCheckpoints => two_checkpoints(&stage, &daemons, &memory)?,
        Method::Crxfer => by_crxfer(crxfer, &stage, &daemons, &memory)?,
    };
    let wire = stage.network.hosts.b.line_bytes()?.since(before);
    let downtime = stage.moved()?.downtime.ms();
    let parts: Vec<String> = parts
        .iter()
        .map(|(name, time)| format!("{name} {:.0} ms", time.as_secs_f64() * 1e3))
        .collect();
    println!(
        "{rate} Mb/s, {}: {downtime:.0} ms ({})",
        method.name(),
        parts.join(", ")
    );
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let wire = wire as f64 / 1e6;
    Ok((downtime, wire))
}

fn by_crxfer(crxfer: &Crxfer, stage: &Stage, daemons: &Daemons, memory: &Scratch) -> Result<Parts> {
    let network = &stage.network;
    let mut words = Migration::hooks(network);
    words.extend(daemons.b.restore_options());
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let place = Place::On(&network.hosts.b);
    let receiver = crxfer.await_migration(place, &memory.path().join("received"), &words)?;
    let mut clock = Clock::new();
    let ended = daemons
        .a
        .migration(&network.hosts.a, crxfer, NAME, &receiver)
        .with(&more())
        .start()?
        .wait()?;
    ended
        .migrated()
        .with_context(|| format!("crxfer recv said:\n{}", receiver.said()))?;
    clock.lap("all");
    network.withdraw(&network.hosts.a)?;
    Ok(clock.parts)
}

/// More options for crxfer, as `--mode disk`.
fn more() -> Vec<&'static str> {
    let words = std::env::var("CRXFER_BENCH_MIGRATE").unwrap_or_default();
    words.leak().split_whitespace().collect()
}

/// The thesis's way, as well as Docker's commands do it: CRIU with nftables, copies to memory by an
/// rsync daemon, the second on top of the first, so that only what changed crosses the line.
fn two_checkpoints(stage: &Stage, daemons: &Daemons, memory: &Scratch) -> Result<Parts> {
    let network = &stage.network;
    let (a, b) = (&network.hosts.a, &network.hosts.b);
    for host in [a, b] {
        let conf = host.file(Path::new("/etc/criu/runc.conf"));
        fs::write(conf, "network-lock nftables\ntcp-established\n")?;
    }
    let words = docker::words_of(&daemons.a, a, NAME)?;
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let mut clock = Clock::new();
    let create = ["create", "--network", "host", "--name", NAME, docker::STORE];
    let id = daemons.b.docker(b, &[&create[..], &words].concat())?;
    let place = daemons.b.checkpoints(&id);
    let target = place.join(NAME);
    fs::create_dir_all(&target)?;
    let rsync = Rsync::start(b, &target, memory)?;
    clock.lap("create");
    let checkpoint = |host: &Host, number: &str, more: &[&str]| -> Result<std::path::PathBuf> {
        let directory = memory.directory(number)?;
        let text = directory.display().to_string();
        let words = ["checkpoint", "create", "--checkpoint-dir", &text];
        daemons
            .a
            .docker(host, &[&words[..], more, &[NAME, NAME]].concat())?;
        Ok(directory.join(NAME))
    };
    let first = checkpoint(a, "first", &["--leave-running"])?;
    clock.lap("first checkpoint");
    rsync.copy(a, b, &first)?;
    clock.lap("first copy");
    network.prepare(b)?;
    let second = checkpoint(a, "second", &[])?;
    clock.lap("checkpoint");
    rsync.copy(a, b, &second)?;
    clock.lap("copy");
    daemons
        .b
        .docker(b, &["start", "--checkpoint", NAME, NAME])?;
    clock.lap("start");
    network.announce(b)?;
    network.withdraw(a)?;
    // CRIU leaves the rules that lock the connections of what moved away.
    run::quiet(a.command("nft").args(["flush", "ruleset"]))?;
    Ok(clock.parts)
}

fn summary(cells: &[(u32, Method, Runs)]) -> String {
    let rows: Vec<Vec<String>> = cells
        .iter()
        .map(|(rate, method, runs)| {
            let downtimes: Vec<f64> = runs.iter().map(|run| run.0).collect();
            let least = downtimes.iter().copied().fold(f64::INFINITY, f64::min);
            let most = downtimes.iter().copied().fold(0.0, f64::max);
            vec![
                format!("{rate} Mb/s, {}", method.name()),
                format!("{:.0} ms", median(downtimes)),
                format!("{least:.0}"),
                format!("{most:.0}"),
                format!("{:.1} MB", median(runs.iter().map(|run| run.1).collect())),
            ]
        })
        .collect();
    table(
        &["medians", "downtime", "least", "most", "on the wire"],
        &rows,
    )
}
