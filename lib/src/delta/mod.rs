//! What a destination lacks: the manifest of one set, the recipe by which its files are built, and
//! how blocks are packed for the wire. Reads no files and no clock.

pub mod codec;
mod manifest;
mod recipe;

pub use manifest::{
    BadName, FileMeta, FileName, Manifest, OPAQUE_BLOCK, ParentRef, SEGMENT_BYTES, SetName,
};
pub use recipe::{BlockRef, FirstSeen, Place, Recipe, RecipeError};
