//! Where a host keeps image directories: on a disk, on a tmpfs, or in memory that only descriptors hold.
//!
//! A sink only has a place. What is put there is written as in any directory, below [`Sink::path`];
//! what differs is who can see it, what survives, and how much fits.

mod directory;
mod holder;
mod memory;
#[cfg(test)]
mod tests;

pub use directory::{Disk, Tmpfs};
pub use holder::{Holder, Unseen, real_path};
pub use memory::Memory;

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

/// A place for image directories. It is there for as long as this value is.
pub trait Sink: fmt::Debug + Send + Sync {
    /// Which kind.
    fn kind(&self) -> SinkKind;

    /// The directory. It leads there in this process, and in every other of the same pid namespace
    /// that may look at this one: hooks, `criu restore -D`, other commands of crxfer's.
    ///
    /// Do not canonicalize it: the path of [`Memory`] is a link of the kernel's that says where it
    /// leads only when it is followed ([`real_path`]).
    fn path(&self) -> &Path;

    /// Whether what is synced survives a power cut. Where it does not, syncing is a waste of time.
    fn is_durable(&self) -> bool;

    /// Brings the names in a directory of the sink to disk, where it is durable.
    fn sync_directory(&self, path: &Path) -> io::Result<()> {
        if self.is_durable() {
            std::fs::File::open(path)?.sync_all()?;
        }
        Ok(())
    }

    /// How many bytes may be written before it is full.
    fn room(&self) -> io::Result<u64> {
        let room = rustix::fs::statvfs(self.path())?;
        Ok(room.f_bavail.saturating_mul(room.f_frsize))
    }

    /// What another process must hold so that the sink outlives this one; `None` where it does anyway.
    fn descriptor(&self) -> Option<BorrowedFd<'_>>;
}

/// The kinds of sinks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SinkKind {
    /// A directory as it is.
    #[default]
    Disk,
    /// A directory that must be on a tmpfs.
    Tmpfs,
    /// No directory: a private file system in memory.
    Memory,
}

impl SinkKind {
    /// As the command line has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Tmpfs => "tmpfs",
            Self::Memory => "memory",
        }
    }
}

/// Why there is no such sink here.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// The directory is on a disk.
    #[error("{} is not on a tmpfs; name a directory below /run or /dev/shm, or take another sink", .0.display())]
    NotTmpfs(PathBuf),
    /// The directory cannot be used.
    #[error("cannot {what} {}: {source}", path.display())]
    Directory {
        /// What was tried.
        what: &'static str,
        /// On which directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The kernel does not make a private file system.
    #[error(
        "cannot make a file system in memory ({call}): {source}; it needs root and Linux 5.2 or later: run as root, or keep images in a directory (--mode disk, --sink disk)"
    )]
    Kernel {
        /// Which system call.
        call: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The images would not leave room for what they are of.
    #[error("the images may take {} MiB of memory and only {} MiB may be used for them; free memory, raise --sink-size, or keep them in a directory (--mode disk, --sink disk)", mebi(*needed), mebi(*available))]
    TooLarge {
        /// Bytes that are needed.
        needed: u64,
        /// Bytes that may be used.
        available: u64,
    },
}

fn mebi(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}
