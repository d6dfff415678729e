//! One digest over all of a dump: what the source says it dumped is what the destination built.
//!
//! ```text
//! pages digest = BLAKE3 derive_key(PAGES_CONTEXT, digest of each page, in order)
//! root = BLAKE3 derive_key(DUMP_CONTEXT,
//!          page size u64 ‖ memories u64 ‖
//!          for each memory, tasks before shared memory, by id:
//!            kind u8 (1, 2) ‖ id u64 ‖ runs u64 ‖ (address u64 ‖ pages u64 ‖ flags u8) of each run ‖ pages digest
//!          files u64 ‖
//!          for each file by name:
//!            length of the name u64 ‖ name ‖ mode u16 ‖ file digest)
//! ```

use std::collections::BTreeMap;

use super::FileMeta;
use crate::digest::{Digest, tree};
use crate::image::{PageRun, PagemapName};
use crate::page::PageSize;

/// Context of the digest of a memory's pages; part of the protocol.
pub const PAGES_CONTEXT: &str = "crxfer v2 dump: page digests";

/// Context of the root digest; part of the protocol.
pub const DUMP_CONTEXT: &str = "crxfer v2 dump root";

/// The pages of one memory, as they are dumped.
#[derive(Clone, Debug)]
pub struct DumpedMemory {
    runs: Vec<PageRun>,
    pages: blake3::Hasher,
    joined: Vec<u8>,
}

impl Default for DumpedMemory {
    fn default() -> Self {
        Self {
            runs: Vec::new(),
            pages: blake3::Hasher::new_derive_key(PAGES_CONTEXT),
            joined: Vec::new(),
        }
    }
}

impl DumpedMemory {
    /// Adds the digests of the next pages.
    pub fn add_pages(&mut self, digests: impl IntoIterator<Item = Digest>) {
        // Many at once: hashing 32 bytes at a time is slow.
        self.joined.clear();
        for digest in digests {
            self.joined.extend_from_slice(digest.as_bytes());
        }
        self.pages.update(&self.joined);
    }

    /// Adds the next run; one that continues the last with the same flags extends it.
    pub fn add_run(&mut self, run: PageRun, page: PageSize) {
        match self.runs.last_mut() {
            Some(last) if last.flags == run.flags && last.end(page) == run.vaddr => {
                last.pages += run.pages;
            }
            _ => self.runs.push(run),
        }
    }

    /// The runs so far.
    pub fn runs(&self) -> &[PageRun] {
        &self.runs
    }
}

/// The root digest of a dump.
pub fn dump_root(
    page: PageSize,
    memories: &BTreeMap<PagemapName, DumpedMemory>,
    files: &BTreeMap<String, (u16, Digest)>,
) -> Digest {
    let mut root = blake3::Hasher::new_derive_key(DUMP_CONTEXT);
    root.update(&page.bytes().to_le_bytes());
    root.update(&(memories.len() as u64).to_le_bytes());
    for (name, memory) in memories {
        let (kind, id) = match *name {
            PagemapName::Task(id) => (1, id),
            PagemapName::Shmem(id) => (2, id),
        };
        let mut text = vec![kind];
        text.extend(id.to_le_bytes());
        text.extend((memory.runs.len() as u64).to_le_bytes());
        for run in &memory.runs {
            text.extend(run.vaddr.to_le_bytes());
            text.extend(run.pages.to_le_bytes());
            text.push(u8::try_from(run.flags.bits()).expect("flags are four bits"));
        }
        root.update(&text);
        root.update(memory.pages.finalize().as_bytes());
    }
    root.update(&(files.len() as u64).to_le_bytes());
    for (name, (mode, digest)) in files {
        root.update(&(name.len() as u64).to_le_bytes());
        root.update(name.as_bytes());
        root.update(&mode.to_le_bytes());
        root.update(digest.as_bytes());
    }
    root.finalize().into()
}

/// The digest of a file with these digests of its blocks.
pub fn file_digest(file: &FileMeta, blocks: &[Digest]) -> Digest {
    let per_segment = usize::try_from(file.segment_blocks()).expect("a segment fits into memory");
    let segments: Vec<_> = blocks
        .chunks(per_segment)
        .map(tree::segment_digest)
        .collect();
    tree::file_digest(file.size, u64::from(file.block_len), &segments)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::PageFlags;

    fn page() -> PageSize {
        PageSize::new(4096).unwrap()
    }

    fn run(vaddr: u64, pages: u64) -> PageRun {
        PageRun {
            vaddr,
            pages,
            flags: PageFlags::PRESENT,
        }
    }

    fn memory(runs: &[PageRun], values: &[u8]) -> DumpedMemory {
        let mut memory = DumpedMemory::default();
        for &run in runs {
            memory.add_run(run, page());
        }
        for value in values {
            memory.add_pages([Digest([*value; 32])]);
        }
        memory
    }

    #[test]
    fn everything_that_is_dumped_counts() {
        let name = PagemapName::Task(7);
        let root = |memory: DumpedMemory, mode, content| {
            let memories = BTreeMap::from([(name, memory)]);
            let files = BTreeMap::from([("core-7.img".to_owned(), (mode, Digest([content; 32])))]);
            dump_root(page(), &memories, &files)
        };
        let plain = root(memory(&[run(4096, 2)], &[1, 2]), 0o644, 9);
        assert_eq!(
            plain,
            root(memory(&[run(4096, 1), run(8192, 1)], &[1, 2]), 0o644, 9),
            "how runs are cut does not count"
        );
        for other in [
            root(memory(&[run(8192, 2)], &[1, 2]), 0o644, 9),
            root(memory(&[run(4096, 2)], &[2, 1]), 0o644, 9),
            root(memory(&[run(4096, 2)], &[1, 2]), 0o600, 9),
            root(memory(&[run(4096, 2)], &[1, 2]), 0o644, 8),
        ] {
            assert_ne!(plain, other);
        }
    }

    /// Both hosts must agree, whatever versions they run.
    #[test]
    fn the_root_does_not_change_between_versions() {
        let memories = BTreeMap::from([(PagemapName::Task(7), memory(&[run(4096, 2)], &[1, 2]))]);
        let files = BTreeMap::from([("core-7.img".to_owned(), (0o644, Digest([9; 32])))]);
        let root = dump_root(page(), &memories, &files);
        let mut text = Vec::new();
        text.extend(4096_u64.to_le_bytes());
        text.extend(1_u64.to_le_bytes());
        text.push(1);
        text.extend(7_u64.to_le_bytes());
        text.extend(1_u64.to_le_bytes());
        text.extend(4096_u64.to_le_bytes());
        text.extend(2_u64.to_le_bytes());
        text.push(4);
        let pages = [[1_u8; 32], [2; 32]].concat();
        text.extend(blake3::derive_key(PAGES_CONTEXT, &pages));
        text.extend(1_u64.to_le_bytes());
        text.extend(10_u64.to_le_bytes());
        text.extend(b"core-7.img");
        text.extend(0o644_u16.to_le_bytes());
        text.extend([9; 32]);
        assert_eq!(root, Digest(blake3::derive_key(DUMP_CONTEXT, &text)));
    }
}
