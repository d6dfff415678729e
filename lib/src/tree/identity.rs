//! Processes that are told from others with the same pids.

use std::io;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use crate::live::{self, LiveError};
use crate::preflight::Stat;

/// A process, told from another one that got its pid later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Process {
    /// As this process's pid namespace numbers it.
    pub pid: u32,
    /// When it was started: field 22 of /proc/PID/stat, in clock ticks since boot.
    pub started: u64,
}

/// A process tree at one moment of one boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tree {
    /// Which boot of this host the pids are of.
    pub boot: String,
    /// The root first.
    pub processes: Vec<Process>,
}

/// Names this boot of the host: /proc/sys/kernel/random/boot_id.
pub fn boot_id() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    id.unwrap_or_default().trim().to_owned()
}

impl Process {
    /// The process that has this pid now; `None` where there is none, or it is a zombie.
    pub fn of(pid: u32) -> Option<Self> {
        let stat = Stat::of(pid)?;
        let dead = matches!(stat.state, 'Z' | 'X') && !has_threads(pid)
            || stat.ending && is_waiting_for_its_namespace(pid);
        (!dead).then_some(Self {
            pid,
            started: stat.started,
        })
    }

    /// The process that has this pid now, if only as a zombie.
    pub(crate) fn dead_or_alive(pid: u32) -> Option<Self> {
        let started = Stat::of(pid)?.started;
        Some(Self { pid, started })
    }

    /// Whether it is still there, and no zombie.
    pub fn is_there(&self) -> bool {
        Self::of(self.pid) == Some(*self)
    }

    /// Sends SIGKILL to this process and to none that got its pid since; false where it is gone.
    pub fn kill(&self) -> io::Result<bool> {
        self.signal(Signal::KILL)
    }

    /// The same with any signal.
    pub(crate) fn signal(&self, signal: Signal) -> io::Result<bool> {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else {
            return Ok(false);
        };
        // From here on the descriptor names one process, and the start time says which.
        let sent = pidfd_open(pid, PidfdFlags::empty()).and_then(|process| {
            if !self.is_there() {
                return Err(Errno::SRCH);
            }
            pidfd_send_signal(&process, signal)
        });
        match sent {
            Ok(()) => Ok(true),
            Err(Errno::SRCH) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

// The first process of a pid namespace ends when all others have been waited for. A tracer that sleeps
// does not do so: then it stays, and never runs again.
fn is_waiting_for_its_namespace(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    let ids: Vec<&str> = ids.unwrap_or_default().split_whitespace().collect();
    if ids.len() < 2 || ids.last() != Some(&"1") {
        return false;
    }
    let threads = std::fs::read_dir(format!("/proc/{pid}/task"));
    let mut threads = threads.into_iter().flatten().flatten();
    threads.all(|thread| {
        let stat = std::fs::read_to_string(thread.path().join("stat")).ok();
        let stat = stat.and_then(|text| Stat::parse(&text));
        stat.is_none_or(|stat| stat.ending || matches!(stat.state, 'Z' | 'X'))
    })
}

// A process whose first thread has ended looks like a zombie while the others run. They, too, stay
// as zombies while a tracer sleeps that has not asked how they ended.
fn has_threads(pid: u32) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return false;
    };
    let lives = |stat: Stat| !matches!(stat.state, 'Z' | 'X');
    threads.flatten().any(|thread| {
        let stat = std::fs::read_to_string(thread.path().join("stat"));
        stat.ok()
            .and_then(|text| Stat::parse(&text))
            .is_some_and(lives)
    })
}

impl Tree {
    /// Process `root` and all below it, as they are now; zombies are left out.
    pub fn below(root: u32) -> Result<Self, LiveError> {
        Ok(Self::of(live::tree(root)?.into_iter().map(|task| task.pid)))
    }

    /// The processes with these pids; those that have gone meanwhile are left out.
    pub fn of(pids: impl IntoIterator<Item = u32>) -> Self {
        Self {
            boot: boot_id(),
            processes: pids.into_iter().filter_map(Process::of).collect(),
        }
    }

    /// Those of its processes that are still there.
    pub fn left(&self) -> Vec<Process> {
        if self.boot != boot_id() {
            return Vec::new();
        }
        let there = self.processes.iter().filter(|process| process.is_there());
        there.copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_is_not_taken_for_one_that_had_its_pid() {
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let now = Process::of(child.id()).unwrap();
        let before = Process {
            started: now.started - 1,
            ..now
        };
        assert!(!before.kill().unwrap());
        assert!(now.is_there());
        let mut tree = Tree::of([child.id()]);
        assert_eq!(tree.left(), [now]);
        tree.boot = "another boot".to_owned();
        assert!(tree.left().is_empty());
        assert!(now.kill().unwrap());
        child.wait().unwrap();
        assert!(!now.kill().unwrap());
        assert!(!now.is_there());
    }

    #[test]
    fn zombies_have_gone() {
        let mut child = Command::new("true").spawn().unwrap();
        let gone = super::super::within(std::time::Duration::from_secs(5), || {
            Process::of(child.id()).is_none()
        });
        child.wait().unwrap();
        assert!(gone);
    }
}
