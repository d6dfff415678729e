//! The fence: a freezer cgroup that holds a tree, whatever becomes of CRIU.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Tree;

/// Why a tree cannot be held, or let go.
#[derive(Debug, thiserror::Error)]
pub enum FenceError {
    /// Neither kind of freezer can be used here.
    #[error("no freezer cgroup can be used here: {0}")]
    None(String),
}

/// How one tree is held. Everything that is needed to open it again, for the journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fence {
    /// The cgroup that is frozen.
    pub cgroup: PathBuf,
}

impl Fence {
    /// Finds the freezer that fits (v2 before v1) and how the fence for the migration `id` would be made. Touches nothing.
    pub fn plan(_tree: &Tree, _id: &str) -> Result<Self, FenceError> {
        Err(FenceError::None("not yet".to_owned()))
    }

    /// Puts the tree behind it and freezes it; returns when all its tasks stand still. To be
    /// repeated without harm.
    pub fn close(&self, _tree: &Tree) -> Result<(), FenceError> {
        Err(FenceError::None("not yet".to_owned()))
    }

    /// Lets the tree run again, puts its processes back where they were, and removes the cgroup. To
    /// be repeated without harm, also where it was never closed.
    pub fn open(&self, _tree: &Tree) -> Result<(), FenceError> {
        Err(FenceError::None("not yet".to_owned()))
    }

    /// Ends the tree without letting it run: kills all of its processes, then opens. Returns when
    /// they are gone or zombies. To be repeated without harm.
    pub fn end(&self, _tree: &Tree) -> Result<(), FenceError> {
        Err(FenceError::None("not yet".to_owned()))
    }
}
