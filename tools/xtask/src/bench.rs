//! `cargo xtask bench`: whole transfers against a bare QUIC copy, in pairs that take turns; with
//! `--kind migrate`, whole migrations against other ways to move a process; with `--kind modes`, each
//! mode against the studies' own commands for it; with `--kind lxc`, LXC containers against LXC's own tool.

pub(crate) mod baseline;
mod docker;
mod lxc;
mod migrate;
mod modes;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::crxfer::{Crxfer, LAYOUTS, Place, Receiver, Sent};
use crate::run;
use crate::scratch::Scratch;
use crate::table::{bytes, table};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Size of the image directory (1024 where not said), or of the memory to migrate (250)
    #[arg(long)]
    mib: Option<u64>,
    /// Pairs of runs; medians are shown
    #[arg(long, default_value_t = 5)]
    pairs: usize,
    /// What the pages are: random, text, mixed, … Or "migrate": moves a running memcached;
    /// "docker": one in a container, at 1 Gb/s and 100 Mb/s; "modes": three workloads
    /// by tmpfs and disk-less, each against the studies' commands; "lxc": LXC containers
    #[arg(long, default_value = "random")]
    kind: String,
    /// Rate of the line between the hosts, in Mb/s (migrate)
    #[arg(long, default_value_t = 1000)]
    rate: u32,
    /// Values of 100 KB rewritten a second (migrate)
    #[arg(long, default_value_t = 50)]
    writes: u32,
    /// Only these ways to move it (migrate)
    #[arg(long, value_enum, value_delimiter = ',')]
    methods: Vec<migrate::Method>,
}

impl Options {
    fn image_mib(&self) -> u64 {
        self.mib.unwrap_or(1024)
    }
}

/// One `crxfer send` as a whole process.
struct Run {
    seconds: f64,
    sent: Sent,
    source_memory: u64,
    destination_memory: u64,
}

struct Bench {
    crxfer: Crxfer,
    scratch: Scratch,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    if options.kind == "migrate" {
        return migrate::run(options);
    }
    if options.kind == "modes" {
        return modes::run(options);
    }
    if options.kind == "lxc" {
        return lxc::run(options);
    }
    if options.kind == "docker" {
        return docker::run(options);
    }
    // In memory, where the machine has such a place: disks would be measured otherwise.
    let bench = Bench {
        crxfer: Crxfer::build()?,
        scratch: Scratch::within(Path::new("/dev/shm"), "bench")?,
    };
    build_yardstick()?;
    let first = bench.image("first", options)?;
    let changed = bench.changed(&first)?;
    println!(
        "{} MiB of {} pages, both ends on this machine, files in memory; medians of {}\n",
        options.image_mib(),
        options.kind,
        options.pairs
    );
    bench.against_bare_copy(&first, options.pairs)?;
    bench.iterations(&first, &changed, options.pairs)
}

impl Bench {
    fn image(&self, name: &str, options: &Options) -> Result<PathBuf> {
        let path = self.scratch.path().join(name);
        let mib = options.image_mib().to_string();
        let words = ["--mib", &mib, "--kind", &options.kind];
        run::quiet(tool("make_image")?.arg(&path).args(words))?;
        Ok(path)
    }

    fn changed(&self, first: &Path) -> Result<PathBuf> {
        let path = self.scratch.path().join("changed");
        run::quiet(Command::new("cp").arg("-r").arg(first).arg(&path))?;
        run::quiet(
            tool("make_image")?
                .arg(&path)
                .args(["--change", "1", "--seed", "7"]),
        )?;
        Ok(path)
    }

    fn against_bare_copy(&self, image: &Path, pairs: usize) -> Result<()> {
        let (mut bare, mut ours) = (Vec::new(), Vec::new());
        let (mut source, mut destination) = (0, 0);
        for _ in 0..pairs {
            bare.push(self.bare_copy(image)?);
            let to = self.receiver("faithful")?;
            let run = self.send(image, &to)?;
            ours.push(run.seconds);
            source = source.max(run.source_memory);
            destination = destination.max(run.destination_memory);
        }
        let (bare, ours) = (median(bare), median(ours));
        let row = |what: &str, seconds: f64| {
            vec![
                what.to_owned(),
                format!("{seconds:.2} s"),
                format!("{:.2}", seconds / bare),
            ]
        };
        let rows = [
            row("bare quinn copy", bare),
            row("crxfer, first time", ours),
        ];
        println!("{}", table(&["whole processes", "time", "ratio"], &rows));
        println!(
            "anonymous memory at most: source {}, destination {}\n",
            bytes(source),
            bytes(destination)
        );
        Ok(())
    }

