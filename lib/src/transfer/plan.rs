//! The directories to send: the one that was asked for and those that it builds on.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use rustix::fs::SeekFrom;

use super::TransferError;
use super::memo::Memo;
use crate::delta::{FileMeta, FileName, SetName};
use crate::digest::{Digest, hash_blocks, zero_digest};
use crate::image::{Chain, Completeness, FileStat, ImageDir, ImageError, Inventory, Listing};
use crate::page::PageSize;
use crate::session::{SessionError, SetLeaves, SetPlan};
use crate::wire::limits;

/// Files that stay open while a set is read; image directories can have 100,000.
const OPEN_FILES: usize = 128;

/// One directory that is being sent.
#[derive(Debug)]
pub(super) struct SourceSet {
    dir: ImageDir,
    listing: Listing,
    pub(super) files: Vec<FileMeta>,
    open: Mutex<Vec<(u32, Arc<File>)>>,
}

impl SourceSet {
    fn open(dir: ImageDir, page_size: PageSize) -> Result<Self, TransferError> {
        let listing = dir.list()?;
        if listing.files.len() > limits::FILES as usize {
            let (directory, limit) = (dir.path().to_owned(), limits::FILES as usize);
            return Err(ImageError::TooManyFiles { directory, limit }.into());
        }
        let mut files = Vec::with_capacity(listing.files.len());
        for file in &listing.files {
            let mode = u16::try_from(file.stat.mode & 0o777).expect("nine bits");
            files.push(FileMeta::new(
                FileName::new(&file.name)?,
                mode,
                file.stat.size,
                page_size,
            ));
        }
        Ok(Self {
            dir,
            listing,
            files,
            open: Mutex::default(),
        })
    }

    /// Reads `range` of file number `file`; `None` if all of it is a hole.
    pub(super) fn read(
        &self,
        file: u32,
        range: std::ops::Range<u64>,
    ) -> Result<Option<Vec<u8>>, TransferError> {
        let mut buffer = Vec::new();
        Ok(self.read_into(&mut buffer, file, range)?.then_some(buffer))
    }

    // Reads `range` of file number `file`; false, and nothing in `buffer`, if all of it is a hole.
    fn read_into(
        &self,
        buffer: &mut Vec<u8>,
        file: u32,
        range: std::ops::Range<u64>,
    ) -> Result<bool, TransferError> {
        buffer.clear();
        let handle = self.file(file)?;
        let info = &self.listing.files[file as usize];
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::UnexpectedEof => SessionError::Changed(info.name.clone()).into(),
            _ => TransferError::Read {
                path: self.dir.path().join(&info.name),
                source,
            },
        };
        if info.stat.allocated < info.stat.size && is_hole(&handle, &range) {
            return Ok(false);
        }
        let len = usize::try_from(range.end - range.start).expect("a segment fits into memory");
        buffer.resize(len, 0);
        handle.read_exact_at(buffer, range.start).map_err(failed)?;
        Ok(true)
    }

    fn file(&self, file: u32) -> Result<Arc<File>, TransferError> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, handle)) = open.iter().find(|(number, _)| *number == file) {
            return Ok(handle.clone());
        }
        let handle = Arc::new(
            self.dir
                .open_file(&self.listing.files[file as usize].name)?,
        );
        if open.len() >= OPEN_FILES {
            open.remove(0);
        }
        open.push((file, handle.clone()));
        Ok(handle)
    }

    /// Whether every file is still what it was when it was listed.
    pub(super) fn check_unchanged(&self) -> Result<(), TransferError> {
        let now = self.dir.list()?;
        let mut left = now.files.iter();
        for file in &self.listing.files {
            match left.next() {
                Some(found) if found.name == file.name && same(&found.stat, &file.stat) => {}
                _ => return Err(SessionError::Changed(file.name.clone()).into()),
            }
        }
        match left.next() {
            Some(new) => Err(SessionError::Changed(new.name.clone()).into()),
            None => Ok(()),
        }
    }

    fn recall(&self, memo: &Memo) -> Option<SetLeaves> {
        memo.recall(self.dir.path(), &self.listing, &self.files)
    }

    #[expect(clippy::disallowed_methods, reason = "compared with the files' times")]
    fn recall_or_digest(&self, memo: &Memo) -> Result<SetLeaves, TransferError> {
        if let Some(leaves) = self.recall(memo) {
            return Ok(leaves);
        }
        let begun = SystemTime::now();
        let leaves = self.leaves()?;
        self.remember(memo, begun, &leaves);
        Ok(leaves)
    }

    /// Remembers digests that were computed after `begun`.
    pub(super) fn remember(&self, memo: &Memo, begun: SystemTime, leaves: &[Vec<Digest>]) {
        memo.remember(self.dir.path(), begun, &self.listing, &self.files, leaves);
    }

    /// Remembered digests turned out wrong.
    pub(super) fn forget(&self, memo: &Memo) {
        memo.forget(self.dir.path());
    }

    /// Digests of all blocks of all files, with every core.
    fn leaves(&self) -> Result<SetLeaves, TransferError> {
        let jobs: Vec<_> = (0u32..)
            .zip(&self.files)
            .flat_map(|(file, meta)| (0..meta.segments()).map(move |segment| (file, segment)))
            .collect();
        let digests = super::files::in_parallel(&jobs, |&(file, segment)| {
            self.digest_segment(file, segment)
        })?;
        let mut leaves: Vec<_> = self.files.iter().map(|_| Vec::new()).collect();
        for (&(file, _), digests) in jobs.iter().zip(digests) {
            leaves[file as usize].extend(digests);
        }
        Ok(leaves)
    }

    /// The bytes of one segment (`None`: a hole) and the digests of its blocks.
    pub(super) fn scan(
        &self,
        file: u32,
        segment: u64,
    ) -> Result<(Option<Vec<u8>>, Vec<Digest>), TransferError> {
        let range = self.files[file as usize].segment_range(segment);
        let bytes = self.read(file, self.files[file as usize].bytes_of(&range))?;
        let digests = self.digests(file, range, bytes.as_deref());
        Ok((bytes, digests))
    }

    /// The digests of a segment's blocks alone. The bytes pass through one buffer of the thread:
    /// fresh memory for each MiB would cost as much as hashing it.
    pub(super) fn digest_segment(
        &self,
        file: u32,
        segment: u64,
    ) -> Result<Vec<Digest>, TransferError> {
        thread_local! {
            static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        let range = self.files[file as usize].segment_range(segment);
        BUFFER.with_borrow_mut(|buffer| {
            let bytes = self.files[file as usize].bytes_of(&range);
            let bytes = self.read_into(buffer, file, bytes)?.then_some(&**buffer);
            Ok(self.digests(file, range, bytes))
        })
    }

    fn digests(
        &self,
        file: u32,
        blocks: std::ops::Range<u64>,
        bytes: Option<&[u8]>,
    ) -> Vec<Digest> {
        let meta = &self.files[file as usize];
        let mut digests = Vec::new();
        match bytes {
            Some(bytes) => hash_blocks(bytes, meta.block_len as usize, &mut digests),
            None => digests.extend(blocks.map(|block| zero_digest(meta.block_bytes(block)))),
        }
        digests
    }
}

