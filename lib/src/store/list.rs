//! What a receiving directory holds, for people.

use std::path::{Path, PathBuf};

use super::error::{StoreError, Tried};
use super::{Record, Store, directory_id};

/// One stored set.
#[derive(Clone, Debug)]
pub struct StoredSet {
    /// What is remembered of it.
    pub record: Record,
    /// Where its files are; `None` if somebody removed them.
    pub directory: Option<PathBuf>,
    /// Name or number of the set that it builds on.
    pub base: Option<String>,
    /// Pages in its own files of pages; `None` if its index is gone.
    pub pages: Option<u64>,
}

impl StoredSet {
    /// Whether it is what its name stands for now: neither superseded nor a nameless ancestor.
    pub fn is_current(&self) -> bool {
        !self.record.superseded && !self.record.name.is_empty()
    }
}

impl Store {
    /// All sets, by name, older generations first; nameless ancestors before all others.
    pub fn list(&self) -> Result<Vec<StoredSet>, StoreError> {
        let mut sets = Vec::new();
        for record in self.records()? {
            sets.push(StoredSet {
                directory: self.visible_place(&record),
                base: record.base.map(|id| self.name_of(id)).transpose()?,
                pages: self.index(record.id).ok().map(|index| {
                    let pages = index.files().filter(|file| file.is_pages());
                    pages.map(crate::delta::FileMeta::blocks).sum()
                }),
                record,
            });
        }
        sets.sort_by(|a, b| {
            let key = |set: &StoredSet| (set.record.name.clone(), set.record.generation);
            key(a).cmp(&key(b))
        });
        Ok(sets)
    }

    /// Where people find the set: under its name while that is its own, else where it is kept.
    pub fn visible_place(&self, record: &Record) -> Option<PathBuf> {
        self.named_directory(record)
            .or_else(|| self.directory_of(record))
    }

    /// The receiving directory that `directory` is a set of, and the set's record. `None` if it is
    /// not inside a receiving directory, or was not received.
    pub fn find_set(directory: &Path) -> Result<Option<(Self, Record)>, StoreError> {
        let directory = crate::sink::real_path(directory).tried("find", directory)?;
        // DIR/NAME, or DIR/.crxfer/base/ID.
        for root in directory.ancestors().skip(1).take(3) {
            if !root.join(super::STATE).join("sets").is_dir() {
                continue;
            }
            let store = Self::open_existing(root)?;
            let id = directory_id(&directory);
            let found = store.records()?.into_iter().find(|record| {
                Some(record.directory_id) == id || store.base_path(record.id) == directory
            });
            return Ok(found.map(|record| (store, record)));
        }
        Ok(None)
    }
}
