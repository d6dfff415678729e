//! The index of one stored set: its blocks by digest, in a file that is mapped, not read.
//!
//! ```text
//! 0          8            16             24           24 + header        multiple of 32
//! | CRXIDX1\0 | header len | block count | slot count | header … | zeros | digests (32 each) | slots (u32 each)
//! ```
//! The header lists the files. Digests stand in the order of files and blocks. A slot holds one
//! plus the number of a block, or zero; a block is found from the slot that its id names, going up.
//! Blocks of zero bytes are in no slot.

use std::fs::File;
use std::io::{self, BufWriter, Seek, Write};
use std::path::Path;

use crxfer_proto::v1;
use prost::Message as _;

use crate::delta::{BlockRef, FileMeta, FileName};
use crate::digest::{Digest, zero_digest};
use crate::sys::Map;
use crate::wire::BlockId;

const MAGIC: &[u8; 8] = b"CRXIDX1\0";
const FIXED: usize = 32;

/// An index that is not whole; the set it belongs to is then not used for saving bytes.
fn damaged(path: &Path) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("{}: not a whole index", path.display()),
    )
}

/// A mapped index.
#[derive(Debug)]
pub struct Index {
    map: Map,
    files: Vec<IndexedFile>,
    digests_at: usize,
    slots_at: usize,
    slots: usize,
}

#[derive(Debug)]
struct IndexedFile {
    meta: FileMeta,
    // Number of its first block among all blocks of the set.
    first: usize,
}

impl Index {
    /// Writes the index of a set with these files and these digests of their blocks, in order.
    ///
    /// The file is complete and synced (where `durable`) when this returns.
    pub fn write(
        path: &Path,
        files: &[FileMeta],
        digests: impl Iterator<Item = Digest>,
        durable: bool,
    ) -> io::Result<()> {
        let blocks: u64 = files.iter().map(FileMeta::blocks).sum();
        // One slot at least stays empty, also with a single block.
        let slots = (blocks + blocks / 2 + 1).next_power_of_two();
        let slots = usize::try_from(slots).map_err(io::Error::other)?;
        let header = encode_header(files);
        let mut out = BufWriter::with_capacity(256 << 10, File::create(path)?);
        out.write_all(MAGIC)?;
        for number in [header.len() as u64, blocks, slots as u64] {
            out.write_all(&number.to_le_bytes())?;
        }
        out.write_all(&header)?;
        let padding = (FIXED + header.len()).next_multiple_of(32) - FIXED - header.len();
        out.write_all(&[0; 32][..padding])?;

        let mut table = vec![0u32; slots];
        let zeros = ZeroIds::of(files);
        let mut number = 0u32;
        for digest in digests {
            out.write_all(&digest.0)?;
            number = number
                .checked_add(1)
                .ok_or_else(|| io::Error::other("too many blocks for one index"))?;
            if !zeros.contains(&digest) {
                insert(&mut table, BlockId::of(&digest), number);
            }
        }
        if u64::from(number) != blocks {
            return Err(io::Error::other("another number of digests than blocks"));
        }
        for slot in table {
            out.write_all(&slot.to_le_bytes())?;
        }
        out.flush()?;
        if durable {
            out.get_ref().sync_all()?;
        }
        out.into_inner()
            .map_err(|error| error.into_error())?
            .rewind()
    }

