//! CRIU image directories as files.
//!
//! ```text
//!  3/  inventory.img  pstree.img  core-*.img  …      opaque bytes, but for completeness
//!      pagemap-171.img ── entries ──┐
//!      pages-1.img  ◄── PRESENT ────┤
//!      parent ─► ../2               │
//!  2/  pagemap-171.img  ◄── PARENT ─┘
//!      pages-1.img, parent ─► ../1, …
//! ```
//!
//! - [`ImageDir`] is one directory, [`Chain`] a directory with its ancestors.
//! - [`Pagemap`] is one parsed pagemap; [`resolve()`] says where the bytes of each page are.
//! - [`complete::check`] judges whether CRIU could restore a set; both are pure functions.
//! - [`FlatView`] reads a chain as one directory without a parent, [`flatten()`] writes it.
//! - [`flatten()`], [`inspect()`] and [`diff()`] work on open chains.
//!
//! What a transfer must understand, the memory, is parsed strictly; everything else is carried as
//! opaque bytes. Nothing here speaks to a socket or decides what to send.

pub mod chain;
pub mod complete;
pub mod diff;
pub mod dir;
mod error;
pub mod flat;
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
pub mod walk;

pub use chain::{Chain, ChainOptions, Level};
pub use complete::{Completeness, LevelFacts, Problem, SetFacts};
pub use diff::{MemoryDiff, diff};
pub use dir::{DirId, FileInfo, FileStat, ImageDir, Listing, ParentLink, ParentLinks};
pub use error::{ImageError, RunFault};
pub use flat::{FlatFile, FlatView, Piece};
pub use flatten::{Flattened, flatten};
pub use inspect::{CriuVersion, MemorySummary, Summary, inspect};
pub use inventory::Inventory;
pub use name::{FileKind, PagemapName, pages_file_name};
pub use pagemap::{PageFlags, PageRun, Pagemap};
pub use pages::PagesReader;
pub use resolve::{ResolveError, ResolvedRun, Source, resolve};
pub use stats::DumpStats;
pub use tree::{ProcessTree, Task};
