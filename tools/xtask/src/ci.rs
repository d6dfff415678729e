//! `cargo xtask ci`: everything that a change must pass.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Result, anyhow, bail};

use crate::{e2e, run, tests};

/// A check: its name, the words after `cargo`, and variables for its environment.
struct Check {
    name: &'static str,
    words: &'static [&'static str],
    environment: &'static [(&'static str, &'static str)],
}

/// The checks that are a command of cargo, the cheap ones first.
const CHECKS: [Check; 6] = [
    Check {
        name: "format",
        words: &["fmt", "--all", "--check"],
        environment: &[],
    },
    Check {
        name: "licences",
        words: &["xtask", "licences"],
        environment: &[],
    },
    Check {
        name: "lints",
        words: &[
            "clippy",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ],
        environment: &[],
    },
    Check {
        name: "lints without network",
        words: &[
            "clippy",
            "-p",
            "crxfer",
            "--no-default-features",
            "--",
            "-D",
            "warnings",
        ],
        environment: &[],
    },
    Check {
        name: "documentation",
        words: &["doc", "--workspace", "--no-deps", "--quiet"],
        environment: &[("RUSTDOCFLAGS", "-D warnings")],
    },
    Check {
        name: "generated messages",
        words: &["xtask", "proto", "--check"],
        environment: &[],
    },
];

/// Runs all checks and fails if one does; none stops the others.
pub(crate) fn run() -> Result<()> {
    let mut failed = Vec::new();
    fuzz_targets(&mut failed);
    advisories(&mut failed);
    for check in &CHECKS {
        let mut command = cargo();
        command
            .args(check.words)
            .envs(check.environment.iter().copied());
        note(check.name, run::shown(&mut command), &mut failed);
    }
    let quick = tests::quick();
    note("tests of the crates", quick.crates, &mut failed);
    note("kill test", quick.faults, &mut failed);
    let tally = quick.end_to_end;
    let ran = match &tally {
        Ok(tally) => all_ran(tally),
        Err(error) => Err(anyhow!("did not run: {error:#}")),
    };
    note("end-to-end tests", ran, &mut failed);
    match failed.is_empty() {
        true => println!("all checks passed"),
        false => println!("FAILED: {}", failed.join(", ")),
    }
    // The last line, for whoever counts.
    println!("{}", tally?);
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

/// A machine that cannot run the end-to-end tests cannot vouch for a change.
fn all_ran(tally: &e2e::Tally) -> Result<()> {
    if tally.is_empty() {
        bail!("none ran, see above");
    }
    if tally.lacks_criu() {
        bail!("those with CRIU did not run, see above");
    }
    tally.verdict()
}

fn note(name: &str, outcome: Result<()>, failed: &mut Vec<String>) {
    match outcome {
        Ok(()) => println!("check {name}: ok"),
        Err(error) => {
            println!("check {name}: FAILED: {error:#}");
            failed.push(name.to_owned());
        }
    }
}

fn cargo() -> Command {
    let program: OsString = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.current_dir(run::workspace());
    command
}

/// Fuzz targets have a lock file of their own and are no members of the workspace.
fn fuzz_targets(failed: &mut Vec<String>) {
    if Path::new(run::workspace()).join("fuzz/Cargo.toml").exists() {
        let words = ["check", "--quiet", "--manifest-path", "fuzz/Cargo.toml"];
        note("fuzz targets", run::shown(cargo().args(words)), failed);
    } else {
        println!("check fuzz targets: skipped, there are none yet");
    }
}

/// Known vulnerabilities, where a tool for that is installed and its database can be had.
fn advisories(failed: &mut Vec<String>) {
    let begin = Instant::now();
    let tools: [(&str, &[&str]); 2] = [
        ("cargo-audit", &["audit", "--quiet"]),
        ("cargo-deny", &["deny", "check", "advisories"]),
    ];
    let Some((_, words)) = tools
        .iter()
        .find(|(program, _)| run::find_program(program).is_some())
    else {
        println!("check advisories: skipped, neither cargo-audit nor cargo-deny is installed");
        return;
    };
    match run::quiet(cargo().args(*words)) {
        Err(error) if is_unreachable(&format!("{error:#}")) => {
            let seconds = begin.elapsed().as_secs();
            println!("check advisories: skipped, the database could not be fetched ({seconds} s)");
        }
        outcome => note("advisories", outcome.map(drop), failed),
    }
}

fn is_unreachable(message: &str) -> bool {
    ["fetch", "resolve", "connect", "timed out"]
        .iter()
        .any(|word| message.contains(word))
}
