//! Where the content of each page of a pagemap is, parents followed.
//!
//! The rules are CRIU's own. A page that the newest pagemap does not mention reads as zeros (or as
//! the mapped file), even if a parent mentions it: absence is authoritative. A PARENT page is looked
//! up in the pagemap of the same name one directory up, and so on; one that nobody has is an error.
//! Where a directory has no pagemap of that name, the chain ends.

use std::collections::VecDeque;

use super::pagemap::{PageFlags, PageRun, Pagemap};
use crate::page::PageSize;

/// Where the bytes of a resolved run are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// In the pages file of a directory of the chain.
    At {
        /// How many parents up, 0 being the newest directory.
        level: usize,
        /// Index of the run's first page in that level's pages file.
        page: u64,
    },
    /// In no file: left at the source by a lazy dump.
    Lazy,
    /// The pages are zeros.
    Zero,
}

/// Pages that follow one another in memory and in their pages file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ResolvedRun {
    /// Address of the first page.
    pub vaddr: u64,
    /// Number of pages.
    pub pages: u64,
    /// The flags of the newest directory's entry.
    pub flags_at_top: PageFlags,
    /// Where the bytes are.
    pub source: Source,
}

/// Pages of which the content cannot be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// A level marks pages as in the parent, and the next level does not have them.
    #[error("{}", missing_text(*vaddr, *pages, *level, *chain_ends))]
    MissingParent {
        /// Address of the first missing page.
        vaddr: u64,
        /// How many pages from there are missing.
        pages: u64,
        /// The level that should have them (1: the parent of the newest directory).
        level: usize,
        /// Whether that level has no pagemap of this name at all. CRIU hangs on such a set.
        chain_ends: bool,
    },
    /// Two levels count in different page sizes.
    #[error("the pagemap {level} parents up has another page size than the newest")]
    PageSizes {
        /// The level that differs.
        level: usize,
    },
}

fn missing_text(vaddr: u64, pages: u64, level: usize, chain_ends: bool) -> String {
    let reason = match (level, chain_ends) {
        (1, true) => "the parent directory or its pagemap of this name is missing".to_owned(),
        (_, true) => format!("the directory {level} parents up or its pagemap is missing"),
        (1, false) => "the parent's pagemap does not have them".to_owned(),
        (_, false) => format!("the pagemap {level} parents up does not have them"),
    };
    format!("{pages} pages from address {vaddr:#x} should be in a parent, but {reason}")
}

/// A run that still has to be found, in the address order of the newest pagemap.
#[derive(Clone, Copy)]
struct Pending {
    vaddr: u64,
    pages: u64,
    flags_at_top: PageFlags,
}

/// Finds the content of every page of `levels[0]`, the newest pagemap.
///
/// `levels[1]` is the pagemap of the same name in its parent, and so on up to the first directory
/// that has none. The result is in ascending order, with runs joined where both memory and source
/// go on. Takes time in proportion to the entries, and to the runs still pending, of each level.
pub fn resolve(levels: &[&Pagemap]) -> Result<Vec<ResolvedRun>, ResolveError> {
    let Some((newest, parents)) = levels.split_first() else {
        return Ok(Vec::new());
    };
    let page_size = newest.page_size();
    let mut found = Vec::with_capacity(newest.runs().len());
    let mut pending: Vec<Pending> = newest
        .runs()
        .iter()
        .map(|run| Pending {
            vaddr: run.vaddr,
            pages: run.pages,
            flags_at_top: run.flags,
        })
        .collect();
    pending = search_level(0, newest, pending, &mut found)?;
    for (above, pagemap) in parents.iter().enumerate() {
        if pending.is_empty() {
            break;
        }
        let level = above + 1;
        if pagemap.page_size() != page_size {
            return Err(ResolveError::PageSizes { level });
        }
        pending = search_level(level, pagemap, pending, &mut found)?;
    }
    if let Some(lost) = pending.first() {
        let (vaddr, pages, level) = (lost.vaddr, lost.pages, levels.len());
        return Err(ResolveError::MissingParent {
            vaddr,
            pages,
            level,
            chain_ends: true,
        });
    }
    found.sort_unstable_by_key(|run| run.vaddr);
    Ok(join(found, page_size))
}

