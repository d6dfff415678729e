//! Developer commands, run as `cargo xtask COMMAND`.

mod proto;

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
    /// Generate Rust from the .proto files
    Proto {
        /// Change nothing; fail if the committed Rust is not up to date
        #[arg(long)]
        check: bool,
    },
}

fn main() -> ExitCode {
    let workspace = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
    let result: Result<(), Box<dyn std::error::Error>> = match Arguments::parse().command {
        Command::Proto { check } => proto::run(&workspace, check).map_err(Into::into),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprintln!("  because: {error}");
                cause = error.source();
            }
            ExitCode::FAILURE
        }
    }
}
