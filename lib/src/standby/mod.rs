//! The destination's copy of a running tree's memory, in the making: what arrives of each iteration
//! becomes an image directory that builds on the one before, until the final one can be restored.
//!
//! ```text
//! MIGRATION/1/      pagemap-7.img pages-1.img …          all pages of the first iteration
//!           2/      the same files, parent ─▶ ../1       pages that changed; all others are the parent's
//!           final/  and all other images of the dump, parent ─▶ ../2
//! ```
//! A page that a later iteration replaced is punched out of its file when that iteration is
//! complete: however many iterations there are, the directories hold each page about once.
//!
//! A page session has one iteration, the final one, and no files. What it builds on is a stored set
//! ([`HeldPages`]), and its directory is the one that will be published.

mod arriving;
mod held;
mod memory;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use self::arriving::ArrivingFile;
pub use self::held::{DumpedPages, HeldMemory, HeldPages, HeldPlaces};
use self::memory::Memory;
use crate::delta::codec::{DecompressError, Decompressor};
use crate::delta::{BlockRef, dump_root};
use crate::digest::{Digest, VerifiedRun};
use crate::image::{ImageError, PagemapName};
use crate::page::PageSize;
use crate::store::{StoreError, Tried as _};
use crate::wire::{Codec, FrameHeader, Object, Op, StreamNote, limits};

/// Name of the directory that is restored.
pub const FINAL: &str = "final";

/// Why an iteration cannot be stored.
#[derive(Debug, thiserror::Error)]
pub enum StandbyError {
    /// The source sent what does not belong there.
    #[error("the other side broke the protocol: {0}")]
    Protocol(&'static str),
    /// The dump that arrived is not the one that the source made.
    #[error(
        "the dump that arrived does not have the root digest that the source stated; nothing of it is used"
    )]
    Root,
    /// More bytes of pages than are taken.
    #[error("the dump has {size} bytes or more, and {limit} are taken here")]
    TooLarge {
        /// So far.
        size: u64,
        /// What is taken.
        limit: u64,
    },
    /// A frame cannot be unpacked.
    #[error("a frame cannot be unpacked: {0}")]
    Unpack(#[from] DecompressError),
    /// The pages form no pagemap.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The directory failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What a note ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// An iteration begins.
    Begun {
        /// Its number.
        number: u32,
        /// The last one.
        is_final: bool,
    },
    /// An iteration is stored, synced where the place lasts.
    Stored {
        /// Its number.
        number: u32,
        /// Bytes written for it.
        bytes: u64,
    },
    /// The dump is complete and checked, but not synced: see [`sync_directory`].
    Complete {
        /// The directory to restore from.
        directory: PathBuf,
        /// Pages of the dump.
        pages: u64,
        /// Of these, pages that came with the final iteration.
        fresh_pages: u64,
    },
    /// The same of a page session.
    Dumped(DumpedPages),
}

#[derive(Debug)]
enum Thing {
    Memory(Memory),
    File(ArrivingFile),
}

/// Where pages were written: an iteration, and the page's index in its pages file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
struct PlaceOf {
    iteration: u32,
    index: u32,
}

/// The copy in the making. Everything must be given to it in the order of the stream.
#[derive(Debug)]
pub struct Standby {
    root: PathBuf,
    page: PageSize,
    durable: bool,
    // Of a page session: the chain that it builds on, the newest first.
    held: Option<Arc<[PathBuf]>>,
    most_bytes: Option<u64>,
    things: Vec<Thing>,
    by_name: BTreeMap<PagemapName, u32>,
    iteration: u32,
    is_open: bool,
    is_final: bool,
    stored_bytes: u64,
    decompressor: Decompressor,
    // The file that was written last, by its object: others are opened again.
    open: Option<(u32, File)>,
}

impl Standby {
    /// Makes the directory at `root`, which must not exist, with mode 0700.
    pub fn create(root: &Path, page: PageSize, durable: bool) -> Result<Self, StandbyError> {
        make_private(root)?;
        Self::at(root, page, durable)
    }

