//! Directories that are there for everybody.

use std::fs;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use super::{Sink, SinkError, SinkKind};

/// A directory. On a file system that lasts, everything is synced before it is acknowledged.
#[derive(Clone, Debug)]
pub struct Disk {
    path: PathBuf,
    durable: bool,
}

impl Disk {
    /// The directory at `path`; made, with mode 0700, where it does not exist.
    pub fn open(path: &Path) -> Result<Self, SinkError> {
        let failed = |what| {
            move |source| SinkError::Directory {
                what,
                path: path.to_owned(),
                source,
            }
        };
        if !path.is_dir() {
            let mut private = fs::DirBuilder::new();
            let made = private.recursive(true).mode(0o700).create(path);
            made.map_err(failed("create"))?;
        }
        let durable = crate::sys::is_durable(path).map_err(failed("examine"))?;
        Ok(Self {
            path: path.to_owned(),
            durable,
        })
    }
}

impl Sink for Disk {
    fn kind(&self) -> SinkKind {
        SinkKind::Disk
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn is_durable(&self) -> bool {
        self.durable
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// A directory on a tmpfs: nothing is synced, and nothing survives a crash of the host.
#[derive(Clone, Debug)]
pub struct Tmpfs(Disk);

impl Tmpfs {
    /// The directory at `path`; made, with mode 0700, where it does not exist. Refused where it is on
    /// anything but a tmpfs.
    pub fn open(path: &Path) -> Result<Self, SinkError> {
        let existed = path.is_dir();
        let directory = Disk::open(path)?;
        if directory.is_durable() {
            if !existed {
                // Its parents, where those were missing too, are empty directories on a disk.
                let _ = fs::remove_dir(path);
            }
            return Err(SinkError::NotTmpfs(path.to_owned()));
        }
        Ok(Self(directory))
    }
}

impl Sink for Tmpfs {
    fn kind(&self) -> SinkKind {
        SinkKind::Tmpfs
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn is_durable(&self) -> bool {
        false
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
