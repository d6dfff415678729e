//! Each kind of memory is delivered, or left out, as CRIU's dump would have it.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crxfer::image::PagemapName;
use crxfer::live::Method;
use crxfer::page::PageSize;

use crate::support::{Pages, Workload, content, is_root, pass, reader};

/// Shared segments are opened through `map_files`, which needs CAP_CHECKPOINT_RESTORE.
fn as_root() -> bool {
    if !is_root() {
        eprintln!("skipped: only root may open map_files");
    }
    is_root()
}

fn indexes(pages: &Pages, space: PagemapName, begin: u64, count: u64) -> Vec<u64> {
    let page = PageSize::of_host().bytes();
    (0..count)
        .filter(|index| pages.contains_key(&(space, begin + index * page)))
        .collect()
}

#[test]
fn private_memory_is_delivered_as_a_dump_would_hold_it() {
    if !as_root() {
        return;
    }
    let Some(workload) = Workload::start("kinds") else {
        return;
    };
    let page = PageSize::of_host().bytes();
    for method in [None, Some(Method::Pagemap)] {
        let (_, pages) = pass(&mut reader(workload.pid(), method));
        let task = workload.task();
        let at = |name: &str| workload.number(name, "address");
        let page_of = |name, index| pages.get(&(task, at(name) + index * page));

        let written: Vec<_> = (0..600).filter(|index| !(10..20).contains(index)).collect();
        assert_eq!(indexes(&pages, task, at("plain"), 600), written);
        for index in [0, 7, 9, 20, 599] {
            assert_eq!(page_of("plain", index), Some(&content("plain", index)));
        }
        for index in 0..4 {
            assert_eq!(page_of("closed", index), Some(&content("closed", index)));
        }
        assert_eq!(indexes(&pages, task, at("private"), 8), [2]);
        assert_eq!(page_of("private", 2), Some(&content("private", 2)));
        assert!(indexes(&pages, task, at("ordinary"), 8).is_empty());
        if workload.facts["guarded"]["installed"] == true {
            let unguarded = [0, 1, 3, 4, 5, 6, 7];
            assert_eq!(indexes(&pages, task, at("guarded"), 8), unguarded);
        }
        // What lies in segments is theirs.
        assert!(indexes(&pages, task, at("shared"), 4096).is_empty());
        assert!(indexes(&pages, task, at("odd"), 3).is_empty());

        let child = PagemapName::Task(workload.number("child", "pid"));
        let of_child = |index| pages.get(&(child, at("plain") + index * page));
        assert_eq!(of_child(7), Some(&content("child", 7)));
        assert_eq!(of_child(8), Some(&content("plain", 8)));
    }
}

#[test]
fn segments_are_delivered_once_and_no_hole_is_filled() {
    if !as_root() {
        return;
    }
    let Some(workload) = Workload::start("kinds") else {
        return;
    };
    let page = PageSize::of_host().bytes();
    let mapped = segment(&workload, "shared", 4096);
    let descriptor = format!(
        "/proc/{}/fd/{}",
        workload.pid(),
        workload.number("idle", "fd")
    );
    let blocks = || [&mapped, &descriptor].map(|path| fs::metadata(path).unwrap().blocks());
    let before = blocks();

    let (pass, pages) = pass(&mut reader(workload.pid(), None));

    assert_eq!(blocks(), before);
    let shared = PagemapName::Shmem(fs::metadata(&mapped).unwrap().ino());
    assert_eq!(indexes(&pages, shared, 0, 4096), [0, 1000, 1001, 4095]);
    assert_eq!(pages[&(shared, 1000 * page)], content("shared", 1000));
    let idle = PagemapName::Shmem(workload.number("idle", "inode"));
    assert_eq!(indexes(&pages, idle, 0, 100), [3]);
    assert_eq!(pages[&(idle, 3 * page)], content("idle", 3));
    let odd = PagemapName::Shmem(workload.number("odd", "inode"));
    assert_eq!(indexes(&pages, odd, 0, 100), [0, 1, 2]);
    let mut last = vec![0; PageSize::of_host().byte_len()];
    last[..100].fill(b'x');
    assert_eq!(pages[&(odd, 2 * page)], last);
    let ordinary = PagemapName::Shmem(workload.number("ordinary", "inode"));
    assert!(!pass.spaces.contains(&ordinary));
    assert!(pass.spaces.contains(&idle) && pass.skipped.is_empty());
}

#[test]
fn system_v_memory_is_named_by_its_ipc_id() {
    if !as_root() {
        return;
    }
    let Some(workload) = Workload::start("sysv") else {
        return;
    };
    let (_, pages) = pass(&mut reader(workload.pid(), None));
    let segment = PagemapName::Shmem(workload.number("sysv", "id"));
    assert_eq!(indexes(&pages, segment, 0, 64), [9]);
    let page = PageSize::of_host().bytes();
    assert_eq!(pages[&(segment, 9 * page)], content("sysv", 9));
}

