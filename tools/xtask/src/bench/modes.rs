//! The studies' table: a blank tree, nginx with a video and memcached, moved by way of a tmpfs and
//! without any file, by the studies' own commands and by crxfer, in turns. What counts is what a client sees.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::baseline::{self, Moving};
use super::migrate::warm_memory;
use super::{Options, median};
use crate::apt;
use crate::client::{Download, Poller, Question};
use crate::criu::{self, Criu};
use crate::crxfer::migrate::{Migration, Report};
use crate::crxfer::{Crxfer, Place};
use crate::hosts::{Network, Rate, Side};
use crate::scratch::Scratch;
use crate::stage::Stage;
use crate::table::{bytes, table};
use crate::workload::{Echo, Streaming};

/// How long clients are served before a move.
const QUIET: Duration = Duration::from_secs(2);
/// The studies' video: 442 s at 1,560 kb/s.
const VIDEO_BYTES: usize = 93_500_000;
const VIDEO_RATE: usize = 195_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Blank,
    Video,
    Memcached,
}

const WORKS: [Work; 3] = [Work::Blank, Work::Video, Work::Memcached];

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Blank => "blank",
            Self::Video => "nginx video",
            Self::Memcached => "memcached",
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    DumpTwice,
    Tmpfs,
    PageServer,
    Diskless,
}

const HOWS: [How; 4] = [How::DumpTwice, How::Tmpfs, How::PageServer, How::Diskless];

impl fmt::Display for How {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DumpTwice => "tmpfs, studies",
            Self::Tmpfs => "tmpfs, crxfer",
            Self::PageServer => "disk-less, studies",
            Self::Diskless => "disk-less, crxfer",
        })
    }
}

/// One move.
#[derive(Clone, Copy, Debug)]
struct Run {
    downtime_ms: f64,
    total: Duration,
    wire: u64,
    /// Pages that crossed the wire while the workload was frozen, where it is known.
    last_pages: Option<u64>,
}

struct Bench {
    crxfer: Crxfer,
    criu: Criu,
    rate: Rate,
    mib: u64,
    writes: u32,
}

pub(super) fn run(options: &Options) -> Result<()> {
    apt::ensure(&apt::NETWORK)?;
    apt::ensure(&[apt::MEMCACHED, apt::NGINX, apt::RSYNC, apt::ARPING])?;
    let bench = Bench {
        crxfer: Crxfer::build()?,
        criu: criu::ensure()?,
        rate: Rate::Megabits(options.rate),
        mib: options.mib.unwrap_or(250),
        writes: options.writes,
    };
    println!(
        "{} Mb/s, CRIU {}; memcached with {} MB of which {} values of 100 KB are rewritten a second; a client asks every 2 ms\n",
        options.rate, bench.criu.version, bench.mib, bench.writes
    );
    warm_memory(bench.mib)?;
    for work in WORKS {
        let mut runs: Vec<(How, Vec<Run>)> = HOWS.iter().map(|&how| (how, Vec::new())).collect();
        for _ in 0..options.pairs {
            for (how, runs) in &mut runs {
                let run = bench
                    .run(work, *how)
                    .with_context(|| format!("{work}, {how}"))?;
                println!(
                    "{work}, {how}: {:.0} ms, {:.1} s in all, {} on the wire",
                    run.downtime_ms,
                    run.total.as_secs_f64(),
                    bytes(run.wire)
                );
                runs.push(run);
            }
        }
        println!("\n{}\n{}\n", summary(work, &runs), targets(&runs));
    }
    Ok(())
}

impl Bench {
    fn run(&self, work: Work, how: How) -> Result<Run> {
        match work {
            Work::Memcached => {
                let stage = Stage::start(self.rate, self.mib, self.writes)?;
                let run = self.move_it(&stage.network, stage.pid, &stage.poller, how)?;
                stage.moved()?;
                Ok(run)
            }
            Work::Blank => {
                let network = Network::new(self.rate)?;
                let pid = Echo::start(&network.hosts.a)?;
                self.polled(&network, pid, how, ECHO)
            }
            Work::Video => {
                let network = Network::new(self.rate)?;
                let files = Scratch::new("video")?;
                let nginx =
                    Streaming::start(&network.hosts.a, files.path(), VIDEO_BYTES, VIDEO_RATE)?;
                let download = Download::start(&network.c, Streaming::PORT, Streaming::FILE)?;
                let run = self.polled(&network, nginx.pid, how, SHORT)?;
                let before = download.arrived();
                std::thread::sleep(QUIET);
                ensure!(download.arrived() > before, "the video stands still");
                Ok(run)
            }
        }
    }

