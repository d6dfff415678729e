use std::collections::BTreeSet;

use super::super::pagemap::PageRun;
use super::super::tree::Task;
use super::*;
use crate::page::PageSize;

const NAME: PagemapName = PagemapName::Task(7);

/// One directory, owned.
#[derive(Clone, Default)]
struct Directory {
    pagemaps: BTreeMap<PagemapName, Pagemap>,
    sizes: BTreeMap<String, u64>,
}

impl Directory {
    /// Adds a pagemap of (page number, pages, flags) with a pages file of the right size.
    fn memory(mut self, name: PagemapName, pages_id: u32, runs: &[(u64, u64, u32)]) -> Self {
        let runs = runs
            .iter()
            .map(|&(number, pages, flags)| PageRun {
                vaddr: number * 4096,
                pages,
                flags: PageFlags::from_bits(flags).unwrap(),
            })
            .collect();
        let page_size = PageSize::new(4096).unwrap();
        let pagemap = Pagemap::new("pagemap", pages_id, page_size, runs).unwrap();
        self.sizes
            .insert(pages_file_name(pages_id), pagemap.present_bytes());
        self.sizes.insert(name.to_string(), 100);
        self.pagemaps.insert(name, pagemap);
        self
    }

    /// Adds files that are only there.
    fn files(mut self, names: &[&str]) -> Self {
        self.sizes
            .extend(names.iter().map(|name| ((*name).to_owned(), 100)));
        self
    }

    /// Sets the size of a file.
    fn size(mut self, name: &str, size: u64) -> Self {
        self.sizes.insert(name.to_owned(), size);
        self
    }
}

const DUMP_FILES: &[&str] = &[
    "inventory.img",
    "pstree.img",
    "core-7.img",
    "core-8.img",
    "mm-7.img",
];

fn dump(runs: &[(u64, u64, u32)]) -> Directory {
    Directory::default().memory(NAME, 1, runs).files(DUMP_FILES)
}

fn inventory(img_version: u32) -> Inventory {
    let entry = crxfer_proto::criu::InventoryEntry {
        img_version: Some(img_version),
        ..Default::default()
    };
    use super::super::framing::{Frame, Writer, magic};
    let mut image = Writer::new(Frame::V10, magic::INVENTORY);
    image.record(&entry);
    Inventory::parse(&image.finish(), "inventory.img").unwrap()
}

fn task(pid: u32, threads: &[u32]) -> Task {
    Task {
        pid,
        threads: threads.to_vec(),
        zombie: false,
        vm_id: Some(pid),
        comm: None,
    }
}

/// Process 7 with threads 7 and 8.
fn tree() -> ProcessTree {
    ProcessTree {
        tasks: vec![task(7, &[7, 8])],
        segments: BTreeSet::new(),
    }
}

fn judge(
    levels: &[&Directory],
    inventory: Option<&Inventory>,
    tree: Option<&ProcessTree>,
) -> Completeness {
    let levels: Vec<_> = levels
        .iter()
        .map(|level| LevelFacts {
            pagemaps: &level.pagemaps,
            sizes: &level.sizes,
        })
        .collect();
    check(&SetFacts {
        levels: &levels,
        inventory,
        tree,
    })
}

fn judge_dump(levels: &[&Directory]) -> Completeness {
    judge(levels, Some(&inventory(2)), Some(&tree()))
}

/// The only problem, as text.
fn problem(completeness: &Completeness) -> String {
    assert!(!completeness.is_restorable());
    match completeness {
        Completeness::Damaged(problems) => match &problems[..] {
            [only] => only.to_string(),
            more => panic!("expected one problem: {more:?}"),
        },
        other => panic!("expected damage, got {other:?}"),
    }
}

#[test]
fn a_whole_dump_is_complete() {
    let newest = dump(&[(1, 4, 4), (9, 1, 6)]);
    assert_eq!(judge_dump(&[&newest]), Completeness::Complete);
    assert!(judge_dump(&[&newest]).is_restorable());
    let longer = newest.size("pages-1.img", 1 << 20);
    assert_eq!(
        judge_dump(&[&longer]),
        Completeness::Complete,
        "trailing bytes do no harm"
    );
}

#[test]
fn kinds_of_incomplete_sets_are_told_apart() {
    let memory = Directory::default().memory(NAME, 65537, &[(1, 4, 4)]);
    assert_eq!(judge(&[&memory], None, None), Completeness::PagesOnly);
    let pre_dump = memory.clone().files(&["inventory.img"]);
    assert_eq!(
        judge(&[&pre_dump], Some(&inventory(0)), None),
        Completeness::PreDump
    );
    let without_memory = Directory::default().files(DUMP_FILES);
    assert_eq!(judge_dump(&[&without_memory]), Completeness::MissingPages);
    assert_eq!(
        judge_dump(&[&dump(&[(1, 4, 4), (9, 1, 2)])]),
        Completeness::Lazy
    );
}

