//! A receiving directory: published sets under their names, and what is remembered of them.
//!
//! ```text
//! DIR/NAME/                 the newest generation of a set: a plain image directory
//! DIR/.crxfer/sets/ID/      record and index of each set
//! DIR/.crxfer/base/ID/      a set that others build on: the same files by hard links, or moved here
//! DIR/.crxfer/stage/N/      a transfer under way: `about`, `files/`
//! DIR/.crxfer/partial/N/    what a transfer that ended early left: `about`, `files/`, `index`
//! DIR/.crxfer/sink          where the sets are, if not here but in the memory of a process
//! DIR/.crxfer/migrations/ID/ memory and images of a process tree that is on its way
//! ```
//! A set that another builds on gets a place of its own under `base`, and links lead there, never
//! to a name: names can be given to newer generations at any time. The one exception is a faithful
//! copy whose own link is `../NAME` and right as it is; before NAME changes, that link is moved.

mod error;
mod held;
mod index;
mod list;
mod pages;
mod place;
mod places;
mod record;
mod recover;
mod sound;
mod verify;

pub use error::StoreError;
pub(crate) use error::Tried;
pub use held::{Held, HeldSet};
pub use index::Index;
pub use list::StoredSet;
pub use pages::PAGES_STATE;
pub use place::locate;
pub use places::{NewSet, PublishedSet, Stage};
pub use record::Record;
pub use verify::{SetProblem, Verification};

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::UNIX_EPOCH;

use rustix::fs::FlockOperation;

use crate::digest::Digest;
use crate::sink::Sink;

const STATE: &str = ".crxfer";

/// One receiving directory. Cheap to clone; all clones share the same state.
#[derive(Clone, Debug)]
pub struct Store {
    // What is no set: key, journals, locks. The same as `root`, unless the sets are in memory.
    home: PathBuf,
    root: PathBuf,
    durable: bool,
    // Sets that transfers of this process read from: they are not removed meanwhile.
    in_use: Arc<Mutex<HashMap<PathBuf, usize>>>,
    // Where the sets are, as long as this lives.
    sink: Option<Arc<dyn Sink>>,
}

/// Keeps other `crxfer recv` away from the directory while it lives.
#[derive(Debug)]
pub struct ServingLock {
    _file: File,
    // Leads to what is gone with this process.
    pointer: Option<PathBuf>,
}

impl Drop for ServingLock {
    fn drop(&mut self) {
        if let Some(pointer) = &self.pointer {
            let _ = fs::remove_file(pointer);
        }
    }
}