    /// A page session: one dump without files comes to the empty directory `directory`, and leaves
    /// to `held` what that has. At most `most_bytes` of pages are taken.
    pub fn building_on(
        directory: &Path,
        page: PageSize,
        held: HeldPages,
        most_bytes: Option<u64>,
    ) -> Result<Self, StandbyError> {
        let mut standby = Self::at(directory, page, false)?;
        standby.iteration = u32::try_from(held.directories.len()).unwrap_or(u32::MAX);
        standby.held = Some(held.directories.into());
        standby.most_bytes = most_bytes;
        for memory in held.memories {
            let index = u32::try_from(standby.things.len()).unwrap_or(u32::MAX);
            standby.by_name.insert(memory.name, index);
            let memory = Memory::held(index.saturating_add(1), page, memory);
            standby.things.push(Thing::Memory(memory));
        }
        Ok(standby)
    }

    fn at(root: &Path, page: PageSize, durable: bool) -> Result<Self, StandbyError> {
        Ok(Self {
            root: root.to_owned(),
            page,
            durable,
            held: None,
            most_bytes: None,
            things: Vec::new(),
            by_name: BTreeMap::new(),
            iteration: 0,
            is_open: false,
            is_final: false,
            stored_bytes: 0,
            decompressor: Decompressor::new()?,
            open: None,
        })
    }

    /// Where everything is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// As [`prepare_final`].
    pub fn prepare_final(&mut self) -> Result<(), StandbyError> {
        prepare_final(&self.root)
    }

    /// A note of the stream.
    pub fn note(&mut self, note: StreamNote) -> Result<Option<Event>, StandbyError> {
        match note {
            StreamNote::Begin { number, is_final } => self.begin(number, is_final).map(Some),
            StreamNote::Objects(objects) => {
                objects.into_iter().try_for_each(|it| self.add_object(it))?;
                Ok(None)
            }
            StreamNote::Runs { object, runs } if self.is_final && self.is_open => {
                let page = self.page;
                self.memory(object)?.add_runs(&runs, page)?;
                Ok(None)
            }
            StreamNote::End { number, root } if self.is_open && number == self.number() => {
                (self.is_open, self.open) = (false, None);
                match (self.is_final, root) {
                    (true, Some(root)) if self.held.is_some() => self.end_pages(root).map(Some),
                    (true, Some(root)) => self.end_final(root).map(Some),
                    (false, None) => self.end_iteration().map(Some),
                    _ => Err(StandbyError::Protocol("an end of the wrong kind")),
                }
            }
            _ => Err(StandbyError::Protocol("a note out of order")),
        }
    }

    fn begin(&mut self, number: u32, is_final: bool) -> Result<Event, StandbyError> {
        let only_final = self.held.is_some();
        if self.is_open || self.is_final || number != self.number() + 1 || only_final && !is_final {
            return Err(StandbyError::Protocol("an iteration out of order"));
        }
        self.iteration += 1;
        (self.is_final, self.is_open) = (is_final, true);
        self.stored_bytes = 0;
        let directory = self.directory();
        if !(is_final && directory.is_dir()) {
            make_private(&directory)?;
        }
        Ok(Event::Begun { number, is_final })
    }

    // The number of the iteration on the stream: sets that were here before come first in ours.
    fn number(&self) -> u32 {
        let before = self.held.as_ref().map_or(0, |held| held.len());
        self.iteration
            - u32::try_from(before)
                .unwrap_or(u32::MAX)
                .min(self.iteration)
    }

    fn add_object(&mut self, object: Object) -> Result<(), StandbyError> {
        let index = u32::try_from(self.things.len()).unwrap_or(u32::MAX);
        if !self.is_open || index >= limits::OBJECTS {
            return Err(StandbyError::Protocol("an object out of order"));
        }
        let thing = match object {
            Object::Memory(name) => {
                if self.by_name.insert(name, index).is_some() {
                    return Err(StandbyError::Protocol("a memory that was named before"));
                }
                Thing::Memory(match self.held {
                    Some(_) => Memory::held(index + 1, self.page, HeldMemory::none(name)),
                    None => Memory::new(index + 1, self.page),
                })
            }
            Object::File { .. } if self.held.is_some() => {
                return Err(StandbyError::Protocol("a file among pages"));
            }
            Object::File { name, mode, size } if self.is_final => {
                let path = self.directory().join(name.as_str());
                let (arriving, file) = ArrivingFile::create(&path, name, mode, size, self.page)?;
                self.open = Some((index, file));
                Thing::File(arriving)
            }
            Object::File { .. } => {
                return Err(StandbyError::Protocol("a file before the final iteration"));
            }
        };
        self.things.push(thing);
        Ok(())
    }

