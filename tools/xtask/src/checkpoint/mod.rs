//! CRIU image directories without CRIU: a generator of checkpoints whose memory is known, and an
//! obvious, slow reader that tells what memory any directory stands for.
//!
//! Neither uses the crxfer library: they are what its results are held against.

mod compare;
mod encode;
mod generate;
mod resolve;

pub(crate) use compare::same_files;
pub(crate) use generate::Synthetic;
pub(crate) use resolve::resolve;
