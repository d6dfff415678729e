//! Developer commands of crxfer: `cargo xtask demo`, `cargo xtask test`, `cargo xtask ci`.
#![expect(
    clippy::disallowed_methods,
    reason = "tests and demo measure real time"
)]

mod apt;
mod bench;
mod checkpoint;
mod ci;
mod client;
mod criu;
mod crxfer;
mod demo;
mod docker;
mod e2e;
mod hosts;
mod kill;
mod licences;
mod lxc;
mod proto;
mod run;
mod scratch;
mod stage;
mod table;
mod tests;
mod workload;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Developer commands of crxfer")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Move a running memcached from one host to another and show what that cost
    Demo(demo::Options),
    /// Run the tests: of every crate, then end to end with real CRIU
    Test(tests::Options),
    /// Run only the end-to-end tests (root and CRIU)
    E2e(e2e::Options),
    /// Kill or cut something in each of many migrations, and see that exactly one copy survives
    KillTest(kill::Options),
    /// Measure whole transfers against a bare QUIC copy
    Bench(bench::Options),
    /// Run everything that a change must pass
    Ci,
    /// Put CRIU 4.2 or later on this Debian machine
    InstallCriu {
        /// More options for the script: --bin, --home, --suite, --min
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Generate Rust from the .proto files
    Proto {
        /// Change nothing; fail if the committed Rust is not up to date
        #[arg(long)]
        check: bool,
    },
    /// Check the licence and origin of every dependency
    Licences,
    /// Process 1 of a test host
    #[command(hide = true)]
    Init,
    /// A program that tests move
    #[command(hide = true)]
    Workload { name: String },
    /// Remove directories once the caller is gone
    #[command(hide = true)]
    Guard { directories: Vec<PathBuf> },
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Demo(options) => demo::run(&options),
        Command::Test(options) => tests::run(&options),
        Command::E2e(options) => e2e::run(&options),
        Command::KillTest(options) => kill::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::Ci => ci::run(),
        Command::InstallCriu { options } => criu::install(&options),
        Command::Licences => licences::check(),
        Command::Proto { check } => proto::run(run::workspace(), check).map_err(Into::into),
        Command::Init => hosts::init(),
        Command::Workload { name } => workload::serve(&name),
        Command::Guard { directories } => scratch::guard(&directories),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
