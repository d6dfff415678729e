//! Image sets in memory, and a receiving store that keeps them there.

use std::collections::{BTreeMap, HashMap};

use crate::delta::{BlockRef, FileMeta, FileName, Manifest, ParentRef, Place, SetName};
use crate::digest::{Digest, hash_blocks, is_zero, tree};
use crate::page::PageSize;
use crate::session::{SetPlan, StoreJob};
use crate::wire::{BeginSet, BlockId, Published};

/// No set of a test is larger; what a hostile source announces may be.
const MOST_BYTES: u64 = 64 << 20;

/// One image directory in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemorySet {
    /// Its name.
    pub name: String,
    /// Page size of its pages files.
    pub page_size: PageSize,
    /// Text of its `parent` link.
    pub parent_link: Option<String>,
    /// Its files, in order of name.
    pub files: Vec<(FileMeta, Vec<u8>)>,
}

impl MemorySet {
    /// A set of these files, in any order.
    ///
    /// # Panics
    /// If a name cannot be a file's.
    pub fn new(name: &str, page_size: u64, files: Vec<(String, Vec<u8>)>) -> Self {
        let page_size = PageSize::new(page_size).expect("a page size");
        let mut files: Vec<_> = files
            .into_iter()
            .map(|(name, bytes)| {
                let name = FileName::new(name).expect("a good name");
                (
                    FileMeta::new(name, 0o600, bytes.len() as u64, page_size),
                    bytes,
                )
            })
            .collect();
        files.sort_by(|a, b| a.0.name.cmp(&b.0.name));
        Self {
            name: name.to_owned(),
            page_size,
            parent_link: None,
            files,
        }
    }

    /// Digests of all blocks of each file.
    pub fn leaves(&self) -> Vec<Vec<Digest>> {
        self.files
            .iter()
            .map(|(meta, bytes)| leaves(meta, bytes))
            .collect()
    }

    /// How a source introduces it.
    ///
    /// # Panics
    /// If its name cannot be a set's.
    pub fn plan(&self, with_leaves: bool) -> SetPlan {
        SetPlan {
            name: SetName::new(&self.name).expect("a good name"),
            page_size: self.page_size,
            image_version: 2,
            parent_link: self.parent_link.clone(),
            files: self.files.iter().map(|(meta, _)| meta.clone()).collect(),
            base_name: None,
            leaves: with_leaves.then(|| self.leaves()),
        }
    }

    /// The bytes of some blocks of a file.
    pub fn bytes(&self, file: u32, blocks: std::ops::Range<u64>) -> &[u8] {
        let (meta, bytes) = &self.files[file as usize];
        let range = meta.bytes_of(&blocks);
        &bytes[size(range.start)..size(range.end)]
    }
}

fn leaves(meta: &FileMeta, bytes: &[u8]) -> Vec<Digest> {
    let mut digests = Vec::new();
    hash_blocks(bytes, meta.block_len as usize, &mut digests);
    digests
}

fn segments_of(meta: &FileMeta, leaves: &[Digest]) -> Vec<Digest> {
    leaves
        .chunks(size(meta.segment_blocks()))
        .map(tree::segment_digest)
        .collect()
}

pub(super) fn size(number: u64) -> usize {
    usize::try_from(number).expect("fits into memory")
}

/// A set that was published.
#[derive(Clone, Debug)]
pub struct PublishedSet {
    /// Its name; empty for an ancestor.
    pub name: String,
    /// The root that the source stated.
    pub root: Digest,
    /// Its files.
    pub files: Vec<(FileMeta, Vec<u8>)>,
}

type Blocks = BTreeMap<(u32, u64), Vec<u8>>;

/// What one store of blocks holds: a published set, or what an attempt left.
#[derive(Clone, Debug)]
struct Contents {
    files: Vec<FileMeta>,
    blocks: Blocks,
}

