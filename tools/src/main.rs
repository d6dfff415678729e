//! The crxfer command: parses arguments, calls the library, prints, gives an exit code.
//!
//! Nothing here decides about a transfer; what it does stands in the crate `crxfer`.

mod action;
mod archive;
mod args;
mod container;
mod error;
mod exit;
mod feed;
mod generate;
mod inspect;
mod key;
mod migrate;
mod output;
mod page_server;
mod pids;
mod progress;
mod recover;
mod recv;
mod send;
mod sets;
mod size;
mod stop;
mod stream;
mod summary;
mod target;
mod verify;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use self::args::{Cli, Command};
use self::error::Failed;
use self::exit::Exit;

/// What still runs when `recv` ends (writing, publishing) may take this long to end well.
const LAST_WORK: Duration = Duration::from_secs(5);

/// When `send` or `migrate` ends only reading can still be under way.
const LAST_READ: Duration = Duration::from_millis(100);

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Command::Action = cli.command {
        return action::run();
    }
    log_to_stderr(cli.verbose);
    match run(cli.command) {
        Ok(()) => Exit::Done.code().into(),
        Err(failed) => {
            output::hint(&format!("crxfer: {}", failed.text()));
            failed.exit().code().into()
        }
    }
}

fn run(command: Command) -> Result<(), Failed> {
    match command {
        Command::Recv(args) => {
            if args.restore.allow_restore {
                // Before the runtime: no thread of it may take a pid that an image wants.
                pids::leave_low_ones();
            }
            block_on(recv::run(*args), LAST_WORK)
        }
        Command::Migrate(args) => block_on(migrate::run(*args), LAST_READ),
        Command::Recover(args) => block_on(recover::recover(*args), LAST_READ),
        Command::Status(args) => recover::status(&args),
        Command::Guard(args) => recover::guard(&args),
        Command::Action => unreachable!("done before"),
        Command::Send(args) => block_on(send::run(args), LAST_READ),
        Command::PageServer(args) => block_on(page_server::run(args), LAST_READ),
        Command::Feed(args) => feed::run(&args),
        Command::Stream(args) => block_on(stream::run(args), LAST_READ),
        Command::Archive(args) => archive::run(&args),
        Command::Inspect(args) => inspect::inspect(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Diff(args) => inspect::diff(&args),
        Command::Flatten(args) => inspect::flatten(&args),
        Command::List(args) => sets::list(&args),
        Command::Rm(args) => sets::rm(&args),
        Command::RuncSetup(args) => container::set_up_runc(&args),
        Command::Keygen(args) => generate::keygen(&args),
        Command::Completions(args) => generate::completions(&args),
        Command::Man(args) => generate::man(&args),
    }
}

fn block_on(
    future: impl Future<Output = Result<(), Failed>>,
    last: Duration,
) -> Result<(), Failed> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(Failed::file("start threads of", "this process".as_ref()))?;
    let result = runtime.block_on(future);
    runtime.shutdown_timeout(last);
    result
}

/// Silent unless asked: with -v, or with RUST_LOG.
fn log_to_stderr(verbose: u8) {
    let level = match verbose {
        0 => LevelFilter::WARN,
        1 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let asked = std::env::var("RUST_LOG")
        .ok()
        .filter(|text| !text.is_empty());
    if verbose == 0 && asked.is_none() {
        return;
    }
    let filter = EnvFilter::builder()
        .with_default_directive(level.into())
        .parse_lossy(asked.unwrap_or_default());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .init();
}
