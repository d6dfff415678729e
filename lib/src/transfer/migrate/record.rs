//! The journal of a migration under way, as its threads share it.

use std::sync::{Mutex, PoisonError};

use crate::handover::journal::SourceAbout;
use crate::handover::{Journal, JournalError, Lease, SourceState};
use crate::tree::{FenceError, Process, Tree};

/// Why a tree could not be put behind its fence.
#[derive(Debug, thiserror::Error)]
pub(super) enum FencingError {
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Fence(#[from] FenceError),
    /// It may have run on after it was dumped.
    #[error("CRIU died before the workload was fenced: what was sent may be out of date")]
    LetGo,
}

/// Journal and header of one migration.
#[derive(Debug)]
pub(super) struct Records {
    journal: Journal<SourceState>,
    lease: Lease,
    about: Mutex<SourceAbout>,
}

impl Records {
    pub(super) fn new(journal: Journal<SourceState>, lease: Lease, about: SourceAbout) -> Self {
        Self {
            journal,
            lease,
            about: Mutex::new(about),
        }
    }

    pub(super) fn journal(&self) -> &Journal<SourceState> {
        &self.journal
    }

    pub(super) fn lease(&self) -> &Lease {
        &self.lease
    }

    pub(super) fn into_journal(self) -> (Journal<SourceState>, Lease) {
        (self.journal, self.lease)
    }

    pub(super) fn about(&self) -> SourceAbout {
        let about = self.about.lock().unwrap_or_else(PoisonError::into_inner);
        about.clone()
    }

    pub(super) fn advance(&self, next: SourceState, note: &str) -> Result<(), JournalError> {
        self.journal.advance(next, note)
    }

    fn learn(&self, change: impl FnOnce(&mut SourceAbout)) -> Result<(), JournalError> {
        let about = {
            let mut about = self.about.lock().unwrap_or_else(PoisonError::into_inner);
            change(&mut about);
            about.clone()
        };
        self.journal.note(|known| *known = about)
    }

    /// The hook that ends a migration has run.
    pub(super) fn hooked(&self) -> Result<(), JournalError> {
        self.learn(|about| about.hooked = true)
    }

    /// Which process of CRIU will dump.
    pub(super) fn dumps_by(&self, criu: Option<Process>) -> Result<(), JournalError> {
        self.learn(|about| about.criu = criu)
    }

    /// Which command will start that.
    pub(super) fn dumps_with(&self, command: Process) -> Result<(), JournalError> {
        self.learn(|about| about.command = Some(command))
    }

    /// Called by CRIU's thread, right before CRIU freezes the tree below `root`.
    pub(super) fn freezing(&self, root: u32) -> Result<(), JournalError> {
        self.look_again(root, None)?;
        self.advance(SourceState::Freezing, "")
    }

    /// Puts the tree, which CRIU holds, behind its fence. Blocks until it stands still.
    pub(super) fn fence(&self, root: u32, run_id: Option<String>) -> Result<(), FencingError> {
        self.look_again(root, run_id)?;
        let about = self.about();
        if let Some(fence) = &about.fence {
            self.advance(SourceState::Fencing, "")?;
            fence.close(&about.tree)?;
        }
        // Only now: what CRIU holds behind a closed fence has not run since it was dumped.
        match still_held(&about) {
            true => Ok(()),
            false => Err(FencingError::LetGo),
        }
    }

    // The tree of the survey may have more processes by now.
    fn look_again(&self, root: u32, run_id: Option<String>) -> Result<(), JournalError> {
        let tree = Tree::below(root);
        self.learn(|about| {
            // Where it cannot be listed, what is known counts.
            if let Ok(tree) = tree {
                about.tree = tree;
            }
            about.run_id = run_id.or(about.run_id.take());
        })
    }
}

/// Whether CRIU has every process of the tree.
fn still_held(about: &SourceAbout) -> bool {
    let Some(criu) = about.criu else {
        // Nobody can say; it was not found when it was started.
        return false;
    };
    let held = |process: &Process| {
        let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid));
        let status = status.unwrap_or_default();
        let tracer = status
            .lines()
            .find_map(|line| line.strip_prefix("TracerPid:"));
        tracer.and_then(|pid| pid.trim().parse().ok()) == Some(criu.pid)
    };
    // Zombies of the tree are nobody's to hold.
    criu.is_there() && about.tree.left().iter().all(held)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::handover::OnPartition;

    #[test]
    fn a_tree_without_its_tracer_may_have_run() {
        let mut child = Command::new("sleep").arg("30").spawn().expect("sleep");
        let mut about = SourceAbout {
            name: "sample".to_owned(),
            tree: Tree::of([child.id()]),
            addresses: Vec::new(),
            peer: String::new(),
            identity: "/nonexistent".into(),
            work: "/nonexistent".into(),
            run_id: None,
            foreign_tables: Vec::new(),
            criu: None,
            command: None,
            forget: None,
            fence: None,
            on_partition: OnPartition::Hold,
            partition_wait_ms: 0,
            bound: Vec::new(),
            hook_addresses: Vec::new(),
            hooks: Vec::new(),
            hook_limit_ms: 0,
            hooked: false,
        };
        assert!(!still_held(&about));
        // It is there, and traces nobody.
        about.criu = Process::of(std::process::id());
        assert!(!still_held(&about));
        child.kill().expect("ours");
        child.wait().expect("ours");
        assert!(still_held(&about), "nothing is left to be held");
    }
}
