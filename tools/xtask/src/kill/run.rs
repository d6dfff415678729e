//! One run: a migration that is disturbed, the verdict, and one more migration of what survived.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::fault::{self, Strike};
use super::ground::{Diary, FREEZE_LIMIT, Ground, Hold, Tested};
use super::leftovers::{self, Clean};
use super::moving::Moving;
use super::plan::{Mode, Moment, Plan, Program, Role};
use super::timing::Timing;
use super::{processes, settle, verdict};
use crate::crxfer::Receiver;
use crate::hosts::Side;

/// How long a migration may take that nobody disturbs.
const UNDISTURBED: Duration = Duration::from_secs(60);

/// A ground with what was learned on it.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) ground: Ground,
    timing: Timing,
    clean: Clean,
}

/// How a run ended that found nothing wrong.
#[derive(Clone, Debug)]
pub(super) struct Passed {
    /// Whether the workload was moved by the disturbed migration.
    pub(super) moved: bool,
    /// How `crxfer migrate` ended.
    pub(super) code: Option<i32>,
    /// Whether the fault came in time.
    pub(super) struck: bool,
    /// What it had told last when it was struck.
    pub(super) told: String,
    /// Connections that the death of a CRIU broke.
    pub(super) broke: usize,
    /// The longest time in which clients got no answer.
    pub(super) standstill: Duration,
}

impl Known {
    /// A new ground, on which two migrations were not disturbed.
    pub(super) fn new(tested: &Tested, program: Program, log: &Path) -> Result<Self> {
        let mut ground = Ground::new(tested, program)?;
        // To and fro: what is then on both hosts is what may stay there.
        let there = Timing::of(&undisturbed(&mut ground, Mode::Disk, log)?)?;
        let back = Timing::of(&undisturbed(&mut ground, Mode::Diskless, log)?)?;
        let clean = Clean::of(&ground)?;
        // A moment that comes late may come never.
        let timing = there.faster(back);
        Ok(Self {
            ground,
            timing,
            clean,
        })
    }

    /// Does what `plan` says, and judges. Logs go to `log`.
    pub(super) fn run(&mut self, plan: &Plan, log: &Path, diary: &mut Diary) -> Result<Passed> {
        self.ground.keep_pids_free()?;
        self.ground.forget();
        let first = self.ground.at;
        let outcome = self.disturbed(plan, log, diary)?;
        let copy = self.ground.at;
        diary.note(format!("the copy is on {copy:?}, it was on {first:?}"));
        self.clean
            .check(&self.ground)
            .context("after the recovery")?;
        undisturbed(&mut self.ground, plan.mode, &log.join("again"))
            .context("moving once more what survived")?;
        self.clean
            .check(&self.ground)
            .context("after one more migration")?;
        Ok(outcome)
    }

    fn disturbed(&mut self, plan: &Plan, log: &Path, diary: &mut Diary) -> Result<Passed> {
        let ground = &mut self.ground;
        let (source, destination) = (ground.side(Role::Source), ground.side(Role::Destination));
        let hold = match plan.moment {
            Moment::Point { at, name } => Some((at, Hold::at(name, log.join("point")))),
            Moment::Time { .. } => None,
        };
        let hold_of = |role: Role| hold.as_ref().filter(|one| one.0 == role).map(|one| &one.1);
        let mut receiver = ground.receive(destination, hold_of(Role::Destination))?;
        let mut moving =
            ground.migrate(source, &receiver, plan.mode, hold_of(Role::Source), log)?;
        diary.note(format!("migrating from {source:?} to {destination:?}"));
        let point = hold.as_ref().map(|one| &one.1);
        let mut strike = None;
        if let Some(moment) = fault::await_moment(plan, &mut moving, point, &self.timing) {
            strike = fault::strike(ground, plan, moment, &mut moving, diary)?;
        }
        let (struck, told) = (strike.is_some(), moving.last());
        let strike = strike.unwrap_or(Strike {
            at: Instant::now(),
            undo: None,
        });
        let rest =
            settle::come_to_rest(ground, plan, &mut moving, &mut receiver, strike, log, diary);
        let code = rest.map_err(|error| explained(error, ground))?;
        settle::recover(ground, diary).map_err(|error| explained(error, ground))?;
        let copy = verdict::only_copy(ground).map_err(|error| explained(error, ground))?;
        verdict::whole(ground, copy).map_err(|error| explained(error, ground))?;
        verdict::lead_clients(ground, plan, copy, diary)?;
        let may_break = struck && plan.fault.kills_criu();
        let broke = verdict::clients(ground, copy, diary.begin(), may_break)?;
        // Where the address was withdrawn only now, the lock goes now.
        settle::recover(ground, diary)?;
        receiver.stop().context("crxfer recv does not end")?;
        let moved = copy != source;
        ground.at = copy;
        claims_are_true(code, moved, struck)?;
        let standstill = ground.clients.take_standstill();
        if !moved {
            freeze_limit_held(plan, standstill)?;
        }
        Ok(Passed {
            moved,
            code,
            struck,
            told,
            broke,
            standstill,
        })
    }
}

