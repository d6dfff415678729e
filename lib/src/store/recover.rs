//! Tidying up after a process that died.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::error::{StoreError, Tried};
use super::places::{read_about, remove_tree};
use super::{Record, Stage, Store, directory_id};

impl Store {
    /// Brings the directory into order: stages become unfinished transfers, a switch that was cut
    /// short is finished, records without files are dropped. Safe to repeat.
    pub(super) fn recover(&self) -> Result<(), StoreError> {
        let _lock = self.lock()?;
        self.recover_records()?;
        for place in self.entries("stage")? {
            self.recover_stage(&place, true)?;
        }
        for place in self.entries("base")? {
            if place
                .extension()
                .is_some_and(|extension| extension == "new")
            {
                remove_tree(&place)?;
            }
        }
        for place in self.entries("partial")? {
            if read_about(&place).is_none() || is_stale(&place) {
                remove_tree(&place)?;
            }
        }
        self.collect(None, 0)
    }

    fn entries(&self, part: &str) -> Result<Vec<PathBuf>, StoreError> {
        let path = self.state_path(part);
        fs::read_dir(&path)
            .tried("list", &path)?
            .map(|entry| Ok(entry.tried("list", &path)?.path()))
            .collect()
    }

    fn recover_records(&self) -> Result<(), StoreError> {
        for place in self.entries("sets")? {
            if !place.join("record").exists() {
                remove_tree(&place)?;
            }
        }
        for mut record in self.records()? {
            let named = directory_id(&self.root.join(&record.name)) == Some(record.directory_id);
            // Its removal had only just begun.
            if record.superseded && named {
                record.superseded = false;
                self.save(&record)?;
            }
        }
        Ok(())
    }

    // `files` in a stage is one of: what had arrived; a complete set, recorded but not yet
    // switched in; or the generation that was switched out, or is being removed.
    pub(super) fn recover_stage(&self, place: &Path, keep: bool) -> Result<(), StoreError> {
        let stage = Stage::at(place);
        let files = stage.files();
        let record = self
            .records()?
            .into_iter()
            .find(|record| Some(record.directory_id) == directory_id(&files));
        let Some(record) = record else {
            return if keep && files.is_dir() && read_about(place).is_some() {
                self.abandon(stage)
            } else {
                remove_tree(place)
            };
        };
        let newer = self
            .current(&record.name)?
            .filter(|current| current.generation > record.generation);
        if record.superseded || newer.is_some() {
            self.supersede(record, &files)?;
            return remove_tree(place);
        }
        self.forget(&record)?;
        if !keep {
            return remove_tree(place);
        }
        let _ = fs::remove_file(files.join("parent"));
        self.abandon(stage)
    }

    fn forget(&self, record: &Record) -> Result<(), StoreError> {
        remove_tree(&self.set_path(record.id))
    }
}

// An attempt whose name never came again.
#[expect(clippy::disallowed_methods, reason = "compared with a file's time")]
fn is_stale(place: &Path) -> bool {
    const KEPT: Duration = Duration::from_secs(7 * 24 * 3600);
    let modified = fs::metadata(place).and_then(|meta| meta.modified()).ok();
    modified
        .and_then(|modified| SystemTime::now().duration_since(modified).ok())
        .is_some_and(|age| age > KEPT)
}
