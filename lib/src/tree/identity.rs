//! Processes that are told from others with the same pids.

use serde::{Deserialize, Serialize};

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
        (!matches!(stat.state, 'Z' | 'X')).then_some(Self {
            pid,
            started: stat.started,
        })
    }

    /// Whether it is still there, and no zombie.
    pub fn is_there(&self) -> bool {
        Self::of(self.pid) == Some(*self)
    }
}

impl Tree {
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
