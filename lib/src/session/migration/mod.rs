//! The hand-over of a running process tree, without I/O: both sides as state machines.
//!
//! Pages and files cross on a bulk stream that the drivers own; these machines say what may be done
//! when, and above all who owns the workload. They are driven like the machines of
//! [`session`](super): `handle_*`, then `poll_command` until it is empty, then wait for the next
//! event or `poll_timeout`.
//!
//! ```text
//!  source                                              destination
//!    Hello ───────────────────────────────────────────▶
//!      ◀─────────────────────────────────────── Welcome
//!    Offer ───────────────────────────────────────────▶ preflight
//!      ◀─────────────────────────────────────── Offered
//!    per iteration: Begin, frames …, End ═════════════▶ stores
//!      ◀───────────────────────────────── IterationDone
//!    PrepareFinal ────────────────────────────────────▶ starts CRIU, runs hooks
//!      ◀──────────────────────────────────── FinalReady
//!    [freezes] Begin, frames …, Runs, End ════════════▶ checks, builds the copy
//!      ◀───────────────────────────────────────── Built
//!    Commit ──────────────────────────────────────────▶ lets the copy go
//!      ◀─────────────────────────────────────── Running
//!    [ends the frozen tree]
//!    before Commit at any time: Abort ────────────────▶ removes everything
//!      ◀─────────────────────────────────────── Aborted
//! ```
//!
//! | what has happened | owner | a side that loses the other |
//! |---|---|---|
//! | nothing, before `Built` | source | the source resumes, the destination removes its copy |
//! | `Built` is sent, `Commit` is not | source; in doubt for the destination | the source resumes and tells the destination on another connection; the destination holds its copy |
//! | `Commit` is sent, `Running` has not come | in doubt for the source | the source holds its frozen tree and asks on other connections; a destination without `Commit` holds its copy |
//! | `Running` | destination | the source ends its tree |
//!
//! What is recorded at which of these steps, and how two sides that have lost each other meet again,
//! is in [`handover`](crate::handover).

mod clock;
mod destination;
mod source;
#[cfg(test)]
mod tests;

pub use clock::{ClockOffset, ClockSamples};
pub use destination::{MigrationDestination, MigrationDestinationCommand};
pub use source::{MigrationSource, MigrationSourceCommand};

/// Whose the workload is, as far as one side knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The source's tree may run; a copy must not.
    Source,
    /// The source has let go and not heard that the copy runs: nobody may run until that is known.
    InDoubt,
    /// The copy runs; the source's tree must not.
    Destination,
}