/// What `crxfer migrate` says by its exit code must be what happened; and it must not fail where
/// nothing was done to it.
fn claims_are_true(code: Option<i32>, moved: bool, struck: bool) -> Result<()> {
    match code {
        Some(0) => ensure!(moved, "crxfer migrate ended with 0, and nothing was moved"),
        _ => ensure!(struck, "crxfer migrate ended with {code:?} by itself"),
    }
    Ok(())
}

/// What stays must run on within the limit of the freeze, whatever else is dead; a process that hangs
/// can do nothing meanwhile.
fn freeze_limit_held(plan: &Plan, standstill: Duration) -> Result<()> {
    // A busy machine, TCP that tries again once a second, and an operator who is not that fast.
    const SLACK: Duration = Duration::from_millis(3500);
    let limit = Duration::from_secs(FREEZE_LIMIT.into());
    let excuse = plan.fault.excuse().unwrap_or(Duration::MAX);
    ensure!(
        standstill <= limit.saturating_add(SLACK).saturating_add(excuse),
        "clients had no answer for {:.1} s, and the limit of a freeze is {limit:?}",
        standstill.as_secs_f64()
    );
    Ok(())
}

/// Adds to an error who is on both hosts.
fn explained(error: anyhow::Error, ground: &Ground) -> anyhow::Error {
    let mut text = format!("{error:#}");
    for side in [Side::A, Side::B] {
        for process in processes::all(ground.network.host(side)) {
            text.push_str(&format!("\n{side:?}: {}", process.line()));
        }
    }
    anyhow!(text)
}

/// Moves the workload to the other host, which must succeed.
fn undisturbed(ground: &mut Ground, mode: Mode, log: &Path) -> Result<Moving> {
    fs::create_dir_all(log)?;
    ground.keep_pids_free()?;
    ground.forget();
    let begin = Instant::now();
    let (source, destination) = (ground.side(Role::Source), ground.side(Role::Destination));
    let mut receiver: Receiver = ground.receive(destination, None)?;
    let mut moving = ground.migrate(source, &receiver, mode, None, log)?;
    let code = loop {
        if let Some(code) = moving.ended() {
            break code;
        }
        if begin.elapsed() > UNDISTURBED {
            bail!("it takes longer than {} s", UNDISTURBED.as_secs());
        }
        thread::sleep(Duration::from_millis(5));
    };
    let said = || {
        let error = fs::read_to_string(log.join("migrate.err")).unwrap_or_default();
        let output = fs::read_to_string(log.join("migrate.out")).unwrap_or_default();
        let output = crate::run::last_lines(&output, 2);
        format!(
            "crxfer migrate ended with {code:?}: {error} {output}\ncrxfer recv said:\n{}",
            receiver.said()
        )
    };
    ensure!(code == Some(0), "{}", said());
    let copy = verdict::only_copy(ground)?;
    ensure!(copy == destination, "it is still on {copy:?}");
    verdict::whole(ground, copy)?;
    verdict::clients(ground, copy, begin, false)?;
    receiver.stop().context("crxfer recv does not end")?;
    ground.at = copy;
    Ok(moving)
}

/// Keeps everything that may tell why a run failed.
pub(super) fn keep_evidence(
    ground: Option<&Ground>,
    diary: &Diary,
    log: &Path,
    error: &anyhow::Error,
) {
    let _ = fs::write(log.join("failure.txt"), format!("{error:#}\n"));
    let _ = diary.write(&log.join("diary.txt"));
    if let Some(ground) = ground {
        leftovers::keep(ground.files(), &log.join("hosts"));
        for side in [Side::A, Side::B] {
            let host = ground.network.host(side);
            let script = "ps -eo pid,ppid,sid,stat,wchan:20,args; nft list ruleset; ss -antup; ip -o address; cat /proc/net/arp";
            let output = host.command("sh").args(["-c", script]).output();
            let output = output.map(|output| output.stdout).unwrap_or_default();
            let _ = fs::write(log.join(format!("state-of-{side:?}.txt")), output);
        }
    }
}

/// Where logs of the run with `seed` go, emptied.
pub(super) fn log_directory(root: &Path, seed: u64) -> Result<PathBuf> {
    let path = root.join(format!("seed-{seed}"));
    let _ = fs::remove_dir_all(&path);
    fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
    Ok(path)
}
