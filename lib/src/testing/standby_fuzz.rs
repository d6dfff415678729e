//! The fuzz target that drives a destination's standby, and the model that it is held against.
//!
//! ```text
//! byte 0     page size: even 4 KiB, odd 64 KiB; bit 7: a page session that builds on four pages
//! then records, each a byte and its arguments (a byte each unless said):
//!   0  begin         bit 3: final; low bits 7: a number out of order
//!   1  memory        bit 0: shared; the rest: id
//!   2  file          name and mode; size / 16 (u16)
//!   3  frame         object; segment (from 0xf0 on far away); ops (bit 7: not filled up, bit 6: zstd)
//!                    each op: kind; count; literal: value; same: object, page
//!   4  runs          object; 0: all pages that are there, else all but some; 0xff: address, pages
//!   5  end           0: as an honest source would, else with another root or without
//!   6  note          length, then a note as it stands on the wire
//!   7  frame         header, ops and payload as they stand on the wire
//!   8  drop_replaced
//!   9  prepare_final
//!   10 part of file  object; value: the next part
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::fuzz::tempfile_directory;
use crate::delta::codec::{Compressor, Level};
use crate::delta::{BlockRef, DumpedMemory, FileMeta, FileName, dump_root, file_digest};
use crate::digest::{Digest, zero_digest};
use crate::image::{Chain, ImageError, PageFlags, PageRun, Pagemap, PagemapName, PagesReader};
use crate::page::PageSize;
use crate::standby::{Event, FINAL, HeldMemory, HeldPages, HeldPlaces, Standby};
use crate::wire::{Codec, FrameHeader, HEADER_LEN, Object, Op, StreamNote, decode_page_ops};

/// More records teach nothing that these do not, and cost time.
const MOST_RECORDS: usize = 200;

/// What one memory or file is, as the model has it.
#[derive(Debug)]
enum Thing {
    Memory {
        name: PagemapName,
        pages: BTreeMap<u64, Digest>,
        runs: Option<Vec<PageRun>>,
    },
    File {
        meta: FileMeta,
        blocks: Vec<Digest>,
    },
}

/// What was accepted so far, by an obvious reading of the rules.
#[derive(Debug)]
struct Model {
    page: PageSize,
    iteration: u32,
    is_final: bool,
    things: Vec<Thing>,
}

impl Model {
    fn note(&mut self, note: &StreamNote) {
        match note {
            StreamNote::Begin { number, is_final } => {
                (self.iteration, self.is_final) = (*number, *is_final);
            }
            StreamNote::Objects(objects) => {
                let things = objects.iter().map(|object| thing(object, self.page));
                self.things.extend(things);
            }
            StreamNote::Runs { object, runs } => {
                let Some(Thing::Memory { runs: known, .. }) = self.things.get_mut(*object as usize)
                else {
                    panic!("runs of what is no memory were taken");
                };
                known.get_or_insert_default().extend(runs);
            }
            StreamNote::End { .. } => {}
        }
    }

    // A frame that was accepted.
    fn frame(&mut self, header: &FrameHeader, ops: &[Op], raw: &[u8]) {
        let (page, page_len) = (self.page, self.page.byte_len());
        let per_segment = (1 << 20) / page.bytes();
        let object = header.file as usize;
        if let Thing::File { meta, blocks } = &mut self.things[object] {
            blocks.extend(raw.chunks(meta.block_len as usize).map(Digest::of));
            return;
        }
        let mut literal = raw.chunks_exact(page_len);
        let mut at = header.segment * per_segment;
        for op in ops {
            for step in 0..u64::from(op.blocks()) {
                let digest = match *op {
                    Op::Held(_) => break,
                    Op::Zero(_) => zero_digest(page_len),
                    Op::Literal(_) => Digest::of(literal.next().expect("lengths were checked")),
                    Op::Same(_, from) => self.pages(from.file)[&(from.block + step)],
                };
                self.pages_mut(object).insert(at + step, digest);
            }
            at += u64::from(op.blocks());
        }
        assert_eq!(at, (header.segment + 1) * per_segment, "a whole segment");
    }

    fn pages(&self, object: u32) -> &BTreeMap<u64, Digest> {
        match &self.things[object as usize] {
            Thing::Memory { pages, .. } => pages,
            Thing::File { .. } => panic!("a copy of a file's block was taken"),
        }
    }