    /// Opens the index at `path`.
    pub fn open(path: &Path) -> io::Result<Self> {
        let map = Map::of_published_file(&File::open(path)?)?;
        let bytes = map.bytes();
        let number = |at: usize| -> io::Result<usize> {
            let bytes = bytes.get(at..at + 8).ok_or_else(|| damaged(path))?;
            usize::try_from(u64::from_le_bytes(bytes.try_into().expect("eight bytes")))
                .map_err(|_| damaged(path))
        };
        if bytes.get(..8) != Some(MAGIC.as_slice()) {
            return Err(damaged(path));
        }
        let (header, blocks, slots) = (number(8)?, number(16)?, number(24)?);
        let header_end = FIXED.checked_add(header).ok_or_else(|| damaged(path))?;
        let digests_at = header_end
            .checked_next_multiple_of(32)
            .ok_or_else(|| damaged(path))?;
        let slots_at = blocks
            .checked_mul(32)
            .and_then(|len| len.checked_add(digests_at));
        let end = slots
            .checked_mul(4)
            .zip(slots_at)
            .and_then(|(len, at)| len.checked_add(at));
        if end != Some(bytes.len()) || !slots.is_power_of_two() || slots <= blocks {
            return Err(damaged(path));
        }
        let files =
            decode_header(&bytes[FIXED..header_end], blocks).ok_or_else(|| damaged(path))?;
        let slots_at = slots_at.ok_or_else(|| damaged(path))?;
        Ok(Self {
            files,
            digests_at,
            slots_at,
            slots,
            map,
        })
    }

    /// The files of the set, in order.
    pub fn files(&self) -> impl ExactSizeIterator<Item = &FileMeta> {
        self.files.iter().map(|file| &file.meta)
    }

    /// File number `file`.
    pub fn file(&self, file: u32) -> &FileMeta {
        &self.files[file as usize].meta
    }

    /// The number of the file called `name`.
    pub fn file_named(&self, name: &str) -> Option<u32> {
        let found = self
            .files
            .binary_search_by(|file| file.meta.name.as_str().cmp(name))
            .ok()?;
        u32::try_from(found).ok()
    }

    /// The digest of one block.
    ///
    /// # Panics
    /// If the set has no such block.
    pub fn digest(&self, at: BlockRef) -> Digest {
        let file = &self.files[at.file as usize];
        assert!(at.block < file.meta.blocks(), "no such block");
        self.digest_of(file.first + usize::try_from(at.block).expect("mapped"))
    }

    /// The block with the id `id`, if the set has one.
    pub fn find(&self, id: BlockId) -> Option<(Digest, BlockRef)> {
        let mask = self.slots - 1;
        let mut slot = slot_of(id, mask);
        // A whole index has empty slots; a damaged one may have none, and must not hold us up.
        for _ in 0..self.slots {
            let number = self.slot(slot).checked_sub(1)? as usize;
            if number >= self.blocks() {
                return None;
            }
            let digest = self.digest_of(number);
            if BlockId::of(&digest) == id {
                return Some((digest, self.place_of(number)));
            }
            slot = (slot + 1) & mask;
        }
        None
    }

    fn blocks(&self) -> usize {
        (self.slots_at - self.digests_at) / 32
    }

    fn digest_of(&self, number: usize) -> Digest {
        let at = self.digests_at + number * 32;
        Digest(self.map.bytes()[at..at + 32].try_into().expect("32 bytes"))
    }

    fn slot(&self, slot: usize) -> u32 {
        let at = self.slots_at + slot * 4;
        u32::from_le_bytes(self.map.bytes()[at..at + 4].try_into().expect("four bytes"))
    }

    fn place_of(&self, number: usize) -> BlockRef {
        // Empty files share their first block's number with the next file: take the last one.
        let file = self.files.partition_point(|file| file.first <= number) - 1;
        let block = (number - self.files[file].first) as u64;
        BlockRef {
            file: u32::try_from(file).expect("files are limited"),
            block,
        }
    }
}

fn slot_of(id: BlockId, mask: usize) -> usize {
    let low = u32::from_le_bytes(id.0[..4].try_into().expect("four bytes"));
    low as usize & mask
}

fn insert(table: &mut [u32], id: BlockId, number: u32) {
    let mask = table.len() - 1;
    let mut slot = slot_of(id, mask);
    while table[slot] != 0 {
        slot = (slot + 1) & mask;
    }
    table[slot] = number;
}

/// The digests of zero blocks of every length that occurs.
struct ZeroIds(Vec<Digest>);

