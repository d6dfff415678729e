//! `cargo xtask test`: the tests of every crate, then end to end with real CRIU.

use std::process::Command;

use anyhow::Result;

use crate::{e2e, run};

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
    let tally = e2e::run_scope(scope, "");
    // Last, so that the line "N passed, N failed" is.
    report(crates, tally)
}

/// The quick tests, as the checks of a change run them: both parts, even if the first fails.
pub(crate) fn quick() -> (Result<()>, Result<e2e::Tally>) {
    (
        of_crates(e2e::Scope::Quick),
        e2e::run_scope(e2e::Scope::Quick, ""),
    )
}

fn report(crates: Result<()>, tally: Result<e2e::Tally>) -> Result<()> {
    match &crates {
        Ok(()) => println!("tests of the crates: all passed"),
        Err(error) => println!("tests of the crates: FAILED: {error:#}"),
    }
    let tally = tally?;
    println!("end to end: {tally}");
    crates.and(tally.verdict())
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
