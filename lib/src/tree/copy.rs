//! A restored tree: whether it runs, and what a restore that failed has left.
//!
//! Names, pids and even open ports prove nothing: CRIU gives all of them to tasks that have not run
//! yet. What tells a task that CRIU still builds or holds from one that runs is CRIU's log: each process
//! of a restore has it open for writing, and closes it with its last steps before the program's own
//! code. Nobody else writes to it, so who has it open may be killed, whatever its pid.
//!
//! CRIU lets the tasks of a copy go all at once, by one word in memory that they share. When CRIU dies
//! before that, all of them wait for ever; after it, all of them run, whether CRIU lives or not. With one
//! exception: in between CRIU makes each process in turn remove the memory of its building, and one whose
//! CRIU dies in that moment ends by SIGSEGV or SIGTRAP, within milliseconds. That was seen in ten
//! of 120 kills in the last eight milliseconds of a restore; such a copy is not there.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use rustix::process::{Pid, WaitOptions, waitpid};

use super::{Process, within};
use crate::criu::network_lock;
use crate::preflight::Stat;

/// How far a file's age may be off.
const CLOCK_DOUBT: Duration = Duration::from_millis(50);

/// How long tasks that were let go may take to their own code, and those that were not to the place
/// where they wait: they may read images meanwhile.
const SETTLED_WITHIN: Duration = Duration::from_secs(10);

/// How long a task must not move to be taken for one that waits.
const STILL_FOR: Duration = Duration::from_millis(100);

/// Large memory takes a while to be given back.
const GONE_WITHIN: Duration = Duration::from_secs(5);

/// How much of a log's end is searched, in bytes: what is wanted is among the last lines.
const MOST_LOG_BYTES: u64 = 64 << 10;

/// What there is of a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// It runs code of its own, or has done so.
    Runs {
        /// Its root process, as this pid namespace numbers it; 0 where it has ended since.
        pid: u32,
    },
    /// Processes that a restore has left: they never ran the workload's code.
    Leftovers(Vec<Process>),
    /// Nothing.
    Nothing,
}

/// What to look for.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// The copy's pids and thread ids as its images have them.
    pub tasks: Vec<u32>,
    /// The copy has a pid namespace of its own: its pids are those inside.
    pub own_pid_namespace: bool,
    /// The process of CRIU that restored it: copies are younger. `None`: no restore was begun.
    pub criu: Option<Process>,
    /// CRIU's log of the restore, which says whether it let the copy go.
    ///
    /// It says so at log level 3 and above. Without that a copy is known by all of its tasks, which
    /// cannot be seen any more of one that has ended.
    pub log: std::path::PathBuf,
}

/// Looks for the copy. Call it only when CRIU has ended, and in the boot in which it was started.
///
/// Returns at once where the copy runs; where CRIU was killed in the midst, waits up to 10 s until
/// what it left has come to rest.
pub fn find(wanted: &Wanted) -> Found {
    let Some(criu) = wanted.criu else {
        return Found::Nothing;
    };
    let leftovers = settled(criu, &wanted.log);
    let log = log_says(&wanted.log);
    // Without a log no restore was begun: what has such pids is somebody else's.
    let began = began(&wanted.log).map(|began| began.max(criu.started));
    // CRIU's helpers may outlive it while the copy runs.
    let is_task = |process: &Process| {
        let ids = ids(process.pid, wanted.own_pid_namespace);
        ids.first().is_some_and(|id| wanted.tasks.contains(id))
    };
    let held = leftovers.iter().any(is_task);
    if log == Some(Ended::Resumed) {
        let began = began.unwrap_or(criu.started);
        let pid = Copy::look(wanted, began).root.unwrap_or(0);
        return Found::Runs { pid };
    }
    let mut left = leftovers;
    if let (None, false, Some(began)) = (log, held, began) {
        let copy = Copy::lasting(wanted, began);
        match copy.root {
            Some(pid) if copy.is_whole(wanted) => return Found::Runs { pid },
            // CRIU's death took some of its processes along: the others are no workload.
            _ => left.extend(copy.processes),
        }
    }
    if left.is_empty() {
        Found::Nothing
    } else {
        Found::Leftovers(left)
    }
}

/// Processes that a killed CRIU, of a dump or a restore, has left of its own: some are stopped and would
/// stay for ever. To be [removed](remove) when CRIU has ended.
///
/// They are known by CRIU's process group, which a [`Worker`](crate::criu::Worker) leads.
pub fn helpers_of(criu: Process) -> Vec<Process> {
    // Its pid belongs to another process now, and perhaps the group too.
    if Process::dead_or_alive(criu.pid).is_some_and(|now| now != criu) {
        return Vec::new();
    }
    let is_helper = |process: &Process| {
        Stat::of(process.pid).is_some_and(|stat| stat.group == criu.pid)
            && network_lock::is_process_of_criu(process.pid)
    };
    let young = younger_than(criu.started, criu.pid).into_iter();
    young.filter(is_helper).collect()
}

