//! The recipe of one set on the destination: for each block its digest and where its bytes are.

use std::collections::BTreeMap;

use hashbrown::HashTable;

use super::manifest::FileMeta;
use crate::digest::{Digest, tree, zero_digest};
use crate::wire::limits;
use crate::wire::{BlockId, Op};

/// One block of one file of the set in transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockRef {
    /// Index of the file in the set's list.
    pub file: u32,
    /// Index of the block in the file.
    pub block: u64,
}

const BLOCK_BITS: u32 = 30;
const FILE_BITS: u32 = 18;
const STORE_BITS: u32 = 13;
const _: () =
    assert!(limits::FILES == 1 << FILE_BITS && limits::BLOCKS_PER_FILE == 1 << BLOCK_BITS);

impl BlockRef {
    fn pack(self) -> u64 {
        u64::from(self.file) << BLOCK_BITS | self.block
    }

    fn unpack(bits: u64) -> Self {
        let file = bits >> BLOCK_BITS & ((1 << FILE_BITS) - 1);
        Self {
            file: u32::try_from(file).expect("18 bits"),
            block: bits & ((1 << BLOCK_BITS) - 1),
        }
    }
}

/// Where the bytes of one block are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Not known yet.
    Unknown,
    /// Asked of the source, not arrived.
    Wanted,
    /// The block is zero bytes.
    Zero,
    /// It arrived and was written to its place in the staged file.
    Staged,
    /// Its bytes are those of another block of this set.
    Same(BlockRef),
    /// The destination held it before: in store number `store`, at `at`.
    Held {
        /// Number of the store among those that were searched.
        store: u16,
        /// File and block within that store.
        at: BlockRef,
    },
}

impl Place {
    // Eight bytes a page, 0.2 % of the image: kind (3 bits), store (13), file (18), block (30).
    fn pack(self) -> u64 {
        let (kind, low) = match self {
            Self::Unknown => (0, 0),
            Self::Wanted => (1, 0),
            Self::Zero => (2, 0),
            Self::Staged => (3, 0),
            Self::Same(at) => (4, at.pack()),
            Self::Held { store, at } => {
                (5, u64::from(store) << (BLOCK_BITS + FILE_BITS) | at.pack())
            }
        };
        kind << 61 | low
    }

    fn unpack(bits: u64) -> Self {
        match bits >> 61 {
            0 => Self::Unknown,
            1 => Self::Wanted,
            2 => Self::Zero,
            3 => Self::Staged,
            4 => Self::Same(BlockRef::unpack(bits)),
            _ => {
                let store = bits >> (BLOCK_BITS + FILE_BITS) & ((1 << STORE_BITS) - 1);
                Self::Held {
                    store: u16::try_from(store).expect("13 bits"),
                    at: BlockRef::unpack(bits),
                }
            }
        }
    }
}

/// Finds the first block with the same content among those already met.
///
/// Holds one word a block; the digests stay where they are.
#[derive(Debug, Default)]
pub struct FirstSeen {
    table: HashTable<u64>,
}

impl FirstSeen {
    /// Returns the earlier block with the id `id`, or notes `at` as the first one.
    /// `id_of` tells the id of a block that was noted before.
    pub fn note(
        &mut self,
        id: BlockId,
        at: BlockRef,
        id_of: impl Fn(BlockRef) -> BlockId,
    ) -> Option<BlockRef> {
        let found = self.table.entry(
            id.hash(),
            |&bits| id_of(BlockRef::unpack(bits)) == id,
            |&bits| id_of(BlockRef::unpack(bits)).hash(),
        );
        match found {
            hashbrown::hash_table::Entry::Occupied(entry) => Some(BlockRef::unpack(*entry.get())),
            hashbrown::hash_table::Entry::Vacant(entry) => {
                entry.insert(at.pack());
                None
            }
        }
    }
}