    fn pages_mut(&mut self, object: usize) -> &mut BTreeMap<u64, Digest> {
        match &mut self.things[object] {
            Thing::Memory { pages, .. } => pages,
            Thing::File { .. } => panic!("pages of a file were taken"),
        }
    }

    // All pages of a memory as runs, those of which `leave` is true left out.
    fn runs_of(&self, object: u32, leave: impl Fn(u64) -> bool) -> Vec<PageRun> {
        let mut runs: Vec<PageRun> = Vec::new();
        let Some(Thing::Memory { pages, .. }) = self.things.get(object as usize) else {
            return runs;
        };
        for &page in pages.keys().filter(|&&page| !leave(page)) {
            let vaddr = page * self.page.bytes();
            match runs.last_mut() {
                Some(last) if last.end(self.page) == vaddr => last.pages += 1,
                _ => runs.push(PageRun {
                    vaddr,
                    pages: 1,
                    flags: PageFlags::PRESENT,
                }),
            }
        }
        runs
    }

    // What the dump has: each page of the stated runs, or nothing where one was never sent.
    fn dump(&self) -> Option<BTreeMap<PagemapName, BTreeMap<u64, Digest>>> {
        let mut dump = BTreeMap::new();
        for thing in &self.things {
            let Thing::Memory { name, pages, runs } = thing else {
                continue;
            };
            let Some(runs) = runs else { continue };
            let mut dumped = BTreeMap::new();
            for run in runs {
                let first = run.vaddr / self.page.bytes();
                for page in first..first.checked_add(run.pages)? {
                    dumped.insert(page, *pages.get(&page)?);
                }
            }
            dump.insert(*name, dumped);
        }
        Some(dump)
    }

    fn root(&self) -> Option<Digest> {
        let dump = self.dump()?;
        let (mut memories, mut files) = (BTreeMap::new(), BTreeMap::new());
        for thing in &self.things {
            match thing {
                Thing::Memory { name, runs, .. } => {
                    let Some(runs) = runs else { continue };
                    let mut dumped = DumpedMemory::default();
                    dumped.add_pages(dump[name].values().copied());
                    runs.iter().for_each(|run| dumped.add_run(*run, self.page));
                    memories.insert(*name, dumped);
                }
                Thing::File { meta, blocks } => {
                    let digest = file_digest(meta, blocks);
                    files.insert(meta.name.to_string(), (meta.mode, digest));
                }
            }
        }
        Some(dump_root(self.page, &memories, &files))
    }
}

fn thing(object: &Object, page: PageSize) -> Thing {
    match object {
        &Object::Memory(name) => Thing::Memory {
            name,
            pages: BTreeMap::new(),
            runs: None,
        },
        Object::File { name, mode, size } => Thing::File {
            meta: FileMeta::new(name.clone(), *mode, *size, page),
            blocks: Vec::new(),
        },
    }
}

/// The fuzzer's bytes, one after the other.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (&first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(first)
    }

    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }
}

/// A standby in a directory of its own, and what it should hold.
struct Scene {
    directory: PathBuf,
    standby: Standby,
    is_session: bool,
    model: Model,
    complete: Option<(PathBuf, u64)>,
}

/// The standby of a live migration: whatever is sent, it ends in an error or in exactly the dump that
/// was stated, and nothing is written beside its directory.
pub fn standby(data: &[u8]) {
    run(data);
}

// Whether a dump was completed.
fn run(data: &[u8]) -> bool {
    static RUNS: AtomicU64 = AtomicU64::new(0);
    let Some((&first, records)) = data.split_first() else {
        return false;
    };
    let page = if first & 1 == 0 { 4096 } else { 64 << 10 };
    let page = PageSize::new(page).expect("a page size");
    let run = RUNS.fetch_add(1, Ordering::Relaxed);
    let name = format!("crxfer-fuzz-standby-{}-{run}", std::process::id());
    let directory = tempfile_directory().join(name);
    fs::create_dir(&directory).expect("a scratch directory can be made");
    let remove = RemoveOnDrop(directory.clone());
    let root = directory.join("m");
    let is_session = first & 0x80 != 0;
    let (standby, things) = if is_session {
        building_on_four(&root, page)
    } else {
        let standby = Standby::create(&root, page, false);
        (standby.expect("the directory is new"), Vec::new())
    };
    let mut scene = Scene {
        directory,
        standby,
        is_session,
        model: Model {
            page,
            iteration: 0,
            is_final: false,
            things,
        },
        complete: None,
    };
    let mut bytes = Bytes(records);
    for _ in 0..MOST_RECORDS {
        if scene.record(&mut bytes).is_none() {
            break;
        }
    }
    scene.check();
    drop(remove);
    scene.complete.is_some()
}

