//! Random memories over random iterations: the final directory has exactly the dump, and the
//! iterations hold each page about once.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::super::{Event, Standby, StandbyError};
use super::deliver;
use crate::delta::{Outgoing, Record};
use crate::digest::Digest;
use crate::image::{Chain, ImageError, PageFlags, PagemapName, PagesReader};
use crate::page::PageSize;
use crate::testing::Rng;

/// What a page holds: zero, one of a few contents that many pages have, or noise of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Content(u64);

impl Content {
    fn any(rng: &mut Rng) -> Self {
        match rng.below(6) {
            0 => Self(0),
            1 | 2 => Self(1 + rng.below(5)),
            _ => Self(rng.number() | 1 << 60),
        }
    }

    fn fill(self, page: &mut [u8]) {
        for (index, word) in page.chunks_exact_mut(8).enumerate() {
            let mixed = self.0.wrapping_mul(1 + index as u64 % 512);
            word.copy_from_slice(&mixed.to_le_bytes());
        }
    }
}

type Pages = BTreeMap<u64, Content>;

struct World {
    page: PageSize,
    rng: Rng,
    memories: BTreeMap<PagemapName, Pages>,
    next_id: u64,
    /// Every page that was ever there, as the destination keeps those that vanish.
    ever: BTreeSet<(PagemapName, u64)>,
}

impl World {
    fn new(seed: u64, page: PageSize) -> Self {
        let mut world = Self {
            page,
            rng: Rng::new(seed),
            memories: BTreeMap::new(),
            next_id: 1,
            ever: BTreeSet::new(),
        };
        for _ in 0..=world.rng.below(3) {
            world.appear();
        }
        world
    }

    // A process or a segment comes, as a fork often: with the pages of another.
    fn appear(&mut self) {
        let id = self.next_id;
        self.next_id += 1;
        let name = if self.rng.once_in(3) {
            PagemapName::Shmem(id)
        } else {
            PagemapName::Task(id)
        };
        let parent = self.memories.values().next().cloned();
        let mut pages = parent.filter(|_| self.rng.once_in(2)).unwrap_or_default();
        for _ in 0..self.rng.below(4) {
            let (first, count) = (self.rng.below(5000), self.rng.below(60));
            pages.extend((first..first + count).map(|page| (page, Content::any(&mut self.rng))));
        }
        self.memories.insert(name, pages);
    }

    // What a workload does in the time of an iteration.
    fn run(&mut self) {
        if self.rng.once_in(3) {
            self.appear();
        }
        if self.rng.once_in(5) && self.memories.len() > 1 {
            self.memories.pop_last();
        }
        for pages in self.memories.values_mut() {
            let rng = &mut self.rng;
            pages.retain(|_, _| !rng.once_in(20));
            for content in pages.values_mut().filter(|_| rng.once_in(8)) {
                *content = Content(0);
            }
            for content in pages.values_mut() {
                if rng.once_in(6) {
                    *content = Content::any(rng);
                }
            }
            let (first, count) = (rng.below(5000), rng.below(20));
            pages.extend((first..first + count).map(|page| (page, Content::any(rng))));
        }
    }

    // Hands all pages out as a reader does: some at a time, never across a gap.
    fn read(&mut self, mut each: impl FnMut(PagemapName, u64, &[u8])) {
        let page_len = self.page.byte_len();
        for (&name, pages) in &self.memories {
            self.ever.extend(pages.keys().map(|&page| (name, page)));
            let (mut bytes, mut first, mut end) = (Vec::new(), 0, 0);
            for (&page, content) in pages {
                if page != end || bytes.len() / page_len == 7 {
                    if !bytes.is_empty() {
                        each(name, first * self.page.bytes(), &bytes);
                    }
                    bytes.clear();
                    first = page;
                }
                let at = bytes.len();
                bytes.resize(at + page_len, 0);
                content.fill(&mut bytes[at..]);
                end = page + 1;
            }
            if !bytes.is_empty() {
                each(name, first * self.page.bytes(), &bytes);
            }
        }
    }

