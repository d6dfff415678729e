//! Whether a stored set still has what was stored.

use std::fs;

use super::{Record, Store};
use crate::wire::limits;

impl Store {
    /// Whether the set and all that it builds on can be built on: their indexes are whole, and no
    /// file of them was written, cut, punched or removed since. (CRIU's `--auto-dedup` punches the
    /// pages that it has restored out of their files.)
    ///
    /// This looks at sizes and times only. Bytes that went bad without that are found when they
    /// are copied, each block being digested on its way.
    pub fn is_sound(&self, record: &Record, records: &[Record]) -> bool {
        let mut next = record;
        for _ in 0..=limits::CHAIN {
            if !self.is_untouched(next) {
                return false;
            }
            let Some(base) = next.base else { return true };
            match records.iter().find(|record| record.id == base) {
                Some(record) => next = record,
                None => return false,
            }
        }
        false
    }

    fn is_untouched(&self, record: &Record) -> bool {
        let (Ok(index), Some(directory)) = (self.index(record.id), self.directory_of(record))
        else {
            return false;
        };
        // The index was written after all that it describes.
        let index_path = self.set_path(record.id).join("index");
        let written = fs::metadata(index_path).and_then(|meta| meta.modified());
        let Ok(written) = written else { return false };
        index.files().all(|file| {
            fs::symlink_metadata(directory.join(file.name.as_str())).is_ok_and(|meta| {
                meta.is_file()
                    && meta.len() == file.size
                    && meta.modified().is_ok_and(|modified| modified <= written)
            })
        })
    }
}
