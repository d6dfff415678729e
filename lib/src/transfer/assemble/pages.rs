//! Completing a set in state *pages*: its memory came from CRIU's page-server stream, all other images
//! arrive now.

use std::collections::BTreeMap;
use std::fs;

use super::{Assembled, Assembler, FileDigests};
use crate::delta::BlockRef;
use crate::image::{PageFlags, PageRun, Pagemap, PagemapName};
use crate::store::{Record, Tried as _};
use crate::transfer::TransferError;
use crate::transfer::chain::{StoredChain, StoredLevel};
use crate::wire::Layout;

impl Assembler<'_> {
    /// The images that arrived with the memory of the set `pages`.
    pub(super) fn with_pages(&self, pages: &Record) -> Result<Assembled, TransferError> {
        let records = self.store.records()?;
        let own = self.job.manifest.page_size;
        if pages.page_size != own || !self.store.is_sound(pages, &records) {
            let name = &pages.name;
            return Err(TransferError::Layout(format!(
                "the memory that {name} holds was changed since it was stored, or has pages of another size; take the dump again, memory included"
            )));
        }
        let chain = StoredChain::open(self.store, pages.id)?;
        let mut assembled = match self.layout {
            Layout::Flat => self.rewritten(left_to(&chain)?, Some(&chain), None)?,
            Layout::Faithful | Layout::Incremental => self.taken_over(&chain)?,
        };
        assembled.completes = Some(pages.id);
        let generation = pages.generation;
        assembled.note = Some(format!(
            "its memory is that of generation {generation}, which came from CRIU itself"
        ));
        Ok(assembled)
    }

    // Its files are never written again: one more name for each is as good as a copy.
    fn taken_over(&self, chain: &StoredChain) -> Result<Assembled, TransferError> {
        let pages = &chain.levels[0];
        let base = self.base_of(pages)?;
        let mut assembled = self.unchanged_files(base.as_ref().map(StoredChain::id));
        for (number, meta) in (0u32..).zip(pages.index.files()) {
            let (from, to) = (
                pages.directory.join(meta.name.as_str()),
                self.directory.join(meta.name.as_str()),
            );
            fs::hard_link(&from, &to).tried("link", &from)?;
            let place = assembled
                .files
                .binary_search_by(|file| file.name.cmp(&meta.name));
            let place = place.unwrap_or_else(|place| place);
            assembled.files.insert(place, meta.clone());
            let digest = |block| {
                pages.index.digest(BlockRef {
                    file: number,
                    block,
                })
            };
            let digests = (0..meta.blocks()).map(digest).collect();
            assembled.digests.insert(place, FileDigests::Own(digests));
        }
        assembled.completeness =
            self.completeness(&pages.pagemaps, &assembled.files, base.as_ref())?;
        Ok(assembled)
    }

    fn base_of(&self, level: &StoredLevel) -> Result<Option<StoredChain>, TransferError> {
        let records = self.store.records()?;
        let record = records.iter().find(|record| record.id == level.id);
        let base = record.and_then(|record| record.base);
        base.map(|id| StoredChain::open(self.store, id)).transpose()
    }
}

// Pagemaps as they would be if all their pages were left to the set: rewriting them resolves the chain.
fn left_to(chain: &StoredChain) -> Result<BTreeMap<PagemapName, Pagemap>, TransferError> {
    let left = |(&name, pagemap): (&PagemapName, &Pagemap)| {
        let flags = |run: &PageRun| match run.flags {
            flags if flags.is_present() || flags.is_parent() => PageFlags::PARENT,
            flags => flags,
        };
        let runs = pagemap.runs().iter().map(|run| PageRun {
            flags: flags(run),
            ..*run
        });
        let runs = runs.collect();
        let file = name.to_string();
        let pagemap = Pagemap::new(&file, pagemap.pages_id(), pagemap.page_size(), runs)?;
        Ok((name, pagemap))
    };
    chain.levels[0].pagemaps.iter().map(left).collect()
}
