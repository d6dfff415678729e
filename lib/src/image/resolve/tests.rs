use std::collections::BTreeMap;

use super::*;

fn page() -> PageSize {
    PageSize::new(4096).unwrap()
}

/// A pagemap from (page number, pages, flags).
fn pagemap(runs: &[(u64, u64, u32)]) -> Pagemap {
    let runs = runs
        .iter()
        .map(|&(number, pages, flags)| PageRun {
            vaddr: number * 4096,
            pages,
            flags: PageFlags::from_bits(flags).unwrap(),
        })
        .collect();
    Pagemap::new("pagemap-1.img", 1, page(), runs).unwrap()
}

/// (page number, pages, source) of the result.
fn summary(levels: &[&Pagemap]) -> Vec<(u64, u64, Source)> {
    let runs = resolve(levels).unwrap();
    runs.iter()
        .map(|run| (run.vaddr / 4096, run.pages, run.source))
        .collect()
}

fn at(level: usize, page: u64) -> Source {
    Source::At { level, page }
}

#[test]
fn nothing_resolves_to_nothing() {
    assert_eq!(resolve(&[]), Ok(vec![]));
    assert_eq!(resolve(&[&pagemap(&[])]), Ok(vec![]));
}

#[test]
fn parent_runs_split_along_the_parents_entries() {
    let newest = pagemap(&[(10, 1, 4), (11, 6, 1), (17, 2, 4)]);
    let parent = pagemap(&[(2, 5, 4), (11, 2, 4), (13, 1, 1), (14, 3, 6), (30, 1, 4)]);
    let oldest = pagemap(&[(12, 2, 4)]);
    assert_eq!(
        summary(&[&newest, &parent, &oldest]),
        [
            (10, 1, at(0, 0)),
            (11, 2, at(1, 5)),
            (13, 1, at(2, 1)),
            (14, 3, at(1, 7)),
            (17, 2, at(0, 1)),
        ]
    );
}

#[test]
fn absence_in_the_newest_hides_the_parents_pages() {
    let newest = pagemap(&[(1, 1, 1)]);
    let parent = pagemap(&[(0, 8, 4)]);
    assert_eq!(summary(&[&newest, &parent]), [(1, 1, at(1, 1))]);
}

#[test]
fn contiguous_runs_are_joined_only_with_the_same_flags() {
    let newest = pagemap(&[
        (1, 1, 4),
        (2, 1, 4),
        (3, 1, 6),
        (5, 1, 6),
        (6, 1, 0),
        (7, 1, 0),
    ]);
    assert_eq!(
        summary(&[&newest]),
        [
            (1, 2, at(0, 0)),
            (3, 1, at(0, 2)),
            (5, 1, at(0, 3)),
            (6, 2, Source::Zero),
        ]
    );
}

#[test]
fn lazy_and_zero_pages_are_told_apart_at_any_level() {
    let newest = pagemap(&[(1, 1, 2), (2, 3, 1)]);
    let parent = pagemap(&[(2, 1, 2), (3, 1, 0), (4, 1, 4)]);
    assert_eq!(
        summary(&[&newest, &parent]),
        [
            (1, 1, Source::Lazy),
            (2, 1, Source::Lazy),
            (3, 1, Source::Zero),
            (4, 1, at(1, 0))
        ]
    );
}

#[test]
fn pages_that_no_parent_has_are_an_error_with_their_address() {
    let newest = pagemap(&[(1, 9, 1)]);
    let missing = |vaddr: u64, pages, level, chain_ends| {
        Err(ResolveError::MissingParent {
            vaddr: vaddr * 4096,
            pages,
            level,
            chain_ends,
        })
    };
    assert_eq!(resolve(&[&newest]), missing(1, 9, 1, true));
    assert_eq!(resolve(&[&newest, &pagemap(&[])]), missing(1, 9, 1, false));
    assert_eq!(
        resolve(&[&newest, &pagemap(&[(1, 4, 4), (7, 9, 4)])]),
        missing(5, 2, 1, false)
    );
    assert_eq!(
        resolve(&[&newest, &pagemap(&[(0, 30, 1)])]),
        missing(1, 9, 2, true)
    );
}

