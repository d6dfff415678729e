//! Which pages differ between two sets.

use std::collections::BTreeSet;

use super::chain::Chain;
use super::error::ImageError;
use super::name::PagemapName;
use super::pages::PagesReader;
use super::resolve::{ResolvedRun, Source};

/// Pages of one task or shared segment that differ between two sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryDiff {
    /// The pagemap; one of the sets may not have it.
    pub name: PagemapName,
    /// Pages in both, with the same content.
    pub same: u64,
    /// Pages in both, with other content.
    pub changed: u64,
    /// Pages that only the second set has.
    pub added: u64,
    /// Pages that only the first set has.
    pub removed: u64,
    /// Pages in both of which at least one was left at the source by a lazy dump.
    pub unknown: u64,
}

/// Compares the memory of two sets page by page, from `before` to `after`.
///
/// Pages that both find at the same place of the same file are not read.
pub fn diff(before: &Chain, after: &Chain) -> Result<Vec<MemoryDiff>, ImageError> {
    if before.page_size() != after.page_size() {
        return Err(ImageError::DifferentPageSizes {
            directory: after.newest().path().to_owned(),
            first: before.page_size().bytes(),
            second: after.page_size().bytes(),
        });
    }
    let names: BTreeSet<_> = [before, after]
        .iter()
        .flat_map(|chain| chain.newest().pagemaps().keys().copied())
        .collect();
    let mut pair = Pair {
        before,
        after,
        readers: (PagesReader::new(before), PagesReader::new(after)),
        buffer: Vec::new(),
    };
    names.into_iter().map(|name| pair.compare(name)).collect()
}

struct Pair<'a> {
    before: &'a Chain,
    after: &'a Chain,
    readers: (PagesReader<'a>, PagesReader<'a>),
    buffer: Vec<u8>,
}

impl Pair<'_> {
    fn compare(&mut self, name: PagemapName) -> Result<MemoryDiff, ImageError> {
        let (old_runs, new_runs) = (self.before.resolve(name)?, self.after.resolve(name)?);
        let mut diff = MemoryDiff {
            name,
            same: 0,
            changed: 0,
            added: 0,
            removed: 0,
            unknown: 0,
        };
        let page_bytes = self.before.page_size().bytes();
        let (mut old_runs, mut new_runs) = (old_runs.into_iter(), new_runs.into_iter());
        let (mut old, mut new) = (old_runs.next(), new_runs.next());
        while let (Some(left), Some(right)) = (old, new) {
            if left.vaddr < right.vaddr {
                let pages = left.pages.min((right.vaddr - left.vaddr) / page_bytes);
                diff.removed += pages;
                old = behind(left, pages, page_bytes).or_else(|| old_runs.next());
            } else if right.vaddr < left.vaddr {
                let pages = right.pages.min((left.vaddr - right.vaddr) / page_bytes);
                diff.added += pages;
                new = behind(right, pages, page_bytes).or_else(|| new_runs.next());
            } else {
                let pages = left.pages.min(right.pages);
                self.compare_runs(
                    &mut diff,
                    ResolvedRun { pages, ..left },
                    ResolvedRun { pages, ..right },
                )?;
                old = behind(left, pages, page_bytes).or_else(|| old_runs.next());
                new = behind(right, pages, page_bytes).or_else(|| new_runs.next());
            }
        }
        diff.removed += old
            .into_iter()
            .chain(old_runs)
            .map(|run| run.pages)
            .sum::<u64>();
        diff.added += new
            .into_iter()
            .chain(new_runs)
            .map(|run| run.pages)
            .sum::<u64>();
        Ok(diff)
    }

    /// Compares two runs of the same addresses.
    fn compare_runs(
        &mut self,
        diff: &mut MemoryDiff,
        old: ResolvedRun,
        new: ResolvedRun,
    ) -> Result<(), ImageError> {
        if old.source == Source::Lazy || new.source == Source::Lazy {
            diff.unknown += old.pages;
            return Ok(());
        }
        if self.same_place(diff.name, &old, &new) {
            diff.same += old.pages;
            return Ok(());
        }
        let page_len = self.before.page_size().byte_len();
        let page_bytes = self.before.page_size().bytes();
        let (old_reader, new_reader) = (&mut self.readers.0, &mut self.readers.1);
        let buffer = &mut self.buffer;
        old_reader.for_each_piece(diff.name, &old, |vaddr, bytes| {
            buffer.clear();
            let pages = (bytes.len() / page_len) as u64;
            let skip = (vaddr - old.vaddr) / page_bytes;
            let same_piece = behind(new, skip, page_bytes).map(|run| ResolvedRun { pages, ..run });
            if let Some(piece) = same_piece {
                new_reader.for_each_piece(diff.name, &piece, |_, bytes| {
                    buffer.extend_from_slice(bytes);
                    Ok::<(), ImageError>(())
                })?;
            }
            for (old_page, new_page) in bytes.chunks(page_len).zip(buffer.chunks(page_len)) {
                *(if old_page == new_page {
                    &mut diff.same
                } else {
                    &mut diff.changed
                }) += 1;
            }
            Ok::<(), ImageError>(())
        })
    }

    fn same_place(&self, name: PagemapName, old: &ResolvedRun, new: &ResolvedRun) -> bool {
        let place = |chain: &Chain, run: &ResolvedRun| match run.source {
            Source::At { level, page } => {
                let level = &chain.levels()[level];
                let pages_id = level.pagemaps().get(&name)?.pages_id();
                Some((level.id(), pages_id, page))
            }
            Source::Zero | Source::Lazy => None,
        };
        let both_zero = old.source == Source::Zero && new.source == Source::Zero;
        let old_place = place(self.before, old);
        both_zero || (old_place.is_some() && old_place == place(self.after, new))
    }
}

/// What of a run is left behind its first `pages` pages.
fn behind(run: ResolvedRun, pages: u64, page_bytes: u64) -> Option<ResolvedRun> {
    let source = match run.source {
        Source::At { level, page } => Source::At {
            level,
            page: page + pages,
        },
        other => other,
    };
    let left = run.pages - pages;
    (left > 0).then(|| ResolvedRun {
        vaddr: run.vaddr + pages * page_bytes,
        pages: left,
        source,
        ..run
    })
}
