//! Migrations that fail: the workload runs on at the source with all its values, nothing of it is on
//! the destination, and the next attempt succeeds.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};

use super::{Context, Mover, Report, Scope, small};
use crate::crxfer::migrate::Migrating;
use crate::crxfer::{Place, Receiver};
use crate::hosts::Rate;
use crate::run;
use crate::stage::Stage;

pub(super) const TCP: &str = "--tcp-established";
/// What a client must not notice, on a machine that is busy with other things.
pub(super) const UNNOTICED_MS: f64 = 200.0;

pub(super) fn cases(context: &Context, report: &mut Report) {
    report.case("migrate --dry-run touches nothing", || dry_run(context));
    report.case("migrate: ctrl-C in the pre-copy, then once more", || {
        interrupted(context)
    });
    report.case("migrate: recv without --allow-restore refuses", || {
        not_allowed(context)
    });
    report.case("migrate: pid taken on the destination", || {
        taken_pid(context)
    });
    report.case("migrate: program missing on the destination", || {
        missing_file(context)
    });
    report.case("migrate: address not on the destination", || {
        no_address(context)
    });
    report.case("migrate: failing hook on the destination", || {
        failing_hook(context)
    });
    if context.scope == Scope::Quick {
        return;
    }
    report.case("migrate: deadline that cannot be met", || deadline(context));
    report.case("migrate: line cut in the freeze", || cut_line(context));
}

fn dry_run(context: &Context) -> Result<String> {
    let stage = small(Rate::Megabits(1000))?;
    let mover = Mover::new(context)?;
    let mut receiver = mover.receive(&stage.network)?;
    let state = || -> Result<String> {
        let rules =
            |host: &crate::hosts::Host| run::quiet(host.command("nft").args(["list", "ruleset"]));
        let hosts = &stage.network.hosts;
        let addresses = run::quiet(hosts.b.command("ip").args(["-o", "address"]))?;
        Ok([rules(&hosts.a)?, rules(&hosts.b)?, addresses].concat())
    };
    let before = state()?;
    let since = stage.poller.now();
    let traffic = stage.network.hosts.b.line_bytes()?;
    let ended = mover.run(&stage.network, stage.pid, &receiver, &[TCP, "--dry-run"])?;
    ensure!(
        ended.code == Some(0),
        "it ended with {:?}: {}",
        ended.code,
        ended.message
    );
    let moved = stage.network.hosts.b.line_bytes()?.since(traffic);
    ensure!(moved < 4 << 20, "a dry run moved {moved} bytes");
    ensure!(
        state()? == before,
        "a dry run changed rules or addresses: {before}\n{}",
        state()?
    );
    ensure!(receiver.is_running(), "a dry run ended the receiver");
    mover.ensure_nothing_published()?;
    let gap = stage.stayed(since)?.ms();
    ensure!(
        gap <= UNNOTICED_MS,
        "a dry run stopped answers for {gap:.0} ms"
    );
    Ok(format!("{} KiB on the line", moved >> 10))
}

/// Waits until the pre-copy has moved some of the memory, but not all.
pub(super) fn wait_for_precopy(stage: &Stage, migrating: &mut Migrating) -> Result<()> {
    const SOME: u64 = 12 << 20;
    let host = &stage.network.hosts.b;
    let before = host.line_bytes()?;
    run::wait_for("a part to arrive", Duration::from_secs(30), || {
        if !migrating.is_running() {
            return Some(Err(anyhow!("crxfer migrate ended before")));
        }
        match host.line_bytes() {
            Ok(now) => (now.since(before) > SOME).then_some(Ok(())),
            Err(error) => Some(Err(error)),
        }
    })?
}

