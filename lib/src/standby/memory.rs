//! The pages of one memory: where each of them was written, and with which digest.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;

use super::{HeldMemory, PlaceOf, Places, StandbyError};
use crate::delta::{DumpedMemory, segment_pages};
use crate::digest::{Digest, VerifiedRun, zero_digest};
use crate::image::{PageFlags, PageRun, Pagemap, PagemapName, pages_file_name};
use crate::page::PageSize;
use crate::store::Tried as _;
use crate::wire::{FrameHeader, Op};

/// Pages that are entered together: 640 bytes, so that one page far from all others costs little.
const GROUP: usize = 16;

#[derive(Clone, Copy, Debug)]
struct Slot {
    digest: Digest,
    // Iteration 0: no such page.
    place: PlaceOf,
}

/// The pages file of the iteration that arrives. Its descriptor is held by whoever writes, for one
/// file at a time.
#[derive(Debug)]
struct Out {
    path: PathBuf,
    pages: u32,
    // The page that was written last: they must ascend, as the file has them in their order.
    last: Option<u64>,
}

/// What became of one memory in the final iteration.
#[derive(Debug)]
pub(super) struct Built {
    pub(super) dumped: DumpedMemory,
    pub(super) pages: u64,
    pub(super) fresh_pages: u64,
    // Of a page session: the digests of its fresh pages.
    pub(super) fresh: Vec<Digest>,
}

#[derive(Debug)]
pub(super) struct Memory {
    pages_id: u32,
    // Of the directories that were here before, the first iterations; of a page session only.
    held_ids: Option<Vec<u32>>,
    page: PageSize,
    segment_pages: usize,
    zero: Digest,
    // By the number of the group.
    table: BTreeMap<u64, Box<[Slot; GROUP]>>,
    out: Option<Out>,
    // Of the final iteration, where the dump holds this memory.
    runs: Option<Vec<PageRun>>,
    replaced: Vec<PlaceOf>,
}

impl Memory {
    pub(super) fn new(pages_id: u32, page: PageSize) -> Self {
        Self {
            pages_id,
            held_ids: None,
            page,
            segment_pages: segment_pages(page),
            zero: zero_digest(page.byte_len()),
            table: BTreeMap::new(),
            out: None,
            runs: None,
            replaced: Vec::new(),
        }
    }

    /// A memory of which some pages were here before.
    pub(super) fn held(pages_id: u32, page: PageSize, held: HeldMemory) -> Self {
        let mut memory = Self::new(pages_id, page);
        for run in held.runs {
            let iteration = u32::try_from(run.level + 1).expect("a chain is limited");
            for (page, (index, digest)) in (run.first..).zip((run.index..).zip(run.digests)) {
                let place = PlaceOf { iteration, index };
                memory.set(page, Slot { digest, place });
            }
        }
        memory.held_ids = Some(held.pages_ids);
        memory
    }

    /// Refuses a frame that does not describe a segment with `raw_len` literal bytes. To be called
    /// before anything is made from its ops.
    pub(super) fn check(
        &self,
        segment: u64,
        ops: &[Op],
        raw_len: usize,
    ) -> Result<(), StandbyError> {
        let described: u64 = ops.iter().map(|op| u64::from(op.blocks())).sum();
        let per_segment = self.segment_pages as u64;
        let literal: u64 = ops.iter().map(literal_pages).sum();
        if described != per_segment
            || segment > u64::MAX / self.page.bytes() / per_segment - 1
            || literal * self.page.bytes() != raw_len as u64
        {
            return Err(StandbyError::Protocol("a frame of the wrong length"));
        }
        Ok(())
    }

    /// The pages file of this iteration, for [`Memory::write`].
    pub(super) fn open(&mut self, directory: &Path) -> Result<File, StandbyError> {
        let path = directory.join(self.pages_name());
        if self.out.is_some() {
            let file = OpenOptions::new().write(true).open(&path);
            return Ok(file.tried("open", &path)?);
        }
        let file = private(&path)?;
        self.out = Some(Out {
            path,
            pages: 0,
            last: None,
        });
        Ok(file)
    }

