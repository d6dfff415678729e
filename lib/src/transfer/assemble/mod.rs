//! From blocks that arrived and blocks that were held to an image directory in the asked layout.
//!
//! Files that hold no memory are completed as the source had them. Memory is taken over as it is
//! where the layout allows (faithful, or nothing to build on), and rewritten otherwise: each page
//! is compared by digest with the page at the same address in the set that is built on.

mod base;
mod copy;
mod memory;
mod pages;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

pub(super) use self::base::DEEPEST;
use self::copy::{Located, Origin, Piece, Pieces, copy_pieces};
use super::TransferError;
use super::chain::{StoredChain, read_pagemaps};
use super::files::in_parallel;
use crate::delta::{BlockRef, FileMeta, Place, Recipe};
use crate::digest::{Digest, hash_blocks};
use crate::image::complete::{LevelFacts, SetFacts, check};
use crate::image::walk;
use crate::image::{Completeness, ImageError, Inventory, Pagemap, PagemapName, ProcessTree};
use crate::session::StoreJob;
use crate::store::{Held, Record, Store, StoreError, Tried as _};
use crate::wire::Layout;

/// Largest file that is read whole for its records.
const SMALL_BYTES: u64 = 64 << 20;

/// Sets of more files are synced with their whole file system: a sync of each of 5,000 small files
/// took 16 s on ext4.
const SYNCED_EACH: usize = 256;

/// A set whose files stand complete in the stage.
#[derive(Debug)]
pub(super) struct Assembled {
    /// Its files in order of name.
    pub(super) files: Vec<FileMeta>,
    /// Digests of their blocks.
    pub(super) digests: Vec<FileDigests>,
    /// What it builds on.
    pub(super) base: Option<u64>,
    /// Whether CRIU could restore it.
    pub(super) completeness: Completeness,
    /// The set in state *pages* of which it has its memory.
    pub(super) completes: Option<u64>,
    /// What the operator should know.
    pub(super) note: Option<String>,
}

/// Digests of one file's blocks: 0.8 % of its size, so they are kept once.
#[derive(Debug)]
pub(super) enum FileDigests {
    /// Those of a file of the recipe.
    AsArrived(u32),
    /// Those of a file that was written anew.
    Own(Vec<Digest>),
}

impl Assembled {
    /// Digests of all blocks, in the order of files and blocks.
    pub(super) fn all_digests<'a>(
        &'a self,
        recipe: &'a Recipe,
    ) -> impl Iterator<Item = Digest> + 'a {
        self.files
            .iter()
            .zip(&self.digests)
            .flat_map(move |(meta, digests)| {
                (0..meta.blocks()).map(move |block| match digests {
                    FileDigests::AsArrived(file) => recipe.block(BlockRef { file: *file, block }).0,
                    FileDigests::Own(digests) => memory::digest_at(digests, block),
                })
            })
    }
}

/// Puts one set together in its stage.
#[derive(Debug)]
pub(super) struct Assembler<'a> {
    pub(super) store: &'a Store,
    pub(super) held: &'a Held,
    pub(super) peer: [u8; 32],
    pub(super) job: &'a StoreJob,
    pub(super) layout: Layout,
    /// The staged files.
    pub(super) directory: PathBuf,
    /// The set in state *pages* that what arrived completes.
    pub(super) pages: Option<Record>,
}