fn interrupted(context: &Context) -> Result<String> {
    let stage = small(Rate::Megabits(100))?;
    let mover = Mover::new(context)?;
    let mut receiver = mover.receive(&stage.network)?;
    let since = stage.poller.now();
    let mut migrating = mover.start(&stage.network, stage.pid, &receiver, &[TCP])?;
    if let Err(error) = wait_for_precopy(&stage, &mut migrating) {
        return Err(error.context(said(migrating, &receiver)));
    }
    migrating.signal("INT")?;
    let begin = Instant::now();
    let (code, message) = migrating.wait()?.refused()?;
    let took = begin.elapsed();
    ensure!(took < Duration::from_secs(5), "it took {took:?} to stop");
    let gap = stage.ensure_stayed(since)?.ms();
    ensure!(
        gap <= UNNOTICED_MS,
        "the pre-copy stopped answers for {gap:.0} ms"
    );
    mover.await_removed(&stage.network, stage.pid)?;
    if !receiver.is_running() {
        receiver = mover.receive(&stage.network)?;
    }
    stage.network.hosts.shape(Rate::Unlimited)?;
    mover
        .migrate(&stage.network, stage.pid, &receiver, &[TCP])
        .context("the next attempt")?;
    let seen = stage.moved()?;
    Ok(format!(
        "exit {code} after {:.1} s: {}; the next attempt: {:.0} ms",
        took.as_secs_f64(),
        last_line(&message),
        seen.downtime.ms()
    ))
}

/// What both sides say of a migration that did not come as far as it should.
pub(super) fn said(migrating: Migrating, receiver: &Receiver) -> String {
    let source = migrating.wait().map_or_else(
        |error| format!("{error:#}"),
        |ended| run::last_lines(&ended.message, 10),
    );
    format!(
        "the source said:\n{source}\nthe destination:\n{}",
        receiver.said()
    )
}

fn not_allowed(context: &Context) -> Result<String> {
    let stage = small(Rate::Megabits(1000))?;
    let mover = Mover::new(context)?;
    let place = Place::On(&stage.network.hosts.b);
    let receiver = context
        .crxfer
        .receive(place, &mover.received(), "incremental", &[])?;
    must_stay(
        &mover,
        stage,
        &receiver,
        &[TCP],
        "allow-restore",
        Freeze::Never,
    )
}

/// Whether a failing migration may have frozen the workload before it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Freeze {
    Never,
    Possible,
}

/// Moves, which must fail with a message that has `word` in it, and everything must be as before.
fn must_stay(
    mover: &Mover<'_>,
    stage: Stage,
    receiver: &Receiver,
    options: &[&str],
    word: &str,
    freeze: Freeze,
) -> Result<String> {
    const FREEZE_LIMIT_MS: f64 = 11_000.0;
    let since = stage.poller.now();
    let (code, message) = mover
        .run(&stage.network, stage.pid, receiver, options)?
        .refused()
        .with_context(|| format!("crxfer recv said:\n{}", receiver.said()))?;
    ensure!(
        message.contains(word),
        "the message does not say {word:?}: {message}"
    );
    mover.await_removed(&stage.network, stage.pid)?;
    let gap = stage.stayed(since)?.ms();
    let limit = match freeze {
        Freeze::Never => UNNOTICED_MS,
        Freeze::Possible => FREEZE_LIMIT_MS,
    };
    ensure!(gap <= limit, "no answers for {gap:.0} ms");
    Ok(format!(
        "exit {code}, {gap:.0} ms without answers: {}",
        last_line(&message)
    ))
}

fn taken_pid(context: &Context) -> Result<String> {
    let stage = small(Rate::Megabits(1000))?;
    let mover = Mover::new(context)?;
    let receiver = mover.receive(&stage.network)?;
    let pid = stage.pid;
    stage.network.hosts.b.occupy(pid)?;
    let since = stage.poller.now();
    let ended = mover.run(&stage.network, pid, &receiver, &[TCP])?;
    let (code, message) = ended.refused()?;
    ensure!(
        message.contains(&pid.to_string()) && message.contains("sleep"),
        "the message names neither pid {pid} nor its holder: {message}"
    );
    // Known before anything is touched; the holder is none of crxfer's business.
    let holder = stage.network.hosts.b.session_of(pid);
    ensure!(holder == [pid], "the holder of pid {pid} is {holder:?}");
    stage.network.hosts.b.end(pid)?;
    let gap = stage.ensure_stayed(since)?.ms();
    ensure!(gap <= UNNOTICED_MS, "no answers for {gap:.0} ms");
    mover
        .migrate(&stage.network, pid, &receiver, &[TCP])
        .context("once the pid is free")?;
    stage.moved()?;
    Ok(format!("exit {code}: {}", last_line(&message)))
}