/// Kills leftovers and waits until they are gone and their pids are free; gives how many stayed.
pub fn remove(leftovers: &[Process]) -> usize {
    for process in leftovers {
        if let Err(error) = process.kill() {
            tracing::warn!("process {} cannot be killed: {error}", process.pid);
        }
    }
    let mut left = leftovers.to_vec();
    within(GONE_WITHIN, || {
        // One whose parent is among them becomes a child of this process when that has gone, if
        // this is a subreaper; of others the parent takes care.
        left.retain(|process| has_its_pid(*process) && !reap(process.pid));
        left.is_empty()
    });
    left.len()
}

/// Takes the status of a child that has ended; false where it has not, or is not ours.
pub(crate) fn reap(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    pid.is_some_and(|pid| matches!(waitpid(Some(pid), WaitOptions::NOHANG), Ok(Some(_))))
}

fn has_its_pid(process: Process) -> bool {
    Stat::of(process.pid).is_some_and(|stat| stat.started == process.started)
}

/// How CRIU says that a restore has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    Resumed,
    Failed,
}

/// `None`: it does not, because it was killed or writes only errors.
fn log_says(log: &Path) -> Option<Ended> {
    let mut file = File::open(log).ok()?;
    let length = file.metadata().ok()?.len();
    let from = length.saturating_sub(MOST_LOG_BYTES);
    file.seek(SeekFrom::Start(from)).ok()?;
    let mut end = Vec::new();
    file.take(MOST_LOG_BYTES).read_to_end(&mut end).ok()?;
    let end = String::from_utf8_lossy(&end);
    // Both since CRIU 3.0 at least; the first is written when all tasks are let go.
    if end.contains("Tasks resumed") {
        Some(Ended::Resumed)
    } else {
        end.contains("Restoring FAILED").then_some(Ended::Failed)
    }
}

/// Processes of the restore that have come to rest before their own code.
fn settled(criu: Process, log: &Path) -> Vec<Process> {
    let mut found = Vec::new();
    within(SETTLED_WITHIN, || {
        found = builders(criu, log);
        let before = found.iter().map(|process| places(process.pid));
        let before: Vec<_> = before.collect();
        if !found.is_empty() {
            std::thread::sleep(STILL_FOR);
        }
        let after = found.iter().map(|process| places(process.pid));
        before.iter().all(Option::is_some) && after.eq(before.iter().cloned())
    });
    found
}

/// Where in the kernel the threads of a process wait; `None` where one does not wait, or it is gone.
fn places(pid: u32) -> Option<Vec<String>> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let places = threads.map(|thread| {
        let place = fs::read_to_string(thread.ok()?.path().join("syscall")).ok()?;
        (!place.starts_with("running")).then_some(place)
    });
    places.collect()
}

/// Processes that CRIU has made for the restore and that have not come to their own code.
fn builders(criu: Process, log: &Path) -> Vec<Process> {
    let identity = fs::metadata(log).ok().map(|log| (log.dev(), log.ino()));
    let removed = format!("{} (deleted)", log.display());
    let is_log = |descriptor: &Path| {
        let metadata = fs::metadata(descriptor).ok();
        let same = metadata.map(|it| (it.dev(), it.ino())) == identity && identity.is_some();
        // A second attempt of the restore removes the log of the first.
        let same = same || fs::read_link(descriptor).is_ok_and(|link| link == Path::new(&removed));
        same && is_written(descriptor)
    };
    let mut found = helpers_of(criu);
    for process in younger_than(criu.started, criu.pid) {
        if found.contains(&process) {
            continue;
        }
        let descriptors = fs::read_dir(format!("/proc/{}/fd", process.pid));
        let mut descriptors = descriptors.into_iter().flatten().flatten();
        if descriptors.any(|entry| is_log(&entry.path())) {
            found.push(process);
        }
    }
    found
}

// Readers of a log are operators.
fn is_written(descriptor: &Path) -> bool {
    let mode = fs::symlink_metadata(descriptor).map_or(0, |link| link.mode());
    mode & 0o200 != 0
}

/// Processes that were started at `began` or later, in ticks since boot, but for `besides` and this one.
fn younger_than(began: u64, besides: u32) -> Vec<Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let processes = pids.filter(|&pid| pid != std::process::id() && pid != besides);
    let processes = processes.filter_map(Process::of);
    processes
        .filter(|process| process.started >= began)
        .collect()
}

