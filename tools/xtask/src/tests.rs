//! `cargo xtask test`: the tests of every crate, then end to end with real CRIU.

use std::process::Command;

use anyhow::Result;

use crate::{e2e, kill, run};

/// How much to test.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Options {
    /// Only what a change must pass: smaller amounts of memory
    #[arg(long, conflicts_with = "all")]
    quick: bool,
    /// All there is, however slow
    #[arg(long)]
    all: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let scope = match (options.quick, options.all) {
        (true, _) => e2e::Scope::Quick,
        (_, true) => e2e::Scope::All,
        _ => e2e::Scope::Usual,
    };
    let crates = of_crates(scope);
    let killed = of_faults(scope);
    let tally = e2e::run_scope(scope, "");
    // Last, so that the line "N passed, N failed" is.
    report(crates.and(killed), tally)
}

/// The kill test, where it can run: a few runs, or many.
fn of_faults(scope: e2e::Scope) -> Result<()> {
    if !run::is_root() {
        println!("kill test: skipped, two hosts on one machine need root");
        return Ok(());
    }
    kill::test(scope == e2e::Scope::All)
}

/// The quick tests, as the checks of a change run them: all parts, even if the first fails.
pub(crate) fn quick() -> Quick {
    Quick {
        crates: of_crates(e2e::Scope::Quick),
        faults: of_faults(e2e::Scope::Quick),
        end_to_end: e2e::run_scope(e2e::Scope::Quick, ""),
    }
}

/// How the quick tests went.
#[derive(Debug)]
pub(crate) struct Quick {
    pub(crate) crates: Result<()>,
    pub(crate) faults: Result<()>,
    pub(crate) end_to_end: Result<e2e::Tally>,
}

fn report(others: Result<()>, tally: Result<e2e::Tally>) -> Result<()> {
    match &others {
        Ok(()) => println!("tests of the crates, kill test: all passed"),
        Err(error) => println!("tests of the crates, kill test: FAILED: {error:#}"),
    }
    let tally = tally?;
    println!("end to end: {tally}");
    others.and(tally.verdict())
}

fn of_crates(scope: e2e::Scope) -> Result<()> {
    let slow_too = scope == e2e::Scope::All;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(&cargo);
    command.current_dir(run::workspace());
    if run::find_program("cargo-nextest").is_some() {
        command.args(["nextest", "run", "--workspace"]);
        command.args(["--no-fail-fast", "--no-tests=pass"]);
        if slow_too {
            // That one is for a person who looks at one seed.
            command.args(["--run-ignored", "all", "-E", "not test(seed_of_a_failure)"]);
        }
        run::shown(&mut command)?;
        // nextest leaves out the examples in the documentation.
        let mut examples = Command::new(&cargo);
        return run::shown(
            examples
                .args(["test", "--quiet", "--workspace", "--doc"])
                .current_dir(run::workspace()),
        );
    }
    command.args(["test", "--workspace", "--no-fail-fast"]);
    if slow_too {
        command.args(["--", "--include-ignored", "--skip", "seed_of_a_failure"]);
    }
    run::shown(&mut command)
}
