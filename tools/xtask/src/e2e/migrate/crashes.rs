//! Migrations that end by force, at every moment: a crxfer that is killed, an operator who stops it, a
//! destination without space. One copy runs, on A, and its clients' connections live.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::trouble::{TCP, UNNOTICED_MS, last_line, said, wait_for_precopy};
use super::{Context, Mover, Report, Scope, small};
use crate::crxfer::Receiver;
use crate::crxfer::migrate::Migrating;
use crate::hosts::{Host, Rate};
use crate::run;
use crate::stage::Stage;

/// How long a client may wait when a host dies in the freeze, on a busy machine.
const RESUMED_WITHIN_MS: f64 = 5_000.0;

pub(super) fn cases(context: &Context, report: &mut Report) {
    for moment in [Moment::Preflight, Moment::Dump, Moment::Restore] {
        let name = format!("migrate: ctrl-C in the {}", moment.name());
        report.case(&name, || interrupted(context, moment));
    }
    report.case("migrate: full disk at the destination", || {
        full_disk(context)
    });
    if context.scope == Scope::Quick {
        // The others wait until a dead host is noticed.
        return;
    }
    let moments = [Moment::Precopy, Moment::Dump, Moment::Restore];
    for moment in moments {
        let name = format!("migrate: source killed in the {}", moment.name());
        report.case(&name, || killed_source(context, moment));
    }
    for moment in moments {
        let name = format!("migrate: destination killed in the {}", moment.name());
        report.case(&name, || killed_destination(context, moment));
    }
}

/// How long a migration may take to come to its freeze.
const LIMIT: Duration = Duration::from_secs(30);

/// When it happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    /// As soon as the command runs.
    Preflight,
    Precopy,
    /// The tree is frozen, CRIU dumps.
    Dump,
    /// CRIU builds the copy.
    Restore,
}

impl Moment {
    fn name(self) -> &'static str {
        match self {
            Self::Preflight => "preflight",
            Self::Precopy => "pre-copy",
            Self::Dump => "dump",
            Self::Restore => "restore",
        }
    }

    /// Slow enough for the pre-copy to be met, or fast enough to be soon past it.
    fn rate(self) -> Rate {
        match self {
            Self::Precopy => Rate::Megabits(100),
            _ => Rate::Megabits(1000),
        }
    }

    /// The memory of the store in MB. A copy must not be built before anybody sees that it is.
    fn mib(self) -> u64 {
        if self == Self::Restore { 250 } else { 60 }
    }

    fn await_in(self, stage: &Stage, migrating: &mut Migrating) -> Result<()> {
        match self {
            Self::Preflight => migrating.await_signals(),
            Self::Precopy => wait_for_precopy(stage, migrating),
            Self::Dump => migrating.await_event("freezing"),
            Self::Restore => {
                migrating.await_event("freezing")?;
                let copy = format!("/proc/{}", stage.pid);
                let copy = stage.network.hosts.b.file(copy.as_ref());
                let begin = Instant::now();
                // Without a rest: it takes a fifth of a second.
                while !copy.exists() {
                    ensure!(migrating.is_running(), "crxfer migrate ended before");
                    ensure!(begin.elapsed() < LIMIT, "no copy is built");
                }
                Ok(())
            }
        }
    }
}

/// A store to be met at `moment`.
fn stage_for(moment: Moment) -> Result<Stage> {
    Stage::start(moment.rate(), moment.mib(), 50)
}

/// Starts a migration and comes back at `moment`.
fn start(
    mover: &Mover<'_>,
    stage: &Stage,
    receiver: &Receiver,
    moment: Moment,
) -> Result<Migrating> {
    let mut migrating = mover.start(&stage.network, stage.pid, receiver, &[TCP])?;
    match moment.await_in(stage, &mut migrating) {
        Ok(()) => Ok(migrating),
        Err(error) => Err(error.context(said(migrating, receiver))),
    }
}

/// What a client may not notice, or may.
fn ensure_gap(moment: Moment, gap_ms: f64) -> Result<()> {
    let limit = match moment {
        Moment::Preflight | Moment::Precopy => UNNOTICED_MS,
        Moment::Dump | Moment::Restore => RESUMED_WITHIN_MS,
    };
    ensure!(gap_ms <= limit, "no answers for {gap_ms:.0} ms");
    Ok(())
}

/// CRIU's network lock, where it is left.
pub(super) fn locks(host: &Host) -> Result<Vec<String>> {
    let tables = run::quiet(host.command("nft").args(["list", "tables"]))?;
    let names = tables
        .lines()
        .filter_map(|line| line.split_whitespace().nth(2));
    let locks = names.filter(|name| name.starts_with("CRIU-"));
    Ok(locks.map(str::to_owned).collect())
}

