//! Whether a migration can work, found out before anything is touched.

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

#[cfg(any(test, feature = "testing"))]
pub use check::sample_checks;
pub use check::{Check, Outcome, decode_checks, encode_checks, may_begin};
pub use destination::check_destination;
#[cfg(any(test, feature = "testing"))]
pub use facts::sample;
pub use facts::{CriuVersion, Facts, File, FormatError, Host, Socket, SocketKind, Tree, limits};
pub use found::Place;
pub use gather::{PreflightError, gather};
pub use source::check_source;
pub use survey::{Choices, Deleted, Process, Supervisor, Survey};