/// Whether CRIU has written down that it let the copy go.
pub fn was_let_go(log: &Path) -> bool {
    matches!(log_says(log), Some(Ended::Resumed))
}

/// When a restore began, in ticks since boot: when its log was made. `None` where there is none; where
/// the file system does not keep that, any time.
#[expect(clippy::disallowed_methods, reason = "the age of a file")]
fn began(log: &Path) -> Option<u64> {
    let Ok(made) = fs::metadata(log).ok()?.created() else {
        return Some(0);
    };
    let age = std::time::SystemTime::now().duration_since(made);
    let up = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let up = Duration::new(u64::try_from(up.tv_sec).ok()?, 0)
        + Duration::from_nanos(u64::try_from(up.tv_nsec).ok()?);
    let at = up.checked_sub(age.unwrap_or_default()).unwrap_or_default();
    // A tick is a rounded 10 ms, and the clocks are read one after the other.
    let at = at.saturating_sub(CLOCK_DOUBT).as_millis();
    let ticks = u128::from(rustix::param::clock_ticks_per_second());
    u64::try_from(at * ticks / 1000).ok()
}

/// What there is of a copy that was let go.
#[derive(Debug, Default)]
struct Copy {
    /// Those of the wanted tasks that are there, as the images number them.
    ids: HashSet<u32>,
    root: Option<u32>,
    processes: Vec<Process>,
}

impl Copy {
    /// All that its images hold is there. One thread that has ended in the meantime makes it less than
    /// that: then it is built again.
    fn is_whole(&self, wanted: &Wanted) -> bool {
        wanted.tasks.iter().all(|id| self.ids.contains(id))
    }

    /// The copy, when it stays as it is: its processes may be about to end.
    fn lasting(wanted: &Wanted, began: u64) -> Self {
        let mut copy = Self::default();
        within(SETTLED_WITHIN, || {
            copy = Self::look(wanted, began);
            if copy.ids.is_empty() {
                return true;
            }
            std::thread::sleep(STILL_FOR);
            Self::look(wanted, began).ids == copy.ids
        });
        copy
    }

    // `began`: when the restore did, in ticks since boot.
    fn look(wanted: &Wanted, began: u64) -> Self {
        let tasks: HashSet<u32> = wanted.tasks.iter().copied().collect();
        let mut best = Self::default();
        let mut spaces = std::collections::BTreeMap::<u64, Self>::new();
        let young = younger_than(began, std::process::id());
        for process in young {
            let ids = ids(process.pid, wanted.own_pid_namespace);
            // Its first thread has the process' id.
            let is_listed = ids.first().is_some_and(|id| tasks.contains(id));
            let Some(space) = pid_namespace(process.pid).filter(|_| is_listed) else {
                continue;
            };
            if is_dumping_core(process.pid) {
                continue;
            }
            let here = spaces.entry(space).or_default();
            let leads = ids
                .first()
                .is_some_and(|id| wanted.tasks.first() == Some(id));
            if leads || here.root.is_none() {
                here.root = Some(process.pid);
            }
            here.processes.push(process);
            here.ids
                .extend(ids.into_iter().filter(|id| tasks.contains(id)));
        }
        for here in spaces.into_values() {
            if here.ids.len() > best.ids.len() {
                best = here;
            }
        }
        best
    }
}

/// Ids of the threads of a process as its copy's images number them, the process' own first.
fn ids(pid: u32, own_namespace: bool) -> Vec<u32> {
    let threads = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten();
    let threads = threads.flatten().filter_map(|thread| {
        let status = fs::read_to_string(thread.path().join("status")).ok()?;
        let ids = status
            .lines()
            .find_map(|line| line.strip_prefix("NSpid:"))?;
        let ids: Vec<u32> = ids.split_whitespace().flat_map(str::parse).collect();
        let fits = (ids.len() > 1) == own_namespace;
        let number: u32 = thread.file_name().to_str()?.parse().ok()?;
        fits.then_some((number != pid, *ids.last()?))
    });
    let mut threads: Vec<_> = threads.collect();
    threads.sort_unstable();
    threads.into_iter().map(|(_, id)| id).collect()
}

fn is_dumping_core(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status"));
    status.is_ok_and(|status| status.lines().any(|line| line == "CoreDumping:\t1"))
}

fn pid_namespace(pid: u32) -> Option<u64> {
    let space = fs::metadata(format!("/proc/{pid}/ns/pid"));
    space.ok().map(|space| space.ino())
}

#[cfg(test)]
mod tests;
