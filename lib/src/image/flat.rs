//! A chain as the one directory that [`flatten`](super::flatten()) would write, without writing it.
//!
//! For whom files are only read from their begin to their end: CRIU's restore by an image streamer.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::vec;

use super::chain::Chain;
use super::dir::FileStat;
use super::error::ImageError;
use super::flatten::present_runs;
use super::name::{FileKind, PagemapName};
use super::pagemap::Pagemap;
use super::resolve::{ResolvedRun, Source};

/// Most pages files that one reader keeps open. A chain may have more levels than a process may have
/// descriptors.
const MAX_OPEN: usize = 16;

/// A directory without a parent, with the content of a chain: every page is present.
#[derive(Debug)]
pub struct FlatView {
    chain: Chain,
    /// Whose pages are in the pages file of that number, if any of them is elsewhere. What is all in
    /// its own directory is left as it is, to the byte.
    spaces: BTreeMap<u32, PagemapName>,
}

impl FlatView {
    /// A view of `chain`. Fails where its memory is not understood, or two memories share a file.
    pub fn new(chain: Chain) -> Result<Self, ImageError> {
        chain.require_understood()?;
        let (mut spaces, mut own) = (BTreeMap::new(), BTreeSet::new());
        for (&name, pagemap) in chain.newest().pagemaps() {
            let is_shared = !own.insert(pagemap.pages_id());
            if !pagemap.runs().iter().all(|run| run.flags.is_present()) {
                spaces.insert(pagemap.pages_id(), name);
            }
            if is_shared {
                return Err(ImageError::BadCount {
                    file: name.to_string(),
                    what: "it names the pages file of another pagemap",
                });
            }
        }
        Ok(Self { chain, spaces })
    }

    /// What it is a view of.
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// The file `name` of the flat directory; `None` if it has none.
    pub fn open(&self, name: &str) -> Result<Option<FlatFile<'_>>, ImageError> {
        let parts = match FileKind::of(name) {
            FileKind::Pagemap(space) if self.spaces.values().any(|other| *other == space) => {
                vec![Part::Bytes(self.pagemap(space)?)]
            }
            FileKind::Pages(id) if self.spaces.contains_key(&id) => {
                let space = self.spaces[&id];
                return Ok(Some(self.pages(space)?));
            }
            _ => match self.plain(name)? {
                Some(part) => vec![part],
                None => return Ok(None),
            },
        };
        Ok(Some(FlatFile {
            chain: &self.chain,
            space: None,
            parts: parts.into_iter(),
            open: BTreeMap::new(),
        }))
    }

    fn pagemap(&self, space: PagemapName) -> Result<Vec<u8>, ImageError> {
        let old = &self.chain.newest().pagemaps()[&space];
        let runs = present_runs(space, &self.chain.resolve(space)?)?;
        let new = Pagemap::new(&space.to_string(), old.pages_id(), old.page_size(), runs)?;
        Ok(new.encode())
    }

    fn pages(&self, space: PagemapName) -> Result<FlatFile<'_>, ImageError> {
        let runs = self.chain.resolve(space)?;
        // Fails where pages are nowhere.
        present_runs(space, &runs)?;
        Ok(FlatFile {
            chain: &self.chain,
            space: Some(space),
            parts: parts(&runs, self.chain.page_size().bytes()).into_iter(),
            open: BTreeMap::new(),
        })
    }

    fn plain(&self, name: &str) -> Result<Option<Part>, ImageError> {
        let Some(info) = self.chain.newest().listing().file(name) else {
            return Ok(None);
        };
        let path = self.chain.newest().path().join(name);
        let file = self.chain.open_dir(0)?.open_file(name)?;
        match FileStat::of(&file) {
            Ok(stat) if stat == info.stat => Ok(Some(Part::Whole {
                file: Arc::new(file),
                path,
                length: stat.size,
            })),
            Ok(_) => Err(ImageError::Changed(path)),
            Err(error) => Err(ImageError::io(&path, "read the status")(error)),
        }
    }
}

/// What comes next, with nothing opened yet.
#[derive(Debug)]
enum Part {
    Bytes(Vec<u8>),
    Whole {
        file: Arc<File>,
        path: PathBuf,
        length: u64,
    },
    Pages {
        level: usize,
        offset: u64,
        length: u64,
    },
    Zeros(u64),
}