// A page session in `root/final`, on the set `root/1`, which has four pages of task 0.
fn building_on_four(root: &Path, page: PageSize) -> (Standby, Vec<Thing>) {
    const NAME: PagemapName = PagemapName::Task(0);
    let (set, directory) = (root.join("1"), root.join(FINAL));
    for made in [&set, &directory] {
        fs::create_dir_all(made).expect("a scratch directory can be made");
    }
    let bytes: Vec<u8> = (1..=4)
        .flat_map(|value| vec![value; page.byte_len()])
        .collect();
    let run = PageRun {
        vaddr: 0,
        pages: 4,
        flags: PageFlags::PRESENT,
    };
    let pagemap = Pagemap::new("pagemap-0.img", 3, page, vec![run]).expect("a good run");
    fs::write(set.join("pages-3.img"), &bytes).expect("room");
    fs::write(set.join("pagemap-0.img"), pagemap.encode()).expect("room");
    let digests: Vec<_> = bytes.chunks(page.byte_len()).map(Digest::of).collect();
    let held = HeldPages {
        directories: vec![set],
        memories: vec![HeldMemory {
            name: NAME,
            pages_ids: vec![3],
            runs: vec![HeldPlaces {
                first: 0,
                level: 0,
                index: 0,
                digests: digests.clone(),
            }],
        }],
    };
    let standby = Standby::building_on(&directory, page, held, Some(64 << 20));
    let thing = Thing::Memory {
        name: NAME,
        pages: (0..).zip(digests).collect(),
        runs: None,
    };
    (standby.expect("zstd has memory"), vec![thing])
}

struct RemoveOnDrop(PathBuf);

impl Drop for RemoveOnDrop {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Scene {
    // None at the end of the input, and where the standby has refused something: its driver ends then.
    fn record(&mut self, bytes: &mut Bytes<'_>) -> Option<()> {
        match bytes.byte()? % 11 {
            0 => {
                let byte = bytes.byte()?;
                let number = self.model.iteration + 1 + u32::from(byte & 7 == 7);
                let is_final = byte & 8 != 0;
                self.note(StreamNote::Begin { number, is_final })
            }
            1 => {
                let byte = bytes.byte()?;
                let id = u64::from(byte >> 1);
                let name = if byte & 1 == 0 {
                    PagemapName::Task(id)
                } else {
                    PagemapName::Shmem(id)
                };
                self.note(StreamNote::Objects(vec![Object::Memory(name)]))
            }
            2 => {
                let (name, mode) = (bytes.byte()?, bytes.byte()?);
                let size = u64::from(bytes.byte()?) | u64::from(bytes.byte()?) << 8;
                let name = FileName::new(format!("core-{name}.img")).expect("a good name");
                let file = Object::File {
                    name,
                    mode: 0o600 | u16::from(mode) & 0o177,
                    size: size * 16,
                };
                self.note(StreamNote::Objects(vec![file]))
            }
            3 => self.made_frame(bytes),
            4 => self.runs(bytes),
            5 => self.end(bytes.byte()?),
            6 => {
                let length = bytes.byte()?;
                match StreamNote::decode(bytes.take(length.into())?) {
                    Ok(note) => self.note(note),
                    Err(_) => Some(()),
                }
            }
            7 => self.raw_frame(bytes),
            8 => {
                self.standby.drop_replaced();
                Some(())
            }
            // A page session has no directory of that kind.
            9 if self.is_session => Some(()),
            9 => self.standby.prepare_final().ok(),
            _ => self.file_part(bytes),
        }
    }

