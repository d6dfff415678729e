//! LXC containers moved by crxfer and, in turns, by LXC's own tool as the studies did it.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::baseline::{Clock, Daemon};
use super::{Options, median};
use crate::apt;
use crate::client::{Download, Poller};
use crate::criu;
use crate::crxfer::Crxfer;
use crate::hosts::{Rate, Side};
use crate::lxc::{Ground, Kind, PACKAGES, QUESTION, VIDEO, VIDEO_PORT};
use crate::run;
use crate::table::{bytes, table};

/// The video of the study: 442 s.
const VIDEO_BYTES: usize = 93_500_000;
/// How long a container works before it is moved.
const QUIET: Duration = Duration::from_secs(2);

/// A way to move it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    /// A checkpoint that leaves it running, copied to the destination's tmpfs by an rsync daemon; then
    /// one that stops it, of which rsync moves what changed; restore.
    Tmpfs,
    Crxfer,
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tmpfs => "lxc-checkpoint, tmpfs, rsync",
            Self::Crxfer => "crxfer migrate",
        })
    }
}

/// How long each part of a move took.
type Parts = Vec<(String, Duration)>;

/// One move.
struct Run {
    downtime_ms: f64,
    total: Duration,
    wire: u64,
    parts: Parts,
}

pub(super) fn run(options: &Options) -> Result<()> {
    apt::ensure(&apt::NETWORK)?;
    apt::ensure(&PACKAGES)?;
    apt::ensure(&[apt::RSYNC, apt::ARPING])?;
    let criu = criu::ensure()?;
    let crxfer = Crxfer::build()?;
    println!(
        "LXC containers, {} Mb/s, CRIU {}; blank: time between two of its ticks, 1 ms apart; video: time between two answers to a client that asks every 2 ms\n",
        options.rate, criu.version
    );
    let mut rows = Vec::new();
    for kind in [Kind::Blank, Kind::Video] {
        let mut runs = [(Method::Tmpfs, Vec::new()), (Method::Crxfer, Vec::new())];
        for _ in 0..options.pairs {
            for (method, runs) in &mut runs {
                let ground = Ground::new(&crxfer, kind, Rate::Megabits(options.rate), VIDEO_BYTES)?;
                let run = measure(&ground, *method)
                    .with_context(|| format!("{}, {method}", kind.name()))?;
                println!("{}", line(kind, *method, &run));
                runs.push(run);
            }
        }
        rows.extend(runs.iter().map(|(method, runs)| row(kind, *method, runs)));
    }
    let head = [
        "medians",
        "downtime",
        "least",
        "most",
        "total",
        "on the wire",
    ];
    println!("\n{}", table(&head, &rows));
    Ok(())
}

fn measure(ground: &Ground<'_>, method: Method) -> Result<Run> {
    let poller = match ground.container.kind {
        Kind::Blank => None,
        Kind::Video => Some(watch(ground)?),
    };
    std::thread::sleep(QUIET);
    let before = ground.network.hosts.b.line_bytes()?;
    let begin = Instant::now();
    let (since, parts) = match method {
        Method::Tmpfs => by_lxc(ground)?,
        Method::Crxfer => (0, by_crxfer(ground)?),
    };
    let total = begin.elapsed();
    let wire = ground.network.hosts.b.line_bytes()?.since(before);
    let downtime_ms = match &poller {
        Some((poller, _)) => {
            poller.ensure_only(Side::B)?;
            poller.service().handover()?.ms()
        }
        None => {
            let moved = ground.container.ticks()?.len();
            let ticks = run::wait_for("ticks on B", Duration::from_secs(10), || {
                ground
                    .container
                    .ticks()
                    .ok()
                    .filter(|now| now.len() > moved + 100)
            })?;
            ticks.ensure_one_writer(2)?;
            ticks.longest_gap(since).as_secs_f64() * 1e3
        }
    };
    ground.ensure_on(Side::B)?;
    if let Some((poller, download)) = poller {
        let arrived = download.arrived();
        run::wait_for("the video to flow on", Duration::from_secs(10), || {
            (download.arrived() > arrived).then_some(())
        })?;
        poller.finish()?;
    }
    Ok(Run {
        downtime_ms,
        total,
        wire,
        parts,
    })
}