    /// Writes the pages that a frame describes, which [`Memory::check`] has seen; gives the bytes
    /// written.
    pub(super) fn write(
        &mut self,
        file: &File,
        places: &Places,
        header: &FrameHeader,
        ops: &[Op],
        run: &VerifiedRun,
        copies: &[VerifiedRun],
    ) -> Result<u64, StandbyError> {
        let mut writer = self.out.take().expect("opened before");
        let begin = writer.pages;
        let mut page = header.segment * self.segment_pages as u64;
        let (mut literals, mut copies) = (0, copies.iter());
        for op in ops {
            for at in page..page + u64::from(op.blocks()) {
                let digest = match op {
                    Op::Held(_) => break,
                    Op::Zero(_) => self.zero,
                    Op::Literal(_) => {
                        literals += 1;
                        run.digests()[literals - 1]
                    }
                    Op::Same(_, from) => {
                        let own;
                        let copy = if from.file == header.file {
                            own = self.read(from.block.saturating_add(at - page), places)?;
                            &own
                        } else {
                            copies.next().expect("found for each page")
                        };
                        writer.put(file, copy.bytes(), self.page)?;
                        copy.digests()[0]
                    }
                };
                writer.take(at)?;
                let place = PlaceOf {
                    iteration: places.iteration,
                    index: writer.pages - 1,
                };
                self.set(at, Slot { digest, place });
            }
            if let Op::Literal(count) = op {
                let end = literals * self.page.byte_len();
                let from = end - *count as usize * self.page.byte_len();
                writer.put_behind(file, &run.bytes()[from..end], self.page)?;
            }
            page += u64::from(op.blocks());
        }
        let written = u64::from(writer.pages - begin) * self.page.bytes();
        self.out = Some(writer);
        Ok(written)
    }

    fn set(&mut self, page: u64, slot: Slot) {
        let (group, index) = group_of(page);
        let empty = Slot {
            digest: Digest([0; 32]),
            place: PlaceOf::default(),
        };
        let group = self.table.entry(group);
        let slots = group.or_insert_with(|| Box::new([empty; GROUP]));
        if slots[index].place.iteration != 0 {
            self.replaced.push(slots[index].place);
        }
        slots[index] = slot;
    }

    fn get(&self, page: u64) -> Option<Slot> {
        let (group, index) = group_of(page);
        let slot = self.table.get(&group)?[index];
        (slot.place.iteration != 0).then_some(slot)
    }

    /// The bytes of a page, checked.
    pub(super) fn read(&self, page: u64, places: &Places) -> Result<VerifiedRun, StandbyError> {
        let slot = self
            .get(page)
            .ok_or(StandbyError::Protocol("a copy of a page that was not sent"))?;
        let directory = places.directory(slot.place.iteration);
        let path = directory.join(self.pages_name_in(slot.place.iteration));
        let file = File::open(&path).tried("open", &path)?;
        let mut bytes = vec![0; self.page.byte_len()];
        let offset = u64::from(slot.place.index) * self.page.bytes();
        // Zero pages at the end of a file that still grows are not there yet.
        read_to_end_at(&file, &mut bytes, offset).tried("read", &path)?;
        let run = VerifiedRun::hash(bytes.into(), self.page.byte_len());
        match run.digests()[0] == slot.digest {
            true => Ok(run),
            false => Err(StandbyError::Root),
        }
    }

    /// Pages that the dump holds, in ascending order over all calls.
    pub(super) fn add_runs(
        &mut self,
        runs: &[PageRun],
        page: PageSize,
    ) -> Result<(), StandbyError> {
        let known = self.runs.get_or_insert_default();
        for run in runs {
            let bytes = run.pages.checked_mul(page.bytes());
            let end = bytes.and_then(|bytes| run.vaddr.checked_add(bytes));
            let follows = known.last().is_none_or(|last| last.end(page) <= run.vaddr);
            if end.is_none() || !follows || !run.vaddr.is_multiple_of(page.bytes()) {
                return Err(StandbyError::Protocol("pages out of order"));
            }
            // More runs than pages: they would only take memory.
            if known.len() >= self.table.len() * GROUP {
                return Err(StandbyError::Protocol(
                    "a page of the dump that was not sent",
                ));
            }
            known.push(*run);
        }
        Ok(())
    }

