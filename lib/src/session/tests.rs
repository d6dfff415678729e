//! Both state machines over a simulated link. The hosts and the link are in `crate::testing`.
//!
//! Every failure names its seed: `seed_of_a_failure` in `transfers` runs one alone.

use std::collections::{BTreeSet, HashSet};

use crate::digest::{Digest, is_zero};
use crate::testing::{MemorySet, MemoryStore, Outcome, Rng};

mod cuts;
mod lies;
mod lying_destination;
mod mutations;
mod silence;
mod transcript;
mod transfers;

/// A page size and the sets of a chain that resemble one another, as iterations do.
struct Scene {
    rng: Rng,
    page_size: u64,
    // Pages that occur more than once.
    pool: Vec<Vec<u8>>,
}

impl Scene {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let page_size = [4096, 16384, 65536][rng.index(3)];
        let len = usize::try_from(page_size).unwrap();
        let pool = (0..6).map(|_| rng.bytes(len)).collect();
        Self {
            rng,
            page_size,
            pool,
        }
    }

    // Zero, from the pool, noise, or text that compresses.
    fn page(&mut self) -> Vec<u8> {
        let len = usize::try_from(self.page_size).unwrap();
        match self.rng.below(8) {
            0..2 => vec![0; len],
            2..5 => self.pool[self.rng.index(self.pool.len())].clone(),
            5 => {
                let line = format!("worker {} is idle\n", self.rng.below(1000));
                line.bytes().cycle().take(len).collect()
            }
            _ => self.rng.bytes(len),
        }
    }

    fn pages(&mut self, most: u64) -> Vec<u8> {
        let count = self.rng.below(most + 1);
        (0..count).flat_map(|_| self.page()).collect()
    }

    fn odd_bytes(&mut self, most: usize) -> Vec<u8> {
        let len = self.rng.index(most);
        match self.rng.below(4) {
            0 => vec![0; len],
            _ => self.rng.bytes(len),
        }
    }

    fn set(&mut self, name: &str) -> MemorySet {
        let mut files = vec![
            ("inventory.img".to_owned(), b"inventory".to_vec()),
            ("empty.img".to_owned(), Vec::new()),
            ("core-1.img".to_owned(), self.odd_bytes(2000)),
            ("ghost-file-1.img".to_owned(), self.odd_bytes(300_000)),
        ];
        // More than a segment of the smallest pages, and files of pages that end within one.
        let most = 20 + 280 * 4096 / self.page_size;
        files.push(("pages-1.img".to_owned(), self.pages(most)));
        if self.rng.once_in(2) {
            let mut cut = self.pages(20);
            cut.truncate(cut.len().saturating_sub(self.rng.index(5000)));
            files.push(("pages-2.img".to_owned(), cut));
        }
        if self.rng.once_in(3) {
            let repeated = files[3].1.clone();
            files.push(("ghost-file-2.img".to_owned(), repeated));
        }
        MemorySet::new(name, self.page_size, files)
    }

    // The next iteration: some pages changed, some files new.
    fn next(&mut self, before: &MemorySet, name: &str) -> MemorySet {
        let mut next = before.clone();
        name.clone_into(&mut next.name);
        next.parent_link = Some(format!("../{}", before.name));
        let len = usize::try_from(self.page_size).unwrap();
        for (meta, bytes) in &mut next.files {
            if meta.is_pages() && !bytes.is_empty() {
                for _ in 0..self.rng.below(6) {
                    let at = self.rng.index(bytes.len()) / len * len;
                    let end = (at + len).min(bytes.len());
                    let page = self.page();
                    bytes[at..end].copy_from_slice(&page[..end - at]);
                }
            }
        }
        next
    }

    fn chain(&mut self, length: usize) -> Vec<MemorySet> {
        let mut sets = vec![self.set("1")];
        while sets.len() < length {
            let name = format!("{}", sets.len() + 1);
            let next = self.next(&sets[sets.len() - 1].clone(), &name);
            sets.push(next);
        }
        sets
    }
}

/// Digests of the blocks of `sets` that are not zero.
fn blocks_of(sets: &[MemorySet]) -> HashSet<Digest> {
    let mut found = HashSet::new();
    for (meta, bytes) in sets.iter().flat_map(|set| &set.files) {
        let blocks = bytes.chunks(meta.block_len as usize);
        found.extend(blocks.filter(|block| !is_zero(block)).map(Digest::of));
    }
    found
}

/// Blocks of `sets` that `store` lacks.
fn novel(sets: &[MemorySet], store: &MemoryStore) -> BTreeSet<Digest> {
    let all = blocks_of(sets).into_iter();
    all.filter(|digest| !store.holds(digest)).collect()
}

/// The literal blocks were these, each once.
#[track_caller]
fn assert_sent(outcome: &Outcome, expected: &BTreeSet<Digest>, about: &str) {
    let sent: BTreeSet<_> = outcome.literals.iter().copied().collect();
    assert_eq!(sent.len(), outcome.literals.len(), "a block twice: {about}");
    assert_eq!(&sent, expected, "other blocks than lacked: {about}");
}

/// The last sets that were published are these, byte for byte.
#[track_caller]
fn assert_published(store: &MemoryStore, sets: &[MemorySet], about: &str) {
    let published = &store.published[store.published.len() - sets.len()..];
    for (published, set) in published.iter().zip(sets) {
        assert!(published.files == set.files, "other bytes: {about}");
    }
}
