//! `cargo xtask demo`: a running memcached moves from one host to another, and what that cost.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::checkpoint::{Synthetic, resolve};
use crate::criu::{self, Criu, End};
use crate::crxfer::{Crxfer, Place, Receiver, Sent};
use crate::hosts::{Hosts, Rate};
use crate::run::Narrator;
use crate::scratch::Scratch;
use crate::workload::{Memcached, Values, Workload};
use crate::{apt, table};

/// 10,000 values of 10 KiB make about 100 MB.
const VALUES: usize = 10_000;
const VALUE_BYTES: usize = 10 * 1024;
/// One value of fifty is written between the dumps: 2 %.
const STEP: usize = 50;
const MEGABITS: u32 = 1000;
/// Pages of the process that takes the place of memcached where CRIU cannot run: 100 MB.
const SYNTHETIC_PAGES: usize = 25_600;

/// What the demo may be told.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Show the transfer without CRIU, as an ordinary user sees it
    #[arg(long)]
    without_criu: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let narrator = Narrator::new();
    narrator.step("building crxfer");
    let crxfer = Crxfer::build()?;
    let criu = match options.without_criu {
        true => Err("--without-criu was given".to_owned()),
        false => prepare().map_err(|error| format!("{error:#}")),
    };
    match criu {
        Ok(criu) => with_criu(&narrator, &crxfer, &criu),
        Err(why) => {
            println!(
                "no real CRIU here ({}): the same transfer with checkpoints of a built-in workload",
                why.trim()
            );
            without_criu(&narrator, &crxfer)
        }
    }
}

fn prepare() -> Result<Criu> {
    let criu = criu::ensure()?;
    apt::ensure(&apt::NETWORK)?;
    apt::ensure(&[apt::MEMCACHED])?;
    Ok(criu)
}

fn with_criu(narrator: &Narrator, crxfer: &Crxfer, criu: &Criu) -> Result<()> {
    let scratch = Scratch::new("demo")?;
    let hosts = Hosts::new(Rate::Megabits(MEGABITS))?;
    narrator.step(&format!(
        "two hosts, A and B, with a line of {MEGABITS} Mb/s between them"
    ));
    let mut memcached = Memcached::new(Values::new(VALUES, VALUE_BYTES), STEP);
    let pid = memcached.start(&hosts.a)?;
    let amount = table::bytes(memcached.values.bytes() as u64);
    narrator.step(&format!(
        "memcached runs on A (pid {pid}) and holds {VALUES} values, {amount}"
    ));

    let (first, second) = (
        scratch.path().join("source/1"),
        scratch.path().join("source/2"),
    );
    criu.dump(&hosts.a, pid, &first, End::LeaveRunning, &[])?;
    narrator.step(&format!(
        "CRIU {} dumped it and left it running",
        criu.version
    ));
    memcached.write(&hosts.a)?;
    narrator.step(&format!(
        "{} of its values were written again",
        VALUES / STEP
    ));
    criu.dump(&hosts.a, pid, &second, End::Kill, &[])?;
    narrator.step("CRIU dumped it again and ended it: now it exists only in the images");

    let received = scratch.path().join("received");
    let receiver = crxfer.receive(Place::On(&hosts.b), &received, "incremental", &[])?;
    let sets = [("1", first.as_path()), ("2", second.as_path())];
    let sent = send_both(narrator, crxfer, Place::On(&hosts.a), &receiver, sets)?;

    let begin = Instant::now();
    criu.restore(
        &hosts.b,
        &received.join("2"),
        &scratch.path().join("restore"),
    )?;
    let restored = begin.elapsed();
    narrator.step("CRIU restored memcached on B from received/2 and its parent");
    let compared = memcached
        .check(&hosts.b)
        .context("the restored memcached is not what it was")?;
    narrator.step(&format!(
        "all {compared} values were read on B and are right"
    ));
    print_table(&sent, Some(restored));
    let changed = table::bytes((VALUES / STEP * VALUE_BYTES) as u64);
    println!(
        "\nThe first checkpoint crossed the line once. Of the second, also a full dump of {}, B already had\n\
         all pages but those behind the {changed} that were written in between and what memcached itself touched,\n\
         so {} crossed the line. Every value of memcached on B is the one that A had.",
        table::bytes(sent[1].image_bytes),
        table::bytes(sent[1].wire_bytes()),
    );
    Ok(())
}

