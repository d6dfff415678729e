//! `crxfer migrate`.

mod checks;
mod json;
mod progress;
mod report;

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;

use crxfer::sink::Tmpfs;
use crxfer::transfer::Target;
use crxfer::transfer::guard::GuardProgram;
use crxfer::transfer::migrate::{
    MigrateError, MigrateEvents, MigrateOptions, MigrationReport, Outcome, migrate,
};
use serde_json::Value;
use tokio::sync::watch;

use self::progress::Progress;
use crate::args::{MigrateArgs, ModeArg};
use crate::container::Dumped;
use crate::error::Failed;
use crate::output::{self, hint};
use crate::stop::Stop;
use crate::{container, key, target};

pub(crate) async fn run(args: MigrateArgs) -> Result<(), Failed> {
    let (as_json, file) = (args.json, args.report.clone());
    let result = transfer(args).await;
    let value = match &result {
        Ok(report) => json::done(report),
        Err(error) => json::error(error),
    };
    if let Some(file) = &file
        && let Err(error) = write_report(file, &value)
    {
        // The workload is where it is, whatever becomes of the report.
        hint(&format!("crxfer: {}", error.text()));
    }
    match result {
        Ok(_) | Err(_) if as_json => {
            output::json(&value)?;
            result.map(drop)
        }
        Ok(report) if report.outcome == Outcome::Checked => {
            output::line("the checks passed: it can be tried. Nothing was touched")
        }
        Ok(report) => report::print(&report),
        Err(error) => Err(error),
    }
}

async fn transfer(args: MigrateArgs) -> Result<MigrationReport, Failed> {
    let mut stop = Stop::catch()?;
    let target = tokio::select! {
        target = find_target(&args) => target?,
        () = stop.asked() => return Err(Failed::Stopped),
    };
    let criu = args.criu.to_options();
    let dumped = container::dumped(&args.container, args.pid, &criu)?;
    let progress = Arc::new(Progress::new(&args, dumped.pid));
    let (stopping, stopped) = watch::channel(false);
    let options = options(&args, dumped, target, stopped, &progress)?;
    let mut migrating = pin!(migrate(options));
    let mut asked = 0u32;
    let result = loop {
        tokio::select! {
            result = &mut migrating => break result,
            () = stop.asked() => {
                // Dropping it would leave the destination with what came: it ends by itself.
                asked += 1;
                progress.stopping(asked);
                let _ = stopping.send(true);
            }
        }
    };
    progress.finish();
    result.map_err(|failure| {
        if let MigrateError::Preflight(checks) = &failure.error {
            progress.checks(checks);
        }
        Failed::Migrate(Box::new(failure))
    })
}

async fn find_target(args: &MigrateArgs) -> Result<Target, Failed> {
    let link = &args.link;
    target::find_later(args.to.clone(), link.peer.clone(), link.identity.is_some()).await
}

fn options(
    args: &MigrateArgs,
    dumped: Dumped,
    target: Target,
    stop: watch::Receiver<bool>,
    progress: &Arc<Progress>,
) -> Result<MigrateOptions, Failed> {
    let progress = progress.clone();
    let hooks = args.hooks.to_hooks();
    Ok(MigrateOptions {
        pid: dumped.pid,
        name: args.name.as_ref().map(ToString::to_string).or(dumped.name),
        external: dumped.by,
        target,
        identity: key::of_source(args.link.identity.as_deref())?,
        precopy: args.precopy.into(),
        goals: args.goals.to_goals(),
        freeze_limit: args.goals.freeze_limit,
        program: args.criu.program.clone(),
        criu: args.criu.to_options(),
        hooks: hooks.map_err(|error| Failed::Usage(format!("--hook: {error}")))?,
        force: args.force,
        dry_run: args.dry_run,
        bytes_per_s: args.link.bwlimit.map(|rate| rate.0),
        read_bytes_per_s: Some(args.link.read_limit.0),
        mode: args.mode.into(),
        work: args
            .work
            .clone()
            .unwrap_or_else(|| work_directory(args.mode)),
        state: args.safety.state.clone().unwrap_or_else(key::records),
        guard: own_guard(),
        on_partition: args.safety.on_partition.into(),
        partition_wait: args.safety.partition_wait,
        transport: args.transport.to_options(),
        stop,
        events: MigrateEvents::new(move |event| progress.take(event)),
    })
}

/// `/run/crxfer`, or the temp directory: in both the library makes a directory of its own. Where it must
/// be a tmpfs and /run is none, one that is.
fn work_directory(mode: ModeArg) -> PathBuf {
    let usual = key::run_directory().unwrap_or_else(std::env::temp_dir);
    match mode {
        ModeArg::Tmpfs if Tmpfs::open(&usual).is_err() => "/dev/shm/crxfer".into(),
        _ => usual,
    }
}

/// This program, again.
pub(crate) fn own_guard() -> Option<GuardProgram> {
    // Not its path: an update may have replaced it.
    let program = PathBuf::from(format!("/proc/{}/exe", std::process::id()));
    Some(GuardProgram {
        program: fs::read_link(&program).map_or(program.clone(), |path| {
            if path.exists() { path } else { program }
        }),
        args: vec!["guard".into()],
    })
}

/// Whoever reads the file finds all of it.
fn write_report(path: &Path, report: &Value) -> Result<(), Failed> {
    let mut draft = path.as_os_str().to_owned();
    draft.push(format!(".{}.new", std::process::id()));
    let draft = Path::new(&draft);
    let written = fs::File::create(draft)
        .and_then(|mut file| {
            writeln!(file, "{report:#}")?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(draft, path));
    if written.is_err() {
        let _ = fs::remove_file(draft);
    }
    written.map_err(Failed::file("write the report", path))
}