/// What is wrong with what the source sent. Each names the file and the place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecipeError {
    /// A file or segment that the set does not have.
    #[error("the set has no file {file}, segment {segment}")]
    NoSuchSegment {
        /// Index of the file.
        file: u32,
        /// Index of the segment.
        segment: u64,
    },
    /// The same segment was described twice.
    #[error("{name}: segment {segment} was sent twice")]
    Repeated {
        /// Name of the file.
        name: String,
        /// Index of the segment.
        segment: u64,
    },
    /// The description of a segment does not have the right number of blocks.
    #[error("{name}: segment {segment} has {expected} blocks, {found} were described")]
    WrongCount {
        /// Name of the file.
        name: String,
        /// Index of the segment.
        segment: u64,
        /// Blocks that the segment has.
        expected: u64,
        /// Blocks that were described.
        found: u64,
    },
    /// A block was sent that was not asked for, or one that was asked for was left out.
    #[error("{name}: block {block} was not sent as asked")]
    NotAsAsked {
        /// Name of the file.
        name: String,
        /// Index of the block.
        block: u64,
    },
    /// The bytes are not those that were announced.
    #[error(
        "{name}: block {block} has other bytes than its digest says (did the file change while it was sent?)"
    )]
    WrongBytes {
        /// Name of the file.
        name: String,
        /// Index of the block.
        block: u64,
    },
    /// A block was said to equal another that has not been sent, or has another length.
    #[error("{name}: block {block} refers to one that was not sent")]
    BadReference {
        /// Name of the file.
        name: String,
        /// Index of the block.
        block: u64,
    },
    /// The source ended the set before all of it had arrived.
    #[error("{name}: segment {segment} is missing")]
    Missing {
        /// Name of the file.
        name: String,
        /// Index of the segment.
        segment: u64,
    },
    /// The file's digest is not the one that the source stated.
    #[error(
        "{name}: the file that arrived is not the one that the source read (did it change while it was sent?)"
    )]
    WrongFile {
        /// Name of the file.
        name: String,
    },
}

#[derive(Debug)]
enum Segment {
    Zero,
    Blocks {
        digests: Box<[Digest]>,
        places: Box<[u64]>,
    },
}

#[derive(Debug)]
struct FileRecipe {
    meta: FileMeta,
    // Those that came, by number: memory follows what arrived, not what was announced. A list
    // would not do: one frame for the last segment of a file of 4 TiB would make it 128 MiB long.
    segments: BTreeMap<u64, Segment>,
}

/// Where every block of a set comes from. Filled as the source describes the set, then complete.
#[derive(Debug)]
pub struct Recipe {
    files: Vec<FileRecipe>,
    first_seen: FirstSeen,
}

impl Recipe {
    /// An empty recipe for a set of these files.
    pub fn new(files: Vec<FileMeta>) -> Self {
        let files = files
            .into_iter()
            .map(|meta| FileRecipe {
                meta,
                segments: BTreeMap::new(),
            })
            .collect();
        Self {
            files,
            first_seen: FirstSeen::default(),
        }
    }

    /// The files of the set.
    pub fn files(&self) -> impl ExactSizeIterator<Item = &FileMeta> {
        self.files.iter().map(|file| &file.meta)
    }

    /// File number `file`.
    pub fn file(&self, file: u32) -> &FileMeta {
        &self.files[file as usize].meta
    }

    /// The number of blocks of a segment, if the set has it.
    pub fn blocks_of(&self, file: u32, segment: u64) -> Result<u64, RecipeError> {
        let range = self
            .files
            .get(file as usize)
            .map(|file| file.meta.segment_range(segment));
        match range {
            Some(range) if !range.is_empty() => Ok(range.end - range.start),
            _ => Err(RecipeError::NoSuchSegment { file, segment }),
        }
    }

    /// Digest and place of one block.
    pub fn block(&self, at: BlockRef) -> (Digest, Place) {
        let file = &self.files[at.file as usize];
        let (segment, index) = file.locate(at.block);
        match file.segments.get(&segment) {
            None => (Digest([0; 32]), Place::Unknown),
            Some(Segment::Zero) => (zero_digest(file.meta.block_bytes(at.block)), Place::Zero),
            Some(Segment::Blocks { digests, places }) => {
                (digests[index], Place::unpack(places[index]))
            }
        }
    }

    /// Takes a segment that the destination holds whole: its digests and places.
    pub fn set_held(
        &mut self,
        file: u32,
        segment: u64,
        blocks: Vec<(Digest, Place)>,
    ) -> Result<(), RecipeError> {
        self.check_new(file, segment, blocks.len() as u64)?;
        let (digests, places): (Vec<_>, Vec<_>) =
            blocks.into_iter().map(|(d, p)| (d, p.pack())).unzip();
        self.put(
            file,
            segment,
            Segment::Blocks {
                digests: digests.into(),
                places: places.into(),
            },
        );
        Ok(())
    }

