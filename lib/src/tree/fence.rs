//! The fence: a freezer cgroup that holds a tree, whatever becomes of CRIU.
//!
//! CRIU's own hold on a tree ends with CRIU: the tree then runs. A task that the kernel's freezer holds
//! stays where it is when its tracer dies, and when the one who froze it dies.
//!
//! cgroup v2 comes first, where it can be used: it knows traced tasks, its processes end while they are
//! frozen, and on hosts that have both the tree stays below the cgroup by which its supervisor knows it.
//! A tree that is alone in its cgroup is frozen there. Any other is moved into a new cgroup `crxfer-ID`,
//! below the deepest one that all of its processes are in: the rule of v2 that a cgroup with controllers
//! for its children has no processes is kept by that, because such a cgroup has none to begin with.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::cgroup::{self, Freezer, Hierarchy};
use super::{Process, Tree, boot_id, within};
use crate::preflight::Stat;

/// How long a tree may take to stand still. One that CRIU has stopped does in a millisecond.
const STILL_WITHIN: Duration = Duration::from_secs(2);

/// How long processes may take to leave the fence. Each takes some microseconds to be moved, the first
/// some milliseconds.
const LEFT_WITHIN: Duration = Duration::from_secs(5);

/// How long killed processes may take to go: large memory is given back at some 20 GB/s.
const GONE_WITHIN: Duration = Duration::from_secs(10);

/// Longest id of a migration, in bytes: names of cgroups end at 255.
const MOST_ID_BYTES: usize = 128;

/// Why a tree cannot be held, or let go.
#[derive(Debug, thiserror::Error)]
pub enum FenceError {
    /// Neither kind of freezer can be used here.
    #[error(
        "no freezer cgroup can be used here: {0}. Without one a source whose CRIU dies at the hand-over would run on beside the copy. Mount cgroup2, or cgroup v1's freezer, writable, and run crxfer as root where the tree's cgroup can be seen"
    )]
    None(String),
    /// The id cannot be a part of a cgroup's name.
    #[error("{0:?} cannot be a part of a cgroup's name")]
    BadId(String),
    /// There is nothing to hold.
    #[error("no process of the tree is left")]
    Gone,
    /// A file of a cgroup does not do what it should.
    #[error("cannot {action} ({}): {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The freezer does not get hold of all tasks.
    #[error(
        "process {pid} does not stand still in {} within {} s: it is {what}",
        cgroup.display(), STILL_WITHIN.as_secs()
    )]
    Moving {
        /// One of those that move.
        pid: u32,
        /// Its state.
        what: String,
        /// The fence.
        cgroup: PathBuf,
    },
    /// The tree runs, but some of it could not be put back.
    #[error(
        "the tree runs, but processes {pids:?} stay in the cgroup {} ({why}). Move them by hand if their cgroup matters, then remove it",
        cgroup.display()
    )]
    Inside {
        /// The fence.
        cgroup: PathBuf,
        /// Those in it.
        pids: Vec<u32>,
        /// The kernel's last answer.
        why: String,
    },
    /// Killed processes are still there.
    #[error(
        "processes {pids:?} were killed {} s ago and are still there: they wait in the kernel, perhaps for a device or a file server",
        GONE_WITHIN.as_secs()
    )]
    Undead {
        /// Those.
        pids: Vec<u32>,
    },
    /// A process could not be killed; the tree was not let go.
    #[error("cannot kill process {pid}: {source}. The tree is still held")]
    Kill {
        /// Which.
        pid: u32,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Where a process was before it was put behind the fence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The process.
    pub process: Process,
    /// Directory of its cgroup.
    pub cgroup: PathBuf,
}

/// How one tree is held. Everything that is needed to open it again, for the journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fence {
    /// The cgroup that is frozen.
    pub cgroup: PathBuf,
    /// Which freezer that is.
    pub version: Freezer,
    /// The cgroup is made for this, and removed afterwards; otherwise the tree has it for itself.
    pub made: bool,
    /// Where the processes are put back to; empty where none is moved.
    pub origins: Vec<Origin>,
}

