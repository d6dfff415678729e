//! Whether a migration can work, found out before anything is touched.

mod check;
mod facts;

#[cfg(any(test, feature = "testing"))]
pub use check::sample_checks;
pub use check::{Check, Outcome, decode_checks, encode_checks, may_begin};
#[cfg(any(test, feature = "testing"))]
pub use facts::sample;
pub use facts::{CriuVersion, Facts, File, FormatError, Host, Socket, SocketKind, Tree, limits};
