//! Rewriting memory: pages that the base has at the same address are left to it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::copy::{Origin, Pieces};
use super::{Assembled, Assembler, FileDigests, rewritten_small};
use crate::delta::{BlockRef, FileMeta, FileName};
use crate::digest::Digest;
use crate::image::{
    ImageError, PageFlags, PageRun, Pagemap, PagemapName, ResolvedRun, Source, pages_file_name,
    resolve,
};
use crate::page::PageSize;
use crate::store::Tried as _;
use crate::transfer::TransferError;
use crate::transfer::chain::{PageDigests, StoredChain, StoredLevel};

/// One page of the arriving set, parents followed; or a whole run of pages without bytes, which a
/// pagemap can have without end.
#[derive(Debug)]
pub(super) struct MemoryPage {
    pub(super) vaddr: u64,
    pages: u64,
    flags: PageFlags,
    /// `None`: the page has no bytes (left at the source, or zero by its entry).
    pub(super) digest: Option<Digest>,
    level: usize,
    page: u64,
}

/// The pages of one pagemap of the arriving set in ascending order of address.
pub(super) struct MemoryPages<'a> {
    assembler: &'a Assembler<'a>,
    name: PagemapName,
    own_file: Option<u32>,
    stored: Vec<Option<StoredPages<'a>>>,
    runs: std::vec::IntoIter<ResolvedRun>,
    run: Option<ResolvedRun>,
    done: u64,
}

/// The pages file of one pagemap in one stored set of the chain below the arriving one.
struct StoredPages<'a> {
    level: &'a StoredLevel,
    file: u32,
    directory: Arc<Path>,
    name: Arc<str>,
}

impl<'a> StoredPages<'a> {
    fn of(level: &'a StoredLevel, name: PagemapName) -> Option<Self> {
        let file = level.pages_file(name)?;
        let file_name = level.index.file(file).name.as_str();
        Some(Self {
            level,
            file,
            directory: level.directory.as_path().into(),
            name: file_name.into(),
        })
    }

    fn digest(&self, page: u64) -> Option<Digest> {
        let at = BlockRef {
            file: self.file,
            block: page,
        };
        (page < self.level.index.file(self.file).blocks()).then(|| self.level.index.digest(at))
    }
}

impl<'a> MemoryPages<'a> {
    /// With `parent` its pages are followed; without, pages left to the parent have no digest.
    pub(super) fn new(
        assembler: &'a Assembler<'a>,
        name: PagemapName,
        pagemap: &Pagemap,
        parent: Option<&'a StoredChain>,
    ) -> Result<Self, TransferError> {
        let mut pagemaps = vec![pagemap];
        pagemaps.extend(parent.iter().flat_map(|parent| parent.pagemaps_of(name)));
        let file = name.to_string();
        let runs = resolve(&pagemaps).map_err(|error| ImageError::Unresolved { file, error })?;
        let pages_name = pages_file_name(pagemap.pages_id());
        let own = assembler
            .job
            .recipe
            .files()
            .position(|meta| meta.name.as_str() == pages_name);
        let mut runs = runs.into_iter();
        Ok(Self {
            assembler,
            name,
            own_file: own.and_then(|file| u32::try_from(file).ok()),
            stored: parent
                .iter()
                .flat_map(|it| &it.levels)
                .map(|level| StoredPages::of(level, name))
                .collect(),
            run: runs.next(),
            runs,
            done: 0,
        })
    }

    fn page(&self, run: &ResolvedRun) -> Result<MemoryPage, TransferError> {
        let page_size = self.assembler.job.manifest.page_size;
        let vaddr = run.vaddr + self.done * page_size.bytes();
        let mut page = MemoryPage {
            vaddr,
            pages: 1,
            flags: run.flags_at_top,
            digest: None,
            level: 0,
            page: 0,
        };
        if let Source::At { level, page: first } = run.source {
            page.level = level;
            page.page = first + self.done;
            page.digest = Some(self.digest(&page).ok_or_else(|| self.short(vaddr))?);
        } else {
            page.pages = run.pages - self.done;
        }
        Ok(page)
    }

