//! The journal of a migration under way, as its threads share it.

use std::sync::{Mutex, PoisonError};

use crate::handover::journal::SourceAbout;
use crate::handover::{Journal, JournalError, Lease, SourceState};
use crate::live;
use crate::tree::{FenceError, Process, Tree};

/// Why a tree could not be put behind its fence.
#[derive(Debug, thiserror::Error)]
pub(super) enum FencingError {
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Fence(#[from] FenceError),
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
        self.journal.note(about)
    }

    /// Which process of CRIU will dump.
    pub(super) fn dumps_by(&self, criu: Option<Process>) -> Result<(), JournalError> {
        self.learn(|about| about.criu = criu)
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
        Ok(())
    }

    // The tree of the survey may have more processes by now.
    fn look_again(&self, root: u32, run_id: Option<String>) -> Result<(), JournalError> {
        let tree = live::tree(root).map(|tasks| Tree::of(tasks.into_iter().map(|it| it.pid)));
        self.learn(|about| {
            // Where it cannot be listed, what is known counts.
            if let Ok(tree) = tree {
                about.tree = tree;
            }
            about.run_id = run_id.or(about.run_id.take());
        })
    }
}