    fn final_records(&mut self, out: &mut Outgoing, number: u32) -> Vec<Record> {
        let mut records = Vec::new();
        out.begin(number, true, &mut records);
        for &name in self.memories.keys() {
            out.open_dumped(name, &mut records);
        }
        self.read(|name, address, bytes| {
            let lazy = PageFlags::from_bits(6).unwrap();
            out.dumped_pages(name, address, lazy, bytes, &mut records);
        });
        out.end(&mut records);
        records
    }

    fn expected(&self) -> BTreeMap<PagemapName, BTreeMap<u64, Digest>> {
        let mut page = vec![0; self.page.byte_len()];
        let mut digest = |content: &Content| {
            content.fill(&mut page);
            Digest::of(&page)
        };
        let memory = |(&name, pages): (&PagemapName, &Pages)| {
            let pages = pages.iter().map(|(&at, content)| (at, digest(content)));
            (name, pages.collect())
        };
        self.memories.iter().map(memory).collect()
    }
}

fn digests(directory: &Path, page: PageSize) -> BTreeMap<PagemapName, BTreeMap<u64, Digest>> {
    let chain = Chain::open(directory, Some(page)).unwrap();
    let mut reader = PagesReader::new(&chain);
    let mut found = BTreeMap::new();
    for &name in chain.newest().pagemaps().keys() {
        let mut pages = BTreeMap::new();
        for run in chain.resolve(name).unwrap() {
            let mut at = run.vaddr / page.bytes();
            let read = reader.for_each_piece(name, &run, |_, bytes| {
                for bytes in bytes.chunks(page.byte_len()) {
                    pages.insert(at, Digest::of(bytes));
                    at += 1;
                }
                Ok::<_, ImageError>(())
            });
            read.unwrap();
        }
        found.insert(name, pages);
    }
    found
}

// Bytes on disk of all pages files.
fn room(root: &Path) -> u64 {
    let directories = fs::read_dir(root).unwrap();
    let files = directories.flat_map(|it| fs::read_dir(it.unwrap().path()).unwrap());
    let blocks = files.map(|file| {
        let file = file.unwrap();
        let is_pages = file.file_name().to_string_lossy().starts_with("pages-");
        if is_pages {
            file.metadata().unwrap().blocks() * 512
        } else {
            0
        }
    });
    blocks.sum()
}

fn migrate(seed: u64, page: PageSize) -> Result<(), StandbyError> {
    let place = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    let place = place.unwrap();
    let mut standby = Standby::create(&place.path().join("m"), page, false)?;
    let mut out = Outgoing::new(page);
    let mut world = World::new(seed, page);
    let iterations = u32::try_from(world.rng.below(7)).unwrap();
    for number in 1..=iterations {
        let mut records = Vec::new();
        out.begin(number, false, &mut records);
        world.read(|name, address, bytes| {
            out.pages(name, address, bytes, &mut records);
        });
        out.end(&mut records);
        deliver(&mut standby, records)?;
        standby.drop_replaced();
        // What vanished is kept, as it may come back; what was replaced is not.
        let most = world.ever.len() as u64 * page.bytes();
        let room = room(standby.root());
        assert!(room <= most, "{room} of {most} bytes, seed {seed}");
        world.run();
    }
    let records = world.final_records(&mut out, iterations + 1);
    let events = deliver(&mut standby, records)?;
    let [
        _,
        Event::Complete {
            directory, pages, ..
        },
    ] = events.as_slice()
    else {
        panic!("seed {seed}: {events:?}");
    };
    let expected = world.expected();
    let count: usize = expected.values().map(BTreeMap::len).sum();
    assert_eq!(*pages, count as u64, "seed {seed}");
    assert!(digests(directory, page) == expected, "seed {seed}");
    Ok(())
}

#[test]
fn whatever_a_workload_does_its_dump_arrives() {
    for seed in 0..30 {
        migrate(seed, PageSize::new(4096).unwrap()).unwrap();
    }
}

#[test]
fn large_pages_arrive_as_well() {
    for seed in 100..104 {
        migrate(seed, PageSize::new(64 << 10).unwrap()).unwrap();
    }
}