/// A receiving directory in memory.
#[derive(Clone, Debug, Default)]
pub struct MemoryStore {
    /// What was published, the oldest first.
    pub published: Vec<PublishedSet>,
    held: Vec<Contents>,
    ids: HashMap<BlockId, (Digest, Place)>,
    segments: HashMap<Digest, (u16, u32, u64)>,
}

/// The set that is arriving: its blocks as they are written.
#[derive(Clone, Debug)]
pub(super) struct Stage {
    files: Vec<FileMeta>,
    blocks: Blocks,
}

impl Stage {
    pub(super) fn new(files: Vec<FileMeta>) -> Self {
        let blocks = Blocks::new();
        Self { files, blocks }
    }

    /// Writes literal blocks to their ranges and returns their digests.
    pub(super) fn write(
        &mut self,
        file: u32,
        ranges: &[std::ops::Range<u64>],
        mut raw: &[u8],
    ) -> Vec<Digest> {
        let block_len = self.files[file as usize].block_len as usize;
        let mut digests = Vec::new();
        for range in ranges {
            let (run, rest) = raw.split_at(size(range.end - range.start));
            let first = range.start / block_len as u64;
            for (block, bytes) in (first..).zip(run.chunks(block_len)) {
                digests.push(Digest::of(bytes));
                self.blocks.insert((file, block), bytes.to_vec());
            }
            raw = rest;
        }
        assert!(
            raw.is_empty(),
            "an admitted frame has as much as its ranges"
        );
        digests
    }
}

impl MemoryStore {
    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Whether a set with this root is published.
    pub fn has_root(&self, root: &Digest) -> bool {
        self.published.iter().any(|set| set.root == *root)
    }

    /// Whether a block with this digest is held.
    pub fn holds(&self, digest: &Digest) -> bool {
        self.ids
            .get(&BlockId::of(digest))
            .is_some_and(|(found, _)| found == digest)
    }

    pub(super) fn find(&self, id: BlockId) -> Option<(Digest, Place)> {
        self.ids.get(&id).copied()
    }

    pub(super) fn find_segment(&self, digest: &Digest) -> Option<Vec<(Digest, Place)>> {
        let &(store, file, segment) = self.segments.get(digest)?;
        let contents = &self.held[usize::from(store)];
        let blocks = contents.files[file as usize].segment_range(segment);
        let place = |block| {
            let at = BlockRef { file, block };
            let digest = Digest::of(&contents.blocks[&(file, block)]);
            (digest, Place::Held { store, at })
        };
        Some(blocks.map(place).collect())
    }

    fn hold(&mut self, contents: Contents) {
        let store = u16::try_from(self.held.len()).expect("tests hold few sets");
        for (&(file, block), bytes) in contents.blocks.iter().filter(|(_, bytes)| !is_zero(bytes)) {
            let digest = Digest::of(bytes);
            let at = BlockRef { file, block };
            let found = (digest, Place::Held { store, at });
            self.ids.insert(BlockId::of(&digest), found);
        }
        for (file, meta) in (0u32..).zip(&contents.files) {
            for segment in 0..meta.segments() {
                let blocks = meta.segment_range(segment);
                let digests: Option<Vec<_>> = blocks
                    .map(|block| contents.blocks.get(&(file, block)).map(|it| Digest::of(it)))
                    .collect();
                if let Some(digests) = digests {
                    let digest = tree::segment_digest(&digests);
                    self.segments.insert(digest, (store, file, segment));
                }
            }
        }
        self.held.push(contents);
    }

    /// The set that a source means to send, where it stands under its name.
    pub(super) fn unchanged(&self, begin: &BeginSet) -> Option<Published> {
        let root = begin.root?;
        let named = |set: &&PublishedSet| set.name == begin.name.as_str();
        let current = self.published.iter().rev().find(named)?;
        (current.root == root).then(|| published(begin, self.generation(begin), true))
    }

    fn generation(&self, begin: &BeginSet) -> u64 {
        let named = |set: &&PublishedSet| set.name == begin.name.as_str();
        self.published.iter().filter(named).count() as u64
    }

