//! The memory of a running process tree, read from outside: what CRIU's final dump would hold.
//!
//! ```text
//!  tree(root) ─▶ tasks ─▶ maps ─▶ private pages: PAGEMAP_SCAN or pagemap ─▶ /proc/PID/mem ──┐
//!                          │                                                                ├─▶ sink
//!                          └────▶ segments, memfds, once each: SEEK_DATA ─▶ map_files, fd ──┘
//! ```
//!
//! Nobody is stopped, nothing is written into the tree, no hole of a shared segment is filled.
//! The tree goes on while it is read, so a page may be torn, and mappings and tasks come and go:
//! that is harmless, because the final dump is compared by content with what was read here.
//! A pass therefore may miss a page, or deliver one too much, but never fails for such a reason.
//!
//! What is left to the dump: pages of ordinary files (not dumped at all), the kernel's own
//! mappings (vdso and the like), asynchronous I/O rings, System V segments that nobody has
//! attached, memfds on their way through a socket, and whatever does not answer within
//! [`ReaderOptions::read_limit`].

mod blocks;
mod error;
mod maps;
mod pace;
mod proc;
mod reader;
mod scan;
mod segments;
mod tree;

pub use error::LiveError;
pub use reader::{Chunk, LiveReader, Pass, ReaderOptions, Skipped};
pub use scan::Method;
pub use tree::{Task, tree};