/// Looks `pending` up in one pagemap. What it has goes to `found`, what it leaves to its parent is
/// returned; both in ascending order.
fn search_level(
    level: usize,
    pagemap: &Pagemap,
    pending: Vec<Pending>,
    found: &mut Vec<ResolvedRun>,
) -> Result<Vec<Pending>, ResolveError> {
    let page_bytes = pagemap.page_size().bytes();
    let mut cursor = Cursor {
        runs: pagemap.runs(),
        page: 0,
        page_size: pagemap.page_size(),
    };
    let mut left = Vec::new();
    let mut wanted = VecDeque::from(pending);
    while let Some(want) = wanted.pop_front() {
        let missing = |pages| ResolveError::MissingParent {
            vaddr: want.vaddr,
            pages,
            level,
            chain_ends: false,
        };
        let run = cursor.seek(want.vaddr).ok_or_else(|| missing(want.pages))?;
        if run.vaddr > want.vaddr {
            return Err(missing(
                want.pages.min((run.vaddr - want.vaddr) / page_bytes),
            ));
        }
        let skipped = (want.vaddr - run.vaddr) / page_bytes;
        let pages = want.pages.min(run.pages - skipped);
        if pages < want.pages {
            let vaddr = want.vaddr + pages * page_bytes;
            wanted.push_front(Pending {
                vaddr,
                pages: want.pages - pages,
                ..want
            });
        }
        let source = if run.flags.is_parent() {
            left.push(Pending { pages, ..want });
            continue;
        } else if run.flags.is_present() {
            Source::At {
                level,
                page: cursor.page + skipped,
            }
        } else if run.flags == PageFlags::ZERO {
            Source::Zero
        } else {
            Source::Lazy
        };
        let Pending {
            vaddr,
            flags_at_top,
            ..
        } = want;
        found.push(ResolvedRun {
            vaddr,
            pages,
            flags_at_top,
            source,
        });
    }
    Ok(left)
}

/// A place in a pagemap that only moves forward.
struct Cursor<'a> {
    /// The current run and those behind it.
    runs: &'a [PageRun],
    /// PRESENT pages before the current run: its place in the pages file.
    page: u64,
    page_size: PageSize,
}

impl<'a> Cursor<'a> {
    /// The first run that ends above `vaddr`.
    fn seek(&mut self, vaddr: u64) -> Option<&'a PageRun> {
        while let Some((run, rest)) = self.runs.split_first() {
            if run.end(self.page_size) > vaddr {
                return Some(run);
            }
            if run.flags.is_present() {
                self.page += run.pages;
            }
            self.runs = rest;
        }
        None
    }
}

fn join(runs: Vec<ResolvedRun>, page_size: PageSize) -> Vec<ResolvedRun> {
    let mut joined: Vec<ResolvedRun> = Vec::with_capacity(runs.len());
    for run in runs {
        match joined.last_mut() {
            Some(last) if continues(last, &run, page_size) => last.pages += run.pages,
            _ => joined.push(run),
        }
    }
    joined
}

fn continues(last: &ResolvedRun, next: &ResolvedRun, page_size: PageSize) -> bool {
    let source = match (last.source, next.source) {
        (
            Source::At { level, page },
            Source::At {
                level: next_level,
                page: next_page,
            },
        ) => level == next_level && page + last.pages == next_page,
        (last, next) => last == next,
    };
    source
        && last.flags_at_top == next.flags_at_top
        && last.vaddr + last.pages * page_size.bytes() == next.vaddr
}

#[cfg(test)]
mod tests;
