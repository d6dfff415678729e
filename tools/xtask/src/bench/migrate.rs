//! A running memcached moved in several ways, which take turns; all measured by the same client.

use std::fmt;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::baseline::{self, Moving, Parts};
use super::{Options, median};
use crate::apt;
use crate::client::Latency;
use crate::criu::{self, Criu};
use crate::crxfer::migrate::{Migration, Report};
use crate::crxfer::{Crxfer, Place};
use crate::hosts::Rate;
use crate::scratch::Scratch;
use crate::stage::{Seen, Stage};
use crate::table::{bytes, table};

/// A way to move it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Method {
    /// `crxfer migrate`
    Crxfer,
    /// Dump twice to tmpfs, copied by an rsync daemon: the method of the studies
    Rsync,
    /// CRIU's dump and restore on one tmpfs, without any copy
    Criu,
}

const METHODS: [Method; 3] = [Method::Rsync, Method::Crxfer, Method::Criu];
/// How long the clients are watched before a move.
const QUIET: Duration = Duration::from_secs(2);

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Crxfer => "crxfer migrate",
            Self::Rsync => "dump twice, rsync",
            Self::Criu => "dump + restore, no copy",
        })
    }
}

/// One move.
struct Run {
    seen: Seen,
    /// From the begin of the command to the end of it.
    total: Duration,
    wire: u64,
    /// The longest time without answers before the move itself.
    earlier_gap_ms: f64,
    quiet: Latency,
    busy: Latency,
    parts: Parts,
    report: Option<Report>,
}

struct Bench {
    crxfer: Option<Crxfer>,
    criu: Criu,
    rate: Rate,
    mib: u64,
    writes: u32,
}

pub(super) fn run(options: &Options) -> Result<()> {
    apt::ensure(&apt::NETWORK)?;
    apt::ensure(&[apt::MEMCACHED, apt::RSYNC, apt::ARPING])?;
    let methods: Vec<Method> = METHODS
        .into_iter()
        .filter(|method| options.methods.is_empty() || options.methods.contains(method))
        .collect();
    let crxfer = methods
        .contains(&Method::Crxfer)
        .then(Crxfer::build)
        .transpose()?;
    let bench = Bench {
        crxfer,
        criu: criu::ensure()?,
        rate: Rate::Megabits(options.rate),
        mib: options.mib.unwrap_or(250),
        writes: options.writes,
    };
    println!(
        "memcached with {} MB in values of 100 KB, {} rewritten a second, {} Mb/s, CRIU {}; a client asks every 2 ms\n",
        bench.mib, bench.writes, options.rate, bench.criu.version
    );
    warm_memory(bench.mib)?;
    let mut runs: Vec<(Method, Vec<Run>)> = methods.iter().map(|&m| (m, Vec::new())).collect();
    for _ in 0..options.pairs {
        for (method, runs) in &mut runs {
            let run = bench
                .run(*method)
                .with_context(|| format!("{method} failed"))?;
            println!("{}", line(*method, &run));
            runs.push(run);
        }
    }
    println!("\n{}", summary(&runs));
    println!("\n{}", targets(&runs, options));
    Ok(())
}

impl Bench {
    fn run(&self, method: Method) -> Result<Run> {
        let stage = Stage::start(self.rate, self.mib, self.writes)?;
        let memory = Scratch::within(Path::new("/dev/shm"), "move")?;
        std::thread::sleep(QUIET);
        let quiet = stage.latency(QUIET);
        let before = stage.network.hosts.b.line_bytes()?;
        let begin = stage.poller.now();
        let (mut parts, mut report) = (Parts::new(), None);
        let moving = Moving {
            criu: &self.criu,
            network: &stage.network,
            pid: stage.pid,
            memory: &memory,
        };
        match method {
            Method::Rsync => parts = baseline::dump_twice_and_rsync(moving)?,
            Method::Criu => parts = baseline::dump_and_restore(moving)?,
            Method::Crxfer => report = Some(self.migrate(&stage, &memory)?),
        }
        let end = stage.poller.now();
        let wire = stage.network.hosts.b.line_bytes()?.since(before);
        let handover = stage.poller.direct().handover()?;
        let direct = stage.poller.direct();
        let earlier_gap_ms = direct.longest_gap(begin, handover.begin).ms();
        let busy = direct.latency(
            begin,
            handover.begin.saturating_sub(Duration::from_millis(50)),
        );
        Ok(Run {
            seen: stage.moved()?,
            total: end - begin,
            wire,
            earlier_gap_ms,
            quiet,
            busy,
            parts,
            report,
        })
    }

    fn migrate(&self, stage: &Stage, memory: &Scratch) -> Result<Report> {
        let crxfer = self.crxfer.as_ref().context("crxfer was not built")?;
        let network = &stage.network;
        let hooks = Migration::hooks(network);
        let hooks: Vec<&str> = hooks.iter().map(String::as_str).collect();
        let receiver = crxfer.await_migration(
            Place::On(&network.hosts.b),
            &memory.path().join("received"),
            &hooks,
        )?;
        let report = crxfer
            .migrate(
                &network.hosts.a,
                stage.pid,
                &receiver,
                &["--tcp-established"],
            )?
            .start()?
            .wait()?
            .migrated()
            .with_context(|| format!("crxfer recv said:\n{}", receiver.said()))?;
        network.withdraw(&network.hosts.a)?;
        Ok(report)
    }
}

