//! CRIU image directories as files.
//!
//! Reads and writes what a transfer must understand, the memory, and treats the rest as opaque
//! bytes. Nothing here speaks to a socket or decides what to send.

pub mod chain;
pub mod complete;
pub mod diff;
pub mod dir;
mod error;
pub mod flatten;
pub mod framing;
pub mod inspect;
pub mod inventory;
pub mod name;
pub mod pagemap;
pub mod pages;
mod records;
pub mod resolve;
pub mod stats;
pub mod tree;

pub use chain::{Chain, ChainOptions, Level};
pub use complete::{Completeness, LevelFacts, Problem, SetFacts};
pub use diff::{MemoryDiff, diff};
pub use dir::{DirId, FileInfo, FileStat, ImageDir, Listing, ParentLink, ParentLinks};
pub use error::{ImageError, RunFault};
pub use flatten::{Flattened, flatten};
pub use inspect::{CriuVersion, MemorySummary, Summary, inspect};
pub use inventory::Inventory;
pub use name::{FileKind, PagemapName, pages_file_name};
pub use pagemap::{PageFlags, PageRun, Pagemap};
pub use pages::PagesReader;
pub use resolve::{ResolveError, ResolvedRun, Source, resolve};
pub use stats::DumpStats;
pub use tree::{ProcessTree, Task};
