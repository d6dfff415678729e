//! `cargo xtask kill-test`: whatever dies in a migration, exactly one copy runs afterwards.
//!
//! A run is drawn from its seed ([`plan`]): a program, what dies or is cut, and when. The program runs
//! on one of two hosts and clients use it all the time ([`ground`], [`clients`]). It is migrated and
//! disturbed ([`fault`]); then what an operator and a service manager would do is done ([`settle`]);
//! then everything is looked at ([`verdict`], [`leftovers`]): one copy that answers with every
//! acknowledged write, connections that live, nothing left behind. Then it is migrated once more.

mod clients;
mod fault;
mod ground;
mod journals;
mod leftovers;
mod moving;
mod plan;
mod processes;
mod recover;
mod run;
mod settle;
mod store;
mod tally;
mod timing;
mod verdict;
mod watch;
mod web;

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use self::ground::{Diary, Tested};
use self::plan::{Mode, Plan, Program};
use self::run::Known;
use self::tally::{Ended, Tally};
use crate::crxfer::Crxfer;
use crate::{apt, criu};

/// What `cargo xtask kill-test` may be told.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// How many
    #[arg(long, default_value_t = 100)]
    runs: usize,
    /// The first run's seed; the others count on from it
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many at once, each with hosts of its own
    #[arg(long, default_value_t = JOBS)]
    jobs: usize,
    /// Only seeds whose line contains this, such as "memcached, kill source criu" or "commit"
    #[arg(long, default_value = "")]
    only: String,
    /// All of them in this mode, instead of half of them diskless
    #[arg(long, value_enum)]
    mode: Option<Mode>,
    /// Instead: each kind of fault once, as the tests of every change do it
    #[arg(long, conflicts_with_all = ["runs", "only"])]
    sample: bool,
    /// Keep the logs of runs that pass, too
    #[arg(long)]
    keep: bool,
    /// Only say what would be done
    #[arg(long)]
    list: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let plans = match options.sample {
        true => Plan::sample(options.seed),
        false => Plan::matching(options.seed, options.runs, &options.only),
    };
    let plans = plans.into_iter().map(|plan| plan.in_mode(options.mode));
    let plans: Vec<_> = plans.collect();
    ensure!(!plans.is_empty(), "no seed matches {:?}", options.only);
    if options.list {
        for plan in plans {
            println!("seed {}: {plan}", plan.seed);
        }
        return Ok(());
    }
    run_all(plans, options.jobs, options.keep)
}

/// What belongs to the tests of every change, each kind of fault once, and a longer one to all tests.
pub(crate) fn test(is_long: bool) -> Result<()> {
    if let Err(error) = criu::ensure() {
        println!("kill test: skipped: {error:#}");
        return Ok(());
    }
    let plans = match is_long {
        true => Plan::matching(SAMPLE_SEED, LONG, ""),
        false => Plan::sample(SAMPLE_SEED),
    };
    run_all(plans, JOBS, false)
}

/// Runs of the longer one.
const LONG: usize = 150;
/// Most of a run is waiting.
const JOBS: usize = 4;

/// Any number: the runs are those that were looked at when the test was made.
const SAMPLE_SEED: u64 = 1;

/// What the jobs share.
struct Shared {
    tested: Tested,
    root: PathBuf,
    keep: bool,
    waiting: Mutex<Vec<(Program, VecDeque<Plan>)>>,
    tally: Mutex<Tally>,
}

