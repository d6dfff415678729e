//! Tidying up after a process that died.

use std::fs;
use std::path::Path;

use super::error::{StoreError, Tried};
use super::places::remove_tree;
use super::{Record, Stage, Store, inode};

impl Store {
    /// Brings the directory into order: stages become unfinished transfers, a switch that was cut
    /// short is finished, records without files are dropped. Safe to repeat.
    pub(super) fn recover(&self) -> Result<(), StoreError> {
        let _lock = self.lock()?;
        let stages = self.state_path("stage");
        for entry in fs::read_dir(&stages).tried("list", &stages)? {
            self.recover_stage(&entry.tried("list", &stages)?.path())?;
        }
        let bases = self.state_path("base");
        for entry in fs::read_dir(&bases).tried("list", &bases)? {
            let path = entry.tried("list", &bases)?.path();
            if path.extension().is_some_and(|extension| extension == "new") {
                remove_tree(&path)?;
            }
        }
        self.collect(None, 0)
    }

    // `files` in a stage is one of: what had arrived; a complete set, recorded but not yet
    // switched in; or the generation that was switched out.
    fn recover_stage(&self, place: &Path) -> Result<(), StoreError> {
        let stage = Stage::at(place);
        let files = stage.files();
        let record = self
            .records()?
            .into_iter()
            .find(|record| Some(record.inode) == inode(&files));
        let Some(record) = record else {
            return if files.is_dir() {
                self.abandon(stage)
            } else {
                remove_tree(place)
            };
        };
        let newer = self
            .current(&record.name)?
            .filter(|current| current.generation > record.generation);
        if newer.is_some() {
            self.supersede(record, &files)?;
            return remove_tree(place);
        }
        self.forget(&record)?;
        let _ = fs::remove_file(files.join("parent"));
        self.abandon(stage)
    }

    fn forget(&self, record: &Record) -> Result<(), StoreError> {
        remove_tree(&self.set_path(record.id))
    }
}
