//! A store whose sets are elsewhere than its directory: in the memory of a `crxfer recv`.
//!
//! The directory keeps what is no set (key, journals, locks) and a pointer, `.crxfer/sink`, which says which
//! processes hold the sets. Other commands follow it, so that they take the directory's name as ever.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use std::os::fd::AsRawFd as _;

use super::error::{StoreError, Tried as _};
use super::record::write_atomically;
use super::{STATE, Store, make_parts, private_dirs};
use crate::sink::{Holder, Sink};

/// What leads to the sets, in the directory's state.
const POINTER: &str = "sink";

/// A pointer is a few hundred bytes.
const MOST_BYTES: u64 = 64 << 10;

impl Store {
    /// Opens the receiving directory at `home`, made where it does not exist, with its sets in `sink`,
    /// which lives as long as the store. Others find them from when it is [served](Store::serve).
    pub fn open_over(home: &Path, sink: Arc<dyn Sink>) -> Result<Self, StoreError> {
        if !home.exists() {
            private_dirs(home)?;
        }
        private_dirs(&home.join(STATE))?;
        make_parts(sink.path())?;
        let home = fs::canonicalize(home).tried("find", home)?;
        Ok(Self {
            home,
            root: sink.path().to_owned(),
            durable: sink.is_durable(),
            in_use: Arc::default(),
            sink: Some(sink),
        })
    }

    // Where the sets of that directory are in memory, as long as somebody holds them.
    pub(super) fn followed(home: &Path) -> Result<Option<Self>, StoreError> {
        let Some(root) = pointed_at(home)? else {
            return Ok(None);
        };
        Ok(Some(Self {
            home: fs::canonicalize(home).tried("find", home)?,
            durable: crate::sys::is_durable(&root).tried("examine", &root)?,
            root,
            in_use: Arc::default(),
            sink: None,
        }))
    }

    /// Leads others to the sets, or to the directory itself. Only by whoever has the serving lock.
    pub(super) fn point(&self) -> Result<(), StoreError> {
        let path = self.home_path(POINTER);
        let descriptor = self.sink.as_ref().and_then(|sink| sink.descriptor());
        let Some(descriptor) = descriptor else {
            return match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    Err(error).tried("remove", &path)
                }
                _ => Ok(()),
            };
        };
        let holders: Vec<_> = Holder::here(descriptor.as_raw_fd()).into_iter().collect();
        let text = serde_json::to_vec(&holders).expect("plain data is JSON");
        write_atomically(&path, &text, false)
    }

    pub(super) fn pointer(&self) -> Option<PathBuf> {
        self.sink.as_ref().map(|_| self.home_path(POINTER))
    }
}

/// Whether sets of `home` were in memory, wherever they are now.
pub(super) fn has_pointer(home: &Path) -> bool {
    home.join(STATE).join(POINTER).exists()
}

/// Where the sets of the receiving directory `home` are, if not there.
fn pointed_at(home: &Path) -> Result<Option<PathBuf>, StoreError> {
    let path = home.join(STATE).join(POINTER);
    let text = match fs::metadata(&path) {
        Err(_) => return Ok(None),
        Ok(file) if file.len() > MOST_BYTES => return Ok(None),
        Ok(_) => fs::read(&path).tried("read", &path)?,
    };
    // One of a later version leads nowhere that is known here.
    let holders: Vec<Holder> = serde_json::from_slice(&text).unwrap_or_default();
    let found = Holder::find(&holders, Path::new(STATE));
    let found = found.map_err(|why| StoreError::Unseen {
        path: home.to_owned(),
        why,
    })?;
    Ok(found.and_then(|state| Some(state.parent()?.to_owned())))
}

/// Where the image directory `path` is: as it says, or where the sets of its receiving directory are kept
/// in memory, there.
pub fn locate(path: &Path) -> Result<PathBuf, StoreError> {
    let parts = || {
        let home = path.parent().map(|home| match home.as_os_str().is_empty() {
            true => Path::new("."),
            false => home,
        });
        Some((home?, path.file_name()?))
    };
    if path.exists() {
        return Ok(path.to_owned());
    }
    let Some((home, name)) = parts() else {
        return Ok(path.to_owned());
    };
    let inside = pointed_at(home)?.map(|root| root.join(name));
    Ok(inside
        .filter(|inside| inside.exists())
        .unwrap_or_else(|| path.to_owned()))
}
