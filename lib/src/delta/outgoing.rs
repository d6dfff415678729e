//! From pages that were read to records for the migration's stream: notes, and frames of what the
//! destination does not hold. The same for pages of a running tree and of its dump.

use std::collections::BTreeMap;

use super::{Changes, Compared, DumpedMemory, FileMeta, Known, dump_root, file_digest};
use crate::digest::{Digest, hash_blocks};
use crate::image::{PageFlags, PageRun, PagemapName};
use crate::page::PageSize;
use crate::wire::{Object, Op, StreamNote, limits};

/// What goes onto the stream next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// A note.
    Note(StreamNote),
    /// A frame.
    Frame(Changes),
}

/// One side of a migration as the source tells it: iteration by iteration.
#[derive(Debug)]
pub struct Outgoing {
    page: PageSize,
    known: Known,
    number: u32,
    is_final: bool,
    dumped: BTreeMap<PagemapName, DumpedMemory>,
    files: BTreeMap<String, (u16, Digest)>,
    changes: Vec<Changes>,
}

/// A file that is being put on the stream.
#[derive(Debug)]
pub struct OutgoingFile {
    object: u32,
    meta: FileMeta,
    segment: u64,
    blocks: Vec<Digest>,
}

/// A page that the dump leaves to an earlier iteration was never sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("CRIU leaves page {page:#x} of {memory} to an iteration that does not have it")]
pub struct Missing {
    /// Its memory.
    pub memory: PagemapName,
    /// Its address.
    pub page: u64,
}

impl Outgoing {
    /// Nothing has been sent.
    pub fn new(page: PageSize) -> Self {
        Self {
            page,
            known: Known::new(page),
            number: 0,
            is_final: false,
            dumped: BTreeMap::new(),
            files: BTreeMap::new(),
            changes: Vec::new(),
        }
    }

    /// The destination holds what `known` says.
    pub fn building_on(page: PageSize, known: Known) -> Self {
        Self {
            known,
            ..Self::new(page)
        }
    }

    /// What the destination holds when it has stored the dump that [`Outgoing::end`] ended, and
    /// nothing else: the dump's memories in their order, and its pages.
    pub fn into_known(self) -> Known {
        let mut held = Known::new(self.page);
        let mut digests = Vec::new();
        for (&memory, dumped) in &self.dumped {
            let (object, _) = held.object(memory);
            let Some(from) = self.known.find(memory) else {
                continue;
            };
            for run in dumped.runs() {
                let first = run.vaddr / self.page.bytes();
                digests.clear();
                let pages = first..first + run.pages;
                digests.extend(pages.filter_map(|page| self.known.digest(from, page)));
                held.hold(object, first, &digests);
            }
        }
        held
    }

    /// An iteration begins.
    pub fn begin(&mut self, number: u32, is_final: bool, out: &mut Vec<Record>) {
        (self.number, self.is_final) = (number, is_final);
        out.push(Record::Note(StreamNote::Begin { number, is_final }));
    }

    /// Whole pages of a running tree, from `address` on.
    pub fn pages(
        &mut self,
        memory: PagemapName,
        address: u64,
        bytes: &[u8],
        out: &mut Vec<Record>,
    ) -> Compared {
        let object = self.object(memory, out);
        self.compare(object, address, bytes, out)
    }

    /// The dump has this memory, be there pages in it or not.
    pub fn open_dumped(&mut self, memory: PagemapName, out: &mut Vec<Record>) {
        self.object(memory, out);
        self.dumped.entry(memory).or_default();
    }

    /// Whole pages of the dump. Must ascend within a memory.
    pub fn dumped_pages(
        &mut self,
        memory: PagemapName,
        address: u64,
        flags: PageFlags,
        bytes: &[u8],
        out: &mut Vec<Record>,
    ) -> Compared {
        let object = self.object(memory, out);
        let compared = self.compare(object, address, bytes, out);
        let dumped = self.dumped.entry(memory).or_default();
        dumped.add_pages(self.known.last_digests().iter().copied());
        let run = PageRun {
            vaddr: address,
            pages: compared.pages,
            flags,
        };
        dumped.add_run(run, self.page);
        compared
    }

