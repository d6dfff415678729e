//! Copying blocks that are already on this host, each checked on its way.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::delta::{BlockRef, FileMeta, SEGMENT_BYTES};
use crate::digest::{Digest, hash_blocks};
use crate::store::{StoreError, Tried as _};
use crate::transfer::TransferError;
use crate::transfer::files::in_parallel;

/// Source files that stay open.
const OPEN_FILES: usize = 128;

/// Where a block can be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// Nowhere: it is zero bytes.
    Zero,
    /// In the staged file, where it arrived.
    Staged(BlockRef),
    /// In a set that was held.
    Held { store: u16, at: BlockRef },
    /// In a stored set of a chain.
    Stored {
        directory: Arc<Path>,
        name: Arc<str>,
        block: u64,
        set: u64,
    },
}

impl Origin {
    /// Whether `next` lies `distance` blocks behind this one.
    fn continues(&self, next: &Self, distance: u64) -> bool {
        let follows =
            |a: &BlockRef, b: &BlockRef| a.file == b.file && a.block + distance == b.block;
        match (self, next) {
            (Self::Zero, Self::Zero) => true,
            (Self::Staged(a), Self::Staged(b)) => follows(a, b),
            (
                Self::Held { store, at },
                Self::Held {
                    store: other,
                    at: next,
                },
            ) => store == other && follows(at, next),
            (
                Self::Stored {
                    directory,
                    name,
                    block,
                    ..
                },
                Self::Stored {
                    directory: other,
                    name: next_name,
                    block: next,
                    ..
                },
            ) => Arc::ptr_eq(directory, other) && name == next_name && block + distance == *next,
            _ => false,
        }
    }
}

/// Blocks that follow one another in a source and in the file that is written.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    origin: Origin,
    out: u64,
    count: u64,
}

/// Collects pieces block by block.
#[derive(Clone, Debug, Default)]
pub(super) struct Pieces {
    pieces: Vec<Piece>,
}

impl Pieces {
    /// Block number `out` of the file that is written comes from `origin`.
    pub(super) fn push(&mut self, origin: Origin, out: u64) {
        match self.pieces.last_mut() {
            Some(last)
                if last.out + last.count == out && last.origin.continues(&origin, last.count) =>
            {
                last.count += 1;
            }
            _ => self.pieces.push(Piece {
                origin,
                out,
                count: 1,
            }),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// The pieces, in order.
    pub(super) fn into_vec(self) -> Vec<Piece> {
        self.pieces
    }
}

/// Where in a file the blocks of a piece begin.
#[derive(Debug)]
pub(super) struct Located {
    pub(super) path: PathBuf,
    pub(super) block: u64,
    /// Length of the blocks of that file. It may be another than in the file that is written: a
    /// page can equal the last, shorter block of a file of bytes.
    pub(super) block_len: u32,
    /// Number of the set's record, 0 for what is arriving or was left unfinished.
    pub(super) set: u64,
}

/// Writes `pieces` to their places in the file `path`, which exists. `locate` says where an origin
/// is; zero blocks are left as holes.
pub(super) fn copy_pieces(
    path: &Path,
    meta: &FileMeta,
    digest: impl Fn(u64) -> Digest + Sync,
    pieces: Vec<Piece>,
    locate: impl Fn(&Origin) -> Option<Located> + Sync,
) -> Result<(), TransferError> {
    let out = OpenOptions::new()
        .write(true)
        .open(path)
        .tried("open", path)?;
    let open = OpenFiles::default();
    let most = (SEGMENT_BYTES / u64::from(meta.block_len)).max(1);
    let jobs: Vec<_> = pieces
        .iter()
        .flat_map(|piece| {
            (0..piece.count)
                .step_by(usize::try_from(most).unwrap_or(1))
                .map(move |skip| (piece, skip))
        })
        .collect();
    let copy = |&(piece, skip): &(&Piece, u64)| -> Result<(), TransferError> {
        let Some(located) = locate(&piece.origin) else {
            return Ok(());
        };
        let (from, set) = (located.path, located.set);
        let count = most.min(piece.count - skip);
        let target = meta.bytes_of(&(piece.out + skip..piece.out + skip + count));
        let source_block = located.block + skip;
        let damaged = |block| StoreError::Damaged {
            path: from.clone(),
            block,
            set,
        };
        let mut bytes = vec![
            0;
            usize::try_from(target.end - target.start)
                .expect("a segment fits into memory")
        ];
        let read = open.get(&from).and_then(|file| {
            file.read_exact_at(&mut bytes, source_block * u64::from(located.block_len))
        });
        match read {
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof
                ) =>
            {
                return Err(damaged(source_block).into());
            }
            other => other.tried("read", &from)?,
        }
        let mut found = Vec::new();
        hash_blocks(&bytes, meta.block_len as usize, &mut found);
        let expected = (piece.out + skip..).map(&digest);
        if let Some(wrong) = found
            .iter()
            .zip(expected)
            .position(|(found, expected)| *found != expected)
        {
            return Err(damaged(source_block + wrong as u64).into());
        }
        Ok(out
            .write_all_at(&bytes, target.start)
            .tried("write", path)?)
    };
    in_parallel(&jobs, copy).map(|_| ())
}

#[derive(Debug, Default)]
struct OpenFiles(Mutex<HashMap<PathBuf, Arc<File>>>);

impl OpenFiles {
    fn get(&self, path: &Path) -> io::Result<Arc<File>> {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = open.get(path) {
            return Ok(file.clone());
        }
        if open.len() >= OPEN_FILES {
            open.clear();
        }
        let file = Arc::new(File::open(path)?);
        open.insert(path.to_owned(), file.clone());
        Ok(file)
    }
}