    /// A frame of the stream: unpacked, hashed and written.
    pub fn frame(
        &mut self,
        header: &FrameHeader,
        ops: &[Op],
        payload: bytes::Bytes,
    ) -> Result<(), StandbyError> {
        if !self.is_open || header.set != self.number() {
            return Err(StandbyError::Protocol("a frame out of order"));
        }
        let size = self.stored_bytes;
        if let Some(limit) = self.most_bytes.filter(|&limit| size > limit) {
            return Err(StandbyError::TooLarge { size, limit });
        }
        let raw = match header.codec {
            Codec::Raw => payload,
            Codec::Zstd => {
                let raw = self
                    .decompressor
                    .decompress(&payload, header.raw_len as usize)?;
                raw.into()
            }
        };
        let (block_len, copies) = match self.things.get(header.file as usize) {
            Some(Thing::Memory(memory)) => {
                // First, so that at most a segment is copied.
                memory.check(header.segment, ops, raw.len())?;
                (self.page.byte_len(), self.find_copies(header.file, ops)?)
            }
            Some(Thing::File(file)) => (file.block_len(), Vec::new()),
            None => return Err(StandbyError::Protocol("a frame of nothing that was named")),
        };
        let run = VerifiedRun::hash(raw, block_len);
        let places = self.places();
        let file = self.open_file(header.file)?;
        self.stored_bytes += match &mut self.things[header.file as usize] {
            Thing::Memory(memory) => memory.write(&file, &places, header, ops, &run, &copies)?,
            Thing::File(arriving) => arriving.write(&file, header.segment, ops, &run)?,
        };
        self.open = Some((header.file, file));
        Ok(())
    }

    // Where this object is written.
    fn open_file(&mut self, object: u32) -> Result<File, StandbyError> {
        let directory = self.directory();
        match self.open.take() {
            Some((open, file)) if open == object => Ok(file),
            _ => match &mut self.things[object as usize] {
                Thing::Memory(memory) => memory.open(&directory),
                Thing::File(file) => file.open(),
            },
        }
    }

    // The pages of other memories that the frame's *same* ops refer to, in order.
    fn find_copies(&mut self, own: u32, ops: &[Op]) -> Result<Vec<VerifiedRun>, StandbyError> {
        let mut copies = Vec::new();
        let places = self.places();
        for op in ops {
            match *op {
                Op::Same(count, BlockRef { file, block }) if file != own => {
                    let memory = self.memory(file)?;
                    for page in block..block.saturating_add(count.into()) {
                        copies.push(memory.read(page, &places)?);
                    }
                }
                _ => {}
            }
        }
        Ok(copies)
    }

    fn places(&self) -> Places {
        Places {
            root: self.root.clone(),
            held: self.held.clone(),
            iteration: self.iteration,
            is_final: self.is_final,
        }
    }

    // Every directory of a chain needs a pagemap of every memory: CRIU's restore hangs where one
    // leads into a parent without it.
    fn end_iteration(&mut self) -> Result<Event, StandbyError> {
        let directory = self.directory();
        let iteration = self.iteration;
        for (&name, &index) in &self.by_name {
            if let Thing::Memory(memory) = &mut self.things[index as usize] {
                memory.finish(&directory, name, iteration)?;
            }
        }
        if iteration > 1 {
            link_parent(&directory, iteration - 1)?;
        }
        if self.durable {
            sync_directory(&directory)?;
        }
        Ok(Event::Stored {
            number: iteration,
            bytes: self.stored_bytes,
        })
    }

