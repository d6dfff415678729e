//! Pages that were here before: a stored set that what arrives builds on.

use std::path::PathBuf;

use crate::digest::Digest;
use crate::image::PagemapName;

/// The pages of a stored set and of those that it builds on.
#[derive(Clone, Debug, Default)]
pub struct HeldPages {
    /// Directories of the chain, the newest first.
    pub directories: Vec<PathBuf>,
    /// What the newest one has, in ascending order of name.
    pub memories: Vec<HeldMemory>,
}

/// The pages of one memory.
#[derive(Clone, Debug)]
pub struct HeldMemory {
    /// Which.
    pub name: PagemapName,
    /// The number of its pages file in each directory of the chain that has one.
    pub pages_ids: Vec<u32>,
    /// Its pages, in ascending order.
    pub runs: Vec<HeldPlaces>,
}

impl HeldMemory {
    /// Nothing of it was here.
    pub(super) fn none(name: PagemapName) -> Self {
        Self {
            name,
            pages_ids: Vec::new(),
            runs: Vec::new(),
        }
    }
}

/// Pages that follow one another in memory and in a file.
#[derive(Clone, Debug)]
pub struct HeldPlaces {
    /// Number of the first page.
    pub first: u64,
    /// In which directory of the chain.
    pub level: usize,
    /// Index of the first page in its pages file.
    pub index: u32,
    /// Of each page.
    pub digests: Vec<Digest>,
}

/// A dump without files that has arrived, in the directory that it was to come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DumpedPages {
    /// Its root digest, which is right.
    pub root: Digest,
    /// Pages of the dump.
    pub pages: u64,
    /// Of these, pages in its own files.
    pub fresh_pages: u64,
    /// Some of its pages are left to what was held.
    pub needs_held: bool,
    /// Its pages files, each with the digests of its pages.
    pub files: Vec<(String, Vec<Digest>)>,
}