#[test]
fn both_methods_find_the_same_pages() {
    if !as_root() {
        return;
    }
    let Some(workload) = Workload::start("kinds") else {
        return;
    };
    let mut best = reader(workload.pid(), None);
    if best.method() == Method::Pagemap {
        eprintln!("skipped: this kernel has no PAGEMAP_SCAN");
        return;
    }
    let (_, scanned) = pass(&mut best);
    let (_, plain) = pass(&mut reader(workload.pid(), Some(Method::Pagemap)));
    let differing: Vec<_> = scanned
        .keys()
        .filter(|key| plain.get(key) != scanned.get(key))
        .chain(plain.keys().filter(|key| !scanned.contains_key(key)))
        .collect();
    assert!(differing.is_empty(), "{differing:x?}");
}

#[test]
fn huge_pages_are_delivered() {
    if !as_root() {
        return;
    }
    let Some(workload) = Workload::start("huge") else {
        return;
    };
    let page = PageSize::of_host().bytes();
    for method in [None, Some(Method::Pagemap)] {
        let (_, pages) = pass(&mut reader(workload.pid(), method));
        let begin = workload.number("huge", "address");
        let private = &pages[&(workload.task(), begin + 511 * page)];
        assert_eq!(private, &content("huge", 511));
        let mapped = segment(&workload, "huge", 512);
        let shared = PagemapName::Shmem(fs::metadata(mapped).unwrap().ino());
        assert_eq!(pages[&(shared, 300 * page)], content("hugeshared", 300));
    }
}

#[test]
fn swapped_pages_are_delivered() {
    let Some(workload) = Workload::start("swapped") else {
        return;
    };
    let out = workload.number("swapped", "out");
    if out == 0 {
        eprintln!("skipped: nothing is swapped out here (no swap space?)");
        return;
    }
    let page = PageSize::of_host().bytes();
    let (_, pages) = pass(&mut reader(workload.pid(), None));
    let begin = workload.number("swapped", "address");
    for index in 0..512 {
        let delivered = &pages[&(workload.task(), begin + index * page)];
        assert_eq!(*delivered, content("swapped", index));
    }
}

#[test]
fn a_userfaultfd_region_neither_blocks_nor_is_filled() {
    let Some(workload) = Workload::start("userfault") else {
        return;
    };
    let page = PageSize::of_host().bytes();
    let begin = workload.number("fault", "address");
    let (pass, pages) = pass(&mut reader(workload.pid(), None));
    assert_eq!(
        indexes(&pages, workload.task(), begin, 64),
        Vec::from_iter(0..8)
    );
    assert_eq!(pages[&(workload.task(), begin)], content("fault", 0));
    assert!(pass.took < Duration::from_secs(4), "{:?}", pass.took);

    // A page that goes between being found and being read: the read fails at once.
    let mem = File::open(format!("/proc/{}/mem", workload.pid())).unwrap();
    let (told, answer) = mpsc::channel();
    thread::spawn(move || told.send(mem.read_at(&mut [0; 8], begin + 40 * page)));
    let read = answer.recv_timeout(Duration::from_secs(4));
    assert!(read.expect("the read blocks").is_err());
}

#[test]
fn memory_that_two_processes_share_is_delivered_once() {
    if !as_root() {
        return;
    }
    let Some(workload) = Workload::start("sibling") else {
        return;
    };
    let (pass, pages) = pass(&mut reader(workload.pid(), None));
    assert_eq!(pass.tasks.len(), 2);
    assert_eq!(pass.spaces, [workload.task()]);
    let begin = workload.number("both", "address");
    assert_eq!(indexes(&pages, workload.task(), begin, 16).len(), 16);
}

#[test]
fn address_space_without_memory_costs_no_time() {
    if !as_root() {
        return;
    }
    let Some(workload) = Workload::start("reserved") else {
        return;
    };
    for method in [None, Some(Method::Pagemap)] {
        let (pass, pages) = pass(&mut reader(workload.pid(), method));
        let begin = workload.number("used", "address");
        assert_eq!(indexes(&pages, workload.task(), begin, 4).len(), 4);
        assert!(pass.took < Duration::from_secs(1), "{method:?}: {pass:?}");
    }
}

/// The segment behind a mapping of `workload`.
fn segment(workload: &Workload, name: &str, pages: u64) -> String {
    let what = if name == "huge" { "shared" } else { "address" };
    let begin = workload.number(name, what);
    let end = begin + pages * PageSize::of_host().bytes();
    format!("/proc/{}/map_files/{begin:x}-{end:x}", workload.pid())
}