impl Assembler<'_> {
    pub(super) fn assemble(&self) -> Result<Assembled, TransferError> {
        let is_memory = |meta: &FileMeta| meta.is_pages();
        self.complete_files(|meta| !is_memory(meta))?;
        if let Some(pages) = &self.pages {
            self.understood()?;
            return self.finished(self.with_pages(pages)?);
        }
        let base = self.parent_id()?;
        let parent = base.map(|id| StoredChain::open(self.store, id)).transpose();
        let both = parent.and_then(|parent| Ok((parent, self.understood()?)));
        let (parent, pagemaps) = match both {
            Ok(both) => both,
            Err(TransferError::Image(error)) if error.is_opaque() => {
                return self.opaque(&error, base);
            }
            Err(error) => return Err(error),
        };
        let assembled = match self.layout {
            Layout::Faithful => {
                self.complete_files(is_memory)?;
                self.as_it_is(pagemaps, parent.as_ref())?
            }
            Layout::Flat => self.rewritten(pagemaps, parent.as_ref(), None)?,
            Layout::Incremental => {
                let base = self.find_base(&pagemaps, parent.as_ref())?;
                self.rewritten(pagemaps, parent.as_ref(), base.as_ref())?
            }
        };
        self.finished(assembled)
    }

    fn finished(&self, assembled: Assembled) -> Result<Assembled, TransferError> {
        self.finish_files(&assembled.files)?;
        match assembled.completeness {
            Completeness::Damaged(_) => {
                let what = assembled.completeness.to_string();
                Err(TransferError::Incomplete {
                    directory: PathBuf::from(self.job.begin.name.as_str()),
                    what,
                })
            }
            _ => Ok(assembled),
        }
    }

    // The stored set that the source's `parent` leads to.
    fn parent_id(&self) -> Result<Option<u64>, TransferError> {
        let Some(parent) = &self.job.manifest.parent else {
            return Ok(None);
        };
        let record = self
            .store
            .find_root(&self.peer, &parent.root)?
            .ok_or_else(|| {
                TransferError::Layout(format!(
                    "the set that {} builds on is not here any more; send again",
                    parent.link
                ))
            })?;
        Ok(Some(record.id))
    }

    // The pagemaps, unless memory is stored in a way that this version does not understand.
    fn understood(&self) -> Result<BTreeMap<PagemapName, Pagemap>, TransferError> {
        if let Some(inventory) = self.inventory()? {
            inventory.check_understood("inventory.img")?;
        }
        read_pagemaps(&self.directory, self.job.manifest.page_size)
    }

    fn inventory(&self) -> Result<Option<Inventory>, TransferError> {
        let bytes = self.read_small("inventory.img")?;
        Ok(bytes
            .map(|bytes| Inventory::parse(&bytes, "inventory.img"))
            .transpose()?)
    }

    fn read_small(&self, name: &str) -> Result<Option<Vec<u8>>, ImageError> {
        let Some((meta, _)) = self
            .job
            .manifest
            .files
            .iter()
            .find(|(meta, _)| meta.name.as_str() == name)
        else {
            return Ok(None);
        };
        let path = self.directory.join(name);
        if meta.size > SMALL_BYTES {
            return Err(ImageError::TooLarge {
                path,
                size: meta.size,
                limit: SMALL_BYTES,
            });
        }
        fs::read(&path).map(Some).map_err(|source| ImageError::Io {
            path,
            action: "read",
            source,
        })
    }

    // Compressed memory can be carried, not taken apart.
    fn opaque(&self, why: &ImageError, base: Option<u64>) -> Result<Assembled, TransferError> {
        if self.layout != Layout::Faithful {
            return Err(TransferError::Layout(format!(
                "{why}; start `crxfer recv` with --layout faithful, which carries it as it is"
            )));
        }
        self.complete_files(FileMeta::is_pages)?;
        let mut assembled = self.unchanged_files(base);
        assembled.completeness = Completeness::Opaque(why.to_string());
        self.finish_files(&assembled.files)?;
        Ok(assembled)
    }

    fn unchanged_files(&self, base: Option<u64>) -> Assembled {
        let files: Vec<_> = self.job.recipe.files().cloned().collect();
        Assembled {
            digests: (0u32..)
                .zip(&files)
                .map(|(file, _)| FileDigests::AsArrived(file))
                .collect(),
            files,
            base,
            completeness: Completeness::PagesOnly,
            completes: None,
            note: None,
        }
    }

    fn as_it_is(
        &self,
        pagemaps: BTreeMap<PagemapName, Pagemap>,
        base: Option<&StoredChain>,
    ) -> Result<Assembled, TransferError> {
        let mut assembled = self.unchanged_files(base.map(StoredChain::id));
        assembled.completeness = self.completeness(&pagemaps, &assembled.files, base)?;
        Ok(assembled)
    }

    // CRIU reads only the memory of the sets that another builds on.
    fn check_frames(&self) -> Result<(), TransferError> {
        let names = self.job.recipe.files().map(|meta| meta.name.as_str());
        for name in names.filter(|name| !self.job.begin.ancestor && walk::is_known(name)) {
            let path = self.directory.join(name);
            walk::check_image(name, fs::File::open(&path).tried("open", &path)?)?;
        }
        Ok(())
    }

    fn completeness(
        &self,
        pagemaps: &BTreeMap<PagemapName, Pagemap>,
        files: &[FileMeta],
        base: Option<&StoredChain>,
    ) -> Result<Completeness, TransferError> {
        let sizes_of = |files: &mut dyn Iterator<Item = &FileMeta>| -> BTreeMap<String, u64> {
            files
                .map(|meta| (meta.name.to_string(), meta.size))
                .collect()
        };
        let levels = base
            .map(|chain| chain.levels.as_slice())
            .unwrap_or_default();
        let mut sizes = vec![sizes_of(&mut files.iter())];
        sizes.extend(
            levels
                .iter()
                .map(|level| sizes_of(&mut level.index.files())),
        );
        let maps = std::iter::once(pagemaps).chain(levels.iter().map(|level| &level.pagemaps));
        let facts: Vec<_> = maps
            .zip(&sizes)
            .map(|(pagemaps, sizes)| LevelFacts { pagemaps, sizes })
            .collect();
        self.check_frames()?;
        let inventory = self.inventory()?;
        let tree = ProcessTree::parse(|name| self.read_small(name))?;
        Ok(check(&SetFacts {
            levels: &facts,
            inventory: inventory.as_ref(),
            tree: tree.as_ref(),
        }))
    }

    // Brings to their places the blocks of some files that did not arrive, because they are
    // elsewhere in this set or in one that was held.
    fn complete_files(&self, wanted: impl Fn(&FileMeta) -> bool) -> Result<(), TransferError> {
        for (file, meta) in (0u32..).zip(self.job.recipe.files()) {
            if !wanted(meta) {
                continue;
            }
            let mut pieces = Pieces::default();
            for block in 0..meta.blocks() {
                let at = BlockRef { file, block };
                match self.job.recipe.block(at).1 {
                    Place::Same(_) | Place::Held { .. } => pieces.push(self.origin(at), block),
                    _ => {}
                }
            }
            if !pieces.is_empty() {
                let digests = |block| self.job.recipe.block(BlockRef { file, block }).0;
                let path = self.directory.join(meta.name.as_str());
                self.copy(&path, meta, digests, pieces.into_vec())?;
            }
        }
        Ok(())
    }

    // Where a block of the arriving set can be read.
    fn origin(&self, at: BlockRef) -> Origin {
        match self.job.recipe.block(at).1 {
            Place::Same(from) => Origin::Staged(from),
            Place::Held { store, at } => Origin::Held { store, at },
            Place::Zero => Origin::Zero,
            Place::Staged | Place::Unknown | Place::Wanted => Origin::Staged(at),
        }
    }

    fn copy(
        &self,
        path: &std::path::Path,
        meta: &FileMeta,
        digest: impl Fn(u64) -> Digest + Sync,
        pieces: Vec<Piece>,
    ) -> Result<(), TransferError> {
        let locate = |origin: &Origin| match origin {
            Origin::Zero => None,
            Origin::Staged(at) => {
                let from = self.job.recipe.file(at.file);
                Some(Located {
                    path: self.directory.join(from.name.as_str()),
                    block: at.block,
                    block_len: from.block_len,
                    set: 0,
                })
            }
            Origin::Held { store, at } => {
                let set = self.held.set(*store);
                let from = set.index.file(at.file);
                Some(Located {
                    path: set.directory.join(from.name.as_str()),
                    block: at.block,
                    block_len: from.block_len,
                    set: set.id,
                })
            }
            Origin::Stored {
                directory,
                name,
                block,
                set,
            } => Some(Located {
                path: directory.join(&**name),
                block: *block,
                // Pages of a chain are all of one size.
                block_len: meta.block_len,
                set: *set,
            }),
        };
        let result = copy_pieces(path, meta, digest, pieces, locate);
        if let Err(TransferError::Store(StoreError::Damaged { set, path, .. })) = &result {
            self.store.distrust(*set, path);
        }
        result
    }

    // Modes as the source had them; on disk where the place lasts.
    fn finish_files(&self, files: &[FileMeta]) -> Result<(), TransferError> {
        let finish = |meta: &FileMeta| {
            let path = self.directory.join(meta.name.as_str());
            let file = fs::File::open(&path).tried("open", &path)?;
            file.set_permissions(fs::Permissions::from_mode(u32::from(meta.mode)))
                .tried("set the mode of", &path)?;
            if self.store.is_durable() && files.len() <= SYNCED_EACH {
                file.sync_all().tried("sync", &path)?;
            }
            Ok(())
        };
        in_parallel(files, finish)?;
        if self.store.is_durable() && files.len() > SYNCED_EACH {
            let directory = fs::File::open(&self.directory).tried("open", &self.directory)?;
            rustix::fs::syncfs(directory).tried("sync", &self.directory)?;
        }
        Ok(())
    }
}

/// A file that was written anew: its description and digests.
fn rewritten_small(meta: &FileMeta, bytes: &[u8]) -> (FileMeta, Vec<Digest>) {
    let meta = FileMeta {
        size: bytes.len() as u64,
        ..meta.clone()
    };
    let mut digests = Vec::new();
    hash_blocks(bytes, meta.block_len as usize, &mut digests);
    (meta, digests)
}