impl ZeroIds {
    fn of(files: &[FileMeta]) -> Self {
        let mut lengths: Vec<_> = files
            .iter()
            .filter(|file| file.blocks() > 0)
            .flat_map(|file| [file.block_bytes(0), file.block_bytes(file.blocks() - 1)])
            .collect();
        lengths.sort_unstable();
        lengths.dedup();
        Self(lengths.into_iter().map(zero_digest).collect())
    }

    fn contains(&self, digest: &Digest) -> bool {
        self.0.contains(digest)
    }
}

fn encode_header(files: &[FileMeta]) -> Vec<u8> {
    let files = files.iter().map(|file| v1::File {
        name: file.name.to_string(),
        mode: u32::from(file.mode),
        size: file.size,
        block_len: file.block_len,
    });
    v1::Files {
        set: 0,
        files: files.collect(),
    }
    .encode_to_vec()
}

fn decode_header(bytes: &[u8], blocks: usize) -> Option<Vec<IndexedFile>> {
    let mut first = 0usize;
    let mut files = Vec::new();
    for file in v1::Files::decode(bytes).ok()?.files {
        let meta = FileMeta {
            name: FileName::new(file.name).ok()?,
            mode: u16::try_from(file.mode).ok()?,
            size: file.size,
            block_len: Some(file.block_len).filter(|&len| len > 0)?,
        };
        let count = usize::try_from(meta.blocks()).ok()?;
        files.push(IndexedFile { meta, first });
        first = first.checked_add(count)?;
    }
    (first == blocks).then_some(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta(name: &str, size: u64) -> FileMeta {
        FileMeta {
            name: FileName::new(name).unwrap(),
            mode: 0o644,
            size,
            block_len: 4096,
        }
    }

    fn digest(number: u64) -> Digest {
        Digest::of(&number.to_le_bytes())
    }

    #[test]
    fn every_block_is_found_where_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index");
        let files = [
            meta("a", 0),
            meta("b", 4096 * 1000),
            meta("c", 1),
            meta("d", 0),
            meta("e", 8192),
        ];
        let count: u64 = files.iter().map(FileMeta::blocks).sum();
        Index::write(&path, &files, (0..count).map(digest), false).unwrap();
        let index = Index::open(&path).unwrap();
        let mut number = 0;
        for (file, meta) in (0..).zip(&files) {
            for block in 0..meta.blocks() {
                let at = BlockRef { file, block };
                assert_eq!(
                    index.find(BlockId::of(&digest(number))),
                    Some((digest(number), at))
                );
                assert_eq!(index.digest(at), digest(number));
                number += 1;
            }
        }
        assert_eq!(index.find(BlockId::of(&digest(number))), None);
        assert_eq!(index.file_named("c"), Some(2));
    }

    #[test]
    fn the_smallest_sets_have_an_index_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index");
        for count in 0..5 {
            Index::write(
                &path,
                &[meta("a", 4096 * count)],
                (0..count).map(digest),
                false,
            )
            .unwrap();
            let index = Index::open(&path).unwrap();
            for number in 0..count {
                assert!(index.find(BlockId::of(&digest(number))).is_some());
            }
            assert_eq!(index.find(BlockId::of(&digest(count))), None);
        }
    }

    #[test]
    fn zero_blocks_are_in_no_slot() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index");
        let zero = zero_digest(4096);
        Index::write(
            &path,
            &[meta("a", 8192)],
            [zero, digest(1)].into_iter(),
            false,
        )
        .unwrap();
        let index = Index::open(&path).unwrap();
        assert_eq!(index.find(BlockId::of(&zero)), None);
        assert!(index.find(BlockId::of(&digest(1))).is_some());
    }

    #[test]
    fn a_damaged_index_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index");
        Index::write(&path, &[meta("a", 8192)], (0..2).map(digest), false).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for len in [1, 31, 40, whole.len() - 1] {
            std::fs::write(&path, &whole[..len]).unwrap();
            assert!(Index::open(&path).is_err(), "{len}");
        }
        let mut changed = whole;
        changed[16] = 200;
        std::fs::write(&path, &changed).unwrap();
        assert!(Index::open(&path).is_err());
    }
}
