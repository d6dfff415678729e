//! `cargo xtask demo`: a running memcached moves from one host to another, and what that cost.
//!
//! Without root or CRIU: two checkpoints of a built-in workload, sent one after the other.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::checkpoint::{Synthetic, resolve};
use crate::criu::{self, Criu};
use crate::crxfer::migrate::Migration;
use crate::crxfer::{Crxfer, Place, Receiver, Sent};
use crate::hosts::Rate;
use crate::run::{self, Narrator};
use crate::scratch::Scratch;
use crate::stage::Stage;
use crate::{apt, table};

const MEGABYTES: u64 = 100;
const WRITES: u32 = 50;
/// Without CRIU: one page of fifty changes between the checkpoints.
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
        Ok(criu) => migrate(&narrator, &crxfer, &criu),
        Err(why) => {
            println!(
                "no real CRIU here ({}): instead of a live migration, checkpoints of a built-in workload",
                why.trim()
            );
            without_criu(&narrator, &crxfer)
        }
    }
}

fn prepare() -> Result<Criu> {
    let criu = criu::ensure()?;
    apt::ensure(&apt::NETWORK)?;
    apt::ensure(&[apt::MEMCACHED, apt::ARPING])?;
    Ok(criu)
}

fn migrate(narrator: &Narrator, crxfer: &Crxfer, criu: &Criu) -> Result<()> {
    // In memory: what arrives is restored at once.
    let memory = Scratch::within(Path::new("/dev/shm"), "demo")?;
    let stage = Stage::start(Rate::Megabits(MEGABITS), MEGABYTES, WRITES)?;
    narrator.step(&format!(
        "three hosts: A and B with lines of {MEGABITS} Mb/s, and C with clients"
    ));
    narrator.step(&format!(
        "memcached runs on A (pid {}) with {MEGABYTES} MB in values of 100 KB; a client on C rewrites \
         {WRITES} a second over one connection, another asks every 2 ms",
        stage.pid
    ));
    let hooks = Migration::hooks(&stage.network);
    let hooks: Vec<&str> = hooks.iter().map(String::as_str).collect();
    let place = Place::On(&stage.network.hosts.b);
    let received = memory.path().join("received");
    let receiver = crxfer.await_migration(place, &received, &hooks)?;
    narrator.step("B: crxfer recv --allow-restore, with hooks that move the service's address");
    narrator.step(&format!(
        "A: crxfer migrate --pid {} --tcp-established (CRIU {})\n",
        stage.pid, criu.version
    ));
    let from = &stage.network.hosts.a;
    run::shown(&mut crxfer.show_migration(from, stage.pid, &receiver, &["--tcp-established"]))
        .with_context(|| format!("crxfer recv said:\n{}", receiver.said()))?;
    println!();
    let seen = stage.moved().context("memcached on B is not what it was")?;
    narrator.step(
        "memcached runs on B and nowhere else; the writer's connection is the same as before",
    );
    narrator.step(&format!(
        "the client that asks every 2 ms got no answer for {:.0} ms",
        seen.downtime.ms()
    ));
    narrator.step(&format!(
        "all {} values are right, the {} that were acknowledged during the move among them",
        seen.compared, seen.writes
    ));
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
    print_table(&sent);
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

fn print_table(sent: &[Sent]) {
    let head = [
        "step", "pages", "zero", "known", "twice", "zstd", "raw", "image", "wire", "time", "ratio",
    ];
    let names = ["first checkpoint", "second checkpoint"];
    let rows: Vec<Vec<String>> = names
        .iter()
        .zip(sent)
        .map(|(name, sent)| row(name, sent))
        .collect();
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
