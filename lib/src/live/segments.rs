//! Shared segments that live in memory only, each found once for the whole tree.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use rustix::fs::{SeekFrom, fstat, fstatfs, seek};
use rustix::io::Errno;

use super::error::unless_gone;
use super::maps::{Mapping, is_memfd};
use super::proc::ProcDir;

/// A segment, opened for reading: it stays what it is when its last user goes.
#[derive(Debug)]
pub(super) struct Segment {
    /// What names of images use: the inode, which for System V memory is the ipc id.
    pub(super) id: u64,
    pub(super) file: Arc<File>,
    pub(super) size: u64,
}

/// The segments of a tree that were found so far.
#[derive(Debug, Default)]
pub(super) struct Segments {
    found: BTreeSet<u64>,
}

impl Segments {
    /// The segment that `mapping` shows, unless it was found before.
    pub(super) fn of_mapping(
        &mut self,
        dir: &ProcDir,
        mapping: &Mapping,
    ) -> io::Result<Option<Segment>> {
        if !mapping.is_segment || self.found.contains(&mapping.inode) {
            return Ok(None);
        }
        let file = unless_gone(dir.file(mapping.file_name()))?;
        let segment = file.map(Segment::new).transpose()?.flatten();
        // The mapping may have become another one meanwhile.
        Ok(segment.filter(|segment| segment.id == mapping.inode && self.found.insert(segment.id)))
    }

    /// The memfd behind descriptor `number`, mapped or not, unless it is none or was found before.
    pub(super) fn of_descriptor(
        &mut self,
        dir: &ProcDir,
        number: u32,
    ) -> io::Result<Option<Segment>> {
        let name = format!("fd/{number}");
        let target = unless_gone(dir.link(&name))?;
        if !target.is_some_and(|target| target.to_str().is_some_and(is_memfd)) {
            return Ok(None);
        }
        let file = unless_gone(dir.file(&name))?;
        let segment = file.map(Segment::new).transpose()?.flatten();
        Ok(segment.filter(|segment| self.found.insert(segment.id)))
    }
}

impl Segment {
    /// `None` for a file on a disk: it may be named like a memfd.
    fn new(file: File) -> io::Result<Option<Self>> {
        const TMPFS: u64 = 0x0102_1994;
        const HUGETLBFS: u64 = 0x9584_58f6;
        let kind = fstatfs(&file)?.f_type.cast_unsigned();
        if !matches!(kind, TMPFS | HUGETLBFS) {
            return Ok(None);
        }
        let stat = fstat(&file)?;
        Ok(Some(Self {
            id: stat.st_ino,
            file: Arc::new(file),
            size: stat.st_size.cast_unsigned(),
        }))
    }

    /// The next bytes at or after `at` that are no hole. Reading only those fills none.
    pub(super) fn next_data(&self, at: u64) -> io::Result<Option<Range<u64>>> {
        if at >= self.size {
            return Ok(None);
        }
        let start = match seek(&*self.file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let end = match seek(&*self.file, SeekFrom::Hole(start)) {
            Ok(end) => end.min(self.size),
            // Truncated meanwhile.
            Err(Errno::NXIO) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        Ok((start < end).then_some(start..end))
    }
}