/// Joins what lies one behind the other in a file, wherever its place in memory is.
fn parts(runs: &[ResolvedRun], page_bytes: u64) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    for run in runs {
        let more = run.pages * page_bytes;
        match (run.source, parts.last_mut()) {
            (Source::At { level, page }, last) => {
                let start = page * page_bytes;
                match last {
                    Some(Part::Pages {
                        level: same,
                        offset,
                        length,
                    }) if *same == level && *offset + *length == start => *length += more,
                    _ => parts.push(Part::Pages {
                        level,
                        offset: start,
                        length: more,
                    }),
                }
            }
            (_, Some(Part::Zeros(length))) => *length += more,
            _ => parts.push(Part::Zeros(more)),
        }
    }
    parts
}

/// A piece of a [`FlatFile`].
#[derive(Debug)]
pub enum Piece {
    /// These bytes.
    Bytes(Vec<u8>),
    /// `length` bytes of `file` from `offset` on. Fewer mean that the file was cut since.
    File {
        /// The file.
        file: Arc<File>,
        /// Its path, for messages.
        path: PathBuf,
        /// First byte.
        offset: u64,
        /// How many bytes.
        length: u64,
    },
    /// So many bytes of zeros.
    Zeros(u64),
}

/// One file of a [`FlatView`], read from its begin to its end.
#[derive(Debug)]
pub struct FlatFile<'a> {
    chain: &'a Chain,
    /// Whose pages these are.
    space: Option<PagemapName>,
    parts: vec::IntoIter<Part>,
    open: BTreeMap<usize, (Arc<File>, PathBuf)>,
}

impl FlatFile<'_> {
    /// Bytes that are left to read: all of the file, before the first piece.
    pub fn length(&self) -> u64 {
        let lengths = self.parts.as_slice().iter().map(|part| match part {
            Part::Bytes(bytes) => bytes.len() as u64,
            Part::Whole { length, .. } | Part::Pages { length, .. } | Part::Zeros(length) => {
                *length
            }
        });
        lengths.sum()
    }

    /// The next piece; `None` at the end.
    pub fn next_piece(&mut self) -> Result<Option<Piece>, ImageError> {
        Ok(Some(match self.parts.next() {
            None => return Ok(None),
            Some(Part::Bytes(bytes)) => Piece::Bytes(bytes),
            Some(Part::Zeros(length)) => Piece::Zeros(length),
            Some(Part::Whole { file, path, length }) => Piece::File {
                file,
                path,
                offset: 0,
                length,
            },
            Some(Part::Pages {
                level,
                offset,
                length,
            }) => {
                let (file, path) = self.pages_file(level)?;
                Piece::File {
                    file,
                    path,
                    offset,
                    length,
                }
            }
        }))
    }

    fn pages_file(&mut self, level: usize) -> Result<(Arc<File>, PathBuf), ImageError> {
        if let Some(found) = self.open.get(&level) {
            return Ok(found.clone());
        }
        let space = self.space.expect("only pages files have pages");
        let (file, path) = self.chain.open_pages(level, space)?;
        if self.open.len() >= MAX_OPEN {
            self.open.clear();
        }
        let opened = (Arc::new(file), path);
        self.open.insert(level, opened.clone());
        Ok(opened)
    }
}

/// Whether two files of that name say the same: pagemaps may cut runs where they like.
#[cfg(test)]
pub(crate) fn same_image(name: &str, one: &[u8], other: &[u8]) -> bool {
    let joined = |bytes: &[u8]| {
        let page_size = crate::page::PageSize::new(4096).unwrap();
        let map = Pagemap::parse(bytes, name, page_size).unwrap();
        let mut runs: Vec<super::PageRun> = Vec::new();
        for run in map.runs() {
            match runs.last_mut() {
                Some(last) if last.end(page_size) == run.vaddr && last.flags == run.flags => {
                    last.pages += run.pages;
                }
                _ => runs.push(*run),
            }
        }
        (map.pages_id(), runs)
    };
    one == other
        || matches!(FileKind::of(name), FileKind::Pagemap(_)) && joined(one) == joined(other)
}

#[cfg(test)]
mod tests;