impl Fence {
    /// Finds the freezer that fits (v2 before v1) and how the fence for the migration `id` would be made. Touches nothing.
    pub fn plan(tree: &Tree, id: &str) -> Result<Self, FenceError> {
        let mut reasons = Vec::new();
        for version in [Freezer::V2, Freezer::V1] {
            match Self::plan_with(version, tree, id) {
                Err(FenceError::None(reason)) => reasons.push(reason),
                result => return result,
            }
        }
        Err(FenceError::None(reasons.join("; ")))
    }

    /// As [`Fence::plan`], with this freezer only.
    pub fn plan_with(version: Freezer, tree: &Tree, id: &str) -> Result<Self, FenceError> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        if id.is_empty() || id.len() > MOST_ID_BYTES || !id.bytes().all(allowed) {
            return Err(FenceError::BadId(id.to_owned()));
        }
        let left = tree.left();
        if left.is_empty() {
            return Err(FenceError::Gone);
        }
        plan(version, &left, id).map_err(|why| FenceError::None(format!("{version}: {why}")))
    }

    /// Whether a fence can be made for the tree: for checks before a migration.
    pub fn is_possible(tree: &Tree) -> Result<(), FenceError> {
        Self::plan(tree, "preflight").map(|_| ())
    }

    /// Puts the tree behind it and freezes it; returns when all its tasks stand still. To be
    /// repeated without harm. After an error the tree may be half behind it: open it.
    pub fn close(&self, tree: &Tree) -> Result<(), FenceError> {
        let left = tree.left();
        if left.is_empty() {
            return Err(FenceError::Gone);
        }
        if self.made
            && let Err(source) = std::fs::create_dir(&self.cgroup)
            && source.kind() != io::ErrorKind::AlreadyExists
        {
            return Err(self.error("make a cgroup", source));
        }
        self.gather(&left)?;
        self.set(true)?;
        let mut result = Ok(false);
        let frozen = within(STILL_WITHIN, || {
            result = self.version.is_frozen(&self.cgroup);
            !matches!(result, Ok(false))
        });
        result.map_err(|source| self.error("read the state of a cgroup", source))?;
        if frozen { Ok(()) } else { Err(self.moving()) }
    }

    fn gather(&self, left: &[Process]) -> Result<(), FenceError> {
        let inside = cgroup::members(&self.cgroup);
        let inside =
            inside.map_err(|source| self.error("list the processes of a cgroup", source))?;
        for process in left {
            if !inside.contains(&process.pid) && process.is_there() {
                let put = cgroup::put(process.pid, &self.cgroup);
                put.map_err(|source| self.error("put a process into a cgroup", source))?;
            }
        }
        Ok(())
    }

    /// Lets the tree run again, puts its processes back where they were, and removes the cgroup. To
    /// be repeated without harm, also where it was never closed.
    pub fn open(&self, tree: &Tree) -> Result<(), FenceError> {
        if tree.boot != boot_id() {
            return Ok(());
        }
        match self.set(false) {
            Err(FenceError::Io { source, .. }) if cgroup::is_gone(&source) => return Ok(()),
            result => result?,
        }
        if self.made { self.dissolve() } else { Ok(()) }
    }

    /// Ends the tree without letting it run: kills all of its processes, then opens. Returns when
    /// they are gone or zombies. To be repeated without harm.
    pub fn end(&self, tree: &Tree) -> Result<(), FenceError> {
        if tree.boot != boot_id() {
            return Ok(());
        }
        self.kill_all(tree)?;
        // v1: they end now.
        match self.set(false) {
            Err(FenceError::Io { source, .. }) if cgroup::is_gone(&source) => {}
            result => result?,
        }
        let mut killed = Ok(());
        let gone = within(GONE_WITHIN, || {
            if self.victims(tree).is_empty() {
                return true;
            }
            // What was forked in the moment before the freezer took hold.
            killed = self.kill_all(tree);
            killed.is_err()
        });
        killed?;
        if !gone {
            let left = self.victims(tree);
            let pids = left.iter().map(|process| process.pid).collect();
            return Err(FenceError::Undead { pids });
        }
        if self.made { self.dissolve() } else { Ok(()) }
    }

    fn kill_all(&self, tree: &Tree) -> Result<(), FenceError> {
        for process in self.victims(tree) {
            let killed = process.kill();
            killed.map_err(|source| FenceError::Kill {
                pid: process.pid,
                source,
            })?;
        }
        Ok(())
    }

    /// What of the tree is there: the listed processes, and those in the fence that they forked.
    fn victims(&self, tree: &Tree) -> Vec<Process> {
        let mut found = tree.left();
        for pid in cgroup::members(&self.cgroup).unwrap_or_default() {
            let known = found.iter().any(|process| process.pid == pid);
            // In a cgroup that was there before, strangers may have come (`docker exec`).
            if known || pid == std::process::id() || !(self.made || descends(pid, &found)) {
                continue;
            }
            found.extend(Process::of(pid));
        }
        found
    }

    /// Puts everything back and removes the cgroup.
    fn dissolve(&self) -> Result<(), FenceError> {
        let (mut pids, mut why) = (Vec::new(), String::new());
        let empty = within(LEFT_WITHIN, || {
            pids = cgroup::members(&self.cgroup).unwrap_or_default();
            for &pid in &pids {
                if let Err(error) = self.put_back(pid) {
                    why = error.to_string();
                }
            }
            match std::fs::remove_dir(&self.cgroup) {
                Ok(()) => true,
                Err(error) if cgroup::is_gone(&error) => true,
                Err(error) => {
                    if pids.is_empty() {
                        why = error.to_string();
                    }
                    false
                }
            }
        });
        if empty {
            return Ok(());
        }
        Err(FenceError::Inside {
            cgroup: self.cgroup.clone(),
            pids,
            why,
        })
    }

    /// To where the process was, or the nearest that is left of that.
    fn put_back(&self, pid: u32) -> io::Result<()> {
        let home = self.home(pid);
        let mut result = Ok(());
        for directory in home.ancestors() {
            match cgroup::put(pid, directory) {
                Ok(_) => return Ok(()),
                // Above the mount: the error before says more.
                Err(error) if cgroup::is_gone(&error) && directory.exists() => break,
                Err(error) => result = Err(error),
            }
        }
        result
    }

    fn home(&self, pid: u32) -> &Path {
        let mut at = Process::of(pid);
        for _ in 0..64 {
            let Some(process) = at else { break };
            let origin = self.origins.iter().find(|origin| origin.process == process);
            if let Some(origin) = origin {
                return &origin.cgroup;
            }
            // Forked since: with its parent.
            at = Stat::of(process.pid).and_then(|stat| Process::of(stat.parent));
        }
        let first = self.origins.first().map(|origin| origin.cgroup.as_path());
        first.or(self.cgroup.parent()).unwrap_or(&self.cgroup)
    }

    fn set(&self, frozen: bool) -> Result<(), FenceError> {
        let action = if frozen {
            "freeze a cgroup"
        } else {
            "thaw a cgroup"
        };
        let set = self.version.set(&self.cgroup, frozen);
        set.map_err(|source| self.error(action, source))
    }

    fn error(&self, action: &'static str, source: io::Error) -> FenceError {
        FenceError::Io {
            action,
            path: self.cgroup.clone(),
            source,
        }
    }

    fn moving(&self) -> FenceError {
        let pids = cgroup::members(&self.cgroup).unwrap_or_default();
        let found = pids.iter().find_map(|&pid| Some((pid, movement(pid)?)));
        let (pid, what) = found.unwrap_or_else(|| {
            let first = pids.first().copied().unwrap_or(0);
            (first, "not shown as running".to_owned())
        });
        FenceError::Moving {
            pid,
            what,
            cgroup: self.cgroup.clone(),
        }
    }
}

