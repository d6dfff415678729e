//! Stored sets as chains: which page of memory is where, and with which digest.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::TransferError;
use crate::delta::BlockRef;
use crate::digest::Digest;
use crate::image::pagemap::MAX_FILE_BYTES;
use crate::image::{
    FileKind, ImageError, Pagemap, PagemapName, ResolvedRun, Source, pages_file_name, resolve,
};
use crate::page::PageSize;
use crate::store::{Index, Record, Store, Tried as _};
use crate::wire::limits;

/// Parses the pagemaps of the directory.
pub(super) fn read_pagemaps(
    directory: &Path,
    page_size: PageSize,
) -> Result<BTreeMap<PagemapName, Pagemap>, TransferError> {
    let mut pagemaps = BTreeMap::new();
    for entry in fs::read_dir(directory).tried("list", directory)? {
        let entry = entry.tried("list", directory)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if let FileKind::Pagemap(pagemap) = FileKind::of(&name) {
            // Its size is what the source said: a file of holes costs the source nothing.
            let (path, limit) = (entry.path(), MAX_FILE_BYTES);
            let size = entry.metadata().tried("examine", &path)?.len();
            if size > limit {
                return Err(ImageError::TooLarge { path, size, limit }.into());
            }
            let bytes = fs::read(&path).tried("read", &path)?;
            pagemaps.insert(pagemap, Pagemap::parse(&bytes, &name, page_size)?);
        }
    }
    Ok(pagemaps)
}

/// One stored set.
#[derive(Debug)]
pub(super) struct StoredLevel {
    pub(super) id: u64,
    pub(super) directory: PathBuf,
    pub(super) index: Index,
    pub(super) pagemaps: BTreeMap<PagemapName, Pagemap>,
}

impl StoredLevel {
    /// The pages file of the pagemap `name`, as the number of a file in the index.
    pub(super) fn pages_file(&self, name: PagemapName) -> Option<u32> {
        self.index
            .file_named(&pages_file_name(self.pagemaps.get(&name)?.pages_id()))
    }
}

/// A stored set and what it builds on, the newest first.
#[derive(Debug, Default)]
pub(super) struct StoredChain {
    pub(super) levels: Vec<StoredLevel>,
}

impl StoredChain {
    /// Opens the set with the record number `id` and all below it.
    pub(super) fn open(store: &Store, id: u64) -> Result<Self, TransferError> {
        let records = store.records()?;
        let mut levels = Vec::new();
        let mut next = Some(id);
        while let Some(id) = next {
            let record = records.iter().find(|record| record.id == id);
            let record = record.ok_or_else(|| missing(store, id))?;
            levels.push(open_level(store, record)?);
            next = record.base;
            if levels.len() > limits::CHAIN {
                let error = ImageError::TooDeep {
                    directory: levels[0].directory.clone(),
                    limit: limits::CHAIN,
                };
                return Err(error.into());
            }
        }
        Ok(Self { levels })
    }

    /// The pagemaps of that name, newest first, up to the first set that has none.
    pub(super) fn pagemaps_of(&self, name: PagemapName) -> impl Iterator<Item = &Pagemap> {
        self.levels
            .iter()
            .map_while(move |level| level.pagemaps.get(&name))
    }

    /// Where each page of the newest set's pagemap `name` is; empty if it has none.
    pub(super) fn resolve(&self, name: PagemapName) -> Result<Vec<ResolvedRun>, TransferError> {
        let pagemaps: Vec<_> = self.pagemaps_of(name).collect();
        if pagemaps.is_empty() {
            return Ok(Vec::new());
        }
        let file = name.to_string();
        Ok(resolve(&pagemaps).map_err(|error| ImageError::Unresolved { file, error })?)
    }
}

fn missing(store: &Store, id: u64) -> TransferError {
    let what = "a stored set is gone on which another builds".to_owned();
    TransferError::Incomplete {
        directory: store.state_path("sets").join(id.to_string()),
        what,
    }
}

fn open_level(store: &Store, record: &Record) -> Result<StoredLevel, TransferError> {
    let directory = store
        .directory_of(record)
        .ok_or_else(|| missing(store, record.id))?;
    Ok(StoredLevel {
        id: record.id,
        index: store.index(record.id)?,
        pagemaps: read_pagemaps(&directory, record.page_size)?,
        directory,
    })
}

/// Reads the digests of a chain's pages in ascending order of address.
pub(super) struct PageDigests<'a> {
    chain: &'a StoredChain,
    files: Vec<Option<u32>>,
    runs: std::vec::IntoIter<ResolvedRun>,
    run: Option<ResolvedRun>,
    page_size: PageSize,
}

impl<'a> PageDigests<'a> {
    pub(super) fn new(
        chain: &'a StoredChain,
        name: PagemapName,
        page_size: PageSize,
    ) -> Result<Self, TransferError> {
        let mut runs = chain.resolve(name)?.into_iter();
        let files = chain
            .levels
            .iter()
            .map(|level| level.pages_file(name))
            .collect();
        Ok(Self {
            chain,
            files,
            run: runs.next(),
            runs,
            page_size,
        })
    }

    /// The digest of the page at `vaddr`, if its bytes are in the chain. Addresses must ascend.
    pub(super) fn at(&mut self, vaddr: u64) -> Option<Digest> {
        loop {
            let run = self.run.as_ref()?;
            if vaddr < run.vaddr {
                return None;
            }
            let page = (vaddr - run.vaddr) / self.page_size.bytes();
            if page < run.pages {
                let Source::At { level, page: first } = run.source else {
                    return None;
                };
                let at = BlockRef {
                    file: self.files[level]?,
                    block: first + page,
                };
                let index = &self.chain.levels[level].index;
                return (at.block < index.file(at.file).blocks()).then(|| index.digest(at));
            }
            self.run = self.runs.next();
        }
    }
}
