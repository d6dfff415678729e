//! Which stored set an incremental one builds on.

use std::collections::BTreeMap;

use super::Assembler;
use super::memory::MemoryPages;
use crate::image::{Pagemap, PagemapName};
use crate::store::Record;
use crate::transfer::TransferError;
use crate::transfer::chain::{PageDigests, StoredChain};

/// Sets that are compared page by page; the newest are the likeliest.
const COMPARED: usize = 8;

/// A set that shares less than this part of its pages is not worth depending on.
const LEAST_SHARE: u64 = 16;

/// Longest chain that is built. CRIU reads deep chains as fast as short ones, but every directory
/// of one must be kept; past this a set is written whole.
pub(in crate::transfer) const DEEPEST: usize = 32;

impl Assembler<'_> {
    /// The set to build on: the one that the operator named, else the source's parent, else the
    /// stored set of this peer that shares most.
    pub(super) fn find_base(
        &self,
        pagemaps: &BTreeMap<PagemapName, Pagemap>,
        parent: Option<&StoredChain>,
    ) -> Result<Option<StoredChain>, TransferError> {
        if let Some(name) = &self.job.begin.base_name {
            let record = self.store.named_by(name.as_str(), &self.peer)?;
            return self.usable(&record, &self.store.records()?);
        }
        if let Some(parent) = parent {
            let records = self.store.records()?;
            let record = records
                .iter()
                .find(|record| record.id == parent.levels[0].id);
            return record.map_or(Ok(None), |record| self.usable(record, &records));
        }
        self.most_alike(pagemaps)
    }

    fn most_alike(
        &self,
        pagemaps: &BTreeMap<PagemapName, Pagemap>,
    ) -> Result<Option<StoredChain>, TransferError> {
        let pages: u64 = pagemaps.values().map(Pagemap::present_pages).sum();
        let mut best = None;
        let mut most = pages / LEAST_SHARE;
        let records = self.store.records()?;
        for record in self.candidates(records.clone()) {
            let Some(chain) = self.usable(&record, &records)? else {
                continue;
            };
            let shared = self.shared_pages(pagemaps, &chain)?;
            if shared > most {
                most = shared;
                best = Some(chain);
            }
            // Nothing can be much better.
            if shared >= pages - pages / 64 {
                break;
            }
        }
        Ok(best)
    }

    // The set with the same name first, then the newest.
    fn candidates(&self, mut records: Vec<Record>) -> Vec<Record> {
        records.retain(|record| {
            record.peer == self.peer && record.page_size == self.job.manifest.page_size
        });
        records.reverse();
        records
            .sort_by_key(|record| record.superseded || record.name != self.job.begin.name.as_str());
        records.truncate(COMPARED);
        records
    }

    // Its pages are compared by the digests in its index, not read: it must be what it was.
    fn usable(
        &self,
        record: &Record,
        records: &[Record],
    ) -> Result<Option<StoredChain>, TransferError> {
        if record.completeness == "opaque"
            || record.page_size != self.job.manifest.page_size
            || !self.store.is_sound(record, records)
        {
            return Ok(None);
        }
        match StoredChain::open(self.store, record.id) {
            Ok(chain) if chain.levels.len() < DEEPEST => Ok(Some(chain)),
            Ok(_) => Ok(None),
            Err(error) => {
                tracing::warn!("{error}; nothing is built on it");
                Ok(None)
            }
        }
    }

    fn shared_pages(
        &self,
        pagemaps: &BTreeMap<PagemapName, Pagemap>,
        chain: &StoredChain,
    ) -> Result<u64, TransferError> {
        let mut shared = 0;
        for (&name, pagemap) in pagemaps {
            let mut stored = PageDigests::new(chain, name, pagemap.page_size())?;
            for page in MemoryPages::new(self, name, pagemap, None)? {
                let page = page?;
                let same = page
                    .digest
                    .is_some_and(|digest| stored.at(page.vaddr) == Some(digest));
                shared += u64::from(same);
            }
        }
        Ok(shared)
    }
}