    fn digest(&self, page: &MemoryPage) -> Option<Digest> {
        if page.level > 0 {
            return self.stored.get(page.level - 1)?.as_ref()?.digest(page.page);
        }
        let recipe = &self.assembler.job.recipe;
        let at = BlockRef {
            file: self.own_file?,
            block: page.page,
        };
        let meta = recipe.file(at.file);
        let is_whole =
            at.block < meta.blocks() && meta.block_bytes(at.block) == meta.block_len as usize;
        is_whole.then(|| recipe.block(at).0)
    }

    fn short(&self, vaddr: u64) -> TransferError {
        let what = format!(
            "{}: the page at {vaddr:#x} is not in its pages file; CRIU would hang",
            self.name
        );
        TransferError::Incomplete {
            directory: self.assembler.job.begin.name.as_str().into(),
            what,
        }
    }

    fn origin(&self, page: &MemoryPage) -> Origin {
        if page.level == 0 {
            let file = self.own_file.expect("its digest was found there");
            return self.assembler.origin(BlockRef {
                file,
                block: page.page,
            });
        }
        let stored = self.stored[page.level - 1]
            .as_ref()
            .expect("its digest was found there");
        Origin::Stored {
            directory: stored.directory.clone(),
            name: stored.name.clone(),
            block: page.page,
            set: stored.level.id,
        }
    }
}

impl Iterator for MemoryPages<'_> {
    type Item = Result<MemoryPage, TransferError>;

    fn next(&mut self) -> Option<Self::Item> {
        let run = self.run?;
        let page = self.page(&run);
        self.done += page.as_ref().map_or(1, |page| page.pages);
        if self.done == run.pages {
            self.run = self.runs.next();
            self.done = 0;
        }
        Some(page)
    }
}

/// The memory of one pagemap as it will be stored.
struct Rewritten {
    pagemap: Pagemap,
    digests: Vec<Digest>,
    pieces: Pieces,
    // The pages file that arrived holds exactly these pages in this order.
    in_place: bool,
}