    /// Takes the ids of a segment's blocks and returns which of them must be sent.
    ///
    /// `found` has one entry for each id: what the destination holds under it.
    ///
    /// # Panics
    /// If `found` has another length than `ids`.
    pub fn set_ids(
        &mut self,
        file: u32,
        segment: u64,
        ids: &[BlockId],
        found: &[Option<(Digest, Place)>],
    ) -> Result<Vec<bool>, RecipeError> {
        assert_eq!(found.len(), ids.len(), "one answer for each id");
        self.check_new(file, segment, ids.len() as u64)?;
        let first = self.file(file).segment_range(segment).start;
        let zero_id = |block| BlockId::of(&zero_digest(self.file(file).block_bytes(block)));
        // Only the last block of a file can be shorter than the others.
        let last = first + (ids.len() as u64 - 1);
        let (zero, last_zero) = (zero_id(first), zero_id(last));
        let mut lacking = vec![false; ids.len()];
        // The digests go in first: FirstSeen compares through them.
        let digests = ids.iter().map(|id| id.as_prefix()).collect();
        let places = vec![Place::Wanted.pack(); ids.len()].into();
        self.put(file, segment, Segment::Blocks { digests, places });
        for (index, (&id, found)) in ids.iter().zip(found).enumerate() {
            let at = BlockRef {
                file,
                block: first + index as u64,
            };
            let zero = if at.block == last { last_zero } else { zero };
            let (digest, place) = if id == zero {
                (
                    zero_digest(self.file(file).block_bytes(at.block)),
                    Place::Zero,
                )
            } else if let Some(found) = *found {
                found
            } else {
                let files = &self.files;
                match self.first_seen.note(id, at, |at| id_at(files, at)) {
                    Some(earlier) => (id.as_prefix(), Place::Same(earlier)),
                    None => {
                        lacking[index] = true;
                        continue;
                    }
                }
            };
            self.set(at, digest, place);
        }
        Ok(lacking)
    }

    /// Takes a frame: `ops` describe the blocks of the segment, `digests` are those of the literal
    /// bytes, computed here, which have been written to the staged file.
    pub fn set_frame(
        &mut self,
        file: u32,
        segment: u64,
        ops: &[Op],
        digests: &[Digest],
    ) -> Result<(), RecipeError> {
        let expected = self.blocks_of(file, segment)?;
        let found = ops.iter().map(|op| u64::from(op.blocks())).sum();
        let name = || self.file(file).name.to_string();
        if found != expected {
            return Err(RecipeError::WrongCount {
                name: name(),
                segment,
                expected,
                found,
            });
        }
        let asked = self.is_known(file, segment);
        if !asked && matches!(ops, [Op::Zero(_)]) {
            self.put(file, segment, Segment::Zero);
            return Ok(());
        }
        if !asked {
            let count = usize::try_from(expected).expect("a segment fits into memory");
            let digests = vec![Digest([0; 32]); count].into();
            self.put(
                file,
                segment,
                Segment::Blocks {
                    digests,
                    places: vec![0; count].into(),
                },
            );
        } else if ops
            .iter()
            .any(|op| matches!(op, Op::Zero(_) | Op::Same(..)))
        {
            return Err(RecipeError::Repeated {
                name: name(),
                segment,
            });
        }
        let mut block = self.file(file).segment_range(segment).start;
        let mut literals = digests.iter();
        for op in ops {
            for index in 0..u64::from(op.blocks()) {
                let at = BlockRef {
                    file,
                    block: block + index,
                };
                match *op {
                    Op::Literal(_) => {
                        let digest = *literals.next().expect("the frame's literals were counted");
                        self.set_literal(at, digest, asked)?;
                    }
                    Op::Held(_) => self.check_held(at)?,
                    Op::Zero(_) => self.set(
                        at,
                        zero_digest(self.file(file).block_bytes(at.block)),
                        Place::Zero,
                    ),
                    Op::Same(_, from) => {
                        let from = BlockRef {
                            file: from.file,
                            block: from.block + index,
                        };
                        self.set(at, Digest([0; 32]), Place::Same(from));
                    }
                }
            }
            block += u64::from(op.blocks());
        }
        Ok(())
    }

    /// Checks that the whole set is there and is what the source said: every reference leads to a
    /// block that arrived, every file has its digest.
    pub fn finish(&mut self, file_digests: &[Digest]) -> Result<(), RecipeError> {
        self.resolve_references()?;
        for (file, expected) in self.files.iter().zip(file_digests) {
            if file.digest()? != *expected {
                return Err(RecipeError::WrongFile {
                    name: file.meta.name.to_string(),
                });
            }
        }
        self.first_seen = FirstSeen::default();
        Ok(())
    }

    fn resolve_references(&mut self) -> Result<(), RecipeError> {
        for file in 0..self.files.len() {
            let file_index = u32::try_from(file).expect("files are limited");
            let numbers: Vec<u64> = self.files[file].segments.keys().copied().collect();
            for segment in numbers {
                let Segment::Blocks { places, .. } = &self.files[file].segments[&segment] else {
                    continue;
                };
                let first = self.files[file].meta.segment_range(segment).start;
                let same: Vec<_> = (first..)
                    .zip(places.iter().map(|&bits| Place::unpack(bits)))
                    .collect();
                for (block, place) in same {
                    if let Place::Same(from) = place {
                        let at = BlockRef {
                            file: file_index,
                            block,
                        };
                        let digest = self.referred(at, from)?;
                        self.set(at, digest, place);
                    }
                }
            }
        }
        Ok(())
    }

