//! What the destination of a live migration holds, as the source knows it: the digest of every page
//! that was sent, by its place. What is read again is compared here; only what differs is sent.

use std::collections::HashMap;

use super::{BlockRef, SEGMENT_BYTES};
use crate::digest::{Digest, hash_blocks, zero_digest};
use crate::image::PagemapName;
use crate::page::PageSize;
use crate::wire::Op;

/// Pages that are entered together: 512 bytes, so that one page far from all others costs little.
const GROUP: usize = 16;

/// Nothing has this digest: that page has not been sent.
const NOT_SENT: Digest = Digest([0; 32]);

/// How many pages of each kind a comparison found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compared {
    /// Pages that were compared.
    pub pages: u64,
    /// Of these, those that the destination does not hold at that place.
    pub changed: u64,
    /// Of the changed ones, those whose bytes must be sent.
    pub sent: u64,
}

impl std::ops::AddAssign for Compared {
    fn add_assign(&mut self, other: Self) {
        self.pages += other.pages;
        self.changed += other.changed;
        self.sent += other.sent;
    }
}

/// What has changed in one segment: the description of a frame, and its literal pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changes {
    /// Which memory.
    pub object: u32,
    /// Index of the segment in it.
    pub segment: u64,
    /// The segment's pages; [`Op::Held`] stands for what did not change or is not there.
    pub ops: Vec<Op>,
    /// The literal pages.
    pub literal: Vec<u8>,
}

/// The pages that the destination holds.
#[derive(Debug)]
pub struct Known {
    page: PageSize,
    segment_pages: usize,
    zero: Digest,
    objects: HashMap<PagemapName, u32>,
    // For each object, by the number of the group.
    tables: Vec<HashMap<u64, Box<[Digest; GROUP]>>>,
    // Eight bytes of a digest to the place where such a page was sent last: a hint, checked against
    // the table before it is used.
    places: HashMap<u64, BlockRef>,
    // Indexes of files follow those of memories.
    next_object: u32,
    open: Option<Changes>,
    described: u64,
    digests: Vec<Digest>,
}

impl Known {
    /// The destination holds nothing yet.
    pub fn new(page: PageSize) -> Self {
        Self {
            page,
            segment_pages: segment_pages(page),
            zero: zero_digest(page.byte_len()),
            objects: HashMap::new(),
            tables: Vec::new(),
            places: HashMap::new(),
            next_object: 0,
            open: None,
            described: 0,
            digests: Vec::new(),
        }
    }

    /// The index of this memory, and whether it was given just now: then the destination must be
    /// told of it before its first frame.
    pub fn object(&mut self, memory: PagemapName) -> (u32, bool) {
        if let Some(&object) = self.objects.get(&memory) {
            return (object, false);
        }
        let object = self.new_object();
        self.objects.insert(memory, object);
        (object, true)
    }

    /// The index of this memory, if it has one.
    pub fn find(&self, memory: PagemapName) -> Option<u32> {
        self.objects.get(&memory).copied()
    }

    /// The memories that have an index.
    pub fn memories(&self) -> impl Iterator<Item = PagemapName> {
        self.objects.keys().copied()
    }

    /// An index for something else that is sent.
    pub fn new_object(&mut self) -> u32 {
        self.tables.push(HashMap::new());
        self.next_object += 1;
        self.next_object - 1
    }

    /// Compares whole pages from the page numbered `first` of `object` on with what is held, and
    /// takes them for held from now on. Pages must come in ascending order within an object and
    /// iteration. Changes of segments that are complete now go to `ready`.
    ///
    /// # Panics
    /// If `object` was not given out, or `bytes` are no whole pages.
    pub fn compare(
        &mut self,
        object: u32,
        first: u64,
        bytes: &[u8],
        ready: &mut Vec<Changes>,
    ) -> Compared {
        let page_len = self.page.byte_len();
        assert!(bytes.len().is_multiple_of(page_len), "whole pages only");
        let mut digests = std::mem::take(&mut self.digests);
        digests.clear();
        hash_blocks(bytes, page_len, &mut digests);
        let mut compared = Compared::default();
        for ((page, digest), bytes) in (first..).zip(&digests).zip(bytes.chunks_exact(page_len)) {
            compared += self.compare_page(object, page, *digest, bytes, ready);
        }
        self.digests = digests;
        compared
    }

