//! A directory and the ancestors that its `parent` links lead to.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use super::complete::{self, Completeness, LevelFacts, Problem, SetFacts};
use super::dir::{DirId, FileStat, ImageDir, Listing, ParentLinks};
use super::error::ImageError;
use super::inventory::Inventory;
use super::name::{FileKind, PagemapName, pages_file_name};
use super::pagemap::{self, Pagemap};
use super::resolve::{ResolvedRun, resolve};
use super::stats::DumpStats;
use super::tree::ProcessTree;
use super::walk;
use crate::page::PageSize;

/// Most directories in one chain, the newest included.
pub const MAX_LEVELS: usize = 1024;

/// Largest file, in bytes, that is read whole for its records: pagemaps have their own limit.
const MAX_SMALL_BYTES: u64 = 64 << 20;

/// The first levels keep their descriptor, and of the older ones every so many: a chain as deep as
/// allowed would otherwise need more descriptors than a process usually has. The others are
/// reached again by following `parent` from the nearest kept one.
const HOLD_FIRST: usize = 8;
const HOLD_EVERY: usize = 16;

/// The page sizes of the hosts that CRIU runs on.
const KNOWN_PAGE_SIZES: [u64; 3] = [4 << 10, 16 << 10, 64 << 10];

/// How a chain is opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct ChainOptions {
    /// The page size; found from the files if not given.
    pub page_size: Option<PageSize>,
    /// Whether absolute `parent` links are followed.
    pub parent_links: ParentLinks,
}

/// One directory of a chain.
#[derive(Debug)]
pub struct Level {
    path: PathBuf,
    id: DirId,
    held: Option<ImageDir>,
    listing: Listing,
    sizes: BTreeMap<String, u64>,
    pagemaps: BTreeMap<PagemapName, Pagemap>,
}

impl Level {
    /// The path for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Which directory this is.
    pub fn id(&self) -> DirId {
        self.id
    }

    /// Its files: all of the newest directory, only pagemaps and pages of its ancestors.
    pub fn listing(&self) -> &Listing {
        &self.listing
    }

    /// Its pagemaps.
    pub fn pagemaps(&self) -> &BTreeMap<PagemapName, Pagemap> {
        &self.pagemaps
    }
}

/// A newest directory (level 0) with all its ancestors, their pagemaps parsed.
///
/// A chain with compressed memory opens too, so that its files can be copied as they are; whatever
/// needs the memory then gives the error of [`Chain::require_understood`].
#[derive(Debug)]
pub struct Chain {
    levels: Vec<Level>,
    page_size: PageSize,
    parent_links: ParentLinks,
    inventory: Option<Inventory>,
    opaque: Option<ImageError>,
}

impl Chain {
    /// Opens the directory at `path` and its ancestors. Absolute parent links are refused.
    pub fn open(path: impl AsRef<Path>, page_size: Option<PageSize>) -> Result<Self, ImageError> {
        Self::open_with(
            path,
            ChainOptions {
                page_size,
                ..ChainOptions::default()
            },
        )
    }

    /// Opens the directory at `path` and its ancestors.
    pub fn open_with(path: impl AsRef<Path>, options: ChainOptions) -> Result<Self, ImageError> {
        Self::from_dir(ImageDir::open(path)?, options)
    }

    /// Takes an open directory, and opens its ancestors.
    pub fn from_dir(newest: ImageDir, options: ChainOptions) -> Result<Self, ImageError> {
        let inventory = newest
            .read_optional("inventory.img", MAX_SMALL_BYTES)?
            .map(|bytes| Inventory::parse(&bytes, &shown(newest.path(), "inventory.img")))
            .transpose()?;
        let mut opaque = inventory.as_ref().and_then(|inventory| {
            inventory
                .check_understood(&shown(newest.path(), "inventory.img"))
                .err()
        });
        let mut levels = load_levels(newest, options.parent_links, &mut opaque)?;
        let page_size = options.page_size.unwrap_or_else(|| find_page_size(&levels));
        for level in &mut levels {
            level.adopt_page_size(page_size)?;
        }
        let parent_links = options.parent_links;
        Ok(Self {
            levels,
            page_size,
            parent_links,
            inventory,
            opaque,
        })
    }

    /// The directories, newest first; never empty.
    pub fn levels(&self) -> &[Level] {
        &self.levels
    }

    /// The newest directory.
    pub fn newest(&self) -> &Level {
        &self.levels[0]
    }

    /// The page size that was given, else found, else the host's.
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// The newest directory's inventory, if it has one.
    pub fn inventory(&self) -> Option<&Inventory> {
        self.inventory.as_ref()
    }

