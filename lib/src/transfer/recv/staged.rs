//! The files of a set that is arriving.

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use super::Shared;
use super::serve::Frame;
use crate::delta::FileMeta;
use crate::delta::codec::Decompressor;
use crate::digest::{Digest, VerifiedRun};
use crate::session::SessionError;
use crate::store::{Held, Stage, Store, Tried as _};
use crate::transfer::TransferError;
use crate::wire::{BeginSet, Codec};

/// Bytes after which what arrived is pushed to disk, where the place is durable.
const SYNC_STEP: u64 = 32 << 20;

/// Staged files that stay open.
const OPEN_FILES: usize = 128;

/// The files of a set that is arriving. What arrived is kept for the next attempt when this is
/// dropped without having been published.
#[derive(Debug)]
pub(super) struct Staged {
    store: Store,
    stage: Mutex<Option<Stage>>,
    pub(super) directory: PathBuf,
    files: Vec<FileMeta>,
    open: Mutex<Vec<(u32, Arc<File>)>>,
    written: AtomicU64,
}

impl Staged {
    pub(super) fn prepare(
        shared: &Shared,
        peer: &[u8; 32],
        begin: &BeginSet,
        files: Vec<FileMeta>,
    ) -> Result<(Self, Held), TransferError> {
        let store = shared.store.clone();
        // What would be refused in the end is refused before the bytes are sent.
        if !begin.ancestor {
            store.check_may_publish(begin.name.as_str(), peer, shared.pinned)?;
        }
        if let Some(base) = &begin.base_name {
            store.named_by(base.as_str(), peer)?;
        }
        store.adopt_stages(peer, begin.name.as_str())?;
        let held = store.held_of(peer)?;
        let stage = store.stage(peer, begin.name.as_str(), begin.page_size)?;
        let directory = stage.files();
        let staged = Self {
            store,
            stage: Mutex::new(Some(stage)),
            directory,
            files,
            open: Mutex::default(),
            written: AtomicU64::new(0),
        };
        for meta in &staged.files {
            let path = staged.directory.join(meta.name.as_str());
            let file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path);
            file.and_then(|file| file.set_len(meta.size))
                .tried("create", &path)?;
        }
        Ok((staged, held))
    }

    // Unpacks, hashes, writes. Where the bytes belong was checked before.
    pub(super) fn write(
        &self,
        frame: &Frame,
        ranges: &[Range<u64>],
    ) -> Result<Vec<Digest>, TransferError> {
        let meta = &self.files[frame.header.file as usize];
        let raw = match frame.header.codec {
            Codec::Raw => frame.payload.clone(),
            Codec::Zstd => Bytes::from(unpack(frame)?),
        };
        let path = self.directory.join(meta.name.as_str());
        let file = self.file(frame.header.file).tried("open", &path)?;
        let run = VerifiedRun::hash(raw, meta.block_len as usize);
        let mut at = 0;
        for range in ranges {
            let len = usize::try_from(range.end - range.start).expect("a segment fits into memory");
            file.write_all_at(&run.bytes()[at..at + len], range.start)
                .tried("write", &path)?;
            at += len;
        }
        self.sync_early(&file, at as u64).tried("sync", &path)?;
        Ok(run.digests().to_vec())
    }

    // What must be on disk before the set is published goes there while more arrives: one of the
    // writers waits for the disk, the others go on.
    fn sync_early(&self, file: &File, written: u64) -> std::io::Result<()> {
        let before = self.written.fetch_add(written, Ordering::Relaxed);
        if self.store.is_durable() && before / SYNC_STEP != (before + written) / SYNC_STEP {
            file.sync_data()?;
        }
        Ok(())
    }

    fn file(&self, file: u32) -> std::io::Result<Arc<File>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, handle)) = open.iter().find(|(number, _)| *number == file) {
            return Ok(handle.clone());
        }
        let path = self.directory.join(self.files[file as usize].name.as_str());
        let handle = Arc::new(OpenOptions::new().write(true).open(path)?);
        if open.len() >= OPEN_FILES {
            open.remove(0);
        }
        open.push((file, handle.clone()));
        Ok(handle)
    }

    // Removes what arrived.
    pub(super) fn discard(&self) {
        if let Some(stage) = self.take_stage()
            && let Err(error) = self.store.discard(stage)
        {
            tracing::warn!("{error}; the next `crxfer recv` removes it");
        }
    }

    pub(super) fn take_stage(&self) -> Option<Stage> {
        self.stage
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if let Some(stage) = self.take_stage()
            && let Err(error) = self.store.abandon(stage)
        {
            tracing::warn!("{error}; what arrived will be sent again");
        }
    }
}

thread_local! {
    static DECOMPRESSOR: std::cell::RefCell<Option<Decompressor>> = const { std::cell::RefCell::new(None) };
}

fn unpack(frame: &Frame) -> Result<Vec<u8>, TransferError> {
    DECOMPRESSOR.with_borrow_mut(|decompressor| {
        if decompressor.is_none() {
            *decompressor = Decompressor::new().ok();
        }
        let unpacked = decompressor
            .as_mut()
            .map(|it| it.decompress(&frame.payload, frame.header.raw_len as usize));
        match unpacked {
            Some(Ok(bytes)) => Ok(bytes),
            _ => Err(SessionError::Protocol("a frame that cannot be unpacked").into()),
        }
    })
}