fn without_criu(narrator: &Narrator, crxfer: &Crxfer) -> Result<()> {
    let scratch = Scratch::new("demo")?;
    let mut process = Synthetic::mixed(SYNTHETIC_PAGES, 1);
    let (first, second) = (
        scratch.path().join("source/1"),
        scratch.path().join("source/2"),
    );
    process.dump(&first)?;
    narrator.step("first checkpoint written");
    let changed = process.change(7, STEP);
    process.dump(&second)?;
    narrator.step(&format!(
        "{changed} pages changed, second checkpoint written"
    ));

    let received = scratch.path().join("received");
    let receiver = crxfer.receive(Place::Here, &received, "incremental", &[])?;
    let sets = [("1", first.as_path()), ("2", second.as_path())];
    let sent = send_both(narrator, crxfer, Place::Here, &receiver, sets)?;
    let memory = resolve(&received.join("2"))?;
    memory
        .ensure_same(&process.memory())
        .context("the received memory is not what was sent")?;
    narrator.step(&format!(
        "all {} pages of received/2 were compared and are right",
        memory.pages()
    ));
    print_table(&sent, None);
    println!(
        "\nBoth sides ran on this machine. Of the second checkpoint, a full one of {}, the destination\n\
         already had all pages but {changed}, so {} crossed the line.",
        table::bytes(sent[1].image_bytes),
        table::bytes(sent[1].wire_bytes()),
    );
    Ok(())
}

fn send_both(
    narrator: &Narrator,
    crxfer: &Crxfer,
    place: Place<'_>,
    receiver: &Receiver,
    sets: [(&str, &Path); 2],
) -> Result<Vec<Sent>> {
    let mut all = Vec::new();
    for (name, directory) in sets {
        let size = directory_bytes(directory)?;
        narrator.step(&format!(
            "crxfer sends {}, {}",
            directory.display(),
            table::bytes(size)
        ));
        let outcome =
            crxfer.send_with(place, directory, &receiver.target(), name, &[], |line| {
                narrator.progress(&line.to_string());
            })?;
        let sent = outcome
            .finished()
            .with_context(|| format!("crxfer recv said:\n{}", receiver.said()))?;
        narrator.step(&format!(
            "received as generation {} of {:?}: {}, {}",
            sent.generation, sent.name, sent.completeness, sent.layout
        ));
        all.push(sent);
    }
    Ok(all)
}

fn directory_bytes(directory: &Path) -> Result<u64> {
    fs::read_dir(directory)?.try_fold(0, |sum, entry| Ok(sum + entry?.metadata()?.len()))
}

fn print_table(sent: &[Sent], restored: Option<Duration>) {
    let head = [
        "step", "pages", "zero", "known", "twice", "zstd", "raw", "image", "wire", "time", "ratio",
    ];
    let names = ["first checkpoint", "second checkpoint"];
    let mut rows: Vec<Vec<String>> = names
        .iter()
        .zip(sent)
        .map(|(name, sent)| row(name, sent))
        .collect();
    if let Some(time) = restored {
        let mut row = vec!["restore on B".to_owned()];
        row.resize(head.len(), "–".to_owned());
        row[head.len() - 2] = format!("{:.2} s", time.as_secs_f64());
        rows.push(row);
    }
    println!("\n{}", table::table(&head, &rows));
}

fn row(name: &str, sent: &Sent) -> Vec<String> {
    let pages = sent.pages;
    let counts = [
        pages.total,
        pages.zero,
        pages.known,
        pages.duplicate,
        pages.compressed,
        pages.raw,
    ];
    #[expect(clippy::cast_precision_loss, reason = "one digit is shown")]
    let ratio = sent.image_bytes as f64 / sent.wire_bytes().max(1) as f64;
    let mut row = vec![name.to_owned()];
    row.extend(counts.map(table::count));
    row.extend([
        table::bytes(sent.image_bytes),
        table::bytes(sent.wire_bytes()),
    ]);
    row.extend([format!("{:.2} s", sent.seconds), format!("{ratio:.1}")]);
    row
}
