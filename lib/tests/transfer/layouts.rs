//! What arrives in each layout, and what it costs.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use crxfer::delta::SetName;
use crxfer::image::{Chain, PageFlags};
use crxfer::transfer::{SendOptions, send};
use crxfer::wire::Layout;

use crate::images::{
    PAGE, copy_dir, image, page, real_chain, testdata, write_child, write_dump, write_files,
};
use crate::support::{
    Destination, LAYOUTS, Peer, code_of, count, memory, tempdir, tempdir_on_disk, tree,
};

const CHAINS: [&str; 3] = ["memcached", "shm-tree", "memcached-pageserver"];

fn truth(chain: &str, round: &str) -> serde_json::Value {
    let manifest = fs::read(testdata(chain).join("MANIFEST.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    let round = match chain {
        "memcached-pageserver" => format!("server/{round}"),
        _ => round.to_owned(),
    };
    manifest["dirs"][round]["memory"].clone()
}

fn assert_true_memory(set: &Path, chain: &str, round: &str) {
    let truth = truth(chain, round);
    let found = memory(set);
    assert_eq!(
        found.len(),
        truth.as_object().unwrap().len(),
        "{chain}/{round}"
    );
    for (name, (digest, runs)) in found {
        let truth = &truth[&name];
        assert_eq!(
            Some(digest.as_str()),
            truth["sha256"].as_str(),
            "{chain}/{round}/{name}"
        );
        let expected: Vec<(String, u64)> = serde_json::from_value(truth["runs"].clone()).unwrap();
        assert_eq!(runs, expected, "{chain}/{round}/{name}");
    }
}

/// The same bytes and modes in the same files, `parent` aside.
fn assert_same_files(a: &Path, b: &Path) {
    let files = |dir: &Path| {
        let mut tree = tree(dir);
        tree.remove(Path::new("parent"));
        tree
    };
    assert_eq!(files(a), files(b));
}

fn assert_flat(set: &Path) {
    let chain = Chain::open(set, None).unwrap();
    assert_eq!(chain.levels().len(), 1);
    assert!(fs::symlink_metadata(set.join("parent")).is_err());
    for pagemap in chain.newest().pagemaps().values() {
        assert_eq!(pagemap.pages_where(PageFlags::is_parent), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn real_chains_sent_one_by_one_have_their_true_memory_in_each_layout() {
    for layout in LAYOUTS {
        let place = tempdir();
        let to = Destination::at(&place.path().join("in"), layout).await;
        let peer = Peer::new();
        for chain in CHAINS {
            let source = place.path().join(chain);
            real_chain(chain, &source);
            for round in ["1", "2", "3"] {
                let report = peer.send(&source.join(round), &to).await;
                let set = to.set(round);
                assert_eq!(report.published.layout, layout);
                assert_eq!(report.ancestors, 0, "{chain}/{round} was there");
                let word = if round == "3" { "complete" } else { "pre-dump" };
                assert_eq!(report.published.completeness, word);
                assert_true_memory(&set, chain, round);
                match layout {
                    Layout::Faithful => assert_same_files(&set, &source.join(round)),
                    Layout::Flat => assert_flat(&set),
                    Layout::Incremental => {}
                }
            }
            // The sets before have their memory still, although the names were given away.
            if layout != Layout::Flat {
                let parent = to.set("3").join("parent");
                assert_true_memory(&parent, chain, "2");
                assert_true_memory(&parent.join("parent"), chain, "1");
            }
        }
        to.settled().await;
        assert_eq!(count(&to.dir.join(".crxfer/partial")), 0);
        to.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_directory_takes_its_ancestors_along() {
    for layout in LAYOUTS {
        let place = tempdir_on_disk();
        let to = Destination::at(&place.path().join("in"), layout).await;
        let peer = Peer::new();
        for chain in CHAINS {
            let source = place.path().join(chain);
            real_chain(chain, &source);
            let report = peer.send_as(&source.join("3"), chain, &to).await;
            assert_eq!(report.ancestors, 2);
            assert_true_memory(&to.set(chain), chain, "3");
            let again = peer.send_as(&source.join("3"), chain, &to).await;
            assert_eq!((again.ancestors, again.published.unchanged), (0, true));
        }
        to.stop().await;
    }
}

/// An ancestor that keeps its `../1` would lead beside `base/ID`, to a number that may exist.
#[tokio::test(flavor = "multi_thread")]
async fn ancestors_that_are_taken_along_find_a_parent_that_has_a_name() {
    let place = tempdir();
    let to = Destination::at(&place.path().join("in"), Layout::Faithful).await;
    let peer = Peer::new();
    let other = place.path().join("other");
    write_dump(&other, &[7, 8, 9]);
    peer.send(&other, &to).await;
    real_chain("memcached", place.path());
    peer.send(&place.path().join("1"), &to).await;
    let report = peer.send(&place.path().join("3"), &to).await;
    assert_eq!(report.ancestors, 1);
    assert_true_memory(&to.set("3"), "memcached", "3");
    to.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sets_without_all_that_a_restore_needs_are_carried_and_marked() {
    for layout in LAYOUTS {
        let place = tempdir();
        let to = Destination::at(&place.path().join("in"), layout).await;
        let peer = Peer::new();
        for (side, word) in [("client", "missing-pages"), ("server", "pages-only")] {
            let source = place.path().join(side);
            for round in ["1", "2", "3"] {
                let from = testdata("memcached-pageserver").join(side).join(round);
                copy_dir(&from, &source.join(round));
            }
            let report = peer.send_as(&source.join("3"), side, &to).await;
            assert_eq!(report.published.completeness, word);
        }
        assert_true_memory(&to.set("server"), "memcached-pageserver", "3");
        to.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn faithful_copies_keep_modes_and_holes() {
    let place = tempdir_on_disk();
    let source = place.path().join("dump");
    write_dump(&source, &[1, 2, 3]);
    let ghost = File::create(source.join("tmpfs-7.tar.gz.img")).unwrap();
    ghost.set_len(64 << 20).unwrap();
    ghost
        .write_all_at(b"near the end", (64 << 20) - 4096)
        .unwrap();
    fs::set_permissions(source.join("core-4.img"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::set_permissions(source.join("mm-4.img"), fs::Permissions::from_mode(0o444)).unwrap();
    fs::write(source.join("empty"), "").unwrap();
    let to = Destination::at(&place.path().join("in"), Layout::Faithful).await;
    let report = Peer::new().send(&source, &to).await;
    assert_same_files(&source, &to.set("dump"));
    let arrived = fs::metadata(to.set("dump").join("tmpfs-7.tar.gz.img")).unwrap();
    assert!(
        arrived.blocks() * 512 <= 1 << 20,
        "{} blocks",
        arrived.blocks()
    );
    assert!(report.wire_bytes.0 < 200 << 10, "{:?}", report.wire_bytes);
    to.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_opaque_files_are_streamed() {
    let place = tempdir();
    let source = place.path().join("dump");
    write_dump(&source, &[1, 2, 3]);
    let bytes: Vec<u8> = (1..6000).flat_map(page).collect();
    fs::write(source.join("tmpfs-7.tar.gz.img"), &bytes).unwrap();
    for layout in LAYOUTS {
        let to = Destination::at(&place.path().join(layout.as_str()), layout).await;
        Peer::new().send(&source, &to).await;
        let arrived = fs::read(to.set("dump").join("tmpfs-7.tar.gz.img")).unwrap();
        assert!(arrived == bytes);
        to.stop().await;
    }
}

/// Pages in the pages file of a stored set, its own and not its parents'.
fn own_pages(set: &Path) -> u64 {
    fs::metadata(set.join("pages-1.img")).unwrap().len() / PAGE as u64
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_dump_with_few_changes_becomes_a_small_increment() {
    let place = tempdir();
    let to = Destination::at(&place.path().join("in"), Layout::Incremental).await;
    let peer = Peer::new();
    let mut numbers: Vec<u64> = (1..=2000).collect();
    for round in 1..=3 {
        let source = place.path().join(format!("dump-{round}"));
        write_dump(&source, &numbers);
        let report = peer.send(&source, &to).await;
        let set = to.set(&format!("dump-{round}"));
        assert_eq!(memory(&set), memory(&source));
        if round > 1 {
            assert_eq!(own_pages(&set), 20);
            assert_eq!(report.published.base, Some(format!("dump-{}", round - 1)));
            let moved = report.wire_bytes.0 + report.wire_bytes.1;
            let limit = 20 * PAGE as u64 * 3 / 2 + 2000 * PAGE as u64 / 100;
            assert!(moved <= limit, "{moved} bytes of {limit}");
        }
        for number in numbers.iter_mut().skip(round * 100).take(20) {
            *number += 10_000 * round as u64;
        }
    }
    to.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unchanged_set_moves_and_writes_nothing() {
    for layout in LAYOUTS {
        let place = tempdir();
        let to = Destination::at(&place.path().join("in"), layout).await;
        let peer = Peer::new();
        let source = place.path().join("dump");
        write_dump(&source, &(1..=4000).collect::<Vec<_>>());
        peer.send(&source, &to).await;
        to.settled().await;
        let before = tree(&to.dir);
        let report = peer.send(&source, &to).await;
        to.settled().await;
        assert!(report.published.unchanged);
        assert_eq!((report.published.generation, before), (1, tree(&to.dir)));
        let moved = report.wire_bytes.0 + report.wire_bytes.1;
        assert!(moved <= 4000 * PAGE as u64 / 100, "{moved} bytes");
        to.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_base_is_found_or_named_or_left_out() {
    let place = tempdir();
    let to = Destination::at(&place.path().join("in"), Layout::Incremental).await;
    let peer = Peer::new();
    let dump = |name: &str, numbers: &[u64]| {
        let source = place.path().join(name);
        write_dump(&source, numbers);
        source
    };
    let a: Vec<u64> = (1..=100).collect();
    let b: Vec<u64> = (201..=300).collect();
    peer.send(&dump("a", &a), &to).await;
    let report = peer.send(&dump("b", &b), &to).await;
    assert_eq!(report.published.base, None, "nothing in common");
    let mut like_a = a.clone();
    like_a[3] = 999;
    let report = peer.send(&dump("c", &like_a), &to).await;
    assert_eq!(report.published.base.as_deref(), Some("a"));
    // Half of b, of a three quarters: still b if that is what was asked for.
    let mixed: Vec<u64> = a[..70].iter().chain(&b[70..]).copied().collect();
    let source = dump("d", &mixed);
    let base = Some(SetName::new("b").unwrap());
    let options = SendOptions {
        base,
        ..peer.options(&source, &to)
    };
    let report = send(options).await.unwrap();
    assert_eq!(report.published.base.as_deref(), Some("b"));
    assert_eq!(own_pages(&to.set("d")), 70);
    assert_eq!(memory(&to.set("d")), memory(&source));
    let base = Some(SetName::new("nowhere").unwrap());
    let error = send(SendOptions {
        base,
        ..peer.options(&source, &to)
    })
    .await
    .unwrap_err();
    assert!(error.to_string().contains("nowhere"), "{error}");
    to.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn chains_of_increments_stay_short() {
    let place = tempdir();
    let to = Destination::at(&place.path().join("in"), Layout::Incremental).await;
    let peer = Peer::new();
    let mut numbers: Vec<u64> = (1..=40).collect();
    let source = place.path().join("dump");
    let mut deepest = 0;
    for round in 0..40 {
        numbers[round] += 1000;
        let _ = fs::remove_dir_all(&source);
        write_dump(&source, &numbers);
        peer.send(&source, &to).await;
        deepest = deepest.max(Chain::open(to.set("dump"), None).unwrap().levels().len());
    }
    assert_eq!(memory(&to.set("dump")), memory(&source));
    assert!((2..=32).contains(&deepest), "{deepest} levels");
    to.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_is_not_understood_is_carried_or_refused() {
    let place = tempdir();
    let source = place.path().join("compressed");
    // The entry has a list of compressed blocks (field 6), as the line after CRIU 4.2 writes it.
    let entry = [8, 128, 128, 4, 16, 1, 32, 4, 40, 1, 50, 3, 10, 1, 100];
    let pagemap = image(&[0x5456_4319, 0x5608_4025], &[&[8, 1], &entry]);
    write_files(&source, &pagemap, &page(1)[..100], 3);
    let child = place.path().join("child");
    write_files(&child, &pagemap, &page(2)[..100], 3);
    symlink("../compressed", child.join("parent")).unwrap();
    for layout in LAYOUTS {
        let to = Destination::at(&place.path().join(layout.as_str()), layout).await;
        let sent = Peer::new().try_send(&source, &to).await;
        if layout == Layout::Faithful {
            assert_eq!(sent.unwrap().published.completeness, "opaque");
            assert_same_files(&source, &to.set("compressed"));
            let report = Peer::new().send(&child, &to).await;
            assert_eq!(
                (report.ancestors, report.published.completeness.as_str()),
                (1, "opaque")
            );
            assert_same_files(&child, &to.set("child"));
        } else {
            let error = sent.unwrap_err().to_string();
            assert!(
                error.contains("inventory.img") && error.contains("faithful"),
                "{error}"
            );
            to.settled().await;
            assert!(!to.set("compressed").exists());
        }
        to.stop().await;
    }
}

/// A page can equal the short last block of a file of bytes, whose blocks have another length.
#[tokio::test(flavor = "multi_thread")]
async fn pages_are_taken_from_the_end_of_other_files() {
    let place = tempdir();
    let to = Destination::at(&place.path().join("in"), Layout::Faithful).await;
    let peer = Peer::new();
    let first = place.path().join("first");
    write_dump(&first, &[1, 2, 3]);
    let mut bytes: Vec<u8> = (100..164).flat_map(page).collect();
    bytes.extend(page(50));
    fs::write(first.join("tmpfs-7.tar.gz.img"), &bytes).unwrap();
    peer.send(&first, &to).await;
    let second = place.path().join("second");
    write_dump(&second, &[1, 50, 3, 51]);
    let mut bytes: Vec<u8> = (200..264).flat_map(page).collect();
    bytes.extend(page(51));
    fs::write(second.join("tmpfs-7.tar.gz.img"), &bytes).unwrap();
    peer.send(&second, &to).await;
    assert_same_files(&second, &to.set("second"));
    to.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn five_thousand_small_files_arrive() {
    let place = tempdir();
    let source = place.path().join("many");
    write_dump(&source, &[1, 2, 3]);
    for number in 0..5000 {
        let record = format!("file number {number}");
        let bytes = image(
            &[0x5456_4319, 0x5621_3732],
            &[&[8, 1], &[18, 1, record.as_bytes()[0]]],
        );
        fs::write(source.join(format!("fdinfo-{number}.img")), bytes).unwrap();
    }
    let to = Destination::at(&place.path().join("in"), Layout::Incremental).await;
    let report = Peer::new().send(&source, &to).await;
    assert_eq!(report.files, 5006);
    assert_eq!(count(&to.set("many")), 5006);
    to.stop().await;
}

fn deep_chain(place: &Path, depth: usize) {
    write_dump(&place.join("1"), &[1, 2, 3, 4]);
    for level in 2..=depth {
        let mut numbers = [None; 4];
        numbers[level % 4] = Some(10 + level as u64);
        let dir = place.join(level.to_string());
        write_child(&dir, &numbers, &format!("../{}", level - 1));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deep_chain_works_in_each_layout() {
    let place = tempdir();
    deep_chain(place.path(), 100);
    let source = place.path().join("100");
    for layout in LAYOUTS {
        let to = Destination::at(&place.path().join(layout.as_str()), layout).await;
        let report = Peer::new().send(&source, &to).await;
        assert_eq!(report.ancestors, 99);
        assert_eq!(memory(&to.set("100")), memory(&source));
        to.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "minutes: run with --ignored"]
async fn a_chain_as_deep_as_allowed_works_in_each_layout() {
    let place = tempdir();
    deep_chain(place.path(), 1024);
    let source = place.path().join("1024");
    for layout in LAYOUTS {
        let to = Destination::at(&place.path().join(layout.as_str()), layout).await;
        #[expect(clippy::disallowed_methods, reason = "compared with the files' times")]
        let begun = std::time::SystemTime::now();
        let report = Peer::new().send(&source, &to).await;
        println!("{}: {:?}", layout.as_str(), begun.elapsed());
        assert_eq!(report.ancestors, 1023);
        assert_eq!(memory(&to.set("1024")), memory(&source));
        to.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_deeper_than_allowed_is_refused() {
    let place = tempdir();
    deep_chain(place.path(), 1025);
    let to = Destination::at(&place.path().join("in"), Layout::Flat).await;
    let error = Peer::new()
        .try_send(&place.path().join("1025"), &to)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("1024"), "{error}");
    assert_eq!(code_of(&error), None, "found before anything is sent");
    to.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_s_own_parent_is_used_and_not_another_s_of_the_same_name() {
    for layout in LAYOUTS {
        let place = tempdir();
        let to = Destination::at(&place.path().join("in"), layout).await;
        let peer = Peer::new();
        for (workload, first) in [("web", 1), ("db", 100)] {
            let source = place.path().join(workload);
            write_dump(&source.join("1"), &[first, first + 1, first + 2]);
            write_child(&source.join("2"), &[None, Some(first + 50), None], "../1");
        }
        let source = |path: &str| place.path().join(path);
        peer.send(&source("web/1"), &to).await;
        peer.send(&source("web/2"), &to).await;
        let before = memory(&to.set("2"));
        // The name 1 now is another workload's; 2 still is the first one's.
        peer.send(&source("db/1"), &to).await;
        assert_eq!(memory(&to.set("2")), before);
        peer.send(&source("db/2"), &to).await;
        assert_eq!(memory(&to.set("2")), memory(&source("db/2")));
        assert_eq!(memory(&to.set("1")), memory(&source("db/1")));
        peer.send_as(&source("web/2"), "back", &to).await;
        assert_eq!(memory(&to.set("back")), before);
        to.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn faithful_links_are_kept_where_they_are_right() {
    let place = tempdir();
    let to = Destination::at(&place.path().join("in"), Layout::Faithful).await;
    let peer = Peer::new();
    write_dump(&place.path().join("1"), &[1, 2]);
    write_child(&place.path().join("2"), &[None, Some(3)], "../1");
    peer.send(&place.path().join("1"), &to).await;
    let report = peer.send(&place.path().join("2"), &to).await;
    assert_eq!(
        fs::read_link(to.set("2").join("parent")).unwrap(),
        Path::new("../1")
    );
    assert_eq!(report.published.notes, Vec::<String>::new());
    let renamed = place.path().join("sub");
    fs::create_dir(&renamed).unwrap();
    write_child(&renamed.join("4"), &[None, None], "../../2");
    let report = peer.send(&renamed.join("4"), &to).await;
    assert!(
        report.published.notes[0].contains("../../2"),
        "{:?}",
        report.published.notes
    );
    assert_eq!(memory(&to.set("4")), memory(&place.path().join("2")));
    symlink("/nowhere", place.path().join("x")).unwrap();
    to.stop().await;
}
