//! A file of the dump that is no memory.

use std::fs::{self, File, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::StandbyError;
use crate::delta::{FileMeta, FileName, file_digest};
use crate::digest::{Digest, VerifiedRun};
use crate::page::PageSize;
use crate::store::Tried as _;
use crate::wire::{Op, limits};

/// A file that arrives in frames, each segment once, in order.
///
/// Whoever writes holds the descriptor, for one file at a time: a tree of a thousand processes has
/// more images than a process may have descriptors.
#[derive(Debug)]
pub(super) struct ArrivingFile {
    meta: FileMeta,
    path: PathBuf,
    blocks: Vec<Digest>,
}

impl ArrivingFile {
    pub(super) fn create(
        path: &Path,
        name: FileName,
        mode: u16,
        size: u64,
        page: PageSize,
    ) -> Result<(Self, File), StandbyError> {
        let meta = FileMeta::new(name, mode, size, page);
        if meta.is_pages() {
            return Err(StandbyError::Protocol("memory that is sent as a file"));
        }
        if meta.blocks() > limits::BLOCKS_PER_FILE {
            return Err(StandbyError::Protocol("a file of that size"));
        }
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .tried("create", path)?;
        let arriving = Self {
            meta,
            path: path.to_owned(),
            blocks: Vec::new(),
        };
        Ok((arriving, file))
    }

    /// The file, for [`ArrivingFile::write`].
    pub(super) fn open(&self) -> Result<File, StandbyError> {
        let file = OpenOptions::new().write(true).open(&self.path);
        Ok(file.tried("open", &self.path)?)
    }

    pub(super) fn block_len(&self) -> usize {
        self.meta.block_len as usize
    }

    /// Writes one segment; gives the bytes written.
    pub(super) fn write(
        &mut self,
        file: &File,
        segment: u64,
        ops: &[Op],
        run: &VerifiedRun,
    ) -> Result<u64, StandbyError> {
        let is_next = segment < self.meta.segments()
            && self.blocks.len() as u64 == self.meta.segment_range(segment).start;
        if !is_next {
            return Err(StandbyError::Protocol("a part of a file out of order"));
        }
        let blocks = self.meta.segment_range(segment);
        let bytes = self.meta.bytes_of(&blocks);
        let is_whole =
            matches!(ops, [Op::Literal(count)] if u64::from(*count) == blocks.end - blocks.start);
        if !is_whole || run.bytes().len() as u64 != bytes.end - bytes.start {
            return Err(StandbyError::Protocol("a part of a file that is not whole"));
        }
        file.write_all_at(run.bytes(), bytes.start)
            .tried("write", &self.path)?;
        self.blocks.extend_from_slice(run.digests());
        Ok(bytes.end - bytes.start)
    }

    /// Name, mode and digest, when all of it is there.
    pub(super) fn finish(&mut self) -> Result<(String, u16, Digest), StandbyError> {
        if self.blocks.len() as u64 != self.meta.blocks() {
            return Err(StandbyError::Protocol("a file that is not whole"));
        }
        let mode = self.meta.mode;
        fs::set_permissions(&self.path, Permissions::from_mode(u32::from(mode)))
            .tried("set the mode of", &self.path)?;
        let digest = file_digest(&self.meta, &self.blocks);
        Ok((self.meta.name.to_string(), mode, digest))
    }
}