    /// Keeps what an attempt that failed had written.
    pub(super) fn abandon(&mut self, stage: Stage) {
        if !stage.blocks.is_empty() {
            let Stage { files, blocks } = stage;
            // Sparse: only segments of which something came are looked at.
            let is_small = files.iter().map(|file| file.size).sum::<u64>() <= MOST_BYTES;
            let files = if is_small { files } else { Vec::new() };
            self.hold(Contents { files, blocks });
        }
    }

    /// Puts a set together and publishes it, or says why it cannot.
    ///
    /// # Panics
    /// If the session lets a set through that is not the one its root stands for.
    pub(super) fn publish(&mut self, job: &StoreJob, stage: &Stage) -> Result<Published, String> {
        if job.begin.total_bytes > MOST_BYTES {
            return Err("no room".into());
        }
        if let Some(parent) = &job.manifest.parent
            && !self.has_root(&parent.root)
        {
            return Err("the parent is not here".into());
        }
        let mut files = Vec::new();
        let mut blocks = Blocks::new();
        for (file, meta) in (0u32..).zip(job.recipe.files()) {
            let mut bytes = Vec::new();
            for block in 0..meta.blocks() {
                let part = self.block(job, stage, BlockRef { file, block })?;
                bytes.extend_from_slice(&part);
                blocks.insert((file, block), part);
            }
            files.push((meta.clone(), bytes));
        }
        let root = root_of(job, &files);
        assert_eq!(
            root,
            job.manifest.root(),
            "published other bytes than stated"
        );
        let metas = files.iter().map(|(meta, _)| meta.clone()).collect();
        let published = published(&job.begin, self.generation(&job.begin) + 1, false);
        self.hold(Contents {
            files: metas,
            blocks,
        });
        self.published.push(PublishedSet {
            name: published.name.clone(),
            root,
            files,
        });
        Ok(published)
    }

    // As the real store: what was held or repeated is checked when it is copied, what arrived was
    // checked when it was written.
    fn block(&self, job: &StoreJob, stage: &Stage, at: BlockRef) -> Result<Vec<u8>, String> {
        let (digest, place) = job.recipe.block(at);
        let staged = |at: BlockRef| stage.blocks[&(at.file, at.block)].clone();
        let bytes = match place {
            Place::Zero => return Ok(vec![0; job.recipe.file(at.file).block_bytes(at.block)]),
            Place::Staged => return Ok(staged(at)),
            Place::Same(from) => staged(from),
            Place::Held { store, at } => {
                self.held[usize::from(store)].blocks[&(at.file, at.block)].clone()
            }
            Place::Unknown | Place::Wanted => panic!("{at:?} is {place:?} in a finished recipe"),
        };
        let is_right = Digest::of(&bytes) == digest
            && bytes.len() == job.recipe.file(at.file).block_bytes(at.block);
        is_right
            .then_some(bytes)
            .ok_or("a held block is damaged".into())
    }
}

fn published(begin: &BeginSet, generation: u64, unchanged: bool) -> Published {
    Published {
        set: begin.set,
        name: if begin.ancestor {
            String::new()
        } else {
            begin.name.to_string()
        },
        generation,
        layout: crate::wire::Layout::Faithful,
        base: None,
        completeness: "complete".into(),
        unchanged,
        notes: Vec::new(),
    }
}

// From the bytes alone.
fn root_of(job: &StoreJob, files: &[(FileMeta, Vec<u8>)]) -> Digest {
    let digest = |(meta, bytes): &(FileMeta, Vec<u8>)| {
        let segments = segments_of(meta, &leaves(meta, bytes));
        let digest = tree::file_digest(meta.size, u64::from(meta.block_len), &segments);
        (meta.clone(), digest)
    };
    let manifest = Manifest {
        page_size: job.begin.page_size,
        image_version: job.begin.image_version,
        parent: job
            .begin
            .parent
            .clone()
            .map(|(root, link)| ParentRef { root, link }),
        files: files.iter().map(digest).collect(),
    };
    manifest.root()
}
