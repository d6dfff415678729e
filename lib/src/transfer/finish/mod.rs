//! Finishing a migration whose process is gone, or that has lost its peer: what the guard,
//! `crxfer recover`, and the drivers in doubt have in common.

use std::path::PathBuf;
use std::time::Duration;

use crate::handover::JournalError;
use crate::transport;

mod destination;
mod heard;
mod meet;
mod source;
pub(super) mod tree;

pub(in crate::transfer) use destination::{
    Alive, bring_to_life, clear, record_running, running_pid,
};
pub use destination::{DestinationOutcome, finish_destination};
pub use source::{SourceOutcome, clear_source, finish_source};

/// How to finish.
#[derive(Clone, Debug)]
pub struct FinishOptions {
    /// How long to try to reach the other host.
    pub patience: Duration,
    /// Another place where the destination may be met, before those in the journal.
    pub target: Option<super::Target>,
    /// Settings of the connection.
    pub transport: transport::Options,
    /// Becomes true when the caller wants to go; what is half done is left as the journal says.
    pub stop: tokio::sync::watch::Receiver<bool>,
}

/// Why a migration could not be finished. Its journal stays.
#[derive(Debug, thiserror::Error)]
pub enum FinishError {
    /// The journal cannot be read or written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Something of the tree, the copy or its files stands in the way.
    #[error("{what} ({})", journal.display())]
    Left {
        /// What, and what to do.
        what: String,
        /// The migration's directory.
        journal: PathBuf,
    },
    /// The other host, or CRIU.
    #[error(transparent)]
    Transfer(#[from] super::TransferError),
}

/// A journal's header for tests.
#[cfg(test)]
fn sample_about() -> crate::handover::journal::SourceAbout {
    crate::handover::journal::SourceAbout {
        name: "sample".to_owned(),
        tree: crate::tree::Tree::of([]),
        addresses: Vec::new(),
        peer: String::new(),
        identity: PathBuf::new(),
        work: PathBuf::from("/nonexistent/work"),
        run_id: None,
        foreign_tables: Vec::new(),
        criu: None,
        command: None,
        forget: None,
        fence: None,
        on_partition: crate::handover::OnPartition::Hold,
        partition_wait_ms: 0,
        bound: Vec::new(),
        hook_addresses: Vec::new(),
        hooks: Vec::new(),
        hook_limit_ms: 0,
        hooked: false,
    }
}