fn plan(version: Freezer, left: &[Process], id: &str) -> Result<Fence, String> {
    let hierarchy = Hierarchy::find(version).ok_or("none with a freezer is mounted")?;
    let mut origins = Vec::new();
    for &process in left {
        match hierarchy.cgroup_of(process.pid) {
            Ok(cgroup) => origins.push(Origin { process, cgroup }),
            Err(_) if !process.is_there() => {}
            Err(error) => return Err(format!("process {}: {error}", process.pid)),
        }
    }
    let directories = origins.iter().map(|origin| origin.cgroup.as_path());
    let mut base = cgroup::common(directories).ok_or("no process of the tree is left")?;
    let is_domain = |path: &Path| version == Freezer::V1 || cgroup::kind(path) == "domain";
    let threaded = origins.iter().find(|origin| !is_domain(&origin.cgroup));
    while threaded.is_some() && cgroup::kind(&base) == "threaded" && base.pop() {}

    if is_for_itself(version, &base, left) {
        return Ok(Fence {
            cgroup: base,
            version,
            made: false,
            origins: Vec::new(),
        });
    }
    if let Some(origin) = threaded {
        return Err(format!(
            "threads of process {} are in cgroups of their own below {}, from where they cannot be moved, and others are there too",
            origin.process.pid,
            base.display()
        ));
    }
    check_new(version, &base)?;
    Ok(Fence {
        cgroup: base.join(format!("crxfer-{id}")),
        version,
        made: true,
        origins,
    })
}