// How much space a file takes can change by itself, when the file system gets round to writing.
fn same(a: &FileStat, b: &FileStat) -> bool {
    FileStat { allocated: 0, ..*a } == FileStat { allocated: 0, ..*b }
}

fn is_hole(file: &File, range: &std::ops::Range<u64>) -> bool {
    match rustix::fs::seek(file, SeekFrom::Data(range.start)) {
        Ok(data) => data >= range.end,
        Err(rustix::io::Errno::NXIO) => true,
        Err(_) => false,
    }
}

/// The sets of one transfer, the oldest ancestor first, and their plan.
pub(super) fn plan(
    directory: &Path,
    name: Option<SetName>,
    base_name: Option<SetName>,
    page_size: Option<PageSize>,
    memo: &Memo,
) -> Result<(Vec<SourceSet>, Vec<SetPlan>), TransferError> {
    let chain = Chain::open(directory, page_size)?;
    if let damaged @ Completeness::Damaged(_) = chain.completeness() {
        return Err(TransferError::Incomplete {
            directory: directory.to_owned(),
            what: damaged.to_string(),
        });
    }
    let name = name.map_or_else(|| SetName::new(own_name(directory)), Ok)?;
    let page_size = chain.page_size();
    let mut sets = Vec::new();
    let mut plans = Vec::new();
    for level in (0..chain.levels().len()).rev() {
        let dir = chain.open_dir(level)?;
        let is_last = level == 0;
        let ancestor_name = SetName::new(own_name(dir.path())).unwrap_or_else(|_| name.clone());
        let image_version = image_version(&dir)?;
        let set = SourceSet::open(dir, page_size)?;
        plans.push(SetPlan {
            name: if is_last { name.clone() } else { ancestor_name },
            page_size,
            image_version,
            parent_link: set.listing.parent.as_ref().map(|link| link.text.clone()),
            files: set.files.clone(),
            base_name: base_name.clone().filter(|_| is_last),
            leaves: if is_last {
                set.recall(memo)
            } else {
                Some(set.recall_or_digest(memo)?)
            },
        });
        sets.push(set);
    }
    Ok((sets, plans))
}

fn image_version(dir: &ImageDir) -> Result<u32, TransferError> {
    const INVENTORY_LIMIT: u64 = 1 << 20;
    let bytes = dir.read_optional("inventory.img", INVENTORY_LIMIT)?;
    Ok(bytes
        .map(|bytes| Inventory::parse(&bytes, "inventory.img"))
        .transpose()?
        .map_or(0, |it| it.img_version))
}

fn own_name(directory: &Path) -> String {
    let path = std::fs::canonicalize(directory).unwrap_or_else(|_| PathBuf::from(directory));
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}
