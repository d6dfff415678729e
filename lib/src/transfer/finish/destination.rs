//! On the destination.
//!
//! The decision is [`DestinationState::duty`]'s; here is what carries it out, for whoever finds a
//! journal without a live driver. [`bring_to_life`] and [`clear`] also serve the driver itself, so that
//! a copy is built again, and removed, in one way only.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::FinishError;
use crate::handover::journal::{DestinationAbout, History};
use crate::handover::{Answer, DestinationDuty, DestinationState, Journal, Lease, Verdict};
use crate::hooks::{self, Environment, Hooks, Side};
use crate::preflight::Facts;
use crate::standby;
use crate::transfer::TransferError;
use crate::transfer::external::{action, command, scripts};
use crate::transfer::recv::{check_images, orphans, restore};
use crate::tree::{Process, boot_id, copy};

/// How long a CRIU that has lost its caller may take to remove the copy it holds, or to let it run.
const CRIU_TIME: Duration = Duration::from_secs(10);

/// Between looks at it.
const SHORTLY: Duration = Duration::from_millis(10);

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DestinationOutcome {
    /// The copy runs here.
    Running {
        /// Root process; 0 where it has ended since.
        pid: u32,
        /// What an operator should know.
        notes: Vec<String>,
    },
    /// Nothing is left here.
    Removed {
        /// What was killed and removed.
        notes: Vec<String>,
    },
    /// A complete copy is held in images (`place`): the source or an operator must decide.
    Held {
        /// Directory of the images.
        place: PathBuf,
    },
}

/// Does what the journal, the operator's decision in it and the source's `verdict` ask for. Blocks:
/// it may restore a tree.
pub fn finish_destination(
    journal: &Journal<DestinationState>,
    _lease: &Lease,
    verdict: Verdict,
) -> Result<DestinationOutcome, FinishError> {
    let history = journal.read()?;
    let about = &history.about;
    let is_over = history.state() == DestinationState::Over;
    let duty = history.state().duty(verdict, history.keep());
    let needs_images = matches!(
        duty,
        DestinationDuty::Hold | DestinationDuty::Resume | DestinationDuty::GiveBack
    );
    if needs_images
        && place_of(about)
            .map_err(|what| left(journal, what))?
            .is_none()
    {
        return lost(journal, &history);
    }
    match duty {
        DestinationDuty::Hold => {
            // Without its driver no copy can be let go any more: what CRIU has left only takes its pids.
            clear(about).map_err(|what| left(journal, what))?;
            if about.criu.is_some() {
                // No restore is under way any more: whoever looks next need not wait for one.
                journal.note_quickly(|about| about.criu = None)?;
            }
            Ok(DestinationOutcome::Held {
                place: images_of(about).map_err(|what| left(journal, what))?,
            })
        }
        DestinationDuty::Remove => remove(journal, &history, reason_of(verdict, &history)),
        DestinationDuty::Resume => resume(journal, &history),
        DestinationDuty::GiveBack => give_back(journal, &history),
        DestinationDuty::Tell(Answer::Runs { .. }) => {
            // It may have been recorded by one who died before he could tidy up.
            remove_place(about).map_err(|what| left(journal, what))?;
            let mut notes = Vec::new();
            let pid = running_pid(about);
            if pid == 0 {
                notes.push("it has run here, and has ended since".to_owned());
            }
            if !about.announced {
                notes.extend(announce(about, &hooks_of(about)?, pid));
                journal.note_quickly(|about| about.announced = true)?;
            }
            Ok(DestinationOutcome::Running { pid, notes })
        }
        DestinationDuty::Tell(_) if is_over && history.entries.iter().any(is_running) => {
            Ok(DestinationOutcome::Running {
                pid: running_pid(about),
                notes: Vec::new(),
            })
        }
        DestinationDuty::Tell(_) => {
            remove_place(about).map_err(|what| left(journal, what))?;
            Ok(DestinationOutcome::Removed { notes: Vec::new() })
        }
    }
}

fn is_running(entry: &crate::handover::journal::Entry<DestinationState>) -> bool {
    entry.state == DestinationState::Running
}

fn reason_of(verdict: Verdict, history: &History<DestinationState>) -> &'static str {
    match (history.state(), verdict) {
        (DestinationState::Complete, Verdict::Abort) => "the source keeps the workload",
        (DestinationState::Complete, _) => "an operator decided that the source keeps it",
        _ => "it ended early",
    }
}

/// The root process of a copy that runs; 0 where it has ended.
pub(in crate::transfer) fn running_pid(about: &DestinationAbout) -> u32 {
    let root = about.root.filter(|_| about.boot == boot_id());
    let there = root.filter(Process::is_there);
    there.map_or(0, |root| root.pid)
}

