//! crxfer moves checkpoint state from a source host to a destination host.

pub mod delta;
pub mod digest;
pub mod page;
pub mod session;
pub mod store;
mod sys;
pub mod wire;