    fn note(&mut self, note: StreamNote) -> Option<()> {
        let is_end = matches!(note, StreamNote::End { .. });
        let event = self.standby.note(note.clone()).ok()?;
        self.model.note(&note);
        match event {
            Some(Event::Complete {
                directory, pages, ..
            }) => {
                assert!(!self.is_session, "a page session ends otherwise");
                assert!(is_end && self.model.is_final && self.complete.is_none());
                let StreamNote::End { root, .. } = note else {
                    unreachable!("only an end completes");
                };
                assert_eq!(root, self.model.root(), "the root of what arrived");
                self.complete = Some((directory, pages));
            }
            Some(Event::Stored { number, .. }) => {
                assert!(is_end && !self.model.is_final);
                assert_eq!(number, self.model.iteration);
            }
            Some(Event::Begun { .. }) | None => assert!(!is_end),
            Some(Event::Dumped(dumped)) => {
                assert!(is_end && self.is_session && self.complete.is_none());
                assert_eq!(
                    Some(dumped.root),
                    self.model.root(),
                    "the root of what arrived"
                );
                let fresh: usize = dumped.files.iter().map(|(_, pages)| pages.len()).sum();
                assert_eq!(fresh as u64, dumped.fresh_pages);
                let directory = self.directory.join("m").join(FINAL);
                if dumped.needs_held {
                    // As the store does.
                    let link = std::os::unix::fs::symlink("../1", directory.join("parent"));
                    link.expect("a link can be made");
                }
                self.complete = Some((directory, dumped.pages));
            }
        }
        Some(())
    }

    fn frame(
        &mut self,
        header: &FrameHeader,
        ops: &[Op],
        payload: &[u8],
        raw: &[u8],
    ) -> Option<()> {
        let payload = bytes::Bytes::copy_from_slice(payload);
        self.standby.frame(header, ops, payload).ok()?;
        assert_eq!(header.set, self.model.iteration);
        assert!(self.complete.is_none(), "nothing follows the end");
        self.model.frame(header, ops, raw);
        Some(())
    }

    fn made_frame(&mut self, bytes: &mut Bytes<'_>) -> Option<()> {
        let (object, segment, how) = (bytes.byte()?, bytes.byte()?, bytes.byte()?);
        let page_len = self.model.page.byte_len();
        let segment_pages = u32::try_from((1 << 20) / page_len).expect("at most 256");
        let (mut ops, mut raw, mut described) = (Vec::new(), Vec::new(), 0);
        for _ in 0..how & 7 {
            let (kind, count) = (bytes.byte()?, bytes.byte()?);
            let count = 1 + u32::from(count) % if count < 0xf0 { 8 } else { 256 };
            ops.push(match kind % 4 {
                0 => {
                    let value = bytes.byte()?;
                    for page in 0..count as usize {
                        let value = value.wrapping_add(u8::try_from(page % 256).expect("a byte"));
                        raw.resize(raw.len() + page_len, value);
                    }
                    Op::Literal(count)
                }
                1 => Op::Zero(count),
                2 => {
                    let (file, block) = (bytes.byte()?, bytes.byte()?);
                    let from = BlockRef {
                        file: file.into(),
                        block: block.into(),
                    };
                    Op::Same(count, from)
                }
                _ => Op::Held(count),
            });
            described += count;
        }
        if how & 0x80 == 0 && described < segment_pages {
            ops.push(Op::Held(segment_pages - described));
        }
        let segment = match segment {
            0xf0.. => u64::MAX >> (segment & 15),
            segment => u64::from(segment % 4),
        };
        let mut header = FrameHeader {
            set: self.model.iteration,
            file: object.into(),
            segment,
            codec: Codec::Raw,
            ops_len: 8,
            raw_len: u32::try_from(raw.len()).expect("a few MiB"),
            payload_len: u32::try_from(raw.len()).expect("a few MiB"),
        };
        if how & 0x40 != 0 && !raw.is_empty() {
            let packed = Compressor::new().and_then(|mut it| it.compress(Level::One, &raw));
            let packed = packed.expect("zstd has memory");
            header.codec = Codec::Zstd;
            header.payload_len = u32::try_from(packed.len()).expect("less than that");
            return self.frame(&header, &ops, &packed, &raw);
        }
        self.frame(&header, &ops, &raw, &raw)
    }

    fn raw_frame(&mut self, bytes: &mut Bytes<'_>) -> Option<()> {
        let head = bytes.take(HEADER_LEN)?.first_chunk()?;
        let Ok(header) = FrameHeader::decode(head) else {
            return Some(());
        };
        let ops = bytes.take(header.ops_len as usize)?;
        let payload = bytes.take(header.payload_len as usize)?;
        match decode_page_ops(ops) {
            // What it unpacks to is another target's matter.
            Ok(ops) if header.codec == Codec::Raw => self.frame(&header, &ops, payload, payload),
            _ => Some(()),
        }
    }