fn left(journal: &Journal<DestinationState>, what: String) -> FinishError {
    FinishError::Left {
        what,
        journal: journal.directory().to_owned(),
    }
}

fn remove(
    journal: &Journal<DestinationState>,
    history: &History<DestinationState>,
    reason: &str,
) -> Result<DestinationOutcome, FinishError> {
    let about = &history.about;
    if history.state() != DestinationState::Removing {
        journal.advance(DestinationState::Removing, reason)?;
    }
    let ran = history.entries.iter().any(is_running);
    let root = if ran { running_pid(about) } else { 0 };
    if root > 0 {
        // The way out where two ran: an operator wants the source's tree.
        remove_leftovers(&processes_of(about, root)).map_err(|what| left(journal, what))?;
    }
    let mut notes = clear(about).map_err(|what| left(journal, what))?;
    remove_place(about).map_err(|what| left(journal, what))?;
    let mut environment = environment(about, None);
    environment.reason = Some(reason.to_owned());
    let run = hooks_of(about)?.run(hooks::Moment::AfterAbort, &environment);
    notes.extend(run.err().map(|error| error.to_string()));
    journal.advance(DestinationState::Removed, "")?;
    Ok(DestinationOutcome::Removed { notes })
}

// The operator wants the source's tree: not where the copy has run meanwhile.
fn give_back(
    journal: &Journal<DestinationState>,
    history: &History<DestinationState>,
) -> Result<DestinationOutcome, FinishError> {
    match look(&history.about) {
        copy::Found::Runs { .. } => resume(journal, history),
        copy::Found::Leftovers(_) | copy::Found::Nothing => {
            let reason = "an operator decided that the source keeps it; the copy never ran";
            remove(journal, history, reason)
        }
    }
}

fn resume(
    journal: &Journal<DestinationState>,
    history: &History<DestinationState>,
) -> Result<DestinationOutcome, FinishError> {
    if history.state() == DestinationState::Complete {
        // Before anything of it can run. Nobody waits for milliseconds here: on disk.
        journal.advance(DestinationState::Resuming, "finished without its receiver")?;
    }
    let about = &history.about;
    let note_criu = |criu| {
        journal.note_quickly(|about| {
            about.criu = Some(criu);
            about.boot = boot_id();
        })
    };
    let alive = bring_to_life(about, &hooks_of(about)?, note_criu);
    let alive = alive.map_err(|what| left(journal, what))?;
    record_running(journal, alive.pid)?;
    journal.note_quickly(|about| about.announced = true)?;
    let mut notes = alive.notes;
    // The copy has read all that it needs.
    notes.extend(remove_place(about).err());
    Ok(DestinationOutcome::Running {
        pid: alive.pid,
        notes,
    })
}

/// Records that the copy runs, and as which process.
pub(in crate::transfer) fn record_running(
    journal: &Journal<DestinationState>,
    pid: u32,
) -> Result<(), crate::handover::JournalError> {
    journal.note_quickly(|about| {
        about.pid = Some(pid);
        about.root = Process::of(pid);
        about.boot = boot_id();
    })?;
    journal.advance_quickly(DestinationState::Running, "")
}

/// A copy that runs.
#[derive(Debug)]
pub(in crate::transfer) struct Alive {
    pub(in crate::transfer) pid: u32,
    pub(in crate::transfer) notes: Vec<String>,
}

/// Finds the copy running, or builds it from its images once more and lets it go at once. Call it only
/// after [`DestinationState::Resuming`] was recorded. The copy outlives this process. Blocks.
///
/// The error says what stands in the way and where the images are; nothing of the copy runs then.
pub(in crate::transfer) fn bring_to_life(
    about: &DestinationAbout,
    hooks: &Hooks,
    note_criu: impl FnOnce(Process) -> Result<(), crate::handover::JournalError>,
) -> Result<Alive, String> {
    match look(about) {
        copy::Found::Runs { pid } => {
            let mut notes = vec!["it was found running".to_owned()];
            notes.extend(announce(about, hooks, pid));
            return Ok(Alive { pid, notes });
        }
        copy::Found::Leftovers(left) => remove_leftovers(&left)?,
        copy::Found::Nothing => {}
    }
    if let Some(wanted) = wanted_by_command(about) {
        restore::remove_from_runtime(&wanted)?;
    }
    let images = images_of(about)?;
    let advice = |what: String| {
        format!(
            "the workload is this host's, but cannot be brought to life: {what}; its complete images are in {}: remove the cause, then run `crxfer recover --dir` of the receiving directory",
            images.display()
        )
    };
    await_pids(about);
    check_images(&images).map_err(|error| advice(error.to_string()))?;
    let ran = hooks.run(hooks::Moment::AddressPrepare, &environment(about, None));
    ran.map_err(|error| advice(error.to_string()))?;
    let mut alive = build(about, &images, note_criu).map_err(advice)?;
    alive.notes.extend(announce(about, hooks, alive.pid));
    Ok(alive)
}