fn missing_file(context: &Context) -> Result<String> {
    let stage = small(Rate::Megabits(1000))?;
    let mover = Mover::new(context)?;
    let receiver = mover.receive(&stage.network)?;
    let program = run::find_program("memcached").context("memcached is not installed")?;
    stage.network.hosts.b.hide(&program)?;
    must_stay(&mover, stage, &receiver, &[TCP], "memcached", Freeze::Never)
}

fn no_address(context: &Context) -> Result<String> {
    let stage = small(Rate::Megabits(1000))?;
    let mover = Mover::new(context)?;
    let receiver = mover.receive_with(&stage.network, &[])?;
    let address = crate::hosts::SERVICE.to_string();
    must_stay(&mover, stage, &receiver, &[TCP], &address, Freeze::Possible)
}

fn failing_hook(context: &Context) -> Result<String> {
    let stage = small(Rate::Megabits(1000))?;
    let mover = Mover::new(context)?;
    let hook = ["--hook", "address-prepare=/bin/false"];
    let receiver = mover.receive_with(&stage.network, &hook)?;
    must_stay(
        &mover,
        stage,
        &receiver,
        &[TCP],
        "address-prepare",
        Freeze::Possible,
    )
}

fn deadline(context: &Context) -> Result<String> {
    const SECONDS: u64 = 3;
    // The memory alone takes 24 s.
    let stage = small(Rate::Megabits(20))?;
    let mover = Mover::new(context)?;
    let receiver = mover.receive(&stage.network)?;
    let begin = Instant::now();
    let options = [TCP, "--deadline", "3"];
    let outcome = must_stay(
        &mover,
        stage,
        &receiver,
        &options,
        "deadline",
        Freeze::Never,
    )?;
    let took = begin.elapsed();
    // Two seconds for the checks afterwards and the program itself.
    ensure!(
        took < Duration::from_secs(SECONDS + 6),
        "a deadline of {SECONDS} s, and it took {took:?}"
    );
    Ok(outcome)
}

fn cut_line(context: &Context) -> Result<String> {
    const FREEZE_LIMIT: Duration = Duration::from_secs(3);
    // As much as lets the freeze last longer than it takes to notice and to cut.
    let stage = Stage::start(Rate::Megabits(1000), 250, 50)?;
    let mover = Mover::new(context)?;
    let receiver = mover.receive(&stage.network)?;
    let since = stage.poller.now();
    let options = [TCP, "--freeze-limit", "3"];
    let mut migrating = mover.start(&stage.network, stage.pid, &receiver, &options)?;
    if let Err(error) = migrating.await_event("freezing") {
        return Err(error.context(said(migrating, &receiver)));
    }
    stage.network.hosts.b.connect(false)?;
    let ended = migrating.wait()?;
    stage.network.hosts.b.connect(true)?;
    let (code, message) = ended
        .refused()
        .with_context(|| format!("crxfer recv said:\n{}", receiver.said()))?;
    // The destination finds out by itself that nobody is there any more.
    mover.await_removed(&stage.network, stage.pid)?;
    let gap = stage.stayed(since)?;
    let limit = FREEZE_LIMIT + Duration::from_millis(500);
    ensure!(
        gap.ms() <= limit.as_secs_f64() * 1e3,
        "no answers for {:.0} ms with a freeze limit of {FREEZE_LIMIT:?}",
        gap.ms()
    );
    Ok(format!(
        "exit {code}, {:.0} ms without answers: {}",
        gap.ms(),
        last_line(&message)
    ))
}

/// The last thing that a program said.
pub(super) fn last_line(message: &str) -> &str {
    message.trim_end().lines().next_back().unwrap_or_default()
}