    fn runs(&mut self, bytes: &mut Bytes<'_>) -> Option<()> {
        let (object, how) = (u32::from(bytes.byte()?), u64::from(bytes.byte()?));
        let runs = match how {
            0 => self.model.runs_of(object, |_| false),
            0xff => vec![PageRun {
                vaddr: u64::from(bytes.byte()?) << 12,
                pages: bytes.byte()?.max(1).into(),
                flags: PageFlags::PRESENT,
            }],
            how => self.model.runs_of(object, |page| page % (how + 1) == 0),
        };
        self.note(StreamNote::Runs { object, runs })
    }

    fn end(&mut self, how: u8) -> Option<()> {
        let root = match (how, self.model.is_final) {
            (0, true) => self.model.root().or(Some(Digest([1; 32]))),
            (0, false) => None,
            (_, true) if how & 1 == 0 => None,
            _ => Some(Digest([how; 32])),
        };
        let number = self.model.iteration;
        self.note(StreamNote::End { number, root })
    }

    fn file_part(&mut self, bytes: &mut Bytes<'_>) -> Option<()> {
        let (object, value) = (bytes.byte()?, bytes.byte()?);
        let Some(Thing::File { meta, blocks }) = self.model.things.get(usize::from(object)) else {
            return Some(());
        };
        let segment = blocks.len() as u64 / meta.segment_blocks();
        if segment >= meta.segments() {
            return Some(());
        }
        let range = meta.segment_range(segment);
        let part = meta.bytes_of(&range);
        let length = u32::try_from(part.end - part.start).expect("a segment");
        let count = u32::try_from(range.end - range.start).expect("a segment");
        let header = FrameHeader {
            set: self.model.iteration,
            file: object.into(),
            segment,
            codec: Codec::Raw,
            ops_len: 8,
            raw_len: length,
            payload_len: length,
        };
        let raw = vec![value; length as usize];
        self.frame(&header, &[Op::Literal(count)], &raw, &raw)
    }

    fn check(&self) {
        let beside: BTreeSet<_> = names(&self.directory);
        assert_eq!(
            beside,
            BTreeSet::from(["m".to_owned()]),
            "only its own place"
        );
        let (root, iteration) = (self.directory.join("m"), self.model.iteration);
        for name in names(&root) {
            let number = name.parse::<u32>();
            assert!(
                name == FINAL || number.is_ok_and(|it| (1..=iteration + 1).contains(&it)),
                "{name}"
            );
            check_links(&root.join(name));
        }
        if let Some((directory, pages)) = &self.complete {
            self.check_dump(directory, *pages);
        }
    }

    // Page by page what the model has, and no image that the source did not send.
    fn check_dump(&self, directory: &Path, pages: u64) {
        let expected = self
            .model
            .dump()
            .expect("a dump that lacks pages is refused");
        let count: usize = expected.values().map(BTreeMap::len).sum();
        assert_eq!(count as u64, pages);
        let files = self.model.things.iter().filter_map(|thing| match thing {
            Thing::File { meta, .. } => Some(meta.name.to_string()),
            Thing::Memory { .. } => None,
        });
        // Images that the source made up may be nonsense: CRIU's checks come before its restore.
        if files.clone().any(|name| !name.starts_with("core-")) {
            return;
        }
        if expected.is_empty() {
            return;
        }
        let chain = Chain::open(directory, Some(self.model.page)).expect("a chain");
        let names: Vec<_> = chain.newest().pagemaps().keys().copied().collect();
        assert!(names.iter().eq(expected.keys()), "the dump's memories");
        let mut reader = PagesReader::new(&chain);
        for (name, pages) in expected {
            let mut found = BTreeMap::new();
            for run in chain.resolve(name).expect("every page is somewhere") {
                let mut page = run.vaddr / self.model.page.bytes();
                let read = reader.for_each_piece(name, &run, |_, bytes| {
                    for bytes in bytes.chunks(self.model.page.byte_len()) {
                        found.insert(page, Digest::of(bytes));
                        page += 1;
                    }
                    Ok::<_, ImageError>(())
                });
                read.expect("every page can be read");
            }
            assert_eq!(found, pages, "{name}");
        }
    }
}

fn names(directory: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).expect("it is there");
    let name = |entry: fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
    entries
        .map(|entry| name(entry.expect("it can be read")))
        .collect()
}