/// Whether the tree can be frozen where it is: nobody else is there, and nobody has frozen it yet.
fn is_for_itself(version: Freezer, base: &Path, left: &[Process]) -> bool {
    let own = |pid: &u32| left.iter().any(|process| process.pid == *pid);
    cgroup::may_write(&base.join(version.switch())).is_ok()
        && cgroup::members(base).is_ok_and(|pids| pids.iter().all(own))
        && version.is_frozen(base).is_ok_and(|frozen| !frozen)
}

/// Whether a cgroup can be made in `base` and processes be moved there.
fn check_new(version: Freezer, base: &Path) -> Result<(), String> {
    for path in [base.to_owned(), base.join("cgroup.procs")] {
        let writable = cgroup::may_write(&path);
        writable.map_err(|error| format!("{} cannot be written: {error}", path.display()))?;
    }
    if version == Freezer::V2 && !can_freeze(base) {
        return Err("this kernel has no cgroup.freeze (Linux 5.2 and later have)".to_owned());
    }
    Ok(())
}

// The root has no such file: its children have, and without any, the kernel's version must do.
fn can_freeze(base: &Path) -> bool {
    let children = std::fs::read_dir(base).into_iter().flatten().flatten();
    let mut children = children
        .map(|entry| entry.path())
        .filter(|path| path.is_dir());
    let here = std::iter::once(base.to_owned()).chain(children.next());
    let mut here = here.map(|path| path.join(Freezer::V2.switch()).exists());
    here.any(|exists| exists) || kernel_is_new()
}

fn kernel_is_new() -> bool {
    let system = rustix::system::uname();
    let release = system.release().to_string_lossy();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || numbers.next()?.parse::<u32>().ok();
    number()
        .zip(number())
        .is_some_and(|version| version >= (5, 2))
}

fn descends(pid: u32, from: &[Process]) -> bool {
    let mut at = pid;
    for _ in 0..64 {
        let Some(stat) = Stat::of(at) else {
            return false;
        };
        if from.iter().any(|process| process.pid == stat.parent) {
            return true;
        }
        at = stat.parent;
    }
    false
}

/// How a task of the process moves, where one does: what the kernel shows of it.
fn movement(pid: u32) -> Option<String> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    for thread in threads.flatten() {
        let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        let state = Stat::parse(&stat)?.state;
        let place = std::fs::read_to_string(thread.path().join("wchan")).unwrap_or_default();
        let held = place.contains("refrigerator") || place.contains("freezer_trap");
        if matches!(state, 'R' | 'D') && !held {
            let thread = thread.file_name();
            let what = if state == 'R' {
                "running"
            } else {
                "waiting in the kernel"
            };
            return Some(format!(
                "{what} (thread {}, {place})",
                thread.to_string_lossy()
            ));
        }
    }
    None
}

#[cfg(test)]
mod tests;
