//! Real CRIU chains against their ground truth.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crxfer::image::{
    Chain, Completeness, CriuVersion, DumpStats, ImageError, Inventory, Pagemap, PagemapName,
    PagesReader, ProcessTree, diff, flatten, inspect, resolve,
};
use serde_json::Value;
use sha2::{Digest, Sha256};

fn testdata(chain: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("testdata")
        .join(chain)
}

fn open(directory: &str) -> Chain {
    Chain::open(testdata(directory), None).unwrap()
}

fn manifest(chain: &str) -> Value {
    serde_json::from_slice(&fs::read(testdata(chain).join("MANIFEST.json")).unwrap()).unwrap()
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// SHA-256 of all pages in address order, and the maximal runs as the manifests have them.
fn memory(chain: &Chain, name: PagemapName) -> (String, Vec<(String, u64)>) {
    let (mut hash, mut runs) = (Sha256::new(), Vec::<(u64, u64)>::new());
    let mut reader = PagesReader::new(chain);
    for run in chain.resolve(name).unwrap() {
        match runs.last_mut() {
            Some((vaddr, pages)) if *vaddr + *pages * 4096 == run.vaddr => *pages += run.pages,
            _ => runs.push((run.vaddr, run.pages)),
        }
        let read = reader.for_each_piece(name, &run, |_, bytes| {
            hash.update(bytes);
            Ok::<_, ImageError>(())
        });
        read.unwrap();
    }
    let runs = runs
        .into_iter()
        .map(|(vaddr, pages)| (format!("{vaddr:x}"), pages))
        .collect();
    (hex(&hash.finalize()), runs)
}

fn assert_memory(chain: &Chain, truth: &Value, place: &str) {
    let truth = truth.as_object().unwrap();
    let names: Vec<_> = chain
        .newest()
        .pagemaps()
        .keys()
        .map(PagemapName::to_string)
        .collect();
    assert_eq!(names, truth.keys().cloned().collect::<Vec<_>>(), "{place}");
    for (name, truth) in truth {
        let (digest, runs) = memory(chain, PagemapName::parse(name).unwrap());
        assert_eq!(digest, truth["sha256"].as_str().unwrap(), "{place}/{name}");
        let expected: Vec<(String, u64)> = serde_json::from_value(truth["runs"].clone()).unwrap();
        assert_eq!(runs, expected, "{place}/{name}");
    }
}

/// Each directory that holds memory, of all chains, with its truth.
fn memory_dirs() -> Vec<(String, Value)> {
    let mut found = Vec::new();
    for chain in ["memcached", "shm-tree", "memcached-pageserver"] {
        for (directory, facts) in manifest(chain)["dirs"].as_object().unwrap() {
            let truth = &facts["memory"];
            if truth
                .as_object()
                .is_some_and(|pagemaps| !pagemaps.is_empty())
            {
                found.push((format!("{chain}/{directory}"), truth.clone()));
            }
        }
    }
    assert_eq!(found.len(), 9);
    found
}

#[test]
fn every_directory_resolves_to_its_true_memory() {
    for (directory, truth) in memory_dirs() {
        let chain = open(&directory);
        assert_eq!(chain.page_size().bytes(), 4096);
        assert_memory(&chain, &truth, &directory);
    }
}

#[test]
fn flattened_directories_have_the_same_memory_and_no_parent() {
    let place = tempfile::tempdir().unwrap();
    for (directory, truth) in memory_dirs() {
        let chain = open(&directory);
        let out = place.path().join(directory.replace('/', "-"));
        let flattened = flatten(&chain, &out).unwrap();
        let flat = Chain::open(&out, None).unwrap();
        assert_eq!(
            (flat.levels().len(), &flat.newest().listing().parent),
            (1, &None)
        );
        assert_memory(&flat, &truth, &directory);
        assert_eq!(flat.completeness(), chain.completeness(), "{directory}");
        assert_eq!(flat.newest().listing().files.len() as u64, flattened.files);
        for file in &chain.newest().listing().files {
            let copied = flat.newest().listing().file(&file.name).unwrap();
            assert_eq!(copied.stat.mode, file.stat.mode);
            if !file.name.starts_with("page") {
                let read = |path: &Path| fs::read(path.join(&file.name)).unwrap();
                assert_eq!(read(&out), read(chain.newest().path()), "{}", file.name);
            }
        }
    }
    let left = fs::read_dir(place.path()).unwrap().count();
    assert_eq!(left, 9, "no temporary directory is left");
}

#[test]
fn completeness_of_the_chains_is_what_criu_made() {
    for (directory, expected) in [
        ("memcached/1", Completeness::PreDump),
        ("memcached/2", Completeness::PreDump),
        ("memcached/3", Completeness::Complete),
        ("shm-tree/1", Completeness::PreDump),
        ("shm-tree/3", Completeness::Complete),
        ("memcached-pageserver/client/1", Completeness::PreDump),
        ("memcached-pageserver/client/3", Completeness::MissingPages),
        ("memcached-pageserver/server/2", Completeness::PagesOnly),
        ("memcached-pageserver/server/3", Completeness::PagesOnly),
    ] {
        assert_eq!(open(directory).completeness(), expected, "{directory}");
    }
}

/// Puts `client/N` and `server/N` of the page-server chain together, with the server's parents.
fn merge_page_server(place: &Path) {
    let source = testdata("memcached-pageserver");
    for round in ["1", "2", "3"] {
        let merged = place.join(round);
        fs::create_dir(&merged).unwrap();
        for side in ["client", "server"] {
            for entry in fs::read_dir(source.join(side).join(round)).unwrap() {
                let entry = entry.unwrap();
                if entry.file_type().unwrap().is_file() {
                    fs::copy(entry.path(), merged.join(entry.file_name())).unwrap();
                }
            }
        }
    }
    symlink("../1", place.join("2/parent")).unwrap();
    symlink("../2", place.join("3/parent")).unwrap();
}

#[test]
fn a_merged_page_server_dump_is_complete() {
    let place = tempfile::tempdir().unwrap();
    merge_page_server(place.path());
    let newest = place.path().join("3");
    let chain = Chain::open(&newest, None).unwrap();
    let truth = &manifest("memcached-pageserver")["dirs"]["server/3"]["memory"];
    assert_memory(&chain, truth, "merged");
    assert_eq!(chain.completeness(), Completeness::Complete);
    fs::remove_file(newest.join("parent")).unwrap();
    let text = Chain::open(&newest, None)
        .unwrap()
        .completeness()
        .to_string();
    assert!(
        text.contains("there is no parent directory; CRIU would hang"),
        "{text}"
    );
}

#[test]
fn inventory_and_statistics_say_what_the_dump_was() {
    let read = |file: &str| fs::read(testdata("memcached").join(file)).unwrap();
    let inventory = Inventory::parse(&read("3/inventory.img"), "inventory.img").unwrap();
    assert_eq!((inventory.img_version, inventory.is_pre_dump()), (2, false));
    assert!(inventory.criu_run_id.is_some());
    let inventory = Inventory::parse(&read("2/inventory.img"), "inventory.img").unwrap();
    assert!(inventory.is_pre_dump() && inventory.dump_uptime.is_some());
    let stats = DumpStats::parse(&read("2/stats-dump"), "stats-dump").unwrap();
    assert_eq!(
        (stats.pages_written, stats.pages_skipped_parent),
        (386, 393)
    );
}

#[test]
fn inspect_counts_what_the_manifests_count() {
    for (directory, truth) in memory_dirs() {
        let summary = inspect(&open(&directory)).unwrap();
        for memory in &summary.memory {
            let truth = &truth[memory.name.to_string()];
            let truth = |count: &str| truth[count].as_u64().unwrap();
            assert_eq!(
                (memory.pages, memory.present),
                (truth("pages"), truth("present"))
            );
            assert_eq!(
                (memory.from_parent, memory.runs),
                (truth("parent"), truth("entries"))
            );
            assert_eq!(memory.left_at_source, 0);
        }
    }
    let summary = inspect(&open("shm-tree/3")).unwrap();
    assert_eq!((summary.criu, summary.levels), (CriuVersion::V4_1, 3));
    let segment = summary.memory.last().unwrap();
    assert_eq!(
        (segment.name, &segment.comm),
        (PagemapName::Shmem(14), &None)
    );
    assert!(summary.memory[0].comm.is_some());
    assert!(
        summary.total(|memory| memory.duplicate) > 0,
        "parent and child share pages"
    );
}

#[test]
fn a_set_differs_from_its_parent_by_what_was_written() {
    let (before, after) = (open("memcached/1"), open("memcached/2"));
    let [memory] = diff(&before, &after).unwrap()[..] else {
        panic!("one process")
    };
    assert_eq!((memory.added, memory.removed, memory.unknown), (0, 0, 0));
    assert_eq!(memory.same + memory.changed, 779);
    assert!(memory.changed > 0 && memory.changed <= 386, "{memory:?}");

    let [memory] = diff(&after, &after).unwrap()[..] else {
        panic!("one process")
    };
    assert_eq!((memory.same, memory.changed), (779, 0));
    let all = diff(&open("shm-tree/1"), &open("shm-tree/3")).unwrap();
    assert_eq!(
        all.last().unwrap().added,
        252,
        "the segment is in the dump only"
    );
    assert!(
        all.iter().any(|memory| memory.removed > 0),
        "some mappings are gone"
    );
}

/// Every file of a real dump that is parsed, with each bit of its first bytes flipped and cut at each
/// of its first lengths: an error or another value, never a panic.
#[test]
fn no_damage_to_a_real_file_makes_a_parser_panic() {
    let page_size = open("shm-tree/3").page_size();
    let parse = |name: &str, bytes: &[u8]| match name {
        "inventory.img" => Inventory::parse(bytes, name).is_ok(),
        "stats-dump" => DumpStats::parse(bytes, name).is_ok(),
        name if name.starts_with("pagemap-") => match Pagemap::parse(bytes, name, page_size) {
            Ok(pagemap) => resolve(&[&pagemap, &pagemap]).is_ok() || pagemap.needs_parent(),
            Err(error) => {
                assert!(error.to_string().starts_with(name), "{error}");
                false
            }
        },
        name => ProcessTree::parse(|wanted| match wanted {
            wanted if wanted == name => Ok(Some(bytes.to_vec())),
            wanted => Ok(fs::read(testdata("shm-tree/3").join(wanted)).ok()),
        })
        .is_ok(),
    };
    for name in [
        "inventory.img",
        "stats-dump",
        "pagemap-214.img",
        "pagemap-shmem-14.img",
        "pstree.img",
        "core-214.img",
        "ids-214.img",
        "mm-214.img",
        "memfd.img",
    ] {
        let good = fs::read(testdata("shm-tree/3").join(name)).unwrap();
        assert!(parse(name, &good), "{name}");
        for index in 0..good.len().min(120) {
            parse(name, &good[..index]);
            for bit in 0..8 {
                let mut bytes = good.clone();
                bytes[index] ^= 1 << bit;
                parse(name, &bytes);
            }
        }
    }
}