fn killed_source(context: &Context, moment: Moment) -> Result<String> {
    let stage = stage_for(moment)?;
    let mover = Mover::new(context)?;
    let receiver = mover.receive(&stage.network)?;
    let since = stage.poller.now();
    let migrating = start(&mover, &stage, &receiver, moment)?;
    migrating.kill()?;
    let _ = migrating.wait()?;
    let removed = mover.await_removed(&stage.network, stage.pid);
    let removed = removed.with_context(|| format!("crxfer recv said:\n{}", receiver.said()))?;
    // CRIU resumes the tree by itself and takes its lock away.
    let left = locks(&stage.network.hosts.a)?;
    ensure!(left.is_empty(), "CRIU left its lock: {left:?}");
    let gap = stage.ensure_stayed(since)?.ms();
    ensure_gap(moment, gap)?;
    stage.network.hosts.shape(Rate::Megabits(1000))?;
    mover
        .migrate(&stage.network, stage.pid, &receiver, &[TCP])
        .context("the next attempt")?;
    stage.moved()?;
    Ok(format!(
        "{gap:.0} ms without answers, removed after {:.1} s; then moved",
        removed.as_secs_f64()
    ))
}

fn killed_destination(context: &Context, moment: Moment) -> Result<String> {
    let stage = stage_for(moment)?;
    let mover = Mover::new(context)?;
    let mut receiver = mover.receive_again(&context.crxfer, &stage.network)?;
    let since = stage.poller.now();
    let migrating = start(&mover, &stage, &receiver, moment)?;
    receiver.kill();
    let (code, message) = migrating.wait()?.refused()?;
    // Its guard removes what it had, or the next one that starts.
    let mut receiver = mover.receive_again(&context.crxfer, &stage.network)?;
    mover.await_removed(&stage.network, stage.pid)?;
    let gap = stage.ensure_stayed(since)?.ms();
    // The source finds out by the limit of the freeze.
    let limit = match moment {
        Moment::Preflight | Moment::Precopy => UNNOTICED_MS,
        Moment::Dump | Moment::Restore => 10_500.0,
    };
    ensure!(gap <= limit, "no answers for {gap:.0} ms");
    if !receiver.is_running() {
        receiver = mover.receive_again(&context.crxfer, &stage.network)?;
    }
    stage.network.hosts.shape(Rate::Megabits(1000))?;
    mover
        .migrate(&stage.network, stage.pid, &receiver, &[TCP])
        .context("the next attempt")?;
    stage.moved()?;
    Ok(format!(
        "exit {code}, {gap:.0} ms without answers: {}",
        last_line(&message)
    ))
}

fn interrupted(context: &Context, moment: Moment) -> Result<String> {
    let stage = stage_for(moment)?;
    let mover = Mover::new(context)?;
    let receiver = mover.receive(&stage.network)?;
    let since = stage.poller.now();
    let migrating = start(&mover, &stage, &receiver, moment)?;
    migrating.signal("INT")?;
    let begin = Instant::now();
    let (code, message) = migrating.wait()?.refused()?;
    let took = begin.elapsed();
    ensure!(code == 130, "it ended with {code}: {message}");
    ensure!(took < Duration::from_secs(5), "it took {took:?} to stop");
    mover.await_removed(&stage.network, stage.pid)?;
    let left = locks(&stage.network.hosts.a)?;
    ensure!(left.is_empty(), "CRIU left its lock: {left:?}");
    let gap = stage.ensure_stayed(since)?.ms();
    ensure_gap(moment, gap)?;
    mover
        .migrate(&stage.network, stage.pid, &receiver, &[TCP])
        .context("the next attempt")?;
    stage.moved()?;
    Ok(format!(
        "stopped after {:.1} s, {gap:.0} ms without answers: {}",
        took.as_secs_f64(),
        last_line(&message)
    ))
}

fn full_disk(context: &Context) -> Result<String> {
    let mover = Mover::new(context)?;
    let place = mover.received();
    fs::create_dir_all(&place)?;
    // Before the hosts take copies of all mounts: this program must see what is left, too.
    let mount = |words: &[&str]| run::quiet(Command::new(words[0]).args(&words[1..]).arg(&place));
    mount(&["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs"])?;
    let outcome = small(Rate::Megabits(100)).and_then(|stage| fill(stage, &mover));
    mount(&["umount", "--lazy"])?;
    outcome
}

/// Something else takes the space while memory arrives.
fn fill(stage: Stage, mover: &Mover<'_>) -> Result<String> {
    let receiver = mover.receive(&stage.network)?;
    let since = stage.poller.now();
    let words = [TCP, "--mode", "disk"];
    let mut migrating = mover.start(&stage.network, stage.pid, &receiver, &words)?;
    Moment::Precopy.await_in(&stage, &mut migrating)?;
    // Until nothing fits any more.
    let _ = fs::write(mover.received().join(".other"), vec![1; 100 << 20]);
    let (code, message) = migrating.wait()?.refused()?;
    mover.await_removed(&stage.network, stage.pid)?;
    ensure!(
        message.contains("space"),
        "the message does not say that there is no space: {message}"
    );
    let gap = stage.stayed(since)?.ms();
    ensure!(gap <= UNNOTICED_MS, "no answers for {gap:.0} ms");
    Ok(format!("exit {code}: {}", message.trim()))
}