    /// Fails if the memory is stored in a way that this crate does not understand.
    pub fn require_understood(&self) -> Result<(), ImageError> {
        match &self.opaque {
            None => Ok(()),
            Some(ImageError::TooNew { file, what }) => Err(ImageError::TooNew {
                file: file.clone(),
                what: what.clone(),
            }),
            Some(ImageError::Compressed { file, what }) => Err(ImageError::Compressed {
                file: file.clone(),
                what,
            }),
            Some(other) => unreachable!("not an opaque format: {other}"),
        }
    }

    /// The pagemaps of that name, newest first, up to the first directory that has none.
    pub fn pagemaps_of(&self, name: PagemapName) -> Vec<&Pagemap> {
        self.levels
            .iter()
            .map_while(|level| level.pagemaps.get(&name))
            .collect()
    }

    /// Where each page of the newest directory's pagemap `name` is.
    pub fn resolve(&self, name: PagemapName) -> Result<Vec<ResolvedRun>, ImageError> {
        self.require_understood()?;
        resolve(&self.pagemaps_of(name)).map_err(|error| ImageError::Unresolved {
            file: shown(self.newest().path(), &name.to_string()),
            error,
        })
    }

    /// The directory of a level.
    pub fn open_dir(&self, level: usize) -> Result<ImageDir, ImageError> {
        let held = (0..=level)
            .rev()
            .find_map(|index| Some((index, self.levels[index].held.as_ref()?)));
        let (start, directory) = held.expect("the newest directory is held");
        let mut directory = directory.try_clone()?;
        for level in &self.levels[start + 1..=level] {
            let parent = directory.open_parent(self.parent_links)?;
            directory = parent
                .filter(|parent| parent.id() == level.id)
                .ok_or_else(|| ImageError::Changed(level.path.clone()))?;
        }
        Ok(directory)
    }

    /// The open pages file of a level's pagemap `name`, and its path for messages. Fails if the file
    /// is not the one that was there when the chain was opened.
    pub fn open_pages(
        &self,
        level: usize,
        name: PagemapName,
    ) -> Result<(File, PathBuf), ImageError> {
        let place = &self.levels[level];
        let missing = || ImageError::NoFile(place.path.join(name.to_string()));
        let pagemap = place.pagemaps.get(&name).ok_or_else(missing)?;
        let file_name = pages_file_name(pagemap.pages_id());
        let file = self.open_dir(level)?.open_file(&file_name)?;
        let path = place.path.join(&file_name);
        let stat = FileStat::of(&file).map_err(ImageError::io(&path, "read the status"))?;
        match place.listing.file(&file_name) {
            Some(info) if info.stat == stat => Ok((file, path)),
            _ => Err(ImageError::Changed(path)),
        }
    }

    /// The process tree of the newest directory; `None` without `pstree.img`.
    pub fn process_tree(&self) -> Result<Option<ProcessTree>, ImageError> {
        let directory = self.open_dir(0)?;
        ProcessTree::parse(|name| directory.read_optional(name, MAX_SMALL_BYTES))
    }

    /// The statistics of the newest dump, if they are in the directory.
    pub fn stats(&self) -> Result<Option<DumpStats>, ImageError> {
        let bytes = self
            .open_dir(0)?
            .read_optional("stats-dump", MAX_SMALL_BYTES)?;
        let name = shown(self.newest().path(), "stats-dump");
        bytes
            .map(|bytes| DumpStats::parse(&bytes, &name))
            .transpose()
    }

    /// Whether CRIU could restore the newest directory, and if not, why.
    pub fn completeness(&self) -> Completeness {
        if let Some(error) = &self.opaque {
            return Completeness::Opaque(error.to_string());
        }
        let tree = match self.process_tree() {
            Ok(tree) => tree,
            Err(error) => return Completeness::Damaged(vec![Problem::unreadable(&error)]),
        };
        let broken = self.broken_images();
        if !broken.is_empty() {
            return Completeness::Damaged(broken);
        }
        let levels: Vec<_> = self
            .levels
            .iter()
            .map(|level| LevelFacts {
                pagemaps: &level.pagemaps,
                sizes: &level.sizes,
            })
            .collect();
        let inventory = self.inventory.as_ref();
        complete::check(&SetFacts {
            levels: &levels,
            inventory,
            tree: tree.as_ref(),
        })
    }
}

impl Chain {
    // Images of the newest directory whose frames are damaged; CRIU does not read its parents'.
    fn broken_images(&self) -> Vec<Problem> {
        let directory = match self.open_dir(0) {
            Ok(directory) => directory,
            Err(error) => return vec![Problem::unreadable(&error)],
        };
        let check = |name: &str| walk::check_image(name, directory.open_file(name)?);
        let files = self.newest().listing().files.iter();
        files
            .filter(|file| walk::is_known(&file.name))
            .filter_map(|file| check(&file.name).err())
            .map(|error| Problem::unreadable(&error))
            .collect()
    }
}

