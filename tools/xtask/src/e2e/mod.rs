//! End-to-end tests: the crxfer command between two hosts, with real programs and real CRIU.
//!
//! Each case has hosts and a directory of its own. Cases that need only root run where CRIU does not
//! work; what is left out is said in one line.

mod docker;
mod lxc;
mod migrate;
mod page_server;
mod restore;
mod runc;
mod streamer;
mod trouble;
mod volume;

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::criu::{self, Criu};
use crate::crxfer::Crxfer;
use crate::{apt, run};

/// How much to test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Scope {
    Quick,
    Usual,
    All,
}

/// What `cargo xtask e2e` may be told.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Only cases whose name contains this
    #[arg(default_value = "")]
    filter: String,
    #[arg(long, value_enum, default_value = "usual")]
    scope: Scope,
}

/// What the cases share.
#[derive(Debug)]
struct Context {
    crxfer: Crxfer,
    criu: Option<Criu>,
    scope: Scope,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let tally = run_scope(options.scope, &options.filter)?;
    println!("{tally}");
    tally.verdict()
}

/// Runs the cases of `scope` whose name contains `filter`.
pub(crate) fn run_scope(scope: Scope, filter: &str) -> Result<Tally> {
    let mut report = Report::new(filter);
    if !run::is_root() {
        println!("end-to-end tests: skipped, two hosts on one machine need root");
        return Ok(report.tally);
    }
    apt::ensure(&apt::NETWORK)?;
    let criu = match criu::ensure() {
        Ok(criu) => Some(criu),
        Err(error) => {
            println!("cases with CRIU: skipped: {error:#}");
            report.tally.without_criu = true;
            None
        }
    };
    let context = Context {
        crxfer: Crxfer::build()?,
        criu,
        scope,
    };
    volume::cases(&context, &mut report);
    trouble::cases(&context, &mut report);
    restore::cases(&context, &mut report);
    page_server::cases(&context, &mut report);
    streamer::cases(&context, &mut report);
    migrate::cases(&context, &mut report);
    lxc::cases(&context, &mut report);
    docker::cases(&context, &mut report);
    runc::cases(&context, &mut report);
    Ok(report.tally)
}

/// Counts of cases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    passed: u32,
    failed: u32,
    without_criu: bool,
}

impl Tally {
    /// Whether the cases with real CRIU were left out.
    pub(crate) fn lacks_criu(&self) -> bool {
        self.without_criu
    }

    /// Whether no case ran at all.
    pub(crate) fn is_empty(&self) -> bool {
        self.passed + self.failed == 0
    }

    /// Fails if a case did.
    pub(crate) fn verdict(&self) -> Result<()> {
        if self.failed > 0 {
            bail!("{} end-to-end cases failed", self.failed);
        }
        Ok(())
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)
    }
}

/// Runs cases and says how each went.
#[derive(Debug)]
struct Report {
    filter: String,
    tally: Tally,
}

impl Report {
    fn new(filter: &str) -> Self {
        Self {
            filter: filter.to_owned(),
            tally: Tally::default(),
        }
    }

    fn wants(&self, name: &str) -> bool {
        name.contains(&self.filter)
    }

    /// Runs one case; what it returns on success is shown behind its name.
    fn case(&mut self, name: &str, case: impl FnOnce() -> Result<String>) {
        if !self.wants(name) {
            return;
        }
        let begin = Instant::now();
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(case));
        let outcome = outcome.unwrap_or_else(|_| Err(anyhow::anyhow!("panicked")));
        self.note(name, begin.elapsed(), outcome);
    }

    fn note(&mut self, name: &str, time: Duration, outcome: Result<String>) {
        let seconds = time.as_secs_f64();
        match outcome {
            Ok(remark) => {
                self.tally.passed += 1;
                println!("  ok      {name} ({seconds:.1} s) {remark}");
            }
            Err(error) => {
                self.tally.failed += 1;
                let text = format!("{error:#}").replace('\n', "\n            ");
                println!("  FAILED  {name} ({seconds:.1} s)\n            {text}");
            }
        }
    }

    /// Cases that could not even begin.
    fn failed(&mut self, names: &[String], error: &anyhow::Error) {
        let mut text = format!("could not be prepared: {error:#}");
        for name in names {
            self.note(
                name,
                Duration::ZERO,
                Err(anyhow::anyhow!(std::mem::replace(
                    &mut text,
                    "the same".to_owned()
                ))),
            );
        }
    }
}