    fn end_final(&mut self, stated: Digest) -> Result<Event, StandbyError> {
        let directory = self.directory();
        let (mut memories, mut files) = (BTreeMap::new(), BTreeMap::new());
        let (mut pages, mut fresh_pages, mut needs_parent) = (0, 0, false);
        for (&name, &index) in &self.by_name {
            let Thing::Memory(memory) = &mut self.things[index as usize] else {
                continue;
            };
            if let Some(built) = memory.finish_final(&directory, name, self.iteration)? {
                pages += built.pages;
                fresh_pages += built.fresh_pages;
                needs_parent |= built.fresh_pages < built.pages;
                memories.insert(name, built.dumped);
            }
        }
        for thing in &mut self.things {
            if let Thing::File(file) = thing {
                let (name, mode, digest) = file.finish()?;
                if files.insert(name, (mode, digest)).is_some() {
                    return Err(StandbyError::Protocol("a file that was named before"));
                }
            }
        }
        if dump_root(self.page, &memories, &files) != stated {
            return Err(StandbyError::Root);
        }
        if needs_parent {
            link_parent(&directory, self.iteration - 1)?;
        }
        Ok(Event::Complete {
            directory,
            pages,
            fresh_pages,
        })
    }

    fn end_pages(&mut self, stated: Digest) -> Result<Event, StandbyError> {
        let directory = self.directory();
        let mut memories = BTreeMap::new();
        let mut dumped = DumpedPages {
            root: stated,
            pages: 0,
            fresh_pages: 0,
            needs_held: false,
            files: Vec::new(),
        };
        for (&name, &index) in &self.by_name {
            let Thing::Memory(memory) = &mut self.things[index as usize] else {
                continue;
            };
            if let Some(built) = memory.finish_final(&directory, name, self.iteration)? {
                dumped.pages += built.pages;
                dumped.fresh_pages += built.fresh_pages;
                dumped.needs_held |= built.fresh_pages < built.pages;
                dumped.files.push((memory.pages_name(), built.fresh));
                memories.insert(name, built.dumped);
            }
        }
        if dump_root(self.page, &memories, &BTreeMap::new()) != stated {
            return Err(StandbyError::Root);
        }
        Ok(Event::Dumped(dumped))
    }

    /// Gives back the room of pages that later iterations replaced. To be called between
    /// iterations, never while the tree is frozen.
    pub fn drop_replaced(&mut self) {
        for thing in &mut self.things {
            if let Thing::Memory(memory) = thing {
                memory.drop_replaced(&self.root);
            }
        }
    }

    fn memory(&mut self, object: u32) -> Result<&mut Memory, StandbyError> {
        match self.things.get_mut(object as usize) {
            Some(Thing::Memory(memory)) => Ok(memory),
            _ => Err(StandbyError::Protocol("pages of nothing that was named")),
        }
    }

    fn directory(&self) -> PathBuf {
        self.places().directory(self.iteration)
    }
}

/// Where the iterations are, and which one arrives.
#[derive(Debug)]
struct Places {
    root: PathBuf,
    held: Option<Arc<[PathBuf]>>,
    iteration: u32,
    is_final: bool,
}

impl Places {
    fn directory(&self, iteration: u32) -> PathBuf {
        if let Some(held) = &self.held {
            // Of the chain the newest comes first, and of iterations the oldest: one behind them all
            // is the one that arrives.
            let level = usize::try_from(iteration)
                .unwrap_or(usize::MAX)
                .wrapping_sub(1);
            return held.get(level).unwrap_or(&self.root).clone();
        }
        if self.is_final && iteration == self.iteration {
            self.root.join(FINAL)
        } else {
            self.root.join(iteration.to_string())
        }
    }
}

/// Brings the final directory to disk, for places that last. May run while CRIU reads it.
pub fn sync_directory(directory: &Path) -> Result<(), StandbyError> {
    for entry in fs::read_dir(directory).tried("list", directory)? {
        let path = entry.tried("list", directory)?.path();
        if !path.is_symlink() {
            let file = File::open(&path).tried("open", &path)?;
            file.sync_all().tried("sync", &path)?;
        }
    }
    let opened = File::open(directory).tried("open", directory)?;
    opened.sync_all().tried("sync", directory)?;
    Ok(())
}

/// Makes the directory of the final iteration beneath `root` before it is needed.
pub fn prepare_final(root: &Path) -> Result<(), StandbyError> {
    make_private(&root.join(FINAL))
}

fn make_private(path: &Path) -> Result<(), StandbyError> {
    let made = fs::DirBuilder::new().mode(0o700).create(path);
    Ok(made.tried("create", path)?)
}

fn link_parent(directory: &Path, iteration: u32) -> Result<(), StandbyError> {
    let link = directory.join("parent");
    let target = format!("../{iteration}");
    Ok(std::os::unix::fs::symlink(target, &link).tried("create", &link)?)
}