// Leads clients to the copy, where nobody has yet. A driver that dies may have done half of it: the hooks
// then run once more.
fn announce(about: &DestinationAbout, hooks: &Hooks, pid: u32) -> Vec<String> {
    if about.announced || pid == 0 {
        return Vec::new();
    }
    let environment = environment(about, Some(pid));
    let moments = [hooks::Moment::AddressAnnounce, hooks::Moment::AfterRestore];
    let failed = moments.map(|moment| hooks.run(moment, &environment).err());
    failed
        .into_iter()
        .flatten()
        .map(|error| error.to_string())
        .collect()
}

fn build(
    about: &DestinationAbout,
    images: &Path,
    note_criu: impl FnOnce(Process) -> Result<(), crate::handover::JournalError>,
) -> Result<Alive, String> {
    // What a failing CRIU leaves must be found below this process.
    orphans::adopt();
    let worker = match wanted_by_command(about) {
        Some(wanted) => restore::prepare_command(&wanted, images),
        None => restore::prepare(&about.program),
    };
    let worker = worker.map_err(|error| error.to_string())?;
    let criu = Process::of(worker.pid());
    if let Some(criu) = criu {
        note_criu(criu).map_err(|error| error.to_string())?;
    }
    let work = about.work();
    let options = restore::options(&about.options, about.config_file.as_deref());
    match restore::at_once(worker, images, &work, options) {
        Ok(released) => Ok(Alive {
            pid: released.pid,
            notes: released.complaint.into_iter().collect(),
        }),
        Err(error) => {
            // One that CRIU did not report may run all the same.
            let about = DestinationAbout {
                criu,
                boot: boot_id(),
                ..about.clone()
            };
            match look(&about) {
                copy::Found::Runs { pid } => Ok(Alive {
                    pid,
                    notes: vec![error.to_string()],
                }),
                copy::Found::Leftovers(left) => {
                    remove_leftovers(&left)?;
                    Err(error.to_string())
                }
                copy::Found::Nothing => Err(error.to_string()),
            }
        }
    }
}

fn wanted_by_command(about: &DestinationAbout) -> Option<restore::Wanted> {
    Some(restore::Wanted {
        runtime: about.runtime.clone()?,
        name: about.name.clone(),
        container: about.container.clone(),
        options: about.options.clone(),
        place: about.scene(),
    })
}

/// Ends what is left of a copy that was never let go; says what that was. Its images stay. Blocks.
pub(in crate::transfer) fn clear(about: &DestinationAbout) -> Result<Vec<String>, String> {
    let left = match look(about) {
        copy::Found::Nothing => Vec::new(),
        copy::Found::Leftovers(left) => left,
        // Only CRIU's word makes it the copy: it may be a stranger with the copy's pids.
        copy::Found::Runs { pid } if was_let_go(about) => processes_of(about, pid),
        copy::Found::Runs { .. } => return Ok(Vec::new()),
    };
    remove_leftovers(&left)?;
    let mut notes = Vec::new();
    if !left.is_empty() {
        notes.push(format!("killed {} processes of a copy", left.len()));
    }
    // A runtime remembers containers that it has failed to restore.
    if let Some(wanted) = wanted_by_command(about) {
        notes.extend(restore::remove_from_runtime(&wanted).err());
    }
    Ok(notes)
}

fn was_let_go(about: &DestinationAbout) -> bool {
    let said = about.runtime.is_some() && action::resumed(&about.scene()).is_some();
    said || copy::was_let_go(&log_of(about))
}

fn remove_leftovers(left: &[Process]) -> Result<(), String> {
    match copy::remove(left) {
        0 => Ok(()),
        stayed => Err(format!(
            "{stayed} processes that CRIU left of the copy do not end: end them, then run `crxfer recover --dir` of the receiving directory"
        )),
    }
}

// What there is of the copy once its CRIU is gone.
fn look(about: &DestinationAbout) -> copy::Found {
    if about.boot != boot_id() {
        return copy::Found::Nothing;
    }
    if let Some(criu) = about.criu {
        await_end(criu);
        if about.runtime.is_some() {
            // What its shell has started, and was not waited for.
            command::kill_group(criu);
        }
    }
    // A runtime's daemon, or its monitor, starts CRIU outside of that group.
    if about.runtime.is_some()
        && let Some(criu) = action::builder(&about.scene())
    {
        await_end(criu);
    }
    if about.runtime.is_some()
        && let Some(root) = action::resumed(&about.scene())
    {
        // Said by CRIU's script, wherever its log is.
        let is_copy = |root: &Process| about.criu.is_none_or(|criu| root.started >= criu.started);
        let root = Process::of(root).filter(is_copy);
        return copy::Found::Runs {
            pid: root.map_or(0, |root| root.pid),
        };
    }
    copy::find(&wanted(about))
}

