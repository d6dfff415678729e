//! CRIU image directories as files.
//!
//! Reads and writes what a transfer must understand, the memory, and treats the rest as opaque
//! bytes. Nothing here speaks to a socket or decides what to send.

mod error;
pub mod framing;
pub mod name;
pub mod pagemap;
pub mod resolve;

pub use error::{ImageError, RunFault};
pub use name::{FileKind, PagemapName, pages_file_name};
pub use pagemap::{PageFlags, PageRun, Pagemap};
pub use resolve::{ResolveError, ResolvedRun, Source, resolve};
