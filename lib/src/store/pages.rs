//! Sets that come from page sessions: memory without the rest, generation by generation.
//!
//! A dump that CRIU takes resets the kernel's tracking of changes. What the kernel calls unchanged at
//! the next one is what a stored set has only if that set holds the dump before it. Such a set is
//! *tracked*: a file beside its record says so, and goes when the next dump begins, which may be lost.

use std::fs::{self, File};
use std::io;

use super::Store;
use super::error::{StoreError, Tried};

/// The state of a set that only has memory yet: what CRIU sent to a page server.
pub const PAGES_STATE: &str = "pages";

const TRACKED: &str = "tracked";

impl Store {
    /// Whether changes are tracked from the dump on that the set number `id` holds.
    pub fn is_tracked(&self, id: u64) -> bool {
        self.set_path(id).join(TRACKED).exists()
    }

    /// A dump that builds on the set number `id` may begin now: the set is not tracked any more.
    /// Whether it was.
    pub fn untrack(&self, id: u64) -> Result<bool, StoreError> {
        let path = self.set_path(id).join(TRACKED);
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            other => {
                other.tried("remove", &path)?;
                self.sync_dir(&self.set_path(id))?;
                Ok(true)
            }
        }
    }

    /// The set number `id` is tracked: it was stored just now, or the dump that was announced has
    /// not begun.
    pub fn track(&self, id: u64) -> Result<(), StoreError> {
        let path = self.set_path(id).join(TRACKED);
        File::create(&path).tried("create", &path).map(drop)
    }
}
