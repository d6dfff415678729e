//! What the directory holds of one peer: the blocks that it need not send again.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use super::error::{StoreError, Tried};
use super::places::remove_tree;
use super::{Index, Store};
use crate::delta::{BlockRef, FileMeta, FileName, OPAQUE_BLOCK, Place};
use crate::digest::{Digest, hash_blocks, tree};
use crate::page::PageSize;
use crate::wire::BlockId;

/// Sets that one transfer searches, the newest first. Each costs a look-up per unknown page.
const SEARCHED: usize = 64;

/// One set, or what an unfinished transfer left.
#[derive(Debug)]
pub struct HeldSet {
    /// Number of its record; 0 for an unfinished transfer.
    pub id: u64,
    /// The directory with its files.
    pub directory: PathBuf,
    /// Its blocks.
    pub index: Index,
    segments: HashMap<Digest, (u32, u64)>,
}

/// The sets of one peer that one transfer reads from. They are not removed while this lives.
#[derive(Debug)]
pub struct Held {
    store: Store,
    sets: Vec<HeldSet>,
}

impl Store {
    /// Opens what is held of `peer`: the newest sets, and unfinished transfers.
    pub fn held_of(&self, peer: &[u8; 32]) -> Result<Held, StoreError> {
        let _lock = self.lock()?;
        let mut held = Held {
            store: self.clone(),
            sets: Vec::new(),
        };
        for (place, about) in self.partials(peer)? {
            let Ok(page_size) = PageSize::new(about.page_size) else {
                continue;
            };
            match open_partial(&place, page_size) {
                Ok(index) => held.push(0, place.join("files"), index),
                Err(error) => tracing::warn!("{error}; what is in it will be sent again"),
            }
        }
        for record in self
            .records()?
            .into_iter()
            .rev()
            .filter(|record| record.peer == *peer)
        {
            if held.sets.len() >= SEARCHED {
                break;
            }
            let Some(directory) = self.directory_of(&record) else {
                continue;
            };
            match self.index(record.id) {
                Ok(index) => held.push(record.id, directory, index),
                Err(error) => tracing::warn!("{error}; its set saves nothing"),
            }
        }
        Ok(held)
    }

    /// A file at `path` of the set number `id` (0: of an unfinished transfer) no longer has its
    /// bytes: nothing is taken from there any more.
    pub fn distrust(&self, id: u64, path: &Path) {
        if id != 0 {
            let _ = fs::remove_file(self.set_path(id).join("index"));
            return;
        }
        let partials = self.state_path("partial");
        if let Some(place) = path
            .ancestors()
            .find(|place| place.parent() == Some(&partials))
        {
            let _ = remove_tree(place);
        }
    }
}

impl Store {
    // By which a set, or an unfinished transfer (number 0), is known to be in use.
    fn place_in_use(&self, id: u64, directory: &Path) -> PathBuf {
        match id {
            0 => directory.parent().unwrap_or(directory).to_owned(),
            _ => self.set_path(id),
        }
    }
}

impl Held {
    /// Whether there is nothing to find.
    pub fn is_empty(&self) -> bool {
        self.sets.is_empty()
    }

    /// Set number `store`.
    pub fn set(&self, store: u16) -> &HeldSet {
        &self.sets[usize::from(store)]
    }

    /// The set with the record number `id`.
    pub fn set_with_id(&self, id: u64) -> Option<(u16, &HeldSet)> {
        let found = self.sets.iter().position(|set| set.id == id && id != 0)?;
        Some((u16::try_from(found).ok()?, &self.sets[found]))
    }

    /// The block with the id `id`, wherever it is.
    pub fn find(&self, id: BlockId) -> Option<(Digest, Place)> {
        (0u16..).zip(&self.sets).find_map(|(store, set)| {
            set.index
                .find(id)
                .map(|(digest, at)| (digest, Place::Held { store, at }))
        })
    }

    /// The blocks of the segment with the digest `digest`.
    pub fn find_segment(&self, digest: &Digest) -> Option<Vec<(Digest, Place)>> {
        (0u16..).zip(&self.sets).find_map(|(store, set)| {
            let &(file, segment) = set.segments.get(digest)?;
            let blocks = set.index.file(file).segment_range(segment);
            let place = |block| {
                let at = BlockRef { file, block };
                (set.index.digest(at), Place::Held { store, at })
            };
            Some(blocks.map(place).collect())
        })
    }

    fn push(&mut self, id: u64, directory: PathBuf, index: Index) {
        let segments = segments_of(&index);
        let place = self.store.place_in_use(id, &directory);
        let mut in_use = self
            .store
            .in_use
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *in_use.entry(place).or_default() += 1;
        drop(in_use);
        self.sets.push(HeldSet {
            id,
            directory,
            index,
            segments,
        });
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut in_use = self
            .store
            .in_use
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for set in &self.sets {
            let place = self.store.place_in_use(set.id, &set.directory);
            if let Some(count) = in_use.get_mut(&place) {
                *count -= 1;
                if *count == 0 {
                    in_use.remove(&place);
                }
            }
        }
    }
}

fn segments_of(index: &Index) -> HashMap<Digest, (u32, u64)> {
    let mut segments = HashMap::new();
    for (file, meta) in (0u32..).zip(index.files()) {
        for segment in 0..meta.segments() {
            let digests: Vec<_> = meta
                .segment_range(segment)
                .map(|block| index.digest(BlockRef { file, block }))
                .collect();
            segments.insert(tree::segment_digest(&digests), (file, segment));
        }
    }
    segments
}

// An unfinished transfer keeps no journal: its blocks are hashed again, and those that were never
// written or only in part are simply other blocks.
fn open_partial(place: &Path, page_size: PageSize) -> Result<Index, StoreError> {
    let path = place.join("index");
    if path.exists() {
        return Index::open(&path).tried("open", &path);
    }
    let directory = place.join("files");
    let files = list_files(&directory, page_size)?;
    let mut digests = Vec::new();
    for file in &files {
        let path = directory.join(file.name.as_str());
        hash_file(&path, file, &mut digests).tried("read", &path)?;
    }
    let new = place.join("index.new");
    Index::write(&new, &files, digests.into_iter(), false).tried("write", &new)?;
    fs::rename(&new, &path).tried("rename", &new)?;
    Index::open(&path).tried("open", &path)
}

/// The files of a directory of ours, with the block lengths that a transfer would give them.
pub(super) fn list_files(
    directory: &Path,
    page_size: PageSize,
) -> Result<Vec<FileMeta>, StoreError> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).tried("list", directory)? {
        let entry = entry.tried("list", directory)?;
        let meta = entry.metadata().tried("examine", &entry.path())?;
        let name = entry
            .file_name()
            .into_string()
            .ok()
            .and_then(|name| FileName::new(name).ok());
        if let (true, Some(name)) = (meta.is_file(), name) {
            files.push(FileMeta::new(name, 0o644, meta.len(), page_size));
        }
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    debug_assert!(
        files
            .iter()
            .all(|file| file.block_len >= OPAQUE_BLOCK || file.is_pages())
    );
    Ok(files)
}

fn hash_file(path: &Path, meta: &FileMeta, digests: &mut Vec<Digest>) -> io::Result<()> {
    let file = File::open(path)?;
    for segment in 0..meta.segments() {
        let range = meta.bytes_of(&meta.segment_range(segment));
        let mut buffer =
            vec![0; usize::try_from(range.end - range.start).map_err(io::Error::other)?];
        file.read_exact_at(&mut buffer, range.start)?;
        hash_blocks(&buffer, meta.block_len as usize, digests);
    }
    Ok(())
}