impl Level {
    fn load(
        directory: &ImageDir,
        newest: bool,
        opaque: &mut Option<ImageError>,
    ) -> Result<Self, ImageError> {
        let listing = if newest {
            directory.list()
        } else {
            directory.list_memory()
        }?;
        let mut pagemaps = BTreeMap::new();
        for file in &listing.files {
            let FileKind::Pagemap(name) = file.kind else {
                continue;
            };
            let bytes = directory.read_small(&file.name, pagemap::MAX_FILE_BYTES)?;
            let place = shown(directory.path(), &file.name);
            match Pagemap::parse(&bytes, &place, smallest_page_size()) {
                Ok(pagemap) => _ = pagemaps.insert(name, pagemap),
                Err(error) if error.is_opaque() => _ = opaque.get_or_insert(error),
                Err(error) => return Err(error),
            }
        }
        let sizes = listing
            .files
            .iter()
            .map(|file| (file.name.clone(), file.stat.size))
            .collect();
        let (path, id) = (directory.path().to_owned(), directory.id());
        Ok(Self {
            path,
            id,
            held: None,
            listing,
            sizes,
            pagemaps,
        })
    }

    fn adopt_page_size(&mut self, page_size: PageSize) -> Result<(), ImageError> {
        if page_size == smallest_page_size() {
            return Ok(());
        }
        for (name, pagemap) in std::mem::take(&mut self.pagemaps) {
            let place = shown(&self.path, &name.to_string());
            self.pagemaps
                .insert(name, pagemap.with_page_size(&place, page_size)?);
        }
        Ok(())
    }
}

fn load_levels(
    newest: ImageDir,
    links: ParentLinks,
    opaque: &mut Option<ImageError>,
) -> Result<Vec<Level>, ImageError> {
    let newest_path = newest.path().to_owned();
    let mut levels: Vec<Level> = Vec::new();
    let mut seen = BTreeSet::new();
    let mut next = Some(newest);
    while let Some(directory) = next {
        let depth = levels.len();
        if !seen.insert((directory.id().device, directory.id().inode)) {
            let directory = directory.path().to_owned();
            return Err(ImageError::ParentLoop { directory, depth });
        }
        if depth == MAX_LEVELS {
            return Err(ImageError::TooDeep {
                directory: newest_path,
                limit: MAX_LEVELS,
            });
        }
        let mut level = Level::load(&directory, depth == 0, opaque)?;
        next = directory.open_parent(links)?;
        if depth < HOLD_FIRST || depth.is_multiple_of(HOLD_EVERY) {
            level.held = Some(directory);
        }
        levels.push(level);
    }
    Ok(levels)
}

/// Pagemaps are first parsed with this size: what is aligned to a larger one is aligned to it too.
fn smallest_page_size() -> PageSize {
    PageSize::new(KNOWN_PAGE_SIZES[0]).expect("4096 is a page size")
}

/// The page size at which pages files are exactly as large as their pagemaps say.
///
/// Files may be longer than accounted for, so one that fits no size says nothing. The host's size
/// if no file tells, or if they contradict one another.
fn find_page_size(levels: &[Level]) -> PageSize {
    let mut found = None;
    for (level, pagemap) in levels
        .iter()
        .flat_map(|level| level.pagemaps.values().map(move |map| (level, map)))
    {
        let Some(&size) = level.sizes.get(&pages_file_name(pagemap.pages_id())) else {
            continue;
        };
        let Some(page_size) = exact_page_size(pagemap, size) else {
            continue;
        };
        if *found.get_or_insert(page_size) != page_size {
            return PageSize::of_host();
        }
    }
    found.unwrap_or_else(PageSize::of_host)
}

fn exact_page_size(pagemap: &Pagemap, size: u64) -> Option<PageSize> {
    let pages = pagemap.present_pages();
    let bytes = size
        .checked_div(pages)
        .filter(|bytes| bytes.checked_mul(pages) == Some(size))?;
    let page_size = PageSize::new(bytes)
        .ok()
        .filter(|_| KNOWN_PAGE_SIZES.contains(&bytes))?;
    pagemap
        .runs()
        .iter()
        .all(|run| page_size.is_aligned(run.vaddr))
        .then_some(page_size)
}

fn shown(directory: &Path, name: &str) -> String {
    directory.join(name).display().to_string()
}

#[cfg(test)]
mod tests;
