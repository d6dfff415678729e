//! Digests of directories that were sent before, so that later iterations do not read them again.
//!
//! A directory's digests hold as long as every file has the inode, size and times that it had. Times
//! have the granularity of a clock tick: a file that was written less than [`SETTLED`] before it was
//! digested could be written again without its time changing, and is not remembered.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crxfer_proto::v1;
use prost::Message as _;

use crate::delta::{BlockRef, FileMeta};
use crate::digest::Digest;
use crate::image::{FileStat, Listing};
use crate::session::SetLeaves;
use crate::store::Index;

/// Two ticks of the slowest clock (100 Hz).
const SETTLED: Duration = Duration::from_millis(20);

/// Directories that are remembered; each takes 0.8 % of its size.
const REMEMBERED: usize = 16;

/// Where digests are kept, if anywhere.
#[derive(Clone, Debug)]
pub(super) struct Memo {
    directory: Option<PathBuf>,
}

impl Memo {
    /// Keeps digests under `directory`, which need not exist; nowhere without one.
    pub(super) fn new(directory: Option<PathBuf>) -> Self {
        Self { directory }
    }

    /// The digests of the directory at `path`, if its files are still those that were digested.
    pub(super) fn recall(
        &self,
        path: &Path,
        listing: &Listing,
        files: &[FileMeta],
    ) -> Option<SetLeaves> {
        let place = self.place(path)?;
        let record = v1::SourceRecord::decode(&*fs::read(place.join("record")).ok()?).ok()?;
        if record.files != describe(listing) {
            return None;
        }
        let index = Index::open(&place.join("index")).ok()?;
        if !index.files().eq(files) {
            return None;
        }
        let leaves = |(file, meta): (u32, &FileMeta)| {
            (0..meta.blocks())
                .map(|block| index.digest(BlockRef { file, block }))
                .collect()
        };
        Some((0u32..).zip(files).map(leaves).collect())
    }

    /// Remembers `leaves`, which were computed after `begun`, of the directory at `path`.
    ///
    /// What cannot be remembered is computed again next time.
    pub(super) fn remember(
        &self,
        path: &Path,
        begun: SystemTime,
        listing: &Listing,
        files: &[FileMeta],
        leaves: &[Vec<Digest>],
    ) {
        let settled = listing
            .files
            .iter()
            .all(|file| is_settled(&file.stat, begun));
        let Some(place) = self.place(path).filter(|_| settled) else {
            return;
        };
        if let Err(error) = write(&place, listing, files, leaves) {
            tracing::debug!("digests of {} are not remembered: {error}", path.display());
        }
        if let Some(directory) = &self.directory {
            forget_oldest(directory);
        }
    }

    /// Forgets the digests of the directory at `path`.
    pub(super) fn forget(&self, path: &Path) {
        if let Some(place) = self.place(path) {
            let _ = fs::remove_dir_all(place);
        }
    }

    fn place(&self, path: &Path) -> Option<PathBuf> {
        let path = fs::canonicalize(path).ok()?;
        let name = Digest::of(path.as_os_str().as_encoded_bytes());
        // Where another host can write, its clock sets the times.
        let is_local = !crate::sys::is_remote(&path).ok()?;
        self.directory
            .as_ref()
            .filter(|_| is_local)
            .map(|directory| directory.join(name.to_string()))
    }
}

fn write(
    place: &Path,
    listing: &Listing,
    files: &[FileMeta],
    leaves: &[Vec<Digest>],
) -> std::io::Result<()> {
    fs::create_dir_all(place)?;
    let record = v1::SourceRecord {
        files: describe(listing),
    };
    // The record goes first and comes back last: it never describes another index.
    let _ = fs::remove_file(place.join("record"));
    Index::write(
        &place.join("index.new"),
        files,
        leaves.iter().flatten().copied(),
        false,
    )?;
    fs::rename(place.join("index.new"), place.join("index"))?;
    fs::write(place.join("record.new"), record.encode_to_vec())?;
    fs::rename(place.join("record.new"), place.join("record"))
}

fn describe(listing: &Listing) -> Vec<v1::SourceFile> {
    let describe = |file: &crate::image::FileInfo| v1::SourceFile {
        name: file.name.clone(),
        inode: file.stat.inode,
        size: file.stat.size,
        mode: file.stat.mode,
        mtime_s: file.stat.mtime.0,
        mtime_ns: file.stat.mtime.1,
        ctime_s: file.stat.ctime.0,
        ctime_ns: file.stat.ctime.1,
    };
    listing.files.iter().map(describe).collect()
}

fn is_settled(stat: &FileStat, begun: SystemTime) -> bool {
    let begun = begun.duration_since(UNIX_EPOCH).unwrap_or_default();
    let changed = u64::try_from(stat.ctime.0)
        .map(|s| Duration::from_secs(s) + Duration::from_nanos(stat.ctime.1));
    changed.is_ok_and(|changed| changed + SETTLED < begun)
}

fn forget_oldest(directory: &Path) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    let mut places: Vec<_> = entries
        .flatten()
        .map(|entry| {
            (
                entry.metadata().and_then(|meta| meta.modified()).ok(),
                entry.path(),
            )
        })
        .collect();
    places.sort();
    let excess = places.len().saturating_sub(REMEMBERED);
    for (_, place) in &places[..excess] {
        let _ = fs::remove_dir_all(place);
    }
}
