//! A file system in memory that nobody sees.
//!
//! It is a tmpfs of its own that is never attached to a directory: no process has it in its mount table,
//! no path but `/proc/PID/fd/N` leads there, and it is gone, with all that is in it, when the last
//! descriptor is. That holds whatever ends the processes that have one, SIGKILL included.

use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen,
};

use super::{Sink, SinkError, SinkKind, holder};

/// A private tmpfs, held by a descriptor.
#[derive(Debug)]
pub struct Memory {
    mount: OwnedFd,
    path: PathBuf,
    swaps: bool,
}

impl Memory {
    /// Makes one that takes at most `bytes` bytes. Nothing is taken before something is written.
    pub fn create(bytes: u64) -> Result<Self, SinkError> {
        // Since Linux 6.4. In a swap partition the memory of the workload would outlive all of this.
        let (mount, swaps) = match attempt(bytes, true) {
            Ok(mount) => (mount, false),
            Err(_) => (attempt(bytes, false)?, true),
        };
        Ok(Self {
            path: holder::path_of(holder::own_pid(), mount.as_raw_fd()),
            mount,
            swaps,
        })
    }

    /// Whether the kernel may write parts of it to swap space, for it knows no other way.
    pub fn may_be_swapped(&self) -> bool {
        self.swaps
    }
}

fn attempt(bytes: u64, noswap: bool) -> Result<OwnedFd, SinkError> {
    let failed = |call| {
        move |error: rustix::io::Errno| SinkError::Kernel {
            call,
            source: error.into(),
        }
    };
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("fsopen"))?;
    // A limit of 0 bytes would be none at all.
    let size = bytes.max(1).to_string();
    for (name, value) in [("size", size.as_str()), ("mode", "0700")] {
        fsconfig_set_string(context.as_fd(), name, value).map_err(failed("fsconfig"))?;
    }
    if noswap {
        fsconfig_set_flag(context.as_fd(), "noswap").map_err(failed("fsconfig"))?;
    }
    fsconfig_create(context.as_fd()).map_err(failed("fsconfig"))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(failed("fsmount"))
}

impl Sink for Memory {
    fn kind(&self) -> SinkKind {
        SinkKind::Memory
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn is_durable(&self) -> bool {
        false
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.mount.as_fd())
    }
}