    /// Ends an iteration: its pagemap has all pages that are known.
    pub(super) fn finish(
        &mut self,
        directory: &Path,
        name: PagemapName,
        iteration: u32,
    ) -> Result<(), StandbyError> {
        let mut runs = Vec::new();
        for (group, slots) in &self.table {
            let first = group * GROUP as u64;
            for (page, slot) in (first..).zip(slots.iter()) {
                let flags = match slot.place.iteration {
                    0 => continue,
                    at if at == iteration => PageFlags::PRESENT,
                    _ => PageFlags::PARENT,
                };
                push_page(&mut runs, page, flags, self.page);
            }
        }
        self.close_out(directory)?;
        self.write_pagemap(directory, name, runs)
    }

    /// Ends the final iteration, where the dump holds this memory.
    pub(super) fn finish_final(
        &mut self,
        directory: &Path,
        name: PagemapName,
        iteration: u32,
    ) -> Result<Option<Built>, StandbyError> {
        let Some(dumped_runs) = self.runs.take() else {
            return match self.out {
                // They would lie in a file that nothing refers to.
                Some(_) => Err(StandbyError::Protocol("pages that are not in the dump")),
                None => Ok(None),
            };
        };
        let mut built = Built {
            dumped: DumpedMemory::default(),
            pages: 0,
            fresh_pages: 0,
            fresh: Vec::new(),
        };
        let keeps_digests = self.held_ids.is_some();
        let mut runs = Vec::new();
        let mut digests = Vec::new();
        for run in dumped_runs {
            let first = run.vaddr / self.page.bytes();
            digests.clear();
            for page in first..first + run.pages {
                let slot = self.get(page).ok_or(StandbyError::Protocol(
                    "a page of the dump that was not sent",
                ))?;
                digests.push(slot.digest);
                let is_fresh = slot.place.iteration == iteration;
                // The file is read in the order of the pagemap.
                if is_fresh && u64::from(slot.place.index) != built.fresh_pages {
                    return Err(StandbyError::Protocol("pages that are not in the dump"));
                }
                built.fresh_pages += u64::from(is_fresh);
                if is_fresh && keeps_digests {
                    built.fresh.push(slot.digest);
                }
                let flags = if is_fresh {
                    run.flags
                } else {
                    PageFlags::PARENT
                };
                push_page(&mut runs, page, flags, self.page);
            }
            built.pages += run.pages;
            built.dumped.add_pages(digests.iter().copied());
            built.dumped.add_run(run, self.page);
        }
        let written = self.out.as_ref().map_or(0, |out| u64::from(out.pages));
        if written != built.fresh_pages {
            return Err(StandbyError::Protocol("pages that are not in the dump"));
        }
        self.close_out(directory)?;
        self.write_pagemap(directory, name, runs)?;
        Ok(Some(built))
    }

    fn write_pagemap(
        &self,
        directory: &Path,
        name: PagemapName,
        runs: Vec<PageRun>,
    ) -> Result<(), StandbyError> {
        let name = name.to_string();
        let pagemap = Pagemap::new(&name, self.pages_id, self.page, runs)?;
        let path = directory.join(&name);
        let mut file = private(&path)?;
        std::io::Write::write_all(&mut file, &pagemap.encode()).tried("write", &path)?;
        Ok(())
    }

    // CRIU opens the pages file although no page may be in it.
    fn close_out(&mut self, directory: &Path) -> Result<(), StandbyError> {
        let file = self.open(directory)?;
        let out = self.out.take().expect("opened just now");
        let length = u64::from(out.pages) * self.page.bytes();
        // Zero pages at the end are a hole that nothing was written behind.
        file.set_len(length).tried("extend", &out.path)?;
        Ok(())
    }