impl Assembler<'_> {
    /// The set with its memory rewritten to build on `base`, or on nothing.
    pub(super) fn rewritten(
        &self,
        pagemaps: BTreeMap<PagemapName, Pagemap>,
        parent: Option<&StoredChain>,
        base: Option<&StoredChain>,
    ) -> Result<Assembled, TransferError> {
        let mut assembled = self.unchanged_files(base.map(StoredChain::id));
        let mut stored = BTreeMap::new();
        let mut rewritten_files = Vec::new();
        for (name, pagemap) in pagemaps {
            let rewritten = self.rewrite(name, &pagemap, parent, base)?;
            let pages_name = pages_file_name(pagemap.pages_id());
            if !rewritten.in_place {
                self.write_pages(
                    &pages_name,
                    &rewritten.pagemap,
                    rewritten.digests,
                    rewritten.pieces,
                    &mut assembled,
                )?;
                rewritten_files.push(pages_name);
            }
            self.write_pagemap(name, &rewritten.pagemap, &mut assembled)?;
            stored.insert(name, rewritten.pagemap);
        }
        self.complete_files(|meta| {
            meta.is_pages()
                && !rewritten_files
                    .iter()
                    .any(|name| name == meta.name.as_str())
        })?;
        // Only now: until here other files may have been completed from the pages that arrived.
        for name in &rewritten_files {
            let (from, to) = (self.beside(name), self.directory.join(name));
            fs::rename(&from, &to).tried("rename", &from)?;
        }
        if base.is_some() && !stored.values().any(Pagemap::needs_parent) {
            assembled.base = None;
        }
        let base = base.filter(|_| assembled.base.is_some());
        assembled.completeness = self.completeness(&stored, &assembled.files, base)?;
        Ok(assembled)
    }

    fn rewrite(
        &self,
        name: PagemapName,
        pagemap: &Pagemap,
        parent: Option<&StoredChain>,
        base: Option<&StoredChain>,
    ) -> Result<Rewritten, TransferError> {
        let page_size = pagemap.page_size();
        let mut in_base = base
            .map(|base| PageDigests::new(base, name, page_size))
            .transpose()?;
        let mut pages = MemoryPages::new(self, name, pagemap, parent)?;
        let (mut runs, mut digests, mut pieces) = (Vec::new(), Vec::new(), Pieces::default());
        // Of a set that completes another no pages file has arrived.
        let mut in_place = self.pages.is_none();
        while let Some(page) = pages.next() {
            let page = page?;
            let flags = match page.digest {
                None => page.flags,
                Some(digest)
                    if in_base.as_mut().and_then(|base| base.at(page.vaddr)) == Some(digest) =>
                {
                    in_place = false;
                    PageFlags::PARENT
                }
                Some(digest) => {
                    in_place &= page.level == 0 && page.page == digests.len() as u64;
                    pieces.push(pages.origin(&page), digests.len() as u64);
                    digests.push(digest);
                    present(page.flags)
                }
            };
            push_pages(&mut runs, &page, flags, page_size.bytes());
        }
        let pagemap = Pagemap::new(&name.to_string(), pagemap.pages_id(), page_size, runs)?;
        Ok(Rewritten {
            pagemap,
            digests,
            pieces,
            in_place,
        })
    }

    // Not in the directory itself, where every name may be that of a file of the set.
    fn beside(&self, name: &str) -> PathBuf {
        self.directory.with_file_name(name)
    }

    fn write_pages(
        &self,
        name: &str,
        pagemap: &Pagemap,
        digests: Vec<Digest>,
        pieces: Pieces,
        assembled: &mut Assembled,
    ) -> Result<(), TransferError> {
        let page_size = pagemap.page_size();
        let size = digests.len() as u64 * page_size.bytes();
        let path = self.beside(name);
        let file = fs::File::create(&path).tried("create", &path)?;
        file.set_len(size).tried("extend", &path)?;
        let place = assembled
            .files
            .binary_search_by(|meta| meta.name.as_str().cmp(name));
        let index = place.unwrap_or_else(|index| {
            assembled.files.insert(index, new_file(name, page_size));
            assembled
                .digests
                .insert(index, FileDigests::Own(Vec::new()));
            index
        });
        assembled.files[index].size = size;
        self.copy(
            &path,
            &assembled.files[index],
            |block| digest_at(&digests, block),
            pieces.into_vec(),
        )?;
        assembled.digests[index] = FileDigests::Own(digests);
        Ok(())
    }

    fn write_pagemap(
        &self,
        name: PagemapName,
        pagemap: &Pagemap,
        assembled: &mut Assembled,
    ) -> Result<(), TransferError> {
        let bytes = pagemap.encode();
        let path = self.directory.join(name.to_string());
        fs::write(&path, &bytes).tried("write", &path)?;
        let file = name.to_string();
        let place = assembled
            .files
            .binary_search_by(|meta| meta.name.as_str().cmp(&file));
        let index = place.unwrap_or_else(|index| {
            let meta = new_file(&file, pagemap.page_size());
            assembled.files.insert(index, meta);
            let digests = FileDigests::Own(Vec::new());
            assembled.digests.insert(index, digests);
            index
        });
        let (meta, digests) = rewritten_small(&assembled.files[index], &bytes);
        assembled.files[index] = meta;
        assembled.digests[index] = FileDigests::Own(digests);
        Ok(())
    }
}

// A file that the source did not send.
fn new_file(name: &str, page_size: PageSize) -> FileMeta {
    let name = FileName::new(name).expect("an image's name is a name");
    FileMeta::new(name, 0o644, 0, page_size)
}

pub(super) fn digest_at(digests: &[Digest], block: u64) -> Digest {
    digests[usize::try_from(block).expect("blocks of a file are limited")]
}

// CRIU marks pages that may be restored lazily; those that come out of a parent lost the mark.
fn present(flags: PageFlags) -> PageFlags {
    if flags.contains(PageFlags::LAZY) && !flags.is_parent() {
        PageFlags::PRESENT.with(PageFlags::LAZY)
    } else {
        PageFlags::PRESENT
    }
}

fn push_pages(runs: &mut Vec<PageRun>, page: &MemoryPage, flags: PageFlags, page_bytes: u64) {
    let (vaddr, pages) = (page.vaddr, page.pages);
    match runs.last_mut() {
        Some(last) if last.flags == flags && last.vaddr + last.pages * page_bytes == vaddr => {
            last.pages += pages;
        }
        _ => runs.push(PageRun {
            vaddr,
            pages,
            flags,
        }),
    }
}