/// Writes to as much memory as a run takes: the first use of it is slow on virtual machines.
pub(super) fn warm_memory(mib: u64) -> Result<()> {
    let scratch = Scratch::within(Path::new("/dev/shm"), "warm")?;
    let piece = vec![1; 1 << 20];
    let mut file = fs::File::create(scratch.path().join("memory"))?;
    for _ in 0..mib * 16 {
        std::io::Write::write_all(&mut file, &piece)?;
    }
    Ok(())
}

fn ms(time: Duration) -> String {
    format!("{:.0} ms", time.as_secs_f64() * 1e3)
}

fn line(method: Method, run: &Run) -> String {
    let parts = run
        .parts
        .iter()
        .map(|(name, time)| format!("{name} {}", ms(*time)));
    let mut parts: Vec<String> = parts.collect();
    if let Some(report) = &run.report {
        parts.push(format!(
            "it says {:.0} ms after {} iterations",
            report.downtime_ms,
            report.iterations.len()
        ));
        parts.extend(
            report
                .phases
                .iter()
                .map(|phase| format!("{} {:.0} ms", phase.name, phase.end_ms - phase.begin_ms)),
        );
    }
    format!(
        "{method}: {:.0} ms ({:.0} at the service address): {}",
        run.seen.downtime.ms(),
        run.seen.service_downtime.ms(),
        parts.join(", ")
    )
}

fn of(runs: &[Run], what: impl Fn(&Run) -> f64) -> f64 {
    median(runs.iter().map(what).collect())
}

fn downtime(runs: &[Run]) -> f64 {
    of(runs, |run| run.seen.downtime.ms())
}

fn summary(runs: &[(Method, Vec<Run>)]) -> String {
    let head = [
        "medians",
        "downtime",
        "least",
        "most",
        "with address",
        "gap before",
        "total",
        "on the wire",
        "p99 quiet",
        "p99 before",
        "writes",
    ];
    let rows: Vec<Vec<String>> = runs
        .iter()
        .map(|(method, runs)| row(*method, runs))
        .collect();
    table(&head, &rows)
}

fn row(method: Method, runs: &[Run]) -> Vec<String> {
    let all = || runs.iter().map(|run| run.seen.downtime.ms());
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "three digits are shown"
    )]
    let wire = of(runs, |run| run.wire as f64) as u64;
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let writes = of(runs, |run| run.seen.writes as f64);
    vec![
        method.to_string(),
        format!("{:.0} ms", downtime(runs)),
        format!("{:.0}", all().fold(f64::INFINITY, f64::min)),
        format!("{:.0}", all().fold(0.0, f64::max)),
        format!("{:.0} ms", of(runs, |run| run.seen.service_downtime.ms())),
        format!("{:.0} ms", of(runs, |run| run.earlier_gap_ms)),
        format!("{:.1} s", of(runs, |run| run.total.as_secs_f64())),
        bytes(wire),
        format!(
            "{:.1} ms",
            of(runs, |run| run.quiet.percentile_99.as_secs_f64() * 1e3)
        ),
        format!(
            "{:.1} ms",
            of(runs, |run| run.busy.percentile_99.as_secs_f64() * 1e3)
        ),
        format!("{writes:.0}"),
    ]
}

/// What the measured medians are held against.
fn targets(runs: &[(Method, Vec<Run>)], options: &Options) -> String {
    let find = |wanted: Method| {
        let runs = runs.iter().find(|(method, _)| *method == wanted);
        runs.map(|(_, runs)| downtime(runs))
    };
    let (Some(ours), rsync, criu) = (
        find(Method::Crxfer),
        find(Method::Rsync),
        find(Method::Criu),
    ) else {
        return "no targets without crxfer".to_owned();
    };
    let share = if options.rate <= 100 {
        1.0 / 12.0
    } else {
        0.45
    };
    let mut lines = Vec::new();
    if let Some(rsync) = rsync {
        lines.push(verdict("of dump twice and rsync", ours / rsync, share));
    }
    if let Some(criu) = criu {
        let changed = changed_ms(runs, options.rate);
        lines.push(verdict(
            &format!("of CRIU's dump and restore plus {changed:.0} ms for the changed bytes"),
            ours / (criu + changed),
            1.15,
        ));
    }
    let gap = runs.iter().find(|(method, _)| *method == Method::Crxfer);
    if let Some((_, runs)) = gap {
        lines.push(format!(
            "longest time without answers before the freeze: {:.0} ms; target: none caused",
            of(runs, |run| run.earlier_gap_ms)
        ));
    }
    lines.join("\n")
}

/// How long the line takes for what the last iteration sent while the workload was frozen.
fn changed_ms(runs: &[(Method, Vec<Run>)], megabits: u32) -> f64 {
    let of_last = |run: &Run| {
        let last = run.report.as_ref()?.iterations.last()?.clone();
        Some(last.wire_bytes.max(last.sent_bytes))
    };
    let crxfer = runs.iter().find(|(method, _)| *method == Method::Crxfer);
    let sizes = crxfer.map(|(_, runs)| {
        #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
        let sizes: Vec<f64> = runs
            .iter()
            .map(|run| of_last(run).unwrap_or(0) as f64)
            .collect();
        median(sizes)
    });
    sizes.unwrap_or(0.0) * 8.0 / (f64::from(megabits) * 1e3)
}

fn verdict(what: &str, ratio: f64, target: f64) -> String {
    let met = if ratio <= target { "met" } else { "MISSED" };
    format!("{ratio:.3} {what}; target at most {target:.3}: {met}")
}
