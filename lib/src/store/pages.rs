//! Sets that come from page sessions: memory without the rest, generation by generation.

use std::fs::{self, File};
use std::io;

use super::Store;
use super::error::{StoreError, Tried};

/// The state of a set that only has memory yet: what CRIU sent to a page server.
pub const PAGES_STATE: &str = "pages";

// Beside a set's record: a dump that was to build on the set has begun, and may have been lost.
const DUMP_BEGUN: &str = "dump-begun";

impl Store {
    /// A dump that builds on the set number `id` may begin now. True if none has begun before.
    ///
    /// A dump that CRIU takes resets the kernel's tracking of changes. If it is lost on its way, then
    /// what the kernel calls unchanged afterwards is not what the set has.
    pub fn begin_dump_on(&self, id: u64) -> Result<bool, StoreError> {
        let path = self.set_path(id).join(DUMP_BEGUN);
        match File::create_new(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(false),
            other => drop(other.tried("create", &path)?),
        }
        self.sync_dir(&self.set_path(id))?;
        Ok(true)
    }

    /// The dump that was announced has not begun.
    pub fn withdraw_dump_on(&self, id: u64) {
        // Where it stays, the next dump is whole.
        let _ = fs::remove_file(self.set_path(id).join(DUMP_BEGUN));
    }
}