// Nothing leads elsewhere but the link to the iteration before.
fn check_links(directory: &Path) {
    for name in names(directory) {
        let about = fs::symlink_metadata(directory.join(&name)).expect("it is there");
        assert!(
            about.is_file() || (about.is_symlink() && name == "parent"),
            "{name}"
        );
        if about.is_symlink() {
            let target = fs::read_link(directory.join(&name)).expect("a link");
            let before = target.strip_prefix("..").expect("to a neighbour");
            assert!(before.to_string_lossy().parse::<u32>().is_ok());
        }
    }
}

/// Honest and half honest streams, by name: seeds of the corpus.
pub fn standby_seeds() -> Vec<(&'static str, Vec<u8>)> {
    const BEGIN: [u8; 2] = [0, 0];
    const FINAL: [u8; 2] = [0, 8];
    const END: [u8; 2] = [5, 0];
    // A task and shared memory; literal, zero, held and copied pages.
    let first: &[&[u8]] = &[
        &BEGIN,
        &[1, 14],
        &[3, 0, 0, 3, 0, 3, 9, 3, 2, 1, 1],
        &[1, 15],
        &[3, 1, 1, 0x42, 2, 1, 0, 0, 0, 2, 77],
        &END,
        &[8],
    ];
    let second: &[&[u8]] = &[&BEGIN, &[3, 0, 0, 2, 3, 1, 0, 1, 33], &END, &[8]];
    let last: &[&[u8]] = &[
        &[9],
        &FINAL,
        &[3, 0, 2, 1, 0, 0, 5],
        &[2, 7, 0x24, 3, 1],
        &[10, 2, 99],
        &[4, 0, 0],
        &[4, 1, 0],
        &END,
    ];
    let raw_note = StreamNote::Begin {
        number: 1,
        is_final: true,
    }
    .encode();
    let raw_note = [
        &[0, 6, u8::try_from(raw_note.len() - 5).unwrap_or(0)],
        &raw_note[5..],
    ]
    .concat();
    let join = |size: u8, parts: &[&[&[u8]]]| [&[size][..], &parts.concat().concat()].concat();
    vec![
        ("migration", join(0, &[first, second, last])),
        ("large-pages", join(1, &[first, second, last])),
        (
            "one-stop",
            join(
                0,
                &[&[&FINAL, &[1, 14], &[3, 0, 0, 1, 0, 3, 9], &[4, 0, 0], &END]],
            ),
        ),
        (
            "empty-memory",
            join(0, &[&[&FINAL, &[1, 14], &[4, 0, 0], &END]]),
        ),
        (
            "wrong-root",
            join(0, &[first, &[&FINAL, &[4, 0, 0], &[4, 1, 0], &[5, 3]]]),
        ),
        (
            "fewer-pages",
            join(0, &[first, &[&FINAL, &[4, 0, 1], &END]]),
        ),
        (
            "copies-of-copies",
            join(
                0,
                &[&[
                    &FINAL,
                    &[1, 0],
                    &[3, 0, 0, 2, 0, 0, 7, 2, 0xfe, 0, 0],
                    &[1, 2],
                    &[3, 1, 0, 1, 2, 0xff, 0, 0],
                    &[4, 0, 0],
                    &[4, 1, 0],
                    &END,
                ]],
            ),
        ),
        ("raw-note", raw_note),
        (
            "pages-left-and-changed",
            join(
                0x80,
                &[&[&FINAL, &[3, 0, 0, 2, 3, 0, 0, 0, 77], &[4, 0, 0], &END]],
            ),
        ),
        (
            "pages-copied-from-the-set",
            join(
                0x81,
                &[&[
                    &FINAL,
                    &[1, 14],
                    &[3, 1, 0, 1, 2, 1, 0, 2],
                    &[4, 0, 1],
                    &[4, 1, 0],
                    &END,
                ]],
            ),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn honest_streams_complete() {
        for (name, seed) in standby_seeds() {
            let honest = !["wrong-root", "raw-note"].contains(&name);
            assert_eq!(run(&seed), honest, "{name}");
        }
    }
}
