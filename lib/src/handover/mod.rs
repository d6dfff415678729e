//! Whose the workload is, kept where a dead process cannot take it along.
//!
//! Both hosts write a journal: each step that changes who may run the workload is recorded before it
//! is taken. Whoever finds a journal whose writer is gone (the guard, `crxfer recover`, the next
//! receiver) reads there what has to be done, and does it.
//!
//! ```text
//!   source       begun ─ freezing ─ fencing ─ committed ─ moved ─ over
//!                  └────────┴──────────┴─ keeping ─ kept ─ over
//!   destination  receiving ─ complete ─ resuming ─ running ─ over
//!                  └────────────┴─ removing ─ removed ─ over
//! ```
//!
//! An operator's word opens a few more ways, where nobody could know or a copy cannot be built:
//! [`SourceState::may_become`], [`DestinationState::may_become`].
//!
//! - [`state`] says which step may follow which, and what is to be done where a side finds itself
//!   alone or meets the other again. It does no I/O and is what the simulator runs.
//! - [`journal`] keeps the records of one migration on one host.

mod about;
pub mod journal;
pub mod state;

pub use journal::{Journal, JournalError, Lease};
pub use state::{
    Answer, DestinationDuty, DestinationState, Keep, OnPartition, SourceDuty, SourceState, Verdict,
};