    fn polled(&self, network: &Network, pid: u32, how: How, question: Question) -> Result<Run> {
        let poller = Poller::start(network, question)?;
        let run = self.move_it(network, pid, &poller, how)?;
        poller.ensure_only(Side::B)?;
        poller.finish()?;
        Ok(run)
    }

    fn move_it(&self, network: &Network, pid: u32, poller: &Poller, how: How) -> Result<Run> {
        let memory = Scratch::within(Path::new("/dev/shm"), "mode")?;
        std::thread::sleep(QUIET);
        let before = network.hosts.b.line_bytes()?;
        let begin = poller.now();
        let moving = Moving {
            criu: &self.criu,
            network,
            pid,
            memory: &memory,
        };
        let report = match how {
            How::DumpTwice => baseline::dump_twice_and_rsync(moving).map(|_| None),
            How::PageServer => baseline::dump_to_page_server(moving).map(|_| None),
            How::Tmpfs => self.migrate(moving, "tmpfs").map(Some),
            How::Diskless => self.migrate(moving, "diskless").map(Some),
        }?;
        let total = poller.now().saturating_sub(begin);
        let wire = network.hosts.b.line_bytes()?.since(before);
        // The last answers of the copy must be in.
        std::thread::sleep(Duration::from_millis(500));
        Ok(Run {
            downtime_ms: poller.service().handover()?.ms(),
            total,
            wire,
            last_pages: report.map(|report| report.final_changed_pages),
        })
    }

    fn migrate(&self, moving: Moving<'_>, mode: &str) -> Result<Report> {
        let network = moving.network;
        let hooks = Migration::hooks(network);
        let hooks: Vec<&str> = hooks.iter().map(String::as_str).collect();
        let place = moving.memory.path().join("received");
        let receiver = self
            .crxfer
            .await_migration(Place::On(&network.hosts.b), &place, &hooks)?;
        let words = ["--tcp-established", "--skip-in-flight", "--mode", mode];
        let report = self
            .crxfer
            .migrate(&network.hosts.a, moving.pid, &receiver, &words)?
            .start()?
            .wait()?
            .migrated()
            .with_context(|| format!("crxfer recv said:\n{}", receiver.said()))?;
        network.withdraw(&network.hosts.a)?;
        Ok(report)
    }
}

const SHORT: Question = Question::Tcp {
    port: Streaming::PORT,
    text: "GET /here HTTP/1.0\r\n\r\n",
    answer: "here",
};

/// The first answer of a connection.
const ECHO: Question = Question::Tcp {
    port: Echo::PORT,
    text: "question",
    answer: "question\u{1}",
};

fn of(runs: &[Run], what: impl Fn(&Run) -> f64) -> f64 {
    median(runs.iter().map(what).collect())
}

fn summary(work: Work, runs: &[(How, Vec<Run>)]) -> String {
    let title = format!("{work}, medians");
    let head = [
        &title,
        "downtime",
        "least",
        "most",
        "total",
        "on the wire",
        "pages at last",
    ];
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "three digits are shown"
    )]
    let rows = runs.iter().map(|(how, runs)| {
        let all = || runs.iter().map(|run| run.downtime_ms);
        let pages: Vec<f64> = runs
            .iter()
            .filter_map(|run| run.last_pages.map(|pages| pages as f64))
            .collect();
        vec![
            how.to_string(),
            format!("{:.0} ms", of(runs, |run| run.downtime_ms)),
            format!("{:.0}", all().fold(f64::INFINITY, f64::min)),
            format!("{:.0}", all().fold(0.0, f64::max)),
            format!("{:.1} s", of(runs, |run| run.total.as_secs_f64())),
            bytes(of(runs, |run| run.wire as f64) as u64),
            if pages.is_empty() {
                "-".to_owned()
            } else {
                format!("{:.0}", median(pages))
            },
        ]
    });
    table(&head, &rows.collect::<Vec<_>>())
}

/// What the measured medians are held against.
fn targets(runs: &[(How, Vec<Run>)]) -> String {
    let downtime = |wanted: How| {
        let runs = runs.iter().find(|(how, _)| *how == wanted);
        runs.map_or(f64::NAN, |(_, runs)| of(runs, |run| run.downtime_ms))
    };
    let lines = [
        ("tmpfs to the studies'", How::Tmpfs, How::DumpTwice),
        ("disk-less to the studies'", How::Diskless, How::PageServer),
        ("disk-less to tmpfs", How::Diskless, How::Tmpfs),
    ];
    let lines = lines.map(|(what, ours, theirs)| {
        let ratio = downtime(ours) / downtime(theirs);
        let met = if ratio <= 1.0 { "met" } else { "MISSED" };
        format!("{what}: {ratio:.2}; target at most 1: {met}")
    });
    lines.join("\n")
}