    /// Pages that CRIU leaves to the iteration before, because the kernel says they are unchanged.
    pub fn dumped_in_parent(
        &mut self,
        memory: PagemapName,
        address: u64,
        pages: u64,
        out: &mut Vec<Record>,
    ) -> Result<(), Missing> {
        let object = self.object(memory, out);
        let first = address / self.page.bytes();
        let digests = (first..first + pages).map(|page| {
            self.known.digest(object, page).ok_or(Missing {
                memory,
                page: page * self.page.bytes(),
            })
        });
        let digests: Vec<_> = digests.collect::<Result<_, _>>()?;
        let dumped = self.dumped.entry(memory).or_default();
        dumped.add_pages(digests);
        let run = PageRun {
            vaddr: address,
            pages,
            flags: PageFlags::PRESENT,
        };
        dumped.add_run(run, self.page);
        Ok(())
    }

    /// The first of these pages that was never sent.
    pub fn missing(&self, memory: PagemapName, address: u64, pages: u64) -> Option<u64> {
        let first = address / self.page.bytes();
        let object = self.known.find(memory);
        let is_missing = |page: &u64| {
            let digest = object.and_then(|object| self.known.digest(object, *page));
            digest.is_none()
        };
        let page = (first..first + pages).find(is_missing)?;
        Some(page * self.page.bytes())
    }

    /// A file of the dump follows, part by part.
    pub fn begin_file(&mut self, meta: FileMeta, out: &mut Vec<Record>) -> OutgoingFile {
        self.flush(out);
        let object = self.known.new_object();
        out.push(Record::Note(StreamNote::Objects(vec![Object::File {
            name: meta.name.clone(),
            mode: meta.mode,
            size: meta.size,
        }])));
        OutgoingFile {
            object,
            meta,
            segment: 0,
            blocks: Vec::new(),
        }
    }

    /// The next part of a file: exactly [`OutgoingFile::next_part`] bytes.
    pub fn file_part(&mut self, file: &mut OutgoingFile, bytes: Vec<u8>, out: &mut Vec<Record>) {
        let before = file.blocks.len();
        hash_blocks(&bytes, file.meta.block_len as usize, &mut file.blocks);
        let blocks = u32::try_from(file.blocks.len() - before).expect("a part is a segment");
        out.push(Record::Frame(Changes {
            object: file.object,
            segment: file.segment,
            ops: vec![Op::Literal(blocks)],
            literal: bytes,
        }));
        file.segment += 1;
    }

    /// All parts of a file have been given.
    pub fn end_file(&mut self, file: OutgoingFile) {
        let digest = file_digest(&file.meta, &file.blocks);
        let name = file.meta.name.to_string();
        self.files.insert(name, (file.meta.mode, digest));
    }

    /// The iteration is complete.
    pub fn end(&mut self, out: &mut Vec<Record>) {
        self.flush(out);
        let number = self.number;
        let mut root = None;
        if self.is_final {
            for (&memory, dumped) in &self.dumped {
                let (object, _) = self.known.object(memory);
                let mut notes = dumped.runs().chunks(limits::RUNS_PER_NOTE).peekable();
                if notes.peek().is_none() {
                    let runs = Vec::new();
                    out.push(Record::Note(StreamNote::Runs { object, runs }));
                }
                out.extend(notes.map(|runs| {
                    let runs = runs.to_vec();
                    Record::Note(StreamNote::Runs { object, runs })
                }));
            }
            root = Some(dump_root(self.page, &self.dumped, &self.files));
        }
        out.push(Record::Note(StreamNote::End { number, root }));
    }

    fn object(&mut self, memory: PagemapName, out: &mut Vec<Record>) -> u32 {
        let (object, is_new) = self.known.object(memory);
        if is_new {
            let objects = vec![Object::Memory(memory)];
            out.push(Record::Note(StreamNote::Objects(objects)));
        }
        object
    }

    fn compare(
        &mut self,
        object: u32,
        address: u64,
        bytes: &[u8],
        out: &mut Vec<Record>,
    ) -> Compared {
        let first = address / self.page.bytes();
        let compared = self.known.compare(object, first, bytes, &mut self.changes);
        out.extend(self.changes.drain(..).map(Record::Frame));
        compared
    }

    fn flush(&mut self, out: &mut Vec<Record>) {
        out.extend(self.known.finish_segment().map(Record::Frame));
    }
}

impl OutgoingFile {
    /// Bytes of the next part; `None` when the file is complete.
    pub fn next_part(&self) -> Option<usize> {
        if self.segment == self.meta.segments() {
            return None;
        }
        let bytes = self.meta.bytes_of(&self.meta.segment_range(self.segment));
        Some(usize::try_from(bytes.end - bytes.start).expect("a segment fits into memory"))
    }
}