fn wanted(about: &DestinationAbout) -> copy::Wanted {
    let mut tree = facts_of(about).tree;
    // The root first: that is the one to name.
    if let Some(at) = about
        .pid
        .and_then(|root| tree.tasks.iter().position(|&id| id == root))
    {
        tree.tasks[..=at].rotate_right(1);
    }
    copy::Wanted {
        tasks: tree.tasks,
        own_pid_namespace: tree.own_pid_namespace,
        criu: about.criu,
        log: log_of(about),
    }
}

fn log_of(about: &DestinationAbout) -> PathBuf {
    about.work().join("restore.log")
}

fn processes_of(about: &DestinationAbout, root: u32) -> Vec<Process> {
    let tree = facts_of(about).tree;
    // The first process of a pid namespace takes all others along.
    let others = if tree.own_pid_namespace {
        Vec::new()
    } else {
        tree.tasks
    };
    let began = about.criu.map_or(u64::MAX, |criu| criu.started);
    let pids = std::iter::once(root).chain(others.into_iter().filter(|&pid| pid != root));
    let there = pids.filter_map(Process::of);
    there.filter(|process| process.started >= began).collect()
}

/// The source's facts, which were checked when they came.
fn facts_of(about: &DestinationAbout) -> Facts {
    Facts::decode(&about.facts).unwrap_or_default()
}

// A CRIU whose caller is gone ends its restore by itself, one way or the other.
#[expect(
    clippy::disallowed_methods,
    reason = "a driver: it waits for another process"
)]
fn await_end(criu: Process) {
    let begun = Instant::now();
    while criu.is_there() {
        if begun.elapsed() > CRIU_TIME {
            tracing::warn!(
                "criu (pid {}) does not end without its caller; it is killed",
                criu.pid
            );
            copy::remove(&[criu]);
            return;
        }
        std::thread::sleep(SHORTLY);
    }
}

// A killed copy holds its pids until whoever is its parent now has taken note of its end.
fn await_pids(about: &DestinationAbout) {
    let tree = facts_of(about).tree;
    if tree.own_pid_namespace {
        return;
    }
    let dead = tree
        .tasks
        .into_iter()
        .filter(|&pid| Process::of(pid).is_none());
    let dead: Vec<_> = dead.filter_map(Process::dead_or_alive).collect();
    copy::remove(&dead);
}

fn remove_place(about: &DestinationAbout) -> Result<(), String> {
    if about.runtime.is_some() {
        scripts::remove(&about.scene());
    }
    // What cannot be seen from here is let go of by whoever holds it: the journal says so.
    let place = place_of(about).unwrap_or_default();
    for place in place.iter().chain(&about.work) {
        match fs::remove_dir_all(place) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(format!("cannot remove {}: {error}", place.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

// None where nobody holds what was in memory only.
fn place_of(about: &DestinationAbout) -> Result<Option<PathBuf>, String> {
    let place = about.place();
    place.map_err(|unseen| format!("the directory of {}: {unseen}", about.name))
}

fn images_of(about: &DestinationAbout) -> Result<PathBuf, String> {
    let place = place_of(about)?.ok_or(LOST)?;
    Ok(place.join(standby::FINAL))
}

/// Why a copy that was complete is given up without anybody's word.
const LOST: &str = "its images were in memory only, and every process that held them is gone";

// What was to be held or built is gone with its last holder. Unless the copy has run already the
// workload is the source's, which holds its tree until it hears of a copy that runs.
fn lost(
    journal: &Journal<DestinationState>,
    history: &History<DestinationState>,
) -> Result<DestinationOutcome, FinishError> {
    let may_have_run = history.state() == DestinationState::Resuming;
    if may_have_run && matches!(look(&history.about), copy::Found::Runs { .. }) {
        return resume(journal, history);
    }
    remove(journal, history, LOST)
}

fn hooks_of(about: &DestinationAbout) -> Result<Hooks, TransferError> {
    let hooks: Result<Vec<_>, _> = about.hooks.iter().map(|hook| hook.parse()).collect();
    let limit = Duration::from_millis(about.hook_limit_ms);
    let hooks = hooks.and_then(|hooks| Hooks::new(Side::Destination, hooks, limit));
    hooks.map_err(|error| {
        restore::refused(
            crate::wire::FailureCode::Hook,
            format!("a hook in the journal cannot be read: {error}"),
        )
    })
}

fn environment(about: &DestinationAbout, pid: Option<u32>) -> Environment {
    Environment {
        migration: about.name.clone(),
        pid,
        peer: Some(about.address.ip()),
        addresses: facts_of(about).addresses(),
        images: images_of(about).ok(),
        reason: None,
    }
}

#[cfg(test)]
mod tests;