    /// Its pages file in the directory that arrives.
    pub(super) fn pages_name(&self) -> String {
        pages_file_name(self.pages_id)
    }

    fn pages_name_in(&self, iteration: u32) -> String {
        let held = self.held_ids.as_ref().and_then(|ids| {
            let level = usize::try_from(iteration).ok()?.checked_sub(1)?;
            ids.get(level)
        });
        pages_file_name(*held.unwrap_or(&self.pages_id))
    }

    /// Gives back the room of pages that were replaced. A file system that cannot do that keeps them.
    pub(super) fn drop_replaced(&mut self, root: &Path) {
        let mut replaced = std::mem::take(&mut self.replaced);
        replaced.sort_unstable_by_key(|place| (place.iteration, place.index));
        let follows = |a: &PlaceOf, b: &PlaceOf| {
            a.iteration == b.iteration && a.index.checked_add(1) == Some(b.index)
        };
        let mut open: Option<(u32, File)> = None;
        for run in replaced.chunk_by(follows) {
            let (first, pages) = (run[0], run.len() as u64);
            if open
                .as_ref()
                .is_none_or(|(iteration, _)| *iteration != first.iteration)
            {
                let directory = root.join(first.iteration.to_string());
                let path = directory.join(self.pages_name());
                open = fs::OpenOptions::new()
                    .write(true)
                    .open(path)
                    .ok()
                    .map(|file| (first.iteration, file));
            }
            let Some((_, file)) = &open else { continue };
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let offset = u64::from(first.index) * self.page.bytes();
            let _ = rustix::fs::fallocate(file, punch, offset, pages * self.page.bytes());
        }
    }
}

impl Out {
    // A page gets the next place in the file.
    fn take(&mut self, page: u64) -> Result<(), StandbyError> {
        if self.last.is_some_and(|last| last >= page) {
            return Err(StandbyError::Protocol("pages out of order"));
        }
        self.last = Some(page);
        self.pages = self
            .pages
            .checked_add(1)
            .ok_or(StandbyError::Protocol("too many pages in one iteration"))?;
        Ok(())
    }

    // Writes where the next page will be.
    fn put(&self, file: &File, bytes: &[u8], page: PageSize) -> Result<(), StandbyError> {
        let offset = u64::from(self.pages) * page.bytes();
        Ok(file
            .write_all_at(bytes, offset)
            .tried("write", &self.path)?)
    }

    // Writes the pages that were taken last.
    fn put_behind(&self, file: &File, bytes: &[u8], page: PageSize) -> Result<(), StandbyError> {
        let end = u64::from(self.pages) * page.bytes();
        let offset = end - bytes.len() as u64;
        Ok(file
            .write_all_at(bytes, offset)
            .tried("write", &self.path)?)
    }
}

fn group_of(page: u64) -> (u64, usize) {
    let group = GROUP as u64;
    let index = usize::try_from(page % group).expect("within a group");
    (page / group, index)
}

fn read_to_end_at(file: &File, bytes: &mut [u8], offset: u64) -> std::io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], offset + done as u64) {
            Ok(0) => return Ok(()),
            Ok(read) => done += read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn literal_pages(op: &Op) -> u64 {
    match op {
        Op::Literal(count) => u64::from(*count),
        _ => 0,
    }
}

fn push_page(runs: &mut Vec<PageRun>, page: u64, flags: PageFlags, size: PageSize) {
    let vaddr = page * size.bytes();
    match runs.last_mut() {
        Some(last) if last.flags == flags && last.end(size) == vaddr => last.pages += 1,
        _ => runs.push(PageRun {
            vaddr,
            pages: 1,
            flags,
        }),
    }
}

fn private(path: &Path) -> Result<File, StandbyError> {
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    Ok(file.tried("create", path)?)
}