    fn referred(&self, at: BlockRef, from: BlockRef) -> Result<Digest, RecipeError> {
        let exists = self
            .files
            .get(from.file as usize)
            .is_some_and(|file| from.block < file.meta.blocks());
        if exists
            && self.file(from.file).block_bytes(from.block)
                == self.file(at.file).block_bytes(at.block)
            && let (digest, Place::Staged) = self.block(from)
        {
            return Ok(digest);
        }
        Err(RecipeError::BadReference {
            name: self.file(at.file).name.to_string(),
            block: at.block,
        })
    }

    fn set_literal(
        &mut self,
        at: BlockRef,
        digest: Digest,
        asked: bool,
    ) -> Result<(), RecipeError> {
        if asked {
            let (expected, place) = self.block(at);
            let name = || self.file(at.file).name.to_string();
            if place != Place::Wanted {
                return Err(RecipeError::NotAsAsked {
                    name: name(),
                    block: at.block,
                });
            }
            if BlockId::of(&digest) != BlockId::of(&expected) {
                return Err(RecipeError::WrongBytes {
                    name: name(),
                    block: at.block,
                });
            }
        }
        self.set(at, digest, Place::Staged);
        Ok(())
    }

    fn check_held(&self, at: BlockRef) -> Result<(), RecipeError> {
        match self.block(at).1 {
            Place::Unknown | Place::Wanted | Place::Staged => Err(RecipeError::NotAsAsked {
                name: self.file(at.file).name.to_string(),
                block: at.block,
            }),
            _ => Ok(()),
        }
    }

    fn check_new(&self, file: u32, segment: u64, found: u64) -> Result<(), RecipeError> {
        let expected = self.blocks_of(file, segment)?;
        let name = || self.file(file).name.to_string();
        if self.is_known(file, segment) {
            return Err(RecipeError::Repeated {
                name: name(),
                segment,
            });
        }
        if found != expected {
            return Err(RecipeError::WrongCount {
                name: name(),
                segment,
                expected,
                found,
            });
        }
        Ok(())
    }

    fn is_known(&self, file: u32, segment: u64) -> bool {
        self.files[file as usize].segments.contains_key(&segment)
    }

    fn put(&mut self, file: u32, segment: u64, value: Segment) {
        self.files[file as usize].segments.insert(segment, value);
    }

    fn set(&mut self, at: BlockRef, digest: Digest, place: Place) {
        let file = &mut self.files[at.file as usize];
        let (segment, index) = file.locate(at.block);
        if let Some(Segment::Blocks { digests, places }) = file.segments.get_mut(&segment) {
            digests[index] = digest;
            places[index] = place.pack();
        }
    }
}

impl FileRecipe {
    fn locate(&self, block: u64) -> (u64, usize) {
        let per_segment = self.meta.segment_blocks();
        let index = usize::try_from(block % per_segment).expect("blocks of a segment are few");
        (block / per_segment, index)
    }

    fn digest(&self) -> Result<Digest, RecipeError> {
        let missing = |segment| RecipeError::Missing {
            name: self.meta.name.to_string(),
            segment,
        };
        let mut segments = Vec::new();
        for segment in 0..self.meta.segments() {
            let state = self.segments.get(&segment);
            segments.push(match state.ok_or_else(|| missing(segment))? {
                Segment::Zero => tree::segment_digest(&self.zero_digests(segment)),
                Segment::Blocks { places, .. }
                    if places.iter().any(|&bits| {
                        matches!(Place::unpack(bits), Place::Unknown | Place::Wanted)
                    }) =>
                {
                    return Err(missing(segment));
                }
                Segment::Blocks { digests, .. } => tree::segment_digest(digests),
            });
        }
        Ok(tree::file_digest(
            self.meta.size,
            u64::from(self.meta.block_len),
            &segments,
        ))
    }

    fn zero_digests(&self, segment: u64) -> Vec<Digest> {
        self.meta
            .segment_range(segment)
            .map(|block| zero_digest(self.meta.block_bytes(block)))
            .collect()
    }
}

fn id_at(files: &[FileRecipe], at: BlockRef) -> BlockId {
    let file = &files[at.file as usize];
    let (segment, index) = file.locate(at.block);
    match &file.segments[&segment] {
        Segment::Blocks { digests, .. } => BlockId::of(&digests[index]),
        _ => BlockId::of(&zero_digest(file.meta.block_bytes(at.block))),
    }
}
