//! After a fault: what a service manager and an operator would do, until both hosts say that nothing
//! is unfinished.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::fault::{Strike, Undo};
use super::ground::{Diary, Ground};
use super::journals::{self, Keep};
use super::moving::Moving;
use super::plan::{Fault, Plan, Role, Until, Victim};
use super::{processes, verdict};
use crate::crxfer::Receiver;
use crate::hosts::Side;

/// How long a line that is down for good stays so before somebody looks after the hosts: longer than
/// the freeze may last.
const UNATTENDED: Duration = Duration::from_millis(5000);

/// How long processes may take to end, and hosts to agree.
const LIMIT: Duration = Duration::from_secs(60);

/// How long the hosts may take to clean up where there is no `recover`.
const WITHOUT_RECOVER: Duration = Duration::from_secs(20);

const EVERY: Duration = Duration::from_millis(20);

/// So long after its death at the most it is known that a process is dead.
const KNOWN_AFTER: Duration = Duration::from_millis(100);

/// Waits until `crxfer migrate` and the source's guard have ended; the receiver runs (again) then and
/// lines are whole. Gives the exit code of `crxfer migrate`.
pub(super) fn come_to_rest(
    ground: &Ground,
    plan: &Plan,
    moving: &mut Moving,
    receiver: &mut Receiver,
    mut strike: Strike,
    log: &Path,
    diary: &mut Diary,
) -> Result<Option<i32>> {
    let source = ground.network.host(ground.side(Role::Source));
    let mut told_end = false;
    loop {
        let since = strike.at.elapsed();
        ground.remember_migrations();
        ground.keep_journals(log);
        if moving.ended().is_some() {
            withdraw_what_moved(ground, diary)?;
        }
        if let Some(undo) = due(&mut strike, plan, ground, diary)? {
            undo.done(ground, &[moving.shell(), receiver.id()], diary)?;
        }
        if !receiver.is_running() && since >= Duration::from_millis(plan.restart_ms) {
            diary.note("the receiver is dead: starting it again");
            let side = ground.side(Role::Destination);
            *receiver = ground
                .receive(side, None)
                .context("crxfer recv does not start again")?;
        }
        let ended = moving.ended();
        if let (Some(code), false) = (ended, told_end) {
            told_end = true;
            diary.note(format!("crxfer migrate ended with {code:?}"));
        }
        let guards = processes::of(source, Victim::Guard);
        if let Some(code) = ended
            && since >= KNOWN_AFTER
            && guards.is_empty()
            && strike.undo.is_none()
            && receiver.is_running()
        {
            return Ok(code);
        }
        if since > LIMIT {
            let guards: Vec<String> = guards.iter().map(processes::Found::line).collect();
            bail!(
                "{} s after the fault it has not come to rest: crxfer migrate {}, guards {guards:?}, receiver {}",
                LIMIT.as_secs(),
                ended.map_or("runs".to_owned(), |code| format!("ended with {code:?}")),
                if receiver.is_running() {
                    "runs"
                } else {
                    "is dead"
                },
            );
        }
        thread::sleep(EVERY);
    }
}

/// The address leaves the source when its journal says that the workload has: the hook that does it
/// may have died with `crxfer migrate`. Until then the guard keeps CRIU's lock.
fn withdraw_what_moved(ground: &Ground, diary: &mut Diary) -> Result<()> {
    let side = ground.side(Role::Source);
    let journals = journals::all(ground, side);
    let mut of_source = journals.iter().filter(|it| it.name.starts_with("source-"));
    if of_source.any(|journal| journal.state == "over") && verdict::has_address(ground, side)? {
        // Over is also what was kept.
        if journals::was(ground, side, "moved") {
            diary.note(format!("withdrawing the address from {side:?}"));
            ground.withdraw(side);
        }
    }
    Ok(())
}

/// What is to be undone now. A line that is down for good is first left alone, then an operator
/// decides where the plan says so.
fn due(
    strike: &mut Strike,
    plan: &Plan,
    ground: &Ground,
    diary: &mut Diary,
) -> Result<Option<Undo>> {
    let is_due = match strike.undo.as_ref().map(|undo| undo.due) {
        None => false,
        Some(Some(at)) => Instant::now() >= at,
        Some(None) => strike.at.elapsed() >= UNATTENDED,
    };
    if !is_due {
        return Ok(None);
    }
    if let Fault::Gone {
        until: Until::Decided,
        ..
    } = plan.fault
    {
        decide(ground, diary)?;
    }
    Ok(strike.undo.take())
}

/// Does as an operator does who can look at both hosts although they do not reach each other: what
/// the source's journal says counts.
fn decide(ground: &Ground, diary: &mut Diary) -> Result<()> {
    let (source, destination) = (ground.side(Role::Source), ground.side(Role::Destination));
    let journals = journals::unfinished(ground, source);
    let Some(keep) = journals::decision(&journals) else {
        diary.note("nothing is to be decided");
        return Ok(());
    };
    let option = match keep {
        Keep::Source => "--keep-source",
        Keep::Destination => "--keep-destination",
    };
    diary.note(format!(
        "the operator decides: {option}; source {journals:?}"
    ));
    for side in [destination, source] {
        let recovery = ground.recover(side, &[option])?;
        diary.note(&recovery.said);
    }
    Ok(())
}

/// Has `crxfer recover` look after both hosts until nothing is unfinished, and once more: that must
/// change nothing.
pub(super) fn recover(ground: &Ground, diary: &mut Diary) -> Result<()> {
    if !ground.tested.recovers {
        return without_recover(ground);
    }
    let begin = Instant::now();
    let mut quiet = 0;
    while quiet < 2 {
        quiet += 1;
        let mut left = Vec::new();
        for side in [Side::A, Side::B] {
            let recovery = ground.recover(side, &[])?;
            diary.note(&recovery.said);
            if !recovery.is_done() {
                quiet = 0;
                left.extend(recovery.unfinished);
            }
        }
        if begin.elapsed() > LIMIT {
            bail!(
                "after {} s of crxfer recover there is still unfinished: {left:?}",
                LIMIT.as_secs()
            );
        }
        if quiet == 0 {
            thread::sleep(Duration::from_millis(200));
        }
    }
    Ok(())
}

/// Waits until the receivers have removed what did not come to an end.
fn without_recover(ground: &Ground) -> Result<()> {
    let begin = Instant::now();
    while begin.elapsed() < WITHOUT_RECOVER {
        let is_empty = |side| {
            let place = ground.directory(side, "received/.crxfer/migrations");
            fs::read_dir(place).is_ok_and(|mut entries| entries.next().is_none())
                || !ground.directory(side, "received/.crxfer").exists()
        };
        if is_empty(Side::A) && is_empty(Side::B) {
            break;
        }
        thread::sleep(EVERY);
    }
    Ok(())
}
