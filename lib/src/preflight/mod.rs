//! Whether a migration can work, found out before anything is touched.
//!
//! ```text
//!  source                                         destination
//!  gather ─▶ Survey ─▶ check_source
//!               └─ Facts ─── encode ═══▶ decode ─▶ check_destination
//!                          decode_checks ◀═══ encode_checks ─┘
//! ```
//!
//! [`gather`] looks at the tree and its host, and only reads. [`check_source`] judges what the source
//! can see alone; [`Facts`] go to the destination, [`check_destination`] looks there for what they
//! name, and its list of [`Check`]s travels back. Where [`may_begin`] says no, nothing was touched,
//! and the checks say what to do.
//!
//! A check fails only where CRIU would fail, or where the workload could be lost or run twice. What is
//! a risk rather than certain is a failure that `--force` turns into a warning; what crxfer cannot see
//! well enough is a warning. Between the checks and the freeze things change, so passing is no
//! promise: CRIU is the judge, and until the commit its failure costs nothing but time.
//!
//! What cannot be read or understood is left out. The facts are of a host that is trusted to restore
//! processes here; their size is bounded all the same.

mod check;
mod cpu;
mod destination;
mod facts;
mod found;
mod gather;
mod memory;
mod procfs;
mod source;
mod survey;
mod unix;

#[cfg(any(test, feature = "testing"))]
pub use check::sample_checks;
pub use check::{Check, Outcome, decode_checks, encode_checks, may_begin};
pub use destination::check_destination;
#[cfg(any(test, feature = "testing"))]
pub use facts::sample;
pub use facts::{CriuVersion, Facts, File, FormatError, Host, Socket, SocketKind, Tree, limits};
pub use found::Place;
pub use gather::{PreflightError, gather};
#[cfg(feature = "net")]
pub(crate) use memory::memory_available;
pub(crate) use procfs::Stat;
pub use source::check_source;
pub use survey::{Choices, Deleted, Process, Supervisor, Survey};
pub use unix::UnixPeer;
