//! One pass after another over a running tree.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::blocks::{Block, Blocks, Outcome};
use super::error::{LiveError, unless_gone};
use super::maps::{self, Mapping};
use super::pace::Pace;
use super::proc::ProcDir;
use super::scan::{Method, Scanner};
use super::segments::{Segment, Segments};
use super::tree::{Task, tree};
use crate::image::PagemapName;
use crate::page::PageSize;
use crate::sys;

/// Pages of a block: no chunk crosses its boundary.
const BLOCK_PAGES: u64 = 256;

/// A mapping of this size is worth the cost of `smaps` where it may be empty: Go and Java reserve
/// address space by the terabyte, and without PAGEMAP_SCAN each of them takes 12 s to look through.
const VAST_BYTES: u64 = 4 << 30;

/// Reasons that a report keeps; the rest is counted.
const MAX_SKIPPED: usize = 100;

/// How to read.
#[derive(Clone, Debug)]
pub struct ReaderOptions {
    /// Most bytes read a second; `None`, the default, for as fast as they are taken.
    pub bytes_per_s: Option<u64>,
    /// How long one block (256 pages) may take before its mapping is left to the dump. Default 5 s.
    pub read_limit: Duration,
    /// How pages are found; `None`, the default, for the best that the kernel has.
    pub method: Option<Method>,
}

impl Default for ReaderOptions {
    fn default() -> Self {
        Self {
            bytes_per_s: None,
            read_limit: Duration::from_secs(5),
            method: None,
        }
    }
}

/// Pages that lie next to each other.
#[derive(Clone, Copy)]
pub struct Chunk<'a> {
    /// Whose they are.
    pub space: PagemapName,
    /// Address of the first page; for a segment its offset in bytes.
    pub address: u64,
    /// Their bytes: whole pages, at most 256, never across a multiple of 256 pages of `address`.
    pub bytes: &'a [u8],
}

impl fmt::Debug for Chunk<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            space,
            address,
            bytes,
        } = self;
        write!(f, "Chunk({space}, {address:#x}, {} bytes)", bytes.len())
    }
}

/// What a pass came to.
#[derive(Clone, Debug, Default)]
pub struct Pass {
    /// The tasks there were at its begin, zombies included.
    pub tasks: Vec<Task>,
    /// The spaces there were, those without any page included, in the order of their chunks.
    pub spaces: Vec<PagemapName>,
    /// Pages delivered.
    pub pages: u64,
    /// Bytes delivered.
    pub bytes: u64,
    /// Pages that were found and had gone when they were to be read.
    pub vanished: u64,
    /// What was left to the dump: the first 100.
    pub skipped: Vec<Skipped>,
    /// How many more were left.
    pub more_skipped: u64,
    /// How long it took.
    pub took: Duration,
    /// How much of that was waited for the sake of [`ReaderOptions::bytes_per_s`].
    pub waited: Duration,
    /// The sink ended it early.
    pub stopped: bool,
}

/// Memory that was left to the dump.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// Whose.
    pub space: PagemapName,
    /// Its addresses; `None` for the whole space.
    pub range: Option<Range<u64>>,
    /// Why, in a few words.
    pub why: String,
}

/// Reads a running tree.
#[derive(Debug)]
pub struct LiveReader {
    root: u32,
    root_started: u64,
    page: PageSize,
    scanner: Scanner,
    blocks: Blocks,
    pace: Pace,
    /// Mappings in which a read did not return.
    avoided: Vec<(PagemapName, Range<u64>)>,
    only_shared: bool,
}

impl LiveReader {
    /// A reader of the tree below `root`, a pid as seen here. `page` must be this host's page size.
    ///
    /// Probes what the kernel has. Fails where `root` has ended.
    pub fn new(root: u32, page: PageSize, options: ReaderOptions) -> Result<Self, LiveError> {
        let probing = |error| LiveError::of("probe for the page map", std::process::id(), error);
        let root_started = tree(root)?[0].start_time;
        Ok(Self {
            root,
            root_started,
            page,
            scanner: Scanner::new(page, options.method).map_err(probing)?,
            blocks: Blocks::new(page, options.read_limit),
            pace: Pace::new(options.bytes_per_s),
            avoided: Vec::new(),
            only_shared: false,
        })
    }

    /// Whether only shared segments and memfds are read, where something else takes care of the
    /// tasks' own memory. Not so at first.
    pub fn set_only_shared(&mut self, only_shared: bool) {
        self.only_shared = only_shared;
    }

    /// How pages are found.
    pub fn method(&self) -> Method {
        self.scanner.method()
    }

