//! What a destination lacks: the manifest of one set, and the recipe by which its files are built.
//! Reads no files and no clock.

mod manifest;
mod recipe;

pub use manifest::{BadName, FileMeta, FileName, Manifest, OPAQUE_BLOCK, ParentRef, SEGMENT_BYTES, SetName};
pub use recipe::{BlockRef, FirstSeen, Place, Recipe, RecipeError};