#[test]
fn levels_must_agree_on_the_page_size() {
    let newest = pagemap(&[(16, 1, 1)]);
    let large = PageSize::new(65536).unwrap();
    let parent = Pagemap::new("pagemap-1.img", 1, large, vec![]).unwrap();
    assert_eq!(
        resolve(&[&newest, &parent]),
        Err(ResolveError::PageSizes { level: 1 })
    );
}

/// Page by page, with a map for each level: slow and obvious.
fn reference(levels: &[&Pagemap]) -> Option<BTreeMap<u64, (PageFlags, Source)>> {
    let maps: Vec<BTreeMap<u64, (PageFlags, u64)>> = levels
        .iter()
        .map(|pagemap| {
            let mut present = 0;
            let mut map = BTreeMap::new();
            for run in pagemap.runs() {
                for index in 0..run.pages {
                    map.insert(run.vaddr + index * 4096, (run.flags, present));
                    present += u64::from(run.flags.is_present());
                }
            }
            map
        })
        .collect();
    let mut result = BTreeMap::new();
    for (&vaddr, &(flags, _)) in &maps[0] {
        let mut level = 0;
        let source = loop {
            let (flags, page) = *maps.get(level)?.get(&vaddr)?;
            if flags.is_present() {
                break Source::At { level, page };
            } else if !flags.is_parent() {
                break if flags == PageFlags::ZERO {
                    Source::Zero
                } else {
                    Source::Lazy
                };
            }
            level += 1;
        };
        result.insert(vaddr, (flags, source));
    }
    Some(result)
}

/// xorshift64: the test needs variety, not quality.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }

    fn pagemap(&mut self, oldest: bool, dense: bool) -> Pagemap {
        let (mut number, mut runs) = (0, Vec::new());
        for _ in 0..self.below(12) {
            number += if dense { 0 } else { self.below(3) };
            let pages = 1 + self.below(5);
            let kinds = if oldest {
                &[4, 6, 0, 2][..]
            } else {
                &[1, 1, 1, 4, 6, 0, 2, 3]
            };
            let kind = usize::try_from(self.below(kinds.len() as u64)).unwrap();
            runs.push((number, pages, kinds[kind]));
            number += pages;
        }
        if dense {
            runs.push((number, 60, 4));
        }
        pagemap(&runs)
    }
}

#[test]
fn random_chains_resolve_as_the_page_by_page_reference_says() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut resolved = 0;
    for _ in 0..4000 {
        let depth = usize::try_from(1 + random.below(5)).unwrap();
        let maps: Vec<_> = (0..depth)
            .map(|level| {
                let dense = level > 0 && random.below(4) > 0;
                random.pagemap(level + 1 == depth, dense)
            })
            .collect();
        let levels: Vec<_> = maps.iter().collect();
        let Some(expected) = reference(&levels) else {
            assert!(resolve(&levels).is_err(), "{maps:?}");
            continue;
        };
        resolved += 1;
        let runs = resolve(&levels).unwrap();
        let mut pages = BTreeMap::new();
        for run in &runs {
            for index in 0..run.pages {
                let source = match run.source {
                    Source::At { level, page } => Source::At {
                        level,
                        page: page + index,
                    },
                    other => other,
                };
                let old = pages.insert(run.vaddr + index * 4096, (run.flags_at_top, source));
                assert_eq!(old, None, "a page comes twice");
            }
        }
        assert_eq!(pages, expected, "{maps:?}");
        for pair in runs.windows(2) {
            assert!(pair[0].vaddr < pair[1].vaddr);
            assert!(
                !continues(&pair[0], &pair[1], page()),
                "runs are joined: {pair:?}"
            );
        }
    }
    assert!(
        resolved > 1000,
        "enough chains resolve to make this a test: {resolved}"
    );
}

#[test]
fn a_chain_of_1024_levels_resolves() {
    let oldest = pagemap(&[(0, 1024, 4)]);
    let between = pagemap(&[(0, 1024, 1)]);
    let mut levels = vec![&between; 1023];
    levels.push(&oldest);
    assert_eq!(summary(&levels), [(0, 1024, at(1023, 0))]);
}