    fn bare_copy(&self, image: &Path) -> Result<f64> {
        let into = self.scratch.directory("bare")?;
        let begin = Instant::now();
        run::quiet(tool("bare_quinn")?.arg("run").arg(image).arg(&into))?;
        let seconds = begin.elapsed().as_secs_f64();
        fs::remove_dir_all(into)?;
        Ok(seconds)
    }

    fn iterations(&self, first: &Path, changed: &Path, pairs: usize) -> Result<()> {
        let mut rows = Vec::new();
        for layout in LAYOUTS {
            let mut columns: [Vec<Run>; 3] = Default::default();
            for _ in 0..pairs {
                let to = self.receiver(layout)?;
                for (column, image) in columns.iter_mut().zip([first, changed, changed]) {
                    column.push(self.send(image, &to)?);
                }
            }
            for (what, runs) in ["first time", "1 % changed", "unchanged"]
                .iter()
                .zip(&columns)
            {
                rows.push(row(&format!("{layout}, {what}"), runs));
            }
        }
        let head = [
            "same name again",
            "time",
            "sent",
            "received",
            "memory, source",
            "destination",
        ];
        println!("{}", table(&head, &rows));
        Ok(())
    }

    fn receiver(&self, layout: &str) -> Result<Receiver> {
        let directory = self.scratch.path().join("received");
        let _ = fs::remove_dir_all(&directory);
        self.crxfer.receive(Place::Here, &directory, layout, &[])
    }

    // Without remembered digests: every file is read.
    fn send(&self, image: &Path, to: &Receiver) -> Result<Run> {
        let watched = Watch::begin(to.id());
        let begin = Instant::now();
        let outcome = self.crxfer.send_with(
            Place::Here,
            image,
            &to.target(),
            "bench",
            &["--reread"],
            |_| (),
        )?;
        let seconds = begin.elapsed().as_secs_f64();
        let (source_memory, destination_memory) = watched.end();
        Ok(Run {
            seconds,
            sent: outcome.finished()?,
            source_memory,
            destination_memory,
        })
    }
}

fn row(what: &str, runs: &[Run]) -> Vec<String> {
    let most = |of: fn(&Run) -> u64| runs.iter().map(of).max().unwrap_or(0);
    vec![
        what.to_owned(),
        format!(
            "{:.2} s",
            median(runs.iter().map(|run| run.seconds).collect())
        ),
        bytes(most(|run| run.sent.sent_bytes)),
        bytes(most(|run| run.sent.received_bytes)),
        bytes(most(|run| run.source_memory)),
        bytes(most(|run| run.destination_memory)),
    ]
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn build_yardstick() -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let words = [
        "build",
        "--quiet",
        "--release",
        "--package",
        "crxfer-bench",
        "--bins",
    ];
    run::shown(
        Command::new(cargo)
            .args(words)
            .current_dir(run::workspace()),
    )
}

fn tool(name: &str) -> Result<Command> {
    let path = run::target()?.join("release").join(name);
    if !path.exists() {
        bail!("{} is missing", path.display());
    }
    let mut command = Command::new(path);
    command.stdin(Stdio::null());
    Ok(command)
}

/// Watches the anonymous memory of the receiver and of this program's other child.
struct Watch {
    stop: Arc<AtomicBool>,
    most: Arc<[AtomicU64; 2]>,
    thread: std::thread::JoinHandle<()>,
}

impl Watch {
    fn begin(receiver: u32) -> Self {
        let (stop, most) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new([const { AtomicU64::new(0) }; 2]),
        );
        let (stopped, seen) = (stop.clone(), most.clone());
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                seen[1].fetch_max(anonymous_memory(receiver), Ordering::Relaxed);
                for child in children().into_iter().filter(|&child| child != receiver) {
                    seen[0].fetch_max(anonymous_memory(child), Ordering::Relaxed);
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        Self { stop, most, thread }
    }

    fn end(self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.join();
        (
            self.most[0].load(Ordering::Relaxed),
            self.most[1].load(Ordering::Relaxed),
        )
    }
}

fn children() -> Vec<u32> {
    let of_thread = |entry: fs::DirEntry| fs::read_to_string(entry.path().join("children")).ok();
    let tasks = fs::read_dir("/proc/self/task")
        .into_iter()
        .flatten()
        .flatten();
    let text: String = tasks.filter_map(of_thread).collect();
    text.split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .collect()
}

fn anonymous_memory(pid: u32) -> u64 {
    let read = || -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"));
        let kib = line
            .and_then(|line| line.trim().strip_suffix(" kB"))
            .context("no RssAnon")?;
        Ok(kib.trim().parse::<u64>()? * 1024)
    };
    // It has ended: no memory.
    read().unwrap_or(0)
}