    /// Changes the most bytes read a second.
    pub fn set_rate(&mut self, bytes_per_s: Option<u64>) {
        self.pace = Pace::new(bytes_per_s);
    }

    /// Reads everything once. `sink` gets the chunks of one space after another, in ascending
    /// order; it ends the pass by [`ControlFlow::Break`].
    ///
    /// A page that was never written, or that an ordinary file still holds, is not delivered; one
    /// that is swapped out is, and is in memory afterwards. Fails where the root has ended, at the
    /// latest at the end of the pass, or where the kernel forbids to look.
    pub fn pass(
        &mut self,
        sink: &mut dyn FnMut(Chunk<'_>) -> ControlFlow<()>,
    ) -> Result<Pass, LiveError> {
        let begin = now();
        let tasks = self.living_tree()?;
        let mut run = Running {
            page: self.page,
            blocks: &mut self.blocks,
            pace: &mut self.pace,
            avoided: &mut self.avoided,
            only_shared: self.only_shared,
            sink,
            pass: Pass::default(),
        };
        let result = run.tree(&mut self.scanner, &tasks);
        let mut pass = run.pass;
        self.blocks.discard();
        // Of two reasons, that the root has ended is the one to tell.
        self.living_tree()?;
        result?;
        pass.tasks = tasks;
        pass.took = now() - begin;
        Ok(pass)
    }

    fn living_tree(&self) -> Result<Vec<Task>, LiveError> {
        let tasks = tree(self.root)?;
        if tasks[0].start_time == self.root_started {
            Ok(tasks)
        } else {
            Err(LiveError::RootGone { pid: self.root })
        }
    }
}

/// A pass under way.
struct Running<'a> {
    page: PageSize,
    blocks: &'a mut Blocks,
    pace: &'a mut Pace,
    avoided: &'a mut Vec<(PagemapName, Range<u64>)>,
    only_shared: bool,
    sink: &'a mut dyn FnMut(Chunk<'_>) -> ControlFlow<()>,
    pass: Pass,
}

/// Memory that can be read from, and whose it is.
struct Space {
    name: PagemapName,
    pid: u32,
    file: Arc<File>,
    is_segment: bool,
    /// For telling which mapping did not answer.
    mappings: Vec<Range<u64>>,
}

