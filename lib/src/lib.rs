//! crxfer moves checkpoint state from a source host to a destination host.

pub mod digest;
pub mod image;
pub mod page;
