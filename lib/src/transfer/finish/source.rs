//! On the source.

use super::{FinishError, FinishOptions};
use crate::handover::{Journal, Lease, SourceState};

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceOutcome {
    /// The tree runs here; the destination knows (`told`), or could not be reached yet.
    Kept {
        /// The journal is over.
        told: bool,
        /// What was healed and what an operator should know.
        notes: Vec<String>,
    },
    /// The workload runs at the destination; nothing is left here.
    Moved {
        /// Root process there; 0 where that is not known any more.
        pid: u32,
        /// What an operator should know.
        notes: Vec<String>,
    },
    /// The tree is held frozen, complete; the destination could not be reached, or could not say.
    Held {
        /// Why.
        reason: String,
    },
    /// Only an operator can decide.
    Undecided {
        /// Why, and what to do.
        reason: String,
    },
}

/// Does what the journal, the operator's decision in it and the destination's answer ask for.
pub async fn finish_source(
    _journal: &Journal<SourceState>,
    _lease: &Lease,
    _options: &FinishOptions,
) -> Result<SourceOutcome, FinishError> {
    Ok(SourceOutcome::Undecided {
        reason: "not yet".to_owned(),
    })
}
