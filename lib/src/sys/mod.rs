//! System calls that have no safe wrapper, and the few places where `unsafe` is allowed.
#![allow(
    unsafe_code,
    reason = "this module is where it belongs; each block says why it is sound"
)]

mod scan;
mod socket;
mod spawn;

use std::fs::File;
use std::io;
use std::path::Path;

pub(crate) use scan::{Region, Wanted, category, pagemap_scan, same_memory};
pub(crate) use socket::{end_tcp_repair, is_in_tcp_repair};
#[cfg(feature = "net")]
pub(crate) use spawn::own_session;
pub(crate) use spawn::pass_descriptors;

/// A file of our own, mapped read-only.
#[derive(Debug)]
pub(crate) struct Map(memmap2::Mmap);

impl Map {
    /// Maps `file`, which nothing may truncate or write while the map lives: it must be one that
    /// this program published by rename and never writes again.
    pub(crate) fn of_published_file(file: &File) -> io::Result<Self> {
        // SAFETY: the bytes of a map must not change while they are borrowed. Callers map only
        // index files in the store's private directory (mode 0700), which are complete before
        // they are renamed into place and are afterwards only ever unlinked, never written.
        unsafe { memmap2::Mmap::map(file) }.map(Self)
    }

    /// The bytes of the file.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Whether files under `path` survive a power cut: they do not on tmpfs and ramfs, where syncing
/// is a waste of time.
pub(crate) fn is_durable(path: &Path) -> io::Result<bool> {
    const TMPFS: u64 = 0x0102_1994;
    const RAMFS: u64 = 0x8584_58f6;
    Ok(!matches!(file_system(path)?, TMPFS | RAMFS))
}

/// Whether `path` lies on a file system that other hosts may write to.
#[cfg(feature = "net")]
pub(crate) fn is_remote(path: &Path) -> io::Result<bool> {
    const NFS: u64 = 0x6969;
    const SMB2: u64 = 0xfe53_4d42;
    const CIFS: u64 = 0xff53_4d42;
    const CEPH: u64 = 0x00c3_6400;
    const FUSE: u64 = 0x6573_5546;
    const V9FS: u64 = 0x0102_1997;
    Ok(matches!(
        file_system(path)?,
        NFS | SMB2 | CIFS | CEPH | FUSE | V9FS
    ))
}

// The kernel's magic number; the field is signed on some architectures.
fn file_system(path: &Path) -> io::Result<u64> {
    Ok(rustix::fs::statfs(path)?.f_type.cast_unsigned())
}