    /// The destination holds these pages from the page numbered `first` of `object` on, from before.
    ///
    /// # Panics
    /// If `object` was not given out.
    pub fn hold(&mut self, object: u32, first: u64, digests: &[Digest]) {
        for (page, &digest) in (first..).zip(digests) {
            *self.slot(object, page) = digest;
            if digest != self.zero {
                let place = BlockRef {
                    file: object,
                    block: page,
                };
                self.places.insert(place_key(&digest), place);
            }
        }
    }

    /// The digests of the pages that [`Known::compare`] was given last, in their order.
    pub fn last_digests(&self) -> &[Digest] {
        &self.digests
    }

    /// The digest of a page that is held.
    pub fn digest(&self, object: u32, page: u64) -> Option<Digest> {
        let table = self.tables.get(object as usize)?;
        let group = table.get(&(page / GROUP as u64))?;
        let digest = group[index_in(page, GROUP as u64)];
        (digest != NOT_SENT).then_some(digest)
    }

    /// The changes of the segment that was compared last: nothing more of it comes.
    pub fn finish_segment(&mut self) -> Option<Changes> {
        let mut changes = self.open.take()?;
        let left = self.segment_pages as u64 - self.described;
        if changes.ops.iter().all(|op| matches!(op, Op::Held(_))) {
            return None;
        }
        push_held(&mut changes.ops, left);
        Some(changes)
    }

    fn compare_page(
        &mut self,
        object: u32,
        page: u64,
        digest: Digest,
        bytes: &[u8],
        ready: &mut Vec<Changes>,
    ) -> Compared {
        let per_segment = self.segment_pages as u64;
        let (segment, index) = (page / per_segment, index_in(page, per_segment));
        let is_open = |open: &Changes| open.object == object && open.segment == segment;
        if !self.open.as_ref().is_some_and(is_open) {
            ready.extend(self.finish_segment());
            self.open = Some(Changes {
                object,
                segment,
                ops: Vec::new(),
                literal: Vec::new(),
            });
            self.described = 0;
        }
        let slot = self.slot(object, page);
        let mut compared = Compared {
            pages: 1,
            ..Compared::default()
        };
        if *slot == digest {
            return compared;
        }
        *slot = digest;
        compared.changed = 1;
        let op = self.op_for(object, page, digest);
        let open = self.open.as_mut().expect("opened above");
        push_held(&mut open.ops, index as u64 - self.described);
        self.described = index as u64 + 1;
        if op == Op::Literal(1) {
            compared.sent = 1;
            open.literal.extend_from_slice(bytes);
        }
        Op::push(&mut open.ops, op);
        compared
    }

    fn slot(&mut self, object: u32, page: u64) -> &mut Digest {
        let table = &mut self.tables[object as usize];
        let group = table.entry(page / GROUP as u64);
        let group = group.or_insert_with(|| Box::new([NOT_SENT; GROUP]));
        &mut group[index_in(page, GROUP as u64)]
    }

    // How the destination comes by a page with this digest.
    fn op_for(&mut self, object: u32, page: u64, digest: Digest) -> Op {
        if digest == self.zero {
            return Op::Zero(1);
        }
        let here = BlockRef {
            file: object,
            block: page,
        };
        let place = self.places.insert(place_key(&digest), here);
        match place {
            // It still holds that, unless something else was sent there since.
            Some(place)
                if place != here && self.digest(place.file, place.block) == Some(digest) =>
            {
                Op::Same(1, place)
            }
            _ => Op::Literal(1),
        }
    }
}

/// Pages of one segment.
pub(crate) fn segment_pages(page: PageSize) -> usize {
    usize::try_from((SEGMENT_BYTES / page.bytes()).max(1)).expect("a segment fits into memory")
}

fn place_key(digest: &Digest) -> u64 {
    u64::from_le_bytes(digest.0[..8].try_into().expect("eight bytes"))
}

