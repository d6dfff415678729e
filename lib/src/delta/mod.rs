//! What a destination lacks: the manifest of one set, the recipe by which its files are built, and
//! how blocks are packed for the wire. Reads no files and no clock.

pub mod codec;
mod dump;
mod known;
mod manifest;
mod outgoing;
mod recipe;

pub use dump::{DUMP_CONTEXT, DumpedMemory, PAGES_CONTEXT, dump_root, file_digest};
pub(crate) use known::segment_pages;
pub use known::{Changes, Compared, Known};
pub use manifest::{
    BadName, FileMeta, FileName, Manifest, OPAQUE_BLOCK, ParentRef, SEGMENT_BYTES, SetName,
};
pub use outgoing::{Missing, Outgoing, OutgoingFile, Record};
pub use recipe::{BlockRef, FirstSeen, Place, Recipe, RecipeError};