#[test]
fn states_in_which_criu_would_hang_are_found() {
    let newest = dump(&[(1, 4, 1)]);
    let parent = Directory::default().memory(NAME, 1, &[(0, 9, 4)]);
    assert_eq!(judge_dump(&[&newest, &parent]), Completeness::Complete);

    let text = problem(&judge_dump(&[&newest]));
    assert!(
        text.starts_with("pagemap-7.img: 4 pages from address 0x1000"),
        "{text}"
    );
    assert!(text.contains("there is no parent directory"), "{text}");

    let text = problem(&judge_dump(&[&newest, &Directory::default()]));
    assert!(text.starts_with("pagemap-7.img of the parent: "), "{text}");
    assert!(
        text.contains("that directory has no such pagemap"),
        "{text}"
    );

    let text = problem(&judge_dump(&[
        &newest,
        &parent.clone().size("pages-1.img", 9 * 4096 - 1),
    ]));
    assert!(
        text.starts_with("pages-1.img of the parent: ends at byte 36863"),
        "{text}"
    );

    let text = problem(&judge_dump(
        &[&dump(&[(1, 4, 4)]).size("pages-1.img", 4096)],
    ));
    assert!(
        text.contains("ends at byte 4096, but 16384 bytes of pages are due"),
        "{text}"
    );

    let text = problem(&judge_dump(&[&dump(&[(1, 4, 3)]), &parent]));
    assert!(text.contains("both as lazy and as in the parent"), "{text}");
}

#[test]
fn states_in_which_criu_would_fail_are_found() {
    let whole = dump(&[(1, 4, 4)]);
    let without = |name: &str| {
        let mut directory = whole.clone();
        directory.sizes.remove(name).unwrap();
        directory
    };
    for name in ["core-7.img", "core-8.img", "mm-7.img", "pages-1.img"] {
        let text = problem(&judge_dump(&[&without(name)]));
        assert!(text.starts_with(&format!("{name}: is missing")), "{text}");
    }
    let text = problem(&judge(&[&whole], None, Some(&tree())));
    assert!(text.starts_with("inventory.img: is missing"), "{text}");
    let text = problem(&judge(&[&whole], Some(&inventory(2)), None));
    assert!(text.starts_with("pstree.img: is missing"), "{text}");
    let text = problem(&judge(&[&whole], Some(&inventory(0)), Some(&tree())));
    assert!(
        text.contains("a pre-dump, but there is a process tree"),
        "{text}"
    );
    let text = problem(&judge_dump(&[
        &dump(&[(1, 4, 1)]),
        &Directory::default().memory(NAME, 1, &[(1, 2, 4)]),
    ]));
    assert!(text.contains("2 pages from address 0x3000"), "{text}");
}

#[test]
fn what_is_no_image_directory_is_said_to_be_none() {
    let text = problem(&judge(
        &[&Directory::default().files(&["notes.txt"])],
        None,
        None,
    ));
    assert!(text.contains("not a CRIU image directory"), "{text}");
    let Completeness::Damaged(problems) = judge(&[&dump(&[])], None, None) else {
        panic!()
    };
    assert_eq!(
        problems.len(),
        2,
        "inventory and process tree are missing: {problems:?}"
    );
    assert!(!judge(&[], None, None).is_restorable());
}

#[test]
fn one_missing_pagemap_among_several_is_damage() {
    let tree = ProcessTree {
        tasks: vec![task(7, &[7]), task(9, &[9])],
        ..tree()
    };
    let newest = dump(&[(1, 1, 4)]).files(&["core-9.img", "mm-9.img"]);
    let text = problem(&judge(&[&newest], Some(&inventory(2)), Some(&tree)));
    assert!(text.starts_with("pagemap-9.img: is missing"), "{text}");

    let mut shared = tree.clone();
    shared.tasks[1].vm_id = Some(7);
    let result = judge(&[&newest], Some(&inventory(2)), Some(&shared));
    assert_eq!(
        result,
        Completeness::Complete,
        "process 9 shares the memory of 7"
    );

    let mut zombie = tree;
    zombie.tasks[1].zombie = true;
    let mut newest = newest;
    newest.sizes.remove("mm-9.img");
    let result = judge(&[&newest], Some(&inventory(2)), Some(&zombie));
    assert_eq!(result, Completeness::Complete, "a zombie has no memory");
}

#[test]
fn shared_segments_need_their_pagemaps() {
    let mut tree = tree();
    tree.segments.insert(5);
    let newest = dump(&[(1, 1, 4)]);
    let text = problem(&judge(&[&newest], Some(&inventory(2)), Some(&tree)));
    assert!(
        text.starts_with("pagemap-shmem-5.img: is missing"),
        "{text}"
    );
    let whole = newest.memory(PagemapName::Shmem(5), 2, &[(0, 3, 4)]);
    assert_eq!(
        judge(&[&whole], Some(&inventory(2)), Some(&tree)),
        Completeness::Complete
    );
}

#[test]
fn two_pagemaps_never_share_a_pages_file() {
    let newest = dump(&[(1, 3, 4)]).memory(PagemapName::Shmem(5), 1, &[(0, 3, 4)]);
    let text = problem(&judge_dump(&[&newest]));
    assert!(
        text.contains("names pages-1.img, which pagemap-7.img names too"),
        "{text}"
    );
}

#[test]
fn a_lazy_parent_is_damage_because_its_memory_is_gone() {
    let parent = Directory::default().memory(NAME, 1, &[(0, 9, 2)]);
    let text = problem(&judge_dump(&[&dump(&[(1, 4, 1)]), &parent]));
    assert!(
        text.contains("a lazy dump left them at the source"),
        "{text}"
    );
}

#[test]
fn damaged_pre_dumps_are_damaged() {
    let newest = Directory::default()
        .memory(NAME, 1, &[(1, 4, 1)])
        .files(&["inventory.img"]);
    problem(&judge(&[&newest], Some(&inventory(0)), None));
}