fn run_all(plans: Vec<Plan>, jobs: usize, keep: bool) -> Result<()> {
    ensure!(crate::run::is_root(), "two hosts on one machine need root");
    apt::ensure(&[apt::MEMCACHED, apt::NGINX, apt::ARPING])?;
    apt::ensure(&apt::NETWORK)?;
    criu::ensure()?;
    let root = crate::run::target()?.join("kill-test");
    fs::create_dir_all(&root).with_context(|| format!("cannot create {}", root.display()))?;
    let count = plans.len();
    let shared = Shared {
        tested: Tested::new(Crxfer::build()?)?,
        root,
        keep,
        waiting: Mutex::new(by_program(plans)),
        tally: Mutex::new(Tally::default()),
    };
    let begin = Instant::now();
    thread::scope(|scope| {
        for number in 0..jobs.clamp(1, count) {
            let shared = &shared;
            scope.spawn(move || work(shared, number));
        }
    });
    let tally = shared
        .tally
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    print!("{tally}");
    let minutes = begin.elapsed().as_secs_f64() / 60.0;
    #[expect(clippy::cast_precision_loss, reason = "a few thousand at most")]
    let rate = count as f64 / minutes;
    println!("{count} runs in {minutes:.1} min, {rate:.1} a minute");
    match tally.failed().is_empty() {
        true => Ok(()),
        false => bail!(
            "{} of {count} runs of the kill test failed: logs are in {}; `cargo xtask kill-test --runs 1 --seed SEED` repeats one, of {:?}",
            tally.failed().len(),
            shared.root.display(),
            tally.failed()
        ),
    }
}

fn by_program(plans: Vec<Plan>) -> Vec<(Program, VecDeque<Plan>)> {
    let (memcached, nginx): (VecDeque<Plan>, VecDeque<Plan>) = plans
        .into_iter()
        .partition(|plan| plan.program == Program::Memcached);
    vec![(Program::Memcached, memcached), (Program::Nginx, nginx)]
}

impl Shared {
    /// The next run, of `program` if there is one.
    fn next(&self, program: Program) -> Option<Plan> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let own = waiting.iter().position(|(one, _)| *one == program)?;
        let own_next = waiting[own].1.pop_front();
        // Those that have most left to do.
        own_next.or_else(|| {
            let most = waiting.iter_mut().max_by_key(|(_, plans)| plans.len());
            most.and_then(|(_, plans)| plans.pop_front())
        })
    }

    fn note(&self, plan: &Plan, ended: Ended) {
        println!("{}", ended.line(plan));
        let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        tally.note(plan, ended);
    }
}

/// Does runs until there are none left. Hosts are used again while they are clean.
fn work(shared: &Shared, number: usize) {
    let mut program = match number % 2 {
        0 => Program::Memcached,
        _ => Program::Nginx,
    };
    let mut known: Option<Known> = None;
    while let Some(plan) = shared.next(program) {
        if plan.program != program {
            program = plan.program;
            known = None;
        }
        let begin = Instant::now();
        let mut diary = Diary::new();
        let ended = one(shared, &mut known, &plan, &mut diary);
        if ended.is_err() {
            known = None;
        }
        let ms = begin.elapsed().as_millis();
        shared.note(&plan, Ended::new(ended, ms));
    }
}

fn one(
    shared: &Shared,
    known: &mut Option<Known>,
    plan: &Plan,
    diary: &mut Diary,
) -> Result<run::Passed> {
    let log = run::log_directory(&shared.root, plan.seed)?;
    diary.note(format!("seed {}: {plan}", plan.seed));
    let outcome =
        prepared(shared, known, plan, &log).and_then(|known| known.run(plan, &log, diary));
    match &outcome {
        Ok(_) if shared.keep => diary.write(&log.join("diary.txt"))?,
        Ok(_) => fs::remove_dir_all(&log)?,
        Err(error) => {
            let ground = known.as_ref().map(|known| &known.ground);
            run::keep_evidence(ground, diary, &log, error);
        }
    }
    outcome
}

fn prepared<'a>(
    shared: &Shared,
    known: &'a mut Option<Known>,
    plan: &Plan,
    log: &Path,
) -> Result<&'a mut Known> {
    if known.is_none() {
        let new = Known::new(&shared.tested, plan.program, &log.join("calibration"))
            .context("undisturbed migrations, before the run")?;
        *known = Some(new);
    }
    known.as_mut().context("there is a ground")
}