impl Running<'_> {
    fn tree(&mut self, scanner: &mut Scanner, tasks: &[Task]) -> Result<(), LiveError> {
        let mut segments = Segments::default();
        let mut read: Vec<(u32, String)> = Vec::new();
        for task in tasks.iter().filter(|task| !task.zombie) {
            let failed = |error| LiveError::of("read the mappings", task.pid, error);
            let Some((dir, text)) = unless_gone(mappings_of(task)).map_err(failed)? else {
                continue;
            };
            let mappings = maps::parse(&text);
            // Only tasks of equal mappings can share them; asking for each pair costs too much.
            let shares = |(other, theirs): &(u32, String)| {
                *theirs == text && sys::same_memory(*other, task.pid) == Some(true)
            };
            if !self.only_shared && !read.iter().any(shares) {
                read.push((task.pid, text));
                self.task(scanner, task, &dir, &mappings)?;
            }
            self.segments(&dir, &mappings, &mut segments)?;
            if self.pass.stopped {
                break;
            }
        }
        Ok(())
    }

    fn task(
        &mut self,
        scanner: &mut Scanner,
        task: &Task,
        dir: &ProcDir,
        maps: &[Mapping],
    ) -> Result<(), LiveError> {
        let failed = |error| LiveError::of("read the memory", task.pid, error);
        let opened = dir
            .file("mem")
            .and_then(|mem| Ok((mem, dir.file("pagemap")?)));
        let Some((mem, pagemap)) = unless_gone(opened).map_err(failed)? else {
            return Ok(());
        };
        let mut private: Vec<_> = maps
            .iter()
            .filter(|mapping| mapping.holds_private_pages())
            .map(Mapping::range)
            .collect();
        let is_vast = |range: &Range<u64>| range.end - range.start >= VAST_BYTES;
        if scanner.method() == Method::Pagemap && private.iter().any(is_vast) {
            let smaps = unless_gone(dir.text("smaps")).map_err(failed)?;
            let empty = maps::empty_ones(&smaps.unwrap_or_default());
            private.retain(|range| !(is_vast(range) && empty.contains(&range.start)));
        }
        let space = Space {
            name: PagemapName::Task(task.vpid.into()),
            pid: task.pid,
            file: Arc::new(mem),
            is_segment: false,
            mappings: private,
        };
        self.pass.spaces.push(space.name);
        let mut gatherer = Gatherer::new(self.page);
        for range in joined(&space.mappings) {
            if self.pass.stopped {
                break;
            }
            let mut reading = Ok(());
            let scanned = scanner.scan(&pagemap, range, &mut |found| {
                reading = self.gather(&space, &mut gatherer, found);
                reading.is_ok() && !self.pass.stopped
            });
            reading?;
            unless_gone(scanned).map_err(failed)?;
        }
        self.finish(&space, gatherer)
    }

    /// Reads the segments that a task maps or has open, and that no task before it had.
    fn segments(
        &mut self,
        dir: &ProcDir,
        maps: &[Mapping],
        segments: &mut Segments,
    ) -> Result<(), LiveError> {
        let failed = |error| LiveError::of("open a shared segment", dir.pid, error);
        for mapping in maps {
            if let Some(segment) = segments.of_mapping(dir, mapping).map_err(failed)? {
                self.segment(segment, dir.pid)?;
            }
        }
        let descriptors = unless_gone(dir.numbers("fd")).map_err(failed)?;
        for number in descriptors.unwrap_or_default() {
            if let Some(segment) = segments.of_descriptor(dir, number).map_err(failed)? {
                self.segment(segment, dir.pid)?;
            }
        }
        Ok(())
    }

    fn segment(&mut self, segment: Segment, pid: u32) -> Result<(), LiveError> {
        if self.pass.stopped {
            return Ok(());
        }
        let failed = |error| LiveError::of("find the data of a shared segment", pid, error);
        let page = self.page.bytes();
        let space = Space {
            name: PagemapName::Shmem(segment.id),
            pid,
            file: Arc::clone(&segment.file),
            is_segment: true,
            mappings: std::iter::once(0..segment.size.next_multiple_of(page)).collect(),
        };
        self.pass.spaces.push(space.name);
        let mut gatherer = Gatherer::new(self.page);
        let mut at = 0;
        while !self.pass.stopped {
            let Some(data) = segment.next_data(at).map_err(failed)? else {
                break;
            };
            at = data.end;
            let pages = data.start / page * page..data.end.next_multiple_of(page);
            self.gather(&space, &mut gatherer, pages)?;
        }
        self.finish(&space, gatherer)
    }

    /// Cuts `found` into blocks and reads those that are complete.
    fn gather(
        &mut self,
        space: &Space,
        gatherer: &mut Gatherer,
        found: Range<u64>,
    ) -> Result<(), LiveError> {
        let mut result = Ok(());
        gatherer.add(found, &mut |pieces| {
            result = self.read(space, pieces);
            result.is_ok() && !self.pass.stopped
        });
        result
    }

    fn finish(&mut self, space: &Space, gatherer: Gatherer) -> Result<(), LiveError> {
        if !self.pass.stopped && !gatherer.pieces.is_empty() {
            self.read(space, gatherer.pieces)?;
        }
        while !self.pass.stopped && self.take(space)? {}
        Ok(())
    }

    fn read(&mut self, space: &Space, mut pieces: Vec<Range<u64>>) -> Result<(), LiveError> {
        let avoided = &*self.avoided;
        if !avoided.is_empty() {
            pieces.retain(|piece| {
                !avoided.iter().any(|(name, range)| {
                    *name == space.name && piece.start < range.end && range.start < piece.end
                })
            });
        }
        if pieces.is_empty() {
            return Ok(());
        }
        let block = Block {
            space: space.name,
            file: Arc::clone(&space.file),
            pieces,
            is_segment: space.is_segment,
        };
        if self.blocks.is_full() {
            self.take(space)?;
            if self.pass.stopped {
                return Ok(());
            }
        }
        let wait = self.pace.wait(now(), block.bytes());
        if !wait.is_zero() {
            thread::sleep(wait);
            self.pass.waited += wait;
        }
        let submitted = self.blocks.submit(block);
        submitted.map_err(|error| LiveError::of("read the memory", space.pid, error))
    }

    /// Hands the oldest block to the sink. False when there is none.
    fn take(&mut self, space: &Space) -> Result<bool, LiveError> {
        let failed = |error| LiveError::of("read the memory", space.pid, error);
        match self.blocks.next().map_err(failed)? {
            None => return Ok(false),
            Some(Outcome::Blocked(block)) => self.avoid(space, &block),
            Some(Outcome::Read {
                space: name,
                pieces,
                buffer,
                vanished,
            }) => {
                self.pass.vanished += vanished;
                self.deliver(name, &pieces, &buffer);
                self.blocks.recycle(buffer);
            }
        }
        Ok(true)
    }

    fn deliver(&mut self, space: PagemapName, pieces: &[Range<u64>], mut bytes: &[u8]) {
        for piece in pieces {
            let length = usize::try_from(piece.end - piece.start).expect("a block is small");
            let (chunk, rest) = bytes.split_at(length);
            bytes = rest;
            self.pass.bytes += length as u64;
            self.pass.pages += length as u64 / self.page.bytes();
            let chunk = Chunk {
                space,
                address: piece.start,
                bytes: chunk,
            };
            if (self.sink)(chunk).is_break() {
                self.pass.stopped = true;
                return;
            }
        }
    }

    /// Leaves the mappings of `block` alone from now on.
    fn avoid(&mut self, space: &Space, block: &Block) {
        let (Some(first), Some(last)) = (block.pieces.first(), block.pieces.last()) else {
            return;
        };
        let touched = space
            .mappings
            .iter()
            .filter(|mapping| mapping.start < last.end && first.start < mapping.end);
        for mapping in touched {
            self.avoided.push((space.name, mapping.clone()));
            if self.pass.skipped.len() >= MAX_SKIPPED {
                self.pass.more_skipped += 1;
                continue;
            }
            self.pass.skipped.push(Skipped {
                space: space.name,
                range: Some(mapping.clone()),
                why: "a read of it did not return; left to the dump".to_owned(),
            });
        }
    }
}

