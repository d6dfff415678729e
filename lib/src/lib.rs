//! crxfer moves checkpoint state from a source host to a destination host.

pub mod digest;
pub mod identity;
pub mod page;
mod text;
pub mod ticket;
#[cfg(feature = "net")]
pub mod transport;
