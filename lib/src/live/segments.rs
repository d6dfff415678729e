//! Shared segments that live in memory only, each found once for the whole tree.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

use rustix::fs::{SeekFrom, fstat, fstatfs, seek};
use rustix::io::Errno;

use super::error::unless_gone;
use super::maps::{Kind, Mapping, SegmentKind, is_memfd};
use super::proc::ProcDir;

/// A segment, opened for reading: it stays what it is when its last user goes.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) file: File,
    /// Bytes of it that CRIU would dump.
    pub(super) size: u64,
}

/// The segments of a tree, by the id that names of images use: the inode, which for System V
/// memory is the ipc id.
#[derive(Debug, Default)]
pub(super) struct Segments {
    found: BTreeMap<u64, Segment>,
}

impl Segments {
    /// Takes in the segment that `mapping` shows, if it shows one.
    pub(super) fn add_mapping(&mut self, dir: &ProcDir, mapping: &Mapping) -> io::Result<()> {
        let Kind::Segment(kind) = mapping.kind else {
            return Ok(());
        };
        // Of anonymous memory nobody can reach more than what is mapped somewhere.
        let reachable = match kind {
            SegmentKind::Anonymous => mapping.offset + (mapping.end - mapping.start),
            SegmentKind::Memfd | SegmentKind::SysV => u64::MAX,
        };
        if let Some(segment) = self.found.get_mut(&mapping.inode) {
            let size = fstat(&segment.file)?.st_size.cast_unsigned();
            segment.size = segment.size.max(reachable.min(size));
            return Ok(());
        }
        if let Some(file) = unless_gone(dir.file(mapping.file_name()))? {
            self.add(file, Some(mapping.inode), reachable)?;
        }
        Ok(())
    }

    /// Takes in the memfds that a process has open, mapped or not.
    pub(super) fn add_descriptors(&mut self, dir: &ProcDir) -> io::Result<()> {
        for number in unless_gone(dir.numbers("fd"))?.unwrap_or_default() {
            let name = format!("fd/{number}");
            let Some(target) = unless_gone(dir.link(&name))? else {
                continue;
            };
            if !target.to_str().is_some_and(is_memfd) {
                continue;
            }
            if let Some(file) = unless_gone(dir.file(Path::new(&name)))? {
                self.add(file, None, u64::MAX)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, file: File, inode: Option<u64>, reachable: u64) -> io::Result<()> {
        let stat = fstat(&file)?;
        // The mapping may have become another one meanwhile, and a file on a disk may be named
        // like a memfd.
        if inode.is_some_and(|inode| inode != stat.st_ino) || !lives_in_memory(&file)? {
            return Ok(());
        }
        let size = stat.st_size.cast_unsigned().min(reachable);
        self.found
            .entry(stat.st_ino)
            .or_insert(Segment { file, size });
        Ok(())
    }

    pub(super) fn into_all(self) -> BTreeMap<u64, Segment> {
        self.found
    }
}

impl Segment {
    /// The next bytes at or after `at` that are no hole. Reading only those fills none.
    pub(super) fn next_data(&self, at: u64) -> io::Result<Option<Range<u64>>> {
        if at >= self.size {
            return Ok(None);
        }
        let start = match seek(&self.file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let end = match seek(&self.file, SeekFrom::Hole(start)) {
            Ok(end) => end.min(self.size),
            // Truncated meanwhile.
            Err(Errno::NXIO) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        Ok((start < end).then_some(start..end))
    }
}

fn lives_in_memory(file: &File) -> io::Result<bool> {
    const TMPFS: u64 = 0x0102_1994;
    const HUGETLBFS: u64 = 0x9584_58f6;
    let kind = fstatfs(file)?.f_type.cast_unsigned();
    Ok(matches!(kind, TMPFS | HUGETLBFS))
}