impl Store {
    /// Opens the receiving directory at `root`, making it (mode 0700) where it does not exist.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        if !root.exists() {
            private_dirs(root)?;
        }
        make_parts(root)?;
        Self::open_here(root)
    }

    /// Opens a directory that has been a receiving directory before. Where a `crxfer recv` keeps its sets
    /// in memory, they are found there.
    pub fn open_existing(root: &Path) -> Result<Self, StoreError> {
        match Self::followed(root)? {
            Some(store) => Ok(store),
            None => Self::open_here(root),
        }
    }

    fn open_here(root: &Path) -> Result<Self, StoreError> {
        if !root.join(STATE).join("sets").is_dir() {
            return Err(match place::has_pointer(root) {
                true => StoreError::Gone(root.to_owned()),
                false => StoreError::NotAStore(root.to_owned()),
            });
        }
        let root = crate::sink::real_path(root).tried("find", root)?;
        let durable = crate::sys::is_durable(&root).tried("examine", &root)?;
        Ok(Self {
            home: root.clone(),
            root,
            durable,
            in_use: Arc::default(),
            sink: None,
        })
    }

    /// The receiving directory. Its sets may be elsewhere: [`root`](Self::root).
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// A file beside the sets: what outlives them where they are in memory.
    pub fn home_path(&self, name: &str) -> PathBuf {
        self.home.join(STATE).join(name)
    }

    /// Where the sets are.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether what is stored survives a power cut (it does not on tmpfs).
    pub fn is_durable(&self) -> bool {
        self.durable
    }

    /// A file of the store's own state.
    pub fn state_path(&self, name: &str) -> PathBuf {
        self.root.join(STATE).join(name)
    }

    /// Takes the directory for serving, and tidies up what an earlier process left.
    pub fn serve(&self) -> Result<ServingLock, StoreError> {
        let path = self.home_path("serving.lock");
        let file = File::create(&path).tried("create", &path)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(StoreError::Busy(self.home.clone())),
            other => other.tried("lock", &path)?,
        }
        self.recover()?;
        self.point()?;
        Ok(ServingLock {
            _file: file,
            pointer: self.pointer(),
        })
    }

    /// All sets, oldest first.
    pub fn records(&self) -> Result<Vec<Record>, StoreError> {
        let path = self.state_path("sets");
        let mut records = Vec::new();
        for entry in fs::read_dir(&path).tried("list", &path)? {
            let path = entry.tried("list", &path)?.path().join("record");
            match Record::load(&path) {
                Ok(record) => records.push(record),
                Err(error) => tracing::warn!("{error}; its set is left alone"),
            }
        }
        records.sort_by_key(|record| record.id);
        Ok(records)
    }

    /// The directory of the set, or `None` where it is gone.
    pub fn directory_of(&self, record: &Record) -> Option<PathBuf> {
        let base = self.base_path(record.id);
        if base.is_dir() {
            return Some(base);
        }
        self.named_directory(record)
    }

    // Where the set is to be seen under a name, if it is.
    fn named_directory(&self, record: &Record) -> Option<PathBuf> {
        let named = self.root.join(&record.name);
        if !record.name.is_empty() && directory_id(&named) == Some(record.directory_id) {
            return Some(named);
        }
        // Somebody may have renamed it.
        let entries = fs::read_dir(&self.root).ok()?;
        entries
            .flatten()
            .map(|entry| entry.path())
            .find(|path| directory_id(path) == Some(record.directory_id))
    }

    /// The set that has the name `name` now.
    pub fn current(&self, name: &str) -> Result<Option<Record>, StoreError> {
        let id = directory_id(&self.root.join(name));
        Ok(self
            .records()?
            .into_iter()
            .find(|record| Some(record.directory_id) == id))
    }

    /// The set of this peer that has the name `name` now, to build on.
    pub fn named_by(&self, name: &str, peer: &[u8; 32]) -> Result<Record, StoreError> {
        self.current(name)?
            .filter(|record| record.peer == *peer)
            .ok_or_else(|| StoreError::NoSuchSet(name.to_owned()))
    }

    /// How a set is called in messages: its name, or its number where that is another's by now.
    pub fn name_of(&self, id: u64) -> Result<String, StoreError> {
        let records = self.records()?;
        let named = records
            .iter()
            .find(|record| record.id == id && !record.superseded && !record.name.is_empty());
        Ok(named.map_or_else(|| format!("#{id}"), |record| record.name.clone()))
    }

    /// A set of this peer with the root digest `root` that can be built on, the newest if there are
    /// several.
    pub fn find_root(&self, peer: &[u8; 32], root: &Digest) -> Result<Option<Record>, StoreError> {
        let records = self.records()?;
        Ok(self.sound_set(&records, peer, root).cloned())
    }

    /// Which of these sets of a chain, the oldest first, can be built on. Those below the newest
    /// that can are not looked at: it needs them all.
    pub fn find_chain(&self, peer: &[u8; 32], roots: &[Digest]) -> Result<Vec<bool>, StoreError> {
        let records = self.records()?;
        let newest = roots
            .iter()
            .rposition(|root| self.sound_set(&records, peer, root).is_some());
        Ok((0..roots.len())
            .map(|place| newest.is_some_and(|newest| place <= newest))
            .collect())
    }

    fn sound_set<'a>(
        &self,
        records: &'a [Record],
        peer: &[u8; 32],
        root: &Digest,
    ) -> Option<&'a Record> {
        records
            .iter()
            .rev()
            .filter(|record| record.root == *root && record.peer == *peer)
            .find(|record| self.is_sound(record, records))
    }

    /// The index of a set's blocks.
    pub fn index(&self, id: u64) -> Result<Index, StoreError> {
        let path = self.set_path(id).join("index");
        Index::open(&path).tried("open", &path)
    }

    fn base_path(&self, id: u64) -> PathBuf {
        self.state_path("base").join(id.to_string())
    }

    fn set_path(&self, id: u64) -> PathBuf {
        self.state_path("sets").join(id.to_string())
    }

    // Held while names, records and places change; other processes (`crxfer rm`) wait.
    fn lock(&self) -> Result<File, StoreError> {
        let path = self.state_path("lock");
        let file = File::create(&path).tried("create", &path)?;
        rustix::fs::flock(&file, FlockOperation::LockExclusive).tried("lock", &path)?;
        Ok(file)
    }

    fn sync_dir(&self, path: &Path) -> Result<(), StoreError> {
        if self.durable {
            File::open(path)
                .and_then(|dir| dir.sync_all())
                .tried("sync", path)?;
        }
        Ok(())
    }

    fn is_in_use(&self, place: &Path) -> bool {
        self.in_use
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains_key(place)
    }
}

// By which a directory is known under whichever name. The inode's number alone is not enough: it
// is given again as soon as somebody has removed the directory by hand, and then a foreign one would
// be taken for a set. Where the file system keeps no birth times, the number has to do.
fn directory_id(path: &Path) -> Option<u64> {
    let meta = fs::symlink_metadata(path)
        .ok()
        .filter(fs::Metadata::is_dir)?;
    let born = meta.created().ok();
    let Some(born) = born.and_then(|born| born.duration_since(UNIX_EPOCH).ok()) else {
        return Some(meta.ino());
    };
    let text = [meta.ino().to_le_bytes(), born.as_secs().to_le_bytes()].concat();
    let digest = Digest::of(&[text.as_slice(), &born.subsec_nanos().to_le_bytes()].concat());
    let (low, _) = digest.0.split_first_chunk::<8>()?;
    Some(u64::from_le_bytes(*low))
}

fn make_parts(root: &Path) -> Result<(), StoreError> {
    let mut parts = ["", "sets", "base", "stage", "partial"].iter();
    parts.try_for_each(|part| private_dirs(&root.join(STATE).join(part)))
}

fn private_dirs(path: &Path) -> Result<(), StoreError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .tried("create", path)
}

#[cfg(test)]
mod tests;
