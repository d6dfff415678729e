//! crxfer moves checkpoint state from a source host to a destination host.

pub mod delta;
pub mod digest;
pub mod identity;
pub mod image;
pub mod page;
pub mod session;
pub mod store;
mod sys;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod text;
pub mod ticket;
#[cfg(feature = "net")]
pub mod transfer;
#[cfg(feature = "net")]
pub mod transport;
pub mod wire;