/// The directory and mappings of `task`, if its pid is still its own.
fn mappings_of(task: &Task) -> io::Result<(ProcDir, String)> {
    let dir = ProcDir::open(task.pid)?;
    if dir.start_time()? != task.start_time {
        return Err(io::ErrorKind::NotFound.into());
    }
    let text = dir.text("maps")?;
    Ok((dir, text))
}

/// Collects ranges until a block is complete.
struct Gatherer {
    block_bytes: u64,
    pieces: Vec<Range<u64>>,
}

impl Gatherer {
    fn new(page: PageSize) -> Self {
        Self {
            block_bytes: BLOCK_PAGES * page.bytes(),
            pieces: Vec::new(),
        }
    }

    /// Adds `range`, which lies behind all earlier ones. `complete` gets the pieces of each block
    /// that it leaves behind, and may say false to end.
    fn add(&mut self, range: Range<u64>, complete: &mut dyn FnMut(Vec<Range<u64>>) -> bool) {
        let mut at = range.start;
        while at < range.end {
            let block = at / self.block_bytes;
            let end = range.end.min((block + 1).saturating_mul(self.block_bytes));
            let begun = self
                .pieces
                .last()
                .map(|piece| piece.start / self.block_bytes);
            if begun.is_some_and(|begun| begun != block)
                && !complete(std::mem::take(&mut self.pieces))
            {
                return;
            }
            match self.pieces.last_mut() {
                Some(last) if last.end == at => last.end = end,
                _ => self.pieces.push(at..end),
            }
            at = end;
        }
    }
}

/// Ranges that touch each other as one: fewer calls of the kernel. Where two mappings became one
/// while `maps` was read, the second is listed with the first inside it.
fn joined(ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range.clone()),
        }
    }
    joined
}

#[expect(
    clippy::disallowed_methods,
    reason = "this is a driver: it paces its reads and reports how long they took"
)]
fn now() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    #![expect(
        clippy::single_range_in_vec_init,
        reason = "one piece is what is meant"
    )]

    use super::*;

    /// The kernel lists what there is when each piece of `maps` is read.
    #[test]
    fn mappings_that_were_listed_twice_are_read_once() {
        let listed = [1..3, 3..5, 2..8, 9..10, 4..6, 12..13];
        assert_eq!(joined(&listed), [1..8, 9..10, 12..13]);
        assert_eq!(joined(&[1..9, 2..4, 9..10]), [1..10]);
    }

    #[test]
    fn pieces_are_gathered_by_block() {
        let page = PageSize::new(4096).unwrap();
        let mut gatherer = Gatherer::new(page);
        let mut blocks = Vec::new();
        let at = |number: u64| number * page.bytes();
        for (start, end) in [(1, 3), (3, 4), (10, 300), (700, 701)] {
            gatherer.add(at(start)..at(end), &mut |pieces| {
                blocks.push(pieces);
                true
            });
        }
        blocks.push(gatherer.pieces);
        let expected = [
            vec![at(1)..at(4), at(10)..at(256)],
            vec![at(256)..at(300)],
            vec![at(700)..at(701)],
        ];
        assert_eq!(blocks, expected);
    }
}