fn index_in(page: u64, per_segment: u64) -> usize {
    usize::try_from(page % per_segment).expect("within a segment")
}

fn push_held(ops: &mut Vec<Op>, pages: u64) {
    if pages > 0 {
        let pages = u32::try_from(pages).expect("within a segment");
        Op::push(ops, Op::Held(pages));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 4096;

    fn page(value: u8) -> Vec<u8> {
        vec![value; PAGE]
    }

    fn known() -> Known {
        Known::new(PageSize::new(4096).unwrap())
    }

    // All changes of one pass over `pages`, page number and value each.
    fn pass(known: &mut Known, object: u32, pages: &[(u64, u8)]) -> (Vec<Changes>, Compared) {
        let (mut ready, mut compared) = (Vec::new(), Compared::default());
        for &(number, value) in pages {
            compared += known.compare(object, number, &page(value), &mut ready);
        }
        ready.extend(known.finish_segment());
        (ready, compared)
    }

    #[test]
    fn only_what_changed_is_described() {
        let mut known = known();
        let (object, is_new) = known.object(PagemapName::Task(7));
        assert!(is_new);
        assert_eq!(known.object(PagemapName::Task(7)), (object, false));
        let (changes, compared) = pass(&mut known, object, &[(3, 1), (4, 2), (300, 3)]);
        assert_eq!((compared.pages, compared.changed, compared.sent), (3, 3, 3));
        assert_eq!(changes[0].ops, [Op::Held(3), Op::Literal(2), Op::Held(251)]);
        assert_eq!(changes[0].literal, [page(1), page(2)].concat());
        assert_eq!((changes[1].segment, changes[1].ops[0]), (1, Op::Held(44)));
        let (changes, compared) = pass(&mut known, object, &[(3, 1), (4, 9), (300, 3)]);
        assert_eq!((compared.pages, compared.changed), (3, 1));
        assert_eq!(changes.len(), 1);
        assert_eq!(changes[0].ops, [Op::Held(4), Op::Literal(1), Op::Held(251)]);
        let (changes, _) = pass(&mut known, object, &[(3, 1), (4, 9), (300, 3)]);
        assert!(changes.is_empty());
    }

    #[test]
    fn zero_pages_and_copies_need_no_bytes() {
        let mut known = known();
        let (parent, _) = known.object(PagemapName::Task(1));
        let (child, _) = known.object(PagemapName::Task(2));
        pass(&mut known, parent, &[(10, 5), (11, 6)]);
        let (changes, compared) = pass(&mut known, child, &[(10, 5), (11, 6), (12, 0)]);
        assert_eq!((compared.changed, compared.sent), (3, 0));
        let from = BlockRef {
            file: parent,
            block: 10,
        };
        assert_eq!(
            changes[0].ops,
            [Op::Held(10), Op::Same(2, from), Op::Zero(1), Op::Held(243)]
        );
        assert!(changes[0].literal.is_empty());
    }

    #[test]
    fn what_was_held_before_is_neither_sent_nor_forgotten_as_a_source_of_copies() {
        let mut known = known();
        let (object, _) = known.object(PagemapName::Task(7));
        let digests = [1, 2, 0].map(|value| Digest::of(&page(value)));
        known.hold(object, 20, &digests);
        let (changes, compared) = pass(&mut known, object, &[(20, 1), (21, 9), (22, 0), (23, 1)]);
        assert_eq!((compared.changed, compared.sent), (2, 1));
        let from = BlockRef {
            file: object,
            block: 20,
        };
        assert_eq!(
            changes[0].ops[1..4],
            [Op::Literal(1), Op::Held(1), Op::Same(1, from)]
        );
    }

    #[test]
    fn a_copy_is_not_taken_from_a_page_that_changed_since() {
        let mut known = known();
        let (object, _) = known.object(PagemapName::Shmem(1));
        pass(&mut known, object, &[(0, 5)]);
        pass(&mut known, object, &[(0, 6)]);
        let (_, compared) = pass(&mut known, object, &[(1, 5)]);
        assert_eq!(compared.sent, 1);
    }
}