/// A client that watches the video, and one that asks.
fn watch(ground: &Ground<'_>) -> Result<(Poller, Download)> {
    let download = Download::start(&ground.network.c, VIDEO_PORT, VIDEO)?;
    let poller = Poller::start(&ground.network, QUESTION)?;
    run::wait_for("the video to flow", Duration::from_secs(10), || {
        (download.arrived() > 0).then_some(())
    })?;
    Ok((poller, download))
}

/// Gives the number of ticks before the checkpoint that stops it: the first one stands still, too.
fn by_lxc(ground: &Ground<'_>) -> Result<(usize, Parts)> {
    let (network, container) = (&ground.network, &ground.container);
    let hosts = &network.hosts;
    let source = ground.memory.directory("source")?;
    let destination = ground.memory.directory("destination")?;
    let daemon = Daemon::start(&hosts.b, &destination, &ground.memory)?;
    let mut clock = Clock::new();
    let first = source.join("1");
    container.checkpoint(&hosts.a, &first, false)?;
    clock.lap("first checkpoint");
    daemon.copy(&hosts.a, &hosts.b, &first)?;
    clock.lap("first copy");
    network.prepare(&hosts.b)?;
    clock.lap("address");
    let since = match container.kind {
        Kind::Blank => container.ticks()?.len(),
        Kind::Video => 0,
    };
    let second = source.join("2");
    container.checkpoint(&hosts.a, &second, true)?;
    clock.lap("checkpoint");
    daemon.copy(&hosts.a, &hosts.b, &second)?;
    clock.lap("copy");
    container.restore(&hosts.b, &destination)?;
    clock.lap("restore");
    network.announce(&hosts.b)?;
    clock.lap("announce");
    network.withdraw(&hosts.a)?;
    let parts = clock.parts.into_iter();
    Ok((
        since,
        parts.map(|(name, time)| (name.to_owned(), time)).collect(),
    ))
}

fn by_crxfer(ground: &Ground<'_>) -> Result<Parts> {
    let receiver = ground.receive_with(&ground.restore_command())?;
    let report = ground.migrate(&receiver)?;
    let ms = |time: f64| Duration::from_secs_f64(time.max(0.0) / 1e3);
    let mut parts = vec![("it says".to_owned(), ms(report.downtime_ms))];
    for phase in report.phases {
        parts.push((phase.name, ms(phase.end_ms - phase.begin_ms)));
    }
    Ok(parts)
}

fn line(kind: Kind, method: Method, run: &Run) -> String {
    let part =
        |(name, time): &(String, Duration)| format!("{name} {:.0} ms", time.as_secs_f64() * 1e3);
    let parts: Vec<String> = run.parts.iter().map(part).collect();
    format!(
        "{}, {method}: {:.0} ms: {}",
        kind.name(),
        run.downtime_ms,
        parts.join(", ")
    )
}

fn row(kind: Kind, method: Method, runs: &[Run]) -> Vec<String> {
    let downtimes = || runs.iter().map(|run| run.downtime_ms);
    let mut wire: Vec<u64> = runs.iter().map(|run| run.wire).collect();
    wire.sort_unstable();
    let seconds = runs.iter().map(|run| run.total.as_secs_f64()).collect();
    vec![
        format!("{}, {method}", kind.name()),
        format!("{:.0} ms", median(downtimes().collect())),
        format!("{:.0}", downtimes().fold(f64::INFINITY, f64::min)),
        format!("{:.0}", downtimes().fold(0.0, f64::max)),
        format!("{:.1} s", median(seconds)),
        bytes(wire.get(wire.len() / 2).copied().unwrap_or(0)),
    ]
}
